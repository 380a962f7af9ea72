"""Cranfield, searched: BM25, MiniLM as it comes, bi-encoders trained with four methods, and a reranker of what BM25 found.

One learning rate, the middle of the method's own range, and one seed: a look at the task on a slow machine, not a contest of methods. What is
done is kept in the output folder, and the same command goes on. `--report` writes the table into docs/tasks.md.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import torch

import petiole as pt
from petiole.tasks import METRICS, load_data, prepare
from petiole.tasks.retrieval import DenseRetrieval
from petiole.tasks.retrieval.task import Retrieval
from petiole.tune import Recipe, train

PAGE = Path(__file__).resolve().parents[1] / "docs" / "tasks.md"
BEGIN, END = "<!-- cranfield -->\n", "<!-- /cranfield -->"
MODEL, LENGTH = "petiole:minilm", 64
RECIPE = Recipe(steps=30, batch_size=8)
PART = 10  # queries that are ranked before what was found is kept


@dataclass(frozen=True)
class Row:
    """A line of the table: what is trained, on which task; nothing is, where there is no method."""

    title: str
    task: str = "dense-retrieval"
    method: pt.Method | None = None


ROWS = {
    "bm25": Row("BM25"),
    "bare": Row("MiniLM as it comes"),
    "full": Row("bi-encoder, full fine-tuning", method=pt.FullFineTuning()),
    "lora": Row("bi-encoder, LoRA", method=pt.LoRA()),
    "houlsby": Row("bi-encoder, adapters (Houlsby)", method=pt.HoulsbyAdapter()),
    "bitfit": Row("bi-encoder, BitFit", method=pt.BitFit()),
    "reranker": Row("BM25, first 100 reranked (full fine-tuning)", "reranking", pt.FullFineTuning()),
}


def task_of(row: Row, data: Path) -> Retrieval:
    source = load_data(data / "retrieval" / "cranfield", task=row.task, validation_fraction=0.1, test_fraction=0.3)
    task = prepare(source, MODEL, max_length=LENGTH, negatives=1 if row.task == "dense-retrieval" else 2)
    assert isinstance(task, Retrieval)
    return task


def trained(row: Row, task: Retrieval, file: Path) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The model of a row, trained now or before."""
    model = task.build_model(seed=1)
    if row.method is None:
        return model, {}
    about = file.with_name(f"{file.name.partition('.')[0]}-training.json")
    if file.exists():
        pt.load(model, file)
        return model, json.loads(about.read_text())
    low, high = row.method.learning_rates
    rate = float(f"{(low * high) ** 0.5:.2g}")
    tuned = pt.attach(model, row.method, seed=1)
    start = time.perf_counter()
    train(tuned, task, RECIPE, learning_rate=rate, seed=1)
    found = {"learning_rate": rate, "trained": tuned.trainable, "seconds": round(time.perf_counter() - start, 1)}
    about.write_text(json.dumps(found))
    tuned.save(file)
    return model, found


def scores(model: torch.nn.Module, task: Retrieval, file: Path) -> dict[str, float]:
    """Of a model on test. A reranker takes minutes, so what it found is kept as it goes."""
    rows = task.rows("test")
    if isinstance(task, DenseRetrieval):
        return task.evaluate(model, rows, batch_size=50)
    run = json.loads(file.read_text()) if file.exists() else {}
    for start in range(0, len(rows), PART):
        part = rows.select(range(start, min(start + PART, len(rows))))
        if not set(part["id"]) <= set(run):
            run |= task.rank(model, part, batch_size=50)
            file.write_text(json.dumps(run))
    return task.measure(run, rows)


def table(lines: dict[str, Any]) -> str:
    metrics = DenseRetrieval.metric_names
    head = ["", "trained", "learning rate", *(METRICS[name].title for name in metrics)]
    out = ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
    for name, row in ROWS.items():
        if name in lines:
            line = lines[name]
            about = [f"{line['trained']:,}", f"{line['learning_rate']:g}"] if "trained" in line else ["–", "–"]
            cells = [row.title, *about, *(f"{100 * line['scores'][metric]:.1f}" for metric in metrics)]
            out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    parser.add_argument("--output", type=Path, required=True, help="folder in which results are kept")
    parser.add_argument("--rows", default=",".join(ROWS), help="names of rows with commas between")
    parser.add_argument("--train-only", action="store_true", help="train and keep, and score another time")
    parser.add_argument("--report", action="store_true", help="write the table into the page")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    asked.output.mkdir(parents=True, exist_ok=True)
    done = asked.output / "scores.json"
    lines = json.loads(done.read_text()) if done.exists() else {}
    for name in asked.rows.split(","):
        if name in lines or asked.report:
            continue
        row = ROWS[name]
        task = task_of(row, asked.data)
        if name == "bm25":
            lines[name] = {"scores": task.baseline("test")}
        else:
            model, about = trained(row, task, asked.output / f"{name}.petiole.safetensors")
            if asked.train_only:
                continue
            lines[name] = {**about, "scores": scores(model, task, asked.output / f"{name}-run.json")}
        done.write_text(json.dumps(lines, indent=1))
        print(f"{name}: {lines[name]}", flush=True)
    print(table(lines))
    if asked.report:
        text = PAGE.read_text()
        begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
        versions = ", ".join(f"{name} {number}" for name, number in common.versions("bm25s").items())
        PAGE.write_text(f"{text[:begin]}\n{table(lines)}\n\n{versions}.\n\n{text[end:]}")


if __name__ == "__main__":
    main()
