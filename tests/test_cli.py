"""The command line: light to start, clear when something is wrong, and the way from data to a merged model."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import small
from petiole import cli

TINY = ["--steps", "3", "--batch-size", "4", "--threads", "1"]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.place(tmp_path_factory.mktemp("cli"))


def call(*words: str | Path) -> Any:
    """A command in this process: exit code, standard output, standard error."""
    return CliRunner().invoke(cli.app, [*map(str, words)])


def source(here: Path) -> list[str]:
    return ["--model", str(here / small.MODEL), "--data", str(here / small.DATA)]


@pytest.fixture(scope="module")
def tuned(here: Path) -> Path:
    """A file that `petiole tune` wrote."""
    path = here / "films.petiole.safetensors"
    result = call(
        "tune",
        *source(here),
        "--method",
        "lora",
        "--set",
        "rank=2",
        "--set",
        'roles=["q","v"]',
        *TINY,
        "--output",
        path,
    )
    assert result.exit_code == 0, result.stderr
    return path


# ------------------------------------------------------------------------------------------------------------------------- light


def seconds_to(statement: str) -> float:
    """Median processor time of a statement in a fresh interpreter that has imported torch already."""
    script = f"import time, torch; start = time.process_time(); {statement}; print(time.process_time() - start)"
    times = [
        float(
            subprocess.run(
                [sys.executable, "-c", script], capture_output=True, text=True, check=True
            ).stdout.splitlines()[-1]
        )
        for _ in range(3)
    ]
    return statistics.median(times)


def test_importing_petiole_and_its_command_line_is_light() -> None:
    assert seconds_to("import petiole") < 0.3
    assert seconds_to("import petiole.cli") < 0.3


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; sys.argv = ['petiole', '--help']\nfrom petiole import cli\n"
        "try: cli.main()\nexcept SystemExit as end: assert not end.code\n"
        "heavy = {'transformers', 'datasets', 'optuna', 'matplotlib', 'sklearn', 'pandas'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("methods", "anatomy", "compare", "demo", "tune", "eval", "merge", "export"):
        assert command in done.stdout


def test_the_version_is_that_of_the_package() -> None:
    import petiole

    assert call("--version").stdout == f"petiole {petiole.__version__}\n"


# --------------------------------------------------------------------------------------------------------------------------- lists


def test_methods_are_listed_with_paper_and_what_they_save() -> None:
    from petiole.method import registry

    text = call("methods").stdout
    for slug, cls in registry().items():
        assert slug in text and cls.paper in text and cls.saves in text
    found = json.loads(call("methods", "--json").stdout)["methods"]
    assert {m["slug"] for m in found} == set(registry())
    lora = next(m for m in found if m["slug"] == "lora")
    assert lora["family"] == "lowrank" and lora["fields"]["rank"]["default"] == 8 and lora["merges"] is True
    assert {m["family"] for m in json.loads(call("methods", "--family", "prompts", "--json").stdout)["methods"]} == {
        "prompts"
    }


def test_anatomy_needs_no_weights(here: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((here / small.MODEL / "config.json").read_bytes())
    result = call("anatomy", "--model", tmp_path)
    assert result.exit_code == 0 and "q: 2 of 2 blocks" in result.stdout
    found = json.loads(call("anatomy", "--model", tmp_path, "--json").stdout)
    assert found["stacks"][0]["hidden_size"] == 16 and len(found["stacks"][0]["blocks"]) == 2


# ------------------------------------------------------------------------------------------------------- tune, eval, merge, compare


def test_tune_shows_the_bare_backbone_beside_what_was_tuned(here: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.petiole.safetensors"
    result = call(
        "tune", *source(here), "--method", "linear-probe", "--learning-rate", "0.01", *TINY, "--output", path, "--json"
    )
    found = json.loads(result.stdout)
    assert set(found["scores"]) == {"bare", "linear-probe"} and found["steps"] == 3 and found["learning_rate"] == 0.01
    assert path.stat().st_size == found["file_bytes"]
    assert found["scores"]["bare"] != found["scores"]["linear-probe"]


def test_tune_says_what_it_skips_and_what_it_recomputes(here: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.petiole.safetensors"
    words = ("tune", *source(here), "--method", "lora", "--set", "layers=[1]", *TINY, "--output", path)
    result = call(*words, "--cache", "1MB", "--memory", "1GB", "--learning-rate", "0.01")
    assert "recomputes nothing: a step takes" in result.stderr and "skips 1 of 2 blocks" in result.stderr
    refused = call(*words, "--memory", "1kB")
    assert refused.exit_code != 0 and "recomputed a step still takes" in refused.stderr


def test_eval_scores_the_bare_backbone_on_the_same_rows(here: Path, tuned: Path) -> None:
    from petiole.store import load
    from petiole.tasks import load_data, prepare

    result = call("eval", *source(here), "--adaptation", tuned, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    task = prepare(load_data(here / small.DATA, test_fraction=0.2), here / small.MODEL)
    model = task.build_model()
    assert found["scores"]["bare"] == pytest.approx(task.evaluate(model, "test"))
    load(model, tuned)
    assert found["scores"]["lora"] == pytest.approx(task.evaluate(model, "test"))
    assert found["split"] == "test" and found["rows"] == len(task.data.splits["test"])
    text = call("eval", *source(here), "--adaptation", tuned, "--split", "train").stdout
    assert "bare" in text and "lora" in text and "rows of train" in text


@pytest.mark.parametrize("with_data", [True, False], ids=["data", "no-data"])
def test_merge_writes_a_model_that_computes_the_same_without_petiole(
    here: Path, tuned: Path, tmp_path: Path, with_data: bool
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from petiole.store import load
    from petiole.tasks import load_data, prepare

    folder = tmp_path / "merged"
    words = ["--data", here / small.DATA] if with_data else []
    result = call("merge", "--model", here / small.MODEL, *words, "--adaptation", tuned, "--output", folder)
    assert result.exit_code == 0, result.stderr
    assert ("largest change" in result.stdout) == with_data
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert not any("petiole" in name for name in plain.state_dict())
    task = prepare(load_data(here / small.DATA), here / small.MODEL)
    model = task.build_model()
    load(model, tuned)
    batch = AutoTokenizer.from_pretrained(folder)(["the film was good"], return_tensors="pt")
    with torch.no_grad():
        assert torch.allclose(plain(**batch).logits, model(**batch).logits, atol=1e-5)
    if with_data:
        assert plain.config.id2label == {0: "bad", 1: "good"}
    assert [p.name for p in tmp_path.iterdir()] == ["merged"], "no temporary folder is left"


def test_what_can_not_be_merged_is_refused(here: Path, tmp_path: Path) -> None:
    path, folder = tmp_path / "h.petiole.safetensors", tmp_path / "merged"
    assert call("tune", *source(here), "--method", "houlsby", *TINY, "--output", path).exit_code == 0
    done = small.run("merge", "--model", here / small.MODEL, "--adaptation", path, "--output", folder)
    assert done.returncode == 2 and "houlsby" in done.stderr and "merge" in done.stderr and not folder.exists()


@pytest.mark.parametrize("with_data", [True, False])
def test_export_writes_what_peft_reads(here: Path, tuned: Path, tmp_path: Path, with_data: bool) -> None:
    peft = pytest.importorskip("peft", reason="needs PEFT: pip install 'petiole[peft]'")
    from petiole.store import load
    from petiole.tasks import load_data, prepare

    folder = tmp_path / "lora"
    words = ["--data", here / small.DATA] if with_data else ["--json"]
    result = call("export", "--model", here / small.MODEL, *words, "--adaptation", tuned, "--output", folder)
    assert result.exit_code == 0, result.stderr
    if with_data:
        assert "exact" in result.stdout and "largest change of an output" in result.stdout
    else:
        assert json.loads(result.stdout)["folder"] == str(folder)
    task = prepare(load_data(here / small.DATA), here / small.MODEL)
    model = task.build_model()
    load(model, tuned)
    rows = task.encoded("train")
    batch = task.collator([rows[i] for i in range(2)])
    there = peft.PeftModel.from_pretrained(task.build_model(), str(folder)).eval()
    with torch.no_grad():
        assert torch.allclose(there(**batch).logits, model.eval()(**batch).logits, atol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["lora"], "no temporary folder is left"


def test_an_unknown_reader_and_what_a_reader_can_not_take_are_refused(here: Path, tuned: Path, tmp_path: Path) -> None:
    words = ["--model", here / small.MODEL, "--adaptation", tuned, "--output", tmp_path / "lora"]
    done = small.run("export", *words, "--for", "vllm")
    assert done.returncode == 2 and "modules_to_save" in done.stderr and not list(tmp_path.iterdir())
    done = small.run("export", *words, "--for", "ollama")
    assert done.returncode == 2 and "peft, vllm, diffusers" in done.stderr and not list(tmp_path.iterdir())


def test_compare_prints_one_json_object(here: Path, tmp_path: Path) -> None:
    words = [
        *source(here),
        "--methods",
        "lora:rank=2",
        "--trials",
        "1",
        "--seeds",
        "1",
        "--evaluations",
        "1",
        *TINY,
        "--output",
        tmp_path / "run",
    ]
    result = call("compare", *words, "--axes", "params,checkpoint", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert {row["label"] for row in found["rows"]} == {"bare", "full", "lora:rank=2"} and found["axes"] == [
        "params",
        "checkpoint",
    ]
    assert {"params", "checkpoint"} >= {name for row in found["rows"] for name in row["fronts"]}
    text = call("compare", *words, "--axes", "params,checkpoint")
    assert "report.md" in text.stdout and "lora:rank=2" in text.stdout and "were there already" in text.stderr
    import shlex

    said = shlex.split(found["command"])
    assert call(*said[1:], "--json").exit_code == 0, "the command in the report runs as it stands"


def test_the_demo_backbone_is_the_shipped_one_at_16_pixels(tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import ViTForImageClassification

    from petiole.compare.demo import backbone, resized
    from petiole.tasks import locate_model

    folder = backbone(tmp_path / "backbone")
    small_one = ViTForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
    shipped = ViTForImageClassification.from_pretrained(
        locate_model("petiole:vit-cifar10").name, dtype=torch.float32
    ).eval()
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():  # Transformers' own interpolation, here of the same table, is the reference
        expected = shipped(pixel_values=images, interpolate_pos_encoding=True).logits
        assert torch.allclose(small_one(pixel_values=images).logits, expected, atol=2e-2)
    table = load_file(Path(locate_model("petiole:vit-cifar10").name) / "model.safetensors")[
        "vit.embeddings.position_embeddings"
    ]
    assert torch.equal(resized(table, 8), table)
    stamp = (folder / "config.json").stat().st_mtime_ns
    assert backbone(folder) == folder and (folder / "config.json").stat().st_mtime_ns == stamp


# --------------------------------------------------------------------------------------------------------------------------- wrong

BOTH = ["--model", "{bert}", "--data", "{films}"]
COMPARE = ["compare", *BOTH, "--output", "{out}"]
LORA = ["tune", *BOTH, "--method", "lora", "--output", "{out}"]
EVAL = ["eval", *BOTH, "--adaptation"]
WRONG = {
    "no such model": (["anatomy", "--model", "nowhere"], "nowhere: no such model folder"),
    "no such data": (["compare", "--model", "{bert}", "--data", "none.csv", "--output", "{out}"], "none.csv: no such"),
    "no such method": ([*COMPARE, "--methods", "lorra"], "did you mean lora"),
    "no such field": ([*LORA, "--set", "rnk=8"], "LoRA has no field 'rnk'"),
    "field out of range": ([*LORA, "--set", "rank=0"], "LoRA.rank = 0"),
    "no such axis": ([*COMPARE, "--axes", "speed"], "'speed' is no axis"),
    "trials out of range": ([*COMPARE, "--trials", "0"], "trials = 0"),
    "batch size out of range": ([*LORA, "--batch-size", "0"], "batch_size = 0"),
    "limit": ([*COMPARE, "--limit", "trian=5"], "limit: 'trian=5'"),
    "no such metric": ([*COMPARE, "--metric", "acc"], "main_metric: 'acc'"),
    "no such column": ([*COMPARE, "--column", "text=words"], "no column 'words'"),
    "column without =": ([*COMPARE, "--column", "text"], "--column text"),
    "no such split": ([*EVAL, "{films}", "--split", "dev"], "--split dev"),
    "no adaptation": ([*EVAL, "none.safetensors"], "none.safetensors"),
    "no file of ours": ([*EVAL, "{films}"], "films.csv"),
    "no such family": (["methods", "--family", "lowrnk"], "there are"),
    "missing option": (["compare", "--model", "{bert}"], "Missing option"),
    "no such command": (["comparre"], "No such command"),
    "a folder in the way": (
        ["merge", "--model", "{bert}", "--adaptation", "{films}", "--output", "{bert}"],
        "not an empty folder",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_a_user_can_do_wrong_gives_a_few_clear_lines(
    case: str, here: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words, said = WRONG[case]
    places = {"bert": here / small.MODEL, "films": here / small.DATA, "out": tmp_path / "out"}
    monkeypatch.setattr(sys, "argv", ["petiole", *(word.format(**places) for word in words)])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capfd.readouterr()
    assert end.value.code == 2, err
    assert said in err and "Traceback" not in err and out == ""
    assert not (tmp_path / "out").exists()
    if err.startswith("error: "):
        assert len(err.strip().splitlines()) <= 4


def test_a_comparison_in_which_every_run_fails_ends_with_1(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from petiole.compare import bench

    def fail(*args: object, **kwargs: object) -> None:
        raise MemoryError

    monkeypatch.setattr(bench, "train", fail)
    monkeypatch.setattr(bench.Bench, "score", fail)
    result = call(
        "compare",
        *source(here),
        "--methods",
        "lora",
        "--trials",
        "1",
        "--seeds",
        "1",
        *TINY,
        "--output",
        tmp_path / "run",
    )
    assert result.exit_code == 1 and "out of memory" in result.stdout and "No row has a score" in result.stdout


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(here: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    words = [*source(here), "--methods", "lora", "--trials", "50", "--seeds", "50", *TINY, "--output", output]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        small.command("compare", *words),
        env=env,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a run in the background ignores it
    )
    start = time.monotonic()
    while not (output / "trials.jsonl").exists() and process.poll() is None:
        assert time.monotonic() - start < 200
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert (
        "Traceback" not in err
        and out == ""
        and err.rstrip().endswith(f"what is done is in {output}; the same command goes on from there")
    )


def test_a_closed_pipe_is_no_error() -> None:
    line = f"{sys.executable} -m petiole.cli methods --json | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True)
    assert done.stdout == "{\n" and "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr
