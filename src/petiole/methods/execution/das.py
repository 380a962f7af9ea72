"""DAS: skip the blocks that a task can do without.  Wu et al. 2023, arXiv 2309.01479.

    kept      x  <-  x + Attn(norm(x)) + A_0(x),     x  <-  x + MLP(norm(x)) + A_1(x)          A(x) = W_up ReLU(W_down LN(x) + b) + b'
    skipped   x  <-  x + A_skip(x)                                                             the block is not called

In a post-norm block A(x) goes in front of the norm that ends an attention, and behind the norm that ends the block.

Sits     beside every attention (self and cross) and ffn of a kept block, reading the residual stream; in the place of a skipped block.
Trains   2 d + d h + h + h d + d numbers for each A; a pooler and the embeddings of token types, if there are any.
Starts   at weights of deviation 0.02, so near the bare backbone, without the skipped blocks.
Merges   no: ReLU stands between the two projections.

With `skip` the blocks are given. Without, a bandit finds them in training (`bandit.py`): each step skips other blocks, and every T steps S
subnets are compared on a batch of held-out data. Between steps the m blocks with the largest preference are skipped. `search` runs it all,
`chosen` reads the result, and the blocks found are given to a new adaptation, which trains anew: `pt.DAS(skip=found.skip)`; `prune` then
drops the weights of what is skipped. An adapter's change is under the dropout that ends its sub-layer, where there is one.

`insertion="sequential"` and `unit="sublayer"` are the variant for language models: adapters without a norm before each attention and ffn,
h <- h + A(h), and sub-layers that are skipped one by one, f(h) <- A(h).

Relations: parallel adapters alone (`parallel-adapter`) read the normed input and cost inference time, which this saves.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from petiole.anatomy import Anatomy, Site
from petiole.attach import Substitute, site_seed
from petiole.errors import AnatomyError, AttachError, ConfigError, TrainingError
from petiole.method import Config, Method, Moment, Place
from petiole.methods.adapters.bottleneck import Bottleneck
from petiole.methods.execution import bandit
from petiole.methods.execution.skipped import Prefix, Skippable, adds_residual


class Search(Config):
    """How the blocks to skip are found."""

    epochs: int = Field(3, ge=1, description="Of the search in all; afterwards the choice stands.")
    warmup: int = Field(1, ge=0, description="Epochs at first, in which blocks are skipped and nothing is concluded.")
    every: int = Field(10, ge=1, description="T, steps between two rounds of evaluation.")
    samples: int | None = Field(
        None, ge=2, description="S, subnets compared in a round; 3 if None, or all where there are fewer."
    )
    step_size: float = Field(1.0, gt=0, description="η; 0.05 for large language models.")
    loss_scale: float = Field(1.0, gt=0, description="Of the loss in the reward exp(-scale · loss).")
    ramp: bool = Field(False, description="Skip one more block after another during the first half of the warm-up.")

    @model_validator(mode="after")
    def searches(self) -> Search:
        if self.warmup >= self.epochs:
            raise ConfigError(
                f"Search.warmup = {self.warmup}: less than epochs = {self.epochs}, or nothing is searched"
            )
        return self


class DAS(Method):
    """Skip whole blocks, adapt the others."""

    slug: ClassVar[str] = "das"
    title: ClassVar[str] = (
        "Parameter and Computation Efficient Transfer Learning for Vision-Language Pre-trained Models"
    )
    paper: ClassVar[str] = "2309.01479"
    saves: ClassVar[str] = "optimiser state, checkpoint and compute at inference"
    routes: ClassVar[bool] = False
    exempt: ClassVar[Mapping[str, str]] = {
        "combines_with_others": "what others attach within a skipped block is not called"
    }
    idles: ClassVar[str] = (
        "a block that is skipped in a step leaves its own adapters idle, one that is kept its stand-in"
    )
    size: ClassVar[str] = "bottleneck"
    learning_rates: ClassVar[tuple[float, float]] = (1e-4, 1e-2)

    num_skip: int | None = Field(
        None, ge=0, description="m, how many candidates are skipped; less than there are. A third of them if None."
    )
    candidates: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="What may be skipped: 'encoder.3', or a module path; every block that can if None.",
    )
    skip: tuple[str, ...] | None = Field(None, description="What is skipped, named as in candidates: no search.")
    search: Search = Field(
        Search(), description="How it is searched otherwise: epochs, warmup, every, samples, step_size."
    )
    bottleneck: int = Field(96, ge=1, description="Inner width h of the adapters beside sub-layers.")
    skip_bottleneck: int = Field(192, ge=1, description="Inner width of those in a skipped block's place.")
    dropout: float = Field(0.0, ge=0, lt=1, description="After the activation, in training.")
    insertion: Literal["parallel", "sequential"] = Field(
        "parallel", description="Beside each sub-layer of a kept block, or before it and without a norm."
    )
    unit: Literal["block", "sublayer"] = Field("block", description="What is skipped: blocks, or attentions and ffns.")
    also: tuple[Literal["pooler", "type_embedding"], ...] = Field(
        ("pooler", "type_embedding"), description="Parts of the backbone that train in place, where there are any."
    )

    @model_validator(mode="after")
    def agrees(self) -> DAS:
        if self.skip is not None and len(set(self.skip)) < len(self.skip):
            raise ConfigError(f"DAS.skip = {self.skip}: one of them twice")
        if self.skip is not None and self.num_skip not in (None, len(self.skip)):
            raise ConfigError(f"DAS.num_skip = {self.num_skip}, but skip names {len(self.skip)}; give one of them")
        return self

    # ---- what sits where

    def deltas(self, anatomy: Anatomy) -> Iterator[Place]:
        units = self.units(anatomy)
        m, stacks = self.count(units), {site.stack for site in units.values()}
        skipped = set(self.named(self.skip, units)) if self.skip is not None else set(list(units)[:m])
        for name, site in units.items():
            if name in skipped or (self.skip is None and m):
                yield Place(site, self.stand_in(name, site, name in skipped))
        gone = {units[name].path for name in skipped} if self.skip is not None else set()
        for block in (b for stack in anatomy.stacks if stack.name in stacks for b in stack.blocks):
            for site in block.sublayers:
                if block.path not in gone and (self.unit == "block" or site.path not in gone):
                    yield self.beside(anatomy, site)

    def stand_in(self, name: str, site: Site, skips: bool) -> Skippable:
        whole = self.unit == "block"
        return Skippable(
            name,
            site.in_features,
            self.skip_bottleneck,
            skips=skips,
            residual=whole,
            attends=site.role in ("block", "attention"),
            dropout=self.dropout,
            norm="in" if whole else "none",
            init="bert",
        )

    def beside(self, anatomy: Anatomy, site: Site) -> Place:
        """The adapter of a sub-layer."""
        closing = anatomy.closing_norm(site)
        if self.insertion == "sequential":
            adapter = Bottleneck(site.in_features, self.bottleneck, dropout=self.dropout, init="bert")
            return Place(site.at("input"), adapter)
        adapter = Bottleneck(
            site.in_features, self.bottleneck, out_size=site.out_features, dropout=self.dropout, norm="in", init="bert"
        )
        if closing is not None:
            target = closing if site.role == "ffn" else site
            return Place(target.at("output"), adapter, read=site.at("input"))
        return Place(site.at("output"), adapter, read=anatomy.residual(site))

    def units(self, anatomy: Anatomy) -> dict[str, Site]:
        """The candidates by name, in the order of execution.

        Raises:
            AnatomyError: one is named that is not there. AttachError: one can't be skipped, or there are none.
        """
        every: dict[str, tuple[Site, str]] = {}
        for stack in anatomy.stacks:
            tables = [sum(s.kind == "embedding" for s in block.sites) for block in stack.blocks]
            for block, own in zip(stack.blocks, tables, strict=True):
                for site in [s for s in block.sites if s.role == "block"] if self.unit == "block" else block.sublayers:
                    name = f"{stack.name}.{block.depth}" if self.unit == "block" else site.key
                    why = self.unfit(anatomy, site)
                    if own > min(tables) and site.role in ("block", "attention"):
                        why = "it holds a table that the blocks after it use"
                    every[name] = (site, why)
        wanted = self.candidates if self.candidates is not None else [n for n, (_, why) in every.items() if not why]
        names = self.named(wanted, {name: site for name, (site, _) in every.items()})
        for name in names:
            if every[name][1]:
                raise AttachError(f"das: {name} can't be skipped: {every[name][1]}\nleave it out of candidates")
        if not names:
            whys = "; ".join(sorted({why for _, why in every.values()}))
            raise AttachError(f"das finds no {self.unit} of {anatomy.model_class} that could be skipped: {whys}")
        return {name: site for name, (site, _) in every.items() if name in names}

    def unfit(self, anatomy: Anatomy, site: Site) -> str:
        """Why a candidate can't be skipped; empty if it can."""
        if site.in_features != site.out_features:
            return f"{site.in_features} features go in and {site.out_features} come out"
        if site.repeats > 1:
            return f"it runs {site.repeats} times in a forward pass"
        block = anatomy.stack(site.stack).blocks[site.depth]
        if site.role == "block" and not block.sublayers:
            return "it has neither attention nor ffn, beside which adapters could stand"
        if site.role == "block" and block.channels_first:
            return "its hidden state is an image, (B, d, H, W), which an adapter can't read as it is"
        if site.role == "block":
            return "" if site.path.rpartition(".")[2].isdecimal() else "it stands in no list of blocks"
        if site.exit != site.path and not site.exit.startswith(f"{site.path}."):
            return "it spans several modules"
        return "its norm comes after the residual" if anatomy.closing_norm(site) is not None else ""

    def named(self, wanted: Iterable[str], units: Mapping[str, Site]) -> list[str]:
        """Names, or module paths, as names.

        Raises:
            AnatomyError: there is none of that name.
        """
        paths = {site.path: name for name, site in units.items()}
        for asked in wanted:
            if asked not in units and asked not in paths:
                near = ", ".join(difflib.get_close_matches(asked, [*units, *paths], n=3))
                raise AnatomyError(
                    f"das: {asked!r} is no candidate{f'; nearest: {near}' if near else ''}\n"
                    f"there are {', '.join(list(units)[:12])}{' …' if len(units) > 12 else ''}, by these names or as module paths"
                )
        return [paths.get(asked, asked) for asked in wanted]

    def count(self, units: Mapping[str, Site]) -> int:
        """m.

        Raises:
            ConfigError: not fewer than there are candidates, or no round of as many samples could differ.
        """
        given = len(self.skip) if self.skip is not None else self.num_skip
        m = given if given is not None else -(-len(units) // 3) if len(units) > 1 else 0
        if m:
            bandit.check(len(units), m, 2 if self.skip is not None else self.samples(len(units), m))
        return m

    def samples(self, count: int, m: int) -> int:
        """S, where m of so many candidates are skipped."""
        return self.search.samples if self.search.samples is not None else min(3, math.comb(count, m))

    def trains(self, anatomy: Anatomy, model: nn.Module) -> Iterator[str]:
        for site in anatomy.outside:
            if site.role in self.also:
                for name, _ in model.get_submodule(site.path).named_parameters():
                    yield f"{site.path}.{name}"

    # ---- the search

    def on_attach(self, moment: Moment) -> None:
        refuse_unfit(self, moment)
        if self.skip is None:
            m = sum(delta.skips for delta in stand_ins(moment))
            start = torch.zeros(len(stand_ins(moment)), dtype=torch.float64)
            moment.state.update(epochs=0, num_skip=m, preferences=start)

    def searching(self, moment: Moment) -> bool:
        return self.skip is None and moment.state["num_skip"] > 0 and moment.state["epochs"] < self.search.epochs

    def before_step(self, moment: Moment) -> None:
        """Draw a subnet: the same in every process, since it follows from the seed and the step."""
        if not self.searching(moment):
            return
        if moment.training.held_out is None and not 0 < moment.total_steps < self.search.every:
            raise TrainingError(
                "das compares subnets on held-out data, and there is none\n"
                "give pt.Trainer an eval_dataset, events.begin a loader (held_out=…), or name the blocks: skip=…"
            )
        for module in moment.model.modules():
            if stochastic(module):
                module.training = False
        select(moment, bandit.draw(moment.state["preferences"], self.skips_now(moment), generator(moment, "step")))

    def skips_now(self, moment: Moment) -> int:
        """m; with `ramp`, min(m, ⌊2 m t / warm-up⌋ + 1) in step t of the warm-up."""
        m = int(moment.state["num_skip"])
        if not self.search.ramp or moment.state["epochs"] >= self.search.warmup:
            return m
        if not moment.total_steps:
            raise TrainingError("das: with ramp=True the length of the run must be known: Events(…, total_steps=…)")
        warmup = max(1, moment.total_steps * self.search.warmup // self.search.epochs)
        return min(m, 2 * m * moment.step // warmup + 1)

    def after_optimizer_step(self, moment: Moment) -> None:
        if not self.searching(moment):
            return
        if moment.state["epochs"] >= self.search.warmup and moment.step % self.search.every == 0:
            self.compare(moment)
        settle(moment)

    def epoch_end(self, moment: Moment) -> None:
        if self.searching(moment):
            moment.state["epochs"] += 1

    def compare(self, moment: Moment) -> None:
        """A round: S subnets on one held-out batch, and q moves by what they were worth."""
        q, m = moment.state["preferences"], int(moment.state["num_skip"])
        subnets = bandit.draw_distinct(q, m, self.samples(len(q), m), generator(moment, "round"))
        losses = moment.averaged(losses_of(moment, subnets)).cpu()
        values = bandit.rewards(losses.to(q), self.search.loss_scale)
        moment.state["preferences"] = bandit.updated(q, subnets, values, self.search.step_size)


# ------------------------------------------------------------------------------------------------------------------- in the search


def stand_ins(moment: Moment) -> list[Skippable]:
    return [delta for delta in moment.deltas.values() if isinstance(delta, Skippable)]


def select(moment: Moment, skipped: Sequence[int]) -> None:
    """Skip these from now on, and no others."""
    for i, delta in enumerate(stand_ins(moment)):
        delta.skips = i in skipped


def settle(moment: Moment) -> None:
    """Skip what is preferred most until now."""
    select(moment, bandit.chosen(moment.state["preferences"], int(moment.state["num_skip"])))


def generator(moment: Moment, what: str) -> torch.Generator:
    """For the draws of one step; so a run that is resumed goes on as it would have."""
    return torch.Generator().manual_seed(site_seed(moment.seed, f"{what}.{moment.step}"))


def losses_of(moment: Moment, subnets: Sequence[Sequence[int]]) -> Tensor:
    """The loss of each subnet (S,) on the next held-out batch: in evaluation mode, without gradients."""
    from petiole.tasks.loop import evaluating

    held_out, prefix, losses = moment.training.held_out, Prefix(), []
    with evaluating(moment.model), torch.random.fork_rng(devices=[]):
        batch = held_out.next()
        for delta in stand_ins(moment):
            delta.prefix = prefix
        try:
            for subnet in subnets:
                select(moment, subnet)
                prefix.begin()
                losses.append(held_out.loss(moment.model, batch).float())
        finally:
            for delta in stand_ins(moment):
                delta.prefix = None
    return torch.stack(losses)


def stochastic(module: nn.Module) -> bool:
    """Whether a module leaves out branches at random, which would be taken for the blocks' merit."""
    return any(name in type(module).__name__.lower() for name in ("droppath", "stochasticdepth"))


def refuse_unfit(method: DAS, moment: Moment) -> None:
    """Raises AttachError: what the anatomy can't see stands against skipping."""
    for module in moment.model.modules():
        rates = [float(getattr(module, n, 0) or 0) for n in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")]
        if method.skip is None and max(rates) > 0:
            raise AttachError(
                f"das: {type(module).__name__} drops layers at random (layerdrop = {max(rates)}), which would blur the search; set it to 0"
            )
        if hasattr(module, "shift_size"):
            raise AttachError(
                f"das: the attention of {type(module).__name__} is given windows, of which the residual stream knows nothing"
            )
        if isinstance(module, Substitute) and method.unit == "sublayer" and adds_residual(module.block):
            raise AttachError(
                f"das: {module.delta.name} adds the residual by itself, which would go with it; unit='block' skips whole blocks"
            )
