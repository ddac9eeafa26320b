"""Captions and scenes convert into each other, and training draws nothing that is held out."""

from __future__ import annotations

import itertools
import random

import pytest
from latentflow_pack import tokens
from latentflow_pack.grammar import (
    COLORS,
    SHAPES,
    GrammarError,
    HeldOut,
    Scene,
    Thing,
    caption,
    parse,
    sample,
    words,
)

NOTHING = HeldOut(pairs=frozenset(), couples=frozenset())


@pytest.mark.parametrize("full", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("article", [True, False])
def test_a_caption_parses_back_into_its_scene(full: float, article: bool) -> None:
    rng = random.Random(11)
    for _ in range(500):
        scene = sample(rng, NOTHING, full=full)
        assert parse(caption(scene, article=article)) == scene


def test_the_caption_reads_like_a_sentence() -> None:
    scene = Scene(
        things=(
            Thing(color="red", shape="circle", size="large", place="left"),
            Thing(color="blue", shape="star", size="small", place="right"),
        ),
        background="white",
    )
    assert caption(scene) == "a large red circle on the left and a small blue star on the right, white background"
    assert caption(Scene(things=(Thing(color="orange", shape="star"),))) == "an orange star"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a red", "'a red' is not"),
        ("a pink circle", "'a pink circle' is not"),
        ("a red circle on the moon", "'on the moon'"),
        ("a red circle, blue background", "'blue background'"),
        ("a red circle and a red circle and a red circle", "names 3 objects"),
    ],
)
def test_a_text_outside_the_grammar_is_refused_with_the_wrong_part(text: str, complaint: str) -> None:
    with pytest.raises(GrammarError, match=complaint):
        parse(text)


def test_training_draws_every_pair_except_those_held_out() -> None:
    held_out = HeldOut.load()
    rng = random.Random(12)
    scenes = [sample(rng, held_out) for _ in range(6000)]
    drawn = {pair for scene in scenes for pair in scene.pairs}
    assert drawn == set(itertools.product(COLORS, SHAPES)) - held_out.pairs
    assert not {frozenset(scene.pairs) for scene in scenes} & held_out.couples


def test_held_out_couples_consist_of_pairs_that_training_draws() -> None:
    held_out = HeldOut.load()
    assert held_out.pairs
    assert not any(couple & held_out.pairs for couple in held_out.couples)


def test_every_word_is_one_token_and_other_words_still_tokenize() -> None:
    tokenizer = tokens.build()
    for word in words():
        assert len(tokenizer(word)["input_ids"]) == 3, word
    assert len(tokenizer("a zebra, naïvely")["input_ids"]) > 5
    ids = [tuple(tokenizer(word)["input_ids"]) for word in words()]
    assert len(set(ids)) == len(words())
