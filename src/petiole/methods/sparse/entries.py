"""Changes of single entries of a backbone's tensors: what methods share that look for the few that matter and train those alone.

    W  <-  W + scatter(values, index)        index (k,) flat in W, values (k,)

The backbone is never written: the sum stands in a tensor's place while its module runs. Only `values` has a gradient and a state of the
optimiser, so nothing outside the mask can move: no moment, no weight decay reaches it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from petiole.errors import AttachError
from petiole.method import Base, WeightDelta, raw
from petiole.methods.lowrank.origin import digest
from petiole.methods.sparse.selection import from_steps, to_steps

NOTHING = 1e-7  # a change that is no larger is left out of files


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
