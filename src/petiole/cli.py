"""The command line. Nothing heavy is imported before a command needs it: `petiole --help` costs what `import torch` costs.

Exit codes: 0 done, 1 the thing asked for did not come about (no run has a score), 2 something is wrong with what was asked for, 130 Ctrl-C.
Results go to standard output, progress and errors to standard error; with --json, standard output holds one JSON object and nothing else.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

if TYPE_CHECKING:
    from petiole.compare.run import Comparison
    from petiole.compare.table import Column
    from petiole.method import Method

app = typer.Typer(
    name="petiole",
    help="Transfer learning under a budget of parameters, memory, compute and labels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Model = Annotated[
    str,
    typer.Option(
        help="The backbone: a folder, petiole:vit-cifar10, petiole:minilm, or a name on the Hub as owner/name."
    ),
]
Data = Annotated[
    str,
    typer.Option(
        help="The data: a file, a folder, the common beginning of files, sklearn:digits, or a name on the Hub."
    ),
]
TaskName = Annotated[str, typer.Option("--task", help="Kind of task; auto takes the one that the columns fit.")]
Columns = Annotated[
    list[str] | None,
    typer.Option("--column", help="What the task calls a column = its name in the data: text=sentence."),
]
Limit = Annotated[
    str | None, typer.Option(help="At most so many rows of each split: 500, or train=500,validation=200,test=200.")
]
MaxLength = Annotated[int | None, typer.Option(help="Tokens a text is cut to; what the model can take by default.")]
Steps = Annotated[int | None, typer.Option(help="Optimiser steps; by default, epochs decide.")]
Epochs = Annotated[float, typer.Option(help="Passes over the training split.")]
BatchSize = Annotated[int, typer.Option(help="Rows of a step.")]
Precision = Annotated[str, typer.Option(help="fp32, or bf16 to compute under autocast.")]
AdaptationFile = Annotated[Path, typer.Option(help="File that `petiole tune` or `compare` wrote.")]
OtherBackbone = Annotated[
    bool, typer.Option("--allow-other-backbone", help="Load even if it was made on another backbone.")
]
Threads = Annotated[int | None, typer.Option(help="CPU threads; torch's own choice by default.")]


# ------------------------------------------------------------------------------------------------------------------------ the frame


def main() -> None:
    """The entry point of the `petiole` command."""
    with reported():
        app()


@contextmanager
def reported(resume: str = "") -> Iterator[None]:
    """Turn what a user can cause into a few lines and an exit code.

    Args:
        resume: what to say after Ctrl-C.
    """
    from petiole.errors import PetioleError

    try:
        yield
    except PetioleError as error:
        complain(str(error))
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        complain("stopped" + (f"\n{resume}" if resume else ""), mark="")
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader of a pipe has gone, as in `petiole methods | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except MemoryError:
        complain("out of memory; take a smaller --batch-size or --limit")
        raise SystemExit(2) from None


def complain(text: str, mark: str = "error: ") -> None:
    print(mark + text, file=sys.stderr, flush=True)


def emit(value: Any) -> None:
    """One JSON object on standard output; figures that are not finite become null."""
    print(json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False))


def finite(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def pairs(texts: list[str] | None, option: str) -> dict[str, str]:
    """["text=sentence"] -> {"text": "sentence"}.

    Raises:
        ConfigError: one of them has no =, or one name comes twice.
    """
    from petiole.errors import ConfigError

    found: dict[str, str] = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not equals or not name.strip() or name.strip() in found:
            raise ConfigError(f"{option} {text}: give name=value, each name once")
        found[name.strip()] = value.strip()
    return found


def show(parts: list[Column]) -> None:
    """A table that fits the terminal: what matters least is left out where there is no room. A pipe gets everything."""
    from rich.console import Console
    from rich.table import Table

    wide = sum(width(c) + 2 for c in parts)
    console = Console(width=None if sys.stdout.isatty() else max(80, wide + 2), highlight=False)
    kept = list(parts)
    while sum(width(c) + 2 for c in kept) > console.width and len(kept) > 3:
        kept.remove(min(kept, key=lambda c: c.keep))
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in kept:
        table.add_column(column.title, justify="right" if column.right else "left", no_wrap=True)
    for cells in zip(*(column.cells for column in kept), strict=True):
        table.add_row(*map(plain, cells))
    console.print(table)


def width(column: Column) -> int:
    return max(map(len, [column.title, *column.cells]))


def plain(text: str) -> Any:
    """Text that is no markup, whatever brackets it holds."""
    from rich.text import Text

    return Text(text)


def threads_of(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def load_task(
    model: str,
    data: str,
    task: str,
    column: list[str] | None,
    limit: str | None,
    max_length: int | None = None,
    test: float = 0.2,
) -> Any:
    """The data, bound to the model."""
    from petiole.compare.settings import limits
    from petiole.tasks import load_data, prepare

    rows = load_data(
        data, task=task, columns=pairs(column, "--column") or None, limit=limits(limit) or None, test_fraction=test
    )
    return prepare(rows, model, **({"max_length": max_length} if max_length is not None else {}))


# ------------------------------------------------------------------------------------------------------------------------- commands


@app.callback(invoke_without_command=True)
def version(show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if show_version:
        from petiole import __version__

        print(f"petiole {__version__}")
        raise typer.Exit


@app.command()
def methods(
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
    as_json: Json = False,
) -> None:
    """List the methods there are, by family, with paper and what they save."""
    with reported():
        from petiole.compare.table import Column
        from petiole.errors import ConfigError
        from petiole.method import registry

        found = sorted(registry().values(), key=lambda cls: (cls.family(), cls.slug))
        families = sorted({cls.family() for cls in found})
        if family is not None:
            if family not in families:
                raise ConfigError(f"--family {family}: there are {', '.join(families)}")
            found = [cls for cls in found if cls.family() == family]
        if as_json:
            emit({"methods": [about(cls) for cls in found]})
            return
        show(
            [
                Column("family", [cls.family() for cls in found], right=False, keep=3),
                Column("method", [cls.slug for cls in found], right=False, keep=9),
                Column("paper", [f"arXiv {cls.paper}" if cls.paper else "–" for cls in found], right=False, keep=4),
                Column("merges", ["yes" if cls.merges else "no" for cls in found], right=False, keep=2),
                Column("size", [cls.size or "–" for cls in found], right=False, keep=1),
                Column("saves", [cls.saves for cls in found], right=False, keep=8),
            ]
        )


def about(cls: type[Method]) -> dict[str, Any]:
    """A method class as JSON: what it is, what it can do, its fields."""
    facts = {
        name: getattr(cls, name)
        for name in ("slug", "title", "paper", "saves", "merges", "identity_at_start", "routes", "size")
    }
    fields = {
        name: {
            "default": json.loads(json.dumps(info.get_default(call_default_factory=True), default=str)),
            "about": info.description,
        }
        for name, info in cls.model_fields.items()
    }
    return {"family": cls.family(), **facts, "learning_rates": list(cls.learning_rates), "fields": fields}


@app.command()
def anatomy(model: Model, as_json: Json = False) -> None:
    """Show what a backbone is made of: stacks, blocks, and the roles that methods can sit on. Reads the configuration alone."""
    with reported():
        from petiole.anatomy import anatomy as examine

        found = examine(skeleton(model))
        if as_json:
            emit(found.to_dict())
        else:
            print(found.coverage())


def skeleton(model: str) -> Any:
    """A model on the meta device from its configuration, of the class that the checkpoint was saved from."""
    import torch
    import transformers

    from petiole.errors import FileError
    from petiole.tasks import locate_model
    from petiole.tasks.models import load_config

    place = locate_model(model)
    config = load_config(place)
    cls = next((c for name in config.architectures or [] if (c := getattr(transformers, name, None)) is not None), None)
    try:
        with torch.device("meta"):
            return (
                cls(config) if cls is not None else transformers.AutoModel.from_config(config, trust_remote_code=False)
            )
    except Exception as error:  # a configuration can be wrong in any way
        raise FileError(
            f"{model}: no model can be built from its configuration\n{' '.join(str(error).split())[:200]}"
        ) from error


@app.command()
def plan(
    model: Model,
    data: Annotated[
        str | None,
        typer.Option(help="Data: they give the head its classes, and the batch is that of their longest rows."),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Slugs with commas between; lora:rank=32 sets a field, lora+vpt combines. Default: all."),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="What is to spend: params=0.5%,memory=8GB,flops=40T; also checkpoint, saved, optimizer, inference."
        ),
    ] = None,
    fit: Annotated[
        bool,
        typer.Option(
            "--fit", help="Give each method the largest main size (rank, bottleneck, length) within the budget."
        ),
    ] = False,
    batch_size: BatchSize = 8,
    length: Annotated[
        int, typer.Option(help="Tokens of a text; images have the size that the model was made for.")
    ] = 128,
    dtype: Annotated[str | None, typer.Option(help="Type of the backbone's weights; float32 by default.")] = None,
    precision: Precision = "fp32",
    optimizer: Annotated[str, typer.Option(help="adamw, adam, sgd or momentum.")] = "adamw",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute activations again instead of keeping them.")
    ] = False,
    recompute: Annotated[
        bool,
        typer.Option("--recompute", help="Where memory is over the budget, recompute as few blocks as it takes."),
    ] = False,
    task: TaskName = "auto",
    labels: Annotated[int | None, typer.Option(help="Classes of the head, without --data.")] = None,
    column: Columns = None,
    limit: Limit = None,
    max_length: MaxLength = None,
    axes: Annotated[
        str, typer.Option(help="Costs of the front: params, memory, flops, inference, checkpoint, saved, optimizer.")
    ] = "params,memory,flops",
    plot: Annotated[Path | None, typer.Option(help="Draw parameters against memory into this file (PNG).")] = None,
    as_json: Json = False,
) -> None:
    """Predict what every method would cost on a backbone, and which fit a budget. Reads its configuration alone; nothing is trained."""
    with reported():
        from petiole.errors import ConfigError
        from petiole.planning import plan as run
        from petiole.planning.inputs import longest

        if precision not in ("fp32", "bf16"):
            raise ConfigError(f"--precision {precision}: fp32 or bf16")
        source: dict[str, Any] = {
            "model": model,
            "length": length,
            "num_labels": labels,
            "task": None if task == "auto" else task,
        }
        if data is not None:
            bound = load_task(model, data, task, column, limit, max_length)
            source = {"model": bound.empty_model(), "batch": longest(bound, batch_size)}
        with bar("methods") as step:
            done = run(
                methods=methods, budget=budget, fit=fit, batch_size=batch_size, dtype=dtype, optimizer=optimizer, front_axes=axes,
                autocast="bfloat16" if precision == "bf16" else None, gradient_checkpointing=gradient_checkpointing, recompute=recompute,
                watch=step, **source,
            )  # fmt: skip
        if plot is not None:
            done.plot(plot)
        if as_json:
            emit(done.to_dict())
            return
        print(f"{done.headline()}\n")
        show(done.columns())
        for number, remark in enumerate(done.remarks()):
            print(("\n" if number == 0 else "") + remark)
        if plot is not None:
            print(f"\npicture: {plot}")


@app.command()
def compare(
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option(help="Folder of the run; a run that is in it goes on.")],
    methods: Annotated[
        str | None,
        typer.Option(
            help="Slugs with commas between; lora:rank=32 sets a field, lora+vpt combines. Default: all baselines that fit."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Repeated runs with the chosen values.")] = 3,
    trials: Annotated[
        int, typer.Option(help="Trials of the search for the learning rate, the same for every method.")
    ] = 6,
    size_search: Annotated[
        bool, typer.Option("--size-search", help="Search the main size (rank, bottleneck, length) too.")
    ] = False,
    steps: Steps = None,
    epochs: Epochs = 3.0,
    batch_size: BatchSize = 16,
    precision: Precision = "fp32",
    task: TaskName = "auto",
    column: Columns = None,
    metric: Annotated[
        str | None, typer.Option(help="What rows are ranked by; the task's usual one by default.")
    ] = None,
    limit: Limit = None,
    max_length: MaxLength = None,
    forgetting: Annotated[
        str | None, typer.Option(help="Data that the bare model can do already, scored before and after.")
    ] = None,
    axes: Annotated[
        str, typer.Option(help="Costs of the Pareto front: params, checkpoint, flops, saved, memory, time, inference.")
    ] = "params,memory,time",
    evaluations: Annotated[int, typer.Option(help="Points of each learning curve.")] = 5,
    threads: Threads = None,
    engine: Annotated[
        str, typer.Option(help="local runs trials one after the other, ray many at once on a Ray cluster.")
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(help="Of the Ray cluster; else RAY_ADDRESS; else one is started on this machine for the run."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Trials at once on the Ray cluster; as many as it has room for by default.")
    ] = None,
    gpus: Annotated[
        float | None,
        typer.Option(help="GPUs of a trial on the Ray cluster, also a share of one; CPUs are as many as --threads."),
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Run the trials again that failed.")] = False,
    as_json: Json = False,
) -> None:
    """Compare methods side by side: the same search for each, seeds repeated, costs measured; table, plots and report in one folder.

    The bare backbone and full fine-tuning are always among the rows. Interrupted, the same command goes on and repeats nothing.
    """
    with reported(f"what is done is in {output}; the same command goes on from there"):
        from petiole.compare import compare as run
        from petiole.compare.settings import limits
        from petiole.compare.watch import watch

        options: dict[str, Any] = {
            "seeds": seeds, "trials": trials, "size_search": size_search, "steps": steps, "epochs": epochs, "batch_size": batch_size,
            "precision": precision, "task": task, "columns": pairs(column, "--column"), "metric": metric, "limit": limits(limit),
            "max_length": max_length, "forgetting": forgetting, "axes": tuple(name.strip() for name in axes.split(",") if name.strip()),
            "evaluations": evaluations, "threads": threads,
        }  # fmt: skip
        runner = engine_of(engine, address=address, workers=workers, gpus=gpus)
        result = run(model, data, methods, output=output, engine=runner, watch=watch(), retry=retry, **options)
        conclude(result, as_json)


def engine_of(name: str, **options: Any) -> Any:
    """The engine by its name, with what was said about the cluster.

    Raises:
        ConfigError: no such engine, or something is said about a cluster that is not asked for.
    """
    from petiole.errors import ConfigError

    if name == "ray":
        from petiole.compare.cluster import Ray

        return Ray(**options)
    for option, value in options.items():
        if value is not None:
            raise ConfigError(f"--{option} is for --engine ray")
    return name


def conclude(result: Comparison, as_json: bool) -> None:
    """Print a comparison; exit code 1 if no run has a score."""
    from petiole.compare.report import cells, headline

    if as_json:
        emit(result.to_dict())
    else:
        print(headline(result).replace("**", ""))
        print()
        show(cells(result))
        for row in result.rows:
            for note in row.notes:
                print(f"{row.label}: {note}")
        print(f"\nreport: {result.folder / 'report.md'}")
    if all(row.mean is None for row in result.rows):
        raise typer.Exit(1)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/demo"),
    seeds: Annotated[int, typer.Option(help="Repeated runs with the chosen values.")] = 3,
    trials: Annotated[int, typer.Option(help="Trials of each search.")] = 4,
    as_json: Json = False,
) -> None:
    """Compare eight methods on handwritten digits with the small ViT that ships with petiole: no download, a few minutes on one core."""
    with reported(f"what is done is in {output}; the same command goes on from there"):
        from petiole.compare import compare as run
        from petiole.compare.demo import DATA, backbone, preset
        from petiole.compare.watch import watch

        model = backbone(output / "backbone")
        result = run(str(model), DATA, output=output, watch=watch(), seeds=seeds, trials=trials, **preset())
        conclude(result, as_json)


@app.command()
def tune(
    model: Model,
    data: Data,
    method: Annotated[
        str, typer.Option(help="What to attach: a slug as `petiole methods` lists them, or several with + between.")
    ],
    output: Annotated[Path, typer.Option(help="File for the adaptation, such as trec.petiole.safetensors.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help='A field of the method: rank=8, \'roles=["q","v"]\'. May be repeated.'),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="At its highest; the middle of the method's range by default.")
    ] = None,
    steps: Steps = None,
    epochs: Epochs = 3.0,
    batch_size: BatchSize = 16,
    precision: Precision = "fp32",
    seed: Annotated[int, typer.Option(help="Of head, new parameters and order of the rows.")] = 0,
    cache: Annotated[
        str | None,
        typer.Option(
            help="Memory such as 2GB in which what the frozen blocks compute is kept, so that later epochs skip them."
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="What a step may hold, such as 4GB: just as many blocks are recomputed as it takes."),
    ] = None,
    task: TaskName = "auto",
    column: Columns = None,
    limit: Limit = None,
    max_length: MaxLength = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Train one method on one task and write what it learnt to one file."""
    with reported(f"nothing was written to {output}"):
        from petiole import files
        from petiole.compare.contenders import build, parse, split
        from petiole.errors import ConfigError
        from petiole.tune import Recipe

        recipe = Recipe(steps=steps, epochs=epochs, batch_size=batch_size, precision=precision)  # type: ignore[arg-type]
        chosen = parse(method)
        if settings:
            if len(split(method, "+")) > 1 or ":" in method:
                raise ConfigError("--set is for one method; for several, write lora:rank=8+vpt:length=5")
            chosen = type(chosen)(method, (build(method, settings),))
        if not chosen.methods:
            raise ConfigError("--method bare trains nothing; `petiole eval` scores the bare backbone")
        files.check_target(output)
        threads_of(threads)
        found = trained(
            chosen,
            load_task(model, data, task, column, limit, max_length),
            recipe,
            learning_rate,
            seed,
            output,
            as_json,
            cache=cache,
            memory=memory,
        )
        if as_json:
            emit(found)
        else:
            scored(found["scores"], found["metric"], found["percent"])
            print(f"written: {output} ({found['file_bytes'] / 1e3:.4g} kB)")


