"""What the tasks of retrieval share: a collection, BM25 as its first stage, rows to train on, figures.

Rows to train on are pairs of a query and a relevant document, each with hard negatives: documents that BM25 ranks high and nobody judged
relevant, drawn once by the seed. A split's figures are those of its queries over the whole corpus.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from petiole.errors import ConfigError, need
from petiole.tasks.base import Task
from petiole.tasks.columns import Column
from petiole.tasks.encoding import Rows, encode_rows
from petiole.tasks.loop import Collator
from petiole.tasks.retrieval.bm25 import BM25
from petiole.tasks.retrieval.metrics import Judgements, Run, ranking_metrics
from petiole.tasks.tokens import Pad, longest, padding, prepare, side, tokenize

if TYPE_CHECKING:
    from petiole.tasks.data import TaskData


class Retrieval(Task):
    """What both tasks share: the collection, its first stage, its rows and its figures.

    Args:
        max_length: tokens that a text, or a pair of texts, is cut to; what the model can take if None.
        negatives: hard negatives of each row.
        negative_depth: BM25's first so many are where they are drawn from.
        top_k: documents that are ranked for each query, which MAP and recall see.
        seed: of the negatives.
    """

    columns: ClassVar[tuple[Column, ...]] = (Column("query", "text", ("query",)),)
    tables: ClassVar[tuple[str, ...]] = ("corpus",)
    auto_processor: ClassVar[str] = "AutoTokenizer"
    metric_names: ClassVar[tuple[str, ...]] = ("ndcg@10", "mrr@10", "map", "recall@10", "recall@100")
    usual_metric: ClassVar[str] = "ndcg@10"

    def __init__(
        self,
        data: TaskData,
        model: str | Path,
        *,
        max_length: int | None = None,
        negatives: int = 1,
        negative_depth: int = 50,
        top_k: int = 100,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(data, model, **kwargs)
        for name, value, least in (
            ("negatives", negatives, 0),
            ("negative_depth", negative_depth, 1),
            ("top_k", top_k, 1),
        ):
            if value < least:
                raise ConfigError(f"{name} = {value}: from {least}")
        self._note(*prepare(self.processor))
        self.max_length = longest(self.processor, self.config, max_length)
        self.negatives, self.negative_depth, self.top_k, self.seed = negatives, negative_depth, top_k, seed
        corpus = data.tables["corpus"]
        self.ids: list[str] = corpus["id"][:]
        self.texts: list[str] = corpus["text"][:]
        self.numbers = {each: number for number, each in enumerate(self.ids)}

    # ------------------------------------------------------------------------------------------------------------------ ranking

    @cached_property
    def first_stage(self) -> BM25:
        """The index of words."""
        return BM25(self.texts)

    def found(self, dataset: Any, top_k: int) -> list[list[tuple[int, float]]]:
        """What BM25 finds for each query: numbers of documents and scores."""
        return self.first_stage.search(self.column(dataset, "query")[:], top_k)

    def judgements(self, dataset: Any) -> Judgements:
        """Query -> document -> grade."""
        rows = zip(dataset["id"], dataset["judgements"], strict=True)
        return {query: {each["document"]: each["grade"] for each in judged} for query, judged in rows}

    def baseline(self, split: str | Any = "validation") -> dict[str, float]:
        """What BM25 alone reaches on a split, or on any queries."""
        dataset = self.queries(split)
        return self.measure(self.named(dataset, self.found(dataset, self.top_k)), dataset)

    @abstractmethod
    def rank(self, model: nn.Module, dataset: Any, *, batch_size: int = 32) -> Run:
        """The documents that a model ranks first for each query: query -> document -> score."""

    def evaluate(self, model: nn.Module, split: str | Any = "validation", *, batch_size: int = 32) -> dict[str, float]:
        """Metrics of a model on a split, or on any queries; the model is left in the mode it was in."""
        dataset = self.queries(split)
        return self.measure(self.rank(model, dataset, batch_size=batch_size), dataset)

    def queries(self, split: str | Any) -> Any:
        return self.rows(split) if isinstance(split, str) else split

    def measure(self, run: Run, dataset: Any) -> dict[str, float]:
        return ranking_metrics(self.metric_names, run, self.judgements(dataset))

    def named(self, dataset: Any, found: Iterable[Iterable[tuple[int, float]]]) -> Run:
        """Numbers of documents -> their ids, by the ids of queries."""
        rows = zip(dataset["id"], found, strict=True)
        return {query: {self.ids[number]: score for number, score in row} for query, row in rows}

    # --------------------------------------------------------------------------------------------------------------------- rows

    @abstractmethod
    def texts_of(self, query: str, passages: Sequence[str]) -> tuple[list[str], list[str] | None]:
        """The texts of a row, or the first and second texts of its pairs."""

    @abstractmethod
    def labels(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What the model is told of rows of `pairs`."""

    def pairs(self, dataset: Any) -> Iterator[dict[str, Any]]:
        """Rows: a query, the numbers of its passages, the relevant one first, and of all that are relevant to it.

        Where BM25 finds too few negatives, others of the corpus are drawn.

        Raises:
            ConfigError: the corpus has too few.
        """
        generator = torch.Generator().manual_seed(self.seed)
        found = self.found(dataset, self.negative_depth) if self.negatives else [[]] * len(dataset)
        rows = zip(self.column(dataset, "query"), dataset["judgements"], found, strict=True)
        for query, judged, ranked in rows:
            relevant = [self.numbers[each["document"]] for each in judged if each["grade"] > 0]
            hard = [number for number, _ in ranked if number not in relevant]
            known = {*relevant, *hard}
            rest = [n for n in range(len(self.ids)) if n not in known] if len(hard) < self.negatives else []
            if len(hard) + len(rest) < self.negatives:
                raise ConfigError(f"negatives = {self.negatives}: the corpus has {len(self.ids)} documents")
            for number in relevant:
                drawn = shuffled(hard, generator)[: self.negatives]
                drawn += shuffled(rest, generator)[: self.negatives - len(drawn)]
                yield {"query": query, "passages": [number, *drawn], "relevant": relevant}

    def encode(self, dataset: Any, split: str = "rows") -> Rows:
        datasets = need("compare", "datasets")
        cut = count = 0

        def tokens(batch: dict[str, Any]) -> dict[str, Any]:
            nonlocal cut, count
            firsts: list[str] = []
            seconds: list[str] = []
            for query, numbers in zip(batch["query"], batch["passages"], strict=True):
                first, second = self.texts_of(query, [self.texts[number] for number in numbers])
                firsts, seconds = firsts + first, seconds + (second or [])
            found, shortened = tokenize(self.processor, firsts, seconds or None, self.max_length)
            cut, count = cut + shortened, count + len(firsts)
            size = len(firsts) // len(batch["query"])
            groups = {key: [values[i : i + size] for i in range(0, len(values), size)] for key, values in found.items()}
            return {**groups, **self.labels(batch)}

        encoded = encode_rows(datasets.Dataset.from_list(list(self.pairs(dataset))), tokens)
        if cut:
            self._note(f"{split}: {cut} of {count} texts cut to {self.max_length} tokens")
        return encoded

    @cached_property
    def collator(self) -> Collator:
        return Texts(Pad({**padding(self.processor), "relevant": -1}, side=side(self.processor, self.config)))


class Texts:
    """Rows of several texts each, and numbers -> a batch: texts (B, n, T) filled up to the longest, numbers filled up to the most.

    Args:
        pad: texts of unequal length -> tensors.
    """

    def __init__(self, pad: Collator) -> None:
        self.pad = pad

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        rows = list(rows)
        numbers = [key for key in rows[0] if key in ("labels", "relevant")]
        texts = [key for key in rows[0] if key not in numbers]
        flat = self.pad([{key: row[key][i] for key in texts} for row in rows for i in range(len(row["input_ids"]))])
        batch = {key: value.unflatten(0, (len(rows), -1)) for key, value in flat.items()}
        return {**batch, **self.pad([{key: row[key] for key in numbers} for row in rows])}


def shuffled(items: Sequence[int], generator: torch.Generator) -> list[int]:
    return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]
