"""Margin softmax: each identity has a direction, and an embedding must come nearer to its own than it would need to.

cos_c = <e, w_c> / (|e| |w_c|)        logits s cos_c, of the target y:   cosface  s (cos_y - m)          Wang et al. 2018, arXiv 1801.09414
                                                                        arcface  s cos(arccos cos_y + m)  Deng et al. 2019, arXiv 1801.07698
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from petiole.errors import ConfigError

Kind = Literal["cosface", "arcface"]
VALUES: dict[Kind, float] = {"cosface": 0.4, "arcface": 0.5}
EDGE = 1e-7  # of the arc cosine, whose slope is infinite at 1


class Margin(nn.Module):
    """Embeddings (B, d) -> logits (B, classes), with the margin where labels are given.

    Args:
        num_classes: training identities. size: d.
        kind: where the margin is taken off: the cosine, or the angle in radians.
        value: m; 0.4 or 0.5 if None.
        scale: s.

    Raises:
        ConfigError: a value is out of range.
    """

    def __init__(
        self, num_classes: int, size: int, kind: Kind = "cosface", value: float | None = None, scale: float = 64.0
    ) -> None:
        super().__init__()
        if num_classes < 2 or size < 1 or kind not in VALUES or scale <= 0 or not 0 <= (value or 0) < 2:
            raise ConfigError(
                f"margin: {num_classes} classes, size {size}, {kind!r}, value {value}, scale {scale}\n"
                "2 classes and more, size from 1, cosface or arcface, a value in [0, 2), a positive scale"
            )
        self.kind, self.scale = kind, scale
        self.value = VALUES[kind] if value is None else value
        self.in_features, self.out_features = size, num_classes
        self.weight = nn.Parameter(torch.empty(num_classes, size))  # w (classes, d)
        nn.init.normal_(self.weight, std=0.01)

    def forward(self, embeddings: Tensor, labels: Tensor | None = None) -> Tensor:
        """In float32 or better, whatever the embeddings are: the margin is small beside what half precision rounds."""
        with torch.autocast(embeddings.device.type, enabled=False):
            kind = torch.promote_types(embeddings.dtype, torch.float32)
            e, w = (nn.functional.normalize(t.to(kind), dim=1) for t in (embeddings, self.weight))
            cosines = e @ w.T
            if labels is None:
                return self.scale * cosines
            target = cosines.gather(1, labels[:, None])
            if self.kind == "cosface":
                target = target - self.value
            else:
                target = (target.clamp(-1 + EDGE, 1 - EDGE).acos() + self.value).cos()
            return self.scale * cosines.scatter(1, labels[:, None], target)
