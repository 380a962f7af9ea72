"""NOLA against reference results: layouts "llm_linear" and "vit_linear". The bases are given, so no generator has to match."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import linears
import petiole as pt
from linears import Case, attached, gradients, set_


@dataclass(frozen=True)
class Given:
    """Matrices from a file in the place of drawn ones, before their bound is multiplied in."""

    matrices: Tensor
    bound: float

    @property
    def count(self) -> int:
        return len(self.matrices)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.matrices.shape[1:])

    def draw(self, first: int, count: int, device: torch.device | str = "cpu") -> Tensor:
        return self.matrices[first : first + count].flatten(1) / self.bound

    def whole(self, device: torch.device | str = "cpu") -> Tensor:
        return self.draw(0, self.count)


@pytest.mark.parametrize("cache_basis", ["never", "forward", "always"])
@pytest.mark.parametrize("path", linears.cases("nola"))
def test_parity(path: Path, cache_basis: str) -> None:
    with Case(path, "nola") as case:
        variant = case.option("variant")
        assert case.kind == f"{variant}_linear"
        shape = (case.option("out_features"), case.option("in_features"))
        W = case["param.W"] if variant == "llm" else torch.zeros(shape)
        assert W.shape == shape
        counts = (case.option("num_basis_a"), case.option("num_basis_b"))
        method = pt.NOLA(
            variant=variant,
            rank=case.option("rank"),
            num_basis=counts,
            alpha=case.option("alpha", None),
            chunk=2,
            cache_basis=cache_basis,
        )
        assert method.scaling == pytest.approx(case.option("scaling"))
        model, delta = attached(method, W)
        A, B = case["param.basis_A"], case["param.basis_B"]
        if variant == "vit":
            A, B = A.mT, B.mT
        else:  # A₀ is the last matrix of A's basis, under a bound of its own
            A = torch.cat([A, case["param.A0"][None] * delta.bounds[0] / shape[1] ** -0.5])
        assert (A.shape, B.shape) == tuple((basis.count, *basis.shape) for basis in delta.bases)
        delta.bases = tuple(Given(m, bound) for m, bound in zip((A, B), delta.bounds, strict=True))
        for name in ("alpha", "beta"):
            set_(getattr(delta, name), case[f"param.{name}"])

        x = case["in.x"]
        y = model(x)
        case.same("out.delta_y", y - x @ W.T, 1e-5)
        if variant == "llm":
            case.same("out.y", y, 1e-5)
        for name, gradient in zip(("alpha", "beta"), gradients(y, case["in.g"], delta.alpha, delta.beta), strict=True):
            case.same(f"grad.{name}", gradient, 1e-5)
