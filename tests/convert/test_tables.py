"""Tables of key names: how a line of families/*.yaml is read, and that nothing in the files is unused or unknown."""

import re

import pytest
import yaml

from polymodal.convert.facts import FROM_CONFIG, FROM_SHAPES
from polymodal.convert.family import FOLDER, families, parse
from polymodal.convert.operations import COLUMNS, OPERATIONS, RENAME, ROWS, SHARDS, WHOLE

FILES = {path.name: yaml.safe_load(path.read_text()) for path in FOLDER.glob("*.yaml")}


def read(hub, tree):
    return [(row.hub, row.tree) for row in parse(hub, tree)]


def test_as_many_names_on_both_sides_are_a_row_each():
    assert read("a.{q,k}.{p}", "b.proj_{q,k}.{p}") == [
        (("a.q.{p}",), ("b.proj_q.{p}",)),
        (("a.k.{p}",), ("b.proj_k.{p}",)),
    ]


def test_names_of_one_side_are_joined_or_split():
    assert read("{img,txt}.{q,k,v}", "{img,txt}.qkv concatenate3 qkv") == [
        (("img.q", "img.k", "img.v"), ("img.qkv",)),
        (("txt.q", "txt.k", "txt.v"), ("txt.qkv",)),
    ]
    (row,) = parse("linear1.{p}", "linear1_{qkv,mlp}.{p} split_single_block qkv,rows")
    assert (row.hub, row.tree) == (("linear1.{p}",), ("linear1_qkv.{p}", "linear1_mlp.{p}"))
    assert row.operation is OPERATIONS["split_single_block"] and row.shards == (SHARDS["qkv"], ROWS)


def test_a_bias_is_whole_where_the_columns_of_its_weight_are_sharded():
    weight, bias = parse("a.{p}", "b.{p} columns")
    assert (weight.hub, weight.shards) == (("a.weight",), (COLUMNS,))
    assert (bias.tree, bias.shards, bias.operation) == (("b.bias",), (WHOLE,), RENAME)


@pytest.mark.parametrize("name", families())
def test_every_table_is_filled_in(name):
    family = families()[name]
    facts = {"deepstack": 1, "deepstack.0": 8}
    for variant in family.tables:
        for case in ["", *family.cases(variant)]:
            for row in family.table(variant, {**facts, case: 1}).rows:
                for pattern in (*row.hub, *row.tree):
                    assert not re.search(r"[<>, ]|\{(?![nmepx]\})", pattern), pattern


def test_nothing_in_the_files_is_unused():
    words = {word for one in FILES.values() for word in re.findall(r"[\w.]+", yaml.safe_dump(one, width=1e9))}
    assert {*OPERATIONS, *SHARDS, *FROM_CONFIG, *FROM_SHAPES} - words == {"whole"}
    for kind in ("rows", "towers"):
        defined = [name for one in FILES.values() for name in one.get(kind, {})]
        assert len(defined) == len(set(defined))
        used = yaml.safe_dump([one.get("families", {}) for one in FILES.values()], width=1e9)
        groups = yaml.safe_dump([group for one in FILES.values() for group in one.get("rows", {}).values()])
        for name in defined:
            assert re.search(rf"\b{name}\b", used + groups), name
