"""Words for people: known names that a wrong one was meant to be, numbers and sizes."""

from __future__ import annotations

import pytest

from polymodal.core.text import did_you_mean, format_bytes, format_count, nearest


def test_the_nearest_name_comes_first_and_case_does_not_count():
    assert nearest("FLASH", ["sdpa", "flash_attention", "Flash2"], most=2) == ["Flash2"]
    assert nearest("weigth", ["weights", "height", "bias"], most=3) == ["weights", "height"]
    assert nearest("x", ["weights"]) == [] and nearest("", ["weights"]) == []


def test_a_hint_names_the_nearest_or_what_there_is():
    assert did_you_mean("slrum", ("slurm", "torchrun")) == "Did you mean slurm?"
    assert did_you_mean("zzz", iter(("slurm", "torchrun"))) == "Known: slurm, torchrun."
    assert (
        did_you_mean("zzz", ("slurm",), "Leave it out.") == "Leave it out."
        and did_you_mean("z", ("a",), "") == ""
    )


@pytest.mark.parametrize(
    "number, text",
    [(0, "0"), (9_999, "9,999"), (10_000, "10 k"), (1_234_567, "1.23 M"), (7.6e9, "7.6 B"), (-2e6, "-2 M")],
)
def test_counts(number, text):
    assert format_count(number) == text


@pytest.mark.parametrize(
    "number, text",
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB"), (5 << 40, "5.0 TiB")],
)
def test_bytes(number, text):
    assert format_bytes(number) == text
