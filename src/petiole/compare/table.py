"""From trials to a ranked table: mean and spread over seeds, what each row costs, and which rows nothing else beats on the axes asked for."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from petiole.errors import ConfigError

AnyAxis = TypeVar("AnyAxis")


@dataclass(frozen=True)
class Axis:
    """A cost that rows are held against.

    Attributes:
        name: as the user asks for it.
        title: for a plot, whose numbers carry the unit.
        key: field of `Row`.
        unit: what a number of it is followed by.
    """

    name: str
    title: str
    key: str
    unit: str = ""


AXES = {
    axis.name: axis
    for axis in (
        Axis("params", "trainable parameters", "trainable_parameters"),
        Axis("checkpoint", "size of the file", "file_bytes", "B"),
        Axis("flops", "training FLOPs of one run", "training_flops"),
        Axis("saved", "memory kept for the backward pass", "saved_bytes", "B"),
        Axis("memory", "peak memory of a training step", "peak_bytes", "B"),
        Axis("time", "time of a training step", "step_seconds", "s"),
        Axis("inference", "time of a forward pass", "forward_seconds", "s"),
    )
}
DEFAULT_AXES = ("params", "memory", "time")


def axes(names: Iterable[str]) -> list[Axis]:
    """Axes by name.

    Raises:
        ConfigError: one of them is unknown, or there is none.
    """
    return named_axes(names, AXES)


def named_axes(names: Iterable[str], known: Mapping[str, AnyAxis]) -> list[AnyAxis]:
    """Those of the known axes that are named, each once; `Raises` as for `axes`."""
    chosen = list(dict.fromkeys(names))
    for name in chosen:
        if name not in known:
            raise ConfigError(f"axes: {name!r} is no axis; there are {', '.join(known)}")
    if not chosen:
        raise ConfigError(f"axes: name at least one of {', '.join(known)}")
    return [known[name] for name in chosen]


@dataclass(frozen=True)
class Row:
    """One row of the table. Costs are None where they could not be measured.

    Attributes:
        label, family, config: of the contender; `config` with the size chosen.
        rank: from 1; None where there is no score.
        scores: on test, one for each seed that ended well.
        mean, sd: of them; sd None for fewer than two.
        validation: the score on validation with which the search ended.
        learning_rate, size: chosen by the search.
        trials, failed_trials: of the search. seeds, failed_seeds: of the runs.
        trainable_parameters, head_parameters, backbone_parameters: counts.
        file_bytes: of the adaptation's file.
        training_flops: of one run. saved_bytes, peak_bytes, step_seconds, forward_seconds: of one batch.
        run_seconds: training time of one run, mean over seeds. total_seconds: of all its trials, the search included.
        forgetting: mean change of the score on the held-out set; negative is worse where higher is better.
        front: on the Pareto front of score and all axes asked for. fronts: axes on whose two-dimensional front it is.
        curve: (step, training loss), mean over seeds. course: (step, score on validation), mean over seeds.
        notes: failures, and what else a reader should know.
    """

    label: str
    family: str
    config: list[dict[str, Any]]
    rank: int | None = None
    scores: list[float] = field(default_factory=list)
    mean: float | None = None
    sd: float | None = None
    validation: float | None = None
    learning_rate: float | None = None
    size: int | None = None
    trials: int = 0
    failed_trials: int = 0
    seeds: int = 0
    failed_seeds: int = 0
    trainable_parameters: int | None = None
    head_parameters: int | None = None
    backbone_parameters: int | None = None
    file_bytes: int | None = None
    training_flops: int | None = None
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    step_seconds: float | None = None
    forward_seconds: float | None = None
    run_seconds: float | None = None
    total_seconds: float = 0.0
    forgetting: float | None = None
    front: bool = False
    fronts: list[str] = field(default_factory=list)
    curve: list[list[float]] = field(default_factory=list)
    course: list[list[float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    reference: bool = (
        False  # the bare backbone: ranked, but no candidate for the front, which nothing trained could ever push it off
    )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation; None where there are too few."""
    mean = statistics.fmean(values) if values else None
    return mean, statistics.stdev(values) if len(values) > 1 else None


def ranked(rows: Iterable[Row], asked: Sequence[Axis], higher_is_better: bool = True) -> list[Row]:
    """Rows from best to worst, with rank and fronts filled in; those without a score last."""
    from dataclasses import replace

    sign = -1.0 if higher_is_better else 1.0
    ordered = sorted(
        rows, key=lambda r: (r.mean is None, sign * r.mean if r.mean is not None else 0.0, r.trainable_parameters or 0)
    )
    whole = front(ordered, asked, higher_is_better)
    single = {axis.name: front(ordered, [axis], higher_is_better) for axis in asked}
    return [
        replace(
            row,
            rank=i if row.mean is not None else None,
            front=row.label in whole,
            fronts=[name for name, labels in single.items() if row.label in labels],
        )
        for i, row in enumerate(ordered, start=1)
    ]


