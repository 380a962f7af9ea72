"""What the proofs share: options, a backbone that is one linear, a plain training loop, and the report in docs/proofs.md.

A proof is a script that trains something small, prints a table and says of each claim whether it holds. Its section of docs/proofs.md,
between `<!-- slug -->` and `<!-- /slug -->`, is written anew by each run with at least the usual seeds.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import petiole as pt
from petiole.files import write_text
from petiole.tasks.dense import DensePrediction

PAGE = Path(__file__).resolve().parents[1] / "docs" / "proofs.md"
_HEAD = """# Proofs

What each method promises, tried on something small enough for one core. `make proofs` runs every script in `proofs/` and writes its section
here again; what does not hold stays, and is said to fail.
"""


def options(about: str, seeds: int = 3) -> argparse.Namespace:
    """`--seeds` and `--json FILE`; one thread, unless told otherwise."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=seeds, help=f"how often everything is repeated (usually {seeds})")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here, as one JSON object")
    parser.add_argument("--threads", type=int, default=1)
    found = parser.parse_args()
    if found.seeds < 1 or found.threads < 1:
        parser.error("--seeds and --threads start at 1")
    found.usual = seeds
    torch.set_num_threads(found.threads)
    return found


# --------------------------------------------------------------------------------------------------------------------- a backbone


class Linear(nn.Module):
    """x -> W x, at a place that petiole finds: the query of the first of two blocks; the second is never run."""

    def __init__(self, W: Tensor) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"query": nn.Linear(*W.T.shape, bias=False)}) for _ in range(2)])
        for block in self.blocks:
            block["query"].weight.data = W.clone()

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0]["query"](x)


def parts(model: nn.Module) -> pt.Anatomy:
    """The anatomy of `Linear`."""
    return pt.anatomy(model, stacks={"encoder": "blocks"}, roles={"q": "query"})


def attached(W: Tensor, method: pt.Method, seed: int = 0) -> tuple[Linear, pt.Adaptation]:
    """`Linear` with a method on it."""
    model = Linear(W)
    chosen = method.model_copy(update={"roles": ("q",), "layers": (0,)})
    return model, pt.attach(model, chosen, seed=seed, found=parts(model))


def fit(
    model: nn.Module, parameters: Iterable[nn.Parameter], x: Tensor, y: Tensor, learning_rate: float, steps: int
) -> float:
    """Adam on the mean square error. Returns the last loss as a share of the first."""
    optimizer = torch.optim.Adam(list(parameters), lr=learning_rate)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        return float((model(x) - y).square().mean()) / losses[0]


# ------------------------------------------------------------------------------------------------------------ a text encoder

VOCABULARY, LENGTH = 6, 12


class Encoder(nn.Module):
    """Pre-norm blocks over 12 tokens of 6 kinds, with learned positions; what stands in front of the 12 has none.

    Args:
        depth: number of blocks. kinds: of tokens in all, where some stand for tasks. size: width.
    """

    def __init__(self, depth: int, kinds: int = VOCABULARY, size: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(kinds, size)
        self.position = nn.Parameter(torch.randn(LENGTH, size))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(size, 4, 4 * size, dropout=0.0, norm_first=True, batch_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(size)
        self.head = nn.Linear(size, VOCABULARY)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None) -> Tensor:
        """Tokens (B, T) -> scores (B, 12, classes) at the last 12; what was put in front is taken away where it left the blocks."""
        h = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        h = torch.cat([h[:, :-LENGTH], h[:, -LENGTH:] + self.position], 1)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h[:, -LENGTH:]))


def learn(
    model: nn.Module, groups: Any, batches: Iterable[tuple[Tensor, Tensor]], **options: Any
) -> tuple[float, float]:
    """AdamW on cross-entropy at every token. Returns the last loss, and the median seconds of a step."""
    optimizer, seconds = torch.optim.AdamW(groups, **options), []
    model.train()
    for tokens, targets in batches:
        start = time.perf_counter()
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    model.eval()
    return float(loss.detach()), statistics.median(seconds)


