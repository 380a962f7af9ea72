"""IncreLoRA against reference results: layouts "layer", one linear after some growth, and "allocator", ranks that follow from given scores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import linears
import petiole as pt
from linears import Case, Parallel, attached, gradients, parts, set_
from petiole.methods.lowrank.growth import orthogonality


def layer(case: Case) -> None:
    rank, reserve, alpha = case.option("rank"), case.option("reserve"), case.option("alpha")
    W, x, g = case["param.W"], case["in.x"], case["in.g"]
    assert W.shape == (case.option("out_features"), case.option("in_features"))
    init = case.option("init_rank")
    method = pt.IncreLoRA(
        init_rank=init,
        target_rank=rank + reserve,
        rank_increment=max(1, reserve),
        alpha=alpha if alpha > 0 else None,
        orthogonality_weight=case.option("orth_weight"),
    )
    model, delta = attached(method, W, case["param.b"])
    sizes = case["param.block_sizes"].tolist()
    assert sum(sizes) == rank + reserve and sizes[0] == init
    delta.restructure({"blocks": [rank, reserve] if reserve else [rank], "reserve": reserve > 0, "seed": 0})
    model.train()
    for name, dim in (("A", 0), ("E", 0), ("B", 1)):
        pieces = case[f"param.{name}"].split([rank, reserve] if reserve else [rank], dim)
        for parameter, value in zip(getattr(delta, name), pieces, strict=True):
            set_(parameter, value)

    case.same("out.delta_W", delta.weight(W), 1e-5)
    y = model(x)  # in one go
    case.same("out.y", y, 1e-5)
    found = list(gradients(y, g, *delta.A, *delta.B))
    case.same("grad.A", torch.cat(found[: len(delta.A)]), 1e-5)
    case.same("grad.B", torch.cat(found[len(delta.A) :], 1), 1e-5)
    delta.watched = True
    y = model(x)
    case.same("out.y", y, 1e-5)
    (y * g).sum().backward()
    case.same("out.score", delta.importance.take(delta), 1e-5)
    A, B = delta.factors()
    case.same("out.orth_reg_concat", orthogonality([(A, B)]), 1e-5)
    pairs = list(zip(A.split(sizes), B.split(sizes, 1), strict=True))
    case.same("out.orth_reg_0p1", method.orthogonality_weight * orthogonality(pairs), 1e-5)


def allocator(case: Case) -> None:
    count, scores = case.option("modules"), case["in.scores"]
    assert scores.shape == (case.option("steps"), count)
    method = pt.IncreLoRA(
        init_rank=case.option("init_rank"),
        target_total_rank=case.option("target_total_rank"),
        rank_increment=case.option("rank_increment"),
        top_k=case.option("top_h"),
        warmup_steps=case.option("init_warmup"),
        update_interval=case.option("incre_interval"),
        ema_decay=case.option("beta1"),
        uncertainty_decay=case.option("beta2"),
        roles=("q",),
        layers=tuple(range(count)),
    )
    model = Parallel([torch.zeros(3, 3)] * (count + 1))
    tuned = pt.attach(model, method, found=parts(model))
    deltas = [slot.delta for slot in tuned.slots]
    seen: dict[str, list[Tensor]] = {"ema_score": [], "ema_uncertainty": [], "rank": []}
    for step, row in enumerate(scores):
        moment = tuned.moment(0, step=step)
        method.before_step(moment)
        for delta, score in zip(deltas, row, strict=True):
            delta.importance.calls, delta.importance.score = 1, score
        method.before_optimizer_step(moment)
        seen["ema_score"].append(tuned.state[0].get("importance", torch.zeros(count)))
        seen["ema_uncertainty"].append(tuned.state[0].get("uncertainty", torch.zeros(count)))
        seen["rank"].append(torch.tensor([delta.rank for delta in deltas]))
    for name, rows in seen.items():
        case.same(f"out.{name}", torch.stack(rows), 0 if name == "rank" else 1e-5)


LAYOUTS: dict[str, Callable[[Case], None]] = {"layer": layer, "allocator": allocator}


@pytest.mark.parametrize("path", linears.cases("increlora"))
def test_parity(path: Path) -> None:
    with Case(path, "increlora") as case:
        LAYOUTS[case.kind](case)
