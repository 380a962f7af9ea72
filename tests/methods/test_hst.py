"""What HST must hold, by the numbers of its specification."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import petiole as pt
import tiny
import toys
from petiole.errors import AttachError, ConfigError, PetioleError
from petiole.methods.side.hst import MetaTokens, SideNetwork, kept_rows


def attached(base: bool = False, **fields: Any) -> tuple[nn.Module, pt.Adaptation, SideNetwork]:
    model = toys.model("deep_vit")
    model = model.vit if base else model
    tuned = pt.attach(model, pt.HST(**fields))
    return model, tuned, side_of(tuned)


def side_of(tuned: pt.Adaptation) -> SideNetwork:
    return next(slot.delta for slot in tuned.slots if isinstance(slot.delta, SideNetwork))


def images(size: int = 2, side: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(size, 3, side, side, generator=torch.Generator().manual_seed(seed))


def vit_b(classes: int, **fields: Any) -> pt.Adaptation:
    from transformers import ViTConfig, ViTForImageClassification

    with torch.device("meta"):
        model = ViTForImageClassification(ViTConfig(num_labels=classes))
    return pt.attach(model, pt.HST(**fields))


# 1
def test_the_papers_counts() -> None:
    assert vit_b(100).trainable == 772_140
    assert vit_b(100).trainable - 100 * 73 == 764_840


def test_the_counts_formula() -> None:
    dims, depths, D, M, L = (8, 12, 16, 24), (1, 1, 1, 1), 32, 3, 4
    _, tuned, side = attached(side_dims=dims, side_heads=(2, 2, 4, 4), num_meta_tokens=M)
    d1 = dims[0]
    expected = (
        L * 4 * D + L * M * D + sum(D * d + d for d in dims) + sum(n * 2 * d for n, d in zip(depths, dims, strict=True))
    )
    expected += 27 * d1 + 2 * d1 + 4 * d1**2 + d1 + 2 * d1
    expected += sum(9 * a * b + b + 2 * b for a, b in pairwise(dims))
    expected += sum(n * (4 * (d * d + d) + 8 * d * d + 5 * d + 4 * d) for n, d in zip(depths, dims, strict=True))
    expected += sum(2 * d for d in dims)
    assert tuned.trainable - sum(p.numel() for p in side.head.parameters()) == expected
    assert attached(train_block_norms=False, side_dims=dims, side_heads=(2, 2, 4, 4))[1].trainable < tuned.trainable


# 2
def test_shapes_of_the_pyramid() -> None:
    from transformers import ViTConfig, ViTModel

    with torch.device("meta"):
        model = ViTModel(ViTConfig(), add_pooling_layer=False)
        pt.attach(model, pt.HST(output="pyramid"))
        model(pixel_values=torch.empty(2, 3, 224, 224))
    found = pt.streams(model)["hst"]
    assert {depth: tuple(P.shape) for depth, P in found.items()} == {
        2: (2, 32, 56, 56),
        5: (2, 48, 28, 28),
        8: (2, 64, 14, 14),
        11: (2, 72, 7, 7),
    }


# 3
def test_meta_tokens_are_gone_after_every_block() -> None:
    model, _, side = attached(num_meta_tokens=3)
    seen: list[tuple[int, ...]] = []
    states: list[Tensor] = []
    for block in model.vit.layers:
        block.layernorm_before.register_forward_hook(lambda m, a, y: seen.append((a[0].shape[1],)))
    side.register_forward_pre_hook(lambda m, a: states.extend(a[0]))
    with torch.no_grad():
        found = model(images(), output_hidden_states=True)
    assert seen == [(3 + 1 + 16,)] * 4
    assert [h.shape[1] for h in found.hidden_states[1:]] == [
        17
    ] * 4  # Transformers records the first one inside of the block
    assert [h.shape[1] for h in states] == [20] * 4


def test_a_block_differs_only_by_attention_to_meta_tokens() -> None:
    """Where the keys of meta tokens score -∞, the ViT's own path is the bare one."""
    model, tuned, _ = attached(base=True, num_meta_tokens=2, output="pyramid")
    mask = torch.zeros(1, 1, 19, 19)
    mask[..., :2] = -torch.inf
    block = model.layers[1]
    h = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(0))
    with tuned.disabled():
        plain = block(h)
    meta = tuned.slots[1].delta
    with tuned.disabled():
        hidden = meta.leave(block(meta.enter(h), attention_mask=mask), h)
        seen = meta.leave(block(meta.enter(h)), h)
    torch.testing.assert_close(hidden, plain, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(seen, plain, atol=1e-3)


# 4
def test_what_gets_a_gradient() -> None:
    model, tuned, side = attached()
    model.train()(**tiny.batch("deep_vit")).loss.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    norms = {
        f"vit.layers.{i}.layernorm_{where}.{own}"
        for i in range(4)
        for where in ("before", "after")
        for own in ("weight", "bias")
    }
    added = {name for name, _ in model.named_parameters() if "petiole" in name}
    assert with_gradient == norms | added
    assert {id(p) for p in tuned.parameters()} == {id(p) for n, p in model.named_parameters() if n in norms | added}
    assert sum(isinstance(slot.delta, MetaTokens) for slot in tuned.slots) == 4
    assert all(
        p.grad is not None and bool(p.grad.any()) for n, p in side.named_parameters() if not n.endswith("k.bias")
    )


# 5
def test_projecting_first_is_interpolating_first() -> None:
    _, _, side = attached()
    stage = side.stages[0]
    V = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(0))
    wide = nn.functional.interpolate(V.mT.unflatten(2, (3, 4)), (13, 17), mode="bilinear", align_corners=False)
    torch.testing.assert_close(
        stage.bridged(V, (3, 4), (13, 17)), stage.bridge(wide.flatten(2).mT), rtol=1e-5, atol=1e-5
    )


