"""PEFT names modules by the ends of their paths: the shortest such names that mean exactly the modules that are meant."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import nn

from petiole.errors import AttachError


def module_paths(model: nn.Module) -> list[str]:
    """Paths of all modules, tied ones under each of their names, without what petiole added."""
    paths = (path for path, _ in model.named_modules(remove_duplicate=False))
    return [path for path in paths if path and not any(part.startswith("petiole") for part in path.split("."))]


def matches(path: str, name: str) -> bool:
    """Whether PEFT's `target_modules` would take a module for a name."""
    return path == name or path.endswith(f".{name}")


def shortest(wanted: Iterable[str], universe: Collection[str], dotted: bool = True) -> list[str]:
    """The fewest words that match all wanted paths and no other.

    Args:
        wanted: module paths.
        universe: paths of all modules that a name could match.
        dotted: a name matches whole parts of a path; otherwise any end of it, as in `modules_to_save`.

    Raises:
        AttachError: the whole path of one is the end of another that isn't wanted.
    """
    goal, names = set(wanted), set[str]()
    for path in sorted(goal):
        if any(hit(path, name, dotted) for name in names):
            continue
        parts = path.split(".")
        ends = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        found = next((end for end in ends if all(other in goal for other in universe if hit(other, end, dotted))), None)
        if found is None:
            raise AttachError(f"{path}: PEFT, which matches the ends of paths, would also take another module for it")
        names.add(found)
    return sorted(names)


def hit(path: str, name: str, dotted: bool) -> bool:
    return matches(path, name) if dotted else path.endswith(name)
