"""Hub -> tree -> hub is bit-exact for every layout, and re-cutting a tree is the same as converting directly."""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from polymodal.convert import engine
from polymodal.convert.family import family
from polymodal.convert.tree import Parallel
from tests.convert import layouts
from tests.convert.hubs import HUBS


def few(examples: int):
    """Some layouts, always the same; no shrinking, since a layout that fails says enough."""
    return settings(
        max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None,
        phases=[Phase.generate],
    )  # fmt: skip


@pytest.fixture(scope="module")
def hubs(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            made[name] = HUBS[name].make(tmp_path_factory.mktemp("hub") / "source")
        return made[name]

    return get


def prove(name, source, examples):
    one = HUBS[name]
    made = family(one.family)
    facts = engine.hub(made, one.variant, source).facts

    @few(examples)
    @given(
        layouts.layouts(made, facts, variant=one.variant), layouts.layouts(made, facts, variant=one.variant)
    )
    def proof(first, second):
        with tempfile.TemporaryDirectory() as base:
            layouts.there_and_back(made, source, first, Path(base), one.variant)
            layouts.resplit(made, source, first, second, Path(base), one.variant)

    proof()


@pytest.mark.parametrize("name", HUBS)
def test_hub_to_tree_to_hub_is_exact_and_cutting_again_commutes(name, hubs):
    source, one = hubs(name), HUBS[name]
    made = family(one.family)
    facts = engine.hub(made, one.variant, source).facts
    table = made.table(one.variant, facts)
    flat = {t.name: ((1, facts[t.count] - 1),) for t in table.towers}
    virtual = {t.name: ((1, 0), (facts[t.count] - 2, 1)) for t in table.towers}
    tp, ep = 2 if table.tensor_parallel else 1, 2 if facts.get("experts") else 1
    with tempfile.TemporaryDirectory() as base:
        layouts.there_and_back(made, source, Parallel(tp, ep, flat), Path(base), one.variant)
        layouts.resplit(
            made, source, Parallel(tp, ep, flat), Parallel(1, 1, virtual), Path(base), one.variant
        )


@pytest.mark.nightly
@pytest.mark.parametrize("name", HUBS)
def test_the_same_for_many_layouts(name, hubs):
    prove(name, hubs(name), 10)


@pytest.mark.parametrize("name", [name for name, one in HUBS.items() if one.run])
def test_exports_open_in_the_library_and_compute_the_same(name, hubs, tmp_path):
    source, one = hubs(name), HUBS[name]
    made = family(one.family)
    facts = engine.hub(made, one.variant, source).facts
    layers = {t.name: ((1, facts[t.count] - 1),) for t in made.table(one.variant, facts).towers}
    layouts.there_and_back(
        made,
        source,
        Parallel(1 if not made.table(one.variant, facts).tensor_parallel else 2, 1, layers),
        tmp_path,
        one.variant,
    )
    torch.testing.assert_close(
        one.run(tmp_path / "hf"), one.run(source), rtol=1e-5, atol=1e-6
    )  # alignment in the file moves the last bit
