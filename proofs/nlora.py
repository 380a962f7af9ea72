"""IntTune learns a change of a weight that lies between slices of it with 64 numbers; starting from slices costs next to nothing."""

from __future__ import annotations

import statistics
import time

import torch
from common import Report, attached, fit, options, spread

import petiole as pt
from petiole.method import Base

SIZE, INPUTS, STEPS, RATE, RANK = 64, 512, 400, 0.02, 8
LARGE, REPEATS = 2048, 3


def main() -> None:
    given = options(__doc__)
    report = Report(
        "nlora",
        "SLoRA, NLoRA, IntTune",
        f"W ({SIZE} x {SIZE}) has singular values from 1 down to 0.1 and must become W + 0.5 W[:, :8] Z W[:8, :], Z normal, seen through "
        f"{INPUTS} normal inputs: Adam, learning rate {RATE}, {STEPS} steps. Left is the share of the first loss; SLoRA and NLoRA of rank 8 "
        f"(1,088 parameters) are there for comparison. Then the seconds to start from a {LARGE} x {LARGE} weight.",
        ("seed", "IntTune (pinv), 64", "NLoRA (pinv), 1,088", "SLoRA, 1,088", "LoRA of rank 1, 128"),
    )
    left: dict[str, list[float]] = {"inttune": [], "nlora": [], "slora": [], "lora": []}
    for seed in range(given.seeds):
        generator = torch.Generator().manual_seed(seed)
        U, V = (torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator))[0] for _ in range(2))
        W = (U * torch.linspace(1, 0.1, SIZE)) @ V.T
        Z = torch.randn(RANK, RANK, generator=generator)
        target = W + 0.5 * W[:, :RANK] @ Z @ W[:RANK]
        x = torch.randn(INPUTS, SIZE, generator=generator)
        sizes = {"rank": RANK, "alpha": RANK}
        for name, method, count in (
            ("inttune", pt.IntTune(**sizes, core="pinv"), 64),
            ("nlora", pt.NLoRA(**sizes, core="pinv"), 1088),
            ("slora", pt.SLoRA(**sizes), 1088),
            ("lora", pt.LoRA(rank=1, alpha=1), 128),
        ):
            model, tuned = attached(W, method, seed)
            assert tuned.trainable == count
            left[name].append(fit(model, tuned.parameters(), x, x @ target.T, RATE, STEPS))
        report.row(seed, *(left[name][-1] for name in left))
    seconds = starts()
    ratio = seconds["svd"] / max(seconds["submatrix"], seconds["pinv"])
    report.require(f"IntTune leaves less than 1e-4: {spread(left['inttune'])}", max(left["inttune"]) < 1e-4)
    report.require(f"LoRA of rank 1 leaves more than 0.3: {spread(left['lora'])}", min(left["lora"]) > 0.3)
    report.require(
        f"the start is at least 100 times faster than a decomposition: {seconds['submatrix']:.4f} s (submatrix), {seconds['pinv']:.4f} s (pinv), "
        f"{seconds['svd']:.2f} s (SVD), {ratio:.0f} times",
        ratio >= 100,
    )
    report.finish(given, {**left, "seconds": seconds})


def starts() -> dict[str, float]:
    """Median seconds of initialising IntTune at rank 128, and of an SVD of the same weight in float32, interleaved."""
    W = torch.randn(LARGE, LARGE, generator=torch.Generator().manual_seed(0)) / LARGE**0.5
    runs = {"svd": lambda: torch.linalg.svd(W, full_matrices=False)}
    for core in ("submatrix", "pinv"):
        model, tuned = attached(W, pt.IntTune(core=core))
        slot = tuned.slots[0]
        base = Base(slot.site, model.get_submodule(slot.site.path))
        runs[core] = lambda delta=slot.delta, base=base: delta.initialise(torch.Generator(), base)
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.no_grad():
        for _ in range(REPEATS):
            for name, run in runs.items():
                begin = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(found) for name, found in times.items()}


if __name__ == "__main__":
    main()
