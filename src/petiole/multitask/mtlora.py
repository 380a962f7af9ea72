"""MTLoRA: one backbone for several tasks at once, by shared and task-specific low-rank changes.  Agiza et al. 2024, arXiv 2403.20320.

In the last block of each stage, the linears after attention (its output projection o, then up and down of the ffn) have an output for
each task t beside the shared one. With h = W x + b of the shared input x, and x_t the task's own input (x itself at o):

    "matrix"     y = h + c_s B_s A_s x              y_t = h + c_t B_t A_t x_t
    "matrixv2"   the same y                         y_t = y + c_t B_t A_t x_t
    "addition"   y = h + LayerNorm(Σ_t y_t)         y_t = h + c_t B_t A_t x_t
    "lora_only"  y = h + c_s B_s A_s x              no task streams; so everywhere else, in every mode

A_s (r, in), B_s (out, r), A_t (r_t, in), B_t (out, r_t); c multiplies as it is, not divided by a rank: c = alpha / r of LoRA.

Sits     on the named linears; a task's stream begins with the shared shortcut at the block and goes through the block's own norm,
         activation and residuals, then through patch merging. It ends there: only the shared stream enters the next stage.
         `pt.streams(model)["depth"]` are a task's states by depth; a `DenseModel` reads them. `pt.given(model, task="depth")` runs that
         task alone, and the model's own head sees its stream.
Trains   A and B: r (in + out) + Σ_t r_t (in + out) for each linear with task outputs, q, k and v counting as one; besides patch
         embedding, norms but the final one, position bias tables, and patch merging. `patch_merging="lora"` is MTLoRA+: a low-rank
         change of that linear instead.
Starts   at B = 0: the shared stream is the bare backbone's, and each task's equals it. Not so in "addition", which adds LayerNorm(T h).
Merges   where no task output needs h: everything in "lora_only", `merge(partly=True)` elsewhere. `keep_task` makes a model of one task.

Relations: shared LoRA alone gives every task the same states; T separate adaptations cost T backbones at inference.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import nn

from petiole.adaptation import Adaptation
from petiole.anatomy import Anatomy, Site, Stack
from petiole.attach import refitted
from petiole.errors import AttachError, ConfigError
from petiole.method import Delta, Method, Place
from petiole.methods.adapters.tasks import owners
from petiole.methods.lowrank.factors import Factors
from petiole.multitask.branching import Fan, Tasks, branches, merging, stages
from petiole.multitask.task_linear import TaskLinear, shared_change

Mode = Literal["matrix", "matrixv2", "addition", "lora_only"]
Rank = Annotated[int, Field(ge=0)]
Scale = Annotated[float, Field(gt=0)]


class MTLoRA(Method):
    """Shared low-rank changes everywhere, and task-specific ones at the end of each stage, each with a stream of its own."""

    slug: ClassVar[str] = "mtlora"
    title: ClassVar[str] = "MTLoRA: A Low-Rank Adaptation Approach for Efficient Multi-Task Learning"
    paper: ClassVar[str] = "2403.20320"
    saves: ClassVar[str] = "most parameters, and T - 1 of T passes through the backbone"
    identity_at_start: ClassVar[bool] = True
    routes: ClassVar[bool] = False
    idles: ClassVar[str] = "what belongs to a task learns from that task's loss alone"
    size: ClassVar[str] = "rank_shared"
    learning_rates: ClassVar[tuple[float, float]] = (1e-4, 1e-2)
    exempt: ClassVar[Mapping[str, str]] = {"t5": "its decoder also attends to the encoder, which has no task streams"}

    tasks: tuple[str, ...] = Field(
        ("semseg", "normals", "saliency", "human_parts"),
        description="Names of the tasks, in order; none for shared changes alone.",
    )
    rank_shared: Rank | tuple[Rank, ...] = Field(16, description="r, at least 0; a list has one for each stage.")
    rank_task: Rank | dict[str, Rank] | tuple[Rank, ...] | None = Field(
        None, description="r_t, at least 0; by task, or a list with one for each stage; 4 if None and there are tasks."
    )
    scale_shared: Scale = Field(4.0, description="c_s, above 0.")
    scale_task: Scale | dict[str, Scale] = Field(4.0, description="c_t, above 0; one number, or by task.")
    learn_scale: bool = Field(False, description="Whether c_s and c_t train.")
    dropout: float = Field(
        0.05, ge=0, lt=1, description="On the shared input of A, in training; a task's own input is not dropped."
    )
    mode: Mode = Field("matrix", description="How a task's output comes about, see the table above.")
    roles: tuple[str, ...] = Field(
        ("q", "k", "v", "o", "up", "down"),
        min_length=1,
        description="Linears with a shared change; of a task's own: o, up, gate, down.",
    )
    stages: tuple[int, ...] | None = Field(
        None, description="Stages whose last block has task streams; every one if None."
    )
    specialised: tuple[int, ...] | None = Field(
        None,
        description="Depths of the blocks with task streams, in place of `stages`; what to name in a flat backbone.",
    )
    joint_qkv: bool = Field(
        True, description="Whether q, k and v of a block share one A, as in a backbone that has one linear for them."
    )
    patch_merging: Literal["train", "lora", "freeze"] = Field(
        "train", description="The linear between stages; 'lora' is MTLoRA+."
    )
    train_patch_embedding: bool = Field(True, description="Whether the patch embedding trains.")
    train_norms: bool = Field(True, description="Whether norms train, but for the final one.")
    train_position_bias: bool = Field(True, description="Whether tables of relative positions train.")
    stack: str | None = Field(None, description="The stack to adapt, where there are several; the main one if None.")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(set(self.tasks)) < len(self.tasks) or not all(name.isidentifier() for name in self.tasks):
            raise ValueError(f"tasks: {list(self.tasks)} must be different names, of letters, digits and _")
        if not self.tasks and self.rank_task:
            raise ValueError(f"rank_task: {self.rank_task}, but there are no tasks; name them in tasks")
        if not self.tasks and self.mode == "addition":
            raise ValueError("mode: 'addition' adds up task outputs, but there are no tasks; name them in tasks")
        for field, value in (("rank_task", self.rank_task), ("scale_task", self.scale_task)):
            if isinstance(value, dict) and set(value) != set(self.tasks):
                odd = min(set(value) ^ set(self.tasks))
                raise ValueError(
                    f"{field}: it must name just the tasks, {', '.join(self.tasks) or 'none'}; see {odd!r}"
                )
        if self.stages is not None and self.specialised is not None:
            raise ValueError("stages and specialised both say where task streams are; give one of them")
        lists = [value for value in (self.rank_shared, self.rank_task) if isinstance(value, tuple)]
        if len({len(value) for value in lists}) > 1:
            raise ValueError("rank_shared and rank_task: lists with one rank for each stage must be of equal length")
        for stage in range(len(lists[0]) if lists else 1):
            if self.tasks and not self.shared_rank(stage) and any(self.task_ranks(stage).values()):
                raise ValueError(
                    "rank_shared: 0 where rank_task is not would drop the task parts; give both, or rank_task=0"
                )
        return self

    def shared_rank(self, stage: int) -> int:
        """r of a stage."""
        return self.rank_shared[stage] if isinstance(self.rank_shared, tuple) else self.rank_shared

    def task_ranks(self, stage: int) -> dict[str, int]:
        """r_t of a stage by task; empty where there are no task streams."""
        if self.mode == "lora_only":
            return {}
        rank = 4 if self.rank_task is None else self.rank_task
        if isinstance(rank, tuple):
            rank = rank[stage]
        ranks = rank if isinstance(rank, dict) else dict.fromkeys(self.tasks, rank)
        return {task: ranks[task] for task in self.tasks} if any(ranks.values()) else {}

    def task_scale(self, task: str) -> float:
        """c_t"""
        return self.scale_task[task] if isinstance(self.scale_task, dict) else self.scale_task

    # ---- what sits where

    def deltas(self, anatomy: Anatomy) -> Iterator[Place]:
        stack = anatomy.stack(self.stack)
        depths = self.forks(stack)
        stage_of = {block.depth: i for i, blocks in enumerate(stages(stack)) for block in blocks}
        tasks = Tasks(self.tasks, together=self.mode == "addition")

        def fan(site: Site, opens: bool) -> Fan:
            stage = stage_of[site.depth]
            own = site.role in self.roles
            return (
                TaskLinear(self, site, tasks, self.shared_rank(stage), self.task_ranks(stage), opens)
                if own
                else Fan(tasks, opens)
            )

        taken = set()
        for place in branches(self.slug, anatomy, stack, depths, tasks, fan):
            taken |= {place.site.key} if isinstance(place.delta, Fan) else set()
            yield place
        for site in anatomy.sites(self.roles, stack=stack.name):
            rank = self.shared_rank(stage_of[site.depth]) if site.depth >= 0 else 0
            if site.kind != "linear" or site.depth < 0:
                raise AttachError(
                    f"{self.slug}: {site.key} is a {site.kind} or outside the blocks; it is defined for their linears"
                )
            if rank and site.key not in taken:
                yield Place(site, shared_change(self, site, rank))
        for before, site in self.reductions(anatomy, stack) if self.patch_merging == "lora" else ():
            if rank := self.shared_rank(before):
                yield Place(site, shared_change(self, site, rank))

    def forks(self, stack: Stack) -> list[int]:
        """Depths of the blocks with task streams.

        Raises:
            ConfigError: a stage or depth is out of range, or a list of ranks is of another length than there are stages.
        """
        by_stage = stages(stack)
        for field, value in (("rank_shared", self.rank_shared), ("rank_task", self.rank_task)):
            if isinstance(value, tuple) and len(value) != len(by_stage):
                raise ConfigError(
                    f"MTLoRA.{field} = {value}: {stack.name!r} has {len(by_stage)} stages; give one rank for each"
                )
        for field, chosen, count in (
            ("stages", self.stages, len(by_stage)),
            ("specialised", self.specialised, len(stack.blocks)),
        ):
            if wrong := [n for n in chosen or () if not -count <= n < count]:
                raise ConfigError(
                    f"MTLoRA.{field} = {chosen}: {wrong[0]} is out of range; {stack.name!r} has {count}, from 0 or from -1"
                )
        if self.specialised is not None:
            found = sorted({depth % len(stack.blocks) for depth in self.specialised})
        else:
            wanted = range(len(by_stage)) if self.stages is None else {stage % len(by_stage) for stage in self.stages}
            found = [by_stage[stage][-1].depth for stage in sorted(wanted)]
        stage_of = {block.depth: i for i, blocks in enumerate(by_stage) for block in blocks}
        return [depth for depth in found if self.task_ranks(stage_of[depth])]

    def reductions(self, anatomy: Anatomy, stack: Stack) -> Iterator[tuple[int, Site]]:
        """The linears of patch merging, each with the number of the stage before it."""
        by_stage = stages(stack)
        for i, (before, after) in enumerate(pairwise(by_stage)):
            site = merging(anatomy, stack, before[-1], after[0])
            if site is not None:
                yield i, site

    def bind(self, deltas: Mapping[str, Delta], shared: nn.Module | None) -> None:
        first: dict[str, Factors] = {}
        for key, delta in deltas.items():
            block, _, role = key.rpartition(".")[0].rpartition(".")
            if self.joint_qkv and role in ("q", "k", "v") and isinstance(delta, Factors):
                delta.A = first.setdefault(block, delta).A

    def trains(self, anatomy: Anatomy, model: nn.Module) -> Iterable[str]:
        own = getattr(model, "tasks", None)  # of a model that has a head for each
        if isinstance(own, tuple) and (unknown := [task for task in self.tasks if task not in own]):
            raise ConfigError(f"MTLoRA.tasks: {unknown[0]!r} is none of the model's tasks: {', '.join(own)}")
        stack = anatomy.stack(self.stack)
        order = {path: i for i, (path, _) in enumerate(model.named_modules())}
        last = order[stack.blocks[-1].path]
        chosen = [s for s in anatomy.outside if s.role == "patch_embedding" and self.train_patch_embedding]
        if self.train_norms:
            inside = [s for block in stack.blocks for s in block.sites]
            around = [s for s in anatomy.outside if s.path in order and order[s.path] < last]
            chosen += [s for s in (*inside, *around) if s.role == "norm"]
        if self.patch_merging == "train":
            chosen += [site for _, site in self.reductions(anatomy, stack)]
        for path in dict.fromkeys(site.path for site in chosen):
            yield from (f"{path}.{name}" for name, _ in model.get_submodule(path).named_parameters(recurse=False))
        if self.train_position_bias:
            inside_blocks = tuple(f"{block.path}." for block in stack.blocks)
            for name, _ in model.named_parameters():
                if name.startswith(inside_blocks) and "relative" in name and "bias" in name:
                    yield name

    def stays(self, deltas: Mapping[str, Delta]) -> Mapping[str, str]:
        return {key: "task outputs need its own h" for key, delta in deltas.items() if not isinstance(delta, Factors)}


# ------------------------------------------------------------------------------------------------------------------------ one task


def keep_task(tuned: Adaptation, task: str) -> Adaptation:
    """Leave one task's streams alone, IN PLACE, for a model that is to serve this task; the shared changes stay as they are.

    `keep_task(tuned, "depth").merge(partly=True)` then folds all that needs not stay apart into the weights.

    Raises:
        ConfigError: none of the methods has this task.
        AttachError: it is merged, or not attached.
    """
    chosen = owners(tuned, task, MTLoRA)

    def alone(method: MTLoRA) -> MTLoRA:
        if method.mode == "addition" and len(method.tasks) > 1:
            raise AttachError(
                "mtlora in mode 'addition' has a shared stream made of all tasks, so none can be left out"
            )
        fields = {
            name: {task: value[task]}
            for name in ("rank_task", "scale_task")
            if isinstance(value := getattr(method, name), dict)
        }
        return type(method)(**{**method.model_dump(), **fields, "tasks": (task,)})

    return refitted(tuned, [alone(chosen[i]) if i in chosen else m for i, m in enumerate(tuned.methods)], {})
