"""Two stages: an adaptation for each source task, then one that builds on them for a target with few examples.

    train_sources(task, model, ["sst2", "mr"], pt.PfeifferAdapter(), learning_rate=1e-3, recipe=Recipe(steps=300))
    tuned = transfer(task, model, "cr", pt.ScaLearn(sources=("sst2", "mr")), shots=16, learning_rate=3e-3)
    task.only("cr").evaluate(model, "test")

Both stages are on one model with a head for each task, so that sources are there by name, as `scalearn` and `adapterfusion` want them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from petiole.attach import adaptations, attach

if TYPE_CHECKING:
    from petiole.adaptation import Adaptation
    from petiole.method import Method
    from petiole.tasks.multitask.model import MultiTaskModel
    from petiole.tasks.multitask.task import MultiTaskText
    from petiole.tune import Recipe


def train_sources(
    task: MultiTaskText,
    model: MultiTaskModel,
    sources: Sequence[str],
    method: Method | Sequence[Method],
    *,
    learning_rate: float,
    recipe: Recipe | None = None,
    seed: int = 0,
) -> dict[str, Adaptation]:
    """Attach and train an adaptation for each source, called as its task, on its own rows; all start alike.

    Args:
        sources: tasks of `task`. method: such as `pt.PfeifferAdapter()`.

    Raises:
        ConfigError: an unknown task.
        AttachError: an adaptation of that name is attached already.
    """
    parts = {name: task.only(name) for name in sources}
    return {name: trained(part, model, name, method, learning_rate, recipe, seed) for name, part in parts.items()}


def transfer(
    task: MultiTaskText,
    model: MultiTaskModel,
    target: str,
    method: Method | Sequence[Method],
    *,
    learning_rate: float,
    shots: int | None = None,
    recipe: Recipe | None = None,
    seed: int = 0,
    name: str = "target",
) -> Adaptation:
    """Attach and train a method for a target, on few of its rows or all; it may build on what is attached, and acts alone.

    Args:
        target: a task of `task`. method: such as `pt.ScaLearn(sources=("sst2", "mr"))`; any, for comparison.
        shots: training rows of each class, drawn by the seed; all if None.
        name: of the adaptation; one that is attached by that name is detached.
    """
    part = task.only(target, shots=shots, seed=seed)
    if name in adaptations(model):
        adaptations(model)[name].detach()
    return trained(part, model, name, method, learning_rate, recipe, seed)


def trained(
    part: MultiTaskText,
    model: MultiTaskModel,
    name: str,
    method: Method | Sequence[Method],
    learning_rate: float,
    recipe: Recipe | None,
    seed: int,
) -> Adaptation:
    from petiole.tune import Recipe, train

    tuned = attach(model, method, name=name, seed=seed)
    train(tuned, part, recipe or Recipe(), learning_rate=learning_rate, seed=seed)
    return tuned
