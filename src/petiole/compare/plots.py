"""Plots of a comparison as PNG: score against a cost, and learning curves.

Readable without colour: every point and every panel is named, families differ in shape as well as in colour, and the colours are those of
Okabe and Ito, which people with any kind of colour vision tell apart.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from petiole import files
from petiole.compare.table import Axis, Row, quantity
from petiole.errors import need

INK, GREY, LIGHT = "#222222", "#8a8a8a", "#d5d5d5"
# family -> colour and marker; others take the rest in the order in which they come
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
FRONT = "#444444"


def plots(
    rows: Sequence[Row], asked: Sequence[Axis], title: str, *, percent: bool, higher_is_better: bool, folder: Path
) -> list[str]:
    """Write every plot that there are figures for.

    Args:
        title: of the score.

    Returns:
        Names of the files.
    """
    matplotlib = need("compare", "matplotlib")
    matplotlib.use("Agg")
    written = []
    for axis in asked:
        picture = against(rows, axis, title, percent=percent, higher_is_better=higher_is_better)
        if picture is not None:
            files.write_bytes(folder / f"score-{axis.name}.png", picture)
            written.append(f"score-{axis.name}.png")
    for name, key, label in (("loss", "curve", "training loss"), ("learning", "course", f"validation {title}")):
        scale = 100 if percent and key == "course" else 1
        picture = curves(rows, key, label + (" (%)" if scale == 100 else ""), scale)
        if picture is not None:
            files.write_bytes(folder / f"{name}.png", picture)
            written.append(f"{name}.png")
    return written


def style(families: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each family."""
    return {
        family: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)])
        for i, family in enumerate(dict.fromkeys(families))
    }


def saved(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    need("compare", "matplotlib.pyplot").close(figure)
    return buffer.getvalue()


def bare_axes(width: float, height: float) -> tuple[Any, Any]:
    """A figure with one pair of axes, without box."""
    pyplot = need("compare", "matplotlib.pyplot")
    figure, ax = pyplot.subplots(figsize=(width, height), layout="constrained")
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GREY)
    ax.tick_params(colors=INK, which="both", labelsize=9)
    ax.tick_params(which="minor", length=2)
    return figure, ax


# ---------------------------------------------------------------------------------------------------------- score against a cost


def against(rows: Sequence[Row], axis: Axis, title: str, *, percent: bool, higher_is_better: bool) -> bytes | None:
    """Score, with its spread over seeds, against one cost; the front as a line; every point named. None without two points."""
    scale = 100 if percent else 1
    placed = [row for row in rows if row.mean is not None and getattr(row, axis.key) and not row.reference]
    if len(placed) < 2:
        return None
    figure, ax = bare_axes(7.6, 5.0)
    looks = style([row.family for row in placed])
    xs = [float(getattr(row, axis.key)) for row in placed]
    ys = [scale * float(row.mean or 0) for row in placed]
    wide = max(xs) / min(xs) > 8
    ax.set_xscale("log" if wide else "linear")
    line = step(ax, placed, xs, ys, axis)
    for row, x, y in zip(placed, xs, ys, strict=True):
        colour, marker = looks[row.family]
        error = scale * row.sd if row.sd is not None else None
        face = colour if axis.name in row.fronts else "white"
        ax.errorbar(
            x,
            y,
            yerr=error,
            color=colour,
            fmt=marker,
            markersize=7,
            capsize=2.5,
            elinewidth=1,
            markerfacecolor=face,
            markeredgewidth=1.5,
            zorder=3,
        )
    bare = next((row for row in rows if row.reference and row.mean is not None), None)
    limits(ax, xs, [y + d * scale * (row.sd or 0) for row, y in zip(placed, ys, strict=True) for d in (-1, 1)], wide)
    if bare is not None and bare.mean is not None:
        reference(ax, scale * bare.mean)
    ax.set_xlabel(axis.title, fontsize=10, color=INK)
    ax.set_ylabel(f"{title} on test{' (%)' if percent else ''}, mean ± sd", fontsize=10, color=INK)
    ticks(ax, axis, wide)
    legend(ax, looks)
    bars = [
        ((x, y - scale * (row.sd or 0)), (x, y + scale * (row.sd or 0)))
        for row, x, y in zip(placed, xs, ys, strict=True)
    ]
    colours = [looks[row.family][0] for row in placed]
    label(figure, ax, [row.label for row in placed], xs, ys, colours, bars + line)
    return saved(figure)


Segment = tuple[tuple[float, float], tuple[float, float]]


