"""Vision and language: the visual embedding, a text model that reads images, scenes whose answers only the picture has."""

from __future__ import annotations

import random
from collections import Counter
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petiole as pt
import tiny
import toys
from petiole.errors import AttachError, ConfigError, DataError
from petiole.tasks.vision_language import (
    TASKS,
    Scene,
    Thing,
    VisionLanguage,
    VisionLanguageModel,
    VisualEmbedding,
    example,
    grid,
    pixels,
    pretrained,
    pretraining,
    render,
    states,
    with_visual_tokens,
)
from petiole.tasks.vision_language.scenes import COLOURS, COLUMNS, ROWS

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


# ----------------------------------------------------------------------------------------------------------- scenes and questions


def parsed(question: str, scenes: tuple[Scene, ...]) -> str:
    """The answer, worked out from the question's words and the scenes in words."""
    told = [[text.split() for text in things(one)] for one in scenes]
    words = question.split()
    if question.startswith("is there"):
        return "yes" if any(thing[:2] == words[3:5] for thing in told[0]) else "no"
    if question.startswith("how many"):
        return ("zero", "one", "two", "three")[sum(words[2] in thing[:2] for thing in told[0])]
    if question.startswith("what colour"):
        (only,) = [thing for thing in told[0] if thing[1] == words[4]]
        return only[0]
    if question.startswith("is the"):
        (a,), (b,) = ([thing for thing in told[0] if thing[1] == words[i]] for i in (2, -2))
        down = {"top": 0, "centre": 1, "bottom": 2}
        along = {"left": 0, "middle": 1, "right": 2}
        gap = {"above": down[b[2]] - down[a[2]], "left": along[b[3]] - along[a[3]]}
        gap |= {"below": -gap["above"], "right": -gap["left"]}
        return "yes" if gap[words[3]] > 0 else "no"
    numbers = [sum(thing[1] in words for thing in one) for one in told]
    if question.startswith("both"):
        return str(min(numbers) > 0).lower()
    if question.startswith("one picture"):
        return str(sum(number > 0 for number in numbers) == 1).lower()
    if question.startswith("the first"):
        return str(numbers[0] > numbers[1]).lower()
    return " ".join(" ".join(thing) for thing in told[0])


def things(of: Scene) -> list[str]:
    words = str(of).split()
    return [" ".join(words[i : i + 4]) for i in range(0, len(words), 4)]


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_right(task: str) -> None:
    kinds = set()
    for number in range(400):
        own = example(task, 3, number)
        assert own.answer == parsed(own.question, own.scenes), own
        assert own.prompt == f"{task}: {own.question}" and len(own.scenes) == (2 if task == "nlvr" else 1)
        for one in own.scenes:
            cells = [(thing.row, thing.column) for thing in one]
            assert cells == sorted(set(cells)) and 2 <= len(cells) <= 3
        kinds.add(own.kind)
    assert len(kinds) == {"vqa": 4, "nlvr": 3, "caption": 1}[task]


@pytest.mark.parametrize(("task", "chance"), [("vqa", 3 / 8), ("nlvr", 1 / 2), ("caption", 0)])
def test_words_alone_are_at_chance(task: str, chance: float) -> None:
    """The best guess from the question itself, whatever model makes it: what was most often right for it."""
    seen: dict[str, Counter[str]] = {}
    for number in range(4000):
        own = example(task, 0, number)
        seen.setdefault(own.question, Counter())[own.answer] += 1
    test = [example(task, 1, number) for number in range(1200)]
    right = sum(seen[own.question].most_common(1)[0][0] == own.answer for own in test if own.question in seen) / len(
        test
    )
    assert abs(right - chance) < 0.05


def test_examples_depend_on_seed_and_number_alone() -> None:
    assert [example("vqa", 0, i) for i in (5, 3)] == [example("vqa", 0, i) for i in (3, 5)][::-1]
    assert len({example("caption", seed, 0).answer for seed in range(20)}) > 15


