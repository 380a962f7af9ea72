"""`pt.Trainer(cache=…)` and `pt.Trainer(memory=…)`: the same result for less time or less memory, or a refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor

import petiole as pt
import tiny
from petiole import cache
from petiole.errors import ConfigError, TrainingError
from petiole.training import processes
from training.toys import Growing, arguments, rows


def run(
    folder: Path, method: Any = None, data: Any = None, family: str = "bert", **options: Any
) -> tuple[pt.Trainer, Tensor]:
    model = tiny.model(family, num_hidden_layers=4)
    tuned = pt.attach(model, method or pt.LoRA(rank=2, layers=(2, 3)))
    changes = {"max_steps": 12, "save_strategy": "no", **options.pop("changes", {})}
    made = data or [{**row, "labels": row["input_ids"]} if family == "llama" else row for row in rows(20)]
    trainer = pt.Trainer(model=model, args=arguments(folder, **changes), train_dataset=made, **options)
    trainer.train()
    return trainer, torch.cat([p.detach().flatten() for p in tuned.parameters()])


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 2}, {"remove_unused_columns": False}])
def test_the_cache_changes_nothing_but_what_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    kept: list[pt.Cache] = []
    monkeypatch.setattr(cache.Cache, "close", lambda self: kept.append(self))
    _, without = run(tmp_path, changes=changes)
    trainer, with_it = run(tmp_path, cache="1MB", changes=changes)
    torch.testing.assert_close(with_it, without, rtol=1e-5, atol=1e-6)
    assert kept[0].misses == 20 and kept[0].hits > 20
    assert "skips 2 of 4 blocks" in kept[0].summary() and trainer.cache is None


def test_the_cache_takes_a_datasets_dataset_with_columns_that_the_model_does_not_know(tmp_path: Path) -> None:
    made = [{k: v.tolist() for k, v in row.items()} for row in rows(20)]
    table = datasets.Dataset.from_list([{**row, "comment": "x"} for row in made]).with_format("torch")
    _, without = run(tmp_path, data=table)
    trainer, with_it = run(tmp_path, data=table, cache=10**6)
    torch.testing.assert_close(with_it, without, rtol=1e-5, atol=1e-6)
    assert trainer.train_dataset is table


def test_the_cache_is_refused_where_it_would_be_wrong_or_of_no_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model("bert", hidden_dropout_prob=0.1)
    pt.attach(model, pt.LinearProbe())
    trainer = pt.Trainer(model=model, args=arguments(tmp_path), train_dataset=rows(8), cache="1MB")
    with pytest.raises(TrainingError, match=r"dropout.*acts below what trains"):
        trainer.train()
    assert trainer.cache is None
    with pytest.raises(pt.PetioleError, match="nothing can be cached"):
        run(tmp_path, pt.LoRA(rank=2), cache="1MB")
    with pytest.raises(ConfigError, match="cache = 'much'"):
        run(tmp_path, cache="much")
    stream = datasets.Dataset.from_list([{"input_ids": [1]}]).to_iterable_dataset()
    with pytest.raises(TrainingError, match="a stream without one"):
        run(tmp_path, data=stream, cache="1MB")
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(TrainingError, match="keeps rows by process"):
        pt.Trainer(model=model, args=arguments(tmp_path), train_dataset=rows(8), cache="1MB")


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_memory_budget_recomputes_just_enough_and_gives_the_same(tmp_path: Path, family: str) -> None:
    plain, expected = run(tmp_path, pt.LoRA(rank=2), family=family)
    assert plain.recomputes is None
    roomy, found = run(tmp_path, pt.LoRA(rank=2), family=family, memory="1GB")
    assert roomy.recomputes is not None and roomy.recomputes.blocks == ()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    budget = roomy.recomputes.peak_bytes - 1
    tight, found = run(tmp_path, pt.LoRA(rank=2), family=family, memory=budget)
    assert tight.recomputes is not None and len(tight.recomputes.blocks) == 1
    assert tight.recomputes.peak_bytes <= budget
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_grows_while_blocks_are_recomputed_and_rows_kept(tmp_path: Path) -> None:
    method = Growing()
    _, expected = run(tmp_path, method)
    roomy, _ = run(tmp_path, method, memory="1GB")
    assert roomy.recomputes is not None
    tight, found = run(tmp_path, method, memory=roomy.recomputes.peak_bytes - 1)
    assert tight.recomputes is not None and tight.recomputes.blocks
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_memory_that_can_not_be_kept_to_is_said_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="with all 2 blocks recomputed a step still takes"):
        run(tmp_path, memory="10kB")
    with pytest.raises(TrainingError, match="memory= decides how many blocks"):
        run(tmp_path, memory="1GB", changes={"gradient_checkpointing": True})
