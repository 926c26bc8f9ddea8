"""How an answer is judged, and how a choice is read from free text.

A metric is a function of (answer, expected answers, options) in METRICS; a benchmark only names one.
"""

from __future__ import annotations

import ast
import functools
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from polymodal.data import boxes
from polymodal.evaluate.word_errors import edit_distance


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
    """The answer without reasoning: after the last <think> block, or inside <answer>...</answer>."""
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
    """1 when an expected text occurs in the answer as whole words (a substring in scripts without spaces)."""
    got = normalise(final_text(answer))
    return Score(float(any(_within(normalise(e), got) for e in expected if normalise(e))), got)


def _within(needle: str, text: str) -> bool:
    """Whether `needle` stands in `text` between word borders; for digits, 5 is not in 3.5 and 5,000."""
    first, last = needle[0], needle[-1]
    left = r"(?<!\w)" if first.isascii() and first.isalnum() or first.isdigit() else ""
    right = r"(?!\w)" if last.isascii() and last.isalnum() or last.isdigit() else ""
    left += r"(?<!\d[.,])" if first.isdigit() else ""
    right += r"(?![.,]\d)" if last.isdigit() else ""
    return re.search(left + re.escape(needle) + right, text) is not None


def anls(answer: str, expected: Sequence[str], options: Mapping[str, str], threshold: float = 0.5) -> Score:
    """Average normalised Levenshtein similarity, one question's part (Biten et al. 2019, Scene Text VQA, eq.
    1).

    max over expected texts of 1 - d, where d = edit distance / longer length; 0 when d >= threshold. Case and
    spacing are ignored.
    """

    def clean(text: str) -> str:
        return " ".join(text.lower().split())

    got, best = clean(final_text(answer)), 0.0
    for text in map(clean, expected):
        distance = edit_distance(got, text) / max(len(got), len(text), 1)
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

    A number whose expected value is 0 must be equal, for 5 % of 0 is 0. A percent sign divides by 100.
    """
    got = normalise(final_text(answer))
    value = number(got)

    def right(text: str) -> bool:
        target = number(text)
        if value is None or target is None:
            return got == text
        return abs(value - target) <= tolerance * abs(target)

    return Score(float(any(right(normalise(text)) for text in expected)), got)


# --- choices --------------------------------------------------------------------------------------

_OPEN = r"[\s(\[{<*_\"'`“‘（【:：]{0,8}"  # bounded: matching stays quick on a model that repeats itself
_WORD = r"(?i:option|choice|letter|answer)?"
_LETTER = r"(?-i:([A-Z]))(?![A-Za-z0-9])"
_STATED = re.compile(  # "the answer is (B)", "Correct option: **B**", "答案是B"
    r"(?:\b(?:answer|option|choice)\b(?:\s+to\s+[^.:\n]{0,80}?)?\s*\**\s*"
    r"(?:is|:|：|=|should be|would be|must be)|答案\s*(?:是|为|選|选|应为|:|：)?|答え\s*は)"
    rf"{_OPEN}(?:the\s+|most likely\s+|clearly\s+)?{_OPEN}{_WORD}{_OPEN}{_LETTER}",
    re.I,
)
_BOXED = re.compile(r"\\boxed\s*\{\s*(?:\\text\s*\{)?\s*\(?([A-Za-z])\)?\s*\}")
_JUDGED = re.compile(  # "B is correct", "option (B) is the best answer"
    r"(?<![A-Za-z0-9])[(\[*]*(?-i:([A-Z]))[)\]*]*(?:[.:]\s*[^.\n]{0,60}?)?\s+"
    r"(?:is|would be|must be|seems)\s+(?:the\s+|most\s+)*"
    r"(?:correct|right|best|true|answer|appropriate|accurate)\b",
    re.I,
)
_CHOSEN = re.compile(
    r"(?:\b(?:choose|select|pick|go with|option|choice)\b|选择?|選ぶ)"
    rf"{_OPEN}{_WORD}{_OPEN}{_LETTER}",
    re.I,
)
_BARE = re.compile(rf"{_OPEN}(?:(?i:option|choice|answer){_OPEN})?([A-Za-z])[\s.)\]}}>*_,;:\"'`”’）】。、]*")
_LINE_MARK = re.compile(r"(?m)^[\s(\[*_\"'`]{0,8}([A-Za-z])[*_\"'`]*\s*[.):：、\]]")
_ALONE = re.compile(r"(?<![A-Za-z0-9'’.])([A-Z])(?![A-Za-z0-9'’])")
_SENTENCE = re.compile(r"\s+(?!(?:and|or|is|was|as|because|since)\b)(?:[a-z]|[A-Z][a-z])")


def extract_choice(answer: str, options: Mapping[str, str]) -> str | None:
    """The option letter that a free text chooses, or None when it chooses none or several.

    The first of these that finds one decides: the whole text is a letter; "the answer is B", \\boxed{B}; "B
    is correct"; "choose B", "option B"; the text opens with "B." or "(B)"; the whole text is one option's
    text; one single capital letter; one option's text inside the answer. `options`: letter -> text, in order.
    """
    text = final_text(answer)
    letters = {letter.upper() for letter in options}

    def named(match: re.Match) -> bool:
        """Whether the match names an option, and is no word of the sentence: "A dog", "I think"."""
        word = match[1] in "AI" and _SENTENCE.match(text[match.end(1) :]) is not None
        return match[1].upper() in letters and not word

    bare = _BARE.fullmatch(text)
    if bare and bare[1].upper() in letters:
        return bare[1].upper()
    words = re.findall(r"\w+", text)
    if words and all((len(w) == 1 and w.isupper()) or w in ("and", "or") for w in words):
        return _only(set(words) & letters)  # "A, B", "A or C": several choices are none

    boxed = [m[1].upper() for m in _BOXED.finditer(text) if m[1].upper() in letters]
    stated = [m[1].upper() for m in _STATED.finditer(text) if named(m)]
    judged = [m[1].upper() for m in _JUDGED.finditer(text) if named(m) and not _negated(m)]
    chosen = [m[1].upper() for m in _CHOSEN.finditer(text) if named(m)]
    if len(set(chosen)) > 1:
        chosen = []  # "option A ... option C": a comparison, not a choice
    for letters_named in (stated, boxed, judged, chosen):
        if letters_named:
            return letters_named[-1]  # the last word counts: models correct themselves

    opening = _LINE_MARK.match(text)
    marks = {m[1].upper() for m in _LINE_MARK.finditer(text)} & letters
    if opening and named(opening) and len(marks) == 1:
        return opening[1].upper()

    clean = normalise(text)
    texts = {letter.upper(): normalise(str(value)) for letter, value in options.items()}
    texts = {letter: value for letter, value in texts.items() if value}
    same = _only({letter for letter, value in texts.items() if value == clean})
    if same:
        return same
    alone = {m[1] for m in _ALONE.finditer(text) if m[1] in letters and named(m)}
    if alone:
        return _only(alone)
    inside = {letter for letter, value in texts.items() if _within(value, clean)}
    # an option that is part of another one inside the answer ("5" in "5 cm") was not itself chosen
    parts = {a for a in inside for b in inside if texts[a] != texts[b] and texts[a] in texts[b]}
    return _only(inside - parts)


def _only(letters: set[str]) -> str | None:
    return next(iter(letters)) if len(letters) == 1 else None


def _negated(match: re.Match) -> bool:
    before = match.string[: match.start()]
    return re.search(r"\b(?:not|n't|in)\s*$", before) is not None or "not" in match[0].split()


def _letters(text: str, options: Mapping[str, str]) -> set[str]:
    """Letters of the options that have this text."""
    return {k.upper() for k, value in options.items() if normalise(str(value)) == normalise(text)}


def choice(answer: str, expected: Sequence[str], options: Mapping[str, str]) -> Score:
    """1 when the chosen letter is the expected one; `expected` holds a letter, or the text of an option."""
    letter = extract_choice(answer, options)
    right: set[str] = set()
    for text in expected:
        key = text.strip().strip("().").upper()
        right |= {key} if key in {k.upper() for k in options} else _letters(text, options)
    return Score(float(letter in right), letter or "", letter is not None)


# --- open questions -------------------------------------------------------------------------------

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

    The conclusions of the answer (what follows "is", "thus", "answer", "=" ... in each sentence) and the
    numbers in them are compared: a text is right when it contains an expected text, a number when it is equal
    after rounding to two decimals.
    """
    text = final_text(answer).strip().rstrip(".").lower()
    conclusions = []
    for sentence in (s.strip() for s in re.split(r"\.\s|\n", text)):
        ends = [sentence.rpartition(word)[2].strip() for word in _CONCLUDES if word in sentence]
        ends = [end for end in ends if end.strip(" :,.!?;'\"")]
        if ends:
            conclusions.append(min(ends, key=len))
    conclusions = conclusions or [text]
    values: list[str | float] = []
    for conclusion in conclusions:
        values += _comparable(conclusion)
        values += [round(float(n.replace(",", "")), 2) for n in _NUMBER.findall(conclusion)]

    def right(expected: str | float) -> bool:
        if isinstance(expected, float):
            return expected in values
        return bool(expected.strip()) and any(isinstance(v, str) and expected in v for v in values)

    correct = any(right(value) for text in expected for value in _comparable(text))
    return Score(float(correct), "; ".join(conclusions), bool(text))


