"""Load a backbone for a task with its classes' names and a head drawn from a seed; load what turns raw data into its inputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from petiole.anatomy import anatomy
from petiole.errors import AnatomyError, ConfigError, FileError, need
from petiole.tasks.names import ModelPlace, listed, one_line
from petiole.tasks.quiet import quiet

Head = Literal["auto", "fresh", "keep"]
_NO_CODE = {"trust_remote_code": False}  # what a model's repository holds is never run


def load_config(place: ModelPlace, revision: str | None = None) -> Any:
    """The model's configuration."""
    return _pretrained("AutoConfig", place, revision=revision, **_NO_CODE)


def load_processor(auto_class: str, place: ModelPlace, revision: str | None = None) -> Any:
    """The model's own tokenizer, image processor (on Pillow: torchvision isn't needed) or feature extractor."""
    if auto_class == "AutoTokenizer" and place.local and not _has_vocabulary(Path(place.name)):
        # Transformers would make up a tokenizer that knows no word, and say nothing.
        raise FileError(
            f"{place.name}: can't load the tokenizer\nThe folder has no vocabulary (tokenizer.json, vocab.txt, vocab.json or *.model)."
        )
    extra = {"backend": "pil"} if auto_class == "AutoImageProcessor" else {}
    return _pretrained(auto_class, place, revision=revision, **extra, **_NO_CODE)


def load_model(
    auto_class: str,
    place: ModelPlace,
    *,
    label_names: Sequence[str] = (),
    head: Head = "auto",
    seed: int = 0,
    dtype: torch.dtype | str = "float32",
    revision: str | None = None,
    options: dict[str, Any] | None = None,
) -> tuple[nn.Module, list[str]]:
    """The model in evaluation mode, and what there is to say about it. See `Task.build_model` for the arguments."""
    names, notes = list(label_names), list[str]()
    config = load_config(place, revision)
    own = [config.id2label[i] for i in range(config.num_labels)] if names and config.id2label else []
    if head == "keep" and names and len(own) != len(names):
        raise ConfigError(f"head: 'keep' needs a model of {len(names)} classes; {place.name} has {len(own)}")
    if names:
        _name_classes(config, names)
    with seeded(seed), quiet():
        model, info = _pretrained(
            auto_class,
            place,
            config=config,
            revision=revision,
            dtype=as_dtype(dtype),
            use_safetensors=True,
            ignore_mismatched_sizes=bool(names),
            output_loading_info=True,
            **(options or {}),
            **_NO_CODE,
        )
        missing, reshaped = set(info["missing_keys"]), {key[0] for key in info["mismatched_keys"]}
        new = _new_head(model, missing | reshaped, head, own == names) if names else set[str]()
    _whole(place, model, missing - new, reshaped - new, notes)
    if new:
        notes.append(f"head drawn afresh from seed {seed}: {listed(sorted(new))}")
    elif names:
        notes.append("head kept from the checkpoint")
    return model.eval(), notes


def _name_classes(config: Any, names: Sequence[str]) -> None:
    config.num_labels = len(names)
    # A checkpoint may have been trained for another; with one output, which scores, Transformers refuses to read this one.
    config.problem_type = "single_label_classification" if len(names) > 1 else None
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}


