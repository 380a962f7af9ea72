"""What DAS must hold, by its paper: each number is a line of its specification."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, ViltConfig, ViltModel, ViTConfig, ViTModel

import petiole as pt
import tiny
import toys
from petiole.cost import forward_flops
from petiole.errors import AnatomyError, AttachError, ConfigError, PetioleError, TrainingError
from petiole.methods.execution import bandit, das
from petiole.methods.execution.das import Search
from petiole.methods.execution.search import chosen, search
from petiole.methods.execution.skipped import Skippable, prune
from petiole.training import Events
from toys import output, shake
from training.toys import arguments

GENERATOR = torch.Generator


def net(family: str = "vit", depth: int = 4, **changes: Any) -> nn.Module:
    return toys.model(family, num_hidden_layers=depth, **changes)


def names(*depths: int, stack: str = "encoder") -> tuple[str, ...]:
    return tuple(f"{stack}.{depth}" for depth in depths)


def stand_ins(tuned: pt.Adaptation) -> list[Skippable]:
    return [slot.delta for slot in tuned.slots if isinstance(slot.delta, Skippable)]


def by_key(tuned: pt.Adaptation) -> dict[str, Any]:
    return {slot.key: slot.delta for slot in tuned.slots}


def silent(tuned: pt.Adaptation) -> None:
    """Every adapter's W_up and its bias to 0."""
    with torch.no_grad():
        for slot in tuned.slots:
            adapter = getattr(slot.delta, "adapter", slot.delta)
            if hasattr(adapter, "up"):
                adapter.up.weight.zero_()
                adapter.up.bias.zero_()


def batches(family: str = "vit", count: int = 4) -> list[dict[str, Any]]:
    return [tiny.batch(family, seed=seed) for seed in range(count)]


QUICK = {"epochs": 3, "warmup": 1, "every": 1, "samples": 3}


# --------------------------------------------------------------------------------------------------------------- the bandit


