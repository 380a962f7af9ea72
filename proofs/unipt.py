"""UniPT: from all states of a frozen encoder, in parallel, what the last one has discarded; and what the interaction is good for."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from common import (
    Report,
    bytes_over_lora,
    fit_tokens,
    head_alone,
    options,
    parity,
    pretrained,
    repeated,
    right,
    spread,
    with_classes,
)
from torch import Tensor, nn

import petiole as pt
from petiole.methods.side import unipt

STEPS = 400
METHOD = pt.UniPT(reduction_factor=2, wide_projection=True)  # d' = 32


def main() -> None:
    given = options(__doc__)
    report = Report(
        "unipt",
        "UniPT",
        "A pre-norm encoder (width 64, 4 layers) learns to tell the token three places on, in chains of 12 tokens in which half repeat the "
        "one before, and is frozen. New tasks: repeat, is this token the one before; parity, the sum of this token and the third on, mod 2. "
        f"{STEPS} steps of AdamW at 3e-3 for a norm and a head on the last state, and for UniPT (encoder form, wide projection, d' = 32); "
        "300 for repeat with and without the interaction (u_i = z_i). Bytes kept for backward over LoRA's: rank 8 on q, k, v; width 128, "
        "6 layers, 16 x 32 tokens, d' = 64.",
        (
            "seed",
            "repeat: head",
            "repeat: UniPT",
            "parity: head",
            "parity: UniPT",
            "repeat, 300 steps",
            "without interaction",
        ),
    )
    backbone, loss = pretrained()
    report.require(f"the encoder has learnt its task: loss {loss:.1e}", loss < 1e-3)
    rows = []
    for seed in range(given.seeds):
        row = [head_alone(backbone, repeated, STEPS, seed), tuned(backbone, repeated, STEPS, seed)]
        row += [head_alone(backbone, parity, STEPS, seed), tuned(backbone, parity, STEPS, seed)]
        row += [tuned(backbone, repeated, 300, seed), tuned(backbone, repeated, 300, seed, interacts=False)]
        rows.append(row)
        report.row(seed, *row)
    heads, found, other_heads, other, some, none = (list(column) for column in zip(*rows, strict=True))
    report.require(f"UniPT solves repeat, at least 0.85: {spread(found)}", min(found) >= 0.85)
    report.require(f"UniPT solves parity, at least 0.95: {spread(other)}", min(other) >= 0.95)
    report.require(
        f"the last state does not hold them, at most 0.70: {spread(heads + other_heads)}",
        max(heads + other_heads) <= 0.70,
    )
    gaps = [a - b for a, b in zip(some, none, strict=True)]
    gap = sum(gaps) / len(gaps)
    report.require(f"the interaction is worth 0.10 or more on average: {gap:.2f} ({spread(gaps)})", gap >= 0.10)
    share = bytes_over_lora(pt.UniPT(reduction_factor=2))
    report.require(f"bytes kept for backward are below half of LoRA's: {share:.2f}", share < 0.5)
    report.finish(given, {"repeat": found, "parity": other, "bytes_over_lora": [share]})


def tuned(backbone: nn.Module, goal: Any, steps: int, seed: int, interacts: bool = True) -> float:
    """Share of tokens that are right after training."""
    model = with_classes(backbone, 2, seed)
    adaptation = pt.attach(model, METHOD, seed=seed)
    with nullcontext() if interacts else mock.patch.object(unipt, "interaction", nothing):
        fit_tokens(model, adaptation.parameters(), goal, steps, 3e-3, seed)
        return right(model, goal)


def nothing(a: Tensor, z: Tensor, mask: Tensor | None, floor: bool = False) -> Tensor:
    return torch.zeros_like(a)


if __name__ == "__main__":
    main()
