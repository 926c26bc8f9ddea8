"""Ids are the library's own, labels are the assistant's words under any template, lengths need no pixels."""

from __future__ import annotations

import copy
import html
import pickle
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from polymodal.data import media as files
from polymodal.data.chat import ChatProcessor
from polymodal.data.counting import TokenCounter
from polymodal.data.sample import IGNORE, Media, Message, Record
from polymodal.data.source import open_corpus
from polymodal.errors import PolymodalError
from polymodal.recipe import Data, Dataset, Video
from tests.models import tiny
from tests.unit.media_fixtures import qwen_media, write_mp4, write_rows

WHERE = "rows.jsonl, line 3"


def record(*turns, **options):
    """Turns as (role, text or parts[, weight])."""
    messages = []
    for role, content, *weight in turns:
        parts = (content,) if isinstance(content, str) else tuple(content)
        messages.append(Message(role, parts, *weight))
    return Record(tuple(messages), WHERE, **options)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """qwen(card name, **data keys) -> ChatProcessor with the card's own media; the same one for the same keys."""
    directory = tmp_path_factory.mktemp("processors")
    made = {}

    def make(name="qwen2.5-vl", **keys):
        data = Data(**keys)
        key = (
            name,
            data.model_dump_json(),
            keys.get("chat_template")
            and Path(keys["chat_template"]).exists()
            and Path(keys["chat_template"]).read_text(),
        )
        if key not in made:
            made[key] = ChatProcessor(qwen_media(name, directory / name, data), data)
        return made[key]

    return make


def short(chat, limit):
    """The same processor with another max_length."""
    chat = copy.copy(chat)
    chat.max_length = limit
    return chat


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("media")
    for n, size in enumerate(((24, 16), (40, 24), (17, 31))):
        tiny.picture(*size, n).save(directory / f"{n}.png")
    write_mp4(directory / "v.mp4", frames=30, fps=10, width=32, height=24)
    return directory


def image(folder, n):
    return Media("image", str(folder / f"{n}.png"))


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


# labels


def learned(chat, row):
    """The text that is learned, turn by turn, and its weights."""
    tensors = chat.sample(row).tensors
    ids, labels, weights = (tensors[k] for k in ("input_ids", "labels", "weights"))
    keep = labels != IGNORE
    assert torch.equal(labels[:-1][keep[:-1]], ids[1:][keep[:-1]]) and not keep[-1]
    assert torch.equal(keep, weights > 0)
    runs, previous = [], -2
    for at in keep.nonzero()[:, 0].tolist():
        if at != previous + 1:
            runs.append([[], set()])
        runs[-1][0].append(labels[at].item())
        runs[-1][1].add(round(weights[at].item(), 4))
        previous = at
    return [(chat.media.tokenizer.decode(i), *sorted(w)) for i, w in runs]


TALK = [
    ("system", "sys"),
    ("user", "one?"),
    ("assistant", "first"),
    ("user", "two?"),
    ("assistant", "second"),
]


def test_labels_by_train_on(qwen):
    assert learned(qwen(), record(*TALK)) == [("first<|im_end|>", 1), ("second<|im_end|>", 1)]
    assert learned(qwen(train_on="last"), record(*TALK)) == [("second<|im_end|>", 1)]
    everything = qwen().template.layout(record(*TALK), []).text
    assert learned(qwen(train_on="all"), record(*TALK)) == [(everything.removeprefix("<|im_start|>"), 1)]


def test_a_messages_weight_overrules_train_on(qwen):
    talk = [
        ("user", "one?", 0.5),
        ("assistant", "first", 0.0),
        ("user", "two?"),
        ("assistant", "second", 2.0),
        ("user", "three?"),
        ("assistant", "third"),
    ]
    assert learned(qwen(), record(*talk)) == [
        ("one?<|im_end|>", 0.5),
        ("second<|im_end|>", 2),
        ("third<|im_end|>", 1),
    ]
    assert learned(qwen(train_on="last"), record(*talk)) == [
        ("one?<|im_end|>", 0.5),
        ("second<|im_end|>", 2),
        ("third<|im_end|>", 1),
    ]
    whole = learned(qwen(train_on="all"), record(*talk))
    assert [w for _, *w in whole] == [[0.5, 1], [1, 2]] and "first" not in "".join(t for t, *_ in whole)


def test_media_are_never_learned(qwen, folder):
    row = record(
        ("user", ["look ", image(folder, 0), " here"]), ("assistant", ["see ", image(folder, 1), " there"])
    )
    assert learned(qwen(), row) == [("see ", 1), (" there<|im_end|>", 1)]
    pads = qwen().media.tokenizer.encode("<|vision_start|><|image_pad|><|vision_end|>")
    labels = qwen(train_on="all").sample(row).tensors["labels"]
    assert not set(labels.tolist()) & set(pads)


