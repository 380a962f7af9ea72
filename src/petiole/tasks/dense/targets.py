"""What can be predicted for every pixel: how many channels, which loss, which metric, and what the loss weighs beside others.

    semseg, human_parts     cross entropy
    saliency, edge          binary cross entropy, balanced: w on pixels that are, 1 - w on pixels that are not
    normals                 L1 between the prediction, brought to length 1, and the label
    depth                   L1

Each is a mean over the pixels that are labelled; 255 marks the others, whatever the target. Channels, weights and w are those of
MTLoRA (arXiv 2403.20320): w = 0.95 for edges, and the share of pixels that are not salient, in the batch, for saliency.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

UNKNOWN = 255  # the label of a pixel that has none


@dataclass(frozen=True)
class Target:
    """One thing to predict.

    Attributes:
        channels: of a prediction, as in the PASCAL data sets.
        loss: predictions (B, channels, H, W) and labels -> a scalar.
        metric: see `metrics.py`.
        weight: of the loss beside those of other targets.
        label_channels: 0 where a label is one class number for each pixel (B, H, W), else of (B, label_channels, H, W).
    """

    name: str
    channels: int
    loss: Callable[[Tensor, Tensor], Tensor]
    metric: str
    weight: float
    label_channels: int


def known(labels: Tensor) -> Tensor:
    """Which pixels are labelled: labels (B, H, W) or (B, C, H, W) -> (B, H, W)."""
    there = labels != UNKNOWN
    return there if there.ndim == 3 else there.all(1)


def mean_over(values: Tensor, where: Tensor) -> Tensor:
    """Values (B, C, H, W), the mean over all channels of the pixels (B, H, W); 0 where there are none."""
    chosen = where[:, None].to(values.dtype)
    return (values * chosen).sum() / (chosen.sum() * values.shape[1]).clamp_min(1)


def cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """Scores (B, classes, H, W), labels (B, H, W)."""
    losses = nn.functional.cross_entropy(scores.float(), labels.long(), ignore_index=UNKNOWN, reduction="none")
    return mean_over(losses[:, None], known(labels))


def balanced(scores: Tensor, labels: Tensor, weight: float | None = None) -> Tensor:
    """Binary cross entropy of logits (B, 1, H, W), labels 0 or 1 (B, 1, H, W).

    Args:
        weight: w, of pixels that are; 1 - w of those that are not. None: the share of those that are not, so that both sides count alike.
    """
    there = known(labels)
    truth = labels.clamp_max(1).float()
    on = mean_over(truth, there)
    w = 1 - on if weight is None else torch.full_like(on, weight)
    each = w * truth + (1 - w) * (1 - truth)
    losses = nn.functional.binary_cross_entropy_with_logits(scores.float(), truth, reduction="none")
    return mean_over(each * losses, there)


def edge_loss(scores: Tensor, labels: Tensor) -> Tensor:
    return balanced(scores, labels, 0.95)


def direction_loss(predictions: Tensor, labels: Tensor) -> Tensor:
    """Predictions of any length (B, 3, H, W), unit vectors (B, 3, H, W)."""
    return l1(unit(predictions.float()), labels)


def unit(vectors: Tensor) -> Tensor:
    """(B, 3, H, W) -> the same, of length 1."""
    return nn.functional.normalize(vectors, dim=1, eps=1e-12)


def l1(predictions: Tensor, labels: Tensor) -> Tensor:
    """Predictions and labels (B, C, H, W)."""
    there = known(labels)
    return mean_over((predictions.float() - labels.float()).abs(), there)


TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target("semseg", 21, cross_entropy, "mean_iou", 1.0, 0),
        Target("human_parts", 7, cross_entropy, "mean_iou", 2.0, 0),
        Target("saliency", 1, balanced, "foreground_iou", 5.0, 1),
        Target("normals", 3, direction_loss, "angular_error", 10.0, 3),
        Target("edge", 1, edge_loss, "best_f1", 50.0, 1),
        Target("depth", 1, l1, "rmse", 1.0, 1),
    )
}
