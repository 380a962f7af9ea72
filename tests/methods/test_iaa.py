"""What IAA must hold, by its paper."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import petiole as pt
import tiny
import toys
from petiole.errors import AttachError, ConfigError
from petiole.methods.adapters.bottleneck import Bottleneck
from petiole.tasks.retrieval import BiEncoderLoss, CrossEncoderLoss, check_towers

CONNECT = ("sublayer", "layer", "model")
D = 32


def bert(layers: int = 2) -> BertModel:
    """Small, in double precision."""
    config = BertConfig(
        hidden_size=D,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=50,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertModel(config, add_pooling_layer=False).double().eval()


def tokens(rows: int = 2, length: int = 6) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(50, (rows, length), generator=torch.Generator().manual_seed(0))}


def shaken(model: nn.Module, method: pt.Method) -> pt.Adaptation:
    tuned = pt.attach(model, method)
    for slot in tuned.slots:
        slot.delta.double()
    toys.shake(tuned, 0.2)
    return tuned


def asides(tuned: pt.Adaptation) -> list[Bottleneck]:
    """The aside modules, in the order of execution."""
    return [s.delta for s in tuned.slots if isinstance(s.delta, Bottleneck) and s.place.read is not None]


# ------------------------------------------------------------------------------------------------------------- must hold


@pytest.mark.parametrize("connect", CONNECT)
@pytest.mark.parametrize("inside", ["adapter", "lora", "prefix", "mam", "none"])
@pytest.mark.filterwarnings("ignore:iaa")
def test_the_aside_path_starts_at_nothing(connect: str, inside: str) -> None:
    model, batch = copy.deepcopy(toys.model("bert")), tiny.batch("bert")
    before = model(**batch).logits
    tuned = pt.attach(model, pt.IAA(connect=connect, inside=inside, r=4, aside_r=4))
    after = model(**batch).logits
    if inside in ("adapter", "lora", "none"):
        assert torch.equal(after, before)
    else:  # a prefix takes its share of attention at once, whatever is aside
        with torch.no_grad():
            for slot in tuned.slots:
                if isinstance(slot.delta, Bottleneck):
                    slot.delta.down.weight.zero_()
        assert torch.equal(model(**batch).logits, after) and not torch.equal(after, before)


@pytest.mark.parametrize(
    ("method", "count"),
    [
        (pt.IAA(connect="S", r=8, aside_r=8), 589_824),
        (pt.IAA(connect="M", r=15, aside_r=24), 589_824),
        (pt.IAA(connect="L", r=12, aside_r=12), 663_552),
        (pt.IAA(connect="S", r=100, aside_r=100), 7_372_800),
        (pt.IAA(connect="L", r=50, aside_r=300), 7_372_800),
        (pt.IAA(connect="M", r=160, aside_r=960), 7_372_800),
        (pt.IAA(connect="M", r=185, aside_r=960), 8_294_400),
    ],
)
def test_counts_of_the_paper(method: pt.Method, count: int) -> None:
    with torch.device("meta"):
        model = BertModel(BertConfig(), add_pooling_layer=False)
    assert pt.attach(model, method).trainable == count


@pytest.mark.parametrize("r", [16, 200])
def test_adapters_alone_count_as_in_the_paper(r: int) -> None:
    with torch.device("meta"):
        model = BertModel(BertConfig(), add_pooling_layer=False)
    tuned = pt.attach(model, pt.IAA(r=r, aside_r=1))
    assert tuned.trainable - 12 * 2 * 768 == {16: 589_824, 200: 7_372_800}[r]


@pytest.mark.filterwarnings("ignore:iaa")
def test_what_is_aside_is_added_after_the_norm() -> None:
    model = bert(1)
    (first, second) = asides(shaken(model, pt.IAA(connect="sublayer", inside="none", aside_r=4)))
    layer = model.encoder.layer[0]
    with torch.no_grad():
        for linear in (layer.attention.output.dense, layer.output.dense):
            linear.weight.zero_()
            linear.bias.zero_()
    x = torch.randn(2, 5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    h = nn.functional.layer_norm(x, (D,), *norm(layer.attention.output.LayerNorm)) + first(x)
    y = nn.functional.layer_norm(h, (D,), *norm(layer.output.LayerNorm)) + second(h)
    torch.testing.assert_close(layer(x), y)


def norm(module: nn.Module) -> tuple[Any, ...]:
    return module.weight, module.bias, module.eps


@pytest.mark.filterwarnings("ignore:iaa")
def test_the_second_path_and_the_ffn_read_the_connected_state() -> None:
    model = bert(1)
    layer = copy.deepcopy(model.encoder.layer[0])  # as it was
    first, second = asides(shaken(model, pt.IAA(connect="sublayer", inside="none", aside_r=4)))
    x = torch.randn(2, 5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    h = layer.attention(x)[0] + first(x)
    y = layer.output(layer.intermediate(h), h) + second(h)
    torch.testing.assert_close(model.encoder.layer[0](x), y)


def test_one_layer_is_the_whole_model() -> None:
    outputs = []
    for connect in ("layer", "model"):
        model = bert(1)
        tuned = shaken(model, pt.IAA(connect=connect, r=4, aside_r=4))
        for place in asides(tuned):
            for parameter in place.parameters():
                torch.nn.init.constant_(parameter, 0.05)
        outputs.append(model(**tokens()).last_hidden_state)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("connect", CONNECT)
def test_first_gradients_reach_the_second_projections_alone(connect: str) -> None:
    model, batch = bert(), tokens()
    tuned = pt.attach(model, pt.IAA(connect=connect, r=4, aside_r=4))
    for slot in tuned.slots:
        slot.delta.double()
    optimizer = torch.optim.SGD(tuned.parameters(), lr=0.1)
    target = torch.randn(2, 6, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for step in range(2):
        (model(**batch).last_hidden_state - target).square().sum().backward()
        for name, parameter in tuned.named_parameters():
            assert parameter.grad is not None
            zero = step == 0 and "down" in name.rpartition(":")[2]
            assert bool((parameter.grad == 0).all()) == zero, (step, name)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore:iaa")
@pytest.mark.parametrize("connect", ["layer", "none"])
def test_the_path_needs_no_frozen_sublayer(connect: str) -> None:
    """Detach what every frozen sub-layer gives: IAA-L passes a gradient to the first block's path, adapters alone have none."""
    model = bert(2)
    method = pt.IAA(connect="layer", r=4, aside_r=4)
    tuned = shaken(model, method)
    if connect == "none":
        with torch.no_grad():
            for place in asides(tuned):
                place.up.weight.zero_()
    for layer in model.encoder.layer:  # before what is added there: hooks act in the order in which they came
        layer.output.LayerNorm.register_forward_hook(lambda module, args, output: output.detach())
        layer.attention.output.LayerNorm.register_forward_hook(lambda module, args, output: output.detach())
    y = model(**tokens()).last_hidden_state
    (y * torch.linspace(-1, 1, D, dtype=torch.float64)).sum().backward()
    first = asides(tuned)[0].up.weight.grad
    assert first is not None
    assert bool(first.any()) == (connect == "layer")
    inside = [s.delta.up.weight.grad for s in tuned.slots if s.place.read is None]
    assert all(gradient is None for gradient in inside)


