"""Images and sounds: from bytes or paths in a column to pixels and samples, every fault with its file and row.

A media column holds structs {bytes, path}. Where bytes come from a table, `path` says "file, row n": a label for errors, never opened.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import replace
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from petiole.errors import DataError, need
from petiole.tasks.names import one_line

if TYPE_CHECKING:
    from petiole.tasks.sources import Split

SUFFIXES = {
    "image": frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}),
    "audio": frozenset({".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif", ".opus"}),
}
ARTICLE = {"image": "an image", "audio": "a sound"}


def feature(kind: str) -> Any:
    """The `datasets` type of a media column. Images decode on access; sounds stay as they are, for that decoder needs torchcodec."""
    datasets = need("compare", "datasets")
    return (
        datasets.Image() if kind == "image" else {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    )


def sniff(value: Any) -> str | None:
    """ "image" or "audio" by suffix or first bytes; None if it looks like neither."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        suffix = Path(value).suffix.lower()
        return next((kind for kind, suffixes in SUFFIXES.items() if suffix in suffixes), None)
    if isinstance(value, bytes):
        sound = value[:4] in (b"RIFF", b"fLaC", b"OggS", b"FORM") and value[8:12] != b"WEBP"
        return "audio" if sound or value[:3] == b"ID3" or value[:2] == b"\xff\xfb" else "image"
    return None


def structs(dataset: Any, column: str) -> Any:
    """The dataset with the raw {bytes, path} in a media column."""
    datasets = need("compare", "datasets")
    if isinstance(dataset.features[column], datasets.Image):
        return dataset.cast_column(column, datasets.Image(decode=False))
    if isinstance(dataset.features[column], datasets.Audio):
        return dataset.cast_column(column, datasets.Audio(decode=False))
    return dataset


def normalise(split: Split, column: str, kind: str, remote: bool) -> Split:
    """Paths, bytes or structs in a column -> structs, with file and row in `path` where the bytes are in a table.

    Raises:
        DataError: an empty cell or a file that isn't there.
    """
    pa = need("compare", "pyarrow")
    dataset = structs(split.dataset, column)
    if remote:  # bytes or files in the Hub's cache, as they are
        return replace(split, dataset=dataset.cast_column(column, feature(kind)) if kind == "image" else dataset)
    if split.origin.each:
        return split
    table = dataset.with_format("arrow")[:]
    values = [_struct(split, i, column, kind, cell.as_py()) for i, cell in enumerate(table[column])]
    index = table.column_names.index(column)
    type_, step = pa.struct({"bytes": pa.binary(), "path": pa.string()}), 1000  # one array holds 2 GiB at most
    array = pa.chunked_array([pa.array(values[i : i + step], type_) for i in range(0, len(values), step)])
    features = dataset.features.copy()
    features[column] = feature(kind)
    datasets = need("compare", "datasets")
    table = table.replace_schema_metadata(None).set_column(index, column, array)
    return replace(split, dataset=datasets.Dataset(table.cast(features.arrow_schema)))


def _struct(split: Split, index: int, column: str, kind: str, value: Any) -> dict[str, Any]:
    where, value = split.where(index), _both(value)
    if not (value.get("bytes") or value.get("path")):
        raise DataError(
            f"{where}, column {column!r}: empty where {ARTICLE[kind]} is expected\nGive a path or the file's bytes, or remove the row."
        )
    if value.get("bytes"):
        return {"bytes": value["bytes"], "path": where}
    path = split.origin.folder(int(split.rows[index])) / value["path"]
    if not path.is_file():
        raise DataError(f"{where}, column {column!r}: no file {path}\nPaths start at the folder of the table.")
    return {"bytes": None, "path": str(path.absolute())}


def check(split: Split, column: str, kind: str) -> None:
    """Decode every row once.

    Raises:
        DataError: how many can't be read, and file, row and reason of the first.
    """
    probe: Callable[[Any, str], Any] = _probe_image if kind == "image" else read_audio
    faults: list[str] = []
    for i, value in enumerate(structs(split.dataset, column)[column]):
        try:
            probe(value, split.where(i))
        except DataError as error:
            faults.append(str(error).splitlines()[0])
    if faults:
        count = f"{len(faults)} of {len(split)} rows can't be read. " if len(faults) > 1 else ""
        raise DataError(f"{faults[0]}\n{count}Replace the file or remove the row.")


def _both(value: Any) -> dict[str, Any]:
    """Bytes, a path, a struct or nothing -> {bytes, path}."""
    if isinstance(value, dict):
        return value
    return {"bytes": value if isinstance(value, bytes) else None, "path": value if isinstance(value, str) else None}


def _source(value: dict[str, Any]) -> Any:
    return io.BytesIO(value["bytes"]) if value.get("bytes") else value["path"]


def _name(value: dict[str, Any], where: str) -> str:
    """What to call a row in an error: where it is listed, and its own file if it has one."""
    path = value.get("path")
    if not path or path == where or (where and ", row " not in where):
        return where
    return f"{path} ({where})" if where and ", row " not in path else str(path)


# ----------------------------------------------------------------------------------------------------------------------- images


def read_image(value: Any, where: str) -> Any:
    """{bytes, path} -> a PIL image, RGB, upright. `where` names the row in errors; "" if its path says enough.

    Raises:
        DataError: not an image, truncated, or so large that it could be an attack.
    """
    ops = need("compare", "PIL.ImageOps")
    return _decoded(value, where, lambda image: ops.exif_transpose(image).convert("RGB"))


def _probe_image(value: Any, where: str) -> None:
    def decode(image: Any) -> None:
        image.draft("RGB", (1, 1))  # JPEG: a small version of the whole file, many times faster
        image.load()

    _decoded(value, where, decode)


def _decoded(value: Any, where: str, use: Callable[[Any], Any]) -> Any:
    pil, value = need("compare", "PIL.Image"), _both(value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pil.DecompressionBombWarning)
            with pil.open(_source(value)) as image:
                return use(image)
    except Exception as error:  # decoders raise whatever a damaged file makes them run into
        reason = "not an image" if isinstance(error, pil.UnidentifiedImageError) else one_line(error)
        raise DataError(
            f"{_name(value, where)}: unreadable image ({reason})\nReplace the file or remove the row."
        ) from error


# ----------------------------------------------------------------------------------------------------------------------- sounds


def read_audio(value: Any, where: str) -> tuple[np.ndarray, int]:
    """{bytes, path} -> samples (n,) in float32, channels averaged, and their rate in Hz.

    Raises:
        DataError: not a sound, no samples, samples that are not finite.
        MissingExtra: soundfile isn't installed.
    """
    soundfile, value = need("audio", "soundfile"), _both(value)
    try:
        samples, rate = soundfile.read(_source(value), dtype="float32", always_2d=True)
    except Exception as error:
        raise DataError(
            f"{_name(value, where)}: unreadable sound ({one_line(error)})\nReplace the file or remove the row."
        ) from error
    wave = samples.mean(axis=1)
    if not len(wave) or not np.isfinite(wave).all():
        reason = "no samples" if not len(wave) else "samples that are not finite"
        raise DataError(f"{_name(value, where)}: unreadable sound ({reason})\nReplace the file or remove the row.")
    return wave, int(rate)


def resample(wave: np.ndarray, rate: int, target: int) -> np.ndarray:
    """Samples (n,) at one rate -> (ceil(n · target / rate),) at another, by a polyphase low-pass filter."""
    if rate == target:
        return wave
    signal = need("compare", "scipy.signal")
    common = gcd(rate, target)
    return np.asarray(signal.resample_poly(wave, target // common, rate // common), dtype=np.float32)
