"""Extra input tokens: put in front of the sequence, replaced at deeper blocks, taken away after the last one.

Two ways in. Where the stack belongs to a text model that takes `inputs_embeds`, tokens are put in before it: positions, masks and
caches are then the model's own business, and only what the caller passed (2-D mask, position ids, token types) is lengthened. In vision
and audio models they are put in front of the patch tokens, at the input of the first block they act on. A decoder fed by an encoder
goes on seeing the encoder's extra tokens, so there they are kept. Taking them away after the last block means that labels, logits,
pooling and generation never see them. A delta may also change what its tokens are put in front of (`joined`).

Where rows of a batch take different tokens (`pt.route`), or none, all are laid out to the same length, and what is left over is masked:
at the end in an encoder, so that positions are those of each row alone; in front in a decoder, whose cache then grows evenly.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from petiole.errors import AttachError
from petiole.junction import Args, Kwargs, Point, Slot, of_input, of_output, on_rows
from petiole.method import TokenDelta

_CACHES = ("cache", "past_key_values")
_ENCODED = "encoder_attention_mask"


def parameters_of(module: nn.Module) -> tuple[str, ...]:
    """The names of the arguments of a module's forward."""
    return tuple(name for name in inspect.signature(type(module).forward).parameters if name != "self")


def text_entry(root: nn.Module, path: str) -> str | None:
    """Path of the nearest module around a stack that takes `inputs_embeds` and can embed token ids; None in vision and audio."""
    while path:
        path = path.rpartition(".")[0]
        module = root.get_submodule(path)
        accepts = parameters_of(module)
        if (
            "inputs_embeds" in accepts
            and "input_ids" in accepts
            and callable(getattr(module, "get_input_embeddings", None))
        ):
            return path
    return None


@dataclass(frozen=True)
class Layout:
    """How the rows of a mixed batch are brought to one length.

    Attributes:
        slots: the inserting ones, one for each adaptation; the first does what is done once.
        index: for each row of the hidden state, which of `slots` gives its tokens; -1 for none.
        front: whether what is left over lies in front of a row's tokens, and not behind the row.
    """

    slots: Sequence[TokenSlot]
    index: Sequence[int]
    front: bool

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [self.slots[i].length if i >= 0 else 0 for i in self.index]

    @property
    def length(self) -> int:
        """By how much the sequence grows."""
        return max(self.lengths)

    @property
    def even(self) -> bool:
        """Whether nothing is left over."""
        return min(self.lengths) == self.length

    def groups(self) -> Iterator[tuple[int, list[int]]]:
        """A number in `slots`, or -1, and the rows that it is for."""
        for number in sorted(set(self.index)):
            yield number, [row for row, each in enumerate(self.index) if each == number]

    def laid(self, value: Tensor, tokens: Sequence[Tensor] | float, rest: float, dim: int = 1) -> Tensor:
        """value (B, …, T, …) -> (B, …, length + T, …).

        Args:
            tokens: what stands for the tokens of a row: one tensor for each group, of its rows, or a number. rest: what is left over.
        """
        parts, order = [], []
        for place, (number, rows) in enumerate(self.groups()):
            own = value.index_select(0, torch.tensor(rows, device=value.device))
            count = self.slots[number].length if number >= 0 else 0
            head = filled(own, dim, count, tokens) if isinstance(tokens, (int, float)) else tokens[place]
            left = filled(own, dim, self.length - count, rest)
            parts.append(torch.cat([left, head, own] if self.front else [head, own, left], dim))
            order += rows
        return torch.cat(parts).index_select(0, torch.tensor(order, device=value.device).argsort())

    def shift(self, device: torch.device) -> Tensor:
        """(B, 1): by how much the positions of each row's own sequence move."""
        return torch.tensor(self.lengths, device=device)[:, None]

    def stripped(self, h: Tensor) -> Tensor:
        """h (B, length + T, d) -> (B, T, d): without tokens and what was left over."""
        if self.front:
            return h[:, self.length :]
        place = self.shift(h.device) + torch.arange(h.shape[1] - self.length, device=h.device)
        return h.gather(1, place[..., None].expand(-1, -1, h.shape[-1]))


