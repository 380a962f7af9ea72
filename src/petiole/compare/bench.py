"""Where trials run: data and backbone loaded once, a fresh copy of the backbone for every trial, every fault turned into a reason."""

from __future__ import annotations

import copy
import gc
import hashlib
import platform
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from petiole import files
from petiole.anatomy import anatomy
from petiole.attach import HEAD, attach, head_names, plan
from petiole.compare.contenders import Contender, fitting
from petiole.compare.forgetting import Forgetting
from petiole.compare.jobs import Facts, Job
from petiole.compare.results import Trial, file_of
from petiole.compare.search import Proposal
from petiole.compare.settings import SEARCH_SEED, Settings, digest, sample
from petiole.errors import FileError, PetioleError
from petiole.tune import Course, OnStep, measured, train

if TYPE_CHECKING:
    from petiole.adaptation import Adaptation

TIMED = 10  # steps of the training that times a step


class Changed(PetioleError):
    """The one copy of the backbone is not what it was: results would depend on the order of trials."""


class Bench:
    """Loads data and backbone; runs trials.

    Args:
        settings: of the comparison.
        folder: where adaptations are written.
    """

    def __init__(self, settings: Settings, folder: Path) -> None:
        from petiole.tasks import load_data, prepare

        self.settings, self.folder = settings, folder
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        limit = dict(settings.limit) or None
        self.data = load_data(
            settings.data, task=settings.task, limit=limit, columns=settings.columns or None, test_fraction=0.2
        )
        options: dict[str, Any] = {"max_length": settings.max_length} if settings.max_length is not None else {}
        if settings.metric is not None:
            options["main_metric"] = settings.metric
        self.task = prepare(self.data, settings.model, **options)
        self.backbone = self.task.build_model(seed=SEARCH_SEED).requires_grad_(False)
        self.anatomy = anatomy(self.backbone)
        self.mark = files.fingerprint(self.backbone)
        self.recipe = settings.recipe
        self.steps = self.recipe.total_steps(len(self.task.encoded("train")))
        self.forgetting = Forgetting(settings, self.device) if settings.forgetting is not None else None
        self._heads: dict[int, dict[str, Tensor]] = {}

    # ---- sameness

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What every trial here depends on."""
        import transformers

        from petiole import __version__

        return self.settings.identity(
            model=f"{type(self.backbone).__name__} {digest(self.mark)}",
            data=f"{self.task.name} {digest({name: sample(rows) for name, rows in [*self.data.splits.items(), *self.data.tables.items()]})}",
            versions={"petiole": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
            device=self.device_name,
            forgetting_data=self.forgetting.digest if self.forgetting is not None else None,
            total_steps=self.steps,
        )

    @property
    def device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{platform.machine()} CPU, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() != 1)}"

    def facts(self, rows: Sequence[Contender]) -> Facts:
        """What holds for all trials, and which rows this backbone has no place for."""
        unfit = {row.label: " ".join(why.split()) for row, why in fitting(rows, self.backbone, self.anatomy) if why}
        return Facts(
            identity=self.identity,
            unfit=unfit,
            file_bytes={row.label: self.file_bytes(row) for row in rows if row.trains and row.label not in unfit},
            metric=self.task.main_metric,
            steps=self.steps,
            device=self.device.type,
            about={
                "model": self.settings.model,
                "class": type(self.backbone).__name__,
                "data": str(self.data).splitlines()[0],
                "steps": self.steps,
                "forgetting": self.forgetting.description if self.forgetting else None,
                "forgetting_before": self.forgetting.before if self.forgetting else None,
            },
            notes=[*self.data.notes, *self.task.notes],
        )

    def file_bytes(self, contender: Contender) -> int:
        """Bytes of a row's file, counted without any weight and without an event of its methods; 0 where that can't be done."""
        sizes = contender.sizes if self.settings.size_search else ()
        try:
            model = self.task.empty_model()
            made = plan(model, contender.sized(max(sizes, default=None)), anatomy(model), SEARCH_SEED, None)
        except (PetioleError, RuntimeError):
            return 0
        added = [place.delta for _, place in made.places] + list(made.shared.values())
        own = model.state_dict()
        tensors = [t for module in added for t in (*module.parameters(), *module.buffers())]
        return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values()) + sum(
            own[name].numel() * own[name].element_size() for name in made.trained if name in own
        )

    # ---- backbones

    def fresh(self, seed: int) -> nn.Module:
        """A copy of the backbone, its task head drawn from `seed` where it is a new one.

        Raises:
            Changed: the copy in memory has been written to.
        """
        if files.fingerprint(self.backbone) != self.mark:
            raise Changed("a trial has changed the backbone that all trials share; no result after it would be fair")
        model = copy.deepcopy(self.backbone)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in self.head(seed).items():
                parameters[name].copy_(value)
        return model.to(self.device)

    def head(self, seed: int) -> dict[str, Tensor]:
        """The tensors of the head that differ with the seed; none where the checkpoint's head is kept."""
        if seed == SEARCH_SEED or any(not head for head in self._heads.values()):
            return {}
        if seed not in self._heads:
            names = head_names(self.backbone, self.anatomy)
            own, other = (dict(model.named_parameters()) for model in (self.backbone, self.task.build_model(seed=seed)))
            drawn = {
                n: other[n].detach().clone() for n in sorted(names & set(own)) if not torch.equal(own[n], other[n])
            }
            self._heads[seed] = drawn
        return self._heads[seed]

    def attached(self, contender: Contender, seed: int, size: int | None = None) -> Adaptation:
        return attach(self.fresh(seed), contender.sized(size), seed=seed)

    # ---- trials

    def do(self, job: Job, on_step: OnStep | None = None, timed: bool = False) -> Trial:
        """Run a trial of any kind.

        Args:
            timed: let a measurement of cost include the time of a training step, since nothing else runs meanwhile.
        """
        if job.kind == "tune" and job.proposal is not None:
            return self.tune(job.contender, job.proposal, on_step)
        if job.kind == "cost":
            rate = job.proposal.learning_rate if timed and job.proposal is not None else None
            return self.cost(job.contender, job.size, rate)
        return self.run(job.contender, job.number, job.seed, job.proposal, on_step)

    def tune(self, contender: Contender, proposal: Proposal, on_step: OnStep | None = None) -> Trial:
        """Train with proposed values; score on validation alone."""

        def work() -> dict[str, Any]:
            adaptation = self.attached(contender, SEARCH_SEED, proposal.size)
            course = train(
                adaptation,
                self.task,
                self.recipe,
                learning_rate=proposal.learning_rate,
                seed=SEARCH_SEED,
                on_step=on_step,
            )
            scores = {"validation": self.score(adaptation.model, "validation")}
            return {"scores": scores, **trained(course)}

        about = {
            "number": proposal.number,
            "seed": SEARCH_SEED,
            "learning_rate": proposal.learning_rate,
            "size": proposal.size,
        }
        return self.trial("tune", contender, work, **about)

    def cost(self, contender: Contender, size: int | None, learning_rate: float | None = None) -> Trial:
        """Measure what a training step costs; nothing is scored.

        Args:
            learning_rate: of a short training whose steps are timed as those of other trials are; None for no such training.
        """
        from petiole.cost import measure

        def work() -> dict[str, Any]:
            found: dict[str, Any] = {}
            if learning_rate is not None:
                recipe = replace(self.recipe, steps=min(self.steps, TIMED))
                adaptation = self.attached(contender, SEARCH_SEED, size)
                course = train(adaptation, self.task, recipe, learning_rate=learning_rate, seed=SEARCH_SEED)
                found = {"step_seconds": course.step_seconds, "share": course.share}
                del adaptation
            if contender.trains:
                adaptation = self.attached(contender, SEARCH_SEED, size)
                adaptation.calibrate([self.placed()])
                model = adaptation.model
            else:
                model = self.fresh(SEARCH_SEED)
            autocast = torch.bfloat16 if self.recipe.precision == "bf16" else None
            heads = [site.path for site in self.anatomy.heads()]
            cost = measure(model, self.batch, autocast=autocast, heads=heads, repeats=3, warmup=1)
            return {"cost": cost.to_dict(), **found}

        return self.trial("cost", contender, work, number=0, seed=SEARCH_SEED, size=size)

    def run(
        self, contender: Contender, number: int, seed: int, chosen: Proposal | None, on_step: OnStep | None = None
    ) -> Trial:
        """Train with the chosen values; score on validation and on test, which nothing has seen before."""

        def work() -> dict[str, Any]:
            if chosen is None:
                model = self.fresh(seed)
                scores = {split: self.score(model, split) for split in ("validation", "test")}
                return {"scores": scores, "outputs": self.outputs(model)}
            adaptation = self.attached(contender, seed, chosen.size)
            course = train(
                adaptation, self.task, self.recipe, learning_rate=chosen.learning_rate, seed=seed,
                evaluations=self.settings.evaluations, on_step=on_step,
            )  # fmt: skip
            model = adaptation.model
            found: dict[str, Any] = {**trained(course), "course": course.scores}
            found["scores"] = {"validation": course.last, "test": self.score(model, "test")}
            found["outputs"] = self.outputs(model)
            if self.forgetting is not None:
                found["forgetting"] = self.forgetting.measure(adaptation)
            found["file_bytes"], found["file"] = self.keep(adaptation, contender, number)
            return found

        rate, size = (chosen.learning_rate, chosen.size) if chosen is not None else (None, None)
        return self.trial("run", contender, work, number=number, seed=seed, learning_rate=rate, size=size)

    def trial(self, kind: Any, contender: Contender, work: Callable[[], dict[str, Any]], **about: Any) -> Trial:
        """Do the work of a trial, and record what came of it, whatever that is.

        Raises:
            Changed, FileError: the run as a whole can't go on.
        """
        start = time.perf_counter()
        status: Literal["done", "failed"] = "done"
        reason, found = "", dict[str, Any]()
        try:
            found = work()
        except (Changed, FileError):
            raise
        except Exception as error:  # a method that fails must not end the comparison
            if files.full(error):  # every trial after this one would fail too
                place = getattr(error, "filename", None) or tempfile.gettempdir()
                raise FileError(
                    f"{place}: the disk is full, so a trial of {contender.label} could not end.\n"
                    "Make room and give the same command: what is done is kept, and that trial is run again."
                ) from error
            status, reason = "failed", reason_of(error, self.recipe.batch_size)
            found = {} if isinstance(error, PetioleError) else {"traceback": traceback.format_exc()[-4000:]}
        finally:
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        size, rate = about.get("size"), about.get("learning_rate")
        proposal = Proposal(about["number"], rate or 0.0, size) if (rate, size) != (None, None) else None
        key = Job(kind, contender, about["number"], about["seed"], proposal).key(self.identity)
        return Trial(key=key, row=contender.label, kind=kind, config=contender.config(size), status=status, reason=reason,
                     wall_seconds=time.perf_counter() - start, **about, **found)  # fmt: skip

    # ---- pieces

    def score(self, model: nn.Module, split: str) -> dict[str, float]:
        return measured(self.task.evaluate(model, split, batch_size=2 * self.recipe.batch_size), split)

    def outputs(self, model: nn.Module) -> str:
        """Of the outputs on a batch: two models with the same one have learnt the same, which is nothing for one of them."""
        from petiole.tasks.base import evaluating

        with evaluating(model):
            output = model(**self.placed()).logits
        return hashlib.sha256(output.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]

    @cached_property
    def batch(self) -> Mapping[str, Any]:
        """A batch of training rows, drawn once: what costs are measured on."""
        rows = self.task.encoded("train")
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEARCH_SEED)).tolist()
        return self.task.collator([rows[i] for i in order[: self.recipe.batch_size]])

    def placed(self) -> dict[str, Any]:
        """That batch on the device of the models."""
        return {
            name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in self.batch.items()
        }

    def keep(self, adaptation: Adaptation, contender: Contender, number: int) -> tuple[int, str]:
        """Write the adaptation of the first run, for `petiole eval` and for use; the others have the same size."""
        name = file_of(contender.label)
        path = self.folder / name
        if number > 0:
            return path.stat().st_size if path.exists() else 0, ""
        files.check_writable(path.parent)
        adaptation.save(path)
        return path.stat().st_size, name


def trained(course: Course) -> dict[str, Any]:
    """What a trial records of its training."""
    return {name: getattr(course, name) for name in ("steps", "seconds", "step_seconds", "share", "losses")}


def reason_of(error: BaseException, batch_size: int) -> str:
    """Why a trial failed, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or ("allocate" in text and "memory" in text)
    if memory:
        return f"out of memory at batch size {batch_size}"
    if isinstance(error, PetioleError):
        return text[:400]
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    where = f" ({Path(last.tb_frame.f_code.co_filename).name}:{last.tb_lineno})" if last is not None else ""
    return f"{type(error).__name__}: {text[:300]}{where}"


__all__ = ["HEAD", "Bench", "Changed", "reason_of"]
