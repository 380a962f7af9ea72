"""IncreLoRA puts its ranks where the change is: four layers side by side, of which one has to change by a rank of 8 and one by a rank of 1."""

from __future__ import annotations

from common import Report, fit_growing, options, spread

import petiole as pt

STEPS, RATE, BUDGET = 600, 0.02, 12


def main() -> None:
    given = options(__doc__)
    report = Report(
        "increlora",
        "IncreLoRA",
        "Four parallel 24 x 24 layers must become W + D with D of rank 0, 8, 0 and 1 (Gaussian factors, / 8), seen through 256 normal inputs. "
        f"AdamW, learning rate {RATE}, {STEPS} steps, no term of orthogonality; alpha 16, from rank 1 each to {BUDGET} together, one site and "
        "one rank at a time, every 20 steps. Beside it the same without growth, and with the budget spread evenly: rank 3 each.",
        ("seed", "final ranks", "loss", "fixed at rank 1", "even, rank 3"),
    )
    losses: list[float] = []
    shares: list[float] = []
    second: list[int] = []
    for seed in range(given.seeds):
        ranks, loss = fit_growing(method(target_total_rank=BUDGET), seed, RATE, STEPS)
        _, fixed = fit_growing(method(target_total_rank=4), seed, RATE, STEPS)
        _, even = fit_growing(method(init_rank=3, target_total_rank=12), seed, RATE, STEPS)
        report.row(seed, " ".join(map(str, ranks)), loss, fixed, even)
        losses.append(loss)
        shares.append(loss / fixed)
        second.append(ranks[1])
    report.require(
        f"the layer that changes by rank 8 gets at least 7 of {BUDGET} ranks: {min(second)}", min(second) >= 7
    )
    report.require(f"the loss is below 0.05 of that without growth: {spread(shares)}", max(shares) < 0.05)
    report.finish(given, {"loss": losses, "share": shares, "rank": second})


def method(**fields: int) -> pt.IncreLoRA:
    small = {"alpha": 16.0, "rank_increment": 1, "top_k": 1, "warmup_steps": 20, "update_interval": 20}
    return pt.IncreLoRA(**small, orthogonality_weight=0.0, restart_warmup=False, **fields)


if __name__ == "__main__":
    main()
