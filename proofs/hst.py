"""HST: textures finer than a patch, which a frozen ViT does not tell apart, classified and segmented by what stands beside it."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import torch
from common import Report, options, spread
from torch import Tensor, nn

import petiole as pt
from petiole.methods.side.hst import SideNetwork
from petiole.tasks.dense import METRICS, Decoder

SIDE, GRID, CLASSES, STEPS, RATE = 32, 8, 4, 150, 5e-3
DIMS, HEADS = (8, 8, 8, 8), (2, 2, 2, 2)
Batch = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]


def main() -> None:
    given = options(__doc__)
    report = Report(
        "hst",
        "HST",
        f"A ViT (image 32 x 32, patch 8, 4 blocks, width 48) learns to tell discs, squares, crosses and rings, and is frozen. New tasks on noise "
        f"with 4 textures of period 2, of random sign: which one fills the image, and which one each cell of an 8 x 8 grid has. {STEPS} steps of "
        f"AdamW at {RATE}, 64 images each. HST has widths {', '.join(map(str, DIMS))}; deep prompts have as many parameters. The grid is segmented "
        "from the pyramid by a small decoder, or from the ViT's last states, upsampled, by a linear; without image, the side network sees zeros in "
        "training and test.",
        ("seed", "class: linear probe", "class: prompts", "class: HST", "grid: linear", "grid: HST", "grid: without image"),
    )  # fmt: skip
    backbone, right = pretrained()
    report.require(f"the ViT has learnt its shapes: {right:.2f} right", right >= 0.8)
    rows = []
    for seed in range(given.seeds):
        methods = (pt.LinearProbe(), pt.VisualPromptTuning(length=prompts()), method("pooled"))
        row = [classified(backbone, each, seed) for each in methods]
        row += [
            segmented(backbone, seed, beside=False),
            segmented(backbone, seed),
            segmented(backbone, seed, zeros=True),
        ]
        rows.append(row)
        report.row(seed, *row)
    probe, prompt, found, linear, grid, blind = (list(column) for column in zip(*rows, strict=True))
    gaps = [a - b for a, b in zip(found, probe, strict=True)]
    report.require(f"HST classifies better than a linear probe, by 0.10 at least: {spread(gaps)}", min(gaps) >= 0.10)
    gaps = [a - b for a, b in zip(found, prompt, strict=True)]
    report.require(f"and better than prompts, by 0.10 at least: {spread(gaps)}", min(gaps) >= 0.10)
    gaps = [a - b for a, b in zip(grid, linear, strict=True)]
    report.require(
        f"its mean IoU is higher than that of the ViT's states, by 0.10 at least: {spread(gaps)}", min(gaps) >= 0.10
    )
    gaps = [a - b for a, b in zip(grid, blind, strict=True)]
    report.require(f"without the image it falls, by 0.10 at least: {spread(gaps)}", min(gaps) >= 0.10)
    report.finish(given, {"accuracy": found, "mean_iou": grid})


def method(output: str) -> pt.HST:
    return pt.HST(side_dims=DIMS, side_heads=HEADS, output=output)


def prompts() -> int:
    """Length of deep prompts that have about as many parameters."""
    return round(pt.attach(vit(), method("pooled")).trainable / (4 * 48))


# ------------------------------------------------------------------------------------------------------------------------- images


def shapes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (count, 3, 32, 32) with a disc, square, cross or ring of some colour and place on noise; which one."""
    kind = torch.randint(CLASSES, (count,), generator=generator)
    centre = torch.randint(12, 20, (count, 2, 1, 1), generator=generator)
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    dy, dx = (y - centre[:, 0]).abs(), (x - centre[:, 1]).abs()
    radius = (dy**2 + dx**2).sqrt()
    masks = (
        radius < 9,
        torch.maximum(dy, dx) < 8,
        (torch.minimum(dy, dx) < 3) & (torch.maximum(dy, dx) < 11),
        (radius < 11) & (radius > 6),
    )
    mask = torch.stack(masks, 1)[torch.arange(count), kind]
    colour = torch.randn(count, 3, 1, 1, generator=generator)
    colour = 2 * colour.abs() / colour.norm(dim=1, keepdim=True)
    return mask[:, None] * colour + 0.3 * torch.randn(count, 3, SIDE, SIDE, generator=generator), kind


def textures() -> Tensor:
    """Flat, stripes across, stripes along, checks: (4, 32, 32) of -1 and 1, or 0."""
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    signs = torch.stack([y % 2, x % 2, (y + x) % 2]).float() * 2 - 1
    return torch.cat([torch.zeros(1, SIDE, SIDE), signs])


