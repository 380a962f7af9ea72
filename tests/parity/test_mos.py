"""MoS against reference results: layouts "sharded" and "unsharded". The tables are given, so no generator has to match."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import linears
import petiole as pt
from linears import Case, set_


class Layers(nn.Module):
    """x -> (L, n, out): L linears of one shape, each given the same x."""

    def __init__(self, W: Tensor) -> None:
        super().__init__()
        self.count = len(W)
        blank = W.new_zeros(1, *W.shape[1:]) if self.count == 1 else W[:0]  # a stack has two blocks or more
        self.blocks = nn.ModuleList([linears.Block(w, None) for w in torch.cat([W, blank])])

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([block(x) for block in self.blocks[: self.count]])


@pytest.mark.filterwarnings("ignore:mos")
@pytest.mark.parametrize("path", linears.cases("mos"))
def test_parity(path: Path) -> None:
    with Case(path, "mos") as case:
        assert case.kind in ("sharded", "unsharded")
        count, e, r = case.option("layers"), case.option("equivalent_rank"), case.option("rank")
        l, p = case.option("shards_per_vector"), case.option("private_rank")
        W, x = case["param.W"], case["in.x"]
        assert W.shape == (count, case.option("out_features"), case.option("in_features"))
        public = (e - p) * count * l
        method = pt.MoS(
            equivalent_rank=e,
            rank=r,
            shards_per_vector=l,
            private_rank=p,
            replacement=(r - p) * l > public,  # how it was drawn: here tables are given
            alpha=case.option("alpha"),
            dropout=0.0,
            roles=("q",),
            layers=tuple(range(count)),
        )
        model = Layers(W)
        found = pt.anatomy(model, stacks={"encoder": "blocks"}, roles={"q": "query"})
        tuned = pt.attach(model, method, found=found)
        assert tuned.trainable == case.option("trainable")
        model.to(W.dtype)
        (pool,) = tuned.shared[0].pools.values()  # type: ignore[operator,union-attr]
        for end in "AB":
            shards = getattr(pool, end)
            set_(shards, torch.cat([case[f"param.{end}_public"], case[f"param.{end}_private"].flatten(0, 1)]))
            table = case[f"param.index_{end}"].flatten(1)
            own = (torch.arange(count) * p * l)[:, None]  # a site's private shards follow those of the sites before it
            set_(getattr(pool, f"index_{end}"), torch.where(table < public, table, table + own))

        parts = [slot.delta.parts() for slot in tuned.slots]
        case.same("out.A", torch.stack([part[0] for part in parts]), 1e-12 if case.double else 1e-5)
        case.same("out.B", torch.stack([part[1] for part in parts]), 1e-12 if case.double else 1e-5)
        y = model(x)
        case.same("out.y", y, 1e-5)
        found_gradients = torch.autograd.grad((y * case["in.g"]).sum(), [pool.A, pool.B])
        for end, gradient in zip("AB", found_gradients, strict=True):
            case.same(f"grad.{end}_public", gradient[:public], 1e-5)
            if case.get(f"grad.{end}_private") is not None:
                case.same(f"grad.{end}_private", gradient[public:].view(count, p * l, -1), 1e-5)