def test_a_picture_shows_its_scene_and_nothing_else() -> None:
    one = Scene((Thing("red", "circle", 0, 1), Thing("blue", "square", 2, 2), Thing("green", "cross", 1, 0)))
    state = torch.get_rng_state()
    image = render(one, 48, noise=0.0, seed=0) + 0.5
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(render(one, 48, seed=1), render(one, 48, seed=1))
    assert not torch.equal(render(one, 48, seed=1), render(one, 48, seed=2))
    ground = image[:, 0, 0]
    cells = image.unfold(1, 16, 16).unfold(2, 16, 16)  # (3, 3, 3, 16, 16)
    for row in range(3):
        for column in range(3):
            cell = cells[:, row, column]
            own = next((t for t in one if (t.row, t.column) == (row, column)), None)
            differs = ((cell - ground[:, None, None]).abs() > 0.02).any(0)
            assert bool(differs.any()) == (own is not None)
            if own is not None:
                middle = cell[:, 7:9, 7:9].mean((1, 2))
                assert int(
                    (middle / middle.max() - torch.tensor(list(COLOURS.values()))).abs().sum(1).argmin()
                ) == list(COLOURS).index(own.colour)


def test_shapes_differ() -> None:
    areas = {}
    for shape in ("circle", "square", "triangle", "cross"):
        image = render(Scene((Thing("blue", shape, 1, 1),)), 96, noise=0.0, seed=0)
        areas[shape] = ((image - image[:, :1, :1]).abs() > 0.1).any(0)
    for one, other in combinations(areas, 2):
        assert (areas[one] ^ areas[other]).sum() > 0.15 * (areas[one] | areas[other]).sum()
    wide = areas["triangle"].sum(1).nonzero()[:, 0]
    assert areas["triangle"][wide[2]].sum() < areas["triangle"][wide[-3]].sum()  # a triangle stands on its base


# ----------------------------------------------------------------------------------------------------------------------- features


def test_features_are_the_cells_from_the_top_left() -> None:
    images = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    found, boxes = pixels(3)(images), grid(3)
    assert found.shape == (2, 9, 16) and boxes.shape == (9, 4)
    contrast = (images - images.flatten(2).median(-1).values[..., None, None]).norm(dim=1, keepdim=True)
    both = torch.cat([images, contrast], 1)
    for cell, (x1, x2, y1, y2) in enumerate((6 * boxes).round().int().tolist()):
        torch.testing.assert_close(found[1, cell], both[1, :, y1:y2, x1:x2].flatten())
    with pytest.raises(ConfigError, match="4 by 4 cells"):
        pixels(4)(images)


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_features_of_a_frozen_model_are_its_states_of_each_cell(family: str) -> None:
    from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flat: dict[str, Any] = {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
        }
        backbone = (
            ViTModel(ViTConfig(**flat, image_size=16, patch_size=4), add_pooling_layer=False)
            if family == "vit"
            else ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[16], depths=[1]))
        ).train()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = states(backbone, 2, batch_size=2)(images)
    assert backbone.training and not found.requires_grad
    with torch.no_grad():
        h = backbone.eval()(images, **({"interpolate_pos_encoding": True} if family == "vit" else {})).last_hidden_state
    if family == "vit":
        h = h[:, 1:].mT.unflatten(-1, (8, 8))
    half = h.shape[-1] // 2
    for cell, (y, x) in enumerate([(0, 0), (0, half), (half, 0), (half, half)]):
        torch.testing.assert_close(found[:, cell], h[:, :, y : y + half, x : x + half].mean((2, 3)))


