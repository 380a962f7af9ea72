"""An adaptation in a file: what comes back is what was saved, and whatever does not fit is refused with the model as it was."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn

import petiole as pt
import tiny
import toys
from petiole import files, store
from petiole.anatomy import Anatomy
from petiole.errors import AttachError, ConfigError, FileError, PetioleError
from petiole.method import Method, Moment, Place
from petiole.store import refill
from toys import Affine, Dense, output, shake

OWN = "bert.embeddings.LayerNorm.bias"


class Whole(Method):
    """One of everything: weights, hidden states, a shared module, parameters of the backbone, state."""

    roles: tuple[str, ...] = Field(("q",), description="Linears.")
    length: int = Field(2, ge=1, description="Of a vector.")

    def deltas(self, anatomy: Anatomy) -> Iterator[Place]:
        yield from (Place(site, Dense(site)) for site in anatomy.sites(list(self.roles)))
        yield from (Place(site, Affine(site.out_features)) for site in anatomy.sites(["ffn"]))
        yield from (Place(site, Vector(self.length)) for site in anatomy.sites(["attention"]))

    def shared(self, anatomy: Anatomy) -> nn.Module:
        return nn.Linear(self.length, 1)

    def trains(self, anatomy: Anatomy, model: nn.Module) -> list[str]:
        return [OWN]

    def on_attach(self, moment: Moment) -> None:
        moment.state |= {"steps": 0, "mask": torch.zeros(3, dtype=torch.bool), "names": ["a"]}


Whole.slug = "toy-whole"  # set afterwards: a class that is defined with one registers itself for good


class Vector(toys.Heads):
    """A gain that is the sum of a vector, whose length can grow, and a buffer."""

    running: Tensor

    def __init__(self, length: int) -> None:
        super().__init__(1.0)
        self.start = length
        self.vector = nn.Parameter(torch.zeros(length))
        self.register_buffer("running", torch.zeros(2))

    def heads_output(self, output: Tensor, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        return output * (self.gain + self.vector.sum() + self.running.sum())

    def structure(self) -> dict[str, Any]:
        return {"length": len(self.vector)} if len(self.vector) != self.start else {}

    def restructure(self, structure: Mapping[str, Any]) -> None:
        self.vector = nn.Parameter(torch.zeros(structure.get("length", self.start)))


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    with toys.registered(Whole):
        yield


def trained(**fields: Any) -> tuple[nn.Module, pt.Adaptation]:
    """With other values in everything that a file must hold."""
    model = toys.model("bert")
    tuned = pt.attach(model, Whole(**fields))
    shake(tuned)
    vector = next(slot.delta for slot in tuned.slots if isinstance(slot.delta, Vector))
    vector.restructure({"length": 5})
    with torch.no_grad():
        vector.vector.add_(0.1)
        vector.running.fill_(0.25)
    tuned.state[0] |= {"steps": 7, "mask": torch.tensor([True, False, True]), "half": 0.5}
    return model, tuned


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return trained()[1].save(tmp_path / "trec.petiole.safetensors")


def forged(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], Any]) -> Path:
    """A file with something changed in it and a right digest: what a person with an editor could make."""
    tensors, about = files.load_adaptation(path)
    change(tensors, about)
    files.save_adaptation(path, tensors, about)
    return path


@contextmanager
def refused(model: nn.Module, *words: str, error: type[PetioleError] = FileError) -> Iterator[None]:
    before = toys.snapshot(model)
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert len(message.splitlines()) <= 3, message
    for word in words:
        assert word in message, (word, message)
    assert toys.snapshot(model) == before


# ---------------------------------------------------------------------------------------------------------------- there and back


def test_everything_comes_back(tmp_path: Path) -> None:
    model, tuned = trained()
    batch = tiny.batch("bert")
    expected = output(model, batch)
    path = tuned.save(tmp_path / "trec.petiole.safetensors")
    other = toys.model("bert")
    bare = output(other, batch)
    again = pt.load(other, path)
    assert again.name == "trec" and again.seed == tuned.seed and again.methods == tuned.methods
    assert torch.equal(output(other, batch), expected)
    saved, loaded = tuned.named_tensors(), again.named_tensors()
    assert saved.keys() == loaded.keys()
    assert all(toys.bits(saved[n]) == toys.bits(loaded[n]) for n in saved)
    assert {n: v for n, v in again.state[0].items() if n != "mask"} == {"steps": 7, "names": ["a"], "half": 0.5}
    assert torch.equal(again.state[0]["mask"], torch.tensor([True, False, True]))
    assert again.trainable == tuned.trainable
    assert again.save(tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    with pt.disabled(other):
        assert torch.equal(output(other, batch), bare)


def test_the_file_holds_the_change_and_names_no_module(file: Path) -> None:
    tensors, about = files.load_adaptation(file)
    paths = {path for path, _ in toys.model("bert").named_modules() if "." in path}
    assert {name for name in tensors if any(path in name for path in paths)} == {f"own:{OWN}"}
    assert {key.partition(":")[0] for key in tensors} == {
        "own", "-1.head.output", "0.shared", "0.state",
        *(f"0.encoder.{i}.{role}.output" for i in (0, 1) for role in ("q", "ffn", "attention")),
    }  # fmt: skip
    assert [m["slug"] for m in about["methods"]] == ["toy-whole"] and about["structure"] == {
        "0.encoder.0.attention.output": {"length": 5}
    }


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        trained()[1].save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_second_adaptation_is_loaded_beside_the_first(file: Path) -> None:
    model, batch = toys.model("bert"), tiny.batch("bert")
    lone = toys.model("bert")
    pt.load(lone, file)
    shake(pt.attach(model, toys.method(toys.on(["v"], Dense)), name="first"))
    first = output(model, batch)
    pt.load(model, file, name="second")
    assert torch.equal(output(model, batch), output(lone, batch))
    with pt.route(model, "first"):
        assert torch.equal(output(model, batch), first)


@pytest.mark.parametrize(
    "name, short",
    [("trec.petiole.safetensors", "trec"), ("a b!c.x", "a-b-c"), ("x" * 80, "x" * 64), ("ok_1-2", "ok_1-2")],
)
def test_the_name_is_that_of_the_file(name: str, short: str, file: Path) -> None:
    path = file.rename(file.parent / name)
    assert pt.load(toys.model("bert"), path).name == short


def test_refilling_takes_values_structure_and_state_back(tmp_path: Path) -> None:
    model, tuned = trained()
    expected = output(model, tiny.batch("bert"))
    path = tuned.save(tmp_path / "x", folded=False)
    shake(tuned, seed=5)
    for slot in tuned.slots:
        if isinstance(slot.delta, Vector):
            slot.delta.restructure({"length": 3})
    tuned.state[0].clear()
    refill(tuned, path)
    assert torch.equal(output(model, tiny.batch("bert")), expected)
    assert tuned.state[0]["steps"] == 7
    other = pt.attach(toys.model("bert"), Whole(length=3))
    before = toys.snapshot(other.model)
    with pytest.raises(FileError, match="another configuration"):
        refill(other, path)
    assert toys.snapshot(other.model) == before


def test_what_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    _, tuned = trained()
    path = tuned.save(tmp_path / "x")
    before = path.read_bytes()
    with torch.no_grad():
        next(tuned.parameters()).view(-1)[3] = math.nan
    with pytest.raises(FileError, match="finite"):
        tuned.save(path)
    assert path.read_bytes() == before


# -------------------------------------------------------------------------------------------------------- refused, model as it was


def drop(name: str) -> Any:
    return lambda tensors, about: tensors.pop(name)


def put(name: str, value: Any) -> Any:
    return lambda tensors, about: tensors.update({name: value(tensors.get(name)) if callable(value) else value})


def head(**changes: Any) -> Any:
    return lambda tensors, about: about.update(changes)


def entry(**changes: Any) -> Any:
    return lambda tensors, about: about["methods"][0].update(changes)


Q, ONE = "0.encoder.1.q.output:change", "0.encoder.0.attention.output"

FORGED: dict[str, tuple[Any, tuple[str, ...]]] = {
    "a tensor missing": (drop(Q), (Q, "is missing")),
    "the head missing": (drop("-1.head.output:module.weight"), ("head", "is missing")),
    "a tensor of the backbone missing": (drop(f"own:{OWN}"), (OWN, "is missing")),
    "a tensor too many": (put("0.encoder.7.q.output:change", torch.zeros(2)), ("0.encoder.7.q", "belongs to nothing")),
    "a weight of the backbone": (put("own:bert.pooler.dense.weight", torch.zeros(32, 32)), ("own:bert.pooler", "belongs to nothing")),
    "a name that is a path": (put("../../x", torch.zeros(2)), ("../../x", "belongs to nothing")),
    "state of a method that is not there": (put("7.state:mask", torch.zeros(2)), ("7.state:mask", "belongs to nothing")),
    "another shape": (put(Q, lambda t: t[:16]), (Q, "(16, 32)", "(32, 32)")),
    "another dtype": (put(Q, lambda t: t.half()), (Q, "float16", "float32")),
    "a shape that broadcasts": (put(Q, lambda t: t[:1, :1].clone()), (Q, "(1, 1)")),
    "an unknown method": (entry(slug="no-such-method"), ("no-such-method", "unknown here")),
    "a method by its path": (entry(slug="petiole.methods.lowrank.lora:LoRA"), ("unknown here",)),
    "a slug that is no text": (entry(slug=["lora"]), ("unknown here",)),
    "a newer version": (entry(version=2), ("version 2 of toy-whole", "version 1")),
    "a version that is none": (entry(version=None), ("version None",)),
    "an unknown field": (entry(config={"roles": ["q"], "ranks": 3}), ("no field 'ranks'",)),
    "a value out of range": (entry(config={"roles": ["q"], "length": 0}), ("length = 0",)),
    "another value": (entry(config={"roles": ["q"], "length": 4}), ("vector", "(2,)", "(4,)")),
    "other roles": (entry(config={"roles": ["k"], "length": 2}), ("is missing",)),
    "roles that the model has not": (entry(config={"roles": ["gate"], "length": 2}), ("does not fit this model", "gate")),
    "two methods for one": (lambda t, a: a["methods"].append(a["methods"][0]), ()),
    "no methods": (head(methods=[]), ()),
    "methods that are no list": (head(methods={}), ("'methods' is missing or not a list",)),
    "an entry that is none": (head(methods=[3]), ("entry of 'methods' is damaged",)),
    "no head": (head(head=False), ("head", "belongs to nothing")),
    "a seed that is none": (head(seed="0"), ("'seed' is missing or not a int",)),
    "a seed that is a switch": (head(seed=True), ("'seed'",)),
    "a structure of nothing": (head(structure={"0.encoder.9.q.output": {"length": 3}}), ("0.encoder.9.q.output", "does not have")),
    "a structure of what has none": (head(structure={"0.encoder.0.q.output": {"length": 3}}), ("no variable structure",)),
    "another structure": (head(structure={ONE: {"length": 4}}), ("vector", "(5,)", "(4,)")),
    "a structure without sense": (head(structure={ONE: {"length": "many"}}), ("can't have the stored structure",)),
    "a structure that is none": (head(structure={ONE: 3}), ()),
    "state of nothing": (head(state={"3": {"a": 1}}), ("names method 3",)),
    "state that is none": (head(state={"0": 3}), ("names method 0",)),
    "no backbone": (head(backbone=None), ("'backbone' is missing",)),
    "another backbone's weights": (lambda t, a: a["backbone"].update(values="0" * 64), ("made on another backbone", "weights differ")),
    "another backbone's class": (lambda t, a: a["backbone"].update({"class": "RobertaModel"}), ("another backbone", "class")),
}  # fmt: skip


@pytest.mark.parametrize("beside", [False, True], ids=["fresh", "beside another"])
@pytest.mark.parametrize("what", FORGED)
def test_is_refused(what: str, beside: bool, file: Path) -> None:
    change, words = FORGED[what]
    model = toys.model("bert")
    if beside:
        shake(pt.attach(model, toys.method(toys.on(["v"], Dense)), name="first"))
    forged(file, change)
    with refused(model, *words):
        pt.load(model, file, name="second")
    assert list(pt.adaptations(model)) == ["first"] * beside


def test_what_is_altered_without_a_digest_is_refused(file: Path) -> None:
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    about = json.loads(data[8 : 8 + size])["__metadata__"][files.KEY]
    assert '\\"length\\":2' in json.dumps(about) or '"length":2' in about
    model = toys.model("bert")
    for changed in (
        data.replace(b'length\\":2', b'length\\":3'),
        data[:-1],
        data[:-1] + bytes([data[-1] ^ 1]),
        data[: size // 2],
        b"",
        b"\x80\x04K\x01.",
    ):
        assert changed != data
        file.write_bytes(changed)
        with refused(model, str(file)):
            pt.load(model, file)


def test_a_newer_format_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, about = files.load_adaptation(file)
    monkeypatch.setattr(files, "FORMAT", files.FORMAT + 1)
    files.save_adaptation(file, tensors, about)
    monkeypatch.undo()
    model = toys.model("bert")
    with refused(model, "format"):
        pt.load(model, file)


@pytest.mark.parametrize("path", ["nowhere.safetensors", "."])
def test_what_is_no_file_is_refused(path: str, tmp_path: Path) -> None:
    model = toys.model("bert")
    with refused(model):
        pt.load(model, tmp_path / path)


@pytest.mark.parametrize(
    "family, fields, words",
    [
        ("bert", {"num_hidden_layers": 3}, ("configuration differs", "num_hidden_layers")),
        ("bert", {"hidden_size": 16}, ("configuration differs", "hidden_size")),
        ("roberta", {}, ("class",)),
        ("llama", {}, ("class",)),
    ],
)
def test_another_backbone_is_refused(family: str, fields: dict[str, Any], words: tuple[str, ...], file: Path) -> None:
    model = toys.model(family, **fields)
    with refused(model, "made on another backbone", *words):
        pt.load(model, file)
    if family != "roberta":  # whose sites and shapes fit, but not the name of the parameter that trains in place
        with refused(model):
            pt.load(model, file, allow_other_backbone=True)


def test_one_other_weight_makes_another_backbone(file: Path) -> None:
    model = toys.model("bert")
    with torch.no_grad():
        model.get_parameter("bert.encoder.layer.1.output.dense.bias")[0] += 1e-3
    with refused(model, "weights differ"):
        pt.load(model, file)
    pt.load(model, file, allow_other_backbone=True)


def test_another_head_makes_no_other_backbone_but_must_fit(file: Path) -> None:
    model = toys.model("bert")
    with torch.no_grad():
        model.classifier.weight.add_(1.0)
    pt.load(model, file)
    wider = toys.model("bert")
    wider.classifier, wider.config.num_labels = nn.Linear(32, 5), 5
    with refused(wider, "head", "(3, 32)", "(5, 32)"):
        pt.load(wider, file)


def test_another_precision_is_refused(file: Path) -> None:
    model = toys.model("bert").to(torch.bfloat16)
    with refused(model, "dtype"):
        pt.load(model, file)


def test_a_name_that_is_taken_or_none_is_refused(file: Path) -> None:
    model = toys.model("bert")
    pt.load(model, file, name="a")
    with refused(model, "'a' is attached already", error=ConfigError):
        pt.load(model, file, name="a")
    with refused(model, "letters, digits", error=ConfigError):
        pt.load(model, file, name="a/b")
    with refused(model, "trained in place by another", error=AttachError):
        pt.load(model, file, name="b")


def test_a_file_made_on_a_merged_backbone_is_refused_on_the_bare_one(tmp_path: Path) -> None:
    model, batch = toys.model("bert"), tiny.batch("bert")
    under = pt.attach(model, toys.method(toys.on(["v"], Dense), merges=True), name="under")
    under.merge()
    above = pt.attach(model, Whole(), name="above")
    shake(above)
    path, expected = above.save(tmp_path / "above"), output(model, batch)
    bare = toys.model("bert")
    with refused(bare, "weights differ"):
        pt.load(bare, path)
    above.detach()
    pt.load(model, path)
    assert torch.equal(output(model, batch), expected)


def test_values_that_no_longer_fit_after_attaching_are_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a method does on attaching comes after the checks."""

    def grow(self: Method, moment: Moment) -> None:
        for delta in moment.deltas.values():
            if isinstance(delta, Vector):
                delta.restructure({"length": 9})

    monkeypatch.setattr(Whole, "on_attach", grow)
    model = toys.model("bert")
    with refused(model, "vector", "(5,)", "(9,)"):
        pt.load(model, file)


