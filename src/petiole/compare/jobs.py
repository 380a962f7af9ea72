"""What an engine is given and gives back: trials that are wanted, and what holds for all of them.

A row of the table is a program: it says which trials it wants next, is told how they went, and ends with a row. Who runs the trials, and
where, is the engine's business, so every engine runs the same ones.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from petiole.compare.contenders import Contender
from petiole.compare.results import Kind, Trial, key_of
from petiole.compare.search import Proposal
from petiole.compare.settings import Settings

Made = TypeVar("Made")
Program = Generator[list["Job"], list[Trial], Made]


@dataclass(frozen=True)
class Job:
    """A trial that is wanted.

    Attributes:
        kind, number, seed: as in `Trial`.
        contender: its row.
        proposal: learning rate and size; None for the bare backbone.
    """

    kind: Kind
    contender: Contender
    number: int
    seed: int
    proposal: Proposal | None = None

    @property
    def learning_rate(self) -> float | None:
        """None for a measurement of cost, which does not depend on it."""
        return self.proposal.learning_rate if self.proposal is not None and self.kind != "cost" else None

    @property
    def size(self) -> int | None:
        return self.proposal.size if self.proposal is not None else None

    def key(self, identity: dict[str, Any]) -> str:
        """The identity of its trial."""
        return key_of(
            identity,
            kind=self.kind,
            config=self.contender.config(self.size),
            learning_rate=self.learning_rate,
            seed=self.seed,
        )

    def failed(self, identity: dict[str, Any], reason: str, seconds: float = 0.0) -> Trial:
        """The trial that came to nothing because whoever ran it did."""
        return Trial(
            key=self.key(identity), row=self.contender.label, kind=self.kind, number=self.number, seed=self.seed,
            config=self.contender.config(self.size), learning_rate=self.learning_rate, size=self.size,
            status="failed", reason=reason, wall_seconds=seconds,
        )  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """What holds for all trials of a comparison, found out where they run.

    Attributes:
        identity: what every trial depends on.
        unfit: label of a row -> why it can't be attached to this backbone.
        file_bytes: label of a row -> bytes of the file that it leaves behind, at most.
        metric: that rows are ranked by. steps: of each training. device: "cpu" or "cuda".
        about, notes: model, data and what was decided about them, in words.
    """

    identity: dict[str, Any]
    unfit: dict[str, str]
    file_bytes: dict[str, int]
    metric: str
    steps: int
    device: str
    about: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Desk(Protocol):
    """Where trials are kept: an engine asks for those that are there, and hands in the others as they end."""

    identity: dict[str, Any]

    def known(self, job: Job) -> Trial | None:
        """The trial, if it is on the disk."""

    def begin(self, job: Job) -> None:
        """A trial starts."""

    def step(self, done: int, total: int) -> None:
        """A step of the trial that runs."""

    def end(self, trial: Trial) -> Trial:
        """A trial has ended: it is written."""

    def note(self, text: str) -> None:
        """Something to know while it runs."""


class Engine(Protocol):
    """Runs trials."""

    def open(self, settings: Settings, folder: Path, rows: Sequence[Contender]) -> Facts:
        """Load data and backbone; `folder` is that of the run."""

    def play(self, programs: Sequence[Program[Made]], desk: Desk) -> list[Made]:
        """Run all programs to their ends; what they give, in their order."""

    def close(self) -> None:
        """Nothing more comes."""

    def words(self) -> list[str]:
        """Of the command line that asks for this engine."""


__all__ = ["Desk", "Engine", "Facts", "Job", "Program"]
