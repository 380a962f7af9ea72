"""What MTLoRA must hold, by its paper and specification; on a staged backbone and on flat ones."""

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
from petiole.methods.lowrank.factors import Factors
from petiole.multitask.branching import Between, Fan, Fork, Tasks
from petiole.multitask.mtlora import MTLoRA, keep_task
from petiole.multitask.task_linear import TaskLinear
from petiole.tasks.dense import DenseModel, DensePrediction, Scenes

NAMES = ("semseg", "normals", "depth")
UNSEEN = {
    f"0.encoder.3.down.output:{part}" for part in "AB"
}  # of the shared stream's end, which no decoder reads in "matrix"
Mode = Any


def backbone(**changes: Any) -> nn.Module:
    """A Swin of two stages, with weights large enough for every change to show."""
    from transformers import SwinConfig, SwinModel

    fields = {
        "image_size": 32,
        "patch_size": 2,
        "embed_dim": 8,
        "num_heads": [2, 4],
        "depths": [2, 2],
        "window_size": 4,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SwinModel(SwinConfig(**{**fields, "drop_path_rate": 0.0, **changes}), add_pooling_layer=False).eval()
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def dense(tasks: Any = NAMES, **changes: Any) -> DenseModel:
    return DenseModel(backbone(**changes), tasks, width=2).eval()


def batch(tasks: Any = NAMES, count: int = 2) -> dict[str, Any]:
    scenes = Scenes(count, size=32, tasks=tasks)
    return DensePrediction.collator([scenes[i] for i in range(count)])


def method(**fields: Any) -> MTLoRA:
    return MTLoRA(**{"tasks": NAMES, "rank_shared": 3, "rank_task": 2, "dropout": 0.0, **fields})


def attached(shaken: bool = True, **fields: Any) -> tuple[DenseModel, pt.Adaptation]:
    model = dense(fields.get("tasks", NAMES) or NAMES)
    tuned = pt.attach(model, method(**fields))
    if shaken:
        toys.shake(tuned, 0.2)
    return model, tuned


def layers(tuned: pt.Adaptation) -> list[TaskLinear]:
    return [slot.delta for slot in tuned.slots if isinstance(slot.delta, TaskLinear)]


def logits(model: DenseModel, rows: dict[str, Any]) -> dict[str, Tensor]:
    with torch.no_grad():
        return model(rows["pixel_values"]).logits


def shared_states(model: DenseModel, rows: dict[str, Any]) -> list[Tensor]:
    """The backbone's own states after each stage, and its last one."""
    with torch.no_grad():
        found = model.backbone(rows["pixel_values"], output_hidden_states=True)
    pt.streams(model)
    return [*found.reshaped_hidden_states[1:], found.last_hidden_state]


def streams(model: DenseModel, rows: dict[str, Any]) -> dict[str, dict[int, Tensor]]:
    with torch.no_grad():
        model.backbone(rows["pixel_values"])
    return pt.streams(model)


def layer(mode: Mode = "matrix", ranks: Any = None, rank: int = 3, seed: int = 0, **fields: Any) -> TaskLinear:
    """One layer of 6 to 5 features, all of whose numbers are random."""
    site = pt.anatomy(tiny.model("bert")).sites(["q"])[0]
    from dataclasses import replace

    chosen = method(mode=mode, **fields)
    ranks = dict.fromkeys(chosen.tasks, 2) if ranks is None else ranks
    made = TaskLinear(
        chosen, replace(site, in_features=6, out_features=5), Tasks(chosen.tasks), rank, ranks, opens=False
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made.eval()


def inputs(seed: int = 1) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """h (2, 4, 5), x (2, 4, 6), and an input for each task."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return draw(2, 4, 5), draw(2, 4, 6), {task: draw(2, 4, 6) for task in NAMES}


# ------------------------------------------------------------------------------------------------------------- must hold: 1


@pytest.mark.parametrize("mode", ["matrix", "matrixv2"])
def test_at_start_every_stream_is_the_bare_backbone(mode: Mode) -> None:
    rows = batch()
    bare = shared_states(dense(), rows)
    model, _ = attached(shaken=False, mode=mode)
    for one, other in zip(shared_states(model, rows), bare, strict=True):
        assert torch.equal(one, other)
    for own in streams(model, rows).values():
        assert list(own) == [1, 3]
        for state, shared in zip(own.values(), bare, strict=False):
            torch.testing.assert_close(state.mT.unflatten(-1, shared.shape[-2:]), shared)


def test_addition_is_no_identity() -> None:
    h, x, own = inputs()
    made = layer("addition")
    with torch.no_grad():
        for B in made.task_B.values():
            B.zero_()
        made.norm.weight.fill_(1), made.norm.bias.zero_()
    y, found = made(h, x, own)
    torch.testing.assert_close(y, h + nn.functional.layer_norm(3 * h, (5,)))
    for task in NAMES:
        torch.testing.assert_close(found[task], h)


# 2: the formulas, written out; tests/parity compares with reference results
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("mode", ["matrix", "matrixv2", "addition"])
def test_one_layer_by_its_formula(mode: Mode, given: bool) -> None:
    scales = {"semseg": 0.5, "normals": 2.0, "depth": 3.0}
    ranks = {"semseg": 1, "normals": 3, "depth": 2}
    h, x, own = inputs()
    for learn in (False, True):
        made = layer(mode, ranks, scale_shared=1.5, scale_task=scales, learn_scale=learn)
        if learn:
            scales = {task: float(made.learnt[f"task_{task}"]) for task in NAMES}
        c = float(made.learnt["shared"]) if learn and mode != "addition" else 1.5
        shared = 0 if mode == "addition" else c * x @ made.A.T @ made.B.T
        low = {t: scales[t] * (own[t] if given else x) @ made.task_A[t].T @ made.task_B[t].T for t in NAMES}
        wanted = {t: (h + shared if mode == "matrixv2" else h) + low[t] for t in NAMES}
        y = h + shared if mode != "addition" else h + made.norm(sum(wanted.values()))
        found = made(h, x, own if given else None)
        torch.testing.assert_close(found[0], y, rtol=1e-5, atol=1e-5)
        assert tuple(found[1]) == NAMES
        for task in NAMES:
            torch.testing.assert_close(found[1][task], wanted[task], rtol=1e-5, atol=1e-5)


def test_a_task_of_rank_zero_gets_h_alone() -> None:
    h, x, own = inputs()
    _, found = layer(ranks={"semseg": 2, "normals": 0, "depth": 2})(h, x, own)
    assert torch.equal(found["normals"], h) and not torch.equal(found["depth"], h)


def test_dropout_is_on_the_shared_input_alone() -> None:
    h, x, own = inputs()
    made = layer(dropout=0.5).train()
    torch.manual_seed(0)
    y, found = made(h, x, own)
    torch.testing.assert_close(found, made.eval()(h, x, own)[1])
    made.train()
    torch.manual_seed(0)
    dropped = nn.functional.dropout(x, 0.5)
    torch.testing.assert_close(y, h + 4.0 * dropped @ made.A.T @ made.B.T)
    torch.manual_seed(0)
    _, opened = made(h, x)  # without inputs of their own, tasks get what was dropped
    for task in NAMES:
        torch.testing.assert_close(opened[task], h + 4.0 * dropped @ made.task_A[task].T @ made.task_B[task].T)


def by_hand(model: DenseModel, tuned: pt.Adaptation, pixels: Tensor) -> dict[str, dict[int, Tensor]]:
    """The flow of the specification, block by block, from the backbone's modules and the layers' own forward."""
    swin = model.backbone
    at = {slot.site.path: slot.delta for slot in tuned.slots if isinstance(slot.delta, (TaskLinear, Factors))}
    prefix = "backbone.encoder.layers"

    def plain(path: str, x: Tensor) -> Tensor:
        """W x + b without anything attached."""
        module = model.get_submodule(path)
        return nn.functional.linear(x, module.weight, module.bias)

    def linear(path: str, x: Tensor) -> Tensor:
        delta = at.get(path)
        y = plain(path, x)
        return y if delta is None else y + delta.scale * x @ delta.A.T @ delta.B.T

    h, size = swin.embeddings(pixels)
    found: dict[str, dict[int, Tensor]] = {}
    depth = -1
    for i, stage in enumerate(swin.encoder.layers):
        for j, block in enumerate(stage.blocks):
            depth += 1
            path = f"{prefix}.{i}.blocks.{j}"
            attended: list[Tensor] = []
            inner = block.attention
            hook = inner.o_proj.register_forward_pre_hook(lambda m, args, z=attended: z.append(args[0]))
            with pt.disabled(model), own_values(tuned):
                # z is what the shared q, k and v give; they are put into the weights for this one call
                kept = {n: inner.get_submodule(n).weight.data.clone() for n in ("q_proj", "k_proj", "v_proj")}
                for n in kept:
                    delta = at[f"{path}.attention.{n}"]
                    inner.get_submodule(n).weight.data += delta.weight(kept[n]).detach()
                block(h, size)
                for n, value in kept.items():
                    inner.get_submodule(n).weight.data = value
            hook.remove()
            z = attended[0]
            o, up, down = (f"{path}.attention.o_proj", f"{path}.mlp.fc1", f"{path}.mlp.fc2")

            def back(windows: Tensor, block: Any = block, size: Any = size, like: Tensor = h) -> Tensor:
                from transformers.models.swin.modeling_swin import window_reverse

                w = windows.view(-1, block.window_size, block.window_size, windows.shape[-1])
                whole = block.cyclic_shift(window_reverse(w, block.window_size, *size), reverse=True)
                return whole.reshape(like.shape)

            if isinstance(at[o], TaskLinear):
                a, a_t = at[o](plain(o, z), z)
            else:
                a, a_t = linear(o, z), {}
            x, x_t = h + back(a), {t: h + back(v) for t, v in a_t.items()}
            norm = block.layernorm_after
            if x_t:
                m, m_t = at[up](plain(up, norm(x)), norm(x), {t: norm(v) for t, v in x_t.items()})
                gelu = nn.functional.gelu
                m, m_t = at[down](plain(down, gelu(m)), gelu(m), {t: gelu(v) for t, v in m_t.items()})
                h, own = x + m, {t: x_t[t] + m_t[t] for t in x_t}
            else:
                h, own = x + linear(down, nn.functional.gelu(linear(up, norm(x)))), {}
        if stage.downsample is not None:
            with pt.disabled(model), own_values(tuned):
                own = {t: stage.downsample(v, size) for t, v in own.items()}
                h = stage.downsample(h, size)
            size = tuple(side // 2 for side in size)
        for task, state in own.items():
            found.setdefault(task, {})[depth] = state
    found["shared"] = {depth: h}
    return found


class own_values:
    """Let what is trained in place act although the adaptation is off."""

    def __init__(self, tuned: pt.Adaptation) -> None:
        self.tuned = tuned

    def __enter__(self) -> None:
        self.own, self.tuned.own = self.tuned.own, {}

    def __exit__(self, *error: Any) -> None:
        self.tuned.own = self.own


@pytest.mark.parametrize("mode", ["matrix", "matrixv2", "addition"])
def test_the_flow_is_the_papers(mode: Mode) -> None:
    """Windows and their shift, residuals, norms, GELU, patch merging: against the same written out."""
    model, tuned = attached(mode=mode, rank_task={"semseg": 1, "normals": 2, "depth": 3})
    rows = batch()
    with torch.no_grad():
        wanted = by_hand(model, tuned, rows["pixel_values"])
    found = streams(model, rows)
    assert list(found) == list(NAMES)
    for task in NAMES:
        for depth in (1, 3):
            torch.testing.assert_close(found[task][depth], wanted[task][depth], rtol=1e-4, atol=1e-4)
    last = model.backbone.layernorm(wanted["shared"][3])
    torch.testing.assert_close(shared_states(model, rows)[-1], last, rtol=1e-4, atol=1e-4)


# 3
def test_a_layers_task_output_leaves_the_shared_factors_alone() -> None:
    h, x, own = inputs()
    made = layer("matrix")
    made(h, x, own)[1]["depth"].sum().backward()
    assert made.A.grad is None and made.B.grad is None
    assert made.task_A["depth"].grad is not None
    assert all(made.task_A[task].grad is None or not made.task_A[task].grad.any() for task in ("semseg", "normals"))
    made = layer("matrixv2")
    made(h, x, own)[1]["depth"].sum().backward()
    assert bool(made.A.grad.any() and made.B.grad.any())


def test_a_tasks_loss_trains_it_and_the_shared_changes_before_it() -> None:
    model, tuned = attached()
    rows = batch()
    model(rows["pixel_values"], labels={"depth": rows["labels"]["depth"]}).loss.backward()
    for made in layers(tuned):
        for task in NAMES:
            graded = [p.grad is not None and bool(p.grad.any()) for p in (made.task_A[task], made.task_B[task])]
            assert all(graded) if task == "depth" else not any(graded), task
    for slot in tuned.slots:
        if isinstance(slot.delta, Factors):
            assert bool(slot.delta.A.grad.any() and slot.delta.B.grad.any()), slot.site.key
    first, last = layers(tuned)[0], [s.delta for s in tuned.slots if isinstance(s.delta, TaskLinear)][-1]
    assert bool(first.A.grad.any())  # of an earlier stage, through the shared stream
    assert last.A.grad is None or not last.A.grad.any()  # of the last stage: no output of this task sees it


# 4
def test_parameters_of_a_layer() -> None:
    made = layer(ranks={"semseg": 1, "normals": 2, "depth": 4}, rank=3)
    assert sum(p.numel() for p in made.parameters()) == 3 * (6 + 5) + (1 + 2 + 4) * (6 + 5)
    assert sum(p.numel() for p in layer("addition").parameters()) == 3 * 2 * (6 + 5) + 2 * 5
    assert sum(p.numel() for p in layer(learn_scale=True).parameters()) == 3 * 11 + 3 * 2 * 11 + 4


# 5, and the published figures
@pytest.mark.parametrize("rank,total", [(64, 8_344_634), (16, 4_953_146)])
def test_published_counts_on_swin_tiny(rank: int, total: int) -> None:
    """Swin-T at 448, four tasks, r_t = 4: shared, task, patch merging, the rest of the backbone, decoders."""
    from transformers import SwinConfig, SwinModel

    tasks = ("semseg", "normals", "saliency", "human_parts")
    with torch.device("meta"):
        config = SwinConfig(image_size=448, embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], window_size=7)
        model = DenseModel(SwinModel(config, add_pooling_layer=False), tasks)
    tuned = pt.attach(model, pt.MTLoRA(tasks=tasks, rank_shared=rank, rank_task=4))
    count = lambda parameters: sum(p.numel() for p in {id(p): p for p in parameters}.values())  # noqa: E731
    task = sum(count([*made.task_A.values(), *made.task_B.values()]) for made in layers(tuned))
    shared = sum(count([made.A, made.B]) for made in layers(tuned))
    shared += count(p for s in tuned.slots if isinstance(s.delta, Factors) for p in s.delta.parameters())
    widths = [96] * 2 + [192] * 2 + [384] * 6 + [768] * 2
    assert shared == sum(rank * 16 * d for d in widths) == 4_521_984 * rank // 64
    assert task == sum(4 * 4 * 12 * d for d in (96, 192, 384, 768)) == 276_480
    own = {name: tuned.host.tensor(name).numel() for name in tuned.own}
    reduction = sum(n for name, n in own.items() if "reduction" in name)
    assert (reduction, sum(own.values()) - reduction) == (1_548_288, 51_258)
    assert tuned.trainable == total == shared + task + 1_548_288 + 51_258 + 732_672 + 1_213_952


def test_of_all_numbers_of_swin_tiny() -> None:
    """34,262,906 in the published model at r = 64; its neither final norm nor pooler is ours, which Transformers keeps: 2 · 768."""
    from transformers import SwinConfig, SwinModel

    tasks = ("semseg", "normals", "saliency", "human_parts")
    with torch.device("meta"):
        config = SwinConfig(image_size=448, embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], window_size=7)
        model = DenseModel(SwinModel(config, add_pooling_layer=False), tasks)
    bare = sum(p.numel() for p in model.parameters())
    tuned = pt.attach(model, pt.MTLoRA(tasks=tasks, rank_shared=64, rank_task=4), train_head=False)
    added = sum(p.numel() for p in {id(p): p for s in tuned.slots for p in s.delta.parameters()}.values())
    assert bare + added - 2 * 768 == 34_262_906


# 6
def test_matrixv2_is_matrix_and_the_shared_term() -> None:
    h, x, own = inputs()
    one, two = layer("matrix"), layer("matrixv2")
    shared = 4.0 * x @ one.A.T @ one.B.T
    for task in NAMES:
        torch.testing.assert_close(two(h, x, own)[1][task] - one(h, x, own)[1][task], shared, rtol=1e-4, atol=1e-4)


# 7
def test_one_task_of_matrixv2_is_lora_of_both_ranks() -> None:
    h, x, _ = inputs()
    made = layer("matrixv2", {"depth": 2}, rank=2, tasks=("depth",), rank_task=2)
    A, B = torch.cat([made.A, made.task_A["depth"]]), torch.cat([made.B, made.task_B["depth"]], 1)
    torch.testing.assert_close(made(h, x)[1]["depth"], h + 4.0 * x @ A.T @ B.T, rtol=1e-5, atol=1e-5)


# 8
@pytest.mark.parametrize("mode", ["matrix", "matrixv2"])
def test_the_shared_stream_knows_no_task(mode: Mode) -> None:
    model, tuned = attached(mode=mode)
    rows = batch()
    before, streams_before = shared_states(model, rows), streams(model, rows)
    with torch.no_grad():
        for made in layers(tuned):
            for parameter in (*made.task_A.values(), *made.task_B.values()):
                parameter.add_(1.0)
    for one, other in zip(shared_states(model, rows), before, strict=True):
        assert torch.equal(one, other)
    assert not torch.allclose(streams(model, rows)["depth"][3], streams_before["depth"][3])
    # nor does it change when tasks are left out
    for names in ((), ("depth",)):
        fewer = dense()
        other_tuned = pt.attach(fewer, method(mode=mode, tasks=names, rank_task=2 if names else None))
        copy_shared(tuned, other_tuned)
        for one, other in zip(shared_states(fewer, rows), before, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def copy_shared(source: pt.Adaptation, target: pt.Adaptation) -> None:
    """The shared factors and what is trained in place."""
    values = source.named_tensors(folded=False)
    with torch.no_grad():
        for name, tensor in target.named_tensors(folded=False).items():
            if "task_" not in name:
                tensor.copy_(values[name])


# 9
def test_the_order_of_tasks_is_nothing_but_an_order() -> None:
    model, tuned = attached()
    rows, turned = batch(), NAMES[::-1]
    other = dense(turned)
    other_tuned = pt.attach(other, method(tasks=turned))
    values = tuned.named_tensors(folded=False)
    with torch.no_grad():
        for name, tensor in other_tuned.named_tensors(folded=False).items():
            tensor.copy_(values[name])
    one, two = logits(model, rows), logits(other, rows)
    assert tuple(two) == turned
    for task in NAMES:
        torch.testing.assert_close(one[task], two[task], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["matrix", "matrixv2", "addition"])
def test_some_tasks_give_what_all_of_them_give(mode: Mode) -> None:
    model, _ = attached(mode=mode)
    rows = batch()
    whole, states = logits(model, rows), streams(model, rows)
    for some in (["depth"], ["normals", "semseg"]):
        with pt.given(model, task=some):
            found = logits(model, rows)
        assert tuple(found) == tuple(task for task in NAMES if task in some)
        for task in some:
            torch.testing.assert_close(found[task], whole[task], rtol=1e-5, atol=1e-5)
    with pt.given(model, task="normals"):
        torch.testing.assert_close(logits(model, rows), whole["normals"], rtol=1e-5, atol=1e-5)
        ran = streams(model, rows)
    assert set(ran) == (set(NAMES) if mode == "addition" else {"normals"})
    torch.testing.assert_close(ran["normals"][3], states["normals"][3])


# 10
@pytest.mark.parametrize("fields", [{"mode": "lora_only"}, {"tasks": (), "rank_task": None}, {"rank_task": 0}])
def test_without_task_parts_all_tasks_see_the_same(fields: dict[str, Any]) -> None:
    model, tuned = attached(**fields)
    rows = batch()
    assert not layers(tuned) and streams(model, rows) == {}
    with torch.no_grad():
        maps = model.maps(rows["pixel_values"], NAMES)
    for task in NAMES:
        assert all(a is b for a, b in zip(maps[task], maps["semseg"], strict=True))
    changed = logits(model, rows)
    tuned.merge()
    for task in NAMES:
        torch.testing.assert_close(logits(model, rows)[task], changed[task], rtol=1e-4, atol=1e-4)


# 11
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"mode": "matrixv2"},
        {"patch_merging": "lora", "learn_scale": True},
        {"joint_qkv": False},
        {
            "rank_task": dict(zip(NAMES, (1, 2, 3), strict=True)),
            "scale_task": dict(zip(NAMES, (1.0, 2.0, 3.0), strict=True)),
        },
    ],
)
def test_a_merged_model_of_one_task_gives_what_the_whole_gave(fields: dict[str, Any]) -> None:
    for task in NAMES:
        model, tuned = attached(**fields)
        rows = batch()
        with torch.no_grad():
            wanted = model(**rows).logits[task]
        before = tuned.trainable
        kept = keep_task(tuned, task)
        assert kept.trainable < before and kept.methods[0].tasks == (task,)
        kept.merge(partly=True)
        merged = [slot for slot in kept.slots if slot.merged]
        assert merged and all(not isinstance(slot.delta, Fan) for slot in merged)
        assert {type(slot.delta) for slot in kept.slots if not slot.merged} >= {TaskLinear, Fork, Between}
        with pt.given(model, task=task):
            torch.testing.assert_close(logits(model, rows), wanted, rtol=1e-4, atol=1e-4)
        kept.unmerge()
        with pt.given(model, task=task):
            torch.testing.assert_close(logits(model, rows), wanted, rtol=1e-4, atol=1e-4)


def test_a_file_of_one_task(tmp_path: Any) -> None:
    model, tuned = attached()
    rows = batch()
    wanted = logits(model, rows)["depth"]
    path = keep_task(tuned, "depth").save(tmp_path / "depth.safetensors")
    fresh = dense()
    pt.load(fresh, path)
    with pt.given(fresh, task="depth"):
        torch.testing.assert_close(logits(fresh, rows), wanted, rtol=1e-5, atol=1e-5)


def test_merging_names_the_layers_that_stay() -> None:
    model, tuned = attached()
    logits(model, batch())  # Transformers hangs its own hooks on a model in the first pass
    before = toys.snapshot(model)
    with pytest.raises(AttachError, match=r"h at encoder\.1\.o, encoder\.1\.up, encoder\.1\.down, encoder\.3\.o"):
        tuned.merge()
    assert toys.snapshot(model) == before
    wanted = logits(model, batch())
    tuned.merge(partly=True)
    for task in NAMES:
        torch.testing.assert_close(logits(model, batch())[task], wanted[task], rtol=1e-4, atol=1e-4)
    tuned.unmerge()
    assert toys.snapshot(model) == before


# ----------------------------------------------------------------------------------------------------------------- freezing


@pytest.mark.parametrize(
    "flag,words", [("train_patch_embedding", ("patch_embeddings",)), ("train_norms", ("norm",)), ("train_position_bias", ("bias_table",)),
                   ("patch_merging", ("reduction",))],
)  # fmt: skip
def test_each_part_has_its_own_flag(flag: str, words: tuple[str, ...]) -> None:
    _, whole = attached(shaken=False)
    _, without = attached(shaken=False, **{flag: "freeze" if flag == "patch_merging" else False})
    gone = set(whole.own) - set(without.own)
    assert gone and set(without.own) < set(whole.own)
    assert all(any(word in name for word in words) for name in gone)
    assert not any(any(word in name for word in words) for name in without.own)
    assert not any("backbone.layernorm." in name for name in whole.own)  # the final norm


def test_patch_merging_with_a_low_rank_change() -> None:
    """MTLoRA+: r (4 d + 2 d) numbers instead of 8 d²; it is the same for all streams, so it merges."""
    _, plain = attached(shaken=False)
    model, plus = attached(shaken=False, patch_merging="lora")
    assert plus.trainable - plain.trainable == 3 * (32 + 16) - 8 * 8**2
    assert not any("reduction" in name for name in plus.own)
    toys.shake(plus, 0.2)
    wanted = logits(model, batch())
    plus.merge(partly=True)
    for task in NAMES:
        torch.testing.assert_close(logits(model, batch())[task], wanted[task], rtol=1e-4, atol=1e-4)


def test_learnt_scales_train() -> None:
    model, tuned = attached(learn_scale=True)
    rows = batch()
    model(**rows).loss.backward()
    for made in layers(tuned)[:1]:
        assert sorted(made.learnt) == ["shared", *sorted(f"task_{task}" for task in NAMES)]
        assert all(bool(c.grad) for c in made.learnt.values())
    scales = [s.delta.scale for s in tuned.slots if isinstance(s.delta, Factors)]
    assert scales and all(isinstance(c, nn.Parameter) and bool(c.grad) for c in scales)


# --------------------------------------------------------------------------------------------------------------- beside it


def test_chosen_stages_and_ranks_for_each() -> None:
    model, tuned = attached(rank_shared=(3, 5), rank_task=(1, 2))
    ranks = {s.site.depth: s.delta.task_A["depth"].shape[0] for s in tuned.slots if isinstance(s.delta, TaskLinear)}
    assert ranks == {1: 1, 3: 2}
    assert {s.delta.rank for s in tuned.slots if isinstance(s.delta, Factors) and s.site.depth < 2} == {3}
    model, tuned = attached(stages=(-1,))
    rows = batch()
    assert {slot.site.depth for slot in tuned.slots if isinstance(slot.delta, TaskLinear)} == {3}
    assert list(streams(model, rows)["depth"]) == [3]
    with torch.no_grad():
        maps = model.maps(rows["pixel_values"], NAMES)
    assert maps["depth"][0] is maps["semseg"][0] and not torch.equal(maps["depth"][1], maps["semseg"][1])
    model, _ = attached(rank_task=(0, 2))
    assert list(streams(model, rows)["depth"]) == [3]


def test_without_the_projection_a_task_begins_at_the_shared_state() -> None:
    """Where o has no task outputs, x'_t is the shared x'; the rest of the flow is as ever."""
    model, tuned = attached(roles=("up", "down"))
    assert {slot.site.role for slot in tuned.slots if isinstance(slot.delta, TaskLinear)} == {"up", "down"}
    rows = batch()
    with torch.no_grad():
        for made in layers(tuned):
            for B in made.task_B.values():
                B.zero_()
            made.B.zero_()
    states = streams(model, rows)
    shared = shared_states(model, rows)
    torch.testing.assert_close(states["depth"][1].mT.unflatten(-1, shared[0].shape[-2:]), shared[0])


@pytest.mark.parametrize("family", ["vit", "bert", "llama", "gpt2", "dinov2"])
def test_flat_backbones(family: str) -> None:
    """A task's stream goes through norms, gates, biases and scales as a stream of its own would, if h were its own product."""
    model, rows = toys.model(family), tiny.batch(family)
    bare = toys.output(model, rows)
    tuned = pt.attach(model, method(specialised=(0, 1)), train_head=False)
    assert torch.equal(toys.output(model, rows), bare)
    found = pt.streams(model)
    assert list(found) == list(NAMES) and list(found["depth"]) == [0, 1]
    toys.shake(tuned, 0.2)
    shared = toys.output(model, rows)
    own = pt.streams(model)
    assert not torch.allclose(own["depth"][1], own["normals"][1], atol=1e-3)
    seen = {}
    for task in NAMES:
        with pt.given(model, task=task):
            seen[task] = toys.output(model, rows)
            alone = pt.streams(model)
        assert list(alone) == [task]
        torch.testing.assert_close(alone[task][1], own[task][1], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(seen[task], shared, atol=1e-3)  # the model's own head sees the task
    assert not torch.allclose(seen["depth"], seen["normals"], atol=1e-3)
    tuned.detach()
    assert torch.equal(toys.output(model, rows), bare)


def test_a_flat_backbone_with_decoders() -> None:
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    model = DenseModel(
        ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8), add_pooling_layer=False),
        NAMES,
        width=2,
        depths=(1, 3),
    )
    tuned = pt.attach(model.eval(), method(specialised=(1, -1)))
    rows = batch()
    tuned.check(rows)
    toys.shake(tuned, 0.2)
    states = streams(model, rows)
    with torch.no_grad():
        maps = model.maps(rows["pixel_values"], NAMES)
    for i, depth in enumerate((1, 3)):
        torch.testing.assert_close(maps["depth"][i].flatten(2).mT, states["depth"][depth][:, 1:])
    tuned.detach()
    pt.attach(model, method(specialised=(0,)))
    with pytest.raises(AttachError, match="after block 0, which no decoder reads"):
        model(**rows)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        model, tuned = attached()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.train()
        rows = batch()
        model(**rows).loss.backward()
        found.append({name: p.grad.clone() for name, p in tuned.named_parameters() if p.requires_grad})
        assert all(bool(g.any()) for name, g in found[-1].items() if name not in UNSEEN)
    for name, gradient in found[0].items():
        torch.testing.assert_close(
            found[1][name], gradient, rtol=1e-3, atol=1e-4 * max(1.0, float(gradient.abs().max()))
        )


def test_every_task_gets_gradients_and_moves() -> None:
    """No parameter of the method idles when all tasks have a loss, but for what only the unused shared end sees."""
    model, tuned = attached(shaken=False)
    model.train()
    rows = batch()
    optimizer = torch.optim.Adam(tuned.parameters(), lr=1e-2)
    start = {name: p.detach().clone() for name, p in tuned.named_parameters() if p.requires_grad}
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(**rows).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    still = {name for name, p in tuned.named_parameters() if name in start and torch.equal(p, start[name])}
    assert losses[-1] < losses[0]
    assert still == UNSEEN


def test_streams_drop_paths_for_themselves() -> None:
    model = DenseModel(backbone(drop_path_rate=0.5), NAMES, width=2).train()
    pt.attach(model, method())  # B = 0: streams differ in what was dropped alone
    torch.manual_seed(0)
    found = [model.backbone(batch(count=8)["pixel_values"]) and pt.streams(model) for _ in range(3)]
    apart = [not torch.allclose(f["depth"][3][i], f["normals"][3][i], atol=1e-4) for f in found for i in range(8)]
    assert any(apart) and not all(torch.equal(f["depth"][3], f["normals"][3]) for f in found)


def test_a_copy_and_two_adaptations() -> None:
    frozen = {
        "train_norms": False,
        "train_patch_embedding": False,
        "train_position_bias": False,
        "patch_merging": "freeze",
    }
    model, _ = attached(**frozen)
    rows = batch()
    wanted = logits(model, rows)
    twin = copy.deepcopy(model)
    for task in NAMES:
        assert torch.equal(logits(twin, rows)[task], wanted[task])
    pt.attach(model, method(**frozen), name="second", seed=3)
    pt.activate(model, "default")
    for task in NAMES:
        assert torch.equal(logits(model, rows)[task], wanted[task])
    pt.activate(model, "default", "second")
    with pytest.raises(AttachError, match="two methods can't run at once"):
        logits(model, rows)


def test_beside_another_method() -> None:
    """LoRA on the same linear changes h for all streams."""
    rows = batch()
    for order in (0, 1):
        model = dense()
        both = [method(), pt.LoRA(rank=2, roles=("up", "o"))]
        tuned = pt.attach(model, both if not order else both[::-1])
        tuned.check(rows)
        toys.shake(tuned, 0.2)
        before = streams(model, rows)["depth"][3]
        with torch.no_grad():
            lora = next(s.delta for s in tuned.slots if s.site.key == "encoder.3.up" and isinstance(s.delta, Factors))
            lora.B.zero_()
        assert not torch.allclose(streams(model, rows)["depth"][3], before, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "fields,word",
    [
        ({"tasks": ("depth", "depth")}, "tasks"),
        ({"tasks": ("a.b",)}, "tasks"),
        ({"tasks": (), "rank_task": 4}, "rank_task"),
        ({"tasks": (), "rank_task": None, "mode": "addition"}, "mode"),
        ({"rank_task": {"depth": 1}}, "rank_task"),
        ({"rank_task": {**dict.fromkeys(NAMES, 1), "cats": 1}}, "cats"),
        ({"scale_task": {"depth": 1.0}}, "scale_task"),
        ({"rank_shared": 0}, "rank_shared"),
        ({"rank_shared": (2, 0)}, "rank_shared"),
        ({"rank_shared": (2, 2), "rank_task": (1, 1, 1)}, "equal length"),
        ({"rank_shared": -1}, "rank_shared"),
        ({"rank_task": -1}, "rank_task"),
        ({"scale_shared": 0.0}, "scale_shared"),
        ({"mode": "sum"}, "mode"),
        ({"stages": (0,), "specialised": (1,)}, "specialised"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_refused_configurations(fields: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word) as caught:
        method(**fields)
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize(
    "fields,word",
    [
        ({"rank_shared": (2, 2, 2)}, "2 stages"),
        ({"rank_task": (2, 2, 2)}, "2 stages"),
        ({"stages": (2,)}, "stages"),
        ({"specialised": (4,)}, "specialised"),
        ({"tasks": ("cats",)}, "cats"),
    ],
)
def test_refused_on_this_backbone(fields: dict[str, Any], word: str) -> None:
    model = dense()
    before = toys.snapshot(model)
    with pytest.raises(ConfigError, match=word):
        pt.attach(model, method(**fields))
    assert toys.snapshot(model) == before


@pytest.mark.parametrize("family,word", [
    ("resnet", "no 'q'|not one attention"), ("mixtral", "not one attention|no linear"), ("t5", "another stack"), ("phi3", "fused"),
    ("torch_encoder", "no linear|not one|part"), ("albert", "several times"), ("dit", "told a time"),
])  # fmt: skip
def test_backbones_without_a_place_for_streams(family: str, word: str) -> None:
    if tiny.missing(family):
        pytest.skip(f"needs {tiny.missing(family)}")
    with pytest.raises(pt.PetioleError, match=word):
        pt.attach(tiny.model(family), method())


def test_inputs_of_a_layer_are_checked() -> None:
    h, x, own = inputs()
    made = layer()
    with pytest.raises(ConfigError, match="'depth'"):
        made(h, x, {task: own[task] for task in NAMES[:2]})
    with pytest.raises(ConfigError, match="'cats'"):
        made(h, x, {**own, "cats": own["depth"]})
    with pytest.raises(ConfigError, match="none"):
        layer(ranks={})(h, x, own)


def test_tasks_that_are_not_there() -> None:
    model, tuned = attached()
    with pytest.raises(ConfigError, match="'cats'"), pt.given(model, task="cats"):
        model(**batch())
    with pytest.raises(ConfigError, match="'cats'"):
        keep_task(tuned, "cats")
    with pytest.raises(AttachError, match="addition"):
        keep_task(attached(mode="addition")[1], "depth")
    with pytest.raises(AttachError, match="can't differ"), pt.route(model, ["default", None]):
        model(**batch())


@pytest.mark.parametrize("size", [36, 44])
def test_windows_and_merging_that_need_padding(size: int) -> None:
    """Grids of 18, 9 and 5, or 22, 11 and 6, in windows of 5: every stream is padded and cropped alike."""
    changes = {"image_size": size, "window_size": 5, "depths": [2, 2, 1], "num_heads": [2, 4, 4]}
    model = DenseModel(backbone(**changes), NAMES, width=2).eval()
    scenes = Scenes(2, size=size, tasks=NAMES)
    rows = DensePrediction.collator([scenes[i] for i in range(2)])
    tuned = pt.attach(model, method())
    for own in streams(model, rows).values():
        assert list(own) == [1, 3, 4]
        for state, shared in zip(own.values(), shared_states(model, rows), strict=False):
            torch.testing.assert_close(state.mT.unflatten(-1, shared.shape[-2:]), shared)
    toys.shake(tuned, 0.2)
    whole = logits(model, rows)
    with pt.given(model, task="depth"):
        torch.testing.assert_close(logits(model, rows), whole["depth"], rtol=1e-5, atol=1e-5)
    alone = model(rows["pixel_values"][:1]).logits  # rows don't mix
    torch.testing.assert_close(alone["normals"], whole["normals"][:1], rtol=1e-4, atol=1e-5)
