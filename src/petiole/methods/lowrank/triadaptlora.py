"""TriAdaptLoRA: ranks that grow in the sites whose core grows most.  Liang et al. 2025, arXiv 2501.08008.

    W x + b  <-  W x + b + s · B (C_low + C_up) A x        A (R, in), B (out, R), C_low and C_up (R, R), s = alpha / (R + 1e-5)

Components come in blocks of sizes a₁, a₂, …, and o_p = a₁ + … + a_p. Block p has rows A_p, columns B_p and two strips of the core: L_p (a_p, o_p),
its rows of C_low with zeros to the right, and U_p (o_p, a_p), its columns of C_up with zeros below. A block that is added leaves all others
where they are: that is what the triangles are for. The diagonal blocks are in both, and both train.

At every `update_interval`-th step after `warmup_steps`, with P_n blocks at site n, T steps in all and ranks D still to be had,

    norm_n = ‖C_n‖_F / P_n        score_n = norm_n - norm_n at the last such step (at first: at the start)        μ = (step - warmup) / (T - warmup)
    m = ⌊D μ⌋ (linear), ⌊exp(μ ln D)⌋ (non-linear) or top_k (fixed), at least 1 and at most the number of sites

and every site whose score is at least the m-th largest gets `rank_increment` ranks more, as far as the budget goes.

Loss     + λ · mean over sites of (‖A Aᵀ - I‖_F + ‖BᵀB - I‖_F) / 2.
Sits     on q and v, or the linears that are named.
Trains   R (in + out) + Σ_p 2 a_p o_p numbers per site; with blocks of one, R (in + out) + R (R + 1).
Starts   at ΔW = 0, the bare backbone, bit for bit; what a block adds is 0, too, though the scale falls when R grows.
Merges   exactly: ΔW = s · B (C_low + C_up) A.

Relations: IncreLoRA grows by the gradient of ΔW, a product of the size of the weight; this score is the norm of an R x R matrix.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from petiole.anatomy import Anatomy, Site
from petiole.errors import TrainingError
from petiole.factored import Parts
from petiole.method import Moment, Place
from petiole.methods.lowrank import growth
from petiole.methods.lowrank.growth import Budgeted, Growing, growing, joined
from petiole.methods.lowrank.origin import linears

_STD = 0.02  # of what does not start at 0


class TriAdaptLoRA(Budgeted):
    """LoRA with a core of two triangles, whose rank grows where the core grows."""

    slug: ClassVar[str] = "triadaptlora"
    title: ClassVar[str] = (
        "TriAdaptLoRA: Brain-Inspired Triangular Adaptive Low-Rank Adaptation for Parameter-Efficient Fine-Tuning"
    )
    paper: ClassVar[str] = "2501.08008"

    target_rank: int = Field(8, ge=1, description="Average rank at the end; with the number of sites, the budget.")
    rank_increment: int | None = Field(
        None,
        ge=1,
        description="Ranks that a site gets at a time; half of target_rank if None, which must then be even.",
    )
    growth: Literal["linear", "non-linear", "fixed"] = Field(
        "linear", description="How many sites grow in one round: more and more, by a line or an exponential; or top_k."
    )
    top_k: int = Field(3, ge=1, description="Sites that grow in one round where growth is fixed.")
    warmup_steps: int = Field(100, ge=0, description="Steps before the first round.")
    update_interval: int = Field(100, ge=1, description="Steps from one round to the next.")
    total_steps: int | None = Field(
        None, ge=1, description="T, the steps after which the budget is spent; those of the training run if None."
    )
    alpha: float | None = Field(16.0, gt=0, description="Numerator of the scale alpha / R; init_rank if None.")
    init: Literal["default", "core_zero", "reference"] = Field(
        "default",
        description="default: A and L normal; core_zero: A and B normal; reference: A₁ alone, from which nothing is learnt.",
    )
    roles: tuple[str, ...] = Field(("q", "v"), min_length=1, description="Linears to adapt, by role.")

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.rank_increment is None and self.target_rank % 2:
            raise ValueError(
                f"target_rank = {self.target_rank} has no half: give rank_increment, or an even target_rank"
            )
        if self.total_steps is not None and self.total_steps <= self.warmup_steps:
            raise ValueError(
                f"total_steps = {self.total_steps} ends before growth begins, after {self.warmup_steps} steps"
            )
        return self

    @property
    def increment(self) -> int:
        return self.rank_increment or self.target_rank // 2

    def deltas(self, anatomy: Anatomy) -> Iterator[Place]:
        if self.init == "reference":
            warnings.warn(
                f"{self.slug}: init='reference' is a dead start, in which no gradient of the task arrives anywhere; it is for parity alone",
                stacklevel=2,
            )
        sites = linears(self.slug, anatomy, self.roles, self.layers)
        self.left(self.init_rank * len(sites), len(sites))  # refuses a budget below what there is at the start
        for site in sites:
            yield Place(site, Triangles(site, self))

    # ---- over time

    def before_step(self, moment: Moment) -> None:
        """Norms at the start, which the first scores are counted from.

        Raises:
            TrainingError: ranks are to grow, and nobody says in how many steps.
        """
        if "norms" in moment.state:
            return
        deltas = growing(moment)
        if self.left(growth.grown(deltas), len(deltas)) >= self.increment:
            total = self.total_steps or moment.total_steps
            if not total:
                raise TrainingError(
                    f"{self.slug}: growth is paced by the number of steps, which is not known\n"
                    "give Events total_steps=, or the method"
                )
            growth.warn_if_short(
                self.slug, moment, (self.warmup_steps // self.update_interval + 1) * self.update_interval, 1
            )
        moment.state["norms"] = self.norms(moment, deltas)

    @torch.no_grad()
    def before_optimizer_step(self, moment: Moment) -> None:
        """At some steps, growth.

        Raises:
            TrainingError: the run goes on after `total_steps`, with ranks still to be had.
        """
        deltas = growing(moment)
        left = self.left(growth.grown(deltas), len(deltas))
        if left < self.increment:
            return
        total = self.total_steps or moment.total_steps
        if moment.step > total:
            raise TrainingError(
                f"{self.slug}: step {moment.step} of a growth that was to end after total_steps = {total}; raise it, or leave it to the run"
            )
        if moment.step <= self.warmup_steps or moment.step % self.update_interval:
            return
        norms = self.norms(moment, deltas)
        scores = norms - moment.state.get("norms", torch.zeros_like(norms))
        moment.state["norms"] = norms
        count = self.due(left, (moment.step - self.warmup_steps) / (total - self.warmup_steps), len(deltas))
        picked = growth.chosen(scores.tolist(), count, left // self.increment)
        new = [parameter for i in picked for parameter in deltas[i].append(self.increment).values()]
        moment.add_parameters(new)

    def due(self, left: int, share: float, sites: int) -> int:
        """m: how many sites grow with D = `left` ranks to be had, μ = `share` of the time gone."""
        wanted = {
            "linear": math.floor(left * share),
            "non-linear": math.floor(math.exp(share * math.log(left))),
            "fixed": self.top_k,
        }[self.growth]
        return max(1, min(wanted, sites))

    def norms(self, moment: Moment, deltas: list[Any]) -> Tensor:
        """‖C‖_F / P of each site, on the CPU; the same on every process."""
        home = deltas[0].A[0].device
        with torch.no_grad():
            found = [torch.linalg.vector_norm(d.core().float()).to(home) / len(d.sizes) for d in deltas]
            return moment.averaged(torch.stack(found)).cpu()


class Triangles(Growing):
    """ΔW = alpha / (R + 1e-5) · B (C_low + C_up) A

    Args:
        site: gives the sizes. method: gives ranks, scale and start.
    """

    kinds: ClassVar[tuple[str, ...]] = ("A", "B", "L", "U")
    A: nn.ParameterList  # of (a, in)
    B: nn.ParameterList  # of (out, a)
    L: nn.ParameterList  # of (a, o)
    U: nn.ParameterList  # of (o, a)
    places: Tensor  # where each number of the strips L₁, U₁, L₂, … stands in the flat core

    def __init__(self, site: Site, method: TriAdaptLoRA) -> None:
        self.method = method
        super().__init__(site, [method.init_rank], method.dropout)

    def values(self, size: int, before: int, generator: torch.Generator) -> dict[str, Tensor]:
        inside, out, all_ = self.site.in_features, self.site.out_features, before + size
        shapes = {"A": (size, inside), "B": (out, size), "L": (size, all_), "U": (all_, size)}
        normal = {"default": "AL", "core_zero": "AB", "reference": "" if before else "A"}[self.method.init]
        return {
            kind: torch.empty(shape).normal_(0, _STD, generator=generator) if kind in normal else torch.zeros(shape)
            for kind, shape in shapes.items()
        }

    def append(self, size: int, like: Tensor | None = None) -> dict[str, nn.Parameter]:
        made = super().append(size, like)
        whole = torch.arange(self.rank**2, device=made["A"].device).view(self.rank, self.rank)
        ends = list(itertools.accumulate(self.sizes, initial=0))
        strips = [part for a, o in itertools.pairwise(ends) for part in (whole[a:o, :o], whole[:o, a:o])]
        self.register_buffer("places", torch.cat([strip.flatten() for strip in strips]), persistent=False)
        return made

    # ---- the change

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (R, in) and B (out, R)"""
        return joined(self.A), joined(self.B, 1)

    def core(self) -> Tensor:
        """C_low + C_up (R, R): all strips written in one go, each number to its place, those of the diagonal blocks added."""
        strips = torch.cat([strip.flatten() for pair in zip(self.L, self.U, strict=True) for strip in pair])
        return strips.new_zeros(self.rank**2).index_add(0, self.places, strips).view(self.rank, self.rank)

    def parts(self) -> Parts:
        return *self.factors(), self.method.scale(self.rank), None, self.core()
