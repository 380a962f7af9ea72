"""What Polyhistor must hold, by its paper."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import SwinConfig, SwinModel

import petiole as pt
import tiny
import toys
from petiole.errors import AttachError, ConfigError
from petiole.methods.adapters.hypernetwork import AdapterGenerator, MatrixGenerator
from petiole.multitask.polyhistor import OutputNorm, materialise
from petiole.multitask.written import Full, Lite, Written
from petiole.tasks.dense import DenseModel

TASKS = ("semseg", "depth")
SMALL: dict[str, Any] = {
    "tasks": TASKS,
    "task_embedding_dim": 6,
    "hidden_dim": 5,
    "projected_dim": 4,
    "reduction_factor": 4,
}


def swin(drop_path: float = 0.0) -> SwinModel:
    """Three stages, of widths 8, 16 and 32."""
    config = SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 2, 1], num_heads=[1, 2, 4], window_size=2, drop_path_rate=drop_path
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SwinModel(config, add_pooling_layer=False).eval()


def attached(model: nn.Module, **fields: Any) -> pt.Adaptation:
    return pt.attach(model, pt.Polyhistor(**{**SMALL, **fields}), train_head=False)


def shaken(model: nn.Module, **fields: Any) -> pt.Adaptation:
    tuned = attached(model, **fields)
    toys.shake(tuned, 0.3)
    return tuned


def images(size: int = 2) -> Tensor:
    return torch.randn(size, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def seen(model: nn.Module, task: str, rows: Tensor | None = None) -> Tensor:
    with torch.no_grad(), pt.given(model, task=task):
        return model(pixel_values=images() if rows is None else rows).last_hidden_state


def written(tuned: pt.Adaptation) -> list[Written]:
    return [slot.delta for slot in tuned.slots if isinstance(slot.delta, Written)]


def source(tuned: pt.Adaptation) -> Any:
    return written(tuned)[0].source[0]


# ------------------------------------------------------------------------------------------------------------- counts


def lite(tasks: int, te: int, hid: int, pj: int, d0: int, n0: int, k: int, scales: list[int]) -> int:
    """By the spec's formula."""
    net = 2 * te * hid + hid + hid * pj + pj + 2 * pj
    generators = 2 * (pj + 1) * (n0 + d0) * k + (pj + 1) * (n0 + d0)
    return net + generators + tasks * te + te * sum(scales) + sum(s**3 + s**2 for s in scales if s > 1)


def full(tasks: int, te: int, hid: int, pj: int, sizes: list[tuple[int, int]], k: int) -> int:
    net = te * hid + hid + hid * pj + pj + 2 * pj
    return tasks * te + sum(net + 2 * (pj + 1) * (n + d) * k + (pj + 1) * (n + d) for d, n in sizes)


def tiny_swin_scales() -> list[int]:
    return [1] * 2 + [2] * 2 + [4] * 6 + [8] * 2


@pytest.mark.parametrize("rank", [1, 3])
def test_counts_at_swin_tiny(rank: int) -> None:
    scales = tiny_swin_scales()
    assert sum(scales) == 46 and sum(s**3 + s**2 for s in scales if s > 1) == 1656
    tasks = ("semseg", "human_parts", "saliency", "normals")
    with torch.device("meta"):
        model = SwinModel(SwinConfig(), add_pooling_layer=False)
    tuned = pt.attach(model, pt.Polyhistor(tasks=tasks, rank=rank), train_head=False)
    assert tuned.trainable == lite(4, 64, 128, 64, 96, 24, rank, scales)
    tuned.detach()
    sizes = [(96 * s, 24 * s) for s in scales]
    tuned = pt.attach(model, pt.Polyhistor(tasks=tasks, rank=rank, variant="full"), train_head=False)
    assert tuned.trainable == full(4, 64, 128, 64, sizes, rank)


def test_a_decomposed_generator_at_the_paper_size() -> None:
    with torch.device("meta"):
        whole, decomposed = MatrixGenerator(64, 192, 768), MatrixGenerator(64, 192, 768, 1)
    assert sum(p.numel() for p in whole.parameters()) == 9_584_640
    assert sum(p.numel() for p in decomposed.parameters()) == 62_400


@pytest.mark.parametrize("variant", ["lite", "full"])
def test_a_task_more_costs_its_embedding(variant: str) -> None:
    counts = [attached(swin(), variant=variant, tasks=tuple("abcd"[:n])).trainable for n in (1, 2, 4)]
    assert counts[1] - counts[0] == 6 and counts[2] - counts[1] == 12


