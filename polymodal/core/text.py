"""Numbers and sizes as text, the known name nearest to a misspelled one, half characters, bounded JSON."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from polymodal.core.errors import PolymodalError

DEPTH = 100  # of lists and objects within each other
DIGITS = 300  # of a whole number in JSON: more than a float can hold


def format_count(number: float) -> str:
    """1234567 -> "1.23 M"; below 10,000 all digits."""
    for unit, scale, least in (("B", 1e9, 1e9), ("M", 1e6, 1e6), ("k", 1e3, 1e4)):
        if abs(number) >= least:
            return f"{number / scale:.3g} {unit}"
    return f"{number:,.0f}"


def format_bytes(number: float) -> str:
    """Bytes in binary units: 1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(number) < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


def nearest(name: object, known: Iterable[str], cutoff: float = 0.6, most: int = 1) -> list[str]:
    """Those of `known` that are spelled most like `name`, the nearest first: at most `most`, perhaps none.

    Case does not count. cutoff: 0 to 1, `difflib`'s ratio that a name must reach to be offered.
    """
    folded: dict[str, str] = {}
    for each in known:
        folded.setdefault(each.casefold(), each)
    return [folded[found] for found in difflib.get_close_matches(str(name).casefold(), folded, most, cutoff)]


def did_you_mean(
    name: object, known: Iterable[str], otherwise: str | None = None, cutoff: float = 0.6
) -> str:
    """A hint for an unknown name: "Did you mean sdpa?", else `otherwise` (default: all known names)."""
    known = list(known)
    near = nearest(name, known, cutoff)
    if near:
        return f"Did you mean {near[0]}?"
    return f"Known: {', '.join(known)}." if otherwise is None else otherwise


def check_characters(value: Any, where: str) -> None:
    """Raise PolymodalError for a string, also within lists and mappings, that is no text: it holds half of a
    character, which no tokenizer and no file takes. where: of the error."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            try:
                item.isascii() or item.encode()
            except UnicodeEncodeError as error:
                raise PolymodalError(
                    f"{where}: the text holds half of a character, the unpaired surrogate "
                    f"{item[error.start]!r}.",
                    "Remove it: text was cut inside an emoji or another character of two halves, or is not "
                    "UTF-8.",
                ) from None
        elif isinstance(item, dict):
            waiting += [*item.values(), *item]
        elif isinstance(item, (list, tuple)):
            waiting += reversed(item)


def _whole(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


_decoder = json.JSONDecoder(parse_int=_whole)


def parse_json(text: str) -> Any:
    """A JSON value. Raises ValueError, also for one nested deeper than DEPTH and numbers beyond a float."""
    try:
        value = _decoder.decode(text)
    except RecursionError:
        raise ValueError(f"nested deeper than {DEPTH} levels") from None
    if text.count("[") + text.count("{") > DEPTH:
        level = [value]
        for _ in range(DEPTH):
            inner = (v.values() if isinstance(v, Mapping) else v for v in level)
            if not (level := [v for values in inner for v in values if isinstance(v, (list, dict))]):
                return value
        raise ValueError(f"nested deeper than {DEPTH} levels")
    return value
