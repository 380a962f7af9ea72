"""The method that docs/extending.md adds is a file like any other: found, typed, clean, and whole from attach to detach."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import make_docs
import make_support
import petiole
import petiole.method as method
import snippets

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "extending.md"


def file_of(title: str) -> str:
    """The block of the page that carries this file name."""
    return re.search(rf'^```python title="{re.escape(title)}"\n(.*?)^```$', PAGE.read_text(), re.DOTALL | re.MULTILINE)[
        1
    ]  # type: ignore[index]


@pytest.fixture
def ssf(tmp_path: Path) -> Iterator[type[method.Method]]:
    """The page's class, loaded from a file under the name that it would have in the package."""
    method.registry()
    before, own, name = dict(method._REGISTRY), set(vars(petiole)), "petiole.methods.adapters.ssf"
    path = tmp_path / "ssf.py"
    path.write_text(file_of("src/petiole/methods/adapters/ssf.py"))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        yield module.SSF
    finally:
        del sys.modules[name]
        method._REGISTRY.clear()
        method._REGISTRY.update(before)
        for new in set(vars(petiole)) - own:
            delattr(petiole, new)


def test_it_is_registered_in_its_family(ssf: type[method.Method]) -> None:
    assert method.find("ssf") is ssf
    assert ssf.family() == "adapters"
    assert petiole.SSF is ssf


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "vit", "bart"])
def test_it_goes_from_attach_to_detach(ssf: type[method.Method], family: str) -> None:
    found = make_support.cell(family, ssf)
    assert found.outcome == "works", found
    assert found.merges == "yes" or "no bias" in found.merges


def test_its_page_can_be_written(ssf: type[method.Method]) -> None:
    text = make_docs.page(ssf)
    assert "γ ⊙ h + β" in text and "| **Merges** | exactly: ΔW = diag(γ - 1) W" in text and "pt.SSF(roles=" in text


@pytest.mark.parametrize("title", ["src/petiole/methods/adapters/ssf.py", "tests/methods/test_ssf.py"])
def test_ruff_accepts_the_file(title: str) -> None:
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--stdin-filename", str(ROOT / title), "-"],
            input=file_of(title), capture_output=True, text=True, cwd=ROOT, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_page_is_a_program() -> None:
    assert len(list(snippets.steps(PAGE.read_text()))) >= 5
