"""Put deltas on sites, take them away again, and say which of them act.

`attach` first plans (which delta on which site, built and initialised, nothing touched) and then installs, undoing everything if a step
fails. All that is known about an attached model stands in its `Host`, found at `model._petiole`; `detach` removes that too.
"""

from __future__ import annotations

import hashlib
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from petiole import attention, context, terms, tokens
from petiole.adaptation import Adaptation
from petiole.anatomy import Anatomy, Site, anatomy
from petiole.attended import AttendedSlot, check_reads
from petiole.context import Names, Recall
from petiole.errors import AttachError, ConfigError
from petiole.junction import (
    AroundSlot,
    AttentionSlot,
    BlockSlot,
    HiddenSlot,
    Junction,
    Lock,
    ModuleSlot,
    ParameterJunction,
    ParameterSlot,
    Prior,
    Slot,
    StackSlot,
    WeightSlot,
)
from petiole.method import (
    ASIDE,
    AroundDelta,
    AttendedDelta,
    AttentionDelta,
    Base,
    BlockDelta,
    Delta,
    HiddenDelta,
    Method,
    ModuleDelta,
    Place,
    StackDelta,
    TokenDelta,
    WeightDelta,
    raw,
)
from petiole.streams import Streams

HEAD = -1  # the number that stands for the task head among the numbers of an adaptation's methods
_CHILD = "petiole"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


# ------------------------------------------------------------------------------------------------------------------------- plan


@dataclass
class Plan:
    """What an attachment would do: every delta built and initialised, the model untouched."""

    methods: tuple[Method, ...]
    places: list[tuple[int, Place]] = field(default_factory=list)
    shared: dict[int, nn.Module] = field(default_factory=dict)
    trained: list[str] = field(default_factory=list)

    def keyed(self) -> list[tuple[str, int, Place]]:
        """Each place with its key: "0.encoder.3.q.output"; a second delta at one place of a method gets ".1" behind it."""
        count: dict[str, int] = {}
        found = []
        for number, place in self.places:
            key = f"{number}.{place.site.key}.{place.site.side}"
            found.append((f"{key}.{count[key]}" if key in count else key, number, place))
            count[key] = count.get(key, 0) + 1
        return found


def plan(model: nn.Module, methods: Sequence[Method], found: Anatomy, seed: int, train_head: bool | None) -> Plan:
    """Build and initialise all deltas. The global random generator ends where it was."""
    made, host = Plan(tuple(methods)), host_of(model)
    refuse_sharded(model)
    refuse_nested(model)
    with torch.random.fork_rng(devices=[]), host.own_aside() if host is not None else nullcontext():
        for number, method in enumerate(methods):
            # For modules that initialise themselves when built: on CPU, so no other device's generator is touched.
            torch.default_generator.manual_seed(site_seed(seed, f"{number}"))
            places = list(method.deltas_on(found, model))
            shared = method.shared(found)
            if shared is not None:
                made.shared[number] = shared
                ready(shared, None, site_seed(seed, f"{number}.shared"), device_of(model, model))
            for place in places:
                check_fits(method, place, found, beneath(model.get_submodule(place.site.path)))
            made.places += [(number, place) for place in places]
            mine = {key: place for key, owner, place in made.keyed() if owner == number}
            for key, place in mine.items():
                module = beneath(model.get_submodule(place.site.path))
                ready(place.delta, Base(place.site, module), site_seed(seed, key), device_of(module, model))
            method.bind({key.partition(".")[2]: place.delta for key, place in mine.items()}, shared)
            trained = list(method.trains(found, model))
            if not places and not trained and (method.overrides("deltas") or method.overrides("deltas_on")):
                raise AttachError(
                    f"{method.slug or type(method).__name__} finds no place on {found.model_class}, which has {', '.join(found.roles)}"
                )
            made.trained += [name for name in trained if name not in made.trained]
        heads = found.heads()
        if train_head and not heads:
            raise AttachError(
                f"train_head=True, but {found.model_class} has no task head (a language-model head is none)"
            )
        for site in heads if train_head is not False else ():
            module = model.get_submodule(site.path)
            own = {f"{site.path}.{name}" for name, _ in module.named_parameters()}
            if not own & set(made.trained) and not any(renews(place, site.path) for _, place in made.places):
                made.places.append((HEAD, Place(site, HeadDelta(module))))
    keys = [(number, place.site.key, place.site.side, type(place.delta)) for number, place in made.places]
    if len(set(keys)) < len(keys):
        double = next(key for key in keys if keys.count(key) > 1)
        raise AttachError(f"{methods[double[0]].slug}: two deltas of one kind on one site, {double[1]} ({double[2]})")
    if not made.trained and not any(p.requires_grad for p in parameters_of(made)):
        what = ", ".join(method.slug or type(method).__name__ for method in methods)
        raise AttachError(
            f"{what} on {found.model_class}: nothing would train\nthe backbone has {', '.join(found.roles)}, and "
            f"{'a' if heads else 'no'} task head"
        )
    return made


def renews(place: Place, path: str) -> bool:
    """Whether a delta gives a module's whole output, so that nothing of the module's own is left in it."""
    if isinstance(place.delta, StackDelta):
        return place.delta.writes == path
    return isinstance(place.delta, ModuleDelta) and place.site.path == path


def refuse_nested(model: nn.Module) -> None:
    """One host for each parameter: a second one, of a model within or around, would freeze the deltas of the first."""
    if host_of(model) is not None:
        return
    for name, module in model.named_modules():
        if module is not model and host_of(module) is not None:
            raise AttachError(f"{name} has adaptations of its own; attach to it, or detach them first")
        if any(child.startswith(_CHILD) for child in module._modules):
            raise AttachError(f"this {type(model).__name__} is part of a model that has adaptations; attach to that")


