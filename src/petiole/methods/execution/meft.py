"""MEFT: adapters that make a pre-trained transformer reversible, so that activations need not be kept.  Liao et al. 2023, arXiv 2306.00477.

    y1 = λ x1 + F(x2),   y2 = β x2 + G(y1)        streams (B, N, d), at first both h_0; h = (x1 + x2) / 2 after the last block

    variant 1    F: the block, G: an adapter        the next block receives (y2, y1)        λ = 0.1, β = 1
    variant 2    F: an adapter, G: the block        the next block receives (y2, y1)        λ = 1, β = 0.1
    variant 3    F: the block's attention half with an adapter, G: its feed-forward half    λ = 0.1, β = 0.1

    A(x) = W_up f(W_down x + b_down) + b_up        W_down (r, d), W_up (d, r), f and its dropout the model's own

Sits     F and G in every block's stead; a parallel adapter at each ffn; in variant 3 another one behind attention's output projection.
Trains   2 (2 d r + r + d) numbers per block, and 2 d more with a LayerNorm before the reversing adapter.
Starts   near the backbone: each A begins close to 0, all its weights normal(0, 0.02²), so one stream is the model's hidden state but
         for λ or β times the other.
Merges   no: the network has two streams for good.

Blocks are the frozen ones, whole, with their own residuals and norms. In training the adapters' dropout and the block's own are replayed.
Attention's adapter acts before that sub-layer's dropout, which has no place of its own in most models (the paper's acts behind it).
Blocks with cross-attention are taken whole, by variants 1 and 2; variant 3 refuses them.
`reconstruction_error` of `petiole.methods.execution.reversible` says how far the way back is off.

Relations: gradient checkpointing keeps every block's input and takes the same time; LoRA keeps everything and is faster.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from petiole.anatomy import Anatomy, Stack
from petiole.errors import AttachError, ConfigError
from petiole.method import Base, Method, Moment, Place, stack_field
from petiole.methods.adapters.bottleneck import Activation, Bottleneck
from petiole.methods.execution.halves import Halves
from petiole.methods.execution.reversible import AnchorEvery, Line, Put, Reversible

SCALES = {1: (0.1, 1.0), 2: (1.0, 0.1), 3: (0.1, 0.1)}  # λ, β by variant
ACTIVATIONS: dict[str, Activation] = {  # by the names that configurations use
    "relu": "relu", "silu": "silu", "swish": "silu", "tanh": "tanh", "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu",
}  # fmt: skip
_ACTIVATION_FIELDS = ("hidden_act", "hidden_activation", "activation_function", "dense_act_fn", "activation")
_DROPOUT_FIELDS = ("hidden_dropout_prob", "resid_pdrop", "dropout_rate", "dropout")


class MEFT(Method):
    """Run the model as a reversible network of two streams."""

    slug: ClassVar[str] = "meft"
    title: ClassVar[str] = "Make Pre-trained Model Reversible: From Parameter to Memory Efficient Fine-Tuning"
    paper: ClassVar[str] = "2306.00477"
    saves: ClassVar[str] = "activation memory (hardly grows with depth), optimiser state and checkpoint"
    routes: ClassVar[bool] = False
    size: ClassVar[str] = "bottleneck"
    learning_rates: ClassVar[tuple[float, float]] = (1e-4, 1e-2)

    variant: Literal[1, 2, 3] = Field(1, description="What F and G are, 1 to 3.")
    bottleneck: int = Field(8, ge=1, description="Inner width r of both adapters of a block.")
    lam: float | None = Field(None, description="λ on the first stream, not 0; if None 0.1, in variant 2 it is 1.")
    beta: float | None = Field(None, description="β on the second stream, not 0; if None 0.1, in variant 1 it is 1.")
    num_reversible: int | None = Field(
        None, ge=0, description="How many blocks of a stack are reversible; all if None."
    )
    freeze_below: bool = Field(
        False, description="Reversible are the upper ones, and those below stay bare; if not, the lower ones."
    )
    anchor_every: AnchorEvery = Field(
        "auto", description="Keep both streams every k blocks, 1 or more; auto by precision, none if None."
    )
    adapter_layernorm: bool = Field(False, description="A LayerNorm before the reversing adapter of variants 1 and 2.")
    activation: Activation | None = Field(None, description="Between the two projections; the model's own if None.")
    dropout: float | None = Field(None, ge=0, lt=1, description="After the activation; the model's own if None.")
    stack: str | None = stack_field()

    @field_validator("anchor_every")
    @classmethod
    def at_least_one(cls, every: AnchorEvery) -> AnchorEvery:
        if isinstance(every, int) and every < 1:
            raise ValueError("an anchor every 1 block or more, auto, or None")
        return every

    @field_validator("lam", "beta")
    @classmethod
    def invertible(cls, scale: float | None) -> float | None:
        if scale is not None and (scale == 0 or not math.isfinite(scale)):
            raise ValueError("the way back divides by it: any finite number but 0")
        return scale

    @model_validator(mode="after")
    def consistent(self) -> MEFT:
        if self.adapter_layernorm and self.variant == 3:
            raise ValueError("adapter_layernorm: variant 3 has no reversing adapter to stand before; leave it out")
        if self.freeze_below and self.num_reversible == 0:
            raise ValueError("num_reversible = 0 with freeze_below leaves no block to adapt; at least 1")
        small = [
            f"{name} = {value}" for name, value in zip(("lam", "beta"), self.scales, strict=True) if abs(value) < 0.05
        ]
        if small:
            warnings.warn(
                f"meft: {', '.join(small)}: the way back divides by it, so rounding grows more than 20 times a block",
                stacklevel=2,
            )
        return self

    @property
    def scales(self) -> tuple[float, float]:
        """λ and β."""
        lam, beta = SCALES[self.variant]
        return (lam if self.lam is None else self.lam, beta if self.beta is None else self.beta)

    def deltas(self, anatomy: Anatomy) -> Iterator[Place]:
        stacks = [anatomy.stack(self.stack)] if self.stack else anatomy.stacks
        for stack in stacks:
            count = self.reversible(stack, anatomy.model_class)
            first = len(stack.blocks) - count if self.freeze_below else 0
            (lam, beta), layers = self.scales, range(first, len(stack.blocks))
            line = Line(
                stack.name, lam, beta, swaps=self.variant != 3, reversible=count, anchor_every=self.anchor_every
            )
            for site in anatomy.sites(["block"], layers, stack.name):
                yield Place(site, self.stand_in(line, stack, site.depth))
            for site in anatomy.sites(["ffn"], layers, stack.name):
                yield Place(site.at("output"), self.adapter(site.in_features), read=site.at("input"))
            if self.variant == 3:
                for site in anatomy.sites(["attention"], layers, stack.name):
                    yield Place(site.at("output"), self.adapter(site.out_features))

    def reversible(self, stack: Stack, model: str) -> int:
        """How many blocks of a stack are reversible.

        Raises:
            AttachError: they are not one sequence of blocks of one width. ConfigError: there are not so many.
        """
        blocks = stack.blocks
        again = max(site.repeats for block in blocks for site in block.sites)
        if len(stack.containers) > 1 or len({(b.stage, b.hidden_size) for b in blocks}) > 1 or again > 1:
            raise AttachError(
                f"meft: {stack.name} of {model} is not one run through blocks of one width, each once, which two streams need\n"
                "name another stack with stack=, or take a method that leaves the blocks as they are"
            )
        if any(block.channels_first for block in blocks):
            raise AttachError(
                f"meft: the hidden state in {stack.name} of {model} is an image, (B, d, H, W), which its adapters can't read\n"
                "name another stack with stack=, or take a method that leaves the blocks as they are"
            )
        count = len(blocks) if self.num_reversible is None else self.num_reversible
        if count > len(blocks):
            raise ConfigError(f"MEFT.num_reversible = {count}: {stack.name} of {model} has 0 to {len(blocks)} blocks")
        return count

    def stand_in(self, line: Line, stack: Stack, depth: int) -> Reversible:
        block = stack.blocks[depth]
        if self.variant == 3:
            return HalfByHalf(line, Halves(block))
        adapter = self.adapter(block.hidden_size, norm=self.adapter_layernorm)
        return (BlockThenAdapter if self.variant == 1 else AdapterThenBlock)(line, adapter)

    def adapter(self, width: int, norm: bool = False) -> Bottleneck:
        return Bottleneck(
            width, self.bottleneck, activation=self.activation or "gelu", dropout=self.dropout or 0.0, norm="in" if norm else "none",
            init="bert",
        )  # fmt: skip

    def on_attach(self, moment: Moment) -> None:
        """Give the adapters the model's activation and dropout, where none are named."""
        for delta in moment.deltas.values():
            adapter = delta if isinstance(delta, Bottleneck) else getattr(delta, "adapter", None)
            if adapter is not None and self.activation is None:
                adapter.activation = ACTIVATIONS.get(str(named(moment.model, _ACTIVATION_FIELDS, "gelu")), "gelu")
            if adapter is not None and self.dropout is None:
                adapter.dropout.p = float(named(moment.model, _DROPOUT_FIELDS, 0.0))


