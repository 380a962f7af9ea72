"""A small T5 that has learnt two made-up languages, and a task that it has not seen: the backbone of text-to-text benchmarks.

It is pre-trained to say in `b` what is said in `a`, and the other way round. The task is to say in `a` what is said in words of both: most of
it is known, and a frozen model still gets it wrong.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from petiole.tasks.toy_languages import CLS, SEP, ToyLanguages

LENGTH, STEPS, BATCH = 8, 1200, 64
ROWS: Mapping[str, int] = {"train": 3000, "validation": 200, "test": 600}


def languages() -> ToyLanguages:
    return ToyLanguages(concepts=60, topics=6)


def fresh(toy: ToyLanguages) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(
            d_model=128, d_kv=32, d_ff=512, num_layers=4, num_heads=4, vocab_size=toy.vocabulary, dropout_rate=0.0, pad_token_id=0,
            decoder_start_token_id=0, eos_token_id=SEP, feed_forward_proj="relu",
        )
    )  # fmt: skip


def framed(words: Tensor) -> Tensor:
    """Words (n, t) -> (n, t + 2), as the tokenizer frames them."""
    return torch.cat([torch.full((len(words), 1), CLS), words, torch.full((len(words), 1), SEP)], 1)


def pretrain(model: nn.Module, toy: ToyLanguages, steps: int = STEPS) -> float:
    """IN PLACE; the loss of the last step."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, n / 100, (steps - n) / (0.2 * steps)))
    for number in range(steps):
        topics = torch.randint(toy.topics, (BATCH,), generator=generator)
        said = toy.said(topics, LENGTH, generator)
        a, b = (framed(toy.translated(said, language)) for language in ("a", "b"))
        read, written = (a, b) if number % 2 else (b, a)
        loss = model(input_ids=read, labels=written).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def rows(toy: ToyLanguages, split: str) -> list[dict[str, str]]:
    generator = torch.Generator().manual_seed(1 + list(ROWS).index(split))
    topics = torch.randint(toy.topics, (ROWS[split],), generator=generator)
    said = toy.said(topics, LENGTH, generator)
    mixed, plain = toy.translated(said, "mixed", generator), toy.translated(said, "a")
    return [{"text": toy.text(x), "target": toy.text(y)} for x, y in zip(mixed, plain, strict=True)]


def small_t5(folder: Path) -> tuple[Path, Path]:
    """The pre-trained model and the data of the task, made once for a folder (some minutes): their folders."""
    model, data = folder / "small-t5", folder / "mixed-to-a"
    toy = languages()
    if not (data / "test.jsonl").exists():
        data.mkdir(parents=True, exist_ok=True)
        for split in ROWS:
            (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(toy, split)))
    if not (model / "model.safetensors").exists():
        made = fresh(toy)
        loss = pretrain(made, toy)
        print(f"small T5: loss {loss:.4f} at the end of pre-training", flush=True)
        toy.tokenizer().save_pretrained(model)
        made.save_pretrained(model)  # type: ignore[operator]
    return model, data


if __name__ == "__main__":
    import sys

    torch.set_num_threads(1)
    print(*small_t5(Path(sys.argv[1])))
