"""What an attention computed, for a delta that acts after it: its probabilities, queries and values.

Where the attention goes through Transformers' interface, petiole's attention function (`attention.py`) hands them over. One without it
that returns its probabilities is watched: its queries and values are what its linears give, or what its cache holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from petiole.anatomy import Anatomy, Site
from petiole.errors import AttachError
from petiole.junction import Args, HiddenSlot, Kept, Kwargs, Point, features, of_output
from petiole.method import Attended


class AttendedSlot(HiddenSlot):
    """h <- h + Δ(attended, h), after an attention."""

    @property
    def attention(self) -> Site:
        assert self.place.read is not None  # `check_reads` has seen to it
        return self.place.read

    def points(self) -> Iterator[Point]:
        core, found = self.host.attention_module(self.attention), self.host.anatomy
        if found.stack(self.attention.stack).attention_interface:
            yield Point(core, "before", "")  # where the attention function looks for it
        else:
            for role in ("q", "v"):
                yield Point(projection(found, self.attention, role).path, "after", f"keep_{role}", last=True)
            yield Point(core, "after", "watch", last=True)
        yield Point(self.site.exit, "after", "write", owns=True)

    def see(self, probabilities: Tensor, query: Tensor, value: Tensor) -> None:
        """Hold what an attention computed until its output changes."""
        groups = query.shape[1] // value.shape[1]
        self.hold(Attended(probabilities, query, value.repeat_interleave(groups, 1) if groups > 1 else value))

    def keep_q(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
        return self.keep("q", self.attention.heads, output)

    def keep_v(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
        return self.keep("v", self.attention.key_value_heads, output)

    def keep(self, role: str, heads: int, output: Any) -> Any:
        """Hold (B, T, heads · d) as (B, heads, T, d)."""
        site, kept = projection(self.host.anatomy, self.attention, role), self.release()
        h = features(of_output(output)[0], site.rows or ((0, site.out_features),))
        self.hold({**(kept if isinstance(kept, dict) else {}), role: h.unflatten(-1, (heads, -1)).transpose(1, 2)})
        return output

    def watch(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
        kept, value = self.release(), cached(module, self.attention.role, args, kwargs)
        if not isinstance(output, tuple) or len(output) < 2 or not isinstance(output[1], Tensor):
            raise AttachError(f"{self.attention.key}: {type(module).__name__} returned no attention probabilities")
        self.see(output[1], kept["q"], kept["v"] if value is None else value)
        return output

    def by_row(self, slots: list[Any], index: Tensor, args: Args, kwargs: Kwargs, output: Any, kept: Kept) -> Any:
        return None  # one after the other


def cached(module: nn.Module, role: str, args: Args, kwargs: Kwargs) -> Tensor | None:
    """The values (B, heads, S, d) in the cache that an attention was given; None where it was given none."""
    from transformers.cache_utils import Cache, EncoderDecoderCache

    cache: Any = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.cross_attention_cache if role == "cross_attention" else cache.self_attention_cache
    return None if cache is None else cache.layers[module.layer_idx].values


def projection(found: Anatomy, attention: Site, role: str) -> Site:
    """The linear of an attention that gives its queries or values."""
    site = found.part(attention, role)
    assert site is not None
    return site


def check_reads(method: str, read: Site | None, found: Anatomy) -> None:
    """Refuse what reads an attention that shows nothing.

    Raises:
        AttachError: says where its probabilities would have to come from.
    """
    if read is None or read.role not in ("attention", "cross_attention"):
        raise AttachError(f"{method}: what acts on what an attention computed has to read an attention")
    stack = found.stack(read.stack)
    parts = [found.part(read, role) for role in ("q", "v")]
    watched = stack.returns_probabilities and all(part and part.called and part.kind == "linear" for part in parts)
    if not read.core or not (stack.attention_interface or (watched and read.heads and read.key_value_heads)):
        raise AttachError(
            f"{method} needs attention probabilities, but the attention of {found.model_class} ({read.stack}) neither goes through "
            "Transformers' attention interface nor returns them\nuse a method on hidden states or weights instead (lora, …)"
        )
