"""Ids are the library's own, lengths need no pixels, long samples are cut where they may be."""

from __future__ import annotations

import html
import pickle
import re
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Media, Message, Record
from polymodal.data import media as files
from polymodal.data.counting import WordCounter
from polymodal.data.source import open_corpus
from polymodal.recipe import Dataset, Video
from tests.models import tiny
from tests.unit.media_fixtures import (
    TRIMMING,
    WHERE,
    image,
    record,
    refused,
    short,
    templated,
    write_rows,
)

CASES = {
    "text": lambda f: [("user", "What is in 图片?"), ("assistant", "It is a three.")],
    "system": lambda f: [
        ("system", "You are helpful."),
        ("user", "yes"),
        ("assistant", "no\n"),
        ("user", "\n no"),
        ("assistant", " yes"),
    ],
    "pictures": lambda f: [
        ("user", [image(f, 0), "first", image(f, 1), image(f, 2), " which?"]),
        ("assistant", "second"),
        ("user", ["this:", image(f, 0)]),
        ("assistant", "yes"),
    ],
    "video": lambda f: [
        ("user", [Media("video", str(f / "v.mp4")), "Describe the video."]),
        ("assistant", "no"),
    ],
    "both": lambda f: [
        ("user", ["a ", image(f, 1), Media("video", str(f / "v.mp4")), image(f, 2), "?"]),
        ("assistant", "It is a three."),
    ],
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
def test_ids_pixels_and_positions_are_the_librarys(qwen, folder, name, case):
    """Against the library's own processor, given the same decoded pictures and frames."""
    import transformers

    chat = qwen(name)
    row = record(*CASES[case](folder))
    ours = chat.sample(row).tensors
    conversation, images, videos, metadata = [], [], [], []
    for message in row.messages:
        parts = []
        for part in message.content:
            if isinstance(part, str):
                parts.append({"type": "text", "text": part})
                continue
            parts.append({"type": part.kind})
            if part.kind == "image":
                images.append(Image.open(part.source))
            else:
                header = files.video_header(part.source)
                clip = files.clip(header, Video())
                videos.append(
                    torch.from_numpy(files.video(part.source, header, clip.indices)).permute(0, 3, 1, 2)
                )
                metadata.append(
                    transformers.video_utils.VideoMetadata(
                        total_num_frames=header.frames,
                        fps=header.fps,
                        frames_indices=list(clip.indices),
                        height=header.height,
                        width=header.width,
                    )
                )
        conversation.append({"role": message.role, "content": parts})
    processor = tiny.processor(name)
    text = processor.apply_chat_template(conversation, tokenize=False)
    more = {"videos": videos, "video_metadata": metadata, "do_sample_frames": False} if videos else {}
    theirs = processor(text=[text], images=images or None, return_tensors="pt", **more)
    assert ours["input_ids"].tolist() == theirs["input_ids"][0].tolist()
    for kind, names in (
        ("image", ("pixel_values", "image_grid_thw")),
        ("video", ("pixel_values_videos", "video_grid_thw")),
    ):
        mine = [n for n, m in enumerate(row.media) if m.kind == kind]
        if mine:
            ends = ours["grid_thw"].prod(1).cumsum(0).tolist()
            starts = [0, *ends[:-1]]
            assert torch.equal(
                torch.cat([ours["pixel_values"][starts[n] : ends[n]] for n in mine]), theirs[names[0]]
            )
            assert torch.equal(ours["grid_thw"][mine], theirs[names[1]])
    config = tiny.config(name)
    model = getattr(
        transformers,
        {"qwen2-vl": "Qwen2VLModel", "qwen2.5-vl": "Qwen2_5_VLModel", "qwen3-vl": "Qwen3VLModel"}[name],
    )
    if row.media:
        holder = SimpleNamespace(config=config)
        holder.get_vision_position_ids = lambda *a, **k: model.get_vision_position_ids(holder, *a, **k)
        seconds = (
            {"second_per_grid_ts": theirs["second_per_grid_ts"]} if "second_per_grid_ts" in theirs else {}
        )
        expected, _ = model.get_rope_index(
            holder,
            theirs["input_ids"],
            theirs["mm_token_type_ids"],
            theirs.get("image_grid_thw"),
            theirs.get("video_grid_thw"),
            **seconds,
        )
        assert ours["position_ids"][1:].tolist() == expected[:, 0].tolist()
    assert ours["position_ids"][0].tolist() == list(range(len(ours["input_ids"])))


words = st.lists(st.sampled_from([*"ab \n\t<>|é中😀.,'7_", "im_end", "user", "<image>"]), max_size=10).map(
    "".join
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    turns=st.lists(st.tuples(words, words), min_size=1, max_size=3),
    system=st.none() | words,
    train_on=st.sampled_from(["assistant", "all", "last"]),
    weights=st.lists(st.sampled_from([None, 0.0, 0.5]), min_size=6, max_size=6),
    pictures=st.booleans(),
)
def test_measure_is_what_the_sample_turns_out_to_be(qwen, folder, turns, system, train_on, weights, pictures):
    talk = [("system", system, weights[0])] if system is not None else []
    for (question, answer), weight in zip(turns, weights, strict=False):
        talk += [
            ("user", [image(folder, 1), question] if pictures else question),
            ("assistant", answer, weight),
        ]
    row = record(*talk)
    chat = qwen(train_on=train_on)
    assert chat.measure([row, row]) == [chat.sample(row).measure] * 2
    layout = chat.template.layout(row, range(len(row.messages)))
    for message, span in zip(row.messages, layout.spans, strict=True):
        text = "".join(p for p in message.content if isinstance(p, str))
        assert span is not None and text in layout.text[slice(*span)]
        assert layout.text[slice(*span)].endswith("<|im_end|>")
    for i in range(len(row.messages)):  # one message alone, and all at once
        assert chat.template.layout(row, [i]).spans[i] == layout.spans[i]


texts = st.lists(
    st.sampled_from(
        [
            *"aB \n\t7é中!_-",
            "  ",
            "\r\n",
            "12",
            "...",
            "'s",
            "<|im_end|>",
            "word",
            " the",
            "\u00a0",
            "😀",
            "e\u0301",
        ]
    ),
    max_size=20,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=texts, cuts=st.lists(st.integers(0, 60), max_size=4))
def test_counting_by_words_is_the_tokenizers_count(qwen, pieces, cuts):
    text, counter = "".join(pieces), qwen().counter
    places = sorted(min(c, len(text)) for c in cuts)
    encoding = counter.tokenizer.encode(text, add_special_tokens=False)
    starts = [a for a, _ in encoding.offsets]
    counts = counter.count(text, [])
    assert counts == [len(encoding)] or (counts is None and "e\u0301" in pieces)
    assert counter.count(text, places) in (
        None,
        [*(sum(s < c for s in starts) for c in places), len(encoding)],
    )


def test_other_tokenizers_are_not_counted_by_words():
    from tokenizers import Tokenizer, models, pre_tokenizers

    other = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    other.pre_tokenizer = pre_tokenizers.Whitespace()
    assert WordCounter(other).count("a b", []) is None


def test_a_wrong_rule_of_words_is_noticed(qwen):
    chat = pickle.loads(pickle.dumps(qwen()))
    row = record(("user", "What is in this picture?"), ("assistant", "It is a three."))
    lengths = chat.measure([row])
    assert chat.counter.expressions is not None
    chat.counter.expressions = chat.counter.expressions[0], re.compile(r"[\s\S]")
    assert chat.measure([row]) == lengths and chat.counter.expressions is None


# long samples


def long_talk(folder, turns):
    talk = [("system", "You are helpful.")]
    for n in range(turns):
        talk += [
            ("user", [image(folder, n % 3), f"question {n} " * (1 + n % 4)]),
            ("assistant", f"answer {n}"),
        ]
    return record(*talk)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=st.integers(1, 10), limit=st.integers(40, 300))
