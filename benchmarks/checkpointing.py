"""Time against memory as more and more blocks are recomputed: LoRA (rank 8, all linears), from none to all.

Everything runs in one process, interleaved; times are ratios to the step that recomputes nothing. `--plot` draws the curve.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
from lora_step import ROLES, roles_of
from torch import nn

import petiole as pt
from petiole.cost import measure
from petiole.recompute import fit, kept_bytes, recomputed

DEPTHS: dict[str, Callable[..., Any]] = {
    "bert": lambda seed: common.bert(layers=12, width=256, seed=seed),
    "llama": lambda seed: common.llama(layers=12, width=256, seed=seed),
    "vit": lambda seed: common.vit(batch=16, seed=seed),
}


def step(model: nn.Module, batch: dict[str, Any], blocks: tuple[str, ...]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)

    def run() -> None:
        with recomputed(model, blocks):
            model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def curve(backbone: str, seed: int, repeats: int) -> list[dict[str, Any]]:
    model, batch = DEPTHS[backbone](seed)
    pt.attach(model, pt.LoRA(rank=8, roles=tuple(roles_of(model, ROLES["all"]))), train_head=False)
    model.train()
    every = tuple(path for path, kept in kept_bytes(model, batch).items() if kept)
    counts = sorted({round(len(every) * share / 4) for share in range(5)} | {1, len(every) // 3, 2 * len(every) // 3})
    peaks = {}
    for count in counts:
        with recomputed(model, every[:count]):
            peaks[count] = measure(model, batch, torch.optim.AdamW, repeats=1, warmup=0).peak_bytes
    times = common.interleaved({str(n): step(model, batch, every[:n]) for n in counts}, repeats)
    rows = []
    for count in counts:
        chosen = fit(model, batch, round(1.02 * peaks[count]))  # what is found on shapes may be a little more
        middle, low, high = common.ratio(times, str(count), "0")
        rows.append({"recomputed": count, "blocks": len(every), "peak_bytes": peaks[count], "peak_over_plain": peaks[count] / peaks[0],
                     "time_over_plain": middle, "quartiles": [low, high], "predicted_peak_bytes": chosen.peak_bytes,
                     "flops_over_plain": chosen.step_flops / chosen.plain_flops})  # fmt: skip
    return rows


def draw(figures: dict[str, Any], path: Path) -> None:
    title, over = "LoRA on all linears: blocks recomputed, of 12", "of a step / nothing recomputed"
    with common.curves(path, title, f"peak bytes {over}", f"time {over}") as axes:
        for name, rows in figures["curve"].items():
            x, y = [row["peak_over_plain"] for row in rows], [row["time_over_plain"] for row in rows]
            axes.errorbar(x, y, yerr=common.bars(rows, "time_over_plain"), marker="o", capsize=2, label=name)
            for row, a, b in zip(rows, x, y, strict=True):
                axes.annotate(str(row["recomputed"]), (a, b), textcoords="offset points", xytext=(5, 5), fontsize=8)


def main() -> None:
    found = common.options(__doc__ or "", repeats=7, parents=[common.plotting()])
    figures: dict[str, Any] = {
        "curve": {},
        "threads": found.threads,
        "repeats": found.repeats,
        "versions": common.versions(),
    }
    print(f"{found.threads} thread(s); {common.versions()}")
    print(f"{'backbone':9}{'recomputed':>11}{'peak':>12}{'peak / plain':>14}{'time / plain':>24}{'FLOPs / plain':>15}")
    for backbone in DEPTHS:
        if found.only and backbone not in found.only.split(","):
            continue
        figures["curve"][backbone] = rows = curve(backbone, 0, found.repeats)
        for row in rows:
            low, high = row["quartiles"]
            print(f"{backbone:9}{row['recomputed']:6} of {row['blocks']:2}{row['peak_bytes'] / 1e6:9.1f} MB{row['peak_over_plain']:14.3f}"
                  f"{row['time_over_plain']:10.3f} ({low:.3f}-{high:.3f}){row['flops_over_plain']:15.3f}", flush=True)  # fmt: skip
    common.write(found.json, figures)
    if found.plot is not None:
        draw(figures, found.plot)


if __name__ == "__main__":
    main()
