"""The common bench of the adapter family: a frozen random encoder, and a label that no linear head can read off what it gives.

An input is 8 tokens of 16 features: a random linear mix of 4 latent factors z, drawn once for all samples, and noise. The label is the sign
of z₁ z₂, an XOR. The encoder has three post-norm blocks of BERT, its output is averaged over the tokens. Its weights are N(0, 0.05²): large
enough for attentions and ffns to do something, and so small that they do not find the XOR by chance.

    outcome = bench.run(pt.HoulsbyAdapter(bottleneck=8), seed)
    outcome.accuracy, outcome.early()
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from common import step
from torch import Tensor, nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer

import petiole as pt
from petiole.training import Events

SIZE, HEADS, LAYERS, INNER, DEVIATION = 64, 4, 3, 128, 0.05
TOKENS, FEATURES, FACTORS, NOISE = 8, 16, 4, 0.1
TRAINING, TEST, STEPS, BATCH, RATE = 3000, 1000, 300, 64, 3e-3
ABOUT = (
    f"A frozen random post-norm encoder ({LAYERS} blocks of width {SIZE}, {HEADS} heads, ffn {INNER}, mean pooling) reads {TOKENS} tokens of "
    f"{FEATURES} features, a random linear mix of {FACTORS} latent factors with noise {NOISE}; the label is the sign of z₁ z₂. {TRAINING:,} "
    f"samples, {STEPS} steps of Adam with batches of {BATCH} and learning rate {RATE}, a fresh linear head; accuracy on {TEST:,} others."
)


class Bench(nn.Module):
    """x (B, 8, 16) -> scores (B, classes)"""

    def __init__(self, layers: int = LAYERS, classes: int = 2) -> None:
        super().__init__()
        config = BertConfig(
            hidden_size=SIZE,
            num_hidden_layers=layers,
            num_attention_heads=HEADS,
            intermediate_size=INNER,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            attn_implementation="sdpa",
        )
        self.enter = nn.Linear(FEATURES, SIZE)
        self.layers = nn.ModuleList(BertLayer(config, layer_idx=depth) for depth in range(layers))
        self.classifier = nn.Linear(SIZE, classes)
        for name, parameter in self.layers.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, 0, DEVIATION)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        for layer in self.layers:
            h = layer(h)
        return self.classifier(h.mean(1))


@dataclass
class Outcome:
    """What a run ended with: accuracy on the test samples, the loss of every step, and what was attached."""

    accuracy: float
    losses: list[float]
    tuned: pt.Adaptation

    def early(self, steps: int = 150) -> float:
        """Mean loss of the first steps: how fast it learns."""
        return sum(self.losses[:steps]) / steps


def backbone(seed: int, **options: Any) -> Bench:
    """The same for every method of a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Bench(**options)


def samples(seed: int, count: int = TRAINING + TEST, noise: float = NOISE) -> tuple[Tensor, Tensor]:
    """Inputs x (count, 8, 16) and their factors z (count, 4)."""
    generator = torch.Generator().manual_seed(1000 + seed)
    mix = 0.25 * torch.randn(FACTORS, TOKENS * FEATURES, generator=generator)
    z = torch.randn(count, FACTORS, generator=generator)
    x = z @ mix + noise * torch.randn(count, TOKENS * FEATURES, generator=generator)
    return x.view(count, TOKENS, FEATURES), z


def xor(z: Tensor, first: int = 0, second: int = 1) -> Tensor:
    """Whether two factors have the same sign."""
    return (z[:, first] * z[:, second] > 0).long()


def batches(count: int, seed: int, steps: int = STEPS) -> Iterator[Tensor]:
    """Indices of the samples of each step."""
    generator = torch.Generator().manual_seed(2000 + seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(count, generator=generator)
        yield order[:BATCH]
        order = order[BATCH:]


def fit(model: nn.Module, tuned: pt.Adaptation, x: Tensor, y: Tensor, seed: int, steps: int = STEPS) -> list[float]:
    """Train what is attached, with its events. Returns the loss of every step."""
    optimizer, losses = torch.optim.Adam(tuned.parameters(), lr=RATE), []
    events = Events(model, optimizer, total_steps=steps)
    model.train()
    events.begin([{"x": x[:BATCH]}])
    for rows in batches(len(x), seed, steps):
        losses.append(step(events, optimizer, lambda rows=rows: nn.functional.cross_entropy(model(x[rows]), y[rows])))
    model.eval()
    return losses


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x).argmax(-1) == y).float().mean())


def run(methods: pt.Method | Sequence[pt.Method], seed: int) -> Outcome:
    """Attach, train and test on the usual task."""
    model, (x, z) = backbone(seed), samples(seed)
    y = xor(z)
    tuned = pt.attach(model, methods, seed=seed)
    losses = fit(model, tuned, x[:TRAINING], y[:TRAINING], seed)
    return Outcome(accuracy(model, x[TRAINING:], y[TRAINING:]), losses, tuned)
