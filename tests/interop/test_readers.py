"""vLLM and diffusers: what they can't take is refused, what they take is laid out as they read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import petiole as pt
import tiny
from petiole.errors import AttachError

pytestmark = pytest.mark.filterwarnings("ignore")


def first(model: nn.Module, name: str) -> Tensor:
    model.eval()
    with torch.no_grad():
        output: Any = model(**tiny.batch(name))
    return output.logits if hasattr(output, "logits") else output[0]


def shaken(name: str, methods: Any, **options: Any) -> tuple[nn.Module, pt.Adaptation]:
    model = tiny.model(name)
    tuned = pt.attach(model, methods, **options)
    for number, parameter in enumerate(tuned.parameters()):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        with torch.no_grad():
            parameter.add_(0.05 * noise)
    return model, tuned


def test_vllm_gets_one_rank_and_no_scaling(tmp_path: Path) -> None:
    methods = [pt.LoRA(rank=4), pt.LoRA(rank=2, alpha=3.0, roles=("q", "down"), layers=(0,))]
    _, tuned = shaken("llama", methods)
    done = tuned.export(tmp_path / "out", for_="vllm")
    assert "--max-lora-rank 8" in str(done)  # vLLM serves 1, 8, 16, …
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (6, 6) and isinstance(config["lora_alpha"], int)
    assert not config["rank_pattern"] and not config["alpha_pattern"] and not config["modules_to_save"]
    assert config["bias"] == "none" and not config["use_dora"] and not config["lora_bias"]
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for slot in tuned.slots:
        if slot.site.role == "v":  # what it computes: B A x · alpha / r, from each module's own tensors
            A, B = (tensors[f"base_model.model.{slot.site.path}.lora_{end}.weight"] for end in "AB")
            assert A.shape[0] == B.shape[1] == 6
            torch.testing.assert_close(B @ A, slot.delta.weight(torch.zeros(())).detach(), rtol=1e-5, atol=1e-6)
    assert {name.rpartition(".lora_")[2] for name in tensors} == {"A.weight", "B.weight"}


VLLM_REFUSES: dict[str, tuple[str, Any, str]] = {
    "head": ("bert", lambda: pt.LoRA(rank=2), "no whole modules"),
    "biases": ("bert", lambda: pt.LoRA(rank=2, bias="all"), "no whole modules|no biases"),
    "changed-biases": ("qwen2", lambda: pt.LoRA(rank=2, bias="adapted"), "reads no biases"),
    "all-biases": ("qwen2", lambda: pt.LoRA(rank=2, bias="all"), "reads no biases"),
    "embedding": (
        "llama",
        lambda: pt.LoRA(rank=2, roles=("embedding",)),
        "takes no LoRA on a site of kind 'embedding'",
    ),
    "large-rank": ("llama", lambda: pt.LoRA(rank=513), "at most 512"),
    "dora": ("llama", lambda: pt.DoRA(rank=4), "rank 4 leaves a relative error"),
}


@pytest.mark.parametrize("case", VLLM_REFUSES)
def test_vllm_is_not_given_what_it_cannot_read(case: str, tmp_path: Path) -> None:
    name, make, words = VLLM_REFUSES[case]
    _, tuned = shaken(name, make())
    with pytest.raises(AttachError, match=words):
        tuned.export(tmp_path / "out", for_="vllm", rank=4 if case == "dora" else None)
    assert not list(tmp_path.iterdir())


def test_dora_reaches_vllm_as_the_nearest_product(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="needs PEFT: pip install 'petiole[peft]'")
    from peft import PeftModel

    model, tuned = shaken("llama", pt.DoRA(rank=4))
    done = tuned.export(tmp_path / "out", for_="vllm", max_error=1e-6)
    assert done.kind == "LoRA" and done.modules[0].rank > 4
    there = PeftModel.from_pretrained(tiny.model("llama"), str(tmp_path / "out"))
    torch.testing.assert_close(first(there, "llama"), first(model, "llama"), rtol=1e-5, atol=1e-5)


DIFFUSERS: dict[str, Any] = {
    "lora": lambda: pt.LoRA(rank=4, alpha=3.0),
    "convolutions": lambda: pt.LoRA(rank=4, roles=("conv",)),
    "two-ranks": lambda: [pt.LoRA(rank=4), pt.LoRA(rank=2, roles=("o",))],
    "biases": lambda: pt.LoRA(rank=4, roles=("o",), bias="adapted"),
    "dora": lambda: pt.DoRA(rank=4),
}


@pytest.mark.parametrize("case", DIFFUSERS)
def test_a_unet_of_diffusers_reads_its_export(case: str, tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="needs diffusers: pip install 'petiole[diffusers]'")
    pytest.importorskip("peft", reason="needs PEFT: pip install 'petiole[peft]'")
    model, tuned = shaken("unet", DIFFUSERS[case]())
    changed = first(model, "unet")
    tuned.export(tmp_path / "out", for_="diffusers")
    there: Any = tiny.model("unet")
    bare = first(there, "unet")
    there.load_lora_adapter(str(tmp_path / "out"), prefix="unet", use_safetensors=True)
    torch.testing.assert_close(first(there, "unet"), changed, rtol=1e-5, atol=5e-6)
    assert not torch.allclose(changed, bare, atol=1e-3)


def test_diffusers_is_given_its_own_models_alone(tmp_path: Path) -> None:
    _, tuned = shaken("llama", pt.LoRA(rank=2))
    with pytest.raises(AttachError, match="no model of diffusers"):
        tuned.export(tmp_path / "out", for_="diffusers")
