"""The search: where it begins, that every method gets as much, and that it goes on as if it had never stopped."""

from __future__ import annotations

import math

import pytest

from petiole.compare.search import FIRST, Proposal, Search, best


def play(
    trials: int, known: list[float | None] | None = None, sizes: tuple[int, ...] = (), seed: int = 0
) -> tuple[list[Proposal], list[float | None]]:
    """Ask and tell, with scores that are best near 3e-3; a rate above 8e-3 fails. `known` scores are told as they are."""
    search = Search("lora", (1e-4, 1e-2), sizes, 8 if sizes else None, seed=seed)
    asked, told = [], list[float | None]()
    for i in range(trials):
        p = search.ask()
        value = (
            known[i]
            if known and i < len(known)
            else None
            if p.learning_rate > 8e-3
            else -abs(math.log(p.learning_rate / 3e-3))
        )
        search.tell(p, value)
        asked.append(p)
        told.append(value)
    return asked, told


def test_it_begins_in_the_middle_and_at_the_quarters_of_the_log_range() -> None:
    rates = [p.learning_rate for p in play(3)[0]]
    assert rates == [
        pytest.approx(1e-3, rel=1e-3),
        pytest.approx(10**-3.5, rel=1e-3),
        pytest.approx(10**-2.5, rel=1e-3),
    ]
    first = play(1, sizes=(2, 4, 8, 16))[0][0]
    assert first.size == 8


def test_every_proposal_is_in_range_and_printed_as_it_is_run() -> None:
    for p in play(12, sizes=(2, 4, 8, 16))[0]:
        assert 1e-4 <= p.learning_rate <= 1e-2 and float(f"{p.learning_rate:.4g}") == p.learning_rate
        assert p.size in (2, 4, 8, 16)


def test_a_search_that_is_told_its_results_again_goes_on_the_same() -> None:
    whole, scores = play(9, sizes=(2, 4, 8, 16))
    for stop in (1, 3, 4, 7):
        assert play(9, scores[:stop], sizes=(2, 4, 8, 16))[0] == whole
    assert None in scores, "one of these trials is to fail, so that failures are replayed too"


@pytest.mark.parametrize("sizes", [(), (2, 4, 8, 16)])
def test_the_first_proposals_may_be_asked_for_at_once(sizes: tuple[int, ...]) -> None:
    whole, scores = play(9, sizes=sizes)
    search = Search("lora", (1e-4, 1e-2), sizes, 8 if sizes else None)
    first = [search.ask() for _ in FIRST]
    for p, score in zip(first, scores, strict=False):
        search.tell(p, score)
    rest = []
    for score in scores[len(FIRST) :]:
        rest.append(search.ask())
        search.tell(rest[-1], score)
    assert first + rest == whole


def test_other_names_and_seeds_search_elsewhere() -> None:
    assert play(6)[0][:3] == play(6, seed=1)[0][:3]
    assert play(6)[0][4:] != play(6, seed=1)[0][4:]


def test_the_search_learns() -> None:
    rates = [p.learning_rate for p in play(16)[0][10:]]
    assert sum(1e-3 < rate < 8e-3 for rate in rates) >= 4


def test_the_best_is_the_earlier_of_equals_and_never_a_failure() -> None:
    p = [Proposal(i, 10.0**-i) for i in range(5)]
    assert best([(p[0], 0.5), (p[1], 0.7), (p[2], 0.7), (p[3], None), (p[4], math.nan)]) == p[1]
    assert best([(p[0], 0.5), (p[1], 0.7)], higher_is_better=False) == p[0]
    assert best([(p[0], None), (p[1], math.inf)]) is None