def trained(
    chosen: Any,
    task: Any,
    recipe: Any,
    learning_rate: float | None,
    seed: int,
    output: Path,
    silent: bool,
    **savings: str | None,
) -> dict[str, Any]:
    """Attach, train, score before and after, save."""
    import torch

    from petiole import files
    from petiole.attach import attach
    from petiole.cost import count
    from petiole.tune import measured, train

    low, high = chosen.learning_rates
    rate = learning_rate if learning_rate is not None else float(f"{(low * high) ** 0.5:.4g}")
    backbone = task.build_model(seed=seed).to("cuda" if torch.cuda.is_available() else "cpu")
    split = "validation" if "validation" in task.data.splits else "test" if "test" in task.data.splits else "train"
    score = {"bare": measured(task.evaluate(backbone, split, batch_size=2 * recipe.batch_size), split)}
    adaptation = attach(backbone, chosen.methods, seed=seed)
    files.check_target(output, count(backbone).stored_bytes)
    if not silent:
        print(
            task.data,
            adaptation.summary(),
            f"learning rate {rate:g}, {recipe.total_steps(len(task.encoded('train')))} steps",
            sep="\n",
            file=sys.stderr,
        )
    with bar("training") as on_step:
        course = train(
            adaptation, task, recipe, learning_rate=rate, seed=seed, on_step=on_step,
            on_start=lambda line: print(line, file=sys.stderr), **savings,  # type: ignore[arg-type]
        )  # fmt: skip
    score[chosen.label] = measured(task.evaluate(backbone, split, batch_size=2 * recipe.batch_size), split)
    saved(adaptation, output)
    return {
        "method": chosen.config(), "learning_rate": rate, "seed": seed, "steps": course.steps, "seconds": course.seconds, "split": split,
        "losses": course.losses, "metric": task.main_metric, "percent": percent(task), "scores": score, "trainable_parameters": adaptation.trainable,
        "file": str(output), "file_bytes": output.stat().st_size,
    }  # fmt: skip


