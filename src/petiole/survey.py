"""The whole model: which lists are stacks, what they are called, and what stands outside them."""

from __future__ import annotations

import difflib
import inspect
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from petiole import roles as table
from petiole.anatomy import Anatomy, Block, Kind, Site, Stack
from petiole.dissection import (
    SUBLAYERS,
    Dissection,
    Found,
    ancestors,
    cores,
    embedding_role,
    has_bias,
    modules,
    norm_tensors,
    role_name,
)
from petiole.errors import AnatomyError
from petiole.leaves import Leaf, Names, children, join, leaves, under


def dissect(model: nn.Module, stacks: Mapping[str, str], by_hand: Mapping[str, str]) -> Anatomy:
    """See `petiole.anatomy.anatomy`."""
    check_by_hand(model, stacks, by_hand)
    names = Names(
        {
            role: end
            for role, end in by_hand.items()
            if role.rpartition(".")[2] not in (*SUBLAYERS, *table.OUTSIDE_ROLES)
        }
    )
    rows = given(model, stacks) if stacks else Lists(names).rows(model) or Lists(names, strict=False).rows(model)
    if not rows:
        lists = [path for path, module in modules(model) if is_list(module) and path]
        raise AnatomyError(
            f"{type(model).__name__}: no list of two or more blocks of one kind was found; "
            + (f"its lists are {', '.join(lists[:6])}" if lists else "it holds no ModuleList or Sequential")
            + "\nTo name one by hand: pt.anatomy(model, stacks={'encoder': 'path.of.the.list'})"
        )
    if not stacks:
        name_rows(model, rows)
    spans = {role: end for role, end in by_hand.items() if role.rpartition(".")[2] in SUBLAYERS}
    found, notes = [], []
    for row in rows:
        blocks = []
        for depth, block in enumerate(row.blocks):
            work = Dissection(block, row.name, depth, configs(model, block.path), names, spans)
            blocks.append(work.open())
            notes += work.notes
        found.append(as_stack(model, row, blocks))
    outside = Outside(model, found, by_hand).open()
    anatomy = Anatomy(type(model).__name__, tuple(found), tuple(outside), tuple(dict.fromkeys(notes)))
    check_roles(anatomy, model, by_hand)
    return anatomy


# ------------------------------------------------------------------------------------------------------------------ named by hand


def check_by_hand(model: nn.Module, stacks: Mapping[str, str], by_hand: Mapping[str, str]) -> None:
    known = dict(modules(model))
    for name, paths in stacks.items():
        for path in split_paths(paths):
            if path not in known:
                raise AnatomyError(
                    f"stacks={{{name!r}: {paths!r}}}: {type(model).__name__} has no module {path!r}{near(path, known)}"
                )
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise AnatomyError(
                f"stacks={{{name!r}: …}}: the name of a stack is lower-case letters, digits and underscores"
            )
    for role in by_hand:
        within, _, bare = role.rpartition(".")
        if bare not in table.ROLES or within not in ("", *SUBLAYERS):
            raise AnatomyError(
                f"roles={{{role!r}: …}}: no such role; one of {', '.join(table.ROLES)}{near(role, table.ROLES)}"
            )


def check_roles(anatomy: Anatomy, model: nn.Module, by_hand: Mapping[str, str]) -> None:
    sites = [site for stack in anatomy.stacks for block in stack.blocks for site in block.sites] + list(anatomy.outside)
    for name, end in by_hand.items():
        paths = {path for s in sites if s.role == name.rpartition(".")[2] for path in (s.path, s.exit)}
        for part in (part.strip() for part in end.split("->")):
            if not any(path == part or path.endswith("." + part) for path in paths):
                known = {path.rpartition(".")[2] for path, _ in modules(model)}
                raise AnatomyError(
                    f"roles={{{name!r}: {end!r}}}: no module of {type(model).__name__} ends in {part!r}{near(part, known)}"
                )


