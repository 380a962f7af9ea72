"""PYRA: tokens merge from block to block, modulated before they do.  Xiong et al. 2024, arXiv 2403.09192.

In block l, between attention and feed-forward, the r_l most similar tokens merge into their partners (`merging.py`):

    src, dst   (B, r, C)     sources, the most similar pair first, and their partners, each token times its size
    I          = LN(src + dst)                                      (B, r, C)
    a          = 2 sigmoid(W_rᵀ I)          W_r (r, 1)              (B, 1, C), a weight for each channel
    b          = 2 sigmoid(I W_Dᵀ) - 1      W_D (1, C)              (B, r, 1), a weight for each token
    src       <- src + src a b                                      a factor in (-1, 3), then added to the partner

Attention is proportional: log(size) on the scores of each key. Every entry of W_r belongs to a rank in the order of similarity.

Sits     in every block: at attention, before the second norm, around the ffn, at the block's end; and as LoRA on q, k and v, which share A
         as in one fused linear: W x + b <- W x + b + B A x, with dropout on x.
Trains   r_l + 3 C numbers in each block that merges, 2 C of them the norm's; and rank (C + 3 C) of LoRA in each block.
Starts   at W_D = 0 and B = 0: plain token merging, exactly.
Merges   LoRA does, with `merge(partly=True)`; tokens go on merging.

A schedule says r_l: a list, filled up with zeros; one number for all blocks; (r, inflection), a ramp around r; "low", a constant that leaves
next to nothing, which is the paper's for ViT-B and ViT-L; or "high", the paper's own list for these. `report` says what is left of tokens
and multiply-adds. Images of another size than the configured are merged by as much, as far as there are tokens.

What becomes of each token is published: `pt.streams(model)["token_places"]` after a forward pass, for `unmerge`, and "token_sizes".
A head that averages tokens counts a merged one like any other. q, k and v each draw a dropout of their own.

Relations: with modulate=False this is token merging (ToMe); with rank=0 it goes with any other method in a list. A method that reads or
writes the residual between attention and ffn sees tokens before they merge; prompts in front need `protected_tokens`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from petiole.anatomy import Anatomy, Stack, anatomy
from petiole.errors import AttachError
from petiole.method import Base, Delta, Method, Moment, Place, WeightDelta
from petiole.methods.execution.merging import Cut, Merge, Pad, Stage, Weigh, cap, capped, prompts, ramp
from petiole.methods.execution.patches import Tokens, image_stack, places, tokens
from petiole.methods.lowrank.factors import Factors, kaiming_uniform

Count = Annotated[int, Field(strict=True)]
Schedule = tuple[Count, ...] | Count | tuple[Count, float] | Literal["low", "high"]
PATCHES = 196  # of an image of 224 x 224 pixels in patches of 16 x 16, for which there are lists
HIGH = {
    12: (40, 34, 30, 24, 18, 14, 10, 8, 4, 4, 3, 3),
    24: (20, 19, 18, 17, 15, 13, 13, 12, 10, 9, 8, 6, 6, 4, 4, 4, 3, 3, 2, 2, 1, 1, 1, 1),
}
LOW_DISTILLED = (16,) * 6 + (10,) * 6  # DeiT-B with its distillation token


class PYRA(Method):
    """Merge tokens in every block, modulated, with LoRA on q, k and v."""

    slug: ClassVar[str] = "pyra"
    title: ClassVar[str] = "PYRA: Parallel Yielding Re-Activation for Training-Inference Efficient Task Adaptation"
    paper: ClassVar[str] = "2403.09192"
    saves: ClassVar[str] = "FLOPs, time and activation memory in training and at inference; parameters"
    routes: ClassVar[bool] = False
    idles: ClassVar[str] = "a class token sees nothing of what merges in the last block"
    size: ClassVar[str] = "rank"
    learning_rates: ClassVar[tuple[float, float]] = (1e-4, 1e-2)
    exempt: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("bert", "llama", "gpt2", "t5"), "it merges patches of images, which this model does not take"
    )

    schedule: Schedule = Field(
        "low", description="Tokens to merge in each block: a list, one number, a ramp (r, inflection), low or high."
    )
    rank: int = Field(8, ge=0, description="Inner width of LoRA on q, k and v; with 0 there is none.")
    dropout: float = Field(0.1, ge=0, lt=1, description="On the input of LoRA, in training.")
    modulate: bool = Field(True, description="Whether sources are modulated; if not, tokens merge as they are.")
    rate_factor: float = Field(
        1.0,
        gt=0,
        description="Learning rate of the modulation, as a multiple of the run's: a group of its own if not 1.",
    )
    proportional_attention: bool = Field(True, description="Whether attention weighs tokens by their size.")
    protected_tokens: int | None = Field(
        None,
        ge=0,
        description="How many tokens in front never merge; if None the model's class, distillation and register tokens.",
    )

    @field_validator("schedule", mode="before")
    @classmethod
    def one_of_four(cls, schedule: Any) -> Any:
        numbers = schedule if isinstance(schedule, (list, tuple)) else [schedule]
        whole = [type(number) is int and number >= 0 for number in numbers]
        ramp = len(numbers) == 2 and whole[0] and isinstance(numbers[1], float) and -1 <= numbers[1] <= 1
        if not (numbers and all(whole)) and not ramp and schedule not in ("low", "high"):
            raise ValueError(
                "a list of numbers from 0, one, a pair (r, inflection) with one from -1.0 to 1.0, 'low' or 'high'"
            )
        return schedule

    # ---- how many tokens

    def counts(self, model_class: str, layers: int, seen: Tokens) -> tuple[int, ...]:
        """r_l of each block.

        Raises:
            AttachError: the schedule is longer than the stack, or "high" for sizes that have no such list.
        """
        schedule = self.schedule
        if schedule == "high":
            if seen.patches != PATCHES or layers not in HIGH:
                raise AttachError(
                    f"pyra: schedule = 'high' is for 12 or 24 blocks and {PATCHES} patches; {model_class} has {layers} and {seen.patches}\n"
                    "give a list, one number, a ramp, or 'low'"
                )
            return HIGH[layers]
        if schedule == "low":
            if (seen.patches, layers, seen.front) == (PATCHES, 12, 2):
                return LOW_DISTILLED
            even = max(1, seen.patches // layers)
            return capped([even] * layers, seen.patches, 0)
        if isinstance(schedule, int):
            return (schedule,) * layers
        assert isinstance(schedule, tuple)
        if len(schedule) == 2 and isinstance(schedule[1], float):
            return ramp(int(schedule[0]), schedule[1], layers)
        if len(schedule) > layers:
            raise AttachError(f"pyra: the schedule names {len(schedule)} blocks; {model_class} has {layers}")
        return tuple(int(r) for r in schedule) + (0,) * (layers - len(schedule))

    def check(self, model_class: str, counts: tuple[int, ...], movable: int) -> None:
        """Raises AttachError: a block is to merge more tokens than it can."""
        left = movable
        for depth, r in enumerate(counts):
            if r > cap(left, 0):
                fitting = ", ".join(map(str, capped(counts, movable, 0)))
                raise AttachError(
                    f"pyra: schedule: block {depth} of {model_class} is to merge {r} tokens, but can merge {cap(left, 0)} of the {left} "
                    f"that are left unprotected\nschedule = [{fitting}] would do"
                )
            left -= r

    def report(self, model: nn.Module) -> Report:
        """What is left of tokens and multiply-adds, for images of the configured size; the model may be on the meta device."""
        found = anatomy(model)
        stack = image_stack(found)
        places(found, stack, model)  # refuses what deltas_on does
        seen = tokens(found, stack, model, self.protected_tokens)
        counts = self.counts(found.model_class, len(stack.blocks), seen)
        self.check(found.model_class, counts, self.movable(seen))
        return report(found, stack, seen, counts)

    def movable(self, seen: Tokens, inserted: int = 0) -> int:
        """Tokens that may merge: with `inserted` in front by other methods."""
        protected = seen.front if self.protected_tokens is None else self.protected_tokens
        return seen.patches + seen.front + inserted - protected

    # ---- what sits where

    def deltas_on(self, anatomy: Anatomy, model: nn.Module) -> Iterator[Place]:
        stack = image_stack(anatomy)
        blocks = places(anatomy, stack, model)
        seen = tokens(anatomy, stack, model, self.protected_tokens)
        protected = seen.front if self.protected_tokens is None else self.protected_tokens
        counts = self.counts(anatomy.model_class, len(blocks), seen)
        for depth, (r, at) in enumerate(zip(counts, blocks, strict=True)):
            stage = Stage(stack.name, depth, r, protected, seen.front)
            if any(counts[: depth + 1]):
                yield Place(at.attention, Weigh(stage, self.proportional_attention))
            if r:
                modulation = Modulation(r, stack.hidden_size) if self.modulate else None
                yield Place(at.norm.at("input"), Yield(stage, modulation, self.rate_factor))
                yield Place(at.ffn, Pad(stage))
                yield Place(at.block.at("output"), Cut(stage))
        for site in anatomy.sites(["q", "k", "v"], None, stack.name) if self.rank else ():
            yield Place(site, Factors(site, self.rank, 1.0, self.dropout))

    def bind(self, deltas: Mapping[str, Delta], shared: nn.Module | None) -> None:
        first: dict[str, Factors] = {}
        for key, delta in deltas.items():
            if isinstance(delta, Factors):
                block = key.rpartition(".")[0].rpartition(".")[0]
                delta.A = first.setdefault(block, delta).A

    def on_attach(self, moment: Moment) -> None:
        """Now that it is known what else is attached: refuse a schedule that has more to merge than there is."""
        host = moment.model.__dict__["_petiole"]
        stack = image_stack(host.anatomy)
        seen = tokens(host.anatomy, stack, moment.model, self.protected_tokens)
        inserted = prompts(host, stack.name)
        for delta in moment.deltas.values():
            if isinstance(delta, Merge):
                delta.stage.refuse_prompts(host)
        self.check(
            host.anatomy.model_class,
            self.counts(host.anatomy.model_class, len(stack.blocks), seen),
            self.movable(seen, inserted),
        )

    def stays(self, deltas: Mapping[str, Delta]) -> Mapping[str, str]:
        return {key: "tokens merge anew for each image" for key, d in deltas.items() if not isinstance(d, WeightDelta)}


class Modulation(nn.Module):
    """src, dst (B, r, C) -> src + src a b

    Args:
        r: most sources at a time. size: width C.
    """

    def __init__(self, r: int, size: int) -> None:
        super().__init__()
        self.W_r = nn.Parameter(torch.empty(r, 1))
        self.W_D = nn.Parameter(torch.empty(1, size))
        self.norm = nn.LayerNorm(size, eps=1e-5)

    def factor(self, src: Tensor, dst: Tensor) -> Tensor:
        """1 + a b (B, r, C), in float32 at least whatever autocast says."""
        both = src + dst
        I = nn.functional.layer_norm(
            both, both.shape[-1:], self.norm.weight.to(both.dtype), self.norm.bias.to(both.dtype), self.norm.eps
        )
        a = 2 * (self.W_r[: src.shape[1]].to(I.dtype) * I).sum(1, keepdim=True).sigmoid()
        b = 2 * (I * self.W_D.to(I.dtype)).sum(2, keepdim=True).sigmoid() - 1
        return 1 + a * b

    def forward(self, src: Tensor, dst: Tensor) -> Tensor:
        return src * self.factor(src, dst)


class Yield(Merge):
    """Merging with PYRA's modulation; W_r uniform in ±1, W_D = 0, the norm at 1 and 0."""

    def __init__(self, stage: Stage, modulation: Modulation | None, rate_factor: float) -> None:
        super().__init__(stage, modulation)
        self.rate_factors = {"modulation": rate_factor} if modulation is not None else {}

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        if isinstance(self.modulation, Modulation):
            kaiming_uniform(self.modulation.W_r, generator)
            self.modulation.W_D.zero_()


