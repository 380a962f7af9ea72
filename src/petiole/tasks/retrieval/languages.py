"""Rerankers of several languages from modules: a task's and those of languages, adapters or sparse masks.  arXiv 2204.02292.

    en = pt.load(model, "en.petiole.safetensors", name="en", allow_other_backbone=True)     a language, learned by masked language modelling
    rank = pt.attach(model, ranking_module("adapter"), name="rank")
    under(model, "rank", language="en")             train: the language acts, frozen, below what ranks
    with compose(model, "rank", query_lang="en", doc_lang="sw"):
        rerank(model, query, documents, tokenizer=tokenizer)

An adapter is stacked on that of a language, or each language's adapter sees the tokens of its own segment. Masks are added into the
backbone's weights, which costs nothing in the forward pass, and taken out again bit for bit: what was there is put back, nothing is subtracted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn

from petiole.adaptation import Adaptation
from petiole.anatomy import anatomy
from petiole.attach import HEAD, Host, activate, given, known, need_host, parameters_of, plan, route
from petiole.errors import AttachError, ConfigError
from petiole.method import Method, raw, wide
from petiole.methods.adapters.madx import NICE, NOWHERE, Inverse, LanguageAdapter, Sequential, Stacked, TaskAdapter
from petiole.methods.sparse.entries import SparseChange, Tied
from petiole.methods.sparse.ltsft import LTSFT, Maskable
from petiole.tasks.retrieval.reranking import DOCUMENT, QUERY

Kind = Literal["adapter", "mask"]
Mode = Literal["doc", "query", "split", "both"]
_PARTS: dict[str, tuple[type[nn.Module], ...]] = {
    "adapter": (Sequential, Stacked, NICE, Inverse),
    "mask": (SparseChange, Tied),
}


# ------------------------------------------------------------------------------------------------------------------- the modules


def language_module(
    kind: Kind = "adapter", *, reduction_factor: int = 2, invertible: bool = True, k: int | None = None, **options: Any
) -> Method:
    """A language, to be learned by masked language modelling.

    Args:
        reduction_factor, invertible: of an adapter. k: entries of a mask; see `size_of` for as many as an adapter has.
        options: further fields of the method.

    Raises:
        ConfigError: a value is out of range, or belongs to the other kind.
    """
    if kind == "adapter":
        refuse_other(k is not None, "k", kind)
        return LanguageAdapter(reduction_factor=reduction_factor, invertible=invertible, **options)
    refuse_other((reduction_factor, invertible) != (2, True), "reduction_factor and invertible", kind)
    return LTSFT(**{"k": k, "l1_weight": 0.1, "maskable": ("embeddings", "weights", "biases"), **options})


def ranking_module(
    kind: Kind = "adapter",
    *,
    reduction_factor: int = 16,
    k: int | None = None,
    maskable: Sequence[Maskable] | None = None,
    **options: Any,
) -> Method:
    """What ranks, to be trained on top of the language of its training data; the head trains with it and is stored whole.

    Args and raises: as for `language_module`.
    """
    if kind == "adapter":
        refuse_other(k is not None or maskable is not None, "k and maskable", kind)
        return TaskAdapter(reduction_factor=reduction_factor, **options)
    refuse_other(reduction_factor != 16, "reduction_factor", kind)
    return LTSFT(**{"k": k, "first_phase": 3 / 13, **({} if maskable is None else {"maskable": maskable}), **options})


def refuse_other(given: bool, what: str, kind: str) -> None:
    if kind not in _PARTS:
        raise ConfigError(f"kind = {kind!r}: adapter or mask")
    if given:
        raise ConfigError(f"kind = {kind!r} has no {what}, which the other kind has: {', '.join(_PARTS)}")


def size_of(model: nn.Module, method: Method) -> int:
    """How many numbers a method trains on a model, without its head: the k of a mask that is as large as an adapter."""
    made = plan(model, (method,), anatomy(model), 0, False)
    return sum(parameter.numel() for parameter in {id(p): p for p in parameters_of(made)}.values())


def under(model: nn.Module, ranking: str, language: str | None) -> None:
    """Let a language act below what ranks, frozen, from now on: how a ranking module is trained."""
    host = need_host(model)
    names = known(host, [name for name in (language, ranking) if name is not None])
    if language is not None:
        host.adaptations[language].freeze()
    activate(model, *names)


# ----------------------------------------------------------------------------------------------------------------- put together


@contextmanager
def compose(
    model: nn.Module,
    ranking: str,
    query_lang: str | None = None,
    doc_lang: str | None = None,
    mode: Mode = "doc",
    *,
    invertible: bool = True,
    skip_layers: Sequence[int] = (),
) -> Iterator[None]:
    """A reranker for a pair of languages inside the `with`: attached adaptations, by name.

    Args:
        ranking: the ranking module, with its head.
        query_lang, doc_lang: language modules; without any, the ranking module acts alone.
        mode: doc, query: the language of that side; split: adapters, each at the tokens of its side; both: masks, added up.
        invertible: whether the adapters on the embeddings act.
        skip_layers: depths in which no adapter acts (AdapterDrop).

    Raises:
        AttachError: a module is missing, of another kind or of another backbone, has no head, or acts already.
        ConfigError: a mode that these modules do not have.
    """
    host = need_host(model)
    (rank,) = (host.adaptations[name] for name in known(host, ranking))
    languages = chosen(host, query_lang, doc_lang, mode)
    modules = [*languages, rank]
    if not any(slot.number == HEAD for slot in rank.slots):
        raise AttachError(f"{ranking!r} has no head to score with; train it with one (train_head=True)")
    kinds = {module.name: kind_of(module) for module in modules}
    unlike = {"split": "mask", "both": "adapter"}.get(mode)
    if any(kinds[module.name] == unlike for module in languages):
        raise ConfigError(
            f"mode={mode!r}: {'masks are added up, not split' if mode == 'split' else 'adapters are stacked, not added up'}; "
            f"mode={'both' if mode == 'split' else 'split'!r}"
        )
    masks = [module for module in modules if kinds[module.name] == "mask"]
    refuse_other_origins(masks)
    adapters = [module for module in modules if module not in masks]
    if skip_layers and not adapters:
        raise ConfigError("skip_layers: a mask has no layers that could be skipped; leave it out")
    scopes = scopes_of(host, adapters, languages if mode == "split" else [], invertible, skip_layers)
    with route(model, [tuple(module.name for module in modules)]), given(model, scopes=scopes), written(masks):
        yield


def chosen(host: Host, query_lang: str | None, doc_lang: str | None, mode: str) -> list[Adaptation]:
    """The language modules that act; of two, the query's first.

    Raises:
        ConfigError: the mode needs another language than is given.
    """
    sides = {"doc": [doc_lang], "query": [query_lang], "split": [query_lang, doc_lang], "both": [query_lang, doc_lang]}
    if mode not in sides:
        raise ConfigError(f"mode = {mode!r}: {', '.join(sides)}")
    names = sides[mode]
    if query_lang is None and doc_lang is None:
        return []
    if None in names:
        raise ConfigError(f"mode={mode!r} needs {'both languages' if len(names) > 1 else f'{mode}_lang'}")
    if mode == "both" and query_lang == doc_lang:
        raise ConfigError(f"mode='both' would add the mask of {query_lang!r} twice; mode='doc'")
    return [
        host.adaptations[name] for name in known(host, list(dict.fromkeys(name for name in names if name is not None)))
    ]


def kind_of(module: Adaptation) -> str:
    """adapter or mask.

    Raises:
        AttachError: it is neither, or a mask that is not found yet.
    """
    deltas = [slot.delta for slot in module.slots if slot.number != HEAD]
    kind = next((kind for kind, classes in _PARTS.items() if all(isinstance(d, classes) for d in deltas)), None)
    if kind is None or not deltas or module.own or module.shared:
        raise AttachError(
            f"{module.name!r} is neither an adapter nor a mask, but {', '.join(m.slug for m in module.methods)}\n"
            "compose takes what language_module and ranking_module make"
        )
    if any(isinstance(d, SparseChange) and d.structure() != {"form": "sparse"} for d in deltas):
        raise AttachError(f"{module.name!r} has no mask yet, every entry trains; go on with training, or next_phase")
    return kind


def refuse_other_origins(masks: Sequence[Adaptation]) -> None:
    """Raises AttachError: they are differences to different weights."""
    seen: dict[str, tuple[str, dict[str, Any]]] = {}
    for mask in masks:
        for slot in mask.slots:
            mine = slot.delta.recipe() if slot.number != HEAD else {}
            name, theirs = seen.setdefault(slot.site.key, (mask.name, mine))
            other = [part for part in mine if theirs.get(part, mine[part]) != mine[part]]
            if other:
                raise AttachError(
                    f"{name!r} and {mask.name!r} are masks of different backbones: the {other[0]} at {slot.site.key} was another"
                )


def scopes_of(
    host: Host,
    adapters: Sequence[Adaptation],
    split: Sequence[Adaptation],
    invertible: bool,
    skip_layers: Sequence[int],
) -> dict[int, int]:
    """Where each delta acts, by its id; one that is not named acts everywhere."""
    skipped = (
        {(site.stack, site.depth) for site in host.anatomy.sites(["block"], skip_layers)} if skip_layers else set()
    )
    scopes = {}
    for module in adapters:
        for slot in module.slots:
            if slot.number == HEAD:
                continue
            on_embeddings = isinstance(slot.delta, (NICE, Inverse))
            if len(split) > 1 and module in split:
                scopes[id(slot.delta)] = (QUERY, DOCUMENT)[split.index(module)]
            if (on_embeddings and not invertible) or (
                not on_embeddings and (slot.site.stack, slot.site.depth) in skipped
            ):
                scopes[id(slot.delta)] = NOWHERE
    return scopes


@contextmanager
def written(masks: Sequence[Adaptation]) -> Iterator[None]:
    """Masks are part of the backbone's own weights inside, IN PLACE and in every thread; afterwards these are as they were, bit for bit.

    Raises:
        AttachError: one of them is part of the weights already.
    """
    there = next((mask.name for mask in masks if mask.merged), None)
    if there is not None:
        raise AttachError(f"{there!r} is part of the weights already; nothing can be added twice")
    slots = [slot for mask in masks for slot in mask.slots if slot.number != HEAD]
    before: list[tuple[Tensor, Tensor, Tensor]] = []
    try:
        for slot in slots:
            for name, entries in slot.delta.entries() if isinstance(slot.delta, SparseChange) else ():
                own = raw(slot.host.module(slot.site.path), slot.site.parameter if name == "weight" else slot.site.bias)
                index, values = entries.chosen()
                before.append((own.detach(), index, own.detach().take(index)))
                own.detach().put_(index, (wide(before[-1][2]) + values).to(own.dtype))
            slot.merged = True
        for mask in masks:
            mask.merged = True
        yield
    finally:
        for own, index, values in reversed(before):
            own.put_(index, values)
        for slot in slots:
            slot.merged = False
        for mask in masks:
            mask.merged = False
