"""Polyhistor: adapters of several dense tasks, written by hypernetworks for every width of a backbone.  Liu et al. 2022, arXiv 2210.03265.

    h  <-  h + W_up φ( W_down h + b_down ) + b_up              W_down (n, w), W_up (w, n), n = w / ρ
    z  =   LN( W₂ ReLU( W₁ c ) )                               matrices (o, i) = P Q, with P (o, k) and Q (k, i) from one linear of z

    full     a net and generators of its own in each block, c = e_task
    lite     one net and one pair of generators, for the first stage's width d₀ (n₀ = d₀ / ρ), c = [e_task, e_layer,j]. A block of width s d₀
             has s embeddings e_layer,j, so s templates T_j, and  W = Σ_j K_j ⊗ T_j,  b = Σ_j k_j ⊗ b_j  (j < s; s = 1: T_1 itself)
    adapters ordinary ones of each task: what `materialise` leaves, and what to compare with

K (s, s, s) and k (s, s) are a block's, the same for W_down and W_up. W is never formed: with T = P Q a token costs s² (d₀ + n₀) k multiply-adds
in the place of s² d₀ n₀.

Sits     at the output of each ffn (serial), or beside it, fed by the residual stream (parallel); with `sites` after attention, too. One task
         in a forward pass: `with pt.given(model, task="depth")`. Without it a `DenseModel` runs its backbone for each.
Trains   lite: (2 te hid + hid) + (hid pj + pj) + 2 pj + 2 (pj + 1)(n₀ + d₀) k + (pj + 1)(n₀ + d₀), te for each task and each e_layer,j, and
         s³ + s² for each block with s > 1 (2 s² more for each generated norm); in a model with a decoder for each task also a norm of each
         task behind each stage.
Starts   near the backbone: generators are N(0, 0.01²), kernels and embeddings N(0, 1).
Merges   no: φ stands in between. `materialise(tuned, task)` leaves one task's ordinary adapters.

Relations: `hyperformer` writes dense matrices of one width: pj · o i numbers each, where here it is pj (o + i) k. `mtlora` runs all tasks in
one pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from petiole.adaptation import Adaptation
from petiole.anatomy import Anatomy, Site, Stack
from petiole.attach import refitted
from petiole.errors import AttachError, ConfigError
from petiole.method import AroundDelta, Delta, HiddenDelta, Layers, Method, Place, layers_field, stack_field
from petiole.methods.adapters.bottleneck import Activation
from petiole.methods.adapters.multitask import TaskBottleneck
from petiole.methods.adapters.tasks import TaskNames, alone, asked, owners, tasks_field
from petiole.multitask.branching import stages
from petiole.multitask.written import Full, Lite, Writers, Written


class Polyhistor(Method):
    """Adapters for several dense tasks from few numbers."""

    slug: ClassVar[str] = "polyhistor"
    title: ClassVar[str] = "Polyhistor: Parameter-Efficient Multi-Task Adaptation for Dense Vision Tasks"
    paper: ClassVar[str] = "2210.03265"
    saves: ClassVar[str] = "optimiser state and checkpoint; several tasks on one backbone"
    one_task: ClassVar[bool] = True
    learning_rates: ClassVar[tuple[float, float]] = (1e-4, 1e-2)

    tasks: TaskNames = tasks_field()
    variant: Literal["lite", "full", "adapters"] = Field("lite", description="Who writes the adapters, see above.")
    reduction_factor: int = Field(4, ge=1, description="ρ: width over bottleneck; it divides the first stage's.")
    rank: int = Field(1, ge=1, description="k: rank of a generated matrix, or of a template.")
    rank_ratio: float | None = Field(None, gt=0, description="k as a share: max(1, ⌊min(o, i) / ratio⌋), for `rank`.")
    task_embedding_dim: int = Field(64, ge=1, description="te: width of the embeddings of tasks, layers and sites.")
    hidden_dim: int = Field(128, ge=1, description="hid: inner width of the net that turns embeddings into z.")
    projected_dim: int = Field(64, ge=1, description="pj: width of z.")
    sites: tuple[Literal["ffn", "attention"], ...] = Field(
        ("ffn",), min_length=1, description="After which sub-layers."
    )
    insertion: Literal["serial", "parallel"] = Field(
        "serial", description="An ffn's adapter is fed by its output, or by the residual stream in front of it."
    )
    kernel_order: Literal["front", "back"] = Field("front", description="K ⊗ T, or T ⊗ K.")
    kernel_init: Literal["normal", "identity"] = Field(
        "normal", description="identity: template j is the j-th block on the diagonal."
    )
    activation: Activation = Field("gelu_tanh", description="φ.")
    norm_before: bool = Field(False, description="A generated LayerNorm before an adapter.")
    norm_after: bool = Field(False, description="A generated LayerNorm after an adapter, before it is added.")
    output_norms: bool = Field(True, description="A norm of each task behind each stage, where decoders read by task.")
    layers: Layers = layers_field()
    stack: str | None = stack_field()

    # ---- what sits where

    def deltas_on(self, anatomy: Anatomy, model: nn.Module) -> Iterator[Place]:
        yield from self.deltas(anatomy)
        own = getattr(model, "tasks", None)  # of a model that has a decoder for each
        if self.output_norms and isinstance(own, tuple):
            if unknown := [task for task in self.tasks if task not in own]:
                raise ConfigError(f"Polyhistor.tasks: {unknown[0]!r} is none of the model's tasks: {', '.join(own)}")
            yield from self.norms(anatomy.stack(self.stack))

    def deltas(self, anatomy: Anatomy) -> Iterator[Place]:
        for name, (site, bottleneck) in self.places(anatomy).items():
            delta: HiddenDelta
            if self.variant == "adapters":
                delta = TaskBottleneck(site.in_features, bottleneck, self, "multiple", nn.Linear, nn.Linear)
            else:
                delta = Written(self, name)
            if self.insertion == "serial" or site.role == "attention":  # whose windows no residual stream fits
                yield Place(site.at("output"), delta)
            else:
                yield Place(self.joins(anatomy, site), delta, read=anatomy.residual(site))

    def places(self, anatomy: Anatomy) -> dict[str, tuple[Site, int]]:
        """Sub-layers by name, and the bottleneck of each adapter.

        Raises:
            AttachError: ρ does not divide a width.
        """
        sites = [site for role in dict.fromkeys(self.sites) for site in anatomy.sites([role], self.layers, self.stack)]
        for site in sites:
            if site.out_features % self.reduction_factor or site.in_features != site.out_features:
                raise AttachError(
                    f"polyhistor: {site.key} is {site.out_features} wide, which reduction_factor = {self.reduction_factor} does not divide"
                )
        return {site.key.replace(".", "_"): (site, site.out_features // self.reduction_factor) for site in sites}

    def joins(self, anatomy: Anatomy, site: Site) -> Site:
        """Where what runs beside a sub-layer is added: behind stochastic depth, where the sub-layer ends the block."""
        block = anatomy.stack(site.stack).blocks[site.depth]
        if anatomy.closing_norm(site) is None and block.sublayers[-1].path == site.path:
            return next(s for s in block.sites if s.role == "block").at("output")
        return site.at("output")

    def norms(self, stack: Stack) -> Iterator[Place]:
        """A task's norms: of what follows a stage (patch merging, if there is one), and of the last block's output."""
        by_stage, last = stages(stack), stack.blocks[-1]
        begins = {after[0].depth: before[-1].depth for before, after in pairwise(by_stage)}
        for block in stack.blocks:
            ends = {"input": begins.get(block.depth), "output": block.depth if block is last else None}
            if depths := {side: depth for side, depth in ends.items() if depth is not None}:
                site = next(site for site in block.sites if site.role == "block")
                yield Place(site, OutputNorm(self.tasks, block.hidden_size, depths))

    def shared(self, anatomy: Anatomy) -> nn.Module | None:
        if self.variant == "adapters":
            return None
        places = self.places(anatomy)
        return Lite(self, places) if self.variant == "lite" else Full(self, places)

    def bind(self, deltas: Mapping[str, Delta], shared: nn.Module | None) -> None:
        for delta in deltas.values():
            if isinstance(delta, Written) and isinstance(shared, Writers):
                delta.source = (shared,)  # in a tuple, so that it is not registered once more

    def rank_of(self, out_size: int, in_size: int) -> int:
        """k of an (o, i) matrix."""
        least = min(out_size, in_size)
        rank = self.rank if self.rank_ratio is None else max(1, int(least / self.rank_ratio))
        if rank > least:
            warnings.warn(f"polyhistor: rank = {rank} is above {least}, the rank of a whole matrix", stacklevel=2)
        return rank


class OutputNorm(AroundDelta):
    """A norm of each task on what its decoder reads of a stage; the backbone goes on as it was.

    Args:
        size: width. depths: of the block after which a stage ends, at the input or the output of that at which this sits.
    """

    def __init__(self, tasks: tuple[str, ...], size: int, depths: Mapping[str, int]) -> None:
        super().__init__()
        self.tasks, self.depths = tasks, depths
        self.norms = nn.ModuleDict(
            {side: nn.ModuleDict({task: nn.LayerNorm(size) for task in tasks}) for side in depths}
        )

    def enter(self, h: Tensor) -> Tensor:
        self.publish("input", h)
        return h

    def leave(self, y: Tensor, h: Tensor) -> Tensor:
        self.publish("output", y)
        return y

    def publish(self, side: str, h: Tensor) -> None:
        task = asked(self.host, self.tasks)
        if side in self.depths and isinstance(task, str):
            self.host.streams.publish(self.depths[side], {task: self.of(side, task)(h)})

    def of(self, side: str, task: str) -> nn.LayerNorm:
        return self.norms[side][task]  # type: ignore[index]

    def of_task(self, task: str) -> dict[str, Tensor]:
        return {
            f"norms.{side}.{task}.{name}": value
            for side in self.depths
            for name, value in self.of(side, task).state_dict().items()
        }


# ------------------------------------------------------------------------------------------------------------------------ one task


def materialise(tuned: Adaptation, task: str) -> Adaptation:
    """Leave one task's ordinary adapters, IN PLACE: no hypernetwork at inference, and a file that holds one task alone.

    Returns:
        The new handle, of the same name. Copy the model first to keep the tasks together.

    Raises:
        ConfigError: none of the methods has this task.
        AttachError: it is merged.
    """
    chosen, fields = owners(tuned, task, Polyhistor), {"variant": "adapters", "tasks": (task,)}
    methods = [m.model_copy(update=fields) if i in chosen else m for i, m in enumerate(tuned.methods)]
    return refitted(tuned, methods, alone(tuned, task, chosen))
