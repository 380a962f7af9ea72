"""Text to tokens, and rows of tokens to padded batches: shared by every task that reads text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from petiole.errors import ConfigError
from petiole.tasks.metrics import IGNORED

UNSET = 1_000_000  # a tokenizer whose maximum is larger has none


def prepare(tokenizer: Any) -> list[str]:
    """See to it that the tokenizer can pad; say how."""
    if tokenizer.pad_token_id is not None:
        return []
    if tokenizer.eos_token is None:
        raise ConfigError(
            "the tokenizer has neither a padding nor an end token\nSet tokenizer.pad_token and pass it as processor=."
        )
    tokenizer.pad_token = tokenizer.eos_token
    return [f"padding with the end token {tokenizer.eos_token!r}; the attention mask hides it"]


def longest(tokenizer: Any, config: Any, asked: int | None) -> int | None:
    """The number of tokens a row is cut to: what was asked for, else what tokenizer and position table say; None for no bound.

    Raises:
        ConfigError: more was asked for than the model can take.
    """
    stated = int(tokenizer.model_max_length) if tokenizer.model_max_length < UNSET else None
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        # RoBERTa and its kin count positions from their padding token's number, 1, onwards.
        positions = positions - 2 if getattr(config, "pad_token_id", None) == 1 else positions
    else:
        positions = None  # relative positions: what the tokenizer states is a habit, not a bound
    if asked is None:
        return min((most for most in (stated, positions) if most is not None), default=None)
    if asked < 1 or (positions is not None and asked > positions):
        raise ConfigError(f"max_length: {asked} is outside 1 to {positions or 'any'}, what this model can take")
    return asked


def side(tokenizer: Any, config: Any) -> str:
    """Where to pad. Right, where positions are counted from the left; else as the tokenizer says (XLNet reads its class at the end)."""
    positions = getattr(config, "max_position_embeddings", None)
    return "right" if isinstance(positions, int) and positions > 0 else str(tokenizer.padding_side)


def tokenize(
    tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None, most: int | None
) -> tuple[dict[str, Any], int]:
    """Tokens of texts, or of pairs, and how many rows were cut. A row without any token gets one padding token."""
    rows = dict(
        tokenizer(list(texts), None if pairs is None else list(pairs), truncation=most is not None, max_length=most)
    )
    cut = 0
    if most is not None:
        full = [i for i, ids in enumerate(rows["input_ids"]) if len(ids) >= most]  # only these can have been longer
        if full:
            again = tokenizer(
                [texts[i] for i in full], None if pairs is None else [pairs[i] for i in full], verbose=False
            )
            cut = sum(len(ids) > most for ids in again["input_ids"])
    for i, ids in enumerate(rows["input_ids"]):
        if not ids:
            for key, values in rows.items():
                values[i] = [{"input_ids": tokenizer.pad_token_id, "attention_mask": 1}.get(key, 0)]
    return rows, cut


def padding(tokenizer: Any) -> dict[str, float]:
    """What fills the end of each key."""
    return {
        "input_ids": tokenizer.pad_token_id,
        "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0),
        "attention_mask": 0,
        "labels": IGNORED,
    }


class Pad:
    """Rows -> a batch of tensors. Rows of unequal length are filled up to the longest of the batch.

    Args:
        fill: key -> value to fill up with; 0 for keys that aren't named.
        side: where it goes.
    """

    def __init__(self, fill: Mapping[str, float], side: str = "right") -> None:
        self.fill = dict(fill)
        self.side = side

    def __call__(self, rows: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
        rows = list(rows)
        return {key: self._stack([torch.as_tensor(row[key]) for row in rows], self.fill.get(key, 0)) for key in rows[0]}

    def _stack(self, tensors: list[Tensor], fill: float) -> Tensor:
        """Tensors (n_i, ...) -> (rows, max n, ...)."""
        if len({tensor.shape for tensor in tensors}) == 1:
            return torch.stack(tensors)
        batch = tensors[0].new_full((len(tensors), max(map(len, tensors)), *tensors[0].shape[1:]), fill)
        for row, tensor in zip(batch, tensors, strict=True):
            start = 0 if self.side == "right" else len(row) - len(tensor)
            row[start : start + len(tensor)] = tensor
        return batch
