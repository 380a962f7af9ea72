"""VL-Adapter against its reference code: adapters of products, with a shared half, and written by hypernetworks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BartConfig, BartModel

import linears
import petiole as pt
from linears import Case, set_

TOLERANCE = 1e-4
ACTIVATIONS = {"gelu_new": "gelu_tanh", "relu": "relu", "gelu": "gelu", "swish": "silu"}
SLOTS = {"feed_forward": "ffn", "self_attention": "attention", "cross_attention": "cross_attention"}


def attached(case: Case, method: type[pt.Method], layers: int = 1, **fields: Any) -> pt.Adaptation:
    """On a BART of the case's width."""
    config = BartConfig(
        d_model=case.option("d"), encoder_layers=layers, decoder_layers=layers, encoder_attention_heads=1,
        decoder_attention_heads=1, encoder_ffn_dim=4, decoder_ffn_dim=4, vocab_size=8, max_position_embeddings=4,
    )  # fmt: skip
    fields |= {"reduction_factor": case.option("reduction_factor"), "activation": ACTIVATIONS[case.option("act")]}
    assert case.option("d") // case.option("reduction_factor") == case.option("bottleneck")
    return pt.attach(BartModel(config), method(train_norms=False, **fields))


def changed(tuned: pt.Adaptation, delta: nn.Module, x: Tensor, task: str) -> Tensor:
    with pt.given(tuned.model, task=task):
        return x + delta(x)


def compacter(case: Case) -> None:
    rank, n = case.option("phm_rank") or None, case.option("phm_dim")
    assert (rank is None) == (case.kind == "compacter_dense")
    assert case["in.x"].shape == (case.option("B"), case.option("T"), case.option("d"))
    tuned = attached(case, pt.Compacter, phm_rank=rank, phm_dim=n)
    delta = tuned.slots[0].delta
    x = case["in.x"].clone().requires_grad_()
    named: dict[str, Tensor] = {"x": x}
    for name, half in zip(("down", "up"), delta.halves("task"), strict=True):
        named |= {f"{name}.phm_rule": half.rule.A[0], f"{name}.b": half.bias}
        named |= {
            f"{name}.{n}": B for n, B in zip(("W",) if rank is None else ("W_left", "W_right"), half.B, strict=True)
        }
    for name, parameter in named.items():
        if name != "x":
            set_(parameter, case[f"param.{name}"])
    for name, half in zip(("down", "up"), delta.halves("task"), strict=True):
        case.same(f"out.H_{name}", half.weight.T, TOLERANCE)
    y = changed(tuned, delta, x, "task")
    case.same("out.y", y, TOLERANCE)
    (y * case["in.grad_out"]).sum().backward()
    for name, tensor in named.items():
        assert tensor.grad is not None
        case.same(f"grad.{name}", tensor.grad, TOLERANCE)


def half_shared(case: Case) -> None:
    tasks, shared = tuple(case.option("tasks")), case.kind.removeprefix("half_shared_")
    tuned = attached(case, pt.VLAdapter, tasks=tasks, sharing=f"half_{shared}")
    delta = tuned.slots[0].delta
    assert sum(p.numel() for p in delta.parameters()) == case.option("n_params")
    for name in ("down", "up"):
        for owner, half in getattr(delta, name).items():
            assert (owner == "shared") == (name == shared)
            for part, parameter in half.named_parameters():
                set_(parameter, case[f"param.{owner}.{name}.{part}"])
    for task in tasks:
        case.same(f"out.{task}", changed(tuned, delta, case["in.x"], task), TOLERANCE)


def hyperformer(case: Case) -> None:
    one, order, layers = case.kind == "hyperformer_one", case.option("block_type_order"), case.option("num_layers")
    assert case["in.x"].shape == (case.option("B"), case.option("T"), case.option("d"))
    stack = "decoder" if "cross_attention" in order else "encoder"
    tuned = attached(
        case,
        pt.Hyperformer,
        layers,
        stack=stack,
        one_hypernet=one,
        task_embedding_dim=case.option("task_embedding_dim"),
        hidden_dim=case.option("task_hidden_dim"),
        projected_dim=case.option("projected_task_embedding_dim"),
    )
    (networks,) = tuned.shared.values()
    writer = networks.stacks[stack]
    assert writer.conditioning.norm.eps == case.option("ln_eps")
    set_(networks.tasks["task"], case["in.task_embedding"])
    set_(writer.layer_embedding, case["param.layer_id_embeddings.weight"])
    generator = "param.task_hypernet.task_embeding_generator"
    theirs = {"enter": f"{generator}.0", "leave": f"{generator}.2", "norm": "param.LayerNorm"}
    for name, theirs_ in theirs.items():
        for part, parameter in getattr(writer.conditioning, name).named_parameters():
            set_(parameter, case[f"{theirs_}.{part}"])
    if one:
        rows = case["param.adapters_block_type.weight"]
        set_(writer.slot_embedding, rows[[order.index(name) for name, role in SLOTS.items() if role in writer.slots]])
    for owner, generators in writer.generators.items():
        prefix = next((f"{name}_" for name, role in SLOTS.items() if role == owner), "")
        for half in ("down", "up"):
            for ours, kind in ((half, "weight"), (f"{half}_bias", "bias")):
                for part, parameter in getattr(generators, ours).named_parameters():
                    set_(parameter, case[f"param.{prefix}{half}_sampler_hyper_net.{kind}_generator.0.{part}"])
    adapters = networks.adapters(tuned.host, "task")
    for slot in tuned.slots:
        name = next(name for name, role in SLOTS.items() if role == slot.site.role)
        out = f"out.layer{slot.site.depth}.{name}"
        case.same(out, changed(tuned, slot.delta, case["in.x"], "task"), TOLERANCE)
        for half in ("down", "up"):
            if case.get(f"{out}.{half}.weight") is not None:
                adapter = adapters["task", stack, slot.site.role][slot.site.depth]
                case.same(f"{out}.{half}.weight", adapter[half], TOLERANCE)


LAYOUTS = {
    "compacter_dense": compacter,
    "compacter_factorised": compacter,
    "half_shared_down": half_shared,
    "half_shared_up": half_shared,
    "hyperformer": hyperformer,
    "hyperformer_one": hyperformer,
}


@pytest.mark.parametrize("path", linears.cases("vl-adapter"))
def test_case(path: Path) -> None:
    with torch.random.fork_rng(devices=[]), Case(path, "vl-adapter") as case:
        torch.manual_seed(0)
        LAYOUTS[case.kind](case)
