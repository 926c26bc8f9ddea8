"""How many tokens a text has, and how many lie before a place in it, several times faster than making the tokens.

Part of the data room: sees nothing of the packed_attention. Byte-level BPE tokenizers cut a text at their added tokens and then
into words by one regular expression; the tokens of a word do not depend on its neighbours. So what lies between two
spaces is counted once and remembered. For other tokenizers, and whenever a check on real text finds a difference,
the tokenizer itself counts.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPACED = {GPT2, QWEN2, QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")}
"""Expressions that end a word before every space that something else than space follows, whatever stands before."""
_UNSAFE = re.compile(r" (?:\s|\Z)")  # a space that does not begin a word
_BORDER = re.compile(r" (?=\S)")  # one that does
_WORDS = 1 << 20  # words remembered
_CHECKED = 2  # texts of each call that the tokenizer counts too


class TokenCounter:
    """Counts tokens of texts without added begin or end tokens. Picklable; remembers words by process.

    tokenizer: the `tokenizers.Tokenizer` behind a fast tokenizer.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.words: dict[str, dict[str, int]] = {
            "": {},
            " ": {},
        }  # what stands before a word -> word -> tokens
        self._word, self._added = _rules(tokenizer)
        self._spaced = self._word is not None and self._word.pattern in SPACED

    @property
    def by_words(self) -> bool:
        """Whether counting by words is on: the tokenizer is of that kind and no check has failed."""
        return self._word is not None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "words": {"": {}, " ": {}}}

    def count(self, texts: Sequence[str], cuts: Sequence[Sequence[int]]) -> list[list[int]]:
        """For each text: for each of its cuts (character positions, ascending) the number of tokens that begin
        before it, and last the number of all tokens."""
        out: list[list[int] | None] = [None] * len(texts)
        if self._word is not None:
            for i, text in enumerate(texts):
                if text.isascii() or unicodedata.is_normalized("NFC", text):
                    out[i] = self._by_words(text, cuts[i])
            known = [i for i, counts in enumerate(out) if counts is not None][:_CHECKED]
            if known and self._by_tokens([texts[i] for i in known], [cuts[i] for i in known]) != [
                out[i] for i in known
            ]:
                self._word = None  # this tokenizer has a rule that is not known here
                out = [None] * len(texts)
        missing = [i for i, counts in enumerate(out) if counts is None]
        if missing:
            for i, counts in zip(
                missing, self._by_tokens([texts[i] for i in missing], [cuts[i] for i in missing]), strict=True
            ):
                out[i] = counts
        return out  # type: ignore[return-value]

    def _by_tokens(self, texts: Sequence[str], cuts: Sequence[Sequence[int]]) -> list[list[int]]:
        encodings = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [
            [*(tokens_before(e, cut, len(t)) for cut in c), len(e)]
            for e, t, c in zip(encodings, texts, cuts, strict=True)
        ]

    def _by_words(self, text: str, cuts: Sequence[int]) -> list[int] | None:
        """None when a cut lies inside a word: then its tokens must be seen."""
        counts: list[int] = []
        total = at = n = 0
        for k, piece in enumerate(self._added.split(text)):
            end = at + len(piece)
            while n < len(cuts) and cuts[n] <= at:
                counts.append(total)
                n += 1
            inside = n < len(cuts) and cuts[n] < end
            if k % 2:
                if inside:
                    return None
                total += 1
            elif piece:
                while n < len(cuts) and cuts[n] < end:
                    before = self._before(piece, cuts[n] - at)
                    if before is None:
                        return None
                    counts.append(total + before)
                    n += 1
                total += self._whole(piece)
            at = end
        return [*counts, *([total] * (len(cuts) - n)), total]

    def _whole(self, piece: str) -> int:
        """Tokens of a text without added tokens."""
        if len(piece) < 48:
            known = self.words[""].get(piece)
            return self._counts([piece], "") if known is None else known
        if self._spaced and not _UNSAFE.search(piece):
            first, *others = piece.split(" ")
            return (self._counts([first], "") if first else 0) + self._counts(others, " ")
        return self._counts(self._word.findall(piece), "")

    def _before(self, piece: str, place: int) -> int | None:
        """Tokens of a piece before a character; None when that is not between two words."""
        start, stop = 0, len(piece)
        if self._spaced:  # only the words between two sure borders need be looked at
            start = piece.rfind(" ", 0, place + 1)
            while start > 0 and not _BORDER.match(piece, start):
                start = piece.rfind(" ", 0, start)
            border = _BORDER.search(piece, max(place, start + 1))
            start, stop = max(start, 0), border.start() if border else stop
        total, at = self._whole(piece[:start]) if start else 0, start
        for word in self._word.findall(piece[start:stop]):
            if at >= place:
                break
            at += len(word)
            total += self._counts([word], "")
        return total if at == place else None

    def _counts(self, words: list[str], space: str) -> int:
        """Tokens of words, each with a space before it or not."""
        known = self.words[space]
        try:
            return sum([known[w] for w in words])
        except KeyError:
            if len(known) > _WORDS:
                known.clear()
            new = [w for w in dict.fromkeys(words) if w not in known]
            for word, encoding in zip(
                new,
                self.tokenizer.encode_batch_fast([space + w for w in new], add_special_tokens=False),
                strict=True,
            ):
                known[word] = len(encoding)
            return sum([known[w] for w in words])


def tokens_before(encoding: Any, position: int, length: int) -> int:
    """Number of tokens of a `tokenizers.Encoding` that begin before a character position; length: of the text."""
    while position < length:
        token = encoding.char_to_token(position)
        if token is not None:
            while token < len(encoding) and encoding.offsets[token][0] < position:
                token += 1
            return token
        position += 1  # a character that no token covers
    return len(encoding)


def _rules(tokenizer: Any) -> tuple[Any, Any]:
    """(expression of words, expression of added tokens), or (None, None) when the tokenizer is of another kind."""
    try:
        import regex
    except ImportError:
        return None, None
    parts: dict[str, Any] = {}
    for name in ("normalizer", "pre_tokenizer", "model"):
        part = getattr(tokenizer, name)
        state = part.__getstate__() if part is not None else b"null"
        try:
            parts[name] = json.loads(state) if name != "model" else type(part).__name__
        except ValueError:
            return None, None
    steps = (parts["pre_tokenizer"] or {}).get("pretokenizers", [parts["pre_tokenizer"] or {}])
    pattern = None
    if steps[-1].get("type") == "ByteLevel" and not steps[-1].get("add_prefix_space"):
        if len(steps) == 1 and steps[0].get("use_regex", True):
            pattern = GPT2
        elif len(steps) == 2 and steps[0].get("type") == "Split" and not steps[1].get("use_regex", True):
            plain = steps[0].get("behavior") == "Isolated" and not steps[0].get("invert")
            pattern = steps[0]["pattern"].get("Regex") if plain else None
    added = tokenizer.get_added_tokens_decoder().values()
    if (
        pattern is None
        or parts["model"] != "BPE"
        or (parts["normalizer"] or {"type": "NFC"}).get("type") != "NFC"
        or any(t.lstrip or t.rstrip or t.single_word for t in added)
    ):
        return None, None
    names = "|".join(re.escape(t.content) for t in sorted(added, key=lambda t: -len(t.content))) or "(?!)"
    try:
        return regex.compile(pattern), re.compile(f"({names})")
    except (regex.error, re.error):
        return None, None
