"""PETALface: two low-rank branches, blended by the quality of each image.  Narayan et al. 2024, arXiv 2412.07771.

    W x + b  <-  W x + b + c [U_lo U_hi] ([(1 - α) 1_r; α 1_r] ⊙ [D_lo; D_hi] x)        D (r, in), U (out, r)

α is one number for each image, whatever tokens or windows it has: 0.5 ± (quality - threshold), so near 1 a good image is changed by U_hi D_hi
alone, near 0 a poor one by U_lo D_lo, and at the threshold by the mean of both. Where the quality comes from, see `pt.given` below.

Sits     on q, k and v of every block, which share D as in one fused linear (`joint_qkv`); with one branch and no α, on a last
         projection.
Trains   2 r (in + out) numbers per twin linear, q, k and v counting as one, and r (in + out) for the projection. What judges images
         is frozen, and in no file.
Starts   at U = 0, so the adapted model is the bare backbone, bit for bit, whatever α.
Merges   at one α for all images: `with pt.given(model, alpha=0.8): tuned.merge()`. Not without: each image has a weight of its own.

Quality is a measure by name, computed of the pixels that the model is given ("laplacian", the variance of the Laplacian in decades, is low
for blurred images); or, before that, `pt.given(model, quality=scores)`, `pt.given(model, quality=judge)` with a function of images in [0, 1],
or an argument `quality` of the model's forward. The threshold is the median on training data, the scores' range theirs
(`normalise="minmax"`): both are learnt by `calibrate` before the first step, and saved.

Dropout is on the output of U, of each branch by itself. In training that takes two products of r where there would be one of 2 r, each with a
mask as large as the output; without it, and in evaluation, both branches are one product.

Relations: With equal branches, or α = 0.5, this is LoRA. The reference neither clips α nor rescales scores, and lets batch norms move: that is
clip=False, normalise=None, freeze_bn_stats=False. The margin losses and the face metrics are in `petiole.tasks.face`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from petiole.anatomy import Anatomy, Site
from petiole.errors import AttachError
from petiole.factored import Parts, between
from petiole.method import Base, Delta, Layers, Method, Moment, Place, WeightDelta, layers_field
from petiole.methods.lowrank.factors import multiplied
from petiole.methods.lowrank.origin import linears
from petiole.methods.lowrank.quality import Blend

Init = Literal["zero", "trunc_normal"]
Positive = Annotated[float, Field(gt=0)]


class PETALface(Method):
    """Two low-rank branches per linear, one for poor and one for good images."""

    slug: ClassVar[str] = "petalface"
    title: ClassVar[str] = "PETALface: Parameter Efficient Transfer Learning for Low-resolution Face Recognition"
    paper: ClassVar[str] = "2412.07771"
    saves: ClassVar[str] = "parameters, and what a model can do on good images while it learns poor ones"
    identity_at_start: ClassVar[bool] = True
    size: ClassVar[str] = "rank"
    exempt: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("bert", "llama", "gpt2", "t5"), "as it comes, it scores images, and this model takes none"
    )

    rank: int = Field(8, ge=1, description="Inner width r of each branch.")
    scale: float = Field(1.0, gt=0, description="Factor c on the change, not divided by the rank.")
    dropout: float = Field(0.1, ge=0, lt=1, description="On the output of U, in training.")
    init: Init = Field("zero", description="Start at U = 0, or with D and U of the reference's truncated normal.")
    quality: Literal["laplacian", "gradient", "contrast"] | None = Field(
        "laplacian", description="Measure of an image's quality; None where all scores are given."
    )
    threshold: float | Literal["median"] = Field(
        "median", description="Score at which both branches weigh alike, after `normalise`; 'median': of training data."
    )
    higher_is_better: bool = Field(True, description="Whether a good image has a high score; not so for BRISQUE.")
    clip: bool = Field(True, description="Keep α in [0, 1].")
    normalise: Literal["minmax", "sigmoid"] | None = Field(
        "minmax", description="Rescale scores to [0, 1]: by their range on training data, or by 1 / (1 + exp(-q))."
    )
    image_mean: float | tuple[float, ...] = Field(
        0.5, description="What the image processor subtracted, by channel: scores are of images in [0, 1]."
    )
    image_std: Positive | tuple[Positive, ...] = Field(0.5, description="By what the image processor divided then.")
    joint_qkv: bool = Field(True, description="Whether q, k and v of a block share D, as in one fused linear.")
    freeze_bn_stats: bool = Field(True, description="Whether running statistics of batch norms stay as they are.")
    roles: tuple[str, ...] = Field(("q", "k", "v"), min_length=1, description="Linears with two branches, by role.")
    single_roles: tuple[str, ...] | None = Field(
        None, description="Linears with one branch and no α; if None a pooler's projection, where there is one."
    )
    layers: Layers = layers_field()

    @property
    def needs_data(self) -> bool:
        """Whether something has to be learnt from data before the first step."""
        return self.threshold == "median" or self.normalise == "minmax"

    def overrides(self, event: str) -> bool:
        return super().overrides(event) and (event != "calibrate" or self.needs_data)

    def deltas(self, anatomy: Anatomy) -> Iterator[Place]:
        if self.quality is not None and "patch_embedding" not in anatomy.roles:
            raise AttachError(
                f"petalface: quality = {self.quality!r} scores images, but {anatomy.model_class} takes none\n"
                "quality=None takes scores that are given: with pt.given(model, quality=…)"
            )
        single = (("pooler",) if "pooler" in anatomy.roles else ()) if self.single_roles is None else self.single_roles
        for twin, roles in ((True, self.roles), (False, single)):
            for site in linears(self.slug, anatomy, roles, self.layers) if roles else ():
                if site.kind == "parameter":
                    raise AttachError(
                        f"petalface: {site.key} is composed for a whole batch, so images can't differ there"
                    )
                yield Place(site, Branches(self, site, twin))

    def shared(self, anatomy: Anatomy) -> nn.Module:
        return Blend(self)

    def bind(self, deltas: Mapping[str, Delta], shared: nn.Module | None) -> None:
        first: dict[str, Branches] = {}
        for key, delta in deltas.items():
            if isinstance(delta, Branches) and delta.twin and isinstance(shared, Blend):
                delta.blend = (shared,)  # in a tuple, so that it is not registered once more
                block, _, role = key.rpartition(".")[0].rpartition(".")
                if self.joint_qkv and role in ("q", "k", "v"):
                    delta.D = first.setdefault(block, delta).D

    def trains(self, anatomy: Anatomy, model: nn.Module) -> Iterable[str]:
        for path, module in model.named_modules():
            if not self.freeze_bn_stats and isinstance(getattr(module, "running_mean", None), Tensor):
                yield f"{path}.running_mean"

    def stays(self, deltas: Mapping[str, Delta]) -> Mapping[str, str]:
        why = "each image has a weight of its own, but for `with pt.given(model, alpha=…)`,"
        return {key: why for key, d in deltas.items() if isinstance(d, Branches) and d.twin and d.fixed() is None}

    def calibrate(self, moment: Moment, batches: Iterable[Mapping[str, Any]]) -> None:
        assert isinstance(moment.shared, Blend)
        moment.shared.calibrate(next(iter(moment.deltas.values())).host, batches)


class Branches(WeightDelta):
    """Δy = c Σ_i U_i (α_i D_i x): two branches, low before high, or one with α = 1.

    Args:
        method: whose settings hold. site: gives the sizes. twin: two branches, or one.
    """

    def __init__(self, method: PETALface, site: Site, twin: bool) -> None:
        super().__init__()
        self.rank, self.scale, self.init, self.twin = method.rank, method.scale, method.init, twin
        self.dropout = nn.Dropout(method.dropout) if method.dropout else None
        width = method.rank * (2 if twin else 1)
        self.D = nn.Parameter(torch.empty(width, site.in_features))  # [D_lo; D_hi] (2r, in)
        self.U = nn.Parameter(torch.empty(site.out_features, width))  # [U_lo U_hi] (out, 2r)
        self.blend: tuple[Blend, ...] = ()

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        """D ~ N(0, 1/r²) and U = 0; or both from a normal of deviation 0.02, cut at ±2."""
        if self.init == "zero":
            self.D.normal_(0, 1 / self.rank, generator=generator)
            self.U.zero_()
        else:
            for tensor in (self.D, self.U):
                nn.init.trunc_normal_(tensor, std=0.02, generator=generator)

    def core(self) -> tuple[Tensor, ...]:
        """What each row of D x is multiplied by, (n, 1, 2r) or (2r,) where all images are alike; none with one branch."""
        if not self.blend:
            return ()
        weights = self.blend[0].weights(self.host)
        return (weights.view(-1) if len(weights) == 1 else weights,)

    def fixed(self) -> Tensor | None:
        """The core (2r,) at the one α that is given for all images; None if there is no such."""
        given = self.host.given("alpha")
        return None if given is None or torch.as_tensor(given).numel() != 1 else self.core()[0]

    def parts(self) -> Parts:
        return (self.D, self.U, self.scale, None, *self.core())  # type: ignore[return-value]

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """x (..., in) -> Δy (..., out); its rows are those of the batch, or several for each of them, image by image."""
        low = nn.functional.linear(x, self.D.to(x.dtype)) * self.scale
        for core in self.core():
            low = between(low, core.to(low.dtype))
        U = self.U.to(low.dtype)
        if self.dropout is None or not self.training:
            return nn.functional.linear(low, U)
        count = 2 if self.twin else 1
        changes = [nn.functional.linear(l, u) for l, u in zip(low.chunk(count, -1), U.chunk(count, 1), strict=True)]
        return sum(map(self.dropout, changes[1:]), self.dropout(changes[0]))

    def factored(self) -> Parts | None:
        dropped = self.dropout is not None and self.training
        nowhere = self.twin and self.host.passing() is None and self.fixed() is None  # no forward pass, so no images
        return None if dropped or nowhere else self.parts()

    def weight(self, base: Tensor) -> Tensor:
        """ΔW (out, in) = c U diag(α) D, at the α that is given for all images."""
        if self.twin and self.fixed() is None:
            raise AttachError(
                "petalface gives each image a weight of its own, so there is no one ΔW\n"
                "with pt.given(model, alpha=0.8): … takes the one at that α"
            )
        return multiplied(self.parts(), base.dtype)
