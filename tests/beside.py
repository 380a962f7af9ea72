"""What the tests of side networks share: no graph below them, the same numbers from the cache, costs as predicted, refusals that leave no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petiole as pt
import tiny
import toys
from petiole import cost
from petiole.cache import Cache
from petiole.errors import PetioleError


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_no_graph_below(model: nn.Module, reader: nn.Module, batch: Any) -> Tensor:
    """Nothing was saved for backward when `reader` is given its states, none of which needs a gradient. Returns a loss."""
    before: list[int] = []
    saved: list[Tensor] = []

    def look(module: nn.Module, args: Any) -> None:
        before.append(len(saved))
        assert not any(h.requires_grad for h in (*args[0], args[2]))

    reader.register_forward_pre_hook(look)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        loss = toys.first(model.train()(**batch)).square().mean()
    assert before == [0]
    assert saved
    return loss


def assert_cached_alike(
    model: nn.Module, tuned: pt.Adaptation, batch: Any, start: Callable[[], object] = lambda: None
) -> Cache:
    """Loss and gradients from what the cache kept are those of the first pass.

    Args:
        start: called before each pass.
    """
    cache, found = Cache(model), []
    for _ in range(2):
        start()
        with cache.rows(range(tiny.BATCH)):
            loss = model(**batch).loss
        loss.backward()
        found.append([loss, *(p.grad.clone() for p in tuned.parameters())])
        for p in tuned.parameters():
            p.grad = None
    assert cache.hits == tiny.BATCH
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    return cache


def assert_cost_is_predicted(
    model: nn.Module, tuned: pt.Adaptation, batch: Any, fields: Sequence[str] = ("saved_bytes",)
) -> None:
    predicted, measured = cost.predict(model, batch), cost.measure(model, batch, repeats=1, warmup=0)
    for field in fields:
        assert getattr(predicted, field) == getattr(measured, field), field
    assert predicted.parameters.trainable == tuned.trainable


def assert_refused(cls: type[pt.Method], cases: Iterable[tuple[str, dict[str, Any], str]]) -> None:
    """Each case, a family, fields and words, is refused with these words in three lines at most, and the model is as before."""
    for name, fields, words in cases:
        model = tiny.model(name)
        before = toys.snapshot(model)
        with pytest.raises(PetioleError, match=words) as caught:
            pt.attach(model, cls(**{"reduction_factor": 4, **fields}))
        assert len(str(caught.value).splitlines()) <= 3
        assert toys.snapshot(model) == before
