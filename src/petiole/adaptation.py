"""The handle that `attach` returns: look, check, save, merge, detach."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from petiole import context
from petiole.junction import Slot
from petiole.method import Method, Moment

if TYPE_CHECKING:
    from petiole.attach import Host
    from petiole.interop import Export


class Adaptation:
    """A change attached to a model. Made by `pt.attach` and `pt.load`."""

    def __init__(
        self,
        host: Host,
        name: str,
        seed: int,
        methods: tuple[Method, ...],
        slots: list[Slot],
        shared: Mapping[int, nn.Module],
        own: dict[str, Tensor],
    ) -> None:
        self.host, self.name, self.seed, self.methods, self.slots, self.shared = (
            host,
            name,
            seed,
            methods,
            slots,
            dict(shared),
        )
        self.own = own  # backbone tensors trained in place -> as they were
        self.state: dict[int, dict[str, Any]] = {number: {} for number in range(len(methods))}
        self.merged = False
        self.mark: dict[str, Any] = {}  # fingerprint of the backbone that it was attached to
        self._kept: dict[tuple[str, str], Tensor] = {}  # what merging overwrote

    def __repr__(self) -> str:
        what = " + ".join(method.slug for method in self.methods)
        return f"Adaptation({self.name!r}: {what} on {self.host.anatomy.model_class}, {self.trainable:,} trainable parameters)"

    @property
    def model(self) -> nn.Module:
        return self.host.model

    # ---- parameters

    def named_tensors(self, folded: bool = True) -> dict[str, Tensor]:
        """Every tensor that makes up the change, by a name that holds no module path but for the backbone's own tensors.

        Args:
            folded: as deployed, training-only devices folded away; otherwise as training needs them.
        """
        tensors: dict[str, Tensor] = {}
        for key, module in self.modules():
            fold = getattr(module, "folded_state", None) if folded else None
            tensors |= {f"{key}:{name}": value.detach() for name, value in (fold or module.state_dict)().items()}
        tensors = once(tensors)
        for name in self.own:
            owner, _, attribute = name.rpartition(".")
            kept = self._kept.get((owner, attribute))  # where a merge has added something to it
            tensors[f"own:{name}"] = (self.host.tensor(name) if kept is None else kept).detach()
        return tensors

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Every module that holds parameters of the change, by the name that its tensors have in `named_tensors`."""
        yield from ((slot.key, slot.delta) for slot in self.slots)
        yield from ((f"{number}.shared", module) for number, module in self.shared.items())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter of the change, each once, by its name in `named_tensors`; those that an event may free are frozen here."""
        seen: set[int] = set()
        for key, module in self.modules():
            for name, parameter in module.named_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield f"{key}:{name}", parameter
        for name in self.own:
            owner, _, attribute = name.rpartition(".")
            own = self.host.module(owner)._parameters.get(attribute)
            if own is not None and id(own) not in seen:
                seen.add(id(own))
                yield f"own:{name}", own

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trainable parameters, each once."""
        return (parameter for _, parameter in self.named_parameters() if parameter.requires_grad)

    def freeze(self) -> None:
        """Nothing of it trains any more; it may act below another that does."""
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    @property
    def trainable(self) -> int:
        """How many numbers train, the task head included."""
        return sum(parameter.numel() for parameter in self.parameters())

    def routes(self) -> bool:
        return all(method.routes for method in self.methods)

    def moment(self, number: int, **about: Any) -> Moment:
        """What an event of method `number` is given."""
        deltas = {s.key.partition(".")[2]: s.delta for s in self.slots if s.number == number}
        from petiole.attach import site_seed

        seed = site_seed(self.seed, f"{number}.moment")
        return Moment(
            model=self.model,
            deltas=deltas,
            shared=self.shared.get(number),
            seed=seed,
            state=self.state[number],
            **about,
        )

    @property
    def has_loss_terms(self) -> bool:
        return any(method.overrides("loss") for method in self.methods)

    def loss_terms(self) -> list[Tensor]:
        """The extra loss terms of this adaptation's methods, for the forward pass just done."""
        terms = []
        events = self.host.events
        for number, method in enumerate(self.methods):
            if method.overrides("loss"):
                term = method.loss(events.moment(self, number) if events is not None else self.moment(number))
                if term is not None:
                    terms.append(term)
        return terms

    # ---- looking and checking

    def summary(self) -> str:
        """What sits where and what it costs, as text."""
        from petiole.report import summary

        return summary(self)

    def check(self, batch: Mapping[str, Any], loss: Callable[[Any], Tensor] | None = None) -> None:
        """Prove on one batch that every site is called, and every delta gets a gradient and can move. Nothing is changed.

        Args:
            batch: keyword arguments of the model, labels included (or give `loss`).
            loss: from the model's output to a scalar; the default takes `output.loss`, or the mean square of the first output.

        Raises:
            TrainingError: names the sites that were not called, or the deltas that got no gradient.
        """
        from petiole.proof import check

        check(self, batch, loss)

    def train(self, mode: bool = True) -> Adaptation:
        """Put what trains into training mode, the task head included, and leave the rest of the model as it is.

        After `model.eval()` the backbone's dropout stays off, and batch statistics of deltas move all the same.
        """
        owners = {name.rpartition(".")[0] for name in self.own}
        for module in (*(module for _, module in self.modules()), *map(self.host.module, owners)):
            module.train(mode)
        return self

    def calibrate(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Let the methods that learn from data before training look at these batches, as every trainer does before its first step."""
        for number, method in enumerate(self.methods):
            if method.overrides("calibrate"):
                method.calibrate(self.moment(number), batches)

    # ---- on and off

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """This adaptation doesn't act inside the `with`, in this thread; others go on."""
        from petiole.attach import refuse_without_merged

        if self.merged:
            refuse_without_merged(self.host, ())
        with context.entered(context.without(id(self.host), self.name, self.host.active)):
            yield

    def detach(self) -> nn.Module:
        """Take the adaptation off, IN PLACE, and return the model. What was merged stays merged."""
        from petiole.attach import detach

        detach(self)
        return self.model

    # ---- merging

    def merge(
        self,
        *,
        onto: Literal["weights", "dequantised"] = "weights",
        check: Mapping[str, Any] | None = None,
        partly: bool = False,
    ) -> float | None:
        """Fold the change into the backbone's own weights, IN PLACE: inference then costs what the bare backbone costs.

        Computed in float32 and cast once. The original values are kept, so that `unmerge` gives them back bit for bit.

        Args:
            onto: "dequantised" allows merging into quantised weights by replacing them; never done unasked.
            check: a batch; the largest change of the first output through merging is returned.
            partly: fold what can be folded; what can't stays attached and acts.

        Raises:
            AttachError: something in the adaptation does not merge; nothing has been changed.
        """
        from petiole.merge import merge

        return merge(self, onto=onto, check=check, partly=partly)

    def unmerge(self) -> None:
        """Undo `merge`, bit for bit."""
        from petiole.merge import unmerge

        unmerge(self)

    # ---- files

    def save(self, path: str | Path, *, folded: bool = True) -> Path:
        """Write the change to one safetensors file: atomic, digested, for this backbone only.

        Raises:
            FileError: the path can't be written, or a value is not finite; an older file there is then untouched.
        """
        from petiole.store import save

        return save(self, Path(path), folded=folded)

    def export(
        self,
        folder: str | Path,
        *,
        for_: Literal["peft", "vllm", "diffusers"] = "peft",
        rank: int | None = None,
        max_error: float = 0.01,
        check: Mapping[str, Any] | None = None,
    ) -> Export:
        """Write the change as a LoRA checkpoint that another library reads. Print what comes back: the error at every site.

        Factors go out as they are; DoRA and (IA)³ as such for PEFT; any other change of weights as the nearest product B A.

        Args:
            folder: a new one, or empty.
            for_: the reader; what it can't take is refused.
            rank: the largest wanted; None for as small as `max_error` allows.
            max_error: the largest relative error of a weight's change, ‖ΔW - B A‖ / ‖ΔW‖.
            check: a batch, on which the change of the first output is measured.

        Raises:
            AttachError: no change of weights, or nothing for this reader, or the error would be larger; nothing is written then.
            ConfigError, FileError: a value is out of range, the folder is taken or can't be written.
        """
        from petiole.interop import export

        return export(self, folder, for_=for_, rank=rank, max_error=max_error, check=check)

    def restore(self, path: str | Path) -> None:
        """Put the values of a file back into what is attached, IN PLACE: to resume a run, or to go back to a better moment.

        The file must come from `save(path, folded=False)` of the same methods on the same backbone. Sizes that changed in training
        follow, so make the optimiser after this.

        Raises:
            FileError: it is damaged, or of another configuration or backbone.
        """
        from petiole.store import refill

        refill(self, Path(path))

    def push_to_hub(self, repository: str, **options: Any) -> str:
        """Upload the file to the Hub; `pt.load(model, "hub:owner/name")` reads it from there."""
        from petiole.store import push

        return push(self, repository, **options)


def once(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same without second names for one tensor: what several deltas hold in common is stored under the first of its names."""
    seen: set[Any] = set()
    found = {}
    for name, tensor in tensors.items():
        whole: Any = tensor  # a sharded one has no address: that of its part stands for it
        if hasattr(tensor, "to_local"):
            address = whole.to_local().untyped_storage()._cdata
        else:  # nor have values that are not there
            address = tensor.untyped_storage()._cdata if tensor.device.type == "meta" else tensor.data_ptr()
        place = (address, tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if not tensor.numel() or place not in seen:
            found[name] = tensor
        seen.add(place)
    return found
