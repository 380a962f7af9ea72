"""Rerankers of another language: the language module of the documents against that of the training data, adapters and masks.

.venv/bin/python proofs/pe_reranking.py
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import Report, options, spread, step
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

import petiole as pt
from petiole.method import Method
from petiole.methods.sparse.entries import SparseChange
from petiole.tasks.masked_lm import Masking
from petiole.tasks.retrieval import PointwiseLoss, compose, language_module, ranking_metrics, ranking_module, under
from petiole.tasks.retrieval.languages import written
from petiole.tasks.tokens import Pad
from petiole.tasks.toy_languages import MASK, PAD, SPECIAL, Ranking, ToyLanguages
from petiole.training import Events, parameter_groups

CONCEPTS, TOPICS = 200, 20
PRETRAINING = {"a": 0.94, "b": 0.06}
BORROWED = 0.1, 0.5  # share of the words in texts of b that are of a: in pre-training, and where b is learned
STEPS, LANGUAGE_STEPS, RANKING_STEPS, BATCH = 700, 350, 200, 64
QUERIES, DOCUMENTS = 50, 20
RATES = {"pretraining": 3e-3, "adapter": 2e-3, "mask": 3e-3}
SIZES: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128, "max_position_embeddings": 24,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": PAD,
}  # fmt: skip
MODULES: dict[str, tuple[Method, Method]] = {
    "adapter": (language_module(), ranking_module(reduction_factor=4)),
    "mask": (language_module("mask", density=0.05, l1_weight=0.0), ranking_module("mask", density=0.05)),
}
ABOUT = (
    f"Two generated languages of {CONCEPTS} concepts in {TOPICS} topics; b has words of its own, says everything backwards, and borrows words from "
    f"a. A BERT (4 blocks of width 64) learns to guess hidden words, {STEPS} steps in which 6 % of the sentences are of b, with every tenth word "
    f"borrowed. A language module learns from its language alone ({LANGUAGE_STEPS} steps; half of the words of b borrowed), a ranking module from "
    f"pairs in a, above the module of a ({RANKING_STEPS} steps; all batches of {BATCH}). Then queries in a rank documents in b, without a borrowed "
    f"word: {QUERIES} queries with {DOCUMENTS} documents each, of which 3 are relevant. Masks have 5 % of the entries. Shares of the languages and "
    "learning rates were set on the first seed, the margins stay as planned."
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def masking(toy: ToyLanguages, seed: int) -> Masking:
    return Masking(
        Pad({"input_ids": PAD}), mask_token=MASK, vocabulary=toy.vocabulary, special=range(len(SPECIAL)), seed=seed
    )


def sentences(toy: ToyLanguages, count: int, language: Any, generator: torch.Generator, borrowed: float) -> Tensor:
    """Of a language; b borrows from a, and a from nobody."""
    return toy.sentences(count, language, generator, borrowed=borrowed if language == "b" else 0.0)


def pretrained(toy: ToyLanguages, seed: int) -> BertForMaskedLM:
    """Mostly of language a."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertForMaskedLM(BertConfig(vocab_size=toy.vocabulary, **SIZES)).train()
    generator, hide = seeded(seed), masking(toy, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATES["pretraining"], weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATES["pretraining"], STEPS)
    counts = {language: round(share * BATCH) for language, share in PRETRAINING.items()}
    for _ in range(STEPS):
        words = torch.cat(
            [sentences(toy, count, language, generator, BORROWED[0]) for language, count in counts.items()]
        )
        ids, labels = hide.hide(words)
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def train(model: nn.Module, rate: float, steps: int, loss_of: Any) -> None:
    """AdamW with a rate that falls to 0, and the events of what is attached."""
    optimizer = torch.optim.AdamW(parameter_groups(model, learning_rate=rate, weight_decay=0.01))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / steps)
    events = Events(model, optimizer, schedule, total_steps=steps)
    model.train()
    events.begin()
    for _ in range(steps):
        step(events, optimizer, loss_of)
        schedule.step()
    model.eval()


