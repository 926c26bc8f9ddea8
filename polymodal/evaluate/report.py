"""Pages that open anywhere: HTML without a server, a font or a script from elsewhere; pictures are inside.

The parts (thumbnail, grid, table, page) serve evaluation's per-sample page and any other report, such as the demo's.
Sees data/media.py for decoding and errors; every text that comes from data is escaped here.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Media

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--card:#f6f7f9;--line:#d9dde3;--text:#1b1f24;--dim:#626b77;--good:#137a3a;--bad:#b3261e;--half:#9a6700}
@media(prefers-color-scheme:dark){:root{--bg:#14171b;--card:#1d2127;--line:#333a43;--text:#e7eaee;--dim:#98a2ae;--good:#4cc27b;--bad:#ff7b72;--half:#d9a53f}}
*{box-sizing:border-box}body{margin:0 auto;max-width:1200px;padding:24px;background:var(--bg);color:var(--text);font:15px/1.45 system-ui,sans-serif}
h1{font-size:24px;margin:0 0 4px}h2{font-size:18px;margin:32px 0 10px}.dim{color:var(--dim)}.lead{font-size:16px;margin:0 0 16px}
table{border-collapse:collapse;margin:8px 0}th,td{text-align:left;padding:5px 14px 5px 0;border-bottom:1px solid var(--line);vertical-align:top}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(240px,1fr));gap:14px}
.card{background:var(--card);border:1px solid var(--line);border-left:4px solid var(--line);border-radius:8px;padding:12px;overflow-wrap:anywhere}
.card.right{border-left-color:var(--good)}.card.wrong{border-left-color:var(--bad)}.card.part{border-left-color:var(--half)}
.card .pics{display:flex;flex-wrap:wrap;gap:6px;margin-bottom:8px}.card img{max-width:100%;max-height:160px;border-radius:4px;background:#fff}.card img.small{width:96px;image-rendering:pixelated}
.card .q{white-space:pre-wrap;max-height:18em;overflow:auto;margin:0 0 8px}.card .row{display:flex;gap:8px;margin-top:3px}.card .row b{flex:0 0 74px;font-weight:500;color:var(--dim)}.card .row span{white-space:pre-wrap;max-height:12em;overflow:auto}
span.right{color:var(--good)}span.wrong{color:var(--bad)}span.part{color:var(--half)}.card span.right::after{content:" ✓"}.card span.wrong::after{content:" ✗"}.card span.part::after{content:" ≈"}.none{color:var(--dim);font-style:italic}
.bar{display:flex;flex-wrap:wrap;gap:8px;margin:0 0 12px}.bar button,.bar input{font:inherit;color:inherit;background:var(--card);border:1px solid var(--line);border-radius:6px;padding:5px 12px}.bar button[aria-pressed=true]{border-color:var(--text)}.bar input{flex:1;min-width:160px}
details summary{cursor:pointer;color:var(--dim)}
"""

_FILTER = """
document.querySelectorAll('.bar').forEach(bar=>{const cards=[...bar.nextElementSibling.children],input=bar.querySelector('input'),buttons=[...bar.querySelectorAll('button')];let kind='';
const show=()=>{const text=input.value.toLowerCase();cards.forEach(c=>{c.hidden=(kind&&!c.classList.contains(kind))||(text&&!c.textContent.toLowerCase().includes(text))})};
buttons.forEach(b=>b.onclick=()=>{kind=b.dataset.kind;buttons.forEach(o=>o.setAttribute('aria-pressed',o===b));show()});input.oninput=show})
"""


@dataclass(frozen=True)
class Shown:
    """One card of a grid. answers: (label, text, score 0..1 or None for "not judged"), e.g. before and after training."""

    question: str
    answers: Sequence[tuple[str, str, float | None]]
    expected: str = ""
    pictures: Sequence[str] = ()  # from `thumbnail`
    note: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)


