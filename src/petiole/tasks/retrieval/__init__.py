"""Retrieval: losses of bi-encoders and cross-encoders, metrics of rankings, and rerankers put together for pairs of languages."""

from petiole.tasks.retrieval.languages import compose, language_module, ranking_module, size_of, under
from petiole.tasks.retrieval.losses import BiEncoderLoss, CrossEncoderLoss, PointwiseLoss, check_towers
from petiole.tasks.retrieval.metrics import by_query, ranking_metric, ranking_metrics
from petiole.tasks.retrieval.reranking import rerank

__all__ = [
    "BiEncoderLoss",
    "CrossEncoderLoss",
    "PointwiseLoss",
    "by_query",
    "check_towers",
    "compose",
    "language_module",
    "ranking_metric",
    "ranking_metrics",
    "ranking_module",
    "rerank",
    "size_of",
    "under",
]
