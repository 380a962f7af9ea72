"""`pt.Trainer`: the HF Trainer that fires method events, saves only what changed, and resumes from the newest whole checkpoint.

Mixed precision, accumulation, gradient checkpointing, early stopping, best checkpoint, distribution: as the HF Trainer gives them.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer as HFTrainer

from petiole import files
from petiole.adaptation import Adaptation
from petiole.attach import need_host
from petiole.errors import FileError, TrainingError
from petiole.store import refill, save
from petiole.training.callback import PetioleCallback, inner

SUFFIX = ".petiole.safetensors"
CALIBRATION_BATCHES = 8


class Trainer(HFTrainer):
    """The HF `Trainer` for a model with adaptations attached. Arguments as there, and:

    Args:
        prove: whether the first step must show that every site was called, and every delta got a gradient and moved.

    A checkpoint holds one petiole file per adaptation instead of the model, and a manifest written last;
    `train(resume_from_checkpoint=True)` takes the newest checkpoint whose manifest holds, and says which it skipped.

    Raises:
        AttachError: nothing is attached.
        TrainingError: a loss or weight is not finite, or something trains in vain.
    """

    def __init__(self, *args: Any, prove: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        need_host(inner(self.model))
        self.petiole = PetioleCallback(prove=prove)
        self.petiole.accumulates = bool(self.model_accepts_loss_kwargs)
        self.add_callback(self.petiole)
        self.skipped: list[tuple[Path, str]] = []

    @property
    def adaptations(self) -> dict[str, Adaptation]:
        return need_host(inner(self.model)).adaptations

    # ---- training

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:
            newest, self.skipped = files.newest_whole(Path(self.args.output_dir))
            for folder, reason in self.skipped:
                print(f"skipped {folder}: {reason}")
            resume_from_checkpoint = str(newest) if newest is not None else None
        elif isinstance(resume_from_checkpoint, str):
            problems = files.verify_manifest(Path(resume_from_checkpoint))
            if problems:
                raise FileError(f"{resume_from_checkpoint} is not a whole checkpoint: {problems[0]}")
        loader = self.get_train_dataloader
        self.petiole.batches = Batches(
            lambda: itertools.islice(map(self._prepare_inputs, loader()), CALIBRATION_BATCHES)
        )
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        labels = inputs.get("labels")
        if (
            isinstance(labels, torch.Tensor)
            and labels.numel()
            and not labels.is_floating_point()
            and bool((labels == -100).all())
        ):
            raise TrainingError(
                f"step {self.state.global_step + 1}: every label of this batch is masked (-100), so its loss is empty"
            )
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not bool(torch.isfinite(loss).all()):
            raise TrainingError(
                f"step {self.state.global_step + 1}: the loss is {float(loss)}{self.culprit(model, inputs)}\n"
                "lower the learning rate, clip gradients, or look at this batch"
            )
        return loss

    def culprit(self, model: nn.Module, inputs: dict[str, Any]) -> str:
        """Which rows of a batch have an output that is not finite, in words."""
        with torch.no_grad():
            output = model(**self._prepare_inputs(inputs))
        logits = getattr(output, "logits", None)
        if not isinstance(logits, torch.Tensor):
            return ""
        bad = (~torch.isfinite(logits).flatten(1).all(1)).nonzero().flatten().tolist()
        return f" (rows {', '.join(map(str, bad[:8]))} of the batch have logits that are not finite)" if bad else ""

    # ---- checkpoints: the change alone

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        for name, adaptation in self.adaptations.items():
            save(adaptation, folder / f"{name}{SUFFIX}", folded=False)
        if self.processing_class is not None and hasattr(self.processing_class, "save_pretrained"):
            self.processing_class.save_pretrained(folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
        if self.args.should_save and folder.is_dir():
            files.write_manifest(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        for name, adaptation in self.adaptations.items():
            refill(adaptation, Path(resume_from_checkpoint) / f"{name}{SUFFIX}")

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)


class Batches:
    """Batches that can be gone through more than once.

    Args:
        make: a function that starts over.
    """

    def __init__(self, make: Any) -> None:
        self.make = make

    def __iter__(self) -> Any:
        return iter(self.make())
