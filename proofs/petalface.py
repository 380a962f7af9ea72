"""PETALface: two branches learn what poor and what good images need, where one of as many numbers has to find a middle."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from common import Report, attached, options, shown, spread
from common import fit as fitted
from torch import Tensor, nn

import petiole as pt

SIZE, INPUTS, STEPS, RATE = 32, 1024, 600, 0.02
TRAIN, ROWS, IMAGE_STEPS, PRETRAINING_RATE, IMAGE_RATE, LOW = 1200, 64, 400, 3e-3, 5e-3, 4
Images = tuple[Tensor, Tensor]


def main() -> None:
    given = options(__doc__, seeds=5)
    report = Report(
        "petalface",
        "PETALface",
        f"First, one {SIZE} x {SIZE} linear and {INPUTS} inputs, each with a quality q, uniform in (0, 1): the target changes by one matrix of "
        "rank 2 where q < 0.5, by another elsewhere. Twin branches of rank 2 with threshold 0.5, LoRA of rank 4, which is as many numbers, and "
        f"the twins with α = 0.5 for all; Adam at {RATE}, {STEPS} steps. Left is the share of the first loss. Then a small transformer, trained "
        f"on scikit-learn's digits of 8 x 8 pixels, learns them also where {LOW} x {LOW} are left: twins of rank 2 and LoRA of rank 4 on q, k and "
        f"v, the head frozen, {IMAGE_STEPS} steps on both kinds of images. Quality is the variance of the Laplacian, in decades, of what the "
        "model is given; threshold and range are those of the training images. Losses and accuracies, in %, are on other digits.",
        ("seed", "linear: twins", "LoRA", "α = 0.5", "poor, loss: twins", "LoRA", "poor, %: before", "twins", "LoRA", "good, %: before",
         "twins", "LoRA"),
    )  # fmt: skip
    found: dict[str, list[float]] = {name: [] for name in ("twin", "single", "even", "poor", "good", "loss")}
    for seed in range(given.seeds):
        toy = linear(seed)
        before, twin, single = digits(seed)
        poor, good = ([100 * f[kind] for f in (before, twin, single)] for kind in ("poor", "good"))
        report.row(seed, *toy, twin["poor loss"], single["poor loss"], *poor, *good)
        for name, value in zip(("twin", "single", "even"), toy, strict=True):
            found[name].append(value)
        found["loss"].append(twin["poor loss"] / single["poor loss"])
        found["poor"].append(poor[1] - poor[2])
        found["good"].append(good[1] - good[2])
    ratios = [a / b for a, b in zip(found["twin"], found["single"], strict=True)]
    report.require(f"the twins leave less than 0.6 of what LoRA leaves: {spread(ratios)}", max(ratios) < 0.6)
    even = [a / b for a, b in zip(found["even"], found["single"], strict=True)]
    report.require(f"with one α for all they leave no less than LoRA: {spread(even)} of it", min(even) > 0.999)
    means = {name: sum(found[name]) / given.seeds for name in ("loss", "poor", "good")}
    report.require(
        f"on poor digits the twins have {shown(means['loss'])} of LoRA's loss on average ({spread(found['loss'])}), "
        f"and {shown(means['poor'])} % more accuracy ({spread(found['poor'])})",
        means["loss"] < 1 and means["poor"] > 0,
    )
    report.require(
        f"on good digits they lose nothing: {shown(means['good'])} % more accuracy on average ({spread(found['good'])})",
        min(found["good"]) >= 0,
    )
    report.finish(given, found)


# ----------------------------------------------------------------------------------------------------------------------- one linear


def linear(seed: int) -> tuple[float, float, float]:
    """What is left of the loss: of the twins, of LoRA, of the twins at α = 0.5."""
    generator = torch.Generator().manual_seed(seed)

    def low_rank() -> Tensor:
        A, B = (torch.randn(SIZE, 2, generator=generator) for _ in range(2))
        return A @ B.T / SIZE

    W, poor, good = torch.randn(SIZE, SIZE, generator=generator) / SIZE**0.5, low_rank(), low_rank()
    x, q = torch.randn(INPUTS, SIZE, generator=generator), torch.rand(INPUTS, generator=generator)
    y = x @ W.T + torch.where(q[:, None] < 0.5, x @ poor.T, x @ good.T)

    def left(method: pt.Method, **values: Any) -> float:
        model, tuned = attached(W, method, seed)
        assert tuned.trainable == 4 * 2 * SIZE
        with pt.given(model, **values):
            return fitted(model, tuned.parameters(), x, y, RATE, STEPS)

    twin = pt.PETALface(rank=2, dropout=0.0, quality=None, threshold=0.5, normalise=None)
    return left(twin, quality=q), left(pt.LoRA(rank=4, alpha=4)), left(twin, alpha=0.5)


# --------------------------------------------------------------------------------------------------------------------------- digits


def digits(seed: int) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Figures of the model as it was trained on good digits, with the twins, and with LoRA."""
    from sklearn.datasets import load_digits
    from transformers import ViTConfig, ViTForImageClassification

    raw = load_digits()
    order = torch.randperm(len(raw.target), generator=torch.Generator().manual_seed(seed))
    labels = torch.tensor(raw.target)[order]
    sharp = torch.tensor(raw.images, dtype=torch.float32)[order][:, None] / 16
    small = nn.functional.adaptive_avg_pool2d(sharp, LOW)
    kinds = {"good": sharp, "poor": nn.functional.interpolate(small, sharp.shape[-2:], mode="bilinear")}
    kinds = {name: (images - 0.5) / 0.5 for name, images in kinds.items()}
    test = {name: (images[TRAIN:], labels[TRAIN:]) for name, images in kinds.items()}
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ViTForImageClassification(config)
    train(model, list(model.parameters()), (kinds["good"][:TRAIN], labels[:TRAIN]), PRETRAINING_RATE, seed)
    before = figures(model, test)
    both = torch.cat([images[:TRAIN] for images in kinds.values()]), labels[:TRAIN].repeat(2)

    def learnt(method: pt.Method) -> dict[str, float]:
        own = copy.deepcopy(model)
        tuned = pt.attach(own, method, seed=seed, train_head=False)
        assert tuned.trainable == 2 * 3 * 4 * 2 * 32
        tuned.calibrate([{"pixel_values": both[0]}])
        train(own, list(tuned.parameters()), both, IMAGE_RATE, seed)
        return figures(own, test)

    twin = pt.PETALface(rank=2, dropout=0.0, joint_qkv=False)  # a D each, as LoRA has
    return before, learnt(twin), learnt(pt.LoRA(rank=4, alpha=4, roles=("q", "k", "v")))


def train(model: nn.Module, parameters: list[nn.Parameter], data: Images, rate: float, seed: int) -> None:
    """AdamW on batches in an order of the seed; the rate falls to nothing."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, IMAGE_STEPS)
    model.train()
    for _ in range(IMAGE_STEPS):
        chosen = torch.randint(len(data[0]), (ROWS,), generator=generator)
        optimizer.zero_grad()
        model(pixel_values=data[0][chosen], labels=data[1][chosen]).loss.backward()
        optimizer.step()
        scheduler.step()
    model.eval()


def figures(model: nn.Module, test: Mapping[str, Images]) -> dict[str, float]:
    """Of each kind of images, accuracy by its name, and the loss."""
    found = {}
    for name, (images, labels) in test.items():
        with torch.no_grad():
            output = model(pixel_values=images, labels=labels)
        found[name] = float((output.logits.argmax(1) == labels).float().mean())
        found[f"{name} loss"] = float(output.loss)
    return found


if __name__ == "__main__":
    main()
