"""A module that may be skipped: what stands in for it, and how it is left out of a model for good.

    run:  f(x)        skipped:  x + A(x)        A: a bottleneck; f is not called

What stands in for a sub-layer, whose residual the block adds, gives A(x) alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import (
    _disable_current_modes,
)  # so that whoever counts operations sees none of a trial

from petiole.adaptation import Adaptation
from petiole.attach import Substitute, forget_compiled
from petiole.errors import AttachError
from petiole.junction import of_input, of_output
from petiole.method import Base, BlockDelta, shell
from petiole.methods.adapters.bottleneck import Bottleneck

Form = list[
    Any
]  # of a module's output: HIDDEN alone; or of each part HIDDEN, the number or name of the argument it is, or None
HIDDEN = "hidden state"
CAPTURE = "transformers.utils.output_capturing"  # whose hooks gather hidden states from block to block


class Skippable(BlockDelta):
    """x (..., d) -> x + A(x) while `skips`, else what the module gives.

    Args:
        size, bottleneck, options: of A, a `Bottleneck`.
        name: of the module.
        skips: whether it is skipped.
        residual: whether x is added: for whole blocks, not for sub-layers.
        attends: whether an attention goes with it, and so a place in a cache.
    """

    def __init__(
        self, name: str, size: int, bottleneck: int, *, skips: bool, residual: bool, attends: bool, **options: Any
    ) -> None:
        super().__init__()
        self.name, self.skips, self.residual, self.attends = name, skips, residual, attends
        self.adapter = Bottleneck(size, bottleneck, **options)
        self.form: Form | None = None
        self.prefix: Prefix | None = None  # while subnets are compared

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        self.adapter.initialise(generator, base)

    def structure(self) -> dict[str, Any]:
        return {"skips": self.skips, "form": self.form}

    def restructure(self, structure: Mapping[str, Any]) -> None:
        if structure:
            self.skips, self.form = bool(structure["skips"]), structure["form"]

    def forward(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The module's arguments -> what it would return."""
        if self.prefix is not None:
            return self.prefix.output(self, lambda: self.run(block, args, kwargs))
        return self.run(block, args, kwargs)

    def run(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.skips:
            return block(*args, **kwargs)
        h = of_input(args, kwargs)[0]
        if self.form is None:
            self.form = form_of(block, args, kwargs, h)
        if self.attends:
            hold_place(block, args, kwargs, h)
        new = self.adapter(h)
        if self.residual:
            new = h + new
        output: Any = new
        if self.form != [HIDDEN]:
            given = numbered(args, kwargs)
            output = tuple(new if part == HIDDEN else None if part is None else given[part] for part in self.form[1:])
        for hook in block._forward_hooks.values():
            if getattr(hook, "__module__", "") == CAPTURE:  # a model's hidden states are counted by block
                hook(block, args, output)
        return output


def form_of(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], h: Tensor) -> Form:
    """How a module returns its hidden state: alone, or in a tuple with arguments that it hands on.

    It is tried once on these arguments, without gradients, hooks or a cache, so that no trace is left.

    Raises:
        AttachError: what goes in and what comes out differ in shape, so nothing of the kind can stand in for it.
    """
    if torch.compiler.is_compiling():
        raise AttachError("a skipped block takes one forward pass before the model is compiled, to see what it returns")
    plain = without_cache(args, kwargs)
    with torch.no_grad(), _disable_current_modes():
        output = bare(block)(*plain[0], **plain[1])
    state = of_output(output)[0]
    if state.shape != h.shape:
        raise AttachError(
            f"{type(block).__name__} turns {tuple(h.shape)} into {tuple(state.shape)}, so it can't be skipped; leave it out of candidates"
        )
    if isinstance(output, Tensor):
        return [HIDDEN]
    known = {id(v): k for k, v in numbered(*plain).items() if isinstance(v, Tensor)}
    return ["tuple", HIDDEN, *(known.get(id(part)) for part in output[1:])]


def numbered(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Any, Any]:
    """Arguments by number or name."""
    return dict([*enumerate(args), *kwargs.items()])


def bare(block: nn.Module) -> nn.Module:
    """The block in evaluation mode without hooks, on the same tensors, to be tried without a trace."""
    trial = shell(block).eval()
    for module in trial.modules():
        for name, value in nn.Module().__dict__.items():
            if "_hooks" in name:
                module.__dict__[name] = type(value)() if value is not None else None
    return trial


def without_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A module's arguments with no cache of keys and values among them."""
    return tuple(None if is_cache(a) else a for a in args), {k: None if is_cache(v) else v for k, v in kwargs.items()}


# ------------------------------------------------------------------------------------------------------- caches while decoding


def is_cache(value: Any) -> bool:
    """Whether an argument is a cache of keys and values."""
    return hasattr(value, "get_seq_length") and hasattr(value, "update")


def numbered_layers(module: nn.Module) -> list[Any]:
    """The layers in a module that know their place in the cache, `layer_idx`."""
    return [m for m in module.modules() if type(m.__dict__.get("layer_idx")) is int]