def empty_model(
    auto_class: str,
    place: ModelPlace,
    *,
    label_names: Sequence[str] = (),
    revision: str | None = None,
    options: dict[str, Any] | None = None,
) -> nn.Module:
    """The same model on the meta device: every shape and no value, for counting."""
    config = load_config(place, revision)
    if label_names:
        _name_classes(config, label_names)
    transformers = need("compare", "transformers")
    with torch.device("meta"):
        return getattr(transformers, auto_class).from_config(config, **(options or {}), **_NO_CODE).eval()


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """ "bfloat16" -> torch.bfloat16.

    Raises:
        ConfigError: not a floating-point type of torch.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"dtype: {dtype!r} is no floating-point type\nAllowed: float32, bfloat16, float16, float64.")
    return found


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch draws from `seed` on the CPU inside; the global generator stands where it stood afterwards."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)  # this one alone: torch.manual_seed would reach the GPUs' as well
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _has_vocabulary(folder: Path) -> bool:
    named = ("tokenizer.json", "vocab.txt", "vocab.json", "tekken.json")
    return any((folder / name).is_file() for name in named) or any(folder.glob("*.model"))


def _pretrained(auto_class: str, place: ModelPlace, **options: Any) -> Any:
    transformers = need("compare", "transformers")
    load: Callable[..., Any] = getattr(transformers, auto_class).from_pretrained
    if place.local:
        options = {**options, "local_files_only": True, "revision": None}
    try:
        with quiet():
            return load(
                place.name, **{key: value for key, value in options.items() if key != "revision" or value is not None}
            )
    except Exception as error:  # a folder may be damaged in any way, the network too
        what = {
            "AutoConfig": "configuration",
            "AutoTokenizer": "tokenizer",
            "AutoImageProcessor": "image processor",
        }.get(auto_class, "feature extractor" if auto_class == "AutoFeatureExtractor" else f"model as {auto_class}")
        raise FileError(f"{place.name}: can't load the {what}\n{one_line(error)}") from error


def _beside(model: Any) -> dict[str, nn.Module]:
    """What stands beside the backbone, by path: all of the head, a dense layer before the last one too. Else what anatomy finds."""
    base = getattr(model, "base_model", model)
    beside = {name: child for name, child in model.named_children() if child is not base}
    if base is not model and beside:
        return beside
    try:
        return {site.path: model.get_submodule(site.path) for site in anatomy(model).heads()}
    except AnatomyError:
        return {}


@torch.no_grad()
def _new_head(model: Any, lost: set[str], head: Head, same_classes: bool) -> set[str]:
    """Names of the head's tensors if it is new: drawn by loading, where the checkpoint had none or another size, or drawn here."""
    beside = _beside(model)
    names = {f"{path}.{name}" for path, child in beside.items() for name, _ in child.named_parameters()}
    if head == "keep" or (head == "auto" and same_classes and not names & lost):
        if names & lost:
            raise ConfigError(f"head: 'keep', but the checkpoint has no {min(names & lost)}\nUse head='fresh'.")
        return set()
    if not names:  # a model that doesn't tell backbone from head: what was not in the file must be the head
        if not lost:
            raise ConfigError(
                f"head: {type(model).__name__} doesn't say what its head is\nUse head='keep' to take the model as it is."
            )
        return lost
    if not names <= lost:
        for child in beside.values():
            for module in child.modules():
                _redraw(model, module)
    return names


def _redraw(model: Any, module: nn.Module) -> None:
    """Initialise one module again, by the model's own rule."""
    own = list(module.parameters(recurse=False))
    for tensor in own:
        tensor._is_hf_initialized = False  # type: ignore[attr-defined]  # Transformers' mark of what was loaded
    model._init_weights(module)
    for tensor in own:
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]


def _whole(place: ModelPlace, model: nn.Module, missing: set[str], reshaped: set[str], notes: list[str]) -> None:
    """The backbone must come from the checkpoint. What stands outside its blocks, as a pooler, may be missing; that is said."""
    if reshaped:
        raise FileError(
            f"{place.name}: {min(reshaped)} has another shape in the file than config.json asks for\nThe two don't belong together."
        )
    inside = {name for name in missing if re.search(r"\.\d+\.", name)}
    if inside or len(missing) > sum(1 for _ in model.parameters()) / 2:
        raise FileError(
            f"{place.name}: {len(missing)} tensors of {type(model).__name__} are not in the file (first: {min(inside or missing)})\n"
            "This checkpoint belongs to another kind or size of model."
        )
    if missing:
        notes.append(f"not in the checkpoint, so drawn afresh: {listed(sorted(missing), most=6)}")
