"""A family of methods on real tasks: each at its own default and at one budget of trained parameters, peers of other libraries beside them.

One recipe for all: the learning rate is searched on validation with one seed, three points of the method's own range, and lower ones while
the lowest is the best: too high a rate breaks a training, too low a one only slows it (once for a backbone, where a setting says so); then
every seed is trained with the best and scored on test. What is done is kept in one file of lines, and the same command goes on after it was
stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import common
import torch
from torch import nn

import petiole as pt
from petiole.attach import parameters_of
from petiole.attach import plan as planned
from petiole.cost import measure
from petiole.errors import PetioleError
from petiole.tasks import Task, load_data, prepare
from petiole.tune import Recipe, arguments, measured, train

Line = dict[str, Any]
OWN, EQUAL = "own default", "equal budget"
BASE = f"lora, {OWN}"  # what costs are compared with


# ------------------------------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Entry:
    """One row: what is put on a backbone, and where its learning rate is looked for.

    Attributes:
        put: a fresh model and the steps of the run -> what trains: an adaptation, or a model that another library made.
        about: the configuration, in words.
        around: entered around training and scoring, for methods that need a value for each pass.
        lean: what is put instead where bytes are measured: the same numbers, not made faster by memory. `put` if None.
        evaluations: how often every seed is scored on validation on its way.
    """

    label: str
    budget: str
    put: Callable[[nn.Module, int], pt.Adaptation | nn.Module]
    rates: tuple[float, float]
    about: str = ""
    around: Callable[[nn.Module], AbstractContextManager[Any]] = lambda model: nullcontext()
    lean: Callable[[nn.Module, int], pt.Adaptation | nn.Module] | None = None
    evaluations: int = 0

    @property
    def key(self) -> str:
        return f"{self.label}, {self.budget}"

    @property
    def grid(self) -> list[float]:
        """Three learning rates that cut the range into quarters on a logarithmic scale."""
        return self._cut(1, 2, 3)

    @property
    def lower(self) -> list[float]:
        """The next two below the grid."""
        return self._cut(0, -1)

    @property
    def ladder(self) -> list[float]:
        """All of these and the upper end of the range, the lowest first."""
        return self._cut(-1, 0, 1, 2, 3, 4)

    def _cut(self, *quarters: int) -> list[float]:
        low, high = self.rates
        return [float(f"{low * (high / low) ** (quarter / 4):.2g}") for quarter in quarters]


def own(method: pt.Method | Callable[[int], pt.Method], label: str = "", budget: str = OWN, **options: Any) -> Entry:
    """A row of petiole's. Methods whose fields depend on the length of the run come as a function of the steps."""
    make = method if callable(method) and not isinstance(method, pt.Method) else lambda steps: method
    example = make(200)
    fields = {n: v for n, v in example.model_dump().items() if v != type(example).model_fields[n].default}
    about = ", ".join(f"{name}={value}" for name, value in fields.items())
    rates = type(example).learning_rates

    def put(model: nn.Module, steps: int) -> pt.Adaptation:
        return pt.attach(model, make(steps), seed=torch.initial_seed())  # of the run

    return Entry(label or example.slug, budget, put, rates, about, **options)


def peer(
    label: str,
    budget: str,
    config: Callable[[list[str], list[str]], Any],
    rates: tuple[float, float],
    roles: Sequence[str],
    about: str,
) -> Entry:
    """A row of PEFT's; `config` is given the paths of the sites and of the heads."""
    import peft

    def put(model: nn.Module, steps: int) -> nn.Module:
        found = pt.anatomy(model)
        heads = [site.path for site in found.heads()]
        made = config([site.path for site in found.sites(roles)], heads)
        return peft.get_peft_model(model, made)

    return Entry(label, budget, put, rates, about)


def trained(model: nn.Module, method: pt.Method) -> int:
    """What a method trains on a model, its task head apart; counted without attaching it."""
    made = planned(model, [method], pt.anatomy(model), 0, False)
    values = dict(model.named_parameters())
    return sum(p.numel() for p in parameters_of(made) if p.requires_grad) + sum(values[n].numel() for n in made.trained)


