"""One small model and data set for all tests of comparisons, and one comparison that has been run."""

from __future__ import annotations

from pathlib import Path

import pytest

import small
from petiole.compare.run import Comparison, compare


@pytest.fixture(scope="session")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `bert` and `films.csv`."""
    return small.place(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def finished(here: Path, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """A comparison of four rows, run once."""
    output = tmp_path_factory.mktemp("run") / "first"
    return compare(
        str(here / small.MODEL), str(here / small.DATA), "lora:rank=2,linear-probe", output=output, **small.OPTIONS
    )
