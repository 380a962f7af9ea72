"""Retrieval on a tiny generated collection: reading it, first stage, negatives, losses, ranking, training, command line."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import petiole as pt
from petiole import cli
from petiole.errors import ConfigError, DataError, TrainingError
from petiole.planning import inputs
from petiole.tasks import load_data, prepare
from petiole.tasks.loop import evaluating
from petiole.tasks.retrieval import BM25, BiEncoder, BiEncoderLoss, CrossEncoder, embed, ranking_metric
from petiole.tune import Recipe, train
from tasks import makers

for package in ("bm25s", "Stemmer", "ir_measures"):
    pytest.importorskip(package, reason="the extra `retrieval` is not installed")

WORDS = ["cat", "dog", "sat", "ran", "mat", "hill", "good", "bad", "film", "one", "two", "three", "red"]
Write = Callable[[Path, list[dict[str, Any]]], Path]


def collection(documents: int = 30, queries: int = 20, seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Texts of six words; a query is three words of one document, which is relevant to it, as is another; one is judged irrelevant."""
    draw = random.Random(seed)
    corpus = [{"_id": f"d{i}", "title": "", "text": " ".join(draw.sample(WORDS, 6))} for i in range(documents)]
    asked, qrels = [], []
    for q in range(queries):
        first, second, other = draw.sample(range(documents), 3)
        asked.append({"_id": f"q{q}", "text": " ".join(draw.sample(corpus[first]["text"].split(), 3))})
        for document, score in ((first, 2), (second, 1), (other, 0)):
            qrels.append({"query-id": f"q{q}", "corpus-id": f"d{document}", "score": score})
    return {"corpus": corpus, "queries": asked, "qrels": qrels}


def write(folder: Path, parts: dict[str, list[dict[str, Any]]], prefix: str = "", as_: str = "jsonl") -> Path:
    maker: Write = getattr(makers, as_)
    for part, rows in parts.items():
        maker(folder / f"{prefix}{part}.{as_}", rows)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("toy"), collection())


