"""A sample that one rank alone cannot read, among ranks that read the same samples: all go on without it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polymodal.core.errors import PolymodalError
from polymodal.data import latents, media
from tests.models import tiny
from tests.parallel.harness import run
from tests.parallel.training import Job, make, runs, same


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("ground"), "qwen2.5-vl")


def _unreadable_on_rank_1(rank: int, world: int, root: Path, job: Job) -> str:
    """A run in which 5.png is whole, but rank 1 cannot open it."""
    whole = (root / "whole.png").read_bytes()
    decode = media.image

    def image(source):
        if Path(source).name == "5.png":
            if rank == 1:
                raise PolymodalError(f"{source} cannot be read.")
            source = whole
        return decode(source)

    media.image = image
    try:
        (said,) = runs(rank, world, root, [job])
    finally:
        media.image = decode
    return said.error


@pytest.mark.parametrize(
    "world, axes",
    [
        (2, ("tp",)),
        pytest.param(2, ("cp",), marks=pytest.mark.slow),
        pytest.param(4, ("pp", "tp"), marks=pytest.mark.slow),
    ],
)
def test_ranks_that_share_samples_agree_on_what_is_broken(ground, world, axes):
    """The reference is one process that cannot read the file at all."""
    tiny.picture(24 + 8 * (5 % 3), 24, 5).save(ground / "whole.png")
    name, steps = f"unreadable-{'-'.join(axes)}", "train.steps=6"
    run(1, runs, 1, ground, [Job(name, (steps,))])
    job = Job(name, (steps,), layout=tuple(f"parallel.{axis}=2" for axis in axes))
    assert run(world, _unreadable_on_rank_1, world, ground, job, timeout=120) == [""] * world
    found = same(ground, name, world=world)
    assert found[-1]["step"] == 6 and found[-1]["samples"] % 16 != 0, "the sample was met, and not counted"


class Grid:
    side = 16


def _clips(broken: tuple[bool, ...]):
    """A micro-batch as ClipCollator makes it when these samples cannot be read."""
    draw = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 255, (3, 2, 32, 48, 3), generator=draw, dtype=torch.uint8)
    pixels = [None if b else f for f, b in zip(frames, broken, strict=True)]
    sound = [{"sound": torch.full((2, 8), float(i + 1))} if not b else {} for i, b in enumerate(broken)]
    shape = (2, 32, 48)
    tensors, given = latents._filled(pixels, sound, shape, Grid.side)
    shape = tuple(tensors["pixels"].shape[1:4])
    weight = [0.0 if b else 1.0 for b in broken]
    task = latents.Task(0, tuple((i, i, -1, 6) for i in range(3)))
    batch = latents.UniformCollator(1, ()).batch(tensors, task, shape, weight)
    batch.groups |= {"given": tuple(given), "broken": broken, "captions": ("a", "b", "c")}
    return batch


@pytest.mark.parametrize(
    "mine, all_of_them",
    [
        ((False, False, False), (True, False, False)),
        ((False, False, True), (True, False, True)),
        ((False, False, False), (True, True, True)),
        ((True, True, False), (True, True, True)),
    ],
)
def test_clips_that_another_rank_lacks_are_black_as_its_own(mine, all_of_them):
    expected = _clips(all_of_them)
    found, lost = latents.without(_clips(mine), all_of_them, Grid.side)
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected.tensors)
    assert {k: v for k, v in found.groups.items() if k != "given"} == {
        k: v for k, v in expected.groups.items() if k != "given"
    }
    for a, b in zip(found.groups["given"], expected.groups["given"], strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    count = sum(all_of_them) - sum(mine)
    assert (lost.samples, lost.tokens, lost.media) == (count, 6 * count, 2 * count)
