"""What ScaLearn and AdapterFusion must hold, by their papers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaForSequenceClassification

import petiole as pt
import tiny
import toys
from petiole.errors import AttachError, ConfigError, FileError
from petiole.files import load_adaptation
from petiole.methods.adapters.fusion import Fused
from petiole.methods.adapters.scalearn import Scaled, Scales, to_single_adapter
from petiole.training import Events

NAMES = ("mnli", "rte", "sst")
D, LAYERS = 32, 2


def source(bottleneck: int = 4, insertion: str = "pfeiffer", **fields: Any) -> pt.UnifiedView:
    """An adapter for one task, as the paper's first stage trains it; of weights large enough to matter."""
    ffn = {"form": "adapter", "insertion": insertion, "bottleneck": bottleneck, "scale": 1.0, "init": "bert"}
    return pt.UnifiedView(attention={"form": "none"}, ffn=ffn, **fields)


def sourced(family: str = "bert", names: tuple[str, ...] = NAMES, method: pt.Method | None = None) -> nn.Module:
    """A tiny model with sources on it."""
    model = copy.deepcopy(toys.model(family))
    for seed, name in enumerate(names):
        tuned = pt.attach(model, method or source(4 + seed), name=name, seed=seed)
        toys.shake(tuned, 0.3)
    return model


def combined(model: nn.Module, method: pt.Method | None = None, **options: Any) -> pt.Adaptation:
    return pt.attach(model, method or pt.ScaLearn(sources=NAMES, dropout=0.0), name="target", **options)


def deltas(tuned: pt.Adaptation) -> list[Any]:
    return [slot.delta for slot in tuned.slots if slot.number >= 0]


@torch.no_grad()
def set_scales(tuned: pt.Adaptation, values: dict[str, float]) -> None:
    for module in tuned.model.modules():
        if isinstance(module, Scales):
            for name, value in values.items():
                module.get_parameter(f"omega_{name}").fill_(value)


def hidden(model: nn.Module, batch: dict[str, Tensor] | None = None) -> Tensor:
    """The last hidden state, which no head has touched."""
    batch = {k: v for k, v in (batch or tiny.batch("bert")).items() if k != "labels"}
    return model.base_model(**batch).last_hidden_state  # type: ignore[operator]


def with_state(values: dict[str, float], **fields: Any) -> Tensor:
    model = sourced()
    set_scales(combined(model, pt.ScaLearn(sources=NAMES, dropout=0.0, **fields)), values)
    return hidden(model)


# ------------------------------------------------------------------------------------------------------------- must hold


def test_one_scale_of_one_is_the_single_adapter() -> None:
    model = sourced()
    tuned = combined(model)
    for name in NAMES:
        set_scales(tuned, {other: float(other == name) for other in NAMES})
        ours = hidden(model)
        with pt.route(model, name):
            torch.testing.assert_close(ours, hidden(model), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("c", [1.0, 2.5])
def test_equal_scales_give_the_mean_of_the_sources(c: float) -> None:
    model = sourced()
    tuned = combined(model)
    set_scales(tuned, dict.fromkeys(NAMES, c / len(NAMES)))
    place = deltas(tuned)[0]
    v = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(0))
    alone = [pt.adaptations(model)[name].slots[0].delta for name in NAMES]
    wanted = c * torch.stack([each(v, v) for each in alone]).mean(0)
    torch.testing.assert_close(place(v, v), wanted, rtol=1e-5, atol=1e-6)


def roberta(method: pt.Method) -> pt.Adaptation:
    """With the 8 tasks of GLUE on RoBERTa-base, without values."""
    with torch.device("meta"):
        model = RobertaForSequenceClassification(RobertaConfig(vocab_size=50265, max_position_embeddings=514))
    names = tuple(f"task{i}" for i in range(8))
    for name in names:
        pt.attach(model, source(48), name=name, train_head=False)
    return pt.attach(model, method.model_copy(update={"sources": names}), name="target", train_head=False)


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({}, 73_728),
        ({"granularity": "scalar"}, 96),
        ({"share_layers": True}, 6_144),
        ({"granularity": "scalar", "share_layers": True}, 8),
    ],
)
def test_counts_of_the_paper(fields: dict[str, Any], count: int) -> None:
    assert roberta(pt.ScaLearn(**fields)).trainable == count


