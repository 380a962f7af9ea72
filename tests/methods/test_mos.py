"""What MoS must hold, by the numbers of its specification."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petiole as pt
import tiny
import toys
from linears import Block, set_
from petiole.errors import AttachError, ConfigError, FileError
from petiole.files import parse, save_adaptation
from petiole.methods.lowrank.mos import Pool
from petiole.store import refill

COUNT, IN, OUT = 4, 12, 8
SMALL: dict[str, Any] = {"equivalent_rank": 3, "rank": 6, "shards_per_vector": 2, "private_rank": 1, "dropout": 0.0}


class Chain(nn.Module):
    """Linears of one shape, each given the same x: (L, n, out)."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weights = [torch.randn(OUT, IN, generator=generator, dtype=torch.float64) / IN**0.5 for _ in range(COUNT)]
        self.blocks = nn.ModuleList([Block(W, None) for W in weights])

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([block(x) for block in self.blocks])


def inputs(rows: int = 5) -> Tensor:
    return torch.randn(rows, IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def attached(seed: int = 0, /, **fields: Any) -> tuple[Chain, pt.Adaptation, Pool]:
    model = Chain()
    found = pt.anatomy(model, stacks={"encoder": "blocks"}, roles={"q": "query"})
    tuned = pt.attach(model, pt.MoS(**{**SMALL, "roles": ("q",), **fields}), seed=seed, found=found)
    model.double()
    (pool,) = tuned.shared[0].pools.values()  # type: ignore[operator,union-attr]
    return model, tuned, pool


def moved(seed: int = 0, /, **fields: Any) -> tuple[Chain, pt.Adaptation, Pool]:
    model, tuned, pool = attached(seed, **fields)
    toys.shake(tuned, 0.5)
    return model, tuned, pool


def written_out(pool: Pool, member: int) -> tuple[Tensor, Tensor]:
    """A and B of one site, shard by shard."""
    r, l = pool.layout.rank, pool.layout.shards
    tables = pool.index_A[member].view(r, l), pool.index_B[member].view(r, l)
    A, B = (
        torch.stack([torch.cat([shards[n] for n in row]) for row in table.tolist()])
        for shards, table in zip((pool.A, pool.B), tables, strict=True)
    )
    return A, B.T


# 1
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_start_is_the_backbone(name: str) -> None:
    model, batch = tiny.model(name), tiny.batch(name)
    bare = toys.output(model, batch)
    tuned = pt.attach(model, pt.MoS())
    assert torch.equal(toys.output(model, batch), bare)
    tuned.check(batch)
    for pool in tuned.shared[0].pools.values():  # type: ignore[operator,union-attr]
        bound = pool.width**-0.5  # of the full vector, not of a shard
        assert 0.9 * bound < float(pool.A.detach().abs().max()) <= bound and not pool.B.any()


# 2
@pytest.mark.parametrize(
    "fields",
    [{}, {"rank": 3, "private_rank": 0}, {"rank": 9, "shards_per_vector": 4}, {"rank": 3, "private_rank": 3}, {"rank": 6, "private_rank": 2}],
)  # fmt: skip
def test_the_budget_alone_decides_the_count(fields: dict[str, Any]) -> None:
    _, tuned, pool = attached(**fields)
    assert tuned.trainable == 3 * COUNT * (IN + OUT)
    assert {name for name, _ in pool.named_parameters()} == {"A", "B"}


def test_counts_at_the_papers_sizes() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        sizes = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008}
        llama = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=32, vocab_size=32000))
    roles = ("q", "k", "v", "o", "gate", "up", "down")
    for e, ranks, count in ((2, (4, 8, None), 4_997_120), (8, (16, 32, None), 19_988_480)):
        for rank in ranks:
            tuned = pt.attach(llama, pt.MoS(equivalent_rank=e, rank=rank))
            assert tuned.trainable == count
            assert len(tuned.shared[0].pools) == 7  # type: ignore[arg-type]
            tuned.detach()
    for rank, count in ((2, 4_997_120), (8, 19_988_480), (64, 159_907_840)):
        tuned = pt.attach(llama, pt.LoRA(rank=rank, roles=roles))
        assert tuned.trainable == count
        tuned.detach()


