"""A merged model as a folder: what `petiole merge` writes, for anything that reads Transformers models and knows nothing of petiole."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from petiole import files
from petiole.adaptation import Adaptation
from petiole.errors import ConfigError, FileError
from petiole.store import load

CHECK_ROWS = 16


def merged(
    model: str,
    adaptation: Path,
    output: Path,
    *,
    data: str | None = None,
    task: str = "auto",
    columns: Mapping[str, str] | None = None,
    other: bool = False,
) -> dict[str, Any]:
    """Load, merge, save; the folder appears whole or not at all.

    Args:
        model, adaptation: the backbone and the file made on it.
        output: a folder that is not there yet, or is empty.
        data: of the task. Gives the classes their names, and rows on which the change of the outputs through merging is measured.
        other: accept another backbone than that of the file.

    Raises:
        AttachError: something in the adaptation can't be merged.
        ConfigError, FileError: the folder is taken; the kind of model can't be told without data.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} exists and is not an empty folder; choose another --output")
    tuned, processor, batch = loaded(model, adaptation, data=data, task=task, columns=columns, other=other)
    backbone = tuned.model
    if not hasattr(backbone, "save_pretrained"):
        raise ConfigError(
            f"{type(backbone).__name__} is no class of Transformers, so no folder would be read by it\n"
            "keep the adaptation as a file: pt.load, petiole eval"
        )
    change = tuned.merge(check=batch)
    tuned.detach()
    save(backbone, processor, output)
    size = sum(path.stat().st_size for path in output.iterdir() if path.is_file())
    count = None if batch is None else len(next(iter(batch.values())))
    return {
        "folder": str(output),
        "bytes": size,
        "largest_change": change,
        "rows": count,
        "methods": [m.slug for m in tuned.methods],
    }


def loaded(
    model: str,
    adaptation: Path,
    *,
    data: str | None = None,
    task: str = "auto",
    columns: Mapping[str, str] | None = None,
    other: bool = False,
) -> tuple[Adaptation, Any, dict[str, Any] | None]:
    """An adaptation on its backbone, the processor, and some rows of the data as a batch, if there are data."""
    batch: dict[str, Any] | None = None
    if data is not None:
        from petiole.tasks import load_data, prepare

        bound = prepare(load_data(data, task=task, columns=dict(columns or {}) or None), model)
        backbone, processor = bound.build_model(), bound.processor
        rows = bound.encoded("validation" if "validation" in bound.data.splits else "train")
        batch = bound.collator([rows[i] for i in range(min(CHECK_ROWS, len(rows)))])
    else:
        backbone, processor = from_file(model, adaptation)
    return load(backbone, adaptation, allow_other_backbone=other), processor, batch


def from_file(model: str, adaptation: Path) -> tuple[Any, Any]:
    """The backbone with a head of the size that the file holds, and its processor.

    The file says the name of its model's class; it is only compared with the classes that petiole's tasks use for this backbone.
    """
    import transformers

    from petiole.tasks import locate_model, registry
    from petiole.tasks.models import load_config, load_model, load_processor

    tensors, about = files.load_adaptation(adaptation)
    place = locate_model(model)
    config = load_config(place)
    mark = about.get("backbone")
    wanted = mark.get("class") if isinstance(mark, dict) else None
    for kind in registry().values():
        if kind.tables:  # its models stand inside another, which the file would name
            continue
        mapping = getattr(transformers, kind.auto_model)._model_mapping
        cls = mapping[type(config)] if type(config) in mapping.keys() else None  # noqa: SIM118  # it is no dictionary
        names = [c.__name__ for c in (cls if isinstance(cls, tuple | list) else [cls]) if c is not None]
        if wanted in names:
            classes = classes_of(tensors, place.name) if any(column.kind == "label" for column in kind.columns) else 0
            backbone, _ = load_model(kind.auto_model, place, label_names=[str(i) for i in range(classes)])
            return backbone, load_processor(kind.auto_processor, place)
    raise ConfigError(
        f"{adaptation}: made on a {wanted}, which {model} is not known to be\nGive the task's data: --data."
    )


def classes_of(tensors: Mapping[str, Any], model: str) -> int:
    """How many classes the head in a file tells apart: the shortest output of its matrices."""
    from petiole.attach import HEAD

    heads = [t for name, t in tensors.items() if t.ndim == 2 and name.startswith(f"{HEAD}.")]
    heads = heads or [
        t for name, t in tensors.items() if t.ndim == 2 and name.startswith(("own:classifier", "own:score"))
    ]
    if not heads:
        raise ConfigError(
            f"{model}: the file holds no task head, so the number of classes is unknown\nGive the task's data: --data."
        )
    return int(min(tensor.shape[0] for tensor in heads))


def save(model: Any, processor: Any, output: Path) -> None:
    """Write model and processor to a new folder beside, then give it its name."""
    files.check_writable(output.absolute().parent)
    beside = output.with_name(f".{output.name}-{secrets.token_hex(4)}.tmp")
    try:
        model.save_pretrained(beside)
        processor.save_pretrained(beside)
        if output.exists():
            output.rmdir()
        os.replace(beside, output)
    except OSError as error:
        raise FileError(f"{output}: can't be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