def sequence_first(model: nn.Module) -> bool:
    """Whether hidden states are (T, B, d), as torch's own attention has them unless told otherwise."""
    return any(isinstance(m, nn.MultiheadAttention) and not m.batch_first for m in model.modules())


def refuse_sharded(model: nn.Module) -> None:
    """Refuse a model that is sharded: what is added to it would not be, and each process would train its own."""
    sharded = next((name for name, parameter in model.named_parameters() if hasattr(parameter, "full_tensor")), None)
    if sharded is not None:
        raise AttachError(
            f"{sharded} is sharded over processes already: attach or load first, then shard (fully_shard)"
        )


def parameters_of(made: Plan) -> Iterator[nn.Parameter]:
    for module in [*(place.delta for _, place in made.places), *made.shared.values()]:
        yield from module.parameters()


def ready(module: nn.Module, base: Base | None, seed: int, device: torch.device) -> None:
    """Initialise on CPU, then move to the device of its site, or of the model. A model on the meta device gets deltas without values."""
    if device.type == "meta":
        module.to(device)
        return
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        if isinstance(module, Delta) and base is not None:
            module.initialise(generator, base)
        elif hasattr(module, "initialise"):
            module.initialise(generator)  # type: ignore[operator]
    module.to(device)


def site_seed(seed: int, key: str) -> int:
    """A seed for one site: the same on every machine, whatever else is attached."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big") >> 1


def device_of(module: nn.Module, model: nn.Module) -> torch.device:
    for owner in (module, model):
        for tensor in (*owner.parameters(), *owner.buffers()):
            return tensor.device
    return torch.device("cpu")


def check_fits(method: Method, place: Place, found: Anatomy, module: nn.Module) -> None:
    """Refuse a delta where it can't act, or would change more than its site, before anything is attached."""
    site, delta = place.site, place.delta
    where = f"{method.slug or type(method).__name__}: {site.key}"
    if site.rows and isinstance(delta, HiddenDelta) and site.side == "input":
        raise AttachError(
            f"{where} is one part of a fused linear, so the others have the same input\n"
            f"change its output instead, or the input of the whole"
        )
    if isinstance(delta, ModuleDelta) and (site.rows or site.path != site.exit):
        raise AttachError(
            f"{where} is {'a part of a' if site.rows else 'more than one'} module, which can't be renewed as one"
        )
    if isinstance(delta, AroundDelta):
        if site.rows or site.path != site.exit or site.kind == "parameter":
            raise AttachError(f"{where} is not one module that is called, so nothing can stand around it")
        if sequence_first(module):
            raise AttachError(f"{where} holds its hidden states as (time, batch, width); streams need batch_first=True")
    if isinstance(delta, BlockDelta) and not (
        site.path.rpartition(".")[2].isdecimal() if site.role == "block" else one_module(site)
    ):
        raise AttachError(
            f"{where} is not a block of a list, nor a sub-layer that is one module, for which something could stand in"
        )
    if isinstance(delta, (StackDelta, TokenDelta)):
        if site.role != "block":
            raise AttachError(f"{where} is not a block of a list, where a {type(delta).__name__} could sit")
        if isinstance(delta, TokenDelta) and sequence_first(module):
            raise AttachError(f"{where} holds its hidden states as (time, batch, width); tokens need batch_first=True")
        if isinstance(delta, StackDelta) and sequence_first(module) and delta.reads_calls:
            raise AttachError(
                f"{where} holds its hidden states as (time, batch, width); side networks need batch_first=True"
            )
        if site.repeats > 1 and isinstance(delta, StackDelta):
            raise AttachError(
                f"{where} runs {site.repeats} times in one forward pass, which a {type(delta).__name__} can't follow"
            )
    if site.kind == "embedding" and isinstance(delta, HiddenDelta) and site.side == "input":
        raise AttachError(f"{where} takes the numbers of tokens, so only its output can change")
    if site.kind == "embedding" and isinstance(delta, WeightDelta) and not looks_up(module):
        raise AttachError(
            f"{where} is a {type(module).__name__}, which does more than look up rows; change its output instead"
        )
    if getattr(module, "transposed", False) is True and isinstance(delta, WeightDelta):
        raise AttachError(f"{where} is a transposed convolution, whose weight is not (out, in, …)")
    if (
        site.kind == "parameter"
        and module._parameters.get(site.parameter) is None
        and site.parameter not in module._buffers
    ):
        raise AttachError(
            f"{where} is computed from other tensors (a parametrisation), so nothing can stand in its place"
        )
    if isinstance(delta, WeightDelta) and site.kind not in ("linear", "conv", "embedding", "parameter"):
        raise AttachError(f"{where} is a {site.kind}, which has no weight to change; name a linear role")
    if site.kind == "parameter" and isinstance(delta, WeightDelta) and delta.depends_on_input:
        raise AttachError(
            f"{where} is composed for a whole batch, so its change can't depend on the token; leave it out"
        )
    if site.kind == "parameter" and not isinstance(delta, WeightDelta):
        raise AttachError(f"{where} is never called, so only its weight can change, not its input or output")
    if isinstance(delta, AttentionDelta) and not found.stack(site.stack).attention_interface:
        raise AttachError(
            f"{method.slug} acts inside attention, but the attention of {found.model_class} ({site.stack}) does not go through "
            "Transformers' attention interface\nuse a method on hidden states or weights instead (lora, parallel-adapter, …)"
        )
    if isinstance(delta, AttendedDelta):
        check_reads(method.slug or type(method).__name__, place.read, found)


def looks_up(module: nn.Module) -> bool:
    """Whether an embedding gives rows of its weight, at most times a constant that it names."""
    return type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")