def test_fusion_trains_three_hundred_times_as_much() -> None:
    count = roberta(pt.AdapterFusion()).trainable
    assert count == 12 * (3 * 768**2 + 2 * 768) == 21_252_096
    assert round(100 * 73_728 / count, 3) == 0.347


def test_a_scalar_is_a_vector_of_equal_entries() -> None:
    values = {"mnli": 0.7, "rte": -0.2, "sst": 1.3}
    torch.testing.assert_close(with_state(values, granularity="scalar"), with_state(values), rtol=1e-6, atol=1e-6)


def test_shared_scales_get_the_sum_of_the_layers_gradients() -> None:
    values = {"mnli": 0.7, "rte": -0.2, "sst": 1.3}
    found, outputs = [], []
    for share in (False, True):
        model = sourced()
        tuned = combined(model, pt.ScaLearn(sources=NAMES, dropout=0.0, share_layers=share), train_head=False)
        set_scales(tuned, values)
        outputs.append(hidden(model))
        outputs[-1].square().sum().backward()
        scales = [m for m in model.modules() if isinstance(m, Scales)]
        assert len(scales) == (1 if share else LAYERS)
        found.append({name: sum(m.get_parameter(f"omega_{name}").grad for m in scales) for name in NAMES})  # type: ignore[misc]
    torch.testing.assert_close(outputs[0], outputs[1])
    for name in NAMES:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [pt.ScaLearn(sources=NAMES), pt.AdapterFusion(sources=NAMES)])
def test_sources_and_backbone_stay_as_they_are(method: pt.Method) -> None:
    model, batch = sourced(), tiny.batch("bert")
    tuned = combined(model, method)
    tuned.check(batch)
    mine = {id(p) for p in tuned.parameters()}
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if id(p) not in mine}
    copies = [tensor.clone() for delta in deltas(tuned) for tensor in delta.buffers()]
    start = {name: p.detach().clone() for name, p in tuned.named_parameters()}
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=1e-2)
    events = Events(model, optimizer, total_steps=3)
    model.train()
    events.begin()
    for _ in range(3):
        events.before_step()
        model(**batch).loss.backward()
        assert all(p.grad is None for p in model.parameters() if id(p) not in mine)
        optimizer.step()
        events.after_optimizer_step()
        optimizer.zero_grad()
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())
    assert all(
        torch.equal(one, other)
        for one, other in zip(copies, (t for d in deltas(tuned) for t in d.buffers()), strict=True)
    )
    moved = [name for name, p in tuned.named_parameters() if not torch.equal(p, start[name])]
    assert set(start) - set(moved) <= {name for name in start if name.endswith("key.bias")}  # which softmax hides


@pytest.mark.parametrize("insertion", ["pfeiffer", "sequential", "parallel"])
@pytest.mark.parametrize("share", [False, True])
def test_one_wide_adapter_gives_the_same(insertion: str, share: bool, tmp_path: Path) -> None:
    model = sourced(method=source(4, insertion))
    tuned = combined(model, pt.ScaLearn(sources=NAMES, share_layers=share))
    toys.shake(tuned, 0.3)
    batch = tiny.batch("bert")
    wanted = model(**batch).logits
    single = to_single_adapter(tuned)
    assert single.slots[0].delta.down.out_features == 3 * 4
    torch.testing.assert_close(model(**batch).logits, wanted, rtol=1e-5, atol=1e-5)
    single.save(tmp_path / "single.petiole.safetensors")
    fresh = copy.deepcopy(toys.model("bert"))
    pt.load(fresh, tmp_path / "single.petiole.safetensors")
    torch.testing.assert_close(fresh(**batch).logits, wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(AttachError, match="not made by scalearn"):
        to_single_adapter(single, "again")


def test_the_order_of_sources_does_not_matter() -> None:
    values = {"mnli": 0.7, "rte": -0.2, "sst": 1.3}
    outputs = []
    for names in (NAMES, NAMES[::-1]):
        model = sourced()
        set_scales(combined(model, pt.ScaLearn(sources=names, dropout=0.0)), values)
        outputs.append(hidden(model))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)


