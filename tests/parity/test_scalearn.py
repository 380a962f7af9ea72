"""ScaLearn and AdapterFusion against the official modules: layouts "scaling" and "adapter_fusion"."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import linears
from linears import Case, set_
from petiole.methods.adapters.bottleneck import Bottleneck
from petiole.methods.adapters.fusion import Fused
from petiole.methods.adapters.scalearn import Scaled, Scales


def identities(count: int, size: int) -> dict[str, Bottleneck]:
    """Sources whose output is their middle, so that a case's outputs can be put there."""
    found = {}
    for number in range(count):
        found[f"s{number}"] = source = Bottleneck(size, size)
        set_(source.up.weight, torch.eye(size))
        set_(source.up.bias, torch.zeros(size))
    return found


def scaling(case: Case) -> None:
    a, residual = case["in.adapter_out"], case["in.residual"]
    n, d = case.option("n_sources"), case.option("d")
    assert a.shape == (case.option("B"), case.option("T"), n, d)
    names = tuple(f"s{number}" for number in range(n))
    assert case.option("init_mean", 2 / n) == pytest.approx(2 / n) and case.option("init_std", 1e-3) == 1e-3
    for kind, width in (("vector", d), ("scalar", 1)):
        for how, name in (("none", ""), ("mean", ".take_mean"), ("softmax", ".take_softmax")):
            scales = Scales(names, width, normalize=how)  # type: ignore[arg-type]
            for number, source in enumerate(names):
                set_(scales.get_parameter(f"omega_{source}"), case[f"param.omega_{kind}"][number])
            delta = Scaled(identities(n, d), scales).to(a.dtype)
            y = delta.mixed(residual, a.flatten(2)) + residual
            if case.get(f"out.{kind}{name}") is not None:
                case.same(f"out.{kind}{name}", y, 1e-5)
            if how == "none" and case.get(f"grad.omega_{kind}") is not None:
                (y * case[f"in.grad_out_{kind}"]).sum().backward()
                gradient = torch.stack([gradient_of(scales.get_parameter(f"omega_{source}")) for source in names])
                case.same(f"grad.omega_{kind}", gradient, 1e-5)


def gradient_of(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def fusion(case: Case) -> None:
    a, u = case["in.adapter_out"], case["in.query"]
    n, d = case.option("n_sources"), case.option("d")
    assert a.shape == (case.option("B"), case.option("T"), n, d)
    delta = Fused(identities(n, d), value=case.get("param.value.weight") is not None).to(a.dtype)
    for name, parameter in delta.named_parameters():
        set_(parameter, case[f"param.{name}"])
    m = a.flatten(2)
    case.same("out.attention", delta.shares(u, m), 1e-4)
    case.same("out.y", delta.mixed(u, m) + case["in.residual"], 1e-4)


KINDS = {"scaling": scaling, "adapter_fusion": fusion}


@pytest.mark.parametrize("path", linears.cases("scalearn"))
def test_case(path: Path) -> None:
    with Case(path, "scalearn") as case:
        KINDS[case.kind](case)
