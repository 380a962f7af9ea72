"""Masked language modelling, and the two generated languages."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, DataCollatorForLanguageModeling

from petiole.errors import ConfigError, DataError
from petiole.tasks import load_data, prepare, registry
from petiole.tasks.masked_lm import Masking
from petiole.tasks.metrics import IGNORED
from petiole.tasks.tokens import Pad
from petiole.tasks.toy_languages import CLS, MASK, PAD, SEP, SPECIAL, ToyLanguages
from tasks.makers import jsonl

TOY = ToyLanguages(concepts=24, topics=4)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT that reads the languages."""
    place = tmp_path_factory.mktemp("toy")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=TOY.vocabulary, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=16, pad_token_id=PAD,
        )  # fmt: skip
        BertForMaskedLM(config).save_pretrained(place)
    TOY.tokenizer().save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    words = TOY.sentences(40, "a", generator(), length=6)[:, 1:-1]
    records = [{"text": TOY.text(row[: 3 + i % 4])} for i, row in enumerate(words)]
    path = jsonl(tmp_path_factory.mktemp("texts") / "texts.jsonl", records)
    return load_data(path, task="masked-lm", validation_fraction=0.25)


# ------------------------------------------------------------------------------------------------------------------------- task


def masking(**options: Any) -> Masking:
    return Masking(
        Pad({"input_ids": PAD}), mask_token=MASK, vocabulary=TOY.vocabulary, special=range(len(SPECIAL)), **options
    )


def test_shares_of_what_is_hidden() -> None:
    ids = torch.randint(len(SPECIAL), TOY.vocabulary, (400, 100), generator=generator())
    hidden, labels = masking(share=0.2, seed=1).hide(ids)
    chosen = labels != IGNORED
    assert torch.equal(labels[chosen], ids[chosen]) and torch.equal(hidden[~chosen], ids[~chosen])
    shares = [float(x.double().mean()) for x in (chosen, (hidden == MASK)[chosen], (hidden == ids)[chosen])]
    assert shares == pytest.approx([0.2, 0.8, 0.1 + 0.1 / TOY.vocabulary], abs=0.01)


def test_special_tokens_stay_and_every_row_has_something_to_guess() -> None:
    ids = torch.tensor([[CLS, 7, SEP, PAD], [CLS, 8, 9, SEP], [CLS, SEP, PAD, PAD]])
    hide = masking(share=1e-6)
    for _ in range(20):
        _, labels = hide.hide(ids)
        assert torch.equal((labels != IGNORED).sum(1), torch.tensor([1, 1, 0]))
        assert bool((labels[ids < len(SPECIAL)] == IGNORED).all())


def test_it_is_what_transformers_makes_of_a_text() -> None:
    """The same distribution: how often each thing happens to a token."""
    rows = [{"input_ids": row} for row in TOY.sentences(600, "b", generator(), length=20)]
    own = masking(share=0.15)(rows)
    torch.manual_seed(0)
    theirs = DataCollatorForLanguageModeling(TOY.tokenizer(), mlm_probability=0.15)(
        [{"input_ids": r["input_ids"]} for r in rows]
    )
    ids = torch.stack([row["input_ids"] for row in rows])
    for found in (lambda b: b["labels"] != IGNORED, lambda b: b["input_ids"] == MASK, lambda b: b["input_ids"] != ids):
        assert float(found(own).double().mean()) == pytest.approx(float(found(theirs).double().mean()), abs=0.01)