def hold_place(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], h: Tensor) -> None:
    """One number for each token in the cache where a skipped attention has its place, until `prune` closes the ranks.

    Models read the length of the text so far off the first place. A place for the state of a recurrence keeps no tokens.
    """
    cache = next((v for v in (*args, *kwargs.values()) if is_cache(v)), None)
    places = {layer.layer_idx for layer in numbered_layers(block)}
    if cache is not None and places:
        own = getattr(cache, "self_attention_cache", cache)
        (place,) = places
        if all(hasattr(layer, "update") for layer in own.layers[place : place + 1]):
            nothing = h.new_zeros(h.shape[0], 1, h.shape[1], 1)
            own.update(nothing, nothing, place)


# ------------------------------------------------------------------------------------------------------------ comparing subnets


class Prefix:
    """What several subnets compute alike on one batch: up to the first module that one of them skips and another does not.

    In evaluation mode, equal decisions so far mean an equal output.
    """

    def __init__(self) -> None:
        self.decisions: tuple[tuple[str, bool], ...] = ()
        self.known: dict[tuple[tuple[str, bool], ...], tuple[Any, int]] = {}

    def begin(self) -> None:
        """Before each forward pass."""
        self.decisions = ()

    def output(self, delta: Skippable, run: Callable[[], Any]) -> Any:
        self.decisions += ((delta.name, delta.skips),)
        output, version = self.known.get(self.decisions, (None, -1))
        if output is None or of_output(output)[0]._version != version:  # the model may have written over it
            output = run()
            self.known[self.decisions] = output, of_output(output)[0]._version
        return output


# ---------------------------------------------------------------------------------------------------------------- for good


class Dropped(nn.Module):
    """In the place of a block whose weights are gone. Plain attributes are still there for the model to look at.

    Args:
        place: in the cache, where it keeps one.
    """

    def __init__(self, block: nn.Module, place: int | None) -> None:
        super().__init__()
        own = {n: v for n, v in block.__dict__.items() if n not in self.__dict__ and not n.startswith("_")}
        self.__dict__.update({**own, "layer_idx": place, "training": block.training})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise AttachError(
            "this block was pruned: it has no weights left, and only its stand-in can run\nload the backbone again to have it back"
        )


def close_ranks(blocks: Iterable[nn.Module], gone: Iterable[int]) -> None:
    """Let the places in the cache follow the attentions that are still there, IN PLACE."""
    missing = sorted(set(gone))
    seen: set[int] = set()
    for block in blocks:
        for layer in numbered_layers(block):
            if id(layer) not in seen:
                seen.add(id(layer))
                layer.layer_idx -= sum(other < layer.layer_idx for other in missing)


def adds_residual(module: nn.Module) -> bool:
    """Whether a sub-layer is handed the residual and adds it by itself."""
    return "residual" in inspect.signature(type(module).forward).parameters


def prune(tuned: Adaptation, batch: Mapping[str, Any] | None = None) -> list[str]:
    """Drop the weights of everything that is skipped from the model, IN PLACE, for good. What the model computes stays the same.

    Its state dict then holds none of them; a fresh model with the same adaptation takes it once it is pruned, too. Attentions that are
    left move up in the cache, unless their place also says how they work.

    Args:
        tuned: with `skip`, or after a search.
        batch: keyword arguments of a forward pass, needed only if none was made yet.

    Returns:
        What was dropped, by name.

    Raises:
        AttachError: nothing is skipped, or no forward pass has shown what a skipped block returns; nothing has changed then.
    """
    from petiole.tasks.loop import evaluating

    if batch is not None:
        with evaluating(tuned.model):
            tuned.model(**batch)
    skipped = [slot for slot in tuned.slots if isinstance(slot.delta, Skippable) and slot.delta.skips]
    if not skipped:
        raise AttachError(f"{tuned.name!r} skips nothing, so there is nothing to prune")
    unseen = [slot.delta.name for slot in skipped if slot.delta.form is None]
    if unseen:
        raise AttachError(f"prune: no forward pass has shown what {unseen[0]} returns; give prune a batch")
    standing = {id(m.delta): m for m in tuned.model.modules() if isinstance(m, Substitute)}
    movable = places_move(tuned.model)
    for stack in {slot.site.stack for slot in skipped} if movable else ():
        mine = [slot.delta for slot in skipped if slot.site.stack == stack and slot.delta.attends]
        gone = [layer.layer_idx for delta in mine for layer in numbered_layers(standing[id(delta)].block)]
        close_ranks((tuned.host.module(block.path) for block in tuned.host.anatomy.stack(stack).blocks), gone)
    for slot in skipped:
        stand_in = standing[id(slot.delta)]
        places = [] if movable or not slot.delta.attends else [m.layer_idx for m in numbered_layers(stand_in.block)]
        stand_in.block = Dropped(stand_in.block, places[0] if places else None)
    tuned.host.forget()
    forget_compiled()
    return [slot.delta.name for slot in skipped]


def places_move(model: nn.Module) -> bool:
    """Whether an attention's number says nothing but its place in the cache: all are of one type, and none is scaled by it."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    alike = len(set(getattr(text, "layer_types", None) or ())) < 2
    return alike and not getattr(text, "scale_attn_by_inverse_layer_idx", False)
