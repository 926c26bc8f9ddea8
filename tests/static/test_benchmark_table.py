"""The page of benchmarks is what its writer makes of the results that the runs left; nothing in it is written by hand."""

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("table", ROOT / "benchmarks" / "table.py")
table = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(table)


def test_the_page_is_written_from_the_results():
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    assert page == table.text(ROOT / "benchmarks" / "results")
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert path.stem in {**table.WRITERS, **table.SECTIONS, **table.ELSEWHERE}, (
            path.name
        )  # no result without a row


def test_a_missed_target_is_reported(tmp_path):
    result = {"ratio": {"trainer": 1.9, "trl": 1.2}, "precision": "fp32", "clock": "seconds", "threads": 2, "spread": {"ours": "± 1 %", "trainer": "± 2 %", "trl": "± 3 %"}}  # fmt: skip
    (tmp_path / "throughput.json").write_text(json.dumps(result))
    slow, quick = [
        line for line in table.text(tmp_path).splitlines() if "useful tokens a second, 2 cores" in line
    ]
    assert "| 1.90 | >= 2.0 | **missed** |" in slow and "| 1.20 | >= 1.0 | met |" in quick
