"""Plans: counts against published tables, figures against real training steps, short copies against whole models, budgets, refusals."""

from __future__ import annotations

import copy
import json
import random
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import petiole as pt
import small
import tiny
from petiole import cli, cost
from petiole.anatomy import anatomy
from petiole.errors import AttachError, ConfigError, FileError
from petiole.planning import Budget, Plan, Row, depth, inputs, planner
from petiole.planning.table import front
from petiole.proof import default_loss

FIGURES = (
    "forward_flops",
    "step_flops",
    "saved_bytes",
    "weight_bytes",
    "gradient_bytes",
    "optimizer_bytes",
    "peak_bytes",
)
HEAD = 768 * 768 + 768 + 2 * 768 + 2  # RoBERTa's: dense, out


def config(name: str, **fields: Any) -> Any:
    import transformers

    cls = fields.pop("cls")
    return getattr(transformers, name)(architectures=[cls], **fields)


def roberta(**fields: Any) -> Any:
    sizes = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "num_labels": 2}
    return config("RobertaConfig", cls="RobertaForSequenceClassification", pad_token_id=1, **{**sizes, **fields})


def llama_7b() -> Any:
    return config("LlamaConfig", cls="LlamaForCausalLM", vocab_size=32000, hidden_size=4096, intermediate_size=11008,
                  num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32)  # fmt: skip


def trainable(model: Any, *methods: Any) -> int:
    """Counted alone: no step runs."""
    backbone = inputs.backbone(model, dtype=None, task=None, num_labels=None)
    made = planner.Planner(backbone, anatomy(backbone), {}, torch.optim.AdamW, None)
    row = made.row(planner.contenders([list(methods)])[0], figures=False)
    assert not row.reason
    assert row.trainable_parameters is not None
    return row.trainable_parameters


# ------------------------------------------------------------------------------------------------------------- published counts


@pytest.mark.parametrize(
    ("method", "published"),
    [
        (pt.FullFineTuning(), 124_647_170),
        (pt.LinearProbe(), 592_130),
        (pt.PromptTuning(length=20), 607_490),
        (pt.PrefixTuning(length=20), 960_770),
        (pt.IA3(roles=("k", "v", "o", "down")), 656_642),
        (pt.BitFit(), 694_274),
        (pt.LoRA(rank=8), 294_912 + HEAD),
    ],
    ids=lambda value: getattr(value, "slug", None),
)
def test_roberta_base_trains_what_is_published(method: Any, published: int) -> None:
    assert trainable(roberta(), method) == published


