"""What prompts cost, and two ways to pay less for them: DePT beside prompt tuning, APT beside deep prompts.

First a step, forward and backward, of DePT over that of prompt tuning with as many parameters, by the length l of the prompt; DePT keeps
40 tokens of every 100 and has an update of the embeddings for the rest. Then the multiply-adds that APT and as many deep prompts add to a
forward pass of an encoder of ViLT's size, and their steps over one another and over LoRA's. Everything runs in one process, interleaved;
only ratios count. `--plot` draws the first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import common
import torch
from torch import nn

import petiole as pt
from petiole.cost import predict, saved_bytes

LENGTHS, INPUT = (20, 60, 100, 200), 128
PROMPTS = (64, 128, 200)
PUBLISHED = {"APT": 0.91, "deep prompts": 5.14}  # GFLOPs of the paper's table for ViLT, 200 prompts
VILT = {"tokens": 245, "width": 768, "layers": 12}

BACKBONES: dict[str, Callable[[int], Any]] = {
    "bert": lambda seed: common.bert(width=256, batch=4, length=INPUT, seed=seed),
    "llama": lambda seed: common.llama(width=256, batch=4, length=INPUT, seed=seed),
}
ENCODERS: dict[str, Callable[[int], Any]] = {
    "bert, 32 tokens": lambda seed: common.bert(width=256, batch=16, length=32, seed=seed),
    "vit, 197 tokens": lambda seed: common.vit(layers=6, batch=4, seed=seed),
}


def step(model: nn.Module, batch: dict[str, Any]) -> Callable[[], None]:
    def run() -> None:
        model(**batch).loss.backward()
        model.zero_grad(set_to_none=True)

    return run


def attached(bare: nn.Module, methods: Mapping[str, pt.Method]) -> dict[str, nn.Module]:
    """A copy of the model for each method, without a trained head."""
    models = {}
    for name, method in methods.items():
        models[name] = copy.deepcopy(bare)
        pt.attach(models[name], method, train_head=False)
        models[name].train()
    return models


def shorter_prompts(backbone: str, seed: int, repeats: int) -> list[dict[str, Any]]:
    """DePT over prompt tuning, by the length of the prompt."""
    bare, batch = BACKBONES[backbone](seed)
    methods: dict[str, pt.Method] = {}
    for l in LENGTHS:
        methods[f"prompt {l}"] = pt.PromptTuning(length=l)
        methods[f"dept {l}"] = pt.DePT(length=2 * l // 5, budget=l, max_length=INPUT)
    models = attached(bare, methods)
    saved = {name: saved_bytes(model, batch) for name, model in models.items()}
    trainable = {name: pt.adaptations(model)["default"].trainable for name, model in models.items()}
    times = common.interleaved({name: step(model, batch) for name, model in models.items()}, repeats)
    rows = []
    for l in LENGTHS:
        middle, low, high = common.ratio(times, f"dept {l}", f"prompt {l}")
        delta = pt.adaptations(models[f"dept {l}"])["default"].slots[0].delta
        rows.append({"length": l, "shorter": delta.length, "rank": delta.A.shape[1], "time": middle, "quartiles": [low, high],
                     "saved": saved[f"dept {l}"] / saved[f"prompt {l}"],
                     "trainable": [trainable[f"dept {l}"], trainable[f"prompt {l}"]]})  # fmt: skip
    return rows


def added_work() -> dict[str, float]:
    """10⁹ multiply-adds that 200 prompts add to a forward pass of one row, on the meta device: text tokens stand for ViLT's of both kinds."""
    with torch.device("meta"):
        bare, batch = common.bert(VILT["width"], VILT["layers"], 1, VILT["tokens"])
    models = attached(bare, {"APT": pt.APT(), "deep prompts": pt.VisualPromptTuning(length=200)})
    plain = predict(bare, batch).forward_flops
    return {name: (predict(model, batch).forward_flops - plain) / 2e9 for name, model in models.items()}


