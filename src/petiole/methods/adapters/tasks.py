"""Which task a forward pass is of: what methods with modules of each task's own share.

    with pt.given(model, task="vqa"): …                        all rows of the batch
    with pt.given(model, task=["vqa", "gqa", "vqa"]): …        each row; or a tensor of numbers, in the order of the method's tasks

A task's modules run on its own rows alone, so that nothing else gets a gradient. Beams and windows follow their row.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from petiole.attach import sequence_first
from petiole.errors import AttachError, ConfigError

if TYPE_CHECKING:
    from petiole.adaptation import Adaptation
    from petiole.attach import Host
    from petiole.method import Method

Asked = str | tuple[str, ...]  # of all rows, or of each
SHARED = "shared"  # the name of what all tasks have in common, among modules by task


def distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse what is no list of tasks, as a validator of a field."""
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise ValueError(f"{double!r} stands twice")
    odd = next((name for name in names if not name.isidentifier() or hasattr(nn.ModuleDict, name)), None)
    if odd is not None:
        raise ValueError(f"{odd!r} is no name of a task: letters, digits and _, and none that a ModuleDict has")
    return names


TaskNames = Annotated[tuple[str, ...], AfterValidator(distinct)]


def tasks_field() -> Any:
    """The field `tasks`, the same in every method that has modules for each."""
    return Field(
        ("task",), min_length=1, description="Names of the tasks; with one alone, no batch has to say its task."
    )


def asked(host: Host, names: tuple[str, ...], alike: bool = False) -> Asked:
    """The task of this forward pass; of each row, where they differ.

    Args:
        alike: it makes no difference which one it is, so none has to be given; but a name that is must be known.

    Raises:
        ConfigError: there is no such task.
        AttachError: none is given and there are several, or it is given for another number of rows.
    """

    name = host.given("task")  # which may change within a forward pass, of a model that runs its backbone for each task
    if isinstance(name, str):
        return known(name, names)

    def make() -> Asked:
        given = host.given("task")
        if given is None and len(names) > 1 and not alike:
            raise AttachError(
                f"a forward pass is of one of the tasks {', '.join(names)}: with pt.given(model, task={names[0]!r}), or with a list of "
                "one for each row"
            )
        rows = names if given is None else tuple(known(row, names) for row in by_name(given, names))
        if given is None or alike or isinstance(given, int) or (isinstance(given, Tensor) and not given.ndim):
            return rows[0]
        within = host.passing()
        size = within.batch_size if within is not None and host.model.training else None
        if not rows or size not in (None, len(rows)):
            raise AttachError(
                f"task is given for {len(rows)} rows, but the batch has {size}: one name for all, or one each"
            )
        if sequence_first(host.model):
            raise AttachError(
                f"{type(host.model).__name__} holds its hidden states as (time, batch, width), in which rows are not told apart"
            )
        return rows

    found: Asked = host.once(f"task of {names} {alike}", make)
    return found if isinstance(found, str) or len(set(found)) > 1 else found[0]


def known(name: str, names: tuple[str, ...]) -> str:
    """Raises ConfigError: there is no such task."""
    if name not in names:
        raise ConfigError(f"task = {name!r} is none of {', '.join(names)}")
    return name


def by_name(given: Any, names: tuple[str, ...]) -> tuple[str, ...]:
    """What was given, by name.

    Raises:
        ConfigError: it is no name, number, or list of them.
    """
    values = given.tolist() if isinstance(given, Tensor) else given
    listed: Sequence[Any] = values if isinstance(values, (list, tuple)) else [values]
    wrong = [v for v in listed if not isinstance(v, str) and not (type(v) is int and 0 <= v < len(names))]
    if wrong:
        raise ConfigError(
            f"task = {wrong[0]!r} is neither one of {', '.join(names)} nor its number, 0 to {len(names) - 1}"
        )
    return tuple(names[value] if isinstance(value, int) else value for value in listed)


def owners(tuned: Adaptation, task: str, *kinds: type[Method]) -> dict[int, Any]:
    """The methods of these kinds in an adaptation that have a task, by their numbers.

    Raises:
        ConfigError: none has it.
    """
    mine = {i: m for i, m in enumerate(tuned.methods) if isinstance(m, kinds)}
    names = sorted({name for method in mine.values() for name in method.tasks})  # type: ignore[attr-defined]
    if task not in names:
        raise ConfigError(f"task = {task!r} is none of {', '.join(names) or 'this adaptation, which has no tasks'}")
    return {i: method for i, method in mine.items() if task in method.tasks}  # type: ignore[attr-defined]


def alone(tuned: Adaptation, task: str, numbers: Container[int]) -> dict[str, Tensor]:
    """What deltas of these methods that know `of_task` are for one task alone, by the names of `Adaptation.named_tensors`."""
    return {
        f"{slot.key}:{name}": value
        for slot in tuned.slots
        if slot.number in numbers and hasattr(slot.delta, "of_task")
        for name, value in slot.delta.of_task(task).items()
    }


def of(modules: nn.ModuleDict, task: str) -> Any:
    """A task's own module, or the one that it shares."""
    return modules[task if task in modules else SHARED]


def each(count: int, task: tuple[str, ...]) -> int:
    """How many rows of a hidden state follow one row of the batch.

    Raises:
        AttachError: its `count` rows are no multiple of those that tasks are given for.
    """
    found, left = divmod(count, len(task))
    if left:
        raise AttachError(
            f"task is given for {len(task)} rows, but a hidden state has {count}: one name for all, or one each"
        )
    return found


def by_task(h: Tensor, task: Asked, change: Callable[[Tensor, str], Tensor]) -> Tensor:
    """change(h, task), called once for each task that rows of h are of."""
    if isinstance(task, str):
        return change(h, task)
    times, present = each(h.shape[0], task), list(dict.fromkeys(task))
    number = torch.tensor([present.index(name) for name in task], device=h.device).repeat_interleave(times)
    order = number.argsort(stable=True)
    parts = h.index_select(0, order).split([times * task.count(name) for name in present])
    changed = [change(part, name) for part, name in zip(parts, present, strict=True)]
    return torch.cat(changed).index_select(0, order.argsort())
