"""A backbone that is one linear with given weights, for tests that compare with reference numbers.

model, delta = linears.attached(pt.LoRA(rank=2, roles=["q"]), W, b)
y = model(x)
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petiole as pt

FIXTURES = Path(
    os.environ.get("PETIOLE_FIXTURES", Path(__file__).resolve().parents[2] / "shared" / "fixtures")
).resolve()


class Block(nn.Module):
    def __init__(self, W: Tensor, b: Tensor | None) -> None:
        super().__init__()
        self.query = nn.Linear(W.shape[1], W.shape[0], bias=b is not None, dtype=W.dtype)
        self.query.weight.data = W.clone()
        if b is not None:
            self.query.bias.data = b.clone()

    def forward(self, x: Tensor) -> Tensor:
        return self.query(x)


class OneLinear(nn.Module):
    """x -> W x + b. Its stack has two blocks, of which the second is never run."""

    def __init__(self, W: Tensor, b: Tensor | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(W, b), Block(W, b)])

    @property
    def linear(self) -> nn.Linear:
        return self.blocks[0].query

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x)


class Parallel(nn.Module):
    """x -> the outputs of several linears side by side, stacked: (linears, ..., out)."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(W, None) for W in weights])

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([block(x) for block in self.blocks])


def parts(model: OneLinear | Parallel) -> pt.Anatomy:
    return pt.anatomy(model, stacks={"encoder": "blocks"}, roles={"q": "query"})


def attached(method: pt.Method, W: Tensor, b: Tensor | None = None, seed: int = 0) -> tuple[OneLinear, Any]:
    """The model with the method on its first block, and the delta, in float64 where W is."""
    model = OneLinear(W, b)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(W.dtype if W.dtype == torch.float64 else torch.float32)
    try:
        chosen = method.model_copy(update={"layers": (0,), "roles": ("q",)})
        tuned = pt.attach(model, chosen, seed=seed, found=parts(model))
    finally:
        torch.set_default_dtype(usual)
    return model, tuned.slots[0].delta


def of(model: nn.Module, name: str = "default") -> pt.Adaptation:
    """The adaptation that is attached."""
    return pt.adaptations(model)[name]


def set_(parameter: Tensor, value: Tensor) -> None:
    """Copy values into a parameter, whose shape they must have."""
    assert parameter.shape == value.shape, (tuple(parameter.shape), tuple(value.shape))
    with torch.no_grad():
        parameter.copy_(value)


# ---------------------------------------------------------------------------------------------------------------- reference cases


def cases(slug: str) -> list[Any]:
    """Every reference case of a system, for `pytest.mark.parametrize`; one that is skipped where there are none."""
    found = sorted((FIXTURES / slug).glob("*.safetensors"))
    if not found:
        return [pytest.param(None, marks=pytest.mark.skip(reason=f"no reference results in {FIXTURES / slug}"))]
    return [pytest.param(path, id=path.stem) for path in found]


class Case:
    """The tensors of a case by name, and its header.

    Used in a `with`, at whose end every field of `config` must have been read and every result compared: an option that nobody
    honours fails the test.
    """

    def __init__(self, path: Path, slug: str) -> None:
        import json

        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            header = file.metadata()
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert header["slug"] == slug
        self.kind: str = header["kind"]
        self.config: dict[str, Any] = json.loads(header["config"])
        self._unread, self._uncompared = (
            set(self.config),
            {n for n in self.tensors if n.split(".")[0] in ("out", "grad")},
        )
        self.worst = 0.0
        self.double = any(t.dtype == torch.float64 for t in self.tensors.values())

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def get(self, name: str) -> Tensor | None:
        return self.tensors.get(name)

    def option(self, name: str, default: Any = ...) -> Any:
        self._unread.discard(name)
        return self.config[name] if default is ... else self.config.get(name, default)

    def same(self, name: str, found: Tensor, tolerance: float, beside: Tensor | None = None) -> None:
        """Compare with an `out.` or `grad.` tensor, relative to its largest entry, or to that of `beside` where all of it may be rounding."""
        wanted = self.tensors[name]
        self._uncompared.discard(name)
        assert found.shape == wanted.shape, f"{name}: {tuple(found.shape)}, not {tuple(wanted.shape)}"
        if not wanted.numel():
            return
        size = max(float((wanted if beside is None else beside).abs().max()), 1e-12)
        error = float((found.detach().to(wanted.dtype) - wanted).abs().max()) / size
        self.worst = max(self.worst, error)
        assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"

    def __enter__(self) -> Case:
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is not None:
            return
        print(f"largest relative error {self.worst:.1e}")
        assert not self._unread, f"options that nobody honours: {sorted(self._unread)}"
        assert not self._uncompared, f"results that nobody compared: {sorted(self._uncompared)}"


def gradients(y: Tensor, g: Tensor, *tensors: Tensor) -> Iterator[Tensor]:
    """Of Σ y g with respect to each tensor."""
    yield from torch.autograd.grad((y * g).sum(), tensors)
