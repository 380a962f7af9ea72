"""Tiny models with random weights, one of every family, and a batch that each takes.

    model = tiny.model("bert")              # fresh on every call, the same weights every time
    output = model(**tiny.batch("bert"))    # with labels where the head takes them

Built from configurations alone; nothing is downloaded. `model("llama", num_hidden_layers=4)` changes fields of the configuration. Biases and
norms are not left at zero and one, so that a test sees when they are forgotten.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

Fields = dict[str, Any]
VOCABULARY, LENGTH, BATCH = 48, 7, 2


@dataclass(frozen=True)
class Recipe:
    """How to build a model and what it takes.

    Attributes:
        build: makes the bare model from changes to its configuration.
        takes: name of the function below that makes its batch.
        needs: an optional package.
    """

    build: Callable[[Fields], nn.Module]
    takes: str
    needs: str = ""


# ------------------------------------------------------------------------------------------------------------------ configurations

_BODY: Fields = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_NO_DROPOUT: Fields = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_TEXT: Fields = {**_BODY, "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BERT: Fields = {**_TEXT, **_NO_DROPOUT, "max_position_embeddings": 40, "type_vocab_size": 2, "num_labels": 3}
_GROUPED: Fields = {**_TEXT, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
_IMAGE: Fields = {**_BODY, **_NO_DROPOUT, "image_size": 8, "patch_size": 4, "num_labels": 3}
_GPT: Fields = {
    "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "vocab_size": VOCABULARY,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_SEQ2SEQ: Fields = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": VOCABULARY, "dropout": 0.0,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
_WAVE: Fields = {
    **_TEXT, "conv_dim": [16, 16], "conv_kernel": [3, 3], "conv_stride": [2, 2], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "num_labels": 3, "classifier_proj_size": 16,
    "hidden_dropout": 0.0, "attention_dropout": 0.0, "feat_proj_dropout": 0.0, "activation_dropout": 0.0, "layerdrop": 0.0,
    "final_dropout": 0.0, "mask_time_prob": 0.0, "mask_feature_prob": 0.0,
}  # fmt: skip


def _hf(model: str, config: str, takes: str, **fields: Any) -> Recipe:
    """A model of Transformers."""

    def build(changes: Fields) -> nn.Module:
        import transformers

        settings = getattr(transformers, config)(**{**fields, **changes})
        return getattr(transformers, model)(settings)

    return Recipe(build, takes)


def _clip(changes: Fields) -> nn.Module:
    import transformers as t

    vision = {k: v for k, v in _IMAGE.items() if k not in ("num_labels", *_NO_DROPOUT)}
    text = {**_TEXT, "max_position_embeddings": 16}
    return t.CLIPModel(
        t.CLIPConfig(text_config={**text, **changes}, vision_config={**vision, **changes}, projection_dim=16)
    )


def _llava(changes: Fields) -> nn.Module:
    import transformers as t

    vision = t.CLIPVisionConfig(**{k: v for k, v in _IMAGE.items() if k not in ("num_labels", *_NO_DROPOUT)})
    config = t.LlavaConfig(
        text_config=t.LlamaConfig(**{**_GROUPED, **changes}), vision_config=vision, image_token_index=3
    )
    return t.LlavaForConditionalGeneration(config)


def _torch_encoder(changes: Fields) -> nn.Module:
    fields = {
        "d_model": 32,
        "nhead": 4,
        "dim_feedforward": 64,
        "dropout": 0.0,
        "batch_first": True,
        "num_layers": 2,
        **changes,
    }
    layers = fields.pop("num_layers")
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(**fields), layers)


def _torch_seq2seq(changes: Fields) -> nn.Module:
    fields = {
        "d_model": 32,
        "nhead": 4,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "dim_feedforward": 64,
        "dropout": 0.0,
    }
    return nn.Transformer(**{**fields, "batch_first": True, **changes})


def _dit(changes: Fields) -> nn.Module:
    from diffusers import DiTTransformer2DModel

    fields = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2}
    return DiTTransformer2DModel(**{**fields, "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10, **changes})


def _unet(changes: Fields) -> nn.Module:
    from diffusers import UNet2DConditionModel

    fields: Fields = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 12, "attention_head_dim": 4, "norm_num_groups": 4,
    }  # fmt: skip
    return UNet2DConditionModel(**{**fields, **changes})


def _timm(changes: Fields) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    fields = {
        "img_size": 8,
        "patch_size": 4,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 4,
        "mlp_ratio": 2.0,
        "num_classes": 3,
    }
    return VisionTransformer(**{**fields, **changes})


_JAMBA: Fields = {
    **_GROUPED, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
    "expert_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1, "mamba_d_state": 4, "mamba_dt_rank": 4,
    "use_mamba_kernels": False,
}  # fmt: skip
_QWEN3_NEXT: Fields = {
    **_GROUPED, "num_hidden_layers": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}  # fmt: skip
_DEEPSEEK: Fields = {
    **_TEXT, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "qk_nope_head_dim": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16,
    "first_k_dense_replace": 1, "num_key_value_heads": 4,
}  # fmt: skip
_DEBERTA: Fields = {**_BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
_SWIN: Fields = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 16,
    "num_heads": [2, 4],
    "window_size": 2,
    "num_labels": 3,
}
_FALCON: Fields = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

RECIPES: dict[str, Recipe] = {
    # text encoders
    "bert": _hf("BertForSequenceClassification", "BertConfig", "classes", **_BERT),
    "roberta": _hf("RobertaForSequenceClassification", "RobertaConfig", "classes", **_BERT),
    "distilbert": _hf(
        "DistilBertForSequenceClassification", "DistilBertConfig", "classes", dim=32, n_layers=2, n_heads=4, hidden_dim=64,
        vocab_size=VOCABULARY, max_position_embeddings=40, num_labels=3, dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0,
    ),
    "electra": _hf("ElectraForSequenceClassification", "ElectraConfig", "classes", embedding_size=16, **_BERT),
    "deberta": _hf("DebertaForSequenceClassification", "DebertaConfig", "classes", **_DEBERTA),
    "deberta_v2": _hf("DebertaV2ForSequenceClassification", "DebertaV2Config", "classes", **_DEBERTA, position_buckets=8, share_att_key=False),
    "albert": _hf("AlbertForSequenceClassification", "AlbertConfig", "classes", embedding_size=16, **{**_BERT, "num_hidden_layers": 3}),
    "mpnet": _hf("MPNetForSequenceClassification", "MPNetConfig", "classes", **{k: v for k, v in _BERT.items() if k != "type_vocab_size"}),
    "modernbert": _hf(
        "ModernBertForSequenceClassification", "ModernBertConfig", "classes", **_TEXT, cls_token_id=1, sep_token_id=2, num_labels=3,
        embedding_dropout=0.0, mlp_dropout=0.0, attention_dropout=0.0, classifier_dropout=0.0,
    ),
    # causal language models
    "gpt2": _hf("GPT2LMHeadModel", "GPT2Config", "next_token", **_GPT),
    "gptj": _hf("GPTJForCausalLM", "GPTJConfig", "next_token", **_GPT, rotary_dim=4),
    "gpt_bigcode": _hf("GPTBigCodeForCausalLM", "GPTBigCodeConfig", "next_token", **_GPT),
    "gpt_neox": _hf("GPTNeoXForCausalLM", "GPTNeoXConfig", "next_token", **_TEXT),
    "bloom": _hf(
        "BloomForCausalLM", "BloomConfig", "next_token", hidden_size=32, n_layer=2, n_head=4, vocab_size=VOCABULARY,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ),
    "falcon": _hf("FalconForCausalLM", "FalconConfig", "next_token", **_FALCON, new_decoder_architecture=True, num_kv_heads=2),
    "codegen": _hf("CodeGenForCausalLM", "CodeGenConfig", "next_token", **_GPT, rotary_dim=4),
    "opt": _hf(
        "OPTForCausalLM", "OPTConfig", "next_token", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, dropout=0.0,
        vocab_size=VOCABULARY, word_embed_proj_dim=16, max_position_embeddings=40, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ),
    "llama": _hf("LlamaForCausalLM", "LlamaConfig", "next_token", **_GROUPED),
    "qwen2": _hf("Qwen2ForCausalLM", "Qwen2Config", "next_token", **_GROUPED),
    "qwen3": _hf("Qwen3ForCausalLM", "Qwen3Config", "next_token", **_GROUPED),
    "mistral": _hf("MistralForCausalLM", "MistralConfig", "next_token", **_GROUPED),
    "gemma": _hf("GemmaForCausalLM", "GemmaConfig", "next_token", **_GROUPED),
    "phi": _hf("PhiForCausalLM", "PhiConfig", "next_token", **_TEXT, embd_pdrop=0.0, resid_pdrop=0.0),
    "phi3": _hf("Phi3ForCausalLM", "Phi3Config", "next_token", **_TEXT, num_key_value_heads=2),
    "mamba": _hf(
        "MambaForCausalLM", "MambaConfig", "next_token", hidden_size=32, num_hidden_layers=2, vocab_size=VOCABULARY, state_size=4,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, use_mambapy=False,
    ),
    "jamba": _hf("JambaForCausalLM", "JambaConfig", "next_token", **_JAMBA),
    "qwen3_next": _hf("Qwen3NextForCausalLM", "Qwen3NextConfig", "next_token", **_QWEN3_NEXT),
    "mixtral": _hf("MixtralForCausalLM", "MixtralConfig", "next_token", **_GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "gpt_oss": _hf("GptOssForCausalLM", "GptOssConfig", "next_token", **_GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "deepseek_v3": _hf("DeepseekV3ForCausalLM", "DeepseekV3Config", "next_token", **_DEEPSEEK),
    "llama_classifier": _hf("LlamaForSequenceClassification", "LlamaConfig", "classes", **_GROUPED, num_labels=3),
    # sequence to sequence
    "t5": _hf(
        "T5ForConditionalGeneration", "T5Config", "target_text", d_model=32, num_layers=2, num_heads=4, d_kv=8, d_ff=64, dropout_rate=0.0,
        vocab_size=VOCABULARY, pad_token_id=0, eos_token_id=2, decoder_start_token_id=1,
    ),
    "bart": _hf("BartForConditionalGeneration", "BartConfig", "target_text", **_SEQ2SEQ, max_position_embeddings=40),
    # images
    "vit": _hf("ViTForImageClassification", "ViTConfig", "image_classes", **_IMAGE),
    "deit": _hf("DeiTForImageClassification", "DeiTConfig", "image_classes", **_IMAGE),
    "swin": _hf("SwinForImageClassification", "SwinConfig", "large_image_classes", **_SWIN, depths=[2, 2], drop_path_rate=0.0),
    "swinv2": _hf("Swinv2ForImageClassification", "Swinv2Config", "large_image_classes", **_SWIN, depths=[1, 1], drop_path_rate=0.0),
    "beit": _hf("BeitForImageClassification", "BeitConfig", "image_classes", **_IMAGE, drop_path_rate=0.0),
    "dinov2": _hf(
        "Dinov2ForImageClassification", "Dinov2Config", "image_classes", **{k: v for k, v in _IMAGE.items() if k != "intermediate_size"},
        mlp_ratio=2,
    ),
    "resnet": _hf(
        "ResNetForImageClassification", "ResNetConfig", "large_image_classes", embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2],
        layer_type="bottleneck", num_labels=3,
    ),
    "convnext": _hf("ConvNextForImageClassification", "ConvNextConfig", "large_image_classes", num_stages=2, hidden_sizes=[16, 32],
                    depths=[2, 2], patch_size=2, num_labels=3),
    "timm_vit": Recipe(_timm, "image_alone", needs="timm"),
    # images and text
    "clip": Recipe(_clip, "image_and_text"),
    "vilt": _hf("ViltForQuestionAnswering", "ViltConfig", "image_question", **_BERT, image_size=8, patch_size=4, max_image_length=-1),
    "llava": Recipe(_llava, "image_in_text"),
    # sound
    "ast": _hf(
        "ASTForAudioClassification", "ASTConfig", "spectrogram_classes", **_BODY, **_NO_DROPOUT, num_mel_bins=16, max_length=32, patch_size=8,
        frequency_stride=8, time_stride=8, num_labels=3,
    ),
    "wav2vec2": _hf("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", "wave_classes", **_WAVE),
    "whisper": _hf(
        "WhisperForConditionalGeneration", "WhisperConfig", "speech_text", **_SEQ2SEQ, num_mel_bins=8, max_source_positions=8,
        max_target_positions=16,
    ),
    # plain torch, diffusion
    "torch_encoder": Recipe(_torch_encoder, "hidden_states"),
    "torch_seq2seq": Recipe(_torch_seq2seq, "two_hidden_states"),
    "dit": Recipe(_dit, "latents_of_class", needs="diffusers"),
    "unet": Recipe(_unet, "latents_of_text", needs="diffusers"),
}  # fmt: skip
NAMES = tuple(RECIPES)
RECIPES["deep_vit"] = _hf(  # no family of its own: "vit" with blocks and pixels for four stages
    "ViTForImageClassification", "ViTConfig", "deep_image_classes",
    **{**_IMAGE, "num_hidden_layers": 4, "image_size": 64, "patch_size": 16},
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------ models, batches


def missing(name: str) -> str:
    """The optional package that a family needs and that is not installed, "" if it can be built."""
    needs = RECIPES[name].needs
    return "" if not needs or find_spec(needs) else needs


@cache
def _factory(name: str) -> Callable[[Fields], nn.Module]:
    return RECIPES[name].build


def model(name: str, /, seed: int = 0, **changes: Any) -> nn.Module:
    """A fresh model of that family, in evaluation mode; other fields of its configuration by keyword. The global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = _factory(name)(changes)
        if any(p.is_meta for p in made.parameters()):
            return made.eval()
        for parameter in made.parameters():
            if parameter.ndim == 1:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    return made.eval()


