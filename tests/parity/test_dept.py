"""DePT against reference results: layout "inputs", what enters an encoder in place of the embeddings of its tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import linears
import petiole as pt
from linears import Case, set_


@pytest.mark.parametrize("path", linears.cases("dept"))
def test_parity(path: Path) -> None:
    from transformers import BertConfig, BertModel

    with Case(path, "dept") as case:
        assert case.kind == "inputs"
        m, s, rank, d = (case.option(name) for name in ("prompt_length", "max_length", "rank", "hidden_size"))
        ids, mask, words = (case[f"in.{name}"] for name in ("input_ids", "attention_mask", "word_embeddings"))
        assert ids.shape == (case.option("batch"), s) and words.shape == (case.option("vocab_size"), d)
        config = BertConfig(hidden_size=d, num_hidden_layers=2, num_attention_heads=1, intermediate_size=d, vocab_size=len(words),
                            max_position_embeddings=m + s)  # fmt: skip
        with torch.random.fork_rng():
            model = BertModel(config).eval().to(words.dtype)
        set_(model.get_input_embeddings().weight, words)
        scaling, alpha = case.option("scaling"), case.option("alpha")
        method = pt.DePT(length=m, rank=rank, max_length=s, alpha=alpha)
        tuned = pt.attach(model, method)
        model.to(words.dtype)
        delta = tuned.slots[0].delta
        assert math.isclose(delta.scaling, scaling, rel_tol=1e-9)
        of = {name: p for name, p in (("prompt", delta.tokens), ("A", delta.A), ("B", delta.B)) if p is not None}
        for name, parameter in of.items():
            set_(parameter, case[f"param.{name}"])

        entered: dict[str, Any] = {}

        def watch(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            entered.update(kwargs)

        model.register_forward_pre_hook(watch, with_kwargs=True)
        model(ids, attention_mask=mask)
        case.same("out.inputs_embeds", entered["inputs_embeds"], 1e-5)
        case.same("out.attention_mask", entered["attention_mask"], 0.0)
        loss = (entered["inputs_embeds"] * case["in.cotangent"]).sum()
        for name, gradient in zip(of, torch.autograd.grad(loss, list(of.values())), strict=True):
            case.same(f"grad.{name}", gradient, 1e-5)
