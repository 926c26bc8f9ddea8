"""docs/convert.md: the key tables, printed from the tables that convert.

    python -m polymodal.convert.page > docs/convert.md

The text around the tables is page.md; a test checks that the page is the printed one.
"""

from __future__ import annotations

from pathlib import Path

from polymodal.convert.family import Family, families
from polymodal.convert.table import Table
from polymodal.core.terminal import say_lines

TEXT = Path(__file__).with_name("page.md")
EXAMPLE = {"deepstack": 1, "deepstack.0": 8}
"""Facts under which tables that depend on a config are printed."""
HEADINGS = {
    ("qwen3-vl", ""): "Qwen3-VL (layer 8 of the vision tower stands for each that feeds the language model)",
}


def rows(table: Table) -> str:
    """A table of Markdown."""
    lines = ["| hub | tree or DCP | operation | TP |", "|---|---|---|---|"]
    for row in table.rows:
        hub, tree = ("<br>".join(f"`{pattern}`" for pattern in side) for side in (row.hub, row.tree))
        shards = "<br>".join(shard.label for shard in row.shards) if table.tensor_parallel else "-"
        lines.append(f"| {hub} | {tree} | {row.operation.label} | {shards} |")
    lines += [""] if table.towers else []
    for tower in table.towers:
        first, last = (", ".join(f"`{p}*`" for p in side) or "nothing" for side in (tower.first, tower.last))
        lines.append(
            f"Stages, `{tower.name}`: layers `{tower.layers}*`; with the first {first}; with the last {last}."
        )
    return "\n".join(lines)


def section(family: Family) -> str:
    parts, printed = [], dict[tuple, str]()
    for variant in family.tables:
        for case in ["", *family.cases(variant)]:
            names = [name for name in (family.title, variant, case) if name]
            heading = HEADINGS.get((family.name, variant)) or ", ".join(names)
            table = family.table(variant, {**EXAMPLE, case: 1})
            alike = printed.setdefault(tuple((row.hub, row.tree) for row in table.rows), heading)
            body = rows(table) if alike == heading else f"As {alike}, not cut over TP."
            parts.append(f"### {heading}\n\n{body}\n")
    return "\n".join(parts)


def page() -> str:
    """The whole page."""
    sections = "\n".join(section(family) for family in families().values())
    return f"{TEXT.read_text(encoding='utf-8')}\n{sections.rstrip()}\n"


if __name__ == "__main__":
    say_lines(page())
