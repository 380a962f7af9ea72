"""A disk that is too small, full or read-only is said before anything is trained; one that fills up on the way loses nothing."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

import small
from compare import kills
from petiole import files
from petiole.compare import bench as benches
from petiole.compare.bench import Bench
from petiole.compare.contenders import contenders
from petiole.compare.results import file_of
from petiole.compare.run import Comparison, compare
from petiole.compare.settings import Settings
from petiole.errors import FileError

Usage = namedtuple("Usage", "total used free")


def start(here: Path, output: Path, **changed: Any) -> Comparison:
    return compare(
        str(here / small.MODEL), str(here / small.DATA), kills.METHODS, output=output, **{**small.OPTIONS, **changed}
    )


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benches, "train", lambda *a, **k: pytest.fail("it trained before it looked"))


def test_a_disk_without_room_is_said_before_anything_is_trained(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, untrained: None
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**9, 10**9 - 7_000_000, 7_000_000))
    with pytest.raises(
        FileError, match=r"/run: the run needs \d{8} bytes \(.*\), its disk has 7000000 bytes"
    ) as refused:
        start(here, tmp_path / "run")
    assert "fewer methods" in str(refused.value) and not (tmp_path / "run").exists()


def test_what_the_files_will_take_is_what_they_took(finished: Comparison, here: Path, tmp_path: Path) -> None:
    rows = contenders(kills.METHODS)
    facts = Bench(
        Settings(model=str(here / small.MODEL), data=str(here / small.DATA), **small.OPTIONS), tmp_path
    ).facts(rows)
    assert set(facts.file_bytes) == {"full", "lora:rank=2", "linear-probe"}
    for label, size in facts.file_bytes.items():
        took = (finished.folder / file_of(label)).stat().st_size
        assert size < took < size + 8192, label  # the header comes on top
    larger = Settings(model=str(here / small.MODEL), data=str(here / small.DATA), size_search=True, **small.OPTIONS)
    assert Bench(larger, tmp_path).file_bytes(rows[2]) > 3 * (facts.file_bytes["lora:rank=2"] - 4 * 34)


def test_files_that_are_there_need_no_room_again(
    finished: Comparison, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    own = files.check_writable
    monkeypatch.setattr(files, "check_writable", lambda *a: asked.append(a[1] if len(a) > 1 else 0) or own(*a))
    start(here, finished.folder)
    assert max(asked) == 4 * 5 * (16 << 10) + (8 << 20)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC], ids=errno.errorcode.get)
def test_a_folder_that_takes_nothing_is_said_first(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, untrained: None, code: int
) -> None:
    own = files._open

    def refusing(path: Any, flags: int, mode: int = 0o666) -> int:
        if flags & os.O_CREAT and str(path).startswith(str(tmp_path)):
            raise OSError(code, os.strerror(code), str(path))
        return own(path, flags, mode)

    monkeypatch.setattr(files, "_open", refusing)
    monkeypatch.setattr(benches.Bench, "__init__", lambda *a: pytest.fail("it loaded before it looked"))
    said = {errno.EROFS: "read-only", errno.EACCES: "permission denied", errno.ENOSPC: "disk is full"}[code]
    with pytest.raises(FileError, match=f"/run can't be written: .*{said}"):
        start(here, tmp_path / "run")


def test_a_file_where_a_folder_is_to_be_is_said_first(here: Path, tmp_path: Path, untrained: None) -> None:
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(FileError, match="can't be written"):
            start(here, output)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "adaptations").write_text("mine")
    with pytest.raises(FileError, match="/run/adaptations can't be written: a file of that name is in the way"):
        start(here, tmp_path / "run")
    assert (tmp_path / "file").read_text() == (tmp_path / "run" / "adaptations").read_text() == "mine"


@pytest.mark.slow
def test_a_disk_that_fills_up_stops_the_run_and_loses_nothing(
    finished: Comparison, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the settings, in a row of trials, in an adaptation, in the report."""
    own, calls = files._write, 0

    def filling(fd: int, data: Any) -> int:
        nonlocal calls
        calls += 1
        if calls > room:
            own(fd, bytes(data)[: len(data) // 2])  # the disk takes a part, then no more
            raise OSError(errno.ENOSPC, "No space left on device")
        return own(fd, data)

    before: list[dict[str, Any]] = []
    for room in (4, 9, 14, 21):  # noqa: B007  (`filling` reads it)
        calls = 0
        monkeypatch.setattr(files, "_write", filling)
        with pytest.raises(FileError, match="the disk is full"):
            start(here, tmp_path / "run")
        monkeypatch.setattr(files, "_write", own)
        now = kills.trials(tmp_path / "run")
        assert now[: len(before)] == before and len(now) < finished.trials
        before = now
    assert before
    start(here, tmp_path / "run")
    assert not kills.lost(tmp_path / "run", finished.folder)


def test_a_scratch_disk_that_fills_up_within_a_trial_is_no_failed_trial(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device", "/scratch/x")

    monkeypatch.setattr(benches, "train", full)
    with pytest.raises(FileError, match="/scratch/x: the disk is full, so a trial of full could not end") as stopped:
        start(here, tmp_path / "run")
    assert "the same command" in str(stopped.value)
    assert {row["row"] for row in kills.trials(tmp_path / "run")} == {"bare"}


@pytest.mark.slow
def test_tune_looks_before_it_trains(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from petiole import tune
    from petiole.cli import app

    def called(output: Path) -> str:
        words = [
            "tune",
            "--model",
            here / small.MODEL,
            "--data",
            here / small.DATA,
            "--method",
            "lora",
            "--output",
            output,
        ]
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code == 2, done.output
        return done.stderr

    monkeypatch.setattr(tune, "train", lambda *a, **k: pytest.fail("it trained before it looked"))
    (tmp_path / "folder").mkdir()
    assert f"{tmp_path / 'folder'} can't be written: it is a folder" in called(tmp_path / "folder")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**9, 10**9, 1000))
    assert "its disk has 1000 bytes" in called(tmp_path / "new.petiole.safetensors")
    assert not (tmp_path / "new.petiole.safetensors").exists()


@pytest.mark.slow
def test_what_tune_learnt_is_kept_where_its_disk_has_filled_up(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import re
    import tempfile

    from typer.testing import CliRunner

    from petiole import tune
    from petiole.cli import app

    own, own_train, full = files._open, tune.train, False
    output, elsewhere = tmp_path / "disk" / "x.petiole.safetensors", tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))

    def filled(path: Any, flags: int, mode: int = 0o666) -> int:
        if full and flags & os.O_CREAT and str(path).startswith(str(output.parent)):
            raise OSError(errno.ENOSPC, "No space left on device")
        return own(path, flags, mode)

    def train(*args: Any, **kwargs: Any) -> Any:
        nonlocal full
        course = own_train(*args, **kwargs)
        full = True
        return course

    monkeypatch.setattr(files, "_open", filled)
    monkeypatch.setattr(tune, "train", train)
    words = ["tune", "--model", here / small.MODEL, "--data", here / small.DATA, "--method", "lora", "--steps", "2"]
    done = CliRunner().invoke(app, [str(word) for word in [*words, "--output", output]])
    assert done.exit_code == 2 and f"{output} can't be written: the disk is full" in done.stderr
    kept = re.search(r"What was learnt is in (.+)\.", done.stderr)
    assert kept is not None and files.load_adaptation(kept[1])[0]
