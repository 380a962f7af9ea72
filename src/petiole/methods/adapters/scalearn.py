"""ScaLearn: one scale for each of several trained adapters.  Frohmann et al. 2023, arXiv 2310.01217.

    o = f + Σ_s ω_s ⊙ a_s        a_s = W_up,s ReLU(W_down,s u + b_down,s) + b_up,s, frozen, without its residual
    y = LN(o + x),  u = LN(f + x)        f: output of the ffn, x: its residual, LN: the frozen norm that ends the block

Sits     where the sources do. They are adaptations attached before, of `unified-view` with `insertion="pfeiffer"` as above, or of
         `pfeiffer`, whose u is f.
Trains   ω and a fresh head: L n d numbers (ScaLearn), L n (`granularity="scalar"`, Uniform), n d (`share_layers`, ++), n (both, Uniform++).
Starts   at ω of about init_scale / n.
Merges   no, but `to_single_adapter` makes one adapter of it, as wide as all of them, with ω in its second projection.

Dropout acts on ω itself, alike for all tokens. A file holds ω by the sources' names, the head, and a digest of each source; to load it,
attach the same sources first. They may be detached afterwards: what acts here is a copy. `to_single_adapter` is a function of this module.

Relations: `adapterfusion` weighs the same outputs token by token, with 3 d² + 2 d numbers per layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from petiole.adaptation import Adaptation
from petiole.anatomy import Anatomy
from petiole.attach import HEAD, attach
from petiole.errors import AttachError
from petiole.method import Delta, Method, Moment, Place
from petiole.methods.adapters.bottleneck import Bottleneck, Renormed
from petiole.methods.adapters.sources import Combined, check_names, places_of, sources_field
from petiole.methods.adapters.unified import UnifiedView

Normalize = Literal["none", "mean", "softmax"]
NEAR_ZERO = 1e-6


class ScaLearn(Method):
    """Add trained adapters up, each times a learned scale."""

    slug: ClassVar[str] = "scalearn"
    title: ClassVar[str] = "ScaLearn: Simple and Highly Parameter-Efficient Task Transfer by Learning to Scale"
    paper: ClassVar[str] = "2310.01217"
    saves: ClassVar[str] = "labels and checkpoint: trained adapters serve a further task with a few numbers"
    builds_on: ClassVar[str] = "adapters that were trained before"

    sources: tuple[str, ...] = sources_field()
    granularity: Literal["vector", "scalar"] = Field(
        "vector", description="ω_s for each feature, or one number for all."
    )
    share_layers: bool = Field(False, description="The same ω in every layer.")
    init_scale: float = Field(2.0, description="ω starts at init_scale / n.")
    init_std: float = Field(1e-3, ge=0, description="Standard deviation of ω at start.")
    dropout: float = Field(0.3, ge=0, lt=1, description="On ω, in training; the paper's Uniform++ has 0.")
    normalize: Normalize = Field("none", description="ω is divided by its sum over the sources, or by softmax; or not.")
    penalty: float = Field(0.0, ge=0, description="Factor of a loss term on the size of ω.")
    penalty_norm: Literal["l1", "l2"] = Field("l1", description="That term: Σ |ω|, or Σ ω².")
    constants: tuple[float, ...] | None = Field(
        None, description="ω_s as constants, one for each source: the head trains alone (probing)."
    )

    @field_validator("sources")
    @classmethod
    def each_once(cls, sources: tuple[str, ...]) -> tuple[str, ...]:
        return check_names(sources)

    @field_validator("constants")
    @classmethod
    def one_each(cls, constants: tuple[float, ...] | None, info: ValidationInfo) -> tuple[float, ...] | None:
        sources = info.data.get("sources", ())
        if constants is not None and len(constants) != len(sources):
            raise ValueError(f"{len(constants)} constants for {len(sources)} sources")
        return constants

    def deltas_on(self, anatomy: Anatomy, model: nn.Module) -> Iterator[Place]:
        for each in places_of(self.slug, model, self.sources):
            width = next(iter(each.bottlenecks.values())).up.out_features
            scales = None if self.share_layers else self.scales(width)
            yield Place(each.place.site, Scaled(each.bottlenecks, scales), read=each.place.read)

    def scales(self, width: int) -> Scales:
        return Scales(
            self.sources,
            width if self.granularity == "vector" else 1,
            self.init_scale,
            self.init_std,
            self.dropout,
            self.normalize,
            self.constants,
        )

    def shared(self, anatomy: Anatomy) -> nn.Module | None:
        return self.scales(anatomy.stacks[0].blocks[0].hidden_size) if self.share_layers else None

    def bind(self, deltas: Mapping[str, Delta], shared: nn.Module | None) -> None:
        for delta in deltas.values():
            if isinstance(delta, Scaled) and isinstance(shared, Scales):
                if delta.up.shape[0] != shared.width and shared.width > 1:
                    raise AttachError(
                        f"{self.slug}: layers of widths {delta.up.shape[0]} and {shared.width} can't share ω; granularity='scalar'"
                    )
                delta.common = (shared,)

    def loss(self, moment: Moment) -> Tensor | None:
        if not self.penalty or self.constants is not None:
            return None
        modules = [moment.shared] if moment.shared is not None else list(moment.deltas.values())
        sizes = [
            p.abs().sum() if self.penalty_norm == "l1" else p.square().sum() for m in modules for p in m.parameters()
        ]
        return self.penalty * torch.stack(sizes).sum()


class Scales(nn.Module):
    """() -> ω (n, d or 1), in float32, before dropout

    Args:
        names: of the sources, by which ω is kept. width: d, or 1.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        width: int,
        init_scale: float = 2.0,
        init_std: float = 1e-3,
        dropout: float = 0.0,
        normalize: Normalize = "none",
        constants: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        self.names, self.width, self.init_std, self.normalize = names, width, init_std, normalize
        self.means = constants or (init_scale / len(names),) * len(names)
        self.constant = constants is not None
        self.dropout = nn.Dropout(0.0 if self.constant else dropout)
        for name in names:  # one dimension each, so that weight decay leaves them alone
            self.register_parameter(f"omega_{name}", nn.Parameter(torch.empty(width), requires_grad=not self.constant))

    def initialise(self, generator: torch.Generator) -> None:
        for name, mean in zip(self.names, self.means, strict=True):
            if self.constant:
                self.get_parameter(f"omega_{name}").fill_(mean)
            else:
                self.get_parameter(f"omega_{name}").normal_(mean, self.init_std, generator=generator)

    def forward(self) -> Tensor:
        omega = torch.stack([self.get_parameter(f"omega_{name}") for name in self.names])
        return normalised(omega, self.normalize)