# 6
def test_without_its_bridge_a_stage_does_not_see_the_vit() -> None:
    _, tuned, side = attached()
    toys.shake(tuned)
    stage = side.stages[1]
    x = torch.randn(2, 32, 16, 16, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    one, other = (
        [(torch.randn(2, 1, 32, generator=generator), torch.randn(2, 16, 32, generator=generator))] for _ in "ab"
    )
    assert not torch.allclose(stage(x, one, (4, 4)), stage(x, other, (4, 4)), atol=1e-3)
    with torch.no_grad():
        stage.bridge.weight.zero_()
        stage.bridge.bias.zero_()
    assert torch.equal(stage(x, one, (4, 4)), stage(x, other, (4, 4)))


# 8
def test_the_heads_norm_has_no_parameters_and_keeps_statistics() -> None:
    model, _, side = attached()
    assert not list(side.norm.parameters())
    one = model(images())
    assert torch.equal(model(images()).logits, one.logits)
    alone = torch.cat([model(row[None]).logits for row in images()])
    torch.testing.assert_close(alone, one.logits, rtol=1e-4, atol=1e-5)  # so no statistics of the batch
    before = side.norm.running_mean.clone(), side.stages[0].embedding.norm.running_mean.clone()
    model.train()(images())
    assert not torch.equal(side.norm.running_mean, before[0])
    assert not torch.equal(side.stages[0].embedding.norm.running_mean, before[1])


# 9
def test_a_file_holds_the_running_statistics(tmp_path: Any) -> None:
    model, tuned, _ = attached()
    toys.shake(tuned)
    for seed in range(3):
        model.train()(images(4, seed=seed))
    expected = model.eval()(images()).logits
    path = tuned.save(tmp_path / "hst.safetensors")
    tensors = load_file(path)
    running = [n for n in tensors if n.endswith(("running_mean", "running_var"))]
    counters = [n for n in tensors if n.endswith("num_batches_tracked")]
    assert len(running) == 4
    assert len(counters) == 2
    assert sum(t.numel() for n, t in tensors.items() if n not in (*running, *counters)) == tuned.trainable
    other = toys.model("deep_vit")
    pt.load(other, path)
    assert torch.equal(other(images()).logits, expected)


# 10
def test_rows_do_not_see_each_other() -> None:
    model, tuned, _ = attached()
    toys.shake(tuned)
    order = torch.tensor([2, 0, 3, 1])
    x = images(4)
    with torch.no_grad():
        torch.testing.assert_close(model(x[order]).logits, model(x).logits[order], rtol=1e-5, atol=1e-5)


# stochastic depth, sizes, initial values


def test_stochastic_depth_ramps_and_acts_in_training_alone() -> None:
    model, tuned, side = attached(drop_path=0.3)
    rates = [block.rate for stage in side.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
    in_vit = [slot.delta.rate for slot in tuned.slots if hasattr(slot.delta, "rate")]
    assert in_vit == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.3, 0.3])
    plain, _, _ = attached()
    assert torch.equal(model(images()).logits, plain(images()).logits)
    model.train()
    torch.manual_seed(0)
    one = model(images()).logits
    torch.manual_seed(0)
    again = model(images()).logits
    other = model(images()).logits
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_factors_of_rows_average_to_one() -> None:
    torch.manual_seed(0)
    found = kept_rows(torch.zeros(20_000, 2, 3), 0.2)
    assert found.shape == (20_000, 1, 1)
    assert set(found.unique().tolist()) == {0.0, 1.25}
    assert float(found.mean()) == pytest.approx(1, abs=0.02)


