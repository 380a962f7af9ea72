"""The one battery over every registered method, on tiny models of several families.

What a method can and can't do is read off its class (`merges`, `identity_at_start`, `routes`, `compiles`, `idles`, and `exempt`, which
gives a reason for each check or family that can't hold). No test names a method, so a new file is tested by being there.

    pytest tests/conformance -k "lora- and merge"        one method, one check: ids read lora-bert-merge_equals_forward
    pytest tests/conformance -k coverage -s              the table of methods and families
"""

from __future__ import annotations

import copy
import math
import typing
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pydantic.fields import FieldInfo
from torch import Tensor, nn

import petiole as pt
import tiny
import toys
from petiole.anatomy import Anatomy
from petiole.errors import AttachError, ConfigError, PetioleError
from petiole.method import Method, Place, registry
from petiole.training import Events, PetioleCallback
from toys import bits, output, shake

MAIN = ("bert", "llama", "gpt2", "vit", "t5")  # text encoder, decoder, Conv1D and fused qkv, image, encoder-decoder
FURTHER = (
    "torch_encoder",
    "swin",
    "resnet",
    "mixtral",
)  # weights that no call shows, stages, convolutions, packed experts
EVERY = (*MAIN, *FURTHER)
SPARE = ("deep_vit",)  # for methods that fit none of the main ones: blocks enough for four stages
GENERATING = ("llama", "gpt2", "t5")

Check = Callable[..., None]
CHECKS: dict[str, tuple[Check, tuple[str, ...]]] = {}


def check(*families: str) -> Callable[[Check], Check]:
    """Run this for every method on these families; on the first that the method runs on if it is "home"; once if there is none."""

    def keep(function: Check) -> Check:
        CHECKS[function.__name__] = function, families
        return function

    return keep


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" not in metafunc.fixturenames:
        return
    cases, ids = [], []
    for slug, cls in registry().items():
        spare = SPARE if set(MAIN) <= set(cls.exempt) else ()
        for name, (_, families) in CHECKS.items():
            for family in (*families, *(spare if "vit" in families else ())) or ("",):
                cases.append((slug, family, name))
                ids.append("-".join(part for part in (slug, family, name) if part))
    metafunc.parametrize(("slug", "family", "name"), cases, ids=ids)


def test_method(slug: str, family: str, name: str, tmp_path: Path) -> None:
    cls = registry()[slug]
    function, _ = CHECKS[name]
    if name in cls.exempt:
        pytest.skip(cls.exempt[name])
    if not family:
        function(cls)
        return
    family = home(slug) if family == "home" else family
    why = refusal(slug, family)
    if why:
        pytest.skip(f"{family} refused: {why.splitlines()[0]}")
    function(Case(cls, family, tmp_path))


# ---------------------------------------------------------------------------------------------------------------- cases


@cache
def bare(family: str) -> nn.Module:
    return toys.model(family)


@cache
def frozen_output(family: str) -> Tensor:
    """Of the bare model with nothing to train: torch takes other kernels where something needs a gradient."""
    return output(copy.deepcopy(bare(family)).requires_grad_(False), tiny.batch(family))


@cache
def refusal(slug: str, family: str) -> str:
    """Why a family can't take a method, "" if it can."""
    try:
        pt.attach(copy.deepcopy(bare(family)), small(registry()[slug]))
    except PetioleError as error:
        return str(error) or "no reason given"
    return ""


@cache
def home(slug: str) -> str:
    """The first family that can take a method."""
    return next((family for family in (*EVERY, *SPARE) if not refusal(slug, family)), EVERY[0])


@cache
def small(cls: type[Method]) -> Method:
    """The method as it comes, only of small size, and so that training computes what evaluation does."""
    still: dict[str, Any] = {"dropout": 0.0} if "dropout" in cls.model_fields else {}
    if "reduction_factor" in cls.model_fields:  # by which the widths of tiny models must divide
        still["reduction_factor"] = 4
    if not cls.size:
        return cls(**still)
    size = min(3, default_of(cls, cls.size) or 3)
    try:
        return cls(**{cls.size: size}, **still)
    except ConfigError:  # an even one is wanted
        return cls(**{cls.size: 2 * size - 2}, **still)


