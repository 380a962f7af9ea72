"""DAS against reference results: layouts "bandit" and "adapter"."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import linears
import petiole as pt
from linears import Case, set_
from petiole.methods.execution import bandit


class Blocks(nn.Module):
    """Two pre-norm blocks with one head."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(size, 1, size, dropout=0.0, norm_first=True, batch_first=True) for _ in range(2)
        )

    def forward(self, h: Tensor) -> Tensor:
        for block in self.blocks:
            h = block(h)
        return h


@pytest.mark.parametrize("path", linears.cases("das"))
def test_parity(path: Path) -> None:
    with Case(path, "das") as case:
        assert case.kind in ("bandit", "adapter")
        (bandit_case if case.kind == "bandit" else adapter_case)(case)


def bandit_case(case: Case) -> None:
    selected, losses = case["in.selected"], case["in.losses"]
    m, eta = case.option("num_skip"), case.option("step_size")
    q = torch.zeros(case.option("num_modules"), dtype=torch.float64)
    assert selected.shape == (case.option("rounds"), case.option("samples_per_round"), m)
    assert case["in.importance"].shape == q.shape
    torch.testing.assert_close(losses, 0.3 + case["in.importance"][selected].sum(-1))  # what was recorded
    rounds = []
    for subnets, found in zip(selected.tolist(), losses, strict=True):
        q = bandit.updated(q, subnets, bandit.rewards(found.double()), eta)
        rounds.append(q)
    wanted = case["out.preferences"]
    case.same("out.preferences", torch.stack(rounds).to(wanted.dtype), 1e-6)
    case.same("out.final_skip", torch.tensor(bandit.chosen(q, m)), 0)


def adapter_case(case: Case) -> None:
    x, h = case["in.hidden"], case.option("bottleneck")
    assert x.shape == tuple(case.option(name) for name in ("batch", "tokens", "hidden_size"))
    assert case.option("scale") == 1.0
    model = Blocks(x.shape[-1]).to(x.dtype).eval()
    method = pt.DAS(skip=("encoder.0",), bottleneck=h, skip_bottleneck=h)
    tuned = pt.attach(model, method, found=pt.anatomy(model, stacks={"encoder": "blocks"}))
    deltas = {slot.key: slot.delta for slot in tuned.slots}
    skipped, beside = deltas["0.encoder.0.block.output"], deltas["0.encoder.1.attention.output"]
    for adapter in (skipped.adapter, beside):
        assert adapter.norm_in.eps == case.option("ln_eps")
        adapter.to(x.dtype)
        for part, name in ((adapter.norm_in, "norm"), (adapter.down, "down_proj"), (adapter.up, "up_proj")):
            set_(part.weight, case[f"param.{name}.weight"])
            set_(part.bias, case[f"param.{name}.bias"])
    case.same("out.parallel_branch", beside(x), 1e-5)
    case.same("out.skip_connection", model.blocks[0](x), 1e-5)
