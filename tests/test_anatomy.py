"""Anatomy: what is found in each family, against tables written from the models' own modules, and against what the models do."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from petiole.anatomy import Anatomy, Block, Side, Site, anatomy
from petiole.errors import AnatomyError

FAMILIES = [
    pytest.param(
        name, marks=pytest.mark.skipif(bool(tiny.missing(name)), reason=f"{tiny.missing(name)} is not installed")
    )
    for name in tiny.NAMES
]
PRESENT = [name for name in tiny.NAMES if not tiny.missing(name)]
Table = dict[str, str]


# ---------------------------------------------------------------------------------------------------------- what each family has
#
# role -> modules in a block, `;` between several, `->` between entry and exit, `/` before a tensor that isn't the weight, [a:b] rows,
# # expert. Every role of every block must be in its table, and nothing else. `block` is left out: it is the block.


def attention(core: str, q: str, k: str, v: str, o: str, entry: str = "", role: str = "attention") -> Table:
    """The usual four; `q` … `o` are relative to the module that runs the attention."""
    own = "" if role == "attention" else f"{role}."
    parts = {"q": q, "k": k, "v": v, "o": o}
    table = {f"{own}{name}": f"{core}.{part}" if not part.startswith("=") else part[1:] for name, part in parts.items()}
    return {**table, role: f"{entry or core} -> {table[f'{own}o']}"}


def fused(module: str, q: str, k: str, v: str) -> Table:
    return {"qkv": module, "q": f"{module}[{q}]", "k": f"{module}[{k}]", "v": f"{module}[{v}]"}


def ffn(module: str, up: str, down: str) -> Table:
    return {"ffn": module, "up": f"{module}.{up}", "down": f"{module}.{down}"}


def each(pattern: str, count: int = 4) -> str:
    return "; ".join(f"{pattern}#{expert}" for expert in range(count))


BERT: Table = {
    **attention("attention.self", "query", "key", "value", "=attention.output.dense", "attention"),
    "ffn": "intermediate -> output.dense", "up": "intermediate.dense", "down": "output.dense",
    "norm": "attention.output.LayerNorm; output.LayerNorm",
}  # fmt: skip
DEBERTA: Table = {
    **BERT, **attention("attention.self", "query_proj", "key_proj", "value_proj", "=attention.output.dense", "attention"),
    "attention.linear": "attention.self.pos_key_proj; attention.self.pos_query_proj",
}  # fmt: skip
PROJ = ("q_proj", "k_proj", "v_proj", "o_proj")
LLAMA: Table = {
    **attention("self_attn", *PROJ), **ffn("mlp", "up_proj", "down_proj"), "gate": "mlp.gate_proj",
    "norm": "input_layernorm; post_attention_layernorm",
}  # fmt: skip
HEAD_NORMS: Table = {"attention.norm": "self_attn.q_norm; self_attn.k_norm"}
GPT2: Table = {
    **fused("attn.c_attn", "0:32", "32:64", "64:96"), "o": "attn.c_proj", "attention": "attn -> attn.c_proj",
    **ffn("mlp", "c_fc", "c_proj"), "norm": "ln_1; ln_2",
}  # fmt: skip
GPTJ: Table = {
    **attention("attn", "q_proj", "k_proj", "v_proj", "out_proj"), **ffn("mlp", "fc_in", "fc_out"), "norm": "ln_1",
}  # fmt: skip
NEOX_ROWS = ("0:8,24:32,48:56,72:80", "8:16,32:40,56:64,80:88", "16:24,40:48,64:72,88:96")
BIG = ffn("mlp", "dense_h_to_4h", "dense_4h_to_h")
BLOOM = {**BIG, "ffn": "mlp -> mlp.dense_4h_to_h"}  # its network adds the residual itself
VIT: Table = {
    **attention("attention", *PROJ), **ffn("mlp", "fc1", "fc2"), "norm": "layernorm_before; layernorm_after",
}  # fmt: skip
OUT = ("q_proj", "k_proj", "v_proj", "out_proj")
BART: Table = {
    **attention("self_attn", *OUT), "ffn": "fc1 -> fc2", "up": "fc1", "down": "fc2", "norm": "self_attn_layer_norm; final_layer_norm",
}  # fmt: skip
BART_DECODER: Table = {
    **BART, **attention("encoder_attn", *OUT, role="cross_attention"),
    "norm": "self_attn_layer_norm; encoder_attn_layer_norm; final_layer_norm",
}  # fmt: skip
CLIP: Table = {**attention("self_attn", *OUT), **ffn("mlp", "fc1", "fc2"), "norm": "layer_norm1; layer_norm2"}
T5: Table = {
    **attention("layer.0.SelfAttention", "q", "k", "v", "o"), **ffn("layer.1.DenseReluDense", "wi", "wo"),
    "norm": "layer.0.layer_norm; layer.1.layer_norm",
}  # fmt: skip
T5_DECODER: Table = {
    **T5, **attention("layer.1.EncDecAttention", "q", "k", "v", "o", role="cross_attention"), **ffn("layer.2.DenseReluDense", "wi", "wo"),
    "norm": "layer.0.layer_norm; layer.1.layer_norm; layer.2.layer_norm",
}  # fmt: skip
T5_FIRST: Table = {"attention.position_embedding": "layer.0.SelfAttention.relative_attention_bias"}
IN_PROJ = "self_attn/in_proj_weight"
TORCH: Table = {
    **fused(IN_PROJ, "0:32", "32:64", "64:96"), "o": "self_attn.out_proj", "attention": "self_attn",
    "ffn": "linear1 -> linear2", "up": "linear1", "down": "linear2", "norm": "norm1; norm2",
}  # fmt: skip
TORCH_DECODER: Table = {
    **TORCH, **{f"cross_attention.{k}": v for k, v in fused("multihead_attn/in_proj_weight", "0:32", "32:64", "64:96").items()},
    "cross_attention.o": "multihead_attn.out_proj", "cross_attention": "multihead_attn", "norm": "norm1; norm2; norm3",
}  # fmt: skip


def experts(module: str, width: int, count: int = 4, shared: str = "", router: str = "gate") -> Table:
    """Experts packed in tensors, gate and up in one, and maybe a shared one beside them."""
    both, rows = f"{module}.experts/gate_up_proj", {"gate": f"[0:{width}]", "up": f"[{width}:{2 * width}]"}
    table = {"ffn": module, "router": f"{module}.{router}", "gate_up": each(both, count)}
    table |= {role: each(both + part, count) for role, part in rows.items()} | {
        "down": each(f"{module}.experts/down_proj", count)
    }
    if shared:
        table |= {role: f"{table[role]}; {module}.{shared}.{role}_proj" for role in ("gate", "up", "down")}
    return table


JAMBA_MAMBA: Table = {
    "mixer": "mamba", "mixer.conv": "mamba.conv1d", "mixer.linear": "mamba.in_proj; mamba.x_proj; mamba.dt_proj; mamba.out_proj",
    "mixer.norm": "mamba.dt_layernorm; mamba.b_layernorm; mamba.c_layernorm", **ffn("feed_forward", "up_proj", "down_proj"),
    "gate": "feed_forward.gate_proj", "norm": "input_layernorm; pre_ff_layernorm",
}  # fmt: skip
JAMBA_ATTENTION: Table = {
    **attention("self_attn", *PROJ), **experts("feed_forward", 64, 2, router="router"), "norm": "input_layernorm; pre_ff_layernorm",
}  # fmt: skip
NEXT_MOE: Table = {
    **experts("mlp", 16, shared="shared_expert"),
    "ffn.linear": "mlp.shared_expert_gate",
    "norm": LLAMA["norm"],
}
NEXT_LINEAR: Table = {
    **NEXT_MOE, "mixer": "linear_attn", "mixer.conv": "linear_attn.conv1d", "mixer.norm": "linear_attn.norm",
    "mixer.linear": "linear_attn.in_proj_qkvz; linear_attn.in_proj_ba; linear_attn.out_proj",
}  # fmt: skip
NEXT_FULL: Table = {**NEXT_MOE, **attention("self_attn", *PROJ), **HEAD_NORMS}
DEEPSEEK: Table = {
    "q": "self_attn.q_b_proj", "o": "self_attn.o_proj", "attention": "self_attn -> self_attn.o_proj", "norm": LLAMA["norm"],
    "attention.linear": "self_attn.q_a_proj; self_attn.kv_a_proj_with_mqa; self_attn.kv_b_proj",
    "attention.norm": "self_attn.q_a_layernorm; self_attn.kv_a_layernorm",
}  # fmt: skip
RESNET: Table = {
    "conv": "layer.0.convolution; layer.1.convolution; layer.2.convolution",
    "norm": "layer.0.normalization; layer.1.normalization; layer.2.normalization",
}  # fmt: skip
RESNET_FIRST: Table = {
    role: f"shortcut.{kind}; {RESNET[role]}" for role, kind in (("conv", "convolution"), ("norm", "normalization"))
}
TO = ("to_q", "to_k", "to_v", "to_out.0")
RES: Table = {"norm": "norm1; norm2", "conv": "conv1; conv2", "linear": "time_emb_proj"}
RES_SHORT: Table = {**RES, "conv": "conv1; conv2; conv_shortcut"}


def transformer(width: int) -> Table:
    """The block of a diffusion UNet; its GEGLU holds up before gate."""
    return {
        **attention("attn1", *TO), **attention("attn2", *TO, role="cross_attention"), "ffn": "ff", "down": "ff.net.2",
        "gate_up": "ff.net.0.proj", "up": f"ff.net.0.proj[0:{width}]", "gate": f"ff.net.0.proj[{width}:{2 * width}]",
        "norm": "norm1; norm2; norm3",
    }  # fmt: skip


# family -> stack -> the list that holds it, and a table for each of its blocks.
BLOCKS: dict[str, dict[str, tuple[str, list[Table]]]] = {
    "bert": {"encoder": ("bert.encoder.layer", [BERT] * 2)},
    "roberta": {"encoder": ("roberta.encoder.layer", [BERT] * 2)},
    "electra": {"encoder": ("electra.encoder.layer", [BERT] * 2)},
    "distilbert": {
        "encoder": (
            "distilbert.transformer.layer",
            [{**attention("attention", "q_lin", "k_lin", "v_lin", "out_lin"), **ffn("ffn", "lin1", "lin2"),
              "norm": "sa_layer_norm; output_layer_norm"}] * 2,
        )
    },
    "deberta_v2": {"encoder": ("deberta.encoder.layer", [DEBERTA] * 2)},
    # its fused projection has an order of its own: q, k and v are not offered
    "deberta": {
        "encoder": (
            "deberta.encoder.layer",
            [{**{k: v for k, v in BERT.items() if k not in "qkv"}, "qkv": "attention.self.in_proj",
              "attention.linear": "attention.self.pos_proj; attention.self.pos_q_proj"}] * 2,
        )
    },
    "albert": {
        "encoder": (
            "albert.encoder.albert_layer_groups",
            [{**attention("attention", "query", "key", "value", "dense"), "ffn": "ffn -> ffn_output", "up": "ffn", "down": "ffn_output",
              "norm": "full_layer_layer_norm; attention.LayerNorm"}],
        )
    },
    "mpnet": {
        "encoder": (
            "mpnet.encoder.layer",
            [{**BERT, **attention("attention.attn", "q", "k", "v", "o"), "norm": "attention.LayerNorm; output.LayerNorm"}] * 2,
        )
    },
    "modernbert": {
        "encoder": (
            "model.layers",
            [{**fused("attn.Wqkv", "0:32", "32:64", "64:96"), "o": "attn.Wo", "attention": "attn -> attn.Wo", "ffn": "mlp",
              "gate_up": "mlp.Wi", "gate": "mlp.Wi[0:64]", "up": "mlp.Wi[64:128]", "down": "mlp.Wo", "norm": norm}
             for norm in ("mlp_norm", "attn_norm; mlp_norm")],
        )
    },
    "gpt2": {"decoder": ("transformer.h", [GPT2] * 2)},
    "gptj": {"decoder": ("transformer.h", [GPTJ] * 2)},
    "gpt_bigcode": {"decoder": ("transformer.h", [{**GPT2, **fused("attn.c_attn", "0:32", "32:40", "40:48")}] * 2)},
    "codegen": {
        "decoder": ("transformer.h", [{**{k: v for k, v in GPTJ.items() if k not in "qkv"}, "qkv": "attn.qkv_proj"}] * 2),
    },
    "gpt_neox": {
        "decoder": (
            "gpt_neox.layers",
            [{**fused("attention.query_key_value", *NEOX_ROWS), "o": "attention.dense", "attention": "attention -> attention.dense", **BIG,
              "norm": LLAMA["norm"]}] * 2,
        )
    },
    "bloom": {
        "decoder": (
            "transformer.h",
            [{**fused("self_attention.query_key_value", *NEOX_ROWS), "o": "self_attention.dense", **BLOOM,
              "attention": "self_attention -> self_attention.dense", "norm": LLAMA["norm"]}] * 2,
        )
    },
    "falcon": {
        "decoder": (
            "transformer.h",
            [{**fused("self_attention.query_key_value", "0:16,32:48", "16:24,48:56", "24:32,56:64"), "o": "self_attention.dense", **BIG,
              "attention": "self_attention -> self_attention.dense", "norm": "ln_attn; ln_mlp"}] * 2,
        )
    },
    "opt": {"decoder": ("model.decoder.layers", [BART] * 2)},
    "llama": {"decoder": ("model.layers", [LLAMA] * 2)},
    "llama_classifier": {"decoder": ("model.layers", [LLAMA] * 2)},
    "qwen2": {"decoder": ("model.layers", [LLAMA] * 2)},
    "qwen3": {"decoder": ("model.layers", [{**LLAMA, **HEAD_NORMS}] * 2)},
    "mistral": {"decoder": ("model.layers", [LLAMA] * 2)},
    "gemma": {"decoder": ("model.layers", [LLAMA] * 2)},
    "phi": {
        "decoder": (
            "model.layers",
            [{**attention("self_attn", "q_proj", "k_proj", "v_proj", "dense"), **ffn("mlp", "fc1", "fc2"), "norm": "input_layernorm"}] * 2,
        )
    },
    "phi3": {
        "decoder": (
            "model.layers",
            [{**fused("self_attn.qkv_proj", "0:32", "32:48", "48:64"), "o": "self_attn.o_proj", "attention": "self_attn -> self_attn.o_proj",
              "ffn": "mlp", "gate_up": "mlp.gate_up_proj", "gate": "mlp.gate_up_proj[0:64]", "up": "mlp.gate_up_proj[64:128]",
              "down": "mlp.down_proj", "norm": LLAMA["norm"]}] * 2,
        )
    },
    "mamba": {
        "decoder": (
            "backbone.layers",
            [{"mixer": "mixer", "mixer.conv": "mixer.conv1d", "norm": "norm",
              "mixer.linear": "mixer.in_proj; mixer.x_proj; mixer.dt_proj; mixer.out_proj"}] * 2,
        )
    },
    "jamba": {"decoder": ("model.layers", [JAMBA_MAMBA, JAMBA_ATTENTION] * 2)},
    "qwen3_next": {"decoder": ("model.layers", [NEXT_LINEAR] * 3 + [NEXT_FULL])},
    "mixtral": {"decoder": ("model.layers", [{**attention("self_attn", *PROJ), **experts("mlp", 64), "norm": LLAMA["norm"]}] * 2)},
    # gate and up alternate row by row: neither is offered
    "gpt_oss": {
        "decoder": (
            "model.layers",
            [{**attention("self_attn", *PROJ), "ffn": "mlp", "router": "mlp.router", "gate_up": each("mlp.experts/gate_up_proj"),
              "down": each("mlp.experts/down_proj"), "norm": LLAMA["norm"]}] * 2,
        )
    },
    "deepseek_v3": {
        "decoder": (
            "model.layers",
            [{**DEEPSEEK, **ffn("mlp", "up_proj", "down_proj"), "gate": "mlp.gate_proj"},
             {**DEEPSEEK, **experts("mlp", 16, shared="shared_experts")}],
        )
    },
    "t5": {"encoder": ("encoder.block", [{**T5, **T5_FIRST}, T5]), "decoder": ("decoder.block", [{**T5_DECODER, **T5_FIRST}, T5_DECODER])},
    "bart": {"encoder": ("model.encoder.layers", [BART] * 2), "decoder": ("model.decoder.layers", [BART_DECODER] * 2)},
    "vit": {"encoder": ("vit.layers", [VIT] * 2)},
    "deit": {"encoder": ("deit.layers", [VIT] * 2)},
    "beit": {"encoder": ("beit.layers", [VIT] * 2)},
    "dinov2": {"encoder": ("dinov2.encoder.layer", [{**VIT, "norm": "norm1; norm2"}] * 2)},
    "swin": {"encoder": ("swin.encoder.layers", [VIT] * 4)},
    "swinv2": {
        "encoder": (
            "swinv2.encoder.layers",
            [{**BERT, "norm": VIT["norm"],
              "attention.linear": "attention.self.continuous_position_bias_mlp.0; attention.self.continuous_position_bias_mlp.2"}] * 2,
        )
    },
    "resnet": {"encoder": ("resnet.encoder.stages", [RESNET_FIRST, RESNET] * 2)},
    "convnext": {
        "encoder": (
            "convnext.encoder.stages",
            [{"conv": "dwconv", "norm": "layernorm", "ffn": "pwconv1 -> pwconv2", "up": "pwconv1", "down": "pwconv2"}] * 4,
        )
    },
    "timm_vit": {
        "encoder": (
            "blocks",
            [{**fused("attn.qkv", "0:32", "32:64", "64:96"), "o": "attn.proj", "attention": "attn -> attn.proj", **ffn("mlp", "fc1", "fc2"),
              "norm": "norm1; norm2"}] * 2,
        )
    },
    "clip": {"vision": ("vision_model.encoder.layers", [CLIP] * 2), "text": ("text_model.encoder.layers", [CLIP] * 2)},
    "llava": {"vision": ("model.vision_tower.encoder.layers", [CLIP] * 2), "text": ("model.language_model.layers", [LLAMA] * 2)},
    "vilt": {
        "encoder": (
            "vilt.encoder.layer",
            [{**BERT, **attention("attention.attention", "query", "key", "value", "=attention.output.dense", "attention"),
              "norm": VIT["norm"]}] * 2,
        )
    },
    "ast": {"encoder": ("audio_spectrogram_transformer.layers", [VIT] * 2)},
    "wav2vec2": {
        "encoder": (
            "wav2vec2.encoder.layers",
            [{**attention("attention", *OUT), **ffn("feed_forward", "intermediate_dense", "output_dense"),
              "norm": "layer_norm; final_layer_norm"}] * 2,
        )
    },
    "whisper": {"encoder": ("model.encoder.layers", [BART] * 2), "decoder": ("model.decoder.layers", [BART_DECODER] * 2)},
    "torch_encoder": {"encoder": ("layers", [TORCH] * 2)},
    "torch_seq2seq": {"encoder": ("encoder.layers", [TORCH] * 2), "decoder": ("decoder.layers", [TORCH_DECODER] * 2)},
    "dit": {
        "encoder": (
            "transformer_blocks",
            [{**attention("attn1", *TO), "ffn": "ff", "up": "ff.net.0.proj", "down": "ff.net.2", "norm": "norm1.norm; norm3",
              "linear": "norm1.emb.timestep_embedder.linear_1; norm1.emb.timestep_embedder.linear_2; norm1.linear",
              "type_embedding": "norm1.emb.class_embedder.embedding_table"}] * 2,
        )
    },
    "unet": {
        "down": ("down_blocks", [RES, transformer(32), RES_SHORT]),
        "mid": ("mid_block", [RES, transformer(64), RES]),
        "up": ("up_blocks", [RES_SHORT, RES_SHORT, RES_SHORT, transformer(32), RES_SHORT, transformer(32)]),
    },
}  # fmt: skip

# family -> key outside the stacks -> path. Norms, convolutions and other linears are left out here.
OUTSIDE: dict[str, Table] = {
    "bert": {
        "embedding": "bert.embeddings.word_embeddings", "position_embedding": "bert.embeddings.position_embeddings",
        "type_embedding": "bert.embeddings.token_type_embeddings", "pooler": "bert.pooler.dense", "head": "classifier",
    },
    "roberta": {
        "embedding": "roberta.embeddings.word_embeddings", "position_embedding": "roberta.embeddings.position_embeddings",
        "type_embedding": "roberta.embeddings.token_type_embeddings", "head": "classifier",
    },
    "distilbert": {
        "embedding": "distilbert.embeddings.word_embeddings", "position_embedding": "distilbert.embeddings.position_embeddings",
        "head": "pre_classifier", "head.1": "classifier",
    },
    "gpt2": {"embedding": "transformer.wte", "position_embedding": "transformer.wpe", "lm_head": "lm_head"},
    "opt": {"embedding": "model.decoder.embed_tokens", "position_embedding": "model.decoder.embed_positions", "lm_head": "lm_head"},
    "llama": {"embedding": "model.embed_tokens", "lm_head": "lm_head"},
    "llama_classifier": {"embedding": "model.embed_tokens", "head": "score"},
    # `shared` only lends its weight: it is never called
    "t5": {"embedding": "encoder.embed_tokens", "embedding.1": "decoder.embed_tokens", "lm_head": "lm_head"},
    "bart": {
        "embedding": "model.encoder.embed_tokens", "embedding.1": "model.decoder.embed_tokens", "lm_head": "lm_head",
        "position_embedding": "model.encoder.embed_positions", "position_embedding.1": "model.decoder.embed_positions",
    },
    "vit": {"patch_embedding": "vit.embeddings.patch_embeddings.projection", "head": "classifier"},
    "swin": {"patch_embedding": "swin.embeddings.patch_embeddings.projection", "head": "classifier"},
    "resnet": {"patch_embedding": "resnet.embedder.embedder.convolution", "head": "classifier"},
    "timm_vit": {"patch_embedding": "patch_embed.proj", "head": "head"},
    "clip": {
        "embedding": "text_model.embeddings.token_embedding", "position_embedding": "text_model.embeddings.position_embedding",
        "position_embedding.1": "vision_model.embeddings.position_embedding", "patch_embedding": "vision_model.embeddings.patch_embedding",
    },
    "wav2vec2": {"head": "projector", "head.1": "classifier"},
    "whisper": {
        "embedding": "model.decoder.embed_tokens", "lm_head": "proj_out",
        "position_embedding": "model.encoder.embed_positions", "position_embedding.1": "model.decoder.embed_positions",
    },
    "torch_encoder": {},
    "dit": {"patch_embedding": "pos_embed.proj"},
}  # fmt: skip


def show(site: Site, root: str) -> str:
    """A site as the tables write it."""

    def inside(path: str) -> str:
        return path.removeprefix(f"{root}.")

    text = inside(site.path) + (f"/{site.parameter}" if site.parameter not in ("weight", "") else "")
    if site.kind == "norm":
        text = inside(site.path)
    text += f"[{','.join(f'{a}:{b}' for a, b in site.rows)}]" if site.rows else ""
    text += f"#{site.expert}" if site.expert >= 0 else ""
    return text + (f" -> {inside(site.exit)}" if site.exit != site.path else "")


def table_of(block: Block) -> Table:
    """The roles of a block as the tables write them."""
    found: dict[str, list[str]] = {}
    for site in block.sites:
        if site.role == "block":
            assert (site.path, site.exit) == (block.path, block.path)
            continue
        plain = site.within in ("", "attention", "ffn") and site.role not in (
            "norm",
            "conv",
            "linear",
            "position_embedding",
        )
        found.setdefault(site.role if plain or not site.within else f"{site.within}.{site.role}", []).append(
            show(site, block.path)
        )
    return {role: "; ".join(sorted(parts)) for role, parts in found.items()}


def in_order(table: Table) -> Table:
    return {role: "; ".join(sorted(parts.split("; "))) for role, parts in table.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_role_of_every_block(name: str) -> None:
    found = anatomy(tiny.model(name))
    assert {stack.name for stack in found.stacks} == set(BLOCKS[name])
    for stack in found.stacks:
        container, tables = BLOCKS[name][stack.name]
        assert stack.containers == (container,)
        assert [block.depth for block in stack.blocks] == list(range(len(tables)))
        for block, table in zip(stack.blocks, tables, strict=True):
            assert table_of(block) == in_order(table), block.path


@pytest.mark.parametrize("name", [name for name in OUTSIDE if name in PRESENT])
def test_what_stands_outside_the_stacks(name: str) -> None:
    found = anatomy(tiny.model(name))
    roles = ("embedding", "position_embedding", "type_embedding", "patch_embedding", "pooler", "head", "lm_head")
    assert {site.key: site.path for site in found.outside if site.role in roles} == OUTSIDE[name]
    assert [site.path for site in found.heads()] == [
        path for key, path in OUTSIDE[name].items() if key.startswith("head")
    ]


def test_every_family_has_a_table() -> None:
    assert set(BLOCKS) == set(tiny.NAMES)


# ---------------------------------------------------------------------------------------------------------- what the models do


def all_sites(found: Anatomy) -> Iterator[Site]:
    for stack in found.stacks:
        for block in stack.blocks:
            yield from block.sites
    yield from found.outside


@contextmanager
def watched(model: nn.Module) -> Iterator[dict[str, list[tuple[Any, Any]]]]:
    """What every module gets and gives, in the order of the calls: path -> [(input, output)]."""
    calls: dict[str, list[tuple[Any, Any]]] = {}

    def hook(path: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            values = [*args, *kwargs.values()]
            first = next((v for v in values if isinstance(v, Tensor)), None)
            calls.setdefault(path, []).append((first, output if isinstance(output, Tensor) else first_tensor(output)))

        return note

    handles = [m.register_forward_hook(hook(path), with_kwargs=True) for path, m in model.named_modules()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    values = output.values() if hasattr(output, "values") else output if isinstance(output, (tuple, list)) else []
    return next((v for v in values if isinstance(v, Tensor)), None)


@pytest.mark.parametrize("name", FAMILIES)
def test_sites_are_called_as_they_say(name: str) -> None:
    """Every module that a site names runs (or doesn't, where it says so), as often as it says, on states of the width it says."""
    model = tiny.model(name)
    found = anatomy(model)
    with watched(model) as calls, torch.no_grad():
        model(**tiny.batch(name))
    lent = {"deberta.encoder.rel_embeddings"}  # its weight is used, the module never called
    for site in all_sites(found):
        if site.path in lent:
            continue
        if not site.called:
            assert site.caller in calls, site.key
            if site.within != "mixer":  # a mixer calls a module on one of its ways, and takes its weight on another
                assert site.path in calls if site.path == site.caller else site.path not in calls, site.key
            continue
        assert site.path in calls and site.exit in calls, site.key
        if site.within or site.role == "block":
            assert len(calls[site.path]) == site.repeats, site.key
        given, made = calls[site.path][0][0], calls[site.exit][0][1]
        if site.kind == "linear":
            assert given.shape[-1] == site.in_features
            assert made.shape[-1] == (model.get_submodule(site.path).weight.shape[1 if site.transposed else 0])
            width = sum(stop - start for start, stop in site.rows) or made.shape[-1]
            assert width == site.out_features and all(stop <= made.shape[-1] for _, stop in site.rows)
        elif site.kind == "conv":
            assert (given.shape[1], made.shape[1]) == (site.in_features, site.out_features), site.key
        elif site.role in ("attention", "cross_attention", "ffn", "mixer"):
            axis = 1 if given.ndim == 4 and site.in_features not in given.shape[-1:] else -1
            assert (given.shape[axis], made.shape[axis]) == (site.in_features, site.out_features), site.key


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_run_in_the_order_of_depth(name: str) -> None:
    model = tiny.model(name)
    order: list[str] = []
    blocks = {block.path: (stack.name, block.depth) for stack in anatomy(model).stacks for block in stack.blocks}
    for path in blocks:
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: order.append(path))
    with torch.no_grad():
        model(**tiny.batch(name))
    assert list(dict.fromkeys(order)) == list(blocks)