def default_of(cls: type[Method], field: str) -> Any:
    return cls.model_fields[field].get_default(call_default_factory=True)


class Case:
    """One method on one family."""

    def __init__(self, cls: type[Method], family: str, folder: Path) -> None:
        self.cls, self.family, self.folder = cls, family, folder
        self.batch = tiny.batch(family)

    def model(self) -> nn.Module:
        return copy.deepcopy(bare(self.family))

    def attach(
        self, model: nn.Module | None = None, method: Any = None, **options: Any
    ) -> tuple[nn.Module, pt.Adaptation]:
        model = self.model() if model is None else model
        tuned = pt.attach(model, small(self.cls) if method is None else method, **options)
        if not any(parameter.is_meta for parameter in model.parameters()):
            tuned.calibrate([self.batch])
        return model, tuned

    def shaken(self, **options: Any) -> tuple[nn.Module, pt.Adaptation]:
        """Attached, and moved as if trained."""
        model, tuned = self.attach(**options)
        shake(tuned)
        return model, tuned

    def exact(self, model: nn.Module) -> nn.Module:
        """The model in double precision, where two ways of computing one thing differ by nothing but their meaning."""
        self.batch = {k: v.double() if v.is_floating_point() else v for k, v in self.batch.items()}
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # torch's grouped product knows no double precision
        return model.double()

    def nudged(self) -> tuple[nn.Module, pt.Adaptation]:
        """Attached, and moved by so little that the output keeps its size: what half precision can be expected to follow."""
        for size in (0.1, 0.02, 0.004, 0.0008):
            model, tuned = self.attach()
            shake(tuned, size)
            change = (output(model, self.batch) - frozen_output(self.family)).norm() / frozen_output(self.family).norm()
            if change < 0.5:
                break
        return model, tuned

    def trained(self, steps: int = 2) -> tuple[nn.Module, pt.Adaptation]:
        model, tuned = self.attach()
        train(model, tuned, self.batch, steps)
        return model, tuned

    def same(self, one: Tensor, other: Tensor) -> None:
        """Bit for bit; nn.Transformer alone takes other kernels where there are hooks."""
        if self.family.startswith("torch"):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(one, other), f"differs by {float((one - other).abs().max()):.2g}"

    def stays_bare(self, model: nn.Module) -> None:
        self.same(output(model, self.batch), frozen_output(self.family))


def loss_of(found: Any) -> Tensor:
    loss = getattr(found, "loss", None)
    return loss if isinstance(loss, Tensor) else toys.first(found).float().square().mean()


def train(model: nn.Module, tuned: pt.Adaptation, batch: dict[str, Any], steps: int) -> dict[str, list[float]]:
    """A plain loop. For each parameter, the largest entry of its gradient in each step."""
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=1e-2, weight_decay=0.0)
    events = Events(model, optimizer, total_steps=steps)
    model.train()
    events.begin([batch])
    sizes: dict[str, list[float]] = {}
    for _ in range(steps):
        events.before_step()
        found = model(**batch)
        loss = loss_of(found)
        if getattr(found, "loss", None) is None and (extra := events.extra_loss()) is not None:
            loss = loss + extra
        loss.backward()
        events.before_optimizer_step(loss)
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad:
                sizes.setdefault(name, []).append(
                    math.nan if parameter.grad is None else float(parameter.grad.abs().max())
                )
        optimizer.step()
        events.after_optimizer_step()
        optimizer.zero_grad()
    model.eval()
    return sizes


def says(error: BaseException, *words: str) -> None:
    message = str(error)
    assert 0 < len(message.splitlines()) <= 3, message
    for word in words:
        assert word in message, (word, message)


# ------------------------------------------------------------------------------------------------------- configuration


def outside(info: FieldInfo) -> Iterator[Any]:
    """Values that a field must refuse."""
    kinds = set(flat(info.annotation))
    for rule in info.metadata:
        for name, step in (("ge", -1), ("gt", 0), ("le", 1), ("lt", 0), ("min_length", None)):
            bound = getattr(rule, name, None)
            if bound is not None:
                yield () if step is None else bound + step
    if float in kinds:
        yield from (math.nan, math.inf, -math.inf)
    if kinds & {int, float} and str not in kinds:
        yield "many"
    if kinds & {int, float} and bool not in kinds:
        yield True
    if int in kinds and float not in kinds:
        yield 1.5
    if any(isinstance(kind, str) for kind in kinds):  # of a Literal
        yield "no-such-choice"
    yield object()


