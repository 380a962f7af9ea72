"""The code on docs/training.md runs as it stands, from top to bottom."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "training.md"


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "training begins anew"
            exec(compile(block, str(PAGE), "exec"), names)
    assert names["trainer"].state.global_step == 4 and names["events"].step == 8
    assert (tmp_path / "digits.petiole.safetensors").is_file()
