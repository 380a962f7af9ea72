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


TOKENS = {
    "prompts": lambda i: pt.PromptTuning(length=2 + i),
    "prompts of one length": lambda i: pt.PromptTuning(length=3),
    "shallow vpt": lambda i: pt.VisualPromptTuning(length=2 + i, deep=False),
    "deep vpt": lambda i: pt.VisualPromptTuning(length=2 + i),
}
TEXT = [
    "bert",
    "roberta",
    "distilbert",
    "electra",
    "albert",
    "modernbert",
    "llama",
    "gpt2",
    "opt",
    "bloom",
    "gemma",
    "t5",
    "bart",
]
PATCHES = ["vit", "deit", "dinov2", "clip", "wav2vec2", "ast"]


@pytest.mark.parametrize(
    ("family", "method"),
    [(f, m) for f in TEXT for m in TOKENS if "shallow" not in m]
    + [(f, m) for f in PATCHES for m in TOKENS if "vpt" in m],
)
@pytest.mark.parametrize("rows", [["b", None, "a", "c", "a"], ["a", "b", "c", "a", "b"]], ids=["some none", "all some"])
def test_each_row_has_its_own_input_tokens(
    family: str, method: str, rows: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, method, TOKENS[method])
    model, batch = mixed(family, method)
    if family == "bart" and method == "deep vpt":  # which acts in the decoder
        with pytest.raises(pt.PetioleError, match="numbers positions by their order"), pt.route(model, rows):
            model(**batch)
        return
    same(model, batch, rows)
    if "attention_mask" in batch and family not in PATCHES:
        del batch["attention_mask"]
        same(model, batch, rows)


def same(model: nn.Module, batch: dict[str, Any], rows: list[str | None]) -> None:
    batch = {name: value for name, value in batch.items() if name != "return_loss"}

    def output() -> torch.Tensor:
        found = model(**batch)
        value: torch.Tensor = found.logits if "logits" in found else found.logits_per_image
        return value

    with torch.no_grad():
        with pt.route(model, rows):
            together = output()
        for i, name in enumerate(rows):
            with pt.route(model, name):
                alone = output()
            assert torch.allclose(together[i], alone[i], rtol=1e-4, atol=1e-5), (i, name)
        with pt.route(model, "c"):
            assert not torch.allclose(together[0], output()[0], atol=1e-4), "rows are not told apart"


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "t5"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("method", ["prompts", "deep vpt"])
def test_generation_goes_on_by_row(family: str, padded: bool, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, method, TOKENS[method])
    model, batch = mixed(family, method)
    model.eval()
    ids = batch["input_ids"].clamp(min=3)
    mask = torch.ones_like(ids)
    if padded:
        mask[1:3, :2] = 0
    rows = ["b", None, "a", "c", "a"]
    settings: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with pt.route(model, rows):
        together = model.generate(input_ids=ids, attention_mask=mask, **settings)
    for i, name in enumerate(rows):
        with pt.route(model, name):
            alone = model.generate(input_ids=ids, attention_mask=mask, **settings)
        assert torch.equal(together[i], alone[i]), (i, name)
    if family == "llama":
        with pt.route(model, rows):
            beams = model.generate(input_ids=ids, attention_mask=mask, num_beams=2, **settings)
        assert beams.shape == together.shape


def test_tokens_of_rows_get_their_own_gradient_also_when_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "prompts", TOKENS["prompts"])
    model, batch = mixed("llama", "prompts")
    rows = ["b", None, "a", "c", "a"]
    with pt.route(model, rows):
        model(**batch).logits[2].sum().backward()
    first = {}
    for name, tuned in pt.adaptations(model).items():
        (gradient,) = [p.grad for p in tuned.parameters()]
        assert gradient is not None and bool((gradient != 0).any()) == (name == "a"), name
        first[name] = gradient.clone()
    model.zero_grad()
    model.train()
    model.gradient_checkpointing_enable()
    with pt.route(model, rows):
        model(**batch).logits[2].sum().backward()
    for name, tuned in pt.adaptations(model).items():
        (gradient,) = [p.grad for p in tuned.parameters()]
        torch.testing.assert_close(gradient, first[name], rtol=1e-4, atol=1e-6)


def test_rows_whose_tokens_can_not_stand_side_by_side_are_refused() -> None:
    model, batch = tiny.model("vit"), tiny.batch("vit", size=2)
    pt.attach(model, pt.VisualPromptTuning(length=2), name="a")
    pt.attach(model, pt.VisualPromptTuning(length=2), name="b")
    with pytest.raises(pt.PetioleError, match="input tokens of one method"), pt.route(model, [("a", "b"), "a"]):
        model(**batch)
    with pt.route(model, [("a", "b"), ("a", "b")]), torch.no_grad():  # all rows are alike
        model(**batch)


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