def test_what_is_left_open_follows_the_published_sizes() -> None:
    assert [(m.private, m.shards) for m in (pt.MoS(), pt.MoS(equivalent_rank=8), pt.MoS(equivalent_rank=1))] == [
        (1, 4),
        (2, 4),
        (0, 4),
    ]
    assert pt.MoS().alpha == 16 and pt.MoS().dropout == 0.1
    assert attached(rank=None)[2].layout.rank == 1 + 2 * COUNT  # 4 e = 12 would need more than there is
    assert attached(equivalent_rank=2, rank=None, private_rank=0)[2].layout.rank == 8 == 4 * 2


# 3
def test_all_private_is_lora_at_each_site() -> None:
    model, _, pool = moved(rank=3, private_rank=3, shards_per_vector=1, alpha=5.0)
    x, g = inputs(), torch.randn(COUNT, 5, OUT, dtype=torch.float64)
    twin = Chain()
    found = pt.anatomy(twin, stacks={"encoder": "blocks"}, roles={"q": "query"})
    lora = pt.attach(twin, pt.LoRA(rank=3, alpha=5.0, roles=("q",)), found=found)
    twin.double()
    for k, slot in enumerate(lora.slots):
        set_(slot.delta.A, pool.A.view(COUNT, 3, IN)[k])
        set_(slot.delta.B, pool.B.view(COUNT, 3, OUT)[k].T)
    y, wanted = model(x), twin(x)
    torch.testing.assert_close(y, wanted)
    gA, gB = torch.autograd.grad((y * g).sum(), [pool.A, pool.B])
    theirs = torch.autograd.grad((wanted * g).sum(), [p for s in lora.slots for p in (s.delta.A, s.delta.B)])
    torch.testing.assert_close(gA, torch.cat(theirs[::2]))
    torch.testing.assert_close(gB, torch.cat([b.T for b in theirs[1::2]]))


# 4
def test_pure_sharing_is_one_change_everywhere() -> None:
    _, tuned, pool = moved(subset_selection=False, rank=3 * COUNT, shards_per_vector=1, private_rank=0)
    assert tuned.trainable == 3 * COUNT * (IN + OUT)
    zero = torch.zeros(OUT, IN, dtype=torch.float64)
    changes = [slot.delta.weight(zero) for slot in tuned.slots]
    wanted = 16 / (3 * COUNT) * pool.B.T @ pool.A
    for change in changes:
        torch.testing.assert_close(change, wanted)
    _, tuned, _ = moved()
    one, two, *_ = [slot.delta.weight(zero) for slot in tuned.slots]
    assert not torch.allclose(one, two)


def test_random_scaling_tells_the_sites_of_pure_sharing_apart() -> None:
    wide = {"equivalent_rank": 60, "rank": None, "shards_per_vector": None, "private_rank": None}
    model, tuned, pool = moved(**wide, differentiation="random_scaling", scaling_deviation=0.3)
    assert tuned.trainable == 60 * COUNT * (IN + OUT) and pool.C is not None and not pool.C.requires_grad
    for k, slot in enumerate(tuned.slots):
        wanted = 16 / (60 * COUNT) * pool.B.T @ torch.diag(pool.C[k]) @ pool.A
        torch.testing.assert_close(slot.delta.weight(torch.zeros(OUT, IN, dtype=torch.float64)), wanted)
        torch.testing.assert_close(model(inputs())[k], inputs() @ (model.blocks[k].query.weight + wanted).T)
    assert float(pool.C.mean()) == pytest.approx(1, abs=0.03) and float(pool.C.std()) == pytest.approx(0.3, rel=0.1)
    assert not torch.equal(pool.C[0], pool.C[1])
    again, other = (attached(seed, **wide, differentiation="random_scaling")[2].C for seed in (0, 1))
    assert again is not None and other is not None and not torch.equal(again, other)


