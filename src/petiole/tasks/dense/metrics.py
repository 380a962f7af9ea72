"""Metrics of maps: sums over pixels first, which batches and processes add up, then one figure from them.

    mean_iou         mean over classes of |P ∩ L| / |P ∪ L|; a class neither predicted nor labelled anywhere doesn't count
    foreground_iou   the same of the pixels that are, at probability 1/2
    best_f1          F1 of the pixels that are, at the best of 19 thresholds for the whole set; pixel for pixel, without a tolerance
    angular_error    mean angle between prediction and label, in degrees
    rmse             √ of the mean square error

Δm (Maninis et al. 2019, arXiv 1904.08918) is the mean gain of a multi-task model over single-task models, in %:

    Δm = 100/T · Σ_t (-1)^{l_t} (M_t - S_t) / S_t      l_t = 1 where lower is better
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from petiole.errors import ConfigError
from petiole.tasks.dense.targets import TARGETS, known, unit

THRESHOLDS = torch.linspace(0.05, 0.95, 19)


@dataclass(frozen=True)
class DenseMetric:
    """One figure of merit.

    Attributes:
        name: the key in every table.
        title: what a reader sees, with its unit.
        higher_is_better: the direction of sorts and arrows.
        sums: predictions and labels of a batch -> what adds up over batches, in float64.
        value: all of it -> the figure.
    """

    name: str
    title: str
    higher_is_better: bool
    sums: Callable[[Tensor, Tensor], Tensor]
    value: Callable[[Tensor], float]

    def __call__(self, predictions: Tensor, labels: Tensor) -> float:
        return self.value(self.sums(predictions, labels))


def confusion(scores: Tensor, labels: Tensor) -> Tensor:
    """Scores (B, classes, H, W), labels (B, H, W) -> how many pixels of each class are taken for which (label, prediction)."""
    classes, there = scores.shape[1], known(labels)
    pairs = labels[there].long() * classes + scores.argmax(1)[there]
    return torch.bincount(pairs.cpu(), minlength=classes**2).view(classes, classes).double()


def mean_iou(table: Tensor) -> float:
    hits = table.diagonal()
    union = table.sum(0) + table.sum(1) - hits
    present = union > 0
    return float((hits[present] / union[present]).mean()) if present.any() else math.nan


def at_thresholds(scores: Tensor, labels: Tensor, thresholds: Tensor = THRESHOLDS) -> Tensor:
    """Logits and labels 0 or 1 (B, 1, H, W) -> hits, predicted and labelled pixels (3, thresholds)."""
    there = known(labels)
    p, truth = scores[:, 0][there].float().sigmoid().cpu(), (labels[:, 0][there] > 0.5).cpu()
    said = p[None] > thresholds[:, None]
    found = torch.stack([(said & truth).sum(1), said.sum(1), truth.sum().expand(len(thresholds))])
    return found.double()


def foreground(scores: Tensor, labels: Tensor) -> Tensor:
    return at_thresholds(scores, labels, torch.tensor([0.5]))


def foreground_iou(sums: Tensor) -> float:
    hits, said, truth = sums[:, 0].tolist()
    return hits / (said + truth - hits) if said + truth else math.nan


def best_f1(sums: Tensor) -> float:
    hits, said, truth = sums
    return float((2 * hits / (said + truth).clamp_min(1)).max())


def angles(predictions: Tensor, labels: Tensor) -> Tensor:
    """Sum of angles in degrees, and number of pixels (2,)."""
    there = known(labels)
    a, b = unit(predictions.double()), unit(labels.double())
    # Of the half angle: exact also where the two nearly agree, unlike the arc cosine.
    angle = 2 * torch.atan2((a - b).norm(dim=1), (a + b).norm(dim=1))
    return torch.stack([torch.rad2deg(angle)[there].sum(), there.sum().double()]).cpu()


def squares(predictions: Tensor, labels: Tensor) -> Tensor:
    """Sum of squared errors, and number of pixels (2,)."""
    there = known(labels)
    return torch.stack(
        [(predictions.double() - labels.double())[:, 0][there].square().sum(), there.sum().double()]
    ).cpu()


def mean(sums: Tensor) -> float:
    return float(sums[0] / sums[1]) if sums[1] else math.nan


METRICS: Mapping[str, DenseMetric] = {
    metric.name: metric
    for metric in (
        DenseMetric("mean_iou", "mean IoU", True, confusion, mean_iou),
        DenseMetric("foreground_iou", "IoU", True, foreground, foreground_iou),
        DenseMetric("best_f1", "F1, best threshold", True, at_thresholds, best_f1),
        DenseMetric("angular_error", "mean angular error, °", False, angles, mean),
        DenseMetric("rmse", "RMSE", False, squares, lambda sums: math.sqrt(mean(sums))),
    )
}


def delta_m(found: Mapping[str, float], single: Mapping[str, float]) -> float:
    """Δm in %, of the figures of a multi-task model and of single-task models, by task.

    >>> round(delta_m({"semseg": 0.66, "normals": 19.0}, {"semseg": 0.60, "normals": 20.0}), 4)
    7.5

    Raises:
        ConfigError: the two are not of the same tasks, or a single-task figure is zero.
    """
    if not found or found.keys() != single.keys() or not found.keys() <= TARGETS.keys():
        raise ConfigError(
            f"Δm compares the same tasks: got {', '.join(found) or 'none'} and {', '.join(single) or 'none'}\n"
            f"of {', '.join(TARGETS)}"
        )
    zero = [task for task, value in single.items() if value == 0]
    if zero:
        raise ConfigError(f"Δm divides by the single-task figure, which is 0 for {zero[0]}")
    gains = []
    for task, value in found.items():
        sign = 1 if METRICS[TARGETS[task].metric].higher_is_better else -1
        gains.append(sign * (value - single[task]) / single[task])
    return 100 * sum(gains) / len(gains)
