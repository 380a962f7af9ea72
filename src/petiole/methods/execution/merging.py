"""Tokens that are merged inside a block, between attention and feed-forward: the arithmetic, and how it fits into a block that stays as it is.

    metric   m = k / |k|,  k (B, N, d) the keys, averaged over heads        sources at even positions, partners at odd ones
    match    the r even tokens whose best cosine with an odd one is highest
    merge    x (B, N, C), size (B, N, 1)  ->  x' (B, N - r, C), size'       x' size' = sum of x size over what is merged

The class token is at position 0, others to be protected behind it; they keep their places. Behind them come the even tokens that are left,
in order, then the odd ones.

A block's residual is a local variable of its forward, so it keeps N rows to the end of the block: what enters the second norm is x', the
feed-forward's output is padded with zeros to N rows, and at the block's exit the first N - r rows are taken, with x' put where x was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from petiole.errors import AttachError
from petiole.method import AroundDelta, AttentionDelta, HiddenDelta, wide
from petiole.tokens import TokenSlot

Modulate = Callable[[Tensor, Tensor], Tensor]  # sources and their partners (B, r, C) -> sources (B, r, C)


# -------------------------------------------------------------------------------------------------------------- the arithmetic


@dataclass
class Match:
    """Which tokens merge into which.

    Attributes:
        kept: (B, N - r), position of each new token in the sequence as it was.
        source, partner: (B, r), positions in the sequence as it was, the most similar pair first.
        target: (B, r), position of the partner among the new tokens.
    """

    kept: Tensor
    source: Tensor
    partner: Tensor
    target: Tensor

    def places(self) -> Tensor:
        """The position of each old token (B, N) among the new ones."""
        new = torch.arange(self.kept.shape[1], device=self.kept.device).expand_as(self.kept)
        places = torch.empty_like(torch.cat([self.kept, self.source], 1))
        return places.scatter(1, self.kept, new).scatter(1, self.source, self.target)


def cap(tokens: int, protected: int) -> int:
    """The most tokens that one merge can remove."""
    return max(0, tokens - protected) // 2


@torch.no_grad()
def match(metric: Tensor, r: int, protected: int) -> Match:
    """metric (B, N, d), not normalised, and r at most `cap(N, protected)` -> who merges with whom.

    In float32 at least. Equal similarities are taken in order, so that every device decides alike.
    """
    count, even = metric.shape[1], (metric.shape[1] + 1) // 2
    with torch.autocast(metric.device.type, enabled=False):
        m = wide(metric)
        m = m / m.norm(dim=-1, keepdim=True)
        S = m[:, ::2] @ m[:, 1::2].mT  # (B, even, odd)
    S[:, : (protected + 1) // 2] = -torch.inf
    S[:, :, : protected // 2] = -torch.inf
    best, partner = S.max(-1)
    order = torch.argsort(best, dim=-1, descending=True, stable=True)
    chosen, left = order[:, :r], order[:, r:]
    if protected:
        left = left.sort(-1).values
    partner = partner.gather(1, chosen)
    places = torch.arange(count, device=metric.device).expand(len(metric), -1)
    kept = [places[:, :protected], 2 * left[:, (protected + 1) // 2 :], places[:, 1::2][:, protected // 2 :]]
    return Match(torch.cat(kept, 1), 2 * chosen, 2 * partner + 1, partner + even - r)


def merge(x: Tensor, size: Tensor | None, match: Match, modulate: Modulate | None = None) -> tuple[Tensor, Tensor]:
    """x (B, N, C), size (B, N, 1) or None for ones -> x (B, N - r, C), size (B, N - r, 1).

    Args:
        modulate: what becomes of the sources, weighted by their size, before they are added to their partners.
    """
    if size is None:
        size = torch.ones(*x.shape[:2], 1, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        weighted = wide(x)
    else:
        weighted = x * size
    source = rows(weighted, match.source)
    if modulate is not None:
        source = modulate(source, rows(weighted, match.partner))
    total = added(rows(weighted, match.kept), match.target, source)
    size = added(rows(size, match.kept), match.target, rows(size, match.source))
    return (total / size).to(x.dtype), size


def rows(x: Tensor, index: Tensor) -> Tensor:
    """x (B, N, C) at positions (B, M) -> (B, M, C). No index is as wide as x, as a gather's would be."""
    return x.flatten(0, 1).index_select(0, flat(index, x.shape[1])).view(*index.shape, x.shape[2])


