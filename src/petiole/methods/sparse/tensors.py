"""The tensors of a backbone that may change entry by entry, and where their changes sit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from petiole.anatomy import Anatomy, Site
from petiole.errors import AttachError
from petiole.method import Layers, Place
from petiole.methods.full.names import norms, outside_heads
from petiole.methods.sparse.entries import SparseChange, Tied


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
