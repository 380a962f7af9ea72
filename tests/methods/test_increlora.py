"""What IncreLoRA must hold, by the numbers of its specification."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, AdamW

import growing
import petiole as pt
import tiny
import toys
from growing import Run, trained
from linears import OneLinear, Parallel, attached, parts, set_
from petiole.errors import AttachError, ConfigError, TrainingError
from petiole.files import parse
from petiole.methods.lowrank import growth
from petiole.methods.lowrank.growth import Growing, chosen, grown, orthogonality
from petiole.methods.lowrank.increlora import Components
from petiole.ranks import rank_pattern
from petiole.training import Events, PetioleCallback

SOON: dict[str, Any] = {"warmup_steps": 1, "update_interval": 2, "top_k": 3}  # grows in steps 2, 4, 6, …


def start(seed: int = 0, steps: int = 20, family: str = "bert", decay: float = 0.1, **fields: Any) -> Run:
    return Run(pt.IncreLoRA(**{**SOON, "roles": ("q", "v", "up"), **fields}), seed, steps, family, decay)


def one(rank: int = 2, increment: int = 2, seed: int = 0, **fields: Any) -> tuple[OneLinear, Any]:
    """One linear (7, 9) whose components all have values."""
    W = torch.randn(7, 9, generator=torch.Generator().manual_seed(seed))
    fields = {"init_rank": rank, "target_rank": 9, "rank_increment": increment, **fields}
    model, delta = attached(pt.IncreLoRA(**fields), W, torch.randn(7))
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in (*delta.A, *delta.B, delta.E[0]):
        set_(parameter, torch.randn(parameter.shape, generator=generator))
    return model.train(), delta


# 1
@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "t5"])
def test_start_is_the_backbone_and_reserves_add_next_to_nothing(name: str) -> None:
    model, batch = toys.model(name), tiny.batch(name)
    bare = toys.output(model, batch)
    pt.attach(model, pt.IncreLoRA())
    assert torch.equal(toys.output(model, batch), bare)
    off = (toys.output(model.train(), batch) - toys.output(pt.detach(model) or model, batch)).abs().max()
    assert 0 < off < 1e-5 * 32 * float(bare.abs().max())


def test_the_first_output_of_one_linear_in_training() -> None:
    """At most 1e-5 · alpha / R · ‖B‖ ‖A x‖."""
    W = torch.randn(7, 9)
    model, delta = attached(pt.IncreLoRA(target_rank=4), W)
    x = torch.randn(5, 9)
    change = model.train()(x) - x @ W.T
    bound = 1e-5 * 32 * delta.B[-1].norm() * (x @ delta.A[-1].T).norm()
    assert 0 < change.norm() <= bound + 1e-5 and torch.equal(model.eval()(x), OneLinear(W)(x))


# 2
@pytest.mark.parametrize("advance", [True, False])
def test_counts_while_open_and_after_the_end(advance: bool) -> None:
    run = start(advance_learn=advance, target_rank=4)
    head = run.model.classifier.weight.numel() + run.model.classifier.bias.numel()

    def wanted() -> int:
        sizes = [(d.rank, d.site.in_features + d.site.out_features, 2 * d.reserve * advance) for d in run.deltas]
        return head + sum(rank * (both + 1) + reserve * both for rank, both, reserve in sizes)

    assert run.tuned.trainable == wanted() and all(d.reserve for d in run.deltas)
    run.step(3)
    assert run.total == 6 + 3 * 2 and run.tuned.trainable == wanted()
    run.step(10)
    assert run.total == 4 * 6 and not any(d.reserve for d in run.deltas)
    assert run.tuned.trainable == wanted() == head + sum(p.numel() for d in run.deltas for p in d.parameters())


def test_the_papers_budget() -> None:
    """DeBERTaV3-base: 72 sites; from 72 ranks to 144, three in each round."""
    from transformers import DebertaV2Config, DebertaV2Model

    size = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    with torch.device("meta"):
        model = DebertaV2Model(DebertaV2Config(vocab_size=100, **size))
    method = pt.IncreLoRA(target_rank=2, top_k=3)
    tuned = pt.attach(model, method)
    assert len(tuned.slots) == 72 and grown(s.delta for s in tuned.slots) == 72
    assert method.room(72, 72) == 72 and math.ceil(72 / 3) == 24  # rounds
    widths = 12 * (4 * (768 + 768) + 2 * (768 + 3072))
    assert tuned.trainable == 2 * widths + 72
    assert [pt.IncreLoRA(target_rank=r).increment for r in (2, 4, 6, 8, 1, 5)] == [1, 2, 3, 4, 1, 2]


# 3
@pytest.mark.parametrize("advance", [True, False])
@pytest.mark.parametrize("room", [1, 20, 1 << 20])
def test_the_score_is_that_of_the_explicit_gradient(advance: bool, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over two micro-batches, of which the gradients are summed before the absolute value is taken; whatever the tiles."""
    monkeypatch.setitem(growth.ROOM, "cpu", room)
    model, delta = one(advance_learn=advance)
    W = model.linear.weight
    batches = [(torch.randn(3, 4, 9), torch.randn(3, 4, 7)) for _ in range(2)]
    explicit = delta.weight(W).detach().requires_grad_()
    total = sum(((x @ (W + explicit).T) * g).sum() for x, g in batches)
    (G,) = torch.autograd.grad(total, explicit)
    wanted = (explicit * G).abs().sum() / math.sqrt(63)
    delta.importance.expected = 2
    delta.watched = True
    for x, g in batches:
        (model(x) * g).sum().backward()
    assert not delta.importance.held  # nothing is kept longer than it must
    torch.testing.assert_close(delta.importance.take(delta), wanted.detach(), rtol=1e-5, atol=1e-6)