def normalised(omega: Tensor, how: Normalize) -> Tensor:
    """ω (n, ...) over the sources: as it is, divided by its sum, or by softmax.

    Raises:
        AttachError: a sum is nearly 0.
    """
    if how == "mean":
        total = omega.sum(0)
        if not torch.compiler.is_compiling() and bool((total.abs() < NEAR_ZERO).any()):
            raise AttachError(
                f"normalize='mean': the scales of a feature add up to less than {NEAR_ZERO}\nnormalize='softmax' divides by no such sum"
            )
        return omega / total
    return omega.softmax(0) if how == "softmax" else omega


class Scaled(Combined):
    """Δ = Σ_s ω_s ⊙ a_s, as one product with ω in the second projections; ω's gradient comes from that of this product's weight.

    Args:
        scales: of this layer; None where all layers share those that `bind` gives.
    """

    def __init__(self, sources: dict[str, Bottleneck], scales: Scales | None) -> None:
        super().__init__(sources)
        self.scales = scales
        self.common: tuple[Scales, ...] = ()  # in a tuple, so that it is not registered once more

    def initialise(self, generator: torch.Generator, base: Any) -> None:
        if self.scales is not None:
            self.scales.initialise(generator)

    def folded(self, dropped: bool = True) -> tuple[Tensor, Tensor]:
        """W_up (d, R) and b_up (d,) of all sources with ω in them, after its dropout if that acts."""
        scales = self.common[0] if self.scales is None else self.scales
        omega = scales.dropout(scales()) if dropped else scales()
        return self.up * omega.index_select(0, self.owner).T, (omega * self.up_bias).sum(0)

    def mixed(self, u: Tensor, m: Tensor) -> Tensor:
        return nn.functional.linear(m, *self.folded())


@torch.no_grad()
def to_single_adapter(tuned: Adaptation, name: str = "single") -> Adaptation:
    """ScaLearn as one adapter as wide as all sources, with the same outputs: attached beside it, head included, and active.

    Args:
        tuned: an adaptation by `ScaLearn` alone. name: of the new one.

    Returns:
        An adaptation by `unified-view`, which needs no sources and can be saved, routed and trained as any.

    Raises:
        AttachError: `tuned` is something else, or its places are no whole layers of one or all stacks.
    """
    if [method.slug for method in tuned.methods] != [ScaLearn.slug]:
        raise AttachError(f"{tuned.name!r} is not made by scalearn alone, so it is no sum of adapters")
    old = {slot.key: slot for slot in tuned.slots}
    combined = [slot for slot in tuned.slots if slot.number != HEAD]
    first = combined[0].delta
    stacks = sorted({slot.site.stack for slot in combined})
    insertion = "pfeiffer" if first.closing else "sequential" if combined[0].place.read is None else "parallel"
    site = {
        "form": "adapter",
        "insertion": insertion,
        "bottleneck": first.up.shape[1],
        "scale": 1.0,
        "activation": first.activation,
    }
    depths = tuple(sorted({slot.site.depth for slot in combined}))
    method = UnifiedView(
        attention={"form": "none"}, ffn=site, layers=depths, stack=stacks[0] if len(stacks) == 1 else None
    )
    single = attach(
        tuned.model, method, name=name, seed=tuned.seed, train_head=any(slot.number == HEAD for slot in tuned.slots)
    )
    if {slot.key for slot in single.slots} != set(old):
        single.detach()
        raise AttachError(f"{tuned.name!r} does not sit at the same layers of each of its stacks, as one adapter would")
    for slot in single.slots:
        source, delta = old[slot.key].delta, slot.delta
        if slot.number == HEAD:
            delta.load_state_dict(source.state_dict())
            continue
        assert isinstance(delta, (Bottleneck, Renormed))
        up, bias = source.folded(dropped=False)
        for tensor, value in (
            (delta.down.weight, source.down),
            (delta.down.bias, source.down_bias),
            (delta.up.weight, up),
            (delta.up.bias, bias),
        ):
            tensor.copy_(value)
    return single
