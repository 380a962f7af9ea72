"""The code of a Markdown page: found, run in order, and compared with the output that the page shows.

A page is one program: its python blocks share their names and run from top to bottom. A block without a language, or marked `text`, that
directly follows a python block is what that block prints; figures with a decimal point may differ a little, and a line that is `…` alone stands
for any lines. Three comments, each just before
the block it is about, say the rest; a reader of the page doesn't see them.

    <!-- not run: needs a GPU -->     the block is shown, not run; a reason is required
    <!-- within 0.05 -->              how far figures may be off, relative or absolute; 0.02 if not said
    <!-- setup                        code that is run, not shown; what comes before the end of the comment
    -->
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>```+|~~~+) *(?P<language>[\w+-]*)[^\n]*$")
_NOT_RUN = re.compile(r"<!-- *not run: *(.+?) *-->\s*$")
_WITHIN = re.compile(r"<!-- *within ([\d.]+) *-->\s*$")
_SETUP = re.compile(r"<!-- *setup *\n(.*?)-->", re.DOTALL)
_NUMBER = re.compile(r"-?\d[\d,]*\.\d+(?:e[+-]?\d+)?")
WITHIN = 0.02


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        line: of its first line of code, counted from 1. reason: why it is not run; "" if it is.
        within: how far its figures may be off. adjacent: nothing but blank lines and comments between it and the block before.
        hidden: a setup comment.
    """

    language: str
    code: str
    line: int
    reason: str = ""
    within: float = WITHIN
    adjacent: bool = False
    hidden: bool = False


def blocks(text: str) -> list[Block]:
    """All fenced blocks and setup comments of a page, in order.

    Raises:
        ValueError: a block is never closed.
    """
    found: list[Block] = []
    lines, between, start = text.split("\n"), "", 0
    while start < len(lines):
        if re.match(r" *<!-- *setup *$", lines[start]):
            end = next(i for i in range(start, len(lines)) if "-->" in lines[i])
            found.append(Block("python", "\n".join(lines[start + 1 : end]) + "\n", start + 2, hidden=True))
            start, between = end + 1, "setup"
            continue
        opening = _FENCE.match(lines[start])
        if opening is None:
            between += lines[start] + "\n"
            start += 1
            continue
        closing = re.compile(rf"^ *{re.escape(opening['fence'])} *$")
        end = next((i for i in range(start + 1, len(lines)) if closing.match(lines[i])), None)
        if end is None:
            raise ValueError(f"line {start + 1}: the block is never closed")
        indent = len(opening["indent"])
        code = "\n".join(line[indent:] for line in lines[start + 1 : end]) + "\n"
        reason, within = _NOT_RUN.search(between), _WITHIN.search(between)
        found.append(
            Block(
                opening["language"],
                code,
                start + 2,
                reason[1] if reason else "",
                float(within[1]) if within else WITHIN,
                adjacent=bool(found) and not re.sub(r"<!--.*?-->", "", between, flags=re.DOTALL).strip(),
            )
        )
        start, between = end + 1, ""
    return found


@dataclass(frozen=True)
class Step:
    """A block to run, and the block that shows what it prints, if there is one."""

    block: Block
    shown: Block | None


def steps(text: str) -> Iterator[Step]:
    """The python blocks of a page that are run."""
    found = blocks(text)
    for number, block in enumerate(found):
        after = found[number + 1] if number + 1 < len(found) else None
        if block.language == "python" and not block.reason:
            shows = after is not None and after.adjacent and after.language in ("", "text") and not block.hidden
            yield Step(block, after if shows else None)


def run(path: Path, name: str = "snippets_of_a_page") -> dict[str, Any]:
    """Run a page as one program, in the present folder, and compare what it prints. Returns its names.

    Raises:
        AssertionError: a block printed something else than the page shows.
    """
    module = types.ModuleType(name)
    sys.modules[name] = module  # pydantic looks up a class's annotations there
    try:
        for step in steps(path.read_text()):
            code = "\n" * (step.block.line - 1) + step.block.code  # so that a traceback names the page's own line
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(code, str(path), "exec", dont_inherit=True), module.__dict__)
            if step.shown is not None:
                compare(printed.getvalue(), step.shown.code, step.shown.within, f"{path.name}, line {step.shown.line}")
    finally:
        del sys.modules[name]
    return module.__dict__


def compare(printed: str, shown: str, within: float, where: str) -> None:
    """Lines must be equal but for blanks at their end; figures with a decimal point may be off by `within`; `…` alone stands for any lines."""
    one, other = ([line.rstrip() for line in text.strip("\n").split("\n")] for text in (printed, shown))
    assert match(one, other, within), f"{where}: printed\n{printed}\n\nshown\n{shown}"


def match(printed: list[str], shown: list[str], within: float) -> bool:
    if not shown:
        return not printed
    if shown[0].strip() == "…":
        return any(match(printed[skipped:], shown[1:], within) for skipped in range(len(printed) + 1))
    return bool(printed) and alike(printed[0], shown[0], within) and match(printed[1:], shown[1:], within)


def alike(printed: str, shown: str, within: float) -> bool:
    """One line: the same words, and figures close to each other."""
    numbers = zip(_NUMBER.findall(printed), _NUMBER.findall(shown), strict=False)
    near = all(math.isclose(value(a), value(b), rel_tol=within, abs_tol=within) for a, b in numbers)
    return near and _NUMBER.split(printed) == _NUMBER.split(shown)


def value(text: str) -> float:
    return float(text.replace(",", ""))
