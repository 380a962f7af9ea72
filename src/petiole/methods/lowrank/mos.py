"""MoS: mixture of shards.  Wang et al. 2024, arXiv 2410.00938.

    W x + b  <-  W x + b + s · B A x        A (r, in), B (out, r), s = alpha / r

    row i of A    = [pool_A[I(i, 1)], …, pool_A[I(i, l)]]        shards of in / l numbers
    column i of B = [pool_B[J(i, 1)], …, pool_B[J(i, l)]]        shards of out / l numbers

The L sites of one role share two pools of e L l shards, as many numbers as LoRA of rank e has at these sites, of which every site builds
factors of a larger rank r. Of a pool, (e - p) L l shards are public; the others are private, p l for each site. The tables I and J are drawn
once, from a seed, and never train: the first r - p rows name public shards, none of them twice, I and J apart (`pair_dissociation`); the
last p rows are the site's private shards as they stand. Without `subset_selection` every site takes its whole pool, r = e L, unsharded
(pure sharing), and `differentiation="random_scaling"` puts a frozen diagonal N(1, σ²) of its own between these B and A.

Sits     on the named linears, all of them by default.
Trains   the pools: e (in + out) numbers per site, whatever r, l and p. They belong to the attachment, not to a site.
Starts   at pool_B = 0, so the adapted model is the bare backbone, bit for bit.
Merges   exactly: ΔW = s · B A, of rank up to r; `export` writes it site by site as plain LoRA of rank r.

A public shard gets the sum of its gradients over all sites that use it. Within one site no shard occurs twice, so no two numbers are added
in an order that a GPU might choose; with `replacement` they are, and torch.use_deterministic_algorithms(True) gives a fixed order.

Relations: LoRA has e = r and shares nothing (here: p = e = r). NOLA shares frozen random matrices, this shares what it trains.
"""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from petiole.anatomy import Anatomy, Site
from petiole.errors import AttachError
from petiole.factored import Parts
from petiole.method import Delta, Layers, Method, Place, layers_field
from petiole.methods.lowrank import counter
from petiole.methods.lowrank.factors import Product, kaiming_uniform
from petiole.methods.lowrank.origin import linears

TABLES = "splitmix64-order"  # how tables are drawn; another way needs another name


