"""The adapter family: every method at its own default and at LoRA's budget; PEFT's LoRA, (IA)³ and norm tuning in the same table.

MiniLM on TREC-6, SST-2, MR, SUBJ and as a reranker on Cranfield (nDCG@10 of the first 20 of BM25), a small spectrogram transformer on spoken
digits of speakers that it never heard (5 clips of each digit of each). `--report` writes docs/adapters.md from what was run. The `adapters`
library wants Transformers 4.57 and does not install beside the current one; PEFT has no bottleneck adapters, so its nearest stand in.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import family
from family import EQUAL, OWN, Entry, Setting, own, peer, reduced, within
from torch import nn

import petiole as pt
from petiole.errors import PetioleError
from petiole.method import find, registry
from petiole.tasks import Task, load_data, prepare
from petiole.tasks.spoken_digits import spoken_digits

PAGE = Path(__file__).resolve().parents[1] / "docs" / "adapters.md"
PEERS = ("PEFT LoRA", "PEFT IA3", "PEFT LN tuning")
SIZED = ("houlsby", "pfeiffer", "parallel-adapter", "scaled-parallel-adapter", "mam", "iaa", "vl-pet")
FACTORS = {
    "compacter": "reduction_factor",
    "vl-adapter": "reduction_factor",
    "p-adapter": "reduction_factor",
    "petl-ast": "reduction_factor",
    "task-adapter": "reduction_factor",
}
LEFT_OUT = {
    "hyperformer": "its networks weigh more than the budget whatever the bottleneck",
    "adapterfusion, scalearn": "they combine adapters of other tasks; see scalearn's proof",
    "polyhistor": "for several dense tasks; see its proof",
}


def settings(data: Path, output: Path) -> list[Setting]:
    text, rows = data / "text", {"train": 4000, "validation": 200, "test": 500}
    short: dict[str, Any] = {"rates": "trec6", "precision": "bf16", "options": {"max_length": 40}}
    return [
        Setting("trec6", "MiniLM, TREC-6", "petiole:minilm", str(text / "trec6"), 100, rows, precision="bf16", confirms=True),
        *(Setting(name, f"MiniLM, {title}", "petiole:minilm", str(text / name), 60, rows, **short)
          for name, title in (("sst2", "SST-2"), ("mr", "MR"), ("subj", "SUBJ"))),
        Setting("audio", "AST, spoken digits", "", "", 100, precision="bf16", make=lambda: listening(data, output)),
        Setting("cranfield", "MiniLM, Cranfield", "petiole:minilm", "", 100, batch_size=8, rates="trec6", precision="bf16",
                make=lambda: reranking(data)),
    ]  # fmt: skip


def reranking(data: Path) -> Task:
    rows = load_data(data / "retrieval" / "cranfield", task="reranking", validation_fraction=0.1, test_fraction=0.2)
    return prepare(rows, "petiole:minilm", max_length=64, negatives=1, top_k=20)


def listening(data: Path, output: Path) -> Task:
    folder, rows = spoken_digits(data / "audio" / "fsdd", output)
    return prepare(rows, folder)


def rows_of(setting: Setting) -> Iterator[Entry]:
    """The rows of a setting; reranking, which takes longest, has those at their own defaults."""
    for entry in entries(setting.task.empty_model()):
        if setting.name != "cranfield" or entry.budget == OWN:
            yield entry


def entries(model: nn.Module) -> Iterator[Entry]:
    """All rows that have a place on a backbone; `model` is on the meta device."""
    import peft

    budget = family.trained(model, pt.LoRA())
    yield own(pt.FullFineTuning())
    yield own(pt.LoRA())
    yield own(pt.PrefixTuning())  # a part of MAM
    for slug in (*SIZED, *FACTORS, "hyperformer"):
        if slug not in registry():
            continue
        method = find(slug)()
        try:
            family.trained(model, method)
        except PetioleError as error:
            print(f"{slug} left out: {' '.join(str(error).split())[:140]}", flush=True)
            continue
        yield own(method)
        if slug == "hyperformer":
            continue
        equal = within(model, method, budget) if slug in SIZED else reduced(model, method, FACTORS[slug], budget)
        if equal is not None and equal != method:
            yield own(equal, budget=EQUAL)

    def lora(sites: list[str], heads: list[str]) -> Any:
        return peft.LoraConfig(r=8, lora_alpha=16, target_modules=sites, modules_to_save=heads)

    def ia3(sites: list[str], heads: list[str]) -> Any:
        down = [site for site in sites if "output.dense" in site]
        return peft.IA3Config(target_modules=sites, feedforward_modules=down, modules_to_save=heads)

    def norms(sites: list[str], heads: list[str]) -> Any:
        return peft.LNTuningConfig(target_modules=sites, modules_to_save=heads)

    yield peer("PEFT LoRA", OWN, lora, (3e-4, 3e-2), ("q", "v"), "r=8")
    yield peer("PEFT IA3", OWN, ia3, (1e-3, 1e-1), ("k", "v", "down"), "k, v, down")
    yield peer("PEFT LN tuning", OWN, norms, (3e-4, 3e-2), ("norm",), "all norms")


if __name__ == "__main__":
    asked = family.options(__doc__ or "")
    family.main(
        asked, settings(asked.data, asked.output), rows_of, lambda found: family.report(found, asked, PAGE, PEERS)
    )
