"""Tokens put in front of the input: where they enter, what sees them, and where they are gone again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petiole as pt
import tiny
import toys
from petiole.anatomy import Anatomy
from petiole.errors import AttachError, TrainingError
from petiole.method import Method, Place
from toys import Tokens, first, output


def tokens_of(tuned: pt.Adaptation) -> torch.Tensor:
    return next(tensor for name, tensor in tuned.named_tensors().items() if name.endswith(":tokens"))


def test_shared_depth_keeps_the_tokens_until_the_last_run() -> None:
    # They were taken away after the first of the three runs of ALBERT's one block, under a mask that still had them.
    model, batch = tiny.model("albert"), tiny.batch("albert")
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        tuned = pt.attach(model, pt.PromptTuning(length=4))
        found = model.albert(**inputs).last_hidden_state
        front = tokens_of(tuned).expand(len(embeds), -1, -1)
        mask = torch.cat([inputs["attention_mask"].new_ones(len(embeds), 4), inputs["attention_mask"]], 1)
        tuned.detach()
        wanted = model.albert(inputs_embeds=torch.cat([front, embeds], 1), attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found, wanted[:, 4:])


def test_a_causal_tower_without_embeddings_as_input_stays_causal() -> None:
    # CLIP's text tower takes token ids alone, so the tokens enter at its first block, whose mask is given by position.
    model, batch = tiny.model("clip"), tiny.batch("clip")
    ids = batch["input_ids"]
    other = ids.clone()
    other[:, -1] = (ids[:, -1] + 1) % tiny.VOCABULARY
    with torch.no_grad():
        bare = model.text_model(ids).last_hidden_state
        pt.attach(model, pt.PromptTuning(length=4))
        one, two = model.text_model(ids).last_hidden_state, model.text_model(other).last_hidden_state
    assert one.shape == bare.shape
    assert not torch.allclose(one, bare)
    assert torch.equal(one[:, :-1], two[:, :-1])  # what comes before a token never sees it, not even through the prompt
    assert not torch.equal(one[:, -1], two[:, -1])


@pytest.mark.parametrize(
    ("family", "method", "stack"),
    [
        ("clip", pt.PromptTuning(length=2), "text"),
        ("clip", pt.VisualPromptTuning(length=2), "vision"),
        ("whisper", pt.PromptTuning(length=2), "decoder"),
        ("t5", pt.PromptTuning(length=2), "encoder"),
        ("bart", pt.PromptTuning(length=2), "encoder"),
        ("llava", pt.PromptTuning(length=2), "text"),
    ],
    ids=lambda value: getattr(value, "slug", value),
)
def test_tokens_join_the_stack_that_their_kind_feeds(family: str, method: pt.Method, stack: str) -> None:
    model = tiny.model(family)
    tuned = pt.attach(model, method)
    assert {slot.site.stack for slot in tuned.slots if slot.number == 0} == {stack}
    tuned.check(tiny.batch(family))


@pytest.mark.parametrize("family", ["electra", "albert", "opt"])
def test_tokens_are_as_wide_as_the_embeddings_that_a_model_projects(family: str) -> None:
    model = tiny.model(family)
    tuned = pt.attach(model, pt.VisualPromptTuning(length=2))
    widths = {s.site.depth: s.delta.tokens.shape[1] for s in tuned.slots if hasattr(s.delta, "tokens")}
    assert widths == {depth: 32 if depth else 16 for depth in widths}
    tuned.check(tiny.batch(family))


def test_experts_that_no_token_chose_may_go_without_a_gradient() -> None:
    tuned = pt.attach(tiny.model("gpt_oss"), pt.IA3())
    tuned.check(tiny.batch("gpt_oss", size=1))


def test_a_block_whose_output_nobody_reads_is_named_with_a_way_out() -> None:
    # LLaVA reads its vision tower one block before the end.
    batch = tiny.batch("llava")
    tuned = pt.attach(tiny.model("llava"), pt.LoRA(rank=2))
    with pytest.raises(TrainingError, match=r"without a gradient: vision\.1\..*\n.*roles of one stack"):
        tuned.check(batch)
    pt.attach(tiny.model("llava"), pt.LoRA(rank=2, roles=["text:q", "text:v"])).check(batch)


@pytest.mark.parametrize(
    ("family", "method", "says"),
    [
        ("gpt2", pt.LinearProbe(), "no task head"),
        ("mamba", pt.PrefixTuning(), "no attention"),
        ("vit", pt.PromptTuning(), "embeds no tokens"),
    ],
    ids=lambda value: getattr(value, "slug", None) or str(value).replace(" ", "-"),
)
def test_a_refusal_says_what_is_missing(family: str, method: pt.Method, says: str) -> None:
    with pytest.raises(pt.PetioleError, match=says):
        pt.attach(tiny.model(family), method)


# -------------------------------------------------------------------------------------- against a model without petiole, by hand


def prompt(length: int, *depths: int, stack: str | None = None) -> Method:
    """Tokens before the blocks at these depths; those of the first are as wide as the embeddings."""

    def places(anatomy: Anatomy) -> list[Place]:
        chosen = stack or anatomy.stacks[0].name
        found = []
        for depth in depths or (0,):
            width = anatomy.stack(chosen).hidden_size
            if depth == 0 and chosen != "vision":
                width = next((site.out_features for site in anatomy.outside if site.role == "embedding"), width)
            found.append(Place(toys.whole_block(anatomy, depth, chosen).at("input"), Tokens(length, width)))
        return found

    return toys.method(places)


def longer(model: nn.Module, batch: dict[str, Any], tokens: Tensor) -> dict[str, Any]:
    """What one would give a bare model: embeddings with the tokens in front, and a mask, labels and types as long."""
    rows, length = batch["input_ids"].shape[0], tokens.shape[0]
    embeds = model.get_input_embeddings()(batch["input_ids"])
    found: dict[str, Any] = {"inputs_embeds": torch.cat([tokens.expand(rows, -1, -1), embeds], 1)}
    for name, value in batch.items():
        if name in ("attention_mask", "token_type_ids"):
            found[name] = torch.cat([value.new_full((rows, length), name == "attention_mask"), value], 1)
        elif (
            name == "labels"
            and value.ndim == 2
            and "decoder" not in type(model).__name__.lower()
            and not model.config.is_encoder_decoder
        ):
            found[name] = torch.cat([value.new_full((rows, length), -100), value], 1)
        elif name == "labels":
            found[name] = value
    return found


@pytest.mark.parametrize("padding", ["right", "left", "none", "no mask"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gpt_neox", "opt", "t5", "bart", "gemma"])
def test_a_text_model_sees_the_tokens_and_its_caller_does_not(family: str, padding: str) -> None:
    """Logits, loss and mask: as if the caller had put them in, and taken their outputs away."""
    model, batch = toys.model(family), tiny.batch(family)
    if padding == "left":
        batch["attention_mask"] = batch["attention_mask"].flip(1)
        if not model.config.is_encoder_decoder:
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    elif padding == "none":
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    elif padding == "no mask":
        del batch["attention_mask"]
    hand = copy.deepcopy(model)
    tuned = pt.attach(model, prompt(3))
    with torch.no_grad():
        found = model(**batch)
        wanted = hand(**longer(hand, batch, tuned.slots[0].delta.tokens))
    logits = wanted.logits if model.config.is_encoder_decoder else wanted.logits[:, 3:]
    seen = batch.get("attention_mask", torch.ones(1)).bool()
    if seen.shape == logits.shape[:2]:
        torch.testing.assert_close(found.logits[seen], logits[seen], rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(found.logits, logits, rtol=1e-4, atol=1e-5)
    assert found.logits.shape[:2] == batch["labels"].shape
    if model.config.is_encoder_decoder:
        torch.testing.assert_close(found.loss, wanted.loss)
    else:  # the first real token is a target of the last extra one there, and of none here
        target = batch["labels"][:, 1:].flatten()
        loss = nn.functional.cross_entropy(found.logits[:, :-1].flatten(0, 1), target, ignore_index=-100)
        torch.testing.assert_close(found.loss, loss)
    tuned.check(batch)


@pytest.mark.parametrize("named", ["positions", "types", "embeddings", "by position"])
def test_what_a_caller_may_pass_besides_is_lengthened_too(named: str) -> None:
    model, batch = toys.model("bert"), tiny.batch("bert")
    hand = copy.deepcopy(model)
    tuned = pt.attach(model, prompt(3), train_head=False)
    wanted = longer(hand, batch, tuned.slots[0].delta.tokens)
    arguments: tuple[Any, ...] = ()
    if named == "positions":
        batch["position_ids"] = torch.tensor([[4, 2, 0, 1, 3, 5, 6]])
        wanted["position_ids"] = torch.cat([torch.arange(3)[None], batch["position_ids"] + 3], 1)
    elif named == "types":
        batch["token_type_ids"] = torch.tensor([[0, 0, 1, 1, 1, 0, 1]] * 2)
        wanted["token_type_ids"] = torch.cat([torch.zeros(2, 3, dtype=torch.long), batch["token_type_ids"]], 1)
    elif named == "embeddings":
        batch["inputs_embeds"] = hand.get_input_embeddings()(batch.pop("input_ids"))
    else:
        arguments = (batch.pop("input_ids"), batch.pop("attention_mask"))
    with torch.no_grad():
        found = model.bert(*arguments, **{k: v for k, v in batch.items() if k != "labels"}).last_hidden_state
        by_hand = hand.bert(**{k: v for k, v in wanted.items() if k != "labels"}).last_hidden_state
    torch.testing.assert_close(found, by_hand[:, 3:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("family", ["vit", "deit", "dinov2", "ast", "wav2vec2", "clip", "bert", "llama", "t5"])
def test_tokens_at_each_block_take_the_place_of_the_earlier_ones(family: str, deep: bool) -> None:
    """By hooks of the test's own on the blocks of a bare model: put in front, replaced, taken away."""
    model, batch = toys.model(family), tiny.batch(family)
    text = family in ("bert", "llama", "t5")
    stack = "vision" if family == "clip" else "encoder" if family == "t5" else None
    hand = copy.deepcopy(model)
    tuned = pt.attach(model, prompt(3, *((0, 1) if deep else (0,)), stack=stack), train_head=False)
    tokens = [slot.delta.tokens for slot in tuned.slots]
    blocks = [
        hand.get_submodule(b.path) for b in pt.anatomy(hand).stack(stack or pt.anatomy(hand).stacks[0].name).blocks
    ]

    def enter(depth: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            h = args[0] if args else kwargs["hidden_states"]
            if depth or text:
                h = torch.cat([tokens[depth].expand(len(h), -1, -1), h[:, 3:]], 1) if depth < len(tokens) else h
            else:
                h = torch.cat([tokens[0].expand(len(h), -1, -1), h], 1)
            return ((h, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": h})

        return hook

    def leave(module: nn.Module, args: Any, found: Any) -> Any:
        return found[:, 3:] if isinstance(found, Tensor) else (found[0][:, 3:], *found[1:])

    for depth, block in enumerate(blocks):
        if not (text and depth == 0):
            block.register_forward_pre_hook(enter(depth), with_kwargs=True)
    given: dict[str, Any] = batch
    with torch.no_grad():
        if text:
            given = longer(hand, batch, tokens[0])
        if family in ("bert",) or not text:
            blocks[-1].register_forward_hook(leave)
        found, wanted = first(model(**batch)), first(hand(**given))
    wanted = wanted[:, 3:] if family == "llama" else wanted
    seen = batch["attention_mask"].bool() if family == "llama" else slice(None)
    torch.testing.assert_close(found[seen], wanted[seen], rtol=1e-4, atol=1e-5)
    tuned.check(batch)


# ------------------------------------------------------------------------------------------------------------------ generation


def by_hand(model: nn.Module, ids: Tensor, mask: Tensor, tokens: Tensor, steps: int, change: Any = 0) -> Tensor:
    """Greedy decoding that computes everything anew in every step, without a cache and without `generate`.

    Args:
        change: of the embeddings of `ids`.
    """
    rows = len(ids)
    mask = torch.cat([mask.new_ones(rows, len(tokens)), mask], 1)
    embeds = torch.cat([tokens.expand(rows, -1, -1), model.get_input_embeddings()(ids) + change], 1)
    made = []
    for _ in range(steps):
        if model.config.is_encoder_decoder:
            start = ids.new_full((rows, 1), model.config.decoder_start_token_id)
            decoded = torch.cat([start, *made], 1)
            logits = model(inputs_embeds=embeds, attention_mask=mask, decoder_input_ids=decoded, use_cache=False).logits
        else:
            own = mask[:, len(tokens) :].cumsum(-1) - 1
            places = torch.cat([torch.arange(len(tokens)).expand(rows, -1), own.clamp_min(0) + len(tokens)], 1)
            logits = model(inputs_embeds=embeds, attention_mask=mask, position_ids=places, use_cache=False).logits
        following = logits[:, -1:].argmax(-1)
        made.append(following)
        if not model.config.is_encoder_decoder:
            embeds = torch.cat([embeds, model.get_input_embeddings()(following)], 1)
            mask = torch.cat([mask, mask.new_ones(rows, 1)], 1)
    return torch.cat(made, 1)


@pytest.mark.parametrize("padding", ["left", "none"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "t5", "bart"])
def test_generation_gives_what_computing_everything_anew_gives(family: str, padding: str) -> None:
    model, batch = toys.model(family), tiny.batch(family, size=3)
    hand = copy.deepcopy(model)
    tuned = pt.attach(model, prompt(3))
    ids, mask = batch["input_ids"], torch.ones_like(batch["input_ids"])
    if padding == "left":
        mask[1, :2] = 0
        ids[1, :2] = 0
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    with torch.no_grad():
        wanted = by_hand(hand, ids, mask, tuned.slots[0].delta.tokens, 6)
        plain = by_hand(hand, ids, mask, tuned.slots[0].delta.tokens[:0], 6)
    assert not torch.equal(wanted, plain), "the tokens make no difference"
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    for cached in (True, False):
        assert torch.equal(model.generate(ids, use_cache=cached, **options)[:, -6:], wanted), f"use_cache={cached}"
    beams = [
        model.generate(ids, use_cache=cached, num_beams=3, num_return_sequences=2, **options)
        for cached in (True, False)
    ]
    assert torch.equal(*beams)
    with pt.disabled(model):
        assert torch.equal(model.generate(ids, **options)[:, -6:], plain)


@pytest.mark.parametrize("masked", [False, True])
def test_a_step_with_a_cache_from_before_goes_on_without_the_tokens(masked: bool) -> None:
    """A cache that the bare model filled holds no tokens: the mask that comes with it must not be lengthened."""
    model, batch = toys.model("llama"), tiny.batch("llama")
    ids, mask = batch["input_ids"], batch["attention_mask"].flip(1)
    more = {"attention_mask": torch.cat([mask, mask.new_ones(2, 1)], 1)} if masked else {}
    with torch.no_grad():
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
        wanted = model(ids[:, -1:], past_key_values=copy.deepcopy(cache), **more).logits
        pt.attach(model, prompt(3))
        assert torch.equal(model(ids[:, -1:], past_key_values=copy.deepcopy(cache), **more).logits, wanted)


# ------------------------------------------------------------------------------------------ what the tokens are put in front of


class Rows(Tokens):
    """Adds a row of a table to each token by its place, and keeps the places."""

    def __init__(self, length: int, size: int) -> None:
        super().__init__(length, size)
        self.table = nn.Parameter(torch.empty(16, size))

    def initialise(self, generator: torch.Generator, base: Any) -> None:
        self.tokens.normal_(generator=generator)
        self.table.normal_(generator=generator)

    def joined(self, h: Tensor, places: Tensor) -> Tensor:
        self.seen = places
        return h + self.table[places.clamp_min(0)] * (places >= 0)[..., None]


def rows(length: int = 2, width: int = 32, stack: str | None = None) -> Method:
    def places(anatomy: Anatomy) -> list[Place]:
        site = toys.whole_block(anatomy, 0, stack or anatomy.stacks[0].name).at("input")
        return [Place(site, Rows(length, width))]

    return toys.method(places)


@pytest.mark.parametrize(
    ("mask", "places"),
    [
        ([[1, 1, 1, 1], [1, 1, 0, 0]], [[0, 1, 2, 3]] * 2),  # padding behind goes on counting
        ([[1, 1, 1, 1], [0, 0, 1, 1]], [[0, 1, 2, 3], [0, 0, 0, 1]]),
        ([[0, 1, 1, 0], [1, 0, 0, 1]], [[0, 0, 1, 2], [0, 0, 0, 1]]),
        (None, [[0, 1, 2, 3]]),
    ],
)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_places_are_those_of_real_tokens(family: str, mask: Any, places: list[list[int]]) -> None:
    model, ids = toys.model(family), tiny.batch(family)["input_ids"][:, :4]
    tuned = pt.attach(model, rows())
    model(ids, attention_mask=None if mask is None else torch.tensor(mask))
    assert tuned.slots[0].delta.seen.tolist() == places


@pytest.mark.parametrize("family", ["bert", "gpt2", "gemma", "t5", "bart", "opt"])
def test_what_the_tokens_are_put_in_front_of_changes_where_embeddings_enter(family: str) -> None:
    """As if the caller had given embeddings that are changed: before positions, norms and projections, in the encoder alone."""
    model, batch = toys.model(family), tiny.batch(family)
    hand = copy.deepcopy(model)
    width = model.get_input_embeddings().weight.shape[1]
    tuned = pt.attach(model, rows(width=width), train_head=False)
    delta = tuned.slots[0].delta
    wanted = longer(hand, batch, delta.tokens)
    wanted["inputs_embeds"] = wanted["inputs_embeds"] + torch.cat([torch.zeros_like(delta.tokens), delta.table[:7]])
    tuned.check(batch)
    if family == "bert":  # whose head reads the first token, here the first of the test's own
        model, hand = model.bert, hand.bert
        batch, wanted = ({k: v for k, v in each.items() if k != "labels"} for each in (batch, wanted))
    with torch.no_grad():
        found, by_hand = first(model(**batch)), first(hand(**wanted))
    by_hand = by_hand[:, by_hand.shape[1] - found.shape[1] :]
    seen = batch["attention_mask"].bool() if found.shape[1] == 7 else slice(None)
    torch.testing.assert_close(found[seen], by_hand[seen], rtol=1e-4, atol=1e-5)


def test_images_among_a_text_are_no_text() -> None:
    model, batch = toys.model("llava"), tiny.batch("llava")
    batch["attention_mask"] = batch["attention_mask"].flip(1)
    batch["attention_mask"][1, :] = torch.tensor([1, 1, 1, 1, 1, 1, 0])
    batch.pop("labels")
    tuned = pt.attach(model, rows(stack="text"))
    model(**batch)  # four tokens of an image, then the text
    assert tuned.slots[0].delta.seen.tolist() == [[-1, -1, -1, -1, 0, 1, 2]] * 2
    model(input_ids=batch["input_ids"][:, 4:])
    assert tuned.slots[0].delta.seen.tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_was_generated_is_left_as_it_is(family: str) -> None:
    """With and without a cache, however often, and whatever came before."""
    model, ids = toys.model(family), tiny.batch(family, size=3)["input_ids"]
    hand = copy.deepcopy(model)
    tuned = pt.attach(model, rows())
    delta, mask = tuned.slots[0].delta, torch.ones_like(ids)
    mask[1, :2] = 0
    model.generation_config.eos_token_id = None
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    with torch.no_grad():
        change = delta.table[(mask.cumsum(1) - 1).clamp_min(0)]
        wanted = by_hand(hand, ids, mask, delta.tokens, 5, change)
        assert not torch.equal(wanted, by_hand(hand, ids, mask, delta.tokens, 5)), "the change makes no difference"
    for cached in (True, False, False, True):
        assert torch.equal(model.generate(ids, use_cache=cached, **options)[:, 7:], wanted), cached
    longer = torch.cat([ids, wanted], 1)
    with torch.no_grad():  # an ordinary pass over more tokens is no generation, though it begins alike
        model(longer[:, :8], use_cache=True)
    assert delta.seen.shape[1] == 8


def test_rows_of_a_batch_change_their_own_text() -> None:
    model, batch = toys.model("llama"), tiny.batch("llama", size=3)
    for name in ("a", "b"):
        pt.attach(model, rows(2 if name == "a" else 3), name=name, seed=ord(name))
    alone = {}
    for name in ("a", "b", None):
        with pt.route(model, name):
            alone[name] = output(model, batch)
    with pt.route(model, ["b", None, "a"]):
        mixed = output(model, batch)
    for row, name in enumerate(("b", None, "a")):
        seen = batch["attention_mask"][row].bool()
        torch.testing.assert_close(mixed[row][seen], alone[name][row][seen], rtol=1e-4, atol=1e-5)


def test_what_can_not_be_lengthened_is_refused() -> None:
    model, batch = toys.model("llama"), tiny.batch("llama")
    pt.attach(model, prompt(3))
    mask = torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()
    with pytest.raises(AttachError, match="4-D mask"):
        output(model, {"input_ids": batch["input_ids"], "attention_mask": mask})
    with pytest.raises(AttachError, match="4-D mask"), pt.route(model, ["default", None]):
        output(model, {"input_ids": batch["input_ids"], "attention_mask": mask})
    with pytest.raises(AttachError, match=r"a bias for each pair of patches|one width"):
        pt.attach(toys.model("swin"), prompt(3))
    with pytest.raises(AttachError, match="layers begins at 1, not 0"):
        pt.attach(toys.model("bert"), prompt(3, 1))