def near(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; nearest: {', '.join(close)}" if close else ""


def given(model: nn.Module, stacks: Mapping[str, str]) -> list[Row]:
    """The stacks that the caller named: stages opened where a list holds any, else every child a block."""
    rows = []
    for name, paths in stacks.items():
        containers, blocks = split_paths(paths), []
        for n, path in enumerate(containers):
            container = model.get_submodule(path)
            found = Lists(Names(), strict=False).within(container, path, nested=True)
            found = found or [Found(join(path, key), child) for key, child in children(container)]
            blocks += [replace(block, stage=n) for block in found] if len(containers) > 1 else found
        if not blocks:
            raise AnatomyError(f"stacks={{{name!r}: {paths!r}}}: it holds no modules")
        rows.append(Row(containers, blocks, name))
    return rows


def split_paths(paths: str) -> list[str]:
    return [path.strip() for path in paths.split(",")]


# ------------------------------------------------------------------------------------------------------------- lists that are stacks


@dataclass
class Row:
    """Lists that hold the blocks of one stack."""

    containers: list[str]
    blocks: list[Found]
    name: str = ""


def is_list(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.Sequential))


class Lists:
    """Finds the lists of blocks.

    Args:
        strict: a block mixes at least two matrices and something else: a norm, convolutions, attention. Otherwise it holds any matrix.
    """

    def __init__(self, names: Names, strict: bool = True) -> None:
        self.names, self.strict = names, strict
        self.memory: dict[tuple[int, bool], list[Found]] = {}

    def is_block(self, module: nn.Module) -> bool:
        found = list(leaves(module))
        weights = sum(leaf.weights for leaf in found)
        if not found or found[0].path == "" or not self.strict:
            return weights > 0 and found[0].path != ""
        other = any(leaf.kind in ("norm", "mha") for leaf in found) or sum(leaf.kind == "conv" for leaf in found) > 1
        return weights > 1 and (other or bool(cores(found, self.names)))

    def within(self, container: nn.Module, path: str, nested: bool = False) -> list[Found]:
        """The blocks that a list holds, those of its stages one after the other; none if it is no list of blocks."""
        if path.rpartition(".")[2].lower() in table.EXPERTS:
            return []
        known = (id(container), nested)
        if known not in self.memory:
            self.memory[known] = self.search_list(container, nested)
        return [replace(block, path=join(path, block.path)) for block in self.memory[known]]

    def search_list(self, container: nn.Module, nested: bool) -> list[Found]:
        members = [(name, child) for name, child in children(container) if next(leaves(child), None) is not None]
        most = max(Counter(type(child).__name__ for _, child in members).values(), default=0)
        if nested and len(members) > 1 and most == 1:
            return []  # all different: the sub-layers of one block
        if isinstance(container, nn.Sequential) and not nested and most < 2:
            return []
        inner = [self.stage(child, name) for name, child in members]
        found: dict[int, list[Found]] = {}
        for n, (name, child) in enumerate(members):
            if id(child) in found:  # the same module again
                for block in found[id(child)]:
                    block.repeats += 1
            elif inner[n]:
                found[id(child)] = [replace(block, stage=n) for block in inner[n]]
            elif self.is_block(child):
                found[id(child)] = [Found(name, child)]
            elif not any(inner):
                return []
        return [block for blocks in found.values() for block in blocks]

    def stage(self, module: nn.Module, path: str) -> list[Found]:
        """The blocks inside a stage: a module that holds lists of blocks and little else. None if it is a block itself."""
        lists: list[list[Found]] = []

        def search(part: nn.Module, where: str) -> None:
            for name, child in children(part):
                blocks = self.within(child, join(where, name), nested=True) if is_list(child) else []
                if blocks:
                    lists.append(blocks)
                elif name.lower() not in table.EXPERTS:
                    search(child, join(where, name))

        if is_list(module):
            lists = [blocks] if (blocks := self.within(module, path, nested=True)) else []
        else:
            search(module, path)
        if not lists:
            return []
        inside = [block.path for blocks in lists for block in blocks]
        rest = [leaf for leaf in leaves(module, path) if not any(under(leaf.path, block) for block in inside)]
        if any(leaf.kind in ("embedding", "mha", "packed") for leaf in rest) or cores(rest, self.names):
            return []  # a block with a list inside, or a whole model
        # Several lists run in turn: the first of each, then the second of each; convolutions before what attends.
        order = sorted(
            (index, bool(cores(list(leaves(block.module)), self.names)), n)
            for n, blocks in enumerate(lists)
            for index, block in enumerate(blocks)
        )
        return [lists[n][index] for index, _, n in order]

    def rows(self, model: nn.Module) -> list[Row]:
        """Every stack, outermost lists first."""
        rows: list[Row] = []

        def search(module: nn.Module, path: str) -> None:
            if path.rpartition(".")[2].lower() in table.STAGE and (blocks := self.stage(module, path)):
                rows.append(Row([path], blocks))
                return
            kids = list(children(module))
            taken: set[str] = set()
            for siblings in numbered(kids):
                parts = [(name, self.within(getattr(module, name), join(path, name), nested=True)) for name in siblings]
                if all(blocks for _, blocks in parts) and alike([b for _, blocks in parts for b in blocks]):
                    staged = [replace(block, stage=n) for n, (_, blocks) in enumerate(parts) for block in blocks]
                    rows.append(Row([join(path, name) for name in siblings], staged))
                    taken |= set(siblings)
            for name, child in kids:
                blocks = self.within(child, join(path, name)) if is_list(child) and name not in taken else []
                if blocks and (self.strict or len(blocks) > 1):
                    rows.append(Row([join(path, name)], blocks))
                elif name not in taken:
                    search(child, join(path, name))

        if is_list(model) and (blocks := self.within(model, "")):
            return [Row([""], blocks)]
        search(model, "")
        return self.main(rows)

    def main(self, rows: list[Row]) -> list[Row]:
        """Where some lists attend, leave out those that only project, and convolutions beside attention in the same part of the model."""
        attend = {id(row): any(self.mixes(block.module) for block in row.blocks) for row in rows}
        if not any(attend.values()):
            return rows
        kept = []
        for row in rows:
            convolves = any(leaf.kind == "conv" for block in row.blocks for leaf in leaves(block.module))
            others = [other.containers[0] for other in rows if attend[id(other)]]
            part = next(
                (
                    above
                    for above in reversed(ancestors(row.containers[0]))
                    if not all(under(path, above) for path in others)
                ),
                "-",
            )
            if attend[id(row)] or (convolves and not any(under(path, part) for path in others)):
                kept.append(row)
        return kept

    def mixes(self, block: nn.Module) -> bool:
        return bool(cores(list(leaves(block)), self.names)) or recurrent(block)


