"""Chat processors and a folder of media, made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from polymodal.recipe import Data
from tests.models import tiny
from tests.unit.media_fixtures import qwen_media, write_mp4


@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    """qwen(card name, **data keys) -> ChatProcessor with the card's own media; the same one for the same keys."""
    from polymodal.data.chat import ChatProcessor

    directory = tmp_path_factory.mktemp("processors")
    made = {}

    def make(name="qwen2.5-vl", **keys):
        data = Data(**keys)
        key = (
            name,
            data.model_dump_json(),
            keys.get("chat_template")
            and Path(keys["chat_template"]).exists()
            and Path(keys["chat_template"]).read_text(),
        )
        if key not in made:
            made[key] = ChatProcessor(qwen_media(name, directory / name, data), data)
        return made[key]

    return make


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Pictures 0.png to 2.png of several sizes, and v.mp4 of three seconds."""
    directory = tmp_path_factory.mktemp("media")
    for n, size in enumerate(((24, 16), (40, 24), (17, 31))):
        tiny.picture(*size, n).save(directory / f"{n}.png")
    write_mp4(directory / "v.mp4", frames=30, fps=10, width=32, height=24)
    return directory