def choice_or_open(answer: str, expected: Sequence[str], options: Mapping[str, str]) -> Score:
    """`choice` for questions with options, `open` for those without (MMMU mixes both)."""
    return (choice if options else open_answer)(answer, expected, options)


# --- rules of single benchmarks -------------------------------------------------------------------


def yes_no(answer: str, expected: Sequence[str], options: Mapping[str, str]) -> Score:
    """1 when the answer says the expected one of yes and no; with both or neither of them it says none."""
    words = set(re.findall(r"[a-z]+", final_text(answer).lower()))
    said = {"yes", "no"} & words
    got = said.pop() if len(said) == 1 else ""
    right = {"yes" if text.strip().lower() in ("yes", "1", "true") else "no" for text in expected}
    return Score(float(got in right), got, bool(got))


def substring(answer: str, expected: Sequence[str], options: Mapping[str, str]) -> Score:
    """1 when an expected text stands anywhere in the answer, whatever the case (OCRBench's rule).

    An expected formula, which has a backslash, is compared without spaces and with its case.
    """
    got = final_text(answer).replace("\n", " ").strip()

    def right(text: str) -> bool:
        if "\\" in text:
            return "".join(text.split()) in "".join(got.split())
        return text.strip().replace("\n", " ").lower() in got.lower()

    return Score(float(any(right(text) for text in expected if text.strip())), got)


