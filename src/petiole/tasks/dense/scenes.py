"""Scenes made on the spot: balls, boxes and upright cylinders before a tilted wall, seen straight on, with exact labels.

Rays run along -z through the pixels' centres, so where a ray meets a shape is a formula:

    ball       z = z₀ + √(r² - x² - y²)                  n = (x, y, z - z₀) / r
    cylinder   z = z₀ + √(r² - x²), |y| ≤ h              n = (x, 0, z - z₀) / r
    box        the nearer of two upright faces of a box turned about its axis; n is the face's
    wall       z = a x + b y + c                         n ∝ (-a, -b, 1)

with x, y from the shape's middle, in units of half an image, x to the right, y up, z towards the viewer. What is nearest is seen. Labels:

    semseg        0 wall, 1 ball, 2 box, 3 cylinder
    human_parts   0 wall, 1 to 6: left, middle, right of a shape, upper then lower half
    saliency      the shape that comes nearest to the viewer
    edge          pixels beside one that shows something else
    normals       unit vectors
    depth         distance from the plane z = 2
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from petiole.attach import site_seed
from petiole.errors import ConfigError
from petiole.tasks.dense.targets import TARGETS, UNKNOWN

SHAPES = ("ball", "box", "cylinder")
PARTS = 6


class Scenes(Dataset[dict[str, Any]]):
    """Rows {"pixel_values": (3, size, size), "labels": {task: map}}; a row is drawn from the seed and its number alone.

    Args:
        count: how many scenes.
        size: height and width in pixels.
        tasks: of `TARGETS`; all that scenes have labels for if None.
        shapes: fewest and most shapes in a scene.
        noise: standard deviation of what is added to every pixel.
        unlabelled: share of pixels without a label, in one block for each scene.
        seed: another one gives other scenes.
    """

    def __init__(
        self,
        count: int,
        *,
        size: int = 64,
        tasks: Sequence[str] | None = None,
        shapes: tuple[int, int] = (2, 4),
        noise: float = 0.05,
        unlabelled: float = 0.0,
        seed: int = 0,
    ) -> None:
        if count < 1 or size < 8 or not 1 <= shapes[0] <= shapes[1] or noise < 0 or not 0 <= unlabelled < 1:
            raise ConfigError(
                f"scenes: count {count}, size {size}, shapes {shapes}, noise {noise}, unlabelled {unlabelled}\n"
                "count starts at 1, size at 8, shapes at (1, 1) in rising order; noise is not negative; unlabelled is in [0, 1)"
            )
        self.tasks = tuple(TARGETS) if tasks is None else tuple(tasks)
        unknown = [task for task in self.tasks if task not in TARGETS]
        if unknown or not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ConfigError(f"tasks = {list(self.tasks)}: different ones of {', '.join(TARGETS)}")
        self.count, self.size, self.shapes, self.noise = count, size, shapes, noise
        self.unlabelled, self.seed = unlabelled, seed
        self._kept: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        if index not in self._kept:
            generator = torch.Generator().manual_seed(site_seed(self.seed, f"scene {index}"))
            self._kept[index] = self._drawn(generator)
        return self._kept[index]

    def _drawn(self, generator: torch.Generator) -> dict[str, Any]:
        low, high = self.shapes
        count = low + int(torch.randint(high - low + 1, (), generator=generator))
        pixels, labels = render(self.size, count, generator)
        pixels = pixels + self.noise * torch.randn(pixels.shape, generator=generator)
        if self.unlabelled:
            side = round(self.size * self.unlabelled**0.5)
            top, left = (int(torch.randint(self.size - side + 1, (), generator=generator)) for _ in range(2))
            for label in labels.values():
                label[..., top : top + side, left : left + side] = UNKNOWN
        return {"pixel_values": pixels, "labels": {task: labels[task] for task in self.tasks}}


def render(size: int, count: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Pixels (3, size, size) around zero, and every label of a scene with so many shapes."""

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    steps = (torch.arange(size) + 0.5) / size * 2 - 1
    Y, X = torch.meshgrid(-steps, steps, indexing="ij")
    a, b = between(-0.25, 0.25, 2).tolist()
    z = a * X + b * Y - 0.9
    normal = torch.tensor([-a, -b, 1.0])
    normals = (normal / normal.norm())[:, None, None].expand(3, size, size).clone()
    owner = torch.zeros(size, size, dtype=torch.long)  # 0 the wall, then the shapes
    kinds, parts, colours = (
        torch.zeros(size, size, dtype=torch.long),
        torch.zeros(size, size, dtype=torch.long),
        [between(0.2, 0.9, 3)],
    )
    for number in range(1, count + 1):
        kind = int(torch.randint(len(SHAPES), (), generator=generator))
        x0, y0, z0, radius, tall, turn = (
            between(low, high).item()
            for low, high in ((-0.7, 0.7), (-0.7, 0.7), (-0.4, 0.4), (0.2, 0.4), (0.2, 0.45), (0.3, 1.2))
        )
        x, y = X - x0, Y - y0
        if SHAPES[kind] == "box":
            inside, height, n = box(x, y, radius, tall, turn)
        elif SHAPES[kind] == "cylinder":
            inside, height, n = curved(x, torch.zeros_like(y), radius)
            inside = inside & (y.abs() <= tall)
        else:
            inside, height, n = curved(x, y, radius)
            tall = radius
        seen = inside & (z0 + height > z)
        z, owner, kinds = (
            torch.where(seen, z0 + height, z),
            owner.masked_fill(seen, number),
            kinds.masked_fill(seen, kind + 1),
        )
        normals = torch.where(seen, n, normals)
        third = ((x / radius + 1) * 1.5).floor().long().clamp(0, 2)
        parts = torch.where(seen, 1 + third + 3 * (y < 0).long(), parts)
        colours.append(between(0.2, 0.9, 3))
    light = torch.cat([between(-0.6, 0.6, 2), torch.ones(1)])
    shade = 0.25 + 0.75 * (normals * (light / light.norm())[:, None, None]).sum(0).clamp_min(0)
    pixels = torch.stack(colours)[owner].permute(2, 0, 1) * shade - 0.5
    nearest = int(torch.where(owner > 0, z, torch.full_like(z, -9.0)).flatten().argmax())
    labels = {
        "semseg": kinds,
        "human_parts": parts,
        "saliency": (owner == owner.flatten()[nearest])[None].float(),
        "edge": borders(owner)[None].float(),
        "normals": normals,
        "depth": (2 - z)[None],
    }
    return pixels, labels


