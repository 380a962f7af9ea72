"""Method and delta: what a published system has to say, and the registry that finds it.

A *method* is a validated configuration plus the rule that puts deltas on sites (`deltas`), names parameters of the backbone that train
in place (`trains`), and acts during training (the events). A *delta* is the small module on a site that computes the change. Nothing
here knows a method by name; a method registers itself by being defined.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import pkgutil
import reprlib
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from petiole.anatomy import Anatomy, Site
from petiole.errors import AttachError, ConfigError
from petiole.factored import Parts

shortened = reprlib.Repr()  # of values in messages
shortened.maxstring = shortened.maxother = 80

Composition = Literal["add", "multiply", "gate", "replace"]
Layers = tuple[int, ...] | None


def layers_field() -> Any:
    """The field `layers`, the same in every method."""
    return Field(None, description="Depths to adapt, counted from the input, negative from the end; every one if None.")


def stack_field() -> Any:
    """The field `stack`, for methods whose places have no role to name it by."""
    return Field(None, description="The stack to adapt (encoder, decoder, text, vision); every one if None.")


# ---------------------------------------------------------------------------------------------------------------------- deltas


RATE_FACTOR = "rate_factor"  # in a group of an optimiser: its learning rate as a multiple of the run's


class Delta(nn.Module):
    """The change at one site. Subclass one of the kinds below; they differ in what `forward` is given and may return."""

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        """Fill the parameters. Called once, on CPU, before the delta moves to its site's device.

        Args:
            generator: seeded for this site alone; the only source of randomness.
            base: the frozen tensors at the site, for methods that start from them.
        """

    host: Any = None  # of the model it is attached to; set by attach
    # Names of its own parameters, each with everything below it; what an optimiser should know about them:
    no_decay: Sequence[str] = ()  # weight decay leaves these alone, as it does every one of fewer than two dimensions
    rate_factors: Mapping[str, float] = {}  # learning rates of these, as multiples of the run's
    innermost: bool = False  # acts before all others at its place, whatever the order of attachment
    publishes: bool = False  # whether a loss term or a stream uses what it computes, so that its graph is needed there

    def given(self, name: str, default: Any = None) -> Any:
        """The value that `pt.given(model, name=…)` holds for this forward pass.

        Raises:
            AttachError: there is none, and no default.
        """
        value = self.host.given(name) if self.host is not None else None
        if value is None and default is None:
            raise AttachError(
                f"{type(self).__name__} needs a value for each forward pass: with pt.given(model, {name}=…)"
            )
        return default if value is None else value

    def folded_state(self) -> dict[str, Tensor]:
        """What is stored for deployment: parameters and persistent buffers, training-only devices folded away."""
        return self.state_dict()

    def unfold(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What `folded_state` gave, as it came from a file -> the state dict that it stands for."""
        return state

    def recipe(self) -> dict[str, Any]:
        """What the tensors that no file holds are built from, as JSON: seeds, a digest of the base weight. It stands in the file in
        their place, and where it comes out otherwise on load, the file is refused."""
        return {}

    def structure(self) -> dict[str, Any]:
        """Sizes that changed since construction (ranks that grew), as JSON of lists and plain values; empty where there are none."""
        return {}

    def restructure(self, structure: Mapping[str, Any]) -> None:
        """Rebuild the sizes that `structure` gave, so that the stored tensors fit; {} asks for those at construction."""
        if structure:
            raise AttachError(f"{type(self).__name__} has no variable structure, but one was stored: {structure}")


class WeightDelta(Delta):
    """A change of a weight: W <- W + ΔW, b <- b + Δb. `forward` gives the change of the output without forming ΔW."""

    # Whether its change is another one for each token, so that there is no ΔW: what changes the same weight after it sees W without it.
    depends_on_input: bool = False

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """x, as the frozen module got it -> Δy (..., out). The fallback forms ΔW; methods override it with something cheaper."""
        return base.apply(x, self.weight(base.weight), self.bias(base.bias))

    def factored(self) -> Parts | None:
        """A (r, in), B (out, r), scale and Δb with ΔW = scale · B A, if in this forward pass the change is nothing more than that.

        A fifth is a core C between them, (r, r) or its diagonal (r,): ΔW = scale · B C A. Worth it where C trains and A is frozen, or
        where C is a diagonal (n, 1, r) of its own for each of the n rows of the batch.
        """
        return None

    def weight(self, base: Tensor) -> Tensor:
        """Frozen W (out, in, ...) -> ΔW of the same shape."""
        raise NotImplementedError(f"{type(self).__name__} doesn't say its ΔW")

    def bias(self, base: Tensor | None) -> Tensor | None:
        """Frozen b (out,) -> Δb (out,), None where the bias is left alone."""
        return None


