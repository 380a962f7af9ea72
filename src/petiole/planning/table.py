"""A plan's rows, what of them fits, which of them nothing undercuts; as text, JSON and a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petiole.compare.table import dominates
from petiole.planning.budget import Axis, Budget, axes

if TYPE_CHECKING:
    from petiole.compare.table import Column

DEFAULT_AXES = ("params", "memory", "flops")


@dataclass(frozen=True)
class Row:
    """One method on one backbone. Costs are None where it can't be planned; `reason` then says why.

    Attributes:
        label, family, config: of the method, or of several that act together; `config` with the size in use.
        size, size_name: value and name of its main size (rank, bottleneck, length); None and "" where it has none.
        trainable_parameters: head included. head_parameters: those of the task's head. backbone_parameters: of the bare backbone.
        checkpoint_bytes: tensors of the adaptation's file; a header of a few kB comes on top.
        forward_flops: of inference. step_flops: of a training step.
        saved_bytes: kept from forward for backward, weights left out.
        weight_bytes: parameters and buffers. gradient_bytes: one for each trainable parameter. optimizer_bytes: its state.
        peak_bytes: the most that is alive at once in a training step, all of the above included.
        kept_bytes: original values of what trains in place, which petiole holds so that `detach` can give them back.
        recomputed: blocks that are recomputed in the backward pass to stay within the memory budget; figures are with that.
        whole: every block ran; otherwise a few did, and the others are like them.
        over: limit of the budget that is broken -> cost / limit. front: see `Plan.front`.
        reason: why there are no figures. note: what else is to be known.
    """

    label: str
    family: str
    config: list[dict[str, Any]]
    size: int | None = None
    size_name: str = ""
    trainable_parameters: int | None = None
    head_parameters: int | None = None
    backbone_parameters: int = 0
    checkpoint_bytes: int | None = None
    forward_flops: int | None = None
    step_flops: int | None = None
    saved_bytes: int | None = None
    weight_bytes: int | None = None
    gradient_bytes: int | None = None
    optimizer_bytes: int | None = None
    peak_bytes: int | None = None
    kept_bytes: int | None = None
    recomputed: int = 0
    whole: bool = False
    over: dict[str, float] = field(default_factory=dict)
    front: bool = False
    reason: str = ""
    note: str = ""

    @property
    def fits(self) -> bool:
        """Whether it can be attached and breaks no limit of the budget."""
        return not self.reason and not self.over

    @property
    def memory_bytes(self) -> int | None:
        """What has to be free on the device: the peak of a step, and the originals that are held beside."""
        return None if self.peak_bytes is None or self.kept_bytes is None else self.peak_bytes + self.kept_bytes

    @property
    def training_bytes(self) -> int | None:
        """Gradients and optimiser state."""
        return (
            None
            if self.gradient_bytes is None or self.optimizer_bytes is None
            else self.gradient_bytes + self.optimizer_bytes
        )

    @property
    def share(self) -> float | None:
        """Trainable parameters as a share of the bare backbone's."""
        return (
            None if self.trainable_parameters is None else self.trainable_parameters / max(1, self.backbone_parameters)
        )

    @property
    def reference(self) -> bool:
        """It trains the task's head alone, or nothing: always cheapest, so no candidate for a front."""
        return self.trainable_parameters == self.head_parameters

    def to_dict(self) -> dict[str, Any]:
        """For JSON; every figure's key ends in its unit."""
        return {**asdict(self), "memory_bytes": self.memory_bytes, "share": self.share, "fits": self.fits}