def saved(adaptation: Any, output: Path) -> None:
    """Save what was learnt; where the disk refuses, among the temporary files, so that it is not lost.

    Raises:
        FileError: the disk refuses; says where it is instead.
    """
    import tempfile
    from contextlib import suppress

    from petiole.errors import FileError

    try:
        adaptation.save(output)
    except FileError as error:
        rescued = None
        with suppress(OSError):  # a FileError is one
            place = Path(tempfile.mkdtemp(prefix="petiole-")) / output.name
            adaptation.save(place)
            rescued = place
        if rescued is None:
            raise
        raise FileError(f"{str(error).splitlines()[0]}\nWhat was learnt is in {rescued}.") from error


def percent(task: Any) -> bool:
    from petiole.tasks import METRICS

    return METRICS[task.main_metric].highest == 1.0


@contextmanager
def bar(title: str) -> Iterator[Any]:
    """A progress bar on a terminal, a line at every tenth elsewhere."""
    if not sys.stderr.isatty():
        yield (
            lambda done, total: (
                done * 10 // total > (done - 1) * 10 // total
                and print(f"{title}: {done} of {total}", file=sys.stderr, flush=True)
            )
        )
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        one = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(one, completed=done, total=total)


def scored(scores: dict[str, dict[str, float]], metric: str, percent: bool) -> None:
    """Scores side by side, a row for each model, a column for each metric, the main one first."""
    from petiole.compare.table import Column, score
    from petiole.tasks import METRICS

    names = sorted({name for found in scores.values() for name in found}, key=lambda name: (name != metric, name))
    parts = [Column("", list(scores), right=False, keep=9)]
    for name in names:
        own = METRICS.get(name, METRICS[metric])  # else the figure of one of several tasks
        whole = own.highest == 1.0
        title = f"{own.title if name in METRICS else name} {'↑' if own.higher_is_better else '↓'}" + (
            " (%)" if whole else ""
        )
        parts.append(
            Column(
                title,
                [score(found.get(name), None, whole) for found in scores.values()],
                keep=8 if name == metric else 4,
            )
        )
    show(parts)


