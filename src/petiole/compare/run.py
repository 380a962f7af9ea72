"""The comparison itself: for every row a search, a measurement of its cost, and repeated runs; then the table.

Everything that a trial depends on is in its key. A trial that is on the disk is not run again, so an interrupted comparison goes on where
it was, and a finished one only writes its report anew.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from petiole import files
from petiole.compare.contenders import BARE, BASELINES, Contender, contenders
from petiole.compare.jobs import Engine, Facts, Job
from petiole.compare.results import ADAPTATIONS, Results, Trial, alone, file_of, settle
from petiole.compare.search import FIRST, Proposal, Search, best
from petiole.compare.settings import SEARCH_SEED, Settings
from petiole.compare.table import Row, axes, ranked, spread
from petiole.compare.watch import Watch
from petiole.errors import ConfigError
from petiole.method import Method

TRIAL, REPORT = 16 << 10, 8 << 20  # bytes, at most: of a row of trials.jsonl, and of report and pictures
ALONE = 0.8  # a training that has a core for itself gets at least this share of it


@dataclass(frozen=True)
class Comparison:
    """What came of a comparison.

    Attributes:
        rows: from best to worst.
        metric, title, higher_is_better, percent: of the scores.
        settings, identity: what was asked for, and everything that the trials depended on.
        about: model, data and sizes in words. notes: what was decided on the way.
        trials: how many are in the folder's file; repeated: how many of them were there before.
    """

    folder: Path
    rows: list[Row]
    metric: str
    title: str
    higher_is_better: bool
    percent: bool
    settings: Settings
    identity: dict[str, Any]
    command: str
    about: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    trials: int = 0
    repeated: int = 0

    def row(self, label: str) -> Row:
        """One row by its label."""
        return next(row for row in self.rows if row.label == label)

    def to_dict(self) -> dict[str, Any]:
        """One JSON object."""
        return {
            "metric": self.metric,
            "higher_is_better": self.higher_is_better,
            "axes": list(self.settings.axes),
            "front": [row.label for row in self.rows if row.front],
            "rows": [row.to_dict() for row in self.rows],
            "notes": self.notes,
            "about": self.about,
            "settings": self.settings.model_dump(mode="json"),
            "identity": self.identity,
            "command": self.command,
            "folder": str(self.folder),
            "trials": self.trials,
        }


def compare(
    model: str,
    data: str,
    methods: str | Sequence[str | Method | Sequence[Method]] | None = None,
    *,
    output: str | Path,
    engine: Literal["local", "ray"] | Engine = "local",
    watch: Watch | None = None,
    retry: bool = False,
    command: str | None = None,
    **options: Any,
) -> Comparison:
    """Compare methods on one backbone and one data set, side by side and fairly. Goes on with what is in `output`.

    Args:
        model, data, options: see `Settings`.
        methods: slugs such as "lora,houlsby:bottleneck=8", method objects, or lists of those that act together; the baselines if None.
            The bare backbone and full fine-tuning are always among the rows.
        output: the folder of the run: trials, table, plots, report, adaptations.
        engine: what runs the trials: "local", one after the other in this process; "ray", or a `petiole.compare.Ray` with an address and
            resources, on a cluster. The trials and the table are the same, and either goes on with what the other began.
        watch: what is told of progress; nobody if None.
        retry: run the trials again that failed.
        command: what the report says to type; made from the settings if None.

    Returns:
        Table, fronts and figures. The report is in the folder.

    Raises:
        ConfigError, DataError, FileError: something is wrong with what was asked for, or the folder holds another run.
        MissingExtra: a package is not installed that the engine or the search needs.
    """
    runner = engine_of(engine)
    rows = contenders(methods)
    if methods is not None:
        options["methods"] = tuple(row.label for row in rows[2:])
    settings = Settings(model=model, data=data, **options)
    folder = Path(output)
    watch = watch or Watch()
    new = not folder.exists()
    files.check_writable(folder)  # before anything is loaded
    try:
        try:
            facts = runner.open(settings, folder, rows)
            check_room(folder, facts, settings, rows)
        except BaseException:
            if new:
                for empty in (folder / ADAPTATIONS, folder):
                    with suppress(OSError):
                        empty.rmdir()
            raise
        command = command or settings.command(str(output), runner.words())
        with alone(folder):
            settle(folder, facts.identity, settings.asked, command)
            for place in (folder, folder / ADAPTATIONS):  # nobody else writes here
                files.sweep(place, older_than=0)
            try:
                made = Round(settings, facts, rows, Results(folder, retry), watch).go(runner)
            finally:
                watch.close()
            result = replace(made, command=command)
            from petiole.compare.report import write

            write(result)
    finally:
        runner.close()
    return result


def check_room(folder: Path, facts: Facts, settings: Settings, rows: Sequence[Contender]) -> None:
    """See to it that the folder will take what the whole run writes: a file for each row, trials, report.

    Raises:
        FileError: it will not; names the folder and the bytes.
    """
    missing = [size for label, size in facts.file_bytes.items() if not (folder / file_of(label)).is_file()]
    trials = len(rows) * (settings.trials + settings.seeds + 1)
    files.check_writable(folder, sum(missing) + trials * TRIAL + REPORT, "or compare fewer methods")
    files.check_writable(folder / ADAPTATIONS)


def engine_of(engine: str | Engine) -> Engine:
    """An engine by its name, or itself.

    Raises:
        ConfigError: there is no such engine.
    """
    if not isinstance(engine, str):
        return engine
    if engine == "local":
        from petiole.compare.local import Local

        return Local()
    if engine == "ray":
        from petiole.compare.cluster import Ray

        return Ray()
    raise ConfigError(f"engine: {engine!r} is none of local, ray")


class Round:
    """One pass over all rows.

    Args:
        facts: of the engine. rows: who takes part. results: what is on the disk. watch: is told.
    """

    def __init__(
        self, settings: Settings, facts: Facts, rows: Sequence[Contender], results: Results, watch: Watch
    ) -> None:
        self.settings, self.facts, self.identity = settings, facts, facts.identity
        self.results, self.watch = results, watch
        self.notes = list(facts.notes)
        self.repeated = 0
        self.alone: list[Trial] = []  # the trials that times come from
        self.beside = False
        self.rows: list[Contender] = []
        for row in rows:
            if row.label in facts.unfit and not row.asked:
                self.notes.append(f"{row.label} was left out: {facts.unfit[row.label]}")
                continue
            self.rows.append(row)
        from petiole.tasks import METRICS, registry

        registry()  # every task has then entered its metrics, also where trials run in other processes
        metric = METRICS[facts.metric]
        self.metric, self.title, self.higher = metric.name, metric.title, metric.higher_is_better
        self.percent = metric.highest == 1.0

    def go(self, engine: Engine) -> Comparison:
        plan = [(row.label, self.settings.trials if row.trains else 0, self.settings.seeds) for row in self.rows]
        self.watch.begin(plan, self.metric, self.percent, self.higher)
        for note in self.notes:
            self.watch.note(note)
        if self.results.torn:
            self.watch.note("the last row of trials.jsonl was cut short: that trial is run again")
        made = engine.play([self.row(row) for row in self.rows], self)
        table = ranked([self.unchanged(row, trials) for row, trials in made], axes(self.settings.axes), self.higher)
        return Comparison(
            folder=self.results.path.parent,
            rows=table,
            metric=self.metric,
            title=self.title,
            higher_is_better=self.higher,
            percent=self.percent,
            settings=self.settings,
            identity=self.identity,
            command="",
            about=self.facts.about,
            notes=[*self.notes, *self.edges(table), *self.crowded()],
            trials=len(self.results.by_key),
            repeated=self.repeated,
        )

    # ---- one row

    def row(self, contender: Contender) -> Generator[list[Job], list[Trial], tuple[Row, list[Trial]]]:
        """Search, measure, repeat: says which trials it wants next, is sent them, and ends with its row and its repeated runs."""
        seeds = list(self.settings.run_seeds)
        if contender.label in self.facts.unfit:
            reason = self.facts.unfit[contender.label]
            self.watch.skip(contender.label, self.settings.trials + 1 + len(seeds), reason)
            return self.gathered(contender, [], None, None, [reason]), []
        tuned, chosen = (yield from self.search(contender)) if contender.trains else ([], None)
        if contender.trains and chosen is None:
            reason = f"all {len(tuned)} trials failed; the first: {tuned[0].reason}"
            self.watch.skip(contender.label, 1 + len(seeds), reason)
            return self.gathered(contender, tuned, None, None, [reason]), []
        wanted = [Job("run", contender, i, seed, chosen) for i, seed in enumerate(seeds)]
        cost, *runs = yield [Job("cost", contender, 0, SEARCH_SEED, chosen), *wanted]
        faults = [
            f"trial {t.number + 1} (learning rate {t.learning_rate:.2g}): {t.reason}" for t in tuned if not t.done
        ]
        faults += [f"seed {t.seed}: {t.reason}" for t in runs if not t.done]
        faults += [f"cost: {cost.reason}"] if not cost.done else []
        return self.gathered(contender, tuned, chosen, cost, faults, runs), runs

    def search(self, contender: Contender) -> Generator[list[Job], list[Trial], tuple[list[Trial], Proposal | None]]:
        """All trials of a row's search, and the best proposal. The first wait for no result, each of the others for all before it."""
        sizes = contender.sizes if self.settings.size_search else ()
        search = Search(
            contender.label,
            contender.learning_rates,
            sizes,
            contender.size,
            higher_is_better=self.higher,
            seed=SEARCH_SEED,
        )
        trials: list[Trial] = []
        scored: list[tuple[Proposal, float | None]] = []
        while (left := self.settings.trials - len(trials)) > 0:
            asked = [search.ask() for _ in range(1 if trials else min(len(FIRST), left))]
            done = yield [Job("tune", contender, p.number, SEARCH_SEED, p) for p in asked]
            for p, trial in zip(asked, done, strict=True):
                value = trial.score("validation", self.metric) if trial.done else None
                search.tell(p, value)
                trials.append(trial)
                scored.append((p, value))
        return trials, best(scored, self.higher)

    # ---- what an engine asks and hands in

    def known(self, job: Job) -> Trial | None:
        trial = self.results.get(job.key(self.identity))
        if trial is not None:
            self.repeated += 1
            self.watch.end(trial, True)
        return trial

    def begin(self, job: Job) -> None:
        self.watch.trial(job.contender.label, job.kind, job.number, job.learning_rate)

    def step(self, done: int, total: int) -> None:
        self.watch.step(done, total)

    def end(self, trial: Trial) -> Trial:
        self.results.add(trial)
        self.watch.end(trial, False)
        return trial

    def note(self, text: str) -> None:
        self.watch.note(text)

    # ---- remarks

    def edges(self, rows: Sequence[Row]) -> list[str]:
        """A remark on rows whose best learning rate lies at the edge of what was searched."""
        at = {"upper": list[str](), "lower": list[str]()}
        for row in rows:
            contender = next(c for c in self.rows if c.label == row.label)
            if row.learning_rate is not None:
                low, high = contender.learning_rates
                share = math.log(row.learning_rate / low) / math.log(high / low)
                if share > 0.9 or share < 0.1:
                    at["upper" if share > 0.5 else "lower"].append(row.label)
        return [
            f"the best learning rate lies at the {edge} end of the method's range, so a search beyond it may find a better one: {', '.join(labels)}"
            for edge, labels in at.items()
            if labels
        ]

    def crowded(self) -> list[str]:
        """A remark where trials ran side by side, and one where other work on the machine kept the trainings waiting."""
        beside = [
            "trials ran side by side on a cluster: the time of a step was measured while no other ran, the time of all trials adds up what each took"
        ]
        shares = [trial.share for trial in self.alone if trial.share is not None]
        if self.facts.device != "cpu" or not shares or statistics.median(shares) >= ALONE:
            return beside * self.beside
        return beside * self.beside + [
            f"the machine was busy with other work: trainings got {100 * statistics.median(shares):.0f} % of a core, so times are too long, "
            "and not by the same factor in all rows"
        ]

    # ---- what came of it

    def gathered(
        self,
        contender: Contender,
        tuned: list[Trial],
        chosen: Proposal | None,
        cost: Trial | None,
        notes: list[str],
        runs: Sequence[Trial] = (),
    ) -> Row:
        """A row of the table from its trials; rank and fronts come later."""
        everything = [*tuned, *runs, *([cost] if cost is not None else [])]
        timed = [trial for trial in everything if not trial.beside]  # on a cluster: the measurement of cost alone
        self.beside = self.beside or len(timed) < len(everything)
        self.alone += [trial for trial in timed if trial.kind != "tune"]
        done = [trial for trial in runs if trial.done]
        scores = [value for trial in done if (value := trial.score("test", self.metric)) is not None]
        mean, sd = spread(scores)
        costs = cost.cost if cost is not None else {}
        forgotten = [t.forgetting["after"] - t.forgetting["before"] for t in done if t.forgetting]
        trained = contender.trains
        bytes_of = next((trial.file_bytes for trial in done if trial.file_bytes), None)
        return Row(
            label=contender.label,
            family=contender.family,
            config=contender.config(chosen.size if chosen else None),
            scores=scores,
            mean=mean,
            sd=sd,
            validation=next(
                (t.score("validation", self.metric) for t in tuned if chosen and t.number == chosen.number), None
            ),
            learning_rate=chosen.learning_rate if chosen else None,
            size=(chosen.size if chosen and chosen.size is not None else contender.size) if trained else None,
            trials=len(tuned),
            failed_trials=sum(not trial.done for trial in tuned),
            seeds=len(done),
            failed_seeds=len(runs) - len(done),
            trainable_parameters=costs.get("trainable_parameters") if trained else 0,
            head_parameters=costs.get("head_parameters") if trained else 0,
            backbone_parameters=costs["total_parameters"] - costs["deltas_parameters"] if costs else None,
            file_bytes=(bytes_of or costs.get("checkpoint_bytes")) if trained else 0,
            training_flops=costs["step_flops"] * self.facts.steps if costs and trained else 0 if costs else None,
            saved_bytes=costs.get("saved_bytes") if trained else None,
            peak_bytes=costs.get("peak_bytes") if trained else None,
            step_seconds=min((t.step_seconds for t in timed if t.step_seconds), default=None),
            forward_seconds=costs.get("forward_seconds"),
            run_seconds=spread([trial.seconds for trial in done])[0] if trained else None,
            total_seconds=sum(trial.wall_seconds for trial in everything),
            forgetting=spread(forgotten)[0],
            curve=averaged([trial.losses for trial in done]),
            course=averaged([trial.course for trial in done]),
            notes=notes,
            reference=contender.label == BARE,
        )

    def unchanged(self, row: Row, runs: Sequence[Trial]) -> Row:
        """Say so where a method left the outputs exactly as the bare backbone gives them."""
        if row.reference or not runs or not all(trial.done for trial in runs):
            return row
        bare = Contender(BARE)
        for trial in runs:
            reference = self.results.get(Job("run", bare, trial.number, trial.seed).key(self.identity))
            if reference is None or not reference.outputs or reference.outputs != trial.outputs:
                return row
        return replace(
            row, notes=["changed nothing: its outputs are those of the bare backbone, bit for bit", *row.notes]
        )


def averaged(curves: Sequence[list[list[float]]]) -> list[list[float]]:
    """Curves over the same steps -> their mean, at the steps that all have."""
    if not curves:
        return []
    common = set.intersection(*({point[0] for point in curve} for curve in curves))
    values: list[dict[Any, float]] = [dict(curve) for curve in curves]  # type: ignore[arg-type]
    return [[step, sum(v[step] for v in values) / len(values)] for step in sorted(common)]


__all__ = ["BASELINES", "Comparison", "compare"]
