"""APT against reference results: layout "diffusion", one attention's input and output."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import linears
import petiole as pt
from linears import Case, set_


class Given(nn.Linear):
    """A projection whose output is given."""

    def __init__(self, Y: Tensor) -> None:
        super().__init__(Y.shape[-1], Y.shape[-1])
        self.Y = (Y,)

    def forward(self, x: Tensor) -> Tensor:
        return self.Y[0]


class Attention(nn.Module):
    """X -> Y, whatever X is."""

    def __init__(self, Y: Tensor) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (Given(Y) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(x)


class Attentions(nn.Module):
    """A stack of two, the second of which never runs."""

    def __init__(self, Y: Tensor) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"attention": Attention(Y)}) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0]["attention"](x)


@pytest.mark.parametrize("path", linears.cases("apt"))
def test_parity(path: Path) -> None:
    with Case(path, "apt") as case:
        assert case.kind == "diffusion"
        X, Y = (case[f"in.{name}"].clone().requires_grad_() for name in ("attn_in", "attn_out"))
        assert X.shape == tuple(case.option(name) for name in ("batch", "tokens", "channels"))
        model = Attentions(Y)
        tuned = pt.attach(
            model,
            pt.APT(length=case.option("num_prompts"), rank=case.option("rank"), layers=(0,)),
            found=pt.anatomy(model, stacks={"encoder": "blocks"}),
        )
        model.to(X.dtype)
        diffusion, scale = (slot.delta for slot in tuned.slots)
        of = {"tokens": diffusion.prompt, "down": diffusion.down, "up": diffusion.up, "log_scale": scale.log_scale}
        for name, parameter in of.items():
            set_(parameter, case[f"param.{name}"].view(parameter.shape))
        y = model(X)
        case.same("out.hidden", y, 1e-5)
        every = {"attn_in": X, "attn_out": Y, **of}
        found = torch.autograd.grad((y * case["in.cotangent"]).sum(), list(every.values()))
        for name, gradient in zip(every, found, strict=True):
            case.same(f"grad.{name}", gradient.view(case[f"grad.{name}"].shape), 1e-5)