@pytest.mark.parametrize(
    "names", [("red", "green", "blue", "yellow", ""), ("circle", "square", "triangle", "cross", "")]
)
def test_what_is_in_a_cell_can_be_read_from_its_features(names: tuple[str, ...]) -> None:
    task = VisionLanguage(["caption"], sizes={"train": 400, "test": 100, "validation": 0})
    read = {}
    for split in ("train", "test"):
        rows = task.encoded(split)
        cells = torch.stack(rows.kept()).flatten(0, 2)
        told = [{(t.row, t.column): {t.colour, t.shape} for t in own.scenes[0]} for own in rows.examples]
        own = [next((n for n in names if n in here.get(divmod(i, 3), ())), "") for here in told for i in range(9)]
        read[split] = (torch.cat([cells, torch.ones(len(cells), 1)], 1), torch.tensor([names.index(n) for n in own]))
    x, y = read["train"]
    weights = torch.linalg.solve(x.T @ x + 10 * torch.eye(x.shape[1]), x.T @ nn.functional.one_hot(y).float())
    x, y = read["test"]
    assert ((x @ weights).argmax(1) == y)[y < 4].float().mean() > 0.95


# --------------------------------------------------------------------------------------------------------------------------- task


def task_of(**options: Any) -> VisionLanguage:
    return VisionLanguage(**{"sizes": {"train": 12, "validation": 4, "test": 4}, **options})


def test_rows_of_a_task_and_their_batch() -> None:
    task = task_of()
    rows = task.encoded("train")
    assert len(rows) == 36
    for index in (0, 12, 24):
        own, row = rows.examples[index], rows[index]
        assert task.tokenizer.decode(row["input_ids"], skip_special_tokens=True) == own.prompt
        assert task.tokenizer.decode(row["labels"], skip_special_tokens=True) == own.answer
        assert row["image_features"].shape == (len(own.scenes), 9, 4 * 16 * 16)
        torch.testing.assert_close(row["image_features"], pixels(3)(rows.pictures(index)))
    batch = task.collator([rows[0], rows[12]])
    assert batch["image_features"].shape == (2, 2, 9, 1024)
    assert batch["image_mask"][0].tolist() == [[1] * 9, [0] * 9] and bool(batch["image_mask"][1].all())
    assert "image_mask" not in task.collator([rows[0], rows[1]])
    assert (batch["labels"] == -100).sum() == (batch["labels"].shape[1] - len(rows[0]["labels"])) + (
        batch["labels"].shape[1] - len(rows[12]["labels"])
    )
    other = task_of(seed=1).encoded("train")
    assert other.examples != rows.examples
    assert not {e.scenes for e in rows.examples} & {e.scenes for e in task.encoded("test").examples}


def small_bart(task: VisionLanguage) -> Any:
    from transformers import BartConfig, BartForConditionalGeneration

    sizes: dict[str, Any] = {
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
    }
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BartConfig(
            vocab_size=len(task.tokenizer), **sizes, **heads, **pretraining.SPECIAL, init_std=0.3, dropout=0.0
        )
        return with_visual_tokens(BartForConditionalGeneration(config).eval(), 9)


def test_rows_of_several_tasks_in_one_batch_are_read_as_each_alone() -> None:
    task = task_of()
    rows = task.encoded("train")
    m = task.build_model(small_bart(task), visual_tokens=9).eval()
    mixed = task.collator([rows[0], rows[12], rows[24]])
    labels = mixed.pop("labels").clamp_min(0)
    logits = m(**mixed, decoder_input_ids=labels).logits
    for place, index in enumerate((0, 12, 24)):
        alone = task.prompts([rows[index]])
        torch.testing.assert_close(
            m(**alone, decoder_input_ids=labels[place : place + 1]).logits, logits[place : place + 1]
        )


