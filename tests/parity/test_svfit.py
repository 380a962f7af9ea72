"""SVFit against reference results: layouts are described in the fixtures' README. All kinds share one layout."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

import linears
import petiole as pt
from linears import Case, attached, gradients, set_


@pytest.mark.parametrize("form", ["delta", "residual"])
@pytest.mark.parametrize("path", linears.cases("svfit"))
def test_parity(path: Path, form: Literal["delta", "residual"]) -> None:
    with Case(path, "svfit") as case:
        tolerance = 1e-9 if case.double else 1e-5
        W, x = case["param.W"], case["in.x"]
        assert W.shape == (case.option("out_features"), case.option("in_features"))
        rank = case.option("rank")
        model, delta = attached(pt.SVFit(rank=rank, form=form), W, case["param.b"])

        case.same("out.sigma_init", delta.sigma, tolerance)
        case.same("out.W_residual", delta.residual(W), tolerance, beside=W)
        case.same("out.y_init", model(x), tolerance)
        _, whole = attached(pt.SVFit(rank="full"), W)
        spectrum = whole.singular
        case.same("out.energy_kept", spectrum[:rank].square().sum() / spectrum.square().sum(), tolerance)
        case.same("out.sum_kept", spectrum[:rank].sum() / spectrum.sum(), tolerance)

        set_(delta.shift, case["in.delta_sigma"])
        y = model(x)
        case.same("out.y", y, tolerance)
        (gradient,) = gradients(y, case["in.g"], delta.shift)
        case.same("grad.sigma", gradient, tolerance)
        linears.of(model).merge()
        case.same("out.W_merged", model.linear.weight, tolerance)