def test_dropout_takes_a_source_and_feature_from_all_tokens_and_is_right_in_the_mean() -> None:
    model = sourced()
    delta = deltas(combined(model, pt.ScaLearn(sources=NAMES, dropout=0.3)))[0]
    v = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(0))
    delta.eval()
    still = delta(v, v)
    assert torch.equal(still, delta(v, v))
    torch.manual_seed(0)
    delta.train()
    with torch.no_grad():
        mean = sum(delta(v, v) for _ in range(8000)) / 8000
    assert float((mean - still).detach().norm() / still.detach().norm()) < 0.02
    same = v[:1, :1].expand(2, 5, D)
    dropped = delta(same, same)
    torch.testing.assert_close(dropped, dropped[:1, :1].expand_as(dropped), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("init_scale", [2.0, 1.0])
def test_scales_start_around_their_share(init_scale: float) -> None:
    tuned = combined(sourced(), pt.ScaLearn(sources=NAMES, init_scale=init_scale))
    omega = torch.stack([delta.scales() for delta in deltas(tuned)]).detach()
    assert abs(float(omega.mean()) - init_scale / 3) < 1e-3
    assert 5e-4 < float(omega.std()) < 2e-3
    assert omega.dtype == torch.float32


def test_a_transfer_file_holds_a_number_for_each_source_and_the_head(tmp_path: Path) -> None:
    model, batch = sourced(), tiny.batch("bert")
    tuned = combined(model, pt.ScaLearn(sources=NAMES, granularity="scalar", share_layers=True, dropout=0.0))
    toys.shake(tuned, 0.3)
    path = tuned.save(tmp_path / "target.petiole.safetensors")
    stored, _ = load_adaptation(path)
    own = {name: tensor.numel() for name, tensor in stored.items() if not name.startswith("-1.")}
    assert own == {f"0.shared:omega_{name}": 1 for name in NAMES}
    assert len(stored) == len(own) + 2  # weight and bias of the head
    wanted = model(**batch).logits
    tuned.detach()
    loaded = pt.load(model, path, name="again")
    assert torch.equal(model(**batch).logits, wanted)
    assert loaded.methods == tuned.methods


# -------------------------------------------------------------------------------------------------------- what is refused


def test_other_sources_are_found_out_on_load(tmp_path: Path) -> None:
    model = sourced()
    path = combined(model).save(tmp_path / "target.petiole.safetensors")
    bare = copy.deepcopy(toys.model("bert"))
    with pytest.raises(FileError, match="no adaptation is called 'mnli'"):
        pt.load(bare, path)
    with torch.no_grad():
        pt.adaptations(model)["rte"].slots[0].delta.up.weight[0, 0] += 1
    with pytest.raises(FileError, match="built from another source rte"):
        pt.load(model, path, name="again")


def test_a_copy_of_the_sources_acts() -> None:
    model = sourced()
    combined(model)
    before = hidden(model)
    for name in NAMES:
        pt.adaptations(model)[name].detach()
    assert torch.equal(hidden(model), before)


def test_sources_of_another_backbone_are_refused(tmp_path: Path) -> None:
    path = pt.attach(copy.deepcopy(toys.model("bert")), source()).save(tmp_path / "rte.petiole.safetensors")
    other = copy.deepcopy(toys.model("bert"))
    with torch.no_grad():
        other.get_input_embeddings().weight.add_(0.1)
    with pytest.raises(FileError, match="another backbone"):
        pt.load(other, path, name="rte")
    model = sourced()
    pt.adaptations(model)["rte"].mark = pt.attach(other, source()).mark
    with pytest.raises(AttachError, match="'rte' is of another backbone"):
        combined(model)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (source(4, "sequential"), "different places"),
        (source(4, layers=(0,)), "different places"),
        (pt.HoulsbyAdapter(bottleneck=4), "bottlenecks at ffns alone"),
        (pt.LoRA(rank=2), "bottlenecks at ffns alone"),
        (pt.BitFit(), "not made of adapters alone"),
    ],
)
@pytest.mark.parametrize("method_class", [pt.ScaLearn, pt.AdapterFusion])
def test_unlike_sources_are_refused(method: pt.Method, message: str, method_class: type[pt.Method]) -> None:
    model = sourced()
    pt.attach(model, method, name="odd")
    before = toys.snapshot(model)
    with pytest.raises(AttachError, match=message):
        combined(model, method_class(sources=("mnli", "odd")))
    assert toys.snapshot(model) == before


