"""MoS: from one pool, shards tell eight layers apart where sharing whole matrices does not, at a rank three times that of LoRA."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from common import Report, fit, options, spread
from torch import Tensor, nn

import petiole as pt

LAYERS, SIZE, BUDGET, RANK, INPUTS, STEPS, RATE = 8, 32, 2, 6, 512, 500, 0.02
METHODS = {
    "MoS": pt.MoS(equivalent_rank=BUDGET, rank=RANK, shards_per_vector=2, private_rank=1, alpha=RANK, dropout=0.0),
    "pure sharing": pt.MoS(equivalent_rank=BUDGET, subset_selection=False, alpha=BUDGET * LAYERS, dropout=0.0),
    "LoRA": pt.LoRA(rank=BUDGET, alpha=BUDGET),
}


class Layers(nn.Module):
    """x -> W_k x of every layer k: (L, n, SIZE)"""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"query": nn.Linear(SIZE, SIZE, bias=False)}) for _ in weights])
        for block, W in zip(self.blocks, weights, strict=True):
            block["query"].weight.data = W.clone()  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([block["query"](x) for block in self.blocks])  # type: ignore[index]


def main() -> None:
    given = options(__doc__)
    report = Report(
        "mos",
        "MoS",
        f"{LAYERS} layers of {SIZE} x {SIZE} must each change by a random matrix of rank 2 of its own, seen through {INPUTS} normal inputs: "
        f"Adam, learning rate {RATE}, {STEPS} steps, {BUDGET * LAYERS * 2 * SIZE:,} numbers train in each case. MoS has rank {RANK} from "
        "shards of half a vector, one private row per layer; pure sharing gives the whole pool to every layer; alpha is the rank. Left is "
        "the share of the first loss. LoRA of rank 2 can solve this exactly, so it is no rival here: its rank is.",
        ("seed", *(f"{name}: left" for name in METHODS), "MoS: rank of ΔW", "LoRA: rank of ΔW"),
    )
    left: dict[str, list[float]] = {name: [] for name in METHODS}
    ranks: dict[str, set[int]] = {"MoS": set(), "LoRA": set()}
    for seed in range(given.seeds):
        shown = {}
        for name, (share, found) in run(seed):
            left[name].append(share)
            if name in ranks:
                ranks[name] |= found
                shown[name] = ", ".join(map(str, sorted(found)))
        report.row(seed, *(values[-1] for values in left.values()), *shown.values())
    ratios = [a / b for a, b in zip(left["MoS"], left["pure sharing"], strict=True)]
    report.require(f"MoS leaves less than half of what pure sharing leaves: {spread(ratios)} of it", max(ratios) < 0.5)
    report.require(f"the rank of every ΔW is {RANK} with MoS and 2 with LoRA", ranks == {"MoS": {RANK}, "LoRA": {2}})
    report.finish(given, left)


def run(seed: int) -> Iterator[tuple[str, tuple[float, set[int]]]]:
    """Of each method, what it leaves and the numerical ranks of its changes."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(LAYERS, SIZE, SIZE, generator=generator) / SIZE**0.5
    change = torch.randn(LAYERS, SIZE, 2, generator=generator) @ torch.randn(LAYERS, 2, SIZE, generator=generator)
    x = torch.randn(INPUTS, SIZE, generator=generator)
    with torch.no_grad():
        y = Layers(weights + change / SIZE**0.5)(x)
    for name, method in METHODS.items():
        model = Layers(weights)
        found = pt.anatomy(model, stacks={"encoder": "blocks"}, roles={"q": "query"})
        tuned = pt.attach(model, method.model_copy(update={"roles": ("q",)}), seed=seed, found=found)
        assert tuned.trainable == BUDGET * LAYERS * 2 * SIZE
        share = fit(model, tuned.parameters(), x, y, RATE, STEPS)
        with torch.no_grad():
            changes = [slot.delta.weight(torch.zeros(SIZE, SIZE)) for slot in tuned.slots]
        yield name, (share, {int(torch.linalg.matrix_rank(c, rtol=1e-4)) for c in changes})


if __name__ == "__main__":
    main()