def test_larger_models_train_what_is_published() -> None:
    large = roberta(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    assert trainable(large, pt.FullFineTuning()) == 355_361_794
    t5 = config(
        "T5Config",
        cls="T5ForConditionalGeneration",
        d_model=768,
        d_kv=64,
        d_ff=3072,
        num_layers=12,
        num_heads=12,
        vocab_size=32128,
    )
    assert trainable(t5, pt.FullFineTuning()) == 222_903_552
    assert trainable(t5, pt.LoRA(rank=8, roles=("q", "v"))) == 884_736
    linears = ("q", "k", "v", "o", "gate", "up", "down")
    assert trainable(llama_7b(), pt.FullFineTuning()) == 6_738_415_616
    assert trainable(llama_7b(), pt.LoRA(rank=64, roles=linears)) == 159_907_840


def test_bart_large_trains_what_is_published() -> None:
    bart = config("BartConfig", cls="BartForConditionalGeneration", d_model=1024, encoder_layers=12, decoder_layers=12,
                  encoder_ffn_dim=4096, decoder_ffn_dim=4096, encoder_attention_heads=16, decoder_attention_heads=16, vocab_size=50265)  # fmt: skip
    assert trainable(bart, pt.PrefixTuning(length=200)) == 14_745_600
    biases = 24 * (512 + 1024)  # which the paper's own table leaves out
    mam = (pt.PrefixTuning(length=30), pt.ParallelAdapter(bottleneck=512, scale=4.0))
    assert trainable(bart, *mam) == 27_377_664 + biases
    assert trainable(bart, pt.ParallelAdapter(bottleneck=1024)) == 50_331_648 + 24 * (1024 + 1024)


def test_llama_7b_is_planned_without_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in kB
    found = pt.plan(llama_7b(), "lora", batch_size=4, length=512, dtype="bfloat16")
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row = found["lora"]
    assert (row.reason, row.whole, row.trainable_parameters, row.backbone_parameters) == (
        "",
        False,
        4_194_304,
        6_738_415_616,
    )
    assert row.weight_bytes is not None
    assert row.weight_bytes > 13e9
    assert (after - before) * 1024 < 1e9


# -------------------------------------------------------------------------------------------------- against real training steps

DEEP: dict[str, dict[str, Any]] = {
    "bert": {"num_hidden_layers": 7},
    "llama": {"num_hidden_layers": 7},
    "vit": {"num_hidden_layers": 7},
    "t5": {"num_layers": 7, "num_decoder_layers": 7},
}
METHODS = ("full", "linear-probe", "bitfit", "lora", "houlsby", "prefix-tuning", "prompt-tuning", "vpt")


@pytest.mark.parametrize("name", DEEP)
def test_every_figure_is_that_of_a_real_step(name: str) -> None:
    model, batch = tiny.model(name, **DEEP[name]), tiny.batch(name)
    found = pt.plan(model, list(METHODS), batch=batch)
    planned = [row for row in found if not row.reason]
    assert len(planned) >= 5
    for row in planned:
        assert not row.whole
        real = copy.deepcopy(model)
        pt.attach(real, planner.contenders(row.label)[0].methods)
        measured = cost.measure(real, batch, loss=default_loss, repeats=1, warmup=0, heads=())
        assert row.trainable_parameters == measured.parameters.trainable, row.label
        assert {n: getattr(row, n) for n in FIGURES} == {n: getattr(measured, n) for n in FIGURES}, row.label


def same(model: nn.Module, batch: Any, methods: Any, **options: Any) -> Row:
    """The row of a plan, after a look that running the whole model gives the same."""
    row = pt.plan(model, [methods], batch=batch, **options).rows[0]
    assert not row.reason
    whole = inputs.backbone(model, dtype=None, task=None, num_labels=None)
    if options.get("gradient_checkpointing"):
        planner.checkpointed(whole)
    pt.attach(whole, methods)
    make = planner.maker(options.get("optimizer", "adamw"))
    mixed = planner.type_of("autocast", options.get("autocast"))
    predicted = cost.predict(whole, inputs.checked(batch), make, loss=default_loss, autocast=mixed, heads=())
    assert {n: getattr(row, n) for n in FIGURES} == {n: getattr(predicted, n) for n in FIGURES}
    return row


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "momentum"])
def test_other_optimisers_have_other_state(optimizer: str) -> None:
    row = same(tiny.model("bert", num_hidden_layers=7), tiny.batch("bert"), pt.LoRA(rank=4), optimizer=optimizer)
    expected = {"sgd": 0, "momentum": row.gradient_bytes}.get(optimizer, row.optimizer_bytes)
    assert row.optimizer_bytes == expected


def test_an_optimiser_may_be_a_function() -> None:
    found = pt.plan(
        tiny.model("bert"), "lora", batch=tiny.batch("bert"), optimizer=lambda p: torch.optim.SGD(p, lr=1.0)
    )
    assert found.rows[0].optimizer_bytes == 0


def test_mixed_precision_is_planned() -> None:
    model, batch = tiny.model("llama", num_hidden_layers=7), tiny.batch("llama")
    half = same(model, batch, pt.HoulsbyAdapter(), autocast="bfloat16")
    full = pt.plan(model, [pt.HoulsbyAdapter()], batch=batch).rows[0]
    assert half.step_flops == full.step_flops
    assert half.saved_bytes != full.saved_bytes


@pytest.mark.parametrize("method", [pt.FullFineTuning(), pt.LoRA()], ids=["full", "lora"])
def test_gradient_checkpointing_trades_flops_for_memory(method: Any) -> None:
    model, batch = tiny.model("llama", num_hidden_layers=7), tiny.batch("llama")
    row = same(model, batch, method, gradient_checkpointing=True)
    plain = pt.plan(model, [method], batch=batch).rows[0]
    assert not row.whole
    assert row.saved_bytes is not None and plain.saved_bytes is not None
    assert row.step_flops is not None and plain.step_flops is not None
    assert row.saved_bytes < plain.saved_bytes / 2
    assert row.step_flops > 1.2 * plain.step_flops
    assert not any(
        getattr(m, "gradient_checkpointing", False) for m in model.modules()
    )  # the user's own model is left alone


