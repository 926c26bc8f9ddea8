"""Who may import whom: the lists of pyproject.toml's contracts name every file they are about."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GROUND = {
    "data.sample", "parallel.ops", "parallel.mesh", "parallel.attention", "parallel.context", "parallel.ring", "parallel.share",
    "parallel.ulysses", "models.card", "models.partial", "parallel.balance",
}  # fmt: skip


def test_contracts_name_every_module():
    toml = pytest.importorskip("tomllib")
    contracts = toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    named = {c["name"]: {m.removeprefix("polymodal.") for m in c["forbidden_modules"]} for c in contracts}

    def files(room: str) -> set[str]:
        found = {p.stem for p in (ROOT / "polymodal" / room).glob("*.py")} | {
            p.parent.name for p in (ROOT / "polymodal" / room).glob("*/__init__.py")
        }
        return {f"{room}.{name}" for name in found - {"__init__"}} - GROUND

    for room, contract in (
        ("data", "models see the ground floor only"),
        ("data", "the ground floor sees nothing above it"),
        ("parallel", "models see the ground floor only"),
        ("parallel", "data sees the ground floor only"),
        ("models", "parallel sees the ground floor and models.card"),
        ("models", "objectives see the ground floor and models.card"),
    ):
        assert files(room) == {m for m in named[contract] if m.startswith(f"{room}.")}, contract
