"""SHERL: early frozen states put together without what they repeat, then the last frozen layers.  Diao et al. 2024, arXiv 2407.07523.

    x_k = sense(h_k)                                       of the K states up to the late layers; the last is the guide g
    n_j = x_j / |x_j|,  R_j = Σ_l relu(n_j · n_l)           at each token, over the others, which are shallow
    w_j = relu(v · (x_j ⊙ g) + b) / R_j,  w <- w / Σ w      what resembles many counts for less
    y = out(relu(g + Σ w_j x_j)) + tanh(α / T) last         in place of the late layers' input

`last` is the feature that they would have had, and α starts at 0. Gradients go through the late layers, whose weights are frozen, and
end at the states. Sensing is `gated`, x = (W_2 u + b_2 + u) ⊙ σ(W_3 u + b_3) with u = relu(W_1 h + b_1); `norm`, x = LN(W h + b); `cnn`,
x = BN(W F) of a map F pooled to the last one's size by maximum plus mean; or `pooled`, x = W relu(h) + b, where each state becomes one
vector, the guide is the frozen model's pooled embedding, and the result is added to it.

In an encoder-decoder the encoder has no late layer: y goes through a final norm of its own that trains, and the decoder's late layers look
into that, while the earlier ones go on reading the frozen encoder. The decoder's final norm trains as a copy, too.

Sits     at the input of the first late layer; without any, in place of the stack's last hidden state.
Trains   senses, v, out, α, and new final norms in encoder-decoders.
Starts   at random; what the late layers get does not depend on `last`.
Merges   never.

Relations: local to a token, where UniPT and LST look at others; what looks at others here are the late layers. One more late layer costs
its activations, and a backward pass through it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from petiole.anatomy import Anatomy, Site, Stack
from petiole.errors import AttachError
from petiole.junction import Call
from petiole.method import Method, ModuleDelta, Moment, Place
from petiole.methods.adapters.batchnorm import BatchNorm
from petiole.methods.side.beside import (
    Beside,
    Form,
    argument_names,
    block_site,
    check_states,
    encoder_states,
    form_of,
    keep_memory,
    memory_of,
    pool_positions,
    pooled_exit,
    pooled_width,
    stages,
    states_of,
    valid,
    widths_of,
    with_argument,
)
from petiole.methods.side.narrow import dropout_of, norm_like

Sensing = Literal["gated", "norm", "cnn", "pooled"]
States = Literal["all"] | tuple[int, ...]


class SHERL(Method):
    """Early states fused without their redundancy, and the last frozen layers on top."""

    slug: ClassVar[str] = "sherl"
    title: ClassVar[str] = (
        "SHERL: Synthesizing High Accuracy and Efficient Memory for Resource-Limited Transfer Learning"
    )
    paper: ClassVar[str] = "2407.07523"
    saves: ClassVar[str] = "activations, backward pass, optimiser state and checkpoint"
    routes: ClassVar[bool] = False
    idles: ClassVar[str] = "one shallow state has the weight 1, or 0, whatever v and b are"
    learning_rates: ClassVar[tuple[float, float]] = (1e-4, 1e-2)
    exempt: ClassVar[Mapping[str, str]] = {
        "combines_with_others": "no gradient goes through the early layers, so what is attached to them would train in vain",
        "swin": "the states of its stages have different numbers of tokens",
    }

    reduction_factor: int = Field(8, ge=1, description="r: the backbone's width over that of the adapter, d'.")
    side_size: int | None = Field(None, ge=1, description="d' itself; if None, by `reduction_factor`.")
    states: States | dict[str, States] = Field(
        "all",
        description="Hidden states to read, the last as guide: 0 is the stack's input, i + 1 the output of layer i; stages in a "
        "convolutional network. Of a list for an encoder-decoder, the decoder takes those before its late layers.",
    )
    num_late_layers: int = Field(
        1, ge=0, description="Last frozen layers that process the result; none in the pooled form."
    )
    sensing: Literal["auto", "gated", "norm", "cnn", "pooled"] = Field(
        "auto", description="How a state is made small; auto is gated, or what convolutions and pairs of towers need."
    )
    guide_mlp: bool = Field(False, description="Two layers and a norm on what is added to the guide.")
    gate_temperature: float = Field(0.1, gt=0, description="T of the gate tanh(α / T) of the usual feature.")
    norm_eps: float = Field(1e-6, gt=0, description="In the norms of states and the sum of their weights.")
    pool_gate: bool = Field(
        False, description="In the pooled form, learn how much the token at the pooled position counts."
    )
    copy_norm: bool = Field(False, description="Start new final norms from the backbone's instead of one.")
    dropout: float = Field(0.1, ge=0, lt=1, description="After the output's norm, with sensing by norm.")

    @field_validator("states")
    @classmethod
    def _in_order(cls, chosen: Any) -> Any:
        for each in chosen.values() if isinstance(chosen, Mapping) else [chosen]:
            check_states(each)
        return chosen

    def deltas_on(self, anatomy: Anatomy, model: nn.Module) -> Iterator[Place]:
        asked: Form = {"cnn": "cnn", "pooled": "pooled"}.get(self.sensing, "auto")  # type: ignore[assignment]
        form = form_of(self.slug, asked, anatomy)
        if self.sensing in ("gated", "norm") and form in ("cnn", "pooled"):
            raise AttachError(
                f"{self.slug}: sensing = {self.sensing!r} takes tokens; {anatomy.model_class} needs {form!r}"
            )
        for stack in anatomy.stacks:
            names = argument_names(model.get_submodule(stack.blocks[0].path))
            norm = anatomy.final_norm(stack)
            if form == "pooled":
                yield Place(block_site(stack, -1), self.pooled(anatomy, stack, names))
                continue
            memory = form == "encoder_decoder" and stack.name == "encoder"
            late = 0 if memory else self.num_late_layers
            count = len(stack.blocks)
            if late >= count:
                raise AttachError(
                    f"{self.slug}: num_late_layers = {late}, but {stack.name!r} has {count} layers; leave one early"
                )
            numbers = self.numbers(stack, count - late, form)
            kind: type[Sherl] = (
                Maps if form == "cnn" else Memory if memory else Decoder if form == "encoder_decoder" else Sherl
            )
            width = widths_of(stack, [count - late])[0]
            sensing: Sensing = "cnn" if form == "cnn" else "gated" if self.sensing == "auto" else self.sensing
            delta = kind(self, sensing, widths_of(stack, numbers), self.inner(width), width)
            delta.reads, delta.names = numbers, names
            if isinstance(delta, Memory) and norm is not None:
                delta.add_norm(norm, model)
            yield Place(block_site(stack, count - late, "input") if late else block_site(stack, -1), delta)
            if form == "encoder_decoder" and not memory and norm is not None:
                yield Place(norm, FinalNorm(norm, model))

    def numbers(self, stack: Stack, last: int, form: Form) -> tuple[int, ...]:
        """Numbers of the states to read, of 0 … last."""
        chosen = self.states
        if isinstance(chosen, Mapping):
            if stack.name not in chosen:
                raise AttachError(f"{self.slug}: states names none of {stack.name!r}, only of {', '.join(chosen)}")
            chosen = chosen[stack.name]
        elif form == "encoder_decoder" and chosen != "all" and stack.name == "decoder":
            chosen = tuple(number for number in chosen if number <= last)
        ends = [min(depth + 1, last) for depth in stages(stack)]
        if len(set(ends)) < len(ends) or stack.blocks[last - 1].stage != stack.blocks[-1].stage:
            raise AttachError(
                f"{self.slug}: num_late_layers = {self.num_late_layers} leaves no early layer in the last stage; choose fewer"
            )
        if form != "cnn":
            return states_of(self.slug, chosen, stack, last + 1)
        picked = ends if chosen == "all" else [ends[n] for n in chosen if n < len(ends)]
        if len(picked) < 2 or picked[-1] != last or (chosen != "all" and len(picked) < len(chosen)):
            raise AttachError(
                f"{self.slug}: states number the {len(ends)} stages of {stack.name!r} from 0; the last is the guide"
            )
        return tuple(picked)

    def inner(self, width: int) -> int:
        if self.side_size is None and width % self.reduction_factor:
            raise AttachError(
                f"{self.slug}: reduction_factor = {self.reduction_factor} does not divide the width {width}; give side_size"
            )
        return self.side_size or width // self.reduction_factor

    def pooled(self, anatomy: Anatomy, stack: Stack, names: Sequence[str]) -> Pooled:
        path = pooled_exit(anatomy, stack)
        assert path is not None
        chosen = self.states[stack.name] if isinstance(self.states, dict) and stack.name in self.states else self.states
        if isinstance(chosen, dict):
            raise AttachError(f"{self.slug}: states names none of {stack.name!r}, only of {', '.join(chosen)}")
        numbers, width = states_of(self.slug, chosen, stack, len(stack.blocks) + 1), pooled_width(anatomy, path)
        delta = Pooled(self, "pooled", [*widths_of(stack, numbers), width], self.inner(width), width)
        delta.reads, delta.names, delta.writes = numbers, names, path
        delta.position = "eos" if stack.causal else "first"
        return delta

    def on_attach(self, moment: Moment) -> None:
        if self.copy_norm and not any(p.is_meta for p in moment.model.parameters()):
            for delta in moment.deltas.values():
                if isinstance(delta, (FinalNorm, Memory)) and delta.site is not None:
                    delta.norm.load_state_dict(delta.host.module(delta.site.path).state_dict(), strict=False)


# ----------------------------------------------------------------------------------------------------------------- the adapter


class Sense(nn.Module):
    """x (..., d') of a state h (..., d)"""

    def __init__(self, kind: Sensing, width: int, size: int) -> None:
        super().__init__()
        self.kind = kind
        self.W1 = nn.Linear(width, size)
        if kind == "gated":
            self.W2, self.W3 = nn.Linear(size, size), nn.Linear(size, size)
        elif kind in ("norm", "cnn"):
            self.norm = nn.LayerNorm(size) if kind == "norm" else BatchNorm(size)

    def forward(self, h: Tensor) -> Tensor:
        if self.kind == "gated":
            u = torch.relu(self.W1(h))
            return (self.W2(u) + u) * torch.sigmoid(self.W3(u))
        x: Tensor = self.W1(torch.relu(h) if self.kind == "pooled" else h)
        return self.norm(x) if self.kind in ("norm", "cnn") else x


class Sherl(Beside):
    """The adapter of one stack.

    Args:
        method: its fields. sensing: how states are made small.
        widths: of the states, the guide's last. size: d'. width: of what the late layers take.
    """

    reads: tuple[int, ...] = ()
    names: Sequence[str] = ()

    def __init__(self, method: SHERL, sensing: Sensing, widths: Sequence[int], size: int, width: int) -> None:
        super().__init__()
        self.eps, self.temperature = method.norm_eps, method.gate_temperature
        self.senses = nn.ModuleList(Sense(sensing, each, size) for each in widths)
        self.score = nn.Linear(size, 1)  # v, b
        self.mlp = None
        if method.guide_mlp:
            self.mlp = nn.Sequential(nn.Linear(size, width), nn.ReLU(), nn.Linear(width, size), nn.LayerNorm(size))
        self.gate = nn.Parameter(torch.zeros(1)) if sensing != "pooled" else None  # α
        linear = nn.Linear(size, width)
        after: dict[str, list[nn.Module]] = {
            "norm": [nn.LayerNorm(width, eps=1e-12), nn.Dropout(method.dropout)],
            "cnn": [BatchNorm(width), nn.ReLU()],
        }
        first: list[nn.Module] = [] if sensing == "cnn" else [nn.ReLU()]
        self.out = nn.Sequential(*first, linear, *after.get(sensing, []))

    def forward(self, states: list[Tensor], calls: list[Call], h: Tensor) -> Tensor | None:
        """Hidden states (B, n, d), and `last` (B, n, d) -> y (B, n, d)"""
        return self.fused([sense(self.own(x)) for sense, x in zip(self.senses, states, strict=True)], self.own(h))

    def own(self, x: Tensor) -> Tensor:
        return x.to(self.score.weight.dtype)

    def fused(self, x: Sequence[Tensor], last: Tensor) -> Tensor:
        """Small states, the guide last, and `last` -> y"""
        y: Tensor = self.out(self.guided(x[:-1], x[-1]))
        if self.gate is None:
            return y + last
        return y + torch.tanh(self.gate / self.temperature).to(y.dtype) * last

    def guided(self, shallow: Sequence[Tensor], guide: Tensor) -> Tensor:
        """G (B, n, d') of J shallow states and a guide, each token by itself."""
        kind = torch.promote_types(guide.dtype, torch.float32)
        with torch.autocast(guide.device.type, enabled=False):
            X, g = torch.stack(list(shallow), 2).to(kind), guide.to(kind)  # (B, n, J, d')
            w = self.weights(X, g)
            change = (w.unsqueeze(2) @ X).squeeze(2)
        change = change.to(guide.dtype)
        return guide + (change if self.mlp is None else self.mlp(change))

    def weights(self, X: Tensor, g: Tensor) -> Tensor:
        """w (B, n, J) of states X (B, n, J, d') under a guide g (B, n, d'): at least 0, of sum 1, or all 0."""
        length = X.norm(dim=-1) + self.eps
        likeness = torch.relu(X @ X.mT / length.unsqueeze(-1) / length.unsqueeze(-2))
        v, b = self.score.weight[0].to(X.dtype), self.score.bias.to(X.dtype)
        raw = (X @ (g * v).unsqueeze(-1)).squeeze(-1) + b  # v · (x ⊙ g) + b
        w = torch.relu(raw) / likeness.sum(-1).clamp_min(self.eps)
        return w / (w.sum(-1, keepdim=True) + self.eps)


class Memory(Sherl):
    """An encoder's: y, through a final norm that trains and dropout, is what the decoder's late layers look into."""

    site: Site | None = None  # of the frozen final norm, if there is one
    norm: nn.Module

    def add_norm(self, site: Site, model: nn.Module) -> None:
        original = model.get_submodule(site.path)
        config = getattr(model.get_submodule(site.path.rpartition(".")[0]), "config", None)
        self.site, self.norm = site, norm_like(original, site.out_features)
        self.drop = nn.Dropout(dropout_of(config))

    def forward(self, states: list[Tensor], calls: list[Call], h: Tensor) -> None:
        y = self.fused([sense(self.own(x)) for sense, x in zip(self.senses, states, strict=True)], self.own(states[-1]))
        keep_memory(self, h, self.drop(self.norm(y)) if self.site is not None else y)


class Decoder(Sherl):
    """A decoder's: its late layers look into the side encoder's result."""

    def late(self, block: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        call = Call(block, args, kwargs)
        found = encoder_states(call, self.names)
        if found is None:
            return None
        call = with_argument(call, found[0], memory_of(self, found[1]).to(found[1].dtype))
        return call.args, call.kwargs


class FinalNorm(ModuleDelta):
    """A decoder's final norm, new."""

    def __init__(self, site: Site, model: nn.Module) -> None:
        super().__init__()
        self.site, self.norm = site, norm_like(model.get_submodule(site.path), site.out_features)

    def forward(self, h: Tensor) -> Tensor:
        y: Tensor = self.norm(h.to(next(self.norm.parameters()).dtype)).to(h.dtype)
        return y


class Maps(Sherl):
    """Of stages of a convolutional network: maps (B, C, *size), pooled to the size of the last."""

    writes = "block"

    def forward(self, states: list[Tensor], calls: list[Call], h: Tensor) -> Tensor:
        size = states[-1].shape[2:]
        small = [self.pool(self.own(F), size).movedim(1, -1) for F in states]
        x = [sense(F.flatten(1, 2)) for sense, F in zip(self.senses, small, strict=True)]
        return self.fused(x, self.own(h).flatten(2).mT).mT.unflatten(2, size)

    @staticmethod
    def pool(F: Tensor, size: torch.Size) -> Tensor:
        """Maximum plus mean of each cell of the last map's grid."""
        windows = tuple(own // last for own, last in zip(F.shape[2:], size, strict=True))
        if any(own % last for own, last in zip(F.shape[2:], size, strict=True)):
            raise AttachError(f"a stage is {tuple(F.shape[2:])}, which is no multiple of the last, {tuple(size)}")
        return nn.functional.max_pool2d(F, windows) + nn.functional.avg_pool2d(F, windows)


class Pooled(Sherl):
    """Of a tower: each state becomes one vector, the guide is the tower's pooled embedding, and the result is added to it."""

    position: str | int = "first"

    def __init__(self, method: SHERL, sensing: Sensing, widths: Sequence[int], size: int, width: int) -> None:
        super().__init__(method, sensing, widths, size, width)
        self.spatial = nn.ModuleList(nn.Linear(size, 1) for _ in widths[:-1])
        self.share = nn.Parameter(torch.ones(len(widths) - 1)) if method.pool_gate else None  # γ

    def forward(self, states: list[Tensor], calls: list[Call], h: Tensor) -> Tensor:
        """Hidden states (B, n, d), the pooled embedding (B, E) -> the new one (B, E)"""
        return self.embedding(
            states, h, valid(calls, self.names, states[0].shape[1]), pool_positions(self, self.position, states[0])
        )

    def embedding(self, states: list[Tensor], pooled: Tensor, mask: Tensor | None, position: Tensor) -> Tensor:
        pooled = self.own(pooled)
        guide = self.senses[-1](pooled)[:, None]
        row = torch.arange(len(pooled), device=pooled.device)
        vectors = []
        for number, (state, sense, spatial) in enumerate(zip(states, self.senses, self.spatial, strict=False)):
            x = sense(self.own(state))
            score = spatial(guide * x)[..., 0]  # (B, n)
            s = torch.relu(score if mask is None else score * mask)
            s = s / (s.sum(-1, keepdim=True) + self.eps)
            share = 1.0 if self.share is None else torch.sigmoid(self.share[number] / self.temperature)
            vectors.append((s[:, None] @ x)[:, 0] + share * x[row, position])
        return self.fused([*(vector[:, None] for vector in vectors), guide], pooled[:, None])[:, 0]


__all__ = ["SHERL"]
