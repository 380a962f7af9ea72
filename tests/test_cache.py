"""The cache: the same losses and weights as without, blocks below not run, and a refusal wherever it would be wrong."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import petiole as pt
import tiny
from petiole.cache import Cache, Store, bytes_of
from petiole.method import StackDelta

METHODS = {
    "linear-probe": lambda: pt.LinearProbe(),
    "lora on top": lambda: pt.LoRA(rank=2, layers=(-1,)),
    "adapter on top": lambda: pt.ParallelAdapter(bottleneck=4, layers=(-1,)),
}


def still(model: nn.Module) -> nn.Module:
    """Without dropout."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or (name == "p" and "rop" in type(module).__name__)):
                setattr(module, name, 0.0)
    return model


def train(model: nn.Module, batch: dict[str, Any], cache: Cache | None, epochs: int = 3) -> list[float]:
    optimizer = torch.optim.SGD(pt.adaptations(model)["default"].parameters(), lr=0.1)
    model.train()
    losses = []
    rows = len(batch["labels"])
    for epoch in range(epochs):
        for part in torch.randperm(rows, generator=torch.Generator().manual_seed(epoch)).split(2):
            own = {k: v[part] for k, v in batch.items()}
            if epoch == 2 and "attention_mask" in own:  # another batch, another padding
                own = {
                    k: nn.functional.pad(v, (0, 2), value=-100 if k == "labels" else 0) if v.ndim == 2 else v
                    for k, v in own.items()
                }
            if cache is None:
                loss = model(**own).loss
            else:
                with cache.rows(part):
                    loss = model(**own).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "llama", "vit"])
@pytest.mark.parametrize("budget", ["1GB", 0])
def test_training_is_the_same_with_and_without(family: str, method: str, budget: int | str) -> None:
    model, batch = still(tiny.model(family)), tiny.batch(family, size=5)
    if method == "linear-probe" and not pt.anatomy(model).heads():
        pytest.skip("no head to probe with")
    pt.attach(model, METHODS[method]())
    other = copy.deepcopy(model)
    cache = Cache(model, budget)
    assert train(model, batch, cache) == pytest.approx(train(other, batch, None), abs=1e-5)
    assert cache.misses == 5
    assert cache.hits == 10
    assert (cache.store.spilled > 0) == (budget == 0)
    assert not [m for m in model.modules() if "forward" in vars(m)], "a stand-in was left behind"


def test_blocks_below_do_not_run() -> None:
    model, batch = still(tiny.model("bert")), tiny.batch("bert", size=4)
    pt.attach(model, pt.LoRA(layers=(-1,)))
    blocks = pt.anatomy(model).stack().blocks
    ran: list[int] = []
    for block in blocks:
        inner = next(s for s in block.sites if s.role == "q").path
        model.get_submodule(inner).register_forward_hook(lambda m, a, o, depth=block.depth: ran.append(depth))
    cache = Cache(model)
    for _ in range(2):
        ran.clear()
        with cache.rows([0, 1, 2, 3]):
            model(**batch)
    assert ran == [len(blocks) - 1]


class Mean(StackDelta):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, width)

    def forward(self, states: list[torch.Tensor]) -> torch.Tensor:
        return self.up(torch.stack(states).mean(0))


class MeanOfStates(pt.Method):
    def deltas(self, anatomy: Any) -> Any:
        from petiole.method import Place

        stack = anatomy.stack()
        yield Place(next(s for s in stack.blocks[-1].sites if s.role == "block"), Mean(stack.hidden_size))


@pytest.mark.parametrize("family", ["bert", "vit", "t5"])
def test_a_side_network_gets_all_states_from_the_cache(family: str) -> None:
    model, batch = still(tiny.model(family)), tiny.batch(family, size=4)
    pt.attach(model, MeanOfStates())
    other = copy.deepcopy(model)
    assert train(model, batch, Cache(model), 2) == pytest.approx(train(other, batch, None, 2), abs=1e-5)


