"""Causal language modelling: the next token of a text, or of a target after its prompt."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from petiole.errors import ConfigError
from petiole.tasks.columns import Column
from petiole.tasks.encoding import Rows, encode_rows
from petiole.tasks.generation import LanguageTask
from petiole.tasks.loop import Collator
from petiole.tasks.metrics import IGNORED
from petiole.tasks.text_classification import TEXT
from petiole.tasks.tokens import Pad, padding

if TYPE_CHECKING:
    from petiole.tasks.data import TaskData


class CausalLM(LanguageTask):
    """Texts, each one row; or prompts with targets, where the loss is on the target alone.

    Args:
        block_size: join all texts, an end token after each, and cut them into rows of so many tokens, instead of one row a text.
        separator: goes between a prompt and its target.
    """

    name: ClassVar[str] = "causal-lm"
    title: ClassVar[str] = "Causal language modelling"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("text", "text", ("text", "prompt", "instruction", *TEXT[2:])),
        Column("target", "text", (), required=False),
    )
    auto_model: ClassVar[str] = "AutoModelForCausalLM"
    auto_processor: ClassVar[str] = "AutoTokenizer"
    shift: ClassVar[int] = 1

    def __init__(
        self, data: TaskData, model: str | Path, *, block_size: int | None = None, separator: str = " ", **kwargs: Any
    ) -> None:
        super().__init__(data, model, **kwargs)
        if block_size is not None and self.has_references:
            raise ConfigError("block_size: prompts with targets stay one a row; leave it out")
        if block_size is not None and not 2 <= block_size <= (self.max_length or block_size):
            raise ConfigError(f"block_size: {block_size} is outside 2 to {self.max_length}")
        self.block_size = block_size
        self.separator = separator

    def encode(self, dataset: Any, split: str = "rows") -> Rows:
        if self.block_size is not None:
            return self._blocks(dataset, split)
        cut = 0

        def rows(batch: dict[str, Any]) -> dict[str, Any]:
            nonlocal cut
            out: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
            for prompt, target in self._tokens(batch):
                ids, skipped = prompt + target, len(prompt)
                if self.max_length is not None and len(ids) > self.max_length:
                    cut += 1
                    # A prompt loses its beginning, so that the target stays; a target, or a lone text, its end.
                    lost = len(ids) - self.max_length
                    skipped = max(len(prompt) - lost, 0)
                    ids = (prompt[len(prompt) - skipped :] + target)[: self.max_length]
                out["input_ids"].append(ids)
                out["attention_mask"].append([1] * len(ids))
                out["labels"].append([IGNORED] * skipped + ids[skipped:])
            return out

        encoded = encode_rows(dataset, rows)
        if cut:
            self._note(f"{split}: {cut} of {len(dataset)} rows cut to {self.max_length} tokens")
        return encoded

    def _tokens(self, batch: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
        """Token numbers of prompt and target of each row; no prompt where there are texts alone. An end token closes each."""
        texts = batch[self.data.columns["text"]]
        end = [] if self.processor.eos_token_id is None else [self.processor.eos_token_id]
        first = [self._open(ids) for ids in self.processor(texts, verbose=False)["input_ids"]]
        if not self.has_references:
            return [([], ids + end) for ids in first]
        targets = [self.separator + target for target in batch[self.data.columns["target"]]]
        second = self.processor(targets, add_special_tokens=False, verbose=False)["input_ids"]
        return [(prompt, target + end) for prompt, target in zip(first, second, strict=True)]

    def _open(self, ids: list[int]) -> list[int]:
        """Without an end token of the tokenizer's own, which would stand before the target or twice."""
        return ids[:-1] if ids and ids[-1] == self.processor.eos_token_id else ids

    def _blocks(self, dataset: Any, split: str) -> Rows:
        size, rest = self.block_size or 0, list[int]()

        def rows(batch: dict[str, Any]) -> dict[str, Any]:
            nonlocal rest
            stream = rest + [token for _, ids in self._tokens(batch) for token in ids]
            whole = len(stream) // size * size
            rest = stream[whole:]
            blocks = [stream[i : i + size] for i in range(0, whole, size)]
            return {"input_ids": blocks, "attention_mask": [[1] * size] * len(blocks), "labels": blocks}

        encoded = encode_rows(dataset, rows)
        if not len(encoded):
            raise ConfigError(f"block_size: the {split} split has fewer than {size} tokens, so no block is full")
        self._note(f"{split}: {len(encoded)} blocks of {size} tokens, {len(rest)} tokens left over")
        return encoded

    @cached_property
    def collator(self) -> Collator:
        return Pad(padding(self.processor))

    def prompts(self, dataset: Any) -> Rows:
        most = None if self.max_length is None else max(self.max_length - self.max_new_tokens, 1)

        def rows(batch: dict[str, Any]) -> dict[str, Any]:
            texts = batch[self.data.columns["text"]]
            ids = [self._open(ids) for ids in self.processor(texts, verbose=False)["input_ids"]]
            ids = [row[-most:] if most else row for row in ids]
            return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}

        return encode_rows(dataset, rows)

    @property
    def prompt_collator(self) -> Pad:
        return Pad(padding(self.processor), side="left")  # what comes next must follow the last token at once

    def continuation(self, generated: Any, prompt: Any) -> Any:
        return generated[:, prompt.shape[1] :]