def curved(x: Tensor, y: Tensor, radius: float) -> tuple[Tensor, Tensor, Tensor]:
    """A ball, or a cylinder where y is zero: where it is hit, how high, and the normal there."""
    left = radius**2 - x**2 - y**2
    height = left.clamp_min(0).sqrt()
    return left > 0, height, torch.stack([x, y, height]) / radius


def box(x: Tensor, y: Tensor, radius: float, tall: float, turn: float) -> tuple[Tensor, Tensor, Tensor]:
    """A box on a square base of half the diagonal `radius`, turned about its upright axis."""
    half = radius / 2**0.5
    faces = torch.tensor([turn, turn - torch.pi / 2])  # where the two that look at the viewer turn to
    nx, nz = faces.sin()[:, None, None], faces.cos()[:, None, None]
    height, face = ((half - nx * x) / nz).min(
        0
    )  # of the planes nx x + nz z = half, each of which ends where the other begins
    n = torch.stack([faces.sin()[face], torch.zeros_like(x), faces.cos()[face]])
    reach = half * float(faces.sin().abs().sum())
    return (x.abs() < reach) & (y.abs() <= tall), height, n


def borders(owner: Tensor) -> Tensor:
    """Pixels (H, W) beside one, to any of four sides, that shows another thing."""
    edge = torch.zeros_like(owner, dtype=torch.bool)
    across, down = owner[:, 1:] != owner[:, :-1], owner[1:] != owner[:-1]
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    edge[1:] |= down
    edge[:-1] |= down
    return edge
