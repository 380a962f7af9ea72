"""Hyperformer: adapters that hypernetworks write.  Karimi Mahabadi et al. 2021, arXiv 2106.04489; as in arXiv 2112.06825.

    h  <-  h + W_up φ( W_down h + b_down ) + b_up        W_down (r, d), b_down (r,), W_up (d, r), b_up (d,): each W_g z + b_g
    z = LN( W₂ ReLU( W₁ [e_task ; e_layer] ) )           e (te,), W₁ (hid, 2 te), W₂ (pj, hid), z (pj,)

e_task is one for each task and serves all stacks. Everything else is a stack's: e_layer, the net that gives z, and the generators W_g, one
set for each slot (after ffn, self-attention, cross-attention). With `one_hypernet` (Hyperformer++) all slots have one set, and z an e_slot
beside. All adapters of a forward pass are written in one go, once, of the tasks that it is of; at inference again only after a change.

Sits     after each attention (self and cross) and each ffn, before dropout, residual and norm.
Trains   per stack L te + 2 te hid + hid + (hid + 1) pj + 2 pj, and (pj + 1)(2 d r + r + d) for each slot; te for each task; all norms of
         the backbone.
Starts   near the backbone: generators are N(0, 0.01²), embeddings N(0, 1).
Merges   no: φ stands in between. `vl_adapter.materialise(tuned, task)` makes ordinary adapters of it.

Relations: `polyhistor` writes adapters of several widths, in two factors. Tasks with adapters of their own (`vl-adapter`) share nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear

from petiole.anatomy import Anatomy, Site
from petiole.errors import AttachError
from petiole.method import Config, Delta, HiddenDelta, Place
from petiole.methods.adapters.bottleneck import ACTIVATIONS
from petiole.methods.adapters.hypernetwork import (
    NORMS,
    AdapterGenerator,
    AdapterWeights,
    Conditioning,
    NormGenerator,
    dense,
)
from petiole.methods.adapters.multitask import TaskAdapters
from petiole.methods.adapters.tasks import SHARED, Asked, asked, by_task
from petiole.methods.prompts.kept import Kept

ORDER = ("ffn", "attention", "cross_attention")  # of slots, and of their embeddings
Adapter = dict[str, Tensor]  # W_down, b_down, W_up, b_up; gain and shift of norms


class HypernetworkFields(Config):
    """The fields of hypernetworks that write adapters."""

    task_embedding_dim: int = Field(512, ge=1, description="te: width of the embeddings of tasks, layers and slots.")
    hidden_dim: int = Field(128, ge=1, description="hid: inner width of the net that turns embeddings into z.")
    projected_dim: int = Field(8, ge=1, description="pj: width of z, from which weights are generated.")
    one_hypernet: bool = Field(False, description="One set of generators for all slots, with an embedding of each.")


@dataclass(frozen=True)
class Group:
    """The adapters of one stack: at these depths and slots, of width d with bottleneck r."""

    depths: tuple[int, ...]
    slots: tuple[str, ...]
    size: int
    bottleneck: int


class Hyperformer(HypernetworkFields, TaskAdapters):
    """Adapters of all tasks and layers from one small network."""

    slug: ClassVar[str] = "hyperformer"
    title: ClassVar[str] = "Parameter-efficient Multi-task Fine-tuning for Transformers via Shared Hypernetworks"
    paper: ClassVar[str] = "2106.04489"

    def deltas(self, anatomy: Anatomy) -> Iterator[Place]:
        groups = self.groups(anatomy)
        for site, _ in self.places(anatomy):
            row = groups[site.stack].depths.index(site.depth)
            yield Place(site.at("output"), Written(self, site.stack, slot(site), row))

    def groups(self, anatomy: Anatomy) -> dict[str, Group]:
        """What is written for each stack.

        Raises:
            AttachError: its adapters are of several widths.
        """
        found: dict[str, list[tuple[Site, int]]] = {}
        for site, bottleneck in self.places(anatomy):
            found.setdefault(site.stack, []).append((site, bottleneck))
        groups = {}
        for stack, sites in found.items():
            first, bottleneck = sites[0]
            odd = next((site for site, _ in sites if site.out_features != first.out_features), None)
            if odd is not None:
                raise AttachError(
                    f"{self.name}: {odd.key} is {odd.out_features} wide and {first.key} {first.out_features}, but one generator writes "
                    "one width\npolyhistor writes several; or choose layers= of one width"
                )
            slots = sorted(
                {slot(site) for site, _ in sites}, key=lambda name: (ORDER.index(name.rstrip("0123456789")), name)
            )
            depths = tuple(sorted({site.depth for site, _ in sites}))
            groups[stack] = Group(depths, tuple(slots), first.out_features, bottleneck)
        return groups

    def shared(self, anatomy: Anatomy) -> nn.Module:
        return Hypernetworks(self, self.groups(anatomy))

    def bind(self, deltas: Mapping[str, Delta], shared: nn.Module | None) -> None:
        for delta in deltas.values():
            if isinstance(delta, Written) and isinstance(shared, Hypernetworks):
                delta.source = (shared,)  # in a tuple, so that it is not registered once more


def slot(site: Site) -> str:
    """The place of an adapter in its layer."""
    return site.role + (str(site.number) if site.number else "")


class Hypernetworks(nn.Module):
    """Everything that trains: embeddings of the tasks, and what writes the adapters of each stack.

    Args:
        method: whose fields hold. groups: by stack.
    """

    def __init__(self, method: Hyperformer, groups: Mapping[str, Group]) -> None:
        super().__init__()
        size = method.task_embedding_dim
        self.tasks = nn.ParameterDict({task: nn.Parameter(torch.empty(size)) for task in method.tasks})
        self.stacks = nn.ModuleDict({name: Writer(method, group) for name, group in groups.items()})
        self.kept = Kept()

    def initialise(self, generator: torch.Generator) -> None:
        for embedding in self.tasks.values():
            embedding.normal_(generator=generator)
        for writer in self.stacks.values():
            writer.initialise(generator)  # type: ignore[operator]

    def adapters(self, host: Any, task: Asked) -> dict[tuple[str, str, str], list[Adapter]]:
        """By task, stack and slot, an adapter for each layer: of the tasks of this forward pass, written once in it."""
        names = (task,) if isinstance(task, str) else tuple(sorted(set(task)))
        parts = [*(self.tasks[name] for name in names), *self.stacks.parameters()]
        name = f"hyperformer {id(self)} {names}"
        return host.once(name, lambda: self.kept(parts, lambda: self.write(names)))

    def write(self, names: Sequence[str]) -> dict[tuple[str, str, str], list[Adapter]]:
        """The same, of these tasks."""
        e = torch.stack([self.tasks[name] for name in names])
        found: dict[tuple[str, str, str], list[Adapter]] = {}
        for stack, writer in self.stacks.items():
            for place, adapters in writer(e).items():
                count = len(adapters) // len(names)
                found |= {(name, stack, place): adapters[i * count : (i + 1) * count] for i, name in enumerate(names)}
        return found


class Writer(nn.Module):
    """Embeddings of tasks (T, te) -> for each slot the adapters of all layers: those of the first task, then those of the next

    Args:
        method: whose fields hold. group: what is written.
    """

    def __init__(self, method: Hyperformer, group: Group) -> None:
        super().__init__()
        self.slots = group.slots
        te, pj, d = method.task_embedding_dim, method.projected_dim, group.size
        one = method.one_hypernet
        self.layer_embedding = nn.Parameter(torch.empty(len(group.depths), te))
        self.slot_embedding = nn.Parameter(torch.empty(len(self.slots), te)) if one else None
        self.conditioning = Conditioning((3 if one else 2) * te, method.hidden_dim, pj)
        owners = (SHARED,) if one else self.slots
        self.generators = nn.ModuleDict({owner: AdapterGenerator(pj, d, group.bottleneck) for owner in owners})
        norms = [name for name in NORMS if getattr(method, name)]
        self.norms = nn.ModuleDict({f"{owner}_{name}": NormGenerator(pj, d) for owner in owners for name in norms})

    def initialise(self, generator: torch.Generator) -> None:
        for embedding in (self.layer_embedding, self.slot_embedding):
            if embedding is not None:
                embedding.normal_(generator=generator)
        for module in (self.conditioning, *self.generators.values(), *self.norms.values()):
            module.initialise(generator)  # type: ignore[operator]

    def forward(self, e: Tensor) -> dict[str, list[Adapter]]:
        tasks, layers = len(e), len(self.layer_embedding)
        code = [e[:, None].expand(-1, layers, -1), self.layer_embedding.expand(tasks, -1, -1)]
        if self.slot_embedding is None:
            z = self.conditioning(torch.cat(code, -1)).flatten(0, 1)
            return {name: self.written(name, z) for name in self.slots}
        slots = len(self.slots)
        code = [part.expand(slots, -1, -1, -1) for part in code]
        code.append(self.slot_embedding[:, None, None].expand(-1, tasks, layers, -1))
        adapters = self.written(SHARED, self.conditioning(torch.cat(code, -1)).flatten(0, 2))
        count = tasks * layers
        return {name: adapters[i * count : (i + 1) * count] for i, name in enumerate(self.slots)}

    def written(self, owner: str, z: Tensor) -> list[Adapter]:
        """z (N, pj) -> N adapters"""
        made: AdapterWeights = self.generators[owner](z)
        parts = {"down": dense(made.down), "down_bias": made.down_bias, "up": dense(made.up), "up_bias": made.up_bias}
        for name in NORMS:
            if f"{owner}_{name}" in self.norms:
                parts[f"{name}.weight"], parts[f"{name}.bias"] = self.norms[f"{owner}_{name}"](z)
        # Taken apart in one go: a gradient for each layer alone would be as large as those of all.
        return [
            dict(zip(parts, values, strict=True)) for values in zip(*(p.unbind() for p in parts.values()), strict=True)
        ]


class Written(HiddenDelta):
    """h (..., d) -> Δh (..., d), by the adapter that is written for the row's task

    Args:
        method: whose fields hold. stack, slot, row: which of the adapters; row counts the layers that have one.
    """

    publishes = True  # adapters are written once, by whoever comes first, so their graph must not be cut there

    def __init__(self, method: Hyperformer, stack: str, slot: str, row: int) -> None:
        super().__init__()
        self.tasks, self.activation = method.tasks, method.activation
        self.stack, self.slot, self.row = stack, slot, row
        self.source: tuple[Hypernetworks, ...] = ()

    def forward(self, h: Tensor) -> Tensor:
        task = asked(self.host, self.tasks)
        adapters = self.source[0].adapters(self.host, task)
        return by_task(h, task, lambda own, name: self.change(own, adapters[name, self.stack, self.slot][self.row]))

    def change(self, h: Tensor, adapter: Adapter) -> Tensor:
        """Δh, by one adapter."""
        kind = h.dtype
        if not torch.is_autocast_enabled(h.device.type):
            h = h.to(adapter["down"].dtype)
        h = normed(h, adapter, "norm_before")
        h = ACTIVATIONS[self.activation](linear(h, adapter["down"], adapter["down_bias"]))
        return normed(linear(h, adapter["up"], adapter["up_bias"]), adapter, "norm_after").to(kind)

    @torch.no_grad()
    def of_task(self, task: str) -> dict[str, Tensor]:
        """The state of an ordinary bottleneck for this task."""
        adapter = self.source[0].adapters(self.host, task)[task, self.stack, self.slot][self.row]
        halves = {f"{half}.{SHARED}": (adapter[half], adapter[f"{half}_bias"]) for half in ("down", "up")}
        state = {
            f"{name}.{part}": t
            for name, pair in halves.items()
            for part, t in zip(("weight", "bias"), pair, strict=True)
        }
        return state | {name: value for name, value in adapter.items() if name.startswith(NORMS)}


def normed(h: Tensor, adapter: Adapter, name: str) -> Tensor:
    """h through a norm that was written, if one was."""
    if f"{name}.weight" not in adapter:
        return h
    return layer_norm(h, h.shape[-1:], adapter[f"{name}.weight"], adapter[f"{name}.bias"])