class HeadDelta(ModuleDelta):
    """The task's output layer, trained as a copy: the model's own stays as it came."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = clone(module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def clone(module: nn.Module) -> nn.Module:
    """A copy with parameters and buffers of its own, without hooks and without what petiole hung on it."""
    copy = module.__class__.__new__(module.__class__)
    aside = module.__dict__.get(ASIDE, {})
    copy.__dict__.update({name: value for name, value in module.__dict__.items() if name not in (ASIDE, *aside)})
    for name, value in nn.Module().__dict__.items():
        if name.endswith("hooks") or "_hooks_" in name:
            copy.__dict__[name] = type(value)() if value is not None else None
    copy._parameters = {
        k: None if p is None else nn.Parameter(aside.get(k, p).detach().clone()) for k, p in module._parameters.items()
    }
    copy._buffers = {k: None if b is None else aside.get(k, b).detach().clone() for k, b in module._buffers.items()}
    copy._modules = {k: None if m is None else clone(m) for k, m in module._modules.items() if not k.startswith(_CHILD)}
    return copy


# ------------------------------------------------------------------------------------------------------------------------- host


class Host:
    """Everything petiole knows about one model with adaptations on it."""

    def __init__(self, model: nn.Module, found: Anatomy) -> None:
        self.model, self.anatomy = model, found
        self.mark: dict[str, Any] = {}  # the backbone's fingerprint, before anything trained
        self.adaptations: dict[str, Adaptation] = {}
        self.active: Names = ()
        self.flags = {name: p.requires_grad for name, p in model.named_parameters()}
        self.junctions: dict[tuple[str, bool], tuple[Junction, list[Any]]] = {}
        self.attention_configs: list[tuple[Any, Any]] = []
        self.training: Any = None  # a weak reference to the `Events` of the run that goes on, if any
        self.streams = Streams()  # beside the model's own hidden state
        self.owes_terms = False  # whether the loss of this step still lacks the terms of methods
        self.merges: list[
            tuple[Adaptation, set[tuple[str, str]]]
        ] = []  # what was merged into which tensors, oldest first
        self._paths: dict[str, nn.Module] = {}
        self._places: dict[str, list[tuple[str, str]]] = {}
        self._first: dict[str, str] = {}
        self._lock = Lock()
        self._inside: dict[int, int] = {}  # by thread: how many entries are running
        self._passes: dict[int, context.Pass] = {}  # by thread: the forward pass that runs
        self._pass_compiled: context.Pass | None = None
        self._foreign = False  # whether a forward pass that needs gradients ran in a context
        self._frozen: set[str] = set()  # layers with running statistics that were put in evaluation mode
        self._checkpointing = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
        self._statistics = [n for n, m in model.named_modules() if isinstance(getattr(m, "running_mean", None), Tensor)]
        self._handles = []
        for module in model.modules():
            # Generation, for one, calls an encoder without the model around it.
            if module is model or callable(getattr(module, "get_input_embeddings", None)):
                self._handles += [
                    module.register_forward_pre_hook(self.enter, with_kwargs=True, prepend=True),
                    module.register_forward_hook(self.leave, with_kwargs=True, always_call=True),
                ]
        for parameter in model.parameters():
            parameter.requires_grad_(False)

    # ---- looked up during a forward pass

    def module(self, path: str) -> nn.Module:
        """The module at a path, found once."""
        if path not in self._paths:
            self._paths[path] = beneath(self.model.get_submodule(path))
        return self._paths[path]

    def tensor(self, name: str) -> Tensor:
        """The backbone's own parameter or buffer of that name, whatever stands in its place during a forward pass."""
        owner, _, attribute = name.rpartition(".")
        module = self.module(owner)
        found = module._parameters.get(attribute)
        return found if found is not None else module._buffers[attribute]  # type: ignore[return-value]

    def acts(self, adaptation: str) -> bool:
        """Whether an adaptation acts on any row of this forward pass."""
        now = self.now()
        if now is context.EMPTY:
            return adaptation in self.active
        rows = now.rows.get(id(self))
        if rows is not None:
            return any(adaptation in names for names in rows)
        return adaptation in now.active.get(id(self), self.active)

    def now(self) -> context.Context:
        """The context of this forward pass.

        Raises:
            AttachError: it is computed again for the backward pass, and its context is lost.
        """
        now = context.current()
        if now is context.EMPTY and self._foreign and context.recomputing():
            raise AttachError(
                "a part of the model is computed again after the `with` in which it ran has ended\n"
                "call backward inside the `with`; pt.given(model) without values will do for forward passes outside of any"
            )
        return now

    def row_names(self) -> tuple[Names, ...] | None:
        """Which adaptations act on each row; None where all rows are alike."""
        return self.now().rows.get(id(self))

    def rows(self, adaptation: str, h: Tensor | None) -> Tensor | None:
        """Indices of the rows of h on which an adaptation acts; None for all. Beams, windows and flattened tokens follow their row."""
        rows = self.row_names()
        if rows is None:
            return None
        mine = [i for i, names in enumerate(rows) if adaptation in names]
        if h is None:
            return None if len(mine) == len(rows) else torch.tensor(mine, dtype=torch.long)
        return self.indices(mine, h)

    def indices(self, mine: list[int], h: Tensor) -> Tensor | None:
        """Rows of the batch as rows of h; None if they are all of them."""
        rows = self.row_names() or ()
        if h.shape[0] % max(len(rows), 1):
            raise AttachError(f"pt.route names {len(rows)} rows, but a hidden state has {h.shape[0]}")
        if len(mine) == len(rows):
            return None
        each = h.shape[0] // len(rows)
        return (torch.tensor(mine, dtype=torch.long)[:, None] * each + torch.arange(each)).flatten().to(h.device)

    def given(self, name: str, default: Any = None) -> Any:
        """A value that `pt.given` holds for this forward pass."""
        now = self.now()
        value = now.given.get(id(self), {}).get(name, default)
        names = now.rows.get(id(self))
        return value if names is None else context.of_rows_seen(value, len(names))

    def passing(self) -> context.Pass | None:
        """The forward pass of the whole model that runs in this thread; None where a part of it is called alone."""
        return self._pass_compiled if torch.compiler.is_compiling() else self._passes.get(threading.get_ident())

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gives, computed by whoever asks first in a forward pass; its recomputation finds it too.

        A value for each row of the batch is made for all of them; what is returned is that of the rows seen, as with `given`.
        What has a gradient keeps it under checkpointing if the delta says `publishes`.
        """
        within = self.passing()
        if torch.compiler.is_compiling():
            if within is None:
                return make()
            if name not in within.found:
                within.found[name] = make()
            return within.found[name]
        if within is not None and name in within.found:
            value = within.found[name]
        else:
            with context.seeing(None), context.kept_whole():
                value = make()
            if within is not None:
                within.found[name] = value
        names = self.row_names()
        return value if names is None else context.of_rows_seen(value, len(names))

    def unpadded(self, site: Site, h: Tensor) -> Tensor | None:
        """Which tokens of h (B, T, d) at a site are no padding (B, T), by the mask that the nearest model around was given; None for all.

        What a method puts in front of a text is no padding.

        Raises:
            AttachError: it was given a mask of another form.
        """
        mask = self.once(f"padding in {site.stack}", lambda: self.mask_around(site))
        if mask is None:
            return None
        if mask.ndim != 2 or h.ndim != 3:
            raise AttachError(
                f"{site.key}: padding is told by attention_mask as (batch, length), not {tuple(mask.shape)}"
            )
        length = h.shape[1]
        return nn.functional.pad(mask[:, -length:].bool(), (max(0, length - mask.shape[1]), 0), value=True)

    def mask_around(self, site: Site) -> Any:
        within, path = self.passing(), site.path
        while within is not None and path:
            path = path.rpartition(".")[0]
            for module, mask in within.masks:
                if module is self.module(path):
                    return mask
        return None

    def prior(self, slot: Slot) -> list[Slot]:
        """Changes of the same weight that act before `slot`: weight deltas, and hidden-state deltas that are one in disguise."""
        path = self.first_path(slot.site.caller or slot.site.path)
        junction = self.junctions.get((path, slot.site.kind == "parameter"))
        found: list[Slot] = []
        for other, _ in junction[0].slots if junction is not None else ():
            if other is slot:
                break
            if changes_weight(other) and overlap(other.site, slot.site) and other.acts():
                found.append(other)
        return found

    def prior_by_rows(self, slot: Slot, h: Tensor) -> list[tuple[Tensor | None, Prior]]:
        """The rows of h on which a slot acts, in groups with the same earlier changes; None for all rows."""
        prior, rows = self.prior(slot), self.row_names()
        if rows is None:
            return [(None, [(other.site, other.delta) for other in prior])]
        if slot.site.expert >= 0:
            raise AttachError(
                f"{slot.site.key}: an expert gets the tokens of all rows together, so rows can't differ here"
            )
        groups: dict[tuple[bool, ...], list[int]] = {}
        for i, names in enumerate(rows):
            if slot.adaptation in names:
                groups.setdefault(tuple(other.adaptation in names for other in prior), []).append(i)
        return [
            (self.indices(mine, h), [(other.site, other.delta) for other, acts in zip(prior, key, strict=True) if acts])
            for key, mine in groups.items()
        ]

    def attention_module(self, site: Site) -> str:
        """Path of the module that calls the attention interface."""
        if site.core:
            return site.core
        raise AttachError(f"{site.key}: it is not an attention that calls the interface")

    # ---- around a forward pass of the whole model, or of a model within it that is called alone

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook of the root and of every model within it."""
        self.freeze_statistics()
        if torch.compiler.is_compiling():
            self.refuse_aside()
            if module is self.model or self._pass_compiled is None:
                self._pass_compiled = context.Pass(module, args, kwargs)
            self._pass_compiled.masks.append((module, kwargs.get("attention_mask")))
            return
        attention.keep_on(self)
        if module.training and torch.is_grad_enabled():
            self._foreign = self._foreign or context.current() is not context.EMPTY
            for layer in self._checkpointing:
                function = getattr(layer, "_gradient_checkpointing_func", None)
                if layer.gradient_checkpointing and function is not None and not isinstance(function, Recall):
                    layer._gradient_checkpointing_func = Recall(function, self)  # type: ignore[assignment]
        self.begin()
        within = self._passes.setdefault(threading.get_ident(), context.Pass(module, args, kwargs))
        within.masks.append((module, kwargs.get("attention_mask")))

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Forward hook of the same; called even when the forward failed."""
        if torch.compiler.is_compiling():
            if self._pass_compiled is not None and module is self._pass_compiled.module:
                self._pass_compiled = None
            return None
        self.end()
        if module is self.model and module.training and torch.is_grad_enabled():
            self.add_terms(kwargs, output)
        return output

    def freeze_statistics(self) -> None:
        """A layer keeps its running statistics, unless an adaptation that acts trains it in place."""
        if not self._statistics:
            return
        moving = {name for a in self.adaptations.values() if a.own and self.acts(a.name) for name in a.own}
        for path in self._statistics:
            layer, frozen = self.module(path), f"{path}.running_mean" not in moving
            if frozen and layer.training:
                layer.training = False
                self._frozen.add(path)
            elif not frozen and path in self._frozen:
                layer.training = self.model.training
                self._frozen.discard(path)

    def begin(self) -> None:
        """What was trained in place and does not act now is put aside, for this thread's outermost pass. One thread at a time."""
        me = threading.get_ident()
        self._inside[me] = self._inside.get(me, 0) + 1
        if self._inside[me] == 1:
            self.streams.take()
        if self._inside[me] == 1 and any(a.own for a in self.adaptations.values()):
            self._lock.acquire()
            self.put_aside([a for a in self.adaptations.values() if not self.acts(a.name)])

    def end(self) -> None:
        me = threading.get_ident()
        left = self._inside.pop(me, 0) - 1
        if left > 0:
            self._inside[me] = left
            return
        self._passes.pop(me, None)
        if self._lock.held():
            self.bring_back()
            self._lock.release()

    def put_aside(self, adaptations: Sequence[Adaptation]) -> None:
        """Let the original values stand for what these adaptations trained."""
        for adaptation in adaptations:
            for name, original in adaptation.own.items():
                original = original.to(self.tensor(name))  # the model may have moved since
                for owner, attribute in self.places_of(name):
                    module = self.module(owner)
                    module.__dict__.setdefault(ASIDE, {})[attribute] = original
                    module.__dict__[attribute] = original

    def bring_back(self) -> None:
        for adaptation in self.adaptations.values():
            for name in adaptation.own:
                for owner, attribute in self.places_of(name):
                    module = self.module(owner)
                    if attribute in module.__dict__.get(ASIDE, ()):
                        del module.__dict__[attribute]
                        del module.__dict__[ASIDE][attribute]
                    if not module.__dict__.get(ASIDE, True):
                        del module.__dict__[ASIDE]

    @contextmanager
    def own_aside(self) -> Iterator[None]:
        """The backbone as it came, for looking at its tensors."""
        with self._lock:
            self.put_aside(list(self.adaptations.values()))
            try:
                yield
            finally:
                self.bring_back()

    def refuse_aside(self) -> None:
        """Compiled code takes parameters where they are, and would not see what stands for them."""
        for adaptation in self.adaptations.values():
            if adaptation.own and not self.acts(adaptation.name):
                raise AttachError(
                    f"{adaptation.name!r} has trained the backbone itself and does not act now, which compiled code can't see\n"
                    "use the model uncompiled, or detach that adaptation"
                )

    @contextmanager
    def resumed(self, held: Sequence[tuple[Slot, Any]], within: context.Pass | None) -> Iterator[None]:
        """As inside the forward pass `within`, in which `held` was held, for computing a part of it again."""
        me = threading.get_ident()
        before, streams, outer = self.holding(), self.streams.take(), self._passes.get(me)
        self.begin()
        if within is not None:
            self._passes[me] = within
        try:
            for slot, value in held:
                slot._held[me] = value
            yield
        finally:
            for slot, _ in self.holding():  # computing may have stopped before all of it was used
                slot._held.pop(me, None)
            for slot, value in before:
                slot._held[me] = value
            self.end()
            if outer is not None:
                self._passes[me] = outer
            self.streams.take()
            self.streams.bring_back(streams)

    def publishing(self) -> bool:
        """Whether what is computed inside a block is used outside of it too: in streams, by loss terms."""
        return any(s.delta.publishes and s.acts() for a in self.adaptations.values() for s in a.slots)

    def holding(self) -> list[tuple[Slot, Any]]:
        """What slots have read in this thread and not yet used."""
        me = threading.get_ident()
        return [(s, s._held[me]) for a in self.adaptations.values() for s in a.slots if me in s._held]

    def add_terms(self, inputs: Any, output: Any) -> None:
        """Add the methods' loss terms to the model's own loss; where it gave none, whoever computes one owes them.

        Compiled code does not come here, so a run of events owes them until this has been seen to happen.
        """
        acting = [a for a in self.adaptations.values() if self.acts(a.name) and a.has_loss_terms]
        loss = getattr(output, "loss", None)
        self.owes_terms = bool(acting) and not isinstance(loss, Tensor)
        if not isinstance(loss, Tensor):
            return
        if found := [term for adaptation in acting for term in adaptation.loss_terms()]:
            output["loss"] = loss = terms.add(loss, found, terms.share(self.model, inputs))
        if (events := self.events) is not None:
            events.saw_loss(loss)

    @property
    def events(self) -> Any:
        """The `Events` of the run that goes on, if any."""
        return self.training() if self.training is not None else None

    def places_of(self, name: str) -> list[tuple[str, str]]:
        """Every (module path, attribute) under which a tensor of the backbone stands: several where weights are tied."""
        if name not in self._places:
            own = self.tensor(name)
            every = (
                *self.model.named_parameters(remove_duplicate=False),
                *self.model.named_buffers(remove_duplicate=False),
            )
            self._places[name] = [(n.rpartition(".")[0], n.rpartition(".")[2]) for n, t in every if t is own]
        return self._places[name]

    def forget(self) -> None:
        """Look modules up again: some have been replaced."""
        self._paths.clear()
        self._first.clear()

    def first_path(self, path: str) -> str:
        """The same for all paths of one module."""
        if path not in self._first:
            seen: dict[int, str] = {}
            for name, module in self.model.named_modules(remove_duplicate=False):
                self._first[name] = seen.setdefault(id(module), name)
        return self._first.setdefault(path, path)

    def own_names(self) -> set[str]:
        """Names of the backbone's own parameters and statistics that some adaptation trains in place."""
        return {name for adaptation in self.adaptations.values() for name in adaptation.own}

    # ---- installing and removing

    def junction(self, path: str, parameter: bool) -> Junction:
        """The junction of the module at a path; made when first asked for."""
        key = (path := self.first_path(path), parameter)
        if key not in self.junctions:
            module = self.module(path)
            junction: Junction = ParameterJunction() if parameter else Junction()
            owner, name = module, f"{_CHILD}_parameters" if parameter else _CHILD
            if isinstance(
                module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)
            ):  # which would run or index one more child
                owner, name = self.model, f"{_CHILD}_{path.replace('.', '_')}"
            if hasattr(owner, name):
                raise AttachError(f"{type(owner).__name__} at {path!r} already has something called {name!r}")
            owner.add_module(name, junction)
            junction.train(module.training)
            handles = [
                module.register_forward_pre_hook(junction.before, with_kwargs=True),
                # First of all, so that whoever looks at the output sees what the model sees.
                module.register_forward_hook(junction.after, with_kwargs=True, always_call=parameter, prepend=True),
            ]
            self.junctions[key] = (junction, [*handles, owner, name])
        return self.junctions[key][0]

    def install(self, slot: Slot) -> None:
        slot.delta.host = self
        for point in slot.points():
            self.junction(point.path, isinstance(slot, ParameterSlot)).add(slot, point)
        if isinstance(slot, AttentionSlot):
            attention.switch_on(self, self.module(self.attention_module(slot.site)))
        if isinstance(slot, AttendedSlot) and self.anatomy.stack(slot.attention.stack).attention_interface:
            attention.switch_on(self, self.module(self.attention_module(slot.attention)))
        if isinstance(slot, BlockSlot):
            substitute(self, slot)

    def remove(self, slot: Slot) -> None:
        """Take a slot out of all junctions; a junction without slots goes."""
        for key, (junction, (before, after, owner, name)) in list(self.junctions.items()):
            junction.drop(slot)
            if not junction.slots:
                before.remove()
                after.remove()
                delattr(owner, name)
                del self.junctions[key]
        if isinstance(slot, BlockSlot):
            restore(self, slot)
        slot.delta.__dict__.pop("host", None)

    def close(self) -> None:
        """Nothing is attached any more: the model is as it came."""
        for handle in self._handles:
            handle.remove()
        attention.switch_off(self)
        for layer in self._checkpointing:
            if isinstance(layer.__dict__.get("_gradient_checkpointing_func"), Recall):
                layer._gradient_checkpointing_func = layer._gradient_checkpointing_func.inner  # type: ignore
        for path in self._frozen:
            self.module(path).training = self.model.training
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self.flags.get(name, parameter.requires_grad))
        del self.model.__dict__["_petiole"]


