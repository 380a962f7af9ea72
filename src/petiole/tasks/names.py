"""Where a data set or a model is to be found: on this machine, in the package, or on the Hub when its name says so.

A name reaches the network only if it is spelt `owner/name` and nothing of that name, nor its folder, is here; or `hub:name`. So a
misspelt path is an error, not a download.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from petiole.errors import FileError

_HUB = re.compile(r"(?P<name>\w[\w.-]*(?:/\w[\w.-]*)?)(?::(?P<subset>[\w.-]+))?")


class HubName(NamedTuple):
    """A repository on the Hub and, for data sets of several parts, the part."""

    name: str
    subset: str | None


def hub_name(source: str) -> HubName | None:
    """`owner/name`, `owner/name:subset` or `hub:name` -> its parts; None if it isn't spelt so or may be a path here."""
    explicit = source.startswith("hub:")
    match = _HUB.fullmatch(source.removeprefix("hub:"))
    if match is None:
        return None
    name = match["name"]
    if not explicit and ("/" not in name or Path(name).parent.is_dir() or Path(name).exists()):
        return None
    return HubName(name, match["subset"])


def nearest(name: str, candidates: Iterable[str]) -> str:
    """ "; did you mean 'x'?" or nothing."""
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def listed(names: Iterable[str], most: int = 12) -> str:
    """The names, quoted, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(name) for name in names[:most]) + more


class ModelPlace(NamedTuple):
    """What `from_pretrained` needs to find a model.

    Attributes:
        name: a folder, or a name on the Hub.
        local: it is a folder: nothing is to be looked up.
    """

    name: str
    local: bool


def locate_model(model: str | Path) -> ModelPlace:
    """Find a model: a folder, `petiole:vit-cifar10` or `petiole:minilm` from an installed package, or a Hub name.

    Raises:
        FileError: no such folder, or a folder without configuration and safetensors.
        MissingExtra: the package that brings `petiole:minilm` isn't installed.
    """
    text = str(model)
    if text.startswith("petiole:"):
        return ModelPlace(str(_packaged(text.removeprefix("petiole:"))), True)
    folder = Path(text).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileError(f"{text}: no config.json in this folder\nGive the folder that `save_pretrained` wrote.")
        return ModelPlace(str(folder), True)
    if isinstance(model, str) and (hub := hub_name(text)) and hub.subset is None and not folder.exists():
        return ModelPlace(hub.name, False)
    raise FileError(
        f"{text}: no such model folder\n"
        "Give a folder with config.json and safetensors, petiole:vit-cifar10, petiole:minilm, or a name on the Hub as owner/name."
    )


def _packaged(name: str) -> Path:
    if name == "minilm":
        from petiole.tasks.text_demo import minilm_path

        return minilm_path()
    assets = Path(str(files("petiole"))) / "assets"
    known = (
        sorted(path.name for path in assets.iterdir() if (path / "config.json").is_file()) if assets.is_dir() else []
    )
    if name not in known:
        raise FileError(f"petiole:{name}: no such model in the package\nThere are {listed([*known, 'minilm'])}.")
    return assets / name


def one_line(error: BaseException) -> str:
    """What another library said, short enough for one of our lines."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
