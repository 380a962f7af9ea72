"""Small runs that one process and several must do alike; started as a script by each process of `accelerate launch`.

accelerate launch --multi_gpu --num_processes 2 tests/training/scenarios.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import petiole as pt
import tiny
from petiole.errors import TrainingError
from training.toys import Growing, Idle, Pull, arguments, rows

PLAIN = {"lr_scheduler_type": "constant", "learning_rate": 0.02, "save_strategy": "no", "max_steps": 5}
SOON = {"target_rank": 4, "rank_increment": 1, "warmup_steps": 1, "update_interval": 2}  # grows in steps 2, 4, …
METHODS: dict[str, Any] = {
    "terms": lambda: [pt.LoRA(rank=2), Pull(weight=0.05)],
    "causal": lambda: [pt.LoRA(rank=2), Pull(weight=0.05)],
    "grows": lambda: [Growing(), Pull(weight=0.05)],
    "grows-resumed": lambda: [Growing(), Pull(weight=0.05)],
    "shrinks": lambda: Growing(shrinks=True),
    "idles": lambda: Idle(),
    "full": lambda: pt.FullFineTuning(),  # the pooler of this model is used by nothing
    "checkpointing": lambda: pt.LoRA(rank=2),
    "reentrant": lambda: pt.LoRA(rank=2),
    # All experts are taken, so that the balance loss is the same for half a batch; one layer's router has nothing to learn.
    "routed": lambda: pt.MoLA(num_experts=[1, 3], top_k=[1, 3], rank=2, dropout=0.0, balance_weight=0.1),
    # All sites grow at once: scores are the mean of two halves of a batch, whose order may be another.
    "increlora": lambda: pt.IncreLoRA(**SOON, top_k=99, restart_warmup=False, roles=("q", "v")),
    "increlora-picks": lambda: pt.IncreLoRA(**SOON, top_k=1, restart_warmup=False, roles=("q", "v")),
    "triadaptlora": lambda: pt.TriAdaptLoRA(**SOON, growth="fixed", top_k=1),
    "das": lambda: pt.DAS(num_skip=1, bottleneck=3, skip_bottleneck=3, search={"warmup": 0, "every": 1, "samples": 2}),
}
CHANGES: dict[str, dict[str, Any]] = {
    "terms": {"gradient_accumulation_steps": 2, "optim": "sgd", "max_grad_norm": 0.0},
    "causal": {"gradient_accumulation_steps": 2, "optim": "sgd", "max_grad_norm": 0.0},
    "grows": {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "weight_decay": 0.1},
    "grows-resumed": {"max_steps": 6, "weight_decay": 0.1},
    "shrinks": {"max_steps": 8},
    "idles": {"max_steps": 3},
    "full": {"max_steps": 2, "learning_rate": 1e-3},
    "checkpointing": {"activation_checkpointing": True, "max_steps": 2},
    "reentrant": {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": True},
        "max_steps": 2,
    },
    "routed": {"gradient_accumulation_steps": 2, "optim": "sgd", "max_grad_norm": 0.0},
    "increlora": {"max_steps": 6, "weight_decay": 0.1},
    "increlora-picks": {"max_steps": 6, "weight_decay": 0.1},
    "triadaptlora": {"max_steps": 6, "weight_decay": 0.1},
    "das": {"max_steps": 6, "optim": "sgd", "max_grad_norm": 0.0},
}


def data(name: str) -> list[dict[str, Tensor]]:
    made = rows(32)
    if name == "causal":
        for i, row in enumerate(made):
            row["labels"] = row["input_ids"].clone()
            row["labels"][: i % 6] = -100
    return made


def trainer(name: str, folder: Path, processes: int) -> pt.Trainer:
    model = tiny.model({"causal": "llama", "full": "bert"}.get(name, "bert"))
    pt.attach(model, METHODS[name]())
    settings = arguments(folder / name.removesuffix("-resumed"), **{**PLAIN, **CHANGES[name]})
    settings.per_device_train_batch_size = settings.per_device_eval_batch_size = 4 // processes
    return pt.Trainer(model=model, args=settings, train_dataset=data(name), eval_dataset=data(name))


def result(name: str, folder: Path, processes: int = 1, rank: int = 0) -> dict[str, Tensor]:
    """Every number of the adaptation after a run. Of several processes, only the first has rows for the idling delta."""
    run = trainer(name, folder, processes)
    resume = str(folder / "grows" / "checkpoint-3") if name == "grows-resumed" else None
    with pt.given(run.model, chosen=rank == 0):
        run.train(resume_from_checkpoint=resume)
    tuned = run.adaptations["default"]
    remembered = {name: tuned.state[0][name] for name in ("preferences",) if name in tuned.state[0]}
    return {**tuned.named_tensors(folded=False), **remembered}


def differing(folder: Path) -> str:
    """What is said where the processes add other parameters."""
    model = tiny.model("bert")
    pt.attach(model, Growing(different=True))
    settings = arguments(folder / "differing", **PLAIN)
    try:
        pt.Trainer(model=model, args=settings, train_dataset=data("")).train()
    except TrainingError as error:
        return str(error)
    return "nothing"


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    from accelerate import PartialState

    state = PartialState(cpu=True)
    assert state.num_processes == 2, state
    for name in METHODS:
        tensors = result(name, folder, state.num_processes, state.process_index)
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / f"{name}.{state.process_index}.safetensors")
    (folder / f"differing.{state.process_index}.txt").write_text(differing(folder))
    state.wait_for_everyone()
    state.destroy_process_group()  # neither leaves while the other still talks to it


if __name__ == "__main__":
    main(Path(sys.argv[1]))