@dataclass(frozen=True)
class Plan:
    """What every method would cost on one backbone, for one kind of batch.

    Attributes:
        model: class of the backbone. settings: batch, types, optimiser and budget, as given.
        shapes: of the batch, by the model's own names.
        rows: with figures by memory, then those without. budget: see `Budget`. seconds: how long planning took.
    """

    model: str
    settings: dict[str, Any]
    shapes: dict[str, list[int]]
    rows: tuple[Row, ...]
    budget: Budget
    seconds: float

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, label: str) -> Row:
        """The row of that label."""
        for row in self.rows:
            if row.label == label:
                return row
        raise KeyError(label)

    def fits(self) -> list[Row]:
        """The rows within the budget; without one, all that can be attached."""
        return [row for row in self.rows if row.fits]

    def front(self, names: str | Sequence[str] = DEFAULT_AXES) -> list[Row]:
        """The rows within the budget that no other one undercuts: at most as dear on every axis, and cheaper on one.

        Methods that train the head alone would always win and are left out.

        Raises:
            ConfigError: an axis is unknown.
        """
        return front(self.rows, axes(names if isinstance(names, str) else list(names)))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        about = {"model": self.model, **self.settings, "batch": self.shapes, "seconds": self.seconds}
        return {**about, "rows": [row.to_dict() for row in self.rows]}

    # ---- for people

    def __str__(self) -> str:
        return self.table()

    def headline(self) -> str:
        """What was planned for, on two lines."""
        settings = self.settings
        shapes = ", ".join(f"{name} {'×'.join(map(str, shape))}" for name, shape in self.shapes.items())
        parts = [settings["dtype"], f"autocast {settings['autocast']}" if settings["autocast"] else "", settings["optimizer"],
                 "gradient checkpointing" if settings["gradient_checkpointing"] else ""]  # fmt: skip
        about = f"{self.model}, {', '.join(filter(None, parts))}; {shapes}"
        if not self.budget.limits:
            return about
        return f"{about}\nbudget {self.budget.text()}: {len(self.fits())} of {len(self.rows)} fit"

    def columns(self) -> list[Column]:
        """The table, column by column."""
        from petiole.compare.table import Column, quantity

        rows = [row for row in self.rows if not row.reason]
        table = [
            Column("method", [row.label for row in rows], right=False, keep=10),
            Column("trained", [quantity(row.trainable_parameters) for row in rows], keep=9),
            Column("% of all", [percent(row.share) for row in rows], keep=6),
            Column("head", [quantity(row.head_parameters) for row in rows], keep=1),
            Column("file", [quantity(row.checkpoint_bytes, "B") for row in rows], keep=4),
            Column("forward FLOPs", [quantity(row.forward_flops) for row in rows], keep=3),
            Column("step FLOPs", [quantity(row.step_flops) for row in rows], keep=7),
            Column("saved", [quantity(row.saved_bytes, "B") for row in rows], keep=5),
            Column("gradients + optimiser", [quantity(row.training_bytes, "B") for row in rows], keep=2),
            Column("memory", [quantity(row.memory_bytes, "B") for row in rows], keep=9),
        ]
        if any(row.size_name for row in rows):
            sizes = [f"{row.size_name} {row.size or 'by values'}" if row.size_name else "–" for row in rows]
            table.insert(1, Column("size", sizes, right=False, keep=8 if self.settings["fit"] else 3))
        if self.budget.limits:
            table.append(Column("budget", [verdict(row) for row in rows], right=False, keep=10))
        table.append(Column("front", ["●" if row.front else "" for row in rows], right=False, keep=8))
        return table

    def remarks(self) -> list[str]:
        """What the table can't hold: methods without figures and why, and notes."""
        found = [(row.label, row.reason or row.note) for row in self.rows]
        return [f"{label}: {text.removeprefix(f'{label}: ')}" for label, text in found if text]

    def table(self) -> str:
        """All of it as plain text."""
        parts = self.columns()
        widths = [max(len(cell) for cell in (part.title, *part.cells)) for part in parts]
        lines = [[part.title for part in parts], *zip(*(part.cells for part in parts), strict=True)]
        text = [
            "  ".join(
                cell.rjust(width) if part.right else cell.ljust(width)
                for cell, width, part in zip(line, widths, parts, strict=True)
            ).rstrip()
            for line in lines
        ]
        return "\n".join([self.headline(), "", *text, *([""] if self.remarks() else []), *self.remarks()])

    def plot(self, path: str | Path, names: str | Sequence[str] = ("params", "memory")) -> Path:
        """Two costs of every row as a picture (PNG); the front as a line, what does not fit in grey.

        Raises:
            ConfigError: an axis is unknown, or there are not two of them.
        """
        from petiole.planning.picture import draw

        return draw(self, Path(path), names)


def front(rows: Sequence[Row], asked: Sequence[Axis]) -> list[Row]:
    """See `Plan.front`."""
    points = {}
    for row in rows:
        costs = [cost for axis in asked if (cost := axis.of(row)) is not None]
        if row.fits and not row.reference and len(costs) == len(asked):
            points[row.label] = costs
    return [
        row
        for row in rows
        if row.label in points and not any(dominates(other, points[row.label]) for other in points.values())
    ]


def percent(share: float | None) -> str:
    """
    >>> percent(0.00472), percent(1.0), percent(None), percent(0.0000123)
    ('0.472', '100', '–', '0.00123')
    """
    return "–" if share is None else f"{100 * share:.3g}"


def verdict(row: Row) -> str:
    """Whether a row fits, or by how much it is over."""
    texts = (f"{name} ×{times:.{3 if times > 1.01 else 5}g}" for name, times in row.over.items())
    return "fits" if row.fits else ", ".join(texts)
