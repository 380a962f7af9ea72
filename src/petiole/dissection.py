"""One block, opened: what each module in it does.

Attention is where q, k and v are; the feed-forward network is where a `down` has its `up`; what is left is a mixer, a convolution, a norm,
or just a linear. Names come from `roles.py`; shapes have the last word.
"""

from __future__ import annotations

import dis
import inspect
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from torch import nn

from petiole import roles as table
from petiole.anatomy import Block, Kind, Rows, Site
from petiole.leaves import (
    Leaf,
    Names,
    attention_named,
    attribute,
    children,
    common,
    has_tensor,
    join,
    leaves,
    parent,
    under,
)

SUBLAYERS = ("attention", "cross_attention", "ffn", "mixer")
HOME = dict.fromkeys(table.ATTENTION_ROLES, "attention") | dict.fromkeys(table.FFN_ROLES, "ffn")


@dataclass
class Found:
    """A block before it is looked into."""

    path: str
    module: nn.Module
    stage: int = 0
    repeats: int = 1


@dataclass
class Core:
    """The innermost module that runs one attention, with the leaves found in it."""

    path: str
    parts: dict[str, Leaf] = field(default_factory=dict)
    mha: Leaf | None = None
    output: Leaf | None = None
    whole: str = ""  # the module that holds the output projection too
    cross: bool = False


def cores(found: list[Leaf], names: Names) -> list[Core]:
    """The attentions among these leaves: where q, k and v (or a fused form) stand side by side, then what is only named so."""
    groups: dict[str, Core] = {}
    for leaf in found:
        if leaf.kind == "mha":
            groups[leaf.path] = Core(leaf.path, mha=leaf)
        role = names.role(leaf.path, table.ATTENTION) if leaf.kind == "linear" else ""
        if role in ("q", "k", "v", "qkv", "kv") and not in_experts(leaf.path):
            groups.setdefault(parent(leaf.path), Core(parent(leaf.path))).parts.setdefault(role, leaf)
    sets: tuple[set[str], ...] = ({"qkv"}, {"q", "k", "v"}, {"q", "kv"})
    known = {
        path: core for path, core in groups.items() if core.mha or any(core.parts.keys() >= parts for parts in sets)
    }
    for path, core in groups.items():
        if (
            path not in known
            and core.parts
            and (attention_named(path) or any(names.told(leaf.path)[1] for leaf in core.parts.values()))
        ):
            known[path] = core
    for leaf in found:
        named = next((above for above in ancestors(leaf.path) if attention_named(above)), "")
        if leaf.kind == "linear" and named and not any(under(p, named) or under(named, p) for p in known):
            known[parent(leaf.path)] = groups.get(parent(leaf.path), Core(parent(leaf.path)))
    return list(known.values())


def in_experts(path: str) -> bool:
    return any(part.lower() in table.EXPERTS for part in path.split("."))


