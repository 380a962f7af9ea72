"""UniPT against reference results: layouts "encoder", "pooled" and "cnn"."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from linears import Case, cases, set_
from petiole.methods.adapters.batchnorm import BatchNorm
from petiole.methods.side.unipt import Head, PooledHead, StageHead

TOLERANCE = 1e-5


def fill(case: Case, modules: dict[str, nn.Module]) -> None:
    """The case's parameters and running statistics, whose convolutions of one pixel are linears here."""
    for name, module in modules.items():
        for own, tensor in (*module.named_parameters(), *module.named_buffers()):
            value = case.get(f"param.{name}.{own}")
            if value is not None:
                set_(tensor, value.view(tensor.shape))


def graded(case: Case, modules: dict[str, nn.Module], y: Tensor) -> None:
    """Compare gradients of Σ y · cotangent, where the case has them. Those that a softmax hides are rounding in both."""
    if case.get("in.cotangent") is None:
        return
    (y * case["in.cotangent"]).sum().backward()
    whole = torch.cat([p.grad.flatten() for m in modules.values() for p in m.parameters() if p.grad is not None])
    for name, module in modules.items():
        for own, parameter in module.named_parameters():
            if case.get(f"grad.{name}.{own}") is not None:
                hidden = name == "gate_layer" and own == "bias"
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                case.same(f"grad.{name}.{own}", gradient, TOLERANCE, beside=whole if hidden else None)


def of_every_form(head: Any) -> dict[str, Any]:
    """Modules by the reference's names, those that heads of states and of maps have alike."""
    modules = {
        "gate_layer": head.gate,
        "projection_layer.0": head.projection[0],
        "projection_layer.1": head.projection[1],
    }
    pairs = enumerate(zip(head.down, head.norms, strict=True))
    return modules | {f"downsample_layers.{i}.{j}": pair[j] for i, pair in pairs for j in (0, 1)}


def encoder(case: Case) -> None:
    H, size, out_size = case["in.hidden_states"], case.option("side_size"), case.option("out_size")
    assert H.shape == tuple(case.option(n) for n in ("num_states", "batch", "tokens", "hidden_size"))
    assert out_size == size * case.option("reduction_factor")
    assert case.option("l1_eps") == 1e-8
    head = Head([H.shape[-1]] * len(H), size, out_size)
    for norm in (*head.norms, head.projection[1]):
        norm.eps = case.option("ln_eps")
    modules = of_every_form(head)
    modules["upsample_layer.1"] = head.up[-1]
    fill(case, modules)
    lengths = case.get("in.lengths")
    mask = None if lengths is None else (torch.arange(H.shape[2]) < lengths[:, None])[:, None]
    z = head.small(list(H), H[-1])
    y = head.up(head.joined(z[-1], z, mask, z[:-1]))
    case.same("out.features", y, TOLERANCE)
    graded(case, modules, y)


def pooled(case: Case) -> None:
    H, g, size, out_size = (
        case["in.hidden_states"],
        case["in.anchor"],
        case.option("side_size"),
        case.option("out_size"),
    )
    assert H.shape == tuple(case.option(n) for n in ("num_states", "batch", "tokens", "hidden_size"))
    assert out_size == size * case.option("reduction_factor")
    assert case.option("l1_eps") == 1e-6
    head = PooledHead([H.shape[-1]] * len(H), size, out_size)
    modules = {"downsample_layer.1": head.anchor, "upsample_layer.1": head.up[1], "gate_layer": head.gate}
    modules |= {f"downsample_layers.{i}.1": down for i, down in enumerate(head.down)}
    fill(case, modules)
    position = case.get("in.position")
    position = torch.zeros(H.shape[1], dtype=torch.long) if position is None else position
    y = head.embedding(list(H), g[:, 0], case.get("in.mask"), position)
    case.same("out.feature", y, TOLERANCE)
    graded(case, modules, y)


def cnn(case: Case) -> None:
    channels, sides, strides = case.option("channels"), case.option("sides"), case.option("strides")
    maps = [case[f"in.feature{i}"] for i in range(len(channels))]
    assert [F.shape[1] for F in maps] == channels
    assert [F.shape[2] for F in maps] == sides
    assert [F.shape[2] // maps[-1].shape[2] for F in maps] == strides
    size, out_size = case.option("side_size"), case.option("out_size")
    assert out_size == size * case.option("reduction_factor")
    assert case.option("l1_eps") == 1e-8
    head = StageHead(channels, size, out_size)
    head.train(case.option("mode") == "train")
    for module in head.modules():
        if isinstance(module, BatchNorm):
            module.eps = case.option("bn_eps")
    modules = of_every_form(head)
    modules |= {f"identity_layers.{i}.0": q for i, q in enumerate(head.identity)}
    modules["upsample_layer.1"] = head.up[-1]
    fill(case, modules)
    y = head.tokens(maps)
    case.same("out.features", y, TOLERANCE)
    graded(case, modules, y)
    assert torch.equal(head(maps, [], maps[-1]).flatten(2).mT, y)


KINDS: dict[str, Callable[[Case], None]] = {"encoder": encoder, "pooled": pooled, "cnn": cnn}


@pytest.mark.parametrize("path", cases("unipt"))
def test_parity(path: Path) -> None:
    with Case(path, "unipt") as case:
        KINDS[case.kind](case)
