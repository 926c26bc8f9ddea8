"""How an answer is judged: exact, contains, anls, relaxed, choice, open, likelihood; reading a choice from free text.

Pure Python on strings: imports nothing of the house and no torch. Every metric is a function of (answer, expected
answers, options) in METRICS and gives a `Score` in 0..1; a benchmark only names one.
"""

from __future__ import annotations

import ast
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """value: 0..1. extracted: what was compared (the letter read from a sentence, the cleaned text).

    parsed: False when the metric found nothing to compare (no choice in the text); the value is 0 then.
    """

    value: float
    extracted: str
    parsed: bool = True


Metric = Callable[[str, Sequence[str], Mapping[str, str]], Score]

_THOUGHT = re.compile(r"<think(?:ing)?>.*?</think(?:ing)?>", re.S | re.I)
_QUOTES = "\"'`“”‘’"


def final_text(answer: str) -> str:
    """The answer without reasoning: what stands after the last closed <think> block, or inside <answer>...</answer>."""
    text = _THOUGHT.sub(" ", answer)
    if "</think>" in text:  # templates that open the block in the prompt leave only its end in the answer
        text = text.rpartition("</think>")[2]
    tagged = re.findall(r"<answer>(.*?)</answer>", text, re.S | re.I)
    return (tagged[-1] if tagged else text).strip()


def normalise(text: str) -> str:
    """Lower case, NFKC, single spaces, no surrounding quotes or markdown emphasis, no closing full stop."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = " ".join(text.split()).strip(_QUOTES + "* ")
    text = text[:-1] if text.endswith((".", "。")) and not text.endswith("..") else text
    return text.strip(_QUOTES + "* ")


def exact(answer: str, expected: Sequence[str], options: Mapping[str, str]) -> Score:
    """1 when the normalised texts are equal (see `normalise`)."""
    got = normalise(final_text(answer))
    return Score(float(any(got == normalise(e) for e in expected)), got)


def contains(answer: str, expected: Sequence[str], options: Mapping[str, str]) -> Score:
    """1 when an expected text occurs in the answer as whole words (in scripts without spaces: as a substring)."""
    got = normalise(final_text(answer))
    return Score(float(any(_within(normalise(e), got) for e in expected if normalise(e))), got)


def _within(needle: str, text: str) -> bool:
    """Whether `needle` stands in `text` on word borders; a digit's border also keeps 5 out of 3.5 and 5,000."""
    left = r"(?<![\w])" if needle[0].isascii() and needle[0].isalnum() else ""
    right = r"(?![\w])" if needle[-1].isascii() and needle[-1].isalnum() else ""
    if needle[0].isdigit():
        left = r"(?<![\w])(?<!\d[.,])"
    if needle[-1].isdigit():
        right = r"(?![\w])(?![.,]\d)"
    return re.search(left + re.escape(needle) + right, text) is not None


def levenshtein(a: str, b: str) -> int:
    """Edit distance: insertions, deletions, substitutions, each 1."""
    if len(a) < len(b):
        a, b = b, a
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def anls(answer: str, expected: Sequence[str], options: Mapping[str, str], threshold: float = 0.5) -> Score:
    """Average normalised Levenshtein similarity, one question's part (Biten et al. 2019, "Scene Text VQA", eq. 1).

    max over expected texts of 1 - d, where d = edit distance / longer length; 0 when d >= threshold. Case and runs of
    spaces do not count.
    """

    def clean(text: str) -> str:
        return " ".join(text.lower().split())

    got, best = clean(final_text(answer)), 0.0
    for text in expected:
        want = clean(text)
        longest = max(len(got), len(want))
        distance = levenshtein(got, want) / longest if longest else 0.0
        if distance < threshold:
            best = max(best, 1 - distance)
    return Score(best, got)


def number(text: str) -> float | None:
    """A text that is one number -> float: 1,234.5, -3, 12% (= 0.12), $5; else None."""
    text = text.strip().lstrip("$€£¥").strip()
    percent = text.endswith("%")
    text = text.rstrip("%").strip()
    if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?", text):
        text = text.replace(",", "")
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text, re.I):
        return None
    value = float(text)
    return value / 100 if percent else value


def relaxed(
    answer: str, expected: Sequence[str], options: Mapping[str, str], tolerance: float = 0.05
) -> Score:
    """Relaxed accuracy (Masry et al. 2022, "ChartQA", sec. 5.1): numbers may be 5 % off, texts must be equal.

    A number whose expected value is 0 must be equal, for 5 % of 0 is 0. A percent sign divides by 100 on either side.
    """
    got = normalise(final_text(answer))
    value = number(got)
    right = False
    for text in expected:
        target = number(normalise(text))
        if value is not None and target is not None:
            right |= abs(value - target) <= tolerance * abs(target)
        else:
            right |= got == normalise(text)
    return Score(float(right), got)


