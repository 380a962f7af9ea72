"""Who takes part in a comparison: the bare backbone, full fine-tuning, and the methods asked for, each with what is searched for it.

lora                     a method with its default configuration
lora:rank=32             fields after colons, validated by the method
lora+vpt:length=5        several that act together
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from petiole.errors import AttachError, ConfigError, PetioleError
from petiole.method import Method, find

if TYPE_CHECKING:
    from torch import nn

    from petiole.anatomy import Anatomy

BARE, FULL = "bare", "full"
# What is compared when nothing is named. Those that this backbone has no place for are left out, and the report says so.
BASELINES = (
    "linear-probe",
    "bitfit",
    "norm-tuning",
    "lora",
    "dora",
    "ia3",
    "houlsby",
    "pfeiffer",
    "parallel-adapter",
    "prefix-tuning",
    "prompt-tuning",
    "vpt",
)


@dataclass(frozen=True)
class Contender:
    """One row of the comparison.

    Attributes:
        label: its name in every table and file.
        methods: what is attached, in order; empty for the bare backbone.
        asked: named by the user; a default that does not fit is left out, one that was asked for is reported as failed.
    """

    label: str
    methods: tuple[Method, ...] = ()
    asked: bool = True

    @property
    def trains(self) -> bool:
        """Whether there is anything to train and to search."""
        return bool(self.methods)

    @property
    def family(self) -> str:
        """The folder of its method, "combined" for several."""
        families = {type(method).family() for method in self.methods}
        return families.pop() if len(families) == 1 else "combined" if families else BARE

    @property
    def learning_rates(self) -> tuple[float, float]:
        """Where a search looks: the range that all methods of this row share, or from the lowest to the highest of all if they share none."""
        ranges = [type(method).learning_rates for method in self.methods]
        low, high = max(r[0] for r in ranges), min(r[1] for r in ranges)
        return (low, high) if low < high else (min(r[0] for r in ranges), max(r[1] for r in ranges))

    @property
    def size(self) -> int | None:
        """Value of the main size of the first method that has one: rank, bottleneck, length.

        None also where it is no single number: one for each block, or found from the weights.
        """
        value = next((getattr(method, method.size) for method in self.methods if method.size), None)
        return value if isinstance(value, int) else None

    @property
    def sizes(self) -> tuple[int, ...]:
        """What a search for the size chooses from: powers of two times the value given, from a quarter to four times."""
        size = self.size
        return tuple(sorted({max(1, round(size * 2.0**power)) for power in range(-2, 3)})) if size is not None else ()

    def sized(self, size: int | None) -> tuple[Method, ...]:
        """The methods with another main size."""
        if size is None or size == self.size:
            return self.methods
        methods = list(self.methods)
        index = next(i for i, method in enumerate(methods) if method.size)
        methods[index] = type(methods[index])(**{**methods[index].model_dump(), methods[index].size: size})
        return tuple(methods)

    def config(self, size: int | None = None) -> list[dict[str, Any]]:
        """What is attached, as in an adaptation's file."""
        return [{"slug": m.slug, "version": m.version, "config": m.model_dump(mode="json")} for m in self.sized(size)]


# ------------------------------------------------------------------------------------------------------------------- from words


def contenders(asked: Sequence[str | Method | Sequence[Method]] | str | None) -> list[Contender]:
    """The rows of a comparison: the bare backbone and full fine-tuning first, always.

    Args:
        asked: a text such as "lora,houlsby:bottleneck=8", a list of such parts and of method objects; None for the baselines.

    Raises:
        ConfigError: an unknown method, a field outside its range, one row twice.
    """
    if asked is None:
        parts: list[Any] = list(BASELINES)
    elif isinstance(asked, str):
        parts = split(asked, ",")
    else:
        parts = [piece for part in asked for piece in (split(part, ",") if isinstance(part, str) else [part])]
    if asked is not None and not parts:
        raise ConfigError("methods: nothing is named; give slugs as `petiole methods` lists them, with commas between")
    rows = [Contender(BARE), Contender(FULL, (find(FULL)(),))]
    for part in parts:
        made = parse(part, asked=asked is not None) if isinstance(part, str) else of_methods(part)
        if made.label in (BARE, FULL):
            continue  # there anyway
        if made.label in [row.label for row in rows]:
            raise ConfigError(f"methods: {made.label!r} is named twice")
        rows.append(made)
    return rows


