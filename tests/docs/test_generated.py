"""What scripts write into the documentation is what they would write now."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import make_docs
import make_support
import tiny
from petiole.compare.contenders import BASELINES
from petiole.method import registry

ROOT = Path(__file__).resolve().parents[2]


def test_tables_and_pages_of_methods_are_up_to_date() -> None:
    new, gone = make_docs.changes()
    names = [str(path.relative_to(ROOT)) for path in (*new, *gone)]
    assert not names, f"run `make docs`: {', '.join(names)}"


def table_of_support() -> dict[tuple[str, str], str]:
    """(family, slug) -> what the table says."""
    found, slugs = {}, []
    for line in make_support.PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == "model":
            slugs = [re.sub(r"\[(.*)\]\(.*\)", r"\1", cell) for cell in cells[1:]]
        elif (name := cells[0].strip("`")) in tiny.NAMES and line.startswith("|"):
            found |= {(name, slug): cell for slug, cell in zip(slugs, cells[1:], strict=True)}
    return found


def texts_of_support(heading: str) -> dict[str, str]:
    """The numbered list under a heading."""
    section = make_support.PAGE.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| (\d+) \| (.*) \| \d+ \|$", section, re.MULTILINE))


def test_support_has_every_family_and_baseline_and_no_failure() -> None:
    table = table_of_support()
    missing = {(family, slug) for family in tiny.NAMES for slug in BASELINES} - set(table)
    assert not missing, f"run `make support`: no {sorted(missing)[:3]}"
    assert not {slug for _, slug in table} - set(registry()), "run `make support`: it names methods that are no more"
    assert not [pair for pair, said in table.items() if "fails" in said]


@pytest.mark.parametrize("family", ["bert", "mamba", "convnext"])
def test_support_says_what_happens(family: str) -> None:
    table, settings, reasons = table_of_support(), texts_of_support("Settings"), texts_of_support("Refusals")
    for slug in BASELINES:
        cell = make_support.cell(family, registry()[slug])
        word, _, number = table[family, slug].partition(" ")
        assert word == {"works": "yes", "told": "told", "refused": "no"}[cell.outcome], cell
        if word == "told":
            assert settings[number].strip("`") == cell.setting
        elif word == "no":
            assert reasons[number].replace("\\|", "|") == make_support.plain(cell)


def test_a_defect_is_told_from_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    lora = registry()["lora"]
    monkeypatch.setattr(
        make_support, "same", lambda a, b, otherwise: (_ for _ in ()).throw(make_support.Defect(otherwise))
    )
    cell = make_support.cell("bert", lora)
    assert (cell.outcome, cell.stage) == ("failed", "attach")
    assert "**fails** 1" in make_support.page([cell]) and "**1 fail**" in make_support.page([cell])
