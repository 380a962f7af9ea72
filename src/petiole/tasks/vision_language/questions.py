"""What is asked about scenes, with the answer drawn first and a scene that has it after: from the words alone every answer is as likely.

    vqa      is there a red circle ?                     yes, no
             how many square things are there ?           zero to three        (of a shape, or of a colour)
             what colour is the cross ?                  a colour             (there is one cross)
             is the circle above the square ?            yes, no              (one of each; above, below, left of, right of)
    nlvr     both pictures show a red circle             true, false          (of two scenes)
             one picture alone shows a red circle
             the first picture has more square things than the second
    caption  describe the picture                        the scene in words

nlvr is as in Suhr et al. 2018, arXiv 1811.00491: a statement about two pictures.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from petiole.attach import site_seed
from petiole.tasks.vision_language.scenes import COLOURS, SHAPES, Scene, Thing, scene

NUMBERS = ("zero", "one", "two", "three")
SIDES: dict[str, Callable[[Thing, Thing], bool]] = {
    "above": lambda a, b: a.row < b.row,
    "below": lambda a, b: a.row > b.row,
    "left of": lambda a, b: a.column < b.column,
    "right of": lambda a, b: a.column > b.column,
}
Holds = Callable[[tuple[Scene, ...]], bool]


@dataclass(frozen=True)
class Example:
    """A question with its task's name in front, its scenes, and the answer."""

    task: str
    kind: str
    question: str
    scenes: tuple[Scene, ...]
    answer: str

    @property
    def prompt(self) -> str:
        return f"{self.task}: {self.question}"


def example(task: str, seed: int, number: int) -> Example:
    """Example `number` of a task: the same for the same seed, whatever else is drawn."""
    draw = random.Random(site_seed(seed, f"{task} {number}"))
    if task == "caption":
        one = scene(draw)
        return Example(task, task, "describe the picture", (one,), str(one))
    kind = draw.choice(KINDS[task])
    question, answer, holds = kind(draw)
    while True:
        scenes = tuple(scene(draw) for _ in range(2 if task == "nlvr" else 1))
        if holds(scenes):
            return Example(task, kind.__name__, question, scenes, answer)


def presence(draw: random.Random) -> tuple[str, str, Holds]:
    colour, shape, there = draw.choice(tuple(COLOURS)), draw.choice(SHAPES), draw.random() < 0.5
    return f"is there a {colour} {shape} ?", yes(there), lambda s: (s[0].count(colour, shape) > 0) == there


def count(draw: random.Random) -> tuple[str, str, Holds]:
    colour, shape = draw.choice([(None, draw.choice(SHAPES)), (draw.choice(tuple(COLOURS)), None)])
    number = draw.randrange(len(NUMBERS))
    what = f"{colour} things" if shape is None else f"{shape} things"
    return f"how many {what} are there ?", NUMBERS[number], lambda s: s[0].count(colour, shape) == number


def colour(draw: random.Random) -> tuple[str, str, Holds]:
    shape, answer = draw.choice(SHAPES), draw.choice(tuple(COLOURS))

    def holds(s: tuple[Scene, ...]) -> bool:
        thing = s[0].only(shape)
        return thing is not None and thing.colour == answer

    return f"what colour is the {shape} ?", answer, holds


def relation(draw: random.Random) -> tuple[str, str, Holds]:
    (one, other), side, true = draw.sample(SHAPES, 2), draw.choice(tuple(SIDES)), draw.random() < 0.5

    def holds(s: tuple[Scene, ...]) -> bool:
        a, b = s[0].only(one), s[0].only(other)
        return a is not None and b is not None and SIDES[side](a, b) == true

    return f"is the {one} {side} the {other} ?", yes(true), holds


def both(draw: random.Random) -> tuple[str, str, Holds]:
    what, true = draw.choice(SHAPES), draw.random() < 0.5
    return f"both pictures show a {what}", truth(true), lambda s: all(x.count(shape=what) > 0 for x in s) == true


def one_alone(draw: random.Random) -> tuple[str, str, Holds]:
    what, true = draw.choice(SHAPES), draw.random() < 0.5
    return (
        f"one picture alone shows a {what}",
        truth(true),
        lambda s: (sum(x.count(shape=what) > 0 for x in s) == 1) == true,
    )


def more(draw: random.Random) -> tuple[str, str, Holds]:
    what, true = draw.choice(SHAPES), draw.random() < 0.5
    holds: Holds = lambda s: (s[0].count(shape=what) > s[1].count(shape=what)) == true  # noqa: E731
    return f"the first picture has more {what} things than the second", truth(true), holds


def yes(true: bool) -> str:
    return "yes" if true else "no"


def truth(true: bool) -> str:
    return "true" if true else "false"


KINDS: dict[str, tuple[Callable[[random.Random], tuple[str, str, Holds]], ...]] = {
    "vqa": (presence, count, colour, relation),
    "nlvr": (both, one_alone, more),
}
TASKS = (*KINDS, "caption")
