"""Error rates against examples worked by hand, and normalisers against transformers' own."""

from __future__ import annotations

import random
from functools import cache

import pytest

from polymodal.evaluate.word_errors import (
    Errors,
    character_errors,
    edit_distance,
    normaliser,
    word_errors,
)


def recursive(a, b) -> int:
    """Levenshtein distance by its definition."""

    @cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        substituted = distance(i - 1, j - 1) + (a[i - 1] != b[j - 1])
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, substituted)

    return distance(len(a), len(b))


def test_the_distance_is_that_of_its_definition():
    pairs = [("kitten", "sitting"), ("", "abc"), ("abc", "abc"), ("flaw", "lawn"), ("ab", "ba"), ("", "")]
    draw = random.Random(0)
    pairs += [tuple("".join(draw.choices("abcd", k=draw.randint(0, 12))) for _ in "ab") for _ in range(200)]
    for a, b in pairs:
        assert edit_distance(a, b) == edit_distance(b, a) == recursive(a, b), (a, b)
    assert edit_distance(["the", "cat", "sat"], ["the", "cats", "sat", "down"]) == 2


@pytest.mark.parametrize(
    "answer, expected, words, characters",
    [
        ("the cat sat", "the cat sat", Errors(0, 3), Errors(0, 9)),
        ("the cat sat", "the cat sat down", Errors(1, 4), Errors(4, 13)),  # a word was left out
        ("the the cat", "the cat", Errors(1, 2), Errors(3, 6)),  # and one inserted
        ("the bat sat", "the cat sat", Errors(1, 3), Errors(1, 9)),  # and one replaced
        ("a b c d", "e", Errors(4, 1), Errors(4, 1)),  # a rate of 400 %
        ("", "two words", Errors(2, 2), Errors(8, 8)),
        ("in side", "inside", Errors(2, 1), Errors(0, 6)),  # spaces are no characters
        ("", "", Errors(0, 0), Errors(0, 0)),
        ("x", "", Errors(1, 0), Errors(1, 0)),
    ],
)
def test_errors_of_a_text(answer, expected, words, characters):
    assert word_errors(answer, expected) == words and character_errors(answer, expected) == characters


def test_a_corpus_is_one_long_text():
    """Not the mean of the texts' rates, which is (0 + 1) / 2 here."""
    errors = word_errors("one two three four five six seven", "one two three four five six seven")
    errors += word_errors("nine", "eight")
    assert errors == Errors(1, 8) and errors.rate == 0.125
    assert Errors().rate == 0.0 and Errors(1, 0).rate == 1.0 and Errors(4, 1).rate == 4.0


@pytest.mark.parametrize(
    "text, english, basic",
    [
        (
            "Mr. Smith's twenty-five dollars, um, won't!",
            "mister smith is $25 will not",
            "mr smith s twenty five dollars um won t",
        ),
        ("The COLOUR [noise] (laughs) is grey.", "the color is gray", "the colour is grey"),
        ("Good morning.", "good morning", "good morning"),
    ],
)
def test_what_does_not_count(text, english, basic):
    from transformers.models.whisper import english_normalizer as library

    spelling = {"colour": "color", "grey": "gray"}
    theirs = library.EnglishTextNormalizer(spelling), library.BasicTextNormalizer()
    for choice, language, expected, their in (
        ("auto", "en", english, theirs[0]),
        ("english", "de", english, theirs[0]),
        ("auto", "de", basic, theirs[1]),
        ("basic", "en", basic, theirs[1]),
    ):
        made = " ".join(normaliser(choice, language, spelling, False)(text).split())
        assert made == expected == " ".join(their(text).split())
    assert normaliser("none", "en", spelling, False)(text) == text


def test_languages_without_spaces_count_characters():
    normal = normaliser("auto", "zh", None, True)
    answer, expected = normal("你好世畀"), normal("你好，世界。")
    assert word_errors(answer, expected) == character_errors(answer, expected) == Errors(1, 4)


def test_the_same_text_in_another_spelling_has_no_errors():
    normal = normaliser("auto", "en", {"organise": "organize"}, False)
    answer = "He's going to organise it for $20, okay?"
    expected = "he is going to organize it for twenty dollars okay"
    assert word_errors(normal(answer), normal(expected)).rate == 0
