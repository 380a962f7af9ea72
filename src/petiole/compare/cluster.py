"""The engine that hands trials to a Ray cluster: many at once, each on a worker that has data and backbone loaded.

The driver (this process) loads no backbone. It asks the search, hands out trials, and alone writes what came of them, each as it ends; so
a killed driver loses what was under way and nothing else. What a trial computes depends on its settings alone, so the table is that of
the local engine. Measurements of cost wait until nothing else runs, and then go to one worker, one after the other.
"""

from __future__ import annotations

import os
import re
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic

from petiole import files
from petiole.compare.contenders import Contender
from petiole.compare.jobs import Desk, Facts, Job, Made, Program
from petiole.compare.results import Trial
from petiole.compare.settings import Settings
from petiole.errors import ConfigError, PetioleError, need

STARTS = 3  # workers in a row that may fail to start before the run gives up


@dataclass(frozen=True)
class Outcome:
    """What a worker sends back: the trial, and the files that belong to it, by path in the folder of the run."""

    trial: Trial
    files: dict[str, bytes] = field(default_factory=dict)


class Worker:
    """Lives in a process of the cluster. Loads data and backbone once, then runs trials.

    Args:
        settings: of the comparison.
        folder: where the driver runs: paths are meant from there, if this machine has it.
        gpu: whether this process may use one.
    """

    def __init__(self, settings: Settings, folder: str, gpu: bool) -> None:
        if not gpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = (
                ""  # some versions of Ray show all of them to a worker that asked for none
            )
        with suppress(OSError):
            os.chdir(folder)
        self.settings = settings

    def where(self) -> str:
        """This process, for messages."""
        import ray

        return f"{ray.util.get_node_ip_address()}, process {os.getpid()}"

    def load(self, rows: Sequence[Contender]) -> Facts:
        """Load, and say what was found."""
        import gc

        import torch

        from petiole.compare.bench import Bench

        torch.set_num_threads(self.settings.threads or 1)
        self.bench = Bench(self.settings, Path("nowhere"))
        facts = self.bench.facts(rows)
        gc.collect()
        gc.freeze()
        return facts

    def do(self, job: Job) -> Outcome:
        """Run a trial."""
        with tempfile.TemporaryDirectory(prefix="petiole-") as scratch:
            self.bench.folder = Path(scratch)
            trial = self.bench.do(job, timed=True)
            made = {path.relative_to(scratch).as_posix(): path for path in Path(scratch).rglob("*") if path.is_file()}
            return Outcome(trial, {name: files.read_bytes(path) for name, path in made.items()})


@dataclass
class Hand:
    """A worker as the driver sees it.

    Attributes:
        actor: its handle.
        answer: what it works on: a reference to come, None if it waits.
        job: what that is the trial of; None while it loads. since: when it was given. line: the row that waits for it.
        where: its node and process; known once it has loaded.
    """

    actor: Any
    answer: Any = None
    job: Job | None = None
    line: Any = None
    index: int = 0
    since: float = 0.0
    where: str = "a node"

    @property
    def idle(self) -> bool:
        return self.answer is None


@dataclass
class Line(Generic[Made]):
    """A program that is under way: the trials it waits for, and those it has."""

    program: Program[Made]
    answers: list[Trial | None] = field(default_factory=list)
    made: list[Made] = field(default_factory=list)  # one, at its end


