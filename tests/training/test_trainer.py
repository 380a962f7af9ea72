"""`pt.Trainer`: accumulation, loss terms, what is not finite, early stopping and best checkpoint, precision; and the HF Trainer beside it."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers import Trainer as HFTrainer

import petiole as pt
import tiny
from petiole import files
from petiole.anatomy import Anatomy
from petiole.errors import AttachError, FileError, TrainingError
from petiole.method import HiddenDelta, Method, Place
from petiole.training import Events, PetioleCallback, parameter_groups
from training.toys import Growing, Pull, arguments, bert, rows

SGD = {
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "learning_rate": 0.05,
    "save_strategy": "no",
}


def tokens(count: int) -> list[dict[str, Tensor]]:
    """Rows for a language model, whose labels count differently in each."""
    made = rows(count)
    for i, row in enumerate(made):
        labels = row["input_ids"].clone()
        labels[: i % 6] = -100
        row["labels"] = labels
    return made


def images(count: int) -> list[dict[str, Tensor]]:
    picture = tiny.batch("vit")["pixel_values"][0]
    return [{"pixel_values": picture * (i + 1) / count, "labels": torch.tensor(i % 3)} for i in range(count)]


def result(
    folder: Path, method: Any, cls: type[HFTrainer] = pt.Trainer, family: str = "bert", **changes: Any
) -> Tensor:
    """Every trained number after a run; `accepts` says whether the model takes the number of items, `data` gives the rows."""
    accepts, data = changes.pop("accepts", True), changes.pop("data", None)
    extra = {key: changes.pop(key) for key in ("compute_loss_func",) if key in changes}
    model = tiny.model(family)
    tuned = pt.attach(model, method)
    settings = arguments(folder, **{**SGD, **changes})
    if cls is HFTrainer:
        extra["callbacks"] = [PetioleCallback(batches=[])]
    run = cls(model=model, args=settings, train_dataset=data or rows(20), **extra)
    run.model_accepts_loss_kwargs = accepts
    run.train()
    return torch.cat([p.detach().flatten() for p in tuned.parameters()])


def cross_entropy(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


PATHS: dict[str, dict[str, Any]] = {
    "items": {},
    "means": {"accepts": False, "data": rows(24)},  # a mean of means is the mean only over equal parts
    "label-smoothing": {"label_smoothing_factor": 0.1},
    "loss-function": {"compute_loss_func": cross_entropy},
    "causal": {"family": "llama", "data": tokens(20)},
}


@pytest.mark.parametrize("path", PATHS)
def test_accumulation_changes_nothing_loss_terms_included(path: str, tmp_path: Path) -> None:
    """Twenty rows in steps of eight: the last step of an epoch has fewer micro-batches than the others.

    "items" is a model that takes the number of items and ignores it: there the HF Trainer's steps are four times as long.
    """
    methods = [pt.LoRA(rank=2), Pull(weight=0.05)]
    whole = result(tmp_path, methods, per_device_train_batch_size=8, max_steps=4, **PATHS[path])
    parts = result(
        tmp_path, methods, per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=4, **PATHS[path]
    )
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)
    without = result(
        tmp_path, [pt.LoRA(rank=2), Pull(weight=0.0)], per_device_train_batch_size=8, max_steps=4, **PATHS[path]
    )
    assert (whole - without).abs().max() > 0.01  # the term does something


@pytest.mark.parametrize(("path", "accumulation"), [("items", 1), ("means", 4), ("causal", 4)])
def test_the_hf_trainer_with_the_callback_gives_the_same_numbers(path: str, accumulation: int, tmp_path: Path) -> None:
    changes = {
        "per_device_train_batch_size": 8 // accumulation,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 4,
    }
    methods = [pt.LoRA(rank=2), Pull(weight=0.05)]
    ours = result(tmp_path, methods, **changes, **PATHS[path])
    theirs = result(tmp_path, methods, HFTrainer, **changes, **PATHS[path])
    assert torch.equal(ours, theirs) if accumulation == 1 else torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_plain_loop_gives_the_same_numbers(tmp_path: Path) -> None:
    data = rows(8)
    methods = [pt.LoRA(rank=2), Pull(weight=0.05)]
    theirs = result(tmp_path, methods, per_device_train_batch_size=8, max_steps=3, data=data)
    model = bert()
    tuned = pt.attach(model, methods)
    optimizer = torch.optim.SGD(parameter_groups(model, learning_rate=0.05))
    events = Events(model, optimizer, total_steps=3)
    events.begin([])
    batch = {key: torch.stack([row[key] for row in data]) for key in data[0]}
    model.train()
    for _ in range(3):
        events.before_step()
        loss = model(**batch).loss
        loss.backward()
        events.before_optimizer_step(loss)
        optimizer.step()
        events.after_optimizer_step()
        optimizer.zero_grad()
    mine = torch.cat([p.detach().flatten() for p in tuned.parameters()])
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)  # the trainer shuffles the rows of its one batch


def test_a_loss_of_ones_own_must_take_the_terms_along(tmp_path: Path) -> None:
    model = bert()
    pt.attach(model, Pull())
    events = Events(model)
    events.begin([])
    batch = tiny.batch("bert")
    labels = batch.pop("labels")
    model.train()
    events.before_step()
    loss = nn.functional.cross_entropy(model(**batch).logits, labels)
    with pytest.raises(TrainingError, match=r"lacks the extra terms of toy-pull(?s:.*)events\.extra_loss"):
        events.before_optimizer_step(loss)
    extra = events.extra_loss()
    assert extra.item() == pytest.approx(0.5 * 2 * 32)
    (loss + extra).backward()
    events.before_optimizer_step(loss + extra)
    with pytest.raises(TrainingError, match="lacks the extra terms"):
        result(tmp_path, Pull(), HFTrainer, compute_loss_func=cross_entropy)


def test_terms_are_added_beside_compiled_code(tmp_path: Path) -> None:
    """Compiled code runs no hook that could add them: the trainer sees that they are owed."""
    changes = {"family": "vit", "data": images(8), "gradient_accumulation_steps": 2, "max_steps": 2}
    methods = [pt.LoRA(rank=2), Pull(weight=0.05)]
    plain = result(tmp_path, methods, **changes)
    compiled = result(tmp_path, methods, **changes, torch_compile=True, torch_compile_backend="eager")
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-6)


def test_one_callback_is_enough(tmp_path: Path) -> None:
    model = bert()
    pt.attach(model, pt.LoRA(rank=2))
    run = pt.Trainer(model=model, args=arguments(tmp_path), train_dataset=rows(), callbacks=[PetioleCallback()])
    assert sum(isinstance(c, PetioleCallback) for c in run.callback_handler.callbacks) == 1


def test_events_come_in_order_with_the_run_in_view(tmp_path: Path) -> None:
    seen: list[tuple[Any, ...]] = []

    class Watch(Pull):
        slug: ClassVar[str] = ""

        def note(self, moment: Any, event: str) -> None:
            seen.append(
                (event, moment.step, round(moment.progress, 2), moment.optimizer is not None, moment.total_steps)
            )

    result(tmp_path, Watch(), max_steps=2, per_device_train_batch_size=10, gradient_accumulation_steps=1)
    names = [entry[0] for entry in seen]
    step = ["before", "gradients", "moved"]
    assert names == ["calibrate on 2", *step, *step, "epoch"]
    assert seen[3] == ("moved", 1, 0.5, True, 2) and seen[-1] == ("epoch", 2, 1.0, True, 2)


# ------------------------------------------------------------------------------------------------------------- what is not finite


class Blow(HiddenDelta):
    """Overflows on the rows whose first token is 7."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.zeros(size))

    def forward(self, h: Tensor) -> Tensor:
        bad = self.given("bad", torch.zeros(h.shape[0], dtype=torch.bool))
        return torch.where(bad[:, None, None], torch.inf, 0.0) + self.b.expand_as(h)


