"""Retrieval: search by words and by vectors, rerankers, what trains them and how good rankings are; and rerankers for pairs of languages."""

from petiole.tasks.retrieval.bm25 import BM25
from petiole.tasks.retrieval.dense import DenseRetrieval, embed
from petiole.tasks.retrieval.languages import compose, language_module, ranking_module, size_of, under
from petiole.tasks.retrieval.losses import BiEncoderLoss, CrossEncoderLoss, PointwiseLoss, check_towers
from petiole.tasks.retrieval.metrics import by_query, ranking_metric, ranking_metrics
from petiole.tasks.retrieval.model import BiEncoder, CrossEncoder
from petiole.tasks.retrieval.reranking import Reranking, rerank

__all__ = [
    "BM25",
    "BiEncoder",
    "BiEncoderLoss",
    "CrossEncoder",
    "CrossEncoderLoss",
    "DenseRetrieval",
    "PointwiseLoss",
    "Reranking",
    "by_query",
    "check_towers",
    "compose",
    "embed",
    "language_module",
    "ranking_metric",
    "ranking_metrics",
    "ranking_module",
    "rerank",
    "size_of",
    "under",
]
