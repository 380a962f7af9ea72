"""What the training tests share: small methods that act over time, rows, arguments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

import tiny
from petiole.anatomy import Anatomy, Site
from petiole.method import _REGISTRY, Base, Delta, HiddenDelta, Method, Moment, Place, WeightDelta

# ------------------------------------------------------------------------------------------------------------- methods for tests


class Blocks(WeightDelta):
    """ΔW = Σ_p B_p A_p over blocks of rank one, more of which can be added."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.sizes = (site.in_features, site.out_features)
        self.A, self.B = nn.ParameterList(), nn.ParameterList()
        self.append()

    def append(self, seed: int = 0) -> list[nn.Parameter]:
        inside, outside = self.sizes
        generator = torch.Generator().manual_seed(seed)
        self.A.append(nn.Parameter(torch.randn(1, inside, generator=generator)))
        self.B.append(nn.Parameter(torch.zeros(outside, 1)))
        return [self.A[-1], self.B[-1]]

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        self.A[0].normal_(generator=generator)

    def structure(self) -> dict[str, Any]:
        return {"blocks": len(self.A)} if len(self.A) > 1 else {}

    def restructure(self, structure: Mapping[str, Any]) -> None:
        self.A, self.B = nn.ParameterList(), nn.ParameterList()
        for _ in range(structure.get("blocks", 1)):
            self.append()

    def weight(self, base: Tensor) -> Tensor:
        return torch.cat(list(self.B), 1) @ torch.cat(list(self.A))

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, torch.cat(list(self.A))), torch.cat(list(self.B), 1))


class Growing(Method):
    """Adds a block at every second step until there are `most`; with `shrinks`, drops the first one after step 6."""

    slug: ClassVar[str] = "toy-growing"
    most: int = 3
    warmup_steps: int | None = None
    shrinks: bool = False
    different: bool = False  # on each process
    forgets: bool = False  # to tell the training

    def deltas(self, anatomy: Anatomy) -> Iterator[Place]:
        for site in anatomy.sites(("q", "v")):
            yield Place(site, Blocks(site))

    def before_optimizer_step(self, moment: Moment) -> None:
        moment.state["seen"] = moment.state.get("seen", 0) + 1
        if moment.step % 2 == 1 and moment.state.get("blocks", 1) < self.most:
            new = [p for delta in moment.deltas.values() for p in delta.append(moment.seed + moment.step)]
            moment.state["blocks"] = moment.state.get("blocks", 1) + 1
            if self.different and torch.distributed.get_rank():
                new = new[:2]
            if not self.forgets:
                moment.add_parameters(new, warmup_steps=self.warmup_steps)

    def after_optimizer_step(self, moment: Moment) -> None:
        if self.shrinks and moment.step == 6:
            for delta in moment.deltas.values():
                moment.drop_parameters([delta.A[0], delta.B[0]])
                delta.A, delta.B = nn.ParameterList(list(delta.A)[1:]), nn.ParameterList(list(delta.B)[1:])


class Shift(HiddenDelta):
    """Δh = b, learned eight times as fast."""

    rate_factors: ClassVar[Mapping[str, float]] = {"b": 8.0}

    def __init__(self, size: int) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.zeros(size))

    def forward(self, h: Tensor) -> Tensor:
        return self.b.expand_as(h)


class Plain(Shift):
    """Δh = b."""

    rate_factors: ClassVar[Mapping[str, float]] = {}


class Table(HiddenDelta):
    """Δh = h M, of which weight decay keeps off."""

    no_decay: ClassVar[tuple[str, ...]] = ("M",)

    def __init__(self, size: int) -> None:
        super().__init__()
        self.M = nn.Parameter(torch.full((size, size), 0.01))
        self.N = nn.Parameter(torch.full((size, size), 0.01))

    def forward(self, h: Tensor) -> Tensor:
        return h @ self.M @ self.N


class Kinds(Method):
    """Parameters of every kind: decaying or not, slow or fast."""

    slug: ClassVar[str] = "toy-kinds"

    def deltas(self, anatomy: Anatomy) -> Iterator[Place]:
        for site in anatomy.sites(("ffn",)):
            yield Place(site, Table(site.size) if site.depth else Shift(site.size))


class Pull(Method):
    """A loss term alone: weight · Σ (b - 1)² over its shifts, and a memory of every event."""

    slug: ClassVar[str] = "toy-pull"
    weight: float = 0.5

    def deltas(self, anatomy: Anatomy) -> Iterator[Place]:
        for site in anatomy.sites(("ffn",)):
            yield Place(site, Plain(site.size))

    def note(self, moment: Moment, event: str) -> None:
        moment.state.setdefault("events", []).append(f"{event} {moment.step}")

    def calibrate(self, moment: Moment, batches: Iterable[Mapping[str, Any]]) -> None:
        self.note(moment, f"calibrate on {len(list(batches))}")
        torch.rand(3)  # must not disturb the run

    def before_step(self, moment: Moment) -> None:
        self.note(moment, "before")

    def before_optimizer_step(self, moment: Moment) -> None:
        self.note(moment, "gradients")

    def after_optimizer_step(self, moment: Moment) -> None:
        self.note(moment, "moved")

    def epoch_end(self, moment: Moment) -> None:
        self.note(moment, "epoch")

    def loss(self, moment: Moment) -> Tensor:
        return self.weight * sum(((delta.b - 1) ** 2).sum() for delta in moment.deltas.values())  # type: ignore[return-value]


class Chosen(HiddenDelta):
    """A shift that only rows whose first value is positive get: in some batches, and on some processes, none."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.zeros(size))

    def forward(self, h: Tensor) -> Tensor:
        if not self.given("chosen", True):
            return torch.zeros_like(h)
        return self.b.expand_as(h)


class Idle(Method):
    """Deltas of which some get no gradient in some steps."""

    slug: ClassVar[str] = "toy-idle"
    idles: ClassVar[str] = "only chosen batches use it"

    def deltas(self, anatomy: Anatomy) -> Iterator[Place]:
        for site in anatomy.sites(("ffn",)):
            yield Place(site, Chosen(site.size) if site.depth else Plain(site.size))


for _toy in (Growing, Kinds, Pull, Idle):
    _REGISTRY.pop(_toy.slug, None)  # no other test shall find them


# ---------------------------------------------------------------------------------------------------------------------- material


def bert(**fields: Any) -> nn.Module:
    return tiny.model("bert", **fields)


def rows(count: int = 24, length: int = 7) -> list[dict[str, Tensor]]:
    """Rows of token ids whose class follows from the first token."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 48, (count, length), generator=generator)
    return [{"input_ids": row, "labels": row[0] % 3} for row in ids]


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """Eight quiet steps on the CPU, a checkpoint every second one."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_steps": 2,
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**settings, **changes})


def values(deltas: Mapping[str, Delta]) -> Tensor:
    return torch.cat([p.detach().flatten() for delta in deltas.values() for p in delta.parameters()])
