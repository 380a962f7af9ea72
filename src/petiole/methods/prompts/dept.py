"""DePT: a shorter prompt, and a low-rank update of the input embeddings for what it saves.  Shi and Lipani 2023, arXiv 2309.05173.

    X = [P ; E + c · A[0:n] B]        P (m, d), E (B, n, d) the frozen embeddings, A (s, r), B (r, d), n ≤ s, c = alpha / √r

Row t of A B belongs to the t-th token of a row, whatever that token is; padding in front does not count, nor an image's tokens. As many
numbers as a prompt of l tokens: m d + (s + d) r ≤ l d. While generating, P and the update enter once, with the input, and what was generated
gets plain embeddings; without a cache this takes passes that say `use_cache=False` and grow by one token, as `generate` makes them.

Learning rates: the run's is that of A and B, and P's is in proportion to it, in any trainer. `DePT(…).groups(tuned)` gives the two groups
for an optimiser of one's own. A model with a table of positions needs m + n of them.

Sits     where embeddings enter the model: before positions are added; the encoder alone where there is a decoder.
Trains   m d + (s + d) r numbers, P at a much larger learning rate than A and B.
Starts   at B = 0, so beside the backbone by P alone; with m = 0 it is the bare backbone, bit for bit.
Merges   no: the update depends on the position. A B is computed once at inference.

Relations: `prompt-tuning` is r = 0. Shorter by l - m tokens, DePT is faster in training and at inference for as many parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from petiole.adaptation import Adaptation
from petiole.anatomy import Anatomy
from petiole.errors import AttachError, ConfigError
from petiole.files import load_adaptation
from petiole.method import RATE_FACTOR, Base, Method, Moment, Place, TokenDelta
from petiole.methods.prompts.kept import Kept
from petiole.methods.prompts.prompt import text_input, vocabulary, whole
from petiole.tokens import text_entry


class DePT(Method):
    """A short prompt, and an update of the input embeddings by position."""

    slug: ClassVar[str] = "dept"
    title: ClassVar[str] = "DePT: Decomposed Prompt Tuning for Parameter-Efficient Fine-tuning"
    paper: ClassVar[str] = "2309.05173"
    saves: ClassVar[str] = "nearly all parameters; a shorter prompt than prompt tuning"
    size: ClassVar[str] = "length"
    exempt: ClassVar[Mapping[str, str]] = {"vit": "an image has no token embeddings"}
    learning_rates: ClassVar[tuple[float, float]] = (5e-4, 2e-2)  # of A and B; the prompt's is in proportion

    length: int = Field(40, ge=0, description="Learned tokens m; with 0 the update alone.")
    rank: int | None = Field(
        None,
        ge=0,
        description="Rank r of the update; if None the largest that keeps to `budget`; with 0 the prompt alone.",
    )
    budget: int = Field(
        100, ge=1, description="If rank is None: as many numbers train as in a prompt of so many tokens."
    )
    max_length: int = Field(256, ge=1, description="Rows s of the update: tokens of the longest input.")
    alpha: float | None = Field(8.0, gt=0, description="Factor alpha / √rank of the update; 1 if None.")
    init: Literal["random", "vocabulary", "text"] = Field(
        "random",
        description="Start the prompt from N(0, 1), from embeddings of random tokens, or from those of a text.",
    )
    text: tuple[int, ...] | None = Field(
        None,
        min_length=1,
        description="Token ids of that text, repeated or cut to the prompt's length; see `with_text`.",
    )
    prompt_learning_rate: float = Field(0.3, gt=0, description="Of the prompt, where that of A and B is as follows.")
    lowrank_learning_rate: float = Field(
        5e-3, gt=0, description="Of A and B. With another rate of the run, the prompt's keeps its proportion to it."
    )
    stack: str | None = Field(
        None, description="The stack whose input is changed: encoder, decoder, text; the first text stack if None."
    )

    @model_validator(mode="after")
    def consistent(self) -> DePT:
        if self.length == 0 and self.rank == 0:
            raise ValueError("length = 0 and rank = 0 leave nothing to train: at least one of them is 1 or more")
        if self.rank is None and self.length > self.budget:
            raise ValueError(f"length = {self.length} is above budget = {self.budget}: at most that, or give a rank")
        if self.init == "text" and self.text is None:
            raise ValueError("init = 'text' needs the tokens of one: DePT(...).with_text('...', tokenizer)")
        return self

    @classmethod
    def from_budget(cls, num_tokens: int, length: int, max_length: int, hidden_size: int, **fields: Any) -> DePT:
        """The configuration with as many numbers as a prompt of `num_tokens`, or as few less as whole ranks allow.

        Raises:
            ConfigError: the prompt alone is longer, or a field is out of its range.
        """
        if not 0 <= length <= num_tokens:
            raise ConfigError(f"DePT.from_budget: length = {length}, but it is 0 to num_tokens = {num_tokens}")
        rank = (num_tokens - length) * hidden_size // (max_length + hidden_size)
        return cls(length=length, rank=rank, budget=num_tokens, max_length=max_length, **fields)

    def with_text(self, text: str, tokenizer: Any) -> DePT:
        """The same, starting from the embeddings of a text."""
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return type(self)(**{**self.model_dump(), "init": "text", "text": tuple(ids)})

    def deltas(self, anatomy: Anatomy) -> Iterator[Place]:
        stack, embedding = text_input(self.slug, anatomy, self.stack)
        d, s = embedding.out_features, self.max_length
        rank = self.rank
        if rank is None:
            rank = min((self.budget - self.length) * d // (s + d), s, d)
        if rank > min(s, d):
            raise AttachError(f"dept: rank = {rank} is above max_length = {s} or the width {d}: 0 to {min(s, d)}")
        if self.length == rank == 0:
            raise AttachError(
                f"dept: budget = {self.budget} leaves no rank at max_length = {s} and width {d}: raise it"
            )
        scaling = 1.0 if self.alpha is None or rank == 0 else self.alpha / math.sqrt(rank)
        factor = self.prompt_learning_rate / self.lowrank_learning_rate
        yield Place(whole(stack.blocks[0]), Decomposed(self.length, rank, s, d, scaling, factor))

    def on_attach(self, moment: Moment) -> None:
        """See that nothing stands between the embeddings and where the update enters; start the prompt from the vocabulary."""
        (delta,) = moment.deltas.values()
        assert isinstance(delta, Decomposed)
        host = delta.host
        stack, embedding = text_input(self.slug, host.anatomy, self.stack)
        beside = f"{embedding.path.rpartition('.')[0]}."
        normed = any(site.role == "norm" and site.path.startswith(beside) for site in host.anatomy.outside)
        if normed and text_entry(host.model, stack.blocks[0].path) is None:
            raise AttachError(
                f"dept: {stack.name} of {host.anatomy.model_class} takes no inputs_embeds and normalises its embeddings first"
            )
        table, scale = vocabulary(self.slug, host, self.stack)
        if delta.tokens is None or self.init == "random" or table.device.type == "meta":
            return
        if self.init == "text":
            ids = torch.tensor(self.text).repeat(-(-self.length // len(self.text or ())))[: self.length]
            if not 0 <= int(ids.min()) <= int(ids.max()) < len(table):
                raise AttachError(
                    f"dept: text has token {int(ids.max())}, but there are {len(table)} in the vocabulary"
                )
        else:
            ids = torch.randint(len(table), (self.length,), generator=torch.Generator().manual_seed(moment.seed))
        with torch.no_grad():
            delta.tokens.copy_(scale * table[ids.to(table.device)])

    def groups(self, tuned: Adaptation, weight_decay: float = 1e-5) -> list[dict[str, Any]]:
        """Two groups for an optimiser of one's own: A, B and whatever else trains (the task's head), and the prompt.

        One of them is empty where m or r is 0 and nothing else trains.
        """
        tokens = [slot.delta.tokens for slot in tuned.slots if isinstance(slot.delta, Decomposed)]
        prompt = [parameter for parameter in tokens if parameter is not None]
        rest = [p for p in tuned.parameters() if not any(p is other for other in prompt)]
        factor = self.prompt_learning_rate / self.lowrank_learning_rate
        return [
            {"params": rest, "lr": self.lowrank_learning_rate, "weight_decay": weight_decay},
            {"params": prompt, "lr": self.prompt_learning_rate, "weight_decay": weight_decay, RATE_FACTOR: factor},
        ]

    @staticmethod
    def transfer(tuned: Adaptation, source: Adaptation | str | Path, *, lowrank: bool = False) -> None:
        """Start from the prompt of a source task, IN PLACE; from its A and B too, if asked.

        Args:
            source: what is attached to another model, or a file of it; DePT or prompt tuning.

        Raises:
            AttachError: there is nothing of the kind in one of them, or its shape is another; nothing is changed then.
        """
        state = source.named_tensors() if isinstance(source, Adaptation) else load_adaptation(Path(source))[0]
        pairs = []
        for name in ("tokens", "A", "B") if lowrank else ("tokens",):
            mine = [getattr(slot.delta, name) for slot in tuned.slots if isinstance(slot.delta, Decomposed)]
            theirs = [tensor for key, tensor in state.items() if key.endswith(f"block.input:{name}")]
            shapes = [[None if t is None else tuple(t.shape) for t in tensors] for tensors in (mine, theirs)]
            if len(mine) != 1 or shapes[0] != shapes[1] or mine[0] is None:
                raise AttachError(f"dept: {name} is {shapes[0] or 'not'} here and {shapes[1] or 'not'} in the source")
            pairs.append((mine[0], theirs[0]))
        with torch.no_grad():
            for own, value in pairs:
                own.copy_(value)


class Decomposed(TokenDelta):
    """P (m, d) in front of E + c A[0:n] B.

    Args:
        length: m. rank: r. max_length: s. size: d. scaling: c.
        factor: the prompt's learning rate as a multiple of the run's.
    """

    def __init__(self, length: int, rank: int, max_length: int, size: int, scaling: float, factor: float) -> None:
        super().__init__()
        self.length, self.max_length, self.scaling, self.kept = length, max_length, scaling, Kept()
        self.rate_factors = {"tokens": factor}
        self.tokens = nn.Parameter(torch.empty(length, size)) if length else None  # P
        self.A = nn.Parameter(torch.empty(max_length, rank)) if rank else None
        self.B = nn.Parameter(torch.empty(rank, size)) if rank else None

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        if self.tokens is not None:
            self.tokens.normal_(generator=generator)
        if self.A is not None and self.B is not None:
            bound = 1 / math.sqrt(self.A.shape[1])
            self.A.uniform_(-bound, bound, generator=generator)
            self.B.zero_()

    def forward(self, batch: int) -> Tensor:
        if self.tokens is None:
            assert self.B is not None
            return self.B.new_empty(batch, 0, self.B.shape[1])
        return self.tokens.expand(batch, -1, -1)

    def update(self) -> Tensor:
        """D = c A B (s, d)"""
        A, B = self.A, self.B
        assert A is not None and B is not None
        return self.kept((A, B), lambda: self.scaling * A @ B)

    def joined(self, h: Tensor, places: Tensor) -> Tensor:
        """E (B, n, d) -> E + D[places]"""
        if self.A is None:
            return h
        n, s = h.shape[1], self.max_length
        if n > s and not torch.compiler.is_compiling():
            n = int(places.max()) + 1  # less where there is padding in front, or an image in the text
        if n > s:
            raise AttachError(
                f"dept: an input has {n} tokens, but max_length = {s}\n"
                f"truncate inputs to that, or attach with max_length = {n} or more"
            )
        D = nn.functional.pad(self.update().to(h.dtype), (0, 0, 0, 1))  # a last row for what is no text
        return h + nn.functional.embedding(torch.where(places < 0, s, places), D, padding_idx=s)
