"""Masks, invertible and stacked adapters against the official modules: layouts "sparse_masks", "invertible_adapter", "stacked_adapters"."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import linears
import petiole as pt
from linears import Case, set_
from petiole.attach import HEAD
from petiole.methods.adapters.madx import NICE, Stacked
from petiole.methods.sparse.entries import SparseChange
from petiole.methods.sparse.selection import from_steps, largest, to_steps
from petiole.tasks.retrieval import compose

TOLERANCE = 1e-5
TENSORS = ("emb.weight", "lin.weight", "lin.bias")


class Block(nn.Module):
    """What petiole takes for a block; its linear is the one of the case."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.query = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.query(x)


class Ranker(nn.Module):
    """The tensors of a case in a model: a table, a linear (of the first of two blocks; the second is left out) and a head."""

    def __init__(self, vocabulary: int, size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, size)
        self.blocks = nn.ModuleList([Block(size), Block(size)])
        self.classifier = nn.Linear(size, 1)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.classifier(self.blocks[0](self.embedding(input_ids)).mean(1))

    def own(self, name: str) -> Tensor:
        """A tensor by the case's name."""
        module = {"emb": self.embedding, "lin": self.blocks[0].query, "head": self.classifier}[name.split(".")[0]]
        return module.get_parameter(name.split(".")[1])


def masked(model: Ranker, name: str, case: Case, candidates: str, k: int, head: bool) -> pt.Adaptation:
    """An adaptation with the k largest of a case's differences, as the method chooses them."""
    found = pt.anatomy(model, stacks={"encoder": "blocks"}, roles={"q": "query", "head": "classifier"})
    method = pt.LTSFT(k=k, maskable=("embeddings", "weights", "biases"), layers=(0,), first_phase=None)
    tuned = pt.attach(model, method, name=name, train_head=head, found=found)
    tensors = {}
    for slot in tuned.slots:
        if isinstance(slot.delta, SparseChange):
            for kind, entries in slot.delta.entries():
                tensors[f"{'emb' if slot.site.path == 'embedding' else 'lin'}.{kind}"] = entries
    assert set(tensors) == set(TENSORS)
    wanted = {own: case[f"in.{candidates}.{own}"] for own in TENSORS}
    for own, entries in tensors.items():
        set_(entries.parameter, wanted[own])
    method.choose(list(tensors.values()), 1)
    for own, entries in tensors.items():
        index, _ = entries.chosen()
        entries.mask(index, wanted[own].flatten()[index])  # as trained in the second phase
    return tuned


def sparse_masks(case: Case) -> None:
    k, size = case.option("k"), case.option("d")
    model = Ranker(case.option("vocab"), size)
    for own in (*TENSORS, "head.weight", "head.bias"):
        set_(model.own(own), case[f"param.base.{own}"])
    language = masked(model, "language", case, "lang_delta", k, head=False)
    rank = masked(model, "rank", case, "rank_delta", k, head=True)
    head = next(slot.delta.module for slot in rank.slots if slot.number == HEAD)
    set_(head.weight, case["in.rank_head.weight"])
    set_(head.bias, case["in.rank_head.bias"])

    differences = [case[f"in.lang_delta.{own}"] for own in TENSORS]
    smallest = min(
        float(d.flatten()[i].abs().min()) for d, i in zip(differences, largest(differences, k), strict=True) if len(i)
    )
    assert smallest == pytest.approx(case.option("lang_threshold"))
    entries = {}
    for slot in language.slots:
        for kind, each in slot.delta.entries():
            entries[f"{'emb' if slot.site.path == 'embedding' else 'lin'}.{kind}"] = each
    for own, each in entries.items():
        index, values = each.chosen()
        mask = torch.zeros(each.shape, dtype=torch.uint8).flatten().index_fill(0, index, 1).view(each.shape)
        case.same(f"out.lang_mask.{own}", mask, 0)
        steps, ordered = to_steps(index, values, each.shape)
        case.same(f"out.lang_index_steps.{own}", steps, 0)
        case.same(f"out.lang_values.{own}", ordered, TOLERANCE)
        again, same = from_steps(steps, ordered, each.shape)
        assert torch.equal(again, index) and torch.equal(same, values)

    for language_name, out in ((None, "rank_only"), ("language", "composed")):
        with compose(model, "rank", doc_lang=language_name):
            for own in TENSORS:
                case.same(f"out.{out}.{own}", model.own(own), TOLERANCE)
        case.same(f"out.{out}.head.weight", head.weight, TOLERANCE)
        case.same(f"out.{out}.head.bias", head.bias, TOLERANCE)
    for own in TENSORS:
        assert torch.equal(model.own(own), case[f"param.base.{own}"])


def invertible_adapter(case: Case) -> None:
    nice, x = NICE(case.option("d"), case.option("inv_reduction_factor"), case.option("act")), case["in.x"]
    for name, parameter in nice.named_parameters():
        set_(parameter, case[f"param.{name}"])
    y = x + nice(x)
    case.same("out.y", y, TOLERANCE)
    torch.testing.assert_close(nice.inverse(y), x, rtol=1e-5, atol=1e-5)


def stacked_adapters(case: Case) -> None:
    size, act = case.option("d"), case.option("act")
    norm = nn.LayerNorm(size, eps=case.option("ln_eps"))
    v = case["in.ffn_out"] + case["in.sublayer_input"]
    for which in ("ln", "la", "ra"):
        if which == "ln":
            module: nn.Module = norm
        else:
            module = Stacked("norm", size, case.option(f"{which}_bottleneck"), activation=act)
            module.host = SimpleNamespace(module=lambda path: norm, given=lambda name, default=None: default)
        for name, parameter in module.named_parameters():
            set_(parameter, case[f"param.{which}.{name}"])
        if which != "ln":
            v = v + module(case["in.ffn_out"], v)
    case.same("out.y", norm(v), TOLERANCE)


LAYOUTS = {
    "sparse_masks": sparse_masks,
    "invertible_adapter": invertible_adapter,
    "stacked_adapters": stacked_adapters,
}


@pytest.mark.parametrize("path", linears.cases("pe-reranking"))
def test_reference(path: Path) -> None:
    with Case(path, "pe-reranking") as case:
        LAYOUTS[case.kind](case)