def last_states(model: nn.Module, found: Anatomy, name: str) -> list[Tensor]:
    """Output of the last block of every stack."""
    torch.manual_seed(0)  # ViLT draws which patches it takes
    with watched(model) as calls, torch.no_grad():
        model(**tiny.batch(name))
    return [calls[stack.blocks[-1].path][-1][1] for stack in found.stacks]


def silence(model: nn.Module, site: Site) -> None:
    """Let what a site gives be zero."""

    def zero(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return torch.zeros_like(output)
        return (torch.zeros_like(output[0]), *output[1:])

    model.get_submodule(site.exit).register_forward_hook(zero)


def erase(model: nn.Module, site: Site) -> None:
    """Set the site's own part of weight and bias to zero."""
    module = model.get_submodule(site.path)
    for name, axis in ((site.parameter, -1 if site.transposed else -2), (site.bias, -1)):
        tensor = getattr(module, name) if name else None
        if tensor is None:
            continue
        tensor = tensor.data[site.expert] if site.expert >= 0 else tensor.data
        for start, stop in site.rows or ((0, tensor.shape[axis]),):
            tensor.narrow(axis, start, stop - start).zero_()


ENDS = {"attention": "attention.o", "cross_attention": "cross_attention.o", "ffn": "down"}


def with_role(role: str) -> list[str]:
    """Installed families that have the role somewhere, by their tables."""
    return [name for name in PRESENT if any(role in table for _, tables in BLOCKS[name].values() for table in tables)]


@pytest.mark.parametrize(("name", "whole"), [(name, whole) for whole in ENDS for name in with_role(whole)])
def test_the_exit_of_a_sublayer_is_its_last_linear(name: str, whole: str) -> None:
    """A sub-layer whose exit gives zero is one whose last projection is zero: so the write is before the residual and the norm."""
    silent, erased, plain = (tiny.model(name) for _ in range(3))
    found = anatomy(silent)
    for site in found.sites([whole]):
        silence(silent, site)
    for site in found.sites([ENDS[whole]]):
        erase(erased, site)
    ours, theirs, before = (last_states(model, found, name) for model in (silent, erased, plain))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
    assert any(not torch.allclose(one, other) for one, other in zip(ours, before, strict=True))


TEXT_ONLY = [
    name
    for name in with_role("attention")
    if len(BLOCKS[name]) == 1 and tiny.batch(name).keys() >= {"input_ids"} and "pixel_values" not in tiny.batch(name)
]


@pytest.mark.parametrize("name", [name for name in TEXT_ONLY if name not in with_role("mixer")])
def test_attention_is_all_that_mixes_tokens(name: str) -> None:
    """With every attention silent, a token no longer reaches another position; with every ffn silent it does."""
    batch = tiny.batch(name)
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][:, 0] = 4 + (batch["input_ids"][:, 0] - 3) % (tiny.VOCABULARY - 4)

    def reached(role: str) -> bool:
        model = tiny.model(name)
        found = anatomy(model)
        for site in found.sites([role]):
            silence(model, site)
        states = []
        for kwargs in (batch, other):
            with watched(model) as calls, torch.no_grad():
                model(**kwargs)
            states.append(calls[found.stacks[0].blocks[-1].path][-1][1][:, 1:-1])
        return not torch.allclose(*states, atol=1e-6, rtol=0)

    assert not reached("attention")
    assert reached("ffn")