def a_round(seed: int, K: int = 8, m: int = 3, S: int = 3) -> tuple[Tensor, list[tuple[int, ...]], Tensor]:
    generator = GENERATOR().manual_seed(seed)
    q = 3 * torch.randn(K, generator=generator, dtype=torch.float64)
    subnets = bandit.draw_distinct(q, m, S, generator)
    return q, subnets, bandit.rewards(3 * torch.rand(S, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(5))
def test_a_round_moves_preferences_by_the_formula_with_the_probabilities_before_it(seed: int) -> None:
    q, subnets, v = a_round(seed)
    expected = q.clone()
    for i in range(len(q)):
        pi = 1 / (1 + math.exp(-float(q[i])))
        expected[i] += 0.7 * pi * (1 - pi) * sum(float(v[k] - v.mean()) for k, s in enumerate(subnets) if i in s)
    torch.testing.assert_close(bandit.updated(q, subnets, v, 0.7), expected, rtol=1e-9, atol=1e-12)
    change = (bandit.updated(q, subnets, v, 0.7) - q).abs().max()
    assert 0 < change <= 0.7 * 3 / 4 * (v - v.mean()).abs().max() <= 0.7 * 3 / 4


def test_a_module_skipped_in_all_subnets_stays_exactly_where_it_is() -> None:
    q = torch.tensor([0.1, -0.7, 0.3, 0.0], dtype=torch.float64)
    v = bandit.rewards(torch.tensor([0.3, 1.1, 0.7], dtype=torch.float64))
    new = bandit.updated(q, [(0, 1), (0, 2), (0, 3)], v, 1.0)
    assert new[0] == q[0]
    assert abs(float((v - v.mean()).sum())) < 1e-15
    assert new[1] > q[1] and new[2] < q[2]  # the smallest loss is the best reward: that module can be done without


def test_the_largest_preferences_are_chosen_and_among_equals_the_lowest_index() -> None:
    assert bandit.chosen(torch.tensor([0.0, 2.0, -3.0, 2.0, 1.0]), 2) == (1, 3)
    assert bandit.chosen(torch.tensor([1.0, 2.0, 1.0, 1.0]), 3) == (0, 1, 2)
    assert bandit.chosen(torch.zeros(5), 2) == (0, 1)


def test_subnets_are_drawn_by_weight_and_differ_as_sets() -> None:
    generator = GENERATOR().manual_seed(0)
    q = torch.tensor([4.0, 0.0, 0.0, -4.0], dtype=torch.float64)
    count = torch.zeros(4)
    for _ in range(2000):
        drawn = bandit.draw(q, 1, generator)
        count[drawn[0]] += 1
    torch.testing.assert_close(count / 2000, (torch.sigmoid(q) / torch.sigmoid(q).sum()).float(), rtol=0, atol=0.04)
    every = bandit.draw_distinct(torch.zeros(4, dtype=torch.float64), 2, 6, generator)
    assert len({frozenset(subnet) for subnet in every}) == 6 and all(len(set(subnet)) == 2 for subnet in every)


def test_a_scale_keeps_large_losses_apart() -> None:
    losses = torch.tensor([40.0, 50.0])
    assert (
        float((bandit.rewards(losses, 0.01)).diff().abs()) > 0.05 > 1e-10 > float(bandit.rewards(losses).diff().abs())
    )


# ------------------------------------------------------------------------------------------------------- what sits where


@pytest.mark.parametrize("family", ["vit", "bert", "llama", "gpt2", "bart"])
def test_without_up_projections_a_kept_block_is_the_original_and_a_skipped_one_the_identity(family: str) -> None:
    model = tiny.model(family)
    blocks = {f"{b.stack}.{b.depth}": b.path for stack in pt.anatomy(model).stacks for b in stack.blocks}
    first = next(iter(blocks))
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(at: nn.Module, name: str) -> None:
        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            seen[name] = (given, out[0] if isinstance(out, tuple) else out)

        at.register_forward_hook(hook, with_kwargs=True)

    tuned = pt.attach(model, pt.DAS(skip=(first,), bottleneck=3, skip_bottleneck=3))
    silent(tuned)
    for name, path in blocks.items():
        watch(model.get_submodule(path), name)
    output(model, tiny.batch(family))
    assert torch.equal(*seen[first])
    for name in list(blocks)[1:]:
        before, after = seen[name]
        assert not torch.equal(before, after)
    kept = pt.attach(fresh := tiny.model(family), pt.DAS(num_skip=0, bottleneck=3))
    silent(kept)
    assert torch.equal(output(fresh, tiny.batch(family)), output(tiny.model(family), tiny.batch(family)))


def layer(tuned: pt.Adaptation, depth: int) -> dict[str, Any]:
    return {key.removeprefix(f"0.encoder.{depth}."): d for key, d in by_key(tuned).items() if f".{depth}." in key}


def test_a_kept_pre_norm_block_reads_the_residual_stream() -> None:
    """x <- x + Attn(norm(x)) + A_0(x);  x <- x + MLP(norm(x)) + A_1(x), and a skipped one x <- x + A(x)."""
    model = net("vit", 2)
    bare = copy.deepcopy(model)
    tuned = pt.attach(model, pt.DAS(skip=names(1), bottleneck=3, skip_bottleneck=5))
    shake(tuned)
    own = layer(tuned, 0)
    x = torch.randn(2, 5, 32)
    block = bare.vit.layers[0]
    y = x + block.attention(block.layernorm_before(x))[0] + own["attention.output"](x)
    y = y + block.mlp(block.layernorm_after(y)) + own["ffn.output"](y)
    torch.testing.assert_close(model.vit.layers[0](x), y)
    (skipped,) = stand_ins(tuned)
    assert skipped.adapter.down.out_features == 5
    torch.testing.assert_close(model.vit.layers[1](x), x + skipped.adapter(x))


@pytest.mark.parametrize("family", ["phi", "modernbert", "t5", "gptj", "falcon", "opt", "jamba"])
def test_the_residual_stream_is_found_where_norms_are_fewer_or_elsewhere(family: str) -> None:
    """What the adapter beside the last ffn reads is what its norm is given, or, with one norm for both, the block's input."""
    model = tiny.model(family)
    tuned = pt.attach(model, pt.DAS(num_skip=0, bottleneck=3))
    last = [slot for slot in tuned.slots if slot.site.role == "ffn"][-1]
    block = next(
        b for s in pt.anatomy(model).stacks if s.name == last.site.stack for b in s.blocks if b.depth == last.site.depth
    )
    seen: dict[str, Tensor] = {}
    for at in (s for s in block.sites if s.role == "norm" and not s.within):
        model.get_submodule(at.path).register_forward_pre_hook(
            lambda m, args, path=at.path: seen.__setitem__(path, args[0])
        )
    last.delta.register_forward_pre_hook(lambda m, args: seen.__setitem__("adapter", args[0]))
    output(model, tiny.batch(family))
    adapter = seen.pop("adapter")
    assert torch.equal(adapter, list(seen.values())[-1])


def fusion() -> BertModel:
    """Self-attention, cross-attention, ffn, each ended by a norm: the fusion block of METER."""
    config = BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=20, is_decoder=True,
        add_cross_attention=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    return BertModel(config, add_pooling_layer=False).eval()


def test_a_fusion_block_adds_before_the_norms_of_its_attentions_and_after_that_of_its_ffn() -> None:
    model = fusion()
    bare = copy.deepcopy(model)
    (stack,) = pt.anatomy(model).stacks
    tuned = pt.attach(model, pt.DAS(skip=(f"{stack.name}.1",), bottleneck=3, skip_bottleneck=4))
    shake(tuned)
    own = {
        key.removeprefix(f"0.{stack.name}.0."): delta
        for key, delta in by_key(tuned).items()
        if f".{stack.name}.0." in key
    }
    assert len(own) == 3
    attention, cross, ffn = (
        own["attention.output"],
        own["cross_attention.output"],
        own[next(k for k in own if "norm" in k)],
    )
    x, other = torch.randn(2, 4, 16), torch.randn(2, 3, 16)
    block = bare.encoder.layer[0]

    def sublayer(part: nn.Module, x: Tensor, adapter: Any, **given: Any) -> Tensor:
        y = part.self(x, **given)[0]
        return part.output.LayerNorm(part.output.dense(y) + x + adapter(x))

    u = sublayer(block.attention, x, attention)
    u = sublayer(block.crossattention, u, cross, encoder_hidden_states=other)
    expected = block.output(block.intermediate(u), u) + ffn(u)
    found = model.encoder.layer[0](x, encoder_hidden_states=other)
    torch.testing.assert_close(found[0] if isinstance(found, tuple) else found, expected)


def test_skipping_a_block_of_one_stream_leaves_the_other_intact() -> None:
    """The decoder attends to what the adapter in the encoder's last block gives."""
    model, batch = tiny.model("bart"), tiny.batch("bart")
    tuned = pt.attach(model, pt.DAS(skip=names(1), candidates=names(0, 1), bottleneck=3, skip_bottleneck=3))
    shake(tuned)
    calls = counted(model, "model.decoder.layers")
    seen: list[Tensor] = []
    stand_ins(tuned)[0].register_forward_hook(lambda m, args, out: seen.append(out))
    read: list[Tensor] = []
    attention = model.model.decoder.layers[0].encoder_attn
    attention.register_forward_pre_hook(
        lambda m, args, kwargs: read.append(kwargs["key_value_states"]), with_kwargs=True
    )
    output(model, batch)
    assert calls and all(calls.values()) and torch.equal(seen[0], read[0])
    assert {slot.site.stack for slot in tuned.slots if slot.number == 0 and slot.site.stack} == {"encoder"}


def counted(model: nn.Module, under: str) -> dict[str, int]:
    """How often each module below a path is called from now on."""
    calls: dict[str, int] = {}
    for path, module in model.get_submodule(under).named_modules():
        if path and "petiole" not in path and not isinstance(module, nn.ModuleList):
            calls[path] = 0

            def hook(module: nn.Module, args: Any, path: str = path) -> None:
                calls[path] += 1

            module.register_forward_pre_hook(hook)
    return calls


def test_a_skipped_block_is_counted_among_the_hidden_states() -> None:
    model, batch = net(), tiny.batch("vit")
    pt.attach(model, pt.DAS(skip=names(1), num_skip=1))
    with torch.no_grad():
        found = model(**batch, output_hidden_states=True).hidden_states
    assert len(found) == 5
    shift = found[2] - found[1]
    delta = next(m for m in model.modules() if isinstance(m, Skippable))
    with torch.no_grad():
        torch.testing.assert_close(shift, delta.adapter(found[1]))


def test_nothing_in_a_skipped_block_is_called() -> None:
    model = net("vit", 3)
    tuned = pt.attach(model, pt.DAS(skip=names(1), bottleneck=3))
    calls = {depth: counted(model.vit.layers[depth], "block" if depth == 1 else "") for depth in range(3)}
    model.train()
    toys.first(model(**tiny.batch("vit"))).sum().backward()
    assert sum(calls[1].values()) == 0 and min(calls[0].values()) == min(calls[2].values()) == 1
    assert all(p.grad is not None for p in stand_ins(tuned)[0].parameters())


# ------------------------------------------------------------------------------------------------ counts at the paper's sizes


@pytest.mark.parametrize(("m", "count"), [(0, 3_596_544), (2, 3_591_936), (4, 3_587_328)])
def test_adapters_of_vilt_by_the_number_of_skipped_blocks(m: int, count: int) -> None:
    with torch.device("meta"):
        model = ViltModel(ViltConfig())
    tuned = pt.attach(model, pt.DAS(skip=names(*range(m)), also=()), train_head=False)
    assert tuned.trainable == count == (12 - m) * 299_712 + m * 297_408


def test_pooler_and_token_types_of_vilt_train_too() -> None:
    with torch.device("meta"):
        model = ViltModel(ViltConfig())
    tuned = pt.attach(model, pt.DAS(skip=names(0)), train_head=False)
    more = {n for n, _ in model.named_parameters() if "token_type_embeddings" in n or "pooler" in n}
    assert set(tuned.own) == more and len(more) == 4
    assert tuned.trainable == 11 * 299_712 + 297_408 + sum(model.get_parameter(name).numel() for name in more)


def test_meter_has_more_room_in_a_skipped_block() -> None:
    with torch.device("meta"):
        model = ViltModel(ViltConfig())
    tuned = pt.attach(model, pt.DAS(skip=names(3), skip_bottleneck=288, also=()), train_head=False)
    d, h = 768, 288
    assert sum(p.numel() for p in stand_ins(tuned)[0].parameters()) == 2 * d + d * h + h + h * d + d


def test_a_skipped_block_leaves_the_cost_of_its_adapter() -> None:
    """12 N d² + 2 N² d against 2 N d h multiply-adds: at N = 240, d = 768, h = 192, 1.787 G and 0.071 G."""
    N, d, h, K, m = 240, 768, 192, 12, 4
    size = {"image_size": (16, 16 * (N - 1)), "patch_size": 16, "num_hidden_layers": K}
    block, adapter, beside = 2 * (12 * N * d**2 + 2 * N**2 * d), 4 * N * d * h, 4 * N * d * 96
    assert (round(block / 2e9, 3), round(adapter / 2e9, 3)) == (1.787, 0.071)
    with torch.device("meta"):
        model = ViTModel(ViTConfig(**size), add_pooling_layer=False)
    batch = {"pixel_values": torch.empty(1, 3, 16, 16 * (N - 1), device="meta")}
    bare = forward_flops(model, batch)
    pt.attach(model, pt.DAS(skip=names(0, 5, 7, 11)))
    assert forward_flops(model, batch) == bare - m * block + m * adapter + (K - m) * 2 * beside


# ----------------------------------------------------------------------------------------------------------------- the search


class Judge:
    """Data of a search, and the losses of its rounds."""

    def __init__(self, family: str = "vit") -> None:
        self.family, self.rounds = family, 0

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        if not torch.is_grad_enabled():
            self.rounds += 1
            assert not any(module.training for module in model.modules())
        return model(**batch).loss


def test_the_search_leaves_the_model_as_it_was_and_is_the_same_with_the_same_seed() -> None:
    found = []
    for seed in (0, 0, 1):
        model, judge = net(depth=5), Judge()
        model.train()
        before = toys.snapshot(model)
        method = pt.DAS(num_skip=2, bottleneck=3, skip_bottleneck=3, search=QUICK)
        torch.manual_seed(len(found))
        found.append(search(model, method, batches(), batches(count=2), loss=judge.loss, seed=seed))
        assert toys.snapshot(model) == before
        assert judge.rounds == 3 * 2 * 4  # subnets, epochs after the warm-up, steps
    assert found[0] == found[1] and found[0].preferences != found[2].preferences
    q = found[0].preferences
    assert list(q) == list(names(*range(5))) and len(found[0].skip) == 2
    assert min(q[name] for name in found[0].skip) >= max(v for name, v in q.items() if name not in found[0].skip)


def running(
    method: pt.DAS, model: nn.Module, held_out: Any = None, total: int = 0
) -> tuple[pt.Adaptation, Events, Any]:
    tuned = pt.attach(model, method)
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=1e-2)
    events = Events(model, optimizer, total_steps=total)
    events.begin(batches(), held_out=held_out if held_out is not None else batches(count=2))
    return tuned, events, optimizer