def test_what_is_watched_gives_the_same_output_and_gradients() -> None:
    model, delta = one()
    x, g = torch.randn(3, 4, 9), torch.randn(3, 4, 7)
    found = []
    for watched in (False, True):
        delta.watched = watched
        inputs = x.clone().requires_grad_()
        y = model(inputs)
        free = [p for p in delta.parameters() if p.requires_grad]
        found.append([y, *torch.autograd.grad((y * g).sum(), [inputs, *free])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_no_matrix_of_the_weights_size_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(growth.ROOM, "cpu", 36)
    made: list[int] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                made.append(out.numel())
            return out

    model, delta = one()
    delta.watched = True
    y = model(torch.randn(2, 9))
    with Watch():
        delta.importance.saw(delta, torch.randn(2, 9), torch.ones_like(y))
    assert delta.importance.score is not None and max(made) <= 36 < 63


def test_dropout_is_part_of_the_score() -> None:
    model, delta = one(dropout=0.5)
    x, g = torch.randn(6, 9), torch.randn(6, 7)
    delta.watched = True
    torch.manual_seed(3)
    (model(x) * g).sum().backward()
    torch.manual_seed(3)
    G = g.T @ torch.nn.functional.dropout(x, 0.5)
    wanted = (delta.weight(model.linear.weight) * G).abs().sum() / math.sqrt(63)
    torch.testing.assert_close(delta.importance.take(delta), wanted.detach(), rtol=1e-5, atol=1e-6)


def scores_in_a_step(run: Run, micro: int) -> Tensor:
    """S in the second step, its batch in so many parts of equal weight."""
    seen = []
    original = run.method.observe

    def note(moment: Any, deltas: Any) -> None:
        seen.append(torch.stack([d.importance.take(d) for d in deltas]))

    object.__setattr__(run.method, "observe", note)
    for _ in range(2):
        run.events.before_step()
        for part in range(micro):
            piece = {k: v[part::micro] for k, v in run.batch.items()}
            (run.model(**piece).loss / micro).backward()
        run.events.before_optimizer_step()
        run.finish()
    object.__setattr__(run.method, "observe", original)
    return seen[-1]


@pytest.mark.parametrize("change", ["accumulation", "checkpointing", "re-entrant"])
def test_the_score_under_accumulation_and_checkpointing(change: str) -> None:
    plain, other = start(orthogonality_weight=0.3), start(orthogonality_weight=0.3)
    if change != "accumulation":
        other.model.gradient_checkpointing_enable({"use_reentrant": change == "re-entrant"})
    wanted = scores_in_a_step(plain, 1)
    assert bool((wanted > 0).all())
    micro = 2 if change == "accumulation" else 1
    torch.testing.assert_close(scores_in_a_step(other, micro), wanted, rtol=1e-3, atol=1e-7)
    for a, b in zip(plain.tuned.parameters(), other.tuned.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_a_weight_that_no_call_shows_is_scored_too() -> None:
    """Packed experts: the core composes W + ΔW, whose gradient is G."""
    run = start(family="mixtral", roles=("down",), restart_warmup=False)
    assert {d.site.kind for d in run.deltas} == {"parameter"}
    run.forward_backward()
    run.events.before_optimizer_step()
    run.finish()
    run.forward_backward()
    assert sum(d.importance.dense is not None for d in run.deltas) > 1
    for delta in run.deltas:
        if delta.importance.dense is not None:
            wanted = (delta.importance.dense * delta.weight(torch.zeros(delta.importance.dense.shape))).abs().sum()
            wanted = wanted.detach() / math.sqrt(delta.importance.dense.numel())
            torch.testing.assert_close(delta.importance.take(delta), wanted, rtol=1e-4, atol=1e-9)


# 4: tests/parity; here what the reference does not have
def test_scores_that_are_not_finite_leave_no_trace() -> None:
    run = start()
    run.step(2)
    before = {k: v.clone() for k, v in run.tuned.state[0].items()}
    run.forward_backward()
    run.deltas[0].importance.score = torch.tensor(math.inf)
    run.events.before_optimizer_step()
    assert all(torch.equal(run.tuned.state[0][k], v) for k, v in before.items())


def test_score_interval() -> None:
    run = start(score_interval=3, warmup_steps=50)
    seen = []
    for _ in range(6):
        run.step()
        seen.append(run.tuned.state[0]["uncertainty"].clone())
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[2], seen[3]) and torch.equal(seen[3], seen[5])


# 5
def test_total_rank_grows_at_rounds_alone_and_ends_at_the_target() -> None:
    run = start(target_total_rank=17, rank_increment=2)
    totals = []
    for _ in range(12):
        before = run.total
        run.step()
        totals.append(run.total)
        assert run.total >= before and (run.total == before or (run.events.step - 1) % 2 == 0)
    assert totals[:3] == [6, 6, 12] and totals[-1] == 16  # 17 is not reached in whole increments
    assert not any(d.reserve for d in run.deltas)
    state = {k: v.clone() for k, v in run.tuned.state[0].items()}
    run.step()
    assert all(torch.equal(run.tuned.state[0][k], v) for k, v in state.items())  # no update any more


def test_a_last_round_does_not_overshoot() -> None:
    assert chosen([0.5, 0.9, 0.9, 0.1], 1, 5) == [1, 2]  # ties grow together
    assert chosen([0.5, 0.9, 0.9, 0.1], 1, 1) == [1]  # as far as there is room, in the order of sites
    assert chosen([0.5, 0.9, 0.7, 0.1], 3, 2) == [1, 2]
    assert chosen([1.0, 2.0], 5, 5) == [1, 0] and chosen([1.0], 1, 0) == []


# 6
def test_growth_leaves_old_values_and_moments_alone() -> None:
    run = start()
    run.step(2)
    run.forward_backward()
    growing.assert_growth_keeps(run)
    assert run.total == 9


# 7
@pytest.mark.parametrize("name", ["bert", "gpt2", "torch_encoder"])
def test_merge_is_the_forward_pass_without_reserves(name: str) -> None:
    model, batch = tiny.model(name), tiny.batch(name)
    tuned = pt.attach(model, pt.IncreLoRA(init_rank=2, target_rank=4), train_head=False)
    toys.shake(tuned)
    changed, open_ = toys.output(model, batch), toys.output(model.train(), batch)
    assert 0 < (open_ - changed).norm() <= 1e-4 * changed.norm()
    tuned.merge()  # in training mode, and without the reserve all the same
    torch.testing.assert_close(toys.output(model.eval(), batch), changed, rtol=1e-4, atol=1e-5)
    tuned.unmerge()
    assert torch.equal(toys.output(model, batch), changed)


# 8
def test_every_trainable_parameter_stands_in_one_group() -> None:
    run = start()
    for _ in range(12):
        run.forward_backward()
        run.events.before_optimizer_step()
        growing.assert_one_group_for_each(run)
        frozen = [d.E[-1] for d in run.deltas if d.reserve]
        assert not any(p.requires_grad for p in frozen) and all(bool((p == 1e-5).all()) for p in frozen)
        run.finish()
    decayed = {id(p) for group in run.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert not decayed & {id(p) for d in run.deltas for p in d.E}
    assert {id(p) for d in run.deltas for p in (*d.A, *d.B)} <= decayed  # the run's decay, for new blocks too


def test_reserves_learn_ahead_or_not() -> None:
    for advance in (True, False):
        run = start(advance_learn=advance, warmup_steps=50)
        before = [d.A[-1].clone() for d in run.deltas]
        run.step(3)
        assert all(torch.equal(d.A[-1], b) != advance for d, b in zip(run.deltas, before, strict=True))
        assert all(bool((d.E[-1] == (1e-5 if advance else 0)).all()) for d in run.deltas)


# 9
def test_a_plain_loop_resumes_to_the_same_bits(tmp_path: Path) -> None:
    growing.assert_resumes(start, tmp_path)


SMALL: Any = {**SOON, "target_rank": 3, "roles": ("q", "v")}


@pytest.mark.slow
def test_killed_while_it_grows_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    ranks = growing.assert_survives_kills(pt.IncreLoRA(**SMALL), tmp_path, (3, 5, 8))
    assert sum(ranks.values()) == 12


def test_in_another_trainer(tmp_path: Path) -> None:
    from transformers import Trainer

    ranks = trained(pt.IncreLoRA(**SMALL), tmp_path / "ours")[1]
    theirs = trained(pt.IncreLoRA(**SMALL), tmp_path / "theirs", kind=Trainer, callbacks=[PetioleCallback()])
    assert sum(ranks.values()) == 12 and theirs[1] == ranks


# 10
def test_restarted_warm_ups() -> None:
    run = start(warmup_steps=3, update_interval=4)
    run.step(4)
    count = len(run.optimizer.param_groups)
    run.forward_backward()
    run.events.before_optimizer_step()  # step 4: birth
    born = run.optimizer.param_groups[count:]
    assert born and {g["lr"] for g in born} == {0.0}
    run.finish()
    rates = []
    for _ in range(3):
        rates.append(run.optimizer.param_groups[count]["lr"])
        run.step()
    assert rates == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2])
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * (1 - run.events.step / 20))


