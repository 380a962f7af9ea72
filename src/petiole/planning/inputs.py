"""The two things that a plan needs: a backbone without weights, and a batch without values, both from a configuration."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from petiole.anatomy import Anatomy
from petiole.errors import AttachError, ConfigError, FileError, PetioleError

# Kinds of model by what their labels look like -> the tables of Transformers that list them.
_LABELS = {
    "row": ("SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION", "VIDEO_CLASSIFICATION"),
    "choice": ("MULTIPLE_CHOICE",),
    "span": ("QUESTION_ANSWERING",),
    "token": ("TOKEN_CLASSIFICATION", "MASKED_LM", "CAUSAL_LM"),
    "target": ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "CTC"),
}


# ------------------------------------------------------------------------------------------------------------------- the backbone


def backbone(source: Any, *, dtype: torch.dtype | None, task: str | None, num_labels: int | None) -> nn.Module:
    """A model on the meta device, in training mode.

    Args:
        source: a model (copied without its values), a configuration of Transformers, a folder with config.json, or a name.
        dtype: of the weights; a model's own, or float32, if None.
        task: as `petiole.tasks` names it, for a head of that kind; the checkpoint's own class if None.
        num_labels: classes of the head.

    Raises:
        FileError: there is no such folder, or its configuration builds no model.
        ConfigError: `task` or `num_labels` go with a model that is built already, or there is no such task.
    """
    if isinstance(source, nn.Module):
        if task is not None or num_labels is not None:
            raise ConfigError("task and num_labels are for a configuration; this model has its head already")
        model = weightless(source)
    else:
        model = built(source, task, num_labels)
    config: Any = getattr(model, "config", None)
    if (
        kind_of(type(model).__name__) == "row"
        and getattr(config, "num_labels", 1) > 1
        and getattr(config, "problem_type", "") is None
    ):
        config.problem_type = "single_label_classification"  # else some find it out from the values of the labels
    return (model if dtype is None else model.to(dtype)).train()


def weightless(model: nn.Module) -> nn.Module:
    """A copy on the meta device; tied parameters stay tied, and no value is copied."""
    if "_petiole" in model.__dict__:
        raise AttachError(
            "something is attached to this model: plan from the bare backbone (pt.detach(model) takes it off)"
        )
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if type(tensor) not in (Tensor, nn.Parameter):
            raise AttachError(
                f"{type(model).__name__} holds a {type(tensor).__name__}: plan from its configuration instead"
            )
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def built(source: Any, task: str | None, num_labels: int | None) -> nn.Module:
    import transformers

    name, config = str(source), source
    if isinstance(source, (str, Path)):
        from petiole.tasks.models import load_config
        from petiole.tasks.names import locate_model

        config = load_config(locate_model(source))
    elif not isinstance(source, transformers.PreTrainedConfig):
        raise ConfigError(
            f"{type(source).__name__} is no model, no configuration of Transformers, no folder and no name"
        )
    else:
        name = type(source).__name__
    config = copy.deepcopy(config)
    if num_labels is not None:
        if num_labels < 1:
            raise ConfigError(f"num_labels = {num_labels}: at least 1 is needed")
        config.num_labels = num_labels
    build: Callable[[Any], nn.Module]
    if task is not None:
        build = getattr(transformers, auto_class(task)).from_config
    else:
        known = (getattr(transformers, cls, None) for cls in config.architectures or [])
        build = next((cls for cls in known if cls is not None), transformers.AutoModel.from_config)
    try:
        with torch.device("meta"):
            return build(config)
    except Exception as error:  # a configuration can be wrong in any way
        raise FileError(f"{name}: no model can be built from this configuration\n{one_line(error)}") from error


def auto_class(task: str) -> str:
    """Transformers' class for a task of petiole's."""
    from petiole.tasks.base import registry
    from petiole.tasks.names import nearest

    known = registry()
    if task not in known:
        raise ConfigError(f"task: there is no {task!r}{nearest(task, known)}\nAllowed: {', '.join(known)}.")
    return known[task].auto_model


# ---------------------------------------------------------------------------------------------------------------------- the batch


def synthetic(model: nn.Module, batch_size: int, length: int, found: Anatomy) -> dict[str, Tensor]:
    """A batch of the shapes that a model takes, on the meta device, with what its loss needs.

    Args:
        length: tokens of a text, of a target text, or frames of raw audio. Images and spectrograms have the size that the model asks for.

    Raises:
        ConfigError: the model has no configuration that says what it takes, or no room for so many tokens.
    """
    config, takes = getattr(model, "config", None), parameters(model)
    refusal = ConfigError(f"{type(model).__name__} doesn't say what it takes: give batch=, a mapping of its inputs")
    if config is None or not takes:
        raise refusal
    first = str(getattr(model, "main_input_name", ""))
    batch: dict[str, Tensor] = {}
    if "input_ids" in takes and first in ("input_ids", ""):
        most = positions(model, found)
        if most is not None and length > most:
            raise ConfigError(f"length = {length}: {type(model).__name__} has positions for {most} tokens")
        batch["input_ids"] = whole(batch_size, length)
        if "attention_mask" in takes:
            batch["attention_mask"] = whole(batch_size, length)
    if "pixel_values" in takes and (first == "pixel_values" or "return_loss" in takes):
        batch["pixel_values"] = images(config, batch_size)
    if first in ("input_features", "input_values"):
        batch[first] = sounds(config, batch_size, length)
    if not batch:
        raise refusal
    return batch | labels(model, config, takes, batch, batch_size, length)


def parameters(model: nn.Module) -> set[str]:
    """Names of what a model's forward takes."""
    return set(inspect.signature(type(model).forward).parameters)


