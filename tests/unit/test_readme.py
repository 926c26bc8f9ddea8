"""README and docs agree with the cards and with the readers of data; what needs no torch is in tests/static."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from polymodal import recipe
from polymodal.data.formats import RowReader
from polymodal.models import catalog
from polymodal.tools import model_table, models_command
from tests.static.test_documents import blocks

ROOT = Path(__file__).parents[2]


def test_the_table_of_models_is_the_cards():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .* \| (?:full).*\|$", text, re.M)
    assert sorted(rows) == sorted(
        model_table.readme_row(card, models_command.why_not) for card in catalog.cards().values()
    )


def test_the_committed_page_of_models_is_up_to_date():
    page = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    assert page == models_command.page(), "run: polymodal models --markdown > docs/models.md"


def test_the_records_of_the_data_page_are_read():
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    found = re.findall(r"^```json (\w+)\n(.*?)^```", text, re.S | re.M)
    assert {kind for kind, _ in found} == {
        "mllm",
        "llava",
        "sharegpt",
        "alpaca",
        "openai",
        "asr",
        "text",
        "attr",
    }
    fields = next(
        data["data"]["attr"]
        for data in map(yaml.safe_load, blocks(ROOT / "docs/data.md", "yaml"))
        if "attr" in data["data"]
    )
    for kind, row in found:
        for format in ("auto",) if kind == "attr" else (kind, "auto"):
            own = recipe.Attr(**fields) if kind == "attr" else recipe.Attr()
            record = RowReader(format, own, "docs/data.md", "").record(json.loads(row), kind)
            assert record.messages[-1].role == "assistant" and record.messages[-1].content[-1]
            assert bool(record.media) == (kind in ("mllm", "llava", "openai", "asr", "attr"))
