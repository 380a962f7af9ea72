"""The Ray engine on a real cluster of this machine: the trials and the table of the local engine, whatever dies on the way."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import small
from petiole import files
from petiole.compare.cluster import Ray, death
from petiole.compare.jobs import Job
from petiole.compare.run import Comparison, compare
from petiole.compare.settings import Settings
from petiole.errors import ConfigError, MissingExtra

TESTS = Path(__file__).resolve().parents[1]
METHODS = "lora:rank=2,linear-probe"
OPTIONS = {**small.OPTIONS, "trials": 5}  # the last two are proposed from the results of the first three
TIMES = {"wall_seconds", "seconds", "step_seconds", "share", "cost", "beside", "file_bytes"}

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray: pip install 'petiole[ray]'")


def script(text: str, *words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own, as a user would: Ray opens sockets, which no test may."""
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    env.pop("RAY_ADDRESS", None)
    file = Path(options.pop("folder")) / "program.py"
    file.write_text(text)
    return subprocess.run(
        [sys.executable, str(file), *map(str, words)], capture_output=True, text=True, timeout=400, env=env, **options
    )


def trials(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in files.read_lines(folder / "trials.jsonl")[0]]


def steady(found: Mapping[str, Any], without: set[str]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name not in without}


def table(folder: Path) -> list[dict[str, Any]]:
    timed = {"step_seconds", "forward_seconds", "run_seconds", "total_seconds", "front", "fronts"}
    return [steady(row, timed) for row in files.read_json(folder / "results.json")["rows"]]


