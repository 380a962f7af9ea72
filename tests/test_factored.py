"""The fast path of low-rank changes: the same numbers as the plain way, less kept for backward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petiole as pt
import tiny
from petiole import factored
from petiole.cost import saved_bytes

ROLES = ("q", "k", "v", "o", "gate", "up", "down")


def adapted(name: str, **fields: Any) -> tuple[nn.Module, dict[str, Any]]:
    model, batch = tiny.model(name), tiny.batch(name)
    present = [role for role in ROLES if role in pt.anatomy(model).roles]
    tuned = pt.attach(model, pt.LoRA(**{"rank": 3, "roles": present, **fields}), train_head=False)
    generator = torch.Generator().manual_seed(1)
    for parameter in tuned.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    return model, batch


def gradients(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "vit", "t5", "qwen2"])
@pytest.mark.parametrize("bias", ["none", "adapted", "all"])
def test_the_fast_path_gives_the_plain_ways_loss_and_gradients(
    name: str, bias: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        model, batch = adapted(name, bias=bias)
    except pt.PetioleError:
        pytest.skip("no biases in this family")
    model.double()  # so that rounding hides nothing
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    calls: list[int] = []
    real = factored.add
    monkeypatch.setattr(factored, "add", lambda *a: calls.append(1) or real(*a))
    loss, fast = gradients(model, batch)
    assert calls, "the fast path was not taken"
    monkeypatch.setattr(factored, "plain", lambda module: False)
    plain_loss, plain = gradients(model, batch)
    assert torch.allclose(loss, plain_loss, rtol=1e-9)
    assert fast.keys() == plain.keys()
    size = max(float(gradient.abs().max()) for gradient in plain.values())  # a key's bias has none but rounding
    for key, gradient in plain.items():
        assert torch.allclose(fast[key], gradient, rtol=1e-6, atol=1e-8 * size), key


@pytest.mark.parametrize("name", ["bert", "llama", "vit"])
def test_inputs_are_computed_again_and_not_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = adapted(name)
    fast = saved_bytes(model, batch)
    monkeypatch.setattr(factored, "possible", lambda *a, **k: False)
    keeping = saved_bytes(model, batch)
    assert fast < 0.85 * keeping


def chains() -> dict[str, Callable[[Tensor], Tensor]]:
    norm = nn.LayerNorm(8)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm.requires_grad_(False)
    gain = torch.randn(8)

    def rms(x: Tensor) -> Tensor:
        return gain * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))

    def attend(x: Tensor) -> Tensor:
        heads = x.view(2, 5, 2, 4).transpose(1, 2)
        return (
            nn.functional.scaled_dot_product_attention(heads, heads, heads)
            .transpose(1, 2)
            .contiguous()
            .reshape(2, 5, 8)
        )

    return {
        "norm": norm,
        "gelu": nn.functional.gelu,
        "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
        "silu": nn.functional.silu,
        "gated": lambda x: nn.functional.silu(x * gain) * (x + 1),
        "rms": rms,
        "attention": attend,
    }


@pytest.mark.parametrize("chain", list(chains()))
def test_what_is_computed_again_is_what_it_was(chain: str) -> None:
    x = torch.randn(2, 5, 8, requires_grad=True)
    y = chains()[chain](x * 1.0)
    again = factored.Again.of(y)
    assert again is not None
    assert torch.allclose(factored.compute(again.node, again.shape), y, atol=1e-6)


def test_a_sum_or_a_leaf_can_not_be_computed_again() -> None:
    x = torch.randn(2, 8, requires_grad=True)
    assert factored.Again.of(x + x.square()) is None
    assert not factored.possible(x.grad_fn)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_beside_the_fast_path(reentrant: bool) -> None:
    model, batch = adapted("bert")
    _, plain = gradients(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    _, again = gradients(model, batch)
    assert plain.keys() == again.keys()
    for key, gradient in plain.items():
        assert torch.allclose(again[key], gradient, rtol=1e-3, atol=1e-6), key


def test_bf16_autocast_stays_near_float32() -> None:
    model, batch = adapted("bert")
    _, full = gradients(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        _, half = gradients(model, batch)
    size = max(float(gradient.norm()) for gradient in full.values())
    for key, gradient in full.items():
        assert half[key].dtype == torch.float32
        assert (half[key] - gradient).norm() < 0.05 * gradient.norm() + 0.02 * size, key


def test_a_users_hook_on_the_linear_sees_the_frozen_output() -> None:
    model, batch = adapted("bert")
    seen: list[Tensor] = []
    path = pt.anatomy(model).sites(["q"], [0])[0].path
    bare = copy.deepcopy(model)
    pt.detach(bare)
    reference: list[Tensor] = []
    bare.get_submodule(path).register_forward_hook(lambda m, a, o: reference.append(o.clone()))
    model.get_submodule(path).register_forward_hook(lambda m, a, o: seen.append(o), prepend=True)
    with torch.no_grad():
        model(**batch)
        bare(**batch)
    assert torch.equal(seen[0], reference[0])


def test_second_passes_over_a_kept_graph_give_the_same() -> None:
    model, batch = adapted("bert")
    model.eval()
    loss = model(**batch).loss
    inputs = [p for p in model.parameters() if p.requires_grad]
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
