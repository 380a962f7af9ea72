"""Sequence to sequence: a text to another: translation, summaries, answers."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from petiole.errors import ConfigError
from petiole.tasks.columns import Column
from petiole.tasks.encoding import Rows, encode_rows
from petiole.tasks.generation import LanguageTask
from petiole.tasks.loop import Collator
from petiole.tasks.text_classification import TEXT
from petiole.tasks.tokens import Pad, padding, tokenize

if TYPE_CHECKING:
    from petiole.tasks.data import TaskData


class Seq2Seq(LanguageTask):
    """Texts with targets, for an encoder and a decoder.

    Args:
        max_target_length: tokens that a target is cut to.
        prefix: written before every text ("summarize: "), as some models were trained.
    """

    name: ClassVar[str] = "seq2seq"
    title: ClassVar[str] = "Sequence to sequence"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("text", "text", ("source", "input", "article", *TEXT)),
        Column(
            "target",
            "text",
            ("target", "output", "summary", "highlights", "answer", "response", "completion", "translation"),
            alone=False,
        ),
    )
    auto_model: ClassVar[str] = "AutoModelForSeq2SeqLM"
    auto_processor: ClassVar[str] = "AutoTokenizer"
    shift: ClassVar[int] = 0

    def __init__(
        self, data: TaskData, model: str | Path, *, max_target_length: int = 128, prefix: str = "", **kwargs: Any
    ) -> None:
        super().__init__(data, model, **kwargs)
        if max_target_length < 1:
            raise ConfigError(f"max_target_length: {max_target_length} is below 1")
        self.max_target_length = max_target_length
        self.prefix = prefix

    def encode(self, dataset: Any, split: str = "rows") -> Rows:
        cut = {"text": 0, "target": 0}

        def rows(batch: dict[str, Any]) -> dict[str, Any]:
            inputs, cut_text = self._inputs(batch)
            found = self.processor(text_target=batch[self.data.columns["target"]], verbose=False)["input_ids"]
            cut["text"] += cut_text
            cut["target"] += sum(len(ids) > self.max_target_length for ids in found)
            return {**inputs, "labels": [self._cut(ids) for ids in found]}

        encoded = encode_rows(dataset, rows)
        for key, most in (("text", self.max_length), ("target", self.max_target_length)):
            if cut[key]:
                self._note(f"{split}: {cut[key]} of {len(dataset)} {key}s cut to {most} tokens")
        return encoded

    def _cut(self, ids: list[int]) -> list[int]:
        """A target cut to its length; the end token stays last, or the model would learn never to stop."""
        most = self.max_target_length
        if len(ids) <= most:
            return ids
        return ids[: most - 1] + ids[-1:] if ids[-1] == self.processor.eos_token_id else ids[:most]

    def _inputs(self, batch: dict[str, Any]) -> tuple[dict[str, Any], int]:
        texts = [self.prefix + text for text in batch[self.data.columns["text"]]]
        inputs, cut = tokenize(self.processor, texts, None, self.max_length)
        inputs.pop("token_type_ids", None)  # encoders of this kind take none
        return inputs, cut

    @cached_property
    def collator(self) -> Collator:
        return Pad(padding(self.processor))

    def prompts(self, dataset: Any) -> Rows:
        return encode_rows(dataset, lambda batch: self._inputs(batch)[0])

    @property
    def prompt_collator(self) -> Pad:
        return Pad(padding(self.processor))