def test_without_restart_the_run_s_schedule() -> None:
    run = start(restart_warmup=False)
    run.step(6)
    assert len({g["lr"] for g in run.optimizer.param_groups}) == 1


# the loss term
def test_orthogonality_by_hand() -> None:
    A, B, C = torch.randn(3, 9), torch.randn(7, 3), torch.randn(7, 2)
    eye = torch.eye(3)
    single = ((A @ A.T - eye).norm() + (B.T @ B - eye).norm()) / 2
    torch.testing.assert_close(orthogonality([(A, B)]), single)
    other = ((C.T @ C - torch.eye(2)).norm() * 2) / 2
    torch.testing.assert_close(orthogonality([(A, B), (C.T, C)]), (single + other) / 2)
    rows_, _ = torch.linalg.qr(torch.randn(9, 3))
    assert orthogonality([(rows_.T, rows_)]) < 1e-6


def test_the_term_is_in_the_loss_and_counts_reserves() -> None:
    run = start(orthogonality_weight=0.3)
    pairs = [d.factors() for d in run.deltas]
    assert pairs[0][0].shape[0] == 2  # one component, one in reserve
    plain = start(orthogonality_weight=0.0)
    with_term, without = (r.model(**r.batch).loss for r in (run, plain))
    torch.testing.assert_close(with_term - without, 0.3 * orthogonality(pairs), rtol=1e-4, atol=1e-5)
    assert plain.tuned.loss_terms() == []


