"""Tiny checkpoints, written once a session."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from tests.models import tiny


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """checkpoint(card name, tied=False) -> Path of a tiny checkpoint; the same one for the whole session."""

    @functools.cache
    def write(name: str, tied: bool = False) -> Path:
        return tiny.checkpoint(name, tmp_path_factory.mktemp(name) / "model", tied=tied)

    return write
