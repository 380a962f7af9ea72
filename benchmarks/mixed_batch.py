"""Inference with another LoRA (rank 8 on q and v) for each of 32 rows, over the bare backbone; PEFT's `adapter_names` beside it.

Encoder of width 512 and 6 layers; 32 tokens a row, and 2 tokens a row as in decoding. Interleaved in one process; only ratios count.
"""

from __future__ import annotations

import copy
from typing import Any

import common
import peft
import torch
from torch import nn

import petiole as pt

ROWS = 32


def routed(model: nn.Module, batch: dict[str, Any], names: list[str]) -> Any:
    def run() -> None:
        with torch.no_grad(), pt.route(model, names):
            model(**batch)

    return run


def plain(model: nn.Module, batch: dict[str, Any], **extra: Any) -> Any:
    def run() -> None:
        with torch.no_grad():
            model(**batch, **extra)

    return run


def fill(model: nn.Module, seed: int) -> None:
    """Give every B values, as after training."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(".B") or "lora_B" in name:
            parameter.data.normal_(0, 0.02, generator=generator)


def main() -> None:
    found = common.options(__doc__ or "", repeats=15)
    figures: dict[str, Any] = {"over_backbone": {}, "peft_over_backbone": {}}
    print(f"{found.threads} thread(s); {common.versions('peft')}")
    print(f"{'tokens':>7}{'adaptations':>13}{'petiole / backbone':>28}{'PEFT / backbone':>28}")
    for length in (32, 2):
        for count in (1, 2, 4, 8, 16, 32):
            bare, batch = common.bert(batch=ROWS, length=length)
            batch.pop("labels")
            bare.eval()
            ours, theirs = copy.deepcopy(bare), copy.deepcopy(bare)
            names = [f"a{i}" for i in range(count)]
            for i, name in enumerate(names):
                pt.attach(ours, pt.LoRA(rank=8, roles=("q", "v")), name=name, seed=i, train_head=False)
            config = peft.LoraConfig(r=8, target_modules=["query", "value"])
            theirs = peft.get_peft_model(theirs, config, adapter_name=names[0])
            for name in names[1:]:
                theirs.add_adapter(name, config)
            for model in (ours, theirs):
                fill(model, 0)
                model.eval()
            rows = [names[i % count] for i in range(ROWS)]
            runs = {
                "backbone": plain(bare, batch),
                "petiole": routed(ours, batch, rows),
                "peft": plain(theirs, batch, adapter_names=rows),
            }
            times = common.interleaved(runs, found.repeats * (1 if length > 2 else 4))
            line = f"{length:7}{count:13}"
            for name, key in (("petiole", "over_backbone"), ("peft", "peft_over_backbone")):
                middle, low, high = common.ratio(times, name, "backbone")
                figures[key].setdefault(str(length), {})[str(count)] = middle
                line += f"{middle:12.3f} ({low:.3f}-{high:.3f})"
            print(line, flush=True)
    figures |= {"threads": found.threads, "repeats": found.repeats, "rows": ROWS, "versions": common.versions("peft")}
    common.write(found.json, figures)


if __name__ == "__main__":
    main()
