"""LST: a narrow copy of the backbone at its side, climbed by ladders from each layer.  Sung et al. 2022, arXiv 2206.06522.

    s <- D_e e
    s <- B_i(μ_i s + (1 - μ_i) D_i h_i),   μ_i = σ(a_i / T)        i over the layers kept
    the stack's last hidden state <- U norm(s)

e is the stack's input and h_i the output of frozen layer i, which enters before side block B_i. B_i is a block of the backbone's own class,
r times narrower in everything but the number of heads: with its masks, position biases and caches. D and U are linears with a bias. In an
encoder-decoder the side decoder looks into the side encoder's result, after its norm and dropout, and U is in the decoder alone.

Sits     beside every stack; its result replaces what the final norm gives, or the last block where there is no final norm.
Trains   all of the side: about 1 / r² of a block for each, and d d / r numbers for each ladder.
Starts   from the backbone's own weights, the rows and columns that matter most (`pruning`); ladders, U and gates have their own start.
Merges   never: both networks run.

Relations: it saves activations, where LoRA and adapters save optimiser state; none is kept of the backbone but the h_i themselves. Slower to
learn a task that is far from what the backbone knows. With `pt.Cache`, later epochs run the side network alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from petiole.anatomy import Anatomy
from petiole.context import recomputing
from petiole.errors import AttachError, TrainingError
from petiole.junction import Call
from petiole.method import Delta, Method, Moment, Place
from petiole.methods.side.beside import (
    Beside,
    argument_names,
    block_site,
    cast,
    check_depths,
    depths_of,
    encoder_states,
    keep_memory,
    memory_of,
    stacks_of,
    with_argument,
)
from petiole.methods.side.narrow import Narrow, bias_at, grow, inside, is_cache, weight_at
from petiole.methods.side.pruning import Importance, Walk, fisher, magnitude

Depths = Literal["all"] | tuple[int, ...]


class LST(Method):
    """A narrow copy of the backbone beside it, so that nothing is propagated back through the backbone."""

    slug: ClassVar[str] = "lst"
    title: ClassVar[str] = "LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning"
    paper: ClassVar[str] = "2206.06522"
    saves: ClassVar[str] = "activations, backward pass, optimiser state and checkpoint"
    routes: ClassVar[bool] = False
    learning_rates: ClassVar[tuple[float, float]] = (3e-4, 1e-2)
    exempt: ClassVar[Mapping[str, str]] = {
        "combines_with_others": "no gradient goes through the backbone, so what is attached to it would train in vain",
        "swin": "its blocks have several widths",
        "resnet": "its blocks have no attention",
        "mixtral": "its feed-forward layers are experts",
        "torch_encoder": "its blocks come without a configuration to build narrower ones from",
    }

    reduction_factor: int = Field(
        8, ge=1, description="r: how many times narrower than the backbone; 1 is a full copy."
    )
    side_layers: Depths | dict[str, Depths] = Field(
        "all", description="Depths with a side block, counted from the input; by the stack's name where they differ."
    )
    gate: Literal["learnable", "none", "constant"] = Field(
        "learnable", description="How a ladder joins: gated by σ(a / T), added, or gated by a μ that does not train."
    )
    gate_temperature: float = Field(0.1, gt=0, description="T.")
    gate_init: float = Field(0.0, description="a at the start; 0 takes both sides alike.")
    gate_value: float = Field(0.5, ge=0, le=1, description="μ of a constant gate; 1 leaves the ladders out.")
    gate_end: float | None = Field(
        None, ge=0, le=1, description="Where a constant gate's μ goes in the course of training."
    )
    gate_after_block: bool = Field(False, description="Join after the side block instead of before.")
    init: Literal["fisher", "magnitude", "random"] = Field(
        "fisher", description="Weights to start from: the backbone's that matter most on data, its largest, or none."
    )
    fisher_samples: int = Field(1024, ge=1, description="Samples of training data for `fisher`, at most.")
    dropout: float | None = Field(None, ge=0, lt=1, description="Of the side network; the backbone's if None.")
    backbone_dropout: bool = Field(True, description="Leave the frozen backbone's own dropout on in training.")
    merge_last: bool = Field(False, description="Mix the result with the frozen last state, by one more gate.")

    @field_validator("side_layers")
    @classmethod
    def _depths(cls, chosen: Any) -> Any:
        return check_depths(chosen, "depths")

    def overrides(self, event: str) -> bool:
        return super().overrides(event) and (event != "calibrate" or self.init == "fisher")

    def deltas_on(self, anatomy: Anatomy, model: nn.Module) -> Iterator[Place]:
        stacks = stacks_of(self.slug, anatomy)
        for stack in stacks:
            kept = depths_of("lst: side_layers", self.side_layers, stack)
            narrow = Narrow(self.slug, anatomy, model, stack, self.reduction_factor, self.dropout)
            ladder = Ladder(self, narrow, kept, anatomy, last=stack is stacks[-1])
            yield Place(block_site(stack, -1), ladder)

    # ---- where the side starts

    def on_attach(self, moment: Moment) -> None:
        if self.init == "magnitude" and not any(p.is_meta for p in moment.model.parameters()):
            self.prune(moment.model, moment.deltas, magnitude(moment.model))

    def calibrate(self, moment: Moment, batches: Iterable[Mapping[str, Any]]) -> None:
        importance = fisher(moment.model, batches, samples=self.fisher_samples)
        self.prune(moment.model, moment.deltas, importance)

    @torch.no_grad()
    def prune(self, model: nn.Module, deltas: Mapping[str, Delta], importance: Importance) -> None:
        """Start from the rows and columns of the backbone's weights that matter most.

        Args:
            importance: of the backbone's weights by name, as `fisher` gives it for any loss, or any other.
        """
        ladders = [delta for delta in deltas.values() if isinstance(delta, Ladder)]
        anatomy = ladders[0].host.anatomy
        walk = Walk(anatomy, model, importance, self.reduction_factor)
        current = walk.start(anatomy.stacks[0])
        for ladder, stack in zip(ladders, anatomy.stacks, strict=True):
            chosen, current = walk.stack(stack, current)
            ladder.start_from(stack, chosen, current)

    def before_step(self, moment: Moment) -> None:
        """A constant gate on its way, and the backbone without dropout, if asked."""
        if not self.backbone_dropout:
            for name, module in moment.model.named_modules():
                if name and not any(part.startswith("petiole") for part in name.split(".")):
                    module.training = False
        if self.gate == "constant" and self.gate_end is not None:
            value = self.gate_value + moment.progress * (self.gate_end - self.gate_value)
            for delta in moment.deltas.values():
                if isinstance(delta, Ladder):
                    delta.gates.detach().fill_(value)


class Ladder(Beside):
    """The side network of one stack.

    Args:
        method: its fields. narrow: builds the blocks. kept: depths with a side block. last: whether the result goes to the head.
    """

    gates: Tensor  # a (L,), or μ itself where it does not train

    def __init__(self, method: LST, narrow: Narrow, kept: tuple[int, ...], anatomy: Anatomy, last: bool) -> None:
        super().__init__()
        self.method, self.kept, self.last = method, kept, last
        self.reads = (0, *(depth + 1 for depth in kept))
        self.waits = method.init == "fisher"  # for data
        d, side, count = narrow.width, narrow.width // method.reduction_factor, len(narrow.stack.blocks)
        self.count = count
        self.down_first = nn.Linear(d, side)
        self.down = nn.ModuleList(nn.Linear(d, side) for _ in kept)
        self.blocks = nn.ModuleList(
            narrow.block(depth, like=0 if number == 0 else depth, number=number) for number, depth in enumerate(kept)
        )
        self.final_norm = anatomy.final_norm(narrow.stack)
        self.norm = narrow.norm(self.final_norm)
        self.rotary = narrow.rotary()
        self.drop = nn.Dropout(narrow.dropout)
        self.up = nn.Linear(side, d) if last else None
        if method.gate == "learnable":
            self.gates = nn.Parameter(torch.full((count,), method.gate_init))
        elif method.gate == "constant":
            self.register_buffer("gates", torch.full((count,), method.gate_value))
        self.last_gate = nn.Parameter(torch.zeros(1)) if last and method.merge_last else None
        self.source, self.config, self.names = narrow.source, narrow.config, argument_names(self.blocks[0])

    def unfold(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        self.waits = False
        return state

    def forward(self, states: list[Tensor], calls: list[Call], h: Tensor) -> Tensor | None:
        """e and the h_i of the layers kept (B, T, d), how the frozen blocks were called, the last state -> the new one, or None."""
        if self.waits and self.training and not recomputing() and type(h) is Tensor:
            raise TrainingError(
                "lst starts from weights that matter on data: train with pt.Trainer or events.begin(batches), call "
                'calibrate(batches), or set init = "magnitude" or "random"'
            )
        self.config._attn_implementation = self.source._attn_implementation  # which the masks are made for
        kind = self.down_first.weight.dtype
        first, *others = states
        s = self.down_first(self.drop(first.to(kind)))
        memory: Tensor | None = None
        rotated: Any = None
        handed: tuple[Any, ...] | None = None  # what the last side block handed on beside s, such as T5's position bias
        for depth, down, block, state in zip(self.kept, self.down, self.blocks, others, strict=True):
            call = handed_on(calls, depth, handed)
            found = encoder_states(call, self.names)
            if found is not None:
                memory = memory_of(self, found[1]) if memory is None else memory
                call = with_argument(call, found[0], memory)
            if self.rotary is not None:
                if "position_ids" not in call.kwargs:
                    raise AttachError(
                        f"lst: {type(block).__name__} is not told positions, so narrower heads can't be rotated"
                    )
                rotated = self.rotary(s, call.kwargs["position_ids"]) if rotated is None else rotated
                call = with_argument(call, "position_embeddings", rotated)
            for value in (*call.args, *call.kwargs.values()):
                if is_cache(value):
                    grow(value, self.count, self.kept)
                elif s.shape[-1] < h.shape[-1] and is_state(value, h.shape[-1]):
                    raise AttachError(
                        f"lst: {type(block).__name__} is also given states of the full width, as of relative positions, which a narrower "
                        "block can't read\nunipt and sherl read this model's states without blocks of their own"
                    )
            rung = down(state.to(kind))
            s = s if self.method.gate_after_block else self.join(s, rung, depth)
            args, kwargs = call.on(s)
            # Its forward itself, since whoever records the backbone's hidden states does so by hooks on blocks.
            output = block.forward(*(cast(a, kind) for a in args), **{n: cast(v, kind) for n, v in kwargs.items()})
            s, handed = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
            s = self.join(s, rung, depth) if self.method.gate_after_block else s
        s = self.drop(self.norm(s))
        if self.up is None:
            keep_memory(self, h, s)
            return None
        y: Tensor = self.up(s)
        if self.last_gate is None:
            return y
        gate = self.open(self.last_gate).to(y.dtype)
        return gate * y + (1 - gate) * h.to(y.dtype)

    def open(self, a: Tensor) -> Tensor:
        """μ = σ(a / T), in float32 at least."""
        return torch.sigmoid(a.to(torch.promote_types(a.dtype, torch.float32)) / self.method.gate_temperature)

    def join(self, s: Tensor, rung: Tensor, depth: int) -> Tensor:
        """μ s + (1 - μ) D h, or s + D h without a gate."""
        if self.method.gate == "none":
            return s + rung
        gate = self.open(self.gates[depth]) if self.method.gate == "learnable" else self.gates[depth]
        return rung + gate.to(s.dtype) * (s - rung)

    def start_from(self, stack: Any, chosen: Any, current: Tensor) -> None:
        """Copy what was chosen of the backbone's blocks, and of the position bias in its first."""
        host = self.host
        for number, depth in enumerate(self.kept):
            made = self.blocks[number]
            for site, (rows, columns) in chosen[depth].items():
                take(
                    site, stack.blocks[depth], made, host.module(site.path), rows, columns, self.method.reduction_factor
                )
        for site in stack.blocks[0].sites:
            if site.role == "position_embedding":
                inside(stack.blocks[0], site, self.blocks[0]).weight.copy_(host.module(site.path).weight)  # type: ignore[operator]
        if self.final_norm is not None:
            own = host.module(self.final_norm.path)
            for name, parameter in self.norm.named_parameters():
                parameter.copy_(own._parameters[name][current])
        self.waits = False


