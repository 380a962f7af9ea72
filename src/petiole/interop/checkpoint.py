"""Both files of a PEFT checkpoint, read and checked by themselves.

Nothing in them is used as a pattern, a path or a choice of code; what PEFT would match with a regular expression is read as a plain name, or
refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from petiole import files
from petiole.errors import FileError
from petiole.interop.layouts import CONFIG, PREFIX
from petiole.interop.names import matches

WEIGHTS = "adapter_model.safetensors"

# What says nothing that the tensors don't say better, or matters in PEFT alone.
_IDLE = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules", "feedforward_modules",
    "inference_mode", "init_ia3_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config", "megatron_config",
    "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
_READ = {
    "alpha_pattern", "bias", "fan_in_fan_out", "init_lora_weights", "lora_alpha", "lora_bias", "lora_dropout", "r", "rank_pattern",
    "target_modules", "use_dora", "use_rslora",
}  # fmt: skip
# Starts that change the backbone's weights when PEFT attaches: the factors alone would be added to other weights.
_MOVED = ("pissa", "olora", "corda", "loftq", "lora_ga")
_ENDS = (
    ".lora_A.weight", ".lora_B.weight", ".lora_B.bias", ".lora_embedding_A", ".lora_embedding_B", ".lora_magnitude_vector.weight",
    ".lora_magnitude_vector", ".ia3_l",
)  # fmt: skip


class Checkpoint:
    """Both files, read and checked by themselves.

    Attributes:
        ia3, dora: the kind. parts: module path -> end of the name -> tensor. rest: other tensors by name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = files.read_json(folder / CONFIG)
        if not isinstance(config, dict) or config.get("peft_type") not in ("LORA", "IA3"):
            kind = config.get("peft_type") if isinstance(config, dict) else None
            raise FileError(f"{folder / CONFIG}: peft_type is {kind!r}; petiole reads LORA (DoRA included) and IA3")
        self.config: dict[str, Any] = config
        self.ia3 = config["peft_type"] == "IA3"
        self.check_fields()
        self.dora = bool(config.get("use_dora"))
        self.dropout = self.field("lora_dropout", float, 0.0)
        self.rank_stabilised = bool(config.get("use_rslora"))
        self.bias = config.get("bias") or "none"
        if self.bias not in ("none", "all", "lora_only") or (self.bias != "none" and self.ia3):
            raise self.fault(f"bias = {self.bias!r} is none of 'none', 'all', 'lora_only'")
        self.parts: dict[str, dict[str, Tensor]] = {}
        self.rest: dict[str, Tensor] = {}
        self.split(self.read())
        self.check_targets()

    def fault(self, text: str) -> FileError:
        return FileError(f"{self.folder}: {text}")

    def check_fields(self) -> None:
        """Refuse what would change the meaning of the tensors in a way that is not known here."""
        for key, value in self.config.items():
            if key in _IDLE or (key in _READ and not self.ia3) or key in ("target_modules", "fan_in_fan_out"):
                continue
            if value not in (None, False, [], {}, "", 0):
                raise self.fault(
                    f"{CONFIG} sets {str(key)[:60]!r}, which petiole does not read\nlet PEFT merge it, or write it without"
                )
        start = self.config.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_MOVED):
            raise self.fault(
                f"init_lora_weights = {start[:40]!r} means that PEFT also changes the backbone's weights\n"
                "save it once more with PEFT's path_initial_model_for_weight_conversion"
            )

    def field(self, key: str, kind: type, default: Any) -> Any:
        value = self.config.get(key, default)
        fits = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
        if not fits or not math.isfinite(value):
            raise self.fault(f"{key} = {str(value)[:60]!r} in {CONFIG} is no {kind.__name__}")
        return value

    def read(self) -> dict[str, Tensor]:
        """The tensors, finite, without PEFT's prefix."""
        path = self.folder / WEIGHTS
        if not path.exists() and (self.folder / "adapter_model.bin").exists():
            raise self.fault(
                f"holds adapter_model.bin, which petiole never unpickles\nsave it once more with PEFT as {WEIGHTS}"
            )
        data = files.read_bytes(path)
        try:
            tensors = safetensors.torch.load(data)
        except Exception as error:  # damaged in whatever way: the library has several exceptions for that
            raise FileError(f"{path} is no valid safetensors file: {str(error)[:80]!r}") from None
        if not tensors:
            raise FileError(f"{path} holds no tensors")
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise FileError(f"{path} is refused: its tensor {name[:120]!r} holds NaN or infinity.")
        prefixed = all(name.startswith(PREFIX) for name in tensors)
        return {name.removeprefix(PREFIX) if prefixed else name: tensor for name, tensor in sorted(tensors.items())}

    def split(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            end = next((end for end in _ENDS if name.endswith(end)), None)
            if end is None:
                self.rest[name] = tensor
            else:
                self.parts.setdefault(name.removesuffix(end), {})[
                    end.removesuffix(".weight") if "magnitude" in end else end
                ] = tensor
        if not self.parts:
            raise self.fault(f"{WEIGHTS} holds no {'ia3_l' if self.ia3 else 'lora_A'} tensors")
        pairs = ({".lora_A.weight", ".lora_B.weight"}, {".lora_embedding_A", ".lora_embedding_B"})
        more = {".lora_magnitude_vector"} if self.dora else set()
        for path, held in self.parts.items():
            allowed = [{".ia3_l"}] if self.ia3 else [pair | more for pair in pairs]
            if set(held) - {".lora_B.bias"} not in allowed or (
                ".lora_B.bias" in held and not self.config.get("lora_bias")
            ):
                raise self.fault(
                    f"{path[:120]!r} has {', '.join(sorted(end.strip('.') for end in held))}, not what {CONFIG} says"
                )

    def check_targets(self) -> None:
        """The modules that the configuration names and those that have tensors must be the same, as far as they are plain names."""
        targets = self.config.get("target_modules")
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            return  # a pattern, which is not read: the tensors say the same
        stray = next((path for path in self.parts if not any(matches(path, target) for target in targets)), None)
        if stray is not None:
            raise self.fault(f"{WEIGHTS} has {stray[:120]!r}, which target_modules of {CONFIG} doesn't name")

    def by_pattern(self, key: str, path: str, default: Any) -> Any:
        """The entry of `rank_pattern` or `alpha_pattern` for a module. PEFT reads its keys as patterns; plain names mean the same here."""
        table = self.config.get(key) or {}
        if not isinstance(table, dict):
            raise self.fault(f"{key} in {CONFIG} is no table")
        for pattern, value in table.items():
            anchored = pattern.startswith("^")
            name = pattern.removeprefix("^").replace("\\.", ".")
            if not all(
                part.isidentifier() or part.isdecimal() or part.replace("-", "_").isidentifier()
                for part in name.split(".")
            ):
                raise self.fault(
                    f"{key} in {CONFIG} has {pattern[:80]!r}: a pattern, not the name of a module\nwrite it out by module names"
                )
            if path == name or (not anchored and matches(path, name)):
                return value
        return default
