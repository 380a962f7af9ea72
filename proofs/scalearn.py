"""ScaLearn: one number for each of four trained adapters tells which of them a new task with 64 examples needs."""

from __future__ import annotations

import statistics

import bench
import torch
from common import Report, options, spread
from torch import Tensor, nn

import petiole as pt

SOURCES, BLOCKS, STEPS, LABELLED, NOISE = ("z1", "z2", "z3", "z4"), 4, 200, 64, 0.3
ADAPTER = pt.UnifiedView(
    attention={"form": "none"},
    ffn={"form": "adapter", "insertion": "pfeiffer", "bottleneck": 8, "scale": 1.0, "init": "bert"},
)
SHARED = pt.ScaLearn(sources=SOURCES, granularity="scalar", share_layers=True, dropout=0.0)
METHODS: dict[str, pt.Method] = {
    "Uniform++": SHARED,
    "ω as at start": SHARED.model_copy(update={"constants": (0.5,) * 4}),
    "head only": pt.LinearProbe(),
    "own adapter": ADAPTER,
}


def main() -> None:
    given = options(__doc__)
    report = Report(
        "scalearn",
        "ScaLearn",
        f"A frozen random post-norm encoder ({BLOCKS} blocks of width {bench.SIZE}) reads {bench.TOKENS} tokens of {bench.FEATURES} "
        f"features, a random linear mix of z₁ to z₄ with noise {NOISE}. Four adapters of 8 have learned the sign of one factor each, in "
        f"{STEPS} steps. The new label is the sign of z₁ + z₃, with {LABELLED} examples and {STEPS} steps: learning rate 6e-3 for ω, 3e-3 "
        f"for a fresh head and for an adapter of its own. Accuracy on {bench.TEST:,} others.",
        ("seed", "ω", *METHODS),
    )
    found: dict[str, list[float]] = {name: [] for name in METHODS}
    gaps = []
    for seed in range(given.seeds):
        omega, accuracies = one(seed)
        for name, value in accuracies.items():
            found[name].append(value)
        gaps.append(min(omega[0], omega[2]) - max(omega[1], omega[3]))
        report.row(seed, ", ".join(f"{value:.2f}" for value in omega), *accuracies.values())
    report.require(
        f"ω of the two sources that matter are larger than the others by 0.2 or more: {spread(gaps)}", min(gaps) >= 0.2
    )
    means = {name: statistics.mean(values) for name, values in found.items()}
    learned, start, head = (means[name] for name in ("Uniform++", "ω as at start", "head only"))
    report.require(
        f"learned scales are at most a point below constant ones in the mean: {learned:.3f}, {start:.3f}",
        learned >= start - 0.01,
    )
    report.require(f"and not below the head alone: {learned:.3f}, {head:.3f}", learned >= head)
    report.finish(given, {**found, "gaps": gaps})


def one(seed: int) -> tuple[list[float], dict[str, float]]:
    """ω after training, and the accuracy of each method."""
    x, z = bench.samples(seed, noise=NOISE)
    model, trained = bench.backbone(seed, layers=BLOCKS), slice(bench.TRAINING)
    for factor, name in enumerate(SOURCES):
        tuned = pt.attach(model, ADAPTER, name=name, seed=seed + factor)
        fit(model, tuned, x[trained], (z[trained, factor] > 0).long(), seed)
    y, accuracies, omega = (z[:, 0] + z[:, 2] > 0).long(), {}, []
    for name, method in METHODS.items():
        tuned = pt.attach(model, method, name="target", seed=seed)
        fit(model, tuned, x[:LABELLED], y[:LABELLED], seed)
        accuracies[name] = bench.accuracy(model, x[bench.TRAINING :], y[bench.TRAINING :])
        if method is SHARED:
            omega = [float(tuned.named_tensors()[f"0.shared:omega_{source}"]) for source in SOURCES]
        tuned.detach()
    return omega, accuracies


def fit(model: nn.Module, tuned: pt.Adaptation, x: Tensor, y: Tensor, seed: int) -> None:
    """Adam, with batches of 64."""
    groups = [
        {"params": [parameter], "lr": 6e-3 if "omega" in name else bench.RATE}
        for name, parameter in tuned.named_parameters()
        if parameter.requires_grad
    ]
    optimizer = torch.optim.Adam(groups)
    model.train()
    for rows in bench.batches(len(x), seed, STEPS):
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


if __name__ == "__main__":
    main()
