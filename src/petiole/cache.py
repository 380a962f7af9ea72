"""Keep what the frozen part computes, so that later epochs skip it.

Below the first site that trains, a sample gives the same hidden state in every epoch. `Cache` keeps it by sample: in memory up to a byte
budget, then in a memory-mapped file. A later forward pass over known samples runs none of the blocks below: their forward is stood in
for by one that hands the kept state on, so hooks, heads and side networks see what they would have seen. A linear probe and a side
network skip all blocks.

    cache = pt.Cache(model, budget="2GB")
    with cache.rows(batch_ids):            # pt.Trainer(cache="2GB") does this by itself
        loss = model(**batch).loss

It refuses to be wrong: dropout left on below, something trained below, or an input that changed between epochs is an error.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from petiole.anatomy import Stack
from petiole.attach import Host, need_host
from petiole.errors import AttachError, ConfigError, TrainingError
from petiole.junction import StackSlot, of_input, of_output

_UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def bytes_of(size: int | str, name: str = "budget") -> int:
    """`"2GB"`, `"500MiB"` or a number -> bytes.

    Raises:
        ConfigError: it can't be read; says so of the field `name`.
    """
    if isinstance(size, int):
        return size
    found = re.fullmatch(r"\s*([0-9.]+)\s*([kKMG]?i?B?)\s*", size)
    if found is None or found[2] not in _UNITS:
        raise ConfigError(
            f"{name} = {size!r}: a number of bytes, or one with a unit of {', '.join(u for u in _UNITS if u)}"
        )
    return int(float(found[1]) * _UNITS[found[2]])


# ------------------------------------------------------------------------------------------------------------------------ store


class Store:
    """Tensors by key: in memory up to a budget, the rest in one memory-mapped file that goes with the store.

    Args:
        budget: bytes in memory. folder: of the file, a temporary one if None. half: keep floating-point tensors as float16.
    """

    def __init__(self, budget: int, folder: Path | None = None, half: bool = False) -> None:
        self.budget, self.half, self.folder = budget, half, folder
        self.used = self.spilled = 0
        self._memory: dict[Any, Tensor] = {}
        self._places: dict[Any, tuple[int, torch.Size, torch.dtype]] = {}
        self._file: Any = None
        self._map: np.memmap[Any, np.dtype[np.uint8]] | None = None

    def __contains__(self, key: Any) -> bool:
        return key in self._memory or key in self._places

    def __len__(self) -> int:
        return len(self._memory) + len(self._places)

    def put(self, key: Any, tensor: Tensor) -> None:
        """Keep a copy of a tensor."""
        kept = (
            tensor.detach()
            .to("cpu", torch.float16 if self.half and tensor.is_floating_point() else tensor.dtype)
            .contiguous()
        )
        kept = (
            kept.clone()
            if kept.data_ptr() == tensor.data_ptr() or kept.untyped_storage().nbytes() > kept.nbytes
            else kept
        )
        if self.used + kept.nbytes <= self.budget:
            self._memory[key] = kept
            self.used += kept.nbytes
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115 - closed with the store
        self._places[key] = (self.spilled, kept.shape, kept.dtype)
        try:
            self._file.seek(self.spilled)
            self._file.write(kept.reshape(-1).view(torch.uint8).numpy().tobytes())
        except OSError as error:
            del self._places[key]
            raise TrainingError(
                f"the cache's file can't grow beyond {self.spilled:,} bytes: {error.strerror}; give it a folder with more room"
            ) from None
        self.spilled += kept.nbytes
        self._map = None

    def get(self, key: Any) -> Tensor:
        """The tensor, on CPU, in the dtype in which it is kept. Not to be changed in place."""
        if key in self._memory:
            return self._memory[key]
        start, shape, dtype = self._places[key]
        if self._map is None:
            self._file.flush()
            self._map = np.memmap(self._file, dtype=np.uint8, mode="r")
        size = int(np.prod(shape)) * torch.empty((), dtype=dtype).element_size()
        return torch.from_numpy(np.array(self._map[start : start + size])).view(dtype).reshape(shape)

    def close(self) -> None:
        """Forget everything."""
        self._map = None
        if self._file is not None:
            self._file.close()
            self._file = None
        self._memory.clear()
        self._places.clear()
        self.used = self.spilled = 0


# ------------------------------------------------------------------------------------------------------------------------ where


@dataclass
class Cut:
    """What of one stack is skipped.

    Attributes:
        skipped: how many blocks, from the input.
        depths: blocks whose output is kept: those that a side network reads, and the last one skipped.
        tails: what the blocks return beside their hidden state, tensors without their values.
    """

    stack: Stack
    skipped: int
    depths: tuple[int, ...]
    tails: dict[int, tuple[Any, ...]] = field(default_factory=dict)


def cuts(host: Host) -> list[Cut]:
    """Where each stack can be cut: below the first site that trains.

    Raises:
        AttachError: nothing can be skipped, and why.
    """
    lowest: dict[str, tuple[int, str]] = {}  # stack -> depth of the first trained site, and its name
    sides: dict[str, set[int]] = {}  # stack -> depths whose outputs are read beside it
    outside = ""
    active = [a for a in host.adaptations.values() if a.name in host.active]
    for adaptation in active:
        for slot in adaptation.slots:
            site = slot.site
            if isinstance(slot, StackSlot):
                sides.setdefault(site.stack, set()).update(number - 1 for number in slot.reads)
                if site.side == "input" and site.depth < lowest.get(site.stack, (10**9, ""))[0]:
                    lowest[site.stack] = (site.depth, site.key)
            elif not site.stack and (site.role not in ("head", "lm_head", "pooler", "norm") or enters(host, site.path)):
                outside = site.key
            elif site.stack:
                for each in (site, slot.place.read):
                    if each is not None and each.stack and each.depth < lowest.get(each.stack, (10**9, ""))[0]:
                        lowest[each.stack] = (each.depth, each.key)
        for name in adaptation.own:
            place = next(
                ((s.name, b.depth) for s in host.anatomy.stacks for b in s.blocks if name.startswith(f"{b.path}.")),
                None,
            )
            if place is not None:
                if place[1] < lowest.get(place[0], (10**9, ""))[0]:
                    lowest[place[0]] = (place[1], name)
            elif not after_stacks(host, name):
                outside = name
    if outside:
        raise AttachError(f"nothing can be cached: {outside} trains before the first block")
    found: list[Cut] = []
    for stack in host.anatomy.stacks:
        depth = lowest.get(stack.name, (len(stack.blocks), ""))[0]
        if depth:
            read = {number for number in sides.get(stack.name, ()) if 0 <= number < depth}
            found.append(Cut(stack, depth, tuple(sorted(read | {depth - 1}))))
        if stack.name in lowest:
            break  # what comes after reads what trains
    if not found:
        name = next(iter(lowest.values()))[1]
        raise AttachError(
            f"nothing can be cached: {name} trains in the first block; `layers=` can keep the lower blocks frozen"
        )
    return found


def enters(host: Host, path: str) -> bool:
    """Whether a task's own module stands before the stacks."""
    return path in getattr(host.model, "trained_entries", ())


