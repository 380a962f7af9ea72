"""Progress bars and load reports, those of other libraries too: off, unless someone watches a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from petiole.errors import need

T = TypeVar("T")


def bar(items: Iterable[T], title: str) -> Iterable[T]:
    """The items with a progress bar, on a terminal and where they take more than two seconds."""
    made: Iterable[T] = need("compare", "tqdm").tqdm(
        items, desc=title, delay=2, leave=False, disable=not sys.stderr.isatty()
    )
    return made


@contextmanager
def quiet() -> Iterator[None]:
    """No bars inside, in a log file or a notebook's output; on a terminal as ever. What was set before is set again afterwards."""
    bars = need("compare", "datasets.utils")
    logs = need("compare", "transformers.utils.logging")
    datasets_on = not bars.are_progress_bars_disabled()
    transformers_on, verbosity = logs.is_progress_bar_enabled(), logs.get_verbosity()
    watched = sys.stderr.isatty()
    if not watched:
        bars.disable_progress_bars()
        logs.disable_progress_bar()
    logs.set_verbosity(max(verbosity, logs.ERROR))  # a head that is new on purpose is no warning
    try:
        yield
    finally:
        if datasets_on and not watched:
            bars.enable_progress_bars()
        if transformers_on and not watched:
            logs.enable_progress_bar()
        logs.set_verbosity(verbosity)
