"""What sparse masks, language and task adapters and their compositions must hold, by the paper."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

import petiole as pt
import tiny
import toys
from petiole.errors import AttachError, ConfigError, FileError, PetioleError
from petiole.files import load_adaptation
from petiole.methods.adapters.madx import NICE, Inverse, Stacked
from petiole.methods.sparse.entries import Entries, SparseChange
from petiole.methods.sparse.ltsft import next_phase, tensors_of
from petiole.methods.sparse.selection import from_steps, largest, to_steps
from petiole.tasks.retrieval import PointwiseLoss, compose, language_module, ranking_module, rerank, size_of, under
from petiole.tasks.toy_languages import ToyLanguages
from petiole.training import Events, parameter_groups

TOY = ToyLanguages(concepts=24, topics=4)
SIZES: dict[str, Any] = {
    "vocab_size": TOY.vocabulary, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0,
}  # fmt: skip
MASK = pt.LTSFT(k=50, maskable=("embeddings", "weights", "biases"))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def reader() -> BertForMaskedLM:
    """A model that learns languages."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertForMaskedLM(BertConfig(**SIZES)).eval()


def ranker(base: BertForMaskedLM | None = None) -> BertForSequenceClassification:
    """A cross-encoder on the same backbone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = BertForSequenceClassification(BertConfig(num_labels=1, **SIZES)).eval()
    model.bert.load_state_dict((base or reader()).bert.state_dict(), strict=False)
    return model


def pairs(queries: int = 2, documents: int = 3) -> dict[str, Tensor]:
    found = TOY.ranking(queries, documents, generator(), "a", "b")
    return {"input_ids": found.input_ids.flatten(0, 1), "token_type_ids": found.token_type_ids.flatten(0, 1)}


def scores(model: nn.Module, batch: dict[str, Tensor] | None = None) -> Tensor:
    with torch.no_grad():
        return model(**(batch or pairs())).logits[:, 0]


def train(model: nn.Module, tuned: pt.Adaptation, steps: int = 4, weight_decay: float = 0.0) -> Events:
    """A plain loop on pairs, or on sentences."""
    batch, loss = pairs(), None
    if isinstance(model, BertForMaskedLM):
        words = TOY.sentences(4, "b", generator())
        batch, loss = {"input_ids": words, "labels": words}, "own"
    labels = torch.tensor([1, 0, 0, 0, 1, 0])
    optimizer = torch.optim.AdamW(parameter_groups(model, learning_rate=1e-2), weight_decay=weight_decay)
    for group in optimizer.param_groups:
        group["weight_decay"] = weight_decay  # of everything, whatever a delta would want
    events = Events(model, optimizer, total_steps=steps)
    model.train()
    events.begin()
    for _ in range(steps):
        events.before_step()
        output = model(**batch)
        value = output.loss if loss else PointwiseLoss()(output.logits, labels)
        extra = None if loss else events.extra_loss()
        (value if extra is None else value + extra).backward()
        events.before_optimizer_step(value)
        optimizer.step()
        events.after_optimizer_step()
        optimizer.zero_grad()
    model.eval()
    return events


def with_adapters(names: tuple[str, ...] = ("en", "sw"), **fields: Any) -> BertForSequenceClassification:
    """Languages and, attached last or first of all, a ranking module; all large enough to matter."""
    model = ranker()
    for seed, name in enumerate(names):
        toys.shake(pt.attach(model, language_module(**fields), name=name, train_head=False), 0.2, seed)
    toys.shake(pt.attach(model, ranking_module(reduction_factor=4), name="rank"), 0.2, 9)
    return model


def fixed_mask(model: nn.Module, name: str, seed: int, head: bool = False, k: int = 50) -> pt.Adaptation:
    """A mask with random values, as if it had been trained."""
    method = MASK.model_copy(update={"k": k, "first_phase": None})
    tuned = pt.attach(model, method, name=name, train_head=head, seed=seed)
    toys.shake(tuned, 0.1, seed)
    next_phase(tuned)
    toys.shake(tuned, 0.3, seed)
    return tuned


def with_masks(names: tuple[str, ...] = ("en", "sw")) -> BertForSequenceClassification:
    model = ranker()
    for seed, name in enumerate(names):
        fixed_mask(model, name, seed)
    fixed_mask(model, "rank", 9, head=True)
    return model


def deltas(tuned: pt.Adaptation) -> list[Any]:
    return [slot.delta for slot in tuned.slots if slot.number >= 0]


def entries_of(tuned: pt.Adaptation) -> list[Entries]:
    return tensors_of(deltas(tuned))


def state(model: nn.Module) -> dict[str, bytes]:
    return {name: toys.bits(p) for name, p in model.named_parameters() if "petiole" not in name}


# ----------------------------------------------------------------------------------------------------------- counts of the paper


def multilingual(kind: type[nn.Module] = BertForSequenceClassification, **fields: Any) -> nn.Module:
    """Multilingual BERT (uncased), without values."""
    with torch.device("meta"):
        return kind(BertConfig(vocab_size=105_879, **fields))


@pytest.mark.parametrize(
    ("factor", "count"), [(1, 14_174_208), (2, 7_091_712), (4, 3_550_464), (8, 1_779_840), (16, 894_528)]
)
def test_adapters_have_the_size_of_the_paper(factor: int, count: int) -> None:
    assert pt.attach(multilingual(), ranking_module(reduction_factor=factor), train_head=False).trainable == count


def test_the_invertible_part_makes_a_language_the_size_of_its_mask() -> None:
    tuned = pt.attach(multilingual(BertForMaskedLM), language_module())
    parts = {type(delta): sum(p.numel() for p in delta.parameters()) for delta in deltas(tuned)}
    assert parts[NICE] == 296_064 and parts[Inverse] == 0
    assert tuned.trainable == 7_091_712 + 296_064 == 7_387_776
    mask = language_module("mask", k=size_of(multilingual(), language_module()))
    assert isinstance(mask, pt.LTSFT) and mask.k == 7_387_776


def test_a_mask_covers_embeddings_and_blocks_but_no_norm_or_output() -> None:
    model = multilingual(BertForMaskedLM)
    tuned = pt.attach(model, language_module("mask", k=7_387_776))
    own = {name: p.numel() for name, p in model.bert.named_parameters() if "petiole" not in name}
    norms = sum(count for name, count in own.items() if "LayerNorm" in name)
    assert tuned.trainable == sum(own.values()) - norms  # the tied table once


# ---------------------------------------------------------------------------------------------------------- the largest entries


def by_sorting(sizes: list[Tensor], k: int, taken: list[Tensor]) -> list[Tensor]:
    """A stable sort of all entries together."""
    gone = [set(index.tolist()) for index in taken]
    every = [(-abs(float(v)), t, i) for t, s in enumerate(sizes) for i, v in enumerate(s.flatten()) if i not in gone[t]]
    found = sorted(every)[:k]
    return [
        torch.tensor(sorted(i for _, t, i in found if t == tensor), dtype=torch.int64) for tensor in range(len(sizes))
    ]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("k", [1, 7, 40, 60])
def test_exactly_k_of_all_tensors_together_the_earlier_of_equal_ones(ties: bool, k: int) -> None:
    sizes = [
        torch.randn(4, 6, generator=generator()),
        torch.randn(31, generator=generator(1)),
        torch.randn(6, 3, generator=generator(2)),
    ]
    if ties:
        sizes = [(2 * size).round() for size in sizes]
    taken = [torch.tensor([0, 5]), torch.tensor([], dtype=torch.int64), torch.tensor([17])]
    found = largest(sizes, k, taken)
    assert sum(map(len, found)) == k
    for one, other in zip(found, by_sorting(sizes, k, taken), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("k", [0, -1, 25])
def test_more_than_there_are_is_refused(k: int) -> None:
    with pytest.raises(ConfigError, match="from 1 to 24"):
        largest([torch.ones(4, 6)], k)


def test_steps_count_along_the_first_dimension_in_64_bits() -> None:
    shape = (3, 2, 4)
    index = torch.tensor([0, 5, 9, 23])
    values = torch.arange(4.0)
    steps, ordered = to_steps(index, values, shape)
    weight = torch.zeros(shape).flatten().index_copy(0, index, values + 1).view(shape)
    flat = weight.permute(2, 1, 0).flatten()  # the first dimension fastest
    assert torch.equal(steps.cumsum(0), flat.nonzero().flatten()) and torch.equal(ordered + 1, flat[flat != 0])
    large = (70_000, 70_000)  # 4.9e9 entries
    far = torch.tensor([3, 69_999 * 70_000 + 5])
    again, _ = from_steps(*to_steps(far, values[:2], large), large)
    assert torch.equal(again, far)
    for wrong in (torch.tensor([0, 0]), torch.tensor([0, 24]), torch.tensor([-1, 5])):
        with pytest.raises(AttachError, match="a mask names entries"):
            from_steps(wrong, values[:2], shape)


# -------------------------------------------------------------------------------------------------------------- masks that train


def test_two_phases_end_with_k_entries_and_a_small_optimiser() -> None:
    model = ranker()
    start = state(model)
    tuned = pt.attach(model, MASK)
    full, head = tuned.trainable, model.classifier.weight.numel() + 1
    events = train(model, tuned, 4, weight_decay=0.1)
    assert tuned.trainable == 50 + head < full
    assert sum(each.parameter.numel() for each in entries_of(tuned)) == 50
    assert all((each.chosen()[1] != 0).all() for each in entries_of(tuned))
    held = events.optimizer.state.values()  # type: ignore[union-attr]
    assert sum(s["exp_avg"].numel() for s in held) == 50 + head
    assert state(model) == start


def test_what_is_outside_the_mask_stays_bit_for_bit_under_decay_and_momentum() -> None:
    model = ranker()
    tuned = pt.attach(model, MASK)
    train(model, tuned, 6, weight_decay=0.5)
    kept = {name: p.detach().clone() for name, p in model.named_parameters() if "petiole" not in name}
    checked = 0
    with compose_as_it_is(model, tuned):
        for slot in tuned.slots:
            for kind, each in slot.delta.entries() if isinstance(slot.delta, SparseChange) else ():
                name = f"{slot.site.path}.{slot.site.parameter if kind == 'weight' else slot.site.bias}"
                now, before = model.get_parameter(name).flatten(), kept[name].flatten()
                outside = torch.ones_like(now, dtype=torch.bool).index_fill(0, each.chosen()[0], False)
                assert toys.bits(now[outside]) == toys.bits(before[outside])
                checked += int((~outside).sum())
                assert bool((now[~outside] != before[~outside]).all())
    assert checked == 50


def compose_as_it_is(model: nn.Module, tuned: pt.Adaptation) -> Any:
    return compose(model, tuned.name)


def test_the_mask_is_where_full_training_moves_most() -> None:
    """One step of plain descent from the start: the entries of largest gradient."""
    model = ranker()
    tuned = pt.attach(model, MASK.model_copy(update={"first_phase": None}), train_head=False)
    optimizer = torch.optim.SGD(tuned.parameters(), lr=1.0)
    PointwiseLoss()(model(**pairs()).logits, torch.tensor([1, 0, 0, 0, 1, 0])).backward()
    own = ranker()
    PointwiseLoss()(own(**pairs()).logits, torch.tensor([1, 0, 0, 0, 1, 0])).backward()
    optimizer.step()
    names = [
        f"{slot.site.path}.{slot.site.parameter if kind == 'weight' else slot.site.bias}"
        for slot in tuned.slots
        for kind, _ in slot.delta.entries()
    ]
    next_phase(tuned)
    gradients = [own.get_parameter(name).grad for name in names]
    wanted = by_sorting(gradients, 50, [torch.tensor([], dtype=torch.int64)] * len(gradients))  # type: ignore[arg-type]
    for each, index in zip(entries_of(tuned), wanted, strict=True):
        assert torch.equal(each.chosen()[0], index)
        assert not each.chosen()[1].any()  # back at the start
    with pytest.raises(AttachError, match="last phase"):
        next_phase(tuned)


def test_iterations_add_their_share_and_go_back_to_where_they_began() -> None:
    model = ranker()
    tuned = pt.attach(model, MASK.model_copy(update={"iterations": 2, "k": 51, "first_phase": None}), train_head=False)
    toys.shake(tuned, 0.1)
    next_phase(tuned)
    assert tuned.trainable == 25
    toys.shake(tuned, 0.5, 2)
    first = [tuple(t.clone() for t in each.chosen()) for each in entries_of(tuned)]
    next_phase(tuned)
    assert all(torch.equal(each(), dense_of(each, *old)) for each, old in zip(entries_of(tuned), first, strict=True))
    toys.shake(tuned, 0.1, 3)
    next_phase(tuned)
    assert sum(each.chosen()[0].numel() for each in entries_of(tuned)) == 51
    for each, (index, values) in zip(entries_of(tuned), first, strict=True):
        assert torch.equal(each(), dense_of(each, index, values))  # the old ones where they were, the new ones at 0
        assert set(index.tolist()) <= set(each.chosen()[0].tolist())


def dense_of(each: Entries, index: Tensor, values: Tensor) -> Tensor:
    return torch.zeros(each.shape).flatten().index_copy(0, index, values).view(each.shape)


@pytest.mark.parametrize(("steps", "iterations", "first"), [(8, 1, 0.25), (8, 2, 0.5)])
def test_phases_come_at_their_share_of_the_run(steps: int, iterations: int, first: float) -> None:
    model = ranker()
    tuned = pt.attach(model, MASK.model_copy(update={"iterations": iterations, "first_phase": first}))
    forms = []
    event = pt.LTSFT.before_step

    class Watched(pt.LTSFT):
        def before_step(self, moment: Any) -> None:
            event(self, moment)
            forms.append(entries_of(tuned)[0].form)

    tuned.methods = (Watched(**tuned.methods[0].model_dump()),)
    train(model, tuned, steps)
    part = steps // iterations
    each = int(first * part)
    wanted = [("sparse" if i % part >= each else "dense" if i < part else "opened") for i in range(steps)]
    assert forms == wanted


def test_the_second_phase_may_have_a_warm_up_of_its_own() -> None:
    model = ranker()
    tuned = pt.attach(model, MASK.model_copy(update={"warmup_steps": 2}))
    optimizer = torch.optim.AdamW(parameter_groups(model, learning_rate=1.0))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 8)
    events = Events(model, optimizer, scheduler, total_steps=8)
    events.begin()
    rates = []
    for _ in range(8):
        events.before_step()
        rates.append([group["lr"] for group in optimizer.param_groups][-1])
        optimizer.step()  # nothing has a gradient
        events.step += 1
        scheduler.step()
    assert rates[4:] == pytest.approx([0.0, 0.5, 1.0, 0.5])
    assert tuned.state[0]["phase"] == 1


def test_the_pull_is_the_mean_distance_over_all_parameters() -> None:
    model = ranker()
    tuned = pt.attach(model, MASK.model_copy(update={"l1_weight": 0.1}))
    toys.shake(tuned, 0.1)
    every = sum(p.numel() for name, p in model.named_parameters() if "petiole" not in name)
    (term,) = tuned.loss_terms()
    distance = sum(float(each.parameter.detach().abs().sum()) for each in entries_of(tuned))
    assert float(term.detach()) == pytest.approx(0.1 * distance / every, rel=1e-5)
    next_phase(tuned)
    toys.shake(tuned, 0.1)
    (term,) = tuned.loss_terms()
    distance = sum(float(each.parameter.detach().abs().sum()) for each in entries_of(tuned))
    assert float(term.detach()) == pytest.approx(0.1 * distance / every, rel=1e-5)


def test_the_pull_acts_once_in_a_step_that_accumulates(tmp_path: Path) -> None:
    """Two halves of a batch give the gradient of the whole, the pull included."""
    from transformers import TrainingArguments

    found = []
    words = TOY.sentences(4, "b", generator())
    rows = [{"input_ids": row, "labels": row} for row in words]
    for size, steps in ((4, 1), (2, 2)):
        model = reader()
        tuned = pt.attach(model, MASK.model_copy(update={"l1_weight": 1000.0}))
        toys.shake(tuned, 0.1)
        options = {
            "max_steps": 1,
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": steps,
            "learning_rate": 1.0,
            "optim": "sgd",
        }
        args = TrainingArguments(
            str(tmp_path), report_to=[], use_cpu=True, save_strategy="no", max_grad_norm=0.0, weight_decay=0.0,
            lr_scheduler_type="constant", disable_tqdm=True, logging_strategy="no", **options,
        )  # fmt: skip
        pt.Trainer(model=model, args=args, train_dataset=rows).train()
        found.append([each.parameter.detach() for each in entries_of(tuned)])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_a_tied_table_is_masked_once_and_changes_on_both_ends() -> None:
    model = reader()
    others = sum(p.numel() for n, p in model.bert.embeddings.named_parameters() if "LayerNorm" not in n)
    tuned = pt.attach(model, MASK.model_copy(update={"maskable": ("embeddings",), "first_phase": None}))
    table = next(each for each in entries_of(tuned) if each.shape == (TOY.vocabulary, 32))
    assert tuned.trainable == others
    toys.shake(tuned, 0.3)
    words = TOY.sentences(2, "b", generator())
    own = reader()
    with torch.no_grad():
        for name in ("word", "position", "token_type"):
            weight = own.bert.embeddings.get_parameter(f"{name}_embeddings.weight")
            weight.add_(next(each for each in entries_of(tuned) if each.shape == weight.shape)())
    torch.testing.assert_close(model(input_ids=words).logits, own(input_ids=words).logits, rtol=1e-5, atol=1e-5)
    model(input_ids=words, labels=words).loss.backward()
    own(input_ids=words, labels=words).loss.backward()
    torch.testing.assert_close(
        table.parameter.grad, own.bert.embeddings.word_embeddings.weight.grad, rtol=1e-4, atol=1e-6
    )


# --------------------------------------------------------------------------------------------------------------------- its file


def test_a_file_holds_steps_values_and_the_head_and_gives_the_same_weights(tmp_path: Path) -> None:
    model = ranker()
    tuned = pt.attach(model, MASK)
    train(model, tuned)
    with torch.no_grad():  # which training left where they were
        some = max(entries_of(tuned), key=lambda each: each.parameter.numel())
        some.parameter[0] = 1e-8
    path = tuned.save(tmp_path / "rank.petiole.safetensors")
    stored, _ = load_adaptation(path)
    own = {name: tensor for name, tensor in stored.items() if not name.startswith("-1.")}
    assert {name.rpartition(".")[2] for name in own} == {"steps", "values"}
    assert sum(t.numel() for name, t in own.items() if name.endswith("values")) == 49
    assert {t.dtype for name, t in own.items() if name.endswith("steps")} == {torch.int64}
    assert sorted(set(stored) - set(own)) == ["-1.head.output:module.bias", "-1.head.output:module.weight"]
    with torch.no_grad():
        some.parameter[0] = 0.0
    with compose(model, "default"):
        wanted = state(model)
    fresh = ranker()
    again = pt.load(fresh, path, name="rank")
    assert again.save(tmp_path / "again.petiole.safetensors").read_bytes() == path.read_bytes()
    with compose(fresh, "rank"):
        assert state(fresh) == wanted
    assert torch.equal(scores(fresh), scores(model))


def test_training_goes_on_from_a_checkpoint_of_any_phase(tmp_path: Path) -> None:
    method = MASK.model_copy(update={"iterations": 2, "first_phase": None})
    tuned = pt.attach(ranker(), method)
    for phase in range(4):
        if phase:
            next_phase(tuned)
        toys.shake(tuned, 0.1, phase)
        path = tuned.save(tmp_path / "x.petiole.safetensors", folded=False)
        other = pt.attach(ranker(), method)
        other.restore(path)
        assert {n: toys.bits(t) for n, t in other.named_tensors(False).items()} == {
            n: toys.bits(t) for n, t in tuned.named_tensors(False).items()
        }
        assert other.state == tuned.state and other.trainable == tuned.trainable
        assert torch.equal(scores(other.model), scores(tuned.model))


@pytest.mark.parametrize("at", [3, 5])  # a mask trains, more entries are looked for
def test_a_run_resumes_in_any_phase_to_the_same_bits(at: int, tmp_path: Path) -> None:
    from transformers import TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in TOY.sentences(8, "b", generator())]
    method = MASK.model_copy(update={"iterations": 2, "warmup_steps": 1})

    def run(folder: Path, resume: Path | None = None) -> pt.Adaptation:
        tuned = pt.attach(reader(), method)
        args = TrainingArguments(
            str(folder), report_to=[], use_cpu=True, save_steps=1, max_steps=8, per_device_train_batch_size=4, learning_rate=1e-2,
            weight_decay=0.1, disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        pt.Trainer(model=tuned.model, args=args, train_dataset=rows).train(resume_from_checkpoint=resume)
        return tuned

    whole = run(tmp_path / "whole")
    again = run(tmp_path / "again", tmp_path / "whole" / f"checkpoint-{at}")
    assert {n: toys.bits(t) for n, t in again.named_tensors(False).items()} == {
        n: toys.bits(t) for n, t in whole.named_tensors(False).items()
    }


@pytest.mark.parametrize("kind", ["adapter", "mask"])
def test_a_language_learned_by_guessing_words_serves_the_ranker(kind: str, tmp_path: Path) -> None:
    """Its file holds no output of the language model, and fits a model of another class on the same backbone."""
    model = reader()
    fields = {"k": 50, "first_phase": 0.5} if kind == "mask" else {}
    language = pt.attach(model, language_module(kind, **fields), name="sw")  # type: ignore[arg-type]
    train(model, language)
    path = language.save(tmp_path / "sw.petiole.safetensors")
    assert not any("head" in name for name in load_adaptation(path)[0])
    other = ranker()
    with pytest.raises(FileError, match="another backbone"):
        pt.load(other, path)
    loaded = pt.load(other, path, allow_other_backbone=True)
    words = TOY.sentences(2, "b", generator())
    torch.testing.assert_close(
        other.bert(input_ids=words).last_hidden_state,
        model.bert(input_ids=words).last_hidden_state,
        rtol=1e-5,
        atol=1e-6,
    )
    assert loaded.trainable == language.trainable


def test_a_mask_of_another_backbone_is_refused_whatever_is_allowed(tmp_path: Path) -> None:
    path = fixed_mask(reader(), "sw", 0).save(tmp_path / "sw.petiole.safetensors")
    other = ranker()
    with torch.no_grad():
        other.bert.encoder.layer[1].output.dense.weight[3, 4] += 1e-3
    with pytest.raises(FileError, match="built from another weight"):
        pt.load(other, path, allow_other_backbone=True)


def test_adapters_of_another_width_are_refused(tmp_path: Path) -> None:
    path = pt.attach(reader(), language_module()).save(tmp_path / "sw.petiole.safetensors")
    wide = BertForMaskedLM(BertConfig(**{**SIZES, "hidden_size": 48}))
    with pytest.raises(FileError, match="fits"):
        pt.load(wide, path, allow_other_backbone=True)


# ----------------------------------------------------------------------------------------------------------- adapters that stack


def test_the_invertible_adapter_can_be_undone_and_keeps_volumes() -> None:
    nice = NICE(16).double()
    for parameter in nice.parameters():
        nn.init.normal_(parameter, 0, 0.5, generator=generator(parameter.numel()))
    x = torch.randn(3, 16, dtype=torch.float64, generator=generator())
    torch.testing.assert_close(nice.inverse(x + nice(x)), x, rtol=1e-9, atol=1e-9)
    jacobian = torch.autograd.functional.jacobian(lambda e: e + nice(e), x[0])
    assert float(torch.det(jacobian)) == pytest.approx(1.0, abs=1e-9)
    single = NICE(64)
    for parameter in single.parameters():
        nn.init.normal_(parameter, 0, 0.2, generator=generator(parameter.numel()))
    e = torch.randn(5, 64, generator=generator())
    torch.testing.assert_close(single.inverse(e + single(e)), e, rtol=1e-5, atol=1e-5)


def test_the_tied_output_reads_what_came_before_the_invertible_adapter() -> None:
    """With blocks that do nothing, it is as if there were no invertible adapter at all."""
    model = reader()
    tuned = pt.attach(model, language_module())
    toys.shake(tuned, 0.3)
    nice = next(delta for delta in deltas(tuned) if isinstance(delta, NICE))
    inverse = next(delta for delta in deltas(tuned) if isinstance(delta, Inverse))
    h = torch.randn(2, 5, 32, generator=generator())
    torch.testing.assert_close(h + inverse(h), nice.inverse(h))
    untied = BertForMaskedLM(BertConfig(**SIZES, tie_word_embeddings=False))
    assert not any(isinstance(delta, Inverse) for delta in deltas(pt.attach(untied, language_module())))
    assert not any(isinstance(delta, NICE) for delta in deltas(pt.attach(reader(), language_module(invertible=False))))


def stacked(f: Tensor, x: Tensor, norm: nn.Module, *adapters: Any) -> Tensor:
    """LN(A_n(…) + x) by the paper's formula; adapters as functions of LN(u + x)."""
    u = f
    for adapter in adapters:
        u = u + adapter.up(
            torch.relu(adapter.down(nn.functional.layer_norm(u + x, x.shape[-1:], norm.weight, norm.bias, norm.eps)))
        )
    return nn.functional.layer_norm(u + x, x.shape[-1:], norm.weight, norm.bias, norm.eps)  # type: ignore[arg-type]