@app.command(name="eval")
def evaluate(
    model: Model,
    data: Data,
    adaptation: AdaptationFile,
    split: Annotated[
        str | None, typer.Option(help="train, validation or test; test by default, where there is one.")
    ] = None,
    batch_size: BatchSize = 32,
    seed: Annotated[int, typer.Option(help="Of the bare model's head, where it needs a new one.")] = 0,
    allow_other_backbone: OtherBackbone = False,
    task: TaskName = "auto",
    column: Columns = None,
    limit: Limit = None,
    max_length: MaxLength = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Score an adaptation, and the bare backbone beside it on the same rows."""
    with reported():
        import torch

        from petiole.errors import ConfigError
        from petiole.store import load

        threads_of(threads)
        bound = load_task(model, data, task, column, limit, max_length)
        there = bound.data.splits
        chosen = split or ("test" if "test" in there else "validation" if "validation" in there else "train")
        if chosen not in there:
            raise ConfigError(f"--split {chosen}: there are {', '.join(there)}")
        backbone = bound.build_model(seed=seed).to("cuda" if torch.cuda.is_available() else "cpu")
        tuned = load(backbone, adaptation, allow_other_backbone=allow_other_backbone)
        label = "+".join(method.slug for method in tuned.methods)
        scores = {}
        with tuned.disabled():
            scores["bare"] = bound.evaluate(backbone, chosen, batch_size=batch_size)
        scores[label] = bound.evaluate(backbone, chosen, batch_size=batch_size)
        rows = len(there[chosen])
        if as_json:
            emit({"split": chosen, "rows": rows, "metric": bound.main_metric, "scores": scores, "adaptation": str(adaptation),
                  "methods": [{"slug": m.slug, "config": m.model_dump(mode="json")} for m in tuned.methods]})  # fmt: skip
            return
        print(f"{rows} rows of {chosen}")
        scored(scores, bound.main_metric, percent(bound))


@app.command()
def merge(
    model: Model,
    adaptation: AdaptationFile,
    output: Annotated[Path, typer.Option(help="Folder for the merged model.")],
    data: Annotated[
        str | None,
        typer.Option(help="Data of the task: gives the classes their names and measures the change of outputs."),
    ] = None,
    task: TaskName = "auto",
    column: Columns = None,
    allow_other_backbone: OtherBackbone = False,
    as_json: Json = False,
) -> None:
    """Fold an adaptation into the weights and save the model as Transformers does: it then costs what the bare backbone costs."""
    with reported(f"{output} is not complete" if output.exists() else ""):
        from petiole.merged import merged

        found = merged(
            model,
            adaptation,
            output,
            data=data,
            task=task,
            columns=pairs(column, "--column"),
            other=allow_other_backbone,
        )
        if as_json:
            emit(found)
            return
        change = found["largest_change"]
        print(f"written: {output} ({found['bytes'] / 1e6:.4g} MB)")
        if change is not None:
            print(f"largest change of the outputs through merging, on {found['rows']} rows: {change:.2g}")


@app.command()
def export(
    model: Model,
    adaptation: AdaptationFile,
    output: Annotated[Path, typer.Option(help="Folder for the LoRA checkpoint.")],
    reader: Annotated[str, typer.Option("--for", help="Who will read it: peft, vllm or diffusers.")] = "peft",
    rank: Annotated[
        int | None, typer.Option(help="The largest rank wanted; as small as --max-error allows if left out.")
    ] = None,
    max_error: Annotated[
        float, typer.Option("--max-error", help="The largest relative error of a weight's change.")
    ] = 0.01,
    data: Annotated[
        str | None, typer.Option(help="Data of the task: measures the change of the outputs through the export.")
    ] = None,
    task: TaskName = "auto",
    column: Columns = None,
    allow_other_backbone: OtherBackbone = False,
    as_json: Json = False,
) -> None:
    """Write an adaptation as a LoRA checkpoint that PEFT, vLLM or diffusers reads; what the reader can't take is refused."""
    with reported(f"{output} is not complete" if output.exists() else ""):
        from petiole.interop.readers import reader_of
        from petiole.merged import loaded

        reader_of(reader)
        tuned, _, batch = loaded(
            model, adaptation, data=data, task=task, columns=pairs(column, "--column"), other=allow_other_backbone
        )
        done = tuned.export(output, for_=cast(Any, reader), rank=rank, max_error=max_error, check=batch)
        if as_json:
            emit(done.to_dict())
        else:
            print(done)


if __name__ == "__main__":
    main()