class Blows(Method):
    slug: ClassVar[str] = ""

    def deltas(self, anatomy: Anatomy) -> Any:
        for site in anatomy.sites(("ffn",), (1,)):
            yield Place(site, Blow(site.size))


def run_of(folder: Path, model: nn.Module, data: Any = None, **changes: Any) -> pt.Trainer:
    return pt.Trainer(model=model, args=arguments(folder, **{**SGD, **changes}), train_dataset=data or rows())


def test_the_first_loss_that_is_not_finite_stops_the_run_and_names_step_site_and_rows(tmp_path: Path) -> None:
    model = bert()
    pt.attach(model, Blows())
    run = run_of(tmp_path, model)
    with pt.given(model, bad=torch.tensor([False, True, False, True])), pytest.raises(TrainingError) as error:
        run.train()
    said = str(error.value)
    assert said.startswith(
        "step 1: the loss is nan; not finite first after default's delta at encoder.1.ffn (Blow), in rows 1, 3"
    )
    assert said.count("\n") == 1


def test_an_input_that_is_not_finite_is_named(tmp_path: Path) -> None:
    model = tiny.model("vit")
    pt.attach(model, pt.LoRA(rank=2))
    data = images(8)
    data[5]["pixel_values"][0, 0, 0] = torch.nan
    with pytest.raises(
        TrainingError, match=r"step [12]: the loss is nan; the input 'pixel_values' is not finite in row \d\n"
    ):
        run_of(tmp_path, model, data).train()


