"""What methods share that start from the base weight: where they may sit, how they read it, and how a file names it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from petiole.anatomy import Anatomy, Site
from petiole.errors import AttachError
from petiole.method import Base, Layers, raw

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
_SEVERAL = {"qkv": "q, k, v", "gate_up": "gate, up"}


def linears(
    slug: str,
    anatomy: Anatomy,
    roles: Sequence[str] | None,
    layers: Layers,
    *,
    convolutions: bool = False,
    fused: bool = True,
) -> list[Site]:
    """The linears of these roles.

    Args:
        roles: None for those of the usual seven that the backbone has.
        convolutions: whether those will do too, if they are not in groups.
        fused: whether several projections in one tensor may be taken for one weight.

    Raises:
        AttachError: a role is no linear, or is several of them.
    """
    chosen = tuple(role for role in LINEARS if role in anatomy.roles) if roles is None else tuple(roles)
    if not chosen:  # or the head alone would train, and nobody would notice
        raise AttachError(
            f"{slug}: {anatomy.model_class} has none of {', '.join(LINEARS)}; name roles it has: {', '.join(anatomy.roles)}"
        )
    sites = anatomy.sites(chosen, layers)
    for site in sites:
        linear = site.kind in ("linear", "parameter") and (convolutions or not site.kernel)
        if not linear and not (convolutions and site.kind == "conv" and site.groups == 1):
            kind = f"convolution{f' in {site.groups} groups' if site.groups > 1 else ''}" if site.kernel else site.kind
            raise AttachError(f"{slug}: {site.key} is a {kind}; it is defined for linears")
        if not fused and site.role in _SEVERAL:
            raise AttachError(f"{slug}: {site.key} is several weights in one tensor; name them: {_SEVERAL[site.role]}")
    return sites


def largest_rank(site: Site) -> int:
    """The smaller side of the weight; a convolution's kernel counts with its input."""
    return min(site.out_features, site.in_features * torch.Size(site.kernel).numel())


def check_rank(slug: str, site: Site, rank: int) -> None:
    """Raises AttachError: the weight at the site has no such rank."""
    if rank > largest_rank(site):
        raise AttachError(f"{slug}: rank = {rank}, but the weight at {site.key} allows 1 to {largest_rank(site)}")


def weight_of(slug: str, base: Base) -> Tensor:
    """The frozen W (out, in, ...), in float32 or better.

    Raises:
        AttachError: it is quantised without a way back.
    """
    own = raw(base.module, base.site.parameter)
    if not (own.is_floating_point() or own.is_quantized or type(own).dequantize is not Tensor.dequantize):
        # torch's own `dequantize` would give bare integers back without their scale
        raise AttachError(f"{slug} needs the weight at {base.site.key}, which is {own.dtype} and can't be dequantised")
    weight = base.weight
    return weight if weight.dtype == torch.float64 else weight.float()


def check_finite(slug: str, site: Site, *tensors: Tensor) -> None:
    """Raises AttachError: the weight, or the part of it that is used, is not finite."""
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise AttachError(f"{slug}: the weight at {site.key} is not finite")


def digest(*tensors: Tensor) -> str:
    """Of every byte: what is built from a weight depends on all of it."""
    total = hashlib.sha256()
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        total.update(f"{plain.dtype} {tuple(plain.shape)}\n".encode())
        total.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
