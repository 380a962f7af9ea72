"""What SVFit must hold, by the numbers of its specification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petiole as pt
import tiny
import toys
from linears import OneLinear, attached, gradients, of, parts, set_
from petiole.errors import AttachError, ConfigError, FileError
from petiole.files import parse


def matrix(out_features: int = 9, in_features: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed)) / in_features**0.5


def inputs(in_features: int = 6, seed: int = 1) -> Tensor:
    return torch.randn(4, 5, in_features, generator=torch.Generator().manual_seed(seed))


def moved(**fields: Any) -> tuple[OneLinear, Any, Tensor]:
    """One linear with SVFit, σ with zeros and negative values, and W as it was."""
    W = matrix()
    model, delta = attached(pt.SVFit(**fields), W, torch.randn(9))
    change = torch.randn(delta.rank)
    change[0] = -2 * delta.singular[0]
    change[-1] = -delta.singular[-1]
    set_(delta.shift, change)
    return model, delta, W


# 1
def test_start_is_the_backbone() -> None:
    W, b, x = matrix(), torch.randn(9), inputs()
    for fields in ({"rank": 3}, {"rank": "full"}, {"energy": 0.5}):
        model, _ = attached(pt.SVFit(**fields), W, b)
        assert torch.equal(model(x), OneLinear(W, b)(x))
        model, _ = attached(pt.SVFit(**fields, form="residual"), W, b)
        error = (model(x) - OneLinear(W, b)(x)).abs().max()
        assert error <= 1e-5 * W.abs().max() * x.norm()


# 2
def test_only_sigma_trains() -> None:
    model, batch = tiny.model("bert"), tiny.batch("bert")
    tuned = pt.attach(model, pt.SVFit(rank=5), train_head=False)
    assert tuned.trainable == 2 * 2 * 5
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"shift"}
    model(**batch).loss.backward()
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.grad is not None} == {"shift"}


def test_counts_at_the_papers_sizes() -> None:
    from transformers import RobertaConfig, RobertaModel, ViTConfig, ViTModel

    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    with torch.device("meta"):
        roberta = RobertaModel(RobertaConfig(**large))
        vit = ViTModel(ViTConfig())
    lora = pt.attach(roberta, pt.LoRA(rank=8)).trainable
    pt.detach(roberta)
    assert lora == 786_432
    assert pt.attach(roberta, pt.SVFit(rank="full")).trainable == 49_152 == lora / 16
    assert pt.attach(vit, pt.SVFit(rank=768)).trainable == 18_432


# 3
@pytest.mark.parametrize("form", ["delta", "residual"])
@pytest.mark.parametrize("rank", [1, 4, "full"])
def test_merge_is_the_forward_pass(rank: Any, form: Any) -> None:
    model, _, _ = moved(rank=rank, form=form)
    x = inputs()
    forward = model(x)
    of(model).merge()
    torch.testing.assert_close(model(x), forward, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name,roles", [("gpt2", ["q", "v", "up"]), ("resnet", ["conv"]), ("torch_encoder", ["q", "o"])]
)
def test_merge_in_fused_transposed_and_convolutional_weights(name: str, roles: list[str]) -> None:
    toys.assert_merges(name, pt.SVFit(rank=3, train_bias=name == "gpt2", roles=roles), tolerance=1e-4)


# 4
def test_gradient_is_the_closed_form() -> None:
    model, delta, _ = moved(rank=4)
    x, g = inputs(), torch.randn(4, 5, 9)
    (gradient,) = gradients(model(x), g, delta.shift)
    by_token = (g @ delta.U) * (x @ delta.V.T)
    torch.testing.assert_close(gradient, by_token.flatten(0, 1).sum(0), rtol=1e-5, atol=1e-5)
    full = g.flatten(0, 1).T @ x.flatten(0, 1)  # of the weight
    torch.testing.assert_close(gradient, torch.einsum("or,oi,ri->r", delta.U, full, delta.V), rtol=1e-4, atol=1e-5)
    model(x).sum().backward()
    assert delta.U.grad is None and delta.V.grad is None and model.linear.weight.grad is None
    assert not delta.U.requires_grad and not delta.V.requires_grad


# 5
@pytest.mark.parametrize("svd", ["exact", "randomised"])
def test_the_best_approximation(svd: Any) -> None:
    U, _, V = torch.linalg.svd(matrix(40, 30), full_matrices=False)
    spectrum = 0.5 ** torch.arange(30)
    W = (U * spectrum) @ V
    _, delta = attached(pt.SVFit(rank=6, svd=svd), W)
    eye = torch.eye(6)
    torch.testing.assert_close(delta.U.T @ delta.U, eye, rtol=0, atol=1e-5)
    torch.testing.assert_close(delta.V @ delta.V.T, eye, rtol=0, atol=1e-5)
    assert bool((delta.sigma >= 0).all()) and bool((delta.sigma.diff() <= 0).all())
    torch.testing.assert_close(delta.residual(W).square().sum(), spectrum[6:].square().sum(), rtol=1e-3, atol=1e-9)


# 6
@pytest.mark.parametrize("rank", [3, "full"])
def test_both_forms_agree(rank: Any) -> None:
    x = inputs()
    delta_form, delta, W = moved(rank=rank)
    residual_form, other = attached(pt.SVFit(rank=rank, form="residual"), W, delta_form.linear.bias)
    set_(other.shift, delta.shift)
    torch.testing.assert_close(delta_form(x), residual_form(x), rtol=1e-5, atol=1e-5)
    if rank == "full":
        assert float(delta.residual(W).abs().max()) < 1e-5


# 7
def test_signs_of_singular_vectors_do_not_matter() -> None:
    model, delta, _ = moved(rank=4)
    x, g = inputs(), torch.randn(4, 5, 9)
    y = model(x)
    (before,) = gradients(y, g, delta.shift)
    delta.U[:, 1] *= -1
    delta.V[1] *= -1
    torch.testing.assert_close(model(x), y)
    (after,) = gradients(model(x), g, delta.shift)
    torch.testing.assert_close(after, before)


# 8
def test_rank_follows_energy() -> None:
    W = matrix(12, 10)
    W[:, 7:] = W[:, :3]  # rank 7
    ranks = [attached(pt.SVFit(energy=share), W)[1].rank for share in (0.01, 0.3, 0.6, 0.9, 0.99, 1.0)]
    assert ranks == sorted(ranks) and ranks[0] == 1 and ranks[-1] == 7
    values = torch.linalg.svdvals(W).square()
    for share, rank in zip((0.3, 0.6, 0.9, 0.99), ranks[1:5], strict=True):
        assert values[:rank].sum() >= share * values.sum() > values[: rank - 1].sum()
    assert attached(pt.SVFit(), W)[1].rank == ranks[4]  # 0.99 if nothing is said


# 9
def test_the_file_holds_sigma_and_what_it_was_built_from(tmp_path: Path) -> None:
    model, batch = tiny.model("llama"), tiny.batch("llama")
    tuned = pt.attach(model, pt.SVFit(energy=0.9))
    toys.shake(tuned)
    path = tuned.save(tmp_path / "a.safetensors")
    tensors, header = parse(path.read_bytes())
    assert {name.rpartition(":")[2] for name in tensors} == {"shift"}
    assert len(header["recipe"]) == 4
    fresh = tiny.model("llama")
    pt.load(fresh, path)
    torch.testing.assert_close(toys.output(fresh, batch), toys.output(model, batch), rtol=1e-5, atol=1e-5)


def test_another_weight_is_refused(tmp_path: Path) -> None:
    """One number suffices, even one that the backbone's sampled fingerprint might miss."""
    model = tiny.model("llama")
    path = pt.attach(model, pt.SVFit(rank=3)).save(tmp_path / "a.safetensors")
    other = tiny.model("llama")
    other.model.layers[1].self_attn.q_proj.weight.data[3, 4] += 1e-3
    with pytest.raises(FileError, match=r"decoder\.1\.q"):
        pt.load(other, path, allow_other_backbone=True)


