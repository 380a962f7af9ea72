"""Methods that save memory in the training step: bytes kept for backward and time of a step, over full fine-tuning's.

LoRA on q and v and on all linears, and PEFT's with and without gradient checkpointing, stand beside them; side networks also with the
cache, from the second epoch on. One process, interleaved, one thread. `--plan` predicts the same bytes at the sizes of T5-base, T5-3B and
Llama-7B instead.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import common
import peft
import torch
from torch import Tensor, nn

import petiole as pt
from petiole.cache import Cache
from petiole.cost import saved_bytes
from petiole.errors import PetioleError
from petiole.method import find, registry

SIDE = ("lst", "unipt", "sherl")
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {}),
    "lora, all linears": ("lora", {"roles": common.LINEARS}),
    "lst": ("lst", {"init": "random"}),
    "unipt": ("unipt", {"reduction_factor": 8}),
    "sherl": ("sherl", {"reduction_factor": 8}),
    "hst": ("hst", {}),
    "meft1": ("meft", {"variant": 1}),
    "meft2": ("meft", {"variant": 2}),
    "meft3": ("meft", {"variant": 3}),
}
LARGE = {
    "T5-base": ("T5Config", "T5ForConditionalGeneration",
                {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "d_kv": 64, "vocab_size": 32128, "decoder_start_token_id": 0}),
    "T5-3B": ("T5Config", "T5ForConditionalGeneration",
              {"d_model": 1024, "d_ff": 16384, "num_layers": 24, "num_heads": 32, "d_kv": 128, "vocab_size": 32128, "decoder_start_token_id": 0}),
    "Llama-7B": ("LlamaConfig", "LlamaForCausalLM", {}),
}  # fmt: skip


def t5(batch: int = 8, length: int = 128, seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    """256 wide, six blocks in each stack."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    config = T5Config(
        d_model=256, d_kv=32, d_ff=1024, num_layers=6, num_heads=8, vocab_size=1000, dropout_rate=0.0, decoder_start_token_id=0
    )  # fmt: skip
    ids = torch.randint(1, 1000, (batch, length))
    return T5ForConditionalGeneration(config), {"input_ids": ids, "labels": ids[:, : length // 2].clone()}


def bert(seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    return common.bert(width=256, layers=12, seed=seed)


BACKBONES: dict[str, Callable[..., tuple[nn.Module, dict[str, Tensor]]]] = {"t5": t5, "bert": bert, "vit": common.vit}


def attached(model: nn.Module, name: str) -> nn.Module | None:
    """The model with a method of this table; None where it has no place."""
    slug, fields = METHODS[name]
    if slug not in registry():
        return None
    try:
        pt.attach(model, find(slug)(**fields))
    except PetioleError as error:
        print(f"  {name}: {' '.join(str(error).split())[:140]}")
        return None
    return model


def candidates(
    make: Callable[..., tuple[nn.Module, dict[str, Tensor]]], seed: int
) -> tuple[dict[str, nn.Module], dict[str, Tensor]]:
    bare, batch = make(seed=seed)
    models: dict[str, nn.Module] = {"full": copy.deepcopy(bare)}
    for name, roles in (
        ("peft lora", ("q", "v")),
        ("peft lora, all linears", common.LINEARS),
        ("peft lora, all linears, checkpointing", common.LINEARS),
    ):
        sites = [site.path for site in pt.anatomy(bare).sites(roles)]
        model = peft.get_peft_model(copy.deepcopy(bare), peft.LoraConfig(r=8, lora_alpha=16, target_modules=sites))
        if name.endswith("checkpointing"):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
            model.enable_input_require_grads()  # type: ignore[operator]
        models[name] = model
    for name in METHODS:
        model = attached(copy.deepcopy(bare), name)
        if model is not None:
            models[name] = model
    return {name: model.train() for name, model in models.items()}, batch


def step(model: nn.Module, batch: dict[str, Tensor], cache: Cache | None = None) -> Callable[[], None]:
    """Forward, backward and the optimiser; with a cache that knows the rows, from what it kept."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    rows = torch.arange(len(next(iter(batch.values()))))

    def run() -> None:
        if cache is None:
            loss = model(**batch).loss
        else:
            with cache.rows(rows):
                loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def measured(found: argparse.Namespace, figures: dict[str, Any]) -> None:
    for backbone, make in BACKBONES.items():
        if found.only and backbone not in found.only.split(","):
            continue
        models, batch = candidates(make, 0)
        saved = {name: saved_bytes(model, batch) for name, model in models.items()}
        steps = {name: step(model, batch) for name, model in models.items()}
        for name in SIDE:
            if name in models:
                steps[f"{name}, cached"] = step(models[name], batch, Cache(models[name]))
        times = common.interleaved(steps, found.repeats)
        rows = {}
        for name in steps:
            middle, low, high = common.ratio(times, name, "full")
            own = saved[name.removesuffix(", cached")] / saved["full"]
            lora = common.ratio(times, name, "lora, all linears")[0]
            rows[name] = {
                "saved_over_full": own,
                "time_over_full": middle,
                "quartiles": [low, high],
                "time_over_lora": lora,
            }
            print(f"{backbone:6}{name:40}{own:10.3f}{middle:10.3f} ({low:.3f}-{high:.3f}){lora:10.3f}", flush=True)
        figures[backbone] = rows


def planned(found: argparse.Namespace, figures: dict[str, Any]) -> None:
    import transformers

    for name, (config, cls, fields) in LARGE.items():
        methods = [find("full")(), *(find(s)(**f) for s, f in METHODS.values() if s in registry())]
        plan = pt.plan(getattr(transformers, config)(architectures=[cls], **fields), methods, batch_size=8, length=128)
        full = next(row for row in plan.rows if row.label == "full")
        figures[name] = {}
        for row in plan.rows:
            if row.saved_bytes is None or row.step_flops is None:
                print(f"{name:10}{row.label:40} {row.reason[:90]}")
                continue
            figures[name][row.label] = {
                "saved_over_full": row.saved_bytes / full.saved_bytes,
                "memory_over_full": row.memory_bytes / full.memory_bytes,
                "flops_over_full": row.step_flops / full.step_flops,
            }
            print(f"{name:10}{row.label:40}" + "".join(f"{value:10.3f}" for value in figures[name][row.label].values()))


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--plan", action="store_true", help="predict the bytes of large models; nothing runs")
    found = common.options(__doc__ or "", repeats=9, parents=[parser])
    figures: dict[str, Any] = {}
    print(f"{found.threads} thread(s); {common.versions('peft')}")
    if found.plan:
        print(f"{'model':10}{'method':40}{'saved':>10}{'memory':>10}{'FLOPs':>10}   over full fine-tuning's")
        planned(found, figures)
    else:
        print(
            f"{'':6}{'method':40}{'saved':>10}{'time':>10}   over full fine-tuning's; last: time over LoRA's on all linears",
            flush=True,
        )
        measured(found, figures)
    figures |= {"threads": found.threads, "repeats": found.repeats, "versions": common.versions("peft")}
    common.write(found.json, figures)


if __name__ == "__main__":
    main()
