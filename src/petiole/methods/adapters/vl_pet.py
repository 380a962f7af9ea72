"""VL-PET: encoder adapters whose effect is multiplied by a learned matrix of chosen granularity.  Hu et al. 2023, arXiv 2308.09804.

    encoder   h' = h + W_up φ( W_down h + b_down ) + b_up          h  <-  s G ⊙ h'
    decoder   V  <-  V + U_up φ( U_down E + c_down ) + c_up        of the values of cross-attention alone, E (B, N, d) the encoder's output

h (B, N, d) is the output of an attention or ffn of the encoder, x (B, N, d) the residual it will be added to, φ GELU by tanh, σ the sigmoid.

    granularity   G                                                        shape       numbers
    large         σ( G_up φ( G_down x + a_down ) + a_up )                  (B, N, d)   2 d g + g + d
    middle_x      σ( w · (x + h') + b )                                    (B, N, 1)   d + 1
    middle_y      1 + γ                                                    (d)         d
    small         mean over the tokens of σ( w · [x; h'] + b )             (B, 1, 1)   2 d + 1

Besides there are `gate="full_rank"`, σ( W x + b ) with W (d, d), and in the place of the product a LayerNorm of h', or h' over its length;
`control="add"` is h <- s (h' + G). W_down (r, d) and W_up (d, r) are the heads of `head_mode` side by side: N_h times W_down (r / N_h, d),
N_h times W_up (d / N_h, r), or both. They are the same function; "paired" is not, where a head of W_up reads its own head of W_down alone.

Sits     after both sub-layers of every encoder block; beside the values of every cross-attention.
Trains   2 d r + r + d numbers and those of G for each of the former, 2 d r' + r' + d for each of the latter; the encoder's norms in place;
         what the model has of the task's own, such as a visual embedding.
Starts   where torch's linears do, so that G is near 1/2 and halves h': a high learning rate with a warm-up (1e-3, 10 % of the steps) is
         part of the method on BART. `zero_init_up` with `scale=0.3` is for T5.
Merges   no: G and φ depend on the token.

A small gate leaves padding out of its mean, so that a row does not depend on those beside it; the reference averages over all tokens. The
text that names a task ("vqa: …") is all that tells tasks apart. `VLPET.preset("t5_image", granularity="small")` gives the paper's settings.

Relations: `vl-adapter` puts adapters without a gate after all sub-layers, the decoder's too.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from petiole.anatomy import Anatomy, Site, Stack
from petiole.attach import sequence_first
from petiole.errors import AttachError
from petiole.method import Base, HiddenDelta, Layers, Place, layers_field, stack_field
from petiole.methods.adapters.bottleneck import Bottleneck
from petiole.methods.adapters.gates import (
    FullRank,
    Gating,
    Large,
    MiddleX,
    MiddleY,
    Norm,
    Small,
    gelu,
    starts_as_linear,
)
from petiole.methods.adapters.presets import Presets
from petiole.tokens import refuse_windows

Granularity = Literal["large", "middle_x", "middle_y", "small"]
Gate = Literal["learned", "full_rank", "layer_norm", "l2"]
HeadMode = Literal["down", "up", "down_up", "paired"]


class VLPET(Presets):
    """Gated adapters in the encoder, and adapters of values in the decoder's cross-attention."""

    slug: ClassVar[str] = "vl-pet"
    title: ClassVar[str] = "VL-PET: Vision-and-Language Parameter-Efficient Tuning via Granularity Control"
    paper: ClassVar[str] = "2308.09804"
    saves: ClassVar[str] = "optimiser state and checkpoint; several tasks on one backbone"
    routes: ClassVar[bool] = False
    size: ClassVar[str] = "bottleneck"
    learning_rates: ClassVar[tuple[float, float]] = (1e-4, 1e-2)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "bart_image": {},
        "bart_video": {},
        "t5_image": {"bottleneck": 192, "scale": 0.3, "zero_init_up": True},
    }
    exempt: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("llama", "gpt2"), "a decoder without cross-attention; decoder_bottleneck=None puts gated adapters there"
    )

    granularity: Granularity = Field("large", description="For what there is one factor of G each.")
    bottleneck: int = Field(96, ge=1, description="Inner width r of the encoder's adapters.")
    num_heads: int = Field(4, ge=1, description="Heads N_h, which divide r.")
    head_mode: HeadMode = Field(
        "down", description="Which projection has heads; paired: each head has both of its own."
    )
    gate_rank: int | None = Field(None, ge=1, description="Inner width g of a large gate; r if None.")
    gate: Gate = Field(
        "learned",
        description="full_rank: a large gate without a bottleneck; layer_norm, l2: a norm of h' in its place.",
    )
    control: Literal["multiply", "add"] = Field("multiply", description="What is done with G and h'.")
    scale: float = Field(1.0, gt=0, description="Factor s.")
    decoder_bottleneck: int | None = Field(
        96, ge=1, description="Inner width r' beside the values of cross-attention; None leaves decoders alone."
    )
    zero_init_up: bool = Field(False, description="All second projections start at zero, as on T5.")
    train_encoder_norms: bool = Field(True, description="The encoder's own norms train too, in place.")
    layers: Layers = layers_field()
    stack: str | None = stack_field()

    @model_validator(mode="after")
    def fields_agree(self) -> Self:
        if self.bottleneck % self.num_heads:
            raise ValueError(f"bottleneck = {self.bottleneck}: num_heads = {self.num_heads} do not divide it")
        if self.gate != "learned" and self.granularity != "large":
            raise ValueError(
                f"gate = {self.gate!r}: it has no granularity {self.granularity!r}; large, or leave it out"
            )
        if self.gate in ("layer_norm", "l2") and self.control == "add":
            raise ValueError(f"control = 'add': gate = {self.gate!r} leaves no G that could be added")
        if self.gate_rank is not None and (self.granularity != "large" or self.gate != "learned"):
            what = f"gate={self.gate!r}" if self.gate != "learned" else f"granularity={self.granularity!r}"
            warnings.warn(f"vl-pet: gate_rank = {self.gate_rank}, but {what} has no bottleneck", stacklevel=2)
        return self

    # ---- what sits where

    def deltas_on(self, anatomy: Anatomy, model: nn.Module) -> Iterator[Place]:
        for stack in self.encoders(anatomy):
            refuse_windows(model, stack.name, stack.blocks, "gates that read the residual stream")
            if self.granularity == "small" and sequence_first(model):
                raise AttachError("vl-pet: a small gate needs hidden states as (batch, time, width): batch_first=True")
            for site in anatomy.sites(["attention", "ffn"], self.layers, stack.name):
                yield Place(site.at("output"), Gated(site, self), read=anatomy.residual(site))
        if self.decoder_bottleneck is None:
            return
        for stack in filter(crosses, self.stacks(anatomy)):
            for site in anatomy.sites(["cross_attention.v"], self.layers, stack.name):
                values = Values(site.in_features, self.decoder_bottleneck, site.out_features, self.zero_init_up)
                yield Place(site.at("output"), values, read=site.at("input"))

    def stacks(self, anatomy: Anatomy) -> list[Stack]:
        return [anatomy.stack(self.stack)] if self.stack else list(anatomy.stacks)

    def encoders(self, anatomy: Anatomy) -> list[Stack]:
        """Stacks that get gated adapters: those that attend to no other.

        Raises:
            AttachError: one is a decoder, and it was not said that decoders have no values to adapt; or its gates would look ahead.
        """
        found = [stack for stack in self.stacks(anatomy) if not crosses(stack)]
        for stack in found:
            if stack.causal and self.decoder_bottleneck is not None:
                raise AttachError(
                    f"vl-pet: {stack.name} of {anatomy.model_class} is a decoder without cross-attention, whose values could be adapted\n"
                    "decoder_bottleneck=None puts gated adapters there"
                )
            if stack.causal and self.granularity == "small":
                raise AttachError(
                    f"vl-pet: a small gate of {stack.name} would see later tokens, for it is a mean over all\n"
                    "granularity='large', 'middle_x' or 'middle_y' do not"
                )
        return found

    def trains(self, anatomy: Anatomy, model: nn.Module) -> Iterable[str]:
        """Norms of the encoders' blocks, and those outside of blocks that belong to no decoder."""
        if not self.train_encoder_norms:
            return
        encoders = self.encoders(anatomy)
        others = [stack for stack in anatomy.stacks if stack not in encoders]
        owners = tuple(f"{path.rpartition('.')[0]}." for stack in others for path in stack.containers)
        outside = [site for site in anatomy.outside if not site.path.startswith(owners)] if encoders else []
        for site in (*(site for stack in encoders for block in stack.blocks for site in block.sites), *outside):
            if site.role == "norm":
                yield from (f"{site.path}.{name}" for name, _ in model.get_submodule(site.path).named_parameters())


