"""Cost: figures against formulas worked out by hand, against the allocator's own record, and against themselves."""

from __future__ import annotations

import copy
import gc
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from petiole import cost
from petiole.errors import AttachError, ConfigError, TrainingError

B, T, D, F, L, H, C, V = 3, 7, 32, 64, 2, 2, 5, 50  # batch, tokens, width, ffn, layers, heads, classes, vocabulary
SIZES: dict[str, Any] = {
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": L,
    "num_attention_heads": H,
}
FLOAT = 4


def padded(tokens: Tensor) -> Tensor:
    """A mask with a hole: one without is dropped by Transformers, which only shows in its values."""
    mask = torch.ones_like(tokens)
    mask[:1, -2:] = 0
    return mask


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    tokens = torch.randint(1, V, (B, T))
    model = BertForSequenceClassification(BertConfig(vocab_size=V, num_labels=C, **SIZES))
    return model, {"input_ids": tokens, "attention_mask": padded(tokens), "labels": torch.arange(B)}


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=C, **SIZES))
    return model, {"pixel_values": torch.randn(B, 3, 8, 8), "labels": torch.arange(B)}


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    sizes = {"n_embd": D, "n_layer": L, "n_head": H, "n_positions": 16}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=V, bos_token_id=0, eos_token_id=0, **sizes))
    tokens = torch.randint(1, V, (B, T))
    return model, {"input_ids": tokens, "labels": tokens}


def t5() -> tuple[nn.Module, dict[str, Tensor]]:
    sizes = {"d_model": D, "d_kv": D // H, "d_ff": F, "num_layers": L, "num_heads": H}
    model = T5ForConditionalGeneration(T5Config(vocab_size=V, decoder_start_token_id=0, **sizes))
    tokens = torch.randint(1, V, (B, T))
    return model, {"input_ids": tokens, "attention_mask": padded(tokens), "labels": tokens}


def resnet() -> tuple[nn.Module, dict[str, Tensor]]:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    model = ResNetForImageClassification(ResNetConfig(num_labels=C, **sizes))
    return model, {"pixel_values": torch.randn(B, 3, 32, 32), "labels": torch.arange(B)}


def moe(tokens: int = 8) -> tuple[nn.Module, dict[str, Tensor]]:
    config = MixtralConfig(vocab_size=V, num_key_value_heads=H, num_local_experts=4, num_experts_per_tok=2, **SIZES)
    ids = torch.randint(1, V, (B, tokens))
    return MixtralForCausalLM(config).bfloat16(), {"input_ids": ids, "labels": ids}


def weightless(build: Any) -> nn.Module:
    """The same model on the meta device. (Moving it there would untie its tied weights.)"""
    with torch.device("meta"):
        return build()[0]


BUILDERS = [bert, vit, gpt2, t5, resnet, moe]
every_family = pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)


def summed(output: Tensor) -> Tensor:
    return output.sum()


def figures(found: cost.Cost) -> dict[str, Any]:
    """All but what a clock says."""
    return {k: v for k, v in found.to_dict().items() if not k.endswith(("_seconds", "_repeats"))}


