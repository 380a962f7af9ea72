"""DAS: the bandit finds the blocks that a task can do without; what is left is as good, and faster."""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from common import LENGTH, VOCABULARY, Encoder, Report, options, shown, spread
from torch import Tensor, nn

import petiole as pt
from petiole.methods.execution import bandit
from petiole.methods.execution.das import DAS
from petiole.methods.execution.search import search
from petiole.training import parameter_groups

DEPTH, SIZE, SKIP, SUBNETS, ROUNDS, EVERY = 8, 96, 2, 3, 60, 5
METHOD = DAS(
    num_skip=SKIP,
    bottleneck=16,
    skip_bottleneck=32,
    search={"epochs": 3, "warmup": 1, "every": EVERY, "samples": SUBNETS},
)
RATE, PRETRAINING, FINAL, BATCH = 3e-3, 450, 80, 32


def main() -> None:
    given = options(__doc__ or "", seeds=5)
    report = Report(
        "das",
        "DAS",
        f"Uniform tokens of {VOCABULARY} kinds. Of a pre-norm encoder ({DEPTH} blocks of width {SIZE}) block after block learns, "
        f"{PRETRAINING} steps, to say of each token whether the one 1, 2, … 8 places ahead is of the upper half, around the end. Then the output "
        f"projections of two blocks, drawn with the seed, are scaled by 0.02, and the task asks for the six others, with a new head. The "
        f"search skips {SKIP} of {DEPTH}, compares {SUBNETS} subnets every {EVERY} steps on 256 held-out rows, {ROUNDS} rounds after half as "
        f"many steps of warm-up, AdamW at {RATE}. What is chosen, the pair with the smallest preferences and a random pair are trained anew for "
        f"{FINAL} steps. Right is the share of answers on 512 rows; time that of a forward pass of 256 rows, as a share of the "
        "one with all blocks and their adapters, and of the bare model's.",
        (
            "seed",
            "redundant",
            "chosen",
            "by negated rewards",
            "chosen: right",
            "worst: right",
            "random: right",
            "time",
            "time / bare",
        ),
    )
    kept: dict[str, list[float]] = {"chosen": [], "worst": [], "random": [], "time": [], "bare": []}
    hits, wrong = 0, 0
    for seed in range(given.seeds):
        row = run(seed)
        hits += row["chosen"] == row["redundant"]
        wrong += not set(row["negated"]) & set(row["redundant"])
        for name, values in kept.items():
            values.append(row.get(f"{name} right", row.get(name)))
        report.row(seed, *(" ".join(map(str, row[k])) for k in ("redundant", "chosen", "negated")),
                   *(kept[k][-1] for k in kept))  # fmt: skip
    exact = sum(bandit_alone(seed) for seed in range(20))
    report.require(f"without a network, losses of 0.3 + the importance of what is skipped, 20 rounds find both modules of importance 0.02 "
                   f"among six of 0.3 to 1 in 20 of 20 seeds: {exact}", exact == 20)  # fmt: skip
    report.require(
        f"the search finds both redundant blocks in 4 of 5 seeds or more: {hits} of {given.seeds}",
        hits >= 0.8 * given.seeds,
    )
    report.require(
        f"with rewards negated neither is chosen, in 4 of 5 seeds or more: {wrong} of {given.seeds}",
        wrong >= 0.8 * given.seeds,
    )
    ahead = [a - b for a, b in zip(kept["chosen"], kept["worst"], strict=True)]
    report.require(
        f"5 points more right than the pair of the smallest preferences: {spread(ahead)}", min(ahead) >= 0.05
    )
    means = [statistics.mean(kept[k]) for k in ("chosen", "random")]
    report.require(
        f"on average as much right as random pairs or more: {shown(means[0])} and {shown(means[1])}",
        means[0] >= means[1],
    )
    report.require(
        f"a forward pass takes 15 % less time than with all blocks: {spread(kept['time'])}", max(kept["time"]) <= 0.85
    )
    report.finish(given, kept)


# --------------------------------------------------------------------------------------------------------------- without a network


def bandit_alone(seed: int) -> bool:
    """Whether 20 rounds find the two redundant of eight modules."""
    generator = torch.Generator().manual_seed(seed)
    importance = 0.3 + 0.7 * torch.rand(DEPTH, generator=generator, dtype=torch.float64)
    redundant = sorted(torch.randperm(DEPTH, generator=generator)[:SKIP].tolist())
    importance[redundant] = 0.02
    q = torch.zeros(DEPTH, dtype=torch.float64)
    for _ in range(20):
        subnets = bandit.draw_distinct(q, SKIP, SUBNETS, generator)
        losses = torch.stack([0.3 + importance[list(subnet)].sum() for subnet in subnets])
        q = bandit.updated(q, subnets, bandit.rewards(losses), 1.0)
    return list(bandit.chosen(q, SKIP)) == redundant


# ------------------------------------------------------------------------------------------------------------------ with a network


