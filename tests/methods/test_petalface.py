"""What PETALface must hold, by its specification: on one linear, on an image transformer with tokens and on one with windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import linears
import petiole as pt
import tiny
import toys
from linears import set_
from petiole.errors import AttachError, ConfigError, TrainingError
from petiole.methods.lowrank.petalface import Branches, PETALface
from petiole.methods.lowrank.quality import MEASURES, Blend, contrast, gradient, laplacian

IN, OUT, RANK, IMAGES = 6, 5, 2, 3
GIVEN: dict[str, Any] = {"quality": None, "threshold": 0.4, "normalise": None}  # scores are given


def method(**fields: Any) -> PETALface:
    return PETALface(**{"rank": RANK, "dropout": 0.0, **GIVEN, **fields})


def layer(seed: int = 0, **fields: Any) -> tuple[linears.OneLinear, Branches]:
    """A linear with random branches, in float64."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(OUT, IN, generator=generator, dtype=torch.float64)
    b = torch.randn(OUT, generator=generator, dtype=torch.float64)
    model, delta = linears.attached(method(**fields), W, b)
    model.double()
    for tensor in (delta.D, delta.U):
        set_(tensor, torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    return model, delta


def inputs(seed: int = 1) -> Tensor:
    """(images, tokens, in)"""
    return torch.randn(IMAGES, 4, IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attached(family: str = "vit", shaken: bool = True, size: int = 4, **fields: Any) -> Any:
    model, batch = toys.model(family), tiny.batch(family, size=size)
    tuned = pt.attach(model, method(**fields), train_head=False)
    if shaken:
        toys.shake(tuned, 0.3)
    return model, batch, tuned


def blend(**fields: Any) -> Blend:
    return Blend(method(**fields))


def branches(tuned: pt.Adaptation) -> list[Branches]:
    return [slot.delta for slot in tuned.slots if isinstance(slot.delta, Branches)]


# ------------------------------------------------------------------------------------------------------------------ must hold: 1


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_the_start_is_the_backbone_whatever_alpha(family: str) -> None:
    model, batch = toys.model(family), tiny.batch(family)
    bare = toys.output(model.requires_grad_(False), batch)
    tuned = pt.attach(model, method(), train_head=False)
    for alpha in (0.0, 0.5, 1.0, 3.0, torch.tensor([0.2, -0.7])):
        with pt.given(model, alpha=alpha):
            assert torch.equal(toys.output(model, batch), bare)
    for delta in branches(tuned):
        assert not delta.U.any()


def test_the_start_of_d_has_deviation_one_over_rank() -> None:
    tuned = pt.attach(toys.model("vit"), method(rank=4, joint_qkv=False), train_head=False)
    values = torch.cat([delta.D.detach().flatten() for delta in branches(tuned)])  # 6 x 8 x 32
    assert abs(float(values.std()) * 4 - 1) < 0.05 and abs(float(values.mean())) < 0.02


def test_the_references_other_start() -> None:
    tuned = pt.attach(toys.model("vit"), method(rank=16, init="trunc_normal"), train_head=False)
    for name in ("D", "U"):
        values = torch.cat([getattr(delta, name).detach().flatten() for delta in branches(tuned)])
        assert abs(float(values.std()) / 0.02 - 1) < 0.05


# ------------------------------------------------------------------------------------------------------------------ must hold: 2


def test_counts() -> None:
    d = 32
    for joint, per_block in ((True, 2 * RANK * (d + 3 * d)), (False, 3 * 2 * RANK * (d + d))):
        model, _, tuned = attached(joint_qkv=joint)
        assert tuned.trainable == 2 * per_block
        assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in tuned.parameters()}
    assert "shared by all" not in tuned.summary()  # what all share has nothing to train
    _, _, tuned = attached(roles=("q",), single_roles=("down",))
    assert tuned.trainable == 2 * (2 * RANK * (d + d) + RANK * (64 + d))


def test_joint_qkv_is_one_fused_linear() -> None:
    """Its U is those of q, k and v on top of each other, its D theirs."""
    _, _, tuned = attached()
    q, k, v = branches(tuned)[:3]
    assert q.D is k.D is v.D and q.U is not k.U
    other = branches(attached(joint_qkv=False)[2])
    assert other[0].D is not other[1].D


# ------------------------------------------------------------------------------------------------------------------ must hold: 3


def test_alpha_is_one_half_at_the_threshold_and_has_slope_one() -> None:
    q = torch.tensor([0.1, 0.4, 0.6, 2.0, -3.0])
    torch.testing.assert_close(blend(clip=False).blended(q), q + 0.1)
    torch.testing.assert_close(blend(clip=False).blended(q.double()), q.double() + 0.5 - 0.4, rtol=0, atol=1e-15)
    torch.testing.assert_close(blend(clip=False, higher_is_better=False).blended(q), 0.9 - q)
    torch.testing.assert_close(blend().blended(q), torch.tensor([0.2, 0.5, 0.7, 1.0, 0.0]))
    torch.testing.assert_close(blend(higher_is_better=False).blended(q), torch.tensor([0.8, 0.5, 0.3, 0.0, 1.0]))


def test_scores_of_another_scale_are_brought_to_the_threshold() -> None:
    """BRISQUE: 0 to 100, where 0 is best. Left as it is, alpha would leave [0, 1] by tens."""
    scores = torch.tensor([10.0, 30.0, 40.0, 90.0])
    _, _, tuned = attached(normalise="minmax", threshold="median", higher_is_better=False)
    tuned.calibrate([{"quality": scores[:2]}, {"quality": scores[2:]}])
    shared = tuned.shared[0]
    assert isinstance(shared, Blend)
    assert (float(shared.lowest), float(shared.highest)) == (10.0, 90.0)
    torch.testing.assert_close(shared.threshold, torch.tensor(0.3125))  # (35 - 10) / 80
    torch.testing.assert_close(shared.blended(scores), torch.tensor([0.8125, 0.5625, 0.4375, 0.0]))
    sigmoid = blend(normalise="sigmoid", threshold=0.5)
    torch.testing.assert_close(sigmoid.blended(torch.tensor([0.0, 1.0])), torch.tensor([0.5, 0.7310586]))


# --------------------------------------------------------------------------------------------------------------- must hold: 4 to 7


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_branch_without_weight_learns_nothing(alpha: float, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fast:
        monkeypatch.setattr(pt.factored, "plain", lambda module: False)
    model, delta = layer()
    with pt.given(model, alpha=torch.full((IMAGES,), alpha)):
        model(inputs()).square().sum().backward()
    idle, busy = (slice(RANK), slice(RANK, None)) if alpha else (slice(RANK, None), slice(RANK))
    assert delta.D.grad is not None and delta.U.grad is not None
    assert not delta.D.grad[idle].any() and not delta.U.grad[:, idle].any()
    assert delta.D.grad[busy].all() and delta.U.grad[:, busy].all()


def test_branches_change_places_with_their_weights() -> None:
    model, delta = layer()
    alpha = torch.tensor([0.1, 0.6, 1.3])
    with pt.given(model, alpha=alpha):
        y = model(inputs())
    set_(delta.D, delta.D.roll(RANK, 0).clone())
    set_(delta.U, delta.U.roll(RANK, 1).clone())
    with pt.given(model, alpha=1 - alpha):
        torch.testing.assert_close(model(inputs()), y)


def test_equal_branches_are_one_lora() -> None:
    model, delta = layer(scale=3.0)
    set_(delta.D, delta.D[:RANK].repeat(2, 1))
    set_(delta.U, delta.U[:, :RANK].repeat(1, 2))
    plain = linears.OneLinear(model.linear.weight, model.linear.bias)
    lora = pt.attach(plain, pt.LoRA(rank=RANK, alpha=3.0 * RANK, roles=("q",), layers=(0,)), found=linears.parts(plain))
    plain.double()
    set_(lora.slots[0].delta.A, delta.D[:RANK])
    set_(lora.slots[0].delta.B, delta.U[:, :RANK])
    for alpha in (torch.tensor([0.0, 0.3, 1.0]), 0.5):
        with pt.given(model, alpha=alpha):
            torch.testing.assert_close(model(inputs()), plain(inputs()))


@pytest.mark.parametrize("fast", [True, False])
def test_an_image_has_the_weights_of_its_alpha(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fast:
        monkeypatch.setattr(pt.factored, "plain", lambda module: False)
    model, delta = layer(scale=0.7, clip=False)
    x, q = inputs(), torch.tensor([0.1, 0.5, 1.9])
    with pt.given(model, quality=q):
        y = model(x)
    D, U = delta.D.detach(), delta.U.detach()
    for i, a in enumerate((q + 0.1).tolist()):
        W = model.linear.weight + 0.7 * ((1 - a) * U[:, :RANK] @ D[:RANK] + a * U[:, RANK:] @ D[RANK:])
        torch.testing.assert_close(y[i], x[i] @ W.T + model.linear.bias, rtol=1e-5, atol=1e-5)
        with pt.given(model, quality=q[i : i + 1]):
            torch.testing.assert_close(y[i : i + 1], model(x[i : i + 1]))


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_images_of_one_batch_do_not_share_an_alpha(family: str) -> None:
    model, batch, _ = attached(family)
    q = torch.tensor([0.0, 0.3, 0.6, 0.9])
    pixels = batch["pixel_values"]
    with pt.given(model, quality=q):
        whole = toys.output(model, {"pixel_values": pixels})
    for i in range(4):
        with pt.given(model, quality=q[i : i + 1]):
            alone = toys.output(model, {"pixel_values": pixels[i : i + 1]})
        torch.testing.assert_close(whole[i : i + 1], alone, rtol=1e-5, atol=1e-5)
    with pt.given(model, quality=q.mean().expand(4)):
        assert not torch.allclose(toys.output(model, {"pixel_values": pixels}), whole, atol=1e-3)


def test_dropout_is_on_the_output_of_each_branch() -> None:
    model, delta = layer(dropout=0.5, scale=1.0)
    x = inputs()
    bare = nn.functional.linear(x, model.linear.weight, model.linear.bias)
    D, U = delta.D.detach(), delta.U.detach()
    low, high = 0.7 * x @ D[:RANK].T @ U[:, :RANK].T, 0.3 * x @ D[RANK:].T @ U[:, RANK:].T
    allowed = torch.stack([torch.zeros_like(low), 2 * low, 2 * high, 2 * (low + high)])  # either, both or none kept
    model.train()
    seen = torch.zeros(4)
    torch.manual_seed(0)
    with pt.given(model, alpha=torch.full((IMAGES,), 0.3)):
        for _ in range(5):
            error = (allowed - (model(x) - bare).detach()).abs()
            assert float(error.min(0).values.max()) < 1e-6
            seen += torch.bincount(error.argmin(0).flatten(), minlength=4)
    assert (seen / seen.sum() - 0.25).abs().max() < 0.1, seen


# ------------------------------------------------------------------------------------------------------------------ must hold: 8


def test_windows_follow_their_image() -> None:
    model, batch, _ = attached("swin")
    order = torch.tensor([2, 0, 3, 1])
    q = torch.tensor([0.1, 0.4, 0.7, 1.2])
    with pt.given(model, quality=q):
        y = toys.output(model, {"pixel_values": batch["pixel_values"]})
    with pt.given(model, quality=q[order]):
        permuted = toys.output(model, {"pixel_values": batch["pixel_values"][order]})
    torch.testing.assert_close(permuted, y[order], rtol=1e-5, atol=1e-5)


def test_rows_that_are_no_multiple_of_the_images_are_refused() -> None:
    class Merged(linears.OneLinear):
        """Two images and four windows of them, of which one is dropped."""

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0](x.flatten(0, 1)[:3])

    model = Merged(torch.randn(OUT, IN))
    pt.attach(model, method(roles=("q",), layers=(0,)), found=linears.parts(model))
    with pt.given(model, quality=[0.1, 0.2]), pytest.raises(AttachError, match="3 rows, which is no multiple of the 2"):
        model(torch.randn(2, 2, 4, IN))  # three windows of four tokens: the tokens would divide


# ------------------------------------------------------------------------------------------------------------------ must hold: 9


class Judge(nn.Module):
    """Mean brightness, of an image in [0, 1], with what would go wrong in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.dropout = nn.Dropout(0.9)
        self.calls: list[tuple[bool, bool, float, float]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.calls.append((self.training, torch.is_grad_enabled(), float(images.min()), float(images.max())))
        return self.dropout(self.gain * images.mean((1, 2, 3)))[:, None]


def test_what_judges_images_is_frozen_and_in_no_file(tmp_path: Path) -> None:
    model, batch, tuned = attached(image_mean=(0.5, 0.4, 0.3), image_std=0.25, size=2)
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    mean = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)
    judge = Judge().train()
    with pt.given(model, quality=judge):
        model.train()
        found = model(pixel_values=(pixels - mean) / 0.25, labels=batch["labels"])
        found.loss.backward()
        assert judge.gain.grad is None
        ((training, gradients, lowest, highest),) = judge.calls  # once in a forward pass, though there are six linears
        assert not training and not gradients
        assert lowest == pytest.approx(float(pixels.min()), abs=1e-6)
        assert highest == pytest.approx(float(pixels.max()), abs=1e-6)
        model.eval()
        found = toys.output(model, {"pixel_values": (pixels - mean) / 0.25})
    with pt.given(model, quality=pixels.mean((1, 2, 3))):
        torch.testing.assert_close(toys.output(model, {"pixel_values": (pixels - mean) / 0.25}), found)
    assert not any("gain" in name for name in tuned.named_tensors())
    other = toys.model("vit")
    pt.load(other, tuned.save(tmp_path / "x.safetensors"))
    with pt.given(other, quality=judge):
        assert torch.equal(toys.output(other, {"pixel_values": (pixels - mean) / 0.25}), found)


def test_measures_fall_with_blur_and_follow_their_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, 12, 12, generator=generator)
    blurred = nn.functional.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    assert list(MEASURES) == ["laplacian", "gradient", "contrast"]
    for measure in MEASURES.values():
        assert measure(images).shape == (3,)
        assert bool((measure(blurred) < measure(images) - 0.15).all())
    step = torch.zeros(1, 1, 4, 5)
    step[..., 2:] = 1  # columns 0 0 1 1 1: Laplacian 1, -1, 0 in both inner rows, Sobel 4, 4, 0 across
    level = 1 / 255
    torch.testing.assert_close(10 ** laplacian(step), torch.tensor([2 / 3 + level**2]))
    torch.testing.assert_close(10 ** gradient(step), torch.tensor([32 / 3 + level**2]))
    torch.testing.assert_close(10 ** contrast(step), torch.tensor([0.24**0.5 + level]))
    red = torch.zeros(1, 3, 4, 5)
    red[:, 0] = step[:, 0]
    torch.testing.assert_close(10 ** contrast(red), torch.tensor([0.299 * 0.24**0.5 + level]))
    torch.testing.assert_close(10 ** laplacian(0 * step), torch.tensor([level**2]))  # and not minus infinity
    torch.testing.assert_close(laplacian(step.expand(1, 2, 4, 5)), laplacian(step))
    with pytest.raises(AttachError, match="3 x 3"):
        laplacian(torch.rand(1, 3, 2, 8))


def test_as_it_comes_it_judges_what_the_model_is_given() -> None:
    model, batch, tuned = attached(quality="laplacian", threshold="median", normalise="minmax")
    tuned.calibrate([batch])
    pixels = batch["pixel_values"]
    scores = laplacian(pixels * 0.5 + 0.5)
    shared = tuned.shared[0]
    assert isinstance(shared, Blend)
    torch.testing.assert_close(shared.highest, scores.max())
    found = toys.output(model, {"pixel_values": pixels})
    with pt.given(model, quality=scores):
        torch.testing.assert_close(toys.output(model, {"pixel_values": pixels}), found)
    with pt.given(model, alpha=shared.blended(scores)):
        torch.testing.assert_close(toys.output(model, {"pixel_values": pixels}), found)


# ---------------------------------------------------------------------------------------------------------- threshold and its data


def test_the_threshold_is_learnt_by_a_trainer_and_saved(tmp_path: Path) -> None:
    from petiole.training import Events

    model, batch, tuned = attached(quality="laplacian", threshold="median", normalise="minmax")
    with pytest.raises(AttachError, match="has not seen data"):
        model(**batch)
    events = Events(model, torch.optim.SGD(tuned.parameters(), lr=0.1))
    with pytest.raises(TrainingError, match="calibrates on data"):
        events.begin()
    with pytest.raises(TrainingError, match="no batch"):
        events.begin([])
    events.begin([batch])
    expected = toys.output(model, batch)
    other = toys.model("vit")
    pt.load(other, tuned.save(tmp_path / "x.safetensors"))
    assert torch.equal(toys.output(other, batch), expected)
    plain, _, alone = attached()
    Events(plain, torch.optim.SGD(alone.parameters(), lr=0.1)).begin()  # a threshold that is a number needs no data


def test_scores_without_a_range_are_refused() -> None:
    _, _, tuned = attached(normalise="minmax")
    with pytest.raises(TrainingError, match=r"all 3 scores .* 0\.5"):
        tuned.calibrate([{"quality": torch.full((3,), 0.5)}])
    with pytest.raises(AttachError, match="needs the quality"):
        tuned.calibrate([tiny.batch("vit")])


# ------------------------------------------------------------------------------------------------------------------------ refusals


BAD: dict[str, tuple[Any, str]] = {
    "too few": ([0.1, 0.2], r"quality is one number for each row of the batch, \(4,\); got \(2,\)"),
    "one for all": (0.5, r"one number for each row .* got \(\)"),
    "by token": (torch.rand(4, 5), r"got \(4, 5\)"),
    "nan": (torch.tensor([0.1, 0.2, torch.nan, 0.3]), "not finite in row 2"),
    "inf": (torch.tensor([0.1, torch.inf, 0.2, 0.3]), "not finite in row 1"),
    "with a gradient": (torch.rand(4, requires_grad=True), "must not need a gradient"),
}


@pytest.mark.parametrize("what", BAD)
def test_is_refused(what: str) -> None:
    model, batch, _ = attached()
    value, message = BAD[what]
    with pytest.raises(AttachError, match=message) as caught, pt.given(model, quality=value):
        model(**batch)
    assert len(str(caught.value).splitlines()) <= 3


def test_a_forward_pass_without_quality_is_refused() -> None:
    model, batch, _ = attached()
    with pytest.raises(AttachError, match="needs the quality of each image") as caught:
        model(**batch)
    assert "pt.given(model, quality=" in str(caught.value)
    with pt.given(model, alpha=[0.1, 0.2]), pytest.raises(AttachError, match="alpha is one number"):
        model(**batch)
    with pt.given(model, alpha=float("nan")), pytest.raises(AttachError, match="alpha is not finite"):
        model(**batch)


def test_places_that_can_not_be_are_refused() -> None:
    with pytest.raises(AttachError, match="scores images, but BertForSequenceClassification takes none"):
        pt.attach(tiny.model("bert"), PETALface())
    with pytest.raises(AttachError, match="composed for a whole batch"):
        pt.attach(tiny.model("torch_encoder"), method())
    with pytest.raises(AttachError, match="convolution; it is defined for linears"):
        pt.attach(tiny.model("vit"), method(single_roles=("patch_embedding",)))
    model, batch, _ = attached(image_mean=(0.5, 0.5), quality="contrast")
    with pytest.raises(AttachError, match="2 and 1 values, but images 3 channels"):
        model(**batch)
    with pytest.raises(ConfigError, match="image_std"):
        method(image_std=(0.5, 0.0, 0.5))


def test_text_takes_scores_that_are_given() -> None:
    model, batch = toys.model("bert"), tiny.batch("bert")
    tuned = pt.attach(model, method(), train_head=False)
    toys.shake(tuned)
    with pt.given(model, quality=[0.1, 0.9]):
        tuned.check(batch)
    with pt.given(model, quality=lambda images: images), pytest.raises(AttachError, match="there are none"):
        model(**batch)


# ------------------------------------------------------------------------------------------------------------------- merging, rows


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_merges_at_one_alpha(family: str) -> None:
    model, batch, tuned = attached(family)
    before = toys.snapshot(model)
    with pytest.raises(AttachError, match=r"pt.given\(model, alpha=…\)") as caught:
        tuned.merge()
    assert len(str(caught.value).splitlines()) <= 3
    with pytest.raises(AttachError), pt.given(model, alpha=[0.1, 0.2, 0.3, 0.4]):
        tuned.merge()
    assert toys.snapshot(model) == before
    with pt.given(model, alpha=0.8):
        fixed = toys.output(model, batch)
        assert tuned.merge(check=batch) < 1e-4
    torch.testing.assert_close(toys.output(model, batch), fixed, rtol=1e-4, atol=1e-5)
    tuned.unmerge()
    assert toys.snapshot(model) == before


def test_single_branches_merge_and_the_twins_stay() -> None:
    model, batch, tuned = attached(single_roles=("down",))
    with pt.given(model, quality=[0.0, 0.3, 0.6, 0.9]):
        expected = toys.output(model, batch)
        tuned.merge(partly=True)
        torch.testing.assert_close(toys.output(model, batch), expected, rtol=1e-4, atol=1e-5)


def test_one_alpha_is_exported_as_lora(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from peft import PeftModel

    model, batch, tuned = attached()
    with pytest.raises(AttachError, match="a weight of its own"):
        tuned.export(tmp_path / "none")
    with pt.given(model, alpha=0.25):
        expected = toys.output(model, batch)
        tuned.export(tmp_path / "lora")
    other = PeftModel.from_pretrained(toys.model("vit"), str(tmp_path / "lora"))
    torch.testing.assert_close(toys.output(other, batch), expected, rtol=1e-4, atol=1e-4)


def test_rows_take_other_adaptations_with_their_own_scores() -> None:
    model, batch, _ = attached()
    other = pt.attach(model, method(rank=3, clip=False), name="b", seed=1, train_head=False)
    toys.shake(other, 0.3, seed=2)
    q = torch.tensor([0.1, 0.4, 0.6, 0.9])
    with pt.given(model, quality=q):
        with pt.route(model, ["default", "b", None, "default"]):
            mixed = toys.output(model, batch)
        for i, name in enumerate(["default", "b", None, "default"]):
            with pt.route(model, name):
                torch.testing.assert_close(mixed[i], toys.output(model, batch)[i], rtol=1e-4, atol=1e-5)


def test_batch_norms_keep_their_statistics_unless_told_otherwise() -> None:
    class Normed(nn.Module):
        base_model_prefix = "vit"

        def __init__(self) -> None:
            super().__init__()
            self.vit = toys.model("vit").vit
            self.norm = nn.BatchNorm1d(32)
            self.main_input_name = "pixel_values"

        def forward(self, pixel_values: Tensor) -> Tensor:
            return self.norm(self.vit(pixel_values).last_hidden_state[:, 0])

    for freeze in (True, False):
        model = Normed()
        tuned = pt.attach(model, method(freeze_bn_stats=freeze), train_head=False)
        before = model.norm.running_mean.clone()
        model.train()
        with pt.given(model, quality=[0.1, 0.9]):
            model(tiny.batch("vit")["pixel_values"])
        assert torch.equal(model.norm.running_mean, before) == freeze
        assert not any(p.requires_grad for p in model.norm.parameters())
        tuned.detach()
        assert torch.equal(model.norm.running_mean, before)