def changes_weight(slot: Slot) -> bool:
    """Whether a slot changes its linear's output as another weight would. At the input, what comes after does not see it so."""
    if isinstance(slot, (WeightSlot, ParameterSlot)):
        return not slot.delta.depends_on_input
    return isinstance(slot, HiddenSlot) and slot.site.side == "output" and callable(getattr(slot.delta, "weight", None))


def overlap(one: Site, other: Site) -> bool:
    """Whether two sites are parts of one tensor that have something in common."""
    if (one.path, one.parameter, one.expert) != (other.path, other.parameter, other.expert):
        return False
    return not (one.rows and other.rows) or any(a < d and c < b for a, b in one.rows for c, d in other.rows)


class Substitute(nn.Module):
    """Stands for a block, or one of its sub-layers; whatever the model asks of that is answered by what it stands for."""

    def __init__(self, slot: BlockSlot, block: nn.Module) -> None:
        super().__init__()
        self.petiole = slot.delta.train(block.training)  # so called that its parameters are known for a delta's
        self._slot = slot
        self.block = block
        self.training = block.training

    @property
    def delta(self) -> Any:
        return self.petiole

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self._slot.acts():
            return self.block(*args, **kwargs)
        if self._slot.host.rows(self._slot.adaptation, None) is not None:
            raise AttachError(
                f"{self._slot.site.key}: what stands in for a block acts on every row of a batch, or on none"
            )
        self._slot.fire()
        return self.petiole(self.block, *args, **kwargs)


