"""What DePT must hold, by its paper: each number is a line of its specification."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petiole as pt
import tiny
import toys
from linears import set_
from petiole.cost import predict
from petiole.errors import AttachError, ConfigError
from petiole.files import load_adaptation
from petiole.methods.prompts.dept import Decomposed, DePT
from petiole.training import Events, parameter_groups

SMALL: dict[str, Any] = {"length": 3, "rank": 2, "max_length": 12}
TABLE = [(0, 75), (20, 60), (40, 45), (60, 30), (80, 15), (100, 0)]  # m and r, each as many numbers as 100 tokens


def attached(family: str, seed: int = 0, **fields: Any) -> tuple[nn.Module, pt.Adaptation, Decomposed]:
    """Its parts away from where they start."""
    model = toys.model(family)
    tuned = pt.attach(model, DePT(**{**SMALL, **fields}), train_head=False, seed=seed)
    toys.shake(tuned, 0.5)
    return model, tuned, tuned.slots[0].delta


def entering(model: nn.Module, **batch: Any) -> Tensor:
    """The embeddings that enter the encoder, or the decoder where there is no other."""
    inner = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    seen: list[Tensor] = []
    handle = inner.register_forward_pre_hook(
        lambda m, a, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        inner(**batch)
    handle.remove()
    return seen[0]


# ------------------------------------------------------------------------------------------------------------- must hold


# 1
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5", "bart"])
def test_at_the_start_nothing_but_the_prompt_is_new(family: str) -> None:
    model, batch = toys.model(family).requires_grad_(False), tiny.batch(family)
    ids, bare = batch["input_ids"], toys.output(model, batch)
    words = model.get_input_embeddings()(ids)
    tuned = pt.attach(model, DePT(**SMALL), train_head=False)
    wanted = torch.cat([tuned.slots[0].delta.tokens.expand(len(ids), -1, -1), words], 1)
    assert torch.equal(entering(model, input_ids=ids), wanted)
    assert abs(float(started(512).std()) - 1) < 0.05
    tuned.detach()
    pt.attach(model, DePT(length=0, rank=3), train_head=False)
    assert torch.equal(toys.output(model, batch), bare)


def started(length: int) -> Tensor:
    """Those that a prompt starts from."""
    delta = pt.attach(tiny.model("bert"), DePT(length=length, rank=0)).slots[0].delta
    return delta.tokens.detach()


# 2
@pytest.mark.parametrize(("m", "r"), TABLE)
def test_the_published_counts(m: int, r: int) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12)
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config)
    for method in (DePT(length=m, rank=r), DePT(length=m), DePT.from_budget(100, m, 256, 768)):
        tuned = pt.attach(model, method)
        assert tuned.trainable == m * 768 + (256 + 768) * r == 76_800
        tuned.detach()


def test_a_budget_that_no_whole_rank_fills_is_kept_to() -> None:
    tuned = pt.attach(tiny.model("bert"), DePT(length=3, budget=20, max_length=10), train_head=False)
    rank = 17 * 32 // 42
    assert tuned.trainable == 3 * 32 + 42 * min(rank, 10) <= 20 * 32
    method = DePT.from_budget(20, 3, 50, 32, alpha=None)
    assert (method.rank, method.length, method.max_length, method.alpha) == (17 * 32 // 82, 3, 50, None)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_its_cost_is_known_before_there_are_weights(family: str) -> None:
    """From shapes alone, masks and all: a prompt's, and the product of A and B."""
    costs = {}
    for rank in (0, 2):
        with torch.device("meta"):
            model = tiny.model(family)
        pt.attach(model, DePT(**{**SMALL, "rank": rank}))
        costs[rank] = predict(model, tiny.batch(family)).forward_flops
    assert costs[2] - costs[0] == 2 * 12 * 2 * 32


# 3
@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_without_a_rank_it_is_prompt_tuning(family: str) -> None:
    model, batch = toys.model(family), tiny.batch(family)
    other = copy.deepcopy(model)
    tuned, prompt = pt.attach(model, DePT(length=3, rank=0)), pt.attach(other, pt.PromptTuning(length=3))
    set_(prompt.slots[0].delta.tokens, tuned.slots[0].delta.tokens)
    assert tuned.trainable == prompt.trainable
    assert torch.equal(toys.output(model, batch), toys.output(other, batch))


