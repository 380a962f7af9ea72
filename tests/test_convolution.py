"""LoRA on convolutions: its A is a kernel of the site's own size. It was built without one, and failed at the first batch."""

from __future__ import annotations

import pytest
import torch

import petiole as pt
import tiny
from petiole.errors import AttachError


def test_a_kernel_factors() -> None:
    model, batch = tiny.model("resnet").eval(), tiny.batch("resnet")
    with torch.no_grad():
        bare = model(**batch).logits
        tuned = pt.attach(model, pt.LoRA(rank=2, roles=["conv"]))
        assert torch.equal(model(**batch).logits, bare)
        for parameter in tuned.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        assert {slot.delta.A.ndim for slot in tuned.slots if slot.site.role == "conv"} == {4}
        changed = model(**batch).logits
        tuned.merge()
        torch.testing.assert_close(model(**batch).logits, changed, rtol=1e-5, atol=1e-5)


def test_groups_are_refused() -> None:
    with pytest.raises(AttachError, match="in 16 groups"):
        pt.attach(tiny.model("convnext"), pt.LoRA(rank=2, roles=["conv"]))
