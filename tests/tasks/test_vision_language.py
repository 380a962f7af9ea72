"""Vision and language: the visual embedding, a text model that reads images, scenes whose answers only the picture has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import petiole as pt
import tiny
import toys
from petiole.errors import AttachError, ConfigError
from petiole.tasks.vision_language import VisionLanguageModel, VisualEmbedding, with_visual_tokens

FEATURES, REGIONS = 6, 4


def model(family: str = "bart", **options: Any) -> VisionLanguageModel:
    """Tiny, with four visual tokens."""
    backbone = with_visual_tokens(toys.model(family), REGIONS)
    return VisionLanguageModel(backbone, FEATURES, visual_tokens=REGIONS, **options).eval()


def batch(images: int = 1, rows: int = 2, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(rows, images, REGIONS, 2, 2, generator=generator).sort(-1).values
    return {
        **tiny.batch("bart", size=rows),
        "image_features": torch.randn(rows, images, REGIONS, FEATURES, generator=generator),
        "image_boxes": corners.flatten(-2),
    }


# ------------------------------------------------------------------------------------------------------------- visual embedding


def test_the_visual_embedding_of_the_paper_has_as_many_parameters() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in VisualEmbedding(2048, 768).parameters()) == 1_582_848


def test_the_visual_embedding_adds_four_things_up() -> None:
    embedding = VisualEmbedding(3, 8).double()
    torch.nn.init.normal_(embedding.feature_norm.bias, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 2, 5, 3, generator=generator, dtype=torch.float64)
    boxes = torch.tensor([[0.1, 0.4, 0.2, 0.8]], dtype=torch.float64).expand(2, 2, 5, 4).clone()
    boxes[..., 0] += 0.01 * torch.arange(5)
    order = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    found = embedding(features, boxes, order)
    assert found.shape == (2, 10, 8)
    norm = torch.nn.functional.layer_norm
    for row, image, region in ((0, 0, 0), (1, 0, 3), (0, 1, 4)):
        x1, x2, y1, y2 = boxes[row, image, region].tolist()
        where = torch.tensor([x1, x2, y1, y2, (x2 - x1) * (y2 - y1)], dtype=torch.float64)
        f = embedding.features.weight @ features[row, image, region] + embedding.features.bias
        p = embedding.position.weight @ where + embedding.position.bias
        wanted = norm(f, (8,), embedding.feature_norm.weight, embedding.feature_norm.bias) + norm(p, (8,))
        wanted = wanted + embedding.image_order.weight[image] + order[region]
        torch.testing.assert_close(found[row, 5 * image + region], wanted)


def test_shapes_that_do_not_fit_are_refused() -> None:
    embedding = VisualEmbedding(3, 8)
    features, boxes, order = torch.zeros(1, 1, 5, 3), torch.zeros(5, 4), torch.zeros(5, 8)
    assert embedding(features, boxes, order).shape == (1, 5, 8)
    for wrong in (features[0], features.expand(1, 3, 5, 3), torch.zeros(1, 1, 5, 4)):
        with pytest.raises(ConfigError, match="image features"):
            embedding(wrong, boxes, order)
    with pytest.raises(ConfigError, match="boxes"):
        embedding(features, boxes[:4], order)
    with pytest.raises(ConfigError, match="all start at 1"):
        VisualEmbedding(0, 8)


# ------------------------------------------------------------------------------------------------------------------------ model


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_an_image_stands_right_behind_the_text_of_its_row(family: str) -> None:
    """So a row's answer does not depend on how long the texts beside it are, nor on which side they are padded."""
    m, b = model(family), batch()
    b.pop("labels")
    decoder = {"decoder_input_ids": torch.tensor([[1, 5], [1, 7]])}
    expected = m(**b, **decoder).logits
    pad = torch.zeros(2, 3, dtype=torch.long)
    for side in (0, 1):
        longer = {k: torch.cat([pad, b[k]][:: 1 - 2 * side], 1) for k in ("input_ids", "attention_mask")}
        torch.testing.assert_close(m(**{**b, **longer}, **decoder).logits, expected)
    last = {k: v[1:, : int(b["attention_mask"][1].sum())] if k in longer else v[1:] for k, v in b.items()}
    torch.testing.assert_close(m(**last, decoder_input_ids=decoder["decoder_input_ids"][1:]).logits, expected[1:])


