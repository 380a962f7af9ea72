"""MTLoRA learns private changes that shared ones can't, and serves three dense tasks better from one pass through a small Swin."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from common import Linear, Report, fit_scenes, options, parts, shown, spread
from torch import Tensor, nn

import petiole as pt
from petiole.anatomy import Anatomy
from petiole.method import Place
from petiole.multitask.branching import Tasks
from petiole.multitask.mtlora import MTLoRA
from petiole.multitask.task_linear import TaskLinear
from petiole.tasks.dense import DenseModel, DensePrediction

SIZE, INPUTS, STEPS, RATE = 32, 1024, 600, 0.02
TASKS, PRETRAINING, TRAINING, ROWS, DENSE_RATE = ("saliency", "edge", "normals"), 150, 200, 16, 5e-3
SHARED_RANK, TASK_RANK, SCALE = 4, 4, 1.0


class OneLayer(MTLoRA):
    """Task outputs of the one linear that the backbone is."""

    def deltas(self, anatomy: Anatomy) -> Iterator[Place]:
        site = anatomy.sites(["q"], [0])[0]
        yield Place(
            site, TaskLinear(self, site, Tasks(self.tasks), self.shared_rank(0), self.task_ranks(0), opens=True)
        )


def main() -> None:
    given = options(__doc__)
    report = Report(
        "mtlora",
        "MTLoRA",
        f"First, one {SIZE} x {SIZE} linear for two tasks whose targets have a common change of rank 2 and one of rank 2 of their own, {INPUTS} "
        f"inputs, Adam at {RATE}, {STEPS} steps: shared LoRA of rank 12 against shared and task-specific factors of rank 4 each, which are as many "
        "numbers. Left is the share of the first loss. Then a Swin of two stages, trained on classes and depth of generated scenes, learns their "
        f"{', '.join(TASKS)} ({TRAINING} steps of {ROWS} images of 32 x 32 pixels, the same for all): decoders alone, with shared changes "
        f"alone (of a rank that gives as many numbers), and MTLoRA ({SHARED_RANK} and {TASK_RANK}). The total is the weighted loss on 64 other "
        "scenes; Δm is against models of one task, each with MTLoRA's numbers for one.",
        ("seed", "linear: shared", "linear: by task", "numbers", "decoders alone", "shared alone", "MTLoRA", "Δm of MTLoRA, %", "of shared, %"),
    )  # fmt: skip
    found: dict[str, list[float]] = {
        name: [] for name in ("linear_shared", "linear_task", "decoders", "shared", "mtlora", "delta_m")
    }
    for seed in range(given.seeds):
        toy = [linear(seed, by_task) for by_task in (False, True)]
        numbers, totals, gains = scenes(seed)
        for name, value in zip(found, (*toy, *totals, gains[0]), strict=True):
            found[name].append(value)
        report.row(seed, *toy, numbers, *totals, *gains)
    report.require(
        f"by task, less than 1e-3 is left of the linear's loss: {spread(found['linear_task'])}",
        max(found["linear_task"]) < 1e-3,
    )
    report.require(f"shared alone, more than 0.1: {spread(found['linear_shared'])}", min(found["linear_shared"]) > 0.1)
    for other, words in (("decoders", "decoders alone"), ("shared", "shared changes alone")):
        less = [1 - mine / theirs for mine, theirs in zip(found["mtlora"], found[other], strict=True)]
        mean = sum(less) / len(less)
        report.require(
            f"MTLoRA's total loss is below that of {words}: by {shown(100 * mean)} % on average ({spread([100 * v for v in less])})",
            min(less) > 0,
        )
    report.finish(given, found)


# ---------------------------------------------------------------------------------------------------------------------- one linear


def linear(seed: int, by_task: bool) -> float:
    """What is left of the loss of two tasks."""
    generator = torch.Generator().manual_seed(seed)

    def low_rank() -> Tensor:
        A, B = (torch.randn(SIZE, 2, generator=generator) for _ in range(2))
        return A @ B.T / SIZE

    W, S, own = torch.randn(SIZE, SIZE, generator=generator) / SIZE**0.5, low_rank(), [low_rank(), low_rank()]
    x = torch.randn(INPUTS, SIZE, generator=generator)
    wanted = torch.cat([x @ (W + S + D).T for D in own])
    model = Linear(W)
    method = OneLayer(
        tasks=("one", "two") * by_task, rank_shared=4 if by_task else 12, rank_task=4 if by_task else None, scale_shared=SCALE, scale_task=SCALE,
        dropout=0.0, roles=("q",),
        train_norms=False, train_patch_embedding=False, train_position_bias=False, patch_merging="freeze",
    )  # fmt: skip
    tuned = pt.attach(model, method, seed=seed, found=parts(model))
    assert tuned.trainable == 12 * 2 * SIZE
    optimizer = torch.optim.Adam(tuned.parameters(), lr=RATE)

    def loss() -> Tensor:
        y = model(x)  # the shared stream, then those of the tasks if there are any
        return ((y[INPUTS:] if by_task else y.repeat(2, 1)) - wanted).square().mean()

    first = float(loss().detach())
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    with torch.no_grad():
        return float(loss()) / first


# -------------------------------------------------------------------------------------------------------------------- dense tasks


def scenes(seed: int) -> tuple[int, list[float], tuple[float, float]]:
    """Numbers of MTLoRA without decoders; total losses of decoders alone, shared changes alone, MTLoRA; Δm of MTLoRA and of shared."""
    network = pretrained(seed)
    task = DensePrediction(TASKS, sizes={"train": TRAINING * ROWS // 8, "test": 64}, size=32, seed=10 + seed)
    method = pt.MTLoRA(
        tasks=TASKS,
        rank_shared=SHARED_RANK,
        rank_task=TASK_RANK,
        scale_shared=SCALE,
        scale_task=SCALE,
        patch_merging="freeze",
    )
    shared, numbers = as_many(network, method)
    frozen = pt.LinearProbe()
    totals, figures = [], []
    for chosen in (frozen, shared, method):
        total, reached = learnt(network, task, chosen, seed)
        totals.append(total)
        figures.append(reached)
    single = {}
    for name in TASKS:
        alone = DensePrediction((name,), sizes={"train": TRAINING * ROWS // 8, "test": 64}, size=32, seed=10 + seed)
        single |= learnt(network, alone, pt.MTLoRA(**{**method.model_dump(), "tasks": (name,)}), seed)[1]
    return numbers, totals, (task.delta_m(figures[2], single), task.delta_m(figures[1], single))


def pretrained(seed: int) -> nn.Module:
    """A Swin of two stages that has learnt classes and depth."""
    from transformers import SwinConfig, SwinModel

    config = SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, drop_path_rate=0.0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = SwinModel(config, add_pooling_layer=False)
    task = DensePrediction(("semseg", "depth"), sizes={"train": PRETRAINING * ROWS // 4}, size=32, seed=20 + seed)
    model = task.build_model(backbone, width=4, channels={"semseg": 4}, seed=seed)
    fit_scenes(model, model.parameters(), task, PRETRAINING, ROWS, DENSE_RATE, seed)
    return model.backbone.eval()


def as_many(network: nn.Module, method: MTLoRA) -> tuple[MTLoRA, int]:
    """The same without task parts, of the smallest rank that gives it as many numbers or more; and MTLoRA's."""

    def count(chosen: MTLoRA) -> int:
        return pt.attach(DenseModel(copy.deepcopy(network), TASKS, width=1), chosen, train_head=False).trainable

    wanted = count(method)
    for rank in range(SHARED_RANK, 100):
        shared = method.model_copy(update={"mode": "lora_only", "rank_shared": rank})
        if count(shared) >= wanted:
            return shared, wanted
    raise AssertionError("no rank gives as many numbers")


def learnt(network: nn.Module, task: DensePrediction, method: pt.Method, seed: int) -> tuple[float, dict[str, float]]:
    """The total loss on other scenes, and each task's figure."""
    model = task.build_model(copy.deepcopy(network), width=4, seed=seed)
    tuned = pt.attach(model, method, seed=seed)
    fit_scenes(model, tuned.parameters(), task, TRAINING, ROWS, DENSE_RATE, seed)
    rows = task.encoded("test")
    with torch.no_grad():
        total = float(model.eval()(**task.collator([rows[i] for i in range(len(rows))])).loss)
    return total, task.evaluate(model, "test")


if __name__ == "__main__":
    main()
