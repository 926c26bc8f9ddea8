"""The processes of a running command, as the kernel tells them."""

from __future__ import annotations

from pathlib import Path


def children(pid: int) -> list[int]:
    """Processes that `pid` started and that still are."""
    try:
        return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def workers(pid: int) -> list[int]:
    """Of those, the ones that train: they hold rank and world in their environment."""
    found = []
    for child in children(pid):
        try:
            if b"LOCAL_RANK=" in Path(f"/proc/{child}/environ").read_bytes():
                found.append(child)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found