@pytest.mark.parametrize("connect", CONNECT)
def test_padding_changes_no_real_token(connect: str) -> None:
    model = bert()
    shaken(model, pt.IAA(connect=connect, r=4, aside_r=4))
    batch = tokens()
    wanted = model(**batch).last_hidden_state
    mask = torch.tensor([[1] * 6 + [0] * 3] * 2)
    for padding in (1, 7):
        padded = torch.cat([batch["input_ids"], torch.full((2, 3), padding)], 1)
        found = model(input_ids=padded, attention_mask=mask).last_hidden_state[:, :6]
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_model_path_keeps_its_gradient_under_checkpointing(reentrant: bool) -> None:
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = bert().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        tuned = shaken(model, pt.IAA(connect="model", r=4, aside_r=4))
        calls.append(0)

        def count(*_: Any) -> None:
            calls[-1] += 1

        model.encoder.layer[1].intermediate.register_forward_hook(count)
        model(**tokens()).last_hidden_state.square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in tuned.parameters() if p.grad is not None]))
    assert calls == [1, 2]
    torch.testing.assert_close(*gradients)


# -------------------------------------------------------------------------------------------------------- what is refused


def test_short_names_stand_for_long_ones() -> None:
    assert [pt.IAA(connect=short).connect for short in "SLM"] == list(CONNECT)
    for fields, message in (({"aside_r": 0}, "aside_r"), ({"connect": "X"}, "connect"), ({"r": 0}, "greater")):
        with pytest.raises(ConfigError, match=message):
            pt.IAA(**fields)