def test_pieces_keep_turns_whole_and_lose_nothing(qwen, folder, turns, limit):
    chat = short(qwen(), limit)
    row = long_talk(folder, turns)
    pieces = chat.pieces(row)
    assert [m for p in pieces for m in p.messages[1:]] == list(row.messages[1:]) or pieces == [row]
    lengths = [m.tokens for m in chat.measure(pieces)]
    for piece, length in zip(pieces, lengths, strict=True):
        assert piece.messages[0] == row.messages[0]
        assert [m.role for m in piece.messages[1:]] == ["user", "assistant"] * (len(piece.messages) // 2)
        assert length <= limit or len(piece.messages) == 3
    for piece, following in pairwise(pieces):  # none could have taken the next turn too
        assert (
            chat.measure([replace(piece, messages=(*piece.messages, *following.messages[1:3]))])[0].tokens
            > limit
        )


def test_tool_results_stay_with_their_question(qwen):
    call = ({"type": "function", "function": {"name": "f", "arguments": {}}},)
    one = (
        Message("user", ("a " * 20,)),
        Message("assistant", (), None, call),
        Message("tool", ("r",)),
        Message("assistant", ("b",)),
    )
    row = Record((*one, *one), WHERE)
    pieces = qwen(max_length=80).pieces(row)
    assert [p.messages for p in pieces] == [one, one]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(st.sampled_from("ab é中😀.\n"), min_size=1, max_size=400),
    limit=st.integers(24, 90),
    pictures=st.booleans(),
)
def test_plain_text_is_cut_between_tokens(qwen, folder, text, limit, pictures):
    chat = short(qwen(), limit)
    content = (text, image(folder, 0), text) if pictures else (text,)
    row = Record((Message("assistant", content),), WHERE, plain=True)
    pieces = chat.pieces(row)
    parts = [p for piece in pieces for p in piece.messages[0].content]
    assert "".join(p for p in parts if isinstance(p, str)) == text * (1 + pictures)
    assert [p for p in parts if isinstance(p, Media)] == list(row.media)
    measures = chat.measure(pieces)
    assert all(m.tokens <= limit for m in measures)
    eos = chat.media.tokenizer.eos_token_id
    assert [chat.sample(p).tensors["input_ids"][-1].item() == eos for p in pieces] == [False] * (
        len(pieces) - 1
    ) + [True]


