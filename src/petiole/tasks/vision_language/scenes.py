"""Scenes made on the spot: coloured shapes on a grid, as pictures and in words.

A scene is drawn by its seed alone: which cells hold what, then each shape's place within its cell, size and shade, the ground and the noise.
In words it is the same for every machine, cell by cell from the top left: "red circle top left blue square centre right".
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {"red": (0.9, 0.15, 0.15), "green": (0.1, 0.7, 0.2), "blue": (0.2, 0.3, 0.95), "yellow": (0.95, 0.85, 0.1)}
ROWS, COLUMNS = ("top", "centre", "bottom"), ("left", "middle", "right")
CELLS = len(ROWS)  # on a side


@dataclass(frozen=True)
class Thing:
    """A coloured shape in a cell."""

    colour: str
    shape: str
    row: int
    column: int

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    def __str__(self) -> str:
        return f"{self.name} {ROWS[self.row]} {COLUMNS[self.column]}"


@dataclass(frozen=True)
class Scene:
    """Things in the order of their cells, from the top left."""

    things: tuple[Thing, ...]

    def __str__(self) -> str:
        return " ".join(map(str, self.things))

    def __iter__(self) -> Iterator[Thing]:
        return iter(self.things)

    def count(self, colour: str | None = None, shape: str | None = None) -> int:
        """How many things there are of a colour and a shape; of any where there is None."""
        return sum(colour in (None, t.colour) and shape in (None, t.shape) for t in self.things)

    def only(self, shape: str) -> Thing | None:
        """The one thing of that shape; None if there is none, or several."""
        found = [thing for thing in self.things if thing.shape == shape]
        return found[0] if len(found) == 1 else None


def scene(draw: random.Random, things: tuple[int, int] = (2, 3)) -> Scene:
    """A scene with so many things, from fewest to most."""
    cells = sorted(draw.sample(range(CELLS**2), draw.randint(*things)))
    return Scene(tuple(Thing(draw.choice(tuple(COLOURS)), draw.choice(SHAPES), *divmod(cell, CELLS)) for cell in cells))


def render(of: Scene, size: int = 48, noise: float = 0.03, *, seed: int) -> Tensor:
    """Pixels (3, size, size) around zero."""
    generator = torch.Generator().manual_seed(seed)

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    steps = (torch.arange(size) + 0.5) / size * CELLS  # a cell is 1 wide
    Y, X = torch.meshgrid(steps, steps, indexing="ij")
    canvas = between(0.4, 0.55, 1, 1, 1).expand(3, size, size)
    for thing in of:
        radius = float(between(0.26, 0.36))
        x = X - (thing.column + float(between(0.44, 0.56)))
        y = Y - (thing.row + float(between(0.44, 0.56)))
        inside = (distance(thing.shape, x, y, radius) * size / CELLS + 0.5).clamp(0, 1)
        shade = torch.tensor(COLOURS[thing.colour])[:, None, None] * between(0.8, 1.0, 1, 1, 1)
        canvas = canvas + inside * (shade - canvas)
    return canvas + noise * torch.randn(canvas.shape, generator=generator) - 0.5


def distance(shape: str, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """To the border of a shape around the origin, y downwards; positive inside."""
    if shape == "circle":
        return radius - (x.square() + y.square()).sqrt()
    if shape == "square":
        return 0.85 * radius - torch.maximum(x.abs(), y.abs())
    if shape == "triangle":
        slant = (y - 2 * x.abs() + radius) / 5**0.5
        return torch.minimum(slant, 0.8 * radius - y)
    bars = torch.minimum(x.abs(), y.abs())
    return torch.minimum(0.28 * radius - bars, radius - torch.maximum(x.abs(), y.abs()))
