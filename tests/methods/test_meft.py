"""What MEFT must hold, by the numbers of its specification."""

from __future__ import annotations

import copy
import gc
import math
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petiole as pt
import tiny
import toys
from petiole import cost
from petiole.errors import AttachError, ConfigError
from petiole.method import Place
from petiole.methods.adapters.bottleneck import Bottleneck
from petiole.methods.execution.reversible import Reversible, Run, auto_anchors, reconstruction_error

VARIANTS = (1, 2, 3)
Gradients = dict[str, Tensor]


def bert(layers: int = 4, double: bool = True, /, **fields: Any) -> nn.Module:
    model = toys.model("bert", num_hidden_layers=layers, **fields)
    return model.double() if double else model


def attached(model: nn.Module, /, **fields: Any) -> pt.Adaptation:
    """Moved as if trained, in the model's own precision."""
    dtype = next(model.parameters()).dtype
    tuned = pt.attach(model, pt.MEFT(**{"bottleneck": 3, "dropout": 0.0, **fields}))
    model.to(dtype)
    toys.shake(tuned, 0.05)
    model.train()
    return tuned


def gradients(model: nn.Module, tuned: pt.Adaptation, seed: int = 0, **batch: Any) -> tuple[float, Gradients]:
    torch.manual_seed(seed)
    loss = model(**{**tiny.batch("bert"), **batch}).loss
    for parameter in tuned.parameters():
        parameter.grad = None
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in tuned.named_parameters() if p.grad is not None}


def worst(found: Gradients, wanted: Gradients) -> float:
    """The largest relative error; a gradient far below 1e-6 is rounding (of a bias on keys, say)."""
    assert found.keys() == wanted.keys()
    return max(float((found[n] - g).abs().max() / g.abs().max().clamp_min(1e-6)) for n, g in wanted.items())


def both(layers: int, double: bool = True, /, model: Any = None, **fields: Any) -> float:
    """The worst relative error of a gradient against ordinary autograd on the same two streams."""
    pairs = []
    for count in (None, 0):
        made = bert(layers, double, **(model or {}))
        tuned = attached(made, **{**fields, "num_reversible": count})
        pairs.append(gradients(made, tuned))
    assert pairs[0][0] == pairs[1][0]
    return worst(pairs[0][1], pairs[1][1])


# 1
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "vit", "t5", "opt"])
def test_the_forward_pass_is_the_plain_loop_bit_for_bit(family: str, variant: int) -> None:
    stack = "encoder" if family == "t5" else None
    model = toys.model(family)
    attached(model, variant=variant, stack=stack)
    torch.manual_seed(0)
    found = toys.first(model(**tiny.batch(family)))
    assert found.requires_grad
    assert torch.equal(found, toys.output(model, tiny.batch(family)))


def test_the_forward_pass_is_the_formula() -> None:
    model = bert(3)
    tuned = attached(model, variant=1)
    stand_ins = [s.delta for s in tuned.slots if isinstance(s.delta, Reversible)]
    h = torch.randn(2, 5, 32, dtype=torch.float64)
    x1 = x2 = h
    with torch.no_grad():
        for delta, block in zip(stand_ins, model.bert.encoder.layer, strict=True):
            y1 = 0.1 * x1 + block.block(x2)
            y2 = x2 + delta.adapter(y1)
            x1, x2 = y2, y1
    assert torch.equal(model.bert.encoder(h).last_hidden_state, (x1 + x2) / 2)


# 2
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_in_double_precision(variant: int) -> None:
    for every in ("auto", None, 1, 3):
        assert both(4, variant=variant, anchor_every=every) <= 1e-9, every


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_in_single_precision_with_anchors(variant: int) -> None:
    assert both(12, False, variant=variant) <= 1e-3