class LowRank(nn.Module):
    """A frozen linear with a low-rank change beside it, as a delta sits: a child named `petiole`."""

    def __init__(self, size: int = D, rank: int = 4) -> None:
        super().__init__()
        self.base = nn.Linear(size, size).requires_grad_(False)
        self.petiole = nn.Sequential(nn.Linear(size, rank, bias=False), nn.Linear(rank, size, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.petiole(x)


# ------------------------------------------------------------------------------------------------------------ counting


def test_count_separates_what_trains_what_is_stored_and_what_is_the_head() -> None:
    model = nn.ModuleDict({"body": LowRank(), "score": nn.Linear(D, C)})
    delta = model["body"].petiole
    delta[0].requires_grad_(False)  # a frozen factor is stored, but does not train
    delta.register_buffer("index", torch.zeros(9, dtype=torch.int64))
    delta.register_buffer("scratch", torch.zeros(100), persistent=False)
    found = cost.count(model, heads=["score"])
    low, head = 4 * D, D * C + C
    assert found == cost.Parameters(
        trainable=low + head,
        total=D * D + D + 2 * low + head,
        stored=2 * low + head + 9,
        head=head,
        deltas=2 * low,
        stored_bytes=FLOAT * (2 * low + head) + 8 * 9,
    )
    assert found.backbone == D * D + D + head
    assert found.share == pytest.approx((low + head) / (D * D + D + head))


def test_count_takes_a_frozen_head_for_no_head() -> None:
    model = nn.ModuleDict({"score": nn.Linear(D, C).requires_grad_(False)})
    assert cost.count(model, heads=["score"]).head == 0


def test_count_takes_a_trained_copy_of_the_head_for_the_head() -> None:
    head = nn.Linear(D, C).requires_grad_(False)
    head.petiole = nn.Linear(D, C)
    found = cost.count(nn.ModuleDict({"score": head}), heads=["score"])
    assert (found.head, found.deltas, found.backbone) == (D * C + C,) * 3


def test_count_finds_the_head_by_itself() -> None:
    model, _ = bert()
    assert cost.count(model).head == D * C + C
    assert cost.count(nn.Linear(D, C)).head == 0  # no stack of blocks, so nothing to tell a head from


def test_count_does_not_take_a_prefix_of_a_name_for_the_path() -> None:
    model = nn.ModuleDict({"score": nn.Linear(D, C), "scores": nn.Linear(D, C)})
    assert cost.count(model, heads=["score"]).head == D * C + C


def test_count_counts_tied_and_shared_tensors_once() -> None:
    model, _ = gpt2()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert cost.count(model, heads=()).total == sum(p.numel() for p in model.parameters())
    one = nn.Linear(D, D)
    shared = nn.ModuleList([one, one])
    assert cost.count(shared, heads=()).total == D * D + D


def test_count_counts_two_parameters_on_one_memory_once() -> None:
    left, right = nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)
    right.weight = nn.Parameter(left.weight.data)
    assert right.weight is not left.weight
    assert cost.count(nn.ModuleList([left, right]), heads=()).total == D * D


def test_count_keeps_a_backbone_weight_that_a_delta_refers_to_in_the_backbone() -> None:
    model = LowRank()
    model.petiole.reference = model.base.weight
    found = cost.count(model, heads=())
    assert (found.deltas, found.stored) == (2 * 4 * D, 2 * 4 * D)


@every_family
def test_count_is_the_same_on_the_meta_device(build: Any) -> None:
    model, _ = build()
    assert cost.count(weightless(build), heads=()) == cost.count(model, heads=())


# --------------------------------------------------------------------------------------------------------------- FLOPs


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("shape", [(B,), (B, T)], ids=["2d", "3d"])
def test_flops_of_a_linear(bias: bool, shape: tuple[int, ...]) -> None:
    rows = torch.Size(shape).numel()
    assert cost.forward_flops(nn.Linear(D, F, bias=bias), torch.randn(*shape, D)) == 2 * rows * D * F


@pytest.mark.parametrize(
    ("trains", "products"),
    # Each of two equal linears: 1 forward; 1 more for its own weight's gradient; and the second 1 more for what the first needs.
    [((True, True), 5), ((True, False), 4), ((False, True), 3), ((False, False), 2)],
    ids=["both", "first", "second", "none"],
)
def test_flops_of_a_step_leave_out_gradients_that_nothing_needs(trains: tuple[bool, bool], products: int) -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D))
    for linear, flag in zip(model, trains, strict=True):
        linear.requires_grad_(flag)
    assert cost.step_flops(model, torch.randn(B, D), loss=summed) == products * 2 * B * D * D


def test_flops_of_attention_on_cpu_are_counted() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x * self.gain, x * self.gain, x * self.gain)

    product = 2 * B * H * T * T * D  # scores, or their product with the values
    x = torch.randn(B, H, T, D)
    assert cost.forward_flops(Attention(), x) == 2 * product
    # The fused backward computes the scores anew, then four gradients.
    assert cost.step_flops(Attention(), x, loss=summed) == (2 + 5) * product


def test_flops_of_bert_are_those_of_the_textbook() -> None:
    model, batch = bert()
    per_token = 2 * (4 * D * D + 2 * D * F)
    attention = 2 * 2 * T * T * D
    expected = B * (L * (T * per_token + attention) + 2 * D * D + 2 * D * C)  # blocks, pooler, classifier
    assert cost.forward_flops(model, batch) == expected