# 4
@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
@pytest.mark.parametrize("alpha", [8.0, 2.0, None])
def test_row_t_is_for_the_token_at_t(family: str, alpha: float | None) -> None:
    model, _, delta = attached(family, alpha=alpha)
    ids = tiny.batch(family)["input_ids"]
    c = 1.0 if alpha is None else alpha / math.sqrt(2)
    words = model.get_input_embeddings()(ids)
    for n in (7, 4):
        wanted = torch.cat([delta.tokens.expand(2, -1, -1), words[:, :n] + c * (delta.A[:n] @ delta.B)], 1)
        torch.testing.assert_close(entering(model, input_ids=ids[:, :n]), wanted)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_padding_behind_changes_nothing(family: str) -> None:
    model, _, _ = attached(family)
    batch = {k: v[:1, :5] for k, v in tiny.batch(family).items() if k != "labels"}
    batch["attention_mask"] = torch.ones(1, 5, dtype=torch.long)
    longer = {k: nn.functional.pad(v, (0, 3)) for k, v in batch.items()}
    extra = {"decoder_input_ids": torch.ones(1, 4, dtype=torch.long)} if family == "t5" else {}
    one, other = toys.output(model, {**batch, **extra}), toys.output(model, {**longer, **extra})
    torch.testing.assert_close(one, other[:, : one.shape[1]], rtol=1e-4, atol=1e-5)


def test_padding_in_front_does_not_count() -> None:
    model, _, delta = attached("llama")
    ids = tiny.batch("llama")["input_ids"]
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    change = entering(model, input_ids=ids, attention_mask=mask)[:, 3:] - model.get_input_embeddings()(ids)
    torch.testing.assert_close(change[0, 2:], delta.update()[:5])
    torch.testing.assert_close(change[1], delta.update()[:7])
    alone = entering(model, input_ids=ids[:1], attention_mask=mask[:1])  # a single row, too
    torch.testing.assert_close(alone[0, 5:], entering(model, input_ids=ids[:1, 2:])[0, 3:])


# 5
def test_gradients() -> None:
    model, batch = toys.model("llama"), tiny.batch("llama")
    tuned = pt.attach(model, DePT(**SMALL))
    delta = tuned.slots[0].delta
    optimizer = torch.optim.AdamW(parameter_groups(model, learning_rate=1e-3))
    for step in range(2):
        model(**batch).loss.backward()
        assert bool(delta.tokens.grad.any()) and bool(delta.B.grad.any())
        assert bool(delta.A.grad.any()) == (step > 0)  # B starts at zero
        optimizer.step()
        optimizer.zero_grad()
    own = {id(p) for p in tuned.parameters()}
    assert len(own) == 3 and all(p.requires_grad == (id(p) in own) for p in model.parameters())


# 6
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_update_is_the_same_for_any_tokens(family: str) -> None:
    model, _, _ = attached(family)
    words = model.get_input_embeddings()
    changes = [
        entering(model, input_ids=ids)[:, 3:] - words(ids)
        for ids in (torch.full((1, 6), 7), torch.tensor([[4, 9, 11, 30, 5, 6]]))
    ]
    torch.testing.assert_close(*changes)
    assert float(changes[0].abs().min()) > 0


