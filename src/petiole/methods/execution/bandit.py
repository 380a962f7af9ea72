"""The bandit of DAS: which modules can be done without.  Wu et al. 2023, arXiv 2309.01479; the update as in its code.

    π = σ(q)        v_k = exp(-loss of the subnet k)        q_i <- q_i + η Σ_k [i skipped in k] (v_k - v̄) π_i (1 - π_i)

q (K,), in float64 on the CPU: a larger preference means that skipping the module cost less than average. π is the weight with which a
module is drawn, no distribution, and stays as it was before the round while the round's subnets are added up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from petiole.errors import ConfigError


def draw(preferences: Tensor, num_skip: int, generator: torch.Generator) -> tuple[int, ...]:
    """m distinct modules to skip, in ascending order: without replacement, with weights σ(q)."""
    if num_skip == 0:
        return ()
    drawn = torch.multinomial(torch.sigmoid(preferences), num_skip, replacement=False, generator=generator)
    return tuple(sorted(drawn.tolist()))


def draw_distinct(
    preferences: Tensor, num_skip: int, samples: int, generator: torch.Generator
) -> list[tuple[int, ...]]:
    """S subnets of m skipped modules, no two the same set.

    Raises:
        ConfigError: there are not so many.
    """
    check(len(preferences), num_skip, samples)
    found: dict[tuple[int, ...], None] = {}
    while len(found) < samples:
        found[draw(preferences, num_skip, generator)] = None
    return list(found)


def check(modules: int, num_skip: int, samples: int) -> None:
    """Raises ConfigError: there is no search with these numbers."""
    if num_skip >= modules:
        raise ConfigError(
            f"num_skip = {num_skip} of {modules} candidates: at least one has to stay, so 0 to {modules - 1}"
        )
    if samples < 2:
        raise ConfigError(f"samples = {samples}: a reward is compared with the mean of a round, so it takes 2 or more")
    if samples > math.comb(modules, num_skip):
        raise ConfigError(
            f"samples = {samples}: skipping {num_skip} of {modules} modules makes {math.comb(modules, num_skip)} different subnets\n"
            "compare fewer, or give more candidates"
        )


def rewards(losses: Tensor, scale: float = 1.0) -> Tensor:
    """Losses (S,) -> v (S,) = exp(-scale · loss); a scale below 1 keeps large losses apart, whose rewards would all be 0."""
    return torch.exp(-scale * losses)


def updated(preferences: Tensor, subnets: Sequence[Sequence[int]], values: Tensor, step_size: float) -> Tensor:
    """q (K,) after a round.

    Args:
        subnets: the modules skipped in each. values: their rewards v (S,).
    """
    q = preferences.clone()
    pi = torch.sigmoid(preferences)
    advantage = values.to(q) - values.to(q).mean()
    for skipped, a in zip(subnets, advantage, strict=True):
        index = torch.as_tensor(skipped, dtype=torch.long)
        q[index] += step_size * a * (pi * (1 - pi))[index]
    in_all = set.intersection(*(set(skipped) for skipped in subnets)) if subnets else set()
    for i in in_all:  # the advantages sum to 0, but for rounding
        q[i] = preferences[i]
    return q


def chosen(preferences: Tensor, num_skip: int) -> tuple[int, ...]:
    """The m modules with the largest q, in ascending order; among equals the lowest index first."""
    order = sorted(range(len(preferences)), key=lambda i: (-float(preferences[i]), i))
    return tuple(sorted(order[:num_skip]))
