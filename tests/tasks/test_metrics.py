"""Metrics against references, identities and hand-worked values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import petiole.tasks.retrieval.metrics  # noqa: F401  which enters those of rankings
from petiole.errors import ConfigError, TrainingError
from petiole.tasks.metrics import IGNORED, METRICS, common_subsequence, compute, metric, token_scores


@pytest.fixture
def classified() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(60, 4, generator=generator), torch.randint(0, 3, (60,), generator=generator)


def test_classification_metrics_by_their_formulas(classified: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = classified
    confusion = np.zeros((4, 4))
    for truth, guess in zip(labels, logits.argmax(1), strict=True):
        confusion[truth, guess] += 1
    true, guessed, hits, n = confusion.sum(1), confusion.sum(0), confusion.diagonal(), confusion.sum()
    f1 = np.mean(2 * hits / (true + guessed))
    above = hits.sum() * n - true @ guessed
    matthews = above / math.sqrt((n**2 - guessed @ guessed) * (n**2 - true @ true))
    found = compute(("accuracy", "macro_f1", "matthews", "log_loss"), logits, labels)
    assert found["accuracy"] == pytest.approx(hits.sum() / n)
    assert found["macro_f1"] == pytest.approx(f1)
    assert found["matthews"] == pytest.approx(matthews)
    assert found["log_loss"] == pytest.approx(-logits.double().log_softmax(1)[range(60), labels].mean().item())


@pytest.mark.parametrize("name", METRICS)
def test_direction_and_bounds(name: str) -> None:
    """Perfect predictions reach the good bound; others lie strictly on the other side of it."""
    kind = METRICS[name]
    if kind.kind == "rankings":
        pytest.importorskip("ir_measures")
    labels = torch.tensor([0, 1, 2, 1])
    good, bad = {
        "logits": (torch.eye(3)[labels] * 1000, torch.eye(3)[[1, 1, 2, 0]]),
        "tokens": (torch.tensor([[0.0, 1.0]] * 4), torch.tensor([[0.7, 1.0], [2.0, 0.0], [0.1, 1.0], [0.3, 1.0]])),
        "texts": (["the cat sat on the mat ."] * 4, ["the cat sat on a hill ."] * 4),
        "rankings": ({"q": {"a": 2.0, "b": 1.0}}, {"q": {"c": 3.0, "a": 2.0}}),
    }[kind.kind]
    truths = {"texts": ["the cat sat on the mat ."] * 4, "rankings": {"q": {"a": 1, "b": 1}}}
    truth = truths.get(kind.kind, labels)
    best = kind.highest if kind.higher_is_better else kind.lowest
    assert kind(good, truth) == pytest.approx(best, abs=1e-6)
    value = kind(bad, truth)
    assert kind.lowest <= value <= kind.highest
    assert (value < best - 0.01) if kind.higher_is_better else (value > best + 0.01)


def test_scores_that_are_not_finite_are_refused() -> None:
    logits = torch.zeros(5, 2)
    logits[3, 1] = math.nan
    with pytest.raises(TrainingError, match="row 4"):
        METRICS["accuracy"](logits, torch.zeros(5, dtype=torch.long))
    with pytest.raises(TrainingError):
        METRICS["perplexity"](torch.tensor([[math.nan, 0.0]]), torch.tensor([1]))


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"\(3, 2\)"):
        METRICS["accuracy"](torch.zeros(3, 2), torch.zeros(4))
    with pytest.raises(ConfigError):
        METRICS["rouge_l"](["a"], [])
    with pytest.raises(ConfigError):
        METRICS["perplexity"](torch.zeros(2, 3, 2), torch.full((2, 3), IGNORED))


def test_token_scores_are_the_cross_entropy_of_every_token() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(3, 5, 7, generator=generator), torch.randint(0, 7, (3, 5), generator=generator)
    labels[0, 2:] = IGNORED
    scores = token_scores(logits, labels)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    assert METRICS["perplexity"](scores, labels) == pytest.approx(math.exp(loss))
    right = (logits.argmax(-1) == labels)[labels != IGNORED].double().mean()
    assert METRICS["token_accuracy"](scores, labels) == pytest.approx(right.item())
    assert scores[0, 2:].eq(0).all()


def test_a_perplexity_beyond_floats_is_infinite() -> None:
    assert METRICS["perplexity"](torch.tensor([[800.0, 0.0]]), torch.tensor([1])) == math.inf


def test_longest_common_subsequence_against_the_plain_table() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        a, b = ("".join(generator.choice(list("abcd"), size=generator.integers(0, 80))) for _ in range(2))
        table = np.zeros((len(a) + 1, len(b) + 1), dtype=int)
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1, j + 1] = table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
        assert common_subsequence(a, b) == table[-1, -1]


def test_text_metrics_by_hand() -> None:
    prediction, reference = ["the cat sat on the mat"], ["the cat sat on a mat"]
    assert METRICS["rouge_l"](prediction, reference) == pytest.approx(5 / 6)
    assert METRICS["bleu"](prediction, reference) == pytest.approx((5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25, abs=1e-4)
    assert METRICS["rouge_l"](["", "Straße!"], ["", "straße"]) == 1.0
    assert METRICS["exact_match"](["a b ", "A"], ["a  b", "a"]) == 0.5


def test_a_name_belongs_to_one_metric() -> None:
    def accuracy(predictions: object, labels: object) -> float:
        return 0.0

    with pytest.raises(ConfigError, match="accuracy"):
        metric("another", "logits")(accuracy)
    assert METRICS["accuracy"].title == "accuracy"
    assert not METRICS["perplexity"].higher_is_better