class MoS(Method):
    """Factors of a large rank, assembled from shards of pools that all depths share."""

    slug: ClassVar[str] = "mos"
    title: ClassVar[str] = "MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of Shards"
    paper: ClassVar[str] = "2410.00938"
    saves: ClassVar[str] = "parameters (about 8 times against LoRA of the same rank) and checkpoint; free once merged"
    merges: ClassVar[bool] = True
    identity_at_start: ClassVar[bool] = True
    size: ClassVar[str] = "equivalent_rank"

    equivalent_rank: int = Field(2, ge=1, description="Budget e: as many parameters as LoRA of this rank.")
    rank: int | None = Field(
        None, ge=1, description="Rank r of each site; if None 4 e, or as much as the public shards allow."
    )
    shards_per_vector: int | None = Field(
        None, ge=1, description="Pieces l of each row and column, a divisor of both widths; if None 4."
    )
    private_rank: int | None = Field(
        None,
        ge=0,
        description="Rows p of private shards, at most e and r; if None a quarter of e, at least 1 if e > 1.",
    )
    subset_selection: bool = Field(True, description="Each site takes a part of its pool; if not, the whole (r = e L).")
    pair_dissociation: bool = Field(True, description="Rows of A and columns of B are chosen apart, not in pairs.")
    replacement: bool = Field(False, description="Let one site use a public shard several times.")
    differentiation: Literal["shards", "random_scaling"] = Field(
        "shards", description="What makes sites differ: their shards, or a frozen random diagonal on the whole pool."
    )
    scaling_deviation: float = Field(0.5, gt=0, description="σ of that random diagonal, around 1.")
    seed: int | None = Field(None, ge=0, description="Of the tables; if None the attachment's.")
    alpha: float = Field(16.0, gt=0, description="Numerator of the scaling alpha / rank.")
    dropout: float = Field(0.1, ge=0, lt=1, description="On the input of A, in training.")
    roles: tuple[str, ...] | None = Field(None, min_length=1, description="Linears to adapt, by role; if None all.")
    groups: dict[str, tuple[str, ...]] | None = Field(
        None, description="Roles that share a pool, by a name; others have one for each stack, role and shape."
    )
    layers: Layers = layers_field()

    @model_validator(mode="after")
    def consistent(self) -> MoS:
        for name in self.groups or {}:
            if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) or hasattr(nn.ModuleDict, name):
                raise ValueError(f"groups: {name!r} is no name: letters, digits, - and _, at most 64")
        e, r, p = self.equivalent_rank, self.rank, self.private
        if self.whole_pool:
            for name, value, only in (
                ("shards_per_vector", self.shards_per_vector, 1),
                ("private_rank", self.private_rank, 0),
            ):
                if value not in (None, only):
                    raise ValueError(
                        f"{name} = {value}, but where sites take the whole pool it is {only}: leave it out"
                    )
            return self
        if p > e:
            raise ValueError(f"private_rank = {p} is above equivalent_rank = {e}: it is at most that")
        if r is not None and p > r:
            raise ValueError(f"private_rank = {p} is above rank = {r}: it is at most that")
        if p == e and r not in (None, e):
            raise ValueError(
                f"private_rank = equivalent_rank = {e} leaves no public shard, so rank = {r} can only be {e}: lower private_rank"
            )
        return self

    @property
    def whole_pool(self) -> bool:
        """Whether every site takes its whole pool: pure sharing."""
        return not self.subset_selection or self.differentiation == "random_scaling"

    @property
    def private(self) -> int:
        """p"""
        if self.whole_pool:
            return 0
        e = self.equivalent_rank
        return max(e // 4, min(1, e - 1)) if self.private_rank is None else self.private_rank

    @property
    def shards(self) -> int:
        """l"""
        return 1 if self.whole_pool else self.shards_per_vector or 4

    def deltas(self, anatomy: Anatomy) -> Iterator[Place]:
        places: dict[Site, Place] = {}
        for name, sites in self.grouped(anatomy).items():
            layout = self.layout(name, sites)
            places |= {site: Place(site, Assembled(self.dropout, name, k)) for k, site in enumerate(layout.sites)}
        for site in linears(self.slug, anatomy, self.roles, self.layers):
            yield places[site]

    def shared(self, anatomy: Anatomy) -> nn.Module:
        layouts = {name: self.layout(name, sites) for name, sites in self.grouped(anatomy).items()}
        alone = [layout.sites[0].key for layout in layouts.values() if len(layout.sites) == 1 and layout.public]
        if alone:
            warnings.warn(
                f"mos: {', '.join(alone)}: alone in a group, so its public shards serve no other", stacklevel=2
            )
        if self.replacement and not self.whole_pool:
            warnings.warn(
                "mos: with replacement, a site may use a shard several times, which can cost rank", stacklevel=2
            )
        return Pools(layouts, self.seed)

    def bind(self, deltas: Mapping[str, Delta], shared: nn.Module | None) -> None:
        for delta in deltas.values():
            if isinstance(delta, Assembled) and isinstance(shared, Pools):
                delta.pool = (shared.pools[delta.group],)  # type: ignore[assignment]  # in a tuple, so that it is not registered once more

    def grouped(self, anatomy: Anatomy) -> dict[str, list[Site]]:
        """The sites that share a pool, by its name.

        Raises:
            AttachError: a role is in two groups, or in none of the chosen ones.
        """
        sites = linears(self.slug, anatomy, self.roles, self.layers)
        named: dict[Site, str] = {}
        for name, roles in (self.groups or {}).items():
            for site in linears(self.slug, anatomy, roles, self.layers):
                if site not in sites:
                    raise AttachError(f"mos: groups[{name!r}] has {site.key}, which is not adapted; add it to roles")
                if site in named:
                    raise AttachError(f"mos: {site.key} is in the groups {named[site]!r} and {name!r}; leave it in one")
                named[site] = name
        found: dict[str, list[Site]] = {}
        for site in sites:
            found.setdefault(named.get(site) or pool_name(site), []).append(site)
        return found

    def layout(self, name: str, sites: Sequence[Site]) -> Layout:
        """The sizes of one group.

        Raises:
            AttachError: its sites differ in shape, l divides not both widths, or there are too few public shards.
        """
        first, e, l, p, count = sites[0], self.equivalent_rank, self.shards, self.private, len(sites)
        for site in sites:
            if (site.in_features, site.out_features) != (first.in_features, first.out_features):
                raise AttachError(
                    f"mos: the group {name!r} has {first.key} ({first.in_features} to {first.out_features}) and {site.key} "
                    f"({site.in_features} to {site.out_features})\nsites that share a pool are of one shape: name groups by shape"
                )
        both = math.gcd(first.in_features, first.out_features)
        if both % l:
            fit = ", ".join(str(n) for n in range(1, min(both, 64) + 1) if both % n == 0)
            keys = ", ".join(s.key for s in sites[:4]) + (f" and {count - 4} more" if count > 4 else "")
            raise AttachError(
                f"mos: shards_per_vector = {l} does not divide both {first.in_features} and {first.out_features}, the widths of "
                f"{keys}\nchoose one of {fit}"
            )
        most = e * count if self.whole_pool else p + (e - p) * count
        r = self.rank or (most if self.whole_pool or p == e else min(4 * e, most))
        if self.whole_pool and r != most:
            raise AttachError(
                f"mos: rank = {r}, but the {count} sites of {name!r} take their whole pool: {most}, or None"
            )
        if r > most and not (self.replacement and most > p):
            raise AttachError(
                f"mos: rank = {r} of {name!r} needs {(r - p) * l} public shards in each site, and there are {(most - p) * l}\n"
                f"choose rank {max(p, 1)} to {most}, a larger equivalent_rank, or replacement=True"
            )
        return Layout(tuple(sites), e, r, l, p, self.alpha / r, self)


def pool_name(site: Site) -> str:
    """One for each stack, role and shape: "encoder-q-64x64". Experts of one layer are sites like those of another."""
    key = replace(site, expert=-1).key.removeprefix(f"{site.stack}.{site.depth}.").replace(".", "-")
    return f"{site.stack}-{key}-{site.in_features}x{site.out_features}".removeprefix("-")


@dataclass(frozen=True)
class Layout:
    """Sizes of a group: its sites, e, r, l, p and s; and the method for its switches."""

    sites: tuple[Site, ...]
    budget: int
    rank: int
    shards: int
    private: int
    scale: float
    method: MoS

    @property
    def public(self) -> int:
        """How many shards are public; those of the sites follow, p l for each."""
        return (self.budget - self.private) * len(self.sites) * self.shards

    def table(self, seed: int, group: str, member: int, side: str) -> Tensor:
        """Which shards make up A or B of one site, row by row: int64 (r l,)"""
        rows = (self.rank - self.private) * self.shards
        own = self.public + member * self.private * self.shards + torch.arange(self.private * self.shards)
        if self.method.whole_pool:
            return torch.arange(rows)
        if not rows:
            return own
        key = table_seed(seed, group, self.sites[member].key, side if self.method.pair_dissociation else "A")
        if self.method.replacement:
            return torch.cat([(counter.bits(key, 0, rows) >> 1) % self.public, own])
        return torch.cat([counter.bits(key, 0, self.public).argsort()[:rows], own])  # no two of them are equal

    def diagonal(self, seed: int, group: str, member: int) -> Tensor:
        """v / m of one site, N(1, σ²): float32 (r,)"""
        u = counter.uniform(table_seed(seed, group, self.sites[member].key, "C"), 0, 1, self.rank)[0].double() + 2**-24
        return (1 + self.method.scaling_deviation * math.sqrt(2) * torch.erfinv(u)).float()


def table_seed(seed: int, *about: str) -> int:
    """One for each table, whatever else is attached."""
    return int.from_bytes(hashlib.sha256(" ".join(("mos", str(seed), *about)).encode()).digest()[:8], "big") >> 2


class Pools(nn.Module):
    """Everything that trains, by group: what the whole attachment owns.

    Args:
        layouts: of the groups. seed: of the tables; None to draw it.
    """

    def __init__(self, layouts: Mapping[str, Layout], seed: int | None) -> None:
        super().__init__()
        self.seed = seed
        self.pools = nn.ModuleDict({name: Pool(name, layout) for name, layout in layouts.items()})

    def initialise(self, generator: torch.Generator) -> None:
        drawn = int(torch.randint(1 << 62, (), generator=generator))
        self.seed = drawn if self.seed is None else self.seed
        for pool in self.pools.values():
            pool.initialise(generator, self.seed)  # type: ignore[operator]

    def recipe(self) -> dict[str, Any]:
        members = {name: [site.key for site in pool.layout.sites] for name, pool in self.pools.items()}  # type: ignore
        return {"tables": TABLES, "seed": self.seed, "modules": members}

    @property
    def unused(self) -> dict[str, tuple[int, int]]:
        """Of each group, how many shards of A's and of B's pool no site uses: they never get a gradient."""
        return {
            name: tuple(len(pool.A) - len(table.unique()) for table in (pool.index_A, pool.index_B))  # type: ignore
            for name, pool in self.pools.items()
        }


class Pool(nn.Module):
    """The two pools of one group, public shards first, then those of its sites in order; and the tables of its sites."""

    index_A: Tensor  # (L, r l)
    index_B: Tensor  # (L, r l)
    C: Tensor | None  # (L, r), of random scaling

    def __init__(self, name: str, layout: Layout) -> None:
        super().__init__()
        self.name, self.layout = name, layout
        first, count = layout.sites[0], layout.budget * len(layout.sites) * layout.shards
        self.width = first.in_features
        self.A = nn.Parameter(torch.empty(count, first.in_features // layout.shards))  # (e L l, in / l)
        self.B = nn.Parameter(torch.empty(count, first.out_features // layout.shards))  # (e L l, out / l)
        size = (len(layout.sites), layout.rank * layout.shards)
        self.register_buffer("index_A", torch.zeros(size, dtype=torch.int64), persistent=False)
        self.register_buffer("index_B", torch.zeros(size, dtype=torch.int64), persistent=False)
        scaled = layout.method.differentiation == "random_scaling"
        self.register_buffer("C", torch.ones(len(layout.sites), layout.rank) if scaled else None, persistent=False)

    def initialise(self, generator: torch.Generator, seed: int) -> None:
        """Shards of A as LoRA's A of the full width would be, those of B zero."""
        kaiming_uniform(self.A, generator, fan_in=self.width)
        self.B.zero_()
        for member in range(len(self.layout.sites)):
            self.index_A[member] = self.layout.table(seed, self.name, member, "A")
            self.index_B[member] = self.layout.table(seed, self.name, member, "B")
            if self.C is not None:
                self.C[member] = self.layout.diagonal(seed, self.name, member)

    def parts(self, member: int) -> Parts:
        """The factors of one site."""
        r, scale = self.layout.rank, self.layout.scale
        A = self.A.index_select(0, self.index_A[member]).view(r, -1)
        B = self.B.index_select(0, self.index_B[member]).view(r, -1).T
        return (A, B, scale, None) if self.C is None else (A, B, scale, None, self.C[member])


class Assembled(Product):
    """ΔW = s · B A, both looked up in a group's pools.

    Args:
        dropout: on the input of A. group, member: which pools, and which of their sites this is.
    """

    def __init__(self, dropout: float, group: str, member: int) -> None:
        super().__init__(dropout)
        self.group, self.member = group, member
        self.pool: tuple[Pool, ...] = ()

    def parts(self) -> Parts:
        return self.pool[0].parts(self.member)
