"""Ranks of an adaptation by site, as numbers and as a picture: where a method that spreads its ranks has put them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from petiole import files
from petiole.errors import AttachError, need
from petiole.roles import ROLES

if TYPE_CHECKING:
    from petiole.adaptation import Adaptation
    from petiole.anatomy import Site


def rank_pattern(adaptation: Adaptation) -> dict[str, int]:
    """The rank at each site that has one."""
    return {slot.key.partition(".")[2]: int(slot.delta.rank) for slot in adaptation.slots if has_rank(slot.delta)}


def has_rank(delta: object) -> bool:
    return isinstance(getattr(delta, "rank", None), int)


def draw_ranks(adaptation: Adaptation, path: str | Path) -> Path:
    """Write a PNG: for each stack a grid of roles by depth, with the rank in every cell and the darker the higher.

    Raises:
        AttachError: no site of this adaptation has a rank.
        MissingExtra: matplotlib is not installed.
    """
    found: dict[str, dict[tuple[str, int], int]] = {}
    for slot in adaptation.slots:
        if has_rank(slot.delta):
            cells = found.setdefault(slot.site.stack or "outside", {})
            place = (row_of(slot.site), slot.site.depth)
            cells[place] = cells.get(place, 0) + int(slot.delta.rank)
    if not found:
        raise AttachError(
            f"{adaptation.name!r} has no rank at any site; it is {', '.join(m.slug for m in adaptation.methods)}"
        )
    need("compare", "matplotlib").use("Agg")
    from petiole.compare.plots import INK, saved

    pyplot = need("compare", "matplotlib.pyplot")
    grids = {name: sorted({row for row, _ in cells}, key=order) for name, cells in found.items()}
    widest = max(max(depth for _, depth in cells) + 1 for cells in found.values())
    height = sum(0.42 * len(rows) + 0.9 for rows in grids.values())
    figure, panels = pyplot.subplots(
        len(found), 1, figsize=(min(16, 0.55 * widest + 2.6), height), squeeze=False, layout="constrained",
        height_ratios=[len(rows) for rows in grids.values()],
    )  # fmt: skip
    most = max(max(cells.values()) for cells in found.values())
    for ax, (name, cells) in zip(panels[:, 0], found.items(), strict=True):
        rows, depth = grids[name], max(d for _, d in cells) + 1
        grid = [[cells.get((row, d), float("nan")) for d in range(depth)] for row in rows]
        ax.imshow(grid, cmap="Blues", vmin=0, vmax=1.25 * most, aspect="auto")
        for (row, d), rank in cells.items():
            ax.text(d, rows.index(row), str(rank), ha="center", va="center", fontsize=9, color="white" if rank > 0.7 * most else INK)  # fmt: skip
        ax.set_yticks(range(len(rows)), rows)
        ax.set_xticks(range(depth))
        ax.set_xlabel("block, from the input", fontsize=9)
        ax.set_title(f"{name}: {sum(cells.values())} ranks", fontsize=10, loc="left")
        ax.tick_params(length=0, labelsize=9)
        ax.spines[:].set_visible(False)
    path = Path(path)
    files.write_bytes(path, saved(figure))
    return path


def row_of(site: Site) -> str:
    return f"{site.within}.{site.role}" if site.within == "cross_attention" else site.role


def order(row: str) -> tuple[int, int]:
    """Roles in the order of a block; those of cross-attention after those of self-attention."""
    role = row.rpartition(".")[2]
    return (ROLES.index(role) if role in ROLES else len(ROLES), int("." in row))


__all__ = ["draw_ranks", "rank_pattern"]