def step(ax: Any, rows: Sequence[Row], xs: Sequence[float], ys: Sequence[float], axis: Axis) -> list[Segment]:
    """Draw the front: the best score that any row reaches at a cost up to x. Returns its pieces."""
    on = sorted((x, y) for row, x, y in zip(rows, xs, ys, strict=True) if axis.name in row.fronts)
    pieces: list[Segment] = []
    for (x, y), (further, better) in pairwise(on):
        pieces += [((x, y), (further, y)), ((further, y), (further, better))]
    for (x, y), (u, v) in pieces:
        ax.plot([x, u], [y, v], color=FRONT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    return pieces


def limits(ax: Any, xs: Sequence[float], ys: Sequence[float], wide: bool) -> None:
    """Room around the points for their names."""
    if wide:
        reach = max(math.log10(max(xs) / min(xs)), 0.5)
        ax.set_xlim(min(xs) / 10 ** (0.12 * reach), max(xs) * 10 ** (0.18 * reach))
    else:
        reach = max(max(xs) - min(xs), 0.1 * max(xs))
        ax.set_xlim(max(0, min(xs) - 0.12 * reach), max(xs) + 0.18 * reach)
    reach = max(max(ys) - min(ys), 0.02 * abs(max(ys)) + 1e-9)
    ax.set_ylim(min(ys) - 0.12 * reach, max(ys) + 0.12 * reach)


def reference(ax: Any, y: float) -> None:
    """Where the bare backbone stands: a line, or a remark where it is far off."""
    low, high = ax.get_ylim()
    if low <= y <= high:
        ax.axhline(y, color=GREY, linewidth=1, zorder=0)
        ax.text(
            0.995,
            y,
            "bare backbone",
            transform=ax.get_yaxis_transform(),
            fontsize=8,
            color=GREY,
            ha="right",
            va="bottom",
        )
        return
    above = y > high
    ax.text(0.995, 0.985 if above else 0.015, f"bare backbone: {y:.1f} {'↑' if above else '↓'}", transform=ax.transAxes, fontsize=8,
            color=GREY, ha="right", va="top" if above else "bottom")  # fmt: skip


def ticks(ax: Any, axis: Axis, wide: bool) -> None:
    """Numbers with decimal prefixes; a log axis of few decades gets more than the powers of ten."""
    ticker = need("compare", "matplotlib.ticker")
    ax.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: quantity(x, axis.unit)))
    if wide:
        low, high = ax.get_xlim()
        decades = math.log10(high / low)
        ax.xaxis.set_major_locator(
            ticker.LogLocator(subs=(1.0, 2.0, 5.0) if decades < 1.6 else (1.0, 3.0) if decades < 3 else (1.0,))
        )
    else:
        ax.xaxis.set_major_locator(ticker.MaxNLocator(6))
    ax.xaxis.set_minor_formatter(ticker.NullFormatter())


def legend(ax: Any, looks: dict[str, tuple[str, str]]) -> None:
    """Families above the plot, where no point is."""
    lines = need("compare", "matplotlib.lines")
    handles = [
        lines.Line2D(
            [],
            [],
            color=c,
            marker=m,
            linestyle="",
            markersize=6,
            markerfacecolor="white",
            markeredgewidth=1.4,
            label=family,
        )
        for family, (c, m) in looks.items()
    ]
    handles.append(lines.Line2D([], [], color=FRONT, linewidth=1, linestyle=(0, (4, 3)), label="front (filled)"))
    ax.legend(handles=handles, ncols=min(len(handles), 6), loc="lower left", bbox_to_anchor=(0, 1.0), frameon=False, fontsize=8.5,
              handletextpad=0.3, columnspacing=1.2, borderaxespad=0.2)  # fmt: skip


