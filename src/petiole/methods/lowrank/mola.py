"""MoLA: mixtures of LoRA experts, more of them in higher layers.  Gao et al. 2024, arXiv 2402.08562.

    W x + b  <-  W x + b + s · Σ_e w_e B_e A_e x        A_e (r, in), B_e (out, r), s = alpha / r

    p = softmax(R x)        R (N, in): each linear has a router of its own, which every token asks
    w_e = p_e / Σ p over the K most probable experts for those, 0 for all others

How many experts a layer has is the point: "2468" gives its four quarters 2, 4, 6 and 8 of them, the input's first. Any four digits do;
where layers don't divide by four, the last quarters are the larger ones. N, K and r may also be listed, a number for each layer; in a model
of several stacks all of this holds in each.

In training each layer adds λ L to the loss, which is least where all experts are used alike. Over all tokens at all linears of the layer,
f_e is the share of choices that fell on e (without a gradient), and P_e the mean of p_e:

    L = N Σ_e f_e P_e        1 where f and P are even, N where one expert takes everything

Sits     on the named linears, all of them by default.
Trains   N (r (in + out) + in) numbers per site.
Starts   at B = 0, so the adapted model is the bare backbone, bit for bit. Until B has moved, the task's loss says nothing to R.
Merges   where N = 1, which is LoRA. Elsewhere each token has a change of its own.

`tuned.shared[0].routing()` tells for each layer what it has, and what its routers did in the last forward pass.

Relations: LoRA of rank N r is as large, and changes all tokens alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import linear

from petiole import context
from petiole.anatomy import Anatomy, Site
from petiole.errors import AttachError, TrainingError
from petiole.factored import Parts
from petiole.method import Base, Delta, Layers, Method, Moment, Place, layers_field
from petiole.methods.lowrank.factors import Product, kaiming_uniform
from petiole.methods.lowrank.origin import linears

Count = Annotated[
    int, Field(ge=1, le=999, strict=True)
]  # so that a shape without its quotes, or of three digits, is refused
Shape = Annotated[str, Field(pattern="^[1-9]{4}$")]
_PER_LAYER = "or a list, from the lowest layer on"


class MoLA(Method):
    """Several LoRA experts in each linear, of which each token takes a few."""

    slug: ClassVar[str] = "mola"
    title: ClassVar[str] = "Higher Layers Need More LoRA Experts"
    paper: ClassVar[str] = "2402.08562"
    saves: ClassVar[str] = "optimiser state and checkpoint, with room for tokens of several kinds"
    identity_at_start: ClassVar[bool] = True
    idles: ClassVar[str] = "experts that no token chose learn nothing, and a router nothing while all experts are zero"
    size: ClassVar[str] = "rank"

    num_experts: Count | tuple[Count, ...] | Shape = Field(
        "2468", description=f"Experts N of each layer: a number, four digits in quotes for its quarters, {_PER_LAYER}."
    )
    top_k: Count | tuple[Count, ...] = Field(2, description=f"Experts K that a token takes: a number, {_PER_LAYER}.")
    rank: Count | tuple[Count, ...] = Field(8, description=f"Inner width r of each expert: a number, {_PER_LAYER}.")
    alpha: float = Field(16.0, gt=0, description="Numerator of the scaling alpha / rank.")
    dropout: float = Field(
        0.05, ge=0, lt=1, description="On the input of the experts, in training; not on the router's."
    )
    balance_weight: float = Field(0.001, ge=0, description="Factor λ of the balance loss; 0 leaves it out.")
    count_padding: bool = Field(True, description="Whether padding counts in f and P.")
    router_dtype: Literal["float32", "input"] = Field(
        "float32", description="Precision of R x: float32 at least, or that of x; the softmax always takes float32."
    )
    roles: tuple[str, ...] | None = Field(None, min_length=1, description="Linears to adapt, by role; if None all.")
    layers: Layers = layers_field()

    def overrides(self, event: str) -> bool:
        return super().overrides(event) and (event != "loss" or self.balance_weight > 0)

    def sites(self, anatomy: Anatomy) -> Iterator[tuple[Site, Experts]]:
        """Each linear with what it gets.

        Raises:
            AttachError: it is in no layer, a list has another length than there are layers, or K is above N.
        """
        for site in linears(self.slug, anatomy, self.roles, self.layers):
            if site.depth < 0:
                raise AttachError(
                    f"mola: {site.key} is in no layer, so nothing says how many experts it has; leave it out"
                )
            yield site, self.allocation(site.stack, len(anatomy.stack(site.stack).blocks))[site.depth]

    def allocation(self, stack: str, depth: int) -> list[Experts]:
        """N, K and r of each layer of a stack.

        Raises:
            AttachError: as for `sites`.
        """
        columns = []
        for name in ("num_experts", "top_k", "rank"):
            value = getattr(self, name)
            numbers = quarters(value, depth) if isinstance(value, str) else value
            if isinstance(numbers, int):
                numbers = (numbers,) * depth
            if len(numbers) != depth:
                raise AttachError(
                    f"mola: {name} lists {len(numbers)} layers, but the {stack} has {depth}: list a number for each of them"
                )
            columns.append(numbers)
        found = [Experts(*numbers) for numbers in zip(*columns, strict=True)]
        for layer, experts in enumerate(found):
            if experts.top_k > experts.count:
                raise AttachError(
                    f"mola: top_k = {experts.top_k} in layer {layer} of the {stack}, which has num_experts = {experts.count}: "
                    f"choose 1 to {experts.count} there"
                )
        return found

    def deltas(self, anatomy: Anatomy) -> Iterator[Place]:
        for site, experts in self.sites(anatomy):
            yield Place(site, Mixture(self, site, experts))

    def shared(self, anatomy: Anatomy) -> Routers:
        return Routers(self, list(self.sites(anatomy)))

    def bind(self, deltas: Mapping[str, Delta], shared: nn.Module | None) -> None:
        for delta in deltas.values():
            if isinstance(delta, Mixture) and isinstance(shared, Routers):
                delta.routers = (shared,)  # in a tuple, so that it is not registered once more

    def stays(self, deltas: Mapping[str, Delta]) -> Mapping[str, str]:
        why = "each token has a change of its own where there are several experts,"
        return {key: why for key, d in deltas.items() if isinstance(d, Mixture) and d.depends_on_input}

    def loss(self, moment: Moment) -> Tensor | None:
        """λ Σ L over the layers with several experts; in the others it would be 1, whatever the router says."""
        assert isinstance(moment.shared, Routers)
        found = moment.shared.balance()
        if found is None:
            return None
        learns = any(delta.router.requires_grad for delta in moment.deltas.values() if isinstance(delta, Mixture))
        if learns and not found.requires_grad:
            raise TrainingError(
                "mola: the balance loss has no gradient: blocks are computed under re-entrant checkpointing, which cuts it off\n"
                "checkpoint with use_reentrant=False, or leave the term out: balance_weight=0"
            )
        moment.shared.forget_graph()
        return self.balance_weight * found


@dataclass(frozen=True)
class Experts:
    """What the linears of one layer get: N experts of rank r, of which a token takes K."""

    count: int
    top_k: int
    rank: int


def quarters(shape: str, depth: int) -> tuple[int, ...]:
    """A digit for each of `depth` layers, in groups as even as can be, the last ones the larger: "2468", 6 -> 2, 4, 6, 6, 8, 8."""
    each, more = divmod(depth, len(shape))
    sizes = [each + (group >= len(shape) - more) for group in range(len(shape))]
    return tuple(int(digit) for digit, size in zip(shape, sizes, strict=True) for _ in range(size))


class Mixture(Product):
    """Δy = s Σ_e w_e B_e A_e x. All experts in two products: w_e scales what is r wide in between, so nothing is scattered.

    Args:
        method: whose settings hold. site: gives the sizes. experts: N, K and r.
    """

    def __init__(self, method: MoLA, site: Site, experts: Experts) -> None:
        super().__init__(method.dropout)
        self.experts, self.scale = experts, method.alpha / experts.rank
        self.dtype = torch.float32 if method.router_dtype == "float32" else None
        self.site, self.count_padding = site, method.count_padding
        self.depends_on_input = experts.count > 1
        self.publishes = self.depends_on_input and method.balance_weight > 0
        width = experts.count * experts.rank
        self.router = nn.Parameter(torch.empty(experts.count, site.in_features))  # R (N, in)
        self.A = nn.Parameter(torch.empty(width, site.in_features))  # A_1 to A_N, one below the other (N r, in)
        self.B = nn.Parameter(torch.empty(site.out_features, width))  # B_1 to B_N, side by side (out, N r)
        self.routers: tuple[Routers, ...] = ()

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        kaiming_uniform(self.router, generator)
        kaiming_uniform(self.A, generator)
        self.B.zero_()

    def parts(self) -> Parts:
        """All experts with the same weight 1: for N = 1 that is the mixture."""
        return self.A, self.B, self.scale, None

    def factored(self) -> Parts | None:
        return None if self.depends_on_input else super().factored()

    def weight(self, base: Tensor) -> Tensor:
        if self.depends_on_input:
            raise AttachError(f"mola: {self.site.key} has a change of its own for each token, so there is no one ΔW")
        return super().weight(base)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """x (..., in) -> Δy (..., out)"""
        if not self.depends_on_input:
            return super().forward(x, base)
        w = self.route(x) * self.scale
        low = linear(x if self.dropout is None else self.dropout(x), self.A.to(x.dtype))
        gated = low.unflatten(-1, (self.experts.count, -1)) * w.to(low.dtype).unsqueeze(-1)
        return linear(gated.flatten(-2), self.B.to(low.dtype))

    def route(self, x: Tensor) -> Tensor:
        """x (..., in) -> w (..., N), in float32 at least; what the router did is noted."""
        dtype = x.dtype if self.dtype is None else torch.promote_types(x.dtype, self.dtype)
        with torch.autocast(x.device.type, enabled=False):
            logits = linear(x.to(dtype), self.router.to(dtype))
            p = logits.softmax(-1, dtype=torch.promote_types(dtype, torch.float32))
        if self.experts.top_k == self.experts.count:
            chosen = torch.ones_like(p)
            w = p
        else:
            chosen = torch.zeros_like(p).scatter_(-1, p.topk(self.experts.top_k).indices, 1)
            kept = p * chosen
            w = kept / kept.sum(-1, keepdim=True)
        self.note(x, p, chosen)
        return w

    def note(self, x: Tensor, p: Tensor, chosen: Tensor) -> None:
        """Add to the tally of this layer in this forward pass: two sums for each expert."""
        p, chosen = (p if self.publishes else p.detach()).flatten(0, -2), chosen.flatten(0, -2)
        mask = None if self.count_padding else padding(self.host, self.site, x)
        if mask is not None:
            p, chosen = p * mask[:, None], chosen * mask[:, None]
        self.routers[0].add(self.host, layer_of(self.site), torch.stack([chosen.sum(0), p.sum(0)]))


def layer_of(site: Site) -> str:
    return f"{site.stack}.{site.depth}"


def padding(host: Any, site: Site, x: Tensor) -> Tensor | None:
    """1 for each token of x (..., in), 0 for padding, flat; None where the model was given no mask for them."""
    encoder_decoder = getattr(getattr(host.model, "config", None), "is_encoder_decoder", False)
    reads_encoder = site.within == "cross_attention" and site.role in ("k", "v")
    own = encoder_decoder and site.stack == "decoder" and not reads_encoder
    name = "decoder_attention_mask" if own else "attention_mask"
    within = host.passing()
    mask = None if within is None else host.once(f"mola {name}", lambda: within.input(name))
    if mask is None or mask.ndim != 2 or site.stack == "vision":
        return None
    tokens = x.shape[:-1].numel()
    if x.ndim > 2:
        length = x.shape[-2]  # with a cache the last ones; what was put in front of the text is no padding
        mask = nn.functional.pad(mask[:, -length:], (max(0, length - mask.shape[1]), 0), value=1)
    return mask.repeat_interleave(tokens // mask.numel(), 0).flatten()


_numbers = itertools.count()


@dataclass(frozen=True)
class Routing:
    """One layer: N, K, r and the numbers that train in it; then, over all of its routers in the last forward pass, if there was one:

    Attributes:
        shares: f (N,), of the choices. probabilities: P (N,). entropy: of f, in nats: log N where all experts are chosen alike.
        loss: L.
    """

    num_experts: int
    top_k: int
    rank: int
    parameters: int
    shares: Tensor | None = None
    probabilities: Tensor | None = None
    entropy: float | None = None
    loss: float | None = None


class Routers(nn.Module):
    """What the routers of all layers did in the last forward pass. It has no tensors of its own.

    Args:
        method: whose settings hold. sites: all linears, and what they get.
    """

    def __init__(self, method: MoLA, sites: Sequence[tuple[Site, Experts]]) -> None:
        super().__init__()
        self.name = f"mola {next(_numbers)}"  # of the tallies in a forward pass, where another MoLA may have its own
        self.experts = {layer_of(site): experts for site, experts in sites}
        self.parameters_of = dict.fromkeys(self.experts, 0)
        for site, e in sites:
            count = e.count * (e.rank * (site.in_features + site.out_features) + site.in_features)
            self.parameters_of[layer_of(site)] += count
        self.tallies: dict[str, Tensor] = {}  # by layer: choices and sums of p (2, N)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "tallies": {}}  # a copy has done nothing yet

    def recipe(self) -> dict[str, Any]:
        return {"layers": {layer: [e.count, e.top_k, e.rank] for layer, e in self.experts.items()}}

    def add(self, host: Any, layer: str, tally: Tensor) -> None:
        """What one router did; in a forward pass, the first of all begins anew. What is computed again was counted already."""
        if torch.compiler.is_compiling() or not context.recomputing():
            self.tallies = host.once(self.name, dict)
            self.tallies[layer] = self.tallies[layer] + tally if layer in self.tallies else tally

    def forget_graph(self) -> None:
        """Keep the numbers alone."""
        self.tallies = {layer: tally.detach() for layer, tally in self.tallies.items()}

    def means(self, layer: str) -> tuple[Tensor, Tensor]:
        """f (N,) and P (N,)"""
        choices, sums = self.tallies[layer]
        total = choices.sum().clamp_min(1)
        return choices / total, sums * (self.experts[layer].top_k / total)

    def balance(self) -> Tensor | None:
        """Σ L over the layers with several experts; None before any forward pass."""
        losses = [balance_loss(*self.means(layer)) for layer in self.tallies]
        return sum((loss.to(losses[0].device) for loss in losses[1:]), losses[0]) if losses else None

    def routing(self) -> dict[str, Routing]:
        """By layer, such as "encoder.3". With one expert there is nothing to route, and nothing is counted."""
        found = {}
        for layer, e in self.experts.items():
            done: dict[str, Any] = {}
            if layer in self.tallies:
                f, P = (mean.detach() for mean in self.means(layer))
                entropy, loss = float(-torch.xlogy(f, f).sum()), float(balance_loss(f, P))
                done = {"shares": f, "probabilities": P, "entropy": entropy, "loss": loss}
            found[layer] = Routing(e.count, e.top_k, e.rank, self.parameters_of[layer], **done)
        return found


def balance_loss(f: Tensor, P: Tensor) -> Tensor:
    """f (N,), P (N,) -> L = N Σ f P"""
    return len(f) * (f * P).sum()
