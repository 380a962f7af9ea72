"""Put deltas on sites, take them away again, and say which of them act.

`attach` first plans (which delta on which site, built and initialised, nothing touched) and then installs, undoing everything if a step
fails. All that is known about an attached model stands in its `Host`, found at `model._petiole`; `detach` removes that too.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from petiole import attention, context, terms, tokens
from petiole.adaptation import Adaptation
from petiole.anatomy import Anatomy, Site, anatomy
from petiole.context import Names, Recall
from petiole.errors import AttachError, ConfigError
from petiole.junction import (
    AttentionSlot,
    BlockSlot,
    HiddenSlot,
    Junction,
    Lock,
    ModuleSlot,
    ParameterJunction,
    ParameterSlot,
    Slot,
    StackSlot,
    WeightSlot,
    of_output,
)
from petiole.method import (
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


def plan(model: nn.Module, methods: Sequence[Method], found: Anatomy, seed: int, train_head: bool | None) -> Plan:
    """Build and initialise all deltas. The global random generator ends where it was."""
    made = Plan(tuple(methods))
    with torch.random.fork_rng(devices=[]):
        for number, method in enumerate(methods):
            # For modules that initialise themselves when built: on CPU, so no other device's generator is touched.
            torch.default_generator.manual_seed(site_seed(seed, f"{number}"))
            places = list(method.deltas(found))
            shared = method.shared(found)
            if shared is not None:
                made.shared[number] = shared
                ready(shared, None, site_seed(seed, f"{number}.shared"), None)
            for place in places:
                check_fits(method, place, found)
                module = model.get_submodule(place.site.path)
                base = Base(place.site, module)
                ready(
                    place.delta,
                    base,
                    site_seed(seed, f"{number}.{place.site.key}.{place.site.side}"),
                    device_of(module, model),
                )
                made.places.append((number, place))
            method.bind({f"{p.site.key}.{p.site.side}": p.delta for p in places}, shared)
            made.trained += [name for name in method.trains(found, model) if name not in made.trained]
    heads = found.heads()
    if train_head and not heads:
        raise AttachError(f"train_head=True, but {found.model_class} has no task head (a language-model head is none)")
    if heads and train_head is not False:
        for site in heads:
            module = model.get_submodule(site.path)
            own = {f"{site.path}.{name}" for name, _ in module.named_parameters()}
            if not own & set(made.trained):
                made.places.append((HEAD, Place(site, HeadDelta(module))))
    keys = [(number, place.site.key, place.site.side, type(place.delta)) for number, place in made.places]
    if len(set(keys)) < len(keys):
        double = next(key for key in keys if keys.count(key) > 1)
        raise AttachError(f"{methods[double[0]].slug}: two deltas of one kind on one site, {double[1]} ({double[2]})")
    if not made.trained and not any(p.requires_grad for p in parameters_of(made)):
        what = ", ".join(method.slug for method in methods)
        raise AttachError(f"{what} on {found.model_class}: nothing would train\nfound: {found.coverage()[:400]}")
    return made


def parameters_of(made: Plan) -> Iterator[nn.Parameter]:
    for module in [*(place.delta for _, place in made.places), *made.shared.values()]:
        yield from module.parameters()


def ready(module: nn.Module, base: Base | None, seed: int, device: torch.device | None) -> None:
    """Initialise on CPU, then move to the site's device. A model on the meta device gets deltas without values."""
    if device is not None and device.type == "meta":
        module.to(device)
        return
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        if isinstance(module, Delta) and base is not None:
            module.initialise(generator, base)
        elif hasattr(module, "initialise"):
            module.initialise(generator)  # type: ignore[operator]
    if device is not None:
        module.to(device)


