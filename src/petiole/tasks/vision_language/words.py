"""The tokenizer of generated scenes: one token for each word that a question or an answer can have."""

from __future__ import annotations

from typing import Any

from petiole.errors import need
from petiole.tasks.vision_language.questions import NUMBERS, TASKS
from petiole.tasks.vision_language.scenes import COLOURS, COLUMNS, ROWS, SHAPES

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # as BART numbers them
WORDS = (
    *(f"{task}:" for task in TASKS),
    *COLOURS, *SHAPES, *ROWS, *COLUMNS, *NUMBERS, "?", "|", "a", "above", "alone", "are", "below", "both", "colour", "describe", "first",
    "has", "how", "is", "left", "many", "more", "nothing", "of", "one", "picture", "pictures", "right", "second", "show", "shows", "than", "the",
    "there", "things", "what", "yes", "no", "true", "false",
)  # fmt: skip


def word_tokenizer() -> Any:
    """A fast tokenizer of Transformers, as `AutoTokenizer` loads it back from a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    known = {word: number for number, word in enumerate(dict.fromkeys((*SPECIAL, *WORDS)))}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    transformers = need("compare", "transformers")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
