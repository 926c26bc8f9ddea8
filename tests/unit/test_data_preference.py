"""Rows that compare answers, in every documented form; pairs by rule; samples whose sequences do not see each other."""

from __future__ import annotations

import json

import pytest

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Media, pack, unpack
from polymodal.data.formats import RowReader
from polymodal.data.preference import Mismatched, PreferenceProcessor, ranked_pairs
from polymodal.data.source import open_corpus
from polymodal.models import catalog
from polymodal.recipe import Attr, Data, Dataset, Model, Preference
from tests.models import tiny
from tests.parallel.preferences import rows

USER, GOOD, BAD = "What is it?", "A three.", "A nine."


def turn(role: str, text: str, sharegpt: bool = False) -> dict:
    return {"from": role, "value": text} if sharegpt else {"role": role, "content": text}


def read(row: dict, **attr):
    return RowReader("preference", Attr(**attr), "rows.json", None).record(row, "rows.json, line 1")


def said(record) -> list[list[tuple[str, str, float | None]]]:
    """Of each conversation its turns: role, text (pictures as *), weight."""
    out = []
    for each in record.conversations:
        text = lambda m: "".join("*" if isinstance(p, Media) else p for p in m.content)  # noqa: E731
        out.append([(m.role, text(m), m.weight) for m in each.messages])
    return out


def compared(*answers: str, user: str = USER) -> list[list[tuple[str, str, float]]]:
    return [[("user", user, 0.0), ("assistant", answer, 1.0)] for answer in answers]


VLFEEDBACK = [
    {"response": BAD, "annotations": {"Helpfulness": {"Rating": "2"}, "Visual Faithfulness": {"Rating": "1"}}},
    {"response": GOOD, "annotations": {"Helpfulness": {"Rating": "5"}, "Visual Faithfulness": {"Rating": "N/A"}}},
    {"response": "?", "annotations": {"Helpfulness": {"Rating": "N/A"}}},
]  # fmt: skip
FORMS = {
    "TRL, turns": {"prompt": [turn("user", USER)], "chosen": [turn("assistant", GOOD)], "rejected": [turn("assistant", BAD)]},
    "TRL, texts": {"prompt": USER, "chosen": GOOD, "rejected": BAD},
    "TRL, prompt inside": {"chosen": [turn("user", USER), turn("assistant", GOOD)], "rejected": [turn("user", USER), turn("assistant", BAD)]},
    "ShareGPT": {"conversations": [turn("human", USER, True)], "chosen": turn("gpt", GOOD, True), "rejected": turn("gpt", BAD, True)},
    "messages": {"messages": [turn("user", USER)], "chosen": turn("assistant", GOOD), "rejected": turn("assistant", BAD)},
    "Alpaca": {"instruction": USER, "input": "", "chosen": GOOD, "rejected": BAD},
    "ms-swift": {"messages": [turn("user", USER), turn("assistant", GOOD)], "rejected_response": BAD},
    "ms-swift, messages": {"messages": [turn("user", USER), turn("assistant", GOOD)], "rejected_messages": [turn("user", USER), turn("assistant", BAD)]},
    "RLHF-V": {"text": json.dumps({"question": USER, "chosen": GOOD, "rejected": BAD}), "idx": 3},
    "RLAIF-V": {"question": USER, "chosen": GOOD, "rejected": BAD, "idx": "3"},
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_a_pair_is_the_same_record(name):
    record = read(FORMS[name])
    assert said(record) == compared(GOOD, BAD)
    assert record.scores == () and not record.media
    with_picture = read({**FORMS[name], "image": "a.png"})
    assert said(with_picture) == compared(GOOD, BAD, user="*" + USER)


def test_scored_and_ranked_answers():
    record = read({"prompt": USER, "completions": VLFEEDBACK, "img_path": "a.png"})
    assert said(record) == compared(BAD, GOOD, user="*" + USER) and record.scores == (1.5, 5.0)
    columns = {key: [c[key] for c in VLFEEDBACK] for key in VLFEEDBACK[0]}
    assert read({"prompt": USER, "completions": columns}).scores == (1.5, 5.0)
    ranked = {"prompt": USER, "responses": [BAD, GOOD, "?"]}
    assert read(ranked).scores == ()
    assert read({**ranked, "scores": [1, 3, 2]}).scores == (1.0, 3.0, 2.0)
    assert read({**ranked, "ranks": [3, 1, 2]}).scores == (-3.0, -1.0, -2.0)
    assert said(read({"prompt": USER, "chosen": GOOD, "rejected": [BAD, "?"]})) == compared(GOOD, BAD, "?")
    with pytest.raises(PolymodalError, match="as many numbers as"):
        read({**ranked, "scores": [1]})


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [turn("user", USER)], "completion": [turn("assistant", GOOD)], "label": True},
        {"prompt": USER, "completion": GOOD, "label": True},
        {"conversations": [turn("human", USER, True), turn("gpt", GOOD, True)], "kto_tag": True},
        {"instruction": USER, "output": GOOD, "kto_tag": True},
        {"messages": [turn("user", USER), turn("assistant", GOOD)], "label": True},
    ],
)
def test_answers_with_a_label(row):
    key = "label" if "label" in row else "kto_tag"
    assert said(read(row)) == compared(GOOD) and read(row).scores == (1.0,)
    assert read({**row, key: False}).scores == (0.0,)


