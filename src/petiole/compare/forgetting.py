"""Forgetting: how well the backbone still does what it could do before, after it was adapted to something else.

The held-out data must be something that the checkpoint itself can do: text for a language model, or the classes of its own head. The
change that was trained is put on a second copy of the checkpoint, which keeps its own head, and scored there, before and after.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from petiole.attach import HEAD, attach, head_names
from petiole.compare.settings import Settings, digest, sample
from petiole.errors import AttachError, DataError

if TYPE_CHECKING:
    from petiole.adaptation import Adaptation


class Forgetting:
    """Scores the adapted backbone on data that the bare one was made for.

    Args:
        settings: of the comparison; `settings.forgetting` names the data.

    Raises:
        DataError: the checkpoint has no head for these classes.
    """

    def __init__(self, settings: Settings, device: torch.device) -> None:
        from petiole.anatomy import anatomy
        from petiole.tasks import load_data, prepare

        source = settings.forgetting or ""
        limit = {split: rows for split, rows in settings.limit.items() if split != "train"} or None
        data = load_data(source, limit=limit)
        self.task = prepare(data, settings.model)
        own = [name for _, name in sorted((self.task.config.id2label or {}).items())] if data.label_names else []
        numbered = list(data.label_names) == [
            str(i) for i in range(len(own))
        ]  # the data doesn't say its classes' names
        if data.label_names and sorted(own) != sorted(data.label_names) and not numbered:
            raise DataError(
                f"forgetting: {source} has the classes {', '.join(data.label_names[:4])}, …; the checkpoint has {', '.join(own[:4])}, …\n"
                "Give data that the bare model was trained for, so that there is something to forget."
            )
        if own and not numbered and list(data.label_names) != own:
            data = load_data(source, limit=limit, label_names=own)
            self.task = prepare(data, settings.model)
        self.split = next(split for split in ("test", "validation", "train") if split in data.splits)
        self.model = self.task.build_model(head="keep" if data.label_names else "auto").requires_grad_(False)
        self.heads = head_names(self.model, anatomy(self.model))
        self.device, self.batch_size = device, 2 * settings.batch_size
        self.before = self.score(self.model.to(device))
        self.digest = digest(sample(data.splits[self.split]))
        self.description = f"{source} ({self.split}, {len(data.splits[self.split])} rows)"

    def score(self, model: nn.Module) -> float:
        found = self.task.evaluate(model, self.split, batch_size=self.batch_size)
        return float(found[self.task.main_metric])

    def measure(self, adaptation: Adaptation) -> dict[str, float]:
        """The score before and after."""
        model = copy.deepcopy(self.model)
        return {
            "before": self.before,
            "after": self.score(model) if transfer(adaptation, model, self.heads) else self.before,
        }


@torch.no_grad()
def transfer(adaptation: Adaptation, model: Any, heads: set[str]) -> bool:
    """Put a trained change on another copy of its backbone, without the task head; False if there is nothing but the head."""
    own = {name: value for name, value in adaptation.named_tensors(folded=False).items() if not is_head(name, heads)}
    if not own:
        return False
    try:
        other = attach(model, adaptation.methods, seed=adaptation.seed, train_head=False)
    except AttachError:
        return False
    for mine, theirs in zip((s for s in adaptation.slots if s.number != HEAD), other.slots, strict=True):
        if structure := mine.delta.structure():
            theirs.delta.restructure(structure)
    for name, tensor in other.named_tensors(folded=False).items():
        if name in own:
            tensor.copy_(own[name])
    return True


def is_head(name: str, heads: set[str]) -> bool:
    """Whether a tensor of an adaptation belongs to the task head: a copy of it, or the head itself trained in place."""
    return name.startswith(f"{HEAD}.") or name.removeprefix("own:") in heads


__all__ = ["Forgetting", "transfer"]