# 7
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_generation_with_and_without_a_cache(family: str) -> None:
    """The same tokens; and those that were generated enter as they are."""
    model, _, _ = attached(family)
    ids = tiny.batch(family, size=3)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    seen: list[Tensor] = []
    inner = model.decoder if family == "t5" else model.base_model
    inner.register_forward_pre_hook(
        lambda m, a, kwargs: seen.append(
            kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        ),
        with_kwargs=True,
    )
    options = {"attention_mask": mask, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    made = {cached: model.generate(ids, use_cache=cached, **options) for cached in (True, False)}
    assert torch.equal(made[True], made[False])
    if family == "t5":
        assert all(not each.is_floating_point() for each in seen)  # the decoder gets its tokens as ever
        return
    words = model.get_input_embeddings()
    first, last = seen[0], seen[-1]
    assert first.shape[1] == 3 + 7 and last.shape[1] == 3 + 7 + 4
    torch.testing.assert_close(last[:, :10], first)
    assert torch.equal(last[:, 10:], words(made[False][:, 7:11]))
    assert not any(each.shape[1] > 1 for each in seen[1:5])  # with a cache, one token at a time


# 8
def test_the_file_holds_the_three_and_the_configuration(tmp_path: Path) -> None:
    _, tuned, delta = attached("llama")
    delta.update()  # which must not be stored
    tensors, about = load_adaptation(tuned.save(tmp_path / "a.safetensors"))
    assert {name.rpartition(":")[2] for name in tensors} == {"tokens", "A", "B"}
    assert sum(t.numel() for t in tensors.values()) == 3 * 32 + (12 + 32) * 2
    assert about["methods"][0]["config"]["alpha"] == 8


# 9
def test_the_product_is_computed_once_at_inference() -> None:
    model, _, delta = attached("llama")
    ids = tiny.batch("llama")["input_ids"]
    anew = delta.update().detach()
    with torch.no_grad():
        D = delta.update()
        assert delta.update() is D
        torch.testing.assert_close(D, anew, rtol=1e-6, atol=1e-6)
        toys.output(model, {"input_ids": ids})
        assert delta.update() is D
        delta.B.add_(1)
        torch.testing.assert_close(delta.update(), delta.scaling * delta.A @ delta.B)


# 10
@pytest.mark.parametrize("train_head", [True, False])
def test_two_groups_whose_rates_are_as_configured(train_head: bool) -> None:
    model = tiny.model("bert")
    method = DePT(**SMALL, prompt_learning_rate=0.4, lowrank_learning_rate=5e-4)
    tuned = pt.attach(model, method, train_head=train_head)
    groups = method.groups(tuned)
    assert len(groups) == 2
    members = [[id(p) for p in group["params"]] for group in groups]
    assert members[1] == [id(tuned.slots[0].delta.tokens)]
    assert sorted([*members[0], *members[1]]) == sorted(id(p) for p in tuned.parameters())
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of an optimiser whose rates are not those asked for
        Events(model, optimizer, schedule, total_steps=4).begin()
    for step in range(3):
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([5e-4 / (1 + step), 0.4 / (1 + step)])
        model(**tiny.batch("bert")).loss.backward()
        optimizer.step()
        schedule.step()


def test_every_trainer_learns_in_the_same_proportion() -> None:
    model = tiny.model("bert")
    tuned = pt.attach(model, DePT(**SMALL, prompt_learning_rate=0.3, lowrank_learning_rate=5e-3), train_head=False)
    rate = {id(p): group["lr"] for group in parameter_groups(model, learning_rate=1e-3) for p in group["params"]}
    delta = tuned.slots[0].delta
    assert rate[id(delta.tokens)] == pytest.approx(0.06) and rate[id(delta.A)] == rate[id(delta.B)] == 1e-3


# --------------------------------------------------------------------------------------------------- where prompts start from


def test_a_prompt_from_a_text_or_from_the_vocabulary() -> None:
    model = tiny.model("bart", scale_embedding=True)

    def tokenizer(text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [5 + len(word) for word in text.split()]}

    words = model.get_input_embeddings()
    for length, ids in ((2, [6, 7]), (5, [6, 7, 8, 6, 7])):
        tuned = pt.attach(model, DePT(length=length, rank=2).with_text("a bb ccc", tokenizer))
        torch.testing.assert_close(tuned.slots[0].delta.tokens.detach(), words(torch.tensor(ids)).detach())
        tuned.detach()
    tuned = pt.attach(model, DePT(length=4, rank=2, init="vocabulary"))
    table = words(torch.arange(tiny.VOCABULARY))
    near = (tuned.slots[0].delta.tokens[:, None] - table[None]).abs().amax(-1).amin(-1)
    assert float(near.max()) < 1e-5


def test_a_text_outlives_its_tokeniser(tmp_path: Path) -> None:
    model, batch = tiny.model("llama"), tiny.batch("llama")
    tuned = pt.attach(model, DePT(**SMALL, init="text", text=(5, 6)))
    toys.shake(tuned)
    other = tiny.model("llama")
    pt.load(other, tuned.save(tmp_path / "a.safetensors"))
    assert torch.equal(toys.output(other, batch), toys.output(model, batch))


def test_transfer_from_a_source_task(tmp_path: Path) -> None:
    _, source, there = attached("llama", seed=1)
    path = source.save(tmp_path / "source.safetensors")
    for given in (source, path):
        _, tuned, here = attached("llama", seed=2)
        before = here.B.detach().clone()
        DePT.transfer(tuned, given)
        assert torch.equal(here.tokens, there.tokens) and torch.equal(here.B, before)
        DePT.transfer(tuned, given, lowrank=True)
        assert torch.equal(here.A, there.A) and torch.equal(here.B, there.B)
    prompt = pt.attach(tiny.model("llama"), pt.PromptTuning(length=3))
    DePT.transfer(tuned, prompt)
    assert torch.equal(here.tokens, prompt.slots[0].delta.tokens)
    _, other, theirs = attached("llama", rank=3)
    before = theirs.tokens.detach().clone()
    with pytest.raises(AttachError, match=r"A is \[\(12, 3\)\] here and \[\(12, 2\)\] in the source"):
        DePT.transfer(other, source, lowrank=True)
    assert torch.equal(theirs.tokens, before)
    with pytest.raises(AttachError, match="tokens is"):
        DePT.transfer(pt.attach(tiny.model("llama"), pt.LoRA(rank=2)), source)


# ------------------------------------------------------------------------------------------------------- images beside a text


@pytest.mark.parametrize(("family", "text"), [("vilt", 7), ("llava", 3), ("clip", 7)])
def test_only_a_text_is_updated(family: str, text: int) -> None:
    """Whether a model joins image and text itself, mixes both, or has a tower for each."""
    model, batch = toys.model(family), tiny.batch(family)
    tuned = pt.attach(model, DePT(**SMALL, stack={"llava": "text", "clip": "text"}.get(family)), train_head=False)
    tuned.check(batch)
    delta = tuned.slots[0].delta
    seen: list[Tensor] = []
    real = delta.joined
    delta.joined = lambda h, places: (seen.append(real(h, places) - h), real(h, places))[1]  # type: ignore[method-assign]
    toys.shake(tuned)
    toys.output(model, batch)
    changed = seen[0].abs().sum(-1) > 0
    assert changed.sum(1).tolist() == [text] * 2 and bool(changed[:, -text:].all())
    torch.testing.assert_close(seen[0][0, -text:], delta.update()[:text], rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"length": 0, "rank": 0}, "nothing to train"),
        ({"length": -1}, "length"),
        ({"rank": -1}, "rank"),
        ({"length": 101}, "length = 101 is above budget = 100"),
        ({"init": "text"}, "needs the tokens of one.*with_text"),
        ({"max_length": 0}, "max_length"),
        ({"alpha": 0.0}, "alpha"),
        ({"prompt_learning_rate": 0.0}, "prompt_learning_rate"),
    ],
)
def test_values_that_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        DePT(**fields)