# 5
def test_gradients_add_up_over_uses() -> None:
    model, _, pool = moved()
    x, g = inputs(), torch.randn(COUNT, 5, OUT, dtype=torch.float64)
    y = model(x)
    wanted = []
    for k in range(COUNT):
        A, B = written_out(pool, k)
        wanted.append(x @ (model.blocks[k].query.weight + pool.layout.scale * B @ A).T)
    torch.testing.assert_close(y, torch.stack(wanted))
    mine = torch.autograd.grad((y * g).sum(), [pool.A, pool.B])
    theirs = torch.autograd.grad((torch.stack(wanted) * g).sum(), [pool.A, pool.B])
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_private_shards_hear_of_their_own_site_alone() -> None:
    model, _, pool = moved()
    own = pool.layout.private * pool.layout.shards
    for k in range(COUNT):
        gradients = torch.autograd.grad(model(inputs())[k].sum(), [pool.A, pool.B])
        for gradient in gradients:
            hit = gradient[pool.layout.public :].view(COUNT, own, -1).abs().sum((1, 2)) > 0
            assert hit.tolist() == [j == k for j in range(COUNT)]


# 6
def test_without_dissociation_rows_and_columns_are_pairs() -> None:
    _, _, pool = moved(shards_per_vector=1, pair_dissociation=False)
    assert torch.equal(pool.index_A, pool.index_B)
    pairs = {tuple(a.tolist()): tuple(b.tolist()) for a, b in zip(pool.A, pool.B, strict=True)}
    A, B = written_out(pool, 2)
    assert all(pairs[tuple(a.tolist())] == tuple(b.tolist()) for a, b in zip(A, B.T, strict=True))
    _, _, pool = moved(shards_per_vector=1)
    assert not torch.equal(pool.index_A, pool.index_B)
    own = pool.layout.private * pool.layout.shards
    assert torch.equal(pool.index_A[:, -own:], pool.index_B[:, -own:])  # private ones are the same on both sides


# 7
def test_tables() -> None:
    for fields in ({}, {"rank": 9, "private_rank": 1}, {"private_rank": 2, "rank": 5}, {"private_rank": 0}):
        _, _, pool = attached(**fields)
        p, l, public = pool.layout.private, pool.layout.shards, pool.layout.public
        for table in (pool.index_A, pool.index_B):
            assert table.shape == (COUNT, pool.layout.rank * l)
            for k, row in enumerate(table.tolist()):
                mine = [public + k * p * l + j for j in range(p * l)]
                assert len(set(row)) == len(row)  # nothing twice
                assert row[len(row) - p * l :] == mine  # each private one once, in stored order
                assert all(0 <= n < public for n in row[: len(row) - p * l])
        assert len({tuple(row) for table in (pool.index_A, pool.index_B) for row in table.tolist()}) == 2 * COUNT


def test_every_public_shard_is_as_likely() -> None:
    counts = torch.zeros(2 * 2 * COUNT)
    for seed in range(400):
        _, _, pool = attached(seed, rank=2)
        counts += torch.bincount(pool.index_A[:, : 2 * 1].flatten(), minlength=len(counts))
    assert float(counts.min()) > 150 and float(counts.max()) < 250  # 200 each; four standard deviations are 55


def test_a_seed_is_a_set_of_tables(tmp_path: Path) -> None:
    one, same, other = (attached(seed)[2] for seed in (0, 0, 1))
    assert torch.equal(one.index_A, same.index_A) and torch.equal(one.index_B, same.index_B)
    assert not torch.equal(one.index_A, other.index_A)
    fixed = [attached(seed, seed=5)[2] for seed in (0, 1)]
    assert torch.equal(fixed[0].index_A, fixed[1].index_A) and not torch.equal(fixed[0].A, fixed[1].A)
    assert not torch.equal(attached(0)[2].index_A, fixed[0].index_A)
    assert one.index_A[0].tolist() == [2, 10, 1, 15, 4, 0, 14, 13, 7, 9, 16, 17]  # the same everywhere, for good


