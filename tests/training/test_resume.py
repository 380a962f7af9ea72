"""Checkpoints: whole or skipped, and a resumed run that ends with the bytes of an undisturbed one."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer as HFTrainer
from transformers import TrainerState

import petiole as pt
from petiole import files
from petiole.errors import FileError
from petiole.method import Method
from petiole.training import PetioleCallback
from training import children
from training.toys import Growing, Pull, arguments, bert, rows


def trainer(folder: Path, method: Method | list[Method], **changes: Any) -> pt.Trainer:
    """With dropout, so that the random state matters."""
    model = bert(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    pt.attach(model, method)
    return pt.Trainer(model=model, args=arguments(folder, **changes), train_dataset=rows())


def final(of: pt.Trainer) -> bytes:
    return (
        of.adaptations["default"]
        .save(Path(of.args.output_dir) / "final.petiole.safetensors", folded=False)
        .read_bytes()
    )


def trained(folder: Path, method: Method | list[Method], resume: Any = None, **changes: Any) -> bytes:
    run = trainer(folder, method, **changes)
    run.train(resume_from_checkpoint=resume)
    return final(run)


CASES: dict[str, tuple[Callable[[], Method | list[Method]], dict[str, Any]]] = {
    "lora": (lambda: pt.LoRA(rank=2, dropout=0.1), {"gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine"}),
    "grows": (lambda: Growing(), {"weight_decay": 0.1}),
    "grows-own-warmup": (lambda: Growing(warmup_steps=2), {"weight_decay": 0.1, "warmup_steps": 2}),
    "grows-and-shrinks": (lambda: Growing(shrinks=True), {"weight_decay": 0.1}),
    "two-methods": (lambda: [Pull(), pt.LoRA(rank=2)], {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_ends_with_the_same_bytes(case: str, tmp_path: Path) -> None:
    make, changes = CASES[case]
    whole = trained(tmp_path / "whole", make(), **changes)
    for step in (2, 6) if "grows" in case else (4, 8):
        folder = tmp_path / f"{case}-{step}"
        shutil.copytree(tmp_path / "whole", folder)
        assert trained(folder, make(), folder / f"checkpoint-{step}", **changes) == whole, step


def test_the_end_of_an_epoch_is_told_once_however_the_run_was_cut(tmp_path: Path) -> None:
    """Six steps make an epoch: the checkpoint of step 6 is written before its end is told."""
    whole = trainer(tmp_path, Pull(), save_steps=3)
    whole.train()
    told = whole.adaptations["default"].state[0]["events"]
    assert told[0] == "calibrate on 6 0" and told.count("epoch 6") == 1 and told[-1] == "epoch 8"
    for step in (3, 6, 8):
        again = trainer(tmp_path, Pull(), save_steps=100)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert again.adaptations["default"].state[0]["events"] == told


def watched(n: int | None = None) -> children.Countdown:
    """Every call that changes a disk while a checkpoint is made."""
    counter = children.Countdown(n)
    for owner, name in (
        *((files, call) for call in ("_open", "_write", "_fsync", "_replace", "_unlink", "_fsync_dir")),
        (torch, "save"),
        (TrainerState, "save_to_json"),
        (shutil, "rmtree"),
        (os, "mkdir"),
    ):
        counter.watch(owner, name)
    return counter


@pytest.mark.slow
def test_killed_at_any_call_of_a_save(tmp_path: Path) -> None:
    """Three checkpoints, of which one is kept: wherever the process dies, the next one ends with the same bytes."""
    settings = {"max_steps": 3, "save_steps": 1, "save_total_limit": 1}
    whole = trained(tmp_path / "whole", Growing(), **settings)
    count = tmp_path / "count"

    def counting() -> None:
        counter = watched()
        trained(tmp_path / "counted", Growing(), **settings)
        count.write_text(str(counter.calls))

    assert children.run(counting) == 0
    calls = int(count.read_text())
    assert calls > 60
    for n in range(2, calls - 10, max(1, calls // 8)):
        folder = tmp_path / str(n)

        def cut(folder: Path = folder, n: int = n) -> None:
            watched(n)
            trained(folder, Growing(), **settings)

        assert children.run(cut) == children.KILLED, n

        def again(folder: Path = folder) -> None:
            assert trained(folder, Growing(), True, **settings) == whole

        assert children.run(again) == 0, n


@pytest.mark.slow
def test_killed_again_and_again_at_random(tmp_path: Path) -> None:
    """Each time the run gets a little further, and dies in the middle of a step or of a save."""
    settings = {"max_steps": 24, "save_steps": 2, "save_total_limit": 2}
    whole = trained(tmp_path / "whole", Growing(), **settings)
    folder, dice = tmp_path / "killed", random.Random(0)
    folder.mkdir()
    for n in [dice.randrange(5, 120) for _ in range(6)]:

        def work(n: int | None = n) -> None:
            watched(n).watch(torch.optim.AdamW, "step")
            (folder / "result").write_bytes(trained(folder, Growing(), True, **settings))

        assert children.run(work) == children.KILLED, n

    def last() -> None:
        (folder / "result").write_bytes(trained(folder, Growing(), True, **settings))

    assert children.run(last) == 0
    assert (folder / "result").read_bytes() == whole


def test_the_newest_whole_checkpoint_is_taken_and_the_skipped_are_named(tmp_path: Path) -> None:
    whole = trained(tmp_path, pt.LoRA(rank=2))
    (tmp_path / "checkpoint-8" / "manifest.json").unlink()  # killed before its last call
    with (tmp_path / "checkpoint-6" / "optimizer.pt").open("r+b") as file:
        file.write(b"torn")
    again = trainer(tmp_path, pt.LoRA(rank=2))
    with pytest.warns(UserWarning, match="skipped") as seen:
        again.train(resume_from_checkpoint=True)
    said = [str(w.message) for w in seen if "skipped" in str(w.message)]
    assert len(said) == 2 and "checkpoint-8" in said[0] and "not finished" in said[0]
    assert "checkpoint-6" in said[1] and "'optimizer.pt' was changed" in said[1]
    assert [path.name for path, _ in again.skipped] == ["checkpoint-8", "checkpoint-6"]
    assert final(again) == whole
    assert not any(files.verify_manifest(tmp_path / f"checkpoint-{step}") for step in (2, 4, 6, 8))


def test_without_a_checkpoint_training_begins_anew_and_says_so(tmp_path: Path) -> None:
    run = trainer(tmp_path, pt.LoRA(rank=2), max_steps=1)
    with pytest.warns(UserWarning, match="begins anew"):
        run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 1


def test_a_damaged_or_unfit_folder_is_refused_by_name(tmp_path: Path) -> None:
    trained(tmp_path, pt.LoRA(rank=2), max_steps=2)
    folder = tmp_path / "checkpoint-2"
    with pytest.raises(FileError, match=r"default\.petiole\.safetensors.*another configuration"):
        trainer(tmp_path, pt.LoRA(rank=3)).train(resume_from_checkpoint=str(folder))
    (folder / "added").write_text("x")
    with pytest.raises(FileError, match=r"checkpoint-2.*not whole: 'added' is not listed"):
        trainer(tmp_path, pt.LoRA(rank=2)).train(resume_from_checkpoint=str(folder))
    with pytest.raises(FileError, match=r"nowhere.*not whole"):
        trainer(tmp_path, pt.LoRA(rank=2)).train(resume_from_checkpoint=str(tmp_path / "nowhere"))


def test_groups_that_name_what_is_not_there_are_refused(tmp_path: Path) -> None:
    trained(tmp_path, pt.LoRA(rank=2), max_steps=2)
    folder = tmp_path / "checkpoint-2"
    for damage, says in (("default/x:A", "which is not here"), (7, "damaged")):
        events = json.loads((folder / "events.json").read_text())
        events["groups"][0]["names"][0] = damage
        (folder / "events.json").write_text(json.dumps(events))
        files.write_manifest(folder)
        with pytest.raises(FileError, match=says):
            trainer(tmp_path, pt.LoRA(rank=2)).train(resume_from_checkpoint=str(folder))


def test_a_checkpoint_holds_the_change_alone_and_nothing_pickled_of_ours(tmp_path: Path) -> None:
    trained(tmp_path, pt.LoRA(rank=2), max_steps=2)
    names = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert names == {
        *("default.petiole.safetensors", "default.petiole.json", "events.json", "manifest.json"),
        *("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"),
    }


def test_save_only_model_can_be_loaded_but_not_resumed(tmp_path: Path) -> None:
    trained(tmp_path, pt.LoRA(rank=2), save_only_model=True, max_steps=2)
    folder = tmp_path / "checkpoint-2"
    assert not files.verify_manifest(folder)
    with pytest.raises(FileError, match="no state of the optimiser"):
        trainer(tmp_path, pt.LoRA(rank=2)).train(resume_from_checkpoint=True)
    same = bert(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    loaded = pt.load(same, folder / "default.petiole.safetensors")
    assert loaded.methods == (pt.LoRA(rank=2),)


def test_rotation_counts_whole_checkpoints_only(tmp_path: Path) -> None:
    """A checkpoint that was never finished, of a step yet to come, must not cost a whole one its place."""
    torn = tmp_path / "checkpoint-900"
    torn.mkdir(parents=True)
    (torn / "optimizer.pt").write_bytes(b"half")
    trained(tmp_path, pt.LoRA(rank=2), save_total_limit=2)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-6",
        "checkpoint-8",
        "checkpoint-900",
    ]
    assert files.newest_whole(tmp_path)[0] == tmp_path / "checkpoint-8"


def test_what_lay_in_a_checkpoints_place_does_not_get_into_it(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "checkpoint-2" / "stale.bin").write_bytes(b"old")
    trained(tmp_path, pt.LoRA(rank=2), max_steps=2)
    assert not (tmp_path / "checkpoint-2" / "stale.bin").exists()
    assert not files.verify_manifest(tmp_path / "checkpoint-2")


def test_the_hf_trainers_own_checkpoints_resume_with_the_callback(tmp_path: Path) -> None:
    def run(resume: str | None = None) -> torch.Tensor:
        model = bert(hidden_dropout_prob=0.1)
        tuned = pt.attach(model, pt.LoRA(rank=2))
        settings = arguments(tmp_path, max_steps=4)
        each = HFTrainer(model=model, args=settings, train_dataset=rows(), callbacks=[PetioleCallback()])
        each.train(resume_from_checkpoint=resume)
        return torch.cat([p.detach().flatten() for p in tuned.parameters()])

    assert torch.equal(run(), run(str(tmp_path / "checkpoint-2")))