def test_half_precision_takes_half_the_bytes() -> None:
    sizes = []
    for half in (False, True):
        model, batch = still(tiny.model("vit")), tiny.batch("vit", size=4)
        pt.attach(model, pt.LinearProbe())
        cache = Cache(model, half=half)
        train(model, batch, cache, 2)
        sizes.append(cache.store.used)
    assert sizes[0] == 2 * sizes[1]


# ---- refusals


def test_dropout_below_is_refused() -> None:
    model, batch = tiny.model("bert", hidden_dropout_prob=0.1), tiny.batch("bert")
    pt.attach(model, pt.LinearProbe())
    model.train()
    with pytest.raises(pt.PetioleError, match=r"dropout.*= 0\.1"), Cache(model).rows(range(len(batch["labels"]))):
        model(**batch)


def test_nothing_frozen_below_is_refused() -> None:
    for method in (pt.LoRA(), pt.FullFineTuning(), pt.PromptTuning()):
        model = tiny.model("bert")
        pt.attach(model, method)
        with pytest.raises(pt.PetioleError, match="nothing can be cached"):
            Cache(model)


def test_a_changed_input_is_refused() -> None:
    model, batch = still(tiny.model("vit")), tiny.batch("vit", size=2)
    pt.attach(model, pt.LinearProbe())
    cache = Cache(model)
    with cache.rows(["x", "y"]):
        model(**batch)
    batch["pixel_values"] = batch["pixel_values"].flip(-1)
    with pytest.raises(pt.PetioleError, match=r"sample 'x'.*\n.*augmentation"), cache.rows(["x", "y"]):
        model(**batch)
    assert not [m for m in model.modules() if "forward" in vars(m)]


def test_padding_that_moves_is_refused() -> None:
    model, batch = still(tiny.model("gpt2")), tiny.batch("gpt2", size=2)
    pt.attach(model, pt.LoRA(layers=(-1,)))
    cache = Cache(model)
    with cache.rows([0, 1]):
        model(**batch)
    batch = {k: nn.functional.pad(v, (2, 0), value=-100 if k == "labels" else 0) for k, v in batch.items()}
    with pytest.raises(pt.PetioleError, match="padding on the right"), cache.rows([0, 1]):
        model(**batch)


def test_ids_that_do_not_fit_the_batch_are_refused() -> None:
    model, batch = still(tiny.model("vit")), tiny.batch("vit", size=3)
    pt.attach(model, pt.LinearProbe())
    with pytest.raises(pt.PetioleError, match="2 ids"), Cache(model).rows([0, 1]):
        model(**batch)


# ---- the store


def test_store_spills_to_a_file_and_reads_back() -> None:
    store = Store(budget=100)
    tensors = {i: torch.randn(5, i + 1) for i in range(8)} | {8: torch.arange(4), 9: torch.randn(3).bfloat16()}
    for key, tensor in tensors.items():
        store.put(key, tensor)
    assert 0 < store.used <= 100
    assert store.spilled > 0
    for key, tensor in tensors.items():
        assert torch.equal(store.get(key), tensor)
        assert store.get(key).dtype == tensor.dtype
    store.put(10, torch.ones(50))  # after a read, the map must grow
    assert torch.equal(store.get(10), torch.ones(50))
    store.close()
    assert len(store) == 0


@pytest.mark.parametrize(
    ("text", "value"), [("2GB", 2 * 10**9), ("1.5MiB", 3 * 2**19), ("100", 100), (7, 7), ("3 kB", 3000)]
)
def test_sizes(text: int | str, value: int) -> None:
    assert bytes_of(text) == value


@pytest.mark.parametrize("text", ["2 parsecs", "", "GB", "-1GB"])
def test_sizes_refused(text: str) -> None:
    with pytest.raises(pt.PetioleError, match="budget"):
        bytes_of(text)
