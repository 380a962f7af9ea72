"""The unified view: a scaled adapter beside the ffn and MAM learn what a linear head and a small prefix do not."""

from __future__ import annotations

import bench
import torch
from common import Report, options, spread

import petiole as pt

NOTHING = {"form": "none"}
PREFIX = {"form": "prefix", "bottleneck": 4, "reparametrisation": "none"}
ADAPTER = {"form": "adapter", "bottleneck": 16, "scale": 4.0}
METHODS: dict[str, pt.Method] = {
    "head only": pt.LinearProbe(),
    "prefix": pt.UnifiedView(attention=PREFIX, ffn=NOTHING),
    "scaled adapter": pt.UnifiedView(attention=NOTHING, ffn=ADAPTER),
    "MAM": pt.MAM(length=4, bottleneck=16, scale=4.0),
}


def main() -> None:
    given = options(__doc__)
    report = Report(
        "unified-view",
        "Unified view and MAM",
        f"{bench.ABOUT} Prefixes of 4 in every attention, adapters of 16 with s = 4 beside every ffn, MAM has both. Then one adapter "
        "with the same weights before and after each ffn: how far the scores are apart, as a share of their size.",
        ("seed", *METHODS, "parallel or sequential"),
    )
    found: dict[str, list[float]] = {name: [] for name in [*METHODS, "apart"]}
    for seed in range(given.seeds):
        for name, method in METHODS.items():
            found[name].append(bench.run(method, seed).accuracy)
        found["apart"].append(apart(seed))
        report.row(seed, *(values[-1] for values in found.values()))
    head, prefix, adapter, mam, _ = found.values()
    report.require(f"the scaled adapter gets at least 0.75 right: {spread(adapter)}", min(adapter) >= 0.75)
    report.require(f"MAM at least 0.82: {spread(mam)}", min(mam) >= 0.82)
    more = [value - first for both in (adapter, mam) for value, first in zip(both, head, strict=True)]
    report.require(f"both at least 0.2 more than the head alone: {spread(more)}", min(more) >= 0.2)
    less = [value - first for value, first in zip(prefix, head, strict=True)]
    report.require(f"the prefix at most 0.02 less than the head alone: {spread(less)} more", min(less) >= -0.02)
    report.require(
        f"parallel and sequential differ by more than 0.01: {spread(found['apart'])}", min(found["apart"]) > 0.01
    )
    report.finish(given, found)


@torch.no_grad()
def apart(seed: int) -> float:
    """The relative difference that the insertion makes."""
    x, scores, weights = bench.samples(seed)[0][-bench.TEST :], [], []
    for insertion in ("parallel", "sequential"):
        model = bench.backbone(seed)
        site = {**ADAPTER, "insertion": insertion, "init": "bert"}
        tuned = pt.attach(model, pt.UnifiedView(attention=NOTHING, ffn=site), seed=seed)
        weights.append(tuned.named_tensors())
        scores.append(model(x))
    assert all(torch.equal(one, other) for one, other in zip(*(each.values() for each in weights), strict=True))
    return float((scores[1] - scores[0]).norm() / scores[0].norm())


if __name__ == "__main__":
    main()