@pytest.mark.parametrize("first", ["language", "ranking"])
def test_the_language_is_below_whatever_was_attached_first(first: str) -> None:
    model = ranker()
    modules = {"en": language_module(invertible=False), "rank": ranking_module(reduction_factor=4)}
    for name in ("en", "rank") if first == "language" else ("rank", "en"):
        toys.shake(pt.attach(model, modules[name], name=name, train_head=name == "rank"), 0.3, len(name))
    block = model.bert.encoder.layer[0]
    seen: dict[str, Tensor] = {}
    block.output.dense.register_forward_hook(lambda m, a, y: seen.update(f=y))
    block.intermediate.register_forward_hook(lambda m, a, y: seen.update(x=a[0]))
    block.register_forward_hook(lambda m, a, y: seen.update(y=y if isinstance(y, Tensor) else y[0]))
    en, rank = (
        next(d for d in deltas(pt.adaptations(model)[name]) if isinstance(d, Stacked)) for name in ("en", "rank")
    )
    with compose(model, "rank", doc_lang="en"):
        scores(model)
    torch.testing.assert_close(
        seen["y"], stacked(seen["f"], seen["x"], block.output.LayerNorm, en, rank), rtol=1e-5, atol=1e-5
    )
    with compose(model, "rank"):
        scores(model)
    torch.testing.assert_close(
        seen["y"], stacked(seen["f"], seen["x"], block.output.LayerNorm, rank), rtol=1e-5, atol=1e-5
    )