def flat(annotation: Any) -> Iterator[Any]:
    """The plain types and literal values in an annotation, without those inside of containers."""
    origin = typing.get_origin(annotation)
    if origin is Literal:
        yield from typing.get_args(annotation)
    elif origin in (tuple, list, dict, set, frozenset):
        yield origin
    elif typing.get_args(annotation):
        for part in typing.get_args(annotation):
            yield from flat(part)
    else:
        yield annotation


@check()
def refuses_bad_values(cls: type[Method]) -> None:
    for name, info in cls.model_fields.items():
        for value in outside(info):
            with pytest.raises(ConfigError) as caught:
                cls(**{name: value})
            says(caught.value, cls.__name__, name)


@check()
def refuses_unknown_fields(cls: type[Method]) -> None:
    with pytest.raises(ConfigError) as caught:
        cls(no_such_field=1)
    says(caught.value, "no_such_field", *cls.model_fields)
    for name in cls.model_fields:
        with pytest.raises(ConfigError) as caught:
            cls(**{f"{name}x": default_of(cls, name)})
        says(caught.value, f"{name}x", f"did you mean {name}")


@check()
def describes_its_fields(cls: type[Method]) -> None:
    """One sentence feeds the refusal, the command line and the docs."""
    assert cls.title and cls.saves
    assert cls().model_dump(mode="json").keys() == cls.model_fields.keys()
    for name, info in cls.model_fields.items():
        assert info.description, name
    assert not cls.size or cls.size in cls.model_fields


@check("home")
def refuses_roles_and_depths_that_are_not_there(case: Case) -> None:
    for field, value in (("roles", ("no_such_role",)), ("layers", (99,)), ("stack", "no_such_stack")):
        if field in case.cls.model_fields:
            model = case.model()
            before = toys.snapshot(model)
            with pytest.raises(PetioleError) as caught:
                pt.attach(model, case.cls(**{field: value}))
            says(caught.value, str(value[0]) if isinstance(value, tuple) else value)
            assert toys.snapshot(model) == before


@cache
def options(slug: str) -> tuple[Method, ...]:
    """Each choice and switch of a method, one at a time, as far as it may be set alone; and one with everything else, where it may."""
    cls, family = registry()[slug], home(slug)
    found, together = [], dict(small(cls).model_dump())

    def fits(fields: Mapping[str, Any]) -> Method | None:
        try:
            method = cls(**fields)
            pt.attach(copy.deepcopy(bare(family)), method)
        except PetioleError:
            return None
        return method

    for name, info in cls.model_fields.items():
        for value in others(info, default_of(cls, name)):
            method = fits({**small(cls).model_dump(), name: value})
            if method is not None and isinstance(value, (bool, str)):
                found.append(method)
            if method is not None and name != cls.size and fits({**together, name: value}) is not None:
                together[name] = value
    return tuple(m for m in (*found, fits(together)) if m is not None)


def others(info: FieldInfo, default: Any) -> Iterator[Any]:
    """Values of a field that mean something else than its default."""
    kinds = list(flat(info.annotation))
    if isinstance(default, bool):
        yield not default
    elif isinstance(default, float):
        yield from (default * 0.5, default + 0.1)
    elif isinstance(default, int):
        yield default + 1
    yield from (kind for kind in kinds if isinstance(kind, str) and kind != default)


# ---------------------------------------------------------------------------------------------------------------- at start


@check(*EVERY)
def starts_as_declared(case: Case) -> None:
    """`identity_at_start`: the same bits as the bare model. No generator has moved."""
    model = case.model()
    state = torch.get_rng_state()
    _, tuned = case.attach(model)
    assert torch.equal(torch.get_rng_state(), state), "the global generator moved"
    if case.cls.identity_at_start:
        case.stays_bare(model)
    assert bool(torch.isfinite(output(model, case.batch)).all())
    assert f"{tuned.trainable:,}" in tuned.summary()


