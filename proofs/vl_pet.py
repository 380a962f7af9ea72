"""VL-PET: gates of every granularity find an XOR that the frozen encoder does not give, the finest fastest."""

from __future__ import annotations

import statistics
from typing import ClassVar

import bench
from common import Report, options, spread
from torch import nn

import petiole as pt
from petiole.errors import TrainingError

GRANULARITIES = ("large", "middle_x", "middle_y", "small")


class Stub(pt.VLPET):
    """Gates and second projections frozen as they start: the first projections train alone."""

    slug: ClassVar[str] = ""

    def bind(self, deltas: object, shared: nn.Module | None) -> None:
        for delta in deltas.values():  # type: ignore[attr-defined]
            delta.gate.requires_grad_(False)
            delta.up.requires_grad_(False)


def method(granularity: str, cls: type[pt.VLPET] = pt.VLPET, zero: bool = False) -> pt.VLPET:
    """One head, r = g = 16, torch's own start or second projections of zero, no norm trained."""
    return cls(granularity=granularity, bottleneck=16, num_heads=1, train_encoder_norms=False, zero_init_up=zero)


METHODS: dict[str, pt.Method] = {
    **{name: method(name) for name in GRANULARITIES},
    "frozen": method("large", Stub),
    "head only": pt.LinearProbe(),
}


def main() -> None:
    given = options(__doc__)
    report = Report(
        "vl-pet",
        "VL-PET",
        f"{bench.ABOUT} Gated adapters of 16 after every attention and ffn, s = 1, one head, gates of 16. “Frozen” is large with its "
        "gate and its second projections left as they start, so that the first projections train alone. Loss: the mean of the first 150 steps.",
        ("seed", *METHODS, *(f"loss, {name}" for name in GRANULARITIES)),
    )
    right: dict[str, list[float]] = {name: [] for name in METHODS}
    loss: dict[str, list[float]] = {name: [] for name in METHODS}
    for seed in range(given.seeds):
        for name, chosen in METHODS.items():
            outcome = bench.run(chosen, seed)
            right[name].append(outcome.accuracy)
            loss[name].append(outcome.early())
        report.row(seed, *(values[-1] for values in right.values()), *(loss[name][-1] for name in GRANULARITIES))
    for name in GRANULARITIES:
        report.require(f"{name} gets at least 0.75 right: {spread(right[name])}", min(right[name]) >= 0.75)
    means = {name: statistics.mean(loss[name]) for name in GRANULARITIES}
    lowest = all(loss["large"][seed] <= min(loss[name][seed] for name in GRANULARITIES) for seed in range(given.seeds))
    shown = ", ".join(f"{name} {mean:.3f}" for name, mean in means.items())
    report.require(f"the early loss of large is the lowest of the four with every seed; means: {shown}", lowest)
    report.require(
        f"frozen, it stays behind all four: {spread(right['frozen'])}",
        max(right["frozen"]) < min(min(right[name]) for name in GRANULARITIES),
    )
    try:
        bench.run(method("large", Stub, zero=True), 0)
        refused = False
    except TrainingError:
        refused = True
    report.require(
        "frozen at second projections of zero nothing of it can learn, and training refuses to begin", refused
    )
    report.finish(given, {"accuracy": right, "loss": loss})


if __name__ == "__main__":
    main()
