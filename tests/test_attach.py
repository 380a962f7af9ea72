"""Deltas on every kind of site do what their formula says, leave nothing behind, and are refused where they can't act.

Values are compared with a copy of the model in which the change was made by hand.
"""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petiole as pt
import tiny
import toys
from petiole.anatomy import Anatomy, Site
from petiole.attach import host_of
from petiole.cost import count
from petiole.errors import AttachError, ConfigError, PetioleError
from petiole.method import Base, Composition, Delta, HiddenDelta, Method, Moment, Place, TokenDelta
from toys import Affine, Dense, Gated, Halved, Mixture, Renewed, Times, on, output, shake


def close(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@contextmanager
def refused(model: nn.Module, *words: str, error: type[PetioleError] = AttachError) -> Iterator[None]:
    """The block raises an error of at most three lines that says these words, and the model is as it was."""
    before = toys.snapshot(model)
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert len(message.splitlines()) <= 3, message
    for word in words:
        assert word in message, (word, message)
    assert toys.snapshot(model) == before


# ---------------------------------------------------------------------------------------------------------------------- weights


def q_of_gpt_neox(weight: Tensor, part: int, change: Tensor) -> None:
    """The fused tensor goes through the heads: q, k and v of the first, q, k and v of the second, … (4 heads of 8)."""
    weight.view(4, 3, 8, -1)[:, part] += change.view(4, 8, -1)


def by_hand(name: str, edit: Callable[[Tensor, Any], None], bias: Callable[[Tensor, Any], None] | None = None) -> Any:
    """Make the change of the delta at depth 1 in the named weight of a copy."""
    return name, edit, bias


def whole(weight: Tensor, delta: Any) -> None:
    weight += delta.change


WEIGHTS: dict[str, tuple[str, str, Any]] = {
    "linear": ("bert", "up", by_hand("bert.encoder.layer.1.intermediate.dense", whole, lambda b, d: b.add_(d.shift))),
    "stored (in, out)": ("gpt2", "up", by_hand("transformer.h.1.mlp.c_fc", lambda w, d: w.add_(d.change.T), lambda b, d: b.add_(d.shift))),
    "v of a fused tensor stored (in, out)": (
        "gpt2",
        "v",
        by_hand("transformer.h.1.attn.c_attn", lambda w, d: w[:, 64:].add_(d.change.T), lambda b, d: b[64:].add_(d.shift)),
    ),
    "k of a fused tensor that goes head by head": (
        "gpt_neox",
        "k",
        by_hand(
            "gpt_neox.layers.1.attention.query_key_value",
            lambda w, d: q_of_gpt_neox(w, 1, d.change),
            lambda b, d: q_of_gpt_neox(b, 1, d.shift),
        ),
    ),
    "in_proj_weight": (
        "torch_encoder",
        "k",
        by_hand("layers.1.self_attn", lambda w, d: w[32:64].add_(d.change), lambda b, d: b[32:64].add_(d.shift)),
    ),
    "out_proj, which is never called": (
        "torch_encoder",
        "o",
        by_hand("layers.1.self_attn.out_proj", whole, lambda b, d: b.add_(d.shift)),
    ),
    "position embedding": ("bert", "position_embedding", by_hand("bert.embeddings.position_embeddings", lambda w, d: w.add_(d.change.T))),
}  # fmt: skip


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_weight_delta_is_that_change_of_the_weight(kind: str) -> None:
    family, role, (name, edit, edit_bias) = WEIGHTS[kind]
    model, batch = toys.model(family), tiny.batch(family)
    hand = copy.deepcopy(model)
    layers = None if "embedding" in role else [1]
    pt.attach(model, toys.method(on([role], Dense, layers=layers)), train_head=False)
    delta = pt.adaptations(model)["default"].slots[0].delta
    with torch.no_grad():
        module = hand.get_submodule(name)
        weight = module.in_proj_weight if hasattr(module, "in_proj_weight") else module.weight
        bias = module.in_proj_bias if hasattr(module, "in_proj_bias") else getattr(module, "bias", None)
        edit(weight, delta)
        if edit_bias is not None:
            edit_bias(bias, delta)
    close(output(model, batch), output(hand, batch))
    with pt.disabled(model):
        assert not torch.allclose(output(model, batch), output(hand, batch), atol=1e-3)


def test_each_packed_expert_gets_its_own_change() -> None:
    model, batch = toys.model("mixtral"), tiny.batch("mixtral")
    hand = copy.deepcopy(model)
    tuned = pt.attach(model, toys.method(on(["gate", "up", "down"], Dense)))
    assert {slot.site.expert for slot in tuned.slots} == {0, 1, 2, 3}
    with torch.no_grad():
        for slot in tuned.slots:
            experts = hand.model.layers[slot.site.depth].mlp.experts
            if slot.site.role == "down":
                experts.down_proj[slot.site.expert] += slot.delta.change
            else:
                half = experts.gate_up_proj[slot.site.expert].chunk(2)[slot.site.role == "up"]
                half += slot.delta.change
    close(output(model, batch), output(hand, batch))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
def test_a_convolution_pads_the_change_as_it_pads_itself(mode: str) -> None:
    """The change was computed with zeros around the image whatever the module put there."""
    model, batch = toys.model("resnet"), tiny.batch("resnet")
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1:
            module.padding_mode = mode
            module._reversed_padding_repeated_twice = [n for n in reversed(module.padding) for _ in (0, 1)]
    hand = copy.deepcopy(model)

    def places(anatomy: Anatomy) -> list[Place]:
        return [Place(s, Dense(s)) for s in anatomy.sites(["conv"])]

    tuned = pt.attach(model, toys.method(places), train_head=False)
    with torch.no_grad():
        for slot in tuned.slots:
            hand.get_submodule(slot.site.path).weight.add_(slot.delta.change)
    close(output(model, batch), output(hand, batch))


class Convolved(nn.Module):
    """Two blocks over a sequence, with a depthwise convolution in each."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv1d(8, 8, 3, padding=2, dilation=2, groups=4), nn.ReLU()) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_grouped_dilated_convolution_over_a_sequence() -> None:
    model, batch = Convolved(), {"x": torch.randn(2, 8, 9)}
    hand = copy.deepcopy(model)

    tuned = pt.attach(model, toys.method(on(["conv"], Dense)))
    assert tuned.slots[0].delta.change.shape == (8, 2, 3)
    with torch.no_grad():
        for slot in tuned.slots:
            module = hand.get_submodule(slot.site.path)
            module.weight.add_(slot.delta.change)
            module.bias.add_(slot.delta.shift)
    close(output(model, batch), output(hand, batch))


@pytest.mark.parametrize(
    "family, fields", [("gemma", {"tie_word_embeddings": False}), ("bart", {"scale_embedding": True})]
)
def test_an_embedding_that_scales_its_rows_scales_the_change_too(family: str, fields: dict[str, Any]) -> None:
    """The change was added unscaled, but merged into a weight that is scaled."""
    model, batch = toys.model(family, **fields), tiny.batch(family)
    path = "model.encoder.embed_tokens" if family == "bart" else "model.embed_tokens"
    embedding = model.get_submodule(path)
    embedding.weight = nn.Parameter(embedding.weight.detach().clone())  # untied
    hand = copy.deepcopy(model)
    tuned = pt.attach(
        model,
        toys.method(lambda a: [Place(s, Dense(s)) for s in a.sites(["embedding"]) if s.path == path], merges=True),
    )
    with torch.no_grad():
        hand.get_submodule(path).weight.add_(tuned.slots[0].delta.change.T)
    close(output(model, batch), output(hand, batch))
    tuned.merge()
    close(output(model, batch), output(hand, batch))


def test_what_needs_the_weight_sees_what_was_done_before() -> None:
    model, batch = toys.model("bert"), tiny.batch("bert")
    hand = copy.deepcopy(model)
    first = pt.attach(model, [toys.method(on(["k"], Dense)), toys.method(on(["k"], Times))], train_head=False)
    with torch.no_grad():
        for dense, times in zip(*[[s.delta for s in first.slots if s.number == n] for n in (0, 1)], strict=True):
            path = next(slot.site.path for slot in first.slots if slot.delta is dense)
            linear = hand.get_submodule(path)
            linear.weight.add_(dense.change)
            linear.bias.add_(dense.shift)
            linear.weight.mul_(1 + times.gain[:, None])
            linear.bias.mul_(1 + times.gain)
    close(output(model, batch), output(hand, batch))


# --------------------------------------------------------------------------------------------------------------- hidden states


def recorded(model: nn.Module, batch: dict[str, Any], path: str, before: bool = False) -> Tensor:
    """What goes into or comes out of a module in a forward pass of a bare model."""
    seen: list[Tensor] = []

    def look(module: nn.Module, args: Any, kwargs: Any, found: Any = None) -> None:
        value = (args[0] if args else kwargs["hidden_states"]) if before else found
        seen.append((value if isinstance(value, Tensor) else value[0]).detach())

    module = model.get_submodule(path)
    handle = (
        module.register_forward_pre_hook(look, with_kwargs=True)
        if before
        else module.register_forward_hook(look, with_kwargs=True)
    )
    output(model, batch)
    handle.remove()
    return seen[0]


def put(model: nn.Module, batch: dict[str, Any], path: str, value: Tensor, before: bool = False) -> Tensor:
    """The output of a bare model in which a module gets or gives this value."""

    def swap(module: nn.Module, args: Any, kwargs: Any, found: Any = None) -> Any:
        if before:
            return ((value, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": value})
        return value if isinstance(found, Tensor) else (value, *found[1:])

    module = model.get_submodule(path)
    handle = (
        module.register_forward_pre_hook(swap, with_kwargs=True)
        if before
        else module.register_forward_hook(swap, with_kwargs=True)
    )
    found = output(model, batch)
    handle.remove()
    return found


HIDDEN = {
    # family, role, depth -> module at which it is read, module at which it is written
    "bert ffn": ("bert", "ffn", "bert.encoder.layer.1.intermediate", "bert.encoder.layer.1.output.dense"),
    "bert attention": ("bert", "attention", "bert.encoder.layer.1.attention.self", "bert.encoder.layer.1.attention.output.dense"),
    "bert block": ("bert", "block", "bert.encoder.layer.1", "bert.encoder.layer.1"),
    "llama ffn": ("llama", "ffn", "model.layers.1.mlp", "model.layers.1.mlp"),
    "llama attention": ("llama", "attention", "model.layers.1.self_attn", "model.layers.1.self_attn.o_proj"),
    "gpt2 attention": ("gpt2", "attention", "transformer.h.1.attn", "transformer.h.1.attn.c_proj"),
    "vit ffn": ("vit", "ffn", None, None),
    "t5 cross-attention": ("t5", "cross_attention", "decoder.block.1.layer.1.EncDecAttention", "decoder.block.1.layer.1.EncDecAttention.o"),
}  # fmt: skip


@pytest.mark.parametrize("composition", ["add", "multiply", "gate", "replace"])
@pytest.mark.parametrize("where", HIDDEN)
def test_a_hidden_delta_at_the_output(where: str, composition: Composition) -> None:
    family, role, _, path = HIDDEN[where]
    model, batch = toys.model(family), tiny.batch(family)
    bare = copy.deepcopy(model)
    tuned = pt.attach(
        model,
        toys.method(on([role], lambda s: Affine(s.out_features, composition=composition), layers=[1])),
        train_head=False,
    )
    slot = tuned.slots[0]
    path = path or slot.site.exit
    assert slot.site.exit == path or slot.site.core  # the place that this test knows by hand
    h = recorded(bare, batch, slot.site.exit)
    with torch.no_grad():
        close(output(model, batch), put(bare, batch, path, slot.delta.composed(h)))


@pytest.mark.parametrize("composition", ["add", "multiply", "gate", "replace"])
@pytest.mark.parametrize("where", ["bert ffn", "bert attention", "llama ffn", "gpt2 attention", "bert block"])
def test_a_hidden_delta_at_the_input(where: str, composition: Composition) -> None:
    family, role, path, _ = HIDDEN[where]
    model, batch = toys.model(family), tiny.batch(family)
    bare = copy.deepcopy(model)

    def places(anatomy: Anatomy) -> list[Place]:
        return [
            Place(s.at("input"), Affine(s.in_features, composition=composition)) for s in anatomy.sites([role], [1])
        ]

    tuned = pt.attach(model, toys.method(places), train_head=False)
    h = recorded(bare, batch, str(path), before=True)
    with torch.no_grad():
        close(output(model, batch), put(bare, batch, str(path), tuned.slots[0].delta.composed(h), before=True))


@pytest.mark.parametrize("composition", ["add", "multiply", "gate", "replace"])
@pytest.mark.parametrize("where", ["bert ffn", "bert attention", "llama ffn", "llama attention", "vit ffn"])
def test_a_parallel_delta_reads_the_input_and_writes_at_the_output(where: str, composition: Composition) -> None:
    family, role, read, write = HIDDEN[where]
    model, batch = toys.model(family), tiny.batch(family)
    bare = copy.deepcopy(model)

    def places(anatomy: Anatomy) -> list[Place]:
        sites = anatomy.sites([role], [1])
        return [Place(s, Affine(s.in_features, s.out_features, composition), read=s.at("input")) for s in sites]

    tuned = pt.attach(model, toys.method(places), train_head=False)
    slot = tuned.slots[0]
    read, write = read or slot.site.path, write or slot.site.exit
    x, h = recorded(bare, batch, read, before=True), recorded(bare, batch, write)
    with torch.no_grad():
        close(output(model, batch), put(bare, batch, write, slot.delta.composed(h, x)))


class Both(Affine):
    """M x + h + c of what it reads, x, and what it changes, h."""

    reads_both = True

    def forward(self, x: Tensor, h: Tensor) -> Tensor:  # type: ignore[override]
        return self.value(x) + h


@pytest.mark.parametrize("where", ["bert ffn", "gpt_neox k"])
def test_a_delta_may_see_what_it_reads_and_what_it_changes(where: str) -> None:
    family, role = where.split()
    model, batch = toys.model(family), tiny.batch(family, size=4)
    bare = copy.deepcopy(model)

    def places(anatomy: Anatomy) -> list[Place]:
        if role != "k":
            return [
                Place(s, Both(s.in_features, s.out_features), read=s.at("input")) for s in anatomy.sites([role], [1])
            ]
        return [Place(anatomy.sites(["k"], [1])[0], Both(32), read=anatomy.sites(["v"], [0])[0])]

    tuned = pt.attach(model, toys.method(places), train_head=False)
    for slot in tuned.slots:
        x = recorded(bare, batch, slot.place.read.path, before=role != "k")
        h = recorded(bare, batch, slot.site.exit)
        if role == "k":
            x, parts = x.unflatten(-1, (4, 3, 8))[..., 2, :].flatten(-2), h.unflatten(-1, (4, 3, 8))
            k = parts[..., 1, :].flatten(-2)
            new = (k + slot.delta(x, k)).unflatten(-1, (4, 8))
            new = torch.stack([parts[..., 0, :], new, parts[..., 2, :]], -2).flatten(-3)
        else:
            new = h + slot.delta(x, h)
        with torch.no_grad():
            close(output(model, batch), put(bare, batch, slot.site.exit, new))
    pt.attach(model, toys.method(places), name="b", train_head=False)
    with pt.route(model, ["default", None, "b", "default"]):
        mixed = output(model, batch)
    for row, name in enumerate(["default", None, "b", "default"]):
        with pt.route(model, name):
            close(mixed[row], output(model, batch)[row])


@pytest.mark.parametrize("composition", ["add", "multiply", "gate", "replace"])
def test_a_hidden_delta_on_a_part_of_a_fused_linear_changes_that_part_alone(composition: Composition) -> None:
    model, batch = toys.model("gpt_neox"), tiny.batch("gpt_neox")
    bare = copy.deepcopy(model)
    tuned = pt.attach(
        model, toys.method(on(["k"], lambda s: Affine(s.out_features, composition=composition), layers=[1]))
    )
    path = "gpt_neox.layers.1.attention.query_key_value"
    h = recorded(bare, batch, path)
    with torch.no_grad():
        parts = h.unflatten(-1, (4, 3, 8))
        changed = tuned.slots[0].delta.composed(parts[..., 1, :].flatten(-2)).unflatten(-1, (4, 8))
        parts = torch.stack([parts[..., 0, :], changed, parts[..., 2, :]], -2)
        close(output(model, batch), put(bare, batch, path, parts.flatten(-3)))


def test_a_delta_may_read_a_part_of_a_fused_linear() -> None:
    """It read the whole."""
    model, batch = toys.model("gpt2"), tiny.batch("gpt2")
    bare = copy.deepcopy(model)

    def places(anatomy: Anatomy) -> list[Place]:
        source, target = anatomy.sites(["v"], [1])[0], anatomy.sites(["ffn"], [1])[0]
        return [Place(target, Affine(32), read=source)]

    tuned = pt.attach(model, toys.method(places))
    v = recorded(bare, batch, "transformer.h.1.attn.c_attn")[..., 64:]
    h = recorded(bare, batch, tuned.slots[0].site.exit)
    with torch.no_grad():
        close(output(model, batch), put(bare, batch, tuned.slots[0].site.exit, tuned.slots[0].delta.composed(h, v)))


def test_deltas_at_one_place_act_in_the_order_of_their_methods() -> None:
    model, batch = toys.model("bert"), tiny.batch("bert")
    bare = copy.deepcopy(model)
    make = [lambda s: Affine(s.out_features), lambda s: Affine(s.out_features, composition="multiply")]
    tuned = pt.attach(model, [toys.method(on(["ffn"], m, layers=[1])) for m in make], train_head=False)
    path = tuned.slots[0].site.exit
    h = recorded(bare, batch, path)
    with torch.no_grad():
        first, second = (slot.delta for slot in tuned.slots)
        close(output(model, batch), put(bare, batch, path, second.composed(first.composed(h))))


# -------------------------------------------------------------------------------------------- modules, blocks, stacks, the shared


def test_a_module_can_be_renewed() -> None:
    model, batch = toys.model("bert"), tiny.batch("bert")
    hand = copy.deepcopy(model)
    tuned = pt.attach(model, toys.method(on(["up"], Renewed)), train_head=False)
    for slot in tuned.slots:
        hand.get_submodule(slot.site.path).load_state_dict(slot.delta.linear.state_dict())
    close(output(model, batch), output(hand, batch))


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "vit", "t5", "swin"])
def test_a_block_can_be_substituted(family: str) -> None:
    model, batch = toys.model(family), tiny.batch(family)
    bare, before = copy.deepcopy(model), toys.snapshot(model)

    def places(anatomy: Anatomy) -> list[Place]:
        return [Place(toys.whole_block(anatomy, 0), Halved())]

    tuned = pt.attach(model, toys.method(places), train_head=False)
    path = tuned.slots[0].site.path
    x, y = recorded(bare, batch, path, before=True), recorded(bare, batch, path)
    if family == "t5":
        batch = {**batch, "use_cache": False}
    close(output(model, batch), put(bare, batch, path, x + 0.5 * (y - x)))
    with pt.disabled(model):
        assert torch.equal(output(model, batch), output(bare, batch))
    tuned.detach()
    assert toys.snapshot(model) == before


@pytest.mark.parametrize("first_off", ["a", "b"])
def test_stand_ins_for_one_block_come_off_in_any_order(first_off: str) -> None:
    """The outer one was taken for the inner."""
    model, batch = toys.model("bert"), tiny.batch("bert")
    before, bare = toys.snapshot(model), output(model, batch)
    for name, share in (("a", 0.5), ("b", 0.25)):
        pt.attach(
            model,
            toys.method(lambda a, s=share: [Place(toys.whole_block(a, 1), Halved(s))]),
            name=name,
            train_head=False,
        )
    pt.activate(model, "a", "b")
    alone = {}
    for name in ("a", "b"):
        with pt.route(model, name):
            alone[name] = output(model, batch)
    pt.detach(model, first_off)
    other = "b" if first_off == "a" else "a"
    pt.activate(model, other)
    assert torch.equal(output(model, batch), alone[other])
    assert not torch.allclose(alone["a"], alone["b"], atol=1e-4)
    pt.detach(model)
    assert toys.snapshot(model) == before
    assert torch.equal(output(model, batch), bare)


def test_what_sits_on_a_substituted_block_outlives_the_substitute() -> None:
    """Its hooks went with the stand-in."""
    model, batch = toys.model("bert"), tiny.batch("bert")
    pt.attach(model, toys.method(lambda a: [Place(toys.whole_block(a, 1), Halved())]), name="block", train_head=False)
    pt.attach(model, toys.method(on(["block"], lambda s: Affine(s.out_features))), name="hidden", train_head=False)
    with pt.route(model, "hidden"):
        alone = output(model, batch)
    pt.detach(model, "block")
    assert torch.equal(output(model, batch), alone)


def test_a_substituted_block_trains_in_place() -> None:
    """Its parameters have other names under the stand-in, and were left out of the optimiser."""
    model, batch = toys.model("bert"), tiny.batch("bert")
    before = toys.snapshot(model)
    name = "bert.encoder.layer.1.attention.self.query.bias"
    methods = [
        toys.method(lambda a: [Place(toys.whole_block(a, 1), Halved())]),
        toys.method(trains=lambda self, anatomy, backbone: [name]),
    ]
    tuned = pt.attach(model, methods, train_head=False)
    assert [tuple(p.shape) for p in tuned.parameters()] == [(), (32,)]
    tuned.check(batch)
    shake(tuned, 0.5)
    changed = output(model, batch)
    with pt.disabled(model):
        bare = output(model, batch)
    assert not torch.allclose(changed, bare, atol=1e-4)
    tuned.detach()
    assert toys.snapshot(model) == before
    assert torch.equal(output(model, batch), bare)


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "vit", "t5"])
def test_a_network_beside_a_stack_gets_every_hidden_state(family: str) -> None:
    model, batch = toys.model(family), tiny.batch(family)
    bare = copy.deepcopy(model)

    def places(anatomy: Anatomy) -> list[Place]:
        return [Place(toys.whole_block(anatomy, 0), Mixture(len(anatomy.stack().blocks)))]

    tuned = pt.attach(model, toys.method(places), train_head=False)
    blocks = [block.path for block in pt.anatomy(bare).stack().blocks]
    states = [recorded(bare, batch, blocks[0], before=True), *(recorded(bare, batch, path) for path in blocks)]
    with torch.no_grad():
        close(output(model, batch), put(bare, batch, blocks[-1], tuned.slots[0].delta(states)))


class Pool(nn.Module):
    """What all sites of an attachment share."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.empty(32, 32))

    def initialise(self, generator: torch.Generator) -> None:
        self.matrix.normal_(0, 0.1, generator=generator)


class Shared(HiddenDelta):
    """h + g ⊙ (M h), with M of the pool and g of the site."""

    pool: tuple[Pool, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.empty(32))

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        self.gain.normal_(generator=generator)

    def forward(self, h: Tensor) -> Tensor:
        return self.gain * nn.functional.linear(h, self.pool[0].matrix)


class SharedMethod(Method):
    """A registered toy whose sites share a matrix; with `registers`, each holds it as its own, too."""

    registers: bool = False

    def deltas(self, anatomy: Anatomy) -> Iterator[Place]:
        yield from (Place(site, Shared()) for site in anatomy.sites(["ffn"]))

    def shared(self, anatomy: Anatomy) -> nn.Module:
        return Pool()

    def bind(self, deltas: Any, shared: nn.Module | None) -> None:
        for delta in deltas.values():
            delta.pool = (shared,)
            if self.registers:
                delta.matrix = shared.matrix


@pytest.mark.parametrize("registers", [False, True])
def test_shared_parameters_are_built_counted_and_saved_once(registers: bool, tmp_path: Any) -> None:
    SharedMethod.slug = "toy-shared"
    model, batch = toys.model("bert"), tiny.batch("bert")
    tuned = pt.attach(model, SharedMethod(registers=registers), train_head=False)
    assert tuned.trainable == 32 * 32 + 2 * 32
    shake(tuned)
    expected = output(model, batch)
    stored = tuned.named_tensors()
    assert sum(t.numel() for t in stored.values()) == 32 * 32 + 2 * 32, sorted(stored)
    path = tuned.save(tmp_path / "shared.safetensors")
    with toys.registered(SharedMethod):
        other = toys.model("bert")
        pt.load(other, path)
    assert torch.equal(output(other, batch), expected)
    assert len({id(p) for p in pt.adaptations(other)["shared"].parameters()}) == 3


def test_two_deltas_of_one_method_at_one_place_keep_apart(tmp_path: Any) -> None:
    """They had one name between them: the file held one of the two."""

    class Both(Method):
        def deltas(self, anatomy: Anatomy) -> Iterator[Place]:
            for site in anatomy.sites(["up"]):
                yield Place(site, Dense(site))
                yield Place(site, Affine(site.out_features))

    Both.slug = "toy-both"
    with toys.registered(Both):
        model, batch = toys.model("bert"), tiny.batch("bert")
        tuned = pt.attach(model, Both(), train_head=False)
        assert len(tuned.moment(0).deltas) == 4
        assert len({slot.key for slot in tuned.slots}) == 4
        shake(tuned)
        expected = output(model, batch)
        path = tuned.save(tmp_path / "both.safetensors")
        other = toys.model("bert")
        pt.load(other, path)
        assert torch.equal(output(other, batch), expected)


# -------------------------------------------------------------------------------------------------------- refused, where it can't


class Numbers(TokenDelta):
    length = 1


def place(role: str, make: Callable[[Site], Delta], side: str = "output") -> Method:
    return toys.method(lambda a: [Place(s.at(side), make(s.at(side))) for s in a.sites([role])])  # type: ignore[arg-type]


REFUSED: dict[str, tuple[str, Callable[[], Method], tuple[str, ...]]] = {
    "the input of a part of a fused linear": ("gpt2", lambda: place("q", lambda s: Affine(32), "input"), ("decoder.0.q", "fused")),
    "a part of a fused linear renewed": ("gpt2", lambda: place("q", Renewed), ("decoder.0.q", "part of a module")),
    "a sub-layer of several modules renewed": ("bert", lambda: place("ffn", Renewed), ("encoder.0.ffn", "more than one")),
    "a block that is none": ("bert", lambda: place("ffn", lambda s: Halved()), ("encoder.0.ffn", "not a block")),
    "tokens before what is no block": ("bert", lambda: place("q", lambda s: toys.Tokens(1, 32)), ("encoder.0.q", "not a block")),
    "a weight of what has none": ("bert", lambda: place("ffn", Dense), ("encoder.0.ffn", "no weight")),
    "the output of what is never called": ("torch_encoder", lambda: place("q", lambda s: Affine(32)), ("never called",)),
    "the input of an embedding": ("bert", lambda: place("embedding", lambda s: Affine(s.size), "input"), ("numbers of tokens",)),
    "inside an attention that hides it": ("deberta", lambda: place("attention", lambda s: toys.Heads()), ("attention interface",)),
    "a stack whose block runs again and again": ("albert", lambda: place("block", lambda s: Mixture(1)), ("runs 3 times",)),
    "no kind of delta": ("bert", lambda: place("q", lambda s: Bare()), ("no kind of delta",)),
    "nothing at all": ("llama", toys.method, ("nothing would train",)),
}  # fmt: skip


class Bare(Delta):
    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(1))


