"""PEGO against reference results: layout "qkv_group", one block whose q, k and v are one linear."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import linears
import petiole as pt
from linears import Case, set_
from petiole.method import Moment


class Attention(nn.Module):
    """As far as the fixture goes: the fused projection is the output."""

    def __init__(self, W: Tensor, b: Tensor) -> None:
        super().__init__()
        self.num_heads = 1
        self.qkv = nn.Linear(W.shape[1], W.shape[0])
        self.qkv.weight.data, self.qkv.bias.data = W.clone(), b.clone()
        self.proj = nn.Linear(W.shape[1], W.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        return self.qkv(x)


class Block(nn.Module):
    def __init__(self, W: Tensor, b: Tensor) -> None:
        super().__init__()
        self.attn = Attention(W, b)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x)


class FirstProjection(nn.Module):
    """The fused projection of the first of two blocks."""

    def __init__(self, W: Tensor, b: Tensor) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(W, b), Block(W, b)])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x)


@pytest.mark.parametrize("path", linears.cases("pego"))
def test_parity(path: Path) -> None:
    with Case(path, "pego") as case:
        assert case.kind == "qkv_group"
        W, x = case["param.W_qkv"], case["in.x"]
        assert x.shape == (case.option("batch"), case.option("tokens"), case.option("dim"))
        model = FirstProjection(W, case["param.b_qkv"])
        method = pt.PEGO(
            rank=case.option("rank"),
            num_loras=case.option("num_lora"),
            penalty={"l1": "l1", "l2sq": "squared"}[case.option("norm", "l1")],
            along=case.option("side", "input"),
            preserve_weight=case.option("lambda_preserve", 1.0),
            diversify_weight=case.option("lambda_diversify", 1.0),
            layers=(0,),
        )
        tuned = pt.attach(model, method)
        groups = {slot.site.role: slot.delta for slot in tuned.slots}
        assert sorted(groups) == ["q", "v"]
        for role, group in groups.items():
            set_(group.A, case[f"param.A_{role}"])
            set_(group.B, case[f"param.B_{role}"])
        ends = [(f"{end}_{role}", getattr(group, end)) for role, group in groups.items() for end in "AB"]

        y = model(x)
        case.same("out.qkv", y, 1e-5)
        found = torch.autograd.grad((y * case["in.g"]).sum(), [tensor for _, tensor in ends])
        for (name, _), gradient in zip(ends, found, strict=True):
            case.same(f"grad.task.{name}", gradient, 1e-5)

        term = method.loss(Moment(model, groups))
        assert term is not None
        case.same("out.reg", term, 1e-5)
        found = torch.autograd.grad(term, [tensor for _, tensor in ends])
        for (name, _), gradient in zip(ends, found, strict=True):
            case.same(f"grad.reg.{name}", gradient, 1e-5)
