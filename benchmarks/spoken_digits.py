"""Spoken digits of two speakers whom a small spectrogram transformer never heard, from five clips of each digit of each.

    python benchmarks/spoken_digits.py --data ../shared/data/audio/fsdd --cache /tmp/digits

Each seed draws other clips and another head. The learning rate is the best of three on validation with the first seed; test is scored once.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import common
import torch
from family import Entry, Setting, own, run

import petiole as pt
from petiole.methods.adapters.ast import prompts
from petiole.tasks import prepare
from petiole.tasks.spoken_digits import spoken_digits

METHODS: dict[str, pt.Method] = {
    "full fine-tuning": pt.FullFineTuning(),
    "linear probe": pt.LinearProbe(),
    "lora, rank 4": pt.LoRA(rank=4),
    "petl-ast, conformer": pt.ASTAdapter(reduction_factor=8, kernel_size=15),
    "petl-ast, bottleneck": pt.ASTAdapter(reduction_factor=8, block="bottleneck"),
    "deep prompts, 8": prompts(8),
}


def settings(data: str, cache: Path, seeds: int, shots: int, steps: int) -> list[Setting]:
    """One for each seed."""

    def setting(seed: int) -> Setting:
        folder, rows = spoken_digits(data, cache, shots=shots, seed=seed)
        task = prepare(rows, folder)
        return Setting(f"digits-{seed}", "spoken digits", str(folder), data, steps, make=lambda: task)

    return [setting(seed) for seed in range(seeds)]


def best(setting: Setting, entry: Entry) -> float:
    """The learning rate that is best on validation."""
    return max(entry.grid, key=lambda rate: run(setting, entry, rate, 0, "validation")["score"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--only", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--json", type=Path, default=None)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    each = settings(asked.data, asked.cache, asked.seeds, asked.shots, asked.steps)
    print("| method | trained numbers | learning rate | right, mean ± deviation |\n|---|---|---|---|")
    found = {}
    for name in asked.only:
        entry = own(METHODS[name], name)
        rate = best(each[0], entry)
        lines = [run(setting, entry, rate, seed, "test") for seed, setting in enumerate(each)]
        scores = [line["score"] for line in lines]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        found[name] = {"scores": scores, "learning_rate": rate, "trained": lines[0]["trained"]}
        about = f"| {name} | {lines[0]['trained']:,} | {rate:g} | {100 * statistics.mean(scores):.1f} ± {100 * spread:.1f} % |"
        print(about, flush=True)
    about = {"shots": asked.shots, "steps": asked.steps, "seeds": asked.seeds}
    common.write(asked.json, {**about, "methods": found, "versions": common.versions("torch", "transformers")})


if __name__ == "__main__":
    main()