def site_seed(seed: int, key: str) -> int:
    """A seed for one site: the same on every machine, whatever else is attached."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big") >> 1


def device_of(module: nn.Module, model: nn.Module) -> torch.device:
    for owner in (module, model):
        for tensor in (*owner.parameters(), *owner.buffers()):
            return tensor.device
    return torch.device("cpu")


def check_fits(method: Method, place: Place, found: Anatomy) -> None:
    """Refuse a delta where it can't act, before anything is attached."""
    site, delta = place.site, place.delta
    if isinstance(delta, WeightDelta) and site.kind not in ("linear", "conv", "embedding", "parameter"):
        raise AttachError(
            f"{method.slug}: {site.key} is a {site.kind}, which has no weight to change; name a linear role"
        )
    if site.kind == "parameter" and not isinstance(delta, WeightDelta):
        raise AttachError(
            f"{method.slug}: {site.key} is never called, so only its weight can change, not its input or output"
        )
    if isinstance(delta, AttentionDelta) and not found.stack(site.stack).attention_interface:
        raise AttachError(
            f"{method.slug} acts inside attention, but the attention of {found.model_class} ({site.stack}) does not go through "
            "Transformers' attention interface\nuse a method on hidden states or weights instead (lora, parallel-adapter, …)"
        )


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
    copy.__dict__.update(module.__dict__)
    for name, value in nn.Module().__dict__.items():
        if name.endswith("hooks") or "_hooks_" in name:
            copy.__dict__[name] = type(value)() if value is not None else None
    copy._parameters = {
        k: None if p is None else nn.Parameter(p.detach().clone()) for k, p in module._parameters.items()
    }
    copy._buffers = {k: None if b is None else b.detach().clone() for k, b in module._buffers.items()}
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
        self.owes_terms = False  # whether the loss of this step still lacks the terms of methods
        self.merges: list[
            tuple[Adaptation, set[tuple[str, str]]]
        ] = []  # what was merged into which tensors, oldest first
        self._paths: dict[str, nn.Module] = {}
        self._places: dict[str, list[tuple[str, str]]] = {}
        self._lock = Lock()
        modules = list(model.modules())
        self._checkpointing = [m for m in modules if hasattr(m, "gradient_checkpointing")]
        self._statistics = [(m, m.training) for m in modules if isinstance(getattr(m, "running_mean", None), Tensor)]
        self._handles = [
            model.register_forward_pre_hook(self.enter, with_kwargs=True, prepend=True),
            model.register_forward_hook(self.leave, with_kwargs=True, always_call=True),
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
        now = context.current()
        if now is context.EMPTY:
            return adaptation in self.active
        rows = now.rows.get(id(self))
        if rows is not None:
            return any(adaptation in names for names in rows)
        return adaptation in now.active.get(id(self), self.active)

    def row_names(self) -> tuple[Names, ...] | None:
        """Which adaptations act on each row; None where all rows are alike."""
        return context.current().rows.get(id(self))

    def rows(self, adaptation: str, h: Tensor | None) -> Tensor | None:
        """Indices of the rows of h on which an adaptation acts; None for all. Beams, windows and flattened tokens follow their row."""
        now = context.current()
        rows = None if now is context.EMPTY else now.rows.get(id(self))
        if rows is None:
            return None
        mine = torch.tensor([adaptation in names for names in rows])
        if bool(mine.all()):
            return None
        if h is None:
            return mine.nonzero().flatten()
        if h.shape[0] % len(rows):
            raise AttachError(f"pt.route names {len(rows)} rows, but a hidden state has {h.shape[0]}")
        return mine.repeat_interleave(h.shape[0] // len(rows)).nonzero().flatten().to(h.device)

    def given(self, name: str, default: Any = None) -> Any:
        """A value that `pt.given` holds for this forward pass."""
        return context.current().given.get(id(self), {}).get(name, default)

    def prior(self, slot: Slot) -> list[tuple[Site, Any]] | None:
        """Changes of the same weight that act before `slot`: weight deltas, and hidden-state deltas that are one in disguise.

        None where they act on some of its rows and not on others.
        """
        junction = self.junctions.get((slot.site.caller or slot.site.path, slot.site.kind == "parameter"))
        if junction is None or len(junction[0].slots) < 2:
            return []
        found: list[tuple[Site, Any]] = []
        rows = self.row_names()
        for other, _ in junction[0].slots:
            if other is slot:
                break
            if not changes_weight(other) or not overlap(other.site, slot.site) or not other.acts():
                continue
            beside = {other.adaptation in row for row in rows or () if slot.adaptation in row}
            if len(beside) > 1:
                return None
            if beside != {False}:
                found.append((other.site, other.delta))
        return found

    def attention_module(self, site: Site) -> str:
        """Path of the module that calls the attention interface."""
        if site.core:
            return site.core
        raise AttachError(f"{site.key}: it is not an attention that calls the interface")

    # ---- around a forward pass of the whole model

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook of the root."""
        if torch.compiler.is_compiling():
            return
        if module.training:
            trained = self.own_names()
            for layer, _ in self._statistics:
                if not trained:
                    layer.training = False  # a frozen backbone keeps its running statistics
            if torch.is_grad_enabled():
                for layer in self._checkpointing:
                    function = getattr(layer, "_gradient_checkpointing_func", None)
                    if layer.gradient_checkpointing and function is not None and not isinstance(function, Recall):
                        layer._gradient_checkpointing_func = Recall(function)  # type: ignore[assignment]
        silent = [a for a in self.adaptations.values() if a.own and not self.acts(a.name)]
        if silent:
            self._lock.acquire()
            for adaptation in silent:
                for name, original in adaptation.own.items():
                    for owner, attribute in self.places_of(name):
                        self.module(owner).__dict__[attribute] = original

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Forward hook of the root; called even when the forward failed."""
        if torch.compiler.is_compiling():
            return None
        if self._lock.held():
            for adaptation in self.adaptations.values():
                for name in adaptation.own:
                    for owner, attribute in self.places_of(name):
                        self.module(owner).__dict__.pop(attribute, None)
            self._lock.release()
        if module.training and torch.is_grad_enabled():
            self.add_terms(kwargs, output)
        return output

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
            tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
            own = tensors[name]
            every = (
                *self.model.named_parameters(remove_duplicate=False),
                *self.model.named_buffers(remove_duplicate=False),
            )
            self._places[name] = [(n.rpartition(".")[0], n.rpartition(".")[2]) for n, t in every if t is own]
        return self._places[name]

    def own_names(self) -> set[str]:
        """Names of the backbone's own parameters and statistics that some adaptation trains in place."""
        return {name for adaptation in self.adaptations.values() for name in adaptation.own}

    # ---- installing and removing

    def junction(self, path: str, parameter: bool) -> Junction:
        """The junction of the module at a path; made when first asked for."""
        key = (path, parameter)
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
                module.register_forward_hook(junction.after, with_kwargs=True, always_call=parameter),
            ]
            self.junctions[key] = (junction, [*handles, owner, name])
        return self.junctions[key][0]

    def install(self, slot: Slot) -> None:
        slot.delta.host = self
        for point in slot.points():
            self.junction(point.path, isinstance(slot, ParameterSlot)).add(slot, point)
        if isinstance(slot, AttentionSlot):
            attention.switch_on(self, self.module(self.attention_module(slot.site)), slot.delta)
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
        for layer, training in self._statistics:
            layer.training = self.model.training if training else layer.training
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self.flags.get(name, parameter.requires_grad))
        del self.model.__dict__["_petiole"]