@torch.no_grad()
def accuracy(model: nn.Module, tokens: Tensor, targets: Tensor) -> float:
    """Share of tokens whose class is right."""
    return float((model(tokens).argmax(-1) == targets).float().mean())


# --------------------------------------------------------------------------------- what a last state has discarded, for side networks


def chains(count: int, generator: torch.Generator) -> Tensor:
    """Tokens (count, 12): each is the one before with probability 1/2, else one of the 5 others."""
    steps = torch.randint(1, VOCABULARY, (count, LENGTH), generator=generator)
    steps *= torch.rand(count, LENGTH, generator=generator) < 0.5
    first = torch.randint(VOCABULARY, (count, 1), generator=generator)
    return (first + steps.index_fill(1, torch.tensor([0]), 0).cumsum(1)) % VOCABULARY


def ahead(x: Tensor, by: int) -> Tensor:
    """The token so many places on, round the end."""
    return x.roll(-by, 1)


def repeated(x: Tensor) -> Tensor:
    """Whether a token is the one before; -100, for no class, at the first."""
    return torch.cat([torch.full_like(x[:, :1], -100), (x[:, 1:] == x[:, :-1]).long()], 1)


def parity(x: Tensor) -> Tensor:
    """(x_t + x_(t+3)) mod 2"""
    return (x + ahead(x, 3)) % 2


def pre_norm(classes: int = VOCABULARY, size: int = 64, depth: int = 4, seed: int = 0) -> nn.Module:
    """A pre-norm encoder of Transformers with learned positions and 4 heads, which classifies each token."""
    from transformers import RobertaPreLayerNormConfig, RobertaPreLayerNormForTokenClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = RobertaPreLayerNormConfig(
            vocab_size=VOCABULARY + 1, pad_token_id=VOCABULARY, hidden_size=size, num_hidden_layers=depth, num_attention_heads=4,
            intermediate_size=4 * size, max_position_embeddings=40, num_labels=classes, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        model = RobertaPreLayerNormForTokenClassification(config)
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Embedding, nn.LayerNorm)):
                module.reset_parameters()  # as torch starts them: with positions as large as tokens
        return model


