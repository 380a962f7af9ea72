"""Several methods that act together under one name: what hybrids share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import nn

from petiole.anatomy import Anatomy
from petiole.method import Delta, Method, Moment, Place
from petiole.methods.adapters.presets import Presets


class Composed(Presets):
    """A method that is a list of others, which do nothing over time. One of them at most may have a module that all of it shares."""

    def parts(self) -> Sequence[Method]:
        """The methods, in the order in which they act at one place."""
        raise NotImplementedError

    def deltas_on(self, anatomy: Anatomy, model: nn.Module) -> Iterator[Place]:
        for part in self.parts():
            yield from part.deltas_on(anatomy, model)

    def shared(self, anatomy: Anatomy) -> nn.Module | None:
        return next((module for part in self.parts() if (module := part.shared(anatomy)) is not None), None)

    def bind(self, deltas: Mapping[str, Delta], shared: nn.Module | None) -> None:
        for part in self.parts():
            part.bind(deltas, shared)

    def trains(self, anatomy: Anatomy, model: nn.Module) -> Iterable[str]:
        for part in self.parts():
            yield from part.trains(anatomy, model)

    def on_attach(self, moment: Moment) -> None:
        for part in self.parts():
            part.on_attach(moment)
