"""Hidden states of convolutional networks have their channels in front; a delta sees them last all the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import petiole as pt
import tiny
from petiole.method import HiddenDelta, Method, Place


class Doubling(HiddenDelta):
    """Δh = w ⊙ h"""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(size))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        assert h.shape[-1] == self.w.shape[0]
        return self.w * h


class AtRole(Method):
    """Not registered: it has no slug."""

    role: str = "conv"

    def deltas(self, anatomy: pt.Anatomy) -> Iterator[Place]:
        for site in anatomy.sites([self.role]):
            yield Place(site.at("output"), Doubling(site.out_features))


@pytest.mark.parametrize("role", ["conv", "norm", "block"])
@pytest.mark.parametrize("family", ["resnet", "convnext"])
def test_a_change_of_each_channel_is_the_same_change_of_the_module(family: str, role: str) -> None:
    # ResNet's normalisation is over (B, d, H, W), ConvNeXt's over (B, H, W, d); both blocks give (B, d, H, W).
    model, batch = tiny.model(family), tiny.batch(family)
    site = pt.anatomy(model).sites([role])[0]
    seen: list[Any] = []
    module = model.get_submodule(site.exit)
    with torch.no_grad():
        handle = module.register_forward_hook(lambda _, __, output: seen.append(output))
        model(**batch)
        handle.remove()
        pt.attach(model, AtRole(role=role), train_head=False)
        handle = module.register_forward_hook(lambda _, __, output: seen.append(output))
        model(**batch)
        handle.remove()
    assert torch.equal(seen[1], 2 * seen[0])  # the first such site: what comes in is the bare model's


def test_a_change_of_a_part_of_a_fused_projection_may_differ_by_row() -> None:
    # The change was given the whole of the fused output instead of its own part, wherever not all rows took it.
    model, batch = tiny.model("gpt2"), tiny.batch("gpt2")
    pt.attach(model, AtRole(role="q"), name="one")
    with torch.no_grad():
        changed = model(**batch).logits
        with pt.disabled(model):
            bare = model(**batch).logits
        with pt.route(model, ["one", None]):
            mixed = model(**batch).logits
    assert not torch.allclose(changed, bare)
    torch.testing.assert_close(mixed, torch.stack([changed[0], bare[1]]))


def test_ia3_on_convolutions_merges() -> None:
    model, batch = tiny.model("resnet"), tiny.batch("resnet")
    tuned = pt.attach(model, pt.IA3(roles=["conv"]))
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        before = model(**batch).logits
        tuned.merge()
        torch.testing.assert_close(model(**batch).logits, before)


def test_ia3_at_the_input_of_a_convolution_in_groups_is_refused() -> None:
    with pytest.raises(pt.PetioleError, match="in 16 groups"):
        pt.attach(tiny.model("convnext"), pt.IA3(roles=["conv"], input_roles=["conv"]))


def test_ia3_need_not_repeat_which_roles_are_scaled_at_their_input() -> None:
    pt.attach(tiny.model("bert"), pt.IA3(roles=["k", "v"]))
    with pytest.raises(pt.PetioleError, match="input_roles"):
        pt.attach(tiny.model("bert"), pt.IA3(roles=["k", "v"], input_roles=["up"]))


def test_a_change_beside_a_convolution_with_a_stride_is_refused() -> None:
    tuned = pt.attach(tiny.model("resnet"), pt.ParallelAdapter(roles=["block"], bottleneck=2))
    with pytest.raises(pt.PetioleError, match="size of an image"):
        tuned.check(tiny.batch("resnet"))


@pytest.mark.parametrize("method", [pt.DoRA, pt.SLoRA, pt.NLoRA, pt.IntTune], ids=lambda cls: cls.slug)
def test_a_convolution_that_is_never_called_is_none_of_the_linears(method: type[Method]) -> None:
    # Mamba hands the kernel to its scan: it is a parameter, but of three dimensions.
    with pytest.raises(pt.PetioleError, match="is a convolution"):
        pt.attach(tiny.model("mamba"), method(roles=["conv"], rank=2))


@pytest.mark.parametrize("method", [pt.SLoRA, pt.NLoRA, pt.IntTune], ids=lambda cls: cls.slug)
def test_a_method_that_finds_no_place_does_not_train_the_head_alone(method: type[Method]) -> None:
    with pytest.raises(pt.PetioleError, match="ResNetForImageClassification has none of q, k, v"):
        pt.attach(tiny.model("resnet"), method(rank=2))


@pytest.mark.parametrize("method", [pt.HoulsbyAdapter, pt.PfeifferAdapter, pt.PrefixTuning], ids=lambda cls: cls.slug)
def test_one_stack_of_several(method: type[Method]) -> None:
    for stack in ("encoder", "decoder"):
        tuned = pt.attach(tiny.model("t5"), method(stack=stack))
        assert {slot.site.stack for slot in tuned.slots} == {stack}
    with pytest.raises(pt.PetioleError, match="has no stack 'vision'"):
        pt.attach(tiny.model("t5"), method(stack="vision"))
