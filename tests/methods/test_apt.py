"""What APT must hold, by its paper: each number is a line of its specification."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petiole as pt
import tiny
import toys
from linears import set_
from petiole.cost import predict
from petiole.errors import AnatomyError, AttachError, ConfigError
from petiole.methods.prompts.apt import APT, Diffusion, Scale

SIZE, TOKENS = 12, 7


def diffusion(seed: int = 0, dropout: float = 0.0, size: int = SIZE, **fields: Any) -> Diffusion:
    """One whose parts are all away from where they start; prompts large enough for gradients to be seen."""
    generator = torch.Generator().manual_seed(seed)
    delta = Diffusion(
        size, fields.get("length", 5), fields.get("rank", 2), fields.get("activation", "relu"), dropout
    ).double()
    for parameter in delta.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return delta


def inputs(seed: int = 1, size: int = SIZE) -> Tensor:
    return torch.randn(3, TOKENS, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def written_out(delta: Diffusion, x: Tensor, f: Callable[[Tensor], Tensor] = torch.relu) -> Tensor:
    """The formula, left to autograd."""
    keys = delta.prompt + (delta.prompt @ delta.down.T) @ delta.up.T
    A = f(x @ keys.T)
    return A.max(-1, keepdim=True).values.detach() * (A @ delta.prompt)


# ------------------------------------------------------------------------------------------------------------ the formula


@pytest.mark.parametrize("activation", ["relu", "softmax"])
def test_the_change_and_its_gradients_are_those_of_the_formula(activation: str) -> None:
    delta, x = diffusion(activation=activation), inputs().requires_grad_()
    wanted = written_out(delta, x, torch.relu if activation == "relu" else lambda s: s.softmax(-1))
    found, cotangent = delta(x), torch.randn(wanted.shape, dtype=torch.float64)
    torch.testing.assert_close(found, wanted)
    every = [x, *delta.parameters()]
    for one, other in zip(
        torch.autograd.grad((found * cotangent).sum(), every),
        torch.autograd.grad((wanted * cotangent).sum(), every),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_dropout_acts_on_scores_before_their_maximum() -> None:
    delta, x = diffusion(dropout=0.4), inputs().requires_grad_()
    torch.manual_seed(5)
    kept = torch.empty(3, TOKENS, 5, dtype=torch.bool).bernoulli_(0.6)
    assert 0.4 < float(kept.double().mean()) < 0.8
    torch.manual_seed(5)
    found, wanted = delta.train()(x), written_out(delta, x, lambda s: torch.relu(s) * kept / 0.6)
    torch.testing.assert_close(found, wanted)
    every = [x, *delta.parameters()]
    mine, theirs = (torch.autograd.grad(y.square().sum(), every) for y in (found, wanted))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(delta.eval()(x), written_out(delta, x))


def test_half_precision_does_not_overflow_where_the_parts_do_not() -> None:
    delta, x = diffusion(), inputs()
    with torch.no_grad():
        delta.prompt.mul_(20)
    wanted = written_out(delta, x).detach()
    assert float(wanted.abs().max()) > 7e4  # above what float16 holds, though neither A nor A P is
    found = delta.half()(x.half()).detach()
    assert found.dtype == torch.float32 and bool(torch.isfinite(found).all())
    assert float((found - wanted).norm() / wanted.norm()) < 1e-2


def bert(method: pt.Method, **options: Any) -> tuple[nn.Module, pt.Adaptation]:
    model = toys.model("bert").double()
    return model, pt.attach(model, method, train_head=False, **options)


@pytest.mark.parametrize("family", ["bert", "vit", "t5"])
def test_x_is_what_goes_in_and_y_what_leaves_the_projection(family: str) -> None:
    """By hooks of the test's own on a bare model, in encoders, decoders and beside cross-attention."""
    model, batch = toys.model(family), tiny.batch(family)
    hand = copy.deepcopy(model)
    tuned = pt.attach(model, APT(length=3), train_head=False)
    toys.shake(tuned)
    sites = {slot.site.key: slot.site for slot in tuned.slots}
    for key, site in sites.items():
        grow, scale = (next(s.delta for s in tuned.slots if s.site.key == key and isinstance(s.delta, kind))
                       for kind in (Diffusion, Scale))  # fmt: skip
        held: dict[str, Tensor] = {}

        def before(module: nn.Module, args: Any, kwargs: Any, held: Any = held) -> None:
            held["x"] = args[0] if args else kwargs["hidden_states"]

        def after(
            module: nn.Module, args: Any, y: Tensor, held: Any = held, grow: Any = grow, scale: Any = scale
        ) -> Tensor:
            return (y + written_out(grow, held["x"])) * scale.log_scale.exp()

        core, projection = hand.get_submodule(site.path), hand.get_submodule(site.exit)
        core.register_forward_pre_hook(before, with_kwargs=True)
        projection.register_forward_hook(after)
    torch.testing.assert_close(toys.output(model, batch), toys.output(hand, batch), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- must hold


# 1
def test_the_published_counts() -> None:
    from transformers import BridgeTowerConfig, BridgeTowerForImageAndTextRetrieval, ViltConfig, ViltModel

    each = 200 * 768 + 2 * 768 * 4 + 1
    with torch.device("meta"):
        vilt, two_streams = ViltModel(ViltConfig()), BridgeTowerForImageAndTextRetrieval(BridgeTowerConfig())
    tuned = pt.attach(vilt, APT())
    assert tuned.trainable == 12 * each == 1_916_940
    # METER's fusion encoder, here BridgeTower's: six layers for each stream, with an attention of each kind
    roles = [f"{stack}:{role}" for stack in ("decoder", "decoder2") for role in ("attention", "cross_attention")]
    tuned = pt.attach(two_streams, APT(roles=roles), train_head=False)
    assert tuned.trainable == 24 * each == 3_833_880
    assert {slot.site.stack for slot in tuned.slots} == {"decoder", "decoder2"}


def test_both_attentions_of_a_decoder_by_default() -> None:
    tuned = pt.attach(tiny.model("bart"), APT(length=3, rank=2))
    assert tuned.trainable == 6 * (3 * 32 + 2 * 32 * 2 + 1)
    assert sum(slot.site.role == "cross_attention" for slot in tuned.slots) == 2 * 2
    fixed = pt.attach(
        tiny.model("bart"), APT(length=3, rank=2, learn_scale=False, roles=["cross_attention"], layers=[1])
    )
    assert fixed.trainable == 3 * 32 + 2 * 32 * 2


def test_attentions_of_a_diffusion_model() -> None:
    pytest.importorskip("diffusers", reason="needs diffusers: pip install 'petiole[diffusers]'")
    model, batch = tiny.model("unet"), tiny.batch("unet")
    tuned = pt.attach(model, APT(length=3))
    attentions = [
        s for stack in pt.anatomy(model).stacks for b in stack.blocks for s in b.sites if s.role.endswith("attention")
    ]
    assert len({slot.site.key for slot in tuned.slots}) == len(attentions) == 8
    tuned.check(batch, loss=lambda found: found.sample.square().mean())


def test_pooler_and_token_types_train_in_place_if_asked() -> None:
    model, batch = tiny.model("vilt"), tiny.batch("vilt")
    tuned = pt.attach(model, APT(length=3, rank=2, train_pooler=True), train_head=False)
    assert tuned.trainable == 2 * (3 * 32 + 2 * 32 * 2 + 1) + (32 * 32 + 32) + 2 * 2 * 32  # and a pooler, two tables
    before = toys.output(model, batch)
    tuned.check(batch)
    toys.shake(tuned)
    assert not torch.equal(toys.output(model, batch), before)
    with pytest.raises(AttachError, match="train_pooler=True, but LlamaForCausalLM has neither"):
        pt.attach(tiny.model("llama"), APT(train_pooler=True))


# 2
def test_sequence_attention_and_cache_are_as_they_were() -> None:
    model, batch = tiny.model("llama", attn_implementation="eager"), tiny.batch("llama")
    given = {
        "input_ids": batch["input_ids"],
        "use_cache": True,
        "output_attentions": True,
        "output_hidden_states": True,
    }
    bare = model(**given)
    toys.shake(pt.attach(model, APT(length=3)))
    found = model(**given)
    assert found.logits.shape == bare.logits.shape
    assert [a.shape for a in found.attentions] == [a.shape for a in bare.attentions]
    assert torch.equal(found.attentions[0], bare.attentions[0])  # nothing before the first block's change has moved
    cache = getattr(found, "past_key_values", None) or found.cache
    assert cache.get_seq_length() == batch["input_ids"].shape[1]


# 3
@pytest.mark.parametrize("family", ["bert", "llama", "vit", "t5"])
def test_without_prompts_it_is_the_frozen_model(family: str) -> None:
    model, batch = toys.model(family).requires_grad_(False), tiny.batch(family)
    bare = toys.output(model, batch)
    tuned = pt.attach(model, APT(length=3), train_head=False)
    assert not torch.equal(toys.output(model, batch), bare)
    for slot in tuned.slots:
        if isinstance(slot.delta, Diffusion):
            set_(slot.delta.prompt, torch.zeros_like(slot.delta.prompt))
    assert torch.equal(toys.output(model, batch), bare)


def test_it_starts_close_to_the_frozen_model_but_not_at_it() -> None:
    model, _ = bert(APT(length=200))
    delta = next(slot.delta for slot in pt.adaptations(model)["default"].slots if isinstance(slot.delta, Diffusion))
    assert abs(float(delta.prompt.detach().std()) - 0.02) < 1e-3 and abs(float(delta.down.detach().std()) - 1) < 0.2
    assert not delta.up.any() and torch.equal(delta.keys(), delta.prompt)


# 4
def test_a_token_changes_its_own_update_alone() -> None:
    delta, x = diffusion(), inputs()
    before, changed = delta(x), x.clone()
    changed[1, 3] += 1
    differs = (delta(changed) != before).any(-1)
    assert differs.nonzero().tolist() == [[1, 3]]


# 5
def test_the_maximum_carries_no_gradient() -> None:
    delta, x = diffusion(), inputs()
    (found,) = torch.autograd.grad(delta(x).square().sum(), [delta.prompt])
    keys = delta.prompt + (delta.prompt @ delta.down.T) @ delta.up.T
    A = torch.relu(x @ keys.T)
    with_it = A.max(-1, keepdim=True).values * (A @ delta.prompt)
    (other,) = torch.autograd.grad(with_it.square().sum(), [delta.prompt])
    assert not torch.allclose(found, other, rtol=0.1)


# 6
def test_in_the_first_step_w2_learns_and_w1_does_not() -> None:
    model, tuned = bert(APT(length=4))
    model(**tiny.batch("bert")).loss.backward()
    deltas = [slot.delta for slot in tuned.slots if isinstance(slot.delta, Diffusion)]
    assert len(deltas) == 2
    for delta in deltas:
        assert not delta.down.grad.any() and bool(delta.up.grad.any()) and bool(delta.prompt.grad.any())


# 7
def test_the_order_of_prompts_does_not_matter_and_twice_as_many_count_twice() -> None:
    delta, x = diffusion(), inputs()
    before = delta(x)
    other = diffusion()
    other.prompt.data = delta.prompt.data[torch.tensor([3, 0, 4, 1, 2])]
    torch.testing.assert_close(other(x), before)
    other.prompt.data = torch.cat([delta.prompt.data] * 2)
    torch.testing.assert_close(other(x), 2 * before)  # A P doubles, the maximum stays


# 8
def test_keys_are_computed_once_at_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    delta, x = diffusion().eval(), inputs()
    anew = delta(x)
    real, calls = torch.addmm, []
    monkeypatch.setattr(torch, "addmm", lambda *a: (calls.append(1), real(*a))[1])
    with torch.no_grad():
        torch.testing.assert_close(delta(x), anew, rtol=1e-6, atol=1e-6)
        assert torch.equal(delta(x), delta(x)) and len(calls) == 1
        delta.up.add_(1)  # another K, even where nobody says so
        torch.testing.assert_close(delta(x), written_out(delta, x))
        assert len(calls) == 2
        delta.float()
        assert delta(x.float()).dtype == torch.float32 and len(calls) == 3
        delta.train().eval()
        delta(x.float())
        assert len(calls) == 4
    delta(x.float())
    delta(x.float())
    assert len(calls) == 6  # where a gradient is wanted, anew


# 9
@pytest.mark.parametrize("family", ["bert", "vit"])
def test_multiply_adds_are_exactly_those_of_two_products(family: str) -> None:
    m, h, d = 6, 2, 32
    with torch.device("meta"):
        bare, attached = (tiny.model(family, num_hidden_layers=3) for _ in range(2))
    pt.attach(attached, APT(length=m, rank=h), train_head=False)
    batch = tiny.batch(family)
    tokens = 2 * (7 if family == "bert" else 5)  # rows; an image of 2 x 2 patches and its class token
    more = predict(attached, batch).forward_flops - predict(bare, batch).forward_flops
    assert more == 2 * 3 * (2 * tokens * m * d + 2 * m * d * h)


# 10
def test_tokens_that_no_key_points_at_get_nothing() -> None:
    delta = diffusion()
    keys = delta.keys().detach()
    away = -keys.sum(0)
    while not bool((keys @ away < 0).all()):  # a direction that no key has a part of
        away = away - keys[(keys @ away).argmax()]
    x = torch.stack([away, -away])[None]
    change = delta(x)
    assert not change[0, 0].any() and bool(change[0, 1].any())


def test_the_whole_attention_output_is_scaled() -> None:
    model, tuned = bert(APT(length=3))
    projection = model.get_submodule(tuned.slots[0].site.exit)
    seen: list[Tensor] = []
    projection.register_forward_hook(lambda module, args, y: seen.append(y))
    toys.output(model, tiny.batch("bert"))
    with torch.no_grad():
        tuned.slots[1].delta.log_scale.fill_(0.5)
    toys.output(model, tiny.batch("bert"))
    torch.testing.assert_close(seen[1], seen[0] * torch.tensor(0.5).exp().double())


# ------------------------------------------------------------------------------------------------------- dropout, refusals


@pytest.mark.parametrize(
    ("family", "field"),
    [("bert", "attention_probs_dropout_prob"), ("gpt2", "attn_pdrop"), ("llama", "attention_dropout"), ("t5", "dropout_rate"),
     ("vit", "attention_probs_dropout_prob"), ("vilt", "attention_probs_dropout_prob"), ("bart", "attention_dropout")],
)  # fmt: skip
def test_dropout_is_that_of_the_models_attention(family: str, field: str) -> None:
    tuned = pt.attach(tiny.model(family, **{field: 0.25}), APT(length=3))
    assert {slot.delta.dropout for slot in tuned.slots if isinstance(slot.delta, Diffusion)} == {0.25}
    tuned = pt.attach(tiny.model(family, **{field: 0.25}), APT(length=3, dropout=0.5))
    assert {slot.delta.dropout for slot in tuned.slots if isinstance(slot.delta, Diffusion)} == {0.5}


def test_what_is_kept_for_the_backward_pass() -> None:
    """X and nothing of the size of A, but a byte for each of its numbers under dropout."""
    for rate in (0.0, 0.5):
        delta, x = diffusion(dropout=rate, length=40).train(), inputs().requires_grad_()
        kept: dict[int, Tensor] = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t, k=kept: k.setdefault(id(t), t), lambda t: t):  # type: ignore[misc]
            delta(x)
        own = {tensor.data_ptr() for tensor in (x, *delta.parameters())}
        rest = [t for t in kept.values() if t.data_ptr() not in own and t.shape[:-1] == x.shape[:-1]]
        assert [t.dtype for t in rest] == ([torch.bool] if rate else [])


@pytest.mark.parametrize(
    "fields",
    [
        {"length": 0},
        {"rank": 0},
        {"dropout": 1.0},
        {"activation": "tanh"},
        {"roles": ["ffn"]},
        {"roles": ["q"]},
        {"roles": []},
    ],
)
def test_values_that_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"APT.{next(iter(fields))}"):
        APT(**fields)


def test_places_that_are_refused() -> None:
    with pytest.raises(AttachError, match=r"rank = 33 is above the width 32 of encoder\.0\.attention: 1 to 32"):
        pt.attach(tiny.model("bert"), APT(rank=33))
    for family in ("resnet", "mamba"):
        with pytest.raises(AttachError, match="has no attention"):
            pt.attach(tiny.model(family), APT())
    with pytest.raises(AnatomyError, match="cross_attention"):
        pt.attach(tiny.model("bert"), APT(roles=["cross_attention"]))