def test_a_memory_budget_recomputes_just_enough_and_says_the_price() -> None:
    model, batch = tiny.model("llama", num_hidden_layers=5), tiny.batch("llama")
    plain = pt.plan(model, "lora,norm-tuning,full", batch=batch)
    assert plain["lora"].memory_bytes is not None and plain["full"].memory_bytes is not None
    budget = plain["lora"].memory_bytes - 1
    found = pt.plan(model, "lora,norm-tuning,full", batch=batch, budget=f"memory={budget}", recompute=True)
    row = found["lora"]
    assert row.recomputed == 1 and row.fits and row.memory_bytes is not None and row.memory_bytes <= budget
    assert row.step_flops is not None and row.step_flops > (plain["lora"].step_flops or 0)
    assert row.saved_bytes is not None and row.saved_bytes < (plain["lora"].saved_bytes or 0)
    assert row.note.startswith("recomputes 1 of 5 blocks, which takes")
    beyond = found["full"]
    assert not beyond.fits and beyond.recomputed == 0 and beyond.memory_bytes == plain["full"].memory_bytes
    assert beyond.note.startswith("with all 5 blocks recomputed a step still takes")
    assert found.to_dict()["recompute"] is True
    for wrong in ({"budget": "params=1%"}, {}, {"budget": "memory=1GB", "gradient_checkpointing": True}):
        with pytest.raises(ConfigError, match="recompute=True needs a budget of memory"):
            pt.plan(model, "lora", batch=batch, recompute=True, **wrong)


@pytest.mark.parametrize("layers", [(3,), (0, -1), (-2,)])
def test_what_only_some_depths_have_runs_through_the_whole_model(layers: tuple[int, ...]) -> None:
    row = same(tiny.model("bert", num_hidden_layers=7), tiny.batch("bert"), pt.LoRA(layers=layers))
    assert row.whole == (layers != (0, -1))  # both ends are in every copy


def test_blocks_that_alternate_are_units_of_two() -> None:
    model = tiny.model("gpt_oss", num_hidden_layers=8).bfloat16()
    backbone = inputs.backbone(model, dtype=None, task=None, num_labels=None)
    assert [one.period for one in depth.patterns(backbone, anatomy(backbone)).values()] == [2]
    assert not same(model, tiny.batch("gpt_oss"), pt.LoRA()).whole


def test_models_whose_blocks_differ_run_whole() -> None:
    assert same(tiny.model("swin", depths=[2, 4]), tiny.batch("swin"), pt.BitFit()).whole


def test_the_file_has_the_bytes_that_were_said(tmp_path: Path) -> None:
    for method in (pt.LoRA(rank=4), pt.PrefixTuning(length=5, reparametrisation="mlp"), pt.BitFit()):
        model = tiny.model("bert")
        said = pt.plan(model, [method], batch=tiny.batch("bert")).rows[0].checkpoint_bytes
        file = pt.attach(model, method).save(tmp_path / "a.petiole.safetensors")
        header = int.from_bytes(file.read_bytes()[:8], "little") + 8
        assert said == file.stat().st_size - header


def test_originals_of_what_trains_in_place_take_memory_too() -> None:
    rows = pt.plan(tiny.model("bert"), "full,lora", batch=tiny.batch("bert"))
    full, lora = rows["full"], rows["lora"]
    assert full.kept_bytes == full.gradient_bytes
    assert full.peak_bytes is not None and full.memory_bytes == full.peak_bytes + (full.kept_bytes or 0)
    assert (lora.kept_bytes, lora.memory_bytes) == (0, lora.peak_bytes)


def test_the_bare_backbone_is_a_row_if_asked_for() -> None:
    row = pt.plan(tiny.model("bert", num_hidden_layers=7), "bare", batch=tiny.batch("bert")).rows[0]
    assert (row.trainable_parameters, row.saved_bytes, row.checkpoint_bytes, row.reason) == (0, 0, 0, "")
    assert row.step_flops == row.forward_flops


