"""Pairs of learned keys and values for every attention: what prefix tuning and its relatives share.

    P_k, P_v (l, d)        trained as they are, or through an MLP:  [P_k, P_v] = tanh(E W₁ + b₁) W₂ + b₂,  E (l, d), W₁ (d, m), W₂ (m, 2 d)

E and W₁ are shared by all attentions of a kind (self or cross, encoder or decoder); W₂ is each attention's own. The MLP serves training
alone: files hold P_k and P_v, unless the whole of a run is to be kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from petiole.anatomy import Anatomy, Site
from petiole.errors import AttachError
from petiole.method import Base, Delta, Layers, Method, Place, layers_field, stack_field
from petiole.methods.prompts.kept import Kept


class AttentionVectors(Method):
    """A pair in every attention. Subclasses say what is made of it."""

    size: ClassVar[str] = "length"

    length: int = Field(20, ge=1, description="Keys and values per attention.")
    reparametrisation: Literal["none", "mlp"] = Field(
        "none", description="Train them directly, or through an MLP that is folded away on save."
    )
    hidden_size: int = Field(800, ge=1, description="Inner width m of that MLP.")
    dropout: float = Field(0.0, ge=0, lt=1, description="On the keys and values, in training.")
    cross_attention: bool = Field(True, description="Cross-attention too, where there is one.")
    layers: Layers = layers_field()
    stack: str | None = stack_field()

    def place(self, anatomy: Anatomy, attention: Site) -> Place:
        """What sits in or beside one attention."""
        raise NotImplementedError

    def deltas(self, anatomy: Anatomy) -> Iterator[Place]:
        attentions = self.attentions(anatomy)
        if not attentions:
            raise AttachError(f"{self.name}: {anatomy.model_class} has no attention, which is what it acts in")
        for site in attentions:
            yield self.place(anatomy, site)

    def attentions(self, anatomy: Anatomy) -> list[Site]:
        return anatomy.attentions(self.layers, self.stack, self.cross_attention)

    @property
    def name(self) -> str:
        return self.slug or type(self).__name__

    def linear(self, anatomy: Anatomy, attention: Site, role: str, heads: int) -> Site:
        """A projection of the attention, whose output its heads share.

        Raises:
            AnatomyError: there is none. AttachError: it does not divide by the heads.
        """
        site = anatomy.part(attention, role)
        if site is None:
            (site, *_) = anatomy.sites([f"{attention.role}.{role}"], [attention.depth], attention.stack)
        if heads and site.out_features % heads:
            raise AttachError(
                f"{self.name}: the {site.out_features} features of {site.key} don't divide by its {heads} heads"
            )
        return site

    def options(self, attention: Site) -> dict[str, Any]:
        """Of the `Vectors` of one attention."""
        own = (self.hidden_size, group(attention)) if self.reparametrisation == "mlp" else None
        return {"length": self.length, "dropout": self.dropout, "generated": own}

    def shared(self, anatomy: Anatomy) -> nn.Module | None:
        """The part of the MLP that all attentions of a kind share: the embedding of the prefix and its first layer."""
        if self.reparametrisation != "mlp":
            return None
        groups = {group(site): anatomy.stack(site.stack).hidden_size for site in self.attentions(anatomy)}
        return Trunk(groups, self.length, self.hidden_size)

    def bind(self, deltas: Mapping[str, Delta], shared: nn.Module | None) -> None:
        for delta in deltas.values():
            if isinstance(delta, Vectors) and isinstance(shared, Trunk):
                delta.trunk = (shared,)

    def folded(self) -> Self:
        return self.model_copy(update={"reparametrisation": "none"})


def key_size(method: AttentionVectors, anatomy: Anatomy, attention: Site) -> int:
    """Width of all key heads together (smaller than d under grouped queries), where others can join them."""
    keys = method.linear(anatomy, attention, "k", attention.key_value_heads)
    if keys.kind == "parameter":
        raise AttachError(f"{method.name}: {attention.key} runs torch's own attention, which takes no extra keys")
    return keys.out_features


def group(attention: Site) -> str:
    """The kind of an attention: those of one kind share the first part of the MLP."""
    return f"{attention.stack}_{attention.role}"


class Vectors(Delta):
    """P_k, P_v (l, d)

    Args:
        length: l. size: width d of all heads together. dropout: in training.
        generated: inner width m of the MLP and the kind of attention, where they come from one.
    """

    key: nn.Parameter  # where they train as they are
    value: nn.Parameter
    trunk: tuple[Trunk, ...] = ()

    def __init__(self, length: int, size: int, dropout: float = 0.0, generated: tuple[int, str] | None = None) -> None:
        super().__init__()
        self.second = None if generated is None else nn.Linear(generated[0], 2 * size)
        if generated is None:
            self.key = nn.Parameter(torch.empty(length, size))
            self.value = nn.Parameter(torch.empty(length, size))
        else:
            self.group, self.kept = generated[1], Kept()
        self.dropout = nn.Dropout(dropout)

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        if self.second is None:
            self.key.normal_(0, 0.02, generator=generator)
            self.value.normal_(0, 0.02, generator=generator)
        else:
            self.second.weight.normal_(0, 0.02, generator=generator)
            self.second.bias.zero_()

    def pair(self) -> tuple[Tensor, Tensor]:
        """P_k, P_v (l, d), without dropout."""
        if self.second is None:
            return self.key, self.value
        second, (trunk,) = self.second, self.trunk
        parts = [*trunk.parameters(), *second.parameters()]
        key, value = self.kept(parts, lambda: second(trunk(self.group))).chunk(2, -1)
        return key, value

    def by_head(self, heads: int) -> tuple[Tensor, Tensor]:
        """P_k, P_v (heads, l, d / heads), with dropout."""
        key, value = (self.dropout(p).unflatten(1, (heads, -1)).transpose(0, 1) for p in self.pair())
        return key, value

    def folded_state(self) -> dict[str, Tensor]:
        state = self.state_dict()
        if self.second is None:
            return state
        with torch.no_grad():
            key, value = self.pair()
        rest = {name: tensor for name, tensor in state.items() if not name.startswith("second.")}
        return {**rest, "key": key.contiguous(), "value": value.contiguous()}


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