class Rows:
    """Batches of rows and answers, new ones in each round through them."""

    def __init__(self, count: int, rows: int, places: list[int], generator: torch.Generator) -> None:
        self.count, self.rows, self.places, self.generator = count, rows, places, generator

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.count):
            yield self.one()

    def one(self) -> tuple[Tensor, Tensor]:
        """Tokens (n, 12) -> answers (n, 12, places)"""
        tokens = torch.randint(VOCABULARY, (self.rows, LENGTH), generator=self.generator)
        return tokens, torch.stack([(tokens.roll(-s, 1) >= VOCABULARY // 2).float() for s in self.places], -1)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(model(batch[0]), batch[1])


def negated(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The same in training; where subnets are compared, the worse the better."""
    return loss(model, batch) if torch.is_grad_enabled() else -loss(model, batch)


@torch.no_grad()
def right(model: nn.Module, batch: tuple[Tensor, Tensor]) -> float:
    return float(((model(batch[0]) > 0) == (batch[1] > 0)).float().mean())


def backbone(generator: torch.Generator) -> tuple[Encoder, list[int]]:
    """An encoder each of whose blocks knows another place, and the two blocks whose knowledge is lost."""
    model = Encoder(DEPTH, size=SIZE)
    model.head = nn.Linear(SIZE, DEPTH)
    scale(model.blocks, 0.1)  # so that all of them find the tokens in what they read
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for tokens, answers in Rows(PRETRAINING, BATCH, list(range(1, DEPTH + 1)), generator):
        h = model.embedding(tokens) + model.position
        for depth, block in enumerate(model.blocks, 1):
            h = block(
                h if depth == 1 else h.detach()
            )  # so that each learns what is asked of it, and leaves the rest to others
            scores = model.head(model.norm(h))[..., :depth]
            nn.functional.binary_cross_entropy_with_logits(scores, answers[..., :depth]).backward()
        optimizer.step()
        optimizer.zero_grad()
    redundant = sorted(torch.randperm(DEPTH, generator=generator)[:SKIP].tolist())
    scale([model.blocks[depth] for depth in redundant], 0.02)
    return model.eval(), redundant


@torch.no_grad()
def scale(blocks: Iterable[nn.Module], factor: float) -> None:
    """Multiply what ends each sub-layer, in place."""
    for block in blocks:
        for parameter in (*block.self_attn.out_proj.parameters(), *block.linear2.parameters()):
            parameter.mul_(factor)


def run(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model, redundant = backbone(generator)
    places = [s for s in range(1, DEPTH + 1) if s - 1 not in redundant]
    model.head = nn.Linear(SIZE, len(places))
    train = Rows(ROUNDS * EVERY // 2, BATCH, places, generator)
    held_out, test = list(Rows(4, 256, places, generator)), Rows(1, 512, places, generator).one()
    found = search(model, METHOD, train, held_out, loss=loss, learning_rate=RATE, seed=seed)
    turned = search(model, METHOD, train, held_out, loss=negated, learning_rate=RATE, seed=seed)
    order = sorted(found.preferences, key=found.preferences.__getitem__)
    pairs = list(itertools.combinations(found.preferences, SKIP))
    pair = pairs[int(torch.randint(len(pairs), (), generator=generator))]
    kinds = {"chosen": found.skip, "worst": tuple(order[:SKIP]), "random": pair}
    accuracy = {
        f"{k} right": right(trained(model, skip, Rows(FINAL, BATCH, places, generator), seed), test)
        for k, skip in kinds.items()
    }
    return {**accuracy, "redundant": redundant, "chosen": depths(found.skip), "negated": depths(turned.skip),
            **dict(zip(("time", "bare"), shares_of_time(model, found.skip), strict=True))}  # fmt: skip


def depths(names: tuple[str, ...]) -> list[int]:
    return sorted(int(name.rpartition(".")[2]) for name in names)


def trained(model: nn.Module, skip: tuple[str, ...], rows: Rows, seed: int) -> nn.Module:
    """A copy without these blocks, from fresh adapters."""
    copied = copy.deepcopy(model)
    pt.attach(copied, METHOD.model_copy(update={"skip": skip}), seed=seed)
    optimizer = torch.optim.AdamW(parameter_groups(copied, learning_rate=RATE))
    for batch in rows:
        loss(copied.train(), batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return copied.eval()


@torch.no_grad()
def shares_of_time(model: nn.Module, skip: tuple[str, ...]) -> tuple[float, float]:
    """A forward pass of 256 rows without these blocks: its time as a share of that with all blocks adapted, and of the bare model's."""
    tokens, seconds = torch.randint(VOCABULARY, (256, LENGTH)), []
    models = [copy.deepcopy(model) for _ in range(3)]
    for each, skipped in zip(models, (skip, ()), strict=False):
        pt.attach(each, METHOD.model_copy(update={"skip": skipped}))
    torch.backends.mha.set_fastpath_enabled(False)  # one kernel for a whole block, which nothing can stand beside
    for _ in range(40):
        times = []
        for each in models:
            start = time.perf_counter()
            each.eval()(tokens)
            times.append(time.perf_counter() - start)
        seconds.append(times)
    torch.backends.mha.set_fastpath_enabled(True)
    less, adapted, bare = zip(*seconds, strict=True)
    adapted_share, bare_share = (
        statistics.median(a / b for a, b in zip(less, other, strict=True)) for other in (adapted, bare)
    )
    return adapted_share, bare_share


if __name__ == "__main__":
    main()
