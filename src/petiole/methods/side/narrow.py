"""A backbone's block, norm and rotary embedding again, r times narrower: of its own class, from a copy of its configuration.

The widths among the fields of a configuration are found by name and value. Whether that was right is seen at the modules that come out:
each of their weights must be r times smaller both ways than what it stands beside, or it is refused.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from petiole.anatomy import Anatomy, Block, Site, Stack
from petiole.attach import beneath
from petiole.errors import AttachError
from petiole.method import view, view_bias

_WIDTHS = (
    "hidden_size", "intermediate_size", "d_model", "d_ff", "d_kv", "head_dim", "ffn_dim", "n_embd", "n_inner", "embed_dim",
    "hidden_dim", "dim",
)  # fmt: skip
_RATES = ("dropout_rate", "hidden_dropout_prob", "hidden_dropout", "resid_pdrop", "dropout")


class Narrow:
    """Builds what stands beside one stack.

    Args:
        slug: of the method, for refusals. model: the backbone. reduction_factor: r. dropout: of the blocks; the backbone's if None.

    Raises:
        AttachError: r does not divide a width, or the stack's blocks can't be built so.
    """

    def __init__(
        self, slug: str, anatomy: Anatomy, model: nn.Module, stack: Stack, reduction_factor: int, dropout: float | None
    ) -> None:
        self.slug, self.model, self.stack, self.r = slug, model, stack, reduction_factor
        self.name = f"{slug} on {anatomy.model_class} ({stack.name})"
        sites = [site for block in stack.blocks for site in block.sites]
        attentions = [site for site in sites if site.role in ("attention", "cross_attention")]
        if not all({"attention", "down"} <= {site.role for site in block.sites} for block in stack.blocks):
            raise AttachError(
                f"{self.name} copies blocks of attention and a feed-forward layer, which not all of these are"
            )
        if any(site.kind in ("parameter", "conv") or site.expert >= 0 for site in sites):
            raise AttachError(
                f"{self.name} copies dense blocks of linears and norms; these have experts or convolutions"
            )
        widths = {
            "width": {block.hidden_size for block in stack.blocks},
            "feed-forward width": {site.in_features for site in sites if site.role == "down"},
            "head size": {site.head_size for site in attentions},
        }
        if any(len(found) > 1 for found in widths.values()) or 0 in widths["head size"]:
            raise AttachError(f"{self.name} needs blocks of one width and heads of one size: {widths}")
        self.width, self.inner, self.head = (found.pop() for found in widths.values())
        wrong = [size for size in (self.width, self.inner, self.head) if size % self.r]
        if wrong:
            raise AttachError(
                f"{slug}: reduction_factor = {self.r} does not divide {wrong[0]}; in {stack.name!r} it must divide "
                f"the width {self.width}, the feed-forward width {self.inner} and the head size {self.head}"
            )
        self.source = self.find_config()
        self.config = copy.deepcopy(self.source)
        heads = max(site.heads for site in attentions)
        for field, value in list(vars(self.source).items()):
            width = type(value) is int and value in (self.width, self.inner, self.head, heads * self.head)
            if width and field.endswith(_WIDTHS):
                setattr(self.config, field, value // self.r)
            if type(value) is float and "drop" in field and dropout is not None:
                setattr(self.config, field, dropout)
        self.dropout = dropout_of(self.config)

    @property
    def owner(self) -> nn.Module:
        """The module that holds the list of blocks."""
        return self.model.get_submodule(self.stack.containers[0].rpartition(".")[0])

    def find_config(self) -> Any:
        path = self.stack.containers[0]
        while path:
            path = path.rpartition(".")[0]
            config = getattr(self.model.get_submodule(path), "config", None)
            if hasattr(config, "to_dict"):
                return config
        raise AttachError(f"{self.name} builds blocks from a configuration as in Transformers; this model has none")

    def block(self, depth: int, like: int, number: int) -> nn.Module:
        """A block beside that at `depth`, built as that at `like`; in key-value caches it comes `number` after the backbone's."""
        original = beneath(self.model.get_submodule(self.stack.blocks[like].path))
        given: dict[str, Any] = {}
        for name, parameter in list(inspect.signature(type(original).__init__).parameters.items())[1:]:
            if name == "config":
                given[name] = self.config
            elif name.startswith("layer_i"):
                given[name] = depth
            elif parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                found = [vars(module)[name] for module in original.modules() if name in vars(module)]
                if found:
                    given[name] = found[0]
        try:
            made: nn.Module = type(original)(**given)
        except Exception as error:
            raise AttachError(f"{self.name}: {type(original).__name__} can't be built narrower: {error}") from error
        for module in made.modules():
            if type(getattr(module, "layer_idx", None)) is int:
                module.layer_idx = len(self.stack.blocks) + number  # type: ignore[assignment]
        self.check(self.stack.blocks[like], made)
        return made

    def check(self, block: Block, made: nn.Module) -> None:
        """Every linear of a block came out r times smaller, both ways."""
        for site in block.sites:
            if site.kind == "linear":
                wanted = (site.out_features // self.r, site.in_features // self.r)
                shape = tuple(weight_at(self.narrowed(site), inside(block, site, made)).shape)
                if shape != wanted:
                    raise AttachError(
                        f"{self.name}: {site.key} came out {shape} instead of {wanted}: it can't be built narrower"
                    )

    def narrowed(self, site: Site) -> Site:
        """The site as it is in a narrower block."""
        return replace(site, rows=tuple((start // self.r, stop // self.r) for start, stop in site.rows))

    def norm(self, site: Site | None) -> nn.Module:
        """The stack's final norm, narrower; nothing where it has none."""
        return nn.Identity() if site is None else norm_like(self.model.get_submodule(site.path), self.width // self.r)

    def rotary(self) -> nn.Module | None:
        """What gives cos and sin of a narrower head, where the model has such a module."""
        found = [m for m in self.owner.children() if "rotary" in type(m).__name__.lower()]
        if not found:
            return None
        if (self.head // self.r) % 2:
            raise AttachError(
                f"{self.slug}: heads of size {self.head} / {self.r} can't rotate, which takes pairs; choose another reduction_factor"
            )
        made: nn.Module = type(found[0])(config=self.config)
        return made


def norm_like(original: nn.Module, width: int) -> nn.Module:
    """A new norm of the same class, of another width."""
    if isinstance(original, nn.LayerNorm):
        return nn.LayerNorm(width, original.eps, bias=original.bias is not None)
    eps = getattr(original, "eps", getattr(original, "variance_epsilon", None))
    made: nn.Module = type(original)(width, eps=eps)
    return made


def dropout_of(config: Any) -> float:
    """The rate of dropout of hidden states in a configuration, 0 where there is none."""
    rates = [getattr(config, field) for field in _RATES if isinstance(getattr(config, field, None), float)]
    return rates[0] if rates else 0.0


def inside(block: Block, site: Site, made: nn.Module) -> nn.Module:
    """The module of another block like this that plays a site's part."""
    return made.get_submodule(site.path[len(block.path) + 1 :])


def weight_at(site: Site, module: nn.Module) -> Tensor:
    """A site's weight (out, in), as a view that can be written."""
    return view(site, module._parameters[site.parameter])  # type: ignore[arg-type]


def bias_at(site: Site, module: nn.Module) -> Tensor | None:
    bias = module._parameters.get(site.bias) if site.bias else None
    return None if bias is None else view_bias(site, bias)


def grow(cache: Any, blocks: int, depths: Sequence[int]) -> None:
    """Room in a key-value cache for side blocks, behind that of the backbone's; reordering for beams then includes them.

    Raises:
        AttachError: the cache is of a kind that does not grow.
    """
    from transformers.cache_utils import DynamicLayer

    parts = (
        (cache.self_attention_cache, cache.cross_attention_cache)
        if hasattr(cache, "self_attention_cache")
        else (cache,)
    )
    for part in parts:
        for number, depth in enumerate(depths):
            if len(part.layers) <= blocks + number:
                while (
                    len(part.layers) < blocks
                ):  # nothing has been written yet: a sample's states came from a cache of states
                    part.layers.append(DynamicLayer())
                twin = part.layers[depth]
                if not isinstance(twin, DynamicLayer):
                    raise AttachError(
                        f"side networks need a key-value cache that grows, not one of {type(twin).__name__}"
                    )
                fresh = copy.copy(twin)
                fresh.is_initialized = False
                fresh.reset()
                part.layers.append(fresh)


def is_cache(value: Any) -> bool:
    return hasattr(value, "self_attention_cache") or (hasattr(value, "layers") and hasattr(value, "get_seq_length"))


__all__ = ["Narrow", "bias_at", "dropout_of", "grow", "inside", "is_cache", "norm_like", "weight_at"]
