"""The low-rank family: every method at its own default and at LoRA's budget, PEFT's LoRA, DoRA and VeRA in the same table.

MiniLM on TREC-6 and CLINC150 (100 and 10 examples a class), the shipped ViT on digits. `--report` writes docs/lowrank.md from what was run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import family
from family import EQUAL, OWN, Entry, Setting, own, peer, within
from torch import nn

import petiole as pt
from petiole.method import find

ROLES = ("q", "v")
LEFT_OUT = {
    "mtlora": "its streams are for several dense tasks; see its proof",
    "petalface": "it steers by a quality of each image; see its proof and the face task",
    "ia3": "its size is fixed: 0.07 % at its own default",
    "svfit": "one value a singular direction: with all of them it trains less than the budget",
}


def settings(data: Path) -> list[Setting]:
    text = data / "text"
    rows = {"validation": 300, "test": 600}
    return [
        Setting("digits", "ViT, digits", "petiole:vit-cifar10", "sklearn:digits", 80),
        Setting("trec6", "MiniLM, TREC-6", "petiole:minilm", str(text / "trec6"), 120),
        Setting("clinc-10", "MiniLM, CLINC150, 10 a class", "petiole:minilm", str(text / "clinc150"), 150, {"train": 1500, **rows},
                rates="trec6", climbs=True, precision="bf16"),
        Setting("clinc-100", "MiniLM, CLINC150, 100 a class", "petiole:minilm", str(text / "clinc150"), 150, rows,
                rates="clinc-10", precision="bf16"),
    ]  # fmt: skip


def growing(slug: str, rank: int) -> Any:
    """A method that grows to an average rank on q and v, in a run of so many steps."""

    def make(steps: int) -> pt.Method:
        early, every = steps // 10, max(1, steps // 40)
        return find(slug)(target_rank=rank, warmup_steps=early, update_interval=every, roles=ROLES)

    return make


def entries(model: nn.Module) -> Iterator[Entry]:
    """All rows; `model` is on the meta device."""
    import peft

    budget = family.trained(model, pt.LoRA())
    for slug in ("lora", "dora", "ia3", "svfit", "slora", "nlora", "inttune", "nola", "mos", "mola", "pego"):
        if slug not in pt.method.registry():
            continue
        method = find(slug)()
        sizes = [(OWN, method)]
        if slug != "lora" and slug not in LEFT_OUT:  # on the sites of LoRA's default, too
            equal = within(model, find(slug)(roles=ROLES), budget)
            sizes += [(EQUAL, equal)] if equal is not None else []  # with its experts, MoLA is above it even at rank 1
        for kind, sized in sizes:
            fast = sized.model_copy(update={"cache_basis": "always"}) if slug == "nola" else sized
            yield replace(own(fast, budget=kind), about=own(sized).about, lean=own(sized).put)
    for slug, rank in (("increlora", 8), ("triadaptlora", 8)):
        if slug in pt.method.registry():
            yield replace(own(growing(slug, rank), budget=EQUAL), about=f"target_rank={rank}, on q and v")
            yield replace(own(growing(slug, 2), budget="rank 2 on average"), about="target_rank=2, on q and v")

    def lora(rank: int, **more: Any) -> Any:
        return lambda sites, heads: peft.LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=sites, modules_to_save=heads, **more
        )

    yield peer("PEFT LoRA", OWN, lora(8), (3e-4, 3e-2), ROLES, "r=8")
    yield peer("PEFT DoRA", OWN, lora(8, use_dora=True), (3e-4, 3e-2), ROLES, "r=8")
    yield peer("PEFT DoRA", EQUAL, lora(7, use_dora=True), (3e-4, 3e-2), ROLES, "r=7")
    yield peer(
        "PEFT VeRA",
        OWN,
        lambda sites, heads: peft.VeraConfig(r=256, target_modules=sites, modules_to_save=heads),
        (1e-3, 1e-1),
        ROLES,
        "r=256",
    )


PAGE = Path(__file__).resolve().parents[1] / "docs" / "lowrank.md"
PEERS = ("PEFT LoRA", "PEFT DoRA", "PEFT VeRA")


if __name__ == "__main__":
    asked = family.options(__doc__ or "")
    family.side_by_side(asked, settings(asked.data), entries, PAGE, PEERS)
