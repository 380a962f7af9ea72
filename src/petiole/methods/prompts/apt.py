"""APT: what prompts in every attention would add, without a longer sequence.  Wu et al. 2023, arXiv 2306.15706.

    Y  <-  (Y + g ⊙ A P) · exp(s)        A = ReLU(X Kᵀ) (B, N, m),  g = max over the m prompts of A (B, N, 1), without a gradient
    K  =  P + (P W₁ᵀ) W₂ᵀ                P, K (m, d), W₁ (h, d), W₂ (d, h), s a number

X (B, N, d) is what goes into an attention, on the side of the queries; Y (B, N, d) what comes out of its output projection, before dropout
and residual. A has dropout in training. Each token gets its own change from the prompts; masks, caches and attention maps stay as they are.

Sits     beside each attention, self and cross.
Trains   m d + 2 d h + 1 numbers per attention; pooler and token types in place, if `train_pooler`.
Starts   near the backbone, not at it: P ~ N(0, 0.02²), W₁ ~ N(0, 1), W₂ = 0 (so K = P), s = 0.
Merges   no: ReLU and g stand in between. K is constant once trained, and computed once.

Each attention costs 2 N m d multiply-adds more, and 2 m d h for K. For the backward pass X is kept and A computed again, so that nothing
of size N m stays (under dropout one byte for each number of A): about a tenth more time for a fifth less memory, at m = 200 and d = 768.

Relations: deep prompts (`vpt`) pay for m more tokens in attention and ffn. Scores are neither scaled nor normalised, so the change grows
with the square of X: learn with a small rate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from petiole.anatomy import Anatomy, Site
from petiole.errors import AttachError
from petiole.method import Base, Composition, HiddenDelta, Layers, Method, Place, layers_field, stack_field
from petiole.methods.prompts.kept import Kept

ATTENTIONS = ("attention", "cross_attention")
_DROPOUT = ("attention_dropout", "attn_dropout", "attn_drop", "dropout_prob", "dropout")  # of an attention, by any name


class APT(Method):
    """Prompts beside each attention, reached through a low-rank change of their keys."""

    slug: ClassVar[str] = "apt"
    title: ClassVar[str] = "Approximated Prompt Tuning for Vision-Language Pre-trained Models"
    paper: ClassVar[str] = "2306.15706"
    saves: ClassVar[str] = "nearly all parameters; no longer sequence"
    size: ClassVar[str] = "length"
    learning_rates: ClassVar[tuple[float, float]] = (1e-4, 1e-2)

    length: int = Field(200, ge=1, description="Prompts m per attention.")
    rank: int = Field(4, ge=1, description="Rank h of the change from prompts to their keys.")
    roles: tuple[str, ...] | None = Field(
        None, min_length=1, description="Which attentions: attention, cross_attention; all there are if None."
    )
    activation: Literal["relu", "softmax"] = Field("relu", description="Of the scores; softmax is the ablation.")
    learn_scale: bool = Field(True, description="Train exp(s), by which the whole attention output is multiplied.")
    dropout: float | None = Field(
        None, ge=0, lt=1, description="On the scores, in training; that of the model's attention if None."
    )
    train_pooler: bool = Field(
        False, description="Train the pooler and the embeddings of token types too, in place, as the paper's code does."
    )
    layers: Layers = layers_field()
    stack: str | None = stack_field()

    @field_validator("roles")
    @classmethod
    def attentions_alone(cls, roles: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for role in roles or ():
            if role.rpartition(":")[2] not in ATTENTIONS:
                raise ValueError(f"{role!r} is no attention: attention, cross_attention, or of a stack: text:attention")
        return roles

    def deltas(self, anatomy: Anatomy) -> Iterator[Place]:
        for site in self.sites(anatomy):
            size = site.in_features
            if size != site.out_features:
                raise AttachError(
                    f"apt: {site.key} turns {size} features into {site.out_features}; prompts serve both sides, so these must be equal"
                )
            if self.rank > size:
                raise AttachError(f"apt: rank = {self.rank} is above the width {size} of {site.key}: 1 to {size}")
            diffusion = Diffusion(size, self.length, self.rank, self.activation, self.dropout)
            yield Place(site.at("output"), diffusion, read=site.at("input"))
            if self.learn_scale:
                yield Place(site.at("output"), Scale())

    def trains(self, anatomy: Anatomy, model: nn.Module) -> Iterator[str]:
        if not self.train_pooler:
            return
        sites = [site for site in anatomy.outside if site.role in ("pooler", "type_embedding")]
        if not sites:
            raise AttachError(f"apt: train_pooler=True, but {anatomy.model_class} has neither pooler nor token types")
        for site in sites:
            for name, _ in model.get_submodule(site.path).named_parameters(recurse=False):
                yield f"{site.path}.{name}"

    def sites(self, anatomy: Anatomy) -> list[Site]:
        """The attentions to act beside.

        Raises:
            AttachError: there is none. AnatomyError: none of a role that was asked for.
        """
        stacks = [anatomy.stack(self.stack)] if self.stack else anatomy.stacks
        present = {site.role for stack in stacks for block in stack.blocks for site in block.sites}
        roles = self.roles or [role for role in ATTENTIONS if role in present]
        if not roles:
            raise AttachError(f"apt: {anatomy.model_class} has no attention, which is what it acts beside")
        return anatomy.sites(roles, self.layers, self.stack)


class Diffusion(HiddenDelta):
    """X (B, N, d) -> g ⊙ A P (B, N, d)

    Args:
        size: d. length: m. rank: h. activation: of the scores.
        dropout: on A, in training; that of the attention at the site if None.
    """

    def __init__(
        self, size: int, length: int, rank: int, activation: Literal["relu", "softmax"], dropout: float | None
    ) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.empty(length, size))  # P
        self.down = nn.Parameter(torch.empty(rank, size))  # W₁
        self.up = nn.Parameter(torch.empty(size, rank))  # W₂
        self.activation, self.dropout, self.kept = activation, dropout, Kept()

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        self.prompt.normal_(0, 0.02, generator=generator)
        self.down.normal_(generator=generator)
        self.up.zero_()
        if self.dropout is None:
            inner = base.site.core.removeprefix(base.site.path).removeprefix(".")
            self.dropout = attention_dropout(base.module.get_submodule(inner))

    def keys(self) -> Tensor:
        """K (m, d)"""
        P, W1, W2 = self.prompt, self.down, self.up
        return self.kept((P, W1, W2), lambda: torch.addmm(P, P @ W1.T, W2.T))

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.prompt.dtype
        x, prompt, keys = x.to(kind), self.prompt.to(kind), self.keys().to(kind)
        rate = (self.dropout or 0.0) if self.training else 0.0
        if self.activation == "softmax":
            A = nn.functional.dropout((x @ keys.T).softmax(-1).to(kind), rate)
            return strongest(A.detach()) * (A @ prompt)
        kept = None
        if rate:
            kept = torch.empty(*x.shape[:-1], len(keys), dtype=torch.bool, device=x.device).bernoulli_(1 - rate)
        return Diffuse.apply(x, prompt, keys, kept, rate)

    def by_row(self, deltas: Sequence[Any], index: Tensor, h: Tensor) -> None:
        """One adaptation after the other: prompts gathered for each row would be more numbers than the rows have."""


class Diffuse(torch.autograd.Function):
    """X (..., d), P, K (m, d) -> g ⊙ ReLU(X Kᵀ) P, with A computed again for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, prompt: Tensor, keys: Tensor, kept: Tensor | None, rate: float) -> Tensor:
        ctx.save_for_backward(x, prompt, keys, kept)
        ctx.rate = rate
        A = scores(x, keys, kept, rate)
        return strongest(A) * (A @ prompt)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, prompt, keys, kept = ctx.saved_tensors
        A = scores(x, keys, kept, ctx.rate)
        of_mixture = (gradient * strongest(A)).to(x.dtype)  # with respect to A P
        of_scores = torch.ops.aten.threshold_backward(of_mixture @ prompt.T, A, 0)  # none where ReLU or dropout gave 0
        if kept is not None:
            of_scores = of_scores / (1 - ctx.rate)
        return (
            of_scores @ keys if ctx.needs_input_grad[0] else None,
            A.flatten(0, -2).T @ of_mixture.flatten(0, -2),
            of_scores.flatten(0, -2).T @ x.flatten(0, -2),
            None,
            None,
        )


def scores(x: Tensor, keys: Tensor, kept: Tensor | None, rate: float) -> Tensor:
    """A = dropout(ReLU(X Kᵀ)) (..., m); what dropout keeps is given."""
    A = torch.relu(x @ keys.T)
    return A if kept is None else A * kept * (1 / (1 - rate))


def strongest(A: Tensor) -> Tensor:
    """g (..., 1), in float32 at least: its product with A P is quadratic in X, which float16 would not hold."""
    return A.amax(-1, keepdim=True).to(torch.promote_types(A.dtype, torch.float32))


class Scale(HiddenDelta):
    """Y -> exp(s), by which the whole attention output is multiplied."""

    composition: Composition = "multiply"

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.empty(1))  # s

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        self.log_scale.zero_()

    def forward(self, y: Tensor) -> Tensor:
        return self.log_scale.exp()


def attention_dropout(module: nn.Module) -> float:
    """The rate at which an attention drops probabilities, kept as a number or as a layer; 0 where it keeps none."""
    for name in _DROPOUT:
        found = getattr(module, name, None)
        rate = found.p if isinstance(found, nn.Dropout) else found
        if isinstance(rate, float):
            return rate
    return 0.0
