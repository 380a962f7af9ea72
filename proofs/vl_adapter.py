"""VL-Adapter: adapters and products learn what no head can; one adapter for two tasks does as well as one for each."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import bench
import torch
from common import Report, options, spread, step
from torch import Tensor, nn

import petiole as pt
from petiole.training import Events

TASKS = ("first", "second")
TURNS = 600  # steps of each of two tasks
FROZEN = {"reduction_factor": bench.SIZE // 8, "train_norms": False}  # a bottleneck of 8
ALONE: dict[str, pt.Method] = {
    "head only": pt.LinearProbe(),
    "adapter": pt.VLAdapter(**FROZEN),
    "Compacter": pt.VLAdapter(form="compacter", **FROZEN),
}
SEVERAL: dict[str, pt.Method] = {
    "single": pt.VLAdapter(tasks=TASKS, **FROZEN),
    "multiple": pt.VLAdapter(tasks=TASKS, sharing="multiple", **FROZEN),
}


def both(method: pt.Method, seed: int) -> tuple[float, int, bool]:
    """Two tasks in turn, of 600 steps each, with a token in front that says which: the mean accuracy, how many numbers the adapters
    have, and whether a step on one task left the other's own bit for bit."""
    model, (x, z) = bench.backbone(seed), bench.samples(seed)
    named = 3 * torch.randn(len(TASKS), 1, bench.FEATURES, generator=torch.Generator().manual_seed(3000 + seed))
    inputs = {task: torch.cat([token.expand(len(x), 1, -1), x], 1) for task, token in zip(TASKS, named, strict=True)}
    goals = {task: bench.xor(z, 2 * i, 2 * i + 1) for i, task in enumerate(TASKS)}
    tuned = pt.attach(model, method, seed=seed)
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=bench.RATE, weight_decay=0.01)
    events = Events(model, optimizer, total_steps=2 * TURNS)
    model.train()
    with pt.given(model, task=TASKS[0]):
        events.begin([{"x": inputs[TASKS[0]][: bench.BATCH]}])
    kept = True
    for number, rows in enumerate(bench.batches(bench.TRAINING, seed, 2 * TURNS)):
        task, other = TASKS[number % 2], TASKS[1 - number % 2]
        before = {n: p.detach().clone() for n, p in tuned.named_parameters() if f".{other}." in n}
        assert bool(before) == (method is SEVERAL["multiple"])
        with pt.given(model, task=task):
            step(events, optimizer, loss_of(model, inputs[task][rows], goals[task][rows]))
        kept &= all(torch.equal(p, before[n]) for n, p in tuned.named_parameters() if n in before)
    model.eval()
    found = []
    for task in TASKS:
        with pt.given(model, task=task):
            found.append(bench.accuracy(model, inputs[task][bench.TRAINING :], goals[task][bench.TRAINING :]))
    adapters = sum(p.numel() for slot in tuned.slots if slot.number == 0 for p in slot.delta.parameters())
    return statistics.mean(found), adapters, kept


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    return lambda: nn.functional.cross_entropy(model(x), y)


def main() -> None:
    given = options(__doc__)
    report = Report(
        "vl-adapter",
        "VL-Adapter",
        f"{bench.ABOUT} Adapters of bottleneck 8 after every attention and ffn, norms frozen; Compacter with n = 2. Early loss: the mean of "
        "the first 150 steps. Then two tasks in turn, the signs of z₁ z₂ and of z₃ z₄, 600 steps each, one head for both and a token in front "
        "that names the task: one adapter for both, or one for each; mean accuracy of the two.",
        ("seed", *ALONE, *(f"early loss, {name}" for name in list(ALONE)[1:]), *(f"two tasks, {name}" for name in SEVERAL)),
    )  # fmt: skip
    right: dict[str, list[float]] = {name: [] for name in (*ALONE, *SEVERAL)}
    loss: dict[str, list[float]] = {name: [] for name in list(ALONE)[1:]}
    counts, kept = {}, True
    for seed in range(given.seeds):
        for name, method in ALONE.items():
            outcome = bench.run(method, seed)
            right[name].append(outcome.accuracy)
            if name in loss:
                loss[name].append(outcome.early())
        for name, method in SEVERAL.items():
            accuracy, counts[name], alone = both(method, seed)
            right[name].append(accuracy)
            kept &= alone
        report.row(
            seed,
            *(right[name][-1] for name in ALONE),
            *(loss[name][-1] for name in loss),
            *(right[name][-1] for name in SEVERAL),
        )
    for name, least in (("adapter", 0.80), ("Compacter", 0.75)):
        more = [mine - head for mine, head in zip(right[name], right["head only"], strict=True)]
        report.require(
            f"{name} gets at least {least} right, and 0.2 more than the head alone: {spread(right[name])}, {spread(more)} more",
            min(right[name]) >= least and min(more) >= 0.2,
        )
    less = [many - one for many, one in zip(right["multiple"], right["single"], strict=True)]
    report.require(
        f"on two tasks one adapter gets at most 0.05 less right than one for each: {spread(less)} less, by seed; with "
        f"{counts['single']:,} numbers instead of {counts['multiple']:,}",
        statistics.mean(less) <= 0.05 and 2 * counts["single"] == counts["multiple"],
    )
    report.require("no step on one task changes a bit of the other's own adapters", kept)
    report.finish(given, {"accuracy": right, "early loss": loss})


if __name__ == "__main__":
    main()
