"""The adapter modules of arXiv 2312.03694 against the authors' code: layouts "conformer_adapter" and "bottleneck_adapter"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import linears
import petiole as pt
import tiny
from linears import Case, set_
from petiole.methods.adapters.conformer import Branch

TOLERANCE = 1e-5
NAMES = {"pointwise1": "down", "depthwise": "convolution", "bn": "norm", "pointwise2": "up"}


def branch(case: Case, **fields: Any) -> Branch:
    """The adapter that the method puts beside an ffn of the case's width, with the case's weights."""
    model = tiny.model("ast", hidden_size=case.option("d"), num_attention_heads=1)
    method = pt.ASTAdapter(
        reduction_factor=case.option("reduction_rate"), layers=(0,), train_layernorm=False, dropout=0.0, **fields
    )
    adapter = pt.attach(model, method).slots[0].delta
    adapter.host = None  # it is called alone, outside of any model
    assert adapter.up.in_features == case.option("bottleneck")
    state = {name: tensor for name, tensor in case.tensors.items() if name.startswith("param.")}
    own = adapter.state_dict()
    for name, tensor in state.items():
        part, _, leaf = name.removeprefix("param.").rpartition(".")
        set_(own.pop(f"{NAMES.get(part, part)}.{leaf}"), tensor)
    assert not [name for name in own if "tracked" not in name]
    return adapter


@pytest.mark.parametrize("path", linears.cases("petl-ast"))
def test_case(path: Path) -> None:
    with Case(path, "petl-ast") as case:
        if case.kind == "bottleneck_adapter":
            assert case.option("act") == "gelu"
            case.same("out.y", branch(case, block="bottleneck")(case["in.x"]), TOLERANCE)
            return
        assert case.kind == "conformer_adapter"
        adapter = branch(case, kernel_size=case.option("kernel_size"))
        adapter.norm.eps, adapter.norm.momentum = case.option("bn_eps"), case.option("bn_momentum")
        assert case["in.x"].shape[:2] == (case.option("B"), case.option("T"))
        with torch.no_grad():
            case.same("out.eval", adapter.eval()(case["in.x"]), TOLERANCE)
        x = case["in.x"].clone().requires_grad_()
        y = adapter.train()(x)
        case.same("out.train", y, TOLERANCE)
        case.same("out.running_mean_after_train", adapter.norm.running_mean, TOLERANCE)
        case.same("out.running_var_after_train", adapter.norm.running_var, TOLERANCE)
        (y * case["in.grad_out"]).sum().backward()
        of = {
            "grad.x": x,
            "grad.pointwise1.weight": adapter.down.weight,
            "grad.depthwise.weight": adapter.convolution.weight,
        }
        for name in [name for name in case.tensors if name.startswith("grad.")]:
            gradient = of[name].grad
            assert gradient is not None
            case.same(name, gradient, TOLERANCE)