# ---------------------------------------------------------------------------------------------------------- q, k and v


@contextmanager
def attention_calls(model: nn.Module) -> Iterator[dict[nn.Module, list[tuple[Tensor, Tensor, Tensor]]]]:
    """What Transformers' attention function is given, for each module."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    calls: dict[nn.Module, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def probe(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.setdefault(module, []).append((query, key, value))
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register("probe", probe)
    ALL_MASK_ATTENTION_FUNCTIONS.register("probe", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    for module in model.modules():
        if hasattr(module, "config") and hasattr(module.config, "_attn_implementation"):
            module.config._attn_implementation_internal = "probe"
    yield calls


TRANSFORMERS = [name for name in PRESENT if name not in ("torch_encoder", "torch_seq2seq", "timm_vit", "dit", "unet")]
INTERFACE = {
    name: name
    not in ("deberta", "deberta_v2", "falcon", "mpnet", "swinv2", "vilt", "bloom", "mamba", "resnet", "convnext")
    for name in TRANSFORMERS
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_attention_interface_is_told(name: str) -> None:
    """Said of a stack if and only if every core of its attentions is what Transformers' attention function is given."""
    model = tiny.model(name)
    found = anatomy(model)
    with attention_calls(model) as calls, torch.no_grad():
        model(**tiny.batch(name))
    names = {module: path for path, module in model.named_modules()}
    seen = {names[module] for module in calls}
    for stack in found.stacks:
        cores = {
            site.core for block in stack.blocks for site in block.sites if site.role in ("attention", "cross_attention")
        }
        assert stack.attention_interface == INTERFACE[name]
        assert cores <= seen if stack.attention_interface else not cores & seen


