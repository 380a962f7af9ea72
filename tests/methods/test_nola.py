"""What NOLA must hold, by the numbers of its specification."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import petiole as pt
import tiny
import toys
from linears import OneLinear, attached, gradients, of, set_
from petiole.errors import AttachError, ConfigError, FileError
from petiole.files import parse, save_adaptation
from petiole.method import Base
from petiole.methods.lowrank import counter
from petiole.methods.lowrank.nola import packed, unpacked
from petiole.store import refill

SMALL: dict[str, Any] = {"rank": 3, "num_basis": (6, 5)}
VARIANTS = ["llm", "paper", "vit"]


def matrix(out_features: int = 9, in_features: int = 7) -> Tensor:
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0)) / in_features**0.5


def inputs() -> Tensor:
    return torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(1))


def moved(seed: int = 0, **fields: Any) -> tuple[OneLinear, Any]:
    """One linear with NOLA whose coefficients have moved."""
    model, delta = attached(pt.NOLA(**{**SMALL, **fields}), matrix(), seed=seed)
    generator = torch.Generator().manual_seed(2)
    set_(delta.alpha, torch.randn(6, generator=generator))
    set_(delta.beta, torch.randn(5, generator=generator))
    return model, delta


def explicit(delta: Any) -> tuple[Tensor, Tensor]:
    """A and B from whole bases, as differentiable functions of α and β."""
    bases = [b.whole().view(b.count, *b.shape) * bound for b, bound in zip(delta.bases, delta.bounds, strict=True)]
    A = torch.einsum("k,krd->rd", delta.alpha, bases[0][: len(delta.alpha)])
    if delta.offset:
        A = A + bases[0][-1] / delta.bounds[0] * delta.width**-0.5
    return A, torch.einsum("k,kdr->dr", delta.beta, bases[1])


# 1
def test_counts_at_the_papers_sizes() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    large = {
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 28672,
    }
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(**large, vocab_size=32000))
        gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16))
    roles = ["q", "k", "v", "o", "gate", "up", "down"]
    lora = pt.attach(llama, pt.LoRA(rank=1, roles=roles))
    lora.detach()
    nola = pt.attach(llama, pt.NOLA(rank=16, num_basis=512, alpha=4, roles=roles))
    assert (lora.trainable, nola.trainable) == (12_943_360, 573_440)
    assert round(lora.trainable / nola.trainable, 1) == 22.6
    assert pt.attach(gpt2, pt.NOLA(num_basis=1024)).trainable == 98_304


def test_neither_count_nor_file_grows_with_rank(tmp_path: Path) -> None:
    sizes, counts = set(), set()
    for rank in (2, 4, 8):
        tuned = pt.attach(tiny.model("llama"), pt.NOLA(rank=rank, num_basis=(6, 5)), seed=1)
        counts.add(tuned.trainable)
        sizes.add(tuned.save(tmp_path / f"{rank}.safetensors").stat().st_size)
    assert counts == {2 * 2 * (6 + 5)} and len(sizes) == 1


# 2
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("variant", ["llm", "paper"])
def test_start_is_the_backbone(name: str, variant: Any) -> None:
    model, batch = tiny.model(name), tiny.batch(name)
    bare = toys.output(model, batch)
    tuned = pt.attach(model, pt.NOLA(num_basis=6, variant=variant))
    assert torch.equal(toys.output(model, batch), bare)
    tuned.check(batch)


def test_where_each_variant_starts() -> None:
    _, llm = attached(pt.NOLA(**SMALL), matrix())
    assert not llm.alpha.any() and not llm.beta.any()
    A, _ = explicit(llm)
    assert bool(A.any()) and A.abs().max() <= 7**-0.5  # A₀ alone, Kaiming-uniform
    _, paper = attached(pt.NOLA(**{**SMALL, "num_basis": (4000, 5)}, variant="paper"), matrix())
    assert not paper.beta.any() and paper.alpha.std().item() == pytest.approx(7**-0.5, rel=0.1)
    _, vit = attached(pt.NOLA(**SMALL, variant="vit"), matrix())
    assert torch.equal(vit.alpha, torch.full((6,), 1 / 6)) and torch.equal(vit.beta, torch.full((5,), 1 / 5))
    assert vit.bounds == pytest.approx(((7 * 3) ** -0.5, (9 * 3) ** -0.5))
    assert llm.bounds == pytest.approx((6**-0.5, 5**-0.5))
    assert (
        pt.NOLA(variant="vit").scaling == 1 / 8 and pt.NOLA().scaling == 1 and pt.NOLA(alpha=4, rank=16).scaling == 0.25
    )


# 3
@pytest.mark.parametrize("cache_basis", ["never", "forward", "always"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_the_explicit_basis(variant: Any, cache_basis: Any) -> None:
    model, delta = moved(variant=variant, cache_basis=cache_basis, chunk=2)
    x, g = inputs().requires_grad_(), torch.randn(4, 5, 9)
    y = model(x)
    A, B = explicit(delta)
    wanted = x @ model.linear.weight.T + delta.method.scaling * x @ A.T @ B.T
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    for mine, autograd in zip(
        gradients(y, g, delta.alpha, delta.beta, x), gradients(wanted, g, delta.alpha, delta.beta, x), strict=True
    ):
        torch.testing.assert_close(mine, autograd, rtol=1e-5, atol=1e-4)


# 4
def test_a_seed_is_a_basis() -> None:
    _, one = moved(seed=0)
    _, same = moved(seed=0)
    _, other = moved(seed=1)
    for a, b, c in zip(one.bases, same.bases, other.bases, strict=True):
        assert toys.bits(a.whole()) == toys.bits(b.whole()) != toys.bits(c.whole())
    assert len({basis.seed for delta in (one, other) for basis in delta.bases}) == 4  # A's and B's are apart
    zero = torch.zeros(9, 7)
    assert torch.equal(one.weight(zero), same.weight(zero)) and not torch.allclose(one.weight(zero), other.weight(zero))


def test_one_seed_for_all_sites() -> None:
    tuned = pt.attach(tiny.model("bert"), pt.NOLA(num_basis=4, shared_seed=5))
    deltas = [slot.delta for slot in tuned.slots if slot.number == 0]
    assert len({delta.bases for delta in deltas}) == 1
    assert len({basis.seed for basis in deltas[0].bases}) == 2
    apart = pt.attach(tiny.model("bert"), pt.NOLA(num_basis=4))
    assert len({slot.delta.bases for slot in apart.slots if slot.number == 0}) == len(deltas)


# 5
def test_chunk_and_cache_do_not_show() -> None:
    x, found = inputs(), []
    for chunk in (1, 2, 4, 100):
        for cache_basis in ("never", "forward", "always"):
            model, delta = moved(chunk=chunk, cache_basis=cache_basis)
            y = model(x)
            found.append([y, *gradients(y, torch.ones_like(y), delta.alpha, delta.beta)])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


# 6
def test_no_random_state_moves() -> None:
    model, _ = moved(dropout=0.0)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    model.train()(inputs()).sum().backward()
    model.eval()(inputs())
    assert torch.equal(torch.get_rng_state(), before)


# 7
@pytest.mark.parametrize("name", ["bert", "gpt2", "torch_encoder"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_merge_is_the_forward_pass(name: str, variant: Any) -> None:
    toys.assert_merges(name, pt.NOLA(num_basis=6, variant=variant), size=0.5, tolerance=1e-4)


def test_the_change_has_the_rank_asked_for() -> None:
    """With 11 numbers, which in LoRA are not even one row and one column."""
    for rank in (1, 3, 6):
        _, delta = moved(rank=rank)
        assert int(torch.linalg.matrix_rank(delta.weight(torch.zeros(9, 7)))) == rank


# 8
@pytest.mark.parametrize("variant", VARIANTS)
def test_linear_in_the_coefficients(variant: Any) -> None:
    model, delta = moved(variant=variant)
    x = inputs()
    bare = OneLinear(matrix())(x)

    def change(parameter: Tensor, value: Tensor) -> Tensor:
        before = parameter.detach().clone()
        set_(parameter, value)
        found = (model(x) - bare).detach()
        set_(parameter, before)
        return found

    for parameter in (delta.beta, delta.alpha) if not delta.offset else (delta.beta,):
        one, two = torch.randn(parameter.shape), torch.randn(parameter.shape)
        wanted = 2 * change(parameter, one) - 3 * change(parameter, two)
        torch.testing.assert_close(change(parameter, 2 * one - 3 * two), wanted, rtol=1e-4, atol=1e-4)


# 9
def test_memory_grows_with_the_chunk_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    real = counter.uniform
    monkeypatch.setattr(counter, "uniform", lambda *a, **k: drawn.append(real(*a, **k).numel()) or real(*a, **k))
    kept: dict[int, int] = {}
    for count in (6, 60):
        drawn.clear()
        numbers: list[int] = []
        model, _ = attached(pt.NOLA(rank=3, num_basis=count, chunk=2), matrix())
        with saved_tensors_hooks(lambda t, n=numbers: (n.append(t.numel()), t)[1], lambda t: t):
            y = model(inputs())
        y.sum().backward()
        assert drawn and max(drawn) <= 2 * 3 * 9
        kept[count] = sum(numbers) - 2 * count  # but for the coefficients
    assert kept[60] <= kept[6]


def test_an_evaluation_draws_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, delta = moved()
    drawn: list[int] = []
    real = counter.uniform
    monkeypatch.setattr(counter, "uniform", lambda *a, **k: drawn.append(1) or real(*a, **k))
    x = inputs()
    with torch.no_grad():
        first = model(x)
        count = len(drawn)
        assert torch.equal(model(x), first) and len(drawn) == count
        delta.beta.data[0] += 1  # even where no version is counted
        assert not torch.allclose(model(x), first) and len(drawn) == 2 * count


# files
def test_the_file_holds_coefficients_and_the_recipe(tmp_path: Path) -> None:
    model, batch = tiny.model("llama"), tiny.batch("llama")
    tuned = pt.attach(model, pt.NOLA(num_basis=6), seed=9)
    toys.shake(tuned)
    path = tuned.save(tmp_path / "a.safetensors")
    tensors, header = parse(path.read_bytes())
    assert {name.rpartition(":")[2] for name in tensors} == {"alpha", "beta"}
    assert {recipe["generator"] for recipe in header["recipe"].values()} == {counter.NAME}
    fresh = tiny.model("llama")
    pt.load(fresh, path)
    assert torch.equal(toys.output(fresh, batch), toys.output(model, batch))


def changed_recipe(path: Path, change: dict[str, Any]) -> None:
    tensors, header = parse(path.read_bytes())
    header = {key: value for key, value in header.items() if key not in ("digest", "format")}
    for recipe in header["recipe"].values():
        recipe.update(change)
    save_adaptation(path, tensors, header)


@pytest.mark.parametrize(
    "change", [{"generator": "splitmix64-23"}, {"variant": "paper"}, {"A": [1, 7, 8, 32]}, {"B": [1, 6, 32, 4]}]
)
def test_another_basis_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = pt.attach(tiny.model("llama"), pt.NOLA(num_basis=6)).save(tmp_path / "a.safetensors")
    pt.load(tiny.model("llama"), path)
    changed_recipe(path, change)
    with pytest.raises(FileError, match=f"another {next(iter(change))}"):
        pt.load(tiny.model("llama"), path)


def test_another_seed_or_size_is_refused(tmp_path: Path) -> None:
    path = pt.attach(tiny.model("llama"), pt.NOLA(num_basis=6), seed=1).save(tmp_path / "a.safetensors", folded=False)
    refill(pt.attach(tiny.model("llama"), pt.NOLA(num_basis=6), seed=1), path)
    for method, seed in (
        (pt.NOLA(num_basis=6), 2),
        (pt.NOLA(num_basis=6, rank=4), 1),
        (pt.NOLA(num_basis=(6, 6), variant="paper"), 1),
    ):
        with pytest.raises(FileError):
            refill(pt.attach(tiny.model("llama"), method, seed=seed), path)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_packed_coefficients(tmp_path: Path, bits: Any) -> None:
    model, batch = tiny.model("llama"), tiny.batch("llama")
    tuned = pt.attach(model, pt.NOLA(num_basis=(7, 8), save_bits=bits))
    toys.shake(tuned, 0.3)
    path = tuned.save(tmp_path / "a.safetensors")
    tensors, _ = parse(path.read_bytes())
    for name, tensor in tensors.items():
        if name.endswith("codes"):
            size = 7 if "alpha" in name else 8
            assert tensor.numel() * tensor.element_size() == -(-size * bits // 8)
    fresh = tiny.model("llama")
    loaded = pt.load(fresh, path)
    for one, two in zip(tuned.parameters(), loaded.parameters(), strict=True):
        spacing = (one.max() - one.min()) / (2**bits - 1)
        assert bool(((one - two).abs() <= 0.51 * spacing + 1e-6).all())
        assert torch.isclose(one.max(), two.max()) and torch.isclose(one.min(), two.min())
    if bits == 16:
        torch.testing.assert_close(toys.output(fresh, batch), toys.output(model, batch), rtol=1e-3, atol=1e-4)
    again = loaded.save(tmp_path / "b.safetensors")
    for name, tensor in parse(again.read_bytes())[0].items():
        if name.endswith("codes"):
            assert torch.equal(tensor, tensors[name])


def values() -> Iterator[Tensor]:
    yield torch.zeros(5)
    yield torch.full((3,), 2.5)
    yield torch.tensor([1.0])
    yield torch.linspace(-1, 3, 16)


@pytest.mark.parametrize("tensor", list(values()))
def test_packing_gives_back_what_fits_its_steps(tensor: Tensor) -> None:
    for bits in (16, 8, 4):
        stored = packed(tensor, bits)
        torch.testing.assert_close(
            unpacked(stored["codes"], stored["range"], bits, len(tensor)), tensor, rtol=1e-4, atol=1e-4
        )


# beside other things
def test_gradient_checkpointing_draws_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny.model("bert"), tiny.batch("bert")
    tuned = pt.attach(model, pt.NOLA(num_basis=6))
    toys.shake(tuned)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.zero_grad()
        model.train()(**batch).loss.backward()
        found.append([p.grad.clone() for p in tuned.parameters()])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_half_precision_draws_in_full() -> None:
    model = OneLinear(matrix().bfloat16())
    tuned = pt.attach(
        model,
        pt.NOLA(**SMALL, roles=("q",), layers=(0,)),
        found=pt.anatomy(model, stacks={"encoder": "blocks"}, roles={"q": "query"}),
    )
    toys.shake(tuned)
    A, B, *_ = tuned.slots[0].delta.parts()
    assert A.dtype == B.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        other, *_ = tuned.slots[0].delta.parts()
    assert torch.equal(A, other)


def test_rows_take_other_mixtures() -> None:
    model, batch = tiny.model("bert"), tiny.batch("bert")
    for name, rank in (("one", 3), ("two", 5)):
        toys.shake(pt.attach(model, pt.NOLA(rank=rank, num_basis=6), name=name, train_head=False, seed=rank), 0.5)
    alone = {}
    for name in ("one", "two"):
        with pt.route(model, name):
            alone[name] = toys.output(model, batch)
    with pt.route(model, ["two", "one"]):
        mixed = toys.output(model, batch)
    assert torch.allclose(mixed[0], alone["two"][0], atol=1e-5) and torch.allclose(mixed[1], alone["one"][1], atol=1e-5)


# refusals
@pytest.mark.parametrize(
    "fields",
    [{"rank": 0}, {"rank": None}, {"num_basis": 0}, {"num_basis": (4, 0)}, {"num_basis": (4,)}, {"chunk": 0}, {"variant": "gpt"},
     {"alpha": 0.0}, {"alpha": -1.0}, {"save_bits": 2}, {"cache_basis": "backward"}, {"shared_seed": -1}],
)  # fmt: skip
def test_refused_configurations(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        pt.NOLA(**fields)


@pytest.mark.parametrize("name,role", [("bert", "embedding"), ("resnet", "conv")])
def test_what_is_no_linear_is_refused(name: str, role: str) -> None:
    with pytest.raises(AttachError, match="nola"):
        pt.attach(tiny.model(name), pt.NOLA(num_basis=4, roles=[role]))


def test_the_plain_forward_is_the_fast_one() -> None:
    model, delta = moved()
    x = inputs()
    site = of(model).slots[0].site
    torch.testing.assert_close(
        model(x) - OneLinear(matrix())(x), delta(x, Base(site, model.linear)), rtol=1e-4, atol=1e-5
    )
