"""Secrets never reach what is printed or written: tokens and keys of the environment, passwords in URLs.

`redact` is the one place that knows them. core/terminal.py passes all that is printed through it; what writes
a recipe, a state or a failure to a file passes it through `redact` or `redact_all`.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
CERTAIN = {
    *("TOKEN", "TOKENS", "SECRET", "SECRETS", "PASSWORD", "PASSWD", "PASSPHRASE", "PASS", "PGPASSWORD"),
    *("CREDENTIAL", "CREDENTIALS", "APIKEY"),
}
"""Words in names of variables whose values are secrets."""
LIKELY = {"KEY", "KEYS", "AUTH", "SAS", "COOKIE", "DSN", "PAT"}
"""The same where the value looks like one: others have KEY=value of any meaning."""
KNOWN = re.compile(
    r"\bhf_[A-Za-z0-9]{30,}|\bsk-[\w-]{20,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{16,}"
    r"|\bglpat-[\w-]{16,}|\bAKIA[0-9A-Z]{16}\b|\bxox[abposr]-[\w-]{10,}|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*"
)
"""Forms that services give their tokens."""
USER = re.compile(r"(?<=://)[^\s/?#'\"<>]+(?=@)")
QUERY = re.compile(
    r"([?&;](?:[\w.-]*(?:token|secret|passw(?:or)?d|signature|credential|(?:api|access)_?key)[\w.-]*|sig|key)"
    r"=)[^&\s'\"#]+",
    re.IGNORECASE,
)


def _is_secret(name: str, value: str) -> bool:
    words = set(re.split(r"[^A-Z0-9]+", name.upper()))
    if os.path.isabs(value) and os.path.exists(value):  # the file of a key
        return False
    mixed = len({c.isdigit() or c.isupper() or not c.isalnum() for c in value}) > 1
    return bool(words & CERTAIN and len(value) >= 6) or bool(words & LIKELY and len(value) >= 8 and mixed)


@functools.lru_cache(maxsize=4)
def _values(environ: tuple[tuple[str, str], ...]) -> re.Pattern[str] | None:
    found = set()
    for name, value in environ:
        if _is_secret(name, value):
            found |= {value, *(line for line in value.splitlines() if len(line) >= 8)}
        elif "://" in value:
            found |= {part for user in USER.findall(value) for part in user.split(":")[1:] if len(part) >= 6}
    longest = sorted(found, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest))) if longest else None


def redact(text: str) -> str:
    """A text with *** in place of each secret in it."""
    values = _values(tuple(os.environ.items()))
    if values is not None:
        text = values.sub(HIDDEN, text)
    if "://" in text:
        text = USER.sub(HIDDEN, text)
    if "=" in text:
        text = QUERY.sub(rf"\g<1>{HIDDEN}", text)
    return KNOWN.sub(HIDDEN, text)


def redact_all(value: Any) -> Any:
    """Plain data (what JSON has) with all its texts passed through `redact`."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {redact_all(key): redact_all(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_all(each) for each in value]
    return value
