"""Weight changes whose rank grows in training: components in blocks, whose turn it is to grow, what keeps components apart, the budget."""

from __future__ import annotations

import hashlib
import math
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from petiole.anatomy import Site
from petiole.errors import AttachError, TrainingError
from petiole.method import Base, Delta, Layers, Method, Moment, layers_field
from petiole.methods.lowrank.factors import Product


class Growing(Product):
    """ΔW = scale · B C A, of components that come in blocks; blocks can be added, and those that are there keep their values and their place.

    Block p of a size has one tensor of each of `kinds`, `self.A[p]` and so on, drawn from the site's seed and p alone: the same in a run
    that was never cut, in one that is resumed, and on every process.

    Args:
        site: gives the sizes.
        sizes: of the blocks at the start.
        dropout: on the input x, in training.
    """

    kinds: ClassVar[tuple[str, ...]] = ("A", "B")

    def __init__(self, site: Site, sizes: Sequence[int], dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.site, self.seed, self.initial = site, 0, tuple(sizes)
        self.sizes: list[int] = []
        self.build(sizes)

    @property
    def rank(self) -> int:
        """R, the components that count."""
        return sum(self.sizes)

    @abstractmethod
    def values(self, size: int, before: int, generator: torch.Generator) -> dict[str, Tensor]:
        """What a block of `size` components starts from, on the CPU: one tensor of each kind, `before` components being there already."""

    # ---- blocks

    def build(self, sizes: Sequence[int]) -> None:
        """Have blocks of these sizes and no others."""
        like = next(self.parameters(), None)
        self.sizes = []
        for kind in self.kinds:
            setattr(self, kind, nn.ParameterList())
        for size in sizes:
            self.append(size, like)

    def append(self, size: int, like: Tensor | None = None) -> dict[str, nn.Parameter]:
        """One more block, of the others' dtype and on their device."""
        like = next(self.parameters(), like)
        kind = torch.get_default_dtype() if like is None else like.dtype
        device = "cpu" if like is None else like.device
        made = {name: nn.Parameter(value.to(device, kind)) for name, value in self.drawn(len(self.sizes), size).items()}
        for name, parameter in made.items():
            getattr(self, name).append(parameter)
        self.sizes.append(size)
        return made

    def drop_last(self) -> list[nn.Parameter]:
        """Take the last block out."""
        self.sizes.pop()
        gone = []
        for kind in self.kinds:
            blocks = list(getattr(self, kind))
            gone.append(blocks.pop())
            setattr(self, kind, nn.ParameterList(blocks))
        return gone

    def drawn(self, number: int, size: int) -> dict[str, Tensor]:
        """The values from which block `number` starts, if it has this size."""
        mixed = hashlib.sha256(f"{self.seed}:{number}".encode()).digest()[:8]
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(mixed, "big") >> 1)
        with torch.device("cpu"), torch.no_grad():
            return self.values(size, sum(self.sizes[:number]), generator)

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        self.seed = int(torch.randint(1 << 62, (), generator=generator))
        for number, size in enumerate(self.sizes):
            for name, value in self.drawn(number, size).items():
                getattr(self, name)[number].copy_(value)

    def bias(self, base: Tensor | None) -> Tensor | None:
        return None

    # ---- files

    def structure(self) -> dict[str, Any]:
        """The sizes of the blocks, and what later ones are drawn from."""
        return {"blocks": list(self.sizes), "seed": self.seed}

    def restructure(self, structure: Mapping[str, Any]) -> None:
        blocks, seed = structure.get("blocks", list(self.initial)), structure.get("seed", self.seed)
        sound = isinstance(blocks, list) and blocks and all(type(size) is int and size > 0 for size in blocks)
        if (
            not sound
            or type(seed) is not int
            or sum(blocks) > MOST * min(self.site.in_features, self.site.out_features)
        ):
            raise AttachError(f"{self.site.key} has no structure {structure}")
        self.seed = seed
        self.build(blocks)


MOST = 64  # times the full rank: a file must not make memory run out


def joined(blocks: Iterable[Tensor], dim: int = 0) -> Tensor:
    """Blocks side by side."""
    parts = list(blocks)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def growing(moment: Moment) -> list[Any]:
    """The deltas that grow, in the order of sites."""
    return [delta for delta in moment.deltas.values() if isinstance(delta, Growing)]


# ---------------------------------------------------------------------------------------------------------------------- budget


