"""What VL-Adapter, Compacter and Hyperformer must hold: each number is a line of the specification."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration

import petiole as pt
import tiny
import toys
from petiole.errors import AttachError, ConfigError
from petiole.methods.adapters.compacter import PHMLinear
from petiole.methods.adapters.hyperformer import Hypernetworks, Written
from petiole.methods.adapters.multitask import TaskBottleneck
from petiole.methods.adapters.task_baselines import TaskFactors
from petiole.methods.adapters.vl_adapter import materialise
from petiole.tasks.vision_language import VisionLanguageModel, with_visual_tokens

TASKS = ("vqa", "gqa", "nlvr", "caption")
NET = {"task_embedding_dim": 6, "hidden_dim": 5, "projected_dim": 3}
VISUAL, NORMS = 1_582_848, 49_152


def small(preset: str, tasks: tuple[str, ...] = TASKS, **fields: Any) -> pt.VLAdapter:
    """A preset of small size."""
    form = pt.VLAdapter.presets[preset].get("form", "adapter")
    sizes: dict[str, dict[str, Any]] = {
        "hyperformer": {"reduction_factor": 4, **NET},
        "lora": {"rank": 3},
        "prompt": {"length": 3, "hidden_size": 5},
    }
    return pt.VLAdapter.preset(preset, tasks=tasks, **{**sizes.get(form, {"reduction_factor": 4}), **fields})


METHODS = {
    **{name: small(name) for name in pt.VLAdapter.presets},
    "one_hypernet": small("hyperformer", one_hypernet=True, norm_before=True, norm_after=True),
    "norms": small("multiple_adapters", norm_before=True, norm_after=True),
    "factored": small("multiple_compacter", phm_rank=2, factor_phm_rule=True, share_phm_rule="tasks"),
    "one_rule": small("multiple_compacter", share_phm_rule="sites"),
    "compacter": pt.Compacter(tasks=TASKS, sharing="half_up", reduction_factor=4),
    "hyperformer_alone": pt.Hyperformer(tasks=TASKS, reduction_factor=4, **NET),
}
APART = [
    n for n, m in METHODS.items() if getattr(m, "sharing", None) == "multiple" or "hyper" in n
]  # no two tasks alike


def attached(method: pt.Method, family: str = "bart", **options: Any) -> tuple[nn.Module, pt.Adaptation]:
    """With every parameter moved, on weights so large that a change is seen."""
    model = toys.model(family)
    tuned = pt.attach(model, method, **options)
    toys.shake(tuned)
    return model, tuned


def of(model: nn.Module, task: Any, batch: dict[str, Any]) -> Tensor:
    with pt.given(model, task=task):
        return toys.output(model, batch)


def backward(model: nn.Module, task: Any, batch: dict[str, Any]) -> None:
    model.train()
    with pt.given(model, task=task):
        model(**batch).loss.backward()


def bottlenecks(tuned: pt.Adaptation) -> list[TaskBottleneck]:
    return [slot.delta for slot in tuned.slots if isinstance(slot.delta, TaskBottleneck)]


# ------------------------------------------------------------------------------------------------------------- must hold: counts


def bart_base() -> VisionLanguageModel:
    with torch.device("meta"):
        config = BartConfig(
            vocab_size=50265, d_model=768, encoder_layers=6, decoder_layers=6, encoder_attention_heads=12,
            decoder_attention_heads=12, encoder_ffn_dim=3072, decoder_ffn_dim=3072,
        )  # fmt: skip
        return VisionLanguageModel(with_visual_tokens(BartForConditionalGeneration(config), 200))


def counted(method: pt.Method) -> tuple[int, int, pt.Adaptation]:
    """On BART-base: what trains, and all parameters with it."""
    model = bart_base()
    bare = sum(p.numel() for p in model.parameters())
    assert bare == 139_574_016 + VISUAL
    tuned = pt.attach(model, method)
    added = sum(p.numel() for slot in tuned.slots if slot.number == 0 for p in slot.delta.parameters())
    added += sum(p.numel() for module in tuned.shared.values() for p in module.parameters())
    return tuned.trainable, bare + added, tuned


# 1, 2
@pytest.mark.parametrize(
    ("preset", "site", "trainable", "total"),
    [
        ("single_adapter", 148_320, 6_081_600, 145_606_464),
        ("multiple_adapters", 4 * 148_320, 19_430_400, 158_955_264),
        ("half_shared_up", 369_792, 12_725_760, 152_250_624),
        ("half_shared_down", 371_808, NORMS + VISUAL + 30 * 371_808, 152_311_104),
        ("single_compacter", 74_608, 3_870_240, 143_395_104),
    ],
)
def test_counts_of_the_paper(preset: str, site: int, trainable: int, total: int) -> None:
    found, everything, tuned = counted(pt.VLAdapter.preset(preset, tasks=TASKS))
    deltas = bottlenecks(tuned)
    assert len(deltas) == 12 + 18
    assert {sum(p.numel() for p in delta.parameters()) for delta in deltas} == {site}
    assert (found, everything) == (trainable, total)


def test_a_norm_of_adapters_alone_can_be_left_out() -> None:
    assert counted(pt.VLAdapter(train_norms=False))[0] == 6_081_600 - NORMS
    assert counted(pt.VLAdapter(cross_attention=False))[0] == 6_081_600 - 6 * 148_320


# 1
@pytest.mark.parametrize(("n", "size_in", "size_out"), [(2, 768, 96), (4, 96, 768), (3, 12, 6)])
def test_counts_of_a_product(n: int, size_in: int, size_out: int) -> None:
    half = PHMLinear(size_in, size_out, pt.Compacter(phm_dim=n))
    assert sum(p.numel() for p in half.parameters()) == n**3 + n * (size_in // n) * (size_out // n) + size_out


@pytest.mark.parametrize("one", [False, True])
def test_counts_of_hypernetworks(one: bool) -> None:
    te, hid, pj, d, r, layers = 512, 128, 8, 768, 96, 6
    generators = (pj + 1) * (2 * d * r + r + d)
    wanted = len(TASKS) * te
    for slots in (2, 3):
        width = (3 if one else 2) * te
        wanted += (layers + one * slots) * te + width * hid + hid + hid * pj + pj + 2 * pj
        wanted += generators * (1 if one else slots)
    method = pt.VLAdapter(form="hyperformer", tasks=TASKS, one_hypernet=one)
    assert counted(method)[0] == wanted + NORMS + VISUAL


def test_counts_of_the_baselines() -> None:
    """The share of LoRA has the biases of the whole model in it."""
    biases = 6 * (4 * 768 + 3072 + 3 * 768) + 6 * (8 * 768 + 3072 + 4 * 768) + 2 * 768
    lora = 36 * 128 * 2 * 768
    assert counted(pt.VLAdapter.preset("single_lora", tasks=TASKS))[0] == lora + biases + VISUAL
    assert counted(pt.VLAdapter.preset("multiple_lora", tasks=TASKS))[0] == 4 * lora + biases + VISUAL
    prompt = 40 * 768 + 768 * 800 + 800 + 800 * 768 + 768
    assert counted(pt.VLAdapter.preset("single_prompt", tasks=TASKS))[0] == prompt + VISUAL
    assert counted(pt.VLAdapter.preset("multiple_prompt", tasks=TASKS))[0] == 4 * prompt + VISUAL


# ------------------------------------------------------------------------------------------------------------- must hold: products


# 3
def test_a_product_of_one_term_is_a_linear() -> None:
    half = PHMLinear(6, 4, pt.Compacter(phm_dim=1))
    with torch.no_grad():
        half.initialise(torch.Generator().manual_seed(0))
        half.rule.A[0].fill_(1)
        half.bias.copy_(torch.arange(4.0))
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(half(x), x @ half.B[0][0] + half.bias)


# 3
@pytest.mark.parametrize("fields", [{}, {"phm_rank": 1}, {"factor_phm_rule": True}, {"phm_dim": 4, "phm_rank": 3}])
def test_a_product_is_that_with_its_matrix(fields: dict[str, Any]) -> None:
    method = pt.Compacter(**{"phm_dim": 2, "phm_init": 1.0, **fields})
    half = PHMLinear(16, 8, method)
    with torch.no_grad():
        half.initialise(torch.Generator().manual_seed(0))
    rule, B = half.matrices()
    n = method.phm_dim
    whole = B if isinstance(B, Tensor) else B[0] @ B[1]
    H = torch.zeros(16, 8)
    for i in range(n):
        for (a, c), weight in [((a, c), rule[i, a, c]) for a in range(n) for c in range(n)]:
            H[a * 16 // n : (a + 1) * 16 // n, c * 8 // n : (c + 1) * 8 // n] += weight * whole[i]
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(half.weight.T, H, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(half(x), x @ H, rtol=1e-5, atol=1e-5)


def test_products_start_small() -> None:
    deltas = bottlenecks(pt.attach(toys.model("bart"), METHODS["multiple_compacter"]))
    assert len(deltas) == 10
    for half in (half for delta in deltas for half in (*delta.down.values(), *delta.up.values())):
        bound = (2 * 6 / sum(half.B[0].shape[1:])) ** 0.5
        assert 0.8 * bound < float(half.B[0].detach().abs().max()) <= bound
        assert 0.002 < float(half.rule.A[0].std()) < 0.03
        assert not half.bias.any()


@pytest.mark.parametrize(("share", "rules"), [("none", 10 * 2 * 4), ("tasks", 10 * 2), ("sites", 1)])
def test_who_shares_a_rule(share: str, rules: int, tmp_path: Path) -> None:
    model, tuned = attached(small("multiple_compacter", share_phm_rule=share))
    halves = [h for d in bottlenecks(tuned) for h in (*d.down.values(), *d.up.values())]
    found = {id(h.matrices()[0]) for h in halves if share != "none"} | {id(h.rule) for h in halves if share == "none"}
    assert len(found) == rules
    assert sum(name.endswith("A.0") for name in tuned.named_tensors()) == rules
    backward(model, "vqa", tiny.batch("bart"))
    assert all(h.matrices()[0].grad is not None for d in bottlenecks(tuned) for h in d.halves("vqa"))
    again = toys.model("bart")
    pt.load(again, tuned.save(tmp_path / "x.safetensors"))
    for task in TASKS:
        assert torch.equal(of(again, task, tiny.batch("bart")), of(model.eval(), task, tiny.batch("bart")))


# ---------------------------------------------------------------------------------------------------------- must hold: sharing


# 4
@pytest.mark.parametrize("preset", ["single_adapter", "single_compacter"])
def test_a_single_adapter_is_one_for_all_tasks(preset: str, tmp_path: Path) -> None:
    model, tuned = attached(small(preset), train_head=False)
    _, alone = attached(small(preset, tasks=("vqa",)), train_head=False)
    for delta in bottlenecks(tuned):
        first, *others = (delta.halves(task) for task in TASKS)
        assert all(mine is theirs for other in others for mine, theirs in zip(first, other, strict=True))
    assert tuned.trainable == alone.trainable
    optimizer = torch.optim.AdamW(tuned.parameters())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(set(tuned.parameters()))
    sizes = [one.save(tmp_path / name).stat().st_size for one, name in ((tuned, "four"), (alone, "one"))]
    assert abs(sizes[0] - sizes[1]) < 200
    batch = tiny.batch("bart")
    assert torch.equal(of(model, "vqa", batch), of(model, "caption", batch))
    assert torch.equal(of(model, "vqa", batch), toys.output(model, batch)), "nobody has to say which task it is"


# 5, 7
@pytest.mark.parametrize(
    "name", ["multiple_adapters", "half_shared_down", "half_shared_up", "multiple_compacter", "compacter"]
)
def test_a_step_on_one_task_leaves_the_others_alone(name: str) -> None:
    model, tuned = attached(METHODS[name])
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=1e-2, weight_decay=0.1)
    before = {n: toys.bits(p) for n, p in tuned.named_parameters()}
    backward(model, "gqa", tiny.batch("bart"))
    optimizer.step()
    for key, parameter in tuned.named_parameters():
        others = any(f".{task}." in key for task in TASKS if task != "gqa")
        assert (parameter.grad is None) == others, key
        assert (toys.bits(parameter) == before[key]) == others, key


@pytest.mark.parametrize("name", ["hyperformer", "one_hypernet", "multiple_lora", "multiple_prompt"])
def test_what_only_other_tasks_have_gets_no_gradient(name: str) -> None:
    model, tuned = attached(METHODS[name])
    backward(model, "gqa", tiny.batch("bart"))
    without = {key for key, p in tuned.named_parameters() if p.grad is None}
    assert without == {key for key, _ in tuned.named_parameters() if any(f".{t}" in key for t in TASKS if t != "gqa")}


# 8
@pytest.mark.parametrize("name", ["multiple_adapters", "half_shared_up", "hyperformer", "single_compacter"])
def test_without_second_projections_it_is_the_frozen_model(name: str) -> None:
    model, batch = toys.model("bart"), tiny.batch("bart")
    before = toys.output(copy.deepcopy(model).requires_grad_(False), batch)
    tuned = pt.attach(model, METHODS[name], train_head=False)
    with torch.no_grad():
        for key, parameter in tuned.named_parameters():
            if ":up." in key or ".up." in key or ".up_bias." in key:
                parameter.zero_()
    assert torch.equal(of(model, "nlvr", batch), before)


# 10
@pytest.mark.parametrize("name", METHODS)
def test_one_task_by_itself(name: str, tmp_path: Path) -> None:
    """Materialised: ordinary adapters of this task, the same output, and nothing of the others in its file. 6, too."""
    model, _ = attached(METHODS[name])
    batch = tiny.batch("bart")
    expected = {task: of(model, task, batch) for task in TASKS}
    for task in ("vqa", "caption"):
        twin = copy.deepcopy(model)
        single = materialise(pt.adaptations(twin)["default"], task)
        torch.testing.assert_close(toys.output(twin, batch), expected[task], rtol=1e-6, atol=3e-6)
        path = single.save(tmp_path / f"{task}.safetensors")
        with safe_open(path, "pt") as file:
            keys = list(file.keys())
        assert not any(other in key for other in (*TASKS, "rule", "generators") for key in keys)
        assert single.methods[0].tasks == (task,)
        assert not any(isinstance(module, (PHMLinear, Hypernetworks, Written)) for module in twin.modules())
        fresh = toys.model("bart")
        pt.load(fresh, path)
        assert torch.equal(toys.output(fresh, batch), toys.output(twin, batch))
    assert torch.equal(of(model, "gqa", batch), expected["gqa"])


def test_nothing_is_left_of_an_unknown_task() -> None:
    model, tuned = attached(METHODS["multiple_adapters"])
    with pytest.raises(ConfigError, match="task = 'vcr' is none of caption, gqa, nlvr, vqa"):
        materialise(tuned, "vcr")
    assert pt.adaptations(model)["default"] is tuned
    with pytest.raises(ConfigError, match="has no tasks"):
        materialise(pt.attach(toys.model("bert"), pt.LoRA()), "vqa")


# ------------------------------------------------------------------------------------------------------ must hold: hypernetworks


# 6
@pytest.mark.parametrize("one", [False, True])
def test_what_hypernetworks_write(one: bool) -> None:
    model, tuned = attached(small("hyperformer", one_hypernet=one), train_head=False)
    found = dict(tuned.named_parameters())

    def of_stack(stack: str, name: str) -> Tensor:
        return found[f"0.shared:stacks.{stack}.{name}"]

    slots = ("ffn", "attention", "cross_attention")
    for slot in tuned.slots:
        delta, stack, depth = slot.delta, slot.site.stack, slot.site.depth
        code = [found["0.shared:tasks.nlvr"], of_stack(stack, "layer_embedding")[depth]]
        if one:
            code.append(of_stack(stack, "slot_embedding")[slots.index(slot.site.role)])
        W1, b1, W2, b2 = (
            of_stack(stack, f"conditioning.{layer}.{part}")
            for layer in ("enter", "leave")
            for part in ("weight", "bias")
        )
        norm = [of_stack(stack, f"conditioning.norm.{part}") for part in ("weight", "bias")]
        z = nn.functional.layer_norm(W2 @ torch.relu(W1 @ torch.cat(code) + b1) + b2, (3,), *norm, eps=1e-6)
        owner = f"generators.{'shared' if one else slot.site.role}"
        down, down_bias, up, up_bias = (
            of_stack(stack, f"{owner}.{name}.weight") @ z + of_stack(stack, f"{owner}.{name}.bias")
            for name in ("down", "down_bias", "up", "up_bias")
        )
        h = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(depth))
        inner = nn.functional.gelu(h @ down.view(8, 32).T + down_bias, approximate="tanh")
        with pt.given(model, task="nlvr"):
            torch.testing.assert_close(delta(h), inner @ up.view(32, 8).T + up_bias)


# 6
@pytest.mark.parametrize("one", [False, True])
def test_gradients_reach_all_of_the_hypernetworks(one: bool) -> None:
    model, tuned = attached(small("hyperformer", ("vqa",), one_hypernet=one))
    backward(model, "vqa", tiny.batch("bart"))
    assert all(float(p.grad.abs().max()) > 0 for p in tuned.parameters())


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_adapters_are_written_once(reentrant: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a forward pass, whatever is computed again; at inference once for all passes."""
    made = []
    write = Hypernetworks.write
    monkeypatch.setattr(Hypernetworks, "write", lambda self, names: made.append(names) or write(self, names))
    gradients = []
    for again in (False, True):
        model, tuned = attached(METHODS["hyperformer"])
        if again and reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        batch = tiny.batch("bart")
        backward(model, ["caption", "vqa"], batch)
        assert made == [("caption", "vqa")]
        made.clear()
        gradients.append([p.grad for p in tuned.parameters()])
        model.eval()
        for task in ("vqa", "vqa", "gqa"):
            of(model, task, batch)
        assert made == [("vqa",), ("gqa",)]
        made.clear()
        with torch.no_grad():
            next(iter(tuned.shared.values())).tasks["gqa"].add_(1)
        of(model, "gqa", batch)
        assert made == [("gqa",)], "what it was written from has changed"
        made.clear()
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------------ every form


