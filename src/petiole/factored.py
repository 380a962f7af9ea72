"""The fast path of weight changes that factor: y = W x + b + Σ s B A x as one node of the autograd graph.

What costs time in the plain way (a hook that adds s B A x to the frozen module's output) is a second gradient for x, added to the first,
and temporaries as large as y. Here the frozen module runs on a detached x, the low-rank products are added to its output in place, and
one backward gives everything:

    gB = s gᵀ (x Aᵀ)        gA = s (g B)ᵀ x        gx = g W + s (g B) A

What costs memory is x itself, which frozen weights would not need. It is not kept where the backbone keeps what it comes from: x is
mostly the output of a normalisation, an activation or attention, whose own nodes hold enough to compute it again (`Again`).
Where A is frozen and only a core between A and B trains, x is not needed at all. A core may also differ between the rows of the batch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from petiole.errors import AttachError

# A (r, in), B (out, r), scale, Δb or None; then a core C (r, r), (r,) or (n, 1, r), if there is one.
Parts = tuple[Tensor, Tensor, float, Tensor | None] | tuple[Tensor, Tensor, float, Tensor | None, Tensor]


@dataclass(frozen=True)
class Factor:
    """One low-rank change: ΔW[rows] = scale · B C A, Δb[rows] = bias.

    Attributes:
        A: (r, in). B: (n, r), with n the number of rows. bias: (n,) or None.
        rows: (start, stop) of the output features that change; None for all.
        core: C (r, r), its diagonal (r,), or a diagonal for each row of the batch (n, 1, r); None for the identity.
    """

    A: Tensor
    B: Tensor
    scale: float
    bias: Tensor | None = None
    rows: tuple[int, int] | None = None
    core: Tensor | None = None

    @classmethod
    def of(cls, parts: Parts, rows: Sequence[tuple[int, int]]) -> Factor:
        """What a delta's `factored` gives, on a site's rows (one range at most)."""
        A, B, scale, bias, *core = parts
        return cls(A, B, scale, bias, rows[0] if rows else None, core[0] if core else None)

    def tensors(self) -> list[Tensor]:
        """Those that there are, in the order in which `AddFactors` takes them."""
        return [t for t in (self.A, self.B, self.core, self.bias) if t is not None]


def between(low: Tensor, core: Tensor | None, transposed: bool = False) -> Tensor:
    """low (..., r) -> C low, or Cᵀ low, for a core (r, r), a diagonal (r,), one for each row of the batch (n, 1, r), or None."""
    if core is None:
        return low
    if core.ndim == 1:
        return low * core
    if core.ndim == 3:  # windows and flattened tokens follow their row
        check_rows(low, core)
        return (low.reshape(core.shape[0], -1, core.shape[2]) * core).reshape(low.shape)
    return low @ (core if transposed else core.T)


def check_rows(h: Tensor, core: Tensor | None) -> None:
    """Raises AttachError: a core for each row of the batch, but the rows of the hidden state don't divide into them."""
    if core is not None and core.ndim == 3 and h.shape[0] % core.shape[0]:
        raise AttachError(
            f"a hidden state has {h.shape[0]} rows, which is no multiple of the {core.shape[0]} rows of the batch"
        )


