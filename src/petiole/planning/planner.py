"""`pt.plan`: the planner, which prices one method after the other, and the search for the size that just fits."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from petiole.anatomy import Anatomy, anatomy
from petiole.attach import attach
from petiole.cost import MakeOptimizer, count
from petiole.errors import AttachError, ConfigError, PetioleError
from petiole.method import Method, registry
from petiole.planning import depth, inputs
from petiole.planning.budget import Budget, axes
from petiole.planning.passes import Figures, step
from petiole.planning.table import DEFAULT_AXES, Plan, Row, front
from petiole.proof import default_loss

if TYPE_CHECKING:
    from petiole.adaptation import Adaptation
    from petiole.compare.contenders import Contender

Asked = str | Sequence["str | Method | Sequence[Method]"] | None

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
}


def plan(
    model: nn.Module | str | Path | Any,
    methods: Asked = None,
    *,
    batch_size: int = 8,
    length: int = 128,
    batch: Mapping[str, Any] | None = None,
    dtype: str | torch.dtype | None = None,
    autocast: str | torch.dtype | None = None,
    optimizer: str | MakeOptimizer = "adamw",
    gradient_checkpointing: bool = False,
    recompute: bool = False,
    task: str | None = None,
    num_labels: int | None = None,
    budget: str | Budget | None = None,
    fit: bool = False,
    front_axes: str | Sequence[str] = DEFAULT_AXES,
    watch: Callable[[int, int], None] | None = None,
) -> Plan:
    """Predict what methods cost on a backbone, before any weight is loaded. Nothing is computed and nothing is changed.

    Args:
        model: a model (with weights or on the meta device), a configuration of Transformers, a folder with config.json, or a name.
        methods: as `petiole compare` takes them ("lora:rank=32,vpt", or method objects, or lists that act together); all there are if None.
        batch_size, length: rows, and tokens of a text. Images and spectrograms have the size that the model was made for.
        batch: a batch instead: a mapping of the model's inputs, of which shapes and types alone are read.
        dtype: of the backbone's weights; a model's own, or float32, if None.
        autocast: type for mixed precision, off if None.
        optimizer: adamw, adam, sgd, momentum, or a function from a list of parameters to an optimiser.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        recompute: where a method breaks the budget's memory, do that for as few blocks as it takes (`pt.Trainer(memory=…)` does), and
            say so; the more FLOPs are its price.
        task: for a head of that kind, as `petiole.tasks` names it. num_labels: its classes.
        budget: such as "params=0.5%,memory=8GB,flops=40T".
        fit: give every method that has a main size (rank, bottleneck, length) the largest one within the budget.
        front_axes: of the front that the table marks.
        watch: told how many methods are done, and of how many.

    Raises:
        ConfigError: an argument has a value that it can't have.
        FileError: there is no such model. AnatomyError: it has no blocks to speak of.
    """
    start = time.perf_counter()
    limits = budget if isinstance(budget, Budget) else Budget.parse(budget)
    if fit and not limits.limits:
        raise ConfigError("fit=True needs a budget to fit into, such as budget='params=0.5%'")
    memory = next((int(one.most) for one in limits.limits if one.axis.name == "memory"), None)
    if recompute and (memory is None or gradient_checkpointing):
        raise ConfigError(
            "recompute=True needs a budget of memory to keep to, such as budget='memory=8GB', and no gradient_checkpointing"
        )
    at_least_one(batch_size=batch_size, length=length)
    chosen, marked = contenders(methods), axes(front_axes if isinstance(front_axes, str) else list(front_axes))
    kind, mixed = type_of("dtype", dtype), type_of("autocast", autocast)
    backbone = inputs.backbone(model, dtype=kind, task=task, num_labels=num_labels)
    found = anatomy(backbone)
    if gradient_checkpointing:
        checkpointed(backbone)
    given = inputs.checked(batch) if batch is not None else inputs.synthetic(backbone, batch_size, length, found)
    planner = Planner(backbone, found, given, maker(optimizer), mixed)
    rows = []
    for one in chosen:
        row = fitted(planner, one, limits) if fit and main_size(one)[2] else planner.row(one)
        rows.append(planner.recomputed(row, one, memory) if recompute and memory is not None else row)
        if watch is not None:
            watch(len(rows), len(chosen))
    rows = [replace(row, over=limits.over(row)) for row in rows]
    rows.sort(key=lambda row: (row.memory_bytes is None, row.memory_bytes or 0, row.label))
    best = {row.label for row in front(rows, marked)}
    return Plan(
        model=type(backbone).__name__,
        settings={
            "dtype": name_of(next((p.dtype for p in backbone.parameters() if p.is_floating_point()), torch.float32)),
            "autocast": name_of(mixed) if mixed is not None else None,
            "optimizer": optimizer if isinstance(optimizer, str) else getattr(optimizer, "__name__", "own optimiser"),
            "gradient_checkpointing": gradient_checkpointing,
            "budget": limits.text(),
            "fit": fit,
            "recompute": recompute,
            "front_axes": [axis.name for axis in marked],
        },
        shapes={name: list(value.shape) for name, value in given.items() if isinstance(value, Tensor)},
        rows=tuple(replace(row, front=row.label in best) for row in rows),
        budget=limits,
        seconds=time.perf_counter() - start,
    )


# -------------------------------------------------------------------------------------------------------------------- arguments


def contenders(asked: Asked) -> list[Contender]:
    """The rows of a plan.

    Raises:
        ConfigError: an unknown method, a field outside its range, a row twice.
    """
    from petiole.compare.contenders import Contender, of_methods, parse, split

    if asked is None:
        return [Contender(slug, (cls(),), asked=False) for slug, cls in registry().items()]
    parts: list[Any] = split(asked, ",") if isinstance(asked, str) else []
    for part in () if isinstance(asked, str) else [asked] if isinstance(asked, Method) else asked:
        parts += split(part, ",") if isinstance(part, str) else [part]
    rows: dict[str, Contender] = {}
    for part in parts:
        made = parse(part) if isinstance(part, str) else of_methods(part)
        if made.label in rows:
            raise ConfigError(f"methods: {made.label!r} is named twice")
        rows[made.label] = made
    if not rows:
        raise ConfigError("methods: nothing is named; give slugs as `petiole methods` lists them, with commas between")
    return list(rows.values())


def at_least_one(**numbers: int) -> None:
    for name, value in numbers.items():
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} = {value!r}: a whole number of at least 1 is needed")


def type_of(name: str, value: str | torch.dtype | None) -> torch.dtype | None:
    found = getattr(torch, value, None) if isinstance(value, str) else value
    if value is not None and (not isinstance(found, torch.dtype) or not found.is_floating_point):
        raise ConfigError(f"{name}: {value!r} is no floating-point type\nAllowed: float32, bfloat16, float16, float64.")
    return found


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def maker(optimizer: str | MakeOptimizer) -> MakeOptimizer:
    if not isinstance(optimizer, str):
        return optimizer
    if optimizer not in OPTIMIZERS:
        raise ConfigError(
            f"optimizer: there is no {optimizer!r}\nAllowed: {', '.join(OPTIMIZERS)}, or a function that makes one."
        )
    return OPTIMIZERS[optimizer]


def checkpointed(model: nn.Module) -> None:
    """Switch gradient checkpointing on, IN PLACE."""
    enable = getattr(model, "gradient_checkpointing_enable", None)
    if enable is None or not getattr(model, "supports_gradient_checkpointing", True):
        raise ConfigError(f"gradient_checkpointing: {type(model).__name__} can't do it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the name by which every version knows it
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})


# ---------------------------------------------------------------------------------------------------------------------- planner


@dataclass(frozen=True)
class Short:
    """A copy of the backbone with few blocks, ready for methods to be attached."""

    model: nn.Module
    found: Anatomy
    units: Mapping[int, int]
    blocks: Mapping[str, tuple[Any, ...]]


class Planner:
    """Prices methods on one backbone; what does not depend on the method is made once.

    Args:
        model: on the meta device. found: its anatomy. batch: on the meta device. make: of the optimiser. autocast: type, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        found: Anatomy,
        batch: Mapping[str, Any],
        make: MakeOptimizer,
        autocast: torch.dtype | None,
    ) -> None:
        self.model, self.found, self.batch, self.make, self.autocast = (
            model.requires_grad_(False),
            found,
            batch,
            make,
            autocast,
        )
        self.heads = [site.path for site in found.heads()]
        self.cut = depth.patterns(model, found)
        self.short = self._shortened()  # now, while nothing is attached

    def _shortened(self) -> dict[int, Short]:
        """Copies of the backbone: without a unit in any list (-1), and with one in each; none if nothing can be cut."""
        made: dict[int, Short] = {}
        if not self.cut:
            return made
        for number in (-1, *self.cut):
            units = {k: int(k == number) for k in self.cut}
            model = depth.shortened(self.model, self.cut, units)
            found = anatomy(model)
            if depth.lists_of(found) != depth.lists_of(self.found):
                return {}
            made[number] = Short(model, found, units, depth.places(model, found, self.cut, units))
        return made

    @property
    def width(self) -> int:
        """Of the widest hidden state between blocks."""
        return max(block.hidden_size for stack in self.found.stacks for block in stack.blocks)

    def row(self, contender: Contender, figures: bool = True) -> Row:
        """One method's costs, or why it has none.

        Args:
            figures: False for what can be counted alone, without a step: parameters and bytes of the file.
        """
        name, size, free = main_size(contender)
        row = Row(
            contender.label,
            contender.family,
            contender.config(),
            size,
            name,
            backbone_parameters=count(self.model, heads=()).total,
            note=f"its {name} goes by the values of the weights: these are the most it can be"
            if free and size is None
            else "",
        )
        try:
            with attached(self.model, contender.methods, self.found) as adaptation:
                counted = count(self.model, self.heads)
                row = replace(
                    row,
                    trainable_parameters=counted.trainable,
                    head_parameters=counted.head,
                    checkpoint_bytes=file_bytes(adaptation),
                    gradient_bytes=sum(
                        p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad
                    ),
                    kept_bytes=sum(t.numel() * t.element_size() for t in adaptation.own.values()) if adaptation else 0,
                )
                reason = self.too_long(adaptation)
                if reason:
                    return refused(row, reason)
                if not figures:
                    return row
                found = self.few(contender.methods, counted.trainable)
                whole = found is None
                if found is None:
                    found = self.run(self.model, depth.places(self.model, self.found, {}, {}))
        except Exception as error:  # a method may fail in any way on a backbone that it was not made for
            return refused(row, inputs.one_line(error))
        return replace(
            row,
            forward_flops=found.forward_flops,
            step_flops=found.step_flops,
            saved_bytes=found.saved_bytes,
            weight_bytes=found.weight_bytes,
            optimizer_bytes=found.optimizer_bytes,
            peak_bytes=found.peak_bytes,
            whole=whole,
        )

    def recomputed(self, row: Row, contender: Contender, memory: int) -> Row:
        """The row with as few blocks recomputed as the memory takes; as it is where that helps nothing."""
        from petiole import recompute

        if row.reason or row.memory_bytes is None or row.memory_bytes <= memory:
            return row
        if row.size is not None:
            contender = resized(contender, row.size)
        try:
            with attached(self.model, contender.methods, self.found):
                chosen = recompute.fit(
                    self.model, self.batch, memory,
                    make=self.make, loss=default_loss, autocast=self.autocast, extra_bytes=row.kept_bytes or 0,
                )  # fmt: skip
        except PetioleError as error:
            return replace(row, note=inputs.one_line(error).removeprefix(f"memory = {memory}: "))
        more = chosen.step_flops / chosen.plain_flops - 1
        return replace(
            row,
            step_flops=chosen.step_flops,
            saved_bytes=chosen.saved_bytes,
            peak_bytes=chosen.peak_bytes - (row.kept_bytes or 0),
            recomputed=len(chosen.blocks),
            note=f"recomputes {len(chosen.blocks)} of {chosen.among} blocks, which takes {more:.0%} more FLOPs a step",
        )

    def run(self, model: nn.Module, blocks: Mapping[str, tuple[Any, ...]]) -> Figures:
        return step(model, self.batch, self.make, blocks, loss=default_loss, autocast=self.autocast)

    def few(self, methods: Sequence[Method], trainable: int) -> Figures | None:
        """Figures from short copies, for the whole model with the methods attached; None if they don't tell."""
        if not self.short:
            return None
        taken: dict[int, Figures] = {}
        try:
            whole = depth.signatures(self.model, self.cut)
            for number, short in self.short.items():
                with attached(short.model, methods, short.found):
                    if not depth.same_blocks(whole, short.model, self.cut, short.units):
                        return None
                    taken[number] = self.run(short.model, short.blocks)
            found = depth.extended(taken.pop(-1), taken, self.cut)
        except (
            PetioleError,
            depth.Unlike,
            LookupError,
        ):  # a depth that a copy lacks, a loop over a fixed number of blocks
            return None
        return found if found.trainable == trainable else None

    def too_long(self, adaptation: Adaptation | None) -> str:
        """Why prompts make a text longer than the model has positions for; "" if they don't."""
        text = self.batch.get("input_ids")
        most = inputs.positions(self.model, self.found) if isinstance(text, Tensor) and adaptation is not None else None
        if most is None or adaptation is None or not isinstance(text, Tensor):
            return ""
        longest = sum(slot.delta.length for slot in adaptation.slots if getattr(slot, "text", False))
        tokens = text.shape[-1] + longest
        if not longest or tokens <= most:
            return ""
        return f"the text and {longest} prompts are {tokens} tokens, and {type(self.model).__name__} has positions for {most}: take less of either"


