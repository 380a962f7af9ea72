"""Retrieval: losses of bi-encoders and cross-encoders."""

from petiole.tasks.retrieval.losses import BiEncoderLoss, CrossEncoderLoss, check_towers

__all__ = ["BiEncoderLoss", "CrossEncoderLoss", "check_towers"]