def one_module(site: Site) -> bool:
    """Whether a sub-layer is one module, which another can stand for."""
    return site.role in ("attention", "cross_attention", "mixer", "ffn") and f"{site.exit}.".startswith(f"{site.path}.")


def substitute(host: Host, slot: BlockSlot) -> None:
    container, _, name = slot.site.path.rpartition(".")
    parent = host.module(container)
    setattr(parent, name, Substitute(slot, getattr(parent, name)))


def restore(host: Host, slot: BlockSlot) -> None:
    """Take the slot's own stand-in out, and leave those of others, which may be around it or in it."""
    container, _, name = slot.site.path.rpartition(".")
    parent = host.module(container)
    outer: Substitute | None = None
    stand_in = getattr(parent, name)
    while isinstance(stand_in, Substitute) and stand_in._slot is not slot:
        outer, stand_in = stand_in, stand_in.block
    if not isinstance(stand_in, Substitute):
        return
    if outer is None:
        setattr(parent, name, stand_in.block)
    else:
        outer.block = stand_in.block


def beneath(module: nn.Module) -> nn.Module:
    """The backbone's own block under what stands in for it."""
    while isinstance(module, Substitute):
        module = module.block
    return module


KINDS: tuple[tuple[type[Delta], type[Slot]], ...] = (
    (WeightDelta, WeightSlot),
    (AttendedDelta, AttendedSlot),
    (HiddenDelta, HiddenSlot),
    (ModuleDelta, ModuleSlot),
    (AroundDelta, AroundSlot),
    (StackDelta, StackSlot),
    (BlockDelta, BlockSlot),
    (AttentionDelta, AttentionSlot),
    (TokenDelta, tokens.TokenSlot),
)