@pytest.mark.parametrize("cls", [pt.Trainer, HFTrainer])
def test_a_weight_that_is_not_finite_is_named(cls: type[HFTrainer], tmp_path: Path) -> None:
    class Spoil(Growing):
        slug: ClassVar[str] = ""

        def after_optimizer_step(self, moment: Any) -> None:
            if moment.step == 2:
                moment.deltas["encoder.1.v.output"].B[0].data[3] = torch.nan

    with pytest.raises(TrainingError, match=r"step 2: not finite any more: default/0\.encoder\.1\.v\.output:B\.0\n"):
        result(tmp_path, Spoil(), cls)


@pytest.mark.parametrize("cls", [pt.Trainer, HFTrainer])
def test_the_log_filter_hides_nothing(cls: type[HFTrainer], tmp_path: Path) -> None:
    """The HF Trainer replaces such a loss in its log by an average, and trains on."""
    model = bert()
    pt.attach(model, Blows())
    extra = {"callbacks": [PetioleCallback()]} if cls is HFTrainer else {}
    run = cls(model=model, args=arguments(tmp_path, **SGD, logging_nan_inf_filter=True), train_dataset=rows(), **extra)
    before = model.classifier.weight.clone()
    with (
        pt.given(model, bad=torch.ones(4, dtype=torch.bool)),
        pytest.raises(TrainingError, match="step 1: the loss is nan"),
    ):
        run.train()
    assert torch.equal(model.classifier.weight, before)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())  # stopped before the step


