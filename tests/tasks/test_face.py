"""Face recognition: margins and metrics by hand and against scikit-learn, faces whose labels are exact, models of several backbones."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petiole as pt
import toys
from petiole.errors import AttachError, ConfigError, DataError, TrainingError
from petiole.tasks.face import (
    FaceModel,
    FaceRecognition,
    Faces,
    Margin,
    Scored,
    embed,
    fused,
    identification,
    recognise,
    verification,
    without_classes,
)
from petiole.tasks.face.recognition import collate


def backbone(kind: str = "swin") -> nn.Module:
    import transformers as t

    flat = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "swin":
            config = t.SwinConfig(
                image_size=16,
                patch_size=2,
                embed_dim=8,
                num_heads=[2, 4],
                depths=[1, 2],
                window_size=2,
                drop_path_rate=0.0,
            )
            return t.SwinModel(config, add_pooling_layer=False).eval()
        if kind == "vit":
            return t.ViTModel(t.ViTConfig(**flat, image_size=16, patch_size=8), add_pooling_layer=False).eval()
        return t.ResNetModel(t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])).eval()


def model(kind: str = "swin", classes: int = 3, **options: Any) -> FaceModel:
    return FaceModel(backbone(kind), classes, size=8, image_size=16, **options).eval()


def batch(identities: int = 3, images: int = 2, **options: Any) -> dict[str, Tensor]:
    faces = Faces(identities, images, size=16, **options)
    return collate([faces[i] for i in range(len(faces))])


# ------------------------------------------------------------------------------------------------------------------------ margin


@pytest.mark.parametrize(("kind", "value"), [("cosface", None), ("arcface", None), ("cosface", 0.1), ("arcface", 0.2)])
def test_the_target_is_lowered_and_nothing_else(kind: Any, value: float | None) -> None:
    torch.manual_seed(0)
    margin, e, labels = (
        Margin(5, 4, kind, value, scale=10.0).double(),
        torch.randn(3, 4).double(),
        torch.tensor([4, 0, 2]),
    )
    plain, found = margin(e), margin(e, labels)
    cosines = nn.functional.cosine_similarity(e[:, None], margin.weight[None], dim=2)
    torch.testing.assert_close(plain, 10 * cosines)
    m = value or {"cosface": 0.4, "arcface": 0.5}[kind]
    for i, y in enumerate(labels.tolist()):
        for c in range(5):
            cos = float(cosines[i, c])
            wanted = cos if c != y else cos - m if kind == "cosface" else math.cos(math.acos(cos) + m)
            assert float(found[i, c]) == pytest.approx(10 * wanted, abs=1e-9)
            assert c != y or found[i, c] < plain[i, c]


@pytest.mark.parametrize("kind", ["cosface", "arcface"])
def test_without_a_margin_it_is_plain_cross_entropy_of_scaled_cosines(kind: Any) -> None:
    torch.manual_seed(0)
    margin, e, labels = Margin(4, 6, kind, 0.0, scale=5.0).double(), torch.randn(8, 6).double(), torch.randint(4, (8,))
    cosines = nn.functional.normalize(e) @ nn.functional.normalize(margin.weight).T
    plain = nn.functional.cross_entropy(5 * cosines, labels)
    torch.testing.assert_close(nn.functional.cross_entropy(margin(e, labels), labels), plain)


def test_directions_start_at_a_hundredth() -> None:
    torch.manual_seed(0)
    assert abs(float(Margin(200, 100).weight.std()) - 0.01) < 2e-4


@pytest.mark.parametrize("kind", ["cosface", "arcface"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_embedding_on_its_direction_has_a_finite_gradient(kind: Any, dtype: torch.dtype) -> None:
    """Where the arc cosine's slope is infinite."""
    margin = Margin(3, 4, kind)
    for sign in (1.0, -1.0):
        e = (sign * margin.weight.detach()).to(dtype).requires_grad_()
        logits = margin(e, torch.arange(3))
        assert logits.dtype == torch.float32
        logits.sum().backward()
        assert bool(e.grad.isfinite().all()) and bool(margin.weight.grad.isfinite().all())  # type: ignore[union-attr]


@pytest.mark.parametrize("wrong", [{"num_classes": 1}, {"kind": "sphereface"}, {"scale": 0.0}, {"value": -0.1}])
def test_a_margin_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="cosface or arcface"):
        Margin(**{"num_classes": 3, "size": 4, **wrong})


# ----------------------------------------------------------------------------------------------------------------------- metrics


