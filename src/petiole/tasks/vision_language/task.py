"""Vision and language as a task: questions, statements and captions of generated scenes, all answered as text by one model."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from petiole.attach import site_seed
from petiole.errors import ConfigError
from petiole.tasks.generated import Generated
from petiole.tasks.loop import batches, evaluating
from petiole.tasks.metrics import IGNORED, METRICS
from petiole.tasks.vision_language.features import Features, grid, pixels
from petiole.tasks.vision_language.model import VisionLanguageModel
from petiole.tasks.vision_language.questions import TASKS, Example, example
from petiole.tasks.vision_language.scenes import CELLS, render
from petiole.tasks.vision_language.words import word_tokenizer

SIZES = {"train": 2000, "validation": 100, "test": 200}  # rows of each task
LONGEST = 16  # words of an answer


class Pictures(Dataset[dict[str, Any]]):
    """Rows of several tasks, one task behind the other; features are computed when first asked for, and kept.

    Args:
        tasks: of `TASKS`. rows: of each. seed: of rows and pictures.
        features: of pictures (n, 3, H, W); None for the text alone. cells: of the grid that they are of, on a side.
        tokenizer: of prompts and answers. size: of a picture in pixels.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        rows: Mapping[str, int],
        seed: int,
        features: Features | None,
        cells: int,
        tokenizer: Any,
        size: int,
    ) -> None:
        self.examples: list[Example] = [example(task, seed, i) for task in tasks for i in range(rows[task])]
        self.seed, self.features, self.tokenizer, self.size = seed, features, tokenizer, size
        self.boxes = grid(cells)
        self._kept: list[Tensor] | None = None

    def __len__(self) -> int:
        return len(self.examples)

    def pictures(self, index: int) -> Tensor:
        """Of one row: (images, 3, size, size)."""
        scenes = self.examples[index].scenes
        seeds = (site_seed(self.seed, f"picture {index} {number}") for number in range(len(scenes)))
        return torch.stack([render(one, self.size, seed=seed) for one, seed in zip(scenes, seeds, strict=True)])

    def kept(self) -> list[Tensor]:
        """Features of every row: (images, cells², F) each."""
        if self._kept is None:
            assert self.features is not None
            every = [self.pictures(index) for index in range(len(self))]
            self._kept = list(self.features(torch.cat(every)).split([len(each) for each in every]))
        return self._kept

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        own = self.examples[index]
        row = {
            "input_ids": self.tokenizer(own.prompt)["input_ids"],
            "labels": self.tokenizer(own.answer)["input_ids"],
        }
        if self.features is None:
            return row
        return {**row, "image_features": self.kept()[index], "image_boxes": self.boxes}