def test_without_its_second_projection_an_adapter_is_not_there() -> None:
    model = with_adapters(invertible=False)
    with torch.no_grad():
        for delta in deltas(pt.adaptations(model)["en"]):
            delta.up.weight.zero_()
            delta.up.bias.zero_()
    with compose(model, "rank"):
        alone = scores(model)
    with compose(model, "rank", doc_lang="en"):
        torch.testing.assert_close(scores(model), alone)
    with torch.no_grad():
        for delta in deltas(pt.adaptations(model)["rank"]):
            delta.up.weight.zero_()
            delta.up.bias.zero_()
    head = next(slot.delta.module for slot in pt.adaptations(model)["rank"].slots if slot.number < 0)
    bare = ranker()
    bare.classifier.load_state_dict(head.state_dict())
    with compose(model, "rank", doc_lang="en"):
        torch.testing.assert_close(scores(model), scores(bare))


def test_a_language_is_active_and_frozen_while_ranking_is_learned() -> None:
    model = ranker()
    language = pt.attach(model, language_module(), name="en", train_head=False)
    toys.shake(language, 0.2)
    tuned = pt.attach(model, ranking_module(reduction_factor=4), name="rank")
    under(model, "rank", language="en")
    before = {name: toys.bits(p) for name, p in language.named_parameters()}
    with_it = scores(model)
    under(model, "rank", language=None)
    assert not torch.equal(scores(model), with_it)
    under(model, "rank", language="en")
    train(model, tuned)
    assert {name: toys.bits(p) for name, p in language.named_parameters()} == before
    assert not torch.equal(scores(model), with_it)


