"""What holds for one forward pass and not for the model: values given to deltas, and which adaptation acts on which row.

It lives in a `ContextVar`: right per thread and per task, nested, and gone with its `with`. Three things need care.
Recomputation under gradient checkpointing happens after the `with` has ended, so `Recall` brings the context back for it.
Compiled code can't read a ContextVar, so code runs eagerly while a context is open. And a model inside a context is named by
its host, so two models in one process don't see each other's.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from petiole.errors import AttachError

if TYPE_CHECKING:
    from petiole.attach import Host

Names = tuple[str, ...]


@dataclass(frozen=True)
class Context:
    """Immutable; a nested `with` makes a new one.

    Attributes:
        given: host -> values by name.
        active: host -> the adaptations that act on every row.
        rows: host -> for each row of the batch, the adaptations that act on it.
    """

    given: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    active: Mapping[int, Names] = field(default_factory=dict)
    rows: Mapping[int, tuple[Names, ...]] = field(default_factory=dict)


EMPTY = Context()
_CURRENT: ContextVar[Context] = ContextVar("petiole", default=EMPTY)
_lock = threading.Lock()
_stance: Any = None  # of the compiler while a context is open
_open = 0  # contexts open in any thread; read by compiled code, which can't see the ContextVar


def current() -> Context:
    """The context of this thread and task. Inside compiled code: always the empty one (see `eagerly`)."""
    if torch.compiler.is_compiling():
        if _open:
            raise AttachError(
                "compile the model outside of pt.given, pt.route and pt.disabled: inside, it runs eagerly"
            )
        return EMPTY
    return _CURRENT.get()


@contextmanager
def eagerly() -> Iterator[None]:
    """Compiled code falls back to eager inside, in every thread: it was traced for the empty context."""
    global _open, _stance
    with _lock:
        _open += 1
        if _stance is None and "torch._dynamo" in sys.modules:
            # From here on; leaving it brings back what was chosen before.
            _stance = torch.compiler.set_stance("force_eager")
    try:
        yield
    finally:
        with _lock:
            _open -= 1
            if _open == 0 and _stance is not None:
                _stance.__exit__(None, None, None)
                _stance = None


@contextmanager
def entered(context: Context) -> Iterator[None]:
    """Make `context` the current one."""
    with eagerly():
        token = _CURRENT.set(context)
        try:
            yield
        finally:
            _CURRENT.reset(token)


def with_given(host: int, values: Mapping[str, Any]) -> Context:
    """The current context with more values given to one host; inner values hide outer ones."""
    now = _CURRENT.get()
    return replace(now, given={**now.given, host: {**now.given.get(host, {}), **values}})


def with_active(host: int, names: Names) -> Context:
    """The current context with these adaptations acting on all rows of one host."""
    now = _CURRENT.get()
    return replace(now, active={**now.active, host: names}, rows={k: v for k, v in now.rows.items() if k != host})


def with_rows(host: int, rows: tuple[Names, ...]) -> Context:
    """The current context with other adaptations on each row of one host's batch."""
    now = _CURRENT.get()
    return replace(now, rows={**now.rows, host: rows}, active={k: v for k, v in now.active.items() if k != host})


def without(host: int, name: str, active: Names) -> Context:
    """The current context, in which one adaptation does not act on any row; `active` are those that act outside of contexts."""
    now = _CURRENT.get()
    if host in now.rows:
        return with_rows(host, tuple(tuple(n for n in row if n != name) for row in now.rows[host]))
    return with_active(host, tuple(n for n in now.active.get(host, active) if n != name))


_SEEN: ContextVar[tuple[torch.Tensor, int] | None] = ContextVar("petiole_rows", default=None)


@contextmanager
def seeing(rows: torch.Tensor | None, count: int = 0) -> Iterator[None]:
    """What runs inside sees these rows of a hidden state that has `count`; all of them without any."""
    token = _SEEN.set(None if rows is None else (rows, count))
    try:
        yield
    finally:
        _SEEN.reset(token)