class VisionLanguage(Generated[Pictures]):
    """Tasks about generated scenes, told apart by the words they begin with: vqa, nlvr (two pictures each), caption.

    Args:
        tasks: which. sizes: rows of each split, of every task, or by task.
        features: of pictures; their pixels in each cell of the grid if "pixels", the text alone if None, or a function, such as
            `states(vit, 3)`. cells: of the grid on a side.
        size: height and width of a picture.
        tokenizer: the one of all words that scenes need if None.
        seed: of the scenes; splits never share one.

    Raises:
        ConfigError: a task or split is unknown, or named twice.
    """

    main_metric: ClassVar[str] = "average"
    higher_is_better: ClassVar[bool] = True

    def __init__(
        self,
        tasks: Sequence[str] = TASKS,
        *,
        sizes: Mapping[str, int | Mapping[str, int]] | None = None,
        features: Features | Literal["pixels"] | None = "pixels",
        cells: int = CELLS,
        size: int = 48,
        tokenizer: Any = None,
        seed: int = 0,
    ) -> None:
        self.tasks = tuple(tasks)
        if not self.tasks or len(set(self.tasks)) < len(self.tasks) or not set(self.tasks) <= set(TASKS):
            raise ConfigError(f"tasks = {list(self.tasks)}: different ones of {', '.join(TASKS)}")
        counts = {**SIZES, **(sizes or {})}
        self.tokenizer = word_tokenizer() if tokenizer is None else tokenizer
        self.features = pixels(cells) if features == "pixels" else features
        self.splits: dict[str, Pictures] = {}
        for number, (split, rows) in enumerate(counts.items()):
            each = {task: rows if isinstance(rows, int) else rows.get(task, 0) for task in self.tasks}
            self.splits[split] = Pictures(
                self.tasks, each, len(counts) * seed + number, self.features, cells, self.tokenizer, size
            )

    def build_model(self, backbone: nn.Module, **options: Any) -> VisionLanguageModel:
        """The backbone with a visual embedding for these features; see `VisionLanguageModel` for options."""
        first = self.encoded("train")[0].get("image_features")
        return VisionLanguageModel(backbone, 1 if first is None else first.shape[-1], **options)

    def collator(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Rows, of whichever tasks -> a batch. Where some have fewer pictures, `image_mask` says which there are."""
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        labels = [torch.tensor(row["labels"]) for row in rows]
        batch = {
            "input_ids": padded(ids, self.tokenizer.pad_token_id),
            "attention_mask": padded([torch.ones_like(one) for one in ids], 0),
            "labels": padded(labels, IGNORED),
        }
        if "image_features" not in rows[0]:
            return batch
        images = [row["image_features"] for row in rows]
        batch |= {"image_features": padded(images, 0.0), "image_boxes": rows[0]["image_boxes"]}
        if len({len(one) for one in images}) > 1:
            batch["image_mask"] = padded([torch.ones(one.shape[:2], dtype=torch.long) for one in images], 0)
        return batch

    def steps(self, split: str, batch_size: int, count: int, seed: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """So many batches, each of one task, with its name: tasks come in proportion to their rows, rows of a task in turn."""
        rows = self.encoded(split)
        draw, left = random.Random(seed), {task: list[int]() for task in self.tasks}
        own = {task: [i for i, each in enumerate(rows.examples) if each.task == task] for task in self.tasks}
        for _ in range(count):
            (task,) = draw.choices(self.tasks, [len(own[each]) for each in self.tasks])
            while len(left[task]) < batch_size:
                left[task] += draw.sample(own[task], len(own[task]))
            chosen, left[task] = left[task][:batch_size], left[task][batch_size:]
            yield task, self.collator([rows[i] for i in chosen])

    # ------------------------------------------------------------------------------------------------------------------ metrics

    def answers(
        self, model: nn.Module, split: str = "validation", *, batch_size: int = 64, **generation: Any
    ) -> list[str]:
        """What a model answers to each row. Greedy, unless `generation`, the arguments of `generate`, says otherwise."""
        rows, found = self.encoded(split), list[str]()
        options = {"max_new_tokens": LONGEST, "do_sample": False, "num_beams": 1, **generation}
        with evaluating(model):
            for batch in batches(rows, self.prompts, batch_size, model):
                found += self.tokenizer.batch_decode(model.generate(**batch, **options), skip_special_tokens=True)  # type: ignore[operator]
        return [" ".join(answer.split()) for answer in found]

    def prompts(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Rows -> a batch without answers."""
        return {key: value for key, value in self.collator(rows).items() if key != "labels"}

    def evaluate(self, model: nn.Module, split: str = "validation", **options: Any) -> dict[str, float]:
        """For each task the share of answers that are right to the word, and their average; of captions ROUGE-L, too.

        Args:
            options: of `answers`.
        """
        rows, found = self.encoded(split), {}
        told = self.answers(model, split, **options)
        for task in self.tasks:
            pairs = [(a, each.answer) for a, each in zip(told, rows.examples, strict=True) if each.task == task]
            if not pairs:
                continue
            predictions, references = zip(*pairs, strict=True)
            found[task] = METRICS["exact_match"](predictions, references)
            if task == "caption":
                found["caption_rouge_l"] = METRICS["rouge_l"](predictions, references)
        return {
            **found,
            "average": sum(found[task] for task in self.tasks if task in found) / len(set(found) & set(TASKS)),
        }


def padded(tensors: Sequence[Tensor], fill: float) -> Tensor:
    """Tensors (n_i, ...) -> (B, max n, ...)."""
    return nn.utils.rnn.pad_sequence(list(tensors), batch_first=True, padding_value=fill)