@check("home")
def same_seed_same_numbers(case: Case) -> None:
    tensors = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed + len(tensors))
        _, tuned = case.attach(seed=seed)
        tensors.append({name: bits(t) for name, t in tuned.named_tensors(folded=False).items()})
    assert tensors[0] == tensors[1]
    assert tensors[0].keys() == tensors[2].keys()


@check("home")
def counts_on_the_meta_device(case: Case) -> None:
    """What trains is known before there are weights."""
    _, real = case.attach()
    with torch.device("meta"):
        model = tiny.model(case.family)
    _, planned = case.attach(model)
    assert planned.trainable == real.trainable
    shapes = [{n: (t.shape, t.dtype) for n, t in a.named_tensors(folded=False).items()} for a in (planned, real)]
    assert shapes[0] == shapes[1]


@check("home")
def nothing_to_train_is_an_error(case: Case) -> None:
    try:
        _, tuned = case.attach(train_head=False)
    except AttachError as error:
        says(error, "nothing would train")
    else:
        assert tuned.trainable > 0


# ------------------------------------------------------------------------------------------------------------------ training


@check(*EVERY)
def only_what_is_declared_trains(case: Case) -> None:
    """Every declared parameter gets a gradient and moves, and no bit of anything else changes."""
    model, tuned = case.attach()
    declared = {id(p) for p in tuned.parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in declared), name
    start = {name: bits(p) for name, p in tuned.named_parameters()}
    rest = backbone(model, tuned)
    tuned.check(case.batch)
    assert {name: bits(p) for name, p in tuned.named_parameters()} == start, "the check left a trace"
    sizes = train(model, tuned, case.batch, 3)
    assert backbone(model, tuned) == rest
    if not case.cls.idles:
        without = [name for name, found in sizes.items() if not any(size > 0 for size in found)]
        assert not without, f"no gradient: {without}"
        now = dict(tuned.named_parameters())
        still = [n for n in sizes if n in start and n in now and bits(now[n]) == start[n]]
        assert not still, f"did not move: {still}"


def backbone(model: nn.Module, tuned: pt.Adaptation) -> dict[str, bytes]:
    """The bits of the backbone's tensors, without those that train in place, under whatever name."""
    own = {tuned.host.tensor(name).data_ptr() for name in tuned.own}
    tensors = {
        n: t for n, t in model.state_dict().items() if not any(part.startswith("petiole") for part in n.split("."))
    }
    return {name: bits(tensor) for name, tensor in tensors.items() if tensor.data_ptr() not in own}


@check(*MAIN)
def checkpointing_changes_no_gradient(case: Case) -> None:
    """Re-entrant and not."""
    expected: list[Tensor] | None = None
    for reentrant in (None, False, True):
        model, tuned = case.shaken()
        case.exact(model)
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            tuned.check(case.batch)
        model.train()
        torch.manual_seed(0)
        loss_of(model(**case.batch)).backward()
        found = [torch.zeros(()) if p.grad is None else p.grad for p in tuned.parameters()]
        if expected is None:
            expected = found
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * max(1.0, float(other.abs().max())))


@check("bert", "llama", "vit")
def runs_under_bf16_autocast(case: Case) -> None:
    model, tuned = case.nudged()
    exact = output(model, case.batch)
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(**case.batch)
        loss = loss_of(found)
    loss.backward()
    near(toys.first(found).detach(), exact)
    graded(case, tuned)


@check("bert", "llama", "vit")
def runs_on_a_bf16_backbone(case: Case) -> None:
    model, exact = case.nudged()
    expected, values = output(model, case.batch), exact.named_tensors(folded=False)
    half = case.model().to(torch.bfloat16)
    batch = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in case.batch.items()}
    _, tuned = case.attach(half)
    with torch.no_grad():
        for name, tensor in tuned.named_tensors(folded=False).items():
            tensor.copy_(values[name])  # and not what it would start from on weights that are rounded
    tuned.check(batch)
    half.train()
    found = half(**batch)
    assert toys.first(found).dtype == torch.bfloat16, "the hidden states changed their precision"
    loss_of(found).backward()
    near(toys.first(found).detach(), expected)
    graded(case, tuned)


