"""An adaptation to a file and back: one safetensors file, strict in every respect."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from petiole import files
from petiole.errors import AttachError, ConfigError, FileError, PetioleError
from petiole.method import Method, registry

if TYPE_CHECKING:
    from petiole.adaptation import Adaptation

HUB = "hub:"
HUB_FILE = "adaptation.petiole.safetensors"


def save(adaptation: Adaptation, path: Path, *, folded: bool = True) -> Path:
    """See `Adaptation.save`."""
    tensors = adaptation.named_tensors(folded)
    state: dict[str, dict[str, Any]] = {}
    for number, values in adaptation.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{number}.state:{name}"] = value.detach()
            else:
                state.setdefault(str(number), {})[name] = value
    files.save_adaptation(path, tensors, header(adaptation, folded, state))
    return path


def header(adaptation: Adaptation, folded: bool, state: dict[str, Any]) -> dict[str, Any]:
    """What the file says about itself."""
    from petiole import __version__
    from petiole.attach import HEAD

    methods = [method.folded() if folded else method for method in adaptation.methods]
    return {
        "petiole": __version__,
        "seed": adaptation.seed,
        "methods": described(methods),
        "head": any(slot.number == HEAD for slot in adaptation.slots),
        "structure": {
            key: structure for key, module in adaptation.modules() if (structure := told(module, "structure"))
        },
        "recipe": {key: recipe for key, module in adaptation.modules() if (recipe := told(module, "recipe"))},
        "state": state,
        "backbone": adaptation.mark,
    }


def described(methods: Sequence[Method]) -> list[dict[str, Any]]:
    """Methods as a file names them; `method_of` reads them back."""
    return [{"slug": m.slug, "version": m.version, "config": m.model_dump(mode="json")} for m in methods]


def load(
    model: nn.Module,
    path: str | Path,
    *,
    name: str | None = None,
    allow_other_backbone: bool = False,
    found: Any = None,
) -> Adaptation:
    """Attach what a file holds, IN PLACE. Everything is checked before anything changes.

    Args:
        model: the same backbone that the file was made on, fresh or with other adaptations.
        path: of the file, or `hub:owner/name`.
        name: of the adaptation in this model; the file's name up to its first dot if None.
        allow_other_backbone: accept another backbone whose sites and shapes fit.
        found: the anatomy, if some of it was named by hand.

    Raises:
        FileError: damaged, altered, of another backbone, of an unknown method or a newer version. The model is as it was.
    """
    from petiole.adaptation import once
    from petiole.anatomy import anatomy
    from petiole.attach import device_of, host_of, install, mark_of, originals, plan, refuse_sharded

    refuse_sharded(model)
    local = pull(str(path)) if str(path).startswith(HUB) else Path(path)
    tensors, about = files.load_adaptation(local)
    methods = [method_of(local, entry) for entry in expect(local, about, "methods", list)]
    host = host_of(model)
    found = found or (host.anatomy if host else anatomy(model))
    mark = mark_of(model, found)
    if not allow_other_backbone:
        differences = files.same_backbone(expect(local, about, "backbone", dict), mark)
        if differences:
            raise FileError(
                f"{local}: made on another backbone: {differences[0]}\nallow_other_backbone=True if that is what you want"
            )
    seed = expect(local, about, "seed", int)
    try:
        made = plan(model, methods, found, seed, expect(local, about, "head", bool))
        structures = expect(local, about, "structure", dict)
        modules: dict[str, nn.Module] = {}
        for key, _, place in made.keyed():
            modules[key] = place.delta
        modules |= {f"{number}.shared": shared for number, shared in made.shared.items()}
        for key, module in modules.items():
            restructure(module, structures.pop(key, {}), device_of(module, model))
        if structures:
            raise FileError(f"{local}: describes {next(iter(structures))}, which this method does not have")
        check_recipes(local, about, modules)
        tensors = unfolded(modules, tensors)
        own = {f"own:{n}": value for n, value in originals(model, made.trained).items()}
    except FileError:
        raise
    except PetioleError as error:
        raise FileError(f"{local}: does not fit this model: {error}") from None
    state, tensors = state_of(local, about, tensors)
    compare(
        local,
        once({f"{key}:{n}": t for key, module in modules.items() for n, t in module.state_dict().items()}) | own,
        tensors,
    )
    short = (
        name
        if name is not None
        else "".join(c if c.isalnum() or c in "-_" else "-" for c in local.name.split(".")[0])[:64] or "default"
    )
    adaptation = install(model, made, found, name=checked(model, short), seed=seed)
    try:
        current = adaptation.named_tensors(folded=False)
        compare(local, current, tensors)  # once more, after everything that a method does on attaching
        with torch.no_grad():
            for key, tensor in current.items():
                tensor.copy_(tensors[key])
    except BaseException:
        adaptation.detach()
        raise
    for number, values in state.items():
        adaptation.state[number].update(values)
    return adaptation


def refill(adaptation: Adaptation, path: Path) -> None:
    """Put a file's values into an adaptation that is attached already: resuming, and going back to the best checkpoint.

    Raises:
        FileError: the file is of another configuration, or does not fit. Nothing has changed then.
    """
    from petiole.attach import device_of, fill

    tensors, about = files.load_adaptation(path)
    if expect(path, about, "methods", list) != described(adaptation.methods):
        raise FileError(
            f"{path}: holds {[m['slug'] for m in about['methods']]} in another configuration than what is attached"
        )
    differences = files.same_backbone(expect(path, about, "backbone", dict), adaptation.mark)
    if differences:
        raise FileError(f"{path}: made on another backbone: {differences[0]}")
    state, tensors = state_of(path, about, tensors)
    structures = expect(path, about, "structure", dict)
    for key, module in adaptation.modules():
        restructure(module, structures.get(key, {}), device_of(module, adaptation.model))
    check_recipes(path, about, dict(adaptation.modules()))
    tensors = unfolded(dict(adaptation.modules()), tensors)
    current = adaptation.named_tensors(folded=False)
    compare(path, current, tensors)
    with torch.no_grad():
        for key, tensor in current.items():
            fill(tensor, tensors[key])
    for number, values in state.items():
        adaptation.state[number].clear()
        adaptation.state[number].update(values)


def told(module: nn.Module, what: str) -> dict[str, Any]:
    """A delta's `structure` or `recipe`; a module that the whole attachment shares may have them, too."""
    found = getattr(module, what, None)
    return found() if callable(found) else {}


