"""Where a delta meets a module: a child module that holds the deltas, and two hooks that call them.

The module under it keeps its class, its parameter names and its forward. A `Slot` is one delta at one place; `Junction` is the
child (named `petiole`) of a module, with all the slots that read or write there, in the order in which they were attached.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from petiole import context, factored
from petiole.anatomy import Site
from petiole.errors import AttachError
from petiole.method import ASIDE, Base, Place, StackDelta, add_rows, composed, raw

if TYPE_CHECKING:
    from petiole.attach import Host

Put = Callable[[Tensor], Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]
Kept = dict[Any, Any]  # what a routed batch gathered, for the next one that is routed alike
Prior = Sequence[tuple[Site, Any]]  # earlier changes of the same weight: their sites and deltas
_NAMES = ("hidden_states", "hidden_state", "inputs_embeds", "input", "inputs", "x", "src", "query", "features")


# ------------------------------------------------------------------------------------------- the hidden state among arguments


def of_input(args: Args, kwargs: Kwargs) -> tuple[Tensor, Put]:
    """The hidden state in a module's arguments, and a function that gives (args, kwargs) with another in its place."""
    if args and isinstance(args[0], Tensor):
        return args[0], lambda h: ((h, *args[1:]), kwargs)
    for name in (*_NAMES, *kwargs):
        value = kwargs.get(name)
        if isinstance(value, Tensor) and value.is_floating_point():
            return value, lambda h, name=name: (args, {**kwargs, name: h})
    raise AttachError(
        f"no hidden state among the arguments: {len(args)} positional, {', '.join(kwargs) or 'no named ones'}"
    )


def of_output(output: Any) -> tuple[Tensor, Put]:
    """The hidden state in a module's output (a tensor, a tuple that begins with one, or a model output), and its setter."""
    if isinstance(output, Tensor):
        return output, lambda h: h
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        rest = output[1:]
        return output[
            0
        ], lambda h: type(output)((h, *rest)) if type(output) in (tuple, list) else type(output)(h, *rest)
    if isinstance(output, Mapping):
        name = next((k for k, v in output.items() if isinstance(v, Tensor)), None)
        if name is not None:

            def put(h: Tensor) -> Any:
                output[name] = h  # type: ignore[index]
                return output

            return output[name], put
    raise AttachError(f"a module returned {type(output).__name__}, in which no hidden state was found")


def compose(h: Tensor, change: Any, composition: str) -> Tensor:
    """h and Δ -> the new h. For `gate`, the delta gives (Δ, λ): h <- (1 - λ) h + λ Δ."""
    if composition == "gate":
        value, gate = change
        return h + (gate * (value.to(h.dtype) - h)).to(h.dtype)
    change = change.to(h.dtype)
    if composition == "add":
        return h + change
    return h * change if composition == "multiply" else change


