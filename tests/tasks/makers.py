"""Files of every kind for the tests of data loading."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]


def rows(n: int = 20) -> list[Row]:
    """Alternating classes, texts that differ."""
    return [
        {"text": f"the {'cat' if i % 2 else 'dog'} sat on one {i}", "label": "pos" if i % 2 else "neg"}
        for i in range(n)
    ]


def csv(path: Path, records: list[Row]) -> Path:
    lines = [",".join(records[0])] + [",".join("" if v is None else str(v) for v in r.values()) for r in records]
    path.write_text("\n".join(lines) + "\n")
    return path


def jsonl(path: Path, records: list[Row]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def parquet(path: Path, records: list[Row]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(records), path)
    return path


def png(value: int = 0, size: tuple[int, int] = (10, 6), kind: str = "png") -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 255 - value, 7)).save(buffer, kind)
    return buffer.getvalue()


def wav(frequency: float = 440.0, seconds: float = 0.1, rate: int = 8000) -> bytes:
    import soundfile

    buffer = io.BytesIO()
    time = np.arange(round(seconds * rate)) / rate
    soundfile.write(buffer, 0.5 * np.sin(2 * np.pi * frequency * time), rate, format="WAV")
    return buffer.getvalue()


def class_folders(root: Path, classes: tuple[str, ...], make: Any, suffix: str, n: int = 6) -> Path:
    for k, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(n):
            (root / name / f"{i:02d}{suffix}").write_bytes(make(10 * i + 100 * k + 1))
    return root
