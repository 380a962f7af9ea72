"""Search by words: BM25 as bm25s computes it, over English stems. The first stage before a model ranks, and what a model must beat."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from petiole.errors import ConfigError, need


class BM25:
    """An index of texts.

    Args:
        texts: to be found.
        k1, b: how soon a word's repetition stops to count, and how much long texts are marked down.
    """

    def __init__(self, texts: Sequence[str], *, k1: float = 1.5, b: float = 0.75) -> None:
        if not texts:
            raise ConfigError("BM25: no texts to search in")
        self.library, self.size = need("retrieval", "bm25s"), len(texts)
        self.stemmer = need("retrieval", "Stemmer").Stemmer("english")
        self.index = self.library.BM25(k1=k1, b=b)
        self.index.index(self._words(texts), show_progress=sys.stderr.isatty())

    def _words(self, texts: Sequence[str]) -> Any:
        watched = sys.stderr.isatty()
        return self.library.tokenize(list(texts), stopwords="en", stemmer=self.stemmer, show_progress=watched)

    def search(self, queries: Sequence[str], top_k: int) -> list[list[tuple[int, float]]]:
        """Of each query the best texts that share a word with it, at most `top_k`: their numbers and scores, best first."""
        if top_k < 1:
            raise ConfigError(f"top_k = {top_k}: from 1")
        if not queries:
            return []
        found, scores = self.index.retrieve(
            self._words(queries), k=min(top_k, self.size), show_progress=sys.stderr.isatty()
        )
        pairs = [list(zip(row.tolist(), own.tolist(), strict=True)) for row, own in zip(found, scores, strict=True)]
        return [[(number, score) for number, score in row if score > 0] for row in pairs]
