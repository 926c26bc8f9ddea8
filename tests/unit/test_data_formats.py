"""Every documented form becomes the same Record; one that cannot be understood is named with key, cause and fix."""

from __future__ import annotations

import base64
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Media, Message
from polymodal.data.formats import RowReader
from polymodal.recipe import Attr
from tests.unit.media_fixtures import picture_bytes

WHERE = "data.jsonl, line 7"


def read(row, format="auto", path="folder/data.jsonl", media_dir=None, **attr):
    return RowReader(format, Attr(**attr), path, media_dir).record(row, WHERE)


def image(name):
    return Media("image", os.path.join("folder", name))


def video(name):
    return Media("video", os.path.join("folder", name))


def turns(*pairs, role="role", content="content"):
    return [{role: r, content: c} for r, c in pairs]


# the formats


def test_mllm_json():
    record = read({"messages": turns(("user", "<image>What?"), ("assistant", "A cat.")), "images": ["a.jpg"]})
    assert record.messages == (Message("user", (image("a.jpg"), "What?")), Message("assistant", ("A cat.",)))
    assert record.where == WHERE and not record.plain


def test_several_pictures_and_a_video_in_order_of_reading():
    row = {
        "messages": turns(
            ("system", "Be short."),
            ("user", "One <image> two <image><video>?"),
            ("assistant", "yes"),
            ("user", "and <image>"),
            ("assistant", "no"),
        ),
        "images": ["a.jpg", "b.jpg", "c.jpg"],
        "videos": ["v.mp4"],
    }
    record = read(row)
    assert record.messages[1].content == (
        "One ",
        image("a.jpg"),
        " two ",
        image("b.jpg"),
        video("v.mp4"),
        "?",
    )
    assert record.messages[3].content == ("and ", image("c.jpg"))
    assert [m.source for m in record.media] == [
        "folder/a.jpg",
        "folder/b.jpg",
        "folder/v.mp4",
        "folder/c.jpg",
    ]


@pytest.mark.parametrize("images", [None, [], "", "absent"])
def test_text_only_records(images):
    row = {"messages": turns(("user", "Hi"), ("assistant", "Ho"))}
    if images != "absent":
        row["images"] = images
    assert read(row) == read({"messages": row["messages"]})
    assert read(row).media == ()


def test_media_without_any_placeholder_begin_the_first_user_turn():
    row = {
        "messages": turns(("system", "s"), ("user", "What?"), ("assistant", "a")),
        "images": ["a.jpg", "b.jpg"],
        "videos": ["v.mp4"],
    }
    assert read(row).messages[1].content == (image("a.jpg"), image("b.jpg"), video("v.mp4"), "What?")


def test_sharegpt_with_tools():
    row = {
        "conversations": turns(
            ("human", "Weather?"),
            ("function_call", '{"name": "weather", "arguments": {"city": "Rome"}}'),
            ("observation", "12 C"),
            ("gpt", "Cold."),
            role="from",
            content="value",
        ),
        "system": "You may call tools.",
        "tools": json.dumps([{"name": "weather", "description": "d", "parameters": {}}]),
    }
    record = read(row)
    assert [m.role for m in record.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert record.messages[2].tool_calls == (
        {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}},
    )
    assert record.messages[2].content == ()
    assert record.tools == (
        {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {}}},
    )


def test_llava():
    row = {
        "id": "000123",
        "image": "coco/1.jpg",
        "conversations": turns(
            ("human", "<image>\nWhat is it?"), ("gpt", "A bus."), role="from", content="value"
        ),
    }
    record = read(row)
    assert record.messages[0].content == (image("coco/1.jpg"), "\nWhat is it?")
    assert record.extra["id"] == "000123"
    assert read(row, "llava") == read(row, "sharegpt") == record
    del row["image"]
    row["conversations"][0]["value"] = "Hello"
    assert read(row).media == ()


def test_alpaca():
    row = {
        "instruction": "Add.",
        "input": "1 2",
        "output": "3",
        "system": "Count.",
        "history": [["a", "b"], ["c", "d"]],
    }
    record = read(row)
    assert [(m.role, m.content) for m in record.messages] == [
        ("system", ("Count.",)),
        ("user", ("a",)),
        ("assistant", ("b",)),
        ("user", ("c",)),
        ("assistant", ("d",)),
        ("user", ("Add.\n1 2",)),
        ("assistant", ("3",)),
    ]
    assert read({"instruction": "Add.", "input": "", "output": "3"}).messages[0].content == ("Add.",)
    assert read({"prompt": "p", "response": "r"}).messages[1].content == ("r",)
    assert read({"instruction": "<image>?", "output": "3", "images": ["a.jpg"]}).messages[0].content == (
        image("a.jpg"),
        "?",
    )


