"""Ranks by site, and their picture."""

from __future__ import annotations

from pathlib import Path

import pytest

import petiole as pt
import tiny
from petiole.errors import AttachError


def test_ranks_by_site() -> None:
    tuned = pt.attach(tiny.model("bert"), [pt.LoRA(rank=3, layers=(0,)), pt.LoRA(rank=2, roles=("up",), layers=(1,))])
    found = pt.rank_pattern(tuned)
    assert sorted(found.values()) == [2, 3, 3] and any("q" in key for key in found)


def test_a_picture_of_two_stacks(tmp_path: Path) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    tuned = pt.attach(tiny.model("t5"), pt.IncreLoRA())
    path = pt.draw_ranks(tuned, tmp_path / "ranks.png")
    image = pyplot.imread(path)
    assert image.shape[0] > 200 and image.std() > 0.05
    assert not pyplot.get_fignums()  # nothing is left open


def test_without_ranks_it_says_so(tmp_path: Path) -> None:
    tuned = pt.attach(tiny.model("bert"), pt.HoulsbyAdapter())
    assert pt.rank_pattern(tuned) == {}
    with pytest.raises(AttachError, match="no rank at any site; it is houlsby"):
        pt.draw_ranks(tuned, tmp_path / "ranks.png")
