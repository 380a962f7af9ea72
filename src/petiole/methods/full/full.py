"""Full fine-tuning, linear probe, BitFit and norm tuning: the baselines that add nothing and train what is there.

    θ_S  <-  θ_S - η ∇θ_S        S: all parameters; none but the head; the biases; the norms

Trains   in place. The original values are kept beside, so that `detach` and `disabled` give the bare backbone back.
Starts   at the backbone itself. Nothing to merge: the weights are the model's own (`merge` keeps them on detach).
BitFit: Ben Zaken et al. 2021, arXiv 2106.10199. Norm tuning: Frankle et al. 2020, arXiv 2003.00152; Basu et al. 2023, arXiv 2304.03922.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar

from pydantic import Field
from torch import nn
from torch.nn.modules.conv import _ConvNd

from petiole.anatomy import Anatomy
from petiole.errors import AttachError
from petiole.method import Delta, Method, Place
from petiole.methods.full.names import biases, final_norms, norms
from petiole.methods.prompts.pooled import Own, pooled

_UNUSED = "some backbones hold parameters that their forward pass does not use"


class FullFineTuning(Method):
    """Train every parameter."""

    slug: ClassVar[str] = "full"
    title: ClassVar[str] = "full fine-tuning"
    saves: ClassVar[str] = "nothing: what the others are measured against"
    merges: ClassVar[bool] = True
    identity_at_start: ClassVar[bool] = True
    routes: ClassVar[bool] = False
    idles: ClassVar[str] = _UNUSED
    learning_rates: ClassVar[tuple[float, float]] = (1e-5, 1e-3)

    def trains(self, anatomy: Anatomy, model: nn.Module) -> Iterable[str]:
        return (n for n, _ in model.named_parameters() if not any(part.startswith("petiole") for part in n.split(".")))


class LinearProbe(Method):
    """Train the task head alone."""

    slug: ClassVar[str] = "linear-probe"
    title: ClassVar[str] = "linear probe"
    saves: ClassVar[str] = "gradients, optimiser state and activations: nothing is back-propagated"
    merges: ClassVar[bool] = True
    identity_at_start: ClassVar[bool] = True
    exempt: ClassVar[Mapping[str, str]] = dict.fromkeys(("llama", "gpt2", "t5"), "a language model has no task head")
    learning_rates: ClassVar[tuple[float, float]] = (1e-3, 1e-1)

    final_norm: bool = Field(False, description="Train the norm behind the last block, too.")
    pool: Own = Field(
        "model", description="Tokens whose mean the head reads: those the model chooses, all, the class token, patches."
    )

    def trains(self, anatomy: Anatomy, model: nn.Module) -> Iterable[str]:
        if not anatomy.heads():
            raise AttachError(
                f"linear-probe: {anatomy.model_class} has no task head (a language-model head is none); bitfit or lora may fit"
            )
        return final_norms(anatomy, model, [anatomy.stack().name]) if self.final_norm else ()

    def overrides(self, event: str) -> bool:
        return super().overrides(event) and (event != "deltas_on" or self.pool != "model")

    def deltas_on(self, anatomy: Anatomy, model: nn.Module) -> Iterator[Place]:
        if self.pool != "model":
            yield pooled(self.pool, anatomy, anatomy.stack(), model)

    def stays(self, deltas: Mapping[str, Delta]) -> Mapping[str, str]:
        return dict.fromkeys(deltas, "which tokens a head reads is not a change of a weight")


class BitFit(Method):
    """Train the biases."""

    slug: ClassVar[str] = "bitfit"
    title: ClassVar[str] = "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models"
    paper: ClassVar[str] = "2106.10199"
    saves: ClassVar[str] = "nearly all parameters; free at inference"
    merges: ClassVar[bool] = True
    identity_at_start: ClassVar[bool] = True
    routes: ClassVar[bool] = False
    exempt: ClassVar[Mapping[str, str]] = dict.fromkeys(("llama", "t5"), "it has no biases")
    idles: ClassVar[str] = _UNUSED
    learning_rates: ClassVar[tuple[float, float]] = (3e-4, 3e-2)

    norms: bool = Field(True, description="Whether the biases of normalisation layers train too.")
    convolutions: bool = Field(True, description="Whether those of convolutions do, as of a patch embedding.")

    def trains(self, anatomy: Anatomy, model: nn.Module) -> Iterable[str]:
        of_norms = set() if self.norms else set(norms(anatomy, model))
        names = [name for name in biases(anatomy, model) if name not in of_norms]
        if not self.convolutions:
            names = [n for n in names if not isinstance(model.get_submodule(n.rpartition(".")[0]), _ConvNd)]
        if not names:
            raise AttachError(f"bitfit: {anatomy.model_class} has no biases; norm-tuning or lora may fit")
        return names


class NormTuning(Method):
    """Train weight and bias of the normalisation layers."""

    slug: ClassVar[str] = "norm-tuning"
    title: ClassVar[str] = "Training BatchNorm and Only BatchNorm"
    paper: ClassVar[str] = "2003.00152"
    saves: ClassVar[str] = "nearly all parameters; free at inference"
    merges: ClassVar[bool] = True
    identity_at_start: ClassVar[bool] = True
    routes: ClassVar[bool] = False
    idles: ClassVar[str] = _UNUSED
    learning_rates: ClassVar[tuple[float, float]] = (3e-4, 3e-2)

    def trains(self, anatomy: Anatomy, model: nn.Module) -> Iterable[str]:
        names = list(norms(anatomy, model))
        if not names:
            raise AttachError(f"norm-tuning: {anatomy.model_class} has no normalisation layer with parameters")
        return names
