"""A backbone with one light decoder for each dense task.

Decoder (MTLoRA, arXiv 2403.20320): 1x1 convolutions without bias bring the scales to widths 18, 36, 72, 144; all are brought to the
size of the largest and joined (270); 1x1 to four times as many, batch norm, ReLU, 1x1 to the task's channels; then to the image's size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from petiole.attach import given, host_of, streams
from petiole.errors import AttachError, ConfigError
from petiole.tasks.dense.targets import TARGETS

WIDTH = 18  # of the first scale; each further one has twice as many


class DenseOutput(dict[str, Any]):
    """What a model predicts: a dictionary without the entries that there are none for, whose entries are attributes too.

    Attributes:
        loss: the weighted sum of the tasks' losses, where there are labels.
        logits: predictions by task, (B, channels, H, W); the tensor itself where one task was asked for.
        losses: each task's own loss, before its weight.
    """

    @property
    def loss(self) -> Tensor | None:
        return self.get("loss")

    @property
    def logits(self) -> Any:
        return self["logits"]

    @property
    def losses(self) -> dict[str, Tensor]:
        return self.get("losses", {})


class Decoder(nn.Module):
    """Maps of several scales (B, c_i, h_i, w_i), largest first -> (B, channels, h_0, w_0).

    Args:
        sources: c_i. channels: of the prediction.
        width: of the first scale; each further one has twice as many.
    """

    def __init__(self, sources: Sequence[int], channels: int, width: int = WIDTH) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(len(sources))]
        whole = sum(widths)
        self.bring = nn.ModuleList(nn.Conv2d(c, w, 1, bias=False) for c, w in zip(sources, widths, strict=True))
        self.fuse = nn.Conv2d(whole, 4 * whole, 1)
        self.norm = nn.BatchNorm2d(4 * whole)
        self.last = nn.Conv2d(4 * whole, channels, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        found = [bring(m) for bring, m in zip(self.bring, maps, strict=True)]
        found = [resized(m, found[0].shape[-2:]) for m in found]
        return self.last(torch.relu(self.normed(self.fuse(torch.cat(found, 1)))))

    def normed(self, h: Tensor) -> Tensor:
        """A batch of one pixel has no variance: the running statistics stand in for it."""
        if self.norm.training and h.numel() == h.shape[1]:
            n = self.norm
            return nn.functional.batch_norm(h, n.running_mean, n.running_var, n.weight, n.bias, False, 0.0, n.eps)
        return self.norm(h)


class Decoders(nn.Module):
    """Maps by task -> predictions by task: one decoder for each that is given."""

    def __init__(self, decoders: Mapping[str, Decoder]) -> None:
        super().__init__()
        self.tasks = nn.ModuleDict(decoders)

    def forward(self, maps: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
        return {task: self.tasks[task](states) for task, states in maps.items()}


def resized(h: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, to (h, w)."""
    return h if tuple(h.shape[-2:]) == tuple(size) else nn.functional.interpolate(h, tuple(size), mode="bilinear")