class HiddenDelta(Delta):
    """A change of a hidden state: h <- h + Δ, or another composition. `forward`: h (..., d) -> Δ (..., d)."""

    composition: Composition = "add"
    reads_both: bool = False  # where it reads elsewhere, forward(source, h) is given the state that it changes, too

    def by_row(self, deltas: Sequence[Any], index: Tensor, h: Tensor) -> Tensor | None:
        """Another delta for each row: h (n, t, d), index (n,) into `deltas` (-1: any) -> Δ (n, t or 1, d); None if they don't batch.

        The fallback runs deltas that differ in nothing but the values of their parameters as one, with those gathered by row. Others
        can be padded by overriding this.
        """
        states = [dict(delta.named_parameters()) for delta in deltas]
        shapes = [{name: p.shape for name, p in state.items()} for state in states]
        same = all(alike(d, deltas[0]) for d in deltas) and all(shape == shapes[0] for shape in shapes)
        if (
            not same
            or not shapes[0]
            or (self.training and any(isinstance(m, nn.Dropout) and m.p for m in self.modules()))
        ):
            return None
        place = index.clamp_min(0).to(h.device)
        gathered = {name: torch.stack([state[name] for state in states]).index_select(0, place) for name in shapes[0]}

        stand_in = shell(
            deltas[0]
        )  # whose parameters are replaced for the call, while other threads go on using the delta
        stand_in.__dict__["host"] = OneRow()

        def one(state: dict[str, Tensor], row: Tensor) -> Tensor:
            change = torch.func.functional_call(stand_in, state, (row,))
            return change if change.ndim > 1 else change[None]

        try:
            return torch.func.vmap(one)(gathered, h)
        except (
            RuntimeError,
            AttachError,
        ):  # it looks at values, draws random numbers, or wants what is given for the batch
            return None


@dataclass(frozen=True)
class Attended:
    """What one call of an attention computed, for the rows that a delta acts on.

    Attributes:
        probabilities: (B, heads, T, S), after softmax and before dropout.
        query: (B, heads, T, d). value: (B, heads, S, d), those in a cache and extra ones in front; heads that share theirs have a copy
            each. As the attention function got them; those of an attention without one, as their linears give them.
    """

    probabilities: Tensor
    query: Tensor
    value: Tensor

    def index_select(self, dim: int, rows: Tensor) -> Attended:
        """The same of some rows."""
        return Attended(*(t.index_select(dim, rows) for t in (self.probabilities, self.query, self.value)))


class AttendedDelta(HiddenDelta):
    """A change of a hidden state by what an attention computed. `forward`: `Attended`, h (..., d) -> Δ (..., d).

    Its place reads the attention and writes after it. It acts wherever the attention goes through Transformers' attention interface, or
    returns its probabilities whatever it is asked for.
    """

    reads_both = True

    def forward(self, attended: Attended, h: Tensor) -> Any:
        raise NotImplementedError


class OneRow:
    """The host of a delta that sees one row: what is given for the batch is not that row's."""

    def given(self, name: str, default: Any = None) -> Any:
        raise AttachError(f"{name} is given for the whole batch")

    def passing(self) -> Any:
        raise AttachError("a forward pass is of the whole batch")

    def once(self, name: str, make: Any) -> Any:
        raise AttachError(f"{name} is computed for the whole batch")


def alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules are built alike: classes and plain attributes the same, all through, and no buffers."""
    pairs = list(zip(one.modules(), other.modules(), strict=False))
    if len(pairs) != len(list(one.modules())) or len(pairs) != len(list(other.modules())):
        return False

    def attributes(module: nn.Module) -> dict[str, Any]:
        return {k: v for k, v in module.__dict__.items() if not k.startswith("_") and k != "host"}

    def same(a: Any, b: Any) -> bool:
        plain = isinstance(a, (bool, int, float, str, type(None), torch.dtype, torch.device))
        return a is b or (plain and type(a) is type(b) and a == b)

    return all(
        type(a) is type(b)
        and not (a._buffers or b._buffers)
        and attributes(a).keys() == attributes(b).keys()
        and all(same(value, attributes(b)[key]) for key, value in attributes(a).items())
        for a, b in pairs
    )


def shell(module: nn.Module) -> nn.Module:
    """The same module with dictionaries of its own: what is put in its parameters' place is not seen in the original."""
    copy = module.__class__.__new__(module.__class__)
    copy.__dict__.update(module.__dict__)
    copy._parameters, copy._buffers = dict(module._parameters), dict(module._buffers)
    copy._modules = {name: None if child is None else shell(child) for name, child in module._modules.items()}
    return copy


class ModuleDelta(Delta):
    """Computes a module's whole output anew: `forward` takes the module's own arguments and returns what it returns."""


