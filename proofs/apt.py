"""APT: prompts beside attention reach what a frozen encoder holds but its head can't read, in a fraction of deep prompts' time."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator

import torch
from common import LENGTH, VOCABULARY, Encoder, Report, accuracy, learn, options, spread
from torch import Tensor, nn

import petiole as pt

DEPTH, PROMPTS, STEPS, RATE, TOKENS = 4, 32, 300, 3e-3, 32
METHODS = {"head only": pt.LinearProbe(), "APT": pt.APT(length=PROMPTS, dropout=0.0)}


def main() -> None:
    given = options(__doc__ or "")
    report = Report(
        "apt",
        "APT",
        f"Tokens of {VOCABULARY} kinds, each the one before it with probability 1/2. A pre-norm encoder ({DEPTH} blocks of width 64) learns to "
        "name the token three places ahead, around the end (700 steps of 64 rows, AdamW, 2e-3), and is frozen. The task then is whether a "
        f"token and that one add up to an odd number: {STEPS} steps at {RATE}, final norm and a new linear head train in both cases, APT "
        f"beside every attention with {PROMPTS} prompts and rank 4. Then the time of a step, forward and backward, of two blocks on 32 rows "
        f"of {TOKENS} tokens, as a share of that with as many deep prompts.",
        ("seed", "pre-training loss", *(f"{name}: right" for name in METHODS), "time, m = 64", "time, m = 128"),
    )
    right: dict[str, list[float]] = {name: [] for name in METHODS}
    shares: dict[int, list[float]] = {64: [], 128: []}
    for seed in range(given.seeds):
        loss = run(seed, right)
        for m, found in shares.items():
            found.append(share_of_time(m, seed))
        report.row(seed, loss, *(v[-1] for v in right.values()), *(v[-1] for v in shares.values()))
    report.require(f"APT gets at least 0.95 right: {spread(right['APT'])}", min(right["APT"]) >= 0.95)
    report.require(f"the head alone at most 0.7: {spread(right['head only'])}", max(right["head only"]) <= 0.7)
    for m, bound in ((64, 0.6), (128, 0.4)):
        report.require(f"a step with m = {m} takes less than {bound} of that with deep prompts: {spread(shares[m])}",
                       max(shares[m]) < bound)  # fmt: skip
    report.finish(given, right)


def rows(count: int, generator: torch.Generator) -> Tensor:
    """Tokens (count, 12)"""
    tokens = torch.randint(VOCABULARY, (count, LENGTH), generator=generator)
    other = torch.randint(1, VOCABULARY, (count, LENGTH), generator=generator)
    stays = torch.rand(count, LENGTH, generator=generator) < 0.5
    for t in range(1, LENGTH):
        tokens[:, t] = torch.where(stays[:, t], tokens[:, t - 1], (tokens[:, t - 1] + other[:, t]) % VOCABULARY)
    return tokens


def ahead(tokens: Tensor) -> Tensor:
    """x_{(t + 3) mod 12}"""
    return tokens.roll(-3, 1)


def odd(tokens: Tensor) -> Tensor:
    return (tokens + ahead(tokens)) % 2


def batches(
    steps: int, target: Callable[[Tensor], Tensor], generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    for _ in range(steps):
        tokens = rows(64, generator)
        yield tokens, target(tokens)


def run(seed: int, right: dict[str, list[float]]) -> float:
    """Pre-train, then adapt in each way. Returns the loss of pre-training."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    backbone = Encoder(DEPTH)
    loss, _ = learn(backbone, backbone.parameters(), batches(700, ahead, generator), lr=2e-3)
    backbone.head = nn.Linear(64, 2)
    test = rows(512, generator)
    for name, method in METHODS.items():
        model = copy.deepcopy(backbone)
        tuned = pt.attach(model, method, seed=seed)
        norm = list(model.norm.requires_grad_().parameters())
        learn(model, [*tuned.parameters(), *norm], batches(STEPS, odd, generator), lr=RATE)
        right[name].append(accuracy(model, test, odd(test)))
    return loss


def share_of_time(m: int, seed: int) -> float:
    """Of the time of a step with m deep prompts: that with m prompts beside attention. The best of several steps, in turn."""
    torch.manual_seed(seed)
    bare, x = Encoder(2), torch.randint(VOCABULARY, (32, TOKENS))
    best = {}
    models = {"apt": pt.APT(length=m, dropout=0.0), "deep": pt.VisualPromptTuning(length=m)}
    attached = {name: copy.deepcopy(bare) for name in models}
    for name, method in models.items():
        pt.attach(attached[name], method)
        attached[name].train()
    for _ in range(20):
        for name, model in attached.items():
            start = time.perf_counter()
            model(x).square().mean().backward()
            best[name] = min(best.get(name, float("inf")), time.perf_counter() - start)
            model.zero_grad()
    return best["apt"] / best["deep"]


if __name__ == "__main__":
    main()
