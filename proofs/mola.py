"""MoLA: four kinds of tokens that each need a change of their own, which routed experts give and one LoRA can not."""

from __future__ import annotations

import torch
from common import Report, attached, fit, options, spread
from torch import nn

import petiole as pt

SIZE, CLUSTERS, TOKENS, STEPS, RATE = 32, 4, 2048, 400, 0.02
METHODS = {
    "MoLA": pt.MoLA(num_experts=8, top_k=2, rank=2, alpha=2, dropout=0.0),
    "LoRA, rank 2": pt.LoRA(rank=2, alpha=2),
    "LoRA, rank 16": pt.LoRA(rank=16, alpha=16),
}


def main() -> None:
    given = options(__doc__)
    report = Report(
        "mola",
        "MoLA",
        f"{TOKENS:,} tokens of {SIZE} numbers around {CLUSTERS} centres; a {SIZE} x {SIZE} linear must change by another matrix of "
        f"rank 2 for each centre. Eight experts of rank 2, of which each token takes two, against LoRA of rank 2 and of rank 16; Adam, "
        f"learning rate {RATE}, {STEPS} steps, alpha is the rank. Left is the share of the first loss.",
        ("seed", *(f"{name}: left" for name in METHODS)),
    )
    left: dict[str, list[float]] = {name: [] for name in METHODS}
    for seed in range(given.seeds):
        for name, share in run(seed).items():
            left[name].append(share)
        report.row(seed, *(values[-1] for values in left.values()))
    report.require(f"MoLA leaves less than 0.02: {spread(left['MoLA'])}", max(left["MoLA"]) < 0.02)
    for name in list(METHODS)[1:]:
        report.require(f"{name} leaves more than 0.05: {spread(left[name])}", min(left[name]) > 0.05)
    counts = experts()
    report.require(
        f'"2468" gives four layers {", ".join(map(str, counts))} experts, from the bottom', counts == [2, 4, 6, 8]
    )
    report.finish(given, left)


def run(seed: int) -> dict[str, float]:
    """What each method leaves."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(SIZE, SIZE, generator=generator) / SIZE**0.5
    centres = 3 * torch.randn(CLUSTERS, SIZE, generator=generator)
    U = torch.randn(CLUSTERS, SIZE, 2, generator=generator) / SIZE**0.5
    V = torch.randn(CLUSTERS, 2, SIZE, generator=generator) / SIZE**0.5
    kind = torch.randint(CLUSTERS, (TOKENS,), generator=generator)
    x = centres[kind] + torch.randn(TOKENS, SIZE, generator=generator)
    y = x @ W.T + ((U @ V)[kind] @ x[:, :, None])[:, :, 0]
    found = {}
    for name, method in METHODS.items():
        model, tuned = attached(W, method, seed)
        found[name] = fit(model, tuned.parameters(), x, y, RATE, STEPS)
    return found


def experts() -> list[int]:
    """How many experts four layers get by default."""
    blocks = nn.ModuleList([nn.ModuleDict({"query": nn.Linear(SIZE, SIZE)}) for _ in range(4)])
    model = nn.ModuleDict({"blocks": blocks})
    found = pt.anatomy(model, stacks={"encoder": "blocks"}, roles={"q": "query"})
    tuned = pt.attach(model, pt.MoLA(roles=("q",)), found=found)
    return [slot.delta.router.shape[0] for slot in tuned.slots]


if __name__ == "__main__":
    main()