def is_state(value: Any, size: int) -> bool:
    """Whether it is a hidden state (…, size), and no mask: those have four dimensions, or are of whole numbers."""
    return isinstance(value, Tensor) and value.ndim in (2, 3) and value.is_floating_point() and value.shape[-1] == size


def take(site: Any, block: Any, made: nn.Module, own: nn.Module, rows: Tensor, columns: Tensor | None, r: int) -> None:
    """Copy the chosen rows and columns of one weight, and the rows of its bias, into the narrower block's."""
    module = inside(block, site, made)
    if columns is None:  # a norm
        for name, parameter in module.named_parameters():
            parameter.copy_(own._parameters[name][rows])  # type: ignore[index]
        return
    small = replace(site, rows=tuple((start // r, stop // r) for start, stop in site.rows))
    weight_at(small, module).copy_(weight_at(site, own)[rows][:, columns])
    bias = bias_at(small, module)
    if bias is not None:
        bias.copy_(bias_at(site, own)[rows])  # type: ignore[index]


def handed_on(calls: list[Call], depth: int, handed: tuple[Any, ...] | None) -> Call:
    """The call of the frozen block at `depth`, with what blocks hand to the next as the side blocks hand it on.

    What the block before gave beside its hidden state is known by its identity. The first side block gets what the first block got.
    """
    call = calls[depth]
    given = [part for part in calls[depth - 1].rest if isinstance(part, Tensor)] if depth else []
    if not given:
        return call
    for place, value in (*enumerate(call.args), *call.kwargs.items()):
        if any(value is part for part in given):
            number = next(i for i, part in enumerate(calls[depth - 1].rest) if part is value)
            start = calls[0].args[place] if isinstance(place, int) else calls[0].kwargs.get(str(place))
            call = with_argument(call, place, start if handed is None else handed[number])
    return call


__all__ = ["LST", "Ladder"]
