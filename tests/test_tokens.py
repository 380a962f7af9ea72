"""Tokens put in front of the input: where they enter, what sees them, and where they are gone again."""

from __future__ import annotations

import pytest
import torch

import petiole as pt
import tiny
from petiole.errors import TrainingError


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