def test_something_stands_for_a_sub_layer_and_counts_as_a_delta() -> None:
    """Here for half of an ffn: added is half of what it gives, as in a model whose down projection is half as large."""
    model, other, batch = tiny.model("llama"), tiny.model("llama"), tiny.batch("llama")
    before, expected = toys.snapshot(model), output(model, batch)

    class Half(toys.BlockDelta):
        def __init__(self) -> None:
            super().__init__()
            self.share = nn.Parameter(torch.tensor(0.5))

        def forward(self, block: nn.Module, h: Tensor) -> Tensor:
            return self.share * block(h)

    with torch.no_grad():
        for layer in other.model.layers:
            layer.mlp.down_proj.weight.mul_(0.5)
    tuned = pt.attach(model, toys.method(on(["ffn"], lambda site: Half())))
    close(output(model, batch), output(other, batch))
    assert count(model).deltas == tuned.trainable == 2
    with pt.disabled(model):
        assert torch.equal(output(model, batch), expected)
    tuned.detach()
    assert toys.snapshot(model) == before


@pytest.mark.parametrize("what", REFUSED)
def test_is_refused_before_anything_changes(what: str) -> None:
    family, make, words = REFUSED[what]
    model = toys.model(family)
    with refused(model, *words):
        pt.attach(model, make(), train_head=False)
    assert host_of(model) is None