def test_other_activations_are_refused() -> None:
    model = sourced(method=pt.PfeifferAdapter(bottleneck=4))
    pt.attach(model, pt.PfeifferAdapter(bottleneck=4, activation="tanh"), name="odd")
    with pytest.raises(AttachError, match="another activation"):
        combined(model, pt.ScaLearn(sources=("mnli", "odd")))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sources": ()}, "at least 1"),
        ({"sources": ("a", "a")}, "'a' stands twice"),
        ({"dropout": 1.0}, "less than 1"),
        ({"sources": ("a", "b"), "constants": (1.0,)}, "1 constants for 2 sources"),
    ],
)
def test_values_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pt.ScaLearn(**fields)


def test_scales_that_cancel_have_no_mean() -> None:
    model = sourced()
    tuned = combined(model, pt.ScaLearn(sources=("mnli", "rte"), normalize="mean"))
    set_scales(tuned, {"mnli": 1.0, "rte": -1.0})
    with pytest.raises(AttachError, match="normalize='mean'"):
        hidden(model)


# --------------------------------------------------------------------------------------------------------- and the options


def test_normalised_scales_add_up_to_one() -> None:
    for how in ("mean", "softmax"):
        delta = deltas(combined(sourced(), pt.ScaLearn(sources=NAMES, normalize=how)))[0]
        torch.testing.assert_close(delta.scales().sum(0), torch.ones(D))


def test_a_penalty_is_part_of_the_loss() -> None:
    for norm, power in (("l1", 1), ("l2", 2)):
        tuned = combined(sourced(), pt.ScaLearn(sources=NAMES, penalty=0.1, penalty_norm=norm))
        set_scales(tuned, {"mnli": -0.5, "rte": 1.0, "sst": 2.0})
        (term,) = tuned.loss_terms()
        assert float(term.detach()) == pytest.approx(0.1 * LAYERS * D * (0.5**power + 1 + 2**power))


def test_constants_leave_the_head_alone_to_train() -> None:
    model = sourced()
    tuned = combined(model, pt.ScaLearn(sources=("mnli", "rte"), constants=(0.25, 0.75), granularity="scalar"))
    assert all(name.startswith("-1.") for name, p in tuned.named_parameters() if p.requires_grad)
    torch.testing.assert_close(deltas(tuned)[0].scales(), torch.tensor([[0.25], [0.75]]))


def test_the_head_is_a_fresh_copy() -> None:
    model = sourced()
    tuned = combined(model)
    own = next(slot.delta for slot in tuned.slots if slot.number < 0)
    theirs = next(slot.delta for slot in pt.adaptations(model)["mnli"].slots if slot.number < 0)
    assert not torch.equal(own.module.weight, theirs.module.weight)
    assert torch.equal(own.module.weight, toys.model("bert").classifier.weight)  # type: ignore[union-attr]


@pytest.mark.parametrize("method_class", [pt.ScaLearn, pt.AdapterFusion])
@pytest.mark.parametrize("family", ["gpt2", "vit", "t5"])
def test_sequential_sources_serve_pre_norm_models(method_class: type[pt.Method], family: str) -> None:
    model = sourced(family, method=pt.PfeifferAdapter(bottleneck=4))
    tuned = combined(model, method_class(sources=NAMES, dropout=0.0))
    tuned.check(tiny.batch(family))


def test_no_stack_of_all_sources_is_kept_for_backward() -> None:
    """What is kept grows by the middle activations of a source, T r, not by its outputs, T d."""
    kept: dict[int, int] = {}
    for n in (2, 3):
        model = sourced(names=NAMES[:n], method=source(2))
        delta: Scaled = deltas(combined(model, pt.ScaLearn(sources=NAMES[:n])))[0]
        v = torch.randn(1, 100, D, requires_grad=True)
        sizes = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel() if tensor.shape[:2] == (1, 100) else 0)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            delta(v, v)
        kept[n] = sum(sizes)
    assert kept[3] - kept[2] <= 2 * 100 * 2  # before and after ReLU


