"""Single modules as petiole's methods: the fewest configurations of roles and layers that mean exactly these modules."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from petiole.anatomy import Anatomy, Site
from petiole.errors import AttachError
from petiole.method import Method
from petiole.methods.lowrank.dora import DoRA
from petiole.methods.lowrank.ia3 import IA3
from petiole.methods.lowrank.lora import LoRA

Spec = tuple[str, str, str]  # stack, sub-layer, role


@dataclass(frozen=True)
class Setting:
    """How one module is adapted. `bias`: its own trains as a change; `biases`: all of the model do, in place. `side`: of (IA)³."""

    site: Site
    rank: int = 0
    alpha: float = 0.0
    rank_stabilised: bool = False
    dora: bool = False
    bias: bool = False
    biases: bool = False
    side: str = ""


def methods_for(found: Anatomy, settings: Mapping[str, Setting], ia3: bool, dropout: float) -> list[Method]:
    """Methods whose sites are exactly these modules.

    Raises:
        AttachError: the modules can't be told from others by role, sub-layer, stack and depth.
        ConfigError: a value is out of a method's range.
    """
    every: dict[Spec, dict[int, list[Site]]] = defaultdict(lambda: defaultdict(list))
    for site in all_sites(found):
        every[spec(site)][site.depth].append(site)
    groups: dict[tuple[Any, ...], dict[Spec, set[int]]] = defaultdict(lambda: defaultdict(set))
    for path, setting in settings.items():
        site = setting.site
        beside = [other.path for other in every[spec(site)][site.depth]]
        odd = next(
            (other for other in beside if other not in settings or whole(settings[other]) != whole(setting)), None
        )
        if odd is not None:
            raise AttachError(
                f"{path} is adapted, and {odd}, which has the same role {site.role!r} in its block, is not, or otherwise"
            )
        groups[common(setting)][spec(site)].add(site.depth)
    made: list[Method] = []
    for shared, places in groups.items():
        by_depths: dict[tuple[int, ...] | None, list[Spec]] = defaultdict(list)
        for one, depths in places.items():
            all_of_it = not one[0] or (depths == set(every[one]) and unbroken(found, one, depths))
            by_depths[None if all_of_it else tuple(sorted(depths))].append(one)
        for layers, specs in by_depths.items():
            sides = {one: {s.side for s in settings.values() if spec(s.site) == one} for one in specs}
            made.append(build(found, specs, layers, shared, sides, ia3, dropout, list(every)))
    return made


def build(
    found: Anatomy, specs: list[Spec], layers: tuple[int, ...] | None, shared: tuple[Any, ...], sides: Mapping[Spec, set[str]],
    ia3: bool, dropout: float, every: list[Spec],
) -> Method:  # fmt: skip
    names = {one: role_name(one, every) for one in specs}
    roles = tuple(names.values())
    rank, alpha, rank_stabilised, dora, bias, biases = shared
    if ia3:
        return IA3(
            roles=roles, input_roles=tuple(names[one] for one in specs if sides[one] == {"input"}), layers=layers
        )
    if dora:
        return DoRA(
            rank=rank,
            alpha=alpha * rank**0.5 if rank_stabilised else alpha,
            dropout=dropout,
            roles=roles,
            layers=layers,
        )
    kind: Literal["none", "adapted", "all"] = "all" if biases else "adapted" if bias else "none"
    return LoRA(
        rank=rank, alpha=alpha, rank_stabilised=rank_stabilised, dropout=dropout, bias=kind, roles=roles, layers=layers
    )


def common(setting: Setting) -> tuple[Any, ...]:
    """What the sites of one method must have in common."""
    return (setting.rank, setting.alpha, setting.rank_stabilised, setting.dora, setting.bias, setting.biases)


def whole(setting: Setting) -> tuple[Any, ...]:
    """What the sites of one role in one block must have in common."""
    return (*common(setting), setting.side)


def spec(site: Site) -> Spec:
    return site.stack, site.within, site.role


def all_sites(found: Anatomy) -> list[Site]:
    return [site for stack in found.stacks for block in stack.blocks for site in block.sites] + list(found.outside)


def unbroken(found: Anatomy, one: Spec, depths: set[int]) -> bool:
    """Whether a role without `layers` means these blocks: `Anatomy.sites` refuses one that only some blocks of a kind have."""
    blocks = found.stack(one[0]).blocks
    layouts = {block.layout for block in blocks if block.depth in depths}
    return all(block.depth in depths for block in blocks if block.layout in layouts)


def role_name(one: Spec, every: list[Spec]) -> str:
    """The shortest name of a role that means it in this sub-layer and this stack alone."""
    stack, within, role = one
    alike = [other for other in every if other[2] == role]
    if alike == [one]:
        return role
    if within and [other for other in alike if other[1] == within] == [one]:
        return f"{within}.{role}"
    if [other for other in alike if other[0] == stack] == [one]:
        return f"{stack}:{role}"
    return f"{stack}:{within}.{role}" if within else f"{stack}:{role}"
