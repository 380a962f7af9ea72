"""What an attention computed, handed to deltas that act after it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import petiole as pt
import tiny
from petiole.errors import AttachError
from petiole.method import Attended, AttendedDelta, Base, Place


class Seen(AttendedDelta):
    """Adds a number, and remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.amount = nn.Parameter(torch.empty(()))
        self.attended: list[Attended] = []

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        self.amount.zero_()

    def forward(self, attended: Attended, h: Tensor) -> Tensor:
        self.attended.append(attended)
        return self.amount.expand_as(h)


class Watcher(pt.Method):
    """After every attention."""

    slug: ClassVar[str] = ""
    read_elsewhere: bool = False

    def deltas(self, anatomy: pt.Anatomy) -> Iterator[Place]:
        for site in anatomy.attentions():
            block = anatomy.stack(site.stack).blocks[site.depth].sites[0]
            yield Place(site.at("output"), Seen(), read=block if self.read_elsewhere else site)


def watched(name: str, **changes: Any) -> tuple[nn.Module, list[Seen]]:
    model = tiny.model(name, **changes)
    return model, [slot.delta for slot in pt.attach(model, Watcher(), train_head=False).slots]


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5", "bart"])
def test_probabilities_are_those_of_the_model(name: str) -> None:
    eager = tiny.model(name, attn_implementation="eager").eval()
    batch = tiny.batch(name)
    shown = eager(**batch, output_attentions=True)
    parts = (
        ("attentions",)
        if name in ("bert", "llama", "gpt2")
        else ("encoder_attentions", "decoder_attentions", "cross_attentions")
    )
    expected = [p for part in parts for p in shown[part]]
    model, deltas = watched(name)
    model(**batch)
    found = [delta.attended[0].probabilities for delta in deltas]
    assert len(found) == len(expected)
    for one in expected:
        assert any(one.shape == other.shape and torch.allclose(one, other, atol=1e-5) for other in found)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_values_weighed_by_them_are_the_heads(name: str) -> None:
    """And heads that share their values have a copy each."""
    model, deltas = watched(name)
    heads: list[Tensor] = []
    path = pt.anatomy(model).sites(["o"])[0].path
    hook = model.get_submodule(path).register_forward_pre_hook(lambda module, args: heads.append(args[0]))
    model(**tiny.batch(name))
    hook.remove()
    seen = deltas[0].attended[0]
    assert seen.query.shape[1] == seen.value.shape[1] == seen.probabilities.shape[1]
    torch.testing.assert_close(
        (seen.probabilities @ seen.value).transpose(1, 2).flatten(2), heads[0], rtol=1e-5, atol=1e-6
    )


def test_it_acts_on_the_rows_that_are_its_own() -> None:
    model = tiny.model("bert")
    (first, *_), other = (
        [slot.delta for slot in pt.attach(model, Watcher(), name=name, train_head=False).slots]
        for name in ("one", "two")
    )
    batch = tiny.batch("bert")
    with pt.route(model, ["two", "one"]):
        model(**batch)
    assert first.attended[0].probabilities.shape[0] == 1 and other[0].attended[0].probabilities.shape[0] == 1
    assert not torch.equal(first.attended[0].probabilities, other[0].attended[0].probabilities)


def test_an_attention_has_to_be_read_and_to_show_something() -> None:
    with pytest.raises(AttachError, match="has to read an attention"):
        pt.attach(tiny.model("bert"), Watcher(read_elsewhere=True))
    with pytest.raises(AttachError, match="needs attention probabilities"):
        pt.attach(tiny.model("torch_encoder"), Watcher())