def test_the_file_holds_pools_and_the_seed(tmp_path: Path) -> None:
    model, batch = tiny.model("llama"), tiny.batch("llama")
    tuned = pt.attach(model, pt.MoS(dropout=0.0), seed=9)
    toys.shake(tuned)
    path = tuned.save(tmp_path / "a.safetensors")
    tensors, header = parse(path.read_bytes())
    assert {name.rpartition(".")[2] for name in tensors} == {"A", "B"} and len(tensors) == 2 * 7
    assert sum(t.numel() for t in tensors.values()) == tuned.trainable
    assert header["recipe"]["0.shared"]["modules"]["decoder-q-32x32"] == ["decoder.0.q", "decoder.1.q"]
    fresh = tiny.model("llama")
    loaded = pt.load(fresh, path)
    assert torch.equal(toys.output(fresh, batch), toys.output(model, batch))
    for pool, twin in zip(tuned.shared[0].pools.values(), loaded.shared[0].pools.values(), strict=True):  # type: ignore
        assert torch.equal(pool.index_A, twin.index_A) and torch.equal(pool.index_B, twin.index_B)


@pytest.mark.parametrize(
    "change", [{"seed": 3}, {"tables": "other"}, {"modules": {"decoder-q-32x32": ["decoder.1.q", "decoder.0.q"]}}]
)
def test_other_tables_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = pt.attach(tiny.model("llama"), pt.MoS()).save(tmp_path / "a.safetensors")
    tensors, header = parse(path.read_bytes())
    header = {key: value for key, value in header.items() if key not in ("digest", "format")}
    header["recipe"]["0.shared"].update(change)
    save_adaptation(path, tensors, header)
    with pytest.raises(FileError, match=f"another {next(iter(change))}"):
        pt.load(tiny.model("llama"), path)


def test_another_seed_or_list_of_modules_is_refused(tmp_path: Path) -> None:
    path = pt.attach(tiny.model("llama"), pt.MoS(), seed=1).save(tmp_path / "a.safetensors", folded=False)
    refill(pt.attach(tiny.model("llama"), pt.MoS(), seed=1), path)
    for method, seed in ((pt.MoS(), 2), (pt.MoS(roles=("q", "v")), 1), (pt.MoS(layers=(1,), rank=2), 1)):
        with warnings.catch_warnings(), pytest.raises(FileError):
            warnings.simplefilter("ignore")
            refill(pt.attach(tiny.model("llama"), method, seed=seed), path)


# 8
@pytest.mark.parametrize("name", ["bert", "gpt2", "torch_encoder"])
def test_merge_is_the_forward_pass(name: str) -> None:
    toys.assert_merges(name, pt.MoS())


def test_the_rank_is_above_the_budget() -> None:
    _, tuned, _ = moved(equivalent_rank=2, rank=5)
    zero = torch.zeros(OUT, IN, dtype=torch.float64)
    assert [int(torch.linalg.matrix_rank(slot.delta.weight(zero))) for slot in tuned.slots] == [5] * COUNT


# 9
def test_what_no_table_names_gets_nothing() -> None:
    model, tuned, pool = moved(rank=2, private_rank=1)  # 2 of 16 public shards for each of 4 sites
    gradients = torch.autograd.grad(model(inputs()).square().sum(), [pool.A, pool.B])
    for gradient, table in zip(gradients, (pool.index_A, pool.index_B), strict=True):
        hit = gradient.abs().sum(1) > 0
        assert set(hit.nonzero().flatten().tolist()) == set(table.flatten().tolist())
    unused = tuned.shared[0].unused[pool.name]  # type: ignore[index,union-attr]
    assert unused == tuple(24 - len(set(t.flatten().tolist())) for t in (pool.index_A, pool.index_B))
    assert min(unused) >= 24 - 2 * COUNT - 2 * COUNT


# 10
def test_the_order_of_public_shards_does_not_matter() -> None:
    model, _, pool = moved()
    x = inputs()
    before = model(x)
    public, generator = pool.layout.public, torch.Generator().manual_seed(3)
    for end in "AB":
        order = torch.cat([torch.randperm(public, generator=generator), torch.arange(public, len(pool.A))])
        shards, table = getattr(pool, end), getattr(pool, f"index_{end}")
        set_(shards, shards.detach()[order].clone())
        set_(table, order.argsort()[table])
    torch.testing.assert_close(model(x), before)


