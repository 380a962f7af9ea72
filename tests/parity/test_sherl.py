"""SHERL against reference results: layouts "gated" and "norm"."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import petiole as pt
from linears import Case, cases, set_
from petiole.methods.side.sherl import Sherl

TOLERANCE = 1e-5


@pytest.mark.parametrize("path", cases("sherl"))
def test_parity(path: Path) -> None:
    with Case(path, "sherl") as case:
        sensing = case.option("sensing")
        assert case.kind == sensing in ("gated", "norm")
        H, d, size = case["in.hidden_states"], case.option("hidden_size"), case.option("side_size")
        assert H.shape == (case.option("num_states"), case.option("batch"), case.option("tokens"), d)
        method = pt.SHERL(gate_temperature=case.option("gate_temperature"), norm_eps=case.option("norm_eps"))
        delta = Sherl(method, sensing, [d] * len(H), size, d)
        delta.train(case.option("mode", "eval") == "train")

        modules = {"guide_block.fc_attn": delta.score}
        for k, sense in enumerate(delta.senses):
            if sensing == "gated":
                modules |= {f"hor_block.{k}.fc{i}": getattr(sense, f"W{i}") for i in (1, 2, 3)}
            else:
                modules |= {f"hor_block.{k}.fc.0": sense.W1, f"hor_block.{k}.fc.1": sense.norm}
                sense.norm.eps = case.option("ln_eps")
        modules |= (
            {"fc_out": delta.out[1]} if sensing == "gated" else {"fc_out.1": delta.out[1], "fc_out.2": delta.out[2]}
        )
        if sensing == "norm":
            assert delta.out[2].eps == case.option("out_ln_eps")
        parameters = {f"{path}.{name}": p for path, module in modules.items() for name, p in module.named_parameters()}
        parameters[
            next(n for n in ("gate_params", "guide_block.gate_params") if case.get(f"param.{n}") is not None)
        ] = delta.gate
        for name, parameter in parameters.items():
            set_(parameter, case[f"param.{name}"])
        assert sum(p.numel() for p in delta.parameters()) == sum(p.numel() for p in parameters.values())

        last = case["in.last"]
        y = delta.fused([sense(h) for sense, h in zip(delta.senses, H, strict=True)], last)
        case.same("out.features", y, TOLERANCE)
        gradients = torch.autograd.grad((y * case["in.cotangent"]).sum(), list(parameters.values()))
        for name, gradient in zip(parameters, gradients, strict=True):
            case.same(f"grad.{name}", gradient, TOLERANCE)