def textured(cells: Tensor, generator: torch.Generator) -> Tensor:
    """Kinds of cells (n, 8, 8) -> images (n, 3, 32, 32): each cell has its texture, in a sign of its own, under noise."""
    sign = torch.randint(0, 2, cells.shape, generator=generator) * 2 - 1
    kinds, signs = (each.repeat_interleave(4, 1).repeat_interleave(4, 2) for each in (cells, sign))
    pattern = textures().expand(len(cells), -1, -1, -1).gather(1, kinds[:, None])[:, 0] * signs
    return 0.5 * pattern[:, None] + 0.5 * torch.randn(len(cells), 3, SIDE, SIDE, generator=generator)


def whole(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One texture all over, and which."""
    kind = torch.randint(CLASSES, (count,), generator=generator)
    return textured(kind[:, None, None].expand(-1, GRID, GRID), generator), kind


def parts(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A rectangle of cells has another texture than the rest, (count, 8, 8) in all."""
    kinds = torch.randint(CLASSES, (2, count, 1, 1), generator=generator)
    start, length = (
        torch.randint(0, 5, (2, count, 1), generator=generator),
        torch.randint(2, 6, (2, count, 1), generator=generator),
    )
    inside = (torch.arange(GRID) >= start) & (torch.arange(GRID) < start + length)
    cells = torch.where(inside[0][:, :, None] & inside[1][:, None], kinds[0], kinds[1])
    return textured(cells, generator), cells


# ------------------------------------------------------------------------------------------------------------------------- models


def vit(seed: int = 0) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ViTForImageClassification(
            ViTConfig(
                hidden_size=48, num_hidden_layers=4, num_attention_heads=4, intermediate_size=192, image_size=SIDE, patch_size=8,
                num_labels=CLASSES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            )
        )  # fmt: skip


def pretrained() -> tuple[nn.Module, float]:
    model = vit()
    fit(model, list(model.parameters()), lambda x: model(x).logits, shapes, 400, 2e-3)
    return model, accuracy(model, shapes)


def fit(
    model: nn.Module, parameters: list[nn.Parameter], scores: Callable[[Tensor], Tensor], batch: Batch, steps: int, rate: float, seed: int = 0
) -> None:  # fmt: skip
    """AdamW, with the rate going down along a line."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    model.train()
    for _ in range(steps):
        x, y = batch(64, generator)
        nn.functional.cross_entropy(scores(x), y).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, batch: Batch) -> float:
    x, y = batch(1000, torch.Generator().manual_seed(10**6))
    return float((model(x).logits.argmax(-1) == y).float().mean())


def copy_of(backbone: nn.Module, seed: int) -> nn.Module:
    """The backbone under a new head."""
    model = vit(seed + 1)
    model.vit.load_state_dict(backbone.vit.state_dict())
    return model


def classified(backbone: nn.Module, chosen: pt.Method, seed: int) -> float:
    """Share of new images whose texture is right."""
    model = copy_of(backbone, seed)
    tuned = pt.attach(model, chosen, seed=seed)
    fit(model, list(tuned.parameters()), lambda x: model(x).logits, whole, STEPS, RATE, seed)
    return accuracy(model, whole)


def segmented(backbone: nn.Module, seed: int, *, beside: bool = True, zeros: bool = False) -> float:
    """Mean IoU on new grids: from the pyramid beside the ViT, or from the ViT's last states alone."""
    model = copy_of(backbone, seed).vit.requires_grad_(False)
    image = SideNetwork.image
    with (
        torch.random.fork_rng(devices=[]),
        mock.patch.object(SideNetwork, "image", lambda self: image(self) * (not zeros)),
    ):
        torch.manual_seed(seed)
        head = Decoder(DIMS, CLASSES, width=8) if beside else nn.Conv2d(48, CLASSES, 1)
        parameters = list(head.parameters())
        if beside:
            parameters += pt.attach(model, method("pyramid"), seed=seed).parameters()

        def scores(x: Tensor) -> Tensor:
            last = model(x).last_hidden_state[:, 1:].mT.unflatten(2, (4, 4))
            if beside:
                return head(list(pt.streams(model)["hst"].values()))
            return head(nn.functional.interpolate(last, (GRID, GRID), mode="bilinear", align_corners=False))

        both = nn.ModuleList([model, head])
        fit(both, parameters, scores, parts, STEPS, RATE, seed)
        x, y = parts(500, torch.Generator().manual_seed(10**6))
        with torch.no_grad():
            return METRICS["mean_iou"](scores(x), y)


if __name__ == "__main__":
    main()
