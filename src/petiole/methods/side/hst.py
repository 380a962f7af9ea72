"""HST: a convolutional side network that makes a pyramid of features of a plain ViT.  Lin et al. 2023, arXiv 2310.05393.

    [E_l, h] -> block l -> [r_l, cls, V_l]                   M meta tokens E_l, gone after the block
    R_l = LN_l(T_i(r_l)),  U_l = T_i(V_l) at (H_i, W_i)        one bridge T_i for each stage i, bilinear
    s <- s + Attn(LN(s), [R_l, mean(U_l)]);  s <- s + U_l;  s <- s + MLP(LN(s))      a side block for each block l of the ViT
    P_i = LN(s)                                              (B, d_i, H_i, W_i) at strides 4, 8, 16, 32, where stage i + 1 begins
    logits = Linear(BatchNorm(mean(P_4)))                    in the place of the model's own head

Stage 1 begins with a convolutional stem on the image itself, the others with a convolution of stride 2. T_i comes before the interpolation:
the two commute, and 196 tokens are cheaper to project than 3136.

Sits     around and beside every block of a stack that sees images; instead of the head.
Trains   meta tokens, the blocks' norms in place, bridges, side network and a head of its own.
Starts   at random; not at the backbone.
Merges   never.

Relations: LST and UniPT keep gradients out of the backbone. Here they go through it, to the meta tokens and norms: what is small is the number
of parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from petiole.anatomy import Anatomy, Site, Stack
from petiole.errors import AttachError
from petiole.method import AroundDelta, Base, HiddenDelta, Method, Place, StackDelta
from petiole.methods.side.beside import block_site
from petiole.tokens import refuse_windows

_LEADING = ("cls_token", "class_token", "class_embedding", "distillation_token", "dist_token", "register_tokens", "reg_token")  # fmt: skip
_SMALLEST = 32  # the last stride


class HST(Method):
    """A pyramid of features beside a plain ViT."""

    slug: ClassVar[str] = "hst"
    title: ClassVar[str] = "Hierarchical Side-Tuning for Vision Transformers"
    paper: ClassVar[str] = "2310.05393"
    saves: ClassVar[str] = "nearly all parameters; neither activations nor the backward pass through the backbone"
    routes: ClassVar[bool] = False
    idles: ClassVar[str] = "the bias of k shifts all scores of a query alike, which softmax does not see"
    learning_rates: ClassVar[tuple[float, float]] = (3e-4, 1e-2)
    exempt: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("bert", "llama", "gpt2", "t5"), "it sees no image"),
        "vit": "two blocks are fewer than four stages",
        "runs_under_bf16_autocast": "its batch norms take the batch's statistics in training, and others in evaluation",
        "runs_on_a_bf16_backbone": "its batch norms take the batch's statistics in training, and others in evaluation",
        "combines_with_others": "of a change behind it at the last block's output, nothing is read",
        "every_option_trains_saves_and_merges": "a pyramid is trained by a loss on what is published",
    }

    side_dims: tuple[int, ...] = Field((32, 48, 64, 72), description="Widths d_1 … d_4 of the stages.")
    side_heads: tuple[int, ...] = Field((2, 4, 8, 12), description="Heads of cross-attention in each stage.")
    side_depths: tuple[int, ...] | None = Field(
        None, description="Side blocks of each stage, one for each block of the ViT; as many in each stage if None."
    )
    stage_end_layers: tuple[int, ...] | None = Field(
        None, description="Depth of the last ViT block of each stage; what side_depths adds up to if None."
    )
    num_meta_tokens: int = Field(1, ge=1, description="M: learned tokens in front of every block's input.")
    mlp_ratio: float = Field(4.0, gt=0, description="Hidden width of a side block's MLP over its width.")
    train_block_norms: bool = Field(True, description="Train the two norms of every ViT block in place.")
    drop_path: float = Field(
        0.0, ge=0, lt=1, description="Stochastic depth of the last block, from 0 in the first; 0.2 in the paper."
    )
    output: Literal["pooled", "pyramid"] = Field(
        "pooled",
        description="Classify by the mean of P_4; or publish P_1 … P_4 at the last depth of each stage: pt.streams(model)['hst'].",
    )

    @model_validator(mode="after")
    def _stages_agree(self) -> HST:
        for name in ("side_dims", "side_heads", "side_depths", "stage_end_layers"):
            value = getattr(self, name)
            if value is not None and len(value) != 4:
                raise ValueError(f"{name} = {list(value)}: one entry for each of 4 stages")
        if min(self.side_dims) < 1 or min(self.side_heads) < 1 or min(self.side_depths or (1,)) < 1:
            raise ValueError("side_dims, side_heads and side_depths start at 1")
        for width, heads in zip(self.side_dims, self.side_heads, strict=True):
            if width % heads:
                raise ValueError(f"side_heads: {heads} heads do not divide a stage's side_dims = {width}")
        if self.side_depths and self.stage_end_layers and ends_of(self.side_depths) != self.stage_end_layers:
            raise ValueError(
                f"stage_end_layers = {list(self.stage_end_layers)}: side_depths ends stages at {list(ends_of(self.side_depths))}"
            )
        return self

    def depths(self, count: int) -> tuple[int, ...]:
        """Side blocks of each stage beside `count` blocks.

        Raises:
            AttachError: they don't add up.
        """
        ends = self.stage_end_layers
        if self.side_depths is not None:
            found = self.side_depths
        elif ends is not None:
            found = tuple(end - start for start, end in zip((-1, *ends), ends, strict=False))
        else:
            found = tuple((count + stage) // 4 for stage in range(4))
        if sum(found) != count or min(found) < 1:
            raise AttachError(
                f"hst: stages of {list(found)} blocks, but the backbone has {count}\n"
                f"side_depths must be at least 1 each and add up to {count}"
            )
        return found

    def deltas_on(self, anatomy: Anatomy, model: nn.Module) -> Iterator[Place]:
        stack, patches = image_stack(anatomy)
        refuse_windows(model, stack.name, stack.blocks)
        size = getattr(getattr(model, "config", None), "image_size", None)
        for side in size if isinstance(size, (list, tuple)) else [size] if isinstance(size, int) else []:
            refuse_size(side)
        count, M = len(stack.blocks), self.num_meta_tokens
        depths = self.depths(count)
        for depth, block in enumerate(stack.blocks):
            rate = self.drop_path * depth / max(count - 1, 1)
            yield Place(block_site(stack, depth), MetaTokens(M, stack.hidden_size))
            for site in block.sites if rate else ():
                if site.role in ("attention", "ffn"):
                    yield Place(site.at("output"), StochasticDepth(rate))
        heads = anatomy.heads()
        if self.output == "pooled" and (len(heads) != 1 or heads[0].kind != "linear"):
            raise AttachError(
                f"hst: output = 'pooled' puts its own head in the place of one linear, of which {anatomy.model_class} has "
                f"{len(heads)}\noutput = 'pyramid' needs none"
            )
        side = SideNetwork(
            stack.hidden_size,
            self.side_dims,
            self.side_heads,
            depths,
            meta=M,
            ratio=self.mlp_ratio,
            drop_path=self.drop_path,
            classes=heads[0].out_features if self.output == "pooled" else 0,
        )
        stride: Any = model.get_submodule(patches.path).stride
        side.patch, side.leading = tuple(stride), leading_tokens(model, stack, patches)
        side.reads = range(1, count + 1)
        side.publishes = self.output == "pyramid"
        if self.output == "pooled":
            side.writes = heads[0].path
        yield Place(block_site(stack, -1), side)

    def trains(self, anatomy: Anatomy, model: nn.Module) -> Iterable[str]:
        if not self.train_block_norms:
            return
        for block in image_stack(anatomy)[0].blocks:
            for site in block.sites:
                inside = any(s.role == "attention" and site.path.startswith(f"{s.path}.") for s in block.sites)
                if site.kind == "norm" and not inside:
                    yield from (f"{site.path}.{name}" for name, _ in model.get_submodule(site.path).named_parameters())


def ends_of(depths: Sequence[int]) -> tuple[int, ...]:
    """Depth of the last block of each stage."""
    return tuple(sum(depths[: stage + 1]) - 1 for stage in range(len(depths)))


def image_stack(anatomy: Anatomy) -> tuple[Stack, Site]:
    """The one stack, which sees the patches of an image, and what embeds these.

    Raises:
        AttachError: there are others, or none sees an image.
    """
    patches = [site for site in anatomy.outside if site.role == "patch_embedding" and site.kind == "conv"]
    tokens = any(site.role == "embedding" for site in anatomy.outside)
    if len(anatomy.stacks) != 1 or len(patches) != 1 or tokens or len(patches[0].kernel) != 2:
        raise AttachError(
            f"hst needs one stack of blocks that sees the patches of an image; {anatomy.model_class} is no such ViT"
        )
    return anatomy.stacks[0], patches[0]


def leading_tokens(model: nn.Module, stack: Stack, patches: Site) -> int:
    """How many tokens stand in front of the patches: class token, distillation token, registers."""
    names = patches.path.split(".")
    found = 0
    for path in (".".join(names[:n]) for n in range(len(names))):  # whatever holds the patch embedding
        own = model.get_submodule(path).named_parameters(recurse=False)
        found += sum(p.numel() // stack.hidden_size for name, p in own if name in _LEADING)
    return found


def refuse_size(side: int) -> None:
    if side % _SMALLEST:
        raise AttachError(
            f"hst: an image of side {side} has no feature map of stride {_SMALLEST}; sides must be multiples of {_SMALLEST}"
        )


# ----------------------------------------------------------------------------------------------------------------------- in the ViT


class MetaTokens(AroundDelta):
    """E_l (M, D) in front of what a block is given, and off what the model goes on with.

    Args:
        length: M. size: D.
    """

    def __init__(self, length: int, size: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(length, size))

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        length, size = self.tokens.shape
        bound = math.sqrt(6 / (size * (length + 1)))  # Xavier's, of a tensor (1, M, D)
        self.tokens.uniform_(-bound, bound, generator=generator)

    def enter(self, h: Tensor) -> Tensor:
        """(B, T, D) -> (B, M + T, D)"""
        return torch.cat([self.tokens.to(h.dtype).expand(h.shape[0], -1, -1), h], 1)

    def leave(self, y: Tensor, h: Tensor) -> Tensor:
        return y[:, self.tokens.shape[0] :]


class StochasticDepth(HiddenDelta):
    """In training, a residual branch counts for 0 in some rows of the batch, and for 1 / (1 - rate) in the others.

    Args:
        rate: share of rows. As `composition`, the factor (B, 1, …) of the branch h (B, …).
    """

    composition = "multiply"

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, h: Tensor) -> Tensor:
        return kept_rows(h, self.rate if self.training else 0.0)


def kept_rows(h: Tensor, rate: float) -> Tensor:
    """h (B, …) -> factors (B, 1, …), whose mean is 1. Drawn from torch's generator, as dropout is."""
    factor = h.new_ones(h.shape[0], *[1] * (h.ndim - 1))
    return factor.bernoulli_(1 - rate).div_(1 - rate) if rate else factor


