"""Which tokens a head reads: their mean is put in the place of every token, so that whatever token a head takes, it takes that.

    h_t <- (1 / |S|) Σ_{i in S} LN(h_i)        S: all tokens, the class token, prompts, patches; padding left out

LN is the norm behind the last block, whether it trains or not. Nothing here trains.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from petiole.anatomy import Anatomy, Site, Stack
from petiole.errors import AttachError
from petiole.method import HiddenDelta, Place
from petiole.methods.execution.patches import front_tokens

Pooled = Literal["model", "all", "cls", "prompts", "patches", "prompts+patches"]
Own = Literal["model", "all", "cls", "patches"]


def pooled(
    kind: Pooled, anatomy: Anatomy, stack: Stack, model: nn.Module, length: int = 0, replaced: int | None = None
) -> Place:
    """What makes of all tokens the mean of some. It has to be attached before the prompts, which are gone after the last block.

    Args:
        length: prompts in front of the model's tokens. replaced: the token of the model's that one more prompt takes the place of.

    Raises:
        AttachError: there is no norm behind the last block, or no class token where one is asked for.
    """
    norm = anatomy.final_norm(stack)
    if norm is None:
        raise AttachError(
            f"pool={kind!r}: {anatomy.model_class} has no norm behind its last block; pool='model' fits any"
        )
    front = sum(count for _, count in front_tokens(anatomy, stack, model)) if kind not in ("all", "prompts") else 0
    if kind == "cls" and not front:
        raise AttachError(f"pool='cls': {anatomy.model_class} has no class token")
    last = next(site for site in stack.blocks[-1].sites if site.role == "block")
    return Place(norm.at("output"), Pool(kind, norm, front, length, replaced), read=last.at("output"))


class Pool(HiddenDelta):
    """The last block's output (B, l + T, d), and T tokens -> T times the mean of some.

    Args:
        kind: of which. norm: the final one. front: special tokens of the model's. length: l. replaced: a special token that is a prompt.
    """

    composition = "replace"
    reads_both = True

    def __init__(self, kind: Pooled, norm: Site, front: int, length: int, replaced: int | None) -> None:
        super().__init__()
        self.kind, self.norm, self.front, self.length, self.replaced = kind, norm, front, length, replaced

    def forward(self, states: Tensor, h: Tensor) -> Tensor:
        states = states[:, : self.length + h.shape[1]]
        x = self.host.module(self.norm.path).forward(states)
        weight = self.chosen(x)[None]
        real = self.host.unpadded(self.norm, x)
        if real is not None:
            weight = weight & real
        weight = weight[..., None].to(x.dtype)
        mean = (x * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(1)
        return mean.expand_as(h)

    def chosen(self, x: Tensor) -> Tensor:
        """Which of the tokens of x (B, l + T, d) are S: (l + T,)"""
        place = torch.arange(x.shape[1], device=x.device)
        prompts = place < self.length
        if self.replaced is not None:
            prompts = prompts | (place == self.length + self.replaced)
        patches = place >= self.length + self.front
        of = {
            "all": torch.ones_like(prompts),
            "cls": place == self.length,
            "prompts": prompts,
            "patches": patches,
            "prompts+patches": prompts | patches,
        }
        return of[self.kind]
