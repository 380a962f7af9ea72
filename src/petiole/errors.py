"""Every error a user can cause: one type each, a few clear lines, raised before anything has changed."""

from __future__ import annotations

import importlib
from types import ModuleType


class PetioleError(Exception):
    """Base of all errors that petiole raises on purpose. The command line prints it without a traceback."""


class ConfigError(PetioleError, ValueError):
    """A configuration field has a value outside its allowed range."""


class AnatomyError(PetioleError, LookupError):
    """A stack, role, depth or name was not found in the backbone."""


class AttachError(PetioleError, RuntimeError):
    """A method can't sit on this backbone, or the model is not in the state that the call needs."""


class FileError(PetioleError, OSError):
    """A file is damaged, of another kind or version, belongs to another backbone, or can't be written."""


class DataError(PetioleError, ValueError):
    """A data set is missing columns, labels or rows, or a file in it can't be read."""


class TrainingError(PetioleError, RuntimeError):
    """Training can't go on or would be in vain: a loss that is not finite, a site that never fired."""


class MissingExtra(PetioleError, ImportError):
    """An optional dependency is not installed."""


def need(extra: str, module: str) -> ModuleType:
    """Import an optional module, or say which extra brings it.

    Args:
        extra: name of the extra in `pyproject.toml`.
        module: the module to import.

    Raises:
        MissingExtra: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingExtra(f"{package} is not installed: pip install 'petiole[{extra}]'") from error