def changes_weight(slot: Slot) -> bool:
    """Whether a slot changes its linear's output as another weight would. At the input, what comes after does not see it so."""
    if isinstance(slot, (WeightSlot, ParameterSlot)):
        return True
    return isinstance(slot, HiddenSlot) and slot.site.side == "output" and hasattr(slot.delta, "weight")


def overlap(one: Site, other: Site) -> bool:
    """Whether two sites are parts of one tensor that have something in common."""
    if (one.path, one.parameter, one.expert) != (other.path, other.parameter, other.expert):
        return False
    return not (one.rows and other.rows) or any(a < d and c < b for a, b in one.rows for c, d in other.rows)


class Substitute(nn.Module):
    """Stands in a stack for a block; whatever the model asks of the block is answered by the block."""

    def __init__(self, slot: BlockSlot, block: nn.Module) -> None:
        super().__init__()
        self.delta = slot.delta
        self._slot = slot
        self.block = block

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
        return self.delta(self.block, *args, **kwargs)


def substitute(host: Host, slot: BlockSlot) -> None:
    container, _, index = slot.site.path.rpartition(".")
    parent = host.module(container)
    parent[int(index)] = Substitute(slot, parent[int(index)])  # type: ignore[index,operator]


def restore(host: Host, slot: BlockSlot) -> None:
    """Take the slot's own stand-in out, and leave those of others, which may be around it or in it."""
    container, _, index = slot.site.path.rpartition(".")
    parent = host.module(container)
    outer: Substitute | None = None
    stand_in = parent[int(index)]  # type: ignore[index]
    while isinstance(stand_in, Substitute) and stand_in._slot is not slot:
        outer, stand_in = stand_in, stand_in.block
    if not isinstance(stand_in, Substitute):
        return
    if outer is None:
        parent[int(index)] = stand_in.block  # type: ignore[operator]
    else:
        outer.block = stand_in.block


