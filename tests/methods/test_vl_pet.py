"""What VL-PET must hold, by its paper."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petiole as pt
import tiny
import toys
from petiole.errors import AttachError, ConfigError
from petiole.methods.adapters.gates import Large, MiddleX, MiddleY
from petiole.methods.adapters.vl_pet import Gated, Values
from petiole.tasks.vision_language import VisionLanguageModel, with_visual_tokens

GRANULARITIES = ("large", "middle_x", "middle_y", "small")
D = 32
SMALL: dict[str, Any] = {"bottleneck": 8, "num_heads": 4, "decoder_bottleneck": 4}


def made(**fields: Any) -> pt.VLPET:
    return pt.VLPET(**{**SMALL, **fields})


def attached(family: str = "bart", shaken: bool = True, **fields: Any) -> tuple[nn.Module, pt.Adaptation]:
    """In double precision."""
    model = toys.model(family).double()
    tuned = pt.attach(model, made(**fields))
    for slot in tuned.slots:
        slot.delta.double()
    if shaken:
        toys.shake(tuned)
    return model, tuned


def of_kind(tuned: pt.Adaptation, kind: type) -> list[Any]:
    return [slot for slot in tuned.slots if isinstance(slot.delta, kind)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gelu(x: Tensor) -> Tensor:
    return nn.functional.gelu(x, approximate="tanh")


def changed(delta: Gated, h: Tensor) -> Tensor:
    """h', written out."""
    return h + gelu(h @ delta.down.weight.T + delta.down.bias) @ delta.up.weight.T + delta.up.bias


# --------------------------------------------------------------------------------------------------------------------- counts


def bart_base() -> VisionLanguageModel:
    """With 200 new tokens, and visual features of 2048."""
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        d_model=768, encoder_layers=6, decoder_layers=6, encoder_attention_heads=12, decoder_attention_heads=12,
        encoder_ffn_dim=3072, decoder_ffn_dim=3072,
    )  # fmt: skip
    with torch.device("meta"):
        backbone = BartForConditionalGeneration(config)
        assert sum(p.numel() for p in backbone.parameters()) == 139_420_416
        return VisionLanguageModel(with_visual_tokens(backbone, 200), 2048)


@pytest.mark.parametrize(
    ("granularity", "gates"),
    [("small", 18_444), ("middle_x", 9_228), ("middle_y", 9_216), ("large", 1_779_840)],
)
def test_counts_of_the_paper(granularity: str, gates: int) -> None:
    model = bart_base()
    assert sum(p.numel() for p in model.backbone.parameters()) == 139_574_016
    tuned = pt.attach(model, pt.VLPET.preset("bart_image", granularity=granularity))
    encoder, decoder = of_kind(tuned, Gated), of_kind(tuned, Values)
    count = lambda modules: sum(p.numel() for module in modules for p in module.parameters())  # noqa: E731
    assert (len(encoder), len(decoder)) == (12, 6)
    assert count(slot.delta.gate for slot in encoder) == gates
    assert count(m for slot in encoder for m in (slot.delta.down, slot.delta.up)) == 12 * 148_320 == 1_779_840
    assert count(slot.delta for slot in decoder) == 889_920
    assert sum(t.numel() for name, t in model.named_parameters() if name in tuned.own) == 13 * 1_536 == 19_968
    embedding = sum(p.numel() for p in copy.deepcopy(bart_base().visual_embedding).parameters())
    assert embedding == 1_582_848
    assert tuned.trainable == 1_779_840 + 889_920 + gates + 19_968 + embedding
    if granularity == "small":
        assert tuned.trainable == 4_291_020
    whole = 139_574_016 + tuned.trainable - 19_968
    if granularity == "small":
        assert whole == 143_845_068
    if granularity != "large":
        assert round(100 * tuned.trainable / whole, 2) == 2.98


