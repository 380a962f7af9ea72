"""Streams beside a model's own hidden state: deltas that stand around a module, and what they publish."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petiole as pt
import tiny
import toys
from petiole.anatomy import Anatomy
from petiole.errors import AttachError
from petiole.method import AroundDelta, Base, Place


class Scaled(AroundDelta):
    """A second stream through a block, which starts at g h: it is published, and the first goes on."""

    def __init__(self, place: int, gain: float = 1.5) -> None:
        super().__init__()
        self.place, self.start = place, gain
        self.gain = nn.Parameter(torch.empty(()))

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        self.gain.fill_(self.start)

    def enter(self, h: Tensor) -> Tensor:
        return torch.cat([h, self.gain * h])

    def leave(self, y: Tensor, h: Tensor) -> Tensor:
        own, other = y.split(len(h))
        self.host.streams.publish(self.place, {"scaled": other})
        return own


def around(*depths: int, **parts: Any) -> pt.Method:
    def places(anatomy: Anatomy) -> list[Place]:
        return [Place(toys.whole_block(anatomy, depth), Scaled(depth)) for depth in depths]

    return toys.method(places, **parts)


def attached(*depths: int) -> tuple[nn.Module, pt.Adaptation, dict[str, Any]]:
    model = toys.model("vit")
    return model, pt.attach(model, around(*depths)), tiny.batch("vit")


def states(model: nn.Module, batch: dict[str, Any]) -> list[Tensor]:
    """The input of every block and the output of the last one."""
    found = model(**batch, output_hidden_states=True).hidden_states
    return list(found)


def test_each_stream_is_what_the_module_makes_of_it() -> None:
    bare, batch = toys.model("vit"), tiny.batch("vit")
    with torch.no_grad():
        plain = states(bare, batch)
        wanted = [bare.vit.layers[depth](1.5 * plain[depth]) for depth in (0, 1)]
    model, _, batch = attached(0, 1)
    with torch.no_grad():
        for mine, theirs in zip(states(model, batch)[1:], plain[1:], strict=True):
            torch.testing.assert_close(mine, theirs)
        found = pt.streams(model)
    assert list(found) == ["scaled"]
    for depth, state in found["scaled"].items():
        torch.testing.assert_close(state, wanted[depth])
    assert list(found["scaled"]) == [0, 1]
    assert pt.streams(model) == {}  # handed over


def test_streams_belong_to_the_last_forward_pass() -> None:
    model, tuned, batch = attached(1)
    model(**batch)
    with tuned.disabled():
        model(**batch)
    assert pt.streams(model) == {}
    assert pt.streams(tiny.model("vit")) == {}


def test_threads_keep_their_own() -> None:
    model, *_ = attached(1)
    batches = [tiny.batch("vit", seed=seed) for seed in range(4)]
    found: dict[int, Tensor] = {}

    def run(seed: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                model(**batches[seed])
                found[seed] = pt.streams(model)["scaled"][1]

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        with torch.no_grad():
            model(**batches[seed])
        assert torch.equal(found[seed], pt.streams(model)["scaled"][1])


def test_a_copy_is_made_while_streams_wait() -> None:
    model, _, batch = attached(1)
    model.train()(**batch)
    twin = copy.deepcopy(model)
    assert pt.streams(twin) == {} and len(pt.streams(model)["scaled"]) == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_keeps_their_gradients(reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        model, tuned, batch = attached(0, 1)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.train()
        output = model(**batch)
        own = pt.streams(model)["scaled"]
        (output.loss + sum(state.square().mean() for state in own.values())).backward()
        found.append([p.grad.clone() for p in tuned.parameters()])
        assert pt.streams(model) == {} and not tuned.host.holding()
    assert all(bool(g.abs().max() > 0) for g in found[0])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("first", [True, False])
def test_other_changes_at_the_module_are_inside(first: bool) -> None:
    """A change of a block's output reaches every stream, whatever was attached first."""

    def places(anatomy: Anatomy) -> list[Place]:
        site = toys.whole_block(anatomy, 1)
        both = [Place(site, Scaled(1)), Place(site, toys.Affine(site.size))]
        return both if first else both[::-1]

    model, batch = toys.model("vit"), tiny.batch("vit")
    tuned = pt.attach(model, toys.method(places))
    affine = next(slot.delta for slot in tuned.slots if isinstance(slot.delta, toys.Affine))
    bare = toys.model("vit")
    with torch.no_grad():
        h = states(bare, batch)[1]
        wanted = [affine.composed(bare.vit.layers[1](part)) for part in (h, 1.5 * h)]
        shared = states(model, batch)[-1]
    torch.testing.assert_close(shared, wanted[0])
    torch.testing.assert_close(pt.streams(model)["scaled"][1], wanted[1])


def test_compiled_code_publishes_too() -> None:
    torch._dynamo.reset()
    model, _, batch = attached(0, 1)
    with torch.no_grad():
        model(**batch)
        wanted = pt.streams(model)["scaled"]
        torch.compile(model, backend="eager", fullgraph=True)(**batch)
    for depth, state in pt.streams(model)["scaled"].items():
        torch.testing.assert_close(state, wanted[depth])
    torch._dynamo.reset()


def test_whoever_looks_at_a_module_sees_what_the_model_sees() -> None:
    """Transformers hangs its hooks for `output_hidden_states` on a model in its first pass, which may be before attaching."""
    model, batch = toys.model("vit"), tiny.batch("vit")
    states(model, batch)
    tuned = pt.attach(model, [around(1), toys.method(lambda a: [Place(toys.whole_block(a, 0), toys.Affine(32))])])
    with torch.no_grad():
        found = states(model, batch)
        fresh = toys.model("vit")
        pt.attach(fresh, [around(1), toys.method(lambda a: [Place(toys.whole_block(a, 0), toys.Affine(32))])])
        for one, other in zip(found, states(fresh, batch), strict=True):
            assert torch.equal(one, other)
    tuned.detach()


def test_refusals() -> None:
    model, _, batch = attached(1)
    with pytest.raises(AttachError, match="every row"), pt.route(model, ["default", None]):
        model(**batch)
    torch_encoder = tiny.model("torch_encoder", batch_first=False)
    with pytest.raises(AttachError, match="batch_first"):
        pt.attach(torch_encoder, around(1))
    with pytest.raises(AttachError, match="not one module"):
        pt.attach(tiny.model("gpt2"), toys.method(lambda a: [Place(site, Scaled(0)) for site in a.sites(["q"])]))