def test_identification_by_hand() -> None:
    gallery = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, 3.0]])  # identities 5, 7, 9, and 7 once more
    probes = torch.tensor([[2.0, 0.2], [1.0, 0.9], [0.1, 0.9], [-1.0, 0.4]])
    found = identification(probes, [5, 7, 7, 5], gallery, [5, 7, 9, 7], ranks=(1, 2, 3))
    assert found == {"rank1": 0.5, "rank2": 0.75, "rank3": 1.0}


def test_embeddings_that_are_all_alike_identify_nobody() -> None:
    found = identification(torch.ones(4, 3), [0, 1, 2, 3], torch.ones(4, 3), [0, 1, 2, 3], ranks=(1, 3, 4))
    assert found == {"rank1": 0.0, "rank3": 0.0, "rank4": 1.0}


def test_rank_k_is_top_k_accuracy_of_the_scores_of_identities() -> None:
    from sklearn.metrics import top_k_accuracy_score

    generator = torch.Generator().manual_seed(0)
    gallery, names = torch.randn(30, 6, generator=generator), torch.arange(30) % 10
    labels = torch.randint(10, (50,), generator=generator)
    probes = gallery[labels] + 1.5 * torch.randn(50, 6, generator=generator)
    scores = nn.functional.normalize(probes) @ nn.functional.normalize(gallery).T
    best = scores.view(50, 3, 10).amax(1)
    found = identification(probes, labels, gallery, names, ranks=(1, 2, 5))
    assert 0.2 < found["rank1"] < found["rank2"] < found["rank5"] < 1
    for k in (1, 2, 5):
        assert found[f"rank{k}"] == pytest.approx(top_k_accuracy_score(labels, best, k=k))


@pytest.mark.parametrize("rounded", [False, True])  # with ties between pairs of both kinds
def test_verification_is_the_highest_point_of_the_roc_within_the_rate(rounded: bool) -> None:
    from sklearn.metrics import roc_curve

    generator = torch.Generator().manual_seed(1)
    same = torch.rand(400, generator=generator) < 0.3
    scores = torch.randn(400, generator=generator) + same.float()
    scores = (scores * 4).round() / 4 if rounded else scores
    rates = (1.0, 0.5, 0.1, 0.03, 0.001)
    found = verification(scores, same, rates)
    false, true, _ = roc_curve(same, scores, drop_intermediate=False)
    for rate in rates:
        assert found[f"tar@{rate:g}"] == pytest.approx(max(true[false <= rate]))


def test_verification_by_hand() -> None:
    scores, same = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4], [True, False, True, True, False, False]
    found = verification(scores, same, rates=(0.3, 0.34, 0.7, 1.0))
    assert found == pytest.approx({"tar@0.3": 1 / 3, "tar@0.34": 1.0, "tar@0.7": 1.0, "tar@1": 1.0})


def test_what_can_not_be_measured_is_refused() -> None:
    with pytest.raises(ConfigError, match="identity 3 of a probe is not in the gallery"):
        identification(torch.eye(2), [0, 3], torch.eye(2), [0, 1])
    with pytest.raises(ConfigError, match="ranks from 1"):
        identification(torch.eye(2), [0, 1], torch.eye(2), [0, 1], ranks=(0,))
    with pytest.raises(ConfigError, match=r"got \(2, 2\) and \(3, 3\)"):
        identification(torch.eye(2), [0, 1], torch.eye(3), [0, 1, 2])
    with pytest.raises(TrainingError, match="not finite"):
        identification(torch.full((2, 2), torch.nan), [0, 1], torch.eye(2), [0, 1])
    for scores, same, rates in (
        ([0.1, 0.2], [True, True], [0.1]),
        ([0.1], [True, False], [0.1]),
        ([0.1, 0.2], [True, False], [0.0]),
    ):
        with pytest.raises(ConfigError, match="pairs of both kinds"):
            verification(scores, same, rates)


def test_an_image_and_its_mirror_image_count_by_their_lengths() -> None:
    a, b = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    torch.testing.assert_close(fused(a, b), torch.tensor([[0.6, 0.8]]))
    na, nb = (nn.functional.normalize(t) for t in (a, b))
    torch.testing.assert_close(fused(a, b), nn.functional.normalize(3 * na + 4 * nb))


# ------------------------------------------------------------------------------------------------------------------------- faces


