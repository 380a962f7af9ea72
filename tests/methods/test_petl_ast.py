"""What the adapters of audio spectrogram transformers must hold, by their paper."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from transformers import ASTConfig, ASTForAudioClassification

import petiole as pt
import tiny
import toys
from petiole.errors import AttachError, ConfigError, TrainingError
from petiole.methods.adapters.ast import lora, prefix, prompts
from petiole.methods.adapters.batchnorm import BatchNorm
from petiole.methods.prompts.pooled import Pool
from petiole.training import Events
from training import children

D, B, LAYERS = 32, 8, 2
SMALL: dict[str, Any] = {"reduction_factor": 4, "kernel_size": 5}


def ast() -> Any:
    return copy.deepcopy(toys.model("ast"))


def attached(model: nn.Module, *methods: pt.Method, size: float = 0.3) -> pt.Adaptation:
    tuned = pt.attach(model, methods or pt.ASTAdapter(**SMALL))
    toys.shake(tuned, size)
    return tuned


def adapters(tuned: pt.Adaptation) -> list[Any]:
    """The deltas, the head's aside."""
    return [slot.delta for slot in slots(tuned)]


def slots(tuned: pt.Adaptation) -> list[Any]:
    return [slot for slot in tuned.slots if slot.number >= 0]


def logits(model: nn.Module, rows: int = 2, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(**{**tiny.batch("ast", size=rows), **inputs}).logits


def states(rows: int = 2, tokens: int = 10, seed: int = 0, size: int = D) -> Tensor:
    return torch.randn(rows, tokens, size, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------------- counts


def full_size() -> Any:
    with torch.device("meta"):
        return ASTForAudioClassification(ASTConfig())


def of_deltas(tuned: pt.Adaptation) -> int:
    return sum(p.numel() for delta in adapters(tuned) for p in delta.parameters())


FINAL, HEAD = 2 * 768, 2 * 768 + 768 * 2 + 2  # of the model; of the head with its own norm, 2 classes


@pytest.mark.parametrize(
    ("fields", "site", "sites"),
    [
        ({}, 19_488, 12),
        ({"roles": ["attention", "ffn"]}, 19_488, 24),
        ({"block": "bottleneck"}, 13_064, 12),
        ({"block": "convpass"}, 13_064 + 8 * 8 * 3 + 8, 12),
        ({"insertion": "sequential", "position": "before", "roles": ["attention"]}, 19_488, 12),
        ({"kernel_size": 8, "layers": [0, -1]}, 19_488 - 8 * 23, 2),
        ({"reduction_factor": 64}, 3 * 768 * 12 + 12 * (31 + 5) + 768, 12),
    ],
)
def test_counts_at_full_size(fields: dict[str, Any], site: int, sites: int) -> None:
    tuned = pt.attach(full_size(), pt.ASTAdapter(**fields))
    assert of_deltas(tuned) == site * sites
    assert tuned.trainable == (site + 2 * 768) * sites + FINAL + HEAD


def test_with_its_norms_it_is_the_share_of_the_paper() -> None:
    model = full_size()
    tuned = pt.attach(model, pt.ASTAdapter())
    assert of_deltas(tuned) == 233_856
    assert of_deltas(tuned) + 12 * 2 * 768 == 252_288 == tuned.trainable - FINAL - HEAD
    backbone = sum(p.numel() for p in full_size().audio_spectrogram_transformer.parameters())
    assert round(100 * 252_288 / backbone, 2) == 0.29
    tuned.detach()
    assert pt.attach(model, pt.ASTAdapter(train_layernorm=False)).trainable == 233_856 + FINAL + HEAD


def test_counts_of_the_other_methods() -> None:
    model = full_size()

    def count(*methods: pt.Method) -> int:
        tuned = pt.attach(model, methods)
        found = tuned.trainable - HEAD
        tuned.detach()
        return found

    assert count(lora(768)) == 12 * 2 * 12 * 2 * 768
    assert count(lora(768, roles=("q", "k", "v", "o"))) == 12 * 4 * 12 * 2 * 768
    assert count(prompts()) == 12 * 25 * 768
    assert count(prompts(deep=False, length=1)) == 768
    assert count(prefix()) == 12 * 24 * 768
    assert count(pt.LinearProbe(final_norm=True, pool="all")) == FINAL
    biases = 12 * (4 * 768 + 3072 + 768 + 2 * 768) + 768
    assert count(pt.BitFit(convolutions=False)) == biases
    assert count(pt.BitFit()) == biases + 768


# ------------------------------------------------------------------------------------------------------------- insertion


def spread_out(fields: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """One adapted layer as a whole, and by its formula: x -> what the spec writes, with A the adapters' own function."""
    model = ast()
    bare, x = copy.deepcopy(model.audio_spectrogram_transformer.layers[0]), states(tokens=10)
    method = pt.ASTAdapter(**{**SMALL, **fields, "layers": [0], "train_layernorm": False})
    branches = {slot.site.role: slot.delta for slot in slots(attached(model, method)) if list(slot.delta.parameters())}
    residual = method.residual if method.residual is not None else method.insertion == "sequential"
    after = (method.position or ("after" if method.insertion == "sequential" else "before")) == "after"

    def sublayer(f: Any, u: Tensor, A: Any) -> Tensor:
        if A is None:
            return f(u)
        keep = 1.0 if residual else 0.0
        if A.residual:
            keep = 0.0  # it is in A
        if method.insertion == "parallel":
            source = f(u) if after else u
            return f(u) + A(source) + keep * source
        if after:
            return A(f(u)) + keep * f(u)
        v = A(u) + keep * u
        return f(v) + v

    with torch.no_grad():
        wanted = x + sublayer(lambda u: bare.attention(u)[0], bare.layernorm_before(x), branches.get("attention"))
        wanted = wanted + sublayer(bare.mlp, bare.layernorm_after(wanted), branches.get("ffn"))
        return model.audio_spectrogram_transformer.layers[0](x), wanted


@pytest.mark.parametrize("roles", [["ffn"], ["attention"], ["attention", "ffn"]])
@pytest.mark.parametrize("insertion", ["parallel", "sequential"])
@pytest.mark.parametrize("position", ["before", "after", None])
@pytest.mark.parametrize("residual", [None, True, False])
@pytest.mark.filterwarnings("ignore:petl-ast")
def test_every_insertion_is_its_formula(roles: Any, insertion: Any, position: Any, residual: Any) -> None:
    found, wanted = spread_out({"roles": roles, "insertion": insertion, "position": position, "residual": residual})
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_after_in_parallel_and_in_sequence_are_the_same() -> None:
    found = []
    for insertion in ("parallel", "sequential"):
        model = ast()
        attached(model, pt.ASTAdapter(**SMALL, insertion=insertion, position="after"))
        found.append(logits(model))
    assert torch.equal(*found)


@pytest.mark.parametrize("block", ["conformer", "bottleneck", "convpass"])
@pytest.mark.parametrize("insertion", ["parallel", "sequential"])
def test_it_starts_at_the_backbone_and_learns_from_the_first_step(block: Any, insertion: Any) -> None:
    model = ast()
    before = logits(model)
    tuned = pt.attach(
        model, pt.ASTAdapter(block=block, reduction_factor=4, insertion=insertion, roles=["attention", "ffn"])
    )
    assert torch.equal(logits(model), before)
    model.train()
    assert torch.equal(logits(model), before)
    model(**tiny.batch("ast")).loss.backward()
    for adapter in adapters(tuned):
        assert adapter.up.weight.grad.any() and not adapter.up.weight.any() and not adapter.up.bias.any()


def test_the_reference_bottleneck_is_dead() -> None:
    model = ast().train()
    tuned = pt.attach(model, pt.ASTAdapter(block="bottleneck", reduction_factor=4, init="reference"))
    tuned.check(tiny.batch("ast"))
    model(**tiny.batch("ast")).loss.backward()
    for adapter in adapters(tuned):
        assert adapter.up.bias.grad.any()
        for parameter in (adapter.up.weight, adapter.down.weight, adapter.down.bias):
            assert not parameter.any() and not parameter.grad.any()


def test_the_reference_conformer_starts_elsewhere() -> None:
    model = ast()
    before = logits(model)
    pt.attach(model, pt.ASTAdapter(**SMALL, init="reference"))
    assert not torch.allclose(logits(model), before)


@pytest.mark.parametrize("roles", [["ffn"], ["attention", "ffn"]])
def test_what_trains(roles: Any) -> None:
    model = ast()
    tuned = pt.attach(model, pt.ASTAdapter(**SMALL, roles=roles))
    own = {name.removeprefix("audio_spectrogram_transformer.").rpartition(".")[0] for name in tuned.own}
    norms = {
        f"layers.{i}.{n}" for i in range(LAYERS) for n in ("layernorm_before", "layernorm_after")[2 - len(roles) :]
    }
    assert own == norms | {"layernorm"}
    model.train()
    model(**tiny.batch("ast")).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == any(parameter is p for p in tuned.parameters()), name


def test_norms_in_front_of_post_norm_sublayers() -> None:
    model = copy.deepcopy(toys.model("bert"))
    tuned = pt.attach(model, pt.ASTAdapter(**SMALL, roles=["attention", "ffn"]))
    own = {name.rpartition(".")[0] for name in tuned.own if "encoder" in name}
    layer = "bert.encoder.layer"
    assert own == {f"{layer}.{i}.attention.output.LayerNorm" for i in range(2)} | {f"{layer}.0.output.LayerNorm"}


# ---------------------------------------------------------------------------------------------------- along the tokens


def adapter_alone(**fields: Any) -> Any:
    """An adapter with weights of some size, in evaluation mode."""
    tuned = attached(ast(), pt.ASTAdapter(**{**SMALL, **fields}))
    adapter = adapters(tuned)[0].eval()
    if hasattr(adapter, "norm"):
        adapter.norm.running_mean.copy_(states(1, 1, size=B).flatten())
        adapter.norm.running_var.copy_(states(1, 1, 1, size=B).flatten().square() + 0.5)
    return adapter


@pytest.mark.parametrize("block", ["conformer", "convpass"])
@pytest.mark.parametrize("kernel_size", [1, 4, 5])
def test_a_shift_of_the_tokens_is_one_of_the_output(block: Any, kernel_size: int) -> None:
    adapter, x = adapter_alone(block=block, kernel_size=kernel_size), states(tokens=20)
    with torch.no_grad():
        one, other = adapter(x), adapter(x.roll(3, 1))
        torch.testing.assert_close(other[:, 3 + kernel_size : -kernel_size], one[:, kernel_size : -3 - kernel_size])
        order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
        assert torch.allclose(adapter(x[:, order]), one[:, order], atol=1e-5) == (kernel_size == 1)


@pytest.mark.parametrize(("kernel_size", "first", "last"), [(5, -2, 2), (4, -1, 2), (1, 0, 0), (2, 0, 1)])
def test_how_far_it_sees(kernel_size: int, first: int, last: int) -> None:
    """Even sizes pad one more behind, so that they look one further ahead."""
    adapter, x = adapter_alone(kernel_size=kernel_size), states(1, 20).requires_grad_()
    adapter(x)[0, 10].sum().backward()
    assert x.grad is not None
    seen = x.grad[0].abs().sum(-1).nonzero().flatten()
    assert (int(seen[0]) - 10, int(seen[-1]) - 10) == (first, last)


def test_the_norm_is_folded_into_the_convolution_in_evaluation() -> None:
    adapter, x = adapter_alone(), states()
    with torch.no_grad():
        z = nn.functional.glu(adapter.down(x))
        z = adapter.along(z, None, adapter.convolution.weight, adapter.convolution.bias)
        plain = adapter.up(nn.functional.silu(adapter.norm(z)))
        torch.testing.assert_close(adapter(x), plain)


@pytest.mark.parametrize("training", [False, True])
def test_a_sample_sees_its_batch_in_training_alone(training: bool) -> None:
    model = ast()
    attached(model)
    model.train(training)
    batch = tiny.batch("ast", size=4)["input_values"]
    whole, part = (logits(model, labels=None, input_values=rows) for rows in (batch, batch[:2]))
    assert torch.allclose(whole[:2], part, atol=1e-5) != training


@pytest.mark.parametrize("block", ["conformer", "convpass"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("pool", ["all", "patches"])
def test_padding_changes_nothing(block: Any, training: bool, pool: Any) -> None:
    """What stands in padded patches: neither the logits nor the running statistics know it. The model is given its token mask."""
    found = []
    mask = torch.ones(3, 10, dtype=torch.long)
    mask[1, 6:], mask[2, 8:] = 0, 0
    for fill in (0.0, 7.0):
        model = ast()
        tuned = attached(
            model,
            pt.ASTAdapter(block=block, reduction_factor=4, dropout=0.0),
            pt.LinearProbe(final_norm=True, pool=pool),
        )
        embeddings = model.audio_spectrogram_transformer.embeddings
        embeddings.register_forward_hook(lambda module, args, h, fill=fill: h.masked_fill(mask[..., None] == 0, fill))
        model.train(training)
        scores = logits(model, 3, attention_mask=mask)
        found.append([scores, *(b for s in tuned.slots for b in s.delta.buffers())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


# ------------------------------------------------------------------------------------------------- batch normalisation


def test_statistics_are_those_of_torch() -> None:
    own, torchs = BatchNorm(B), nn.BatchNorm1d(B)
    for _ in range(2):
        x = states(size=B)
        torch.testing.assert_close(own(x), torchs(x.flatten(0, 1)).view_as(x))
    for name, buffer in torchs.named_buffers():
        torch.testing.assert_close(dict(own.named_buffers())[name], buffer)
    torch.testing.assert_close(own.eval()(x), torchs.eval()(x.flatten(0, 1)).view_as(x))


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_checkpointing_moves_the_statistics_once(reentrant: bool | None) -> None:
    model = ast().train()
    tuned = attached(model)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    plain = ast().train()
    wanted = attached(plain)
    for each in (model, plain):
        each(**tiny.batch("ast")).loss.backward()
    for one, other in zip(adapters(tuned), adapters(wanted), strict=True):
        assert int(one.norm.num_batches_tracked) == 1
        torch.testing.assert_close(one.norm.running_mean, other.norm.running_mean)
        torch.testing.assert_close(one.norm.running_var, other.norm.running_var)


def test_a_backbone_in_evaluation_does_not_freeze_them() -> None:
    model = ast()
    tuned = attached(model)
    model.eval()
    assert tuned.train() is tuned
    modules = dict(model.named_modules())
    training = {name for name, module in modules.items() if module.training and not list(module.children())}
    assert {n for n in training if "petiole" not in n} == {
        *(
            f"audio_spectrogram_transformer.{n}layernorm{a}"
            for n, a in (("", ""), ("layers.0.", "_after"), ("layers.1.", "_after"))
        ),
    }
    logits(model)
    assert [int(adapter.norm.num_batches_tracked) for adapter in adapters(tuned)] == [1, 1]
    tuned.train(False)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_they_stay_in_full_precision(dtype: torch.dtype) -> None:
    norm = BatchNorm(B)
    norm(states(size=B))
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    norm.to(dtype)
    for name, buffer in norm.named_buffers():
        assert torch.equal(buffer, before[name]) and buffer.dtype == before[name].dtype
    assert norm(states(size=B).to(dtype)).dtype == dtype
    assert norm.running_mean.dtype == torch.float32


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_follows(autocast: bool) -> None:
    exact, half = ast(), ast() if autocast else ast().bfloat16()
    for model in (exact, half):
        attached(model, pt.ASTAdapter(**SMALL, train_layernorm=False), size=0.05)
        model.train()
    batch = tiny.batch("ast")
    wanted = exact(**batch).logits
    if not autocast:
        batch["input_values"] = batch["input_values"].bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = half(**batch)
    output.loss.backward()
    assert (output.logits.float() - wanted).norm() < 0.1 * wanted.norm()
    for adapter in adapters(pt.adaptations(half)["default"]):
        assert adapter.norm.running_var.dtype == torch.float32
        assert all(bool(torch.isfinite(p.grad).all()) for p in adapter.parameters())


def test_files_hold_the_statistics(tmp_path: Path) -> None:
    model = ast().train()
    tuned = attached(model)
    for seed in range(3):
        model(**tiny.batch("ast", seed=seed))
    model.eval()
    expected, path = logits(model), tuned.save(tmp_path / "x.safetensors")
    other = ast()
    again = pt.load(other, path)
    assert torch.equal(logits(other), expected)
    for one, two in zip(adapters(again), adapters(tuned), strict=True):
        assert int(one.norm.num_batches_tracked) == 3
        assert torch.equal(one.norm.running_mean, two.norm.running_mean) and one.norm.running_mean.any()
        assert torch.equal(one.norm.running_var, two.norm.running_var)


def test_one_token_of_one_sample_has_no_variance() -> None:
    norm = BatchNorm(B)
    with pytest.raises(TrainingError, match="variance"):
        norm(states(1, 1, size=B))
    norm.eval()(states(1, 1, size=B))


def test_processes_share_their_statistics(tmp_path: Path) -> None:
    """Two with half of a batch each: outputs, gradients and running statistics of one process with all of it."""
    x, g = states(4, 5, size=B).requires_grad_(), states(4, 5, 1, size=B)
    norm = BatchNorm(B)
    y = norm(x)
    (y * g).sum().backward()
    assert x.grad is not None
    wanted = {"y": y.detach(), "grad": x.grad, "mean": norm.running_mean, "var": norm.running_var}

    def work(rank: int) -> None:
        distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=rank, world_size=2)
        rows, mine = slice(2 * rank, 2 * rank + 2), BatchNorm(B)
        part = x.detach()[rows].clone().requires_grad_()
        out = mine(part)
        (out * g[rows]).sum().backward()
        found = {"y": out.detach(), "grad": part.grad, "mean": mine.running_mean, "var": mine.running_var}
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value[rows] if name in ("y", "grad") else value)
        distributed.destroy_process_group()

    import threading

    status = [-1, -1]

    def start(rank: int) -> None:
        status[rank] = children.run(lambda: work(rank))

    threads = [threading.Thread(target=start, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert status == [0, 0]


# ------------------------------------------------------------------------------------------------------ the other methods


@pytest.mark.parametrize("scale_by", ["reduction_factor", "rank"])
def test_lora_is_scaled_by_the_reduction_and_merges(scale_by: Any) -> None:
    assert lora(768).rank == 12 and lora(768).scaling == 0.125
    method = lora(D, reduction_factor=8, alpha=6, scale_by=scale_by)
    assert method.rank == 4
    assert method.scaling == (6 / 8 if scale_by == "reduction_factor" else 6 / 4)
    model = ast().double()
    batch = {"input_values": tiny.batch("ast")["input_values"].double(), "labels": None}
    before = logits(model, **batch)
    tuned = pt.attach(model, method)
    assert torch.equal(logits(model, **batch), before)
    for delta in adapters(tuned):
        assert not delta.A.any() and delta.B.any()
        assert float(delta.B.detach().abs().max()) <= method.rank**-0.5
    toys.shake(tuned, 0.3)
    changed = logits(model, **batch)
    tuned.merge()
    torch.testing.assert_close(logits(model, **batch), changed, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(changed, before)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("length", [1, 4])
def test_prompts_take_the_distillation_tokens_place(deep: bool, length: int) -> None:
    """1 + p + N tokens run through every layer; at each, deep prompts are new."""
    model = ast()
    tuned = attached(model, prompts(length, deep=deep))
    tokens = 10 - 2
    seen: list[Tensor] = []
    for layer in model.audio_spectrogram_transformer.layers:
        layer.layernorm_before.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits(model)
    assert [h.shape[1] for h in seen] == [1 + length + tokens] * LAYERS
    learned = [slot for slot in slots(tuned) if not isinstance(slot.delta, Pool)]
    assert {slot.site.depth for slot in learned} == (set(range(LAYERS)) if deep else {0})
    for depth, h in enumerate(seen if deep else seen[:1]):
        own = torch.cat([s.delta.tokens for s in learned if s.site.depth == depth])
        places = [*range(length - 1), length]  # the class token stands between the last two
        torch.testing.assert_close(h[:, places], own.expand(2, -1, -1))


@pytest.mark.parametrize("pool", ["all", "cls", "prompts", "patches", "prompts+patches"])
def test_which_tokens_the_head_reads(pool: Any) -> None:
    model = ast()
    attached(model, prompts(3, pool=pool))
    inner, kept = model.audio_spectrogram_transformer, []
    inner.layers[-1].mlp.register_forward_hook(lambda module, args, output: kept.append(output))
    inner.layers[-1].layernorm_after.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    read: list[Tensor] = []
    model.classifier.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    logits(model)
    h = nn.functional.layer_norm(sum(kept), (D,), inner.layernorm.weight, inner.layernorm.bias, inner.layernorm.eps)
    at = {"prompts": [0, 1, 3], "cls": [2], "patches": list(range(4, 12))}
    places = sum(at.values(), []) if pool == "all" else sum((at[part] for part in pool.split("+")), [])  # noqa: RUF017
    torch.testing.assert_close(read[0], h[:, places].mean(1))


def test_a_probe_chooses_its_tokens_too() -> None:
    model = ast()
    attached(model, pt.LinearProbe(pool="cls", final_norm=True))
    last, read = [], []
    inner = model.audio_spectrogram_transformer
    inner.layernorm.register_forward_pre_hook(lambda module, args: last.append(args[0]))
    model.classifier.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    logits(model)
    norm = inner.layernorm
    torch.testing.assert_close(read[0], nn.functional.layer_norm(last[0][:, 0], (D,), norm.weight, norm.bias, norm.eps))


def test_prefixes_are_half_keys_and_half_values() -> None:
    tuned = pt.attach(ast(), prefix(6))
    assert [(delta.key.shape, delta.value.shape) for delta in adapters(tuned)] == [((3, D), (3, D))] * LAYERS


@pytest.mark.parametrize(
    "method",
    [lora(D, reduction_factor=8), prompts(3), prefix(4), pt.BitFit(convolutions=False), pt.ASTAdapter(**SMALL)],
    ids=["lora", "prompts", "prefix", "bitfit", "adapter"],
)
def test_each_learns_with_the_papers_head(method: pt.Method) -> None:
    model, batch = ast(), tiny.batch("ast", size=8)
    own_norm = isinstance(method, (pt.ASTAdapter, pt.BitFit))
    pool = "model" if isinstance(method, pt.VisualPromptTuning) else "all"
    tuned = pt.attach(model, [method, pt.LinearProbe(final_norm=not own_norm, pool=pool)])
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=1e-2)
    events = Events(model, optimizer, total_steps=15)
    model.train()
    losses = []
    for _ in range(15):
        events.before_step()
        loss = model(**batch).loss
        loss.backward()
        events.before_optimizer_step(loss)
        optimizer.step()
        events.after_optimizer_step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


# ---------------------------------------------------------------------------------------------------------- what is refused


def test_refusals_name_the_field_and_what_to_do() -> None:
    for fields, message in (
        ({"kernel_size": 0}, "kernel_size"),
        ({"block": "bottleneck", "kernel_size": 3}, "no convolution"),
        ({"block": "transformer"}, "block"),
        ({"roles": ["q"]}, "roles"),
        ({"reduction_factor": 0}, "reduction_factor"),
    ):
        with pytest.raises(ConfigError, match=message):
            pt.ASTAdapter(**fields)
    for method, message in (
        (pt.ASTAdapter(reduction_factor=2 * D + 1), "at most"),
        (pt.VisualPromptTuning(replaces=2), "replaces"),
    ):
        with pytest.raises(AttachError, match=message):
            pt.attach(ast(), method)
    for call in (
        lambda: prefix(5),
        lambda: prefix(0),
        lambda: lora(D, reduction_factor=65),
        lambda: pt.LinearProbe(pool="prompts"),
    ):
        with pytest.raises(ConfigError):
            call()


def test_convolutions_do_not_look_ahead_in_a_decoder() -> None:
    with pytest.raises(AttachError, match="block='bottleneck'"):
        pt.attach(copy.deepcopy(toys.model("gpt2")), pt.ASTAdapter(**SMALL))
    pt.attach(copy.deepcopy(toys.model("gpt2")), pt.ASTAdapter(block="bottleneck", reduction_factor=4))
    pt.attach(copy.deepcopy(toys.model("t5")), pt.ASTAdapter(**SMALL, stack="encoder"))


def test_other_pools_need_a_norm_behind_the_blocks() -> None:
    with pytest.raises(AttachError, match="pool='model'"):
        pt.attach(copy.deepcopy(toys.model("bert")), pt.LinearProbe(pool="all"))


def test_norms_that_cannot_be_told_are_asked_for() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.ModuleDict({"fc1": nn.Linear(D, 64), "fc2": nn.Linear(64, D)}) for _ in range(2))
    with pytest.raises(AttachError, match="train_layernorm=False"):
        pt.attach(model, pt.ASTAdapter(**SMALL))


def test_a_residual_beside_a_sublayer_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="twice"):
        pt.attach(ast(), pt.ASTAdapter(**SMALL, residual=True))
