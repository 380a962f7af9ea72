"""Mixed batches: every row equals what its adaptation gives alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import petiole as pt
import tiny

NAMES = ("a", "b", "c")
METHODS = {
    "lora": lambda i: pt.LoRA(rank=2 + i, roles=("q", "v")),
    "dora": lambda i: pt.DoRA(rank=2 + i),
    "ia3": lambda i: pt.IA3(),
    "houlsby": lambda i: pt.HoulsbyAdapter(bottleneck=4),
    "houlsby of other widths": lambda i: pt.HoulsbyAdapter(bottleneck=3 + i),
    "parallel": lambda i: pt.ParallelAdapter(bottleneck=4, learn_scale=True),
    "prefix": lambda i: pt.PrefixTuning(length=2 + i),
    "two at once": lambda i: [pt.LoRA(rank=2, roles=("q",)), pt.ParallelAdapter(bottleneck=3)],
}


def mixed(family: str, method: str) -> tuple[nn.Module, dict[str, Any]]:
    model, batch = tiny.model(family), tiny.batch(family, size=5)
    for i, name in enumerate(NAMES):
        tuned = pt.attach(model, METHODS[method](i), name=name, seed=i)
        generator = torch.Generator().manual_seed(i)
        for parameter in tuned.parameters():
            parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model, batch


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "vit", "t5"])
def test_each_row_equals_its_adaptation_alone(family: str, method: str) -> None:
    model, batch = mixed(family, method)
    rows = ["b", None, "a", "c", "a"]
    with torch.no_grad():
        with pt.route(model, rows):
            together = model(**batch).logits
        for i, name in enumerate(rows):
            with pt.route(model, name):
                alone = model(**batch).logits
            assert torch.allclose(together[i], alone[i], rtol=1e-4, atol=1e-5), (i, name)
    with pt.route(model, "a"), torch.no_grad():
        assert not torch.allclose(together[0], model(**batch).logits[0], atol=1e-4), "rows are not told apart"


@pytest.mark.parametrize("method", ["lora", "houlsby", "prefix"])
def test_training_a_mixed_batch_gives_each_adaptation_its_own_gradient(method: str) -> None:
    model, batch = mixed("bert", method)
    rows = ["b", None, "a", "c", "a"]
    with pt.route(model, rows):
        model(**batch).logits[2].sum().backward()
    for name, tuned in pt.adaptations(model).items():
        grads = [p.grad for p in tuned.parameters() if p.grad is not None]
        assert any(bool((g != 0).any()) for g in grads) == (name == "a"), name


def test_the_gathered_factors_follow_training() -> None:
    model, batch = mixed("bert", "lora")
    rows = ["b", None, "a", "c", "a"]
    with torch.no_grad(), pt.route(model, rows):
        before = model(**batch).logits
        assert torch.equal(before, model(**batch).logits)
        for parameter in pt.adaptations(model)["c"].parameters():
            parameter.mul_(2)
        after = model(**batch).logits
    assert not torch.allclose(before[3], after[3])
    assert torch.equal(before[[0, 1, 2, 4]], after[[0, 1, 2, 4]])


def test_one_product_serves_all_adaptations(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = mixed("bert", "lora")
    calls = []
    real = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *a: calls.append(1) or real(*a))
    with torch.no_grad(), pt.route(model, ["a", "b", "c", "a", None]):
        model(**batch)
    sites = len(pt.anatomy(model).sites(["q", "v"]))
    assert len(calls) == 2 * sites


def test_several_adaptations_on_one_row_add_up() -> None:
    model, batch = mixed("bert", "lora")
    with torch.no_grad():
        with pt.route(model, [("a", "b"), None, "a", ("a", "b"), "b"]):
            together = model(**batch).logits
        pt.activate(model, "a", "b")
        both = model(**batch).logits
    assert torch.allclose(together[0], both[0], atol=1e-5)
    assert torch.allclose(together[3], both[3], atol=1e-5)


def test_a_wrong_number_of_rows_or_name_is_refused() -> None:
    model, batch = mixed("bert", "lora")
    with pytest.raises(pt.PetioleError, match="no adaptation is called 'x'"), pt.route(model, ["x"] * 5):
        pass
    with pytest.raises(pt.PetioleError, match="3 rows"), pt.route(model, ["a", "b", None]), torch.no_grad():
        model(**batch)


def test_what_trains_the_backbone_itself_can_not_differ_by_row() -> None:
    model = tiny.model("bert")
    pt.attach(model, pt.BitFit(), name="a")
    pt.attach(model, pt.LoRA(), name="b")
    with pytest.raises(pt.PetioleError, match="can't differ between the rows"), pt.route(model, ["a", "b"]):
        pass
