"""Polyhistor-Lite: one small hypernetwork adapts a hierarchical backbone to three dense tasks, with a fraction of the adapters' numbers."""

from __future__ import annotations

import copy
import statistics

import torch
from common import Report, fit_scenes, options, spread
from torch import nn

import petiole as pt
from petiole.multitask.written import Lite, Written
from petiole.tasks.dense import DensePrediction

TASKS = ("saliency", "human_parts", "edge")
REGIONS = TASKS[:2]  # measured by mIoU
SIZE, PRETRAINING, STEPS, ROWS, RATE, WIDTH = 32, 500, 300, 16, 5e-3, 8
FIELDS = {"tasks": TASKS, "reduction_factor": 4, "task_embedding_dim": 16, "hidden_dim": 16, "projected_dim": 8}
METHODS: dict[str, pt.Method] = {
    "decoders alone": pt.LinearProbe(),
    "adapters": pt.Polyhistor(**FIELDS, variant="adapters"),
    "Lite": pt.Polyhistor(**FIELDS),
    "Lite, K = 0": pt.Polyhistor(**FIELDS, output_norms=False),
}


def main() -> None:
    given = options(__doc__)
    report = Report(
        "polyhistor",
        "Polyhistor",
        f"A Swin of widths 16, 32, 64, 128 (depths 1, 1, 2, 1; images of {SIZE} x {SIZE}), trained on the depth of generated scenes for "
        f"{PRETRAINING} steps, is frozen. {', '.join(TASKS)} of other scenes, {STEPS} steps, each the sum over the tasks on {ROWS} images, "
        f"Adam at {RATE}: decoders alone, adapters of each task (ρ = 4), Polyhistor-Lite (k = 1), and Lite with kernels that stay 0 and "
        "without norms of each task. mIoU in %, mean of saliency and parts on 64 scenes; numbers without decoders.",
        ("seed", *METHODS, "adapters' numbers", "Lite's numbers"),
    )
    found: dict[str, list[float]] = {name: [] for name in METHODS}
    share = 1.0
    for seed in range(given.seeds):
        backbone, counts = pretrained(seed), {}
        for name, method in METHODS.items():
            score, counts[name] = learnt(backbone, method, seed, kernels=not name.endswith("K = 0"))
            found[name].append(100 * score)
        report.row(seed, *(values[-1] for values in found.values()), counts["adapters"], counts["Lite"])
        share = counts["Lite"] / counts["adapters"]
    ahead = [mine - other for mine, other in zip(found["Lite"], found["decoders alone"], strict=True)]
    ablated = [mine - other for mine, other in zip(found["Lite, K = 0"], found["decoders alone"], strict=True)]
    report.require(
        f"Lite is above decoders alone, by 3 points or more on average: {statistics.mean(ahead):.2f} ({spread(ahead)})",
        min(ahead) > 0 and statistics.mean(ahead) >= 3,
    )
    report.require(f"with at most 0.25 of the adapters' numbers: {share:.3f}", share <= 0.25)
    report.require(
        f"without kernels it is within 1 point of decoders alone: {spread(ablated)}", max(map(abs, ablated)) <= 1
    )
    report.finish(given, found)


def pretrained(seed: int) -> nn.Module:
    """A hierarchical backbone that has learnt the depth of every pixel."""
    from transformers import SwinConfig, SwinModel

    config = SwinConfig(
        image_size=SIZE, patch_size=2, embed_dim=16, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8], window_size=2, drop_path_rate=0.0
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = SwinModel(config, add_pooling_layer=False)
    task = DensePrediction(("depth",), sizes={"train": PRETRAINING * ROWS // 4}, size=SIZE, seed=20 + seed)
    model = task.build_model(backbone, width=WIDTH, seed=seed)
    fit_scenes(model, model.parameters(), task, PRETRAINING, ROWS, RATE, seed)
    return model.backbone.eval()


def learnt(backbone: nn.Module, method: pt.Method, seed: int, kernels: bool) -> tuple[float, int]:
    """Mean IoU of the tasks of regions, and how many numbers train besides decoders."""
    task = DensePrediction(TASKS, sizes={"train": STEPS * ROWS // 8, "test": 64}, size=SIZE, seed=10 + seed)
    model = task.build_model(copy.deepcopy(backbone), width=WIDTH, seed=seed)
    decoders = sum(p.numel() for p in model.heads.parameters())
    tuned = pt.attach(model, method, seed=seed)
    writers = {slot.delta.source[0] for slot in tuned.slots if isinstance(slot.delta, Written)}
    for writer in writers:
        if isinstance(writer, Lite) and not kernels:
            for kernel in (*writer.kernels.values(), *writer.bias_kernels.values()):
                nn.init.zeros_(kernel.requires_grad_(False))
    fit_scenes(model, tuned.parameters(), task, STEPS, ROWS, RATE, seed)
    scores = task.evaluate(model, "test")
    return statistics.mean(scores[name] for name in REGIONS), tuned.trainable - decoders


if __name__ == "__main__":
    main()