def test_flops_of_vit_are_those_of_the_textbook() -> None:
    model, batch = vit()
    patches, tokens = 4, 5
    expected = B * (
        2 * patches * 3 * 16 * D + L * (tokens * 2 * (4 * D * D + 2 * D * F) + 2 * 2 * tokens * tokens * D) + 2 * D * C
    )
    assert cost.forward_flops(model, batch) == expected


def test_flops_of_a_mixture_count_the_experts_that_run() -> None:
    model, batch = moe(tokens=8)
    n, head = B * 8, D // H
    experts, chosen = 4, 2
    attention = 2 * n * D * D * 4 + 2 * 2 * B * 8 * 8 * H * head
    block = attention + 2 * n * D * experts + chosen * 2 * n * 3 * D * F
    assert cost.forward_flops(model, batch) == L * block + 2 * n * D * V


A, X, V1, V2 = torch.ones(3, 4), torch.ones(4, 5), torch.ones(4), torch.ones(3)
AA, XX = A.expand(2, 3, 4), X.expand(2, 4, 5)


@pytest.mark.parametrize(
    ("run", "products"),
    [
        (lambda: A @ X, 60),
        (lambda: torch.zeros(3, 5).addmm_(A, X, beta=1, alpha=2), 60),
        (lambda: torch.addmm(torch.zeros(5), A, X), 60),
        (lambda: AA @ XX, 120),
        (lambda: torch.zeros(2, 3, 5).baddbmm_(AA, XX), 120),
        (lambda: torch.addbmm(torch.zeros(3, 5), AA, XX), 120),
        (lambda: torch.einsum("bij,jk->bik", AA, X), 120),
        (lambda: A @ V1, 12),
        (lambda: torch.addmv(V2, A, V1), 12),
        (lambda: V1 @ V1, 4),
        (lambda: A + 1, 0),
    ],
    ids=["mm", "addmm_", "addmm", "bmm", "baddbmm_", "addbmm", "einsum", "mv", "addmv", "dot", "elementwise"],
)
def test_flops_of_every_kind_of_matrix_product(run: Any, products: int) -> None:
    assert cost._flops(run) == 2 * products


def test_flops_of_an_encoder_layer_are_the_same_in_one_kernel() -> None:
    layer = nn.TransformerEncoderLayer(D, H, F, batch_first=True).eval()
    expected = B * (T * 2 * (4 * D * D + 2 * D * F) + 2 * 2 * T * T * D)
    assert cost.forward_flops(layer, torch.randn(B, T, D)) == expected
    assert torch.backends.mha.get_fastpath_enabled()


def test_flops_are_counted_past_a_module_that_returns_a_view_of_its_parameter() -> None:
    # Without gradients the hooks of torch's module tracker fail on such a view, so the counter goes without them.
    class Prompt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Parameter(torch.ones(T, D))

        def forward(self, x: Tensor) -> Tensor:
            return self.tokens.expand(B, -1, -1)

    assert cost.forward_flops(nn.Sequential(Prompt(), nn.Linear(D, F)), torch.randn(B, D)) == 2 * B * T * D * F


