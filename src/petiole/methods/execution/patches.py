"""Which models see the patches of an image as tokens of one sequence, and where their blocks can be taken hold of between attention and ffn."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from petiole.anatomy import Anatomy, Site, Stack
from petiole.errors import AttachError
from petiole.tokens import parameters_of, refuse_windows

FRONT = ("cls_token", "class_token", "class_embedding", "distillation_token", "dist_token", "register_tokens", "reg_token")  # fmt: skip


@dataclass(frozen=True)
class Tokens:
    """The tokens of a stack: how many patches an image of the configured size has, and how many tokens stand in front of them."""

    patches: int
    front: int


def image_stack(found: Anatomy) -> Stack:
    """The stack that sees the patches of an image and nothing else.

    Raises:
        AttachError: there is none.
    """
    embeds = {site.role for site in found.outside}
    towers = [stack for stack in found.stacks if len(found.stacks) == 1 or stack.name == "vision"]
    if "patch_embedding" not in embeds or len(towers) != 1 or (len(found.stacks) == 1 and "embedding" in embeds):
        raise AttachError(
            f"{found.model_class} has no stack of blocks for the patches of an image alone, whose tokens could be merged"
        )
    if "lm_head" in embeds:
        raise AttachError(
            f"{found.model_class} hands every patch on to its language model, which counts them: merge none"
        )
    return towers[0]


def embedding_owners(embedding: Site, stack: Stack, model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules around a patch embedding that do not hold the blocks, outermost first, by path."""
    names = embedding.path.split(".")
    paths = [".".join(names[:n]) for n in range(len(names) + 1)]
    return [(path, model.get_submodule(path)) for path in paths if not stack.blocks[0].path.startswith(f"{path}.")]


def own_tokens(owners: list[tuple[str, nn.Module]], stack: Stack) -> list[tuple[str, int]]:
    """Names of the parameters that are tokens, and how many each is."""
    return [
        (name, p.numel() // stack.hidden_size)
        for _, owner in owners
        for name, p in owner.named_parameters(recurse=False)
        if p.ndim and p.shape[-1] == stack.hidden_size and ("token" in name or name in FRONT) and "mask" not in name
    ]


def front_tokens(found: Anatomy, stack: Stack, model: nn.Module) -> list[tuple[str, int]]:
    """The tokens that a model puts in front of its patches: name, and how many. [] where it has none, or no patches."""
    site = next((site for site in found.outside if site.role == "patch_embedding"), None)
    own = [] if site is None else own_tokens(embedding_owners(site, stack, model), stack)
    return [(name, count) for name, count in own if name in FRONT]


def tokens(found: Anatomy, stack: Stack, model: nn.Module, protected: int | None) -> Tokens:
    """Look at the modules that embed an image.

    Raises:
        AttachError: there is no class token, or there are tokens of an unknown kind, or the head needs the grid of patches.
    """
    site = next(site for site in found.outside if site.role == "patch_embedding")
    owners = embedding_owners(site, stack, model)
    own = own_tokens(owners, stack)
    unknown = [name for name, _ in own if name not in FRONT]
    front = sum(count for name, count in own if name in FRONT)
    if unknown:
        raise AttachError(
            f"{found.model_class} has {unknown[0]} among its tokens, which could be merged away; only those in front can be protected"
        )
    if not front and protected is None:
        raise AttachError(
            f"{found.model_class} has no class token: what reads its tokens would count a merged one like any other\n"
            "protected_tokens=0 merges all the same"
        )
    root = owners[0][0] if owners else site.path
    for name, module in model.named_modules():
        inside = name == site.path or name.startswith((f"{root}.", *(f"{c}." for c in stack.containers)))
        if isinstance(module, nn.modules.conv._ConvNd) and not inside:
            raise AttachError(
                f"{found.model_class} has a head that needs the grid of patches ({name}), of which merging leaves a few\n"
                "attach to the backbone alone, and give the head unmerge(tokens, places) of petiole.methods.execution.merging"
            )
    counts = (getattr(module, "num_patches", None) for _, module in owners)
    count = next((number for number in counts if isinstance(number, int)), 0)
    tables = (p for _, m in owners for n, p in m.named_parameters(recurse=False) if "pos" in n and p.ndim == 3)
    patches = count or next((p.shape[1] - front for p in tables), 0)
    if not patches:
        raise AttachError(f"{found.model_class} doesn't say how many patches an image has")
    return Tokens(patches, front)


@dataclass(frozen=True)
class Places:
    """Where a block is taken hold of: before its second norm, around its feed-forward network, and where it ends."""

    attention: Site
    norm: Site
    ffn: Site
    block: Site


def places(found: Anatomy, stack: Stack, model: nn.Module) -> list[Places]:
    """Of each block of a stack.

    Raises:
        AttachError: a block is not pre-norm with one attention and one ffn, or has windows, or positions in every block.
    """
    refuse_windows(model, stack.name, stack.blocks, "merged tokens")
    made = []
    for block in stack.blocks:
        of = {role: [s for s in block.sites if s.role == role] for role in ("attention", "ffn", "block")}
        inside = tuple(f"{s.path}." for role in ("attention", "ffn") for s in of[role])
        norms = [s for s in block.sites if s.kind == "norm" and not s.path.startswith(inside)]
        ends = found.closing_norm(of["ffn"][0]) if of["ffn"] else None
        if [len(sites) for sites in of.values()] != [1, 1, 1] or len(norms) != 2 or ends is not None:
            raise AttachError(
                f"{found.model_class}: {stack.name}.{block.depth} is not norm, attention, norm, ffn with a residual around each pair, "
                "between which tokens could be merged"
            )
        if "position_embeddings" in parameters_of(model.get_submodule(block.path)):
            raise AttachError(
                f"{found.model_class} turns queries and keys by their positions in every block, which merged tokens have no more"
            )
        made.append(Places(of["attention"][0], norms[1], of["ffn"][0], of["block"][0]))
    return made