def test_a_face_is_drawn_from_its_seed_and_numbers_alone() -> None:
    state = torch.get_rng_state()
    faces, more = Faces(3, 2, size=16, seed=4), Faces(5, 4, size=16, seed=4)
    torch.testing.assert_close(faces[3]["pixel_values"], more[5]["pixel_values"], rtol=0, atol=0)  # identity 1, image 1
    assert (faces[3]["labels"], more[5]["labels"]) == (1, 1)
    later = Faces(3, 1, size=16, seed=4, first=3)
    assert torch.equal(later[1]["pixel_values"], more[7]["pixel_values"])  # the same person's fourth image
    assert not torch.equal(faces[0]["pixel_values"], Faces(3, 2, size=16, seed=5)[0]["pixel_values"])
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(IndexError):
        faces[6]


def test_images_of_one_person_are_nearer_than_those_of_others() -> None:
    faces = Faces(12, 6, size=24, variation=0.3)
    pixels = torch.stack([faces[i]["pixel_values"][:, 8:-6, 6:-6] for i in range(len(faces))]).flatten(1)
    apart = torch.cdist(pixels, pixels)
    labels = torch.tensor([faces[i]["labels"] for i in range(len(faces))])
    one = labels[:, None] == labels
    assert float(apart[one & (apart > 0)].mean()) < 0.6 * float(apart[~one].mean())


def test_quality_says_what_is_left_of_the_resolution() -> None:
    from petiole.methods.lowrank.quality import laplacian

    kinds = {share: Faces(20, 1, size=40, quality=(share, share), noise=0.0) for share in (1.0, 0.5, 0.2)}
    sharpness = []
    for share, faces in kinds.items():
        rows = [faces[i] for i in range(20)]
        assert all(float(row["quality"]) == pytest.approx(share) for row in rows)
        sharpness.append(float(laplacian(torch.stack([row["pixel_values"] for row in rows])).mean()))
    assert sharpness[0] > sharpness[1] + 0.4 > sharpness[2] + 0.8  # decades
    full, poor = kinds[1.0][0]["pixel_values"], kinds[0.2][0]["pixel_values"]
    blocks = nn.functional.avg_pool2d(full, 5)
    again = nn.functional.interpolate(blocks[None], (40, 40), mode="bilinear")[0]
    torch.testing.assert_close(poor, again, rtol=1e-4, atol=1e-4)  # no more than the means of 5 x 5 pixels
    spread = torch.stack([Faces(60, 1, size=40, quality=(0.2, 0.8))[i]["quality"] for i in range(60)])
    assert 0.2 <= float(spread.min()) < 0.25 and 0.7 < float(spread.max()) < 0.801
    assert abs(float(spread.median()) - 0.4) < 0.1  # even on a logarithmic scale
    assert "quality" not in Faces(2, 1, with_quality=False)[0]


@pytest.mark.parametrize(
    "wrong", [{"identities": 0}, {"images": 0}, {"size": 7}, {"quality": (0.5, 0.2)}, {"noise": -1.0}]
)
def test_faces_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="identities and images start at 1"):
        Faces(**{"identities": 2, "images": 2, **wrong})


# ------------------------------------------------------------------------------------------------------------------------ models


@pytest.mark.parametrize("kind", ["swin", "vit", "resnet"])
@pytest.mark.parametrize("features", ["tokens", "mean"])
def test_any_backbone_embeds(kind: str, features: Any) -> None:
    state = torch.get_rng_state()
    made = model(kind, features=features)
    assert torch.equal(torch.get_rng_state(), state)
    rows = batch()
    with torch.no_grad():
        found = made(**rows)
        plain = made(rows["pixel_values"])
    assert found.embeddings.shape == (6, 8) and found.logits.shape == (6, 3)
    assert torch.equal(plain.embeddings, found.embeddings) and plain.loss is None
    torch.testing.assert_close(
        found.loss, nn.functional.cross_entropy(made.classes(found.embeddings, rows["labels"]), rows["labels"])
    )  # type: ignore[misc]
    widths = {("swin", "tokens"): 256, ("swin", "mean"): 16, ("vit", "tokens"): 80, ("vit", "mean"): 16}
    assert made.encoder.pooler.linear.in_features == widths.get(
        (kind, features), made.encoder.pooler.linear.in_features
    )


