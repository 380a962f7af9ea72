"""A delta beside a stack: which states it is given, where it writes, and what the blocks around it see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petiole as pt
import tiny
import toys
from petiole.anatomy import Anatomy
from petiole.cache import Cache
from petiole.method import Place, StackDelta


class Sum(StackDelta):
    """c · Σ of the states that it reads; what it was given is kept for the test."""

    reads_calls = True

    def __init__(self, reads: tuple[int, ...] | None = None, **traits: Any) -> None:
        super().__init__()
        self.reads = reads
        for name, value in traits.items():
            setattr(self, name, value)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, states: list[Tensor], calls: list[Any], h: Tensor) -> Tensor:
        self.given = states, calls, h
        return self.gain * torch.stack(states).sum(0)


class Silent(Sum):
    def forward(self, states: list[Tensor], calls: list[Any], h: Tensor) -> None:  # type: ignore[override]
        super().forward(states, calls, h)


class Masking(Sum):
    """The blocks from its own on see no mask."""

    def late(self, block: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return (args[0], None, *args[2:]), kwargs


def beside(model: nn.Module, delta: Sum, depth: int = -1, side: Any = "output") -> pt.Adaptation:
    def places(anatomy: Anatomy) -> list[Place]:
        blocks = anatomy.stack().blocks
        return [Place(toys.whole_block(anatomy, blocks[depth].depth).at(side), delta)]

    return pt.attach(model, toys.method(places))


def hidden(model: nn.Module, batch: dict[str, Any]) -> list[Tensor]:
    """The stack's input and every block's output."""
    found: list[Tensor] = []
    blocks = [model.get_submodule(b.path) for b in pt.anatomy(model).stack().blocks]
    hooks = [blocks[0].register_forward_pre_hook(lambda m, args: found.append(args[0]))]
    hooks += [block.register_forward_hook(lambda m, args, output: found.append(output)) for block in blocks]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return found


def test_it_is_given_the_states_that_it_reads_and_the_calls() -> None:
    model, batch = toys.model("bert", num_hidden_layers=3), tiny.batch("bert")
    states, delta = hidden(model, batch), Sum((0, 2))
    beside(model, delta)
    model(**batch)
    given, calls, last = delta.given
    for one, number in zip(given, (0, 2), strict=True):
        assert torch.equal(one, states[number])
    assert torch.equal(last, states[3])
    assert len(calls) == 3
    assert all(call.args[0].numel() == 0 for call in calls), "a call holds a hidden state"
    with torch.no_grad():
        args, kwargs = calls[1].on(states[1])
        assert torch.equal(model.bert.encoder.layer[1].forward(*args, **kwargs), states[2])


def test_at_a_blocks_input_it_replaces_that() -> None:
    model, batch = toys.model("bert", num_hidden_layers=3), tiny.batch("bert")
    states, delta = hidden(model, batch), Sum()
    beside(model, delta, 2, "input")
    seen: list[Tensor] = []
    model.bert.encoder.layer[2].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model(**batch)
    torch.testing.assert_close(seen[0], states[0] + states[1] + states[2])
    assert Cache(model).cuts[0].skipped == 2


def test_none_changes_nothing() -> None:
    model, batch = toys.model("vit"), tiny.batch("vit")
    before = toys.output(model, batch)
    delta = Silent()
    beside(model, delta)
    assert torch.equal(toys.output(model, batch), before)
    assert len(delta.given[0]) == 3


def test_it_may_write_behind_the_final_norm() -> None:
    model, batch = toys.model("vit"), tiny.batch("vit")
    states, delta = hidden(model, batch), Sum(writes="stack")
    beside(model, delta)
    with torch.no_grad():
        found = model.vit(batch["pixel_values"]).last_hidden_state
    torch.testing.assert_close(found, states[0] + states[1] + states[2])
    with pt.disabled(model):
        torch.testing.assert_close(delta.given[2], model.vit.layernorm(states[2]))


@pytest.mark.parametrize("detaches", [False, True])
def test_it_may_leave_no_graph(detaches: bool) -> None:
    model, batch = toys.model("llama"), tiny.batch("llama")
    delta = Sum(detaches=detaches)
    beside(model, delta)
    model.enable_input_require_grads()
    entered: list[Tensor] = []
    model.model.layers[1].register_forward_hook(lambda m, args, output: entered.append(args[0]))
    model(**batch).loss.backward()
    assert all(h.requires_grad != detaches for h in (*delta.given[0], delta.given[2]))
    assert entered[0].requires_grad != detaches
    assert delta.gain.grad is not None


def test_late_blocks_may_be_given_something_else() -> None:
    model, batch = toys.model("bert", num_hidden_layers=3), tiny.batch("bert")
    beside(model, Masking((2,)), 2, "input")
    masks: list[Any] = []
    for block in model.bert.encoder.layer:
        block.register_forward_pre_hook(lambda m, args: masks.append(args[1]))
    model(**batch)
    assert [mask is None for mask in masks] == [False, False, True]
