"""Several sets of text as one task: joined rows, a head for each, rows drawn by task, figures by task, transfer to one with few rows."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import petiole as pt
from petiole import cli
from petiole.errors import ConfigError, DataError
from petiole.tasks import load_data, prepare
from petiole.tasks.metrics import METRICS, OTHERS
from petiole.tasks.multitask import MultiTaskModel, MultiTaskText, load_tasks, train_sources, transfer
from petiole.tune import Recipe, train
from tasks.makers import parquet

Models = dict[str, Path]
ANIMALS = {"cat": "the cat sat on one mat", "dog": "a dog ran"}
TASTE = {"bad": "not very good film", "good": "good film", "mixed": "good film bad film"}


def write(folder: Path, name: str, texts: dict[str, str], each: int, pairs: bool = False) -> None:
    for split, rows in (("train", each), ("dev", 2), ("test", 3)):
        records = [
            {"text": f"{text} {['one', 'two', 'three'][i % 3]}", "label": label}
            | ({"text_pair": "red ?"} if pairs else {})
            for i in range(rows)
            for label, text in texts.items()
        ]
        parquet(folder / f"{name}-{split}.parquet", records)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """animals: 2 classes, 8 rows to train on; taste: 3 classes, 36 rows."""
    write(tmp_path, "animals", ANIMALS, 4)
    write(tmp_path, "taste", TASTE, 12)
    return tmp_path


def both(folder: Path) -> str:
    return f"{folder}/animals+{folder}/taste"


@pytest.fixture
def task(folder: Path, models: Models) -> Any:
    return prepare(load_data(both(folder)), models["bert"])


def lively(task: Any) -> Any:
    """The task's model with weights so large that texts differ in what it gives."""
    model = task.build_model()
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.3 / parameter.std())
    return model


# ----------------------------------------------------------------------------------------------------------------------- data


def test_sets_are_joined_and_classes_named_after_their_task(folder: Path) -> None:
    data = load_data(both(folder))
    assert data.task == "multitask-text"
    assert data.label_names == ("animals/cat", "animals/dog", "taste/bad", "taste/good", "taste/mixed")
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 44, "validation": 10, "test": 15}
    for row in data.train:
        name = data.label_names[row["label"]]
        assert name.partition("/")[0] == ("animals", "taste")[row["task"]]
        assert row["text"].startswith({**ANIMALS, **TASTE}[name.partition("/")[2]])
    assert load_tasks([f"{folder}/animals", f"{folder}/taste"]).label_names == data.label_names
    named = load_tasks({"a": f"{folder}/animals", "b": f"{folder}/animals"}, limit={"train": 4})
    assert named.label_names == ("a/cat", "a/dog", "b/cat", "b/dog")
    assert Counter(named.train["task"]) == {0: 4, 1: 4}