def test_t5_takes_wider_adapters() -> None:
    method = pt.VLPET.preset("t5_image")
    assert (method.bottleneck, method.scale, method.decoder_bottleneck) == (192, 0.3, 96)
    tuned = pt.attach(toys.model("t5"), method)
    first = of_kind(tuned, Gated)[0].delta
    assert first.gate.down.out_features == 192
    seconds = [m.up for slot in of_kind(tuned, Gated) for m in (slot.delta, slot.delta.gate)]
    seconds += [slot.delta.up for slot in of_kind(tuned, Values)]
    assert not any(bool(p.any()) for m in seconds for p in m.parameters())
    assert {name for name in tuned.own if "layer_norm" not in name} == set()
    assert any("encoder.final_layer_norm" in name for name in tuned.own)


# ------------------------------------------------------------------------------------------------------------------- formulas


def test_heads_of_the_first_projection_are_one_linear() -> None:
    _, tuned = attached()
    delta, h = of_kind(tuned, Gated)[0].delta, random(2, 5, D)
    heads = [h @ W.T + b for W, b in zip(delta.down.weight.chunk(4), delta.down.bias.chunk(4), strict=True)]
    torch.testing.assert_close(torch.cat(heads, -1), delta.down(h), rtol=1e-6, atol=1e-6)


