"""IAA: adapters inside of a frozen encoder, connected by bottlenecks aside of it.  Ma et al. 2022, arXiv 2208.09847.

    BN(z) = W_up σ(W_down z)        W_down (a, d), W_up (d, a), without a residual of its own, added after Add & Norm
    sublayer (IAA-S)    h = LN1(x + a') + BN1(x),  y = LN2(h + f'(h)) + BN2(h)
    layer    (IAA-L)    h = LN1(x + a'),           y = LN2(h + f'(h)) + BN(x)
    model    (IAA-M)    Y = Encoder(X) + BN(X)     X: input of the first block, Y: output of the last

Sits     beside every sub-layer, every block or every stack; a' and f' have the inside modules in them: an adapter each, LoRA, prefixes, MAM.
Trains   per layer 2 · 2 d r inside (adapter), and 2 · 2 d a (S) or 2 d a (L) aside; 2 d a in all (M). Biases if asked for.
Starts   at W_up = 0: the bare backbone, bit for bit (prefixes aside).
Merges   no: σ stands in between.

S and L join the inside modules by a path that crosses no frozen sub-layer. In a pre-norm model, L adds to the residual stream after the
block, x <- Block(x) + BN(x), and S is refused: there the stream itself goes around the sub-layers. M gives the first token of a text the
same vector whatever the text is, so it wants a head that reads all tokens. r = 160, a = 960 makes M 6.7 % of BERT-base; the printed
r = 185 makes it 7.6 %.

Relations: the inside alone is `houlsby`; a side network (`lst`) needs no gradient through the backbone, this does.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator
from torch import nn

from petiole.anatomy import Anatomy, Block, Site, Stack
from petiole.errors import AttachError
from petiole.method import Layers, Method, Place, layers_field, stack_field
from petiole.methods.adapters.bottleneck import Activation, Bottleneck, inserted
from petiole.methods.adapters.composed import Composed
from petiole.methods.adapters.mam import MAM
from petiole.methods.lowrank.lora import LoRA
from petiole.methods.prompts.prefix import PrefixTuning

Connect = Literal["sublayer", "layer", "model"]
ALIASES = {"S": "sublayer", "L": "layer", "M": "model"}


class IAA(Composed):
    """Adapters within, and bottlenecks around, sub-layers, blocks or the stack."""

    slug: ClassVar[str] = "iaa"
    title: ClassVar[str] = (
        "Scattered or Connected? An Optimized Parameter-efficient Tuning Approach for Information Retrieval"
    )
    paper: ClassVar[str] = "2208.09847"
    saves: ClassVar[str] = "optimiser state and checkpoint; converges faster than adapters of its size"
    identity_at_start: ClassVar[bool] = True
    size: ClassVar[str] = "r"

    connect: Connect = Field("layer", description="What the aside bottlenecks go around; S, L and M for short.")
    inside: Literal["adapter", "lora", "prefix", "mam", "none"] = Field(
        "adapter", description="What stands inside: adapters after attention and ffn, LoRA on q and v, prefixes, MAM."
    )
    r: int = Field(12, ge=1, description="Bottleneck of the inside adapters; rank, or length.")
    aside_r: int = Field(12, ge=1, description="Bottleneck of the aside modules.")
    activation: Activation = Field("relu", description="σ.")
    init: Literal["zero_up", "normal"] = Field(
        "zero_up", description="zero_up: starts as the bare backbone; normal: both projections normal(0, 0.02²)."
    )
    bias: bool = Field(False, description="Whether projections have biases; the paper's counts leave them out.")
    layers: Layers = layers_field()
    stack: str | None = stack_field()

    @field_validator("connect", mode="before")
    @classmethod
    def spelled_out(cls, connect: Any) -> Any:
        return ALIASES.get(connect, connect) if isinstance(connect, str) else connect

    def deltas_on(self, anatomy: Anatomy, model: nn.Module) -> Iterator[Place]:
        if self.inside == "none":
            warnings.warn("iaa: inside='none', so the aside path connects nothing and is all that trains", stacklevel=2)
        yield from super().deltas_on(anatomy, model)

    def parts(self) -> Sequence[Method]:
        where: dict[str, Any] = {"layers": self.layers, "stack": self.stack}
        shape = {"activation": self.activation, "bias": self.bias, "init": "lora" if self.init == "zero_up" else "bert"}
        roles = tuple(f"{self.stack}:{role}" if self.stack else role for role in ("q", "v"))
        inside: dict[str, Method] = {
            "adapter": Inside(r=self.r, shape=shape, **where),
            "lora": LoRA(rank=self.r, alpha=self.r, roles=roles, layers=self.layers),
            "prefix": PrefixTuning(length=self.r, reparametrisation="none", **where),
            "mam": MAM(bottleneck=self.r, length=self.r, **where),
        }
        aside = Aside(connect=self.connect, r=self.aside_r, shape=shape, **where)
        return [inside[self.inside], aside] if self.inside != "none" else [aside]


class Part(Method):
    """What the two kinds of bottleneck have in common."""

    r: int
    shape: dict[str, Any]
    layers: Layers
    stack: str | None


class Inside(Part):
    """A bottleneck after each attention and each ffn, before Add & Norm."""

    def deltas(self, anatomy: Anatomy) -> Iterator[Place]:
        sites = [*anatomy.attentions(self.layers, self.stack), *anatomy.sites(["ffn"], self.layers, self.stack)]
        yield from inserted(anatomy, sites, "sequential", self.r, **self.shape)


class Aside(Part):
    """A bottleneck around each sub-layer, each block, or each stack."""

    connect: Connect

    def deltas(self, anatomy: Anatomy) -> Iterator[Place]:
        for stack in [anatomy.stack(self.stack)] if self.stack else anatomy.stacks:
            if self.connect == "model":
                first, last = (block_site(stack.blocks[depth]) for depth in (0, -1))
                yield self.around(first.at("input"), last.at("output"))
                continue
            for site in anatomy.sites(["block"], self.layers, stack.name):
                if self.connect == "layer":
                    yield self.around(site.at("input"), site.at("output"))
                    continue
                read = site.at("input")
                for norm in norms_of(anatomy, stack, site):
                    yield self.around(read, norm.at("output"))
                    read = norm.at("output")  # after what has just been added there

    def around(self, read: Site, write: Site) -> Place:
        """A bottleneck from one site to another.

        Raises:
            AttachError: they are of another width.
        """
        if read.size != write.size:
            raise AttachError(
                f"iaa: {write.key} is {write.size} wide, {read.key} is {read.size}; a path needs one width"
            )
        return Place(write, Bottleneck(read.size, self.r, **self.shape), read=read)


def block_site(block: Block) -> Site:
    return next(site for site in block.sites if site.role == "block")


def norms_of(anatomy: Anatomy, stack: Stack, block: Site) -> list[Site]:
    """The norms that end the sub-layers of a post-norm block, in order.

    Raises:
        AttachError: it is not one.
    """
    sites = stack.blocks[block.depth].sites
    ffn = next((site for site in sites if site.role == "ffn"), None)
    count = sum(site.role in ("attention", "cross_attention", "ffn") for site in sites)
    norms = [site for site in sites if site.role == "norm" and not site.within]
    if ffn is None or len(norms) != count or anatomy.closing_norm(ffn) != norms[-1]:
        raise AttachError(
            f"connect='sublayer': no norm is known to end each sub-layer of {block.key} of {anatomy.model_class}\n"
            "connect='layer' goes around the blocks of any model"
        )
    return norms
