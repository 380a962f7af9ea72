"""Structural pruning: which rows and columns of a backbone's weights a narrower copy keeps.  Sung et al. 2022, arXiv 2206.06522, section 3.

    keep(M) = the rows of M with the largest L1 norms, in ascending order; round((1 - 1/r) rows) are left out

Along the network, `current` are the residual features that are kept. They are the columns of what reads the residual state, and an
output projection, restricted to the columns that come in, chooses new ones: features are not aligned from one sub-layer to the next.
Roles say what is read and written, so no names of modules are known here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from petiole.anatomy import Anatomy, Block, Site, Stack
from petiole.attach import host_of
from petiole.errors import TrainingError
from petiole.method import view

Importance = Mapping[str, Tensor]  # by the name of a parameter, of its shape
Chosen = dict[Site, tuple[Tensor, Tensor | None]]  # rows and columns that each weight keeps; a norm has rows alone


def keep(scores: Tensor, reduction_factor: int) -> Tensor:
    """Scores (rows, columns) -> indices of the rows kept, ascending."""
    rows = scores.shape[0]
    removed = round((1 - 1 / reduction_factor) * rows)
    order = torch.argsort(scores.abs().double().sum(1), stable=True)
    return order[removed:].sort().values


class Walk:
    """Goes along a backbone in the order in which it runs.

    Args:
        importance: of the backbone's weights.
        reduction_factor: r.
    """

    def __init__(self, anatomy: Anatomy, model: nn.Module, importance: Importance, reduction_factor: int) -> None:
        self.anatomy, self.model, self.r = anatomy, model, reduction_factor
        self.importance = importance
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}

    def of(self, site: Site) -> Tensor:
        """Importance of a site's weight, (out, in)."""
        weight = self.model.get_submodule(site.path)._parameters[site.parameter]
        return view(site, self.importance[self.names[id(weight)]]).flatten(1).float()

    def start(self, stack: Stack) -> Tensor:
        """The residual features that the embedding keeps; where it has another width, those that the first block reads most."""
        for site in self.anatomy.outside:
            if site.role in ("embedding", "patch_embedding") and site.out_features == stack.blocks[0].hidden_size:
                return keep(self.of(site), self.r)
        first = next(site for site in stack.blocks[0].sites if site.role == "q")
        return keep(self.of(first).T, self.r)

    def stack(self, stack: Stack, current: Tensor) -> tuple[list[Chosen], Tensor]:
        """What the weights of each block keep, and the residual features after the last."""
        found = []
        for block in stack.blocks:
            chosen, current = self.block(block, current)
            found.append(chosen)
        return found, current

    def block(self, block: Block, current: Tensor) -> tuple[Chosen, Tensor]:
        chosen: Chosen = {}
        layers = [s for s in block.sites if s.role in ("attention", "cross_attention", "ffn")]
        layers.sort(key=lambda s: ("attention", "cross_attention", "ffn").index(s.role))
        norms = [s for s in block.sites if s.role == "norm" and not s.within and s.out_features == block.hidden_size]
        after = self.anatomy.closing_norm(next(s for s in layers if s.role == "attention")) is not None
        paired = dict(zip(layers, norms, strict=True)) if len(layers) == len(norms) else {}
        for layer in layers:
            if layer in paired and not after:
                chosen[paired[layer]] = (current, None)
            current = self.sublayer(block, layer, current, chosen)
            if layer in paired and after:
                chosen[paired[layer]] = (current, None)
        return chosen, current

    def sublayer(self, block: Block, layer: Site, current: Tensor, chosen: Chosen) -> Tensor:
        own = {s.role: s for s in block.sites if s.within == layer.role and s.kind == "linear"}
        if layer.role == "ffn":
            into = [own[role] for role in ("up", "gate") if role in own]
            rows = keep(product(self.of(site)[:, current] for site in into), self.r)
            chosen.update(dict.fromkeys(into, (rows, current)))
            last, columns = own["down"], rows
        else:
            inside, columns = self.heads(layer, own, current)
            chosen.update(inside)
            last = own["o"]
        rows = keep(self.of(last)[:, columns], self.r)
        chosen[last] = (rows, columns)
        return rows

    def heads(self, layer: Site, own: Mapping[str, Site], current: Tensor) -> tuple[Chosen, Tensor]:
        """Rows of q, k and v, one choice for all three. Queries that share keys take, in each head, the rows that their keys keep."""
        q, k, v = (self.of(own[role])[:, current] for role in ("q", "k", "v"))
        size = layer.head_size
        shared = q.shape[0] // k.shape[0]
        grouped = q.view(-1, shared, size, q.shape[1])  # (key-value heads, heads that share one, size, columns)
        rows = keep(grouped.sum(1).reshape(k.shape) * k * v, self.r)
        mine = torch.zeros(k.shape[0], dtype=torch.bool)
        mine[rows.cpu()] = True
        queries = mine.view(-1, 1, size).expand(-1, shared, -1).reshape(-1).nonzero()[:, 0].to(rows.device)
        return {own["q"]: (queries, current), own["k"]: (rows, current), own["v"]: (rows, current)}, queries


