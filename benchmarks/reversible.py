"""Reversible execution against ordinary training: bytes kept for backward by depth, time of a step, error of gradients without anchors.

BERT of width 256, 8 x 128 tokens, float32. Bytes are over full fine-tuning at the same depth, times over LoRA (rank 8 on all linears) at
12 blocks, interleaved; errors are the worst of an adapter's gradient, relative to its largest entry, against autograd on the same two
streams. `--plot` draws the bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor, nn

import petiole as pt
from petiole.cost import predict, saved_bytes

DEPTHS = (2, 4, 8, 12, 24)
LORA = pt.LoRA(rank=8, roles=common.LINEARS)
CANDIDATES: dict[str, pt.Method] = {
    "full": pt.FullFineTuning(),
    "lora": LORA,
    "checkpointed lora": LORA,
    **{f"meft{v}": pt.MEFT(variant=v) for v in (1, 2, 3)},
    **{f"meft{v}, no anchors": pt.MEFT(variant=v, anchor_every=None) for v in (1, 2, 3)},
}


def ready(name: str, layers: int, seed: int, **changes: Any) -> tuple[nn.Module, dict[str, Tensor], pt.Adaptation]:
    model, batch = common.bert(width=256, layers=layers, seed=seed)
    tuned = pt.attach(model, CANDIDATES[name].model_copy(update=changes), seed=seed)
    if name.startswith("checkpointed"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train(), batch, tuned


def step(name: str, seed: int) -> Callable[[], None]:
    model, batch, tuned = ready(name, 12, seed)
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=0.0)

    def run() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def error(variant: int, layers: int, seed: int, every: Any) -> float:
    """Of gradients: the worst, relative to the largest entry of each."""
    found = []
    for changes in ({"anchor_every": every}, {"num_reversible": 0}):
        model, batch, tuned = ready(f"meft{variant}", layers, seed, **changes)
        model(**batch).loss.backward()
        found.append([p.grad for s in tuned.slots if s.number >= 0 for p in s.delta.parameters()])
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*found, strict=True))  # type: ignore[operator,union-attr]


def draw(saved: dict[str, list[int]], path: Path) -> None:
    with common.curves(path, "BERT of width 256, 8 x 128 tokens", "blocks", "MB kept for backward") as axes:
        for name, values in saved.items():
            if name in ("full", "lora", "checkpointed lora", "meft1", "meft3", "meft1, no anchors"):
                axes.plot(DEPTHS, [value / 1e6 for value in values], marker="o", label=name)
        axes.set_yscale("log")


def main() -> None:
    found = common.options(__doc__ or "", repeats=7, parents=[common.plotting()])
    print(f"{found.threads} thread(s); {common.versions()}")

    saved = {name: [] for name in CANDIDATES}  # type: dict[str, list[int]]
    print(f"\nMB kept for backward; over full fine-tuning\n{'':20}" + "".join(f"{f'L = {n}':>18}" for n in DEPTHS))
    for name in CANDIDATES:
        for layers in DEPTHS:
            model, batch, _ = ready(name, layers, 0)
            saved[name].append(saved_bytes(model, batch))
        cells = (f"{a / 1e6:9.2f} ({a / b:6.4f})" for a, b in zip(saved[name], saved["full"], strict=True))
        print(f"{name:20}" + "".join(f"{cell:>18}" for cell in cells), flush=True)

    lines = [name for name in CANDIDATES if name != "full"]
    flops = {name: predict(*ready(name, 12, 0)[:2]).step_flops for name in lines}
    times = common.interleaved({name: step(name, 0) for name in lines}, found.repeats)
    ratios = {name: common.ratio(times, name, "lora") for name in lines}
    print("\ntime of a step over LoRA's (quartiles), and its FLOPs over LoRA's")
    for name, (middle, low, high) in ratios.items():
        print(f"{name:20}{middle:8.3f} ({low:.3f}-{high:.3f}){flops[name] / flops['lora']:9.3f}", flush=True)

    errors: dict[str, list[float]] = {}
    print(f"\nworst relative error of a gradient\n{'':20}" + "".join(f"{f'L = {n}':>12}" for n in DEPTHS))
    for variant in (1, 2, 3):
        for label, every in ((f"meft{variant}", "auto"), (f"meft{variant}, no anchors", None)):
            errors[label] = [error(variant, layers, 0, every) for layers in DEPTHS]
            print(f"{label:20}" + "".join(f"{e:12.1e}" for e in errors[label]), flush=True)

    figures = {
        "depths": DEPTHS, "saved_bytes": saved, "time_over_lora": ratios, "flops_over_lora": {n: f / flops["lora"] for n, f in flops.items()},
        "gradient_error": errors, "threads": found.threads, "repeats": found.repeats, "versions": common.versions(),
    }  # fmt: skip
    common.write(found.json, figures)
    if found.plot is not None:
        draw(saved, found.plot)


if __name__ == "__main__":
    main()
