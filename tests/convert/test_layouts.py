"""Hub -> tree -> hub is bit-exact for every layout, and re-cutting a tree is the same as converting directly."""

import tempfile
from pathlib import Path

import diffusers
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polymodal.convert import engine
from polymodal.convert.family import facts_of
from polymodal.convert.shelf import family
from polymodal.convert.tree import Parallel
from tests.convert import layouts
from tests.convert.hubs import HUBS

FEW = settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.fixture(scope="module")
def hubs(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            made[name] = HUBS[name].make(tmp_path_factory.mktemp("hub") / "source")
        return made[name]

    return get


@pytest.mark.parametrize("name", HUBS)
def test_hub_to_tree_to_hub_is_exact_for_every_layout(name, hubs):
    source, one = hubs(name), HUBS[name]
    made = family(one.family)
    facts = engine.hub(made, made.table(one.variant), source).facts

    @FEW
    @given(layouts.layouts(made, facts, variant=one.variant), layouts.layouts(made, facts, variant=one.variant))
    def proof(first, second):
        with tempfile.TemporaryDirectory() as base:
            layouts.there_and_back(made, source, first, Path(base), one.variant)
            layouts.resplit(made, source, first, second, Path(base), one.variant)

    proof()