# --------------------------------------------------------------------------------------------------------------------- the hub


class Hub:
    """Stands for the Hub: a dictionary in memory, and what was asked of it."""

    def __init__(self) -> None:
        self.files: dict[tuple[str, str], bytes] = {}
        self.calls: list[tuple[Any, ...]] = []

    def api(self, **options: Any) -> Any:
        hub = self
        hub.calls.append(("options", options))

        class Api:
            def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
                hub.calls.append(("create", repo_id, private, exist_ok))

            def upload_file(self, *, path_or_fileobj: str, path_in_repo: str, repo_id: str, commit_message: str) -> str:
                hub.files[repo_id, path_in_repo] = Path(path_or_fileobj).read_bytes()
                hub.calls.append(("upload", repo_id, path_in_repo, commit_message))
                return f"https://hub/{repo_id}/{path_in_repo}"

        return Api()

    def download(self, repo_id: str, filename: str) -> str:
        from huggingface_hub.errors import EntryNotFoundError
        from huggingface_hub.utils import validate_repo_id

        validate_repo_id(repo_id)
        if (repo_id, filename) not in self.files:
            raise EntryNotFoundError(f"404: no {filename} in {repo_id}")
        path = Path(os.environ["PETIOLE_TEST_HUB"]) / filename
        path.write_bytes(self.files[repo_id, filename])
        return str(path)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    import huggingface_hub

    found = Hub()
    monkeypatch.setenv("PETIOLE_TEST_HUB", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "HfApi", found.api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", found.download)
    return found


def test_there_and_back_over_the_hub(hub: Hub) -> None:
    model, tuned = trained()
    expected = output(model, tiny.batch("bert"))
    assert tuned.push_to_hub("me/leaf", token="secret") == f"https://hub/me/leaf/{store.HUB_FILE}"
    assert hub.calls == [
        ("options", {"token": "secret"}), ("create", "me/leaf", True, True), ("upload", "me/leaf", store.HUB_FILE, "Upload adaptation"),
    ]  # fmt: skip
    assert list(hub.files) == [("me/leaf", store.HUB_FILE)]
    assert b"secret" not in hub.files["me/leaf", store.HUB_FILE]
    other = toys.model("bert")
    assert pt.load(other, "hub:me/leaf").name == "adaptation"
    assert torch.equal(output(other, tiny.batch("bert")), expected)


def test_public_only_when_told(hub: Hub) -> None:
    trained()[1].push_to_hub("me/leaf", private=False, message="For all")
    assert ("create", "me/leaf", False, True) in hub.calls and (
        "upload",
        "me/leaf",
        store.HUB_FILE,
        "For all",
    ) in hub.calls


def test_what_is_not_finite_is_not_pushed(hub: Hub) -> None:
    _, tuned = trained()
    with torch.no_grad():
        next(tuned.parameters()).fill_(math.inf)
    with pytest.raises(FileError, match="NaN or infinity"):
        tuned.push_to_hub("me/leaf")
    assert not hub.files and not any(call[0] in ("create", "upload") for call in hub.calls), "something reached the hub"


@pytest.mark.parametrize("name", ["hub:me/none", "hub:../../etc/passwd", "hub:", "hub:a/b/c"])
def test_a_hub_name_that_leads_nowhere_is_refused(name: str, hub: Hub) -> None:
    model = toys.model("bert")
    with refused(model, name):
        pt.load(model, name)


def test_what_comes_from_the_hub_is_read_as_strictly(hub: Hub, file: Path) -> None:
    data = file.read_bytes()
    hub.files["me/leaf", store.HUB_FILE] = data[:-1] + bytes([data[-1] ^ 1])
    model = toys.model("bert")
    with refused(model):
        pt.load(model, "hub:me/leaf")


def test_two_models_that_load_one_file_share_nothing(file: Path) -> None:
    model = toys.model("bert")
    twin = copy.deepcopy(model)
    first, second = pt.load(model, file), pt.load(twin, file)
    shake(first)
    assert not any(a is b for a in first.parameters() for b in second.parameters())
    assert torch.equal(output(twin, tiny.batch("bert")), output(trained()[0], tiny.batch("bert")))
