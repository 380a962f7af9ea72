"""Two streams through a stack of blocks, and the way back: nothing between the first block and the last is kept for backward.

    y1 = λ x1 + F(x2)        x2 = (y2 - G(y1)) / β
    y2 = β x2 + G(y1)        x1 = (y1 - F(x2)) / λ        streams (B, N, d), at first both h_0, at last h = (x1 + x2) / 2

A `Reversible` stands in for each block and says F and G; a `Line` is those of one stack. The model goes on calling its blocks one by one,
with their own arguments. In a forward pass with gradients each stand-in runs F and G without a graph and notes its call; the last one puts
a single node in the graph (`Segment`), whose backward pass rebuilds the streams from the top, block by block. Dividing by λ and β amplifies
rounding, so both streams are kept every few blocks (`anchor_every`), where the way back starts afresh.

Not counted among what autograd saves: the states of random generators, 5 kB for each F or G that draws numbers on the CPU, 16 bytes on CUDA.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor  # has a shape and no values: nothing to compare, no random numbers
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import (
    _disable_current_modes,
)  # so that whoever counts operations sees none of a trial
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers.utils import output_capturing

from petiole.adaptation import Adaptation
from petiole.attach import Host, Substitute
from petiole.context import Recollection
from petiole.errors import AttachError
from petiole.junction import Junction, of_input, of_output
from petiole.method import BlockDelta
from petiole.methods.execution.skipped import CAPTURE, is_cache

Pair = tuple[Tensor, Tensor]
Put = Callable[[Tensor], tuple[tuple[Any, ...], dict[str, Any]]]  # a hidden state -> a block's arguments with it
AnchorEvery = int | Literal["auto"] | None
NOTHING = torch.empty(0)
_HOLE = object()  # where the hidden state stood among a block's arguments


def auto_anchors(lam: float, beta: float, half: bool = False) -> int | None:
    """The largest k with a^k · 6e-8 <= 1e-3, where a = 1 / (min(|λ|, 1) min(|β|, 1)); None if nothing is amplified.

    Args:
        half: F and G compute in half precision, which rounds differently what differs a little: half of that k, at least 1, keeps the
            error of the way back below that of half precision itself.
    """
    amplification = 1 / (min(abs(lam), 1.0) * min(abs(beta), 1.0))
    if amplification == 1:
        return None
    k = max(1, math.floor(math.log(1e-3 / 6e-8) / math.log(amplification)))
    return max(1, k // 2) if half else k


# --------------------------------------------------------------------------------------------------------------- the stand-in


class Reversible(BlockDelta):
    """One step of the two streams. Subclasses say F and G.

    Args:
        line: of the stack, which it joins at the end.
    """

    answers: Literal["f", "g"] = "f"  # which of the two gives what the block returns beside its hidden state

    def __init__(self, line: Line) -> None:
        super().__init__()
        self.line, self.position = line, len(line.members)
        self.proved = False  # whether F and G gave the same when they ran twice
        line.members.append(self)

    def f(self, block: nn.Module, put: Put, x: Tensor) -> Any:
        """x (B, N, d) -> F(x), or the block's output that begins with it."""
        raise NotImplementedError

    def g(self, block: nn.Module, put: Put, y: Tensor) -> Any:
        """y (B, N, d) -> G(y), or the block's output that begins with it."""
        raise NotImplementedError

    def forward(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The block's arguments -> what it would return, with the mean of the streams after the last block."""
        if torch.is_grad_enabled() and self.line.reversible:
            return self.opaque(block, args, kwargs)
        return self.advance(block, args, kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def opaque(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`advance`, not to be looked into by a compiler."""
        return self.advance(block, args, kwargs)

    def advance(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        h, put = of_input(args, kwargs)
        run = self.line.run(self, h)
        block = self.own(block, run)
        if run.reversing and self.position < self.line.reversible:
            answer = run.record(self, block, args, kwargs, h)
        else:
            run.pair, answer = self.step(
                lambda x: self.f(block, put, x), lambda y: self.g(block, put, y), run.pair, h.dtype
            )
        return of_output(answer)[1](run.hand_on(self, h.dtype))

    def own(self, block: nn.Module, run: Run) -> nn.Module:
        """The block without other reversible stand-ins: of several, the newest carries the streams."""
        while isinstance(block, Substitute) and isinstance(block._slot.delta, Reversible):
            if run.reversing and block._slot.acts():
                raise AttachError(
                    "two reversible adaptations act at once, of which one would train in vain: pt.activate one"
                )
            block = block.block
        return block

    def step(
        self, f: Callable[[Tensor], Any], g: Callable[[Tensor], Any], pair: Pair, dtype: torch.dtype
    ) -> tuple[Pair, Any]:
        """The streams below the block -> those handed on, and the output that holds what else the block returns.

        Args:
            f, g: the two functions. dtype: in which the model computes; the streams may be kept in a wider one.
        """
        line, (x1, x2) = self.line, pair
        answer_f = f(x2.to(dtype))
        y1 = line.lam * x1 + alike(of_output(answer_f)[0], x1)
        answer_g = g(y1.to(dtype))
        y2 = line.beta * x2 + alike(of_output(answer_g)[0], x2)
        return (y2, y1) if line.swaps else (y1, y2), answer_f if self.answers == "f" else answer_g

    def inverse(self, f: Callable[[Tensor], Any], g: Callable[[Tensor], Any], pair: Pair, dtype: torch.dtype) -> Pair:
        """The streams that were handed on -> those below the block."""
        line = self.line
        y2, y1 = pair if line.swaps else pair[::-1]
        x2 = (y2 - of_output(g(y1.to(dtype)))[0].to(y2.dtype)) / line.beta
        return (y1 - of_output(f(x2.to(dtype)))[0].to(y1.dtype)) / line.lam, x2


def alike(change: Tensor, stream: Tensor) -> Tensor:
    """F(x) or G(y) in the type of the streams.

    Raises:
        AttachError: it has another shape, so it can't be added.
    """
    if change.shape != stream.shape:
        raise AttachError(
            f"a block turns {tuple(stream.shape)} into {tuple(change.shape)}, which no second stream can follow\n"
            "leave out what adds or drops tokens on the way"
        )
    return change.to(stream.dtype)


class Line:
    """The stand-ins of one stack, from its input.

    Args:
        name: of the stack. lam, beta: λ and β. swaps: the next block receives the streams swapped.
        reversible: how many of the stand-ins, from the input, are run backwards; the others keep what autograd keeps.
        anchor_every: after how many blocks both streams are kept; "auto" by `auto_anchors`, None for never.
    """

    def __init__(
        self, name: str, lam: float, beta: float, *, swaps: bool, reversible: int, anchor_every: AnchorEvery
    ) -> None:
        self.name, self.lam, self.beta, self.swaps = name, lam, beta, swaps
        self.reversible, self.anchor_every = reversible, anchor_every
        self.members: list[Reversible] = []
        self.errors: dict[str, float] | None = None  # by site, while `reconstruction_error` asks for them
        self._runs: dict[int, Run] = {}  # by thread; 0 for compiled code

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_runs": {}}  # a forward pass is not copied with the model

    def run(self, member: Reversible, h: Tensor) -> Run:
        """The forward pass that has come to this stand-in; a new one at the first.

        Raises:
            AttachError: a block was left out, or its hidden state was changed, since the last stand-in.
        """
        me = 0 if torch.compiler.is_compiling() else threading.get_ident()
        if member.position == 0:
            self._runs[me] = Run(self, h, member.host)
        run = self._runs.get(me)
        if run is None or run.at != member.position:
            raise AttachError(
                f"{self.name}: the blocks were not called one after the other from the first; is one skipped (layerdrop)?"
            )
        if member.position and run.reversing and h is not run.handed:
            raise AttachError(
                f"{self.name}: the hidden state was changed between two blocks, where only the streams go on\n"
                "take away the hook that does it, or keep these blocks ordinary with num_reversible="
            )
        run.at += 1
        if run.at == len(self.members):
            del self._runs[me]
        return run

    def every(self, half: bool) -> int | None:
        """k, None for no anchors."""
        return auto_anchors(self.lam, self.beta, half) if self.anchor_every == "auto" else self.anchor_every


# ------------------------------------------------------------------------------------------------------------ a forward pass


class Call:
    """What a block was called with: tensors as numbers in the run's table, no hidden state, no cache; and what it drew."""

    def __init__(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any], h: Tensor) -> None:
        leaves, self.spec = tree_flatten((args, kwargs))
        self.leaves = [_HOLE if leaf is h else run.filed(leaf) for leaf in leaves]
        self.states: dict[str, Any] = {}  # of the generators before F and G, where they draw

    def put(self, table: Sequence[Tensor]) -> Put:
        def put(h: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
            leaves = [h if x is _HOLE else table[x.number] if isinstance(x, Filed) else x for x in self.leaves]
            args, kwargs = tree_unflatten(leaves, self.spec)
            return args, kwargs

        return put


class Filed:
    """The number of a tensor in a table."""

    def __init__(self, number: int) -> None:
        self.number = number


class Run:
    """One forward pass through a line.

    Attributes:
        pair: the streams so far. at: how many stand-ins were called. handed: the hidden state that the last one gave the model.
        reversing: whether the lower blocks run without a graph, to be run backwards.
    """

    def __init__(self, line: Line, h: Tensor, host: Host) -> None:
        wide = torch.promote_types(h.dtype, torch.float32)
        self.line, self.h, self.pair, self.at, self.handed = line, h, (h.to(wide), h.to(wide)), 0, h
        self.trained = trained(line, host) if torch.is_grad_enabled() and line.reversible else []
        refuse_gathered(host)
        self.reversing = bool(self.trained) or (torch.is_grad_enabled() and line.reversible > 0 and h.requires_grad)
        if not self.reversing:
            return
        refuse(line, host)
        self.dtype, self.fake = h.dtype, isinstance(h, FakeTensor)
        self.autocast = autocast_state(h.device)
        self.every = line.every(h.dtype.itemsize < 4 or any(enabled for _, enabled, _, _ in self.autocast))
        self.recollection = Recollection(host)
        self.calls: list[tuple[Reversible, nn.Module, Call]] = []
        self.anchors: dict[int, Pair] = {}  # by the number of blocks below
        self.table: list[Tensor] = []
        self.numbers: dict[int, Filed] = {}
        self.states: list[Pair] = []  # all of them, for `reconstruction_error`

    def filed(self, leaf: Any) -> Any:
        """Put a tensor in the table, once; leave a cache of keys and values out."""
        if is_cache(leaf):
            if leaf.get_seq_length():
                raise AttachError(
                    "a cache that holds something was given, but blocks run twice in training: use_cache=False"
                )
            return None  # models make one unasked
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in self.numbers:
            self.numbers[id(leaf)] = Filed(len(self.table))
            self.table.append(leaf)
        return self.numbers[id(leaf)]

    @torch.no_grad()
    def record(
        self, member: Reversible, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], h: Tensor
    ) -> Any:
        """Run a block's step without a graph, and note what it takes to run it again."""
        call = Call(self, args, kwargs, h)
        put, below = call.put(self.table), self.pair
        if self.line.errors is not None:
            self.states.append(below)
        self.calls.append((member, block, call))

        def f(x: Tensor) -> Any:
            return self.first(member, call, "f", lambda x: member.f(block, put, x), x)

        def g(y: Tensor) -> Any:
            return self.first(member, call, "g", lambda y: member.g(block, put, y), y)

        self.pair, answer = member.step(f, g, below, h.dtype)
        member.proved = member.proved or not self.fake
        count = len(self.calls)
        if self.every and count % self.every == 0 and count < self.line.reversible:
            self.anchors[count] = self.pair
        return answer

    def first(self, member: Reversible, call: Call, name: str, part: Callable[[Tensor], Any], x: Tensor) -> Any:
        """F or G for the first time: what it draws is noted, what can't be run backwards is refused."""
        if self.fake:
            return part(x)
        before, version = generators(x.device), x._version
        answer = part(x)
        if x._version != version:
            raise AttachError(
                f"{self.line.name}: a block changes its input in place, so nothing can be rebuilt from it"
            )
        after = generators(x.device)
        if not all(torch.equal(a, b) for a, b in zip(before, after, strict=True)):
            call.states[name] = before
        if not member.proved:
            with _disable_current_modes():
                set_generators(x.device, before)
                again = of_output(part(x))[0]
                set_generators(x.device, after)
            if not torch.allclose(again, of_output(answer)[0], rtol=1e-3, atol=1e-5, equal_nan=True):
                raise AttachError(
                    f"{self.line.name}: a block gives something else when it runs again with the same random numbers\n"
                    "it draws from a generator of its own, or counts its calls; keep it ordinary with num_reversible="
                )
        return answer

    def hand_on(self, member: Reversible, dtype: torch.dtype) -> Tensor:
        """The hidden state that the model gets from this stand-in."""
        left = self.line.reversible - self.at
        if self.reversing and left == 0:
            if self.line.errors is not None:
                self.line.errors |= self.reconstruction_errors()
            self.pair = self.joined()
        if self.reversing and left > 0:
            beside = self.trained[0] if self.trained else self.h
            handed = Intermediate.apply(self.pair[1].to(dtype), beside)
        else:
            handed = ((self.pair[0] + self.pair[1]) / 2).to(dtype)
        self.handed = handed
        if self.at == len(
            self.line.members
        ):  # the graph holds on to this run, which then must not hold on to the graph
            self.handed, self.pair = NOTHING, (NOTHING, NOTHING)
        return handed

    def joined(self) -> Pair:
        """The streams after the last reversible block, in the graph; all tensors that this run held are autograd's from here on."""
        given = [i for i, t in enumerate(self.table) if t.requires_grad]
        self.given, count = given, len(self.table)
        inputs = [self.h, *(self.table[i] for i in given), *self.trained]
        kept = [*self.pair, *(x for pair in self.anchors.values() for x in pair), *self.table]
        self.anchored, self.tables = list(self.anchors), count
        x1, x2 = Segment.apply(self, kept, *inputs)
        self.anchors, self.table, self.numbers, self.states, self.h = {}, [], {}, [], NOTHING
        return x1, x2

    # ---- again

    @contextmanager
    def resumed(self, device: torch.device) -> Iterator[None]:
        """As inside the forward pass, for running parts of it again; the generators end where they were."""
        before = None if self.fake else generators(device)
        with ExitStack() as stack:
            stack.enter_context(self.recollection.resumed())
            for kind, enabled, dtype, cache in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cache))
            try:
                yield
            finally:
                if before is not None:
                    set_generators(device, before)

    def again(self, number: int, name: str, table: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
        """F or G of a block, in the type of the streams, with the random numbers that it drew."""
        member, block, call = self.calls[number]
        put, part = call.put(table), member.f if name == "f" else member.g

        def run(x: Tensor) -> Tensor:
            if name in call.states:
                set_generators(x.device, call.states[name])
            return of_output(part(block, put, x.to(self.dtype)))[0].to(x.dtype)

        return run

    @torch.no_grad()
    def reconstruction_errors(self) -> dict[str, float]:
        """For each block, by its site: the largest difference between the streams below it and what they are rebuilt as."""
        found, pair = dict[str, float](), self.pair
        with self.resumed(pair[0].device):
            for n in reversed(range(len(self.calls))):
                pair, member = self.anchors.get(n + 1, pair), self.calls[n][0]
                pair = member.inverse(
                    self.again(n, "f", self.table), self.again(n, "g", self.table), pair, pair[0].dtype
                )
                found[f"{self.line.name}.{n}"] = max(
                    float((a - b).abs().max()) for a, b in zip(pair, self.states[n], strict=True)
                )
        return dict(reversed(found.items()))


def trained(line: Line, host: Host) -> list[nn.Parameter]:
    """Every parameter that trains in a line's reversible blocks: of the stand-ins, of all deltas there, of the backbone, and shared ones."""
    inside = {id(member): member for member in line.members[: line.reversible]}
    acting = [a for a in host.adaptations.values() if host.acts(a.name)]
    sites = [slot.site for a in acting for slot in a.slots if id(slot.delta) in inside]
    depths = {(site.stack, site.depth) for site in sites}
    modules: list[nn.Module] = [host.module(site.path) for site in sites]
    modules += [s.delta for a in acting for s in a.slots if (s.site.stack, s.site.depth) in depths]
    modules += [module for a in acting for module in a.shared.values()]
    return list({id(p): p for module in modules for p in module.parameters() if p.requires_grad}.values())


def refuse_gathered(host: Host) -> None:
    """Raises AttachError: the model itself goes on from hidden states between the blocks, which with two streams mean something else."""
    collector = getattr(output_capturing, "_active_collector", None)
    gathered = collector.get() if collector is not None else None
    within = host.passing()
    asked = within is not None and within.input("output_hidden_states")
    asked = asked or getattr(getattr(host.model, "config", None), "output_hidden_states", False)
    if not asked and gathered is not None and "hidden_states" in gathered:
        raise AttachError(
            f"{type(host.model).__name__} goes on from a hidden state between these blocks, which two streams don't have\n"
            "name another stack with stack=, or keep the blocks ordinary with num_reversible=0"
        )


def refuse(line: Line, host: Host) -> None:
    """What would go wrong silently when blocks are run backwards.

    Raises:
        AttachError: names it.
    """
    within = host.passing()
    config = getattr(host.model, "config", None)
    for name in ("output_hidden_states", "output_attentions"):
        asked = within.input(name) if within is not None else None
        if asked or (asked is None and getattr(config, name, False)):
            raise AttachError(
                f"{name}: what is inside reversible blocks is not kept, so no gradient could come back through it\n"
                "ask for it under torch.no_grad(), or keep the blocks ordinary with num_reversible=0"
            )
    if within is not None and within.input("use_cache"):
        raise AttachError(
            "use_cache=True: blocks run twice in training, which a cache would count twice; use_cache=False"
        )
    if host.publishing() or any(value.requires_grad for _, value in host.holding() if isinstance(value, Tensor)):
        raise AttachError(
            "a method beside this one carries gradients past the blocks, which reversible ones can't give back"
        )
    for member in line.members[: line.reversible]:
        block = next(s.site.path for a in host.adaptations.values() for s in a.slots if s.delta is member)
        for hook in host.module(block)._forward_hooks.values():
            own = isinstance(getattr(hook, "__self__", None), Junction)
            if not own and getattr(hook, "__module__", "") != CAPTURE:
                raise AttachError(
                    f"{block} has a forward hook that sees its hidden state, through which no gradient could come back\n"
                    "take it away for training, or keep the blocks ordinary with num_reversible=0"
                )


# ------------------------------------------------------------------------------------------------------------ in the graph


class Intermediate(torch.autograd.Function):
    """A hidden state between two reversible blocks: the streams go on without it, so a gradient for it has nowhere to go."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, beside: Tensor) -> Tensor:
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        raise AttachError(
            "the loss depends on a hidden state between two reversible blocks, which gives no gradient back\n"
            "keep these blocks ordinary with num_reversible="
        )


class Segment(torch.autograd.Function):
    """All reversible blocks as one node: h_0 and everything that trains in, the last pair of streams out."""

    @staticmethod
    def forward(ctx: Any, run: Run, kept: list[Tensor], *inputs: Tensor) -> Pair:
        ctx.run = run
        ctx.save_for_backward(*kept)
        return run.pair

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d1: Tensor, d2: Tensor) -> tuple[Any, ...]:
        """Gradients of the streams after the segment -> of h_0, of tensors that blocks were given, of parameters."""
        run: Run = ctx.run
        kept, line = ctx.saved_tensors, run.line
        pair, states = (kept[0], kept[1]), kept[2 : 2 + 2 * len(run.anchored)]
        anchors = dict(zip(run.anchored, zip(states[::2], states[1::2], strict=True), strict=True))
        table = list(kept[len(kept) - run.tables :])
        for i in run.given:
            table[i] = table[i].detach().requires_grad_()
        sources = [*(table[i] for i in run.given), *run.trained]
        sums: list[Tensor | None] = [None] * len(sources)

        def back(part: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor, needed: bool) -> tuple[Tensor, Tensor]:
            """A function's value at x again, and the gradient for x; those of the sources are added up."""
            x = x.detach().requires_grad_(needed)
            with torch.enable_grad():
                value = part(x)
            wanted = [x, *sources] if needed else sources
            found = list(torch.autograd.grad(value, wanted, gradient, allow_unused=True) if value.requires_grad else ())
            own = found.pop(0) if needed and found else None
            for i, each in enumerate(found):
                if each is not None:
                    sums[i] = each if (so_far := sums[i]) is None else so_far + each
            return value.detach(), torch.zeros_like(x) if own is None else own

        with run.resumed(d1.device):
            for n in reversed(range(len(run.calls))):
                pair, below = anchors.get(n + 1, pair), anchors.get(n)
                (y2, y1), (dy2, dy1) = (pair, (d1, d2)) if line.swaps else (pair[::-1], (d2, d1))
                g, change = back(run.again(n, "g", table), y1, dy2, True)
                dy1 = dy1 + change
                x2 = below[1] if below else (y2 - g) / line.beta
                needed = n > 0 or bool(ctx.needs_input_grad[2])
                f, change = back(run.again(n, "f", table), x2, dy1, needed)
                if n:
                    pair = (below[0] if below else (y1 - f) / line.lam, x2)
                d1, d2 = line.lam * dy1, line.beta * dy2 + change
        h = (d1 + d2).to(run.dtype) if ctx.needs_input_grad[2] else None
        return None, None, h, *sums


# ---------------------------------------------------------------------------------------------------------------- around it


def autocast_state(device: torch.device) -> list[tuple[str, bool, torch.dtype, bool]]:
    """Kind of device, whether autocast is on, its type, whether it keeps cast weights: of the device and of the CPU."""
    cache = torch.is_autocast_cache_enabled()
    kinds = sorted({device.type, "cpu"} - {"meta"})
    return [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), cache) for kind in kinds]


