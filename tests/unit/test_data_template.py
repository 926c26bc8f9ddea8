"""What is learned: the assistant's words through their end of turn, under any chat template."""

from __future__ import annotations

import pickle
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Message, Record
from polymodal.train.layouts.packed import Packed
from tests.unit.media_fixtures import (
    TALK,
    TRIMMING,
    WHERE,
    image,
    learned,
    record,
    refused,
    templated,
)

# labels


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
    "no end of turn": (NO_END, {}, ["\nfirst<|box_start|>", "\nsecond<|im_end|>"]),
    "content as parts": (PARTS, {}, ["first<|im_end|>", "second<|im_end|>"]),
    "generation tags": (TAGGED, {}, ["FIRST<|im_end|>", "SECOND<|im_end|>"]),
    "generation tags without the end": (TAGGED_INSIDE, {}, ["FIRST<|im_end|>", "SECOND<|im_end|>"]),
    "no message stands alone": (NUMBERED, {}, ["first<|im_end|>", "second<|im_end|>"]),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_assistants_text_is_found_in_any_template(qwen, tmp_path, name):
    template, kwargs, expected = TEMPLATES[name]
    chat = templated(qwen, tmp_path, template, kwargs)
    text = chat.template.layout(record(*TALK), [2, 4])
    assert [text.text[slice(*text.spans[i])] for i in (2, 4)] == expected
    assert [t for t, *_ in learned(chat, record(*TALK))] == expected
    assert chat.measure([record(*TALK)]) == [chat.sample(record(*TALK)).measure]
    for i in (2, 4):  # one message alone, and both at once
        assert chat.template.layout(record(*TALK), [i]).spans[i] == text.spans[i]


def test_thoughts_inside_the_content_are_found_though_the_template_moves_them(qwen, tmp_path):
    chat = templated(qwen, tmp_path, THINKING)
    row = record(
        ("user", "a"),
        ("assistant", "<think>\nold\n</think>\n\nfirst"),
        ("user", "b"),
        ("assistant", "<think>\nnew\n</think>\n\nsecond"),
    )
    assert learned(chat, row) == [("first<|im_end|>", 1), ("<think>\nnew\n</think>\n\nsecond<|im_end|>", 1)]
    answers = record(("user", "a"), ("assistant", "first"), ("user", "b"), ("assistant", "second"))
    last = replace(answers.messages[3], reasoning="new")
    answers = replace(answers, messages=(*answers.messages[:3], last))
    assert learned(chat, answers) == [
        ("first<|im_end|>", 1),
        ("<think>\nnew\n</think>\n\nsecond<|im_end|>", 1),
    ]


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
    spans = chat.template.layout(row, [1, 3, 5]).spans
    assert [chat.template.layout(row, [i]).spans[i] for i in (1, 3, 5)] == [spans[i] for i in (1, 3, 5)]


# bad input


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


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}",
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{% if not loop.last %}{{ eos_token }}{% endif %}{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    ],
)
def test_answers_end_by_the_templates_token_or_by_the_end_of_text(qwen, tmp_path, template):
    chat = templated(qwen, tmp_path, template)
    assert not without_end(chat).template.ends_answers and chat.template.ends_answers
    assert learned(chat, record(*TALK))[-1][0].endswith(chat.media.tokenizer.eos_token)
    assert qwen().template.ends_answers and without_end(qwen()).template.ends_answers


def without_end(chat):
    """The same with a tokenizer that has no end-of-text token."""
    chat = pickle.loads(pickle.dumps(chat))
    chat.template.tokenizer.eos_token = None
    return chat


def test_check_and_train_warn_of_answers_without_an_end(qwen, tmp_path):
    endless = without_end(templated(qwen, tmp_path, "{% for m in messages %}{{ m.content }} {% endfor %}"))
    warnings = partial(Packed.warnings, SimpleNamespace(asks=False))
    assert "does not learn to end one" in warnings([record(*TALK)], endless)[0]
    assert warnings([record(*TALK)], qwen()) == []
    assert warnings([replace(record(*TALK), plain=True)], endless) == []


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
