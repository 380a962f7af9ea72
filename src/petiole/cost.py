"""What a model costs: parameters and bytes counted, FLOPs and memory measured while it runs, time with its spread.

    count(model)              trainable, total, stored and head parameters; no forward pass, values never read
    measure(model, batch)     everything, from real training steps on a copy; the model is left bit for bit as it was
    predict(model, batch)     the same but time, without running a kernel or needing a weight: also for the meta device

Conventions. A multiply-add counts two FLOPs; matrix products, convolutions and attention are counted, element-wise work
is not. Shared and tied tensors count once. Bytes are those of whole storages, each once, as a view keeps all of its
storage alive. A parameter is a delta's if every one of its names has a component that starts with `petiole`.
"""

from __future__ import annotations

import copy
import gc
import math
import random
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode  # no public name leads to it; what runs under it computes shapes alone
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from petiole.anatomy import anatomy
from petiole.errors import AnatomyError, AttachError, ConfigError, PetioleError, TrainingError

Loss = Callable[[Any], Tensor]
MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]
Fake = FakeTensorMode | None

# -------------------------------------------------------------------------------------------------------------- results


@dataclass(frozen=True)
class Parameters:
    """How many parameters there are, shared and tied tensors once.

    Attributes:
        trainable: those with `requires_grad`, head included.
        total: all of them, deltas included.
        stored: what a task needs beside the backbone: all that trains, and what deltas hold frozen or in buffers.
        head: trainable ones of the task's head, copied or in place, so `trainable - head` is the figure without it.
        deltas: those of deltas, trainable or not, so `total - deltas` is the bare backbone.
        stored_bytes: bytes of the stored tensors in the types they have now.
    """

    trainable: int
    total: int
    stored: int
    head: int
    deltas: int
    stored_bytes: int

    @property
    def backbone(self) -> int:
        """Parameters of the bare backbone."""
        return self.total - self.deltas

    @property
    def share(self) -> float:
        """Trainable parameters as a share of the bare backbone's."""
        return self.trainable / self.backbone if self.backbone else float("nan")


@dataclass(frozen=True)
class Timing:
    """Wall time of one repetition: the median, and the quartiles as its spread."""

    median_seconds: float
    low_seconds: float
    high_seconds: float
    repeats: int


@dataclass(frozen=True)
class Cost:
    """What one model costs on one batch.

    Attributes:
        parameters: see `Parameters`.
        checkpoint_bytes: bytes of the tensors that a task's file has to hold; its header comes on top.
        weight_bytes: parameters and buffers in memory.
        gradient_bytes: one gradient for each trainable parameter.
        optimizer_bytes: the optimiser's state after a step.
        forward_flops: a forward pass in eval mode, without gradients: inference.
        step_flops: a training step: forward, backward with what it recomputes, and products in the optimiser if any.
        saved_bytes: kept from forward for backward, without weights and buffers.
        peak_bytes: the most that is alive at once in a step, see `peak_bytes()`.
        forward: time of a forward pass in eval mode; None if predicted.
        step: time of a whole training step, optimiser included; None if predicted.
    """

    parameters: Parameters
    checkpoint_bytes: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    forward_flops: int
    step_flops: int
    saved_bytes: int
    peak_bytes: int
    forward: Timing | None = None
    step: Timing | None = None

    def to_dict(self) -> dict[str, int | float | None]:
        """A flat JSON object; every key ends in its unit."""
        p = self.parameters
        result: dict[str, int | float | None] = {
            f"{name}_parameters": getattr(p, name) for name in ("trainable", "total", "stored", "head", "deltas")
        }
        names = ("checkpoint", "weight", "gradient", "optimizer", "saved", "peak")
        result |= {f"{name}_bytes": getattr(self, f"{name}_bytes") for name in names}
        result |= {"forward_flops": self.forward_flops, "step_flops": self.step_flops}
        for name, timing in (("forward", self.forward), ("step", self.step)):
            result[f"{name}_seconds"] = timing.median_seconds if timing else None
            result[f"{name}_low_seconds"] = timing.low_seconds if timing else None
            result[f"{name}_high_seconds"] = timing.high_seconds if timing else None
            result[f"{name}_repeats"] = timing.repeats if timing else None
        return result


