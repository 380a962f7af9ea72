"""Depth without depth: what a model of many like blocks costs, from copies that have a few of them.

A list of blocks is cut to its ends and one *unit*: the blocks that repeat in between, one by one (most models) or in a period (every
sixth one sees the whole text, every eighth one attends). With F(u) a figure of the model with u units,

    F(u) = F(0) + u · (F(1) - F(0))        FLOPs, bytes of weights, of optimiser state, of tensors kept for backward: sums over blocks

and with several lists (encoder and decoder) one difference for each. A peak is no sum, but the bytes alive while one block runs are linear
in how many blocks lie before and behind it; so the peak is the largest of a few such lines, each taken at its ends. Nothing is fitted:
where blocks are alike this is exact, and they are compared, module by module, with the method attached. Where they differ, or a method
does something else at another depth, the whole model runs.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from petiole.anatomy import Anatomy
from petiole.planning.passes import SUMS, Figures, Phase

_INDEX = (
    "layer_idx",
    "layer_id",
    "layer_index",
    "layer_number",
    "layer_num",
    "block_idx",
    "block_index",
    "idx",
    "index",
    "depth",
)
_NUMBER = re.compile(r"\d+")
_EDGE, _PERIOD = 3, 8  # the longest end and the longest period that are looked for
_WORTH = 0.75  # of the blocks: more than that are not worth several runs


class Unlike(Exception):
    """The short copies don't tell what the whole model costs."""


@dataclass(frozen=True)
class Pattern:
    """How a list of blocks repeats.

    Attributes:
        path: of the list. first, last: blocks at the ends that are kept. period: blocks of a unit. units: how many there are.
    """

    path: str
    first: int
    last: int
    period: int
    units: int

    @property
    def blocks(self) -> int:
        return self.first + self.last + self.period * self.units

    def kept(self, units: int) -> list[int]:
        """Indices of the blocks that a copy with so many units has."""
        middle = self.first + self.period * units
        return [*range(middle), *range(self.blocks - self.last, self.blocks)]

    def where(self, number: int, index: int, units: int) -> tuple[Any, ...]:
        """Where block `index` of a copy stands, as the phases of a step say it."""
        if index < self.first:
            return (number, "first", index)
        after = index - self.first - self.period * units
        return (number, "last", after) if after >= 0 else (number, "unit", (index - self.first) % self.period)


# --------------------------------------------------------------------------------------------------------------- what is alike


def signature(module: nn.Module) -> tuple[Any, ...]:
    """All that decides what a module costs and how it runs: two modules with the same one cost the same."""
    found = []
    for path, part in module.named_modules():
        own = tuple(
            (name, tuple(p.shape), str(p.dtype), p.requires_grad)
            for name, p in part._parameters.items()
            if p is not None
        )
        buffers = tuple((name, tuple(b.shape), str(b.dtype)) for name, b in part._buffers.items() if b is not None)
        hooks = (len(part._forward_hooks), len(part._forward_pre_hooks))
        name = _NUMBER.sub("#", path) if "petiole" in path else path  # the name of a delta says its depth
        found.append((name, type(part), own, buffers, hooks, settings(part)))
    return tuple(found)


def settings(module: nn.Module) -> tuple[Any, ...]:
    """Plain values among a module's attributes. A number that counts blocks is left out; of a fraction it matters if it is 0."""
    kept = []
    for name, value in sorted(vars(module).items()):
        if name in _INDEX or name.startswith("_"):
            continue
        if isinstance(value, float):
            kept.append((name, value == 0))
        elif value is None or all(
            isinstance(item, (bool, int, str)) for item in (value if isinstance(value, tuple) else [value])
        ):
            kept.append((name, value))
    return tuple(kept)


def blocks_of(model: nn.Module, path: str) -> list[nn.Module]:
    return list(model.get_submodule(path).children())


def lists_of(found: Anatomy) -> list[str]:
    """Paths of all lists of blocks."""
    return [path for stack in found.stacks for path in stack.containers]


def patterns(model: nn.Module, found: Anatomy) -> dict[int, Pattern]:
    """How each list of blocks repeats, by its number among `lists_of`; those that are not worth cutting are left out."""
    result = {}
    for number, path in enumerate(lists_of(found)):
        names = list(model.get_submodule(path)._modules)
        if names == [str(i) for i in range(len(names))]:
            best = pattern(path, [signature(block) for block in blocks_of(model, path)])
            if best is not None:
                result[number] = best
    return result


