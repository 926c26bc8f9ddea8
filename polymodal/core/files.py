"""Small files that appear under their name whole, or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def replace_file(file: Path, text: str) -> None:
    """Write `text` (UTF-8) beside `file` and rename it. Raises OSError; what was there before is then
    untouched."""
    temporary = file.with_name(f".{file.name[:200]}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, file)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
