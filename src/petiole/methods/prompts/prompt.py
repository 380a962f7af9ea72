"""Prompt tuning and visual prompts: learned tokens in front of the input.

    [p_1 … p_l, x_1 … x_T]        p_i (d,)        deep: new p at the input of every block, the old ones dropped

Prompt tuning: Lester et al. 2021, arXiv 2104.08691. Visual prompt tuning, shallow and deep: Jia et al. 2022, arXiv 2203.12119.

Sits     before the first block; deep: before every block. The tokens are gone after the last block.
Trains   l d numbers, deep: l d per block.
Starts   beside the backbone, not at it: the tokens are attended to from the first step.
Merges   no.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import takewhile
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from petiole.anatomy import Anatomy, Block, Site, Stack
from petiole.errors import AnatomyError, AttachError
from petiole.junction import embedding_scale
from petiole.method import Base, HiddenDelta, Method, Moment, Place, TokenDelta
from petiole.methods.execution.patches import front_tokens
from petiole.methods.prompts.pooled import Pooled, pooled


class PromptTuning(Method):
    """Learned embeddings before the tokens of a text."""

    slug: ClassVar[str] = "prompt-tuning"
    title: ClassVar[str] = "The Power of Scale for Parameter-Efficient Prompt Tuning"
    paper: ClassVar[str] = "2104.08691"
    saves: ClassVar[str] = "nearly all parameters; costs length at inference"
    size: ClassVar[str] = "length"
    exempt: ClassVar[Mapping[str, str]] = {"vit": "an image has no token embeddings"}
    learning_rates: ClassVar[tuple[float, float]] = (1e-3, 3e-1)

    length: int = Field(20, ge=1, description="Number of learned tokens.")
    init: Literal["normal", "vocabulary"] = Field(
        "vocabulary", description="Start from normal(0, 0.02²) or from embeddings of random tokens."
    )
    stack: str | None = Field(
        None, description="The stack whose input they join: encoder, decoder, text; the first text stack if None."
    )

    def deltas(self, anatomy: Anatomy) -> Iterator[Place]:
        stack, embedding = text_input(self.slug, anatomy, self.stack)
        yield Place(whole(stack.blocks[0]), Prompt(self.length, embedding.out_features))

    def on_attach(self, moment: Moment) -> None:
        """Copy the embeddings of random tokens into the prompt."""
        if self.init != "vocabulary":
            return
        generator = torch.Generator().manual_seed(moment.seed)
        for delta in moment.deltas.values():
            table, scale = vocabulary(self.slug, delta.host, self.stack)
            if isinstance(delta, Prompt) and table.device.type != "meta" and table.shape[1] == delta.tokens.shape[1]:
                rows = torch.randint(table.shape[0], (self.length,), generator=generator).to(table.device)
                with torch.no_grad():
                    delta.tokens.copy_(scale * table[rows])


class VisualPromptTuning(Method):
    """Learned tokens before the patches of an image or of a spectrogram."""

    slug: ClassVar[str] = "vpt"
    title: ClassVar[str] = "Visual Prompt Tuning"
    paper: ClassVar[str] = "2203.12119"
    saves: ClassVar[str] = "nearly all parameters; costs length at inference"
    size: ClassVar[str] = "length"
    learning_rates: ClassVar[tuple[float, float]] = (1e-3, 1e-1)

    length: int = Field(10, ge=1, description="Number of learned tokens (per block, if deep).")
    deep: bool = Field(True, description="New tokens at every block, instead of at the first alone.")
    dropout: float = Field(0.0, ge=0, lt=1, description="On the tokens, in training.")
    replaces: int | None = Field(
        None, ge=0, description="Token of the model's that one of them takes the place of: 1, a distillation token."
    )
    pool: Pooled = Field(
        "model", description="Tokens whose mean the head reads; model: those it chooses, after the prompts are gone."
    )
    stack: str | None = Field(
        None, description="The stack whose input they join; the main one if None, or that beside the patch embedding."
    )

    def deltas_on(self, anatomy: Anatomy, model: nn.Module) -> Iterator[Place]:
        stack = self.entry(anatomy)
        front = sum(count for _, count in front_tokens(anatomy, stack, model))
        if self.replaces is not None and self.replaces >= front:
            raise AttachError(
                f"vpt: replaces = {self.replaces}, but {anatomy.model_class} has {front} tokens in front of its patches, counted from 0"
            )
        length = self.length - (self.replaces is not None)
        if self.pool != "model":
            yield pooled(self.pool, anatomy, stack, model, length, self.replaces)
        for block in stack.blocks if self.deep else stack.blocks[:1]:
            size = first_width(anatomy, stack) if block.depth == 0 else block.hidden_size
            if length:
                yield Place(whole(block), Prompt(length, size, self.dropout, patch=True))
            if self.replaces is not None:
                yield Place(whole(block), Instead(length + self.replaces, size, self.dropout))

    def entry(self, anatomy: Anatomy) -> Stack:
        """The stack that the tokens join. Two towers have no main stack; images then go where patches are embedded."""
        patches = [site for site in anatomy.outside if site.role == "patch_embedding"]
        try:
            return anatomy.stack(self.stack)
        except AnatomyError:
            if self.stack is not None or len(patches) != 1:
                raise
            return beside(anatomy, patches[0])


def text_input(slug: str, anatomy: Anatomy, name: str | None) -> tuple[Stack, Site]:
    """The stack of that name (None: the first that reads a text), and what embeds its tokens.

    Raises:
        AttachError: nothing embeds tokens.
    """
    embeddings = [site for site in anatomy.outside if site.role == "embedding"]
    if not embeddings:
        raise AttachError(
            f"{slug}: {anatomy.model_class} embeds no tokens; vpt puts prompts before image and audio patches"
        )
    if name is None:
        return beside(anatomy, embeddings[0]), embeddings[0]
    stack = anatomy.stack(name)
    return stack, max(embeddings, key=lambda site: common(site.path, stack.containers[0]))


def vocabulary(slug: str, host: Any, name: str | None) -> tuple[Tensor, Any]:
    """The table (V, d) of the embeddings that a stack reads, and what its rows are multiplied by when they are looked up."""
    embedding = text_input(slug, host.anatomy, name)[1]
    module = host.module(embedding.path)
    return getattr(module, embedding.parameter), embedding_scale(module)


def whole(block: Block) -> Site:
    """The input of a block."""
    return next(site for site in block.sites if site.role == "block").at("input")


def common(one: str, other: str) -> int:
    """How many names two module paths have in common at their beginning."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def beside(anatomy: Anatomy, site: Site) -> Stack:
    """The stack that an embedding feeds: the first of those nearest to it in the tree of modules."""
    return max(anatomy.stacks, key=lambda stack: common(site.path, stack.containers[0]))


