"""A configuration says in three lines what is wrong with it, and the registry finds every method and no other."""

from __future__ import annotations

import importlib.metadata
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from pydantic import Field
from torch import nn

import petiole as pt
import toys
from petiole import method as core
from petiole.errors import AttachError, ConfigError
from petiole.method import Base, Method, WeightDelta, find, registry


class Example(Method):
    """Never registered: it has no slug."""

    rank: int = Field(4, ge=1, le=64, description="Inner width.")
    scale: float = Field(1.0, description="A factor.")
    kind: Literal["plain", "fancy"] = Field("plain", description="Which.")
    switch: bool = Field(False, description="Whether.")
    layers: core.Layers = core.layers_field()


# --------------------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"rank": 0}, ("Example.rank = 0", "greater than or equal to 1", "Inner width.")),
        ({"rank": 65}, ("Example.rank = 65", "less than or equal to 64")),
        ({"rank": 1.5}, ("Example.rank = 1.5",)),
        ({"rank": None}, ("Example.rank = None",)),
        ({"rank": True}, ("Example.rank = True",)),
        ({"scale": False}, ("Example.scale = False",)),
        ({"scale": math.nan}, ("Example.scale = nan", "finite")),
        ({"scale": math.inf}, ("Example.scale = inf", "finite")),
        ({"kind": "plane"}, ("Example.kind = 'plane'", "'plain' or 'fancy'")),
        ({"layers": "all"}, ("Example.layers = 'all'",)),
        ({"layers": ("x",)}, ("Example.layers.0 = 'x'",)),
        ({"ranks": 4}, ("no field 'ranks'", "did you mean rank?", "rank, scale, kind, switch, layers")),
        ({"r": 4}, ("no field 'r'", "rank, scale, kind, switch, layers")),
        ({"rank": 0, "scale": "x", "kind": 3, "no": 1}, ("rank", "scale", "and 2 more")),
        ({"rank": list(range(10_000))}, ("Example.rank = [0, 1,",)),
    ],
)
def test_a_refusal_names_field_value_and_range(fields: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        Example(**fields)
    message = str(caught.value)
    assert len(message.splitlines()) <= 3 and len(message) < 600, message
    for word in words:
        assert word in message, (word, message)
    assert caught.value.__cause__ is None, "the library underneath shows through"


def test_a_configuration_can_not_change_and_equals_its_like() -> None:
    method = Example(rank=2, layers=[0, -1])
    assert method == Example(rank=2, layers=(0, -1)) != Example(rank=3)
    with pytest.raises(Exception, match="frozen"):
        method.rank = 5  # type: ignore[misc]
    assert Example(**json.loads(json.dumps(method.model_dump(mode="json")))) == method


def test_attach_takes_methods_alone() -> None:
    model = toys.model("bert")
    for wrong in ([], "lora", [Example, Example()], None, [Example(), "x"]):
        with pytest.raises((ConfigError, TypeError)):
            pt.attach(model, wrong)  # type: ignore[arg-type]
    assert not pt.adaptations(model)


def test_overrides_knows_what_a_method_does_over_time() -> None:
    class Acts(Example):
        def before_step(self, moment: core.Moment) -> None: ...

    class Below(Acts): ...

    assert Below().overrides("before_step") and not Below().overrides("loss") and not Example().overrides("before_step")


# -------------------------------------------------------------------------------------------------------------------- registry


@pytest.fixture
def clean() -> Iterator[None]:
    """The registry is afterwards as before."""
    registry()
    before = dict(core._REGISTRY)
    yield
    core._REGISTRY.clear()
    core._REGISTRY.update(before)


def test_every_file_of_the_families_is_found_whatever_was_imported() -> None:
    """A fresh process that never named a method knows them all, and their classes are attributes of the package."""
    code = "import petiole as pt, json; print(json.dumps([*pt.registry()])); pt.LoRA; assert 'LoRA' in pt.__all__ and 'LoRA' in dir(pt)"
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    slugs = json.loads(found.stdout)
    assert slugs == sorted(slugs) == list(registry())
    package = Path(core.__file__).parent
    written = {
        line.split('"')[1]
        for file in package.rglob("*.py")
        for line in file.read_text(encoding="utf-8").splitlines()
        if line.strip().startswith('slug: ClassVar[str] = "') and line.split('"')[1]
    }
    assert written == set(slugs), "a file defines a method that the registry does not find"


def test_each_class_stands_under_its_own_slug_and_name() -> None:
    methods = registry()
    assert all(cls.slug == slug for slug, cls in methods.items())
    names = [cls.__name__ for cls in methods.values()]
    assert len(set(names)) == len(names)
    assert all(getattr(pt, cls.__name__) is cls for cls in methods.values())
    assert all(cls.family() != "petiole" for cls in methods.values())


def test_toys_and_bases_without_a_slug_are_no_methods() -> None:
    toys.method()
    assert Example not in registry().values()
    assert all(cls.__module__.startswith("petiole.") for cls in registry().values())


def test_two_methods_of_one_slug_are_refused(clean: None) -> None:
    taken = next(iter(registry()))
    with pytest.raises(ConfigError, match=f"two methods call themselves '{taken}'"):

        class Thief(Method):
            slug: ClassVar[str] = taken

    assert registry()[taken].__name__ != "Thief"


def test_a_subclass_without_a_slug_of_its_own_does_not_take_its_parents_place(clean: None) -> None:
    slug, parent = next(iter(registry().items()))
    type("Child", (parent,), {"__module__": __name__})
    assert registry()[slug] is parent


def test_other_packages_bring_methods_by_an_entry_point(clean: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        def load(self) -> None:
            class Foreign(Method):
                slug: ClassVar[str] = "foreign"

    real = importlib.metadata.entry_points
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda **s: [Entry()] if s.get("group") == "petiole.methods" else real(**s)
    )
    monkeypatch.setattr(core, "_found", False)
    assert "foreign" in registry() and set(registry()) > {"foreign"}


def test_a_misspelt_slug_or_name_gets_the_nearest() -> None:
    slug, cls = next(iter(registry().items()))
    with pytest.raises(ConfigError, match=f"no method is called '{slug}x'; did you mean .*{slug}"):
        find(f"{slug}x")
    with pytest.raises(AttributeError, match=f"did you mean .*{cls.__name__}"):
        getattr(pt, f"{cls.__name__}x")
    assert find(slug) is cls


# ------------------------------------------------------------------------------------------------------------------------ base


def test_a_delta_without_formula_or_structure_says_so() -> None:
    class Silent(WeightDelta):
        pass

    with pytest.raises(NotImplementedError, match="Silent doesn't say its ΔW"):
        Silent().weight(torch.zeros(1))
    Silent().restructure({})
    with pytest.raises(AttachError, match="no variable structure"):
        Silent().restructure({"rank": 3})


def test_the_base_shows_each_site_its_own_weight() -> None:
    """Rows cut out, (in, out) transposed, experts picked, never a copy where a view will do, never a gradient."""
    model = toys.model("gpt2")
    for role, columns in (("q", slice(0, 32)), ("k", slice(32, 64)), ("v", slice(64, 96))):
        site = pt.anatomy(model).sites([role], [1])[0]
        module = model.get_submodule(site.path)
        base = Base(site, module)
        assert torch.equal(base.weight, module.weight[:, columns].T)
        assert base.bias is not None and torch.equal(base.bias, module.bias[columns])
        assert base.weight.data_ptr() == module.weight[:, columns].data_ptr() and not base.weight.requires_grad
        x = torch.randn(3, 32)
        torch.testing.assert_close(base.apply(x, base.weight, base.bias), module(x)[:, columns])
    model = toys.model("mixtral")
    for site in pt.anatomy(model).sites(["up"], [0]):
        experts = model.get_submodule(site.path)
        assert torch.equal(Base(site, experts).weight, experts.gate_up_proj[site.expert, 64:])
        assert Base(site, experts).bias is None


def test_the_base_dequantises(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toys.model("bert")
    site = pt.anatomy(model).sites(["q"])[0]
    module = model.get_submodule(site.path)
    module.weight = nn.Parameter((module.weight.detach() * 100).round().to(torch.int8), requires_grad=False)
    monkeypatch.setattr(torch.Tensor, "dequantize", lambda t: t.float() / 100)
    assert torch.equal(Base(site, module).weight, module.weight.float() / 100)
