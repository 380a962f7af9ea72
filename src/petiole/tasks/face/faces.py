"""Faces made on the spot: an identity is a drawing's proportions and colours; pose, light, mouth, resolution and noise vary.

A face is an ellipse with hair, ears, eyes with iris and pupil, brows, nose and mouth, in units of half an image, from the seed and the number of
its identity alone. An image of it turns (features slide sideways and narrow), tilts, moves, smiles and is lit from some side. At last it is
brought to a share `quality` of its height and width by averaging, gets noise, and is brought back: the share is the exact label of how good
the image is, and what is lost is lost before the noise, as in a small picture of someone far away.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from petiole.attach import site_seed
from petiole.errors import ConfigError

Draw = Callable[[float, float], float]


class Faces(Dataset[dict[str, Any]]):
    """Rows {"pixel_values": (3, size, size) around zero, "labels": identity, "quality": share in (0, 1]}, the same on every machine.

    Args:
        identities: how many. images: of each of them.
        size: height and width in pixels.
        quality: smallest and largest share of the size that is left, drawn evenly on a logarithmic scale.
        variation: how far pose, light and mouth go, from 0.
        noise: standard deviation of what is added, of pixels in [0, 1].
        with_quality: whether rows tell it.
        first: number of the first image of each identity, so that another set shows the same people on other images.
        seed: of identities and images; another one gives other people.
    """

    def __init__(
        self,
        identities: int,
        images: int,
        *,
        size: int = 32,
        quality: tuple[float, float] = (1.0, 1.0),
        variation: float = 1.0,
        noise: float = 0.02,
        with_quality: bool = True,
        first: int = 0,
        seed: int = 0,
    ) -> None:
        if (
            identities < 1
            or images < 1
            or size < 8
            or not 0 < quality[0] <= quality[1] <= 1
            or variation < 0
            or noise < 0
        ):
            raise ConfigError(
                f"faces: {identities} identities, {images} images, size {size}, quality {quality}, variation {variation}, noise {noise}\n"
                "identities and images start at 1, size at 8; quality rises in (0, 1]; variation and noise are not negative"
            )
        self.identities, self.images, self.size = identities, images, size
        self.quality, self.variation, self.noise, self.seed = quality, variation, noise, seed
        self.with_quality, self.first = with_quality, first
        self._kept: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return self.identities * self.images

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if index not in self._kept:
            self._kept[index] = self._drawn(*divmod(index, self.images))
        return self._kept[index]

    def _drawn(self, identity: int, image: int) -> dict[str, Any]:
        person = Person(drawing(site_seed(self.seed, f"person {identity}"))[0])
        draw, generator = drawing(site_seed(self.seed, f"image {identity} {self.first + image}"))
        pixels = person.render(self.size, draw, self.variation)
        low, high = self.quality
        share = math.exp(draw(math.log(low), math.log(high)))
        small = reduced(pixels, share)
        small = small + self.noise * torch.randn(small.shape, generator=generator)
        whole = nn.functional.interpolate(small[None], (self.size, self.size), mode="bilinear")[0].clamp(0, 1)
        row = {"pixel_values": (whole - 0.5) / 0.5, "labels": identity}
        return {**row, "quality": torch.tensor(small.shape[-1] / self.size)} if self.with_quality else row


def drawing(seed: int) -> tuple[Draw, torch.Generator]:
    """A function that draws evenly from a range, and the generator that it draws from."""
    generator = torch.Generator().manual_seed(seed)
    return lambda low, high: low + (high - low) * float(torch.rand((), generator=generator)), generator


def reduced(pixels: Tensor, share: float) -> Tensor:
    """(3, size, size) -> as many whole pixels as the share leaves, at least 3, each the mean of what it covers."""
    side = max(3, round(pixels.shape[-1] * share))
    return nn.functional.adaptive_avg_pool2d(pixels, side)


class Person:
    """Proportions and colours, drawn once; where an image has x to the right and y down, both in [-1, 1]."""

    def __init__(self, draw: Draw) -> None:
        self.width, self.height = draw(0.42, 0.62), draw(0.62, 0.8)
        tone = draw(0.35, 0.9)
        self.skin = colour(tone, tone * draw(0.72, 0.88), tone * draw(0.55, 0.75))
        self.hair = colour(draw(0.05, 0.7), draw(0.05, 0.5), draw(0.05, 0.35))
        self.hairline, self.sides = draw(-0.5, -0.25), draw(0.0, 0.14)
        self.eyes, self.eye_height, self.eye_size = draw(0.17, 0.28), draw(-0.16, 0.02), draw(0.06, 0.11)
        self.iris = colour(draw(0.1, 0.5), draw(0.15, 0.6), draw(0.1, 0.7))
        self.brow_gap, self.brow_tilt, self.brow_width = draw(0.1, 0.18), draw(-0.35, 0.35), draw(0.018, 0.045)
        self.nose_length, self.nose_width = draw(0.14, 0.28), draw(0.04, 0.1)
        self.mouth_height, self.mouth_width, self.lips = draw(0.34, 0.48), draw(0.13, 0.27), draw(0.025, 0.06)
        self.lip_colour = colour(draw(0.45, 0.8), draw(0.15, 0.4), draw(0.15, 0.4))

    def render(self, size: int, draw: Draw, variation: float) -> Tensor:
        """One image (3, size, size) in [0, 1], before anything is lost."""
        turn, tilt, smile = (variation * draw(-1, 1) for _ in range(3))
        across, down, zoom = (variation * draw(-1, 1) for _ in range(3))
        light, direction, ground = 1 + 0.25 * variation * draw(-1, 1), variation * draw(-0.35, 0.35), draw(0.1, 0.9)
        steps = ((torch.arange(size) + 0.5) / size * 2 - 1) / (1 + 0.08 * zoom)
        Y, X = torch.meshgrid(steps - 0.08 * down, steps - 0.08 * across, indexing="ij")
        angle = 0.2 * tilt
        x, y = X * math.cos(angle) + Y * math.sin(angle), Y * math.cos(angle) - X * math.sin(angle)
        soft = 1.2 / size  # half the width of an edge

        def within(distance: Tensor) -> Tensor:
            """1 inside, where the distance to a border is negative, 0 outside."""
            return (0.5 - distance / (2 * soft)).clamp(0, 1)

        def ellipse(cx: float, cy: float, rx: float, ry: float) -> Tensor:
            r = (((x - cx) / rx).square() + ((y - cy) / ry).square()).sqrt()
            return within((r - 1) * min(rx, ry))

        canvas = torch.stack([torch.full_like(x, ground * factor) for factor in (1.0, 0.95, 0.9)])

        def paint(shape: Tensor, paint_colour: Tensor) -> None:
            canvas.copy_(canvas + shape * (paint_colour[:, None, None] - canvas))

        shift, narrow = 0.14 * turn, 1 - 0.12 * abs(turn)  # of what lies in front of the axis of the head
        paint(ellipse(0, -0.12, self.width + self.sides + 0.05, self.height), self.hair)
        for side in (-1, 1):
            paint(ellipse(side * self.width - 0.5 * shift, 0.02, 0.07, 0.13), self.skin * 0.85)
        face = ellipse(0, 0, self.width, self.height)
        paint(face, self.skin)
        paint(face * within(y - self.hairline - 0.25 * x.square()), self.hair)
        for side in (-1, 1):
            cx, cy = side * self.eyes * narrow + shift, self.eye_height
            paint(ellipse(cx, cy, 1.5 * self.eye_size * narrow, self.eye_size), colour(0.95, 0.95, 0.93))
            paint(ellipse(cx + 0.2 * shift, cy, 0.75 * self.eye_size, 0.85 * self.eye_size), self.iris)
            paint(ellipse(cx + 0.2 * shift, cy, 0.35 * self.eye_size, 0.4 * self.eye_size), colour(0.03, 0.03, 0.03))
            line = y - (cy - self.brow_gap) - side * self.brow_tilt * (x - cx)
            brow = torch.maximum(line.abs() - self.brow_width, (x - cx).abs() - 1.6 * self.eye_size * narrow)
            paint(within(brow), self.hair * 0.7)
        tip = self.eye_height + self.nose_length + 0.08
        bridge = (x - 1.3 * shift).abs() - self.nose_width * ((y - self.eye_height) / (tip - self.eye_height)).clamp(
            0.2, 1
        )
        paint(
            within(torch.maximum(bridge, (y - (self.eye_height + tip) / 2).abs() - (tip - self.eye_height) / 2)),
            self.skin * 0.8,
        )
        bow = y - self.mouth_height + 0.6 * (0.3 + smile) * (x - shift).square()
        lips = torch.maximum(bow.abs() - self.lips, (x - shift).abs() - self.mouth_width * narrow * (1 + 0.1 * smile))
        paint(within(lips), self.lip_colour)
        return (canvas * (light * (1 + direction * x))).clamp(0, 1)


def colour(red: float, green: float, blue: float) -> Tensor:
    return torch.tensor([red, green, blue])
