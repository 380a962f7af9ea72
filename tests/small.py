"""A comparison small enough for a test: a BERT of two blocks that tells good films from bad ones, and commands for a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

WORDS = ["the", "a", "film", "was", "is", "good", "bad", "very", "quite", "and", "long", "short", "."]
MODEL, DATA = "bert", "films.csv"
OPTIONS: dict[str, Any] = {"steps": 3, "batch_size": 4, "trials": 2, "seeds": 2, "evaluations": 2, "threads": 1}


def tokenizer() -> Any:
    """Whole words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(names)}, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    inner.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )


def bert(folder: Path) -> Path:
    """A BERT with a pooler and without a task head, saved."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=4 + len(WORDS), max_position_embeddings=16, **sizes)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def gpt2(folder: Path) -> Path:
    """A GPT-2, saved."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    GPT2LMHeadModel(GPT2Config(vocab_size=4 + len(WORDS), bos_token_id=3, eos_token_id=3, **sizes)).save_pretrained(
        folder
    )
    words = tokenizer()
    words.eos_token = "[SEP]"
    words.save_pretrained(folder)
    return folder


def films(path: Path, rows: int = 40) -> Path:
    """A csv of texts and labels."""
    lines = ["text,label"]
    for i in range(rows):
        word = "good" if i % 2 else "bad"
        lines.append(
            f"{['the', 'a'][i % 3 % 2]} film {['was', 'is'][i // 2 % 2]} {['very', 'quite'][i // 4 % 2]} {word},{word}"
        )
    path.write_text("\n".join(lines) + "\n")
    return path


def place(folder: Path) -> Path:
    """Model and data in one folder."""
    bert(folder / MODEL)
    films(folder / DATA)
    return folder


def command(*words: str | Path) -> list[str]:
    """`petiole …` in a process of its own."""
    return [sys.executable, "-m", "petiole.cli", *map(str, words)]


def run(*words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    return subprocess.run(command(*words), capture_output=True, text=True, timeout=240, env=env, **options)
