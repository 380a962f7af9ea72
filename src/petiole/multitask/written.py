"""Adapters that `polyhistor` writes: what is generated, how templates are stretched to a block's width, and the delta that uses it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear

from petiole.anatomy import Site
from petiole.errors import AttachError
from petiole.method import HiddenDelta, wide
from petiole.methods.adapters import kronecker
from petiole.methods.adapters.bottleneck import ACTIVATIONS
from petiole.methods.adapters.hypernetwork import (
    NORMS,
    AdapterGenerator,
    AdapterWeights,
    Conditioning,
    Factors,
    NormGenerator,
    dense,
)
from petiole.methods.adapters.tasks import Asked, asked, by_task
from petiole.methods.prompts.kept import Kept

if TYPE_CHECKING:
    from petiole.multitask.polyhistor import Polyhistor


class Adapter(NamedTuple):
    """One adapter, put together where it is used.

    Attributes:
        parts: of one code for each template; matrices (s, o, i) in two factors, vectors (s, o).
        norms: gain and shift (w,) by name.
        kernel, bias_kernel: K (s, s, s) and k (s, s); None where s = 1.
    """

    parts: AdapterWeights
    norms: dict[str, tuple[Tensor, Tensor]]
    kernel: Tensor | None
    bias_kernel: Tensor | None
    front: bool

    def times(self, x: Tensor, matrix: Factors) -> Tensor:
        """x (..., i) -> W x (..., o), without forming W"""
        if self.kernel is None:
            return linear(linear(x, matrix.Q[0]), matrix.P[0])
        K, T = self.kernel.mT, (matrix.Q.mT, matrix.P.mT)
        return kronecker.product(x, K, T) if self.front else kronecker.product(x, T, K)

    def whole(self, matrix: Factors) -> Tensor:
        """W (o, i)"""
        if self.kernel is None:
            return dense(matrix)[0]
        T = dense(matrix)
        return kronecker.dense(self.kernel, T) if self.front else kronecker.dense(T, self.kernel)

    def vector(self, templates: Tensor) -> Tensor:
        """b (o,) of (s, o / s)"""
        return stretched(templates, self.bias_kernel, self.front)


def stretched(templates: Tensor, kernel: Tensor | None, front: bool) -> Tensor:
    """Σ_j k_j ⊗ b_j (o,) of templates b (s, o / s) and a kernel k (s, s); the one template where there is no kernel."""
    if kernel is None:
        return templates[0]
    return torch.einsum("ju,jm->um" if front else "ju,jm->mu", wide(kernel), wide(templates)).flatten()


class Writers(nn.Module):
    """Everything that trains: embeddings of the tasks, and what writes the adapters of each.

    Args:
        method: whose fields hold. places: sub-layers by name.
    """

    def __init__(self, method: Polyhistor, places: Mapping[str, tuple[Site, int]]) -> None:
        super().__init__()
        te = method.task_embedding_dim
        self.method = method
        self.tasks = nn.ParameterDict({task: nn.Parameter(torch.empty(te)) for task in method.tasks})
        kinds = list(dict.fromkeys(site.role for site, _ in places.values()))
        self.kind_of = {name: kinds.index(site.role) for name, (site, _) in places.items()}
        self.kinds = nn.Parameter(torch.empty(len(kinds), te)) if len(kinds) > 1 else None
        self.norms = tuple(name for name in NORMS if getattr(method, name))
        self.kept = Kept()

    def conditioning(self, embeddings: int) -> Conditioning:
        """The net that turns so many embeddings, and that of the kind of site, into z."""
        count = embeddings + (self.kinds is not None)
        return Conditioning(count * self.method.task_embedding_dim, self.method.hidden_dim, self.method.projected_dim)

    def generator(self, size: int, bottleneck: int) -> nn.ModuleDict:
        """What writes an adapter of this size, and its norms."""
        method = self.method
        made = AdapterGenerator(method.projected_dim, size, bottleneck, method.rank_of(bottleneck, size))
        found = nn.ModuleDict({"adapter": made})
        for name in self.norms:
            found[name] = NormGenerator(method.projected_dim, size)
        return found

    def initialise(self, generator: torch.Generator) -> None:
        for parameter in self.parameters():
            parameter.normal_(generator=generator)  # embeddings and kernels; the rest follows
        for module in self.modules():
            if isinstance(module, (Conditioning, AdapterGenerator, NormGenerator)):
                module.initialise(generator)
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()

    def adapters(self, host: Any, task: Asked) -> dict[tuple[str, str], Adapter]:
        """By task and name, of the tasks of this forward pass; written once in it."""
        names = (task,) if isinstance(task, str) else tuple(sorted(set(task)))
        parts = [
            p for n, p in self.named_parameters() if not n.startswith("tasks.") or n.removeprefix("tasks.") in names
        ]

        def write() -> dict[tuple[str, str], Adapter]:
            return {(t, name): adapter for t in names for name, adapter in self.write(self.tasks[t]).items()}

        return host.once(f"polyhistor {id(self)} {names}", lambda: self.kept(parts, write))

    def write(self, e: Tensor) -> dict[str, Adapter]:
        """The adapters of one task by name, from its embedding (te,)."""
        raise NotImplementedError

    def code(self, name: str, *embeddings: Tensor) -> Tensor:
        """Embeddings (s, te) each, and that of the kind of site -> c (s, code)"""
        found = list(embeddings)
        if self.kinds is not None:
            found.append(self.kinds[self.kind_of[name]].expand(len(embeddings[0]), -1))
        return torch.cat(found, -1)

    def generated(self, generator: nn.ModuleDict, z: Tensor) -> tuple[AdapterWeights, dict[str, tuple[Tensor, Tensor]]]:
        norms = {name: module(z) for name, module in generator.items() if name != "adapter"}
        return generator["adapter"](z), norms


class Full(Writers):
    """A net and generators for each block."""

    def __init__(self, method: Polyhistor, places: Mapping[str, tuple[Site, int]]) -> None:
        super().__init__(method, places)
        self.block_of = {name: f"{site.stack}_{site.depth}" for name, (site, _) in places.items()}
        sizes = {self.block_of[name]: (site.out_features, r) for name, (site, r) in places.items()}
        self.nets = nn.ModuleDict({block: self.conditioning(1) for block in sizes})
        self.generators = nn.ModuleDict({block: self.generator(*size) for block, size in sizes.items()})

    def write(self, e: Tensor) -> dict[str, Adapter]:
        found = {}
        for name, block in self.block_of.items():
            z = self.nets[block](self.code(name, e[None]))
            parts, norms = self.generated(self.generators[block], z)  # type: ignore[arg-type]
            norms = {norm: (gain[0], shift[0]) for norm, (gain, shift) in norms.items()}
            found[name] = Adapter(parts, norms, None, None, True)
        return found


class Lite(Writers):
    """One net and one pair of generators, and kernels that bring templates to each width.

    Raises:
        AttachError: a width is no multiple of the first one's.
    """

    def __init__(self, method: Polyhistor, places: Mapping[str, tuple[Site, int]]) -> None:
        super().__init__(method, places)
        first = next(iter(places.values()))[0].out_features
        for site, _ in places.values():
            if site.out_features % first:
                raise AttachError(
                    f"polyhistor: {site.key} is {site.out_features} wide, no multiple of the first width {first}, as variant='lite' wants\n"
                    "variant='full' takes any widths"
                )
        self.scales = {name: site.out_features // first for name, (site, _) in places.items()}
        self.net = self.conditioning(2)
        self.templates = self.generator(first, first // method.reduction_factor)
        te = method.task_embedding_dim
        self.layers = nn.ParameterDict()  # of a block, whatever sites it has
        self.kernels, self.bias_kernels = nn.ParameterDict(), nn.ParameterDict()
        self.norm_kernels = nn.ParameterDict()  # of gain and shift
        self.block_of = {name: f"{site.stack}_{site.depth}" for name, (site, _) in places.items()}
        for name, s in self.scales.items():
            if self.block_of[name] not in self.layers:
                self.layers[self.block_of[name]] = nn.Parameter(torch.empty(s, te))
            if s > 1:
                self.kernels[name] = nn.Parameter(torch.empty(s, s, s))
                self.bias_kernels[name] = nn.Parameter(torch.empty(s, s))
                for norm in self.norms:
                    self.norm_kernels[f"{name}_{norm}"] = nn.Parameter(torch.empty(2, s, s))

    def initialise(self, generator: torch.Generator) -> None:
        super().initialise(generator)
        if self.method.kernel_init == "identity":
            for kernel in self.kernels.values():
                kernel.copy_(torch.diag_embed(torch.eye(len(kernel))))
            for kernel in (*self.bias_kernels.values(), *self.norm_kernels.values()):
                kernel.copy_(torch.eye(kernel.shape[-1]))

    def write(self, e: Tensor) -> dict[str, Adapter]:
        layers = {name: self.layers[block] for name, block in self.block_of.items()}
        codes = [self.code(name, e.expand(len(own), -1), own) for name, own in layers.items()]
        parts, norms = self.generated(self.templates, self.net(torch.cat(codes)))  # of all blocks at once
        found, at, front = {}, 0, self.method.kernel_order == "front"
        for name, s in self.scales.items():
            rows = slice(at, at + s)
            own = AdapterWeights(*(cut(part, rows) for part in parts))
            kernel, bias_kernel = (kind[name] if s > 1 else None for kind in (self.kernels, self.bias_kernels))
            own_norms = {}
            for norm, (gain, shift) in norms.items():
                k_gain, k_shift = self.norm_kernels[f"{name}_{norm}"] if s > 1 else (None, None)
                own_norms[norm] = stretched(gain[rows], k_gain, front), stretched(shift[rows], k_shift, front)
            found[name] = Adapter(own, own_norms, kernel, bias_kernel, front)
            at += s
        return found


def cut(part: Any, rows: slice) -> Any:
    """Some codes' matrices in two factors, or vectors."""
    return Factors(part.P[rows], part.Q[rows]) if isinstance(part, Factors) else part[rows]