def refused(row: Row, reason: str) -> Row:
    """The row without figures."""
    return Row(
        row.label,
        row.family,
        row.config,
        row.size,
        row.size_name,
        backbone_parameters=row.backbone_parameters,
        reason=reason,
    )


def main_size(contender: Contender) -> tuple[str, int | None, bool]:
    """Main size of the first method that has one: its name, its value, and whether it is a number or may become one.

    A size of None is found from values when the method is attached for good.
    """
    for method in contender.methods:
        if method.size:
            value = getattr(method, method.size)
            return method.size, value if isinstance(value, int) else None, value is None or isinstance(value, int)
    return "", None, False


def resized(contender: Contender, size: int) -> Contender:
    """With another main size.

    Raises:
        ConfigError: the field doesn't take it.
    """
    methods = list(contender.methods)
    index = next(i for i, method in enumerate(methods) if method.size)
    methods[index] = type(methods[index])(**{**methods[index].model_dump(), methods[index].size: size})
    return replace(contender, methods=tuple(methods))


@contextmanager
def attached(model: nn.Module, methods: Sequence[Method], found: Anatomy) -> Iterator[Adaptation | None]:
    """The methods on the model inside the `with`; none for the bare backbone."""
    if not methods:
        yield None
        return
    adaptation = attach(model, list(methods), found=found)
    try:
        yield adaptation
    finally:
        adaptation.detach()