def plain(module: nn.Module) -> bool:
    """Whether a module is an ordinary linear whose forward is its weight's product and nothing else."""
    weight = module._parameters.get("weight")
    if (
        weight is None
        or (type(weight) is not nn.Parameter and type(weight).__name__ != "FakeTensor")
        or weight.ndim != 2
        or not weight.is_floating_point()
    ):
        return False
    if (
        module._backward_hooks
        or module._backward_pre_hooks
        or hasattr(module, "_hf_hook")
        or "forward" in module.__dict__
    ):
        return False
    return type(module).forward is nn.Linear.forward or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear, whose weight is stored (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def add(x: Tensor, y: Tensor, module: nn.Module, factors: Sequence[Factor]) -> Tensor:
    """x (..., in), y = W x + b (..., out) computed from a detached x -> y with all factors added, IN PLACE where y allows it."""
    for factor in factors:
        check_rows(x, factor.core)
    options = [(f.scale, f.rows, f.core is not None, f.bias is not None) for f in factors]
    tensors = [t for f in factors for t in f.tensors()]
    weight: Any = module.weight  # what the module itself uses: what another adaptation trained may be put aside
    assert weight is not None
    needs = torch.is_grad_enabled() and any(f.A.requires_grad for f in factors)  # only A's gradient asks for x
    again = Again.of(x) if needs and x.grad_fn is not None else None
    return AddFactors.apply(x, y, weight.T if is_conv1d(module) else weight, again, options, *tensors)


def add_by_row(x: Tensor, y: Tensor, factors: Sequence[Factor], index: Tensor, kept: dict[Any, Any]) -> Tensor:
    """Another factor for each row of a batch: two batched products, however many factors there are.

    Args:
        x: (n·m, ..., in), y: (n·m, ..., out): the input and output of the frozen linear for n rows (beams, windows and flattened
            tokens follow their row).
        factors: of one site; ranks may differ, the smaller ones are padded.
        index: (n,), which factor a row takes; -1 for none.
        kept: remembers the gathered factors between forward passes that need no gradient.
    """
    n = index.shape[0]
    tensors = [f.tensors() for f in factors]
    if torch.is_grad_enabled() or any(
        t.is_inference() for each in tensors for t in each
    ):  # whose changes are not counted
        A, B, bias = gather(factors, index, y.dtype)
    else:
        versions = tuple(
            (f.scale, *((id(t), t._version) for t in each)) for f, each in zip(factors, tensors, strict=True)
        )
        key = (tuple(index.tolist()), versions, y.dtype)
        entry = kept.get("last")  # read and written whole, since other threads do, too
        if entry is None or entry[0] != key:
            # The tensors too: factors computed anew for each pass die with it, and another may then be born with the same id.
            entry = kept["last"] = (key, gather(factors, index, y.dtype), tensors)
        A, B, bias = entry[1]
    rows = factors[0].rows
    low = torch.bmm(x.to(y.dtype).reshape(n, -1, x.shape[-1]), A)  # (n, t, r)
    change = torch.bmm(low, B)  # (n, t, out)
    if bias is not None:
        change = change + bias[:, None]
    if rows is None:
        return y + change.view(y.shape)
    return torch.cat(
        [y[..., : rows[0]], y[..., rows[0] : rows[1]] + change.view(*y.shape[:-1], -1), y[..., rows[1] :]], -1
    )


def gather(factors: Sequence[Factor], index: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """A (n, in, r), scaled B (n, r, out) and Δb (n, out) of each row, padded with zeros to the largest rank."""
    rank = max(f.A.shape[0] for f in factors)
    As = [nn.functional.pad(f.A.to(kind).T, (0, rank - f.A.shape[0])) for f in factors]
    cores = [None if f.core is None else f.core.to(kind) for f in factors]
    scaled = [f.scale * between(f.B.to(kind), core, transposed=True).T for f, core in zip(factors, cores, strict=True)]
    Bs = [nn.functional.pad(B, (0, 0, 0, rank - B.shape[0])) for B in scaled]
    biases: list[Tensor] = []
    if any(f.bias is not None for f in factors):
        biases = [f.B.new_zeros(f.B.shape[0], dtype=kind) if f.bias is None else f.bias.to(kind) for f in factors]
    if bool((index < 0).any()):
        As, Bs = [*As, torch.zeros_like(As[0])], [*Bs, torch.zeros_like(Bs[0])]
        biases = [*biases, torch.zeros_like(biases[0])] if biases else []
    place = index.to(As[0].device) % len(As)  # -1 is the last: nothing
    bias = torch.stack(biases).index_select(0, place) if biases else None
    return torch.stack(As).index_select(0, place), torch.stack(Bs).index_select(0, place), bias


class AddFactors(torch.autograd.Function):
    """See the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, weight: Tensor, again: Again | None, options: list[Any], *tensors: Tensor
    ) -> Tensor:
        kind = y.dtype
        inputs = x.detach().reshape(-1, x.shape[-1])
        result = (
            y.data
        )  # y's memory under a new tensor: y itself may be a view, whose change in place autograd would copy
        outputs = result.view(-1, y.shape[-1])
        inputs = inputs.to(kind)
        inner = []
        with torch.autocast(x.device.type, enabled=False):
            rest = list(tensors)
            for scale, rows, has_core, has_bias in options:
                A, B = rest.pop(0), rest.pop(0)
                core = rest.pop(0).to(kind) if has_core else None
                bias = rest.pop(0) if has_bias else None
                low = (A.to(kind) @ inputs.T).mul_(scale)  # s A x (r, N): scaled where it is thin
                part = outputs if rows is None else outputs[:, rows[0] : rows[1]]
                part.addmm_(between(low.T, core), B.to(kind).T)
                if bias is not None:
                    part.add_(bias.to(kind))
                inner.append(low)
        ctx.again, ctx.options, ctx.shape, ctx.dtype = again, options, x.shape, x.dtype
        wanted = again is None and any(firsts(ctx.needs_input_grad[5:], options))
        ctx.save_for_backward(weight, inputs if wanted else None, *inner, *tensors)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, inputs, *saved = ctx.saved_tensors
        inner, rest = saved[: len(ctx.options)], list(saved[len(ctx.options) :])
        g = gradient.reshape(-1, gradient.shape[-1])
        kind = g.dtype
        wants = list(ctx.needs_input_grad[5:])
        if inputs is None and any(firsts(wants, ctx.options)):
            inputs = ctx.again.compute().reshape(-1, ctx.shape[-1])
        out: list[Tensor | None] = []
        with torch.autocast(g.device.type, enabled=False):
            gx = g @ weight.to(kind) if ctx.needs_input_grad[0] else None
            for (scale, rows, has_core, has_bias), low in zip(ctx.options, inner, strict=True):
                A, B = rest.pop(0), rest.pop(0)
                core = rest.pop(0) if has_core else None
                part = g if rows is None else g[:, rows[0] : rows[1]]
                want_A, want_B, want_core = wants.pop(0), wants.pop(0), has_core and wants.pop(0)
                # The long axis of each thin product is its last: the other way round, they take up to ten times as long on a CPU.
                outer = B.to(kind).T.contiguous() @ part.T  # Bᵀ g (r, N)
                inside = None if core is None else core.to(kind)
                back = between(outer.T, inside, transposed=True).T * scale  # s Cᵀ Bᵀ g (r, N)
                out.append((back @ inputs.to(kind)).to(A.dtype) if want_A else None)
                out.append((between(low.T, inside).T @ part).T.to(B.dtype).contiguous() if want_B else None)
                if core is not None:
                    out.append(core_gradient(outer, low, core) if want_core else None)
                if has_bias:
                    bias = rest.pop(0)
                    out.append(part.sum(0).to(bias.dtype) if wants.pop(0) else None)
                if gx is not None:
                    gx.addmm_(back.T, A.to(kind))
        gx = None if gx is None else gx.view(ctx.shape).to(ctx.dtype)
        # y came from a detached x and frozen weights; where something trains below it (a bias), its own node needs the gradient too.
        gy = gradient if ctx.needs_input_grad[1] else None
        return gx, gy, None, None, None, *out


def firsts(values: Sequence[Any], options: Sequence[Any]) -> list[Any]:
    """Of values that belong to the tensors of factors, those that belong to each A."""
    found, at = [], 0
    for _, _, has_core, has_bias in options:
        found.append(values[at])
        at += 2 + has_core + has_bias
    return found


def core_gradient(outer: Tensor, low: Tensor, core: Tensor) -> Tensor:
    """Bᵀ g (r, N) and s A x (r, N) -> the gradient of C, or of its diagonal, or of those of the rows of the batch."""
    if core.ndim == 3:
        return (outer * low).view(len(outer), len(core), -1).sum(2).T[:, None].to(core.dtype)
    return ((outer * low).sum(1) if core.ndim == 1 else outer @ low.T).to(core.dtype)


# ------------------------------------------------------------------------------------------------- computing an input once more


class Again:
    """How to get a tensor back from what the autograd graph above it keeps anyway.

    Attributes:
        node: the graph node whose output the tensor is. shape: of that output.
    """

    _last = threading.local()  # q, k and v ask for the same one after another

    def __init__(self, node: Any, shape: torch.Size) -> None:
        self.node, self.shape = node, shape

    @classmethod
    def of(cls, x: Tensor) -> Again | None:
        """None where x must be kept itself: its history says too little, or saved tensors are not kept (checkpointing)."""
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        if hooks is not None and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint":
            return None
        return cls(x.grad_fn, x.shape) if possible(x.grad_fn) else None

    def compute(self) -> Tensor:
        """The tensor, equal to the original up to rounding."""
        last = getattr(Again._last, "found", None)
        if last is not None and last[0] is self.node:
            return last[1]
        with torch.no_grad():
            value = compute(self.node, self.shape)
        if last is None:
            torch.autograd.Variable._execution_engine.queue_callback(forget)  # when this backward ends
        Again._last.found = (self.node, value)
        return value


def forget() -> None:
    """Drop the last tensor that was computed again."""
    Again._last.found = None


_VIEWS = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")
_SAME = ("CloneBackward0", "ToCopyBackward0")  # copies, and casts: the cast is done once, at the end
_ATTENTION = (
    "ScaledDotProductFlashAttentionForCpuBackward0",
    "ScaledDotProductFlashAttentionBackward0",
    "ScaledDotProductEfficientAttentionBackward0",
    "ScaledDotProductCudnnAttentionBackward0",
)


def above(node: Any, index: int = 0) -> Any:
    return node.next_functions[index][0] if node.next_functions else None


def possible(node: Any, exact: bool = False, depth: int = 0) -> bool:
    """Whether `compute` can serve a node. Saved tensors are not unpacked: that is not free.

    Args:
        exact: whether the shape matters; views don't say theirs, so then they are no help.
    """
    if node is None or depth > 6:
        return False
    name = node.name()
    if name in _RULES:
        return whole(node)
    if name in _VIEWS:
        return not exact and possible(above(node), exact, depth + 1)
    if name in _SAME:
        return possible(above(node), exact, depth + 1)
    if name == "TransposeBackward0":
        return possible(above(node), True, depth + 1)
    if name == "MulBackward0":
        return whole(node) and all(kept_operand(node, i) or possible(above(node, i), True, depth + 1) for i in (0, 1))
    return False


def whole(node: Any) -> bool:
    """Whether a node has what it saved as tensors, and not as something from which checkpointing makes them, once."""
    names = ("_raw_saved_input", "_raw_saved_self", "_raw_saved_other", "_raw_saved_query")
    saved = [getattr(node, name).data for name in names if hasattr(node, name)]
    return all(data is None or isinstance(data, Tensor) for data in saved)


def kept_operand(node: Any, index: int) -> bool:
    """Whether a product kept this operand: it does so where the other one needs a gradient."""
    return above(node, 1 - index) is not None


def compute(node: Any, shape: torch.Size | None) -> Tensor:
    name = node.name()
    rule = _RULES.get(name)
    if rule is not None:
        return rule(node)
    if name in _VIEWS:
        value = compute(above(node), None)
        return value.reshape(shape if shape is not None else value.shape)
    if name in _SAME:
        return compute(above(node), shape)
    if name == "TransposeBackward0":
        rank = 1 << 64  # dimensions counted from the end are stored as unsigned
        dims = [d - rank if d > rank // 2 else d for d in (node._saved_dim0, node._saved_dim1)]
        return compute(above(node), None).transpose(*dims)
    saved = (node._saved_self, node._saved_other)
    left, right = (saved[i] if kept_operand(node, i) else compute(above(node, i), None) for i in (0, 1))
    return left * right


def layer_norm(node: Any) -> Tensor:
    value = (node._saved_input - node._saved_result1).mul_(node._saved_result2)
    if node._saved_weight is not None:
        value.mul_(node._saved_weight)
    return value if node._saved_bias is None else value.add_(node._saved_bias)


_RULES: dict[str, Callable[[Any], Tensor]] = {
    "NativeLayerNormBackward0": layer_norm,
    "GeluBackward0": lambda node: nn.functional.gelu(node._saved_self, approximate=node._saved_approximate),
    "SiluBackward0": lambda node: nn.functional.silu(node._saved_self),
    **dict.fromkeys(_ATTENTION, lambda node: node._saved_output),
}