@pytest.mark.parametrize(
    "name", [name for name in TRANSFORMERS if INTERFACE[name] and name not in ("codegen", "deepseek_v3")]
)
def test_q_k_v_are_what_attention_gets(name: str) -> None:
    """The site's own rows of weight and bias, applied to the module's input, are the queries, keys and values. Rotary embedding leaves the
    first position alone; a scale on queries and keys is divided out; a norm on them is left out of the comparison."""
    model = tiny.model(name)
    found = anatomy(model)
    with watched(model) as calls, attention_calls(model) as attended, torch.no_grad():
        model(**tiny.batch(name))
    compared: Counter[str] = Counter()
    for stack in found.stacks:
        for block in stack.blocks:
            normed = any(site.role == "norm" and site.within == "attention" for site in block.sites)
            for whole in (site for site in block.sites if site.role in ("attention", "cross_attention")):
                states = dict(zip("qkv", attended[model.get_submodule(whole.core)][0], strict=True))
                assert (whole.heads, whole.head_size) == (states["q"].shape[1], states["q"].shape[3])
                assert whole.key_value_heads in (
                    states["k"].shape[1],
                    states["k"].shape[1] * whole.key_value_heads // whole.heads,
                )
                for site in (s for s in block.sites if s.role in "qkv" and s.within == whole.role and s.role in "qkv"):
                    if (normed and site.role in "qk") or site.role == "qkv":
                        continue
                    assert_same_heads(site, model, calls[site.path][0][0], states[site.role], whole)
                    compared[site.role] += 1
    assert compared["v"] and (compared["q"] == compared["k"] == compared["v"] or name in ("qwen3", "qwen3_next"))


