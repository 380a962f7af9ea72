"""The groups of an optimiser: which parameters decay, at what rate they learn, and how groups follow when a method adds or drops some.

A group is one entry of `optimizer.param_groups`. Schedules keep one value for each group, in lists, so a new group means a new entry there;
a checkpoint names the parameters of each group, so that a resumed run can build the same groups before it loads the optimiser's state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from petiole.adaptation import Adaptation
from petiole.attach import need_host
from petiole.errors import FileError, TrainingError
from petiole.method import RATE_FACTOR

_PER_GROUP = ("base_lrs", "max_lrs", "min_lrs", "_last_lr")  # lists of a schedule with one rate for each group
Kind = tuple[bool, float]  # whether it decays, the factor of its learning rate


# ------------------------------------------------------------------------------------------------------------- what deltas say


def acting(model: nn.Module) -> list[Adaptation]:
    """The adaptations that act, and so train."""
    host = need_host(model)
    return [adaptation for adaptation in host.adaptations.values() if adaptation.name in host.active]


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter of what acts, frozen or not, by a name that tells them apart over all adaptations."""
    return {f"{a.name}/{key}": parameter for a in acting(model) for key, parameter in a.named_parameters()}


def kinds(model: nn.Module) -> dict[int, Kind]:
    """Of every parameter of what acts, by its id: whether weight decay acts on it, and the factor of its learning rate."""
    found: dict[int, Kind] = {}
    for adaptation in acting(model):
        for _, module in adaptation.modules():
            spared, factors = getattr(module, "no_decay", ()), getattr(module, "rate_factors", {})
            for name, parameter in module.named_parameters():
                decays = parameter.ndim > 1 and not any(below(name, other) for other in spared)
                factor = next((float(f) for other, f in factors.items() if below(name, other)), 1.0)
                found.setdefault(id(parameter), (decays, factor))
        for _, parameter in adaptation.named_parameters():
            found.setdefault(id(parameter), (parameter.ndim > 1, 1.0))  # the backbone's own: no norms, no biases
    return found


def below(name: str, other: str) -> bool:
    return name == other or name.startswith(f"{other}.")


