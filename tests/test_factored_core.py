"""Factors with a core between them, of which the core alone may train: same numbers as the plain way, and x is not kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petiole as pt
import tiny
import toys
from petiole import factored
from petiole.anatomy import Site
from petiole.cost import saved_bytes
from petiole.errors import AttachError
from petiole.factored import Parts
from petiole.method import Base
from petiole.methods.lowrank.factors import Product

RANK = 3


class Cored(Product):
    """ΔW = 2 B C A, C a matrix or a diagonal; A and B frozen if asked."""

    core: nn.Parameter

    def __init__(self, site: Site, diagonal: bool, frozen: bool) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(RANK, site.in_features), requires_grad=not frozen)
        self.B = nn.Parameter(torch.empty(site.out_features, RANK), requires_grad=not frozen)
        self.core = nn.Parameter(torch.empty(RANK) if diagonal else torch.empty(RANK, RANK))
        self.shift = nn.Parameter(torch.empty(site.out_features)) if site.bias else None

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        for parameter in self.parameters():
            parameter.normal_(0, 0.3, generator=generator)

    def parts(self) -> Parts:
        return self.A, self.B, 2.0, self.shift, self.core


def adapted(name: str, diagonal: bool, frozen: bool, seed: int = 0) -> tuple[nn.Module, dict[str, Any], pt.Adaptation]:
    model, batch = tiny.model(name), tiny.batch(name)
    method = toys.method(toys.on(["q", "v"], lambda site: Cored(site, diagonal, frozen)), merges=True)
    return model, batch, pt.attach(model, method, train_head=False, seed=seed)


def gradients(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_fast_and_plain_agree(name: str, diagonal: bool, frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, tuned = adapted(name, diagonal, frozen)
    calls: list[int] = []
    real = factored.add
    monkeypatch.setattr(factored, "add", lambda *a: calls.append(1) or real(*a))
    loss, fast = gradients(model, batch)
    assert calls, "the fast path was not taken"
    monkeypatch.setattr(factored, "plain", lambda module: False)
    plain_loss, plain = gradients(model, batch)
    assert torch.allclose(loss, plain_loss, rtol=1e-5)
    assert fast.keys() == plain.keys() and len(fast) == 4 * ((1 if frozen else 3) + (name != "llama"))
    for key, gradient in plain.items():
        assert (fast[key] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, key
    assert tuned.merge(check=batch) < 1e-5


@pytest.mark.parametrize("name", ["bert", "swin"])  # of which the second has windows, several for each row
def test_each_row_of_the_batch_has_a_core_of_its_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fast, plain, and each row alone with its own diagonal, with gradients of everything."""
    model, batch, tuned = adapted(name, True, frozen=False)
    cores = torch.rand(tiny.BATCH, 1, RANK, generator=torch.Generator().manual_seed(1))
    for slot in tuned.slots:
        slot.delta.core = nn.Parameter(cores.clone())
    fast_output = toys.output(model, batch)
    loss, fast = gradients(model, batch)
    with monkeypatch.context() as patched:
        patched.setattr(factored, "plain", lambda module: False)
        plain_loss, plain = gradients(model, batch)
    torch.testing.assert_close(loss, plain_loss)
    assert fast.keys() == plain.keys() and any(n.endswith("core") for n in fast)
    for key, gradient in plain.items():
        assert (fast[key] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, key
    for i in range(tiny.BATCH):
        for slot in tuned.slots:
            slot.delta.core = nn.Parameter(cores[i, 0])
        torch.testing.assert_close(toys.output(model, batch)[i], fast_output[i], rtol=1e-4, atol=1e-5)


def test_rows_that_do_not_divide_into_those_of_the_batch_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the number of all tokens would divide."""
    model, batch, tuned = adapted("bert", True, frozen=False)
    for slot in tuned.slots:
        slot.delta.core = nn.Parameter(torch.ones(tiny.LENGTH, 1, RANK))
    for way in (lambda module: False, factored.plain):
        monkeypatch.setattr(factored, "plain", way)
        with pytest.raises(AttachError, match="2 rows, which is no multiple of the 7"):
            toys.output(model, batch)


@pytest.mark.parametrize("diagonal", [True, False])
def test_rows_take_other_cores(diagonal: bool) -> None:
    model, batch, _ = adapted("bert", diagonal, frozen=True)
    method = toys.method(toys.on(["q", "v"], lambda site: Cored(site, not diagonal, True)))
    pt.attach(model, method, name="second", train_head=False, seed=5)
    alone = {}
    for name in ("default", "second"):
        with pt.route(model, name):
            alone[name] = toys.output(model, batch)
    with pt.route(model, ["second", "default"]):
        mixed = toys.output(model, batch)
    assert torch.allclose(mixed[0], alone["second"][0], atol=1e-6)
    assert torch.allclose(mixed[1], alone["default"][1], atol=1e-6)


def test_what_a_frozen_A_reads_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor computed again: it is not needed. With everything else kept, x is what makes the difference."""
    monkeypatch.setattr(factored, "possible", lambda *a, **k: False)
    trained = saved_bytes(*adapted("bert", False, frozen=False)[:2])
    frozen = saved_bytes(*adapted("bert", False, frozen=True)[:2])
    batch = tiny.batch("bert")["input_ids"]
    assert trained - frozen >= 2 * batch.numel() * 32 * 4  # at least the input of q and v in both blocks, once each


def test_rows_are_gathered_anew_when_computed_factors_change() -> None:
    """Factors that are computed for each pass may get the memory, and so the id, of those that died with the last one."""
    x, y, index, kept = torch.randn(2, 3, 4), torch.zeros(2, 3, 5), torch.tensor([0, 0]), {}
    for value in range(50):
        factor = factored.Factor(torch.full((1, 4), float(value)), torch.ones(5, 1), 1.0)
        with torch.no_grad():
            found = factored.add_by_row(x, y, [factor], index, kept)
        del factor
        assert torch.allclose(found, value * x.sum(-1, keepdim=True).expand_as(y), atol=1e-4), value
