"""Text classification: one text, or a pair of texts, to one of several classes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from petiole.tasks.base import Task
from petiole.tasks.columns import Column
from petiole.tasks.encoding import Rows, encode_rows
from petiole.tasks.loop import Collator
from petiole.tasks.tokens import Pad, longest, padding, prepare, side, tokenize

if TYPE_CHECKING:
    from petiole.tasks.data import TaskData

CLASSIFICATION_METRICS = ("accuracy", "macro_f1", "matthews", "log_loss")
LABEL = Column(
    "label", "label", ("label", "labels", "class", "category", "intent", "sentiment", "coarse_label", "fine_label")
)
TEXT = (
    "text",
    "sentence",
    "sentence1",
    "content",
    "document",
    "review",
    "question",
    "utterance",
    "query",
    "tweet",
    "comment",
    "body",
)
PAIRS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("query", "passage"),
)


class TextClassification(Task):
    """One text or a pair, to one class.

    Args:
        max_length: tokens that a row is cut to; what the model can take if None. A pair is cut at its longer side.
    """

    name: ClassVar[str] = "text-classification"
    title: ClassVar[str] = "Text classification"
    columns: ClassVar[tuple[Column, ...]] = (
        LABEL,
        Column("text", "text", TEXT),
        Column("text_pair", "text", (), required=False),
    )
    auto_model: ClassVar[str] = "AutoModelForSequenceClassification"
    auto_processor: ClassVar[str] = "AutoTokenizer"
    metric_names: ClassVar[tuple[str, ...]] = CLASSIFICATION_METRICS
    usual_metric: ClassVar[str] = "accuracy"

    def __init__(self, data: TaskData, model: str | Path, *, max_length: int | None = None, **kwargs: Any) -> None:
        super().__init__(data, model, **kwargs)
        self._note(*prepare(self.processor))
        self.max_length = longest(self.processor, self.config, max_length)

    @classmethod
    def guess(cls, dataset: Any, given: Mapping[str, str]) -> dict[str, str]:
        lower = {name.lower(): name for name in dataset.column_names}
        for first, second in PAIRS:
            named = given.get("text", lower.get(first)) == lower.get(first) if first in lower else False
            if named and second in lower and lower[second] not in given.values() and "text_pair" not in given:
                given = {**given, "text": lower[first], "text_pair": lower[second]}
        return super().guess(dataset, given)

    def build_model(self, **options: Any) -> Any:
        """As `Task.build_model`."""
        model: Any = super().build_model(**options)
        if model.config.pad_token_id is None:  # decoders find the last real token by it
            model.config.pad_token_id = self.processor.pad_token_id
        return model

    def encode(self, dataset: Any, split: str = "rows") -> Rows:
        cut = 0

        def rows(batch: dict[str, Any]) -> dict[str, Any]:
            nonlocal cut
            pairs = batch[self.data.columns["text_pair"]] if "text_pair" in self.data.columns else None
            tokens, shortened = tokenize(self.processor, batch[self.data.columns["text"]], pairs, self.max_length)
            cut += shortened
            return {**tokens, "labels": batch[self.data.columns["label"]]}

        encoded = encode_rows(dataset, rows)
        if cut:
            self._note(f"{split}: {cut} of {len(dataset)} rows cut to {self.max_length} tokens")
        return encoded

    @cached_property
    def collator(self) -> Collator:
        return Pad(padding(self.processor), side=side(self.processor, self.config))
