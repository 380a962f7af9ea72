"""What LST must hold, by the numbers of its specification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import petiole as pt
import tiny
import toys
from beside import assert_cached_alike, assert_cost_is_predicted, assert_refused
from linears import set_
from petiole.errors import AttachError, ConfigError, TrainingError
from petiole.methods.side.lst import Ladder
from petiole.methods.side.pruning import fisher, keep
from petiole.training import parameter_groups

FAMILIES = ("t5", "bart", "bert", "vit", "llama", "gpt2")


def attached(name: str, model: nn.Module | None = None, **fields: Any) -> tuple[nn.Module, pt.Adaptation]:
    """Narrower by 4, from the largest weights."""
    model = toys.model(name) if model is None else model
    tuned = pt.attach(model, pt.LST(**{"reduction_factor": 4, "init": "magnitude", **fields}), train_head=False)
    return model, tuned


def ladders(tuned: pt.Adaptation) -> list[Ladder]:
    return [slot.delta for slot in tuned.slots if isinstance(slot.delta, Ladder)]


# 1
@pytest.mark.parametrize("name,asked", [*((name, False) for name in FAMILIES), ("t5", True), ("llama", True)])
def test_nothing_of_the_backbone_is_saved_but_what_ladders_read(name: str, asked: bool) -> None:
    other = {"n_inner": 64} if name == "gpt2" else {}  # so that no side tensor is as wide as the backbone
    model, tuned = attached(name, tiny.model(name, **other))
    if asked:
        model.enable_input_require_grads()
    read: set[int] = set()

    def look(ladder: nn.Module, args: Any) -> None:
        read.update(h.data_ptr() for h in args[0])
        assert not any(h.requires_grad for h in (*args[0], args[2]))

    for ladder in ladders(tuned):
        ladder.register_forward_pre_hook(look)
    (up,) = (ladder.up for ladder in ladders(tuned) if ladder.up is not None)
    up.register_forward_hook(lambda m, args, y: after.append(len(wide)))
    own = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    wide: list[Tensor] = []
    after: list[int] = []  # what is saved later belongs to the head

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape[-1:] == (32,) and tensor.data_ptr() not in read | own:
            wide.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.train()(**tiny.batch(name)).loss
    assert read
    assert after == [0], f"saved before the head: {[t.shape for t in wide]}"
    loss.backward()
    names = {id(p) for p in tuned.parameters()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in names)


# 2
def test_the_papers_count() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    with torch.device("meta"):
        model = T5ForConditionalGeneration(T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12))
    backbone = sum(p.numel() for p in model.parameters())
    tuned = pt.attach(model, pt.LST(side_layers=(1, 2, 3, 5, 6, 7, 9, 10, 11)))
    assert backbone == 222_903_552
    assert tuned.trainable == 3_878_712
    assert round(100 * tuned.trainable / backbone, 2) == 1.74


@pytest.mark.parametrize("kept", [(0, 1, 2), (1,), (0, 2)])
def test_the_counts_formula(kept: tuple[int, ...]) -> None:
    model = tiny.model("t5", num_layers=3)
    _, tuned = attached("t5", model, side_layers=kept)
    d, r, f, inner, heads, buckets, n = 32, 4, 64, 32, 4, 32, len(kept)
    s = d // r
    encoder = n * (4 * s * inner // r + 2 * s * f // r + 2 * s)
    decoder = n * (8 * s * inner // r + 2 * s * f // r + 3 * s)
    each = (n + 1) * (d * s + s) + 3 + buckets * heads + s
    assert tuned.trainable == encoder + decoder + 2 * each + s * d + d


# 3
def test_gates_start_half_open_and_move_ten_times_as_fast() -> None:
    _, tuned = attached("bert")
    (ladder,) = ladders(tuned)
    mu = ladder.open(ladder.gates)
    assert torch.equal(mu, torch.full((2,), 0.5))
    (slope,) = torch.autograd.grad(mu.sum(), ladder.gates)
    torch.testing.assert_close(slope, torch.full((2,), 2.5))
    decayed = [
        p
        for g in parameter_groups(tuned.model, learning_rate=1e-3, weight_decay=0.1)
        if g["weight_decay"]
        for p in g["params"]
    ]
    assert not any(p is ladder.gates for p in decayed)


# 4
@pytest.mark.parametrize("kept,same", [((2,), True), ((1, 2), False)])
def test_only_the_states_asked_for_are_held(kept: tuple[int, ...], same: bool) -> None:
    model = toys.model("bert", num_hidden_layers=3)
    _, tuned = attached("bert", model, side_layers=kept)
    toys.shake(tuned)
    batch = tiny.batch("bert")
    expected = toys.output(model, batch)
    outputs: list[Tensor] = []
    blocks = [model.get_submodule(b.path) for b in tuned.host.anatomy.stack().blocks]

    def spoil(module: nn.Module, args: Any, output: Tensor) -> None:
        outputs[-1].zero_()

    blocks[1].register_forward_hook(lambda m, a, output: outputs.append(output))
    blocks[2].register_forward_hook(spoil)  # after it was consumed
    assert torch.equal(toys.output(model, batch), expected) == same


# 5
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_is_as_it_was_without_its_side(name: str) -> None:
    model, batch = toys.model(name), tiny.batch(name)
    before = toys.output(model, batch)
    _, tuned = attached(name, model)
    assert not torch.equal(toys.output(model, batch), before)
    with pt.disabled(model):
        assert torch.equal(toys.output(model, batch), before)
    tuned.detach()
    assert torch.equal(toys.output(model, batch), before)


# 6
@pytest.mark.parametrize("name", FAMILIES)
def test_a_full_copy_without_ladders_is_the_backbone(name: str) -> None:
    model, batch = toys.model(name), tiny.batch(name)
    before = toys.output(model, batch)
    _, tuned = attached(name, model, reduction_factor=1, gate="constant", gate_value=1.0)
    for ladder in ladders(tuned):
        for linear in (ladder.down_first, ladder.up):
            if linear is not None:
                set_(linear.weight, torch.eye(32))
                set_(linear.bias, torch.zeros(32))
    torch.testing.assert_close(toys.output(model, batch), before, rtol=1e-5, atol=1e-5 * float(before.abs().max()))


# 7
@pytest.mark.parametrize("name", FAMILIES)
def test_the_side_starts_from_rows_and_columns_of_the_backbone(name: str) -> None:
    model, tuned = attached(name)
    for ladder, stack in zip(ladders(tuned), tuned.host.anatomy.stacks, strict=True):
        for made, block in zip(ladder.blocks, stack.blocks, strict=True):
            own = model.get_submodule(block.path)
            for path, parameter in made.named_parameters():
                original = own.get_parameter(path)
                assert bool(torch.isin(parameter, original).all()), path
                if parameter.ndim == 2 and "relative" not in path:
                    assert parameter.shape == tuple(n // 4 for n in original.shape)
                    sides = ((parameter, original), (parameter.T, original.T))
                    for small, large in sides:  # each row comes from one row
                        inside = torch.isin(large[None], small[:, :]).sum(-1)
                        assert inside.max() >= small.shape[1]


def test_magnitude_and_data_and_chance_start_otherwise() -> None:
    found = []
    for init in ("magnitude", "random", "fisher"):
        _, tuned = attached("bert", init=init)
        tuned.calibrate([tiny.batch("bert")])
        found.append(ladders(tuned)[0].blocks[0].attention.self.query.weight.detach().clone())
    assert not any(torch.equal(a, b) for a, b in [(found[0], found[1]), (found[0], found[2]), (found[1], found[2])])


# 8
def test_rows_are_kept_in_ascending_order_whatever_the_scale() -> None:
    scores = torch.randn(24, 7, generator=torch.Generator().manual_seed(0))
    rows = keep(scores, 4)
    assert len(rows) == 6
    assert rows.tolist() == sorted(rows.tolist())
    assert torch.equal(rows, keep(scores * 1e-3, 4))
    norms = scores.abs().sum(1)
    left_out = [i for i in range(24) if i not in rows]
    assert norms[rows].min() >= norms[left_out].max()


def test_importance_is_the_sum_of_squared_gradients_of_single_samples() -> None:
    model, batch = tiny.model("bert"), tiny.batch("bert", size=3)
    found = fisher(model, [batch], samples=2)
    name = "bert.encoder.layer.1.attention.self.query.weight"
    weight, expected = model.get_parameter(name), torch.zeros(32, 32)
    for row in range(2):
        loss = model(**{k: v[row : row + 1] for k, v in batch.items()}).loss
        expected += torch.autograd.grad(loss, weight)[0].square()
    torch.testing.assert_close(found[name], expected)
    by_hand = fisher(model, [batch], lambda output: 2 * output.loss, samples=2)
    torch.testing.assert_close(by_hand[name], 4 * expected)
    with pytest.raises(TrainingError, match="no batch"):
        fisher(model, [])


# 9
def test_a_file_holds_the_side_alone(tmp_path: Path) -> None:
    model, tuned = attached("t5")
    toys.shake(tuned)
    with safe_open(tuned.save(tmp_path / "side.safetensors"), "pt") as file:
        held = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert held == tuned.trainable
    expected, other = toys.output(model, tiny.batch("t5")), toys.model("t5")
    pt.load(other, tmp_path / "side.safetensors")
    assert torch.equal(toys.output(other, tiny.batch("t5")), expected)


# 10
@pytest.mark.parametrize("name", ["t5", "bart", "llama", "gpt2"])
@pytest.mark.parametrize("beams", [1, 3])
def test_decoding_with_caches_is_teacher_forcing(name: str, beams: int) -> None:
    model, tuned = attached(name)
    toys.shake(tuned)
    tokens = tiny.batch(name)["input_ids"]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    cached = model.generate(tokens, num_beams=beams, **options)
    assert torch.equal(cached, model.generate(tokens, num_beams=beams, use_cache=False, **options))
    if beams > 1:
        return
    found = model.generate(tokens, return_dict_in_generate=True, output_logits=True, **options)
    inputs = {"input_ids": found.sequences[:, :-1]}
    if model.config.is_encoder_decoder:
        inputs = {"decoder_input_ids": found.sequences[:, :-1], "input_ids": tokens}
    with torch.no_grad():
        logits = model(**inputs).logits[:, -5:]
    torch.testing.assert_close(torch.stack(found.logits, 1), logits, rtol=1e-4, atol=1e-4)


def test_side_keys_and_values_are_narrow_and_behind_the_backbones() -> None:
    model, _ = attached("llama", side_layers=(1,))
    cache = model(tiny.batch("llama")["input_ids"], use_cache=True).cache
    assert [layer.keys.shape[-1] for layer in cache.layers] == [8, 8, 2]


def test_a_cache_that_does_not_grow_is_refused() -> None:
    from transformers import StaticCache

    model, _ = attached("llama")
    with pytest.raises(AttachError, match="StaticLayer"):
        model(tiny.batch("llama")["input_ids"], cache=StaticCache(config=model.config, max_cache_len=16))


def test_another_encoders_output_is_refused() -> None:
    model, _ = attached("t5")
    batch = tiny.batch("t5")
    encoder_outputs = model.encoder(batch["input_ids"])
    expected = model(**batch).logits
    model.encoder(batch["input_ids"])
    options = {"labels": batch["labels"], "attention_mask": batch["attention_mask"]}
    model.encoder(batch["input_ids"], attention_mask=batch["attention_mask"])
    torch.testing.assert_close(
        model(
            encoder_outputs=model.encoder(batch["input_ids"], attention_mask=batch["attention_mask"]), **options
        ).logits,
        expected,
    )
    model.encoder(batch["input_ids"].flip(0))
    with pytest.raises(AttachError, match="another encoder output"):
        model(encoder_outputs=encoder_outputs, **options)


# the formula, and its options


@pytest.mark.parametrize("gate", ["learnable", "none", "constant"])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("merge_last", [False, True])
def test_forward_is_the_formula(gate: Any, after: bool, merge_last: bool) -> None:
    model, tuned = attached(
        "vit", gate=gate, gate_after_block=after, merge_last=merge_last, gate_value=0.3, gate_temperature=0.2
    )
    toys.shake(tuned)
    (ladder,) = ladders(tuned)
    seen: list[Any] = []
    ladder.register_forward_hook(lambda m, args, output: seen.append((args, output)))
    with torch.no_grad():
        model(**tiny.batch("vit"))
    ((states, _, last), output) = seen[0]
    mu = torch.sigmoid(ladder.gates / 0.2) if gate == "learnable" else torch.full((2,), 0.3)

    def mixed(s: Tensor, i: int) -> Tensor:
        rung = ladder.down[i](states[i + 1])
        return s + rung if gate == "none" else mu[i] * s + (1 - mu[i]) * rung

    with torch.no_grad():
        s = ladder.down_first(states[0])
        for i, block in enumerate(ladder.blocks):
            s = mixed(block(s), i) if after else block(mixed(s, i))
        y = ladder.up(ladder.norm(s))
        if merge_last:
            g = torch.sigmoid(ladder.last_gate / 0.2)
            y = g * y + (1 - g) * last
    torch.testing.assert_close(output, y)


def test_a_constant_gate_moves_as_training_goes_on() -> None:
    _, tuned = attached("bert", gate="constant", gate_value=0.0, gate_end=1.0)
    moment = tuned.moment(0)
    moment.progress = 0.25
    tuned.methods[0].before_step(moment)
    assert ladders(tuned)[0].gates.tolist() == [0.25, 0.25]
    assert not ladders(tuned)[0].gates.requires_grad


def test_dropout_is_the_backbones_or_as_asked() -> None:
    rates = lambda tuned: {m.p for m in ladders(tuned)[0].modules() if isinstance(m, nn.Dropout)}  # noqa: E731
    assert rates(
        attached("bert", tiny.model("bert", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2))[1]
    ) == {0.2}
    assert rates(attached("bert", dropout=0.3)[1]) == {0.3}


def test_the_backbones_dropout_may_be_off() -> None:
    model = tiny.model("bert", hidden_dropout_prob=0.5)
    _, tuned = attached("bert", model, backbone_dropout=False)
    seen: list[Tensor] = []
    ladders(tuned)[0].register_forward_pre_hook(lambda m, args: seen.append(args[0][-1]))
    model.train()
    tuned.methods[0].before_step(tuned.moment(0))
    outputs = [model(**tiny.batch("bert")).logits for _ in range(2)]
    assert torch.equal(*seen)
    assert not torch.equal(*outputs), "the side network keeps its own"


def test_stacks_may_keep_other_depths() -> None:
    _, tuned = attached("t5", side_layers={"encoder": (1,), "decoder": "all"})
    assert [ladder.kept for ladder in ladders(tuned)] == [(1,), (0, 1)]


def test_recorded_hidden_states_are_the_backbones_alone() -> None:
    model, _ = attached("llama")
    output = model(tiny.batch("llama")["input_ids"], output_hidden_states=True)
    assert [h.shape[-1] for h in output.hidden_states] == [32, 32, 32]


@pytest.mark.parametrize("name", ["t5", "bert", "vit"])
def test_the_cache_skips_the_whole_backbone(name: str) -> None:
    model, batch = toys.model(name), tiny.batch(name)
    _, tuned = attached(name, model)
    toys.shake(tuned)
    ran: list[str] = []
    for stack in tuned.host.anatomy.stacks:
        for block in stack.blocks:
            inner = next(s.path for s in block.sites if s.role == "q")
            model.get_submodule(inner).register_forward_hook(lambda m, a, o, path=inner: ran.append(path))
    assert_cached_alike(model, tuned, batch, ran.clear)
    assert not ran


@pytest.mark.parametrize("name", ["t5", "bert", "vit"])
def test_cost_is_predicted(name: str) -> None:
    model, tuned = attached(name)
    fields = ("saved_bytes", "step_flops", "gradient_bytes", "checkpoint_bytes")
    assert_cost_is_predicted(model, tuned, tiny.batch(name), fields)


# refusals


@pytest.mark.parametrize("kept", [(), (0, 0), (-1,), {}, {"encoder": ()}])
def test_depths_that_mean_nothing_are_refused(kept: Any) -> None:
    with pytest.raises(ConfigError, match="side_layers"):
        pt.LST(side_layers=kept)


def test_what_does_not_fit_is_refused() -> None:
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("bert", {"reduction_factor": 3}, "reduction_factor = 3 does not divide 32"),
        ("bert", {"reduction_factor": 16}, "head size 8"),
        ("bert", {"side_layers": (2,)}, "no depth 2; choose from 0 to 1"),
        ("t5", {"side_layers": {"encoder": (0,)}}, "names no depths of 'decoder'"),
        ("llama", {"reduction_factor": 8}, "can't rotate"),
        ("clip", {}, "vision, text"),
        ("swin", {}, "one width"),
        ("mixtral", {}, "experts"),
        ("torch_encoder", {}, "experts or convolutions|configuration"),
    ]
    assert_refused(pt.LST, cases)


def test_training_without_data_to_start_from_is_refused() -> None:
    model, tuned = attached("bert", init="fisher")
    with pytest.raises(TrainingError, match="calibrate"):
        model.train()(**tiny.batch("bert"))
    tuned.calibrate([tiny.batch("bert")])
    model(**tiny.batch("bert")).loss.backward()


def test_blocks_that_are_given_other_states_are_refused() -> None:
    """DeBERTa's relative positions are as wide as the backbone."""
    model = tiny.model("deberta_v2")
    pt.attach(model, pt.LST(init="random"))
    with pytest.raises(AttachError, match="also given states of the full width"):
        model(**tiny.batch("deberta_v2"))