# ----------------------------------------------------------------------------------------------------------- AdapterFusion


def test_fusion_is_attention_over_whole_keys_and_values() -> None:
    """The products in the adapters' middle against the formula with a (B, T, n, d) stack."""
    model = sourced().double()
    tuned = combined(model, pt.AdapterFusion(sources=NAMES))
    toys.shake(tuned, 0.3)
    delta: Fused = deltas(tuned)[0].double()
    v = torch.randn(2, 5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    norm = model.get_submodule(delta.closing)
    a = torch.stack([pt.adaptations(model)[name].slots[0].delta(v, v) for name in NAMES], 2)
    u = nn.functional.layer_norm(v, (D,), norm.weight, norm.bias, norm.eps)  # type: ignore[arg-type]
    p = (delta.query(u).unsqueeze(2) * delta.key(a)).sum(-1).softmax(-1)
    assert delta.value is not None
    torch.testing.assert_close(delta(v, v), (p.unsqueeze(-1) * delta.value(a)).sum(2), rtol=1e-9, atol=1e-9)


def test_fusion_keeps_its_values_near_the_identity() -> None:
    tuned = combined(sourced(), pt.AdapterFusion(sources=NAMES))
    value = deltas(tuned)[0].value.weight
    assert float(value.diagonal().min()) == 1 and float((value - torch.eye(D)).max()) == pytest.approx(1e-6)
    with torch.no_grad():
        value[0, 0] = 3.0
    (term,) = tuned.loss_terms()
    assert float(term.detach()) == pytest.approx(0.01 * 4, rel=1e-4)
    assert combined(sourced(), pt.AdapterFusion(sources=NAMES, value=False)).loss_terms() == []


# ------------------------------------------------------------------------- what every method must hold, which a bare backbone can't show

BOTH = (pt.ScaLearn(sources=NAMES, dropout=0.0), pt.AdapterFusion(sources=NAMES))


@pytest.mark.parametrize("method", BOTH)
def test_checkpointing_changes_no_gradient(method: pt.Method) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = sourced().train()
        tuned = combined(model, method)
        if checkpointing:
            model.gradient_checkpointing_enable()  # type: ignore[operator]
        model(**tiny.batch("bert")).loss.backward()
        gradients.append([p.grad for p in tuned.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("method", BOTH)
def test_half_precision_follows_full_precision(method: pt.Method) -> None:
    model, batch = sourced(), tiny.batch("bert")
    combined(model, method)
    wanted = model(**batch).logits
    with torch.autocast("cpu", torch.bfloat16):
        found = model(**batch)
    found.loss.backward()
    torch.testing.assert_close(found.logits.float(), wanted, rtol=0.05, atol=0.05)
    half = copy.deepcopy(toys.model("bert")).to(torch.bfloat16)
    for seed, name in enumerate(NAMES):
        toys.shake(pt.attach(half, source(4 + seed), name=name, seed=seed), 0.3)
    tuned = combined(half, method, train_head=False)
    assert {p.dtype for p in tuned.parameters()} == {torch.float32}
    found = half(**batch)
    found.loss.backward()
    torch.testing.assert_close(found.logits.float(), wanted, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("method", BOTH)
def test_rows_take_the_transfer_or_a_source(method: pt.Method) -> None:
    model, batch = sourced(), tiny.batch("bert")
    combined(model, method)
    with pt.route(model, ["mnli", "target"]):
        rows = model(**batch).logits
    for row, name in enumerate(("mnli", "target")):
        with pt.route(model, name):
            torch.testing.assert_close(rows[row], model(**batch).logits[row], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", BOTH)
def test_detaching_leaves_the_sources(method: pt.Method) -> None:
    model, batch = sourced(), tiny.batch("bert")
    pt.activate(model, "rte")
    wanted = model(**batch).logits
    combined(model, method).detach()
    pt.activate(model, "rte")
    assert torch.equal(model(**batch).logits, wanted)
