"""What PEGO must hold, by the numbers of its specification."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petiole as pt
import tiny
import toys
from linears import OneLinear, attached, of, set_
from petiole.errors import AttachError, ConfigError
from petiole.files import parse
from petiole.methods.lowrank.pego import AbsoluteSum, Group

SIZE = 8


def matrix(out_features: int = SIZE, in_features: int = SIZE, seed: int = 0) -> Tensor:
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed)) / in_features**0.5


def moved(W: Tensor, **fields: Any) -> tuple[OneLinear, pt.PEGO, Group]:
    """One linear with a group of three modules of rank 2, all of which have moved."""
    method = pt.PEGO(**{"rank": 2, "num_loras": 3, **fields})
    model, group = attached(method, W, torch.randn(W.shape[0]))
    set_(group.B, torch.randn(group.B.shape))
    return model, method, group


def explicit(W: Tensor, A: Tensor, B: Tensor, penalty: str = "l1", along: str = "input") -> tuple[Tensor, Tensor]:
    """Both sums, every product written out."""
    D = B @ A
    pairs = list(combinations(range(len(D)), 2))
    if along == "input":
        preserve, diversify = [W @ d.T for d in D], [D[i] @ D[j].T for i, j in pairs]
    else:
        preserve, diversify = [W.T @ d for d in D], [D[i].T @ D[j] for i, j in pairs]
    size = (lambda m: m.abs().sum()) if penalty == "l1" else (lambda m: m.square().sum())
    return sum(map(size, preserve), torch.zeros(())), sum(map(size, diversify), torch.zeros(()))


# 1
@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
def test_start_is_the_backbone_and_the_terms_are_zero(name: str) -> None:
    model, batch = tiny.model(name), tiny.batch(name)
    bare = toys.output(model, batch)
    loss = model(**batch).loss
    tuned = pt.attach(model, pt.PEGO(preserve_weight=1.0, diversify_weight=1.0))
    assert torch.equal(toys.output(model, batch), bare)
    (term,) = tuned.loss_terms()
    assert term.item() == 0.0
    term.backward()
    assert all(bool((p.grad == 0).all()) for p in tuned.parameters() if p.grad is not None)
    assert torch.equal(model.train()(**batch).loss, loss)  # no dropout in these models


# 2
@pytest.mark.parametrize("count,expected", [(4, 589_824), (2, 294_912)])
def test_counts_at_the_papers_sizes(count: int, expected: int) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    with torch.device("meta"):
        model = CLIPVisionModelWithProjection(CLIPVisionConfig(patch_size=16))
    tuned = pt.attach(model, pt.PEGO(num_loras=count), train_head=False)
    assert tuned.trainable == expected == 12 * 2 * count * 4 * 2 * 768


def test_counts_of_weights_that_are_not_square() -> None:
    tuned = pt.attach(tiny.model("llama"), pt.PEGO(rank=3, num_loras=2, roles=["q", "v", "down"]), train_head=False)
    assert tuned.trainable == 2 * 2 * 3 * ((32 + 32) + (32 + 16) + (64 + 32))


# 3
def test_forward_is_the_sum_of_all_branches() -> None:
    W, x = matrix(), torch.randn(2, 5, SIZE)
    model, _, group = moved(W)
    branches = sum(x @ A.T @ B.T for A, B in zip(group.A, group.B, strict=True))
    torch.testing.assert_close(model(x), OneLinear(W, model.linear.bias)(x) + branches, rtol=1e-5, atol=1e-5)
    lora, delta = attached(pt.LoRA(rank=6, alpha=6), W, model.linear.bias)
    set_(delta.A, torch.cat(list(group.A)))
    set_(delta.B, torch.cat(list(group.B), 1))
    torch.testing.assert_close(model(x), lora(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "gpt2", "torch_encoder"])
def test_merge_is_the_forward_pass(name: str) -> None:
    toys.assert_merges(name, pt.PEGO())


# 4
@pytest.mark.parametrize("penalty", ["l1", "squared"])
@pytest.mark.parametrize("along", ["input", "output"])
@pytest.mark.parametrize("shape", [(8, 8), (6, 10)])
def test_terms_and_gradients_are_those_of_the_written_out_products(
    shape: tuple[int, int], along: Any, penalty: Any
) -> None:
    W = matrix(*shape)
    _, method, group = moved(W, penalty=penalty, along=along)
    found, wanted = method.overlaps([group]), explicit(W, group.A, group.B, penalty, along)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        gradients = [torch.autograd.grad(value, [group.A, group.B], retain_graph=True) for value in (one, other)]
        for mine, autograd in zip(*gradients, strict=True):
            torch.testing.assert_close(mine, autograd, rtol=1e-4, atol=1e-4)


def test_sums_over_all_sites_of_several_sizes() -> None:
    model = tiny.model("llama")
    method = pt.PEGO(rank=2, num_loras=3, roles=["q", "v", "down"], preserve_weight=0.5, diversify_weight=2.0)
    tuned = pt.attach(model, method)
    toys.shake(tuned)
    parts = [explicit(slot.host.module(slot.site.path).weight, slot.delta.A, slot.delta.B) for slot in tuned.slots]
    (term,) = tuned.loss_terms()
    torch.testing.assert_close(
        term, 0.5 * sum(p for p, _ in parts) + 2.0 * sum(d for _, d in parts), rtol=1e-5, atol=1e-5
    )


def test_tiles_do_not_show() -> None:
    P, Q = torch.randn(3, 1100, 2, requires_grad=True), torch.randn(3, 1200, 2, requires_grad=True)
    found, wanted = AbsoluteSum.apply(P, Q), (P @ Q.mT).abs().sum()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    for mine, autograd in zip(torch.autograd.grad(found, [P, Q]), torch.autograd.grad(wanted, [P, Q]), strict=True):
        torch.testing.assert_close(mine, autograd, rtol=1e-3, atol=1e-2)


def test_nothing_as_large_as_the_product_is_kept() -> None:
    from torch.autograd.graph import saved_tensors_hooks

    P, Q = torch.randn(1, 400, 2, requires_grad=True), torch.randn(1, 400, 2, requires_grad=True)
    kept: list[int] = []
    with saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        AbsoluteSum.apply(P, Q)
    assert max(kept) <= 2 * 400


# 5
def test_keys_and_the_weight_itself_are_left_alone() -> None:
    model, batch = tiny.model("gpt2"), tiny.batch("gpt2")
    fused = model.transformer.h[0].attn.c_attn
    seen: list[Tensor] = []
    handle = fused.register_forward_hook(lambda m, a, y: seen.append(y.detach()))
    toys.output(model, batch)
    handle.remove()
    tuned = pt.attach(model, pt.PEGO(layers=(0,)))
    toys.shake(tuned)
    handle = fused.register_forward_hook(lambda m, a, y: seen.append(y.detach()))
    model.train()(**batch).loss.backward()
    handle.remove()
    q, k, v = ((seen[1] - seen[0])[..., i * 32 : (i + 1) * 32] for i in range(3))
    assert bool(q.any()) and bool(v.any()) and not bool(k.any())
    assert fused.weight.grad is None and all(bool(p.grad.any()) for p in tuned.parameters())


# 6
def test_orthogonal_updates_cost_nothing() -> None:
    W = matrix(SIZE, 4) @ torch.eye(4, SIZE)  # sees the first four inputs only
    _, method, group = moved(W)
    set_(group.A, torch.cat([torch.zeros(3, 2, 4), torch.randn(3, 2, 4)], 2))
    assert method.overlaps([group])[0].item() < 1e-5
    group.A.data[1, 0, 2] = 1e-2
    assert method.overlaps([group])[0].item() > 1e-3
    _, method, group = moved(matrix())  # of full rank: only D = 0
    assert method.overlaps([group])[0].item() > 1e-3
    group.B.data.zero_()
    assert method.overlaps([group])[0].item() == 0.0
    _, method, group = moved(matrix(), num_loras=1)
    assert method.overlaps([group])[1].item() == 0.0


# 7
def test_the_order_of_modules_does_not_matter() -> None:
    model, method, group = moved(matrix())
    x = torch.randn(2, 5, SIZE)
    y, sums = model(x), method.overlaps([group])
    for parameter in (group.A, group.B):
        set_(parameter, parameter[[2, 0, 1]].detach().clone())
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(method.overlaps([group]), sums, rtol=1e-5, atol=1e-5)


# 8
def test_how_the_terms_grow() -> None:
    _, method, group = moved(matrix())
    before = method.overlaps([group])
    set_(group.B, 3 * group.B.detach())
    preserve, diversify = method.overlaps([group])
    torch.testing.assert_close(preserve, 3 * before[0])
    torch.testing.assert_close(diversify, 9 * before[1])


# 9
def test_without_the_terms_it_trains_as_lora() -> None:
    W, x, target = matrix(), torch.randn(20, SIZE), torch.randn(20, SIZE)
    pego, group = attached(pt.PEGO(rank=2, num_loras=3, preserve_weight=0, diversify_weight=0), W)
    lora, delta = attached(pt.LoRA(rank=6, alpha=6), W)
    set_(delta.A, torch.cat(list(group.A)))
    losses: list[list[float]] = []
    for model in (pego, lora):
        optimizer = torch.optim.Adam(of(model).parameters(), lr=1e-2)
        losses.append([])
        for _ in range(50):
            optimizer.zero_grad()
            loss = (model(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses[-1].append(float(loss.detach()))
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(pego(x), lora(x), rtol=1e-3, atol=1e-4)
    assert of(pego).loss_terms() == []


# 10
def test_what_the_file_holds(tmp_path: Path) -> None:
    model, batch = tiny.model("vit"), tiny.batch("vit")
    tuned = pt.attach(model, pt.PEGO())
    toys.shake(tuned)
    path = tuned.save(tmp_path / "a.safetensors")
    names = {name.rpartition(":")[2] for name in parse(path.read_bytes())[0]}
    assert names == {"A", "B", "module.weight", "module.bias"}
    fresh = tiny.model("vit")
    pt.load(fresh, path)
    assert torch.equal(toys.output(fresh, batch), toys.output(model, batch))


# the terms in training
def test_the_loss_in_training_holds_the_terms() -> None:
    model, batch = tiny.model("bert"), tiny.batch("bert")
    tuned = pt.attach(model, pt.PEGO(preserve_weight=0.1, diversify_weight=0.2))
    toys.shake(tuned)
    (term,) = tuned.loss_terms()
    torch.testing.assert_close(model.train()(**batch).loss, model.eval()(**batch).loss + term)


def test_half_precision_weights_do_not_overflow() -> None:
    W = 50 * torch.ones(300, 300)
    model = OneLinear(W.half())
    method = pt.PEGO(roles=("q",), layers=(0,))
    tuned = pt.attach(model, method, found=pt.anatomy(model, stacks={"encoder": "blocks"}, roles={"q": "query"}))
    group = tuned.slots[0].delta
    group.A.data.fill_(0.1)
    group.B.data.fill_(1.0)
    preserve, _ = method.overlaps([group])
    assert preserve.dtype == torch.float32
    torch.testing.assert_close(preserve.item(), 4 * 300 * 300 * (50 * 300 * 0.4), rtol=1e-3, atol=0)  # far above 65,504


def test_once_merged_the_terms_are_refused() -> None:
    model, batch = tiny.model("bert"), tiny.batch("bert")
    tuned = pt.attach(model, pt.PEGO())
    toys.shake(tuned)
    tuned.merge()
    with pytest.raises(AttachError, match="unmerge"):
        tuned.loss_terms()
    tuned.unmerge()
    model.train()(**batch).loss.backward()


# refusals
@pytest.mark.parametrize(
    "fields",
    [
        {"rank": 0},
        {"num_loras": 0},
        {"preserve_weight": -1e-3},
        {"diversify_weight": -1.0},
        {"penalty": "l2"},
        {"along": "both"},
    ],
)
def test_refused_configurations(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        pt.PEGO(**fields)


@pytest.mark.parametrize("name,role", [("bert", "embedding"), ("resnet", "conv")])
def test_what_is_no_linear_is_refused(name: str, role: str) -> None:
    with pytest.raises(AttachError, match="pego"):
        pt.attach(tiny.model(name), pt.PEGO(roles=[role]))


def test_weights_that_cannot_be_dequantised_are_refused() -> None:
    model = tiny.model("bert")
    tuned = pt.attach(model, pt.PEGO())
    layer = model.bert.encoder.layer[0].attention.self.query
    layer.weight = nn.Parameter(layer.weight.mul(100).to(torch.int8), requires_grad=False)
    with pytest.raises(AttachError, match="dequantised"):
        tuned.loss_terms()
