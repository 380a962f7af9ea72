"""A vision backbone that gives embeddings, and one direction for each identity while it trains.

The projection is that of the official Swin: all tokens side by side, batch norm, dropout, linear to 512, batch norm (arXiv 2412.07771). It
belongs to the encoder that comes pre-trained; methods know its linear by the role "pooler". The identities are the model's task head.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from petiole.adaptation import Adaptation
from petiole.attach import attach
from petiole.errors import AttachError, ConfigError
from petiole.tasks.face.margin import Kind, Margin
from petiole.tasks.loop import evaluating

Features = Literal["tokens", "mean"]


class FaceOutput(dict[str, Any]):
    """What a model gives: a dictionary without the entries that there are none for, whose entries are attributes too.

    Attributes:
        loss: margin softmax, where there are labels.
        embeddings: (B, size), of any length.
        logits: scaled cosines with each training identity, without the margin; while these are there.
    """

    @property
    def loss(self) -> Tensor | None:
        return self.get("loss")

    @property
    def embeddings(self) -> Tensor:
        return self["embeddings"]

    @property
    def logits(self) -> Tensor | None:
        return self.get("logits")


class Projection(nn.Module):
    """Features (B, width) -> embeddings (B, size)"""

    def __init__(self, width: int, size: int, dropout: float) -> None:
        super().__init__()
        self.norm_in = nn.BatchNorm1d(width)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(width, size)
        self.norm_out = nn.BatchNorm1d(size)

    def forward(self, features: Tensor) -> Tensor:
        return self.norm_out(self.linear(self.dropout(self.norm_in(features))))


class FaceEncoder(nn.Module):
    """Images (B, 3, H, W) -> embeddings (B, size).

    Args:
        backbone: a base model of Transformers, such as `SwinModel` or `ViTModel`.
        size: of an embedding.
        features: all tokens (or pixels of a map) side by side, for images of one size; or their mean.
        image_size: height and width; the backbone's own if None.
        dropout: before the linear.
    """

    def __init__(
        self,
        backbone: nn.Module,
        size: int = 512,
        *,
        features: Features = "tokens",
        image_size: int | None = None,
        dropout: float = 0.25,
    ) -> None:
        super().__init__()
        config: Any = backbone.config
        side = image_size or getattr(config, "image_size", None)
        if side is None or features not in ("tokens", "mean") or size < 1 or not 0 <= dropout < 1:
            raise ConfigError(
                f"face encoder: size {size}, features {features!r}, image_size {side}, dropout {dropout}\n"
                "size from 1; tokens or mean; image_size= where the backbone's configuration has none; dropout in [0, 1)"
            )
        self.features, self.backbone = features, backbone
        height, width = (side, side) if isinstance(side, int) else side
        like = next(backbone.parameters())
        with evaluating(backbone):
            found = self.flattened(torch.zeros(1, 3, height, width, dtype=like.dtype, device=like.device))
        self.pooler = Projection(found.shape[1], size, dropout)

    def flattened(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) -> features (B, width)"""
        state = self.backbone(pixel_values=pixel_values).last_hidden_state  # (B, tokens, d), or a map (B, d, h, w)
        if self.features == "tokens":
            return state.flatten(1)
        return state.mean(1) if state.ndim == 3 else state.mean((2, 3))

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.pooler(self.flattened(pixel_values))


class FaceModel(nn.Module):
    """An encoder and a margin softmax over the training identities, which are the task head: any method trains their directions along.

    Args:
        backbone: see `FaceEncoder`, which takes `size` and `options` too.
        num_classes: training identities; 0 for a model that only embeds.
        margin, margin_value, margin_scale: see `Margin`.
        seed: of everything new; the global generator stays where it was.
    """

    base_model_prefix = "encoder"
    main_input_name = "pixel_values"

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int = 0,
        *,
        size: int = 512,
        margin: Kind = "cosface",
        margin_value: float | None = None,
        margin_scale: float = 64.0,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__()
        self.config: Any = backbone.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = FaceEncoder(backbone, size, **options)
            self.classes = Margin(num_classes, size, margin, margin_value, margin_scale) if num_classes else None

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, quality: Tensor | None = None) -> FaceOutput:
        """Embeddings; with labels, the loss.

        Args:
            pixel_values: (B, 3, H, W).
            labels: numbers of training identities (B,).
            quality: of each image (B,), for methods that look for it among the model's inputs.

        Raises:
            ConfigError: labels, but no training identities.
        """
        embeddings = self.encoder(pixel_values)
        if self.classes is None:
            if labels is not None:
                raise ConfigError(
                    "this model has no training identities: leave labels out, or make it with num_classes="
                )
            return FaceOutput(embeddings=embeddings)
        found = FaceOutput(embeddings=embeddings, logits=self.classes(embeddings))
        if labels is None:
            return found
        return FaceOutput(loss=nn.functional.cross_entropy(self.classes(embeddings, labels), labels), **found)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Of the backbone."""
        self.encoder.backbone.gradient_checkpointing_enable(**options)  # type: ignore[operator]


def without_classes(tuned: Adaptation) -> Adaptation:
    """Drop the training identities after training, IN PLACE: what is saved then is the change of the encoder alone.

    Raises:
        AttachError: it is on no `FaceModel`, or merged.
    """
    model, host = tuned.model, tuned.host
    if not isinstance(model, FaceModel):
        raise AttachError(f"{type(model).__name__} has no training identities that could be dropped")
    if tuned.merged or len(host.adaptations) > 1:
        raise AttachError(f"{tuned.name!r} is merged, or not alone on the model: drop the identities before that")
    values = {name: value.clone() for name, value in tuned.named_tensors(folded=False).items()}
    found = replace(host.anatomy, outside=tuple(site for site in host.anatomy.outside if site.role != "head"))
    tuned.detach()
    model.classes = None
    kept = attach(model, tuned.methods, name=tuned.name, seed=tuned.seed, train_head=False, found=found)
    with torch.no_grad():
        for name, tensor in kept.named_tensors(folded=False).items():
            tensor.copy_(values[name])
    return kept
