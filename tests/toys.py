"""Small deltas of every kind and methods made on the spot, for tests of the core. None of them is registered.

tuned = pt.attach(model, toys.method(lambda anatomy: [Place(site, Dense(site)) for site in anatomy.sites(["q"])]))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import tiny
from petiole.anatomy import Anatomy, Site
from petiole.attach import attach
from petiole.context import recomputing
from petiole.method import (
    _REGISTRY,
    AttentionDelta,
    Base,
    BlockDelta,
    Composition,
    Delta,
    HiddenDelta,
    Method,
    ModuleDelta,
    Place,
    StackDelta,
    TokenDelta,
    WeightDelta,
    registry,
)

Places = Callable[[Anatomy], Iterable[Place]]


def method(places: Places | None = None, **parts: Any) -> Method:
    """A method without a name that puts what `places` says; `parts` are its class variables and the methods that it overrides."""

    class Toy(Method):
        pass

    def deltas(self: Method, anatomy: Anatomy) -> Iterator[Place]:
        assert places is not None
        yield from places(anatomy)

    if places is not None:
        parts = {"deltas": deltas, **parts}
    for name, value in parts.items():
        setattr(Toy, name, value)
    return Toy()


def on(roles: Iterable[str], make: Callable[[Site], Delta], **choice: Any) -> Places:
    """One delta at each site of these roles."""
    return lambda anatomy: [Place(site, make(site)) for site in anatomy.sites(list(roles), **choice)]


@contextmanager
def registered(*classes: type[Method]) -> Iterator[None]:
    """Classes that have a slug stand in the registry inside the `with` alone."""
    registry()  # what is found inside would be gone afterwards
    before = dict(_REGISTRY)
    _REGISTRY.update({cls.slug: cls for cls in classes})
    try:
        yield
    finally:
        _REGISTRY.clear()
        _REGISTRY.update(before)


def model(family: str, /, **fields: Any) -> nn.Module:
    """A tiny model with weights so large that every change of it is seen in its output, far above rounding."""
    made = tiny.model(family, **fields)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.2 / parameter.std().clamp_min(1e-3))
    return made


def shake(adaptation: Any, size: float = 0.1, seed: int = 1) -> None:
    """Move every trainable parameter, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adaptation.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def assert_merges(family: str, method: Method, size: float = 0.1, tolerance: float = 1e-5) -> None:
    """Merged, a tiny model computes what it did with the deltas attached, moved by `size`; unmerging gives the bits back."""
    model, batch = tiny.model(family), tiny.batch(family)
    tuned = attach(model, method, train_head=False)
    shake(tuned, size)
    changed = output(model, batch)
    tuned.merge()
    torch.testing.assert_close(output(model, batch), changed, rtol=tolerance, atol=1e-5)
    tuned.unmerge()
    assert torch.equal(output(model, batch), changed)