def test_what_is_no_list_of_tasks_is_refused(folder: Path, models: Models) -> None:
    for call, message in (
        (lambda: load_tasks({"a": f"{folder}/animals"}), "one task"),
        (lambda: load_data(f"{folder}/animals+{folder}/animals"), "two tasks are called 'animals'"),
        (lambda: load_tasks({"a b": f"{folder}/animals", "c": f"{folder}/taste"}), "'a b' is no name"),
        (lambda: load_data(both(folder), task="causal-lm"), "causal-lm"),
        (lambda: load_data(both(folder), label_names=["x", "y"]), "label_names"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
    with pytest.raises(DataError, match=r"animal: no such file.*did you mean"):
        load_data(f"{folder}/animal+{folder}/taste")
    parquet(folder / "one.parquet", [{"text": "a", "label": i % 2, "task": i % 2} for i in range(20)])
    with pytest.raises(DataError, match="not several tasks"):
        prepare(load_data(folder / "one.parquet", task="multitask-text"), models["bert"])


def test_options_are_checked(folder: Path, models: Models, task: MultiTaskText) -> None:
    for options, message in (
        ({"sampling": "often"}, "sampling"),
        ({"task_metrics": {"animal": "matthews"}}, "did you mean 'animals'"),
        ({"task_metrics": {"animals": "log_loss"}}, "log_loss"),
        ({"main_metric": "accuracy"}, "task_mean"),
    ):
        with pytest.raises(ConfigError, match=message):
            prepare(load_data(both(folder)), models["bert"], **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="none of animals, taste"):
        task.only("cars")
    with pytest.raises(ConfigError, match="shots"):
        task.only("taste", shots=0)
    with pytest.raises(ConfigError, match="keep"):
        task.build_model(head="keep")
    with pytest.raises(ConfigError, match="writes texts"):
        prepare(load_data(both(folder)), models["t5"]).build_model()


# ---------------------------------------------------------------------------------------------------------------------- model


def first(task: Any, count: int = 6) -> dict[str, Tensor]:
    rows = task.encoded("validation")
    return task.collator([rows[i] for i in np.linspace(0, len(rows) - 1, count).astype(int)])


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_row_has_the_scores_of_its_own_head_alone(family: str, folder: Path, models: Models) -> None:
    task = prepare(load_data(both(folder)), models[family])
    model, batch = task.build_model(), first(task)
    found = model(**batch)
    states = model.backbone(**{k: v for k, v in batch.items() if k not in ("task", "labels")})
    last = batch["attention_mask"].sum(1) - 1
    pooled = states.pooler_output if family == "bert" else states.last_hidden_state[torch.arange(len(last)), last]
    losses = []
    for i, number in enumerate(batch["task"].tolist()):
        begin, end = ((0, 2), (2, 5))[number]
        own = model.heads.tasks[("animals", "taste")[number]](pooled[i])
        torch.testing.assert_close(found.logits[i, begin:end], own)
        assert bool((found.logits[i].index_fill(0, torch.arange(begin, end), OTHERS) == OTHERS).all())
        losses.append(nn.functional.cross_entropy(own, batch["labels"][i] - begin))
    torch.testing.assert_close(found.loss, torch.stack(losses).mean())


def test_a_task_trains_its_own_head_alone(task: MultiTaskText) -> None:
    model: Any = task.build_model()
    tuned = pt.attach(model, pt.LoRA(rank=2))
    assert isinstance(model, MultiTaskModel)
    name, batch = next(task.only("taste").steps(4, 1))
    assert name == "taste"
    model(**batch).loss.backward()
    gradients = {n: p.grad for n, p in tuned.named_parameters() if "heads" in n or "module" in n}
    of = {key: [g for n, g in gradients.items() if f"tasks.{key}." in n] for key in task.tasks}
    assert len(of["taste"]) == len(of["animals"]) == 2
    assert all(g is not None and g.any() for g in of["taste"])
    assert all(g is None or not g.any() for g in of["animals"])


def test_methods_with_parts_of_each_task_are_told_the_rows_tasks(task: MultiTaskText) -> None:
    model: Any = task.build_model()
    tuned = pt.attach(model, pt.VLAdapter(tasks=task.tasks, sharing="multiple", reduction_factor=4))
    with torch.no_grad():
        for number, parameter in enumerate(tuned.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    batch = first(task)
    mixed = model(**batch).logits
    for i in range(len(mixed)):
        alone = model(**{key: value[i : i + 1] for key, value in batch.items()}).logits
        torch.testing.assert_close(mixed[i : i + 1], alone, rtol=1e-4, atol=1e-5)
    other = {key: value for key, value in batch.items() if key not in ("task", "labels")}
    with pt.given(model, task="taste"):
        whole = model(**other).logits
    torch.testing.assert_close(whole[batch["task"] == 1], mixed[batch["task"] == 1], rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="one of animals, taste"):
        model(**other)


def test_counted_before_it_is_loaded(task: MultiTaskText) -> None:
    empty, whole = task.empty_model(), task.build_model()
    assert all(parameter.is_meta for parameter in empty.parameters())
    shapes = [{n: p.shape for n, p in m.named_parameters()} for m in (empty, whole)]
    assert shapes[0] == shapes[1]
    state = torch.get_rng_state()
    again, other = task.build_model(), task.build_model(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    weights = [m.heads.tasks["taste"].weight for m in (whole, again, other)]  # type: ignore[union-attr]
    assert torch.equal(*weights[:2]) and not torch.equal(*weights[1:])


def test_pairs_and_single_texts_stand_side_by_side(folder: Path, models: Models) -> None:
    write(folder, "pairs", ANIMALS, 4, pairs=True)
    alone = prepare(load_data(f"{folder}/pairs"), models["bert"]).encoded("train")
    task = prepare(load_data(f"{folder}/animals+{folder}/pairs"), models["bert"])
    rows = task.encoded("train")
    assert list(rows["task"]) == [0] * 8 + [1] * 8
    for mine, theirs in zip(rows.select(range(8, 16)), alone, strict=True):
        assert mine["input_ids"] == theirs["input_ids"] and mine["token_type_ids"] == theirs["token_type_ids"]
    assert not any(any(row["token_type_ids"]) for row in rows.select(range(8)))


# -------------------------------------------------------------------------------------------------------------------- drawing


def test_steps_are_of_one_task_drawn_by_its_share(folder: Path, models: Models) -> None:
    for sampling, share in (("proportional", 8 / 44), ("uniform", 1 / 2)):
        task = prepare(load_data(both(folder)), models["bert"], sampling=sampling)
        names, seen = Counter[str](), Counter[tuple[int, ...]]()
        for name, batch in task.steps(4, 300, seed=3):
            assert set(batch["task"].tolist()) == {task.tasks.index(name)}
            names[name] += 1
            if name == "animals":
                seen.update(
                    (*ids, label)
                    for ids, label in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
                )
        assert abs(names["animals"] / 300 - share) < 0.08
        assert sum(seen.values()) == 4 * names["animals"]
        again = [name for name, _ in task.steps(4, 20, seed=3)]
        assert (
            again == [name for name, _ in task.steps(4, 20, seed=3)] != [name for name, _ in task.steps(4, 20, seed=4)]
        )


def test_rows_of_smaller_tasks_come_several_times_if_uniform(folder: Path, models: Models) -> None:
    task = prepare(load_data(both(folder)), models["bert"], sampling="uniform")
    assert Counter(task.encoded("train")["task"]) == {0: 36, 1: 36}
    assert Counter(task.encoded("validation")["task"]) == {0: 4, 1: 6}  # as they are
    counts = Counter(task.balanced(np.array([0] * 3 + [1] * 8)).tolist())
    assert all(counts[row] in (2, 3) for row in range(3)) and all(counts[row] == 1 for row in range(3, 11))


def test_shots_are_rows_of_each_class(task: MultiTaskText) -> None:
    few = task.only("taste", shots=2, seed=1)
    assert Counter(few.data.train["label"]) == {2: 2, 3: 2, 4: 2}
    assert set(few.data.test["task"]) == {1} and len(few.data.test) == 9
    texts = [list(task.only("taste", shots=2, seed=seed).data.train["text"]) for seed in (1, 1, 2, 3)]
    assert list(few.data.train["text"]) == texts[0] == texts[1] and len({tuple(t) for t in texts}) > 1
    assert len(task.only("animals").data.train) == 8 and len(task.data.train) == 44


# -------------------------------------------------------------------------------------------------------------------- figures


def test_figures_by_task_and_their_mean(folder: Path, models: Models) -> None:
    task = prepare(load_data(both(folder)), models["bert"], task_metrics={"taste": "macro_f1"})
    logits = torch.full((5, 5), OTHERS)
    logits[0, :2], logits[1, :2] = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0])
    logits[2:, 2:] = torch.tensor([[3.0, 0, 0], [0, 3.0, 0], [0, 3.0, 0]])
    labels = torch.tensor([0, 1, 2, 3, 4])
    found = task.metrics(logits, labels)
    f1 = METRICS["macro_f1"](logits[2:, 2:], labels[2:] - 2)
    assert found == pytest.approx({"task_mean": (0.5 + f1) / 2, "animals": 0.5, "taste": f1})
    assert METRICS["task_mean"](logits, labels) == pytest.approx((0.5 + 2 / 3) / 2)
    assert set(task.only("animals").metrics(logits[:2], labels[:2])) == {"task_mean", "animals"}


def test_a_method_learns_all_tasks_at_once(task: MultiTaskText) -> None:
    model = lively(task)
    tuned = pt.attach(model, pt.LoRA(rank=4, alpha=8))
    before = task.evaluate(model, "test")
    train(tuned, task, Recipe(steps=60, batch_size=8), learning_rate=1e-2)  # type: ignore[arg-type]
    after = task.evaluate(model, "test")
    assert set(after) == {"task_mean", "animals", "taste"}
    assert after["task_mean"] > before["task_mean"] + 0.1 and after["task_mean"] > 0.8


@pytest.mark.parametrize("combining", [pt.ScaLearn, pt.AdapterFusion])
def test_transfer_builds_on_frozen_sources(combining: Any, folder: Path, models: Models) -> None:
    write(folder, "more", TASTE, 4)
    data = load_data("+".join(f"{folder}/{name}" for name in ("animals", "taste", "more")))
    task: Any = prepare(data, models["bert"])
    model = lively(task)
    recipe = Recipe(steps=60, batch_size=8)
    adapter = pt.PfeifferAdapter(bottleneck=4)
    sources = train_sources(
        task, model, ["animals", "taste"], adapter, learning_rate=1e-2, recipe=Recipe(steps=8, batch_size=8)
    )
    kept = {name: [p.detach().clone() for p in source.parameters()] for name, source in sources.items()}
    method = combining(sources=("animals", "taste"))
    transfer(task, model, "more", method, shots=2, learning_rate=3e-2, recipe=recipe)
    assert tuple(pt.adaptations(model)) == ("animals", "taste", "target")
    for name, source in sources.items():
        assert all(torch.equal(a, b) for a, b in zip(source.parameters(), kept[name], strict=True))
    only = task.only("more")
    assert only.evaluate(model, "test")["more"] > 0.5  # by chance 1 / 3


def test_a_second_transfer_takes_the_place_of_the_first(task: MultiTaskText) -> None:
    model: Any = task.build_model()
    found = [
        transfer(task, model, "taste", pt.LoRA(rank=2), shots=2, learning_rate=1e-2, recipe=Recipe(steps=2))
        for _ in range(2)
    ]
    assert tuple(pt.adaptations(model)) == ("target",)
    assert all(torch.equal(a, b) for a, b in zip(*(tuned.parameters() for tuned in found), strict=True))


# -------------------------------------------------------------------------------------------------------------- command line


def test_the_command_line_trains_scores_and_compares_several_tasks(folder: Path, models: Models) -> None:
    def petiole(*words: Any) -> Any:
        return CliRunner().invoke(cli.app, [*map(str, words), "--model", models["bert"], "--data", both(folder)])

    file = folder / "a.petiole.safetensors"
    assert petiole("tune", "--method", "bitfit", "--steps", 2, "--output", file).exit_code == 0
    found = petiole("eval", "--adaptation", file, "--json")
    scores = json.loads(found.stdout)["scores"]["bitfit"]
    assert scores["task_mean"] == pytest.approx((scores["animals"] + scores["taste"]) / 2)
    assert "taste ↑ (%)" in petiole("eval", "--adaptation", file).stdout
    refused = petiole("merge", "--adaptation", file, "--output", folder / "merged")
    assert refused.exit_code == 2 and "MultiTaskModel is no class of Transformers" in refused.output
    once = ("--trials", 1, "--seeds", 1, "--steps", 2, "--output", folder / "runs", "--json")
    result = json.loads(petiole("compare", "--methods", "bitfit", *once).stdout)
    assert result["metric"] == "task_mean" and {row["label"] for row in result["rows"]} >= {"bare", "full", "bitfit"}