def test_training_draws_anew_and_evaluation_does_not(texts: Any, folder: Path) -> None:
    task = prepare(texts, folder)
    assert registry()["masked-lm"] is type(task)
    rows, held = task.encoded("train"), task.encoded("validation")
    state = torch.get_rng_state()
    first, again = (task.collator([rows[i] for i in range(8)]) for _ in range(2))
    assert not torch.equal(first["labels"], again["labels"])
    other = prepare(texts, folder).collator([rows[i] for i in range(8)])
    assert torch.equal(first["input_ids"], other["input_ids"]) and torch.equal(first["labels"], other["labels"])
    assert torch.equal(torch.get_rng_state(), state)
    one, two = (task.collator([held[i] for i in range(8)]) for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert torch.equal(
        one["labels"], prepare(texts, folder).collator([task.encoded("validation")[i] for i in range(8)])["labels"]
    )
    model = task.build_model()
    found = task.evaluate(model)
    assert found == task.evaluate(model) and found.keys() == {"perplexity", "token_accuracy"}
    assert not task.higher_is_better
    batch = task.collator([held[i] for i in range(len(held))])
    with torch.no_grad():
        assert found["perplexity"] == pytest.approx(math.exp(float(model(**batch).loss)), rel=1e-4)


def test_the_columns_alone_still_mean_the_next_word(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "texts.jsonl", [{"text": f"a{i} a{i + 1}"} for i in range(10)])
    assert load_data(path).task == "causal-lm"


def test_what_the_task_cannot_do_is_refused(texts: Any, folder: Path) -> None:
    with pytest.raises(ConfigError, match="mask_share"):
        prepare(texts, folder, mask_share=1.0)
    with pytest.raises(ConfigError, match="outside 1 to 16"):
        prepare(texts, folder, max_length=17)
    words = TOY.tokenizer()
    words.mask_token = None
    with pytest.raises(ConfigError, match="no mask token"):
        prepare(texts, folder, processor=words)
    with pytest.raises(DataError, match="no test split"):
        prepare(texts, folder).encoded("test")


def test_long_rows_are_cut(texts: Any, folder: Path) -> None:
    task = prepare(texts, folder, max_length=6)
    assert max(len(row) for row in task.encoded("train")["input_ids"]) == 6
    assert any("cut to 6 tokens" in note for note in task.notes)


# --------------------------------------------------------------------------------------------------------------------- languages


def overlap(ranking: Any) -> Tensor:
    """How many of a query's concepts stand in each document."""
    ids = ranking.input_ids
    query, document = ids[..., 1:5], ids[..., 6:-1]
    concepts = [
        TOY.concepts_of(part, "a" if int(part.max()) < len(SPECIAL) + TOY.concepts else "b")
        for part in (query, document)
    ]
    return (concepts[0].unsqueeze(-1) == concepts[1].unsqueeze(-2)).any(-1).sum(-1)


def test_a_language_is_the_other_one_in_other_words_and_backwards() -> None:
    said = TOY.said(torch.tensor([0, 3]), 8, generator())
    a, b = TOY.translated(said, "a"), TOY.translated(said, "b")
    assert torch.equal(TOY.concepts_of(a, "a"), said) and torch.equal(TOY.concepts_of(b, "b"), said)
    assert int(a.max()) < len(SPECIAL) + TOY.concepts <= int(b.min())
    pairs = set(zip(a.flatten().tolist(), b.flip(-1).flatten().tolist(), strict=True))
    assert len(pairs) == len({x for x, _ in pairs}) == len({y for _, y in pairs})
    borrowing = TOY.translated(said.repeat(50, 1), "b", 0.3, generator())
    theirs = borrowing < len(SPECIAL) + TOY.concepts
    assert 0.25 < float(theirs.double().mean()) < 0.35
    assert torch.equal(borrowing[theirs], a.flip(-1).repeat(50, 1)[theirs])
    assert torch.equal(borrowing[~theirs], b.repeat(50, 1)[~theirs])
    assert not torch.equal(TOY.dictionary, ToyLanguages(24, 4, seed=1).dictionary)
    words = TOY.tokenizer()(TOY.text(a[0]))["input_ids"]
    assert words == [CLS, *a[0].tolist(), SEP]
    with pytest.raises(ConfigError, match="topics"):
        ToyLanguages(concepts=20, topics=3)


def test_sentences_are_of_one_topic_with_things_and_acts_in_turn() -> None:
    concepts = TOY.concepts_of(TOY.sentences(300, "a", generator())[:, 1:-1], "a")
    assert torch.equal(concepts % 2, (torch.arange(12) % 2).expand_as(concepts))
    topics = concepts // TOY.each
    usual = topics.mode(1).values
    assert 0.8 < float((topics == usual[:, None]).double().mean()) < 0.9


@pytest.mark.parametrize("languages", [("a", "a"), ("a", "b"), ("b", "b")])
def test_relevant_documents_have_three_of_the_querys_concepts(languages: tuple[Any, Any]) -> None:
    ranking = TOY.ranking(30, 10, generator(), *languages, share=0.2)
    assert torch.equal(ranking.relevant.sum(1), torch.full((30,), 2))
    found = overlap(ranking)
    assert set(found[ranking.relevant].tolist()) == {3, 4} and set(found[~ranking.relevant].tolist()) == {0, 1}
    assert ranking.input_ids[0, 0, 0] == CLS and ranking.input_ids[0, 0, 5] == ranking.input_ids[0, 0, -1] == SEP
    assert ranking.token_type_ids[0, 0].tolist() == [0] * 6 + [1] * 11
    again = TOY.ranking(30, 10, generator(), *languages, share=0.2)
    assert torch.equal(ranking.input_ids, again.input_ids)
