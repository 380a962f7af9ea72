"""What the unified view and MAM must hold, by their paper: each number is a line of the specification."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petiole as pt
import tiny
import toys
from linears import set_
from petiole.errors import AttachError, ConfigError
from petiole.method import AttentionDelta, HiddenDelta, Place
from petiole.methods.adapters.bottleneck import Bottleneck, Renormed
from petiole.methods.adapters.multihead import HeadAdapters
from petiole.methods.adapters.unified import PRESETS, AttentionSite, FFNSite
from petiole.methods.prompts.vectors import Vectors

NOTHING = {"form": "none"}


def point(name: str, **changes: Any) -> pt.UnifiedView:
    """A preset of small size, without dropout."""
    fields = {key: dict(value) if isinstance(value, dict) else value for key, value in PRESETS[name].items()}
    for key in ("attention", "ffn"):
        fields[key] |= {"bottleneck": 3, "dropout": 0.0, **({"hidden_size": 5} if key == "attention" else {})}
    return pt.UnifiedView(**{**fields, "length": 3, **changes})


def at_attention(**fields: Any) -> pt.UnifiedView:
    return pt.UnifiedView(attention={"bottleneck": 3, **fields}, ffn=NOTHING)


def at_ffn(**fields: Any) -> pt.UnifiedView:
    return pt.UnifiedView(attention=NOTHING, ffn={"bottleneck": 3, **fields})


FORMS = {
    **{name: point(name) for name in PRESETS},
    "attention adapter": at_attention(form="adapter"),
    "attention adapter in sequence": at_attention(form="adapter", insertion="sequential"),
    "multi-head adapter": at_attention(form="multihead_adapter", reparametrisation="none"),
    "prefix without gate": at_attention(composition="add", reparametrisation="none"),
    "scaled prefix": at_attention(composition="scaled", scale=0.5, hidden_size=5),
    "norm after": at_ffn(norm="out", learn_scale=True),
    "no biases": at_ffn(bias=False, activation="gelu"),
}


def attached(family: str, method: pt.Method, **options: Any) -> tuple[nn.Module, pt.Adaptation]:
    """With every parameter moved, on weights so large that a change is seen."""
    model = toys.model(family)
    tuned = pt.attach(model, method, train_head=False, **options)
    toys.shake(tuned)
    return model, tuned


def recorded(model: nn.Module, batch: dict[str, Any], *paths: str) -> list[Tensor]:
    """What modules give: as others see it, hence with what is attached to them."""
    seen: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(path).register_forward_hook(lambda m, a, y, path=path: seen.update({path: y}))  # type: ignore[misc]
        for path in paths
    ]
    toys.output(model, batch)
    for handle in handles:
        handle.remove()
    return [seen[path] for path in paths]


# ------------------------------------------------------------------------------------------------------------- must hold


# 1
@pytest.mark.parametrize("family", ["bert", "llama", "bart"])
def test_what_starts_at_the_frozen_model(family: str) -> None:
    batch = tiny.batch(family)
    bare = toys.output(toys.model(family).requires_grad_(False), batch)
    for name in ("scaled_parallel_ffn", "lora_attn", "lora_ffn"):
        model = toys.model(family)
        pt.attach(model, point(name), train_head=False)
        assert torch.equal(toys.output(model, batch), bare), name
    elsewhere = [
        "mam",
        "prefix",
        "houlsby",
        "parallel_ffn",
        "prompt_tuning",
        "prefix_parallel_ffn",
        "multihead_parallel_ffn",
    ]
    for name in elsewhere + (["pfeiffer"] if family != "llama" else []):
        model = toys.model(family)
        pt.attach(model, point(name), train_head=False)
        assert not torch.equal(toys.output(model, batch), bare), name


class Recorder(AttentionDelta):
    """Keeps what goes into an attention and what its heads give."""

    def heads_output(self, output: Tensor, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        self.seen = output, query, key, value, scaling
        return output


# 2
@pytest.mark.parametrize("family", ["bert", "llama", "bart", "t5"])
def test_a_prefix_before_the_keys_is_the_gated_change(family: str) -> None:
    """With padding, causal masks, cross-attention, grouped queries."""
    model, batch = toys.model(family, attn_implementation="eager"), tiny.batch(family)
    if family == "t5":  # whose positions are added to the scores
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.mul_("relative_attention_bias" not in name)
    recorders = toys.method(lambda anatomy: [Place(site, Recorder()) for site in anatomy.attentions()])
    tuned = pt.attach(model, [at_attention(reparametrisation="none"), recorders], train_head=False)
    toys.shake(tuned, 1.0)
    masks: dict[str, Tensor | None] = {}
    for slot in tuned.slots:

        def keep(module: nn.Module, args: Any, kwargs: Any, path: str = slot.site.core) -> None:
            given = ("attention_mask", "mask", "key_value_states")
            masks[path] = next((kwargs[name] for name in given if isinstance(kwargs.get(name), Tensor)), None)
            assert masks[path] is None or masks[path].ndim == 4 or family == "t5"

        model.get_submodule(slot.site.core).register_forward_pre_hook(keep, with_kwargs=True)
    toys.output(model, batch)
    seen = [slot for slot in tuned.slots if isinstance(slot.delta, Recorder)]
    assert len(seen) == len(tuned.slots) / 2 >= 2
    for slot in seen:
        output, q, k, v, scaling = slot.delta.seen
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        (P_k, K), (P_v, V) = (t.split([3, t.shape[2] - 3], 2) for t in (k, v))
        e, f = q @ P_k.mT * scaling, q @ K.mT * scaling
        mask = masks[slot.site.core]
        f = f if mask is None else f + mask
        gate = torch.sigmoid(e.logsumexp(-1) - f.logsumexp(-1))[..., None]
        gated = (1 - gate) * (f.softmax(-1) @ V) + gate * (e.softmax(-1) @ P_v)
        assert 0.01 < float(gate.mean()) < 0.99
        torch.testing.assert_close(output, gated.transpose(1, 2), rtol=1e-5, atol=1e-5)


# 3
def test_the_published_counts() -> None:
    from transformers import BartConfig, BartForConditionalGeneration

    with torch.device("meta"):
        bart = BartForConditionalGeneration(BartConfig())
    d, L, m = 1024, 12, 800
    assert sum(p.numel() for p in bart.parameters()) == 406_291_456

    def trains(method: pt.Method) -> int:
        tuned = pt.attach(bart, method)
        stored = sum(tensor.numel() for tensor in tuned.named_tensors().values())
        count = tuned.trainable
        tuned.detach()
        if method.folded() != method:  # what a file holds is what would train without the MLP
            assert stored == trains(method.folded())
        else:
            assert stored == count
        return count

    def free(name: str) -> pt.UnifiedView:
        """Without biases, norms or the MLP: as the paper counts."""
        fields = {key: dict(value) for key, value in PRESETS[name].items()}
        fields["attention"] |= {"bias": False, "reparametrisation": "none"}
        fields["ffn"] |= {"bias": False}
        return pt.UnifiedView(**fields)

    assert trains(free("prefix")) == 2 * 200 * d * 3 * L == 14_745_600
    assert trains(free("parallel_ffn")) == 2 * 1024 * d * 2 * L == 50_331_648
    assert trains(free("pfeiffer")) == 2 * 600 * d * 2 * L
    assert trains(free("mam")) == 2 * 30 * d * 3 * L + 2 * 512 * d * 2 * L == 27_377_664
    assert trains(free("lora_attn")) == 4 * 16 * d * 3 * L
    assert trains(free("lora_ffn")) == 10 * 102 * d * 2 * L
    assert trains(free("houlsby")) == 2 * 200 * d * 5 * L
    adapter = {"form": "adapter", "bottleneck": 200, "bias": False, "norm": "none"}
    assert trains(pt.UnifiedView(attention=adapter, ffn=NOTHING)) == 2 * 200 * d * 3 * L
    whole = pt.UnifiedView.preset("mam")
    assert trains(whole.folded()) == 27_377_664 + 2 * L * (512 + d) == 27_377_664 + 36_864
    mlp = 3 * (30 * d + d * m + m) + 3 * L * (m * 2 * d + 2 * d)
    assert trains(whole) == mlp + 24 * (2 * 512 * d + 512 + d)
    assert trains(pt.MAM(length=30, bottleneck=512, scale=4.0)) == 27_377_664 + 36_864
    assert trains(pt.UnifiedView.preset("bitfit")) == sum(
        p.numel() for n, p in bart.named_parameters() if n.endswith("bias")
    )


# 4
@pytest.mark.parametrize("name", ["lora_attn", "lora_ffn"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_lora_merges(family: str, name: str) -> None:
    model, tuned = attached(family, point(name))
    model.double()
    batch, before = tiny.batch(family), {n: p.clone() for n, p in model.named_parameters()}
    expected = toys.output(model, batch)
    tuned.merge()
    torch.testing.assert_close(toys.output(model, batch), expected, rtol=1e-5, atol=1e-5)
    tuned.unmerge()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_what_can_be_merged_of_a_hybrid() -> None:
    hybrid = pt.UnifiedView(attention={"form": "lora", "bottleneck": 3}, ffn={"bottleneck": 3})
    model, tuned = attached("bert", hybrid)
    model.double()
    batch = tiny.batch("bert")
    expected = toys.output(model, batch)
    with pytest.raises(AttachError, match=r"merge\(partly=True\) folds the rest"):
        tuned.merge()
    tuned.merge(partly=True)
    assert {slot.site.role for slot in tuned.slots if slot.merged} == {"q", "v"}
    torch.testing.assert_close(toys.output(model, batch), expected, rtol=1e-5, atol=1e-5)
    _, mam = attached("bert", pt.MAM(length=3, bottleneck=3))
    with pytest.raises(AttachError, match="mam can't be merged: what it computes is not a change of a weight"):
        mam.merge()


# 5
@pytest.mark.parametrize(
    "fields", [{}, {"composition": "add"}, {"form": "multihead_adapter"}], ids=["prefix", "add", "multi-head"]
)
def test_the_mlp_folds_away(fields: dict[str, Any], tmp_path: Path) -> None:
    from safetensors import safe_open

    model, tuned = attached("bart", at_attention(**fields))
    assert tuned.shared
    batch, path = tiny.batch("bart"), tuned.save(tmp_path / "x.safetensors")
    with safe_open(path, "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    vectors = {name: shape for name, shape in shapes.items() if ":norm." not in name}
    assert len(vectors) == 2 * 6 and all(shape == [3, 32] for shape in vectors.values())
    assert len(shapes) == len(vectors) + (12 if fields.get("form") else 0)
    other = toys.model("bart")
    again = pt.load(other, path)
    assert not again.shared and again.methods[0].attention.reparametrisation == "none"
    assert torch.equal(toys.output(other, batch), toys.output(model, batch))


def test_the_mlp_runs_once_while_its_parameters_stay() -> None:
    model, tuned = attached("gpt2", at_attention())
    calls: list[int] = []
    (trunk,) = tuned.shared.values()
    trunk.register_forward_hook(lambda *_: calls.append(1))
    tokens = tiny.batch("gpt2")["input_ids"]
    model.generate(tokens, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert len(calls) == 2  # one for each block
    toys.shake(tuned)
    toys.output(model, {"input_ids": tokens})
    assert len(calls) == 4


# 6
@pytest.mark.parametrize("name", [name for name in FORMS if name != "bitfit"])
def test_gradients_reach_the_change_and_the_head_alone(name: str) -> None:
    model = toys.model("bert")
    tuned = pt.attach(model, FORMS[name])
    toys.shake(tuned)
    model.train()
    model(**tiny.batch("bert")).loss.backward()
    own = {id(p) for p in tuned.parameters()}
    assert all((p.grad is None) == (id(p) not in own) for p in model.parameters())
    assert all(bool(p.grad.any()) for p in tuned.parameters())


# 7
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_a_multi_head_adapter_by_hand(family: str) -> None:
    """Queries from a norm of the input, through the frozen projection and not scaled, added before the output projection."""
    model, batch = toys.model(family), tiny.batch(family)
    bare = copy.deepcopy(model)
    tuned = pt.attach(
        model, at_attention(form="multihead_adapter", reparametrisation="none", scale=0.5), train_head=False
    )
    toys.shake(tuned, 0.5)
    slot = tuned.slots[0]
    delta, heads = slot.delta, 4
    assert isinstance(delta, HeadAdapters) and delta.key.shape == (3, 32)
    for other in tuned.slots[1:]:  # the first block alone changes
        set_(other.delta.value, torch.zeros_like(other.delta.value))
    query, held = copy.deepcopy(bare.get_submodule(delta.query.path)), {}

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        held["x"] = args[0] if args else kwargs["hidden_states"]

    def project(module: nn.Module, args: Any) -> Any:
        u = nn.functional.layer_norm(held["x"], (32,), delta.norm.weight, delta.norm.bias)
        q = query(u)[..., :32].unflatten(-1, (heads, 8))  # GPT-2's holds k and v behind q
        key, value = delta.key.unflatten(-1, (heads, 8)), delta.value.unflatten(-1, (heads, 8))
        weights = torch.relu(torch.einsum("bthd,lhd->bthl", q, key))
        return (args[0] + 0.5 * torch.einsum("bthl,lhd->bthd", weights, value).flatten(-2),)

    bare.get_submodule(slot.place.read.core).register_forward_pre_hook(enter, with_kwargs=True)
    bare.get_submodule(slot.site.path).register_forward_pre_hook(project)
    torch.testing.assert_close(toys.output(model, batch), toys.output(bare, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_an_adapter_beside_an_attention_changes_its_heads(family: str) -> None:
    """With the same weights behind the output projection it is another change."""
    model, tuned = attached(family, at_attention(form="adapter", norm="none"))
    slot, batch = tuned.slots[0], tiny.batch(family)
    assert (slot.site.role, slot.site.side) == ("o", "input")
    other = toys.model(family)
    behind = pt.attach(other, pt.ParallelAdapter(bottleneck=3, roles=["attention"]), train_head=False)
    for one, two in zip(tuned.slots, behind.slots, strict=True):
        two.delta.load_state_dict(one.delta.state_dict())
    assert not torch.allclose(toys.output(other, batch), toys.output(model, batch), rtol=1e-2, atol=1e-2)
    hand = toys.model(family)
    for one in tuned.slots:
        held: dict[str, Tensor] = {}
        hand.get_submodule(one.place.read.core).register_forward_pre_hook(
            lambda m, a, k, held=held: held.update(x=a[0] if a else k["hidden_states"]), with_kwargs=True
        )  # type: ignore[misc]
        hand.get_submodule(one.site.path).register_forward_pre_hook(
            lambda m, a, held=held, delta=one.delta: (a[0] + delta(held["x"]),)  # type: ignore[misc]
        )
    torch.testing.assert_close(toys.output(hand, batch), toys.output(model, batch), rtol=1e-4, atol=1e-5)


def test_a_prefix_without_its_gate_by_hand() -> None:
    model, batch = toys.model("llama", attn_implementation="eager"), tiny.batch("llama")
    fields = {"composition": "scaled", "scale": 0.5, "reparametrisation": "none"}
    recorders = toys.method(lambda anatomy: [Place(site, Recorder()) for site in anatomy.attentions()])
    first, second = recorders, recorders.model_copy()
    tuned = pt.attach(model, [first, at_attention(**fields), second], train_head=False)
    toys.shake(tuned, 1.0)
    toys.output(model, batch)
    for depth in (0, 1):
        before, change, after = (s.delta for s in tuned.slots if s.site.depth == depth)
        output, query, key, _, scaling = before.seen
        P_k, P_v = (p.unflatten(-1, (2, 8)).repeat_interleave(2, 1) for p in (change.key, change.value))
        assert key.shape[2] == batch["input_ids"].shape[1]  # keys and values are as they were
        weights = (torch.einsum("bhtd,lhd->bhtl", query, P_k) * scaling).softmax(-1)
        wanted = output + 0.5 * torch.einsum("bhtl,lhd->bthd", weights, P_v)
        torch.testing.assert_close(after.seen[0], wanted, rtol=1e-5, atol=1e-5)


# 8
@pytest.mark.parametrize("make", [at_ffn, at_attention], ids=["ffn", "attention"])
def test_the_scale_acts_on_the_change_alone(make: Any) -> None:
    def changed(scale: float) -> Tensor:
        composition = {} if make is at_ffn else {"composition": "scaled"}
        method = make(form="adapter", scale=scale, **composition).model_copy(update={"layers": (0,)})
        model, tuned = attached("bert", method)
        return recorded(model, tiny.batch("bert"), tuned.slots[0].site.exit)[0]

    one, two, three = (changed(scale).double() for scale in (1.0, 2.0, -3.0))
    torch.testing.assert_close(three - one, -4 * (two - one), rtol=1e-4, atol=1e-5)
    assert float((two - one).abs().max()) > 0.01


# 9
@pytest.mark.parametrize("name", [name for name in FORMS if name not in ("bitfit", "pfeiffer")])
def test_generation_with_a_cache_and_beams(name: str) -> None:
    for family in ("bart", "gpt2"):
        model, _ = attached(family, FORMS[name])
        batch = tiny.batch(family)
        options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": 3}
        given = {"attention_mask": batch["attention_mask"], **options}
        tokens = batch["input_ids"]
        if family == "gpt2":
            given["attention_mask"] = given["attention_mask"].flip(1)
        cached = model.generate(tokens, use_cache=True, **given)
        assert torch.equal(cached, model.generate(tokens, use_cache=False, **given)), family
        found = model.generate(tokens, use_cache=True, return_dict_in_generate=True, **given).past_key_values
        cache = getattr(found, "self_attention_cache", found)
        extra = 3 if name == "prompt_tuning" and family == "gpt2" else 0
        assert cache.get_seq_length() == cached.shape[1] - 1 + extra  # a prefix is never put into it


# 10
@pytest.mark.parametrize("name", list(FORMS))
def test_padding_changes_nothing(name: str) -> None:
    for family in ("bert", "bart"):
        model, _ = attached(family, FORMS[name])
        batch = {k: v for k, v in tiny.batch(family).items() if k in ("input_ids", "attention_mask")}
        batch = {key: value[:, :6] for key, value in batch.items()}  # rows without padding
        if family == "bart":
            batch["decoder_input_ids"] = batch["input_ids"][:, :4]
        padded = {**batch, **{k: nn.functional.pad(batch[k], (0, 3)) for k in ("input_ids", "attention_mask")}}
        one, other = (toys.output(model, given) for given in (batch, padded))
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ its points, one by one


@pytest.mark.parametrize(
    ("name", "baseline"),
    [
        ("prefix", pt.PrefixTuning(length=3, reparametrisation="mlp", hidden_size=5)),
        ("houlsby", pt.HoulsbyAdapter(bottleneck=3, init="bert")),
        ("parallel_ffn", pt.ParallelAdapter(bottleneck=3, init="bert")),
        ("scaled_parallel_ffn", pt.ScaledParallelAdapter(bottleneck=3)),
        ("lora_attn", pt.LoRA(rank=3, alpha=6.0)),
        ("lora_ffn", pt.LoRA(rank=3, alpha=3 * 32 / 102, roles=["up", "down"])),
        ("prompt_tuning", pt.PromptTuning(length=3, init="normal")),
        ("bitfit", pt.BitFit()),
        ("mam", pt.MAM(length=3, bottleneck=3, scale=4.0, reparametrisation="mlp", hidden_size=5)),
    ],
)  # fmt: skip
def test_a_preset_is_its_baseline(name: str, baseline: pt.Method) -> None:
    for family in ("bart", "bert"):
        one, other, batch = toys.model(family), toys.model(family), tiny.batch(family)
        mine, theirs = pt.attach(one, point(name)), pt.attach(other, baseline)
        tensors, others = (tuned.named_tensors(folded=False) for tuned in (mine, theirs))
        assert tensors.keys() == others.keys()
        for key, tensor in tensors.items():
            assert torch.equal(tensor, others[key]), key
            tensor.add_(torch.randn(tensor.shape), alpha=0.1)
            others[key].copy_(tensor)
        assert torch.equal(toys.output(one, batch), toys.output(other, batch))


@pytest.mark.parametrize("family", ["bert", "distilbert", "bart", "albert", "torch_encoder"])
def test_pfeiffer_in_the_form_of_the_reference(family: str) -> None:
    """y = LN(f + A(LN(f + x)) + x): the norm that ends the block, used twice."""
    model, tuned = attached(family, point("pfeiffer"))
    assert {type(slot.delta) for slot in tuned.slots} == {Renormed}
    hand, batch = toys.model(family), tiny.batch(family)
    for slot in tuned.slots:
        norm = hand.get_submodule(slot.site.path)
        again = copy.deepcopy(norm)
        norm.register_forward_pre_hook(
            lambda module, args, again=again, delta=slot.delta: (args[0] + Bottleneck.forward(delta, again(args[0])),)  # type: ignore[misc]
        )
    torch.testing.assert_close(toys.output(model, batch), toys.output(hand, batch), rtol=1e-4, atol=1e-5)
    other = toys.model(family)
    plain = pt.attach(other, pt.PfeifferAdapter(bottleneck=3), train_head=False)
    for one, two in zip(tuned.slots, plain.slots, strict=True):
        two.delta.load_state_dict(one.delta.state_dict())
    assert not torch.allclose(toys.output(other, batch), toys.output(model, batch), rtol=1e-2, atol=1e-2)


def test_sequential_and_parallel_differ() -> None:
    batch, found = tiny.batch("bert"), []
    for insertion in ("parallel", "sequential", "pfeiffer"):
        model, tuned = attached("bert", at_ffn(insertion=insertion, init="bert"))
        found.append((toys.output(model, batch), tuned))
        for slot, first in zip(tuned.slots, found[0][1].slots, strict=True):
            slot.delta.load_state_dict(first.delta.state_dict())
        found[-1] = (toys.output(model, batch), tuned)
    outputs = [output for output, _ in found]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert not torch.allclose(outputs[i], outputs[j], rtol=1e-2, atol=1e-2)


def test_an_adapter_in_its_order() -> None:
    """LN_in -> down -> f -> up -> s -> LN_out."""
    for norm in ("in", "out"):
        _, tuned = attached("bert", at_ffn(norm=norm, learn_scale=True, scale=2.0, activation="gelu"))
        delta, x = tuned.slots[0].delta, torch.randn(2, 5, 32)
        assert isinstance(delta, HiddenDelta) and delta.scale.shape == ()
        u = delta.norm_in(x) if norm == "in" else x
        y = delta.scale * delta.up(nn.functional.gelu(delta.down(u)))
        torch.testing.assert_close(delta(x), delta.norm_out(y) if norm == "out" else y)
    fresh = pt.attach(toys.model("bert"), at_ffn(learn_scale=True, scale=2.0)).slots[0].delta
    assert fresh.scale.item() == 2.0


def test_numbers_at_the_start() -> None:
    model = tiny.model("bert", hidden_size=256, num_hidden_layers=1)
    tuned = pt.attach(
        model, pt.UnifiedView(attention={"form": "adapter", "bottleneck": 64}, ffn={"bottleneck": 64}), train_head=False
    )
    bert, lora = (slot.delta for slot in tuned.slots)
    assert abs(float(bert.down.weight.std()) - 0.02) < 5e-4 and abs(float(bert.up.weight.std()) - 0.02) < 5e-4
    assert float(lora.down.weight.abs().max()) <= 1 / 16 and abs(float(lora.down.weight.std()) - 3**-0.5 / 16) < 1e-3
    assert not lora.up.weight.any() and not any(layer.bias.any() for d in (bert, lora) for layer in (d.down, d.up))
    pair = pt.attach(model, at_attention(bottleneck=64, reparametrisation="none"), name="b").slots[0].delta
    assert all(abs(float(p.std()) - 0.02) < 5e-4 for p in (pair.key, pair.value))


@pytest.mark.parametrize("name", list(FORMS))
def test_every_form_is_checked_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model = toys.model("bart")
    tuned = pt.attach(model, FORMS[name])
    tuned.check(tiny.batch("bart"))
    toys.shake(tuned)
    other = toys.model("bart")
    pt.load(other, tuned.save(tmp_path / "x.safetensors"))
    batch = tiny.batch("bart")
    assert torch.equal(toys.output(other, batch), toys.output(model, batch))


NEW = ("attention adapter", "multi-head adapter", "prefix without gate", "pfeiffer")  # forms that no baseline has


@pytest.mark.parametrize("name", NEW)
def test_new_forms_compile(name: str) -> None:
    torch._dynamo.reset()
    model, _ = attached("bert", FORMS[name])
    model.double()
    batch = {key: value for key, value in tiny.batch("bert").items() if key != "labels"}
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(toys.output(compiled, batch), toys.output(model, batch), rtol=1e-6, atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", NEW)
def test_new_forms_in_half_precision_and_under_checkpointing(name: str) -> None:
    batch, exact = tiny.batch("bert"), toys.model("bert")
    tuned = pt.attach(exact, FORMS[name])
    toys.shake(tuned, 0.01)
    values = tuned.named_tensors(folded=False)
    half = toys.model("bert").to(torch.bfloat16)
    other = pt.attach(half, FORMS[name])
    for key, tensor in other.named_tensors(folded=False).items():
        tensor.copy_(values[key])
    found, expected = half(**batch).logits, toys.output(exact, batch)
    assert found.dtype == torch.bfloat16 and float((found.float() - expected).norm() / expected.norm()) < 0.1
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            exact.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        exact.train().zero_grad()
        exact(**batch).loss.backward()
        gradients.append([p.grad.clone() for p in tuned.parameters()])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_lora_is_exported(tmp_path: Path) -> None:
    """As a checkpoint of PEFT's, with the scale as alpha over rank."""
    import json

    _, tuned = attached("bert", point("lora_attn"))
    print(tuned.export(tmp_path / "lora"))
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["r"] == 3 and config["lora_alpha"] == 6.0


