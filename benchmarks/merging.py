"""What merging tokens saves: a forward pass and a training step of ViTs of 12 blocks and 197 tokens, beside the bare model and LoRA.

FLOPs are counted in the passes that are timed, so they have the match and the modulation in them. `kept` is how much of the FLOPs saving
comes out as time: (1 - time ratio) / (1 - FLOPs ratio). Everything runs in one process, interleaved; only ratios count.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import common
import torch
from torch import nn

import petiole as pt
from petiole.cost import forward_flops, step_flops

BACKBONES: dict[str, Callable[[int], Any]] = {
    "vit, width 192": lambda seed: common.vit(width=192, batch=8, seed=seed),
    "vit, width 384": lambda seed: common.vit(width=384, batch=8, seed=seed),
}
METHODS: dict[str, pt.Method] = {
    "lora": pt.LoRA(rank=8, alpha=8, roles=("q", "k", "v")),
    "low, plain": pt.PYRA(schedule="low", modulate=False, dropout=0.0),
    "low": pt.PYRA(schedule="low", dropout=0.0),
    "high": pt.PYRA(schedule="high", dropout=0.0),
}


def forward(model: nn.Module, batch: dict[str, Any]) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            model.eval()(**batch)

    return run


def step(model: nn.Module, batch: dict[str, Any]) -> Callable[[], None]:
    def run() -> None:
        model.train()(**batch).loss.backward()
        model.zero_grad(set_to_none=True)

    return run


def figures(backbone: str, seed: int, repeats: int) -> list[dict[str, Any]]:
    """Forward passes with LoRA merged over the bare model's, steps over LoRA's."""
    bare, batch = BACKBONES[backbone](seed)
    models, trained = {"bare": bare.requires_grad_(False)}, {}
    for name, method in METHODS.items():
        trained[name] = copy.deepcopy(bare)
        pt.attach(trained[name], method, train_head=False)
        if name != "lora":
            models[name] = copy.deepcopy(trained[name])
            pt.adaptations(models[name])["default"].merge(partly=True)
    flops = {name: forward_flops(model, batch) for name, model in models.items()}
    work = {name: step_flops(model, batch) for name, model in trained.items()}
    times = common.interleaved({name: forward(model, batch) for name, model in models.items()}, repeats)
    steps = common.interleaved({name: step(model, batch) for name, model in trained.items()}, repeats)
    rows = []
    for name in list(models)[1:]:
        time, *quartiles = common.ratio(times, name, "bare")
        step_time, *step_quartiles = common.ratio(steps, name, "lora")
        share, step_share = flops[name] / flops["bare"], work[name] / work["lora"]
        rows.append(
            {
                "schedule": name, "flops": share, "time": time, "quartiles": quartiles, "kept": (1 - time) / (1 - share),
                "step_flops": step_share, "step_time": step_time, "step_quartiles": step_quartiles,
                "step_kept": (1 - step_time) / (1 - step_share),
            }
        )  # fmt: skip
    return rows


def main() -> None:
    given = common.options(__doc__, repeats=15)
    chosen = [name for name in BACKBONES if not given.only or name in given.only.split(";")]
    found: dict[str, list[list[dict[str, Any]]]] = {}
    for backbone in chosen:
        found[backbone] = [figures(backbone, seed, given.repeats) for seed in range(given.seeds)]
        for rows in found[backbone]:
            print(f"{backbone}, {given.threads} thread{'s' * (given.threads > 1)}, {given.repeats} rounds")
            print(f"  {'schedule':12}{'FLOPs':>8}{'time':>8}{'quartiles':>16}{'kept':>8}   step: FLOPs    time    kept")
            for row in rows:
                low, high = row["quartiles"]
                print(
                    f"  {row['schedule']:12}{row['flops']:8.3f}{row['time']:8.3f}{f'{low:.3f}-{high:.3f}':>16}{row['kept']:8.0%}"
                    f"{row['step_flops']:14.3f}{row['step_time']:8.3f}{row['step_kept']:8.0%}"
                )
    common.write(
        given.json,
        {"figures": found, "versions": common.versions(), "threads": given.threads, "repeats": given.repeats},
    )


if __name__ == "__main__":
    main()