def test_a_parametrised_weight_that_would_be_composed_is_refused() -> None:
    """The stand-in was ignored, and the change with it."""
    model = toys.model("torch_encoder")
    nn.utils.parametrizations.weight_norm(model.layers[0].self_attn.out_proj)
    with refused(model, "parametrisation"):
        pt.attach(model, place("o", Dense))


class Explodes(Method):
    """Fails at the step that `at` names."""

    at: str

    def deltas(self, anatomy: Anatomy) -> Iterator[Place]:
        for site in anatomy.sites(["q"]):
            yield Place(site, Dense(site))
        if self.at == "deltas":
            raise AttachError("deltas")

    def bind(self, deltas: Any, shared: Any) -> None:
        if self.at == "bind":
            raise ValueError("bind")

    def trains(self, anatomy: Anatomy, model: nn.Module) -> list[str]:
        return ["no.such.parameter"] if self.at == "trains" else []

    def on_attach(self, moment: Moment) -> None:
        if self.at == "on_attach":
            raise KeyError("on_attach")


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("at", ["deltas", "bind", "trains", "on_attach"])
def test_a_failure_at_any_step_leaves_the_model_as_it_was(at: str, beside: bool) -> None:
    model, batch = toys.model("bert"), tiny.batch("bert")
    if beside:
        shake(pt.attach(model, place("v", Dense), name="first"))
    before, expected = toys.snapshot(model), output(model, batch)
    with pytest.raises((AttachError, ValueError, KeyError, AttributeError)):
        pt.attach(model, Explodes(at=at), name="second")
    assert toys.snapshot(model) == before
    assert list(pt.adaptations(model)) == (["first"] if beside else [])
    assert torch.equal(output(model, batch), expected)


