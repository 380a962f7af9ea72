"""LT-SFT: composable sparse fine-tuning, found as a lottery ticket.  Ansell et al. 2021, arXiv 2110.07560; as rankers arXiv 2204.02292.

    θ = θ₀ + Δ        1. every maskable entry trains: θ₁.  2. the mask is the k entries of largest |θ₁ - θ₀|, over all tensors together.
                      3. back to θ₀.  4. the masked entries train: θ₂.  Δ = θ₂ - θ₀, with k entries that are not 0

Sits     at the embeddings, the weights and biases of blocks and the pooler; norms, heads and a language model's output are left out.
Trains   N numbers in the first phase and k in the second, which are a vector of their own: 16 k bytes with AdamW, not 16 N.
Starts   at Δ = 0: the bare backbone, bit for bit.
Merges   exactly; masks add up, so that several compose: θ₀ + Δ_task + Δ_language.

The first `first_phase` of a run is the first phase. With `first_phase=None` phases are changed by hand, each with an optimiser of its own:
train, `next_phase(tuned)`, train again. With m `iterations` both phases come m times; each adds k/m entries and goes back to where it
began. Weight decay acts on Δ, never on θ, and in the second phase not at all. A file holds flat indices (the reference's steps) and values,
without those of at most 1e-7, and a digest of each tensor of θ₀: no other backbone takes it. The head trains densely.

Relations: `full` trains and stores everything; `lora` of as many numbers does not add up as cleanly, but never trains N.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from petiole.adaptation import Adaptation
from petiole.anatomy import Anatomy
from petiole.attach import forget_compiled
from petiole.errors import AttachError
from petiole.method import Delta, Layers, Method, Moment, Place, layers_field
from petiole.methods.sparse.entries import Entries, SparseChange
from petiole.methods.sparse.selection import largest
from petiole.methods.sparse.tensors import changes

Maskable = Literal["embeddings", "weights", "biases", "pooler"]


class LTSFT(Method):
    """Train the k entries that full fine-tuning moved most."""

    slug: ClassVar[str] = "lt-sft"
    title: ClassVar[str] = "Composable Sparse Fine-Tuning for Cross-Lingual Transfer"
    paper: ClassVar[str] = "2110.07560"
    saves: ClassVar[str] = "checkpoint; optimiser state in the second phase; free at inference, and masks add up"
    merges: ClassVar[bool] = True
    identity_at_start: ClassVar[bool] = True
    routes: ClassVar[bool] = False
    idles: ClassVar[str] = (
        "some backbones hold parameters that their forward pass does not use, and a tensor may have no masked entry"
    )
    learning_rates: ClassVar[tuple[float, float]] = (1e-5, 1e-3)

    k: int | None = Field(None, ge=1, description="Entries of the mask, over all tensors; by `density` if None.")
    density: float = Field(0.05, gt=0, le=1, description="Share of the maskable entries, where `k` does not say.")
    maskable: tuple[Maskable, ...] = Field(
        ("embeddings", "weights", "biases", "pooler"),
        min_length=1,
        description="What may change: embeddings (all outside of blocks), weights and biases of blocks, the pooler.",
    )
    first_phase: float | None = Field(
        0.5, gt=0, lt=1, description="Share of a run (of each iteration) in which every entry trains; None: by hand."
    )
    iterations: int = Field(1, ge=1, description="How often both phases come; each finds its share of the k entries.")
    warmup_steps: int | None = Field(
        None, ge=0, description="Of the second phase's own learning rate, which then falls to 0; None for the run's."
    )
    l1_weight: float = Field(0.0, ge=0, description="λ of the pull λ Σ|θ - θ₀| / (number of parameters) to θ₀.")
    layers: Layers = layers_field()

    def deltas_on(self, anatomy: Anatomy, model: nn.Module) -> Iterator[Place]:
        places = list(changes(self.slug, anatomy, model, self.maskable, self.layers))
        count = sum(each.parameter.numel() for place in places for each in tensors_of([place.delta]))
        if not self.iterations <= self.wanted(count) <= count:
            raise AttachError(
                f"lt-sft: a mask of k = {self.wanted(count):,} entries in {self.iterations} iterations\n"
                f"k is from {self.iterations} to {count:,}, which is what may change of {', '.join(self.maskable)}"
            )
        yield from places

    def wanted(self, count: int) -> int:
        """How many of `count` entries the mask has in the end."""
        return self.k if self.k is not None else max(1, round(self.density * count))

    # ---- over time

    def before_step(self, moment: Moment) -> None:
        if self.first_phase is None or not moment.total_steps:
            return
        done = moment.step * self.iterations / moment.total_steps
        due = 2 * int(done) + (done % 1 >= self.first_phase)
        while moment.state.get("phase", 0) < due:
            self.turn(moment)

    def turn(self, moment: Moment) -> None:
        """From finding entries to training them, or on to finding more."""
        tensors = tensors_of(moment.deltas.values())
        before = [each.parameter for each in tensors]
        phase = moment.state["phase"] = moment.state.get("phase", 0) + 1
        if phase % 2:
            self.choose(tensors, (phase + 1) // 2)
        else:
            for each in tensors:
                each.open()
        moment.drop_parameters(before)
        after = [each.parameter for each in tensors if each.parameter.requires_grad]
        moment.add_parameters(after, warmup_steps=self.warmup_steps if phase % 2 else None)

    def choose(self, tensors: Sequence[Entries], iteration: int) -> None:
        """Add the entries that moved most to the mask, and go back to where the iteration began."""
        wanted = self.wanted(sum(each.parameter.numel() for each in tensors)) * iteration // self.iterations
        before = [each.chosen() for each in tensors]
        taken = [index for index, _ in before]
        k = wanted - sum(index.numel() for index in taken)
        found = largest([each.parameter for each in tensors], k, taken)
        for each, (old, values), new in zip(tensors, before, found, strict=True):
            index, order = torch.cat([old, new]).sort()
            each.mask(index, torch.cat([values, values.new_zeros(len(new))])[order])

    def loss(self, moment: Moment) -> Tensor | None:
        if not self.l1_weight:
            return None
        total = sum(p.numel() for n, p in moment.model.named_parameters() if "petiole" not in n)
        pulls = [each.parameter.abs().sum() for each in tensors_of(moment.deltas.values())]
        return self.l1_weight / total * torch.stack([pull.to(pulls[0].device) for pull in pulls]).sum()


def tensors_of(deltas: Iterable[Delta]) -> list[Entries]:
    """The changes of all tensors, in the model's order."""
    return [entries for delta in deltas if isinstance(delta, SparseChange) for _, entries in delta.entries()]


def next_phase(tuned: Adaptation) -> None:
    """Choose the mask and go back to the start, or on to the next iteration, IN PLACE. The next phase needs a new optimiser.

    Raises:
        AttachError: the adaptation is no sparse fine-tuning, or the last phase is over.
    """
    numbers = [number for number, method in enumerate(tuned.methods) if isinstance(method, LTSFT)]
    if not numbers:
        raise AttachError(f"{tuned.name!r} was not made by lt-sft")
    for number in numbers:
        method, moment = tuned.methods[number], tuned.moment(number)
        assert isinstance(method, LTSFT)
        if moment.state.get("phase", 0) >= 2 * method.iterations - 1:
            raise AttachError(f"{tuned.name!r} is in the last phase of {method.iterations} iterations; train, and save")
        method.turn(moment)
    forget_compiled()
