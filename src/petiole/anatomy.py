"""What a backbone is made of: stacks of blocks, the role of each sub-module, and the sites where a change can sit.

Everything is inferred from the structure of the modules and one short table of names (`roles.py`). Nothing is executed and no value is read,
so a model on the meta device will do. Children named `petiole…` (the deltas) are not seen: an attached model has the anatomy of the bare one.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from torch import nn

from petiole.errors import AnatomyError
from petiole.roles import ATTENTION_ROLES, FFN_ROLES, OUTSIDE_ROLES, ROLES, LinearRole, Role

__all__ = ["Anatomy", "Block", "LinearRole", "Role", "Side", "Site", "Stack", "anatomy"]

Side = Literal["input", "output"]
Kind = Literal["linear", "conv", "embedding", "norm", "module", "parameter"]
Rows = tuple[tuple[int, int], ...]

# The sub-layer that a role is in unless said otherwise; left out of a site's key.
_HOME = dict.fromkeys(ATTENTION_ROLES, "attention") | dict.fromkeys(FFN_ROLES, "ffn")


# ------------------------------------------------------------------------------------------------------------------- what there is


@dataclass(frozen=True)
class Site:
    """One place where a change can sit.

    Attributes:
        role: see `roles.py`.
        stack: name of the stack, "" outside any (embeddings, head, final norm).
        depth: index of the block in its stack, counted from the input; -1 outside.
        number: ordinal among sites with the same stack, depth, within, role and expert.
        within: the sub-layer that holds it: "attention", "cross_attention", "ffn", "mixer" or "".
        path: module at which it is read. "" is the root.
        exit: module at which it is written; another one only where a sub-layer spans several modules.
        side: the side of the module on which the change sits.
        kind: what the module is; "parameter" if the change can only be made by composing the tensor.
        in_features, out_features: width of what goes in and what comes out.
        rows: half-open row ranges of a fused tensor's output that belong to it; () is all of them.
        transposed: the weight is stored (in, out).
        parameter, bias: names of the tensors on the module at `path`; "" where there is none.
        expert: index in a packed tensor (E, ., .), else -1.
        called: False if the module never runs, or its output is not its product with the weight; `caller` is then the module whose
            forward uses the tensor.
        repeats: how often the block runs in one forward pass.
        core: for attention, the innermost module that runs it: the one that Transformers' attention functions are given.
        heads, key_value_heads, head_size: for attention, 0 if unknown.
        kernel, groups: of a convolution; () and 1 elsewhere.
    """

    role: str
    stack: str
    depth: int
    number: int
    within: str
    path: str
    exit: str
    side: Side
    kind: Kind
    in_features: int
    out_features: int
    rows: Rows = ()
    transposed: bool = False
    parameter: str = "weight"
    bias: str = "bias"
    expert: int = -1
    called: bool = True
    caller: str = ""
    repeats: int = 1
    core: str = ""
    heads: int = 0
    key_value_heads: int = 0
    head_size: int = 0
    kernel: tuple[int, ...] = ()
    groups: int = 1

    @property
    def key(self) -> str:
        """A name that holds in files and for any copy of the backbone: "encoder.3.q", "decoder.2.cross_attention.v", "encoder.0.ffn.up.e2"."""
        parts = [self.stack, str(self.depth)] if self.stack else []
        if self.within and (self.expert >= 0 or self.within != _HOME.get(self.role)):
            parts.append(self.within)
        parts.append(self.role)
        if self.expert >= 0:
            parts.append(f"e{self.expert}")
        return ".".join(parts + [str(self.number)] * (self.number > 0))

    def at(self, side: Side) -> Site:
        """The same site, at one side of its module."""
        return replace(self, side=side)

    @property
    def size(self) -> int:
        """Width of the hidden state at `side`."""
        return self.in_features if self.side == "input" else self.out_features


@dataclass(frozen=True)
class Block:
    """One block of a stack. `kind` is its class; blocks of one class that are built differently have another `layout`."""

    stack: str
    depth: int
    path: str
    kind: str
    sites: tuple[Site, ...]
    stage: int
    hidden_size: int
    layout: tuple[str, ...] = ()

    @property
    def sublayers(self) -> list[Site]:
        """Attentions, mixers and ffns, in the order of execution."""
        found = (s for s in self.sites if s.role in ("attention", "cross_attention", "mixer", "ffn"))
        return sorted(found, key=lambda site: site.role == "ffn")

    @property
    def channels_first(self) -> bool:
        """Whether its hidden state is (B, d, *size), as in convolutional networks."""
        return any(s.kind == "conv" and not s.within and len(s.kernel) > 1 for s in self.sites)


@dataclass(frozen=True)
class Stack:
    """Blocks that run one after the other.

    Attributes:
        hidden_size: of the last block.
        causal: whether its self-attention looks back only; None if that can't be told.
        attention_interface: whether all its attention goes through Transformers' attention functions, where it can be changed.
        containers: paths of the lists that hold the blocks.
        returns_probabilities: whether its attentions, which have no interface, return their probabilities second, whatever is asked for.
    """

    name: str
    blocks: tuple[Block, ...]
    hidden_size: int
    causal: bool | None
    attention_interface: bool
    containers: tuple[str, ...]
    returns_probabilities: bool = False


@dataclass(frozen=True)
class Anatomy:
    """What was found in a backbone."""

    model_class: str
    stacks: tuple[Stack, ...]
    outside: tuple[Site, ...]
    notes: tuple[str, ...] = ()

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles found anywhere."""
        found = {site.role for site in self._everything()}
        return tuple(role for role in ROLES if role in found)

    def _everything(self) -> Iterator[Site]:
        for stack in self.stacks:
            for block in stack.blocks:
                yield from block.sites
        yield from self.outside

    def stack(self, name: str | None = None) -> Stack:
        """The stack of that name; without one, the only stack or the last that the output is read from.

        Raises:
            AnatomyError: there is none of that name, or none that is the main one.
        """
        known = ", ".join(stack.name for stack in self.stacks)
        if name is not None:
            for stack in self.stacks:
                if stack.name == name:
                    return stack
            raise AnatomyError(
                f"{self.model_class} has no stack {name!r}; it has {known}{_near(name, [s.name for s in self.stacks])}"
            )
        main = _main(self.stacks, any(site.role == "lm_head" for site in self.outside))
        if main is None:
            raise AnatomyError(f"{self.model_class} has several stacks and none is the main one: name one of {known}")
        return main

    def heads(self) -> tuple[Site, ...]:
        """The task's own output layers; not a language model's."""
        return tuple(site for site in self.outside if site.role == "head")

    def sites(
        self, roles: Sequence[str], layers: Sequence[int] | None = None, stack: str | None = None, partial: bool = False
    ) -> list[Site]:
        """The sites of these roles, stack by stack, in the order of depth.

        Args:
            roles: role names. "cross_attention.q" is q within that sub-layer, "encoder:q" in that stack, ":norm" outside any stack.
            layers: depths in each stack, negative from the end; every one if None.
            stack: look in this stack only.
            partial: accept a role that only some blocks of a kind have.

        Raises:
            AnatomyError: a role matches nothing or only some blocks of a kind, or a depth is out of range.
        """
        request = (
            f"roles={list(roles)}"
            + (f", layers={list(layers)}" if layers is not None else "")
            + (f", stack={stack!r}" if stack else "")
        )
        if isinstance(roles, str):
            raise AnatomyError(f"roles={roles!r}: give a list of roles, such as [{roles!r}]")
        chosen: dict[int, Site] = {}
        for asked in roles:
            found = self._of_role(asked, layers, stack, partial, request)
            if not found:
                raise self._unknown(asked, request)
            chosen |= {id(site): site for site in found}
        order = {id(site): index for index, site in enumerate(self._everything())}
        return sorted(chosen.values(), key=lambda site: order[id(site)])

    def attentions(
        self, layers: Sequence[int] | None = None, stack: str | None = None, cross: bool = True
    ) -> list[Site]:
        """The attentions of each stack, those that look into another stack included if `cross`; [] where there is none.

        Raises:
            AnatomyError: as for `sites`.
        """
        found = []
        for part in [self.stack(stack)] if stack else self.stacks:
            present = {site.role for block in part.blocks for site in block.sites}
            for role in ("attention", "cross_attention") if cross else ("attention",):
                if role in present:
                    found += self.sites([role], layers, part.name)
        return found

    def part(self, sublayer: Site, role: str) -> Site | None:
        """The linear of this role in a sub-layer, such as the `o` of an attention; None where it has none."""
        sites = self.stack(sublayer.stack).blocks[sublayer.depth].sites
        return next((s for s in sites if (s.role, s.within, s.number) == (role, sublayer.role, sublayer.number)), None)

    def closing_norm(self, sublayer: Site) -> Site | None:
        """The norm that ends a block, of its ffn's output and the residual: that of a post-norm model; None in any other.

        Where blocks end with a norm, none follows the last block: one beside the list of blocks, or in a pooler, tells the two apart.
        """
        stack = self.stack(sublayer.stack)
        norms = [site.path for site in self.outside if site.role == "norm" and "emb" not in site.path]
        owners = {path.rpartition(".")[0] for path in norms}
        if any("pool" in p or not p or c.startswith(f"{p}.") for p in owners for c in stack.containers):
            return None
        sites = stack.blocks[sublayer.depth].sites
        attentions = [site.path for site in sites if site.role in ("attention", "cross_attention")]
        ends = [
            site
            for site in sites
            if site.role == "norm" and not site.within and not any(site.path.startswith(f"{p}.") for p in attentions)
        ]
        return ends[-1] if ends and attentions else None

    def residual(self, sublayer: Site) -> Site:
        """Where the residual stream can be read that is added to what a sub-layer gives.

        In a post-norm block that is what the sub-layer is given; else the block's input, or that of the norm in front of the sub-layer.
        Where there are norms behind sub-layers too, every second one is in front.
        """
        block, own = self.stack(sublayer.stack).blocks[sublayer.depth], sublayer.at("output")
        if self.closing_norm(own) is not None:
            return own.at("input")
        parts = block.sublayers
        i = parts.index(own)
        if i == 0:
            return next(site for site in block.sites if site.role == "block").at("input")
        norms = [s for s in block.sites if s.role == "norm" and not s.within and s.in_features == own.in_features]
        if not norms or norms[0].path.rpartition(".")[2].startswith("post_"):
            return own.at("input")
        before = norms[: 2 * len(parts) : 2] if len(norms) >= 2 * len(parts) else norms
        return before[max(i - len(parts), -len(before))].at("input")

    def final_norm(self, stack: Stack) -> Site | None:
        """The norm that follows the last block of a stack; None where the blocks end with their own."""
        found = [
            site
            for site in self.outside
            if site.role == "norm"
            and "emb" not in site.path
            and all(c.startswith(f"{o}." if (o := site.path.rpartition(".")[0]) else "") for c in stack.containers)
        ]
        return found[-1] if found else None

    def _of_role(
        self, asked: str, layers: Sequence[int] | None, stack: str | None, partial: bool, request: str
    ) -> list[Site]:
        where, colon, rest = asked.rpartition(":")
        within, _, role = rest.rpartition(".")
        if (role in OUTSIDE_ROLES and not where) or (colon and not where):
            inside = self._everything() if role in OUTSIDE_ROLES and not colon else self.outside
            return [site for site in inside if site.role == role]
        found: list[Site] = []
        for part in [self.stack(where or stack)] if where or stack else self.stacks:
            blocks = [part.blocks[depth] for depth in _depths(part, layers, self.model_class, request)]
            hits = {
                block.depth: [s for s in block.sites if s.role == role and (not within or s.within == within)]
                for block in blocks
            }
            if not any(hits.values()):
                continue
            missing = [
                b.depth
                for b in blocks
                if not hits[b.depth] and any(hits[o.depth] for o in blocks if o.layout == b.layout)
            ]
            if missing and not partial:
                have = sum(bool(sites) for sites in hits.values())
                raise AnatomyError(
                    f"{self.model_class}: {asked!r} is in {have} of the {len(blocks)} chosen blocks of {part.name!r} ({request})\n"
                    f"not in {', '.join(map(str, missing[:12]))}{' …' if len(missing) > 12 else ''}: choose layers=, or pass partial=True"
                )
            found += [site for block in blocks for site in hits[block.depth]]
        return found

    def _unknown(self, asked: str, request: str) -> AnatomyError:
        role = asked.rpartition(":")[2]
        bare = role.rpartition(".")[2]
        names = sorted(
            {n for s in self._everything() for n in (s.role, f"{s.within}.{s.role}" if s.within else s.role)}
        )
        modules = sorted({s.path.rpartition(".")[2] for s in self._everything() if s.path})
        why = next((note.partition(":")[2] for note in self.notes if bare in note.partition(":")[0].split("/")), "")
        by_hand = f"To name it by hand: pt.anatomy(model, roles={{{role!r}: 'path.in.a.block'}}){_near(bare, modules, 'modules like it')}"
        return AnatomyError(
            f"{self.model_class}: no {asked!r} in its blocks ({request}){_near(role, names)}{';' + why if why else ''}\n"
            f"found: {self._found()}\n"
            + (by_hand if bare in ROLES else f"there is no such role; roles are {', '.join(ROLES)}")
        )

    def _found(self) -> str:
        lines = []
        for stack in self.stacks:
            counts = _counts(stack)
            lines.append(
                f"{stack.name}: "
                + ", ".join(f"{role} {n}" for role, (n, _) in counts.items())
                + f" of {len(stack.blocks)} blocks"
            )
        return "; ".join(lines)

    def coverage(self) -> str:
        """A table for people: how many blocks of each stack have each role, and what is outside."""
        lines = [self.model_class]
        for stack in self.stacks:
            kinds = Counter(block.kind for block in stack.blocks)
            about = ", ".join(f"{n} {kind}" if len(kinds) > 1 else kind for kind, n in kinds.items())
            attends = any("attention" in site.role for block in stack.blocks for site in block.sites)
            again = {site.repeats for block in stack.blocks for site in block.sites} - {1}
            lines.append(
                f"  {stack.name}: {len(stack.blocks)} block{'s' * (len(stack.blocks) != 1)} ({about}), width {stack.hidden_size}"
                + (", causal" if stack.causal else "")
                + (f", each run {max(again)} times" if again else "")
                + (", no attention interface" if attends and not stack.attention_interface else "")
            )
            for role, (count, kind) in _counts(stack).items():
                lines.append(
                    f"    {role}: {count} of {len(stack.blocks)} blocks" + (f" (every {kind})" if kind else "")
                )
        for role, number in Counter(site.role for site in self.outside).items():
            paths = [site.path for site in self.outside if site.role == role]
            lines.append(f"  outside: {role}: {', '.join(paths[:4])}{f' and {number - 4} more' if number > 4 else ''}")
        return "\n".join(lines + [f"  note: {note.partition(':')[2].strip()}" for note in self.notes])

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and dictionaries, for JSON."""
        whole = asdict(self)
        for block in (block for stack in whole["stacks"] for block in stack["blocks"]):
            del block["layout"]
        return whole


def _main(stacks: tuple[Stack, ...], lm_head: bool) -> Stack | None:
    if len(stacks) == 1:
        return stacks[0]
    decoders = [s for s in stacks if s.name == "decoder" or s.name.endswith("_decoder")]
    if len(decoders) == 1:
        return decoders[0]
    if lm_head:  # a language model that also sees or hears
        causal = [s for s in stacks if s.causal]
        return causal[-1] if len(causal) == 1 else None
    encoders = [s for s in stacks if s.name == "encoder"]
    return encoders[0] if len(encoders) == 1 and all(s.name in ("encoder", "backbone") for s in stacks) else None


def _depths(stack: Stack, layers: Sequence[int] | None, model_class: str, request: str) -> list[int]:
    count = len(stack.blocks)
    if layers is None:
        return list(range(count))
    for layer in layers:
        if not -count <= layer < count:
            raise AnatomyError(
                f"{model_class}: layer {layer} is out of range ({request})\n"
                f"stack {stack.name!r} has {count} blocks: choose from {-count} to {count - 1}, negative from the end"
            )
    return sorted({layer % count for layer in layers})


def _counts(stack: Stack) -> dict[str, tuple[int, str]]:
    """Role (qualified where it isn't at home) -> how many blocks have it, and the kinds of block that all have it where not all blocks do."""
    holders: dict[str, set[int]] = {}
    for block in stack.blocks:
        for site in block.sites:
            away = site.within in ("cross_attention", "mixer") and site.role in (*ATTENTION_ROLES, "linear")
            holders.setdefault(f"{site.within}.{site.role}" if away else site.role, set()).add(block.depth)
    counts = {}
    for role in sorted(holders, key=lambda r: (ROLES.index(r.rpartition(".")[2]), r)):
        kinds: dict[str, set[int]] = {}
        for block in stack.blocks:
            kinds.setdefault(_kind(stack, block), set()).add(block.depth)
        whole = [kind for kind, depths in kinds.items() if depths <= holders[role]]
        some = len(holders[role]) < len(stack.blocks)
        counts[role] = (len(holders[role]), ", ".join(whole) if some else "")
    return counts


def _kind(stack: Stack, block: Block) -> str:
    """The class of a block; where blocks of that class are built differently, also the parts that not all of them have."""
    layouts = [set(other.layout) for other in stack.blocks if other.kind == block.kind]
    own = [part for part in block.layout[1:] if not all(part in layout for layout in layouts)]
    return block.kind + (f" with {', '.join(part.partition(':')[0] for part in own)}" if own else "")


def _near(name: str, known: Iterable[str], say: str = "nearest") -> str:
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; {say}: {', '.join(close)}" if close else ""


# ---------------------------------------------------------------------------------------------------------------------- finding it


def anatomy(
    model: nn.Module, *, stacks: Mapping[str, str] | None = None, roles: Mapping[str, str] | None = None
) -> Anatomy:
    """Find the stacks, blocks, roles and sites of a model. Runs nothing, reads no value.

    Args:
        stacks: name -> path of the list of blocks (several with commas, where stages stand side by side), for stacks that can't be inferred.
            Only these are then looked at.
        roles: role -> path inside a block (or from the root, for roles outside the stacks) of the module that plays it. For `attention`
            and `ffn`, "entry -> exit" names two modules.

    Raises:
        AnatomyError: no stack was found, or a path given by hand leads nowhere.
    """
    from petiole.survey import dissect

    return dissect(model, stacks or {}, roles or {})
