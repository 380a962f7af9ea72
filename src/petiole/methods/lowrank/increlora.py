"""IncreLoRA: ranks that grow where the change matters most.  Zhang et al. 2023, arXiv 2308.12043.

    W x + b  <-  W x + b + s · B diag(E) A x        A (R, in), E (R,), B (out, R), s = alpha / (R + 1e-5)

Every site starts at rank R = `init_rank`. With G the loss's gradient with respect to ΔW, in every step, until the budget is used up,

    S = Σ_ij |ΔW_ij G_ij| / √(out in)        I <- β₁ I + (1 - β₁) S        U <- β₂ U + (1 - β₂) |S - I|        score = I U

and at every `update_interval`-th step after `warmup_steps` the `top_k` sites of the highest scores get `rank_increment` ranks more.

Reserve  each site holds the components that it would get next: in training they act with E = 1e-5, frozen, while A and B learn ahead. When a
         site is chosen, its reserve counts, its E trains, and a new reserve is drawn. When the budget is used up, reserves are dropped.
Loss     + λ · mean over sites of (‖A Aᵀ - I‖_F + ‖BᵀB - I‖_F) / 2, over all components, reserves included.
Sits     on the named linears, all of them by default.
Trains   A, B and E: R (in + out + 1) numbers per site, and g (in + out) of its reserve of g components.
Starts   at E = 0: the bare backbone, bit for bit; in training the reserves change it by O(1e-5).
Merges   exactly, without reserves: ΔW = s · B diag(E) A.

The scale falls when R grows, so the output jumps there; that is the method's own. A step in which S is taken costs one product more of the
size of the site's weight, which `score_interval` spreads. G is made a few rows at a time, and summed over micro-batches before its absolute
value is taken; processes average S.

Relations: AdaLoRA starts at a large rank and prunes. TriAdaptLoRA grows by a score that needs no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from petiole.anatomy import Anatomy, Site
from petiole.errors import AttachError, TrainingError
from petiole.factored import Parts
from petiole.method import Base, Moment, Place
from petiole.methods.lowrank import growth
from petiole.methods.lowrank.factors import multiplied
from petiole.methods.lowrank.growth import Budgeted, Growing, Importance, growing, joined, seen
from petiole.methods.lowrank.origin import linears

_RESERVE = 1e-5  # E of a component that does not count yet
_STD = 0.02  # of A and B


class IncreLoRA(Budgeted):
    """LoRA that starts at rank 1 and adds ranks where the change of the weight matters most."""

    slug: ClassVar[str] = "increlora"
    title: ClassVar[str] = "IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning"
    paper: ClassVar[str] = "2308.12043"
    learning_rates: ClassVar[tuple[float, float]] = (3e-4, 3e-2)

    target_rank: int = Field(2, ge=1, description="Average rank at the end; with the number of sites, the budget.")
    rank_increment: int | None = Field(
        None, ge=1, description="Ranks g that a site gets at a time; half of target_rank, at least 1, if None."
    )
    top_k: int = Field(3, ge=1, description="Sites that grow in one round.")
    warmup_steps: int = Field(100, ge=0, description="Steps before the first round, and of each restarted warm-up.")
    update_interval: int = Field(100, ge=1, description="Steps from one round to the next.")
    score_interval: int = Field(1, ge=1, description="Take S at every so many steps; more are cheaper.")
    ema_decay: float = Field(0.85, gt=0, lt=1, description="β₁, of the mean I of S.")
    uncertainty_decay: float = Field(0.85, gt=0, lt=1, description="β₂, of the mean U of |S - I|.")
    alpha: float | None = Field(32.0, gt=0, description="Numerator of the scale alpha / R; init_rank if None.")
    advance_learn: bool = Field(True, description="Let the A and B of reserves learn before they count.")
    restart_warmup: bool = Field(
        True, description="New ranks have a warm-up of their own, then fall to 0; off: the run's schedule."
    )
    roles: tuple[str, ...] | None = Field(
        None, min_length=1, description="Linears to adapt, by role; all of the usual ones if None."
    )

    @property
    def increment(self) -> int:
        """g"""
        return self.rank_increment or max(1, self.target_rank // 2)

    def room(self, total: int, count: int) -> int:
        """How many increments the budget of `count` sites holds beside the `total` ranks that there are."""
        return self.left(total, count) // self.increment

    def deltas(self, anatomy: Anatomy) -> Iterator[Place]:
        sites = linears(self.slug, anatomy, self.roles, self.layers)
        grows = self.room(self.init_rank * len(sites), len(sites)) > 0
        for site in sites:
            yield Place(site, Components(site, self, grows))

    # ---- over time

    def before_step(self, moment: Moment) -> None:
        deltas = [delta for delta in growing(moment) if delta.reserve]
        if deltas and moment.step == 0:
            self.foresee(moment, len(deltas))
        for delta in deltas:
            delta.importance.clear()
            delta.watched = moment.step % self.score_interval == 0

    def foresee(self, moment: Moment, count: int) -> None:
        """Say before training what will not work out in it."""
        first = (self.warmup_steps // self.update_interval + 1) * self.update_interval
        rounds = math.ceil(self.room(growth.grown(growing(moment)), count) / min(self.top_k, count))
        growth.warn_if_short(self.slug, moment, first + (rounds - 1) * self.update_interval, rounds)
        if self.restart_warmup and self.warmup_steps:
            growth.check_restart(self.slug, moment, first)

    @torch.no_grad()
    def before_optimizer_step(self, moment: Moment) -> None:
        """Scores, and at some steps growth.

        Raises:
            TrainingError: no site saw a gradient since the last step.
        """
        deltas = growing(moment)
        if not any(delta.reserve for delta in deltas):
            return
        if moment.step % self.score_interval == 0:
            self.observe(moment, deltas)
        due = moment.step > self.warmup_steps and moment.step % self.update_interval == 0
        if due and "importance" in moment.state:
            self.grow(moment, deltas)

    def observe(self, moment: Moment, deltas: list[Components]) -> None:
        """S of every site, into the means I and U. Left out where it is not finite, as gradients may be in half precision."""
        if not any(delta.importance.calls for delta in deltas):
            raise TrainingError(
                f"{self.slug}: no gradient since the last step; before_step comes before the forward pass,\n"
                "before_optimizer_step once after backward"
            )
        home = deltas[0].A[0].device
        found = torch.stack([delta.importance.take(delta).to(home) for delta in deltas])
        scores = moment.averaged(found).cpu() / growth.loss_scale(moment)
        for delta in deltas:
            delta.watched = False
        if bool(torch.isfinite(scores).all()):
            I, U = (moment.state.get(name, torch.zeros(len(deltas))) for name in ("importance", "uncertainty"))
            I, U = smoothed(scores, I, U, self.ema_decay, self.uncertainty_decay)
            moment.state.update(importance=I, uncertainty=U)

    def grow(self, moment: Moment, deltas: list[Components]) -> None:
        """One round."""
        room = self.room(growth.grown(deltas), len(deltas))
        scores = moment.state["importance"] * moment.state["uncertainty"]
        picked = [deltas[i] for i in growth.chosen(scores.tolist(), self.top_k, room)]
        last = room == len(picked)
        if last:  # nobody grows any more
            gone = [p for delta in deltas if delta not in picked for p in delta.close()]
            moment.drop_parameters([p for p in gone if p.requires_grad])
        new = [parameter for delta in picked for parameter in delta.adopt(last)]
        moment.add_parameters(
            new, warmup_steps=self.warmup_steps if self.restart_warmup and self.warmup_steps else None
        )


def smoothed(
    scores: Tensor, importance: Tensor, uncertainty: Tensor, beta1: float, beta2: float
) -> tuple[Tensor, Tensor]:
    """S, I and U of all sites -> the new I and U."""
    importance = beta1 * importance + (1 - beta1) * scores
    return importance, beta2 * uncertainty + (1 - beta2) * (scores - importance).abs()


class Components(Growing):
    """ΔW = alpha / (R + 1e-5) · B diag(E) A; the last block is the reserve, as long as there may be growth.

    Args:
        site: gives the sizes. method: gives ranks and scale. grows: whether there is a reserve.
    """

    kinds: ClassVar[tuple[str, ...]] = ("A", "E", "B")
    A: nn.ParameterList  # of (g, in)
    E: nn.ParameterList  # of (g,)
    B: nn.ParameterList  # of (out, g)

    def __init__(self, site: Site, method: IncreLoRA, grows: bool) -> None:
        self.method, self.reserve, self.grows = method, grows, grows
        self.importance, self.watched = Importance(), False
        super().__init__(site, [method.init_rank] + [method.increment] * grows, method.dropout)

    def build(self, sizes: Any) -> None:
        super().build(sizes)
        if self.reserve:
            self.hold_back()

    def values(self, size: int, before: int, generator: torch.Generator) -> dict[str, Tensor]:
        A = torch.empty(size, self.site.in_features).normal_(0, _STD, generator=generator)
        B = torch.empty(self.site.out_features, size).normal_(0, _STD, generator=generator)
        return {"A": A, "E": torch.full((size,), self.reserve_gain if before else 0.0), "B": B}

    @property
    def reserve_gain(self) -> float:
        return _RESERVE if self.method.advance_learn else 0.0

    @property
    def rank(self) -> int:
        """R, without the reserve."""
        return sum(self.sizes[: len(self.sizes) - self.reserve])

    # ---- growth

    def hold_back(self) -> None:
        """The last block is the reserve."""
        self.E[-1].requires_grad_(False)
        self.A[-1].requires_grad_(self.method.advance_learn)
        self.B[-1].requires_grad_(self.method.advance_learn)

    def adopt(self, last: bool) -> list[nn.Parameter]:
        """Let the reserve count, and draw a new one unless it was the last; what trains from now on that did not before."""
        kinds = ("E",) if self.method.advance_learn else self.kinds
        new = [getattr(self, kind)[-1].requires_grad_(True) for kind in kinds]
        self.reserve = not last
        if not last:
            made = self.append(self.method.increment)
            self.hold_back()
            new += [p for p in made.values() if p.requires_grad]
        return new

    def close(self) -> list[nn.Parameter]:
        """Drop the reserve."""
        self.reserve = False
        return self.drop_last()

    # ---- the change

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of all components."""
        return joined(self.A), joined(self.B, 1)

    def parts(self) -> Parts:
        """In training with the reserve, where that learns."""
        acts = not self.reserve or (self.training and self.method.advance_learn)
        return self.product(len(self.sizes) - (not acts))

    def product(self, count: int) -> Parts:
        """Of the first `count` blocks."""
        A, E, B = (list(blocks)[:count] for blocks in (self.A, self.E, self.B))
        return joined(A), joined(B, 1), self.method.scale(self.rank), None, joined(E)

    def factored(self) -> Parts | None:
        return None if self.watches() else super().factored()

    def watches(self) -> bool:
        return self.watched and self.training and torch.is_grad_enabled()

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if not self.watches():
            return super().forward(x, base)
        x = x if self.dropout is None else self.dropout(x)
        return seen(self.applied(x), x, self.importance, self)

    def weight(self, base: Tensor) -> Tensor:
        """ΔW (out, in). Merging asks for no gradient, and gets no reserve."""
        if not torch.is_grad_enabled():
            return multiplied(self.product(len(self.sizes) - self.reserve), base.dtype)
        change = super().weight(base)
        if self.watches():  # the core puts W + ΔW in the weight's place
            change.register_hook(self.importance.saw_dense)
        return change

    # ---- files

    def structure(self) -> dict[str, Any]:
        return {**super().structure(), "reserve": self.reserve}

    def restructure(self, structure: Mapping[str, Any]) -> None:
        reserve, blocks = structure.get("reserve", self.grows), structure.get("blocks", list(self.initial))
        if type(reserve) is not bool or len(blocks) <= reserve:
            raise AttachError(f"{self.site.key} has no structure {structure}")
        self.reserve = reserve
        super().restructure(structure)

    def folded_state(self) -> dict[str, Tensor]:
        """Without the reserve."""
        state = self.state_dict()
        if self.reserve:
            for kind in self.kinds:
                del state[f"{kind}.{len(self.sizes) - 1}"]
        return state

    def unfold(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Where the file has none, the reserve is drawn anew."""
        last = len(self.sizes) - 1
        if not self.reserve or any(f"{kind}.{last}" in state for kind in self.kinds):
            return state
        fresh = self.drawn(last, self.sizes[last])
        return {**state, **{f"{kind}.{last}": value.to(self.A[0].dtype) for kind, value in fresh.items()}}