def assert_same_heads(site: Site, model: nn.Module, given: Tensor, states: Tensor, whole: Site) -> None:
    module: Any = model.get_submodule(site.path)
    weight, bias = module.weight.detach(), module.bias.detach() if site.bias else None
    weight = weight.T if site.transposed else weight
    rows = torch.cat([torch.arange(a, b) for a, b in site.rows or ((0, weight.shape[0]),)])
    if site.role == "q" and rows.numel() == 2 * whole.heads * whole.head_size:
        return  # queries with a gate beside each
    made = nn.functional.linear(given, weight[rows], bias[rows] if bias is not None else None)
    made = made.reshape(given.shape[0], -1, made.shape[-1])
    heads = states.transpose(1, 2).flatten(2)
    if heads.shape[-1] != made.shape[-1]:  # keys and values repeated for each query head
        heads = states[:, :: states.shape[1] * states.shape[3] // made.shape[-1]].transpose(1, 2).flatten(2)
    if heads.shape[:2] != made.shape[:2]:  # windows
        return
    one, other = made[:, 0], heads[:, 0]
    scale = (one * other).sum() / (other * other).sum()
    torch.testing.assert_close(one, other * scale, atol=1e-5, rtol=1e-4)
    assert site.role in "qk" or abs(scale - 1) < 1e-4


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("bloom", {}),
        ("falcon", {"alibi": True}),
        ("falcon", {"alibi": True, "new_decoder_architecture": False, "multi_query": True}),
        ("falcon", {"alibi": True, "new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 4}),
        ("gpt_bigcode", {"attn_implementation": "eager"}),
        ("gpt_bigcode", {"attn_implementation": "eager", "multi_query": False}),
        ("gpt2", {"attn_implementation": "eager"}),
    ],
)
def test_rows_of_a_fused_projection_behave(name: str, changes: dict[str, Any]) -> None:
    """Values leave the probabilities alone; a constant added to all keys of a head does too (softmax), one added to the queries doesn't."""

    def probabilities(role: str) -> Tensor:
        model: Any = tiny.model(name, **changes)
        site = anatomy(model).sites([role])[0]
        bias = torch.zeros(model.get_submodule(site.path).weight.shape[1 if site.transposed else 0])
        for start, stop in site.rows:
            bias[start:stop] = torch.randn(stop - start, generator=torch.Generator().manual_seed(1))
        model.get_submodule(site.path).register_forward_hook(lambda _m, _a, out: out + bias)
        with torch.no_grad():
            return model(**tiny.batch(name), output_attentions=True).attentions[0]

    with torch.no_grad():
        plain = tiny.model(name, **changes)(**tiny.batch(name), output_attentions=True).attentions[0]
    torch.testing.assert_close(probabilities("v"), plain)
    torch.testing.assert_close(probabilities("k"), plain)
    assert not torch.allclose(probabilities("q"), plain, atol=1e-4)


@pytest.mark.parametrize("name", ["phi3", "modernbert", "unet", "mixtral", "jamba"])
def test_gate_is_what_is_activated(name: str) -> None:
    """silu, gelu: f(0) = 0, so a zero gate silences the network as a zero up does; but only up is linear: twice up is twice the output."""

    def states(change: Callable[[Tensor], Tensor], role: str) -> Tensor:
        model = tiny.model(name)
        found = anatomy(model)
        stack = found.stacks[0]
        block = next(b for b in stack.blocks if any(s.role == role and s.rows for s in b.sites))
        for site in (s for s in block.sites if s.role == role and s.rows):
            module = model.get_submodule(site.path)
            for tensor in filter(None, (site.parameter, site.bias)):
                whole = getattr(module, tensor).data
                whole = whole[site.expert] if site.expert >= 0 else whole
                for start, stop in site.rows:
                    whole[start:stop] = change(whole[start:stop])
        whole_site = next(s for s in block.sites if s.role == "ffn")
        down = next(s for s in block.sites if s.role == "down")
        if down.bias:
            getattr(model.get_submodule(down.path), down.bias).data.zero_()
        with watched(model) as calls, torch.no_grad():
            model(**tiny.batch(name))
        output = calls[whole_site.exit][0][1]
        assert output is not None
        return output

    plain = states(lambda w: w, "up")
    torch.testing.assert_close(states(lambda w: 2 * w, "up"), 2 * plain)
    assert not torch.allclose(states(lambda w: 2 * w, "gate"), 2 * plain, rtol=1e-3)
    for role in ("gate", "up"):
        torch.testing.assert_close(states(torch.zeros_like, role), torch.zeros_like(plain))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "jamba"])
