"""Trials on the disk: nothing is lost, nothing is mixed, nothing is written twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from petiole import files
from petiole.compare.results import Results, Trial, alone, key_of, settle
from petiole.errors import ConfigError, FileError


def trial(key: str, **about: object) -> Trial:
    return Trial(key=key, row="lora", kind="tune", number=0, config=[{"slug": "lora"}], seed=0, **about)  # type: ignore[arg-type]


def test_a_trial_reads_back_as_it_was(tmp_path: Path) -> None:
    one = trial("a", learning_rate=0.1 + 0.2, scores={"validation": {"accuracy": 1 / 3}}, losses=[[1, 0.5]], reason="ü")
    Results(tmp_path).add(one)
    Results(tmp_path).add(trial("b", status="failed", reason="out of memory"))
    again = Results(tmp_path)
    assert again.get("a") == one and again.get("b") is not None and not again.get("b").done  # type: ignore[union-attr]
    assert again.get("c") is None and not again.torn


def test_failed_trials_are_forgotten_on_request(tmp_path: Path) -> None:
    for one in (trial("a"), trial("b", status="failed")):
        Results(tmp_path).add(one)
    assert set(Results(tmp_path, retry=True).by_key) == {"a"}
    Results(tmp_path).add(trial("b"))
    assert set(Results(tmp_path, retry=True).by_key) == {"a", "b"}


def test_a_torn_last_row_counts_as_not_written_and_is_cut_off(tmp_path: Path) -> None:
    Results(tmp_path).add(trial("a"))
    path = tmp_path / "trials.jsonl"
    with path.open("a") as file:
        file.write('{"key": "b", "row": "lo')
    again = Results(tmp_path)
    assert set(again.by_key) == {"a"} and again.torn
    again.add(trial("c"))
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "c"]


@pytest.mark.parametrize("line", ["{", "[]", '{"key": 3}', '{"key":"a","row":"b","other":1}'])
def test_a_damaged_row_is_named_by_its_line(tmp_path: Path, line: str) -> None:
    Results(tmp_path).add(trial("a"))
    with (tmp_path / "trials.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(FileError, match=r"trials\.jsonl, line 2: not"):
        Results(tmp_path)


def test_settings_that_changed_are_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    identity = {"model": "Bert 1", "steps": 3, "limit": {"train": 9}}
    assert not settle(folder, identity, {"seeds": 2}, "petiole compare")
    before = (folder / "settings.json").read_bytes()
    assert settle(folder, identity, {"seeds": 2}, "petiole compare")
    with pytest.raises(ConfigError, match="steps: 3 there, 4 now") as refused:
        settle(folder, {**identity, "steps": 4}, {"seeds": 2}, "petiole compare")
    assert "--output" in str(refused.value) and len(str(refused.value).splitlines()) == 3
    with pytest.raises(ConfigError, match="device: null there, cpu now"):
        settle(folder, {**identity, "device": "cpu"}, {"seeds": 2}, "petiole compare")
    assert (folder / "settings.json").read_bytes() == before
    assert settle(folder, identity, {"seeds": 5}, "petiole compare --seeds 5")  # more of the same is welcome
    assert files.read_json(folder / "settings.json")["asked"] == {"seeds": 5}


def test_trials_without_settings_are_left_alone(tmp_path: Path) -> None:
    Results(tmp_path).add(trial("a"))
    with pytest.raises(FileError, match="no settings"):
        settle(tmp_path, {}, {}, "")
    files.write_json(tmp_path / "settings.json", {"format": 99})
    with pytest.raises(FileError, match="this version"):
        settle(tmp_path, {}, {}, "")


def test_a_key_depends_on_everything_and_on_no_order() -> None:
    base = key_of({"a": 1, "b": 2}, kind="tune", seed=0)
    assert base == key_of({"b": 2, "a": 1}, seed=0, kind="tune")
    assert len({base, key_of({"a": 1, "b": 3}, kind="tune", seed=0), key_of({"a": 1, "b": 2}, kind="run", seed=0)}) == 3


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    with alone(tmp_path), pytest.raises(ConfigError, match="another process"), alone(tmp_path):
        pass
    with alone(tmp_path):
        pass