def sized(method: pt.Method, size: int) -> pt.Method:
    """The method with another main size, and the same scale: alpha goes with the size."""
    fields = method.model_dump(exclude_unset=True)
    alpha, before = getattr(method, "alpha", None), getattr(method, method.size)
    if alpha is not None and before:
        fields["alpha"] = alpha * size / before
    return type(method)(**{**fields, method.size: size})


def within(model: nn.Module, method: pt.Method, budget: int) -> pt.Method | None:
    """The method with the largest main size that trains at most `budget` parameters; None if there is none.

    Args:
        model: on the meta device.
    """
    known: dict[int, float] = {}

    def count(size: int) -> float:
        if size not in known:
            try:
                known[size] = trained(model, sized(method, size))
            except PetioleError:
                known[size] = math.inf
        return known[size]

    low, high = 0, 1
    while count(high) <= budget and high < 1 << 16:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) <= budget else (low, middle)
    return sized(method, low) if low else None


def reduced(model: nn.Module, method: pt.Method, field: str, budget: int) -> pt.Method | None:
    """The method with the smallest factor, by which `field` divides the width, that trains at most `budget`; None if there is none.

    Args:
        model: on the meta device.
    """
    fields = method.model_dump(exclude_unset=True)
    for factor in range(1, 1 << 10):
        smaller = type(method)(**{**fields, field: factor})
        try:
            if trained(model, smaller) <= budget:
                return smaller
        except PetioleError:  # does not divide, or leaves nothing
            continue
    return None


# -------------------------------------------------------------------------------------------------------------------- settings


@dataclass
class Setting:
    """A backbone and a data set, and how long is trained.

    Attributes:
        data: as `load_data` takes it. limit: rows of each split at most.
        rates: name of the setting whose learning rates are taken, searched for this backbone there; "" to search here.
        climbs: from those rates it goes on to higher ones, as long as validation gains: a head of many classes, which learns at the same
            rate, may want more.
        confirms: the best rate has to be the best with a second seed, too, in the mean of both; for methods that break with some seeds.
        options: of the task. make: the task itself, where it is no data set as `load_data` takes one.
        precision: of training and scoring, as in `Recipe`. Costs are measured in float32 everywhere.
    """

    name: str
    title: str
    model: str
    data: str
    steps: int
    limit: Mapping[str, int] = field(default_factory=dict)
    batch_size: int = 16
    rates: str = ""
    climbs: bool = False
    confirms: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    make: Callable[[], Task] | None = None
    precision: Literal["fp32", "bf16"] = "fp32"

    @cached_property
    def task(self) -> Task:
        if self.make is not None:
            return self.make()
        return prepare(
            load_data(self.data, limit=dict(self.limit) or None, test_fraction=0.2), self.model, **self.options
        )

    @cached_property
    def backbones(self) -> dict[int, nn.Module]:
        return {}

    def backbone(self, seed: int) -> nn.Module:
        """A copy of the backbone with the head of a seed, frozen."""
        if seed not in self.backbones:
            self.backbones[seed] = self.task.build_model(seed=seed).requires_grad_(False)
        return copy.deepcopy(self.backbones[seed])

    def batch(self) -> Mapping[str, Any]:
        rows = self.task.encoded("train")
        return self.task.collator([rows[i] for i in range(self.batch_size)])