def test_rejected_pictures_belong_to_the_other_answer():
    row = {
        **FORMS["ms-swift, messages"],
        "images": ["a.png"],
        "rejected_images": ["b.png"],
    }
    record = read(row)
    assert [[m.source for m in each.media] for each in record.conversations] == [["a.png"], ["b.png"]]


def test_own_column_names():
    row = {"ask": USER, "win": GOOD, "lose": BAD}
    assert said(read(row, prompt="ask", chosen="win", rejected="lose")) == compared(GOOD, BAD)
    with pytest.raises(PolymodalError, match="compares no answers"):
        read(row)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"chosen": GOOD, "rejected": BAD}, "no prompt"),
        ({"messages": [turn("user", USER)], "rejected_response": BAD}, "does not end with an answer"),
        ({"prompt": USER, "completion": GOOD}, "compares no answers"),
        ({"text": "{a", "image": "a.png"}, "no JSON"),
        ({"prompt": USER, "completions": VLFEEDBACK[2:]}, "no answer with a rating"),
    ],
)
def test_what_cannot_be_compared_is_said(row, says):
    with pytest.raises(PolymodalError, match=says) as error:
        read(row)
    assert error.value.hint and "rows.json, line 1" in error.value.message


def test_pairs_by_rule():
    assert ranked_pairs(3, (), "best_worst") == ((0, 2, 2.0),)
    assert ranked_pairs(3, (), "adjacent") == ((0, 1, 1.0), (1, 2, 1.0))
    scores = (2.0, 5.0, 2.0, 3.0)
    assert ranked_pairs(4, scores, "best_worst") == ((1, 2, 3.0),)
    assert ranked_pairs(4, scores, "adjacent") == ((1, 3, 2.0), (3, 0, 1.0))
    assert set(ranked_pairs(4, scores, "all")) == {(1, 3, 2.0), (1, 0, 3.0), (1, 2, 3.0), (3, 0, 1.0), (3, 2, 1.0)}  # fmt: skip
    assert ranked_pairs(4, scores, "all", min_gap=2.5) == ((1, 0, 3.0), (1, 2, 3.0))
    assert ranked_pairs(2, (1.0, 1.0), "all") == ()


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """(corpus of pairs, corpus of labelled answers, the model's media processor)."""
    root = tmp_path_factory.mktemp("pairs")
    tiny.checkpoint("qwen2.5-vl", root / "model")
    found = []
    for unpaired in (False, True):
        file = root / f"{unpaired}.json"
        file.write_text(json.dumps(rows(root, 6, unpaired)))
        found.append(open_corpus([Dataset(path=str(file), format="preference")]))
    family = catalog.family(Model(source=str(root / "model"), init="random"))
    return *found, family.media_processor(Data())


def processor(media, unpaired=False, **settings) -> PreferenceProcessor:
    return PreferenceProcessor(media, Data(), Preference(**settings), unpaired)


def test_a_sample_holds_the_whole_comparison(corpora):
    corpus, _, media = corpora
    made = processor(media)
    samples = [made.sample(corpus[i], i) for i in range(4)]
    assert made.measure([corpus[i] for i in range(4)]) == [s.measure for s in samples]
    one = samples[1]
    assert one.shared and one.pairs == ((0, 1, 1.0),) and sum(one.sequences) == one.measure.tokens
    assert len(one.tensors["grid_thw" if "grid_thw" in one.tensors else "image_grid_thw"]) == 1
    ids = one.tensors["input_ids"].split(one.sequences)
    text = [media.tokenizer.decode(i[one.tensors["weights"].split(one.sequences)[n].roll(1) > 0]) for n, i in enumerate(ids)]  # fmt: skip
    assert text[0].startswith("It is 1, It is 1,") and text[1].startswith("A bar 1.")
    assert one.tensors["position_ids"][0].tolist() == [n for each in one.sequences for n in range(each)]
    batch = pack(samples)
    assert batch.segments["text"].diff().tolist() == [n for s in samples for n in s.sequences]
    for before, after in zip(samples, unpack(batch), strict=True):
        assert (after.sequences, after.pairs, after.shared) == (before.sequences, before.pairs, before.shared)
        assert all((after.tensors[n] == t).all() for n, t in before.tensors.items())


def test_labelled_answers_meet_the_next_rows_answer(corpora):
    _, corpus, media = corpora
    mismatched = Mismatched(corpus)
    assert said(mismatched[0])[1][-1] == said(corpus[1])[0][-1]
    assert said(mismatched[5])[1][-1] == said(corpus[0])[0][-1]
    sample = processor(media, True).sample(mismatched[1], 1)
    assert sample.pairs == ((0, 1, 1.0),) and len(sample.sequences) == 2
    with pytest.raises(PolymodalError, match="there is one answer"):
        processor(media).sample(corpus[0])
    with pytest.raises(PolymodalError, match="answers that are good or bad"):
        processor(media, True).sample(corpora[0][0])


def test_what_lengths_depend_on_is_in_the_fingerprint(corpora):
    media = corpora[2]
    prints = {
        processor(media, u, **s).fingerprint for u, s in ((False, {}), (True, {}), (False, {"pairs": "all"}))
    }
    assert len(prints) == 3
