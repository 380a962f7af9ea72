"""SVFit learns a map that keeps the singular vectors of W with 64 numbers, where LoRA with twice as many can't; a wrong base is refused."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from common import Linear, Report, attached, fit, options, parts, spread

import petiole as pt
from petiole.errors import FileError

SIZE, INPUTS, STEPS, RATE = 64, 512, 400, 0.02


def main() -> None:
    given = options(__doc__)
    report = Report(
        "svfit",
        "SVFit",
        f"A random {SIZE} x {SIZE} matrix W must become U diag(s (1 + 0.3 n)) Vᵀ, n normal, seen through {INPUTS} normal inputs: "
        f"Adam, learning rate {RATE}, {STEPS} steps. Left is the share of the first loss.",
        ("seed", "SVFit, 64 parameters", "LoRA of rank 1, 128 parameters"),
    )
    left: dict[str, list[float]] = {"svfit": [], "lora": []}
    refused = 0
    for seed in range(given.seeds):
        generator = torch.Generator().manual_seed(seed)
        W = torch.randn(SIZE, SIZE, generator=generator) / SIZE**0.5
        U, s, V = torch.linalg.svd(W)
        target = (U * (s * (1 + 0.3 * torch.randn(SIZE, generator=generator)))) @ V
        x = torch.randn(INPUTS, SIZE, generator=generator)
        y = x @ target.T
        for name, method, count in (
            ("svfit", pt.SVFit(rank=SIZE), SIZE),
            ("lora", pt.LoRA(rank=1, alpha=1), 2 * SIZE),
        ):
            model, tuned = attached(W, method, seed)
            assert tuned.trainable == count
            left[name].append(fit(model, tuned.parameters(), x, y, RATE, STEPS))
            if name == "svfit":
                refused += loads_nowhere_else(tuned, W)
        report.row(seed, left["svfit"][-1], left["lora"][-1])
    report.require(f"SVFit leaves less than 1e-4: {spread(left['svfit'])}", max(left["svfit"]) < 1e-4)
    report.require(f"LoRA of rank 1 leaves more than 0.5: {spread(left['lora'])}", min(left["lora"]) > 0.5)
    report.require(
        f"a file loads on W, and is refused on W with one number changed: {refused} of {given.seeds} runs",
        refused == given.seeds,
    )
    report.finish(given, left)


def loads_nowhere_else(tuned: pt.Adaptation, W: torch.Tensor) -> bool:
    """Whether the file gives the same weight on W, and is refused on another even if another backbone is allowed."""
    with tempfile.TemporaryDirectory() as folder:
        path = tuned.save(Path(folder) / "a.safetensors")
        same = Linear(W)
        loaded = pt.load(same, path, found=parts(same))
        change = [a.slots[0].delta.weight(W) for a in (tuned, loaded)]
        wrong = Linear(W.index_put((torch.tensor([5]), torch.tensor([9])), torch.tensor(0.5)))
        try:
            pt.load(wrong, path, found=parts(wrong), allow_other_backbone=True)
        except FileError:
            return torch.allclose(*change, rtol=1e-5, atol=1e-6)
    return False


if __name__ == "__main__":
    main()
