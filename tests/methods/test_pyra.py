"""What PYRA must hold, by its paper: each number is a line of its specification."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petiole as pt
import tiny
import toys
from petiole.anatomy import Anatomy
from petiole.cost import forward_flops
from petiole.errors import AttachError, ConfigError
from petiole.method import Method, Place
from petiole.methods.execution.merging import Merge, Weigh, capped, match, merge, ramp, rows, unmerge
from petiole.methods.execution.patches import image_stack, places
from petiole.methods.execution.pyra import HIGH, PYRA, Modulation
from petiole.methods.lowrank.factors import Factors
from petiole.training.groups import parameter_groups
from toys import output, shake

Sized = tuple[Tensor, Tensor]
IMAGES = {"image_size": 16, "num_hidden_layers": 3}  # 16 patches


def modulation(r: int, size: int, seed: int = 0) -> Modulation:
    """One whose parts are all away from where they start."""
    generator = torch.Generator().manual_seed(seed)
    made = Modulation(r, size).double()
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return made


def tokens(batch: int, count: int, size: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, metric and sizes."""
    generator = torch.Generator().manual_seed(seed)
    x, metric = (torch.randn(batch, count, d, generator=generator, dtype=torch.float64) for d in (size, 5))
    return x, metric, torch.randint(1, 5, (batch, count, 1), generator=generator).double()


def written_out(x: Tensor, metric: Tensor, size: Tensor, r: int, protected: int, change: Modulation | None) -> Sized:
    """Steps 2 to 4 of the paper for one image: x (N, C), metric (N, d), size (N, 1), one token after the other."""
    evens, odds = list(range(0, len(x), 2)), list(range(1, len(x), 2))
    pairs = []
    for a in evens:
        if a >= protected:
            of = {b: float(torch.cosine_similarity(metric[a], metric[b], 0)) for b in odds if b >= protected}
            best = max(of, key=lambda b: of[b])
            pairs.append((of[best], a, best))
    pairs = sorted(pairs, reverse=True)[:r]
    src, dst = (torch.stack([x[pair[i]] * size[pair[i]] for pair in pairs]) for i in (1, 2))
    if change is not None:
        I = nn.functional.layer_norm(src + dst, x.shape[-1:], change.norm.weight, change.norm.bias, 1e-5)
        a, b = 2 * torch.sigmoid(change.W_r.T @ I), 2 * torch.sigmoid(I @ change.W_D.T) - 1
        src = src + (src * a) * b
    total, sizes = [x[i] * size[i] for i in range(len(x))], [size[i] for i in range(len(x))]
    for (_, a, b), token in zip(pairs, src, strict=True):
        total[b], sizes[b] = total[b] + token, sizes[b] + sizes[a]
    gone = {a for _, a, _ in pairs}
    left = list(range(protected)) + [i for part in (evens, odds) for i in part if i >= protected and i not in gone]
    return torch.stack([total[i] / sizes[i] for i in left]), torch.stack([sizes[i] for i in left])


# ------------------------------------------------------------------------------------------------------------- one merge


