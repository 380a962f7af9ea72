"""What p-Adapter must hold, by its paper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BlipConfig, BlipForConditionalGeneration, BlipForQuestionAnswering

import petiole as pt
import tiny
import toys
from petiole.errors import AttachError, ConfigError
from petiole.methods.adapters.p_adapter import PLaplacian, messages, pooled
from petiole.training import parameter_groups

EPS = 1e-8
HEADS, NODES, WIDTH = 3, 6, 8


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def graph(queries: int = NODES) -> tuple[Tensor, Tensor, Tensor]:
    """A (2, H, q, n) with rows of 1, nodes that ask (2, H, q, rh), nodes f (2, H, n, rh)."""
    A = numbers(2, HEADS, queries, NODES).softmax(-1)
    return A, numbers(2, HEADS, queries, WIDTH, seed=1), numbers(2, HEADS, NODES, WIDTH, seed=2)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def laplacians(tuned: pt.Adaptation) -> list[PLaplacian]:
    return [slot.delta for slot in tuned.slots if isinstance(slot.delta, PLaplacian)]


def shaken(name: str, method: pt.Method, **changes: Any) -> tuple[nn.Module, pt.Adaptation]:
    model = tiny.model(name, **changes)
    tuned = pt.attach(model, method)
    toys.shake(tuned, 0.2)
    with torch.no_grad():
        for delta in laplacians(tuned):
            delta.p.clamp_(1.1, 2.9)
    return model, tuned


# ------------------------------------------------------------------------------------------------------------- the graph


@pytest.mark.parametrize("p", [1.0, 1.25, 1.75, 2.0, 2.5])
@pytest.mark.parametrize("mu", [0.01, 0.3, 20.0])
def test_weights_of_messages_add_up_to_one(p: float, mu: float) -> None:
    """A feature that all nodes have alike moves no distance, and comes out as it went in."""
    A, _, f = graph()
    f = torch.cat([f, torch.full_like(f[..., :1], 0.7)], -1)
    o = messages(A, f, f, number(p), number(mu), EPS, keeps=True)
    torch.testing.assert_close(o[..., -1], f[..., -1], rtol=1e-6, atol=0)


def test_p_of_two_is_one_step_of_message_passing() -> None:
    A, _, f = graph()
    o = messages(A, f, f, number(2.0), number(0.4), EPS, keeps=True)
    torch.testing.assert_close(o, (A @ f + 0.4 * f) / 1.4, rtol=1e-5, atol=1e-5)


def test_a_large_mu_leaves_each_node_to_itself() -> None:
    A, own, f = graph()
    torch.testing.assert_close(messages(A, f, f, number(1.5), number(1e6), EPS, keeps=True), f, rtol=0, atol=1e-2)
    across = messages(A, own, f, number(1.5), number(1e6), EPS, keeps=False)
    assert across.abs().max() < 1e-4
    torch.testing.assert_close(messages(A, own, f, number(1.5), number(1e6), EPS, keeps=True), own, rtol=0, atol=1e-2)


def test_the_norm_is_that_of_the_paper() -> None:
    """ε is added to every component of √(A + ε) (f_i - f_j)."""
    A, own, f = graph(4)
    p, mu = 1.4, 0.2
    difference = (A + EPS).sqrt()[..., None] * (own[:, :, :, None] - f[:, :, None]) + EPS
    M = A * difference.norm(dim=-1) ** (p - 2)
    alpha = 1 / (M.sum(-1, keepdim=True) + 2 * mu / p)
    torch.testing.assert_close(
        messages(A, own, f, number(p), number(mu), EPS, keeps=False), alpha * (M @ f), rtol=1e-6, atol=1e-8
    )


def test_the_order_of_nodes_does_not_matter() -> None:
    A, own, f = graph()
    order = torch.randperm(NODES, generator=torch.Generator().manual_seed(3))
    p, mu = number(1.5), number(0.3)
    plain = messages(A, f, f, p, mu, EPS, keeps=True)
    moved = messages(A[:, :, order][..., order], f[:, :, order], f[:, :, order], p, mu, EPS, keeps=True)
    torch.testing.assert_close(moved, plain[:, :, order])
    across = messages(*(t for t in (A, own, f)), p, mu, EPS, keeps=False)
    slots, values = pooled(A[..., order], f[:, :, order], NODES, "mean")  # as many slots as tokens
    torch.testing.assert_close(messages(slots, own, values, p, mu, EPS, keeps=False), across)


def test_nodes_without_attention_add_nothing_however_far_they_are() -> None:
    for kind in (torch.float32, torch.float64):
        A, _, f = (t.to(kind) for t in graph())
        A[..., -2:] = 0
        A /= A.sum(-1, keepdim=True)
        p, mu = number(1.25).to(kind), number(0.1).to(kind)
        o = messages(A, f, f, p, mu, EPS, keeps=True)
        far = f.clone()
        far[:, :, -2:] *= 1e4
        same = f.clone()
        same[:, :, -2:] = same[:, :, :2]  # at no distance from others
        for changed in (far, same):
            found = messages(A, changed, changed, p, mu, EPS, keeps=True)
            assert found.isfinite().all()
            torch.testing.assert_close(found[:, :, :-2], o[:, :, :-2])


def test_p_and_theta_have_the_gradients_of_differences() -> None:
    model = tiny.model("bert").double()
    tuned = pt.attach(model, pt.PAdapter(reduction_factor=2))
    for slot in tuned.slots:
        slot.delta.double()
    toys.shake(tuned, 0.2)
    batch = tiny.batch("bert")
    delta = laplacians(tuned)[0]
    model(**batch).loss.backward()
    for parameter in (delta.p, delta.theta):
        assert parameter.grad is not None and parameter.grad.abs() > 0
        found = []
        for step in (1e-4, -2e-4):
            with torch.no_grad():
                parameter.add_(step)
                found.append(model(**batch).loss)
        with torch.no_grad():
            parameter.add_(1e-4)
        torch.testing.assert_close(parameter.grad, (found[0] - found[1]) / 2e-4, rtol=1e-3, atol=1e-10)


def test_mu_stays_within_its_bounds() -> None:
    delta = laplacians(pt.attach(tiny.model("bert"), pt.PAdapter(mu=0.4, reduction_factor=2)))[0]
    assert float(delta.mu.detach()) == pytest.approx(0.8)
    for theta in (-30.0, -1.0, 1.0, 30.0):
        with torch.no_grad():
            delta.theta.fill_(theta)
        assert 0.4 <= float(delta.mu.detach()) <= 1.2 + 1e-6


@pytest.mark.parametrize("scale", ["mean", "sum"])
def test_pooling(scale: Any) -> None:
    A, _, f = graph()
    slots, values = pooled(A, f, 3, scale)
    assert slots.shape == (2, HEADS, NODES, 3) and values.shape == (2, HEADS, 3, WIDTH)
    torch.testing.assert_close(slots.sum(-1), torch.full_like(slots[..., 0], 0.5 if scale == "mean" else 1.0))
    torch.testing.assert_close(values[:, :, 1], f[:, :, 2:4].mean(2))


# ------------------------------------------------------------------------------------------------------------- in models


def test_a_query_that_sees_nothing_stays_a_row_of_zeros() -> None:
    for scale in ("mean", "sum"):
        A, _ = pooled(torch.zeros(1, 1, 2, 6), torch.ones(1, 1, 6, 3), 4, scale)  # type: ignore[arg-type]
        assert torch.equal(A, torch.zeros(1, 1, 2, 4))


def test_counts_of_the_paper() -> None:
    """BLIP base: captions adapt the text decoder, questions text encoder and decoder; the tower that sees is left alone."""
    with torch.device("meta"):
        captions, questions = BlipForConditionalGeneration(BlipConfig()), BlipForQuestionAnswering(BlipConfig())
    tuned = pt.attach(captions, pt.PAdapter(), train_head=False)
    assert tuned.trainable == 7_111_344 and not any(slot.site.stack == "vision" for slot in tuned.slots)
    by_slot = [sum(p.numel() for p in slot.delta.parameters()) for slot in tuned.slots]
    assert sorted(set(by_slot)) == [148_320, 222_146] and by_slot.count(222_146) == 24
    assert pt.attach(questions, pt.PAdapter(), train_head=False).trainable == 14_222_688


def blip() -> tuple[nn.Module, dict[str, Any]]:
    """Small, with an image of 4 patches and texts of which the second ends in padding."""
    text = {
        "vocab_size": 40, "hidden_size": 32, "encoder_hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "sep_token_id": 2,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 8, "patch_size": 4,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision)).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 40, (2, 6), generator=generator)
    ids[1, 4:] = 0
    return model, {
        "pixel_values": torch.randn(2, 3, 8, 8, generator=generator),
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "labels": ids.masked_fill(ids == 0, -100),
    }


@pytest.mark.filterwarnings("ignore:p-adapter")
def test_captions_train_and_are_generated_alike_with_and_without_a_cache() -> None:
    model, batch = blip()
    tuned = pt.attach(model, pt.PAdapter(reduction_factor=4, pool_len=3))
    toys.shake(tuned, 0.2)
    model(**batch).loss.backward()
    for delta in laplacians(tuned):
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in delta.parameters())
    options = {"pixel_values": batch["pixel_values"], "max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6}
    with_cache = model.generate(**options, use_cache=True)
    assert torch.equal(with_cache, model.generate(**options, use_cache=False))


def test_the_cache_of_the_reference_is_another_graph() -> None:
    model, _ = shaken("llama", pt.PAdapter(reduction_factor=2, reference_cache=True))
    ids = tiny.batch("llama")["input_ids"]
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :-1], use_cache=True)
        last = model(ids[:, -1:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(first.logits, whole[:, :-1])
    assert (last - whole[:, -1:]).abs().max() > 1e-4
    model, _ = shaken("llama", pt.PAdapter(reduction_factor=2))
    with torch.no_grad():
        first = model(ids[:, :-1], use_cache=True)
        torch.testing.assert_close(
            model(ids[:, -1:], past_key_values=first.past_key_values).logits, model(ids).logits[:, -1:]
        )


def test_no_token_sees_what_comes_later() -> None:
    model, _ = shaken("llama", pt.PAdapter(reduction_factor=2))
    ids = tiny.batch("llama")["input_ids"]
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 5) % 30
    with torch.no_grad():
        torch.testing.assert_close(model(other).logits[:, :-1], model(ids).logits[:, :-1])


def test_with_nothing_going_up_the_model_is_the_frozen_one() -> None:
    for name in ("bert", "t5"):
        model, batch = tiny.model(name), tiny.batch(name)
        bare = model(**batch).logits
        pt.attach(model, pt.PAdapter(reduction_factor=2, pool_len=3, init="zero_up"))
        # Attention that shows its probabilities rounds otherwise than a fused one.
        torch.testing.assert_close(model(**batch).logits, bare, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_padding_changes_nothing_and_rows_stand_alone(kind: torch.dtype) -> None:
    model, _ = shaken("bert", pt.PAdapter(reduction_factor=2, p_self=1.25))
    model = model.to(kind)
    ids = torch.randint(3, 40, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    other = ids.clone()
    other[1, 4:] = 3  # all alike: at no distance from one another
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask).logits
        assert found.isfinite().all()
        precise = {"rtol": 1e-5, "atol": 1e-5} if kind == torch.float32 else {"rtol": 0.1, "atol": 0.05}
        torch.testing.assert_close(model(input_ids=other, attention_mask=mask).logits, found, **precise)
        alone = model(input_ids=ids[1:2, :4]).logits
        torch.testing.assert_close(alone, found[1:2], **precise)


@pytest.mark.filterwarnings("ignore:p-adapter")
def test_options_across_change_what_comes_out() -> None:
    batch, found = tiny.batch("t5"), {}
    variants: dict[str, dict[str, Any]] = {
        "plain": {},
        "pool_len": {"pool_len": 4},
        "row_scale": {"row_scale": "sum"},
        "cross_source_term": {"cross_source_term": "self"},
    }
    for name, fields in variants.items():
        model, _ = shaken("t5", pt.PAdapter(**{"reduction_factor": 2, "pool_len": 3, **fields}))
        found[name] = model(**batch).logits
    for name in list(variants)[1:]:
        assert (found[name] - found["plain"]).abs().max() > 1e-4, name


def watched(function: Callable[[Tensor], Tensor], seen: list[Tensor]) -> Callable[[Tensor], Tensor]:
    def run(heads: Tensor) -> Tensor:
        seen.append(function(heads))
        return seen[-1]

    return run


def test_other_changes_of_the_output_projection_stay_out_of_the_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    mine = pt.PAdapter(reduction_factor=2, targets=("self",), layers=(0,))
    for methods in ([mine], [mine, pt.LoRA(rank=2, roles=("o",))]):
        model = tiny.model("bert")
        tuned = pt.attach(model, methods)
        for slot in tuned.slots:
            if slot.number == 1:
                nn.init.ones_(slot.delta.get_parameter("B"))
        delta = laplacians(tuned)[0]
        monkeypatch.setattr(delta, "features", watched(delta.features, seen))
        model(**tiny.batch("bert"))
    assert torch.equal(seen[0], seen[1])


def test_p_may_stay_fixed_and_never_decays() -> None:
    model = tiny.model("bert")
    tuned = pt.attach(model, pt.PAdapter(reduction_factor=2, learnable_p=False, p_self=2.0))
    assert not any(delta.p.requires_grad for delta in laplacians(tuned))
    tuned.detach()
    tuned = pt.attach(model, pt.PAdapter(reduction_factor=2))
    groups = parameter_groups(model, learning_rate=1.0, weight_decay=0.1)
    spared = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    assert all(id(p) in spared for delta in laplacians(tuned) for p in (delta.p, delta.theta))


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"p_self": 0}, "p_self"),
        ({"p_cross": 3.5}, "clamp_p"),
        ({"clamp_p": (0.0, 3.0)}, "clamp_p"),
        ({"mu": 0}, "mu"),
        ({"pool_len": 0}, "pool_len"),
        ({"eps": 0.0}, "eps"),
        ({"targets": ()}, "targets"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        pt.PAdapter(**fields)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(AttachError, match="reduction_factor = 3 does not divide the head width 8"):
        pt.attach(tiny.model("bert"), pt.PAdapter(reduction_factor=3))
    with pytest.raises(AttachError, match="ffn_reduction_factor = 64"):
        pt.attach(tiny.model("bert"), pt.PAdapter(reduction_factor=2, ffn_reduction_factor=64))
    with pytest.raises(AttachError, match="needs attention probabilities"):
        pt.attach(tiny.model("torch_encoder"), pt.PAdapter(reduction_factor=2))


def test_more_slots_than_tokens_are_warned_of() -> None:
    model, _ = shaken("t5", pt.PAdapter(reduction_factor=2, pool_len=50))
    with pytest.warns(UserWarning, match="pool_len = 50"):
        model(**tiny.batch("t5"))