# --- choices ---------------------------------------------------------------------------------------------------

_OPEN = r"[\s(\[{<*_\"'`“‘（【:：]{0,8}"  # bounded: a model that repeats itself must not make matching slow
_WORD = r"(?:option|choice|letter|answer)?"
_TAIL = r"(?![A-Za-z0-9])"
_STATED = re.compile(  # "the answer is (B)", "Correct option: **B**", "答案是B"
    rf"(?:\b(?:answer|option|choice)\b(?:\s+to\s+[^.:\n]{{0,80}}?)?\s*\**\s*(?:is|:|：|=|should be|would be|must be)|答案\s*(?:是|为|選|选|应为|:|：)?|答え\s*は)"
    rf"{_OPEN}(?:the\s+|most likely\s+|clearly\s+)?{_OPEN}(?i:{_WORD}){_OPEN}(?-i:([A-Z])){_TAIL}",
    re.I,
)
_BOXED = re.compile(r"\\boxed\s*\{\s*(?:\\text\s*\{)?\s*\(?([A-Za-z])\)?\s*\}")
_JUDGED = re.compile(  # "B is correct", "option (B) is the best answer"
    r"(?<![A-Za-z0-9])[(\[*]*(?-i:([A-Z]))[)\]*]*(?:[.:]\s*[^.\n]{0,60}?)?\s+(?:is|would be|must be|seems)\s+(?:the\s+|most\s+)*(?:correct|right|best|true|answer|appropriate|accurate)\b",
    re.I,
)
_CHOSEN = re.compile(
    rf"(?:\b(?:choose|select|pick|go with|option|choice)\b|选择?|選ぶ){_OPEN}(?i:{_WORD}){_OPEN}(?-i:([A-Z])){_TAIL}",
    re.I,
)
_LINE_MARK = re.compile(r"(?m)^[\s(\[*_\"'`]{0,8}([A-Za-z])[*_\"'`]*\s*[.):：、\]]")


def extract_choice(answer: str, options: Mapping[str, str]) -> str | None:
    """The option letter that a free text chooses, or None when it chooses none or several.

    Read in this order, the first that speaks wins: the whole text is a letter; "the answer is B", \\boxed{B}; "B is
    correct"; "choose B", "option B"; the text opens with "B." or "(B)"; the whole text is one option's text; one
    lonely capital letter; one option's text inside the answer. `options`: letter -> text, in order.
    """
    text = final_text(answer)
    letters = {letter.upper() for letter in options}

    def article(match_end: int, letter: str) -> bool:  # "A dog", "I think": a word of the sentence
        return (
            letter in "AI"
            and re.match(r"\s+(?!(?:and|or|is|was|as|because|since)\b)(?:[a-z]|[A-Z][a-z])", text[match_end:])
            is not None
        )

    bare = re.fullmatch(
        rf"{_OPEN}(?:(?i:option|choice|answer){_OPEN})?([A-Za-z])[\s.)\]}}>*_,;:\"'`”’）】。、]*", text
    )
    if bare and bare[1].upper() in letters:
        return bare[1].upper()
    words = re.findall(r"\w+", text)
    if words and all((len(w) == 1 and w.isupper()) or w in ("and", "or") for w in words):
        found = set(words) & letters  # "A, B", "A or C": several choices are none
        return found.pop() if len(found) == 1 else None

    for pattern in (_STATED, _BOXED, _JUDGED, _CHOSEN):
        matches = [
            m
            for m in pattern.finditer(text)
            if m[1].upper() in letters and not (pattern is not _BOXED and article(m.end(1), m[1]))
        ]
        if pattern is _JUDGED:
            matches = [
                m
                for m in matches
                if not re.search(r"\b(?:not|n't|in)\s*$", text[: m.start()]) and "not" not in m[0].split()
            ]
        named = [m[1].upper() for m in matches]
        if pattern is _CHOSEN and len(set(named)) > 1:
            continue  # "option A ... option C": a comparison, not a choice
        if named:
            return named[-1]  # the last word counts: models correct themselves

    marks = [m[1].upper() for m in _LINE_MARK.finditer(text) if m[1].upper() in letters]
    opening = _LINE_MARK.match(text)
    if (
        opening
        and opening[1].upper() in letters
        and len(set(marks)) == 1
        and not article(opening.end(1), opening[1])
    ):
        return opening[1].upper()

    clean = normalise(text)
    texts = {letter.upper(): normalise(value) for letter, value in options.items() if normalise(str(value))}
    same = [letter for letter, value in texts.items() if value == clean]
    if len(same) == 1:
        return same[0]

    lonely = {
        m[1]
        for m in re.finditer(r"(?<![A-Za-z0-9'’.])([A-Z])(?![A-Za-z0-9'’])", text)
        if m[1] in letters and not article(m.end(1), m[1])
    }
    if len(lonely) == 1:
        return lonely.pop()
    if lonely:
        return None
    inside = [letter for letter, value in texts.items() if _within(value, clean)]
    # an option that is part of another one inside the answer ("5" in "5 cm") was not itself chosen
    inside = [
        a for a in inside if not any(a != b and texts[a] != texts[b] and texts[a] in texts[b] for b in inside)
    ]
    return inside[0] if len(inside) == 1 else None


