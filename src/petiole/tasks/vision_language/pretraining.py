"""A small BART that knows the language of scenes before it sees one: pre-trained on the tasks with the scenes told, not shown.

    in words    "vqa: how many square things are there ? | blue square top left red cross centre right"  ->  "one"
    in cells    "vqa: how many square things are there ?" and a token for each cell, the mean of its words' embeddings

Of things in words the order is random, so that a caption is more than a copy, and two scenes are one behind the other, each behind a bar. A
cell's words are "blue square top left first", the last for the first scene, or "nothing nothing top left first". The same seed gives the same
weights on one kind of machine, and they are kept in a folder.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from petiole.attach import site_seed
from petiole.tasks.metrics import IGNORED
from petiole.tasks.models import seeded
from petiole.tasks.quiet import quiet
from petiole.tasks.vision_language.model import behind, with_visual_tokens
from petiole.tasks.vision_language.questions import TASKS, Example, example
from petiole.tasks.vision_language.scenes import COLUMNS, ROWS
from petiole.tasks.vision_language.words import WORDS, word_tokenizer

SIZES: dict[str, Any] = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "dropout": 0.0, "max_position_embeddings": 128, "init_std": 0.1,
}  # fmt: skip
SPECIAL = {
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
SHARES = {"vqa": 2, "nlvr": 2, "caption": 1}  # of the steps; a caption is learnt first
IN_CELLS = 2 / 3  # of the steps


def in_words(of: Example, draw: random.Random) -> str:
    """The prompt, and the scenes in words."""
    told = [" ".join(map(str, draw.sample(scene.things, len(scene.things)))) for scene in of.scenes]
    return " | ".join([of.prompt, *told])


def pretrained(
    folder: str | Path,
    *,
    steps: int = 2000,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    rows: int = 12000,
    seed: int = 0,
    **sizes: Any,
) -> nn.Module:
    """A `BartForConditionalGeneration` with visual tokens at the end of its vocabulary; from the folder, if it was made there before.

    Args:
        folder: where it is kept, beside others with other settings.
        steps, batch_size, learning_rate: of AdamW, with a warm-up of 10 % of the steps, then down to 0.
        rows: of each task, over which training goes again and again.
        seed: of weights and rows.
        sizes: fields of `BartConfig`.
    """
    from transformers import BartConfig, BartForConditionalGeneration

    fields = {**SIZES, **sizes}
    settings: dict[str, Any] = {
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "rows": rows,
        "seed": seed,
    }
    settings |= {"sizes": fields, "shares": [SHARES, IN_CELLS], "words": WORDS}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    place = Path(folder) / f"scenes-bart-{digest}"
    if not place.is_dir():
        tokenizer = word_tokenizer()
        with seeded(seed):
            model = BartForConditionalGeneration(BartConfig(vocab_size=len(tokenizer), **SPECIAL, **fields))
        learn(model, tokenizer, rows, steps, batch_size, learning_rate, seed)
        half = place.with_suffix(".part")
        shutil.rmtree(half, ignore_errors=True)
        with quiet():
            with_visual_tokens(model, seed=seed).save_pretrained(half)
            tokenizer.save_pretrained(half)
        half.rename(place)
    with quiet():
        return BartForConditionalGeneration.from_pretrained(place, local_files_only=True).eval()


def in_cells(of: Example) -> list[list[str]]:
    """Five words for each cell of each scene."""
    cells = []
    for order, one in zip(("first", "second"), of.scenes, strict=False):
        things = {(thing.row, thing.column): [thing.colour, thing.shape] for thing in one}
        for row, down in enumerate(ROWS):
            for column, along in enumerate(COLUMNS):
                cells.append([*things.get((row, column), ["nothing", "nothing"]), down, along, order])
    return cells


def learn(model: Any, tokenizer: Any, rows: int, steps: int, batch_size: int, learning_rate: float, seed: int) -> None:
    """Train all of the model, in each step on one task and one way to tell scenes."""
    draw = random.Random(site_seed(seed, "order of words"))
    examples = [example(task, site_seed(seed, "pre-training"), number) for task in TASKS for number in range(rows)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
    )
    embed = model.get_input_embeddings()
    model.train()
    for _ in range(steps):
        (first,) = draw.choices([rows * number for number in range(len(TASKS))], [SHARES[task] for task in TASKS])
        chosen = draw.choices(examples[first : first + rows], k=batch_size)
        told = draw.random() < IN_CELLS
        texts = [each.prompt if told else in_words(each, draw) for each in chosen]
        text = tokenizer(texts, padding=True, return_tensors="pt")
        h, mask = embed(text.input_ids), text.attention_mask
        if told:
            cells = torch.tensor(
                [[tokenizer.convert_tokens_to_ids(words) for words in in_cells(own)] for own in chosen]
            )
            h, mask = behind(h, mask, embed(cells).mean(2), mask.new_ones(cells.shape[:2]))
        labels = tokenizer([each.answer for each in chosen], padding=True, return_tensors="pt").input_ids
        labels = labels.masked_fill(labels == tokenizer.pad_token_id, IGNORED)
        model(inputs_embeds=h, attention_mask=mask, labels=labels).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