# ------------------------------------------------------------------------------------------------------------- counting


def count(model: nn.Module, heads: Iterable[str] | None = None) -> Parameters:
    """Count parameters from shapes alone; works on the meta device.

    Args:
        heads: module paths of the task's head; what the anatomy finds if None.
    """
    heads = _heads(model) if heads is None else tuple(heads)
    total = trainable = stored = head = deltas = stored_bytes = 0
    for names, parameter in _named_once(model.named_parameters(remove_duplicate=False)):
        of_delta, size = all(map(_is_delta, names)), parameter.numel()
        total += size
        deltas += size if of_delta else 0
        trainable += size if parameter.requires_grad else 0
        if parameter.requires_grad and any(_under(name, heads) for name in names):
            head += size
        if parameter.requires_grad or of_delta:
            stored += size
            stored_bytes += _tensor_bytes(parameter)
    for _, buffer in _named_once(_delta_buffers(model)):
        stored += buffer.numel()
        stored_bytes += _tensor_bytes(buffer)
    return Parameters(trainable, total, stored, head, deltas, stored_bytes)


def _heads(model: nn.Module) -> tuple[str, ...]:
    try:
        return tuple(site.path for site in anatomy(model).heads())
    except AnatomyError:  # no stack of blocks: then nothing can be told from a head
        return ()


def _is_delta(name: str) -> bool:
    return any(part.startswith("petiole") for part in name.split("."))


def _under(name: str, paths: Iterable[str]) -> bool:
    return any(not path or name.startswith(f"{path}.") for path in paths)


def _delta_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module in model.named_modules(remove_duplicate=False):
        if _is_delta(path):
            for name, buffer in module.named_buffers(recurse=False):
                if name not in module._non_persistent_buffers_set:
                    yield f"{path}.{name}", buffer


def _named_once(named: Iterable[tuple[str, Tensor]]) -> list[tuple[list[str], Tensor]]:
    """Each tensor once, with all its names: the same object, or two objects on the same memory."""
    found: dict[object, tuple[list[str], Tensor]] = {}
    for name, tensor in named:
        plain = [(t.untyped_storage()._cdata, t.storage_offset(), t.numel()) for t in _plain(tensor)]
        found.setdefault(tuple(plain) or id(tensor), ([], tensor))[0].append(name)
    return list(found.values())


# ------------------------------------------------------------------------------------------------------------- storages


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors with storage that make up a tensor: itself, or the parts of a quantised or sparse one."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain(getattr(tensor, name))
    elif tensor.layout == torch.strided:
        yield tensor
    elif tensor.layout == torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())


def _tensor_bytes(tensor: Tensor) -> int:
    return sum(part.numel() * part.element_size() for part in _plain(tensor))