def parameter_groups(model: nn.Module, *, learning_rate: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Groups for an optimiser of one's own: `torch.optim.AdamW(parameter_groups(model, learning_rate=1e-3, weight_decay=0.01))`.

    Weight decay acts on matrices, not on vectors and scalars (biases, gains, gates) nor on what a delta excepts (`no_decay`); what a delta
    wants to learn faster or slower (`rate_factors`) gets a group of its own. `pt.Trainer` makes its groups by the same rule.

    Raises:
        TrainingError: nothing trains.
    """
    kind = kinds(model)
    members = partition([p for p in named(model).values() if p.requires_grad], kind)
    if not members:
        raise TrainingError("nothing trains: no adaptation acts, or all its parameters are frozen; see pt.activate")
    return [
        {
            "params": parameters,
            "lr": learning_rate * factor,
            "weight_decay": weight_decay if decays else 0.0,
            **({RATE_FACTOR: factor} if factor != 1 else {}),
        }
        for (decays, factor), parameters in sorted(members.items(), key=lambda item: item[0][1] != 1)
    ]


def unmet(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Names of parameters that an optimiser of one's own does not treat as their deltas ask for: other rate, or weight decay."""
    names = {id(parameter): name for name, parameter in named(model).items()}
    kind = kinds(model)
    return [
        names[id(p)]
        for group in optimizer.param_groups
        for p in group["params"]
        if id(p) in names
        and (
            kind[id(p)][1] != group.get(RATE_FACTOR, 1.0)
            or (group.get("weight_decay") and p.ndim > 1 and not kind[id(p)][0])
        )
    ]


def partition(parameters: Iterable[nn.Parameter], kind: Mapping[int, Kind]) -> dict[Kind, list[nn.Parameter]]:
    parts: dict[Kind, list[nn.Parameter]] = {}
    for parameter in parameters:
        parts.setdefault(kind.get(id(parameter), (parameter.ndim > 1, 1.0)), []).append(parameter)
    return parts


# ------------------------------------------------------------------------------------------------------------- changing groups


def spread(optimizer: Optimizer, kind: Mapping[int, Kind]) -> None:
    """Split groups of a new optimiser, so that each holds parameters of one learning rate."""
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        parts: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            parts.setdefault(kind.get(id(parameter), (True, 1.0))[1], []).append(parameter)
        for factor, parameters in (parts or {1.0: []}).items():
            own = {**group, "params": parameters}
            groups.append(own if factor == 1 else {**own, "lr": group["lr"] * factor, RATE_FACTOR: factor})
    optimizer.param_groups[:] = sorted(
        groups, key=lambda group: RATE_FACTOR in group
    )  # logs show the first group's rate


def add(
    optimizer: Optimizer,
    scheduler: Any,
    parameters: Sequence[nn.Parameter],
    kind: Mapping[int, Kind],
    clock: Clock | None = None,
) -> None:
    """Let an optimiser hold more parameters: one new group for each kind of them, with the options and schedule of an old one like it."""
    old = list(optimizer.param_groups)
    decay = max((group.get("weight_decay", 0.0) for group in old), default=0.0)
    for (decays, factor), members in partition(parameters, kind).items():
        like = next((i for i, group in enumerate(old) if group.get(RATE_FACTOR, 1.0) == factor), 0)
        ratio = factor / old[like].get(RATE_FACTOR, 1.0)
        options = {k: v for k, v in old[like].items() if k not in ("params", "param_names", RATE_FACTOR)}
        options |= {k: options[k] * ratio for k in ("lr", "initial_lr", "max_lr", "min_lr") if k in options}
        if "weight_decay" in options:
            options["weight_decay"] = decay if decays else 0.0
        if factor != 1:
            options[RATE_FACTOR] = factor
        follow(scheduler, like, ratio, clock)
        if clock is not None:
            options["lr"] = options.get("initial_lr", options["lr"]) * clock(clock.born)
        optimizer.add_param_group({**options, "params": members})


def drop(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Let an optimiser forget parameters. A group that empties stays, since schedules count groups."""
    gone = {id(parameter) for parameter in parameters}
    for group in optimizer.param_groups:
        kept = [i for i, parameter in enumerate(group["params"]) if id(parameter) not in gone]
        for key in ("params", "param_names"):
            if key in group:
                group[key] = [group[key][i] for i in kept]
    for parameter in parameters:
        optimizer.state.pop(parameter, None)


def schedules(scheduler: Any) -> Iterator[Any]:
    """A schedule and those inside it."""
    if scheduler is not None:
        scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate's wrapper
        yield scheduler
        for inner in getattr(scheduler, "_schedulers", ()):
            yield from schedules(inner)


def follow(scheduler: Any, like: int, ratio: float = 1.0, clock: Clock | None = None) -> None:
    """Give a schedule the values for one more group: those of group `like`, rates times `ratio`.

    Raises:
        TrainingError: a clock of its own, but the schedule is not made of one function for each group.
    """
    found = list(schedules(scheduler))
    if clock is not None and not (found and hasattr(found[0], "lr_lambdas")):
        kind = type(scheduler).__name__ if scheduler is not None else "none"
        raise TrainingError(
            f"warmup_steps of a group's own needs a schedule with one function for each group; this one is {kind}\n"
            "take one of Transformers' (linear, cosine, constant, …) or torch's LambdaLR"
        )
    for each in found:
        for name in _PER_GROUP:
            values = getattr(each, name, None)
            if isinstance(values, list) and len(values) > like:
                values.append(values[like] * ratio)
        if hasattr(each, "lr_lambdas"):
            each.lr_lambdas.append(each.lr_lambdas[like] if clock is None else clock)


class Clock:
    """The schedule of a group that was born during training: up from 0 in `warmup` steps, then down to 0 at step `total`."""

    def __init__(self, born: int, warmup: int, total: int) -> None:
        self.born, self.warmup, self.total = born, warmup, total

    def __call__(self, step: int) -> float:
        age = step - self.born
        if age < self.warmup:
            return age / self.warmup
        return max(0.0, (self.total - step) / max(1, self.total - self.born - self.warmup))


# ------------------------------------------------------------------------------------------------------ to a checkpoint and back


def record(model: nn.Module, optimizer: Optimizer, scheduler: Any) -> list[dict[str, Any]]:
    """What a checkpoint says about the groups: the names of each one's parameters, and the clock of its own if it has one."""
    names = {id(parameter): name for name, parameter in named(model).items()}
    clocks = getattr(next(schedules(scheduler), None), "lr_lambdas", [])
    groups: list[dict[str, Any]] = []
    for i, group in enumerate(optimizer.param_groups):
        entry: dict[str, Any] = {"names": [names.get(id(parameter), "") for parameter in group["params"]]}
        if i < len(clocks) and isinstance(clocks[i], Clock):
            entry["clock"] = dict(vars(clocks[i]))
        groups.append(entry)
    return groups


def rebuild(model: nn.Module, optimizer: Optimizer, groups: Sequence[Mapping[str, Any]], source: Any) -> None:
    """Give an optimiser the groups of a checkpoint, before its state is loaded; what trained then trains again, what was frozen is frozen.

    Raises:
        FileError: the checkpoint names a parameter that isn't here.
    """
    known = named(model)
    ours = {id(parameter) for parameter in known.values()}
    others = iter([p for group in optimizer.param_groups for p in group["params"] if id(p) not in ours])
    held = [name for entry in groups for name in entry["names"] if name]
    unknown = [name for name in held if name not in known or held.count(name) > 1]
    if unknown:
        raise FileError(f"{source}: the optimiser's groups name {unknown[0]!r}, which is not here, or twice")
    for name, parameter in known.items():
        parameter.requires_grad_(name in held)
    old = list(optimizer.param_groups)
    new = [
        {**old[min(i, len(old) - 1)], "params": [known[n] if n else next(others) for n in entry["names"]]}
        for i, entry in enumerate(groups)
    ]
    optimizer.param_groups[:] = new


def set_clocks(scheduler: Any, groups: Sequence[Mapping[str, Any]]) -> None:
    """Give a schedule an entry for each group of a checkpoint, before its state is loaded."""
    for each in schedules(scheduler):
        for name in (*_PER_GROUP, "lr_lambdas"):
            values = getattr(each, name, None)
            if isinstance(values, list) and values:
                values.extend([values[0]] * (len(groups) - len(values)))
    functions = getattr(next(schedules(scheduler), None), "lr_lambdas", [])
    for i, entry in enumerate(groups):
        if "clock" in entry and i < len(functions):
            functions[i] = Clock(**{key: int(entry["clock"][key]) for key in ("born", "warmup", "total")})


__all__ = ["parameter_groups"]