# groups
def test_one_pool_for_each_stack_role_and_shape() -> None:
    tuned = pt.attach(tiny.model("t5"), pt.MoS(roles=("q", "v", "up")))
    names = set(tuned.shared[0].pools)  # type: ignore[arg-type]
    assert {name.rpartition("-")[0] for name in names} == {
        "encoder-q", "encoder-v", "encoder-up", "decoder-q", "decoder-v", "decoder-up", "decoder-cross_attention-q",
        "decoder-cross_attention-v",
    }  # fmt: skip
    llama = pt.attach(tiny.model("llama"), pt.MoS(roles=("q", "k", "v")))
    assert set(llama.shared[0].pools) == {"decoder-q-32x32", "decoder-k-32x16", "decoder-v-32x16"}  # type: ignore


def test_groups_by_name() -> None:
    roles, groups = ("q", "k", "v", "o"), {"square": ("q", "o"), "keys": ("k",)}
    with pytest.raises(ConfigError, match="'keys' is no name"):  # a word that torch's container needs
        pt.MoS(roles=roles, groups=groups)
    groups = {"square": ("q", "o"), "narrow": ("k", "v")}
    tuned = pt.attach(tiny.model("llama"), pt.MoS(roles=roles, groups=groups), train_head=False)
    pools = tuned.shared[0].pools  # type: ignore[union-attr]
    assert {name: len(pool.layout.sites) for name, pool in pools.items()} == {"square": 4, "narrow": 4}  # type: ignore
    assert tuned.trainable == 2 * 4 * (64 + 48)
    for wrong, message in (
        ({"all": ("q", "k")}, "decoder.0.q .32 to 32. and decoder.0.k .32 to 16."),
        ({"a": ("q",), "b": ("q", "o")}, "decoder.0.q is in the groups 'a' and 'b'"),
        ({"a": ("up",)}, "decoder.0.up, which is not adapted"),
    ):
        with pytest.raises(AttachError, match=message):
            pt.attach(tiny.model("llama"), pt.MoS(roles=roles, groups=wrong))