def after_stacks(host: Host, name: str) -> bool:
    """Whether a parameter outside the stacks acts after them: heads, poolers and final norms do."""
    later = [
        s.path for s in host.anatomy.outside if s.role in ("head", "lm_head", "pooler") and not enters(host, s.path)
    ]
    last_norms = [site.path for site in host.anatomy.outside if site.role == "norm" and "emb" not in site.path]
    return any(name.startswith(f"{path}.") for path in (*later, *last_norms))


def random_below(host: Host, cut: Cut) -> str:
    """The name of something random that acts below a cut in training mode, "" if there is nothing."""
    container = cut.stack.containers[0]
    kept = {block.path for block in cut.stack.blocks[cut.skipped :]}
    for path, module in host.model.named_modules():
        inside = path.startswith(f"{container}.")
        if (
            (inside and any(path == k or path.startswith(f"{k}.") for k in kept))
            or "petiole" in path
            or not module.training
        ):
            continue
        if not inside and not any(part in path.lower() for part in ("emb", "patch")):
            continue
        for name, value in vars(module).items():
            if (
                isinstance(value, float)
                and value > 0
                and ((name == "p" and "rop" in type(module).__name__) or "drop" in name)
            ):
                return f"{path}.{name} = {value}"
    return ""


# ------------------------------------------------------------------------------------------------------------------------ cache


