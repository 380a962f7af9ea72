"""How good an image is, as one number; and what of two branches that number lets act.

    α = 0.5 ± (n(q) - τ)        - where a lower q is better; n rescales scores, τ is in its units; in [0, 1] where clipped

q comes, for each image of a forward pass, from the first of these that there is:

    with pt.given(model, quality=scores)     one number for each row of the batch
    with pt.given(model, quality=judge)      a function or a module: images (B, C, H, W) in [0, 1] -> (B,)
    model(..., quality=scores)               a model whose forward has such an argument
    a measure below, by name                 of what the model is given as images

and `pt.given(model, alpha=…)` stands for α itself: one number for all, or one for each row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from petiole.context import Pass
from petiole.errors import AttachError, TrainingError

if TYPE_CHECKING:
    from petiole.attach import Host
    from petiole.methods.lowrank.petalface import PETALface

Judge = Callable[[Tensor], Tensor]


# --------------------------------------------------------------------------------------------------------------------- measures
# In decades, since a few sharp images have a hundred times the variance of others, and would be the whole range otherwise.

GREY = 1 / 255  # one level of 8 bits: what is less is none


def luminance(images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 1, H, W): ITU-R BT.601 of RGB, the mean of any other channels."""
    if images.ndim != 4 or min(images.shape[-2:]) < 3:
        raise AttachError(f"quality of images (B, C, H, W) of 3 x 3 pixels and more; got {tuple(images.shape)}")
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    return (images * images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)


def filtered(images: Tensor, kernel: list[list[float]]) -> Tensor:
    """The luminance through a filter of 3 x 3, without a border: (B, (H - 2)(W - 2))."""
    return nn.functional.conv2d(luminance(images), images.new_tensor(kernel)[None, None]).flatten(1)


def laplacian(images: Tensor) -> Tensor:
    """log₁₀ of the variance of the Laplacian: (B, C, H, W) -> (B,). Low where an image is blurred, or was small.  Pech-Pacheco et al. 2000."""
    return (filtered(images, [[0, 1, 0], [1, -4, 1], [0, 1, 0]]).var(1, correction=0) + GREY**2).log10()