class Blocks(nn.Module):
    """Two blocks, recomputed in backward or not."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D)) for _ in range(2))
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute and self.training else block(x)
        return x


def test_a_checkpointed_block_keeps_its_input_alone_and_computes_again() -> None:
    x, loss = torch.randn(B, D), lambda output: output.tanh().sum()
    plain = cost.measure(Blocks(recompute=False), x, loss=loss, repeats=1, warmup=0, heads=())
    again = cost.measure(Blocks(recompute=True), x, loss=loss, repeats=1, warmup=0, heads=())
    state = B * D * FLOAT
    assert (
        plain.saved_bytes == 2 * 2 * state
    )  # each block: its input, and tanh's output that the second linear needs too
    assert again.saved_bytes == 2 * state
    product = 2 * B * D * D
    assert plain.step_flops == (4 + 4 + 3) * product
    # Recomputing stops early, before a block's last linear, whose output nothing needs.
    assert again.step_flops == plain.step_flops + 2 * product
    assert again.forward_flops == plain.forward_flops == 4 * product


# -------------------------------------------------------------------------------------------------------------- memory


def test_saved_bytes_of_a_low_rank_delta_are_its_input_and_its_bottleneck() -> None:
    assert cost.saved_bytes(LowRank(rank=4), torch.randn(B, T, D)) == B * T * (D + 4) * FLOAT


def test_saved_bytes_count_what_two_deltas_share_once() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.v = LowRank(rank=4), LowRank(rank=4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.q(x), self.v(x)

    assert cost.saved_bytes(Two(), torch.randn(B, D)) == B * (D + 4 + 4) * FLOAT


def test_saved_bytes_count_the_storage_behind_a_view() -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(D, C)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.exp()[:, 0])  # only one token is used, but all of exp's output stays alive

    assert cost.saved_bytes(First(), torch.randn(B, T, D)) == B * T * D * FLOAT


def test_saved_bytes_leave_out_weights_that_back_propagation_passes() -> None:
    model = nn.Sequential(LowRank(rank=4), nn.Linear(D, D).requires_grad_(False))
    assert cost.saved_bytes(model, torch.randn(B, D)) == B * (D + 4) * FLOAT


def test_saved_bytes_are_none_where_nothing_trains() -> None:
    model, batch = bert()
    assert cost.saved_bytes(model.requires_grad_(False), batch) == 0


def test_a_frozen_stack_under_a_trained_head_keeps_the_heads_input_alone() -> None:
    model, batch = vit()
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    tokens, logits = B * 5 * D * FLOAT, B * C * FLOAT
    labels = batch["labels"].nbytes
    # The class token is a view of the final norm's output; the loss keeps log-probabilities, labels and its own weight (1 scalar).
    assert cost.saved_bytes(model, batch) == tokens + logits + labels + FLOAT


def test_peak_bytes_follow_what_lives_and_what_dies() -> None:
    there = torch.zeros(100)

    def step() -> None:
        a = torch.zeros(1000)
        b = a[:10]  # a view: no memory of its own, but a's stays
        c = torch.zeros(500) + there.sum()  # while adding, zeros(500), the sum (1) and the result (500) live
        del a
        d = torch.zeros(200)
        del b, c, d
        torch.zeros(1500)

    assert cost.peak_bytes(step) == (100 + 1000 + 500 + 1 + 500) * FLOAT
    untouched = torch.zeros(10_000)
    assert cost.peak_bytes(step, holding=[there, untouched, untouched[5:]]) == (10_100 + 2001) * FLOAT


def test_peak_bytes_count_what_was_there_and_goes_during_the_step() -> None:
    box = [torch.zeros(1000)]

    def step() -> None:
        box[0].sum()
        box.clear()
        torch.zeros(800)

    assert cost.peak_bytes(step) == (1000 + 1) * FLOAT


@pytest.mark.parametrize("build", [bert, vit, gpt2, t5], ids=lambda build: build.__name__)
def test_peak_bytes_agree_with_the_allocators_record(build: Any) -> None:
    model, batch = build()
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        loss = model(**batch).loss
        loss.backward()
        del loss
        optimizer.step()
        optimizer.zero_grad()

    step()
    held = [*model.parameters(), *model.buffers(), *batch.values()]
    held += [tensor for state in optimizer.state.values() for tensor in state.values()]
    extra = cost.peak_bytes(step, held) - sum(tensor.nbytes for tensor in held)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    record = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = highest = 0
    for event in sorted(record, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    assert now == 0
    assert extra == pytest.approx(highest, rel=0.005)


def test_peak_bytes_of_a_step_lie_between_what_must_be_there_and_the_sum() -> None:
    model, batch = bert()
    found = cost.measure(model, batch, repeats=1, warmup=0, heads=())
    must = found.weight_bytes + found.optimizer_bytes + found.gradient_bytes
    assert must < found.peak_bytes
    assert found.weight_bytes + found.optimizer_bytes + found.saved_bytes < found.peak_bytes


# ---------------------------------------------------------------------------------------------------------------- time


def test_step_time_is_the_median_with_quartiles(monkeypatch: pytest.MonkeyPatch) -> None:
    clock: Iterator[float] = iter([0, 1, 10, 13, 20, 22, 30, 40, 50, 54])  # durations 1, 3, 2, 10, 4
    monkeypatch.setattr(cost.time, "perf_counter", lambda: next(clock))
    calls = []
    found = cost.step_time(lambda: calls.append(gc.isenabled()), repeats=5, warmup=2)
    assert found == cost.Timing(median_seconds=3, low_seconds=2, high_seconds=4, repeats=5)
    assert calls == [False] * 7
    assert gc.isenabled()


def test_step_time_of_one_repeat_has_no_spread() -> None:
    found = cost.step_time(lambda: None, repeats=1, warmup=0)
    assert found.low_seconds == found.median_seconds == found.high_seconds


@pytest.mark.parametrize(("repeats", "warmup"), [(0, 1), (1, -1)])
def test_step_time_refuses_senseless_numbers(repeats: int, warmup: int) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        cost.step_time(lambda: None, repeats, warmup)


# ---------------------------------------------------------------------------------------------------------- everything


@every_family
def test_measure_finds_the_same_twice_and_predict_finds_it_without_weights(build: Any) -> None:
    model, batch = build()
    found = cost.measure(model, batch, repeats=1, warmup=0, heads=())
    assert figures(found) == figures(cost.measure(model, batch, repeats=1, warmup=0, heads=()))
    assert figures(found) == figures(cost.predict(weightless(build), batch, heads=()))
    assert found.step is not None
    assert found.step.median_seconds > 0


def test_single_figures_agree_with_predict_wherever_the_weights_are() -> None:
    model, batch = bert()
    found = cost.predict(model, batch, heads=())
    for where in (model, weightless(bert)):
        assert cost.forward_flops(where, batch) == found.forward_flops
        assert cost.step_flops(where, batch) == found.step_flops
        assert cost.saved_bytes(where, batch) == found.saved_bytes


class Restless(nn.Module):
    """Everything a forward pass may disturb: dropout, running statistics, both other random generators, a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(LowRank(), nn.BatchNorm1d(D), nn.Dropout(0.5))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.body(x) * (1 + random.random()) * np.random.rand()