@pytest.mark.parametrize("family", ["bart", "t5"])
@pytest.mark.parametrize("name", METHODS)
def test_every_form_trains_and_is_saved(name: str, family: str, tmp_path: Path) -> None:
    model, tuned = attached(METHODS[name], family)
    batch = tiny.batch(family)
    with pt.given(model, task="nlvr"):
        tuned.check(batch)
    again = toys.model(family)
    pt.load(again, tuned.save(tmp_path / "x.safetensors"))
    for task in TASKS:
        assert torch.equal(of(again, task, batch), of(model, task, batch))
    tuned.detach()
    with torch.no_grad():
        assert torch.equal(toys.output(model, batch), toys.output(toys.model(family), batch))


def test_the_visual_embedding_trains_along() -> None:
    """In one pass over rows of two tasks; then a task's own adapters, and the embedding, serve by themselves."""
    model = VisionLanguageModel(with_visual_tokens(toys.model("bart"), 4), 6, visual_tokens=4).eval()
    tuned = pt.attach(model, METHODS["half_shared_up"])
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 1, 4, 6, generator=generator)
    batch = {**tiny.batch("bart"), "image_features": images, "image_boxes": torch.rand(4, 4, generator=generator)}
    backward(model, ["vqa", "caption"], batch)
    (head,) = (slot.delta for slot in tuned.slots if slot.number < 0)
    assert all(float(p.grad.abs().max()) > 0 for p in head.parameters() if p.numel() > 2 * 32)
    toys.shake(tuned)
    model.eval()
    expected = of(model, "vqa", batch)
    materialise(tuned, "vqa")
    torch.testing.assert_close(toys.output(model, batch), expected)


