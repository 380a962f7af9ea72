"""Image features as tokens of a text encoder, as VL-BART and VL-T5 read them (arXiv 2112.06825, 2308.09804).

    v = LN(W_f f + b_f) + LN(W_p [x₁, x₂, y₁, y₂, a] + b_p) + e_image + e_object        a = (x₂ - x₁)(y₂ - y₁)

f (F,) are the features of a region or of a cell of a grid, in the box x₁ to x₂, y₁ to y₂ as shares of the image's width and height. e_image
tells the first image from the second, e_object one region from the next. The latter are no parameters of this module but embeddings of
tokens at the end of the text's vocabulary: whoever calls hands them in.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from petiole.errors import ConfigError

DEVIATION = 0.02  # of matrices at start


class VisualEmbedding(nn.Module):
    """Features (B, I, N, F) of N regions in each of I images -> tokens (B, I N, d): F d + 10 d parameters, and d for each image.

    Args:
        feature_size: F. hidden_size: d.
        num_images: how many images one text may be about.
        seed: of the parameters; the global generator stays where it was.

    Raises:
        ConfigError: a size is below 1.
    """

    def __init__(self, feature_size: int = 2048, hidden_size: int = 768, num_images: int = 2, seed: int = 0) -> None:
        super().__init__()
        if min(feature_size, hidden_size, num_images) < 1:
            raise ConfigError(
                f"visual embedding: feature_size {feature_size}, hidden_size {hidden_size}, num_images {num_images}\nall start at 1"
            )
        self.feature_size, self.num_images = feature_size, num_images
        self.features = nn.Linear(feature_size, hidden_size)
        self.feature_norm = nn.LayerNorm(hidden_size)
        self.position = nn.Linear(5, hidden_size)
        self.position_norm = nn.LayerNorm(hidden_size)
        self.image_order = nn.Embedding(num_images, hidden_size)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for module in (self.features, self.position, self.image_order):
                if not module.weight.is_meta:
                    module.weight.normal_(0, DEVIATION, generator=generator)
            for linear in (self.features, self.position):
                linear.bias.zero_()

    def forward(self, features: Tensor, boxes: Tensor, object_order: Tensor) -> Tensor:
        """Tokens, image after image.

        Args:
            features: (B, I, N, F).
            boxes: (B, I, N, 4) or (N, 4): x₁, x₂, y₁, y₂ in [0, 1].
            object_order: (N, d), one for each region of an image.

        Raises:
            ConfigError: a shape does not fit.
        """
        images, regions = features.shape[1:3] if features.ndim == 4 else (0, 0)
        if not 1 <= images <= self.num_images or features.shape[-1] != self.feature_size:
            raise ConfigError(
                f"image features {tuple(features.shape)}: (rows, 1 to {self.num_images} images, regions, {self.feature_size}) are wanted"
            )
        if boxes.shape[-2:] != (regions, 4):
            raise ConfigError(f"boxes {tuple(boxes.shape)} of {regions} regions: (…, {regions}, 4) are wanted")
        area = (boxes[..., 1] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 2])
        where = torch.cat([boxes, area[..., None]], -1).to(features.dtype)
        tokens = self.feature_norm(self.features(features)) + self.position_norm(self.position(where))
        order = torch.arange(images, device=features.device)
        tokens = tokens + self.image_order(order)[:, None] + object_order.to(tokens.dtype)
        return tokens.flatten(1, 2)