# files
def test_the_file_for_deployment_has_no_reserve(tmp_path: Path) -> None:
    run = start()
    run.step(3)
    path = run.tuned.save(tmp_path / "a.safetensors")
    whole = run.tuned.save(tmp_path / "b.safetensors", folded=False)
    names, every = (set(parse(p.read_bytes())[0]) for p in (path, whole))
    assert {n.partition(":")[2] for n in every - names} == {
        f"{k}.{len(d.sizes) - 1}" for d in run.deltas for k in "AEB"
    }
    model = tiny.model("bert")
    loaded = pt.load(model, path)
    assert rank_pattern(loaded) == rank_pattern(run.tuned)
    assert torch.equal(toys.output(model, run.batch), toys.output(run.model.eval(), run.batch))
    delta = next(s.delta for s in loaded.slots if isinstance(s.delta, Components))
    assert delta.reserve and delta.A[-1].std() > 0.005 and bool((delta.E[-1] == 1e-5).all())


@pytest.mark.parametrize(
    "change",
    [{"blocks": []}, {"blocks": [0, 1]}, {"blocks": "11"}, {"blocks": [1, 10**9]}, {"seed": "x"}, {"reserve": 2}],
)
def test_a_structure_that_makes_no_sense_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    growing.assert_refuses_structure(start(), tmp_path, change)


