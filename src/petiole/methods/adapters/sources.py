"""Adapters that were trained before, side by side at one place and frozen: what methods that combine them share.

    a_s = W_up,s f(W_down,s u + b_down,s) + b_up,s        of all sources from two products, without the residual; u as each source reads it

The tensors are copies, and no part of a file: there stand the sources' names and a digest of each, which must be found again on load.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from petiole.adaptation import Adaptation
from petiole.attach import HEAD, host_of
from petiole.errors import AttachError
from petiole.files import same_backbone
from petiole.method import HiddenDelta, Place
from petiole.methods.adapters.bottleneck import ACTIVATIONS, Activation, Bottleneck, Renormed
from petiole.methods.lowrank.origin import digest


def sources_field() -> Any:
    """The field `sources`, the same in every method that combines adapters."""
    return Field(
        ("source",), min_length=1, description="Names of the attached adaptations to combine, one or more, each once."
    )


def check_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse names that stand twice, as a validator of a field."""
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise ValueError(f"{double!r} stands twice")
    return names


@dataclass(frozen=True)
class SourcePlace:
    """The sources' bottlenecks at one place, by name, and the place of the first."""

    place: Place
    bottlenecks: dict[str, Bottleneck]


def places_of(slug: str, model: nn.Module, names: Sequence[str]) -> list[SourcePlace]:
    """Where the sources sit: all at the same places.

    Raises:
        AttachError: one is not attached, is of another backbone, holds more than adapters at the ffn, or they differ in places, in
            what they read or in the activation.
    """
    host = host_of(model)
    attached = host.adaptations if host is not None else {}
    found: dict[str, dict[str, tuple[Place, Bottleneck]]] = {}
    for name in names:
        if name not in attached:
            raise AttachError(
                f"{slug}: no adaptation is called {name!r}; attached: {', '.join(attached) or 'none'}\n"
                f"attach the sources first: pt.load(model, path, name={name!r})"
            )
        found[name] = bottlenecks_of(slug, attached[name])
        differences = same_backbone(attached[name].mark, host.mark if host is not None else {})
        if differences:
            raise AttachError(f"{slug}: {name!r} is of another backbone: {differences[0]}")
    first = names[0]
    for name in names[1:]:
        if found[name].keys() != found[first].keys():
            where = sorted(found[name].keys() ^ found[first].keys())[0]
            raise AttachError(
                f"{slug}: {name!r} and {first!r} sit at different places, {where} for one\n"
                "sources need the same sites and layers"
            )
        for key, (place, bottleneck) in found[name].items():
            other_place, other = found[first][key]
            for what, mine, theirs in (
                ("way to read", (type(bottleneck), place.read), (type(other), other_place.read)),
                ("activation", bottleneck.activation, other.activation),
                (
                    "width",
                    (bottleneck.down.in_features, bottleneck.up.out_features),
                    (other.down.in_features, other.up.out_features),
                ),
            ):
                if mine != theirs:
                    raise AttachError(f"{slug}: {name!r} and {first!r} have another {what} at {key}")
    return [
        SourcePlace(place, {name: found[name][key][1] for name in names}) for key, (place, _) in found[first].items()
    ]


def bottlenecks_of(slug: str, source: Adaptation) -> dict[str, tuple[Place, Bottleneck]]:
    """A source's bottlenecks by place, its head aside."""
    found = {}
    for slot in source.slots:
        if slot.number == HEAD:
            continue
        delta = slot.delta
        if type(delta) not in (Bottleneck, Renormed) or not at_ffn(slot.place):
            raise AttachError(
                f"{slug}: {source.name!r} has a {type(delta).__name__} at {slot.site.key}; a source has bottlenecks at ffns alone\n"
                "such as pfeiffer, or unified-view with insertion='pfeiffer'"
            )
        if delta.norm_in is not None or delta.norm_out is not None:
            raise AttachError(
                f"{slug}: {source.name!r} has a norm in its adapter at {slot.site.key}, which can't be stacked"
            )
        found[f"{slot.site.key}.{slot.site.side}"] = slot.place, delta
    if source.own or source.shared or not found:
        raise AttachError(f"{slug}: {source.name!r} is not made of adapters alone")
    return found


def at_ffn(place: Place) -> bool:
    """Whether an adapter sits at an ffn: at its output, or, reading that, at the norm that follows."""
    return "ffn" in (place.site.role, place.read.role if place.read is not None else "")


class Combined(HiddenDelta):
    """Frozen sources at one place; subclasses say how their outputs are mixed.

    Args:
        sources: bottlenecks by name, of one width d and of inner widths r_s that may differ; R is their sum.
    """

    def __init__(self, sources: dict[str, Bottleneck]) -> None:
        super().__init__()
        first = next(iter(sources.values()))
        self.names = tuple(sources)
        self.activation: Activation = first.activation
        self.closing = first.closing if isinstance(first, Renormed) else ""
        self.reads_both = bool(self.closing)
        widths = torch.tensor([source.down.out_features for source in sources.values()])
        tensors: dict[str, Tensor] = {"owner": torch.repeat_interleave(torch.arange(len(sources)), widths)}
        parts = [stored(source) for source in sources.values()]
        tensors["down"] = torch.cat([part[0] for part in parts])  # (R, d)
        tensors["down_bias"] = torch.cat([part[1] for part in parts])  # (R,)
        tensors["up"] = torch.cat([part[2] for part in parts], 1)  # (d, R)
        tensors["up_bias"] = torch.stack([part[3] for part in parts])  # (n, d)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor
    owner: Tensor

    def recipe(self) -> dict[str, Any]:
        """A digest of each source's tensors here."""
        made = {}
        for number, name in enumerate(self.names):
            mine = self.owner == number
            made[f"source {name}"] = digest(
                self.down[mine], self.down_bias[mine], self.up[:, mine], self.up_bias[number]
            )
        return made

    def forward(self, *states: Tensor) -> Tensor:
        """What a source of this kind is given, (..., d) -> Δ (..., d)."""
        u, kind = states[-1], states[-1].dtype
        if self.closing:
            u = self.host.module(self.closing).forward(u)  # its hooks are where this is called from
        if not torch.is_autocast_enabled(u.device.type):
            u = u.to(self.down.dtype)
        m = ACTIVATIONS[self.activation](nn.functional.linear(u, self.down, self.down_bias))
        return self.mixed(u, m).to(kind)

    def mixed(self, u: Tensor, m: Tensor) -> Tensor:
        """u (..., d) and the middle activations of all sources m (..., R) -> Δ (..., d)"""
        raise NotImplementedError


def stored(source: Bottleneck) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Copies of a source's projections and biases, its scale in those of the second."""
    down, up = source.down, source.up
    scale = source.fixed_scale if source.scale is None else source.scale.detach()
    zeros = up.weight.new_zeros
    return (
        down.weight.detach().clone(),
        zeros(down.out_features) if down.bias is None else down.bias.detach().clone(),
        scale * up.weight.detach(),
        zeros(up.out_features) if up.bias is None else scale * up.bias.detach(),
    )