def test_a_step_is_of_one_task_and_tasks_come_in_proportion() -> None:
    task = VisionLanguage(sizes={"train": {"vqa": 24, "nlvr": 12, "caption": 4}}, features=None)
    rows, names, seen = task.encoded("train"), Counter[str](), Counter[str]()
    own = {task.tokenizer.decode(row["input_ids"]) + task.tokenizer.decode(row["labels"]) for row in rows}  # type: ignore[attr-defined]
    for name, batch in task.steps("train", 4, 400, seed=0):
        texts = task.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
        assert len(texts) == 4 and all(text.startswith(f"{name}:") for text in texts)
        names[name] += 1
        seen.update(texts)
    assert len(own) > 20
    assert abs(names["vqa"] / 400 - 0.6) < 0.08 and abs(names["nlvr"] / 400 - 0.3) < 0.08
    again = [name for name, _ in task.steps("train", 4, 20, seed=0)]
    assert again == [name for name, _ in task.steps("train", 4, 20, seed=0)]
    assert again != [name for name, _ in task.steps("train", 4, 20, seed=1)]
    six = [batch["input_ids"] for name, batch in task.steps("train", 4, 60, seed=2) if name == "vqa"][:6]
    told = [text for ids in six for text in task.tokenizer.batch_decode(ids, skip_special_tokens=True)]
    assert Counter(told) == Counter(e.prompt for e in rows.examples if e.task == "vqa")  # each row once


class Oracle(nn.Module):
    """Answers by heart, wrongly where it is told to."""

    def __init__(self, task: VisionLanguage, split: str, wrong: set[int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        answers = [e.answer if i not in wrong else "red" for i, e in enumerate(task.encoded(split).examples)]
        self.answers, self.task = iter(answers), task

    def generate(self, input_ids: Tensor, **options: Any) -> Tensor:
        assert "labels" not in options and options["image_features"].shape[0] == len(input_ids)
        return self.task.tokenizer([next(self.answers) for _ in input_ids], padding=True, return_tensors="pt").input_ids


def test_figures_are_shares_of_right_answers() -> None:
    task = task_of()
    assert task.evaluate(Oracle(task, "test", set()), "test") == {
        "vqa": 1.0, "nlvr": 1.0, "caption": 1.0, "caption_rouge_l": 1.0, "average": 1.0,
    }  # fmt: skip
    found = task.evaluate(Oracle(task, "test", {4, 8, 9}), "test", batch_size=5)  # a statement and two captions
    assert (found["vqa"], found["nlvr"], found["caption"]) == (1.0, 0.75, 0.5)
    assert found["average"] == 0.75 and 0.5 <= found["caption_rouge_l"] < 0.75


def test_text_alone_needs_no_picture() -> None:
    task = task_of(features=None)
    row = task.encoded("train")[0]
    assert set(row) == {"input_ids", "labels"}
    m = task.build_model(small_bart(task), visual_tokens=9).eval()
    tuned = pt.attach(m, pt.LoRA(rank=2), train_head=False)
    tuned.check(task.collator([row, task.encoded("train")[12]]))
    assert set(task.evaluate(m, "test")) == {"vqa", "nlvr", "caption", "caption_rouge_l", "average"}


@pytest.mark.parametrize(
    "method",
    [pt.VLPET(bottleneck=8, decoder_bottleneck=8), pt.VLAdapter(tasks=TASKS, reduction_factor=4), pt.LoRA(rank=2)],
)
def test_methods_learn_from_pictures_in_a_loop_and_in_the_trainer(method: pt.Method, tmp_path: Any) -> None:
    from transformers import TrainingArguments

    from petiole.training import Events

    task = task_of()
    m = task.build_model(small_bart(task), visual_tokens=9)
    tuned = pt.attach(m, method)
    rows = task.encoded("train")
    whole = task.collator([rows[index] for index in range(len(rows))])

    def loss_of_all() -> float:
        with torch.no_grad(), pt.given(m, task="vqa"):
            return float(m.eval()(**whole).loss)

    before, optimizer = loss_of_all(), torch.optim.AdamW(tuned.parameters(), lr=1e-2)
    events = Events(m, optimizer, total_steps=20)
    events.begin()
    m.train()
    for name, batch in task.steps("train", 12, 20):
        events.before_step()
        with pt.given(m, task=name):
            loss = m(**batch).loss
            loss.backward()
        events.before_optimizer_step(loss)
        optimizer.step()
        events.after_optimizer_step()
        optimizer.zero_grad()
    assert loss_of_all() < 0.9 * before
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=6, learning_rate=1e-3, report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    pt.Trainer(model=m, args=arguments, train_dataset=task.encoded("train"), data_collator=task.collator).train()


def test_tasks_that_are_not_there_are_refused() -> None:
    for tasks in ([], ["vqa", "vqa"], ["gqa"]):
        with pytest.raises(ConfigError, match="different ones of vqa, nlvr, caption"):
            VisionLanguage(tasks)
    with pytest.raises(DataError, match="no dev split; there are train, validation, test"):
        task_of().encoded("dev")


# ------------------------------------------------------------------------------------------------------------------- pre-training

FEW: dict[str, Any] = {
    "steps": 2,
    "rows": 6,
    "batch_size": 3,
    "d_model": 16,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
}


def test_pretraining_is_kept_and_repeats_itself(tmp_path: Any) -> None:
    state = torch.get_rng_state()
    one = pretrained(tmp_path / "a", **FEW)
    assert torch.equal(torch.get_rng_state(), state) and not one.training
    (kept,) = (tmp_path / "a").iterdir()
    before = {path.name: path.stat().st_mtime_ns for path in kept.iterdir()}
    again = pretrained(tmp_path / "a", **FEW)
    assert {path.name: path.stat().st_mtime_ns for path in kept.iterdir()} == before
    elsewhere, other = pretrained(tmp_path / "b", **FEW), pretrained(tmp_path / "a", **{**FEW, "seed": 1})
    assert len(list((tmp_path / "a").iterdir())) == 2
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]) and torch.equal(tensor, elsewhere.state_dict()[name]), name
    assert not torch.equal(one.get_input_embeddings().weight, other.get_input_embeddings().weight)
    from transformers import AutoTokenizer

    assert (
        AutoTokenizer.from_pretrained(kept)("vqa: is there a red circle ?").input_ids
        == task_of().tokenizer("vqa: is there a red circle ?")["input_ids"]
    )