# -------------------------------------------------------------------------------------------------------------- blocks and units


def pattern(kinds: str) -> tuple[int, int, int, int] | None:
    found = depth.pattern("", list(kinds))
    return None if found is None else (found.first, found.last, found.period, found.units)


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("a" * 12, (1, 1, 1, 10)),
        ("b" + "a" * 11, (1, 1, 1, 10)),
        ("aab" + "c" * 12, (3, 1, 1, 11)),
        ("a" * 9 + "b", (1, 1, 1, 8)),
        ("ab" * 8, (1, 1, 2, 7)),
        ("aaab" * 6, (1, 3, 4, 5)),
        ("a" * 4, None),  # two runs would cost more than one
        ("abcdefgh", None),
        ("abaabbabba", None),
    ],
)
def test_a_pattern_is_the_shortest_way_to_write_the_blocks(kinds: str, expected: Any) -> None:
    found = depth.pattern("", list(kinds))
    assert pattern(kinds) == expected or (
        found is not None
        and expected is not None
        and 2 * (found.first + found.last) + found.period == 2 * sum(expected[:2]) + expected[2]
    )
    if found is not None:
        rebuilt = [*range(found.first), *[found.first + i % found.period for i in range(found.period * found.units)]]
        assert "".join(kinds[i] for i in rebuilt) + kinds[len(kinds) - found.last :] == kinds
        assert found.blocks == len(kinds)


def test_a_copy_knows_where_its_blocks_stand() -> None:
    one = depth.Pattern("layers", 1, 2, 2, 4)
    assert one.kept(0) == [0, 9, 10]
    assert one.kept(1) == [0, 1, 2, 9, 10]
    assert [one.where(0, i, 1) for i in range(5)] == [
        (0, "first", 0), (0, "unit", 0), (0, "unit", 1), (0, "last", 0), (0, "last", 1)
    ]  # fmt: skip


def test_blocks_with_other_settings_are_not_alike() -> None:
    block = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1))
    other = copy.deepcopy(block)
    assert depth.signature(block) == depth.signature(other)
    other[1].p = 0.3  # costs the same
    other[0].layer_idx = 7
    assert depth.signature(block) == depth.signature(other)
    for change in (
        lambda m: setattr(m[1], "p", 0.0),
        lambda m: setattr(m[0], "sliding_window", 4),
        lambda m: m[0].bias.requires_grad_(False),
        lambda m: m[0].register_forward_hook(lambda *_: None),
        lambda m: m.double(),
    ):
        other = copy.deepcopy(block)
        change(other)
        assert depth.signature(block) != depth.signature(other)


def test_a_shortened_copy_leaves_the_model_as_it_was() -> None:
    model = inputs.backbone(tiny.model("bert", num_hidden_layers=7), dtype=None, task=None, num_labels=None)
    names, cut = [n for n, _ in model.named_modules()], depth.patterns(model, anatomy(model))
    short = depth.shortened(model, cut, {0: 0})
    assert len(anatomy(short).stack().blocks) == 2
    assert [n for n, _ in model.named_modules()] == names


# ----------------------------------------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("params=0.5%", 5_000), ("params=300K", 300_000), ("params=1.5M", 1_500_000), ("params=1B", 1e9), ("params=12_000", 12_000),
        ("params=1e6", 1e6), ("memory=8GB", 8e9), ("memory=8GiB", 8 * 2**30), ("memory=512MB", 5.12e8), ("memory=100", 100),
        ("memory=2kB", 2000), ("memory=1.5 gb", 1.5e9), ("checkpoint=10MiB", 10 * 2**20), ("flops=40T", 4e13), ("flops=1.5PFLOPs", 1.5e15),
        ("inference=500GFLOP", 5e11), ("flops=1e12", 1e12), ("saved=1GB", 1e9), ("optimizer=1MB", 1e6),
    ],
)  # fmt: skip
def test_a_budget_is_read_as_people_write_it(text: str, number: float) -> None:
    (limit,) = Budget.parse(text).limits
    assert limit.number(1_000_000) == pytest.approx(number)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("memoy=8GB", "did you mean 'memory'"), ("time=3s", "Allowed: params, checkpoint, memory"), ("memory", "bytes such as"),
        ("memory=8GX", "8GiB"), ("memory=-1GB", "bytes such as"), ("memory=50%", "only params can be a share"), ("params=8GB", "0.5%"),
        ("params=many", "0.5%"), ("flops=8GB", "40T"), ("params=1%,params=2%", "twice"), ("params=1.2.3", "0.5%"),
    ],
)  # fmt: skip
def test_a_budget_that_says_nothing_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Budget.parse(text)


