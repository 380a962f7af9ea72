"""Linears with an output for each task beside the shared one: what sits where MTLoRA's task streams run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from petiole.anatomy import Site
from petiole.errors import AttachError, ConfigError
from petiole.method import Base
from petiole.methods.lowrank.factors import Factors, kaiming_uniform
from petiole.multitask.branching import Fan, Tasks, shared_rows

if TYPE_CHECKING:
    from petiole.multitask.mtlora import MTLoRA


class LearntScale(Factors):
    """ΔW = c · B A, where c trains too."""

    def __init__(self, site: Site, rank: int, scale: float, dropout: float) -> None:
        super().__init__(site, rank, scale, dropout)
        self.start = scale
        del self.scale
        self.scale = nn.Parameter(torch.empty(()))  # type: ignore[assignment]

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        super().initialise(generator, base)
        self.scale.fill_(self.start)  # type: ignore[attr-defined]

    def factored(self) -> tuple[Tensor, Tensor, float, Tensor | None] | None:
        parts = super().factored()
        return None if parts is None else (self.A, self.scale * self.B, 1.0, None)


def shared_change(method: MTLoRA, site: Site, rank: int) -> Factors:
    kind = LearntScale if method.learn_scale else Factors
    return kind(site, rank, method.scale_shared, method.dropout)


class TaskLinear(Fan):
    """A linear with an output for each task beside the shared one.

    Args:
        method: mode, scales, dropout. site: gives the sizes.
        rank: r, not used in "addition". ranks: r_t by task.
        opens: what comes in is the shared stream alone, so x_t = x.
    """

    def __init__(
        self, method: MTLoRA, site: Site, tasks: Tasks, rank: int, ranks: Mapping[str, int], opens: bool
    ) -> None:
        super().__init__(tasks, opens)
        self.mode, self.ranks = method.mode, dict(ranks)
        self.dropout = nn.Dropout(method.dropout)
        size_in, size_out = site.in_features, site.out_features
        shared = method.mode != "addition"
        self.A = nn.Parameter(torch.empty(rank, size_in)) if shared else None  # A_s (r, in)
        self.B = nn.Parameter(torch.empty(size_out, rank)) if shared else None  # B_s (out, r)
        self.task_A = nn.ParameterDict({task: nn.Parameter(torch.empty(r, size_in)) for task, r in ranks.items() if r})
        self.task_B = nn.ParameterDict({task: nn.Parameter(torch.empty(size_out, r)) for task, r in ranks.items() if r})
        self.norm = None if shared else nn.LayerNorm(size_out)
        self.scales = {"shared": method.scale_shared} | {
            f"task_{task}": method.task_scale(task) for task in self.task_A
        }
        if not shared:
            del self.scales["shared"]
        self.learnt = nn.ParameterDict(
            {name: nn.Parameter(torch.empty(())) for name in self.scales if method.learn_scale}
        )

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        """A Kaiming-uniform with a = √5, B = 0."""
        for A, B in ((self.A, self.B), *((self.task_A[task], self.task_B[task]) for task in self.task_A)):
            if A is not None and B is not None:
                kaiming_uniform(A, generator)
                B.zero_()
        for name, parameter in self.learnt.items():
            parameter.fill_(self.scales[name])

    def scale(self, name: str) -> Any:
        """c, "shared" or "task_…"."""
        return self.learnt[name] if name in self.learnt else self.scales[name]

    def leave(self, y: Tensor, h: Tensor) -> Tensor:
        """What the weight makes of the shared stream, and what came in -> all streams, one after the other."""
        running = self.tasks.running(self)
        x = shared_rows(h, 1 if self.opens else 1 + len(running))
        if len(x) != len(y):
            raise AttachError(
                f"{type(self).__name__} got {len(h)} rows for {len(y)}: another change of the batch is in its way"
            )
        own = None if self.opens else h[len(x) :].view(len(running), *x.shape)
        shared, streams = self.outputs(y, x, own, running)
        return torch.cat([shared, streams.flatten(0, 1)])

    def forward(
        self, h: Tensor, x: Tensor, x_tasks: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The layer as the paper has it: h = W x + b and x (..., in), and each task's own input -> y, {task: y_t}.

        Raises:
            ConfigError: a task has no input, or an input is of no task of this layer.
        """
        if x_tasks is not None and set(x_tasks) != set(self.ranks):
            odd = min(set(x_tasks) ^ set(self.ranks))
            raise ConfigError(f"x_tasks: this layer has the tasks {', '.join(self.ranks) or 'none'}; see {odd!r}")
        own = None if not x_tasks else torch.stack([x_tasks[task] for task in self.ranks])
        shared, streams = self.outputs(h, x, own, tuple(self.ranks))
        return shared, dict(zip(self.ranks, streams, strict=True))

    def outputs(self, h: Tensor, x: Tensor, own: Tensor | None, running: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """h (..., out), x (..., in), x_t (T, ..., in) or None for x -> y (..., out), y_t (T, ..., out)"""
        dropped = self.dropout(x)
        shared = h
        if self.A is not None and self.B is not None:
            low = nn.functional.linear(dropped, self.A.to(x.dtype)) * self.scale("shared")
            shared = h + nn.functional.linear(low, self.B.to(low.dtype)).to(h.dtype)
        start = shared if self.mode == "matrixv2" else h
        streams = self.changed(start, dropped if own is None else own, own is not None, running)
        if self.norm is not None:
            shared = h + self.norm(streams.sum(0).to(self.norm.weight.dtype)).to(h.dtype)
        return shared, streams

    def changed(self, start: Tensor, x: Tensor, apart: bool, running: tuple[str, ...]) -> Tensor:
        """start + c_t B_t A_t x_t of all tasks at once: start (..., out), x (..., in), or (T, ..., in) if apart -> (T, ..., out)"""
        if not running:
            return start.new_zeros(0, *start.shape)
        A, B = self.stacked(running)
        r = A.shape[1]
        if apart:
            low = torch.bmm(x.flatten(1, -2), A.to(x.dtype).mT)  # (T, n, r)
        else:
            low = (
                nn.functional.linear(x.flatten(0, -2), A.flatten(0, 1).to(x.dtype))
                .unflatten(-1, (-1, r))
                .transpose(0, 1)
            )
        scales = [self.scale(f"task_{task}") if self.ranks[task] else 0.0 for task in running]
        if self.learnt or len(set(scales)) > 1:
            c = torch.stack([torch.as_tensor(c, dtype=low.dtype, device=low.device) for c in scales])
            low = low * c[:, None, None]
        else:
            low = low * scales[0]
        B = B.to(low.dtype).mT
        flat = start.flatten(0, -2)[None]
        found = torch.baddbmm(flat, low, B) if flat.dtype == low.dtype else flat + torch.bmm(low, B).to(flat.dtype)
        return found.unflatten(1, start.shape[:-1])

    def stacked(self, running: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """A_t (T, r, in) and B_t (T, out, r); smaller ranks are filled up with zeros."""
        most = max(1, *(self.ranks[task] for task in running))
        like = next(iter(self.task_A.values())), next(iter(self.task_B.values()))

        def filled(of: nn.ParameterDict, task: str, index: int) -> Tensor:
            short = most - self.ranks[task]
            own = of[task] if self.ranks[task] else like[index].new_zeros(like[index].shape).narrow(index, 0, 0)
            return nn.functional.pad(own, (0, 0, 0, short) if index == 0 else (0, short))

        A, B = ([filled(of, task, index) for task in running] for index, of in enumerate((self.task_A, self.task_B)))
        return torch.stack(A), torch.stack(B)