class AttentionDelta(Delta):
    """A change inside attention, through Transformers' attention interface."""

    needs_probabilities: bool = False

    def keys_values(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor] | None:
        """Extra keys and values put before the real ones, never masked: key, value (B, heads, T, d) -> two (B, heads, length, d)."""
        return None

    def score_bias(self, query: Tensor, key: Tensor) -> Tensor | None:
        """Added to the scores before softmax: query (B, heads, T, d), key (B, heads, S, d) -> (B or 1, heads or 1, T or 1, S).

        In float32, whatever the type of the scores. Extra keys of deltas before this one are among those of `key`, in front.
        """
        return None

    def probabilities(self, probabilities: Tensor, value: Tensor) -> Tensor:
        """Probabilities (B, heads, T, S) after softmax, before dropout, and values (B, heads, S, d) -> new probabilities."""
        return probabilities

    def heads_output(self, output: Tensor, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Concatenated heads (B, T, heads, d) before the output projection -> the same, changed. Scores are query · key · scaling."""
        return output


class TokenDelta(Delta):
    """Extra input tokens. `forward`: batch size -> tokens (B, length, d). On a block's input: inserted at the lowest depth,
    put in place of the earlier ones at every higher depth, taken away after the last block."""

    length: int

    def forward(self, batch: int) -> Tensor:
        raise NotImplementedError

    def joined(self, h: Tensor, places: Tensor) -> Tensor:
        """What the tokens are put in front of, h (B, T, d) -> the same, changed: where they enter, so before positions are added.

        While decoding, what was generated does not come here.

        Args:
            places: (B or 1, T), of each token in its row's own text, from 0. Padding in front does not count, padding behind goes on
                counting; -1 for what is no text (an image's tokens among those of a text).
        """
        return h


class BlockDelta(Delta):
    """Stands in for a block. `forward(block, *args, **kwargs)` is called instead of the block and returns what it would."""


class AroundDelta(Delta):
    """Acts at both ends of a module, which may see another batch in between: several streams side by side, or one of several.

    What enters first leaves last, after all other changes at the module. Streams that go on beside the model's own hidden state are
    published: `self.host.streams`.
    """

    publishes = True

    def enter(self, h: Tensor) -> Tensor:
        """The hidden state h (n, ...) that comes -> what the module is given in its place."""
        return h

    def leave(self, y: Tensor, h: Tensor) -> Tensor:
        """The module's output y, and h as it came -> the new output."""
        return y


class StackDelta(Delta):
    """A network beside a stack. `forward`: the hidden states, the stack's input first -> the stack's new last hidden state.

    At a block's input instead, it gets the states up to there, and what it gives is the block's input. None changes nothing.
    """

    reads: Sequence[int] | None = None  # states to be held: 0 is the stack's input, i + 1 the output of block i
    reads_calls: bool = False  # forward(states, calls, h): the blocks' calls, too, and the state that it replaces
    detaches: bool = False  # it gets, and leaves to the blocks that it reads, no graph
    writes: str = "block"  # after the last block; "stack": after the final norm; or after the module at this path

    def late(self, block: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Where it sits at a block's input: what that block and those after it are given beside their hidden state; None as it is."""
        return None


# ------------------------------------------------------------------------------------------------------------------------ base


class Base:
    """The frozen tensors at a weight site, as the site sees them: rows of a fused tensor cut out, (in, out) layouts transposed,
    quantised weights dequantised. `output` is the frozen module's output for these rows during a forward pass."""

    def __init__(
        self, site: Site, module: nn.Module, output: Tensor | None = None, prior: Sequence[tuple[Site, Any]] = ()
    ) -> None:
        self.site, self.module, self.output, self._prior = site, module, output, prior

    @property
    def weight(self) -> Tensor:
        """W (out, in, ...), including what earlier deltas did to the same tensor."""
        if not self._prior:
            return read_weight(self.site, self.module)
        whole = wide(plain(raw(self.module, self.site.parameter)).detach())
        for site, delta in self._prior:
            whole = composed(whole, [(site, delta.weight(view(site, whole)), True)])
        return view(self.site, whole)

    @property
    def bias(self) -> Tensor | None:
        """b (out,) or None, including what earlier deltas did to the same tensor."""
        whole = raw(self.module, self.site.bias) if self.site.bias and hasattr(self.module, self.site.bias) else None
        if not isinstance(whole, Tensor):
            changes = [delta.bias(None) for site, delta in self._prior if site.rows == self.site.rows]
            return reduce(add_bias, changes, None)
        whole = wide(whole.detach()) if self._prior else whole.detach()
        for site, delta in self._prior:
            change = delta.bias(view_bias(site, whole))
            whole = whole if change is None else composed(whole, [(site, change, False)])
        return view_bias(self.site, whole)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The site's own operation with another weight: x -> y. Linear, embedding or convolution by the site's kind."""
        weight = weight.to(x.dtype) if x.is_floating_point() else weight
        bias = None if bias is None else bias.to(weight.dtype)
        if self.site.kind == "embedding":
            return nn.functional.embedding(x, weight.transpose(0, 1))
        if self.site.kind == "conv":
            return convolve(self.module, x, weight, bias)
        return nn.functional.linear(x, weight, bias)


def convolve(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply `module`'s convolution (stride, padding, dilation, groups) with another kernel (out, in / groups, *kernel)."""
    own = getattr(module, "_conv_forward", None)
    if own is not None:  # torch's own layers may pad with something else than zeros
        return own(x, weight, bias)
    names = {3: "conv1d", 4: "conv2d", 5: "conv3d"}
    function = getattr(nn.functional, names[weight.ndim])
    options = {k: getattr(module, k) for k in ("stride", "dilation", "groups")}
    return function(x, weight, bias, padding=module.padding, **options)


def add_bias(bias: Tensor | None, change: Tensor | None) -> Tensor | None:
    """Sum of two biases, either of which may be missing."""
    if bias is None or change is None:
        return bias if change is None else change
    return bias + change


def cut(tensor: Tensor, rows: tuple[tuple[int, int], ...]) -> Tensor:
    """The named row ranges of a tensor's first dimension, in order; a view where one range suffices."""
    if not rows:
        return tensor
    parts = [tensor[start:stop] for start, stop in rows]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


ASIDE = "_petiole_aside"  # in a module's dictionary: the values that stand for its own tensors in this forward pass


def raw(module: nn.Module, name: str) -> Tensor:
    """A module's own tensor, even while a composed one stands in its place; what it was, where its training does not act now."""
    aside = module.__dict__.get(ASIDE)
    if aside is not None and name in aside:
        return aside[name]
    own = module._parameters.get(name)
    return own if own is not None else getattr(module, name)


def read_weight(site: Site, module: nn.Module) -> Tensor:
    """The frozen weight at a site as (out, in, ...). A view of the parameter where the layout allows it."""
    return view(site, plain(raw(module, site.parameter)).detach())


def plain(weight: Tensor) -> Tensor:
    """A weight as ordinary numbers: dequantised where it is not."""
    if weight.is_floating_point() and type(weight) in (Tensor, nn.Parameter):
        return weight
    return weight.dequantize() if hasattr(weight, "dequantize") else weight


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least: what weights are added up in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def view(site: Site, weight: Tensor) -> Tensor:
    """A whole weight tensor as the site sees it: its expert, (out, in, ...), its rows."""
    if site.expert >= 0:
        weight = weight[site.expert]
    return cut(weight.transpose(0, 1) if flipped(site) else weight, site.rows)


def flipped(site: Site) -> bool:
    """Whether the tensor is stored (in, out): GPT-2's Conv1D, some packed experts, embeddings."""
    return site.transposed or site.kind == "embedding"


def view_bias(site: Site, bias: Tensor) -> Tensor:
    """A whole bias tensor as the site sees it: its expert, its rows."""
    return cut(bias[site.expert] if site.expert >= 0 else bias, site.rows)


def composed(whole: Tensor, parts: Sequence[tuple[Site, Tensor, bool]]) -> Tensor:
    """whole + changes, each in its site's layout, rows and expert. The last entry of a part says whether it is the weight."""
    by_expert: dict[int, list[Tensor]] = {}
    for site, change, weight in parts:
        flip, first = weight and flipped(site), 1 if site.expert >= 0 else 0
        if site.rows:
            shape = (whole.shape[first + 1 if flip else first], *change.shape[1:])
            change = add_rows(change.new_zeros(shape), change, site.rows, 0)
        change = change.transpose(0, 1) if flip else change
        by_expert.setdefault(site.expert, []).append(change.to(whole.dtype))
    for change in by_expert.pop(-1, []):
        whole = whole + change
    if by_expert:
        stacked = torch.stack([sum(changes[1:], changes[0]) for changes in by_expert.values()])
        whole = whole.index_add(0, torch.tensor(list(by_expert), device=whole.device), stacked)
    return whole


def add_rows(y: Tensor, change: Tensor, rows: tuple[tuple[int, int], ...], axis: int) -> Tensor:
    """Add a change to the features of y (along `axis`) that `rows` name; the change holds just those, in order."""
    parts, at, used = [], 0, 0
    for start, stop in rows:
        parts += [
            y.narrow(axis, at, start - at),
            y.narrow(axis, start, stop - start) + change.narrow(axis, used, stop - start),
        ]
        at, used = stop, used + stop - start
    return torch.cat([*parts, y.narrow(axis, at, y.shape[axis] - at)], axis)


# --------------------------------------------------------------------------------------------------------------------- methods


@dataclass(frozen=True)
class Place:
    """A delta and where it sits.

    Attributes:
        site: where the change is written.
        delta: the module that computes it.
        read: where it reads, if elsewhere (parallel insertion: the input of what `site` is the output of).
    """

    site: Site
    delta: Delta
    read: Site | None = None


@dataclass
class Moment:
    """What an event is given. Tensors of `state` are saved with checkpoints.

    Attributes:
        deltas: this method's deltas, by site key.
        shared: the module that the whole attachment owns, if the method made one.
        seed: for this method in this attachment.
        step: optimiser steps done. epoch: fractional. progress: share of training done, in [0, 1]. total_steps: 0 if unknown.
        optimizer: None outside training. learning_rate: of the first group.
        state: what this method remembers between events: numbers, strings, lists, tensors.
        training: the `Events` that fire, None outside training.
    """

    model: nn.Module
    deltas: Mapping[str, Delta]
    shared: nn.Module | None = None
    seed: int = 0
    step: int = 0
    epoch: float = 0.0
    progress: float = 0.0
    total_steps: int = 0
    optimizer: torch.optim.Optimizer | None = None
    learning_rate: float = 0.0
    state: dict[str, Any] = field(default_factory=dict)
    training: Any = None

    def add_parameters(self, parameters: Iterable[nn.Parameter], *, warmup_steps: int | None = None) -> None:
        """Train these from now on. They stand in the method's deltas already, new or no longer frozen.

        They become one new group of the optimiser (one for each kind, where some don't decay or have a learning rate of their own)
        with the run's options; the schedule, the other processes, checkpoints and resuming follow. What was trained before keeps its
        place and the optimiser's memory of it. Outside training there is nothing to do: an optimiser made later takes what it finds.
        With several processes all must add the same; decide from `averaged` values.

        Args:
            warmup_steps: a schedule of their own: up from 0 in so many steps, then down to 0 at the end of the run; None for the run's.

        Raises:
            TrainingError: one of them stands in no delta of this model, or in the optimiser already; or the processes differ.
        """
        if self.training is not None:
            self.training.add_parameters(list(parameters), warmup_steps)

    def drop_parameters(self, parameters: Iterable[nn.Parameter]) -> None:
        """Train these no longer: the optimiser forgets them, groups keep their place. Taking them out of the delta is the method's."""
        if self.training is not None:
            self.training.drop_parameters(list(parameters))

    def averaged(self, tensor: Tensor) -> Tensor:
        """The mean over all processes, the same on each; the tensor itself where there is one process."""
        return tensor if self.training is None else self.training.averaged(tensor)


class Config(BaseModel):
    """Validated fields: a method, or a part of one that has fields of its own."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, arbitrary_types_allowed=False, allow_inf_nan=False
    )

    def __init__(self, **fields: Any) -> None:
        """Validate the fields.

        Raises:
            ConfigError: names the field, the value given and the allowed range, or the fields there are.
        """
        for name, value in fields.items():
            info = type(self).model_fields.get(name)
            if isinstance(value, bool) and info is not None and bool not in kinds(info.annotation):
                raise ConfigError(f"{type(self).__name__}.{name} = {value}: {info.description or 'it is no switch'}")
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise ConfigError(explain(type(self), error)) from None


class Method(Config):
    """A published system. Subclasses add fields, `deltas` and, where they act over time, events."""

    slug: ClassVar[str] = ""
    title: ClassVar[str] = ""  # of the paper
    paper: ClassVar[str] = ""  # arXiv id
    saves: ClassVar[str] = ""  # what it saves against full fine-tuning, in a few words
    version: ClassVar[int] = 1  # raised when old files no longer mean the same
    # What the method can do; the conformance suite reads it here.
    merges: ClassVar[bool] = False
    identity_at_start: ClassVar[bool] = False
    routes: ClassVar[bool] = True
    idles: ClassVar[str] = ""  # why a delta may go without a gradient in one step (experts that no token chose)
    compiles: ClassVar[bool] = True
    one_task: ClassVar[bool] = False  # states are a task's own, so a model with several decoders runs once for each
    size: ClassVar[str] = ""  # the field that scales it: rank, bottleneck, length
    builds_on: ClassVar[str] = ""  # what must be attached before it, so that it runs on no bare backbone
    learning_rates: ClassVar[tuple[float, float]] = (3e-4, 3e-2)  # where a search looks
    exempt: ClassVar[Mapping[str, str]] = {}  # check of the conformance suite -> why it can't hold

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        super().__pydantic_init_subclass__(**options)
        if not cls.__dict__.get("slug"):
            return
        other = _REGISTRY.get(cls.slug)
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigError(f"two methods call themselves {cls.slug!r}: {other.__module__} and {cls.__module__}")
        _REGISTRY[cls.slug] = cls

    @classmethod
    def family(cls) -> str:
        """The folder the method stands in: `lowrank`, `adapters`, …"""
        parts = cls.__module__.split(".")
        return (
            parts[2]
            if parts[:2] == ["petiole", "methods"] and len(parts) > 3
            else parts[1]
            if parts[0] == "petiole"
            else parts[0]
        )

    # ---- what sits where

    def deltas(self, anatomy: Anatomy) -> Iterator[Place]:
        """Say which delta sits on which site."""
        yield from ()

    def deltas_on(self, anatomy: Anatomy, model: nn.Module) -> Iterator[Place]:
        """The same, for deltas that are built like the backbone's own modules. No value of the model is read here."""
        yield from self.deltas(anatomy)

    def shared(self, anatomy: Anatomy) -> nn.Module | None:
        """A module whose parameters the whole attachment owns; `deltas` reaches it through `bind`."""
        return None

    def bind(self, deltas: Mapping[str, Delta], shared: nn.Module | None) -> None:
        """Tie the deltas to the shared module, or to each other. Called once after both are built and initialised."""

    def trains(self, anatomy: Anatomy, model: nn.Module) -> Iterable[str]:
        """Names of the backbone's own parameters that train in place, and of running statistics that move."""
        return ()

    def stays(self, deltas: Mapping[str, Delta]) -> Mapping[str, str]:
        """Deltas that can't be folded into weights: key -> why. All of them where the method does not merge."""
        if not self.merges:
            return dict.fromkeys(deltas, "what it computes is not a change of a weight")
        why = "each token has a change of its own"
        return {key: why for key, d in deltas.items() if isinstance(d, WeightDelta) and d.depends_on_input}

    def folded(self) -> Method:
        """The configuration under which `folded_state` loads: this one, unless a training-only device was folded away."""
        return self

    # ---- what happens over time

    def on_attach(self, moment: Moment) -> None:
        """Once, after everything sits."""

    def calibrate(self, moment: Moment, batches: Iterable[Mapping[str, Any]]) -> None:
        """Before the first step, with batches of training data; only called where a method overrides it."""

    def before_step(self, moment: Moment) -> None:
        """Before the forward pass of an optimiser step."""

    def loss(self, moment: Moment) -> Tensor | None:
        """An extra term, added to the task's loss of every forward pass in training."""
        return None

    def before_optimizer_step(self, moment: Moment) -> None:
        """Gradients are complete and clipped."""

    def after_optimizer_step(self, moment: Moment) -> None:
        """Parameters have moved."""

    def epoch_end(self, moment: Moment) -> None:
        """After each epoch."""

    def overrides(self, event: str) -> bool:
        """Whether this method does anything at `event`."""
        return getattr(type(self), event) is not getattr(Method, event)


def kinds(annotation: Any) -> set[Any]:
    """The plain types in an annotation such as `int | None`."""
    return {annotation}.union(*(kinds(part) for part in typing.get_args(annotation)))


def explain(cls: type[BaseModel], error: ValidationError) -> str:
    """A pydantic refusal in at most three lines: field, value, allowed range or nearest names."""
    lines: list[str] = []
    for item in error.errors()[:2]:
        if isinstance(part := item.get("ctx", {}).get("error"), ConfigError):
            lines.append(str(part))  # it names its own fields
            continue
        name = ".".join(str(part) for part in item["loc"]) or "configuration"
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(name, cls.model_fields, n=1)
            lines.append(
                f"{cls.__name__} has no field {name!r}{f'; did you mean {near[0]}?' if near else ''}"
                f" It has {', '.join(cls.model_fields) or 'none at all'}"
            )
        else:
            about = (
                cls.model_fields[str(item["loc"][0])].description
                if item["loc"] and str(item["loc"][0]) in cls.model_fields
                else ""
            )
            lines.append(
                f"{cls.__name__}.{name} = {shortened.repr(item.get('input'))}: {item['msg']}"
                + (f" ({about})" if about else "")
            )
    more = len(error.errors()) - len(lines)
    return "\n".join(lines + ([f"and {more} more"] if more else []))


# -------------------------------------------------------------------------------------------------------------------- registry

_REGISTRY: dict[str, type[Method]] = {}
_FAMILIES = (
    "methods",
    "multitask",
    "continual",
    "merging",
    "distillation",
    "initialisation",
    "representation",
    "blackbox",
)
_found = False


def registry() -> dict[str, type[Method]]:
    """Every method there is, by slug: petiole's own files and those of packages with an entry point in `petiole.methods`."""
    global _found
    if not _found:
        for family in _FAMILIES:
            try:
                package = importlib.import_module(f"petiole.{family}")
            except ModuleNotFoundError as error:
                if error.name != f"petiole.{family}":
                    raise
                continue
            for module in pkgutil.walk_packages(package.__path__, f"petiole.{family}."):
                importlib.import_module(module.name)
        for entry in importlib.metadata.entry_points(group="petiole.methods"):
            entry.load()
        _found = True
    return dict(sorted(_REGISTRY.items()))


def find(slug: str) -> type[Method]:
    """The method called `slug`.

    Raises:
        ConfigError: there is none; the message lists the nearest names.
    """
    known = registry()
    if slug not in known:
        near = difflib.get_close_matches(slug, known, n=3, cutoff=0.4)
        raise ConfigError(
            f"no method is called {slug!r}"
            + (f"; did you mean {', '.join(near)}?" if near else "")
            + f"\nknown: {', '.join(known)}"
        )
    return known[slug]
