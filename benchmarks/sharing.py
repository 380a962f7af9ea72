"""Two claims about adapters of several tasks, on four sets of text with MiniLM: SST-2, MR, SUBJ and TREC-6.

One adapter for all tasks against one for each, or one half shared: trained together, the tasks mixed in each batch. And adapters of three
tasks that are added up with a learned scale each (ScaLearn) or weighed at every token (AdapterFusion), for the fourth with few rows; what
starts anew stands beside. bfloat16 autocast, three seeds; `--report` writes both tables into docs/adapters.md.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from family import Lines

import petiole as pt
from petiole.tasks import load_data, prepare
from petiole.tasks.multitask import MultiTaskText, train_sources, transfer
from petiole.tune import Recipe, train

TASKS = ("sst2", "mr", "subj", "trec6")
SOURCES, TARGET, SHOTS = ("sst2", "subj", "trec6"), "mr", (4, 16)
RATE = 3e-3
PAGE = Path(__file__).resolve().parents[1] / "docs" / "adapters.md"
BEGIN, END = "<!-- sharing -->\n", "<!-- /sharing -->"


def text(data: Path) -> MultiTaskText:
    sets = "+".join(str(data / "text" / name) for name in TASKS)
    rows = load_data(sets, limit={"train": 3000, "validation": 100, "test": 500})
    return prepare(rows, "petiole:minilm", max_length=40, sampling="uniform")  # type: ignore[return-value]


def recipe(steps: int) -> Recipe:
    return Recipe(steps=steps, batch_size=16, precision="bf16")


def scored(task: MultiTaskText, model: Any) -> dict[str, float]:
    with torch.autocast("cpu", torch.bfloat16):
        return task.evaluate(model, "test", batch_size=64)


def together(task: MultiTaskText, make: Callable[[], pt.Method], rate: float, seed: int) -> dict[str, Any]:
    """All tasks on one backbone."""
    tuned = pt.attach(task.build_model(seed=seed).requires_grad_(False), make(), seed=seed)
    train(tuned, task, recipe(200), learning_rate=rate, seed=seed)
    heads = sum(p.numel() for n, p in tuned.model.named_parameters() if p.requires_grad and "head" in n)
    count = sum(p.numel() for p in tuned.model.parameters() if p.requires_grad)
    return {"scores": scored(task, tuned.model), "trained": count - heads}


def shared(data: Path, lines: Lines, seeds: int) -> None:
    kinds: Mapping[str, tuple[Callable[[], pt.Method], float]] = {  # the method's own learning rate; 3e-3 breaks it
        "one for all": (lambda: pt.VLAdapter(tasks=TASKS), 1e-3),
        "down-projections shared": (lambda: pt.VLAdapter(tasks=TASKS, sharing="half_down"), 1e-3),
        "one for each": (lambda: pt.VLAdapter(tasks=TASKS, sharing="multiple"), 1e-3),
        "head only": (pt.LinearProbe, 1e-2),
    }
    task = text(data)
    for name, (make, rate) in kinds.items():
        for seed in range(1, seeds + 1):
            lines.get(f"together | {name} | {seed}", partial(together, task, make, rate, seed))


def built_on(task: MultiTaskText, model: Any, method: pt.Method, shots: int, rate: float, seed: int) -> dict[str, Any]:
    tuned = transfer(task, model, TARGET, method, learning_rate=rate, shots=shots, recipe=recipe(60), seed=seed)
    found = scored(task.only(TARGET), model)
    count = sum(
        p.numel() for n, p in model.named_parameters() if tuned.name in n and "head" not in n and p.requires_grad
    )
    tuned.detach()
    return {"score": found[TARGET], "trained": count}


def transferred(data: Path, lines: Lines, seeds: int) -> None:
    kinds: Mapping[str, tuple[Callable[[], pt.Method], float]] = {
        "scalearn": (lambda: pt.ScaLearn(sources=SOURCES), 6e-3),
        "scalearn, one scale each": (lambda: pt.ScaLearn(sources=SOURCES, granularity="scalar", share_layers=True), 6e-3),
        "adapterfusion": (lambda: pt.AdapterFusion(sources=SOURCES), 1e-3),
        "pfeiffer": (pt.PfeifferAdapter, RATE),
        "head only": (pt.LinearProbe, 1e-2),
    }  # fmt: skip
    task = text(data)
    for seed in range(1, seeds + 1):
        keys = {(name, shots): f"transfer | {name}, {shots} | {seed}" for name in kinds for shots in SHOTS}
        if all(key in lines.known for key in keys.values()):
            continue
        model = task.build_model(seed=seed).requires_grad_(False)
        train_sources(task, model, SOURCES, pt.PfeifferAdapter(), learning_rate=RATE, recipe=recipe(100), seed=seed)
        for (name, shots), key in keys.items():
            make, rate = kinds[name]
            lines.get(key, partial(built_on, task, model, make(), shots, rate, seed))


def report(lines: Lines) -> None:
    from petiole.compare.table import quantity, score

    def rows(start: str) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {}
        for key, line in lines.known.items():
            kind, name, _ = key.split(" | ")
            if kind == start and "failed" not in line:
                found.setdefault(name, []).append(line)
        return found

    def cell(values: list[float]) -> str:
        return score(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None, percent=True)

    names = ("task_mean", *TASKS)
    table = ["| adapters | " + " | ".join(names).replace("task_mean", "mean") + " | trained |", "|---|" + "--:|" * 6]
    for name, runs in rows("together").items():
        cells = [cell([run["scores"][key] for run in runs]) for key in names]
        table.append(f"| {name} | " + " | ".join(cells) + f" | {quantity(runs[0]['trained'])} |")
    table += ["", "| for MR | " + " | ".join(f"{n} rows a class" for n in SHOTS) + " | trained |", "|---|--:|--:|--:|"]
    found = rows("transfer")
    for name in dict.fromkeys(key.rpartition(", ")[0] for key in found):
        parts = [found[f"{name}, {n}"] for n in SHOTS]
        cells = [cell([run["score"] for run in runs]) for runs in parts]
        table.append(f"| {name} | " + " | ".join(cells) + f" | {quantity(parts[0][0]['trained'])} |")
    page = PAGE.read_text()
    page += "" if BEGIN in page else f"\n{BEGIN}{END}\n"
    begin, end = page.index(BEGIN) + len(BEGIN), page.index(END)
    PAGE.write_text(page[:begin] + "\n" + "\n".join(table) + "\n\n" + page[end:])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    parser.add_argument("--output", type=Path, required=True, help="folder in which results are kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--report", action="store_true", help="write the tables from what is known")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here, as one JSON object")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    lines = Lines(asked.output, "sharing")
    if not asked.report:
        transferred(asked.data, lines, asked.seeds)
        shared(asked.data, lines, asked.seeds)
    else:
        report(lines)
    common.write(asked.json, lines.known)