def test_without_anchors_single_precision_is_lost_with_depth() -> None:
    """What anchors are for: if this held without them, they would be no use."""
    assert both(12, False, variant=1, anchor_every=None) > 1e-2


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_with_dropout_use_the_recorded_numbers(variant: int) -> None:
    rates = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
    assert both(3, model=rates, variant=variant, dropout=0.3) <= 1e-9


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gradient_of_the_input(variant: int) -> None:
    found = []
    for count in (None, 0):
        model = bert(3)
        attached(model, variant=variant, num_reversible=count)
        h = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        model.bert.encoder(h).last_hidden_state.square().sum().backward()
        found.append(h.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


# 3
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_inverse_undoes_the_step(variant: int) -> None:
    model = bert(1)
    (delta,) = (s.delta for s in attached(model, variant=variant).slots if isinstance(s.delta, Reversible))
    block = model.bert.encoder.layer[0].block
    pair = torch.randn(2, 2, 5, 32, dtype=torch.float64).unbind()
    with torch.no_grad():
        f, g = (lambda x, part=part: part(block, lambda h: ((h,), {}), x) for part in (delta.f, delta.g))
        there = delta.step(f, g, pair, torch.float64)[0]
        back = delta.inverse(f, g, there, torch.float64)
    for found, wanted in zip(back, pair, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


# 4
@pytest.mark.parametrize("family", ["bert", "gpt2", "vit", "llama", "opt", "modernbert", "torch_encoder"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_without_adapters_a_stream_is_the_backbone(family: str, variant: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, wanted = tiny.batch(family), []
    model = toys.model(family).eval()
    for block in pt.anatomy(model).stack().blocks:
        model.get_submodule(block.path).register_forward_hook(
            lambda m, a, output: wanted.append(output[0] if isinstance(output, tuple) else output)
        )
    toys.output(model, batch)

    model, pairs = toys.model(family).eval(), []
    for slot in pt.attach(model, pt.MEFT(variant=variant, num_reversible=0, dropout=0.0)).slots:
        if isinstance(slot.delta, Reversible):
            line = slot.delta.line
            line.lam, line.beta = {1: (0.0, 1.0), 2: (1.0, 0.0), 3: (0.0, 0.0)}[variant]
        for parameter in slot.delta.parameters():
            parameter.data.zero_()
    hand_on = Run.hand_on
    monkeypatch.setattr(Run, "hand_on", lambda run, *more: (pairs.append(run.pair), hand_on(run, *more))[1])
    toys.output(model, batch)
    for pair, h in zip(pairs, wanted, strict=True):
        torch.testing.assert_close(pair[0 if variant == 2 else 1], h, rtol=1e-5, atol=1e-5)


# 5
@pytest.mark.parametrize("variant", VARIANTS)
def test_counts_at_the_papers_sizes(variant: int) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig())
    tuned = pt.attach(model, pt.MEFT(variant=variant), train_head=False)
    assert tuned.trainable == 313_536 == 12 * 2 * (2 * 768 * 8 + 8 + 768)
    tuned.detach()
    if variant != 3:
        tuned = pt.attach(model, pt.MEFT(variant=variant, adapter_layernorm=True), train_head=False)
        assert tuned.trainable == 313_536 + 12 * 2 * 768


def test_what_is_left_open_is_the_papers_and_the_models() -> None:
    assert [pt.MEFT(variant=v).scales for v in VARIANTS] == [(0.1, 1.0), (1.0, 0.1), (0.1, 0.1)]
    model = tiny.model("llama")
    for slot in pt.attach(model, pt.MEFT()).slots:
        adapter = getattr(slot.delta, "adapter", slot.delta)
        if isinstance(adapter, Bottleneck):
            assert (adapter.activation, adapter.dropout.p) == ("silu", 0.0)
            for matrix in (adapter.down.weight, adapter.up.weight):
                assert 0.01 < float(matrix.detach().std()) < 0.03
    tuned = pt.attach(tiny.model("bert", hidden_act="gelu_new", hidden_dropout_prob=0.25), pt.MEFT())
    adapter = next(s.delta for s in tuned.slots if isinstance(s.delta, Bottleneck))
    assert (adapter.activation, adapter.dropout.p) == ("gelu_tanh", 0.25)


def test_automatic_anchors() -> None:
    assert [auto_anchors(*pt.MEFT(variant=v).scales) for v in VARIANTS] == [4, 4, 2]
    assert auto_anchors(1.0, 1.0) is None and auto_anchors(1.0, -2.0) is None
    assert [auto_anchors(*pt.MEFT(variant=v).scales, half=True) for v in VARIANTS] == [2, 2, 1]


# 6
def kept(layers: int, **fields: Any) -> int:
    """Bytes saved for backward without those that the model saves around its blocks."""
    model = bert(layers, False)
    attached(model, **fields)
    return cost.saved_bytes(model, tiny.batch("bert"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_bytes_do_not_grow_with_depth(variant: int) -> None:
    pair = 2 * tiny.BATCH * tiny.LENGTH * 32 * 4  # bytes of both streams
    one = kept(1, variant=variant, anchor_every=None)
    assert kept(8, variant=variant, anchor_every=None) == one
    for layers, every in ((8, 4), (9, 4), (5, 2)):
        assert kept(layers, variant=variant, anchor_every=every) - one == pair * (math.ceil(layers / every) - 1)
    ordinary = [kept(layers, variant=variant, num_reversible=0) for layers in (4, 8)]
    assert ordinary[1] > 1.8 * ordinary[0] > 4 * one


def test_what_is_saved_is_predicted_without_weights() -> None:
    model = bert(5, False)
    attached(model)
    with torch.device("meta"):
        twin = tiny.model("bert", num_hidden_layers=5)
    pt.attach(twin, pt.MEFT(bottleneck=3, dropout=0.0))
    found, predicted = (
        cost.measure(model, tiny.batch("bert"), repeats=1, warmup=0),
        cost.predict(twin, tiny.batch("bert")),
    )
    assert (found.saved_bytes, found.step_flops) == (predicted.saved_bytes, predicted.step_flops)


@pytest.mark.parametrize("count", [None, 2])
def test_nothing_is_left_after_a_step(count: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cycle, which would hold the streams until the collector comes by."""
    model, runs = bert(3), []
    tuned = attached(model, num_reversible=count)
    joined = Run.joined
    monkeypatch.setattr(Run, "joined", lambda run: (runs.append(weakref.ref(run)), joined(run))[1])
    gc.disable()
    try:
        gradients(model, tuned)
        assert len(runs) == 1 and runs[0]() is None
    finally:
        gc.enable()


# 7
def test_the_backbone_is_left_alone() -> None:
    model = bert(3)
    model.bert.embeddings.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    tuned = attached(model)
    own = {id(p) for p in tuned.parameters()}
    gradients(model, tuned)
    assert all(p.grad is None and not p.requires_grad for p in model.parameters() if id(p) not in own)
    tuned.detach()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


# 8
@pytest.mark.parametrize(
    "fields", [{"num_reversible": 0}, {"num_reversible": 2}, {"num_reversible": 3, "anchor_every": 1}]
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_any_depth_gives_the_same(fields: dict[str, Any], variant: int) -> None:
    found = []
    for more in ({}, fields):
        model = bert(4)
        found.append(gradients(model, attached(model, variant=variant, **more)))
    assert found[0][0] == found[1][0]
    assert worst(found[1][1], found[0][1]) <= 1e-6


def test_ordinary_blocks_below_have_no_adapters_and_keep_nothing() -> None:
    model = bert(4, False)
    tuned = attached(model, num_reversible=2, freeze_below=True)
    assert {s.site.depth for s in tuned.slots if s.number >= 0} == {2, 3}
    assert tuned.trainable - kept_head(tuned) == 2 * 2 * (2 * 32 * 3 + 3 + 32)
    assert cost.saved_bytes(model, tiny.batch("bert")) == kept(2)
    tuned.check(tiny.batch("bert"))


def kept_head(tuned: pt.Adaptation) -> int:
    return sum(p.numel() for s in tuned.slots if s.number < 0 for p in s.delta.parameters())


# 9
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_generator_ends_where_ordinary_training_leaves_it(variant: int) -> None:
    states = []
    for count in (None, 0):
        model = bert(3, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
        tuned = attached(model, variant=variant, dropout=0.2, num_reversible=count)
        gradients(model, tuned)
        gradients(model, tuned, seed=5)
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1])


# 10
def test_gradients_add_up_over_micro_batches() -> None:
    model = bert(3)
    tuned = attached(model)
    separate = []
    for seed in (0, 1):
        ids = torch.randint(tiny.VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(seed))
        separate.append((ids, gradients(model, tuned, input_ids=ids)[1]))
    for parameter in tuned.parameters():
        parameter.grad = None
    for ids, _ in separate:
        model(**{**tiny.batch("bert"), "input_ids": ids}).loss.backward()
    for name, parameter in tuned.named_parameters():
        torch.testing.assert_close(parameter.grad, separate[0][1][name] + separate[1][1][name])


# ---------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"lam": 0.0}, "divides"), ({"beta": 0.0}, "divides"), ({"lam": math.inf}, "finite"), ({"variant": 4}, "1, 2 or 3"),
        ({"bottleneck": 0}, "1"), ({"anchor_every": 0}, "1 block"), ({"num_reversible": -1}, "0"),
        ({"variant": 3, "adapter_layernorm": True}, "variant 3"), ({"freeze_below": True, "num_reversible": 0}, "at least 1"),
    ],
)  # fmt: skip
def test_refuses(fields: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        pt.MEFT(**fields)


def test_warns_where_rounding_grows_fast() -> None:
    with pytest.warns(UserWarning, match=r"lam = 0\.01"):
        pt.MEFT(lam=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pt.MEFT(lam=0.05, beta=-0.05)


def test_refuses_more_blocks_than_there_are() -> None:
    with pytest.raises(ConfigError, match="has 0 to 2 blocks"):
        pt.attach(tiny.model("bert"), pt.MEFT(num_reversible=3))


@pytest.mark.parametrize(
    ("family", "variant", "word"),
    [("swin", 1, "one width"), ("albert", 1, "each once"), ("t5", 3, "cross_attention"), ("gpt_neox", 3, "block's input"), ("bloom", 3, "residual"),
     ("llava", 1, "between these blocks")],
)  # fmt: skip
def test_refuses_backbones(family: str, variant: int, word: str) -> None:
    model = tiny.model(family)
    with pytest.raises(AttachError, match=word):
        pt.attach(model, pt.MEFT(variant=variant))
        model(**tiny.batch(family))


@pytest.mark.skipif(bool(tiny.missing("unet")), reason="diffusers is not installed")
def test_refuses_images_as_hidden_states() -> None:
    with pytest.raises(AttachError, match="is an image"):
        pt.attach(tiny.model("unet"), pt.MEFT(stack="mid"))


def test_refuses_what_would_lose_gradients() -> None:
    model = toys.model("llama")
    attached(model)
    for asked in ({"output_hidden_states": True}, {"output_attentions": True}, {"use_cache": True}):
        with pytest.raises(AttachError, match=next(iter(asked))):
            model(**tiny.batch("llama"), **asked)
        with torch.no_grad():
            model(**tiny.batch("llama"), **asked)


def test_refuses_hooks_on_hidden_states() -> None:
    for inside in (False, True):
        model = bert(3)
        tuned = attached(model)
        block = model.bert.encoder.layer[1]
        handle = (block.block if inside else block).register_forward_hook(lambda m, a, h: 2 * h)
        with pytest.raises(AttachError, match="hook"):
            gradients(model, tuned)
        handle.remove()
        gradients(model, tuned)


def test_refuses_a_loss_of_an_intermediate_hidden_state() -> None:
    model, seen = bert(3), []
    attached(model)
    model.bert.encoder.layer[1].register_forward_hook(lambda m, a, h: seen.append(h))
    model(**tiny.batch("bert"))
    with pytest.raises(AttachError, match="between two reversible blocks"):
        seen[0].sum().backward()


class Odd(nn.Module):
    """In a linear's place: does not compute the same twice, or writes over the block's input."""

    def __init__(self, inner: nn.Module, kind: str) -> None:
        super().__init__()
        self.inner, self.kind, self.calls = inner, kind, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.add_(1) if self.kind == "in place" else self.inner(x) * self.calls


@pytest.mark.parametrize(("kind", "word"), [("counts", "runs again"), ("in place", "in place")])
def test_refuses_blocks_that_can_not_be_run_again(kind: str, word: str) -> None:
    model = bert(2)
    attention = model.bert.encoder.layer[0].attention.self
    attention.query = Odd(attention.query, kind)
    found = pt.anatomy(bert(2))
    tuned = pt.attach(model, pt.MEFT(), found=found)
    with pytest.raises(AttachError, match=word):
        gradients(model.double().train(), tuned)


def test_refuses_skipped_blocks() -> None:
    model = bert(3)
    attached(model)
    layers = model.bert.encoder.layer
    h = layers[0](torch.randn(2, 5, 32, dtype=torch.float64))
    with pytest.raises(AttachError, match="one after the other"):
        layers[2](h)


def test_refuses_two_that_train_at_once() -> None:
    model = bert(2)
    pt.attach(model, pt.MEFT(), name="a")
    second = pt.attach(model, pt.MEFT(), name="b")
    model.double().train()
    gradients(model, second)
    pt.activate(model, "a", "b")
    with pytest.raises(AttachError, match="in vain"):
        gradients(model, second)


# ----------------------------------------------------------------------------------------------------------------- and around


def test_streams_are_kept_in_single_precision() -> None:
    model = toys.model("bert", num_hidden_layers=6)
    tuned = pt.attach(model, pt.MEFT(bottleneck=3, dropout=0.0))
    toys.shake(tuned, 0.02)
    model.train()
    wanted = gradients(model, tuned)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(0)
        loss = model(**tiny.batch("bert")).loss
    for parameter in tuned.parameters():
        parameter.grad = None
    loss.backward()  # outside of autocast, whose state is brought back
    for name, parameter in tuned.named_parameters():
        assert float((parameter.grad - wanted[name]).norm() / wanted[name].norm()) < 0.15, name


def test_the_way_back_is_measured() -> None:
    model = bert(12, False)
    tuned = attached(model, anchor_every=None)
    batch, state = tiny.batch("bert"), torch.get_rng_state()
    lost = reconstruction_error(tuned, batch)
    assert list(lost) == [f"encoder.{n}" for n in range(12)] and torch.equal(torch.get_rng_state(), state)
    assert lost["encoder.11"] < 1e-4 < lost["encoder.0"]
    tuned.detach()
    kept = reconstruction_error(attached(model), batch)
    assert max(kept.values()) < 1e-2 * lost["encoder.0"]
    model.double()
    assert max(reconstruction_error(next(iter(pt.adaptations(model).values())), batch).values()) < 1e-9
    with pytest.raises(AttachError, match="no reversible"):
        reconstruction_error(pt.attach(tiny.model("bert"), pt.LoRA()), batch)


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize("variant", [1, 2])
def test_encoder_and_decoder_with_what_blocks_hand_on(family: str, variant: int) -> None:
    """Position biases and the encoder's states reach the decoder, and the gradient finds its way back through both."""
    found = []
    for count in (None, 0):
        model = toys.model(family).double()
        tuned = attached(model, variant=variant, num_reversible=count)
        torch.manual_seed(0)
        model(**tiny.batch(family)).loss.backward()
        found.append({name: p.grad for name, p in tuned.named_parameters() if p.grad is not None})
    assert any("encoder" in name for name in found[0])
    assert worst(found[0], found[1]) < 1e-9


def test_other_methods_train_inside_and_shared_ones_too() -> None:
    found = []
    for count in (None, 0):
        model = bert(3)
        methods = [pt.MEFT(bottleneck=3, dropout=0.0, num_reversible=count), pt.MoS(dropout=0.0), pt.BitFit()]
        tuned = pt.attach(model, methods)
        model.double().train()
        toys.shake(tuned, 0.05)
        found.append(gradients(model, tuned)[1])
    assert any("shared" in name for name in found[0]) and any("own:" in name for name in found[0])
    assert worst(found[0], found[1]) < 1e-9


def test_a_context_holds_on_the_way_back() -> None:
    model = bert(3)

    class Given(Bottleneck):
        def forward(self, h: Tensor) -> Tensor:
            return super().forward(h) * self.given("factor")

    tuned = pt.attach(
        model,
        [
            pt.MEFT(dropout=0.0),
            toys.method(lambda a: [Place(s.at("output"), Given(32, 3, init="bert")) for s in a.sites(["attention"])]),
        ],
    )
    model.double().train()
    with pt.given(model, factor=3.0):
        loss = model(**tiny.batch("bert")).loss
    loss.backward()
    wanted = {name: p.grad.clone() for name, p in tuned.named_parameters() if p.grad is not None}
    with pt.given(model, factor=3.0):
        assert worst(gradients(model, tuned)[1], wanted) < 1e-12


def test_a_model_in_training_goes_compiled() -> None:
    model = bert(3)
    tuned = attached(model)
    wanted = gradients(model, tuned)[1]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    assert worst(gradients(compiled, tuned)[1], wanted) < 1e-9
    torch._dynamo.reset()


def test_copies_train_alone() -> None:
    model = bert(3)
    tuned = attached(model)
    wanted = gradients(model, tuned)[1]
    twin = copy.deepcopy(model)
    own = pt.adaptations(twin)["default"]
    assert worst(gradients(twin, own)[1], wanted) == 0
    lines = [{id(s.delta.line) for s in each.slots if isinstance(s.delta, Reversible)} for each in (own, tuned)]
    assert len(lines[0] | lines[1]) == 2


@pytest.mark.loopback
@pytest.mark.parametrize("variant", VARIANTS)
def test_under_ddp_each_gradient_is_ready_once(variant: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reducer refuses a parameter that is ready twice, and waits for one that never is."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    model = bert(3)
    tuned = attached(model, variant=variant, num_reversible=2)
    wanted = gradients(model, tuned)[1]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(model)
        for _ in range(2):
            assert worst(gradients(parallel, tuned)[1], wanted) == 0
    finally:
        dist.destroy_process_group()
