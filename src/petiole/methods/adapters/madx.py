"""MAD-X: adapters of a language, and adapters of a task on top of them.  Pfeiffer et al. 2020, arXiv 2005.00052; as rankers arXiv 2204.02292.

    A(v) = W_up ReLU(W_down v + b_down) + b_up        f: output of the ffn, x: its residual, LN: the frozen norm that ends the block
    one      y = LN(f + A(LN(f + x)) + x)
    stacked  u = f + A_language(LN(f + x)),  w = u + A_task(LN(u + x)),  y = LN(w + x)
    NICE     y₁ = e₁ + F(e₂),  y₂ = e₂ + G(y₁)        e = (e₁, e₂): what enters the first block; F, G: d/2 -> d/4 -> d/2 with a ReLU
    and back e₂ = y₂ - G(y₁),  e₁ = y₁ - F(e₂)        before a language model's output that is tied to the token table

Sits     at every ffn (in a pre-norm model A reads f itself) and, of a language, before the first block and before a tied output.
Trains   2 d r + r + d numbers per block with r = d / reduction_factor; NICE adds 4 (d/2 · d/4) + 2 (d/4 + d/2).
Starts   near the backbone: weights normal(0, 0.02²), biases 0.
Merges   no: a ReLU stands in between.

A language adapter learns by masked language modelling and acts below every other adapter, whatever was attached first; the task adapter is
trained while the one of the training language is active and frozen, and works with that of another language afterwards. `compose`, in
`petiole.tasks.retrieval`, puts them together: of a query's language, of a document's, each on its own tokens.

Relations: `lt-sft` does the same with sparse masks, which cost nothing at inference; `pfeiffer` is the task adapter that reads f.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar, Final

import torch
from pydantic import Field
from torch import Tensor, nn

from petiole.anatomy import Anatomy
from petiole.errors import AttachError
from petiole.method import Base, HiddenDelta, Layers, Method, Place, layers_field, stack_field
from petiole.methods.adapters.bottleneck import ACTIVATIONS, Activation, Bottleneck, Renormed

NOWHERE: Final = -1  # the scope of a delta that does not act


class TaskAdapter(Method):
    """An adapter in every block, to be trained on top of a language's."""

    slug: ClassVar[str] = "task-adapter"
    title: ClassVar[str] = "Parameter-Efficient Neural Reranking for Cross-Lingual and Multilingual Retrieval"
    paper: ClassVar[str] = "2204.02292"
    saves: ClassVar[str] = "optimiser state and checkpoint; one task adapter serves every language"

    reduction_factor: int = Field(16, ge=1, description="r = d / reduction_factor.")
    activation: Activation = Field("relu", description="Between two projections.")
    layers: Layers = layers_field()
    stack: str | None = stack_field()

    def deltas_on(self, anatomy: Anatomy, model: nn.Module) -> Iterator[Place]:
        yield from self.adapters(anatomy)

    def adapters(self, anatomy: Anatomy, innermost: bool = False) -> Iterator[Place]:
        """One at each ffn."""
        for site in anatomy.sites(["ffn"], self.layers, self.stack):
            inner = site.out_features // self.reduction_factor
            if not inner:
                raise AttachError(
                    f"{self.slug}: reduction_factor = {self.reduction_factor} leaves nothing of width {site.out_features}"
                )
            norm = anatomy.closing_norm(site)
            delta: Bottleneck
            if norm is None:
                place = site.at("output")
                delta = Sequential(place.size, inner, init="bert", activation=self.activation)
            else:
                place = norm.at("input")
                delta = Stacked(norm.path, place.size, inner, init="bert", activation=self.activation)
            delta.innermost = innermost
            yield Place(place, delta, read=None if norm is None else site.at("output"))


