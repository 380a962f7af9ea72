"""The report of a comparison: results.json for programs, and one text for people, as Markdown and as an HTML page that needs no other file.

The text is made once, as a list of blocks; two small functions write them down.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from petiole import files
from petiole.compare.plots import plots
from petiole.compare.search import FIRST
from petiole.compare.table import Column, axes, columns, score, seconds

if TYPE_CHECKING:
    from petiole.compare.run import Comparison

PICTURES = {
    "loss.png": "Training loss by step, mean over seeds.",
    "learning.png": "Score on the validation split by step, mean over seeds.",
}


@dataclass(frozen=True)
class Block:
    """A piece of the report.

    Attributes:
        kind: what it is. text: of a heading, a paragraph, code, or a picture's caption. items: of a list.
        columns: of a table. file: of a picture.
    """

    kind: Literal["title", "heading", "text", "list", "table", "picture", "code"]
    text: str = ""
    items: list[str] = field(default_factory=list)
    columns: list[Column] = field(default_factory=list)
    file: str = ""


def write(result: Comparison) -> None:
    """Write everything that follows from the trials into the folder."""
    files.write_json(result.folder / "results.json", result.to_dict())
    pictures = plots(
        result.rows,
        axes(result.settings.axes),
        result.title,
        percent=result.percent,
        higher_is_better=result.higher_is_better,
        folder=result.folder,
    )
    made = blocks(result, pictures)
    files.write_text(result.folder / "report.md", markdown(made))
    files.write_text(result.folder / "report.html", page(made, result.folder))


# ----------------------------------------------------------------------------------------------------------------------- what it says


def blocks(result: Comparison, pictures: Sequence[str]) -> list[Block]:
    """The report from top to bottom."""
    remarks = [f"`{row.label}`: {note}" for row in result.rows for note in row.notes]
    made = [
        Block("title", f"{result.about['model']} on {result.settings.data}"),
        Block("text", headline(result)),
        Block("table", columns=cells(result)),
        *(Block("text", text) for text in legend(result)),
        Block("heading", "Front"),
        Block("text", whole_front(result)),
        Block("list", items=fronts(result)),
    ]
    if remarks:
        made += [Block("heading", "Remarks"), Block("list", items=remarks)]
    if pictures:
        made += [Block("heading", "Plots"), *(Block("picture", describe(name), file=name) for name in pictures)]
    made += [
        Block("heading", "What was run"),
        Block("list", items=setup(result)),
        Block("heading", "Again"),
        Block("code", result.command),
        Block(
            "text",
            "The same command goes on where it was interrupted and repeats nothing. In this folder: `trials.jsonl` has a row for every "
            "trial, `results.json` the table as data, `adaptations/` the file of each row's first run, for `petiole eval` and `petiole merge`.",
        ),
    ]
    return made


def cells(result: Comparison) -> list[Column]:
    """The table as text."""
    return columns(
        result.rows,
        result.title,
        percent=result.percent,
        higher_is_better=result.higher_is_better,
        sizes=result.settings.size_search,
    )


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


def legend(result: Comparison) -> list[str]:
    """What the columns are."""
    seeds = result.settings.seeds
    texts = [
        f"**{result.title}**: on the test split, mean ± sample standard deviation over {seeds} seed{'s' * (seeds != 1)}. "
        "**learning rate**: chosen by the search on the validation split. **trials**: of that search, the same number for every "
        "method. **trained**: parameters, the task head included. **file**: what a task needs beside the backbone. **FLOPs**: of one "
        "training run (a multiply-add counts two). **saved**: bytes kept from the forward for the backward pass of one batch. "
        "**peak**: most bytes alive at once in a training step, weights included. **step**: median time of a training step, in the "
        "row's quickest trial. **total**: all trials of the row. **front**: ● on the front of all axes asked for, ○ on the front of one "
        "axis alone.",
        "`bare` is the frozen backbone without training, with a head drawn at random where the task needs a new one; `linear-probe` "
        "trains the head alone.",
    ]
    if any(row.forgetting is not None for row in result.rows):
        before = score(result.about["forgetting_before"], None, result.percent)
        worse = "below" if result.higher_is_better else "above"
        texts.append(
            f"**held-out**: change of the score on {result.about['forgetting']}, which the bare backbone does at {before}; what is "
            f"{worse} 0 was forgotten."
        )
    return texts


def whole_front(result: Comparison) -> str:
    """The front of all axes, in a sentence."""
    names = ", ".join(axis.title for axis in axes(result.settings.axes))
    front = ", ".join(f"`{row.label}`" for row in result.rows if row.front) or "no row"
    return f"No other row is at least as good in {result.title} and in {names}, and better in one of them: {front}."


def fronts(result: Comparison) -> list[str]:
    """The front of each axis on its own."""
    lines = []
    for axis in axes(result.settings.axes):
        on = ", ".join(f"`{row.label}`" for row in result.rows if axis.name in row.fronts)
        lines.append(f"against {axis.title} alone: {on or '–'}")
    return lines


def describe(name: str) -> str:
    """A caption."""
    if name in PICTURES:
        return PICTURES[name]
    (axis,) = axes([name.removeprefix("score-").removesuffix(".png")])
    return f"Score against {axis.title}. Filled points and the dashed line are the front, bars one standard deviation."


def setup(result: Comparison) -> list[str]:
    """What was run, in words that hold on any machine."""
    s, identity, about = result.settings, result.identity, result.about
    versions = ", ".join(f"{name} {version}" for name, version in identity["versions"].items())
    extra = " and the main size among five values" if s.size_search else ""
    return [
        f"backbone: {about['model']} ({identity['model']})",
        f"data: {about['data']}",
        f"training: {about['steps']} steps of {s.batch_size} rows, AdamW, weight decay {s.recipe.weight_decay}, "
        f"{100 * s.recipe.warmup:.0f} % linear warm-up and linear decay, gradients clipped to {s.recipe.max_grad_norm:g}, {s.precision}",
        f"search: {s.trials} trials for each method over its learning rate{extra}; the first at "
        f"{', '.join(f'{100 * f:.0f} %' for f in FIRST)} of the method's range on a log scale, then a tree-structured Parzen estimator "
        "(Optuna); chosen by the score on validation; seed 0",
        f"runs: the chosen values with seeds {', '.join(map(str, s.run_seeds))} (head, new parameters, order of the rows); the test split "
        "is scored once in each and nowhere else",
        f"device: {identity['device']}; {versions}",
        f"time: {seconds(sum(row.total_seconds for row in result.rows))} in {result.trials} trials",
        *(f"note: {note}" for note in result.notes),
    ]


# -------------------------------------------------------------------------------------------------------------------- as Markdown


def markdown(made: Sequence[Block]) -> str:
    """Blocks as Markdown."""
    return "\n\n".join(map(in_markdown, made)) + "\n"


def in_markdown(block: Block) -> str:
    if block.kind == "table":
        heads = " | ".join(escape(column.title) for column in block.columns)
        rule = "|".join("--:" if column.right else "---" for column in block.columns)
        rows = zip(*(column.cells for column in block.columns), strict=True)
        return "\n".join([f"| {heads} |", f"|{rule}|", *(f"| {' | '.join(map(escape, row))} |" for row in rows)])
    if block.kind == "list":
        return "\n".join(f"- {item}" for item in block.items)
    if block.kind == "picture":
        return f"![{block.text}]({block.file})\n\n{block.text}"
    marks = {"title": "# ", "heading": "## "}
    return f"```\n{block.text}\n```" if block.kind == "code" else marks.get(block.kind, "") + block.text


def escape(text: str) -> str:
    return text.replace("|", "\\|")


# ------------------------------------------------------------------------------------------------------------------------ as HTML

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; text-align: left; white-space: nowrap; border-bottom: 1px solid #ddd }
th { border-bottom: 2px solid #888 } .r { text-align: right } .wide { overflow-x: auto }
code, pre { font-family: ui-monospace, monospace; font-size: 14px; background: #f4f4f4 }
pre { padding: .8rem; white-space: pre-wrap } figure { margin: 1.5rem 0 } img { max-width: 100%; height: auto }
figcaption, p.small { font-size: 14px; color: #555 }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #1b1b1b } th, td { border-color: #444 } code, pre { background: #2a2a2a }
  figcaption { color: #aaa } img { background: #fff; padding: .5rem }
}
"""


