"""Inside attention: extra keys and values, a bias on the scores, the probabilities after softmax, the heads before the output projection.

Transformers lets attention functions be registered by name and picks one by `config._attn_implementation`. petiole registers one beside
each that it can serve, switches the configuration of the modules that need it, and switches it back on detach. The function asks the
attention module's junction for deltas and calls the original where there are none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from petiole.attended import AttendedSlot
from petiole.errors import AttachError
from petiole.junction import AttentionSlot, on_rows
from petiole.method import AttentionDelta

if TYPE_CHECKING:
    from petiole.attach import Host

PREFIX = "petiole_"
SERVED = ("sdpa", "eager")


def switch_on(host: Host, module: nn.Module) -> None:
    """Make `module`'s configuration name petiole's attention function.

    Raises:
        AttachError: the present implementation is a fused kernel that can't be served.
    """
    config = getattr(module, "config", None)
    if config is None:
        raise AttachError(f"{type(module).__name__} has no config, so its attention function can't be chosen")
    name = config._attn_implementation or "eager"
    if name.startswith(PREFIX):
        return
    if name not in SERVED:
        raise AttachError(
            f"attention implementation {name!r} is a fused kernel that hides what this method needs\n"
            f"load the model with attn_implementation={' or '.join(repr(s) for s in SERVED)}"
        )
    register()
    host.attention_configs.append((config, config._attn_implementation_internal))
    config._attn_implementation_internal = PREFIX + name


def keep_on(host: Host) -> None:
    """Somebody chose another implementation meanwhile (`set_attn_implementation`): serve that one, and give that one back.

    Raises:
        AttachError: it is a fused kernel that can't be served.
    """
    for i, (config, _) in enumerate(host.attention_configs):
        name = config._attn_implementation_internal or "eager"
        if name.startswith(PREFIX):
            continue
        if name not in SERVED:
            raise AttachError(
                f"attention implementation {name!r} is a fused kernel that hides what is attached inside attention\n"
                f"choose {' or '.join(repr(s) for s in SERVED)}, or detach first"
            )
        host.attention_configs[i] = (config, name)
        config._attn_implementation_internal = PREFIX + name


def switch_off(host: Host) -> None:
    """Give every switched configuration its own implementation back."""
    for config, name in host.attention_configs:
        config._attn_implementation_internal = name
    host.attention_configs.clear()


def register() -> None:
    """Register petiole's functions, and for each the mask of the implementation beside it."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for name in SERVED:
        if PREFIX + name not in ALL_ATTENTION_FUNCTIONS:
            ALL_ATTENTION_FUNCTIONS.register(PREFIX + name, partial(attention, name))
            ALL_MASK_ATTENTION_FUNCTIONS.register(PREFIX + name, ALL_MASK_ATTENTION_FUNCTIONS[name])