def step(model: nn.Module, events: Events, optimizer: Any, batch: dict[str, Any]) -> tuple[str, ...]:
    """A step of training; the blocks that it skipped."""
    model.train()
    events.before_step()
    model(**batch).loss.backward()
    skipped = tuple(d.name for d in stand_ins(next(iter(pt.adaptations(model).values()))) if d.skips)
    events.before_optimizer_step()
    optimizer.step()
    events.after_optimizer_step()
    optimizer.zero_grad()
    return skipped


def test_each_step_skips_m_blocks_and_nothing_is_concluded_in_the_warm_up() -> None:
    model = net(depth=5)
    tuned, events, optimizer = running(pt.DAS(num_skip=2, bottleneck=3, search={**QUICK, "every": 2}), model)
    drawn, moved = [], []
    for _ in range(4):
        for batch in batches():
            drawn.append(step(model, events, optimizer, batch))
            moved.append(tuple(chosen(tuned).preferences.values()))
            assert tuple(d.name for d in stand_ins(tuned) if d.skips) == chosen(tuned).skip
        events.epoch_end()
    assert all(len(skipped) == 2 for skipped in drawn) and len(set(drawn[:12])) > 3
    assert set(moved[:4]) == {(0.0,) * 5} == {moved[4]}
    changes = [a != b for a, b in itertools.pairwise(moved[3:])]
    assert changes == [False, True] * 4 + [False] * 4  # every second step of two epochs; then the choice stands
    assert set(drawn[12:]) == {chosen(tuned).skip}


