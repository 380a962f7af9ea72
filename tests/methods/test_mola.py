"""What MoLA must hold, by the numbers of its specification."""

from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import petiole as pt
import tiny
import toys
from linears import OneLinear, attached, of, set_
from petiole.errors import AttachError, ConfigError, FileError, TrainingError
from petiole.files import parse, save_adaptation
from petiole.methods.lowrank.mola import Mixture, Routers, quarters
from petiole.training import Events

N, K, RANK, IN, OUT = 4, 2, 3, 7, 5
SMALL: dict[str, Any] = {
    "num_experts": N,
    "top_k": K,
    "rank": RANK,
    "alpha": 6.0,
    "dropout": 0.0,
    "balance_weight": 1.0,
}


def matrix() -> Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / IN**0.5


def inputs(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 6)), IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def moved(**fields: Any) -> tuple[OneLinear, Mixture]:
    """One linear with experts that have moved, in double precision."""
    model, delta = attached(pt.MoLA(**{**SMALL, **fields}), matrix())
    model.double()
    generator = torch.Generator().manual_seed(2)
    for parameter in delta.parameters():
        set_(parameter, torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2)
    return model, delta


def routers(model: nn.Module) -> Routers:
    found = of(model).shared[0]
    assert isinstance(found, Routers)
    return found


