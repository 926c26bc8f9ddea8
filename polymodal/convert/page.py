"""docs/convert.md: the key tables, printed from the tables that convert.

    python -m polymodal.convert.page > docs/convert.md

Sees the families and the text around their tables (page.md); a test checks that the page is the printed one.
"""

from __future__ import annotations

from pathlib import Path

from polymodal.convert import family_registry
from polymodal.convert.family import Family
from polymodal.convert.table import Table

TEXT = Path(__file__).with_name("page.md")
EXAMPLE = {
    "deepstack": 1, "deepstack.0": 8, "experts": 1, "query_rows": 1, "latent_rows": 1,
}  # fmt: skip
"""Facts under which tables that depend on a config are printed."""
HEADINGS = {
    ("qwen3-vl", ""): "Qwen3-VL (layer 8 of the vision tower stands for each that feeds the language model)",
}
VARIANTS = {
    "internvl": ({"": 0}, {"internlm2": 1}, {"library": 1}),
    "deepseek-vl2": ({"": 0}, {"query_latent": 1}),
}
"""Facts that choose between the tables of a family."""


def rows(table: Table) -> str:
    """A table of Markdown."""
    lines = ["| hub | tree or DCP | operation | TP |", "|---|---|---|---|"]
    for one in table.rows:
        hub = "<br>".join(f"`{pattern}`" for pattern in one.hub)
        other = "<br>".join(f"`{pattern}`" for pattern in one.other)
        cuts = "<br>".join(one.cut_of(at).label for at in range(len(one.other)))
        lines.append(
            f"| {hub} | {other} | {one.operation.label} | {cuts if table.tensor_parallel else '-'} |"
        )
    if table.towers:
        lines.append("")
        for tower in table.towers:
            first, last = (", ".join(f"`{p}*`" for p in part) for part in (tower.first, tower.last))
            lines.append(
                f"Stages, `{tower.name}`: layers `{tower.layers}*`; with the first {first or 'nothing'}; with the last {last or 'nothing'}."
            )
    return "\n".join(lines)


def section(family: Family) -> str:
    parts, printed = [], dict[tuple, str]()
    for variant in family.tables:
        for chosen in VARIANTS.get(family.name, ({},)):
            facts = {**EXAMPLE, **{name: value for name, value in chosen.items() if name}}
            extra = [variant, *(name for name in chosen if name)]
            heading = HEADINGS.get((family.name, variant)) or family.title + "".join(
                f", {one}" for one in extra if one
            )
            table = family.table(variant, facts)
            known = tuple((one.hub, one.other) for one in table.rows)
            alike = printed.setdefault(known, heading)
            body = rows(table) if alike == heading else f"As {alike}, not cut over TP."
            parts.append(f"### {heading}\n\n{body}\n")
    return "\n".join(parts)


def page() -> str:
    """The whole page."""
    families = family_registry.families().values()
    return (
        TEXT.read_text(encoding="utf-8") + "\n" + "\n".join(section(one) for one in families).rstrip() + "\n"
    )


if __name__ == "__main__":
    print(page(), end="")
