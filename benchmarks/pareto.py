"""What saving costs in score: methods that cut memory and compute beside full fine-tuning and LoRA, on real tasks.

MiniLM on TREC-6 and SST-2, the shipped ViT on digits, a small T5 on a text-to-text task. For every method its score on test, the bytes kept
for backward, and how long it takes to 95 % of full fine-tuning's score on validation: steps until then, times the time of a step, which
`--time` measures by itself. `--report` writes the table and the Pareto fronts from what was run.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import family
from family import Entry, Line, Lines, Setting, Studied, own
from small_t5 import small_t5

import petiole as pt
from petiole.errors import PetioleError
from petiole.method import find

CLOSE = 0.95  # of full fine-tuning's score
EVALUATIONS = 8
LOWEST = 0.8  # of the best score in a panel: what is below is written at its edge
PAGE = Path(__file__).resolve().parents[1] / "docs" / "savings.md"
BEGIN, END = "<!-- pareto -->\n", "<!-- /pareto -->"


def settings(data: Path, output: Path, only: str) -> list[Setting]:
    text, rows = data / "text", {"validation": 200, "test": 600}
    found = [
        Setting("trec6", "MiniLM, TREC-6", "petiole:minilm", str(text / "trec6"), 180, rows, precision="bf16"),
        Setting("sst2", "MiniLM, SST-2", "petiole:minilm", str(text / "sst2"), 120, {"train": 4000, "validation": 100, "test": 500},
                rates="trec6", precision="bf16"),
        Setting("digits", "ViT, digits", "petiole:vit-cifar10", "sklearn:digits", 120, precision="bf16"),
    ]  # fmt: skip
    if not only or "t5" in only.split(","):
        model, sentences = small_t5(output)
        scored = {"main_metric": "token_accuracy", "generate": False}
        found.append(
            Setting(
                "t5",
                "small T5, two languages into one",
                str(model),
                str(sentences),
                240,
                options=scored,
                precision="bf16",
            )
        )
    return [setting for setting in found if not only or setting.name in only.split(",")]


def rows_of(setting: Setting) -> Iterator[Entry]:
    """Those methods that have a place on the backbone."""
    vision, text = setting.name == "digits", setting.name != "digits"
    methods: dict[str, pt.Method] = {
        "full": pt.FullFineTuning(),
        "linear-probe": pt.LinearProbe(),
        "lora": pt.LoRA(),
        "lora, all linears": pt.LoRA(roles=common.LINEARS),
        "lst": find("lst")(),
        "unipt": find("unipt")(),
        "sherl": find("sherl")(),
        "meft": find("meft")(),
        "meft, variant 3": find("meft")(variant=3),
    }
    if vision:
        methods |= {"hst": find("hst")(), "pyra": find("pyra")(schedule="low")}
    if text:
        methods |= {"apt": find("apt")(), "prompt-tuning": pt.PromptTuning(length=20), "dept": find("dept")()}
    for label, method in methods.items():
        try:
            pt.attach(setting.task.empty_model(), method)
        except PetioleError as error:
            print(f"{setting.name}: {label} left out: {' '.join(str(error).split())[:140]}", flush=True)
            continue
        yield replace(own(method, label), evaluations=EVALUATIONS)


# ----------------------------------------------------------------------------------------------------------------------- report


def arrival(lines: Lines, entry: Entry, goal: float) -> float | None:
    """Steps until the mean validation score of all seeds has reached a goal; None if it never has."""
    curves = [
        line["curve"] for key, line in lines.known.items() if key.startswith(f"{entry.key} | seed") and "curve" in line
    ]
    for points in zip(*curves, strict=True):
        if statistics.mean(score for _, score in points) >= goal:
            return float(points[0][0])
    return None


def final(lines: Lines, entry: Entry) -> float:
    """Validation score at the end, mean over seeds."""
    return statistics.mean(
        line["curve"][-1][1]
        for key, line in lines.known.items()
        if key.startswith(f"{entry.key} | seed") and "curve" in line
    )


def collected(setting: Setting, entries: Sequence[Entry], lines: Lines, output: Path) -> list[Line]:
    """Rows of one setting: score, bytes over full fine-tuning's, time to `CLOSE` of its score over its own time to there."""
    times: Mapping[str, float] = json.loads((output / f"{setting.name}-times.json").read_text())
    full = entries[0]
    goal = CLOSE * final(lines, full)
    saved, base = family.summary(full, lines)["saved"], arrival(lines, full, goal)
    found = []
    for entry in entries:
        line = family.summary(entry, lines)
        steps = arrival(lines, entry, goal)
        line["kept"] = line["saved"] / saved if line["saved"] is not None else None
        line["steps"] = steps
        line["arrival"] = steps * times[entry.key] / (base * times[full.key]) if steps and base else None
        found.append(line)
    return found