def numbered(kids: list[tuple[str, nn.Module]]) -> list[list[str]]:
    """Sibling lists whose names differ in a number at the end: layer1, layer2, … are the stages of one stack."""
    groups: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for name, child in kids:
        match = re.fullmatch(r"(.*?[a-zA-Z_])(\d+)", name)
        if match and is_list(child):
            groups[match[1]].append((int(match[2]), name))
    return [[name for _, name in sorted(members)] for members in groups.values() if len(members) > 1]


def alike(blocks: list[Found]) -> bool:
    """Whether most of the blocks are of one class."""
    return max(Counter(type(block.module).__name__ for block in blocks).values()) > len(blocks) // 2


# ---------------------------------------------------------------------------------------------------------------- what a stack is


def configs(model: nn.Module, path: str) -> list[Any]:
    """Configurations on the way to a module, nearest first."""
    chain = [path, *ancestors(path)]
    return [config for part in chain if (config := getattr(model.get_submodule(part), "config", None)) is not None]


def name_rows(model: nn.Module, rows: list[Row]) -> None:
    """Name the stacks by the words on their paths, and put them in the order in which they run."""
    words = [
        [table.STACK_NAMES[part] for part in row.containers[0].lower().split(".") if part in table.STACK_NAMES]
        for row in rows
    ]
    for row, found in zip(rows, words, strict=True):
        modality = next((word for word in found if word in table.MODALITIES), "")
        kind = next((word for word in found if word not in (*table.MODALITIES, "backbone")), "")
        one_way = looks_back(model, row) or all(recurrent(block.module) for block in row.blocks)
        row.name = modality if modality and len(rows) > 1 else kind or ("decoder" if one_way else "encoder")
    for name, count in Counter(row.name for row in rows).items():
        for n in [n for n, row in enumerate(rows) if row.name == name and count > 1]:
            extra = [word for word in dict.fromkeys(words[n]) if word != name]
            if extra:
                rows[n].name = extra[0] if extra[0] == "backbone" else f"{name}_{extra[0]}"
    for name, count in Counter(row.name for row in rows).items():
        for place, row in enumerate([row for row in rows if row.name == name and count > 1]):
            row.name += str(place + 1) if place else ""
    rank = {name: n for n, name in enumerate(table.STACK_ORDER)}
    rows.sort(key=lambda row: [rank[word] for word in row.name.split("_") if word in rank] or [rank["encoder"]])