def label(
    figure: Any,
    ax: Any,
    names: Sequence[str],
    xs: Sequence[float],
    ys: Sequence[float],
    colours: Sequence[str],
    lines: Sequence[Segment],
) -> None:
    """Name every point beside it, without covering a point, another name or, if it can be helped, a line; a thin line leads to a name
    that had to move away."""
    effects = need("compare", "matplotlib.patheffects")
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the axes stay where they are from here on
    renderer = figure.canvas.get_renderer()
    points = ax.transData.transform(list(zip(xs, ys, strict=True)))
    inside = ax.get_window_extent(renderer)
    unit = figure.dpi / 72
    taken = [(x - 5 * unit, y - 5 * unit, x + 5 * unit, y + 5 * unit) for x, y in points]
    drawn = [ax.transData.transform(segment) for segment in lines]
    thin = [
        (min(a[0], b[0]) - unit, min(a[1], b[1]) - unit, max(a[0], b[0]) + unit, max(a[1], b[1]) + unit)
        for a, b in drawn
    ]
    order = sorted(range(len(names)), key=lambda i: sum(math.dist(points[i], p) < 60 * unit for p in points))
    for i in order:
        x, y = points[i]
        text = ax.annotate(
            names[i],
            (xs[i], ys[i]),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=8.5,
            color=colours[i],
            zorder=2.9,
        )
        text.set_path_effects([effects.withStroke(linewidth=2, foreground="white")])
        box = text.get_window_extent(renderer)
        w, h = box.width, box.height
        best: tuple[float, float, float, tuple[float, float, float, float]] | None = None
        for distance in (8, 13, 20, 30, 42, 56, 72):
            for angle in (0, 180, 45, -45, 135, -135, 90, -90, 20, -20, 160, -160, 70, -70, 110, -110):
                dx, dy = (
                    distance * unit * math.cos(math.radians(angle)),
                    distance * unit * math.sin(math.radians(angle)),
                )
                left = (
                    x
                    + dx
                    - (
                        0
                        if math.cos(math.radians(angle)) > 0.3
                        else w
                        if math.cos(math.radians(angle)) < -0.3
                        else w / 2
                    )
                )
                low = y + dy - h / 2
                spot = (left, low, left + w, low + h)
                out = max(inside.x0 - left, left + w - inside.x1, inside.y0 - low, low + h - inside.y1, 0)
                crossed = sum(overlap(spot, other) > 0 for other in thin)
                cost = (
                    5 * sum(overlap(spot, other) for other in taken) / (w * h)
                    + (100 if out else 0)
                    + distance / 60
                    + 0.3 * crossed
                )
                if best is None or cost < best[0] - 1e-9:
                    best = (cost, left - x, low - y, spot)
        assert best is not None
        text.set_position((best[1] / unit, best[2] / unit))
        taken.append(best[3])
        nearest = (min(max(x, best[3][0]), best[3][2]), min(max(y, best[3][1]), best[3][3]))
        if math.dist(nearest, (x, y)) > 14 * unit:
            ends = ax.transData.inverted().transform([(x, y), nearest])
            ax.plot(ends[:, 0], ends[:, 1], color=colours[i], linewidth=0.6, zorder=2)


Box = tuple[float, float, float, float]


def overlap(a: Box, b: Box) -> float:
    """The area that two boxes share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


# --------------------------------------------------------------------------------------------------------------- learning curves


def curves(rows: Sequence[Row], key: str, title: str, scale: float = 1) -> bytes | None:
    """A small panel for each row, its own curve strong and all others grey, so that many rows can be told apart. None without curves."""
    drawn = [row for row in rows if len(getattr(row, key)) > 1]
    if not drawn:
        return None
    pyplot = need("compare", "matplotlib.pyplot")
    looks = style([row.family for row in drawn])
    across = min(4, len(drawn))
    down = math.ceil(len(drawn) / across)
    figure, panels = pyplot.subplots(
        down,
        across,
        figsize=(2.3 * across + 0.6, 1.75 * down + 0.6),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    paths = {row.label: tuple(zip(*getattr(row, key), strict=True)) for row in drawn}
    for panel, row in zip(panels.flat, drawn, strict=False):
        for other in drawn:
            steps, values = paths[other.label]
            panel.plot(steps, [scale * v for v in values], color=LIGHT, linewidth=0.8, zorder=1)
        steps, values = paths[row.label]
        colour = looks[row.family][0]
        panel.plot(
            steps,
            [scale * v for v in values],
            color=colour,
            linewidth=1.8,
            zorder=2,
            marker="o" if len(steps) <= 10 else None,
            markersize=3,
        )
        panel.set_title(row.label, fontsize=9, color=colour, loc="left", pad=3)
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color(GREY)
        panel.tick_params(colors=INK, labelsize=8)
    for panel in list(panels.flat)[len(drawn) :]:
        panel.set_visible(False)
    panels[0][0].set_xlim(left=0)
    for column in range(across):  # the lowest panel that is there carries the numbers of its column
        last = max(r for r in range(down) if r * across + column < len(drawn))
        panels[last][column].tick_params(labelbottom=True)
    figure.supxlabel("training step", fontsize=10, color=INK)
    figure.supylabel(title, fontsize=10, color=INK)
    return saved(figure)
