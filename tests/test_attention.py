"""Inside attention: extra keys and values, probabilities, heads. Values are compared with attention written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petiole as pt
import tiny
import toys
from petiole.anatomy import Anatomy
from petiole.errors import AttachError
from petiole.method import AttentionDelta, Method, Place
from toys import Heads, Prepended, Watch, first, output, shake

FAMILIES = (
    "bert", "roberta", "llama", "qwen3", "mistral", "gemma", "gpt2", "gpt_neox", "phi", "opt", "vit", "dinov2", "t5", "bart", "whisper",
    "wav2vec2", "mixtral",
)  # fmt: skip


def inside(make: Callable[[Any, Any], AttentionDelta]) -> Method:
    """One delta in every attention; `make` gets the site and the site of its keys."""

    def places(anatomy: Anatomy) -> list[Place]:
        found = []
        for stack in anatomy.stacks:
            for role in ("attention", "cross_attention"):
                for site in (s for block in stack.blocks for s in block.sites if s.role == role):
                    keys = anatomy.sites([f"{role}.k"], [site.depth], stack.name)[0]
                    found.append(Place(site, make(site, keys)))
        return found

    return toys.method(places)


def left_padded(family: str) -> dict[str, Any]:
    """The batch with its padding in front, where a query then sees nothing but padding."""
    batch = tiny.batch(family)
    if "attention_mask" in batch and "decoder_input_ids" not in batch and "input_features" not in batch:
        batch["attention_mask"] = batch["attention_mask"].flip(1)
    return batch


def real(found: Tensor, batch: dict[str, Any]) -> Tensor:
    """Without the outputs at padding, which nobody reads and on which kernels differ."""
    mask = batch.get("attention_mask")
    return found[mask.bool()] if mask is not None and found.shape[:2] == mask.shape else found


# ------------------------------------------------------------------------------------------------------------- probabilities


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_step_by_step_gives_what_the_kernels_give(family: str, kernel: str) -> None:
    """Grouped queries, position biases, scalings, masks, padding on either side: a delta that changes nothing changes nothing."""
    model = toys.model(family, attn_implementation=kernel)
    batches = [
        tiny.batch(family),
        left_padded(family),
        {k: v for k, v in tiny.batch(family).items() if k != "attention_mask"},
    ]
    expected = [output(model, batch) for batch in batches]
    tuned = pt.attach(model, inside(lambda site, keys: Watch()), train_head=False)
    for batch, before in zip(batches, expected, strict=True):
        torch.testing.assert_close(real(output(model, batch), batch), real(before, batch), rtol=1e-4, atol=2e-5)
    probabilities, value = tuned.slots[0].delta.seen
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(probabilities.shape[:-1]))
    assert (
        probabilities.shape[1] == value.shape[1] == tuned.slots[0].site.heads
        and probabilities.shape[-1] == value.shape[-2]
    )
    tuned.check(batches[0])


def test_probabilities_are_those_of_the_model_itself() -> None:
    model, batch = toys.model("bert", attn_implementation="eager"), tiny.batch("bert")
    with torch.no_grad():
        expected = model(**batch, output_attentions=True).attentions
    tuned = pt.attach(model, inside(lambda site, keys: Watch()), train_head=False)
    output(model, batch)
    for slot, own in zip(tuned.slots, expected, strict=True):
        torch.testing.assert_close(slot.delta.seen[0], own)


def test_a_change_of_the_probabilities_is_that_change() -> None:
    class Uniform(Watch):
        def probabilities(self, probabilities: Tensor, value: Tensor) -> Tensor:
            return torch.full_like(probabilities, 1 / probabilities.shape[-1]) * self.gain

    model, batch = toys.model("vit"), tiny.batch("vit")
    hand = toys.model("vit")
    pt.attach(model, inside(lambda site, keys: Uniform()), train_head=False)
    for module in hand.modules():
        if hasattr(module, "q_proj") or hasattr(module, "query"):
            query = getattr(module, "q_proj", None) or module.query
            query.weight.data.zero_()  # all scores alike
            query.bias.data.zero_()
    torch.testing.assert_close(output(model, batch), output(hand, batch), rtol=1e-5, atol=1e-5)


def test_dropout_comes_after_the_probabilities_and_only_in_training() -> None:
    model, batch = toys.model("bert", attention_probs_dropout_prob=0.5), tiny.batch("bert")
    bare = output(model, batch)
    tuned = pt.attach(model, inside(lambda site, keys: Watch()), train_head=False)
    torch.testing.assert_close(output(model, batch), bare, rtol=1e-5, atol=1e-5)
    model.train()
    assert not torch.allclose(output(model, batch), bare, atol=1e-3)
    torch.testing.assert_close(tuned.slots[0].delta.seen[0].sum(-1), torch.ones(2, 4, 7))


# ------------------------------------------------------------------------------------------------------- a bias on the scores


class Biased(AttentionDelta):
    """Adds `slope` times its place to the score of each key."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.3))

    def score_bias(self, query: Tensor, key: Tensor) -> Tensor:
        return (self.slope * torch.arange(key.shape[2], device=key.device))[None, None, None]


