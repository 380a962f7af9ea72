"""Metrics: pure functions first, and a table of what each is called and which way is better.

Four kinds, by what they are computed from: `logits` (one row of scores and one label for each example), `tokens` (the loss of every
predicted token and whether it was right, see `token_scores`), `texts` (generated and reference strings), and `rankings` (scores and
judgements of documents by query, see `petiole.tasks.retrieval.metrics`).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from petiole.errors import ConfigError, TrainingError, need

Kind = Literal["logits", "tokens", "texts", "rankings"]
IGNORED = -100  # a label at which nothing is predicted: padding, a prompt
OTHERS = -1e9  # the score of a class that is another task's: e to it is 0


@dataclass(frozen=True)
class Metric:
    """One figure of merit.

    Attributes:
        name: the key in every table and file.
        title: what a reader sees.
        higher_is_better: the direction of every sort and arrow.
        lowest, highest: its bounds.
        kind: what `function` is given, two arguments in each case.
        function: the pure function.
    """

    name: str
    title: str
    higher_is_better: bool
    lowest: float
    highest: float
    kind: Kind
    function: Callable[..., float]

    def __call__(self, predictions: Any, truth: Any) -> float:
        return self.function(predictions, truth)


METRICS: dict[str, Metric] = {}


def metric(
    title: str,
    kind: Kind,
    *,
    name: str | None = None,
    higher_is_better: bool = True,
    lowest: float = 0.0,
    highest: float = 1.0,
) -> Callable[[Callable[..., float]], Callable[..., float]]:
    """Enter a function into `METRICS` under its own name, or another."""
    given = name

    def enter(function: Callable[..., float]) -> Callable[..., float]:
        name = given or function.__name__
        if name in METRICS:
            raise ConfigError(f"two metrics are called {name!r}: rename one")
        METRICS[name] = Metric(name, title, higher_is_better, lowest, highest, kind, function)
        return function

    return enter


def compute(names: Sequence[str], predictions: Any, truth: Any) -> dict[str, float]:
    """Several metrics of one kind at once."""
    return {name: METRICS[name](predictions, truth) for name in names}


# ---------------------------------------------------------------------------------------------------------------------- classes


def _scores(logits: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """Logits (n, classes) in float64 and labels (n,), checked."""
    logits, labels = torch.as_tensor(logits).double(), torch.as_tensor(labels).long()
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ConfigError(
            f"metrics need logits (n, classes) and labels (n,), n > 0: got {_shape(logits)} and {_shape(labels)}"
        )
    if not logits.isfinite().all():
        row = int((~logits.isfinite()).any(1).nonzero()[0])
        raise TrainingError(
            f"the model's scores are not finite (first in row {row + 1})\nLower the learning rate, or compute in float32."
        )
    return logits, labels


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))


@metric("accuracy", "logits")
def accuracy(logits: Any, labels: Any) -> float:
    """Share of rows whose highest score is at the label.

    >>> accuracy([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0], [0.0, 1.0]], [0, 1, 1, 1])
    0.75
    """
    scores, truth = _scores(logits, labels)
    return float((scores.argmax(1) == truth).double().mean())


@metric("macro F1", "logits")
def macro_f1(logits: Any, labels: Any) -> float:
    """Mean over classes of 2·precision·recall / (precision + recall); a class neither present nor predicted doesn't count.

    >>> round(macro_f1([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0], [0.0, 1.0]], [0, 1, 1, 1]), 4)
    0.7333
    """
    scores, truth = _scores(logits, labels)
    sklearn = need("compare", "sklearn.metrics")
    return float(sklearn.f1_score(truth.numpy(), scores.argmax(1).numpy(), average="macro", zero_division=0))


@metric("Matthews correlation", "logits", lowest=-1.0)
def matthews(logits: Any, labels: Any) -> float:
    """Correlation of predicted with true class: 1 perfect, 0 as good as chance or a constant answer.

    >>> round(matthews([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0], [0.0, 1.0]], [0, 1, 1, 1]), 4)
    0.5774
    """
    scores, truth = _scores(logits, labels)
    sklearn = need("compare", "sklearn.metrics")
    return float(sklearn.matthews_corrcoef(truth.numpy(), scores.argmax(1).numpy()))


@metric("log-loss", "logits", higher_is_better=False, highest=math.inf)
def log_loss(logits: Any, labels: Any) -> float:
    """-mean log p(label), p = softmax(logits), from the logits so that nothing is clipped.

    >>> round(log_loss([[0.0, 0.0]], [1]), 4)
    0.6931
    """
    scores, truth = _scores(logits, labels)
    return float(torch.nn.functional.cross_entropy(scores, truth))


@metric("mean over tasks", "logits")
def task_mean(logits: Any, labels: Any) -> float:
    """Mean over tasks of the accuracy of each. Rows of one task have scores at the same classes, and `OTHERS` at all that are not its own.

    >>> task_mean([[2.0, 1.0, OTHERS, OTHERS], [0.0, 3.0, OTHERS, OTHERS], [OTHERS, OTHERS, 0.0, 1.0]], [0, 0, 3])
    0.75
    """
    scores, truth = _scores(logits, labels)
    tasks = (scores > OTHERS / 2).unique(dim=0, return_inverse=True)[1]
    right = (scores.argmax(1) == truth).double()
    return float(torch.stack([right[tasks == task].mean() for task in tasks.unique()]).mean())


# ----------------------------------------------------------------------------------------------------------------------- tokens


def token_scores(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits (..., vocabulary) and labels (...) -> (..., 2): -log p(label) and 1 where the highest score is at the label, else 0.

    What metrics of language models need of the logits: a few thousand times fewer numbers. Zero where the label is ignored.
    """
    known = labels != IGNORED
    target = labels.where(known, 0)
    logp = logits.float().log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
    right = (logits.argmax(-1) == target).float()
    return torch.stack([-logp, right], -1) * known.unsqueeze(-1)