class Dissection:
    """One block, opened: gives every leaf a role, and the sub-layers their entries and exits."""

    def __init__(
        self, block: Found, stack: str, depth: int, configs: list[Any], names: Names, spans: Mapping[str, str]
    ) -> None:
        self.block, self.stack, self.depth, self.configs = block, stack, depth, configs
        self.module, self.names, self.spans = block.module, names, spans
        self.leaves = list(leaves(block.module))
        self.order = {path: n for n, (path, _) in enumerate(modules(block.module))}
        self.where: dict[Leaf, str] = {}  # the sub-layer that a leaf is in
        self.role: dict[Leaf, str] = {}
        self.sites: list[tuple[float, Site]] = []
        self.notes: list[str] = []
        self.hidden = 0

    def get(self, path: str) -> nn.Module:
        return self.module.get_submodule(path) if path else self.module

    def put(
        self, role: str, path: str, kind: Kind, inputs: int, outputs: int, within: str = "", at: float = 0, **more: Any
    ) -> None:
        """Note a site; `path`, `exit` and the like are relative to the block until `done`."""
        site = Site(
            role,
            self.stack,
            self.depth,
            0,
            within,
            path,
            more.pop("exit", path),
            "output",
            kind,
            inputs,
            outputs,
            **more,
        )
        self.sites.append((self.order.get(path, 0) + at, site))

    # ---- the steps

    def open(self) -> Block:
        self.attentions = [core for core in cores(self.leaves, self.names) if not self.is_mixer(core.path)]
        self.mixers = self.find_mixers()
        self.hidden = self.width()
        for core in self.attentions:
            self.attention(core)
        for path in self.mixers:
            for leaf in self.leaves:
                if under(leaf.path, path):
                    self.where[leaf] = "mixer"
            self.put("mixer", path, "module", self.hidden, self.hidden, at=-0.1, parameter="", bias="")
        self.feed_forwards()
        for leaf in self.leaves:
            self.leaf(leaf)
        self.by_hand()
        outputs = self.hidden
        if not self.attentions and not self.mixers:
            convs = [leaf for leaf in self.leaves if leaf.kind == "conv"]
            if convs and self.hidden == 0:
                self.hidden, outputs = (
                    convs[0].inputs,
                    max(convs[-1].outputs, convs[0].outputs if len(convs) == 1 else 0),
                )
        self.put("block", "", "module", self.hidden or outputs, outputs, at=-1, parameter="", bias="")
        return self.done(outputs)

    def done(self, width: int) -> Block:
        root = self.block.path
        numbers: Counter[tuple[str, str, int]] = Counter()
        sites = []
        for _, site in sorted(self.sites, key=lambda pair: pair[0]):
            which = (site.within, site.role, site.expert)
            absolute = {name: join(root, getattr(site, name)) for name in ("path", "exit")}
            if not site.called:
                absolute["caller"] = join(root, site.caller)
            if site.role in ("attention", "cross_attention"):
                absolute["core"] = join(root, site.core)
            sites.append(replace(site, number=numbers[which], repeats=self.block.repeats, **absolute))  # type: ignore[arg-type]
            numbers[which] += 1
        layout = (
            type(self.module).__name__,
            *(f"{n}:{type(m).__name__}" for n, m in children(self.module) if next(leaves(m), None)),
        )
        return Block(
            self.stack, self.depth, root, type(self.module).__name__, tuple(sites), self.block.stage, width, layout
        )

    def is_mixer(self, path: str) -> bool:
        return any(part.lower() in table.MIXER for part in path.split(".")) and self.recurrent(path)

    def recurrent(self, path: str) -> bool:
        """Whether a module has what attention lacks: a convolution, or parameters of its own that are no matrices."""
        module = self.get(path)
        return bool(module._parameters) or any(leaf.kind == "conv" for leaf in leaves(module))

    def find_mixers(self) -> list[str]:
        found: list[str] = []
        for path, module in modules(self.module):
            name = path.rpartition(".")[2].lower()
            if (
                name not in table.MIXER
                or any(under(path, other) for other in found)
                or any(under(c.path, path) for c in self.attentions)
            ):
                continue
            inside = list(leaves(module))
            if any(leaf.kind == "linear" and leaf.path for leaf in inside) and self.recurrent(path):
                found.append(path)
        return found

    def width(self) -> int:
        """Width d of the hidden state in this block."""
        for core in sorted(self.attentions, key=self.is_cross):
            told = self.output_projection(core)
            if told:
                return told.outputs
            for role in ("q", "qkv"):
                if role in core.parts:
                    return core.parts[role].inputs
        for leaf in self.leaves:
            if leaf.kind == "linear" and any(
                under(leaf.path, path) for path in (*self.mixers, *(c.path for c in self.attentions))
            ):
                return leaf.inputs
        ups = [
            leaf.inputs
            for leaf in self.leaves
            if leaf.kind == "linear" and self.names.role(leaf.path, table.FFN) in ("up", "gate")
        ]
        norms = Counter(leaf.inputs for leaf in self.leaves if leaf.kind == "norm")
        if ups:
            return ups[0]
        return norms.most_common(1)[0][0] if norms and not any(leaf.kind == "conv" for leaf in self.leaves) else 0

    # ---- attention

    def is_cross(self, core: Core) -> bool:
        chain = [core.path, *ancestors(core.path)]
        if any(self.names.told(leaf.path)[0] == "cross_attention" for leaf in core.parts.values()):
            return True
        for path in chain:
            told = getattr(self.get(path), "is_cross_attention", None)
            if isinstance(told, bool) and told:
                return True
        return any(part.lower() in table.CROSS for part in core.path.split("."))

    def attention(self, core: Core) -> None:
        core.cross = self.is_cross(core)
        if core.parts.keys() >= {"q", "qkv"}:
            core.parts["kv"] = core.parts.pop("qkv")  # in cross-attention the fused linear makes keys and values only
        within = "cross_attention" if core.cross else "attention"
        core.output = self.output_projection(core)
        core.whole = common([core.path + ".", core.output.path]) if core.output and core.path else core.path
        for leaf in self.leaves:
            if (
                leaf not in self.where
                and under(leaf.path, core.whole)
                and (core.whole or leaf in (*core.parts.values(), core.output))
            ):
                self.where[leaf] = within
        heads, shared, size = self.heads(core)
        if core.mha:
            self.multihead(core.mha, within)
        else:
            self.projections(core, within)
        first = core.parts.get("qkv") or core.parts.get("q")
        entry = core.whole
        if not entry or ("qkv" in core.parts and self.norm_before(entry, core.parts["qkv"])):
            entry = first.path if first else ""
        leave = core.output.path if core.output and not core.mha else core.whole
        self.put(
            within, entry, "module", self.hidden, core.output.outputs if core.output else self.hidden, at=-0.1, exit=leave or entry,
            parameter="", bias="", core=core.path, heads=heads, key_value_heads=shared, head_size=size,
        )  # fmt: skip

    def output_projection(self, core: Core) -> Leaf | None:
        """The linear named like an output beside q, k and v, else in the modules above, short of the block itself."""
        if core.mha:
            return core.mha
        others = [other.path for other in self.attentions if other is not core and other.path]
        for root in [core.path, *(path for path in ancestors(core.path) if path)]:
            found = [
                leaf
                for leaf in self.leaves
                if leaf.kind == "linear" and under(leaf.path, root) and leaf not in core.parts.values()
                and self.names.role(leaf.path, table.ATTENTION) == "o" and not any(under(leaf.path, other) for other in others)
            ]  # fmt: skip
            if not core.path:  # q, k and v stand in the block itself
                found = [
                    leaf
                    for leaf in found
                    if not parent(leaf.path) and leaf.path.lower() not in ("output", "dense", "proj_out")
                ]
            right = [leaf for leaf in found if leaf.outputs == self.hidden]
            if found:
                return (right or found)[0]
        return None

    def norm_before(self, root: str, leaf: Leaf) -> bool:
        """Whether a module normalises its input itself, ahead of this leaf."""
        before = (
            n
            for n in self.leaves
            if n.kind == "norm" and parent(n.path) == root and n.inputs == self.hidden and not of_head(n)
        )
        return any(self.order[norm.path] < self.order[leaf.path] for norm in before)

    def heads(self, core: Core) -> tuple[int, int, int]:
        """Number of heads, of key and value heads, and their size; 0 where they can't be told."""
        around = [self.get(core.path), *(self.get(path) for path in ancestors(core.path)), *self.configs]
        heads, size = attribute(table.HEADS, around), attribute(table.HEAD_SIZE, around)
        parts = core.parts
        if core.mha:
            return heads, heads, core.mha.inputs // max(heads, 1)
        if not size and heads and (parts.keys() & {"q", "qkv"}):
            whole = parts["q"].outputs if "q" in parts else core.output.inputs if core.output else parts["qkv"].inputs
            size = whole // heads
        wide = {"k": 1, "kv": 2, "qkv": 2}
        for role, share in wide.items():
            if size and heads and role in parts:
                rest = parts[role].outputs - (heads * size if role == "qkv" else 0)
                return (
                    (heads, rest // (share * size), size) if rest > 0 and rest % (share * size) == 0 else (heads, 0, 0)
                )
        return heads, 0, 0

    def projections(self, core: Core, within: str) -> None:
        parts, path = core.parts, core.path
        if not parts and path:
            for leaf in self.leaves:  # one linear three times as wide as its input, unknown by name
                if (
                    leaf.kind == "linear"
                    and parent(leaf.path) == path
                    and leaf.outputs == 3 * leaf.inputs
                    and leaf is not core.output
                ):
                    self.role[leaf] = "qkv"
                    self.note(
                        "q/k/v",
                        f"`{leaf.path}` holds q, k and v, but not in an order that can be told; `qkv` is the whole of it",
                    )
        for role, leaf in parts.items():
            self.role[leaf] = "linear" if role == "kv" else role
        if core.output:
            self.role[core.output] = "o"
        if "kv" in parts and self.heads(core)[1]:
            half = parts["kv"].outputs // 2
            self.slices(parts["kv"], within, k=((0, half),), v=((half, 2 * half),))
        if "qkv" in parts:
            rows = self.split(core, parts["qkv"])
            if rows:
                self.slices(parts["qkv"], within, q=rows[0], k=rows[1], v=rows[2])
            else:
                self.note(
                    "q/k/v",
                    f"`{parts['qkv'].path}` holds q, k and v, but not in an order that can be told; `qkv` is the whole of it",
                )

    def split(self, core: Core, leaf: Leaf) -> tuple[Rows, Rows, Rows] | None:
        """Row ranges of q, k and v in a fused linear, None if they can't be told."""
        heads, groups, size = self.heads(core)
        module = self.get(core.path)
        if not heads or groups < 1 or heads % groups:
            return None
        if any(hasattr(module, name) for name in table.SCRAMBLED):
            return None
        shared = getattr(module, "multi_query", None)
        by_group = not shared if isinstance(shared, bool) else by_head(type(module))
        if role_name(leaf) in table.QKV_BY_GROUP or by_group:
            wide = heads // groups * size
            starts = [group * (wide + 2 * size) for group in range(groups)]
            return (
                tuple((s, s + wide) for s in starts),
                tuple((s + wide, s + wide + size) for s in starts),
                tuple((s + wide + size, s + wide + 2 * size) for s in starts),
            )
        q, kv = heads * size, groups * size
        return ((0, q),), ((q, q + kv),), ((q + kv, q + 2 * kv),)

    def slices(self, leaf: Leaf, within: str, **parts: Rows) -> None:
        """Sites for the parts of a fused linear."""
        for n, (role, rows) in enumerate(parts.items(), 1):
            width = sum(stop - start for start, stop in rows)
            self.put(
                role,
                leaf.path,
                "linear",
                leaf.inputs,
                width,
                within,
                n / 10,
                rows=rows,
                transposed=leaf.transposed,
                **self.tensors(leaf),
            )

    def multihead(self, leaf: Leaf, within: str) -> None:
        """torch's own attention: its projections are parameters, and its output projection is never called."""
        d = leaf.inputs
        own: dict[str, Any] = {"called": False, "caller": leaf.path}
        bias = "in_proj_bias" if leaf.module._parameters.get("in_proj_bias") is not None else ""
        rows = {"q": ((0, d),), "k": ((d, 2 * d),), "v": ((2 * d, 3 * d),)}
        if leaf.module._parameters.get("in_proj_weight") is not None:
            fused = {"parameter": "in_proj_weight", "bias": bias, **own}
            self.put("qkv", leaf.path, "parameter", d, 3 * d, within, **fused)
            for n, (role, part) in enumerate(rows.items(), 1):
                self.put(role, leaf.path, "parameter", d, d, within, n / 10, rows=part, **fused)
        else:
            for n, role in enumerate("qkv", 1):  # the bias is shared by all three, so it belongs to none
                out, width = leaf.module.get_parameter(f"{role}_proj_weight").shape
                self.put(
                    role,
                    leaf.path,
                    "parameter",
                    width,
                    out,
                    within,
                    n / 10,
                    parameter=f"{role}_proj_weight",
                    bias="",
                    **own,
                )
        path = join(leaf.path, "out_proj")
        bias = "bias" if getattr(leaf.module.out_proj, "bias", None) is not None else ""
        self.put("o", path, "parameter", d, d, within, bias=bias, **own)

    # ---- feed-forward

    def feed_forwards(self) -> None:
        free = [
            leaf
            for leaf in self.leaves
            if leaf not in self.where
            and leaf.kind in ("linear", "packed")
            and not re.search(r"emb|norm", leaf.path.lower().rpartition(".")[0])
        ]
        units: dict[str, list[Leaf]] = {}
        for down in free:
            if down.kind == "packed":
                units.setdefault(parent(down.path) or down.path, []).append(down)
            elif self.names.role(down.path, table.FFN) == "down":
                self.pair(down, free, units)
        self.pair_by_shape([leaf for leaf in free if leaf not in self.role and leaf.kind == "linear"], units)
        for root in sorted(units, key=len, reverse=True):  # an expert's network belongs to the network of all experts
            outer = next(
                (other for other in sorted(units, key=len) if other and other != root and under(root, other)), None
            )
            if outer is not None:
                units[outer] += units.pop(root)
        for root, members in units.items():
            self.feed_forward(root, members)

    def pair(self, down: Leaf, free: list[Leaf], units: dict[str, list[Leaf]]) -> None:
        """Find the linears that feed a `down`, in the innermost module that has any."""
        for root in ancestors(down.path):
            ups = [
                leaf
                for leaf in free
                if under(leaf.path, root) and leaf not in self.role and self.names.role(leaf.path, table.FFN) in ("up", "gate")
                and leaf.outputs in (down.inputs, 2 * down.inputs) and leaf.inputs == down.outputs
            ]  # fmt: skip
            if ups:
                self.unit(root, ups, down, units)
                return

    def pair_by_shape(self, free: list[Leaf], units: dict[str, list[Leaf]]) -> None:
        """Two linears d -> f -> d, one after the other, whatever their names."""
        for up, down in pairwise(free):
            right = up.inputs == down.outputs == self.hidden and up.outputs == down.inputs and up not in self.role
            root = parent(up.path)
            if right and (root == parent(down.path) or up.outputs != self.hidden):
                self.unit(common([up.path, down.path]), [up], down, units)

    def unit(self, root: str, ups: list[Leaf], down: Leaf, units: dict[str, list[Leaf]]) -> None:
        for up in ups:
            if up.outputs != down.inputs:
                self.role[up] = "gate_up"
            else:
                self.role[up] = "up" if len(ups) == 1 else self.names.role(up.path, table.FFN) or "up"
        self.role[down] = "down"
        parts = root.split(".")
        for n, part in enumerate(parts):
            if part.lower() in table.EXPERTS:
                root = ".".join(parts[:n])
                break
        while root and isinstance(self.get(root), nn.ModuleList):  # a list is never called
            root = root.rpartition(".")[0]
        units.setdefault(root, []).extend([*ups, down])

    def feed_forward(self, root: str, members: list[Leaf]) -> None:
        inside = (
            [leaf for leaf in self.leaves if under(leaf.path, root) and leaf not in self.where] if root else members
        )
        for leaf in inside:
            self.where[leaf] = "ffn"
            named = leaf.kind in ("router", "linear") and self.names.role(leaf.path, table.FFN) in ("router", "gate")
            if named and leaf not in self.role and any(in_experts(m.path) or m.kind == "packed" for m in members):
                self.role[leaf] = "router"
        ups = [leaf for leaf in members if self.role.get(leaf) in ("up", "gate", "gate_up")]
        downs = [leaf for leaf in members if self.role.get(leaf) == "down"]
        normed = [n for n in inside if n.kind == "norm" and n.inputs == self.hidden and parent(n.path) == root]
        entry = leave = root
        if not root:
            entry, leave = ups[0].path.partition(".")[0], downs[-1].path
        elif len(downs) == 1 and (normed or adds_residual(type(self.get(root)))):
            leave = downs[0].path
            if len(ups) == 1 and self.norm_before(root, ups[0]):
                entry = ups[0].path
        self.put("ffn", entry, "module", self.hidden, self.hidden, at=-0.1, exit=leave, parameter="", bias="")
        for leaf in ups:
            if self.role[leaf] == "gate_up":
                self.gate_and_up(leaf)

    def gate_and_up(self, leaf: Leaf) -> None:
        half = leaf.outputs // 2
        first, second = ((0, half),), ((half, leaf.outputs),)
        holder = self.get(leaf.path.rpartition(".")[0])
        last = getattr(holder, "gate_last", None)
        if type(holder).__name__.lower() in table.UP_FIRST or last is True:
            self.slices(leaf, "ffn", gate=second, up=first)
        elif role_name(leaf) in table.GATE_FIRST or last is False:
            self.slices(leaf, "ffn", gate=first, up=second)
        else:
            self.note(
                "gate/up",
                f"`{leaf.path}` holds gate and up in an order that can't be told; `gate_up` is the whole of it",
            )

    def packed(self, leaf: Leaf) -> None:
        """Experts in one tensor (E, ., .): a site for each matrix of each expert."""
        own = {
            name: p
            for name, p in leaf.module._parameters.items()
            if p is not None and p.ndim == 3 and self.names.role(name, table.FFN)
        }
        gated = getattr(leaf.module, "has_gate", True) and not any(
            self.names.role(name, table.FFN) == "gate" for name in own
        )
        downs = [p for name, p in own.items() if self.names.role(name, table.FFN) == "down"]
        told = getattr(leaf.module, "is_transposed", None)
        inner = next((side for p in downs for side in p.shape[1:] if side != self.hidden), self.hidden)
        for n, (name, tensor) in enumerate(own.items()):
            role, (count, rows, columns) = self.names.role(name, table.FFN), tensor.shape
            out = self.hidden if role == "down" else inner
            fused = (
                role == "up"
                and gated
                and 2 * inner in (rows, columns)
                and (self.hidden, inner) != (rows, columns) != (inner, self.hidden)
            )
            transposed = bool(told) if told is not None else rows != (2 * out if fused else out)
            inputs, outputs = (rows, columns) if transposed else (columns, rows)
            bias = next((b for b in (f"{name}_bias", f"{name}.bias") if leaf.module._parameters.get(b) is not None), "")
            halves: dict[str, Rows] = {}
            if fused and getattr(leaf.module, "is_concatenated", True) and role_name(leaf, name) in table.GATE_FIRST:
                halves = {"gate": ((0, outputs // 2),), "up": ((outputs // 2, outputs),)}
            elif fused:
                self.note(
                    "gate/up", f"`{join(leaf.path, name)}` holds gate and up interleaved; `gate_up` is the whole of it"
                )
            for expert in range(count):
                for m, (part, cut) in enumerate({"gate_up" if fused else role: (), **halves}.items()):
                    width = sum(stop - start for start, stop in cut) or outputs
                    self.put(
                        part, leaf.path, "parameter", inputs, width, "ffn", n / 10 + m / 100, rows=cut, transposed=transposed,
                        parameter=name, bias=bias, expert=expert, called=False, caller=leaf.path,
                    )  # fmt: skip

    # ---- what is left

    def tensors(self, leaf: Leaf) -> dict[str, Any]:
        return {"parameter": "weight", "bias": "bias" if has_bias(leaf.module) else ""}

    def lent(self, leaf: Leaf) -> dict[str, Any]:
        """In a mixer: whether its owner hands the weight to a scan or a kernel instead of calling the module, at least on one of its ways."""
        owner = parent(leaf.path)
        if self.where.get(leaf) != "mixer" or role_name(leaf) not in weights_used(type(self.get(owner))):
            return {}
        return {"called": False, "caller": owner}

    def leaf(self, leaf: Leaf) -> None:
        """The site of a leaf itself."""
        within, role = self.where.get(leaf, ""), self.role.get(leaf, "")
        told = self.names.told(leaf.path)
        if told[1] and role not in (told[1], "gate_up"):
            within, role = told[0] or within or HOME.get(told[1], ""), told[1]
        if leaf.kind == "packed":
            self.packed(leaf)
        elif leaf.kind == "norm":
            deep = any(under(leaf.path, c.path) and parent(leaf.path) != c.path for c in self.attentions if c.path)
            inner = of_head(leaf) or leaf.inputs not in (self.hidden, 0) or deep
            self.put(
                role or "norm",
                leaf.path,
                "norm",
                leaf.inputs,
                leaf.outputs,
                within if inner or within == "mixer" else "",
                **norm_tensors(leaf),
            )
        elif leaf.kind == "linear":
            more = {"transposed": leaf.transposed, **self.tensors(leaf), **self.lent(leaf)}
            kind: Kind = "parameter" if "caller" in more else "linear"
            self.put(role or "linear", leaf.path, kind, leaf.inputs, leaf.outputs, within, **more)
        elif leaf.kind == "router":  # its output is more than a product: the change has to be in the weight
            own: dict[str, Any] = {"called": False, "caller": leaf.path, **self.tensors(leaf)}
            self.put(role or "linear", leaf.path, "parameter", leaf.inputs, leaf.outputs, within, **own)
        elif leaf.kind == "conv":
            more = {**self.tensors(leaf), **leaf.convolution}
            kind = "parameter" if self.lent(leaf) else "conv"
            self.put(role or "conv", leaf.path, kind, leaf.inputs, leaf.outputs, within, **more, **self.lent(leaf))
        elif leaf.kind == "embedding":
            self.put(role or embedding_role(leaf), leaf.path, "embedding", leaf.inputs, leaf.outputs, within, bias="")

    def by_hand(self) -> None:
        """Sub-layers that the caller named stand in place of those inferred."""
        for name, span in self.spans.items():
            within, _, role = name.rpartition(".")
            ends = [end.strip() for end in span.split("->")]
            first, last = self.match(ends[0]), self.match(ends[-1])
            if first is None or last is None:
                continue
            self.sites = [(n, site) for n, site in self.sites if site.role != role]
            more = {"core": first} if role in ("attention", "cross_attention") else {}
            self.put(
                role, first, "module", self.hidden, self.hidden, within, -0.1, exit=last, parameter="", bias="", **more
            )

    def match(self, end: str) -> str | None:
        """The first module of the block whose path ends so."""
        return next((path for path in self.order if path and (path == end or path.endswith("." + end))), None)

    def note(self, roles: str, text: str) -> None:
        self.notes.append(f"{roles}: {self.stack}: {text}")


def ancestors(path: str) -> list[str]:
    """Every module above a path, innermost first, "" (the block) last."""
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) - 1, -1, -1)] if path else []


def modules(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module with its path, in the order of registration."""
    yield path, module
    for name, child in children(module):
        yield from modules(child, join(path, name))


def role_name(leaf: Leaf, tensor: str = "") -> str:
    """The name under which the table knows a leaf."""
    path = (tensor or leaf.path).lower().split(".")
    return path[-2] if len(path) > 1 and (path[-1].isdigit() or path[-1] in table.WRAPPED) else path[-1]


def of_head(leaf: Leaf) -> bool:
    """Whether a norm is of queries or keys: `q_norm`, `norm_k`, `k_layernorm`, …"""
    return bool(re.search(r"(^|_)(q|k|kv|query|key)(_|$)", role_name(leaf)))


def weights_used(cls: type[nn.Module]) -> set[str]:
    """Names of the parts whose `weight` the code of a module takes."""
    found = set()
    for method in vars(cls).values():
        code = getattr(inspect.unwrap(method), "__code__", None) if callable(method) else None
        for step, following in pairwise(dis.get_instructions(code) if code else []):
            if step.opname == following.opname == "LOAD_ATTR" and following.argval == "weight":
                found.add(str(step.argval).lower())
    return found


def adds_residual(cls: type[nn.Module]) -> bool:
    """Whether a module takes the residual as an argument, so that its output is more than its own work."""
    return bool(
        {"residual", "input_tensor", "shortcut"} & set(inspect.signature(inspect.unwrap(cls.forward)).parameters)
    )


def by_head(cls: type[nn.Module]) -> bool:
    """Whether a forward views its fused projection as (…, heads, 3 · head size): it then multiplies 3 by the size of a head."""
    code = dis.get_instructions(inspect.unwrap(cls.forward))
    recent: list[Any] = []
    for step in code:
        if (
            step.opname == "BINARY_OP"
            and step.argrepr == "*"
            and 3 in recent
            and any(name in table.HEAD_SIZE for name in recent)
        ):
            return True
        recent = [*recent[-3:], step.argval]
    return False


def has_bias(module: nn.Module) -> bool:
    return module._parameters.get("bias") is not None or (
        has_tensor(module, "bias") and getattr(module, "bias", None) is not None
    )


def norm_tensors(leaf: Leaf) -> dict[str, Any]:
    own = [name for name, p in leaf.module._parameters.items() if p is not None]
    weight = "weight" if "weight" in own else next((name for name in own if name not in ("bias", "beta")), "")
    return {"parameter": weight, "bias": next((name for name in ("bias", "beta") if name in own), "")}


def embedding_role(leaf: Leaf) -> str:
    """What a table is indexed by: tokens, positions, or types (segments, labels)."""
    name = role_name(leaf)
    if re.search(r"pos|relative|distance|query_embed|^wpe$|^rel_", name):
        return "position_embedding"
    near = ".".join(leaf.path.lower().split(".")[-2:])
    return "type_embedding" if re.search(r"type|segment|(^|[_.])langs?_|label|class", near) else "embedding"
