"""The video demonstration's own parts: its clips move as their captions say, and its judge measures that."""

import importlib
import random
import sys
from pathlib import Path

import numpy as np
import pytest

PLACE = Path(__file__).parents[2] / "examples" / "wan-digits"
ALIKE = ("build", "demo", "shared")  # names that other examples have too


@pytest.fixture(scope="module")
def example():
    """(build, demo) of examples/wan-digits, without leaving them among the imported modules."""
    before, path = {n: sys.modules.pop(n, None) for n in ALIKE}, list(sys.path)
    sys.path.insert(0, str(PLACE))
    try:
        yield importlib.import_module("build"), importlib.import_module("demo")
    finally:
        sys.path[:] = path
        for name in ALIKE:
            sys.modules.pop(name, None)
            if before[name] is not None:
                sys.modules[name] = before[name]


def test_a_clip_moves_where_its_caption_says_and_stays_whole(example):
    build, demo = example
    images, _ = build.scans()
    for i, direction in enumerate(build.DIRECTIONS):
        frames = build.clip(images[i], direction, random.Random(i))
        assert frames.shape == (17, 16, 16) and frames.min() >= 0 and frames.max() <= 1
        assert demo.direction_of(frames) == direction
        light = frames.sum((1, 2))
        assert np.allclose(light, light[0], rtol=1e-3), "part of the digit left the frame"


def test_a_digit_that_does_not_move_has_no_direction(example):
    build, demo = example
    images, _ = build.scans()
    frames = build.clip(images[0], "left", random.Random(0))
    assert demo.direction_of(np.repeat(frames[:1], 17, 0)) == "nowhere"
    assert demo.direction_of(frames[::-1]) == "right"


def test_the_judge_reads_held_out_digits_wherever_they_are(example):
    build, demo = example
    images, digits = build.scans()
    draw, ways = random.Random(0), list(build.DIRECTIONS)

    def seen(numbers):
        clips = [build.clip(images[i], draw.choice(ways), draw) for i in numbers]
        return np.stack([demo.features_of(clip[[0, 8, 16]]) for clip in clips])

    train, held = range(0, 600), range(build.TRAIN, build.TRAIN + 150)
    model = build.shared.fitted(seen(train).reshape(-1, 64), np.repeat(digits[list(train)], 3))
    votes = model.predict(seen(held).reshape(-1, 64)).reshape(-1, 3)
    assert np.mean(votes == digits[list(held)][:, None]) > 0.93
