"""`pt.Trainer`: the HF Trainer that fires method events, saves only what changed, and resumes from the newest whole checkpoint.

Mixed precision, accumulation, gradient checkpointing, early stopping, best checkpoint, distribution: as the HF Trainer gives them.
"""

from __future__ import annotations

import itertools
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer as HFTrainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from petiole import files
from petiole.adaptation import Adaptation
from petiole.attach import host_of, need_host
from petiole.cache import Cache, bytes_of
from petiole.errors import FileError, TrainingError
from petiole.proof import default_loss, untouched
from petiole.recompute import Choice, fit, recomputed
from petiole.store import refill, save
from petiole.training import groups, processes, room
from petiole.training.callback import PetioleCallback, inner
from petiole.training.diagnosis import empty, where
from petiole.training.events import Events, check_state, only_acting
from petiole.training.held_out import HeldOut

SUFFIX = ".petiole.safetensors"
EVENTS = "events.json"
CALIBRATION_BATCHES = 8
ROW = "petiole_row"  # of a batch: the numbers of its rows in the training set


class Trainer(HFTrainer):
    """The HF `Trainer` for a model with adaptations attached. Arguments as there, and:

    Args:
        prove: whether the first step must show that every site was called, and every delta got a gradient and moved.
        cache: "2GB" or bytes of memory in which what the frozen blocks below compute is kept by row, so that later epochs skip them
            (`petiole.cache`); more goes to a temporary file. None for none.
        memory: "4GB" or bytes that a step may hold: just as many blocks are recomputed in the backward pass as it takes
            (`petiole.recompute`), found on the largest of the first batches. None keeps everything.

    A checkpoint holds one petiole file per adaptation instead of the model, and a manifest written last;
    `train(resume_from_checkpoint=True)` takes the newest checkpoint whose manifest holds, and says which it skipped.

    Raises:
        AttachError: nothing is attached.
        TrainingError: a loss or weight is not finite, or something trains in vain.
    """

    model_accepts_loss_kwargs: bool
    train_dataset: Any

    def __init__(
        self,
        *args: Any,
        prove: bool = True,
        cache: int | str | None = None,
        memory: int | str | None = None,
        **kwargs: Any,
    ) -> None:
        given: Any = kwargs.get("args", args[1] if len(args) > 1 else None)
        if (
            given is not None
            and given.should_save
            and (given.save_strategy != "no" or not os.path.isdir(given.output_dir))
        ):
            files.check_writable(given.output_dir)  # the HF Trainer makes the folder now, and says less if it can't
        super().__init__(*args, **kwargs)
        need_host(inner(self.model))
        self.cache_size = None if cache is None else bytes_of(cache, "cache")
        self.memory = None if memory is None else bytes_of(memory, "memory")
        self.cache: Cache | None = None  # while it trains
        self.numbers = False  # whether the loader that is being made keeps the numbers of its rows
        self.recomputes: Choice | None = None  # once it trains
        self.refuse_unfit()
        self.args.logging_nan_inf_filter = False  # the run stops at the first such loss: nothing is left to hide
        self.pop_callback(PetioleCallback)  # one is enough: events must not fire twice
        self.petiole = PetioleCallback(prove=prove)
        self.add_callback(self.petiole)
        self.skipped: list[tuple[Path, str]] = []
        self.divides: bool | None = None  # whether the model divides its loss by the number of items it is given
        self.resumed: dict[str, Any] = {}  # what a checkpoint says about events and groups

    def refuse_unfit(self) -> None:
        """Raises TrainingError: a way of distributing the model that its hooks do not survive."""
        if self.args.n_gpu > 1:
            raise TrainingError(
                f"{self.args.n_gpu} GPUs in one process would get copies of the model without its deltas\n"
                "start one process for each with `accelerate launch`, or show only one with CUDA_VISIBLE_DEVICES"
            )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise TrainingError(
                "FSDP and DeepSpeed shard the parameters, which adaptations can't be saved from; use DDP"
            )
        if self.memory is not None and self.args.activation_checkpointing:
            raise TrainingError(
                "memory= decides how many blocks are recomputed, gradient_checkpointing=True takes all; give one of them"
            )
        if self.cache_size is not None and processes.count() > 1:
            raise TrainingError(
                "cache= keeps rows by process, and every epoch gives them to other processes; train in one process with it"
            )
        if self.cache_size is not None and not hasattr(self.train_dataset, "__len__"):
            raise TrainingError("cache= keeps rows by their number, and this training set is a stream without one")
        reentrant = (self.args.activation_checkpointing_kwargs or {}).get("use_reentrant")
        if self.args.activation_checkpointing and reentrant and processes.count() > 1 and idles(inner(self.model)):
            raise TrainingError(
                "re-entrant gradient checkpointing over several processes needs a gradient for every delta in every step, and "
                f"{idles(inner(self.model))} lets some idle\nset gradient_checkpointing_kwargs={{'use_reentrant': False}}"
            )

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """Over several processes, parameters may go without a gradient (experts, layers that a method leaves out, dropped ranks).

        Only re-entrant checkpointing can't be had with that.
        """
        if self.args.ddp_find_unused_parameters is None and self.model is not None and host_of(inner(self.model)):
            checkpointing = self.args.activation_checkpointing_kwargs or {}
            self.args.ddp_find_unused_parameters = not (
                self.args.activation_checkpointing and checkpointing.get("use_reentrant")
            )
        return super()._build_accelerator_args(**kwargs)

    @property
    def adaptations(self) -> dict[str, Adaptation]:
        return need_host(inner(self.model)).adaptations

    @property
    def events(self) -> Events:
        """Those of the run that goes on, or that has ended."""
        if self.petiole.events is None:
            raise TrainingError("events begin with train()")
        return self.petiole.events

    # ---- training

    def train(self, resume_from_checkpoint: str | os.PathLike[str] | bool | None = None, **kwargs: Any) -> Any:
        """As the HF Trainer's.

        Args:
            resume_from_checkpoint: True for the newest whole checkpoint in `output_dir`, if there is one; or the path of one.

        Raises:
            FileError: the checkpoint is damaged, not finished, or holds no state of the optimiser.
        """
        self.petiole.events, self.resumed = None, {}
        folder = self.checkpoint(resume_from_checkpoint)
        if folder is not None:
            self.resumed = read_events(folder)
        self.petiole.epochs = self.resumed.get("epochs")
        self.petiole.batches = Batches(self)
        if self.eval_dataset is not None:
            self.petiole.held_out = HeldOut(EvalBatches(self), lambda model, batch: self.compute_loss(model, {**batch}))
        if self.args.save_strategy != "no" and self.is_world_process_zero():
            files.check_writable(self.args.output_dir, self.bytes_needed(folder))  # now, not at the first checkpoint
        with ExitStack() as around:
            if self.model_init is None:
                around.enter_context(only_acting(inner(self.model)))
            if self.memory is not None:
                self.recomputes = self.choice(self.memory)
                around.enter_context(recomputed(inner(self.model), self.recomputes.blocks))
            if self.cache_size is not None:
                self.cache = Cache(inner(self.model), self.cache_size)
                around.callback(self.forget)
            return super().train(resume_from_checkpoint=folder and str(folder), **kwargs)

    def choice(self, memory: int) -> Choice:
        """Which blocks are recomputed, found on the largest of the first batches: the same on every process.

        Raises:
            ConfigError: recomputing all of them is not enough.
        """
        model = inner(self.model)
        with torch.random.fork_rng():  # a loader draws from the global generator
            largest = max(
                Batches(self), key=lambda batch: sum(v.numel() for v in batch.values() if isinstance(v, Tensor))
            )
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
        made = type(self.optimizer) if self.optimizer is not None else kind

        def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
            return made(parameters, **({} if self.optimizer is not None else options))

        autocast = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
        buckets = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        return fit(
            model,
            largest,
            memory,
            make=make,
            loss=default_loss,
            autocast=autocast,
            extra_bytes=buckets if processes.count() > 1 else 0,  # DDP's own copies of the gradients
        )

    # ---- rows by number, for the cache

    def forget(self) -> None:
        """Drop what was kept, once the run is over."""
        if self.cache is not None:
            self.cache.close()
        self.cache = None

    def get_train_dataloader(self) -> Any:
        if self.cache is None:
            return super().get_train_dataloader()
        rows = self.train_dataset
        if hasattr(rows, "remove_columns"):  # while it still says which columns it has
            rows = self._remove_unused_columns(rows, description="Training")
        before, self.train_dataset = self.train_dataset, Numbered(rows)
        self.numbers = True
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset, self.numbers = before, False

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        collator = super()._get_collator_with_removed_columns(data_collator, description=description)
        return Numbers(collator) if self.numbers else collator

    def bytes_needed(self, resumed: Path | None) -> int:
        """What the checkpoints of this run will take, beside those that are there."""
        rows = len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else None
        start = step_of(resumed) if resumed is not None else 0
        steps, there = room.total_steps(self.args, rows), len(list(Path(self.args.output_dir).glob("checkpoint-*")))
        return room.checkpoint_bytes(self.adaptations.values()) * room.checkpoints(
            self.args, steps, max(start, 0), there
        )

    def checkpoint(self, wanted: str | os.PathLike[str] | bool | None) -> Path | None:
        """The folder to resume from; None to begin anew."""
        if wanted is None or wanted is False:
            return None
        if wanted is True:
            found = [files.newest_whole(Path(self.args.output_dir))] if self.is_world_process_zero() else [None]
            folder, self.skipped = broadcast_object_list(found)[0]  # all processes go on from the same one
            if self.is_world_process_zero():
                for path, reason in self.skipped:
                    warnings.warn(f"skipped {path}: {reason}", stacklevel=3)
                if folder is None:
                    warnings.warn(f"no whole checkpoint in {self.args.output_dir}: training begins anew", stacklevel=3)
            if folder is None:
                return None
        else:
            folder = Path(wanted)
            whole(folder, "the checkpoint to resume from")
        if not (folder / "optimizer.pt").is_file():
            raise FileError(
                f"{folder} holds no state of the optimiser (save_only_model=True), so training can't go on from it\n"
                f"begin anew from its change: pt.load(model, '{folder}/….{SUFFIX[1:]}')"
            )
        return folder

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._init_training_state(*args, **kwargs)
        best = self.state.best_model_checkpoint
        if self.resumed and best is not None and self.args.load_best_model_at_end:
            whole(Path(best), "the best checkpoint until now")  # better now than at the end of the run
        return found

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.resumed and self.state.global_step >= self.state.max_steps:  # the checkpoint is that of the last step
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        with self.cache.rows(inputs.pop(ROW)) if self.cache is not None else nullcontext():
            num_items_in_batch = self.items_that_count(inputs, num_items_in_batch)
            loss = super().training_step(model, inputs, num_items_in_batch)
        events = self.events
        if self.accelerator.sync_gradients:
            events.synchronise()
        finite, none = torch.isfinite(loss).all(), empty(inputs, num_items_in_batch, loss)
        if not bool(finite & ~none):  # one look at the device
            self.stop(inputs, loss, bool(none))
        events.loss = None  # it has been looked at
        return loss

    def items_that_count(self, inputs: dict[str, Any], items: Any) -> Any:
        """The number of items in this step if the model's loss is divided by it, else None.

        Many models take the number as one more keyword and ignore it: each micro-batch (and process) then adds a whole mean, and the
        HF Trainer leaves that as it is. So the model is asked once, where it matters.
        """
        if self.args.gradient_accumulation_steps == 1 and processes.count() == 1:
            return items
        if (
            self.divides is None
            and items is not None
            and self.compute_loss_func is None
            and self.label_smoother is None
        ):
            answer = divides(inner(self.model), self._prepare_inputs(inputs), items)
            self.divides = broadcast_object_list([answer])[0]
            self.model_accepts_loss_kwargs = self.model_accepts_loss_kwargs and self.divides
        return items if self.model_accepts_loss_kwargs or self.compute_loss_func is not None else None

    def stop(self, inputs: dict[str, Any], loss: Tensor, none: bool) -> None:
        """Raises TrainingError: says why the loss of this batch is of no use."""
        at = f"step {self.state.global_step + 1}"
        if none:
            raise TrainingError(
                f"{at}: every label of this batch is masked (-100), so its loss is empty; look at the data"
            )
        place = where(inner(self.model), self._prepare_inputs(inputs))
        raise TrainingError(
            f"{at}: the loss is {float(loss)}{'; ' if place else ''}{place}\n"
            "lower the learning rate, clip gradients, or look at this batch"
        )

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """As the HF Trainer's. Where the model gave no loss (label smoothing, `compute_loss_func`) or ran compiled, terms come here."""
        events, host = self.petiole.events, need_host(inner(self.model))
        if events is None or not model.training or not torch.is_grad_enabled():
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        host.owes_terms = events.has_terms
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if host.owes_terms and (extra := events.extra_loss()) is not None:
            scaled = self.model_accepts_loss_kwargs and kwargs.get("num_items_in_batch") is not None
            once = self.current_gradient_accumulation_steps if scaled or self.compute_loss_func is not None else 1
            loss = loss + (extra / once).to(loss.device, loss.dtype)
        return (loss, outputs) if return_outputs else loss

    # ---- groups of the optimiser

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Weight decay acts on matrices but for those that a delta excepts; never on vectors: biases, norms, gains, gates."""
        kind = groups.kinds(inner(self.model))
        return [name for name, p in model.named_parameters() if kind.get(id(p), (p.ndim > 1, 1.0))[0]]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        ours = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if ours:
            groups.spread(optimizer, groups.kinds(inner(self.model)))
        if "groups" in self.resumed:
            groups.rebuild(inner(self.model), optimizer, self.resumed["groups"], self.resumed["source"])
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if "groups" in self.resumed:
            groups.set_clocks(scheduler, self.resumed["groups"])
        return scheduler

    # ---- checkpoints: the change alone

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        for name, adaptation in self.adaptations.items():
            save(adaptation, folder / f"{name}{SUFFIX}", folded=False)
        processor: Any = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if hasattr(processor, "save_pretrained"):
            processor.save_pretrained(folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The HF Trainer's, between a folder emptied first and a manifest written last; older checkpoints go only after that.

        Raises:
            FileError: the disk is full. What was half-written is removed; older checkpoints are as they were.
        """
        run = Path(self._get_output_dir(trial=trial))
        folder = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save and folder.is_dir():
            (folder / files.MANIFEST).unlink(missing_ok=True)  # first: half a folder must not look whole
            shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                files.write_json(folder / EVENTS, self.events.state_dict())
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                files.write_manifest(folder)
        except (OSError, RuntimeError) as error:
            if not files.full(error):
                raise
            shutil.rmtree(folder, ignore_errors=True)  # it is not whole, and its bytes are wanted
            older = files.newest_whole(run)[0]
            raise FileError(
                f"{folder} can't be written: the disk is full.\n"
                + (
                    f"{older} is whole: make room, and train(resume_from_checkpoint=True) goes on from it."
                    if older
                    else "Make room, or choose another output_dir."
                )
            ) from error
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate(run, limit, self.state.best_model_checkpoint)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if (Path(checkpoint_folder) / files.MANIFEST).is_file():  # asked for too early otherwise
            super()._push_from_checkpoint(checkpoint_folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        for name, adaptation in self.adaptations.items():
            refill(adaptation, Path(resume_from_checkpoint) / f"{name}{SUFFIX}")

    def _load_best_model(self) -> None:
        folder = Path(str(self.state.best_model_checkpoint))
        whole(folder, "the best checkpoint")
        self._load_from_checkpoint(str(folder))


def whole(folder: Path, what: str) -> None:
    """Raises FileError: a checkpoint is not as it was saved."""
    if problems := files.verify_manifest(folder):
        raise FileError(f"{folder}, {what}, is not whole: {problems[0]}")


def idles(model: nn.Module) -> str:
    """The methods whose deltas may go without a gradient in a step, in words; empty if there is none."""
    return ", ".join(sorted({m.slug for adaptation in groups.acting(model) for m in adaptation.methods if m.idles}))


@torch.no_grad()
def divides(model: nn.Module, inputs: dict[str, Any], items: Any) -> bool:
    """Whether the model's loss is smaller when it is told of twice as many items. Leaves no trace."""
    adaptation = next(iter(need_host(model).adaptations.values()))
    with untouched(adaptation):
        model.eval()
        once, twice = (getattr(model(**inputs, num_items_in_batch=n), "loss", None) for n in (items, 2 * items))
    if once is None or twice is None or not bool(torch.isfinite(once)) or float(once) == 0:
        return True
    return not torch.equal(once, twice)


def read_events(folder: Path) -> dict[str, Any]:
    """What a checkpoint says about events and groups."""
    state = files.read_json(folder / EVENTS)
    check_state(state, folder / EVENTS)
    return {**state, "source": folder / EVENTS}


def rotate(run: Path, limit: int | None, best: str | None) -> None:
    """Keep the newest `limit` finished checkpoints and the best one. Unfinished ones don't count; older than the newest, they go too."""
    if not limit or limit < 1:
        return
    found = {step_of(folder): folder for folder in run.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if step_of(folder) >= 0}
    finished = sorted(step for step, folder in found.items() if (folder / files.MANIFEST).is_file())
    kept = {found[step] for step in finished[-limit:]} | ({Path(best)} if best else set())
    for step, folder in found.items():
        if finished and step < finished[-1] and folder not in kept:
            (folder / files.MANIFEST).unlink(missing_ok=True)  # first: half a folder must not look whole
            shutil.rmtree(folder, ignore_errors=True)


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name, -1 if it is none."""
    step = folder.name.rpartition("-")[2]
    return int(step) if step.isdecimal() and folder.is_dir() else -1


class Numbered(Dataset[dict[str, Any]]):
    """A training set whose rows say which they are."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {**self.rows[number], ROW: int(number)}


class Numbers:
    """A collator that keeps the numbers of rows apart, and hands them on as one more tensor (B,)."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        numbers = [row[ROW] for row in rows]
        batch = self.inner([{name: value for name, value in row.items() if name != ROW} for row in rows])
        return {**batch, ROW: torch.tensor(numbers)}


class Batches:
    """The first training batches, for methods that calibrate: the same on every process, and they can be gone through again.

    Args:
        trainer: whose loader gives them.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.kept: list[dict[str, Any]] | None = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        trainer = self.trainer
        if self.kept is None:
            self.kept = list(itertools.islice(trainer.get_train_dataloader(), CALIBRATION_BATCHES))
            self.kept = broadcast_object_list([self.kept])[0]  # each process has a part of its own
        plain = ({name: value for name, value in batch.items() if name != ROW} for batch in self.kept)
        return (trainer._prepare_inputs(batch) for batch in plain)


class EvalBatches:
    """The batches of a trainer's evaluation set, of the first of several; each process has a part of its own."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def __iter__(self) -> Iterator[dict[str, Any]]:
        several = self.trainer.eval_dataset
        loader = self.trainer.get_eval_dataloader(next(iter(several)) if isinstance(several, dict) else None)
        return (self.trainer._prepare_inputs(batch) for batch in loader)


__all__ = ["Trainer"]
