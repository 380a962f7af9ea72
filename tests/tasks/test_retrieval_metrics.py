"""Metrics of rankings against their definitions, equal scores in trec_eval's order."""

from __future__ import annotations

import math
import random

import pytest

from petiole.errors import ConfigError, TrainingError
from petiole.tasks.metrics import METRICS, compute
from petiole.tasks.retrieval.metrics import TITLES, by_query, ranking_metric, ranking_metrics

pytest.importorskip("ir_measures", reason="the extra `retrieval` is not installed")

JUDGED = {"one": {"a": 2, "b": 1, "z": 0, "never": 1}, "two": {"c": 1}, "three": {"d": 1}}
RUN = {"one": {"x": 3.0, "a": 2.0, "z": 1.5, "b": 1.0}, "two": {"x": 1.0, "y": 2.0}}


def by_hand(name: str, scores: dict[str, float], grades: dict[str, int]) -> float | None:
    """One query, from the definition. Of equal scores the later name comes first."""
    order = [grades.get(d, 0) for d in sorted(sorted(scores, reverse=True), key=lambda d: -scores[d])]
    relevant = sum(grade > 0 for grade in grades.values())
    kind, _, k = name.partition("@")
    cut = order[: int(k)] if k else order
    if kind == "ndcg":
        best = sorted((max(g, 0) for g in grades.values()), reverse=True)[: int(k)]
        gain, ideal = (sum(g / math.log2(i + 2) for i, g in enumerate(gs)) for gs in (cut, best))
        return gain / ideal
    if kind == "mrr":
        return next((1 / (i + 1) for i, g in enumerate(cut) if g > 0), 0.0)
    if kind == "recall":
        return sum(g > 0 for g in cut) / relevant
    hits = [i + 1 for i, g in enumerate(order) if g > 0]
    precisions = sum((n + 1) / rank for n, rank in enumerate(hits))
    if kind == "map":
        return precisions / relevant
    return precisions / len(hits) if hits else None


def test_a_worked_example() -> None:
    found = ranking_metrics(["map", "map_reference", "mrr@10", "mrr@1", "recall@2", "ndcg@2"], RUN, JUDGED)
    first = (1 / 2 + 2 / 4) / 3, (1 / 2 + 2 / 4) / 2  # over the relevant documents; over those in the run
    ideal = 2 + 1 / math.log2(3)
    assert found == pytest.approx(
        {
            "map": first[0] / 3,  # two queries of three found nothing, and count
            "map_reference": first[1],  # and are left out
            "mrr@10": 0.5 / 3,
            "mrr@1": 0.0,
            "recall@2": 1 / 3 / 3,
            "ndcg@2": 2 / math.log2(3) / ideal / 3,
        }
    )


def test_every_metric_is_its_definition_also_where_scores_are_equal() -> None:
    draw = random.Random(0)
    documents = [f"d{i}" for i in range(30)]
    judged = {f"q{q}": {d: draw.choice([0, 1, 1, 3]) for d in draw.sample(documents, 6)} | {"d0": 1} for q in range(8)}
    run = {query: {d: float(draw.randrange(5)) for d in draw.sample(documents, 25)} for query in judged}
    for name in (*TITLES, "ndcg@3", "mrr@2", "recall@5"):
        by_definition = {query: by_hand(name, run[query], judged[query]) for query in judged}
        found = by_query(name, run, judged)
        assert found == pytest.approx({q: value for q, value in by_definition.items() if value is not None}), name
        assert ranking_metric(name, run, judged) == pytest.approx(sum(found.values()) / len(found))


def test_they_are_metrics_like_all_others() -> None:
    for name, title in TITLES.items():
        entry = METRICS[name]
        assert (entry.title, entry.kind, entry.higher_is_better, entry.highest) == (title, "rankings", True, 1.0)
    assert compute(["map", "recall@10"], RUN, JUDGED) == ranking_metrics(["map", "recall@10"], RUN, JUDGED)


def test_documents_that_nobody_judged_and_queries_that_nobody_asked_change_nothing() -> None:
    assert ranking_metric("map", {**RUN, "other": {"a": 1.0}}, JUDGED) == ranking_metric("map", RUN, JUDGED)


def test_what_is_refused() -> None:
    for name in ("ndcg", "map@10", "recall@0", "accuracy"):
        with pytest.raises(ConfigError, match="none of map, map_reference"):
            ranking_metric(name, RUN, JUDGED)
    with pytest.raises(ConfigError, match="judgements"):
        ranking_metric("map", RUN, {})
    with pytest.raises(TrainingError, match="'one'"):
        ranking_metric("map", {"one": {"a": math.nan}}, JUDGED)
