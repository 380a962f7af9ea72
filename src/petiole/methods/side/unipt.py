"""UniPT: one small head over all hidden states of a frozen backbone.  Diao et al. 2024, arXiv 2308.14316.

    z_i = LN(W_i h_i)                                      of every state; that of the last, the anchor, is a
    S_i = relu(mask a z_iᵀ),  u_i = S_i z_i / Σ S_i + z_i   parallel interaction, for all i but the last; the sum is over tokens
    c_i = w · (mean(a) ⊙ mean(z_i)) + b,  m = Σ softmax(c)_i u_i
    the stack's last hidden state <- up(a + proj(m))

No 1/√d and no softmax over tokens: a row of S of which no score is positive adds nothing. Four forms: `encoder` as above; `pooled`, where
the anchor is the frozen model's own pooled embedding g and the result is added to it; `cnn`, where a state is the last feature map of a
stage, summed over the cells of the last stage's grid by weights of its own; `encoder_decoder`, where the encoder's a + proj(m) is a memory
R, and each z_i of the decoder first receives LN(W X(z_i, R)), the interaction without z_i itself. Where a stack is causal, a token sees
itself and earlier ones, in scores and in means.

Sits     beside every stack; `up` is in front of the model's head.
Trains   W_i, norms, proj, w and up: no copy of a block. The head of the task, too.
Starts   at random; not at the backbone.
Merges   never.

Relations: reads what LST reads, but in parallel, and with nothing of the backbone's architecture. SHERL goes on through the last layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from petiole.anatomy import Anatomy, Stack
from petiole.errors import AttachError
from petiole.junction import Call
from petiole.method import Method, Place
from petiole.methods.adapters.batchnorm import BatchNorm
from petiole.methods.side.beside import (
    Beside,
    Form,
    argument_names,
    block_site,
    causal_pairs,
    check_states,
    encoder_states,
    form_of,
    keep_memory,
    memory_of,
    pool_positions,
    pooled_exit,
    pooled_width,
    refuse_other_width,
    remembered,
    stages,
    states_of,
    valid,
    widths_of,
)

_EPS = 1e-8  # of the sum of a row's scores
_POOLED_FLOOR = 1e-6


class UniPT(Method):
    """One parallel head over all hidden states."""

    slug: ClassVar[str] = "unipt"
    title: ClassVar[str] = "UniPT: Universal Parallel Tuning for Transfer Learning with Efficient Parameter and Memory"
    paper: ClassVar[str] = "2308.14316"
    saves: ClassVar[str] = "activations, backward pass, optimiser state and checkpoint"
    routes: ClassVar[bool] = False
    idles: ClassVar[str] = (
        "b shifts the scores of all states alike, which their softmax does not see; of two states, nor w"
    )
    learning_rates: ClassVar[tuple[float, float]] = (1e-4, 1e-2)
    exempt: ClassVar[Mapping[str, str]] = {
        "combines_with_others": "no gradient goes through the backbone, so what is attached to it would train in vain",
        "swin": "the states of its stages have different numbers of tokens",
    }

    form: Form = Field("auto", description="Of the head; by what the backbone is if auto.")
    reduction_factor: int = Field(2, ge=1, description="f: output width over the width d' of the head.")
    out_size: int | None = Field(None, ge=1, description="Output width E; the backbone's if None.")
    states: Literal["all"] | tuple[int, ...] = Field(
        "all",
        description="Hidden states to read: 0 is the stack's input, i + 1 the output of layer i; the last is the anchor.",
    )
    wide_projection: bool = Field(
        False, description="Project by two layers through the backbone's width, instead of one."
    )
    up: Literal["auto", "relu", "linear", "norm"] = Field(
        "auto",
        description="Output layer: relu and linear; linear alone; or relu, linear and norm. By auto the second after a wide projection, "
        "the third in encoder-decoders, else the first.",
    )
    auxiliary: bool = Field(
        False,
        description='Publish the output of each state of a decoder, too: pt.streams(model)["unipt"], for a loss on each.',
    )
    pool_position: Literal["auto", "first", "eos"] | int = Field(
        "auto",
        description="Token whose state the pooled form adds: `eos`, the end of a text (auto where it is causal), first, or a number; "
        "pt.given(model, pool_position=…) says otherwise for a pass.",
    )

    @field_validator("states")
    @classmethod
    def _in_order(cls, chosen: Any) -> Any:
        return check_states(chosen)

    def deltas_on(self, anatomy: Anatomy, model: nn.Module) -> Iterator[Place]:
        form = form_of(self.slug, self.form, anatomy)
        for stack in anatomy.stacks:
            names = argument_names(model.get_submodule(stack.blocks[0].path))
            yield Place(block_site(stack, -1), self.head(form, anatomy, stack, names))

    def head(self, form: Form, anatomy: Anatomy, stack: Stack, names: Sequence[str]) -> Head:
        width = stack.hidden_size
        if form == "cnn":
            ends = [depth + 1 for depth in stages(stack)]
            picked = ends if self.states == "all" else [ends[n] for n in self.states if n < len(ends)]
            if len(picked) < 2 or picked[-1] != len(stack.blocks):
                raise AttachError(
                    f"{self.slug}: states number the {len(ends)} stages of {stack.name!r} from 0; the last is the anchor"
                )
            numbers: tuple[int, ...] = tuple(picked)
        else:
            numbers = states_of(self.slug, self.states, stack, len(stack.blocks) + 1)
        path = pooled_exit(anatomy, stack) if form == "pooled" else None
        width = pooled_width(anatomy, path) if path is not None else width
        out_size = self.out_size or width
        if form == "pooled" and out_size != width:
            raise AttachError(
                f"{self.slug}: out_size = {out_size}, but the result is added to an embedding of width {width}"
            )
        refuse_other_width(self.slug, anatomy, stack.hidden_size if path is None else out_size, out_size)
        if out_size % self.reduction_factor:
            raise AttachError(
                f"{self.slug}: reduction_factor = {self.reduction_factor} does not divide the output width {out_size}"
            )
        kind: type[Head] = {"cnn": StageHead, "pooled": PooledHead}.get(form, Head)
        if form == "encoder_decoder":
            kind = MemoryHead if stack.name == "encoder" else DecoderHead
        usual = "norm" if form == "encoder_decoder" else "linear" if self.wide_projection else "relu"
        head = kind(
            widths_of(stack, numbers),
            out_size // self.reduction_factor,
            out_size,
            wide=stack.hidden_size if self.wide_projection else 0,
            up=self.up if self.up != "auto" else usual,
        )
        head.reads, head.names, head.blocks = numbers, names, len(stack.blocks)
        head.publishes = self.auxiliary and kind is DecoderHead
        head.causal, head.last = bool(stack.causal), numbers[-1] == len(stack.blocks)
        if path is not None:
            head.writes = path
            head.position = ("eos" if stack.causal else "first") if self.pool_position == "auto" else self.pool_position
        return head


def interaction(a: Tensor, z: Tensor, mask: Tensor | None, floor: bool = False) -> Tensor:
    """S z with S = relu(mask a zᵀ), each row over its sum: a (B, q, d'), z (B, k, d'), mask (B or 1, q or 1, k) -> (B, q, d').

    In float32 at least, since the sum of a row may be very small. S is divided after the product, so that one copy of it is kept.
    """
    kind = torch.promote_types(a.dtype, torch.float32)
    with torch.autocast(a.device.type, enabled=False):
        wide = z.to(kind)
        scores = a.to(kind) @ wide.mT
        S = torch.relu(scores if mask is None else scores * mask)
        total = S.sum(-1, keepdim=True)
        u = S @ wide / (total.clamp_min(_POOLED_FLOOR) if floor else total + _EPS)
    return u.to(z.dtype)


def average(z: Tensor, mask: Tensor | None) -> Tensor:
    """Means over tokens z (B, k, d'), of those that each row of a mask (B or 1, q, k) takes -> (B, q or 1, d')"""
    if mask is None:
        return z.mean(1, keepdim=True)
    weights = mask.to(z.dtype)
    return weights @ z / weights.sum(-1, keepdim=True).clamp_min(1)


class Head(Beside):
    """The encoder form.

    Args:
        widths: D_i of the states, the anchor's last. size: d'. out_size: E.
        wide: D of a projection of two layers; 0 for one of one layer.
        up: its layers, see the method.
    """

    norm: type[nn.Module] = nn.LayerNorm
    reads: tuple[int, ...] = ()
    names: Sequence[str] = ()
    blocks: int = 0
    causal = False
    last = True  # whether the anchor is the stack's last state
    position: str | int = "first"

    def __init__(self, widths: Sequence[int], size: int, out_size: int, *, wide: int = 0, up: str = "relu") -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(width, size) for width in widths)  # W_i
        self.norms = nn.ModuleList(self.norm(size) for _ in widths)
        self.gate = nn.Linear(size, 1)  # w, b
        first = [nn.Linear(size, wide), nn.ReLU(), nn.Linear(wide, size)] if wide else [nn.Linear(size, size)]
        self.projection = nn.Sequential(*first, self.norm(size))
        self.up = self.output(size, out_size, up)

    @staticmethod
    def output(size: int, out_size: int, up: str) -> nn.Sequential:
        layers = [nn.Linear(size, out_size)]
        return nn.Sequential(
            *([] if up == "linear" else [nn.ReLU()]), *layers, *([nn.LayerNorm(out_size)] if up == "norm" else [])
        )

    def forward(self, states: list[Tensor], calls: list[Call], h: Tensor) -> Tensor | None:
        """Hidden states (B, n, D_i), the blocks' calls, the stack's last state -> the new one (B, n, E)"""
        y: Tensor = self.up(self.mixed(self.small(states, h), calls, h))
        return y

    def small(self, states: list[Tensor], h: Tensor) -> list[Tensor]:
        """z_i (B, n, d') of the states, the last as the stack gives it."""
        states = [*states[:-1], h] if self.last else states
        counts = {state.shape[1] for state in states}
        if len(counts) > 1:
            raise AttachError(f"unipt: these hidden states have {sorted(counts)} tokens; name states that have as many")
        return [norm(down(self.own(x))) for x, down, norm in zip(states, self.down, self.norms, strict=True)]

    def own(self, x: Tensor) -> Tensor:
        return x.to(self.gate.weight.dtype)

    def mixed(self, z: list[Tensor], calls: list[Call], h: Tensor) -> Tensor:
        """a + proj(m), with earlier tokens from a key-value cache where there is one."""
        queries, past = z[-1], remembered(calls, z, self.blocks) if self.causal else z
        count = past[-1].shape[1]
        mask = valid(calls, self.names, count)
        mask = None if mask is None else mask[:, None]
        if self.causal:
            pairs = causal_pairs(queries.shape[1], count, h.device)
            mask = pairs[None] if mask is None else pairs & mask
        return self.joined(queries, past, mask, [state[:, -queries.shape[1] :] for state in past[:-1]])

    def joined(self, a: Tensor, z: list[Tensor], mask: Tensor | None, own: list[Tensor]) -> Tensor:
        """a + proj(m): a (B, q, d'), states z (B, k, d') with the anchor's last, mask (B or 1, q or 1, k), z at the q tokens."""
        u = [interaction(a, target, mask) + mine for target, mine in zip(z[:-1], own, strict=True)]
        y: Tensor = a + self.projection(self.aggregate(average(z[-1], mask), z[:-1], u, mask))
        return y

    def aggregate(self, mean: Tensor, z: list[Tensor], u: list[Tensor], mask: Tensor | None) -> Tensor:
        """m = Σ conf_i u_i, conf = softmax over the states of w · (mean ⊙ mean(z_i)) + b"""
        confidence = torch.stack([self.gate(mean * average(target, mask)) for target in z]).softmax(
            0
        )  # (M - 1, B, q or 1, 1)
        m = confidence[0] * u[0]
        for weight, each in zip(confidence[1:], u[1:], strict=True):
            m = m + weight * each
        return m


class MemoryHead(Head):
    """An encoder's, whose a + proj(m) is the memory R that the decoder's head looks into; the frozen decoder goes on as before."""

    @staticmethod
    def output(size: int, out_size: int, up: str) -> nn.Sequential:
        return nn.Sequential()

    def forward(self, states: list[Tensor], calls: list[Call], h: Tensor) -> None:
        memory = self.mixed(self.small(states, h), calls, h)
        mask = valid(calls, self.names, h.shape[1])
        keep_memory(
            self, h, memory if mask is None else memory * mask[..., None]
        )  # padding scores 0, and so counts for nothing


class DecoderHead(Head):
    """A decoder's: each z_i first receives LN(W X(z_i, R)) from the encoder's memory."""

    def __init__(self, widths: Sequence[int], size: int, out_size: int, *, wide: int = 0, up: str = "norm") -> None:
        super().__init__(widths, size, out_size, wide=wide, up=up)
        self.cross = nn.Sequential(nn.Linear(size, size), nn.LayerNorm(size))

    def forward(self, states: list[Tensor], calls: list[Call], h: Tensor) -> Tensor:
        """As for `Head`."""
        found = encoder_states(calls[0], self.names)
        z = self.small(states, h)
        if found is not None:
            memory = memory_of(self, found[1])
            z = [each + self.cross(interaction(each, memory, None)) for each in z]
        if self.publishes:
            for number, each in zip(self.reads, z, strict=True):
                self.host.streams.publish(number, {"unipt": self.up(each)})
        y: Tensor = self.up(self.mixed(z, calls, h))
        return y


class PooledHead(Head):
    """The anchor is the model's pooled embedding g, and the result is added to it. ReLU comes before each linear; no norms."""

    def __init__(self, widths: Sequence[int], size: int, out_size: int, *, wide: int = 0, up: str = "relu") -> None:
        Beside.__init__(self)
        self.down = nn.ModuleList(nn.Linear(width, size) for width in widths)
        self.anchor = nn.Linear(out_size, size)
        self.gate = nn.Linear(size, 1)
        self.up = nn.Sequential(nn.ReLU(), nn.Linear(size, out_size))

    def forward(self, states: list[Tensor], calls: list[Call], h: Tensor) -> Tensor:
        """Hidden states (B, n, D_i), the blocks' calls, g (B, E) -> the new embedding (B, E)"""
        mask = valid(calls, self.names, states[0].shape[1])
        return self.embedding(states, h, mask, pool_positions(self, self.position, states[0]))

    def embedding(self, states: list[Tensor], g: Tensor, mask: Tensor | None, position: Tensor) -> Tensor:
        """g + up(m), with z_i at `position` (B,) in the place of the token itself; mask (B or 1, n)"""
        g, states = self.own(g), [self.own(x) for x in states]
        mask = None if mask is None else mask[:, None].bool()
        a = self.anchor(torch.relu(g))[:, None]
        z = [down(torch.relu(x)) for down, x in zip(self.down, states, strict=True)]
        row = torch.arange(len(g), device=g.device)
        u = [interaction(a, each, mask, floor=True) + each[row, position][:, None] for each in z]
        y: Tensor = g + self.up(self.aggregate(a, z, u, mask)[:, 0])
        return y


class StageHead(Head):
    """The CNN form: feature maps F_i (B, C_i, *size) of stages, each cell of the last stage's grid summed by weights of its own."""

    norm = BatchNorm
    writes = "block"

    def __init__(self, widths: Sequence[int], size: int, out_size: int, *, wide: int = 0, up: str = "relu") -> None:
        super().__init__(widths, size, out_size, wide=wide, up=up)
        self.identity = nn.ModuleList(nn.Linear(widths[-1], width) for width in widths[:-1])

    def forward(self, states: list[Tensor], calls: list[Call], h: Tensor) -> Tensor:
        """Maps of the stages, the last one's -> the new last map (B, E, *size)"""
        y = self.tokens(states)
        return y.mT.unflatten(2, states[-1].shape[2:])

    def tokens(self, maps: list[Tensor]) -> Tensor:
        """Maps (B, C_i, *size_i) -> (B, n, E), n positions of the last"""
        maps = [self.own(F) for F in maps]
        last = maps[-1].movedim(1, -1)
        cells = [self.cells(F, torch.relu(q(last))) for F, q in zip(maps, self.identity, strict=False)]
        z = [norm(down(F.flatten(1, 2))) for F, down, norm in zip([*cells, last], self.down, self.norms, strict=True)]
        y: Tensor = self.up(self.joined(z[-1], z, None, z[:-1]))
        return y

    @staticmethod
    def cells(F: Tensor, q: Tensor) -> Tensor:
        """F (B, C, k H, k W), q (B, H, W, C) -> Σ over each cell of k x k of (s / Σ s + 1 / k²) F, with s = relu(q · F): (B, H, W, C)"""
        (high, wide), (H, W) = F.shape[2:], q.shape[1:3]
        if high % H or wide % W:
            raise AttachError(f"a stage is {high} x {wide}, which is no multiple of the last, {H} x {W}")
        parts = F.unflatten(3, (W, -1)).unflatten(2, (H, -1))  # (B, C, H, k, W, k)
        s = torch.relu(torch.einsum("bchiwj,bhwc->bhiwj", parts, q))
        weights = s / (s.sum((2, 4), keepdim=True) + _EPS) + 1 / (s.shape[2] * s.shape[4])
        return torch.einsum("bchiwj,bhiwj->bhwc", parts, weights)


__all__ = ["UniPT"]