def front(rows: Sequence[Line], cost: str) -> list[Line]:
    """Rows that no other equals in score at the same cost or less, cheapest first."""
    found: list[Line] = []
    for line in sorted(
        (r for r in rows if r[cost] is not None and r["mean"] is not None), key=lambda r: (r[cost], -r["mean"])
    ):
        if not found or line["mean"] > found[-1]["mean"]:
            found.append(line)
    return found


def table(chosen: Sequence[Setting], found: Sequence[Sequence[Line]]) -> str:
    from petiole.compare.table import score

    names = list(dict.fromkeys(line["label"] for rows in found for line in rows))
    head = "| method | " + " | ".join(f"{s.title}: score | kept | to {CLOSE:.0%}" for s in chosen) + " |"
    text = [head, "|---|" + "--:|--:|--:|" * len(chosen)]
    for name in names:
        cells = []
        for rows in found:
            line = next((r for r in rows if r["label"] == name), None)
            if line is None or line["mean"] is None:
                cells += ["–", "–", "–"]
                continue
            marks = ["●" if line in front(rows, cost) else "" for cost in ("kept", "arrival")]
            cells += [score(line["mean"], line["sd"], percent=True)]
            cells += [f"{line['kept']:.2f} {marks[0]}".strip()]
            cells += [f"{line['arrival']:.2f} {marks[1]}".strip() if line["arrival"] is not None else "never"]
        text.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(text)


def picture(chosen: Sequence[Setting], found: Sequence[Sequence[Line]], path: Path) -> None:
    """A column for each setting: score against bytes above, against time below; the front as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes_of = (
        ("kept", "bytes kept for backward / full fine-tuning's"),
        ("arrival", f"time to {CLOSE:.0%} of its score / its own"),
    )
    figure, grid = pyplot.subplots(
        2, len(chosen), figsize=(4.2 * len(chosen), 7.2), layout="constrained", squeeze=False
    )
    for column, (setting, rows) in enumerate(zip(chosen, found, strict=True)):
        for panel, (cost, title) in zip(grid[:, column], axes_of, strict=True):
            points = [r for r in rows if r[cost] is not None and r["mean"] is not None]
            best = front(rows, cost)
            panel.step(
                [r[cost] for r in best],
                [100 * r["mean"] for r in best],
                where="post",
                color="#D55E00",
                linewidth=1.2,
                zorder=1,
            )
            floor = LOWEST * max(line["mean"] for line in points)
            below = 0
            for i, line in enumerate(sorted(points, key=lambda r: r[cost])):
                colour = "#D55E00" if line in best else "#0072B2"
                place = {"textcoords": "offset points", "fontsize": 7.5, "color": colour}
                if line["mean"] < floor:  # would squeeze all others: a number at the edge
                    text = f"{line['label']} {100 * line['mean']:.0f} ▾"
                    panel.annotate(text, (line[cost], 100 * floor), xytext=(0, 4 + 11 * below), ha="center", **place)
                    below += 1
                    continue
                panel.errorbar(line[cost], 100 * line["mean"], yerr=100 * (line["sd"] or 0), fmt="o", markersize=5.5, elinewidth=0.8,
                               color=colour, markerfacecolor=colour if line in best else "white")  # fmt: skip
                panel.annotate(
                    line["label"], (line[cost], 100 * line["mean"]), xytext=(4, (5, -11, 13, -19)[i % 4]), **place
                )
            if below:
                panel.set_ylim(bottom=100 * floor - 1)
            panel.margins(x=0.2)
            panel.spines[["top", "right"]].set_visible(False)
            panel.set_xscale("log")
            panel.grid(color="#eeeeee")
            panel.set_axisbelow(True)
            panel.set_xlabel(title, fontsize=9)
            panel.set_ylabel("score on test (%)", fontsize=9)
        grid[0, column].set_title(setting.title, fontsize=10, loc="left")
    figure.savefig(path, dpi=130, metadata={"Software": None})
    pyplot.close(figure)


def report(studied: Sequence[Studied], asked: Any) -> None:
    """Write the part of the page between its marks, and the picture."""
    chosen = [setting for setting, _, _ in studied]
    found = [collected(setting, entries, lines, asked.output) for setting, entries, lines in studied]
    picture(chosen, found, PAGE.parent / "images" / "pareto.png")
    versions = ", ".join(f"{name} {number}" for name, number in common.versions().items())
    page = PAGE.read_text()
    page += "" if BEGIN in page else f"\n{BEGIN}{END}"
    begin, end = page.index(BEGIN) + len(BEGIN), page.index(END)
    PAGE.write_text(f"{page[:begin]}\n{table(chosen, found)}\n\n{versions}; {asked.seeds} seeds.\n\n{page[end:]}")
    common.write(asked.json, {s.name: f for s, f in zip(chosen, found, strict=True)})


if __name__ == "__main__":
    asked = family.options(__doc__ or "")
    family.main(asked, settings(asked.data, asked.output, asked.only), rows_of, lambda found: report(found, asked))