class Budgeted(Method):
    """What methods whose ranks grow have in common: a budget, the scale, what keeps components apart."""

    saves: ClassVar[str] = "optimiser state and checkpoint; ranks go where they count; free at inference once merged"
    merges: ClassVar[bool] = True
    identity_at_start: ClassVar[bool] = True
    size: ClassVar[str] = "target_rank"

    target_rank: int = Field(ge=1, description="Average rank at the end; with the number of sites, the budget.")
    target_total_rank: int | None = Field(None, ge=1, description="The budget: ranks of all sites together at the end.")
    init_rank: int = Field(1, ge=1, description="Rank of each site at the start.")
    alpha: float | None = Field(gt=0, description="Numerator of the scale alpha / R; init_rank if None.")
    orthogonality_weight: float = Field(0.1, ge=0, description="λ, of the loss term that keeps components apart.")
    dropout: float = Field(0.0, ge=0, lt=1, description="On the input of A, in training.")
    layers: Layers = layers_field()

    @model_validator(mode="after")
    def _grows(self) -> Self:
        if self.target_total_rank is None and self.target_rank < self.init_rank:
            raise ValueError(f"target_rank = {self.target_rank} is below init_rank = {self.init_rank}: ranks only grow")
        return self

    def left(self, total: int, count: int) -> int:
        """The ranks that the budget of `count` sites holds beside the `total` that there are.

        Raises:
            AttachError: the budget is below what there is at the start.
        """
        budget = self.target_rank * count if self.target_total_rank is None else self.target_total_rank
        if budget < self.init_rank * count:
            raise AttachError(
                f"{self.slug}: target_total_rank = {budget}, but {count} sites start at rank {self.init_rank}, {self.init_rank * count} together\n"
                "raise it, or name fewer sites (roles, layers)"
            )
        return budget - total

    def scale(self, rank: int) -> float:
        """s at rank R"""
        return (self.init_rank if self.alpha is None else self.alpha) / (rank + 1e-5)

    def loss(self, moment: Moment) -> Tensor | None:
        """λ · mean over sites of (‖A Aᵀ - I‖_F + ‖BᵀB - I‖_F) / 2"""
        if not self.orthogonality_weight:
            return None
        return self.orthogonality_weight * orthogonality([delta.factors() for delta in growing(moment)])


def chosen(scores: Sequence[float], count: int, room: int) -> list[int]:
    """Which sites grow: those with a score of at least the `count`-th largest, ties with it included, as far as there is room.

    Args:
        scores: of each site. room: how many increments the budget still holds.

    Returns:
        Numbers of sites, the highest score first, equal ones in the order of sites.
    """
    count = min(count, len(scores))
    if count < 1 or room < 1:
        return []
    threshold = sorted(scores, reverse=True)[count - 1]
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return [i for i in order if scores[i] >= threshold][:room]


def check_restart(slug: str, moment: Moment, first: int) -> None:
    """A schedule of its own for each group needs a known end, and one function for each group: said before training, not after hours.

    Args:
        first: the step of the first growth.

    Raises:
        TrainingError: there will be growth, and no way to give it a schedule of its own.
    """
    if moment.training is None or (moment.total_steps and first >= moment.total_steps):
        return
    scheduler = getattr(moment.training, "scheduler", None)
    scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate's wrapper
    if not moment.total_steps or not hasattr(scheduler, "lr_lambdas"):
        missing = "the number of steps (total_steps=)" if not moment.total_steps else "such a schedule (LambdaLR)"
        raise TrainingError(
            f"{slug}: restart_warmup gives new ranks a schedule of their own, but Events has not {missing}\n"
            "give it, take one of Transformers' schedules, or restart_warmup=False"
        )


def warn_if_short(slug: str, moment: Moment, last: int, rounds: int) -> None:
    """Say so if the budget can't be used up in this run.

    Args:
        last: the step of the last growth that is needed. rounds: how many there are.
    """
    if moment.total_steps and rounds and last >= moment.total_steps:
        warnings.warn(
            f"{slug}: the rank budget takes {rounds} rounds of growth, the last in step {last}; this run has {moment.total_steps} steps\n"
            "some of it will stay unused: raise top_k or rank_increment, or lower warmup_steps or update_interval",
            stacklevel=2,
        )


def loss_scale(moment: Moment) -> float:
    """By what the loss was multiplied against underflow in half precision, where the optimiser that steps knows it."""
    scaler = getattr(moment.optimizer, "scaler", None)
    return float(scaler.get_scale()) if scaler is not None else 1.0


# ------------------------------------------------------------------------------------------------------------- orthogonality