def crosses(stack: Stack) -> bool:
    """Whether a stack attends to another."""
    return any(site.role == "cross_attention" for block in stack.blocks for site in block.sites)


# -------------------------------------------------------------------------------------------------------------------------- encoder


class Gated(HiddenDelta):
    """x (B, N, d), h (B, N, d) -> s G ⊙ h', or s (h' + G)

    Args:
        site: of the sub-layer. method: its sizes and forms.

    Raises:
        AttachError: heads do not divide d.
    """

    composition = "replace"
    reads_both = True

    def __init__(self, site: Site, method: VLPET) -> None:
        super().__init__()
        d, r, heads = site.out_features, method.bottleneck, method.num_heads
        if d % heads and method.head_mode != "down":
            raise AttachError(
                f"vl-pet: num_heads = {heads} do not divide {site.key}, which is {d} wide, as head_mode = {method.head_mode!r} needs"
            )
        self.site = site
        self.scale, self.adds, self.zero_init_up = method.scale, method.control == "add", method.zero_init_up
        self.down = nn.Linear(d, r)
        self.up = PairedUp(r, d, heads) if method.head_mode == "paired" else nn.Linear(r, d)
        self.gate = gate_of(d, method)

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        starts_as_linear(self.down, generator)
        starts_as_linear(self.up, generator, self.zero_init_up)
        self.gate.initialise(generator, self.zero_init_up)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        kind, autocast = self.down.weight.dtype, torch.is_autocast_enabled(h.device.type)
        read = h if autocast else h.to(kind)
        changed = read + self.up(gelu(self.down(read)))  # h'
        with torch.autocast(h.device.type, enabled=False):  # a stream that is not normed overflows in half precision
            x, changed = x.to(kind), changed.to(kind)
            if isinstance(self.gate, Norm):
                return self.scale * self.gate(changed)
            unpadded = self.host.unpadded(self.site, h) if isinstance(self.gate, Small) else None
            G = self.gate(x, changed, unpadded)
            return self.scale * (changed + G if self.adds else G * changed)


