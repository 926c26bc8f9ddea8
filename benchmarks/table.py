"""Writes docs/benchmarks.md from the JSON files that the benchmarks left in benchmarks/results/.

    python benchmarks/table.py

Each benchmark is a command (`python benchmarks/NAME.py --json benchmarks/results/NAME.json`); a row that was not run
is not in the table.
"""

from __future__ import annotations

import json
from pathlib import Path

HERE = Path(__file__).resolve().parent


def loss_memory(r: dict) -> list[tuple[str, str, str]]:
    what = f"peak memory of the loss at {r['tokens']:,} tokens, vocabulary {r['vocabulary']:,}, against whole logits and cross entropy"
    return [
        (what, f"{r['ratio']:.2f}", f"<= {r['wanted']}"),
        ("CPU time of the same", f"{r['seconds_ratio']:.2f}", "-"),
    ]


def throughput(r: dict) -> list[tuple[str, str, str]]:
    names = {
        "trainer": ("transformers Trainer, defaults", ">= 2.0"),
        "trainer-grouped": ("transformers Trainer, length grouping", ">= 1.3"),
        "trl": ("TRL SFTTrainer (it refuses to pack pictures)", ">= 1.0"),
        "bare": ("a bare loop over the same batches, made beforehand", ">= 0.97"),
    }
    return [
        (f"useful tokens/s, {r['precision']}, against {names[k][0]}", f"{v:.2f}", names[k][1])
        for k, v in r["ratio"].items()
    ]


def schedule_growth(r: dict) -> list[tuple[str, str, str]]:
    rows = r["rows"] if isinstance(r, dict) and "rows" in r else r
    out = []
    for row in rows[1:] if isinstance(rows, list) else []:
        first = rows[0]
        for key, text in (
            ("first_seconds", "time to the first batch"),
            ("bytes", "memory"),
            ("seconds_a_sample", "time a sample"),
        ):
            if key in row:
                out.append(
                    (
                        f"schedule over {row['samples']:,} samples against {first['samples']:,}: {text}",
                        f"{row[key] / first[key]:.2f}",
                        "flat",
                    )
                )
    return out


WRITERS = {
    "loss_memory": loss_memory,
    "throughput": throughput,
    "throughput_bf16": throughput,
    "schedule_growth": schedule_growth,
}


def main() -> None:
    lines = [
        "# Benchmarks", "",
        "Ratios measured side by side in one run on the same machine (2 CPU cores). Written by `python benchmarks/table.py`.", "",
        "| what | ratio | wanted | command |", "|---|---|---|---|",
    ]  # fmt: skip
    for path in sorted((HERE / "results").glob("*.json")):
        command = path.stem.removesuffix("_bf16")
        for what, ratio, wanted in WRITERS[path.stem](json.loads(path.read_text())):
            lines.append(f"| {what} | {ratio} | {wanted} | `python benchmarks/{command}.py` |")
    (HERE.parent / "docs" / "benchmarks.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
