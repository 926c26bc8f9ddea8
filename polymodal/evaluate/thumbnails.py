"""Pictures for pages, from media, paths, bytes or PIL images."""

from __future__ import annotations

from typing import Any

from PIL import Image

from polymodal import pages
from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Media
from polymodal.data import media as decoders


def thumbnail(source: Any, side: int = 240) -> pages.Picture:
    """Media, a path, bytes or a PIL image, reduced to `side` pixels; of a video the first frame.

    In place of one that cannot be read is the reason: a report is about what went wrong, too.
    """
    if isinstance(source, Image.Image):
        return pages.thumbnail(source, side)
    if not isinstance(source, Media):
        source = Media("image", source if isinstance(source, bytes) else str(source))
    try:
        if source.kind == "video":
            header = decoders.video_header(source.source)
            return pages.thumbnail(Image.fromarray(decoders.video(source.source, header, [0])[0]), side)
        return pages.thumbnail(decoders.image(source.source), side)
    except PolymodalError as error:
        return pages.Picture(missing=error.message)