def page(made: Sequence[Block], folder: Path) -> str:
    """Blocks as one HTML page with its pictures inside; nothing is fetched from elsewhere."""
    body = "\n".join(in_html(block, folder) for block in made)
    title = html.escape(made[0].text)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def in_html(block: Block, folder: Path) -> str:
    if block.kind == "table":
        sides = [' class="r"' if column.right else "" for column in block.columns]
        heads = "".join(f"<th{s}>{html.escape(c.title)}</th>" for s, c in zip(sides, block.columns, strict=True))
        lines = []
        for row in zip(*(column.cells for column in block.columns), strict=True):
            lines.append("".join(f"<td{s}>{html.escape(cell)}</td>" for s, cell in zip(sides, row, strict=True)))
        rows = "\n".join(f"<tr>{line}</tr>" for line in lines)
        return f'<div class="wide"><table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>'
    if block.kind == "list":
        return "<ul>\n" + "\n".join(f"<li>{inline(item)}</li>" for item in block.items) + "\n</ul>"
    if block.kind == "picture":
        data = base64.b64encode(files.read_bytes(folder / block.file)).decode()
        text = html.escape(block.text)
        return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'
    tags = {"title": "h1", "heading": "h2", "text": "p", "code": "pre"}
    tag = tags[block.kind]
    return f"<{tag}>{html.escape(block.text) if block.kind == 'code' else inline(block.text)}</{tag}>"


def inline(text: str) -> str:
    """Text with **strong** and `code`, as HTML."""
    text = html.escape(text, quote=False)
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text))
