"""IAA: at the same number of weights, connected modules learn faster than scattered ones."""

from __future__ import annotations

import statistics

import bench
from common import Report, options, spread

import petiole as pt

SITE = {"form": "adapter", "insertion": "sequential", "bottleneck": 8, "scale": 1.0, "init": "lora", "bias": False}
METHODS: dict[str, pt.Method] = {
    "adapters": pt.UnifiedView(attention={**SITE, "norm": "none"}, ffn=SITE),
    "IAA-L": pt.IAA(connect="layer", r=4, aside_r=8),
    "head only": pt.LinearProbe(),
}


def main() -> None:
    given = options(__doc__)
    report = Report(
        "iaa",
        "IAA",
        f"{bench.ABOUT} Adapters of 8 after every attention and ffn; IAA-L with adapters of 4 there and a path of 8 around every block, "
        "as many weights. Loss: the mean of the first 150 steps.",
        ("seed", *METHODS, *(f"loss, {name}" for name in METHODS)),
    )
    right: dict[str, list[float]] = {name: [] for name in METHODS}
    loss: dict[str, list[float]] = {name: [] for name in METHODS}
    for seed in range(given.seeds):
        trained = set()
        for name, method in METHODS.items():
            outcome = bench.run(method, seed)
            right[name].append(outcome.accuracy)
            loss[name].append(outcome.early())
            if name != "head only":
                trained.add(outcome.tuned.trainable)
        assert len(trained) == 1, "as many weights"
        report.row(seed, *(values[-1] for found in (right, loss) for values in found.values()))
    means = {name: statistics.mean(values) for name, values in loss.items()}
    shares = [mine / theirs for mine, theirs in zip(loss["IAA-L"], loss["adapters"], strict=True)]
    report.require(
        f"the mean loss of IAA-L is at most the adapters': {means['IAA-L']:.3f}, {means['adapters']:.3f}; by seed "
        f"{spread(shares)} of theirs",
        means["IAA-L"] <= means["adapters"],
    )
    less = [mine - theirs for mine, theirs in zip(right["IAA-L"], right["adapters"], strict=True)]
    report.require(f"it gets at most 0.05 less right than adapters: {spread(less)} more", min(less) >= -0.05)
    report.require(f"and at least 0.80: {spread(right['IAA-L'])}", min(right["IAA-L"]) >= 0.80)
    report.finish(given, {"accuracy": right, "loss": loss})


if __name__ == "__main__":
    main()
