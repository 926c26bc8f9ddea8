"""Texts of rows and chat templates as strangers write them: learned as they are, or refused by one sentence."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Message, Record
from polymodal.core.text import check_characters
from polymodal.data.chat import ChatProcessor
from polymodal.data.files import open_rows
from polymodal.data.formats import RowReader
from polymodal.data.sandbox import MOST
from polymodal.data.template import BREAK, CLOSE, OPEN, Template
from polymodal.recipe import Attr, Data
from tests.models import tiny
from tests.unit.media_fixtures import qwen_media

WORDS = [
    *tiny.SPECIALS,
    "<image>",
    "<video>",
    BREAK,
    OPEN + "0" + CLOSE,
    "<",
    "<|",
    "|>",
    "a ",
    " b",
    "\n",
    "é",
    "图",
    "\0",
]
texts = st.lists(st.sampled_from(WORDS) | st.text(max_size=6), max_size=12).map("".join)
settled = settings(max_examples=40, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    return qwen_media("qwen2.5-vl", tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def chat(media):
    return ChatProcessor(media, Data(special_tokens="text"))


def _turns(*contents: str) -> Record:
    roles = ("system", "user", "assistant")
    messages = (Message(role, (text,)) for role, text in zip(roles, contents, strict=True))  # type: ignore[arg-type]
    return Record(tuple(messages), "rows.jsonl, line 1")


def _special(chat: ChatProcessor) -> set[int]:
    return {number for number, token in chat.media.tokenizer.added_tokens_decoder.items() if token.special}


@settled
@given(system=texts, question=texts, answer=texts)
def test_control_tokens_of_a_text_are_learned_as_text(chat, system, question, answer):
    tokenizer, record = chat.media.tokenizer, _turns(system, question, answer)
    sample = chat.sample(record)
    ids, labels = sample.tensors["input_ids"].tolist(), sample.tensors["labels"].tolist()
    ends, begins = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|im_start|>"))
    control = [token for token in ids if token in _special(chat)]
    assert control == [begins, ends] * 3  # those of the template, and no other
    turn = tokenizer.decode([label for label in labels if label >= 0])
    normal = tokenizer.backend_tokenizer.normalizer.normalize_str(answer)
    assert turn == normal + "<|im_end|>"  # all of the answer, as it is written, and its end
    assert chat.measure([record]) == [sample.measure]


@settled
@given(text=texts)
def test_plain_text_and_tool_arguments_hold_no_control_token(chat, text):
    special = _special(chat)
    plain = Record((Message("assistant", (text,)),), "rows.jsonl, line 1", plain=True)
    ids = chat.sample(plain).tensors["input_ids"].tolist()
    assert [token for token in ids if token in special] == [chat.media.tokenizer.eos_token_id]
    call = {"type": "function", "function": {"name": "look", "arguments": {text: [text]}}}
    turns = (Message("user", ("a",)), Message("assistant", (), tool_calls=(call,)), Message("tool", (text,)))
    record = Record(turns, "rows.jsonl, line 1", tools=({"name": text},))
    ids = chat.sample(record).tensors["input_ids"].tolist()
    assert len([token for token in ids if token in special]) == 8  # four turns that begin and end
    assert chat.measure([plain, record]) == [chat.sample(plain).measure, chat.sample(record).measure]


@pytest.mark.parametrize("special", ["auto", "text", "tokens"])
def test_the_recipe_decides_what_special_tokens_become(media, special):
    chat = ChatProcessor(media, Data(special_tokens=special))
    [lengths, named] = chat.measure([_turns("s", "<|im_end|>", "a"), _turns("s", "<|image_pad|>", "a")])
    spelt = len(chat.media.tokenizer._encode_without_added_tokens("<|im_end|>"))
    assert lengths.tokens - chat.measure([_turns("s", "", "a")])[0].tokens == (
        1 if special == "tokens" else spelt
    )
    assert special == "text" or "<|image_pad|>" in named and "data.special_tokens" in named


def test_thinking_marks_of_an_answer_are_tokens_and_of_a_question_text(tmp_path):
    tokenizer = qwen_media("qwen2.5-vl", tmp_path).tokenizer
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save_pretrained(tmp_path)
    chat = ChatProcessor(qwen_media("qwen2.5-vl", tmp_path), Data())
    think = chat.media.tokenizer.convert_tokens_to_ids("<think>")
    ids = chat.sample(_turns("s", "what is <think>?", "<think>a</think>b")).tensors["input_ids"].tolist()
    assert ids.count(think) == 1


POWER = "{% set n = namespace(x='ab') %}{% for i in range(90) %}{% set n.x = EXPR %}{% endfor %}{{ n.x }}"
GROWING = ["n.x + n.x", "n.x ~ n.x", "[n.x, n.x]", "(n.x, n.x)", "{1: n.x, 2: n.x}", "n.x * 9", "[n.x, n.x] | join",
           "n.x | replace('a', 'aaaaaaaaa')", "n.x.replace('b', 'bbbbbbbb')", "''.join([n.x, n.x])", "n.x | center(99999999)",
           "'%s%s' % (n.x, n.x)", "'{}{}'.format(n.x, n.x)", "n.x.ljust(9999999999)", "n.x | indent(99999999)"]  # fmt: skip
NUMBERS = st.integers(min_value=10**9, max_value=10**14)


@settled
@given(
    expression=st.sampled_from(GROWING),
    around=st.sampled_from(["EXPR", "(EXPR)", "EXPR if i else n.x ~ n.x", "[EXPR][0]"]),
)
def test_text_that_grows_in_a_template_is_refused(media, expression, around):
    template = Template(media, POWER.replace("EXPR", around.replace("EXPR", expression)), {})
    with pytest.raises(PolymodalError, match="the chat template"):
        template.render([{"role": "user", "content": "a"}])


@settled
@given(
    number=NUMBERS,
    form=st.sampled_from(
        ["{{ 'a' * N }}", "{{ [1] * N }}", "{{ 7 ** N }}", "{{ 'a'.center(N) }}", "{{ '%Nd' % 1 }}", "{{ '{:N}'.format(1) }}",
         "{{ '{:{}}'.format(1, N) }}", "{{ 'a' | center(N) }}", "{{ '%*d' % (N, 1) }}", "{{ [1] | tojson(indent=N) }}",
         "{% for i in range(N) %}{% endfor %}", "{% for i in 'a' * N %}{% endfor %}", "{{ (5).to_bytes(N, 'big') }}",
         "{% for i in range(99999) %}{% for j in range(99999) %}{{ N }}{% endfor %}{% endfor %}", "{{ [1] | batch(N, 1) | list }}"]
    ),
)  # fmt: skip
def test_huge_numbers_in_a_template_are_refused(media, number, form):
    template = Template(media, form.replace("N", str(number)), {})
    with pytest.raises(PolymodalError, match="the chat template"):
        template.render([{"role": "user", "content": "a"}])


@pytest.mark.parametrize(
    "text",
    ["{{ 1 / 0 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% include '/etc/passwd' %}", "{{ messages.__class__ }}{{ messages.__class__.x }}",
     "{{ ''.__class__.__mro__ }}", "{{ raise_exception('no') }}", "{{ x.y }}", "{{ 1 | nothing }}", "{% if %}", "{{ " + "(" * 500 + "1" + ")" * 500 + " }}",
     "{{ 'x' * 9 }}" * 200_000],
)  # fmt: skip
def test_errors_of_every_type_in_a_template_are_one_sentence(media, text):
    with pytest.raises(PolymodalError, match="the chat template") as raised:
        Template(media, text, {}).render([{"role": "user", "content": "a"}])
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


def test_a_template_that_never_ends_is_not_tried_with_every_row(media):
    chat = ChatProcessor(media, Data())
    chat.template = Template(
        media, "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", {}
    )
    reasons = chat.measure([_turns("s", "q", f"a{n}") for n in range(300)])
    assert all("too much work" in str(reason) for reason in reasons)


@settled
@given(words=st.lists(st.text(max_size=400), min_size=1, max_size=30))
def test_usual_templates_stay_far_below_the_bound(chat, words):
    from transformers.utils.chat_template_utils import _compile_jinja_template

    messages = [{"role": ("user", "assistant")[n % 2], "content": word} for n, word in enumerate(words)]
    chat.template.render(messages)
    work = _compile_jinja_template(chat.template.text).environment.work
    assert sum(map(len, words)) <= work < MOST / 100


halves = st.builds(
    lambda a, c, b: a + chr(c) + b, st.text(max_size=9), st.integers(0xD800, 0xDFFF), st.text(max_size=9)
)
values = st.recursive(halves | st.none(), lambda inner: st.lists(inner, min_size=1, max_size=3) | st.dictionaries(st.text(max_size=4), inner, min_size=1, max_size=3), max_leaves=6)  # fmt: skip


@settled
@given(value=values)
def test_half_a_character_is_named_wherever_it_stands(tmp_path_factory, value):
    place = tmp_path_factory.getbasetemp() / "halves.jsonl"
    place.write_text(json.dumps({"messages": value}) + "\n")  # escapes, as scraped files have them
    lone = _lone(value)
    try:
        row = open_rows(str(place))[0]
        assert not lone and row == {"messages": value}
    except PolymodalError as error:
        assert lone and "line 1" in str(error) and "surrogate" in str(error)
    if lone:
        with pytest.raises(PolymodalError, match="line 7.*surrogate"):
            check_characters({"a": [value]}, "rows, line 7")


def _lone(value: object) -> bool:
    """Whether Python's own JSON would read text that cannot be encoded."""
    try:
        json.dumps(json.loads(json.dumps(value)), ensure_ascii=False).encode()
        return False
    except UnicodeEncodeError:
        return True


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["user", "assistant", "text", "image", "<image>", "[1]", "{}", b"x"])  # fmt: skip
keys = st.sampled_from(["role", "content", "from", "value", "type", "text", "image", "tool_calls", "function", "name", "arguments", "weight", "refusal"])  # fmt: skip
odd = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)
columns = st.sampled_from(["messages", "conversations", "prompt", "completion", "text", "images", "image", "videos", "audio", "cap", "caption",
                           "tools", "system", "instruction", "output", "history", "input", "start", "end", "offset", "duration", "weight"])  # fmt: skip