def test_a_short_record_is_not_touched(qwen, folder):
    row = record(*CASES["both"](folder))
    assert qwen().pieces(row) == [row]


# the processor itself


def test_the_processor_is_pickled_to_other_processes(qwen, folder):
    chat = qwen("qwen3-vl")
    row = record(*CASES["both"](folder))
    chat.measure([row])
    again = pickle.loads(pickle.dumps(chat))
    assert again.fingerprint == chat.fingerprint
    for name, tensor in chat.sample(row).tensors.items():
        assert torch.equal(again.sample(row).tensors[name], tensor)


def test_the_fingerprint_follows_all_that_changes_a_sample(qwen, tmp_path):
    marks = [
        chat.fingerprint
        for chat in (
            qwen(),
            qwen("qwen3-vl"),
            qwen(train_on="all"),
            qwen(image={"max_pixels": 1024}),
            qwen(video={"fps": 1.0}),
            qwen(template_kwargs={"x": 1}),
            templated(qwen, tmp_path, TRIMMING),
        )
    ]
    assert len(set(marks)) == len(marks)
    assert qwen().fingerprint == marks[0] == qwen(max_length=64, pack=False).fingerprint


def test_videos_longer_than_max_frames_and_lists_of_frames(qwen, folder):
    frames = Media("video", tuple(str(folder / "0.png") for _ in range(5)))
    row = record(("user", [Media("video", str(folder / "v.mp4")), frames]), ("assistant", "a"))
    chat = qwen(video={"fps": 5.0, "max_frames": 6})
    sample = chat.sample(row)
    assert sample.tensors["grid_thw"][:, 0].tolist() == [
        3,
        3,
    ]  # 6 of 30 frames; 5 frames, the last joined with itself
    assert chat.measure([row]) == [sample.measure]
    sizes = [h * w for t, h, w in sample.tensors["grid_thw"].tolist() for _ in range(t)]
    assert (
        list(sample.measure.media["vision"]) == sizes and len(sizes) == 6
    )  # a frame's patches see their frame alone


