"""NLoRA against reference results: layouts "submatrix" and "pinv" as the fixtures' README describes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import linears
import petiole as pt
from linears import Case, attached, gradients, set_


def fields(case: Case) -> dict[str, Any]:
    """The configuration that a case asks for, in petiole's words."""
    found = {"rank": case.option("rank"), "alpha": case.option("alpha"), "core": case.option("variant")}
    for theirs, ours in (
        ("rcond", "tolerance"),
        ("row_index", "rows"),
        ("column_index", "columns"),
        ("dropout", "dropout"),
    ):
        if theirs in case.config:
            found[ours] = case.option(theirs)
    assert case.kind == found["core"]
    return found


def tolerance(case: Case) -> float:
    return 1e-6 if case.double else 1e-5


@pytest.mark.parametrize("path", linears.cases("nlora"))
def test_parity(path: Path) -> None:
    with Case(path, "nlora") as case:
        limit = tolerance(case)
        W, x = case["param.W"], case["in.x"]
        assert W.shape == (case.option("out_features"), case.option("in_features"))
        chosen = fields(case)
        model, delta = attached(pt.NLoRA(**chosen), W, case.get("param.b"))
        A, N, B = delta.A, delta.N, delta.B
        for name, tensor in (("A", A), ("N", N), ("B", B)):
            case.same(f"out.{name}_init", tensor, limit)
        scale = chosen["alpha"] / chosen["rank"]
        if case.kind == "submatrix":
            y = model(x)
            case.same("out.y", y, limit)
            for name, gradient in zip("ANB", gradients(y, case["in.g"], A, N, B), strict=True):
                case.same(f"grad.{name}", gradient, limit)
            return
        case.same("out.W_residual", W + delta.weight(W) - scale * B @ N @ A, limit)
        case.same("out.y_init", model(x), limit)
        set_(N, N.detach() + case["in.dN"])
        case.same("out.y_after_dN", model(x), limit)


@pytest.mark.parametrize("path", linears.cases("nlora"))
def test_parity_of_the_core_alone(path: Path) -> None:
    """IntTune is the same function; its core gets the same gradient."""
    case = Case(path, "nlora")
    W, x = case["param.W"], case["in.x"]
    model, delta = attached(pt.IntTune(**fields(case)), W, case.get("param.b"))
    if case.kind == "submatrix":
        y = model(x)
        case.same("out.y", y, tolerance(case))
        (gradient,) = gradients(y, case["in.g"], delta.N)
        case.same("grad.N", gradient, tolerance(case))
    else:
        case.same("out.y_init", model(x), tolerance(case))
        set_(delta.N, delta.N.detach() + case["in.dN"])
        case.same("out.y_after_dN", model(x), tolerance(case))