def run(setting: Setting, entry: Entry, learning_rate: float, seed: int, split: str) -> Line:
    """Train one, and score it on a split."""
    recipe = Recipe(steps=setting.steps, batch_size=setting.batch_size, precision=setting.precision)
    model = setting.backbone(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # of all new parameters
        made = entry.put(model, setting.steps)
    model = made.model if isinstance(made, pt.Adaptation) else made
    curve: list[list[float]] = []
    start = time.perf_counter()
    with entry.around(model):
        if isinstance(made, pt.Adaptation):
            evaluations = entry.evaluations if split == "test" else 0
            course = train(made, setting.task, recipe, learning_rate=learning_rate, seed=seed, evaluations=evaluations)
            curve = course.scores
        else:
            by_transformers(model, setting.task, recipe, learning_rate, seed)
        seconds = time.perf_counter() - start
        with torch.autocast("cpu", torch.bfloat16, enabled=setting.precision == "bf16"):
            found = setting.task.evaluate(model, split, batch_size=64)
    score = measured(found, split)[setting.task.main_metric]
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    line = {"score": score, "seconds": round(seconds, 2), "trained": count, "learning_rate": learning_rate}
    return {**line, "curve": curve} if curve else line


def by_transformers(model: nn.Module, task: Task, recipe: Recipe, learning_rate: float, seed: int) -> None:
    """The same recipe for a model that another library made."""
    from transformers import PrinterCallback, Trainer

    with tempfile.TemporaryDirectory() as scratch:
        args = arguments(recipe, recipe.steps or 1, learning_rate, seed, scratch)
        trainer = Trainer(model, args, train_dataset=task.encoded("train"), data_collator=task.collator)
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def ready(setting: Setting, entry: Entry) -> tuple[nn.Module, pt.Adaptation | nn.Module]:
    """A model to measure, as it is when training begins, and what was put on it."""
    made = (entry.lean or entry.put)(setting.backbone(0), setting.steps)
    if isinstance(made, pt.Adaptation):
        made.calibrate([setting.batch()])
        return made.model.train(), made
    return made.train(), made


def cost(setting: Setting, entry: Entry) -> Line:
    """What is kept for a backward pass, and what a file takes. Times are taken by `steps`, all rows in turn."""
    model, made = ready(setting, entry)
    heads = [site.path for site in pt.anatomy(setting.backbone(0)).heads()]
    with entry.around(model):
        found = measure(model, setting.batch(), repeats=1, warmup=0)
    own_heads = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and any(h in n for h in heads))
    with tempfile.TemporaryDirectory() as scratch:
        if isinstance(made, pt.Adaptation):
            made.save(Path(scratch) / "adaptation.safetensors")
        else:
            made.save_pretrained(scratch)  # type: ignore[operator]
        size = sum(path.stat().st_size for path in Path(scratch).glob("*.safetensors"))
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"saved": found.saved_bytes, "file": size, "trained": count, "head": own_heads}


def steps(setting: Setting, entries: Sequence[Entry], repeats: int) -> dict[str, float]:
    """Seconds of a training step of each, in turn, round after round: medians."""
    candidates: dict[str, Callable[[], None]] = {}
    batch = setting.batch()
    for entry in entries:
        model, _ = ready(setting, replace(entry, lean=None))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

        def step(model: nn.Module = model, optimizer: Any = optimizer, entry: Entry = entry) -> None:
            with entry.around(model):
                model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        candidates[entry.key] = step
    times = common.interleaved(candidates, repeats)
    return {name: statistics.median(values) for name, values in times.items()}


# ------------------------------------------------------------------------------------------------------------------------ lines


