"""The search for a learning rate, and for a size if asked: the same number of trials for every method.

The first trials stand at the middle, the lower and the upper quarter of the method's range on a log scale; from the fourth on Optuna's
tree-structured Parzen estimator proposes. A proposal depends on the seed and on the results so far alone, so a search that was
interrupted is told its stored results again and goes on as if nothing had happened.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

from petiole.errors import need

FIRST = (0.5, 0.25, 0.75)  # where the first trials stand in the log range


@dataclass(frozen=True)
class Proposal:
    """What to try next."""

    number: int
    learning_rate: float
    size: int | None = None


class Search:
    """Ask for a proposal, tell its score, as often as there are trials.

    Args:
        name: of the row; with `seed` it decides the random numbers.
        learning_rates: the range, both ends included.
        sizes: to choose from; empty leaves the size alone.
        size: the one that the first trial takes.
        higher_is_better: which way the score points.
    """

    def __init__(
        self,
        name: str,
        learning_rates: tuple[float, float],
        sizes: tuple[int, ...] = (),
        size: int | None = None,
        *,
        higher_is_better: bool = True,
        seed: int = 0,
    ) -> None:
        optuna = need("compare", "optuna")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        sampler = optuna.samplers.TPESampler(seed=int.from_bytes(digest[:4]), n_startup_trials=len(FIRST))
        self.study = optuna.create_study(direction="maximize" if higher_is_better else "minimize", sampler=sampler)
        self.pruned = optuna.trial.TrialState.PRUNED
        self.low, self.high = (math.log10(rate) for rate in learning_rates)
        self.sizes = sizes
        for i, share in enumerate(FIRST):
            start: dict[str, Any] = {"learning_rate": self.low + share * (self.high - self.low)}
            if sizes and i == 0:
                start["size"] = size
            self.study.enqueue_trial(start)
        self.asked: dict[int, Any] = {}

    def ask(self) -> Proposal:
        """The next proposal. The first `len(FIRST)` depend on no result, so they may all be asked for before the first is told."""
        asked = self.study.ask()
        self.asked[asked.number] = asked
        rate = 10 ** asked.suggest_float("learning_rate", self.low, self.high)
        size = asked.suggest_categorical("size", list(self.sizes)) if self.sizes else None
        return Proposal(asked.number, float(f"{rate:.4g}"), size)  # four digits: what is printed is what was run

    def tell(self, proposal: Proposal, score: float | None) -> None:
        """How a proposal went; None if it failed, which counts as worse than any score."""
        asked = self.asked.pop(proposal.number)
        if score is None or not math.isfinite(score):
            self.study.tell(asked, state=self.pruned)
        else:
            self.study.tell(asked, score)


def best(scored: list[tuple[Proposal, float | None]], higher_is_better: bool = True) -> Proposal | None:
    """The proposal with the best finite score, the earlier of equals; None if all failed."""
    sign = 1.0 if higher_is_better else -1.0
    done = [(sign * score, -p.number, p) for p, score in scored if score is not None and math.isfinite(score)]
    return max(done, key=lambda entry: entry[:2])[2] if done else None