@pytest.fixture(scope="module")
def backbone(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT whose texts differ, unlike those of one that is drawn as for pre-training."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    config = BertConfig(
        vocab_size=5 + 19, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=48, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("backbone")
    BertModel(config).save_pretrained(place)
    AutoTokenizer.from_pretrained(models["bert"]).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def data(folder: Path) -> Any:
    return load_data(folder, task="dense-retrieval", validation_fraction=0.25, test_fraction=0.25)


@pytest.fixture(scope="module")
def dense(data: Any, backbone: Path) -> Any:
    return prepare(data, backbone, negatives=2, negative_depth=8, top_k=10)


@pytest.fixture(scope="module")
def reranking(folder: Path, backbone: Path) -> Any:
    data = load_data(folder, task="reranking", validation_fraction=0.25, test_fraction=0.25)
    return prepare(data, backbone, negatives=2, top_k=10)


# ------------------------------------------------------------------------------------------------------------------- the collection


def test_queries_are_split_by_the_seed_and_no_query_is_in_two_splits(folder: Path, data: Any) -> None:
    ids = {name: set(rows["id"]) for name, rows in data.splits.items()}
    assert [len(found) for found in ids.values()] == [11, 5, 4]
    assert set.union(*ids.values()) == {f"q{i}" for i in range(20)} and sum(map(len, ids.values())) == 20
    again, other = (load_data(folder, task="dense-retrieval", test_fraction=0.25, seed=seed) for seed in (0, 1))
    assert set(again.test["id"]) != set(other.test["id"])
    assert load_data(folder, task="dense-retrieval", test_fraction=0.25).test["id"] == again.test["id"]
    assert str(data).splitlines()[0].endswith("; 30 corpus")


def test_files_with_a_common_beginning_and_files_of_splits(tmp_path: Path) -> None:
    parts = collection()
    write(tmp_path, parts, "toy-", "parquet")
    found = [load_data(place, task="reranking", validation_fraction=0) for place in (tmp_path / "toy", tmp_path)]
    assert found[0].train["judgements"] == found[1].train["judgements"] and len(found[0].train) == 20
    assert found[0].train[0]["judgements"][0]["grade"] == 2

    beir = tmp_path / "beir"
    (beir / "qrels").mkdir(parents=True)
    write(beir, {part: parts[part] for part in ("corpus", "queries")})
    for split, rows in (("train", parts["qrels"][:36]), ("dev", parts["qrels"][36:45]), ("test", parts["qrels"][45:])):
        lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, row.values())) for row in rows)]
        (beir / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    found = load_data(beir, task="dense-retrieval")
    assert {name: len(rows) for name, rows in found.splits.items()} == {"train": 12, "validation": 3, "test": 5}
    (beir / "qrels" / "train.tsv").unlink()
    with pytest.raises(DataError, match="no train split"):
        load_data(beir, task="dense-retrieval")
    write(tmp_path, parts, "other-")
    with pytest.raises(DataError, match="several collections: 'other', 'toy'"):
        load_data(tmp_path, task="reranking")


def test_titles_stand_in_front_once_and_what_nobody_can_find_is_left_out(tmp_path: Path) -> None:
    parts = collection(queries=4)
    for row, (title, text) in zip(parts["corpus"], [("red", "red cat"), ("red", "cat"), ("", "")], strict=False):
        row |= {"title": title, "text": text}
    parts["qrels"] += [{"query-id": "q0", "corpus-id": "gone", "score": 1}]
    parts["qrels"] = [row | {"score": 0} if row["query-id"] == "q3" else row for row in parts["qrels"]]
    found = load_data(write(tmp_path, parts), task="reranking", validation_fraction=0)
    assert found.tables["corpus"]["text"][:3] == ["red cat", "red cat", ""]
    assert found.train["id"] == ["q0", "q1", "q2"]
    assert found.notes[:3] == (
        "corpus: 1 of 30 documents have no text",
        "train: 1 of 13 judgements left out: of documents that the corpus lacks",
        "train: 1 of 4 queries left out: nothing is relevant to them",
    )


def test_numbers_as_ids_are_their_digits(tmp_path: Path) -> None:
    number = {f"{kind}{i}": i for kind in "dq" for i in range(30)}
    parts = {
        part: [{key: number.get(value, value) for key, value in row.items()} for row in rows]
        for part, rows in collection(queries=5).items()
    }
    found = load_data(write(tmp_path, parts), task="reranking", validation_fraction=0)
    assert found.train["id"] == ["0", "1", "2", "3", "4"] and found.tables["corpus"]["id"][1] == "1"


@pytest.mark.parametrize(
    ("part", "row", "message"),
    [
        ("qrels", {"query-id": "nobody", "corpus-id": "d0", "score": 1}, "row 61: the query 'nobody' is not in"),
        ("qrels", {"query-id": "q0", "corpus-id": "d0", "score": 0.5}, "row 61: the score 0.5"),
        ("qrels", {"query-id": "q0", "corpus-id": None, "score": 1}, "row 61: no corpus-id"),
        ("corpus", {"_id": "d3", "title": "", "text": "again"}, "rows 4 and 31: both have the id 'd3'"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, part: str, row: dict[str, Any], message: str) -> None:
    parts = collection()
    parts[part].append(row)
    with pytest.raises(DataError, match=message):
        load_data(write(tmp_path, parts), task="reranking")


def test_collections_and_tables_are_not_taken_for_each_other(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(DataError, match="'dense-retrieval', 'reranking'"):
        load_data(folder)
    with pytest.raises(DataError, match="text-classification needs rows alone, and there is corpus"):
        load_data(folder, task="text-classification")
    with pytest.raises(DataError, match="reranking needs corpus, and there is none"):
        load_data(makers.jsonl(tmp_path / "rows.jsonl", makers.rows()), task="reranking")
    parts = collection()
    parts["queries"] = [{"id": row["_id"], "text": row["text"]} for row in parts["queries"]]
    with pytest.raises(DataError, match=r"no column '_id' in the queries; did you mean 'id'"):
        load_data(write(tmp_path, parts), task="reranking")


# ------------------------------------------------------------------------------------------------------------------ the first stage


def test_bm25_is_its_formula() -> None:
    texts = ["red cats sat", "dog", "red red hill dog film"]
    found = BM25(texts, k1=1.2, b=0.5).search(["red cat", "zebra", ""], 3)
    lengths, mean = [3, 1, 5], 3.0

    def part(tf: int, df: int, length: int) -> float:
        idf = math.log(1 + (3 - df + 0.5) / (df + 0.5))
        return idf * tf / (tf + 1.2 * (0.5 + 0.5 * length / mean))

    expected = [(0, part(1, 2, lengths[0]) + part(1, 1, lengths[0])), (2, part(2, 2, lengths[2]))]
    assert [number for number, _ in found[0]] == [
        0,
        2,
    ]  # cats and cat have one stem; no word of the query is in the other
    assert [score for _, score in found[0]] == pytest.approx([score for _, score in expected], rel=1e-5)
    assert found[1:] == [[], []]
    assert BM25(texts).search([], 3) == [] and len(BM25(texts).search(["red"], 1)[0]) == 1
    with pytest.raises(ConfigError, match="no texts"):
        BM25([])
    with pytest.raises(ConfigError, match="top_k = 0"):
        BM25(texts).search(["red"], 0)


def test_the_baseline_is_bm25_over_the_whole_corpus(dense: Any) -> None:
    rows = dense.data.test
    run = {
        query: {dense.ids[n]: score for n, score in found}
        for query, found in zip(rows["id"], BM25(dense.texts).search(rows["query"], 10), strict=True)
    }
    judged = {row["id"]: {each["document"]: each["grade"] for each in row["judgements"]} for row in rows}
    found = dense.baseline("test")
    assert found == {name: ranking_metric(name, run, judged) for name in dense.metric_names}
    assert found["mrr@10"] > 0.4  # a query's words are all in its document
    with pytest.raises(DataError, match="no dev split"):
        dense.baseline("dev")


# ----------------------------------------------------------------------------------------------------------------------------- rows


def test_negatives_are_what_bm25_ranks_high_and_nobody_called_relevant(data: Any, dense: Any, backbone: Path) -> None:
    rows = list(dense.encoded("train"))
    queries = [
        row for row in data.train for each in row["judgements"] if each["grade"] > 0
    ]  # one row for each relevant
    assert len(rows) == len(queries) == 22
    for row, query in zip(rows, queries, strict=True):
        relevant = {dense.numbers[each["document"]] for each in query["judgements"] if each["grade"] > 0}
        assert set(row["relevant"]) == relevant and row["labels"][0] in relevant
        high = {number for number, _ in BM25(dense.texts).search([query["query"]], 8)[0]}
        assert len(set(row["labels"])) == 3 and set(row["labels"][1:]) <= high - relevant
        texts = dense.processor.batch_decode(row["input_ids"], skip_special_tokens=True)
        assert texts == [query["query"], *(dense.texts[number] for number in row["labels"])]

    def drawn(**options: Any) -> list[list[int]]:
        other = prepare(data, backbone, **{"negatives": 2, "negative_depth": 8, **options})
        return list(other.encoded("train")["labels"])

    assert drawn() == [row["labels"] for row in rows] != drawn(seed=1)
    few = drawn(negative_depth=1, negatives=4)  # filled up from the rest of the corpus
    assert all(len(set(row)) == 5 for row in few)
    assert all(not set(row[1:]) & set(known["relevant"]) for row, known in zip(few, rows, strict=True))
    assert {len(row) for row in drawn(negatives=0)} == {1}
    with pytest.raises(ConfigError, match="negatives = 30: the corpus has 30 documents"):
        drawn(negatives=30)


def test_rows_become_a_batch(dense: Any) -> None:
    rows = [
        {"input_ids": [[9, 3], [1], [5]], "attention_mask": [[1, 1], [1], [1]], "labels": [1, 5], "relevant": [1, 2]},
        {
            "input_ids": [[8], [2, 4, 6], [7]],
            "attention_mask": [[1], [1, 1, 1], [1]],
            "labels": [2, 7],
            "relevant": [2],
        },
    ]
    batch = dense.collator(rows)
    assert batch["input_ids"].tolist() == [[[9, 3, 0], [1, 0, 0], [5, 0, 0]], [[8, 0, 0], [2, 4, 6], [7, 0, 0]]]
    assert batch["attention_mask"].sum((1, 2)).tolist() == [4, 5]
    assert batch["labels"].tolist() == [[1, 5], [2, 7]] and batch["relevant"].tolist() == [[1, 2], [2, -1]]


# --------------------------------------------------------------------------------------------------------------------- bi-encoders


class Table(nn.Module):
    """A backbone that looks its states up, whatever stands beside a token."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        from transformers import BertConfig

        self.config = BertConfig(vocab_size=20, max_position_embeddings=8, **config)
        self.words = nn.Embedding(20, 4, dtype=torch.float64)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        return BaseModelOutput(last_hidden_state=self.words(input_ids))


def test_the_loss_is_a_softmax_over_what_counts() -> None:
    ids = torch.tensor([[[9, 3], [1, 0], [5, 0]], [[8, 0], [2, 4], [7, 0]]])
    labels, relevant = torch.tensor([[1, 5], [2, 7]]), torch.tensor([[1, 2], [2, -1]])
    model = BiEncoder(Table(), temperature=0.1)
    output = model(ids, ids > 0, labels=labels, relevant=relevant)

    def e(*words: int) -> Tensor:
        return nn.functional.normalize(model.backbone.words.weight[list(words)].mean(0), dim=0)

    passages = torch.stack([e(1), e(2, 4), e(5), e(7)])
    scores = torch.stack([e(9, 3) @ passages.T, e(8) @ passages.T])
    torch.testing.assert_close(output.logits, scores)

    def loss(first: list[int], second: list[int]) -> Tensor:
        """Of the columns that count, a query's own passage first."""
        kept = [scores[0, first] / 0.1, scores[1, second] / 0.1]
        return -torch.stack([each.log_softmax(0)[0] for each in kept]).mean()

    torch.testing.assert_close(
        output.loss, loss([0, 2, 3], [1, 0, 2, 3])
    )  # document 2 is relevant to the first query too
    torch.testing.assert_close(model(ids, ids > 0, labels=labels).loss, loss([0, 1, 2, 3], [1, 0, 2, 3]))
    alone = BiEncoder(model.backbone, temperature=0.1, in_batch=False)(ids, ids > 0, labels=labels, relevant=relevant)
    torch.testing.assert_close(alone.loss, loss([0, 2], [1, 3]))
    without = model(ids[:, :2], ids[:, :2] > 0, labels=labels[:, :1])
    torch.testing.assert_close(without.loss, loss([0, 1], [1, 0]))


def test_pooling_sees_no_padding() -> None:
    ids, mask = torch.tensor([[5, 6, 0], [0, 7, 8]]), torch.tensor([[1, 1, 0], [0, 1, 1]])
    words = (model := BiEncoder(Table(), normalise=False)).backbone.words.weight
    torch.testing.assert_close(model(ids, mask).embeddings, torch.stack([words[[5, 6]].mean(0), words[[7, 8]].mean(0)]))
    first = BiEncoder(model.backbone, pooling="cls")(ids, mask).embeddings
    torch.testing.assert_close(first, nn.functional.normalize(words[[5, 7]], dim=1))


def test_what_a_bi_encoder_refuses(data: Any, backbone: Path) -> None:
    with pytest.raises(ConfigError, match="neither mean nor cls"):
        BiEncoder(Table(), pooling="max")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="has a decoder"):
        BiEncoder(Table(is_encoder_decoder=True))
    for shape in ((5, 2), (2, 3, 2), (2, 1, 2)):
        with pytest.raises(ConfigError, match=r"labels \(2, [03]\)"):
            labels = torch.ones(2, 3 if shape != (2, 1, 2) else 0)
            BiEncoder(Table())(torch.ones(shape, dtype=torch.long), torch.ones(shape), labels=labels)
    with pytest.raises(ConfigError, match="nothing is left to tell a passage from"):
        prepare(data, backbone, negatives=0, in_batch=False)
    with pytest.raises(ConfigError, match="top_k = 0: from 1"):
        prepare(data, backbone, top_k=0)
    vectors = torch.ones(2, 4)
    for loss, ignored in ((BiEncoderLoss(), torch.zeros(2, 3)), (BiEncoderLoss(in_batch=False), torch.zeros(2, 2))):
        with pytest.raises(ConfigError, match="ignored"):
            loss(vectors, vectors, None, ignored.bool())


def test_embeddings_come_in_the_order_of_the_texts_whatever_the_batches(dense: Any) -> None:
    model = dense.build_model().train()
    texts = ["cat", "red dog sat on one hill", "good film", "two"]
    options: dict[str, Any] = {"tokenizer": dense.processor}
    alone = torch.cat([embed(model, [each], **options) for each in texts])
    torch.testing.assert_close(embed(model, texts, batch_size=3, **options), alone, rtol=1e-4, atol=1e-5)
    assert model.training and alone.norm(dim=1).tolist() == pytest.approx([1.0] * 4)


def test_every_document_is_ranked_by_its_cosine(dense: Any) -> None:
    model, rows = dense.build_model(), dense.data.test
    run = dense.rank(model, rows, batch_size=4)
    with evaluating(model):
        e = [
            model(**dense.processor([each], return_tensors="pt")).embeddings[0]
            for each in (*rows["query"], *dense.texts)
        ]
    scores = torch.stack(e[: len(rows)]) @ torch.stack(e[len(rows) :]).T
    for query, row in zip(rows["id"], scores, strict=True):
        best = row.topk(10)
        assert run[query] == pytest.approx(
            {dense.ids[n]: score for n, score in zip(best.indices.tolist(), best.values.tolist(), strict=True)},
            abs=1e-5,
        )
    assert dense.evaluate(model, "test", batch_size=5) == pytest.approx(dense.evaluate(model, rows, batch_size=64))


def test_prefixes_stand_before_the_texts_of_their_kind(data: Any, backbone: Path) -> None:
    task = prepare(data, backbone, negatives=1, query_prefix="one ", passage_prefix="two ")
    ids = task.encoded("train")[0]["input_ids"]
    assert [text.split()[0] for text in task.processor.batch_decode(ids, skip_special_tokens=True)] == [
        "one",
        "two",
        "two",
    ]


# ---------------------------------------------------------------------------------------------------------------------- reranking


def test_what_bm25_found_is_put_in_the_order_of_the_models_scores(reranking: Any) -> None:
    model, rows = reranking.build_model(seed=3), reranking.data.test
    run = reranking.rank(model, rows, batch_size=4)
    for query, words, found in zip(rows["id"], rows["query"], reranking.found(rows, 10), strict=True):
        assert set(run[query]) == {reranking.ids[number] for number, _ in found}
        for number, _ in found:
            pair = reranking.processor([words], [reranking.texts[number]], return_tensors="pt")
            with evaluating(model):
                assert run[query][reranking.ids[number]] == pytest.approx(float(model(**pair).logits), abs=1e-5)


def test_the_losses_of_a_reranker(reranking: Any, data: Any) -> None:
    batch = reranking.collator([reranking.encoded("train")[i] for i in range(4)])
    assert batch["input_ids"].shape[:2] == (4, 3) and batch["labels"].tolist() == [[1.0, 0.0, 0.0]] * 4
    classifier = reranking.build_model().model
    with evaluating(classifier):
        softmax, bce = (CrossEncoder(classifier, loss=loss)(**batch) for loss in ("softmax", "bce"))  # type: ignore[arg-type]
    torch.testing.assert_close(softmax.loss, -softmax.logits.view(4, 3).log_softmax(1)[:, 0].mean())
    p = bce.logits.view(4, 3).sigmoid()
    torch.testing.assert_close(bce.loss, -torch.cat([p[:, :1].log(), (1 - p[:, 1:]).log()], 1).mean())
    with pytest.raises(ConfigError, match="softmax or bce"):
        CrossEncoder(classifier, loss="hinge")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"scores \(4, 3\)"):
        CrossEncoder(classifier)(**{**batch, "labels": torch.ones(2, 3)})


# ------------------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("kind", ["dense", "reranking"])
@pytest.mark.parametrize("slug", ["full", "lora", "houlsby", "bitfit"])
def test_a_method_learns_and_its_file_holds_what_it_learnt(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, slug: str
) -> None:
    task = request.getfixturevalue(kind)
    model, fresh = task.build_model(seed=1), task.build_model(seed=1)
    tuned = pt.attach(model, pt.method.find(slug)(), seed=0)
    batch = task.collator([task.encoded("train")[i] for i in range(22)])
    with evaluating(model):
        before = float(model(**batch).loss)
    course = train(tuned, task, Recipe(steps=10, batch_size=11), learning_rate=2e-2, seed=0, evaluations=1)
    with evaluating(model):
        assert float(model(**batch).loss) < before
    assert course.last == task.evaluate(model)
    tuned.save(tmp_path / "tuned.petiole.safetensors")
    pt.load(fresh, tmp_path / "tuned.petiole.safetensors")
    assert task.evaluate(fresh, "test") == task.evaluate(model, "test")


def test_prompts_are_not_pooled(dense: Any) -> None:
    model = dense.build_model()
    tuned = pt.attach(model, pt.PromptTuning(length=4))
    ids, mask = torch.tensor([[2, 7, 3], [2, 3, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    states: list[Tensor] = []
    handle = model.backbone.register_forward_hook(lambda module, args, output: states.append(output[0]))
    with evaluating(model):
        found = model(ids, mask).embeddings
        handle.remove()
        expected = torch.stack([states[0][0].mean(0), states[0][1, :2].mean(0)])
        torch.testing.assert_close(found, nn.functional.normalize(expected, dim=1))
        with tuned.disabled():
            assert (model(ids, mask).embeddings - found).abs().max() > 1e-3


def test_a_step_is_the_same_whoever_takes_samples_one_by_one(reranking: Any) -> None:
    """Methods that weigh samples slice a batch by its rows."""
    model = reranking.build_model()
    batch = reranking.collator([reranking.encoded("train")[i] for i in range(3)])
    with evaluating(model):
        rows = [model(**{key: value[i : i + 1] for key, value in batch.items()}).loss for i in range(3)]
        torch.testing.assert_close(model(**batch).loss, torch.stack(rows).mean())


def test_the_cache_refuses_rows_of_several_texts(reranking: Any) -> None:
    model = reranking.build_model()
    tuned = pt.attach(model, pt.LoRA(layers=(1,)))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with pytest.raises(TrainingError, match="see 12 rows"):
        train(tuned, reranking, Recipe(steps=1, batch_size=4), learning_rate=1e-3, cache="1MB")


def test_the_model_without_weights_is_the_same(dense: Any, reranking: Any) -> None:
    for task in (dense, reranking):
        own = {name: tuple(value.shape) for name, value in task.build_model().named_parameters()}
        empty = dict(task.empty_model().named_parameters())
        assert {name: tuple(value.shape) for name, value in empty.items()} == own
        assert all(value.is_meta for value in empty.values())
    assert [site.path for site in pt.anatomy(reranking.empty_model()).heads()] == ["model.classifier"]
    assert pt.anatomy(dense.empty_model()).heads() == ()


def test_a_plan_is_for_the_longest_rows(dense: Any) -> None:
    longest = max(len(text) for row in dense.encoded("train")["input_ids"] for text in row)
    batch = inputs.longest(dense, 2)
    assert batch["input_ids"].shape == (2, 4, longest)


def test_from_the_command_line(folder: Path, backbone: Path, tmp_path: Path) -> None:
    path = tmp_path / "dense.petiole.safetensors"
    where = [
        "--model",
        str(backbone),
        "--data",
        str(folder),
        "--task",
        "dense-retrieval",
        "--threads",
        "1",
        "--json",
    ]
    tune = ["tune", *where, "--method", "lora", "--steps", "3", "--batch-size", "4", "--output", str(path)]
    made = CliRunner().invoke(cli.app, tune)
    assert made.exit_code == 0, made.stderr
    assert json.loads(made.stdout)["metric"] == "ndcg@10"
    scored = CliRunner().invoke(cli.app, ["eval", *where, "--adaptation", str(path)])
    assert scored.exit_code == 0, scored.stderr
    assert set(json.loads(scored.stdout)["scores"]) == {"bare", "lora"}


def test_methods_are_compared(folder: Path, backbone: Path, tmp_path: Path) -> None:
    from petiole.compare import compare

    result = compare(
        str(backbone), str(folder), "lora", output=tmp_path / "run", task="dense-retrieval", trials=1, seeds=1, steps=2,
        batch_size=4, threads=1,
    )  # fmt: skip
    assert {row.label for row in result.rows} == {"bare", "full", "lora"}
    assert all(row.mean is not None for row in result.rows)