def generators(device: torch.device) -> list[Tensor]:
    """States of the generators that an operation on this device may draw from."""
    own = [] if device.type in ("cpu", "meta") else [torch.get_device_module(device).get_rng_state(device)]
    return [torch.get_rng_state(), *own]


def set_generators(device: torch.device, states: Sequence[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.get_device_module(device).set_rng_state(state, device)


def reconstruction_error(adaptation: Adaptation, batch: Mapping[str, Any]) -> dict[str, float]:
    """How far the way back is off: for each reversible block, by stack and number, the largest |x - x rebuilt| in the streams below it.

    Args:
        adaptation: with reversible stand-ins. batch: keyword arguments of the model, which stays in its mode.

    Raises:
        AttachError: nothing in the adaptation is reversible.
    """
    lines = list({id(s.delta.line): s.delta.line for s in adaptation.slots if isinstance(s.delta, Reversible)}.values())
    if not any(line.reversible for line in lines):
        raise AttachError(f"{adaptation.name!r} has no reversible blocks: num_reversible is 0, or its method has none")
    for line in lines:
        line.errors = {}
    try:
        with torch.random.fork_rng(), torch.enable_grad():
            adaptation.model(**batch)
        return {name: error for line in lines for name, error in (line.errors or {}).items()}
    finally:
        for line in lines:
            line.errors = None


__all__ = ["Line", "Reversible", "auto_anchors", "reconstruction_error"]
