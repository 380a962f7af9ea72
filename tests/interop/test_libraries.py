"""An adapted model in other people's loops: `generate`, `pipeline`, TRL's SFTTrainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import petiole as pt
import tiny

pytestmark = pytest.mark.filterwarnings("ignore")

WORDS = [f"w{number}" for number in range(tiny.VOCABULARY - 4)]


def tokenizer() -> Any:
    """As many words as the tiny models know."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "</s>", "<unk>", *WORDS]
    inner = Tokenizer(WordLevel({word: number for number, word in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
    )


def moved(model: nn.Module, method: Any, **options: Any) -> pt.Adaptation:
    tuned = pt.attach(model, method, **options)
    for number, parameter in enumerate(tuned.parameters()):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        with torch.no_grad():
            parameter.add_(0.3 * noise)
    return tuned


METHODS: dict[str, Any] = {
    "lora": lambda: pt.LoRA(rank=4),
    "dora": lambda: pt.DoRA(rank=4),
    "parallel-adapter": lambda: pt.ParallelAdapter(bottleneck=4),
    "prefix-tuning": lambda: pt.PrefixTuning(length=3),
}


def step_by_step(model: Any, tokens: torch.Tensor, count: int) -> torch.Tensor:
    """Greedy decoding without a cache: every token from a forward pass over all before it."""
    for _ in range(count):
        with torch.no_grad():
            logits = model(input_ids=tokens, use_cache=False).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    return tokens


@pytest.mark.parametrize("method", METHODS)
def test_generate_with_a_cache_gives_what_forward_passes_give(method: str) -> None:
    model: Any = tiny.model("llama")
    tokens = tiny.batch("llama")["input_ids"][:, :5]
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(tokens, **options)
    tuned = moved(model, METHODS[method]())
    wanted = step_by_step(model, tokens, 6)
    assert torch.equal(model.generate(tokens, **options), wanted)
    assert not torch.equal(wanted, plain)
    beams = model.generate(tokens, num_beams=3, **options)
    assert beams.shape == wanted.shape
    with tuned.disabled():
        assert torch.equal(model.generate(tokens, **options), plain)
    tuned.detach()
    assert torch.equal(model.generate(tokens, **options), plain)


def test_generate_of_a_seq2seq_model() -> None:
    model: Any = tiny.model("t5")
    batch = tiny.batch("t5")
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    plain = model.generate(**inputs, **options)
    moved(model, pt.LoRA(rank=4, roles=("q", "v", "o")))
    changed = model.generate(**inputs, **options)
    with torch.no_grad():
        logits = model(**inputs, decoder_input_ids=changed[:, :-1]).logits
    alive = changed[:, 1:] != model.config.pad_token_id
    assert torch.equal(logits.argmax(-1)[alive], changed[:, 1:][alive])
    assert plain.shape != changed.shape or not torch.equal(plain, changed)


def test_text_generation_pipeline() -> None:
    from transformers import pipeline

    model, words = tiny.model("llama"), tokenizer()
    tuned = moved(model, pt.LoRA(rank=4))
    generate = pipeline("text-generation", model=model, tokenizer=words, device="cpu")
    prompt = "w1 w2 w3"
    made = generate(prompt, max_new_tokens=4, do_sample=False, return_full_text=False, eos_token_id=None)[0][
        "generated_text"
    ]
    tokens = words(prompt, return_tensors="pt")["input_ids"]
    assert made.split() == words.decode(step_by_step(model, tokens, 4)[0, tokens.shape[1] :]).split()
    with tuned.disabled():
        assert (
            made
            != generate(prompt, max_new_tokens=4, do_sample=False, return_full_text=False, eos_token_id=None)[0][
                "generated_text"
            ]
        )


def test_text_classification_pipeline() -> None:
    from transformers import pipeline

    model, words = tiny.model("bert"), tokenizer()
    words.model_input_names, words.padding_side = (
        ["input_ids", "attention_mask"],
        "right",
    )  # positions count from the left
    plain = pipeline("text-classification", model=model, tokenizer=words, device="cpu", top_k=None)
    texts = ["w1 w2 w3", "w4 w5"]
    before = plain(texts)
    tuned = moved(model, pt.LoRA(rank=4))
    after = plain(texts, batch_size=2)
    assert after != before
    for text, scores in zip(texts, after, strict=True):
        with torch.no_grad():
            wanted = model(**words(text, return_tensors="pt")).logits.softmax(-1)[0]
        assert {entry["label"]: pytest.approx(entry["score"], abs=1e-5) for entry in scores} == {
            f"LABEL_{number}": float(share) for number, share in enumerate(wanted)
        }
    tuned.detach()
    assert plain(texts) == before


def test_sft_trainer_of_trl(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="needs TRL: pip install 'petiole[trl]'")
    from datasets import Dataset

    model: Any = tiny.model("llama")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    tuned = pt.attach(model, pt.LoRA(rank=4, roles=("q", "v", "down")))
    before = {name: value.clone() for name, value in tuned.named_tensors().items()}
    texts = [" ".join(f"w{(3 * row + column) % 12}" for column in range(6)) for row in range(8)]
    settings = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=4, learning_rate=2e-2, max_length=16, use_cpu=True,
        bf16=False, report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=model, args=settings, train_dataset=Dataset.from_dict({"text": texts}), processing_class=tokenizer()
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert all(not torch.equal(before[name], value) for name, value in tuned.named_tensors().items())
    batch = tiny.batch("llama")
    with torch.no_grad():
        changed = model.eval()(**batch).logits
    tuned.save(tmp_path / "sft.safetensors")
    tuned.detach()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    pt.load(model, tmp_path / "sft.safetensors")
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, changed)