def test_a_model_within_or_around_one_with_adaptations_is_refused() -> None:
    """The second froze the deltas of the first."""
    model = toys.model("bert")
    inner = pt.attach(model.bert, place("q", Dense))
    with refused(model, "bert has adaptations of its own"):
        pt.attach(model, place("v", Dense))
    assert all(p.requires_grad for p in inner.parameters())
    inner.detach()
    pt.attach(model, place("v", Dense))
    with refused(model, "part of a model that has adaptations"):
        pt.attach(model.bert, place("q", Dense))


def test_where_time_comes_first_neither_rows_nor_tokens_are_what_they_seem() -> None:
    model, x = toys.model("torch_encoder", batch_first=False), torch.randn(6, 2, 32)
    with refused(model, "tokens need batch_first=True"):
        pt.attach(model, toys.method(lambda a: [Place(toys.whole_block(a, 0).at("input"), toys.Tokens(3, 32))]))
    pt.attach(model, toys.method(on(["ffn"], lambda s: Affine(s.size))))
    with pytest.raises(AttachError, match="rows are not told apart"), pt.route(model, ["default", None]):
        output(model, {"src": x})
    with pt.route(model, ["default", "default"]):
        output(model, {"src": x})


class Named(HiddenDelta):
    """A hidden-state delta with a parameter called weight, which is no formula of a merge."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, h: Tensor) -> Tensor:
        return self.weight * h


def test_a_parameter_called_weight_is_not_taken_for_a_formula() -> None:
    model, batch = toys.model("bert"), tiny.batch("bert")
    tuned = pt.attach(model, [toys.method(on(["k"], lambda s: Named(s.size)), merges=True), place("k", Times)])
    output(model, batch)
    with pytest.raises(AttachError, match="can't be merged"):
        tuned.merge()


def test_a_model_can_be_pickled_whole() -> None:
    model, batch = toys.model("bert"), tiny.batch("bert")
    bare = output(model, batch)
    pt.attach(model, Explodes(at="never"))
    expected = output(model, batch)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    other = torch.load(stream, weights_only=False)
    assert torch.equal(output(other, batch), expected)
    pt.detach(other)
    assert torch.equal(output(other, batch), bare)


@pytest.mark.parametrize("name", ["", "a b", "a.b", "../x", "-a", "a" * 65, "ä"])
def test_names_that_could_be_paths_are_refused(name: str) -> None:
    model = toys.model("bert")
    with refused(model, "letters, digits", error=ConfigError):
        pt.attach(model, place("q", Dense), name=name)


def test_a_name_is_given_once() -> None:
    model = toys.model("bert")
    pt.attach(model, place("q", Dense), name="a")
    with refused(model, "'a' is attached already"):
        pt.attach(model, place("v", Dense), name="a")


# --------------------------------------------------------------------------------------------------- attaching and detaching


@pytest.mark.parametrize("family", [name for name in tiny.NAMES if not tiny.missing(name)])
def test_every_family_comes_back_bit_for_bit(family: str) -> None:
    """Weights, hidden states, norms and biases: attached, trained, detached."""
    model, batch = toys.model(family), tiny.batch(family)
    anatomy = pt.anatomy(model)
    inside = {site.role for stack in anatomy.stacks for block in stack.blocks for site in block.sites}
    roles = [role for role in ("q", "down", "conv") if role in inside]
    assert roles
    bare = output(model, batch)  # first, since some models hang hooks of their own on themselves in their first pass
    before = toys.snapshot(model)
    frozen = output(
        copy.deepcopy(model).requires_grad_(False), batch
    )  # torch takes other kernels where nothing needs a gradient

    def places(found: Anatomy) -> Iterator[Place]:
        for site in found.sites(roles, partial=True):
            yield Place(site, Dense(site))
        for stack in found.stacks:
            yield from (
                Place(site, Affine(site.size))
                for block in stack.blocks
                for site in block.sites
                if site.role == "block" and not site.within
            )

    own = [n for n, p in model.named_parameters() if p.ndim == 1][:4]
    tuned = pt.attach(model, toys.method(places, trains=lambda self, a, m: own))
    shake(tuned)
    changed = output(model, batch)
    assert not torch.allclose(changed, bare, atol=1e-4)
    with pt.disabled(model):
        if family.startswith("torch"):  # nn.Transformer takes other kernels where there are hooks
            close(output(model, batch), frozen)
        else:
            assert torch.equal(output(model, batch), frozen)
    assert torch.equal(output(model, batch), changed)
    tuned.detach()
    assert toys.snapshot(model) == before
    assert torch.equal(output(model, batch), bare)


def test_attaching_moves_no_global_generator() -> None:
    import random

    import numpy

    model = toys.model("bert")
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    seeded: list[int] = []
    original = torch.cuda.manual_seed_all
    torch.cuda.manual_seed_all = seeded.append  # what torch.manual_seed calls, device or not
    try:
        pt.attach(model, place("up", Renewed))
    finally:
        torch.cuda.manual_seed_all = original
    after = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert not seeded, "the generators of other devices were seeded"


def test_a_seed_gives_the_same_parameters_whatever_else_there_is() -> None:
    def tensors(methods: Any, family: str = "bert", **options: Any) -> dict[str, Tensor]:
        model = toys.model(family)
        if options.pop("beside", False):
            pt.attach(model, place("k", Dense), name="other")
        torch.manual_seed(int(torch.randint(100, ())))
        return pt.attach(model, methods, train_head=False, **options).named_tensors()

    plain = tensors(place("q", Dense))
    for other in (tensors(place("q", Dense), beside=True), tensors([place("q", Dense), place("v", Dense)])):
        assert all(torch.equal(other[key], value) for key, value in plain.items())
    renewed = tensors(place("up", Renewed))
    assert all(torch.equal(value, tensors(place("up", Renewed))[key]) for key, value in renewed.items())
    seeded = tensors(place("q", Dense), seed=1)
    assert not any(torch.equal(seeded[key], value) for key, value in plain.items())
    values = list(plain.values())
    assert not any(torch.equal(a, b) for i, a in enumerate(values) for b in values[:i] if a.shape == b.shape), (
        "sites are alike"
    )


def test_a_thousand_attachments_leave_nothing() -> None:
    model, batch = toys.model("bert"), tiny.batch("bert")
    before, bare = toys.snapshot(model), output(model, batch)
    method = toys.method(
        lambda a: [
            *on(["q"], Dense, layers=[0])(a),
            *on(["ffn"], lambda s: Affine(s.size), layers=[0])(a),
            *on(["attention"], lambda s: toys.Heads(), layers=[0])(a),
            Place(toys.whole_block(a, 1), Halved()),
        ],
        trains=lambda self, a, m: ["bert.embeddings.LayerNorm.bias"],
    )
    found = pt.anatomy(model)
    seen: list[weakref.ref[Any]] = []
    counts = []
    for i in range(1000):
        tuned = pt.attach(model, method, found=found)
        if i % 100 == 0:
            seen.append(weakref.ref(tuned))
        tuned.detach()
        del tuned
        if i in (99, 999):
            gc.collect()
            counts.append(sum(isinstance(o, (nn.Module, Tensor)) for o in gc.get_objects()))
    assert toys.snapshot(model) == before
    assert torch.equal(output(model, batch), bare)
    assert [ref() for ref in seen] == [None] * len(seen)
    assert counts[1] <= counts[0], "modules or tensors pile up"


@pytest.mark.parametrize("training", [False, True])
def test_a_delta_is_in_the_mode_of_its_model(training: bool) -> None:
    """Its dropout acted in evaluation, until somebody called `eval` once more."""

    class Dropping(Affine):
        def __init__(self, size: int) -> None:
            super().__init__(size)
            self.dropout = nn.Dropout(0.5)

        def forward(self, h: Tensor) -> Any:
            return self.dropout(super().forward(h))

    model = toys.model("bert").train(training)
    for name in ("first", "second"):  # which finds its junctions there
        methods = [
            toys.method(on(["ffn"], lambda s: Dropping(s.size)), shared=lambda self, anatomy: nn.Dropout(0.5)),
            toys.method(lambda a: [Place(toys.whole_block(a, 1), Halved())]),
        ]
        tuned = pt.attach(model, methods, name=name)
        assert {m.training for _, module in tuned.modules() for m in module.modules()} == {training}
    assert {m.training for m in model.modules()} == {training}


def test_detached_twice_and_never_attached_are_refused() -> None:
    model = toys.model("bert")
    with pytest.raises(AttachError, match="nothing is attached"):
        pt.detach(model)
    tuned = pt.attach(model, place("q", Dense))
    tuned.detach()
    with pytest.raises(AttachError, match="not attached any more"):
        tuned.detach()


def test_several_adaptations_keep_out_of_each_others_way() -> None:
    model, batch = toys.model("bert"), tiny.batch("bert")
    before, bare = toys.snapshot(model), output(model, batch)
    outputs = {}
    for i, name in enumerate(("a", "b", "c")):
        lone = toys.model("bert")
        shake(pt.attach(lone, place("q", Dense), seed=i), seed=i)
        outputs[name] = output(lone, batch)
        shake(pt.attach(model, place("q", Dense), name=name, seed=i), seed=i)
        assert torch.equal(output(model, batch), outputs[name]), "the newest acts, alone"
    for name, expected in outputs.items():
        pt.activate(model, name)
        assert torch.equal(output(model, batch), expected)
        with pt.route(model, "b"):
            assert torch.equal(output(model, batch), outputs["b"])
        assert torch.equal(output(model, batch), expected)
    pt.activate(model)
    assert torch.equal(output(model, batch), bare)
    pt.activate(model, "a")
    pt.detach(model, "b")
    assert torch.equal(output(model, batch), outputs["a"])
    pt.detach(model, "a")
    assert torch.equal(output(model, batch), outputs["c"])
    pt.detach(model)
    assert toys.snapshot(model) == before


def test_a_copy_is_a_model_of_its_own() -> None:
    model, batch = toys.model("bert"), tiny.batch("bert")
    method = toys.method(
        lambda a: [
            *on(["k"], Dense)(a),
            *on(["ffn"], lambda s: Affine(s.size))(a),
            *on(["attention"], lambda s: toys.Heads())(a),
        ],
        trains=lambda self, a, m: ["bert.embeddings.LayerNorm.bias"],
    )
    bare = output(model, batch)
    pt.attach(model, [method, place("k", Times)])
    expected = output(model, batch)
    twin = copy.deepcopy(model)
    shake(pt.adaptations(model)["default"])
    assert torch.equal(output(twin, batch), expected), "the copy followed the original, or lost an earlier change"
    with pt.disabled(twin):
        assert torch.equal(output(twin, batch), bare)
        assert not torch.equal(output(model, batch), bare)
    changed = output(model, batch)
    pt.detach(twin)
    assert torch.equal(output(twin, batch), bare)
    assert torch.equal(output(model, batch), changed)


# ---------------------------------------------------------------------------------------------------- training the backbone itself


def own(*names: str) -> Method:
    return toys.method(trains=lambda self, anatomy, model: list(names))


BIAS = "encoder.block.0.layer.1.DenseReluDense.wi.weight"


def test_a_model_within_the_model_is_bare_too() -> None:
    """Generation calls the encoder alone, where the trained values were still in place."""
    model, batch = toys.model("t5"), tiny.batch("t5")
    encode = lambda: output(model.get_encoder(), {"input_ids": batch["input_ids"]})  # noqa: E731
    bare = encode()
    tuned = pt.attach(model, own(BIAS))
    shake(tuned, 1.0)
    trained = encode()
    assert not torch.allclose(trained, bare, atol=1e-3)
    with pt.disabled(model):
        assert torch.equal(encode(), bare)
        without = model.generate(batch["input_ids"], max_new_tokens=4, do_sample=False)
    assert torch.equal(encode(), trained)
    tuned.detach()
    assert torch.equal(model.generate(batch["input_ids"], max_new_tokens=4, do_sample=False), without)


def test_a_delta_starts_from_the_backbone_and_not_from_what_another_trained() -> None:
    """It started from the trained weights, and then ran on the bare ones."""
    model, batch = toys.model("bert"), tiny.batch("bert")
    bare = output(model, batch)
    names = [f"bert.encoder.layer.{i}.attention.self.query.{n}" for i in (0, 1) for n in ("weight", "bias")]
    shake(pt.attach(model, own(*names, "classifier.weight"), name="own"), 0.5)

    class Start(Times):
        def initialise(self, generator: torch.Generator, base: Base) -> None:
            self.register_buffer("start", base.weight.clone())
            self.gain.zero_()

        def weight(self, base: Tensor) -> Tensor:
            return self.start - base

    tuned = pt.attach(model, place("q", Start), name="delta")
    assert torch.equal(output(model, batch), bare)
    assert torch.equal(tuned.slots[-1].delta.module.weight, toys.model("bert").classifier.weight)
    pt.detach(model, "own")
    assert torch.equal(output(model, batch), bare)


def test_the_weight_that_a_delta_needs_is_the_one_it_runs_on() -> None:
    model, batch = toys.model("bert"), tiny.batch("bert")
    lone = toys.model("bert")
    shake(pt.attach(lone, place("q", Times), name="delta"))
    expected = output(lone, batch)
    shake(pt.attach(model, own("bert.encoder.layer.0.attention.self.query.weight"), name="own", train_head=False), 0.5)
    shake(pt.attach(model, place("q", Times), name="delta"))
    assert torch.equal(output(model, batch), expected)


def test_a_composed_weight_is_composed_from_the_bare_one() -> None:
    model, batch = toys.model("torch_encoder"), tiny.batch("torch_encoder")
    lone = toys.model("torch_encoder")
    pt.attach(lone, place("q", Dense), name="delta")
    expected = output(lone, batch)
    before = toys.snapshot(model)
    shake(
        pt.attach(model, own("layers.0.self_attn.in_proj_weight", "layers.0.self_attn.in_proj_bias"), name="own"), 0.5
    )
    pt.attach(model, place("q", Dense), name="delta")
    for _ in range(2):
        assert torch.equal(output(model, batch), expected)
    with pt.route(model, ["own"] * 2):
        assert not torch.allclose(output(model, batch), expected, atol=1e-3)
    pt.detach(model)
    assert toys.snapshot(model) == before


def test_tied_weights_are_put_aside_at_every_place() -> None:
    model, batch = toys.model("gpt2"), tiny.batch("gpt2")
    bare = output(model, batch)
    shake(pt.attach(model, own("transformer.wte.weight")), 0.5)
    with pt.disabled(model):
        assert torch.equal(output(model, batch), bare)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_is_put_aside_follows_the_model(dtype: torch.dtype) -> None:
    """It stayed in the precision, and on the device, that the model had when something was attached."""
    model, batch = toys.model("bert"), tiny.batch("bert")
    expected = output(copy.deepcopy(model).to(dtype), batch)
    shake(pt.attach(model, own("bert.encoder.layer.0.intermediate.dense.weight")))
    model.to(dtype)
    with pt.disabled(model):
        assert torch.equal(output(model, batch), expected)


def test_one_owner_for_each_tensor() -> None:
    model = toys.model("bert")
    name = "bert.embeddings.LayerNorm.bias"
    pt.attach(model, own(name), name="a")
    with refused(model, name, "trained in place by another adaptation"):
        pt.attach(model, own(name), name="b")


# --------------------------------------------------------------------------------------------------------- running statistics


def statistics(model: nn.Module) -> dict[str, bytes]:
    return {name: toys.bits(b) for name, b in model.named_buffers() if "running" in name or "num_batches" in name}


def test_a_frozen_backbone_keeps_its_running_statistics() -> None:
    model, batch = toys.model("resnet"), tiny.batch("resnet")
    tuned = pt.attach(model, toys.method())
    before = statistics(model)
    model.train()
    model(**batch)
    assert statistics(model) == before
    tuned.detach()
    assert all(m.training for m in model.modules()), "a layer stayed in evaluation mode"
    model(**batch)
    assert statistics(model) != before


def test_only_the_statistics_of_what_trains_move_and_come_back() -> None:
    """As soon as one norm trained, the statistics of all moved, and those of the others never came back."""
    model, batch = toys.model("resnet"), tiny.batch("resnet")
    norms = [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    before = toys.snapshot(model)
    tuned = pt.attach(model, own(f"{norms[-1]}.weight"))
    model.train()
    model(**batch)
    moved = {name.rpartition(".")[0] for name, value in statistics(model).items() if before["state"][name] != value}
    assert moved == {norms[-1]}
    with pt.disabled(model):
        now = statistics(model)
        model(**batch)
        assert statistics(model) == now, "a pass without the adaptation moved what it trained"
    model(**batch)
    assert statistics(model) != now
    model.eval()
    tuned.detach()
    assert toys.snapshot(model) == before


def test_statistics_move_alone_where_a_method_names_them() -> None:
    model, batch = toys.model("resnet"), tiny.batch("resnet")
    path = next(name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d))
    before = {name: toys.bits(tensor) for name, tensor in model.state_dict().items()}
    tuned = pt.attach(model, [own(f"{path}.running_mean"), pt.LinearProbe()])
    assert not any(p.requires_grad for p in model.get_submodule(path).parameters(recurse=False))
    model.train()(**batch)
    now = {name: toys.bits(tensor) for name, tensor in model.state_dict().items()}
    changed = {name for name, value in before.items() if now[name] != value}
    assert changed == {f"{path}.{statistic}" for statistic in ("running_mean", "running_var", "num_batches_tracked")}
    tuned.detach()
    assert {name: toys.bits(tensor) for name, tensor in model.state_dict().items()} == before


# ------------------------------------------------------------------------------------------------------------- the task head


@pytest.mark.parametrize("family", ["bert", "vit", "llama_classifier", "swin", "resnet", "roberta"])
def test_the_head_trains_as_a_copy(family: str) -> None:
    model, batch = toys.model(family), tiny.batch(family)
    before, bare = toys.snapshot(model), output(model, batch)
    tuned = pt.attach(model, toys.method())
    assert torch.equal(output(model, batch), bare)
    tuned.check(batch)
    shake(tuned)
    assert not torch.allclose(output(model, batch), bare, atol=1e-3)
    assert {n: toys.bits(v) for n, v in model.state_dict().items() if "petiole" not in n} == before["state"]
    tuned.detach()
    assert toys.snapshot(model) == before


def test_a_head_must_be_there_to_be_trained() -> None:
    model = toys.model("llama")
    with refused(model, "no task head"):
        pt.attach(model, place("q", Dense), train_head=True)


# ------------------------------------------------------------------------------------------------------- the fast path of factors


class Thin(Dense):
    """A product of two factors, which is added to an ordinary linear as one node of the graph."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.A, self.B = nn.Parameter(torch.empty(2, site.in_features)), nn.Parameter(torch.empty(site.out_features, 2))
        del self.change, self.shift

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        self.A.normal_(0, 0.3, generator=generator)
        self.B.normal_(0, 0.3, generator=generator)

    def factored(self) -> Any:
        return self.A, self.B, 1.0, None

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.A), self.B)

    def weight(self, base: Tensor) -> Tensor:
        return self.B @ self.A

    def bias(self, base: Tensor | None) -> None:
        return None