def test_a_round_touches_neither_gradients_nor_the_optimiser_nor_statistics() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = net(depth=4)
            self.statistics = nn.BatchNorm1d(3)

        def forward(self, labels: Tensor, **inputs: Any) -> Any:
            found = self.vit(**inputs)
            found["loss"] = nn.functional.cross_entropy(self.statistics(found.logits), labels)
            return found

    model = Normed()
    method = pt.DAS(num_skip=1, bottleneck=3, search={**QUICK, "warmup": 0})
    tuned, events, optimizer = running(method, model)
    step(model, events, optimizer, batches()[0])
    model.train()
    model(**batches()[1]).loss.backward()
    moment = events.moment(tuned, 0)
    gradients = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    before, state, random = toys.snapshot(model), copy.deepcopy(optimizer.state_dict()), torch.get_rng_state()
    q = moment.state["preferences"].clone()
    method.compare(moment)
    assert not torch.equal(moment.state["preferences"], q)
    assert toys.snapshot(model) == before and torch.equal(torch.get_rng_state(), random)
    for name, parameter in model.named_parameters():
        kept = gradients[name]
        assert parameter.grad is None if kept is None else torch.equal(parameter.grad, kept), name
    assert str(optimizer.state_dict()) == str(state)


def test_subnets_share_what_they_have_in_common() -> None:
    """Blocks in front of the first that one skips and another does not run once, and rewards are as if each ran from scratch."""
    model, batch = net(depth=6), batches()[0]
    method = pt.DAS(num_skip=1, bottleneck=3, search={**QUICK, "samples": 2})
    tuned, events, _ = running(method, model, [batch])
    shake(tuned)
    moment, alone = events.moment(tuned, 0), []
    for subnet in ((3,), (5,)):
        das.select(moment, subnet)
        alone.append(float(model.eval()(**batch).loss))
    calls = [counted(model.vit.layers[i], "block") for i in range(6)]
    losses = das.losses_of(moment, [(3,), (5,)])
    assert losses.tolist() == pytest.approx(alone, rel=1e-6)
    assert [c["layernorm_before"] for c in calls] == [1, 1, 1, 1, 2, 1]  # 4 twice: behind 3 skipped, and behind 3 run


