"""Rows that a user's own function gives, named in a dataset's `reader`, in place of those of a file.

The function is called again in every process that
reads.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from polymodal.core.errors import PolymodalError
from polymodal.core.text import check_characters
from polymodal.core.user_code import load_object
from polymodal.data.files import Rows, hash_file


class OwnRows(Rows):
    """What `function(path)` returns: an object with a length that gives row i, a mapping as files hold them,
    by number.

    fingerprint: the object's own attribute of that name; else the hash of the file at `path`, or of all rows
    where there is none. Raises PolymodalError when the function fails or returns something else.
    """

    def __init__(self, path: str, reference: str, key: str):
        super().__init__(path)
        self.reference, self.key = reference, key
        self._rows: Any = None
        rows = self._opened()
        own = getattr(rows, "fingerprint", None)
        if isinstance(own, str):
            content = own
        elif os.path.isfile(path):
            content = hash_file(path)
        else:
            digest = hashlib.blake2b(digest_size=16)
            for i in range(len(rows)):
                digest.update(repr(rows[i]).encode())
            content = digest.hexdigest()
        self.fingerprint = hashlib.blake2b(f"{reference} {content}".encode(), digest_size=16).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_rows": None}

    def _opened(self) -> Sequence[Any]:
        if self._rows is None:
            function = load_object(self.reference, self.key)
            try:
                rows = function(self.path)
            except PolymodalError:
                raise
            except Exception as error:
                raise PolymodalError(
                    f"{self.key} = {self.reference} failed for {self.path}: {type(error).__name__}: {error}.",
                    "Correct the reader; what it raised is named here.",
                ) from error
            if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")) or isinstance(rows, Mapping):
                raise PolymodalError(
                    f"{self.key} = {self.reference} returned a {type(rows).__name__}, not a sequence of "
                    "rows.",
                    "Return a list of mappings, or an object with __len__ and __getitem__.",
                )
            self._rows = rows
        return self._rows

    def __len__(self) -> int:
        return len(self._opened())

    def __getitem__(self, i: int) -> dict[str, Any]:
        try:
            row = self._opened()[i]
        except PolymodalError:
            raise
        except Exception as error:
            raise PolymodalError(
                f"{self.where(i)}: {self.reference} failed: {type(error).__name__}: {error}.",
                "Correct the reader; what it raised is named here.",
            ) from error
        if not isinstance(row, Mapping):
            raise PolymodalError(
                f"{self.where(i)}: {self.reference} gave a {type(row).__name__}; a row is a mapping.",
                'Give rows such as {"messages": [...]}.',
            )
        check_characters(row, self.where(i))
        return dict(row)