# --------------------------------------------------------------------------------------------------------------- put together


def test_query_and_document_name_the_side_whose_language_acts() -> None:
    model = with_adapters()
    with compose(model, "rank", "en", "sw", mode="doc"):
        document = scores(model)
    with compose(model, "rank", "en", "sw", mode="query"):
        query = scores(model)
    for name, found in (("sw", document), ("en", query)):
        pt.activate(model, name, "rank")
        assert torch.equal(scores(model), found)
    assert not torch.allclose(query, document)


def test_split_gives_each_side_its_language() -> None:
    model = with_adapters(("en", "sw", "twin"))
    with torch.no_grad():
        for one, other in zip(deltas(pt.adaptations(model)["twin"]), deltas(pt.adaptations(model)["sw"]), strict=True):
            one.load_state_dict(other.state_dict())
    with compose(model, "rank", doc_lang="sw"):
        plain = scores(model)
    with compose(model, "rank", "sw", "sw", mode="split"):
        torch.testing.assert_close(scores(model), plain)
    with compose(model, "rank", "twin", "sw", mode="split"):
        torch.testing.assert_close(scores(model), plain, rtol=1e-5, atol=1e-5)
    with compose(model, "rank", "en", "sw", mode="split"):
        mixed = scores(model)
    with compose(model, "rank", "sw", "en", mode="split"):
        assert not torch.allclose(scores(model), mixed)
    assert not torch.allclose(mixed, plain)