def test_compiled_code_follows_what_is_skipped() -> None:
    torch._dynamo.reset()
    model, batch = net(depth=4).double(), {"pixel_values": tiny.batch("vit")["pixel_values"].double()}
    tuned = pt.attach(model, pt.DAS(num_skip=1, bottleneck=3))
    shake(tuned)
    moment, compiled = tuned.moment(0), torch.compile(model, backend="eager", fullgraph=True)
    for depth in (0, 2, 0, 3):
        das.select(moment, (depth,))
        eager = output(model, batch)  # first: what a skipped block returns is tried uncompiled
        torch.testing.assert_close(output(compiled, batch), eager, rtol=1e-9, atol=1e-9)
    torch._dynamo.reset()


def test_the_ramp_skips_one_block_after_another() -> None:
    model = net(depth=6)
    method = pt.DAS(num_skip=4, bottleneck=3, search={**QUICK, "ramp": True})
    _, events, optimizer = running(method, model, total=24)
    drawn = []
    for _ in range(3):
        for batch in batches(count=8):
            drawn.append(len(step(model, events, optimizer, batch)))
        events.epoch_end()
    assert drawn == [min(4, 2 * 4 * t // 8 + 1) for t in range(8)] + [4] * 16
    _, events, optimizer = running(method, net(depth=6))
    with pytest.raises(TrainingError, match="length of the run"):
        step(events.host.model, events, optimizer, batches()[0])


def test_branches_left_out_at_random_are_kept_in_the_search() -> None:
    model = tiny.model("beit", num_hidden_layers=4, drop_path_rate=0.5)
    _, events, _ = running(pt.DAS(num_skip=1, bottleneck=3, search=QUICK), model, batches("beit"))
    events.before_step()
    paths = [m for m in model.modules() if "DropPath" in type(m).__name__]
    assert paths and not any(m.training for m in paths)
    with pytest.raises(AttachError, match="layerdrop"):
        pt.attach(tiny.model("bart", encoder_layerdrop=0.1), pt.DAS())


def test_the_trainer_searches_and_resumes(tmp_path: Path) -> None:
    rows = [{k: v[0] for k, v in batch.items()} for batch in batches(count=16)]

    def run(folder: Path, resume: bool = False, **changes: Any) -> Any:
        model = net(depth=4)
        tuned = pt.attach(model, pt.DAS(num_skip=2, bottleneck=3, search={**QUICK, "every": 2}))
        settings = arguments(folder, num_train_epochs=3, per_device_train_batch_size=4, **changes)
        pt.Trainer(model=model, args=settings, train_dataset=rows, eval_dataset=rows[:8]).train(resume)
        return chosen(tuned)

    whole = run(tmp_path / "a", save_strategy="steps", save_steps=6)
    assert any(whole.preferences.values()) and len(whole.skip) == 2
    again = run(
        tmp_path / "a", resume=True, save_strategy="no"
    )  # from the last checkpoint, in which the search is over
    assert again == whole


def test_a_search_that_could_see_no_held_out_data_says_so_at_once() -> None:
    model = net()
    tuned = pt.attach(model, pt.DAS(num_skip=1))
    events = Events(model, torch.optim.AdamW(tuned.parameters()), total_steps=100)
    events.begin(batches())
    with pytest.raises(TrainingError, match="held-out data"):
        events.before_step()


def test_files_hold_the_search_and_what_is_skipped(tmp_path: Path) -> None:
    model = net(depth=4)
    tuned, events, optimizer = running(pt.DAS(num_skip=1, bottleneck=3, search={**QUICK, "warmup": 0}), model)
    for batch in batches() * 2:
        step(model, events, optimizer, batch)
    tuned.state[0]["preferences"][2] = 5.0
    das.settle(tuned.moment(0))
    model.eval()
    expected = output(model, batches()[0])
    other = net(depth=4)
    loaded = pt.load(other, tuned.save(tmp_path / "x.safetensors"))
    assert torch.equal(output(other, batches()[0]), expected)
    assert chosen(loaded) == chosen(tuned) and chosen(loaded).skip == names(2)


# ------------------------------------------------------------------------------------------------------------------ for good


@pytest.mark.parametrize("family", ["vit", "llama", "gpt2", "bart", "deberta", "vilt", "qwen2"])
def test_pruning_drops_weights_and_changes_nothing(family: str, tmp_path: Path) -> None:
    model, batch = tiny.model(family), tiny.batch(family)
    first = next(f"{s.name}.0" for s in reversed(pt.anatomy(model).stacks))
    method = pt.DAS(skip=(first,), bottleneck=3, skip_bottleneck=3)
    tuned = pt.attach(model, method)
    with pytest.raises(AttachError, match="give prune a batch"):
        prune(tuned)
    shake(tuned)
    expected, size = output(model, batch), sum(p.numel() for p in model.parameters())
    path = tuned.save(tmp_path / "x.safetensors")
    assert prune(tuned) == [first]
    assert torch.equal(output(model, batch), expected)
    gone = tiny.model(family).get_submodule(stand_ins(tuned)[0].host.anatomy.stack(first[:-2]).blocks[0].path)
    assert sum(p.numel() for p in model.parameters()) == size - sum(p.numel() for p in gone.parameters())
    torch.save(model.state_dict(), tmp_path / "pruned.pt")
    with pytest.raises(AttachError, match="was pruned"), pt.disabled(model):
        output(model, batch)

    again = tiny.model(family, seed=1)  # other weights, all of which are in the file
    twin = pt.load(again, path, name="default", allow_other_backbone=True)
    prune(twin)
    again.load_state_dict(torch.load(tmp_path / "pruned.pt"))
    assert torch.equal(output(again, batch), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "gemma"])
def test_text_is_the_same_with_a_cache_and_without_before_pruning_and_after(family: str) -> None:
    model, batch = (
        toys.model(family, **({"num_layers": 3} if family == "t5" else {"num_hidden_layers": 3})),
        tiny.batch(family),
    )
    stack = "decoder"
    tuned = pt.attach(model, pt.DAS(skip=names(1 if family == "t5" else 0, stack=stack), bottleneck=3))
    shake(tuned)
    tokens = {"inputs": batch["input_ids"], "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    wanted = model.generate(**tokens, use_cache=False)
    for beams in (1, 2):
        same = [model.generate(**tokens, use_cache=cached, num_beams=beams) for cached in (True, False)]
        assert torch.equal(*same)
    prune(tuned)
    assert torch.equal(model.generate(**tokens, use_cache=True), wanted)
    if family != "t5":
        with torch.no_grad():
            cache = model(input_ids=batch["input_ids"], use_cache=True).past_key_values
        held = [layer.keys.shape for layer in cache.layers if getattr(layer, "keys", None) is not None]
        assert len(held) == 2 and all(shape[-1] > 1 for shape in held)
        assert cache.get_seq_length() == batch["input_ids"].shape[1]


# ------------------------------------------------------------------------------------------------------- language models


def test_the_sequential_variant_stands_before_sub_layers_without_a_norm() -> None:
    model = toys.model("llama", num_hidden_layers=3)
    bare = copy.deepcopy(model)
    tuned = pt.attach(model, pt.DAS(skip=("decoder.2",), insertion="sequential", bottleneck=3))
    shake(tuned)
    own = {key.removeprefix("0.decoder.0."): d for key, d in by_key(tuned).items() if ".0." in key[1:]}
    assert all(delta.norm_in is None for delta in own.values())
    x, block, layer = torch.randn(2, 5, 32), bare.model.layers[0], model.model.layers[0]
    h = block.post_attention_layernorm(x)
    torch.testing.assert_close(layer.mlp(h), block.mlp(h + own["ffn.input"](h)))
    positions = bare.model.rotary_emb(x, torch.arange(5)[None])
    h = block.input_layernorm(x)
    found, wanted = (
        part(hidden_states=given, position_embeddings=positions, attention_mask=None)[0]
        for part, given in ((layer.self_attn, h), (block.self_attn, h + own["attention.input"](h)))
    )
    torch.testing.assert_close(found, wanted)


def test_a_skipped_sub_layer_is_an_adapter_on_its_normed_input() -> None:
    model = toys.model("llama", num_hidden_layers=3)
    bare, batch = copy.deepcopy(model), tiny.batch("llama")
    method = pt.DAS(
        unit="sublayer",
        insertion="sequential",
        skip=("decoder.0.attention", "decoder.1.ffn"),
        bottleneck=3,
        skip_bottleneck=4,
    )
    tuned = pt.attach(model, method)
    assert len(stand_ins(tuned)) == 2 and len(tuned.slots) == 6
    silent(tuned)
    calls = [counted(model.model.layers[0].self_attn, "block"), counted(model.model.layers[1].mlp, "block")]

    bare.model.layers[0].self_attn.o_proj.weight.data.zero_()
    bare.model.layers[1].mlp.down_proj.weight.data.zero_()
    torch.testing.assert_close(output(model, batch), output(bare, batch))
    assert not any(sum(c.values()) for c in calls)
    shake(tuned)
    tokens = {"inputs": batch["input_ids"], "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    wanted = model.generate(**tokens, use_cache=False)
    assert torch.equal(model.generate(**tokens, use_cache=True), wanted)
    prune(tuned)
    assert torch.equal(model.generate(**tokens, use_cache=True), wanted)


def test_sub_layers_are_searched_too() -> None:
    model = toys.model("llama", num_hidden_layers=3)
    method = pt.DAS(
        unit="sublayer", insertion="sequential", num_skip=2, bottleneck=3, search={**QUICK, "step_size": 0.05}
    )
    found = search(model, method, batches("llama"), batches("llama", 2))
    assert len(found.preferences) == 6 and len(found.skip) == 2 and any(found.preferences.values())


# ------------------------------------------------------------------------------------------------------------------ refusals


def refused(family: str, match: str, error: type[PetioleError] = PetioleError, **fields: Any) -> None:
    model = tiny.model(family)
    before = toys.snapshot(model)
    with pytest.raises(error, match=match) as caught:
        pt.attach(model, pt.DAS(**fields))
    assert len(str(caught.value).splitlines()) <= 3
    assert toys.snapshot(model) == before


def test_what_can_not_be_searched_is_refused() -> None:
    refused("vit", "different subnets", ConfigError, num_skip=1, search={"samples": 3})
    refused("vit", "at least one has to stay", ConfigError, num_skip=2)
    refused("vit", "at least one has to stay", ConfigError, skip=names(0, 1))
    refused("vit", "no candidate; nearest: encoder.1", AnatomyError, skip=("encoder.11",))
    refused("bert", "its norm comes after the residual", AttachError, unit="sublayer")
    refused("bloom", "adds the residual by itself", AttachError, unit="sublayer")
    refused("swin", "windows", AttachError)
    refused("resnet", "neither attention nor ffn", AttachError)
    refused("convnext", "is an image", AttachError)
    refused("t5", "table", AttachError, candidates=names(0), num_skip=0)
    refused("albert", "runs 3 times", AttachError)
    for fields, match in (
        ({"search": {"samples": 1}}, "samples"),
        ({"search": {"epochs": 1, "warmup": 1}}, "nothing is searched"),
        ({"num_skip": 2, "skip": names(1)}, "skip names 1"),
        ({"skip": names(1, 1)}, "twice"),
        ({"num_skip": -1}, "num_skip"),
        ({"search": {"step_size": 0.0}}, "step_size"),
    ):
        with pytest.raises(ConfigError, match=match):
            pt.DAS(**fields)
    with pytest.raises(ConfigError, match="2 or more"):
        bandit.check(8, 2, 1)
    with pytest.raises(ConfigError, match="says already"):
        search(net(), pt.DAS(skip=names(1)), [], [])
    with pytest.raises(AttachError, match="searches nothing"):
        chosen(pt.attach(net(), pt.DAS(skip=names(1))))
    with pytest.raises(AttachError, match="skips nothing"):
        prune(pt.attach(net(), pt.DAS(skip=())))


def test_a_block_whose_output_has_another_shape_is_refused() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, h: Tensor) -> Tensor:
            return self.down(self.up(self.norm(h)))[:, ::2]

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Halves(), Halves()])

        def forward(self, h: Tensor) -> Tensor:
            for block in self.blocks:
                h = block(h)
            return h

    model = Stack()
    pt.attach(model, pt.DAS(skip=names(0), bottleneck=2), found=pt.anatomy(model, stacks={"encoder": "blocks"}))
    with pytest.raises(AttachError, match="leave it out of candidates"):
        model(torch.randn(1, 4, 8))


