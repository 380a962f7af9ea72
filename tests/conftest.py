"""What holds for every test: one thread, no network, the same random numbers on every run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Before any Hugging Face module is imported: these are read at import.
for _variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ[_variable] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

from sockets import forbid, loopback  # noqa: E402

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("PETIOLE_SHARED", ROOT.parent / "shared"))
FIXTURES = Path(os.environ.get("PETIOLE_FIXTURES", SHARED / "fixtures"))

forbid()


@pytest.fixture(autouse=True)
def _sockets(request: pytest.FixtureRequest) -> Iterator[None]:
    with loopback(allowed=request.node.get_closest_marker("loopback") is not None):
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of data and reference results beside the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"no folder {SHARED} (set PETIOLE_SHARED)")
    return SHARED


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """The folder of reference inputs and outputs, one folder for each system."""
    if not FIXTURES.is_dir():
        pytest.skip(f"no folder {FIXTURES} (set PETIOLE_FIXTURES)")
    return FIXTURES