def front(rows: Iterable[Row], asked: Sequence[Axis], higher_is_better: bool = True) -> set[str]:
    """Labels of the rows that no other row beats: at least as good in score and on every axis, and better somewhere.

    The bare backbone is a reference and no candidate; a row without a score or a cost asked for is none either.
    """
    sign = -1.0 if higher_is_better else 1.0
    points: dict[str, tuple[float, ...]] = {}
    for row in rows:
        costs = [getattr(row, axis.key) for axis in asked]
        if row.mean is not None and not row.reference and all(cost is not None for cost in costs):
            points[row.label] = (sign * row.mean, *costs)
    return {label for label, point in points.items() if not any(dominates(other, point) for other in points.values())}


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether a is nowhere above b and somewhere below."""
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


# ----------------------------------------------------------------------------------------------------------------------- in words


def quantity(value: float | None, unit: str = "") -> str:
    """A number of at least three digits with a decimal prefix: 2_693_578 -> "2.69 M", 1_200 B -> "1.2 kB"; "–" for none.

    >>> quantity(2_693_578), quantity(1200, "B"), quantity(0), quantity(999_999)
    ('2.69 M', '1.2 kB', '0', '1 M')
    """
    if value is None:
        return "–"
    if unit == "s":
        return seconds(value)
    prefixes = ["", "k", "M", "G", "T", "P", "E"]
    size, scaled = 0, float(value)
    while abs(float(f"{scaled:.3g}")) >= 1000 and size < len(prefixes) - 1:
        scaled, size = scaled / 1000, size + 1
    text = f"{scaled:.3g}" if size or scaled != int(scaled) else f"{int(scaled)}"
    end = f"{prefixes[size]}{unit}"
    return f"{text} {end}" if end else text


def seconds(value: float | None) -> str:
    """
    >>> seconds(0.0123), seconds(2.5), seconds(75), seconds(4000)
    ('12.3 ms', '2.5 s', '1 min 15 s', '1 h 6 min')
    """
    if value is None:
        return "–"
    if value < 1:
        return f"{1000 * value:.3g} ms"
    if value < 60:
        return f"{value:.3g} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def score(mean: float | None, sd: float | None = None, percent: bool = False) -> str:
    """
    >>> score(0.9125, 0.0101, percent=True), score(12.3456, None), score(None)
    ('91.2 ± 1.0', '12.35', '–')
    """
    if mean is None or math.isnan(mean):
        return "–"
    if percent:
        return f"{100 * mean:.1f}" + (f" ± {100 * sd:.1f}" if sd is not None else "")
    digits = 3 if abs(mean) < 1 else 2
    return f"{mean:.{digits}f}" + (f" ± {sd:.{digits}f}" if sd is not None else "")


@dataclass(frozen=True)
class Column:
    """A column as text.

    Attributes:
        title: its head. right: numbers stand to the right.
        keep: how long it stays when there is too little room; the lowest go first.
    """

    title: str
    cells: list[str]
    right: bool = True
    keep: int = 5


def columns(
    rows: Sequence[Row], metric: str, *, percent: bool, higher_is_better: bool, sizes: bool = False
) -> list[Column]:
    """The ranked table as text, column by column."""
    arrow = "↑" if higher_is_better else "↓"
    searched = [
        f"{row.trials}" + (f" ({row.failed_trials} failed)" if row.failed_trials else "") if row.trials else "–"
        for row in rows
    ]
    share = [
        "–"
        if row.trainable_parameters is None
        else f"{100 * row.trainable_parameters / row.backbone_parameters:.2f}"
        if row.backbone_parameters
        else "–"
        for row in rows
    ]
    table = [
        Column("#", [str(row.rank) if row.rank else "–" for row in rows], keep=9),
        Column("method", [row.label for row in rows], right=False, keep=10),
        Column(
            f"{metric} {arrow}" + (" (%)" if percent else ""),
            [score(row.mean, row.sd, percent) for row in rows],
            keep=10,
        ),
        Column(
            "seeds",
            [str(row.seeds) + (f" ({row.failed_seeds} failed)" if row.failed_seeds else "") for row in rows],
            keep=2,
        ),
        Column("learning rate", [f"{row.learning_rate:.2g}" if row.learning_rate else "–" for row in rows], keep=4),
        Column("trials", searched, keep=6),
        Column("trained", [quantity(row.trainable_parameters) for row in rows], keep=8),
        Column("% of all", share, keep=1),
        Column("file", [quantity(row.file_bytes, "B") for row in rows], keep=5),
        Column("FLOPs", [quantity(row.training_flops) for row in rows], keep=3),
        Column("saved", [quantity(row.saved_bytes, "B") for row in rows], keep=3),
        Column("peak", [quantity(row.peak_bytes, "B") for row in rows], keep=7),
        Column("step", [seconds(row.step_seconds) for row in rows], keep=7),
        Column("total", [seconds(row.total_seconds) for row in rows], keep=3),
    ]
    if sizes:
        table.insert(5, Column("size", [str(row.size) if row.size is not None else "–" for row in rows], keep=4))
    if any(row.forgetting is not None for row in rows):
        cells = [
            "–" if row.forgetting is None else f"{100 * row.forgetting:+.1f}" if percent else f"{row.forgetting:+.3f}"
            for row in rows
        ]
        table.insert(3, Column("held-out" + (" (%)" if percent else ""), cells, keep=8))
    table.append(
        Column("front", ["●" if row.front else ", ".join(row.fronts) and "○" for row in rows], right=False, keep=6)
    )
    return table