def added(x: Tensor, index: Tensor, change: Tensor) -> Tensor:
    """x (B, N, C) with rows (B, M, C) added at positions (B, M), of which some may be equal."""
    return x.flatten(0, 1).index_add(0, flat(index, x.shape[1]), change.flatten(0, 1)).view(x.shape)


def flat(index: Tensor, count: int) -> Tensor:
    """Positions (B, M) of `count` each, as positions in all of them (B · M)."""
    return (index + count * torch.arange(len(index), device=index.device)[:, None]).flatten()


def unmerge(tokens: Tensor, places: Mapping[int, Tensor]) -> Tensor:
    """Spread final tokens (B, M, C) back to where they came from (B, N, C): what was merged shares one value.

    For a head that wants the grid of patches: `unmerge(output.last_hidden_state, pt.streams(model)["token_places"])`.

    Args:
        places: of each block in which tokens merged, by depth: the position of each token (B, N) after it.
    """
    index: Tensor | None = None
    for _, new in sorted(places.items()):
        index = new if index is None else new.gather(1, index)
    return tokens if index is None else rows(tokens, index)


# ------------------------------------------------------------------------------------------------------------------- schedules


def ramp(r: int, inflection: float, layers: int) -> tuple[int, ...]:
    """From r (1 - inflection) in the first block to 2 r less that in the last, by a straight line, rounded down."""
    low = int(r * (1 - inflection))
    step = (2 * (r - low)) / max(layers - 1, 1)
    return tuple(int(low + step * depth) for depth in range(layers))


def capped(schedule: Sequence[int], tokens: int, protected: int) -> tuple[int, ...]:
    """The same schedule, as far as there are tokens."""
    found = []
    for r in schedule:
        found.append(min(r, cap(tokens, protected)))
        tokens -= found[-1]
    return tuple(found)


# --------------------------------------------------------------------------------------------------------------- in a forward pass


@dataclass
class Work:
    """What goes on in one block, from its attention to its end. Whoever comes first merges, where several would."""

    owner: Stage
    metric: Tensor | None = None
    count: int = 0  # tokens as they come
    change: Tensor | None = None  # (B, N - r, C), from the rows that the residual keeps to the merged ones


class Stage:
    """What the deltas of one block share, and find in a forward pass.

    Args:
        stack, depth: of the block.
        r: tokens that it merges, at most.
        protected: tokens in front that stay. front: of these, the model's own.
    """

    def __init__(self, stack: str, depth: int, r: int, protected: int, front: int) -> None:
        self.stack, self.depth, self.r, self.protected, self.front = stack, depth, r, protected, front

    def found(self, host: Any) -> dict[str, Any]:
        within = host.passing()
        if within is None:
            raise AttachError("tokens are merged in a forward pass of the whole model; a part of it was called alone")
        found: dict[str, Any] = within.found
        return found

    def key(self, what: str, depth: int | None = None) -> str:
        return f"{what} of {self.stack}.{self.depth if depth is None else depth}"

    def size(self, host: Any) -> Tensor | None:
        """How many original tokens each token is (B, N, 1) as the block begins; None if all are one."""
        found = self.found(host)
        sizes = (found.get(self.key("sizes", depth)) for depth in reversed(range(self.depth)))
        return next((size for size in sizes if size is not None), None)

    def begin(self, host: Any, metric: Tensor) -> bool:
        """At attention. False if another does the merging here."""
        found, key = self.found(host), self.key("merging")
        if key in found and found[key].owner is not self:
            return False
        found[key] = Work(self, metric)
        return True

    def refuse_prompts(self, host: Any) -> None:
        """Raises AttachError: other methods' input tokens could be merged away."""
        needs = self.front + prompts(host, self.stack)
        if needs > max(self.front, self.protected):
            raise AttachError(
                f"{needs - self.front} input tokens stand in front of {self.stack}, and could be merged away\n"
                f"protected_tokens={needs} keeps them apart, with the {self.front} of the model"
            )

    def work(self, host: Any) -> Work | None:
        """What has begun here; None if another does it.

        Raises:
            AttachError: attention has not run before.
        """
        work = self.found(host).get(self.key("merging"))
        if work is None:
            raise AttachError(
                f"{self.stack}.{self.depth}: its second norm ran before its attention, so no tokens can be merged"
            )
        return work if work.owner is self else None