# ------------------------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("order", ["front", "back"])
@pytest.mark.parametrize("rank", [1, 2])
def test_shapes_and_ranks(order: str, rank: int) -> None:
    tuned = shaken(swin(), kernel_order=order, rank=rank)
    for delta, s in zip(written(tuned), (1, 2, 2, 4), strict=True):
        state = delta.of_task("depth")
        down, up = state["down.depth.weight"], state["up.depth.weight"]
        assert down.shape == (2 * s, 8 * s) and up.shape == (8 * s, 2 * s)
        assert state["down.depth.bias"].shape == (2 * s,) and state["up.depth.bias"].shape == (8 * s,)
        assert torch.linalg.matrix_rank(down) <= s * s * rank
        adapter = source(tuned).adapters(delta.host, "depth")["depth", delta.name]
        templates = adapter.parts.down.P @ adapter.parts.down.Q
        assert templates.shape == (s, 2, 8)
        assert all(torch.linalg.matrix_rank(template) <= rank for template in templates)


@pytest.mark.parametrize("order", ["front", "back"])
def test_products_without_the_sum_of_kronecker_products(order: str) -> None:
    tuned = shaken(swin(), kernel_order=order, rank=2)
    for delta in written(tuned):
        adapter = source(tuned).adapters(delta.host, "depth")["depth", delta.name]
        for matrix in (adapter.parts.down, adapter.parts.up):
            s = len(matrix.P)
            K = torch.ones(1, 1, 1) if adapter.kernel is None else adapter.kernel
            T = matrix.P @ matrix.Q
            whole = sum(torch.kron(K[j], T[j]) if order == "front" else torch.kron(T[j], K[j]) for j in range(s))
            assert isinstance(whole, Tensor)
            torch.testing.assert_close(adapter.whole(matrix), whole)
            x = torch.randn(3, whole.shape[1], generator=torch.Generator().manual_seed(1))
            torch.testing.assert_close(adapter.times(x, matrix), x @ whole.T, rtol=1e-5, atol=1e-5)


def test_identity_kernels_put_templates_on_the_diagonal() -> None:
    tuned = attached(swin(), kernel_init="identity")
    delta = written(tuned)[-1]
    adapter = source(tuned).adapters(delta.host, "depth")["depth", delta.name]
    T = adapter.parts.down.P @ adapter.parts.down.Q
    torch.testing.assert_close(adapter.whole(adapter.parts.down), torch.block_diag(*T))
    torch.testing.assert_close(adapter.vector(adapter.parts.down_bias), adapter.parts.down_bias.flatten())


def test_how_it_starts() -> None:
    tuned = attached(swin())
    writer = source(tuned)
    assert isinstance(writer, Lite)
    generator = writer.templates["adapter"]
    assert isinstance(generator, AdapterGenerator)
    for module in (writer.net.enter, writer.net.leave, generator.down, generator.up, generator.up_bias):
        assert 0.004 < module.weight.std() < 0.016 and not module.bias.any()
    assert writer.net.norm.eps == 1e-6 and (writer.net.norm.weight == 1).all() and not writer.net.norm.bias.any()
    kernels = torch.cat([kernel.flatten() for kernel in writer.kernels.values()])
    assert 0.7 < kernels.std() < 1.3
    with torch.no_grad():
        assert 0.5 < torch.cat([e.flatten() for e in (*writer.tasks.values(), *writer.layers.values())]).std() < 1.5


@pytest.mark.parametrize("variant", ["lite", "full"])
@pytest.mark.parametrize("fields", [{}, {"sites": ("ffn", "attention"), "rank_ratio": 1.0}, {"norm_before": True, "norm_after": True},
                                    {"insertion": "parallel", "kernel_order": "back", "norm_before": True},
                                    {"insertion": "parallel", "sites": ("attention", "ffn")}])  # fmt: skip