def of_rows_seen(value: Any, batch: int) -> Any:
    """Of a value for each row of the batch, those of the rows that are seen; any other value as it is."""
    seen = _SEEN.get()
    if seen is None:
        return value
    rows, count = seen
    each = count // batch
    mine = rows[::each] // each
    if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == batch:
        return value.index_select(0, mine.to(value.device))
    if isinstance(value, (list, tuple)) and len(value) == batch:
        return type(value)(value[i] for i in mine.tolist())
    return value


def kept_whole() -> Any:
    """What autograd saves inside stays as it is: checkpointing around neither drops it, nor looks for it when it computes again."""
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor)


class Pass:
    """One forward pass as deltas see it: what the model was given, and what is computed once in it.

    Attributes:
        module: the outermost model that runs. args, kwargs: of its forward.
        found: what `Host.once` has computed so far, by name.
        masks: `attention_mask` of this model and of every one within it that has run so far.
    """

    def __init__(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        self.module, self.args, self.kwargs = module, args, kwargs
        self.found: dict[str, Any] = {}
        self.masks: list[tuple[torch.nn.Module, Any]] = []

    def input(self, name: str) -> Any:
        """An argument by name; the first positional one if the model calls its main input so. None if there is none."""
        if self.args and getattr(self.module, "main_input_name", "") == name:
            return self.args[0]
        return self.kwargs.get(name)

    @property
    def batch_size(self) -> int | None:
        """Rows of the first tensor among the arguments; None if there is none."""
        for value in (*self.args, *self.kwargs.values()):
            if isinstance(value, torch.Tensor) and value.ndim:
                return value.shape[0]
        return None


class Recall:
    """Wraps the checkpointing function that a Transformers layer holds, so that recomputation sees the forward's context.

    Re-entrant checkpointing cuts the graph where none of its inputs needs a gradient, as at the first block above a frozen embedding:
    everything inside would train in vain. Its input then gets a gradient to carry.
    """

    def __init__(self, inner: Callable[..., Any], host: Host) -> None:
        self.inner, self.host = inner, host

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if _WHOLE.get():  # a larger part is computed again already, and kept for its own way back
            return function(*args, **kwargs)
        if getattr(self.inner, "keywords", {}).get("use_reentrant") and not any(
            isinstance(a, torch.Tensor) and a.requires_grad for a in args
        ):
            args = tuple(
                a.detach().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
                for a in args
            )
        again = _Twice(self.host, function)
        inner = self.inner
        if (
            (again.held or self.host.publishing())
            and isinstance(inner, partial)
            and inner.keywords.get("use_reentrant")
        ):
            # What was read outside has a graph of its own, through which the re-entrant way would go twice; what is published
            # inside would have none.
            inner = partial(inner, use_reentrant=False)
        return inner(again, *args, **kwargs)


_WHOLE: ContextVar[bool] = ContextVar("petiole_whole", default=False)  # nothing inside is checkpointed


class Recollection:
    """What a part of a forward pass saw, for computing it again when that forward pass is over."""

    def __init__(self, host: Host) -> None:
        # A copy, so that even the empty context is known for one that was brought back.
        self.host, self.context, self.held = host, replace(_CURRENT.get()), host.holding()
        self.within = host.passing()

    @contextmanager
    def resumed(self, checkpoints: bool = False) -> Iterator[None]:
        """As if that forward pass were not over.

        Args:
            checkpoints: whether parts that were checkpointed in it are so again, as torch's own checkpointing must find them.
        """
        token = _WHOLE.set(not checkpoints)
        try:
            with entered(self.context), self.host.resumed(self.held, self.within):
                yield
        finally:
            _WHOLE.reset(token)


class _Twice:
    """A part of a forward pass: run once, and again, when that forward pass is over, as if it were not."""

    def __init__(self, host: Host, function: Callable[..., Any]) -> None:
        self.function, self.first, self.recollection = function, True, Recollection(host)

    @property
    def held(self) -> list[Any]:
        return self.recollection.held

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.first:
            self.first = False
            return self.function(*args, **kwargs)
        with self.recollection.resumed(checkpoints=True):
            return self.function(*args, **kwargs)


def recomputing() -> bool:
    """Whether this thread is in a backward pass, in which only checkpointing runs forward passes."""
    return torch._C._current_graph_task_id() != -1
