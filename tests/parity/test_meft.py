"""MEFT against reference results: layouts "meft1" to "meft3", a post-norm encoder with the streams, its output and all gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import linears
import petiole as pt
from linears import Case, set_
from petiole.methods.adapters.bottleneck import Bottleneck
from petiole.methods.execution import reversible

OWN = {"dense1": "down", "dense2": "up"}  # the reference's names of the two projections


def backbone(case: Case) -> BertModel:
    config = BertConfig(
        hidden_size=case.option("hidden_size"), num_hidden_layers=case.option("num_layers"), num_attention_heads=case.option("num_heads"),
        intermediate_size=case.option("intermediate_size"), layer_norm_eps=case.option("layer_norm_eps"), vocab_size=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="eager",
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False)
    own = {f"layer.{name}": p for name, p in model.encoder.layer.named_parameters()}
    for name, parameter in own.items():
        set_(parameter, case[f"param.{name}"])
    return model.double()


def adapters(tuned: pt.Adaptation) -> dict[str, Bottleneck]:
    """By their names in the reference."""
    found: dict[str, Bottleneck] = {}
    for slot in tuned.slots:
        layer, delta = f"layer.{slot.site.depth}", slot.delta
        name = {"block": "rev_adapter", "ffn": "ffn_adapter", "attention": "attention.output.attn_adapter"}[
            slot.site.role
        ]
        adapter = getattr(delta, "adapter", delta)
        if isinstance(adapter, Bottleneck):
            found[f"{layer}.{name}"] = adapter
    return found


def paired(case: Case, tuned: pt.Adaptation) -> dict[str, nn.Parameter]:
    """Each adapter parameter by its name in the case; whatever is no projection there is the LayerNorm."""
    found: dict[str, nn.Parameter] = {}
    for key in case.tensors:
        head, _, name = key.partition("param.")
        owner = next((o for o in adapters(tuned) if not head and name.startswith(f"{o}.")), None)
        if owner is not None:
            part, _, tensor = name.removeprefix(f"{owner}.").rpartition(".")
            found[name] = adapters(tuned)[owner].get_submodule(OWN.get(part, "norm_in")).get_parameter(tensor)
    return found


@pytest.mark.parametrize("every", ["auto", None])
@pytest.mark.parametrize("path", linears.cases("meft"))
def test_parity(path: Path, every: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with Case(path, "meft") as case:
        variant = case.option("variant")
        assert case.kind == f"meft{variant}"
        assert case["in.hidden"].shape == (case.option("batch"), case.option("tokens"), case.option("hidden_size"))
        method = pt.MEFT(
            variant=variant,
            bottleneck=case.option("bottleneck"),
            lam=case.option("lam"),
            beta=case.option("beta"),
            adapter_layernorm=case.option("adapter_layernorm"),
            activation="gelu",
            dropout=0.0,
            anchor_every=every,
        )
        model = backbone(case)
        tuned = pt.attach(model, method)
        model.double().train()
        parameters = paired(case, tuned)
        assert {id(p) for p in parameters.values()} == {id(p) for p in tuned.parameters()}
        for name, parameter in parameters.items():
            set_(parameter, case[f"param.{name}"])

        streams: list[Tensor] = []
        joined = reversible.Run.joined

        def watched(run: reversible.Run) -> reversible.Pair:
            streams[:] = run.pair
            return joined(run)

        monkeypatch.setattr(reversible.Run, "joined", watched)
        hidden = case["in.hidden"].double().requires_grad_()
        output = model.encoder(hidden, attention_mask=case["in.additive_mask"].double()).last_hidden_state
        for n, stream in enumerate(streams, 1):
            case.same(f"out.stream{n}", stream.float(), 1e-5)
        case.same("out.hidden", output.float(), 1e-5)
        found = linears.gradients(output, case["in.cotangent"].double(), hidden, *parameters.values())
        for name, gradient in zip(("hidden", *parameters), found, strict=True):
            case.same(f"grad.{name}", gradient.float(), 1e-5)
