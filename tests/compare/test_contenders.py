"""Rows from words: what is understood, what is refused, and who is always there."""

from __future__ import annotations

import pytest

from petiole.compare.contenders import BASELINES, Contender, contenders, of_methods, parse, spelt, split, value_of
from petiole.errors import ConfigError
from petiole.method import find


def labels(asked: object) -> list[str]:
    return [row.label for row in contenders(asked)]  # type: ignore[arg-type]


def test_the_bare_backbone_and_full_fine_tuning_are_always_there_once() -> None:
    assert labels("lora") == ["bare", "full", "lora"]
    assert labels("full,bare,lora") == ["bare", "full", "lora"]
    assert labels(None) == ["bare", "full", *BASELINES]
    assert labels([find("lora")(rank=4), "ia3"]) == ["bare", "full", "lora:rank=4", "ia3"]


def test_fields_are_validated_by_the_method() -> None:
    (lora,) = parse("lora:rank=32:roles=[q,k]").methods
    assert (lora.rank, lora.roles) == (32, ("q", "k"))  # type: ignore[attr-defined]
    for text, said in (
        ("lora:rank=0", "rank"),
        ("lora:ranks=4", "ranks"),
        ("lora:rank", "name=value"),
        ("lora:rank=1:rank=2", "twice"),
        ("lor", "lora"),
        (" ", "empty"),
    ):
        with pytest.raises(ConfigError, match=said) as refused:
            parse(text)
        assert len(str(refused.value).splitlines()) <= 3
    with pytest.raises(ConfigError, match="twice"):
        contenders("lora,lora")
    with pytest.raises(ConfigError, match="nothing"):
        contenders(",")


def test_several_methods_act_together() -> None:
    both = parse("lora:rank=2+houlsby")
    assert [m.slug for m in both.methods] == ["lora", "houlsby"] and both.family == "combined"
    low, high = both.learning_rates
    ranges = [type(m).learning_rates for m in both.methods]
    assert low == max(r[0] for r in ranges) and high == min(r[1] for r in ranges)
    apart = Contender("x", (find("full")(), find("ia3")()))  # 1e-5 to 1e-3, 1e-3 to 1e-1: only an end in common
    assert apart.learning_rates == (1e-5, 1e-1)


def test_a_label_reads_back_as_the_same_method() -> None:
    for method in (find("lora")(rank=3, roles=("q", "k"), bias="all"), find("vpt")(deep=False, length=2)):
        made = of_methods(method)
        assert parse(made.label).methods == (method,) and made.label == spelt(method)


def test_a_size_that_is_no_single_number_is_left_alone() -> None:
    found = parse("svfit")  # its rank follows from the weights
    assert found.size is None and found.sizes == () and found.sized(None) == found.methods
    assert found.config()[0]["config"]["rank"] is None


def test_sizes_are_powers_of_two_around_the_size_given() -> None:
    row = parse("lora:rank=8")
    assert row.size == 8 and row.sizes == (2, 4, 8, 16, 32)
    assert parse("lora:rank=1").sizes == (1, 2, 4)
    assert row.sized(16)[0].rank == 16 and row.sized(None) == row.methods  # type: ignore[attr-defined]
    assert parse("linear-probe").size is None and parse("linear-probe").sizes == ()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8", 8),
        ("0.5", 0.5),
        ("true", True),
        ("None", None),
        ("relu", "relu"),
        ('["q","v"]', ["q", "v"]),
        ("(q, v)", ["q", "v"]),
        ("'8'", "8"),
        ("", ""),
    ],
)
def test_values(text: str, value: object) -> None:
    assert value_of(text) == value


def test_splitting_minds_brackets_quotes_and_exponents() -> None:
    assert split("a,b:x=[1,2],c", ",") == ["a", "b:x=[1,2]", "c"]
    assert split("a:x='1,2', ,b", ",") == ["a:x='1,2'", "b"]
    assert split("lora:alpha=1e+2+vpt", "+") == ["lora:alpha=1e+2", "vpt"]