def fit_tokens(
    model: nn.Module, parameters: Iterable[nn.Parameter], goal: Any, steps: int, rate: float, seed: int = 0
) -> float:
    """AdamW on the cross-entropy of `goal(tokens)`, 64 chains a step. Returns the mean loss of the last ten steps."""
    generator, losses = torch.Generator().manual_seed(seed), []
    optimizer = torch.optim.AdamW(list(parameters), lr=rate, weight_decay=0.01)
    model.train()
    for _ in range(steps):
        x = chains(64, generator)
        loss = nn.functional.cross_entropy(model(x).logits.flatten(0, 1), goal(x).flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return statistics.mean(losses[-10:])


@torch.no_grad()
def right(model: nn.Module, goal: Any, count: int = 1000) -> float:
    """Share of the tokens of new chains whose class is right."""
    x = chains(count, torch.Generator().manual_seed(10**6))
    wanted = goal(x)
    return float((model(x).logits.argmax(-1) == wanted)[wanted >= 0].float().mean())


def pretrained(steps: int = 700) -> tuple[nn.Module, float]:
    """`pre_norm` trained to tell the token three places on, and its last loss."""
    model = pre_norm()
    loss = fit_tokens(model, model.parameters(), lambda x: ahead(x, 3), steps, 2e-3)
    return model, loss


def with_classes(model: nn.Module, classes: int, seed: int = 0) -> nn.Module:
    """A copy of the backbone under a new head."""
    other = pre_norm(classes, seed=seed)
    other.roberta_prelayernorm.load_state_dict(model.roberta_prelayernorm.state_dict())
    return other


def head_alone(model: nn.Module, goal: Any, steps: int = 400, seed: int = 0) -> float:
    """Share that is right of a norm and a linear head, trained on the last frozen state."""
    other = with_classes(model, 2, seed)
    other.classifier = nn.Sequential(nn.LayerNorm(64), other.classifier)
    other.requires_grad_(False).classifier.requires_grad_(True)
    fit_tokens(other, other.classifier.parameters(), goal, steps, 3e-3, seed)
    return right(other, goal)


def bytes_over_lora(method: pt.Method) -> float:
    """Bytes saved for backward by a method over those by LoRA of rank 8 on q, k and v: 6 blocks of width 128, 16 x 32 tokens."""
    from petiole.cost import saved_bytes

    found = []
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(VOCABULARY, (16, 32), generator=generator)
    for each in (method, pt.LoRA(rank=8, roles=("q", "k", "v"))):
        model = pre_norm(size=128, depth=6)
        pt.attach(model, each)
        found.append(saved_bytes(model, {"input_ids": x, "labels": x}))
    return found[0] / found[1]


# ------------------------------------------------------------------------------------------------------- ranks that have to grow


class Parallel(nn.Module):
    """x -> W_i x of several linears side by side, stacked."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"query": nn.Linear(*W.T.shape, bias=False)}) for W in weights])
        for block, W in zip(self.blocks, weights, strict=True):
            block["query"].weight.data = W.clone()

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([block["query"](x) for block in self.blocks])


def four_layers(seed: int, share: float = 1 / 8) -> tuple[Parallel, Tensor, Tensor]:
    """Four linears (24, 24), 256 inputs, and the outputs of W + D: D of rank 0, 8, 0, 1, of Gaussian factors times `share`."""
    generator = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=generator)
    W = normal(4, 24, 24) / 24**0.5
    D = torch.stack([share * normal(24, rank) @ normal(rank, 24) for rank in (0, 8, 0, 1)])
    x = normal(256, 24)
    return Parallel(W), x, x @ (W + D).mT


def fit_scenes(
    model: nn.Module,
    parameters: Iterable[nn.Parameter],
    task: DensePrediction,
    steps: int,
    size: int,
    rate: float,
    seed: int,
) -> None:
    """Adam on the sum of a model's dense tasks, batches of `size` in an order of the seed; the rate falls to nothing."""
    rows, generator = task.encoded("train"), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(parameters, lr=rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    torch.manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(rows), (size,), generator=generator).tolist()
        optimizer.zero_grad()
        model(**task.collator([rows[i] for i in chosen])).loss.backward()
        optimizer.step()
        scheduler.step()


def step(events: Any, optimizer: torch.optim.Optimizer, loss_of: Callable[[], Tensor]) -> float:
    """One step of the optimiser with the events of the methods and their terms. Returns the loss without these."""
    events.before_step()
    loss = loss_of()
    extra = events.extra_loss()
    (loss if extra is None else loss + extra).backward()
    events.before_optimizer_step(loss)
    optimizer.step()
    events.after_optimizer_step()
    optimizer.zero_grad()
    return float(loss.detach())


def fit_growing(
    method: pt.Method, seed: int, learning_rate: float, steps: int, share: float = 1 / 8, weight_decay: float = 0.0
) -> tuple[list[int], float]:
    """Train a method that grows on the four layers with AdamW. Returns the final ranks, and the sum of the mean square errors."""
    from petiole.ranks import rank_pattern
    from petiole.training import Events

    model, x, y = four_layers(seed, share)
    tuned = pt.attach(model.train(), method.model_copy(update={"roles": ("q",)}), seed=seed, found=parts(model))
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=learning_rate, weight_decay=weight_decay)
    events = Events(model, optimizer, total_steps=steps, prove=False)  # two layers are right already
    events.begin()
    for _ in range(steps):
        step(events, optimizer, lambda: (model(x) - y).square().mean((1, 2)).sum())
    with torch.no_grad():
        left = (model.eval()(x) - y).square().mean((1, 2)).sum()
    return list(rank_pattern(tuned).values()), float(left)