def test_heads_of_the_second_projection_are_one_linear_and_paired_heads_are_not() -> None:
    _, tuned = attached(head_mode="paired")
    delta, h = of_kind(tuned, Gated)[0].delta, random(2, 5, D)
    z = gelu(delta.down(h))
    wanted = (
        torch.cat([part @ W.T for part, W in zip(z.chunk(4, -1), delta.up.weight, strict=True)], -1) + delta.up.bias
    )
    torch.testing.assert_close(delta.up(z), wanted)
    whole = torch.block_diag(*delta.up.weight)  # paired heads are one linear too, with blocks of zeros
    torch.testing.assert_close(delta.up(z), z @ whole.T + delta.up.bias)
    same = [of_kind(attached(head_mode=mode)[1], Gated)[0].delta(h, h) for mode in ("down", "up", "down_up")]
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])
    count = {mode: attached(head_mode=mode, train_encoder_norms=False)[1].trainable for mode in ("down", "paired")}
    assert count["down"] - count["paired"] == 4 * (D * 8 - D * 8 // 4)  # 4 sites


@pytest.mark.parametrize("control", ["multiply", "add"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_formula_of_each_granularity(granularity: str, control: str) -> None:
    _, tuned = attached(granularity=granularity, scale=0.7, control=control)
    delta, x, h = of_kind(tuned, Gated)[1].delta, random(2, 5, D), random(2, 5, D, seed=1)
    v, g = changed(delta, h), delta.gate
    if isinstance(g, Large):
        G = torch.sigmoid(gelu(x @ g.down.weight.T + g.down.bias) @ g.up.weight.T + g.up.bias)
    elif isinstance(g, MiddleX):
        G = torch.sigmoid((x + v) @ g.linear.weight.T + g.linear.bias)
    elif isinstance(g, MiddleY):
        G = 1 + g.gain
    else:
        G = torch.sigmoid(torch.cat([x, v], -1) @ g.linear.weight.T + g.linear.bias).mean(1, keepdim=True)
    shapes = {"large": (2, 5, D), "middle_x": (2, 5, 1), "middle_y": (D,), "small": (2, 1, 1)}
    assert g(x, v, None).shape == G.shape == shapes[granularity]
    torch.testing.assert_close(delta(x, h), 0.7 * (G * v if control == "multiply" else v + G))
    if control == "multiply":  # the gate is not for the change alone
        assert not torch.allclose(delta(x, h), h + 0.7 * G * (v - h), atol=0.1)


@pytest.mark.parametrize("gate", ["full_rank", "layer_norm", "l2"])
def test_the_formula_of_other_gates(gate: str) -> None:
    _, tuned = attached(gate=gate, scale=0.7)
    delta, x, h = of_kind(tuned, Gated)[0].delta, random(2, 5, D), random(2, 5, D, seed=1)
    v = changed(delta, h)
    if gate == "full_rank":
        wanted = torch.sigmoid(delta.gate.linear(x)) * v
    elif gate == "layer_norm":
        centred = v - v.mean(-1, keepdim=True)
        normal = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        wanted = normal * delta.gate.norm.weight + delta.gate.norm.bias
    else:
        wanted = v / v.square().sum(-1, keepdim=True).sqrt()
    torch.testing.assert_close(delta(x, h), 0.7 * wanted)


def test_where_nothing_changes_and_where_half_is_left() -> None:
    model, tuned = attached(shaken=False, granularity="middle_y", zero_init_up=True)
    bare, batch = toys.model("bart").double(), tiny.batch("bart")
    with torch.no_grad():
        for slot in of_kind(tuned, Gated):
            slot.delta.gate.gain.zero_()
    assert torch.equal(toys.output(model, batch), toys.output(bare, batch))
    _, tuned = attached(shaken=False, scale=0.8, zero_init_up=True)
    x, h = random(2, 5, D), random(2, 5, D, seed=1)
    assert torch.equal(of_kind(tuned, Gated)[0].delta(x, h), 0.8 * (0.5 * h))


def test_all_starts_as_linears_of_torch_do() -> None:
    tuned = pt.attach(toys.model("bart", d_model=64), made(bottleneck=64, decoder_bottleneck=64))
    for slot in of_kind(tuned, Gated) + of_kind(tuned, Values):
        for linear in (m for m in slot.delta.modules() if isinstance(m, nn.Linear)):
            bound = linear.in_features**-0.5
            for parameter in linear.parameters():
                assert float(parameter.abs().max()) <= bound
                assert abs(float(parameter.std()) * 3**0.5 / bound - 1) < 0.3
    gain = of_kind(pt.attach(toys.model("bart"), made(granularity="middle_y")), Gated)[0].delta.gate.gain
    assert 0 < float(gain.std()) < 0.05


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_the_gate_reads_the_stream_that_is_added(family: str) -> None:
    """What the residual adds: of T5 before its norm, of BART the sub-layer's input."""
    model, tuned = attached(family, granularity="middle_x")
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    handles = [
        slot.delta.register_forward_hook(lambda m, args, y: seen.append((*args, y))) for slot in of_kind(tuned, Gated)
    ]
    encoder = model.get_encoder()
    blocks = encoder.block if family == "t5" else encoder.layers
    states: list[Tensor] = []
    handles += [
        b.register_forward_hook(lambda m, args, y: states.append(y[0] if isinstance(y, tuple) else y)) for b in blocks
    ]
    first: list[Tensor] = []
    handles.append(blocks[0].register_forward_pre_hook(lambda m, args: first.append(args[0])))
    model(**tiny.batch(family))
    for handle in handles:
        handle.remove()
    h = first[0]
    for depth, block in enumerate(blocks):
        for part, (x, _, y) in enumerate(seen[2 * depth : 2 * depth + 2]):
            torch.testing.assert_close(x, h)
            h = x + y
            if family == "bart":
                h = (block.self_attn_layer_norm, block.final_layer_norm)[part](h)
        torch.testing.assert_close(h, states[depth])


# ----------------------------------------------------------------------------------------------------------------------- small


def test_a_small_gate_does_not_know_the_order_of_tokens() -> None:
    _, tuned = attached(granularity="small")
    delta, x, h = of_kind(tuned, Gated)[0].delta, random(2, 5, D), random(2, 5, D, seed=1)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(delta(x[:, order], h[:, order]), delta(x, h)[:, order])


@pytest.mark.parametrize("family", ["bart", "t5", "bert"])
def test_padding_changes_nothing(family: str) -> None:
    model, _ = attached(family, granularity="small")
    batch = tiny.batch(family)
    batch.pop("labels", None)
    decoder = (
        {} if family == "bert" else {"decoder_input_ids": batch.pop("decoder_input_ids", torch.tensor([[1, 4]] * 2))}
    )
    pad = torch.zeros(2, 4, dtype=torch.long)
    longer = {name: torch.cat([batch[name], pad], 1) for name in ("input_ids", "attention_mask")}
    one, other = toys.output(model, {**batch, **decoder}), toys.output(model, {**batch, **longer, **decoder})
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # without the mask it would not be so
        site = next(iter(pt.adaptations(model).values())).slots[0]
        x = random(2, 11, D)
        gate = site.delta.gate
        assert not torch.allclose(gate(x, x, longer["attention_mask"].bool()), gate(x, x, None), atol=1e-4)


def test_padding_changes_nothing_behind_images_and_in_generation() -> None:
    model = VisionLanguageModel(with_visual_tokens(toys.model("bart"), 3), 5, visual_tokens=3).eval()
    toys.shake(pt.attach(model, made(granularity="small")))
    batch = tiny.batch("bart")
    labels = batch.pop("labels")
    generator = torch.Generator().manual_seed(0)
    images = {
        "image_features": torch.randn(2, 2, 3, 5, generator=generator),
        "image_boxes": torch.rand(3, 4, generator=generator),
    }
    pad = torch.zeros(2, 4, dtype=torch.long)
    longer = {name: torch.cat([batch[name], pad], 1) for name in ("input_ids", "attention_mask")}
    decoder = {"decoder_input_ids": labels.clamp_min(1)}
    expected = model(**batch, **images, **decoder).logits
    torch.testing.assert_close(model(**longer, **images, **decoder).logits, expected, rtol=1e-5, atol=1e-5)
    alone = model(
        **{k: v[:1] for k, v in {**batch, **decoder}.items()},
        image_features=images["image_features"][:1],
        image_boxes=images["image_boxes"],
    )
    torch.testing.assert_close(alone.logits, expected[:1], rtol=1e-5, atol=1e-5)
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 2, "do_sample": False}
    answers = model.generate(**batch, **images, **options)
    assert torch.equal(model.generate(**longer, **images, **options), answers)
    assert torch.equal(model.generate(**batch, **images, **options, use_cache=False), answers)


def test_a_small_gate_knows_padding_when_blocks_are_computed_again() -> None:
    gradients = []
    for again in (False, True):
        model, tuned = attached(granularity="small")
        if again:
            model.gradient_checkpointing_enable()
        model.train()
        model(**tiny.batch("bart")).loss.backward()
        gradients.append([p.grad for p in tuned.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_a_small_gate_compiles() -> None:
    torch._dynamo.reset()
    model, _ = attached("bert", granularity="small")
    batch = {k: v for k, v in tiny.batch("bert").items() if k != "labels"}
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(toys.output(compiled, batch), toys.output(model, batch))
    torch._dynamo.reset()


# -------------------------------------------------------------------------------------------------------- what trains, and where


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_gradients_are_where_the_paper_trains(granularity: str) -> None:
    model, tuned = attached(granularity=granularity)
    model(**tiny.batch("bart")).loss.backward()
    graded = {name for name, p in model.named_parameters() if p.grad is not None}
    deltas = {name for name in graded if "petiole" in name}
    assert all(p.grad is not None for p in tuned.parameters())
    assert all(".encoder." in name or "encoder_attn.v_proj" in name for name in deltas)
    own = graded - deltas
    assert own == set(tuned.own) and all(name.startswith("model.encoder.") and "norm" in name for name in own)
    assert len(own) == 2 * (2 * 2 + 1)  # weight and bias, of two norms in each block and that of the embeddings
    for name, parameter in model.named_parameters():
        if "decoder" in name and "norm" in name:
            assert parameter.grad is None, name


def test_only_values_of_cross_attention_change() -> None:
    model, tuned = attached(zero_init_up=True, shaken=False)
    places = [(slot.site.key, slot.site.side) for slot in of_kind(tuned, Values)]
    assert places == [(f"decoder.{depth}.cross_attention.v", "output") for depth in range(2)]
    attention, h, E = model.model.decoder.layers[0].encoder_attn, random(2, 3, D), random(2, 5, D, seed=1)
    model.set_attn_implementation("eager")

    def seen() -> tuple[Tensor, Tensor]:
        output, probabilities = attention(h, key_value_states=E)
        return output, probabilities

    before = seen()
    optimizer = torch.optim.SGD(tuned.parameters(), lr=1.0)
    model(**tiny.batch("bart")).loss.backward()
    optimizer.step()
    after = seen()
    assert torch.equal(before[1], after[1]) and not torch.equal(before[0], after[0])
    delta = of_kind(tuned, Values)[0].delta
    wanted = nn.functional.linear(E, attention.v_proj.weight, attention.v_proj.bias) + delta.up(gelu(delta.down(E)))
    torch.testing.assert_close(attention.v_proj(E), wanted)


def test_values_are_computed_once_for_each_source() -> None:
    model, tuned = attached()
    calls = []
    for slot in of_kind(tuned, Values):
        slot.delta.register_forward_hook(lambda *_: calls.append(1))
    batch = {k: v for k, v in tiny.batch("bart").items() if k != "labels"}
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 2, "do_sample": False}
    cached = model.generate(**batch, **options)
    assert len(calls) == 2  # layers
    assert torch.equal(model.generate(**batch, **options, use_cache=False), cached) and len(calls) > 2


def test_half_precision_does_not_overflow_in_a_stream_without_norms() -> None:
    _, tuned = attached("t5")
    delta = of_kind(tuned, Gated)[0].delta.float()
    x, h = 6e4 * random(2, 5, D).half().clamp(-1, 1), random(2, 5, D, seed=1).half()
    with torch.autocast("cpu", dtype=torch.float16):
        found = delta(x, h)
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found.float(), delta(x.float(), h.float()), rtol=2e-2, atol=2e-2)


# --------------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bottleneck": 90}, "num_heads = 4 do not divide it"),
        ({"scale": 0.0}, "greater than 0"),
        ({"scale": -1.0}, "greater than 0"),
        ({"bottleneck": -4}, "greater than or equal to 1"),
        ({"decoder_bottleneck": -1}, "greater than or equal to 1"),
        ({"gate_rank": 0}, "greater than or equal to 1"),
        ({"gate": "full_rank", "granularity": "small"}, "no granularity 'small'"),
        ({"gate": "l2", "control": "add"}, "leaves no G"),
    ],
)
def test_fields_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        pt.VLPET(**fields)
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize("fields", [{"granularity": "small"}, {"gate": "full_rank"}])
def test_a_rank_that_no_gate_has_is_warned_about(fields: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="gate_rank = 8"):
        pt.VLPET(gate_rank=8, **fields)