def choice(answer: str, expected: Sequence[str], options: Mapping[str, str]) -> Score:
    """1 when the chosen letter is the expected one; `expected` holds a letter, or the text of an option."""
    letter = extract_choice(answer, options)
    wanted = set()
    for text in expected:
        key = text.strip().strip("().").upper()
        if key in {k.upper() for k in options}:
            wanted.add(key)
        else:
            wanted |= {k.upper() for k, value in options.items() if normalise(str(value)) == normalise(text)}
    return Score(float(letter in wanted), letter or "", letter is not None)


# --- open questions ----------------------------------------------------------------------------------------------

_CONCLUDES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ", "= ")
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|[-+]?\.\d+")


def _comparable(text: str) -> list[str | float]:
    value = number(text)
    if value is not None and "%" not in text:
        return [round(value, 2)]
    text = " ".join(text.lower().strip(" .,:;\"'").split())
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def open_answer(answer: str, expected: Sequence[str], options: Mapping[str, str]) -> Score:
    """MMMU's rule for open questions (Yue et al. 2024, the paper's released evaluation).

    The conclusions of the answer (what follows "is", "thus", "answer", "=" ... in each sentence) and the numbers in
    them are compared: a text is right when it contains an expected text, a number when it is equal after rounding to
    two decimals.
    """
    text = final_text(answer).strip().rstrip(".").lower()
    sentences = [s.strip() for s in re.split(r"\.\s|\n", text) if s.strip()]
    keys = []
    for sentence in sentences:
        ends = [sentence.rpartition(word)[2].strip() for word in _CONCLUDES if word in sentence]
        ends = [e for e in ends if e.strip(" :,.!?;'\"")]
        if ends:
            keys.append(min(ends, key=len))
    keys = keys or [text]
    said: list[str | float] = []
    for key in keys:
        said += _comparable(key)
        said += [round(float(n.replace(",", "")), 2) for n in _NUMBER.findall(key)]
    wanted = [value for e in expected for value in _comparable(e)]
    right = any(
        (w == s) if isinstance(s, float) or isinstance(w, float) else (bool(w.strip()) and w in s)
        for s in said
        for w in wanted
    )  # fmt: skip
    return Score(float(right), "; ".join(keys), bool(text))


def choice_or_open(answer: str, expected: Sequence[str], options: Mapping[str, str]) -> Score:
    """`choice` for questions with options, `open` for those without (MMMU mixes both)."""
    return (choice if options else open_answer)(answer, expected, options)


def likelihood(answer: str, expected: Sequence[str], options: Mapping[str, str]) -> Score:
    """1 when the option that the model found likeliest (`answer`: its letter or its text) is the expected one."""

    def letters(text: str) -> set[str]:
        same = {k.upper() for k, value in options.items() if normalise(str(value)) == normalise(text)}
        return same or {text.strip().upper()} & {k.upper() for k in options}

    return Score(float(any(letters(answer) & letters(e) for e in expected)), answer)


METRICS: Mapping[str, Metric] = {
    "exact": exact,
    "contains": contains,
    "anls": anls,
    "relaxed": relaxed,
    "choice": choice,
    "open": open_answer,
    "choice_or_open": choice_or_open,
    "likelihood": likelihood,
}


def as_list(value: object) -> list[str]:
    """A cell that may hold several texts -> list: a list, the text of one ("['a', 'b']"), or one text."""
    if value is None:
        return []
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    text = _plain(value)
    if text.startswith("[") and text.endswith("]"):
        try:
            parsed = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return [text]
        if isinstance(parsed, (list, tuple)):
            return [_plain(v) for v in parsed]
    return [text]


def _plain(value: object) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return value if isinstance(value, str) else str(value)
