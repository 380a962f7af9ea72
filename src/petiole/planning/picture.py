"""A plan as a picture: two costs of every method, the front as a line, the budget as a frame."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petiole import files
from petiole.errors import ConfigError, need
from petiole.planning.budget import Axis, axes

if TYPE_CHECKING:
    from petiole.planning.table import Plan


def draw(plan: Plan, path: Path, names: str | Sequence[str]) -> Path:
    """See `Plan.plot`."""
    from petiole.compare.plots import FRONT, GREY, LIGHT, bare_axes, label, legend, saved, style

    asked = axes(names if isinstance(names, str) else list(names))
    if len(asked) != 2:
        raise ConfigError(f"axes: a picture has two, not {len(asked)}")
    need("compare", "matplotlib").use("Agg")
    across, up = asked
    points = [(row, float(across.of(row) or 0), float(up.of(row) or 0)) for row in plan.rows if not row.reason]
    points = [(row, x, y) for row, x, y in points if x > 0 and y > 0]
    figure, ax = bare_axes(7.6, 5.0)
    xs, ys = [x for _, x, _ in points], [y for _, _, y in points]
    looks = style([row.family for row, _, _ in points])
    backbone = points[0][0].backbone_parameters if points else 0
    limits = {one.axis.name: one.number(backbone) for one in plan.budget.limits}
    ax.set_xscale("log")
    ax.set_yscale("log")
    room(ax.set_xlim, xs)
    room(ax.set_ylim, ys)
    ticks(ax.xaxis, across, xs)
    ticks(ax.yaxis, up, ys)
    best = {row.label for row in plan.front([axis.name for axis in asked])}
    line = sorted((x, y) for row, x, y in points if row.label in best)
    pieces = [piece for (x, y), (u, v) in pairwise(line) for piece in (((x, y), (u, y)), ((u, y), (u, v)))]
    for (x, y), (u, v) in pieces:
        ax.plot([x, u], [y, v], color=FRONT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    if across.name in limits:
        ax.axvline(limits[across.name], color=LIGHT, zorder=0)
    if up.name in limits:
        ax.axhline(limits[up.name], color=LIGHT, zorder=0)
    colours = [looks[row.family][0] if row.fits else GREY for row, _, _ in points]
    for (row, x, y), colour in zip(points, colours, strict=True):
        face = colour if row.label in best else "white"
        ax.plot(
            x, y, looks[row.family][1], color=colour, markersize=7, markerfacecolor=face, markeredgewidth=1.5, zorder=3
        )
    ax.set_xlabel(across.title)
    ax.set_ylabel(up.title)
    if points:
        legend(ax, looks)
        label(figure, ax, [row.label for row, _, _ in points], xs, ys, colours, pieces)
    files.write_bytes(path, saved(figure))
    return path


def room(set_limits: Any, values: Sequence[float]) -> None:
    """Room around the points for their names."""
    if values:
        around = max(0.1, 0.15 * math.log10(max(values) / min(values)))
        set_limits(min(values) / 10**around, max(values) * 10**around)


def ticks(axis: Any, about: Axis, values: Sequence[float]) -> None:
    """Numbers with decimal prefixes; a log axis of few decades gets more than the powers of ten."""
    from petiole.compare.table import quantity

    ticker = need("compare", "matplotlib.ticker")
    decades = math.log10(max(values) / min(values)) if values else 1.0
    marks = (1.0, 2.0, 3.0, 5.0, 7.0) if decades < 1 else (1.0, 3.0) if decades < 3 else (1.0,)
    axis.set_major_locator(ticker.LogLocator(subs=marks))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: quantity(value, "B" if about.unit == "B" else "")))
    axis.set_minor_formatter(ticker.NullFormatter())
