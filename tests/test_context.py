"""What holds for one forward pass: right per thread and task, nested, gone with its `with`, and still there when a part is recomputed."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import petiole as pt
import tiny
import toys
from petiole import context
from petiole.errors import AttachError
from petiole.method import Base, HiddenDelta, Method, Place
from toys import Affine, Dense, on, output, shake


class Told(HiddenDelta):
    """h + g v, with g given for the forward pass: a number, or one for each row."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.empty(size))

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        self.value.normal_(generator=generator)

    def forward(self, h: Tensor) -> Tensor:
        gain = torch.as_tensor(self.given("gain"), dtype=h.dtype)
        return gain.view(-1, *[1] * (h.ndim - 1)) * self.value


def told() -> Method:
    return toys.method(on(["ffn"], lambda s: Told(s.out_features)))


def attached(family: str, method: Method, **options: Any) -> tuple[nn.Module, dict[str, Any], pt.Adaptation]:
    model = toys.model(family)
    return model, tiny.batch(family), pt.attach(model, method, train_head=False, **options)


# ----------------------------------------------------------------------------------------------------------------------- given


def test_a_value_holds_inside_its_with_and_nested() -> None:
    model, batch, _ = attached("bert", told())
    expected = {}
    for gain in (1.0, 2.0):
        with pt.given(model, gain=gain):
            expected[gain] = output(model, batch)
    assert not torch.allclose(expected[1.0], expected[2.0])
    with pt.given(model, gain=1.0, other=3):
        with pt.given(model, gain=2.0):
            assert torch.equal(output(model, batch), expected[2.0])
        assert torch.equal(output(model, batch), expected[1.0])
        with pt.given(model, something="else"):
            assert torch.equal(output(model, batch), expected[1.0])
    with pytest.raises(AttachError, match=r"with pt\.given\(model, gain="):
        output(model, batch)


def test_a_failure_inside_leaves_nothing_behind() -> None:
    model, batch, _ = attached("bert", told())
    with pytest.raises(RuntimeError), pt.given(model, gain=1.0), pt.disabled(model):
        raise RuntimeError
    assert context.current() is context.EMPTY
    assert context._open == 0
    with pytest.raises(AttachError):
        output(model, batch)


def test_a_value_for_each_row() -> None:
    model, batch, _ = attached("bert", told())
    rows = {}
    for i, gain in enumerate((1.0, -2.0)):
        with pt.given(model, gain=gain):
            rows[i] = output(model, batch)[i]
    with pt.given(model, gain=torch.tensor([1.0, -2.0])):
        mixed = output(model, batch)
    torch.testing.assert_close(mixed, torch.stack([rows[0], rows[1]]), rtol=1e-5, atol=1e-6)


def test_two_models_do_not_see_each_others() -> None:
    one, batch, _ = attached("bert", told())
    other, _, _ = attached("bert", told())
    with pt.given(one, gain=1.0), pytest.raises(AttachError):
        output(other, batch)
    with pt.given(one, gain=1.0), pt.given(other, gain=2.0), pt.disabled(other):
        first, second = output(one, batch), output(other, batch)
    assert torch.equal(second, output(toys.model("bert"), batch))
    with pt.given(one, gain=1.0):
        assert torch.equal(output(one, batch), first)


# -------------------------------------------------------------------------------------------------------------- recomputation


def gradients(tuned: pt.Adaptation) -> list[Tensor]:
    found = [p.grad.clone() for p in tuned.parameters() if p.grad is not None]
    for parameter in tuned.parameters():
        parameter.grad = None
    return found


