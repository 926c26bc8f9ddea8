"""The one exception that a user is meant to read."""

from __future__ import annotations


class PolymodalError(Exception):
    """A fault of the input or of the machine, in one sentence.

    message: what is wrong, with the file, line or key, and the cause.
    hint:    how to fix it, as an instruction ("set data.max_length to at least 4096").

    The command line prints both without a traceback and exits with `code`.
    """

    code = 2

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.message = message
        self.hint = hint

    def at(self, where: str) -> PolymodalError:
        """The same error with the file and line (or the key) that it comes from in front."""
        return type(self)(f"{where}: {self.message}", self.hint)

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()

    def __reduce__(self):  # pickled by data workers and the launcher
        return type(self), (self.message, self.hint)