def restructure(module: nn.Module, structure: dict[str, Any], device: torch.device) -> None:
    """Give a module the stored sizes, on its device; an empty structure stands for the sizes at construction."""
    if structure == told(module, "structure"):
        return
    rebuild = getattr(module, "restructure", None)
    if not callable(rebuild):
        raise AttachError(f"{type(module).__name__} has no variable structure, but one was stored: {structure}")
    try:
        rebuild(structure)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, PetioleError):
            raise
        raise AttachError(f"{type(module).__name__} can't have the stored structure {structure}: {error}") from None
    module.to(device)


def check_recipes(path: Path, about: dict[str, Any], modules: dict[str, nn.Module]) -> None:
    """What no file holds must have been built here from what it was built from there, whatever else is allowed to differ."""
    mine = {key: recipe for key, module in modules.items() if (recipe := told(module, "recipe"))}
    theirs = expect(path, about, "recipe", dict)
    for key in sorted({*mine, *theirs}):
        one, other = mine.get(key, {}), theirs.get(key)
        if one != other:
            parts = [p for p in one if not isinstance(other, dict) or other.get(p) != one[p]] or ["more than it should"]
            raise FileError(
                f"{path}: {key} has tensors that the file does not hold, and here they would be built from another {parts[0]}"
            )