def test_the_same_reserves_whatever_was_before() -> None:
    """They are drawn from the site's seed and their number."""
    _, one_ = attached(pt.IncreLoRA(target_rank=4), torch.zeros(7, 9), seed=3)
    _, other = attached(pt.IncreLoRA(target_rank=4), torch.zeros(7, 9), seed=3)
    with torch.no_grad():
        other.A[0].mul_(5)
    for delta in (one_, other):
        delta.adopt(False)
    assert torch.equal(one_.A[2], other.A[2]) and not torch.equal(one_.A[2], one_.A[1])


# refusals and warnings
@pytest.mark.parametrize(
    "fields",
    [{"ema_decay": 0.0}, {"ema_decay": 1.0}, {"uncertainty_decay": 1.0}, {"uncertainty_decay": 0.0}, {"top_k": 0},
     {"update_interval": 0}, {"rank_increment": 0}, {"init_rank": 0}, {"warmup_steps": -1}, {"alpha": 0.0},
     {"orthogonality_weight": -0.1}, {"target_rank": 1, "init_rank": 2}, {"score_interval": 0}],
)  # fmt: skip
def test_refused_configurations(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        pt.IncreLoRA(**fields)


def test_a_budget_below_the_start_is_refused() -> None:
    with pytest.raises(AttachError, match="target_total_rank = 5, but 12 sites start at rank 1"):
        pt.attach(tiny.model("bert"), pt.IncreLoRA(target_total_rank=5))
    closed = pt.attach(tiny.model("bert"), pt.IncreLoRA(target_total_rank=12))
    assert not any(s.delta.reserve for s in closed.slots if isinstance(s.delta, Growing))


def test_a_step_without_gradients_and_a_second_call_are_refused() -> None:
    run = start(orthogonality_weight=0.0)
    run.step(2)
    run.events.before_step()
    run.model(**run.batch)
    with pytest.raises(TrainingError, match="increlora: no gradient since the last step"):
        run.events.before_optimizer_step()
    run.forward_backward()
    run.events.before_optimizer_step()
    with pytest.raises(TrainingError, match="once after backward"):
        run.events.before_optimizer_step()


def test_an_optimiser_without_the_parameters_is_refused() -> None:
    model = tiny.model("bert")
    tuned = pt.attach(model, pt.IncreLoRA())
    with pytest.raises(TrainingError, match="in no group of the optimiser"):
        Events(model, SGD(list(tuned.parameters())[:3], lr=0.1))


def test_a_run_too_short_for_the_budget_is_warned_of() -> None:
    run = start(target_rank=4, top_k=2, rank_increment=1, steps=20)  # 18 increments, two a round: 9 rounds, from step 2
    with pytest.warns(UserWarning, match="9 rounds of growth, the last in step 18; this run has 18 steps"):
        run.events.total_steps = 18
        run.events.before_step()
    run.events.total_steps = 19
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.events.before_step()


def test_a_restart_needs_a_schedule_that_can() -> None:
    for total, scheduler in ((0, True), (20, False)):
        run = start()
        run.events.total_steps = total
        run.events.scheduler = run.scheduler if scheduler else None
        with pytest.raises(TrainingError, match="restart_warmup=False"):
            run.events.before_step()


@pytest.mark.parametrize("name,role", [("bert", "embedding"), ("resnet", "conv")])
def test_what_is_no_linear_is_refused(name: str, role: str) -> None:
    with pytest.raises(AttachError, match="increlora"):
        pt.attach(tiny.model(name), pt.IncreLoRA(roles=[role]))


def test_ranks_go_where_the_change_is() -> None:
    """Two linears side by side: one is right already, the other is to change by a rank of 4."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(2, 12, 12, generator=generator) / 12**0.5
    D = torch.randn(12, 4, generator=generator) @ torch.randn(4, 12, generator=generator) / 8
    x = torch.randn(64, 12, generator=generator)
    y = torch.stack([x @ W[0].T, x @ (W[1] + D).T])
    model = Parallel(list(W))
    fields = {"target_total_rank": 6, "rank_increment": 1, "top_k": 1, "warmup_steps": 10, "update_interval": 10}
    method = pt.IncreLoRA(**fields, alpha=16, restart_warmup=False, roles=("q",))
    tuned = pt.attach(model, method, found=parts(model))
    optimizer = AdamW(tuned.parameters(), lr=0.02)
    events = Events(model.train(), optimizer, total_steps=150)
    events.begin()
    for _ in range(150):
        events.before_step()
        loss = (model(x) - y).square().mean() + (events.extra_loss() or 0)
        loss.backward()
        events.before_optimizer_step(loss)
        optimizer.step()
        events.after_optimizer_step()
        optimizer.zero_grad()
    assert list(rank_pattern(tuned).values()) == [1, 5]
