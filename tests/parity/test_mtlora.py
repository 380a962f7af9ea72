"""MTLoRA against reference results: two layers with a GELU between, the second of which gets a stream for each task."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import linears
import petiole as pt
from linears import Case, set_
from petiole.anatomy import Anatomy
from petiole.method import Place
from petiole.multitask.branching import Tasks
from petiole.multitask.mtlora import MTLoRA
from petiole.multitask.task_linear import TaskLinear

ACTIVATIONS = {
    "gelu": nn.functional.gelu,
    "gelu (erf)": nn.functional.gelu,
    "gelu (tanh)": partial(nn.functional.gelu, approximate="tanh"),
    "relu": nn.functional.relu,
}


class Block(nn.Module):
    def __init__(self, activation: str, *pairs: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.fc1, self.fc2 = (nn.Linear(W.shape[1], W.shape[0], dtype=W.dtype) for W, _ in pairs)
        for layer, (W, b) in zip((self.fc1, self.fc2), pairs, strict=True):
            layer.weight.data, layer.bias.data = W.clone(), b.clone()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Mlp(nn.Module):
    """fc1, activation, fc2. Its stack has two blocks, of which the second is never run."""

    def __init__(self, activation: str, *pairs: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(activation, *pairs), Block(activation, *pairs)])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x)


class Twice(MTLoRA):
    """Both linears of the first block alone; the first opens the streams, the second carries them on."""

    def deltas(self, anatomy: Anatomy) -> Iterator[Place]:
        tasks = Tasks(self.tasks, together=self.mode == "addition")
        for site in anatomy.sites(self.roles, [0]):
            opens = site.role == "up"
            yield Place(site, TaskLinear(self, site, tasks, self.shared_rank(0), self.task_ranks(0), opens))


def built(case: Case) -> tuple[Mlp, dict[str, TaskLinear]]:
    d, hidden, out = (case.option(name) for name in ("in_features", "hidden_features", "out_features"))
    tasks, ranks, scales = case.option("tasks"), case.option("rank_task"), case.option("task_scale")
    assert case.kind == f"mlp_{case.option('mode')}"
    method = Twice(
        tasks=tuple(tasks),
        rank_shared=case.option("rank_shared"),
        rank_task=({task: ranks[task] for task in tasks} if isinstance(ranks, dict) else ranks) if tasks else None,
        scale_shared=case.option("shared_scale"),
        scale_task={task: scales[task] for task in tasks} if isinstance(scales, dict) and tasks else scales or 1.0,
        mode=case.option("mode"),
        dropout=0.0,
        roles=("up", "down"),
        train_norms=False,
    )
    pairs = [(case[f"param.{name}.W"], case[f"param.{name}.b"]) for name in ("fc1", "fc2")]
    assert [tuple(W.shape) for W, _ in pairs] == [(hidden, d), (out, hidden)]
    model = Mlp(case.option("activation", "gelu"), *pairs)
    found = pt.anatomy(model, stacks={"encoder": "blocks"}, roles={"up": "fc1", "down": "fc2"})
    usual = torch.get_default_dtype()
    torch.set_default_dtype(pairs[0][0].dtype)
    try:
        tuned = pt.attach(model, method, found=found)
    finally:
        torch.set_default_dtype(usual)
    layers = dict(zip(("fc1", "fc2"), (slot.delta for slot in tuned.slots), strict=True))
    for name, layer in layers.items():
        for part, parameter in parameters(layer).items():
            set_(parameter, case[f"param.{name}.{part}"])
    return model, layers


def parameters(layer: TaskLinear) -> dict[str, Any]:
    """By their names in the cases."""
    found: dict[str, Any] = {f"task_{X}.{t}": p for X in "AB" for t, p in getattr(layer, f"task_{X}").items()}
    if layer.norm is not None:
        return found | {"norm.weight": layer.norm.weight, "norm.bias": layer.norm.bias}
    return found | {"shared_A": layer.A, "shared_B": layer.B}


def compare(case: Case, layers: dict[str, TaskLinear], shared: Tensor, own: dict[str, Tensor]) -> None:
    case.same("out.y_shared", shared, 1e-5)
    loss = (shared * case["in.g_shared"]).sum()
    for task, y in own.items():
        case.same(f"out.y.{task}", y, 1e-5)
        loss = loss + (y * case[f"in.g.{task}"]).sum()
    loss.backward()
    for name, layer in layers.items():
        for part, parameter in parameters(layer).items():
            if case.get(f"grad.{name}.{part}") is None:
                assert parameter.grad is None or not parameter.grad.any(), f"{name}.{part} got a gradient"
            else:
                case.same(f"grad.{name}.{part}", parameter.grad, 1e-4)


@pytest.mark.parametrize("path", linears.cases("mtlora"))
def test_parity_of_the_batched_streams(path: Path) -> None:
    """Through the hooks of an unchanged module: streams side by side along the batch."""
    with Case(path, "mtlora") as case:
        model, layers = built(case)
        tasks = case.option("tasks")
        seen: list[Tensor] = []
        model.blocks[0].fc1.register_forward_hook(lambda module, args, output: seen.append(output))
        n = len(case["in.x"])
        shared, *own = model(case["in.x"]).split(n)
        hidden, *own_hidden = seen[0].split(n)
        case.same("out.hidden_shared", hidden, 1e-5)
        for task, h in zip(tasks, own_hidden, strict=True):
            case.same(f"out.hidden.{task}", h, 1e-5)
        compare(case, layers, shared, dict(zip(tasks, own, strict=True)))


@pytest.mark.parametrize("path", linears.cases("mtlora"))
def test_parity_of_the_layer_by_task(path: Path) -> None:
    """As the paper calls it: a dictionary of streams."""
    with Case(path, "mtlora") as case:
        model, layers = built(case)
        block, x = model.blocks[0], case["in.x"]
        linear = nn.functional.linear
        hidden, own = layers["fc1"](linear(x, block.fc1.weight, block.fc1.bias), x)
        case.same("out.hidden_shared", hidden, 1e-5)
        for task, h in own.items():
            case.same(f"out.hidden.{task}", h, 1e-5)
        act = block.activation
        hidden, own = act(hidden), {task: act(h) for task, h in own.items()}
        y, own = layers["fc2"](linear(hidden, block.fc2.weight, block.fc2.bias), hidden, own)
        compare(case, layers, y, own)