def original(name: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The implementation that the model would have used: a registered one, or the eager function of the model's own file."""
    for cls in type(module).__mro__:
        space = vars(sys.modules[cls.__module__]) if cls.__module__ in sys.modules else {}
        if name == "eager" and "eager_attention_forward" in space:
            return space["eager_attention_forward"]
        if name != "eager" and "ALL_ATTENTION_FUNCTIONS" in space:
            return space["ALL_ATTENTION_FUNCTIONS"][name]
    raise AttachError(f"{type(module).__name__}: no {name!r} attention function was found beside it")


def attention(
    name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """query (B, H, T, d), key and value (B, H_kv, S, d) -> heads (B, T, H, d) and, where they were formed, probabilities (B, H, T, S)."""
    function = original(name, module)
    junction = module._modules.get("petiole")
    acting = [s for s, p in junction.slots if not p.act and s.acts()] if junction is not None else []  # type: ignore[union-attr]
    slots = [slot for slot in acting if isinstance(slot, AttentionSlot)]
    readers = [slot for slot in acting if isinstance(slot, AttendedSlot)]
    if not acting:
        return function(module, query, key, value, attention_mask, *args, **kwargs)
    for slot in slots:
        slot.fire()
        extra = slot.delta.keys_values(key, value)
        if extra is not None:
            rows = slot.host.rows(slot.adaptation, key)
            key, value, attention_mask, kwargs = extend(
                name, module, query, key, value, extra, rows, attention_mask, kwargs
            )
        bias = slot.delta.score_bias(query, key)
        if bias is not None:
            rows = slot.host.rows(slot.adaptation, key)
            key, value, attention_mask = biased(module, query, key, value, bias, rows, attention_mask, kwargs)
            if name == "sdpa" and query.device.type != "cpu":  # kernels there take a mask of the query's own type alone
                attention_mask = attention_mask.to(query.dtype)
    weights: Tensor | None
    if readers or any(slot.delta.needs_probabilities for slot in slots):
        output, weights = explicit(module, slots, query, key, value, attention_mask, *args, **kwargs)
    else:
        output, weights = function(module, query, key, value, attention_mask, *args, **kwargs)
    for reader in readers:
        reader.see(weights, query, value[:, :, : weights.shape[-1]])  # type: ignore[union-attr,arg-type]
    scaling = args[0] if args else kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    for slot in slots:
        if type(slot.delta).heads_output is not AttentionDelta.heads_output:
            output = of_rows(slot, partial(slot.delta.heads_output, scaling=scaling), output, query, key, value)
    return output, weights


def of_rows(slot: AttentionSlot, change: Callable[..., Tensor], first: Tensor, *rest: Tensor) -> Tensor:
    """What a delta makes of its first argument, on the rows on which it acts."""
    rows = slot.host.rows(slot.adaptation, first)
    return on_rows(
        first, rows, lambda own: change(own, *(t if rows is None else t.index_select(0, rows) for t in rest))
    )


def extend(
    name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extra: tuple[Tensor, Tensor],
    rows: Tensor | None,
    mask: Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Any]]:
    """Put extra keys and values before the real ones: seen by every query, at no position, on all rows or the named ones."""
    steps, length = query.shape[2], extra[0].shape[2]
    if mask is None and causal(module, query, kwargs):  # with keys in front, its alignment would be wrong
        key, value, mask = in_mask(query, key, value)
        mask = mask if name != "eager" else additive(mask, query.dtype)
    if rows is not None and mask is None:
        mask = torch.ones(1, 1, steps, key.shape[2], dtype=torch.bool, device=key.device)
        mask = mask if name != "eager" else additive(mask, query.dtype)
    if mask is not None:
        seen = True if mask.dtype == torch.bool else 0.0
        if rows is None:
            front = mask.new_full((*mask.shape[:-1], length), seen)
        else:
            mask = mask.expand(key.shape[0], -1, -1, -1)
            hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
            front = mask.new_full((*mask.shape[:-1], length), hidden).index_fill(0, rows, seen)
        mask = torch.cat([front, mask], -1)
    bias = kwargs.get("position_bias")
    if bias is not None:
        kwargs = {**kwargs, "position_bias": nn.functional.pad(bias[..., -(key.shape[2]) :], (length, 0))}
    key = torch.cat([extra[0].to(key.dtype), key], 2)
    value = torch.cat([extra[1].to(value.dtype), value], 2)
    return key, value, mask, kwargs


def biased(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    rows: Tensor | None,
    mask: Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values, and the mask with a bias (B or 1, H or 1, T or 1, S) added to the scores by it, on all rows or the named ones.

    Raises:
        AttachError: the mask is for another number of keys.
    """
    if mask is None and causal(module, query, kwargs):
        key, value, mask = in_mask(query, key, value)
        bias = bias[..., : key.shape[2]]
    if rows is not None:
        own = bias.expand(key.shape[0], -1, -1, -1)
        bias = torch.zeros_like(own).index_copy(0, rows, own.index_select(0, rows))
    if mask is None:
        return key, value, bias
    if mask.shape[-1] not in (1, bias.shape[-1]):
        raise AttachError(
            f"{type(module).__name__} is given a mask for {mask.shape[-1]} keys, where there are {bias.shape[-1]} by now"
        )
    return key, value, (additive(mask, query.dtype) if mask.dtype == torch.bool else mask) + bias


def causal(module: nn.Module, query: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether no mask stands for "causal, aligned at the start"."""
    asked = kwargs.get("is_causal")
    return query.shape[2] > 1 and bool(getattr(module, "is_causal", True) if asked is None else asked)


def in_mask(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same said by a mask: the keys and values that are ever seen, and which query (T) sees which of them (1, 1, T, T)."""
    steps = query.shape[2]
    mask = torch.ones(steps, steps, dtype=torch.bool, device=key.device).tril()[None, None]
    return key[:, :, :steps], value[:, :, :steps], mask


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask (True: seen) as one that is added to the scores."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def explicit(
    module: nn.Module,
    slots: list[AttentionSlot],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention step by step, so that deltas see the probabilities.

    Raises:
        AttachError: the model asks for something that only its own kernel does (soft caps, attention sinks).
    """
    unknown = [k for k in ("softcap", "s_aux", "sinks") if kwargs.get(k) is not None]
    if unknown:
        raise AttachError(
            f"{type(module).__name__} uses {', '.join(unknown)} in attention, which this method can't reproduce"
        )
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if position_bias is not None:
        scores = scores + position_bias
    steps = query.shape[2]
    if mask is None and causal(module, query, kwargs):
        mask = torch.ones(steps, steps, dtype=torch.bool, device=key.device).tril()
        scores, value = scores[..., :steps], value[:, :, :steps]
    if mask is not None:
        scores = scores + (additive(mask, scores.dtype) if mask.dtype == torch.bool else mask)
    probabilities = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    if mask is not None and mask.dtype == torch.bool:  # a padded query sees nothing, as in torch's own kernels
        probabilities = probabilities * mask.any(-1, keepdim=True)
    for slot in slots:
        if slot.delta.needs_probabilities:
            probabilities = of_rows(slot, slot.delta.probabilities, probabilities, value)
    dropped = nn.functional.dropout(probabilities, p=dropout, training=module.training)
    return (dropped @ value).transpose(1, 2).contiguous(), probabilities
