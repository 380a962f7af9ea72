"""DePT: with as many parameters as a longer prompt, a short one and an update by position adapt, in a shorter step."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from common import LENGTH, VOCABULARY, Encoder, Report, accuracy, learn, options, spread
from torch import Tensor

import petiole as pt

STEPS, TASKS = 200, 3
SIZES = {"prompt of 16": (16, 0), "DePT (4, 10)": (4, 10), "DePT (0, 13)": (0, 13), "prompt of 4": (4, 0)}  # m, r
RATES = {"prompt_learning_rate": 0.1, "lowrank_learning_rate": 5e-3}
METHODS = {name: pt.DePT(length=m, rank=r, max_length=max(r, LENGTH), **RATES) for name, (m, r) in SIZES.items()}


def main() -> None:
    given = options(__doc__ or "")
    report = Report(
        "dept",
        "DePT",
        f"Uniform tokens of {VOCABULARY} kinds behind one of three task tokens. A pre-norm encoder (3 blocks of width 64) learns to name the "
        "token 1, 2 or 3 places ahead, around the end, as the task token says (900 steps of 64 rows, AdamW, 2e-3), and is frozen, head and "
        f"all. Without a task token it then adapts to 3 places, {STEPS} steps, the prompt at 0.1, A and B at 0.005. Right is the share of "
        "tokens, time the median of a step as a share of that with a prompt of 16. Rank 13 needs a 13th row, which no token uses.",
        ("seed", "pre-training loss", "no prompt: right", *(f"{name}: {what}" for name in METHODS for what in ("right", "time"))),
    )  # fmt: skip
    right: dict[str, list[float]] = {name: [] for name in ("no prompt", *METHODS)}
    times: dict[str, list[float]] = {name: [] for name in METHODS}
    for seed in range(given.seeds):
        loss = run(seed, right, times)
        shown = [value for name in METHODS for value in (right[name][-1], times[name][-1])]
        report.row(seed, loss, right["no prompt"][-1], *shown)
    both, alone, shares = right["DePT (4, 10)"], right["DePT (0, 13)"], times["DePT (4, 10)"]
    report.require(f"DePT (4, 10) gets at least 0.85 right: {spread(both)}", min(both) >= 0.85)
    more = [one - other for one, other in zip(both, right["no prompt"], strict=True)]
    report.require(f"at least 0.4 more than without a prompt: {spread(more)}", min(more) >= 0.4)
    report.require(f"the update alone, DePT (0, 13), at least 0.8: {spread(alone)}", min(alone) >= 0.8)
    report.require(f"a step takes at most 0.75 of that with a prompt of 16: {spread(shares)}", max(shares) <= 0.75)
    report.finish(given, {**right, **{f"{name}: time": values for name, values in times.items()}})


def batches(steps: int, generator: torch.Generator, task: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of 12 tokens for one task, or each behind a token that says which; and what is right there."""
    for _ in range(steps):
        tokens = torch.randint(VOCABULARY, (64, LENGTH), generator=generator)
        if task is not None:
            yield tokens, tokens.roll(-task, 1)
            continue
        tasks = torch.randint(1, TASKS + 1, (64, 1), generator=generator)
        ahead = (torch.arange(LENGTH) + tasks) % LENGTH
        yield torch.cat([VOCABULARY + tasks - 1, tokens], 1), tokens.gather(1, ahead)


def run(seed: int, right: dict[str, list[float]], times: dict[str, list[float]]) -> float:
    """Pre-train, then adapt in each way. Returns the loss of pre-training."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    backbone = Encoder(3, VOCABULARY + TASKS)
    loss, _ = learn(backbone, backbone.parameters(), batches(900, generator, None), lr=2e-3)
    test = [torch.cat(part) for part in zip(*batches(8, generator, TASKS), strict=True)]
    right["no prompt"].append(accuracy(backbone, *test))
    seconds = {}
    for name, method in METHODS.items():
        model = copy.deepcopy(backbone)
        tuned = pt.attach(model, method, train_head=False, seed=seed)
        assert tuned.trainable == method.length * 64 + (method.max_length + 64) * (method.rank or 0)
        _, seconds[name] = learn(model, method.groups(tuned), batches(STEPS, generator, TASKS))
        right[name].append(accuracy(model, *test))
        times[name].append(seconds[name] / seconds["prompt of 16"])
    return loss


if __name__ == "__main__":
    main()