@pytest.fixture(scope="module")
def local(here: Path, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    output = tmp_path_factory.mktemp("local") / "run"
    return compare(str(here / small.MODEL), str(here / small.DATA), METHODS, output=output, **OPTIONS)


# ----------------------------------------------------------------------------------------------------------- on a real cluster

DRIVER = """
import os, signal, sys
import torch
from petiole import files
from petiole.compare import Ray, compare
from petiole.compare.watch import Lines
import small
from training import children

if __name__ == "__main__":
    model, data, methods, output, rows = sys.argv[1:]
    if rows != "all":
        children.Countdown(int(rows)).watch(files, "append_line")  # killed with so many rows written
    options = {**small.OPTIONS, "trials": 5}
    compare(model, data, methods, output=output, engine=Ray(workers=2), watch=Lines(), **options)
"""


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(900)  # a cluster and its workers start several processes, which takes long on a busy machine
def test_killed_and_resumed_it_ends_with_the_trials_and_the_table_of_the_local_engine(
    local: Comparison, here: Path, tmp_path: Path
) -> None:
    words = [here / small.MODEL, here / small.DATA, METHODS, tmp_path / "run"]
    killed = script(DRIVER, *words, "7", folder=tmp_path)
    assert killed.returncode == -9, killed.stderr
    before = trials(tmp_path / "run")
    assert len(before) == 7
    end = script(DRIVER, *words, "all", folder=tmp_path)
    assert end.returncode == 0, end.stderr
    assert "7 of 27 trials were there already" in end.stderr
    rows = trials(tmp_path / "run")
    assert rows[:7] == before and len({r["key"] for r in rows}) == len(rows) == 27, "every trial exactly once"
    own = {r["key"]: r for r in trials(local.folder)}
    assert {r["key"] for r in rows} == set(own)
    for row in rows:  # learning rates, losses, scores, outputs: to the last bit
        assert steady(row, TIMES) == steady(own[row["key"]], TIMES)
    assert table(tmp_path / "run") == table(local.folder)
    for path in (local.folder / "adaptations").glob("*.safetensors"):
        assert (tmp_path / "run" / "adaptations" / path.name).read_bytes() == path.read_bytes()
    # Costs are measured when everything else is over, and hold the time of a step.
    assert [r["kind"] for r in rows].index("cost") == 27 - 4 and all(r["kind"] == "cost" for r in rows[-4:])
    assert all(r["beside"] == (r["kind"] != "cost") for r in rows)
    costs = {r["row"]: r["step_seconds"] for r in rows if r["kind"] == "cost"}
    shown = {r["label"]: r["step_seconds"] for r in files.read_json(tmp_path / "run" / "results.json")["rows"]}
    assert costs == shown and costs["bare"] is None and all(costs[label] > 0 for label in ("full", "lora:rank=2"))
    found = files.read_json(tmp_path / "run" / "results.json")
    assert any("side by side" in note for note in found["notes"]) and "--engine ray --workers 2" in found["command"]
    # Either engine goes on with what the other began.
    again = compare(str(words[0]), str(words[1]), METHODS, output=tmp_path / "run", **OPTIONS)
    assert again.repeated == again.trials == 27
    assert not strays(), "the killed driver's cluster went down with it"


def strays() -> list[str]:
    """Processes of clusters that were started here and whose driver is dead, once they had the time to notice."""
    import psutil

    found: list[str] = []
    for _ in range(60):
        mine = [p for p in psutil.process_iter(["name", "cmdline"]) if "raylet" in (p.info["name"] or "")]
        found = [" ".join(p.info["cmdline"] or [])[:100] for p in mine]
        if not found:
            break
        time.sleep(0.5)
    return found


NODES = '''
"""Two nodes, of which one is lost while a trial runs on it; and a method that takes its process down with it."""
import os, sys, time
from pathlib import Path

import petiole as pt
from petiole.compare import Ray, compare
from petiole.compare.watch import Lines

MODEL, DATA, OUTPUT = sys.argv[1:]
GO = Path(OUTPUT).with_name("go")


class Waiting(pt.LoRA):
    """Goes on when the node is gone."""

    slug = "waiting"

    def on_attach(self, moment):
        end = time.monotonic() + 100
        while not GO.exists() and time.monotonic() < end:
            time.sleep(0.1)


class Deadly(pt.LoRA):
    slug = "deadly"

    def on_attach(self, moment):
        os.kill(os.getpid(), 9)


def main():
    from ray.cluster_utils import Cluster

    quick = {f"health_check_{name}": value for name, value in
             {"initial_delay_ms": 0, "period_ms": 1000, "timeout_ms": 5000, "failure_threshold": 3}.items()}
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": quick}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    second = [cluster.add_node(num_cpus=1)]

    class Axe(Lines):
        def trial(self, *args, **kwargs):
            super().trial(*args, **kwargs)
            if second and len(self.rows["waiting:rank=2"].running) == 2:
                cluster.remove_node(second.pop(), allow_graceful=False)
                GO.touch()

    compare(
        MODEL, DATA, [Waiting(rank=2), Deadly(rank=2)], output=OUTPUT, engine=Ray(cluster.address), watch=Axe(),
        steps=3, batch_size=4, trials=2, seeds=1, evaluations=2, threads=1,
    )
    assert not second
    cluster.shutdown()


if __name__ == "__main__":
    main()
'''


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(900)  # a cluster and its workers start several processes, which takes long on a busy machine
def test_a_lost_node_and_a_dead_worker_are_failed_trials_and_the_rest_go_on(here: Path, tmp_path: Path) -> None:
    done = script(NODES, here / small.MODEL, here / small.DATA, tmp_path / "run", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = trials(tmp_path / "run")
    failed = [(r["row"], r["kind"], r["reason"]) for r in rows if r["status"] == "failed"]
    assert Counter(row for row, _, _ in failed) == {"waiting:rank=2": 1, "deadly:rank=2": 2}
    for row, kind, reason in failed:
        lost = "node" in reason or "unavailable" in reason  # as Ray says it, by how soon it knows
        assert kind == "tune" and "died" in reason and lost == (row == "waiting:rank=2"), reason
    by = {row["label"]: row for row in files.read_json(tmp_path / "run" / "results.json")["rows"]}
    assert by["waiting:rank=2"]["failed_trials"] == 1 and by["waiting:rank=2"]["mean"] is not None
    assert by["deadly:rank=2"]["mean"] is None and "all 2 trials failed" in by["deadly:rank=2"]["notes"][0]
    assert by["full"]["mean"] is not None and by["bare"]["mean"] is not None
    assert len({r["key"] for r in rows}) == len(rows) == 2 + 1 + 1 + 2 + 2 + 1 + 1 + 2


REFUSED = """
import sys
from pathlib import Path
import ray
from petiole.compare import Ray, compare
from petiole.errors import PetioleError
import small

if __name__ == "__main__":
    model, data, output = sys.argv[1:]
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)  # the caller's own, and still there afterwards
    for engine, changed in ((Ray(), {"threads": 3}), (Ray(gpus=1), {}), (Ray(), {"limit": {"train": 1}}), (Ray(resources={"tpu": 1}), {})):
        try:
            compare(model, data, "lora", output=output, engine=engine, **{**small.OPTIONS, **changed})
        except PetioleError as error:
            print(type(error).__name__, str(error).replace("\\n", " "))
    assert ray.is_initialized() and not Path(output).exists()
"""


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(900)  # a cluster and its workers start several processes, which takes long on a busy machine
def test_what_no_node_has_and_what_a_worker_refuses_is_said(here: Path, tmp_path: Path) -> None:
    done = script(REFUSED, here / small.MODEL, here / small.DATA, tmp_path / "run", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    said = [line for line in done.stdout.splitlines() if "Error" in line]
    assert len(said) == 4, done.stdout
    assert said[0].startswith("ConfigError a trial needs 3 CPU, and no node of the cluster has that: 1 CPU")
    assert "1 GPU, and no node" in said[1] and "limit: 1 rows are too few" in said[2] and "1 tpu" in said[3]


# ------------------------------------------------------------------------------------------------------------- without a cluster


def test_numbers_out_of_range_are_refused() -> None:
    for options, said in (({"gpus": 1.5}, "gpus = 1.5"), ({"gpus": -1}, "gpus = -1"), ({"workers": 0}, "workers = 0")):
        with pytest.raises(ConfigError, match=said):
            Ray(**options)  # type: ignore[arg-type]
    assert Ray("10.0.0.1:6379", gpus=0.5, workers=4).words() == [
        *("--engine", "ray", "--address", "10.0.0.1:6379", "--gpus", "0.5", "--workers", "4")
    ]


def test_another_engine_and_options_of_a_cluster_without_one_are_refused(here: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'dask' is none of local, ray"):
        compare(str(here / small.MODEL), str(here / small.DATA), output=tmp_path / "run", engine="dask", **OPTIONS)  # type: ignore[arg-type]
    words = ["compare", "--model", here / small.MODEL, "--data", here / small.DATA, "--output", tmp_path / "run"]
    for option, value in (("--address", "10.0.0.1:6379"), ("--workers", "2"), ("--gpus", "1")):
        done = small.run(*words, option, value)
        assert done.returncode == 2 and f"{option} is for --engine ray" in done.stderr
    assert not (tmp_path / "run").exists()


@needs_ray
@pytest.mark.loopback
def test_an_address_where_nobody_answers_is_said_at_once(here: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no Ray cluster at 127\.0\.0\.1:1: .*refused") as refused:
        compare(
            str(here / small.MODEL), str(here / small.DATA), output=tmp_path / "r", engine=Ray("127.0.0.1:1"), **OPTIONS
        )
    assert "ray start --head" in str(refused.value) and not (tmp_path / "r").exists()


def test_without_the_extra_it_says_what_to_install(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"pip install 'petiole\[ray\]'"):
        compare(str(here / small.MODEL), str(here / small.DATA), output=tmp_path / "run", engine="ray", **OPTIONS)
    assert not (tmp_path / "run").exists()


def test_the_command_of_a_cluster_holds_its_options() -> None:
    settings = Settings(model="m", data="d", methods=("lora",))
    assert "--engine ray --gpus 0.5 --output out" in settings.command("out", Ray(gpus=0.5).words())


def test_the_reason_of_a_death_is_its_telling_part() -> None:
    text = (
        "The actor died unexpectedly before finishing this task.\n\tclass_name: Worker\nThe actor is dead because its worker process has died. "
        "Worker exit type: SYSTEM_ERROR Worker exit detail: End of file. Some common causes include: (1) the OOM killer"
    )
    assert death(text) == "its worker process has died. End of file"
    assert death("The actor died because its node has died. Node Id: 3f") == "its node has died"
    assert death("something else") == "something else"


def test_a_trial_that_nobody_finished_has_the_key_of_the_one_that_ends(local: Comparison) -> None:
    row = next(r for r in trials(local.folder) if r["kind"] == "run" and r["row"] == "bare")
    from petiole.compare.contenders import Contender

    failed = Job("run", Contender("bare"), row["number"], row["seed"]).failed(local.identity, "died")
    assert failed.key == row["key"] and not failed.done and failed.reason == "died"