def test_split_acts_on_the_tokens_of_a_segment_alone() -> None:
    """In the first block, before attention mixes them: seen at the invertible adapters."""
    model, batch = with_adapters(), pairs()
    seen: list[Tensor] = []
    model.bert.encoder.layer[0].register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    for languages in ((None, "sw"), ("en", None)):
        with compose(model, "rank", *languages, mode="doc" if languages[1] else "query"):
            scores(model, batch)
    with compose(model, "rank", "en", "sw", mode="split"):
        scores(model, batch)
        document = batch["token_type_ids"].bool()[..., None]
        torch.testing.assert_close(seen[2], torch.where(document, seen[0], seen[1]))
        given = {"input_ids": batch["input_ids"]}
        with pytest.raises(AttachError, match="segments"):
            scores(model, given)
        with pt.given(model, segments=batch["token_type_ids"]):
            scores(model, given)
        with (
            pt.given(model, segments=batch["token_type_ids"][:, :-1]),
            pytest.raises(AttachError, match="one for each token"),
        ):
            scores(model, batch)


def test_the_invertible_part_and_layers_can_be_left_out() -> None:
    model = with_adapters()
    with compose(model, "rank", doc_lang="sw", invertible=False):
        found = scores(model)
    with torch.no_grad():
        kept = copy.deepcopy(pt.adaptations(model)["sw"].slots[0].delta.state_dict())
        for parameter in pt.adaptations(model)["sw"].slots[0].delta.parameters():
            parameter.zero_()
    with compose(model, "rank", doc_lang="sw"):
        torch.testing.assert_close(scores(model), found)
        whole = scores(model)
    pt.adaptations(model)["sw"].slots[0].delta.load_state_dict(kept)
    with compose(model, "rank", doc_lang="sw", invertible=False, skip_layers=[0]):
        skipped = scores(model)
    with torch.no_grad():
        for name in ("sw", "rank"):
            for slot in pt.adaptations(model)[name].slots:
                if slot.number >= 0 and slot.site.depth == 0 and isinstance(slot.delta, Stacked):
                    slot.delta.up.weight.zero_()
                    slot.delta.up.bias.zero_()
    with compose(model, "rank", doc_lang="sw", invertible=False):
        torch.testing.assert_close(scores(model), skipped)
    assert not torch.allclose(whole, skipped)
    with pytest.raises(PetioleError, match="layer 7"), compose(model, "rank", skip_layers=[7]):
        pass