def test_rows_may_take_different_points() -> None:
    names = [name for name in FORMS if name != "bitfit"]
    model, batch = toys.model("bert").double(), tiny.batch("bert", size=len(names) + 1)
    for number, name in enumerate(names):
        toys.shake(pt.attach(model, FORMS[name], name=f"n{number}", train_head=False), 0.05, seed=number)
    model.double()
    rows = [f"n{number}" for number in range(len(names))]
    with pt.route(model, [*rows, None]):
        mixed = toys.output(model, batch)
    for row, (adaptation, name) in enumerate(zip([*rows, None], [*names, "bare"], strict=True)):
        with pt.route(model, adaptation):
            torch.testing.assert_close(mixed[row], toys.output(model, batch)[row], rtol=1e-5, atol=1e-5, msg=name)


# ---------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("site", "fields", "field"),
    [
        (AttentionSite, {"bottleneck": 0}, "bottleneck"),
        (FFNSite, {"bottleneck": 0}, "bottleneck"),
        (AttentionSite, {"form": "adapter", "composition": "gate"}, "composition"),
        (AttentionSite, {"form": "lora", "composition": "gate"}, "composition"),
        (AttentionSite, {"form": "multihead_adapter", "composition": "gate"}, "composition"),
        (AttentionSite, {"scale": 2.0}, "composition"),
        (AttentionSite, {"form": "adapter", "composition": "add", "scale": 2.0}, "composition"),
        (AttentionSite, {"insertion": "sequential"}, "insertion"),
        (AttentionSite, {"form": "lora", "insertion": "sequential"}, "insertion"),
        (AttentionSite, {"form": "adapter", "insertion": "pfeiffer"}, "insertion"),
        (FFNSite, {"form": "lora", "insertion": "sequential"}, "insertion"),
        (FFNSite, {"form": "lora", "insertion": "pfeiffer"}, "insertion"),
        (AttentionSite, {"form": "lora", "norm": "in"}, "norm"),
        (AttentionSite, {"form": "lora", "norm": "out"}, "norm"),
        (AttentionSite, {"norm": "in"}, "norm"),
        (AttentionSite, {"form": "multihead_adapter", "norm": "out"}, "norm"),
        (FFNSite, {"form": "lora", "norm": "out"}, "norm"),
        (AttentionSite, {"form": "adapter", "scale": 0.0}, "scale"),
        (FFNSite, {"scale": 0.0}, "scale"),
        (FFNSite, {"form": "lora", "scale": -1.0}, "scale"),
        (FFNSite, {"form": "lora", "learn_scale": True}, "learn_scale"),
        (FFNSite, {"dropout": 1.0}, "dropout"),
        (FFNSite, {"bottleneck": True}, "bottleneck"),
        (FFNSite, {"form": "prefix"}, "form"),
    ],
)  # fmt: skip
def test_values_that_are_refused(site: type, fields: dict[str, Any], field: str) -> None:
    """By themselves and within a configuration, with the same words."""
    with pytest.raises(ConfigError, match=rf"^{site.__name__}\.{field} = ") as caught:
        site(**fields)
    assert len(str(caught.value).splitlines()) <= 3
    with pytest.raises(ConfigError) as within:
        pt.UnifiedView(**{"attention" if site is AttentionSite else "ffn": fields})
    assert str(within.value) == str(caught.value)


