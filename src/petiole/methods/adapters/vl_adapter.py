"""VL-Adapter: adapters for several vision-and-language tasks on one language model.  Sung et al. 2021, arXiv 2112.06825.

    adapter        h <- h + W_up φ( W_down h + b_down ) + b_up     both halves of each task's own, or one of them shared, or both
    compacter      the same, with matrices of Kronecker products   `compacter`
    hyperformer    the same, with weights that a network writes    `hyperformer`
    lora, prompt   what they are compared with                     q and v of every attention, and all biases; vectors before the encoder

h is the output of an attention (self or cross) or of an ffn, before dropout, residual and norm; φ is GELU by tanh, r = d / ρ. A batch is of
one task, `with pt.given(model, task="vqa")`, or each row is of its own, `task=["vqa", "gqa", …]`; where all is shared none has to be given.
Over several processes a step is of the same task in all of them.

Sits     at 12 + 18 places of BART-base: after self-attention and ffn, and cross-attention in the decoder.
Trains   2 d r + r + d numbers per site, of each task or shared; all norms with adapters, all biases with LoRA; and what the model has of
         the task's own, such as a visual embedding.
Starts   near the backbone: projections start as torch's linears do. With W_up = 0 it is the backbone.
Merges   LoRA does, of one task: `with pt.given(model, task="vqa"): tuned.merge()`. Others not; `materialise(tuned, "vqa")` leaves one task's
         ordinary adapters, without hypernetworks or products.

`VLAdapter.preset(name, tasks=…)` gives the paper's settings. It trains with AdamW, 10 % of the steps to warm up, clipping at 5, and a
learning rate of 1e-3 (multiple adapters 3e-4; on videos 3e-4). The best of them, one adapter for all tasks, wants the task's name in the
text itself ("vqa: what is …?").

Relations: `houlsby` is the form "adapter" for one task, without norms. `mtlora` runs all tasks in one pass over dense predictions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from petiole.adaptation import Adaptation
from petiole.attach import refitted
from petiole.errors import ConfigError
from petiole.method import Config, Delta, Method
from petiole.methods.adapters.compacter import Compacter, PHMFields
from petiole.methods.adapters.composed import Composed
from petiole.methods.adapters.hyperformer import Hyperformer, HypernetworkFields
from petiole.methods.adapters.multitask import SHARING, SharedAdapters, Sharing, TaskAdapters
from petiole.methods.adapters.task_baselines import LoRAFields, PromptFields, TaskLoRA, TaskPrompt
from petiole.methods.adapters.tasks import alone, owners

Form = Literal["adapter", "hyperformer", "compacter", "lora", "prompt"]
FORMS: dict[str, type[Method]] = {
    "adapter": SharedAdapters,
    "hyperformer": Hyperformer,
    "compacter": Compacter,
    "lora": TaskLoRA,
    "prompt": TaskPrompt,
}


class FormFields(Config):
    """Which form, and what its tasks share."""

    form: Form = Field("adapter", description="What a task's change is; the other fields are of one form or another.")
    sharing: Sharing | None = Field(
        None, description=f"{SHARING} LoRA and prompts are single or multiple. None is single."
    )


class VLAdapter(PromptFields, LoRAFields, PHMFields, HypernetworkFields, Composed, TaskAdapters, FormFields):
    """Adapters of several tasks, in every way of sharing them."""

    slug: ClassVar[str] = "vl-adapter"
    title: ClassVar[str] = "VL-Adapter: Parameter-Efficient Transfer Learning for Vision-and-Language Tasks"
    paper: ClassVar[str] = "2112.06825"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "single_adapter": {},
        "multiple_adapters": {"sharing": "multiple"},
        "half_shared_down": {"sharing": "half_down"},
        "half_shared_up": {"sharing": "half_up"},
        "hyperformer": {"form": "hyperformer"},
        "single_compacter": {"form": "compacter"},
        "multiple_compacter": {"form": "compacter", "sharing": "multiple"},
        "single_lora": {"form": "lora"},
        "multiple_lora": {"form": "lora", "sharing": "multiple"},
        "single_prompt": {"form": "prompt"},
        "multiple_prompt": {"form": "prompt", "sharing": "multiple"},
    }

    @model_validator(mode="after")
    def of_its_form(self) -> Self:
        kind = FORMS[self.form]
        for name, info in type(self).model_fields.items():
            if name not in ("form", *kind.model_fields) and getattr(self, name) != info.default:
                raise ConfigError(
                    f"VLAdapter.{name} = {getattr(self, name)!r}: form={self.form!r} has no {name}; it has {', '.join(kind.model_fields)}"
                )
        if self.form in ("lora", "prompt") and self.sharing in ("half_down", "half_up"):
            raise ConfigError(
                f"VLAdapter.sharing = {self.sharing!r}: form={self.form!r} has no halves: single or multiple"
            )
        return self

    def parts(self) -> Sequence[Method]:
        kind = FORMS[self.form]
        fields = {name: getattr(self, name) for name in kind.model_fields}
        return [kind(**{name: value for name, value in fields.items() if name != "sharing" or value is not None})]

    def stays(self, deltas: Mapping[str, Delta]) -> Mapping[str, str]:
        return self.parts()[0].stays(deltas)

    def folded(self) -> Self:
        return self.model_copy(update={"reparametrisation": "none"}) if self.form == "prompt" else self


def ordinary(method: VLAdapter | Hyperformer | Compacter, task: str) -> VLAdapter:
    """The configuration of one task's ordinary adapters; of its LoRA, or of its prompt as it is."""
    form = method.form if isinstance(method, VLAdapter) and method.form in ("lora", "prompt") else "adapter"
    fields = {name: getattr(method, name) for name in FORMS[form].model_fields if name != "sharing"}
    plain = {"reparametrisation": "none"} if form == "prompt" else {}
    return VLAdapter(**{**fields, **plain, "form": form, "tasks": (task,)})


def materialise(tuned: Adaptation, task: str) -> Adaptation:
    """Leave one task's ordinary adapters, IN PLACE: weights written by hypernetworks or put together by products are made once for all.

    For serving, and for files that hold one task alone. LoRA and prompts of several tasks become those of one, too.

    Returns:
        The new handle, of the same name. Copy the model first to keep the tasks together.

    Raises:
        ConfigError: none of the methods has this task.
        AttachError: it is merged.
    """
    chosen = owners(tuned, task, VLAdapter, Hyperformer, Compacter)
    methods = [ordinary(chosen[i], task) if i in chosen else method for i, method in enumerate(tuned.methods)]
    return refitted(tuned, methods, alone(tuned, task, chosen))
