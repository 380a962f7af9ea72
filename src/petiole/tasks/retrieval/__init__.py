"""Retrieval: losses of bi-encoders and cross-encoders, and metrics of rankings."""

from petiole.tasks.retrieval.losses import BiEncoderLoss, CrossEncoderLoss, check_towers
from petiole.tasks.retrieval.metrics import by_query, ranking_metric, ranking_metrics

__all__ = ["BiEncoderLoss", "CrossEncoderLoss", "by_query", "check_towers", "ranking_metric", "ranking_metrics"]