class DenseModel(nn.Module):
    """A backbone of Transformers for images, and a decoder for each task.

    The decoders are the model's task head: any method attached to this model trains them along. Where a method publishes a stream of
    states for a task (`pt.streams`), its decoder reads those; all others read the backbone's own states. Where a method changes these for
    each task (`one_task`), the backbone runs once for each.

    Args:
        backbone: a base model, such as `SwinModel` or `ViTModel`.
        tasks: of `TARGETS`, in order.
        channels: of a task's prediction, where it is not that of `TARGETS`: {"semseg": 40}.
        depths: of a flat backbone: the blocks whose outputs are the scales, negative from the end; one for each stage otherwise.
        width: of the decoders' first scale.
        loss_weights: by task, where it is not that of `TARGETS`.
        seed: of the decoders; the global generator stays where it was.

    Raises:
        ConfigError: a task is unknown or named twice, or a setting is of no task.
    """

    base_model_prefix = "backbone"

    def __init__(
        self,
        backbone: nn.Module,
        tasks: Sequence[str],
        *,
        channels: Mapping[str, int] | None = None,
        depths: Sequence[int] | None = None,
        width: int = WIDTH,
        loss_weights: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        unknown = [task for task in self.tasks if task not in TARGETS]
        if unknown or not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ConfigError(f"tasks = {list(self.tasks)}: different ones of {', '.join(TARGETS)}")
        for field, values in (("channels", channels), ("loss_weights", loss_weights)):
            if extra := set(values or ()) - set(self.tasks):
                raise ConfigError(f"{field} names {min(extra)!r}, which is none of the tasks: {', '.join(self.tasks)}")
        config: Any = backbone.config
        self.config = config
        self.backbone = backbone
        own = {task: TARGETS[task].channels for task in self.tasks} | dict(channels or {})
        self.loss_weights = {task: TARGETS[task].weight for task in self.tasks} | dict(loss_weights or {})
        sizes = stage_widths(config)
        self.flat = not sizes
        self.depths = tuple(
            sum(config.depths[: i + 1]) - 1 for i in range(len(sizes))
        )  # of the blocks whose outputs are read
        if self.flat:
            count = config.num_hidden_layers
            self.depths = tuple(d % count for d in (depths or range(-min(4, count), 0)))
            sizes = [config.hidden_size] * len(self.depths)
        elif depths is not None:
            raise ConfigError("depths: this backbone has stages, and each gives one scale")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.heads = Decoders({task: Decoder(sizes, own[task], width) for task in self.tasks})

    def forward(self, pixel_values: Tensor, labels: Mapping[str, Tensor] | None = None, **options: Any) -> DenseOutput:
        """Predictions of every task; `with pt.given(model, task="depth")` of one alone (or of several, from a list).

        Args:
            pixel_values: (B, 3, H, W).
            labels: by task; tasks without a label in it are predicted and add no loss.
        """
        chosen, single = self.chosen()
        if not single and self.by_task():
            maps: dict[str, list[Tensor]] = {}
            for task in chosen:
                with given(self if host_of(self) is not None else self.backbone, task=task):
                    maps |= self.maps(pixel_values, (task,), **options)
        else:
            maps = self.maps(pixel_values, chosen, **options)
        found = self.heads(maps)
        logits = {task: resized(scores, pixel_values.shape[-2:]) for task, scores in found.items()}
        output = DenseOutput(logits=logits[chosen[0]] if single else logits)
        losses = {
            task: TARGETS[task].loss(logits[task], label) for task, label in (labels or {}).items() if task in logits
        }
        if losses:
            loss = torch.stack([self.loss_weights[task] * value for task, value in losses.items()]).sum()
            return DenseOutput(loss=loss, **output, losses=losses)
        return output

    def chosen(self) -> tuple[tuple[str, ...], bool]:
        """Tasks that are asked for in this forward pass, and whether it is one by name."""
        host = host_of(self) or host_of(self.backbone)
        asked = host.given("task") if host is not None else None
        if asked is None:
            return self.tasks, False
        names = (asked,) if isinstance(asked, str) else tuple(asked)
        if unknown := [name for name in names if name not in self.tasks]:
            raise ConfigError(f"task = {unknown[0]!r} is none of this model's: {', '.join(self.tasks)}")
        return tuple(task for task in self.tasks if task in names), isinstance(asked, str)

    def by_task(self) -> bool:
        """Whether the backbone's states are those of one task alone."""
        host = host_of(self) or host_of(self.backbone)
        acting = [a for a in host.adaptations.values() if host.acts(a.name)] if host is not None else []
        return any(m.one_task and len(getattr(m, "tasks", ())) > 1 for a in acting for m in a.methods)

    def maps(self, pixel_values: Tensor, tasks: Sequence[str], **options: Any) -> dict[str, list[Tensor]]:
        """What each task's decoder reads: its own stream where there is one, the backbone's states elsewhere."""
        found = self.backbone(pixel_values=pixel_values, output_hidden_states=True, **options)
        if not self.flat:
            shared = list(found.reshaped_hidden_states[1:])
        else:
            shared = [self.unrolled(found.hidden_states[depth + 1], pixel_values) for depth in self.depths]
        own = streams(self if host_of(self) is not None else self.backbone)
        return {task: self.own_maps(own[task], shared, pixel_values) if task in own else shared for task in tasks}

    def own_maps(self, states: Mapping[int, Tensor], shared: Sequence[Tensor], pixel_values: Tensor) -> list[Tensor]:
        """A task's stream where it has a state at the depth that a decoder reads; the backbone's own states elsewhere."""
        if unread := sorted(set(states) - set(self.depths)):
            raise AttachError(
                f"a task's stream has a state after block {unread[0]}, which no decoder reads; they read {self.depths}\n"
                "name those blocks in the method, or depths= in the model"
            )
        maps = list(shared)
        for i, depth in enumerate(self.depths):
            if depth in states:
                state = states[depth]
                maps[i] = (
                    self.unrolled(state, pixel_values) if self.flat else state.mT.unflatten(-1, shared[i].shape[-2:])
                )
        return maps

    def unrolled(self, state: Tensor, pixel_values: Tensor) -> Tensor:
        """Tokens of a flat backbone (B, tokens, d) -> (B, d, h, w); those in front that are no patches are left out."""
        config: Any = self.config
        patch = config.patch_size
        h, w = (
            side // (patch if isinstance(patch, int) else patch[i]) for i, side in enumerate(pixel_values.shape[-2:])
        )
        return state[:, state.shape[1] - h * w :].mT.unflatten(-1, (h, w))

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Of the backbone."""
        self.backbone.gradient_checkpointing_enable(**options)  # type: ignore[operator]


def stage_widths(config: Any) -> list[int]:
    """Channels of the states after each stage: twice as many after each patch merging. Empty for a flat backbone."""
    stages = len(getattr(config, "depths", ()))
    return [config.embed_dim * 2 ** min(i + 1, stages - 1) for i in range(stages)]
