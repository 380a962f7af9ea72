"""Task streams that branch off the shared stream in a block, and run through the backbone's own modules beside it.

Inside such a block the batch is (1 + T) B: the shared rows, then those of each task in turn.

    Fork      around the block        B -> (1 + T) B, all alike; after it the task streams are published, and the shared one goes on
    Narrow    before attention        only the shared rows attend
    Fan       around a linear         only the shared rows are multiplied with the weight; a method's subclass says what each task
                                      adds to that product. The output projection of attention opens the batch again
    Between   around patch merging    the published streams of a stage go through it beside the shared one

Everything else in the block (residuals, norms, activation, stochastic depth, window partition) is the backbone's own code and draws its
random numbers for each stream by itself. Which tasks run is `pt.given(model, task=…)`: one by name, several in a list, all without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from petiole.anatomy import Anatomy, Block, Site, Stack
from petiole.errors import AttachError, ConfigError
from petiole.method import AroundDelta, Composition, Delta, HiddenDelta, Place

FFN = ("up", "gate", "down")


class Tasks:
    """Who runs.

    Args:
        names: of the tasks, in order.
        together: whether all have to run even if only some are asked for.
    """

    def __init__(self, names: tuple[str, ...], together: bool = False) -> None:
        self.names, self.together = names, together

    def asked(self, delta: Delta) -> tuple[tuple[str, ...], bool]:
        """Tasks that this forward pass is asked for, and whether it is one by name.

        Raises:
            ConfigError: there is no such task.
        """
        given = delta.host.given("task") if delta.host is not None else None
        if given is None:
            return self.names, False
        wanted = (given,) if isinstance(given, str) else tuple(given)
        if unknown := [name for name in wanted if name not in self.names]:
            raise ConfigError(f"task = {unknown[0]!r} is none of {', '.join(self.names)}")
        return tuple(name for name in self.names if name in wanted), isinstance(given, str)

    def running(self, delta: Delta) -> tuple[str, ...]:
        return self.names if self.together else self.asked(delta)[0]


class Fork(AroundDelta):
    """Lets the task streams begin at the block's input, and publishes what they are at its output.

    Args:
        depth: of the block; under it the streams are published.
        last: whether what follows is the model's head. It then gets the stream of a task that is asked for by name.
    """

    def __init__(self, tasks: Tasks, depth: int, last: bool) -> None:
        super().__init__()
        self.tasks, self.depth, self.last = tasks, depth, last

    def enter(self, h: Tensor) -> Tensor:
        forks = [s for a in self.host.adaptations.values() for s in a.slots if isinstance(s.delta, Fork) and s.acts()]
        if any(s.delta is not self and s.delta.depth == self.depth for s in forks):
            raise AttachError(
                f"block {self.depth}: task streams of two methods can't run at once; activate one of them"
            )
        return repeated(h, 1 + len(self.tasks.running(self)))

    def leave(self, y: Tensor, h: Tensor) -> Tensor:
        running = self.tasks.running(self)
        shared, *own = y.split(len(h))
        self.host.streams.publish(self.depth, dict(zip(running, own, strict=True)))
        asked, single = self.tasks.asked(self)
        return own[running.index(asked[0])] if single and self.last else shared


class Narrow(HiddenDelta):
    """(1 + T) B -> B: the shared rows."""

    composition: Composition = "replace"

    def __init__(self, tasks: Tasks) -> None:
        super().__init__()
        self.tasks = tasks

    def forward(self, h: Tensor) -> Tensor:
        return shared_rows(h, 1 + len(self.tasks.running(self)))


class Fan(AroundDelta):
    """A linear of which every stream gets the shared stream's product.

    Args:
        opens: what comes in is the shared stream alone.
    """

    def __init__(self, tasks: Tasks, opens: bool) -> None:
        super().__init__()
        self.tasks, self.opens = tasks, opens

    def enter(self, h: Tensor) -> Tensor:
        return h if self.opens else shared_rows(h, 1 + len(self.tasks.running(self)))

    def leave(self, y: Tensor, h: Tensor) -> Tensor:
        return repeated(y, 1 + len(self.tasks.running(self)))


class Between(AroundDelta):
    """Patch merging of all streams in one call.

    Args:
        depth: of the block before it.
    """

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.depth = depth

    def enter(self, h: Tensor) -> Tensor:
        own = self.host.streams.at(self.depth)
        return torch.cat([h, *own.values()]) if own else h

    def leave(self, y: Tensor, h: Tensor) -> Tensor:
        shared, *own = y.split(len(h))
        self.host.streams.publish(self.depth, dict(zip(self.host.streams.at(self.depth), own, strict=True)))
        return shared


def repeated(h: Tensor, times: int) -> Tensor:
    """h (B, ...) -> (times · B, ...)"""
    return h.expand(times, *h.shape).reshape(-1, *h.shape[1:])


def shared_rows(h: Tensor, streams: int) -> Tensor:
    """h (streams · n, ...) -> (n, ...), the first."""
    return h[: len(h) // streams]


# ------------------------------------------------------------------------------------------------------------------ where they sit


def stages(stack: Stack) -> list[list[Block]]:
    """The blocks of a stack by stage; a flat stack is one stage."""
    numbers = sorted({block.stage for block in stack.blocks})
    return [[block for block in stack.blocks if block.stage == number] for number in numbers]


def branches(
    slug: str, anatomy: Anatomy, stack: Stack, depths: list[int], tasks: Tasks, fan: Callable[[Site, bool], Fan]
) -> Iterator[Place]:
    """Everything that task streams need in the named blocks and after each stage.

    Args:
        fan: what sits at a linear, of its site and whether it opens.

    Raises:
        AttachError: a block of another build: experts, attention to another model's states, linears that are fused or never called.
    """
    for depth in depths:
        block = stack.blocks[depth]
        if any(site.role == "cross_attention" for site in block.sites):
            raise AttachError(
                f"{slug}: block {depth} of {stack.name!r} also attends to another stack, which has no task streams\n"
                "name another stack, such as stack='encoder'"
            )
        of_role = {role: [s for s in block.sites if s.role == role] for role in ("block", "attention", "o", *FFN)}
        for role, found in of_role.items():
            usual = 0 <= len(found) <= 1 if role == "gate" else len(found) == 1
            if not usual:
                raise AttachError(
                    f"{slug}: block {depth} of {stack.name!r} is not one attention and one ffn after it ({len(found)} {role!r})\n"
                    "task streams can't branch there; name other blocks or another stack"
                )
            if any(site.repeats > 1 for site in found):
                raise AttachError(f"{slug}: {found[0].key} runs several times, so its task streams would be lost")
        if beside := [s for s in block.sites if s.role == "linear" and not s.within]:
            raise AttachError(
                f"{slug}: {beside[0].key} is in neither attention nor ffn, as where a block is told a time or a class\n"
                "task streams have none of their own to be told; name other blocks or another stack"
            )
        yield Place(of_role["block"][0], Fork(tasks, depth, depth == len(stack.blocks) - 1))
        yield Place(of_role["attention"][0].at("input"), Narrow(tasks))
        for role in ("o", *FFN):
            for site in of_role[role]:
                if site.kind != "linear" or site.rows or not site.called:
                    what = "a part of a fused linear" if site.rows else "no linear that is called"
                    raise AttachError(f"{slug}: {site.key} is {what}, so task streams can't go through it apart")
                yield Place(site, fan(site, role == "o"))
    for before, after in pairwise(stages(stack)):
        reduction = merging(anatomy, stack, before[-1], after[0])
        if reduction is not None and before[-1].depth in depths:
            path = reduction.path.rpartition(".")[0]
            whole = replace(
                reduction, role="patch_merging", number=before[-1].stage, path=path, exit=path, kind="module"
            )
            yield Place(replace(whole, parameter="", bias=""), Between(before[-1].depth))


def merging(anatomy: Anatomy, stack: Stack, before: Block, after: Block) -> Site | None:
    """The linear of the patch merging between two stages: from four neighbours, side by side, to the next stage's width."""
    sizes = (4 * before.hidden_size, after.hidden_size)
    found = [s for s in anatomy.outside if s.role == "linear" and (s.in_features, s.out_features) == sizes]
    return next((s for s in found if s.path.startswith(tuple(f"{path}." for path in stack.containers))), None)
