"""Losses of the two stages of retrieval, as in arXiv 2208.09847: each a softmax over one positive and its negatives.

    bi-encoder       s(q, p) = q · p of two vectors;   -log exp(s⁺ / t) / Σ exp(s / t) over positive, hard and in-batch negatives
    cross-encoder    s(q, p) of a head on the pair;    the same over the positive and the negatives listed with it

Products of wide vectors reach hundreds, so scores are computed in float32 at least.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from petiole.attach import adaptations
from petiole.errors import AttachError, ConfigError
from petiole.method import wide


class BiEncoderLoss(nn.Module):
    """Queries (B, d), passages (B, d), hard negatives (B, n, d) -> the mean loss, a scalar

    Args:
        temperature: t, above 0. in_batch: the passages and negatives of other queries are negatives, too.
    """

    def __init__(self, temperature: float = 1.0, in_batch: bool = True) -> None:
        super().__init__()
        if not temperature > 0:
            raise ConfigError(f"BiEncoderLoss.temperature = {temperature}: above 0")
        self.temperature, self.in_batch = temperature, in_batch

    def forward(
        self, queries: Tensor, passages: Tensor, negatives: Tensor | None = None, ignored: Tensor | None = None
    ) -> Tensor:
        """ignored: (B, B + B n), in-batch passages and negatives that don't count, such as others that are relevant, too."""
        if queries.shape != passages.shape or queries.ndim != 2:
            raise ConfigError(
                f"queries {tuple(queries.shape)} and passages {tuple(passages.shape)}: one passage for each query, both (B, d)"
            )
        with torch.autocast(queries.device.type, enabled=False):
            q, p = wide(queries), wide(passages)
            hard = wide(negatives) if negatives is not None else p.new_zeros(len(p), 0, p.shape[1])
            if hard.ndim != 3 or (hard.shape[0], hard.shape[2]) != q.shape:
                raise ConfigError(f"negatives {tuple(hard.shape)}: (B, n, d), with queries {tuple(q.shape)}")
            if ignored is not None and not (
                self.in_batch and ignored.shape == (len(q), len(p) + hard.shape[:2].numel())
            ):
                raise ConfigError(f"ignored {tuple(ignored.shape)}: (B, B + B n), with in_batch=True alone")
            if self.in_batch:
                scores = q @ torch.cat([p, hard.flatten(0, 1)]).T  # (B, B + B n)
                if ignored is not None:
                    scores = scores.masked_fill(ignored, float("-inf"))
                positive = torch.arange(len(q), device=q.device)
            else:
                scores = torch.cat([(q * p).sum(1, keepdim=True), (hard @ q.unsqueeze(2)).squeeze(2)], 1)  # (B, 1 + n)
                positive = torch.zeros(len(q), dtype=torch.long, device=q.device)
            return nn.functional.cross_entropy(scores / self.temperature, positive)


class CrossEncoderLoss(nn.Module):
    """Scores (B, n) of the passages listed for each query, the positive one first unless said otherwise -> the mean loss, a scalar"""

    def forward(self, scores: Tensor, positive: Tensor | None = None) -> Tensor:
        """positive: (B,), which of the passages it is."""
        if scores.ndim != 2:
            raise ConfigError(f"scores {tuple(scores.shape)}: (B, n), a row for each query")
        if positive is None:
            positive = torch.zeros(len(scores), dtype=torch.long, device=scores.device)
        return nn.functional.cross_entropy(wide(scores), positive)


class PointwiseLoss(nn.Module):
    """Logits (B,) or (B, 1) of pairs and labels (B,), 1 for relevant -> the mean binary cross-entropy, a scalar

    A classifier of one output takes labels for numbers to be hit: give it none, and compute this.
    """

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        scores = wide(logits.squeeze(-1) if logits.ndim == 2 else logits)
        if scores.shape != labels.shape:
            raise ConfigError(f"logits {tuple(logits.shape)}, labels {tuple(labels.shape)}: one of each for every pair")
        return nn.functional.binary_cross_entropy_with_logits(scores, labels.to(scores.dtype))


def check_towers(queries: nn.Module, passages: nn.Module, allow_different: bool = False) -> None:
    """Refuse encoders of queries and passages that are adapted in different ways.

    Raises:
        AttachError: one has an adaptation that the other lacks, or has by other methods or sizes.
    """
    if queries is passages or allow_different:
        return
    mine, theirs = (
        {name: tuned.methods for name, tuned in adaptations(model).items()} for model in (queries, passages)
    )
    different = sorted(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name))
    if different:
        raise AttachError(
            f"{different[0]!r} is not the same in the encoders of queries and of passages\nallow_different=True if that is what you want"
        )