@pytest.mark.parametrize("protected", [1, 2, 3, 6])
@pytest.mark.parametrize("count", [12, 13])
def test_a_merge_is_the_paper_s_token_by_token(protected: int, count: int) -> None:
    x, metric, size = tokens(3, count, 6)
    for r in range(1, (count - protected) // 2 + 1):
        for change in (None, modulation(r, 6)):
            found, sizes = merge(x, size, match(metric, r, protected), change)
            for i in range(3):
                expected = written_out(x[i], metric[i], size[i], r, protected, change)
                torch.testing.assert_close((found[i], sizes[i]), expected)


def test_without_sizes_every_token_is_one() -> None:
    x, metric, _ = tokens(2, 9, 4)
    pairs = match(metric, 3, 1)
    torch.testing.assert_close(merge(x, None, pairs), merge(x, torch.ones(2, 9, 1).double(), pairs))


def test_size_and_mass_are_conserved() -> None:
    x, metric, size = tokens(3, 14, 6)
    found, sizes = merge(x, size, match(metric, 5, 1))
    torch.testing.assert_close(sizes.sum(1), size.sum(1))
    assert bool((sizes >= 1).all())
    torch.testing.assert_close((sizes * found).sum(1), (size * x).sum(1))


def test_protected_tokens_keep_place_and_value() -> None:
    """Even where their keys are another token's, and so most similar of all."""
    x, metric, size = tokens(2, 13, 6)
    metric[:, 0], metric[:, 1] = metric[:, 3], metric[:, 4]
    for protected in (1, 2):
        found, sizes = merge(x, size, match(metric, 4, protected), modulation(4, 6))
        torch.testing.assert_close(found[:, :protected], x[:, :protected])
        torch.testing.assert_close(sizes[:, :protected], size[:, :protected])


def test_the_factor_stays_between_minus_one_and_three() -> None:
    x, metric, size = tokens(4, 30, 6)
    change = modulation(10, 6)
    with torch.no_grad():
        change.W_D.mul_(3)
    pairs = match(metric, 10, 1)
    src, dst = rows(x * size, pairs.source), rows(x * size, pairs.partner)
    factor = change.factor(src, dst)
    assert -1 < float(factor.detach().min()) < -0.5 and 2.5 < float(factor.detach().max()) < 3
    torch.testing.assert_close(change(src, dst), factor * src)
    with torch.no_grad():
        change.W_D.zero_()
    assert torch.equal(change(src, dst), src)


def test_the_first_step_moves_the_token_weights_alone() -> None:
    x, metric, size = tokens(2, 12, 6)
    metric.requires_grad_()
    change = modulation(4, 6)
    with torch.no_grad():
        change.W_D.zero_()
    found, _ = merge(x, size, match(metric, 4, 1), change)
    found.square().sum().backward()
    for parameter in (change.W_r, change.norm.weight, change.norm.bias):
        assert not parameter.grad.any()  # type: ignore[union-attr]
    assert change.W_D.grad.any()  # type: ignore[union-attr]
    assert metric.grad is None


def test_the_match_is_that_of_float32_under_autocast() -> None:
    _, metric, _ = tokens(8, 64, 4)
    metric = (metric[..., :1] + 1e-3 * metric).float()  # which bfloat16 would not tell apart
    exact = match(metric, 20, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = match(metric, 20, 1)
    assert torch.equal(exact.source, mixed.source) and torch.equal(exact.partner, mixed.partner)


# ---------------------------------------------------------------------------------------------------------- a whole model


def scaled(block: nn.Module, number: int, h: Tensor) -> Tensor:
    """What a block does to the output of its first or second sub-layer: a layer scale, a vector, or nothing."""
    layer = getattr(block, f"layer_scale{number}", None)
    return getattr(block, f"lambda_{number}", 1.0) * h if layer is None else layer(h)


def by_hand(model: nn.Module, h: Tensor, counts: list[int], changes: list[Modulation | None], protected: int) -> Tensor:
    """A pre-norm image encoder with its own modules, from what enters its blocks; attention and merging written out."""
    found = pt.anatomy(model)
    stack, size = image_stack(found), torch.ones(*h.shape[:2], 1, dtype=h.dtype)
    for depth, at in enumerate(places(found, stack, model)):
        block = model.get_submodule(at.block.path)
        of = {s.role: model.get_submodule(s.path) for s in stack.blocks[depth].sites if s.role in "qkvo"}
        norms = [model.get_submodule(s.path) for s in stack.blocks[depth].sites if s.kind == "norm"]
        attended, fed = (partial(scaled, block, number) for number in (1, 2))
        heads = at.attention.heads
        q, k, v = (of[role](norms[0](h)).unflatten(-1, (heads, -1)).transpose(1, 2) for role in "qkv")
        scores = q @ k.mT / math.sqrt(q.shape[-1]) + size.log().mT[:, None]
        h = h + attended(of["o"]((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))
        if counts[depth]:
            new = [
                written_out(h[i], k[i].mean(0), size[i], counts[depth], protected, changes[depth])
                for i in range(len(h))
            ]
            h, size = (torch.stack(part) for part in zip(*new, strict=True))  # type: ignore[assignment]
        h = h + fed(model.get_submodule(at.ffn.path)(norms[1](h)))
    return h


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["vit", "deit", "beit", "dinov2", "clip"])
def test_blocks_that_stay_as_they_are_do_what_is_written_out(family: str, kernel: str) -> None:
    """Layer scales, distillation tokens and all; a block that merges nothing between two that do."""
    model = toys.model(family, num_hidden_layers=4, attn_implementation=kernel).double()
    seen: list[Tensor] = []
    stack = image_stack(pt.anatomy(model))
    first, last = (model.get_submodule(stack.blocks[i].path) for i in (0, -1))
    first.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    last.register_forward_hook(lambda _, args, h: seen.append(h))
    counts = [1, 0, 1, 1]
    tuned = pt.attach(model, PYRA(schedule=counts, rank=0), train_head=False)
    shake(tuned, 0.5)
    model.double()
    batch = tiny.batch(family)
    batch["pixel_values"] = batch["pixel_values"].double()
    with torch.no_grad():
        model(**batch)
        merges = {s.site.depth: s.delta.modulation for s in tuned.slots if isinstance(s.delta, Merge)}
        changes = [merges.get(depth) for depth in range(4)]
        with pt.disabled(model):
            expected = by_hand(model, seen[0], counts, changes, 2 if family == "deit" else 1)
    torch.testing.assert_close(seen[1], expected, rtol=1e-5, atol=1e-5)


def test_at_the_start_it_is_plain_merging_and_without_merging_lora() -> None:
    batch = tiny.batch("vit")
    found = {}
    for name, method in {
        "pyra": PYRA(), "plain": PYRA(modulate=False), "none": PYRA(schedule=0, rank=4),
        "lora": pt.LoRA(rank=4, alpha=4, roles=("q", "k", "v")),
    }.items():  # fmt: skip
        model = toys.model("vit")
        tuned = pt.attach(model, method)
        generator = torch.Generator().manual_seed(3)
        for slot in tuned.slots:
            if isinstance(slot.delta, Factors):  # A is one for q, k and v in one of the two
                slot.delta.A.data = torch.ones_like(slot.delta.A) / 8
                slot.delta.B.data = torch.randn(slot.delta.B.shape, generator=generator)
        found[name] = output(model, batch)
    assert torch.equal(found["pyra"], found["plain"])
    assert torch.equal(found["none"], found["lora"])
    assert not torch.allclose(found["plain"], found["lora"], atol=1e-3)


def test_lora_merges_and_tokens_go_on_merging() -> None:
    model, batch = toys.model("vit"), tiny.batch("vit")
    tuned = pt.attach(model, PYRA())
    shake(tuned)
    attached = output(model, batch)
    with pytest.raises(AttachError, match="tokens merge anew"):
        tuned.merge()
    tuned.merge(partly=True)
    torch.testing.assert_close(output(model, batch), attached, rtol=1e-5, atol=1e-5)
    assert pt.streams(model)["token_sizes"][1].shape[1] == 2


def test_q_k_and_v_share_what_one_fused_linear_would() -> None:
    tuned = pt.attach(toys.model("vit"), PYRA(schedule=0, rank=2), train_head=False)
    for depth in (0, 1):
        parts = [s.delta for s in tuned.slots if isinstance(s.delta, Factors) and s.site.depth == depth]
        assert len(parts) == 3 and len({id(part.A) for part in parts}) == 1
    assert tuned.trainable == 2 * (2 * 32 + 2 * 3 * 32)


def test_sizes_and_places_say_where_each_patch_went() -> None:
    model = toys.model("vit", **IMAGES)
    tuned = pt.attach(model, PYRA(schedule=[6, 3, 2]))
    shake(tuned)
    seen: list[Tensor] = []
    model.get_submodule("vit.layernorm").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    output(model, {"pixel_values": torch.randn(2, 3, 16, 16)})
    found = pt.streams(model)
    sizes = found["token_sizes"]
    assert [sizes[depth].shape[1] for depth in range(3)] == [11, 8, 6] and seen[0].shape[1] == 6
    assert bool((sizes[2].sum(1) == 17).all())
    numbers = torch.arange(6.0).expand(2, -1)[..., None]
    final = unmerge(numbers, found["token_places"])[..., 0].long()  # (2, 17)
    for row, size in zip(final, sizes[2], strict=True):
        assert torch.equal(row.bincount(minlength=6), size[:, 0].long())
    assert bool((final[:, 0] == 0).all()) and bool((final[:, 1:] != 0).all())


def test_a_token_is_the_mean_of_where_it_came_from() -> None:
    """With plain merging, spread back."""
    x, metric, _ = tokens(2, 15, 4)
    where, size, h = {}, None, x
    for depth, r in enumerate((4, 3)):
        pairs = match(metric[:, : h.shape[1]], r, 1)
        h, size = merge(h, size, pairs)
        where[depth] = pairs.places()
    spread = unmerge(h, where)
    assert spread.shape == x.shape
    for final in range(h.shape[1]):
        mine = (spread[0] == h[0, final]).all(-1)
        torch.testing.assert_close(x[0, mine].mean(0), h[0, final])


def test_larger_images_merge_as_much_and_smaller_ones_as_far_as_there_are_tokens() -> None:
    model = toys.model("vit", **IMAGES)
    tuned = pt.attach(model, PYRA(schedule=[6, 3, 2]))
    shake(tuned)
    for side, left in ((24, [31, 28, 26]), (8, [3, 2, 2])):
        output(model, {"pixel_values": torch.randn(2, 3, side, side), "interpolate_pos_encoding": True})
        assert [size.shape[1] for size in pt.streams(model)["token_sizes"].values()] == left


# ------------------------------------------------------------------------------------------------------ with other methods


def affine() -> Method:
    """A change at the end of every block."""

    def made(anatomy: Anatomy) -> list[Place]:
        return [Place(toys.whole_block(anatomy, i), toys.Affine(32)) for i in range(2)]

    return toys.method(made)


@pytest.mark.parametrize("other", [affine, lambda: pt.PrefixTuning(length=2), lambda: pt.ParallelAdapter(bottleneck=3)])
def test_in_a_list_the_order_does_not_matter(other: Any) -> None:
    found = []
    for first in (True, False):
        model = toys.model("vit")
        methods = [PYRA(rank=0), other()]
        tuned = pt.attach(model, methods if first else methods[::-1])
        tuned.check(tiny.batch("vit"))
        for slot in tuned.slots:
            for name, parameter in slot.delta.named_parameters():
                generator = torch.Generator().manual_seed(len(name) + slot.site.depth)
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        found.append(output(model, tiny.batch("vit")))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_prompts_are_protected_or_refused() -> None:
    with pytest.raises(AttachError, match="protected_tokens=4"):
        pt.attach(toys.model("vit", **IMAGES), [PYRA(), pt.VisualPromptTuning(length=3)])
    model = toys.model("vit", **IMAGES)
    pt.attach(model, PYRA())
    pt.attach(model, pt.VisualPromptTuning(length=3), name="prompts")
    pt.activate(model, "default", "prompts")
    with pytest.raises(AttachError, match="protected_tokens=4"):
        output(model, {"pixel_values": torch.randn(2, 3, 16, 16)})
    for prompt in (pt.VisualPromptTuning(length=3, deep=False), pt.VisualPromptTuning(length=3)):
        model = toys.model("vit", **IMAGES)
        tuned = pt.attach(model, [PYRA(schedule=[8, 4, 2], protected_tokens=4), prompt])
        tuned.check({"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 1])})
        sizes = pt.streams(model)["token_sizes"]
        assert [size.shape[1] for size in sizes.values()] == [12, 8, 6]
        assert all(bool((size[:, :4] == 1).all()) for size in sizes.values())


# ------------------------------------------------------------------------------------------------- schedules and what they cost


def vit(width: int, layers: int, **fields: Any) -> nn.Module:
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher, ViTConfig, ViTForImageClassification

    sizes: Mapping[str, Any] = {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 64, "intermediate_size": 4 * width
    }  # fmt: skip
    with torch.device("meta"):
        if fields.get("distilled"):
            return DeiTForImageClassificationWithTeacher(DeiTConfig(**sizes))
        return ViTForImageClassification(ViTConfig(**sizes))


@pytest.mark.parametrize(
    ("width", "layers", "schedule", "gmacs", "left"),
    [(768, 12, "low", 8.77, 11), (768, 12, "high", 5.07, 5), (1024, 24, "low", 30.96, 7), (1024, 24, "high", 17.91, 5)],
)
def test_published_multiply_adds(width: int, layers: int, schedule: Any, gmacs: float, left: int) -> None:
    """And a forward pass takes just as many, with the head and the match."""
    model = vit(width, layers)
    made = PYRA(schedule=schedule, rank=0)
    found = made.report(model)
    assert (round(found.bare / 1e9, 2), round(found.macs / 1e9, 2)) == ({768: 17.56, 1024: 61.55}[width], gmacs)
    assert found.tokens[0] == 197 and found.tokens[-1] == left and f"{gmacs} of" in str(found)
    pt.attach(model, made, train_head=False)
    counts = [a - b for a, b in pairwise(found.tokens)]
    pairs = sum((n + 1) // 2 * (n // 2) * 64 for n, r in zip(found.tokens, counts, strict=False) if r)
    head = 2 * width
    assert forward_flops(model, {"pixel_values": torch.empty(1, 3, 224, 224)}) == 2 * (found.macs + pairs + head)


def test_published_numbers_of_parameters() -> None:
    model = vit(768, 12)
    tuned = pt.attach(model, PYRA(), train_head=False)
    lora = {id(p): p.numel() for s in tuned.slots if isinstance(s.delta, Factors) for p in s.delta.parameters()}
    assert sum(lora.values()) == 294_912 == 12 * (768 * 8 + 8 * 2304)
    assert tuned.trainable - 294_912 == 27_834 == sum([16] * 11 + [10]) + 12 * 3 * 768
    assert pt.attach(vit(768, 12), PYRA(modulate=False), train_head=False).trainable == 294_912


def test_schedules() -> None:
    def of(schedule: Any, width: int = 768, layers: int = 12, **fields: Any) -> list[int]:
        found = PYRA(schedule=schedule).report(vit(width, layers, **fields)).tokens
        return [a - b for a, b in pairwise(found)]

    assert of("low") == [16] * 11 + [10] and of("low", 1024, 24) == [8] * 23 + [6]
    assert of("low", distilled=True) == [16] * 6 + [10] * 6 and of("high", distilled=True) == list(HIGH[12])
    assert of("high") == [40, 34, 30, 24, 18, 14, 10, 8, 4, 4, 3, 3]
    assert of([5, 0, 3]) == [5, 0, 3] + [0] * 9 and of(8) == [8] * 12
    assert of((8, 1.0)) == list(ramp(8, 1.0, 12)) == [0, 1, 2, 4, 5, 7, 8, 10, 11, 13, 14, 16]
    assert of((8, -0.5))[:2] == [12, 11] and of((8, 0.0)) == [8] * 12
    assert capped([16] * 12, 197, 1) == (*[16] * 11, 10)


def test_a_schedule_beyond_what_there_is_is_refused() -> None:
    model = vit(768, 12)
    for attempt in (PYRA(schedule=16).report, lambda m: pt.attach(m, PYRA(schedule=16))):
        with pytest.raises(AttachError, match=r"block 11 .* 16 tokens, but can merge 10 of the 20(.|\n)*16, 10\]"):
            attempt(model)
    with pytest.raises(AttachError, match="12 or 24 blocks and 196 patches; ViTForImageClassification has 2 and 4"):
        pt.attach(toys.model("vit"), PYRA(schedule="high"))
    with pytest.raises(AttachError, match="names 3 blocks"):
        pt.attach(toys.model("vit"), PYRA(schedule=[1, 1, 1]))
    for schedule in ([], [-1], -1, (2, 1.5), (2, math.nan), 1.5, [1, 0.5, 2], True):
        with pytest.raises(ConfigError, match="schedule"):
            PYRA(schedule=schedule)


def test_where_tokens_can_not_merge_it_says_why() -> None:
    from transformers import (
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
        SiglipVisionConfig,
        SiglipVisionModel,
        ViTConfig,
        ViTForMaskedImageModeling,
        YolosConfig,
        YolosModel,
    )

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    image = {**small, "image_size": 8, "patch_size": 4}
    dense = ViTForMaskedImageModeling(ViTConfig(**image, encoder_stride=4))
    models = {
        "merged tokens need blocks of one width": [toys.model(name) for name in ("swin", "convnext")],
        "patches of an image alone": [toys.model(name) for name in ("vilt", "bert")],
        "language model": [toys.model("llava")],
        "needs the grid of patches": [dense],
        "no class token": [SiglipVisionModel(SiglipVisionConfig(**image))],
        "detection_tokens": [YolosModel(YolosConfig(**{**image, "image_size": [8, 8]}))],
        "merged tokens don't fit .* bias for each pair": [toys.model("beit", use_relative_position_bias=True)],
    }
    for why, each in models.items():
        for model in each:
            before = toys.snapshot(model)
            with pytest.raises(pt.PetioleError, match=why) as caught:
                pt.attach(model, PYRA())
            assert len(str(caught.value).splitlines()) <= 3
            assert toys.snapshot(model) == before
    registers = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**image, num_register_tokens=3))
    tuned = pt.attach(registers, PYRA())
    tuned.check({"pixel_values": torch.randn(2, 3, 8, 8)})
    assert bool((pt.streams(registers)["token_sizes"][1][:, :4] == 1).all())
    pt.attach(dense.vit, PYRA())  # the backbone alone
    assert {
        s.delta.stage.protected for s in pt.adaptations(dense.vit)["default"].slots if isinstance(s.delta, Weigh)
    } == {1}


def test_a_part_of_the_model_alone_and_a_mask_are_refused() -> None:
    model = toys.model("vit")
    pt.attach(model, PYRA())
    with pytest.raises(AttachError, match="whole model"):
        model.vit.layers[0](torch.randn(1, 5, 32))
    with pytest.raises(AttachError, match="mask for 5 keys"):
        mask = torch.ones(2, 5, dtype=torch.long)
        mask[0, -1] = 0
        output(model, {**tiny.batch("vit"), "attention_mask": mask})


def test_the_modulation_learns_at_a_rate_of_its_own() -> None:
    model = toys.model("vit")
    tuned = pt.attach(model, PYRA(rate_factor=0.3))
    groups = parameter_groups(model, learning_rate=1e-3)
    own = {id(p) for s in tuned.slots if isinstance(s.delta, Merge) for p in s.delta.parameters()}
    at = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert {at[i] for i in own} == {3e-4} and {lr for i, lr in at.items() if i not in own} == {1e-3}


def test_two_that_act_merge_once() -> None:
    """Of two adaptations, the one attached first merges; both change weights."""
    model, batch = toys.model("vit"), tiny.batch("vit")
    shake(pt.attach(model, PYRA(rank=0), name="a"))
    alone = output(model, batch)
    pt.attach(model, PYRA(), name="b")
    pt.activate(model, "a", "b")
    found = output(model, batch)
    assert pt.streams(model)["token_sizes"][1].shape[1] == 2
    assert found.shape == alone.shape and bool(torch.isfinite(found).all())
