"""The second epoch over the first, with the cache: a linear probe, a side network, LoRA on the top third; the same numbers as without.

A ViT of width 192 and 12 blocks over 64 images. One process, one thread; the first epoch computes and keeps, the second reads. FLOPs say what
time there is to save: below the first block that trains the forward pass goes, while the backward pass above it stays as it was.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import common
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import petiole as pt
from petiole.cache import Cache

METHODS = {
    "linear-probe": lambda blocks: pt.LinearProbe(),
    "lst": lambda blocks: pt.LST(
        side_layers=(1, 2, 3, 5, 6, 7, 9, 10, 11), init="magnitude"
    ),  # as in the paper, for 12 blocks
    "lora-top-third": lambda blocks: pt.LoRA(rank=8, layers=tuple(range(-blocks // 3, 0))),
}


def epoch(model: nn.Module, batch: dict[str, Any], optimizer: torch.optim.Optimizer, cache: Cache) -> float:
    """One pass over the images; the sum of its losses."""
    total = 0.0
    for part in torch.arange(64).split(16):
        with cache.rows(part):
            loss = model(**{k: v[part] for k, v in batch.items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()
    return total


def main() -> None:
    found = common.options(__doc__ or "", repeats=3)
    figures: dict[str, Any] = {"second_over_first": {}, "flops_second_over_first": {}, "largest_difference": {}}
    print(f"{found.threads} thread(s); {common.versions()}")
    for name, method in METHODS.items():
        ratios, differences = [], []
        flops: list[int] = []
        for seed in range(found.repeats):
            model, batch = common.vit(batch=64, seed=seed)
            pt.attach(model, method(12), seed=seed)
            model.train()
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.SGD(trained, lr=0.0)  # so that epochs can be compared
            cache = Cache(model)
            epoch(model, batch, optimizer, cache)  # warm
            cache.close()
            seconds, losses = [], []
            for _ in range(2):
                start = time.perf_counter()
                losses.append(epoch(model, batch, optimizer, cache))
                seconds.append(time.perf_counter() - start)
            ratios.append(seconds[1] / seconds[0])
            differences.append(abs(losses[1] - losses[0]))
            if seed == 0:  # counting takes time of its own, so it is done apart
                cache.close()
                for _ in range(2):
                    with FlopCounterMode(display=False) as counter:
                        epoch(model, batch, optimizer, cache)
                    flops.append(counter.get_total_flops())
        figures["second_over_first"][name] = statistics.median(ratios)
        figures["flops_second_over_first"][name] = flops[1] / flops[0]
        figures["largest_difference"][name] = max(differences)
        print(
            f"{name:20} second / first epoch: time {statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f}), "
            f"FLOPs {flops[1] / flops[0]:.3f}; {cache.summary()}",
            flush=True,
        )
    figures |= {"threads": found.threads, "repeats": found.repeats, "versions": common.versions()}
    common.write(found.json, figures)


if __name__ == "__main__":
    main()