def slot_for(host: Host, name: str, number: int, place: Place, key: str) -> Slot:
    kind = (
        ParameterSlot
        if place.site.kind == "parameter"
        else next((s for d, s in KINDS if isinstance(place.delta, d)), None)
    )
    if kind is None:
        raise AttachError(f"{type(place.delta).__name__} is no kind of delta; subclass WeightDelta, HiddenDelta, …")
    return kind(host, name, number, place, key)


# ----------------------------------------------------------------------------------------------------------------------- public


def host_of(model: nn.Module) -> Host | None:
    return model.__dict__.get("_petiole")


def need_host(model: nn.Module) -> Host:
    host = host_of(model)
    if host is None:
        raise AttachError(f"nothing is attached to this {type(model).__name__}; call pt.attach(model, method) first")
    return host


def attach(
    model: nn.Module,
    methods: Method | Sequence[Method],
    *,
    name: str = "default",
    seed: int = 0,
    train_head: bool | None = None,
    found: Anatomy | None = None,
) -> Adaptation:
    """Attach one method, or several that act together, IN PLACE; the model keeps its class. Everything else is frozen.

    Args:
        model: the backbone, with or without a task head.
        methods: a configuration such as `pt.LoRA(rank=8)`, or a list of them.
        name: of the adaptation; another name makes a second one, and the newest is the one that acts.
        seed: of all randomness in the new parameters; the global generator is not moved.
        train_head: whether the task head trains too, as a copy; None means: if the model has one.
        found: the anatomy, if some of it was named by hand (`pt.anatomy(model, roles=…)`).

    Returns:
        The handle: `summary`, `check`, `save`, `merge`, `detach`, ….

    Raises:
        AttachError, AnatomyError: a role, site or interface is missing, or nothing would train. The model is then as before.
    """
    chosen = (methods,) if isinstance(methods, Method) else tuple(methods)
    if not chosen or not all(isinstance(method, Method) for method in chosen):
        raise ConfigError("attach takes a method such as pt.LoRA(rank=8), or a non-empty list of them")
    check_name(name)
    host = host_of(model)
    if host is not None and name in host.adaptations:
        raise AttachError(f"an adaptation called {name!r} is attached already; detach it or choose another name")
    found = found or (host.anatomy if host else anatomy(model))
    made = plan(model, chosen, found, seed, train_head)
    return install(model, made, found, name=name, seed=seed)


