"""What a comparison is asked to do, validated before anything is loaded; and what makes two comparisons the same."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from petiole.compare.table import AXES, DEFAULT_AXES, axes
from petiole.errors import ConfigError
from petiole.method import explain
from petiole.tune import Recipe

SPLITS = ("train", "validation", "test")
SEARCH_SEED = 0  # the search has a seed of its own; the repeated runs take 1, 2, …


class Settings(BaseModel):
    """One comparison. Whatever is not here does not differ between methods."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(description="The backbone: a folder, petiole:vit-cifar10, or a name on the Hub as owner/name.")
    data: str = Field(description="The data set: files, a folder, sklearn:digits, or a name on the Hub.")
    methods: tuple[str, ...] | None = Field(
        None, description="Methods, as slug or slug:field=value; the baselines if None."
    )
    task: str = Field("auto", description="Kind of task; auto takes the one that the columns fit.")
    columns: dict[str, str] = Field({}, description="What the task calls a column -> its name in the data.")
    metric: str | None = Field(None, description="What rows are ranked by; the task's usual one if None.")
    max_length: int | None = Field(None, ge=1, description="Tokens a text is cut to; what the model can take if None.")
    limit: dict[str, int] = Field({}, description="At most so many rows of a split.")
    seeds: int = Field(3, ge=1, le=100, description="Repeated runs with the chosen values.")
    trials: int = Field(6, ge=1, le=1000, description="Trials of the search, the same number for every method.")
    size_search: bool = Field(False, description="Whether the search also chooses each method's main size.")
    steps: int | None = Field(None, ge=1, description="Optimiser steps of a run; if None, epochs decide.")
    epochs: float = Field(3.0, gt=0, description="Passes over the training split.")
    batch_size: int = Field(16, ge=1, description="Rows of a step.")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16 computes under autocast.")
    evaluations: int = Field(5, ge=1, description="Points of each learning curve on validation.")
    forgetting: str | None = Field(
        None, description="A data set that the backbone could already do, scored before and after."
    )
    axes: tuple[str, ...] = Field(DEFAULT_AXES, description="Costs of the Pareto front and the plots.")
    threads: int | None = Field(None, ge=1, description="CPU threads; torch's own choice if None.")

    def __init__(self, **fields: Any) -> None:
        """Validate.

        Raises:
            ConfigError: names the field, the value and what is allowed.
        """
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise ConfigError(explain(type(self), error).replace(f"{type(self).__name__}.", "")) from None

    @field_validator("limit")
    @classmethod
    def _splits(cls, value: dict[str, int]) -> dict[str, int]:
        for split in value:
            if split not in SPLITS:
                raise ValueError(f"{split!r} is none of {', '.join(SPLITS)}")
        return value

    @field_validator("axes")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(axis.name for axis in axes(value))

    @property
    def recipe(self) -> Recipe:
        """How every run is trained."""
        return Recipe(steps=self.steps, epochs=self.epochs, batch_size=self.batch_size, precision=self.precision)

    @property
    def run_seeds(self) -> range:
        return range(1, self.seeds + 1)

    # ---- sameness

    @property
    def asked(self) -> dict[str, Any]:
        """What may grow in a folder that holds trials: more methods, seeds, trials; other axes."""
        return {name: getattr(self, name) for name in ("methods", "seeds", "trials", "axes")}

    def identity(self, **found: Any) -> dict[str, Any]:
        """Everything that a trial depends on: the settings that may not change, and what was found (model, data, versions)."""
        fixed = (
            "metric",
            "max_length",
            "size_search",
            "steps",
            "epochs",
            "batch_size",
            "precision",
            "evaluations",
            "forgetting",
        )
        own = {name: getattr(self, name) for name in fixed}
        if self.steps is not None:
            own["epochs"] = None  # not used then
        return {**own, "recipe": {n: v for n, v in self.recipe.to_dict().items() if n not in own}, **found}

    # ---- the command line that says the same

    def command(self, output: str, engine: Sequence[str] = ()) -> str:
        """A command that runs this comparison; `engine` is what it says about the engine."""
        words = ["petiole", "compare", "--model", self.model, "--data", self.data]
        if self.methods is not None:
            words += ["--methods", ",".join(self.methods)]
        defaults = {name: info.get_default(call_default_factory=True) for name, info in type(self).model_fields.items()}
        for name in ("task", "metric", "max_length", "seeds", "trials", "steps", "epochs", "batch_size", "precision", "evaluations",
                     "forgetting", "threads"):  # fmt: skip
            if (value := getattr(self, name)) != defaults[name]:
                words += [f"--{name.replace('_', '-')}", f"{value:g}" if isinstance(value, float) else str(value)]
        for key, column in self.columns.items():
            words += ["--column", f"{key}={column}"]
        if self.limit:
            words += ["--limit", limit_text(self.limit)]
        if self.size_search:
            words.append("--size-search")
        if self.axes != DEFAULT_AXES:
            words += ["--axes", ",".join(self.axes)]
        return " ".join(shlex.quote(word) for word in [*words, *engine, "--output", output])


def limit_text(limit: Mapping[str, int]) -> str:
    """{"train": 9, "test": 5} -> "train=9,test=5"; the same for all three -> "9"."""
    if len(limit) == 3 and len(set(limit.values())) == 1:
        return str(next(iter(limit.values())))
    return ",".join(f"{split}={rows}" for split, rows in limit.items())


def limits(text: str | None) -> dict[str, int]:
    """ "500" or "train=500,test=200" -> rows by split.

    Raises:
        ConfigError: not a number, or no such split.
    """
    found: dict[str, int] = {}
    for part in (text or "").split(",") if text else []:
        name, equals, number = part.rpartition("=")
        names = SPLITS if not equals else (name.strip(),)
        if not number.strip().isdecimal() or not set(names) <= set(SPLITS):
            raise ConfigError(
                f"limit: {part.strip()!r} is no number of rows; give 500, or train=500,validation=200,test=200"
            )
        found.update(dict.fromkeys(names, int(number)))
    return found


def digest(value: Any) -> str:
    """A short digest of a JSON value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sample(rows: Any, most: int = 200) -> Any:
    """The size of a split and a digest of some of its rows, evenly spread: another data set almost surely has another one."""
    chosen = range(0, len(rows), max(1, len(rows) // most))
    return [len(rows), digest(rows.with_format("arrow")[list(chosen)].to_pylist())]


__all__ = ["AXES", "SEARCH_SEED", "Settings", "digest", "limit_text", "limits", "sample"]
