"""LoRA, DoRA and (IA)³ checkpoints of PEFT as adaptations.

The names of the tensors say which modules are adapted: each is looked up among the model's own. Everything is checked before the model is
touched.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from petiole.adaptation import Adaptation
from petiole.anatomy import Anatomy, Site, anatomy
from petiole.errors import FileError, PetioleError
from petiole.interop.changes import gathered, whole_sites
from petiole.interop.checkpoint import WEIGHTS, Checkpoint
from petiole.interop.grouping import Setting, methods_for
from petiole.interop.layouts import CONFIG
from petiole.method import Base


def load_peft(
    model: nn.Module, folder: str | Path, *, name: str | None = None, found: Anatomy | None = None, seed: int = 0
) -> Adaptation:
    """Attach a LoRA, DoRA or (IA)³ checkpoint of PEFT, IN PLACE, as petiole's own methods. Everything is checked before anything changes.

    Args:
        model: the backbone that it was trained on; PEFT's files don't say whether it is the same.
        folder: with `adapter_config.json` and `adapter_model.safetensors`, or `hub:owner/name`.
        name: of the adaptation in this model; the folder's name if None.
        found: the anatomy, if some of it was named by hand.
        seed: of what training goes on with (dropout masks of methods that draw their own).

    Returns:
        The adaptation: it trains, saves, merges and detaches like any other.

    Raises:
        FileError: damaged, of another kind, or it does not fit this model. The model is as it was.
    """
    from petiole.attach import HEAD, host_of, install, plan, refuse_sharded
    from petiole.store import HUB, checked

    refuse_sharded(model)
    place = fetched(str(folder)) if str(folder).startswith(HUB) else Path(folder)
    checkpoint = Checkpoint(place)
    host = host_of(model)
    found = found or (host.anatomy if host else anatomy(model))
    reading = Reading(checkpoint, model, found)
    try:
        methods = methods_for(found, reading.settings, reading.ia3, checkpoint.dropout)
        made = plan(model, methods, found, seed, bool(reading.head))
    except PetioleError as error:
        raise FileError(f"{place}: does not fit this model: {error}") from None
    placed = {each.site.path for number, each in made.places if number != HEAD}
    if placed != set(reading.settings):
        odd = sorted(placed ^ set(reading.settings))[0]
        raise FileError(
            f"{place}: {odd} can't be told from other modules by its role and depth, so no method means exactly these"
        )
    values = reading.values(made)
    short = "".join(c if c.isalnum() or c in "-_" else "-" for c in place.absolute().name)[:64].strip("-_") or "default"
    adaptation = install(model, made, found, name=checked(model, name if name is not None else short), seed=seed)
    with torch.no_grad():
        for key, tensor in adaptation.named_tensors(folded=False).items():
            if key in values:
                tensor.copy_(values[key])
    return adaptation


def fetched(name: str) -> Path:
    """Download the two files of `hub:owner/name`."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    repository = name.partition(":")[2]
    try:
        hf_hub_download(repository, WEIGHTS)
        return Path(hf_hub_download(repository, CONFIG)).parent
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise FileError(f"{name}: {str(error).splitlines()[0]}") from None


