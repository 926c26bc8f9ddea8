"""What processors of media share: files of the checkpoint, ids of special tokens, kinds of media.

Data workers hold a processor (it is picklable and needs no model), a family makes it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Media, MediaStream, Record, Span
from polymodal.data.boxes import BoxFormat


def readable(directory: str, what: str, read: Callable[[], Any]) -> Any:
    """`read()`. Raises PolymodalError when the files of a part of a checkpoint are not there."""
    try:
        return read()
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise PolymodalError(
            f"The {what} of {directory} cannot be read: {reason}",
            "Copy the checkpoint's tokenizer and preprocessor files beside its weights, "
            "or fetch it again with `polymodal download`.",
        ) from None


@functools.lru_cache(4096)
def encoded(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Token ids without special tokens around them."""
    return tuple(tokenizer.encode(text, add_special_tokens=False))


class TokenMedia:
    """MediaProcessor whose media are placeholder tokens of the text. directory: a checkpoint.

    reads: kind -> text of such a medium in the rendered chat.
    """

    streams: tuple[MediaStream, ...] = ()
    rows = 1
    frame_multiple = 1
    sample_rate = 0
    boxes: BoxFormat | None = None  # the card's
    reads: dict[str, str] = {}

    def __init__(self, directory: str):
        self.directory = directory
        self.tokenizer = self.load("AutoTokenizer", "tokenizer")

    def load(self, auto: str, what: str, **options: Any) -> Any:
        """A part of the checkpoint by the library's Auto class. Raises PolymodalError."""
        import transformers

        load = getattr(transformers, auto).from_pretrained
        options |= {"local_files_only": True, "trust_remote_code": False}
        return readable(self.directory, what, lambda: load(self.directory, **options))

    def token_id(self, text: str) -> int:
        """Id of a special token. Raises PolymodalError when the tokenizer does not have it."""
        ids = encoded(self.tokenizer, text)
        if len(ids) != 1:
            raise PolymodalError(
                f"The tokenizer of {self.directory} does not know the token {text}.",
                "Take the tokenizer files of this very model.",
            )
        return ids[0]

    def picture_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in pixels of a picture of this size when the model sees it."""
        return height, width

    def conversation(self, record: Record) -> Record:
        return record

    def placeholder(self, kind: str) -> str:
        """Text of a medium before it is expanded. Raises PolymodalError for other kinds."""
        if kind not in self.reads:
            known = " and ".join(f"{name}s" for name in self.reads)
            raise PolymodalError(
                f"This model reads {known}, not {kind}.",
                "Remove the medium or choose a model that reads it (`polymodal models`).",
            )
        return self.reads[kind]

    def template_content(self, part: str | Media) -> dict:
        """One part of a message as the library's chat templates read it."""
        if isinstance(part, str):
            return {"type": "text", "text": part}
        self.placeholder(part.kind)
        return {"type": part.kind}

    def position_ids(self, input_ids: Tensor, spans: Sequence[Span]) -> Tensor:
        """Positions [1, T] int64: every token counts one."""
        return torch.arange(input_ids.shape[0])[None]
