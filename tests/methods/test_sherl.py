"""What SHERL must hold, by the numbers of its specification."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

import petiole as pt
import tiny
import toys
from beside import assert_cached_alike, assert_cost_is_predicted, assert_no_graph_below, assert_refused, random
from linears import set_
from petiole import cost
from petiole.cache import Cache
from petiole.errors import AttachError, ConfigError
from petiole.methods.side.sherl import FinalNorm, Maps, Pooled, Sense, Sherl

FAMILIES = ("t5", "bart", "bert", "vit", "llama", "resnet", "clip")


def attached(name: str, model: nn.Module | None = None, **fields: Any) -> tuple[nn.Module, pt.Adaptation]:
    model = toys.model(name) if model is None else model
    return model, pt.attach(model, pt.SHERL(**{"reduction_factor": 4, "dropout": 0.0, **fields}), train_head=False)


def adapters(tuned: pt.Adaptation) -> list[Sherl]:
    return [slot.delta for slot in tuned.slots if isinstance(slot.delta, Sherl)]


def free(size: int = 6, **fields: Any) -> Sherl:
    """An adapter whose scores are all 1: v = 0, b = 1."""
    adapter = Sherl(pt.SHERL(**fields), "gated", [12] * 4, size, 12)
    set_(adapter.score.weight, torch.zeros(1, size))
    set_(adapter.score.bias, torch.ones(1))
    return adapter


# 1
@pytest.mark.parametrize("name", FAMILIES)
def test_early_layers_leave_no_graph_and_late_ones_no_gradient(name: str) -> None:
    model, tuned = attached(name, tiny.model(name))
    assert_no_graph_below(model, adapters(tuned)[0], tiny.batch(name)).backward()
    trained = {id(p) for p in tuned.parameters()}
    assert all(not p.requires_grad and p.grad is None for p in model.parameters() if id(p) not in trained)
    for adapter in adapters(tuned):
        assert adapter.senses[-1].W1.weight.grad.abs().max() > 0


# 2
def test_the_papers_count() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    with torch.device("meta"):
        model = T5ForConditionalGeneration(T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12))
    backbone = sum(p.numel() for p in model.parameters())
    layers = (1, 2, 3, 5, 6, 7, 9, 10, 11)
    tuned = pt.attach(model, pt.SHERL(states=(0, *(layer + 1 for layer in layers))))
    assert [len(adapter.senses) for adapter in adapters(tuned)] == [10, 9]
    assert tuned.trainable == 1_907_236
    assert round(100 * tuned.trainable / backbone, 3) == 0.856


@pytest.mark.parametrize("sensing", ["gated", "norm"])
def test_the_counts_formula(sensing: Any) -> None:
    _, tuned = attached("bert", tiny.model("bert", num_hidden_layers=4), sensing=sensing)
    K, D, d = 4, 32, 8
    each = D * d + (2 * d * d + 3 * d if sensing == "gated" else 3 * d)
    assert tuned.trainable == K * each + (d + 1) + 1 + (d * D + D) + (2 * D if sensing == "norm" else 0)


# 3
def test_at_the_start_the_usual_feature_does_not_count() -> None:
    adapter = free()
    x, last = [random(2, 5, 6, seed=k) for k in range(4)], random(2, 5, 12, seed=9)
    y = adapter.fused(x, last)
    assert torch.equal(y, adapter.fused(x, 0 * last))
    (slope,) = torch.autograd.grad(y.sum(), adapter.gate)
    torch.testing.assert_close(slope[0], 10 * last.sum())


# 4
def test_equal_states_share_alike_and_each_group_gets_a_half() -> None:
    adapter = free()
    x, g = random(1, 1, 6), random(1, 1, 6, seed=1)
    for count in (1, 2, 5):
        w = adapter.weights(x.unsqueeze(2).expand(1, 1, count, 6), g)
        torch.testing.assert_close(w, torch.full((1, 1, count), 1 / count), rtol=1e-4, atol=1e-4)
    one, other = torch.eye(6)[0], torch.eye(6)[1]
    for p, q in ((1, 1), (3, 2), (1, 7)):
        w = adapter.weights(torch.stack([one] * p + [other] * q)[None, None], g)[0, 0]
        torch.testing.assert_close(w, torch.tensor([1 / (2 * p)] * p + [1 / (2 * q)] * q), rtol=1e-4, atol=1e-4)


def test_weights_are_the_formula() -> None:
    adapter = Sherl(pt.SHERL(), "gated", [12] * 4, 6, 12)
    X, g = random(2, 3, 5, 6), random(2, 3, 6, seed=1)
    found = adapter.weights(X, g)
    for b in range(2):
        for t in range(3):
            n = [x / (x.norm() + 1e-6) for x in X[b, t]]
            R = torch.stack([sum(torch.relu(a @ c) for c in n) for a in n])
            assert bool((R >= 0.999).all() and (R <= 5.001).all())
            raw = torch.stack([torch.relu(adapter.score(x * g[b, t]))[0] for x in X[b, t]]) / R
            torch.testing.assert_close(found[b, t], raw / (raw.sum() + 1e-6), rtol=1e-5, atol=1e-6)


# 5
def test_weights_sum_to_one_or_to_nothing() -> None:
    adapter = free()
    X, g = random(2, 3, 4, 6), random(2, 3, 6, seed=1)
    w = adapter.weights(X, g)
    assert bool((w >= 0).all())
    torch.testing.assert_close(w.sum(-1), torch.ones(2, 3), rtol=1e-4, atol=1e-4)
    set_(adapter.score.bias, -torch.ones(1))
    assert torch.equal(adapter.guided(list(X.unbind(2)), g), g)
    assert bool(torch.isfinite(adapter.guided([torch.zeros(2, 3, 6)] * 4, g)).all())


# 6, 7
def test_shallow_states_have_no_order_and_tokens_keep_to_themselves() -> None:
    adapter = Sherl(pt.SHERL(), "gated", [12] * 4, 6, 12)
    states, last = [random(2, 5, 12, seed=k) for k in range(4)], random(2, 5, 12, seed=9)
    y = adapter(states, [], last)
    other = [s.index_fill(1, torch.tensor([2]), 7.0) for s in states]
    moved = adapter(other, [], last)
    keep = [0, 1, 3, 4]
    torch.testing.assert_close(moved[:, keep], y[:, keep])
    assert not torch.allclose(moved[:, 2], y[:, 2])
    order = [2, 0, 1, 3]
    adapter.senses = nn.ModuleList(adapter.senses[i] for i in order)
    torch.testing.assert_close(adapter([states[i] for i in order], [], last), y)


# 8
def test_each_late_layer_adds_its_activations() -> None:
    found = []
    for late in range(4):
        model, _ = attached("bert", tiny.model("bert", num_hidden_layers=6), num_late_layers=late, states=(0, 1))
        found.append(cost.saved_bytes(model, tiny.batch("bert")))
    steps = [b - a for a, b in pairwise(found)]
    assert steps[0] > 0
    assert abs(steps[1] - steps[2]) <= 0.05 * steps[1]


# 9
@pytest.mark.parametrize("name", ["t5", "bart", "bert", "vit", "llama", "gpt2", "resnet", "clip"])
def test_with_the_gate_wide_open_it_is_the_backbone(name: str) -> None:
    model, batch = toys.model(name), tiny.batch(name)
    before = toys.output(model, batch)
    _, tuned = attached(name, model, copy_norm=True)
    assert not torch.allclose(toys.output(model, batch), before, atol=1e-3)
    for adapter in adapters(tuned):
        for module in adapter.out:
            for parameter in module.parameters():
                set_(parameter, torch.zeros_like(parameter))
        if adapter.gate is not None:
            set_(adapter.gate, torch.full((1,), 10.0))
    torch.testing.assert_close(toys.output(model, batch), before, rtol=1e-5, atol=1e-5)


def test_new_final_norms_start_at_one() -> None:
    model = tiny.model("t5")
    set_(model.decoder.final_layer_norm.weight, torch.full((32,), 2.0))
    for copied, value in ((False, 1.0), (True, 2.0)):
        _, tuned = attached("t5", model, copy_norm=copied)
        (norm,) = (slot.delta.norm for slot in tuned.slots if isinstance(slot.delta, FinalNorm))
        assert torch.equal(norm.weight, torch.full((32,), value))
        tuned.detach()


# 10
@pytest.mark.parametrize("name", ["t5", "bart", "llama"])
@pytest.mark.parametrize("late", [0, 1])
def test_decoding_with_a_cache_is_teacher_forcing(name: str, late: int) -> None:
    model, tuned = attached(name, num_late_layers=late)
    toys.shake(tuned)
    tokens = tiny.batch(name)["input_ids"]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    found = model.generate(tokens, return_dict_in_generate=True, output_logits=True, **options)
    inputs = {"input_ids": found.sequences[:, :-1]}
    if model.config.is_encoder_decoder:
        inputs = {"decoder_input_ids": found.sequences[:, :-1], "input_ids": tokens}
    with torch.no_grad():
        logits = model(**inputs).logits[:, -5:]
    torch.testing.assert_close(torch.stack(found.logits, 1), logits, rtol=1e-4, atol=1e-4)
    beams = [model.generate(tokens, num_beams=3, use_cache=use, **options) for use in (True, False)]
    assert torch.equal(*beams)


def test_the_late_layers_of_a_decoder_look_into_the_side_encoder() -> None:
    model, _ = attached("t5")
    batch, given = tiny.batch("t5"), {}
    for depth in (0, 1):
        inner = model.decoder.block[depth].layer[1].EncDecAttention
        inner.register_forward_pre_hook(
            lambda m, args, kwargs, depth=depth: given.update({depth: kwargs["key_value_states"]}), with_kwargs=True
        )
    output = model(**batch)
    assert torch.equal(given[0], output.encoder_last_hidden_state)
    assert given[1].requires_grad
    assert not torch.allclose(given[1], given[0], atol=1e-2)


# the forms


def test_sensing_is_the_formula() -> None:
    h = random(2, 5, 12)
    gated = Sense("gated", 12, 6)
    u = torch.relu(gated.W1(h))
    torch.testing.assert_close(gated(h), (gated.W2(u) + u) * torch.sigmoid(gated.W3(u)))
    norm = Sense("norm", 12, 6)
    torch.testing.assert_close(norm(h), nn.functional.layer_norm(norm.W1(h), (6,)))
    pooled = Sense("pooled", 12, 6)
    torch.testing.assert_close(pooled(h), pooled.W1(torch.relu(h)))


def test_maps_are_pooled_by_maximum_plus_mean() -> None:
    F = random(2, 3, 8, 4)
    cell = F[:, :, 4:8, 2:4]
    found = Maps.pool(F, torch.Size((2, 2)))
    torch.testing.assert_close(found[:, :, 1, 1], cell.amax((2, 3)) + cell.mean((2, 3)))
    torch.testing.assert_close(Maps.pool(F, torch.Size((8, 4))), 2 * F)
    with pytest.raises(AttachError, match="no multiple of the last"):
        Maps.pool(F, torch.Size((3, 2)))


def test_a_tower_is_fused_into_its_embedding() -> None:
    adapter = Pooled(pt.SHERL(pool_gate=True), "pooled", [12, 12, 12, 9], 6, 9)
    states, g = [random(2, 5, 12, seed=k) for k in range(3)], random(2, 9, seed=5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    found = adapter.embedding(states, g, mask, torch.tensor([1, 2]))
    guide, vectors = adapter.senses[-1](g), []
    for j in range(3):
        x = adapter.senses[j](states[j])
        s = torch.relu(mask * adapter.spatial[j](guide[:, None] * x)[..., 0])
        s = s / (s.sum(-1, keepdim=True) + 1e-6)
        vectors.append((s[..., None] * x).sum(1) + torch.sigmoid(torch.tensor(10.0)) * torch.stack([x[0, 1], x[1, 2]]))
    w = adapter.weights(torch.stack(vectors, 1)[:, None], guide[:, None])[:, 0]
    G = guide + (w[..., None] * torch.stack(vectors, 1)).sum(1)
    torch.testing.assert_close(found, g + adapter.out[1](torch.relu(G)))


def test_a_guide_may_have_layers_of_its_own() -> None:
    adapter = free(guide_mlp=True)
    shallow, g = [random(2, 3, 6, seed=k) for k in range(3)], random(2, 3, 6, seed=4)
    change = (adapter.weights(torch.stack(shallow, 2), g)[..., None] * torch.stack(shallow, 2)).sum(2)
    torch.testing.assert_close(adapter.guided(shallow, g), g + adapter.mlp(change))


@pytest.mark.parametrize("name", ["bert", "llama", "resnet"])
def test_the_cache_skips_all_but_the_late_layers(name: str) -> None:
    model, batch = toys.model(name), tiny.batch(name)
    _, tuned = attached(name, model)
    cache = assert_cached_alike(model, tuned, batch)
    assert [(c.stack.name, len(c.stack.blocks) - c.skipped) for c in cache.cuts][-1][1] == 1


def test_the_cache_leaves_a_decoder_whose_blocks_hand_on_a_position_bias() -> None:
    model, batch = toys.model("t5"), tiny.batch("t5")
    attached("t5", model)
    cache, losses = Cache(model), []
    for _ in range(2):
        with cache.rows(range(tiny.BATCH)):
            losses.append(model(**batch).loss)
    assert cache.hits == tiny.BATCH
    assert [cut.stack.name for cut in cache.cuts] == ["encoder"]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("name", ["t5", "bert", "resnet"])
def test_cost_is_predicted(name: str) -> None:
    model, tuned = attached(name)
    assert_cost_is_predicted(model, tuned, tiny.batch(name))


# refusals


@pytest.mark.parametrize("states", [(), (1,), (2, 1), {"encoder": (0,)}])
def test_states_that_mean_nothing_are_refused(states: Any) -> None:
    with pytest.raises(ConfigError, match="states"):
        pt.SHERL(states=states)


def test_what_does_not_fit_is_refused() -> None:
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("bert", {"reduction_factor": 3}, "does not divide the width 32; give side_size"),
        ("bert", {"num_late_layers": 2}, "num_late_layers = 2, but 'encoder' has 2 layers"),
        ("bert", {"states": (0, 2)}, "offers 0 to 1"),
        ("t5", {"states": {"encoder": (0, 1)}}, "names none of 'decoder'"),
        ("resnet", {"num_late_layers": 2}, "no early layer in the last stage"),
        ("resnet", {"sensing": "gated"}, "'cnn'"),
        ("vit", {"sensing": "pooled"}, "what fits: encoder"),
        ("swin", {}, "2 stages"),
    ]
    assert_refused(pt.SHERL, cases)
    assert attached("bert", side_size=5, reduction_factor=3)[1].slots[0].delta.senses[0].W1.out_features == 5


def test_a_last_stage_of_one_block_leaves_nothing_to_be_early() -> None:
    with pytest.raises(AttachError, match="leaves no early layer in the last stage"):
        pt.attach(tiny.model("swinv2"), pt.SHERL())