class Tilted(Watch):
    """The same after softmax: probabilities times the exponential of the bias, brought back to a sum of 1."""

    def probabilities(self, probabilities: Tensor, value: Tensor) -> Tensor:
        tilted = probabilities * (0.3 * torch.arange(probabilities.shape[-1])).exp() * self.gain
        return tilted / tilted.sum(-1, keepdim=True).clamp_min(1e-30)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "vit", "t5", "bart"])
def test_a_bias_on_the_scores_tilts_the_probabilities(family: str, kernel: str) -> None:
    """With grouped queries, position biases, masks and causal attention without a mask."""
    models = [toys.model(family, attn_implementation=kernel) for _ in range(2)]
    tuned = [
        pt.attach(model, inside(lambda site, keys, make=make: make()), train_head=False)  # type: ignore[misc]
        for model, make in zip(models, (Biased, Tilted), strict=True)
    ]
    whole = tiny.batch(family)
    for batch in (whole, left_padded(family), {k: v for k, v in whole.items() if k != "attention_mask"}):
        found, expected = (real(output(model, batch), batch) for model in models)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
    tuned[0].check(whole)


def test_a_bias_on_the_scores_is_that_of_its_rows_and_follows_extra_keys() -> None:
    model, batch = toys.model("vit"), tiny.batch("vit")
    bare = output(model, batch)
    pt.attach(model, inside(lambda site, keys: Biased()), train_head=False)
    alone = output(model, batch)
    with pt.route(model, ["default", None]):
        torch.testing.assert_close(output(model, batch), torch.stack([alone[0], bare[1]]))
    found = []
    for kinds in ((Biased, Prefixed), (Prefixed, After)):
        model = toys.model("vit")
        pt.attach(model, [inside(lambda site, keys, kind=kind: kind()) for kind in kinds], train_head=False)  # type: ignore[misc]
        found.append(output(model, batch))
    torch.testing.assert_close(found[0], found[1])


