"""Train one adaptation on one task, once: what `petiole tune` does, and what a comparison does many times.

Everything but the learning rate and the method is a `Recipe`, so that two methods are trained alike.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from petiole.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from petiole.adaptation import Adaptation
    from petiole.tasks import Task

OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class Recipe:
    """How training goes.

    Attributes:
        steps: optimiser steps; if None, `epochs` decides.
        epochs: passes over the training split.
        batch_size: rows of a step.
        weight_decay: of AdamW.
        warmup: share of the steps in which the learning rate rises from 0; it then falls to 0, linearly.
        max_grad_norm: gradients are clipped to it; 0 for no clipping.
        precision: bf16 computes under autocast.
    """

    steps: int | None = None
    epochs: float = 3.0
    batch_size: int = 16
    weight_decay: float = 0.01
    warmup: float = 0.1
    max_grad_norm: float = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        for name, holds, allowed in (
            ("steps", self.steps is None or self.steps >= 1, "at least 1"),
            ("epochs", self.epochs > 0 and math.isfinite(self.epochs), "above 0"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("weight_decay", self.weight_decay >= 0, "at least 0"),
            ("warmup", 0 <= self.warmup < 1, "in [0, 1)"),
            ("max_grad_norm", self.max_grad_norm >= 0, "at least 0"),
            ("precision", self.precision in ("fp32", "bf16"), "fp32 or bf16"),
        ):
            if not holds:
                raise ConfigError(f"{name} = {getattr(self, name)}: must be {allowed}")

    def total_steps(self, rows: int) -> int:
        """Optimiser steps over a training split of so many rows."""
        return self.steps or max(1, math.ceil(self.epochs * math.ceil(rows / self.batch_size)))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Course:
    """How a training run went.

    Attributes:
        steps: optimiser steps done.
        seconds: spent in training, without evaluation.
        step_seconds: median over the steps, from the batch at hand to the parameters moved.
        share: processor time over wall time; well below 1 on a CPU, other work was in the way and times are too long.
        losses: (step, mean loss since the last entry).
        scores: (step, score on validation), where it was asked for.
        last: every metric of the last of them, which is taken after the last step.
    """

    steps: int
    seconds: float
    step_seconds: float
    share: float
    losses: list[list[float]] = field(default_factory=list)
    scores: list[list[float]] = field(default_factory=list)
    last: dict[str, float] = field(default_factory=dict)


def train(
    adaptation: Adaptation,
    task: Task,
    recipe: Recipe,
    *,
    learning_rate: float,
    seed: int = 0,
    evaluations: int = 0,
    cache: int | str | None = None,
    memory: int | str | None = None,
    on_step: OnStep | None = None,
    on_start: Callable[[str], None] | None = None,
) -> Course:
    """Train what is attached, IN PLACE.

    Args:
        adaptation: on the model of `task`.
        learning_rate: at its highest.
        seed: of the order of the rows and of dropout.
        evaluations: how often the score on validation is taken, evenly over the run; 0 for never.
        cache, memory: as `pt.Trainer` takes them.
        on_step: called with steps done and steps in all. on_start: called with what is skipped or recomputed, in words.

    Raises:
        TrainingError: a loss or weight is not finite, or something trains in vain.
    """
    if not 0 < learning_rate < math.inf:
        raise ConfigError(f"learning_rate = {learning_rate}: must be above 0")
    from petiole.training import Trainer

    rows = task.encoded("train")
    steps = recipe.total_steps(len(rows))
    with tempfile.TemporaryDirectory(prefix="petiole-") as scratch:  # nothing is written there: nothing is to be saved
        trainer = Trainer(
            model=adaptation.model,
            args=arguments(recipe, steps, learning_rate, seed, scratch),
            train_dataset=rows,
            data_collator=task.collator,
            cache=cache,
            memory=memory,
        )
        if on_start is not None:
            trainer.add_callback(starter(trainer, on_start))
        watch = watcher(trainer, task, recipe, steps, evaluations, on_step)
        start, busy = time.perf_counter(), time.process_time()
        trainer.train()
    whole, busy = time.perf_counter() - start, time.process_time() - busy
    step = statistics.median(watch.times)
    return Course(steps, whole - watch.aside, step, busy / whole, watch.losses, watch.scores, watch.last)


def arguments(recipe: Recipe, steps: int, learning_rate: float, seed: int, folder: str) -> Any:
    """The recipe in the words of Transformers' Trainer."""
    import torch
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=learning_rate,
        weight_decay=recipe.weight_decay,
        warmup_steps=round(recipe.warmup * steps),
        lr_scheduler_type="linear",
        max_grad_norm=recipe.max_grad_norm,
        bf16=recipe.precision == "bf16",
        logging_strategy="steps",
        logging_steps=max(1, steps // 25),
        save_strategy="no",
        eval_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=seed,
        data_seed=seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,  # a task's rows hold model inputs and nothing else
    )


def watcher(trainer: Any, task: Task, recipe: Recipe, steps: int, evaluations: int, on_step: OnStep | None) -> Any:
    """Put a callback on a trainer that keeps losses and scores, and take away the one that prints."""
    from transformers import PrinterCallback, TrainerCallback

    due = {round(steps * i / evaluations) for i in range(1, evaluations + 1)} if evaluations else set()

    class Watcher(TrainerCallback):
        def __init__(self) -> None:
            self.losses: list[list[float]] = []
            self.scores: list[list[float]] = []
            self.last: dict[str, float] = {}
            self.times: list[float] = []
            self.began = self.aside = 0.0  # aside: seconds that are not training

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                self.losses.append([state.global_step, float(logs["loss"])])

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.began = now()

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            start = now()
            self.times.append(start - self.began)
            if state.global_step in due and model is not None:
                self.last = measured(task.evaluate(model, "validation", batch_size=2 * recipe.batch_size), "validation")
                self.scores.append([state.global_step, self.last[task.main_metric]])
            if on_step is not None:
                on_step(state.global_step, steps)
            self.aside += time.perf_counter() - start

    watch = Watcher()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(watch)
    return watch


def starter(trainer: Any, on_start: Callable[[str], None]) -> Any:
    """A callback that says what the trainer skips or recomputes, before the first step."""
    from transformers import TrainerCallback

    class Starter(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            if trainer.recomputes is not None:
                on_start(str(trainer.recomputes))
            if trainer.cache is not None:
                on_start(trainer.cache.summary().partition(";")[0])

    return Starter()


def now() -> float:
    """The time, once a GPU has done what it was given."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def measured(scores: dict[str, float], split: str) -> dict[str, float]:
    """Scores as they are, if all are finite.

    Raises:
        TrainingError: one is not.
    """
    for name, value in scores.items():
        if not math.isfinite(value):
            raise TrainingError(f"{name} on {split} is {value}; lower the learning rate, or look at the data")
    return scores
