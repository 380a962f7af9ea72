"""The report of a comparison: results.json for programs, report.md with table, front and plots for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from petiole import files
from petiole.compare.plots import plots
from petiole.compare.search import FIRST
from petiole.compare.table import Column, Row, axes, columns, score, seconds

if TYPE_CHECKING:
    from petiole.compare.run import Comparison

PICTURES = {
    "loss.png": "training loss by step, mean over seeds",
    "learning.png": "validation score by step, mean over seeds",
}


def write(result: Comparison) -> None:
    """Write everything that follows from the trials into the folder."""
    asked = axes(result.settings.axes)
    files.write_json(result.folder / "results.json", result.to_dict())
    pictures = plots(
        result.rows,
        asked,
        result.title,
        percent=result.percent,
        higher_is_better=result.higher_is_better,
        folder=result.folder,
    )
    files.write_text(result.folder / "report.md", markdown(result, pictures))


def cells(result: Comparison) -> list[Column]:
    """The table as text."""
    return columns(
        result.rows,
        result.title,
        percent=result.percent,
        higher_is_better=result.higher_is_better,
        sizes=result.settings.size_search,
    )


def markdown(result: Comparison, pictures: Sequence[str]) -> str:
    """The report as one Markdown text."""
    front = [row.label for row in result.rows if row.front]
    names = ", ".join(axis.title.partition(" (")[0] for axis in axes(result.settings.axes))
    parts = [
        f"# {result.about['model']} on {result.settings.data}",
        headline(result),
        table(cells(result)),
        legend(result),
        "## Front",
        f"Nothing else is at least as good in {result.title} and in {names}, and better in one of them: {', '.join(front) or 'no row'}.",
        fronts(result),
    ]
    if remarks := notes(result.rows):
        parts += ["## Remarks", remarks]
    if pictures:
        parts += ["## Plots", *(f"![{describe(name)}]({name})\n\n{describe(name)}" for name in pictures)]
    parts += ["## What was run", setup(result), "## Again", f"```\n{result.command}\n```", files_of(result)]
    return "\n\n".join(part for part in parts if part) + "\n"


def headline(result: Comparison) -> str:
    """The first sentence: which row is best, and what it is held against."""
    best = next((row for row in result.rows if row.mean is not None), None)
    if best is None:
        return "No row has a score: every run failed. The remarks say why."
    words = [
        f"Best of {len(result.rows)} rows: **{best.label}**, {result.title} {score(best.mean, best.sd, result.percent)}"
    ]
    for label in ("full", "linear-probe", "bare"):
        row = next((row for row in result.rows if row.label == label), None)
        if row is not None and row.label != best.label and row.mean is not None:
            words.append(f"{label} {score(row.mean, row.sd, result.percent)}")
    return "; ".join(words) + "."


def table(parts: Sequence[Column]) -> str:
    """A Markdown table."""
    lines = [
        "| " + " | ".join(escape(c.title) for c in parts) + " |",
        "|" + "|".join("--:" if c.right else "---" for c in parts) + "|",
    ]
    lines += [
        "| " + " | ".join(escape(cell) for cell in row) + " |" for row in zip(*(c.cells for c in parts), strict=True)
    ]
    return "\n".join(lines)


def escape(text: str) -> str:
    return text.replace("|", "\\|")


def legend(result: Comparison) -> str:
    """What the columns are."""
    seeds = result.settings.seeds
    lines = [
        f"{result.title}: on the test split, mean ± sample standard deviation over {seeds} seed{'s' * (seeds != 1)}. "
        "learning rate: chosen by the search on the validation split. trials: of that search, the same number for every method. "
        "trained: parameters, the task head included. file: what a task needs beside the backbone. FLOPs: of one training run "
        "(a multiply-add counts two). saved: bytes kept from the forward for the backward pass of one batch. peak: most bytes alive at "
        "once in a training step, weights included. step: median time of a training step, in the row's quickest trial. total: all trials of the row. "
        "front: ● on the front of all axes asked for, ○ on the front of one axis alone.",
        "`bare` is the frozen backbone without training, with a head drawn at random where the task needs a new one; "
        "`linear-probe` trains the head alone."
        if any(row.reference for row in result.rows)
        else "",
    ]
    if any(row.forgetting is not None for row in result.rows):
        before = result.about["forgetting_before"]
        lines.append(
            f"held-out: change of the score on {result.about['forgetting']}, which the bare backbone does at {score(before, None, result.percent)}; "
            "what is below 0 was forgotten." if result.higher_is_better else
            f"held-out: change of the score on {result.about['forgetting']}, which the bare backbone does at {score(before, None, result.percent)}."
        )  # fmt: skip
    return "\n\n".join(line for line in lines if line)


def fronts(result: Comparison) -> str:
    """The front of each axis on its own."""
    lines = []
    for axis in axes(result.settings.axes):
        on = [row.label for row in result.rows if axis.name in row.fronts]
        lines.append(f"- against {axis.title.partition(' (')[0]} alone: {', '.join(on) or '–'}")
    return "\n".join(lines)


def notes(rows: Sequence[Row]) -> str:
    """Failures and the like, row by row."""
    return "\n".join(f"- {row.label}: {note}" for row in rows for note in row.notes)


def describe(name: str) -> str:
    """A caption."""
    if name in PICTURES:
        return PICTURES[name]
    axis = next(iter(axes([name.removeprefix("score-").removesuffix(".png")])))
    return f"score against {axis.title}; filled points and the dashed line are the front"


def setup(result: Comparison) -> str:
    """What was run, in words that hold on any machine."""
    s, identity, about = result.settings, result.identity, result.about
    versions = ", ".join(f"{name} {version}" for name, version in identity["versions"].items())
    extra = " and the main size among five values" if s.size_search else ""
    lines = [
        f"- backbone: {about['model']} ({identity['model']})",
        f"- data: {about['data']}",
        f"- training: {about['steps']} steps of {s.batch_size} rows, AdamW, weight decay {s.recipe.weight_decay}, "
        f"{100 * s.recipe.warmup:.0f} % linear warm-up and linear decay, gradients clipped to {s.recipe.max_grad_norm:g}, {s.precision}",
        f"- search: {s.trials} trials for each method over its learning rate{extra}; the first at {', '.join(f'{100 * f:.0f} %' for f in FIRST)} "
        "of the method's range on a log scale, then a tree-structured Parzen estimator (Optuna); chosen by the score on validation; seed 0",
        f"- runs: the chosen values with seeds {', '.join(map(str, s.run_seeds))} (head, new parameters, order of the rows); "
        "the test split is scored once in each and nowhere else",
        f"- device: {identity['device']}; {versions}",
        f"- time: {seconds(sum(row.total_seconds for row in result.rows))} in {result.trials} trials",
    ]
    return "\n".join(lines + [f"- note: {note}" for note in result.notes])


def files_of(result: Comparison) -> str:
    return (
        "The same command goes on where it was interrupted and repeats nothing. In this folder: `trials.jsonl` has a row for every trial, "
        "`results.json` the table as data, `adaptations/` the file of each method's first run, for `petiole eval` and `petiole merge`."
    )