def first_width(anatomy: Anatomy, stack: Stack) -> int:
    """Width of what enters a stack: of the token embeddings where it reads tokens alone, which a model may project to its own width."""
    embeddings = [site for site in anatomy.outside if site.role == "embedding" and beside(anatomy, site) is stack]
    patches = [site for site in anatomy.outside if site.role == "patch_embedding" and beside(anatomy, site) is stack]
    return embeddings[0].out_features if embeddings and not patches else stack.blocks[0].hidden_size


class Prompt(TokenDelta):
    """Tokens (l, d), the same for every sample.

    Args:
        length: l. size: d. dropout: in training.
        patch: start as VPT does, U(±√(6 / (3·16² + d))), instead of normal(0, 0.02²).
    """

    def __init__(self, length: int, size: int, dropout: float = 0.0, patch: bool = False) -> None:
        super().__init__()
        self.length, self.patch = length, patch
        self.tokens = nn.Parameter(torch.empty(length, size))
        self.dropout = nn.Dropout(dropout)

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        if self.patch:
            like_a_patch(self.tokens, generator)
        else:
            self.tokens.normal_(0, 0.02, generator=generator)

    def forward(self, batch: int) -> Tensor:
        return self.dropout(self.tokens).expand(batch, -1, -1)


class Instead(HiddenDelta):
    """A learned token (1, d) in the place of one of the model's own.

    Args:
        place: of that in the sequence. size: d. dropout: in training.
    """

    composition = "replace"

    def __init__(self, place: int, size: int, dropout: float) -> None:
        super().__init__()
        self.place = place
        self.tokens = nn.Parameter(torch.empty(1, size))
        self.dropout = nn.Dropout(dropout)

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        like_a_patch(self.tokens, generator)

    def forward(self, h: Tensor) -> Tensor:
        token = self.dropout(self.tokens).to(h.dtype).expand(h.shape[0], -1, -1)
        return torch.cat([h[:, : self.place], token, h[:, self.place + 1 :]], 1)


def like_a_patch(tokens: Tensor, generator: torch.Generator) -> None:
    """U(±√(6 / (3·16² + d))), as VPT starts."""
    bound = math.sqrt(6 / (3 * 16 * 16 + tokens.shape[-1]))
    tokens.uniform_(-bound, bound, generator=generator)
