"""Adapters for audio spectrogram transformers.  Cappellazzo et al. 2024, arXiv 2312.03694.

    parallel              x <- x + f(u) + A(u)               u: what the sub-layer f is given, the norm's output in a pre-norm model
    sequential            x <- x + f(u) + A(f(u))            without `residual`: x + A(f(u))
    sequential, before    x <- x + f(v) + v, v = A(u) + u    without `residual`: v = A(u)

Sits     at every ffn (Pfeiffer's layout); with roles=["attention", "ffn"] at both sub-layers (Houlsby's).
Trains   A: a conformer block 3 d b + b (k + 5) + d, that is 19,488 numbers at d = 768, b = 8, k = 31; a bottleneck 2 d b + b + d; the
         norm in front of each adapted sub-layer; the final norm.
Starts   at W_up = 0: the bare backbone, bit for bit; not with `init="reference"`, nor in sequence without a residual or before the sub-layer.
Merges   no: what is between the projections is not linear. BatchNorm is folded into the convolution in evaluation.

b = round(d / reduction_factor). A is one of the modules of `conformer.py`. In parallel after the sub-layer A reads f(u), which is the same as in
sequence with a residual. With BatchNorm the batch in training is part of what a sample sees; in evaluation it is not. The paper trains with
a backbone in evaluation mode: `model.eval(); tuned.train()`. Its head reads the mean of all tokens: `[ASTAdapter(), LinearProbe(pool="all")]`.

Relations: `parallel-adapter` and `pfeiffer` are its bottleneck form with ReLU, for text. `lora`, `prompts` and `prefix` below are the paper's
other methods, as settings of petiole's; `LinearProbe(final_norm=True)` and `BitFit(convolutions=False)` are its baselines.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator
from torch import nn

from petiole.anatomy import Anatomy, Site
from petiole.errors import AttachError, ConfigError
from petiole.method import Layers, Method, Place, layers_field, stack_field
from petiole.methods.adapters.conformer import Branch, Conformer, Convpass, Echo, Init, Plain
from petiole.methods.full.names import final_norms, norm_before, of_site
from petiole.methods.lowrank.lora import LoRA
from petiole.methods.prompts.pooled import Pooled
from petiole.methods.prompts.prefix import PrefixTuning
from petiole.methods.prompts.prompt import VisualPromptTuning

_BATCH = "in training a sample sees its batch, in evaluation it does not, so the two differ by more than rounding"


class ASTAdapter(Method):
    """Conformer, bottleneck or convolutional adapters in any place of a block."""

    slug: ClassVar[str] = "petl-ast"
    title: ClassVar[str] = "Parameter-Efficient Transfer Learning of Audio Spectrogram Transformers"
    paper: ClassVar[str] = "2312.03694"
    saves: ClassVar[str] = "optimiser state and checkpoint"
    identity_at_start: ClassVar[bool] = True
    routes: ClassVar[bool] = False
    exempt: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("runs_under_bf16_autocast", "runs_on_a_bf16_backbone"), _BATCH),
        **dict.fromkeys(("llama", "gpt2", "t5"), "its convolution would look ahead"),
    }
    learning_rates: ClassVar[tuple[float, float]] = (3e-4, 3e-2)

    block: Literal["conformer", "bottleneck", "convpass"] = Field("conformer", description="The adapter module.")
    reduction_factor: float = Field(96, ge=1, description="Width of the backbone over that of the bottleneck.")
    roles: tuple[Literal["attention", "ffn"], ...] = Field(
        ("ffn",), min_length=1, description="Sub-layers to adapt: ffn alone is Pfeiffer's layout, both are Houlsby's."
    )
    insertion: Literal["parallel", "sequential"] = Field(
        "parallel", description="Beside the sub-layer, added to what it gives, or in its way."
    )
    position: Literal["before", "after"] | None = Field(
        None, description="Which side of the sub-layer it reads; if None before in parallel, and after in sequence."
    )
    residual: bool | None = Field(
        None, description="Whether what it reads is added to what it gives; if None only in sequence."
    )
    kernel_size: int | None = Field(
        None,
        ge=1,
        description="Tokens that its convolution spans; if None 31, in a convpass block 3. Even: one more ahead.",
    )
    dropout: float | None = Field(
        None, ge=0, lt=1, description="In the adapter, in training; if None 0, in a convpass block 0.1."
    )
    train_layernorm: bool = Field(True, description="Train the norm in front of each adapted sub-layer, too.")
    init: Init = Field(
        "zero_up", description="zero_up: starts as the bare backbone; reference: as its code, whose bottleneck is dead."
    )
    layers: Layers = layers_field()
    stack: str | None = stack_field()

    @field_validator("kernel_size")
    @classmethod
    def there_is_a_convolution(cls, kernel_size: int | None, info: ValidationInfo) -> int | None:
        if kernel_size is not None and info.data.get("block") == "bottleneck":
            raise ValueError("a bottleneck has no convolution; leave it out, or take another block")
        return kernel_size

    def deltas(self, anatomy: Anatomy) -> Iterator[Place]:
        if self.insertion == "parallel" and self.residual:
            warnings.warn(f"{self.slug}: residual=True beside a sub-layer adds its input twice", stacklevel=2)
        for site in self.sites(anatomy):
            yield from self.inserted(site)

    def sites(self, anatomy: Anatomy) -> list[Site]:
        """The sub-layers.

        Raises:
            AttachError: a convolution would see tokens that are not there yet.
        """
        sites = anatomy.sites(self.roles, self.layers, self.stack)
        for name in {site.stack for site in sites}:
            if anatomy.stack(name).causal and self.block != "bottleneck":
                raise AttachError(
                    f"{self.slug}: {name} of {anatomy.model_class} sees no later tokens, which the convolution of a {self.block} would;\n"
                    "block='bottleneck' has none; stack= names another stack"
                )
        return sites

    def inserted(self, site: Site) -> Iterator[Place]:
        """What sits at one sub-layer."""
        after = (self.position or ("after" if self.insertion == "sequential" else "before")) == "after"
        read, write = site.at("output" if after else "input"), site.at("output")
        if self.insertion == "parallel":
            yield Place(write, self.adapter(read, write.size, bool(self.residual)), read=None if after else read)
            return
        adapter = self.adapter(read, read.size)
        if self.residual is False:
            adapter.composition = "replace"
        yield Place(read, adapter)
        if not after:
            yield Place(write, Echo(), read=read)

    def adapter(self, read: Site, out_size: int, residual: bool = False) -> Branch:
        """A, for what is read at a site.

        Raises:
            AttachError: nothing is left of the bottleneck.
        """
        b = round(read.size / self.reduction_factor)
        if b < 1:
            raise AttachError(
                f"{self.slug}: reduction_factor = {self.reduction_factor:g} leaves nothing of {read.key}, which is {read.size} wide; "
                f"at most {read.size} leaves one"
            )
        dropout = self.dropout if self.dropout is not None else 0.1 if self.block == "convpass" else 0.0
        adapter: Branch
        if self.block == "bottleneck":
            adapter = Plain(read.size, b, out_size, dropout, self.init)
        elif self.block == "convpass":
            adapter = Convpass(read, b, self.kernel_size or 3, out_size, dropout)
        else:
            adapter = Conformer(read, b, self.kernel_size or 31, out_size, dropout, self.init)
        adapter.residual = residual
        return adapter

    def trains(self, anatomy: Anatomy, model: nn.Module) -> Iterator[str]:
        sites = self.sites(anatomy)
        yield from final_norms(anatomy, model, {site.stack for site in sites})
        norms = [norm for site in sites if (norm := norm_before(anatomy, site)) is not None]
        if self.train_layernorm and not norms:
            raise AttachError(
                f"{self.slug}: {anatomy.model_class} has no norm that is known to stand in front of {sites[0].key}\n"
                "train_layernorm=False leaves the norms alone"
            )
        for norm in norms if self.train_layernorm else ():
            yield from of_site(norm, model)


# ------------------------------------------------------------------------------------------- the paper's other methods, as settings


def lora(
    hidden_size: int,
    *,
    roles: tuple[str, ...] = ("q", "v"),
    reduction_factor: float = 64,
    alpha: float = 8,
    scale_by: Literal["reduction_factor", "rank"] = "reduction_factor",
    layers: Layers = None,
) -> LoRA:
    """LoRA of rank round(d / reduction_factor), scaled by alpha over that factor, which starts at A = 0.

    Args:
        hidden_size: d. scale_by: "rank" divides alpha by the rank, as others do.

    Raises:
        ConfigError: no rank is left.
    """
    rank = round(hidden_size / reduction_factor)
    if rank < 1:
        raise ConfigError(f"reduction_factor = {reduction_factor:g} leaves no rank of a width of {hidden_size}")
    factor = reduction_factor if scale_by == "reduction_factor" else rank
    return LoRA(rank=rank, alpha=alpha * rank / factor, zero="A", roles=roles, layers=layers)


def prompts(length: int = 25, *, deep: bool = True, dropout: float = 0.0, pool: Pooled = "all") -> VisualPromptTuning:
    """Prompts of which one takes the distillation token's place, so that 1 + length + patches tokens run through every block."""
    return VisualPromptTuning(length=length, deep=deep, dropout=dropout, replaces=1, pool=pool)


def prefix(length: int = 24) -> PrefixTuning:
    """Half of the vectors are keys, half are values.

    Raises:
        ConfigError: they don't divide by two.
    """
    if length < 2 or length % 2:
        raise ConfigError(f"length = {length}: an even number from 2 on, half of it keys and half of it values")
    return PrefixTuning(length=length // 2)


__all__ = ["ASTAdapter", "lora", "prefix", "prompts"]