def test_plain_text_is_learned_whole_and_ends(qwen, folder):
    row = Record((Message("assistant", ("Once upon. ", image(folder, 0), "The end.")),), WHERE, plain=True)
    chat = qwen(train_on="last")
    assert learned(chat, row) == [
        (chat.media.tokenizer.decode(chat.media.tokenizer.encode("Once upon. ")[1:]), 1),
        ("The end.<|im_end|>", 1),
    ]
    assert chat.measure([row]) == [chat.sample(row).measure]


def test_a_prompt_has_no_answer_and_no_labels(qwen, folder):
    row = record(("user", [image(folder, 0), "one?"]), ("assistant", "first"))
    chat = qwen()
    sample = chat.prompt(row)
    tokens = sample.tensors["input_ids"]
    assert chat.media.tokenizer.decode(tokens).endswith("one?<|im_end|>\n<|im_start|>assistant\n")
    assert (
        sample.measure.trained == 0
        and sample.tensors["weights"].sum() == 0
        and "pixel_values" in sample.tensors
    )
    assert torch.equal(
        tokens, chat.prompt(record(*[("user", [image(folder, 0), "one?"])])).tensors["input_ids"]
    )
    assert torch.equal(tokens, chat.sample(row).tensors["input_ids"][: len(tokens)])
    plain = Record((Message("assistant", ("Once",)),), WHERE, plain=True)
    assert chat.media.tokenizer.decode(chat.prompt(plain).tensors["input_ids"]) == "Once"


# templates of every build: what the template does -> what must be learned of TALK

THINKING = """{%- set last = namespace(query=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set last.query = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% set thought = m.reasoning_content or '' %}{% set said = m.content %}
{%- if '</think>' in said %}{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}
{%- if loop.index0 > last.query %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ said.lstrip('\n') }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"""
FORCED = THINKING.replace(
    "{{ '<|im_start|>assistant\n' }}{% if enable", "{{ '<|im_start|>assistant\n<think>\n' }}{% if enable"
)
TRIMMING = "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_end|>\n\n' + m.content | trim + '<|object_ref_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_end|>\n\n' }}{% endif %}"
BARE = "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% elif m.role == 'user' %}{{ '[INST] ' + (messages[0].content + '\n\n' if loop.index0 == 1 and messages[0].role == 'system' else '') + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
NO_END = "{% for m in messages %}{{ '<|box_start|>' if m.role == 'user' else '<|box_end|>' if m.role == 'assistant' else '' }}{{ '\n' + m.content }}{% endfor %}{% if add_generation_prompt %}<|box_end|>{% endif %}"
PARTS = "{% for m in messages %}{{ '<|im_start|>' + m.role + ':' }}{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
TAGGED = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content | upper + '<|im_end|>\n' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TAGGED_INSIDE = TAGGED.replace(
    "+ '<|im_end|>\n' }}{% endgeneration %}", "}}{% endgeneration %}{{ '<|im_end|>\n' }}"
)
NUMBERED = "{% for m in messages %}{{ '<|im_start|>' + m.role + ' ' + (messages | length | string) + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant ' + (messages | length | string) + '\n' }}{% endif %}"

TEMPLATES = {
    "thinking, earlier thoughts stripped": (
        THINKING,
        {},
        ["first<|im_end|>", "<think>\n\n</think>\n\nsecond<|im_end|>"],
    ),
    "thinking switched off": (THINKING, {"enable_thinking": False}, ["first<|im_end|>", "second<|im_end|>"]),
    "thinking in the prompt": (FORCED, {}, ["first<|im_end|>", "\n</think>\n\nsecond<|im_end|>"]),
    "trimming": (TRIMMING, {}, ["first<|object_ref_end|>", "second<|object_ref_end|>"]),
    "end of text ends the turn": (BARE, {}, [" first<|im_end|>", " second<|im_end|>"]),
    "no end of turn": (NO_END, {}, ["\nfirst", "\nsecond"]),
    "content as parts": (PARTS, {}, ["first<|im_end|>", "second<|im_end|>"]),
    "generation tags": (TAGGED, {}, ["FIRST<|im_end|>", "SECOND<|im_end|>"]),
    "generation tags without the end": (TAGGED_INSIDE, {}, ["FIRST<|im_end|>", "SECOND<|im_end|>"]),
    "no message stands alone": (NUMBERED, {}, ["first<|im_end|>", "second<|im_end|>"]),
}


