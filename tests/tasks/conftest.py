"""Tiny models and tokenizers of every kind of task, built once and saved as folders; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "mat",
    "hill",
    "good",
    "bad",
    "film",
    "very",
    "not",
    "one",
    "two",
    "three",
    "red",
    "?",
]


def tokenizer(**special: Any) -> Any:
    """A tokenizer of whole words; unknown words are [UNK]."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "</s>", *WORDS]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(names)}, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    if "cls_token" in special:
        inner.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    elif "eos_token" in special and "pad_token" in special:
        inner.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 4)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", **special)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """bert, gpt2, t5, vit, wav2vec2: name -> folder that `save_pretrained` wrote."""
    import transformers as t

    root = tmp_path_factory.mktemp("models")
    folders = {name: root / name for name in ("bert", "gpt2", "t5", "vit", "wav2vec2")}
    torch.manual_seed(0)
    size = {"vocab_size": 5 + len(WORDS)}

    bert = t.BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=24,
        **size,
    )
    t.BertModel(bert).save_pretrained(folders["bert"])
    names = ["input_ids", "token_type_ids", "attention_mask"]
    words = tokenizer(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", model_input_names=names)
    words.save_pretrained(folders["bert"])

    gpt2 = t.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=24, bos_token_id=4, eos_token_id=4, **size)
    t.GPT2LMHeadModel(gpt2).save_pretrained(folders["gpt2"])
    tokenizer(eos_token="</s>").save_pretrained(folders["gpt2"])

    t5 = t.T5Config(
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=4,
        **size,
    )
    t.T5ForConditionalGeneration(t5).save_pretrained(folders["t5"])
    tokenizer(pad_token="[PAD]", eos_token="</s>").save_pretrained(folders["t5"])

    vit = t.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4, num_labels=2,
        id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1},
    )  # fmt: skip
    t.ViTForImageClassification(vit).half().save_pretrained(folders["vit"])
    t.ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folders["vit"])

    wav2vec2 = t.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, conv_dim=(8, 8), conv_kernel=(10, 3),
        conv_stride=(5, 2), num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, vocab_size=10,
    )  # fmt: skip
    t.Wav2Vec2Model(wav2vec2).save_pretrained(folders["wav2vec2"])
    t.Wav2Vec2FeatureExtractor(sampling_rate=16000, return_attention_mask=True).save_pretrained(folders["wav2vec2"])
    return folders
