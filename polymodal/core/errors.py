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


def cause(error: BaseException) -> str:
    """What a library says of a fault, as the part of a sentence: its first line, without escape codes."""
    if isinstance(error, MemoryError):
        return "more memory is asked for than there is"
    if isinstance(error, RecursionError):
        return "nested too deep"
    text = getattr(error, "strerror", None) or str(error)  # of OSError, and of FFmpeg's errors
    line = next((line.strip() for line in text.splitlines() if line.strip()), "").rstrip(".: ")
    line = "".join(c if c.isprintable() else "?" for c in line[:300])
    return line or type(error).__name__
