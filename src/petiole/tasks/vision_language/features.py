"""Features of the cells of a grid over an image, computed once and kept: its pixels and their contrast, or states of a frozen vision model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from petiole.errors import ConfigError
from petiole.tasks.loop import evaluating

Features = Callable[[Tensor], Tensor]  # pixels (n, 3, H, W) -> (n, cells², F), from the top left


def grid(cells: int) -> Tensor:
    """Boxes (cells², 4) of a grid: x₁, x₂, y₁, y₂ in [0, 1], from the top left.

    >>> grid(2)[1].tolist()
    [0.5, 1.0, 0.0, 0.5]
    """
    edges = torch.linspace(0, 1, cells + 1)
    y, x = torch.meshgrid(torch.arange(cells), torch.arange(cells), indexing="ij")
    return torch.stack([edges[x], edges[x + 1], edges[y], edges[y + 1]], -1).flatten(0, 1)


def pixels(cells: int) -> Features:
    """The pixels of each cell and their distance from the image's median colour: F = 4 (H / cells) (W / cells).

    The distance shows a shape whatever its colour is, which no linear layer could tell from the pixels. The grid must divide the sides.
    """

    def compute(images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if height % cells or width % cells:
            raise ConfigError(f"images of {height} by {width} pixels can't be cut into {cells} by {cells} cells")
        sides = (height // cells, width // cells)
        median = images.flatten(2).median(-1).values[..., None, None]
        contrast = (images - median).square().sum(1, keepdim=True).sqrt()
        return nn.functional.unfold(torch.cat([images, contrast], 1), sides, stride=sides).mT

    return compute


def states(backbone: nn.Module, cells: int, batch_size: int = 64) -> Features:
    """The last states of a frozen vision model of Transformers, such as `ViTModel`, pooled to each cell: F is its width."""

    def compute(images: Tensor) -> Tensor:
        found = []
        options = {"interpolate_pos_encoding": True} if hasattr(backbone.config, "patch_size") else {}
        with evaluating(backbone):
            for batch in images.split(batch_size):
                h = backbone(pixel_values=batch, **options).last_hidden_state
                if h.ndim == 3:  # tokens: those in front are no patches
                    side = int((h.shape[1]) ** 0.5)
                    h = h[:, h.shape[1] - side**2 :].mT.unflatten(-1, (side, side))
                found.append(nn.functional.adaptive_avg_pool2d(h.float(), cells).flatten(2).mT)
        return torch.cat(found)

    return compute