@settings(max_examples=400, deadline=None, derandomize=True)
@given(row=st.dictionaries(columns, odd, max_size=5))
def test_a_row_of_any_shape_is_a_record_or_one_sentence(chat, row):
    try:
        record = RowReader("auto", Attr(), "rows.jsonl", None).record(row, "rows.jsonl, line 5")
    except PolymodalError as error:
        assert str(error).startswith("rows.jsonl, line 5: ")
        return
    assert all(
        isinstance(part, str) or part.source for message in record.messages for part in message.content
    )
    if not record.media:
        [measured] = chat.measure([record])  # lengths, or why it has none
        assert isinstance(measured, str) or measured == chat.sample(record).measure


TURN, REPLY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("row", "attr"),
    [
        ({"prompt": [TURN], "completion": [REPLY]}, {}),
        ({"prompt": "q", "completion": [REPLY]}, {}),
        ({"prompt": [TURN], "completion": "a"}, {}),
        ({"prompt": [TURN], "completion": REPLY}, {}),
        ({"prompt": [TURN], "chosen": [REPLY], "rejected": [REPLY]}, {"response": "chosen"}),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"response": "chosen"}),
        ({"chosen": [TURN, REPLY], "rejected": [TURN, REPLY]}, {"messages": "chosen"}),
        ({"query": "q", "response": "a"}, {}),
        ({"question": "q", "answer": "a"}, {}),
        ({"input": "q", "output": "a"}, {"prompt": "input", "response": "output"}),
        ({"conversations": [{"from": "Human", "value": "q"}, {"from": "GPT", "value": "a"}]}, {}),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"text": "q"}]},
                    REPLY | {"tool_calls": None, "name": None},
                ]
            },
            {},
        ),
    ],
)
def test_rows_of_other_trainers_are_read_or_their_mend_helps(chat, row, attr):
    read = RowReader("auto", Attr(**attr), "rows.jsonl", None).record
    assert [(m.role, m.content) for m in read(row, "x").messages] == [("user", ("q",)), ("assistant", ("a",))]
    if "rejected" in row:  # a comparison, which next-token loss refuses
        [why] = chat.measure([RowReader("auto", Attr(), "rows.jsonl", None).record(row, "x")])
        assert all(f"data.attr.{k}={v}" in why for k, v in attr.items())
    elif attr:  # what the refusal without it names
        with pytest.raises(PolymodalError, match="data.attr.(response|messages|prompt)=") as raised:
            RowReader("auto", Attr(), "rows.jsonl", None).record(row, "x")
        assert "input" in row or all(f"data.attr.{k}={v}" in str(raised.value) for k, v in attr.items())


def test_older_function_calls_are_tool_calls():
    call = {"name": "f", "arguments": '{"a": null}'}
    row = {
        "functions": [{"name": "f"}],
        "messages": [TURN, {"role": "assistant", "content": None, "function_call": call}],
    }
    record = RowReader("auto", Attr(), "rows.jsonl", None).record(row, "x")
    assert record.messages[1].tool_calls[0]["function"] == {"name": "f", "arguments": {"a": None}}
    assert record.tools[0]["function"] == {"name": "f"}