def filled(like: Tensor, dim: int, length: int, value: float) -> Tensor:
    """A tensor full of `value`, with the shape of another but for one dimension."""
    shape = list(like.shape)
    shape[dim] = length
    return like.new_full(shape, value)


class TokenSlot(Slot):
    """One delta's tokens: inserted at the lowest depth of its stack, replacing the earlier ones at a higher depth."""

    text = False  # whether they enter before a model that embeds token ids
    runs = 1  # of the module after which they are taken away, until that is done

    def points(self) -> Iterator[Point]:
        host, site = self.host, self.site
        stack = host.anatomy.stack(site.stack)
        blocks = stack.blocks
        refuse_windows(host.model, site.stack, blocks)
        self.leader = self.first()
        self.joins = type(self.delta).joined is not TokenDelta.joined
        self.begun: dict[
            int, tuple[Tensor, int]
        ] = {}  # by thread: generation without a cache, its input and last length
        self.names: dict[
            type[nn.Module], tuple[str, ...]
        ] = {}  # of arguments, by the class of a module that takes tokens
        if self is not self.leader:
            yield Point(site.path, "before", "replace", owns=True)
            return
        entry = text_entry(host.model, blocks[0].path)
        self.text = entry is not None
        self.numbering = self.positions(entry) if entry is not None else "none"
        if entry is not None:
            if site.depth:
                raise AttachError(
                    f"tokens of a text model enter before its first block; layers begins at {site.depth}, not 0"
                )
            decoders = [] if stack.causal else [s for s in host.anatomy.stacks if s.causal]
            around = {text_entry(host.model, s.blocks[0].path) for s in decoders} - {entry, None}
            readers = [path for path in sorted(filter(None, around)) if _ENCODED in parameters_of(host.module(path))]
            self.names = {type(host.module(path)): parameters_of(host.module(path)) for path in (entry, *readers)}
            if self.joins and (outer := text_entry(host.model, entry)) is not None:
                self.names[type(host.module(outer))] = parameters_of(host.module(outer))
                yield Point(outer, "before", "overhear")
            yield Point(entry, "before", "embed", owns=True)
            for reader in readers:  # which goes on seeing them, so they are kept
                yield Point(reader, "before", "lengthen")
            if not readers:
                # A decoder may shape its output by the length it was given; an encoder may pool its first token.
                # Where weights are shared over depth, the last block runs several times, and the tokens stay until its last run.
                self.runs = 1 if stack.causal else max(s.repeats for s in blocks[-1].sites)
                yield Point(entry if stack.causal else blocks[-1].path, "after", "strip")
        else:
            yield Point(site.path, "before", "insert", owns=True)
            for block in blocks[site.depth + 1 :]:
                yield Point(block.path, "before", "widen")
            yield Point(blocks[-1].path, "after", "strip")

    def first(self) -> TokenSlot:
        """The slot of this method that inserts."""
        mine = [s for s in self.host.adaptations[self.adaptation].slots if isinstance(s, TokenSlot)]
        return min(
            (s for s in mine if s.number == self.number and s.site.stack == self.site.stack), key=lambda s: s.site.depth
        )

    @property
    def length(self) -> int:
        return int(self.delta.length)

    def layout(self, count: int) -> Layout | None:
        """How the rows of a batch differ, for `count` rows of a hidden state; None where all have the same tokens.

        Raises:
            AttachError: a row would get the tokens of two, or tokens enter at different depths.
        """
        names = self.host.row_names()
        if names is None:
            return None
        slots = [
            slot
            for adaptation in self.host.adaptations.values()
            for slot in adaptation.slots
            if isinstance(slot, TokenSlot)
            and slot is slot.leader
            and slot.site.stack == self.site.stack
            and slot.acts()
        ]
        mine = [[i for i, slot in enumerate(slots) if slot.adaptation in row] for row in names]
        if all(row == mine[0] for row in mine) and len(slots) == len(mine[0]):
            return None
        if any(len(row) > 1 for row in mine) or len({slot.site.depth for slot in slots}) > 1:
            raise AttachError(
                "in a batch whose rows differ, a row can have the input tokens of one method, and all enter at the same block"
            )
        if count % len(names):
            raise AttachError(f"pt.route names {len(names)} rows, but a hidden state has {count}")
        each = count // len(names)
        index = [row[0] if row else -1 for row in mine for _ in range(each)]
        return Layout(slots, index, self.text and bool(self.host.anatomy.stack(self.site.stack).causal))

    def tokens(self, like: Tensor) -> Tensor:
        self.fire()
        return self.delta(like.shape[0]).to(like.dtype)

    def with_tokens(self, h: Tensor, layout: Layout | None) -> Tensor:
        """h (B, T, d) with everybody's tokens."""
        if layout is None:
            return torch.cat([self.tokens(h), h], 1)
        heads = [
            layout.slots[i].tokens(h[: len(rows)]) if i >= 0 else h[: len(rows), :0] for i, rows in layout.groups()
        ]
        return layout.laid(h, heads, 0.0)

    # ---- text: before the model that embeds

    def embed(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> tuple[Args, Kwargs]:
        kwargs = {**dict(zip(self.names[type(module)], args, strict=False)), **kwargs}
        cache = next((kwargs[n] for n in _CACHES if kwargs.get(n) is not None), None)
        seen = int(cache.get_seq_length()) if cache is not None else 0
        embeds, ids = kwargs.get("inputs_embeds"), kwargs.get("input_ids")
        outer = self.release() if self.joins else None
        if embeds is None and ids is not None and seen == 0:
            embeds = module.get_input_embeddings()(ids)  # type: ignore[operator]
            kwargs["input_ids"] = None
        source = embeds if embeds is not None else ids
        if source is None:
            raise AttachError(f"{type(module).__name__} was called without input_ids or inputs_embeds")
        layout = self.layout(source.shape[0])
        if layout is not None and layout.slots[0] is not self:
            return (), kwargs  # that one does it for all
        if seen == 0:
            if any(slot.joins for slot in ((self,) if layout is None else layout.slots)):
                source = self.joined_text(module, source, ids, outer if ids is None else None, kwargs, layout)
            kwargs["inputs_embeds"] = self.with_tokens(source, layout)
        self.hold(self.runs if seen == 0 else 0)
        if layout is None:
            self.lengthen_masks(kwargs, source, seen)
        else:
            self.lay_masks(layout, kwargs, source, seen)
        return (), kwargs

    def overhear(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> None:
        """The ids that a model around is given, where it may put images among the embeddings of a text."""
        self.hold({**dict(zip(self.names[type(module)], args, strict=False)), **kwargs}.get("input_ids"))

    def joined_text(
        self,
        module: nn.Module,
        h: Tensor,
        ids: Tensor | None,
        outer: Any,
        kwargs: Kwargs,
        layout: Layout | None,
    ) -> Tensor:
        """The embeddings h (B, T, d) of a text, changed by everybody's deltas.

        Args:
            ids: (B, T), those of h. outer: those that a model around was given, if it made embeddings of them itself.
        """
        mask = kwargs.get("attention_mask")
        mask = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == h.shape[1] else None
        if isinstance(outer, Tensor) and outer.shape == h.shape[:2]:
            own = (module.get_input_embeddings()(outer) == h).all(-1)  # type: ignore[operator]
            places = numbered(own if mask is None else own & mask).masked_fill(~own, -1)
        else:
            places = torch.arange(h.shape[1], device=h.device)[None] if mask is None else numbered(mask)
        given = self.given_tokens(module, ids, kwargs) if ids is not None else h.shape[1]
        if given == h.shape[1]:
            return self.joined(h, places, layout)
        return torch.cat([self.joined(h[:, :given], places[:, :given], layout), h[:, given:]], 1)

    def given_tokens(self, module: nn.Module, ids: Tensor, kwargs: Kwargs) -> int:
        """How many of the tokens (B, T) were given: all, but where generation goes on without a cache, which starts anew each time.

        It is known by `use_cache=False` and one token more than in this thread's last pass, behind the same input.
        """
        length = ids.shape[1]
        if torch.compiler.is_compiling() or module.training or kwargs.get("use_cache") is not False:
            return length
        me = threading.get_ident()
        first, last = self.begun.pop(me, (ids, length))
        if length != last + 1 or len(first) != len(ids) or not torch.equal(first, ids[:, : first.shape[1]]):
            first = ids
        self.begun[me] = first, length
        return first.shape[1]

    def joined(self, h: Tensor, places: Tensor, layout: Layout | None) -> Tensor:
        """h (B, T, d) as each row's delta changes it."""
        if layout is None:
            return self.delta.joined(h, places)
        for number, rows in layout.groups():
            if number >= 0 and layout.slots[number].joins:
                mine = torch.tensor(rows, device=h.device)
                own = places.expand(len(h), -1).index_select(0, mine)
                changed = layout.slots[number].delta.joined(h.index_select(0, mine), own)
                h = h.index_copy(0, mine, changed.to(h.dtype))
        return h

    def positions(self, entry: str) -> str:
        """Where the model that embeds takes positions from: "given", the "mask", "fixed" by their order, or "none" (relative ones)."""
        outside = (s.path for s in self.host.anatomy.outside if s.role == "position_embedding")
        inside = [path for path in outside if path.startswith(f"{entry}." if entry else "")]
        if any("attention_mask" in parameters_of(self.host.module(each)) for each in inside):
            return "mask"
        if "position_ids" in parameters_of(self.host.module(entry)):
            return "given"
        return "fixed" if inside else "none"

    def lay_masks(self, layout: Layout, kwargs: Kwargs, source: Tensor, seen: int) -> None:
        """As `lengthen_masks`, where rows differ."""
        if layout.front and not layout.even and self.numbering == "fixed":
            raise AttachError(
                f"{self.host.anatomy.model_class} numbers positions by their order, so its rows can't have input tokens of different numbers"
            )
        batch, current = source.shape[:2]
        mask = kwargs.get("attention_mask")
        if mask is None:
            text = current + max(0, seen - layout.length)
            mask = torch.ones(batch, text, dtype=torch.long, device=source.device)
        elif not isinstance(mask, Tensor) or mask.ndim != 2:
            raise AttachError(
                "input tokens need attention_mask as (batch, length); a prepared 4-D mask can't be lengthened"
            )
        elif seen and mask.shape[1] == seen + current:
            return  # the cache was filled without these tokens
        kwargs["attention_mask"] = layout.laid(mask, 1, 0)
        shift = layout.shift(source.device)
        positions = kwargs.get("position_ids")
        if positions is not None and positions.ndim != 2:
            raise AttachError("where rows have different input tokens, position_ids must be (batch, length)")
        if positions is not None or (layout.front and self.numbering == "given"):
            if positions is None:
                positions = torch.arange(current, device=source.device)[None] + max(0, seen - layout.length)
            positions = positions.expand(batch, -1)
            kwargs["position_ids"] = positions + shift if seen else laid_positions(layout, positions, shift)
        if kwargs.get("cache_position") is not None and seen == 0:
            kwargs["cache_position"] = torch.arange(layout.length + current, device=source.device)
        elif kwargs.get("cache_position") is not None:
            kwargs["cache_position"] = kwargs["cache_position"] + layout.length
        types = kwargs.get("token_type_ids")
        if types is not None and seen == 0:
            kwargs["token_type_ids"] = layout.laid(types.expand(batch, -1), 0, 0)

    def lengthen_masks(self, kwargs: Kwargs, source: Tensor, seen: int) -> None:
        batch, length = source.shape[0], self.length
        mask = kwargs.get("attention_mask")
        if seen and isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == seen + source.shape[1]:
            return  # the mask covers all that the cache holds: it was filled without these tokens
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.ndim != 2:
                raise AttachError(
                    "input tokens need attention_mask as (batch, length); a prepared 4-D mask can't be lengthened"
                )
            kwargs["attention_mask"] = torch.cat([mask.new_ones(batch, length), mask], 1)
        for name in ("position_ids", "cache_position"):
            positions = kwargs.get(name)
            if positions is not None:
                front = torch.arange(length, device=positions.device).expand(*positions.shape[:-1], length)
                kwargs[name] = torch.cat([front, positions + length], -1) if seen == 0 else positions + length
        types = kwargs.get("token_type_ids")
        if types is not None and seen == 0:
            kwargs["token_type_ids"] = torch.cat([types.new_zeros(batch, length), types], 1)

    def lengthen(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> tuple[Args, Kwargs] | None:
        """A decoder's mask over an encoder whose output has the extra tokens."""
        kwargs = {**dict(zip(self.names[type(module)], args, strict=False)), **kwargs}
        states, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
        layout = self.layout(states.shape[0]) if states is not None else None
        if layout is not None and states is not None:
            text = states.shape[1] - layout.length
            if mask is None:
                mask = torch.ones(states.shape[0], text, dtype=torch.long, device=states.device)
            if layout.slots[0] is not self or mask.shape[-1] != text:
                return None
            return (), {**kwargs, "encoder_attention_mask": layout.laid(mask, 1, 0)}
        if states is None or mask is None or mask.shape[-1] + self.length != states.shape[1]:
            return None
        return (), {
            **kwargs,
            "encoder_attention_mask": torch.cat([mask.new_ones(mask.shape[0], self.length), mask], -1),
        }

    # ---- vision and audio: before a block

    def insert(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> tuple[Args, Kwargs]:
        h, put = of_input(args, kwargs)
        if h.ndim != 3:
            raise AttachError(
                f"input tokens need hidden states (batch, tokens, width); {type(module).__name__} gets {tuple(h.shape)}"
            )
        layout = self.layout(h.shape[0])
        if layout is not None and layout.slots[0] is not self:
            return args, kwargs  # that one does it for all
        h = self.joined(h, torch.arange(h.shape[1], device=h.device)[None], layout)
        args, kwargs = put(self.with_tokens(h, layout))
        self.hold(1)
        return self.widened(module, args, kwargs, layout)

    def widen(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> tuple[Args, Kwargs]:
        layout = self.layout(of_input(args, kwargs)[0].shape[0])
        if layout is not None and layout.slots[0] is not self:
            return args, kwargs
        return self.widened(module, args, kwargs, layout)

    def widened(self, module: nn.Module, args: Args, kwargs: Kwargs, layout: Layout | None) -> tuple[Args, Kwargs]:
        """Masks over patches see the extra tokens; rotary tables turn them by nothing."""
        length = self.length if layout is None else layout.length
        names = parameters_of(module)
        place = names.index("attention_mask") if "attention_mask" in names else len(args)
        mask = args[place] if place < len(args) else kwargs.get("attention_mask")
        uneven = layout is not None and not layout.even
        if uneven and ("attention_mask" not in names or kwargs.get("position_embeddings") is not None):
            raise AttachError(
                f"{type(module).__name__} can't leave out tokens for some rows of a batch: give every row tokens of one length"
            )
        mask = mask if isinstance(mask, Tensor) else None
        if layout is not None and uneven:
            mask = laid_mask(layout, mask, of_input(args, kwargs)[0])
        elif mask is not None:
            mask = self.wider_mask(mask, length)
        if mask is not None:
            if place < len(args):
                args = (*args[:place], mask, *args[place + 1 :])
            else:
                kwargs = {**kwargs, "attention_mask": mask}
        tables = kwargs.get("position_embeddings")
        if isinstance(tables, tuple) and len(tables) == 2:
            cos, sin = tables
            shape = (*cos.shape[:-2], length, cos.shape[-1])
            kwargs = {
                **kwargs,
                "position_embeddings": (
                    torch.cat([cos.new_ones(shape), cos], -2),
                    torch.cat([sin.new_zeros(shape), sin], -2),
                ),
            }
        return args, kwargs

    def wider_mask(self, mask: Tensor, length: int) -> Tensor:
        """A mask (B, T) or (B, 1, T or 1, T) with the extra tokens in front: every token sees them; in a causal stack they see one
        another from the first on, and nothing of what follows."""
        added = mask.is_floating_point() and mask.ndim == 4
        seen = True if mask.dtype == torch.bool else (0.0 if added else 1)
        mask = torch.cat([mask.new_full((*mask.shape[:-1], length), seen), mask], -1)
        if mask.ndim < 4 or mask.shape[-2] == 1:
            return mask
        front = mask.new_full((*mask.shape[:-2], length, mask.shape[-1]), seen)
        if self.host.anatomy.stack(self.site.stack).causal:
            later = torch.ones(length, mask.shape[-1], dtype=torch.bool, device=mask.device).triu(1)
            hidden = False if mask.dtype == torch.bool else (torch.finfo(mask.dtype).min if added else 0)
            front = front.masked_fill(later, hidden)
        return torch.cat([front, mask], -2)

    # ---- both

    def replace(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> tuple[Args, Kwargs] | None:
        h, put = of_input(args, kwargs)
        layout = self.leader.layout(h.shape[0])
        first = self.leader if layout is None else layout.slots[0]
        if self.leader.text and not first.inserted():
            self.fire()
            return None
        if layout is None:
            return put(self.replaced(h, 0))
        start = layout.length - self.length if layout.front else 0
        return put(on_rows(h, self.host.rows(self.adaptation, h), lambda own: self.replaced(own, start)))

    def replaced(self, h: Tensor, start: int) -> Tensor:
        """h (B, T, d) with this block's tokens in place of those that begin at `start`."""
        return torch.cat([h[:, :start], self.tokens(h), h[:, start + self.length :]], 1)

    def inserted(self) -> bool:
        """Whether this forward pass has the tokens in its sequence; while decoding they are in the cache."""
        value = self.release()
        self.hold(value)
        return bool(value)

    def strip(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
        runs = self.release()
        if not runs:
            return output
        if runs > 1:  # the block's last run is still to come
            self.hold(runs - 1)
            return output
        h, put = of_output(output)
        layout = self.layout(h.shape[0])
        return put(h[:, self.length :] if layout is None else layout.stripped(h))


def numbered(mask: Tensor) -> Tensor:
    """Which tokens are real (B, T) -> the place of each among those of its row (B, T). What comes behind the last goes on counting."""
    behind = mask.flip(1).cumsum(1).flip(1) == 0
    return ((mask | behind).cumsum(1) - 1).clamp_min(0)


def laid_positions(layout: Layout, positions: Tensor, shift: Tensor) -> Tensor:
    """Position ids (B, T) of each row's sequence, with those of its tokens before; 0 for what is left over."""
    heads = [
        torch.arange(layout.slots[i].length if i >= 0 else 0, device=positions.device).expand(len(rows), -1)
        for i, rows in layout.groups()
    ]
    return layout.laid(positions + shift, heads, 0)


def laid_mask(layout: Layout, mask: Tensor | None, h: Tensor) -> Tensor:
    """A mask over patches, (B, T) or (B, 1, T or 1, T) or none, for rows that differ; h (B, length + T, d) says how many there are."""
    hidden = torch.finfo(h.dtype).min
    if mask is None:
        return layout.laid(h.new_zeros(h.shape[0], 1, 1, h.shape[1] - layout.length), 0.0, hidden, dim=-1)
    mask = mask.expand(h.shape[0], *mask.shape[1:])
    added = mask.is_floating_point() and mask.ndim == 4
    seen, unseen = (0.0, torch.finfo(mask.dtype).min) if added else (1, 0)
    mask = layout.laid(mask, seen, unseen, dim=-1)
    if mask.ndim < 4 or mask.shape[-2] == 1:
        return mask
    return layout.laid(mask, seen, seen, dim=-2)  # what is left over may look at anything: nobody looks at it


def refuse_windows(model: nn.Module, stack: str, blocks: Any, what: str = "input tokens") -> None:
    """Tokens can't be added or merged where blocks cut the image into windows or hold a bias for each pair of patches."""
    if len({block.hidden_size for block in blocks}) > 1:
        raise AttachError(f"{what} need blocks of one width; {stack} has {sorted({b.hidden_size for b in blocks})}")
    for block in blocks:
        for name, module in model.get_submodule(block.path).named_modules():
            if (
                hasattr(module, "relative_position_bias_table")
                or getattr(module, "relative_position_bias", None) is not None
            ):
                raise AttachError(
                    f"{what} don't fit {type(module).__name__} ({block.path}.{name}): it holds a bias for each pair of patches"
                )