def row(label: str, params: int, memory: int, flops: int = 1, head: int = 0, reason: str = "") -> Row:
    return Row(label, "f", [], trainable_parameters=params, head_parameters=head, backbone_parameters=1000, peak_bytes=memory, kept_bytes=0,
               step_flops=flops, reason=reason)  # fmt: skip


def test_a_row_says_how_far_it_is_over() -> None:
    budget = Budget.parse("params=1%,memory=100B")
    assert budget.over(row("a", 10, 100)) == {}
    assert budget.over(row("a", 20, 150)) == {"params": 2.0, "memory": 1.5}
    assert budget.strain(row("a", 5, 90)) == pytest.approx(0.9)
    assert Budget.parse(None).over(row("a", 10**9, 10**9)) == {}


def test_the_front_is_what_nothing_undercuts() -> None:
    rows = [
        row("a", 1, 9),
        row("b", 5, 5),
        row("c", 9, 1),
        row("d", 5, 6),
        row("e", 9, 9),
        row("head", 1, 1, head=1),
        row("bad", 0, 0, reason="no"),
    ]
    both = planner.axes("params,memory")
    assert [r.label for r in front(rows, both)] == ["a", "b", "c"]
    assert [r.label for r in front(rows, planner.axes("memory"))] == ["c"]
    assert [r.label for r in front([row("x", 2, 2), row("y", 2, 2)], both)] == ["x", "y"]


def test_the_front_against_every_pair() -> None:
    draw = random.Random(0)
    asked = planner.axes("params,memory,flops")
    for _ in range(30):
        rows = [row(str(i), *(draw.randint(1, 6) for _ in range(3))) for i in range(12)]
        costs = {r.label: [axis.of(r) or 0 for axis in asked] for r in rows}
        beaten = {
            a
            for a in costs
            for b in costs
            if a != b and all(x <= y for x, y in zip(costs[b], costs[a], strict=True)) and costs[a] != costs[b]
        }
        assert [r.label for r in front(rows, asked)] == [r.label for r in rows if r.label not in beaten]


def test_a_budget_parts_rows_that_fit_from_others() -> None:
    found = pt.plan(tiny.model("bert"), "full,lora,bitfit,linear-probe", batch=tiny.batch("bert"), budget="params=15%")
    assert {r.label for r in found.fits()} == {"lora", "bitfit", "linear-probe"}
    assert found["full"].over["params"] == pytest.approx(1 / 0.15, rel=0.001)
    assert "full" not in [r.label for r in found.front("memory")]
    assert "linear-probe" not in [r.label for r in found.front()]  # it trains the head alone
    assert [r.front for r in found] == [r in found.front() for r in found]
    with pytest.raises(ConfigError, match="no axis"):
        found.front("params,beauty")


# --------------------------------------------------------------------------------------------------------------------------- fit


def strained(base: float, slope: float, power: float, edge: int | None, looks: list[int]) -> Any:
    """A strain that grows with the size, up to an edge beyond which nothing goes; it remembers who asked."""

    def strain(size: int) -> float:
        looks.append(size)
        return float("inf") if edge is not None and size > edge else base + slope * size**power

    return strain


def test_the_largest_number_is_found_with_few_looks() -> None:
    draw = random.Random(0)
    for _ in range(300):
        base, slope, power, high = (
            draw.uniform(0, 1.2),
            draw.uniform(1e-4, 0.5),
            draw.choice([0.5, 1, 1, 2]),
            draw.choice([1, 2, 7, 64, 768]),
        )
        edge = draw.choice([None, None, draw.randint(1, high)])
        looks: list[int] = []
        strain = strained(base, slope, power, edge, looks)
        expected = max((s for s in range(1, high + 1) if strain(s) <= 1), default=0)
        looks.clear()
        assert planner.largest(strain, 1, high) == expected
        assert len(looks) <= 24