def check_name(name: str) -> None:
    """Raises ConfigError: an adaptation can't be called so."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"name = {name!r}: letters, digits, - and _, at most 64")


def install(model: nn.Module, made: Plan, found: Anatomy, *, name: str, seed: int) -> Adaptation:
    """Carry a plan out, or leave the model as it was."""
    host, mark = host_of(model), mark_of(model, found)
    if host is None:
        host = model.__dict__["_petiole"] = Host(model, found)
        host.mark = mark
    before, adaptation = host.active, None
    try:
        refuse_taken(host, made.trained)
        slots = [slot_for(host, name, number, place, key) for key, number, place in made.keyed()]
        adaptation = Adaptation(host, name, seed, made.methods, slots, made.shared, originals(model, made.trained))
        adaptation.mark = mark
        host.adaptations[name] = adaptation
        for slot in slots:
            host.install(slot)
        for number, shared in made.shared.items():
            model.add_module(f"{_CHILD}_shared_{name}-{number}", shared.train(model.training))
        for own in made.trained:
            if isinstance(tensor := host.tensor(own), nn.Parameter):  # running statistics may be named, too
                tensor.requires_grad_(True)
        host.active = (name,)
        forget_compiled()
        for number, method in enumerate(made.methods):
            method.on_attach(adaptation.moment(number))
    except BaseException:
        host.active = before
        if adaptation is not None:
            detach(adaptation)
        elif not host.adaptations:
            host.close()
        raise
    return adaptation


def mark_of(model: nn.Module, found: Anatomy) -> dict[str, Any]:
    """The fingerprint of the backbone under all adaptations; with what is merged into it, which then is part of it."""
    from petiole.files import fingerprint

    host = host_of(model)
    if host is not None and not host.merges:
        return host.mark
    return fingerprint(model, exclude=head_names(model, found))


def refuse_taken(host: Host, trained: Sequence[str]) -> None:
    """A tensor of the backbone has one owner."""
    taken = sorted(host.own_names() & set(trained))
    if taken:
        raise AttachError(f"{taken[0]} is trained in place by another adaptation; detach that one first")
    for adaptation, tensors in host.merges:
        merged = sorted({f"{path}.{name}" if path else name for path, name in tensors} & set(trained))
        if merged and adaptation.merged and adaptation.name in host.adaptations:
            raise AttachError(
                f"{merged[0]} would train, but {adaptation.name!r} is merged into it; unmerge it, or detach it to keep it for good"
            )


def originals(model: nn.Module, trained: Sequence[str]) -> dict[str, Tensor]:
    """Copies of what will train in place: parameters, and the running statistics that go with them."""
    kept: dict[str, Tensor] = {}
    for name in trained:
        owner, _, attribute = name.rpartition(".")
        module = beneath(model.get_submodule(owner))
        kept[name] = raw(module, attribute).detach().clone()
        if isinstance(getattr(module, "running_mean", None), Tensor):
            for statistic, value in module._buffers.items():
                if value is not None:
                    kept[f"{owner}.{statistic}"] = value.detach().clone()
    return kept


def head_names(model: nn.Module, found: Anatomy) -> set[str]:
    """Names of the task heads' tensors: fresh in every model, so no part of the backbone's fingerprint."""
    names = set()
    for site in found.heads():
        module = model.get_submodule(site.path)
        names |= {f"{site.path}.{n}" for n, _ in (*module.named_parameters(), *module.named_buffers())}
    return names


def detach(adaptation: Adaptation) -> None:
    """Take an adaptation off. What was merged stays merged; everything else is as it was, bit for bit."""
    host = adaptation.host
    if host.adaptations.get(adaptation.name) is not adaptation:
        raise AttachError(f"{adaptation.name!r} is not attached any more")
    for slot in adaptation.slots:
        host.remove(slot)
    for number in adaptation.shared:
        child = f"{_CHILD}_shared_{adaptation.name}-{number}"
        if hasattr(host.model, child):
            delattr(host.model, child)
    with torch.no_grad():
        for name, original in adaptation.own.items():
            tensor = host.tensor(name)
            if not adaptation.merged:
                fill(tensor, original)
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(False)
                tensor.grad = None
    del host.adaptations[adaptation.name]
    host.active = tuple(n for n in host.active if n in host.adaptations) or tuple(list(host.adaptations)[-1:])
    if not host.adaptations:
        host.close()
    forget_compiled()


def refitted(adaptation: Adaptation, methods: Sequence[Method], values: Mapping[str, Tensor]) -> Adaptation:
    """The same change by other methods, IN PLACE: taken off, attached anew under its name, and filled.

    Args:
        values: of its tensors, by their names in `named_tensors`; those that are not among them stay as they were.

    Raises:
        AttachError: it is merged, or not attached.
    """
    if adaptation.merged:
        raise AttachError(f"{adaptation.name!r} is merged; unmerge it first")
    kept = {name: value.clone() for name, value in (adaptation.named_tensors(folded=False) | dict(values)).items()}
    found, name, seed = adaptation.host.anatomy, adaptation.name, adaptation.seed
    head = any(slot.number == HEAD for slot in adaptation.slots)
    fresh = attach(adaptation.detach(), methods, name=name, seed=seed, train_head=head, found=found)
    with torch.no_grad():
        for key, tensor in fresh.named_tensors(folded=False).items():
            tensor.copy_(kept[key])
    return fresh


def fill(tensor: Tensor, value: Tensor) -> None:
    """Copy a whole value into a tensor; its own part of it where the tensor is sharded over processes."""
    if hasattr(tensor, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        whole: Any = tensor
        value = distribute_tensor(value.to(tensor.device), whole.device_mesh, whole.placements)
    tensor.copy_(value)


def forget_compiled() -> None:
    """Compiled code doesn't guard on hooks: what was compiled before a change of hooks must not run after it."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()


