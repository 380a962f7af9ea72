"""VL-PET against the official encoder layer: layouts "encoder_large", "encoder_middleX", "encoder_middleY", "encoder_small"."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import BartConfig
from transformers.models.bart.modeling_bart import BartEncoderLayer

import linears
import petiole as pt
from linears import Case, set_

TOLERANCE = 1e-4
GRANULARITIES = {"large": "large", "middleX": "middle_x", "middleY": "middle_y", "small": "small"}
SITES = {"attention": "attn", "ffn": "ff"}
GATES = {"down": "down", "up": "up", "linear": "", "gain": "vector"}  # ours -> theirs


class Layer(nn.Module):
    """x (B, T, d) -> y (B, T, d), with the frozen weights of a case. Its stack has a second block, which never runs."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        activations = case.option("act")
        assert activations.startswith("gelu_new (adapter and gate), gelu (ffn)"), activations
        assert case.option("ln_eps") == nn.LayerNorm(1).eps
        config = BartConfig(
            d_model=case.option("heads") * case.option("head_dim"),
            encoder_attention_heads=case.option("heads"),
            encoder_ffn_dim=case.option("ffn_dim"),
            activation_function="gelu",
            dropout=0.0,
            attention_dropout=0.0,
            attn_implementation="eager",
        )
        self.encoder = nn.ModuleList(BartEncoderLayer(config) for _ in range(2))
        for name, parameter in self.encoder[0].named_parameters():
            set_(parameter, case[f"param.{name}"])

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder[0](x, None)


def by_theirs(delta: nn.Module, site: str, heads: int) -> dict[str, tuple[nn.Parameter, slice]]:
    """Name of each of their parameters at a site -> ours, and the rows of it."""
    found = {}
    for name, parameter in delta.named_parameters():
        first, *rest = name.split(".")
        if first == "down":
            rows = parameter.shape[0] // heads
            for head in range(heads):
                found[f"{site}.down.{head}.{rest[0]}"] = (parameter, slice(head * rows, (head + 1) * rows))
        else:
            theirs = ["gate", GATES[rest[0]], *rest[1:]] if first == "gate" else [first, *rest]
            found[".".join([site, *filter(None, theirs)])] = (parameter, slice(None))
    return found


@pytest.mark.parametrize("path", linears.cases("vl-pet"))
def test_case(path: Path) -> None:
    with Case(path, "vl-pet") as case:
        variant = case.option("variant")
        assert case.kind == f"encoder_{variant}"
        model = Layer(case)
        heads, rank = case.option("n_heads_down"), case.option("gate_rank")
        method = pt.VLPET(
            granularity=GRANULARITIES[variant],
            bottleneck=case.option("bottleneck"),
            num_heads=heads,
            gate_rank=rank if variant == "large" else None,
            scale=case.option("scale"),
        )
        tuned = pt.attach(model, method)
        theirs: dict[str, tuple[nn.Parameter, slice]] = {}
        for slot in tuned.slots:
            if slot.site.depth == 0:
                theirs |= by_theirs(slot.delta, SITES[slot.site.role], heads)
        given = {n.removeprefix("param.") for n in case.tensors if n.startswith(("param.attn.", "param.ff."))}
        assert given == set(theirs)
        for name, (parameter, rows) in theirs.items():
            set_(parameter[rows], case[f"param.{name}"])
        x = case["in.x"].clone().requires_grad_()
        assert x.shape[:2] == (case.option("B"), case.option("T"))
        y = model(x)
        case.same("out.y", y, TOLERANCE)
        (y * case["in.grad_out"]).sum().backward()
        assert x.grad is not None
        case.same("grad.x", x.grad, TOLERANCE)
        for name in case.tensors:
            if name.startswith("grad.") and name != "grad.x":
                parameter, rows = theirs[name.removeprefix("grad.")]
                assert parameter.grad is not None
                case.same(name, parameter.grad[rows], TOLERANCE)
        assert torch.isfinite(y).all()
