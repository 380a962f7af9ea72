"""Masked language modelling: words of a text that are hidden, guessed from those on both sides.  Devlin et al. 2018, arXiv 1810.04805.

A share of the tokens is chosen, 15 %; of these 80 % become the mask token, 10 % any token, 10 % stay; the loss is on all of them. In training
other tokens are drawn each time; in evaluation the same for every model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from petiole.errors import ConfigError
from petiole.tasks.base import Task
from petiole.tasks.columns import Column
from petiole.tasks.encoding import Rows, encode_rows
from petiole.tasks.loop import Collator
from petiole.tasks.metrics import IGNORED, token_scores
from petiole.tasks.text_classification import TEXT
from petiole.tasks.tokens import Pad, longest, padding, prepare, side, tokenize

if TYPE_CHECKING:
    from petiole.tasks.data import TaskData

MASKED, RANDOM = 0.8, 0.1  # shares of the chosen tokens


class MaskedLM(Task):
    """Texts, each one row.

    Args:
        max_length: tokens that a row is cut to; what the model can take if None.
        mask_share: of the tokens, how many are to be guessed; in every row at least one is.
        seed: of the choice.
    """

    name: ClassVar[str] = "masked-lm"
    title: ClassVar[str] = "Masked language modelling"
    columns: ClassVar[tuple[Column, ...]] = (Column("text", "text", TEXT),)
    auto_model: ClassVar[str] = "AutoModelForMaskedLM"
    auto_processor: ClassVar[str] = "AutoTokenizer"
    metric_names: ClassVar[tuple[str, ...]] = ("perplexity", "token_accuracy")
    usual_metric: ClassVar[str] = "perplexity"
    drops_empty_text: ClassVar[bool] = True
    by_name_only: ClassVar[bool] = True  # its columns are those of causal language modelling

    def __init__(
        self,
        data: TaskData,
        model: str | Path,
        *,
        max_length: int | None = None,
        mask_share: float = 0.15,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        if not 0 < mask_share < 1:
            raise ConfigError(f"mask_share: {mask_share} is outside (0, 1)")
        super().__init__(data, model, **kwargs)
        self._note(*prepare(self.processor))
        if self.processor.mask_token_id is None:
            raise ConfigError(
                "the tokenizer has no mask token: the model guesses no hidden words\ntask='causal-lm' may fit"
            )
        self.max_length = longest(self.processor, self.config, max_length)
        self.mask_share, self.seed = mask_share, seed

    def encode(self, dataset: Any, split: str = "rows") -> Rows:
        cut, masking = 0, self.masking()

        def rows(batch: dict[str, Any]) -> dict[str, Any]:
            nonlocal cut
            tokens, shortened = tokenize(self.processor, batch[self.data.columns["text"]], None, self.max_length)
            cut += shortened
            if split != "train":
                hidden = [masking.hide(torch.tensor(ids)) for ids in tokens["input_ids"]]
                tokens["input_ids"] = [ids.tolist() for ids, _ in hidden]
                tokens["labels"] = [labels.tolist() for _, labels in hidden]
            return tokens

        encoded = encode_rows(dataset, rows)
        if cut:
            self._note(f"{split}: {cut} of {len(dataset)} rows cut to {self.max_length} tokens")
        return encoded

    @cached_property
    def collator(self) -> Collator:
        return self.masking()

    def masking(self) -> Masking:
        words = self.processor
        return Masking(
            Pad(padding(words), side=side(words, self.config)),
            mask_token=words.mask_token_id,
            vocabulary=self.config.vocab_size,
            special=words.all_special_ids,
            share=self.mask_share,
            seed=self.seed,
        )

    def reduce(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits (b, t, vocabulary), labels (b, t) -> (b, t, 2): token losses and hits."""
        return token_scores(super().reduce(logits, labels)[:, -labels.shape[1] :], labels)


class Masking:
    """Rows -> a batch in which tokens are hidden; rows that have labels keep theirs.

    Args:
        pad: rows -> tensors. mask_token: its number. vocabulary: its size. special: tokens that are never hidden.
        share: of the tokens to be guessed, in every row at least one. seed: of the choice.
    """

    def __init__(
        self,
        pad: Collator,
        *,
        mask_token: int,
        vocabulary: int,
        special: Iterable[int],
        share: float = 0.15,
        seed: int = 0,
    ) -> None:
        self.pad, self.mask_token, self.vocabulary, self.share, self.seed = pad, mask_token, vocabulary, share, seed
        self.special = torch.tensor(sorted(special))
        self.generator: torch.Generator | None = None

    def __call__(self, rows: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = self.pad(list(rows))
        if "labels" not in batch:
            batch["input_ids"], batch["labels"] = self.hide(batch["input_ids"])
        return batch

    def hide(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (..., t) -> tokens with some hidden, and labels: the tokens there, elsewhere what is ignored."""
        if self.generator is None:  # made where it is used, so that each worker has one of its own
            worker = get_worker_info()
            self.generator = torch.Generator().manual_seed(self.seed + (0 if worker is None else worker.id))
        draws, how = torch.rand(2, *ids.shape, generator=self.generator)
        anything = torch.randint(self.vocabulary, ids.shape, generator=self.generator)
        free = ~torch.isin(ids, self.special)
        draws = draws.masked_fill(~free, 2.0)
        chosen = free & ((draws < self.share) | (draws == draws.amin(-1, keepdim=True)))
        hidden = ids.masked_fill(chosen & (how < MASKED), self.mask_token)
        swapped = chosen & (how >= MASKED) & (how < MASKED + RANDOM)
        return hidden.where(~swapped, anything), ids.where(chosen, IGNORED)
