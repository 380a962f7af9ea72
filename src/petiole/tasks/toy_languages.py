"""Two languages that say the same: every word of one has its word in the other, in another order; to try transfer between languages.

Concepts belong to topics. A sentence tells of one topic, things and acts in turn, with a few words from elsewhere. Language `a` says it so, and
`b` says it backwards with words of its own; a share of the words may be borrowed from the other language, as names and numbers are. All is drawn
from the generator that is given, so that nothing is downloaded and everything comes again.

>>> import torch
>>> toy = ToyLanguages(concepts=20, topics=2)
>>> ids = toy.sentences(2, "a", torch.Generator().manual_seed(0), length=4)
>>> ids.shape, toy.text(toy.translated(toy.concepts_of(ids[0, 1:-1], "a"), "b"))[0] == "b"
(torch.Size([2, 6]), True)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from petiole.errors import ConfigError

Language = Literal["a", "b"]
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD, UNK, CLS, SEP, MASK = range(len(SPECIAL))
ELSEWHERE = 0.2  # share of the words of a sentence that are not of its topic


@dataclass(frozen=True)
class Ranking:
    """Queries with documents each, as a cross-encoder reads them: [CLS] query [SEP] document [SEP].

    Attributes:
        input_ids, token_type_ids: (queries, documents, t). relevant: (queries, documents), bool.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    relevant: Tensor


class ToyLanguages:
    """Words of both languages, as numbers: special tokens, then those of `a`, then those of `b`.

    Args:
        concepts: how many words each language has. topics: how many of equal size they belong to.
        seed: of the dictionary, which concept is which word of `b`.
    """

    def __init__(self, concepts: int = 200, topics: int = 20, seed: int = 0) -> None:
        if topics < 2 or concepts % topics or concepts // topics < 6 or concepts // topics % 2:
            raise ConfigError(
                f"concepts = {concepts}, topics = {topics}: 2 topics or more, of an even number of 6 concepts or more"
            )
        self.concepts, self.topics, self.each = concepts, topics, concepts // topics
        self.dictionary = torch.randperm(concepts, generator=torch.Generator().manual_seed(seed))
        self.vocabulary = len(SPECIAL) + 2 * concepts

    # ---- words

    def translated(
        self, said: Tensor, language: Language, borrowed: float = 0.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Concepts (..., n) in the order of `a` -> words (..., n) in a language's own order.

        Args:
            borrowed: share of the words that are the other language's.
        """
        words = said + len(SPECIAL), self.dictionary[said] + len(SPECIAL) + self.concepts
        own, other = words if language == "a" else (words[1].flip(-1), words[0].flip(-1))
        return other.where(torch.rand(said.shape, generator=generator) < borrowed, own) if borrowed else own

    def concepts_of(self, words: Tensor, language: Language) -> Tensor:
        """The way back, where nothing is borrowed."""
        if language == "a":
            return words - len(SPECIAL)
        return self.dictionary.argsort()[words - len(SPECIAL) - self.concepts].flip(-1)

    def text(self, words: Tensor) -> str:
        """Words as text, such as `a17 b3`."""
        return " ".join(self.names()[int(word)] for word in words.flatten())

    def names(self) -> list[str]:
        return [*SPECIAL, *(f"{language}{i}" for language in "ab" for i in range(self.concepts))]

    def tokenizer(self) -> Any:
        """Of whole words, for pairs too."""
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from tokenizers.pre_tokenizers import WhitespaceSplit
        from tokenizers.processors import TemplateProcessing
        from transformers import PreTrainedTokenizerFast

        inner = Tokenizer(WordLevel({name: i for i, name in enumerate(self.names())}, unk_token="[UNK]"))
        inner.pre_tokenizer = WhitespaceSplit()
        inner.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
            mask_token="[MASK]", model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        )  # fmt: skip

    # ---- what is said

    def said(self, topics: Tensor, length: int, generator: torch.Generator) -> Tensor:
        """Concepts (n, length) of sentences of these topics (n,): even ones are things, odd ones acts."""
        topic = topics[:, None].expand(-1, length)
        other = torch.randint(self.topics, topic.shape, generator=generator)
        topic = torch.where(torch.rand(topic.shape, generator=generator) < ELSEWHERE, other, topic)
        pair = torch.randint(self.each // 2, topic.shape, generator=generator)
        return topic * self.each + 2 * pair + torch.arange(length) % 2

    def sentences(
        self, count: int, language: Language, generator: torch.Generator, length: int = 12, borrowed: float = 0.0
    ) -> Tensor:
        """Sentences of any topics, framed: (count, length + 2)."""
        topics = torch.randint(self.topics, (count,), generator=generator)
        words = self.translated(self.said(topics, length, generator), language, borrowed, generator)
        return torch.cat([torch.full((count, 1), CLS), words, torch.full((count, 1), SEP)], 1)

    def ranking(
        self,
        queries: int,
        documents: int,
        generator: torch.Generator,
        query_language: Language = "a",
        document_language: Language = "a",
        *,
        share: float = 0.15,
        length: int = 10,
    ) -> Ranking:
        """Queries of 4 concepts of a topic. A relevant document has 3 of them or 4 and is of that topic; another has at most 1.

        Args:
            share: of the documents, how many are relevant; at least one of each query's is, and one is not.
        """
        topics = torch.randint(self.topics, (queries,), generator=generator)
        asked = torch.rand(queries, self.each, generator=generator).argsort(1)[:, :4] + self.each * topics[:, None]
        relevant = torch.zeros(queries, documents, dtype=torch.bool)
        relevant[:, : min(max(1, round(share * documents)), documents - 1)] = True
        relevant = relevant.gather(1, torch.rand(relevant.shape, generator=generator).argsort(1))
        shift = torch.randint(1, self.topics, relevant.shape, generator=generator)  # to another topic
        topic = torch.where(relevant, topics[:, None], (topics[:, None] + shift) % self.topics)
        said = self.said(topic.flatten(), length, generator).view(queries, documents, length)
        mine = (said.unsqueeze(-1) == asked[:, None, None]).any(
            -1
        )  # taken out, before as many are put in as there shall be
        said = torch.where(mine, (said + self.each) % self.concepts, said)
        many = torch.where(relevant, 3, 0) + torch.randint(2, relevant.shape, generator=generator)
        places = torch.rand(said.shape, generator=generator).argsort(-1)[..., :4]
        put = torch.arange(4) < many[..., None]
        words = torch.where(put, asked[:, None].expand(-1, documents, -1), said.gather(-1, places))
        said = said.scatter(-1, places, words)
        asked_words = self.translated(asked, query_language)[:, None].expand(-1, documents, -1)
        found = self.translated(said, document_language)
        first, last = (torch.full((queries, documents, 1), mark) for mark in (CLS, SEP))
        ids = torch.cat([first, asked_words, last, found, last], -1)
        types = (torch.arange(ids.shape[-1]) > 5).long().expand_as(ids)  # [CLS] 4 words [SEP]
        return Ranking(ids, types, relevant)