@pytest.mark.parametrize("ask", [cost.measure, cost.predict], ids=["measure", "predict"])
def test_nothing_is_left_behind(ask: Any) -> None:
    model, x = Restless(), torch.randn(B, D)
    model.body[1].eval()  # a mixture of modes is kept
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(x).sum().backward()
    optimizer.step()

    def look() -> dict[str, Any]:
        return {
            "calls": model.calls,
            "values": {name: tensor.clone() for name, tensor in model.state_dict().items()},
            "identities": [id(tensor) for tensor in (*model.parameters(), *model.buffers())],
            "gradients": {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
            "flags": [p.requires_grad for p in model.parameters()],
            "modes": [module.training for module in model.modules()],
            "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
            "optimizer": copy.deepcopy(optimizer.state_dict()),
            "generators": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()),
            "grad mode": torch.is_grad_enabled(),
            "collector": gc.isenabled(),
        }

    before = look()
    with torch.no_grad():  # an outer mode neither spoils the measurement nor is lost
        ask(model, x, optimizer, loss=summed, heads=())
        assert not torch.is_grad_enabled()
    after = look()
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("ask", [cost.measure, cost.predict], ids=["measure", "predict"])
def test_no_tensor_outlives_the_measurement(ask: Any) -> None:
    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    model, x = Blocks(recompute=True), torch.randn(B, D)
    ask(model, x, loss=summed, heads=())
    before = alive()
    ask(model, x, loss=summed, heads=())
    assert alive() == before


def test_frozen_weights_are_not_copied() -> None:
    model = nn.Sequential(nn.Linear(1000, 1000, bias=False).requires_grad_(False), nn.Linear(1000, 2, bias=False))
    with cost._Alive([]) as alive:
        cost.measure(model, torch.randn(2, 1000), loss=summed, repeats=1, warmup=0, heads=())
    assert alive.highest < 1000 * 1000 * FLOAT