def _storages(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """Storages by identity. `_cdata` is the address of the storage's own record, which the meta device has as well."""
    found = (part.untyped_storage() for tensor in tensors for part in _plain(tensor))
    return {storage._cdata: storage for storage in found}


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(storage.nbytes() for storage in _storages(tensors).values())


class _Alive(TorchDispatchMode):
    """Follows which storages live while operations run. An operation's scratch space inside its kernel is not seen.

    `held` is what was there before (given, or first met as an operand), `alive` what came and has not gone since.
    """

    def __init__(self, holding: Iterable[Tensor]) -> None:
        super().__init__()
        self.held = self.alive = self.highest = 0
        self._watched: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._watch(holding, before=True)

    @property
    def peak(self) -> int:
        return self.held + self.highest

    def _watch(self, tensors: Iterable[Tensor], before: bool) -> None:
        for storage in _storages(tensors).values():
            self._note(storage, before)

    def _note(self, storage: torch.UntypedStorage, before: bool) -> None:
        key = storage._cdata
        if key in self._watched:
            return
        size = storage.nbytes()
        self._watched[key] = weakref.ref(storage, lambda _: self._gone(key, size))
        if before:
            self.held += size
        else:
            self.alive += size
            self.highest = max(self.highest, self.alive)

    def _gone(self, key: int, size: int) -> None:
        del self._watched[key]
        self.alive -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._watch(_tensors((args, kwargs)), before=True)
        output = func(*args, **kwargs)
        self._watch(_tensors(output), before=False)
        return output


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


# ---------------------------------------------------------------------------------------------------------------- FLOPs

_aten = torch.ops.aten


def _grouped_mm(a: Any, b: Any, *_: Any, **__: Any) -> int:
    """Matrix products by groups (mixtures of experts). A 2-D operand is shared out among the groups along an axis, so
    it counts once; where both are 3-D, the first axis is that of the groups."""
    groups = a[0] if len(a) == len(b) == 3 else 1
    return int(2 * groups * a[-2] * a[-1] * b[-1])


def _product(*operands: Any, **_: Any) -> int:
    """The product of the last two operands: (..., m, k) with (..., k, n), or with a vector (k,)."""
    left, right = operands[-2:]
    return int(2 * math.prod(left) * (right[-1] if len(right) > 1 else 1))


# What torch's counter has no formula for, and would count as nothing: shapes of the operands -> FLOPs.
_FORMULAS: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: int(sdpa_flop_count(q, k, v)),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda g, q, k, v, *_, **__: int(sdpa_backward_flop_count(g, q, k, v))
    ),
    _aten._grouped_mm: _grouped_mm,
}
_FORMULAS |= dict.fromkeys((_aten.mv, _aten.dot, _aten.addmv, _aten.addmv_), _product)
_FORMULAS |= dict.fromkeys((_aten.addmm_, _aten.addbmm, _aten.addbmm_, _aten.baddbmm_, _aten._int_mm), _product)


class _OneTotal(nullcontext[None]):
    """Stands in for the counter's module tracker, whose hooks fail on a view of a parameter under no_grad."""

    parents = frozenset({"Global"})


def _flops(run: Callable[[], Any]) -> int:
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    counter.mod_tracker = _OneTotal()  # type: ignore[assignment]
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one kernel for a whole encoder layer hides its products
    try:
        with counter:
            run()
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return int(counter.get_total_flops())


def forward_flops(model: nn.Module, batch: Any) -> int:
    """FLOPs of one forward pass in eval mode; the model is left as it was.

    Args:
        model: on any device; on the meta device nothing is computed.
        batch: a mapping (`model(**batch)`), a tuple (`model(*batch)`) or one tensor.
    """
    with _bench(model, batch) as bench:
        return bench.forward_flops()


def step_flops(model: nn.Module, batch: Any, *, loss: Loss | None = None) -> int:
    """FLOPs of a training step with AdamW, counted as in `forward_flops`; the model is left as it was."""
    with _bench(model, batch, loss=loss) as bench:
        return _flops(bench.step)


# ------------------------------------------------------------------------------------------------------ memory and time


def saved_bytes(model: nn.Module, batch: Any, *, autocast: torch.dtype | None = None) -> int:
    """Bytes that autograd keeps from a forward pass in train mode until backward; the model is left as it was.

    Each storage counts once; parameters and buffers do not count, since they are there anyway. The batch counts where
    it is kept. Not seen: what a custom autograd function puts on its `ctx` by hand, and what the model packs with hooks
    of its own (offloading, quantised activations); `peak_bytes` sees both.

    Args:
        autocast: type for mixed precision, off if None.
    """
    with _bench(model, batch, autocast=autocast) as bench:
        return bench.saved_bytes()