def parse(text: str, asked: bool = True) -> Contender:
    """`lora:rank=32+vpt` -> a contender of that name.

    Raises:
        ConfigError: an unknown method, or a field that it lacks or refuses.
    """
    text = text.strip()
    if text == BARE:
        return Contender(BARE, asked=asked)
    methods = []
    for piece in split(text, "+"):
        slug, *fields = split(piece, ":")
        methods.append(build(slug, fields))
    if not methods:
        raise ConfigError("methods: an empty name; give slugs as `petiole methods` lists them, with commas between")
    return Contender(text, tuple(methods), asked)


def of_methods(value: Method | Sequence[Method]) -> Contender:
    """Method objects -> a contender, called by slug and the fields that are not as by default."""
    methods = (value,) if isinstance(value, Method) else tuple(value)
    if not methods or not all(isinstance(method, Method) for method in methods):
        raise ConfigError(f"methods: {value!r} is no method, no list of methods and no text")
    return Contender("+".join(map(spelt, methods)), methods)


def spelt(method: Method) -> str:
    """`lora:rank=32`, as `parse` reads it."""
    fields = type(method).model_fields
    own = {
        name: value
        for name, value in method.model_dump(mode="json").items()
        if getattr(method, name) != fields[name].get_default()
    }
    texts = {
        name: value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
        for name, value in own.items()
    }
    return ":".join([method.slug, *(f"{name}={text}" for name, text in texts.items())])


def build(slug: str, fields: Iterable[str]) -> Method:
    """A method from its slug and `name=value` texts.

    Raises:
        ConfigError: names the method or the field, and what is allowed.
    """
    cls, values = find(slug.strip()), {}
    for field in fields:
        name, equals, text = field.partition("=")
        name = name.strip()
        if not equals or not name:
            raise ConfigError(
                f"{slug}: {field!r} is not name=value; its fields are {', '.join(cls.model_fields) or 'none'}"
            )
        if name in values:
            raise ConfigError(f"{slug}: {name} is given twice")
        values[name] = value_of(text)
    return cls(**values)


def value_of(text: str) -> Any:
    """A value as JSON or Python spell it, or the text itself: 8, 0.1, true, None, ["q","v"], [q,v], relu."""
    text = text.strip()
    plain = {"True": True, "False": False, "None": None}
    if text in plain:
        return plain[text]
    try:
        return json.loads(text)
    except ValueError:
        pass
    if text[:1] in "[(" and text[-1:] in "])" and text:
        return [value_of(part) for part in split(text[1:-1], ",")]
    if len(text) > 1 and text[0] == text[-1] == "'":
        return text[1:-1]
    return text


def split(text: str, mark: str) -> list[str]:
    """Parts of a text between marks that stand in no bracket or quote, without empty ones."""
    parts, depth, quote, start = [], 0, "", 0
    for i, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "[({":
            depth += 1
        elif letter in "])}":
            depth -= 1
        elif letter == mark and depth == 0 and not exponent(text, i):
            parts.append(text[start:i])
            start = i + 1
    return [part.strip() for part in (*parts, text[start:]) if part.strip()]


def exponent(text: str, i: int) -> bool:
    """Whether the + at `i` belongs to a number such as 1e+2."""
    return text[i] == "+" and re.search(r"\d[eE]$", text[:i]) is not None


# ------------------------------------------------------------------------------------------------------------------------- fits


def fitting(rows: Iterable[Contender], model: nn.Module, anatomy: Anatomy) -> Iterator[tuple[Contender, str]]:
    """Each row and why it can't be attached to this backbone ("" if it can). Nothing is changed."""
    from petiole.attach import plan

    for row in rows:
        reason = ""
        if row.trains:
            try:
                plan(model, row.methods, anatomy, 0, None)
            except (AttachError, ConfigError, PetioleError) as error:
                reason = str(error)
        yield row, reason