def templated(qwen, tmp_path, template, kwargs=None, **keys):
    path = tmp_path / "template.jinja"
    path.write_text(template)
    return qwen(chat_template=str(path), template_kwargs=kwargs or {}, **keys)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_assistants_words_are_found_in_any_template(qwen, tmp_path, name):
    template, kwargs, expected = TEMPLATES[name]
    chat = templated(qwen, tmp_path, template, kwargs)
    text = chat.template.layout(record(*TALK), [2, 4])
    assert [text.text[slice(*text.spans[i])] for i in (2, 4)] == expected
    assert [t for t, *_ in learned(chat, record(*TALK))] == expected
    assert chat.measure([record(*TALK)]) == [chat.sample(record(*TALK)).measure]
    if name not in (
        "generation tags",
        "generation tags without the end",
    ):  # there each is a slow and a quick way: the same
        searched = chat.template._by_search(
            text.text, chat.template.dicts(record(*TALK).messages), record(*TALK), [2, 4]
        )
        assert [searched[2], searched[4]] == [text.spans[2], text.spans[4]]


def test_thoughts_inside_the_content_are_found_though_the_template_moves_them(qwen, tmp_path):
    chat = templated(qwen, tmp_path, THINKING)
    row = record(
        ("user", "a"),
        ("assistant", "<think>\nold\n</think>\n\nfirst"),
        ("user", "b"),
        ("assistant", "<think>\nnew\n</think>\n\nsecond"),
    )
    assert learned(chat, row) == [("first<|im_end|>", 1), ("<think>\nnew\n</think>\n\nsecond<|im_end|>", 1)]
    told = record(("user", "a"), ("assistant", "first"), ("user", "b"), ("assistant", "second"))
    told = replace(told, messages=(*told.messages[:3], replace(told.messages[3], reasoning="new")))
    assert learned(chat, told) == [("first<|im_end|>", 1), ("<think>\nnew\n</think>\n\nsecond<|im_end|>", 1)]


def test_tool_calls_are_learned_and_results_are_read(qwen):
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "<|x|> é"}}}
    row = record(
        ("user", "a"),
        ("assistant", "Let me see."),
        ("tool", "12"),
        ("assistant", "b"),
        ("user", "c"),
        ("assistant", []),
        tools=({"type": "function", "function": {"name": "look"}},),
    )
    messages = list(row.messages)
    messages[1] = replace(messages[1], tool_calls=(call,))
    messages[5] = replace(messages[5], tool_calls=(call, call))
    row = replace(row, messages=tuple(messages))
    body = '\n<tool_call>\n{"name": "look", "arguments": {"at": "<|x|> é"}}\n</tool_call>'
    chat = qwen()
    assert [t for t, *_ in learned(chat, row)] == [
        f"Let me see.{body}<|im_end|>",
        "b<|im_end|>",
        f"{body}{body}<|im_end|>",
    ]
    text = chat.template.layout(row, [1, 3, 5])
    searched = chat.template._by_search(text.text, chat.template.dicts(row.messages), row, [1, 3, 5])
    assert [searched[i] for i in (1, 3, 5)] == [text.spans[i] for i in (1, 3, 5)]


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
    found = chat.template._by_search(
        layout.text, chat.template.dicts(row.messages), row, range(len(row.messages))
    )
    for i, message in enumerate(row.messages):
        if message.role == "assistant":
            assert found[i] == layout.spans[i]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pieces=st.lists(
        st.sampled_from(
            [
                "a",
                "B",
                " ",
                "  ",
                "\n",
                "\r\n",
                "\t",
                "7",
                "12",
                "é",
                "中",
                "!",
                "...",
                "'s",
                "<|im_end|>",
                "word",
                " the",
                "\u00a0",
                "😀",
                "e\u0301",
                "\x85",
                "\x1c",
                "_",
                "-",
            ]
        ),
        max_size=20,
    ),
    cuts=st.lists(st.integers(0, 60), max_size=4),
)
def test_counting_by_words_is_the_tokenizers_count(qwen, pieces, cuts):
    text = "".join(pieces)
    places = sorted(min(c, len(text)) for c in cuts)
    counter = qwen().counter
    assert counter.by_words
    encoding = counter.tokenizer.encode(text, add_special_tokens=False)
    starts = [a for a, _ in encoding.offsets]
    assert counter.count([text], [places]) == [[*(sum(s < c for s in starts) for c in places), len(encoding)]]
    assert counter.by_words  # no check has failed


def test_other_tokenizers_are_counted_by_themselves():
    from tokenizers import Tokenizer, models, pre_tokenizers

    other = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    other.pre_tokenizer = pre_tokenizers.Whitespace()
    counter = TokenCounter(other)
    assert not counter.by_words
    assert counter.count(["a b  cc", "b"], [[0, 1, 3, 7], []]) == [[0, 1, 2, 3, 3], [1]]


