"""The unified view against the paper's own code: layouts "mam_encoder_layer", "attention_variants" and "lora_linear"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn
from transformers import BartConfig
from transformers.models.bart.modeling_bart import BartEncoderLayer

import linears
import petiole as pt
from linears import Case, set_
from petiole.methods.adapters.unified import AttentionSite
from petiole.methods.prompts.vectors import Vectors

NOTHING = {"form": "none"}


class Layers(nn.Module):
    """Post-norm layers of which the first runs, whole or its attention alone.

    Args:
        case: gives the sizes, and `param.*` under the names of the layer, or of its attention.
    """

    def __init__(self, case: Case, alone: bool) -> None:
        super().__init__()
        heads, size = case.option("heads"), case.option("heads") * case.option("head_dim")
        config = BartConfig(
            d_model=size,
            encoder_attention_heads=heads,
            encoder_ffn_dim=4 * size if alone else case.option("ffn_dim"),
            activation_function="gelu" if alone else case.option("act"),
            dropout=0.0,
        )
        config._attn_implementation = "sdpa"
        self.layers, self.alone = nn.ModuleList([BartEncoderLayer(config) for _ in range(2)]), alone
        self.eval()
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = case.option("ln_eps")
        for name, parameter in (self.layers[0].self_attn if alone else self.layers[0]).named_parameters():
            set_(parameter, case[f"param.{name}"])

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        layer: Any = self.layers[0]
        return layer.self_attn(x, attention_mask=mask)[0] if self.alone else layer(x, mask)


def attached(model: Layers, **fields: Any) -> pt.Adaptation:
    found = pt.anatomy(model, stacks={"encoder": "layers"})
    return pt.attach(model, pt.UnifiedView(**{"ffn": NOTHING, **fields, "layers": (0,)}), found=found)


def fill_vectors(delta: Vectors, case: Case) -> None:
    set_(delta.key, case["param.prefix_key"])
    set_(delta.value, case["param.prefix_value"])


def fill_adapter(delta: nn.Module, case: Case) -> None:
    for own, name in (("down", "down_proj"), ("up", "up_proj")):
        for part in ("weight", "bias"):
            set_(delta.get_parameter(f"{own}.{part}"), case[f"param.adapter.{name}.{part}"])


@pytest.mark.parametrize("path", linears.cases("unified-view"))
def test_parity(path: Path) -> None:
    with Case(path, "unified-view") as case:
        {"mam_encoder_layer": whole_layer, "attention_variants": attention, "lora_linear": lora}[case.kind](case)


def whole_layer(case: Case) -> None:
    x = case["in.x"].clone().requires_grad_()
    assert x.shape[:2] == (case.option("B"), case.option("T"))
    model = Layers(case, alone=False)
    tuned = attached(
        model,
        attention={"form": "prefix", "bottleneck": case.option("prefix_len"), "reparametrisation": "none"},
        ffn={"form": "adapter", "bottleneck": case.option("bottleneck"), "scale": case.option("scale")},
    )
    prefix, adapter = (slot.delta for slot in tuned.slots)
    fill_vectors(prefix, case)
    fill_adapter(adapter, case)
    y = model(x, case["in.attention_mask"])
    case.same("out.y", y, 1e-5)
    every = {
        "x": x,
        "prefix_key": prefix.key,
        "prefix_value": prefix.value,
        "adapter_down": adapter.down.weight,
        "adapter_up": adapter.up.weight,
    }
    for name, gradient in zip(every, linears.gradients(y, case["in.grad_out"], *every.values()), strict=True):
        case.same(f"grad.{name}", gradient, 1e-4)


def attention(case: Case) -> None:
    assert case["in.x"].shape[:2] == (case.option("B"), case.option("T"))
    prefix = {"bottleneck": case.option("prefix_len"), "reparametrisation": "none"}
    norm_at = "none" if case.get("param.adapter.layer_norm.weight") is None else "in"
    adapter = {"form": "adapter", "bottleneck": case.option("bottleneck"), "norm": norm_at}
    variants: dict[str, dict[str, Any]] = {
        "prefix_concat": {"form": "prefix", **prefix},
        "prefix_gated": {"form": "prefix", "composition": "gate", **prefix},
        "prefix_ungated": {"form": "prefix", "composition": "add", **prefix},
        "mh_parallel_adapter": {"form": "multihead_adapter", **prefix},
        "parallel_adapter": adapter,
        "sequential_adapter": {**adapter, "insertion": "sequential"},
    }
    for name, fields in variants.items():
        model = Layers(case, alone=True)
        (slot,) = attached(model, attention=AttentionSite(**fields)).slots
        if isinstance(slot.delta, Vectors):
            fill_vectors(slot.delta, case)
        else:
            fill_adapter(slot.delta, case)
        norms = {"mh_parallel_adapter": ("norm", "ln")}.get(name, ("norm_in", "adapter.layer_norm"))
        if (norm := getattr(slot.delta, norms[0], None)) is not None:
            norm.eps = case.option("ln_eps")
            for part in ("weight", "bias"):
                set_(norm.get_parameter(part), case[f"param.{norms[1]}.{part}"])
        case.same(f"out.{name}", model(case["in.x"], case["in.attention_mask"]), 1e-5)


def lora(case: Case) -> None:
    """One pair of the form "lora", whose scale is alpha / rank."""
    rank, alpha = case.option("r"), case.option("alpha")
    assert case["param.weight"].shape == (case.option("d_out"), case.option("d_in"))
    part = AttentionSite(form="lora", bottleneck=rank, scale=alpha / rank).part(None, None)
    assert isinstance(part, pt.LoRA) and part.scaling == alpha / rank
    model, delta = linears.attached(part, case["param.weight"], case["param.bias"])
    set_(delta.A, case["param.lora_A"])
    set_(delta.B, case["param.lora_B"])
    case.same("out.y", model(case["in.x"]), 1e-5)
    linears.of(model).merge()
    case.same("out.y", model(case["in.x"]), 1e-5)
