"""Over torchao's weight-only quantisation: deltas need no class of their own for it, and merging happens when told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petiole as pt
import tiny
from petiole import factored
from petiole.errors import AttachError, FileError

torchao = pytest.importorskip("torchao", reason="needs torchao: pip install 'petiole[torchao]'")
pytestmark = pytest.mark.filterwarnings("ignore")

Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"


def int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def int4() -> Any:
    """Groups of 32 weights of four bits; the layout that runs anywhere."""
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))


QUANTISED: dict[str, Callable[[], Any]] = {"int8": int8, "int4": int4}


def backbone(kind: str, seed: int = 0) -> nn.Module:
    """A tiny Llama whose blocks are quantised."""
    from torchao.quantization import quantize_

    model = tiny.model("llama", seed=seed)
    quantize_(model, QUANTISED[kind](), filter_fn=lambda m, name: isinstance(m, nn.Linear) and "lm_head" not in name)
    return model


def first(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(**tiny.batch("llama")).logits  # type: ignore[no-any-return]


METHODS: dict[str, Callable[[], Any]] = {
    "lora": lambda: pt.LoRA(rank=4, roles=("q", "v", "up")),
    "dora": lambda: pt.DoRA(rank=4),
    "ia3": lambda: pt.IA3(),
    "parallel-adapter": lambda: pt.ParallelAdapter(bottleneck=4),
    "prefix-tuning": lambda: pt.PrefixTuning(length=3),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", QUANTISED)
def test_trains_saves_and_leaves_as_it_came(kind: str, method: str, tmp_path: Path) -> None:
    model = backbone(kind)
    bare, weight = first(model), model.get_submodule(Q).weight
    assert type(weight) not in (Tensor, nn.Parameter) and not factored.plain(model.get_submodule(Q))
    tuned = pt.attach(model, METHODS[method]())
    if tuned.methods[0].identity_at_start:
        assert torch.equal(first(model), bare)
    tuned.check(tiny.batch("llama"))
    optimizer = torch.optim.SGD(tuned.parameters(), 0.5)
    losses = []
    for _ in range(3):
        loss = model(**tiny.batch("llama")).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    changed = first(model)
    tuned.save(tmp_path / "own.safetensors")
    again = backbone(kind)
    pt.load(again, tmp_path / "own.safetensors")
    assert torch.equal(first(again), changed)
    with pytest.raises(FileError, match="another backbone"):  # its values are read, quantised as they are
        pt.load(backbone(kind, seed=1), tmp_path / "own.safetensors")
    tuned.detach()
    assert model.get_submodule(Q).weight is weight and torch.equal(first(model), bare)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
@pytest.mark.parametrize("kind", QUANTISED)
def test_merges_when_told_and_comes_apart_again(kind: str, method: str) -> None:
    """The dequantised weight was copied into the quantised one, which says of itself that it is a floating-point tensor."""
    model = backbone(kind)
    tuned = pt.attach(model, METHODS[method]())
    for number, parameter in enumerate(tuned.parameters()):
        with torch.no_grad():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    changed, path = first(model), K if method == "ia3" else Q
    weight = model.get_submodule(path).weight
    with pytest.raises(AttachError, match=r"is quantised; merge\(onto='dequantised'\)"):
        tuned.merge()
    assert torch.equal(first(model), changed)
    tuned.merge(onto="dequantised")
    assert type(model.get_submodule(path).weight) is nn.Parameter
    torch.testing.assert_close(first(model), changed, rtol=1e-4, atol=1e-5)
    tuned.unmerge()
    assert model.get_submodule(path).weight is weight and torch.equal(first(model), changed)


@pytest.mark.parametrize("kind", QUANTISED)
def test_goes_out_to_peft_over_the_same_quantised_base(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs PEFT: pip install 'petiole[peft]'")
    model = backbone(kind)
    tuned = pt.attach(model, pt.LoRA(rank=4))
    for parameter in tuned.parameters():
        with torch.no_grad():
            parameter.add_(0.1)
    tuned.export(tmp_path / "out", check=tiny.batch("llama"))
    there = peft.PeftModel.from_pretrained(backbone(kind), str(tmp_path / "out"))
    torch.testing.assert_close(first(there), first(model), rtol=1e-5, atol=2e-6)
    here = backbone(kind)
    pt.load_peft(here, tmp_path / "out")
    assert torch.equal(first(here), first(model))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torchao 0.18 packs int4 for tensor cores on CUDA alone")
def test_packed_int4_on_a_gpu() -> None:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_
    from torchao.quantization.quantize_.workflows.int4.int4_packing_format import Int4PackingFormat

    config = Int4WeightOnlyConfig(group_size=32, int4_packing_format=Int4PackingFormat.TILE_PACKED_TO_4D)
    model = tiny.model("llama", hidden_size=128, intermediate_size=256).to("cuda", torch.bfloat16)
    quantize_(model, config, filter_fn=lambda m, name: isinstance(m, nn.Linear) and "lm_head" not in name)
    batch = {key: value.cuda() for key, value in tiny.batch("llama").items()}
    tuned = pt.attach(model, pt.LoRA(rank=4))
    tuned.check(batch)
    model(**batch).loss.backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in tuned.parameters())
