"""Polyhistor-Lite against an independent implementation, in double precision: adapters of every width that one hypernetwork writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

import linears
import petiole as pt
from linears import Case, set_
from petiole.multitask.written import Lite, Written

TOLERANCE = 1e-8


class Block(nn.Module):
    """An ffn that gives what it gets."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ffn = nn.Linear(width, width, bias=False).double()
        nn.init.eye_(self.ffn.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(x)


class Backbone(nn.Module):
    """Inputs x of each block -> outputs, every block on its own"""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for width in widths)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return [block(x) for block, x in zip(self.blocks, inputs, strict=True)]


def fill(writer: Lite, case: Case, scales: list[int]) -> None:
    for own, theirs in (
        (writer.net.enter, "task_net.0"),
        (writer.net.leave, "task_net.2"),
        (writer.net.norm, "task_norm"),
    ):
        for part in ("weight", "bias"):
            set_(own.get_parameter(part), case[f"param.{theirs}.{part}"])
    writer.net.norm.eps = case.option("ln_eps")
    for half in ("down", "up"):
        for ours, kind in ((half, "weight"), (f"{half}_bias", "bias")):
            for part in ("weight", "bias"):
                set_(
                    writer.templates["adapter"].get_parameter(f"{ours}.{part}"),
                    case[f"param.{half}.{kind}_generator.{part}"],
                )  # type: ignore[operator]
    for task, embedding in writer.tasks.items():
        set_(embedding, case[f"param.task_embedding.{task}"])
    for number, scale in enumerate(scales):
        set_(writer.layers[f"encoder_{number}"], case[f"param.layer_embedding.{number}"])
        if scale > 1:
            set_(writer.kernels[f"encoder_{number}_ffn"], case[f"param.scale_kernel.{number}"])
            set_(writer.bias_kernels[f"encoder_{number}_ffn"], case[f"param.bias_kernel.{number}"].squeeze(-1))


@pytest.mark.parametrize("path", linears.cases("polyhistor"))
def test_case(path: Path) -> None:
    with Case(path, "polyhistor") as case:
        assert case.kind == "lite_generated_adapters" and case.option("dtype") == "float64"
        d0, factor, tasks = case.option("d0"), case.option("reduction_factor"), case.option("tasks")
        assert case.option("n0") == d0 // factor
        stages = zip(case.option("depths"), case.option("stage_scales"), strict=True)
        scales = [scale for depth, scale in stages for _ in range(depth)]
        activations: dict[str, Any] = {"gelu_new": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
        method = pt.Polyhistor(
            tasks=tuple(tasks),
            reduction_factor=factor,
            rank=case.option("rank"),
            task_embedding_dim=case.option("task_embedding_dim"),
            hidden_dim=case.option("task_hidden_dim"),
            projected_dim=case.option("projected_dim"),
            activation=activations[case.option("act")],
        )
        inputs = [case[f"in.x.{i}"] for i in range(len(scales))]
        assert all(x.shape == (case.option("B"), case.option("T"), s * d0) for x, s in zip(inputs, scales, strict=True))
        for order in ("front", "back"):
            model = Backbone([scale * d0 for scale in scales])
            found = pt.anatomy(model, stacks={"encoder": "blocks"}, roles={"ffn": "ffn"})
            tuned = pt.attach(model, method.model_copy(update={"kernel_order": order}), found=found)
            written = [slot.delta for slot in tuned.slots if isinstance(slot.delta, Written)]
            writer = written[0].source[0].double()
            assert isinstance(writer, Lite)
            fill(writer, case, scales)
            for task in tasks:
                with pt.given(model, task=task):
                    for number, y in enumerate(model(inputs)):
                        case.same(f"out.y.{number}.{task}.{order}", y, TOLERANCE)
            for number in (0, len(scales) - 1):
                state = written[number].of_task(tasks[0])
                case.same(f"out.down.weight.{number}.{tasks[0]}.{order}", state[f"down.{tasks[0]}.weight"], TOLERANCE)
                case.same(f"out.up.bias.{number}.{tasks[0]}.{order}", state[f"up.{tasks[0]}.bias"], TOLERANCE)