class PairedUp(nn.Module):
    """Heads side by side (..., r) -> (..., d): each reads its own r / N_h features and gives its own d / N_h."""

    def __init__(self, bottleneck: int, size: int, heads: int) -> None:
        super().__init__()
        self.in_features = bottleneck // heads
        self.weight = nn.Parameter(torch.empty(heads, size // heads, bottleneck // heads))
        self.bias = nn.Parameter(torch.empty(size))

    def forward(self, z: Tensor) -> Tensor:
        z = z.unflatten(-1, (self.weight.shape[0], -1))
        return torch.einsum("...hr,hdr->...hd", z, self.weight.to(z.dtype)).flatten(-2) + self.bias.to(z.dtype)


def gate_of(size: int, method: VLPET) -> Gating:
    """The gate of a sub-layer of width d."""
    if method.gate in ("layer_norm", "l2"):
        return Norm(size, length=method.gate == "l2")
    if method.gate == "full_rank":
        return FullRank(size)
    if method.granularity == "large":
        return Large(size, method.gate_rank or method.bottleneck)
    kinds: dict[str, type[MiddleX | MiddleY | Small]] = {"middle_x": MiddleX, "middle_y": MiddleY, "small": Small}
    return kinds[method.granularity](size)


# -------------------------------------------------------------------------------------------------------------------------- decoder


class Values(Bottleneck):
    """E (B, N, d) -> ΔV (B, N, d_v). With a cache of keys and values it is computed once for each source.

    Args:
        size: d. bottleneck: r'. out_size: d_v. zero_init_up: start at the frozen values.
    """

    def __init__(self, size: int, bottleneck: int, out_size: int, zero_init_up: bool) -> None:
        super().__init__(size, bottleneck, activation="gelu_tanh", out_size=out_size)
        self.zero_init_up = zero_init_up

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        starts_as_linear(self.down, generator)
        starts_as_linear(self.up, generator, self.zero_init_up)
