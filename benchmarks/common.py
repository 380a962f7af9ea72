"""What the benchmarks share: backbones, options, interleaved timing, the JSON they write, the picture of their curves."""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def options(about: str, repeats: int, parents: Sequence[argparse.ArgumentParser] = ()) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about, parents=list(parents))
    parser.add_argument("--seeds", type=int, default=1, help="how often everything is repeated with another seed")
    parser.add_argument(
        "--repeats", type=int, default=repeats, help="timed rounds; each round runs every candidate once"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=None, help="write the figures here, as one JSON object")
    parser.add_argument("--only", default="", help="comma-separated names of backbones")
    found = parser.parse_args()
    torch.set_num_threads(found.threads)
    return found


def plotting() -> argparse.ArgumentParser:
    """A parent of `options` for benchmarks that draw."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--plot", type=Path, default=None, help="draw the curves here")
    return parser


def versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in ("torch", "transformers", "petiole", *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def write(path: Path | None, figures: Mapping[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n")


def interleaved(candidates: Mapping[str, Callable[[], None]], repeats: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each candidate, round after round, so that what else the machine does falls on all alike."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(warmup + repeats):
        for name, run in candidates.items():
            gc.disable()
            start = time.perf_counter()
            run()
            seconds = time.perf_counter() - start
            gc.enable()
            if round_ >= warmup:
                times[name].append(seconds)
        gc.collect()
    return times


def ratio(times: Mapping[str, list[float]], name: str, base: str) -> tuple[float, float, float]:
    """Median of the round-by-round ratios, and the quartiles around it."""
    ratios = [a / b for a, b in zip(times[name], times[base], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return statistics.median(ratios), quartiles[0], quartiles[2]


@contextmanager
def curves(path: Path, title: str, x: str, y: str, legend: str = "best") -> Iterator[Any]:
    """Axes to draw on, each curve with its label; the picture is written at the end.

    Args:
        x, y: what the axes say. legend: where it stands.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    axes.set(title=title, xlabel=x, ylabel=y)
    yield axes
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc=legend)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def bars(rows: Sequence[Mapping[str, Any]], key: str) -> list[list[float]]:
    """Lengths of the error bars of `row[key]`, below and above, out to `row["quartiles"]`."""
    reach = [(row[key] - row["quartiles"][0], row["quartiles"][1] - row[key]) for row in rows]
    return [[max(0.0, length) for length in side] for side in zip(*reach, strict=True)]


def bert(
    width: int = 512, layers: int = 6, batch: int = 8, length: int = 128, seed: int = 0
) -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=8, intermediate_size=4 * width, vocab_size=1000, num_labels=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    ids = torch.randint(1000, (batch, length))
    return BertForSequenceClassification(config), {"input_ids": ids, "labels": torch.randint(2, (batch,))}


def llama(
    width: int = 512, layers: int = 6, batch: int = 4, length: int = 256, seed: int = 0
) -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=8, intermediate_size=11 * width // 4,
        vocab_size=1000,
    )  # fmt: skip
    ids = torch.randint(1000, (batch, length))
    return LlamaForCausalLM(config), {"input_ids": ids, "labels": ids.clone()}


def vit(width: int = 192, layers: int = 12, batch: int = 32, seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=3, intermediate_size=4 * width, num_labels=10
    )
    return ViTForImageClassification(config), {
        "pixel_values": torch.randn(batch, 3, 224, 224),
        "labels": torch.randint(10, (batch,)),
    }


LINEARS = ("q", "k", "v", "o", "up", "down")  # roles of all linears of a block
BACKBONES = {"bert": bert, "llama": llama, "vit": vit}
