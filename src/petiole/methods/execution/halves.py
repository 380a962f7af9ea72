"""A block cut in two without rewriting it: its attention with residual and norm, and its feed-forward with residual and norm.

The block's own forward runs with the other half standing aside: a sub-layer that stands aside gives 0, so that the residual alone goes on,
and norms of that half hand on what they are given. Which half a norm between the two sub-layers belongs to shows in the order in which the
first half calls them:

    no norm after the feed-forward        pre-norm: it is the feed-forward's
    none before attention                 post-norm: it is attention's
    both                                  one of each: the first is attention's

Before the first use the two halves are tried, one after the other: where they do not give what the block gives, it is refused.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import (
    _disable_current_modes,
)  # so that whoever counts operations sees none of a trial

from petiole.anatomy import Block, Site
from petiole.errors import AttachError
from petiole.junction import Lock, entry, of_input, of_output
from petiole.methods.execution.skipped import bare, without_cache

Act = Callable[..., Any]


class Halves:
    """The two halves of one block.

    Args:
        block: its anatomy.

    Raises:
        AttachError: it has not one attention and one feed-forward network.
    """

    def __init__(self, block: Block) -> None:
        self.name, self.width = f"{block.stack}.{block.depth}", block.hidden_size
        kinds = ("attention", "ffn", "cross_attention", "mixer")
        found = {kind: [site for site in block.sites if site.role == kind] for kind in kinds}
        if [len(found[kind]) for kind in kinds] != [1, 1, 0, 0]:
            has = ", ".join(f"{len(sites)} {kind}" for kind, sites in found.items() if sites) or "neither"
            raise AttachError(
                f"{self.name}: halves of a block need one attention and one ffn, it has {has}; variants 1 and 2 take it whole"
            )
        self.attention, self.ffn = (self.ends(found[kind][0], block.path) for kind in kinds[:2])
        inside = (f"{self.attention[0]}.", f"{self.ffn[0]}.")
        norms = [site.path.removeprefix(f"{block.path}.") for site in block.sites if site.kind == "norm"]
        self.norms = [path for path in norms if not path.startswith(inside)]
        self.lock = Lock()
        self.order: tuple[int, int, int] | None = None  # norms before attention, between, after the feed-forward
        self.proved = False  # whether both together gave what the block gives
        self.parts = 0  # of the tuple that attention returns; 0 where it returns a tensor

    @staticmethod
    def ends(site: Site, root: str) -> tuple[str, ...]:
        """The module that a sub-layer enters by, and the one that it leaves by if that is not inside, relative to the block."""
        first, last = entry(site), site.exit
        paths = (first,) if last == first or last.startswith(f"{first}.") else (first, last)
        return tuple(path.removeprefix(f"{root}.") for path in paths)

    # ---- the halves

    def first(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The block's arguments -> its output after the attention half. Hooks of the block itself wait for the other half."""
        counts, place, x = [0, 0, 0], [0], of_input(args, kwargs)[0]
        if not self.proved and not isinstance(x, FakeTensor):
            self.prove(bare(block), *without_cache(args, kwargs))

        def attend(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            output = module(*args, **kwargs)
            self.parts = len(output) if isinstance(output, tuple) else 0
            place[0] = 1
            return output

        def norm(module: nn.Module, h: Tensor) -> Tensor:
            counts[place[0]] += 1
            if place[0] == 1 and h is x:
                raise self.refusal("its feed-forward network reads the block's input")
            return h if place[0] == 2 else module(h)

        def enter(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
            if place[0] == 0:
                raise self.refusal("its feed-forward network does not come after attention")
            place[0] = 2
            h = of_input(args, kwargs)[0]
            return h[..., :1] if len(self.ffn) > 1 else self.nothing(h)

        acts: dict[str, Act] = dict.fromkeys(self.norms, norm)
        acts |= {self.attention[0]: attend, self.ffn[0]: enter} | dict.fromkeys(self.ffn[1:], self.leave)
        with self.standing(block, acts):
            output = block.forward(*args, **kwargs)
        before, between, after = counts
        if place[0] != 2 or between != (2 if before and after else 1):
            raise self.refusal(f"it has {before} norms before attention, {between} behind it and {after} at its end")
        self.order = before, between, after
        return output

    def second(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The block's arguments, with the attention half's output for hidden state -> its output."""
        if self.order is None:
            raise AttachError(f"{self.name}: the second half ran before the first")
        before, _, after = self.order
        place, passed = [0], [0]

        def attend(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            place[0] = 1
            h = of_input(args, kwargs)[0]
            new = h[..., :1] if len(self.attention) > 1 else self.nothing(h)
            return (new, *[None] * (self.parts - 1)) if self.parts else new

        def norm(module: nn.Module, h: Tensor) -> Tensor:
            passed[0] += place[0] == 1
            own = place[0] == 2 or (place[0] == 1 and (not after or (before > 0 and passed[0] == 2)))
            return module(h) if own else h

        def enter(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
            place[0] = 2
            output = module(*args, **kwargs)
            if not isinstance(output, Tensor):
                raise self.refusal("its feed-forward network returns more than a hidden state")
            return output

        acts: dict[str, Act] = dict.fromkeys(self.norms, norm)
        acts |= {self.attention[0]: attend, self.ffn[0]: enter} | dict.fromkeys(self.attention[1:], self.leave)
        with self.standing(block, acts):
            return block(*args, **kwargs)

    @torch.no_grad()
    def prove(self, trial: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raises AttachError: one half after the other gives something else than the block."""
        self.proved, fused = True, torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # one kernel for a whole block calls none of its parts
        try:
            with _disable_current_modes():
                whole = of_output(trial(*args, **kwargs))[0]
                half = of_output(self.first(trial, args, kwargs))[0]
                args, kwargs = of_input(args, kwargs)[1](half)
                both = of_output(self.second(trial, args, kwargs))[0]
            size = 1e-2 if whole.dtype.itemsize < 4 else 1e-4
            if not torch.allclose(both, whole, rtol=size, atol=size * float(whole.abs().max())):
                raise self.refusal("its sub-layers do more than to be added to the residual")
        except BaseException:
            self.proved = False
            raise
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)

    def nothing(self, h: Tensor) -> Tensor:
        """What a sub-layer that stands aside adds: zeros (..., d)."""
        return h.new_zeros(*h.shape[:-1], self.width)

    def leave(self, module: nn.Module, h: Tensor, *_: Any) -> Tensor:
        return self.nothing(h)

    def refusal(self, why: str) -> AttachError:
        return AttachError(
            f"{self.name}: the block can't be told into two halves: {why}\nvariants 1 and 2 take a block as a whole"
        )

    @contextmanager
    def standing(self, block: nn.Module, acts: dict[str, Act]) -> Iterator[None]:
        """Modules of the block are called through these functions inside, by this thread. One thread at a time."""
        with self.lock:
            done: list[tuple[nn.Module, str]] = []
            try:
                for path, act in acts.items():
                    owner_path, _, name = path.rpartition(".")
                    owner = block.get_submodule(owner_path)
                    if isinstance(owner, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
                        raise self.refusal(f"nothing can stand in a {type(owner).__name__} for {path}")
                    owner.__dict__[name] = StandIn(
                        owner.get_submodule(name), act
                    )  # hides the child; the state dict never changes
                    done.append((owner, name))
                yield
            finally:
                for owner, name in done:
                    del owner.__dict__[name]


class StandIn:
    """Called in a module's place, by the thread that made it; for others, and for its attributes, it is the module."""

    def __init__(self, module: nn.Module, act: Act) -> None:
        self._module, self._act, self._thread = module, act, threading.get_ident()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return self._module(*args, **kwargs)
        return self._act(self._module, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


__all__: Sequence[str] = ["Halves"]
