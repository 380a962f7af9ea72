"""Against the real PEFT: what petiole exports gives the same outputs there, what PEFT trained gives the same outputs here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petiole as pt
import tiny
from petiole.errors import AttachError, ConfigError, FileError

peft = pytest.importorskip("peft", reason="needs PEFT: pip install 'petiole[peft]'")
pytestmark = pytest.mark.filterwarnings("ignore")


def first(model: nn.Module, name: str) -> Tensor:
    """The first output of the tiny model of that family."""
    model.eval()
    with torch.no_grad():
        output: Any = model(**tiny.batch(name))
    return output.logits if hasattr(output, "logits") else output[0]


def shake(parameters: Any, size: float = 0.05) -> None:
    """Move parameters as training would, by other numbers each."""
    for number, parameter in enumerate(parameters):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        with torch.no_grad():
            parameter.add_(size * noise)


def attached(name: str, methods: Any, **options: Any) -> tuple[nn.Module, pt.Adaptation, Tensor]:
    model = tiny.model(name)
    bare = first(model, name)
    tuned = pt.attach(model, methods, **options)
    shake(tuned.parameters())
    changed = first(model, name)
    assert not torch.allclose(changed, bare, atol=1e-4)
    return model, tuned, changed


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


# ------------------------------------------------------------------------------------------------------------------------ out and back

EXACT: dict[str, tuple[str, Callable[[], Any]]] = {
    "lora": ("bert", lambda: pt.LoRA(rank=4)),
    "lora-rank-stabilised": ("bert", lambda: pt.LoRA(rank=4, rank_stabilised=True, layers=(1,))),
    "lora-every-linear": ("bert", lambda: pt.LoRA(rank=2, roles=("q", "k", "v", "o", "up", "down", "pooler"))),
    "lora-biases-adapted": ("bert", lambda: pt.LoRA(rank=4, roles=("q", "up"), bias="adapted")),
    "lora-biases-all": ("bert", lambda: pt.LoRA(rank=4, bias="all")),
    "lora-two-heads": ("distilbert", lambda: pt.LoRA(rank=4)),
    "lora-deep-head": ("roberta", lambda: pt.LoRA(rank=4)),
    "lora-slices": ("gpt2", lambda: pt.LoRA(rank=3)),
    "lora-slices-by-head": ("bloom", lambda: pt.LoRA(rank=3)),
    "lora-whole-fused": ("gpt2", lambda: pt.LoRA(rank=2, roles=("qkv", "up", "down"))),
    "lora-gate": ("phi3", lambda: pt.LoRA(rank=2, roles=("q", "v", "gate"))),
    "lora-embeddings": ("gpt2", lambda: pt.LoRA(rank=2, roles=("embedding", "position_embedding", "q"))),
    "lora-tied-head": ("gpt2", lambda: pt.LoRA(rank=2, roles=("lm_head",))),
    "lora-convolutions": ("resnet", lambda: pt.LoRA(rank=4, roles=("conv", "patch_embedding"))),
    "lora-two-stacks": ("t5", lambda: pt.LoRA(rank=4)),
    "lora-two-towers": ("clip", lambda: pt.LoRA(rank=2)),
    "lora-hybrid": ("jamba", lambda: pt.LoRA(rank=2)),
    "lora-patterns": ("llama", lambda: [pt.LoRA(rank=4), pt.LoRA(rank=2, alpha=3.0, roles=("q", "down"), layers=(0,))]),
    "dora": ("bert", lambda: pt.DoRA(rank=4)),
    "dora-slices": ("gpt2", lambda: pt.DoRA(rank=3)),
    "dora-and-lora": ("bert", lambda: [pt.DoRA(rank=4, roles=("q",)), pt.LoRA(rank=2, roles=("v",))]),
    "ia3": ("bert", lambda: pt.IA3()),
    "ia3-two-stacks": ("t5", lambda: pt.IA3()),
    "ia3-slices": ("gpt2", lambda: pt.IA3()),
    "bitfit": ("bert", lambda: pt.BitFit()),
}


@pytest.mark.parametrize("case", EXACT)
def test_exported_and_loaded_by_peft_and_by_petiole(case: str, tmp_path: Path) -> None:
    name, make = EXACT[case]
    _, tuned, changed = attached(name, make())
    done = tuned.export(tmp_path / "out", check=tiny.batch(name))
    assert all(module.error == 0 for module in done.modules) and "exact" in str(done)
    assert done.largest_change is not None and done.largest_change < 1e-5 * max(1.0, done.largest_output or 0)
    there = peft.PeftModel.from_pretrained(tiny.model(name), str(tmp_path / "out"))
    torch.testing.assert_close(first(there, name), changed, rtol=1e-5, atol=2e-6)
    here = tiny.model(name)
    pt.load_peft(here, tmp_path / "out")
    torch.testing.assert_close(first(here, name), changed, rtol=1e-5, atol=2e-6)


def test_peft_merges_what_was_exported(tmp_path: Path) -> None:
    _, tuned, changed = attached("llama", pt.LoRA(rank=4, roles=("q", "up", "down")))
    tuned.export(tmp_path / "out")
    merged = peft.PeftModel.from_pretrained(tiny.model("llama"), str(tmp_path / "out")).merge_and_unload()
    torch.testing.assert_close(first(merged, "llama"), changed, rtol=1e-5, atol=1e-5)


def test_slices_of_a_fused_projection_are_blocks_of_one_lora(tmp_path: Path) -> None:
    _, tuned, _ = attached("gpt2", pt.LoRA(rank=3))
    done = tuned.export(tmp_path / "out")
    assert [(m.path, m.rank) for m in done.modules] == [(f"transformer.h.{n}.attn.c_attn", 6) for n in (0, 1)]
    config = config_of(tmp_path / "out")
    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (6, 32, True)
    assert config["target_modules"] == ["c_attn"]


def test_names_mean_the_adapted_modules_alone(tmp_path: Path) -> None:
    """`dense` alone would also be the pooler's and the other two of each block."""
    _, tuned, _ = attached("bert", pt.LoRA(rank=2, roles=("up",), layers=(1,)))
    tuned.export(tmp_path / "out")
    assert config_of(tmp_path / "out")["target_modules"] == ["1.intermediate.dense"]