def features(h: Tensor, rows: Sequence[tuple[int, int]]) -> Tensor:
    """The features (..., n) of h (..., d) that a site's row ranges name, in order; a view where one range suffices."""
    parts = [h[..., start:stop] for start, stop in rows]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def on_rows(h: Tensor, rows: Tensor | None, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply `change` to the named rows of h only; to all of them where `rows` is None."""
    if rows is None:
        return change(h)
    if rows.numel() == 0:
        return h
    with context.seeing(rows, h.shape[0]):
        return h.index_copy(0, rows, change(h.index_select(0, rows)).to(h.dtype))


# ------------------------------------------------------------------------------------------------------------------------ slots


@dataclass(frozen=True)
class Point:
    """Where and when a slot acts: `act` is the name of one of its methods, called before or after the module at `path` runs."""

    path: str
    when: Literal["before", "after"]
    act: str
    owns: bool = False  # the delta is a child of this module
    last: bool = False  # it looks at what all others have made of the output


class Slot:
    """One delta at one place, and what it did in the current forward pass."""

    def __init__(self, host: Host, adaptation: str, number: int, place: Place, key: str) -> None:
        self.host, self.adaptation, self.number, self.place = host, adaptation, number, place
        self.key = key  # unique within the adaptation; never a module path
        self.fired = False
        self.merged = False
        self._held: dict[int, Any] = {}  # by thread: what was read at one module, until it is used at another
        self._held_compiled: Any = None

    @property
    def site(self) -> Site:
        return self.place.site

    @property
    def delta(self) -> Any:
        return self.place.delta

    def points(self) -> Iterator[Point]:
        """Where and when the slot acts, in the order of execution."""
        raise NotImplementedError

    def by_row(self, slots: list[Any], index: Tensor, args: Args, kwargs: Kwargs, output: Any, kept: Kept) -> Any:
        """The output with another slot's change on each row (`index`, -1: none), in one go; None if that can't be."""
        return None

    def acts(self) -> bool:
        """Whether this slot does anything in this forward pass."""
        return not self.merged and self.host.acts(self.adaptation)

    def fire(self) -> None:
        if not torch.compiler.is_compiling():
            self.fired = True

    def hold(self, value: Any) -> None:
        if torch.compiler.is_compiling():
            self._held_compiled = value
        else:
            self._held[threading.get_ident()] = value

    def release(self) -> Any:
        if torch.compiler.is_compiling():
            value, self._held_compiled = self._held_compiled, None
            return value
        return self._held.pop(threading.get_ident(), None)


class WeightSlot(Slot):
    """y <- y + Δy, on the rows of the output that belong to the site."""

    def points(self) -> Iterator[Point]:
        yield Point(self.site.path, "after", "add", owns=True)

    def add(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
        self.fire()
        x = args[0] if args else of_input(args, kwargs)[0]
        y, put = of_output(output)
        for rows, prior in self.host.prior_by_rows(self, y):
            if rows is None:
                return put(self.changed(module, y, x, prior))
            mine = x.index_select(0, rows)
            y = on_rows(y, rows, lambda part, mine=mine, prior=prior: self.changed(module, part, mine, prior))  # type: ignore[misc]
        return put(y)

    def by_row(self, slots: list[Any], index: Tensor, args: Args, kwargs: Kwargs, output: Any, kept: Kept) -> Any:
        parts = [slot.delta.factored() for slot in slots]
        rows = self.site.rows
        x = args[0] if args else of_input(args, kwargs)[0]
        y, put = of_output(output)
        if (
            any(part is None or (len(part) == 5 and part[4].ndim == 3) for part in parts)
            or len(rows) > 1
            or y.shape[0] % index.shape[0]
            or self.site.kind != "linear"
        ):
            return None
        for slot in slots:
            slot.fire()
        factors = [factored.Factor.of(part, rows) for part in parts]
        return put(factored.add_by_row(x, y, factors, index, kept))

    def changed(self, module: nn.Module, y: Tensor, x: Tensor, prior: Prior) -> Tensor:
        site = self.site
        if site.kind == "embedding":
            return y + embedding_scale(module) * self.delta(x, Base(site, module, y, prior)).to(y.dtype)
        if not site.rows:
            return y + self.delta(x, Base(site, module, y, prior)).to(y.dtype)
        return add_rows(y, self.delta(x, Base(site, module, features(y, site.rows), prior)).to(y.dtype), site.rows, -1)


def embedding_scale(module: nn.Module) -> Any:
    """By what some embeddings multiply the row that they look up."""
    return getattr(module, "embed_scale", 1.0)


def entry(site: Site) -> str:
    """Where the input of a sub-layer can change: within what adds the residual, where one module does both (BERT's attention)."""
    return site.core if site.core.startswith(f"{site.path}.") else site.path


class HiddenSlot(Slot):
    """h <- h + Δ(h), at a module's input or output; Δ may read elsewhere (parallel insertion)."""

    def __init__(self, host: Host, adaptation: str, number: int, place: Place, key: str) -> None:
        super().__init__(host, adaptation, number, place, key)
        self.front = channels_first(host, place.site)
        self.read_front = place.read is not None and channels_first(host, place.read)

    def points(self) -> Iterator[Point]:
        for site, act in ((self.place.read, "read"), (self.site, "write")):
            if site is not None:
                before = site.side == "input"
                path = entry(site) if before else site.exit
                yield Point(path, "before" if before else "after", act, owns=act == "write")

    def read(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
        h = (of_input(args, kwargs) if output is None else of_output(output))[0]
        rows = self.place.read.rows if self.place.read is not None else ()
        if rows and output is not None:
            h = features(h, rows)
        self.hold(h.movedim(1, -1) if self.read_front else h)
        return None if output is None else output

    def write(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
        h, put = of_input(args, kwargs) if output is None else of_output(output)
        return put(self.changed(h))

    def by_row(self, slots: list[Any], index: Tensor, args: Args, kwargs: Kwargs, output: Any, kept: Kept) -> Any:
        reads = self.place.read is not None
        if (
            any(slot.delta.composition != self.delta.composition for slot in slots)
            or self.site.rows
            or self.front
            or self.read_front
            or self.delta.composition == "gate"
            or (reads and self.delta.reads_both)
        ):
            return None
        h, put = of_output(output)
        source = h
        if reads:
            held = [slot._held.get(threading.get_ident()) for slot in slots]
            if any(value is None for value in held):
                return None
            source = held[0]
        n = index.shape[0]
        if source.shape[0] % n:
            return None
        change = self.delta.by_row([slot.delta for slot in slots], index, source.reshape(n, -1, source.shape[-1]))
        if change is None:
            return None
        for slot in slots:
            slot.release()
            slot.fire()
        neutral = 1.0 if self.delta.composition == "multiply" else 0.0
        changed = (index >= 0).to(h.device).view(-1, 1, 1)
        change = change.expand(n, change.shape[1], h.shape[-1])
        if self.delta.composition == "replace":
            return put(torch.where(changed, change.to(h.dtype), h.reshape(n, -1, h.shape[-1])).view(h.shape))
        whole = torch.where(changed, change, torch.full_like(change, neutral)).to(h.dtype)
        own = h.reshape(n, -1, h.shape[-1])
        return put(compose(own, whole, self.delta.composition).view(h.shape))

    def changed(self, h: Tensor) -> Tensor:
        source = self.release() if self.place.read is not None else h
        if source is None:
            raise AttachError(
                f"{self.site.key}: what it reads, {self.place.read}, was not called before what it writes"
            )
        self.fire()
        rows = self.host.rows(self.adaptation, h)
        if rows is None:
            return self.composed(h, source)
        part = source.index_select(0, rows)
        return on_rows(h, rows, lambda own: self.composed(own, part))

    def composed(self, h: Tensor, source: Tensor) -> Tensor:
        """The new h; in a fused projection, only the features that belong to the site change."""
        if self.front:
            own = h.movedim(1, -1)
            if self.place.read is None:
                source = own
            elif source.shape[:-1] != own.shape[:-1]:
                raise AttachError(
                    f"{self.site.key}: it is {tuple(own.shape[1:-1])} large, but what the change reads is {tuple(source.shape[1:-1])}\n"
                    "what changes the size of an image can't have a change beside it; name other sites"
                )
            return compose(own, self.change(source, own), self.delta.composition).movedim(-1, 1)
        if not self.site.rows or self.site.side == "input":
            return compose(h, self.change(source, h), self.delta.composition)
        own = features(h, self.site.rows)
        new = compose(own, self.change(own if self.place.read is None else source, own), self.delta.composition)
        return add_rows(h, new - own, self.site.rows, -1)

    def change(self, source: Tensor, h: Tensor) -> Any:
        """Δ, from what the delta reads and, if it asks for both, from what it changes."""
        return self.delta(source, h) if self.place.read is not None and self.delta.reads_both else self.delta(source)


def channels_first(host: Host, site: Site) -> bool:
    """Whether the hidden state there is (B, d, *size), as in convolutional networks; a delta sees (B, *size, d) all the same."""
    if site.kind == "norm":
        return isinstance(host.module(site.path), (nn.GroupNorm, nn.modules.batchnorm._NormBase))
    if site.role == "block":
        return host.anatomy.stack(site.stack).blocks[site.depth].channels_first
    return site.kind == "conv"


class ModuleSlot(Slot):
    """The module's output is computed anew."""

    def points(self) -> Iterator[Point]:
        yield Point(self.site.path, "after", "renew", owns=True)

    def renew(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
        self.fire()
        new = self.delta(*args, **kwargs)
        y, put = of_output(output)
        rows = self.host.rows(self.adaptation, y)
        if rows is None:
            return new
        return put(on_rows(y, rows, lambda own: of_output(new)[0].index_select(0, rows)))


class AroundSlot(Slot):
    """Changes what a module is given, and then what it returns."""

    def points(self) -> Iterator[Point]:
        yield Point(self.site.path, "before", "enter", owns=True)
        yield Point(self.site.path, "after", "leave")

    def enter(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
        if self.host.rows(self.adaptation, None) is not None:
            raise AttachError(f"{self.site.key}: what changes the batch acts on every row of it, or on none")
        self.fire()
        h, put = of_input(args, kwargs)
        self.hold(h)
        new = self.delta.enter(h)
        return None if new is h else put(new)

    def leave(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
        y, put = of_output(output)
        return put(self.delta.leave(y, self.release()))


@dataclass
class Call:
    """How a block was called, its hidden state left out, and what it returned beside that."""

    block: nn.Module
    args: Args
    kwargs: Kwargs
    rest: tuple[Any, ...] = ()

    def on(self, h: Tensor) -> tuple[Args, Kwargs]:
        """The arguments, with a hidden state."""
        found: tuple[Args, Kwargs] = of_input(self.args, self.kwargs)[1](h)
        return found


@dataclass
class Record:
    """What was seen of a stack in a forward pass: hidden states by number, the calls of its blocks, and how many have run."""

    states: dict[int, Tensor]
    calls: list[Call]
    done: int = 0


class StackSlot(Slot):
    """Collects hidden states of a stack, and writes its last one; at a block's input, those up to there, and that input."""

    def __init__(self, host: Host, adaptation: str, number: int, place: Place, key: str) -> None:
        super().__init__(host, adaptation, number, place, key)
        self.blocks = host.anatomy.stack(self.site.stack).blocks
        self.count = self.site.depth if self.site.side == "input" else len(self.blocks)
        reads = self.delta.reads
        self.reads = tuple(range(self.count + 1) if reads is None else reads)

    def points(self) -> Iterator[Point]:
        yield Point(self.blocks[0].path, "before", "open")
        for block in self.blocks[: self.count]:
            if self.delta.reads_calls:
                yield Point(block.path, "before", "note")
            yield Point(block.path, "after", "collect")
        if self.site.side == "input":
            yield Point(self.site.path, "before", "begin", owns=True)
            if type(self.delta).late is not StackDelta.late:
                for block in self.blocks[self.count :]:
                    yield Point(block.path, "before", "late")
        else:
            yield Point(self.exit(), "after", "close", owns=True)

    def exit(self) -> str:
        """Path of the module after which the delta writes."""
        if self.delta.writes == "block":
            return self.blocks[-1].path
        return stack_exit(self.host, self.site.stack) if self.delta.writes == "stack" else self.delta.writes

    def open(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> tuple[Args, Kwargs] | None:
        h, put = of_input(args, kwargs)
        cut = self.delta.detaches and h.requires_grad
        h = h.detach() if cut else h
        self.hold(Record({0: h} if 0 in self.reads else {}, []))
        return put(h) if cut else None

    def record(self, last: bool = False) -> Record:
        record = self.release()
        if record is None:
            raise AttachError(f"{self.site.key}: a block ran before the first block of its stack")
        if not last:
            self.hold(record)
        return record

    def note(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> None:
        record = self.record()
        h, put = of_input(args, kwargs)
        if len(record.calls) == record.done:  # and not a recomputation
            record.calls.append(Call(module, *put(h.new_empty(0))))

    def collect(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
        record = self.record()
        if record.done < self.count:
            record.done += 1
            h = of_output(output)[0]
            if record.done in self.reads:
                record.states[record.done] = h.detach() if self.delta.detaches else h
            if record.calls and isinstance(output, tuple):
                record.calls[-1].rest = output[1:]
        return output

    def run(self, h: Tensor) -> Any:
        """What the delta makes of the states, given the one that it replaces."""
        self.fire()
        record = self.record(last=True)
        rows = self.host.rows(self.adaptation, h)
        states = [record.states[number] for number in self.reads]
        if self.delta.reads_calls:
            return self.delta(states, record.calls, h.detach() if self.delta.detaches else h)
        if rows is None:
            return self.delta(states)
        states = [state.index_select(0, rows) for state in states]
        return on_rows(h, rows, lambda _: self.delta(states))

    def close(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
        h, put = of_output(output)
        new = self.run(h)
        return output if new is None else put(new.to(h.dtype))

    def begin(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> tuple[Args, Kwargs] | None:
        h, put = of_input(args, kwargs)
        new = self.run(h)
        return None if new is None else put(new.to(h.dtype))

    def late(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> tuple[Args, Kwargs] | None:
        changed: tuple[Args, Kwargs] | None = self.delta.late(module, args, kwargs)
        return changed


def stack_exit(host: Host, name: str) -> str:
    """Path of the module whose output is that of a whole stack: its final norm, or what holds its blocks."""
    stack = host.anatomy.stack(name)
    norm = host.anatomy.final_norm(stack)
    owner = stack.containers[-1].rpartition(".")[0]
    return norm.path if norm is not None else owner or stack.blocks[-1].path


class BlockSlot(Slot):
    """The substituted block (`attach.py` puts it in the stack); no hooks."""

    def points(self) -> Iterator[Point]:
        yield from ()


class AttentionSlot(Slot):
    """Consulted by petiole's attention function (`attention.py`) through the junction of the attention module."""

    def points(self) -> Iterator[Point]:
        yield Point(self.host.attention_module(self.site), "before", "", owns=True)


# --------------------------------------------------------------------------------------------------------------------- junction


class Junction(nn.Module):
    """The child named `petiole` of a module at which deltas read or write. Owns the deltas that write here."""

    def __init__(self) -> None:
        super().__init__()
        self.deltas = nn.ModuleDict()
        self.slots: list[tuple[Slot, Point]] = []
        self._gathered: dict[str, Kept] = {}  # by site: the factors of the last routed batch
        self._held: dict[
            int, tuple[Tensor, list[factored.Factor]]
        ] = {}  # by thread: x, and what will be added in one go

    def add(self, slot: Slot, point: Point) -> None:
        if point.owns:
            self.deltas[self.name(slot)] = slot.delta.train(self.training)
        if slot.delta.innermost:
            self.slots.insert(0, (slot, point))
        else:
            looking = 0 if point.last else sum(other.last for _, other in self.slots)
            self.slots.insert(len(self.slots) - looking, (slot, point))

    def drop(self, slot: Slot) -> None:
        self.slots = [entry for entry in self.slots if entry[0] is not slot]
        if self.name(slot) in self.deltas:
            del self.deltas[self.name(slot)]

    @staticmethod
    def name(slot: Slot) -> str:
        return f"{slot.adaptation}-{slot.key}".replace(".", "_")

    def before(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        """Forward pre-hook of the module."""
        factors = self.factors(module, args, kwargs)
        if self._held:
            self._held.pop(threading.get_ident(), None)  # left by a forward pass that failed
        if factors:
            self._held[threading.get_ident()] = (args[0], factors)
            return (args[0].detach(), *args[1:]), kwargs
        changed = False
        for slot, point in self.slots:
            if point.when == "before" and point.act and slot.acts():
                new = getattr(slot, point.act)(module, args, kwargs, None)
                if new is not None:
                    args, kwargs = new
                    changed = True
        return (args, kwargs) if changed else None

    def after(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
        """Forward hook of the module."""
        held = self._held.pop(threading.get_ident(), None) if self._held else None
        if held is not None:
            for slot, _ in self.slots:
                slot.fired |= slot.acts()
            return factored.add(held[0], output, module, held[1])
        acting = [(slot, point) for slot, point in self.slots if point.when == "after" and slot.acts()]
        around = [entry for entry in acting if isinstance(entry[0], AroundSlot)]
        if around:  # they stand outside of all others here
            acting = [entry for entry in acting if entry not in around] + around[::-1]
        names = acting[0][0].host.row_names() if acting and not torch.compiler.is_compiling() else None
        if names is not None and all(len(row) < 2 for row in names):
            return self.by_row(acting, names, module, args, kwargs, output)
        for slot, point in acting:
            output = getattr(slot, point.act)(module, args, kwargs, output)
        return output

    def factors(self, module: nn.Module, args: Args, kwargs: Kwargs) -> list[factored.Factor]:
        """The changes that act here, if all of them are low-rank products on an ordinary linear: then they are added in one go."""
        if torch.compiler.is_compiling() or not args or not isinstance(args[0], Tensor) or args[0].ndim < 2:
            return []
        if len(module._forward_hooks) > 1 or not all(isinstance(slot, WeightSlot) for slot, _ in self.slots):
            return []
        if next(reversed(module._forward_pre_hooks.values())) != self.before:
            return []  # a later hook may change the input
        found: list[factored.Factor] = []
        for slot, _ in self.slots:
            if slot.acts():
                parts = slot.delta.factored()
                if parts is None or len(slot.site.rows) > 1 or slot.host.rows(slot.adaptation, None) is not None:
                    return []
                found.append(factored.Factor.of(parts, slot.site.rows))
        return found if found and factored.plain(module) else []

    def by_row(
        self,
        acting: list[tuple[Slot, Point]],
        names: tuple[tuple[str, ...], ...],
        module: nn.Module,
        args: Args,
        kwargs: Kwargs,
        output: Any,
    ) -> Any:
        """Where rows of the batch take different adaptations: all their changes at one site in one batched product, if they batch.

        On each row in the order of attachment: only what comes next in each adaptation is taken together.
        """
        left = list(acting)
        while left:
            slot, point = left[0]
            following: dict[str, tuple[Slot, Point]] = {}
            for entry in left:
                following.setdefault(entry[0].adaptation, entry)
            group = [
                (other, where)
                for other, where in following.values()
                if (type(other), other.number, other.site.key, where.act)
                == (type(slot), slot.number, slot.site.key, point.act)
            ]
            place = {other.adaptation: i for i, (other, _) in enumerate(group)}
            index = torch.tensor([place.get(row[0], -1) if row else -1 for row in names])
            kept = self._gathered.setdefault(slot.site.key, {})
            new = slot.by_row([other for other, _ in group], index, args, kwargs, output, kept)
            if new is None:
                group = [left[0]]
                new = getattr(slot, point.act)(module, args, kwargs, output)
            output = new
            left = [entry for entry in left if entry not in group]
        return output


class ParameterSlot(Slot):
    """A weight that no module's call would show (packed experts, `in_proj_weight`): composed for its caller's forward."""

    def points(self) -> Iterator[Point]:
        yield Point(self.site.caller or self.site.path, "before", "", owns=True)

    def pairs(self) -> Iterator[tuple[str, Tensor, bool]]:
        """The tensors of the owner that change: name, change in the site's own rows, whether it is the weight."""
        base = Base(
            self.site, self.host.module(self.site.path), None, [(s.site, s.delta) for s in self.host.prior(self)]
        )
        changes = ((self.site.parameter, self.delta.weight(base.weight)), (self.site.bias, self.delta.bias(base.bias)))
        for name, change in changes:
            if change is not None and not name:
                raise AttachError(f"{self.site.key}: {type(self.delta).__name__} changes a bias, but there is none")
            if change is not None:
                yield name, change, name == self.site.parameter


class ParameterJunction(Junction):
    """Puts W + ΔW in a parameter's place during its caller's forward.

    The stand-in hides the parameter through the owner's own dictionary, so the state dict never changes. Every thread would see it, so
    one at a time calls the module, whether or not it has something to compose.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lock = Lock()

    def before(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        slots = [slot for slot, _ in self.slots if isinstance(slot, ParameterSlot) and slot.acts()]
        if torch.compiler.is_compiling():  # compiled code hands the sum on, and no thread sees it in the module
            self.compose(slots)
            return None
        self.lock.acquire()
        try:
            self.compose(slots)
        except BaseException:
            self.after(module, args, kwargs, None)
            raise
        return None

    def compose(self, slots: list[ParameterSlot]) -> None:
        changes: dict[tuple[str, str], list[tuple[Site, Tensor, bool]]] = {}
        for slot in slots:
            if slot.host.rows(slot.adaptation, None) is not None:
                raise AttachError(
                    f"{slot.site.key}: its weight is composed for the whole batch, so rows can't differ here"
                )
            slot.fire()
            for name, change, weight in slot.pairs():
                changes.setdefault((slot.site.path, name), []).append((slot.site, change, weight))
        for (path, name), parts in changes.items():
            owner = slots[0].host.module(path)
            owner.__dict__[name] = composed(raw(owner, name), parts)

    def after(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
        """Forward hook, called even when the forward fails."""
        compiling = torch.compiler.is_compiling()
        if not (compiling or self.lock.held()):
            return output
        for slot, _ in self.slots:
            owner = slot.host.module(slot.site.path)
            aside = owner.__dict__.get(ASIDE, {})
            for name in (slot.site.parameter, slot.site.bias):
                if name in aside:
                    owner.__dict__[name] = aside[name]
                else:
                    owner.__dict__.pop(name, None)
        if not compiling:
            self.lock.release()
        return output


class Lock:
    """A re-entrant lock that survives deepcopy and pickling: the copy gets a lock of its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth: dict[int, int] = {}

    def acquire(self) -> None:
        self._lock.acquire()
        me = threading.get_ident()
        self._depth[me] = self._depth.get(me, 0) + 1

    def release(self) -> None:
        self._depth[threading.get_ident()] -= 1
        self._lock.release()

    def held(self) -> bool:
        return self._depth.get(threading.get_ident(), 0) > 0

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()

    def __reduce__(self) -> tuple[Any, ...]:
        return (Lock, ())