def test_counts_at_the_papers_size() -> None:
    """1,130,496 in the twins, 311,296 in the projection, over 213.7M; the paper prints 0.48 %, which this is not."""
    from transformers import SwinConfig, SwinModel

    with torch.device("meta"):
        config = SwinConfig(
            image_size=120, patch_size=6, embed_dim=384, depths=[2, 18, 2], num_heads=[8, 16, 16], window_size=5, use_absolute_embeddings=True
        )  # fmt: skip
        whole = FaceModel(SwinModel(config, add_pooling_layer=False), 2570)
    assert whole.encoder.pooler.linear.in_features == 38_400
    total = sum(p.numel() for p in whole.encoder.parameters())
    assert round(total / 1e6, 1) == 213.7
    for fields, count in (
        ({"single_roles": ()}, 1_130_496),
        ({"single_roles": ("pooler",)}, 1_441_792),
        ({}, 1_441_792),
    ):
        tuned = pt.attach(whole, pt.PETALface(**fields), train_head=False)
        assert tuned.trainable == count
        tuned.detach()
    assert pt.attach(whole, pt.PETALface()).trainable == 1_441_792 + 2570 * 512
    assert round(100 * 1_441_792 / total, 2) == 0.67


def test_a_projection_has_one_branch_and_no_alpha() -> None:
    made, rows = model(), batch()
    tuned = pt.attach(made, pt.PETALface(rank=2, quality=None, threshold=0.5, normalise=None, roles=("q",)))
    (single,) = (slot for slot in tuned.slots if slot.site.role == "pooler")
    assert not single.delta.twin and single.delta.D.shape == (2, 256)
    toys.shake(tuned)
    with pt.given(made, alpha=0.5):
        expected = made(rows["pixel_values"]).embeddings
        tuned.merge(partly=True)
        torch.testing.assert_close(made(rows["pixel_values"]).embeddings, expected, rtol=1e-4, atol=1e-5)


def test_scores_can_be_an_argument_of_the_model() -> None:
    made, rows = model(), batch(quality=(0.2, 1.0))
    tuned = pt.attach(made, pt.PETALface(rank=2, quality=None))
    toys.shake(tuned)
    tuned.calibrate([rows])
    q = rows["quality"]
    torch.testing.assert_close(tuned.shared[0].lowest, q.min())
    found = toys.output(made, rows)
    with pt.given(made, quality=q):
        assert torch.equal(toys.output(made, {k: v for k, v in rows.items() if k != "quality"}), found)
    with pytest.raises(AttachError, match="needs the quality"):
        made(rows["pixel_values"])


def test_only_what_is_declared_trains_and_statistics_stay() -> None:
    made, rows = model(), batch(quality=(0.2, 1.0))
    tuned = pt.attach(made, pt.PETALface(rank=2, dropout=0.0))
    assert {s.site.role for s in tuned.slots} == {"q", "k", "v", "pooler", "head"}
    tuned.calibrate([rows])
    tuned.check(rows)
    statistics = made.encoder.pooler.norm_in.running_mean.clone()  # type: ignore[operator]
    made.train()(**rows).loss.backward()
    assert torch.equal(made.encoder.pooler.norm_in.running_mean, statistics)
    assert not any(p.requires_grad for p in made.encoder.pooler.norm_in.parameters())


def test_identities_are_dropped_after_training(tmp_path: Path) -> None:
    made, rows = model(), batch(quality=(0.2, 1.0))
    tuned = pt.attach(made, pt.PETALface(rank=2))
    tuned.calibrate([rows])
    toys.shake(tuned)
    expected = made(rows["pixel_values"]).embeddings
    kept = without_classes(tuned)
    found = made(rows["pixel_values"])
    assert torch.equal(found.embeddings, expected) and found.logits is None
    assert kept.trainable == 2 * 2 * (8 + 3 * 8) + 2 * 2 * 2 * (16 + 3 * 16) + 2 * (256 + 8)
    assert not any(tensor.shape == (3, 8) for tensor in kept.named_tensors().values())
    other = model(classes=0)
    pt.load(other, kept.save(tmp_path / "x.safetensors"))
    assert torch.equal(other(rows["pixel_values"]).embeddings, expected)
    with pytest.raises(ConfigError, match="no training identities"):
        other(**rows)
    with pytest.raises(AttachError, match="no training identities"):
        without_classes(pt.attach(backbone(), pt.LoRA(rank=1)))


# -------------------------------------------------------------------------------------------------------------------- recognition