def recurrent(block: nn.Module) -> bool:
    """Whether a block has a mixer in the place of attention."""
    found = list(leaves(block))
    mixers = {
        above
        for leaf in found
        if leaf.kind == "linear"
        for above in ancestors(leaf.path)
        if above.rpartition(".")[2].lower() in table.MIXER
    }
    return bool(mixers) and not cores(found, Names())


def looks_back(model: nn.Module, row: Row) -> bool | None:
    """Whether self-attention sees earlier positions only; None if that can't be told, or differs from block to block."""
    masks = masks_made(model, row)
    if masks == {"causal"}:
        return True  # whatever the modules say: they are also given the mask
    words = attention_words(model, row)
    if words and None not in words:
        return words.pop() if len(words) == 1 else None
    if masks == {"bidirectional"}:
        return False
    alone = [c for c in configs(model, row.containers[0]) if not getattr(c, "is_encoder_decoder", False)]
    told = [getattr(config, "is_decoder", None) for config in alone]
    return next((word for word in told if isinstance(word, bool)), None)


def attention_words(model: nn.Module, row: Row) -> set[bool | None]:
    """What the self-attention modules say of themselves: a flag, or a triangle kept as a buffer."""
    words: set[bool | None] = set()
    for block in row.blocks:
        for core in cores(list(leaves(block.module)), Names()):
            above = [model.get_submodule(join(block.path, path)) for path in (core.path, *ancestors(core.path))]
            named = any(part.lower() in table.CROSS for part in core.path.split("."))
            if named or any(getattr(module, "is_cross_attention", None) is True for module in above):
                continue
            flags = [flag for module in above if isinstance(flag := getattr(module, "is_causal", None), bool)]
            shapes = [tuple(b.shape) for b in above[0]._buffers.values() if b is not None and b.ndim == 4]
            triangle = any(shape[-1] == shape[-2] > 1 for shape in shapes)
            words.add(flags[0] if flags else True if triangle else None)
    return words


def masks_made(model: nn.Module, row: Row) -> set[str]:
    """Which kinds of mask the owner of a stack makes: of the modules above, the first that makes any, short of one that holds more than it."""
    for path in ancestors(row.containers[0]):
        owner = model.get_submodule(path)
        names = code_names(type(owner))
        made = {
            kind for kind in ("causal", "bidirectional") if any(kind in n and n.startswith("create_") for n in names)
        }
        if made:
            return made
        outside = (leaf for leaf in leaves(owner, path) if not under(leaf.path, row.containers[0]))
        if any(leaf.kind in ("embedding", "conv") or "patch" in leaf.path for leaf in outside):
            break
    return set()


def code_names(cls: type) -> set[str]:
    """Names that the methods of a class use, decorators unwrapped."""
    found: set[str] = set()
    for kind in cls.__mro__:
        if kind in (nn.Module, object) or kind.__module__ == "transformers.modeling_utils":
            break
        for value in vars(kind).values():
            code = getattr(inspect.unwrap(value), "__code__", None) if callable(value) else None
            found |= set(code.co_names) if code else set()
    return found


def attention_classes(model: nn.Module, blocks: list[Block]) -> set[type]:
    """Of the modules that run the attentions of a stack."""
    paths = [site.core for block in blocks for site in block.sites if site.role in ("attention", "cross_attention")]
    return {type(model.get_submodule(path)) for path in paths}


def through_interface(model: nn.Module, blocks: list[Block]) -> bool:
    """Whether every attention of a stack asks Transformers for its attention function."""
    classes = attention_classes(model, blocks)
    return bool(classes) and all("ALL_ATTENTION_FUNCTIONS" in code_names(cls) for cls in classes)


def returns_probabilities(model: nn.Module, blocks: list[Block]) -> bool:
    """Whether attentions without the interface return their probabilities second: their models tell Transformers to record them there."""
    told = [getattr(type(module), "_can_record_outputs", None) or {} for _, module in modules(model)]
    named = [part for each in told for name, part in each.items() if name in ("attentions", "cross_attentions")]
    recorders = [one for part in named for one in (part if isinstance(part, list) else [part])]
    known = {getattr(one, "target_class", one) for one in recorders if getattr(one, "index", 1) == 1}
    classes = attention_classes(model, blocks)
    return bool(classes) and classes <= known and not through_interface(model, blocks)