class Reading:
    """A checkpoint, looked up in a model.

    Attributes:
        settings: module path -> how it is adapted. head: tensors of task heads by the model's names. biases: biases trained in place.
    """

    def __init__(self, checkpoint: Checkpoint, model: nn.Module, found: Anatomy) -> None:
        self.checkpoint, self.model, self.found = checkpoint, model, found
        self.ia3 = checkpoint.ia3
        self.sites = whole_sites(found)
        self.head: dict[str, Tensor] = {}
        self.biases: dict[str, Tensor] = {}
        self.place_rest()
        settings = {path: self.setting(path) for path in checkpoint.parts}
        self.settings = {path: settings[path] for path in self.sites if path in settings}  # in the order of the model
        self.check_heads()

    def fault(self, text: str) -> FileError:
        return self.checkpoint.fault(text)

    def site(self, path: str) -> Site:
        if path in self.sites:
            return self.sites[path]
        known = dict(self.model.named_modules(remove_duplicate=False))
        if path in known:
            raise self.fault(
                f"{path!r} is a {type(known[path]).__name__}, and no linear, convolution or embedding that petiole knows in {self.found.model_class}"
            )
        near = difflib.get_close_matches(path, self.sites, n=1, cutoff=0.3)
        raise self.fault(
            f"{path[:120]!r} is no module of this {self.found.model_class}"
            + (f"; the nearest is {near[0]!r}" if near else "")
        )

    def setting(self, path: str) -> Setting:
        """How one module is adapted; shapes are checked on the way."""
        checkpoint, site, held = self.checkpoint, self.site(path), self.checkpoint.parts[path]
        if self.ia3:
            shape = tuple(held[".ia3_l"].shape)
            if site.kind != "linear" or shape not in ((site.out_features, 1), (1, site.in_features)):
                raise self.fault(
                    f"{path}: ia3_l is {shape}, and ({site.out_features}, 1) or (1, {site.in_features}) fits"
                )
            return Setting(
                site, side="output" if shape[1] == 1 and shape != (1, site.in_features) else self.side(path, shape)
            )
        embedding = site.kind == "embedding"
        A, B = (
            held.get(".lora_embedding_A" if embedding else ".lora_A.weight"),
            held.get(".lora_embedding_B" if embedding else ".lora_B.weight"),
        )
        if A is None or B is None:
            raise self.fault(f"{path} is a{'n' if embedding else ''} {site.kind}, but its tensors are of another kind")
        rank = A.shape[0]
        wanted = ((rank, site.in_features, *site.kernel), (site.out_features, rank, *[1] * len(site.kernel)))
        if (tuple(A.shape), tuple(B.shape)) != wanted:
            raise self.fault(f"{path}: A is {tuple(A.shape)} and B {tuple(B.shape)}, {wanted[0]} and {wanted[1]} fit")
        said = checkpoint.by_pattern("rank_pattern", path, checkpoint.field("r", int, 8))
        if said != rank:
            raise self.fault(f"{path}: its tensors have rank {rank}, {CONFIG} says {str(said)[:40]}")
        alpha = checkpoint.by_pattern("alpha_pattern", path, checkpoint.field("lora_alpha", float, 8))
        if not isinstance(alpha, int | float) or isinstance(alpha, bool):
            raise self.fault(f"{path}: its alpha in {CONFIG} is {str(alpha)[:40]!r}, no number")
        if checkpoint.dora and (
            site.kind != "linear" or tuple(held[".lora_magnitude_vector"].shape) != (site.out_features,)
        ):
            raise self.fault(f"{path}: DoRA is read on linears, with a magnitude of ({site.out_features},)")
        biased = ".lora_B.bias" in held or (checkpoint.bias == "lora_only" and bool(site.bias))
        if ".lora_B.bias" in held and (
            checkpoint.bias != "none" or checkpoint.dora or held[".lora_B.bias"].shape != (site.out_features,)
        ):
            raise self.fault(
                f"{path}: lora_bias beside bias = {checkpoint.bias!r}, DoRA or of another size is not read"
            )
        if ".lora_B.bias" in held and not site.bias:
            if bool(held[".lora_B.bias"].any()):
                raise self.fault(f"{path}: the file changes its bias, but it has none")
            biased = False
        if checkpoint.dora and checkpoint.bias != "none":
            raise self.fault(f"DoRA with bias = {checkpoint.bias!r} is not read")
        return Setting(
            site, rank, float(alpha), checkpoint.rank_stabilised, checkpoint.dora, biased, checkpoint.bias == "all"
        )

    def side(self, path: str, shape: tuple[int, ...]) -> str:
        """Side of an ℓ; where its shape fits both, as the configuration says."""
        site = self.sites[path]
        if (site.out_features, 1) != (1, site.in_features):
            return "input"
        named = self.checkpoint.config.get("feedforward_modules")
        return "input" if isinstance(named, list) and any(path.endswith(str(name)) for name in named) else "output"

    def place_rest(self) -> None:
        """Task heads, biases, and copies of the backbone's own tensors."""
        own: dict[str, Tensor] = dict(self.model.named_parameters(remove_duplicate=False))
        own |= dict(self.model.named_buffers(remove_duplicate=False))
        heads = tuple(f"{site.path}." for site in self.found.heads())
        for name, tensor in self.checkpoint.rest.items():
            path = name.replace(".base_layer.", ".")
            if path not in own:
                near = difflib.get_close_matches(path, own, n=1, cutoff=0.3)
                raise self.fault(
                    f"{name[:120]!r} is no tensor of this {self.found.model_class}"
                    + (f"; the nearest is {near[0]!r}" if near else "")
                )
            if own[path].shape != tensor.shape:
                raise self.fault(
                    f"{name} is {tuple(tensor.shape)}, {tuple(own[path].shape)} fits"
                    + ("; give the model as many classes" if path.startswith(heads) else "")
                )
            if self.checkpoint.bias != "none" and path.endswith("bias") and not path.startswith(heads):
                self.biases[path] = tensor
            elif path.startswith(heads):
                self.head[path] = tensor
            elif not same(own[path], tensor):
                raise self.fault(
                    f"it replaces {path}, which is no task head: petiole does not read that\n"
                    "let PEFT merge it, or have the head alone in modules_to_save"
                )

    def check_heads(self) -> None:
        """A head comes whole or not at all."""
        for site in self.found.heads():
            names = {
                f"{site.path}.{name}"
                for name in self.model.get_submodule(site.path).state_dict()
                if "petiole" not in name
            }
            held = names & set(self.head)
            if not held or held == names:
                continue
            if self.checkpoint.bias != "all" or not all(name.endswith("bias") for name in held):
                raise self.fault(f"the task head {site.path} is not whole: {min(names - held)} is missing")
            own = dict(self.model.named_parameters(remove_duplicate=False))  # the head's bias comes with all others
            if all(same(own[name], self.head[name]) for name in held):
                self.head = {name: tensor for name, tensor in self.head.items() if name not in held}
            else:
                self.head |= {name: gathered(own[name]) for name in names - held}

    def values(self, made: Any) -> dict[str, Tensor]:
        """The tensors by the names that the planned adaptation has for them."""
        from petiole.attach import HEAD

        values: dict[str, Tensor] = {}
        for key, number, place in made.keyed():
            site = place.site
            if number == HEAD:
                values |= {
                    f"{key}:module.{n.removeprefix(f'{site.path}.')}": t
                    for n, t in self.head.items()
                    if n.startswith(f"{site.path}.")
                }
                continue
            held = self.checkpoint.parts[site.path]
            if self.ia3:
                values[f"{key}:gain"] = held[".ia3_l"].flatten()
                continue
            embedding = site.kind == "embedding"
            values[f"{key}:A"] = held[".lora_embedding_A" if embedding else ".lora_A.weight"]
            values[f"{key}:B"] = held[".lora_embedding_B" if embedding else ".lora_B.weight"].flatten(1)
            if self.checkpoint.dora:
                values[f"{key}:magnitude"] = held[".lora_magnitude_vector"]
            if self.settings[site.path].bias:
                values[f"{key}:delta_bias"] = self.delta_bias(site, held, place.delta.scale)
        unread = set(self.biases)
        if self.checkpoint.bias == "lora_only":
            unread -= {f"{path}.{self.sites[path].bias}" for path in self.settings}
        for name in made.trained:
            if name in unread:
                values[f"own:{name}"] = self.biases[name]
                unread.discard(name)
        own = dict(self.model.named_parameters(remove_duplicate=False))
        changed = [name for name in sorted(unread) if not same(own[name], self.biases[name])]
        if changed:
            raise self.fault(f"it changes {changed[0]}, which no method of petiole trains here")
        return values

    def delta_bias(self, site: Site, held: Mapping[str, Tensor], scale: float) -> Tensor:
        """Δb: PEFT keeps it unscaled beside B, or as the new bias."""
        if ".lora_B.bias" in held:
            return held[".lora_B.bias"].float() * scale
        base = Base(site, self.model.get_submodule(site.path)).bias
        assert base is not None
        new = self.biases.get(f"{site.path}.{site.bias}")
        return torch.zeros(site.out_features) if new is None else new.float() - base.float().cpu()


def same(own: Tensor, other: Tensor) -> bool:
    """Whether a tensor is a copy of the backbone's own, in whatever precision."""
    mine = gathered(own).cpu()
    return bool(torch.equal(mine.to(other.dtype), other) or torch.equal(mine, other.to(mine.dtype)))
