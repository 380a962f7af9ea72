"""TriAdaptLoRA against reference results: kinds "delta", one linear after some growth, and "growth_…", ranks that follow from given scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import linears
import petiole as pt
from linears import Case, Parallel, attached, gradients, parts, set_
from petiole.methods.lowrank import triadaptlora


def delta(case: Case) -> None:
    W, x, g, alpha = case["param.W"], case["in.x"], case["in.g"], case.option("alpha")
    sizes = case["param.block_sizes"].tolist()
    assert W.shape == (case.option("out_features"), case.option("in_features"))
    assert (sum(sizes), len(sizes)) == (case.option("rank"), case.option("num_blocks"))
    method = pt.TriAdaptLoRA(init_rank=sizes[0], target_rank=2 * sum(sizes), alpha=alpha if alpha > 0 else None)
    model, own = attached(method, W, case.get("param.b"))
    own.restructure({"blocks": sizes, "seed": 0})
    low, up, end = case["param.C_lower"], case["param.C_upper"], 0
    for p, size in enumerate(sizes):
        start, end = end, end + size
        set_(own.A[p], case["param.A"][start:end])
        set_(own.B[p], case["param.B"][:, start:end])
        set_(own.L[p], low[start:end, :end])
        set_(own.U[p], up[:end, start:end])
        assert not low[start:end, end:].any() and not up[end:, start:end].any()

    case.same("out.C", own.core(), 1e-5)
    case.same("out.norm", own.core().norm() / len(own.sizes), 1e-5)
    case.same("out.delta_W", own.weight(W), 1e-5)
    y = model(x)
    case.same("out.y", y, 1e-5)
    found = list(gradients(y, g, *own.A, *own.B, *own.L, *own.U))
    A, B, L, U = (found[i * len(sizes) : (i + 1) * len(sizes)] for i in range(4))
    case.same("grad.A", torch.cat(list(A)), 1e-5)
    case.same("grad.B", torch.cat(list(B), 1), 1e-5)
    case.same("grad.C_lower", padded(L, sizes), 1e-5)
    case.same("grad.C_upper", padded([strip.T for strip in U], sizes).T, 1e-5)


def padded(strips: Any, sizes: list[int]) -> Tensor:
    """Rows of the lower triangle -> (R, R)"""
    return torch.cat([torch.nn.functional.pad(strip, (0, sum(sizes) - strip.shape[1])) for strip in strips])


def growth(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    count, steps, scores = case.option("modules"), case["in.steps"].tolist(), case["in.scores"]
    assert scores.shape == (len(steps), count)
    name = case.option("growth")
    method = pt.TriAdaptLoRA(
        init_rank=case.option("init_rank"),
        target_total_rank=case.option("target_total_rank"),
        rank_increment=case.option("rank_increment"),
        warmup_steps=case.option("init_warmup"),
        update_interval=case.option("incre_interval"),
        total_steps=case.option("total_steps"),
        top_k=case.option("top_k", 3),
        growth="non-linear" if name.startswith(("non", "exp")) else name,
        roles=("q",),
        layers=tuple(range(count)),
    )
    model = Parallel([torch.zeros(40, 40)] * (count + 1))
    tuned = pt.attach(model, method, found=parts(model))
    deltas: list[Any] = [slot.delta for slot in tuned.slots]
    used: list[tuple[int, float]] = []
    choose = triadaptlora.growth.chosen

    def chosen(values: list[float], m: int, room: int) -> list[int]:
        used.append((m, sorted(values, reverse=True)[m - 1]))
        return choose(values, m, room)

    monkeypatch.setattr(triadaptlora.growth, "chosen", chosen)
    counts, thresholds, ranks = [], [], []
    for step, row in zip(steps, scores, strict=True):
        used.clear()
        tuned.state[0]["norms"] = torch.zeros(count)  # from which they have risen by the scores
        monkeypatch.setattr(pt.TriAdaptLoRA, "norms", lambda self, moment, deltas, row=row: row)
        method.before_optimizer_step(tuned.moment(0, step=step))
        m, threshold = used[0] if used else (0, 1e30)
        counts.append(m)
        thresholds.append(threshold)
        ranks.append([d.rank for d in deltas])
    case.same("out.num_grow", torch.tensor(counts), 0)
    case.same("out.threshold", torch.tensor(thresholds), 1e-5)
    case.same("out.rank", torch.tensor(ranks), 0)
    case.same("out.total_rank", torch.tensor(ranks).sum(1), 0)


@pytest.mark.parametrize("path", linears.cases("triadaptlora"))
def test_parity(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Case(path, "triadaptlora") as case:
        if case.kind == "delta":
            delta(case)
        else:
            growth(case, monkeypatch)