class Written(HiddenDelta):
    """h (..., w) -> Δh (..., w), by the adapter that is written for the row's task

    Args:
        method: whose fields hold. name: of the place.
    """

    publishes = True  # adapters are written once, by whoever comes first, so their graph must not be cut there

    def __init__(self, method: Polyhistor, name: str) -> None:
        super().__init__()
        self.tasks, self.activation, self.name = method.tasks, method.activation, name
        self.source: tuple[Writers, ...] = ()

    def forward(self, h: Tensor) -> Tensor:
        task = asked(self.host, self.tasks)
        adapters = self.source[0].adapters(self.host, task)
        return by_task(h, task, lambda own, name: self.change(own, adapters[name, self.name]))

    def change(self, h: Tensor, adapter: Adapter) -> Tensor:
        """Δh, by one adapter; sums over templates are taken in float32."""
        kind, parts = h.dtype, adapter.parts
        with torch.autocast(h.device.type, enabled=False):
            h = normed(wide(h).to(parts.down_bias.dtype), adapter, "norm_before")
            h = adapter.times(h, parts.down) + adapter.vector(parts.down_bias)  # type: ignore[arg-type]
            h = ACTIVATIONS[self.activation](h)
            h = adapter.times(h, parts.up) + adapter.vector(parts.up_bias)  # type: ignore[arg-type]
            return normed(h, adapter, "norm_after").to(kind)

    @torch.no_grad()
    def of_task(self, task: str) -> dict[str, Tensor]:
        """The state of an ordinary adapter for this task."""
        adapter = self.source[0].adapters(self.host, task)[task, self.name]
        parts = adapter.parts
        state = {
            f"down.{task}.weight": adapter.whole(parts.down),  # type: ignore[arg-type]
            f"down.{task}.bias": adapter.vector(parts.down_bias),
            f"up.{task}.weight": adapter.whole(parts.up),  # type: ignore[arg-type]
            f"up.{task}.bias": adapter.vector(parts.up_bias),
        }
        for name, (gain, shift) in adapter.norms.items():
            state |= {f"{name}.weight": gain, f"{name}.bias": shift}
        return state


def normed(h: Tensor, adapter: Adapter, name: str) -> Tensor:
    """h through a norm that was written, if one was."""
    return layer_norm(h, h.shape[-1:], *adapter.norms[name]) if name in adapter.norms else h
