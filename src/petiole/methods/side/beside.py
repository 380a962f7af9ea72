"""What side networks share: the stacks they stand beside, an encoder's result on its way to the decoder, and gates.

In an encoder-decoder, the frozen decoder goes on reading the frozen encoder, while the side decoder reads the side encoder. In generation
the encoder runs once, and alone; the decoder runs for each token, with rows repeated where there are beams. So the side encoder's result
outlives its forward pass, and is found by the encoder's output that it goes with.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from petiole.anatomy import Anatomy, Site, Stack
from petiole.errors import AttachError
from petiole.junction import Call
from petiole.method import StackDelta

MEMORY = "side memory"
_ENCODER_STATES = ("encoder_hidden_states", "encoder_hidden_state", "memory")


class Beside(StackDelta):
    """A side network: given detached states, the blocks' calls, and the state that its result replaces."""

    detaches = True
    reads_calls = True
    writes = "stack"


def stacks_of(slug: str, anatomy: Anatomy) -> tuple[Stack, ...]:
    """The stack to stand beside, or an encoder and its decoder.

    Raises:
        AttachError: there are others.
    """
    names = [stack.name for stack in anatomy.stacks]
    if len(names) == 1 or names == ["encoder", "decoder"]:
        return anatomy.stacks
    raise AttachError(
        f"{slug} stands beside one stack, or an encoder and its decoder; {anatomy.model_class} has {', '.join(names)}"
    )


def block_site(stack: Stack, depth: int, side: Literal["input", "output"] = "output") -> Site:
    """The site of a whole block."""
    return next(site for site in stack.blocks[depth].sites if site.role == "block").at(side)


def argument_names(block: nn.Module) -> tuple[str, ...]:
    """Names of a block's arguments, in order."""
    return tuple(inspect.signature(type(block).forward).parameters)[1:]


def encoder_states(call: Call, names: Sequence[str]) -> tuple[Any, Tensor] | None:
    """Where in a call a decoder block is given the encoder's output, and that output."""
    for place, value in (*enumerate(call.args), *call.kwargs.items()):
        name = names[place] if isinstance(place, int) and place < len(names) else place
        if name in _ENCODER_STATES and isinstance(value, Tensor):
            return place, value
    return None


def with_argument(call: Call, place: Any, value: Any) -> Call:
    """The call with another value at a place, a position or a name."""
    if isinstance(place, int):
        return replace(call, args=(*call.args[:place], value, *call.args[place + 1 :]))
    return replace(call, kwargs={**call.kwargs, place: value})


# ----------------------------------------------------------------------------------------------------------- encoder to decoder


def keep_memory(delta: StackDelta, output: Tensor, memory: Tensor) -> None:
    """Keep the side encoder's result (B, T, d'), and the frozen encoder's output (B, T, d) that it goes with."""
    delta.host.streams.keep(MEMORY, (output, memory, delta.host.passing()))


def memory_of(delta: StackDelta, given: Tensor) -> Tensor:
    """The side encoder's result for the encoder output that a decoder was given, its rows repeated as often.

    Raises:
        AttachError: the side encoder has not seen this encoder output.
    """
    host = delta.host
    kept = host.streams.kept(MEMORY)
    if kept is None:
        raise AttachError("the decoder ran without its encoder, so the side decoder has nothing to look into")
    output, memory, within = kept
    own = within is not None and within is host.passing()
    if own and torch.is_grad_enabled():
        host.streams.keep(MEMORY, None)  # its graph ends with this step
    times = given.shape[0] // max(output.shape[0], 1)
    if given.shape[:2] != (times * output.shape[0], output.shape[1]) or not (
        own or delta.training or torch.equal(output[:, 0].repeat_interleave(times, 0), given[:, 0])
    ):
        raise AttachError(
            "the decoder was given another encoder output than the side encoder saw last\n"
            "call the encoder of this model first, or give the model the encoder's input"
        )
    return memory if times == 1 else memory.repeat_interleave(times, 0)


# ------------------------------------------------------------------------------------------------------------------- other pieces


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors of an argument in the side network's precision."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return tuple(cast(part, dtype) for part in value) if type(value) is tuple else value


def depths_of(field: str, chosen: Any, stack: Stack) -> tuple[int, ...]:
    """Depths of one stack as a method's field gives them: "all", a list, or lists by the name of a stack.

    Raises:
        AttachError: a depth is out of range, or a stack has none.
    """
    count = len(stack.blocks)
    if isinstance(chosen, Mapping):
        if stack.name not in chosen:
            raise AttachError(f"{field} names no depths of {stack.name!r}, only of {', '.join(chosen)}")
        chosen = chosen[stack.name]
    if chosen == "all":
        return tuple(range(count))
    wrong = [depth for depth in chosen if not 0 <= depth < count]
    if wrong:
        raise AttachError(f"{field}: {stack.name!r} has no depth {wrong[0]}; choose from 0 to {count - 1}")
    return tuple(sorted(chosen))


def check_depths(chosen: Any, what: str) -> Any:
    """Refuse none, negative ones and repetitions, as a validator of a field."""
    for depths in chosen.values() if isinstance(chosen, Mapping) else [chosen]:
        if depths != "all" and (not depths or len(set(depths)) < len(depths) or min(depths) < 0):
            raise ValueError(f"at least one of the {what}, each once, counted from 0")
    if isinstance(chosen, Mapping) and not chosen:
        raise ValueError("at least one stack")
    return chosen
