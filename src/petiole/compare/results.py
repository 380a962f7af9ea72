"""Trials on disk: one row of JSON for each, written when it ends; and the folder's settings, which must not change under them.

settings.json   what every trial depends on; written once, before the first trial
trials.jsonl    one line for each trial, appended durably; a torn last line counts as not written
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from petiole import files
from petiole.compare.settings import digest
from petiole.errors import ConfigError, FileError

FORMAT = 1
SETTINGS, TRIALS, ADAPTATIONS = "settings.json", "trials.jsonl", "adaptations"
Kind = Literal["tune", "cost", "run"]


@dataclass(frozen=True)
class Trial:
    """What came of one trial.

    Attributes:
        key: identity; two trials with one key would be the same computation.
        row: label of the table's row.
        kind: "tune" is scored on validation alone; "cost" is measured, not scored; "run" is a repeated run with the chosen values.
        number: ordinal among the row's trials of this kind.
        config: the methods, as in an adaptation's file.
        status, reason: whether it ended well, and if not, why. traceback: of an error that petiole does not know.
        scores: by split, then by metric.
        forgetting: score on the held-out set before and after.
        cost: see `petiole.cost.Cost.to_dict`.
        losses: (step, mean training loss since the one before).
        course: (step, score on validation).
        steps, seconds, step_seconds: of training alone; the last is the median of one step. share: processor
            time over wall time. wall_seconds: of the whole trial.
        outputs: digest of the model's outputs on one batch: equal where nothing was changed.
        file: of the adaptation, relative to the folder; file_bytes: its size.
        beside: whether other trials could run at the same time on the same machine; its times then say little.
    """

    key: str
    row: str
    kind: Kind
    number: int
    config: list[dict[str, Any]]
    seed: int
    learning_rate: float | None = None
    size: int | None = None
    status: Literal["done", "failed"] = "done"
    reason: str = ""
    traceback: str = ""
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    forgetting: dict[str, float] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    losses: list[list[float]] = field(default_factory=list)
    course: list[list[float]] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    step_seconds: float | None = None
    share: float | None = None
    wall_seconds: float = 0.0
    outputs: str = ""
    file: str = ""
    file_bytes: int | None = None
    beside: bool = False

    @property
    def done(self) -> bool:
        return self.status == "done"

    def score(self, split: str, metric: str) -> float | None:
        """One figure, None if it isn't there."""
        return self.scores.get(split, {}).get(metric)


def file_of(label: str) -> str:
    """Where a row's adaptation lies in the folder: what is unusual in its label is replaced, and a digest keeps two apart."""
    plain = re.sub(r"[^A-Za-z0-9_+=-]+", "-", label).strip("-")[:80]
    name = plain if plain == label else f"{plain}-{digest(label)[:6]}"
    return f"{ADAPTATIONS}/{name}.petiole.safetensors"


def key_of(identity: Mapping[str, Any], **about: Any) -> str:
    """The identity of a trial: a digest of everything that it depends on."""
    text = json.dumps({**identity, **about}, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


class Results:
    """The trials in a folder. `add` writes; what was there before is found by its key.

    Args:
        folder: of the run.
        retry: forget the trials that failed, so that they are tried again.

    Raises:
        FileError: a row in the middle is damaged; names the line.
    """

    def __init__(self, folder: Path, retry: bool = False) -> None:
        self.path = folder / TRIALS
        self.by_key: dict[str, Trial] = {}
        self.torn = False
        if self.path.exists():
            rows, torn = files.read_lines(self.path)
            self.torn = bool(torn)
            for number, text in enumerate(rows, start=1):
                trial = parse(text, self.path, number)
                if trial.done or not retry:
                    self.by_key[trial.key] = trial
                else:
                    self.by_key.pop(trial.key, None)

    def get(self, key: str) -> Trial | None:
        return self.by_key.get(key)

    def add(self, trial: Trial) -> None:
        """Write a trial; afterwards it is on the disk."""
        files.append_line(
            self.path, json.dumps(asdict(trial), separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        )
        self.by_key[trial.key] = trial


_FIELDS = {f.name for f in fields(Trial)}
_NEEDED = {"key", "row", "kind", "number", "config", "seed", "status"}


def parse(text: str, path: Path, number: int) -> Trial:
    """One line -> a trial.

    Raises:
        FileError: not JSON, or not a trial of this version.
    """
    advice = "Remove the line to run that trial again, or choose another --output."
    try:
        value = json.loads(text)
    except ValueError:
        raise FileError(f"{path}, line {number}: not JSON.\n{advice}") from None
    if (
        not isinstance(value, dict)
        or not _NEEDED <= set(value) <= _FIELDS
        or not all(isinstance(value[n], str) for n in ("key", "row"))
    ):
        raise FileError(f"{path}, line {number}: not a trial as this version writes it.\n{advice}")
    return Trial(**value)


# ---------------------------------------------------------------------------------------------------------------------- settings


def settle(folder: Path, identity: Mapping[str, Any], asked: Mapping[str, Any], command: str) -> bool:
    """Make a folder for a run, or see that the run in it is this one.

    Args:
        identity: what every trial depends on: it must not change.
        asked: how much of it is wanted (methods, seeds, trials, axes): that may grow, and what is done is kept.
        command: to run it again.

    Returns:
        Whether a run was there already.

    Raises:
        ConfigError: another run is there; names what differs.
        FileError: the folder can't be written, or holds trials without settings.
    """
    files.check_writable(folder)
    path = folder / SETTINGS
    plain = json.loads(json.dumps(identity))
    if path.exists():
        there = files.read_json(path)
        known = there.get("identity") if isinstance(there, dict) and there.get("format") == FORMAT else None
        if not isinstance(known, dict):
            raise FileError(
                f"{path}: not the settings of a comparison as this version writes them.\nChoose another --output."
            )
        differing = [
            name for name in (*plain, *(n for n in known if n not in plain)) if known.get(name) != plain.get(name)
        ]
        if differing:
            shown = "; ".join(
                f"{name}: {short(known.get(name))} there, {short(plain.get(name))} now" for name in differing[:3]
            )
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise ConfigError(
                f"{folder} holds a comparison with other settings, which this one would be mixed with.\n{shown}{more}\n"
                "Choose another --output, or give the settings as they were."
            )
        if there.get("asked") != json.loads(json.dumps(asked)):
            files.write_json(path, {**there, "asked": asked, "command": command})
        return True
    if (folder / TRIALS).exists():
        raise FileError(
            f"{folder}: has {TRIALS} but no {SETTINGS}, so what its trials are of is unknown.\nChoose another --output."
        )
    files.write_json(path, {"format": FORMAT, "identity": plain, "asked": asked, "command": command})
    return False


def short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep a second process off the folder; the system lets go when this one ends, however it ends.

    Raises:
        ConfigError: another process is at work in it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{folder}: another process is running this comparison.\nWait for it, or choose another --output."
            ) from None
        except OSError:  # some network file systems have no locks
            pass
        yield
    finally:
        os.close(handle)
