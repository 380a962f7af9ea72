"""IAA against an independent implementation, in double precision: layout "encoder_variants"."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer

import linears
import petiole as pt
from linears import Case, set_

TOLERANCE = 1e-8
BACKBONE = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "ln1": "attention.output.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "ln2": "output.LayerNorm",
}


class Encoder(nn.Module):
    """x (B, T, d) -> y (B, T, d), with the weights of a case."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        config = BertConfig(
            hidden_size=case.option("heads") * case.option("head_dim"),
            num_attention_heads=case.option("heads"),
            num_hidden_layers=case.option("layers"),
            intermediate_size=case.option("ffn_dim"),
            hidden_act=case.option("ffn_act"),
            layer_norm_eps=case.option("ln_eps"),
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            attn_implementation="eager",
        )
        self.layers = nn.ModuleList(BertLayer(config, layer_idx=i) for i in range(config.num_hidden_layers)).double()
        for number, layer in enumerate(self.layers):
            for theirs, ours in BACKBONE.items():
                for name, parameter in layer.get_submodule(ours).named_parameters():
                    set_(parameter, case[f"param.layer{number}.{theirs}.{name}"])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def variant(case: Case, kind: str) -> tuple[Tensor, Tensor]:
    """Output, and the gradient of its mean square with respect to the input."""
    model, x = Encoder(case), case["in.x"].clone().requires_grad_()
    assert x.shape[:2] == (case.option("B"), case.option("T"))
    if kind != "base":
        method = pt.IAA(
            connect=kind if kind != "inside" else "layer",
            r=case.option("inside_r"),
            aside_r=case.option("aside_r"),
            activation=case.option("adapter_act"),
            bias=True,
        )
        tuned = pt.attach(model, method)
        for slot in tuned.slots:
            delta = slot.delta.double()
            depth = slot.site.depth
            if slot.place.read is None:
                name = f"layer{depth}.adapter_{'attn' if slot.site.role == 'attention' else 'ffn'}"
            elif kind == "M":
                name = "aside_model"
            elif kind == "S":
                name = f"layer{depth}.aside_{'attn' if 'attention' in slot.site.path else 'ffn'}"
            else:
                name = f"layer{depth}.aside_layer"
            for own, parameter in delta.named_parameters():
                zero = kind == "inside" and slot.place.read is not None  # no aside path
                set_(parameter, torch.zeros_like(parameter) if zero else case[f"param.{name}.{own}"])
    y = model(x)
    y.square().mean().backward()
    assert x.grad is not None
    return y, x.grad


@pytest.mark.parametrize("path", linears.cases("iaa"))
def test_case(path: Path) -> None:
    with Case(path, "iaa") as case:
        assert case.option("dtype") == "float64" and case.option("grad_of") == "mean(y**2)"
        for kind in ("base", "inside", "S", "L", "M"):
            y, gradient = variant(case, kind)
            case.same(f"out.{kind}", y, TOLERANCE)
            case.same(f"grad.x.{kind}", gradient, TOLERANCE)
