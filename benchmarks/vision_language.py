"""Which methods teach a small BART, which knows scenes as they are told, to answer from pictures.

The backbone is pre-trained on questions, statements and captions of scenes that are told (`petiole.tasks.vision_language.pretraining`, a few
minutes on one core, kept in `--folder`). Every method then trains on the same pictures with the same steps, one task in each, with a
learning rate of its own; the visual embedding trains with all of them. "text alone" sees no picture: what it gets right is chance. Figures
are shares of answers that are right to the word, on the test split. `--plot` draws scenes with what is
asked about them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import common
import torch
from torch import nn

import petiole as pt
from petiole.tasks.vision_language import TASKS, VisionLanguage, pretrained
from petiole.training import Events, parameter_groups

BATCH = 64
ROWS = {"train": 1500, "test": 200, "validation": 0}
METHODS: dict[str, tuple[pt.Method, float]] = {
    "full": (pt.FullFineTuning(), 1e-3),
    "lora": (pt.LoRA(rank=8), 3e-3),
    "vl-adapter": (pt.VLAdapter(tasks=TASKS, reduction_factor=4), 3e-3),
    "vl-pet": (pt.VLPET(bottleneck=16, decoder_bottleneck=16), 3e-3),
    "visual embedding alone": (pt.LinearProbe(), 3e-3),
    "text alone": (pt.LoRA(rank=8), 3e-3),
}


def fit(model: nn.Module, task: VisionLanguage, steps: int, rate: float, seed: int) -> float:
    """AdamW with 10 % of the steps to warm up, then down to 0, gradients clipped. Returns the seconds."""
    optimizer = torch.optim.AdamW(parameter_groups(model, learning_rate=rate, weight_decay=0.01))
    warm = steps // 10
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / (steps - warm))
    )
    events = Events(model, optimizer, schedule, total_steps=steps)
    events.begin()
    model.train()
    start = time.perf_counter()
    for name, batch in task.steps("train", BATCH, steps, seed):
        events.before_step()
        with pt.given(model, task=name):
            loss = model(**batch).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 5.0)
        events.before_optimizer_step(loss)
        optimizer.step()
        events.after_optimizer_step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    return time.perf_counter() - start


def trial(name: str, folder: Path, task: VisionLanguage, steps: int, seed: int) -> dict[str, Any]:
    """What a method trains, how long it takes, and its figures on the test split."""
    model = task.build_model(pretrained(folder), seed=seed)
    method, rate = METHODS[name]
    embedding = sum(p.numel() for p in model.visual_embedding.parameters()) if task.features else 0
    tuned = pt.attach(model, method, seed=seed, train_head=None if task.features else False)
    trainable, seconds = tuned.trainable - embedding, fit(model, task, steps, rate, seed)
    return {"rate": rate, "trainable": trainable, "seconds": seconds, **task.evaluate(model, "test")}


def draw(path: Path) -> None:
    """Scenes of each task, with what is asked and answered."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    task = VisionLanguage(sizes={"train": 4, "validation": 0, "test": 0})
    rows = task.encoded("train")
    figure, axes = plt.subplots(3, 4, figsize=(9.6, 7.4), layout="constrained")
    for index, axis in enumerate(axes.flat):
        own, pictures = rows.examples[index], rows.pictures(index).add(0.5).clamp(0, 1)
        gap = torch.ones(3, pictures.shape[2], 4)
        parts = [part for picture in pictures for part in (picture, gap)][:-1]
        axis.imshow(torch.cat(parts, 2).permute(1, 2, 0).numpy(), interpolation="nearest")
        answer = own.answer if own.task != "caption" else "\n".join(map(str, own.scenes[0]))
        axis.set_title(
            f"{own.task}: {own.question}".replace("more ", "more\n").replace("alone ", "alone\n"), fontsize=8
        )
        axis.set_xlabel(answer, fontsize=8, fontweight="bold")
        axis.set_xticks([])
        axis.set_yticks([])
    figure.savefig(path, dpi=110)


def spread(values: list[float]) -> str:
    return " to ".join(dict.fromkeys(f"{value:.2f}" for value in (min(values), max(values))))


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--plot", type=Path, default=None)
    parser.add_argument("--folder", type=Path, default=Path("runs/scenes"), help="where the backbone is kept")
    parser.add_argument("--steps", type=int, default=300)
    found = common.options(__doc__ or "", repeats=1, parents=[parser])
    if found.plot is not None:
        draw(found.plot)
        return
    asked = [name for name in found.only.split(",") if name] or list(METHODS)
    figures: dict[str, Any] = {
        "threads": found.threads,
        "seeds": found.seeds,
        "steps": found.steps,
        "versions": common.versions(),
        "methods": {},
    }
    names = (*TASKS, "caption_rouge_l", "average")
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in asked}
    for seed in range(found.seeds):
        seen, told = (VisionLanguage(sizes=ROWS, features=kind, seed=seed) for kind in ("pixels", None))
        for name in asked:
            rows[name].append(trial(name, found.folder, told if name == "text alone" else seen, found.steps, seed))
            print(name, seed, rows[name][-1], flush=True)
    figures["methods"] = rows
    print(f"\n| method | trainable besides the embedding | {' | '.join(names)} | seconds |")
    for name, own in rows.items():
        cells = [spread([row[key] for row in own]) for key in names]
        seconds = statistics.median(row["seconds"] for row in own)
        print(f"| {name} | {own[0]['trainable']:,} | {' | '.join(cells)} | {seconds:.0f} |")
    common.write(found.json, figures)


if __name__ == "__main__":
    main()
