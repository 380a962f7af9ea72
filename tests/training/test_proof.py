"""Nothing trains in vain: what is not called, has no gradient or does not move is named, and nothing else is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import petiole as pt
import tiny
from petiole.anatomy import Anatomy
from petiole.errors import TrainingError
from petiole.method import HiddenDelta, Method, Place
from petiole.training import Events, parameter_groups
from training.toys import Idle, Shift, arguments, bert, rows


class Cut(HiddenDelta):
    """Its change is cut off from the graph."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.zeros(size))

    def forward(self, h: Tensor) -> Tensor:
        return self.b.detach().expand_as(h)


class CutOne(Method):
    """A shift at every ffn, but that of the second block is cut."""

    slug: ClassVar[str] = ""

    def deltas(self, anatomy: Anatomy) -> Iterator[Place]:
        for site in anatomy.sites(("ffn",)):
            yield Place(site, Cut(site.size) if site.depth else Shift(site.size))


def skipping(model: nn.Module) -> None:
    """The second block is never called."""
    model.bert.encoder.layer[1].forward = lambda hidden, *a, **k: hidden  # type: ignore[union-attr,index,operator]


def trainer(folder: Path, model: nn.Module, **changes: Any) -> pt.Trainer:
    settings = arguments(folder, **{"max_steps": 2, "save_strategy": "no", **changes})
    return pt.Trainer(model=model, args=settings, train_dataset=rows())


@pytest.mark.parametrize("way", ["check", "train"])
def test_a_site_that_is_not_called_is_named(way: str, tmp_path: Path) -> None:
    model = bert()
    tuned = pt.attach(model, pt.LoRA(rank=2))
    skipping(model)
    with pytest.raises(TrainingError, match=r"not called.*encoder\.1\.q, encoder\.1\.v;") as error:
        tuned.check(tiny.batch("bert")) if way == "check" else trainer(tmp_path, model).train()
    assert "encoder.0" not in str(error.value)


@pytest.mark.parametrize("way", ["check", "train"])
def test_a_delta_without_a_gradient_is_named(way: str, tmp_path: Path) -> None:
    model = bert()
    tuned = pt.attach(model, CutOne())
    with pytest.raises(TrainingError, match=r"without a gradient: encoder\.1\.ffn;"):
        tuned.check(tiny.batch("bert")) if way == "check" else trainer(tmp_path, model).train()


def test_a_method_that_lets_deltas_idle_may(tmp_path: Path) -> None:
    model = bert()
    pt.attach(model, Idle())
    with pt.given(model, chosen=False):
        trainer(tmp_path, model).train()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["bert", "vit", "llama", "t5"])
