"""Extra input tokens: put in front of the sequence, replaced at deeper blocks, taken away after the last one.

Two ways in. Where the stack belongs to a text model that takes `inputs_embeds`, tokens are put in before it: positions, masks and
caches are then the model's own business, and only what the caller passed (2-D mask, position ids, token types) is lengthened. In vision
and audio models they are put in front of the patch tokens, at the input of the first block they act on. A decoder fed by an encoder
goes on seeing the encoder's extra tokens, so there they are kept. Taking them away after the last block means that labels, logits,
pooling and generation never see them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from petiole.errors import AttachError
from petiole.junction import Args, Kwargs, Point, Slot, of_input, of_output

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
        self.names: dict[
            type[nn.Module], tuple[str, ...]
        ] = {}  # of arguments, by the class of a module that takes tokens
        if self is not self.leader:
            yield Point(site.path, "before", "replace", owns=True)
            return
        entry = text_entry(host.model, blocks[0].path)
        self.text = entry is not None
        if entry is not None:
            if site.depth:
                raise AttachError(
                    f"tokens of a text model enter before its first block; layers begins at {site.depth}, not 0"
                )
            decoders = [] if stack.causal else [s for s in host.anatomy.stacks if s.causal]
            around = {text_entry(host.model, s.blocks[0].path) for s in decoders} - {entry, None}
            readers = [path for path in sorted(filter(None, around)) if _ENCODED in parameters_of(host.module(path))]
            self.names = {type(host.module(path)): parameters_of(host.module(path)) for path in (entry, *readers)}
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

    def refuse_rows(self) -> None:
        if self.host.rows(self.adaptation, None) is not None:
            raise AttachError(
                "input tokens change the length of the sequence: every row of a batch needs them, or none"
            )

    def tokens(self, like: Tensor) -> Tensor:
        self.fire()
        return self.delta(like.shape[0]).to(like.dtype)

    # ---- text: before the model that embeds

    def embed(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> tuple[Args, Kwargs]:
        kwargs = {**dict(zip(self.names[type(module)], args, strict=False)), **kwargs}
        self.refuse_rows()
        cache = next((kwargs[n] for n in _CACHES if kwargs.get(n) is not None), None)
        seen = int(cache.get_seq_length()) if cache is not None else 0
        embeds, ids = kwargs.get("inputs_embeds"), kwargs.get("input_ids")
        if embeds is None and ids is not None and seen == 0:
            embeds = module.get_input_embeddings()(ids)  # type: ignore[operator]
            kwargs["input_ids"] = None
        source = embeds if embeds is not None else ids
        if source is None:
            raise AttachError(f"{type(module).__name__} was called without input_ids or inputs_embeds")
        if seen == 0:
            kwargs["inputs_embeds"] = torch.cat([self.tokens(source), source], 1)
        self.hold(self.runs if seen == 0 else 0)
        self.lengthen_masks(kwargs, source, seen)
        return (), kwargs

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
        if states is None or mask is None or mask.shape[-1] + self.length != states.shape[1]:
            return None
        return (), {
            **kwargs,
            "encoder_attention_mask": torch.cat([mask.new_ones(mask.shape[0], self.length), mask], -1),
        }

    # ---- vision and audio: before a block

    def insert(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> tuple[Args, Kwargs]:
        self.refuse_rows()
        h, put = of_input(args, kwargs)
        if h.ndim != 3:
            raise AttachError(
                f"input tokens need hidden states (batch, tokens, width); {type(module).__name__} gets {tuple(h.shape)}"
            )
        args, kwargs = put(torch.cat([self.tokens(h), h], 1))
        self.hold(1)
        return self.widened(module, args, kwargs)

    def widen(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> tuple[Args, Kwargs]:
        return self.widened(module, args, kwargs)

    def widened(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """Masks over patches see the extra tokens; rotary tables turn them by nothing."""
        length = self.length
        names = [n for n in parameters_of(module) if n != "self"]
        place = names.index("attention_mask") if "attention_mask" in names else len(args)
        mask = args[place] if place < len(args) else kwargs.get("attention_mask")
        if isinstance(mask, Tensor):
            mask = self.wider_mask(mask)
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

    def wider_mask(self, mask: Tensor) -> Tensor:
        """A mask (B, T) or (B, 1, T or 1, T) with the extra tokens in front: every token sees them; in a causal stack they see one
        another from the first on, and nothing of what follows."""
        length, added = self.length, mask.is_floating_point() and mask.ndim == 4
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
        if self.leader.text and not self.leader.inserted():
            self.fire()
            return None
        h, put = of_input(args, kwargs)
        return put(torch.cat([self.tokens(h), h[:, self.length :]], 1))

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
        return put(h[:, self.length :])


def refuse_windows(model: nn.Module, stack: str, blocks: Any) -> None:
    """Tokens can't be added where blocks cut the image into windows or hold a bias for each pair of patches."""
    if len({block.hidden_size for block in blocks}) > 1:
        raise AttachError(
            f"input tokens need blocks of one width; {stack} has {sorted({b.hidden_size for b in blocks})}"
        )
    for block in blocks:
        for name, module in model.get_submodule(block.path).named_modules():
            if (
                hasattr(module, "relative_position_bias_table")
                or getattr(module, "relative_position_bias", None) is not None
            ):
                raise AttachError(
                    f"input tokens don't fit {type(module).__name__} ({block.path}.{name}): it holds a bias for each pair of patches"
                )
