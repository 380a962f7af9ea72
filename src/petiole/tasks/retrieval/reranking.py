"""The second stage of retrieval: the documents that a first stage found, in the order of a cross-encoder's scores."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from petiole.attach import given, host_of
from petiole.errors import ConfigError
from petiole.tasks.loop import evaluating
from petiole.tasks.tokens import longest

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