def unfolded(modules: dict[str, nn.Module], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors, with what was packed for it unpacked."""
    groups: dict[str, dict[str, Tensor]] = {}
    for whole, tensor in tensors.items():
        key, _, name = whole.partition(":")
        groups.setdefault(key, {})[name] = tensor
    for key, group in groups.items():
        if callable(unfold := getattr(modules.get(key), "unfold", None)):
            groups[key] = dict(unfold(group))
    return {f"{key}:{name}": tensor for key, group in groups.items() for name, tensor in group.items()}


def checked(model: nn.Module, name: str) -> str:
    from petiole.attach import adaptations, check_name

    check_name(name)
    if name in adaptations(model):
        raise ConfigError(f"an adaptation called {name!r} is attached already; give pt.load another name=")
    return name


def expect(path: Path, about: dict[str, Any], key: str, kind: type) -> Any:
    value = about.get(key)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise FileError(f"{path}: the header's {key!r} is missing or not a {kind.__name__}")
    return value


def method_of(path: Path, entry: Any) -> Method:
    """The method that a file names: by slug from the registry, never by path or import."""
    if not isinstance(entry, dict) or not isinstance(entry.get("config"), dict):
        raise FileError(f"{path}: an entry of 'methods' is damaged")
    known = registry()
    cls = known.get(str(entry.get("slug")))
    if cls is None:
        raise FileError(f"{path}: method {entry.get('slug')!r} is unknown here; known: {', '.join(known)}")
    if entry.get("version") != cls.version:
        raise FileError(
            f"{path}: written by version {entry.get('version')} of {cls.slug}, this petiole has version {cls.version}"
        )
    try:
        return cls(**entry["config"])
    except ConfigError as error:
        raise FileError(f"{path}: {error}") from None


def state_of(
    path: Path, about: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[int, dict[str, Any]], dict[str, Tensor]]:
    """Split a file's tensors into what methods remember and the rest."""
    state: dict[int, dict[str, Any]] = {}
    count = len(about["methods"])
    for number, values in expect(path, about, "state", dict).items():
        if not number.isdecimal() or int(number) >= count or not isinstance(values, dict):
            raise FileError(f"{path}: the header's state names method {number}, of {count}")
        state[int(number)] = dict(values)
    rest = {}
    for key, tensor in tensors.items():
        number, mark, name = key.partition(".state:")
        if mark and number.isdecimal() and int(number) < count:
            state.setdefault(int(number), {})[name] = tensor
        else:
            rest[key] = tensor
    return state, rest


def compare(path: Path, wanted: dict[str, Tensor], held: dict[str, Tensor]) -> None:
    """Names, shapes and dtypes must be exactly those that the configuration declares."""
    missing, surplus = sorted(set(wanted) - set(held)), sorted(set(held) - set(wanted))
    if missing or surplus:
        raise FileError(
            f"{path}: "
            + (f"{missing[0]} is missing" if missing else f"{surplus[0]} belongs to nothing in this adaptation")
        )
    for key, tensor in wanted.items():
        other = held[key]
        if tensor.shape != other.shape or tensor.dtype != other.dtype:
            raise FileError(
                f"{path}: {key} is {tuple(other.shape)} {other.dtype}, {tuple(tensor.shape)} {tensor.dtype} fits"
            )


def push(
    adaptation: Adaptation, repository: str, *, private: bool = True, message: str = "Upload adaptation", **options: Any
) -> str:
    """Save to a temporary folder and upload that one file."""
    import tempfile

    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as folder:
        path = save(adaptation, Path(folder) / HUB_FILE)
        api = HfApi(**options)
        api.create_repo(repository, private=private, exist_ok=True)
        return str(
            api.upload_file(
                path_or_fileobj=str(path), path_in_repo=HUB_FILE, repo_id=repository, commit_message=message
            )
        )


def pull(name: str) -> Path:
    """Download the one file of `hub:owner/name`."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    repository = name.removeprefix(HUB)
    try:
        return Path(hf_hub_download(repository, HUB_FILE))
    except (EntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise FileError(f"{name}: {str(error).splitlines()[0]}") from None


__all__ = ["load", "pull", "push", "refill", "save"]
