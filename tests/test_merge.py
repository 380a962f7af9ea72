"""Merging gives what the forward pass gives, unmerging gives the bits back, and what can't be merged is refused with nothing changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petiole as pt
import tiny
import toys
from petiole.anatomy import Anatomy, Side, Site
from petiole.errors import AttachError
from petiole.files import parse
from petiole.method import Base, Composition, HiddenDelta, Place
from toys import Dense, Times, on, output, shake


class Gain(HiddenDelta):
    """h ⊙ (1 + g) at one side of a linear, and what that does to its weight."""

    composition: Composition = "multiply"

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.side: Side = site.side
        self.gain = nn.Parameter(torch.empty(site.size))

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        self.gain.normal_(0, 0.3, generator=generator)

    def forward(self, h: Tensor) -> Tensor:
        return 1 + self.gain

    def weight(self, base: Tensor) -> Tensor:
        return self.gain[:, None] * base if self.side == "output" else base * self.gain

    def bias(self, base: Tensor | None) -> Tensor | None:
        return None if base is None or self.side == "input" else self.gain * base


class Mix(Gain):
    """h + M h, a product that does not commute with another of its kind."""

    composition: Composition = "add"

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.matrix = nn.Parameter(torch.empty(site.size, site.size))
        del self.gain

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        self.matrix.normal_(0, 0.1, generator=generator)

    def forward(self, h: Tensor) -> Tensor:
        return nn.functional.linear(h, self.matrix.to(h.dtype))

    def weight(self, base: Tensor) -> Tensor:
        return self.matrix @ base if self.side == "output" else base @ self.matrix

    def bias(self, base: Tensor | None) -> Tensor | None:
        return None if base is None or self.side == "input" else self.matrix @ base


def changes(make: Callable[[Site], Any], role: str, side: Side = "output") -> pt.Method:
    return toys.method(lambda a: [Place(s.at(side), make(s.at(side))) for s in a.sites([role])], merges=True)


def linears(anatomy: Anatomy, *roles: str) -> list[Site]:
    return anatomy.sites([role for role in roles if role in anatomy.roles])


# ------------------------------------------------------------------------------------------------------------ merged is forward

EVERY_LAYOUT = {
    "bert": ("q", "o", "up", "down"),
    "gpt2": ("q", "v", "o", "down"),  # stored (in, out), q and v slices of one tensor
    "gpt_neox": ("q", "k", "v"),  # slices that alternate head by head
    "mixtral": ("gate", "up", "down"),  # packed experts
    "gpt_oss": ("gate_up", "down"),  # packed the other way round, with biases
    "torch_encoder": ("q", "k", "v", "o"),  # in_proj_weight
    "resnet": ("conv",),
    "t5": ("cross_attention.k", "down"),
}


@pytest.mark.parametrize("family", EVERY_LAYOUT)
def test_merged_gives_what_the_forward_pass_gave(family: str) -> None:
    model, batch = toys.model(family), tiny.batch(family)
    bare = output(model, batch)
    tuned = pt.attach(model, toys.method(on(EVERY_LAYOUT[family], Dense), merges=True))
    attached = output(model, batch)
    assert not torch.allclose(attached, bare, atol=1e-3)
    change = tuned.merge(check=batch)
    merged = output(model, batch)
    torch.testing.assert_close(merged, attached, rtol=1e-5, atol=1e-5)
    assert change is not None and change == pytest.approx(float((merged - attached).abs().max()), abs=1e-7)
    tuned.unmerge()
    assert torch.equal(output(model, batch), attached)


ORDERS: dict[str, Callable[[], list[pt.Method]]] = {
    "scale the input, then add": lambda: [changes(Gain, "down", "input"), changes(Dense, "down")],
    "add, then scale the input": lambda: [changes(Dense, "down"), changes(Gain, "down", "input")],
    "two products at the input": lambda: [changes(Mix, "down", "input"), changes(Mix, "down", "input")],
    "two products at the output": lambda: [changes(Mix, "up"), changes(Mix, "up")],
    "scale the output, then what needs the weight": lambda: [changes(Gain, "k"), changes(Times, "k")],
    "add, then what needs the weight": lambda: [changes(Dense, "k"), changes(Times, "k")],
    "everything": lambda: [
        changes(Mix, "down", "input"),
        changes(Gain, "down"),
        changes(Times, "down"),
        changes(Gain, "down", "input"),
        changes(Mix, "down"),
        changes(Dense, "down"),
    ],
}


@pytest.mark.parametrize("order", ORDERS)
def test_several_changes_of_one_weight_merge_in_the_order_of_the_forward_pass(order: str) -> None:
    """What scales an input was merged as if what came after it did not see that input."""
    model, batch = toys.model("bert"), tiny.batch("bert")
    tuned = pt.attach(model, ORDERS[order]())
    attached = output(model, batch)
    tuned.merge()
    torch.testing.assert_close(output(model, batch), attached, rtol=1e-5, atol=1e-5)


def test_a_part_of_a_fused_weight_sees_what_was_done_to_the_whole() -> None:
    """A change of q that starts from the weight did not see an earlier one of the whole qkv."""
    model, batch = toys.model("gpt2"), tiny.batch("gpt2")
    tuned = pt.attach(model, [changes(Dense, "qkv"), changes(Times, "q")])
    attached = output(model, batch)
    tuned.merge()
    torch.testing.assert_close(output(model, batch), attached, rtol=1e-5, atol=1e-5)


def test_merging_keeps_the_precision_of_the_weights() -> None:
    """Double-precision weights lost half their digits on the way through float32."""
    model = toys.model("bert").double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tuned = pt.attach(model, changes(lambda s: Dense(s, size=0.0), "q"))
    tuned.merge()
    for name, value in before.items():
        assert torch.equal(model.get_parameter(name), value), name


def test_merged_and_detached_is_a_plain_model() -> None:
    model, batch = toys.model("bert"), tiny.batch("bert")
    before = toys.snapshot(model)
    tuned = pt.attach(model, changes(Dense, "q"), train_head=False)
    attached = output(model, batch)
    tuned.merge()
    tuned.detach()
    torch.testing.assert_close(output(model, batch), attached, rtol=1e-5, atol=1e-5)
    after = toys.snapshot(model)
    for part in ("requires_grad", "objects", "modules", "hooks", "attention"):
        assert after[part] == before[part], part
    assert list(after["state"]) == list(before["state"])


def test_the_head_merges_too() -> None:
    model, batch = toys.model("bert"), tiny.batch("bert")
    bare = output(model, batch)
    tuned = pt.attach(model, changes(Dense, "q"))
    shake(tuned)
    attached = output(model, batch)
    tuned.merge()
    tuned.detach()
    torch.testing.assert_close(output(model, batch), attached, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(attached, bare, atol=1e-2)


# --------------------------------------------------------------------------------------------------------- unmerged is the bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_thousand_merges_and_unmerges_change_no_bit(dtype: torch.dtype) -> None:
    model = toys.model("bert", num_hidden_layers=1).to(dtype)
    before = toys.snapshot(model)["state"]
    tuned = pt.attach(model, changes(Dense, "q"), train_head=False)
    with torch.no_grad():
        for _ in range(1000):
            tuned.merge()
            tuned.unmerge()
    tuned.detach()
    assert toys.snapshot(model)["state"] == before


def test_merges_into_the_same_weights_are_undone_last_first() -> None:
    """Undone first first, the weights kept the first change for good."""
    model = toys.model("bert")
    before = toys.snapshot(model)["state"]
    first = pt.attach(model, changes(Dense, "q"), name="first", train_head=False)
    second = pt.attach(model, changes(Dense, "q"), name="second", train_head=False)
    first.merge()
    second.merge()
    with pytest.raises(AttachError, match="'second' was merged into the same weights after 'first'"):
        first.unmerge()
    second.unmerge()
    first.unmerge()
    pt.detach(model)
    assert toys.snapshot(model)["state"] == before


def test_merges_into_other_weights_are_undone_in_any_order() -> None:
    model = toys.model("bert")
    before = toys.snapshot(model)["state"]
    first = pt.attach(model, changes(Dense, "q"), name="first", train_head=False)
    second = pt.attach(model, changes(Dense, "v"), name="second", train_head=False)
    first.merge()
    second.merge()
    first.unmerge()
    second.unmerge()
    pt.detach(model)
    assert toys.snapshot(model)["state"] == before


def test_what_was_merged_later_and_kept_is_not_lost() -> None:
    model = toys.model("bert")
    first = pt.attach(model, changes(Dense, "q"), name="first", train_head=False)
    second = pt.attach(model, changes(Dense, "q"), name="second", seed=1, train_head=False)
    first.merge()
    second.merge()
    second.detach()
    kept = toys.snapshot(model)["state"]
    with pytest.raises(AttachError, match="'second' was merged into the same weights"):
        first.unmerge()
    assert toys.snapshot(model)["state"] == kept


# ---------------------------------------------------------------------------------------------------- refused, nothing changed


def refused(model: nn.Module, tuned: pt.Adaptation, words: str, **options: Any) -> None:
    before = toys.snapshot(model)
    with pytest.raises(AttachError, match=words) as caught:
        tuned.merge(**options)
    assert len(str(caught.value).splitlines()) <= 3
    assert toys.snapshot(model) == before
    assert not tuned.merged


def test_a_change_of_a_hidden_state_is_refused() -> None:
    model = toys.model("bert")
    method = toys.method(on(["ffn"], lambda s: toys.Affine(s.out_features)))
    refused(model, pt.attach(model, method), "can't be merged")
    claims = toys.method(on(["q"], lambda s: toys.Affine(s.out_features)), merges=True)
    refused(model, pt.attach(model, [changes(Dense, "k"), claims], name="b"), r"encoder\.0\.q: Affine can't be merged")


def test_a_weight_tied_to_another_place_is_refused() -> None:
    model = toys.model("gpt2")
    tuned = pt.attach(model, toys.method(on(["embedding"], Dense), merges=True))
    refused(model, tuned, "lm_head.weight.*untie")


def test_a_weight_that_is_computed_from_others_is_refused() -> None:
    """The merged values went into a temporary, and the model was the bare one after it."""
    model = toys.model("bert")
    nn.utils.parametrizations.weight_norm(model.get_submodule("bert.encoder.layer.0.attention.self.query"))
    refused(model, pt.attach(model, changes(Dense, "q")), "parametrisation")


def test_a_missing_bias_is_refused() -> None:
    class Biased(Dense):
        def bias(self, base: Tensor | None) -> Tensor:
            return self.shift

    model = toys.model("llama")
    refused(model, pt.attach(model, changes(Biased, "q")), "no bias")


def test_what_another_adaptation_trains_in_place_is_refused() -> None:
    model = toys.model("bert")
    pt.attach(
        model, toys.method(trains=lambda self, a, m: ["bert.encoder.layer.1.attention.self.query.weight"]), name="own"
    )
    tuned = pt.attach(model, changes(Dense, "q"), name="delta")
    refused(model, tuned, "trained in place by 'own'")


def test_nothing_trains_in_place_what_something_is_merged_into() -> None:
    model = toys.model("bert")
    name = "bert.encoder.layer.1.attention.self.query.weight"
    tuned = pt.attach(model, changes(Dense, "q"), name="delta")
    tuned.merge()
    merged = toys.snapshot(model)
    with pytest.raises(AttachError, match="'delta' is merged into it"):
        pt.attach(model, toys.method(trains=lambda self, a, m: [name]), name="own")
    assert toys.snapshot(model) == merged
    tuned.detach()
    pt.attach(model, toys.method(trains=lambda self, a, m: [name]), name="own")


def test_merging_twice_and_unmerging_what_is_not_merged_are_refused() -> None:
    model = toys.model("bert")
    tuned = pt.attach(model, changes(Dense, "q"))
    with pytest.raises(AttachError, match="is not merged"):
        tuned.unmerge()
    tuned.merge()
    with pytest.raises(AttachError, match="merged already"):
        tuned.merge()


class Quantised(nn.Linear):
    """A linear whose weight is stored as integers: what matters of any quantised layer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features)
        weight = linear.weight.detach()
        self.scale = float(weight.abs().max() / 127)
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.weight.is_floating_point() else self.weight.dequantize()
        return nn.functional.linear(x, weight, self.bias)