def thumbnail(source: Any, side: int = 240) -> str:
    """A picture as <img>: Media, a path, bytes or a PIL image, reduced to `side` pixels; a video's first frame.

    A picture that cannot be read becomes a note in its place: a report is about what went wrong, too.
    """
    from PIL import Image

    from polymodal.data import media as decoders

    try:
        if isinstance(source, Image.Image):
            picture = source
        else:
            item = (
                source
                if isinstance(source, Media)
                else Media("image", source if isinstance(source, bytes) else str(source))
            )
            if item.kind == "video":
                header = decoders.video_header(item.source)
                picture = Image.fromarray(decoders.video(item.source, header, [0])[0])
            else:
                picture = decoders.image(item.source)  # type: ignore[arg-type]
    except PolymodalError as error:
        return f'<span class="none">{escape(error.message)}</span>'
    picture = picture.convert("RGB")
    small = max(picture.size) <= 64  # digits, icons: kept exact and enlarged by the page
    picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG" if small else "JPEG", **({} if small else {"quality": 80}))
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img{" class=small" if small else ""} alt="" src="data:image/{"png" if small else "jpeg"};base64,{data}">'


def _kind(score: float | None) -> str:
    return "" if score is None else "right" if score >= 1 else "wrong" if score <= 0 else "part"


def card(shown: Shown) -> str:
    """One question with its pictures, what was expected and every answer; coloured by the last answer."""
    rows = [
        f'<div class="row"><b>expected</b><span>{escape(shown.expected) or "<i class=none>none</i>"}</span></div>'
    ]
    for label, text, score in shown.answers:
        rows.append(
            f'<div class="row"><b>{escape(label)}</b><span class="{_kind(score)}">{escape(text) or "<i class=none>empty</i>"}</span></div>'
        )
    if shown.note:
        rows.append(f'<div class="row"><b></b><span class="dim">{escape(shown.note)}</span></div>')
    if shown.tags:
        rows.append(f'<div class="row dim">{escape(" · ".join(shown.tags.values()))}</div>')
    pictures = f'<div class="pics">{"".join(shown.pictures)}</div>' if shown.pictures else ""
    kind = _kind(shown.answers[-1][2]) if shown.answers else ""
    return (
        f'<div class="card {kind}">{pictures}<p class="q">{escape(shown.question)}</p>{"".join(rows)}</div>'
    )


def grid(cards: Sequence[Shown], *, filters: bool = True) -> str:
    """Cards side by side; with `filters`, buttons for right, partly right and wrong, and a search field."""
    body = f'<div class="grid">{"".join(map(card, cards))}</div>'
    if not filters:
        return body
    kinds = [_kind(c.answers[-1][2]) if c.answers else "" for c in cards]
    buttons = [
        ("", "all", len(cards)),
        ("right", "right", kinds.count("right")),
        ("part", "partly", kinds.count("part")),
        ("wrong", "wrong", kinds.count("wrong")),
    ]
    bar = "".join(
        f'<button data-kind="{kind}" aria-pressed="{"true" if not kind else "false"}">{name} {count}</button>'
        for kind, name, count in buttons
        if count or not kind
    )
    return f'<div class="bar">{bar}<input placeholder="search" aria-label="search"></div>{body}'


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table; numbers stand right."""

    def cell(value: Any, tag: str = "td") -> str:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        return f"<{tag}{' class=n' if number else ''}>{escape(text)}</{tag}>"

    numeric = [all(isinstance(r[i], (int, float)) for r in rows) and bool(rows) for i in range(len(headers))]
    head = "".join(
        f"<th{' class=n' if n else ''}>{escape(h)}</th>" for h, n in zip(headers, numeric, strict=True)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join('<tr>' + ''.join(map(cell, row)) + '</tr>' for row in rows)}</tbody></table>"


def page(title: str, sections: Sequence[str], lead: str = "") -> str:
    """A whole document: `sections` are HTML, `title` and `lead` plain text."""
    body = "\n".join(sections)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><h1>{escape(title)}</h1>"
        f"{f'<p class=lead>{escape(lead)}</p>' if lead else ''}\n{body}\n<script>{_FILTER}</script></body></html>\n"
    )