def adaptations(model: nn.Module) -> dict[str, Adaptation]:
    """The adaptations attached to a model, by name, oldest first."""
    host = host_of(model)
    return dict(host.adaptations) if host else {}


def known(host: Host, names: str | Sequence[str] | None) -> Names:
    """Check names of adaptations; None means none."""
    wanted = () if names is None else (names,) if isinstance(names, str) else tuple(names)
    for name in wanted:
        if name not in host.adaptations:
            raise AttachError(f"no adaptation is called {name!r}; attached: {', '.join(host.adaptations) or 'none'}")
    return wanted


def refuse_without_merged(host: Host, *sets: Names) -> None:
    """What is merged into the weights acts in every forward pass, so none can be promised without it."""
    for adaptation in host.adaptations.values():
        if any(slot.merged for slot in adaptation.slots) and any(adaptation.name not in names for names in sets):
            raise AttachError(
                f"{adaptation.name!r} is merged into the weights, so no forward pass can leave it out\n"
                "unmerge it first, or detach it to keep the change for good"
            )


def activate(model: nn.Module, *names: str) -> None:
    """Let these adaptations act from now on, in the order of their attachment; without names, none."""
    host = need_host(model)
    refuse_without_merged(host, known(host, names))
    host.active = known(host, names)
    forget_compiled()


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The bare backbone inside the `with`, in this thread."""
    host = need_host(model)
    refuse_without_merged(host, ())
    with context.entered(context.with_active(id(host), ())):
        yield


@contextmanager
def route(model: nn.Module, names: str | Sequence[str | Sequence[str] | None] | None) -> Iterator[None]:
    """Choose adaptations inside the `with`, in this thread: one name for all rows, or one (or None, or several) for each row."""
    host = need_host(model)
    if names is None or isinstance(names, str):
        rows: tuple[Names, ...] = (known(host, names),)
        inner = context.with_active(id(host), rows[0])
    else:
        rows = tuple(known(host, row) for row in names)
        fixed = {n for row in rows for n in row if host.adaptations[n].own or not host.adaptations[n].routes()}
        if fixed and len(set(rows)) > 1:
            raise AttachError(
                f"{sorted(fixed)[0]}: this adaptation can't differ between the rows of a batch; route all rows alike"
            )
        if len(set(rows)) > 1 and sequence_first(model):
            raise AttachError(
                f"{type(model).__name__} holds its hidden states as (time, batch, width), in which rows are not told apart: batch_first=True"
            )
        inner = (
            context.with_rows(id(host), rows)
            if len(set(rows)) > 1
            else context.with_active(id(host), rows[0] if rows else ())
        )
    refuse_without_merged(host, *rows)
    with context.entered(inner):
        yield


@contextmanager
def given(model: nn.Module, **values: Any) -> Iterator[None]:
    """Give deltas values for the forward passes inside the `with`, in this thread: `with pt.given(model, task="depth")`.

    Values per sample are tensors or lists as long as the batch. They hold for the recomputation of these passes, too.
    """
    with context.entered(context.with_given(id(need_host(model)), values)):
        yield


def streams(model: nn.Module) -> dict[str, dict[int, Tensor]]:
    """What ran beside the model's own hidden state in this thread's last forward pass: name -> place (a depth) -> state (B, ...).

    They are handed over: a second call gives none. Inside the forward pass, a head that reads them finds those so far.
    """
    host = host_of(model)
    found: dict[str, dict[int, Tensor]] = {}
    for place, states in sorted(host.streams.take().items()) if host is not None else ():
        for name, state in states.items():
            found.setdefault(name, {})[place] = state
    return found


__all__ = ["Host", "activate", "adaptations", "attach", "detach", "disabled", "given", "route", "streams"]