def test_openai_typed_parts_tools_reasoning_and_weights():
    data = picture_bytes()
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    row = {
        "messages": [
            {"role": "developer", "content": "Look closely."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "See <image>: "},
                    {"type": "image_url", "image_url": {"url": url}},
                    {"type": "image", "image": "b.jpg"},
                    {"type": "video", "video": ["f1.jpg", "f2.jpg"]},
                ],
            },
            {
                "role": "assistant",
                "content": None,
                "reasoning_content": "hm",
                "weight": 0,
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "zoom", "arguments": '{"x": 1}'}}
                ],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "ok"},
            {"role": "assistant", "content": "Two.", "weight": 0.5},
        ],
        "tools": [{"type": "function", "function": {"name": "zoom", "parameters": {}}}],
    }
    record = read(row, "openai")
    assert record.messages[0].role == "system"
    assert record.messages[1].content == (
        "See <image>: ",
        Media("image", data),
        image("b.jpg"),
        Media("video", ("folder/f1.jpg", "folder/f2.jpg")),
    )
    assert record.messages[2].tool_calls == (
        {"type": "function", "id": "c1", "function": {"name": "zoom", "arguments": {"x": 1}}},
    )
    assert (record.messages[2].reasoning, record.messages[2].weight, record.messages[4].weight) == (
        "hm",
        0.0,
        0.5,
    )
    assert read(row) == record


def test_parts_without_a_source_take_the_records_pictures_in_order():
    row = {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image"},
                    {"type": "text", "text": " or "},
                    {"type": "image", "image": None},
                ],
            },
            {"role": "assistant", "content": "a"},
        ],
        "images": ["a.jpg", "b.jpg"],
    }
    assert read(row).messages[0].content == (image("a.jpg"), " or ", image("b.jpg"))


def test_the_mark_is_text_in_openai_messages_without_pictures():
    row = {"messages": turns(("user", "What does <image> mean in HTML?"), ("assistant", "Nothing."))}
    assert read(row, "openai").messages[0].content == ("What does <image> mean in HTML?",)
    assert read(row).messages[0].content == ("What does <image> mean in HTML?",)
    for other in (
        row | {"pics": ["a.png"]},
        {"messages": turns(("user", "<image>What?"), ("assistant", "A cat."))},
    ):
        with pytest.raises(PolymodalError, match="1 <image> in the text, but there is no `images`"):
            read(other)


def test_the_mark_is_text_in_answers_when_questions_have_one_for_each_picture():
    answer = "Intro.\n\n![figure 3](<image>)\n\nMore."
    row = {"messages": turns(("user", "<image>Transcribe."), ("assistant", answer)), "images": ["a.jpg"]}
    assert read(row).messages[1].content == (answer,) and read(row).media == (image("a.jpg"),)
    drawn = {"messages": turns(("user", "Draw."), ("assistant", "<image>")), "images": ["a.jpg"]}
    assert read(drawn).messages[1].content == (image("a.jpg"),)
    alone = {"messages": turns(("user", "A video element?"), ("assistant", "<video></video>"))}
    assert read(alone).messages[1].content == ("<video></video>",)


def test_prompt_and_completion_as_turns():
    typed = [{"type": "image"}, {"type": "text", "text": "What?"}]
    row = {
        "images": ["a.jpg"],
        "prompt": turns(("user", "Hi"), ("assistant", "Ho"), ("user", typed)),
        "completion": turns(("assistant", "Red.")),
    }
    record = read(row)
    assert record.messages[2].content == (image("a.jpg"), "What?")
    assert [(m.role, m.weight) for m in record.messages] == [
        ("user", None),
        ("assistant", 0.0),
        ("user", None),
        ("assistant", None),
    ]
    assert read({"prompt": "2+2=", "completion": " 4"}).messages[1].content == (" 4",)


def test_plain_text():
    assert read({"text": "Once."}).messages == (Message("assistant", ("Once.",)),)
    assert read({"text": "Once."}).plain
    assert read({"body": "A <image> B", "images": ["a.jpg"]}, "text", prompt="body").messages[0].content == (
        "A ",
        image("a.jpg"),
        " B",
    )
    assert read({"text": "caption", "images": ["a.jpg"]}).messages[0].content == (image("a.jpg"), "caption")