def test_a_wrong_rule_of_words_is_noticed(qwen):
    import regex

    counter = TokenCounter(qwen().backend)
    counter._word, counter._spaced = regex.compile(r"[\s\S]"), False
    text = "What is in this picture? It is a three, and the other is what I see in it."
    assert counter.count([text], [[]]) == [[len(counter.tokenizer.encode(text))]]
    assert not counter.by_words


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


def test_the_processor_travels_to_other_processes(qwen, folder):
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


# bad input


def refused(chat, row, *words):
    """The same words from measure (as a reason) and from sample (with the place)."""
    reason = chat.measure([row])[0]
    assert isinstance(reason, str) and WHERE not in reason
    with pytest.raises(PolymodalError) as error:
        chat.sample(row)
    assert error.value.message.startswith(f"{WHERE}: ")
    for word in words:
        assert word in reason and word in str(error.value), reason


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


def test_tools_that_the_template_would_swallow(qwen, tmp_path):
    chat = templated(qwen, tmp_path, TRIMMING)
    refused(
        chat,
        record(*TALK, tools=({"name": "x"},)),
        "the row has tools, but the chat template does not print any",
        "data.chat_template",
    )
    row = record(*TALK)
    refused(
        chat,
        replace(row, messages=(*row.messages, Message("assistant", ("x",), reasoning="because"))),
        "the row has reasoning",
    )
    refused(
        chat,
        replace(
            row,
            messages=(*row.messages, Message("assistant", ("x",), tool_calls=({"function": {"name": "f"}},))),
        ),
        "the row has tool calls",
    )


def test_media_that_the_template_would_swallow(qwen, folder, tmp_path):
    chat = templated(
        qwen,
        tmp_path,
        "{% for m in messages %}{{ m.role + ':' }}{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[-1].text }}{% endif %}{{ eos_token }}{% endfor %}",
    )
    refused(
        chat,
        record(("user", [image(folder, 0), "a"]), ("assistant", "b")),
        "the row has 1 image(s), the chat template printed 0",
    )


def test_conversation_that_the_template_refuses(qwen, tmp_path):
    chat = templated(
        qwen,
        tmp_path,
        "{% if messages[0].role != 'user' %}{{ raise_exception('user must be first') }}{% endif %}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}",
    )
    refused(
        chat,
        record(*TALK),
        "the chat template refuses this conversation: user must be first",
        "order of roles",
    )
    assert [t for t, *_ in learned(chat, record(*TALK[1:]))] == ["first<|im_end|>", "second<|im_end|>"]


def test_template_that_fails(qwen, tmp_path):
    chat = templated(qwen, tmp_path, "{% for m in messages %}{{ m.content + 1 }}{% endfor %}")
    refused(chat, record(*TALK), "the chat template fails on this conversation: TypeError")


def test_template_that_hides_the_answer(qwen, tmp_path):
    chat = templated(
        qwen,
        tmp_path,
        "{% for m in messages %}{{ m.role }}{% if m.role != 'assistant' %}{{ m.content }}{% endif %}{{ eos_token }}{% endfor %}",
    )
    refused(chat, record(*TALK), "does not show where message 3 (assistant) begins", "{% generation %}")


def test_checkpoint_without_a_template(qwen):
    chat = pickle.loads(pickle.dumps(qwen()))
    chat.template.text = None
    refused(chat, record(*TALK), "has no chat template", "data.chat_template")


def test_template_files(qwen, tmp_path):
    with pytest.raises(PolymodalError, match="data.chat_template = .*none.jinja cannot be read"):
        qwen(chat_template=str(tmp_path / "none.jinja"))
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(PolymodalError, match="t.json has no key chat_template"):
        qwen(chat_template=str(tmp_path / "t.json"))
    (tmp_path / "t.jinja").write_text("{% for m in messages %}\n{{ m.content }\n{% endfor %}")
    with pytest.raises(PolymodalError, match=r"t.jinja, line 2: "):
        qwen(chat_template=str(tmp_path / "t.jinja"))


def test_tokenizer_without_end_of_text(qwen):
    chat = pickle.loads(pickle.dumps(qwen()))
    chat.media.tokenizer.eos_token = None
    refused(chat, Record((Message("assistant", ("x",)),), WHERE, plain=True), "no end-of-text token")


# from file to page


def test_samples_as_a_page(qwen, folder, tmp_path):
    from polymodal.data.show import show

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
    assert text.count("data:image/jpeg;base64,") == 4 + 4 and "http" not in text.split("</style>")[1]
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
