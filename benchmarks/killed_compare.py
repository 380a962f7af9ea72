"""Kill `petiole compare` with SIGKILL again and again, go on each time, and see whether anything is lost, repeated or different.

A comparison of four rows on a BERT of two blocks is killed `--kills` times, in rounds of five: four times while it works and once when all
trials are there and the report is being written. The moments are drawn at random among all calls that change a disk, take an optimiser's
step or score a split, so no clock is read and a seed gives the same moments again. After each round the run is let end; every trial must be
there exactly once, and the table and the adaptations must be those of a run that nothing disturbed.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import common
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import small
from compare import kills
from training import children

ROUND = 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=1, help="how often everything is done, at other moments")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here, as one JSON object")
    found = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {
        "kills": 0,
        "lost": [],
        "moments": [],
        "versions": common.versions(),
        "seeds": found.seeds,
        "threads": 1,
    }
    print(f"1 thread; {common.versions()}")
    with tempfile.TemporaryDirectory(prefix="petiole-kills-") as scratch:
        here, count = small.place(Path(scratch)), Path(scratch) / "count"
        assert kills.run(kills.words(here, here / "whole"), count=count) == 0
        calls, trials = int(count.read_text()), len(kills.trials(here / "whole"))
        assert kills.run(kills.words(here, here / "whole"), count=count) == 0
        last = int(count.read_text())  # calls of a run that only writes the report
        figures |= {"calls": calls, "calls_of_the_report": last, "trials": trials}
        print(f"an undisturbed run: {trials} trials, {calls} calls, {last} when only the report is left")
        for seed in range(found.seeds):
            draw = random.Random(seed)
            for number in range(-(-found.kills // ROUND)):
                disturbed(here, here / f"run-{seed}-{number}", draw, calls, last, figures)
    print(f"{figures['kills']} kills, {len(figures['lost'])} losses")
    common.write(found.json, figures)
    return int(bool(figures["lost"]))


def disturbed(here: Path, output: Path, draw: random.Random, calls: int, last: int, figures: dict[str, Any]) -> None:
    """One run from its beginning to its end, killed five times."""
    moments = [draw.randrange(2, calls // ROUND) for _ in range(ROUND - 1)]
    for n in moments:  # a run goes on with what is there, so a fifth of the calls is never all that is left
        status = kills.run(kills.words(here, output), n)
        print(f"  killed before call {n:4}: {len(kills.trials(output)):2} trials there")
        assert status == children.KILLED, status
        figures["kills"] += 1
    assert kills.run(kills.words(here, output)) == 0
    moments.append(draw.randrange(2, last))
    (output / "results.json").unlink()
    assert kills.run(kills.words(here, output), moments[-1]) == children.KILLED
    figures["kills"] += 1
    assert kills.run(kills.words(here, output)) == 0
    lost = kills.lost(output, here / "whole")
    print(
        f"{output.name}: moments {moments}, then to the end: {'; '.join(lost) or 'nothing lost, nothing repeated, the same table'}"
    )
    figures["moments"].append(moments)
    figures["lost"] += lost


if __name__ == "__main__":
    sys.exit(main())
