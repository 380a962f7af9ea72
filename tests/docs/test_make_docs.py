"""How a method's file becomes its page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import pytest
from pydantic import Field

import make_docs
from petiole.anatomy import Anatomy
from petiole.method import Method, Place


class Unlisted(Method):
    """Do little."""

    title: ClassVar[str] = "A Paper"
    saves: ClassVar[str] = "nothing"
    size: ClassVar[str] = "rank"

    rank: int = Field(3, ge=1, lt=9, description="Inner width.")
    roles: tuple[str, ...] = Field(("q",), min_length=1, description="Where.")
    mode: Literal["one", "two"] = Field("one", description="How.")
    depths: tuple[int, ...] | None = Field(None, description="Which.")

    def deltas(self, anatomy: Anatomy) -> Iterator[Place]:
        yield from ()


def test_fields_come_with_values_defaults_and_meanings() -> None:
    page = make_docs.page(Unlisted)
    assert "| `rank` | whole number, ≥ 1 and < 9 | `3` | Inner width. |" in page
    assert "| `roles` | list of names, at least 1 | `['q']` | Where. |" in page
    assert "| `mode` | `'one'`, `'two'` | `'one'` | How. |" in page
    assert "| `depths` | list of whole numbers or `None` | `None` | Which. |" in page
    assert "method = pt.Unlisted(rank=3, roles=['q'])" in page


def test_a_docstring_keeps_formulas_and_makes_a_table_of_its_labels() -> None:
    text = """Title: of a paper.

        h  <-  h + A*B        A (r, d)

    Sits     on q,
             and on v.
    Merges   no: |x| stands between.
    See also the other paper.

    Relations: like `a|b`, but cheaper.
    """
    assert make_docs.words(text, Unlisted) == [
        "```text", "h  <-  h + A*B        A (r, d)", "```", "",
        "| | |", "|---|---|", "| **Sits** | on q, and on v. |", r"| **Merges** | no: \|x\| stands between. |", "",
        "See also the other paper.", "",
        r"**Relations.** like `a\|b`, but cheaper.", "",
    ]  # fmt: skip


def test_text_goes_between_the_markers_and_nowhere_else(tmp_path: pytest.TempPathFactory) -> None:
    path = tmp_path / "page.md"  # type: ignore[operator]
    path.write_text(f"before\n{make_docs.BEGIN}\nold\n{make_docs.END}\nafter\n")
    assert make_docs.replaced(path, "new\n") == f"before\n{make_docs.BEGIN}\n\nnew\n\n{make_docs.END}\nafter\n"
    path.write_text("no markers\n")
    with pytest.raises(SystemExit, match="markers"):
        make_docs.replaced(path, "new\n")
