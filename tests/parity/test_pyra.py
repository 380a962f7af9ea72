"""PYRA against reference results: one merge with modulation, and its gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import linears
from linears import Case, set_
from petiole.methods.execution.merging import match, merge
from petiole.methods.execution.pyra import Modulation


@pytest.mark.parametrize("path", linears.cases("pyra"))
def test_parity(path: Path) -> None:
    with Case(path, "pyra") as case:
        tokens, keys, size = case["in.tokens"], case["in.keys"], case.get("in.size")
        r, width = case.option("r"), case.option("channels")
        assert tokens.shape == (case.option("batch"), case.option("tokens"), width)
        assert keys.shape[-1] == case.option("key_size")
        modulation = Modulation(r, width).to(tokens.dtype)
        modulation.norm.eps = case.option("ln_eps")
        of = {
            "w_r": modulation.W_r,
            "w_d": modulation.W_D,
            "norm.weight": modulation.norm.weight,
            "norm.bias": modulation.norm.bias,
        }
        for name, parameter in of.items():
            set_(parameter, case[f"param.{name}"])
        class_token, distill_token = case.option("class_token"), case.option("distill_token")
        protected = 2 if distill_token else int(class_token)
        found = match(keys, r, protected)
        y, new_size = merge(tokens, size, found, modulation)
        case.same("out.tokens", y, 1e-5)
        case.same("out.size", new_size, 1e-5)
        case.same("out.tokens_plain_merge", merge(tokens, size, found)[0], 1e-5)
        gradients = torch.autograd.grad((y * case["in.cotangent"]).sum(), list(of.values()))
        for name, gradient in zip(of, gradients, strict=True):
            case.same(f"grad.{name}", gradient, 1e-5)