def pattern(path: str, signatures: Sequence[Any]) -> Pattern | None:
    """The shortest way to write blocks as two ends and a repeated unit; None if that saves too little."""
    count, ids = len(signatures), dict[Any, int]()
    kinds = [ids.setdefault(one, len(ids)) for one in signatures]
    best: Pattern | None = None
    for first in range(1, _EDGE + 1):
        for last in range(1, _EDGE + 1):
            for period in range(1, _PERIOD + 1):
                units, rest = divmod(count - first - last, period)
                cost = 2 * (first + last) + period
                if units < 2 or rest or cost > _WORTH * count:
                    continue
                middle = kinds[first : count - last]
                better = best is None or cost < 2 * (best.first + best.last) + best.period
                if better and all(kind == middle[i % period] for i, kind in enumerate(middle)):
                    best = Pattern(path, first, last, period, units)
    return best


# ------------------------------------------------------------------------------------------------------------------ short copies


def shortened(model: nn.Module, cut: Mapping[int, Pattern], units: Mapping[int, int]) -> nn.Module:
    """A copy with so many units in each list; what is cut out is not copied."""
    whole = {}
    try:
        for number, one in cut.items():
            container = model.get_submodule(one.path)
            whole[one.path] = container._modules
            blocks = list(container._modules.values())
            container._modules = {str(i): blocks[index] for i, index in enumerate(one.kept(units[number]))}
        return copy.deepcopy(model)
    finally:
        for path, modules in whole.items():
            model.get_submodule(path)._modules = modules


def places(
    model: nn.Module, found: Anatomy, cut: Mapping[int, Pattern], units: Mapping[int, int]
) -> dict[str, tuple[Any, ...]]:
    """Module path of each block -> where it is."""
    result = {}
    for number, path in enumerate(lists_of(found)):
        for index, name in enumerate(model.get_submodule(path)._modules):
            place = cut[number].where(number, index, units[number]) if number in cut else (number, "first", index)
            result[f"{path}.{name}" if path else name] = place
    return result


Signatures = Mapping[int, Sequence[Any]]


def signatures(model: nn.Module, cut: Mapping[int, Pattern]) -> Signatures:
    """Those of all blocks, list by list, with what a method put on them.

    Raises:
        Unlike: two units differ.
    """
    found = {number: [signature(block) for block in blocks_of(model, one.path)] for number, one in cut.items()}
    for number, one in cut.items():
        middle = found[number][one.first : one.blocks - one.last]
        if any(kind != middle[i % one.period] for i, kind in enumerate(middle)):
            raise Unlike
    return found


def same_blocks(whole: Signatures, short: nn.Module, cut: Mapping[int, Pattern], units: Mapping[int, int]) -> bool:
    """Whether the blocks of a copy are those of the whole model, with what a method put on each."""
    for number, one in cut.items():
        mine = [signature(block) for block in blocks_of(short, one.path)]
        if [whole[number][i] for i in one.kept(units[number])] != mine:
            return False
    return True


# ------------------------------------------------------------------------------------------------------------------ the whole model


def extended(base: Figures, more: Mapping[int, Figures], cut: Mapping[int, Pattern]) -> Figures:
    """Figures of the whole model.

    Args:
        base: of the copy without any unit. more: of copies with one unit, in the list of that number.

    Raises:
        Unlike: the copies went through other phases.
    """
    units = {number: one.units for number, one in cut.items()}
    sums = {
        name: getattr(base, name) + sum(n * (getattr(more[k], name) - getattr(base, name)) for k, n in units.items())
        for name in SUMS
    }
    if any({p for p in figures.phases if not unit(p, number)} != set(base.phases) for number, figures in more.items()):
        raise Unlike

    def slope(phase: Phase, number: int) -> int:
        """Bytes that one more unit in that list adds to a phase."""
        return more[number].phases[phase] - base.phases[phase]

    phases = {p: most + sum(n * slope(p, k) for k, n in units.items()) for p, most in base.phases.items()}
    for number, figures in more.items():
        for phase, most in figures.phases.items():
            if not unit(phase, number):
                continue
            near = (phase[0], (number, "first", cut[number].first - 1))
            far = (phase[0], (number, "last", 0))
            if near not in base.phases or far not in base.phases:
                raise Unlike
            # One more unit behind this one (towards the output) adds `behind`, one more before it adds `before`.
            behind, before = slope(near, number), slope(far, number)
            others = sum(n * slope(near, k) for k, n in units.items() if k != number)
            phases[phase] = most + others + (units[number] - 1) * max(behind, before)
    return Figures(**sums, phases=phases)


def unit(phase: Phase, number: int) -> bool:
    return phase[1][:2] == (number, "unit")
