"""LST: a side network finds what the last state of a frozen encoder has discarded, and keeps less than LoRA does for backward."""

from __future__ import annotations

import torch
from common import (
    Report,
    ahead,
    bytes_over_lora,
    chains,
    fit_tokens,
    head_alone,
    options,
    pretrained,
    repeated,
    right,
    spread,
    with_classes,
)

import petiole as pt

STEPS = 400


def main() -> None:
    given = options(__doc__)
    report = Report(
        "lst",
        "LST",
        "A pre-norm encoder (width 64, 4 layers) learns to tell the token three places on, in chains of 12 tokens in which half repeat the "
        f"one before, and is frozen. New task: is this token the one before? {STEPS} steps of AdamW at 3e-3, for a norm and a head on the "
        "last state, and for LST (r = 4, random start). Then the token two places on, r = 2: the loss after 50 steps at 1e-3 from a start "
        "by importance on data, by size, or at random. (Of weights four times narrower too little is left here: with r = 4, chance was the "
        "better start, 1.24 against 1.33 at 3e-3.) Last, bytes kept for backward over LoRA's: rank 8 on q, k, v; width 128, 6 layers, "
        "16 x 32 tokens.",
        ("seed", "head alone", "LST", "loss from data", "loss from size", "loss from chance"),
    )
    backbone, loss = pretrained()
    report.require(f"the encoder has learnt its task: loss {loss:.1e}", loss < 1e-3)
    heads, sides, starts = [], [], []
    for seed in range(given.seeds):
        heads.append(head_alone(backbone, repeated, STEPS, seed))
        model = with_classes(backbone, 2, seed)
        tuned = pt.attach(model, pt.LST(reduction_factor=4, init="random"), seed=seed)
        fit_tokens(model, tuned.parameters(), repeated, STEPS, 3e-3, seed)
        sides.append(right(model, repeated))
        starts.append([start(backbone, init, seed) for init in ("fisher", "magnitude", "random")])
        report.row(seed, heads[-1], sides[-1], *starts[-1])
    report.require(f"LST solves it, at least 0.85: {spread(sides)}", min(sides) >= 0.85)
    report.require(f"the last state does not hold it, at most 0.65: {spread(heads)}", max(heads) <= 0.65)
    share = bytes_over_lora(pt.LST(reduction_factor=8, init="random"))
    report.require(f"bytes kept for backward are below half of LoRA's: {share:.2f}", share < 0.5)
    fisher, magnitude, random = (sum(values) / len(values) for values in zip(*starts, strict=True))
    report.require(
        f"the backbone's weights are a better start than chance: {min(fisher, magnitude):.3f} against {random:.3f}",
        min(fisher, magnitude) < random,
    )
    report.finish(given, {"lst": sides, "head": heads, "bytes_over_lora": [share]})


def start(backbone: torch.nn.Module, init: str, seed: int) -> float:
    """Loss after 50 steps on the token two places on."""
    goal = lambda x: ahead(x, 2)  # noqa: E731
    model = with_classes(backbone, 6, seed)
    model.classifier.load_state_dict(backbone.classifier.state_dict())
    tuned = pt.attach(model, pt.LST(reduction_factor=2, init=init, fisher_samples=256), seed=seed)
    x = chains(256, torch.Generator().manual_seed(seed))
    tuned.calibrate([{"input_ids": x, "labels": goal(x)}])
    return fit_tokens(model, tuned.parameters(), goal, 50, 1e-3, seed)


if __name__ == "__main__":
    main()