def test_one_look_per_step_for_weights_and_one_per_batch_for_the_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look waits for the device: their number must not grow with that of the parameters."""
    looks = 0
    original = Tensor.__bool__

    def look(self: Tensor) -> bool:
        nonlocal looks
        looks += 1
        return original(self)

    model = bert(num_hidden_layers=6)
    pt.attach(model, pt.LoRA(rank=2, roles=("q", "k", "v", "o")))
    run = run_of(tmp_path, model)
    counts: list[int] = []

    class Count(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            counts.append(looks)

    run.add_callback(Count)
    monkeypatch.setattr(Tensor, "__bool__", look)
    run.train()
    monkeypatch.undo()
    per_step = {after - before for before, after in itertools.pairwise(counts[1:])}
    assert max(per_step) <= 3


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("accepts", [True, False])
def test_an_empty_loss_is_an_error(family: str, accepts: bool, tmp_path: Path) -> None:
    data = [
        {**row, "labels": torch.full_like(row["labels"], -100)} for row in (tokens(8) if family == "llama" else rows(8))
    ]
    with pytest.raises(TrainingError, match=r"step 1: every label of this batch is masked"):
        result(tmp_path, pt.LoRA(rank=2), family=family, data=data, accepts=accepts)


def test_a_part_without_labels_counts_for_nothing_where_the_step_has_some(tmp_path: Path) -> None:
    data = tokens(8)
    for row in data[:4]:
        row["labels"] = torch.full_like(row["labels"], -100)
    ones = result(
        tmp_path, [pt.LoRA(rank=2), Pull(weight=0.05)], family="llama", data=data, max_steps=2,
        per_device_train_batch_size=1, gradient_accumulation_steps=8,
    )  # fmt: skip
    whole = result(
        tmp_path,
        [pt.LoRA(rank=2), Pull(weight=0.05)],
        family="llama",
        data=data,
        max_steps=2,
        per_device_train_batch_size=8,
    )
    torch.testing.assert_close(ones, whole, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------- what the HF Trainer gives


def better_until_four(run: pt.Trainer) -> None:
    def evaluate(*args: Any, **kwargs: Any) -> Mapping[str, float]:
        metrics = {"eval_loss": abs(run.state.global_step - 4) + 1.0}
        run.control = run.callback_handler.on_evaluate(run.args, run.state, run.control, metrics)
        return metrics

    run.evaluate = evaluate  # type: ignore[method-assign,assignment]


def test_early_stopping_and_the_best_checkpoint_bring_the_right_bytes_back(tmp_path: Path) -> None:
    model = bert()
    tuned = pt.attach(model, Growing(most=5))
    settings = arguments(
        tmp_path, max_steps=20, eval_strategy="steps", eval_steps=2, save_total_limit=1, load_best_model_at_end=True,
        metric_for_best_model="loss", greater_is_better=False,
    )  # fmt: skip
    run = pt.Trainer(
        model=model, args=settings, train_dataset=rows(), eval_dataset=rows(4), callbacks=[EarlyStoppingCallback(2)]
    )
    better_until_four(run)
    kept: dict[str, Tensor] = {}

    class Keep(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                kept.update({k: v.clone() for k, v in tuned.named_tensors(folded=False).items()})

    run.add_callback(Keep)
    run.train()
    assert run.state.global_step == 8  # two evaluations without a better one
    now = tuned.named_tensors(folded=False)
    assert set(now) == set(kept) and all(
        torch.equal(now[key], kept[key]) for key in kept
    )  # fewer blocks than at the end
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    assert tuned.state[0]["blocks"] == 3


def test_a_damaged_best_checkpoint_is_refused(tmp_path: Path) -> None:
    def make() -> pt.Trainer:
        model = bert()
        pt.attach(model, pt.LoRA(rank=2))
        settings = arguments(
            tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, metric_for_best_model="loss"
        )
        run = pt.Trainer(model=model, args=settings, train_dataset=rows(), eval_dataset=rows(4))
        better_until_four(run)
        return run

    run = make()
    run.train()
    with (tmp_path / "checkpoint-4" / "default.petiole.safetensors").open("r+b") as file:
        file.write(b"x")
    with pytest.raises(FileError, match=r"checkpoint-4, the best checkpoint, is not whole"):
        run._load_best_model()
    with pytest.raises(FileError, match=r"checkpoint-4, the best checkpoint until now, is not whole"):
        make().train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))  # not after hours of training


@pytest.mark.parametrize(
    "changes", [{"bf16": True}, {"bf16": True, "activation_checkpointing": True}], ids=["bf16", "bf16-ckpt"]
)
def test_half_precision_on_the_cpu(changes: dict[str, Any], tmp_path: Path) -> None:
    half = result(tmp_path, [pt.LoRA(rank=2), Pull(weight=0.05)], **changes)
    full = result(tmp_path, [pt.LoRA(rank=2), Pull(weight=0.05)])
    assert half.dtype == torch.float32 and (half - full).abs().max() < 0.03 and not torch.equal(half, full)


def test_columns_and_labels_are_found_as_for_the_bare_model(tmp_path: Path) -> None:
    model = bert()
    bare = HFTrainer(model=bert(), args=arguments(tmp_path), train_dataset=rows())
    pt.attach(model, pt.LoRA(rank=2))
    run = pt.Trainer(model=model, args=arguments(tmp_path), train_dataset=rows())
    for each in (bare, run):
        each._set_signature_columns_if_needed()
    assert run._signature_columns == bare._signature_columns and run.label_names == bare.label_names == ["labels"]
    assert (
        run.model_accepts_loss_kwargs == bare.model_accepts_loss_kwargs and run.can_return_loss == bare.can_return_loss
    )


def test_save_model_writes_one_file_for_each_adaptation(tmp_path: Path) -> None:
    model = bert()
    pt.attach(model, pt.LoRA(rank=2))
    run = pt.Trainer(model=model, args=arguments(tmp_path / "run"), train_dataset=rows())
    run.save_model(str(tmp_path / "out"))
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"default.petiole.safetensors", "default.petiole.json"}
    assert (
        pt.load(bert(), tmp_path / "out" / "default.petiole.safetensors").trainable
        == run.adaptations["default"].trainable
    )


def test_training_twice_goes_on(tmp_path: Path) -> None:
    model = bert()
    tuned = pt.attach(model, Growing(most=2))
    run = pt.Trainer(model=model, args=arguments(tmp_path, save_strategy="no", max_steps=3), train_dataset=rows())
    run.train()
    first = tuned.named_tensors(folded=False)["0.encoder.0.q.output:A.0"].clone()
    run.train()
    assert len(tuned.slots[0].delta.A) == 2 and not torch.equal(first, tuned.slots[0].delta.A[0])


def test_model_init_attaches_itself(tmp_path: Path) -> None:
    def make() -> nn.Module:
        model = bert()
        pt.attach(model, pt.LoRA(rank=2))
        return model

    run = pt.Trainer(model_init=make, args=arguments(tmp_path, max_steps=2), train_dataset=rows())
    run.train()
    assert not files.verify_manifest(tmp_path / "checkpoint-2")


def test_what_can_not_work_is_refused_before_it_starts(tmp_path: Path) -> None:
    with pytest.raises(AttachError, match="nothing is attached"):
        pt.Trainer(model=bert(), args=arguments(tmp_path), train_dataset=rows())
    model = bert()
    pt.attach(model, pt.LoRA(rank=2))
    settings = arguments(tmp_path)
    settings._n_gpu = 2
    with pytest.raises(TrainingError, match="accelerate launch"):
        pt.Trainer(model=model, args=settings, train_dataset=rows())


def test_a_method_that_calibrates_needs_batches(tmp_path: Path) -> None:
    model = bert()
    pt.attach(model, Pull())
    run = HFTrainer(model=model, args=arguments(tmp_path), train_dataset=rows(), callbacks=[PetioleCallback()])
    with pytest.raises(TrainingError, match="calibrates on data"):
        run.train()


def test_methods_see_held_out_data_without_a_random_number_moved(tmp_path: Path) -> None:
    """The evaluation set of a Trainer, in rounds; its loss is the Trainer's own. In a plain loop what `begin` is given."""
    seen: list[tuple[list[int], float]] = []

    class Looks(Pull):
        slug: ClassVar[str] = ""

        def before_step(self, moment: Any) -> None:
            state, held_out = torch.get_rng_state(), moment.training.held_out
            batch = held_out.next()
            with torch.no_grad():
                seen.append((batch["labels"].tolist(), float(held_out.loss(moment.model, batch))))
            assert torch.equal(torch.get_rng_state(), state)

    model, data = bert(), rows()
    pt.attach(model, Looks())
    settings = arguments(tmp_path, max_steps=4, per_device_eval_batch_size=2)
    pt.Trainer(
        model=model,
        args=settings,
        train_dataset=data,
        eval_dataset=data[:6],
        compute_loss_func=lambda outputs, labels, num_items_in_batch=None: (
            7 + outputs.logits.sum() - outputs.logits.sum().detach()
        ),
    ).train()
    labels = [int(row["labels"]) for row in data[:6]]
    assert seen == [(labels[i : i + 2], 7.0) for i in (0, 2, 4, 0)]

    events = Events(model, torch.optim.SGD(parameter_groups(model, learning_rate=0.1)))
    events.begin([], held_out=iter([{"labels": 1}]))
    assert events.held_out is not None and events.held_out.next() == {"labels": 1}
    with pytest.raises(TrainingError, match="gone through only once"):
        events.held_out.next()


def test_calibration_moves_no_random_number(tmp_path: Path) -> None:
    class Quiet(Pull):
        slug: ClassVar[str] = ""

        def calibrate(self, moment: Any, batches: Any) -> None:
            for batch in batches:
                torch.rand(len(batch["labels"]))

    class Silent(Pull):
        slug: ClassVar[str] = ""

        def calibrate(self, moment: Any, batches: Any) -> None:
            pass

    found = []
    for method in (Quiet(weight=0.01), Silent(weight=0.01)):
        model = bert(hidden_dropout_prob=0.1)
        tuned = pt.attach(model, method)
        with warnings.catch_warnings():
            pt.Trainer(model=model, args=arguments(tmp_path, save_strategy="no"), train_dataset=rows()).train()
        found.append(torch.cat([p.detach().flatten() for p in tuned.parameters()]))
    assert torch.equal(*found)
