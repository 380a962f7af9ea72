"""Kill `petiole compare` at a chosen call, go on, and hold what is there against a run that nothing disturbed.

A moment is a number: the n-th of all calls that change a disk, take an optimiser's step or score a split. No clock is read, so the same
number is the same moment on every machine.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import small
from petiole import files
from petiole.tasks import Task
from training import children

METHODS = "lora:rank=2,linear-probe"
CALLS = ("_open", "_write", "_truncate", "_fsync", "_close", "_replace", "_unlink", "_make_folder", "_fsync_dir")
TIMED = {"step_seconds", "forward_seconds", "run_seconds", "total_seconds", "front", "fronts"}


def words(here: Path, output: Path, methods: str = METHODS, **changed: Any) -> list[str]:
    """The command line of a small comparison."""
    found = ["compare", "--model", here / small.MODEL, "--data", here / small.DATA, "--methods", methods]
    for name, value in {**small.OPTIONS, **changed}.items():
        found += [f"--{name.replace('_', '-')}", value]
    return [str(word) for word in [*found, "--output", output]]


def watched(n: int | None = None) -> children.Countdown:
    """Count what a run does, in this process from now on, and die before the n-th."""
    counter = children.Countdown(n)
    for owner, name in (*((files, call) for call in CALLS), (torch.optim.AdamW, "step"), (Task, "evaluate")):
        counter.watch(owner, name)
    return counter


def run(arguments: list[str], n: int | None = None, count: Path | None = None) -> int:
    """Run the command in a child process: exit status, -9 if it was killed before its n-th call.

    Args:
        count: file for the number of calls that a whole run makes.
    """

    def work() -> None:
        from petiole.cli import app

        quiet = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(quiet, stream)
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        counter = watched(n)
        app(arguments, standalone_mode=False)
        if count is not None:
            count.write_text(str(counter.calls))

    return children.run(work)


def trials(folder: Path) -> list[dict[str, Any]]:
    path = folder / "trials.jsonl"
    return [json.loads(line) for line in files.read_lines(path)[0]] if path.exists() else []


def table(folder: Path) -> list[dict[str, Any]]:
    """The table without what a clock gave."""
    rows = files.read_json(folder / "results.json")["rows"]
    return [{name: value for name, value in row.items() if name not in TIMED} for row in rows]


def lost(folder: Path, whole: Path) -> list[str]:
    """What differs from the undisturbed run, in words; nothing should."""
    own, other = (Counter(row["key"] for row in trials(each)) for each in (folder, whole))
    found = [f"trial {key} is there {own[key]} times" for key in {*own, *other} if own[key] != 1]
    found += [f"trial {key} is of another run" for key in own if key not in other]
    if table(folder) != table(whole):
        found.append("the table differs")
    found += [f"{path.name} was left behind" for path in folder.rglob(".petiole-*")]
    for path in (whole / "adaptations").glob("*.safetensors"):
        copy = folder / "adaptations" / path.name
        if not copy.exists() or copy.read_bytes() != path.read_bytes():
            found.append(f"{path.name} differs")
    return found