# ----------------------------------------------------------------------------------------------------------------------- the report


class Report:
    """A table, and claims that hold or fail.

    Args:
        slug: of the specification; the script's name.
        title: of the section.
        about: what is done, for the page.
        columns: of the table.
    """

    def __init__(self, slug: str, title: str, about: str, columns: Sequence[str]) -> None:
        self.slug, self.title, self.about, self.columns = slug, title, about, tuple(columns)
        self.rows: list[tuple[Any, ...]] = []
        self.claims: list[tuple[str, bool]] = []

    def row(self, *values: Any) -> None:
        assert len(values) == len(self.columns)
        self.rows.append(values)

    def require(self, claim: str, holds: bool) -> None:
        """A claim with its numbers, and whether it holds."""
        self.claims.append((claim, bool(holds)))

    @property
    def holds(self) -> bool:
        return all(holds for _, holds in self.claims)

    def finish(self, given: argparse.Namespace, figures: Mapping[str, Any] | None = None) -> None:
        """Print, write the page and the JSON, and leave with status 1 if a claim fails."""
        made = f"{given.seeds} seeds, {given.threads} thread{'s' * (given.threads > 1)}, torch {torch.__version__.split('+')[0]}"
        print(f"{self.title} ({made})\n{self.table()}\n{self.verdicts()}")
        if given.seeds >= given.usual:
            self.write(f"{datetime.date.today().isoformat()}, {made}, petiole {version('petiole')}.")
        else:
            print(f"docs/proofs.md is left as it is: fewer than {given.usual} seeds")
        if given.json is not None:
            rows = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
            claims = [{"claim": claim, "holds": holds} for claim, holds in self.claims]
            about = {"slug": self.slug, "rows": rows, "claims": claims, "figures": dict(figures or {})}
            run = {
                "seeds": given.seeds,
                "threads": given.threads,
                "torch": torch.__version__,
                "petiole": version("petiole"),
            }
            given.json.write_text(json.dumps({**about, **run}, indent=1, ensure_ascii=False) + "\n")
        sys.exit(0 if self.holds else 1)

    def table(self) -> str:
        cells = [[shown(value) for value in row] for row in [self.columns, *self.rows]]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
        return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])

    def verdicts(self) -> str:
        return "\n".join(f"- {'holds' if holds else '**FAILS**'}: {claim}" for claim, holds in self.claims)

    def write(self, made: str) -> None:
        """Put this proof's section in the page, in the order of slugs."""
        page = PAGE.read_text() if PAGE.exists() else _HEAD
        section = f"<!-- {self.slug} -->\n## {self.title}\n\n{self.about}\n\n{self.table()}\n\n{self.verdicts()}\n\n{made}\n<!-- /{self.slug} -->"
        found = re.findall(r"<!-- ([a-z0-9-]+) -->\n.*?<!-- /\1 -->", page, re.DOTALL)
        sections = {
            slug: re.search(rf"<!-- {slug} -->\n.*?<!-- /{slug} -->", page, re.DOTALL).group(0) for slug in found
        }
        head = re.split(r"<!-- [a-z0-9-]+ -->", page, maxsplit=1)[0].rstrip()
        sections[self.slug] = section
        write_text(PAGE, "\n\n".join([head, *(sections[slug] for slug in sorted(sections))]) + "\n")


def shown(value: Any) -> str:
    """A number with three digits, anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, float):
        return f"{value:,}" if type(value) is int else str(value)
    return f"{value:.3g}"


def spread(values: Sequence[float]) -> str:
    """Smallest to largest."""
    return shown(min(values)) if min(values) == max(values) else f"{shown(min(values))} to {shown(max(values))}"