def test_the_order_of_tokens_is_text_then_images() -> None:
    m, b = model(), batch(images=2)
    b.pop("labels")
    h, mask = m.joined(b["input_ids"], b["attention_mask"], b["image_features"], b["image_boxes"], None)
    words = m.get_input_embeddings()
    tokens = m.visual_embedding(b["image_features"], b["image_boxes"], words.weight[[-1, -2, -3, -4]])
    text = int(b["attention_mask"][1].sum())
    assert text < b["input_ids"].shape[1]
    torch.testing.assert_close(h[1, :text], words(b["input_ids"][1, :text]))
    torch.testing.assert_close(h[1, text : text + 2 * REGIONS], tokens[1])
    assert mask[1].tolist() == [1] * (text + 2 * REGIONS) + [0] * (mask.shape[1] - text - 2 * REGIONS)
    assert mask[0].all()


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_a_region_that_is_masked_is_not_seen(family: str) -> None:
    m, b = model(family), batch()
    seen = torch.ones(2, 1, REGIONS, dtype=torch.long)
    seen[:, :, 1] = 0
    expected = m(**b, image_mask=seen).loss
    b["image_features"][:, :, 1] += 100
    torch.testing.assert_close(m(**b, image_mask=seen).loss, expected)
    assert not torch.allclose(m(**b).loss, expected)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_methods_see_the_backbone_and_train_the_visual_embedding(family: str) -> None:
    m, b = model(family), batch()
    found, bare = pt.anatomy(m), pt.anatomy(m.backbone)
    assert [(s.name, len(s.blocks), s.causal) for s in found.stacks] == [
        (s.name, len(s.blocks), s.causal) for s in bare.stacks
    ]
    assert [site.path for site in found.heads()] == ["visual_embedding"]
    before, expected = toys.snapshot(m), m(**b).loss
    tuned = pt.attach(m, pt.LoRA(rank=2))
    assert torch.equal(m(**b).loss, expected)
    embedding = sum(p.numel() for p in model().visual_embedding.parameters())
    assert tuned.trainable == embedding + pt.attach(model(family).backbone, pt.LoRA(rank=2)).trainable
    tuned.check(b)
    toys.shake(tuned)
    assert not torch.allclose(m(**b).loss, expected)
    tuned.detach()
    assert toys.snapshot(m) == before


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_answers_are_the_same_with_and_without_a_cache(family: str) -> None:
    m, b = model(family), batch(images=2)
    b.pop("labels")
    toys.shake(pt.attach(m, [pt.LoRA(rank=2), pt.PromptTuning(length=2)]))
    for beams in (1, 3):
        options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": beams, "do_sample": False}
        cached = m.generate(**b, **options, use_cache=True)
        assert torch.equal(cached, m.generate(**b, **options, use_cache=False))
        text = {k: v for k, v in b.items() if not k.startswith("image")}
        assert m.generate(**text, **options).shape == cached.shape


def test_a_file_holds_the_visual_embedding(tmp_path: Any) -> None:
    m, b = model(), batch()
    tuned = pt.attach(m, pt.LoRA(rank=2))
    toys.shake(tuned)
    other = model(seed=5)  # whose embedding is another one at first
    pt.load(other, tuned.save(tmp_path / "x.safetensors"))
    assert torch.equal(other(**b).loss, m(**b).loss)


def test_no_norm_of_the_visual_embedding_is_the_backbones() -> None:
    m = model()
    tuned = pt.attach(m, pt.NormTuning())
    assert not any(name.startswith("visual_embedding") for name in tuned.own)
    embedding = sum(p.numel() for p in model().visual_embedding.parameters())
    assert tuned.trainable == embedding + pt.attach(model().backbone, pt.NormTuning()).trainable


def test_nothing_behind_a_visual_embedding_that_trains_can_be_cached() -> None:
    m = model()
    pt.attach(m, pt.LoRA(rank=2, roles=["decoder:q"], layers=[-1]))
    with pytest.raises(AttachError, match="head trains before the first block"):
        pt.Cache(m)


def test_what_can_not_be_read_is_refused() -> None:
    with pytest.raises(ConfigError, match="no encoder-decoder"):
        VisionLanguageModel(toys.model("bert"))
    with pytest.raises(ConfigError, match="visual_tokens = 99"):
        VisionLanguageModel(toys.model("bart"), FEATURES, visual_tokens=99)
    m, b = model(), batch()
    with pytest.raises(ConfigError, match="without image_boxes"):
        m(b["input_ids"], image_features=b["image_features"])
    with pytest.raises(ConfigError, match="4 for them"):
        m(b["input_ids"], image_features=torch.zeros(2, 1, 5, FEATURES), image_boxes=torch.zeros(5, 4))


def test_new_tokens_come_from_a_seed_and_move_no_generator() -> None:
    state = torch.get_rng_state()
    one, two = (with_visual_tokens(toys.model("bart"), 3, seed=seed) for seed in (0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    words = one.get_input_embeddings().weight
    assert len(words) == tiny.VOCABULARY + 3 and torch.equal(
        words[:-3], toys.model("bart").get_input_embeddings().weight
    )
    assert not torch.equal(words[-3:], two.get_input_embeddings().weight[-3:])
    assert one.get_output_embeddings().weight is words