def test_a_stored_basis_needs_no_weight(tmp_path: Path) -> None:
    model = tiny.model("llama")
    tuned = pt.attach(model, pt.SVFit(rank=3, save_basis=True))
    toys.shake(tuned)
    path = tuned.save(tmp_path / "a.safetensors")
    other = tiny.model("llama", seed=1)
    loaded = pt.load(other, path, allow_other_backbone=True)
    for one, two in zip(tuned.slots, loaded.slots, strict=True):
        zero = torch.zeros(one.site.out_features, one.site.in_features)
        assert torch.equal(one.delta.weight(zero), two.delta.weight(zero))


def test_a_stored_basis_keeps_its_rank_and_precision(tmp_path: Path) -> None:
    """On another backbone the energy asks for another rank; the file's counts."""
    model = tiny.model("llama").bfloat16()
    tuned = pt.attach(model, pt.SVFit(energy=0.6, save_basis=True))
    path = tuned.save(tmp_path / "a.safetensors")
    other = tiny.model("llama", seed=1).bfloat16()
    for layer in other.model.layers:
        layer.self_attn.q_proj.weight.data[4:] = 0
    loaded = pt.load(other, path, allow_other_backbone=True)
    assert [s.delta.rank for s in loaded.slots] == [s.delta.rank for s in tuned.slots] != [4, 4, 4, 4]
    assert all(toys.bits(a.delta.U) == toys.bits(b.delta.U) for a, b in zip(tuned.slots, loaded.slots, strict=True))


