"""Recompute just as many blocks as a memory budget takes, instead of all or none.

A block that is recomputed keeps its input alone for the backward pass and runs once more when its turn comes: less memory, more time.
The first blocks are taken first: their turn comes last, when the others have given back what they kept, so that running one again
never adds to the highest point.

    choice = pt.recompute.fit(model, batch, "4GB")     # on shapes alone, nothing is computed
    with pt.recompute.recomputed(model, choice.blocks):
        loss = model(**batch).loss; loss.backward()

`pt.Trainer(memory="4GB")` and `petiole tune --memory 4GB` do this by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from petiole import cost
from petiole.cache import bytes_of
from petiole.errors import ConfigError, TrainingError

_SWITCHES = ("gradient_checkpointing", "_gradient_checkpointing_func")  # by which Transformers turns it on


@dataclass(frozen=True)
class Choice:
    """Which blocks are recomputed, and the most bytes that a training step then holds.

    Attributes:
        blocks: module paths, from the input. among: how many blocks keep something and could be recomputed.
        budget_bytes: what was to be kept to.
        peak_bytes: of a step as chosen; plain_bytes: with nothing recomputed.
        step_flops, plain_flops: of a step as chosen, and with nothing recomputed. saved_bytes: kept for backward, as chosen.
    """

    blocks: tuple[str, ...]
    among: int
    budget_bytes: int
    peak_bytes: int
    plain_bytes: int
    step_flops: int
    plain_flops: int
    saved_bytes: int

    def __str__(self) -> str:
        peak, plain, budget = (f"{n / 1e6:,.1f} MB" for n in (self.peak_bytes, self.plain_bytes, self.budget_bytes))
        if not self.blocks:
            return f"recomputes nothing: a step takes {peak} of {budget}"
        more = self.step_flops / self.plain_flops - 1
        return f"recomputes {len(self.blocks)} of {self.among} blocks: a step takes {peak} of {budget} ({plain} without), and {more:.0%} more FLOPs"


def units(model: nn.Module) -> dict[str, GradientCheckpointingLayer]:
    """The layers that can be recomputed one by one, by path, from the input; of nested ones the outermost.

    Raises:
        ConfigError: there are none.
    """
    found: dict[str, GradientCheckpointingLayer] = {}
    for path, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer) and not any(path.startswith(f"{p}.") for p in found):
            found[path] = module
    if not found:
        raise ConfigError(
            f"memory: {type(model).__name__} has no layers that Transformers can recompute one by one; use a smaller batch"
        )
    return found


@contextmanager
def recomputed(model: nn.Module, blocks: Sequence[str]) -> Iterator[None]:
    """These blocks are recomputed in the backward passes of forward passes inside the `with`; afterwards all is as it was.

    Args:
        blocks: paths that `units` knows.

    Raises:
        ConfigError: a path is none of a block that can be recomputed.
    """
    known = units(model) if blocks else {}
    for path in blocks:
        if path not in known:
            raise ConfigError(f"blocks: {path!r} can't be recomputed by itself; there are {', '.join(known)}")
    # Models that hold such layers look at a switch of their own, and then make no cache of keys and values, which would grow twice.
    around = {
        path: module
        for path, module in model.named_modules()
        if hasattr(module, "gradient_checkpointing")
        and any(b == path or f"{b}.".startswith(path and f"{path}.") for b in blocks)
    }
    switched: dict[str, nn.Module] = {**around, **{path: known[path] for path in blocks}}
    before = {path: {n: v for n, v in vars(module).items() if n in _SWITCHES} for path, module in switched.items()}
    try:
        for module in switched.values():
            vars(module).update(dict(zip(_SWITCHES, (True, partial(checkpoint, use_reentrant=False)), strict=True)))
        yield
    finally:
        for path, module in switched.items():
            for name in _SWITCHES:
                vars(module).pop(name, None)
            vars(module).update(before[path])


def fit(
    model: nn.Module,
    batch: Any,
    memory: int | str,
    *,
    make: cost.MakeOptimizer = torch.optim.AdamW,
    loss: Callable[[Any], Tensor] | None = None,
    autocast: torch.dtype | None = None,
    extra_bytes: int = 0,
) -> Choice:
    """The fewest blocks with which a training step stays within a budget, found on shapes alone.

    Args:
        model: with what trains attached; on any device, the meta device too.
        batch: the largest that there will be.
        memory: for everything that a step holds: weights, gradients, optimiser state, what is kept for backward. "4GB", or bytes. What a
            device's libraries and its allocator's gaps take comes on top.
        make: of the optimiser. loss: of the model's output; its own if None. autocast: type of mixed precision.
        extra_bytes: what else will be held (copies of gradients in the buckets of DDP).

    Raises:
        ConfigError: it can't be read, or not even recomputing every block is enough.
    """
    from petiole.planning.passes import Figures, step

    budget = bytes_of(memory, "memory")

    seen: dict[int, Figures] = {}
    blocks: tuple[str, ...] = ()

    def peak(count: int) -> int:
        if count not in seen:
            with recomputed(model, blocks[:count]):
                seen[count] = step(model, batch, make, {}, loss=loss, autocast=autocast)
        return seen[count].peak_bytes + extra_bytes

    count = 0
    if peak(0) > budget:
        blocks = tuple(path for path, kept in kept_bytes(model, batch, autocast).items() if kept)
        if peak(len(blocks)) > budget:
            raise ConfigError(
                f"memory = {memory}: with all {len(blocks)} blocks recomputed a step still takes {peak(len(blocks)) / 1e6:,.1f} MB\n"
                "take a smaller batch, shorter inputs, bf16, or fewer trainable parameters"
            )
        count = fewest(peak, len(blocks), budget)
    return Choice(
        blocks[:count],
        among=len(blocks),
        budget_bytes=budget,
        peak_bytes=peak(count),
        plain_bytes=peak(0),
        step_flops=seen[count].step_flops,
        plain_flops=seen[0].step_flops,
        saved_bytes=seen[count].saved_bytes,
    )


def fewest(peak: Callable[[int], int], most: int, budget: int) -> int:
    """The smallest count whose peak is within the budget; peak(0) is beyond it, peak(most) within, and it does not rise.

    Blocks are mostly alike, so where a straight line between what is known meets the budget is tried first.
    """
    low, high = 0, most  # peak(low) > budget >= peak(high)
    while high - low > 1:
        above, below = peak(low), peak(high)
        guess = low + round((high - low) * (above - budget) / max(1, above - below))
        middle = min(high - 1, max(low + 1, guess))
        if peak(middle) <= budget:
            high = middle
            if high - low > 1 and peak(high - 1) > budget:  # the line is mostly right: then its neighbour settles it
                return high
        else:
            low = middle
    return high


def kept_bytes(model: nn.Module, batch: Any, autocast: torch.dtype | None = None) -> Mapping[str, int]:
    """What each block that can be recomputed keeps for the backward pass, in bytes, by path; 0 where nothing below it trains."""
    from petiole.planning.passes import Kept, quiet, unfused

    paths = list(units(model))
    with quiet(), unfused(), cost._bench(model, batch, None, autocast=autocast, fake=True) as bench:
        own = set(cost._storages([*bench.model.parameters(), *bench.model.buffers()]))
        kept, inside = {path: Kept(own) for path in paths}, list[str]()

        def pack(tensor: Tensor) -> Tensor:
            if inside:
                kept[inside[-1]].add(tensor)
            return tensor.detach()  # the tensor itself may refer to the node that keeps it: a cycle never freed

        for path in paths:
            module = bench.model.get_submodule(path)
            module.register_forward_pre_hook(lambda m, a, path=path: inside.append(path), prepend=True)
            module.register_forward_hook(lambda m, a, o: inside.pop() and None)
        bench.model.train()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = bench.forward()
        if not bench.parameters or not requires_grad(output):
            raise TrainingError("the loss depends on nothing that trains")
        return {path: each.bytes for path, each in kept.items()}


def requires_grad(output: Any) -> bool:
    """Whether anything in a model's output does."""
    return any(tensor.requires_grad for tensor in cost._tensors(output))


__all__ = ["Choice", "fewest", "fit", "kept_bytes", "recomputed", "units"]