# --------------------------------------------------------------------------------------------------------------------- beside the ViT


class SideNetwork(StackDelta):
    """All stages. `forward`: outputs of the ViT's blocks, meta tokens in front, (B, M + leading + h w, D) -> logits (B, classes) or None.

    Args:
        size: D. widths: d_i. heads: of cross-attention. depths: side blocks of each stage.
        meta: M. ratio: of the side blocks' MLP. drop_path: of the last side block. classes: of the head; 0 for none.
    """

    patch: tuple[int, ...] = (16, 16)
    leading: int = 1

    def __init__(
        self,
        size: int,
        widths: Sequence[int],
        heads: Sequence[int],
        depths: Sequence[int],
        *,
        meta: int = 1,
        ratio: float = 4.0,
        drop_path: float = 0.0,
        classes: int = 0,
    ) -> None:
        super().__init__()
        self.meta, self.depths, total = meta, tuple(depths), sum(depths)
        rates = [drop_path * n / max(total - 1, 1) for n in range(total)]
        self.stages = nn.ModuleList()
        for stage, (width, count) in enumerate(zip(widths, depths, strict=True)):
            start = sum(depths[:stage])
            embedding = Embedding(widths[stage - 1], width) if stage else Stem(width)
            self.stages.append(Stage(embedding, size, width, heads[stage], rates[start : start + count], ratio))
        if classes:
            self.norm = nn.BatchNorm1d(widths[-1], eps=1e-6, affine=False)
            self.head = nn.Linear(widths[-1], classes)

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.out_channels * math.prod(module.kernel_size)
                module.weight.normal_(0, math.sqrt(2 / fan_out), generator=generator)
            elif isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
            if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
                module.bias.zero_()

    def forward(self, states: Sequence[Tensor]) -> Tensor | None:
        image = self.image()
        maps = self.pyramid(image, states)
        if self.publishes:
            for depth, P in zip(ends_of(self.depths), maps, strict=True):
                self.host.streams.publish(depth, {"hst": P})
            return None
        return self.classify(self.pooled(maps))

    def image(self) -> Tensor:
        """The images (B, 3, H, W) that the model was given.

        Raises:
            AttachError: there are none, or their size does not fit.
        """
        within = self.host.passing()
        given = within.input("pixel_values") if within is not None else None
        if given is None and within is not None:
            given = next(
                (x for x in (*within.args, *within.kwargs.values()) if isinstance(x, Tensor) and x.ndim == 4), None
            )
        if given is None:
            raise AttachError("hst reads the image itself, but the model was called without one (pixel_values)")
        for side in given.shape[-2:]:
            refuse_size(side)
        image: Tensor = given.to(self.dtype)
        return image

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def pyramid(self, image: Tensor, states: Sequence[Tensor]) -> list[Tensor]:
        """Image (B, 3, H, W), blocks' outputs (B, M + leading + h w, D) -> P_i (B, d_i, H_i, W_i)"""
        h, w = (side // patch for side, patch in zip(image.shape[-2:], self.patch, strict=True))
        front = self.meta + self.leading
        if states[0].shape[1] != front + h * w:
            raise AttachError(
                f"hst: a block has {states[0].shape[1]} tokens, not {self.meta} meta tokens, {self.leading} leading ones and a grid of {h} x {w}\n"
                "input tokens of other methods, and leading ones of an unknown kind, do not fit"
            )
        maps: list[Tensor] = []
        for stage, count, end in zip(self.stages, self.depths, ends_of(self.depths), strict=True):
            own = [state.to(self.dtype) for state in states[end + 1 - count : end + 1]]
            tokens = [(state[:, : self.meta], state[:, front:]) for state in own]
            maps.append(stage(maps[-1] if maps else image, tokens, (h, w)))
        return maps

    @staticmethod
    def pooled(maps: Sequence[Tensor]) -> Tensor:
        """-> (B, d_4)"""
        return maps[-1].mean((2, 3))

    def classify(self, pooled: Tensor) -> Tensor:
        """(B, d_4) -> (B, classes)"""
        logits: Tensor = self.head(self.norm(pooled))
        return logits


class Stem(nn.Module):
    """Image (B, 3, H, W) -> (B, d, H / 4, W / 4)"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 2, stride=2)

    def forward(self, image: Tensor) -> Tensor:
        x: Tensor = self.second(torch.relu(self.norm(self.first(image))))
        return x


class Embedding(nn.Conv2d):
    """Map (B, d_(i-1), H, W) -> (B, d_i, H / 2, W / 2), of patches that overlap."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__(before, width, 3, stride=2, padding=1)


class Stage(nn.Module):
    """Embedding, side blocks, norm.

    Args:
        embedding: of the image, or of the map before. size: D. width: d_i. heads: of cross-attention.
        rates: of stochastic depth, for each side block. ratio: of their MLP.
    """

    def __init__(
        self, embedding: nn.Module, size: int, width: int, heads: int, rates: Sequence[float], ratio: float
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.embedding_norm = nn.LayerNorm(width)
        self.bridge = nn.Linear(size, width)  # T_i
        self.meta_norms = nn.ModuleList(nn.LayerNorm(width) for _ in rates)  # LN_l
        self.blocks = nn.ModuleList(SideBlock(width, heads, ratio, rate) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor, tokens: Sequence[tuple[Tensor, Tensor]], grid: tuple[int, int]) -> Tensor:
        """Image or map x, (r_l (B, M, D), V_l (B, h w, D)) of each block, (h, w) -> P_i (B, d_i, H_i, W_i)"""
        s = self.embedding(x)
        size = s.shape[-2:]
        s = self.embedding_norm(s.flatten(2).mT)
        for block, norm, (r, V) in zip(self.blocks, self.meta_norms, tokens, strict=True):
            U = self.bridged(V, grid, size)
            s = block(s, norm(self.bridge(r)), U)
        P: Tensor = self.norm(s)
        return P.mT.unflatten(2, size)

    def bridged(self, V: Tensor, grid: tuple[int, int], size: Sequence[int]) -> Tensor:
        """V_l (B, h w, D) -> U_l (B, H_i W_i, d_i)"""
        U = self.bridge(V).mT.unflatten(2, grid)
        return nn.functional.interpolate(U, tuple(size), mode="bilinear", align_corners=False).flatten(2).mT


class SideBlock(nn.Module):
    """Cross-attention to a few tokens, injection of the ViT's map, MLP.

    Args:
        width: d. heads: of cross-attention. ratio: of the MLP. rate: of stochastic depth.
    """

    def __init__(self, width: int, heads: int, ratio: float, rate: float) -> None:
        super().__init__()
        self.heads, self.rate, hidden = heads, rate, int(width * ratio)
        self.attention_norm = nn.LayerNorm(width, eps=1e-6)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.mlp_norm = nn.LayerNorm(width, eps=1e-6)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, s: Tensor, R: Tensor, U: Tensor) -> Tensor:
        """s (B, N, d), R_l (B, M, d), U_l (B, N, d) -> s (B, N, d)"""
        s = self.added(s, self.attention(self.attention_norm(s), torch.cat([R, U.mean(1, keepdim=True)], 1))) + U
        return self.added(s, self.down(nn.functional.gelu(self.up(self.mlp_norm(s)))))

    def added(self, s: Tensor, branch: Tensor) -> Tensor:
        return s + branch * kept_rows(branch, self.rate) if self.training and self.rate else s + branch

    def attention(self, x: Tensor, kv: Tensor) -> Tensor:
        """Queries of x (B, N, d), keys and values of kv (B, M + 1, d) -> (B, N, d)"""
        q, k, v = (
            linear(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear, y in ((self.q, x), (self.k, kv), (self.v, kv))
        )
        y: Tensor = self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y


__all__ = ["HST"]
