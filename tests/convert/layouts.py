"""What the tests of conversions share: layouts to draw from, whole round trips, and files as tables of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from polymodal.convert import changes, engine, output
from polymodal.convert.family import Family
from polymodal.convert.operations import Facts
from polymodal.convert.options import Settings
from polymodal.convert.tree import FILE, Parallel

SETTINGS = Settings(workers=2)


def tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a directory of safetensors."""
    found: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


def tree(root: Path) -> dict[str, Tensor]:
    """Every tensor of a tree, under directory/slot:key."""
    found = {}
    for path in sorted(root.glob(f"*/mp_rank_*/{FILE}")):
        for slot, held in torch.load(path, weights_only=True).items():
            if slot.startswith("model"):
                found |= {f"{path.parent.name}/{slot}:{key}": value for key, value in held.items()}
    return found


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Same names, types and bits."""
    assert one.keys() == other.keys(), sorted(one.keys() ^ other.keys())[:6]
    for key in one:
        assert one[key].dtype == other[key].dtype and one[key].shape == other[key].shape, key
        assert torch.equal(
            one[key].reshape(-1).view(torch.uint8), other[key].reshape(-1).view(torch.uint8)
        ), key


@st.composite
def split(draw: st.DrawFn, total: int, parts: int) -> list[int]:
    """Numbers, some of them zero, that add up to total."""
    ends = sorted(draw(st.lists(st.integers(0, total), min_size=parts - 1, max_size=parts - 1)))
    return [b - a for a, b in zip([0, *ends], [*ends, total], strict=True)]


@st.composite
def layouts(
    draw: st.DrawFn, family: Family, facts: Facts, tp: tuple[int, ...] = (1, 2, 4), variant: str = ""
) -> Parallel:
    """Any way to cut a family's tree: TP, PP with uneven and empty stages, virtual stages, EP, towers of their own TP."""
    table = family.table(variant, facts)
    fits = [n for n in tp if n == 1 or (table.tensor_parallel and facts.get("kv_heads", n) % n == 0)]
    size = draw(st.sampled_from(fits))
    pp, vpp = (draw(st.sampled_from((1, 2, 3))), draw(st.sampled_from((1, 2)))) if table.pipeline else (1, 1)
    layers = {}
    for tower in table.towers:
        width = 1 if tower.name != table.towers[-1].name and pp > 1 and draw(st.booleans()) else pp
        flat = draw(split(facts[tower.count], width * vpp))
        layers[tower.name] = tuple(tuple(flat[v * width : (v + 1) * width]) for v in range(vpp))
    experts = facts.get("experts", 0)
    ep = draw(st.sampled_from([n for n in (1, 2) if not experts or experts % n == 0])) if experts else 1
    return Parallel(size, ep, layers if pp * vpp > 1 else {})


def there_and_back(family: Family, source: Path, parallel: Parallel, base: Path, variant: str = "") -> None:
    """Hub -> tree -> hub is bit-exact, the weight files are the source's own."""
    output.to_tree(engine.hub(family, variant, source), parallel, base / "mm", SETTINGS)
    back = engine.opened_tree(family, variant, base / "mm", source, None, SETTINGS)
    hub = engine.unmapped(back, base / "mm", source)
    output.to_hub(hub, base / "hf", SETTINGS, source, family.stem)
    same(tensors(source), tensors(base / "hf"))
    files = [{p.name for p in where.iterdir() if ".safetensors" in p.name} for where in (source, base / "hf")]
    assert files[0] == files[1]


def resplit(
    family: Family, source: Path, one: Parallel, other: Parallel, base: Path, variant: str = ""
) -> None:
    """Cutting a tree again gives what converting directly gives."""
    output.to_tree(engine.hub(family, variant, source), one, base / "one", SETTINGS)
    output.to_tree(engine.hub(family, variant, source), other, base / "other", SETTINGS)
    opened = engine.opened_tree(family, variant, base / "one", source, None, SETTINGS)
    output.to_tree(changes.without_head(opened, known=True), other, base / "again", SETTINGS)
    same(tree(base / "other"), tree(base / "again"))