def test_masks_add_up_in_any_order_and_leave_no_trace() -> None:
    outputs = []
    for names in (("en", "sw"), ("sw", "en")):
        model = with_masks(())
        for name in names:
            fixed_mask(model, name, len(names) + (name == "sw"))
        start, bare = state(model), toys.snapshot(model)
        with compose(model, "rank", "en", "sw", mode="both"):
            outputs.append(scores(model))
            inside = state(model)
        assert state(model) == start != inside
        assert toys.snapshot(model) == bare
        pt.activate(model, "rank", "en", "sw")
        torch.testing.assert_close(scores(model), outputs[-1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)


def test_leaving_restores_half_precision_too_and_after_an_error() -> None:
    model = with_masks().to(torch.bfloat16)
    for module in pt.adaptations(model).values():
        for each in entries_of(module):
            each.float()
    start = state(model)
    with pytest.raises(RuntimeError, match="inside"), compose(model, "rank", "en", "sw", mode="both"):
        assert state(model) != start
        raise RuntimeError("inside")
    assert state(model) == start


def test_composed_masks_are_the_same_weights_as_merged_ones() -> None:
    model = with_masks()
    with compose(model, "rank", doc_lang="sw"):
        found = scores(model)
        with pytest.raises(AttachError, match="for as long as a `with` lasts"):
            pt.adaptations(model)["sw"].unmerge()
    start = state(model)
    for name in ("rank", "sw"):
        pt.adaptations(model)[name].merge()
    torch.testing.assert_close(scores(model), found, rtol=1e-5, atol=1e-6)
    for name in ("sw", "rank"):
        pt.adaptations(model)[name].unmerge()
    assert state(model) == start


@pytest.mark.parametrize(
    ("masks", "options", "message"),
    [
        (True, {"query_lang": "en", "doc_lang": "sw", "mode": "split"}, "mode='both'"),
        (False, {"query_lang": "en", "doc_lang": "sw", "mode": "both"}, "mode='split'"),
        (True, {"query_lang": "en", "doc_lang": "en", "mode": "both"}, "twice"),
        (True, {"doc_lang": "sw", "skip_layers": [0]}, "skip_layers"),
        (False, {"query_lang": "en", "mode": "doc"}, "doc_lang"),
        (False, {"query_lang": "en", "mode": "split"}, "both languages"),
        (False, {"doc_lang": "xx"}, "no adaptation is called 'xx'"),
        (False, {"doc_lang": "sw", "mode": "sum"}, "mode = 'sum'"),
    ],
)
def test_what_does_not_fit_together_is_refused(masks: bool, options: dict[str, Any], message: str) -> None:
    model = with_masks() if masks else with_adapters()
    before = toys.snapshot(model)
    with pytest.raises(PetioleError, match=message), compose(model, "rank", **options):
        pass
    assert toys.snapshot(model) == before


def test_modules_that_are_not_ready_are_refused() -> None:
    model = with_masks()
    with pytest.raises(AttachError, match="no head"), compose(model, "en", doc_lang="sw"):
        pass
    for again, message in (("sw", "twice"), ("en", "merged into the weights")):
        with (
            compose(model, "rank", doc_lang="sw"),
            pytest.raises(AttachError, match=message),
            compose(model, "rank", doc_lang=again),
        ):
            pass
    assert not any(slot.merged for each in pt.adaptations(model).values() for slot in each.slots)
    pt.attach(model, MASK, name="new", train_head=False)
    with pytest.raises(AttachError, match="every entry trains"), compose(model, "rank", doc_lang="new"):
        pass
    pt.attach(model, pt.LoRA(rank=2), name="lora", train_head=False)
    with pytest.raises(AttachError, match="neither an adapter nor a mask"), compose(model, "rank", doc_lang="lora"):
        pass
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight.add_(0.1)
    fixed_mask(model, "other", 3)
    with pytest.raises(AttachError, match="different backbones"), compose(model, "rank", doc_lang="other"):
        pass


@pytest.mark.parametrize("k", [0, -3])
def test_a_mask_of_nothing_is_refused(k: int) -> None:
    with pytest.raises(ConfigError, match=r"LTSFT\.k"):
        pt.LTSFT(k=k)


def test_a_mask_of_more_than_there_is_is_refused() -> None:
    with pytest.raises(AttachError, match="k is from 1 to"):
        pt.attach(ranker(), pt.LTSFT(k=10**9))
    with pytest.raises(AttachError, match="in 4 iterations"):
        pt.attach(ranker(), pt.LTSFT(k=3, iterations=4))
    with pytest.raises(ConfigError, match="k"):
        language_module("adapter", k=5)
    with pytest.raises(ConfigError, match="reduction_factor"):
        ranking_module("mask", reduction_factor=2)


def test_widths_that_leave_nothing_are_refused() -> None:
    with pytest.raises(AttachError, match="leaves nothing"):
        pt.attach(ranker(), ranking_module(reduction_factor=64))
    with pytest.raises(AttachError, match="invertible=False"):
        pt.attach(ranker(), language_module(reduction_factor=32))


@pytest.mark.parametrize("family", ["gpt2", "vit", "t5"])
def test_pre_norm_models_have_them_in_sequence(family: str) -> None:
    model = copy.deepcopy(toys.model(family))
    tuned = pt.attach(model, language_module(reduction_factor=4))
    tuned.check(tiny.batch(family))


# ----------------------------------------------------------------------------------------------------------------------- ranking


def test_one_logit_is_trained_as_a_class_and_not_as_a_number() -> None:
    model, labels = ranker(), torch.tensor([1, 0, 0, 0, 1, 0])
    logits = model(**pairs()).logits
    wanted = -(labels * torch.sigmoid(logits[:, 0]).log() + (1 - labels) * torch.sigmoid(-logits[:, 0]).log()).mean()
    torch.testing.assert_close(PointwiseLoss()(logits, labels), wanted)
    own = model(**pairs(), labels=labels.float()).loss  # what the model itself makes of them
    torch.testing.assert_close(own, nn.functional.mse_loss(logits[:, 0], labels.float()))
    with pytest.raises(ConfigError, match="one of each"):
        PointwiseLoss()(torch.zeros(3, 2), torch.zeros(3))


@pytest.mark.parametrize("types", [True, False])
def test_the_first_documents_are_ranked_anew(types: bool) -> None:
    model, tokenizer = with_adapters(), TOY.tokenizer()
    if not types:
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    said = TOY.said(torch.tensor([0, 1, 2, 3, 0]), 6, generator())
    query = TOY.text(TOY.translated(said[0, :4], "a"))
    docs = [TOY.text(TOY.translated(row, "b")) for row in said]
    docs[1] = docs[1] + " " + docs[2]  # of another length
    with compose(model, "rank", "en", "sw", mode="split"):
        found = rerank(model, query, docs, top_k=4, tokenizer=tokenizer, batch_size=3)
        assert sorted(i for i, _ in found) == [0, 1, 2, 3, 4] and found[-1] == (4, None)
        scored = [score for _, score in found[:-1]]
        assert scored == sorted(scored, reverse=True)  # type: ignore[type-var]
        for number, score in found[:-1]:
            batch = tokenizer(query, docs[number], return_tensors="pt")
            segments = (torch.arange(batch["input_ids"].shape[1]) > 5).long()[None]
            with pt.given(model, segments=segments):
                alone = model(**batch).logits
            assert float(alone.detach()) == pytest.approx(score, abs=1e-5)
    with pytest.raises(ConfigError, match="outside 1 to 32"):
        rerank(model, query, docs, tokenizer=tokenizer, max_length=33)
    assert len(rerank(ranker(), query, docs, tokenizer=tokenizer, max_length=12)) == 5
    with pytest.raises(ConfigError, match="num_labels=1"):
        rerank(BertForSequenceClassification(BertConfig(**SIZES)), query, docs, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="top_k = 0"):
        rerank(model, query, docs, top_k=0, tokenizer=tokenizer)
