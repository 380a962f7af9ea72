"""What skipped blocks save at inference: FLOPs, and how much of that arrives as time, for DAS on 12 blocks of width 768.

Each number of skipped blocks is compared with the same adapters and all blocks, and with the bare model, interleaved in one process.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import common
import torch
from torch import nn

import petiole as pt
from petiole.cost import forward_flops
from petiole.methods.execution.das import DAS
from petiole.methods.execution.skipped import prune

DEPTH, WIDTH = 12, 768
BACKBONES: dict[str, Callable[..., Any]] = {
    "vit": lambda batch, seed: common.vit(width=WIDTH, layers=DEPTH, batch=batch, seed=seed),
    "bert": lambda batch, seed: common.bert(width=WIDTH, layers=DEPTH, batch=batch, length=240, seed=seed),
}


def without(model: nn.Module, batch: dict[str, Any], skipped: int) -> nn.Module:
    """A pruned copy without this many blocks, spread over the depth."""
    made = copy.deepcopy(model)
    names = tuple(f"encoder.{DEPTH * i // max(skipped, 1) + 1}" for i in range(skipped))
    tuned = pt.attach(made, DAS(skip=names), train_head=False)
    if skipped:
        prune(tuned, batch)
    return made.eval()


def forward(model: nn.Module, batch: dict[str, Any]) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            model(**batch)

    return run


def savings(backbone: str, counts: list[int], rows: int, seed: int, repeats: int) -> list[dict[str, Any]]:
    model, batch = BACKBONES[backbone](rows, seed)
    batch.pop("labels", None)
    models = {"bare": model.eval()} | {str(m): without(model, batch, m) for m in (0, *counts)}
    flops = {name: forward_flops(each, batch) for name, each in models.items()}
    times = common.interleaved({name: forward(each, batch) for name, each in models.items()}, repeats, warmup=1)
    found = []
    for m in counts:
        row: dict[str, Any] = {"backbone": backbone, "seed": seed, "rows": rows, "skipped": m}
        for base in ("0", "bare"):
            middle, low, high = common.ratio(times, str(m), base)
            share = flops[str(m)] / flops[base]
            row[f"over_{base}"] = {"time": middle, "quartiles": [low, high], "flops": share,
                                   "arrives": (1 - middle) / (1 - share) if share < 1 else None}  # fmt: skip
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--skip", default="2,4", help="comma-separated numbers of skipped blocks")
    parser.add_argument("--rows", type=int, default=1, help="of a batch")
    found = common.options(__doc__ or "", repeats=9, parents=[parser])
    counts = [int(m) for m in found.skip.split(",")]
    figures: dict[str, Any] = {
        "savings": [],
        "threads": found.threads,
        "repeats": found.repeats,
        "versions": common.versions(),
    }
    print(f"{found.threads} thread(s); {common.versions()}")
    print(f"{'backbone':9}{'skipped':>8}{'than':>14}{'time':>22}{'FLOPs':>8}{'saving that arrives':>21}")
    for backbone in BACKBONES:
        if found.only and backbone not in found.only.split(","):
            continue
        for seed in range(found.seeds):
            for row in savings(backbone, counts, found.rows, seed, found.repeats):
                figures["savings"].append(row)
                for base, name in (("0", "all adapted"), ("bare", "bare")):
                    part = row[f"over_{base}"]
                    low, high = part["quartiles"]
                    arrives = "" if part["arrives"] is None else f"{part['arrives']:20.0%}"
                    print(f"{backbone:9}{row['skipped']:8}{name:>14}{part['time']:8.3f} ({low:.3f}-{high:.3f}){part['flops']:8.3f}{arrives}",
                          flush=True)  # fmt: skip
    common.write(found.json, figures)


if __name__ == "__main__":
    main()
