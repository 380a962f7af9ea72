"""Every python block of the README and of docs/ runs and prints what the page shows; commands and links are sound."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import petiole
import petiole.method as method
import snippets

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
ELSEWHERE = {"training.md": "tests/training/test_docs.py runs it"}
SLOW = ("README.md", "quickstart.md", "choosing.md", "cost.md")  # they train, or measure
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    """Methods that a page defines are gone after it."""
    method.registry()
    before, own = dict(method._REGISTRY), set(vars(petiole))
    yield
    method._REGISTRY.clear()
    method._REGISTRY.update(before)
    for new in set(vars(petiole)) - own:
        delattr(petiole, new)


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=[pytest.mark.slow] * (p.name in SLOW), id=n) for p, n in zip(PAGES, NAMES, strict=True)],
)
def test_a_page_does_what_it_says(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page.name in ELSEWHERE:
        pytest.skip(ELSEWHERE[page.name])
    if not list(snippets.steps(page.read_text())):
        pytest.skip("no python block to run")
    monkeypatch.chdir(tmp_path)
    snippets.run(page)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_exist_and_take_their_options(page: Path) -> None:
    import typer

    from petiole.cli import app

    cli = typer.main.get_command(app)
    for block in snippets.blocks(page.read_text()):
        if block.language not in ("console", "sh", "bash", "") or block.reason:
            continue
        for line in commands(block.code):
            words = shlex.split(line, comments=True)[1:]
            if not words or "…" in line:  # an ellipsis stands for arguments of the reader
                continue
            assert words[0].startswith("-") or words[0] in cli.commands, (
                f"{page.name}: no command {words[0]!r} ({line})"
            )
            if words[0] in cli.commands and not {"-h", "--help"} & set(words):
                command = cli.commands[words[0]]
                with command.make_context(f"petiole {words[0]}", words[1:]):  # parses and validates, runs nothing
                    pass


def commands(code: str) -> Iterator[str]:
    """The lines that begin with `petiole` (after a prompt), joined where they end in a backslash."""
    for line in re.sub(r"\\\n\s*", " ", code).splitlines():
        bare = line.strip().removeprefix("$ ").removeprefix(".venv/bin/")
        if re.match(r"petiole( |$)(?! )", bare) and "  " not in bare.split("#")[0].strip():
            yield bare


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target} leads nowhere"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{page.name}: {file.name} has no heading for #{anchor}"


def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in links."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = (
        re.sub(r"[`*]|\[|\]\(.*?\)", "", title).lower() for title in re.findall(r"^#+ +(.+)$", text, re.MULTILINE)
    )
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title).strip()) for title in titles}


# ------------------------------------------------------------------------------------------------------------ the runner itself


def test_output_setup_and_reasons_are_found() -> None:
    text = (
        "<!-- setup\nx = 1\n-->\n```python\nprint(x + 1.5)\n```\n\n<!-- within 0.5 -->\n```\n2.4\n```\n"
        "words\n<!-- not run: needs a GPU -->\n```python\nboom()\n```\n```text\nnot its output\n```\n"
    )
    found = list(snippets.steps(text))
    assert [(s.block.hidden, s.block.line, s.shown and s.shown.code) for s in found] == [
        (True, 2, None),
        (False, 5, "2.4\n"),
    ]
    assert found[1].shown is not None and found[1].shown.within == 0.5
    assert not list(snippets.steps("no code\n"))
    assert [b.reason for b in snippets.blocks(text)] == ["", "", "", "needs a GPU", ""]


@pytest.mark.parametrize("shown", ["2.6\n", "two\n", "2.5 3\n", "2.5\n2.5\n"])
def test_another_output_is_noticed(tmp_path: Path, shown: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"```python\nprint(2.5)\n```\n```\n{shown}```\n")
    with pytest.raises(AssertionError, match="line 5"):
        snippets.run(page)


def test_an_ellipsis_stands_for_any_lines() -> None:
    printed = "a\nb 1.50\nc\nd\n"
    for shown in ("…\nd\n", "a\n…\n", "a\n…\nd\n", "a\n  …\nb 1.51\nc\n…\n", "a\nb 1.50\nc\nd\n…\n"):
        snippets.compare(printed, shown, 0.02, "here")
    for shown in ("…\nc\n", "b 1.50\n…\n", "a\n…\nb 1.70\n…\n", "a\nc\nd\n"):
        with pytest.raises(AssertionError, match="here"):
            snippets.compare(printed, shown, 0.02, "here")


def test_a_block_that_is_not_closed_is_an_error() -> None:
    with pytest.raises(ValueError, match="line 1"):
        snippets.blocks("```python\nx\n")
