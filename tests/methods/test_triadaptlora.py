"""What TriAdaptLoRA must hold, by the numbers of its specification."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW

import growing
import petiole as pt
import tiny
import toys
from growing import Run
from linears import OneLinear, Parallel, attached, parts, set_
from petiole.errors import AttachError, ConfigError, TrainingError
from petiole.methods.lowrank.growth import orthogonality

SOON: dict[str, Any] = {"warmup_steps": 1, "update_interval": 2, "target_rank": 4}  # grows in steps 2, 4, 6, …


def start(seed: int = 0, steps: int = 20, **fields: Any) -> Run:
    return Run(pt.TriAdaptLoRA(**{**SOON, "roles": ("q", "v", "up"), **fields}), seed, steps)


def one(sizes: tuple[int, ...] = (2, 1, 3), seed: int = 0, values: bool = True, **fields: Any) -> tuple[OneLinear, Any]:
    """One linear (7, 9) in blocks of these sizes, all with values of their own."""
    W = torch.randn(7, 9, generator=torch.Generator().manual_seed(seed))
    model, delta = attached(
        pt.TriAdaptLoRA(init_rank=sizes[0], target_rank=2 * sum(sizes), **fields), W, torch.randn(7)
    )
    delta.restructure({"blocks": list(sizes), "seed": 5})
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in delta.parameters():
        if values:
            set_(parameter, torch.randn(parameter.shape, generator=generator))
    return model.train(), delta


# 1
@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "t5"])
@pytest.mark.parametrize("init", ["default", "core_zero"])
def test_start_is_the_backbone(name: str, init: str) -> None:
    model, batch = toys.model(name), tiny.batch(name)
    bare = toys.output(model, batch)
    pt.attach(model, pt.TriAdaptLoRA(init=init))
    assert torch.equal(toys.output(model, batch), bare)


@pytest.mark.parametrize("init", ["default", "core_zero"])
def test_growth_changes_the_scale_alone(init: str) -> None:
    _, delta = one((2, 1), init=init)
    W = torch.zeros(7, 9)
    before = delta.weight(W).detach()
    delta.append(3)
    torch.testing.assert_close(delta.weight(W), before * (3 + 1e-5) / (6 + 1e-5), rtol=1e-5, atol=1e-6)


# 2
def test_counts() -> None:
    for sizes in ((1, 1, 1, 1), (2, 1, 3), (4,)):
        _, delta = one(sizes)
        rank, ends = sum(sizes), itertools.accumulate(sizes)
        core = sum(2 * a * o for a, o in zip(sizes, ends, strict=True))
        assert sum(p.numel() for p in delta.parameters() if p.requires_grad) == rank * (7 + 9) + core
    _, ones = one((1,) * 5)
    assert sum(p.numel() for p in ones.parameters()) == 5 * 16 + 5 * 6


def test_the_papers_core_is_small() -> None:
    """A linear of 768 x 768 at rank 8, grown one by one: 72 numbers more than LoRA's 12,288, 0.6 %."""
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        model = BertModel(BertConfig(num_hidden_layers=2))
    tuned = pt.attach(model, pt.TriAdaptLoRA())
    delta: Any = tuned.slots[0].delta
    for _ in range(7):
        delta.append(1)
    count = sum(p.numel() for p in delta.parameters())
    assert (delta.rank, count) == (8, 12_288 + 72) and round(100 * 72 / 12_288, 1) == 0.6


