"""What methods of execution and cheaper prompts save, all in one run: each beside what it is measured against, interleaved, one thread.

DAS (4 of 12 blocks skipped) over the bare model and PYRA over the bare model, at inference: FLOPs, time, and how much of the saving arrives.
DePT over prompt tuning with as many parameters, by the prompt's length. APT's added multiply-adds at ViLT's size, and its step. What each
part measures, and with what spread, is said in skipping.py, merging.py and prompts.py.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import common
import merging
import prompts
import skipping

ARRIVES = 0.7  # of the FLOPs that are saved, in time, at least


def main() -> None:
    found = common.options(__doc__ or "", repeats=9)
    print(f"{found.threads} thread(s), {found.repeats} rounds; {common.versions()}")
    figures: dict[str, Any] = {"threads": found.threads, "repeats": found.repeats, "versions": common.versions()}

    print(f"\n{'at inference':34}{'FLOPs':>8}{'time':>8}{'quartiles':>18}{'arrives':>9}   at least {ARRIVES:.0%}?")

    def row(name: str, flops: float, time: float, quartiles: list[float], arrives: float) -> None:
        low, high = quartiles
        verdict = "yes" if arrives >= ARRIVES else "NO"
        print(f"{name:34}{flops:8.3f}{time:8.3f}     {low:.3f}-{high:.3f}{arrives:9.0%}   {verdict}", flush=True)

    figures["das"] = [line for name in skipping.BACKBONES for line in skipping.savings(name, [4], 1, 0, found.repeats)]
    for line in figures["das"]:
        part = line["over_bare"]
        row(f"das, 4 of 12, {line['backbone']}", part["flops"], part["time"], part["quartiles"], part["arrives"])
    figures["pyra"] = {name: merging.figures(name, 0, found.repeats) for name in merging.BACKBONES}
    for name, lines in figures["pyra"].items():
        for line in lines:
            row(f"pyra {line['schedule']}, {name}", line["flops"], line["time"], line["quartiles"], line["kept"])

    figures["dept"] = {name: prompts.shorter_prompts(name, 0, found.repeats) for name in prompts.BACKBONES}
    print(
        f"\n{'step of DePT over prompt tuning':34}"
        + "".join(f"{f'l = {n}':>9}" for n in prompts.LENGTHS)
        + "   saving grows?"
    )
    for name, lines in figures["dept"].items():
        times = [line["time"] for line in lines]
        grows = all(a > b for a, b in pairwise(times))
        print(f"{name:34}" + "".join(f"{time:9.3f}" for time in times) + f"   {'yes' if grows else 'NO'}", flush=True)

    figures["added_gmacs"] = prompts.added_work()
    print("\n200 prompts at ViLT's size, 10^9 multiply-adds more (published): "
          + "; ".join(f"{name} {value:.2f} ({prompts.PUBLISHED[name]})" for name, value in figures["added_gmacs"].items()))  # fmt: skip
    figures["apt"] = {name: prompts.beside_attention(name, 0, found.repeats) for name in prompts.ENCODERS}
    print(f"\n{'step of APT':34}{'prompts':>8}{'/ deep prompts':>16}{'/ LoRA':>8}")
    for name, lines in figures["apt"].items():
        for line in lines:
            print(f"{name:34}{line['prompts']:8}{line['over_deep']:16.3f}{line['over_lora']['apt']:8.3f}", flush=True)
    common.write(found.json, figures)


if __name__ == "__main__":
    main()
