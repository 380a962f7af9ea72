"""What causal and sequence-to-sequence language models share: metrics from token losses, and text that is generated and compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from petiole.errors import ConfigError, DataError
from petiole.tasks.base import Task
from petiole.tasks.encoding import Rows
from petiole.tasks.loop import batches, evaluating
from petiole.tasks.metrics import compute, token_scores
from petiole.tasks.quiet import quiet
from petiole.tasks.tokens import Pad, longest, prepare

if TYPE_CHECKING:
    from torch import Tensor, nn

    from petiole.tasks.data import TaskData


TEXT_METRICS = ("exact_match", "rouge_l", "bleu", "chrf")


class LanguageTask(Task):
    """A task whose predictions are tokens.

    Args:
        max_length: tokens that a row is cut to; what the model can take if None.
        max_new_tokens: length at which generation stops.
        generate: also generate texts in `evaluate`; by default where there are references to compare with.
    """

    metric_names: ClassVar[tuple[str, ...]] = ("perplexity", "token_accuracy")
    usual_metric: ClassVar[str] = "perplexity"
    drops_empty_text: ClassVar[bool] = True
    shift: ClassVar[int]  # how far the logits run ahead of the labels

    def __init__(
        self,
        data: TaskData,
        model: str | Path,
        *,
        max_length: int | None = None,
        max_new_tokens: int = 64,
        generate: bool | None = None,
        **kwargs: Any,
    ) -> None:
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens: {max_new_tokens} is below 1")
        if generate and "target" not in data.columns:
            raise ConfigError("generate: needs references to compare with: name the column with target='...'")
        self.has_references = "target" in data.columns
        self.generates = self.has_references if generate is None else generate
        super().__init__(data, model, **kwargs)
        self._note(*prepare(self.processor))
        self.max_length = longest(self.processor, self.config, max_length)
        self.max_new_tokens = max_new_tokens

    @property
    def all_metrics(self) -> tuple[str, ...]:
        return (*self.metric_names, *TEXT_METRICS) if self.generates else self.metric_names

    # ------------------------------------------------------------------------------------------------------------------ metrics

    def reduce(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits (b, t, vocabulary), labels (b, t) -> (b, t - shift, 2): token losses and hits."""
        logits = super().reduce(logits, labels)
        logits = logits[
            :, -labels.shape[1] :
        ]  # a prompt of vectors makes the logits longer than the labels, at their front
        return token_scores(logits[:, : logits.shape[1] - self.shift], labels[:, self.shift :])

    def metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
        return compute(self.metric_names, predictions, labels[:, self.shift :])

    def text_metrics(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        """Metrics of generated texts."""
        return compute(TEXT_METRICS, predictions, references)

    def evaluate(
        self, model: nn.Module, split: str | Any = "validation", *, batch_size: int = 32, **generation: Any
    ) -> dict[str, float]:
        """Perplexity and token accuracy; where there are references, also exact match, ROUGE-L, BLEU and chrF of generated texts.

        Args:
            generation: arguments of `model.generate`; greedy by default.
        """
        found = super().evaluate(model, split, batch_size=batch_size)
        if self.generates:
            raw = self.data.splits[split] if isinstance(split, str) else split
            texts = self.generate(model, raw, batch_size=batch_size, **generation)
            found.update(self.text_metrics(texts, list(self.column(raw, "target"))))
        return found

    # --------------------------------------------------------------------------------------------------------------- generation

    def prompts(self, dataset: Any) -> Rows:
        """Rows of what generation starts from: the input, or the prompt alone."""
        raise NotImplementedError

    @property
    def prompt_collator(self) -> Pad:
        """Rows of `prompts` -> a batch."""
        raise NotImplementedError

    def continuation(self, generated: Tensor, prompt: Tensor) -> Tensor:
        """Of what `generate` returns (b, t), the tokens that are new."""
        return generated

    def generate(self, model: Any, dataset: Any, *, batch_size: int = 32, **generation: Any) -> list[str]:
        """A text for every row. Greedy unless `generation`, the arguments of `model.generate`, says otherwise.

        Raises:
            DataError: the task has no prompts to start from.
        """
        if not self.has_references:
            raise DataError(
                f"{self.data.source}: no column of targets, so no prompt to continue\nName it with target='...'."
            )
        options = {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": False,
            "num_beams": 1,
            "pad_token_id": self.processor.pad_token_id,
            **generation,
        }
        texts: list[str] = []
        with evaluating(model), quiet():
            for batch in batches(self.prompts(dataset), self.prompt_collator, batch_size, model):
                new = self.continuation(model.generate(**batch, **options), batch["input_ids"])
                texts += self.processor.batch_decode(new, skip_special_tokens=True)
        return [text.strip() for text in texts]
