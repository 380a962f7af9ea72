"""MoLA against reference results: the official layer."""

from __future__ import annotations

from pathlib import Path

import pytest

import linears
import petiole as pt
from linears import Case, attached, gradients, of, set_


@pytest.mark.parametrize("path", linears.cases("mola"))
def test_parity(path: Path) -> None:
    with Case(path, "mola") as case:
        assert case.kind == "moe_linear"
        N, r = case.option("num_experts"), case.option("rank")
        method = pt.MoLA(
            num_experts=N,
            top_k=case.option("top_k"),
            rank=r,
            alpha=case.option("alpha"),
            dropout=0.0,
            balance_weight=1.0,
        )
        W, x = case["param.W"], case["in.x"]
        assert W.shape == (case.option("out_features"), case.option("in_features"))
        model, delta = attached(method, W)
        model.to(W.dtype)
        set_(delta.router, case["param.router"])
        set_(delta.A, case["param.A"].flatten(0, 1))
        set_(delta.B, case["param.B"].transpose(0, 1).flatten(1))

        case.same("out.router_logits", x.flatten(0, -2) @ delta.router.T, 1e-5)
        y = model(x)
        case.same("out.y", y, 1e-5)
        router, A, B = gradients(y, case["in.g"], delta.router, delta.A, delta.B)
        case.same("grad.router", router, 1e-5)
        case.same("grad.A", A.view(N, r, -1), 1e-5)
        case.same("grad.B", B.unflatten(1, (N, r)).transpose(0, 1), 1e-5)

        model.train()(x)
        (balance,) = of(model).loss_terms()
        case.same("out.balance_loss", balance, 1e-5)
        (gradient,) = gradients(balance, balance.new_ones(()), delta.router)
        case.same("grad.router_balance", gradient, 1e-4)
