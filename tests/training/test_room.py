"""Room for checkpoints is looked for before the first step; a disk that fills up later costs no whole checkpoint."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

import petiole as pt
from petiole import files
from petiole.errors import FileError
from petiole.training import room
from training.toys import arguments, bert, rows

Usage = namedtuple("Usage", "total used free")


def trainer(folder: Path, **changes: Any) -> pt.Trainer:
    model = bert(hidden_dropout_prob=0.1)
    pt.attach(model, pt.LoRA(rank=2))
    return pt.Trainer(model=model, args=arguments(folder, **changes), train_dataset=rows())


@pytest.mark.parametrize(
    ("options", "start", "there", "count"),
    [
        ({"max_steps": 100, "save_steps": 10}, 0, 0, 10),
        ({"max_steps": 101, "save_steps": 10}, 0, 0, 11),
        ({"max_steps": 100, "save_steps": 10}, 60, 6, 4),
        ({"max_steps": 100, "save_steps": 0.25}, 0, 0, 4),
        ({"max_steps": 100, "save_steps": 10, "save_total_limit": 2}, 0, 0, 3),
        ({"max_steps": 100, "save_steps": 10, "save_total_limit": 2}, 60, 2, 1),
        ({"max_steps": 10, "save_steps": 10, "save_total_limit": 5}, 0, 0, 1),
        ({"num_train_epochs": 3, "save_strategy": "epoch"}, 0, 0, 3),
        (
            {"num_train_epochs": 3, "save_steps": 5},
            0,
            0,
            5,
        ),  # 50 rows in batches of 8 are 7 steps an epoch; the last step is saved too
    ],
)
def test_checkpoints_are_counted(tmp_path: Path, options: dict[str, Any], start: int, there: int, count: int) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], per_device_train_batch_size=8, **options)
    steps = room.total_steps(args, 50)
    assert steps == options.get("max_steps", 21)
    assert room.checkpoints(args, steps, start, there) == count


def test_a_checkpoint_takes_what_was_foretold(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=2)
    run.train()
    took = sum(path.stat().st_size for path in (tmp_path / "checkpoint-2").iterdir())
    numbers = room.checkpoint_bytes(run.adaptations.values()) - room.OTHER
    assert numbers < took < numbers + room.OTHER


@pytest.mark.parametrize(("limit", "count"), [(None, 4), (1, 2)])
def test_a_disk_without_room_for_the_checkpoints_is_said_before_the_first_step(
    limit: int | None, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path / "run", max_steps=8, save_steps=2, save_total_limit=limit)
    one = room.checkpoint_bytes(run.adaptations.values())
    needed = one * count + one * count // 10 + files.MARGIN
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**9, 10**9, needed - 1))
    monkeypatch.setattr(run, "training_step", lambda *a, **k: pytest.fail("it trained before it looked"))
    with pytest.raises(FileError, match=rf"/run: the run needs {needed} bytes .* its disk has {needed - 1} bytes"):
        run.train()
    trainer(tmp_path / "none", max_steps=1, save_strategy="no").train()  # it writes nothing, so it needs nothing


def test_a_file_where_the_checkpoints_are_to_be_is_said_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    for strategy in ("steps", "no"):
        with pytest.raises(FileError, match="/run can't be written: a file of that name is in the way"):
            trainer(tmp_path / "run", save_strategy=strategy)
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES], ids=errno.errorcode.get)
def test_a_folder_that_can_not_be_written_is_said_before_the_first_step(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, own = trainer(tmp_path / "run"), files._open

    def refusing(path: Any, flags: int, mode: int = 0o666) -> int:
        if flags & os.O_CREAT:
            raise OSError(code, os.strerror(code), str(path))
        return own(path, flags, mode)

    monkeypatch.setattr(files, "_open", refusing)
    monkeypatch.setattr(run, "training_step", lambda *a, **k: pytest.fail("it trained before it looked"))
    with pytest.raises(FileError, match=r"/run can't be written: (the file system is read-only|permission denied)"):
        run.train()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, which is a disk without room")
@pytest.mark.parametrize("what", ["optimiser", "change"])
def test_a_disk_that_fills_up_costs_no_whole_checkpoint(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def final(run: pt.Trainer) -> bytes:
        return run.adaptations["default"].save(tmp_path / "x.petiole.safetensors", folded=False).read_bytes()

    whole = trainer(tmp_path / "whole", max_steps=6, save_steps=2)
    whole.train()
    own, own_write, full = torch.save, files._write, False

    def save(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        own(
            value, "/dev/full" if full and what == "optimiser" else path, *args, **kwargs
        )  # the real error, whatever it is

    def write(fd: int, data: Any) -> int:
        if full and what == "change":
            raise OSError(errno.ENOSPC, "No space left on device")
        return own_write(fd, data)

    monkeypatch.setattr(torch, "save", save)
    monkeypatch.setattr(files, "_write", write)
    run = trainer(tmp_path / "run", max_steps=6, save_steps=2)
    step = run.training_step

    def filling(*args: Any, **kwargs: Any) -> Any:
        nonlocal full
        full = run.state.global_step >= 2  # from the third step on
        return step(*args, **kwargs)

    monkeypatch.setattr(run, "training_step", filling)
    with pytest.raises(FileError, match=r"checkpoint-4 can't be written: the disk is full") as stopped:
        run.train()
    assert f"{tmp_path / 'run' / 'checkpoint-2'} is whole" in str(stopped.value)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint-2"]
    full = False
    again = trainer(tmp_path / "run", max_steps=6, save_steps=2)
    again.train(resume_from_checkpoint=True)
    assert final(again) == final(whole)