def file_bytes(adaptation: Adaptation | None) -> int:
    """Bytes of the tensors that `save` would write."""
    if adaptation is None:
        return 0
    return sum(tensor.numel() * tensor.element_size() for tensor in adaptation.named_tensors().values())


# -------------------------------------------------------------------------------------------------------------------------- fit


def fitted(planner: Planner, contender: Contender, budget: Budget) -> Row:
    """The row with the largest main size within the budget; with the smallest one if none fits.

    Sizes are whole numbers and costs grow with them: counted costs are searched first, since counting is cheap, then all of them.
    """

    def at(size: int, figures: bool = True) -> Row:
        return planner.row(resized(contender, size), figures)

    def strain(size: int, figures: bool) -> float:
        try:
            row = at(size, figures)
        except ConfigError:  # beyond what the field takes
            return float("inf")
        return float("inf") if row.reason else budget.strain(row)

    most = largest(lambda size: strain(size, False), 1, planner.width)
    most = largest(lambda size: strain(size, True), 1, most) if most else 0
    row = at(most or 1)
    if most == planner.width and not row.reason:
        return replace(row, note=f"{row.size_name} {most} is the backbone's width; the budget would allow for more")
    return row


def largest(strain: Callable[[int], float], low: int, high: int) -> int:
    """The largest whole number from `low` to `high` whose strain is at most 1; 0 if there is none. Strain must not fall.

    A bisection that guesses where a straight line would cross 1, and halves where that gets nowhere.
    """
    top = strain(high)
    if top <= 1:
        return high
    bottom = strain(low) if high > low else top
    if bottom > 1:
        return 0
    halve = False
    while high - low > 1:
        middle = (low + high) // 2
        if not halve and top != float("inf") and top > bottom:
            middle = min(high - 1, max(low + 1, low + int((high - low) * (1 - bottom) / (top - bottom))))
        found, wide = strain(middle), high - low
        if found <= 1:
            low, bottom = middle, found
            if high - low > 1 and not halve and top != float("inf"):  # the line often ends just below the answer
                after = strain(low + 1)
                if after > 1:
                    return low
                low, bottom = low + 1, after
        else:
            high, top = middle, found
        halve = high - low > wide / 2
    return low


__all__ = ["OPTIMIZERS", "AttachError", "Optimizer", "Planner", "plan"]