class Lines:
    """Results, one a line, written as they come; several processes may write different settings to files of their own."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}.jsonl"
        self.known: dict[str, Line] = {}
        if self.path.exists():
            for text in self.path.read_text().splitlines():
                try:
                    line = json.loads(text)
                except json.JSONDecodeError:  # cut off when the run was stopped
                    continue
                self.known[line["key"]] = line

    def get(self, key: str, work: Callable[[], Line]) -> Line:
        """What is known under a key, or comes of the work. A failure is kept as one, with its reason."""
        if key not in self.known:
            try:
                found = work()
            except Exception as error:
                found = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
            self.known[key] = {"key": key, **found}
            with self.path.open("a") as file:
                file.write(json.dumps(self.known[key]) + "\n")
            print(f"{key}: { {k: v for k, v in found.items() if k != 'key'} }", flush=True)
        return self.known[key]


def study(setting: Setting, entries: Sequence[Entry], seeds: int, lines: Lines, others: Lines | None = None) -> None:
    """Everything of one setting that is not known yet.

    Args:
        others: of the setting that learning rates are taken from, if they are not searched here.
    """
    for entry in entries:
        lines.get(f"{entry.key} | cost", lambda entry=entry: cost(setting, entry))
    for entry in entries:
        rate = searched(setting, entry, lines) if others is None else chosen(entry, others)
        if setting.climbs and rate is not None:
            rate = climbed(setting, entry, lines, rate)
        for seed in range(1, seeds + 1):
            if rate is not None:
                key = f"{entry.key} | seed {seed}"
                if lines.known.get(key, {}).get("learning_rate", rate) != rate:
                    del lines.known[key]
                lines.get(key, lambda entry=entry, seed=seed, rate=rate: run(setting, entry, rate, seed, "test"))


def trial(setting: Setting, entry: Entry, lines: Lines, rate: float) -> Line:
    """What a learning rate scores on validation, with the first seed of a search."""
    return lines.get(f"{entry.key} | lr {rate:g}", lambda: run(setting, entry, rate, 0, "validation"))


def climbed(setting: Setting, entry: Entry, lines: Lines, start: float) -> float | None:
    """The learning rate before the first that scores no better on validation than the one below it."""
    best = -math.inf
    for rate in [rate for rate in entry.ladder if rate >= start]:
        score = trial(setting, entry, lines, rate).get("score", -math.inf)
        if score <= best:
            break
        best = score
    return chosen(entry, lines)


def searched(setting: Setting, entry: Entry, lines: Lines) -> float | None:
    """The learning rate that scores best on validation; None where none could be trained."""
    for rate in entry.grid:
        trial(setting, entry, lines, rate)
    for rate in entry.lower:
        if chosen(entry, lines) == min(tried(entry, lines), default=None):
            trial(setting, entry, lines, rate)
    confirmed: set[float | None] = {None}
    while setting.confirms and (best := chosen(entry, lines)) not in confirmed:
        confirmed.add(best)
        lines.get(f"{entry.key} | lr {best:g} again", lambda best=best: run(setting, entry, best, AGAIN, "validation"))
    return chosen(entry, lines)


AGAIN = 1000  # the second seed of a search


def tried(entry: Entry, lines: Lines) -> dict[float, float]:
    """Scores on validation by learning rate, in the mean where there are several."""
    mark, found = f"{entry.key} | lr ", dict[float, list[float]]()
    for key, line in lines.known.items():
        if key.startswith(mark) and "score" in line:
            found.setdefault(line["learning_rate"], []).append(line["score"])
    return {rate: statistics.mean(scores) for rate, scores in found.items()}


def chosen(entry: Entry, lines: Lines) -> float | None:
    """The best of the learning rates that were tried; None where none could be trained."""
    scores = tried(entry, lines)
    return max(scores, key=lambda rate: (scores[rate], rate)) if scores else None


# ----------------------------------------------------------------------------------------------------------------------- report


def summary(entry: Entry, lines: Lines) -> Line:
    """A row of the table: test scores over seeds, and costs."""
    runs = [v for k, v in lines.known.items() if k.startswith(f"{entry.key} | seed") and "score" in v]
    scores = [line["score"] for line in runs]
    costs = lines.known.get(f"{entry.key} | cost", {})
    count = runs[-1]["trained"] if runs else costs.get("trained")  # at the end: ranks may have grown
    failed = next((v["failed"] for k, v in lines.known.items() if k.startswith(f"{entry.key} |") and "failed" in v), "")
    return {
        "label": entry.label,
        "budget": entry.budget,
        "about": entry.about,
        "seeds": len(scores),
        "failed": failed,
        "mean": statistics.mean(scores) if scores else None,
        "sd": statistics.stdev(scores) if len(scores) > 1 else None,
        "trained": count - costs["head"] if count is not None and costs else None,
        "saved": costs.get("saved"),
        "file": costs.get("file"),
    }


def table(settings: Sequence[Setting], rows: Sequence[Sequence[Line]], times: Mapping[str, float], base: str) -> str:
    """One Markdown table: a row for each entry, scores by setting; time, saved bytes and file as in the first text setting.

    Args:
        rows: by setting, then by entry, the same entries in each. times: seconds of a step over those of the row `base`.
    """
    from petiole.compare.table import quantity, score

    head = ["method", "configuration", *(s.title for s in settings), "trained", "step", "saved", "file"]
    about = (
        settings.index(next(s for s in settings if s.name in SHOWN)) if any(s.name in SHOWN for s in settings) else 0
    )
    saved = {line["label"] + line["budget"]: line["saved"] for line in rows[about]}
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "--:|" * (len(head) - 2)]
    order = sorted(range(len(rows[0])), key=lambda i: -overall(rows, i))
    for i in order:
        line = rows[about][i]
        key = f"{line['label']}, {line['budget']}"
        cells = [line["label"], line["about"].replace("|", "/") or "–"]
        cells += ["failed" if r[i]["failed"] else score(r[i]["mean"], r[i]["sd"], percent=True) for r in rows]
        share = (
            line["saved"] / saved[base.replace(", ", "")]
            if line["saved"] and saved.get(base.replace(", ", ""))
            else None
        )
        cells += [quantity(line["trained"]), f"{times[key]:.2f}" if key in times else "–"]
        cells += [f"{share:.2f}" if share else "–", quantity(line["file"], "B")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def overall(rows: Sequence[Sequence[Line]], i: int) -> float:
    """The mean score of a row over the settings that it was trained in."""
    return statistics.mean([r[i]["mean"] for r in rows if r[i]["mean"] is not None] or [0.0])


SHOWN = ("trec6",)  # whose costs stand in the table
BROKEN = 0.45  # of the best score in a panel: what is below stands at its edge, as a number


def picture(settings: Sequence[Setting], rows: Sequence[Sequence[Line]], peers: Sequence[str], path: Path) -> None:
    """A panel for each setting, a line for each method: filled at the equal budget, hollow at its own default; bars are one sd.

    What a training broke stands at the left edge, as a number.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(line["label"] for line in rows[0]))
    best = {n: max(overall(rows, i) for i, line in enumerate(rows[0]) if line["label"] == n) for n in names}
    names.sort(key=lambda n: best[n])
    figure, panels = pyplot.subplots(
        1,
        len(settings),
        figsize=(3.1 * len(settings) + 1.2, 0.3 * len(names) + 1.4),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for ax, setting, lines in zip(panels[0], settings, rows, strict=True):
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.grid(axis="y", color="#e5e5e5", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.tick_params(axis="y", length=0, labelsize=9)
        best_here = max(line["mean"] or 0.0 for line in lines)
        for line in lines:
            if line["mean"] is None:
                continue
            equal, colour = line["budget"] == EQUAL, "#D55E00" if line["label"] in peers else "#0072B2"
            y = names.index(line["label"]) + (0.12 if equal else -0.12)
            if line["mean"] < BROKEN * best_here:  # would squeeze all others
                edge = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 8}
                ax.annotate(f"◂ {100 * line['mean']:.0f}", (0.005, y), color=colour, **edge)
                continue
            ax.errorbar(
                100 * line["mean"],
                y,
                xerr=100 * (line["sd"] or 0),
                fmt="o" if equal else "s",
                color=colour,
                elinewidth=1,
                markersize=5.5,
                markerfacecolor=colour if equal else "white",
                markeredgewidth=1.3,
            )
        ax.set_yticks(range(len(names)), names)
        ax.set_title(setting.title, fontsize=10, loc="left")
        ax.set_xlabel(f"{setting.task.main_metric} on test (%), mean ± sd", fontsize=9)
    marks = [
        pyplot.Line2D([], [], marker=m, linestyle="", color="#444444", markerfacecolor=f, markersize=5.5)
        for m, f in (("o", "#444444"), ("s", "white"))
    ]
    figure.legend(
        marks, [EQUAL, "own default, or another size"], loc="outside lower right", ncols=2, frameon=False, fontsize=9
    )
    figure.savefig(path, dpi=150, metadata={"Software": None})
    pyplot.close(figure)


BEGIN, END = "<!-- tables -->\n", "<!-- /tables -->"


Studied = tuple[Setting, Sequence[Entry], "Lines"]


def report(found: Sequence[Studied], asked: argparse.Namespace, page: Path, peers: Sequence[str]) -> None:
    """Write the tables of a page, between its marks, and its picture. What isn't done, or has no place on a backbone, has no figures."""
    chosen = [setting for setting, _, _ in found]
    known = [{entry.key: summary(entry, lines) for entry in entries} for _, entries, lines in found]
    every: dict[str, Line] = {key: line for lines in reversed(known) for key, line in lines.items()}
    whole = [{k: line for k, line in r.items() if line["seeds"] == asked.seeds or line["failed"]} for r in known]
    done = [key for key in every if any(key in r for r in whole)]
    rows = [
        [
            r.get(key) or dict.fromkeys(every[key]) | {n: every[key][n] for n in ("label", "budget", "about")}
            for key in done
        ]
        for r in whole
    ]
    picture(chosen, rows, peers, page.parent / "images" / f"{page.stem}.png")
    times = dict[str, float]()
    for setting in chosen:
        timed = asked.output / f"{setting.name}-times.json"
        if setting.name in SHOWN and timed.exists():
            seconds = json.loads(timed.read_text())
            times = {name: value / seconds[BASE] for name, value in seconds.items()}
    tables = []
    for title, equal in (("## At one budget", True), ("## At their own defaults", False)):
        # LoRA's default is the budget, so it stands in both.
        part = [
            [x for x in lines if (x["budget"] == EQUAL) == equal or x["label"] in ("lora", "PEFT LoRA")]
            for lines in rows
        ]
        tables.append(f"{title}\n\n{table(chosen, part, times, BASE)}\n")
    text = page.read_text() if page.exists() else f"{BEGIN}{END}"
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    versions = ", ".join(f"{name} {number}" for name, number in common.versions("peft").items())
    page.write_text(f"{text[:begin]}\n{versions}; {asked.seeds} seeds.\n\n" + "\n".join(tables) + text[end:])
    common.write(asked.json, {setting.name: lines for setting, lines in zip(chosen, rows, strict=True)})


def main(
    asked: argparse.Namespace,
    settings: Sequence[Setting],
    entries: Callable[[Setting], Iterable[Entry]],
    write: Callable[[Sequence[Studied]], None],
) -> None:
    """Train, time or report, as was asked for."""
    found: list[Studied] = []
    for setting in settings:
        if asked.only and setting.name not in asked.only.split(","):
            continue
        rows = [row for row in entries(setting) if not asked.rows or row.label in asked.rows.split(";")]
        lines = Lines(asked.output, setting.name)
        found.append((setting, rows, lines))
        if asked.time:
            common.write(asked.output / f"{setting.name}-times.json", steps(setting, rows, asked.repeats))
        elif not asked.report:
            study(setting, rows, asked.seeds, lines, Lines(asked.output, setting.rates) if setting.rates else None)
    if asked.report:
        write(found)


def side_by_side(
    asked: argparse.Namespace,
    settings: Sequence[Setting],
    entries: Callable[[nn.Module], Iterable[Entry]],
    page: Path,
    peers: Sequence[str],
) -> None:
    """`main` for a family with a page of its own; its rows depend on the backbone, on the meta device."""
    main(
        asked,
        settings,
        lambda setting: entries(setting.task.empty_model()),
        lambda found: report(found, asked, page, peers),
    )


def options(about: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    parser.add_argument("--output", type=Path, required=True, help="folder in which results are kept")
    parser.add_argument("--only", default="", help="comma-separated names of settings")
    parser.add_argument("--rows", default="", help="labels of rows, separated by semicolons")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=10, help="timed rounds of a step; 0 for none")
    parser.add_argument(
        "--time", action="store_true", help="time the steps, and train nothing; leave the machine alone"
    )
    parser.add_argument("--report", action="store_true", help="write the page and the picture from what is known")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here, as one JSON object")
    found = parser.parse_args()
    torch.set_num_threads(found.threads)
    return found
