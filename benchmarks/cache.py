"""The second epoch over the first, with the cache: a linear probe, and LoRA on the top third; the same numbers as without.

A ViT of width 192 and 12 blocks over 64 images. One process, one thread; the first epoch computes and keeps, the second reads.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import common
import torch

import petiole as pt
from petiole.cache import Cache

METHODS = {
    "linear-probe": lambda blocks: pt.LinearProbe(),
    "lora-top-third": lambda blocks: pt.LoRA(rank=8, layers=tuple(range(-blocks // 3, 0))),
}


def main() -> None:
    found = common.options(__doc__ or "", repeats=3)
    figures: dict[str, Any] = {"second_over_first": {}, "largest_difference": {}}
    print(f"{found.threads} thread(s); {common.versions()}")
    for name, method in METHODS.items():
        ratios, differences = [], []
        for seed in range(found.repeats):
            model, batch = common.vit(batch=64, seed=seed)
            pt.attach(model, method(12), seed=seed)
            model.train()
            cache = Cache(model)
            optimizer = torch.optim.SGD(
                [p for p in model.parameters() if p.requires_grad], lr=0.0
            )  # so that epochs can be compared
            seconds, losses = [], []
            for _ in range(3):
                start, total = time.perf_counter(), 0.0
                for part in torch.arange(64).split(16):
                    with cache.rows(part):
                        loss = model(**{k: v[part] for k, v in batch.items()}).loss
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    total += loss.item()
                seconds.append(time.perf_counter() - start)
                losses.append(total)
            ratios.append(seconds[1] / seconds[0])
            differences.append(abs(losses[1] - losses[0]))
        figures["second_over_first"][name] = statistics.median(ratios)
        figures["largest_difference"][name] = max(differences)
        print(
            f"{name:20} second / first epoch {statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f}); {cache.summary()}"
        )
    figures |= {"threads": found.threads, "repeats": found.repeats, "versions": common.versions()}
    common.write(found.json, figures)


if __name__ == "__main__":
    main()