@pytest.mark.parametrize("mode", ["up", "down_up", "paired"])
def test_heads_must_divide_the_width(mode: str) -> None:
    with pytest.raises(AttachError, match="3 do not divide"):
        pt.attach(toys.model("bart"), made(bottleneck=6, num_heads=3, head_mode=mode))
    pt.attach(toys.model("bart"), made(bottleneck=6, num_heads=3, head_mode="down"))


def test_a_decoder_alone_has_no_values_to_adapt() -> None:
    with pytest.raises(AttachError, match="decoder_bottleneck=None"):
        pt.attach(toys.model("llama"), made())
    model = toys.model("llama")
    tuned = pt.attach(model, made(decoder_bottleneck=None))
    assert len(of_kind(tuned, Gated)) == 4 and not of_kind(tuned, Values)
    with pytest.raises(AttachError, match="would see later tokens"):
        pt.attach(toys.model("llama"), made(decoder_bottleneck=None, granularity="small"))


def test_decoders_can_be_left_alone() -> None:
    tuned = pt.attach(toys.model("bart"), made(decoder_bottleneck=None))
    assert {slot.site.stack for slot in tuned.slots} == {"encoder"}
    only = pt.attach(toys.model("bart"), made(stack="decoder"))
    assert {type(slot.delta) for slot in only.slots} == {Values} and not only.own


def test_windows_do_not_fit_the_stream() -> None:
    with pytest.raises(AttachError, match="gates that read the residual stream"):
        pt.attach(toys.model("swin"), made())