def language_file(base: BertForMaskedLM, toy: ToyLanguages, language: Any, kind: str, seed: int, folder: Path) -> Path:
    """A language module, learned by guessing hidden words, as a file."""
    model, generator, hide = copy.deepcopy(base), seeded(100 + seed), masking(toy, 100 + seed)
    tuned = pt.attach(model, MODULES[kind][0], seed=seed)

    def loss() -> Tensor:
        ids, labels = hide.hide(sentences(toy, BATCH, language, generator, BORROWED[1]))
        return model(input_ids=ids, labels=labels).loss

    train(model, RATES[kind], LANGUAGE_STEPS, loss)
    assert kind == "adapter" or exact(tuned), "the mask of a language"
    return tuned.save(folder / f"{language}-{kind}.petiole.safetensors")


def ranker(base: BertForMaskedLM, files: dict[str, Path], toy: ToyLanguages, kind: str, seed: int) -> Any:
    """A cross-encoder with both languages, whose ranking module learned from a alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertForSequenceClassification(BertConfig(vocab_size=toy.vocabulary, num_labels=1, **SIZES))
    model.bert.load_state_dict(base.bert.state_dict(), strict=False)
    for language, path in files.items():
        pt.load(model, path, name=language, allow_other_backbone=True)
    pt.attach(model, MODULES[kind][1], name="rank", seed=seed)
    under(model, "rank", language="a")
    generator = seeded(200 + seed)

    def loss() -> Tensor:
        batch = toy.ranking(BATCH // 2, 2, generator, share=0.5)
        logits = model(batch.input_ids.flatten(0, 1), token_type_ids=batch.token_type_ids.flatten(0, 1)).logits
        return PointwiseLoss()(logits, batch.relevant.flatten())

    train(model, RATES[kind], RANKING_STEPS, loss)
    return model


def judged(test: Ranking) -> dict[str, dict[str, int]]:
    return {str(q): {str(d): int(r) for d, r in enumerate(row)} for q, row in enumerate(test.relevant.tolist())}


@torch.no_grad()
def measured(model: Any, test: Ranking) -> dict[str, float]:
    """MAP, by all relevant documents and by those found; here all are ranked, so they are the same."""
    ids, types = test.input_ids.flatten(0, 1), test.token_type_ids.flatten(0, 1)
    scores = model(ids, token_type_ids=types).logits.view(test.relevant.shape)
    run = {str(q): {str(d): s for d, s in enumerate(row)} for q, row in enumerate(scores.tolist())}
    return ranking_metrics(("map", "map_reference"), run, judged(test))


def at_random(test: Ranking, seed: int) -> float:
    """The mean of ten orders."""
    found = []
    for draw in range(10):
        scores = torch.rand(test.relevant.shape, generator=seeded(1000 * seed + draw)).tolist()
        run = {str(q): {str(d): s for d, s in enumerate(row)} for q, row in enumerate(scores)}
        found.append(ranking_metrics(("map",), run, judged(test))["map"])
    return statistics.mean(found)


def weights(model: nn.Module) -> dict[str, bytes]:
    return {n: p.detach().numpy().tobytes() for n, p in model.named_parameters() if "petiole" not in n}


def one_seed(seed: int) -> dict[str, Any]:
    toy = ToyLanguages(CONCEPTS, TOPICS, seed)
    base = pretrained(toy, seed)
    test = toy.ranking(QUERIES, DOCUMENTS, seeded(300 + seed), "a", "b")
    home = toy.ranking(QUERIES, DOCUMENTS, seeded(300 + seed), "a", "a")
    found: dict[str, Any] = {"random": at_random(test, seed)}
    with tempfile.TemporaryDirectory() as name:
        for kind in MODULES:
            files = {language: language_file(base, toy, language, kind, seed, Path(name)) for language in ("a", "b")}
            model = ranker(base, files, toy, kind, seed)
            start = weights(model)
            third = {"adapter": "split", "mask": "both"}[kind]
            for label, chosen in (
                ("b", {"doc_lang": "b"}),
                ("a", {"doc_lang": "a"}),
                (third, {"query_lang": "a", "doc_lang": "b", "mode": third}),
                ("none", {}),
            ):
                with compose(model, "rank", **chosen):
                    found[kind, label] = measured(model, test)
            with compose(model, "rank", doc_lang="a"):
                found[kind, "home"] = measured(model, home)
            found[kind, "restored"] = weights(model) == start
            if kind == "mask":
                found["exact"] = exact(pt.adaptations(model)["rank"])
    return found


def exact(tuned: pt.Adaptation) -> bool:
    """Whether a mask has as many entries as asked for, and not a bit outside of it differs while it is part of the weights."""
    masks = [
        (slot.site, kind, each)
        for slot in tuned.slots
        if isinstance(slot.delta, SparseChange)
        for kind, each in slot.delta.entries()
    ]
    names = [f"{site.path}.{site.parameter if kind == 'weight' else site.bias}" for site, kind, _ in masks]
    before = weights(tuned.model)
    with written([tuned]):
        now = weights(tuned.model)
    for name, (_, _, each) in zip(names, masks, strict=True):
        differs = [torch.frombuffer(bytearray(values[name]), dtype=torch.int32) for values in (before, now)]
        outside = torch.ones(each.shape.numel(), dtype=torch.bool).index_fill(0, each.chosen()[0], False)
        if not torch.equal(differs[0][outside], differs[1][outside]):
            return False
    (method,) = tuned.methods
    assert isinstance(method, pt.LTSFT)
    same = all(now[name] == before[name] for name in before.keys() - set(names))
    return same and sum(len(each.chosen()[0]) for *_, each in masks) == method.wanted(
        sum(each.shape.numel() for *_, each in masks)
    )


def main() -> None:
    given = options(__doc__ or "")
    runs = [one_seed(seed) for seed in range(given.seeds)]
    report = Report(
        "pe-reranking",
        "Ranking across languages",
        ABOUT,
        ("modules", "language that acts", "MAP", "over seeds"),
    )

    def found(key: Any) -> list[float]:
        return [run[key]["map"] if isinstance(run[key], dict) else run[key] for run in runs]

    report.row("none", "at random", statistics.mean(found("random")), spread(found("random")))
    labels = {"b": "b, of the documents", "a": "a, of the training data", "home": "a, and documents in a"}
    for kind in MODULES:
        for label in ("b", "a", {"adapter": "split", "mask": "both"}[kind], "none", "home"):
            report.row(
                f"{kind}s",
                labels.get(label, label),
                statistics.mean(found((kind, label))),
                spread(found((kind, label))),
            )
        b, a, chance = (statistics.mean(found(key)) for key in ((kind, "b"), (kind, "a"), "random"))
        least = min(one - other for one, other in zip(found((kind, "b")), found((kind, "a")), strict=True))
        report.require(
            f"{kind}s: MAP with the documents' language {b:.3f} against {a:.3f} with the training language's, by 0.03 or more "
            f"(by {least:.3f} or more in each seed)",
            b >= a + 0.03,
        )
        report.require(f"{kind}s: it is 0.2 or more above chance, {chance:.3f}", b >= chance + 0.2)
        report.require(
            f"{kind}s: leaving a composition gives the backbone back bit for bit",
            all(run[kind, "restored"] for run in runs),
        )
    report.require(
        "masks: exactly 5 % of the entries, and not a bit differs outside of them",
        all(run["exact"] for run in runs),
    )
    report.finish(given, {"per seed": [{str(k): v for k, v in run.items()} for run in runs]})


if __name__ == "__main__":
    main()