def test_a_head_takes_along_what_peft_would_match_with_its_name(tmp_path: Path) -> None:
    """PEFT takes every module whose path ends in `classifier`, and `pre_classifier` does."""
    from safetensors.torch import load_file

    _, tuned, _ = attached("distilbert", pt.LoRA(rank=2))
    tuned.export(tmp_path / "out")
    names = set(load_file(tmp_path / "out" / "adapter_model.safetensors"))
    assert {f"base_model.model.{m}.weight" for m in ("pre_classifier", "classifier")} < names


def test_dropout_is_no_part_of_an_export(tmp_path: Path) -> None:
    model, tuned, changed = attached("bert", pt.LoRA(rank=4, dropout=0.5))
    model.train()
    tuned.export(tmp_path / "out")
    assert model.training and all(module.training for module in model.modules())
    assert config_of(tmp_path / "out")["lora_dropout"] == 0.5
    there = peft.PeftModel.from_pretrained(tiny.model("bert"), str(tmp_path / "out"))
    torch.testing.assert_close(first(there, "bert"), changed, rtol=1e-5, atol=2e-6)


# --------------------------------------------------------------------------------------------------------------- what does not factor


def test_what_does_not_factor_goes_out_with_its_error(tmp_path: Path) -> None:
    _, tuned, changed = attached("bert", [pt.IA3(), pt.LoRA(rank=2)])
    done = tuned.export(tmp_path / "out", max_error=0.3, check=tiny.batch("bert"))
    errors = {module.sites: module.error for module in done.modules}
    assert errors["encoder.0.q"] == 0 and 0 < errors["encoder.0.k"] <= 0.3
    assert f"relative error {errors['encoder.0.k']:.2g}" in str(done)
    there = first(peft.PeftModel.from_pretrained(tiny.model("bert"), str(tmp_path / "out")), "bert")
    assert float((there - changed).abs().max()) == pytest.approx(
        done.largest_change, rel=1e-2
    )  # measured before, true after
    tuned.export(tmp_path / "near", max_error=1e-6)
    there = first(peft.PeftModel.from_pretrained(tiny.model("bert"), str(tmp_path / "near")), "bert")
    torch.testing.assert_close(there, changed, rtol=1e-5, atol=1e-5)


def test_full_fine_tuning_goes_out_as_products_and_whole_norms(tmp_path: Path) -> None:
    model = tiny.model("llama")
    tuned = pt.attach(model, pt.FullFineTuning())
    shake(tuned.parameters(), 0.01)
    changed = first(model, "llama")
    done = tuned.export(tmp_path / "out", max_error=1e-6, check=tiny.batch("llama"))
    assert "model.norm" in done.saved and {module.rank for module in done.modules} == {16, 32}
    there = peft.PeftModel.from_pretrained(tiny.model("llama"), str(tmp_path / "out"))
    torch.testing.assert_close(first(there, "llama"), changed, rtol=1e-4, atol=1e-5)