def test_materialised_adapters_give_the_same(variant: str, fields: dict[str, Any], tmp_path: Any) -> None:
    model = swin()
    tuned = shaken(model, variant=variant, **fields)
    assert isinstance(source(tuned), Lite if variant == "lite" else Full)
    bare = swin()(pixel_values=images()).last_hidden_state
    for task in TASKS:
        expected = seen(model, task)
        assert (expected - bare).abs().max() > 1e-3
        alone = copy.deepcopy(model)
        ordinary = materialise(pt.adaptations(alone)["default"], task)
        with torch.no_grad():
            torch.testing.assert_close(alone(pixel_values=images()).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
        again = swin()
        pt.load(again, ordinary.save(tmp_path / f"{task}.safetensors"))
        with torch.no_grad():
            torch.testing.assert_close(again(pixel_values=images()).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="'edge' is none of depth, semseg"):
        materialise(tuned, "edge")


def test_generated_norms_have_kernels_of_their_own() -> None:
    """2 (pj + 1) d₀ numbers write a norm's templates, and 2 s² bring them to a block's width: gain = Σ_j k_j ⊗ g_j."""
    plain, tuned = attached(swin()), shaken(swin(), norm_before=True)
    assert tuned.trainable - plain.trainable == 2 * 5 * 8 + 2 * (4 + 4 + 16)
    writer, delta = source(tuned), written(tuned)[-1]
    _, templates = writer.generated(
        writer.templates,
        writer.net(writer.code(delta.name, writer.tasks["depth"].expand(4, -1), writer.layers["encoder_3"])),
    )
    kernels = writer.norm_kernels["encoder_3_ffn_norm_before"]
    for part, kernel, template in zip(("weight", "bias"), kernels, templates["norm_before"], strict=True):
        whole = sum(torch.kron(kernel[j], template[j]) for j in range(4))
        torch.testing.assert_close(delta.of_task("depth")[f"norm_before.{part}"], whole)


def test_sums_over_templates_are_taken_in_float32() -> None:
    tuned = shaken(swin())
    delta = written(tuned)[-1]
    adapter = source(tuned).adapters(delta.host, "depth")["depth", delta.name]
    h = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact = delta.change(h, adapter)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(delta.change(h, adapter), exact)
        half = h.bfloat16()
        assert torch.equal(delta.change(half, adapter), delta.change(half.float(), adapter).bfloat16())


def test_weights_are_written_once_in_a_pass() -> None:
    model = swin()
    tuned = shaken(model)
    calls: list[int] = []
    source(tuned).net.register_forward_hook(lambda *_: calls.append(1))
    model.train()
    with pt.given(model, task="depth"):
        model(pixel_values=images()).last_hidden_state.sum().backward()
    assert len(calls) == 1
    model.gradient_checkpointing_enable()
    with pt.given(model, task="depth"):
        model(pixel_values=images()).last_hidden_state.sum().backward()
    assert len(calls) == 2


# ------------------------------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize("variant", ["lite", "full", "adapters"])
def test_a_task_leaves_the_other_alone(variant: str) -> None:
    model = DenseModel(swin(), TASKS, width=2)
    tuned = pt.attach(model, pt.Polyhistor(**{**SMALL, "variant": variant}))
    batch = {"pixel_values": images(), "labels": {"depth": torch.rand(2, 1, 32, 32)}}
    with pt.given(model, task="depth"):
        model(**batch).loss.backward()
    for name, parameter in tuned.named_parameters():
        if "semseg" in name:
            assert parameter.grad is None, name
        elif "norm" not in name or "depth" in name:
            assert parameter.grad is not None, name
    frozen = [p for n, p in model.named_parameters() if n.startswith("backbone.") and "petiole" not in n]
    assert frozen and all(p.grad is None for p in frozen)


def test_an_embedding_is_of_its_task_alone() -> None:
    model = swin()
    tuned = shaken(model)
    before = {task: seen(model, task) for task in TASKS}
    with torch.no_grad():
        source(tuned).tasks["semseg"].add_(1.0)
    assert torch.equal(seen(model, "depth"), before["depth"])
    assert not torch.equal(seen(model, "semseg"), before["semseg"])


def test_rows_of_several_tasks() -> None:
    model = swin()
    shaken(model)
    with torch.no_grad(), pt.given(model, task=["depth", "semseg"]):
        mixed = model(pixel_values=images()).last_hidden_state
    for row, task in enumerate(("depth", "semseg")):
        torch.testing.assert_close(mixed[row], seen(model, task)[row], rtol=1e-5, atol=1e-5)


def test_a_dense_model_runs_every_task() -> None:
    """What one forward pass gives is what each task alone gives; adapters are written once for each."""
    model = DenseModel(swin(), TASKS, width=2)
    tuned = pt.attach(model, pt.Polyhistor(**SMALL))
    toys.shake(tuned, 0.3)
    labels = {"depth": torch.rand(2, 1, 32, 32), "semseg": torch.zeros(2, 32, 32, dtype=torch.long)}
    batch: dict[str, Any] = {"pixel_values": images(), "labels": labels}
    tuned.check(batch)
    calls: list[int] = []
    source(tuned).net.register_forward_hook(lambda *_: calls.append(1))
    model.eval()
    whole = model(**batch)
    assert len(calls) == 2
    for task in TASKS:
        with pt.given(model, task=task):
            torch.testing.assert_close(model(**batch).logits, whole.logits[task])
    whole.loss.backward()
    assert all(bool(e.grad.any()) for e in source(tuned).tasks.values())


def test_norms_of_a_task_stand_before_its_decoder() -> None:
    """They change what the decoder reads, and nothing that the backbone goes on with."""
    model = DenseModel(swin(), TASKS, width=2)
    tuned = pt.attach(model, pt.Polyhistor(**SMALL))
    norms = [slot.delta for slot in tuned.slots if isinstance(slot.delta, OutputNorm)]
    at = [(depth, norm.of(side, "depth").normalized_shape) for norm in norms for side, depth in norm.depths.items()]
    assert at == [(0, (16,)), (2, (32,)), (3, (32,))]
    found: dict[bool, dict[str, Tensor]] = {}
    states: list[Tensor] = []
    model.backbone.register_forward_hook(lambda module, args, output: states.append(output.last_hidden_state))
    for changed in (False, True):
        if changed:
            with torch.no_grad():
                norms[1].of("input", "depth").weight.mul_(3)
        found[changed] = {}
        for task in TASKS:
            with torch.no_grad(), pt.given(model, task=task):
                found[changed][task] = model.eval()(pixel_values=images()).logits
    assert all(torch.equal(states[i], states[i + 2]) for i in range(2))
    assert torch.equal(found[True]["semseg"], found[False]["semseg"])
    assert not torch.equal(found[True]["depth"], found[False]["depth"])
    assert not any(isinstance(slot.delta, OutputNorm) for slot in attached(swin()).slots)


def test_a_model_with_decoders_runs_for_each_task() -> None:
    """Once in a forward pass; adapters are those of the task whose turn it is."""
    model = DenseModel(swin(), TASKS, width=2).eval()
    toys.shake(pt.attach(model, pt.Polyhistor(**SMALL)), 0.3)
    labels = {"semseg": torch.zeros(2, 32, 32, dtype=torch.long), "depth": torch.rand(2, 1, 32, 32)}
    whole = model(pixel_values=images(), labels=labels)
    for task in TASKS:
        with torch.no_grad(), pt.given(model, task=task):
            torch.testing.assert_close(model(pixel_values=images()).logits, whole.logits[task])
    whole.loss.backward()
    assert all(p.grad is not None for p in pt.adaptations(model)["default"].parameters())


def test_stochastic_depth_does_not_touch_what_is_written() -> None:
    model = swin(drop_path=0.5)
    delta = written(shaken(model))[-1]
    weights = delta.of_task("depth")
    model.train()
    with pt.given(model, task="depth"):
        model(pixel_values=images())
    again = delta.of_task("depth")
    assert all(torch.equal(weights[name], again[name]) for name in weights)


@pytest.mark.parametrize(("family", "ends"), [("vit", True), ("bert", False), ("swin", True)])
def test_beside_the_ffn(family: str, ends: bool) -> None:
    """Fed by the residual stream, added where it goes on: at the block's end, or in front of the norm that ends it."""
    found = pt.attach(tiny.model(family), pt.Polyhistor(insertion="parallel"), train_head=False).slots
    assert found and all((slot.site.role == "block") == ends for slot in found)
    assert all(slot.place.read is not None and slot.place.read.role in ("norm", "block", "ffn") for slot in found)


# ------------------------------------------------------------------------------------------------------------- refusals


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(AttachError, match=r"encoder\.0\.ffn is 8 wide, which reduction_factor = 3"):
        attached(swin(), reduction_factor=3)
    with pytest.raises(ConfigError, match="rank"):
        pt.Polyhistor(rank=0)
    with pytest.raises(ConfigError, match="'depth' stands twice"):
        pt.Polyhistor(tasks=("depth", "depth"))
    with pytest.warns(UserWarning, match="rank = 5 is above 2"):
        attached(swin(), rank=5)
    model = swin()
    attached(model)
    with pytest.raises(ConfigError, match="task = 'edge' is none of semseg, depth"), pt.given(model, task="edge"):
        model(pixel_values=images())
    with pytest.raises(AttachError, match="a forward pass is of one of the tasks"):
        model(pixel_values=images())
    with pytest.raises(ConfigError, match="'depth' is none of the model's tasks"):
        pt.attach(DenseModel(swin(), ("semseg",)), pt.Polyhistor(**SMALL))


def test_widths_that_are_no_multiples_are_refused_in_lite() -> None:
    class Widths(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.ModuleDict({"ffn": nn.Linear(w, w)}) for w in (8, 12))

    def found(model: nn.Module) -> pt.Anatomy:
        return pt.anatomy(model, stacks={"encoder": "blocks"}, roles={"ffn": "ffn"})

    model = Widths()
    with pytest.raises(AttachError, match=r"encoder\.1\.ffn is 12 wide, no multiple of the first width 8"):
        pt.attach(model, pt.Polyhistor(**SMALL), found=found(model))
    assert pt.attach(model, pt.Polyhistor(**{**SMALL, "variant": "full"}), found=found(model)).trainable


def test_a_flat_backbone_has_no_kernels() -> None:
    tuned = attached(tiny.model("vit"))
    writer = source(tuned)
    assert isinstance(writer, Lite) and not writer.kernels and len(writer.layers) == 2