@pytest.fixture
def quantised(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    model = toys.model("bert")
    for layer in model.bert.encoder.layer:
        layer.attention.self.query = Quantised(layer.attention.self.query)
    own = model.bert.encoder.layer[0].attention.self.query
    monkeypatch.setattr(Tensor, "dequantize", lambda t: t.float() * own.scale)
    return model


def test_a_quantised_weight_is_replaced_only_when_told(quantised: nn.Module) -> None:
    batch = tiny.batch("bert")
    before = toys.snapshot(quantised)
    tuned = pt.attach(quantised, changes(Dense, "q"), train_head=False)
    attached = output(quantised, batch)
    refused(quantised, tuned, "onto='dequantised'")
    tuned.merge(onto="dequantised")
    torch.testing.assert_close(output(quantised, batch), attached, rtol=1e-5, atol=1e-5)
    tuned.unmerge()
    tuned.detach()
    assert toys.snapshot(quantised) == before


# ------------------------------------------------------------------------------------------- merged acts in every forward pass


def test_no_forward_pass_is_promised_without_what_is_merged() -> None:
    """`disabled` gave the merged model for the bare one."""
    model = toys.model("bert")
    tuned = pt.attach(model, changes(Dense, "q"), name="merged")
    pt.attach(model, changes(Dense, "v"), name="other")
    tuned.merge()
    for enter in (
        lambda: pt.disabled(model),
        tuned.disabled,
        lambda: pt.route(model, "other"),
        lambda: pt.route(model, None),
        lambda: pt.route(model, ["merged", "other"]),
    ):
        with pytest.raises(AttachError, match="'merged' is merged into the weights"), enter():
            pass
    with pytest.raises(AttachError, match="'merged' is merged into the weights"):
        pt.activate(model, "other")
    with pt.route(model, ["merged", ("merged", "other")]):
        pass
    tuned.unmerge()
    with pt.disabled(model):
        pass


def test_the_file_does_not_change_by_merging(tmp_path: Any) -> None:
    """A bias that trains in place was stored with what was merged into it, and got it twice after loading."""
    names = [f"bert.encoder.layer.{i}.attention.self.key.bias" for i in range(2)]
    model = toys.model("bert")
    tuned = pt.attach(model, [toys.method(trains=lambda self, a, m: names, merges=True), changes(Times, "k")])
    shake(tuned)
    before = tuned.save(tmp_path / "before.safetensors").read_bytes()
    tuned.merge()
    assert tuned.save(tmp_path / "merged.safetensors").read_bytes() == before
    tensors, _ = parse(before)
    assert f"own:{names[0]}" in tensors


def test_what_is_made_on_a_merged_backbone_belongs_to_that_one(tmp_path: Any) -> None:
    """Its file named the bare backbone, on which it gives other outputs."""
    model = toys.model("bert")
    under = pt.attach(model, changes(Dense, "v"), name="under")
    bare = under.mark
    under.merge()
    above = pt.attach(model, changes(Dense, "q"), name="above")
    assert under.mark == bare
    assert above.mark["values"] != bare["values"]
    assert above.mark["layout"] == bare["layout"]