# ---------------------------------------------------------------------------------------------------------------- rows of tasks


@pytest.mark.parametrize("name", METHODS)
def test_rows_of_several_tasks(name: str) -> None:
    model, _ = attached(METHODS[name])
    batch = tiny.batch("bart", size=4)
    tasks = ["gqa", "vqa", "gqa", "caption"]
    mixed = of(model, tasks, batch)
    for row, task in enumerate(tasks):
        torch.testing.assert_close(mixed[row], of(model, task, batch)[row], rtol=1e-4, atol=1e-4)
    assert torch.equal(of(model, torch.tensor([1, 0, 1, 3]), batch), mixed)
    if name in APART:
        assert not torch.allclose(mixed[0], of(model, "vqa", batch)[0], atol=1e-3)


def test_gradients_of_rows_add_up() -> None:
    batch = tiny.batch("bart", size=4)
    tasks = ["gqa", "vqa", "gqa", "caption"]
    model, tuned = attached(METHODS["half_shared_down"])
    backward(model, tasks, batch)
    mixed = [p.grad for p in tuned.parameters()]
    for parameter in tuned.parameters():
        parameter.grad = None
    model.train()
    for task in set(tasks):
        rows = torch.tensor([other == task for other in tasks])
        labels = batch["labels"].masked_fill(~rows[:, None], -100)
        with pt.given(model, task=task):
            loss = model(**{**batch, "labels": labels}).loss * (
                (labels != -100).sum() / (batch["labels"] != -100).sum()
            )
        loss.backward()
    for one, other in zip(mixed, tuned.parameters(), strict=True):
        assert (one is None) == (other.grad is None)
        if one is not None:
            torch.testing.assert_close(one, other.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["multiple_adapters", "hyperformer", "multiple_lora", "multiple_prompt"])
