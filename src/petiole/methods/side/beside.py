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
from petiole.methods.side.narrow import grow, is_cache

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


# ------------------------------------------------------------------------------------------- heads that read all states in parallel

Form = Literal["auto", "encoder", "encoder_decoder", "cnn", "pooled"]


def form_of(slug: str, asked: Form, anatomy: Anatomy) -> Form:
    """The form that fits a backbone, or the one asked for if it does.

    Raises:
        AttachError: it does not.
    """
    names = [stack.name for stack in anatomy.stacks]
    convolutional = len(names) == 1 and not any(
        s.role == "attention" for b in anatomy.stacks[0].blocks for s in b.sites
    )
    pooled = all(pooled_exit(anatomy, stack) is not None for stack in anatomy.stacks)
    fits: dict[Form, bool] = {
        "cnn": convolutional and len(stages(anatomy.stacks[0])) > 1,
        "encoder_decoder": names == ["encoder", "decoder"],
        "encoder": len(names) == 1 and not convolutional,
        "pooled": pooled,
    }
    found = (
        next((form for form, fit in fits.items() if fit), None) if asked == "auto" else asked if fits[asked] else None
    )
    if found is None:
        what = f"no form = {asked!r}" if asked != "auto" else "no form"
        raise AttachError(
            f"{slug} has {what} for {anatomy.model_class} with {', '.join(names)}; what fits: "
            f"{', '.join(form for form, fit in fits.items() if fit) or 'none'}"
        )
    return found


def stages(stack: Stack) -> tuple[int, ...]:
    """Depth of the last block of each stage."""
    ends = {block.stage: block.depth for block in stack.blocks}
    return tuple(ends[stage] for stage in sorted(ends))


def states_of(slug: str, chosen: Literal["all"] | tuple[int, ...], stack: Stack, count: int) -> tuple[int, ...]:
    """Numbers of the hidden states to read, of 0 … count - 1.

    Raises:
        AttachError: one is out of range, there are fewer than two, or they come from stages of several sizes.
    """
    numbers = tuple(range(count)) if chosen == "all" else chosen
    if max(numbers) >= count:
        raise AttachError(f"{slug}: states = {list(chosen)}, but {stack.name!r} offers 0 to {count - 1} here")
    if len(numbers) < 2:
        raise AttachError(f"{slug} puts two hidden states or more together; {stack.name!r} offers {len(numbers)} here")
    found = {stack.blocks[max(number - 1, 0)].stage for number in numbers}
    if len(found) > 1:
        widths = sorted({stack.blocks[max(number - 1, 0)].hidden_size for number in numbers})
        raise AttachError(
            f"{slug}: these hidden states of {stack.name!r} come from {len(found)} stages, of widths {widths}, with other numbers "
            "of tokens in each\nname states of one stage"
        )
    return numbers


def widths_of(stack: Stack, numbers: Sequence[int]) -> list[int]:
    """Widths of hidden states by number."""
    first = next(site.in_features for site in stack.blocks[0].sites if site.role == "block")
    return [stack.blocks[number - 1].hidden_size if number else first for number in numbers]


def check_states(chosen: Any) -> Any:
    """Refuse fewer than two states, and those that are repeated or out of order, as a validator of a field."""
    if chosen != "all" and (len(chosen) < 2 or list(chosen) != sorted(set(chosen)) or chosen[0] < 0):
        raise ValueError("two hidden states or more, each once, in order, counted from 0")
    return chosen


def pooled_exit(anatomy: Anatomy, stack: Stack) -> str | None:
    """Path of the module that gives a tower's pooled embedding; projected, where it is."""
    hints = {"text": ("text_projection",), "vision": ("visual_projection", "vision_projection")}.get(stack.name, ())
    for site in anatomy.outside:
        if site.role == "linear" and site.path.rpartition(".")[2] in hints:
            return site.path
    if len(anatomy.stacks) > 1:
        return None
    pooler = next((site for site in anatomy.outside if site.role == "pooler"), None)
    return pooler.path.rpartition(".")[0] if pooler is not None else None


def pooled_width(anatomy: Anatomy, path: str) -> int:
    """Width of what a pooled embedding's module gives."""
    return next(s.out_features for s in anatomy.outside if s.path == path or s.path.rpartition(".")[0] == path)


def valid(calls: Sequence[Call], names: Sequence[str], count: int) -> Tensor | None:
    """Which of the keys (B or 1, count) are no padding, as the last query of a block sees them; None where all are."""
    call = calls[-1]
    for place, value in (*enumerate(call.args), *call.kwargs.items()):
        name = names[place] if isinstance(place, int) and place < len(names) else place
        if not isinstance(value, Tensor) or name not in ("attention_mask", "src_key_padding_mask"):
            continue
        mask = value[:, 0, -1] if value.ndim == 4 else value
        if mask.ndim != 2 or mask.shape[-1] != count:
            continue
        if mask.is_floating_point():
            return mask > torch.finfo(mask.dtype).min / 2
        return ~mask if name == "src_key_padding_mask" else mask != 0
    return None


def causal_pairs(queries: int, keys: int, device: torch.device) -> Tensor:
    """(queries, keys): whether the last `queries` of so many tokens come after, or are, each token."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def remembered(calls: Sequence[Call], states: list[Tensor], blocks: int) -> list[Tensor]:
    """Small states (B, n, d') behind those of earlier tokens, where there is a key-value cache: it keeps them like keys."""
    cache = next((v for v in (*calls[-1].args, *calls[-1].kwargs.values()) if is_cache(v)), None)
    if cache is None:
        return states
    grow(cache, blocks, [0] * len(states))
    own = getattr(cache, "self_attention_cache", cache)
    return [own.update(z[:, None], z[:, None, :, :1], blocks + i)[0][:, 0] for i, z in enumerate(states)]


def pool_positions(delta: Any, kind: str | int, h: Tensor) -> Tensor:
    """Index (B,) of the token that stands for a sequence; `pt.given(model, pool_position=…)` comes first.

    Raises:
        AttachError: the end of the text is asked for, but the model has no `input_ids` or does not say what ends a text.
    """
    given = delta.given("pool_position", -1)
    if not isinstance(given, int):
        return torch.as_tensor(given, device=h.device)
    if kind == "eos":
        within = delta.host.passing()
        ids = within.input("input_ids") if within is not None else None
        config = getattr(delta.host.model, "config", None)
        config = getattr(config, "text_config", config)
        eos = getattr(config, "eos_token_id", None)
        if not isinstance(ids, Tensor) or eos is None:
            raise AttachError(
                "the end of a text is found in input_ids by the config's eos_token_id; give pool_position"
            )
        # Early CLIP models name 2, while the end of a text is their largest token.
        return ids.argmax(-1) if eos == 2 else (ids == eos).int().argmax(-1)
    return torch.full((h.shape[0],), kind if isinstance(kind, int) else 0, device=h.device)


def refuse_other_width(slug: str, anatomy: Anatomy, width: int, out_size: int) -> None:
    """Another output width than the backbone's fits no head that comes after."""
    after = [s.path for s in anatomy.outside if s.role in ("head", "lm_head", "pooler")]
    if out_size != width and after:
        raise AttachError(
            f"{slug}: out_size = {out_size}, but {after[0]} takes {width}; load the backbone without a head"
        )