def product(scores: Iterable[Tensor]) -> Tensor:
    first, *others = scores
    for other in others:
        first = first * other
    return first


# ------------------------------------------------------------------------------------------------------------------- importance


def magnitude(model: nn.Module) -> dict[str, Tensor]:
    """|θ| of every weight of the backbone."""
    return {name: p.detach().abs() for name, p in backbone_parameters(model) if p.is_floating_point()}


def fisher(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    loss: Callable[[Any], Tensor] | None = None,
    samples: int = 1024,
) -> dict[str, Tensor]:
    """Diagonal of the Fisher information of every weight of the backbone: Σ (∂ loss / ∂θ)² over samples, one at a time.

    The model is left as it was; what is attached to it does not act.

    Args:
        batches: of training data, with true labels; any iterable of the model's arguments, such as a loader.
        loss: from the model's output to a scalar; its `loss` if None.
        samples: how many are taken, if there are as many.

    Raises:
        TrainingError: there is no sample, or no loss.
    """
    from petiole.attach import disabled

    named = [(name, p) for name, p in backbone_parameters(model) if p.is_floating_point() and p.ndim > 1]
    flags, modes = [p.requires_grad for _, p in named], [(m, m.training) for m in model.modules()]
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in named}
    seen = 0
    try:
        model.eval()
        for _, parameter in named:
            parameter.requires_grad_(True)
        for row in rows_of(batches):
            if seen == samples:
                break
            if host_of(model) is not None:
                with disabled(model), torch.enable_grad():
                    output = model(**row)
            else:
                output = model(**row)
            value = loss(output) if loss is not None else getattr(output, "loss", None)
            if not isinstance(value, Tensor):
                raise TrainingError("importance needs a loss: put labels into the batches, or give `loss`")
            gradients = torch.autograd.grad(value, [p for _, p in named], allow_unused=True)
            for (name, _), gradient in zip(named, gradients, strict=True):
                if gradient is not None:
                    sums[name] += gradient.float().square()
            seen += 1
    finally:
        for (_, parameter), flag in zip(named, flags, strict=True):
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode
    if not seen:
        raise TrainingError("importance needs training data, but there is no batch")
    return sums


def backbone_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The backbone's own, without what is attached."""
    return [(n, p) for n, p in model.named_parameters() if not any(part.startswith("petiole") for part in n.split("."))]


def rows_of(batches: Iterable[Mapping[str, Any]]) -> Iterable[dict[str, Any]]:
    """Batches of one sample each."""
    for batch in batches:
        size = next(len(v) for v in batch.values() if isinstance(v, Tensor) and v.ndim)
        for row in range(size):
            yield {
                name: v[row : row + 1] if isinstance(v, Tensor) and v.ndim and len(v) == size else v
                for name, v in batch.items()
            }


__all__ = ["Chosen", "Importance", "Walk", "fisher", "keep", "magnitude"]