def output(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The logits or first tensor of a forward pass without gradient, always with the same random numbers."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return first(model(**batch))


def first(found: Any) -> Tensor:
    """The logits, or the first floating-point tensor that is no loss."""
    if isinstance(found, Tensor):
        return found
    for name in ("logits", "logits_per_image", "last_hidden_state", "sample"):
        if isinstance(getattr(found, name, None), Tensor):
            return getattr(found, name)
    return first(found[0])


def bits(tensor: Tensor) -> bytes:
    """The exact bytes of a tensor: unlike `==`, they tell -0.0 from 0.0 and know NaN."""
    return bytes(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that attaching might leave behind."""
    return {
        "state": {name: bits(value) for name, value in model.state_dict().items()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "objects": {name: id(p) for name, p in model.named_parameters()},
        "modules": {name: (type(m), id(m), m.training, sorted(m.__dict__)) for name, m in model.named_modules()},
        "hooks": {
            name: [len(value) for key, value in m.__dict__.items() if key.endswith("hooks") and value is not None]
            for name, m in model.named_modules()
        },
        "attention": {
            name: getattr(m.config, "_attn_implementation", None)
            for name, m in model.named_modules()
            if hasattr(m, "config")
        },
    }


# ----------------------------------------------------------------------------------------------------------------------- deltas


class Dense(WeightDelta):
    """Any ΔW and Δb, with the forward pass that the core falls back to."""

    def __init__(self, site: Site, size: float = 0.1) -> None:
        super().__init__()
        self.size = size
        self.change = nn.Parameter(torch.empty(site.out_features, site.in_features))
        self.shift = nn.Parameter(torch.empty(site.out_features))

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        self.change = nn.Parameter(torch.empty(base.weight.shape).normal_(0, self.size, generator=generator))
        self.shift.normal_(0, self.size, generator=generator)

    def weight(self, base: Tensor) -> Tensor:
        return self.change

    def bias(self, base: Tensor | None) -> Tensor | None:
        return None if base is None else self.shift


class Times(WeightDelta):
    """ΔW = g ⊙ W and Δb = g ⊙ b: a change that needs the weight it changes, earlier changes included."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.empty(site.out_features))

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        self.gain.normal_(0, 0.3, generator=generator)

    def weight(self, base: Tensor) -> Tensor:
        return self.gain.view(-1, *[1] * (base.ndim - 1)) * base

    def bias(self, base: Tensor | None) -> Tensor | None:
        return None if base is None else self.gain * base


class Gated(WeightDelta):
    """Δy = M x for the tokens whose first feature is positive, so that there is no ΔW; ‖M x‖² of them all is a loss term."""

    depends_on_input = publishes = True

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.empty(site.out_features, site.in_features))
        self.term: Tensor | None = None

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        self.matrix.normal_(0, 0.3, generator=generator)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = nn.functional.linear(x, self.matrix)
        term = y.square().mean()  # computed again too, since checkpointing expects the same graph
        if not recomputing():
            self.term = term
        return y * (x[..., :1] > 0)


class Affine(HiddenDelta):
    """v = M h + c, put in by any composition; for `gate`, λ = sigmoid(c)."""

    def __init__(self, size: int, out_size: int | None = None, composition: Composition = "add") -> None:
        super().__init__()
        self.composition = composition
        self.matrix = nn.Parameter(torch.empty(out_size or size, size))
        self.shift = nn.Parameter(torch.empty(out_size or size))

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        self.matrix.normal_(0, 0.1, generator=generator)
        self.shift.normal_(0, 0.5, generator=generator)

    def value(self, h: Tensor) -> Tensor:
        return nn.functional.linear(h, self.matrix.to(h.dtype), self.shift.to(h.dtype))

    def forward(self, h: Tensor) -> Any:
        return (self.value(h), torch.sigmoid(self.shift)) if self.composition == "gate" else self.value(h)

    def composed(self, h: Tensor, source: Tensor | None = None) -> Tensor:
        """What h must become: the definition of each composition, written out."""
        value = self.value(h if source is None else source)
        gate = torch.sigmoid(self.shift)
        return {
            "add": lambda: h + value,
            "multiply": lambda: h * value,
            "replace": lambda: value,
            "gate": lambda: (1 - gate) * h + gate * value,
        }[self.composition]()


class Prepended(AttentionDelta):
    """Keys and values in front, the same for every sample."""

    def __init__(self, length: int, size: int) -> None:
        super().__init__()
        self.key = nn.Parameter(torch.empty(length, size))
        self.value = nn.Parameter(torch.empty(length, size))

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        self.key.normal_(generator=generator)
        self.value.normal_(generator=generator)

    def keys_values(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        batch, heads = key.shape[:2]
        pair = [p.unflatten(1, (heads, -1)).transpose(0, 1).expand(batch, -1, -1, -1) for p in (self.key, self.value)]
        return pair[0], pair[1]


class Watch(AttentionDelta):
    """Leaves the probabilities as they are, times one; keeps the last it saw."""

    needs_probabilities = True

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.seen: tuple[Tensor, Tensor] | None = None

    def probabilities(self, probabilities: Tensor, value: Tensor) -> Tensor:
        self.seen = (probabilities.detach(), value.detach())
        return probabilities * self.gain


class Heads(AttentionDelta):
    """Scales the heads before the output projection."""

    def __init__(self, gain: float = 2.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def heads_output(self, output: Tensor, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        return output * self.gain


class Tokens(TokenDelta):
    """The same tokens for every sample."""

    def __init__(self, length: int, size: int) -> None:
        super().__init__()
        self.length = length
        self.tokens = nn.Parameter(torch.empty(length, size))

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        self.tokens.normal_(generator=generator)

    def forward(self, batch: int) -> Tensor:
        return self.tokens.expand(batch, -1, -1)


class Halved(BlockDelta):
    """h + s (block(h) - h) in place of the block."""

    def __init__(self, share: float = 0.5) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.tensor(share))

    def forward(self, block: nn.Module, h: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = block(h, *args, **kwargs)
        y = found if isinstance(found, Tensor) else found[0]
        mixed = h + self.share * (y - h)
        return mixed if isinstance(found, Tensor) else (mixed, *found[1:])


class Mixture(StackDelta):
    """Σ w_i h_i over all hidden states of a stack, input first."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.empty(blocks + 1))

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        self.weights.normal_(generator=generator)

    def forward(self, states: list[Tensor]) -> Tensor:
        return torch.stack([w * h for w, h in zip(self.weights, states, strict=True)]).sum(0)


class Renewed(ModuleDelta):
    """A linear of its own instead of the module."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.linear = nn.Linear(site.in_features, site.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def whole_block(anatomy: Anatomy, depth: int, stack: str | None = None) -> Site:
    """The site of a block itself."""
    return next(site for site in anatomy.stack(stack).blocks[depth].sites if site.role == "block")