def near(half: Tensor, exact: Tensor) -> None:
    """As equal as eight bits can be after a few blocks."""
    assert bool(torch.isfinite(half).all())
    error = (half.float() - exact).norm() / exact.norm()
    assert error < 0.1, f"off by {float(error):.2f} of the output's size"


def graded(case: Case, tuned: pt.Adaptation) -> None:
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad and not case.cls.idles:
            assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), name


@check("home")
def trains_in_either_trainer(case: Case) -> None:
    import transformers

    rows = [{k: v[i] for k, v in case.batch.items()} for i in range(tiny.BATCH)] * 2
    arguments = transformers.TrainingArguments(
        output_dir=str(case.folder), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, save_strategy="no",
        report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    for kind, extra in (
        (pt.Trainer, {}),
        (transformers.Trainer, {"callbacks": [PetioleCallback(batches=[case.batch])]}),
    ):
        model, tuned = case.attach()
        rest = backbone(model, tuned)
        before = output(model, case.batch)
        kind(model=model, args=arguments, train_dataset=rows, **extra).train()  # type: ignore[call-arg]
        model.eval()
        assert not torch.equal(output(model, case.batch), before)
        assert backbone(model, tuned) == rest


# ------------------------------------------------------------------------------------------------------------ files, on and off


@check(*EVERY)
def loads_what_it_saved(case: Case) -> None:
    model, tuned = case.trained()
    expected = output(model, case.batch)
    path = tuned.save(case.folder / "x.safetensors")
    other = case.model()
    state = torch.get_rng_state()
    again = pt.load(other, path)
    assert torch.equal(torch.get_rng_state(), state)
    assert again.trainable == sum(p.numel() for p in again.parameters()) > 0
    assert torch.equal(output(other, case.batch), expected)
    assert again.save(case.folder / "y.safetensors").read_bytes() == path.read_bytes()
    whole = tuned.save(case.folder / "z.safetensors", folded=False)
    third = case.model()
    pt.load(third, whole)
    assert torch.equal(output(third, case.batch), expected)


@check(*EVERY)
def detach_restores_the_model(case: Case) -> None:
    model = case.model()
    output(model, case.batch)  # first, since some models hang hooks of their own on themselves in their first pass
    before, expected = toys.snapshot(model), output(model, case.batch)
    _, tuned = case.attach(model)
    train(model, tuned, case.batch, 2)
    changed = output(model, case.batch)
    assert not torch.equal(changed, expected), "training changed nothing"
    with pt.disabled(model):
        case.stays_bare(model)
    with tuned.disabled():
        case.stays_bare(model)
    assert torch.equal(output(model, case.batch), changed)
    tuned.detach()
    assert toys.snapshot(model) == before
    assert torch.equal(output(model, case.batch), expected)


@check(*EVERY)
def merge_equals_forward(case: Case) -> None:
    """Where it merges; elsewhere a refusal that changes nothing."""
    model, tuned = case.shaken()
    case.exact(model)
    attached, before = output(model, case.batch), toys.snapshot(model)
    try:
        tuned.merge()
    except AttachError as error:
        says(error)
        assert not case.cls.merges or case.family != home(case.cls.slug), error
        assert toys.snapshot(model) == before
        assert torch.equal(output(model, case.batch), attached)
        return
    assert case.cls.merges, "it merged, but its class says that it can't"
    torch.testing.assert_close(output(model, case.batch), attached, rtol=1e-5, atol=1e-5)
    tuned.unmerge()
    assert toys.snapshot(model) == before
    assert torch.equal(output(model, case.batch), attached)


@check("home")
def every_option_trains_saves_and_merges(case: Case) -> None:
    for method in options(case.cls.slug):
        model, tuned = case.attach(method=method)
        tuned.check(case.batch)
        shake(tuned)
        expected, about = output(model, case.batch), repr(method)
        other = case.model()
        pt.load(other, tuned.save(case.folder / "x.safetensors"))
        assert torch.equal(output(other, case.batch), expected), about
        if case.cls.merges:
            twice = Case(case.cls, case.family, case.folder)
            expected = output(twice.exact(model), twice.batch)
            tuned.merge()
            assert torch.allclose(output(model, twice.batch), expected, rtol=1e-5, atol=1e-5), about
            tuned.unmerge()


@check("home")
def compiled_code_never_lies(case: Case) -> None:
    """Compiled bare, attached, disabled, detached, in one process: each equals eager."""
    if not case.cls.compiles:
        pytest.skip("does not compile, says its class")
    torch._dynamo.reset()
    model = case.model().double()  # compiled code takes products in another order, which float32 would show
    compiled = torch.compile(model, backend="eager", fullgraph=True)  # in one piece, or it would be of little use
    batch = {k: v.double() if v.is_floating_point() else v for k, v in case.batch.items() if k != "labels"}
    expected = output(model, batch)
    same = lambda one, other: torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)  # noqa: E731
    same(output(compiled, batch), expected)
    _, tuned = case.attach(model)
    shake(tuned)
    attached = output(model, batch)
    assert not torch.allclose(attached, expected, atol=1e-4)
    same(output(compiled, batch), attached)
    with pt.disabled(model):
        same(output(compiled, batch), expected)
    same(output(compiled, batch), attached)
    tuned.detach()
    same(output(compiled, batch), expected)
    torch._dynamo.reset()


