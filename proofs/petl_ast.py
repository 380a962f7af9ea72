"""Conformer and bottleneck adapters beside the ffn learn an XOR that a head cannot; a bottleneck that starts at zero on both sides hardly does."""

from __future__ import annotations

import math
from functools import cache

import bench
import torch
from common import Report, options, spread
from torch import Tensor, nn
from transformers import ASTConfig, ASTForAudioClassification
from transformers.audio_utils import mel_filter_bank

import petiole as pt
from petiole.methods.adapters.conformer import Plain

OWN = {"reduction_factor": 8, "train_layernorm": False}  # a bottleneck of 8 of 64
METHODS: dict[str, pt.Method] = {
    "head only": pt.LinearProbe(),
    "conformer": pt.ASTAdapter(kernel_size=5, **OWN),
    "bottleneck": pt.ASTAdapter(block="bottleneck", **OWN),
    "both zero": pt.ASTAdapter(block="bottleneck", init="reference", **OWN),
}

# ------------------------------------------------------------------------------------------------------- one second of sound

RATE, WINDOW, HOP, BINS, FRAMES = 8000, 256, 120, 64, 64
KINDS, SHOTS, OTHERS, STEPS = 4, 16, 100, 200


def sounds(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Log-mel spectrograms (4 · count, 64, 64) of tones, rising and falling chirps and noise bursts, in noise; and which each is."""
    generator = torch.Generator().manual_seed(seed)
    uniform = lambda low, high: low + (high - low) * torch.rand(count, 1, generator=generator)  # noqa: E731
    t, waves = torch.arange(RATE) / RATE, []
    for slope in (0.0, 1.0, -1.0):
        phase = 2 * math.pi * (uniform(1200, 2500) * t + slope * uniform(400, 1000) * (t - 0.5).square())
        waves.append(torch.sin(phase + uniform(0, 6)))
    start = uniform(0, 0.8)
    burst = ((t > start) & (t < start + uniform(0.1, 0.2))).float()
    waves.append(burst * torch.randn(count, RATE, generator=generator))
    wave = torch.cat(waves)
    wave = wave * torch.exp(0.5 * torch.randn(len(wave), 1, generator=generator))
    wave = wave + 0.1 * torch.randn(wave.shape, generator=generator)
    return log_mel(wave), torch.arange(KINDS).repeat_interleave(count)


def log_mel(wave: Tensor) -> Tensor:
    """Waves (n, 8000) -> (n, 64 frames, 64 bins), of mean 0 and deviation 1 for each sound."""
    power = torch.stft(wave, WINDOW, HOP, window=torch.hann_window(WINDOW), return_complex=True).abs().square()
    mel = (filters() @ power).clamp_min(1e-6).log().mT[:, :FRAMES]
    return (mel - mel.mean((1, 2), keepdim=True)) / mel.std((1, 2), keepdim=True)


@cache
def filters() -> Tensor:
    bank = mel_filter_bank(WINDOW // 2 + 1, BINS, 50.0, RATE / 2, RATE, norm="slaney", mel_scale="htk")
    return torch.tensor(bank.T, dtype=torch.float32)


def spectrogram_transformer(seed: int) -> ASTForAudioClassification:
    """A small one with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = ASTConfig(
            hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128, num_mel_bins=BINS, max_length=FRAMES,
            frequency_stride=16, time_stride=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=KINDS,
            initializer_range=0.1,
        )  # fmt: skip
        model = ASTForAudioClassification(config)
        nn.init.normal_(
            model.audio_spectrogram_transformer.embeddings.position_embeddings, 0, 0.5
        )  # or they would be zero
        return model.eval()


def few_shots(method: pt.Method, seed: int) -> float:
    """Accuracy on other sounds after 16 of each kind."""
    model = spectrogram_transformer(seed)
    tuned = pt.attach(model, method, seed=seed)
    x, y = sounds(SHOTS, 3000 + seed)
    optimizer = torch.optim.Adam(tuned.parameters(), lr=bench.RATE)
    model.train()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        rows = torch.randperm(len(x), generator=generator)[:32]
        model(x[rows], labels=y[rows]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    x, y = sounds(OTHERS, 4000 + seed)
    with torch.no_grad():
        return float((model(x).logits.argmax(-1) == y).float().mean())


def main() -> None:
    given = options(__doc__)
    report = Report(
        "petl-ast",
        "Adapters of audio spectrogram transformers",
        f"{bench.ABOUT} Adapters of 8 stand beside every ffn: conformer blocks with a kernel of 5, bottlenecks that start at W_up = 0, and "
        "bottlenecks that start at zero on both sides, as the paper's code does: "
        "then only biases and the head learn, and how far they get depends on the encoder drawn. "
        "In the columns on sound a random spectrogram transformer of "
        f"the same size hears {SHOTS} of each of four kinds of noisy seconds (tones, rising and falling chirps, bursts), as "
        f"{BINS}-bin log-mel, for {STEPS} steps; nothing is required there.",
        ("seed", *METHODS, *(f"sound: {name}" for name in METHODS)),
    )
    right: dict[str, list[float]] = {name: [] for name in METHODS}
    heard: dict[str, list[float]] = {name: [] for name in METHODS}
    dead = True
    for seed in range(given.seeds):
        for name, method in METHODS.items():
            outcome = bench.run(method, seed)
            right[name].append(outcome.accuracy)
            heard[name].append(few_shots(method, seed))
            if name == "both zero":
                adapters = [slot.delta for slot in outcome.tuned.slots if isinstance(slot.delta, Plain)]
                dead &= len(adapters) == bench.LAYERS
                dead &= not any(bool(layer.weight.any()) for a in adapters for layer in (a.down, a.up))
        report.row(seed, *(values[-1] for found in (right, heard) for values in found.values()))
    report.require(
        f"conformer adapters get at least 0.80 right: {spread(right['conformer'])}", min(right["conformer"]) >= 0.80
    )
    report.require(f"bottlenecks with W_up = 0, too: {spread(right['bottleneck'])}", min(right["bottleneck"]) >= 0.80)
    report.require(f"with both zero at most 0.75: {spread(right['both zero'])}", max(right["both zero"]) <= 0.75)
    report.require("and both of these projections are still exactly zero after training", dead)
    report.finish(given, {"accuracy": right, "sound": heard})


if __name__ == "__main__":
    main()
