"""An adaptation as a LoRA checkpoint that PEFT, vLLM or diffusers can read.

Factors go out as they are: on a part of a fused projection as a block of a larger one, so that the whole stays exact. What doesn't factor
goes out as the nearest product of a wanted rank, with its relative error; beyond a bound the export is refused. All is computed and
checked before the first byte is written, and the folder appears whole or not at all.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from petiole import files
from petiole.adaptation import Adaptation
from petiole.errors import AttachError, ConfigError, FileError
from petiole.interop.changes import Change, collect, gathered, limited, whole_sites
from petiole.interop.layouts import CONFIG, PREFIX, bare_state, ia3_layout, lora_layout, rescaled, saved_layout
from petiole.interop.measuring import measured
from petiole.interop.readers import VLLM_RANKS, Reader, ReaderName, reader_of


@dataclass(frozen=True)
class Exported:
    """One module of an export: which sites it serves, its rank, and ‖ΔW - s B A‖ / ‖ΔW‖."""

    path: str
    sites: str
    rank: int
    error: float


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        modules: one entry for each module, with its relative error.
        saved: modules written whole (task heads, norms).
        largest_change: of the first output on the batch that `check` gave, beside `largest_output`; None without a batch.
        notes: what the reader has to be told.
    """

    folder: Path
    reader: str
    kind: str
    modules: tuple[Exported, ...]
    saved: tuple[str, ...] = ()
    largest_change: float | None = None
    largest_output: float | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and dictionaries, for JSON."""
        return {**asdict(self), "folder": str(self.folder)}

    def __str__(self) -> str:
        ranks = sorted({module.rank for module in self.modules if module.rank})
        about = f", rank {ranks[0]}{f' to {ranks[-1]}' if len(ranks) > 1 else ''}" if ranks else ""
        lines = [f"{self.folder}: {self.kind} on {len(self.modules)} modules for {self.reader}{about}"]
        inexact = [module for module in self.modules if module.error]
        lines += [f"  {m.sites} ({m.path}): rank {m.rank}, relative error {m.error:.2g}" for m in inexact]
        if not inexact:
            lines.append("  every change factors: exact")
        if self.saved:
            lines.append(f"  written whole: {', '.join(self.saved)}")
        if self.largest_change is not None:
            lines.append(
                f"  largest change of an output: {self.largest_change:.2g} (largest output: {self.largest_output:.2g})"
            )
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def export(
    adaptation: Adaptation,
    folder: str | Path,
    *,
    for_: ReaderName = "peft",
    rank: int | None = None,
    max_error: float = 0.01,
    check: Mapping[str, Any] | None = None,
) -> Export:
    """See `Adaptation.export`."""
    reader = reader_of(for_)
    target = Path(folder)
    if rank is not None and rank < 1:
        raise ConfigError(f"rank = {rank}: 1 or more, or None for as small as max_error allows")
    if not 0 <= max_error < 1:
        raise ConfigError(f"max_error = {max_error}: a relative error in [0, 1)")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not an empty folder; choose another")
    if adaptation.merged or adaptation.host.adaptations.get(adaptation.name) is not adaptation:
        raise AttachError(
            f"{adaptation.name!r} is {'merged' if adaptation.merged else 'not attached'}; export it while it is attached and unmerged"
        )
    if reader.title.startswith("diffusers") and not hasattr(adaptation.model, "load_lora_adapter"):
        raise AttachError(f"{type(adaptation.model).__name__} is no model of diffusers (it has no load_lora_adapter)")
    saved, biases = whole_modules(adaptation, reader)
    scaled = rescaled(adaptation) if reader.saved and rank is None and not biases else None
    if scaled is not None:
        tensors, config, keys = ia3_layout(adaptation, scaled)
        modules, kind = tuple(Exported(path, key, 0, 0.0) for path, key in keys.items()), "IA3"
        changes: list[Change] = []
    else:
        changes = collect(adaptation, reader, rank, max_error, biases=not biases)
        changes = changes or [nothing(adaptation)]
        refuse_errors(changes, max_error)
        if reader.uniform:
            changes = uniform(changes)
        refuse_changes(reader, changes)
        tensors, config = lora_layout(adaptation, changes, biases)
        modules = tuple(Exported(c.path, c.key, c.rank, c.error) for c in changes)
        kind = "DoRA" if config["use_dora"] else "LoRA"
    difference, largest = (None, None) if check is None else measured(adaptation, changes, check)
    named, held = saved_layout(adaptation, saved, {module.path for module in modules})
    config["modules_to_save"] = named or None
    tensors |= held
    write(adaptation, target, reader, tensors, config)
    notes = notes_for(reader, modules)
    return Export(target, reader.title, kind, modules, tuple(saved), difference, largest, notes)


def whole_modules(adaptation: Adaptation, reader: Reader) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """What is no change of a weight by factors.

    Returns:
        Modules to write whole (path -> tensors), and the biases trained in place, if they are all that trains so.
    """
    from petiole.attach import HEAD, HeadDelta

    host = adaptation.host
    saved: dict[str, dict[str, Tensor]] = {}
    for slot in adaptation.slots:
        if slot.number == HEAD:
            assert isinstance(slot.delta, HeadDelta)
            saved[slot.site.path] = {name: gathered(value) for name, value in slot.delta.module.state_dict().items()}
    heads = tuple(f"{site.path}." for site in host.anatomy.heads())
    own = [name for name in adaptation.own if not name.startswith(heads)]
    only_biases = bool(own) and all(
        name.rpartition(".")[2] == "bias" and adaptation.own[name].ndim == 1 for name in own
    )
    biases = {name: gathered(host.tensor(name)) for name in own} if only_biases else {}
    sites = whole_sites(host.anatomy)
    for name in adaptation.own:
        owner, _, attribute = name.rpartition(".")
        head = next((head[:-1] for head in heads if name.startswith(head)), None)
        if (only_biases and head is None) or (
            owner in sites and attribute in (sites[owner].parameter, sites[owner].bias)
        ):
            continue
        path = head or owner
        module = host.module(path)
        if not path or (head is None and any(not child.startswith("petiole") for child, _ in module.named_children())):
            raise AttachError(
                f"{name} is trained in place, and stands in no module of its own that {reader.title} could be given\nmerge and ship the model instead"
            )
        saved[path] = {key: gathered(value) for key, value in bare_state(module).items()}
    if saved and not reader.saved:
        raise AttachError(
            f"{min(saved)} is trained, but {reader.title} reads no whole modules (modules_to_save)\nexport for 'peft', or merge and ship the model"
        )
    if biases and not reader.saved:
        raise AttachError(
            f"{min(biases)} is trained in place, but {reader.title} reads no biases\nexport for 'peft', or merge and ship the model"
        )
    return saved, biases


def nothing(adaptation: Adaptation) -> Change:
    """A LoRA that changes nothing: the layout has no place for biases or heads alone."""
    sites = [site for site in whole_sites(adaptation.host.anatomy).values() if site.kind == "linear"]
    if not sites:
        raise AttachError(
            f"{type(adaptation.model).__name__} has no linear on which the checkpoint could have its LoRA"
        )
    site = min(sites, key=lambda site: site.in_features + site.out_features)
    zero = torch.zeros(site.out_features, site.in_features)
    A, B, error, needed = limited(zero, None, 0.0)
    return Change(site, "none", A, B, 1.0, None, None, error, needed, lambda: zero)


def refuse_errors(changes: list[Change], max_error: float) -> None:
    """Refuse what the wanted rank leaves too much of."""
    bad = [change for change in changes if change.error > max_error]
    if bad:
        worst = max(bad, key=lambda change: change.error)
        some = f"{len(bad)} of {len(changes)} modules"
        raise AttachError(
            f"{worst.key}: rank {worst.rank} leaves a relative error of {worst.error:.2g}, max_error is {max_error:g} ({some})\n"
            f"rank = {max(change.needed for change in bad)} would keep within it; or allow more, or merge and ship the model"
        )


def refuse_changes(reader: Reader, changes: list[Change]) -> None:
    """Refuse what the reader has no place for."""
    biased = next((change.key for change in changes if change.bias is not None), None)
    if biased and not reader.bias:
        raise AttachError(
            f"{biased}: its bias changes, and {reader.title} reads no biases\nmerge and ship the model instead"
        )
    if biased and any(change.site.kind == "embedding" for change in changes):
        raise AttachError(
            f"{biased}: its bias changes, and PEFT takes no changed biases beside an embedding's LoRA\nmerge and ship the model instead"
        )
    largest = max(changes, key=lambda change: change.rank)
    if reader.largest_rank and largest.rank > reader.largest_rank:
        raise AttachError(
            f"{largest.key}: rank {largest.rank}, but {reader.title} takes at most {reader.largest_rank}\ngive rank=, or merge and ship the model"
        )


def uniform(changes: list[Change]) -> list[Change]:
    """One rank for all, padded with zeros, and the scaling inside B."""
    rank = max(change.rank for change in changes)
    for change in changes:
        missing = rank - change.rank
        change.A = torch.cat([change.A, change.A.new_zeros(missing, *change.A.shape[1:])])
        change.B = nn.functional.pad(change.B * change.scale, (0, missing))
        change.scale = 1.0
    return changes


def write(
    adaptation: Adaptation, target: Path, reader: Reader, tensors: dict[str, Tensor], config: dict[str, Any]
) -> None:
    """Write both files to a new folder beside, then give it its name."""
    if reader.title.startswith("diffusers"):
        part = "unet" if type(adaptation.model).__name__.startswith("UNet") else "transformer"
        tensors = {f"{part}.{name.removeprefix(PREFIX)}": value for name, value in tensors.items()}
    plain = {name: value.detach().cpu().clone().contiguous() for name, value in sorted(tensors.items())}
    bad = next((name for name, value in plain.items() if not bool(torch.isfinite(value).all())), None)
    if bad is not None:
        raise FileError(
            f"{target} can't be written: the tensor {bad} holds NaN or infinity.\nTraining went wrong before; export an earlier state."
        )
    files.check_writable(target.absolute().parent)
    beside = target.with_name(f".{target.name}-{secrets.token_hex(4)}.tmp")
    try:
        beside.mkdir()
        files.write_bytes(beside / reader.weights, safetensors.torch.save(plain, metadata={"format": "pt"}))
        if not reader.title.startswith("diffusers"):
            files.write_json(beside / CONFIG, config)
        if target.exists():
            target.rmdir()
        os.replace(beside, target)
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{target}: can't be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def notes_for(reader: Reader, modules: tuple[Exported, ...]) -> tuple[str, ...]:
    if reader.title.startswith("vLLM"):
        largest = max(module.rank for module in modules)
        return (
            f"start vLLM with --enable-lora --max-lora-rank {next(rank for rank in VLLM_RANKS if rank >= largest)}",
        )
    return ()