def test_what_may_be_skipped_can_be_named_and_defaults_follow_the_paper() -> None:
    assert (Search().epochs, Search().warmup, Search().every, Search().step_size) == (3, 1, 10, 1.0)
    assert (pt.DAS().bottleneck, pt.DAS().skip_bottleneck) == (96, 192)
    tuned = pt.attach(net(depth=12), pt.DAS(bottleneck=3))
    assert sum(d.skips for d in stand_ins(tuned)) == 4 and len(stand_ins(tuned)) == 12
    path = pt.anatomy(net()).stacks[0].blocks[2].path
    tuned = pt.attach(net(), pt.DAS(candidates=("encoder.1", path), num_skip=1, bottleneck=3))
    assert [delta.name for delta in stand_ins(tuned)] == ["encoder.1", "encoder.2"]
    t5 = pt.attach(tiny.model("t5"), pt.DAS(bottleneck=3))
    assert [delta.name for delta in stand_ins(t5)] == ["encoder.1", "decoder.1"]


def test_a_skipped_recurrence_keeps_no_place_in_a_cache() -> None:
    """Of Jamba's blocks the first is a recurrence, whose state is not one number for each token."""
    model = tiny.model("jamba")
    pt.attach(model, pt.DAS(bottleneck=2, skip=("decoder.0",)), train_head=False)
    found = model(input_ids=tiny.batch("jamba")["input_ids"], use_cache=True)
    assert torch.isfinite(found.logits).all()
