"""How good rankings are, by the definitions of trec_eval and its order of equal scores; computed by ir-measures.

    nDCG@k      Σ grade / log2(rank + 1) over the first k, over what the best order would reach
    MRR@k       1 / rank of the first relevant document; 0 where it is not among the first k
    MAP         mean over ALL relevant documents of the precision at their ranks, 0 for one that is not in the ranking
    recall@k    share of the relevant documents among the first k

A run says which documents were found for each query, and with which scores; judgements say what grade a document has, 0 or less for one that
is not relevant. Every judged query counts, with 0 where the run has nothing for it. `map_reference` is the mean average precision of some
published code: it divides by the relevant documents that were found, and leaves out queries for which none was.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from petiole.errors import ConfigError, TrainingError, need
from petiole.tasks.metrics import metric

Run = Mapping[str, Mapping[str, float]]
Judgements = Mapping[str, Mapping[str, int]]

TITLES = {
    "ndcg@10": "nDCG@10",
    "mrr@10": "MRR@10",
    "map": "MAP",
    "map_reference": "MAP (reference)",
    "recall@10": "recall@10",
    "recall@100": "recall@100",
}
_NAME = re.compile(r"(map|map_reference)|(ndcg|mrr|recall)@([1-9]\d*)")


def by_query(name: str, run: Run, judgements: Judgements) -> dict[str, float]:
    """One metric of every judged query.

    Args:
        name: map, map_reference, or ndcg@k, mrr@k, recall@k with any k.
        run: query -> document -> score.
        judgements: query -> document -> grade.

    Raises:
        ConfigError: no such metric, or no judgements.
        TrainingError: a score is not finite.
    """
    parts = _NAME.fullmatch(name)
    if parts is None:
        raise ConfigError(f"metric: {name!r} is none of map, map_reference, ndcg@k, mrr@k, recall@k (k from 1)")
    if not judgements:
        raise ConfigError("rankings can't be measured without judgements: give at least one query")
    for query, scores in run.items():
        if not all(map(math.isfinite, scores.values())):
            raise TrainingError(
                f"query {query!r}: a score is not finite\nLower the learning rate, or compute in float32."
            )
    whole, cut, cutoff = parts.groups()
    library = need("retrieval", "ir_measures")

    def values(measure: object) -> dict[str, float]:
        found = {m.query_id: float(m.value) for m in library.iter_calc([measure], judgements, run)}
        return {query: found.get(query, 0.0) for query in judgements}

    if whole:
        average = values(library.AP)
        if whole == "map":
            return average
        relevant, found = values(library.NumRel), values(library.NumRelRet)
        return {query: average[query] * relevant[query] / found[query] for query in judgements if found[query]}
    if cut == "mrr":  # the library's own cut-off orders equal scores in another way
        return {query: value if value * int(cutoff) > 1 - 1e-9 else 0.0 for query, value in values(library.RR).items()}
    return values((library.nDCG if cut == "ndcg" else library.R) @ int(cutoff))


def ranking_metric(name: str, run: Run, judgements: Judgements) -> float:
    """The mean over queries; see `by_query`.

    >>> judged = {"1": {"a": 1, "b": 1}}
    >>> [ranking_metric(name, {"1": {"c": 3.0, "a": 2.0}}, judged) for name in ("map", "map_reference", "recall@2")]
    [0.25, 0.5, 0.5]
    """
    found = by_query(name, run, judgements)
    return math.fsum(found.values()) / len(found) if found else 0.0


def ranking_metrics(names: Sequence[str], run: Run, judgements: Judgements) -> dict[str, float]:
    """Several of them, by name."""
    return {name: ranking_metric(name, run, judgements) for name in names}


def _enter(name: str, title: str) -> None:
    function: Callable[[Run, Judgements], float] = partial(ranking_metric, name)
    metric(title, "rankings", name=name)(function)


for _name, _title in TITLES.items():
    _enter(_name, _title)
