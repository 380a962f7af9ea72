"""Adapters of several tasks at once, with halves of each task's own or shared: what `vl-adapter`, `compacter` and `hyperformer` share.

    h  <-  h + LN( W_up φ( W_down LN(h) + b_down ) + b_up )        W_down (r, d), W_up (d, r), r = d / ρ; both norms are optional

    multiple     W_down and W_up of each task       half_down    one W_down for all tasks, W_up of each
    single       both for all tasks                 half_up      W_down of each task, one W_up for all

h is the output of an attention (self or cross) or of an ffn, before dropout, residual and norm. A norm of an adapter serves all tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from petiole.anatomy import Anatomy, Site
from petiole.errors import AttachError
from petiole.method import Base, HiddenDelta, Layers, Method, Place, layers_field, stack_field
from petiole.methods.adapters.bottleneck import ACTIVATIONS, Activation
from petiole.methods.adapters.tasks import SHARED, TaskNames, asked, by_task, of, tasks_field
from petiole.methods.full.names import norms
from petiole.methods.lowrank.factors import kaiming_uniform

Sharing = Literal["multiple", "half_down", "half_up", "single"]
SHARING = (
    "Which halves of an adapter all tasks share: none (multiple), W_down (half_down), W_up (half_up), both (single)."
)
Half = Callable[
    [int, int], nn.Module
]  # of in and out: x (..., in) -> (..., out), with a `weight` (out, in) and a `bias` (out,)


class TaskAdapters(Method):
    """An adapter of each task after each attention and ffn; subclasses say where its weights come from."""

    saves: ClassVar[str] = "optimiser state and checkpoint; several tasks on one backbone"
    routes: ClassVar[bool] = False
    one_task: ClassVar[bool] = True

    tasks: TaskNames = tasks_field()
    reduction_factor: int = Field(8, ge=1, description="ρ: width of the backbone over the bottleneck r.")
    cross_attention: bool = Field(True, description="An adapter after cross-attention too, where there is one.")
    activation: Activation = Field("gelu_tanh", description="φ.")
    norm_before: bool = Field(False, description="A LayerNorm of its own before an adapter.")
    norm_after: bool = Field(False, description="A LayerNorm of its own after an adapter, before it is added.")
    train_norms: bool = Field(True, description="The backbone's own norms train too, in place, for all tasks.")
    layers: Layers = layers_field()
    stack: str | None = stack_field()

    @property
    def name(self) -> str:
        return self.slug or "vl-adapter"

    def places(self, anatomy: Anatomy) -> list[tuple[Site, int]]:
        """Where adapters sit, and how wide their bottleneck is.

        Raises:
            AnatomyError: there is no attention or no ffn. AttachError: a width leaves no bottleneck.
        """
        sites = anatomy.attentions(self.layers, self.stack, self.cross_attention)
        sites = sites or anatomy.sites(["attention"], self.layers, self.stack)  # which says what is missing
        sites = [*sites, *anatomy.sites(["ffn"], self.layers, self.stack)]
        for site in sites:
            if site.out_features < self.reduction_factor:
                raise AttachError(
                    f"{self.name}: reduction_factor = {self.reduction_factor} leaves no bottleneck at {site.key}, which is "
                    f"{site.out_features} wide: 1 to {site.out_features}"
                )
        return [(site, site.out_features // self.reduction_factor) for site in sites]

    def trains(self, anatomy: Anatomy, model: nn.Module) -> Iterable[str]:
        return norms(anatomy, model) if self.train_norms else ()


class SharedAdapters(TaskAdapters):
    """Adapters whose halves are shared by the tasks, or not."""

    sharing: Sharing = Field("single", description=SHARING)

    def deltas(self, anatomy: Anatomy) -> Iterator[Place]:
        for site, bottleneck in self.places(anatomy):
            down, up = self.halves(site, bottleneck)
            delta = TaskBottleneck(site.out_features, bottleneck, self, self.sharing, down, up)
            yield Place(site.at("output"), delta)

    def halves(self, site: Site, bottleneck: int) -> tuple[Half, Half]:
        """What makes W_down, and what makes W_up, for as many tasks as need one."""
        return nn.Linear, nn.Linear


class Options(Protocol):
    """What an adapter asks of its method."""

    @property
    def tasks(self) -> tuple[str, ...]: ...
    @property
    def activation(self) -> Activation: ...
    @property
    def norm_before(self) -> bool: ...
    @property
    def norm_after(self) -> bool: ...


class TaskBottleneck(HiddenDelta):
    """h (..., d) -> Δh (..., d), by the adapter of the row's task

    Args:
        size: d. bottleneck: r. method: its tasks, activation and norms. sharing: of the halves.
        down, up: make one half.
    """

    def __init__(self, size: int, bottleneck: int, method: Options, sharing: Sharing, down: Half, up: Half) -> None:
        super().__init__()
        self.tasks, self.activation = method.tasks, method.activation
        one = (SHARED,)
        owners = {
            "multiple": (self.tasks, self.tasks),
            "half_down": (one, self.tasks),
            "half_up": (self.tasks, one),
            "single": (one, one),
        }
        downs, ups = owners[sharing]
        self.down = nn.ModuleDict({owner: down(size, bottleneck) for owner in downs})
        self.up = nn.ModuleDict({owner: up(bottleneck, size) for owner in ups})
        self.norm_before = nn.LayerNorm(size) if method.norm_before else None
        self.norm_after = nn.LayerNorm(size) if method.norm_after else None

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        for half in (*self.down.values(), *self.up.values()):
            if isinstance(half, nn.Linear):
                for parameter in half.parameters():  # as torch starts it
                    kaiming_uniform(parameter, generator, fan_in=half.in_features)
            else:
                half.initialise(generator)  # type: ignore[operator]

    def halves(self, task: str) -> tuple[Any, Any]:
        """W_down and W_up of a task, the same modules for all tasks that share them."""
        return of(self.down, task), of(self.up, task)

    def forward(self, h: Tensor) -> Tensor:
        alike = SHARED in self.down and SHARED in self.up
        return by_task(h, asked(self.host, self.tasks, alike), self.change)

    def change(self, h: Tensor, task: str) -> Tensor:
        """Δh of rows of one task."""
        down, up = self.halves(task)
        kind = h.dtype
        if not torch.is_autocast_enabled(h.device.type):
            h = h.to(down.bias.dtype)  # a half-precision backbone under full-precision adapters
        if self.norm_before is not None:
            h = self.norm_before(h)
        h = up(ACTIVATIONS[self.activation](down(h)))
        return (h if self.norm_after is None else self.norm_after(h)).to(kind)

    def of_task(self, task: str) -> dict[str, Tensor]:
        """The state of a bottleneck for this task alone, of ordinary linears."""
        halves = zip(("down", "up"), self.halves(task), strict=True)
        state = {f"{n}.{SHARED}.{part}": getattr(half, part) for n, half in halves for part in ("weight", "bias")}
        return state | {name: value for name, value in self.state_dict().items() if name.startswith("norm_")}
