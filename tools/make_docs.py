"""Write what the registry knows into the documentation: the table in README.md and docs/methods.md, and a page for each method.

.venv/bin/python tools/make_docs.py           write what has changed
.venv/bin/python tools/make_docs.py --check   write nothing; exit code 1 if something would change
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import re
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")

from petiole.method import Config, Method, registry

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
BEGIN, END = "<!-- methods: begin (make docs writes this) -->", "<!-- methods: end -->"


def pages() -> dict[Path, str]:
    """Every file that is written, and what it must hold."""
    methods = registry()
    written = {
        ROOT / "README.md": replaced(ROOT / "README.md", table(methods, "docs/methods/")),
        DOCS / "methods.md": replaced(DOCS / "methods.md", listing(methods)),
    }
    return written | {DOCS / "methods" / f"{slug}.md": page(cls) for slug, cls in methods.items()}


def replaced(path: Path, text: str) -> str:
    """A hand-written file with new text between its two markers."""
    whole = path.read_text()
    before, begin, rest = whole.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{path}: the markers {BEGIN} and {END} are missing")
    return f"{before}{BEGIN}\n\n{text}\n{END}{after}"


# ---------------------------------------------------------------------------------------------------------------------- tables


def by_family(methods: Mapping[str, type[Method]]) -> Iterator[tuple[str, list[type[Method]]]]:
    """The families in alphabetical order, each with its methods."""
    for family in sorted({cls.family() for cls in methods.values()}):
        yield family, [cls for cls in methods.values() if cls.family() == family]


def table(methods: Mapping[str, type[Method]], folder: str) -> str:
    """All methods in one table."""
    lines = ["| method | paper | family | saves | merges |", "|---|---|---|---|---|"]
    for family, members in by_family(methods):
        lines += [
            f"| [{cls.slug}]({folder}{cls.slug}.md) | {source(cls)} | {family} | {cls.saves} | {'yes' if cls.merges else 'no'} |"
            for cls in members
        ]
    return "\n".join(lines) + "\n"


def listing(methods: Mapping[str, type[Method]]) -> str:
    """A section for each family."""
    lines = []
    for family, members in by_family(methods):
        lines += [f"## {family}", "", about_family(members[0]), ""]
        lines += ["| method | what it does | paper | saves | merges | size |", "|---|---|---|---|---|---|"]
        for cls in members:
            size = f"`{cls.size}`" if cls.size else ""
            merges = "yes" if cls.merges else "no"
            what = first_line(cls.__doc__)
            lines.append(
                f"| [{cls.slug}](methods/{cls.slug}.md) | {what} | {source(cls)} | {cls.saves} | {merges} | {size} |"
            )
        lines.append("")
    return "\n".join(lines)


def source(cls: type[Method]) -> str:
    """Title and arXiv id, linked; the title alone where there is no paper."""
    if not cls.paper:
        return cls.title
    return f"{cls.title}, [{cls.paper}](https://arxiv.org/abs/{cls.paper})"


def about_family(cls: type[Method]) -> str:
    """First line of the docstring of the folder that a method stands in."""
    package = importlib.import_module(cls.__module__.rpartition(".")[0])
    return first_line(package.__doc__)


def first_line(text: str | None) -> str:
    return (text or "").strip().split("\n")[0]


# ------------------------------------------------------------------------------------------------------------------ one method


def page(cls: type[Method]) -> str:
    """The page of one method: its file's own words, its fields, what it can do, how to call it."""
    can = [
        ("merges into the weights", "yes" if cls.merges else "no"),
        ("starts as the bare backbone, bit for bit", "yes" if cls.identity_at_start else "no"),
        ("may differ between the rows of a batch (`pt.route`)", "yes" if cls.routes else "no"),
        ("runs under `torch.compile`", "yes" if cls.compiles else "no"),
        ("saves, against full fine-tuning", cls.saves),
        ("learning rates that a search tries", " to ".join(f"{rate:g}" for rate in cls.learning_rates)),
    ]
    can += [("size", f"`{cls.size}`")] if cls.size else []
    can += [("a delta may go without a gradient", cls.idles)] if cls.idles else []
    can += [(f"exempt from the tests: `{check}`", why) for check, why in cls.exempt.items()]
    lines = [f"# {cls.slug}", "", first_line(cls.__doc__), "", f"*{cls.title}*" + paper(cls), ""]
    lines += words(sys.modules[cls.__module__].__doc__ or "", cls)
    lines += ["## Use", "", "```python", "import petiole as pt", "", *call(cls), "```", ""]
    lines += [
        "```console",
        f"$ petiole tune --model … --data … --method {cls.slug}{setting(cls)} --output {cls.slug}.petiole.safetensors",
        "```",
        "",
    ]
    if cls.model_fields:
        lines += ["## Fields", "", "| field | values | default | meaning |", "|---|---|---|---|"]
        lines += [
            f"| `{name}` | {values(field)} | {default(field)} | {field.description or ''} |".replace("\\|", "|")
            for name, field in fields_of(cls)
        ]
        lines.append("")
    lines += ["## What it can do", "", "| | |", "|---|---|", *(f"| {what} | {answer} |" for what, answer in can), ""]
    place = Path(inspect.getfile(cls)).resolve()
    where = (
        place.relative_to(ROOT) if place.is_relative_to(ROOT) else Path(*cls.__module__.split(".")).with_suffix(".py")
    )
    lines.append(f"On which models it works: [support](../support.md). The whole of it is in `{where}`.")
    return "\n".join(lines) + "\n"


def fields_of(cls: type[Config], within: str = "") -> Iterator[tuple[str, Any]]:
    """Every field, and under one that has fields of its own those: `attention`, `attention.form`, …"""
    for name, field in cls.model_fields.items():
        yield within + name, field
        if (own := nested(field)) is not None:
            yield from fields_of(own, f"{within}{name}.")