class Weigh(AttentionDelta):
    """Attention over tokens of several sizes: log(size) on the scores of each key. Notes the metric for the match.

    Args:
        proportional: whether sizes count.
    """

    def __init__(self, stage: Stage, proportional: bool) -> None:
        super().__init__()
        self.stage, self.proportional = stage, proportional

    def score_bias(self, query: Tensor, key: Tensor) -> Tensor | None:
        count = query.shape[2]
        if not self.stage.begin(self.host, key[:, :, -count:].detach().mean(1)) or not self.proportional:
            return None
        size = self.stage.size(self.host)
        return None if size is None else nn.functional.pad(size.log().mT[:, None], (key.shape[2] - count, 0))


class Merge(HiddenDelta):
    """What enters the second norm, x (B, N, C) -> x' (B, N - r, C).

    Args:
        modulation: of the sources; None for plain merging.
    """

    composition = "replace"
    publishes = True  # the block's end needs it, which gradient checkpointing leaves outside

    def __init__(self, stage: Stage, modulation: nn.Module | None) -> None:
        super().__init__()
        self.stage, self.modulation = stage, modulation

    def forward(self, x: Tensor) -> Tensor:
        stage, work = self.stage, self.stage.work(self.host)
        if work is None:
            return x
        metric, work.metric = work.metric, None
        if x.ndim != 3 or metric is None or metric.shape[:2] != x.shape[:2]:
            raise AttachError(
                f"{stage.stack}.{stage.depth}: its attention sees other tokens than its ffn, so none can be merged"
            )
        stage.refuse_prompts(self.host)
        r = min(stage.r, cap(x.shape[1], stage.protected))
        found = match(metric, r, stage.protected)
        merged, size = merge(x, stage.size(self.host), found, self.modulation)
        work.count, work.change = x.shape[1], merged - x[:, : merged.shape[1]]
        stage.found(self.host)[stage.key("sizes")] = size
        streams = self.host.streams
        published = {"token_places": found.places(), "token_sizes": size}
        streams.publish(stage.depth, {**streams.at(stage.depth), **published})
        return merged


class Pad(AroundDelta):
    """The feed-forward's output (B, N - r, C), with rows of zeros behind it (B, N, C), as many as the residual has."""

    publishes = False

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage

    def leave(self, y: Tensor, h: Tensor) -> Tensor:
        work = self.stage.work(self.host)
        return y if work is None else nn.functional.pad(y, (0, 0, 0, work.count - y.shape[1]))


class Cut(HiddenDelta):
    """The block's output (B, N, C) -> its first N - r rows, in which x' takes the place of the residual's x."""

    composition = "replace"
    innermost = True  # for others the block ends with merged tokens

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, y: Tensor) -> Tensor:
        work = self.stage.work(self.host)
        if work is None or work.change is None:
            return y
        change, work.change = work.change, None  # so that none outlives its block
        return y[:, : change.shape[1]] + change


def prompts(host: Any, stack: str) -> int:
    """How many input tokens other methods put in front of a stack, in this forward pass."""
    found: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for adaptation in host.adaptations.values():
        for slot in adaptation.slots:
            if isinstance(slot, TokenSlot) and slot.site.stack == stack and slot.acts():
                found.setdefault((slot.adaptation, slot.number), []).append((slot.site.depth, slot.delta.length))
    return sum(min(places)[1] for places in found.values())  # deeper ones take the place of the first