def same(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


CHECKPOINTED = [(f, r) for f in ("bert", "llama", "gpt2", "vit", "t5") for r in (False, True)]


@pytest.mark.parametrize("family, reentrant", CHECKPOINTED)
def test_a_value_is_there_when_its_block_is_computed_again(family: str, reentrant: bool) -> None:
    """Long after the `with`, and for two forward passes before one backward pass."""
    model, batch, tuned = attached(family, told())
    model.train()

    def losses() -> Tensor:
        total = torch.zeros(())
        for gain in (1.0, -2.0):
            with pt.given(model, gain=gain):
                total = total + model(**batch).loss
        return total

    losses().backward()
    expected = gradients(tuned)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    losses().backward()
    same(gradients(tuned), expected)
    tuned.detach()
    held = [m._gradient_checkpointing_func for m in model.modules() if hasattr(m, "_gradient_checkpointing_func")]
    assert held and not any(isinstance(f, context.Recall) for f in held)


@pytest.mark.parametrize("family, reentrant", CHECKPOINTED)
def test_rows_are_routed_when_their_block_is_computed_again(family: str, reentrant: bool) -> None:
    model, batch, first = attached(family, toys.method(on(["down"], Dense)), name="a")
    second = pt.attach(model, toys.method(on(["ffn"], lambda s: Affine(s.out_features))), name="b", train_head=False)
    model.train()

    def run() -> tuple[list[Tensor], list[Tensor]]:
        with pt.route(model, ["b", "a"]):
            loss = model(**batch).loss
        with pt.disabled(model):
            loss = loss + model(**batch).loss.detach()
        loss.backward()
        return gradients(first), gradients(second)

    expected = run()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found = run()
    for one, other in zip(found, expected, strict=True):
        same(one, other)


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_was_put_aside_is_aside_when_a_block_is_computed_again(reentrant: bool) -> None:
    """The trained values of another adaptation came back for the recomputation."""
    own = toys.method(
        trains=lambda self, a, m: [n for n, _ in m.named_parameters() if n.endswith("intermediate.dense.weight")]
    )
    model, batch, trained = attached("bert", own, name="own")
    shake(trained, 1.0)
    tuned = pt.attach(model, toys.method(on(["q"], Dense)), name="delta", train_head=False)
    model.train()
    model(**batch).loss.backward()
    expected = gradients(tuned)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model(**batch).loss.backward()
    same(gradients(tuned), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_was_read_in_another_block_is_there_when_a_block_is_computed_again(reentrant: bool) -> None:
    def places(anatomy: Any) -> list[Any]:
        return [Place(anatomy.sites(["down"], [1])[0], Affine(32), read=toys.whole_block(anatomy, 0))]

    model, batch, tuned = attached("llama", toys.method(places))
    model.train()
    model(**batch).loss.backward()
    expected = gradients(tuned)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for _ in range(2):
        model(**batch).loss.backward()
        same(gradients(tuned), expected)


class Checkpointed(nn.Module):
    """A model that calls torch's checkpointing itself, as many outside of Transformers do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


def test_a_lost_context_is_an_error_and_no_wrong_gradient() -> None:
    """Elsewhere than in Transformers nobody brings the context back: the recomputation ran without it, silently."""
    model, x = Checkpointed().train(), torch.randn(2, 5, 16)
    tuned = pt.attach(model, told())
    with pt.given(model, gain=2.0):
        loss = model(x).square().mean()
    with pytest.raises(AttachError, match=r"call backward inside the `with`"):
        loss.backward()
    gradients(tuned)
    with pt.given(model, gain=2.0):
        model(x).square().mean().backward()
    found = gradients(tuned)
    plain = Checkpointed().train()
    plain.forward = lambda x: plain.blocks[1](plain.blocks[0](x))  # type: ignore[method-assign]
    other = pt.attach(plain, told())
    with pt.given(plain, gain=2.0):
        plain(x).square().mean().backward()
    same(found, gradients(other))


# ------------------------------------------------------------------------------------------------------------- threads, tasks


def many(model: nn.Module, batch: dict[str, Any], routes: list[Any], rounds: int = 15) -> int:
    """Eight threads, each with another route: how many rows were wrong."""
    expected = []
    for route in routes:
        with pt.route(model, route):
            expected.append(output(model, batch))
    start = threading.Barrier(len(routes))

    def work(i: int) -> int:
        start.wait()
        wrong = 0
        for _ in range(rounds):
            with pt.route(model, routes[i]), torch.no_grad():
                found = toys.first(model(**batch))
            wrong += int((~torch.isclose(found, expected[i], rtol=1e-5, atol=1e-6).flatten(1).all(1)).sum())
        return wrong

    assert len({toys.bits(e) for e in expected}) == len(routes), "the routes are alike"
    with ThreadPoolExecutor(len(routes)) as pool:
        return sum(pool.map(work, range(len(routes))))


def test_eight_threads_route_their_own_rows() -> None:
    model = toys.model("bert")
    batch = tiny.batch("bert", size=4)
    pt.attach(model, toys.method(on(["q"], Dense)), name="a", train_head=False)
    pt.attach(model, toys.method(on(["ffn"], lambda s: Affine(s.out_features))), name="b", train_head=False)
    pt.attach(model, toys.method(on(["attention"], lambda s: toys.Heads())), name="c", train_head=False)
    routes = [
        ["a", "b", "c", None], ["b", "b", "a", "a"], "a", None, [None, None, "c", "c"], "b", [("a", "b"), "c", None, "a"], ["c", "a", "a", "b"],
    ]  # fmt: skip
    assert many(model, batch, routes) == 0


class Thin(toys.Dense):
    """A product of two factors, which a mixed batch gathers by row."""

    def __init__(self, site: Any) -> None:
        super().__init__(site)
        self.scale = 1.0
        self.A, self.B = nn.Parameter(torch.empty(2, site.in_features)), nn.Parameter(torch.empty(site.out_features, 2))
        del self.change, self.shift

    def initialise(self, generator: torch.Generator, base: Base) -> None:
        self.A.normal_(0, 0.3, generator=generator)
        self.B.normal_(0, 0.3, generator=generator)

    def factored(self) -> tuple[Tensor, Tensor, float, None]:
        return self.A, self.B, self.scale, None

    def weight(self, base: Tensor) -> Tensor:
        return self.scale * self.B @ self.A

    def bias(self, base: Tensor | None) -> None:
        return None


def thin() -> tuple[nn.Module, dict[str, Any], list[Thin]]:
    model = toys.model("bert")
    tuned = [
        pt.attach(model, toys.method(on(["q", "v"], Thin)), name=name, seed=i, train_head=False)
        for i, name in enumerate("abc")
    ]
    return model, tiny.batch("bert", size=4), [slot.delta for each in tuned for slot in each.slots]


def test_eight_threads_gather_their_own_factors() -> None:
    """The gathered factors of the last batch were looked up in two steps, between which another thread could put its own."""
    model, batch, _ = thin()
    routes = [
        ["a", "b", "c", None], ["b", "b", "a", "a"], ["c", None, "a", "b"], [None, "a", "c", "c"],
        ["b", "c", "b", "c"], ["a", "c", "b", None], ["c", "c", "a", "b"], ["b", None, None, "a"],
    ]  # fmt: skip
    assert many(model, batch, routes, rounds=40) == 0


@pytest.mark.parametrize("order", ["gate first", "factors first", "each its own"])
def test_changes_at_one_site_keep_their_order_on_every_row(order: str) -> None:
    """What batches went before what does not."""
    model, batch = toys.model("bert"), tiny.batch("bert", size=4)
    gate = toys.method(on(["k"], lambda s: Affine(s.out_features, composition="gate")))
    methods = [gate, toys.method(on(["k"], Thin))]
    for i, name in enumerate("ab"):
        turned = order == "factors first" or (order == "each its own" and name == "b")
        pt.attach(model, methods[::-1] if turned else methods, name=name, seed=i, train_head=False)
    alone_and_mixed(model, batch, ["a", "b", "b", None])


def test_gathered_factors_follow_every_change() -> None:
    """Values, and the scale, which is no tensor."""
    model, batch, deltas = thin()
    rows = ["a", "b", "c", None]
    alone_and_mixed(model, batch, rows)
    for delta in deltas:
        delta.scale = -2.0
    alone_and_mixed(model, batch, rows)
    with torch.no_grad():
        for delta in deltas:
            delta.A.mul_(3.0)
    alone_and_mixed(model, batch, rows)
    with torch.inference_mode(), pt.route(model, rows):
        inferred = toys.first(model(**batch))
    with pt.route(model, rows):
        torch.testing.assert_close(inferred, output(model, batch))


@pytest.mark.parametrize("kind", ["composed", "in place"])
def test_threads_do_not_see_what_stands_in_for_a_weight_in_another(kind: str) -> None:
    """A thread without the adaptation found the changed weight in its place."""
    model, batch = toys.model("torch_encoder"), tiny.batch("torch_encoder")
    names = ["layers.0.self_attn.in_proj_weight", "layers.1.linear1.weight"]
    if kind == "composed":
        pt.attach(model, toys.method(on(["q", "v"], Dense)), name="a")
        pt.attach(model, toys.method(on(["q", "v"], Dense)), name="b", seed=1)
    else:
        for name, owned in zip("ab", names, strict=True):
            method = toys.method(trains=lambda self, a, m, owned=owned: [owned])
            shake(pt.attach(model, method, name=name), 0.5)
    pt.activate(model)
    assert many(model, batch, ["a", None, "b"]) == 0


def test_each_task_of_a_loop_has_its_own() -> None:
    model, batch, _ = attached("bert", told())
    expected = {}
    for gain in (1.0, 2.0, 3.0):
        with pt.given(model, gain=gain):
            expected[gain] = output(model, batch)

    async def one(gain: float) -> bool:
        with pt.given(model, gain=gain):
            await asyncio.sleep(0.001 * (4 - gain))
            return torch.equal(output(model, batch), expected[gain])

    async def every() -> list[bool]:
        return await asyncio.gather(*(one(gain) for gain in expected))

    assert asyncio.run(every()) == [True, True, True]


# ----------------------------------------------------------------------------------------------------------- which acts where


def three() -> tuple[nn.Module, dict[str, Any], dict[str | None, Tensor]]:
    model, batch = toys.model("bert"), tiny.batch("bert", size=4)
    for i, name in enumerate("ab"):
        shake(pt.attach(model, toys.method(on(["q", "down"], Dense)), name=name, seed=i, train_head=False))
    alone: dict[str | None, Tensor] = {}
    for name in ("a", "b", None):
        with pt.route(model, name):
            alone[name] = output(model, batch)
    with pt.route(model, [("a", "b")] * 4):
        alone["ab"] = output(model, batch)
    return model, batch, alone


def rowwise(alone: dict[str | None, Tensor], *names: str | None) -> Tensor:
    return torch.stack([alone[name][i] for i, name in enumerate(names)])


def test_one_adaptation_is_taken_out_of_every_row() -> None:
    """It took the routing of all rows along."""
    model, batch, alone = three()
    tuned = pt.adaptations(model)["a"]
    with pt.route(model, ["a", "b", ("a", "b"), None]):
        torch.testing.assert_close(output(model, batch), rowwise(alone, "a", "b", "ab", None), rtol=1e-5, atol=1e-5)
        with tuned.disabled():
            torch.testing.assert_close(output(model, batch), rowwise(alone, None, "b", "b", None), rtol=1e-5, atol=1e-5)
        with pt.disabled(model):
            assert torch.equal(output(model, batch), alone[None])
            with pt.route(model, "b"):
                assert torch.equal(output(model, batch), alone["b"])
    pt.activate(model, "a", "b")
    with tuned.disabled():
        assert torch.equal(output(model, batch), alone["b"])


@pytest.mark.parametrize(
    "make",
    [
        lambda: toys.method(lambda a: [Place(toys.whole_block(a, 0), toys.Mixture(2))]),
        lambda: toys.method(on(["attention"], lambda s: toys.Heads())),
        lambda: toys.method(on(["attention"], lambda s: toys.Prepended(3, s.out_features))),
        lambda: toys.method(on(["up"], toys.Renewed)),
        lambda: toys.method(on(["ffn"], lambda s: Affine(s.out_features, composition="gate"))),
        lambda: toys.method(on(["k"], toys.Times)),
    ],
    ids=["side network", "heads", "keys and values", "module", "gate", "needs the weight"],
)
def test_rows_of_every_kind_of_delta(make: Any) -> None:
    """Side networks, heads and probabilities changed every row."""
    model, batch = toys.model("bert"), tiny.batch("bert", size=4)
    tuned = pt.attach(model, make(), name="a", train_head=False)
    shake(tuned)
    everywhere = output(model, batch)
    with pt.disabled(model):
        bare = output(model, batch)
    with pt.route(model, [None, "a", "a", None]):
        mixed = output(model, batch)
    torch.testing.assert_close(
        mixed, torch.stack([bare[0], everywhere[1], everywhere[2], bare[3]]), rtol=1e-5, atol=1e-5
    )
    assert not torch.allclose(bare, everywhere, atol=1e-3)


def test_probabilities_change_on_their_rows_alone() -> None:
    class Flat(toys.Watch):
        def probabilities(self, probabilities: Tensor, value: Tensor) -> Tensor:
            return probabilities * 0 + self.gain / probabilities.shape[-1]

    model, batch = toys.model("bert"), tiny.batch("bert", size=3)
    pt.attach(model, toys.method(on(["attention"], lambda s: Flat())), name="a", train_head=False)
    everywhere = output(model, batch)
    with pt.disabled(model):
        bare = output(model, batch)
    with pt.route(model, ["a", None, None]):
        mixed = output(model, batch)
    torch.testing.assert_close(mixed, torch.stack([everywhere[0], bare[1], bare[2]]), rtol=1e-5, atol=1e-5)


def test_what_can_not_differ_between_rows_says_so() -> None:
    model, batch = toys.model("bert"), tiny.batch("bert")
    pt.attach(
        model,
        toys.method(lambda a: [Place(toys.whole_block(a, 1), toys.Halved())]),
        name="block",
        train_head=False,
    )
    pt.attach(
        model, toys.method(trains=lambda self, a, m: ["bert.embeddings.LayerNorm.bias"]), name="own", train_head=False
    )
    with pytest.raises(AttachError, match="acts on every row of a batch, or on none"), pt.route(model, ["block", None]):
        output(model, batch)
    with pytest.raises(AttachError, match="can't differ between the rows"), pt.route(model, ["own", None]):
        pass
    encoder, hidden = toys.model("torch_encoder"), tiny.batch("torch_encoder")
    pt.attach(encoder, toys.method(on(["q"], Dense)), name="composed")
    with pytest.raises(AttachError, match="rows can't differ"), pt.route(encoder, ["composed", None]):
        output(encoder, hidden)
    for rows in (["composed", "composed"], [None, None], "composed"):
        with pt.route(encoder, rows):
            output(encoder, hidden)


def alone_and_mixed(model: nn.Module, batch: dict[str, Any], rows: list[Any]) -> None:
    """Each row of a mixed batch equals what its adaptations give to all rows."""
    with pt.route(model, rows):
        mixed = output(model, batch)
    for i, names in enumerate(rows):
        with pt.route(model, [names] * len(rows)):
            torch.testing.assert_close(mixed[i], output(model, batch)[i], rtol=1e-5, atol=1e-5, msg=f"row {i}: {names}")


def test_a_change_that_starts_from_the_weight_starts_from_the_weight_of_its_row() -> None:
    """Where an earlier change acts on some of its rows only."""
    model, batch = toys.model("bert"), tiny.batch("bert", size=5)
    pt.attach(model, toys.method(on(["k"], Dense)), name="a", train_head=False)
    pt.attach(model, toys.method(on(["k"], toys.Times)), name="b", train_head=False)
    alone_and_mixed(model, batch, [("a", "b"), "b", "a", None, ("a", "b")])


class Plain(HiddenDelta):
    """h + f · M h with a factor that is no parameter."""

    def __init__(self, size: int, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.linear = nn.Linear(size, size)

    def forward(self, h: Tensor) -> Tensor:
        return self.factor * self.linear(h)


class Loud(Plain):
    """The same with a factor that is given, 1 if not."""

    def forward(self, h: Tensor) -> Tensor:
        gain = torch.as_tensor(self.given("gain", 1.0), dtype=h.dtype)
        return gain.view(-1, *[1] * (h.ndim - 1)) * super().forward(h)


def test_adaptations_that_differ_in_more_than_parameters_keep_their_own() -> None:
    """All rows were computed with the factor of the first."""
    model, batch = toys.model("bert"), tiny.batch("bert", size=4)
    for name, factor in (("a", 1.0), ("b", -3.0)):
        method = toys.method(on(["ffn"], lambda s, f=factor: Plain(s.out_features, f)))  # type: ignore[misc]
        pt.attach(model, method, name=name, train_head=False)
    alone_and_mixed(model, batch, ["a", "b", "b", None])


def test_what_is_given_for_each_row_is_given_in_a_mixed_batch() -> None:
    model, batch = toys.model("bert"), tiny.batch("bert", size=4)
    for i, name in enumerate("ab"):
        pt.attach(
            model, toys.method(on(["ffn"], lambda s: Loud(s.out_features, 1.0))), name=name, seed=i, train_head=False
        )
    with pt.given(model, gain=torch.tensor([1.0, -2.0, 3.0, 0.5])):
        alone_and_mixed(model, batch, ["a", "b", "b", None])


# -------------------------------------------------------------------------------------------------------------- compiled code


class Pooled(HiddenDelta):
    """h <- h + w m, m the mean token number of each row, which is looked up once in a forward pass."""

    counted: list[int]

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((width,), 0.3))
        self.counted = []

    def forward(self, h: Tensor) -> Tensor:
        def mean() -> Tensor:
            self.counted.append(1)
            return self.host.passing().input("input_ids").float().mean(1)

        return self.gain * self.host.once("mean", mean).view(-1, 1, 1)


def pooled() -> tuple[nn.Module, dict[str, Any], pt.Adaptation]:
    model, batch = toys.model("bert"), tiny.batch("bert", size=4)
    batch = {name: batch[name] for name in ("input_ids", "labels")}
    deltas = toys.method(lambda a: [Place(site.at("output"), Pooled(32)) for site in a.sites(["attention"])])
    return model, batch, pt.attach(model, deltas, train_head=False)


def test_what_a_forward_pass_needs_is_computed_once_in_it() -> None:
    model, batch, tuned = pooled()
    counted = [slot.delta.counted for slot in tuned.slots]
    whole = output(model, batch)
    assert [len(count) for count in counted] == [1, 0]
    assert torch.equal(toys.first(model(batch["input_ids"])), whole), "the first positional argument has its name"
    assert [len(count) for count in counted] == [2, 0], "it outlived its forward pass"
    assert tuned.host.passing() is None
    with pt.route(model, [None, "default", None, "default"]):
        mixed = output(model, batch)
    torch.testing.assert_close(mixed[[1, 3]], whole[[1, 3]])
    with pt.disabled(model):
        torch.testing.assert_close(mixed[[0, 2]], output(model, batch)[[0, 2]])


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_was_computed_once_is_there_when_a_block_is_computed_again(reentrant: bool) -> None:
    """Of its own forward pass, though another has run since."""
    found = []
    for again in (False, True):
        model, batch, tuned = pooled()
        if again:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.train()
        loss = model(**batch).loss
        model(**{**batch, "input_ids": batch["input_ids"].flip(0)})
        loss.backward()
        found.append([p.grad for p in tuned.parameters()])
        assert sum(len(slot.delta.counted) for slot in tuned.slots) == 2
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


class Made(HiddenDelta):
    """h <- h + w, of a w for all sites that whoever comes first makes from the shared parameter."""

    publishes = True
    source: tuple[nn.Module, ...]

    def forward(self, h: Tensor) -> Tensor:
        linear = self.source[0]
        return self.host.once("made", lambda: {"w": torch.tanh(linear.weight @ linear.bias)})["w"]


class Maker(nn.Linear):
    def initialise(self, generator: torch.Generator) -> None:
        self.weight.normal_(generator=generator)
        self.bias.normal_(generator=generator)


def bound(self: Any, deltas: Any, shared: Any) -> None:
    for delta in deltas.values():
        delta.source = (shared,)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_what_was_computed_once_keeps_its_gradient(reentrant: bool | None) -> None:
    """Made inside of the first block: checkpointing dropped what its graph had saved, and did not find it again."""
    found = []
    for again in (False, True):
        model, batch = toys.model("bert"), tiny.batch("bert")
        places = lambda a: [Place(site.at("output"), Made()) for site in a.sites(["attention", "ffn"])]  # noqa: E731
        deltas = toys.method(places, shared=lambda self, a: Maker(32, 32), bind=bound)
        tuned = pt.attach(model, deltas, train_head=False)
        if again and reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.train()
        model(**batch).loss.backward()
        found.append([p.grad for p in tuned.parameters()])
    for one, other in zip(*found, strict=True):
        assert float(other.abs().max()) > 0
        torch.testing.assert_close(one, other)


def test_compiled_code_runs_eagerly_inside_a_context() -> None:
    torch._dynamo.reset()
    model, batch, alone = three()
    pt.activate(model, "a")
    compiled = torch.compile(model, backend="eager")
    batch = {k: v for k, v in batch.items() if k != "labels"}
    close = lambda one, other: torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # noqa: E731
    close(output(compiled, batch), alone["a"])
    with pt.disabled(model):
        close(output(compiled, batch), alone[None])
    with pt.route(model, ["a", "b", ("a", "b"), None]):
        close(output(compiled, batch), rowwise(alone, "a", "b", "ab", None))
    close(output(compiled, batch), alone["a"])
    pt.activate(model, "b")
    close(output(compiled, batch), alone["b"])
    torch._dynamo.reset()


def test_compiled_code_does_not_see_what_stands_in_for_trained_weights_and_says_so() -> None:
    """It ran on the trained weights of an adaptation that does not act."""
    torch._dynamo.reset()
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    model, batch, tuned = attached("bert", toys.method(trains=lambda self, a, m: [name]))
    batch = {k: v for k, v in batch.items() if k != "labels"}
    shake(tuned, 1.0)
    compiled = torch.compile(model, backend="eager")
    trained = output(model, batch)
    assert torch.equal(output(compiled, batch), trained)
    pt.activate(model)
    bare = output(model, batch)
    assert not torch.allclose(bare, trained, atol=1e-3)
    try:
        found = output(compiled, batch)
    except Exception as error:
        assert "does not act now" in str(error)
    else:
        torch.testing.assert_close(found, bare)
    with pt.disabled(model):
        assert torch.equal(output(compiled, batch), bare)
    torch._dynamo.reset()


def test_statistics_stay_under_compiled_code_too() -> None:
    torch._dynamo.reset()
    model, batch = toys.model("resnet"), tiny.batch("resnet")
    pt.attach(model, toys.method())
    before = {name: toys.bits(b) for name, b in model.named_buffers()}
    model.train()
    torch.compile(model, backend="eager")(**batch)
    assert {name: toys.bits(b) for name, b in model.named_buffers()} == before
    torch._dynamo.reset()


def test_composed_weights_are_composed_under_compiled_code_too() -> None:
    torch._dynamo.reset()
    model, batch = toys.model("torch_encoder"), tiny.batch("torch_encoder")
    bare = output(model, batch)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(output(compiled, batch), bare)
    tuned = pt.attach(model, toys.method(on(["q"], Dense)))
    attached = output(model, batch)
    for _ in range(2):
        torch.testing.assert_close(output(compiled, batch), attached)
    with pt.disabled(model):
        torch.testing.assert_close(output(compiled, batch), bare, rtol=1e-5, atol=1e-5)
    tuned.detach()
    torch.testing.assert_close(output(compiled, batch), bare)
    torch._dynamo.reset()


def test_a_stance_of_the_users_outlives_a_context() -> None:
    """It was set back to the default."""
    from torch._dynamo import eval_frame

    model, _, _ = attached("bert", told())
    with torch.compiler.set_stance("eager_on_recompile"):
        with pt.disabled(model), pt.given(model, gain=1.0):
            assert eval_frame._stance.stance == "force_eager"
        assert eval_frame._stance.stance == "eager_on_recompile"
    assert eval_frame._stance.stance == "default"