def test_beams_follow_their_row(name: str) -> None:
    model, _ = attached(METHODS[name])
    tokens = tiny.batch("bart", size=3)["input_ids"]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 2, "do_sample": False}
    tasks = ["vqa", "caption", "vqa"]
    with pt.given(model, task=tasks):
        mixed = model.generate(tokens, **options)
    for row, task in enumerate(tasks):
        with pt.given(model, task=task):
            assert torch.equal(model.generate(tokens, **options)[row], mixed[row])


def test_lora_merges_one_task() -> None:
    model, tuned = attached(METHODS["multiple_lora"])
    batch = tiny.batch("bart")
    expected = of(model, "vqa", batch)
    with pytest.raises(AttachError, match="one of the tasks"):
        tuned.merge()
    with pt.given(model, task="vqa"):
        tuned.merge()
    torch.testing.assert_close(toys.output(model, batch), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(AttachError, match="unmerge it first"):
        materialise(tuned, "vqa")
    tuned.unmerge()
    assert torch.equal(of(model, "vqa", batch), expected)
    assert sum(isinstance(slot.delta, TaskFactors) for slot in tuned.slots) == 2 * 6


def test_a_prompt_is_folded() -> None:
    method = METHODS["multiple_prompt"]
    _, tuned = attached(method, train_head=False)
    assert sorted(tuned.named_tensors()) == [f"0.encoder.0.block.input:prompts.{task}.tokens" for task in sorted(TASKS)]
    assert method.folded().reparametrisation == "none"


# ------------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"tasks": ("vqa", "vqa")}, "'vqa' stands twice"),
        ({"tasks": ()}, "at least 1 item"),
        ({"tasks": ("a b",)}, "no name of a task"),
        ({"tasks": ("keys",)}, "no name of a task"),
        ({"reduction_factor": 0}, "reduction_factor"),
        ({"form": "hyperformer", "sharing": "half_down"}, "form='hyperformer' has no sharing"),
        ({"form": "hyperformer", "sharing": "half_up"}, "form='hyperformer' has no sharing"),
        ({"form": "lora", "sharing": "half_up"}, "has no halves: single or multiple"),
        ({"form": "prompt", "sharing": "half_down"}, "has no halves: single or multiple"),
        ({"phm_dim": 4}, "form='adapter' has no phm_dim"),
        ({"form": "lora", "reduction_factor": 4}, "form='lora' has no reduction_factor"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        pt.VLAdapter(**fields)
    assert len(str(caught.value).splitlines()) <= 3


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ConfigError, match="single_adapter, multiple_adapters"):
        pt.VLAdapter.preset("double_adapter")


@pytest.mark.parametrize(
    ("method", "family", "says"),
    [
        (
            pt.VLAdapter(reduction_factor=33),
            "bart",
            "leaves no bottleneck at encoder.0.attention, which is 32 wide: 1 to 32",
        ),
        (
            pt.Compacter(reduction_factor=4, phm_dim=3),
            "bart",
            "phm_dim = 3 divides not both the width 32 and the bottleneck 8",
        ),
        (pt.Compacter(reduction_factor=10), "bart", "the bottleneck 3"),
        (pt.Hyperformer(reduction_factor=4), "swin", "one generator writes one width"),
    ],
)
def test_what_does_not_fit_is_refused(method: pt.Method, family: str, says: str) -> None:
    with pytest.raises(AttachError, match=says) as caught:
        pt.attach(toys.model(family), method)
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize(
    "name", ["multiple_adapters", "single_adapter", "hyperformer", "multiple_lora", "multiple_prompt"]
)
def test_tasks_that_are_not_there_are_refused(name: str) -> None:
    model, _ = attached(METHODS[name])
    batch = tiny.batch("bart", size=4)
    for task, error, says in (
        ("vcr", ConfigError, "task = 'vcr' is none of vqa, gqa, nlvr, caption"),
        (["vqa", "vcr", "gqa", "vqa"], ConfigError, "task = 'vcr' is none of"),
        (
            torch.tensor([0, 1, 2, 4]),
            ConfigError,
            "task = 4 is neither one of vqa, gqa, nlvr, caption nor its number, 0 to 3",
        ),
        (0.5, ConfigError, "neither one of"),
    ):
        with pytest.raises(error, match=says):
            of(model, task, batch)
    if name == "single_adapter":
        return
    with pytest.raises(AttachError, match="a forward pass is of one of the tasks vqa, gqa, nlvr, caption"):
        toys.output(model, batch)
    for mode, tasks in ((True, ["vqa", "gqa"]), (True, ["vqa"] * 3 + ["gqa"] * 2), (False, ["vqa", "gqa", "vqa"])):
        model.train(mode)
        with pytest.raises(AttachError, match=f"task is given for {len(tasks)} rows, but"):
            of(model, tasks, batch)


def test_rows_that_are_not_told_apart_are_refused() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    pt.attach(model, small("multiple_adapters"))
    x = torch.randn(5, 2, 32, generator=torch.Generator().manual_seed(0))
    with pt.given(model, task="vqa"):
        model(x)
    with pt.given(model, task=["vqa"] * 3 + ["gqa"] * 2), pytest.raises(AttachError, match="rows are not told apart"):
        model.eval()(x)