def test_images_of_other_shapes() -> None:
    model, _, _ = attached(base=True, output="pyramid")
    x = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(x, interpolate_pos_encoding=True)
    assert [tuple(P.shape[2:]) for P in pt.streams(model)["hst"].values()] == [(16, 24), (8, 12), (4, 6), (2, 3)]


def test_initial_values() -> None:
    side = side_of(pt.attach(toys.model("deep_vit"), pt.HST(side_dims=(64, 64, 64, 64), side_heads=(4, 4, 4, 4))))
    first, later = side.stages[0].embedding, side.stages[1].embedding
    assert float(first.first.weight.detach().std()) == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.1)
    assert float(later.weight.detach().std()) == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.1)
    block = side.stages[0].blocks[0]
    assert float(block.up.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert not block.up.bias.any()
    assert not later.bias.any()
    tuned = pt.attach(toys.model("deep_vit"), pt.HST(num_meta_tokens=40))
    tokens = tuned.slots[0].delta.tokens
    bound = (6 / (32 * 41)) ** 0.5  # Xavier's of (1, M, D)
    assert 0.9 * bound < float(tokens.detach().abs().max()) <= bound


@pytest.mark.parametrize("half", ["autocast", "backbone"])
def test_half_precision_follows(half: str) -> None:
    model, _, side = attached()
    x = images()
    with torch.no_grad():
        expected = model(x).logits
        if half == "backbone":
            model.to(torch.bfloat16)
            side.float()
            x = x.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=half == "autocast"):
            found = model(x).logits
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.1 * expected.norm()


def test_leading_tokens_are_counted() -> None:
    from transformers import (
        DeiTConfig,
        DeiTForImageClassification,
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersForImageClassification,
    )

    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 16,
        "num_labels": 3,
    }
    for model, leading in (
        (DeiTForImageClassification(DeiTConfig(**shape, intermediate_size=64)), 2),
        (
            Dinov2WithRegistersForImageClassification(
                Dinov2WithRegistersConfig(**shape, mlp_ratio=2, num_register_tokens=3)
            ),
            4,
        ),
    ):
        side = side_of(pt.attach(model.eval(), pt.HST()))
        assert side.leading == leading
        assert model(pixel_values=images()).logits.shape == (2, 3)


# refusals


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"side_dims": (8, 8, 8)}, "side_dims"),
        ({"side_heads": (1, 1, 1, 1, 1)}, "side_heads"),
        ({"side_depths": (3, 3)}, "side_depths"),
        ({"stage_end_layers": (1, 2)}, "stage_end_layers"),
        ({"side_heads": (5, 4, 8, 12)}, "5 heads do not divide"),
        ({"side_depths": (3, 3, 3, 3), "stage_end_layers": (2, 5, 9, 11)}, r"\[2, 5, 8, 11\]"),
        ({"side_depths": (0, 1, 1, 1)}, "start at 1"),
        ({"num_meta_tokens": 0}, "num_meta_tokens"),
    ],
)
def test_fields_that_disagree_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        pt.HST(**fields)
    assert len(str(caught.value).splitlines()) <= 3


def test_what_does_not_fit_is_refused() -> None:
    cases: list[tuple[nn.Module, dict[str, Any], str]] = [
        (tiny.model("deep_vit"), {"side_depths": (3, 3, 3, 3)}, "add up to 4"),
        (tiny.model("deep_vit"), {"stage_end_layers": (0, 2, 1, 3)}, "at least 1"),
        (tiny.model("deep_vit", image_size=48), {}, "side 48"),
        (tiny.model("vit"), {}, "multiples of 32"),
        (tiny.model("bert"), {}, "no such ViT"),
        (tiny.model("clip"), {}, "no such ViT"),
        (tiny.model("deep_vit").vit, {}, "has 0"),
    ]
    for model, fields, words in cases:
        before = toys.snapshot(model)
        with pytest.raises(PetioleError, match=words) as caught:
            pt.attach(model, pt.HST(**fields))
        assert len(str(caught.value).splitlines()) <= 3
        assert toys.snapshot(model) == before
    model, _, _ = attached(base=True, output="pyramid")
    with pytest.raises(AttachError, match="side 80"):
        model(images(side=80), interpolate_pos_encoding=True)
    both = toys.model("deep_vit")
    pt.attach(both, [pt.VisualPromptTuning(length=2), pt.HST()])
    with pytest.raises(AttachError, match="input tokens of other methods"):
        both(images())