class Cache:
    """Hidden states of the frozen part, by sample. Made after `attach`; the model must stay as it is.

    Args:
        model: with an adaptation attached that leaves the lowest blocks frozen.
        budget: bytes in memory (`"2GB"`); what is more goes to a file.
        folder: for that file; a temporary one if None.
        half: keep float16, at half the bytes and with rounding.

    Raises:
        AttachError: nothing can be skipped: something trains before or in the first block.
    """

    def __init__(
        self, model: nn.Module, budget: int | str = "2GB", *, folder: str | Path | None = None, half: bool = False
    ) -> None:
        self.model, self.host = model, need_host(model)
        self.cuts = cuts(self.host)
        self.store = Store(bytes_of(budget), None if folder is None else Path(folder), half)
        self.hits = self.misses = 0
        self._seen: dict[Any, float] = {}
        self._spans: dict[Any, tuple[int, int]] = {}

    def summary(self) -> str:
        """What is skipped and what that holds, in a line."""
        what = ", ".join(f"{c.skipped} of {len(c.stack.blocks)} blocks of {c.stack.name}" for c in self.cuts)
        held = f"{self.store.used / 1e6:.1f} MB in memory and {self.store.spilled / 1e6:.1f} MB in a file"
        return f"skips {what}; holds {held}, {len(self._seen)} samples"

    @contextmanager
    def rows(self, ids: Sequence[Any] | Tensor) -> Iterator[None]:
        """The forward pass inside is over these samples, one id a row: computed and kept, or taken from what is kept.

        Raises:
            TrainingError: dropout acts below, or a sample's input is not what it was.
        """
        keys = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        if self.model.training:
            for cut in self.cuts:
                found = random_below(self.host, cut)
                if found:
                    raise TrainingError(
                        f"the cache would be wrong: {found} acts below what trains\nset it to 0, or put the frozen part in eval mode"
                    )
        known = all((key, self.cuts[0].stack.name, self.cuts[0].depths[-1]) in self.store for key in keys)
        undo: list[Callable[[], None]] = [self._watch(keys)]
        try:
            for cut in self.cuts:
                undo += self._replay(cut, keys) if known else self._record(cut, keys)
            yield
        finally:
            for step in undo:
                step()
        if known:
            self.hits += len(keys)
        else:
            self.misses += len(keys)

    def _watch(self, keys: list[Any]) -> Callable[[], None]:
        """Compare each sample's input with what it was, and find where its tokens begin and end."""

        def look(module: nn.Module, args: Any, kwargs: Any) -> None:
            tensors = {name: value for name, value in kwargs.items() if isinstance(value, Tensor) and name != "labels"}
            if args and isinstance(args[0], Tensor):
                tensors["0"] = args[0]
            inputs = {name: value for name, value in tensors.items() if value.ndim and value.shape[0] == len(keys)}
            if not inputs:
                raise TrainingError(f"the cache got {len(keys)} ids, but no input of the model has as many rows")
            mask = inputs.get("attention_mask")
            for row, key in enumerate(keys):
                start, stop = span(mask[row]) if mask is not None and mask.ndim == 2 else (0, -1)
                if self._spans.setdefault(key, (start, stop)) != (start, stop):
                    raise TrainingError(
                        f"sample {key!r} begins at token {start}, {self._spans[key][0]} when it was cached\n"
                        "the cache needs padding on the right, where it moves no position"
                    )
                mark = 0.0
                for name, value in inputs.items():
                    own = value[row, start:stop] if mask is not None and value.shape[:2] == mask.shape else value[row]
                    if name != "attention_mask":
                        weight = torch.arange(1, own.numel() + 1, device=own.device, dtype=torch.float64)
                        mark += float((own.reshape(-1).to(torch.float64) * weight).sum())
                if key in self._seen and self._seen[key] != mark:
                    raise TrainingError(
                        f"the input of sample {key!r} is not what it was when it was cached\n"
                        "random augmentation, or ids that don't follow their samples; train without the cache"
                    )
                self._seen[key] = mark

        handle = self.model.register_forward_pre_hook(look, with_kwargs=True, prepend=True)
        return handle.remove

    def _record(self, cut: Cut, keys: list[Any]) -> list[Callable[[], None]]:
        whole = cut.skipped == len(cut.stack.blocks)

        def look(depth: int, output: Any) -> None:
            if isinstance(output, (tuple, list)):
                if not whole and any(isinstance(part, Tensor) for part in output[1:]):
                    self.cuts = [other for other in self.cuts if other is not cut]  # a whole encoder is left, perhaps
                    if not self.cuts:
                        raise TrainingError(
                            f"the cache can't cut {cut.stack.name} here: its blocks hand on more than one tensor"
                        )
                # An empty tensor stands for one, so that who follows what blocks hand on still can.
                rest = (part.new_empty(0) if isinstance(part, Tensor) else part for part in output[1:])
                cut.tails[depth] = tuple(rest)
            if depth in cut.depths and cut in self.cuts:
                self._keep(cut, depth, keys, of_output(output)[0])

        handles = []
        for depth, block in enumerate(cut.stack.blocks[: cut.skipped]):

            def hook(module: nn.Module, args: Any, output: Any, depth: int = depth) -> None:
                look(depth, output)

            handles.append(self.host.module(block.path).register_forward_hook(hook, prepend=True))
        return [handle.remove for handle in handles]

    def _keep(self, cut: Cut, depth: int, keys: list[Any], h: Tensor) -> None:
        if h.shape[0] != len(keys):
            raise TrainingError(
                f"the cache got {len(keys)} ids, and blocks of {cut.stack.name} see {h.shape[0]} rows\n"
                "it keeps one state for each id; where a row holds several texts, train without it"
            )
        for row, key in enumerate(keys):
            start, stop = self._spans[key]
            place = (key, cut.stack.name, depth)
            if place not in self.store:
                self.store.put(place, h[row, start:stop] if stop >= 0 and h.ndim == 3 else h[row])

    def _replay(self, cut: Cut, keys: list[Any]) -> list[Callable[[], None]]:
        undo: list[Callable[[], None]] = []
        for depth, block in enumerate(cut.stack.blocks[: cut.skipped]):
            module = self.host.module(block.path)

            def forward(*args: Any, depth: int = depth, **kwargs: Any) -> Any:
                h = of_input(args, kwargs)[0]
                h = self._kept(cut, depth, keys, h) if depth in cut.depths else h
                return (h, *cut.tails[depth]) if depth in cut.tails else h

            module.__dict__["forward"] = forward
            undo.append(lambda module=module: module.__dict__.pop("forward", None))  # type: ignore[misc]
        return undo

    def _kept(self, cut: Cut, depth: int, keys: list[Any], like: Tensor) -> Tensor:
        parts = [self.store.get((key, cut.stack.name, depth)) for key in keys]
        if all(part.shape == parts[0].shape for part in parts) and self._spans[keys[0]][1] < 0:
            return torch.stack(parts).to(like.device, like.dtype)
        whole = like.new_zeros(len(keys), like.shape[1], parts[0].shape[-1])
        for row, (key, part) in enumerate(zip(keys, parts, strict=True)):
            start, _ = self._spans[key]
            whole[row, start : start + part.shape[0]] = part.to(like.device, like.dtype)
        return whole

    def close(self) -> None:
        """Forget everything that was kept."""
        self.store.close()
        self._seen.clear()
        self._spans.clear()


def span(mask: Tensor) -> tuple[int, int]:
    """A row's mask (T,) -> the first position that is seen, and one past the last."""
    seen = mask.nonzero().flatten()
    return (int(seen[0]), int(seen[-1]) + 1) if seen.numel() else (0, 0)
