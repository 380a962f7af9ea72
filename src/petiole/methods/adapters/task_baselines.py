"""What adapters of several tasks are compared with: LoRA and prompts, one for all tasks or one for each.

    LoRA      W x + b  <-  W x + b + s B A x, at q and v of every attention, s = alpha / r; all biases of the model train too
    prompt    [P, x_1 … x_T] in the encoder, P = tanh( E W₁ + b₁ ) W₂ + b₂;  E (l, d), W₁ (d, m), W₂ (m, d)

The network of a prompt serves training alone: a file holds P, unless the whole of a run is to be kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from petiole.anatomy import Anatomy, Site
from petiole.errors import AttachError
from petiole.factored import Parts
from petiole.method import Base, Config, Layers, Method, Place, TokenDelta, WeightDelta, layers_field, stack_field
from petiole.methods.adapters.tasks import SHARED, Asked, TaskNames, asked, by_task, each, of, tasks_field
from petiole.methods.full.names import biases
from petiole.methods.lowrank.factors import Factors, kaiming_uniform
from petiole.methods.prompts.kept import Kept
from petiole.methods.prompts.prompt import text_input, whole

Owners = Literal["multiple", "single"]


class LoRAFields(Config):
    """The fields of LoRA as a baseline."""

    rank: int = Field(128, ge=1, description="r: inner width of the factors of LoRA.")
    alpha: float = Field(32.0, gt=0, description="Of LoRA: numerator of the scaling alpha / rank.")


class PromptFields(Config):
    """The fields of a prompt as a baseline."""

    length: int = Field(40, ge=1, description="Vectors of a prompt.")
    hidden_size: int = Field(800, ge=1, description="m: inner width of the network that gives a prompt.")
    reparametrisation: Literal["mlp", "none"] = Field(
        "mlp", description="Of a prompt: through that network, which is folded away on save, or as it is."
    )


# ---------------------------------------------------------------------------------------------------------------------------- LoRA


class TaskLoRA(LoRAFields, Method):
    """LoRA on the queries and values of every attention, and all biases."""

    merges: ClassVar[bool] = True

    tasks: TaskNames = tasks_field()
    sharing: Owners = "single"
    layers: Layers = layers_field()
    stack: str | None = stack_field()

    def deltas(self, anatomy: Anatomy) -> Iterator[Place]:
        for site in anatomy.sites(["q", "v"], self.layers, self.stack):
            yield Place(site, TaskFactors(site, self))

    def trains(self, anatomy: Anatomy, model: nn.Module) -> Iterable[str]:
        return biases(anatomy, model)


class TaskFactors(WeightDelta):
    """ΔW = s · B A of the row's task

    Args:
        site: gives the sizes. method: r, s and the tasks.
    """

    def __init__(self, site: Site, method: TaskLoRA) -> None:
        super().__init__()
        self.key, self.tasks = site.key, method.tasks
        owners = method.tasks if method.sharing == "multiple" else (SHARED,)
        self.factors = nn.ModuleDict({o: Factors(site, method.rank, method.alpha / method.rank) for o in owners})

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        for factors in self.factors.values():
            factors.initialise(generator, base)  # type: ignore[operator]

    def asked(self) -> Asked:
        return asked(self.host, self.tasks, alike=SHARED in self.factors)

    def one(self) -> Factors:
        """The factors of all rows.

        Raises:
            AttachError: rows are of several tasks.
        """
        task = self.asked()
        if not isinstance(task, str):
            raise AttachError(f"{self.key}: its rows are of several tasks, so there is no one change of the weight")
        found: Factors = of(self.factors, task)
        return found

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """x (..., in) -> Δy (..., out)"""
        return by_task(x, self.asked(), lambda own, task: of(self.factors, task)(own, base))

    def factored(self) -> Parts | None:
        return self.one().factored() if isinstance(self.asked(), str) else None

    def weight(self, base: Tensor) -> Tensor:
        """ΔW (out, in)"""
        return self.one().weight(base)

    def of_task(self, task: str) -> dict[str, Tensor]:
        """The state of this delta with the factors of one task alone."""
        return {f"factors.{SHARED}.{name}": value for name, value in of(self.factors, task).state_dict().items()}


# -------------------------------------------------------------------------------------------------------------------------- prompt


class TaskPrompt(PromptFields, Method):
    """Vectors before the tokens of the encoder."""

    tasks: TaskNames = tasks_field()
    sharing: Owners = "single"
    stack: str | None = stack_field()

    def deltas(self, anatomy: Anatomy) -> Iterator[Place]:
        stack, embedding = text_input("vl-adapter", anatomy, self.stack)
        yield Place(whole(stack.blocks[0]), TaskTokens(self, embedding.out_features))

    def folded(self) -> Self:
        return self.model_copy(update={"reparametrisation": "none"})


class TaskTokens(TokenDelta):
    """P (l, d) of the row's task, in front

    Args:
        method: l, m and the tasks. size: d.
    """

    def __init__(self, method: TaskPrompt, size: int) -> None:
        super().__init__()
        self.length, self.tasks = method.length, method.tasks
        owners = method.tasks if method.sharing == "multiple" else (SHARED,)
        inner = method.hidden_size if method.reparametrisation == "mlp" else None
        self.prompts = nn.ModuleDict({owner: PromptNetwork(method.length, size, inner) for owner in owners})

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        for prompt in self.prompts.values():
            prompt.initialise(generator)  # type: ignore[operator]

    def forward(self, batch: int) -> Tensor:
        """-> (batch, l, d)"""
        task = asked(self.host, self.tasks, alike=SHARED in self.prompts)
        if isinstance(task, str):
            shared: Tensor = of(self.prompts, task)()
            return shared.expand(batch, -1, -1)
        tokens = {name: self.prompts[name]() for name in set(task)}
        return torch.stack([tokens[name] for name in task]).repeat_interleave(each(batch, task), 0)

    def folded_state(self) -> dict[str, Tensor]:
        with torch.no_grad():
            return {f"prompts.{owner}.tokens": prompt() for owner, prompt in self.prompts.items()}

    @torch.no_grad()
    def of_task(self, task: str) -> dict[str, Tensor]:
        """The state of this delta with the folded prompt of one task alone."""
        return {f"prompts.{SHARED}.tokens": of(self.prompts, task)()}


class PromptNetwork(nn.Module):
    """() -> P (l, d)

    Args:
        length: l. size: d. inner: m, or None where P trains as it is.
    """

    def __init__(self, length: int, size: int, inner: int | None) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(length, size))  # P, or E
        self.enter = None if inner is None else nn.Linear(size, inner)
        self.leave = None if inner is None else nn.Linear(inner, size)
        self.kept = Kept()

    def initialise(self, generator: torch.Generator) -> None:
        """As torch starts an embedding and linears."""
        self.tokens.normal_(generator=generator)
        for layer in (self.enter, self.leave):
            if layer is not None:
                for parameter in layer.parameters():
                    kaiming_uniform(parameter, generator, fan_in=layer.in_features)

    def forward(self) -> Tensor:
        enter, leave = self.enter, self.leave
        if enter is None or leave is None:
            return self.tokens
        return self.kept([*self.parameters()], lambda: leave(torch.tanh(enter(self.tokens))))
