"""Every golden file that the project keeps: our nets give the published numbers, with the published keys."""

import gzip
import json
from pathlib import Path

import pytest

from tests.golden import recipe
from tests.golden.check import check, load
from tests.golden.nets import find

FILES = sorted((Path(__file__).parent / "files").glob("*.json.gz"))
SLOW = ("open_sora_1_2_vae_temporal", "step_video_vae")
"""Convolutions over time in float64."""


def _case(path: Path):
    name = path.name.partition(".")[0]
    return pytest.param(path, id=name, marks=[pytest.mark.slow] if name in SLOW else [])


@pytest.mark.parametrize("path", map(_case, FILES))
def test_a_net_gives_the_published_numbers(path: Path):
    results = check(path)
    assert results
    assert [str(result) for result in results if not result.fine] == []


def test_a_wrong_number_is_found(tmp_path: Path):
    path = next(path for path in FILES if find(recipe.read(path)).compare is None)
    document = recipe.read(path)
    case = next(iter(document["cases"].values()))
    output = next(iter(case["outputs"].values()))
    output["values"] = [value * 1.001 for value in output["values"]]
    changed = tmp_path / path.name
    changed.write_bytes(gzip.compress(json.dumps(document).encode()))
    assert any(not result.fine for result in check(changed))


def test_a_missing_key_is_refused():
    path = next(path for path in FILES if find(recipe.read(path)).compare is None)
    document = recipe.read(path)
    document["state_dict"].popitem()
    net = find(document)
    assert net.build is not None
    with pytest.raises(ValueError, match="keys differ"):
        load(net.build(document), net, document)
