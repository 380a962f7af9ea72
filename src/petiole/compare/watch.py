"""What is seen of a comparison while it runs: a live table on a terminal, a line for each trial elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TextIO

from petiole.compare.results import Kind, Trial
from petiole.compare.table import quantity, score, seconds


@dataclass
class Progress:
    """How far one row is."""

    label: str
    tune: int = 0
    tuned: int = 0
    runs: int = 0
    ran: int = 0
    best: float | None = None
    rate: float | None = None
    scores: list[float] = field(default_factory=list)
    parameters: int | None = None
    running: dict[tuple[Kind, int], str] = field(default_factory=dict)
    fault: str = ""

    @property
    def now(self) -> str:
        """The trials that run, in words."""
        return "; ".join(self.running.values())


class Watch:
    """Keeps count; shows nothing. Subclasses show it.

    Args:
        metric, percent, higher_is_better: of the scores.
    """

    def __init__(self) -> None:
        self.rows: dict[str, Progress] = {}
        self.metric, self.percent, self.higher_is_better = "", False, True
        self.total = self.done = self.repeated = 0
        self.started = time.perf_counter()

    def begin(self, labels: list[tuple[str, int, int]], metric: str, percent: bool, higher_is_better: bool) -> None:
        """Rows with their numbers of trials and runs."""
        self.metric, self.percent, self.higher_is_better = metric, percent, higher_is_better
        self.rows = {label: Progress(label, tune=tune, runs=runs) for label, tune, runs in labels}
        self.total = sum(row.tune + row.runs + 1 for row in self.rows.values())

    def trial(self, label: str, kind: Kind, number: int, learning_rate: float | None = None) -> None:
        """A trial starts."""
        row = self.rows[label]
        what = {
            "tune": f"trial {number + 1} of {row.tune}",
            "run": f"seed {number + 1} of {row.runs}",
            "cost": "measuring",
        }[kind]
        row.running[kind, number] = what + (f", learning rate {learning_rate:.2g}" if learning_rate else "")

    def step(self, done: int, total: int) -> None:
        """A step of the trial that runs."""

    def end(self, trial: Trial, repeated: bool) -> None:
        """A trial has ended, or was found on the disk."""
        row = self.rows[trial.row]
        row.running.pop((trial.kind, trial.number), None)
        self.done += 1
        self.repeated += repeated
        value = trial.score("test" if trial.kind == "run" else "validation", self.metric)
        if not trial.done:
            row.fault = trial.reason
        if trial.kind == "tune":
            row.tuned += 1
            better = value is not None and (row.best is None or (value > row.best) == self.higher_is_better)
            row.best, row.rate = (value, trial.learning_rate) if better else (row.best, row.rate)
        elif trial.kind == "run":
            row.ran += 1
            row.scores += [value] if value is not None else []
        elif trial.cost:
            row.parameters = trial.cost["trainable_parameters"]

    def skip(self, label: str, trials: int, reason: str) -> None:
        """Trials that will not be run."""
        self.total -= trials
        self.rows[label].fault = reason

    def note(self, text: str) -> None:
        """Something to know."""

    def close(self) -> None:
        """Nothing more comes."""


class Lines(Watch):
    """A line for each trial.

    Args:
        write: what a line is given to; standard error if None.
    """

    def __init__(self, write: Callable[[str], Any] | None = None) -> None:
        super().__init__()
        self.write = write or (lambda text: print(text, file=sys.stderr, flush=True))

    def end(self, trial: Trial, repeated: bool) -> None:
        super().end(trial, repeated)
        if repeated:
            return
        what = {"tune": f"trial {trial.number + 1}", "run": f"seed {trial.seed}", "cost": "cost"}[trial.kind]
        parts = [f"[{self.done}/{self.total}] {trial.row}, {what}"]
        if trial.learning_rate is not None:
            parts.append(
                f"learning rate {trial.learning_rate:.2g}" + (f", size {trial.size}" if trial.size is not None else "")
            )
        if not trial.done:
            parts.append(f"FAILED: {trial.reason}")
        for split, values in trial.scores.items():
            if self.metric in values:
                parts.append(f"{split} {score(values[self.metric], None, self.percent)}")
        if trial.cost:
            parts.append(
                f"{quantity(trial.cost['trainable_parameters'])} parameters, step {seconds(trial.cost['step_seconds'])}"
            )
        self.write(f"{': '.join([parts[0], ', '.join(parts[1:])])} ({seconds(trial.wall_seconds)})")

    def skip(self, label: str, trials: int, reason: str) -> None:
        super().skip(label, trials, reason)
        self.write(f"{label}: {reason}")

    def note(self, text: str) -> None:
        self.write(text)

    def close(self) -> None:
        if self.repeated:
            self.write(f"{self.repeated} of {self.done} trials were there already")


class Live(Watch):
    """A table that is redrawn in place, with a bar for all trials and one for the steps of the trial that runs."""

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__()
        from rich.console import Console
        from rich.live import Live as RichLive
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self.console = Console(file=stream or sys.stderr)
        self.bars = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}")
        )
        self.all = self.bars.add_task("all trials", total=None, left="")
        self.one = self.bars.add_task("this trial", total=None, left="")
        self.live = RichLive(self, console=self.console, refresh_per_second=4, transient=True)

    def begin(self, labels: list[tuple[str, int, int]], metric: str, percent: bool, higher_is_better: bool) -> None:
        super().begin(labels, metric, percent, higher_is_better)
        self.started = time.perf_counter()
        self.live.start()

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        arrow = "↑" if self.higher_is_better else "↓"
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("method", no_wrap=True)
        for title in ("tuned", f"validation {arrow}", "seeds", f"test {arrow}", "trained"):
            table.add_column(title, justify="right", no_wrap=True)
        table.add_column("", no_wrap=True, overflow="ellipsis", max_width=48)
        for row in self.rows.values():
            mean = sum(row.scores) / len(row.scores) if row.scores else None
            cells = [
                row.label,
                f"{row.tuned}/{row.tune}" if row.tune else "–",
                score(row.best, None, self.percent),
                f"{row.ran}/{row.runs}",
            ]
            cells += [score(mean, None, self.percent), quantity(row.parameters)]
            table.add_row(*cells, row.now or row.fault, style="bold" if row.now else "red" if row.fault else "")
        self.bars.update(self.all, total=self.total, completed=self.done, left=self.left())
        return Group(table, "", self.bars)

    def left(self) -> str:
        """An estimate of the time that remains, from the trials that were run."""
        fresh = self.done - self.repeated
        if not fresh or self.done >= self.total:
            return ""
        return f"about {seconds((time.perf_counter() - self.started) / fresh * (self.total - self.done))} left"

    def trial(self, label: str, kind: Kind, number: int, learning_rate: float | None = None) -> None:
        super().trial(label, kind, number, learning_rate)
        self.bars.update(self.one, total=None, completed=0)

    def step(self, done: int, total: int) -> None:
        self.bars.update(self.one, total=total, completed=done)

    def note(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        self.live.stop()


def watch(stream: TextIO | None = None) -> Watch:
    """What fits the stream: a live table on a terminal, lines elsewhere."""
    stream = stream or sys.stderr
    return Live(stream) if stream.isatty() else Lines(lambda text: print(text, file=stream, flush=True))
