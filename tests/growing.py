"""What the tests of methods whose ranks grow share: a plain loop, and the three ways to lose a run that must lose nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

import petiole as pt
import tiny
from petiole.errors import FileError
from petiole.files import parse, save_adaptation
from petiole.methods.lowrank.growth import Growing, grown
from petiole.ranks import rank_pattern
from petiole.training import Events, parameter_groups
from training import children
from training.toys import arguments, bert, rows


class Run:
    """A plain loop on a small model.

    Args:
        method: what grows. seed: of its parameters. steps: of the schedule. family: of the model. decay: of AdamW.
    """

    def __init__(
        self, method: pt.Method, seed: int = 0, steps: int = 20, family: str = "bert", decay: float = 0.1
    ) -> None:
        self.model, self.batch, self.method = tiny.model(family), tiny.batch(family), method
        self.tuned = pt.attach(self.model, method, seed=seed)
        self.optimizer = AdamW(parameter_groups(self.model, learning_rate=1e-2, weight_decay=decay))
        self.scheduler = LambdaLR(self.optimizer, lambda step: 1 - step / steps)
        self.events = Events(self.model, self.optimizer, self.scheduler, total_steps=steps)
        self.events.begin()
        self.model.train()

    def forward_backward(self) -> None:
        self.events.before_step()
        self.model(**self.batch).loss.backward()

    def finish(self) -> None:
        self.optimizer.step()
        self.events.after_optimizer_step()
        self.scheduler.step()
        self.optimizer.zero_grad()

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.forward_backward()
            self.events.before_optimizer_step()
            self.finish()

    @property
    def deltas(self) -> list[Any]:
        return [slot.delta for slot in self.tuned.slots if isinstance(slot.delta, Growing)]

    @property
    def total(self) -> int:
        return grown(self.deltas)

    def held(self) -> list[int]:
        return sorted(id(p) for group in self.optimizer.param_groups for p in group["params"])


def assert_one_group_for_each(run: Run) -> None:
    assert run.held() == sorted(id(p) for p in run.tuned.parameters())


def assert_growth_keeps(run: Run) -> None:
    """What happens before the optimiser's step leaves what was there, and the optimiser's memory of it, bit for bit."""
    old = {n: p.detach().clone() for n, p in run.tuned.named_parameters()}
    moments = {p: {k: v.clone() for k, v in run.optimizer.state[p].items()} for p in run.optimizer.state}
    run.events.before_optimizer_step()
    now = dict(run.tuned.named_parameters())
    assert all(torch.equal(now[n], value) for n, value in old.items())
    for parameter, state in moments.items():
        assert all(torch.equal(run.optimizer.state[parameter][k], v) for k, v in state.items())


def assert_resumes(make: Callable[[int], Run], folder: Path, steps: int = 9) -> Run:
    """Cut anywhere, saved and restored over another start, it ends with the same bits.

    Args:
        make: a run from its seed.
    """
    whole = make(0)
    whole.step(steps)
    for cut in (2, 3, 6):
        first = make(0)
        first.step(cut)
        first.tuned.save(folder / "here.petiole.safetensors", folded=False)
        kept = [first.events.state_dict(), first.optimizer.state_dict(), first.scheduler.state_dict()]
        again = make(7)
        again.tuned.restore(folder / "here.petiole.safetensors")
        for part, state in zip((again.events, again.optimizer, again.scheduler), kept, strict=True):
            part.load_state_dict(state)
        again.step(steps - cut)
        assert [d.sizes for d in again.deltas] == [d.sizes for d in whole.deltas]
        wanted = whole.tuned.named_tensors(folded=False)
        for name, tensor in again.tuned.named_tensors(folded=False).items():
            assert torch.equal(tensor, wanted[name]), (cut, name)
        assert [g["lr"] for g in whole.optimizer.param_groups] == [g["lr"] for g in again.optimizer.param_groups]
    return whole


def trained(
    method: pt.Method, folder: Path, resume: bool = False, kind: Any = pt.Trainer, **extra: Any
) -> tuple[bytes, dict[str, int]]:
    """Ten steps in a trainer with a checkpoint after each: the file it ends with, and the ranks."""
    model = bert(hidden_dropout_prob=0.1)
    tuned = pt.attach(model, method)
    settings: dict[str, Any] = {"max_steps": 10, "save_steps": 1, "save_total_limit": 2, "weight_decay": 0.1}
    run = kind(model=model, args=arguments(folder, **settings), train_dataset=rows(), **extra)
    run.train(resume_from_checkpoint=resume)
    return tuned.save(folder / "final.petiole.safetensors", folded=False).read_bytes(), rank_pattern(tuned)


def assert_survives_kills(method: pt.Method, folder: Path, steps: tuple[int, ...]) -> dict[str, int]:
    """Killed in any of these steps and resumed, it ends with the same bytes. Returns the final ranks."""
    whole, ranks = trained(method, folder / "whole")
    for n in steps:  # the step that is not made any more

        def cut(n: int = n) -> None:
            children.Countdown(n).watch(AdamW, "step")
            trained(method, folder / str(n))

        assert children.run(cut) == children.KILLED

        def again(n: int = n) -> None:
            assert trained(method, folder / str(n), True) == (whole, ranks)

        assert children.run(again) == 0, n
    return ranks


def assert_refuses_structure(run: Run, folder: Path, change: dict[str, Any]) -> None:
    """A file whose structure was changed to something that makes no sense is not loaded."""
    tensors, header = parse(run.tuned.save(folder / "a.safetensors").read_bytes())
    header = {key: value for key, value in header.items() if key not in ("digest", "format")}
    next(iter(header["structure"].values())).update(change)
    save_adaptation(folder / "b.safetensors", tensors, header)
    with pytest.raises(FileError):
        pt.load(tiny.model("bert"), folder / "b.safetensors")
