"""A conversation as text by the checkpoint's own chat template, and where each message lies in that text.

Part of the data room: sees errors and core/sample.py; renders with the tokenizer's `apply_chat_template` and never
reads the template's code. A message's place is found by rendering the same conversation with marks in place of its
texts: what lies between the marks is the template's own, whatever the template is.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Media, MediaProcessor, Message, Record

OPEN, CLOSE = "\ue0f0", "\ue0f1"  # private characters around a mark's number
_MARK = re.compile(f"{OPEN}(\\d+){CLOSE}")
_KEPT = 4096  # shapes of conversations remembered


@dataclass(frozen=True)
class Layout:
    """A rendered record. Character ranges into `text`, half open.

    spans: of each message, from the first character the model would write (or the message's text, where the model
    writes none of it) through its end-of-turn token; None where it was not asked for. media: (start, stop, number in
    Record.media) of each placeholder, by start.
    """

    text: str
    spans: tuple[tuple[int, int] | None, ...]
    media: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class _Scaffold:
    """The template's own text for one shape of conversation: literals with slots between them.

    slots: number of the text in each slot; edges: for each message its span as two (literal, offset in it).
    """

    literals: tuple[str, ...]
    slots: tuple[int, ...]
    edges: tuple[tuple[tuple[int, int], tuple[int, int]] | None, ...]


class Template:
    """Renders records with one chat template. Picklable.

    text: the template, None for the tokenizer's own; kwargs: its further arguments (data.template_kwargs).
    """

    def __init__(self, media: MediaProcessor, text: str | None, kwargs: dict[str, Any]):
        self.media = media
        self.tokenizer = media.tokenizer
        self.text = text if text is not None else self.tokenizer.chat_template
        self.kwargs = kwargs
        self.tagged = (
            isinstance(self.text, str) and re.search(r"\{%-?\s*generation\s*-?%\}", self.text) is not None
        )
        special = {t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special}
        special |= {t for t in (self.tokenizer.eos_token,) if t}
        names = "|".join(re.escape(t) for t in sorted(special, key=len, reverse=True)) or "(?!)"
        self._end_of_turn = re.compile(rf"\s*(?:{names})")
        self.marks: dict[str, str] = {}
        for kind in ("image", "video", "audio"):
            try:
                self.marks[kind] = self.media.placeholder(kind)
            except PolymodalError:
                continue  # this model does not take the kind; a row that brings it hears so
        self._reserved = {  # token -> kind -> times it stands in the kind's placeholder
            t: {k: m.count(t) for k, m in self.marks.items()}
            for t in sorted(special)
            if any(t in m for m in self.marks.values())
        }
        self._strings: bool | None = None
        self._scaffolds: OrderedDict[Any, _Scaffold | None] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_scaffolds": OrderedDict()}

    # -- rendering ----------------------------------------------------------------------------------------------

    def render(self, messages: Sequence[Any], tools: Sequence[Any] = (), generation: bool = False) -> Any:
        """Text of messages in the template's form; a list of texts for a list of conversations.

        Raises PolymodalError when the template refuses them.
        """
        import jinja2

        if self.text is None:
            raise PolymodalError(
                "the checkpoint has no chat template.",
                "Give one as data.chat_template, or use format: text for pretraining.",
            )
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tools=list(tools) or None, chat_template=self.text if isinstance(self.text, str) else None,
                tokenize=False, add_generation_prompt=generation, **self.kwargs,
            )  # fmt: skip
        except jinja2.TemplateError as error:
            raise PolymodalError(
                f"the chat template refuses this conversation: {error}.",
                "Mend the order of roles, or give another template as data.chat_template.",
            ) from None
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise PolymodalError(
                f"the chat template fails on this conversation: {type(error).__name__}: {error}.",
                "Give another template as data.chat_template.",
            ) from None

    def dicts(self, messages: Sequence[Message]) -> list[dict]:
        """Messages in the form that templates read: text as a string, with media as a list of parts."""
        out = []
        strings = self._takes_strings()
        for message in messages:
            parts = message.content
            content: Any = parts[0] if len(parts) == 1 else "".join(p for p in parts if isinstance(p, str))
            if not strings or any(isinstance(p, Media) for p in parts):
                content = [self.media.template_content(p) for p in parts]
            entry: dict[str, Any] = {"role": message.role, "content": content}
            if message.reasoning is not None:
                entry["reasoning_content"] = message.reasoning
            if message.tool_calls:
                entry["tool_calls"] = list(message.tool_calls)
            out.append(entry)
        return out

    def _takes_strings(self) -> bool:
        """Whether the template prints a content that is a string; some want a list of parts always."""
        if self._strings is None:
            mark = f"{OPEN}0{CLOSE}"
            try:
                self._strings = mark in self.render([{"role": "user", "content": mark}])
            except PolymodalError:
                self._strings = self.text is None
        return self._strings

    def check(self, record: Record) -> None:
        """Raises PolymodalError when the template would leave something of the record out in silence."""
        source = str(self.text)
        for what, there, words in (
            ("tools", bool(record.tools), ("tools",)),
            ("tool calls", any(m.tool_calls for m in record.messages), ("tool_calls",)),
            (
                "reasoning",
                any(m.reasoning for m in record.messages),
                ("reasoning", ".thinking", "'thinking'"),
            ),
        ):
            if there and not any(word in source for word in words):
                raise PolymodalError(
                    f"the row has {what}, but the chat template does not print any.",
                    "Give a template that does as data.chat_template, or remove them from the data.",
                )

    def prompt(self, record: Record) -> Layout:
        """The text up to where the model is to answer; a last assistant message is left out."""
        messages = (
            record.messages[:-1]
            if record.messages and record.messages[-1].role == "assistant"
            else record.messages
        )
        self.check(record)
        text = self.render(self.dicts(messages), record.tools, generation=True)
        return Layout(
            text,
            (None,) * len(messages),
            self.places(text, [p for m in messages for p in m.content if isinstance(p, Media)]),
        )

    def texts(self, records: Sequence[Record]) -> list[str | None]:
        """Records rendered in one call, which is a fifth faster; None for those that must be rendered alone."""
        out: list[str | None] = [None] * len(records)
        if self.text is None or self.tagged:
            return out
        together: list[tuple[int, list[dict]]] = []
        for n, record in enumerate(records):
            if not record.plain and not record.tools:
                with contextlib.suppress(PolymodalError):
                    together.append((n, self.dicts(record.messages)))
        if together:
            with contextlib.suppress(PolymodalError):  # one record that the template refuses spoils the call
                rendered = self.render([messages for _, messages in together])
                for (n, _), text in zip(together, rendered, strict=True):
                    out[n] = text
        return out

    def layout(self, record: Record, wanted: Collection[int], text: str | None = None) -> Layout:
        """Render a record and find its media and the spans of the wanted messages (by number).

        text: the record as rendered by `texts`. Raises PolymodalError when the template refuses the record, drops a medium, or hides where a message ends.
        """
        self.check(record)
        if text is not None:
            spans = self._by_scaffold(text, record)
        elif self.tagged:
            text, spans = self._by_tags(self.dicts(record.messages), record)
        else:
            text = self.render(self.dicts(record.messages), record.tools)
            spans = self._by_scaffold(text, record)
        if spans is None or any(spans[i] is None for i in wanted):
            found = self._by_search(text, self.dicts(record.messages), record, wanted)
            spans = found if spans is None else [a or b for a, b in zip(spans, found, strict=True)]
        return Layout(text, tuple(spans), self.places(text, record.media))

    def places(self, text: str, media: Sequence[Media]) -> tuple[tuple[int, int, int], ...]:
        """Where the placeholders of these media are in a rendered text, as in Layout. Raises PolymodalError."""
        waiting: dict[str, list[int]] = {}
        for number, medium in enumerate(media):
            if medium.kind not in self.marks:
                self.media.placeholder(medium.kind)  # says why the model does not take it
                raise PolymodalError(
                    f"This model does not take {medium.kind}.", "Remove it, or choose another model."
                )
            waiting.setdefault(medium.kind, []).append(number)
        for token, uses in self._reserved.items():
            count = text.count(token)
            if count and count > sum(uses[k] * len(n) for k, n in waiting.items()):
                raise PolymodalError(
                    f"the text holds the token {token}, which stands for a medium to this model.",
                    "Remove it from the data; <image> and <video> mark media there.",
                )
        out = []
        for kind, numbers in waiting.items():
            mark, places, at = self.marks[kind], [], -1
            while (at := text.find(mark, at + 1)) >= 0:
                places.append((at, at + len(mark)))
            if len(places) != len(numbers):
                raise PolymodalError(
                    f"the row has {len(numbers)} {kind}(s), the chat template printed {len(places)}.",
                    "Give a template that prints media as data.chat_template.",
                )
            out += [(a, b, n) for (a, b), n in zip(places, numbers, strict=True)]
        return tuple(sorted(out))

    # -- where messages are -------------------------------------------------------------------------------------

    def _by_tags(
        self, messages: list[dict], record: Record
    ) -> tuple[str, list[tuple[int, int] | None] | None]:
        """Spans from the template's {% generation %} blocks, when there is one for each assistant message."""
        from transformers.utils.chat_template_utils import render_jinja_template

        text = self.render(messages, record.tools)
        answer: Any = render_jinja_template(  # its declared type is wrong
            conversations=[messages], tools=list(record.tools) or None, chat_template=self.text,
            return_assistant_tokens_mask=True, **{**self.tokenizer.special_tokens_map, **self.kwargs},
        )  # fmt: skip
        rendered, blocks = answer
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if rendered[0] != text or len(blocks[0]) != len(answers):
            return text, None
        spans: list[tuple[int, int] | None] = [None] * len(messages)
        for i, (start, stop) in zip(answers, blocks[0], strict=True):
            body = text[start:stop].rstrip()
            ends = [m.end() for m in self._end_of_turn.finditer(body)]
            if ends and ends[-1] == len(body):
                stop = start + len(
                    body
                )  # the block holds the end of turn, and perhaps the line break after it
            elif more := self._end_of_turn.match(text, stop):
                stop = more.end()
            spans[i] = (start, stop)
        return text, spans

    def _outline(self, record: Record) -> tuple[tuple, list[str], set[int]]:
        """(the record's shape; its texts in the order of the marks that stand for them; numbers of those marks that
        stand for more than their text: that of a message with tool calls)."""
        strings = self._takes_strings()
        shape: list[Any] = [bool(record.tools)]
        values: list[str] = []
        free: set[int] = set()
        for message in record.messages:
            if message.reasoning is not None:
                values.append(message.reasoning)
            parts = _shape(message, strings)
            if parts == ("",) and len(message.content) != 1:
                values.append("".join(message.content))  # type: ignore[arg-type]
            else:
                values.extend([p for p in message.content if isinstance(p, str)])
            if message.tool_calls and "" in parts:
                free.add(len(values) - 1)
            shape.append((message.role, message.reasoning is not None, bool(message.tool_calls), parts))
        return tuple(shape), values, free

    def _by_scaffold(self, text: str, record: Record) -> list[tuple[int, int] | None] | None:
        """Spans by laying the scaffold of the record's shape over its text; None when it does not fit exactly."""
        key, values, free = self._outline(record)
        if key in self._scaffolds:
            scaffold = self._scaffolds[key]
            self._scaffolds.move_to_end(key)
        else:
            scaffold = self._scaffolds[key] = self._scaffold(record)
            if len(self._scaffolds) > _KEPT:
                self._scaffolds.popitem(last=False)
        if scaffold is None:
            return None
        literals, slots = scaffold.literals, scaffold.slots
        if not text.startswith(literals[0]):
            return None
        bases = [0]  # where each literal begins in the text
        at = len(literals[0])
        for n, slot in enumerate(slots):
            following, last = literals[n + 1], n + 1 == len(slots)
            value = values[slot] if slot < len(values) else ""
            if slot in free or slot >= len(values):
                stop = (
                    len(text) - len(following)
                    if last
                    else text.find(following, at + len(value))
                    if following
                    else -1
                )
                if stop < at or (slot < len(values) and not text.startswith((value, value.strip()), at)):
                    return None
            else:
                stop = -1
                for form in (value, value.strip(), value.lstrip("\n"), value.rstrip()):
                    end = at + len(form)
                    if (
                        text.startswith(form, at)
                        and text.startswith(following, end)
                        and (not last or end + len(following) == len(text))
                    ):
                        stop = end
                        break
                if stop < 0:
                    return None
            if not text.startswith(following, stop):
                return None
            bases.append(stop)
            at = stop + len(following)
        if at != len(text):
            return None
        return [
            None if e is None else (bases[e[0][0]] + e[0][1], bases[e[1][0]] + e[1][1])
            for e in scaffold.edges
        ]

    def _scaffold(self, record: Record) -> _Scaffold | None:
        number = 0
        marked: list[Message] = []
        owner: dict[int, int] = {}

        def mark() -> str:
            nonlocal number
            owner[number] = len(marked)
            number += 1
            return f"{OPEN}{number - 1}{CLOSE}"

        strings = self._takes_strings()
        for message in record.messages:
            reasoning = mark() if message.reasoning is not None else None
            content = tuple(mark() if part == "" else Media(part, "x") for part in _shape(message, strings))  # type: ignore[arg-type]
            marked.append(Message(message.role, content, None, (), reasoning))
        messages = self.dicts(marked)
        tools = [f"{OPEN}{number}{CLOSE}"] if record.tools else []
        try:
            text = self.render(messages, tools)
        except PolymodalError:
            return None  # it looks into the texts; the search will say more
        pieces = _MARK.split(text)
        literals, slots = tuple(pieces[::2]), tuple(int(s) for s in pieces[1::2])
        if len(set(slots)) != len(slots) or not slots:
            return None
        starts, at = [], 0  # of each literal in the marked text
        for n, literal in enumerate(literals):
            starts.append(at)
            at += len(literal) + (len(f"{OPEN}{slots[n]}{CLOSE}") if n < len(slots) else 0)
        edges: list[Any] = []
        for i in range(len(messages)):
            mine = [n for n, s in enumerate(slots) if owner.get(s) == i]
            if not mine:
                edges.append(None)
                continue
            first = starts[mine[0]] + len(literals[mine[0]])
            after = starts[mine[-1] + 1]
            start = self._start(text, messages, i, tools, first)
            tail = self._tail(messages[: i + 1], tools, f"{OPEN}{slots[mine[-1]]}{CLOSE}")
            stop = self._stop(text, after, tail)
            edges.append((_edge(start, starts, literals), _edge(stop, starts, literals)))
        return _Scaffold(literals, slots, tuple(edges))

    def _start(self, text: str, messages: list[dict], i: int, tools: Sequence[Any], first: int) -> int:
        """Where the model begins to write message i: after the generation prompt, else at the message's text."""
        if i and messages[i]["role"] == "assistant":
            try:
                prompt = self.render(messages[:i], tools, generation=True)
            except PolymodalError:
                return first
            if text.startswith(prompt) and len(prompt) <= first:
                return len(prompt)
        return first

    def _tail(self, messages: list[dict], tools: Sequence[Any], mark: str) -> str | None:
        """What the template prints after a mark in the last message; None when it will not stop there."""
        try:
            text = self.render(messages, tools)
        except PolymodalError:
            return None
        return text.rpartition(mark)[2] if text.count(mark) == 1 else None

    def _stop(self, text: str, after: int, tail: str | None) -> int:
        """End of a message that ends its words at `after`: behind its end-of-turn token, when it has one."""
        if tail is None:  # then only the end-of-text token is sure not to open the next turn
            eos = self.tokenizer.eos_token
            return after + len(eos) if eos and text.startswith(eos, after) else after
        common = os.path.commonprefix([tail, text[after : after + len(tail)]])
        end = self._end_of_turn.match(common)
        return after + end.end() if end else after

    def _by_search(
        self, text: str, messages: list[dict], record: Record, wanted: Collection[int]
    ) -> list[tuple[int, int] | None]:
        """Spans for texts that the template changes: message by message, what changes when a mark replaces it."""
        spans: list[tuple[int, int] | None] = [None] * len(messages)
        mark = f"{OPEN}0{CLOSE}"
        for i in wanted:
            role = messages[i]["role"]
            content = mark if self._takes_strings() else [self.media.template_content(mark)]
            changed = [*messages[:i], {"role": role, "content": content}, *messages[i + 1 :]]
            try:
                other = self.render(changed, record.tools)
            except PolymodalError:
                other = ""
            before, found, behind = other.partition(mark)
            if not found or mark in behind or not text.endswith(behind):
                raise self._hidden(i, role)
            first = len(os.path.commonprefix([text, before]))
            after = len(text) - len(behind)
            start = self._start(text, messages, i, record.tools, after)
            start = start if start < after else min(first, after)
            spans[i] = (start, self._stop(text, after, self._tail(changed[: i + 1], record.tools, mark)))
        return spans

    def _hidden(self, i: int, role: str) -> PolymodalError:
        return PolymodalError(
            f"the chat template does not show where message {i + 1} ({role}) begins and ends.",
            "Put {% generation %} and {% endgeneration %} around the assistant's text in a template of your own (data.chat_template).",
        )


def _shape(message: Message, strings: bool) -> tuple[str, ...]:
    """A content's parts: "" for text, the kind for a medium. Texts alone are one, as they are rendered."""
    parts = tuple(["" if isinstance(p, str) else p.kind for p in message.content])
    return ("",) if strings and parts.count("") == len(parts) else parts


def _edge(position: int, starts: Sequence[int], literals: Sequence[str]) -> tuple[int, int]:
    """A place in the marked text as (literal, offset): it holds whatever the slots are filled with."""
    for n in range(len(literals)):
        if starts[n] <= position <= starts[n] + len(literals[n]):
            return n, position - starts[n]
    raise AssertionError("a span's edge lies inside a mark")