def test_own_field_names():
    row = {
        "dialog": [{"who": "Q", "says": "<image>?"}, {"who": "A", "says": "!"}, {"who": "T", "says": "r"}],
        "pics": ["a.jpg"],
        "sys": "s",
    }
    record = read(
        row,
        messages="dialog",
        role="who",
        content="says",
        user="Q",
        assistant="A",
        observation="T",
        images="pics",
        system="sys",
    )
    assert [m.role for m in record.messages] == ["system", "user", "assistant", "tool"]
    assert record.media == (image("a.jpg"),)


def test_records_of_parquet_and_csv():
    data = picture_bytes()
    row = {
        "messages": [
            {"role": "user", "content": "<image>x", "tool_calls": None, "weight": None},
            {
                "role": "assistant",
                "content": "y",
                "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1, "b": None}}}],
                "weight": None,
            },
        ],
        "images": [{"bytes": data, "path": "lost.png"}],
        "tools": None,
    }
    record = read(row, path="data.parquet")
    assert record.media == (Media("image", data),)
    assert record.messages[1].tool_calls[0]["function"]["arguments"] == {"a": 1}
    text = {"messages": json.dumps(turns(("user", "<image>x"), ("assistant", "y"))), "images": '["a.jpg"]'}
    assert read(text).media == (image("a.jpg"),)
    assert read(
        {
            "instruction": "<image>",
            "output": "y",
            "image": base64.b64encode(picture_bytes("JPEG", 80, 60)).decode(),
        }
    ).media[0].source == picture_bytes("JPEG", 80, 60)


def test_where_relative_paths_start(tmp_path, monkeypatch):
    (tmp_path / "data" / "pictures").mkdir(parents=True)
    (tmp_path / "COCO" / "train").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    def source(name, media_dir=None):
        return (
            read(
                {"messages": turns(("user", "<image>"), ("assistant", "a")), "images": [name]},
                path="data/x.json",
                media_dir=media_dir,
            )
            .media[0]
            .source
        )

    assert source("pictures/a.jpg") == os.path.join("data", "pictures/a.jpg")
    assert (
        source("./COCO/train/a.jpg") == "./COCO/train/a.jpg"
    )  # there is no data/COCO/train, but one from here
    assert source("COCO/train/a.jpg", "elsewhere") == "elsewhere/COCO/train/a.jpg"
    assert source("/abs/a.jpg", "elsewhere") == "/abs/a.jpg"
    assert source("file:///abs/a%20b.jpg") == "/abs/a b.jpg"


chunks = st.lists(
    st.one_of(st.sampled_from(["<image>", "<video>"]), st.text("ab <>\n", max_size=5)), max_size=6
)


@given(contents=st.lists(chunks, min_size=1, max_size=4))
def test_reading_keeps_text_and_order_of_media(contents):
    texts = ["".join(c) for c in contents]
    joined = "".join(texts)
    row = {
        "messages": turns(*(("user" if n % 2 == 0 else "assistant", t) for n, t in enumerate(texts))),
        "images": [f"{n}.jpg" for n in range(joined.count("<image>"))],
        "videos": [f"{n}.mp4" for n in range(joined.count("<video>"))],
    }
    record = read(row)
    back = ["".join(p if isinstance(p, str) else f"<{p.kind}>" for p in m.content) for m in record.messages]
    assert back == texts
    assert [m.source for m in record.media if m.kind == "image"] == [
        f"folder/{n}.jpg" for n in range(joined.count("<image>"))
    ]
    assert [m.source for m in record.media if m.kind == "video"] == [
        f"folder/{n}.mp4" for n in range(joined.count("<video>"))
    ]


# bad input: one case a message