def test_a_run_that_was_cut_leaves_nothing_that_is_taken_for_a_model(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", cut)
    with pytest.raises(KeyboardInterrupt):
        pretrained(tmp_path, **FEW)
    monkeypatch.undo()
    assert pretrained(tmp_path, **FEW).config.d_model == 16


def test_scenes_in_cells_are_what_the_picture_would_show() -> None:
    own = example("nlvr", 0, 0)
    cells = pretraining.in_cells(own)
    assert len(cells) == 18
    for number, one in enumerate(own.scenes):
        told = [words for words in cells if words[-1] == ("first", "second")[number]]
        assert cells[9 * number : 9 * number + 9] == told
        assert [" ".join(words[:4]) for words in told if words[0] != "nothing"] == things(one)
        assert [words[2:4] for words in told] == [[down, along] for down in ROWS for along in COLUMNS]
    tokenizer = task_of().tokenizer
    assert tokenizer.unk_token_id not in tokenizer.convert_tokens_to_ids([word for words in cells for word in words])


def test_scenes_in_words_are_what_the_picture_would_show() -> None:
    own = example("nlvr", 0, 0)
    told = pretraining.in_words(own, random.Random(0)).split(" | ")
    assert told[0] == own.prompt and len(told) == 3
    for text, one in zip(told[1:], own.scenes, strict=True):
        words = text.split()
        assert sorted(" ".join(words[i : i + 4]) for i in range(0, len(words), 4)) == sorted(things(one))
    tokenizer = task_of().tokenizer
    for task in TASKS:
        for number in range(300):
            own = example(task, 0, number)
            for text in (pretraining.in_words(own, random.Random(0)), own.answer):
                assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"], text