def named(model: nn.Module, fields: tuple[str, ...], default: Any) -> Any:
    """The first of these fields that the model's configuration has, or that of its text part."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    found = (getattr(each, field, None) for each in (config, text) for field in fields)
    return next((value for value in found if isinstance(value, (str, float, int))), default)


# ----------------------------------------------------------------------------------------------------------------- F and G


class BlockThenAdapter(Reversible):
    """Variant 1: F is the block, G the reversing adapter."""

    def __init__(self, line: Line, adapter: Bottleneck) -> None:
        super().__init__(line)
        self.adapter = adapter

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        self.adapter.initialise(generator, base)

    def f(self, block: nn.Module, put: Put, x: Tensor) -> Any:
        args, kwargs = put(x)
        return block(*args, **kwargs)

    def g(self, block: nn.Module, put: Put, y: Tensor) -> Tensor:
        return self.adapter(y)


class AdapterThenBlock(BlockThenAdapter):
    """Variant 2: the other way round."""

    answers: Literal["f", "g"] = "g"

    def f(self, block: nn.Module, put: Put, x: Tensor) -> Tensor:
        return self.adapter(x)

    def g(self, block: nn.Module, put: Put, y: Tensor) -> Any:
        args, kwargs = put(y)
        return block(*args, **kwargs)


class HalfByHalf(Reversible):
    """Variant 3: F is the attention half of the block, G its feed-forward half; their adapters sit at these sub-layers."""

    def __init__(self, line: Line, halves: Halves) -> None:
        super().__init__(line)
        self.halves = halves

    def f(self, block: nn.Module, put: Put, x: Tensor) -> Any:
        args, kwargs = put(x)
        return self.halves.first(block, args, kwargs)

    def g(self, block: nn.Module, put: Put, y: Tensor) -> Any:
        args, kwargs = put(y)
        return self.halves.second(block, args, kwargs)