def beside_attention(encoder: str, seed: int, repeats: int) -> list[dict[str, Any]]:
    """APT over deep prompts and over LoRA."""
    bare, batch = ENCODERS[encoder](seed)
    methods: dict[str, pt.Method] = {"lora": pt.LoRA(rank=8, roles=("q", "v"))}
    for m in PROMPTS:
        methods |= {f"apt {m}": pt.APT(length=m), f"deep {m}": pt.VisualPromptTuning(length=m)}
    models = attached(bare, methods)
    times = common.interleaved({name: step(model, batch) for name, model in models.items()}, repeats)
    rows = []
    for m in PROMPTS:
        middle, low, high = common.ratio(times, f"apt {m}", f"deep {m}")
        over_lora = {kind: common.ratio(times, f"{kind} {m}", "lora")[0] for kind in ("apt", "deep")}
        rows.append({"prompts": m, "over_deep": middle, "quartiles": [low, high], "over_lora": over_lora})
    return rows


def draw(figures: Mapping[str, list[dict[str, Any]]], path: Path) -> None:
    title = f"DePT with 2 of 5 tokens, inputs of {INPUT} tokens"
    below = "tokens of the prompt that has as many parameters"
    with common.curves(path, title, below, "DePT / prompt tuning", legend="lower left") as axes:
        for place, (name, rows) in enumerate(figures.items()):
            x, y = [row["length"] + 2 * place for row in rows], [row["time"] for row in rows]  # bars side by side
            bars = common.bars(rows, "time")
            line = axes.errorbar(x, y, yerr=bars, marker="o", capsize=2, label=f"{name}: time of a step")
            kept, style = [row["saved"] for row in rows], {"marker": "s", "markersize": 4, "color": line[0].get_color()}
            axes.plot(x, kept, "--", **style, label=f"{name}: bytes for backward")
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set_ylim(0.4, 1.2)
        axes.set_xticks(LENGTHS)


def main() -> None:
    found = common.options(__doc__ or "", repeats=9, parents=[common.plotting()])
    asked = [name for name in found.only.split(",") if name]
    figures: dict[str, Any] = {"dept": {}, "apt": {}, "threads": found.threads, "seeds": found.seeds,
                               "repeats": found.repeats, "versions": common.versions()}  # fmt: skip
    print(f"{found.threads} thread(s); {common.versions()}")
    print(f"\n{'DePT':18}{'l':>5}{'m, r':>10}{'time / prompt tuning':>26}{'kept for backward':>20}")
    for name in BACKBONES:
        for seed in range(found.seeds if not asked or name in asked else 0):
            rows = figures["dept"][f"{name}/{seed}"] = shorter_prompts(name, seed, found.repeats)
            for row in rows:
                low, high = row["quartiles"]
                print(f"{name:18}{row['length']:5}{row['shorter']:5}, {row['rank']:3}{row['time']:12.3f} ({low:.3f}-{high:.3f})"
                      f"{row['saved']:20.3f}", flush=True)  # fmt: skip
    work = figures["added_gmacs"] = added_work()
    print(
        f"\n200 prompts on an encoder of {VILT['layers']} x {VILT['width']}, {VILT['tokens']} tokens: 10^9 multiply-adds more (published)"
    )
    print("; ".join(f"{name} {value:.2f} ({PUBLISHED[name]})" for name, value in work.items()))
    print(f"\n{'APT':18}{'m':>5}{'time / deep prompts':>26}{'time / LoRA':>14}{'deep / LoRA':>14}")
    for name in ENCODERS:
        for seed in range(found.seeds if not asked or name in asked else 0):
            rows = figures["apt"][f"{name}/{seed}"] = beside_attention(name, seed, found.repeats)
            for row in rows:
                low, high = row["quartiles"]
                print(f"{name:18}{row['prompts']:5}{row['over_deep']:12.3f} ({low:.3f}-{high:.3f}){row['over_lora']['apt']:14.3f}"
                      f"{row['over_lora']['deep']:14.3f}", flush=True)  # fmt: skip
    common.write(found.json, figures)
    if found.plot is not None:
        draw({name: figures["dept"][f"{name}/0"] for name in BACKBONES if f"{name}/0" in figures["dept"]}, found.plot)


if __name__ == "__main__":
    main()