def whole(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.long, device="meta")


def positions(model: nn.Module, found: Anatomy) -> int | None:
    """How many positions a text model has a learned vector for; None where it has none, so that any length runs."""
    config: Any = getattr(model, "config", None)
    if not any(site.role == "position_embedding" for site in found.outside) or config is None:
        return None
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    most = getattr(config, "max_position_embeddings", None)
    if not isinstance(most, int) or most <= 0:
        return None
    offset = getattr(config, "pad_token_id", None) if getattr(config, "model_type", "") in _OFFSET else None
    return most - (offset + 1 if isinstance(offset, int) else 0)


# Families that number positions from pad_token_id + 1, as RoBERTa does.
_OFFSET = (
    "roberta",
    "xlm-roberta",
    "camembert",
    "data2vec-text",
    "mpnet",
    "longformer",
    "xmod",
    "roberta-prelayernorm",
    "ibert",
    "esm",
)


def images(config: Any, batch_size: int) -> Tensor:
    config = getattr(config, "vision_config", None) or config
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", None) or 3
    return torch.empty(batch_size, channels, height, width, device="meta")


def sounds(config: Any, batch_size: int, length: int) -> Tensor:
    """A spectrogram of the size that the model was made for, or so many samples that `length` frames come out of its convolutions."""
    bins = getattr(config, "num_mel_bins", None)
    if bins and getattr(config, "max_source_positions", None):  # Whisper: bins first, halved by its convolutions
        return torch.empty(batch_size, bins, 2 * config.max_source_positions, device="meta")
    if bins and getattr(config, "max_length", None):
        return torch.empty(batch_size, config.max_length, bins, device="meta")
    strides, kernels = getattr(config, "conv_stride", None), getattr(config, "conv_kernel", None)
    if strides and kernels:
        samples = length
        for stride, kernel in zip(reversed(strides), reversed(kernels), strict=True):
            samples = (samples - 1) * stride + kernel
        return torch.empty(batch_size, samples, device="meta")
    raise ConfigError(f"{type(config).__name__} doesn't say how long its sounds are: give batch=")


def labels(
    model: nn.Module, config: Any, takes: set[str], batch: Mapping[str, Tensor], batch_size: int, length: int
) -> dict[str, Tensor]:
    """What the loss of a model needs; nothing where it has none of its own."""
    kind = kind_of(type(model).__name__)
    if kind == "span" and "start_positions" in takes:
        return {"start_positions": whole(batch_size), "end_positions": whole(batch_size)}
    if "return_loss" in takes:
        return {"return_loss": True}  # type: ignore[dict-item]
    if kind == "" or "labels" not in takes:
        return {}
    if kind == "choice":
        return {name: whole(batch_size, 2, length) for name in batch} | {"labels": whole(batch_size)}
    if kind == "row":
        classes = getattr(config, "num_labels", 2)
        if classes == 1:
            return {"labels": torch.empty(batch_size, device="meta")}
        if getattr(config, "problem_type", None) == "multi_label_classification":
            return {"labels": torch.empty(batch_size, classes, device="meta")}
        return {"labels": whole(batch_size)}
    if kind == "target" or "input_ids" not in batch:
        most = getattr(config, "max_target_positions", None)
        return {"labels": whole(batch_size, min(length, most) if isinstance(most, int) else length)}
    return {"labels": whole(*batch["input_ids"].shape)}


def kind_of(name: str) -> str:
    """What the labels of a model class look like, by the tables in which Transformers lists it; "" if in none."""
    from transformers.models.auto import modeling_auto as tables

    for kind, parts in _LABELS.items():
        for part in parts:
            listed = getattr(tables, f"MODEL_FOR_{part}_MAPPING_NAMES", {})
            if any(name == entry or (isinstance(entry, (list, tuple)) and name in entry) for entry in listed.values()):
                return kind
    return ""


def checked(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch that the user gave, without its values.

    Raises:
        ConfigError: it is no mapping.
    """
    if not isinstance(batch, Mapping) or not batch:
        raise ConfigError("batch: give a mapping of the model's inputs, as the model is called with: model(**batch)")
    return {k: torch.empty_like(v, device="meta") if isinstance(v, Tensor) else v for k, v in batch.items()}


def longest(task: Any, batch_size: int) -> dict[str, Any]:
    """A batch of a data set's longest training rows: the one that needs most memory.

    Args:
        task: from `petiole.tasks.prepare`.
    """
    rows = task.encoded("train")
    order = list(range(len(rows)))
    if "input_ids" in getattr(rows, "column_names", ()):
        lengths = [tokens_of(row) for row in rows["input_ids"]]
        order.sort(key=lambda i: -lengths[i])
    return dict(task.collator([rows[order[i % len(order)]] for i in range(batch_size)]))


def tokens_of(row: list[Any]) -> int:
    """Tokens of a row, or of its longest text where it has several."""
    return max(map(len, row)) if row and isinstance(row[0], list) else len(row)


def one_line(error: BaseException) -> str:
    """What went wrong, on one line: of petiole's own errors the first two, which say what and why."""
    lines = str(error).splitlines()[:2] if isinstance(error, PetioleError) else str(error).splitlines()
    text = ("; " if isinstance(error, PetioleError) else " ").join(" ".join(line.split()) for line in lines) or type(
        error
    ).__name__
    text = text if len(text) <= 240 else f"{text[:237]}..."
    return text if isinstance(error, PetioleError) else f"{type(error).__name__}: {text}"