def batch(name: str, /, seed: int = 0, size: int = BATCH) -> dict[str, Any]:
    """Keyword arguments for a forward pass of that family, with labels where its head takes them."""
    generator = torch.Generator().manual_seed(seed)
    return globals()[f"_{RECIPES[name].takes}"](size, generator)


def _tokens(size: int, generator: torch.Generator, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(4, VOCABULARY, (size, length), generator=generator)


def _text(size: int, generator: torch.Generator) -> dict[str, Any]:
    """Tokens; the last row is one shorter than the others, padded on the right."""
    tokens, mask = _tokens(size, generator), torch.ones(size, LENGTH, dtype=torch.long)
    if size > 1:
        tokens[-1, -1], mask[-1, -1] = 0, 0
    return {"input_ids": tokens, "attention_mask": mask}


def _labels(size: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 3, (size,), generator=generator)


def _classes(size: int, generator: torch.Generator) -> dict[str, Any]:
    return {**_text(size, generator), "labels": _labels(size, generator)}


def _next_token(size: int, generator: torch.Generator) -> dict[str, Any]:
    text = _text(size, generator)
    return {**text, "labels": text["input_ids"].masked_fill(text["attention_mask"] == 0, -100)}


def _target_text(size: int, generator: torch.Generator) -> dict[str, Any]:
    return {**_text(size, generator), "labels": _tokens(size, generator, 5)}


def _images(size: int, generator: torch.Generator, side: int = 8) -> dict[str, Any]:
    return {"pixel_values": torch.randn(size, 3, side, side, generator=generator)}


def _image_classes(size: int, generator: torch.Generator) -> dict[str, Any]:
    return {**_images(size, generator), "labels": _labels(size, generator)}


def _large_image_classes(size: int, generator: torch.Generator) -> dict[str, Any]:
    return {**_images(size, generator, 16), "labels": _labels(size, generator)}


def _deep_image_classes(size: int, generator: torch.Generator) -> dict[str, Any]:
    return {**_images(size, generator, 64), "labels": _labels(size, generator)}


def _image_alone(size: int, generator: torch.Generator) -> dict[str, Any]:
    return {"x": _images(size, generator)["pixel_values"]}


def _image_and_text(size: int, generator: torch.Generator) -> dict[str, Any]:
    text = _text(size, generator)
    text["input_ids"][torch.arange(size), text["attention_mask"].sum(1) - 1] = (
        2  # the token at which the text is pooled
    )
    return {**text, **_images(size, generator), "return_loss": True}


def _image_question(size: int, generator: torch.Generator) -> dict[str, Any]:
    answers = torch.nn.functional.one_hot(_labels(size, generator), 3).float()
    return {**_text(size, generator), **_images(size, generator), "labels": answers}


def _image_in_text(size: int, generator: torch.Generator) -> dict[str, Any]:
    """Every image is four tokens, at the start of its text."""
    text = _next_token(size, generator)
    text["input_ids"][:, :4] = 3
    return {**text, **_images(size, generator)}


def _spectrogram_classes(size: int, generator: torch.Generator) -> dict[str, Any]:
    return {"input_values": torch.randn(size, 32, 16, generator=generator), "labels": _labels(size, generator)}


def _wave_classes(size: int, generator: torch.Generator) -> dict[str, Any]:
    return {"input_values": torch.randn(size, 64, generator=generator), "labels": _labels(size, generator)}


def _speech_text(size: int, generator: torch.Generator) -> dict[str, Any]:
    return {"input_features": torch.randn(size, 8, 16, generator=generator), "labels": _tokens(size, generator, 5)}


def _hidden_states(size: int, generator: torch.Generator) -> dict[str, Any]:
    return {"src": torch.randn(size, LENGTH, 32, generator=generator)}


def _two_hidden_states(size: int, generator: torch.Generator) -> dict[str, Any]:
    return {
        "src": torch.randn(size, LENGTH, 32, generator=generator),
        "tgt": torch.randn(size, 5, 32, generator=generator),
    }


def _latents_of_class(size: int, generator: torch.Generator) -> dict[str, Any]:
    latents = torch.randn(size, 4, 8, 8, generator=generator)
    return {"hidden_states": latents, "timestep": torch.arange(size) * 10 + 1, "class_labels": torch.arange(size) % 10}


def _latents_of_text(size: int, generator: torch.Generator) -> dict[str, Any]:
    latents = torch.randn(size, 4, 8, 8, generator=generator)
    return {
        "sample": latents,
        "timestep": torch.arange(size) * 10 + 1,
        "encoder_hidden_states": torch.randn(size, 5, 12, generator=generator),
    }