class Mean(nn.Module):
    """Embeds an image as the means of its left and its right half, by channel; longer where it is told that the quality is high."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, pixel_values: Tensor, quality: Tensor | None = None) -> Any:
        from petiole.tasks.face import FaceOutput

        e = torch.cat([half.mean((2, 3)) for half in pixel_values.chunk(2, -1)], 1)
        return FaceOutput(embeddings=self.scale * e if quality is None else e * quality[:, None])


def test_embedding_fuses_the_mirror_image() -> None:
    faces = Faces(3, 2, size=16)
    mean = Mean().train()
    found, labels = embed(mean, faces, batch_size=4)
    assert mean.training and labels.tolist() == [0, 0, 1, 1, 2, 2]
    pixels = torch.stack([faces[i]["pixel_values"] for i in range(6)])
    both = torch.cat([half.mean((2, 3)) for half in pixels.chunk(2, -1)], 1)
    torch.testing.assert_close(found, nn.functional.normalize(both + both.roll(3, 1)), rtol=1e-4, atol=1e-5)
    alone, _ = embed(mean, faces, flip=False)
    torch.testing.assert_close(alone, nn.functional.normalize(both), rtol=1e-4, atol=1e-5)


def test_the_mirror_image_is_judged_by_itself() -> None:
    judged: list[Tensor] = []

    def judge(images: Tensor) -> Tensor:
        judged.append(images)
        return images[..., : images.shape[-1] // 2].mean((1, 2, 3))  # which the mirror image changes

    made = model()
    pt.attach(made, pt.PETALface(rank=2, threshold=0.5, normalise=None))
    faces = Faces(2, 1, size=16, with_quality=False)
    with pt.given(made, quality=judge):
        embed(made, faces)
    torch.testing.assert_close(judged[0], judged[1].flip(-1))
    torch.testing.assert_close(judged[0], torch.stack([faces[i]["pixel_values"] for i in range(2)]) * 0.5 + 0.5)


def test_scores_are_computed_once_for_each_image() -> None:
    class Judge(nn.Module):
        calls = 0

        def forward(self, images: Tensor) -> Tensor:
            assert not self.training and not torch.is_grad_enabled()
            self.calls += 1
            return images.mean((1, 2, 3))[:, None]

    faces, judge = Faces(3, 1, size=16, with_quality=False), Judge()
    rows = Scored(faces, judge)
    for _ in range(2):
        scored = collate([rows[i] for i in range(len(rows))])
    assert judge.calls == 3 and scored["quality"].shape == (3,)
    torch.testing.assert_close(scored["quality"], (scored["pixel_values"] * 0.5 + 0.5).mean((1, 2, 3)))


def test_splits_show_different_people_and_the_gallery_other_images_than_the_probes() -> None:
    task = FaceRecognition({"train": 3, "test": 2}, images={"train": 2, "gallery": 1, "probe": 2}, size=16)
    assert sorted(task.splits) == ["test-gallery", "test-probe", "train", "validation-gallery", "validation-probe"]
    assert {name: len(task.encoded(name)) for name in ("train", "test-gallery", "test-probe")} == {
        "train": 6,
        "test-gallery": 2,
        "test-probe": 4,
    }
    everyone = Faces(2, 3, size=16, quality=(1.0, 1.0), seed=2)
    assert torch.equal(task.encoded("test-gallery")[1]["pixel_values"], everyone[3]["pixel_values"])
    assert "quality" not in task.encoded("train")[0]
    with pytest.raises(DataError, match="no dev split"):
        task.encoded("dev")
    with pytest.raises(ConfigError, match="images names 'probes'"):
        FaceRecognition(images={"probes": 2})


def test_a_model_learns_to_recognise_poor_images(tmp_path: Path) -> None:
    """Trained with pt.Trainer on a handful of people, measured on others."""
    from transformers import TrainingArguments

    task = FaceRecognition(
        {"train": 8, "validation": 6, "test": 6}, images={"train": 6, "gallery": 1, "probe": 3}, size=16, variation=0.3
    )
    made = task.build_model(backbone(), size=8, margin_value=0.1, margin_scale=16.0)
    tuned = pt.attach(made, pt.PETALface(rank=2, dropout=0.0))
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=16, learning_rate=1e-2, save_strategy="no", report_to=[],
        use_cpu=True, disable_tqdm=True, logging_strategy="no", seed=0,
    )  # fmt: skip
    rows = collate([task.encoded("train")[i] for i in range(48)])
    tuned.calibrate([rows])
    with torch.no_grad():
        before = float(made(**rows).loss)
    pt.Trainer(model=made, args=arguments, train_dataset=task.encoded("train"), data_collator=task.collator).train()
    made.eval()
    with torch.no_grad():
        assert float(made(**rows).loss) < 0.8 * before
    found = task.evaluate(made, "test", ranks=(1, 3), rates=(0.2,))
    assert list(found) == ["rank1", "rank3", "tar@0.2"]
    assert found == recognise(
        made, task.encoded("test-gallery"), task.encoded("test-probe"), ranks=(1, 3), rates=(0.2,)
    )
    assert found["rank1"] > 1 / 6 < found["tar@0.2"] and found["rank3"] > 0.5  # above chance