def test_budgets_that_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"length = 101.*0 to num_tokens = 100"):
        DePT.from_budget(100, 101, 256, 768)
    with pytest.raises(ConfigError, match="nothing to train"):
        DePT.from_budget(1, 0, 256, 8)
    with pytest.raises(AttachError, match="budget = 1 leaves no rank"):
        pt.attach(tiny.model("bert"), DePT(length=0, budget=1))


def test_an_input_that_is_too_long_is_refused() -> None:
    model, _, _ = attached("llama", max_length=5)
    ids = tiny.batch("llama")["input_ids"]
    with pytest.raises(AttachError, match="an input has 7 tokens, but max_length = 5"):
        model(ids)
    model(ids[:, :5])
    mask = torch.ones_like(ids)
    mask[:, :2] = 0
    model(ids, attention_mask=mask)  # five of them are real
    mask[0] = 1
    with pytest.raises(AttachError, match="7 tokens"):
        model(ids, attention_mask=mask)


class Normed(nn.Module):
    """Takes token ids alone, and normalises their embeddings before its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict({"word_embeddings": nn.Embedding(9, 16), "norm": nn.LayerNorm(16)})
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 16, batch_first=True) for _ in range(2))

    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.embeddings["norm"](self.embeddings["word_embeddings"](input_ids))
        for layer in self.layers:
            h = layer(h)
        return h


def test_places_that_are_refused() -> None:
    model = Normed()
    before = toys.snapshot(model)
    with pytest.raises(AttachError, match="takes no inputs_embeds and normalises its embeddings first"):
        pt.attach(model, DePT(length=3, rank=2))
    assert toys.snapshot(model) == before
    with pytest.raises(AttachError, match=r"rank = 33 is above max_length = 40 or the width 32: 0 to 32"):
        pt.attach(tiny.model("bert"), DePT(length=3, rank=33, max_length=40))
    with pytest.raises(AttachError, match=r"rank = 9 .* 0 to 8"):
        pt.attach(tiny.model("bert"), DePT(length=3, rank=9, max_length=8))
    with pytest.raises(AttachError, match=r"dept: .* embeds no tokens"):
        pt.attach(tiny.model("vit"), DePT())
    with pytest.raises(AttachError, match="text has token 99"):
        pt.attach(tiny.model("bert"), DePT(**SMALL, init="text", text=(5, 99)))
