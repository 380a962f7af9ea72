"""Merged models of retrieval are folders that Transformers reads; and files of classifiers are not taken for those of rerankers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import petiole as pt
from petiole.errors import ConfigError
from petiole.merged import from_file, merged
from petiole.tasks import load_data, prepare
from petiole.tasks.loop import evaluating
from petiole.tasks.retrieval import embed
from tasks import makers

for package in ("bm25s", "Stemmer", "ir_measures"):
    pytest.importorskip(package, reason="the extra `retrieval` is not installed")


def changed(model: torch.nn.Module) -> pt.Adaptation:
    """LoRA that does something."""
    tuned = pt.attach(model, pt.LoRA(rank=2), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return tuned


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    texts = ["the cat sat on a mat", "the dog ran on the hill", "a very good film", "a bad film", "one two three"]
    asked = ["cat mat", "dog hill", "good film", "bad film", "two three"]
    makers.jsonl(folder / "corpus.jsonl", [{"_id": f"d{i}", "text": text} for i, text in enumerate(texts)])
    makers.jsonl(folder / "queries.jsonl", [{"_id": f"q{i}", "text": text} for i, text in enumerate(asked)])
    rows = [{"query-id": f"q{i}", "corpus-id": f"d{i}", "score": 1} for i in range(5)]
    makers.jsonl(folder / "qrels.jsonl", rows)
    return folder


@pytest.mark.parametrize("kind", ["dense-retrieval", "reranking"])
def test_a_merged_model_needs_no_petiole(collection: Path, models: dict[str, Path], tmp_path: Path, kind: str) -> None:
    from transformers import AutoModel, AutoModelForSequenceClassification

    task: Any = prepare(load_data(collection, task=kind, validation_fraction=0.4), models["bert"])
    model = task.build_model()
    changed(model).save(tmp_path / "tuned.petiole.safetensors")
    found = merged(
        str(models["bert"]), tmp_path / "tuned.petiole.safetensors", tmp_path / "plain", data=str(collection), task=kind
    )
    assert found["largest_change"] < 1e-4
    ids = task.processor(["good film"], return_tensors="pt")
    if kind == "reranking":
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain").eval()
        with evaluating(model):
            torch.testing.assert_close(plain(**ids).logits, model(**ids).logits, atol=1e-5, rtol=1e-4)
        return
    plain = AutoModel.from_pretrained(tmp_path / "plain").eval()
    mean = torch.nn.functional.normalize(plain(**ids).last_hidden_state.mean(1), dim=1)
    torch.testing.assert_close(
        mean.detach(), embed(model, ["good film"], tokenizer=task.processor), atol=1e-5, rtol=1e-4
    )


def test_a_classifier_of_three_classes_is_found_without_data(models: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(models["bert"], num_labels=3)
    changed(model).save(tmp_path / "three.petiole.safetensors")
    found, _ = from_file(str(models["bert"]), tmp_path / "three.petiole.safetensors")
    assert type(found) is type(model) and found.config.num_labels == 3


def test_what_ranks_is_not_told_without_data(collection: Path, models: dict[str, Path], tmp_path: Path) -> None:
    model = prepare(load_data(collection, task="reranking"), models["bert"]).build_model()
    changed(model).save(tmp_path / "ranks.petiole.safetensors")
    with pytest.raises(ConfigError, match=r"made on a CrossEncoder.*\nGive the task's data: --data"):
        from_file(str(models["bert"]), tmp_path / "ranks.petiole.safetensors")