class Ray:
    """Trials on a Ray cluster.

    Args:
        address: of the cluster, as `ray start` prints it; else what RAY_ADDRESS holds; else a cluster of this machine is started, and
            stopped at the end.
        gpus: of a trial; half of one lets two trials share it. By default one where the cluster has any. CPUs are as many as
            `threads` of the comparison, or one.
        workers: how many trials run at once, at most; by default as many as the cluster has room for now.
        resources: other resources of a trial, by Ray's name, such as {"accelerator_type:A100": 0.001}, for a cluster of unlike nodes.

    Raises:
        ConfigError: a number is outside its range.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        gpus: float | None = None,
        workers: int | None = None,
        resources: Mapping[str, float] | None = None,
    ) -> None:
        if gpus is not None and not (0 <= gpus < 1 or (gpus > 0 and float(gpus).is_integer())):
            raise ConfigError(f"gpus = {gpus:g}: a share of one below 1, or a whole number")
        if workers is not None and workers < 1:
            raise ConfigError(f"workers = {workers}: must be at least 1")
        self.address, self.gpus, self.workers, self.resources = address, gpus, workers, dict(resources or {})
        self.hands: list[Hand] = []
        self.ours = False  # whether this engine has connected, and so disconnects
        self.failed_starts: list[str] = []

    def words(self) -> list[str]:
        words = ["--engine", "ray"]
        for name in ("address", "gpus", "workers"):
            if (value := getattr(self, name)) is not None:
                words += [f"--{name}", f"{value:g}" if isinstance(value, float) else str(value)]
        return words

    # ---- the cluster

    def open(self, settings: Settings, folder: Path, rows: Sequence[Contender]) -> Facts:
        """Connect, let a first worker load data and backbone, and take its word for what holds.

        Raises:
            ConfigError: no cluster answers, or none of its nodes has what a trial needs.
        """
        self.ray: Any = need("ray", "ray")
        need("compare", "optuna")  # here, where the search is; the rest is wanted where the workers are
        self.settings, self.folder, self.rows = settings, folder, list(rows)
        self.cpus = settings.threads or 1
        self.connect()
        self.share = self.gpus if self.gpus is not None else float(self.ray.cluster_resources().get("GPU", 0) >= 1)
        self.most = self.workers or self.room()
        first = self.hire()
        try:
            self.facts: Facts = self.ray.get(first.answer)
        except self.ray.exceptions.RayError as error:
            raise self.fault(error, "the first worker") from error
        self.loaded(first)
        return self.facts

    def connect(self) -> None:
        ray = self.ray
        if ray.is_initialized():  # the caller's own session
            return
        address = self.address or os.environ.get("RAY_ADDRESS") or "local"
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if address == "local":
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
            quiet |= {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
            if self.workers is not None:
                quiet["num_cpus"] = max(self.workers * self.cpus, os.cpu_count() or 1)
        try:
            if found := re.fullmatch(r"\[?([^/\]]+)\]?:(\d+)", address):  # Ray itself tries for minutes
                socket.create_connection((found[1], int(found[2])), timeout=10).close()
            ray.init(address=address, **quiet)
        except (OSError, OverflowError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"no Ray cluster at {address}: {' '.join(str(error).split())[:300]}\n"
                "Give --address as `ray start --head` prints it, or leave it out for a cluster of this machine."
            ) from error
        self.ours = True

    def room(self) -> int:
        """How many workers the cluster has room for.

        Raises:
            ConfigError: not for a single one.
        """
        wanted = {"CPU": float(self.cpus), "GPU": self.share, **self.resources}
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        counts = [min(node.get(name, 0.0) / much for name, much in wanted.items() if much > 0) for node in nodes]
        if (total := sum(int(count + 1e-9) for count in counts)) > 0:
            return total
        need_words = ", ".join(f"{much:g} {name}" for name, much in wanted.items() if much > 0)
        have = "; ".join(", ".join(f"{node.get(name, 0):g} {name}" for name in wanted) for node in nodes[:4])
        raise ConfigError(
            f"a trial needs {need_words}, and no node of the cluster has that: {have}\n"
            "Lower --threads or --gpus; for a cluster that grows on demand, say how many --workers."
        )

    def hire(self) -> Hand:
        """Another worker, which loads."""
        ray = self.ray
        options: dict[str, Any] = {"num_cpus": self.cpus, "num_gpus": self.share, "max_restarts": 0}
        if self.resources:
            options["resources"] = self.resources
        remote = ray.remote(Worker).options(**options)
        actor = remote.remote(self.settings, os.getcwd(), self.share > 0)
        hand = Hand(actor, actor.load.remote(self.rows), since=time.perf_counter())
        self.hands.append(hand)
        return hand

    def loaded(self, hand: Hand) -> None:
        hand.answer = None
        with suppress(self.ray.exceptions.RayError):
            hand.where = self.ray.get(hand.actor.where.remote())

    def dismiss(self, hand: Hand) -> None:
        self.hands.remove(hand)
        with suppress(Exception):  # it may be dead already
            self.ray.kill(hand.actor)

    def close(self) -> None:
        for hand in list(self.hands):
            self.dismiss(hand)
        if self.ours:
            self.ray.shutdown()
            self.ours = False

    # ---- trials

    def play(self, programs: Sequence[Program[Made]], desk: Desk) -> list[Made]:
        lines = [Line(program) for program in programs]
        queue: list[tuple[Line[Made], int, Job]] = []
        for line in lines:
            queue += self.advance(line, desk, None)
        while queue or any(hand.job is not None for hand in self.hands):
            self.assign(queue, desk)
            waiting = {hand.answer: hand for hand in self.hands if not hand.idle}
            ready, _ = self.ray.wait(list(waiting), num_returns=1)
            for answer in ready:
                queue += self.settle(waiting[answer], desk)
        return [line.made[0] for line in lines]

    def advance(
        self, line: Line[Made], desk: Desk, answers: list[Trial] | None
    ) -> Iterator[tuple[Line[Made], int, Job]]:
        """Let a program go on, as far as what is on the disk takes it; the trials that it waits for then."""
        try:
            jobs = next(line.program) if answers is None else line.program.send(answers)
            while True:
                line.answers = [desk.known(job) for job in jobs]
                if None in line.answers:
                    yield from ((line, i, job) for i, job in enumerate(jobs) if line.answers[i] is None)
                    return
                jobs = line.program.send([trial for trial in line.answers if trial is not None])
        except StopIteration as end:
            line.made.append(end.value)

    def assign(self, queue: list[tuple[Line[Made], int, Job]], desk: Desk) -> None:
        """Hand out what can run now: searches first, since others wait for them; costs when nothing else is left, one at a time."""
        ordinary = [entry for entry in queue if entry[2].kind != "cost"]
        ordinary.sort(key=lambda entry: entry[2].kind != "tune")  # stable: rows stay in order
        busy = [hand for hand in self.hands if hand.job is not None]
        if not ordinary and not busy:
            loading = [hand for hand in self.hands if not hand.idle]
            for hand in loading[int(len(loading) == len(self.hands)) :]:
                self.dismiss(hand)  # it is no longer wanted, and would be in the way of a measurement
            ordinary = queue[:1]
        elif any(hand.job.kind == "cost" for hand in busy if hand.job):
            return
        coming = sum(not hand.idle and hand.job is None for hand in self.hands)
        for hand in [hand for hand in self.hands if hand.idle]:
            if ordinary:
                entry = ordinary.pop(0)
                queue.remove(entry)
                hand.line, hand.index, hand.job = entry
                hand.since = time.perf_counter()
                hand.answer = hand.actor.do.remote(hand.job)
                desk.begin(hand.job)
        for _ in range(min(self.most - len(self.hands), len(ordinary) - coming)):
            self.hire()

    def settle(self, hand: Hand, desk: Desk) -> Iterator[tuple[Line[Made], int, Job]]:
        """A worker has answered, or died: write what came of it, and see what its row wants next."""
        job, line = hand.job, hand.line
        try:
            found = self.ray.get(hand.answer)
        except self.ray.exceptions.RayError as error:
            fault = self.fault(error, f"the worker on {hand.where}")
            self.dismiss(hand)
            if job is None:
                self.unstarted(str(fault), desk, fault)
                return
            if isinstance(error, self.ray.exceptions.RayTaskError) and fatal(error):
                raise fault from error
            found = Outcome(job.failed(desk.identity, str(fault), time.perf_counter() - hand.since))
        if job is None:
            self.welcome(hand, found, desk)
            return
        hand.answer = hand.job = hand.line = None
        for name, content in found.files.items():
            path = self.folder / name
            files.check_writable(path.parent)
            files.write_bytes(path, content)
        trial = replace(found.trial, beside=self.most > 1 and job.kind != "cost")
        line.answers[hand.index] = desk.end(trial)
        if None not in line.answers:
            yield from self.advance(line, desk, line.answers)

    def welcome(self, hand: Hand, facts: Facts, desk: Desk) -> None:
        """A worker has loaded: it may take part if it found what the first one found."""
        self.loaded(hand)
        own, other = self.facts.identity, facts.identity
        differing = [name for name in own if own[name] != other.get(name)]
        if not differing:
            self.failed_starts.clear()
            return
        self.dismiss(hand)
        shown = "; ".join(f"{name}: {other.get(name)} there, {own[name]} on the first" for name in differing[:2])
        self.unstarted(f"the worker on {hand.where} differs from the first, so it takes no part: {shown}", desk)

    def unstarted(self, reason: str, desk: Desk, fault: PetioleError | None = None) -> None:
        """A worker could not start. Others can go on; where none is left, or none starts any more, the run can't.

        Raises:
            PetioleError: it can't.
        """
        self.failed_starts.append(reason)
        desk.note(reason)
        self.most = max(1, self.most - 1)
        if not self.hands and len(self.failed_starts) >= STARTS:
            raise fault or ConfigError(f"no worker of the cluster can run these trials\n{reason}")

    def fault(self, error: Any, who: str) -> PetioleError:
        """What Ray raised, as petiole's own error."""
        cause = getattr(error, "cause", None)
        if isinstance(cause, PetioleError):
            return cause
        if isinstance(error, self.ray.exceptions.RayTaskError):
            return WorkerFault(f"{who}: {type(cause).__name__ if cause else 'error'}: {one_line(cause or error)[:300]}")
        return WorkerFault(f"{who} died: {death(error)}")


class WorkerFault(PetioleError, RuntimeError):
    """A process of the cluster died, or failed in a way that petiole does not know."""


def fatal(error: Any) -> bool:
    """Whether no result after this would be fair, wherever it ran."""
    from petiole.compare.bench import Changed

    return isinstance(getattr(error, "cause", None), Changed)


def one_line(text: object) -> str:
    return " ".join(str(text).split())


def death(error: object) -> str:
    """The telling part of what Ray says of a dead worker."""
    text = one_line(error)
    found = re.search(r"The actor (?:is dead|died) because (?:of )?(.+)", text)
    told = re.sub(r"Worker exit type: \w+ Worker exit detail: ", "", found[1] if found else text)
    return re.split(r" Some common causes| Node Id:| For more information| To see more", told)[0][:300].rstrip(". ")


__all__ = ["Ray", "Worker"]