@pytest.mark.parametrize("budget", ["params=3000", "memory=220kB", "params=20%,checkpoint=9kB"])
@pytest.mark.parametrize("slug", ["lora", "houlsby", "prefix-tuning"])
def test_a_fitted_size_fits_and_the_next_does_not(slug: str, budget: str) -> None:
    model, batch = tiny.model("bert"), tiny.batch("bert")
    found = pt.plan(model, slug, batch=batch, budget=budget, fit=True).rows[0]
    assert found.fits and found.size is not None
    method = planner.contenders(slug)[0].methods[0]
    sizes = [type(method)(**{method.size: found.size + more}) for more in (0, 1)]
    just, over = (pt.plan(model, [one], batch=batch, budget=budget).rows[0] for one in sizes)
    assert (just.fits, over.fits) == (True, False)
    assert just.peak_bytes == found.peak_bytes
    assert found.config[0]["config"][method.size] == found.size


def test_where_nothing_fits_the_smallest_is_shown_as_too_large() -> None:
    found = pt.plan(tiny.model("bert"), "lora", batch=tiny.batch("bert"), budget="params=10", fit=True).rows[0]
    assert (found.size, found.fits) == (1, False)
    assert found.over["params"] > 1


def test_a_size_beyond_the_width_of_the_backbone_is_not_sought() -> None:
    found = pt.plan(tiny.model("bert"), "lora", batch=tiny.batch("bert"), budget="params=100M", fit=True).rows[0]
    assert (found.size, found.fits) == (32, True)
    assert "width" in found.note


def test_a_size_that_goes_by_values_is_planned_at_its_most_and_may_be_fitted() -> None:
    model, batch = tiny.model("bert"), tiny.batch("bert")
    row = pt.plan(model, "svfit", batch=batch).rows[0]
    assert row.size is None
    assert "the most it can be" in row.note
    found = pt.plan(model, "svfit,lora", batch=batch, budget="params=200", fit=True)["svfit"]
    head = 32 * 3 + 3
    assert found.size == (200 - head) // 4  # one number for each rank at q and v of two blocks
    assert (found.fits, found.note) == (True, "")


def test_methods_without_a_size_stay_as_they_are() -> None:
    found = pt.plan(tiny.model("bert"), "bitfit", batch=tiny.batch("bert"), budget="params=50%", fit=True).rows[0]
    assert (found.size, found.fits) == (None, True)


def test_fitting_needs_a_budget() -> None:
    with pytest.raises(ConfigError, match="needs a budget"):
        pt.plan(tiny.model("bert"), "lora", fit=True)


# ------------------------------------------------------------------------------------------------------------ models and batches


def test_a_model_its_configuration_and_its_folder_give_one_plan(tmp_path: Path) -> None:
    model = tiny.model("bert", num_hidden_layers=7)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    meta = copy.deepcopy(model.config)
    with torch.device("meta"):
        empty = type(model)(meta)
    plans = [
        pt.plan(source, "lora", batch_size=3, length=9).to_dict()
        for source in (model, model.config, empty, tmp_path, str(tmp_path))
    ]
    for one in plans:
        del one["seconds"]
    assert all(one == plans[0] for one in plans)
    assert plans[0]["batch"] == {"input_ids": [3, 9], "attention_mask": [3, 9], "labels": [3]}


