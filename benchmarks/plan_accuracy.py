"""Predicted against measured: every method on five backbones, each predicted from its configuration alone and then trained for a step.

The backbones are small, so that real steps are cheap, and deep enough to be predicted from copies with fewer blocks. `--write` puts the
tables into docs/plan.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import common
import torch
from torch import nn

import petiole as pt
from petiole.compare.contenders import spelt
from petiole.cost import measure
from petiole.planning.inputs import one_line
from petiole.planning.table import Row
from petiole.proof import default_loss

BATCH, LENGTH = 4, 48
BODY = {"hidden_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4, "intermediate_size": 256}
TOKENS = {"vocab_size": 300, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BACKBONES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "BERT": ("BertConfig", "BertForSequenceClassification", {**BODY, **TOKENS}),
    "Llama": ("LlamaConfig", "LlamaForCausalLM", {**BODY, **TOKENS}),
    "T5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 7, "num_decoder_layers": 8, "num_heads": 4, "decoder_start_token_id": 0, **TOKENS},
    ),
    "ViT": ("ViTConfig", "ViTForImageClassification", {**BODY, "image_size": 32, "patch_size": 4}),
    "AST": ("ASTConfig", "ASTForAudioClassification", {**BODY, "max_length": 96, "num_mel_bins": 32,
                                                  "patch_size": 8, "frequency_stride": 8, "time_stride": 8}),
}  # fmt: skip
# Figure -> the largest error that is allowed.
ALLOWED = {"trainable_parameters": 0.0, "forward_flops": 0.02, "step_flops": 0.02, "saved_bytes": 0.10, "gradient_bytes": 0.0,
           "optimizer_bytes": 0.0, "weight_bytes": 0.0, "peak_bytes": 0.20, "checkpoint_bytes": 0.0}  # fmt: skip
PAGE = Path(__file__).parent.parent / "docs" / "plan.md"


def config_of(name: str) -> Any:
    import transformers

    config, cls, fields = BACKBONES[name]
    return getattr(transformers, config)(architectures=[cls], **fields)


def real(config: Any) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    return getattr(transformers, config.architectures[0])(config)


def filled(shapes: dict[str, list[int]], config: Any) -> dict[str, torch.Tensor]:
    """A batch of these shapes with values in it; the attention mask has a hole, as that of any batch of texts has."""
    generator = torch.Generator().manual_seed(0)
    batch = {}
    for name, shape in shapes.items():
        if name in ("pixel_values", "input_values"):
            batch[name] = torch.randn(shape, generator=generator)
        elif name == "attention_mask":
            batch[name] = torch.ones(shape, dtype=torch.long)
            batch[name][-1, -3:] = 0
        else:
            most = config.num_labels if len(shape) == 1 else config.vocab_size
            batch[name] = torch.randint(most, shape, generator=generator)
    return batch


def errors(row: Row, model: nn.Module, batch: Any, method: Any) -> dict[str, float]:
    """Relative error of each figure of one row."""
    adaptation = pt.attach(model, method)
    adaptation.calibrate([batch])
    cost = measure(model, batch, loss=default_loss, repeats=1, warmup=0)
    found = {
        name: float(getattr(cost, name)) for name in ALLOWED if name not in ("trainable_parameters", "checkpoint_bytes")
    }
    found["trainable_parameters"] = float(cost.parameters.trainable)
    found["checkpoint_bytes"] = float(sum(t.numel() * t.element_size() for t in adaptation.named_tensors().values()))
    return {name: (getattr(row, name) - found[name]) / max(1.0, found[name]) for name in ALLOWED}


def sized(slug: str) -> pt.Method:
    """A method as it is by default; a size that the weights' values would decide is 8 here, since a configuration has no values."""
    method = pt.registry()[slug]()
    return type(method)(**{method.size: 8}) if method.size and getattr(method, method.size) is None else method


def refused(row: Row, model: nn.Module, method: pt.Method) -> dict[str, Any]:
    """A row without figures: whether the real model refuses the method, too."""
    pt.attach(model, method)
    return {"reason": row.reason, "attaches": True}


def accuracy(names: list[str], methods: list[str]) -> dict[str, dict[str, Any]]:
    """Backbone -> method -> relative errors, or the reason why there is none."""
    result: dict[str, dict[str, Any]] = {}
    for name in names:
        config = config_of(name)
        chosen = {slug: sized(slug) for slug in methods}
        plan = pt.plan(config, list(chosen.values()), batch_size=BATCH, length=LENGTH)
        batch = filled(plan.shapes, config)
        rows: dict[str, Any] = {}
        planned = {spelt(method): plan[spelt(method)] for method in chosen.values()}
        for slug, method in chosen.items():
            row, model = planned[spelt(method)], real(config)
            try:
                rows[slug] = (
                    {**errors(row, model, batch, method), "whole": row.whole}
                    if not row.reason
                    else refused(row, model, method)
                )
            except pt.PetioleError as error:
                rows[slug] = {"reason": one_line(error), "attaches": False, "planned": not row.reason}
            print(name, slug, rows[slug], flush=True)
        result[name] = rows
    return result


