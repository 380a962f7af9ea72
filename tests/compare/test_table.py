"""Ranking, spread and fronts, against what can be worked out by hand."""

from __future__ import annotations

import pytest

from petiole.compare.table import Row, axes, columns, front, quantity, ranked, score, seconds, spread
from petiole.errors import ConfigError


def row(label: str, mean: float | None, params: int | None = 0, peak: int | None = 0, **about: object) -> Row:
    return Row(label, "lowrank", [], mean=mean, trainable_parameters=params, peak_bytes=peak, **about)  # type: ignore[arg-type]


ROWS = [
    row("full", 0.90, 1000, 50),
    row("lora", 0.90, 100, 30),
    row("probe", 0.70, 10, 10),
    row("worse", 0.65, 20, 20),
    row("light", 0.80, 90, 20),
    row("twin", 0.80, 90, 20),
    row("broken", None, 5, 5),
    row("unmeasured", 0.99, None, None),
    row("bare", 0.95, 0, 0, reference=True),
]


def test_the_front_is_what_nothing_beats() -> None:
    both = axes(["params", "memory"])
    assert front(ROWS, both) == {"lora", "probe", "light", "twin"}  # equals don't beat each other
    assert front(ROWS, axes(["params"])) == {"lora", "probe", "light", "twin"}
    assert "worse" in front(ROWS, both, higher_is_better=False) and "lora" not in front(
        ROWS, both, higher_is_better=False
    )


def test_rows_are_ranked_and_those_without_a_score_are_last() -> None:
    table = ranked(ROWS, axes(["params", "memory"]))
    assert [r.label for r in table] == [
        "unmeasured",
        "bare",
        "lora",
        "full",
        "light",
        "twin",
        "probe",
        "worse",
        "broken",
    ]
    assert [r.rank for r in table] == [1, 2, 3, 4, 5, 6, 7, 8, None]
    by = {r.label: r for r in table}
    assert (
        by["lora"].front
        and by["lora"].fronts == ["params", "memory"]
        and not by["bare"].front
        and not by["full"].fronts
    )
    assert ranked(ROWS, axes(["params"]), higher_is_better=False)[0].label == "worse"


def test_mean_and_sample_deviation() -> None:
    assert spread([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert spread([4.0]) == (4.0, None) and spread([]) == (None, None)


def test_unknown_axes_are_refused() -> None:
    with pytest.raises(ConfigError, match="'speed' is no axis; there are params"):
        axes(["params", "speed"])
    with pytest.raises(ConfigError, match="at least one"):
        axes([])
    assert [axis.name for axis in axes(["time", "time", "params"])] == ["time", "params"]


def test_columns_say_direction_unit_and_trials() -> None:
    table = [
        row(
            "lora",
            0.912,
            5000,
            trials=6,
            failed_trials=2,
            backbone_parameters=100_000,
            learning_rate=0.003,
            sd=0.01,
            seeds=3,
        )
    ]
    found = {c.title: c.cells[0] for c in columns(table, "accuracy", percent=True, higher_is_better=True)}
    assert found["accuracy ↑ (%)"] == "91.2 ± 1.0" and found["trials"] == "6 (2 failed)" and found["% of all"] == "5.00"
    assert found["trained"] == "5 k" and found["peak"] == "0 B" and found["learning rate"] == "0.003"
    titles = [c.title for c in columns(table, "perplexity", percent=False, higher_is_better=False, sizes=True)]
    assert "perplexity ↓" in titles and "size" in titles and not any("held-out" in title for title in titles)
    forgot = [row("lora", 0.9, forgetting=-0.25)]
    assert {c.title: c.cells[0] for c in columns(forgot, "accuracy", percent=True, higher_is_better=True)}[
        "held-out (%)"
    ] == "-25.0"


def test_numbers_in_words() -> None:
    assert [quantity(v) for v in (None, 0, 999, 1000, 999_500, 1_234_567)] == ["–", "0", "999", "1 k", "1 M", "1.23 M"]
    assert quantity(1536, "B") == "1.54 kB" and quantity(0.25, "s") == "250 ms"
    assert [seconds(v) for v in (None, 0.0005, 59.96, 61, 3599.6)] == ["–", "0.5 ms", "60 s", "1 min 1 s", "1 h 0 min"]
    assert score(float("nan")) == "–" and score(0.5, 0.25) == "0.500 ± 0.250"
