"""The checker, the hints and the style statistics, on pictures whose content is known."""

from __future__ import annotations

import random

import numpy as np
import pytest
from latentflow_pack import hints
from latentflow_pack.checker import judge, read
from latentflow_pack.drawing import arrange, draw
from latentflow_pack.grammar import HeldOut, Scene, parse, sample
from latentflow_pack.styles import STATISTICS
from numpy.typing import NDArray

NOTHING = HeldOut(pairs=frozenset(), couples=frozenset())

Drawn = list[tuple[Scene, NDArray[np.uint8]]]


@pytest.fixture(scope="module")
def drawn() -> Drawn:
    rng = random.Random(21)
    scenes = [sample(rng, NOTHING, full=1.0) for _ in range(500)]
    return [(scene, draw(arrange(scene, rng))) for scene in scenes]


def test_the_checker_recognizes_the_training_pictures(drawn: Drawn) -> None:
    verdicts = [judge(image, scene) for scene, image in drawn]
    assert np.mean([verdict.things for verdict in verdicts]) >= 0.99
    assert np.mean([verdict.size for verdict in verdicts]) >= 0.99
    assert np.mean([verdict.background for verdict in verdicts]) == 1.0


def test_shuffled_captions_score_as_chance_does(drawn: Drawn) -> None:
    ones = [(scene, image) for scene, image in drawn if len(scene.things) == 1]
    moved = [(scene, image) for (scene, _), (_, image) in zip(ones, ones[1:] + ones[:1], strict=True)]
    verdicts = [judge(image, scene) for scene, image in moved]
    assert np.mean([verdict.color_shape for verdict in verdicts]) < 0.10  # chance is 1 in 24
    assert 0.22 < np.mean([verdict.background for verdict in verdicts]) < 0.45  # chance is 1 in 3
    assert np.mean([verdict.things for verdict in verdicts]) < 0.04


def test_an_object_too_many_or_too_few_is_wrong() -> None:
    two = parse("a large red circle on the left and a large blue star on the right, white background")
    one = parse("a large red circle on the left, white background")
    rng = random.Random(22)
    assert not judge(draw(arrange(two, rng)), one).color_shape
    assert not judge(draw(arrange(one, rng)), two).color_shape


def test_blank_noisy_and_smeared_pictures_show_no_shape() -> None:
    noise = np.random.default_rng(23)
    scene = parse("a red circle")
    for image in (
        np.full((64, 64, 3), 247, dtype=np.uint8),
        noise.integers(0, 256, (64, 64, 3), dtype=np.uint8),
        np.tile(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], (64, 1, 3)),
    ):
        assert not judge(image, scene).color_shape


def test_a_bar_is_none_of_the_shapes() -> None:
    image = np.full((64, 64, 3), 247, dtype=np.uint8)
    image[28:36, 10:54] = (215, 30, 35)
    assert [thing.shape for thing in read(image).things] == ["unknown"]


def test_edges_agree_with_themselves_shifted_by_at_most_a_pixel(drawn: Drawn) -> None:
    for _, image in drawn[:20]:
        assert hints.edge_agreement(image, image) == 1.0
        assert hints.edge_agreement(np.roll(image, 1, axis=1), image) > 0.95
        assert hints.edge_agreement(np.roll(image, 5, axis=1), image) < 0.7


def test_hints_are_pictures_of_the_pipelines_size(drawn: Drawn) -> None:
    image = drawn[0][1]
    edges, layout = hints.hint("edges", image), hints.hint("layout", image)
    assert edges.shape == layout.shape == (64, 64, 3)
    assert set(np.unique(edges)) == {0, 255}
    assert (layout[:8, :8] == layout[0, 0]).all()
    assert hints.cell_agreement(image, image) == (1.0, 1.0)


@pytest.mark.parametrize("style", STATISTICS)
def test_each_statistic_separates_its_style_from_the_plain_one(style: str) -> None:
    rng = random.Random(24)
    layouts = [arrange(sample(rng, NOTHING), rng) for _ in range(80)]
    statistic = STATISTICS[style]
    assert np.mean([statistic.shown(draw(layout, style=style)) for layout in layouts]) >= 0.97
    assert np.mean([statistic.shown(draw(layout)) for layout in layouts]) <= 0.05
