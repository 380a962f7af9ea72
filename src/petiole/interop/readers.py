"""What each reader of LoRA checkpoints takes. What it can't is refused before anything is written.

PEFT's and diffusers' columns were tried with the packages of that version. vLLM's is read off the documentation of 0.22 (`LoRAConfig`,
`PEFTHelper`, `LoRAModel`): it knows one rank and one alpha for all sites, refuses DoRA and `modules_to_save`, has no place for biases, and
serves ranks up to 512. Embeddings are left out: whether it takes them depends on the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from petiole.anatomy import Site
from petiole.errors import AttachError, ConfigError

ReaderName = Literal["peft", "vllm", "diffusers"]
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank can be
_MAMBA = (
    "falcon_h1",
    "mamba",
    "mamba2",
    "falcon_mamba",
    "nemotron_h",
)  # model types in which PEFT refuses two projections


@dataclass(frozen=True)
class Reader:
    """One reader.

    Attributes:
        title: name and version.
        kinds: of sites that it takes.
        uniform: it knows no ranks and scalings by site: all are brought to one rank, with the scaling inside B.
        largest_rank: 0 for any.
        dora, bias, saved: whether it takes magnitudes, changes of biases, and whole modules (heads, norms).
        weights: name of the file.
    """

    title: str
    kinds: tuple[str, ...]
    uniform: bool = False
    largest_rank: int = 0
    dora: bool = False
    bias: bool = False
    saved: bool = False
    weights: str = "adapter_model.safetensors"


READERS: dict[str, Reader] = {
    "peft": Reader("PEFT 0.21", ("linear", "conv", "embedding"), dora=True, bias=True, saved=True),
    "vllm": Reader("vLLM 0.22", ("linear",), uniform=True, largest_rank=512),
    "diffusers": Reader(
        "diffusers 0.42",
        ("linear", "conv"),
        uniform=True,
        dora=True,
        bias=True,
        weights="pytorch_lora_weights.safetensors",
    ),
}


def reader_of(name: str) -> Reader:
    if name not in READERS:
        raise ConfigError(f"for_ = {name!r}: choose one of {', '.join(READERS)}")
    return READERS[name]


def takes(model: nn.Module, site: Site) -> str:
    """Why PEFT, whose layers or names all three readers build on, can't put LoRA on a module; "" if it can."""
    module, kind = model.get_submodule(site.path), type(model.get_submodule(site.path)).__name__
    if getattr(getattr(model, "config", None), "model_type", "") in _MAMBA and site.path.rpartition(".")[2] in (
        "out_proj",
        "conv1d",
    ):
        return "the fused kernels of this model read its weight past any LoRA, so PEFT refuses it"
    if site.kind == "linear":
        known = isinstance(module, nn.Linear) or (kind == "Conv1D" and hasattr(module, "nf"))
        return "" if known else f"PEFT puts LoRA on torch.nn.Linear and Conv1D, this is a {kind}"
    if site.kind == "embedding":
        return "" if isinstance(module, nn.Embedding) else f"this is a {kind}, no torch.nn.Embedding"
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return f"this is a {kind}, no plain convolution"
    spread = any(step != 1 for step in module.dilation) or module.groups != 1 or module.padding_mode != "zeros"
    return "PEFT leaves out dilation, groups and other padding than zeros" if spread else ""


def refuse_site(reader: Reader, model: nn.Module, key: str, site: Site) -> None:
    """Refuse a site that the reader has no place for.

    Raises:
        AttachError: names the site and says what to do.
    """
    why = (
        f"{reader.title} takes no LoRA on a site of kind {site.kind!r}"
        if site.kind not in reader.kinds
        else takes(model, site)
    )
    if why:
        raise AttachError(f"{key}: {why}\nmerge the adaptation and ship the model instead")