def gradients(model: nn.Module, batch: dict[str, Any], tuned: pt.Adaptation) -> list[Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return [p.grad.clone() for p in tuned.parameters() if p.grad is not None]


def test_its_gradient_goes_through_the_weight_that_acts() -> None:
    """It went through what another adaptation had trained, though that one does not act."""
    names = [
        f"bert.encoder.layer.{i}.{part}.weight"
        for i in (0, 1)
        for part in ("intermediate.dense", "attention.self.query")
    ]
    lone, batch = toys.model("bert"), tiny.batch("bert")
    expected = gradients(lone, batch, pt.attach(lone, toys.method(on(["q", "up"], Thin))))
    model = toys.model("bert")
    shake(pt.attach(model, own(*names), name="own", train_head=False), 0.5)
    found = gradients(model, batch, pt.attach(model, toys.method(on(["q", "up"], Thin))))
    for one, other in zip(found, expected, strict=True):
        close(one, other)


@pytest.mark.parametrize("early", [False, True])
def test_a_hook_of_the_users_that_changes_the_input_changes_it_for_both(early: bool) -> None:
    model, batch = toys.model("bert"), tiny.batch("bert")
    path = "bert.encoder.layer.0.attention.self.query"
    hand = copy.deepcopy(model)
    double = lambda module, args: (2 * args[0],)  # noqa: E731
    if early:
        model.get_submodule(path).register_forward_pre_hook(double)
    tuned = pt.attach(model, toys.method(on(["q"], Thin)), train_head=False)
    if not early:
        model.get_submodule(path).register_forward_pre_hook(double)
    with torch.no_grad():
        for slot in tuned.slots:
            linear = hand.get_submodule(slot.site.path)
            linear.weight.add_(slot.delta.B @ slot.delta.A)
        hand.get_submodule(path).weight.mul_(2)
    found = toys.first(model(**batch))
    close(found.detach(), output(hand, batch))


def test_what_is_shared_lies_where_the_model_does() -> None:
    model = tiny.model("bert").to("meta")
    tuned = pt.attach(model, pt.PrefixTuning(length=2, reparametrisation="mlp"))
    assert {parameter.device.type for parameter in tuned.shared[0].parameters()} == {"meta"}


def test_a_method_that_finds_no_place_is_refused_though_the_head_would_train() -> None:
    with pytest.raises(AttachError, match=r"finds no place on BertForSequenceClassification, which has .*block"):
        pt.attach(tiny.model("bert"), toys.method(lambda anatomy: []))


# ------------------------------------------------------------------------------------------------ changes that depend on the input


def test_where_there_is_no_change_of_the_weight_later_ones_see_the_weight_without_it() -> None:
    model, x = toys.model("llama"), torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    query = model.get_submodule(pt.anatomy(model).sites(["q"], [0])[0].path)
    W = query.weight.detach().clone()
    first = pt.attach(model, toys.method(on(["q"], Gated, layers=[0]), merges=True), name="first")
    second = pt.attach(model, toys.method(on(["q"], Times, layers=[0]), merges=True), name="second")
    matrix, gain = first.slots[0].delta.matrix, second.slots[0].delta.gain
    pt.activate(model, "first", "second")
    gated = x @ matrix.T * (x[..., :1] > 0)
    close(query(x), x @ W.T + gated + gain * (x @ W.T))
    second.merge()
    close(query(x), x @ W.T + gated + gain * (x @ W.T))
    with pytest.raises(AttachError, match="each token has a change of its own"):
        first.merge()


def test_a_composed_weight_can_not_depend_on_the_token() -> None:
    model = tiny.model("torch_encoder")
    with refused(model, "q is composed for a whole batch"):
        pt.attach(model, toys.method(on(["q"], Gated)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_a_loss_term_is_made_of_keeps_its_graph_under_checkpointing(reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        model, batch = toys.model("llama"), tiny.batch("llama")

        def loss(self: Method, moment: Moment) -> Tensor:
            return torch.stack([delta.term for delta in moment.deltas.values()]).sum()  # type: ignore[misc]

        tuned = pt.attach(model, toys.method(on(["q"], Gated), loss=loss))
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.train()
        output = model(**batch)
        terms = [slot.delta.term for slot in tuned.slots]
        assert all(term.requires_grad for term in terms)
        output.loss.backward()
        assert all(slot.delta.term is term for slot, term in zip(tuned.slots, terms, strict=True))
        found.append([p.grad.clone() for p in tuned.parameters()])
    for one, other in zip(*found, strict=True):
        close(one, other)