_ARTICLES = {"a", "an", "the"}
_DIGITS = dict(
    zip(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"],
        map(str, range(11)),
        strict=True,
    )
)


def _vqa_words(text: str) -> str:
    """Text for comparison as VQA does it: lower case, no punctuation, articles or apostrophes, numbers as
    digits."""
    text = re.sub(r"[\n\t]", " ", text.lower()).strip().replace("'", "")
    text = re.sub(r"(?<=\d),(?=\d)", "", text)
    text = re.sub(r"(?!(?<=\d)\.(?=\d))[^\w\s$%:-]", " ", text).replace("none", "0")
    words = [_DIGITS.get(word, word) for word in text.split() if word not in _ARTICLES]
    return " ".join(words)


def vqa(answer: str, expected: Sequence[str], options: Mapping[str, str]) -> Score:
    """VQA accuracy (Antol et al. 2015, sec. 4): mean over the people of min(1, others who said it / 3).

    Fewer than ten answers: the same over those there are; one alone must be equal.
    """
    got, given = _vqa_words(final_text(answer)), [_vqa_words(text) for text in expected]
    if len(given) < 2:
        return Score(float(got in given), got)
    shares = [
        min(1.0, sum(given[j] == got for j in range(len(given)) if j != i) / 3) for i in range(len(given))
    ]
    return Score(sum(shares) / len(shares) if shares else 0.0, got)


def typed(answer: str, expected: Sequence[str], options: Mapping[str, str]) -> Score:
    """MathVista's answers: a choice where there are options; else the last number, rounded to the decimals
    of the expected one; a list, or a text, must be equal."""
    if options:
        return choice(answer, expected, options)
    text = final_text(answer)
    numbers = [n.replace(",", "") for n in _NUMBER.findall(text)]
    for wanted in expected:
        if re.fullmatch(r"[-+]?\d+(\.\d+)?", wanted.strip()):
            places = len(wanted.partition(".")[2].strip())
            got = f"{float(numbers[-1]):.{places}f}" if numbers else ""
            return Score(float(bool(got) and float(got) == float(wanted)), got, bool(numbers))
    return exact(answer, expected, options)


def choice_or_exact(answer: str, expected: Sequence[str], options: Mapping[str, str]) -> Score:
    """`choice` for questions with options, `exact` for those without."""
    return (choice if options else exact)(answer, expected, options)


def likelihood(answer: str, expected: Sequence[str], options: Mapping[str, str]) -> Score:
    """1 when the likeliest option (`answer`: its letter or its text) is the expected one."""

    def letters(text: str) -> set[str]:
        return _letters(text, options) or {text.strip().upper()} & {k.upper() for k in options}

    return Score(float(any(letters(answer) & letters(text) for text in expected)), answer)


def overlap(
    answer: str, expected: Sequence[str], options: Mapping[str, str], threshold: float | None = None
) -> Score:
    """Mean intersection over union of boxes in pixels; with a threshold the share of them that reach it.

    Each expected box is compared with one of the answer's, the best pairs first; one too many or too few
    counts 0. With one of each this is a RefCOCO question's part (accuracy at 0.5).
    """
    found, wanted = boxes.numbers(answer), [box for text in expected for box in boxes.numbers(text)]
    pairs = sorted(
        ((boxes.iou(a, b), i, k) for i, a in enumerate(found) for k, b in enumerate(wanted)), reverse=True
    )
    total, used = 0.0, (set[int](), set[int]())
    for value, i, k in pairs:
        if i not in used[0] and k not in used[1]:
            used[0].add(i)
            used[1].add(k)
            total += value if threshold is None else value >= threshold
    count = max(len(found), len(wanted))
    return Score(total / count if count else 1.0, answer, bool(found) or not wanted)


BOX_METRICS: Mapping[str, Metric] = {"iou": overlap, "iou@0.5": functools.partial(overlap, threshold=0.5)}
"""Compare boxes in pixels of the picture, which the texts of answers are read into first."""
METRICS: Mapping[str, Metric] = {
    **BOX_METRICS,
    "exact": exact,
    "contains": contains,
    "anls": anls,
    "relaxed": relaxed,
    "choice": choice,
    "open": open_answer,
    "choice_or_open": choice_or_open,
    "choice_or_exact": choice_or_exact,
    "yes_no": yes_no,
    "substring": substring,
    "vqa": vqa,
    "typed": typed,
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