def test_gradient_checkpointing_cuts_nothing(family: str, reentrant: bool) -> None:
    """Re-entrant checkpointing at a block whose input needs no gradient gives its inside none: so did an image's embedding."""
    batch = tiny.batch(family)
    gradients = []
    for checkpoints in (False, True):
        model = tiny.model(family)
        tuned = pt.attach(model, pt.LoRA(rank=2, roles=("q",)))
        if checkpoints:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        tuned.check(batch)
        model.train()(**batch).loss.backward()
        gradients.append([p.grad.clone() for p in tuned.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_trainer_proves_it_under_gradient_checkpointing(reentrant: bool, tmp_path: Path) -> None:
    model = tiny.model("vit")
    pt.attach(model, pt.LoRA(rank=2))
    data = [{k: v[0] for k, v in tiny.batch("vit").items()}] * 8
    settings = arguments(
        tmp_path,
        max_steps=1,
        save_strategy="no",
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    run = pt.Trainer(model=model, args=settings, train_dataset=data)
    run.train()
    assert run.events.proofs == []


def test_a_compiled_model_shows_by_its_gradients_that_sites_were_called() -> None:
    model = bert()
    tuned = pt.attach(model, pt.LoRA(rank=2))
    for slot in tuned.slots:
        slot.fire = lambda: None  # type: ignore[method-assign]  # as inside compiled code
    tuned.check(tiny.batch("bert"))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, events: Events) -> None:
    events.before_step()
    model(**tiny.batch("bert")).loss.backward()
    events.before_optimizer_step()
    optimizer.step()
    events.after_optimizer_step()
    optimizer.zero_grad()


def test_an_optimiser_that_does_not_hold_a_delta_is_refused_before_the_first_step() -> None:
    model = bert()
    tuned = pt.attach(model, pt.LoRA(rank=2))
    with pytest.raises(TrainingError, match=r"no group of the optimiser: default/0\.encoder\.0\.q\.output:A"):
        Events(model, torch.optim.AdamW(list(tuned.parameters())[1:]))


def test_a_step_too_small_to_move_anything_is_an_error_at_the_peak_and_not_in_a_warm_up() -> None:
    model = bert()
    tuned = pt.attach(model, pt.IA3())
    tuned.slots[0].delta.to(torch.bfloat16)
    optimizer = torch.optim.Adam(tuned.parameters(), lr=1e-9)
    with pytest.raises(TrainingError, match=r"did not move: encoder\.0\.k.*bfloat16"):
        step(model, optimizer, Events(model, optimizer))
    optimizer.zero_grad()
    optimizer.param_groups[0]["initial_lr"] = 0.1
    events = Events(model, optimizer)
    step(model, optimizer, events)
    optimizer.param_groups[0]["lr"] = 0.1
    step(model, optimizer, events)
    assert events.proofs == []


def test_a_warm_up_from_zero_waits_for_its_first_real_step(tmp_path: Path) -> None:
    model = bert()
    pt.attach(model, pt.LoRA(rank=2))
    run = trainer(tmp_path, model, warmup_steps=2, max_steps=3)
    run.train()
    assert run.events.proofs == []


def test_check_leaves_no_trace() -> None:
    model = bert(hidden_dropout_prob=0.1).eval()
    tuned = pt.attach(model, pt.LoRA(rank=2))
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    tuned.check(tiny.batch("bert"))
    assert torch.equal(state, torch.get_rng_state()) and not model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and not any(slot.fired for slot in tuned.slots)


def test_check_of_what_does_not_act_says_so() -> None:
    model = bert()
    first = pt.attach(model, pt.LoRA(rank=2), name="first")
    pt.attach(model, pt.LoRA(rank=2), name="second")
    with pytest.raises(TrainingError, match="'first' does not act now"):
        first.check(tiny.batch("bert"))


def test_only_what_acts_trains_and_the_rest_is_as_before(tmp_path: Path) -> None:
    model = bert()
    first = pt.attach(model, pt.LoRA(rank=2), name="first")
    second = pt.attach(model, pt.LoRA(rank=2), name="second")
    before = {k: v.clone() for k, v in first.named_tensors().items()}
    run = trainer(tmp_path, model, weight_decay=0.5, save_strategy="steps")
    run.train()
    held = {id(p) for g in run.optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in second.parameters()}
    assert all(torch.equal(v, before[k]) for k, v in first.named_tensors().items())
    assert all(p.requires_grad for p in first.parameters())
    assert {p.name for p in (tmp_path / "checkpoint-2").glob("*.safetensors")} == {
        "first.petiole.safetensors",
        "second.petiole.safetensors",
    }


def test_what_trains_outside_of_every_adaptation_is_an_error(tmp_path: Path) -> None:
    """It would train and be in no file."""
    model = bert()
    pt.attach(model, pt.LoRA(rank=2), train_head=False)
    model.classifier.requires_grad_(True)
    with pytest.raises(TrainingError, match=r"belongs to no adaptation.*classifier\.weight"):
        trainer(tmp_path, model).train()


def test_evaluation_and_prediction_prove_nothing_and_break_no_proof(tmp_path: Path) -> None:
    model = bert()
    tuned = pt.attach(model, pt.LoRA(rank=2))
    run = pt.Trainer(
        model=model,
        args=arguments(
            tmp_path, max_steps=2, save_strategy="no", eval_strategy="steps", eval_steps=1, eval_on_start=True
        ),
        train_dataset=rows(),
        eval_dataset=rows(4),
    )
    skipped = tuned.slots[0].delta
    with torch.no_grad():
        run.evaluate(), run.predict(rows(4))
    assert skipped.training is False
    run.train()
    assert run.events.proofs == [] and len([entry for entry in run.state.log_history if "eval_loss" in entry]) == 3


def test_the_heads_copy_trains_and_the_models_own_does_not(tmp_path: Path) -> None:
    model = bert()
    own = model.classifier.weight.clone()
    tuned = pt.attach(model, pt.LinearProbe())
    run = trainer(tmp_path, model)
    run.train()
    copy = tuned.slots[0].delta.module.weight
    assert torch.equal(model.classifier.weight, own) and not torch.equal(copy, own)
    assert [len(g["params"]) for g in run.optimizer.param_groups] == [1, 1]


def test_parameter_groups_are_split_by_decay_and_nothing_is_left_out() -> None:
    model = bert()
    tuned = pt.attach(model, pt.IA3())
    found = parameter_groups(model, learning_rate=1e-3, weight_decay=0.5)
    assert {id(p) for g in found for p in g["params"]} == {id(p) for p in tuned.parameters()}
    vectors = next(g for g in found if g["weight_decay"] == 0)
    assert all(p.ndim == 1 for p in vectors["params"])  # gains at 1 would decay to 0


def test_what_acts_frozen_below_need_not_move(tmp_path: Path) -> None:
    model = bert()
    below = pt.attach(model, pt.PfeifferAdapter(bottleneck=2, init="bert"), name="below", train_head=False)
    above = pt.attach(model, pt.LoRA(rank=2), name="above")
    below.freeze()
    assert below.trainable == 0
    pt.activate(model, "below", "above")
    before = [p.detach().clone() for _, p in below.named_parameters()]
    start = [p.detach().clone() for p in above.parameters()]
    trainer(tmp_path, model).train()
    assert all(torch.equal(p, old) for (_, p), old in zip(below.named_parameters(), before, strict=True))
    assert not all(torch.equal(p, old) for p, old in zip(above.parameters(), start, strict=True))
    above.detach()
    with pytest.raises(TrainingError, match="nothing trains"):
        Events(model)
