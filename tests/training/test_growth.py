"""Parameters that a method adds or drops on the way: groups, memory of the optimiser, schedule, a plain loop's resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau, SequentialLR

import petiole as pt
import tiny
from petiole.errors import ConfigError, TrainingError
from petiole.training import Events, parameter_groups
from training.toys import Blocks, Growing, Kinds, arguments, bert, rows

Seen = list[dict[str, Any]]


class Watcher:
    """One step after another in a plain loop."""

    def __init__(self, method: Growing, scheduler: Any = None, decay: float = 0.1, seed: int = 0) -> None:
        self.model = bert()
        self.tuned = pt.attach(self.model, method, seed=seed)
        self.optimizer = AdamW(parameter_groups(self.model, learning_rate=1e-2, weight_decay=decay))
        self.scheduler = scheduler(self.optimizer) if scheduler else None
        self.events = Events(self.model, self.optimizer, self.scheduler, total_steps=10)
        self.events.begin()
        self.batch = tiny.batch("bert")

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.events.before_step()
            self.model(**self.batch).loss.backward()
            self.events.before_optimizer_step()
            self.optimizer.step()
            self.events.after_optimizer_step()
            if self.scheduler is not None:
                self.scheduler.step()
            self.optimizer.zero_grad()

    @property
    def blocks(self) -> list[Blocks]:
        return [slot.delta for slot in self.tuned.slots if isinstance(slot.delta, Blocks)]


def linear(optimizer: torch.optim.Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 1 - step / 10)


def test_new_parameters_make_one_group_with_the_runs_options_and_old_ones_keep_their_moments() -> None:
    run = Watcher(Growing(most=2), linear)
    run.step()
    old = run.blocks[0].A[0]
    group = next(g for g in run.optimizer.param_groups if any(p is old for p in g["params"]))
    before = {k: v.clone() for k, v in run.optimizer.state[old].items()}
    seen: Seen = []
    original = run.optimizer.step

    def step(*args: Any, **kwargs: Any) -> Any:  # looks at the moments between the growth and the step
        seen.append({k: v.clone() for k, v in run.optimizer.state[old].items()})
        return original(*args, **kwargs)

    run.optimizer.step = step  # type: ignore[method-assign]
    run.step()
    assert all(torch.equal(before[key], seen[0][key]) for key in before)  # growth left them alone
    *rest, new = run.optimizer.param_groups
    assert [id(p) for p in new["params"]] == [id(p) for b in run.blocks for p in (b.A[1], b.B[1])]
    assert new["weight_decay"] == group["weight_decay"] == 0.1 and new["betas"] == group["betas"]
    assert new["lr"] == pytest.approx(group["lr"]) and new["initial_lr"] == 1e-2
    held = [id(p) for g in run.optimizer.param_groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in run.tuned.parameters()) and len(rest) == 2  # each exactly once
    start = run.blocks[0].B[1].clone()
    run.step()
    assert not torch.equal(start, run.blocks[0].B[1])
    assert all(g["lr"] == pytest.approx(1e-2 * 0.7) for g in run.optimizer.param_groups)


def test_a_group_can_have_a_warm_up_of_its_own() -> None:
    run = Watcher(Growing(most=2, warmup_steps=3), linear)
    run.step(2)  # born in the second step, when the schedule had done one
    rates = []
    for _ in range(8):
        rates.append(run.optimizer.param_groups[-1]["lr"])
        old = run.optimizer.param_groups[0]["lr"]
        assert old == pytest.approx(1e-2 * (1 - run.events.step / 10))
        run.step()
    up, down = [1 / 3, 2 / 3], [1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert rates == pytest.approx([1e-2 * factor for factor in up + down])
    assert run.optimizer.param_groups[-1]["lr"] == 0


def test_a_warm_up_of_its_own_needs_a_schedule_that_can() -> None:
    for kind in (None, ReduceLROnPlateau):
        run = Watcher(Growing(most=2, warmup_steps=3))
        run.events.scheduler = kind(run.optimizer) if kind else None
        run.step()
        with pytest.raises(TrainingError, match="one function for each group"):
            run.step()


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: OneCycleLR(o, max_lr=1e-2, total_steps=20),
        lambda o: SequentialLR(o, [linear(o), linear(o)], milestones=[2]),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    ],
    ids=["one-cycle", "sequential", "cosine"],
)
def test_any_schedule_follows(scheduler: Any) -> None:
    run = Watcher(Growing(most=3), scheduler)
    run.step(6)
    rates = [group["lr"] for group in run.optimizer.param_groups]
    assert len(rates) == 4 and rates == pytest.approx([rates[0]] * 4)


def test_a_plateau_lowers_new_groups_too() -> None:
    run = Watcher(Growing(most=2))
    run.scheduler = run.events.scheduler = ReduceLROnPlateau(run.optimizer, patience=0, factor=0.5)
    for _ in range(4):
        run.scheduler.step = lambda: None  # type: ignore[method-assign]
        run.step()
    del run.scheduler.step
    for value in (1.0, 2.0):
        run.scheduler.step(value)
    assert [group["lr"] for group in run.optimizer.param_groups] == pytest.approx([5e-3] * 3)


def test_dropped_parameters_leave_optimiser_and_memory() -> None:
    run = Watcher(Growing(shrinks=True), linear)
    run.step(5)
    gone = [run.blocks[0].A[0], run.blocks[0].B[0]]
    run.step()
    held = {id(p) for g in run.optimizer.param_groups for p in g["params"]}
    assert not held & {id(p) for p in gone} and not any(p in run.optimizer.state for p in gone)
    assert len(run.blocks[0].A) == 2 and len(run.optimizer.param_groups) == 4  # the schedule counts groups
    run.step(2)


def test_what_an_event_adds_must_be_announced_and_stand_in_a_delta() -> None:
    run = Watcher(Growing(forgets=True))
    run.step()
    with pytest.raises(
        TrainingError, match=r"(?s)no group of the optimiser: default/0\.encoder\.0\.q\.output:A\.1.*add_parameters"
    ):
        run.step()
    with pytest.raises(TrainingError, match="stands in no delta"):
        run.events.add_parameters([nn.Parameter(torch.zeros(2))])
    with pytest.raises(TrainingError, match="trains already"):
        run.events.add_parameters([run.blocks[0].A[0]])


def test_frozen_parameters_can_be_freed() -> None:
    """Reserve components are trained ahead with one factor frozen; it is freed when they are chosen."""
    model = bert()
    tuned = pt.attach(model, pt.LoRA(rank=2))
    frozen = tuned.slots[0].delta.A.requires_grad_(False)
    optimizer = SGD(parameter_groups(model, learning_rate=0.1))
    events = Events(model, optimizer)
    assert not any(p is frozen for g in optimizer.param_groups for p in g["params"])
    events.add_parameters([frozen])
    assert frozen.requires_grad and optimizer.param_groups[-1]["params"] == [frozen]


def test_a_plain_loop_resumes_to_the_same_bits(tmp_path: Path) -> None:
    whole = Watcher(Growing(warmup_steps=2), linear)
    whole.step(9)
    first = Watcher(Growing(warmup_steps=2), linear)
    first.step(5)
    first.tuned.save(tmp_path / "here.petiole.safetensors", folded=False)
    kept = [first.events.state_dict(), first.optimizer.state_dict(), first.scheduler.state_dict()]
    torch.save(kept, tmp_path / "kept.pt")

    again = Watcher(Growing(warmup_steps=2), linear, seed=0)
    again.tuned.restore(tmp_path / "here.petiole.safetensors")
    for part, state in zip(
        (again.events, again.optimizer, again.scheduler), torch.load(tmp_path / "kept.pt"), strict=True
    ):
        part.load_state_dict(state)
    again.step(4)
    for name, tensor in whole.tuned.named_tensors(folded=False).items():
        assert torch.equal(tensor, again.tuned.named_tensors(folded=False)[name]), name
    assert [g["lr"] for g in whole.optimizer.param_groups] == [g["lr"] for g in again.optimizer.param_groups]


def test_going_back_to_a_smaller_structure(tmp_path: Path) -> None:
    """The best checkpoint may be older than the last growth."""
    run = Watcher(Growing())
    run.tuned.save(tmp_path / "small.petiole.safetensors", folded=False)
    run.step(2)
    run.tuned.restore(tmp_path / "small.petiole.safetensors")
    assert [len(b.A) for b in run.blocks] == [1] * 4


# ------------------------------------------------------------------------------------------------------- what deltas ask for


def kinds_of(optimizer: torch.optim.Optimizer, tuned: Any, rate: float) -> dict[str, tuple[float, float]]:
    """name -> (weight decay, learning rate as a multiple)."""
    names = {id(p): n for n, p in tuned.named_parameters()}
    return {
        names[id(p)]: (group["weight_decay"], group["lr"] / rate)
        for group in optimizer.param_groups
        for p in group["params"]
    }


WANTED = {
    "0.encoder.0.ffn.output:b": (0.0, 8.0),  # a vector; its delta wants to be fast
    "0.encoder.1.ffn.output:M": (0.0, 1.0),  # excepted
    "0.encoder.1.ffn.output:N": (0.1, 1.0),
    "-1.head.output:module.weight": (0.1, 1.0),
    "-1.head.output:module.bias": (0.0, 1.0),
}


def test_weight_decay_and_rates_as_deltas_say() -> None:
    model = bert()
    tuned = pt.attach(model, Kinds())
    optimizer = AdamW(parameter_groups(model, learning_rate=2e-3, weight_decay=0.1))
    assert kinds_of(optimizer, tuned, 2e-3) == WANTED


def test_the_trainer_makes_the_same_groups_and_keeps_the_ratio_along_the_schedule(tmp_path: Path) -> None:
    model = bert()
    tuned = pt.attach(model, Kinds())
    settings = arguments(tmp_path, weight_decay=0.1, max_steps=2, learning_rate=2e-3, save_strategy="no")
    run = pt.Trainer(model=model, args=settings, train_dataset=rows())
    assert kinds_of(run.create_optimizer(), tuned, 2e-3) == WANTED
    rates = []
    run.petiole.on_step_end = lambda *a, **k: rates.append([g["lr"] for g in run.optimizer.param_groups])  # type: ignore[attr-defined]
    run.train()
    assert rates[0] == pytest.approx([1e-3, 1e-3, 8e-3]) and rates[1] == [0, 0, 0]


def test_nothing_to_train_is_an_error() -> None:
    model = bert()
    tuned = pt.attach(model, pt.LoRA(rank=2), train_head=False)
    for parameter in list(tuned.parameters()):
        parameter.requires_grad_(False)
    for call in (lambda: Events(model), lambda: parameter_groups(model, learning_rate=1.0)):
        with pytest.raises(TrainingError, match="nothing trains"):
            call()
    with pytest.raises(TrainingError, match="no trainable parameter"):
        tuned.check(tiny.batch("bert"))
    with pytest.raises(ConfigError):
        pt.attach(model, [], name="none")
