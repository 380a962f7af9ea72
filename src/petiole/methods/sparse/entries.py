"""Changes of single entries of a backbone's tensors: what methods share that look for the few that matter and train those alone.

    W  <-  W + scatter(values, index)        index (k,) flat in W, values (k,)

The backbone is never written: the sum stands in a tensor's place while its module runs. Only `values` has a gradient and a state of the
optimiser, so nothing outside the mask can move: no moment, no weight decay reaches it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from petiole.anatomy import Anatomy, Site
from petiole.errors import AttachError, ConfigError
from petiole.method import Base, Layers, Place, WeightDelta, raw
from petiole.methods.full.names import norms, outside_heads
from petiole.methods.lowrank.origin import digest

NOTHING = 1e-7  # a change that is no larger is left out of files


# ---------------------------------------------------------------------------------------------------------------- which entries


def largest(sizes: Sequence[Tensor], k: int, taken: Sequence[Tensor] | None = None) -> list[Tensor]:
    """The k entries of largest absolute value over all tensors together, as flat indices in each, in order.

    Of equal ones those come first that stand in an earlier tensor, then at a smaller index. Compared in float32; two passes over the
    bits, which are ordered as the numbers are, so O(N) and 4 bytes for each entry.

    Args:
        taken: indices in each tensor that do not count.

    Raises:
        ConfigError: k is below 1, or more than there are.
    """
    every = [size.detach().float().abs().reshape(-1).view(torch.int32) for size in sizes]
    for bits, gone in zip(every, taken or (), strict=taken is not None):
        bits[gone] = -1
    free = sum(bits.numel() for bits in every) - sum(gone.numel() for gone in taken or ())
    if not 1 <= k <= free:
        raise ConfigError(f"k = {k}: from 1 to {free:,}, the entries there are")
    upper, above = _reach([(bits >> 16) + 1 for bits in every], k)  # 0 is for those that are taken
    lower, more = _reach([bits[(bits >> 16) + 1 == upper] & 0xFFFF for bits in every], k - above)
    threshold, left = ((upper - 1) << 16) | lower, k - above - more
    found = []
    for bits in every:
        chosen = bits > threshold
        equal = (bits == threshold).nonzero().view(-1)[:left]
        left -= equal.numel()
        chosen[equal] = True
        found.append(chosen.nonzero().view(-1))
    return found


def _reach(numbers: Sequence[Tensor], k: int) -> tuple[int, int]:
    """The largest number that at least k of them reach, and how many are above it."""
    counts = torch.stack([torch.bincount(each, minlength=1 << 16).cpu() for each in numbers]).sum(0)
    reached = counts.flip(0).cumsum(0)  # by how many, from the largest number down
    place = int(torch.searchsorted(reached, k))
    return len(counts) - 1 - place, int(reached[place - 1]) if place else 0


def to_steps(index: Tensor, values: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Flat indices (k,) and values (k,) -> the first index and then the distances between them, and the values in that order.

    As the reference stores a mask: an index counts along the first dimension fastest, i₀ + s₀ (i₁ + s₁ (i₂ + …)); in int64.
    """
    flat, stride = torch.zeros_like(index), 1
    rest, inner = index, index.new_tensor([*shape[1:], 1]).flip(0).cumprod(0).flip(0).tolist()
    for size, below in zip(shape, inner, strict=True):
        flat = flat + stride * (rest // below)
        rest, stride = rest % below, stride * size
    order = flat.argsort()
    return torch.diff(flat[order], prepend=flat.new_zeros(1)), values[order]


def from_steps(steps: Tensor, values: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What `to_steps` gave -> flat indices in order, and their values.

    Raises:
        AttachError: they are no indices of such a tensor.
    """
    rest = steps.cumsum(0)
    entries = torch.Size(shape).numel()
    if steps.shape != values.shape or steps.ndim != 1 or steps.dtype != torch.int64:
        raise AttachError(f"a mask of a {tuple(shape)} tensor has {tuple(steps.shape)} {steps.dtype} steps")
    if bool((steps[1:] < 1).any()) or bool(((rest < 0) | (rest >= entries)).any()):
        raise AttachError(f"a mask names entries that a {tuple(shape)} tensor has not, or one twice")
    index = torch.zeros_like(rest)
    for place, size in enumerate(shape):
        index = index + (rest % size) * torch.Size(shape[place + 1 :]).numel()
        rest = rest // size
    order = index.argsort()
    return index[order], values[order]


# ---------------------------------------------------------------------------------------------------------------------- deltas


class Entries(nn.Module):
    """() -> the change of one tensor

    At first it is `dense`, while it is looked for which entries matter; then `values` (k,) at `index` (k,), which is flat and in order.
    Opened again it is dense from where it was, and `kept` (k,) holds the values that it had.

    Args:
        like: the tensor.
    """

    index: Tensor | None
    kept: Tensor | None
    values: nn.Parameter | None
    dense: nn.Parameter | None

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.shape = torch.Size(like.shape)
        self.dense = nn.Parameter(torch.empty(self.shape, device="meta" if like.is_meta else None))
        self.register_parameter("values", None)
        self.register_buffer("index", None)
        self.register_buffer("kept", None)

    def forward(self) -> Tensor:
        if self.dense is not None:
            return self.dense
        assert self.index is not None and self.values is not None
        return self.values.new_zeros(self.shape.numel()).scatter(0, self.index, self.values).view(self.shape)

    @property
    def form(self) -> str:
        return "sparse" if self.dense is None else "dense" if self.index is None else "opened"

    @property
    def parameter(self) -> nn.Parameter:
        """What trains."""
        found = self.values if self.dense is None else self.dense
        assert found is not None
        return found

    def chosen(self) -> tuple[Tensor, Tensor]:
        """The mask and its values, where it began if it is opened; without entries if there is none yet."""
        if self.index is None:
            nothing = self.parameter.detach().new_zeros(0)
            return nothing.long(), nothing
        values = self.kept if self.values is None else self.values.detach()
        assert values is not None
        return self.index, values

    def mask(self, index: Tensor, values: Tensor) -> None:
        """Change these entries alone."""
        device, kind = self.parameter.device, self.parameter.dtype
        self.dense = self.kept = None
        self.index = index.to(device)
        self.values = nn.Parameter(values.detach().to(device, kind), requires_grad=len(values) > 0)

    def open(self) -> None:
        """Change every entry, from where it is."""
        dense = nn.Parameter(self().detach())
        _, self.kept = self.chosen()
        self.dense, self.values = dense, None


class SparseChange(WeightDelta):
    """ΔW and Δb of one module, at every entry or at some.

    Args:
        tensors: the module's own, by "weight" or "bias".
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.tensors = nn.ModuleDict({name: Entries(tensor) for name, tensor in tensors.items()})
        self.origin: dict[str, str] = {}  # a digest of each tensor before its change

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        for name, entries in self.entries():
            entries.parameter.zero_()
            own = base.site.parameter if name == "weight" else base.site.bias
            self.origin[name] = digest(raw(base.module, own))

    def entries(self) -> Iterator[tuple[str, Entries]]:
        for name, module in self.tensors.items():
            assert isinstance(module, Entries)
            yield name, module

    def weight(self, base: Tensor) -> Tensor:
        return self.tensors["weight"]() if "weight" in self.tensors else base.new_zeros(()).expand_as(base)

    def bias(self, base: Tensor | None) -> Tensor | None:
        return self.tensors["bias"]() if "bias" in self.tensors else None

    # ---- files: steps and values, for exactly this backbone

    def recipe(self) -> dict[str, Any]:
        return dict(self.origin)

    def structure(self) -> dict[str, Any]:
        form = next(entries.form for _, entries in self.entries())
        return {} if form == "dense" else {"form": form}

    def restructure(self, structure: Mapping[str, Any]) -> None:
        if structure not in ({}, {"form": "sparse"}, {"form": "opened"}):
            raise AttachError(f"a sparse change has no such structure: {dict(structure)}")
        for _, entries in self.entries():
            if not structure:
                entries.dense, entries.values = nn.Parameter(torch.zeros_like(entries())), None
                entries.index = entries.kept = None
                continue
            nothing = entries.parameter.new_zeros(0)
            entries.mask(nothing.long(), nothing)
            if structure["form"] == "opened":
                entries.open()

    def folded_state(self) -> dict[str, Tensor]:
        if self.structure() != {"form": "sparse"}:
            return self.state_dict()
        found: dict[str, Tensor] = {}
        for name, entries in self.entries():
            index, values = entries.chosen()
            kept = values.abs() > NOTHING
            steps, values = to_steps(index[kept], values[kept], entries.shape)
            found |= {f"{name}.steps": steps, f"{name}.values": values}
        return found

    def unfold(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Also makes room for as many entries as the file holds."""
        found = dict(state)
        for name, entries in self.entries() if self.structure() else ():
            own = f"tensors.{name}"
            if {f"{name}.steps", f"{name}.values"} <= found.keys():
                steps, values = found.pop(f"{name}.steps"), found.pop(f"{name}.values")
                found[f"{own}.index"], found[f"{own}.values"] = from_steps(steps, values, entries.shape)
            if f"{own}.index" in found:
                form, index = entries.form, found[f"{own}.index"]
                entries.mask(index, index.new_zeros(index.shape, dtype=entries.parameter.dtype))
                if form == "opened":
                    entries.open()
        return found


class Tied(WeightDelta):
    """The change of another module's weight, which is this module's, too.

    Args:
        first: which holds it.
    """

    def __init__(self, first: SparseChange) -> None:
        super().__init__()
        self.first = (first,)

    def weight(self, base: Tensor) -> Tensor:
        return self.first[0].weight(base)


# ----------------------------------------------------------------------------------------------------------------------- places


def changes(slug: str, anatomy: Anatomy, model: nn.Module, maskable: Sequence[str], layers: Layers) -> Iterator[Place]:
    """A `SparseChange` for each module of the backbone that holds maskable tensors, in the model's order.

    Norms, task heads and a language model's output are left out; where the output is tied to the token table, it changes with that.

    Raises:
        AttachError: a tensor is quantised, or nothing is maskable.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for name, parameter in maskable_parameters(anatomy, model, maskable, layers):
        if not parameter.is_floating_point():
            raise AttachError(f"{slug}: {name} is {parameter.dtype}, of which single entries can't change")
        owner, _, attribute = name.rpartition(".")
        parts.setdefault(owner, {})[attribute] = parameter
    if not parts:
        raise AttachError(f"{slug}: {anatomy.model_class} has nothing of {', '.join(maskable)} that can change")
    places = Places(anatomy)
    everywhere = [
        (path, name, parameter)
        for path, module in model.named_modules()  # each once
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
    for owner, tensors in parts.items():
        module, left = model.get_submodule(owner), dict(tensors)
        pairs = (
            [("weight", "bias")]
            if module._parameters.get("weight") is not None and {*left} & {"weight", "bias"}
            else []
        )
        pairs += [(name, "") for name in left if not pairs or name not in pairs[0]]
        for weight, bias in pairs:
            held = {kind: left[own] for kind, own in (("weight", weight), ("bias", bias)) if own in left}
            delta = SparseChange(held)
            yield Place(places.site(owner, weight, bias), delta)
            for path, name, parameter in everywhere:
                if parameter is held.get("weight") and model.get_submodule(path) is not module:
                    yield Place(places.site(path, name, ""), Tied(delta))


def maskable_parameters(
    anatomy: Anatomy, model: nn.Module, maskable: Sequence[str], layers: Layers = None
) -> Iterator[tuple[str, nn.Parameter]]:
    """The backbone's parameters of these kinds: weights and biases (of blocks), embeddings, pooler."""
    blocks = [f"{site.path}." for site in anatomy.sites(["block"], layers)]
    every = [f"{block.path}." for stack in anatomy.stacks for block in stack.blocks]
    roles = {site.path: site.role for site in anatomy.outside}
    base = getattr(model, "base_model_prefix", "")
    within = f"{base}." if base and isinstance(getattr(model, base, None), nn.Module) else ""
    left_out = set(norms(anatomy, model))
    for name, parameter in outside_heads(anatomy, model):
        role = roles.get(name.rpartition(".")[0], "")
        if name in left_out or not name.startswith(within) or role in ("lm_head", "norm"):
            continue
        if any(name.startswith(block) for block in every):
            kind = "weights" if parameter.ndim > 1 else "biases"
            if not any(name.startswith(block) for block in blocks):
                continue
        else:
            kind = "pooler" if role == "pooler" else "embeddings"
        if kind in maskable:
            yield name, parameter


class Places:
    """Sites of whole tensors, each with a name of its own."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.blocks = [block for stack in anatomy.stacks for block in stack.blocks]
        inside = [site for block in self.blocks for site in block.sites]
        self.known: dict[str, Site] = {}
        for site in (*inside, *anatomy.outside):
            if site.role not in ("block", "attention", "cross_attention", "ffn", "mixer"):
                self.known.setdefault(site.path, site)
        self.seen: Counter[tuple[str, int, str, str]] = Counter()

    def site(self, path: str, parameter: str, bias: str) -> Site:
        """The tensors of the module at a path, whole and as they are stored."""
        known = self.known.get(path)
        block = next((b for b in self.blocks if f"{path}.".startswith(f"{b.path}.")), None)
        stack, depth = (block.stack, block.depth) if block is not None else ("", -1)
        role, within = parameter, ""
        if known is not None and known.parameter == parameter:
            role, within = known.role, known.within
        self.seen[stack, depth, within, role] += 1
        return Site(
            role=role,
            stack=stack,
            depth=depth,
            number=self.seen[stack, depth, within, role] - 1,
            within=within,
            path=path,
            exit=path,
            side="output",
            kind="parameter",
            in_features=0,
            out_features=0,
            parameter=parameter,
            bias=bias,
            caller=known.caller if known is not None else "",
        )