def orthogonality(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """(A (r, in), B (out, r)) of each site -> the mean over sites of (‖A Aᵀ - I‖_F + ‖BᵀB - I‖_F) / 2, in float32.

    Only r x r matrices are formed; factors of equal size are taken together.
    """
    alike: dict[tuple[torch.Size, torch.device], list[Tensor]] = {}
    for A, B in pairs:
        for rows in (A, B.T):
            alike.setdefault((rows.shape, rows.device), []).append(rows)
    home, sums = pairs[0][0].device, []
    with torch.autocast(home.type, enabled=False):
        for (shape, device), group in alike.items():
            stacked = torch.stack(group).float()
            gram = stacked @ stacked.mT - torch.eye(shape[0], device=device)
            sums.append(torch.linalg.vector_norm(gram, dim=(1, 2)).sum().to(home))
    return torch.stack(sums).sum() / (2 * len(pairs))


# -------------------------------------------------------------------------------------- the importance of a change of a weight


class Importance:
    """S = Σ_ij |ΔW_ij G_ij| / √(out in) of one site in one optimiser step, G = Σ gᵀx (out, in) being the loss's gradient with respect to ΔW.

    G is summed over all calls in the step (micro-batches, shared layers) before its absolute value is taken, and never formed: x and g are
    put by until the last call that is expected, then G and ΔW are made a few rows at a time. How many calls there are shows in the first
    step, which counts for nothing where there is more than one.
    """

    def __init__(self) -> None:
        self.expected, self.calls = 1, 0
        self.held: list[tuple[Tensor, Tensor]] = []  # x (n, in) and g (n, out) of each call
        self.dense: Tensor | None = None  # G where the core composes the weight, and so forms it anyway
        self.score: Tensor | None = None

    def clear(self) -> None:
        """Before a step."""
        self.calls, self.held, self.dense, self.score = 0, [], None, None

    def saw(self, delta: Growing, x: Tensor, g: Tensor) -> None:
        """One call's input and the gradient of its output."""
        self.calls += 1
        self.held.append((x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])))
        if self.calls >= self.expected:
            self.score = (
                self.of(delta) if self.calls == self.expected else self.held[0][1].new_full((), math.nan).float()
            )
            self.held = []

    def saw_dense(self, G: Tensor) -> None:
        self.calls += 1
        self.dense = G.detach() if self.dense is None else self.dense + G

    def of(self, delta: Growing) -> Tensor:
        """S from what is held."""
        A, B, scale, _, *core = delta.parts()
        B = B.detach().float() * scale
        B = B if not core else B * core[0].detach().float() if core[0].ndim == 1 else B @ core[0].detach().float()
        A = A.detach().float()
        (out, _), (_, inside) = B.shape, A.shape
        rows = max(1, ROOM["cpu" if A.device.type == "cpu" else "other"] // inside)
        total = A.new_zeros(())
        with torch.no_grad(), torch.autocast(A.device.type, enabled=False):
            for start in range(0, out, rows):
                some = slice(start, start + rows)
                G = None if self.dense is None else self.dense[some].float()
                for x, g in self.held:
                    part = (g[:, some].T @ x.to(g.dtype)).float()
                    G = part if G is None else G + part
                if G is not None:
                    total += (G * (B[some] @ A)).abs_().sum()
        return total / math.sqrt(out * inside)

    def take(self, delta: Growing) -> Tensor:
        """S of this step; 0 where the site was not called, not a number where there were more calls than ever before."""
        if self.score is None:
            self.score = self.of(delta)
        score, self.expected = self.score, max(self.expected, self.calls)
        if self.dense is not None:
            self.expected = 1
        self.clear()
        return score


ROOM = {"cpu": 1 << 17, "other": 1 << 22}  # numbers in a tile of G


class Seen(torch.autograd.Function):
    """Δy -> Δy; on the way back, tells an importance what came in and what the gradient of what went out is."""

    @staticmethod
    def forward(ctx: Any, change: Tensor, x: Tensor, importance: Importance, delta: Growing) -> Tensor:
        ctx.save_for_backward(x)
        ctx.importance, ctx.delta = importance, delta
        return change.view_as(change)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.importance.saw(ctx.delta, ctx.saved_tensors[0].detach(), gradient.detach())
        return gradient, None, None, None


def seen(change: Tensor, x: Tensor, importance: Importance, delta: Growing) -> Tensor:
    """Δy, watched: see `Importance`."""
    result: Tensor = Seen.apply(change, x, importance, delta)
    return result


def grown(deltas: Iterable[Delta]) -> int:
    """The ranks of all sites together."""
    return sum(delta.rank for delta in deltas if isinstance(delta, Growing))