def test_experts_have_sites_of_their_own(name: str) -> None:
    model = tiny.model(name)
    found = anatomy(model)
    depth = 1 if name == "jamba" else 0
    downs = found.sites(["down"], [depth])
    assert [site.expert for site in downs] == list(range(len(downs)))
    assert {(site.called, site.kind, site.caller == site.path) for site in downs} == {(False, "parameter", True)}
    for site in found.sites(["gate_up", "down"], [depth]):
        tensor = getattr(model.get_submodule(site.path), site.parameter)[site.expert]
        shape = (site.out_features, site.in_features)
        assert tuple(tensor.shape) == (shape[::-1] if site.transposed else shape)
        assert site.transposed == (name == "gpt_oss")
        if site.bias:
            assert getattr(model.get_submodule(site.path), site.bias)[site.expert].shape == (site.out_features,)


# ---------------------------------------------------------------------------------------------------------- nothing is touched


@pytest.mark.parametrize("name", FAMILIES)
def test_the_meta_device_will_do(name: str) -> None:
    with torch.device("meta"):
        model = tiny.model(name)
    assert anatomy(model) == anatomy(tiny.model(name))


@pytest.mark.parametrize("name", ["bert", "gpt2", "mixtral", "torch_encoder", "albert", "resnet"])
def test_what_petiole_added_is_not_seen(name: str) -> None:
    model = tiny.model(name)
    before = anatomy(model)
    for site in all_sites(before):
        module = model.get_submodule(site.exit)
        if not hasattr(module, "petiole"):
            module.add_module("petiole", nn.ModuleDict({"q_proj": nn.Linear(4, 4), "norm": nn.LayerNorm(4)}))
    model.add_module("petiole_shared", nn.ModuleList([nn.TransformerEncoderLayer(8, 2) for _ in range(3)]))
    assert anatomy(model) == before


def test_a_shared_layer_is_one_block_that_runs_several_times() -> None:
    found = anatomy(tiny.model("albert"))
    assert [len(stack.blocks) for stack in found.stacks] == [1]
    assert {site.repeats for site in found.stacks[0].blocks[0].sites} == {3}
    model = tiny.model("albert", num_hidden_groups=2, num_hidden_layers=4)
    assert [site.repeats for site in anatomy(model).sites(["q"])] == [2, 2]
    layer = nn.TransformerEncoderLayer(16, 2)
    again = nn.ModuleDict({"encoder": nn.ModuleList([layer, layer, layer])})
    assert [(s.path, s.repeats) for s in anatomy(again).sites(["block"])] == [("encoder.0", 3)]


class Packed(nn.Module):
    """A linear as a quantiser stores it: sizes as attributes, the weight in a shape of its own."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
        self.bias = linear.bias


class Wrapped(nn.Module):
    """A linear inside another module, with low-rank factors beside it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.base_layer = linear
        self.lora_A = nn.Linear(linear.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, linear.out_features, bias=False)
        self.in_features, self.out_features = linear.in_features, linear.out_features

    @property
    def weight(self) -> Tensor:
        raise AssertionError("the anatomy reads no weight")

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias


@pytest.mark.parametrize("name", ["bert", "llama", "vit"])
@pytest.mark.parametrize("kind", [Packed, Wrapped])
def test_a_linear_is_known_by_its_sizes(name: str, kind: type[nn.Module]) -> None:
    model = tiny.model(name)
    before = anatomy(model)
    linears = {
        site.path for stack in before.stacks for block in stack.blocks for site in block.sites if site.kind == "linear"
    }
    for path in linears:
        above, _, last = path.rpartition(".")
        setattr(model.get_submodule(above), last, kind(model.get_submodule(path)))
    assert anatomy(model) == before


