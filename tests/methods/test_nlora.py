"""What SLoRA, NLoRA and IntTune must hold, by the numbers of their specification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import petiole as pt
import tiny
import toys
from linears import OneLinear, attached, gradients, of, set_
from petiole.errors import AttachError, ConfigError, FileError
from petiole.files import parse

SMALL: dict[str, Any] = {"rank": 3, "alpha": 6.0}  # s = 2
ALL = [
    pt.SLoRA(**SMALL),
    pt.NLoRA(**SMALL),
    pt.NLoRA(**SMALL, core="pinv"),
    pt.IntTune(**SMALL),
    pt.IntTune(**SMALL, core="pinv"),
]
IDS = ["slora", "nlora", "nlora-pinv", "inttune", "inttune-pinv"]


def matrix(out_features: int = 9, in_features: int = 7, seed: int = 0) -> Tensor:
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed)) / in_features**0.5


def inputs(in_features: int = 7) -> Tensor:
    return torch.randn(4, 5, in_features, generator=torch.Generator().manual_seed(1))


# 1
def test_counts_at_the_papers_sizes() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**size, vocab_size=32000))

    def count(method: pt.Method) -> int:
        tuned = pt.attach(model, method)
        assert len(tuned.slots) == 224
        tuned.detach()
        return tuned.trainable

    lora = count(pt.LoRA(rank=128, roles=["q", "k", "v", "o", "gate", "up", "down"]))
    assert lora == 319_815_680
    assert count(pt.SLoRA()) == count(pt.NLoRA()) == lora + 3_670_016
    sizes = {rank: count(pt.IntTune(rank=rank, alpha=rank)) for rank in (256, 128, 64)}
    assert sizes == {256: 14_680_064, 128: 3_670_016, 64: 917_504}
    assert round(100 * sizes[128] / lora, 3) == 1.148


def test_published_gains_follow_from_the_published_accuracies() -> None:
    assert round(100 * (56.48 / 42.30 - 1), 2) == 33.52 and round(100 * (57.70 / 42.30 - 1), 2) == 36.41
    lora, core = (42.30, 5.50, 18.29, 35.34, 4.58), (44.28, 6.86, 20.70, 34.40, 4.46)
    assert round(sum(100 * (c / b - 1) for b, c in zip(lora, core, strict=True)) / 5, 2) == 7.46
    assert 4 / 320 == 0.0125


@pytest.mark.parametrize("method", ALL, ids=IDS)
def test_counts(method: pt.Method) -> None:
    tuned = pt.attach(tiny.model("bert"), method, train_head=False)
    wide = {"q": (32, 32), "k": (32, 32), "v": (32, 32), "o": (32, 32), "up": (32, 64), "down": (64, 32)}
    ends = 0 if isinstance(method, pt.IntTune) else sum(3 * (i + o) for i, o in wide.values())
    assert tuned.trainable == 2 * (ends + 6 * 9)


# 2
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("method", [ALL[0], ALL[2], ALL[4]], ids=[IDS[0], IDS[2], IDS[4]])
def test_start_is_the_backbone(name: str, method: pt.Method) -> None:
    model, batch = tiny.model(name), tiny.batch(name)
    bare = toys.output(model, batch)
    pt.attach(model, method)
    assert torch.equal(toys.output(model, batch), bare)


@pytest.mark.parametrize("cls", [pt.NLoRA, pt.IntTune])
def test_the_submatrix_start_adds_the_slices(cls: Any) -> None:
    W, x = matrix(), inputs()
    model, _ = attached(cls(**SMALL), W)
    change = 2 * W[:, :3] @ W[:3, :3] @ W[:3, :]
    torch.testing.assert_close(model(x), x @ (W + change).T, rtol=1e-5, atol=1e-5)
    rows, columns = (4, 0, 8), (6, 2, 3)
    model, _ = attached(cls(**SMALL, rows=rows, columns=columns), W)
    change = 2 * W[:, columns] @ W[rows, :][:, columns] @ W[rows, :]
    torch.testing.assert_close(model(x), x @ (W + change).T, rtol=1e-5, atol=1e-5)


# 3
@pytest.mark.parametrize("rows", [None, (5, 1, 7)])
def test_the_pinv_residual_vanishes_in_its_rows_and_columns(rows: Any) -> None:
    W = matrix()
    _, delta = attached(pt.NLoRA(**SMALL, core="pinv", rows=rows), W)
    residual = W - 2 * delta.B @ delta.N @ delta.A
    assert bool((residual[list(rows or range(3))].abs() < 1e-5).all())
    assert bool((residual[:, :3].abs() < 1e-5).all())
    low = matrix(9, 3) @ matrix(3, 7, seed=2)
    _, delta = attached(pt.NLoRA(**SMALL, core="pinv"), low)
    torch.testing.assert_close(2 * delta.B @ delta.N @ delta.A, low, rtol=1e-4, atol=1e-5)


# 4
@pytest.mark.parametrize("name", ["bert", "gpt2", "torch_encoder"])
@pytest.mark.parametrize("method", ALL, ids=IDS)
def test_merge_is_the_forward_pass(name: str, method: pt.Method) -> None:
    toys.assert_merges(name, method, tolerance=1e-4)


def test_pinv_is_a_plain_low_rank_change_of_the_original_weight() -> None:
    W, x = matrix(), inputs()
    model, delta = attached(pt.NLoRA(**SMALL, core="pinv"), W)
    start = [t.detach().clone() for t in (delta.B, delta.N, delta.A)]
    toys.shake(of(model))
    A, B, scale, _ = delta.factored()
    assert A.shape[0] == B.shape[1] == 6
    change = 2 * (delta.B @ delta.N @ delta.A - start[0] @ start[1] @ start[2])
    torch.testing.assert_close(scale * B @ A, change, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(x), x @ (W + change).T, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.linear.weight, W)


# 5
@pytest.mark.parametrize("core", ["submatrix", "pinv"])
def test_the_core_alone_trains(core: Any) -> None:
    W, x, g = matrix(), inputs(), torch.randn(4, 5, 9)
    model, delta = attached(pt.IntTune(**SMALL, core=core), W)
    (gradient,) = gradients(model(x), g, delta.N)
    G = g.flatten(0, 1).T @ x.flatten(0, 1)
    torch.testing.assert_close(gradient, 2 * delta.B.T @ G @ delta.A.T, rtol=1e-4, atol=1e-4)
    assert not delta.A.requires_grad and not delta.B.requires_grad
    before = [toys.bits(delta.A), toys.bits(delta.B)]
    optimizer = torch.optim.AdamW(of(model).parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        model(x).square().sum().backward()
        optimizer.step()
    assert [toys.bits(delta.A), toys.bits(delta.B)] == before
    assert torch.equal(delta.A, W[:3]) and torch.equal(delta.B, W[:, :3])


# 6
@pytest.mark.parametrize("method", [ALL[0], ALL[1], ALL[3]], ids=[IDS[0], IDS[1], IDS[3]])
def test_with_the_identity_as_core_it_is_lora(method: pt.Method) -> None:
    W, x = matrix(), inputs()
    model, delta = attached(method, W)
    set_(delta.N, torch.eye(3))
    lora, other = attached(pt.LoRA(**SMALL), W)
    set_(other.A, delta.A)
    set_(other.B, delta.B)
    torch.testing.assert_close(model(x), lora(x), rtol=1e-6, atol=1e-6)


# 7
def test_first_gradients() -> None:
    x = inputs()
    for method, expected in ((ALL[0], {"B"}), (ALL[1], {"A", "N", "B"}), (ALL[2], {"A", "N", "B"})):
        model, delta = attached(method, matrix())
        model(x).square().sum().backward()
        assert {name for name, p in delta.named_parameters() if p.grad is not None and bool(p.grad.any())} == expected


# 8
@pytest.mark.parametrize("method", ALL, ids=IDS)
def test_no_decomposition_of_the_whole_weight(method: pt.Method, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, torch.Size]] = []
    for name in ("svd", "svdvals", "pinv", "qr", "eigh", "lstsq", "inv", "solve"):
        real = getattr(torch.linalg, name)
        monkeypatch.setattr(
            torch.linalg, name, lambda a, *r, _n=name, _f=real, **k: asked.append((_n, a.shape)) or _f(a, *r, **k)
        )
    attached(method, matrix())
    assert asked == ([("pinv", (3, 3))] if getattr(method, "core", "") == "pinv" else [])


# 9
@pytest.mark.parametrize("method", ALL[1:3], ids=IDS[1:3])
def test_factors_are_copies(method: pt.Method) -> None:
    W = matrix()
    model, delta = attached(method, W)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(1)
    assert torch.equal(model.linear.weight, W)


# 10
@pytest.mark.parametrize(
    "method,held",
    [
        (ALL[0], {"A", "N", "B"}),
        (ALL[1], {"A", "N", "B"}),
        (ALL[2], {"A", "N", "B"}),
        (ALL[3], {"N"}),
        (ALL[4], {"N"}),
        (pt.NLoRA(**SMALL, core="pinv", save_basis=True), {"A", "N", "B", "A0", "N0", "B0"}),
        (pt.IntTune(**SMALL, save_basis=True), {"A", "N", "B"}),
    ],
)
def test_what_the_file_holds(method: pt.Method, held: set[str], tmp_path: Path) -> None:
    model, batch = tiny.model("llama"), tiny.batch("llama")
    tuned = pt.attach(model, method)
    toys.shake(tuned)
    path = tuned.save(tmp_path / "a.safetensors")
    tensors, header = parse(path.read_bytes())
    assert {name.rpartition(":")[2] for name in tensors} == held
    fresh = tiny.model("llama")
    pt.load(fresh, path)
    assert torch.equal(toys.output(fresh, batch), toys.output(model, batch))
    other = tiny.model("llama")
    other.model.layers[0].mlp.down_proj.weight.data[1, 2] += 1.0
    if header["recipe"]:
        with pytest.raises(FileError, match=r"decoder\.0\.down"):
            pt.load(other, path, allow_other_backbone=True)
    else:
        pt.load(other, path, allow_other_backbone=True)


def test_the_input_of_a_frozen_slice_is_not_kept() -> None:
    from petiole.cost import saved_bytes

    def kept(method: pt.Method) -> int:
        model = OneLinear(matrix(64, 64))
        pt.attach(model, method, found=pt.anatomy(model, stacks={"encoder": "blocks"}, roles={"q": "query"}))
        return saved_bytes(model, {"x": torch.randn(50, 64)})

    rank, tokens = 4, 50
    assert kept(pt.IntTune(rank=rank, alpha=4, roles=("q",), layers=(0,))) <= 4 * tokens * rank
    assert kept(pt.NLoRA(rank=rank, alpha=4, roles=("q",), layers=(0,))) >= 4 * tokens * 64


# refusals
@pytest.mark.parametrize("cls", [pt.SLoRA, pt.NLoRA, pt.IntTune])
@pytest.mark.parametrize("fields", [{"rank": 0}, {"alpha": 0.0}, {"alpha": -1.0}, {"dropout": 1.0}, {"roles": ()}])
def test_refused_configurations(cls: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        cls(**fields)


@pytest.mark.parametrize(
    "fields",
    [{"rows": (0, 1)}, {"rows": (0, 1, 1)}, {"columns": (0, 1, -2)}, {"core": "residual"}, {"tolerance": 0.0}],
)
def test_refused_slices(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        pt.NLoRA(rank=3, **fields)


@pytest.mark.parametrize("cls", [pt.SLoRA, pt.NLoRA, pt.IntTune])
def test_a_rank_above_the_weights_names_site_and_limit(cls: Any) -> None:
    with pytest.raises(AttachError, match=r"encoder\.0\.q allows 1 to 32"):
        pt.attach(tiny.model("bert"), cls(rank=33))


@pytest.mark.parametrize("name,role", [("bert", "embedding"), ("resnet", "conv"), ("gpt2", "qkv")])
def test_what_is_no_single_linear_is_refused(name: str, role: str) -> None:
    with pytest.raises(AttachError, match="nlora"):
        pt.attach(tiny.model(name), pt.NLoRA(rank=2, alpha=2, roles=[role]))


def test_slices_outside_the_weight_are_refused() -> None:
    with pytest.raises(AttachError, match=r"rows names 9.*0 to 8"):
        attached(pt.NLoRA(rank=3, rows=(0, 1, 9)), matrix())


@pytest.mark.parametrize(
    "core,value,match", [("pinv", 0.0, "all zero"), ("pinv", torch.inf, "finite"), ("submatrix", torch.nan, "finite")]
)
def test_blocks_without_an_inverse_are_refused(core: Any, value: float, match: str) -> None:
    W = matrix()
    W[:3, :3] = value
    with pytest.raises(AttachError, match=match):
        attached(pt.NLoRA(**SMALL, core=core), W)


def test_integers_without_a_scale_are_refused() -> None:
    model = tiny.model("bert")
    layer = model.bert.encoder.layer[0].attention.self.query
    layer.weight = torch.nn.Parameter(layer.weight.mul(100).to(torch.int8), requires_grad=False)
    with pytest.raises(AttachError, match="int8 and can't be dequantised"):
        pt.attach(model, pt.IntTune(**SMALL))


def test_transposed_weights_are_sliced_as_the_linear_sees_them() -> None:
    model = tiny.model("gpt2")
    stored = model.transformer.h[0].mlp.c_fc.weight.detach().clone()  # (in, out)
    tuned = pt.attach(model, pt.NLoRA(**SMALL, roles=["up"]))
    assert torch.equal(tuned.slots[0].delta.A, stored.T[:3])
    assert torch.equal(tuned.slots[0].delta.B, stored.T[:, :3])
