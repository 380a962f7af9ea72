"""One training step on shapes alone: FLOPs, bytes saved for backward, and the most bytes alive in each phase of the step.

`petiole.cost.predict` gives the same totals. Here they come from one step instead of several, and the peak is kept apart by phase (the
forward or backward pass of each block, what lies between them, the optimiser), because each phase grows with depth by a rule of its own.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from petiole import cost
from petiole.errors import TrainingError
from petiole.junction import of_output

# A phase of the step: "forward", "backward", "recompute" or "step"; where: (number of the list of blocks, part, index in that part), or ().
Phase = tuple[str, tuple[Any, ...]]
Loss = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Figures:
    """What one step takes.

    Attributes:
        forward_flops: of inference. step_flops: of the training step.
        saved_bytes: kept from forward for backward. weight_bytes: parameters and buffers. optimizer_bytes: its state after the step.
        trainable: numbers that train.
        phases: the most bytes alive in each phase, all that is held included.
    """

    forward_flops: int
    step_flops: int
    saved_bytes: int
    weight_bytes: int
    optimizer_bytes: int
    trainable: int
    phases: Mapping[Phase, int]

    @property
    def peak_bytes(self) -> int:
        """The most bytes alive at any moment of the step."""
        return max(self.phases.values())


SUMS = (
    "forward_flops",
    "step_flops",
    "saved_bytes",
    "weight_bytes",
    "optimizer_bytes",
    "trainable",
)  # that are sums over blocks


class Course(cost._Alive):
    """Follows the operations of a step: their FLOPs, and the bytes alive, phase by phase.

    It counts as `cost` does, but all in one place: an operation on shapes costs less than what looks at it.

    Args:
        holding: tensors that are there before.
    """

    def __init__(self, holding: Iterable[Tensor] = ()) -> None:
        super().__init__(())
        self.flops = 0
        self.most: dict[Phase, int] = {}
        self.backward = False
        self._held: int | None = None  # when the optimiser began, which may read what only it holds
        self._phase: Phase = ("forward", ())
        for tensor in holding:
            self._watch(tensor, before=True)

    def enter(self, kind: str, where: tuple[Any, ...] = ()) -> None:
        """From here on it is another phase; what was entered before goes on where it stood."""
        self._close()
        if kind == "step":
            self._held = self.held
        self._phase, self.highest = (kind, where), self.alive

    def _close(self) -> None:
        self.most[self._phase] = max(self.most.get(self._phase, 0), self.highest)

    def phases(self, later: int) -> dict[Phase, int]:
        """Bytes by phase.

        Args:
            later: bytes of optimiser state: made in this first step, there from the start in every other.
        """
        self._close()
        held = self.held if self._held is None else self._held
        return {phase: most + (self.held if phase[0] == "step" else held + later) for phase, most in self.most.items()}

    def _watch(self, value: Any, before: bool) -> None:
        if isinstance(value, (list, tuple)):
            for item in value:
                self._watch(item, before)
        if not isinstance(value, Tensor):
            return
        for part in cost._plain(value):
            self._note(part.untyped_storage(), before)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for value in (*args, *kwargs.values()):
            self._watch(value, before=True)
        output = func(*args, **kwargs)
        self._watch(output, before=False)
        formula = formulas().get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=output)
        return output


class Kept:
    """Bytes of the storages that autograd keeps, each once.

    Args:
        own: those of weights and buffers, which are there anyway.
    """

    def __init__(self, own: Collection[int]) -> None:
        self.bytes = 0
        self._own = own
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def add(self, tensor: Tensor) -> None:
        for key, storage in cost._storages([tensor]).items():
            if key not in self._own and key not in self._seen:
                # What is freed before the backward pass counts; another storage may then come to its place.
                self._seen[key] = weakref.ref(storage, lambda _, key=key: self._seen.pop(key))  # type: ignore[misc]
                self.bytes += storage.nbytes()


@cache
def formulas() -> dict[Any, Callable[..., int]]:
    """Operation -> its FLOPs, from its arguments: torch's own formulas and those of `cost`."""
    return FlopCounterMode(display=False, custom_mapping=cost._FORMULAS).flop_registry


def step(
    model: nn.Module,
    batch: Any,
    make: cost.MakeOptimizer,
    blocks: Mapping[str, tuple[Any, ...]],
    *,
    loss: Loss | None = None,
    autocast: torch.dtype | None = None,
) -> Figures:
    """Run inference and one training step on a copy of shapes; the model is left as it was.

    Args:
        model: on the meta device.
        batch, loss, autocast: as for `cost.predict`. make: of the optimiser.
        blocks: module path of each block -> where it is, as `Phase` says it.

    Raises:
        AttachError, TrainingError: as `cost.predict` does.
    """
    with quiet(), unfused(), cost._bench(model, batch, make, loss=loss, autocast=autocast, fake=True) as bench:
        bench.model.eval()
        with torch.no_grad(), Course() as inference:
            bench.forward()
        bench.model.train()
        own = set(cost._storages([*bench.model.parameters(), *bench.model.buffers()]))
        kept = Kept(own)

        def pack(tensor: Tensor) -> Tensor:
            kept.add(tensor)
            return tensor.detach()  # the tensor itself may refer to the node that keeps it: a cycle never freed

        def run() -> None:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                output = bench.forward()
            if not bench.parameters:
                return
            value = loss(output) if loss is not None else cost._loss_of(output)
            if not value.requires_grad:
                raise TrainingError("the loss depends on nothing that this method trains")
            del output
            course.backward = True
            course.enter("backward")
            value.backward()
            del value
            course.enter("step")
            assert bench.optimizer is not None
            bench.optimizer.step()
            bench.optimizer.zero_grad(set_to_none=True)

        with cost._collector_off(), Course(bench.held()) as course, watched(bench.model, course, blocks):
            run()
        state = cost._bytes(bench.state())
        return Figures(
            forward_flops=inference.flops,
            step_flops=course.flops,
            saved_bytes=kept.bytes,
            weight_bytes=cost._bytes([*bench.model.parameters(), *bench.model.buffers()]),
            optimizer_bytes=state,
            trainable=sum(parameter.numel() for parameter in bench.parameters),
            phases=course.phases(state),
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Without the tracebacks that torch logs where an operation has no rule for shapes: the error says it."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def unfused() -> Iterator[None]:
    """Without the one kernel for a whole encoder layer, which hides its products."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


@contextmanager
def watched(model: nn.Module, course: Course, blocks: Mapping[str, tuple[Any, ...]]) -> Iterator[None]:
    """Tell `course` when each block begins its forward pass, and when its backward pass begins: with the gradient of its output."""
    lists = {where[0] for where in blocks.values()}
    last = {number: [path for path, where in blocks.items() if where[0] == number][-1] for number in lists}

    def before(where: tuple[Any, ...]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            course.enter("recompute" if course.backward else "forward", where)

        return hook

    def after(where: tuple[Any, ...], ends: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if course.backward:
                return
            if any(isinstance(leaf, Tensor) for leaf in tree_leaves(output)):
                h, _ = of_output(output)
                if h.requires_grad:
                    h.register_hook(lambda _: course.enter("backward", where))
            if ends:
                course.enter("forward", (where[0], "after", 0))

        return hook

    handles = []
    for path, where in blocks.items():
        module = model.get_submodule(path)
        handles.append(module.register_forward_pre_hook(before(where)))
        handles.append(module.register_forward_hook(after(where, path == last[where[0]])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
