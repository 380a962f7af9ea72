"""What an adaptation changes, module by module, as factors: ΔW = scale · B A, exactly where it factors, else by SVD."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from petiole.adaptation import Adaptation
from petiole.anatomy import Anatomy, Site
from petiole.errors import AttachError
from petiole.interop.readers import Reader, refuse_site
from petiole.junction import Slot
from petiole.merge import in_order
from petiole.method import Base, WeightDelta, composed, plain, view, view_bias, wide
from petiole.methods.lowrank.dora import Decomposed
from petiole.methods.lowrank.factors import Factors

Parts = tuple[Tensor, Tensor, float, Tensor | None]  # A (r, in, *kernel), B (out, r), scale, Δb of a site's rows


@dataclass
class Change:
    """The change of one module.

    Attributes:
        site: the whole module: no rows, as it stands in the anatomy. key: of the site or sites that change it, for people.
        A: (r, in, *kernel). B: (out, r). bias: Δb (out,) or None. magnitude: DoRA's m (out,) or None.
        error: ‖ΔW - scale · B A‖ / ‖ΔW‖, 0 where it factors. needed: the rank that would keep within the bound.
        exact: ΔW as it is, (out, in, *kernel).
    """

    site: Site
    key: str
    A: Tensor
    B: Tensor
    scale: float
    bias: Tensor | None
    magnitude: Tensor | None
    error: float
    needed: int
    exact: Callable[[], Tensor]

    @property
    def path(self) -> str:
        return self.site.path

    @property
    def rank(self) -> int:
        return self.A.shape[0]


def whole_sites(found: Anatomy) -> dict[str, Site]:
    """The site that is a whole called module, by its path; task heads left out."""
    sites: dict[str, Site] = {}
    every = [site for stack in found.stacks for block in stack.blocks for site in block.sites]
    for site in [*every, *found.outside]:
        plain_site = site.kind in ("linear", "conv", "embedding") and not site.rows and site.expert < 0 and site.called
        if plain_site and site.role != "head":
            sites.setdefault(site.path, site)
    return sites


def collect(adaptation: Adaptation, reader: Reader, rank: int | None, max_error: float, biases: bool) -> list[Change]:
    """The changes of all modules.

    Args:
        rank: the largest wanted; None for as small as `max_error` allows.
        biases: whether changes of biases trained in place belong to their module's change.

    Raises:
        AttachError: something is no change of a weight that the reader could be given.
    """
    sites = whole_sites(adaptation.host.anatomy)
    groups: dict[str, list[Slot]] = {}
    for slot in in_order(adaptation.slots):
        if slot.site.kind == "parameter":
            raise AttachError(
                f"{slot.site.key}: {slot.site.parameter} of {slot.site.path} is read past its module, where no LoRA could sit\n"
                "merge the adaptation and ship the model instead"
            )
        if not hasattr(slot.delta, "weight") or slot.place.read is not None:
            raise AttachError(
                f"{slot.site.key}: {type(slot.delta).__name__} is no change of a weight, so no LoRA can stand for it\n"
                "save() keeps it in petiole's own file"
            )
        groups.setdefault(slot.site.path, []).append(slot)
    for name in adaptation.own:
        owner, _, attribute = name.rpartition(".")
        if owner in sites and attribute == sites[owner].parameter:
            if len(adaptation.host.places_of(name)) > 1:
                raise AttachError(
                    f"{name} is tied to another weight, and an export would change one of them\nship the whole model instead"
                )
            groups.setdefault(owner, [])
    dora = reader.dora and all(natural(slots) for slots in groups.values())
    dora = dora and any(type(slot.delta) is Decomposed for slots in groups.values() for slot in slots)
    made = []
    for path, slots in groups.items():
        site = sites.get(path)
        if site is None:
            raise AttachError(f"{slots[0].site.key}: {path} is no module that PEFT could name")
        refuse_site(reader, adaptation.model, slots[0].site.key if slots else site.key, site)
        made.append(change_of(adaptation, site, slots, dora, rank, max_error, biases))
    return made


def natural(slots: Sequence[Slot]) -> bool:
    """Whether the changes of a module are LoRA or DoRA on linears, each on rows of its own."""
    spans = sorted(span for slot in slots for span in slot.site.rows or ((0, slot.site.out_features),))
    apart = all(stop <= start for (_, stop), (start, _) in pairwise(spans))
    kinds = all(slot.site.kind == "linear" and (type(slot.delta) is Decomposed or direct(slot)) for slot in slots)
    return bool(slots) and kinds and apart


def direct(slot: Slot) -> Parts | None:
    """The factors of a change that is nothing more than its factors."""
    delta = slot.delta
    if isinstance(delta, Factors) and type(delta).weight is Factors.weight:
        return (
            delta.A.detach(),
            delta.B.detach(),
            delta.scale,
            None if delta.delta_bias is None else delta.delta_bias.detach(),
        )
    if not isinstance(delta, WeightDelta):
        return None
    training = delta.training
    delta.eval()  # dropout is no part of what is shipped
    try:
        with torch.no_grad():
            parts = delta.factored()
            if parts is None:
                return None
            A, B, scale, bias, *core = parts  # ΔW = scale · B C A, where there is a core C
            B = B if not core else B * core[0] if core[0].ndim == 1 else B @ core[0]
            return A.detach(), B.detach(), scale, bias
    finally:
        delta.train(training)


def change_of(
    adaptation: Adaptation, site: Site, slots: list[Slot], dora: bool, rank: int | None, max_error: float, biases: bool
) -> Change:
    module = adaptation.host.module(site.path)
    key = ", ".join(dict.fromkeys(slot.site.key for slot in slots)) or site.key
    own = {name for name in adaptation.own if name.rpartition(".")[0] == site.path}
    trained = f"{site.path}.{site.parameter}" in own

    def exact() -> Tensor:
        return weight_change(adaptation, site, slots)

    bias = bias_change(adaptation, site, slots, biases)
    parts = [direct(slot) for slot in slots]
    magnitude = None
    if dora and not trained:
        A, B, scale = joined(site, slots, [own_factors(slot) for slot in slots])
        base = Base(site, module).weight
        magnitude = Decomposed.norm(stand_in(A, B, scale), base)
        for slot in slots:
            if type(slot.delta) is Decomposed:
                magnitude[rows_of(slot.site)] = slot.delta.magnitude.detach().to(magnitude)
        error, needed = 0.0, A.shape[0]
        if rank is not None and A.shape[0] > rank:
            raise AttachError(f"{key}: a DoRA change of rank {A.shape[0]} can't be cut to rank {rank}; leave rank out")
    elif slots and all(part is not None for part in parts) and not trained:
        A, B, scale = joined(site, slots, [part[:3] for part in parts if part is not None])
        error, needed = 0.0, A.shape[0]
        if rank is not None and A.shape[0] > rank:
            A, B, error, needed = limited((scale * B) @ A.flatten(1), rank, max_error)
            scale = 1.0
    else:
        A, B, error, needed = limited(exact().flatten(1), rank, max_error)
        scale = 1.0
    kernel = site.kernel if site.kind == "conv" else ()
    return Change(site, key, A.reshape(A.shape[0], -1, *kernel), B, scale, bias, magnitude, error, needed, exact)


def own_factors(slot: Slot) -> tuple[Tensor, Tensor, float]:
    """A, B and scale of a LoRA or DoRA delta."""
    if type(slot.delta) is Decomposed:
        return slot.delta.A.detach(), slot.delta.B.detach(), slot.delta.scale
    parts = direct(slot)
    assert parts is not None
    return parts[:3]


def stand_in(A: Tensor, B: Tensor, scale: float) -> Decomposed:
    """A DoRA delta of these factors, for its norm."""
    made = Decomposed.__new__(Decomposed)
    nn.Module.__init__(made)
    made.A, made.B, made.scale = nn.Parameter(A), nn.Parameter(B), scale
    return made


def rows_of(site: Site) -> Tensor:
    """Indices of the rows of the whole weight that belong to a site."""
    spans = site.rows or ((0, site.out_features),)
    return torch.cat([torch.arange(start, stop) for start, stop in spans])


def joined(
    site: Site, slots: Sequence[Slot], factors: Sequence[tuple[Tensor, Tensor, float]]
) -> tuple[Tensor, Tensor, float]:
    """Factors on parts of a module as factors on the whole: the A stacked, each B in a block of its own rows and columns."""
    scale = factors[0][2]
    As, Bs = [], []
    for slot, (A, B, own) in zip(slots, factors, strict=True):
        if slot.site.rows:
            whole = B.new_zeros(site.out_features, B.shape[1])
            whole[rows_of(slot.site).to(B.device)] = B
            B = whole
        As.append(A)
        Bs.append(B if own == scale else B * (own / scale))
    return torch.cat(As), torch.cat(Bs, 1), scale


def weight_change(adaptation: Adaptation, site: Site, slots: Sequence[Slot]) -> Tensor:
    """ΔW (out, in, *kernel) of a module: everything that the adaptation does to its weight, in order."""
    with torch.no_grad():
        now = gathered(adaptation.host.tensor(f"{site.path}.{site.parameter}"))
        before = adaptation.own.get(f"{site.path}.{site.parameter}", now)
        whole = wide(now)
        for slot in slots:
            change = slot.delta.weight(view(slot.site, whole))
            whole = composed(whole, [(slot.site, change, True)])
        return view(site, whole - wide(before))


def bias_change(adaptation: Adaptation, site: Site, slots: Sequence[Slot], trained: bool) -> Tensor | None:
    """Δb (out,) of a module, None where the bias is left alone."""
    if not site.bias:
        return None
    module = adaptation.host.module(site.path)
    with torch.no_grad():
        now = Base(site, module).bias
        if now is None:
            return None
        before = adaptation.own.get(f"{site.path}.{site.bias}", now) if trained else now
        whole = wide(now)
        for slot in slots:
            change_of = getattr(slot.delta, "bias", None)
            change = None if change_of is None else change_of(view_bias(slot.site, whole))
            if change is not None:
                whole = composed(whole, [(slot.site, change, False)])
        change = whole - wide(before)
        return (
            change
            if bool(change.any()) or any(getattr(s.delta, "delta_bias", None) is not None for s in slots)
            else None
        )


def gathered(tensor: Tensor) -> Tensor:
    """A weight as ordinary numbers, whole: dequantised, and put together where it is sharded."""
    full = getattr(tensor, "full_tensor", None)
    return (full() if full is not None else plain(tensor)).detach()


def limited(change: Tensor, rank: int | None, max_error: float) -> tuple[Tensor, Tensor, float, int]:
    """ΔW (out, in) -> A (r, in), B (out, r), the relative error, and the rank that would keep within `max_error`.

    Args:
        rank: at most this; None for the smallest that keeps within `max_error`.
    """
    precise = change.double()
    if not bool(precise.any()):
        return change.new_zeros(1, change.shape[1]), change.new_zeros(change.shape[0], 1), 0.0, 1
    U, S, V = torch.linalg.svd(precise, full_matrices=False)
    tails = (
        torch.cat([S.square().flip(0).cumsum(0).flip(0), S.new_zeros(1)]).sqrt() / S.square().sum().sqrt()
    )  # by rank kept
    noise = torch.finfo(change.dtype).eps * max(change.shape) ** 0.5  # what rounding alone would leave
    needed = max(1, int((tails > max(max_error, noise)).sum()))
    size = needed if rank is None else min(rank, max(1, int((tails > noise).sum())))
    root = S[:size].sqrt()
    A, B = (root[:, None] * V[:size]).to(change.dtype), (U[:, :size] * root).to(change.dtype)
    error = float((precise - B.double() @ A.double()).norm() / precise.norm())
    return A.contiguous(), B.contiguous(), 0.0 if error < noise else error, needed
