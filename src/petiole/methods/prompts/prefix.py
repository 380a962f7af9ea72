"""Prefix tuning: learned keys and values in every attention.  Li and Liang 2021, arXiv 2101.00190; as in arXiv 2110.04366.

    softmax( q [P_k; K]ᵀ / √d ) [P_v; V]        P_k, P_v (l, d), split over the heads like K and V; no position, never masked

Sits     inside self-attention (and cross-attention, if asked), through Transformers' attention interface.
Trains   2 l d per attention; with the MLP, (l d) + (d m + m) + (2 d m + 2 d) per attention, of which only P_k, P_v are stored.
Starts   beside the backbone, not at it.
Merges   no; the MLP folds away on save.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from petiole.anatomy import Anatomy, Site
from petiole.errors import AttachError
from petiole.method import AttentionDelta, Base, Delta, Layers, Method, Place, layers_field, stack_field


class PrefixTuning(Method):
    """Learned keys and values before the real ones."""

    slug: ClassVar[str] = "prefix-tuning"
    title: ClassVar[str] = "Prefix-Tuning: Optimizing Continuous Prompts for Generation"
    paper: ClassVar[str] = "2101.00190"
    saves: ClassVar[str] = "nearly all parameters; costs length in attention"
    size: ClassVar[str] = "length"
    learning_rates: ClassVar[tuple[float, float]] = (1e-3, 1e-1)

    length: int = Field(20, ge=1, description="Keys and values per attention.")
    reparametrisation: Literal["none", "mlp"] = Field(
        "none", description="Train them directly, or through an MLP that is folded away on save."
    )
    hidden_size: int = Field(800, ge=1, description="Inner width m of that MLP.")
    dropout: float = Field(0.0, ge=0, lt=1, description="On the keys and values, in training.")
    cross_attention: bool = Field(True, description="Cross-attention too, where there is one.")
    layers: Layers = layers_field()
    stack: str | None = stack_field()

    def deltas(self, anatomy: Anatomy) -> Iterator[Place]:
        attentions = list(self.attentions(anatomy))
        if not attentions:
            raise AttachError(f"prefix-tuning: {anatomy.model_class} has no attention, which is what it acts in")
        for site, keys in attentions:
            if self.reparametrisation == "mlp":
                yield Place(
                    site, Generated(self.length, keys, self.dropout, self.hidden_size, f"{site.stack}_{site.role}")
                )
            else:
                yield Place(site, Prefix(self.length, keys, self.dropout))

    def attentions(self, anatomy: Anatomy) -> Iterator[tuple[Site, int]]:
        """Each attention to act in, with the width of its keys (smaller than d under grouped queries)."""
        for stack in [anatomy.stack(self.stack)] if self.stack else anatomy.stacks:
            present = {site.role for block in stack.blocks for site in block.sites}
            for role in ("attention", "cross_attention") if self.cross_attention else ("attention",):
                if role not in present:
                    continue
                keys = {site.depth: site for site in anatomy.sites([f"{role}.k"], self.layers, stack.name)}
                for site in anatomy.sites([role], self.layers, stack.name):
                    if keys[site.depth].kind == "parameter":
                        raise AttachError(
                            f"prefix-tuning: {site.key} runs torch's own attention, which takes no extra keys"
                        )
                    yield site, keys[site.depth].out_features

    def shared(self, anatomy: Anatomy) -> nn.Module | None:
        """The part of the MLP that all attentions of a kind share: the embedding of the prefix and its first layer."""
        if self.reparametrisation != "mlp":
            return None
        groups = {
            f"{site.stack}_{site.role}": anatomy.stack(site.stack).hidden_size for site, _ in self.attentions(anatomy)
        }
        return Trunk(groups, self.length, self.hidden_size)

    def bind(self, deltas: Mapping[str, Delta], shared: nn.Module | None) -> None:
        for delta in deltas.values():
            if isinstance(delta, Generated) and isinstance(shared, Trunk):
                delta.trunk = (shared,)

    def folded(self) -> PrefixTuning:
        return self.model_copy(update={"reparametrisation": "none"})


class Prefix(AttentionDelta):
    """P_k, P_v (l, d_k), put before the keys and values of every sample.

    Args:
        length: l. size: width d_k of all key heads together. dropout: in training.
    """

    def __init__(self, length: int, size: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.key = nn.Parameter(torch.empty(length, size))
        self.value = nn.Parameter(torch.empty(length, size))
        self.dropout = nn.Dropout(dropout)

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        self.key.normal_(0, 0.02, generator=generator)
        self.value.normal_(0, 0.02, generator=generator)

    def prefix(self) -> tuple[Tensor, Tensor]:
        """P_k, P_v (l, d_k)"""
        return self.key, self.value

    def keys_values(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """key, value (B, heads, T, d) -> P_k, P_v (B, heads, l, d)"""
        batch, heads = key.shape[:2]
        pair = [
            self.dropout(p).unflatten(1, (heads, -1)).transpose(0, 1).expand(batch, -1, -1, -1) for p in self.prefix()
        ]
        return pair[0], pair[1]


class Trunk(nn.Module):
    """E (l, d) -> tanh(E W₁ + b₁) (l, m), one for each kind of attention in each stack.

    Args:
        groups: kind -> width d. length: l. hidden_size: m.
    """

    def __init__(self, groups: Mapping[str, int], length: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding = nn.ParameterDict({name: torch.empty(length, size) for name, size in groups.items()})
        self.first = nn.ModuleDict({name: nn.Linear(size, hidden_size) for name, size in groups.items()})

    def initialise(self, generator: torch.Generator) -> None:
        for parameter in self.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.02, generator=generator)
            else:
                parameter.zero_()

    def folded_state(self) -> dict[str, Tensor]:
        """Nothing: it serves training alone."""
        return {}

    def forward(self, group: str) -> Tensor:
        return torch.tanh(self.first[group](self.embedding[group]))


class Generated(Prefix):
    """P_k, P_v = tanh(E W₁ + b₁) W₂ + b₂, with E and W₁ shared by all attentions of a kind.

    Args:
        length, size, dropout: as for `Prefix`. hidden_size: m. group: the kind of attention.
    """

    trunk: tuple[Trunk, ...] = ()

    def __init__(self, length: int, size: int, dropout: float, hidden_size: int, group: str) -> None:
        super().__init__(length, size, dropout)
        del self.key, self.value
        self.group = group
        self.second = nn.Linear(hidden_size, 2 * size)

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        self.second.weight.normal_(0, 0.02, generator=generator)
        self.second.bias.zero_()

    def prefix(self) -> tuple[Tensor, Tensor]:
        key, value = self.second(self.trunk[0](self.group)).chunk(2, -1)
        return key, value

    def folded_state(self) -> dict[str, Tensor]:
        with torch.no_grad():
            key, value = self.prefix()
        return {"key": key.contiguous(), "value": value.contiguous()}
