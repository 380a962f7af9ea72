"""The comparison from end to end on a small BERT: fair, complete, and the same after any interruption."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import small
from compare import kills
from petiole import files
from petiole.compare import bench as benches
from petiole.compare.bench import Bench, Changed
from petiole.compare.contenders import contenders
from petiole.compare.report import inline
from petiole.compare.run import Comparison, compare
from petiole.compare.search import Proposal
from petiole.compare.settings import Settings
from petiole.compare.watch import Lines
from petiole.errors import ConfigError, DataError, TrainingError
from petiole.tasks import Task
from training import children

METHODS = "lora:rank=2,linear-probe"


def again(here: Path, output: Path, methods: str = METHODS, **changed: Any) -> Comparison:
    return compare(
        str(here / small.MODEL), str(here / small.DATA), methods, output=output, **{**small.OPTIONS, **changed}
    )


def trials(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in files.read_lines(folder / "trials.jsonl")[0]]


# --------------------------------------------------------------------------------------------------------------------- fairness


def test_a_method_that_starts_from_data_has_costs_too(here: Path, tmp_path: Path) -> None:
    bench = Bench(Settings(model=str(here / small.MODEL), data=str(here / small.DATA), **small.OPTIONS), tmp_path)
    row = next(row for row in contenders("lst:reduction_factor=2") if row.label.startswith("lst"))
    trial = bench.cost(row, None)
    assert trial.status == "done", trial.reason
    assert trial.cost is not None and trial.cost["saved_bytes"] > 0


def test_every_row_is_there_with_its_costs(finished: Comparison) -> None:
    assert {row.label for row in finished.rows} == {"bare", "full", "lora:rank=2", "linear-probe"}
    assert [row.rank for row in finished.rows] == [1, 2, 3, 4]
    for row in finished.rows:
        assert len(row.scores) == 2 and row.mean is not None and row.failed_seeds == row.failed_trials == 0
        if row.label != "bare":
            assert row.trials == 2 and row.learning_rate and row.step_seconds and row.peak_bytes and row.file_bytes
    full, probe, bare = finished.row("full"), finished.row("linear-probe"), finished.row("bare")
    assert bare.trainable_parameters == 0 and bare.training_flops == 0 and not bare.front
    assert probe.trainable_parameters == 2 * 16 + 2 == probe.head_parameters
    assert full.trainable_parameters == full.backbone_parameters
    assert (full.training_flops or 0) > (probe.training_flops or 0) and (full.saved_bytes or 0) > (
        probe.saved_bytes or 0
    )


def test_every_method_gets_the_same_search_and_the_test_split_is_scored_once_a_seed(finished: Comparison) -> None:
    rows = trials(finished.folder)
    assert Counter(r["row"] for r in rows if r["kind"] == "tune") == {"full": 2, "lora:rank=2": 2, "linear-probe": 2}
    assert all(set(r["scores"]) == {"validation"} and r["seed"] == 0 for r in rows if r["kind"] == "tune")
    runs = [r for r in rows if r["kind"] == "run"]
    assert Counter((r["row"], r["seed"]) for r in runs) == {
        (row.label, seed): 1 for row in finished.rows for seed in (1, 2)
    }
    assert all(set(r["scores"]) == {"validation", "test"} for r in runs)
    for label in ("full", "lora:rank=2", "linear-probe"):
        tuned = [r for r in rows if r["kind"] == "tune" and r["row"] == label]
        best = max(tuned, key=lambda r: (r["scores"]["validation"]["accuracy"], -r["number"]))
        assert {r["learning_rate"] for r in runs if r["row"] == label} == {best["learning_rate"]}


def test_the_test_split_is_never_looked_at_while_searching(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(Settings(model=str(here / small.MODEL), data=str(here / small.DATA), **small.OPTIONS), tmp_path)
    seen: list[str] = []
    monkeypatch.setattr(Task, "encoded", lambda self, split, own=Task.encoded: seen.append(split) or own(self, split))
    lora = contenders("lora")[2]
    assert bench.tune(lora, Proposal(0, 1e-3)).done and bench.cost(lora, None).done
    assert "test" not in seen and "train" in seen
    assert bench.run(lora, 0, 1, Proposal(0, 1e-3)).done and seen.count("test") == 1


def test_the_folder_holds_the_whole_run(finished: Comparison) -> None:
    folder = finished.folder
    names = {path.name for path in folder.iterdir()}
    assert {
        "settings.json",
        "trials.jsonl",
        "results.json",
        "report.md",
        "report.html",
        "score-params.png",
        "loss.png",
        "learning.png",
    } <= names
    assert {path.name.partition(".")[0] for path in (folder / "adaptations").glob("*.safetensors")} > {
        "full",
        "linear-probe",
    }
    report = (folder / "report.md").read_text()
    for row in finished.rows:
        assert f"| {row.label} |" in report
    assert finished.command in report and "--seeds 2" in finished.command and "2 trials for each method" in report
    for picture in (line for line in report.splitlines() if line.startswith("![")):
        assert (folder / picture.rpartition("(")[2].rstrip(")")).is_file()
    assert files.read_json(folder / "results.json") == json.loads(json.dumps(finished.to_dict()))


def test_the_page_holds_the_whole_report_and_fetches_nothing(finished: Comparison) -> None:
    page = (finished.folder / "report.html").read_text()
    for row in finished.rows:
        assert f"<td>{row.label}</td>" in page
    assert page.count("<img ") == len(list(finished.folder.glob("*.png"))) and page.count(
        'src="data:image/png;base64,'
    ) == page.count("<img ")
    assert "http" not in page and "<script" not in page and "**" not in page and "`" not in page
    assert inline("**a** `<b>` & c") == "<strong>a</strong> <code>&lt;b&gt;</code> &amp; c"


def test_a_kept_adaptation_scores_as_its_row_says(finished: Comparison, here: Path) -> None:
    from petiole.store import load
    from petiole.tasks import load_data, prepare

    task = prepare(load_data(here / small.DATA, test_fraction=0.2), here / small.MODEL)
    model = task.build_model(seed=5)
    first = next(
        r for r in trials(finished.folder) if r["row"] == "lora:rank=2" and r["kind"] == "run" and r["seed"] == 1
    )
    load(model, finished.folder / first["file"])
    assert task.evaluate(model, "test") == pytest.approx(first["scores"]["test"], abs=1e-6)


# ----------------------------------------------------------------------------------------------------------------------- resuming


def test_a_finished_run_repeats_nothing(finished: Comparison, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benches, "train", lambda *a, **k: pytest.fail("a trial was run again"))
    before = (finished.folder / "trials.jsonl").read_bytes()
    result = again(here, finished.folder)
    assert result.to_dict() == finished.to_dict() and result.repeated == result.trials
    assert (finished.folder / "trials.jsonl").read_bytes() == before


def test_more_seeds_trials_and_methods_keep_what_is_done(finished: Comparison, here: Path, tmp_path: Path) -> None:
    folder = tmp_path / "more"
    folder.mkdir()
    for name in ("settings.json", "trials.jsonl"):
        (folder / name).write_bytes((finished.folder / name).read_bytes())
    result = again(here, folder, METHODS + ",bitfit", seeds=3)
    rows = trials(folder)
    assert (
        rows[: finished.trials] == trials(finished.folder)
        and len({r["key"] for r in rows}) == len(rows) == result.trials
    )
    added = Counter((r["row"], r["kind"]) for r in rows[finished.trials :])
    assert added == {**{(label, "run"): 1 for label in ("bare", "full", "lora:rank=2", "linear-probe")}, ("bitfit", "tune"): 2, ("bitfit", "cost"): 1,
                     ("bitfit", "run"): 3}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"steps": 4}, "steps"), ({"batch_size": 2}, "batch_size"), ({"metric": "macro_f1"}, "metric")],
)
def test_other_settings_in_the_same_folder_are_refused(
    finished: Comparison, here: Path, changed: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=f"{named}: .* there, .* now"):
        again(here, finished.folder, **changed)


def test_other_data_and_another_model_are_refused(finished: Comparison, here: Path, tmp_path: Path) -> None:
    other = small.films(tmp_path / "films.csv", rows=44)
    with pytest.raises(ConfigError, match="data: text-classification"):
        compare(str(here / small.MODEL), str(other), METHODS, output=finished.folder, **small.OPTIONS)
    moved = small.bert(tmp_path / "bert")
    same = compare(str(moved), str(here / small.DATA), METHODS, output=finished.folder, **small.OPTIONS)
    assert same.repeated == same.trials, "another path to the same weights is the same model"
    from safetensors.torch import load_file, save_file

    tensors = load_file(moved / "model.safetensors")
    tensors["encoder.layer.1.output.dense.weight"][0, 0] += 1
    save_file(tensors, moved / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="model: BertFor"):
        compare(str(moved), str(here / small.DATA), METHODS, output=finished.folder, **small.OPTIONS)


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_table(finished: Comparison, here: Path, tmp_path: Path) -> None:
    output, count = tmp_path / "killed", tmp_path / "count"
    assert kills.run(kills.words(here, tmp_path / "whole"), count=count) == 0
    calls = int(count.read_text())
    assert calls > 100
    draw, before = random.Random(0), 0
    for _ in range(
        3
    ):  # each goes on with what the one before has written, so less than a third is never all that is left
        assert kills.run(kills.words(here, output), draw.randrange(calls // 10, calls // 3)) == children.KILLED
        there = len(kills.trials(output))
        assert before <= there < finished.trials
        before = there
    assert before > 0
    assert kills.run(kills.words(here, output)) == 0
    assert not kills.lost(output, finished.folder)
    assert len(trials(output)) == finished.trials


@pytest.mark.slow
def test_killed_while_the_report_is_written_it_writes_it_anew(finished: Comparison, here: Path, tmp_path: Path) -> None:
    output, count = tmp_path / "report", tmp_path / "count"
    shutil.copytree(finished.folder, output)
    for path in [path for path in output.iterdir() if path.suffix in (".md", ".html", ".png")]:
        path.unlink()
    (output / "results.json").write_text("{")
    assert kills.run(kills.words(here, output), count=count) == 0
    assert not kills.lost(output, finished.folder)
    for n in random.Random(1).sample(range(12, int(count.read_text())), 2):
        assert kills.run(kills.words(here, output), n) == children.KILLED
    assert kills.run(kills.words(here, output)) == 0
    assert not kills.lost(output, finished.folder) and (output / "report.md").is_file()


# ------------------------------------------------------------------------------------------------------------------------- faults


def test_a_failing_trial_is_recorded_and_the_rest_go_on(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = benches.train
    faults: dict[float, BaseException] = {}

    def failing(adaptation: Any, *args: Any, learning_rate: float, **kwargs: Any) -> Any:
        if adaptation.methods[0].slug == "lora":
            faults.setdefault(
                learning_rate, [torch.OutOfMemoryError("no room"), TrainingError("the loss is nan")][len(faults) % 2]
            )
            if learning_rate in list(faults)[:2]:
                raise faults[learning_rate]
        if adaptation.methods[0].slug == "bitfit":
            raise KeyError("a fault of the program")
        return own(adaptation, *args, learning_rate=learning_rate, **kwargs)

    monkeypatch.setattr(benches, "train", failing)
    lines: list[str] = []
    result = again(here, tmp_path / "faults", "lora,bitfit,linear-probe", trials=3, watch=Lines(lines.append))
    lora, bitfit = result.row("lora"), result.row("bitfit")
    assert lora.failed_trials == 2 and lora.seeds == 2 and lora.mean is not None
    assert any("out of memory at batch size 4" in note for note in lora.notes) and any(
        "the loss is nan" in note for note in lora.notes
    )
    assert (
        bitfit.mean is None
        and bitfit.rank is None
        and "all 3 trials failed" in bitfit.notes[0]
        and "KeyError" in bitfit.notes[0]
    )
    assert result.row("linear-probe").seeds == 2 and result.rows[-1].label == "bitfit"
    assert any("FAILED: out of memory" in line for line in lines)
    rows = {(r["row"], r["kind"], r["number"]): r for r in trials(result.folder)}
    assert rows["lora", "tune", 0]["status"] == "failed" and "Traceback" in rows["bitfit", "tune", 0]["traceback"]
    assert "out of memory" in (result.folder / "report.md").read_text()
    before = len(trials(result.folder))
    again(here, tmp_path / "faults", "lora,bitfit,linear-probe", trials=3)
    assert len(trials(result.folder)) == before, "what failed is not tried again unasked"
    monkeypatch.setattr(benches, "train", own)
    mended = again(here, tmp_path / "faults", "lora,bitfit,linear-probe", trials=3, retry=True)
    assert mended.row("bitfit").seeds == 2 and mended.row("lora").failed_trials == 0


def test_a_learning_rate_that_is_far_too_high_ends_in_a_reason(here: Path, tmp_path: Path) -> None:
    bench = Bench(Settings(model=str(here / small.MODEL), data=str(here / small.DATA), **small.OPTIONS), tmp_path)
    trial = bench.tune(contenders("lora")[2], Proposal(0, 1e30))
    assert not trial.done and any(said in trial.reason for said in ("not finite", "is nan", "is inf"))
    assert bench.tune(contenders("lora")[2], Proposal(0, 1e-3)).done


def test_a_method_that_does_not_fit_is_said_and_defaults_are_left_out(here: Path, tmp_path: Path) -> None:
    result = again(here, tmp_path / "unfit", "lora:roles=[qqq],linear-probe", trials=1, seeds=1)
    row = result.row("lora:roles=[qqq]")
    assert row.mean is None and "qqq" in row.notes[0] and result.row("linear-probe").mean is not None


def test_a_backbone_that_was_written_to_stops_everything(here: Path, tmp_path: Path) -> None:
    bench = Bench(Settings(model=str(here / small.MODEL), data=str(here / small.DATA), **small.OPTIONS), tmp_path)
    with torch.no_grad():
        next(bench.backbone.parameters()).view(-1)[0] += 1
    with pytest.raises(Changed):
        bench.tune(contenders("lora")[2], Proposal(0, 1e-3))


def test_trials_do_not_depend_on_those_before(here: Path, tmp_path: Path) -> None:
    bench = Bench(Settings(model=str(here / small.MODEL), data=str(here / small.DATA), **small.OPTIONS), tmp_path)
    lora, full = contenders("lora")[2], contenders("lora")[1]
    first = bench.tune(lora, Proposal(0, 1e-2))
    torch.manual_seed(99)
    bench.tune(full, Proposal(0, 1e-1))
    second = bench.tune(lora, Proposal(0, 1e-2))
    assert first.losses == second.losses and first.scores == second.scores and first.key == second.key
    heads = [bench.fresh(seed).classifier.weight for seed in (0, 1, 2, 1)]  # type: ignore[union-attr]
    assert (
        torch.equal(heads[1], heads[3]) and not torch.equal(heads[0], heads[1]) and not torch.equal(heads[1], heads[2])
    )


def test_what_changed_nothing_is_said_to_have_changed_nothing(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = benches.train
    monkeypatch.setattr(benches, "train", lambda a, *args, learning_rate, **k: own(a, *args, learning_rate=1e-30, **k))
    monkeypatch.setattr("petiole.proof.Proof.stands", lambda *a, **k: None, raising=False)
    result = again(here, tmp_path / "nothing", "linear-probe", trials=1, seeds=1)
    assert any("changed nothing" in note for note in result.row("linear-probe").notes)
    assert not any("changed nothing" in note for note in result.row("bare").notes)


def test_a_crowded_machine_is_said_in_the_report(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = benches.train
    for share, said in ((0.4, True), (0.95, False)):
        monkeypatch.setattr(benches, "train", lambda *a, share=share, **k: replace(own(*a, **k), share=share))
        result = again(here, tmp_path / str(share), "linear-probe", trials=1, seeds=1)
        assert any("40 % of a core" in note for note in result.notes) == said


# ------------------------------------------------------------------------------------------------------------- sizes, forgetting


def test_a_size_search_tries_sizes_with_as_many_trials(here: Path, tmp_path: Path) -> None:
    result = again(here, tmp_path / "sizes", "lora:rank=4,linear-probe", trials=4, seeds=1, size_search=True)
    tuned = [r for r in trials(result.folder) if r["kind"] == "tune" and r["row"] == "lora:rank=4"]
    assert len(tuned) == 4 and tuned[0]["size"] == 4 and {r["size"] for r in tuned} <= {1, 2, 4, 8, 16}
    assert all(r["config"][0]["config"]["rank"] == r["size"] for r in tuned)
    row = result.row("lora:rank=4")
    assert row.size in {r["size"] for r in tuned} and row.config[0]["config"]["rank"] == row.size
    assert result.row("linear-probe").size is None and "--size-search" in result.command


def test_forgetting_is_scored_on_what_the_model_could_do(tmp_path: Path) -> None:
    model = small.gpt2(tmp_path / "gpt2")
    text = tmp_path / "text.csv"
    text.write_text("text\n" + "the film was good .\n" * 12 + "a long film is bad .\n" * 12)
    other = tmp_path / "other.csv"
    other.write_text("text\n" + "short and very short .\n" * 20)
    options = {**small.OPTIONS, "trials": 1, "seeds": 1, "steps": 8}
    result = compare(str(model), str(text), "lora", output=tmp_path / "run", forgetting=str(other), **options)
    full, lora, bare = result.row("full"), result.row("lora"), result.row("bare")
    assert result.metric == "perplexity" and not result.higher_is_better
    assert full.forgetting is not None and lora.forgetting is not None and bare.forgetting is None
    runs = {r["row"]: r for r in trials(result.folder) if r["kind"] == "run"}
    for row in (full, lora):
        before, after = runs[row.label]["forgetting"]["before"], runs[row.label]["forgetting"]["after"]
        assert row.forgetting == pytest.approx(after - before) and after != before
    assert "held-out" in (result.folder / "report.md").read_text()


def test_forgetting_needs_data_that_the_model_knows(here: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="something to forget"):
        again(here, tmp_path / "run", forgetting=str(here / small.DATA))