# 3
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 1, 3), (4,)])
def test_supports_and_gradients_of_the_core(sizes: tuple[int, ...]) -> None:
    model, delta = one(sizes)
    x, g = torch.randn(5, 9), torch.randn(5, 7)
    (model(x) * g).sum().backward()
    A, B = delta.factors()
    whole = 16 / (delta.rank + 1e-5) * B.T @ (g.T @ x) @ A.T
    end = 0
    for p, size in enumerate(sizes):
        start, end = end, end + size
        torch.testing.assert_close(delta.L[p].grad, whole[start:end, :end], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(delta.U[p].grad, whole[:end, start:end], rtol=1e-4, atol=1e-4)
    for kind, outside in (("L", lambda i, o: i < o), ("U", lambda i, o: i > o)):
        other = "U" if kind == "L" else "L"
        with torch.no_grad():
            kept = [p.clone() for p in getattr(delta, other)]
            for p in getattr(delta, other):
                p.zero_()
            core = delta.core()
            for p, value in zip(getattr(delta, other), kept, strict=True):
                p.copy_(value)
        block = [n for n, size in enumerate(sizes) for _ in range(size)]
        for i, o in itertools.product(range(delta.rank), repeat=2):
            assert not outside(block[i], block[o]) or core[i, o] == 0


# 4
def test_any_core_can_be_had_and_the_rank_is_at_most_r() -> None:
    _, delta = one((1, 2, 1))
    wanted = torch.randn(4, 4)
    strips, end = [], 0
    for p, size in enumerate(delta.sizes):
        start, end = end, end + size
        set_(delta.L[p], wanted[start:end, :end])
        above = wanted[:end, start:end].clone()
        above[start:] = 0
        set_(delta.U[p], above)
        strips.append(above)
    torch.testing.assert_close(delta.core(), wanted)
    change = delta.weight(torch.zeros(7, 9))
    assert torch.linalg.matrix_rank(change) == 4


# 5: tests/parity has counts and thresholds; here the bounds
def test_how_many_sites_grow() -> None:
    linear, steep, fixed = (pt.TriAdaptLoRA(growth=g, top_k=5) for g in ("linear", "non-linear", "fixed"))
    assert linear.due(24, 0.0, 6) == 1 and linear.due(24, 0.1, 6) == 2 and linear.due(24, 1.0, 6) == 6
    assert steep.due(24, 0.0, 6) == 1 and steep.due(24, 0.5, 100) == 4 and steep.due(24, 0.9, 6) == 6
    assert {fixed.due(24, share, 6) for share in (0.0, 0.5, 1.0)} == {5} and fixed.due(24, 0.0, 3) == 3
    assert steep.due(1, 0.5, 6) == linear.due(1, 0.5, 6) == 1


# 6
def test_the_score() -> None:
    run = start(warmup_steps=50)
    run.events.before_step()
    first = run.tuned.state[0]["norms"]
    torch.testing.assert_close(first, torch.stack([d.core().norm() for d in run.deltas]).detach())
    moment = run.tuned.moment(0)
    assert torch.equal(run.method.norms(moment, run.deltas), first)  # nothing moved: a score of 0
    with torch.no_grad():
        for parameter in (*run.deltas[0].L, *run.deltas[0].U):
            parameter.neg_()
    torch.testing.assert_close(run.method.norms(moment, run.deltas), first)
    run.deltas[1].append(1)
    now = run.method.norms(moment, run.deltas)
    torch.testing.assert_close(now[1], (run.deltas[1].core().norm() / 2).detach())


def test_the_first_score_is_growth_since_the_start() -> None:
    run = start(growth="fixed", top_k=1)
    run.step(2)
    norms = run.tuned.state[0]["norms"].clone()
    run.forward_backward()
    now = run.method.norms(run.tuned.moment(0), run.deltas)
    run.events.before_optimizer_step()  # step 2: growth
    best = int((now - norms).argmax())
    assert [d.rank for d in run.deltas] == [3 if i == best else 1 for i in range(6)]
    assert torch.equal(run.tuned.state[0]["norms"], now)


# 7
def test_one_group_for_each_parameter_and_growth_leaves_moments_alone() -> None:
    run = start()
    for _ in range(8):
        run.forward_backward()
        growing.assert_growth_keeps(run)
        growing.assert_one_group_for_each(run)
        run.finish()
    assert run.total > 6 and len({g["lr"] for g in run.optimizer.param_groups}) == 1


# 8
@pytest.mark.parametrize("name", ["bert", "gpt2", "torch_encoder"])
def test_merge_is_the_forward_pass(name: str) -> None:
    model, batch = tiny.model(name), tiny.batch(name)
    tuned = pt.attach(model, pt.TriAdaptLoRA(init_rank=2, target_rank=4), train_head=False)
    for slot in tuned.slots:
        slot.delta.append(1)
    toys.shake(tuned)
    bare, changed = toys.output(toys.model(name), batch), toys.output(model, batch)
    assert not torch.allclose(bare, changed)
    tuned.merge()
    torch.testing.assert_close(toys.output(model, batch), changed, rtol=1e-4, atol=1e-5)
    tuned.unmerge()
    assert torch.equal(toys.output(model, batch), changed)


def test_a_plain_loop_resumes_to_the_same_bits(tmp_path: Path) -> None:
    whole = growing.assert_resumes(start, tmp_path)
    assert whole.total > 12 and "norms" in whole.tuned.state[0]


@pytest.mark.slow
def test_killed_while_it_grows_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    ranks = growing.assert_survives_kills(pt.TriAdaptLoRA(**SOON), tmp_path, (3, 6))
    assert sum(ranks.values()) > len(ranks)


@pytest.mark.parametrize("change", [{"blocks": []}, {"blocks": [0, 1]}, {"blocks": [1, 10**9]}, {"seed": "x"}])
def test_a_structure_that_makes_no_sense_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    growing.assert_refuses_structure(start(), tmp_path, change)


# 9
def gradients_at_the_start(init: str) -> tuple[Any, dict[str, float]]:
    _, delta = one((2,), values=False, init=init)
    W, x, g = torch.randn(7, 9), torch.randn(5, 9), torch.randn(5, 7)
    (torch.nn.functional.linear(x, W + delta.weight(W)) * g).sum().backward()
    return delta, {kind: float(getattr(delta, kind)[0].grad.abs().max()) for kind in delta.kinds}


def test_starts() -> None:
    with pytest.warns(UserWarning, match="dead start"):
        delta, found = gradients_at_the_start("reference")
    assert set(found.values()) == {0.0}
    for parameter in delta.parameters():
        parameter.grad = None
    orthogonality([delta.factors()]).backward()
    assert delta.A[0].grad.abs().max() > 0 and delta.B[0].grad.abs().max() == 0
    _, found = gradients_at_the_start("core_zero")
    assert found["A"] == found["B"] == 0 and found["L"] > 0 and found["U"] > 0
    _, found = gradients_at_the_start("default")
    assert found["B"] > 0


def test_every_new_tensor_has_a_gradient_within_two_steps() -> None:
    run = start(growth="fixed", top_k=6)
    run.step(2)
    run.forward_backward()
    run.events.before_optimizer_step()
    run.finish()
    last = [getattr(d, kind)[-1] for d in run.deltas for kind in d.kinds]
    run.step()
    run.forward_backward()
    assert all(bool(p.grad.abs().max() > 0) for p in last)


# 10
@pytest.mark.parametrize("growth", ["linear", "non-linear", "fixed"])
def test_ranks_only_grow_to_the_budget(growth: str) -> None:
    run = start(target_total_rank=17, rank_increment=2, growth=growth)
    before = run.total
    for _ in range(19):
        run.step()
        assert before <= run.total <= 17 and (run.total == before or (run.events.step - 1) % 2 == 0)
        before = run.total
    assert run.total == 16  # 17 is not reached in whole increments


def test_equal_scores_grow_in_the_order_of_sites() -> None:
    run = start(init="core_zero", growth="fixed", top_k=2, target_total_rank=10, rank_increment=1)
    run.events.before_step()
    moment = run.tuned.moment(0, step=2, total_steps=20)
    run.method.before_optimizer_step(moment)
    assert [d.rank for d in run.deltas] == [2, 2, 2, 2, 1, 1]  # all tie, and the budget ends


# the loss term
def test_the_term_is_in_the_loss() -> None:
    run, plain = start(orthogonality_weight=0.3), start(orthogonality_weight=0.0)
    with_term, without = (r.model(**r.batch).loss for r in (run, plain))
    wanted = 0.3 * orthogonality([d.factors() for d in run.deltas])
    torch.testing.assert_close(with_term - without, wanted, rtol=1e-4, atol=1e-5)
    assert plain.tuned.loss_terms() == []


@pytest.mark.parametrize("change", ["accumulation", "checkpointing", "re-entrant"])
def test_growth_is_the_same_under_accumulation_and_checkpointing(change: str) -> None:
    plain, other = start(), start()
    if change != "accumulation":
        other.model.gradient_checkpointing_enable({"use_reentrant": change == "re-entrant"})
    for run in (plain, other):
        for _ in range(5):
            run.events.before_step()
            count = 2 if run is other and change == "accumulation" else 1
            for part in range(count):
                (run.model(**{k: v[part::count] for k, v in run.batch.items()}).loss / count).backward()
            run.events.before_optimizer_step()
            run.finish()
    assert [d.rank for d in plain.deltas] == [d.rank for d in other.deltas]
    for a, b in zip(plain.tuned.parameters(), other.tuned.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)


# refusals and warnings
@pytest.mark.parametrize(
    "fields,match",
    [({"total_steps": 100}, "total_steps"), ({"target_rank": 7}, "rank_increment"), ({"growth": "square"}, "growth"),
     ({"target_rank": 2, "init_rank": 3}, "target_rank"), ({"update_interval": 0}, "update_interval"),
     ({"rank_increment": 0}, "rank_increment"), ({"top_k": 0}, "top_k"), ({"init": "zero"}, "init"), ({"alpha": 0.0}, "alpha"),
     ({"orthogonality_weight": -1.0}, "orthogonality_weight")],
)  # fmt: skip
def test_refused_configurations(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        pt.TriAdaptLoRA(**fields)
    assert pt.TriAdaptLoRA(target_rank=7, rank_increment=2).increment == 2
    assert [pt.TriAdaptLoRA(target_rank=r).increment for r in (2, 4, 128)] == [1, 2, 64]


def test_a_budget_below_the_start_is_refused() -> None:
    with pytest.raises(AttachError, match="target_total_rank = 5, but 12 sites start at rank 1"):
        pt.attach(tiny.model("bert"), pt.TriAdaptLoRA(target_total_rank=5, roles=("q", "k", "v", "o", "up", "down")))


@pytest.mark.parametrize("name,role", [("bert", "embedding"), ("resnet", "conv")])
def test_what_is_no_linear_is_refused(name: str, role: str) -> None:
    with pytest.raises(AttachError, match="triadaptlora"):
        pt.attach(tiny.model(name), pt.TriAdaptLoRA(roles=[role]))


def test_growth_needs_to_know_its_end() -> None:
    run = start()
    run.events.total_steps = 0
    with pytest.raises(TrainingError, match="which is not known"):
        run.events.before_step()
    own = start(total_steps=5, growth="fixed", top_k=1)
    own.events.total_steps = 0
    own.step(6)
    with pytest.raises(TrainingError, match="after total_steps = 5"):
        own.step(1)
    closed = start(target_total_rank=6)
    closed.events.total_steps = 0
    closed.step(3)  # nothing is to grow


def test_a_run_too_short_for_growth_is_warned_of() -> None:
    run = start(warmup_steps=3)
    with pytest.warns(UserWarning, match="will stay unused"):
        run.events.total_steps = 4
        run.events.before_step()
    other = start(warmup_steps=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.events.before_step()


def test_alpha_of_none_is_the_first_rank() -> None:
    _, delta = one((2, 1), alpha=None)
    assert delta.parts()[2] == pytest.approx(2 / 3, rel=1e-4)


def test_loss_falls_within_ten_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(2, 12, 12, generator=generator) / 12**0.5
    D = torch.randn(12, 4, generator=generator) @ torch.randn(4, 12, generator=generator) / 8
    x = torch.randn(64, 12, generator=generator)
    y = torch.stack([x @ W[0].T, x @ (W[1] + D).T])
    model = Parallel(list(W))
    tuned = pt.attach(model, pt.TriAdaptLoRA(roles=("q",), orthogonality_weight=0.0), found=parts(model))
    optimizer = AdamW(tuned.parameters(), lr=0.02)
    losses: list[Tensor] = []
    for _ in range(10):
        losses.append((model(x) - y).square().mean())
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
