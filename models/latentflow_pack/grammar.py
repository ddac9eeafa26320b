"""Scenes and their captions: the only definition of the words and of the sentences that they form.

Drawing turns a scene into pixels, training samples scenes, the checker compares a picture with a scene.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 30, 35),
    "green": (30, 150, 60),
    "blue": (40, 85, 225),
    "yellow": (250, 220, 40),
    "purple": (140, 45, 185),
    "orange": (250, 125, 15),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {"black": (8, 8, 8), "white": (247, 247, 247), "gray": (128, 128, 128)}
SHAPES = ("circle", "square", "triangle", "star")
SIZES = ("small", "large")
PLACES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "center": "in the center",
}
# Colours and shapes without a word. Each colour is at least 90 (RGB distance) from every colour that has one.
NAMELESS_COLORS: dict[str, tuple[int, int, int]] = {
    "cyan": (0, 190, 200),
    "pink": (250, 150, 195),
    "brown": (110, 65, 25),
    "magenta": (235, 30, 150),
    "lime": (160, 225, 40),
}
NAMELESS_SHAPES = ("diamond", "hexagon", "cross", "bar")
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
HELD_OUT_FILE = Path(__file__).resolve().parent.parent / "shapes" / "held-out.json"

Pair = tuple[str, str]


class GrammarError(ValueError):
    """The text is no caption of the grammar."""


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One object; None means that the caption leaves the property open. A caption omits a colour or shape without a word."""

    color: str
    shape: str
    size: str | None = None
    place: str | None = None

    @property
    def pair(self) -> Pair:
        return (self.color, self.shape)


@dataclass(frozen=True, kw_only=True)
class Scene:
    things: tuple[Thing, ...]
    background: str | None = None

    @property
    def pairs(self) -> tuple[Pair, ...]:
        return tuple(thing.pair for thing in self.things)


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """What training never draws: some colour-shape pairs, and some couples of other pairs in one picture."""

    pairs: frozenset[Pair]
    couples: frozenset[frozenset[Pair]]

    def allows(self, scene: Scene) -> bool:
        if any(pair in self.pairs for pair in scene.pairs):
            return False
        return frozenset(scene.pairs) not in self.couples

    @classmethod
    def load(cls, path: Path = HELD_OUT_FILE) -> HeldOut:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            pairs=frozenset((c, s) for c, s in raw["pairs"]),
            couples=frozenset(frozenset((c, s) for c, s in couple) for couple in raw["couples"]),
        )


def words() -> list[str]:
    """Every word of the grammar, in a fixed order; each is one token of the tokenizer."""
    places = [word for phrase in PLACES.values() for word in phrase.split()]
    listed = ["a", "an", "and", ",", "background", *COLORS, *BACKGROUNDS, *SHAPES, *SIZES, *places]
    return list(dict.fromkeys(listed))


def _phrase(thing: Thing, *, article: bool) -> str:
    color = thing.color if thing.color in COLORS else None
    shape = thing.shape if thing.shape in SHAPES else None
    parts = [part for part in (thing.size, color, shape) if part]
    if article:
        parts.insert(0, "an" if parts[0][0] in "aeiou" else "a")
    if thing.place:
        parts.append(PLACES[thing.place])
    return " ".join(parts)


def caption(scene: Scene, *, article: bool = True) -> str:
    text = " and ".join(_phrase(thing, article=article) for thing in scene.things)
    return f"{text}, {scene.background} background" if scene.background else text


def _thing(text: str) -> Thing:
    rest = text.split()
    if rest and rest[0] in ("a", "an"):
        rest = rest[1:]
    size = rest.pop(0) if rest and rest[0] in SIZES else None
    if len(rest) < 2 or rest[0] not in COLORS or rest[1] not in SHAPES:
        raise GrammarError(f"{text!r} is not '[a] [size] colour shape [place]'")
    tail = " ".join(rest[2:])
    place = next((name for name, phrase in PLACES.items() if phrase == tail), None)
    if tail and place is None:
        raise GrammarError(f"{tail!r} in {text!r} is not one of the places {sorted(PLACES.values())}")
    return Thing(color=rest[0], shape=rest[1], size=size, place=place)


def parse(text: str) -> Scene:
    """The scene that a caption describes, the inverse of `caption`. GrammarError for any other text."""
    body, comma, tail = text.partition(", ")
    background = tail.removesuffix(" background") if comma else None
    if background is not None and (background not in BACKGROUNDS or not tail.endswith(" background")):
        raise GrammarError(f"{tail!r} is not one of the backgrounds {sorted(BACKGROUNDS)}")
    things = tuple(_thing(part) for part in body.split(" and "))
    if len(things) > 2:
        raise GrammarError(f"{text!r} names {len(things)} objects; one or two can be drawn")
    return Scene(things=things, background=background)


def _size(rng: random.Random, full: float) -> str | None:
    return rng.choice(SIZES) if rng.random() < full else None


def sample(rng: random.Random, held_out: HeldOut, *, two: float = 0.45, full: float = 0.8) -> Scene:
    """A random scene that training may draw; `full` is the probability of each optional word."""
    while True:
        pairs = [(rng.choice(list(COLORS)), rng.choice(SHAPES)) for _ in range(2 if rng.random() < two else 1)]
        background = rng.choice(list(BACKGROUNDS)) if rng.random() < full else None
        if len(pairs) == 1:
            places: list[str | None] = [rng.choice(list(PLACES)) if rng.random() < full else None]
        else:
            first = rng.choice(list(OPPOSITE)) if rng.random() < full else None
            places = [first, OPPOSITE[first] if first else None]
        things = tuple(
            Thing(color=c, shape=s, size=_size(rng, full), place=p) for (c, s), p in zip(pairs, places, strict=True)
        )
        scene = Scene(things=things, background=background)
        if held_out.allows(scene):
            return scene


def with_nameless(scene: Scene, rng: random.Random, *, share: float) -> Scene:
    """The scene, with each object given a colour or a shape without a word, with probability `share`.

    A green object is then a diamond as well as a circle, and a star is pink as well as red, so that the model learns
    less from the absence of held-out pairs.
    """

    def replaced(thing: Thing) -> Thing:
        if rng.random() >= share:
            return thing
        if rng.random() < 0.5:
            return replace(thing, color=rng.choice(list(NAMELESS_COLORS)))
        return replace(thing, shape=rng.choice(NAMELESS_SHAPES))

    return replace(scene, things=tuple(replaced(thing) for thing in scene.things))
