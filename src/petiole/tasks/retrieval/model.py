"""Two models that rank passages: one embeds queries and passages apart, the other reads both together.

    BiEncoder       s(q, p) = cos(e(q), e(p)) / t     e: the mean of a text's last states, or the first of them
    CrossEncoder    s(q, p) = head(backbone(q, p))    one logit

A row of a batch is a query with its passages, so a method that takes samples one by one gets whole ones; the backbone reads all texts of a
batch at once, as one ordinary batch.
"""

from __future__ import annotations

from os import PathLike
from typing import Any, Literal

import torch
from torch import Tensor, nn

from petiole.errors import ConfigError
from petiole.method import wide
from petiole.tasks.retrieval.losses import BiEncoderLoss, CrossEncoderLoss, PointwiseLoss

Pooling = Literal["mean", "cls"]
RankingLoss = Literal["softmax", "bce"]


class RetrievalOutput(dict[str, Any]):
    """What a model gives: a dictionary without the entries that there are none for, whose entries are attributes too.

    Attributes:
        loss: where there are labels.
        logits: scores; of a bi-encoder (queries, passages of the batch), where there are labels; of a cross-encoder (..., 1).
        embeddings: of a bi-encoder, (..., d).
    """

    @property
    def loss(self) -> Tensor | None:
        return self.get("loss")

    @property
    def logits(self) -> Tensor:
        return self["logits"]

    @property
    def embeddings(self) -> Tensor:
        return self["embeddings"]


class BiEncoder(nn.Module):
    """A backbone that embeds texts, queries and passages alike.

    Args:
        backbone: a base model of Transformers, such as `BertModel`.
        pooling: the mean over a text's tokens, or the first.
        normalise: embeddings of length 1, so that scores are cosines.
        temperature, in_batch: of the loss; see `BiEncoderLoss`.

    Raises:
        ConfigError: an encoder-decoder, or a value is out of range.
    """

    base_model_prefix = "backbone"
    main_input_name = "input_ids"

    def __init__(
        self,
        backbone: nn.Module,
        *,
        pooling: Pooling = "mean",
        normalise: bool = True,
        temperature: float = 0.05,
        in_batch: bool = True,
    ) -> None:
        super().__init__()
        config: Any = backbone.config
        if pooling not in ("mean", "cls"):
            raise ConfigError(f"pooling: {pooling!r} is neither mean nor cls")
        if getattr(config, "is_encoder_decoder", False):
            raise ConfigError(f"{type(backbone).__name__} has a decoder: give its encoder alone")
        self.config, self.backbone = config, backbone
        self.pooling, self.normalise = pooling, normalise
        self.loss = BiEncoderLoss(temperature, in_batch)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        relevant: Tensor | None = None,
    ) -> RetrievalOutput:
        """Embeddings; with labels, scores and loss.

        Args:
            input_ids, attention_mask, token_type_ids: (..., T); with labels (B, 1 + n, T), a query, its passage, negatives.
            labels: numbers of the documents that the passages are (B, n).
            relevant: numbers of all documents that are relevant to a query, or -1 (B, m): in the batch, they are no negatives of it.
        """
        inputs = flattened(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        e = self.pooled(self.backbone(**inputs).last_hidden_state, inputs["attention_mask"])
        e = e.view(*input_ids.shape[:-1], -1)
        if labels is None:
            return RetrievalOutput(embeddings=e)
        if input_ids.ndim != 3 or labels.shape != (len(e), e.shape[1] - 1) or not labels.shape[1]:
            raise ConfigError(
                f"input_ids {tuple(input_ids.shape)}, labels {tuple(labels.shape)}: (B, 1 + n, T) and (B, n), n > 0"
            )
        queries, own, others = e[:, 0], e[:, 1], e[:, 2:]
        ignored = None
        if relevant is not None and self.loss.in_batch:
            columns = torch.cat([labels[:, 0], labels[:, 1:].flatten()])
            ignored = (columns == relevant.unsqueeze(2)).any(1)  # (B, B n)
            ignored = ignored & ~torch.eye(*ignored.shape, dtype=torch.bool, device=ignored.device)
        loss = self.loss(queries, own, others, ignored)
        return RetrievalOutput(loss=loss, logits=queries @ torch.cat([own, others.flatten(0, 1)]).T, embeddings=e)

    def pooled(self, h: Tensor, mask: Tensor) -> Tensor:
        """States (texts, T, d) -> embeddings (texts, d), in float32 at least."""
        h = wide(h)
        if self.pooling == "cls":
            e = h[torch.arange(len(h), device=h.device), mask.argmax(1)]  # padding may stand in front
        else:
            weight = mask.unsqueeze(2).to(h.dtype)
            e = (h * weight).sum(1) / weight.sum(1).clamp(min=1)
        return nn.functional.normalize(e, dim=1) if self.normalise else e

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Of the backbone."""
        self.backbone.gradient_checkpointing_enable(**options)  # type: ignore[operator]

    def save_pretrained(self, folder: str | PathLike[str], **options: Any) -> None:
        """The backbone alone, for anything that reads models of Transformers."""
        self.backbone.save_pretrained(folder, **options)  # type: ignore[operator]


class CrossEncoder(nn.Module):
    """A classifier of one logit that reads a query and a passage.

    Args:
        classifier: such as `BertForSequenceClassification` with num_labels=1.
        loss: softmax over the passages of a query, or binary cross-entropy of each pair.
    """

    main_input_name = "input_ids"

    def __init__(self, classifier: nn.Module, *, loss: RankingLoss = "softmax") -> None:
        super().__init__()
        config: Any = classifier.config
        if config.num_labels != 1 or loss not in ("softmax", "bce"):
            raise ConfigError(f"num_labels = {config.num_labels}, loss = {loss!r}: 1 label; softmax or bce")
        self.config, self.model = config, classifier
        self.loss: nn.Module = CrossEncoderLoss() if loss == "softmax" else PointwiseLoss()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> RetrievalOutput:
        """Scores of pairs (..., 1); with labels, the loss.

        Args:
            input_ids, attention_mask, token_type_ids: (..., T); with labels (B, n, T), a query with each of its passages.
            labels: (B, n), 1 for the relevant passage, which comes first, 0 for the others.
        """
        inputs = flattened(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        logits = self.model(**inputs).logits.view(*input_ids.shape[:-1], 1)
        if labels is None:
            return RetrievalOutput(logits=logits)
        scores = logits.squeeze(-1)
        if scores.shape != labels.shape:
            raise ConfigError(f"scores {tuple(scores.shape)}, labels {tuple(labels.shape)}: one for each pair")
        in_groups = isinstance(self.loss, CrossEncoderLoss)
        loss = self.loss(scores) if in_groups else self.loss(scores.flatten(), labels.flatten())
        return RetrievalOutput(loss=loss, logits=logits)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Of the backbone."""
        self.model.gradient_checkpointing_enable(**options)  # type: ignore[operator]

    def save_pretrained(self, folder: str | PathLike[str], **options: Any) -> None:
        """The classifier alone, for anything that reads models of Transformers."""
        self.model.save_pretrained(folder, **options)  # type: ignore[operator]


def flattened(**inputs: Tensor | None) -> dict[str, Tensor]:
    """Texts (..., T) -> (texts, T), of those inputs that there are."""
    return {name: value.reshape(-1, value.shape[-1]) for name, value in inputs.items() if value is not None}
