"""Budgets as people write them: `params=0.5%,memory=8GB,flops=40T`.

>>> Budget.parse("params=0.5%,memory=8GB").text()
'params=0.5%,memory=8GB'
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from petiole.compare.table import named_axes
from petiole.errors import ConfigError

if TYPE_CHECKING:
    from petiole.planning.table import Row


@dataclass(frozen=True)
class Axis:
    """A cost that a budget can limit and a front can be drawn over; less is better.

    Attributes:
        name: as the user asks for it. title: in words. unit: of its numbers: "B" for bytes, "FLOP", or "" for a count.
        of: reads it off a row.
    """

    name: str
    title: str
    unit: str
    of: Callable[[Row], int | None]


AXES = {
    axis.name: axis
    for axis in (
        Axis("params", "trainable parameters", "", lambda row: row.trainable_parameters),
        Axis("checkpoint", "size of the file (bytes)", "B", lambda row: row.checkpoint_bytes),
        Axis("memory", "memory of a training step (bytes)", "B", lambda row: row.memory_bytes),
        Axis("flops", "FLOPs of a training step", "FLOP", lambda row: row.step_flops),
        Axis("inference", "FLOPs of a forward pass", "FLOP", lambda row: row.forward_flops),
        Axis("saved", "kept for the backward pass (bytes)", "B", lambda row: row.saved_bytes),
        Axis("optimizer", "gradients and optimiser state (bytes)", "B", lambda row: row.training_bytes),
    )
}

_NUMBER = re.compile(r"(?P<number>\d+(?:[._]\d+)*(?:\.\d+)?(?:e[+-]?\d+)?)\s*(?P<unit>[a-zA-Z%]*)", re.IGNORECASE)
_TENS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "p": 10**15, "e": 10**18}
_TWOS = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_WORDS = {"": "a number such as 300000, 300K, 1.5M or 0.5% (of the backbone)", "B": "bytes such as 512MB, 8GB or 8GiB",
          "FLOP": "FLOPs such as 500G, 40T or 1.5P"}  # fmt: skip


@dataclass(frozen=True)
class Limit:
    """The most that a row may cost on one axis.

    Attributes:
        axis: which. most: the number, or its share of the backbone's parameters if `share`. text: as it was written.
    """

    axis: Axis
    most: float
    text: str
    share: bool = False

    def number(self, backbone: int) -> float:
        """The most, in the axis's own unit.

        Args:
            backbone: parameters of the bare backbone.
        """
        return self.most * backbone if self.share else self.most


@dataclass(frozen=True)
class Budget:
    """Limits that hold together; without one, everything fits."""

    limits: tuple[Limit, ...] = ()

    @classmethod
    def parse(cls, text: str | None) -> Budget:
        """Read `name=amount` parts with commas between.

        Raises:
            ConfigError: an unknown name, one twice, an amount that can't be read or has the unit of another kind.
        """
        limits: dict[str, Limit] = {}
        for part in (text or "").split(","):
            if not part.strip():
                continue
            name, equals, amount = (piece.strip() for piece in part.partition("="))
            if name not in AXES:
                close = difflib.get_close_matches(name, AXES, n=1)
                raise ConfigError(
                    f"budget: {name!r} is nothing that can be limited{f'; did you mean {close[0]!r}?' if close else ''}\n"
                    f"Allowed: {', '.join(AXES)}, as in params=0.5%,memory=8GB."
                )
            if name in limits:
                raise ConfigError(f"budget: {name} is limited twice")
            limits[name] = limit(AXES[name], amount if equals else "")
        return cls(tuple(limits.values()))

    def text(self) -> str:
        return ",".join(f"{one.axis.name}={one.text}" for one in self.limits)

    def over(self, row: Row) -> dict[str, float]:
        """By how much a row exceeds each limit that it breaks: cost / limit."""
        found = {}
        for one in self.limits:
            cost, most = one.axis.of(row), one.number(row.backbone_parameters)
            if cost is not None and cost > most:
                found[one.axis.name] = cost / most if most else float("inf")
        return found

    def strain(self, row: Row) -> float:
        """The largest share of a limit that a row uses up; above 1 it doesn't fit."""
        shares = [0.0]
        for one in self.limits:
            cost, most = one.axis.of(row), one.number(row.backbone_parameters)
            if cost:
                shares.append(cost / most if most else float("inf"))
        return max(shares)


def limit(axis: Axis, text: str) -> Limit:
    """One amount -> a limit.

    Raises:
        ConfigError: see `Budget.parse`.
    """
    found = _NUMBER.fullmatch(text)
    refusal = ConfigError(f"budget: {axis.name}={text}: give {_WORDS[axis.unit]}")
    if found is None or found["number"].count(".") > 1:
        raise refusal
    number, unit = float(found["number"].replace("_", "")), found["unit"]
    if unit == "%":
        if axis.name != "params":
            raise ConfigError(
                f"budget: {axis.name}={text}: only params can be a share (of the backbone's parameters); give {_WORDS[axis.unit]}"
            )
        return Limit(axis, number / 100, text, share=True)
    bare = unit.lower()
    if axis.unit == "B":
        bare = bare.removesuffix("b")
        factor = (_TENS | _TWOS).get(bare)
    elif axis.unit == "FLOP":
        factor = _TENS.get(re.sub("flops?$", "", bare))
    else:
        factor = {**_TENS, "b": 10**9}.get(bare)
    if factor is None:
        raise refusal
    return Limit(axis, number * factor, text)


def axes(names: str | tuple[str, ...] | list[str]) -> list[Axis]:
    """Axes by name.

    Raises:
        ConfigError: one of them is unknown, or none is named.
    """
    asked = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
    return named_axes((name for name in asked if name), AXES)
