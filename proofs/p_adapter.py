"""p-Adapter: attention's own graph, weighed anew, solves what a linear head can't, and p moves to where it serves."""

from __future__ import annotations

import bench
from common import Report, options, spread

import petiole as pt
from petiole.methods.adapters.p_adapter import PLaplacian

COMMON = {"targets": ("self",), "reduction_factor": 4, "mu": 0.1, "init": "zero_up"}
METHODS: dict[str, pt.Method] = {
    "head only": pt.LinearProbe(),
    "p learned": pt.PAdapter(p_self=1.5, **COMMON),
    "p = 2": pt.PAdapter(p_self=2.0, learnable_p=False, **COMMON),
}


def main() -> None:
    given = options(__doc__)
    report = Report(
        "p-adapter",
        "p-Adapter",
        f"{bench.ABOUT} p-Adapters after every attention (ρ = 4, μ₀ = 0.1, W_up = 0 at start), none at the ffn; p starts at 1.5.",
        ("seed", *METHODS, "p of each block"),
    )
    right: dict[str, list[float]] = {name: [] for name in METHODS}
    moved: list[float] = []
    for seed in range(given.seeds):
        exponents: list[float] = []
        for name, method in METHODS.items():
            outcome = bench.run(method, seed)
            right[name].append(outcome.accuracy)
            if name == "p learned":
                found = (slot.delta for slot in outcome.tuned.slots)
                exponents = [float(delta.p.detach()) for delta in found if isinstance(delta, PLaplacian)]
        moved += [abs(p - 1.5) for p in exponents]
        report.row(seed, *(values[-1] for values in right.values()), ", ".join(f"{p:.3f}" for p in exponents))
    ahead = [mine - head for mine, head in zip(right["p learned"], right["head only"], strict=True)]
    fixed = [mine - other for mine, other in zip(right["p learned"], right["p = 2"], strict=True)]
    report.require(f"at least 0.80 right: {spread(right['p learned'])}", min(right["p learned"]) >= 0.80)
    report.require(f"at least 0.2 more than the head alone: {spread(ahead)}", min(ahead) >= 0.2)
    report.require(f"every p has moved by more than 0.02: {spread(moved)}", min(moved) > 0.02)
    report.require(f"at most 0.03 less than p fixed to 2: {spread(fixed)} more", min(fixed) >= -0.03)
    report.finish(given, {**right, "moved": moved})


if __name__ == "__main__":
    main()
