"""PETALface against reference results: one twin linear on the windows of a few images, scores given, weights not clipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import linears
import petiole as pt
from linears import Case, gradients, set_
from petiole.methods.lowrank.petalface import Branches
from petiole.methods.lowrank.quality import Blend


class Windows(linears.OneLinear):
    """Images (b, w, n, in) -> their windows, one after another, through a linear: (b w, n, out)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x.flatten(0, 1))


@pytest.mark.parametrize("path", linears.cases("petalface"))
def test_parity(path: Path) -> None:
    with Case(path, "petalface") as case:
        assert case.kind == "twin_linear"
        r, b, w = case.option("rank"), case.option("batch"), case.option("windows_per_image")
        model = Windows(case["param.W"], case.get("param.b"))
        assert model.linear.weight.shape == (case.option("out_features"), case.option("in_features"))
        method = pt.PETALface(
            rank=r, scale=float(case.option("scale")), dropout=0.0, quality=None, threshold=case.option("threshold"), clip=False, normalise=None,
            roles=("q",), layers=(0,),
        )  # fmt: skip
        tuned = pt.attach(model, method, found=linears.parts(model))
        model.to(case["param.W"].dtype)
        delta, blend = tuned.slots[0].delta, tuned.shared[0]
        assert isinstance(delta, Branches) and isinstance(blend, Blend)
        set_(delta.D, torch.cat([case["param.low_down"], case["param.high_down"]]))
        set_(delta.U, torch.cat([case["param.low_up"], case["param.high_up"]], 1))
        x, q = case["in.x"], case["in.quality"]
        assert x.shape[:2] == (b * w, case.option("tokens"))

        tolerance = 1e-12 if case.double else 1e-6
        case.same("out.alpha", blend.blended(q)[:, None], tolerance)
        with pt.given(model, quality=q):
            y = model(x.view(b, w, *x.shape[1:]))
        case.same("out.y", y, max(tolerance, 1e-11))
        gD, gU = gradients(y, case["in.g"], delta.D, delta.U)
        for half, name in ((slice(r), "low"), (slice(r, None), "high")):
            case.same(f"grad.{name}_down", gD[half], 10 * tolerance)
            case.same(f"grad.{name}_up", gU[:, half], 10 * tolerance)