def as_stack(model: nn.Module, row: Row, blocks: list[Block]) -> Stack:
    repeats = shared_times(model, row)
    if repeats > 1:
        blocks = [replace(b, sites=tuple(replace(s, repeats=s.repeats * repeats) for s in b.sites)) for b in blocks]
    causal = looks_back(model, row)
    return Stack(
        row.name,
        tuple(blocks),
        blocks[-1].hidden_size,
        causal,
        through_interface(model, blocks),
        tuple(row.containers),
        returns_probabilities(model, blocks),
    )


def shared_times(model: nn.Module, row: Row) -> int:
    """How often a block runs where the configuration says that layers come in groups that share their weights."""
    members = len(list(children(model.get_submodule(row.containers[0]))))
    for config in configs(model, row.containers[0]):
        groups, layers = getattr(config, "num_hidden_groups", None), getattr(config, "num_hidden_layers", None)
        if isinstance(groups, int) and isinstance(layers, int) and groups == members:
            return max(layers // groups, 1)
    return 1


# ------------------------------------------------------------------------------------------------------------- outside the stacks


class Outside:
    """What stands before, between and after the stacks."""

    def __init__(self, model: nn.Module, stacks: list[Stack], by_hand: Mapping[str, str]) -> None:
        self.model, self.by_hand = model, by_hand
        inside = tuple(block.path + "." for stack in stacks for block in stack.blocks)
        self.leaves = [leaf for leaf in leaves(model) if not (leaf.path + ".").startswith(inside)]
        self.holders = {above for stack in stacks for path in stack.containers for above in (path, *ancestors(path))}
        self.owners = {above for above in self.holders if above}
        self.sites: list[Site] = []

    def open(self) -> list[Site]:
        self.language = self.language_heads()
        heads = self.heads()
        uncalled = self.uncalled()
        for path in heads:
            self.head(path)
        for leaf in self.leaves:
            if leaf not in uncalled and not any(under(leaf.path, head) for head in heads):
                self.leaf(leaf)
        return self.numbered()

    def numbered(self) -> list[Site]:
        """Count the sites of each role; the table that the model gets its tokens from is the first of its kind."""
        order = {path: n for n, (path, _) in enumerate(modules(self.model))}
        get = getattr(self.model, "get_input_embeddings", None)
        first = quietly(get)
        numbers: Counter[str] = Counter()
        done = []
        for site in sorted(
            self.sites,
            key=lambda s: (s.role == "embedding" and self.model.get_submodule(s.path) is not first, order[s.path]),
        ):
            done.append(replace(site, number=numbers[site.role]))
            numbers[site.role] += 1
        return sorted(done, key=lambda s: order[s.path])

    def told(self, path: str) -> str:
        return next(
            (
                role
                for role, end in self.by_hand.items()
                if role in table.OUTSIDE_ROLES and (path == end or path.endswith("." + end))
            ),
            "",
        )

    def language_heads(self) -> set[Leaf]:
        """Linears that map to the vocabulary: the model's own word, a weight shared with the tokens', or a name."""
        output = quietly(getattr(self.model, "get_output_embeddings", None))
        words = [leaf.module._parameters.get("weight") for leaf in self.leaves if leaf.kind == "embedding"]
        shared = {id(word) for word in words if word is not None}
        found = set()
        for leaf in self.leaves:
            named = role_name(leaf) in table.LM_HEAD and output is None
            tied = id(leaf.module._parameters.get("weight")) in shared
            if leaf.kind == "linear" and (leaf.module is output or tied or named or self.told(leaf.path) == "lm_head"):
                found.add(leaf)
        return found

    def heads(self) -> list[str]:
        """Paths of the task's own layers: what the model adds to its base model, else what is named so."""
        by_hand = [path for path, _ in modules(self.model) if path and self.told(path) == "head"]
        by_hand += getattr(self.model, "trained_entries", ())  # of a model that has parts of its own before its stacks
        if by_hand:
            return by_hand
        base = getattr(self.model, "base_model_prefix", "")
        top = [(name, child) for name, child in children(self.model) if next(leaves(child), None) is not None]
        before = any(
            leaf.kind == "embedding" or self.is_patch(leaf) for leaf in self.leaves if not under(leaf.path, base)
        )
        if base and base in dict(top) and not self.language and not before:
            return [name for name, _ in top if name != base and name not in self.holders]
        found: list[str] = []
        for path, module in modules(self.model):
            name = path.rpartition(".")[2].lower()
            if (
                name in table.HEAD
                and path not in self.holders
                and any(leaf.path.startswith(path) for leaf in self.leaves)
            ):
                held = [leaf for leaf in leaves(module, path) if leaf.kind in ("linear", "conv")]
                outer = any(under(path, other) for other in found)
                beside = (
                    path.rpartition(".")[0] in self.holders
                )  # next to a stack, not in a sub-layer of something else
                if held and not outer and beside and not self.language & set(held):
                    found.append(path)
        return found

    def head(self, path: str) -> None:
        """One site for the whole head, however many layers it has."""
        module = self.model.get_submodule(path)
        parts = [leaf for leaf in leaves(module, path) if leaf.kind in ("linear", "conv", "norm")]
        ends = [leaf for leaf in parts if leaf.kind != "norm"] or parts
        if not ends:
            return
        if len(parts) == 1 and parts[0].path == path:
            self.put("head", parts[0])
        else:
            self.sites.append(
                Site(
                    "head",
                    "",
                    -1,
                    0,
                    "",
                    path,
                    path,
                    "output",
                    "module",
                    ends[0].inputs,
                    ends[-1].outputs,
                    parameter="",
                    bias="",
                )
            )

    def uncalled(self) -> set[Leaf]:
        """Embeddings that only lend their weight: another module of the same weight stands inside the owner of a stack."""
        by_weight: dict[int, list[Leaf]] = defaultdict(list)
        for leaf in self.leaves:
            if leaf.kind == "embedding" and leaf.module._parameters.get("weight") is not None:
                by_weight[id(leaf.module._parameters["weight"])].append(leaf)
        lent = set()
        for same in by_weight.values():
            depth = {
                leaf: max([len(owner) for owner in self.owners if under(leaf.path, owner)], default=0) for leaf in same
            }
            lent |= {leaf for leaf in same if depth[leaf] < max(depth.values())}
        return lent

    def put(self, role: str, leaf: Leaf) -> None:
        kind: Kind = "parameter" if leaf.kind == "router" else leaf.kind  # type: ignore[assignment]
        names = norm_tensors(leaf) if leaf.kind == "norm" else {"bias": "bias" if has_bias(leaf.module) else ""}
        called: dict[str, Any] = {"called": False, "caller": leaf.path} if leaf.kind == "router" else {}
        site = Site(role, "", -1, 0, "", leaf.path, leaf.path, "output", kind, leaf.inputs, leaf.outputs)
        self.sites.append(replace(site, transposed=leaf.transposed, **names, **called, **leaf.convolution))

    @staticmethod
    def is_patch(leaf: Leaf) -> bool:
        """Whether it turns an image, a spectrogram or patches of one into hidden states."""
        words = r"patch|embed" if leaf.kind == "conv" else r"patch_embed"
        return (
            leaf.kind in ("conv", "linear")
            and bool(re.search(words, leaf.path.lower()))
            and not re.search(r"pos_conv|conv_pos", leaf.path)
        )

    def leaf(self, leaf: Leaf) -> None:
        told, path = self.told(leaf.path), leaf.path.lower()
        if leaf.kind in ("mha", "packed"):
            return
        if told:
            self.put(told, leaf)
        elif leaf in self.language:
            self.put("lm_head", leaf)
        elif leaf.kind == "embedding":
            self.put(embedding_role(leaf), leaf)
        elif leaf.kind == "conv" or self.is_patch(leaf):
            self.put("patch_embedding" if self.is_patch(leaf) else "conv", leaf)
        elif leaf.kind == "linear" and re.search(r"(^|\.)pooler(\.|$)", path):
            self.put("pooler", leaf)
        else:
            self.put("norm" if leaf.kind == "norm" else "linear", leaf)


def quietly(get: Any) -> nn.Module | None:
    """What a model's own accessor gives; None where it has none or says that it isn't implemented."""
    try:
        found = get() if callable(get) else None
    except (NotImplementedError, AttributeError):
        return None
    return found if isinstance(found, nn.Module) else None