def written_out(delta: Mixture, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Token by token: Δy (n, out), w (n, N), p (n, N)."""
    count, rank = delta.experts.count, delta.experts.rank
    A, B = delta.A.view(count, rank, -1), delta.B.view(-1, count, rank)
    changes, weights, probabilities = [], [], []
    for token in x.flatten(0, -2):
        p = torch.softmax(delta.router @ token, 0)
        best = sorted(range(count), key=lambda e: -float(p[e].detach()))[: delta.experts.top_k]
        total = sum(p[e] for e in best)
        w = torch.stack([p[e] / total if e in best else p.new_zeros(()) for e in range(count)])
        changes.append(delta.scale * sum(w[e] * (B[:, e] @ (A[e] @ token)) for e in best))
        weights.append(w)
        probabilities.append(p)
    return torch.stack(changes), torch.stack(weights), torch.stack(probabilities)


def written_out_balance(chosen: Tensor, p: Tensor) -> Tensor:
    """(rows, N) twice -> N Σ f P"""
    return chosen.shape[1] * (chosen.double().sum(0) / chosen.sum() * p.mean(0)).sum()


# 1
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_start_is_the_backbone(name: str) -> None:
    model, batch = tiny.model(name), tiny.batch(name)
    bare = toys.output(model, batch)
    tuned = pt.attach(model, pt.MoLA())
    assert torch.equal(toys.output(model, batch), bare)
    for slot in tuned.slots:
        if isinstance(slot.delta, Mixture):
            bound = slot.site.in_features**-0.5
            for tensor in (slot.delta.router, slot.delta.A):
                assert 0.7 * bound < float(tensor.detach().abs().max()) <= bound
            assert not slot.delta.B.any()


# 2, 11
def test_counts_at_the_papers_sizes() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        sizes = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008}
        llama = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=32, vocab_size=32000))
    for shape in ("2468", "5555", "8642", "8228"):
        tuned = pt.attach(llama, pt.MoLA(num_experts=shape))
        assert tuned.trainable == 105_635_840
        assert sum(slot.delta.router.numel() for slot in tuned.slots) == 5_693_440
        layers = tuned.shared[0].routing()  # type: ignore[operator,union-attr]
        assert sum(layer.parameters for layer in layers.values()) == tuned.trainable
        assert [layers[f"decoder.{i}"].num_experts for i in range(0, 32, 8)] == [int(digit) for digit in shape]
        assert layers["decoder.7"].parameters == int(shape[0]) * (8 * 78_080 + 35_584)
        tuned.detach()


def test_counts_where_layers_differ() -> None:
    model = tiny.model("llama")
    tuned = pt.attach(model, pt.MoLA(num_experts=[3, 5], top_k=[1, 4], rank=[2, 1]))
    wanted = 0
    for slot in tuned.slots:
        count, rank = ((3, 2), (5, 1))[slot.site.depth]
        wanted += count * (rank * (slot.site.in_features + slot.site.out_features) + slot.site.in_features)
        assert slot.delta.scale == 16 / rank and slot.delta.experts.top_k == (1, 4)[slot.site.depth]
    assert tuned.trainable == wanted
    ours = {id(p) for p in tuned.parameters()}
    assert all(p.requires_grad == (id(p) in ours) for p in model.parameters())


# 3
@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_every_token_takes_k_experts(top_k: int) -> None:
    model, delta = moved(top_k=top_k)
    x = inputs()
    w = delta.route(x)
    assert bool((w >= 0).all()) and bool(((w > 0).sum(-1) == top_k).all())
    torch.testing.assert_close(w.sum(-1), torch.ones(2, 6, dtype=torch.float64))
    change, wanted, _ = written_out(delta, x)
    torch.testing.assert_close(w.flatten(0, 1), wanted)
    torch.testing.assert_close(model(x) - x @ matrix().T, change.view(2, 6, OUT))


@pytest.mark.parametrize("top_k", [1, 3])
def test_gradients_are_those_of_the_written_out_mixture(top_k: int) -> None:
    model, delta = moved(top_k=top_k)
    x, g = inputs().requires_grad_(), torch.randn(2, 6, OUT, dtype=torch.float64)
    tensors = [x, delta.router, delta.A, delta.B]
    mine = torch.autograd.grad((model(x) * g).sum(), tensors)
    y = x @ matrix().T + written_out(delta, x)[0].view(2, 6, OUT)
    for one, other in zip(mine, torch.autograd.grad((y * g).sum(), tensors), strict=True):
        torch.testing.assert_close(one, other)
    assert (float(mine[1].abs().max()) > 1e-9) == (top_k > 1)  # one expert's weight is 1, whatever its probability


# 4
def test_all_experts_are_the_dense_mixture() -> None:
    model, delta = moved(top_k=N)
    x = inputs()
    p = (x @ delta.router.T).softmax(-1)
    experts = torch.einsum("oer,eri,bti->bteo", delta.B.view(OUT, N, RANK), delta.A.view(N, RANK, IN), x)
    torch.testing.assert_close(model(x), x @ matrix().T + delta.scale * torch.einsum("bte,bteo->bto", p, experts))


# 5
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_one_expert_is_lora(dropout: float) -> None:
    model, delta = moved(num_experts=1, top_k=1, dropout=dropout)
    twin, lora = attached(pt.LoRA(rank=RANK, alpha=6.0, dropout=dropout), matrix())
    twin.double()
    set_(lora.A, delta.A)
    set_(lora.B, delta.B)
    found = []
    for each in (model, twin):
        torch.manual_seed(0)
        found.append(each.train()(inputs()))
    assert torch.equal(*found)
    found[0].square().sum().backward()
    assert delta.router.grad is None or not delta.router.grad.any()
    assert of(model).loss_terms() == []
    expected = model.eval()(inputs())
    of(model).merge()
    torch.testing.assert_close(model(inputs()), expected)
    torch.testing.assert_close(model.linear.weight, matrix() + 2 * delta.B @ delta.A)


# 6
def test_the_order_of_experts_does_not_matter() -> None:
    model, delta = moved()
    x = inputs()
    y, balance = model(x), routers(model).balance()
    order = torch.tensor([2, 0, 3, 1])
    set_(delta.router, delta.router[order].clone())
    set_(delta.A, delta.A.view(N, RANK, IN)[order].flatten(0, 1).clone())
    set_(delta.B, delta.B.view(OUT, N, RANK)[:, order].flatten(1).clone())
    torch.testing.assert_close(model(x), y)
    torch.testing.assert_close(routers(model).balance(), balance)


# 7
def test_experts_that_nobody_chose_get_nothing() -> None:
    model, delta = moved()
    router = torch.zeros(N, IN, dtype=torch.float64)
    router[0, 0], router[3, 0] = 5, 4  # of every token whose first feature is positive
    set_(delta.router, router)
    x = inputs()
    x[..., 0] = x[..., 0].abs() + 0.1
    model(x).square().sum().backward()
    A, B = delta.A.grad.view(N, RANK, IN), delta.B.grad.view(OUT, N, RANK)  # type: ignore[union-attr]
    for e in range(N):
        assert bool(A[e].any()) == bool(B[:, e].any()) == (e in (0, 3))
    assert routers(model).routing()["encoder.0"].shares.tolist() == [0.5, 0, 0, 0.5]  # type: ignore[union-attr]


# 8
def test_balance_is_one_where_even_and_n_where_one_takes_all() -> None:
    model, delta = moved(top_k=1)
    x = torch.eye(N, IN, dtype=torch.float64)
    set_(delta.router, 1e-3 * torch.eye(N, IN, dtype=torch.float64))  # each token likes another expert, by a hair
    model(x)
    even = routers(model).routing()["encoder.0"]
    assert (even.loss, even.entropy) == pytest.approx((1, math.log(N)), abs=1e-6)
    router = torch.zeros(N, IN, dtype=torch.float64)
    router[2] = 100
    set_(delta.router, router)
    model(x)
    one = routers(model).routing()["encoder.0"]
    assert (one.loss, one.entropy) == pytest.approx((N, 0))


def test_the_balance_is_pooled_over_all_linears_of_a_layer() -> None:
    model, batch = toys.model("llama").double(), tiny.batch("llama")
    tuned = pt.attach(model, pt.MoLA(num_experts=[3, 4], dropout=0.0, balance_weight=0.5))
    toys.shake(tuned)
    model.double().train()
    seen: dict[int, list[Tensor]] = {0: [], 1: []}
    for slot in tuned.slots:

        def look(module: nn.Module, args: Any, output: Tensor, slot: Any = slot) -> None:
            seen[slot.site.depth].append((args[0] @ slot.delta.router.T).flatten(0, -2))

        tuned.host.module(slot.site.path).register_forward_hook(look)
    output = model(**batch)
    wanted = []
    for logits in seen.values():
        p = torch.cat(logits).softmax(-1)
        chosen = torch.zeros_like(p).scatter(-1, p.topk(2).indices, 1)
        wanted.append(written_out_balance(chosen, p))
    losses = [layer.loss for layer in tuned.shared[0].routing().values()]  # type: ignore[operator,union-attr]
    assert losses == pytest.approx([float(value.detach()) for value in wanted])
    # The whole loss, and the routers' gradients through P alone:
    mine = torch.autograd.grad(output.loss, list(tuned.parameters()), retain_graph=True)
    task = output.loss.detach() - 0.5 * sum(value.detach() for value in wanted)
    extra = torch.autograd.grad(0.5 * sum(wanted), list(tuned.parameters()), allow_unused=True)
    twin = toys.model("llama").double()
    other = pt.attach(twin, pt.MoLA(num_experts=[3, 4], dropout=0.0, balance_weight=0.0))
    twin.double().train()
    for one, value in zip(other.parameters(), tuned.parameters(), strict=True):
        set_(one, value)
    loss = twin(**batch).loss
    torch.testing.assert_close(loss.detach(), task.float())
    plain = torch.autograd.grad(loss, list(other.parameters()))
    for gradient, alone, added in zip(mine, plain, extra, strict=True):
        torch.testing.assert_close(gradient, alone if added is None else alone + added)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_forward_pass_counts_once(reentrant: bool | None) -> None:
    """Whatever is computed again, and whatever was done before: evaluation, or a pass that nobody went back through."""
    model, batch = toys.model("llama"), tiny.batch("llama")
    tuned = pt.attach(model, pt.MoLA(num_experts=4, dropout=0.0, balance_weight=1.0))
    toys.shake(tuned)
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    shared: Any = tuned.shared[0]
    tokens = batch["input_ids"].numel()
    toys.output(model, {"input_ids": batch["input_ids"][:, :2]})
    model.train()
    for _ in range(2):
        loss = model(**batch).loss
        before = {layer: tally.clone() for layer, tally in shared.tallies.items()}
        loss.backward()
        for layer, tally in shared.tallies.items():
            assert torch.equal(tally, before[layer]) and not tally.requires_grad
            assert float(tally[0].sum()) == 7 * tokens * 2  # linears, tokens, choices
            assert float(tally[1].sum()) == pytest.approx(7 * tokens, rel=1e-5)


def test_each_micro_batch_adds_its_share() -> None:
    """Rows one by one: each counts by its share of the labels; f and P are those of a forward pass."""
    model, batch = toys.model("llama"), tiny.batch("llama")
    tuned = pt.attach(model, pt.MoLA(num_experts=4, dropout=0.0, balance_weight=0.7))
    toys.shake(tuned)
    model.train()
    counts = (batch["labels"][:, 1:] != -100).sum(1)
    losses, balances = [], []
    for row in range(2):
        half = {name: value[row : row + 1] for name, value in batch.items()}
        losses.append(model(**half, num_items_in_batch=counts.sum()).loss.detach())
        balances.append(tuned.shared[0].balance())  # type: ignore[operator,union-attr]
    term = 0.7 * sum(part * balance for part, balance in zip(counts / counts.sum(), balances, strict=True))
    model.eval()  # without terms
    task = sum(
        model(**{n: v[row : row + 1] for n, v in batch.items()}, num_items_in_batch=counts.sum()).loss.detach()
        for row in range(2)
    )
    torch.testing.assert_close(sum(losses), task + term)


def test_without_a_weight_there_is_no_term() -> None:
    model, delta = moved(balance_weight=0.0)
    assert not of(model).has_loss_terms and not delta.publishes
    model.train()(inputs())
    assert not routers(model).tallies["encoder.0"].requires_grad


def test_a_graph_that_checkpointing_cuts_is_an_error() -> None:
    class Checkpointed(OneLinear):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x.requires_grad_(), use_reentrant=True)  # type: ignore[no-any-return]

    model, _ = moved()
    model.__class__ = Checkpointed
    model.train()(inputs())
    with pytest.raises(TrainingError, match="use_reentrant=False"):
        of(model).loss_terms()


def test_compiled_training_has_the_same_term() -> None:
    model, batch = toys.model("bert").double(), tiny.batch("bert")
    tuned = pt.attach(model, pt.MoLA(num_experts=3, dropout=0.0, balance_weight=0.5, roles=["q", "up"]))
    toys.shake(tuned)
    model.double().train()
    torch._dynamo.reset()
    found = []
    for call in (model, torch.compile(model, backend="eager", fullgraph=True)):
        events = Events(model, None)
        events.before_step()
        output = call(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"))
        extra = events.extra_loss()
        assert extra is not None
        gradients = torch.autograd.grad(output.logits.square().mean() + extra, list(tuned.parameters()))
        found.append([extra.detach(), *gradients])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    torch._dynamo.reset()


def test_a_copy_begins_anew() -> None:
    model, _ = moved(balance_weight=0.0)
    model.train()(inputs())
    assert routers(model).tallies and not routers(copy.deepcopy(model)).tallies


# 9
def test_tokens_go_each_their_own_way() -> None:
    model, _ = moved()
    x = inputs()
    y = model(x)
    torch.testing.assert_close(model(x.flatten(0, 1)).view_as(y), y)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(model(x[:, order]), y[:, order])
    torch.testing.assert_close(model(x[:, 4:5]), y[:, 4:5])


def test_decoding_with_a_cache_is_the_full_pass() -> None:
    model, batch = toys.model("llama").double(), tiny.batch("llama")
    toys.shake(pt.attach(model, pt.MoLA()))
    model.double()
    tokens = batch["input_ids"]
    with torch.no_grad():
        whole = model(tokens).logits
        first = model(tokens[:, :-1], use_cache=True)
        last = model(tokens[:, -1:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(last[:, 0], whole[:, -1])


# 10
def test_files_hold_the_experts_and_the_allocation(tmp_path: Path) -> None:
    model = toys.model("llama")
    tuned = pt.attach(model, pt.MoLA(num_experts=[2, 4], rank=[4, 2]))
    toys.shake(tuned)
    path = tuned.save(tmp_path / "x.safetensors", folded=False)
    tensors, header = parse(path.read_bytes(), path)
    assert {name.rpartition(":")[2] for name in tensors} == {"router", "A", "B"} and len(tensors) == 3 * 14
    assert header["recipe"]["0.shared"]["layers"] == {"decoder.0": [2, 2, 4], "decoder.1": [4, 2, 2]}
    other = toys.model("llama")
    pt.load(other, path)
    batch = tiny.batch("llama")
    assert torch.equal(toys.output(other, batch), toys.output(model, batch))
    swapped = pt.attach(toys.model("llama"), pt.MoLA(num_experts=[4, 2], rank=[2, 4]))
    with pytest.raises(FileError, match="another configuration"):
        swapped.restore(path)
    header["recipe"]["0.shared"]["layers"]["decoder.1"][1] = 1
    save_adaptation(path, tensors, header)
    with pytest.raises(FileError, match="layers"):
        pt.load(toys.model("llama"), path)


# ---------------------------------------------------------------------------------------------------------------- allocation


@pytest.mark.parametrize(
    "shape, depth, wanted",
    [
        ("2468", 4, [2, 4, 6, 8]),
        ("8642", 8, [8, 8, 6, 6, 4, 4, 2, 2]),
        ("8228", 5, [8, 2, 2, 8, 8]),
        ("2468", 6, [2, 4, 6, 6, 8, 8]),
        ("2468", 7, [2, 4, 4, 6, 6, 8, 8]),
        ("5555", 3, [5, 5, 5]),
        ("2468", 2, [6, 8]),  # of four quarters the upper two
        ("1357", 1, [7]),
    ],
)
def test_digits_are_quarters(shape: str, depth: int, wanted: list[int]) -> None:
    assert list(quarters(shape, depth)) == wanted


def test_two_layers_take_the_upper_digits() -> None:
    tuned = pt.attach(tiny.model("bert"), pt.MoLA(), train_head=False)
    assert {(s.site.depth, s.delta.experts.count) for s in tuned.slots} == {(0, 6), (1, 8)}


def test_each_stack_has_its_own_layers() -> None:
    tuned = pt.attach(tiny.model("t5"), pt.MoLA(num_experts=[2, 3]))
    counts = {layer: r.num_experts for layer, r in tuned.shared[0].routing().items()}  # type: ignore[operator,union-attr]
    assert counts == {"encoder.0": 2, "encoder.1": 3, "decoder.0": 2, "decoder.1": 3}


def test_defaults_are_the_papers() -> None:
    method = pt.MoLA()
    assert (method.num_experts, method.top_k, method.rank, method.alpha) == ("2468", 2, 8, 16)
    assert (method.dropout, method.balance_weight, method.router_dtype) == (0.05, 0.001, "float32")


@pytest.mark.parametrize(
    "fields",
    [
        {"num_experts": 0}, {"num_experts": [4, 0]}, {"num_experts": "246"}, {"num_experts": "2048"}, {"num_experts": 2468},
        {"top_k": 0}, {"rank": 0}, {"rank": [8, 0]}, {"balance_weight": -0.1}, {"router_dtype": "int8"},
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        pt.MoLA(**fields)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"num_experts": [2, 4, 6]}, ["num_experts lists 3 layers", "has 2"]),
        ({"rank": [8]}, ["rank lists 1 layers", "has 2"]),
        ({"num_experts": 1}, ["top_k = 2", "num_experts = 1", "layer 0"]),
        ({"num_experts": [4, 2], "top_k": [4, 3]}, ["top_k = 3", "num_experts = 2", "layer 1"]),
        ({"roles": ["q", "lm_head"]}, ["lm_head", "in no layer"]),
    ],
)
def test_what_does_not_fit_the_backbone_is_refused(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(AttachError) as caught:
        pt.attach(tiny.model("llama"), pt.MoLA(**fields))
    assert all(word in str(caught.value) for word in words), caught.value


def test_merging_folds_the_layers_with_one_expert_alone() -> None:
    model, batch = toys.model("llama"), tiny.batch("llama")
    tuned = pt.attach(model, pt.MoLA(num_experts=[1, 4], top_k=[1, 2]))
    toys.shake(tuned)
    expected = toys.output(model, batch)
    with pytest.raises(AttachError, match=r"at decoder\.1\.q") as caught:
        tuned.merge()
    assert "decoder.0" not in str(caught.value)
    tuned.merge(partly=True)
    torch.testing.assert_close(toys.output(model, batch), expected, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------------------- the router


def test_the_router_sees_its_input_without_dropout() -> None:
    model, delta = moved(dropout=0.5)
    model.train()
    seen = []
    delta.route, route = lambda x: seen.append(x) or route(x), delta.route  # type: ignore[method-assign,func-returns-value]
    x = inputs()
    a, b = model(x), model(x)
    assert not torch.allclose(a, b) and all(torch.equal(each, x) for each in seen) and len(seen) == 2


@pytest.mark.parametrize("router_dtype, exact", [("float32", True), ("input", False)])
def test_the_router_keeps_float32(router_dtype: Any, exact: bool) -> None:
    _, delta = attached(pt.MoLA(**{**SMALL, "router_dtype": router_dtype}), matrix().float())
    x = inputs().float().to(torch.bfloat16)
    wanted = x.float() @ delta.router.T
    seen = []
    softmax = Tensor.softmax
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", dtype=torch.bfloat16):
        patch.setattr(Tensor, "softmax", lambda z, *args, **options: seen.append(z) or softmax(z, *args, **options))
        assert delta.route(x).dtype == torch.float32
    assert (seen[0].dtype == torch.float32) == exact
    torch.testing.assert_close(seen[0].float(), wanted, rtol=1e-6 if exact else 2e-2, atol=1e-6 if exact else 2e-2)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_padding_may_be_left_out_of_the_count(name: str) -> None:
    model, batch = toys.model(name), tiny.batch(name)
    mask = torch.ones_like(batch["input_ids"])
    mask[0, -3:] = 0
    own = torch.ones_like(batch["labels"]) if name == "t5" else None
    if own is not None:
        own[1, -2:] = 0
        batch["decoder_attention_mask"] = own
    for counts, total in ((True, mask.numel()), (False, int(mask.sum()))):
        tuned = pt.attach(
            model,
            pt.MoLA(num_experts=4, count_padding=counts, roles=["k"] if name == "bert" else ["cross_attention.k"]),
        )
        toys.output(model, {**batch, "attention_mask": mask})
        tallies = list(tuned.shared[0].tallies.values())  # type: ignore[union-attr,operator]
        assert [float(tally[0].sum()) for tally in tallies] == [2 * total] * 2
        assert [float(tally[1].sum()) for tally in tallies] == pytest.approx([total] * 2, rel=1e-5)
        tuned.detach()
    if own is not None:
        tuned = pt.attach(model, pt.MoLA(num_experts=4, count_padding=False, roles=["cross_attention.q"]))
        toys.output(model, {**batch, "attention_mask": mask})
        assert [float(t[0].sum()) for t in tuned.shared[0].tallies.values()] == [2 * int(own.sum())] * 2  # type: ignore


def test_the_count_is_exact_under_autocast() -> None:
    model, tokens = tiny.model("bert"), tiny.batch("bert", size=60)["input_ids"]
    tuned = pt.attach(model, pt.MoLA(num_experts=4, count_padding=False, roles=["k"]))
    mask = torch.ones_like(tokens)
    mask[0, -3:] = 0
    assert int(mask.sum()) > 256  # beyond which bfloat16 can't count
    with torch.autocast("cpu", dtype=torch.bfloat16):
        toys.output(model, {"input_ids": tokens, "attention_mask": mask})
    for tally in tuned.shared[0].tallies.values():  # type: ignore[operator,union-attr]
        assert float(tally[0].sum()) == 2 * int(mask.sum())


def test_two_attachments_count_apart() -> None:
    model, batch = toys.model("llama"), tiny.batch("llama")
    make = partial(pt.attach, model)
    both = [make(pt.MoLA(num_experts=count, roles=["q"]), name=f"of{count}") for count in (3, 4)]
    pt.activate(model, "of3", "of4")
    toys.output(model, batch)
    for count, tuned in zip((3, 4), both, strict=True):
        tallies = tuned.shared[0].tallies  # type: ignore[union-attr]
        assert {tuple(tally.shape) for tally in tallies.values()} == {(2, count)}  # type: ignore[operator,union-attr]
        assert all(float(t[0].sum()) == 2 * batch["input_ids"].numel() for t in tallies.values())  # type: ignore
