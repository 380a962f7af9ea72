"""Plots: every point is named, no name covers another, and what is missing draws nothing."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from petiole.compare.plots import against, curves, label, overlap, plots
from petiole.compare.table import Row, axes, ranked

AXES = axes(["params", "memory"])


def rows(count: int, seed: int = 0) -> list[Row]:
    draw = random.Random(seed)
    made = [
        Row(
            f"method-{i}", ["full", "lowrank", "adapters", "prompts"][i % 4], [], mean=draw.uniform(0.6, 0.9), sd=0.02,
            trainable_parameters=int(10 ** draw.uniform(3, 7)), peak_bytes=draw.randrange(10**7, 5 * 10**7),
            curve=[[s, 1 / s] for s in range(1, 9)], course=[[4, 0.5], [8, 0.6]],
        )
        for i in range(count)
    ]  # fmt: skip
    return ranked([*made, Row("bare", "bare", [], mean=0.1, reference=True)], AXES)


def test_all_plots_are_written_as_png(tmp_path: Path) -> None:
    names = plots(rows(12), AXES, "accuracy", percent=True, higher_is_better=True, folder=tmp_path)
    assert names == ["score-params.png", "score-memory.png", "loss.png", "learning.png"]
    for name in names:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG") and (tmp_path / name).stat().st_size > 5000


def test_the_same_rows_give_the_same_bytes() -> None:
    table = rows(5)
    assert against(table, AXES[0], "accuracy", percent=True, higher_is_better=True) == against(
        table, AXES[0], "accuracy", percent=True, higher_is_better=True
    )


@pytest.mark.parametrize("seed", range(4))
def test_no_name_covers_another_or_leaves_the_plot(seed: int) -> None:
    from matplotlib import pyplot

    draw = random.Random(seed)
    xs, ys = [draw.uniform(1, 2) for _ in range(14)], [draw.uniform(1, 2) for _ in range(14)]
    figure, ax = pyplot.subplots(figsize=(7.6, 5))
    ax.set(xlim=(0.8, 2.4), ylim=(0.8, 2.2))
    ax.plot(xs, ys, "o")
    label(figure, ax, [f"method-number-{i}" for i in range(14)], xs, ys, ["k"] * 14, [])
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    found = [text.get_window_extent(renderer) for text in ax.texts]
    boxes = [(b.x0, b.y0, b.x1, b.y1) for b in found]
    assert sum(overlap(a, b) > 1 for i, a in enumerate(boxes) for b in boxes[:i]) == 0
    whole = ax.get_window_extent(renderer)
    assert all(b.x0 >= whole.x0 and b.x1 <= whole.x1 and b.y0 >= whole.y0 and b.y1 <= whole.y1 for b in found)
    pyplot.close(figure)


def test_without_figures_there_is_no_plot(tmp_path: Path) -> None:
    empty = [Row("a", "full", []), Row("b", "full", [], mean=0.5)]
    assert plots(empty, AXES, "accuracy", percent=True, higher_is_better=True, folder=tmp_path) == []
    assert curves(empty, "curve", "loss") is None and list(tmp_path.iterdir()) == []