# beside other things
def test_replacement_uses_a_shard_several_times() -> None:
    with pytest.warns(UserWarning, match="replacement"):
        model, _, pool = moved(equivalent_rank=2, rank=8, replacement=True)
    public = pool.index_A[:, : -pool.layout.shards]
    assert any(len(set(row)) < len(row) for row in public.tolist()) and int(public.max()) < pool.layout.public
    x = inputs()
    wanted = [
        x @ (model.blocks[k].query.weight + pool.layout.scale * B @ A).T
        for k, (A, B) in enumerate(written_out(pool, k) for k in range(COUNT))
    ]
    y = model(x)
    torch.testing.assert_close(y, torch.stack(wanted))
    mine = torch.autograd.grad(y.square().sum(), [pool.A, pool.B])
    theirs = torch.autograd.grad(torch.stack(wanted).square().sum(), [pool.A, pool.B])
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_the_pools_are_held_once() -> None:
    model = tiny.model("bert")
    tuned = pt.attach(model, pt.MoS(), train_head=False)
    names = [name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    assert len(names) == len({id(p) for p in tuned.parameters()}) == 2 * 6
    assert all(name.startswith("petiole_shared") for name in names)
    assert sum("pools" in name for name in model.state_dict()) == 2 * 6  # and no table


def test_a_layer_added_later_leaves_what_was_trained(tmp_path: Path) -> None:
    """The pool is initialised with its group, not with each member."""
    model, _, pool = moved()
    before = pool.A.detach().clone()
    found = pt.anatomy(model, stacks={"encoder": "blocks"}, roles={"q": "query"})
    pt.attach(model, pt.MoS(**SMALL, roles=("q",)), name="more", found=found)
    assert torch.equal(pool.A, before)


def test_export_is_plain_lora_of_the_full_rank(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs PEFT: pip install 'petiole[peft]'")
    for name in ("llama", "gpt2"):
        model, batch = tiny.model(name), tiny.batch(name)
        tuned = pt.attach(model, pt.MoS(rank=3), train_head=False)  # dropout and all
        toys.shake(tuned)
        changed = toys.output(model, batch)
        done = tuned.export(tmp_path / name, check=batch)
        assert all(module.error == 0 for module in done.modules) and "exact" in str(done)
        assert {module.rank for module in done.modules} == ({3} if name == "llama" else {3, 9})  # fused q, k, v
        there = peft.PeftModel.from_pretrained(tiny.model(name), str(tmp_path / name))
        torch.testing.assert_close(toys.output(there, batch), changed, rtol=1e-5, atol=2e-6)


def test_rows_take_other_pools() -> None:
    model, batch = tiny.model("bert"), tiny.batch("bert")
    for name, rank in (("one", 3), ("two", 2)):
        toys.shake(pt.attach(model, pt.MoS(rank=rank), name=name, train_head=False, seed=rank), 0.3)
    alone = {}
    for name in ("one", "two"):
        with pt.route(model, name):
            alone[name] = toys.output(model, batch)
    with pt.route(model, ["two", "one"]):
        mixed = toys.output(model, batch)
    assert torch.allclose(mixed[0], alone["two"][0], atol=1e-5) and torch.allclose(mixed[1], alone["one"][1], atol=1e-5)


def test_one_lookup_for_each_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    """No loop over shards: two lookups, however many there are."""
    found: dict[int, int] = {}
    for l in (1, 4):
        _, tuned, _ = moved(shards_per_vector=l)
        calls: list[int] = []
        real = torch.Tensor.index_select
        monkeypatch.setattr(torch.Tensor, "index_select", lambda *a, c=calls, r=real: (c.append(1), r(*a))[1])
        tuned.slots[0].delta.parts()
        monkeypatch.undo()
        found[l] = len(calls)
    assert found == {1: 2, 4: 2}


# refusals
def configurations() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "rank", {"rank": 0}
    yield "equivalent_rank", {"equivalent_rank": 0}
    yield "shards_per_vector", {"shards_per_vector": 0}
    yield "private_rank = 4 is above equivalent_rank = 3", {"equivalent_rank": 3, "private_rank": 4}
    yield "private_rank = 2 is above rank = 1", {"equivalent_rank": 3, "rank": 1, "private_rank": 2}
    yield "leaves no public shard, so rank = 6 can only be 3", {"equivalent_rank": 3, "rank": 6, "private_rank": 3}
    yield "shards_per_vector = 2", {"subset_selection": False, "shards_per_vector": 2}
    yield "private_rank = 1", {"differentiation": "random_scaling", "private_rank": 1}
    yield "alpha", {"alpha": 0.0}
    yield "scaling_deviation", {"scaling_deviation": 0.0}
    yield "seed", {"seed": -1}
    yield "dropout", {"dropout": 1.0}


@pytest.mark.parametrize("message,fields", list(configurations()))
def test_refused_configurations(message: str, fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=message):
        pt.MoS(**fields)


def test_refused_sizes() -> None:
    with pytest.raises(
        AttachError, match=r"3 does not divide both 12 and 8.*encoder.0.q, encoder.1.q.*\n.*one of 1, 2, 4"
    ):
        attached(shards_per_vector=3)
    with pytest.raises(AttachError, match=r"rank = 10 .* needs 18 public shards .* are 16\n.*1 to 9"):
        attached(rank=10)
    assert attached(rank=9)[2].layout.rank == 9
    with pytest.raises(AttachError, match="their whole pool: 12"):
        attached(subset_selection=False, rank=6, shards_per_vector=1, private_rank=0)
    with pytest.warns(UserWarning, match=r"encoder\.1\.q: alone"):
        attached(layers=(1,), rank=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attached(layers=(1,), rank=3, private_rank=3)  # all private: nothing to share


@pytest.mark.parametrize("name,role", [("bert", "embedding"), ("resnet", "conv")])
def test_what_is_no_linear_is_refused(name: str, role: str) -> None:
    with pytest.raises(AttachError, match="mos"):
        pt.attach(tiny.model(name), pt.MoS(roles=[role]))