ASK = {"role": "user", "content": "q"}
BAD = {
    "no known columns": (
        {"question": "a", "reply": "b"},
        {},
        ["no known format has these columns: question, reply", "data.attr"],
    ),
    "no conversation": (
        {"text": "x"},
        {"format": "mllm"},
        ["the column `messages` is missing", "data.attr.messages"],
    ),
    "empty conversation": ({"messages": []}, {}, ["`messages` is a list of turns, here it is empty"]),
    "conversation as text": ({"messages": "hello"}, {}, ["`messages` is a list of turns, here it is a str"]),
    "turn as text": ({"messages": ["hello"]}, {}, ["`messages[0]` is an object", "a str"]),
    "turn without role": (
        {"messages": [{"content": "x"}]},
        {},
        ["`messages[0]` has no `role`", "data.attr.role"],
    ),
    "unknown role": (
        {"messages": [{"role": "robot", "content": "x"}]},
        {},
        ["`messages[0].role` = 'robot' is no known role", "data.attr.user"],
    ),
    "turn without content": (
        {"messages": [ASK, {"role": "assistant"}]},
        {},
        ["`messages[1]` has no `content`", "data.attr.content"],
    ),
    "content as number": (
        {"messages": [{"role": "user", "content": 3}]},
        {},
        ["`messages[0].content` is text or a list of typed parts", "int"],
    ),
    "unknown part": (
        {"messages": [{"role": "user", "content": [{"type": "hologram"}]}]},
        {},
        ["`messages[0].content[0].type` = 'hologram' is no known part"],
    ),
    "part without text": (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        {},
        ["`messages[0].content[0]` has no `text`"],
    ),
    "weight": (
        {"messages": [ASK, {"role": "assistant", "content": "a", "weight": "much"}]},
        {},
        ["`messages[1].weight` = 'much' is no number from 0"],
    ),
    "negative weight": (
        {"messages": [ASK, {"role": "assistant", "content": "a", "weight": -1}]},
        {},
        ["`messages[1].weight` = -1"],
    ),
    "system as list": (
        {"messages": [ASK], "system": ["x"]},
        {},
        ["`system` is the system prompt as a string"],
    ),
    "more marks": (
        {"messages": [{"role": "user", "content": "<image><image>"}], "images": ["a.jpg"]},
        {},
        ["2 <image> in the text, but `images` holds 1", "Write one <image> for each"],
    ),
    "fewer marks": (
        {"messages": [{"role": "user", "content": "<video>"}], "videos": ["a.mp4", "b.mp4"]},
        {},
        ["1 <video> in the text, but `videos` holds 2"],
    ),
    "own and listed": (
        {
            "messages": [{"role": "user", "content": [{"type": "image", "image": "a.jpg"}]}],
            "images": ["a.jpg"],
        },
        {},
        ["the messages name 1 of their own and 0 <image>, but `images` holds 1"],
    ),
    "no user turn": (
        {"messages": [{"role": "assistant", "content": "x"}], "images": ["a.jpg"]},
        {},
        ["`images` holds 1, but there is no user turn"],
    ),
    "medium as number": (
        {"messages": [{"role": "user", "content": "<image>"}], "images": [5]},
        {},
        ["`images[0]` names no image: '5'"],
    ),
    "empty name": (
        {"messages": [{"role": "user", "content": "<image>"}], "images": [""]},
        {},
        ["`images[0]` names no image"],
    ),
    "network": (
        {"messages": [{"role": "user", "content": "<image>"}], "images": ["https://x.org/a.jpg"]},
        {},
        ["`images[0]` = https://x.org/a.jpg is on the network", "download"],
    ),
    "data URL": (
        {"messages": [{"role": "user", "content": "<image>"}], "images": ["data:image/png;base64,@@@"]},
        {},
        ["`images[0]` is a data: URL that cannot be decoded"],
    ),
    "base64": (
        {"messages": [{"role": "user", "content": "<image>"}], "images": ["/9j/" + "!" * 400]},
        {},
        ["`images[0]` looks like base64 but cannot be decoded"],
    ),
    "call not JSON": (
        {"conversations": [{"from": "function_call", "value": "weather(Rome)"}]},
        {},
        ["`conversations[0].value` is a tool call as JSON"],
    ),
    "call without name": (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]},
        {},
        ["`messages[0].tool_calls` holds a tool call without a name"],
    ),
    "tools": ({"messages": [ASK], "tools": "weather"}, {}, ["`tools` is a list of tools"]),
    "alpaca without answer": (
        {"instruction": "x"},
        {"format": "alpaca"},
        ["the column `output` is missing", "data.attr.response"],
    ),
    "alpaca without prompt": (
        {"output": "x"},
        {"format": "alpaca"},
        ["the column `instruction` is missing", "data.attr.prompt"],
    ),
    "alpaca input": ({"instruction": "x", "input": 3, "output": "y"}, {}, ["the column `input` is no text"]),
    "alpaca history": (
        {"instruction": "x", "output": "y", "history": [["a"]]},
        {},
        ["`history[0]` is a pair"],
    ),
    "text": ({"text": 5}, {"format": "text"}, ["the column `text` of plain text is missing or no string"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_record(case):
    row, options, words = BAD[case]
    with pytest.raises(PolymodalError) as error:
        read(row, **options)
    assert error.value.message.startswith(WHERE)
    assert error.value.hint or "there is no user" in error.value.message
    for word in words:
        assert word in str(error.value), str(error.value)
