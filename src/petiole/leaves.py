"""Modules judged by the shapes of their tensors, and paths judged by the table of names: what `dissection.py` works with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from petiole import roles as table


@dataclass(frozen=True, eq=False)
class Leaf:
    """A module that holds tensors of its own and is looked at no further."""

    path: str
    module: nn.Module
    kind: Literal["linear", "router", "conv", "embedding", "norm", "mha", "packed"]
    inputs: int = 0
    outputs: int = 0
    transposed: bool = False

    @property
    def convolution(self) -> dict[str, Any]:
        """What a site says of a convolution, besides its sizes; {} elsewhere."""
        if self.kind != "conv":
            return {}
        return {"kernel": tuple(self.module.kernel_size), "groups": self.module.groups}  # type: ignore[arg-type]

    @property
    def weights(self) -> int:
        """Roughly, how many matrices it holds."""
        return {"linear": 1, "conv": 1, "packed": 2, "mha": 2}.get(self.kind, 0)


def children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Named children, without those that petiole added. A module listed twice comes twice."""
    for name, child in module._modules.items():
        if child is not None and not name.startswith("petiole"):
            yield name, child


def leaves(module: nn.Module, path: str = "") -> Iterator[Leaf]:
    """The leaves under a module, in the order of registration."""
    leaf = as_leaf(module, path)
    if leaf is not None:
        yield leaf
        return
    for name, child in children(module):
        yield from leaves(child, join(path, name))


def as_leaf(module: nn.Module, path: str) -> Leaf | None:
    """What a module is, judged by its sizes and the shapes of its tensors, not by its class."""
    own = {name: tuple(p.shape) for name, p in module._parameters.items() if p is not None}
    held: Any = module  # torch types every attribute of a module as a tensor or a module
    inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if "in_proj_bias" in module._parameters and hasattr(module, "out_proj"):
        return Leaf(path, module, "mha", held.embed_dim, held.embed_dim)
    if (
        isinstance(inputs, int)
        and isinstance(outputs, int)
        and (own or module._buffers or has_tensor(module, "weight"))
    ):
        return Leaf(path, module, "linear", inputs, outputs)
    if isinstance(getattr(module, "nf", None), int) and len(own.get("weight", ())) == 2:
        return Leaf(path, module, "linear", own["weight"][0], own["weight"][1], transposed=True)
    if hasattr(module, "num_embeddings") and hasattr(module, "embedding_dim") and has_tensor(module, "weight"):
        return Leaf(path, module, "embedding", held.num_embeddings, held.embedding_dim)
    if hasattr(module, "kernel_size") and hasattr(module, "in_channels") and has_tensor(module, "weight"):
        return Leaf(path, module, "conv", held.in_channels, held.out_channels)
    normal = "norm" in type(module).__name__.lower()
    if not (normal or own) or any(next(leaves(child), None) is not None for _, child in children(module)):
        return None
    if normal:
        shape = own.get("weight") or tuple(getattr(held, "normalized_shape", ()) or (getattr(held, "num_features", 0),))
        return Leaf(path, module, "norm", shape[-1], shape[-1])
    packed = [name for name, shape in own.items() if len(shape) == 3 and role_of(name, table.FFN)]
    if packed:
        return Leaf(path, module, "packed")
    if len(own.get("weight", ())) == 2 and "embed" not in type(module).__name__.lower():
        return Leaf(path, module, "router", own["weight"][1], own["weight"][0])
    return None


def has_tensor(module: nn.Module, name: str) -> bool:
    """Whether a module has a tensor of that name, found without computing it."""
    if module._parameters.get(name) is not None or module._buffers.get(name) is not None:
        return True
    return name in getattr(module, "parametrizations", ()) or getattr(type(module), name, None) is not None


def join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def parent(path: str) -> str:
    """The module above, lists and wrappers skipped: of `attn.to_out.0` and `attn.q_proj.linear` it is `attn`."""
    above, _, name = path.rpartition(".")
    return above.rpartition(".")[0] if name.isdigit() or name in table.WRAPPED else above


def under(path: str, root: str) -> bool:
    return not root or path == root or path.startswith(root + ".")


def common(paths: Iterable[str]) -> str:
    """The innermost module above all of these paths."""
    split = [path.split(".") for path in paths]
    shared = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def role_of(path: str, names: Mapping[str, frozenset[str]]) -> str:
    """The role that a table gives to the longest end of a path; "" if none."""
    parts = path.lower().split(".")
    ends = [".".join(parts[-n:]) for n in (3, 2, 1) if len(parts) >= n]
    if len(parts) > 1 and (parts[-1].isdigit() or parts[-1] in table.WRAPPED):
        ends.append(parts[-2])
    return next((role for end in ends for role, known in names.items() if end in known), "")


def attention_named(path: str) -> bool:
    name = path.rpartition(".")[2].lower()
    return ("attn" in name or "attention" in name) and "norm" not in name and name not in table.MIXER


def attribute(name_list: Sequence[str], modules: Sequence[Any]) -> int:
    """The first of these attributes that is a positive whole number."""
    for module in modules:
        for name in name_list:
            value = getattr(module, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return 0


class Names:
    """The table of names, overruled by what the caller named by hand: role (may be qualified) -> end of a path inside a block."""

    def __init__(self, by_hand: Mapping[str, str] | None = None) -> None:
        self.by_hand = {role: end for role, end in (by_hand or {}).items() if "->" not in end}

    def told(self, path: str) -> tuple[str, str]:
        """Sub-layer and role that the caller gave to this path, "" if none."""
        for name, end in self.by_hand.items():
            if path == end or path.endswith("." + end):
                within, _, role = name.rpartition(".")
                return within, role
        return "", ""

    def role(self, path: str, names: Mapping[str, frozenset[str]]) -> str:
        """The role in one part of the table; "" if none."""
        _, role = self.told(path)
        if role:
            role = "up" if role == "gate_up" else role  # its shape tells that it is both
            return role if role in names else ""
        return role_of(path, names)