def peak_bytes(
    step: Callable[[], Any], holding: Iterable[Tensor] = (), device: torch.device | str | None = None
) -> int:
    """The most bytes alive at once while `step` runs, what was there before included.

    On CUDA: torch's own high-water mark, less what others hold on the device. Elsewhere it is exact and repeatable:
    every storage that an operation of `step` reads or makes is followed until it is freed. Not seen: scratch space
    inside a kernel, and tensors that `step` never touches, unless they are in `holding`.

    Args:
        step: called once.
        holding: tensors that are in memory during the step: weights, optimiser state, batch.
        device: that of the first held tensor if None.
    """
    holding = list(holding)
    device = torch.device(device) if device is not None else holding[0].device if holding else torch.device("cpu")
    if device.type == "cuda" and not _is_fake(holding):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before + _bytes(t for t in holding if t.device.type == "cuda")
    gc.collect()  # what only a cycle keeps alive must not end in the middle of the step
    with _Alive(holding) as alive, _collector_off():
        step()
    return alive.peak


def step_time(step: Callable[[], Any], repeats: int = 5, warmup: int = 2) -> Timing:
    """Wall time of `step`: the median of `repeats` calls after `warmup` calls, with the quartiles.

    Raises:
        ConfigError: `repeats` is less than 1 or `warmup` less than 0.
    """
    if repeats < 1 or warmup < 0:
        raise ConfigError(f"repeats = {repeats}, warmup = {warmup}: at least 1 and at least 0 are needed")
    seconds = []
    with _collector_off():
        for _ in range(warmup):
            step()
        for _ in range(repeats):
            _synchronise()
            start = time.perf_counter()
            step()
            _synchronise()
            seconds.append(time.perf_counter() - start)
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive") if repeats > 1 else seconds * 3
    return Timing(median, low, high, repeats)


def _synchronise() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


@contextmanager
def _collector_off() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


# ----------------------------------------------------------------------------------------------------------- everything


