"""Boxes through any size that a model sees: there and back, order, and independence of the scale."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from polymodal.core.sample import Box, Media
from polymodal.data.boxes import BoxFormat, BoxWriter, fractions, iou, numbers, pixels
from polymodal.models import catalog
from polymodal.models.understanding.qwen_vl_media import smart_resize
from tests.models import tiny

FORMS = {name: card.boxes for name, card in catalog.cards().items() if card.boxes is not None}
GRID = BoxFormat(1024, "<loc{y1:04d}><loc{x1:04d}><loc{y2:04d}><loc{x2:04d}>", "", largest=1023)
PARTS = BoxFormat(1.0, "[{x1}, {y1}, {x2}, {y2}]", "[{x1}, {y1}]", digits=3)
SIDES = st.integers(8, 3000)
quick = settings(max_examples=150, deadline=None, derandomize=True)
processor = tiny.processors("qwen2.5-vl")[0]


def resized(height, width):
    return smart_resize(processor, height, width, 64, 1 << 20)


def size_and_box(draw):
    height = draw(SIDES)
    width = draw(st.integers(max(8, height // 100), min(3000, height * 100)))
    xs = sorted(draw(st.tuples(*[st.floats(0, width, allow_subnormal=False)] * 2)))
    ys = sorted(draw(st.tuples(*[st.floats(0, height, allow_subnormal=False)] * 2)))
    return height, width, (xs[0], ys[0], xs[1], ys[1])


CASES = st.composite(size_and_box)()


def shares(values, height, width):
    return tuple(v / s for v, s in zip(values, (width, height) * 2, strict=True))


@quick
@given(CASES, st.sampled_from(sorted(FORMS)))
def test_there_and_back_is_off_by_half_a_unit_of_the_model(case, name):
    """In each coordinate: one unit where the last pixel is the end, else half; and a tenth of a pixel."""
    height, width, values = case
    form, writer = FORMS[name], BoxWriter(FORMS[name], resized)
    seen = resized(height, width)
    made = form.values(shares(values, height, width), *seen)
    (back,) = writer.found(form.coordinates(made), height, width)
    for before, after, size, there in zip(values, back, (width, height) * 2, seen[::-1] * 2, strict=True):
        unit = size / (form.scale or there)
        assert abs(before - after) <= (0.5 if form.scale else 1) * unit + 0.06


@quick
@given(CASES, st.sampled_from([*FORMS.values(), GRID, PARTS]))
def test_corners_keep_their_order_and_stay_inside(case, form):
    height, width, values = case
    seen = resized(height, width)
    x1, y1, x2, y2 = form.values(shares(values, height, width), *seen)
    limits = [form.largest or form.scale or side - 1 for side in seen[::-1]]
    assert 0 <= x1 <= x2 <= limits[0] and 0 <= y1 <= y2 <= limits[1]


@quick
@given(CASES, st.integers(2, 5), st.sampled_from(sorted(n for n in FORMS if FORMS[n].scale)))
def test_relative_coordinates_do_not_depend_on_the_picture_s_scale(case, factor, name):
    height, width, values = case
    larger = tuple(v * factor for v in values)
    medium = Media("image", "a.png")
    one = fractions(Box((*map(round, values),), medium, at="b"), height, width)
    many = fractions(
        Box(tuple(round(v) * factor for v in values), medium, at="b"), height * factor, width * factor
    )
    assert FORMS[name].values(one, *resized(height, width)) == FORMS[name].values(many, 8, 8)
    assert len(larger) == 4


@quick
@given(CASES, st.sampled_from(["real", "norm1", "norm1000"]))
def test_a_box_has_the_same_pixels_however_it_is_declared(case, kind):
    height, width, values = case
    scale = {"real": None, "norm1": 1.0, "norm1000": 1000.0}[kind]
    own = tuple(round(v) + 0.0 for v in values)
    given_ = (
        own if scale is None else tuple(v / s * scale for v, s in zip(own, (width, height) * 2, strict=True))
    )
    found = pixels(Box(given_, Media("image", "a.png"), scale), height, width)
    assert all(abs(a - b) < 0.11 for a, b in zip(found, own, strict=True))


@quick
@given(CASES, CASES)
def test_overlap_is_symmetric_and_between_0_and_1(first, second):
    a, b = first[2], second[2]
    assert iou(a, b) == iou(b, a) and 0 <= iou(a, b) <= 1 + 1e-9
    assert iou(a, a) == 1


@quick
@given(st.text(alphabet="[]()0123456789,. -{}\"'box=|>point_2d\n", max_size=200))
def test_any_answer_is_read_without_a_fault(text):
    writer = BoxWriter(FORMS["qwen2.5-vl"], resized)
    for values in writer.found(text, 100, 200):
        assert len(values) in (2, 4) and all(v >= 0 for v in values)
    assert all(len(values) in (2, 4) for values in numbers(text))