def test_norms_go_out_whole(tmp_path: Path) -> None:
    _, tuned, changed = attached("bert", pt.NormTuning())
    tuned.export(tmp_path / "out")
    there = peft.PeftModel.from_pretrained(tiny.model("bert"), str(tmp_path / "out"))
    torch.testing.assert_close(first(there, "bert"), changed, rtol=1e-5, atol=2e-6)


def test_a_smaller_rank_is_cut_and_refused_beyond_the_bound(tmp_path: Path) -> None:
    _, tuned, _ = attached("llama", pt.LoRA(rank=4))
    with pytest.raises(AttachError, match=r"rank 2 leaves a relative error .*\nrank = 4 would keep within it"):
        tuned.export(tmp_path / "out", rank=2)
    assert not list(tmp_path.iterdir())
    done = tuned.export(tmp_path / "out", rank=2, max_error=0.9)
    deltas = {slot.site.path: slot.delta for slot in tuned.slots}
    for module in done.modules:
        change = deltas[module.path].weight(torch.zeros(())).detach()
        values = torch.linalg.svdvals(change)
        assert module.rank == 2
        assert module.error == pytest.approx(float(values[2:].norm() / values.norm()), rel=1e-3)


# ----------------------------------------------------------------------------------------------------------------------- refused exports


