"""What docs/tasks.md says is what comes out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from petiole.tasks.metrics import METRICS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tasks.md"


def test_the_first_example_prints_what_the_page_shows(capsys: pytest.CaptureFixture[str]) -> None:
    code, shown = re.findall(r"```(?:python)?\n(.*?)```", PAGE.read_text(), re.DOTALL)[:2]
    exec(compile(code, str(PAGE), "exec"), {})
    printed = capsys.readouterr().out
    *first, metrics = shown.strip().splitlines()
    assert printed.splitlines()[:-1] == first
    assert eval(printed.splitlines()[-1]) == pytest.approx(eval(metrics), abs=0.02)


def test_a_metric_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    (code,) = (
        block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "def top3" in block
    )
    monkeypatch.delitem(METRICS, "top3", raising=False)
    exec(compile(code, str(PAGE), "exec"), {})
    assert METRICS.pop("top3")(torch.eye(5), torch.tensor([0, 1, 2, 3, 0])) == 0.8
