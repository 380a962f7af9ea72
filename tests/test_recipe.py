"""What no file holds is built again on load, and checked; what was packed for the file is unpacked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petiole as pt
import tiny
import toys
from petiole.anatomy import Site
from petiole.errors import FileError
from petiole.files import parse
from petiole.method import Base, Method, WeightDelta
from petiole.store import refill


class Mixed(WeightDelta):
    """ΔW = c · R for a random R that no file holds; c is stored in hundredths."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.seed = -1
        self.c = nn.Parameter(torch.empty(()))
        self.register_buffer("basis", torch.empty(site.out_features, site.in_features), persistent=False)

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        self.seed = int(torch.randint(1 << 31, (), generator=generator))
        self.c.fill_(0.25)
        self.basis.normal_(generator=torch.Generator().manual_seed(self.seed))

    def weight(self, base: Tensor) -> Tensor:
        return self.c * self.basis

    def recipe(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def folded_state(self) -> dict[str, Tensor]:
        return {"hundredths": (self.c.detach() * 100).round().to(torch.int16)}

    def unfold(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {"c": state["hundredths"] / 100.0} if "hundredths" in state else state


class Mixture(Method):
    def deltas(self, anatomy: pt.Anatomy) -> Any:
        yield from toys.on(["q"], Mixed)(anatomy)


Mixture.slug = "mixture-of-a-test"  # after its definition, so that the registry does not hold it for good


@pytest.fixture
def known() -> Any:
    with toys.registered(Mixture):
        yield


def test_rebuilt_and_unpacked(tmp_path: Path, known: None) -> None:
    model, batch = tiny.model("bert"), tiny.batch("bert")
    tuned = pt.attach(model, Mixture(), seed=3)
    path = tuned.save(tmp_path / "a.safetensors")
    tensors, header = parse(path.read_bytes())
    assert not any(name.endswith(("basis", ":c")) for name in tensors)
    assert len(header["recipe"]) == 2
    other = tiny.model("bert")
    pt.load(other, path)
    assert torch.equal(toys.output(other, batch), toys.output(model, batch))


def test_another_recipe_is_refused(tmp_path: Path, known: None) -> None:
    """Even where the backbone may be another: the numbers in the file would mean something else."""
    from petiole.files import save_adaptation

    path = pt.attach(tiny.model("bert"), Mixture(), seed=3).save(tmp_path / "a.safetensors")
    tensors, header = parse(path.read_bytes())
    header = {key: value for key, value in header.items() if key not in ("digest", "format")}
    for change in ({"seed": 4}, {}, {"seed": header["recipe"]["0.encoder.1.q.output"]["seed"], "more": 1}):
        changed = json.loads(json.dumps(header))
        changed["recipe"]["0.encoder.1.q.output"] = change
        save_adaptation(path, tensors, changed)
        model = tiny.model("bert")
        before = toys.snapshot(model)
        with pytest.raises(FileError, match=r"encoder\.1\.q"):
            pt.load(model, path, allow_other_backbone=True)
        assert toys.snapshot(model) == before


def test_refilling_asks_too(tmp_path: Path, known: None) -> None:
    """An adaptation attached with another seed has another basis."""
    path = pt.attach(tiny.model("bert"), Mixture(), seed=3).save(tmp_path / "a.safetensors", folded=False)
    refill(pt.attach(tiny.model("bert"), Mixture(), seed=3), path)
    with pytest.raises(FileError, match="another seed"):
        refill(pt.attach(tiny.model("bert"), Mixture(), seed=4), path)
