"""Recognition as a task: poor images of people, looked up among good images of people, none of whom training has seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from petiole.errors import ConfigError
from petiole.tasks.encoding import Rows
from petiole.tasks.face.faces import Faces
from petiole.tasks.face.metrics import cosines, fused, identification, verification
from petiole.tasks.face.model import FaceModel
from petiole.tasks.generated import Generated
from petiole.tasks.loop import batches, evaluating

IDENTITIES = {"train": 32, "validation": 16, "test": 32}
IMAGES = {"train": 16, "gallery": 2, "probe": 4}
QUALITY = {"train": (0.2, 1.0), "gallery": (1.0, 1.0), "probe": (0.2, 0.35)}


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Rows -> a batch: each of their tensors and numbers on top of each other."""
    return {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}


def embed(model: nn.Module, rows: Rows, *, flip: bool = True, batch_size: int = 32) -> tuple[Tensor, Tensor]:
    """Unit embeddings (n, d) and labels (n,) of rows, on the CPU; the model is left in the mode it was in.

    Args:
        model: a `FaceModel`, or any whose output has `embeddings`.
        rows: a data set of {"pixel_values", "labels"}; with "quality" too, the model is given that.
        flip: embed the mirror image as well, and fuse both. It is judged by itself, unless its quality is given.
    """
    found, labels = [], []
    with evaluating(model):
        for batch in batches(rows, collate, batch_size, model):
            pixels = batch["pixel_values"]
            given = {"quality": batch["quality"]} if "quality" in batch else {}
            own = model(pixel_values=pixels, **given).embeddings.float()
            mirrored = model(pixel_values=pixels.flip(-1), **given).embeddings.float() if flip else own
            found.append(fused(own, mirrored).cpu())
            labels.append(batch["labels"].cpu())
    return torch.cat(found), torch.cat(labels)


class Scored(Dataset[dict[str, Any]]):
    """Rows with the quality of their image beside them, which is computed once: for images that no augmentation changes.

    Args:
        rows: a data set of {"pixel_values": (3, H, W), …}.
        judge: images (B, 3, H, W) in [0, 1] -> (B,); a module is put in evaluation mode.
        mean, std: what the image processor subtracted, and by what it divided then.
    """

    def __init__(self, rows: Rows, judge: Callable[[Tensor], Tensor], *, mean: float = 0.5, std: float = 0.5) -> None:
        self.rows, self.judge = rows, judge.eval() if isinstance(judge, nn.Module) else judge
        self.mean, self.std = mean, std
        self._kept: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        if index not in self._kept:
            with torch.no_grad():
                self._kept[index] = self.judge(row["pixel_values"][None] * self.std + self.mean).reshape(())
        return {**row, "quality": self._kept[index]}


def recognise(
    model: nn.Module,
    gallery: Rows,
    probes: Rows,
    *,
    ranks: Sequence[int] = (1, 5),
    rates: Sequence[float] = (0.1, 0.01),
    flip: bool = True,
    batch_size: int = 32,
) -> dict[str, float]:
    """Identification of probes in a gallery, and verification of all pairs of a probe and a gallery image.

    Args:
        gallery, probes: rows as in `embed`; every probe's identity is in the gallery.
        ranks, rates: see `identification` and `verification`.
    """
    theirs, names = embed(model, gallery, flip=flip, batch_size=batch_size)
    mine, labels = embed(model, probes, flip=flip, batch_size=batch_size)
    found = identification(mine, labels, theirs, names, ranks)
    return found | verification(cosines(mine, theirs), labels[:, None] == names, rates)


class FaceRecognition(Generated[Faces]):
    """Recognition of generated faces. Identities of different splits are different people.

    Args:
        identities: of each split.
        images: of each identity: to train on, in a gallery, as probes.
        quality: smallest and largest share of the resolution that is left, for each of the same.
        size: height and width of an image.
        with_quality: whether rows tell the exact share; without it, a method has to judge the image.
        seed: of the faces.
        faces: further settings of `Faces`.
    """

    main_metric = "rank1"
    higher_is_better = True

    def __init__(
        self,
        identities: Mapping[str, int] | None = None,
        *,
        images: Mapping[str, int] | None = None,
        quality: Mapping[str, tuple[float, float]] | None = None,
        size: int = 32,
        with_quality: bool = False,
        seed: int = 0,
        **faces: Any,
    ) -> None:
        self.identities = {**IDENTITIES, **(identities or {})}
        counts, shares = {**IMAGES, **(images or {})}, {**QUALITY, **(quality or {})}
        for field, known, given in (
            ("identities", IDENTITIES, identities),
            ("images", IMAGES, images),
            ("quality", QUALITY, quality),
        ):
            if extra := set(given or ()) - set(known):
                raise ConfigError(f"{field} names {min(extra)!r}, which is none of {', '.join(known)}")
        self.splits: dict[str, Faces] = {}
        for number, (split, count) in enumerate(self.identities.items()):
            for part, first in (
                {"train": 0}.items() if split == "train" else {"gallery": 0, "probe": counts["gallery"]}.items()
            ):
                self.splits[split if part == "train" else f"{split}-{part}"] = Faces(
                    count,
                    counts[part],
                    quality=shares[part],
                    first=first,
                    size=size,
                    with_quality=with_quality,
                    seed=len(self.identities) * seed + number,
                    **faces,
                )

    def build_model(self, backbone: nn.Module, **options: Any) -> FaceModel:
        """The backbone with a projection and the training identities; see `FaceModel` for options."""
        return FaceModel(backbone, self.identities["train"], **options)

    # Splits: train, and of the others their gallery and their probes ("test-probe").
    collator = staticmethod(collate)

    def evaluate(self, model: nn.Module, split: str = "validation", **options: Any) -> dict[str, float]:
        """Figures of `recognise` for the probes of a split in its gallery; it takes `options`."""
        return recognise(model, self.encoded(f"{split}-gallery"), self.encoded(f"{split}-probe"), **options)