@check("home")
def a_copy_is_independent(case: Case) -> None:
    model, tuned = case.shaken()
    expected = output(model, case.batch)
    twin = copy.deepcopy(model)
    own = pt.adaptations(twin)["default"]
    assert torch.equal(output(twin, case.batch), expected)
    shake(tuned, seed=2)
    assert torch.equal(output(twin, case.batch), expected), "the copy followed the original"
    changed = output(model, case.batch)
    shake(own, seed=3)
    assert torch.equal(output(model, case.batch), changed), "the original followed the copy"
    with pt.disabled(twin):
        case.stays_bare(twin)
    own.detach()
    assert torch.equal(output(model, case.batch), changed)


# --------------------------------------------------------------------------------------------------------------- together


@check("home")
def two_adaptations_keep_apart(case: Case) -> None:
    alone = []
    for seed in (0, 1):
        model, tuned = case.attach(seed=seed)
        shake(tuned, seed=seed)
        alone.append(output(model, case.batch))
    model, first = case.attach(name="a", seed=0)
    shake(first, seed=0)
    try:
        _, second = case.attach(model, name="b", seed=1)
    except AttachError as error:
        assert first.own, error
        says(error, "trained in place by another adaptation")
        assert torch.equal(output(model, case.batch), alone[0])
        return
    shake(second, seed=1)
    assert torch.equal(output(model, case.batch), alone[1])
    pt.activate(model, "a")
    assert torch.equal(output(model, case.batch), alone[0])
    with pt.route(model, "b"):
        assert torch.equal(output(model, case.batch), alone[1])
    pt.activate(model, "a", "b")
    assert bool(torch.isfinite(output(model, case.batch)).all())
    first.detach()
    assert torch.equal(output(model, case.batch), alone[1])


@check(*MAIN)
def rows_equal_what_each_gives_alone(case: Case) -> None:
    """Mixed in one batch: two configurations of the method, and the bare backbone. A method that can't says so."""
    case.batch = tiny.batch(case.family, size=4)
    model, first = case.attach(name="a")
    shake(first)
    rows = ["a", None, "b", "a"]
    if not case.cls.routes:
        with pytest.raises(AttachError) as caught, pt.route(model, ["a", None]):
            output(model, case.batch)
        says(caught.value)
        return
    for other in (*options(case.cls.slug)[::-1], small(case.cls)):
        try:
            _, second = case.attach(model, other, name="b", seed=1)
        except PetioleError:
            continue
        if not second.own:  # which could not differ between rows
            break
        second.detach()
    shake(second, seed=2)
    case.exact(model)
    batch = case.batch
    with pt.route(model, rows):
        mixed = output(model, batch)
    for i, name in enumerate(rows):
        with pt.route(model, name):
            alone = output(model, batch)
        error = float((mixed[i] - alone[i]).abs().max())
        assert torch.allclose(mixed[i], alone[i], rtol=1e-5, atol=1e-5), f"row {i} ({name}) is off by {error:.2g}"
    with pt.route(model, "a"):
        assert not torch.allclose(output(model, batch)[1], mixed[1], atol=1e-4), "rows are not told apart"


