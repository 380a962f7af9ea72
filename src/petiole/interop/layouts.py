"""The tensors and the configuration that PEFT writes: of LoRA and DoRA, of (IA)³, of modules saved whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from petiole.adaptation import Adaptation
from petiole.errors import AttachError
from petiole.interop.changes import Change, gathered, whole_sites
from petiole.interop.names import hit, module_paths, shortest
from petiole.methods.lowrank.ia3 import Rescale

CONFIG = "adapter_config.json"
PREFIX = "base_model.model."


def lora_layout(
    adaptation: Adaptation, changes: list[Change], biases: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and configuration as PEFT's LoRA writes them."""
    tensors: dict[str, Tensor] = {}
    biased = any(change.bias is not None for change in changes)
    for change in changes:
        base = f"{PREFIX}{change.path}"
        if change.site.kind == "embedding":
            tensors |= {f"{base}.lora_embedding_A": change.A, f"{base}.lora_embedding_B": change.B}
            continue
        ones = (1,) * (change.A.ndim - 2)
        tensors |= {f"{base}.lora_A.weight": change.A, f"{base}.lora_B.weight": change.B.view(*change.B.shape, *ones)}
        if biased:  # the change of the output: PEFT scales this bias with the rest
            bias = change.B.new_zeros(change.B.shape[0]) if change.bias is None else change.bias / change.scale
            tensors[f"{base}.lora_B.bias"] = bias.to(change.B.dtype)
        if change.magnitude is not None:
            tensors[f"{base}.lora_magnitude_vector"] = change.magnitude
    paths = {change.path for change in changes}
    tensors |= {f"{PREFIX}{bias_name(name, paths)}": value for name, value in biases.items()}
    alphas = {change.path: number(change.scale * change.rank) for change in changes}
    ranks = {change.path: change.rank for change in changes}
    rank, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    dropouts = {getattr(method, "dropout", 0.0) for method in adaptation.methods}
    config = {
        **general(adaptation, "LORA", list(paths)),
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{path}": r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{path}": a for path, a in alphas.items() if a != alpha},
        "lora_dropout": dropouts.pop() if len(dropouts) == 1 else 0.0,
        "fan_in_fan_out": any(change.site.transposed for change in changes),
        "bias": "all" if biases else "none",
        "lora_bias": biased,
        "use_rslora": False,
        "use_dora": any(change.magnitude is not None for change in changes),
        "init_lora_weights": True,
    }
    return tensors, config


def bias_name(name: str, adapted: set[str]) -> str:
    """Under which name PEFT has a bias of the backbone: a module with LoRA is one deeper."""
    owner, _, attribute = name.rpartition(".")
    return f"{owner}.base_layer.{attribute}" if owner in adapted else name


def rescaled(adaptation: Adaptation) -> dict[str, tuple[str, Tensor, str]] | None:
    """Module path -> (side, ℓ of the whole module, site keys), if the adaptation is nothing but (IA)³ on linears."""
    from petiole.attach import HEAD

    sites = whole_sites(adaptation.host.anatomy)
    found: dict[str, tuple[str, Tensor, str]] = {}
    slots = [slot for slot in adaptation.slots if slot.number != HEAD]
    for slot in slots:
        site, delta = slot.site, slot.delta
        known = sites.get(site.path)
        fits = (
            known is not None
            and known.kind == "linear"
            and type(delta) is Rescale
            and (site.side == "output" or not site.rows)
        )
        if (
            not fits
            or known is None
            or (site.path in found and (site.side == "input" or found[site.path][0] == "input"))
        ):
            return None
        side, gain, keys = found.get(site.path, (site.side, torch.ones(known.at(site.side).size), ""))
        index = range(site.size) if not site.rows else [row for start, stop in site.rows for row in range(start, stop)]
        gain[torch.tensor(list(index))] *= delta.gain.detach().float().cpu()
        found[site.path] = (side, gain, f"{keys}, {site.key}" if keys else site.key)
    return found or None


def ia3_layout(
    adaptation: Adaptation, scaled: Mapping[str, tuple[str, Tensor, str]]
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]:
    """Tensors and configuration as PEFT's IA3 writes them."""
    inputs = [path for path, (side, _, _) in scaled.items() if side == "input"]
    outputs = [path for path in scaled if path not in inputs]
    universe = module_paths(adaptation.model)
    names = shortest(inputs, universe)
    strays = [path for path in outputs if any(hit(path, name, dotted=False) for name in names)]
    names = inputs if strays else names
    config = general(adaptation, "IA3", outputs)
    config["target_modules"] = sorted({*config["target_modules"], *names})
    config |= {"feedforward_modules": names, "init_ia3_weights": True}
    config["fan_in_fan_out"] = any(whole_sites(adaptation.host.anatomy)[path].transposed for path in scaled)
    tensors = {
        f"{PREFIX}{path}.ia3_l": gain[None] if side == "input" else gain[:, None]
        for path, (side, gain, _) in scaled.items()
    }
    return tensors, config, {path: keys for path, (_, _, keys) in scaled.items()}


def general(adaptation: Adaptation, kind: str, paths: list[str]) -> dict[str, Any]:
    """The fields that every PEFT configuration has."""
    model: Any = adaptation.model
    name, config = type(model).__name__, getattr(model, "config", None)
    task = "CAUSAL_LM" if name.endswith(("ForCausalLM", "LMHeadModel")) else None
    task = "SEQ_2_SEQ_LM" if getattr(config, "is_encoder_decoder", False) and hasattr(model, "generate") else task
    place = getattr(model, "name_or_path", None)
    return {
        "peft_type": kind,
        "task_type": task,
        "auto_mapping": None if task else {"base_model_class": name, "parent_library": type(model).__module__},
        "base_model_name_or_path": place if isinstance(place, str) and place else None,
        "inference_mode": True,
        "target_modules": shortest(paths, module_paths(model)),
    }


def number(value: float) -> int | float:
    """A whole number where it is one: readers expect alpha as int."""
    return round(value) if abs(value - round(value)) < 1e-9 * max(1.0, abs(value)) else value


def saved_layout(
    adaptation: Adaptation, saved: Mapping[str, Mapping[str, Tensor]], adapted: set[str]
) -> tuple[list[str], dict[str, Tensor]]:
    """Names for `modules_to_save` and the tensors of every module that PEFT would match with them."""
    if not saved:
        return [], {}
    universe = module_paths(adaptation.model)
    named = sorted(saved)
    held: dict[str, Tensor] = {}
    for path in (
        universe
    ):  # PEFT takes every module whose path ends so: of DistilBERT's `pre_classifier`, `classifier` is the end
        if not any(path.endswith(name) for name in named):
            continue
        inside = [other for other in adapted if other == path or other.startswith(f"{path}.")]
        outer = [other for other in saved if other != path and path.startswith(f"{other}.")]
        if inside or outer:
            raise AttachError(
                f"{path}: PEFT, which matches the ends of paths, would save it whole for {named}, beside {(inside or outer)[0]}"
            )
        state = saved.get(path) or {name: gathered(t) for name, t in bare_state(adaptation.host.module(path)).items()}
        held |= {f"{PREFIX}{path}.{name}": value for name, value in state.items()}
    return named, held


def bare_state(module: nn.Module) -> dict[str, Tensor]:
    """A module's state dict without what petiole added."""
    return {
        name: value
        for name, value in module.state_dict().items()
        if not any(p.startswith("petiole") for p in name.split("."))
    }
