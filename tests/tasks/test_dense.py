"""Dense prediction: scenes whose labels are checked against each other, losses and metrics by hand, decoders by count, models of both kinds."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import petiole as pt
import toys
from petiole.errors import ConfigError, DataError
from petiole.method import HiddenDelta
from petiole.tasks.dense import METRICS, TARGETS, Decoder, DenseModel, DensePrediction, Scenes, delta_m
from petiole.tasks.dense.metrics import angles, confusion
from petiole.tasks.dense.scenes import render
from petiole.tasks.dense.targets import UNKNOWN, balanced, cross_entropy, direction_loss, edge_loss, l1

ALL = tuple(TARGETS)


def swin(**changes: Any) -> nn.Module:
    from transformers import SwinConfig, SwinModel

    fields = {
        "image_size": 32,
        "patch_size": 2,
        "embed_dim": 8,
        "num_heads": [2, 4],
        "depths": [1, 2],
        "window_size": 4,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SwinModel(SwinConfig(**{**fields, "drop_path_rate": 0.0, **changes}), add_pooling_layer=False).eval()


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8), add_pooling_layer=False).eval()


def batch(tasks: Any = ALL, count: int = 3, **options: Any) -> dict[str, Any]:
    scenes = Scenes(count, size=32, tasks=tasks, **options)
    return DensePrediction.collator([scenes[i] for i in range(count)])


# ------------------------------------------------------------------------------------------------------------------- scenes


def test_a_scene_is_drawn_from_its_seed_and_number_alone() -> None:
    state = torch.get_rng_state()
    one, two, other = Scenes(3, size=32, seed=4), Scenes(9, size=32, seed=4), Scenes(3, size=32, seed=5)
    torch.manual_seed(1)
    assert torch.equal(one[2]["pixel_values"], two[2]["pixel_values"])
    assert not torch.equal(one[2]["pixel_values"], one[1]["pixel_values"])
    assert not torch.equal(one[2]["pixel_values"], other[2]["pixel_values"])
    torch.set_rng_state(state)
    one[0]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("seed", range(8))
def test_labels_agree_with_each_other(seed: int) -> None:
    """Normals are those of the depth, by differences; edges are where depth or shape jumps; what is salient is nearest."""
    size = 128
    _, labels = render(size, 3, torch.Generator().manual_seed(seed))
    depth, normals, edge = labels["depth"][0], labels["normals"], labels["edge"][0] > 0
    torch.testing.assert_close(normals.norm(dim=0), torch.ones(size, size))
    assert bool((normals[2] > 0).all())  # everything seen faces the viewer
    step = 4 / size  # two pixels
    dx = -(depth[1:-1, 2:] - depth[1:-1, :-2]) / step  # dz/dx, z = 2 - depth
    dy = (depth[2:, 1:-1] - depth[:-2, 1:-1]) / step
    n = normals[:, 1:-1, 1:-1]
    flat = n[2] > 0.5  # differences are good where the surface isn't steep
    for axis in (0, 1):  # nor across the ridge of a box
        flat = flat & ((normals.roll(1, axis + 1) - normals.roll(-1, axis + 1)).norm(dim=0)[1:-1, 1:-1] < 0.3)
    inner = flat & ~edge[1:-1, 1:-1]
    assert inner.float().mean() > 0.5
    torch.testing.assert_close((-n[0] / n[2])[inner], dx[inner], rtol=0.05, atol=0.05)
    torch.testing.assert_close((-n[1] / n[2])[inner], dy[inner], rtol=0.05, atol=0.05)
    wall, shapes = labels["semseg"] == 0, labels["semseg"] > 0
    assert torch.equal(wall, labels["human_parts"] == 0)
    assert labels["human_parts"].max() <= 6 and labels["semseg"].max() <= 3
    salient = labels["saliency"][0] > 0
    assert salient.any() and not (salient & wall).any()
    assert depth[salient].min() == depth[shapes].min()
    beside = shapes[:, 1:] != shapes[:, :-1]
    assert bool(edge[:, 1:][beside].all() and edge[:, :-1][beside].all())


def test_shapes_have_the_normals_of_their_kind() -> None:
    kinds: dict[int, list[Tensor]] = {1: [], 2: [], 3: []}
    for seed in range(12):
        _, labels = render(64, 3, torch.Generator().manual_seed(seed))
        for kind, found in kinds.items():
            found.append(labels["normals"][:, labels["semseg"] == kind])
    ball, box, cylinder = (torch.cat(found, 1) for found in kinds.values())
    assert ball.shape[1] and box.shape[1] and cylinder.shape[1]
    assert ball[1].abs().max() > 0.5  # balls look up and down too
    assert bool((box[1] == 0).all() and (cylinder[1] == 0).all())
    assert len(torch.unique(box.round(decimals=4), dim=1).T) <= 2 * 36  # two faces each


def test_unlabelled_pixels() -> None:
    scene = Scenes(1, size=32, unlabelled=0.25)[0]["labels"]
    for task, label in scene.items():
        missing = (label == UNKNOWN).flatten(0, -3).all(0) if label.ndim > 2 else label == UNKNOWN
        assert int(missing.sum()) == 256, task


@pytest.mark.parametrize(
    "fields", [{"count": 0}, {"size": 4}, {"shapes": (3, 2)}, {"noise": -1.0}, {"unlabelled": 1.0}, {"tasks": ("normal",)},
               {"tasks": ("depth", "depth")}, {"tasks": ()}],
)  # fmt: skip
def test_refused_scenes(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"task|scenes"):
        Scenes(**{"count": 1, **fields})


# ------------------------------------------------------------------------------------------------------------------- losses


def test_cross_entropy_leaves_unlabelled_pixels_out() -> None:
    scores, labels = torch.randn(2, 4, 3, 3), torch.randint(4, (2, 3, 3))
    labels[0, 1, 1] = UNKNOWN
    p = scores.softmax(1)
    wanted = [
        -p[b, labels[b, i, j], i, j].log() for b in range(2) for i in range(3) for j in range(3) if labels[b, i, j] < 4
    ]
    torch.testing.assert_close(cross_entropy(scores, labels), torch.stack(wanted).mean())


def test_balanced_binary_cross_entropy() -> None:
    scores, labels = torch.randn(1, 1, 1, 4), torch.tensor([[[[1.0, 0.0, 0.0, UNKNOWN]]]])
    p = scores.sigmoid().flatten()
    on, off = -p[0].log(), -(1 - p[1]).log() - (1 - p[2]).log()
    torch.testing.assert_close(edge_loss(scores, labels), (0.95 * on + 0.05 * off) / 3)
    torch.testing.assert_close(balanced(scores, labels), (2 / 3 * on + 1 / 3 * off) / 3)  # two of three are not


def test_direction_and_distance() -> None:
    predictions, labels = torch.tensor([3.0, 0.0, 4.0]).view(1, 3, 1, 1), torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1)
    torch.testing.assert_close(direction_loss(predictions, labels), torch.tensor((0.6 + 0.2) / 3))
    torch.testing.assert_close(direction_loss(5 * predictions, labels), direction_loss(predictions, labels))
    maps = torch.tensor([[[[1.0, 2.0]]]])
    torch.testing.assert_close(l1(maps, torch.tensor([[[[3.0, UNKNOWN]]]])), torch.tensor(2.0))


@pytest.mark.parametrize("task", ALL)
def test_a_batch_without_any_label_has_no_loss(task: str) -> None:
    label = torch.full(
        (1, 2, 2) if not TARGETS[task].label_channels else (1, TARGETS[task].label_channels, 2, 2), 255.0
    )
    scores = torch.randn(1, TARGETS[task].channels, 2, 2, requires_grad=True)
    loss = TARGETS[task].loss(scores, label)
    assert float(loss) == 0
    loss.backward()
    assert bool((scores.grad == 0).all())


# ------------------------------------------------------------------------------------------------------------------ metrics


def test_intersection_over_union_by_counting() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(2, 4, 6, 6, generator=generator), torch.randint(3, (2, 6, 6), generator=generator)
    labels[0, :2] = UNKNOWN
    guess, there = scores.argmax(1), labels != UNKNOWN
    each = []
    for c in range(4):
        p, t = (guess == c) & there, labels == c
        if (p | t).any():
            each.append(float((p & t).sum() / (p | t).sum()))
    assert METRICS["mean_iou"](scores, labels) == pytest.approx(sum(each) / len(each))
    table = confusion(scores, labels)
    assert table.sum() == there.sum() and table[1, 2] == ((labels == 1) & (guess == 2)).sum()


def test_foreground_and_edges_by_counting() -> None:
    p = torch.tensor([0.9, 0.7, 0.3, 0.1, 0.6])
    labels = torch.tensor([1.0, 1.0, 1.0, 0.0, UNKNOWN])
    scores, labels = p.logit().view(1, 1, 1, 5), labels.view(1, 1, 1, 5)
    assert METRICS["foreground_iou"](scores, labels) == pytest.approx(2 / 3)
    assert METRICS["best_f1"](scores, labels) == pytest.approx(1.0)  # between 0.1 and 0.3
    assert METRICS["best_f1"](-scores, labels) == pytest.approx(2 * 3 / (4 + 3))  # all of them


def test_angles_and_squares() -> None:
    a = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 2.0], [0.0, 1.0, 0.0]]).T.reshape(1, 3, 1, 3)
    b = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]]).T.reshape(1, 3, 1, 3)
    assert METRICS["angular_error"](a, b) == pytest.approx((90 + 0 + 180) / 3)
    t = 1e-6  # an arc cosine would round it away
    near = torch.tensor([math.sin(t), 0.0, math.cos(t)], dtype=torch.float64).view(1, 3, 1, 1)
    total, count = angles(near, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).view(1, 3, 1, 1)).tolist()
    assert total == pytest.approx(math.degrees(t), rel=1e-6) and count == 1
    maps = torch.tensor([[[[1.0, 2.0, 9.0]]]]), torch.tensor([[[[2.0, 4.0, UNKNOWN]]]])
    assert METRICS["rmse"](*maps) == pytest.approx(math.sqrt((1 + 4) / 2))


@pytest.mark.parametrize("task", ALL)
def test_sums_add_up_over_batches_and_perfect_is_best(task: str) -> None:
    metric, target = METRICS[TARGETS[task].metric], TARGETS[task]
    labels = batch(count=4)["labels"][task]
    scores = torch.randn(4, target.channels, 32, 32, generator=torch.Generator().manual_seed(0))
    parts = sum(metric.sums(scores[i : i + 2], labels[i : i + 2]) for i in (0, 2))
    assert metric.value(parts) == pytest.approx(metric(scores, labels), rel=1e-9)
    if not target.label_channels:
        perfect = nn.functional.one_hot(labels, target.channels).movedim(-1, 1).float()
    else:
        perfect = 20 * labels - 10 if target.name in ("saliency", "edge") else labels
    best = 1.0 if metric.higher_is_better else 0.0
    assert metric(perfect, labels) == pytest.approx(best, abs=1e-5)
    assert abs(metric(scores, labels) - best) > 0.1


def test_delta_m() -> None:
    single = {"semseg": 0.5, "normals": 20.0, "depth": 2.0, "edge": 0.8}
    found = {"semseg": 0.6, "normals": 18.0, "depth": 2.2, "edge": 0.8}
    assert delta_m(found, single) == pytest.approx((20 + 10 - 10 + 0) / 4)
    for one, other in (
        ({}, {}),
        ({"semseg": 1.0}, {"depth": 1.0}),
        ({"cats": 1.0}, {"cats": 1.0}),
        ({"edge": 0.1}, {"edge": 0.0}),
    ):
        with pytest.raises(ConfigError, match="Δm"):
            delta_m(one, other)


# ------------------------------------------------------------------------------------------------------------------- models


def test_decoders_have_the_published_size() -> None:
    """Swin-T: 732,672 to bring the scales to their widths, 1,213,952 for the rest, four tasks."""
    tasks = ("semseg", "normals", "saliency", "human_parts")
    with torch.device("meta"):
        decoders = [Decoder((192, 384, 768, 768), TARGETS[task].channels) for task in tasks]
    bring = sum(p.numel() for d in decoders for p in d.bring.parameters())
    assert bring == 732_672
    assert sum(p.numel() for d in decoders for p in d.parameters()) - bring == 1_213_952


@pytest.mark.parametrize("kind", [swin, vit])
def test_a_model_predicts_every_task_in_the_images_size(kind: Any) -> None:
    model = DenseModel(kind(), ALL, width=4, depths=(0, -1) if kind is vit else None).eval()
    rows = batch()
    found = model(**rows)
    for task in ALL:
        assert found.logits[task].shape == (3, TARGETS[task].channels, 32, 32)
        torch.testing.assert_close(found.losses[task], TARGETS[task].loss(found.logits[task], rows["labels"][task]))
    wanted = sum(TARGETS[task].weight * found.losses[task] for task in ALL)
    torch.testing.assert_close(found.loss, wanted)
    assert model(rows["pixel_values"]).loss is None
    some = model(rows["pixel_values"], labels={"edge": rows["labels"]["edge"]})
    torch.testing.assert_close(some.loss, 50 * found.losses["edge"])


def test_maps_are_the_backbones_states() -> None:
    model, rows = DenseModel(swin(), ("depth",), width=4).eval(), batch(("depth",))
    maps = model.maps(rows["pixel_values"], ("depth",))["depth"]
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 8, 8), (16, 8, 8)]
    stages = model.backbone(rows["pixel_values"], output_hidden_states=True).reshaped_hidden_states
    assert all(torch.equal(a, b) for a, b in zip(maps, stages[1:], strict=True))
    flat = DenseModel(vit(), ("depth",), width=4, depths=(0, 2)).eval()
    states = flat.backbone(rows["pixel_values"], output_hidden_states=True).hidden_states
    for m, depth in zip(flat.maps(rows["pixel_values"], ("depth",))["depth"], (0, 2), strict=True):
        assert m.shape == (3, 16, 4, 4)
        assert torch.equal(
            m[:, :, 1, 2], states[depth + 1][:, 1 + 4 * 1 + 2]
        )  # row 1, column 2, behind the class token


def test_decoders_are_drawn_from_their_seed_alone() -> None:
    state = torch.get_rng_state()
    one, two, other = (DenseModel(swin(), ALL, width=4, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    first = lambda m: m.heads.tasks["edge"].last.weight  # noqa: E731
    assert torch.equal(first(one), first(two)) and not torch.equal(first(one), first(other))


def test_a_batch_of_one_pixel_has_no_variance() -> None:
    decoder = Decoder((3,), 1, width=2).train()
    assert bool(torch.isfinite(decoder([torch.randn(1, 3, 1, 1)])).all())
    decoder([torch.randn(1, 3, 2, 2)])


@pytest.mark.parametrize("fields", [{"tasks": ("cats",)}, {"tasks": ()}, {"tasks": ("edge", "edge")}, {"channels": {"depth": 2}},
                                    {"loss_weights": {"depth": 2.0}}, {"depths": (0,)}])  # fmt: skip
def test_refused_models(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        DenseModel(swin(), **{"tasks": ("edge",), **fields})


@pytest.mark.parametrize("method", ["LoRA", "FullFineTuning", "LinearProbe"])
def test_any_method_trains_the_decoders(method: str, tmp_path: Any) -> None:
    model, rows = DenseModel(swin(), ("semseg", "depth"), width=2), batch(("semseg", "depth"))
    tuned = pt.attach(model, getattr(pt, method)())
    heads = sum(p.numel() for p in model.heads.tasks.parameters())
    assert tuned.trainable >= heads
    tuned.check(rows)
    optimizer = torch.optim.Adam(tuned.parameters(), lr=1e-2)
    losses = []
    model.train()
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(**rows).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    model.eval()
    with torch.no_grad():
        wanted = model(**rows).logits["depth"]
    again = DenseModel(swin(), ("semseg", "depth"), width=2, seed=7).eval()
    pt.load(again, tuned.save(tmp_path / "x.safetensors"))
    with torch.no_grad():
        assert torch.equal(again(**rows).logits["depth"], wanted)


def test_one_task_by_name() -> None:
    model, rows = DenseModel(swin(), ("semseg", "depth"), width=2).eval(), batch(("semseg", "depth"))
    pt.attach(model, pt.LoRA())
    whole = model(**rows)
    with pt.given(model, task="depth"):
        found = model(**rows)
    assert torch.equal(found.logits, whole.logits["depth"]) and torch.equal(found.loss, whole.losses["depth"])
    with pt.given(model, task=["depth"]):
        assert list(model(**rows).logits) == ["depth"]
    with pytest.raises(ConfigError, match="cats"), pt.given(model, task="cats"):
        model(**rows)


class Shift(HiddenDelta):
    """h + a number of the task that the pass is of"""

    seen: ClassVar[list[str]] = []

    def forward(self, h: Tensor) -> Tensor:
        task = self.given("task")
        self.seen.append(task)
        return torch.full_like(h, 1.0 + 2.0 * (task == "depth"))


def test_the_backbone_runs_for_each_task_where_states_are_a_tasks_own() -> None:
    """Each decoder reads what its task alone would give; losses add up, and gradients reach the decoders of all."""
    tasks, rows = ("semseg", "depth"), batch(("semseg", "depth"))
    model = DenseModel(swin(), tasks, width=2).eval()
    own = toys.method(toys.on(["ffn"], lambda site: Shift(), layers=[0]), one_task=True, tasks=tasks)
    pt.attach(model, own)
    alone = {}
    for task in tasks:
        with pt.given(model, task=task):
            alone[task] = model(**rows)
    Shift.seen.clear()
    whole = model(**rows)
    assert Shift.seen == list(tasks)
    for task in tasks:
        assert torch.equal(whole.logits[task], alone[task].logits)
    torch.testing.assert_close(whole.loss, sum(found.loss for found in alone.values()))
    with pt.given(model, task=["depth"]):
        assert torch.equal(model(**rows).logits["depth"], alone["depth"].logits)
    whole.loss.backward()
    assert all(p.grad is not None for p in pt.adaptations(model)["default"].parameters())


def test_the_task_as_a_whole() -> None:
    task = DensePrediction(("semseg", "normals"), sizes={"train": 4, "validation": 3, "test": 2}, size=32)
    model = task.build_model(swin(), width=2, channels={"semseg": 4}).train()
    found = task.evaluate(model, batch_size=2)
    assert list(found) == ["semseg", "normals"] and model.training and 0 <= found["semseg"] <= 1
    rows = task.collator([task.encoded("validation")[i] for i in range(3)])
    with torch.no_grad():
        logits = model.eval()(**rows).logits
    for name, value in found.items():
        assert value == pytest.approx(METRICS[TARGETS[name].metric](logits[name], rows["labels"][name]))
    assert task.delta_m(found, found) == 0
    pixels = [task.encoded(split)[0]["pixel_values"] for split in ("train", "validation", "test")]
    assert not torch.equal(pixels[0], pixels[1]) and not torch.equal(pixels[1], pixels[2])
    with pytest.raises(DataError, match="no holiday split"):
        task.encoded("holiday")
    with pytest.raises(ConfigError, match="predicts none"):
        DensePrediction(("depth",), sizes={"validation": 1}, size=32).evaluate(model)


def test_the_trainer_takes_the_parts(tmp_path: Any) -> None:
    from transformers import TrainingArguments

    task = DensePrediction(("semseg", "edge"), sizes={"train": 4}, size=32)
    model = task.build_model(swin(), width=2)
    tuned = pt.attach(model, pt.LoRA())
    before = [p.detach().clone() for p in tuned.parameters()]
    args = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    pt.Trainer(model=model, args=args, train_dataset=task.encoded("train"), data_collator=task.collator).train()
    assert all(not torch.equal(a, b) for a, b in zip(before, tuned.parameters(), strict=True))
