"""LST against reference results: layout "prune_t5", the weights that a side network starts from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

import petiole as pt
from linears import Case, cases, set_
from petiole.methods.side.pruning import keep


@pytest.mark.parametrize("path", cases("lst"))
def test_parity(path: Path) -> None:
    with Case(path, "lst") as case:
        assert case.kind == "prune_t5"
        names = [name.removeprefix("in.importance.") for name in case.tensors if name.startswith("in.importance.")]
        gated = any(name.endswith("wi_0.weight") for name in names)
        config = T5Config(
            vocab_size=case.option("vocab_size"),
            d_model=case.option("d_model"),
            d_kv=case.option("d_kv"),
            d_ff=case.option("d_ff"),
            num_heads=case.option("num_heads"),
            num_layers=case.option("num_layers"),
            num_decoder_layers=case.option("num_decoder_layers"),
            feed_forward_proj="gated-gelu" if gated else "relu",
            pad_token_id=0,
            eos_token_id=1,
        )
        model, r = T5ForConditionalGeneration(config), case.option("reduction_factor")
        for name in names:
            set_(model.get_parameter(name), case[f"param.{name}"])
        method = pt.LST(reduction_factor=r)
        tuned = pt.attach(model, method)
        importance = {name: case[f"in.importance.{name}"] for name in names}
        method.prune(model, tuned.moment(0).deltas, importance)

        columns = keep(importance["shared.weight"].T, r)
        case.same("out.shared.weight", model.shared.weight[:, columns], 0.0)
        for slot, stack in zip(tuned.slots, ("encoder", "decoder"), strict=True):
            for depth, block in enumerate(slot.delta.blocks):
                for name, parameter in block.named_parameters():
                    if "relative_attention_bias" not in name:
                        case.same(f"out.{stack}.block.{depth}.{name}", parameter, 0.0)
            case.same(f"out.{stack}.final_layer_norm.weight", slot.delta.norm.weight, 0.0)
        first = tuned.slots[0].delta.blocks[0].layer[0].SelfAttention.relative_attention_bias
        assert torch.equal(first.weight, model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight)
