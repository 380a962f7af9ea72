"""A training step with LoRA (rank 8): time over the frozen floor, over PEFT, and bytes saved for backward over full fine-tuning.

The floor is a forward and the gradient to the inputs only. Everything runs in one process, interleaved; only ratios count.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import common
import peft
import torch
from torch import nn

import petiole as pt
from petiole.cost import saved_bytes

ROLES = {"q,v": ("q", "v"), "all": ("q", "k", "v", "o", "gate", "up", "down")}


def roles_of(model: nn.Module, asked: tuple[str, ...]) -> list[str]:
    found = pt.anatomy(model).roles
    return [role for role in asked if role in found]


def paths_of(model: nn.Module, roles: list[str]) -> list[str]:
    return [site.path for site in pt.anatomy(model).sites(roles)]


def step(model: nn.Module, batch: dict[str, Any], mixed: bool, compiled: bool) -> Callable[[], None]:
    forward = torch.compile(model) if compiled else model

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = forward(**batch).loss
        loss.backward()
        model.zero_grad(set_to_none=True)

    return run


def floor(model: nn.Module, batch: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """All frozen; the gradient goes to the embedded inputs."""
    model.requires_grad_(False)
    batch = dict(batch)
    if "input_ids" in batch:
        batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()  # type: ignore[operator]
    else:
        module = model.vit.embeddings  # type: ignore[union-attr]
        module.register_forward_hook(lambda m, a, o: o.detach().requires_grad_())
    return model, batch


def candidates(
    make: Callable[..., Any], roles: tuple[str, ...], seed: int
) -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    bare, batch = make(seed=seed)
    bare.train()
    chosen = roles_of(bare, roles)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=paths_of(bare, chosen), modules_to_save=None)
    models: dict[str, tuple[nn.Module, dict[str, Any]]] = {
        "floor": floor(copy.deepcopy(bare), batch),
        "full": (copy.deepcopy(bare), batch),
    }
    models["peft"] = (peft.get_peft_model(copy.deepcopy(bare), config), batch)
    models["peft+checkpointing"] = (peft.get_peft_model(copy.deepcopy(bare), config), batch)
    models["petiole"] = (copy.deepcopy(bare), batch)
    models["petiole+checkpointing"] = (copy.deepcopy(bare), batch)
    for name, (model, _) in models.items():
        if name.startswith("petiole"):
            pt.attach(model, pt.LoRA(rank=8, alpha=16, roles=chosen), train_head=False)
        if name.endswith("checkpointing"):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
            if name.startswith("peft"):
                model.enable_input_require_grads()  # type: ignore[operator]
        model.train()
    return models


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--bf16", action="store_true", help="under autocast")
    parser.add_argument("--compile", action="store_true", help="without gradient checkpointing")
    found = common.options(__doc__ or "", repeats=15, parents=[parser])
    figures: dict[str, Any] = {"over_floor": {}, "over_peft": {}, "saved_over_full": {}, "q_v": {}}
    how = f"{'bf16 autocast' if found.bf16 else 'float32'}, {'compiled' if found.compile else 'eager'}"
    print(f"{found.threads} thread(s), {how}; {common.versions('peft')}")
    print(f"{'backbone':9}{'roles':6}{'candidate':24}{'time / floor':>22}{'time / peft':>13}{'saved / full':>14}")
    for backbone, make in common.BACKBONES.items():
        if found.only and backbone not in found.only.split(","):
            continue
        for roles, asked in ROLES.items():
            for seed in range(found.seeds):
                models = candidates(make, asked, seed)
                if found.compile:
                    models = {name: pair for name, pair in models.items() if "checkpointing" not in name}
                mixed = torch.bfloat16 if found.bf16 else None
                saved = {name: saved_bytes(model, batch, autocast=mixed) for name, (model, batch) in models.items()}
                steps = {name: step(*pair, found.bf16, found.compile) for name, pair in models.items()}
                times = common.interleaved(steps, found.repeats)
                rows = {}
                for name in models:
                    middle, low, high = common.ratio(times, name, "floor")
                    rows[name] = {
                        "over_floor": middle,
                        "quartiles": [low, high],
                        "over_peft": common.ratio(times, name, "peft")[0],
                        "saved_over_full": saved[name] / saved["full"],
                    }
                    print(
                        f"{backbone:9}{roles:6}{name:24}{middle:8.3f} ({low:.3f}-{high:.3f}){rows[name]['over_peft']:13.3f}"
                        f"{rows[name]['saved_over_full']:14.3f}",
                        flush=True,
                    )
                if roles == "all":
                    for key in ("over_floor", "over_peft", "saved_over_full"):
                        figures[key][backbone] = rows["petiole"][key]
                    figures.setdefault("rows", {})[f"{backbone}/{seed}"] = rows
                else:
                    figures["q_v"][f"{backbone}/{seed}"] = rows
    figures |= {
        "threads": found.threads,
        "how": how,
        "seeds": found.seeds,
        "repeats": found.repeats,
        "versions": common.versions("peft"),
    }
    common.write(found.json, figures)


if __name__ == "__main__":
    main()
