"""The unified view: one space of changes of hidden states, of which known methods are points.  He et al. 2021, arXiv 2110.04366.

    h  <-  h ∘ Δh        what computes Δh (form), from where (insertion), at which sub-layer, and how it is put in (composition)

    prefix               Δh = softmax(q P_kᵀ / √d) P_v         gate: h <- (1 - λ) h + λ Δh, in the heads; add, scaled: h <- h + s Δh
    multihead_adapter    Δh = ReLU(LN(x) W_q P_kᵀ) P_v         in the heads, W_q frozen
    adapter              Δh = W_up ReLU(W_down LN(x))          parallel: from the sub-layer's input x, at an attention into its heads;
                                                               sequential: from its output; pfeiffer: from LN(output + residual)
    lora                 Δh = W_up W_down x                    on q and v, or on the linears of the ffn

Sits     at every attention, self and cross, and at every ffn; with `extra` in the biases or before the tokens.
Trains   per attention: 2 l d (prefix), 2 d r + r + d + 2 d (adapter with its norm), 4 d r (lora); per ffn: 2 d r + r + d (adapter).
Starts   at the backbone with LoRA and with adapters of `init="lora"`; near it otherwise.
Merges   LoRA does, and biases; adapters and prefixes stay: `merge(partly=True)`. The MLP of a prefix folds away on save.

By default it is MAM for generation. `UnifiedView.preset(name)` gives the paper's points, and a point of one's own is given by its fields:
`UnifiedView(attention={"form": "adapter", "bottleneck": 8}, ffn={"form": "none"})`. In training the backbone's own dropout after a sub-layer
acts on what is added there too.

Relations: `houlsby`, `pfeiffer`, `parallel-adapter`, `prefix-tuning`, `lora`, `prompt-tuning`, `bitfit` are its pure points and have options
of their own; `mam` is its best one, in the sizes for classification.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, ValidationInfo, field_validator

from petiole.anatomy import Anatomy
from petiole.method import Config, Delta, Layers, Method, Place, WeightDelta, layers_field, stack_field
from petiole.methods.adapters.bottleneck import Activation, Init, Insertion, NormAt, inserted
from petiole.methods.adapters.composed import Composed
from petiole.methods.adapters.multihead import MultiHeadAdapter
from petiole.methods.full.full import BitFit
from petiole.methods.lowrank.lora import LoRA
from petiole.methods.prompts.prefix import PrefixTuning
from petiole.methods.prompts.prompt import PromptTuning
from petiole.methods.prompts.ungated import UngatedPrefix


class SubLayer(Config):
    """What the two kinds of sub-layer have in common: the fields of adapters and LoRA."""

    form: str
    insertion: str
    bottleneck: int = Field(ge=1, description="Inner width r; l of a prefix.")
    scale: float = Field(description="Factor s on Δh; not 0.")
    learn_scale: bool = Field(False, description="Of an adapter: train s, starting from `scale`.")
    init: Init = Field(
        "lora", description="Of an adapter. lora: starts as the bare backbone; bert: both projections normal(0, 0.02²)."
    )
    activation: Activation = Field("relu", description="Of an adapter, between its two projections.")
    bias: bool = Field(
        True, description="Whether an adapter's projections have biases; the paper's counts leave them out."
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="In an adapter, on a prefix, or on the input of LoRA; in training."
    )

    @field_validator("scale")
    @classmethod
    def scale_fits(cls, scale: float, info: ValidationInfo) -> float:
        if scale == 0:
            raise ValueError("a scale of 0 switches it off for good")
        if info.data.get("form") == "lora" and scale < 0:
            raise ValueError("LoRA's factor alpha / rank is above 0")
        return scale

    @field_validator("learn_scale")
    @classmethod
    def adapters_learn_scales(cls, learn_scale: bool, info: ValidationInfo) -> bool:
        if learn_scale and info.data.get("form") not in ("adapter", "none"):
            raise ValueError(f"only an adapter learns its scale, not form={info.data.get('form')!r}")
        return learn_scale

    @field_validator("insertion")
    @classmethod
    def in_sequence(cls, insertion: str, info: ValidationInfo) -> str:
        if insertion != "parallel" and info.data.get("form") not in ("adapter", "none"):
            raise ValueError(f"form={info.data.get('form')!r} reads the input: insertion='parallel'")
        return insertion

    def lora(self, roles: Sequence[str], layers: Layers, stack: str | None) -> LoRA:
        return LoRA(
            rank=self.bottleneck,
            alpha=self.scale * self.bottleneck,
            dropout=self.dropout,
            roles=[f"{stack}:{role}" if stack else role for role in roles],
            layers=layers,
        )


class AttentionSite(SubLayer):
    """What changes at every attention."""

    form: Literal["prefix", "adapter", "lora", "multihead_adapter", "none"] = Field(
        "prefix", description="What computes the change; none: nothing does."
    )
    insertion: Literal["parallel", "sequential"] = Field(
        "parallel", description="Fed by the input, or (an adapter alone) by the output; pfeiffer is for the ffn."
    )
    bottleneck: int = Field(30, ge=1, description="Inner width r; l of a prefix.")
    scale: float = Field(1.0, description="Factor s on Δh where it is added; not 0.")
    composition: Literal["gate", "add", "scaled"] | None = Field(
        None,
        description="gate: for a prefix, and its default; scaled: h + s Δh, the default of others; add: with s = 1.",
    )
    norm: NormAt | None = Field(
        None,
        description="A trained LayerNorm in an adapter: in, out, none; in if None, none where there is no adapter.",
    )
    init: Init = Field(
        "bert", description="Of an adapter. lora: starts as the bare backbone; bert: both projections normal(0, 0.02²)."
    )
    reparametrisation: Literal["mlp", "none"] = Field(
        "mlp", description="Of a prefix's keys and values: through an MLP that is folded away on save, or directly."
    )
    hidden_size: int = Field(800, ge=1, description="Inner width of that MLP.")

    @field_validator("composition")
    @classmethod
    def composition_fits(cls, composition: str | None, info: ValidationInfo) -> str | None:
        form, scale = info.data.get("form"), info.data.get("scale")
        if composition == "gate" and form not in ("prefix", "none"):
            raise ValueError(f"the gate is the share of a softmax, which form={form!r} has not: add or scaled")
        plain = composition in ("gate", "add") or (composition is None and form == "prefix")
        if plain and form != "none" and (scale not in (1, None) or info.data.get("learn_scale")):
            raise ValueError(f"it has no factor, but scale={scale}: composition='scaled'")
        return composition

    @field_validator("norm")
    @classmethod
    def norm_fits(cls, norm: str | None, info: ValidationInfo) -> str | None:
        form = info.data.get("form")
        if norm in ("in", "out") and form in ("prefix", "lora"):
            raise ValueError(f"form={form!r} has no norm; none, or leave it out")
        if norm in ("out", "none") and form == "multihead_adapter":
            raise ValueError("a multi-head adapter has a norm on its input: in, or leave it out")
        return norm

    def part(self, layers: Layers, stack: str | None) -> Method | None:
        """The method that does it."""
        if self.form == "none":
            return None
        if self.form == "lora":
            return self.lora(("q", "v"), layers, stack)
        if self.form == "adapter":
            return Adapters(site=self, layers=layers, stack=stack)
        vectors: dict[str, Any] = {
            "length": self.bottleneck,
            "reparametrisation": self.reparametrisation,
            "hidden_size": self.hidden_size,
            "dropout": self.dropout,
            "layers": layers,
            "stack": stack,
        }
        if self.form == "multihead_adapter":
            return MultiHeadAdapter(scale=self.scale, **vectors)
        if self.composition in (None, "gate"):
            return PrefixTuning(**vectors)
        return UngatedPrefix(scale=self.scale, **vectors)


class FFNSite(SubLayer):
    """What changes at every ffn."""

    form: Literal["adapter", "lora", "none"] = Field(
        "adapter", description="What computes the change; none: nothing does."
    )
    insertion: Literal["parallel", "sequential", "pfeiffer"] = Field(
        "parallel",
        description="Fed by the input; or (an adapter alone) by the output, or by the norm of output and residual.",
    )
    bottleneck: int = Field(512, ge=1, description="Inner width r.")
    scale: float = Field(4.0, description="Factor s on Δh; not 0.")
    norm: NormAt = Field("none", description="A trained LayerNorm in an adapter: in, out, none.")

    @field_validator("norm")
    @classmethod
    def norm_fits(cls, norm: str, info: ValidationInfo) -> str:
        if norm != "none" and info.data.get("form") == "lora":
            raise ValueError("form='lora' has no norm")
        return norm

    def part(self, layers: Layers, stack: str | None) -> Method | None:
        """The method that does it."""
        if self.form == "none":
            return None
        if self.form == "lora":
            return self.lora(("up", "down"), layers, stack)
        return Adapters(site=self, layers=layers, stack=stack)


class Adapters(Method):
    """Bottlenecks at one kind of sub-layer."""

    site: AttentionSite | FFNSite
    layers: Layers
    stack: str | None

    def deltas(self, anatomy: Anatomy) -> Iterator[Place]:
        site = self.site
        insertion: Insertion = site.insertion
        if isinstance(site, AttentionSite):
            sites = anatomy.attentions(self.layers, self.stack)
            sites = sites or anatomy.sites(["attention"], self.layers, self.stack)  # which says what is missing
            insertion = "before_projection" if insertion == "parallel" else insertion
        else:
            sites = anatomy.sites(["ffn"], self.layers, self.stack)
        yield from inserted(
            anatomy,
            sites,
            insertion,
            site.bottleneck,
            scale=site.scale,
            learn_scale=site.learn_scale,
            activation=site.activation,
            dropout=site.dropout,
            norm=site.norm or "in",
            bias=site.bias,
            init=site.init,
        )


_NOTHING = {"form": "none"}
_PREFIX = {"form": "prefix", "bottleneck": 30}
PRESETS: dict[str, dict[str, Any]] = {
    "mam": {"attention": _PREFIX, "ffn": {"form": "adapter", "bottleneck": 512, "scale": 4.0}},
    "prefix": {"attention": {**_PREFIX, "bottleneck": 200}, "ffn": _NOTHING},
    "houlsby": {
        "attention": {"form": "adapter", "insertion": "sequential", "bottleneck": 200, "norm": "none"},
        "ffn": {"form": "adapter", "insertion": "sequential", "bottleneck": 200, "scale": 1.0, "init": "bert"},
    },
    "pfeiffer": {
        "attention": _NOTHING,
        "ffn": {"form": "adapter", "insertion": "pfeiffer", "bottleneck": 600, "scale": 1.0, "init": "bert"},
    },
    "parallel_ffn": {
        "attention": _NOTHING,
        "ffn": {"form": "adapter", "bottleneck": 1024, "scale": 1.0, "init": "bert"},
    },
    "scaled_parallel_ffn": {"attention": _NOTHING, "ffn": {"form": "adapter", "bottleneck": 512, "scale": 4.0}},
    "lora_attn": {"attention": {"form": "lora", "bottleneck": 16, "scale": 32 / 16, "dropout": 0.1}, "ffn": _NOTHING},
    "lora_ffn": {"attention": _NOTHING, "ffn": {"form": "lora", "bottleneck": 102, "scale": 32 / 102, "dropout": 0.1}},
    "prompt_tuning": {"attention": _NOTHING, "ffn": _NOTHING, "extra": "prompt_tuning"},
    "bitfit": {"attention": _NOTHING, "ffn": _NOTHING, "extra": "bitfit"},
    "prefix_parallel_ffn": {
        "attention": _PREFIX,
        "ffn": {"form": "adapter", "bottleneck": 512, "scale": 1.0, "init": "bert"},
    },
    "multihead_parallel_ffn": {
        "attention": {**_PREFIX, "form": "multihead_adapter"},
        "ffn": {"form": "adapter", "bottleneck": 512, "scale": 1.0, "init": "bert"},
    },
}


class UnifiedView(Composed):
    """Change what attentions and ffns give, in any of the forms that the paper spans."""

    slug: ClassVar[str] = "unified-view"
    title: ClassVar[str] = "Towards a Unified View of Parameter-Efficient Transfer Learning"
    paper: ClassVar[str] = "2110.04366"
    saves: ClassVar[str] = "optimiser state and checkpoint"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS  # what it reports on BART-large, where it reports it

    attention: AttentionSite = Field(AttentionSite(), description="What changes at every attention, self and cross.")
    ffn: FFNSite = Field(FFNSite(), description="What changes at every ffn.")
    extra: Literal["none", "bitfit", "prompt_tuning"] = Field(
        "none", description="The backbone's biases train too, or learned tokens stand before the text."
    )
    length: int = Field(30, ge=1, description="Tokens of `extra='prompt_tuning'`.")
    layers: Layers = layers_field()
    stack: str | None = stack_field()

    @field_validator("extra")
    @classmethod
    def changes_something(cls, extra: str, info: ValidationInfo) -> str:
        sites = [info.data[name] for name in ("attention", "ffn") if name in info.data]
        if extra == "none" and sites and all(site.form == "none" for site in sites):
            raise ValueError("nothing would change: attention, ffn and extra are all none")
        return extra

    def parts(self) -> Sequence[Method]:
        extra: dict[str, Method] = {
            "bitfit": BitFit(),
            "prompt_tuning": PromptTuning(length=self.length, init="normal", stack=self.stack),
        }
        sites = [site.part(self.layers, self.stack) for site in (self.attention, self.ffn)]
        return [part for part in (*sites, extra.get(self.extra)) if part is not None]

    def stays(self, deltas: Mapping[str, Delta]) -> Mapping[str, str]:
        why = "an adapter or a prefix is not a change of a weight"
        return {key: why for key, delta in deltas.items() if not isinstance(delta, WeightDelta)}

    def folded(self) -> Self:
        return self.model_copy(update={"attention": self.attention.model_copy(update={"reparametrisation": "none"})})