@check("home")
def combines_with_others(case: Case) -> None:
    """In a list, before and after changes of weights and hidden states, and with the next method of the registry."""
    slugs = list(registry())
    following = registry()[slugs[(slugs.index(case.cls.slug) + 1) % len(slugs)]]

    def hidden(anatomy: Anatomy) -> list[Place]:
        blocks = anatomy.stacks[0].blocks
        return [
            Place(toys.whole_block(anatomy, i, blocks[0].stack), toys.Affine(b.hidden_size))
            for i, b in enumerate(blocks)
        ]

    weights = (
        toys.method(toys.on(["up"], toys.Dense)) if "up" in pt.anatomy(bare(case.family)).roles else toys.method(hidden)
    )
    for methods in ([small(case.cls), weights, toys.method(hidden)], [toys.method(hidden), weights, small(case.cls)]):
        model = case.model()
        before, expected = toys.snapshot(model), output(model, case.batch)
        _, tuned = case.attach(model, methods)
        tuned.check(case.batch)
        shake(tuned)
        with pt.disabled(model):
            case.stays_bare(model)
        tuned.detach()
        assert toys.snapshot(model) == before
        assert torch.equal(output(model, case.batch), expected)
    model = case.model()
    try:
        _, tuned = case.attach(model, [small(case.cls), small(following)])
    except PetioleError as error:
        says(error)
        return
    shake(tuned)
    expected, other = output(model, case.batch), case.model()
    pt.load(other, tuned.save(case.folder / "both.safetensors"))
    assert torch.equal(output(other, case.batch), expected)


@check(*GENERATING)
def generates_the_same_with_and_without_a_cache(case: Case) -> None:
    """Greedy and with beams, with padding on the left."""
    model, _ = case.shaken()
    tokens = case.batch["input_ids"].clone()
    mask = torch.ones_like(tokens)
    tokens[1, :2], mask[1, :2] = 0, 0
    for beams in (1, 2):
        options = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams, "min_new_tokens": 4}
        cached = model.generate(tokens, attention_mask=mask, use_cache=True, **options)
        assert torch.equal(cached, model.generate(tokens, attention_mask=mask, use_cache=False, **options)), beams


# ------------------------------------------------------------------------------------------------------------ who runs where


def test_coverage() -> None:
    """Every method runs somewhere; one that runs on a family of Transformers runs on all of them, or its class says why not."""
    methods, lines, faults = registry(), [f"{'':28}" + "".join(f"{family:>15}" for family in EVERY)], []
    for slug, cls in methods.items():
        why = {family: refusal(slug, family) for family in (*EVERY, *SPARE)}
        lines.append(f"{slug:28}" + "".join(f"{'refused' if why[family] else 'ran':>15}" for family in EVERY))
        if cls.builds_on:  # its own test attaches that first
            faults += [f"{slug} runs on a bare {family}" for family, reason in why.items() if not reason]
            continue
        if all(why.values()):
            faults.append(f"{slug} runs nowhere: {why[EVERY[0]]}")
        for family, reason in why.items():
            if reason and len(reason.splitlines()) > 3:
                faults.append(f"{slug} on {family} refuses in {len(reason.splitlines())} lines: {reason}")
            if reason and family in MAIN and family not in cls.exempt:
                faults.append(f"{slug} refuses {family}, which its class does not declare: {reason.splitlines()[0]}")
            if not reason and family in cls.exempt:
                faults.append(f"{slug} runs on {family}, though its class says that it can't")
        unknown = set(cls.exempt) - {*CHECKS, *EVERY}
        if unknown:
            faults.append(f"{slug} is exempt from {sorted(unknown)}, which is no check and no family")
    print("\n".join(lines))
    print("\n".join(f"{s} on {f}: {refusal(s, f).splitlines()[0]}" for s in methods for f in EVERY if refusal(s, f)))
    assert not faults, "\n".join([*lines, *faults])