def test_what_else_is_refused_and_what_is_not() -> None:
    assert FFNSite(init="lora", learn_scale=True).learn_scale
    with pytest.raises(ConfigError, match="nothing would change"):
        pt.UnifiedView(attention=NOTHING, ffn=NOTHING)
    with pytest.raises(ConfigError, match="no preset is called 'mma': mam, prefix"):
        pt.UnifiedView.preset("mma")
    with pytest.raises(ConfigError, match=r"FFNSite has no field 'layernorm'"):
        pt.UnifiedView(ffn={"layernorm": "in"})
    with pytest.raises(ConfigError, match=r"MAM\.scale = 0"):
        pt.MAM(scale=0.0)


def test_places_that_are_refused() -> None:
    for form in ("prefix", "multihead_adapter"):
        with pytest.raises(AttachError, match="has no attention"):
            pt.attach(tiny.model("resnet"), at_attention(form=form))
        model = tiny.model("bert")
        found = pt.anatomy(model)
        blocks = tuple(
            dataclasses.replace(
                block,
                sites=tuple(dataclasses.replace(s, heads=5, key_value_heads=5) if s.heads else s for s in block.sites),
            )
            for block in found.stacks[0].blocks
        )
        stacks = (dataclasses.replace(found.stacks[0], blocks=blocks),)
        with pytest.raises(AttachError, match=r"the 32 features of encoder\.0\.[qk] don't divide by its 5 heads"):
            pt.attach(model, at_attention(form=form), found=dataclasses.replace(found, stacks=stacks))
    for fields in ({}, {"composition": "add"}):
        with pytest.raises(AttachError, match="takes no extra keys"):
            pt.attach(tiny.model("torch_encoder"), at_attention(**fields))
    for form in ("adapter", "multihead_adapter"):
        with pytest.raises(AttachError, match="calls no output projection"):
            pt.attach(tiny.model("torch_encoder"), at_attention(form=form))
    with pytest.raises(AttachError, match="does not go through"):
        pt.attach(tiny.model("mpnet"), at_attention())
    for family in ("llama", "vit", "t5", "whisper"):
        with pytest.raises(
            AttachError, match=r"has no norm after .*ffn and its residual, which it would use\n.*sequential"
        ):
            pt.attach(tiny.model(family), point("pfeiffer"))