def gradient(images: Tensor) -> Tensor:
    """log₁₀ of the mean square Sobel gradient: (B, C, H, W) -> (B,). As the Laplacian, but less moved by noise.  Tenenbaum 1970."""
    across = filtered(images, [[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    down = filtered(images, [[-1, -2, -1], [0, 0, 0], [1, 2, 1]])
    return ((across.square() + down.square()).mean(1) + GREY**2).log10()


def contrast(images: Tensor) -> Tensor:
    """log₁₀ of the luminance's standard deviation: (B, C, H, W) -> (B,). Low in haze, glare and dark."""
    return (luminance(images).flatten(1).std(1, correction=0) + GREY).log10()


MEASURES: Mapping[str, Judge] = {"laplacian": laplacian, "gradient": gradient, "contrast": contrast}


# ------------------------------------------------------------------------------------------------------------------------ blend


class Blend(nn.Module):
    """From images or scores to what each branch weighs; what the whole attachment shares. Nothing in it trains.

    Args:
        method: whose settings hold.
    """

    threshold: Tensor  # τ, in units of n, where it is the median of data
    lowest: Tensor  # scores seen in calibration
    highest: Tensor
    known: Tensor  # whether what data must say has been learnt

    def __init__(self, method: PETALface) -> None:
        super().__init__()
        self.method = method
        self.register_buffer("threshold", torch.tensor(0.0))
        self.register_buffer("lowest", torch.tensor(0.0))
        self.register_buffer("highest", torch.tensor(1.0))
        self.register_buffer("known", torch.tensor(not method.needs_data))

    def weights(self, host: Host) -> Tensor:
        """[1 - α, α] of each branch, r times each: (n, 1, 2r), for each row of the batch or n = 1 for all of them."""

        def make() -> Tensor:
            a = self.alpha(host).view(-1, 1)
            return torch.cat([1 - a, a], 1).repeat_interleave(self.method.rank, 1)[:, None]

        return host.once(f"petalface {id(self)}", make)

    def alpha(self, host: Host) -> Tensor:
        """α of each row of this forward pass (B,), or one for all (1,).

        Raises:
            AttachError: there is no quality, or it isn't one finite number for each row; or calibration has not been.
        """
        within, value = host.passing(), host.given("alpha")
        if value is not None:
            return self.checked("alpha", value, within, several=False)
        q = self.checked("quality", self.quality(host, within), within)
        if countable(q) and not bool(self.known):
            raise AttachError(
                "petalface has not seen data yet, of which its threshold or range comes\n"
                "train with pt.Trainer or events.begin(batches), call calibrate(batches), or set threshold= and normalise="
            )
        return self.blended(q)

    def blended(self, q: Tensor) -> Tensor:
        """Scores -> α, both (B,)."""
        sign = 1 if self.method.higher_is_better else -1
        threshold = self.threshold if self.method.threshold == "median" else self.method.threshold
        a = 0.5 + sign * (self.normalised(q) - threshold)
        return a.clamp(0, 1) if self.method.clip else a

    def normalised(self, q: Tensor) -> Tensor:
        """n(q)"""
        if self.method.normalise == "minmax":
            return (q - self.lowest) / (self.highest - self.lowest)
        return q.sigmoid() if self.method.normalise == "sigmoid" else q

    def quality(self, host: Host, within: Pass | None) -> Any:
        """q, from the first source that there is."""
        value = host.given("quality")
        if value is None and within is not None:
            value = within.input("quality")
        if value is None and self.method.quality is not None:
            value = MEASURES[self.method.quality]
        if value is None:
            raise AttachError(
                "petalface needs the quality of each image: with pt.given(model, quality=scores or a function of images)\n"
                "pt.given(model, alpha=0.5) gives both branches the same weight"
            )
        if not callable(value):
            return value
        if isinstance(value, nn.Module):
            value.eval()
        with torch.no_grad():
            return value(self.images(within))

    def images(self, within: Pass | None) -> Tensor:
        """What the model is given as images, brought back to [0, 1]: (B, C, H, W) in float32 or better."""
        images = None if within is None else within.input("pixel_values")
        if images is None and within is not None and within.args and not hasattr(within.module, "main_input_name"):
            images = within.args[0]
        if not isinstance(images, Tensor) or images.ndim != 4:
            raise AttachError(
                "petalface scores what a model is given as pixel_values (B, C, H, W), and there are none\n"
                "give scores: with pt.given(model, quality=…)"
            )
        images = images.detach().to(torch.promote_types(images.dtype, torch.float32))
        mean, std = (images.new_tensor(v).view(-1, 1, 1) for v in (self.method.image_mean, self.method.image_std))
        if not {len(mean), len(std)} <= {1, images.shape[1]}:
            raise AttachError(
                f"image_mean and image_std have {len(mean)} and {len(std)} values, but images {images.shape[1]} channels"
            )
        return images * std + mean

    def checked(self, name: str, value: Any, within: Pass | None, several: bool = True) -> Tensor:
        """Scores (B,), in float32 or better; (1,) where one is enough.

        Raises:
            AttachError: they are of another length, not finite, or want a gradient.
        """
        q = torch.as_tensor(value, device=self.threshold.device)
        if q.requires_grad:
            raise AttachError(f"{name} must not need a gradient: detach it, or compute it under torch.no_grad()")
        q = q.to(torch.promote_types(q.dtype, torch.float32))
        q = q.flatten() if q.ndim == 2 and q.shape[1] == 1 else q
        rows = None if within is None else within.batch_size
        one = not several and q.numel() == 1
        if not one and (q.ndim != 1 or rows not in (None, len(q))):
            raise AttachError(
                f"{name} is one number for each row of the batch, ({'B' if rows is None else rows},); got {tuple(q.shape)}"
            )
        if countable(q) and not bool(torch.isfinite(q).all()):
            raise AttachError(f"{name} is not finite in row {int((~torch.isfinite(q.flatten())).nonzero()[0])}")
        return q.view(-1)

    @torch.no_grad()
    def calibrate(self, host: Host, batches: Iterable[Mapping[str, Any]]) -> None:
        """Learn τ as the median of n(q), and the range of q, as far as the method asks for them.

        Raises:
            TrainingError: there is no batch, or all scores are the same.
        """
        found = []
        for batch in batches:
            within = Pass(host.model, (), batch)
            found.append(self.checked("quality", self.quality(host, within), within))
        if not found:
            raise TrainingError("petalface learns its threshold and range from data, but there is no batch")
        q = torch.cat(found)
        if self.method.normalise == "minmax":
            if q.min() == q.max():
                raise TrainingError(
                    f"all {len(q)} scores of the calibration data are {float(q[0]):g}: they have no range"
                )
            self.lowest.copy_(q.min())
            self.highest.copy_(q.max())
        if self.method.threshold == "median":
            self.threshold.copy_(self.normalised(q).quantile(0.5))
        self.known.fill_(True)


def countable(q: Tensor) -> bool:
    """Whether there are values that can be looked at: not while compiling, and not where shapes alone are computed."""
    return not (torch.compiler.is_compiling() or q.is_meta or hasattr(q, "fake_mode"))
