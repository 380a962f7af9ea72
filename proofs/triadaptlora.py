"""TriAdaptLoRA grows where its core grows: four layers side by side, of which one has to change by a rank of 8 and one by a rank of 1."""

from __future__ import annotations

import warnings
from typing import Any

from common import Report, fit_growing, options, spread

import petiole as pt

STEPS, RATE, BUDGET = 600, 0.02, 12


def main() -> None:
    given = options(__doc__)
    warnings.filterwarnings("ignore", message="triadaptlora: init='reference'")
    report = Report(
        "triadaptlora",
        "TriAdaptLoRA",
        "Four parallel 24 x 24 layers must become W + D with D of rank 0, 8, 0 and 1 (Gaussian factors, / 8), seen through 256 normal inputs. "
        f"AdamW, learning rate {RATE}, {STEPS} steps, no term of orthogonality; alpha 16, from rank 1 each to {BUDGET} together, one rank at a "
        "time, every 20 steps, linear growth. Beside it the same without growth, and from the reference's start, where all but A is 0. "
        "The last three columns have D / 3: this start, `core_zero` and no growth. A layer that is right already has a score of 0, above that "
        "of one that has just grown, whose norm is divided by one block more; a weight decay of 0.01, AdamW's usual, makes that negative, too.",
        (
            "seed",
            "final ranks",
            "loss",
            "with decay",
            "fixed at rank 1",
            "reference start",
            "D / 3",
            "core_zero",
            "fixed",
        ),
    )
    shares: list[float] = []
    helped: list[float] = []
    totals: list[int] = []
    dead: list[float] = []
    for seed in range(given.seeds):
        ranks, loss = fit_growing(method(), seed, RATE, STEPS)
        _, decayed = fit_growing(method(), seed, RATE, STEPS, weight_decay=0.01)
        _, fixed = fit_growing(method(target_total_rank=4), seed, RATE, STEPS)
        _, reference = fit_growing(method(init="reference"), seed, RATE, STEPS)
        small = [
            fit_growing(method(**fields), seed, RATE, STEPS, 1 / 24)[1]
            for fields in ({}, {"init": "core_zero"}, {"target_total_rank": 4})
        ]
        report.row(seed, " ".join(map(str, ranks)), loss, decayed, fixed, reference, *small)
        shares.append(loss / fixed)
        helped.append(decayed / fixed)
        totals.append(sum(ranks))
        dead.append(reference / loss)
    report.require(f"the loss is at most 0.6 of that without growth: {spread(shares)}", max(shares) <= 0.6)
    report.require(f"with a weight decay of 0.01 it is at most 0.6: {spread(helped)}", max(helped) <= 0.6)
    report.require(f"the budget of {BUDGET} is used up: {min(totals)}", min(totals) == BUDGET == max(totals))
    report.require(f"from the reference's start nothing is learnt: {spread(dead)} x the loss", min(dead) > 2)
    report.finish(given, {"share": shares, "with decay": helped, "total": totals, "dead": dead})


def method(**fields: Any) -> pt.TriAdaptLoRA:
    small: dict[str, Any] = {"alpha": 16.0, "rank_increment": 1, "warmup_steps": 20, "update_interval": 20}
    return pt.TriAdaptLoRA(**{**small, "target_total_rank": BUDGET, "orthogonality_weight": 0.0, **fields})


if __name__ == "__main__":
    main()
