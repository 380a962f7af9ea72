"""The second stage of retrieval: the documents that a first stage found, in the order of a cross-encoder's scores; as a task, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from petiole.attach import given, host_of
from petiole.errors import ConfigError
from petiole.tasks.loop import evaluating
from petiole.tasks.models import Head
from petiole.tasks.quiet import bar
from petiole.tasks.retrieval.metrics import Run
from petiole.tasks.retrieval.model import CrossEncoder, RankingLoss
from petiole.tasks.retrieval.task import Retrieval
from petiole.tasks.tokens import longest

if TYPE_CHECKING:
    from petiole.tasks.data import TaskData

QUERY, DOCUMENT = 0, 1  # segments, as in token_type_ids


def rerank(
    model: nn.Module,
    query: str,
    docs: Sequence[str],
    top_k: int = 100,
    *,
    tokenizer: Any,
    max_length: int | None = None,
    batch_size: int = 20,
) -> list[tuple[int, float | None]]:
    """Documents as a first stage ranked them -> their numbers and scores, the first `top_k` in a new order, the others behind, unscored.

    Args:
        max_length: tokens of a pair, of which the longer part is cut first; what the model can take if None.

    Raises:
        ConfigError: more tokens than the model has positions for, or a head of several outputs.
    """
    if top_k < 1 or batch_size < 1:
        raise ConfigError(f"top_k = {top_k}, batch_size = {batch_size}: from 1")
    most = longest(tokenizer, model.config, max_length)
    scores: list[float] = []
    with evaluating(model):
        for start in range(0, min(top_k, len(docs)), batch_size):
            part = list(docs[start : min(start + batch_size, top_k)])
            batch = tokenizer(
                [query] * len(part),
                part,
                padding=True,
                truncation=most is not None,
                max_length=most,
                return_tensors="pt",
            )
            batch = batch.to(next(model.parameters()).device)
            with given(model, segments=segments_of(batch)) if host_of(model) is not None else nullcontext():
                logits = model(**batch).logits
            if logits.shape != (len(part), 1):
                raise ConfigError(f"logits {tuple(logits.shape)}: a reranker gives one for each pair (num_labels=1)")
            scores += logits[:, 0].float().tolist()
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    return [(i, scores[i]) for i in order] + [(i, None) for i in range(len(scores), len(docs))]


def segments_of(batch: Any) -> Tensor:
    """0 at the tokens of the query and those that frame it, 1 at the document's (B, T), also for models without token types."""
    rows = []
    for row in range(len(batch["input_ids"])):
        segment, found = QUERY, []
        for number in batch.sequence_ids(row):  # None for what the tokenizer added
            segment = segment if number is None else number
            found.append(segment)
        rows.append(found)
    return torch.tensor(rows, device=batch["input_ids"].device)


class Reranking(Retrieval):
    """A query and a document read together; what BM25 found is put in a new order.

    Args:
        loss: softmax over the passages of a row, or bce for each pair by itself.
        negatives: of each row. kwargs: of `Retrieval` and `Task`.
    """

    name: ClassVar[str] = "reranking"
    title: ClassVar[str] = "Reranking"
    auto_model: ClassVar[str] = "AutoModelForSequenceClassification"

    def __init__(
        self, data: TaskData, model: str | Path, *, loss: RankingLoss = "softmax", negatives: int = 3, **kwargs: Any
    ) -> None:
        super().__init__(data, model, negatives=negatives, **kwargs)
        if negatives < 1:
            raise ConfigError(f"negatives = {negatives}: from 1; a reranker learns from what it tells apart")
        self.loss: RankingLoss = loss

    @property
    def label_names(self) -> Sequence[str]:
        return ("relevance",)

    def build_model(
        self, *, head: Head = "auto", seed: int = 0, dtype: torch.dtype | str = "float32", **options: Any
    ) -> CrossEncoder:
        """As `Task.build_model`, with a head of one logit."""
        model = super().build_model(head=head, seed=seed, dtype=dtype, **options)
        config: Any = model.config
        if config.pad_token_id is None:  # decoders find the last real token by it
            config.pad_token_id = self.processor.pad_token_id
        return CrossEncoder(model, loss=self.loss).eval()

    def empty_model(self) -> CrossEncoder:
        return CrossEncoder(super().empty_model(), loss=self.loss).eval()

    def texts_of(self, query: str, passages: Sequence[str]) -> tuple[list[str], list[str] | None]:
        return [query] * len(passages), list(passages)

    def labels(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {"labels": [[1.0] + [0.0] * (len(numbers) - 1) for numbers in batch["passages"]]}

    def rank(self, model: nn.Module, dataset: Any, *, batch_size: int = 32) -> Run:
        found = []
        pairs = zip(self.column(dataset, "query"), self.found(dataset, self.top_k), strict=True)
        for query, ranked in bar(list(pairs), "reranking"):
            numbers = [number for number, _ in ranked]
            scores = rerank(
                model,
                query,
                [self.texts[number] for number in numbers],
                self.top_k,
                tokenizer=self.processor,
                max_length=self.max_length,
                batch_size=batch_size,
            )
            found.append([(numbers[place], score) for place, score in scores if score is not None])
        return self.named(dataset, found)
