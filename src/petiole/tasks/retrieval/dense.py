"""Dense retrieval as a task: queries and documents embedded by one backbone, and the nearest documents found."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from petiole.errors import ConfigError, need
from petiole.tasks.loop import evaluating
from petiole.tasks.models import Head, empty_model, load_model
from petiole.tasks.quiet import bar
from petiole.tasks.retrieval.metrics import Run
from petiole.tasks.retrieval.model import BiEncoder, Pooling
from petiole.tasks.retrieval.task import Retrieval
from petiole.tasks.tokens import Pad, longest, padding, side, tokenize

if TYPE_CHECKING:
    from petiole.tasks.data import TaskData


class DenseRetrieval(Retrieval):
    """Queries and documents embedded by one backbone; the nearest documents are found.

    Trained with the passages of the other queries in a batch as negatives too; one that is known to be relevant to a query is none for it.

    Args:
        in_batch: whether passages of other queries are negatives.
        pooling, normalise, temperature: see `BiEncoder`.
        query_prefix, passage_prefix: what stands before every text of a kind, for models that were trained so.
        kwargs: of `Retrieval` and `Task`.
    """

    name: ClassVar[str] = "dense-retrieval"
    title: ClassVar[str] = "Dense retrieval"
    auto_model: ClassVar[str] = "AutoModel"

    def __init__(
        self,
        data: TaskData,
        model: str | Path,
        *,
        in_batch: bool = True,
        pooling: Pooling = "mean",
        normalise: bool = True,
        temperature: float = 0.05,
        query_prefix: str = "",
        passage_prefix: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__(data, model, **kwargs)
        if not in_batch and not self.negatives:
            raise ConfigError("negatives = 0 and in_batch = False: nothing is left to tell a passage from")
        self.query_prefix, self.passage_prefix = query_prefix, passage_prefix
        self.around: dict[str, Any] = {
            "pooling": pooling,
            "normalise": normalise,
            "temperature": temperature,
            "in_batch": in_batch,
        }

    @property
    def bare(self) -> dict[str, Any]:
        """Without the pooler that stands behind some backbones: nothing would train it."""
        kind = need("compare", "transformers").MODEL_MAPPING[type(self.config)]
        return {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(kind).parameters else {}

    def build_model(
        self, *, head: Head = "auto", seed: int = 0, dtype: torch.dtype | str = "float32", **options: Any
    ) -> BiEncoder:
        """As `Task.build_model`; there is no head."""
        model, notes = load_model(
            self.auto_model, self.place, seed=seed, dtype=dtype, revision=self.revision, options=self.bare | options
        )
        self._note(*notes)
        return BiEncoder(model, **self.around).eval()

    def empty_model(self) -> BiEncoder:
        return BiEncoder(
            empty_model(self.auto_model, self.place, revision=self.revision, options=self.bare), **self.around
        ).eval()

    def texts_of(self, query: str, passages: Sequence[str]) -> tuple[list[str], list[str] | None]:
        return [self.query_prefix + query, *(self.passage_prefix + passage for passage in passages)], None

    def labels(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {"labels": batch["passages"], "relevant": batch["relevant"]}

    def rank(self, model: nn.Module, dataset: Any, *, batch_size: int = 32) -> Run:
        def vectors(texts: Sequence[str], title: str) -> Tensor:
            return embed(
                model, texts, tokenizer=self.processor, max_length=self.max_length, batch_size=batch_size, title=title
            )

        queries = vectors([self.query_prefix + query for query in self.column(dataset, "query")], "queries")
        corpus = vectors([self.passage_prefix + text for text in self.texts], "corpus")
        found = []
        for part in queries.split(256):  # as many scores at once as fit beside a large corpus
            best = (part @ corpus.T).topk(min(self.top_k, len(corpus)))
            found += [
                list(zip(*row, strict=True)) for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]
        return self.named(dataset, found)


def embed(
    model: nn.Module,
    texts: Sequence[str],
    *,
    tokenizer: Any,
    max_length: int | None = None,
    batch_size: int = 32,
    title: str = "texts",
) -> Tensor:
    """Texts -> embeddings (n, d), on the CPU; the longest first, so that texts of like length share a batch.

    Args:
        model: a `BiEncoder`, or any whose output has `embeddings`.
        max_length: tokens of a text; what the model can take if None.
        title: of the progress bar.
    """
    config: Any = model.config
    tokens, _ = tokenize(tokenizer, texts, None, longest(tokenizer, config, max_length))
    pad = Pad(padding(tokenizer), side=side(tokenizer, config))
    order = sorted(range(len(texts)), key=lambda i: -len(tokens["input_ids"][i]))
    device = next(model.parameters()).device
    found = []
    with evaluating(model):
        for start in bar(range(0, len(order), batch_size), f"embedding {title}"):
            rows = [{key: values[i] for key, values in tokens.items()} for i in order[start : start + batch_size]]
            batch = {key: value.to(device) for key, value in pad(rows).items()}
            found.append(model(**batch).embeddings.float().cpu())
    return torch.cat(found)[torch.tensor(order).argsort()]