def test_sublayers_of_pre_norm_blocks_are_refused_and_named() -> None:
    with pytest.raises(AttachError, match="connect='layer'"):
        pt.attach(copy.deepcopy(toys.model("gpt2")), pt.IAA(connect="sublayer"))


def test_an_aside_path_alone_is_allowed_and_warned_of() -> None:
    with pytest.warns(UserWarning, match="connects nothing"):
        tuned = pt.attach(bert(), pt.IAA(inside="none", aside_r=4))
    assert tuned.trainable == 2 * 2 * D * 4


# ----------------------------------------------------------------------------------------------------------------- losses


def test_one_pair_has_no_loss_and_equal_pairs_a_logarithm() -> None:
    q = torch.randn(1, 8, generator=torch.Generator().manual_seed(0))
    assert float(BiEncoderLoss()(q, q)) == 0
    many = q.expand(5, 8)
    assert float(BiEncoderLoss()(many, many)) == pytest.approx(math.log(5), rel=1e-6)
    assert float(BiEncoderLoss(in_batch=False)(many, many)) == 0


@pytest.mark.parametrize("in_batch", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_bi_encoder_loss_by_hand(in_batch: bool, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    q, p, hard = (torch.randn(*shape, generator=generator) for shape in ((3, 4), (3, 4), (3, 2, 4)))
    wanted = []
    for i in range(3):
        others = [*p, *hard.flatten(0, 1)] if in_batch else [p[i], *hard[i]]
        total = sum(math.exp(float(q[i] @ other) / temperature) for other in others)
        wanted.append(-math.log(math.exp(float(q[i] @ p[i]) / temperature) / total))
    loss = BiEncoderLoss(temperature, in_batch)(q, p, hard)
    assert float(loss) == pytest.approx(sum(wanted) / 3, rel=1e-5)


def test_half_precision_products_do_not_overflow() -> None:
    q = torch.full((2, 768), 12.0, dtype=torch.float16)  # a product of 110,592
    p = torch.stack([q[0], -q[1]])
    loss = BiEncoderLoss()(q, p)
    assert loss.dtype == torch.float32 and float(loss) == pytest.approx(110_592, rel=1e-3)


def test_cross_encoder_loss_by_hand() -> None:
    scores = torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 0.5]])
    first = -scores[0].log_softmax(0)[0]
    assert float(CrossEncoderLoss()(scores)) == pytest.approx(float(first - scores[1].log_softmax(0)[0]) / 2)
    assert float(CrossEncoderLoss()(scores, torch.tensor([0, 1]))) == pytest.approx(
        float(first - scores[1].log_softmax(0)[1]) / 2
    )


def test_losses_refuse_what_does_not_fit() -> None:
    q = torch.zeros(2, 4)
    for call in (
        lambda: BiEncoderLoss(temperature=0.0),
        lambda: BiEncoderLoss()(q, torch.zeros(3, 4)),
        lambda: BiEncoderLoss()(q, q, torch.zeros(2, 4)),
        lambda: CrossEncoderLoss()(torch.zeros(3)),
    ):
        with pytest.raises(ConfigError):
            call()


def test_towers_with_other_modules_are_refused_unless_asked_for() -> None:
    one, other = bert(), bert()
    pt.attach(one, pt.IAA())
    with pytest.raises(AttachError, match="allow_different"):
        check_towers(one, other)
    check_towers(one, other, allow_different=True)
    check_towers(one, one)
    pt.attach(other, pt.IAA())
    check_towers(one, other)
