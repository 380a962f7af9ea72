"""NOLA finds a mixture of its random matrices again, with a quarter of the numbers of LoRA at rank 1, and adapts a small network to new digits."""

from __future__ import annotations

import copy

import torch
from common import Report, attached, fit, options, shown, spread
from torch import Tensor, nn

import petiole as pt

SIZE, RANK, BASIS, INPUTS, STEPS, RATE = 256, 8, 64, 512, 600, 0.05
WIDTH, SHOTS, DIGIT_STEPS, DIGIT_RATE = 128, 10, 300, 1e-2


def main() -> None:
    given = options(__doc__)
    report = Report(
        "nola",
        "NOLA",
        f"First, a change of a {SIZE} x {SIZE} weight is made of the method's own random matrices with other coefficients (rank {RANK}, "
        f"{BASIS} for each factor: {2 * BASIS} numbers train), and looked for by Adam, learning rate {RATE}, {STEPS} steps, {INPUTS} normal "
        "inputs. Left is the share of the first loss; *wrong seed* is what the same coefficients leave on another basis. Then a network of "
        f"two hidden layers of {WIDTH}, trained on the digits 0 to 4, learns 5 to 9 from {SHOTS} each, with a new last layer, alone or with "
        f"NOLA on the hidden ones ({DIGIT_STEPS} steps).",
        (
            "seed",
            "NOLA, 128",
            "wrong seed",
            "LoRA of rank 1, 512",
            "digits: last layer alone, %",
            "digits: NOLA too, %",
        ),
    )
    found: dict[str, list[float]] = {"nola": [], "wrong": [], "lora": [], "head": [], "digits": []}
    for seed in range(given.seeds):
        left, wrong, lora = mixture(seed)
        head, both = digits(seed)
        for name, value in zip(found, (left, wrong, lora, head, both), strict=True):
            found[name].append(value)
        report.row(seed, left, wrong, lora, head, both)
    gains = [b - a for a, b in zip(found["head"], found["digits"], strict=True)]
    report.require(f"NOLA leaves less than 1e-3: {spread(found['nola'])}", max(found["nola"]) < 1e-3)
    report.require(f"with a wrong seed more than 0.5 is left: {spread(found['wrong'])}", min(found["wrong"]) > 0.5)
    report.require(
        f"on digits it beats the last layer alone: by {shown(sum(gains) / len(gains))} points on average ({spread(gains)})",
        min(gains) > 0,
    )
    report.finish(given, found)


def mixture(seed: int) -> tuple[float, float, float]:
    """What NOLA leaves, what its coefficients leave on another basis, what LoRA of rank 1 leaves."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(SIZE, SIZE, generator=generator) / SIZE**0.5
    x = torch.randn(INPUTS, SIZE, generator=generator)
    method = pt.NOLA(rank=RANK, num_basis=BASIS, alpha=RANK)
    teacher, tuned = attached(W, method, seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        y = teacher(x)
    model, tuned = attached(W, method, seed)
    assert tuned.trainable == 2 * BASIS
    with torch.no_grad():
        first = (model(x) - y).square().mean()
    left = fit(model, tuned.parameters(), x, y, RATE, STEPS)
    other, wrong = attached(W, method, seed + 1)
    with torch.no_grad():
        for mine, theirs in zip(wrong.parameters(), tuned.parameters(), strict=True):
            mine.copy_(theirs)
        astray = float((other(x) - y).square().mean() / first)
    lora, tuned = attached(W, pt.LoRA(rank=1, alpha=1), seed)
    return left, astray, fit(lora, tuned.parameters(), x, y, RATE, STEPS)


class Digits(nn.Module):
    """64 pixels -> two hidden layers -> five classes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, WIDTH)
        self.blocks = nn.ModuleList([nn.ModuleDict({"linear": nn.Linear(WIDTH, WIDTH)}) for _ in range(2)])
        self.last = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        for block in self.blocks:
            h = torch.relu(block["linear"](h))
        return self.last(h)


def digits(seed: int) -> tuple[float, float]:
    """Accuracy in % on the new digits: with the last layer alone, and with NOLA on the hidden layers too."""
    from sklearn.datasets import load_digits

    data = load_digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.target), generator=generator)
    images, labels = torch.tensor(data.data, dtype=torch.float32)[order] / 16, torch.tensor(data.target)[order]
    torch.manual_seed(seed)
    network = Digits()
    old = labels < 5
    learn(network, network.parameters(), images[old], labels[old], 1e-3)
    new = [torch.nonzero(labels == label).flatten() for label in range(5, 10)]
    shots, rest = torch.cat([i[:SHOTS] for i in new]), torch.cat([i[SHOTS:] for i in new])
    accuracy = []
    for with_nola in (False, True):
        model = copy.deepcopy(network).requires_grad_(False)
        torch.manual_seed(seed)
        model.last = nn.Linear(WIDTH, 5)
        parameters = list(model.last.parameters())
        if with_nola:
            found = pt.anatomy(model, stacks={"encoder": "blocks"}, roles={"up": "linear"})
            method = pt.NOLA(rank=RANK, num_basis=BASIS, roles=("up",))
            tuned = pt.attach(model, method, seed=seed, train_head=False, found=found)
            model.last.requires_grad_(True)
            parameters += tuned.parameters()
        learn(model, parameters, images[shots], labels[shots] - 5, DIGIT_RATE)
        with torch.no_grad():
            accuracy.append(100 * float((model(images[rest]).argmax(1) == labels[rest] - 5).float().mean()))
    return accuracy[0], accuracy[1]


def learn(model: nn.Module, parameters: object, x: Tensor, y: Tensor, rate: float) -> None:
    """Adam on all of it in each step."""
    optimizer = torch.optim.Adam(list(parameters), lr=rate)  # type: ignore[call-overload]
    for _ in range(DIGIT_STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


if __name__ == "__main__":
    main()