# ---------------------------------------------------------------------------------------------------------- stacks


def test_names_and_sizes_of_stacks() -> None:
    told = {
        name: {s.name: (s.hidden_size, s.causal) for s in anatomy(tiny.model(name)).stacks}
        for name in ("bert", "t5", "clip", "swin")
    }
    assert told == {
        "bert": {"encoder": (32, False)},
        "t5": {"encoder": (32, False), "decoder": (32, True)},
        "clip": {"vision": (32, False), "text": (32, True)},
        "swin": {"encoder": (32, False)},
    }
    swin = anatomy(tiny.model("swin")).stack()
    assert [(block.stage, block.hidden_size) for block in swin.blocks] == [(0, 16), (0, 16), (1, 32), (1, 32)]
    assert anatomy(tiny.model("gpt2")).stack().causal is True
    assert anatomy(tiny.model("torch_encoder")).stack().causal is None


@pytest.mark.parametrize(
    ("name", "main"),
    [("bert", "encoder"), ("llama", "decoder"), ("t5", "decoder"), ("whisper", "decoder"), ("llava", "text")],
)
def test_the_main_stack(name: str, main: str) -> None:
    assert anatomy(tiny.model(name)).stack().name == main


@pytest.mark.parametrize("name", ["clip", "unet"])
def test_where_no_stack_is_the_main_one_it_has_to_be_named(name: str) -> None:
    found = anatomy(tiny.model(name)) if name in PRESENT else pytest.skip("diffusers is not installed")
    with pytest.raises(AnatomyError, match="name one of"):
        found.stack()
    assert found.stack(found.stacks[-1].name) is found.stacks[-1]


def test_sibling_lists_with_numbers_are_stages() -> None:
    """As in torchvision's and timm's ResNet: layer1, layer2, … on the model itself."""

    def block(width: int) -> nn.Module:
        return Pair(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.Conv2d(width, width, 1))

    model = nn.Module()
    model.conv1 = nn.Conv2d(3, 4, 3)
    model.layer1, model.layer2 = nn.Sequential(block(4), block(4)), nn.Sequential(block(4))
    model.fc = nn.Linear(4, 3)
    found = anatomy(model)
    assert [(b.path, b.stage, b.depth) for b in found.stack().blocks] == [
        ("layer1.0", 0, 0),
        ("layer1.1", 0, 1),
        ("layer2.0", 1, 2),
    ]
    assert [site.path for site in found.heads()] == ["fc"]


class Pair(nn.Module):
    """A block of three parts."""

    def __init__(self, first: nn.Module, norm: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.second = first, norm, second


def test_a_head_beside_a_backbone_of_ones_own() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = tiny.model("bert").bert
            self.classifier = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 5))

    head = anatomy(Net()).heads()
    assert [(site.path, site.kind, site.in_features, site.out_features) for site in head] == [
        ("classifier", "module", 32, 5)
    ]


# ---------------------------------------------------------------------------------------------------------- asking for sites


def keys(sites: list[Site]) -> list[str]:
    return [site.key for site in sites]


def test_sites_come_in_the_order_of_depth_stack_by_stack() -> None:
    bert, t5 = anatomy(tiny.model("bert", num_hidden_layers=4)), anatomy(tiny.model("t5"))
    assert keys(bert.sites(["v", "q"])) == [f"encoder.{depth}.{role}" for depth in range(4) for role in "qv"]
    assert keys(bert.sites(["q"], [-1, 0, 0])) == ["encoder.0.q", "encoder.3.q"]
    assert keys(t5.sites(["q"], [0])) == ["encoder.0.q", "decoder.0.q", "decoder.0.cross_attention.q"]
    assert keys(t5.sites(["cross_attention.v"])) == ["decoder.0.cross_attention.v", "decoder.1.cross_attention.v"]
    assert keys(t5.sites(["attention.v"], stack="decoder")) == ["decoder.0.v", "decoder.1.v"]
    assert keys(t5.sites(["encoder:q"])) == ["encoder.0.q", "encoder.1.q"]
    assert keys(t5.sites(["q", "attention.q"], [1], "encoder")) == ["encoder.1.q"]
    assert keys(bert.sites(["head", "pooler"])) == ["pooler", "head"]
    assert keys(bert.sites([":norm"])) == ["norm"]
    assert [site.path for site in t5.sites(["attention"], [0], "decoder")] == ["decoder.block.0.layer.0.SelfAttention"]


@pytest.mark.parametrize("name", FAMILIES)
def test_keys_are_unique_and_hold_no_path(name: str) -> None:
    sites = list(all_sites(anatomy(tiny.model(name))))
    counts = Counter(site.key for site in sites)
    assert not [key for key, count in counts.items() if count > 1]
    stacks = "|".join(BLOCKS[name])
    word = "attention|cross_attention|ffn|mixer"
    import re

    assert all(re.fullmatch(rf"(({stacks})\.\d+\.)?(({word})\.)?[a-z_]+(\.e\d+)?(\.\d+)?", key) for key in counts)


def test_keys_read_as_documented() -> None:
    assert keys(anatomy(tiny.model("mixtral")).sites(["down"], [0]))[2] == "decoder.0.ffn.down.e2"
    assert keys(anatomy(tiny.model("bert")).sites(["norm"], [1])) == ["encoder.1.norm", "encoder.1.norm.1"]
    assert keys(anatomy(tiny.model("bart")).sites(["cross_attention.v"], [1])) == ["decoder.1.cross_attention.v"]


# nn.Transformer has a norm behind blocks that end with one, wav2vec2 one that stands beside the list but before it: not told apart
POST_NORM = {
    "bert",
    "roberta",
    "distilbert",
    "electra",
    "albert",
    "mpnet",
    "deberta",
    "deberta_v2",
    "bart",
    "torch_encoder",
}


@pytest.mark.parametrize("name", [n for n in tiny.NAMES if not tiny.missing(n)])
def test_the_norm_that_ends_a_block(name: str) -> None:
    """What it gives is what the block gives; in other models no norm ends a block."""
    model = tiny.model(name)
    found = anatomy(model)
    seen: dict[str, Any] = {}

    def keep(path: str) -> Callable[..., None]:
        return lambda module, args, output: seen.update({path: output})

    for path, module in model.named_modules():
        module.register_forward_hook(keep(path))
    with torch.no_grad():
        model(**tiny.batch(name))
    for stack in found.stacks:
        for block in stack.blocks:
            whole = next(site for site in block.sites if site.role == "block")
            norm = found.closing_norm(whole)
            assert (norm is not None) == (name in POST_NORM)
            if norm is not None:
                output = seen[block.path] if isinstance(seen[block.path], torch.Tensor) else seen[block.path][0]
                assert torch.equal(seen[norm.path], output)


