"""The engine that needs nothing: one trial after the other, in this process."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path

import torch

from petiole.compare.bench import Bench
from petiole.compare.contenders import Contender
from petiole.compare.jobs import Desk, Facts, Job, Made, Program
from petiole.compare.results import Trial
from petiole.compare.settings import Settings


class Local:
    """Runs trials here, row by row."""

    def open(self, settings: Settings, folder: Path, rows: Sequence[Contender]) -> Facts:
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self.bench = Bench(settings, folder)
        return self.bench.facts(rows)

    def play(self, programs: Sequence[Program[Made]], desk: Desk) -> list[Made]:
        gc.collect()
        gc.freeze()  # each trial ends with a collection, which must not go through all that was loaded again and again
        try:
            return [self.one(program, desk) for program in programs]
        finally:
            gc.unfreeze()

    def one(self, program: Program[Made], desk: Desk) -> Made:
        try:
            jobs = next(program)
            while True:
                jobs = program.send([desk.known(job) or self.trial(job, desk) for job in jobs])
        except StopIteration as end:
            made: Made = end.value
            return made

    def trial(self, job: Job, desk: Desk) -> Trial:
        desk.begin(job)
        return desk.end(self.bench.do(job, desk.step))

    def close(self) -> None:
        pass

    def words(self) -> list[str]:
        return []