def test_refused_before_the_first_write(tmp_path: Path) -> None:
    model, tuned, _ = attached("llama", pt.ParallelAdapter(bottleneck=4))
    with pytest.raises(AttachError, match="no change of a weight"):
        tuned.export(tmp_path / "out")
    tuned.detach()
    with pytest.raises(AttachError, match="not attached"):
        tuned.export(tmp_path / "out")
    tuned = pt.attach(model, pt.LoRA(rank=2))
    with pytest.raises(ConfigError, match="peft, vllm, diffusers"):
        tuned.export(tmp_path / "out", for_="ollama")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="rank"):
        tuned.export(tmp_path / "out", rank=0)
    with pytest.raises(ConfigError, match="max_error"):
        tuned.export(tmp_path / "out", max_error=1.0)
    with torch.no_grad():
        next(iter(tuned.parameters())).fill_(float("nan"))
    with pytest.raises(FileError, match="NaN"):
        tuned.export(tmp_path / "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "note").write_text("mine")
    with pytest.raises(ConfigError, match="not an empty folder"):
        tuned.export(tmp_path / "taken")


def test_weights_read_past_their_module_are_refused(tmp_path: Path) -> None:
    tuned = pt.attach(tiny.model("mixtral"), pt.LoRA(rank=2, roles=("up",)))
    with pytest.raises(AttachError, match="read past its module"):
        tuned.export(tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------------------- PEFT's own files


def trained(name: str, folder: Path, **fields: Any) -> Tensor:
    """Save what PEFT would have trained, and return the outputs with it."""
    kind = fields.pop("kind", peft.LoraConfig)
    model = peft.get_peft_model(tiny.model(name), kind(**fields))
    shake((parameter for parameter in model.parameters() if parameter.requires_grad), 0.2)
    model.save_pretrained(str(folder), save_embedding_layers=fields.get("save_embedding_layers", "auto"))
    return first(model, name)


MADE: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("bert", {"target_modules": ["query", "value"], "r": 4, "lora_alpha": 8}),
    "head": ("bert", {"target_modules": ["query"], "r": 4, "modules_to_save": ["classifier"]}),
    "task-type": ("distilbert", {"target_modules": ["q_lin"], "task_type": "SEQ_CLS"}),
    "rank-stabilised": ("llama", {"target_modules": "all-linear", "r": 4, "use_rslora": True}),
    "pattern": ("llama", {"target_modules": r".*\.1\.self_attn\.[qv]_proj", "r": 4}),
    "some-layers": ("llama", {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    "rank-and-alpha-patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "k_proj", "v_proj"],
            "r": 4,
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, "v_proj": 3},
            "alpha_pattern": {"^model.layers.0.self_attn.k_proj": 5, "v_proj": 9},
        },
    ),
    "bias-all": ("bert", {"target_modules": ["query", "value"], "bias": "all"}),
    "bias-lora-only": ("bert", {"target_modules": ["query", "output.dense"], "bias": "lora_only"}),
    "lora-bias": ("bert", {"target_modules": ["value", "intermediate.dense"], "lora_bias": True}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "convolution": ("resnet", {"target_modules": ["convolution"], "r": 2}),
    "dora": ("bert", {"target_modules": ["query", "intermediate.dense"], "use_dora": True}),
    "dora-rank-stabilised": ("gpt2", {"target_modules": ["c_attn"], "use_dora": True, "use_rslora": True, "fan_in_fan_out": True}),
    "two-stacks": ("t5", {"target_modules": ["q", "wo"], "task_type": "SEQ_2_SEQ_LM"}),
    "ia3": ("bert", {"kind": peft.IA3Config, "target_modules": ["key", "value", "output.dense"], "feedforward_modules": ["output.dense"]}),
    "ia3-conv1d": (
        "gpt2",
        {
            "kind": peft.IA3Config,
            "target_modules": ["c_attn", "mlp.c_proj"],
            "feedforward_modules": ["mlp.c_proj"],
            "fan_in_fan_out": True,
        },
    ),
    "ia3-defaults": ("t5", {"kind": peft.IA3Config}),
}  # fmt: skip


@pytest.mark.parametrize("case", MADE)
def test_trained_by_peft_and_loaded_here(case: str, tmp_path: Path) -> None:
    name, fields = MADE[case]
    wanted = trained(name, tmp_path / "in", **fields)
    model = tiny.model(name)
    state, bare = {key: value.clone() for key, value in model.state_dict().items()}, first(model, name)
    assert not torch.allclose(wanted, bare, atol=2e-5)
    tuned = pt.load_peft(model, tmp_path / "in")
    torch.testing.assert_close(first(model, name), wanted, rtol=1e-5, atol=2e-6)
    tuned.save(tmp_path / "own.safetensors")  # it is an adaptation like any other
    again = tiny.model(name)
    pt.load(again, tmp_path / "own.safetensors")
    torch.testing.assert_close(first(again, name), wanted, rtol=1e-5, atol=2e-6)
    tuned.export(tmp_path / "out")
    there = peft.PeftModel.from_pretrained(tiny.model(name), str(tmp_path / "out"))
    torch.testing.assert_close(first(there, name), wanted, rtol=1e-5, atol=2e-6)
    tuned.detach()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert torch.equal(first(model, name), bare)


def test_methods_say_what_was_loaded(tmp_path: Path) -> None:
    trained("llama", tmp_path / "in", target_modules=["q_proj", "v_proj"], r=4, lora_alpha=12, lora_dropout=0.1)
    tuned = pt.load_peft(tiny.model("llama"), tmp_path / "in", name="legal")
    assert tuned.name == "legal"
    assert tuned.methods == (pt.LoRA(rank=4, alpha=12.0, dropout=0.1, roles=("q", "v")),)


def test_a_loaded_checkpoint_trains_on(tmp_path: Path) -> None:
    trained("bert", tmp_path / "in", target_modules=["query"], modules_to_save=["classifier"])
    model = tiny.model("bert")
    tuned = pt.load_peft(model, tmp_path / "in")
    tuned.check(tiny.batch("bert"))
    before = first(model, "bert")
    model.train()
    optimizer = torch.optim.SGD(tuned.parameters(), 0.5)
    model(**tiny.batch("bert")).loss.backward()
    optimizer.step()
    assert not torch.allclose(first(model, "bert"), before)


# ------------------------------------------------------------------------------------------------------------------------- refused loads


def damaged(folder: Path, **changes: Any) -> None:
    """Change fields of the configuration."""
    (folder / "adapter_config.json").write_text(json.dumps({**config_of(folder), **changes}))


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Change the tensors."""
    from safetensors.torch import load_file, save_file

    save_file(change(load_file(folder / "adapter_model.safetensors")), folder / "adapter_model.safetensors")


Q0 = "base_model.model.bert.encoder.layer.0.attention.self.query"
REFUSED: dict[str, tuple[str, Callable[[Path], None]]] = {
    "no-config": ("can't be read", lambda folder: (folder / "adapter_config.json").unlink()),
    "config-is-a-list": ("peft_type is None", lambda folder: (folder / "adapter_config.json").write_text("[]") and None),
    "config-no-json": ("damaged", lambda folder: (folder / "adapter_config.json").write_text("{") and None),
    "another-kind": ("'ADALORA'; petiole reads", lambda folder: damaged(folder, peft_type="ADALORA")),
    "another-code": ("'os.system'", lambda folder: damaged(folder, peft_type="os.system")),
    "no-weights": ("can't be read", lambda folder: (folder / "adapter_model.safetensors").unlink()),
    "cut-short": (
        "no valid safetensors",
        lambda folder: (folder / "adapter_model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes()[:-9]) and None,
    ),
    "pickled": (
        "never unpickles",
        lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin") and None,
    ),
    "not-finite": ("NaN", lambda folder: rewritten(folder, lambda t: {k: v.fill_(float("nan")) for k, v in t.items()})),
    "no-such-module": (
        "no module of this BertFor",
        lambda folder: rewritten(folder, lambda t: {k.replace("self.query", "self.q_proj"): v for k, v in t.items()})
        or damaged(folder, target_modules=["q_proj"]),
    ),
    "no-linear": (
        "no linear, convolution or embedding",
        lambda folder: rewritten(folder, lambda t: {k.replace("self.query", "self"): v for k, v in t.items()})
        or damaged(folder, target_modules=["self"]),
    ),
    "half-a-pair": (
        "has lora_A.weight",
        lambda folder: rewritten(folder, lambda t: {k: v for k, v in t.items() if k != f"{Q0}.lora_B.weight"}),
    ),
    "another-size": ("fit", lambda folder: rewritten(folder, lambda t: {k: v[:, :-1].contiguous() if "lora_A" in k else v for k, v in t.items()})),
    "another-rank": ("have rank 4, adapter_config.json says 8", lambda folder: damaged(folder, r=8)),
    "surplus": ("is no tensor of this", lambda folder: rewritten(folder, lambda t: {**t, "base_model.model.ghost.weight": torch.ones(2)})),
    "replaced-backbone": (
        "is no task head",
        lambda folder: rewritten(folder, lambda t: {**t, "base_model.model.bert.pooler.dense.weight": torch.ones(32, 32)}),
    ),
    "half-a-head": (
        "not whole",
        lambda folder: rewritten(folder, lambda t: {**t, "base_model.model.classifier.weight": torch.ones(3, 32)}),
    ),
    "more-classes": (
        "as many classes",
        lambda folder: rewritten(folder, lambda t: {**t, "base_model.model.classifier.weight": torch.ones(5, 32)}),
    ),
    "targets-differ": ("doesn't name", lambda folder: damaged(folder, target_modules=["key"])),
    "unknown-field": ("'frobnicate'", lambda folder: damaged(folder, frobnicate=3)),
    "tokens-only": ("'alora_invocation_tokens'", lambda folder: damaged(folder, alora_invocation_tokens=[1])),
    "moved-backbone": ("also changes the backbone", lambda folder: damaged(folder, init_lora_weights="pissa_niter_4")),
    "pattern-as-rank": ("a pattern, not the name", lambda folder: damaged(folder, rank_pattern={"(.*query)": 4})),
    "rank-no-number": ("no int", lambda folder: damaged(folder, r="4")),
    "alpha-no-number": ("no float", lambda folder: damaged(folder, lora_alpha=True)),
    "alpha-negative": ("alpha", lambda folder: damaged(folder, lora_alpha=-8)),
    "bias-unknown": ("bias", lambda folder: damaged(folder, bias="some")),
    "dora-without-magnitude": ("has lora_A", lambda folder: damaged(folder, use_dora=True)),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound checkpoint of PEFT."""
    folder = tmp_path_factory.mktemp("sound") / "in"
    trained("bert", folder, target_modules=["query"], r=4)
    return folder


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_model_as_it_was(case: str, sound: Path, tmp_path: Path) -> None:
    import shutil

    words, damage = REFUSED[case]
    folder = tmp_path / "in"
    shutil.copytree(sound, folder)
    damage(folder)
    model = tiny.model("bert")
    names, bare = list(model.state_dict()), first(model, "bert")
    with pytest.raises(FileError, match=words) as caught:
        pt.load_peft(model, folder)
    assert str(caught.value).count("\n") < 3
    assert list(model.state_dict()) == names and "_petiole" not in model.__dict__
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(first(model, "bert"), bare)


def test_a_catastrophic_pattern_is_never_run(sound: Path, tmp_path: Path) -> None:
    """As a regular expression, this one would not come back."""
    import shutil

    folder = tmp_path / "in"
    shutil.copytree(sound, folder)
    damaged(folder, target_modules="(.*.*.*.*.*.*.*.*.*)*$x", rank_pattern={})
    pt.load_peft(tiny.model("bert"), folder)


def test_some_of_the_linears_of_one_role_are_refused(tmp_path: Path) -> None:
    """Role and depth can't tell them apart: rather nothing than another one."""
    trained("qwen3_next", tmp_path / "in", target_modules=["in_proj_ba"])
    with pytest.raises(FileError, match="same role"):
        pt.load_peft(tiny.model("qwen3_next"), tmp_path / "in")