def test_nothing_of_a_model_is_changed() -> None:
    model = tiny.model("bert")
    model.classifier.requires_grad_(False)
    before = {n: (p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    state, hooks = torch.get_rng_state(), [len(m._forward_hooks) for m in model.modules()]
    pt.plan(model, "full,lora,prompt-tuning", batch=tiny.batch("bert"))
    assert not model.training
    assert "_petiole" not in model.__dict__
    assert hooks == [len(m._forward_hooks) for m in model.modules()]
    assert torch.equal(state, torch.get_rng_state())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0]) and parameter.requires_grad == before[name][1]


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("bert", {"input_ids": (3, 5), "attention_mask": (3, 5), "labels": (3,)}),
        ("llama", {"input_ids": (3, 5), "attention_mask": (3, 5), "labels": (3, 5)}),
        ("t5", {"input_ids": (3, 5), "attention_mask": (3, 5), "labels": (3, 5)}),
        ("vit", {"pixel_values": (3, 3, 8, 8), "labels": (3,)}),
        ("ast", {"input_values": (3, 32, 16), "labels": (3,)}),
        ("wav2vec2", {"input_values": (3, 4 * 5 + 3), "labels": (3,)}),
        ("whisper", {"input_features": (3, 8, 16), "labels": (3, 5)}),
        ("clip", {"input_ids": (3, 5), "attention_mask": (3, 5), "pixel_values": (3, 3, 8, 8)}),
        ("resnet", {"pixel_values": (3, 3, 224, 224), "labels": (3,)}),
    ],
)
def test_a_batch_has_the_shapes_that_a_model_takes(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
    model = inputs.backbone(tiny.model(name), dtype=None, task=None, num_labels=None)
    found = inputs.synthetic(model, 3, 5, anatomy(model))
    assert {n: tuple(v.shape) for n, v in found.items() if isinstance(v, torch.Tensor)} == shapes
    planned = planner.Planner(model, anatomy(model), found, torch.optim.AdamW, None).row(
        planner.contenders("bitfit,norm-tuning")[name in ("llama", "t5")]
    )
    assert not planned.reason
    assert planned.step_flops is not None and planned.step_flops > (planned.forward_flops or 0)


def test_a_task_gives_a_head() -> None:
    model = tiny.model("bert")
    model.config.architectures = ["BertModel"]
    found = pt.plan(model.config, "lora", task="text-classification", num_labels=7, length=8)
    assert found.model == "BertForSequenceClassification"
    assert found.rows[0].head_parameters == 32 * 7 + 7
    headless = pt.plan(model.config, "lora", length=8)
    assert (headless.model, headless.rows[0].head_parameters, headless.rows[0].reason) == ("BertModel", 0, "")


def test_weights_of_another_type_take_other_memory() -> None:
    model = tiny.model("bert")
    full, half = (pt.plan(model, "lora", dtype=dtype, length=8).rows[0] for dtype in (None, "bfloat16"))
    assert full.weight_bytes is not None and half.weight_bytes is not None
    assert half.weight_bytes < 0.6 * full.weight_bytes
    assert half.trainable_parameters == full.trainable_parameters


# ---------------------------------------------------------------------------------------------------------------------- refusals


def test_a_method_that_cannot_sit_is_a_row_with_its_reason() -> None:
    found = pt.plan(tiny.model("llama"), "bitfit,linear-probe,lora:roles=[qkv],lora", length=8)
    reasons = {r.label: r.reason for r in found if r.reason}
    assert "no biases" in reasons["bitfit"]
    assert "no task head" in reasons["linear-probe"]
    assert "no 'qkv'" in reasons["lora:roles=[qkv]"]
    assert not found["lora"].reason
    assert [r.label for r in found.fits()] == ["lora"]
    assert found["bitfit"].trainable_parameters is None
    assert "bitfit: " in found.table()


def test_a_prompt_that_leaves_no_room_is_refused() -> None:
    found = pt.plan(tiny.model("bert"), "prompt-tuning:length=20,lora", length=30)  # of 40 positions
    assert "50 tokens" in found["prompt-tuning:length=20"].reason
    assert not found["lora"].reason
    assert not pt.plan(tiny.model("llama"), "prompt-tuning", length=60).rows[0].reason  # rotary positions have no end


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"length": 50}, "positions for 40 tokens"), ({"batch_size": 0}, "batch_size = 0"), ({"length": 2.5}, "length = 2.5"),
        ({"dtype": "int8"}, "no floating-point type"), ({"autocast": "float12"}, "autocast"), ({"optimizer": "adamx"}, "momentum"),
        ({"methods": "lara"}, "did you mean"), ({"methods": ""}, "nothing is named"), ({"methods": "lora,lora"}, "twice"),
        ({"methods": "lora:rank=0"}, "rank"), ({"batch": [1]}, "mapping"), ({"task": "text-classification"}, "has its head already"),
        ({"budget": "x=1"}, "nothing that can be limited"), ({"front_axes": "beauty"}, "no axis"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_at_once(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        pt.plan(tiny.model("bert"), **{"length": 8, **options})


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no such model folder"):
        pt.plan("nowhere/at/all/really")
    with pytest.raises(FileError, match=r"no config\.json"):
        pt.plan(tmp_path)
    with pytest.raises(ConfigError, match="is no model"):
        pt.plan(3)
    with pytest.raises(ConfigError, match="there is no 'cooking'"):
        pt.plan(tiny.model("bert").config, task="cooking")
    with pytest.raises(ConfigError, match="give batch="):
        pt.plan(tiny.model("torch_encoder"))
    with pytest.raises(ConfigError, match="can't do it"):
        pt.plan(tiny.model("torch_encoder"), batch=tiny.batch("torch_encoder"), gradient_checkpointing=True)


def test_a_model_with_something_attached_is_refused() -> None:
    model = tiny.model("bert")
    pt.attach(model, pt.LoRA())
    with pytest.raises(AttachError, match="bare backbone"):
        pt.plan(model)


# ------------------------------------------------------------------------------------------------------------------------ output


@pytest.fixture(scope="module")
def whole() -> Plan:
    return pt.plan(tiny.model("bert"), length=8, budget="params=20%")


def test_all_methods_are_planned_unless_some_are_named(whole: Plan) -> None:
    assert {r.label for r in whole} == set(pt.registry())
    planned = [r for r in whole if not r.reason]
    memories = [r.memory_bytes or 0 for r in planned]
    assert memories == sorted(memories)
    assert whole.rows[: len(planned)] == tuple(planned)


def test_a_plan_is_a_json_object(whole: Plan) -> None:
    found = whole.to_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["budget"] == "params=20%"
    first = found["rows"][0]
    assert {
        "label",
        "trainable_parameters",
        "checkpoint_bytes",
        "step_flops",
        "memory_bytes",
        "fits",
        "over",
        "front",
    } <= set(first)


def test_a_plan_is_a_table(whole: Plan) -> None:
    text = str(whole)
    assert "BertForSequenceClassification, float32, adamw; input_ids 8×8" in text
    assert f"budget params=20%: {len(whole.fits())} of {len(whole.rows)} fit" in text
    line = next(line for line in text.splitlines() if line.startswith("full "))
    assert "params ×5" in line
    assert "●" in text


def test_a_plan_is_a_picture(whole: Plan, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = whole.plot(tmp_path / "front.png", "params,memory")
    assert picture.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ConfigError, match="a picture has two"):
        whole.plot(tmp_path / "front.png", "params")


# -------------------------------------------------------------------------------------------------------------- the command line


def call(*words: Any) -> Any:
    return CliRunner().invoke(cli.app, ["plan", *map(str, words)])


def test_the_command_prints_what_the_function_gives(tmp_path: Path) -> None:
    model = tiny.model("bert")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    options = ["--model", tmp_path, "--methods", "lora,full", "--length", 8, "--budget", "params=20%"]
    picture = tmp_path / "front.png"
    told = json.loads(call(*options, "--json").stdout)
    expected = pt.plan(tmp_path, "lora,full", length=8, budget="params=20%").to_dict()
    assert {**told, "seconds": 0} == {**expected, "seconds": 0}
    shown = call(*options, "--plot", picture)
    assert shown.exit_code == 0
    assert "1 of 2 fit" in shown.stdout and "lora" in shown.stdout
    assert picture.stat().st_size > 0


def test_the_command_plans_for_data(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    here = small.place(tmp_path)
    result = call(
        "--model", here / small.MODEL, "--data", here / small.DATA, "--methods", "lora", "--batch-size", 3, "--json"
    )
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["model"] == "BertForSequenceClassification"
    assert found["batch"]["labels"] == [3]
    assert found["rows"][0]["head_parameters"] > 0


@pytest.mark.parametrize(
    ("words", "says"),
    [(["--budget", "memory=8XB"], "8GiB"), (["--precision", "fp8"], "bf16"), (["--methods", "lara"], "did you mean")],
)
def test_the_command_says_what_is_wrong(tmp_path: Path, words: list[str], says: str) -> None:
    tiny.model("bert").config.save_pretrained(tmp_path)
    result = call("--model", tmp_path, "--length", 8, *words)
    assert result.exit_code == 2
    assert says in result.stderr
    assert result.stderr.count("\n") <= 3
