"""`petiole demo`: the comparison with a preset that needs no download and fits into minutes on one core.

The small ViT that ships with petiole learnt from photos at 16, 24 and 32 pixels in turn. Handwritten digits have 8 x 8 pixels, so the demo
takes it at 16 pixels: its position embeddings are interpolated, as was done in its training, and a step costs a third. What is made is an
ordinary model folder, so every command of the demo's report works on it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from petiole import files
from petiole.errors import FileError

SOURCE, DATA, PIXELS = "petiole:vit-cifar10", "sklearn:digits", 16


def backbone(folder: Path, pixels: int = PIXELS) -> Path:
    """Write the shipped ViT for images of `pixels` x `pixels` to a folder, unless it is there."""
    import safetensors.torch

    from petiole.tasks import locate_model

    if (folder / "config.json").is_file():
        return folder
    source = Path(locate_model(SOURCE).name)
    files.check_writable(folder)
    config, processor = (files.read_json(source / name) for name in ("config.json", "preprocessor_config.json"))
    tensors = safetensors.torch.load(files.read_bytes(source / "model.safetensors"))
    name = next((name for name in tensors if name.endswith("position_embeddings")), None)
    if name is None:
        raise FileError(f"{source}: no position embeddings; the package is damaged, install it again")
    tensors[name] = resized(tensors[name], pixels // int(config["patch_size"]))
    files.write_bytes(folder / "model.safetensors", safetensors.torch.save(tensors, {"format": "pt"}))
    files.write_json(folder / "preprocessor_config.json", {**processor, "size": {"height": pixels, "width": pixels}})
    files.write_json(folder / "config.json", {**config, "image_size": pixels})  # last: with it the folder is whole
    return folder


def resized(table: Any, side: int) -> Any:
    """Position embeddings (1, 1 + n², d) -> (1, 1 + side², d), the first token's as it is, the others' by bicubic interpolation."""
    import torch

    first, rest = table[:, :1].float(), table[:, 1:].float()
    old = round(rest.shape[1] ** 0.5)
    grid = rest.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([first, grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1).to(table.dtype)


def preset() -> dict[str, Any]:
    """What the demo asks for: as much as fits into some minutes on one core.

    One thread: on this model a second one gains a tenth at best, and beside other work it loses far more.
    """
    return {
        "methods": "linear-probe,bitfit,lora,ia3,houlsby,parallel-adapter,prefix-tuning,vpt",
        "steps": 32,
        "batch_size": 16,
        "evaluations": 2,
        "limit": {"validation": 200},
        "threads": 1,
    }
