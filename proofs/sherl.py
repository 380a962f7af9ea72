"""SHERL: early states and one late layer do what the last state alone can't; and what dividing by redundancy is good for."""

from __future__ import annotations

import torch
from common import (
    Report,
    bytes_over_lora,
    fit_tokens,
    head_alone,
    options,
    parity,
    pretrained,
    right,
    spread,
    with_classes,
)

import petiole as pt
from petiole.methods.side.sherl import Sherl

STEPS, DRAWS, SIZE = 300, 200, 16


def main() -> None:
    given = options(__doc__)
    report = Report(
        "sherl",
        "SHERL",
        "A pre-norm encoder (width 64, 4 layers) learns to tell the token three places on, in chains of 12 tokens, and is frozen. New task: "
        f"the sum of a token and the third on, mod 2. {STEPS} steps of AdamW at 3e-3 for a norm and a head on the last state, and for SHERL "
        f"(gated, d' = {SIZE}, one late layer). The relative change of G when one of five random shallow vectors is there five times, mean "
        f"of {DRAWS} draws, with and without R. Bytes kept for backward over LoRA's: rank 8 on q, k, v; width 128, 6 layers, 16 x 32 tokens.",
        ("seed", "head alone", "SHERL", "change of G", "without R"),
    )
    backbone, loss = pretrained()
    report.require(f"the encoder has learnt its task: loss {loss:.1e}", loss < 1e-3)
    heads, found, changes = [], [], []
    for seed in range(given.seeds):
        heads.append(head_alone(backbone, parity, STEPS, seed))
        model = with_classes(backbone, 2, seed)
        tuned = pt.attach(model, pt.SHERL(side_size=SIZE), seed=seed)
        fit_tokens(model, tuned.parameters(), parity, STEPS, 3e-3, seed)
        found.append(right(model, parity))
        changes.append([change(seed, divides) for divides in (True, False)])
        report.row(seed, heads[-1], found[-1], *changes[-1])
    report.require(f"SHERL solves it, at least 0.95: {spread(found)}", min(found) >= 0.95)
    report.require(f"the last state does not hold it, at most 0.70: {spread(heads)}", max(heads) <= 0.70)
    shares = [a / b for a, b in changes]
    report.require(
        f"with R, a repeated state moves G by less than 0.6 of what it does without: {spread(shares)}",
        max(shares) < 0.6,
    )
    for late in (1, 0):
        share = bytes_over_lora(pt.SHERL(side_size=SIZE, num_late_layers=late))
        report.require(
            f"bytes kept for backward, {late} late layers, are below half of LoRA's: {share:.2f}", share < 0.5
        )
    report.finish(given, {"sherl": found, "head": heads})


@torch.no_grad()
def change(seed: int, divides: bool) -> float:
    """Mean of |G' - G| / |G| over draws, where G' sees one of five states five times."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = (Sherl if divides else Plain)(pt.SHERL(), "gated", [64] * 6, SIZE, 64)
    X = torch.randn(1, DRAWS, 5, SIZE, generator=generator)
    g = torch.randn(1, DRAWS, SIZE, generator=generator)
    more = torch.cat([X, X[:, :, :1].expand(-1, -1, 4, -1)], 2)
    G, other = (adapter.guided(list(states.unbind(2)), g) for states in (X, more))
    return float(((other - G).norm(dim=-1) / G.norm(dim=-1)).mean())


class Plain(Sherl):
    """Without R: weights by the scores alone."""

    def weights(self, X: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        w = torch.relu(self.score(X * g.unsqueeze(2))[..., 0])
        return w / (w.sum(-1, keepdim=True) + self.eps)


if __name__ == "__main__":
    main()