class Prefixed(AttentionDelta):
    """Two keys and values of ones in front."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def keys_values(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        own = self.gain * key.new_ones(*key.shape[:2], 2, key.shape[3])
        return own, own


class After(Biased):
    """Knows that the first two keys are extra."""

    def score_bias(self, query: Tensor, key: Tensor) -> Tensor:
        return nn.functional.pad(super().score_bias(query, key[:, :, 2:]), (2, 0))


def test_a_mask_for_other_keys_is_refused() -> None:
    class Short(Biased):
        def score_bias(self, query: Tensor, key: Tensor) -> Tensor:
            return super().score_bias(query, key[:, :, 1:])

    model = toys.model("bert")
    pt.attach(model, inside(lambda site, keys: Short()), train_head=False)
    with pytest.raises(AttachError, match="mask for 7 keys"):
        output(model, {**tiny.batch("bert"), "attention_mask": torch.tensor([[1] * 7, [1] * 6 + [0]])})


# ----------------------------------------------------------------------------------------------------- extra keys and values


@pytest.mark.parametrize("family", FAMILIES)
def test_extra_keys_and_values_are_the_same_for_every_kernel(family: str) -> None:
    """Step by step, eager and sdpa, with padding on either side and without a mask."""
    found: dict[str, list[Tensor]] = {}
    for kernel in ("eager", "sdpa", "step by step"):
        model = toys.model(family, attn_implementation=kernel if kernel != "step by step" else "sdpa")
        batches = [
            tiny.batch(family),
            left_padded(family),
            {k: v for k, v in tiny.batch(family).items() if k != "attention_mask"},
        ]
        bare = [output(model, batch) for batch in batches]

        def make(site: Any, keys: Any, explicit: bool = kernel == "step by step") -> AttentionDelta:
            delta = Prepended(3, keys.out_features)
            delta.needs_probabilities = explicit
            return delta

        pt.attach(model, inside(make), train_head=False)
        found[kernel] = [real(output(model, batch), batch) for batch in batches]
        for changed, before, batch in zip(found[kernel], bare, batches, strict=True):
            assert not torch.allclose(changed, real(before, batch), atol=1e-3)
    for kernel in ("sdpa", "step by step"):
        for one, other in zip(found[kernel], found["eager"], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


def test_extra_keys_and_values_by_hand() -> None:
    """softmax(q [P; K]ᵀ / √d) [P; V] in every block of a small encoder, with nothing of petiole in it."""
    model, batch = toys.model("bert"), tiny.batch("bert")
    hand = toys.model("bert")
    tuned = pt.attach(model, inside(lambda site, keys: Prepended(3, keys.out_features)), train_head=False)
    mask = batch["attention_mask"].bool()[:, None, None]
    for layer, slot in zip(hand.bert.encoder.layer, tuned.slots, strict=True):

        def forward(
            h: Tensor, *args: Any, own: nn.Module = layer.attention.self, delta: Any = slot.delta, **kwargs: Any
        ) -> Any:
            split = lambda x: x.unflatten(-1, (4, 8)).transpose(1, 2)  # noqa: E731
            q, k, v = (split(linear(h)) for linear in (own.query, own.key, own.value))
            k = torch.cat([split(delta.key[None]).expand(2, -1, -1, -1), k], 2)
            v = torch.cat([split(delta.value[None]).expand(2, -1, -1, -1), v], 2)
            seen = torch.cat([torch.ones(2, 1, 1, 3, dtype=torch.bool), mask], -1)
            scores = (q @ k.transpose(2, 3) / 8**0.5).masked_fill(~seen, -torch.inf)
            return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2), None

        layer.attention.self.forward = forward
    torch.testing.assert_close(output(model, batch), output(hand, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_extra_keys_let_no_later_token_through(family: str, kernel: str) -> None:
    """They stand before the first position, where a mask that counts from the front would be off by their number."""
    model, batch = toys.model(family, attn_implementation=kernel), tiny.batch(family)
    bare = output(model, batch)
    pt.attach(model, inside(lambda site, keys: Prepended(5, keys.out_features)), train_head=False)
    changed, other = output(model, batch), output(model, {**batch, **shorter(batch, family)})
    assert not torch.allclose(changed, bare, atol=1e-3)
    length = changed.shape[1]
    assert torch.equal(changed[:, : length - 2], other[:, : length - 2]), "a later token reached an earlier one"
    assert not torch.allclose(changed[:, length - 1], other[:, length - 1], atol=1e-4)


def shorter(batch: dict[str, Any], family: str) -> dict[str, Any]:
    """The batch with another last token of what is decoded."""
    name = "labels" if family == "t5" else "input_ids"
    changed = batch[name].clone()
    changed[:, -2] = (changed[:, -2] + 1) % tiny.VOCABULARY
    return {name: changed}


def test_two_deltas_with_keys_in_one_attention() -> None:
    model, batch = toys.model("llama"), tiny.batch("llama")
    both = pt.attach(model, [inside(lambda site, keys: Prepended(2, keys.out_features)) for _ in range(2)])
    together = output(model, batch)
    lone = toys.model("llama")
    single = pt.attach(lone, inside(lambda site, keys: Prepended(4, keys.out_features)))
    with torch.no_grad():
        for slot in single.slots:
            parts = [s.delta for s in both.slots if s.site.key == slot.site.key]
            slot.delta.key.copy_(torch.cat([part.key for part in parts]))
            slot.delta.value.copy_(torch.cat([part.value for part in parts]))
    torch.testing.assert_close(together, output(lone, batch), rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_before_the_output_projection(family: str) -> None:
    """Scaled by two: the same as an output projection of twice the size."""
    model, batch = toys.model(family), tiny.batch(family)
    hand = toys.model(family)
    tuned = pt.attach(model, inside(lambda site, keys: Heads(2.0)), train_head=False)
    with torch.no_grad():
        for slot in tuned.slots:
            hand.get_submodule(slot.site.exit).weight.mul_(2.0)
    torch.testing.assert_close(output(model, batch), output(hand, batch), rtol=1e-4, atol=1e-5)


class Anew(Heads):
    """Attention from its parts: what it was given, where nothing is masked."""

    def heads_output(self, output: Tensor, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        each = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(each, 1), value.repeat_interleave(each, 1)
        return ((query @ key.mT * scaling).softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize(
    ("family", "stack"), [("vit", "encoder"), ("t5", "encoder"), ("bert", "encoder"), ("whisper", "encoder")]
)
def test_heads_are_told_how_scores_are_scaled(family: str, stack: str) -> None:
    model = toys.model(family)
    batch = {k: v for k, v in tiny.batch(family).items() if k != "attention_mask"}
    if family == "t5":  # whose positions are added to the scores
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.mul_("relative_attention_bias" not in name)
    expected = output(model, batch)
    pt.attach(
        model, toys.method(lambda a: [Place(site, Anew(1.0)) for site in a.attentions(stack=stack)]), train_head=False
    )
    torch.testing.assert_close(output(model, batch), expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------- implementations, refusals


def test_the_configuration_comes_back() -> None:
    model = toys.model("t5")
    configs = [m.config for m in model.modules() if hasattr(m, "config")]
    before = [config._attn_implementation for config in configs]
    first_, second = (pt.attach(model, inside(lambda site, keys: Heads()), name=name) for name in "ab")
    assert {c._attn_implementation for c in configs} != set(before)
    first_.detach()
    second.detach()
    assert [config._attn_implementation for config in configs] == before


def test_another_implementation_chosen_meanwhile_is_served_too() -> None:
    """What is attached inside attention was left out of it, silently."""
    model, batch = toys.model("llama", attn_implementation="sdpa"), tiny.batch("llama")
    tuned = pt.attach(model, inside(lambda site, keys: Prepended(3, keys.out_features)))
    expected = output(model, batch)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(real(output(model, batch), batch), real(expected, batch), rtol=1e-4, atol=1e-5)
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(AttachError, match="fused kernel that hides what is attached"):
        output(model, batch)
    model.set_attn_implementation("eager")
    tuned.detach()
    assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {"eager"}


def test_a_model_with_it_can_be_saved_and_read(tmp_path: Any) -> None:
    """Its configuration must not name a function that only petiole knows."""
    model = toys.model("llama")
    pt.attach(model, inside(lambda site, keys: Heads()))
    model.config.save_pretrained(tmp_path)
    assert "petiole" not in (tmp_path / "config.json").read_text()
    assert "petiole" not in str(model.config.to_dict())


def test_a_fused_kernel_is_refused() -> None:
    model = toys.model("llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    before = toys.snapshot(model)
    with pytest.raises(AttachError, match=r"fused kernel.*\n.*attn_implementation='sdpa' or 'eager'"):
        pt.attach(model, inside(lambda site, keys: Heads()))
    assert toys.snapshot(model) == before


@pytest.mark.parametrize("family", ["gpt_oss"])
def test_what_only_the_models_own_kernel_does_is_refused(family: str) -> None:
    """Attention sinks: step by step they would be left out."""
    model, batch = toys.model(family), tiny.batch(family)
    pt.attach(model, inside(lambda site, keys: Watch()))
    with pytest.raises(AttachError, match="s_aux"):
        output(model, batch)


@pytest.mark.parametrize("family", ["llama", "t5", "gpt2"])
def test_gradients_reach_what_is_inside(family: str) -> None:
    model, batch = toys.model(family), tiny.batch(family)
    tuned = pt.attach(
        model,
        [inside(lambda s, k: Prepended(2, k.out_features)), inside(lambda s, k: Watch()), inside(lambda s, k: Heads())],
    )
    tuned.check(batch)
    shake(tuned)
    parameter = next(tuned.parameters())
    found = torch.autograd.grad(first(model(**batch)).square().sum(), parameter)[0]
    flat = int(found.abs().argmax())
    values = []
    for step in (1e-2, -1e-2):
        with torch.no_grad():
            parameter.view(-1)[flat] += step
            values.append(float(first(model(**batch)).double().square().sum()))
            parameter.view(-1)[flat] -= step
    assert (values[0] - values[1]) / 2e-2 == pytest.approx(float(found.view(-1)[flat]), rel=0.05)