class LanguageAdapter(TaskAdapter):
    """An adapter in every block below all others, and an invertible one on the embeddings."""

    slug: ClassVar[str] = "language-adapter"
    title: ClassVar[str] = "MAD-X: An Adapter-Based Framework for Multi-Task Cross-Lingual Transfer"
    paper: ClassVar[str] = "2005.00052"
    saves: ClassVar[str] = "checkpoint: a language for every task"

    reduction_factor: int = Field(
        2, ge=1, description="r = d / reduction_factor; also of the invertible part's halves."
    )
    invertible: bool = Field(True, description="Whether there is an invertible adapter on the embeddings, too.")

    def deltas_on(self, anatomy: Anatomy, model: nn.Module) -> Iterator[Place]:
        if self.invertible:
            yield from self.coupling(anatomy, model)
        yield from self.adapters(anatomy, innermost=True)

    def coupling(self, anatomy: Anatomy, model: nn.Module) -> Iterator[Place]:
        """The invertible adapter before the first block, and its inverse before an output that is tied to the token table."""
        stack = anatomy.stack(self.stack)
        size = stack.blocks[0].hidden_size
        if size % 2 or not size // 2 // self.reduction_factor:
            raise AttachError(
                f"{self.slug}: width {size} has no halves that reduction_factor = {self.reduction_factor} leaves something of\n"
                "invertible=False goes without the adapter on the embeddings"
            )
        nice = NICE(size, self.reduction_factor, self.activation)
        first = next(site for site in stack.blocks[0].sites if site.role == "block")
        yield Place(first.at("input"), nice)
        tables = [
            model.get_submodule(s.path)._parameters.get("weight") for s in anatomy.outside if s.role == "embedding"
        ]
        for site in anatomy.outside if self.stack is None or len(anatomy.stacks) == 1 else ():
            weight = model.get_submodule(site.path)._parameters.get("weight") if site.role == "lm_head" else None
            if weight is None or not any(weight is table for table in tables):
                continue
            if site.in_features != size:
                raise AttachError(
                    f"{self.slug}: blocks are {size} wide, but the output that is tied to the token table reads {site.in_features}\n"
                    "invertible=False goes without the adapter on the embeddings"
                )
            yield Place(site.at("input"), Inverse(nice))


# ----------------------------------------------------------------------------------------------------------------------- deltas


def within(delta: HiddenDelta, h: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Δ = change(h), where the forward pass's `scopes` let it act: everywhere, nowhere, or at the tokens (B, T) of one segment.

    Segments are those given, or else the model's `token_type_ids`.
    """
    scopes: Mapping[int, int] = delta.given("scopes", {})
    if not scopes or id(delta) not in scopes:
        return change(h)
    if scopes[id(delta)] == NOWHERE:
        return torch.zeros_like(h)
    passing = delta.host.passing()
    segments = delta.given("segments", passing.input("token_type_ids") if passing is not None else None)
    if segments.shape != h.shape[:2]:
        raise AttachError(
            f"segments {tuple(segments.shape)} are not those of a hidden state {tuple(h.shape)}: one for each token"
        )
    return change(h) * (segments == scopes[id(delta)]).unsqueeze(-1).to(h.device)


class Sequential(Bottleneck):
    """f (..., d) -> Δ = A(f), where it acts"""

    def forward(self, f: Tensor) -> Tensor:
        return within(self, f, super().forward)


class Stacked(Renormed):
    """v = f + x (..., d) -> Δ = A(LN(v)), where it acts; of several at one norm the next gets v + Δ."""

    def forward(self, f: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
        return within(self, v, lambda h: super(Stacked, self).forward(f, h))


class Activated(nn.Module):
    """h -> f(h), by the name of f"""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.activation: Activation = activation

    def forward(self, h: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](h)


class NICE(HiddenDelta):
    """e (..., d) -> Δ = (F(e₂), G(e₁ + F(e₂))), so that e + Δ can be undone and its Jacobian has determinant 1

    Args:
        size: width d, even. reduction_factor: of F and G, whose inner width is d/2 / reduction_factor. activation: in them.
    """

    def __init__(self, size: int, reduction_factor: int = 2, activation: Activation = "relu") -> None:
        super().__init__()
        half, inner = size // 2, size // 2 // reduction_factor
        self.F = nn.Sequential(nn.Linear(half, inner), Activated(activation), nn.Linear(inner, half))
        self.G = nn.Sequential(nn.Linear(half, inner), Activated(activation), nn.Linear(inner, half))

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        for parameter in self.parameters():
            parameter.normal_(0, 0.02, generator=generator) if parameter.ndim > 1 else parameter.zero_()

    def forward(self, e: Tensor) -> Tensor:
        return within(self, e, self.change)

    def change(self, e: Tensor) -> Tensor:
        e1, e2 = self.halves(e)
        a = self.F(e2)
        return torch.cat([a, self.G(e1 + a)], -1).to(e.dtype)

    def inverse(self, y: Tensor) -> Tensor:
        """y = e + Δ (..., d) -> e"""
        y1, y2 = self.halves(y)
        e2 = y2 - self.G(y1)
        return torch.cat([y1 - self.F(e2), e2], -1).to(y.dtype)

    def halves(self, e: Tensor) -> tuple[Tensor, ...]:
        if not torch.is_autocast_enabled(e.device.type):
            e = e.to(next(self.F.parameters()).dtype)  # a half-precision backbone under full-precision adapters
        return e.chunk(2, -1)


class Inverse(HiddenDelta):
    """h (..., d) -> Δ with h + Δ = NICE⁻¹(h)

    Args:
        nice: whose parameters it uses.
    """

    def __init__(self, nice: NICE) -> None:
        super().__init__()
        self.nice = (nice,)

    def forward(self, h: Tensor) -> Tensor:
        return within(self, h, lambda y: self.nice[0].inverse(y) - y)