# -------------------------------------------------------------------------------------------------------------------- the report


@dataclass(frozen=True)
class Report:
    """What a schedule leaves.

    Attributes:
        tokens: that come into each block, and at last those that leave the last one.
        macs: multiply-adds of linears, attention and patches for one image. bare: the same without merging.
    """

    tokens: tuple[int, ...]
    macs: int
    bare: int

    def __str__(self) -> str:
        return (
            f"tokens {' '.join(map(str, self.tokens))}; {self.macs / 1e9:.2f} of {self.bare / 1e9:.2f} GMACs an image "
            f"({self.macs / self.bare:.0%}), without LoRA, modulation and matching"
        )


def report(found: Anatomy, stack: Stack, seen: Tokens, counts: tuple[int, ...]) -> Report:
    """Count what `counts` leaves: N C_in C_out for a linear, 2 N² C for attention, behind it N - r tokens."""
    patch = next(site for site in found.outside if site.role == "patch_embedding")
    embedding = seen.patches * patch.in_features * math.prod(patch.kernel) * patch.out_features
    left, macs, bare = [seen.patches + seen.front], embedding, embedding
    for block, r in zip(stack.blocks, counts, strict=True):
        linears = [s for s in block.sites if s.role in ("q", "k", "v", "o", "up", "gate", "down")]
        per_token = {
            kind: sum(s.in_features * s.out_features for s in linears if (s.within == "ffn") == (kind == "ffn"))
            for kind in ("attention", "ffn")
        }
        attention = next(s for s in block.sites if s.role == "attention")
        pairs = 2 * attention.heads * attention.head_size
        n, first = left[-1], left[0]
        macs += per_token["attention"] * n + pairs * n * n + per_token["ffn"] * (n - r)
        bare += sum(per_token.values()) * first + pairs * first * first
        left.append(n - r)
    return Report(tuple(left), macs, bare)