def test_repeated_values_store_their_basis_unasked(tmp_path: Path) -> None:
    """Of a permutation any basis is one of singular vectors, so another machine could find another."""
    W, x = torch.eye(6)[[2, 0, 5, 1, 3, 4]], inputs()
    method = pt.SVFit(rank=3, roles=("q",), layers=(0,))
    model = OneLinear(W)
    tuned = pt.attach(model, method, found=parts(model))
    toys.shake(tuned)
    path = tuned.save(tmp_path / "a.safetensors")
    assert {name.rpartition(":")[2] for name in parse(path.read_bytes())[0]} == {"shift", "U", "singular", "V"}
    fresh = OneLinear(W)
    pt.load(fresh, path, found=parts(fresh))
    assert torch.equal(fresh(x), model(x))


# 10
@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (1, 1)])
def test_thin_weights(shape: tuple[int, int]) -> None:
    W = matrix(*shape)
    model, delta = attached(pt.SVFit(rank="full"), W)
    x = inputs(shape[1])
    assert delta.rank == 1 and torch.equal(model(x), OneLinear(W)(x))
    set_(delta.shift, -delta.singular)
    torch.testing.assert_close(model(x), torch.zeros(4, 5, shape[0]), rtol=0, atol=1e-6)


def test_two_of_them_add() -> None:
    W, x = matrix(), inputs()
    model, delta = attached(pt.SVFit(rank=4), W)
    set_(delta.shift, torch.tensor([1.0, -1.0, 0.5, 2.0]))
    second = pt.attach(model, pt.SVFit(rank=4, roles=("q",), layers=(0,)), name="second")
    set_(second.slots[0].delta.shift, torch.tensor([0.5, 0.5, 0.0, -3.0]))
    pt.activate(model, "default", "second")
    both = model(x)
    alone, other = attached(pt.SVFit(rank=4), W)
    set_(other.shift, delta.shift + second.slots[0].delta.shift)
    torch.testing.assert_close(both, alone(x), rtol=1e-5, atol=1e-5)


def test_half_precision_weights_are_decomposed_in_full() -> None:
    W = matrix().bfloat16()
    _, delta = attached(pt.SVFit(rank=4), W)
    assert delta.U.dtype == torch.bfloat16 and delta.singular.dtype == torch.float32
    torch.testing.assert_close(delta.singular, torch.linalg.svdvals(W.float())[:4])


# refusals
@pytest.mark.parametrize(
    "fields",
    [{"rank": 0}, {"rank": -1}, {"rank": "half"}, {"energy": 0.0}, {"energy": 1.5}, {"rank": 4, "energy": 0.9},
     {"svd": "randomised"}, {"form": "other"}, {"power_iterations": -1}],
)  # fmt: skip
def test_refused_configurations(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        pt.SVFit(**fields)


def test_a_rank_above_the_weights_names_site_and_limit() -> None:
    with pytest.raises(AttachError, match=r"encoder\.0\.q allows 1 to 32"):
        pt.attach(tiny.model("bert"), pt.SVFit(rank=33))


@pytest.mark.parametrize("name,role", [("bert", "embedding"), ("convnext", "conv"), ("gpt2", "qkv"), ("bert", "norm")])
def test_what_is_no_single_linear_is_refused(name: str, role: str) -> None:
    with pytest.raises(AttachError, match="svfit"):
        pt.attach(tiny.model(name), pt.SVFit(rank=2, roles=[role]))


def test_weights_that_are_not_finite_are_refused() -> None:
    model = tiny.model("bert")
    linear = next(m for n, m in model.named_modules() if n.endswith("query") and isinstance(m, nn.Linear))
    linear.weight.data[0, 0] = torch.nan
    with pytest.raises(AttachError, match="not finite"):
        pt.attach(model, pt.SVFit(rank=2))