def nested(field: Any) -> type[Config] | None:
    """What a field's own fields are, if it has any."""
    cls = field.annotation
    return cls if isinstance(cls, type) and issubclass(cls, Config) else None


def default(field: Any) -> str:
    return "" if nested(field) else f"`{shown(field.get_default(call_default_factory=True))}`"


def paper(cls: type[Method]) -> str:
    return f", arXiv [{cls.paper}](https://arxiv.org/abs/{cls.paper})" if cls.paper else ""


def words(text: str, cls: type[Method]) -> list[str]:
    """A method file's docstring as Markdown: formulas as they stand, the labelled lines as a table, the rest as text."""
    lines: list[str] = []
    title, *paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(text))
    others = [m.slug for m in registry().values() if m.__module__ == cls.__module__ and m is not cls]
    if others:
        lines += [
            f"Its file also holds {', '.join(f'[{slug}]({slug}.md)' for slug in others)}: {' '.join(title.split())}",
            "",
        ]
    for paragraph in paragraphs:
        rows, rest = labelled(paragraph)
        if rows:
            lines += ["| | |", "|---|---|", *(f"| **{label}** | {escaped(said)} |" for label, said in rows), ""]
        if rest.startswith("    "):
            lines += ["```text", inspect.cleandoc(rest), "```", ""]
        elif rest:
            said = escaped(" ".join(rest.split()))
            lines += [re.sub(r"^(Relations|Inputs):", r"**\1.**", said), ""]
    return lines


LABELS = ("Sits", "Trains", "Starts", "Merges", "Costs", "Saves", "Needs", "Stores", "Acts", "Reads")


def labelled(paragraph: str) -> tuple[list[tuple[str, str]], str]:
    """The lines of a paragraph that begin with a label ("Sits     after …", indented lines go on), and what follows them."""
    rows: list[tuple[str, str]] = []
    lines = paragraph.split("\n")
    for number, line in enumerate(lines):
        label, _, said = line.partition(" ")
        if label in LABELS:
            rows.append((label, said.strip()))
        elif rows and line.startswith(" "):
            rows[-1] = (rows[-1][0], f"{rows[-1][1]} {line.strip()}")
        else:
            return rows, "\n".join(lines[number:])
    return rows, ""


def escaped(text: str) -> str:
    """Docstring text in Markdown: bars would end a cell, stars and angle brackets mean something; code stays as it is."""
    parts = re.split(r"(`[^`]*`)", text)
    plain = [
        re.sub(r"([*<>|\[\]])", r"\\\1", part) if not part.startswith("`") else part.replace("|", "\\|")
        for part in parts
    ]
    return "".join(plain)


def call(cls: type[Method]) -> list[str]:
    """The constructor with its size and, where it has one, its roles."""
    fields = cls.model_fields
    named = [name for name in (cls.size, "roles") if name in fields and fields[name].get_default() is not None]
    arguments = ", ".join(f"{name}={shown(fields[name].get_default())}" for name in named)
    return [f"method = pt.{cls.__name__}({arguments})"]


def setting(cls: type[Method]) -> str:
    default = cls.model_fields[cls.size].get_default() if cls.size else None
    return "" if default is None else f" --set {cls.size}={default}"


def shown(value: Any) -> str:
    """A default as a user would type it."""
    return repr(list(value)) if isinstance(value, tuple) else repr(value)


def values(field: Any) -> str:
    """The type of a field and its allowed range, in words."""
    if nested(field):
        return "a mapping of the fields below"
    limits = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "min_length": "at least", "max_length": "at most"}
    bounds = [
        f"{sign} {getattr(item, name)}"
        for item in field.metadata
        for name, sign in limits.items()
        if getattr(item, name, None) is not None
    ]
    return kind(field.annotation) + (f", {' and '.join(bounds)}" if bounds else "")


def kind(annotation: Any) -> str:
    """A type in words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is type(None):
        return "`None`"
    if origin is Literal:
        return ", ".join(f"`{value!r}`" for value in arguments)
    if origin in (tuple, list, Sequence):
        many = {int: "whole numbers", float: "numbers", str: "names"}
        return f"list of {many.get(arguments[0], kind(arguments[0]))}"
    if origin in (dict, Mapping):
        return f"{kind(arguments[0])} to {kind(arguments[1])}"
    if arguments and origin is not typing.Annotated:
        return " or ".join(kind(argument) for argument in arguments)
    if origin is typing.Annotated:
        return kind(arguments[0])
    return {"int": "whole number", "float": "number", "str": "text", "bool": "yes or no"}.get(
        getattr(annotation, "__name__", str(annotation)), f"`{getattr(annotation, '__name__', annotation)}`"
    )


# ---------------------------------------------------------------------------------------------------------------- command line


def changes() -> tuple[dict[Path, str], list[Path]]:
    """The files that must be written, with their text; and pages of methods that are no more."""
    wanted = pages()
    new = {path: text for path, text in wanted.items() if not path.exists() or path.read_text() != text}
    return new, [path for path in sorted((DOCS / "methods").glob("*.md")) if path not in wanted]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the pages that the registry decides.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if something would change")
    check = parser.parse_args(arguments).check
    new, gone = changes()
    for path, text in new.items():
        print(f"{'would write' if check else 'wrote'} {path.relative_to(ROOT)}")
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    for path in gone:
        print(f"{'would remove' if check else 'removed'} {path.relative_to(ROOT)}")
        if not check:
            path.unlink()
    return 1 if check and (new or gone) else 0


if __name__ == "__main__":
    raise SystemExit(main())