def _tokens(scores: Any, labels: Any) -> tuple[Tensor, float]:
    """Sums over the predicted tokens (2,) and their number."""
    scores, labels = torch.as_tensor(scores).double(), torch.as_tensor(labels)
    known = labels != IGNORED
    if scores.shape != (*labels.shape, 2) or not known.any():
        raise ConfigError(
            f"token metrics need scores (..., 2) and a label for at least one token: got {_shape(scores)} and {_shape(labels)}"
        )
    if not scores[known].isfinite().all():
        raise TrainingError(
            "the model's loss is not finite on some tokens\nLower the learning rate, or compute in float32."
        )
    return scores[known].sum(0), float(known.sum())


@metric("perplexity", "tokens", higher_is_better=False, lowest=1.0, highest=math.inf)
def perplexity(scores: Any, labels: Any) -> float:
    """exp(mean of -log p over all predicted tokens): every token weighs the same, not every row or batch."""
    total, count = _tokens(scores, labels)
    mean = float(total[0]) / count
    return math.exp(mean) if mean < 709 else math.inf


@metric("token accuracy", "tokens")
def token_accuracy(scores: Any, labels: Any) -> float:
    """Share of tokens predicted right, each given the true tokens before it."""
    total, count = _tokens(scores, labels)
    return float(total[1]) / count


# ------------------------------------------------------------------------------------------------------------------------ texts


def _pairs(predictions: Sequence[str], references: Sequence[str]) -> None:
    if len(predictions) != len(references) or not len(references):
        raise ConfigError(
            f"text metrics need as many predictions as references, at least one: got {len(predictions)} and {len(references)}"
        )


@metric("exact match", "texts")
def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of texts equal to their reference, apart from the amount of white space.

    >>> exact_match(["a  b", "c"], ["a b", "C"])
    0.5
    """
    _pairs(predictions, references)
    return float(np.mean([p.split() == r.split() for p, r in zip(predictions, references, strict=True)]))


@metric("ROUGE-L", "texts")
def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean over texts of the F-measure of their longest common subsequence of words (lower case, no stemming).  Lin 2004.

        P = LCS(p, r) / |p|,   R = LCS(p, r) / |r|,   F = 2PR / (P + R)

    >>> round(rouge_l(["the cat sat on the mat"], ["the cat is on the mat"]), 4)
    0.8333
    """
    _pairs(predictions, references)
    return float(np.mean([_rouge_l(_words(p), _words(r)) for p, r in zip(predictions, references, strict=True)]))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _rouge_l(prediction: list[str], reference: list[str]) -> float:
    if not prediction or not reference:
        return float(prediction == reference)
    return 2 * common_subsequence(prediction, reference) / (len(prediction) + len(reference))


def common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, a column of the table at a time as the bits of one integer (Hyyrö 2004).

    >>> common_subsequence("ABCBDAB", "BDCABA")
    4
    """
    places: Counter[str] = Counter()
    for i, word in enumerate(a):
        places[word] |= 1 << i
    every = (1 << len(a)) - 1
    column = every  # a zero bit marks a row where the length grows
    for word in b:
        match = column & places[word]
        column = ((column + match) | (column - match)) & every
    return len(a) - column.bit_count()


@metric("BLEU", "texts")
def bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU up to 4-grams, tokenised as SacreBLEU's 13a, in [0, 1].  Papineni et al. 2002; Post 2018, arXiv 1804.08771."""
    _pairs(predictions, references)
    text = need("compare", "torchmetrics.functional.text")
    return float(text.sacre_bleu_score(list(predictions), [[r] for r in references], tokenize="13a"))


@metric("chrF", "texts")
def chrf(predictions: Sequence[str], references: Sequence[str]) -> float:
    """F2 over character n-grams up to 6, in [0, 1]: fair to languages with rich word forms.  Popović 2015."""
    _pairs(predictions, references)
    text = need("compare", "torchmetrics.functional.text")
    return float(text.chrf_score(list(predictions), [[r] for r in references], n_word_order=0))