def beneath(module: nn.Module) -> nn.Module:
    """The backbone's own block under what stands in for it."""
    while isinstance(module, Substitute):
        module = module.block
    return module


KINDS: tuple[tuple[type[Delta], type[Slot]], ...] = (
    (WeightDelta, WeightSlot),
    (HiddenDelta, HiddenSlot),
    (ModuleDelta, ModuleSlot),
    (StackDelta, StackSlot),
    (BlockDelta, BlockSlot),
    (AttentionDelta, AttentionSlot),
    (TokenDelta, tokens.TokenSlot),
)


def slot_for(host: Host, name: str, number: int, place: Place) -> Slot:
    kind = (
        ParameterSlot
        if place.site.kind == "parameter"
        else next((s for d, s in KINDS if isinstance(place.delta, d)), None)
    )
    if kind is None:
        raise AttachError(f"{type(place.delta).__name__} is no kind of delta; subclass WeightDelta, HiddenDelta, …")
    return kind(host, name, number, place)


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
    if not _NAME.fullmatch(name):
        raise ConfigError(f"name = {name!r}: letters, digits, - and _, at most 64")
    host = host_of(model)
    if host is not None and name in host.adaptations:
        raise AttachError(f"an adaptation called {name!r} is attached already; detach it or choose another name")
    found = found or (host.anatomy if host else anatomy(model))
    made = plan(model, chosen, found, seed, train_head)
    return install(model, made, found, name=name, seed=seed)


def install(model: nn.Module, made: Plan, found: Anatomy, *, name: str, seed: int) -> Adaptation:
    """Carry a plan out, or leave the model as it was."""
    host, mark = host_of(model), mark_of(model, found)
    if host is None:
        host = model.__dict__["_petiole"] = Host(model, found)
        host.mark = mark
    before, adaptation = host.active, None
    try:
        refuse_taken(host, made.trained)
        slots = [slot_for(host, name, number, place) for number, place in made.places]
        adaptation = Adaptation(host, name, seed, made.methods, slots, made.shared, originals(model, made.trained))
        adaptation.mark = mark
        host.adaptations[name] = adaptation
        for slot in slots:
            host.install(slot)
        for number, shared in made.shared.items():
            model.add_module(f"{_CHILD}_shared_{name}-{number}", shared)
        for own in made.trained:
            host.tensor(own).requires_grad_(True)
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
                tensor.copy_(original)
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(False)
                tensor.grad = None
    del host.adaptations[adaptation.name]
    host.active = tuple(n for n in host.active if n in host.adaptations) or tuple(list(host.adaptations)[-1:])
    if not host.adaptations:
        host.close()
    forget_compiled()


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


def batch_of(values: Mapping[str, Any]) -> int:
    """Rows of a batch of model inputs."""
    return next(v.shape[0] for v in values.values() if isinstance(v, Tensor) and v.ndim)


__all__ = ["Host", "activate", "adaptations", "attach", "detach", "disabled", "given", "of_output", "route"]