def test_attentions_and_their_parts() -> None:
    found = anatomy(tiny.model("bart"))
    every = found.attentions()
    assert [site.key for site in every[2:]] == [
        f"decoder.{depth}.{role}" for role in ("attention", "cross_attention") for depth in (0, 1)
    ]
    assert [site.key for site in found.attentions([1], "decoder", cross=False)] == ["decoder.1.attention"]
    parts = [found.part(site, "o") for site in every]
    assert [part.path for part in parts if part is not None] == [site.exit for site in every]
    assert found.part(every[0], "qkv") is None
    assert anatomy(tiny.model("resnet")).attentions() == []


def test_a_side_of_a_site() -> None:
    down = anatomy(tiny.model("bert")).sites(["down"])[0]
    sides: dict[Side, int] = {"input": 64, "output": 32}
    assert down.side == "output" and {side: down.at(side).size for side in sides} == sides


def test_hybrids_are_complete_kind_by_kind() -> None:
    jamba, following = anatomy(tiny.model("jamba")), anatomy(tiny.model("qwen3_next"))
    assert [site.depth for site in jamba.sites(["q"])] == [1, 3]
    assert [site.depth for site in following.sites(["q"])] == [3]
    assert "q: 2 of 4 blocks (every JambaAttentionDecoderLayer)" in jamba.coverage()
    assert "mixer: 3 of 4 blocks (every Qwen3NextDecoderLayer with linear_attn)" in following.coverage()


def test_a_role_that_only_some_blocks_have_is_refused_unasked() -> None:
    model = tiny.model("llama", num_hidden_layers=3)
    model.get_submodule("model.layers.1.self_attn").q_proj = nn.Bilinear(2, 2, 2)  # something else in its place
    found = anatomy(model, roles={"o": "self_attn.o_proj"})
    with pytest.raises(
        AnatomyError, match=r"(?s)'q' is in 2 of the 3 chosen blocks.*\nnot in 1: choose layers=, or pass partial=True"
    ):
        found.sites(["q"])
    assert [site.depth for site in found.sites(["q"], partial=True)] == [0, 2]
    assert [site.depth for site in found.sites(["q"], [0, 2])] == [0, 2]


@pytest.mark.parametrize(
    ("name", "request_", "says"),
    [
        (
            "bert",
            {"roles": ["kv"]},
            ["no 'kv'", "roles=['kv']", "BertForSequenceClassification", "encoder: q 2", "no such role"],
        ),
        ("bert", {"roles": ["atention"]}, ["nearest: attention"]),
        ("bert", {"roles": ["gate"]}, ["To name it by hand: pt.anatomy(model, roles={'gate': 'path.in.a.block'})"]),
        ("bert", {"roles": ["cross_attention.q"]}, ["no 'cross_attention.q'"]),
        ("bert", {"roles": ["q"], "layers": [2]}, ["layer 2 is out of range", "layers=[2]", "from -2 to 1"]),
        ("bert", {"roles": ["q"], "stack": "decoder"}, ["no stack 'decoder'", "it has encoder"]),
        ("bert", {"roles": "q"}, ["give a list of roles"]),
        (
            "deberta",
            {"roles": ["q"]},
            ["`attention.self.in_proj` holds q, k and v, but not in an order that can be told"],
        ),
        ("gpt_oss", {"roles": ["up"]}, ["interleaved"]),
    ],
)
def test_what_is_not_there_is_an_error_that_helps(name: str, request_: dict[str, Any], says: list[str]) -> None:
    with pytest.raises(AnatomyError) as error:
        anatomy(tiny.model(name)).sites(**request_)
    message = str(error.value)
    assert all(part in message for part in says), message
    assert len(message.splitlines()) <= 3


def test_no_stack_is_an_error_that_helps() -> None:
    with pytest.raises(
        AnatomyError, match=r"(?s)MLP: no list of two or more blocks.*its lists are layers.*stacks=\{'encoder'"
    ):
        type_ = type("MLP", (nn.Module,), {})
        model = type_()
        model.layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        anatomy(model)


def test_printed_and_as_a_dictionary() -> None:
    found = anatomy(tiny.model("t5"))
    text = found.coverage()
    assert (
        "encoder: 2 blocks (T5Block), width 32" in text
        and "cross_attention.q: 2 of 2 blocks" in text
        and "lm_head: lm_head" in text
    )
    whole = json.loads(json.dumps(found.to_dict()))
    assert whole["model_class"] == "T5ForConditionalGeneration"
    assert whole["stacks"][1]["blocks"][0]["sites"][0]["role"] == "block"
    assert {"q", "down", "lm_head"} <= set(found.roles)


# ---------------------------------------------------------------------------------------------------------- named by hand


class Odd(nn.Module):
    """A block whose names say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha, self.beta, self.gamma, self.delta = (nn.Linear(8, 8) for _ in range(4))
        self.one, self.two = nn.Linear(8, 24), nn.Linear(24, 8)
        self.scale = nn.LayerNorm(8)


class OddModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.ModuleDict({"a": Odd(), "b": Odd()})
        self.words = nn.Embedding(9, 8)
        self.answer = nn.Linear(8, 2)


def test_stacks_and_roles_named_by_hand() -> None:
    model = OddModel()
    with pytest.raises(AnatomyError, match="no list of two or more blocks"):
        anatomy(model)
    found = anatomy(model, stacks={"trunk": "trunk"})
    assert [block.path for block in found.stack().blocks] == ["trunk.a", "trunk.b"]
    assert found.roles == (
        "up",
        "down",
        "linear",
        "ffn",
        "block",
        "embedding",
        "norm",
    )  # the network d -> f -> d shows by its shape
    named = anatomy(
        model,
        stacks={"trunk": "trunk"},
        roles={"q": "alpha", "k": "beta", "v": "gamma", "o": "delta", "attention": "alpha -> delta", "head": "answer"},
    )
    assert table_of(named.stack().blocks[1]) == {
        "q": "alpha", "k": "beta", "v": "gamma", "o": "delta", "attention": "alpha -> delta", "ffn": "one -> two", "up": "one", "down": "two",
        "norm": "scale",
    }  # fmt: skip
    assert [site.path for site in named.heads()] == ["answer"]


def test_several_lists_named_by_hand_are_stages() -> None:
    model = nn.Module()
    for name in ("s1", "s2"):
        setattr(model, name, nn.ModuleDict({"b1": Odd(), "b2": Odd()}))
    found = anatomy(model, stacks={"encoder": "s1, s2"})
    assert [(block.path, block.stage) for block in found.stack().blocks] == [
        ("s1.b1", 0),
        ("s1.b2", 0),
        ("s2.b1", 1),
        ("s2.b2", 1),
    ]


@pytest.mark.parametrize(
    ("by_hand", "says"),
    [
        ({"stacks": {"encoder": "bert.encoder.layers"}}, "nearest: bert.encoder.layer"),
        ({"roles": {"query": "attention"}}, "no such role"),
        ({"roles": {"q": "attention.self.querry"}}, "ends in 'attention.self.querry'"),
        ({"roles": {"ffn": "intermediate -> outptu"}}, "ends in 'outptu'"),
        ({"stacks": {"my.stack": "bert.encoder.layer"}}, "letters, digits and underscores"),
    ],
)
def test_a_name_by_hand_that_leads_nowhere_is_refused(by_hand: dict[str, Any], says: str) -> None:
    with pytest.raises(AnatomyError, match=says.replace(".", r"\.")):
        anatomy(tiny.model("bert"), **by_hand)