def test_optimizer_state_is_counted() -> None:
    model = nn.Linear(D, D)
    size, count = (D * D + D) * FLOAT, 2

    def state(optimizer: Any) -> int:
        return cost.predict(model, torch.randn(B, D), optimizer, loss=summed, heads=()).optimizer_bytes

    assert state(None) == 2 * size + FLOAT * count  # two moments, and a step number for each parameter
    assert state(torch.optim.SGD(model.parameters(), lr=0.1)) == 0
    assert state(lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9)) == size


def test_a_bare_model_costs_its_forward_pass() -> None:
    model, batch = bert()
    found = cost.measure(model.requires_grad_(False), batch, repeats=1, warmup=0, heads=())
    assert found.step_flops == found.forward_flops
    assert (found.saved_bytes, found.gradient_bytes, found.optimizer_bytes, found.checkpoint_bytes) == (0, 0, 0, 0)


def test_mixed_precision_keeps_less() -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D))
    full = cost.measure(model, torch.randn(B, D), loss=summed, repeats=1, warmup=0, heads=())
    half = cost.measure(model, torch.randn(B, D), loss=summed, autocast=torch.bfloat16, repeats=1, warmup=0, heads=())
    assert full.saved_bytes == 2 * B * D * FLOAT
    # Two inputs in 2 bytes each, and the second weight cast to 2 bytes, through which the gradient passes.
    assert half.saved_bytes == (2 * B * D + D * D) * 2
    assert half.step_flops == full.step_flops


@pytest.mark.parametrize("kind", ["mapping", "tuple", "tensor"])
def test_batches_come_as_the_model_takes_them(kind: str) -> None:
    x = torch.randn(B, D)
    batch = {"mapping": {"input": x}, "tuple": (x,), "tensor": x}[kind]
    assert cost.forward_flops(nn.Linear(D, F), batch) == 2 * B * D * F


def test_cost_is_one_flat_json_object_with_units() -> None:
    model, batch = vit()
    flat = cost.measure(model, batch, repeats=2, warmup=0, heads=["classifier"]).to_dict()
    assert json.loads(json.dumps(flat)) == flat
    assert all(key.endswith(("_parameters", "_bytes", "_flops", "_seconds", "_repeats")) for key in flat)
    assert flat["head_parameters"] == D * C + C
    assert flat["checkpoint_bytes"] == FLOAT * flat["stored_parameters"]


# ------------------------------------------------------------------------------------------------------------ refusals


def test_measure_refuses_a_model_without_weights() -> None:
    with pytest.raises(AttachError, match="predict"):
        cost.measure(nn.Linear(D, D, device="meta"), torch.randn(B, D), loss=summed, heads=())


def test_a_missing_loss_is_named() -> None:
    model, batch = bert()
    del batch["labels"]
    with pytest.raises(TrainingError, match="labels"):
        cost.measure(model, batch, heads=())


@pytest.mark.parametrize("ask", [cost.measure, cost.predict], ids=["measure", "predict"])
def test_a_delta_off_the_way_to_the_loss_is_an_error(ask: Any) -> None:
    model = nn.ModuleDict({"used": nn.Linear(D, D).requires_grad_(False), "idle": nn.Linear(D, D)})
    model.forward = model["used"].forward  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="no trainable parameter"):
        ask(model, torch.randn(B, D), loss=summed, heads=())


def test_predict_refuses_a_model_that_looks_at_values() -> None:
    class Choosy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    model = Choosy(D, D)
    assert cost.measure(model, torch.ones(B, D), loss=summed, repeats=1, warmup=0, heads=()).forward_flops
    with pytest.raises(AttachError, match="use measure"):
        cost.predict(model, torch.ones(B, D), loss=summed, heads=())


def test_a_hook_that_holds_on_to_the_original_is_found_out() -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D))
    norm = model[1]
    model[0].register_forward_hook(lambda module, args, output: norm(output))  # a closure: deepcopy can't follow it
    with pytest.raises(AttachError, match="holds on to the original"):
        cost.measure(model, torch.randn(B, D), loss=summed, heads=())


def test_a_model_that_cannot_be_copied_is_named() -> None:
    model = nn.Linear(D, D)
    with Path(__file__).open() as stream, pytest.raises(AttachError, match="Linear can't be copied"):
        model.stream = stream
        cost.measure(model, torch.randn(B, D), loss=summed, heads=())