# bad input


def test_missing_picture(qwen, tmp_path):
    refused(
        qwen(),
        record(("user", [Media("image", str(tmp_path / "none.png"))]), ("assistant", "a")),
        "none.png does not exist",
        "media_dir",
    )


def test_picture_of_an_impossible_shape(qwen, tmp_path):
    Image.new("RGB", (900, 2)).save(tmp_path / "line.png")
    refused(
        qwen(),
        record(("user", [Media("image", str(tmp_path / "line.png"))]), ("assistant", "a")),
        "line.png",
        "900 x 2",
    )


def test_sound(qwen):
    refused(qwen(), record(("user", [Media("audio", "a.wav")]), ("assistant", "a")), "audio")


def test_broken_video(qwen, tmp_path):
    (tmp_path / "v.mp4").write_bytes(b"x" * 100)
    refused(
        qwen(),
        record(("user", [Media("video", str(tmp_path / "v.mp4"))]), ("assistant", "a")),
        "v.mp4 cannot be read",
    )


def test_picture_cut_after_its_header_is_broken_only_when_decoded(qwen, folder, tmp_path):
    data = (folder / "1.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    row = record(("user", [Media("image", str(tmp_path / "cut.png"))]), ("assistant", "a"))
    chat = qwen()
    assert not isinstance(chat.measure([row])[0], str)
    with pytest.raises(PolymodalError, match=f"{WHERE}: the image .*cut.png cannot be read"):
        chat.sample(row)


def test_text_that_holds_the_models_own_media_token(qwen, folder):
    refused(
        qwen(),
        record(("user", [image(folder, 0), "and <|image_pad|>"]), ("assistant", "a")),
        "the text holds the token <|image_pad|>",
        "<image>",
    )
    refused(qwen(), record(("user", "<|vision_start|>"), ("assistant", "a")), "<|vision_start|>")


def test_tokenizer_without_end_of_text(qwen):
    chat = pickle.loads(pickle.dumps(qwen()))
    chat.media.tokenizer.eos_token = None
    refused(chat, Record((Message("assistant", ("x",)),), WHERE, plain=True), "no end-of-text token")


# from file to page


def test_samples_as_a_page(qwen, folder, tmp_path):
    from polymodal.tools.data_show import show

    rows = [
        {
            "messages": [
                {"role": "user", "content": "<image>What <b>is</b> this? 中😀"},
                {"role": "assistant", "content": "</div><script>alert(1)</script>", "weight": 0.5},
            ],
            "images": [str(folder / f"{n % 3}.png")],
        }
        for n in range(4)
    ]
    rows += [
        {
            "messages": [{"role": "user", "content": "<video>"}, {"role": "assistant", "content": "a"}],
            "videos": [str(folder / "v.mp4")],
        },
        {
            "messages": [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "a"}],
            "images": ["lost.png"],
        },
    ]
    corpus = open_corpus(
        [
            Dataset(path=str(write_rows(tmp_path / "a.jsonl", rows[:4]))),
            Dataset(path=str(write_rows(tmp_path / "b.jsonl", rows[4:]))),
        ]
    )
    page = tmp_path / "out" / "page.html"
    assert show(corpus, qwen(), str(page), n=20, title="<My> data") == list(range(6))
    text = page.read_text()
    assert "<script" not in text and "&lt;My&gt; data" in text and "lost.png does not exist" in text
    assert "</div><script>alert(1)</script>" in html.unescape(re.sub("<[^>]+>", "", text))
    assert text.count("data:image/png;base64,") == 4 + 4 and "http" not in text.split("</style>")[1]
    assert (
        "b.jsonl, line 2" in text
        and "weight 0.5" in text
        and "中" in text
        and "😀" in text
        and "image 1: " in text
        and "video 1: " in text
    )
    assert len(show(corpus, qwen(), str(page), n=3)) == 3
    assert {i >= 4 for i in show(corpus, qwen(), str(page), n=3)} == {True, False}  # of both datasets
