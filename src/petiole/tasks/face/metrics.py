"""How well embeddings tell people apart: pure functions of embeddings (n, d) and identities (n,).

    rank k     closed-set identification: share of probes whose identity is among the k that the gallery holds nearest
    TAR@FAR    verification: share of pairs of one person that are accepted at a threshold that at most FAR of the other pairs pass

A score is the cosine of two embeddings; that of an identity, the best over its gallery images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from petiole.errors import ConfigError, TrainingError


def fused(embeddings: Tensor, flipped: Tensor) -> Tensor:
    """Of images and of their mirror images (n, d): the directions of both, weighted by their lengths, to unit length.

    |a| (a / |a|) + |b| (b / |b|) is their sum: where a network is unsure its embedding is short, and counts less.
    """
    return nn.functional.normalize(embeddings + flipped, dim=1)


def cosines(probes: Any, gallery: Any) -> Tensor:
    """(n, d) and (m, d) -> (n, m), in float64."""
    a, b = (torch.as_tensor(t).detach().double() for t in (probes, gallery))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not len(a) or not len(b):
        raise ConfigError(f"embeddings (n, d) and (m, d), n, m > 0: got {tuple(a.shape)} and {tuple(b.shape)}")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise TrainingError("some embeddings are not finite\nLower the learning rate, or compute in float32.")
    return nn.functional.normalize(a, dim=1) @ nn.functional.normalize(b, dim=1).T


def identification(
    probes: Any, labels: Any, gallery: Any, gallery_labels: Any, ranks: Sequence[int] = (1, 5)
) -> dict[str, float]:
    """{"rank1": …}: share of probes whose identity is among the first k. One that ties with the own identity stands before it.

    >>> identification([[1.0, 0.1], [0.2, 1.0]], [7, 7], [[1.0, 0.0], [0.0, 1.0]], [7, 9], ranks=[1, 2])
    {'rank1': 0.5, 'rank2': 1.0}

    Raises:
        ConfigError: lengths differ, a probe's identity is not in the gallery, or a rank is below 1.
    """
    scores = cosines(probes, gallery)
    mine, theirs = torch.as_tensor(labels), torch.as_tensor(gallery_labels)
    if (len(mine), len(theirs)) != scores.shape or min(ranks, default=0) < 1:
        raise ConfigError(
            f"identification: {len(scores)} probes with {len(mine)} labels, {scores.shape[1]} gallery images with {len(theirs)}, "
            f"ranks {list(ranks)}\na label for each, ranks from 1"
        )
    identities, place = theirs.unique(return_inverse=True)
    own = (mine[:, None] == identities).double()
    if bool((own.sum(1) == 0).any()):
        missing = int(mine[own.sum(1) == 0][0])
        raise ConfigError(
            f"identification: identity {missing} of a probe is not in the gallery, which must hold them all"
        )
    best = scores.new_full((len(scores), len(identities)), -torch.inf)
    best = best.scatter_reduce(1, place.expand(len(scores), -1), scores, "amax")
    rank = (best >= (best.clamp_min(-2) * own).sum(1, keepdim=True)).sum(1)  # the own identity counts itself
    return {f"rank{k}": float((rank <= k).double().mean()) for k in ranks}


def verification(scores: Any, same: Any, rates: Sequence[float] = (0.1, 0.01)) -> dict[str, float]:
    """{"tar@0.1": …}: share of pairs of one person that are accepted, where at most the given share of the other pairs is.

    A rate below 1 / (number of other pairs) lets none of these pass.

    >>> verification([0.9, 0.4, 0.5, 0.3], [True, True, False, False], rates=[0.5, 0.1])
    {'tar@0.5': 1.0, 'tar@0.1': 0.5}

    Raises:
        ConfigError: lengths differ, a rate is not in (0, 1], or there are no pairs of one kind.
    """
    values, one = torch.as_tensor(scores).double().flatten(), torch.as_tensor(same).bool().flatten()
    if len(values) != len(one) or one.all() or not one.any() or not all(0 < rate <= 1 for rate in rates):
        raise ConfigError(
            f"verification: {len(values)} scores of {len(one)} pairs, {int(one.sum())} of them of one person, rates {list(rates)}\n"
            "pairs of both kinds, rates in (0, 1]"
        )
    others = values[~one].sort(descending=True).values
    found = {}
    for rate in rates:
        passing = int(rate * len(others) + 1e-9)
        accepted = values[one] > others[passing] if passing < len(others) else torch.ones(int(one.sum()))
        found[f"tar@{rate:g}"] = float(accepted.double().mean())
    return found
