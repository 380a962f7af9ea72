"""What UniPT must hold, by the numbers of its specification."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petiole as pt
import tiny
import toys
from beside import assert_cached_alike, assert_cost_is_predicted, assert_no_graph_below, assert_refused, random
from linears import set_
from petiole.errors import AttachError, ConfigError
from petiole.methods.side.unipt import Head, StageHead, interaction

FAMILIES = ("t5", "bert", "vit", "llama", "resnet", "clip")


def attached(name: str, model: nn.Module | None = None, **fields: Any) -> tuple[nn.Module, pt.Adaptation]:
    model = toys.model(name) if model is None else model
    return model, pt.attach(model, pt.UniPT(**{"reduction_factor": 4, **fields}), train_head=False)


# 1
@pytest.mark.parametrize("name", FAMILIES)
def test_the_backbone_gets_no_gradient_and_leaves_no_graph(name: str) -> None:
    model, tuned = attached(name, tiny.model(name))
    assert_no_graph_below(model, tuned.slots[0].delta, tiny.batch(name)).backward()
    trained = {id(p) for p in tuned.parameters()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in trained)


# 2, 3
def test_the_papers_counts() -> None:
    from transformers import BertConfig, BertModel, ResNetConfig, ResNetModel

    with torch.device("meta"):
        text = BertModel(BertConfig(), add_pooling_layer=False)
        image = ResNetModel(ResNetConfig(hidden_sizes=[256, 512, 1024, 2048], depths=[3, 4, 23, 3]))
    assert pt.attach(text, pt.UniPT(out_size=1024)).trainable == 5_921_281
    assert pt.attach(image, pt.UniPT(out_size=1024)).trainable == 6_433_537


@pytest.mark.parametrize("states", ["all", (0, 2)])
def test_the_counts_formula(states: Any) -> None:
    _, tuned = attached("bert", states=states)
    M, D, E, d = 3 if states == "all" else 2, 32, 32, 8
    assert tuned.trainable == M * (D * d + 3 * d) + (d * d + 3 * d) + (d * E + E) + (d + 1)


# 4
def test_rows_sum_to_one_or_to_nothing() -> None:
    a, z = random(3, 5, 8), random(3, 5, 8, seed=1)
    z[..., -1], a[..., -1] = 1, 0  # a feature that is 1 in every token sums the row, and scores nothing
    z[0, :, :-1], a[0, :, :-1] = z[0, :, :-1].abs(), -a[0, :, :-1].abs()
    u = interaction(a, z, None)
    sums = u[..., -1]
    assert bool((sums[0] == 0).all())
    assert bool((((sums[1:] > 1 - 1e-5) & (sums[1:] <= 1 + 1e-6)) | (sums[1:] == 0)).all())
    assert bool((u[0] == 0).all()), "no positive score: u = z"
    S = torch.relu(a[1] @ z[1].T)
    torch.testing.assert_close(u[1], (S / (S.sum(-1, keepdim=True) + 1e-8)) @ z[1])


# 5, 7
def parts(count: int) -> tuple[Head, list[Tensor]]:
    head = Head([12] * count, 6, 10)
    for seed, parameter in enumerate(head.parameters()):
        set_(parameter, random(*parameter.shape, seed=seed))
    return head, [random(2, 5, 12, seed=i) for i in range(count)]


def features(head: Head, states: list[Tensor], mask: Tensor | None = None) -> Tensor:
    z = head.small(states, states[-1])
    return head.up(head.joined(z[-1], z, mask, z[:-1]))


def test_states_have_no_order() -> None:
    head, states = parts(4)
    expected = features(head, states)
    order = [2, 0, 1, 3]
    for name in ("down", "norms"):
        setattr(head, name, nn.ModuleList(getattr(head, name)[i] for i in order))
    torch.testing.assert_close(features(head, [states[i] for i in order]), expected)
    assert not torch.allclose(features(head, states), expected)


def test_confidence_sums_to_one() -> None:
    head, states = parts(4)
    z = head.small(states, states[-1])
    same = [torch.ones(2, 5, 6)] * 3
    torch.testing.assert_close(head.aggregate(z[-1].mean(1, keepdim=True), z[:-1], same, None), same[0])


def test_of_two_states_there_is_nothing_to_choose() -> None:
    head, states = parts(2)
    features(head, states).sum().backward()
    assert head.gate.weight.grad.abs().max() < 1e-6
    z = head.small(states, states[-1])
    u = interaction(z[1], z[0], None) + z[0]
    torch.testing.assert_close(features(head, states), head.up(z[1] + head.projection(u)))


# 6, 10
@pytest.mark.parametrize("name", ["bert", "t5"])
def test_padding_changes_nothing(name: str) -> None:
    model, tuned = attached(name)
    toys.shake(tuned)
    batch = tiny.batch(name)
    short = {k: v.clone() for k, v in batch.items()}
    short["attention_mask"][:, 5:] = 0
    expected = toys.output(model, short)
    changed = {**short, "input_ids": short["input_ids"].clone()}
    changed["input_ids"][:, 5:] = 3
    torch.testing.assert_close(toys.output(model, changed), expected, rtol=1e-5, atol=1e-5)
    cut = {k: v[:, :5] if k in ("input_ids", "attention_mask") else v for k, v in short.items()}
    torch.testing.assert_close(toys.output(model, cut), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(toys.output(model, batch), expected, atol=1e-3)


def test_a_mask_of_ones_is_none() -> None:
    head, states = parts(3)
    torch.testing.assert_close(features(head, states, torch.ones(2, 1, 5, dtype=torch.bool)), features(head, states))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_no_token_of_a_causal_stack_sees_a_later_one(name: str) -> None:
    model, tuned = attached(name)
    toys.shake(tuned)
    ids = tiny.batch(name)["input_ids"][:1]
    other = ids.clone()
    other[:, 4:] = (other[:, 4:] + 1) % 40 + 3
    one, two = (toys.output(model, {"input_ids": x}) for x in (ids, other))
    torch.testing.assert_close(one[:, :4], two[:, :4])
    assert not torch.allclose(one[:, 4:], two[:, 4:], atol=1e-3)


# 8
@pytest.mark.parametrize("name", ["bert", "vit", "t5", "resnet"])
def test_kept_states_give_the_same_gradients(name: str) -> None:
    model, batch = toys.model(name), tiny.batch(name)
    _, tuned = attached(name, model)
    assert_cached_alike(model, tuned, batch)


# the forms


def test_each_cell_of_a_map_is_summed_by_weights_of_its_own() -> None:
    F, q = random(2, 3, 8, 4), random(2, 4, 2, 3, seed=1).relu()
    found = StageHead.cells(F, q)
    for h in range(4):
        for w in range(2):
            cell = F[:, :, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2]
            s = torch.relu((cell * q[:, h, w][:, :, None, None]).sum(1))
            weights = s / (s.sum((1, 2), keepdim=True) + 1e-8) + 1 / 4
            torch.testing.assert_close(found[:, h, w], (cell * weights[:, None]).sum((2, 3)))


def test_a_pooled_head_adds_to_the_towers_embedding() -> None:
    model, batch = toys.model("clip"), tiny.batch("clip")
    with torch.no_grad():
        before = model(**batch)
        _, tuned = attached("clip", model)
        for slot in tuned.slots:
            set_(slot.delta.up[1].weight, torch.zeros_like(slot.delta.up[1].weight))
            set_(slot.delta.up[1].bias, torch.zeros_like(slot.delta.up[1].bias))
        assert torch.equal(model(**batch).logits_per_image, before.logits_per_image)
        toys.shake(tuned)
        after = model(**batch)
        with pt.given(model, pool_position=torch.tensor([1, 1])):
            other = model(**batch)
    assert not torch.allclose(after.text_embeds, before.text_embeds, atol=1e-3)
    assert not torch.allclose(after.image_embeds, before.image_embeds, atol=1e-3)
    assert not torch.allclose(other.text_embeds, after.text_embeds, atol=1e-4)


def test_a_decoder_reads_the_encoders_memory_and_publishes_its_states() -> None:
    model, tuned = attached("t5", auxiliary=True)
    toys.shake(tuned)
    batch = tiny.batch("t5")
    expected = toys.output(model, batch)
    found = pt.streams(model)["unipt"]
    assert {place: h.shape for place, h in found.items()} == dict.fromkeys((0, 1, 2), (2, *expected.shape[1:2], 32))
    set_(tuned.slots[0].delta.projection[0].weight, torch.zeros(8, 8))
    assert not torch.allclose(toys.output(model, batch), expected, atol=1e-4)


def test_projection_and_output_are_as_asked() -> None:
    _, tuned = attached("bert", wide_projection=True, up="linear")
    head = tuned.slots[0].delta
    assert [type(m).__name__ for m in head.projection] == ["Linear", "ReLU", "Linear", "LayerNorm"]
    assert head.projection[0].weight.shape == (32, 8)
    assert [type(m).__name__ for m in head.up] == ["Linear"]
    assert [type(m).__name__ for m in attached("t5")[1].slots[1].delta.up] == ["ReLU", "Linear", "LayerNorm"]


@pytest.mark.parametrize("name", ["t5", "bert", "resnet"])
def test_cost_is_predicted(name: str) -> None:
    model, tuned = attached(name)
    assert_cost_is_predicted(model, tuned, tiny.batch(name))


# refusals


@pytest.mark.parametrize("states", [(), (1,), (1, 1), (2, 1), (-1, 2)])
def test_states_that_mean_nothing_are_refused(states: Any) -> None:
    with pytest.raises(ConfigError, match="states"):
        pt.UniPT(states=states)


def test_what_does_not_fit_is_refused() -> None:
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("bert", {"reduction_factor": 3}, "reduction_factor = 3 does not divide the output width 32"),
        ("bert", {"states": (1, 9)}, "offers 0 to 2"),
        ("bert", {"out_size": 64}, "without a head"),
        ("bert", {"form": "cnn"}, "no form = 'cnn'"),
        ("vit", {"form": "pooled"}, "what fits: encoder"),
        ("swin", {}, r"2 stages, of widths \[16, 32\]"),
        ("resnet", {"states": (0, 5)}, "number the 2 stages"),
        ("clip", {"out_size": 64}, "added to an embedding of width 16"),
    ]
    assert_refused(pt.UniPT, cases)
    with pytest.raises(AttachError, match="no multiple of the last, 3 x 3"):
        StageHead.cells(random(1, 2, 8, 8), random(1, 3, 3, 2))
    with pytest.raises(AttachError, match=r"\[5, 6\] tokens"):
        parts(2)[0].small([random(1, 5, 12), random(1, 6, 12)], random(1, 6, 12))
