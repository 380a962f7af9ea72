"""petiole: transfer learning under a budget of parameters, memory, compute and labels.

`pt.attach(model, pt.LoRA(rank=8))` puts a method on a backbone, `pt.Trainer` trains it, `.save` writes one file. Every method is an
attribute of this package by its class name; `pt.registry()` lists them. Importing petiole imports torch and little else.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Imported at once, since functions and modules of one name (anatomy, attach) must not take each other's place.
from petiole.adaptation import Adaptation as Adaptation
from petiole.anatomy import Anatomy as Anatomy
from petiole.anatomy import anatomy as anatomy
from petiole.attach import activate as activate
from petiole.attach import adaptations as adaptations
from petiole.attach import attach as attach
from petiole.attach import disabled as disabled
from petiole.attach import given as given
from petiole.attach import route as route
from petiole.attach import streams as streams
from petiole.errors import PetioleError as PetioleError
from petiole.method import Delta as Delta
from petiole.method import Method as Method
from petiole.method import registry as registry
from petiole.store import load as load

if TYPE_CHECKING:
    from petiole.cache import Cache as Cache
    from petiole.interop import load_peft as load_peft
    from petiole.planning import plan as plan
    from petiole.training import Events as Events
    from petiole.training import Trainer as Trainer

__version__ = "0.1.0"

_HERE = (
    "Adaptation",
    "Anatomy",
    "Delta",
    "Method",
    "PetioleError",
    "activate",
    "adaptations",
    "anatomy",
    "attach",
    "detach",
    "disabled",
    "given",
    "load",
    "registry",
    "route",
    "streams",
)
_HOMES = {
    "Cache": "cache",
    "Events": "training",
    "Trainer": "training",
    "draw_ranks": "ranks",
    "load_peft": "interop",
    "plan": "planning",
    "rank_pattern": "ranks",
}


def detach(model: Any, name: str | None = None) -> Any:
    """Take one adaptation off a model, or all of them, IN PLACE, and return the model as it came."""
    from petiole.attach import known, need_host

    host = need_host(model)
    for each in known(host, name) if name is not None else tuple(adaptations(model)):
        host.adaptations[each].detach()
    return model


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"petiole.{_HOMES[name]}"), name)
    elif name == "__all__":
        return sorted([*_HERE, *_HOMES, "__version__", *_methods()])
    elif name.startswith("_") or not name[:1].isupper():
        raise AttributeError(f"module 'petiole' has no attribute {name!r}")
    else:
        found = _methods()
        if name not in found:
            import difflib

            near = difflib.get_close_matches(name, [*found, *_HOMES, *_HERE], n=3)
            raise AttributeError(
                f"petiole has no method {name!r}" + (f"; did you mean {', '.join(near)}?" if near else "")
            )
        value = found[name]
    globals()[name] = value
    return value


def _methods() -> dict[str, Any]:
    return {cls.__name__: cls for cls in registry().values()}


def __dir__() -> list[str]:
    return list(__getattr__("__all__"))