def measure(
    model: nn.Module,
    batch: Any,
    optimizer: Optimizer | MakeOptimizer | None = None,
    *,
    loss: Loss | None = None,
    autocast: torch.dtype | None = None,
    repeats: int = 5,
    warmup: int = 2,
    heads: Iterable[str] | None = None,
) -> Cost:
    """Run training steps on a copy and measure what they cost.

    The model is left bit for bit as it was, and so are the random generators. Frozen parameters are shared with the
    copy, which so takes little more memory than what trains.

    A model with nothing to train has a forward pass for a step.

    Args:
        model: with its weights; see `predict` for the meta device.
        batch: a mapping (`model(**batch)`), a tuple (`model(*batch)`) or one tensor.
        optimizer: one that holds the model's parameters, or a function from a list of them to one; AdamW if None.
        loss: from the model's output to a scalar; its `loss` if None.
        autocast: type for mixed precision, off if None.
        repeats: timed repetitions. warmup: untimed ones before.
        heads: see `count`.

    Raises:
        AttachError: the model is on the meta device, or can't be copied.
        TrainingError: there is no loss, or it depends on no trainable parameter.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise AttachError("the model is on the meta device, where nothing runs: use predict()")
    parameters = count(model, heads)
    with _bench(model, batch, optimizer, loss=loss, autocast=autocast) as bench:
        return bench.cost(parameters, repeats, warmup)


def predict(
    model: nn.Module,
    batch: Any,
    optimizer: Optimizer | MakeOptimizer | None = None,
    *,
    loss: Loss | None = None,
    autocast: torch.dtype | None = None,
    heads: Iterable[str] | None = None,
) -> Cost:
    """What `measure` would find, but time, without computing: shapes alone go through the model.

    Weights may be on the meta device, which then stands for the CPU; neither they nor activations need memory.
    Arguments as for `measure`.

    Raises:
        AttachError: the model can't run on shapes alone, because what it does depends on values, or an operation
            lacks a rule for shapes; only `measure` can tell.
        TrainingError: as for `measure`.
    """
    parameters = count(model, heads)
    with _bench(model, batch, optimizer, loss=loss, autocast=autocast, fake=True) as bench:
        return bench.cost(parameters, 0, 0)


class _Bench:
    """A copy of a model that can be stepped, in train mode. With `fake`, its tensors have shapes and no values."""

    def __init__(
        self, model: nn.Module, optimizer: Optimizer | None, loss: Loss | None, autocast: torch.dtype | None, fake: Fake
    ) -> None:
        if fake is None:  # what deepcopy is to leave alone
            memo: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad}
        else:
            state = _tensors(list(optimizer.state.values())) if optimizer else []
            memo = {id(t): _faked(t, fake) for t in chain(model.parameters(), model.buffers(), state)}
        try:
            self.model, self.optimizer = copy.deepcopy((model, optimizer), memo)
        except Exception as error:
            raise AttachError(f"{type(model).__name__} can't be copied to be measured: {error}") from error
        self.model.train()
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        first = next(chain(self.model.parameters(), self.model.buffers()), None)
        self.device = first.device if first is not None else torch.device("cpu")
        self.batch: Any = ()
        self._loss, self._autocast, self._fake = loss, autocast, fake

    def equip(self, batch: Any, make: MakeOptimizer | None) -> None:
        """Take the batch to the model's device, and make an optimiser where none was copied."""
        placed: dict[int, Tensor] = {}  # one tensor given under two names stays one

        def place(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if id(leaf) not in placed:
                placed[id(leaf)] = _faked(leaf, self._fake, self.device) if self._fake else leaf.to(self.device)
            return placed[id(leaf)]

        self.batch = tree_map(place, dict(batch) if isinstance(batch, Mapping) else batch)
        if self.optimizer is None and self.parameters:
            self.optimizer = (make or torch.optim.AdamW)(self.parameters)

    # ---- what runs

    def forward(self) -> Any:
        torch.default_generator.manual_seed(0)
        if self.device.type == "cuda" and self._fake is None:
            torch.cuda.manual_seed(0)
        mixed: AbstractContextManager[Any] = nullcontext()
        if self._autocast is not None:
            mixed = torch.autocast(self.device.type, self._autocast)
        with mixed:
            if isinstance(self.batch, dict):
                return self.model(**self.batch)
            return self.model(*self.batch) if isinstance(self.batch, tuple) else self.model(self.batch)

    def step(self) -> None:
        output = self.forward()
        if self.optimizer is None or not self.parameters:
            return
        loss = self._loss(output) if self._loss else _loss_of(output)
        if not loss.requires_grad:
            raise TrainingError("the loss depends on no trainable parameter: what trains is not on the way to it")
        del output
        loss.backward()
        del loss
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    # ---- what is found

    def forward_flops(self) -> int:
        self.model.eval()
        with torch.no_grad():
            flops = _flops(self.forward)
        self.model.train()
        return flops

    def saved_bytes(self) -> int:
        own = _storages(chain(self.model.parameters(), self.model.buffers()))
        kept: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept.update(_storages([tensor]))
            return tensor.detach()  # the tensor itself may refer to the node that keeps it: a cycle never freed

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.forward()
        return sum(storage.nbytes() for key, storage in kept.items() if key not in own)

    def held(self) -> Iterator[Tensor]:
        yield from chain(self.model.parameters(), self.model.buffers())
        yield from self.state()
        yield from _tensors(self.batch)

    def state(self) -> list[Tensor]:
        return _tensors(list(self.optimizer.state.values())) if self.optimizer else []

    def timings(self, repeats: int, warmup: int) -> tuple[Timing, Timing]:
        step = step_time(self.step, repeats, warmup)
        self.model.eval()
        with torch.no_grad():
            forward = step_time(self.forward, repeats, warmup)
        self.model.train()
        return forward, step

    def cost(self, parameters: Parameters, repeats: int, warmup: int) -> Cost:
        forward = self.forward_flops()
        step = _flops(self.step)  # also makes the optimiser's state, so that the peak is that of any later step
        saved = self.saved_bytes()
        peak = peak_bytes(self.step, self.held(), self.device)
        forward_time, time_of_step = self.timings(repeats, warmup) if self._fake is None else (None, None)
        return Cost(
            parameters=parameters,
            checkpoint_bytes=parameters.stored_bytes,
            weight_bytes=_bytes(chain(self.model.parameters(), self.model.buffers())),
            gradient_bytes=sum(map(_tensor_bytes, self.parameters)),
            optimizer_bytes=_bytes(self.state()),
            forward_flops=forward,
            step_flops=step,
            saved_bytes=saved,
            peak_bytes=peak,
            forward=forward_time,
            step=time_of_step,
        )


@contextmanager
def _bench(
    model: nn.Module,
    batch: Any,
    optimizer: Optimizer | MakeOptimizer | None = None,
    *,
    loss: Loss | None = None,
    autocast: torch.dtype | None = None,
    fake: bool | None = None,
) -> Iterator[_Bench]:
    """A bench in train mode. Afterwards the random generators stand where they stood, and the model is as it was."""
    if fake is None:
        fake = any(parameter.is_meta for parameter in model.parameters())
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else None
    given = optimizer if isinstance(optimizer, Optimizer) else None
    make = None if isinstance(optimizer, Optimizer) else optimizer
    before = _versions(model)
    try:
        with _generators_kept(), torch.enable_grad():
            bench = _Bench(model, given, loss, autocast, mode)
            with mode or nullcontext():  # outermost, so that counters see the calls of the device's own kernels
                bench.equip(batch, make)
                yield bench
    except PetioleError:
        raise
    except RuntimeError as error:
        if mode is None:
            raise
        reason = str(error).partition("\n")[0]
        raise AttachError(f"{type(model).__name__} can't run on shapes alone: use measure()\n{reason}") from error
    if _versions(model) != before:
        raise AttachError(
            f"{type(model).__name__} was changed while its copy ran: one of its hooks holds on to the original.\n"
            "Let hooks find their modules from what they are called with, so that a deep copy stands alone."
        )


def _versions(model: nn.Module) -> list[tuple[int, int, int]]:
    """Numbers that change when a parameter, a buffer or a gradient is written to or replaced."""
    numbers = []
    for tensor in chain(model.parameters(), model.buffers()):
        gradient = tensor.grad if tensor.is_leaf else None
        numbers.append((_version(tensor), id(gradient), _version(gradient)))
    return numbers


def _version(tensor: Tensor | None) -> int:
    return -1 if tensor is None or tensor.is_inference() else tensor._version


@contextmanager
def _generators_kept() -> Iterator[None]:
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() and torch.cuda.is_initialized() else ()
    own, numpys = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(own)
        np.random.set_state(numpys)


def _is_fake(tensors: list[Tensor]) -> bool:
    return any(isinstance(getattr(tensor, "fake_mode", None), FakeTensorMode) for tensor in tensors)


def _faked(tensor: Tensor, fake: FakeTensorMode, device: torch.device | None = None) -> Tensor:
    """A tensor of the same kind without values; one from the meta device is taken to be on the CPU."""
    if tensor.dim() == 0 and tensor.device.type == "cpu" and not isinstance(tensor, nn.Parameter):
        value = tensor.item()
        with fake:  # a number keeps its value: an optimiser looks at its count of steps
            return torch.tensor(value, dtype=tensor.dtype, device=device)
    if not tensor.is_meta:
        kept: Tensor = fake.from_tensor(tensor)
        return kept if device is None or kept.device == device else kept.to(device)
    with fake:
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device or "cpu")
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def _loss_of(output: Any) -> Tensor:
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(found, Tensor):
        raise TrainingError(
            f"the model returned {type(output).__name__} without a loss: put labels into the batch, or give `loss`"
        )
    return found
