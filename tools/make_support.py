"""Write docs/support.md: which method works on which model family, found out by doing it.

    .venv/bin/python tools/make_support.py                      all of it, a minute or two on one core; writes the page
    .venv/bin/python tools/make_support.py -f bert vit -m lora  look at these cells alone, write nothing
    .venv/bin/python tools/make_support.py --json cells.json    the cells as data, too

For each family of tests/tiny.py and each registered method: attach, prove on a batch, train one step, save, load into a fresh model, compare
bit for bit, merge and unmerge where the method merges, detach, compare bit for bit again. A method that finds no place by default is tried
once more with the places that the model has. What petiole refuses is noted in its own words. Anything else that goes wrong is a defect: it is
printed, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import petiole as pt  # noqa: E402
from petiole.method import Method, registry  # noqa: E402
from petiole.proof import default_loss  # noqa: E402

tiny = importlib.import_module("tiny")
PAGE = ROOT / "docs" / "support.md"
LEARNING_RATE = 1e-2
MERGED = 1e-4  # what merging may change at most, relative to the largest output
SIZE = 2  # rank, bottleneck, length: the tiny models are 32 wide and have few positions
SMALL: dict[str, dict[str, Any]] = {
    "vl-pet": {"bottleneck": 4},
    "petl-ast": {"reduction_factor": 8},
}  # what 32 features take
# Where a method is tried whose usual places a model lacks.
OTHER_ROLES = (("qkv",), ("q",), ("up", "down"), ("linear",), ("conv",), ("mixer",), ("block",))


@dataclass(frozen=True)
class Cell:
    """What came of one method on one family.

    Attributes:
        outcome: "works", "told" (works with `setting`, not by default), "refused" (petiole said why), "failed" (a defect) or
            "absent" (a package is not installed).
        stage: how far it went. reason: why not by default, in petiole's words; "" where it works. setting: fields given by hand.
        merges: "yes", "no" (the method doesn't), or why this model can't take it.
    """

    family: str
    slug: str
    outcome: str
    stage: str = ""
    reason: str = ""
    setting: str = ""
    merges: str = ""


class Defect(Exception):
    """Something that must hold does not."""


# ------------------------------------------------------------------------------------------------------------------------ one cell


def cell(family: str, cls: type[Method]) -> Cell:
    """Try one method on one family: by default, then as told."""
    if tiny.missing(family):
        return Cell(family, cls.slug, "absent", reason=f"needs {tiny.missing(family)}")
    first = attempt(family, cls, {})
    if first.outcome == "refused":
        for setting in settings(family, cls):
            again = attempt(family, cls, setting)
            if again.outcome in ("works", "failed"):
                shown = ", ".join(f"{name}={list(v) if isinstance(v, tuple) else v!r}" for name, v in setting.items())
                outcome = "told" if again.outcome == "works" else "failed"
                return replace(again, outcome=outcome, reason=again.reason or first.reason, setting=shown)
    return first


def settings(family: str, cls: type[Method]) -> Iterator[dict[str, Any]]:
    """Other places for a method that found none: one stack of several, other roles that the model has."""
    found = pt.anatomy(tiny.model(family))
    if "stack" in cls.model_fields:
        yield from ({"stack": stack.name} for stack in found.stacks)
    if "roles" in cls.model_fields:
        usual = cls.model_fields["roles"].get_default() or ()
        if usual and len(found.stacks) > 1:
            yield from ({"roles": tuple(f"{stack.name}:{role}" for role in usual)} for stack in reversed(found.stacks))
        others = [roles for roles in OTHER_ROLES if set(roles) <= set(found.roles)]
        if not usual and len(found.stacks) > 1:
            yield from ({"roles": tuple(f"{found.stacks[-1].name}:{role}" for role in roles)} for roles in others)
        yield from ({"roles": roles} for roles in others)


def attempt(family: str, cls: type[Method], setting: dict[str, Any]) -> Cell:
    """Try one configuration on one family."""
    trial = Trial(family, cls, setting)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial.go()
    except pt.PetioleError as error:
        # Once it is attached and proven, petiole has said yes: a refusal from there on is a defect.
        outcome = "refused" if trial.stage in ("attach", "check") else "failed"
        return Cell(family, cls.slug, outcome, trial.stage, said(error))
    except Defect as error:
        return Cell(family, cls.slug, "failed", trial.stage, str(error))
    except Exception as error:  # whatever a method does wrong belongs in the table, not in a traceback
        return Cell(family, cls.slug, "failed", trial.stage, f"{type(error).__name__}: {said(error)}")
    return Cell(family, cls.slug, "works", merges=trial.merges)


def said(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


class Trial:
    """One method on one family, step by step. `stage` says where it stands."""

    def __init__(self, family: str, cls: type[Method], setting: dict[str, Any]) -> None:
        self.family, self.cls = family, cls
        size = cls.model_fields[cls.size].get_default() if cls.size else None
        self.setting = {**({cls.size: SIZE} if isinstance(size, int) else {}), **SMALL.get(cls.slug, {}), **setting}
        self.stage, self.merges = "attach", "yes" if cls.merges else "no"
        self.batch = tiny.batch(family)

    def go(self) -> None:
        model = tiny.model(self.family)
        came, tensors, hooked = self.outputs(model), values(model), hooks(model)
        own = dict(
            model.named_parameters()
        )  # the same ones after attaching, though where a block is wrapped under other names
        flags = {name: p.requires_grad for name, p in own.items()}
        tuned = pt.attach(model, self.cls(**self.setting), seed=1)
        tuned.calibrate([self.batch])
        bare = self.bare(own)
        if self.cls.identity_at_start:
            same(self.outputs(model), bare, "right after attaching the output is not the bare backbone's")
        self.stage = "check"
        tuned.check(self.batch)
        self.stage = "train"
        self.step(model, tuned)
        after = self.outputs(model)
        if not differs(after, bare):
            raise Defect("a training step changed nothing")
        with pt.disabled(model):
            frozen = self.outputs(tiny.model(self.family).requires_grad_(False))
            same(self.outputs(model), frozen, "disabled, the output is not the bare backbone's")
        with tempfile.TemporaryDirectory() as folder:
            self.stage = "save"
            path = tuned.save(Path(folder) / "one.petiole.safetensors")
            self.stage = "load"
            other = tiny.model(self.family)
            pt.load(other, path)
            same(self.outputs(other), after, "a fresh model with the file loaded gives another output")
        self.stage = "merge"
        if self.cls.merges:
            self.merge(model, tuned, after)
        self.stage = "detach"
        tuned.detach()
        same(self.outputs(model), came, "detached, the output is not that of the model that came in")
        now = values(model)
        if list(now) != list(tensors) or not all(torch.equal(now[name], tensors[name]) for name in now):
            raise Defect("detached, the state dict is not what it was")
        if flags != {name: p.requires_grad for name, p in model.named_parameters()}:
            raise Defect("detached, requires_grad is not what it was")
        left = [name for name in hooks(model) if name not in hooked]
        if left:
            raise Defect(f"detached, hooks are left at {left[0]!r}")

    def bare(self, own: dict[str, nn.Parameter]) -> list[Tensor]:
        """What the backbone gives alone, frozen as it is now: torch picks some kernels by requires_grad alone, and they round differently."""
        model = tiny.model(self.family)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(own[name].requires_grad)
        return self.outputs(model)

    def outputs(self, model: nn.Module) -> list[Tensor]:
        model.eval()
        with torch.no_grad():
            torch.manual_seed(0)
            return list(flat(model(**self.batch)))

    def step(self, model: nn.Module, tuned: pt.Adaptation) -> None:
        """One step of a plain loop, its events fired."""
        optimizer = torch.optim.AdamW(tuned.parameters(), lr=LEARNING_RATE)
        events = pt.Events(model, optimizer, total_steps=1)
        model.train()
        events.begin([self.batch])
        events.before_step()
        output = model(**self.batch)
        loss = default_loss(output)
        if getattr(output, "loss", None) is None and (terms := events.extra_loss()) is not None:
            loss = loss + terms
        loss.backward()
        events.before_optimizer_step(loss)
        optimizer.step()
        events.after_optimizer_step()
        optimizer.zero_grad()
        events.epoch_end()
        model.eval()

    def merge(self, model: nn.Module, tuned: pt.Adaptation, after: list[Tensor]) -> None:
        """Where a model can't take a merge (tied weights), that is noted, not a refusal of the method."""
        try:
            tuned.merge()
        except pt.PetioleError as error:
            self.merges = said(error)
            same(self.outputs(model), after, "a refused merge changed the output")
            return
        for a, b in zip(after, self.outputs(model), strict=True):
            apart = (
                float((a - b).abs().max() / a.abs().max().clamp_min(1e-6))
                if a.is_floating_point() and a.numel()
                else 0.0
            )
            if apart > MERGED:
                raise Defect(f"merging changed an output by {apart:.1e} of its size")
        tuned.unmerge()
        same(self.outputs(model), after, "unmerged, the output is not what it was")


def flat(output: Any) -> Iterator[Tensor]:
    """Every tensor in a model's output, in order."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from flat(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from flat(value)
    elif hasattr(output, "sample"):
        yield output.sample


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def hooks(model: nn.Module) -> list[str]:
    """Modules with hooks; some models of Transformers put their own on themselves at the first forward pass."""
    return [name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks]


def differs(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) != len(b) or not all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def same(a: list[Tensor], b: list[Tensor], otherwise: str) -> None:
    if differs(a, b):
        apart = [
            float((x - y).abs().max())
            for x, y in zip(a, b, strict=False)
            if x.shape == y.shape and x.is_floating_point() and x.numel()
        ]
        raise Defect(f"{otherwise} (largest difference {max(apart, default=float('nan')):.1e})")


# ------------------------------------------------------------------------------------------------------------------------- the page

INTRODUCTION = """# Support

Which method works on which model family. `tools/make_support.py` writes this page by trying each pair on a tiny model with random weights: attach,
prove on a batch that every site is called and gets a gradient, train one step, save, load into a fresh model, merge and unmerge where the method
merges, detach. The loaded model must give the same output as the saved one, bit for bit; so must the detached model and the one that came in.

Methods are as configured by default, but for their size (rank, bottleneck, length), which is {size}: the tiny models are 32 wide. Those that build on
adapters trained before are left out. {counts}

| in the table | means |
|---|---|
| yes | works as it is |
| told *n* | this model has not the usual places; works with [setting *n*](#settings) |
| no *n* | refused before anything trains, for [reason *n*](#refusals) |
| – | not tried: the package is not installed where this page was made |

A model family that is not in the list is likely to work: the anatomy is inferred, not tabulated. `petiole anatomy --model …` says what was found, and
`tuned.check(batch)` proves the rest.
"""


def page(cells: Sequence[Cell]) -> str:
    """docs/support.md as text."""
    tried = [c for c in cells if c.outcome != "absent"]
    number = {outcome: sum(c.outcome == outcome for c in tried) for outcome in ("works", "told", "refused", "failed")}
    counts = (
        f"Of {len(tried)} pairs {number['works']} work by default and {number['told']} when told where to sit; {number['refused']} are refused"
        + (f"; **{number['failed']} fail**." if number["failed"] else "; none fails.")
    )
    told = numbered(c.setting for c in cells if c.outcome == "told")
    refused = numbered(plain(c) for c in cells if c.outcome in ("refused", "failed"))
    slugs = list(dict.fromkeys(c.slug for c in cells))
    families = list(dict.fromkeys(c.family for c in cells))
    by = {(c.family, c.slug): c for c in cells}
    lines = [INTRODUCTION.format(size=SIZE, counts=counts)]
    for group in sorted({registry()[slug].family() for slug in slugs}):
        members = [slug for slug in slugs if registry()[slug].family() == group]
        lines += [f"## {group}", ""]
        lines += row("model", *(f"[{slug}](methods/{slug}.md)" for slug in members))
        lines += row(*["---"] * (len(members) + 1))
        for family in families:
            lines += row(f"`{family}`", *(mark(by[family, slug], told, refused) for slug in members))
        lines.append("")
    lines += ["## Settings", "", *row("n", "setting", "pairs"), *row("---:", "---", "---:")]
    used = Counter(c.setting for c in cells if c.outcome == "told")
    lines += [line for text, n in told.items() for line in row(str(n), f"`{text}`", str(used[text]))]
    lines += ["", "## Refusals", "", *row("n", "reason", "pairs"), *row("---:", "---", "---:")]
    used = Counter(plain(c) for c in cells if c.outcome in ("refused", "failed"))
    lines += [line for text, n in refused.items() for line in row(str(n), text, str(used[text]))]
    stuck: dict[str, list[str]] = {}
    for c in cells:
        if c.merges not in ("", "yes", "no"):
            stuck.setdefault(plain(replace(c, reason=c.merges)), []).append(f"`{c.slug}` on `{c.family}`")
    lines += ["", "## Merging", ""]
    lines.append(
        "Every pair that works and whose method merges also merged within rounding, and unmerged bit for bit"
        + (", but for:" if stuck else ".")
    )
    lines += [""] * bool(stuck) + [f"- {', '.join(pairs)}: {reason}" for reason, pairs in stuck.items()]
    absent = {c.family: c.reason for c in cells if c.outcome == "absent"}
    if absent:
        lines += ["", "Not tried: " + ", ".join(f"`{family}` ({reason})" for family, reason in absent.items()) + "."]
    return "\n".join(lines) + "\n"


def row(*texts: str) -> list[str]:
    return ["| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"]


def numbered(texts: Iterator[str]) -> dict[str, int]:
    """Each different text and its number, the most frequent first."""
    ordered = sorted(Counter(texts).items(), key=lambda item: (-item[1], item[0]))
    return {text: i + 1 for i, (text, _) in enumerate(ordered)}


def plain(cell: Cell) -> str:
    """A reason without the names of this method and this model."""
    text = cell.reason.removeprefix(f"{cell.slug}: ").removeprefix(f"{cell.slug} ")
    text = re.sub(rf"\b{class_of(cell.family)}\b", "the model", text)
    text = re.sub(r" \(roles=.*?\)(?=$|[;\n])|; nearest: [^;]*", "", text)
    text = re.sub(r"(the attention of the model) \(\w+\)", r"\1", text)
    text = text.split("; ")[0] if text.startswith("the model: no ") else text
    return ("**failed**: " if cell.outcome == "failed" else "") + text.strip()


@cache
def class_of(family: str) -> str:
    """Class name of a family's model."""
    return type(tiny.model(family)).__name__


def mark(cell: Cell, told: dict[str, int], refused: dict[str, int]) -> str:
    """A cell of the table."""
    if cell.outcome == "told":
        return f"told {told[cell.setting]}"
    if cell.outcome in ("refused", "failed"):
        return f"{'no' if cell.outcome == 'refused' else '**fails**'} {refused[plain(cell)]}"
    return "yes" if cell.outcome == "works" else "–"


# -------------------------------------------------------------------------------------------------------------------- command line

SHORT = {"works": "yes", "told": "told", "refused": "no", "failed": "FAILED", "absent": "-"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Which method works on which model family.")
    slugs = [
        slug for slug, cls in registry().items() if not cls.builds_on
    ]  # others need an adaptation there before them
    parser.add_argument("-f", "--families", nargs="+", default=list(tiny.NAMES), choices=tiny.NAMES, metavar="FAMILY")
    parser.add_argument("-m", "--methods", nargs="+", default=slugs, choices=slugs, metavar="SLUG")
    parser.add_argument("--json", type=Path, help="write the cells to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cells: list[Cell] = []
    for family in options.families:
        found = [cell(family, registry()[slug]) for slug in options.methods]
        cells += found
        print(f"{family:18} " + " ".join(SHORT[c.outcome] for c in found), flush=True)
        for c in found:
            if c.outcome in ("told", "refused", "failed"):
                print(f"    {c.slug}: {c.outcome} {c.setting or 'at ' + c.stage}: {c.reason}")
            if c.merges not in ("yes", "no", ""):
                print(f"    {c.slug}: not merged: {c.merges}")
    if options.json:
        options.json.write_text(json.dumps([asdict(c) for c in cells], indent=1) + "\n")
    if set(options.families) == set(tiny.NAMES) and set(options.methods) == set(slugs):
        PAGE.write_text(page(cells))
        print(f"written: {PAGE.relative_to(ROOT)}")
    print(", ".join(f"{sum(c.outcome == outcome for c in cells)} {outcome}" for outcome in SHORT))
    return 1 if any(c.outcome == "failed" for c in cells) else 0


if __name__ == "__main__":
    raise SystemExit(main())
