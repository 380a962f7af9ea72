"""p-Adapter: attention's own graph, weighed anew by how far its nodes are apart.  Wu et al. 2023, arXiv 2312.10613.

    h  <-  h + W_up ( GELU(W_gate h) ⊙ o )                                    h: output of an attention, before dropout and residual
    o_i   =  α_i Σ_j M_ij f_j + β_i f_i             α_i = 1 / (Σ_j M_ij + 2 μ / p),  β_i = α_i 2 μ / p,  so that all weights add up to 1
    M_ij  =  A_ij ‖ √(A_ij + ε) (f_i - f_j) + ε ‖^(p - 2)                     A: probabilities, after softmax and before dropout
    f     =  W_down (W_o V + b_o)                   V: values, W_o: the attention's frozen output projection;  cut into heads, as A is
    x + ffn(x)  <-  x + W_up ReLU(W_down x) + ffn(x)                          beside each ffn, from the residual stream

Across, the nodes are the queries and the encoder's values, pooled to s slots: o_i takes M_ij f_j of values alone. μ = μ₀ (2 + tanh θ).
p = 2 is one step of message passing over A; below, a node trusts those most that are like it, itself above all.

Sits     after each attention, self and cross, and beside each ffn, of the text side where there is one.
Trains   3 d r + 2 r + d + 2 numbers per attention, 2 d r + r + d per ffn.
Starts   near the backbone with `init="bert"`, at it with `init="zero_up"`.
Merges   no: the weights of its graph are other ones for each input.

Only the q x s weights that are used are ever formed. In decoding with a cache the graph is that of the row so far, which gives what one pass
over the whole text gives; `reference_cache=True` takes queries and cached values instead, as the reference does. Both count from float32.
The paper trains with a learning rate of 3e-4 (captions: p = 1.75, μ = 0.1) or 5e-4 (entailment: 1.5, 10, questions: 1.25, 0.1 and
pool_len = 16), weight decay 0.05, no warm-up.

Relations: `houlsby` passes h through a bottleneck alone. The reference puts h in after its dropout, petiole before, as all adapters here.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from petiole.anatomy import Anatomy, Site, Stack
from petiole.errors import AttachError, ConfigError
from petiole.method import Attended, AttendedDelta, Base, Layers, Method, Place, layers_field, stack_field, wide
from petiole.methods.adapters.bottleneck import Bottleneck

Target = Literal["self", "cross", "ffn"]
KINDS: dict[str, Target] = {"attention": "self", "cross_attention": "cross"}


class PAdapter(Method):
    """Adapters that weigh the attention map anew, by a p-Laplacian."""

    slug: ClassVar[str] = "p-adapter"
    title: ClassVar[str] = "p-Laplacian Adaptation for Generative Pre-trained Vision-Language Models"
    paper: ClassVar[str] = "2312.10613"
    saves: ClassVar[str] = "optimiser state and checkpoint"
    learning_rates: ClassVar[tuple[float, float]] = (1e-4, 1e-2)

    p_self: float = Field(1.5, gt=0, description="p at self-attentions, where it starts.")
    p_cross: float = Field(1.5, gt=0, description="p at cross-attentions.")
    learnable_p: bool = Field(True, description="Train p, one for each attention.")
    clamp_p: tuple[float, float] = Field((1.0, 3.0), description="Bounds of p, above 0.")
    mu: float = Field(0.1, gt=0, description="μ₀; μ trains between μ₀ and 3 μ₀, and starts at 2 μ₀.")
    reduction_factor: int = Field(
        8, ge=1, description="Width of the backbone over that of f; it divides a head's width."
    )
    ffn_reduction_factor: int = Field(8, ge=1, description="The same beside each ffn.")
    pool_len: int = Field(24, ge=1, description="s: slots that the encoder's values are pooled to.")
    row_scale: Literal["mean", "sum"] = Field(
        "mean", description="Pooled A as the mean of each bin, so that rows add up to about s / S; or with rows of 1."
    )
    cross_source_term: Literal["none", "self"] = Field(
        "none", description="self: β_i f_i of the query itself across, too, which the reference has not."
    )
    reference_cache: bool = Field(False, description="With a cache: nodes are queries and cached values.")
    eps: float = Field(1e-8, gt=0, description="ε.")
    targets: tuple[Target, ...] = Field(("self", "cross", "ffn"), min_length=1, description="Which sub-layers.")
    init: Literal["bert", "zero_up"] = Field(
        "bert", description="bert: all projections normal(0, 0.02²); zero_up: W_up = 0."
    )
    layers: Layers = layers_field()
    stack: str | None = stack_field()

    @model_validator(mode="after")
    def bounded(self) -> Self:
        low, high = self.clamp_p
        if not 0 < low <= high:
            raise ConfigError(f"PAdapter.clamp_p = {self.clamp_p}: two bounds with 0 < low <= high")
        for name in ("p_self", "p_cross"):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"PAdapter.{name} = {getattr(self, name)}: within clamp_p, {low:g} to {high:g}")
        return self

    def deltas(self, anatomy: Anatomy) -> Iterator[Place]:
        for stack in self.stacks(anatomy):
            for site in anatomy.attentions(self.layers, stack.name):
                if KINDS[site.role] in self.targets:
                    yield Place(site.at("output"), self.after(anatomy, site), read=site)
            for site in anatomy.sites(["ffn"], self.layers, stack.name) if "ffn" in self.targets else ():
                yield Place(site.at("output"), self.beside(site), read=anatomy.residual(site))

    def stacks(self, anatomy: Anatomy) -> list[Stack]:
        """The one that was asked for; else all but towers that see or hear beside one that reads."""
        if self.stack:
            return [anatomy.stack(self.stack)]
        return [stack for stack in anatomy.stacks if stack.name not in ("vision", "audio")] or list(anatomy.stacks)

    def after(self, anatomy: Anatomy, site: Site) -> PLaplacian:
        output = anatomy.part(site, "o")
        if output is None or not site.heads:
            raise AttachError(f"p-adapter: {site.key} has no output projection and heads that petiole knows")
        size, width = site.out_features, site.out_features // site.heads
        if size % site.heads or width % self.reduction_factor:
            raise AttachError(
                f"p-adapter: reduction_factor = {self.reduction_factor} does not divide the head width {width} of {site.key}\n"
                f"allowed: {', '.join(str(n) for n in range(1, width + 1) if width % n == 0)}"
            )
        return PLaplacian(size, size // self.reduction_factor, output, KINDS[site.role], self)

    def beside(self, site: Site) -> Bottleneck:
        bottleneck = site.in_features // self.ffn_reduction_factor
        if bottleneck < 1:
            raise AttachError(
                f"p-adapter: ffn_reduction_factor = {self.ffn_reduction_factor} leaves nothing of {site.key}: 1 to {site.in_features}"
            )
        init: Literal["bert", "lora"] = "bert" if self.init == "bert" else "lora"
        return Bottleneck(site.in_features, bottleneck, init=init, out_size=site.out_features)


class PLaplacian(AttendedDelta):
    """What an attention computed, h (B, T, d) -> W_up (GELU(W_gate h) ⊙ o) (B, T, d)

    Args:
        size: d. bottleneck: r, a multiple of the number of heads. output: the output projection.
        kind: self or cross. method: for its options.
    """

    def __init__(self, size: int, bottleneck: int, output: Site, kind: Target, method: PAdapter) -> None:
        super().__init__()
        self.output, self.kind, self.method = output, kind, method
        self.down = nn.Linear(size, bottleneck)
        self.gate = nn.Linear(size, bottleneck)
        self.up = nn.Linear(bottleneck, size)
        self.p = nn.Parameter(torch.empty(()), requires_grad=method.learnable_p)
        self.theta = nn.Parameter(torch.empty(()))

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        for layer in (self.down, self.gate, self.up):
            layer.weight.normal_(0, 0.02, generator=generator)
            layer.bias.zero_()
        if self.method.init == "zero_up":
            self.up.weight.zero_()
        self.p.fill_(self.method.p_self if self.kind == "self" else self.method.p_cross)
        self.theta.zero_()

    @property
    def mu(self) -> Tensor:
        """μ, between μ₀ and 3 μ₀"""
        return self.method.mu * (2 + torch.tanh(wide(self.theta)))

    def forward(self, attended: Attended, h: Tensor) -> Tensor:
        A, value = attended.probabilities, attended.value
        queries = self.kind == "cross" or (self.method.reference_cache and value.shape[2] != h.shape[1])
        if self.kind == "cross":
            A, value = pooled(A, value, self.method.pool_len, self.method.row_scale)
        f = self.features(value)
        if queries:
            own = self.features(attended.query)
        else:
            own = f[:, :, f.shape[2] - h.shape[1] :]  # of the tokens that ask; before them stands what is cached
        with torch.autocast(h.device.type, enabled=False):  # ε is lost in half precision
            p = wide(self.p).clamp(*self.method.clamp_p)
            keeps = not queries or self.method.cross_source_term == "self"
            o = messages(wide(A), wide(own), wide(f), p, self.mu, self.method.eps, keeps=keeps)
        kind = h.dtype
        if not torch.is_autocast_enabled(h.device.type):
            h = h.to(self.gate.weight.dtype)
        gate = nn.functional.gelu(self.gate(h))
        return self.up(gate * o.transpose(1, 2).flatten(2).to(gate.dtype)).to(kind)

    def features(self, heads: Tensor) -> Tensor:
        """Heads (B, H, n, d / H) -> f (B, H, n, r / H)"""
        output = Base(self.output, self.host.module(self.output.path))  # as it is; what other adaptations add stays out
        heads = heads.transpose(1, 2)
        h = heads.flatten(2)
        if not torch.is_autocast_enabled(h.device.type):
            h = h.to(self.down.weight.dtype)
        # W_down (W_o V + b_o) as one product with W_down W_o, which is narrow
        down, inner = self.down.weight, output.bias
        bias = self.down.bias if inner is None else self.down.bias + down @ inner.to(down.dtype)
        f = nn.functional.linear(h, down @ output.weight.to(down.dtype), bias)
        return f.unflatten(-1, (heads.shape[2], -1)).transpose(1, 2)


def messages(A: Tensor, own: Tensor, f: Tensor, p: Tensor, mu: Tensor, eps: float, *, keeps: bool) -> Tensor:
    """o (B, H, q, rh) of nodes `own` (B, H, q, rh) that attend with A (B, H, q, n) to nodes f (B, H, n, rh).

    ε inside the norm is added as ε² rh under its root, which differs by less than 1e-6 of it. Distances are taken by differences, not by
    a product: nodes that are alike have 0 exactly, and weigh most.

    Args:
        keeps: with the source term β_i f_i.
    """
    distance = torch.cdist(own, f, compute_mode="donot_use_mm_for_euclid_dist")
    M: Tensor = Reweighed.apply(A.to(f.dtype), distance, p, f.shape[-1], eps)
    source = 2 * mu / p
    alpha = 1 / (M.sum(-1, keepdim=True) + source)
    o = alpha * (M @ f)
    return o + alpha * source * own if keeps else o


class Reweighed(torch.autograd.Function):
    """A and distances (B, H, q, n), p () -> M (B, H, q, n), as one node, which keeps three numbers for each pair.

    Args:
        width: rh.
    """

    @staticmethod
    def forward(ctx: Any, A: Tensor, distance: Tensor, p: Tensor, width: int, eps: float) -> Tensor:
        logs = distance.square().mul_(A + eps).add_(eps**2 * width).log_()  # of the squared norm
        ctx.save_for_backward(A, distance, p, logs)
        ctx.eps = eps
        return (logs * ((p - 2) / 2)).exp_().mul_(A)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        A, distance, p, logs = ctx.saved_tensors
        power = (p - 2) / 2
        through = (logs * power).exp_().mul_(gradients[0])  # A is a factor
        weighed = through * A
        toward_p = (weighed * logs).sum() / 2
        inside = weighed.mul_(torch.exp(-logs)).mul_(power).mul_(distance)  # the squared norm, over its distance
        toward_A = through.addcmul_(inside, distance)
        return toward_A, inside.mul_(A + ctx.eps).mul_(2), toward_p, None, None


def pooled(A: Tensor, value: Tensor, slots: int, row_scale: Literal["mean", "sum"]) -> tuple[Tensor, Tensor]:
    """A (B, H, T, S) and values (B, H, S, d) -> (B, H, T, s), (B, H, s, d), by adaptive average pooling over S."""
    length = value.shape[2]
    if slots > length and not torch.compiler.is_compiling():
        warnings.warn(
            f"p-adapter: pool_len = {slots} is above the {length} tokens there are: some stand twice", stacklevel=2
        )

    def pool(x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool1d(x.flatten(0, 1), slots).unflatten(0, x.shape[:2])

    A, value = pool(A), pool(value.mT).mT
    if row_scale == "sum":  # a query that sees nothing has a row of zeros
        A = A / A.sum(-1, keepdim=True).clamp_min(torch.finfo(A.dtype).tiny)
    return A, value