def test_a_norm_that_runs_before_the_ffn_is_not_taken_for_the_one_that_ends_the_block() -> None:
    """In a pre-norm stack that nothing tells apart, the first batch does."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    pt.attach(model, point("pfeiffer"))
    with pytest.raises(AttachError, match="was not called before what it writes"):
        model(torch.randn(2, 5, 32))


@pytest.mark.parametrize("name", [*(name for name in FORMS if name != "pfeiffer"), "MAM"])
def test_one_stack_alone(name: str) -> None:
    """The language model behind an image encoder that it reads but one state of."""
    method = (
        pt.MAM(length=3, bottleneck=3, stack="text")
        if name == "MAM"
        else FORMS[name].model_copy(update={"stack": "text"})
    )
    model = tiny.model("llava")
    tuned = pt.attach(model, method)
    assert {slot.site.stack for slot in tuned.slots} <= {"text"} and (tuned.slots or name == "bitfit")
    if name != "bitfit":
        tuned.check(tiny.batch("llava"))


def test_vectors_are_of_the_heads_that_hold_keys() -> None:
    tuned = pt.attach(tiny.model("llama"), [at_attention(composition="add", reparametrisation="none")])
    assert all(slot.delta.key.shape == (3, 16) for slot in tuned.slots if isinstance(slot.delta, Vectors))
