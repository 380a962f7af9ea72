"""Training: the HF Trainer with method events, the same events as a callback for anyone's Trainer, and as calls for a plain loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from petiole.training.callback import PetioleCallback as PetioleCallback
    from petiole.training.events import Events as Events
    from petiole.training.groups import parameter_groups as parameter_groups
    from petiole.training.held_out import HeldOut as HeldOut
    from petiole.training.trainer import Trainer as Trainer

_HOMES = {
    "Events": "events",
    "HeldOut": "held_out",
    "PetioleCallback": "callback",
    "Trainer": "trainer",
    "parameter_groups": "groups",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'petiole.training' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"petiole.training.{_HOMES[name]}"), name)
