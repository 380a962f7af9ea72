"""Recomputing some blocks: the same gradients, the predicted peak is the real one, and no more blocks than the budget takes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petiole as pt
import tiny
from petiole import cost
from petiole.errors import ConfigError
from petiole.recompute import fewest, fit, kept_bytes, recomputed, units

FAMILIES = ["bert", "llama", "vit", "t5", "gpt2", "swin", "wav2vec2"]


def attached(family: str, method: Any = None, **changes: Any) -> nn.Module:
    model = tiny.model(family, **changes)
    pt.attach(model, method or pt.LoRA(rank=2, roles=("q", "v")))
    with torch.no_grad():
        for p in pt.adaptations(model)["default"].parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model.train()


def gradients(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    torch.manual_seed(1)
    model(**batch).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_same_whatever_is_recomputed_and_nothing_stays(family: str) -> None:
    model, batch = attached(family), tiny.batch(family)
    paths = list(units(model))
    before = {path: set(model.get_submodule(path).__dict__) for path in paths}
    expected = gradients(model, batch)
    for chosen in (paths[:1], paths[-1:], paths):
        with recomputed(model, chosen):
            assert [p for p in paths if model.get_submodule(p).gradient_checkpointing] == chosen  # and no other one
            found = gradients(model, batch)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    pt.detach(model)
    assert {path: set(model.get_submodule(path).__dict__) for path in paths} == before


def test_every_linear_on_the_fast_path_beside_a_recomputed_block() -> None:
    """The first linear of a kept block reads what the block before it made, which keeps nothing when it is recomputed."""
    method = pt.LoRA(rank=2, roles=("q", "k", "v", "o", "up", "down"))
    model, batch = attached("bert", method, num_hidden_layers=3), tiny.batch("bert")
    expected = gradients(model, batch)
    for chosen in (["bert.encoder.layer.0"], ["bert.encoder.layer.0", "bert.encoder.layer.2"]):
        with recomputed(model, chosen):
            for name, value in gradients(model, batch).items():
                torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "llama", "vit", "t5"])
def test_the_predicted_peak_is_the_measured_one_and_no_block_is_recomputed_in_vain(family: str) -> None:
    changes = {"num_layers": 4} if family == "t5" else {"num_hidden_layers": 5}
    model, batch = attached(family, **changes), tiny.batch(family)
    plain = fit(model, batch, 10**9)
    assert plain.blocks == () and str(plain).startswith("recomputes nothing")
    every = tuple(path for path, kept in kept_bytes(model, batch).items() if kept)
    peaks = []
    for count in range(len(every) + 1):
        with recomputed(model, every[:count]):
            peaks.append(cost.measure(model, batch, torch.optim.AdamW, repeats=1, warmup=0).peak_bytes)
    assert plain.peak_bytes == peaks[0]
    for budget in sorted({(a + b) // 2 for a, b in itertools.pairwise(peaks) if b < a}):
        choice = fit(model, batch, budget)
        count = len(choice.blocks)
        assert choice.blocks == every[:count] and choice.among == len(every)
        assert choice.peak_bytes == peaks[count] <= budget < peaks[count - 1]
        assert choice.step_flops > choice.plain_flops and choice.plain_bytes == peaks[0]
        assert f"recomputes {count} of {len(every)} blocks" in str(choice)
    with pytest.raises(
        ConfigError, match=rf"memory = 1000: with all {len(every)} blocks recomputed a step still takes"
    ):
        fit(model, batch, 1000)


def test_blocks_below_what_trains_keep_nothing_and_are_left_alone() -> None:
    model, batch = attached("bert", pt.LoRA(rank=2, layers=(2, 3)), num_hidden_layers=4), tiny.batch("bert")
    kept = kept_bytes(model, batch)
    assert [bool(n) for n in kept.values()] == [False, False, True, True]
    plain = fit(model, batch, "1GB").peak_bytes
    assert set(fit(model, batch, plain - 1).blocks) <= set(list(kept)[2:])


def test_more_that_is_held_counts() -> None:
    model, batch = attached("bert"), tiny.batch("bert")
    plain = fit(model, batch, 10**9).peak_bytes
    assert fit(model, batch, plain).blocks == () and fit(model, batch, plain, extra_bytes=1).blocks != ()


def test_works_on_shapes_alone() -> None:
    with torch.device("meta"):
        model = tiny.model("bert")
    pt.attach(model, pt.LoRA(rank=2))
    batch = {name: value.to("meta") for name, value in tiny.batch("bert").items()}
    assert fit(model, batch, fit(model, batch, 10**9).peak_bytes - 1).blocks == ("bert.encoder.layer.0",)


@pytest.mark.parametrize("most", [1, 2, 3, 24, 80])
def test_the_fewest_are_found_in_few_looks(most: int) -> None:
    for slope in (1, 7):
        for wanted in range(1, most + 1):
            looks: list[int] = []

            def peak(count: int, slope: int = slope, looks: list[int] = looks) -> int:
                looks.append(count)
                return 1000 - slope * count

            assert fewest(peak, most, 1000 - slope * wanted) == wanted
            assert len(set(looks)) <= 6


def test_steps_that_are_not_straight() -> None:
    def peak(count: int) -> int:
        return [100, 99, 99, 60, 60, 59, 58, 20, 19][count]

    assert [fewest(peak, 8, budget) for budget in (99, 98, 60, 59, 21, 19)] == [1, 3, 3, 5, 8 - 1, 8]


def test_refusals() -> None:
    class Plain(nn.Module):
        pass

    with pytest.raises(ConfigError, match="Plain has no layers that Transformers can recompute"):
        units(Plain())
    model = attached("bert")
    refusal = r"'bert\.pooler' can't be recomputed by itself; there are bert\.encoder\.layer\.0"
    with pytest.raises(ConfigError, match=refusal), recomputed(model, ["bert.pooler"]):
        pass
    with pytest.raises(ConfigError, match="memory = 'lots': a number of bytes"):
        fit(model, tiny.batch("bert"), "lots")