def llama_7b(methods: list[str]) -> tuple[Any, dict[str, float]]:
    """The plan of Llama-7B for every method, and the seconds of processor time that each took; the first has the preparations."""
    import transformers

    config = transformers.LlamaConfig(architectures=["LlamaForCausalLM"], vocab_size=32000, hidden_size=4096, intermediate_size=11008,
                                      num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32)  # fmt: skip
    times = [time.process_time()]
    plan = pt.plan(config, methods, batch_size=4, length=512, dtype="bfloat16", budget="params=0.5%,memory=24GB",
                   watch=lambda *_: times.append(time.process_time()))  # fmt: skip
    return plan, {name: after - before for name, (before, after) in zip(methods, pairwise(times), strict=True)}


def percent(value: float) -> str:
    return "0" if value == 0 else f"{100 * value:+.2g} %"


def worst(rows: list[dict[str, float]], figure: str) -> float:
    return max((row[figure] for row in rows), key=abs, default=0.0)


def tables(found: dict[str, dict[str, Any]], big: tuple[Any, dict[str, float]] | None) -> str:
    """What goes into the documentation."""
    columns = (
        "trainable_parameters",
        "checkpoint_bytes",
        "forward_flops",
        "step_flops",
        "saved_bytes",
        "optimizer_bytes",
        "peak_bytes",
    )
    heads = ("parameters", "file", "forward FLOPs", "step FLOPs", "saved", "optimiser", "peak")
    lines = ["Largest error, predicted less measured, over all methods that can be attached:", "",
             f"| backbone | methods | {' | '.join(heads)} |", f"|---|---:|{'---:|' * len(heads)}"]  # fmt: skip
    for name, rows in found.items():
        priced = [row for row in rows.values() if "reason" not in row]
        cells = " | ".join(percent(worst(priced, column)) for column in columns)
        lines.append(f"| {BACKBONES[name][1]} | {len(priced)} | {cells} |")
    lines += [
        "",
        "Where they differ at all:",
        "",
        f"| backbone | method | {' | '.join(heads)} |",
        f"|---|---|{'---:|' * len(heads)}",
    ]
    before = len(lines)
    for name, rows in found.items():
        for label, row in rows.items():
            if "reason" not in row and any(row[column] for column in columns):
                lines.append(
                    f"| {BACKBONES[name][1]} | {label} | {' | '.join(percent(row[column]) for column in columns)} |"
                )
    if len(lines) == before:
        lines = lines[:-5]
    methods = sorted({label for rows in found.values() for label, row in rows.items() if "reason" not in row})
    lines += ["", f"Methods: {', '.join(methods)}."]
    if big is not None:
        plan, seconds = big
        slow = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items() if value > 2)
        total, median = sum(seconds.values()), statistics.median(seconds.values())
        lines += [
            "",
            f"Llama-7B, batch of 4 texts of 512 tokens, bfloat16, AdamW: {len(plan.rows)} methods take {total:.0f} s of one core, the median one "
            f"{median:.1f} s"
            + (f"; more than 2 s, because they consist of very many small operations: {slow}." if slow else "."),
            "",
        ]
        parts = [part for part in plan.columns() if part.title != "head"]
        lines += [
            f"| {' | '.join(part.title for part in parts)} |",
            f"|{''.join('---:|' if part.right else '---|' for part in parts)}",
        ]
        lines += [f"| {' | '.join(cells)} |" for cells in zip(*(part.cells for part in parts), strict=True)]
        refusals = [
            f"`{row.label}` ({row.reason.partition(';')[0].removeprefix(row.label + ': ')})"
            for row in plan
            if row.reason
        ]
        if refusals:
            lines += ["", f"Not on this model: {'; '.join(refusals)}."]
    return "\n".join(lines)


def failures(found: dict[str, dict[str, Any]]) -> list[str]:
    """Every figure that is further off than allowed, and every method that is attached but not planned, or the other way round."""
    wrong = []
    for name, rows in found.items():
        for label, row in rows.items():
            if "reason" in row:
                if row["attaches"] or row.get("planned"):
                    wrong.append(f"{name} {label}: {row['reason']}")
                continue
            wrong += [
                f"{name} {label}: {figure} {percent(row[figure])}"
                for figure, most in ALLOWED.items()
                if abs(row[figure]) > most
            ]
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="comma-separated names of backbones")
    parser.add_argument("--methods", default="", help="comma-separated slugs; every registered method if empty")
    parser.add_argument("--no-llama-7b", action="store_true")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here, as one JSON object")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/plan.md")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    methods = asked.methods.split(",") if asked.methods else sorted(pt.registry())
    found = accuracy(asked.only.split(",") if asked.only else list(BACKBONES), methods)
    big = None if asked.no_llama_7b else llama_7b(methods)
    text, wrong = tables(found, big), failures(found)
    print(text)
    print("\n".join(["", f"{len(wrong)} figures off by more than allowed", *wrong]))
    figures = {
        "rows": found,
        "wrong": wrong,
        "versions": common.versions(),
        "llama_7b_seconds": big[1] if big else None,
    }
    common.write(asked.json, json.loads(json.dumps(figures)))
    if asked.write:
        page, start, end = PAGE.read_text(), "<!-- benchmark -->\n", "<!-- /benchmark -->"
        PAGE.write_text(f"{page.partition(start)[0]}{start}{text}\n{end}{page.partition(end)[2]}")


if __name__ == "__main__":
    main()
