"""A backbone that reads text, and a linear head for each task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from petiole.anatomy import anatomy
from petiole.attach import given, host_of
from petiole.errors import ConfigError
from petiole.tasks.metrics import OTHERS
from petiole.tasks.models import seeded


class TaskHeads(nn.Module):
    """Pooled states (B, d) and the number of each row's task (B,) -> scores of all classes (B, C), those of other tasks `OTHERS`.

    Args:
        size: d. classes: how many each task has, in order.
    """

    def __init__(self, size: int, classes: Mapping[str, int], dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.tasks = nn.ModuleDict({task: nn.Linear(size, count) for task, count in classes.items()})

    def forward(self, h: Tensor, task: Tensor) -> Tensor:
        h = self.dropout(h)
        parts = []
        for number, head in enumerate(self.tasks.values()):
            parts.append(head(h).masked_fill((task != number)[:, None], OTHERS))
        return torch.cat(parts, -1)


class MultiTaskModel(nn.Module):
    """One backbone, a head for each task; rows of a batch may be of different tasks.

    The heads are the model's task head: any method attached to this model trains them along. A method that has something of each task's
    own is told the tasks of the rows.

    Args:
        backbone: a base model of Transformers for text, an encoder or a decoder.
        classes: how many each task has, in order.
        dropout: before a head, in training.
        seed: of the heads; the global generator stays where it was.

    Raises:
        ConfigError: the backbone is an encoder-decoder.
    """

    base_model_prefix = "backbone"
    main_input_name = "input_ids"

    def __init__(self, backbone: nn.Module, classes: Mapping[str, int], *, dropout: float = 0.1, seed: int = 0) -> None:
        super().__init__()
        config: Any = backbone.config
        if getattr(config, "is_encoder_decoder", False):
            raise ConfigError(f"{type(backbone).__name__} writes texts; heads need an encoder or a decoder alone")
        self.config, self.backbone, self.tasks = config, backbone, tuple(classes)
        self.causal = bool(anatomy(backbone).stacks[-1].causal)
        with seeded(seed):
            self.heads = TaskHeads(config.hidden_size, classes, dropout)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        task: Tensor | None = None,
        labels: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """`logits` of all classes (B, C), and with labels `loss`, their cross-entropy, in which a row's own task counts alone.

        Args:
            task: number of each row's task; those that `pt.given(model, task="sst2")` names if None.
            labels: classes among those of all tasks.

        Raises:
            ConfigError: nobody says which task it is.
        """
        from transformers.modeling_outputs import SequenceClassifierOutput

        texts = input_ids if input_ids is not None else inputs_embeds
        assert texts is not None
        task = self.numbers(len(texts)).to(texts.device) if task is None else task
        inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "inputs_embeds": inputs_embeds,
        }
        inputs = {name: value for name, value in inputs.items() if value is not None} | options
        if self.by_task():
            names = [self.tasks[number] for number in task.tolist()]
            with given(self, task=names[0] if len(set(names)) == 1 else names):
                found = self.backbone(**inputs)
        else:
            found = self.backbone(**inputs)
        logits = self.heads(self.pooled(found, attention_mask), task)
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def numbers(self, rows: int) -> Tensor:
        """The tasks that are given for this forward pass, as numbers (B,)."""
        host = host_of(self)
        named = host.given("task") if host is not None else None
        names = [named] * rows if isinstance(named, str) else list(named or ())
        if len(names) != rows or not set(names) <= set(self.tasks):
            raise ConfigError(
                f"task = {named!r}: one of {', '.join(self.tasks)}, or one for each of {rows} rows\n"
                "a batch of `task.collator` says it; so does `with pt.given(model, task=…)` where something is attached"
            )
        return torch.tensor([self.tasks.index(name) for name in names])

    def by_task(self) -> bool:
        """Whether a method that acts has something of each task's own."""
        host = host_of(self)
        acting = [a for a in host.adaptations.values() if host.acts(a.name)] if host is not None else []
        return any(len(getattr(method, "tasks", ())) > 1 for a in acting for method in a.methods)

    def pooled(self, found: Any, mask: Tensor | None) -> Tensor:
        """What stands for a text (B, d): the backbone's own pooled state, the last token of a decoder, the first of an encoder."""
        if isinstance(getattr(found, "pooler_output", None), Tensor):
            return found.pooler_output
        h: Tensor = found.last_hidden_state
        if not self.causal:
            return h[:, 0]
        if mask is None:
            return h[:, -1]
        places = torch.arange(mask.shape[1], device=h.device)
        last = (places * mask).argmax(-1) + h.shape[1] - mask.shape[1]  # tokens that a method put in front come first
        return h[torch.arange(len(h), device=h.device), last]

    def get_input_embeddings(self) -> nn.Module:
        """Of the backbone."""
        return self.backbone.get_input_embeddings()  # type: ignore[operator]

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Of the backbone."""
        self.backbone.gradient_checkpointing_enable(**options)  # type: ignore[operator]
