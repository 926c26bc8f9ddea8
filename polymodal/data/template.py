"""A conversation as text by the checkpoint's own chat template, and where each message is in that text.

Renders as the tokenizer's `apply_chat_template` does and never reads the template's code. A message is found
by rendering the conversation again with a marker in place of its content: what differs is the message.
Control tokens that a row's text happens to hold are broken in two while it is rendered, so that only those
which the template writes are found, and given back as ranges that are tokenized as ordinary text.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Control, Media, MediaProcessor, Message, Record
from polymodal.data.sandbox import TooMuchWork, bound_templates, compiled, plain_data, template_errors

OPEN, CLOSE = "\ue0f0", "\ue0f1"  # private-use characters around a marker's number
BREAK = "\ue0f2"  # behind the first character of a control token of a row's text; a BREAK of the text is two
_BREAKS = re.compile(f"{BREAK}({BREAK}?)")
WORDS = ("<image>", "<video>", "<audio>")  # placeholders of rows: those in a record's text are words
LONGEST_TOKEN = 100  # characters of a token between turns, and of the space before it
_SMALL = 100_000  # characters of a conversation that no template may need too much work for
_MARKER = re.compile(f"{OPEN}(\\d+){CLOSE}")

Range = tuple[int, int]


def _marker(number: int) -> str:
    return f"{OPEN}{number}{CLOSE}"


@dataclass(frozen=True)
class Layout:
    """A rendered record. Character ranges into `text`, half open.

    spans: of each message, from the first character the model would write (or the message's text, where the
    model writes none of it) through its end-of-turn token; None where it was not asked for. An answer behind
    which the template prints none ends with the token that opens the next turn, the last with one of
    end-of-text, which is added: else the model would not learn to stop. media: (start,
    stop, index in Record.media) of each placeholder, by start. literal: of each control token that the row's
    own text holds, which is tokenized as ordinary text; ascending.
    """

    text: str
    spans: tuple[Range | None, ...]
    media: tuple[tuple[int, int, int], ...]
    literal: tuple[Range, ...] = ()


class Template:
    """Renders records with one chat template. Picklable.

    text: the template, None for the tokenizer's own; kwargs: its further arguments (data.template_kwargs);
    special_tokens: what those of a row's text become (data.special_tokens).
    """

    def __init__(
        self,
        media: MediaProcessor,
        text: str | None,
        kwargs: dict[str, Any],
        special_tokens: Literal["auto", "text", "tokens"] = "auto",
    ):
        self.media = media
        self.tokenizer = media.tokenizer
        self.text = text if text is not None else self.tokenizer.chat_template
        self.kwargs = kwargs
        self.tagged = isinstance(self.text, str) and bool(re.search(r"\{%-?\s*generation\s*-?%\}", self.text))
        added = {t.content: t.special for t in self.tokenizer.added_tokens_decoder.values()}
        special = {token for token, is_special in added.items() if is_special}
        special |= {t for t in (self.tokenizer.eos_token,) if t}
        self._end_of_turn = re.compile(rf"\s*(?:{_any_of(special)})")
        self.marks: dict[str, str] = {}
        for kind in ("image", "video", "audio"):
            try:
                self.marks[kind] = self.media.placeholder(kind)
            except PolymodalError:
                continue  # the model does not take this kind: `places` raises for a record that has it
        self._reserved = {  # token -> kind -> times it stands in the kind's placeholder
            token: {kind: mark.count(token) for kind, mark in self.marks.items()}
            for token in sorted(special)
            if any(token in mark for mark in self.marks.values())
        }
        kept = {*special, *added} if special_tokens == "tokens" else set()
        kept |= set() if special_tokens == "text" else {*self._reserved}
        kept -= {*WORDS}
        words = {token for token in added if not token.isspace()}
        self._literal = re.compile(_any_of({*special, *words} - kept))
        own, any_own = (_Breaking({OPEN, BREAK, *WORDS, *t} - kept) for t in (special, special | words))
        self._breaking, self._breaking_others = {"assistant": own}, any_own
        self._tails: dict[str, str | None] = {}
        self._refused: PolymodalError | None = None

    # -- rendering -----------------------------------------------------------

    def render(self, messages: Sequence[dict], tools: Sequence[Any] = (), generation: bool = False) -> str:
        """Text of messages in the template's form. Raises PolymodalError when the template refuses them."""
        if self.text is None:
            raise PolymodalError(
                "the checkpoint has no chat template.",
                "Give one as data.chat_template, or use format: text for pretraining.",
            )
        if self._refused is not None:
            raise self._refused
        try:
            with template_errors():
                text = self.text if isinstance(self.text, str) else None
                return compiled(self.tokenizer.get_chat_template(text, tools or None)).render(
                    messages=list(messages),
                    tools=list(tools) or None,
                    documents=None,
                    add_generation_prompt=generation,
                    **self._constants,
                )
        except PolymodalError as error:
            if isinstance(error.__context__, TooMuchWork) and len(str(messages)) < _SMALL:
                self._refused = error  # it is the template's fault: no row waits for it again
            raise

    @cached_property
    def _constants(self) -> dict[str, Any]:
        """What the template is given besides messages and tools, as `apply_chat_template` does."""
        return {**self.tokenizer.special_tokens_map, **plain_data(self.kwargs)}

    def dicts(self, messages: Sequence[Message]) -> list[dict]:
        """Messages in the form that templates read: text as a string, with media as a list of parts."""
        out = []
        for message in messages:
            broken = self.breaking(message.role)
            parts = written(message.content, broken)
            if any(isinstance(p, Media) for p in parts):
                content: Any = [self.media.template_content(part) for part in parts]
            else:
                content = self._content("".join(parts))  # type: ignore[arg-type]
            entry: dict[str, Any] = {"role": message.role, "content": content}
            if message.reasoning is not None:
                entry["reasoning_content"] = entry["thinking"] = broken(message.reasoning)
            if message.tool_calls:
                with template_errors():  # nested too deep
                    entry["tool_calls"] = broken(plain_data(list(message.tool_calls)))
            out.append(entry)
        return out

    def breaking(self, role: str) -> _Breaking:
        """What breaks the control tokens in a text of this role.

        Those that the checkpoint does not call special (<think>, <tool_call>) are words of the assistant's.
        """
        return self._breaking.get(role, self._breaking_others)

    def mended(self, layout: Layout) -> Layout:
        """A layout without BREAKs: where they were are ranges of ordinary text."""
        if BREAK not in layout.text:
            return layout
        removed = [match.start() for match in _BREAKS.finditer(layout.text)]
        text = _BREAKS.sub(r"\1", layout.text)

        def moved(place: int) -> int:
            return place - bisect_left(removed, place)

        literal: list[Range] = []
        for place in removed:
            token = self._literal.match(text, moved(place) - 1) if moved(place) else None
            if token and (not literal or literal[-1][1] <= token.start()):
                literal.append(token.span())
        return Layout(
            text,
            tuple(span and (moved(span[0]), moved(span[1])) for span in layout.spans),
            tuple((moved(start), moved(stop), number) for start, stop, number in layout.media),
            tuple(literal),
        )

    def _content(self, text: str) -> Any:
        """Text as a message's content."""
        return text if self._takes_strings else [self.media.template_content(text)] if text else []

    @cached_property
    def _takes_strings(self) -> bool:
        """Whether the template prints a content that is a string; some always want a list of parts."""
        try:
            return _marker(0) in self.render([{"role": "user", "content": _marker(0)}])
        except PolymodalError:
            return self.text is None

    def check(self, record: Record) -> None:
        """Raises PolymodalError when the template would silently leave out something of the record."""
        source = str(self.text)
        thinking = ("reasoning", ".thinking", "'thinking'")
        for what, present, words in (
            ("tools", bool(record.tools), ("tools",)),
            ("tool calls", any(m.tool_calls for m in record.messages), ("tool_calls",)),
            ("reasoning", any(m.reasoning for m in record.messages), thinking),
        ):
            if present and not any(word in source for word in words):
                raise PolymodalError(
                    f"the row has {what}, but the chat template does not print any.",
                    "Give a template that does as data.chat_template, or remove them from the data.",
                )

    def prompt(self, record: Record) -> Layout:
        """The text up to where the model is to answer; a last assistant message is left out."""
        answered = bool(record.messages) and record.messages[-1].role == "assistant"
        messages = record.messages[:-1] if answered else record.messages
        self.check(record)
        text = self.render(self.dicts(messages), self._tools(record), generation=True)
        media = [p for m in messages for p in m.content if isinstance(p, Media)]
        return self.mended(Layout(text, (None,) * len(messages), self.places(text, media)))

    def _tools(self, record: Record) -> list[Any]:
        with template_errors():
            return self._breaking_others(plain_data(list(record.tools))) if record.tools else []

    def layout(self, record: Record, numbers: Collection[int]) -> Layout:
        """Render a record and find its media, and the spans of the messages with these numbers.

        Raises PolymodalError when the template refuses the record, drops a medium, or hides where a message
        ends.
        """
        self.check(record)
        messages, tools = self.dicts(record.messages), self._tools(record)
        text = self.render(messages, tools)
        spans = self._by_tags(text, messages, tools) if self.tagged else {}
        spans |= self._by_markers(text, messages, tools, sorted({*numbers} - {*spans}))
        last = len(messages) - 1
        if messages and messages[-1]["role"] == "assistant" and self._ends_open:
            before, end = spans.get(last), self.tokenizer.eos_token or ""
            if before is None or not text[before[1] :].strip():
                text += end
                spans |= {last: (before[0], len(text))} if before else {}
        places = self.places(text, record.media)
        return self.mended(Layout(text, tuple(spans.get(i) for i in range(len(messages))), places))

    def places(self, text: str, media: Sequence[Media]) -> tuple[tuple[int, int, int], ...]:
        """Where the placeholders of these media are in a rendered text, as in Layout. Raises
        PolymodalError."""
        waiting: dict[str, list[int]] = {}
        for number, medium in enumerate(media):
            if medium.kind not in self.marks:
                self.media.placeholder(medium.kind)  # raises, with the reason
                raise PolymodalError(
                    f"This model does not take {medium.kind}.", "Remove it, or choose another model."
                )
            waiting.setdefault(medium.kind, []).append(number)
        for token, uses in self._reserved.items():
            count = text.count(token)
            if count and count > sum(uses[kind] * len(numbers) for kind, numbers in waiting.items()):
                raise PolymodalError(
                    f"the text holds the token {token}, which stands for a medium to this model.",
                    "Remove it from the data, where <image> and <video> mark media; or set "
                    "data.special_tokens: text to learn such words as ordinary text.",
                )
        out = []
        for kind, numbers in waiting.items():
            found = [match.span() for match in re.finditer(re.escape(self.marks[kind]), text)]
            if len(found) != len(numbers):
                raise PolymodalError(
                    f"the row has {len(numbers)} {kind}(s), the chat template printed {len(found)}.",
                    "Give a template that prints media as data.chat_template.",
                )
            out += [(start, stop, n) for (start, stop), n in zip(found, numbers, strict=True)]
        return tuple(sorted(out))

    # -- where messages are --------------------------------------------------

    def _by_tags(self, text: str, messages: list[dict], tools: Sequence[Any]) -> dict[int, Range]:
        """Spans from the template's {% generation %} blocks, when there is one for each assistant message;
        else {}."""
        from transformers.utils.chat_template_utils import render_jinja_template

        bound_templates()
        with template_errors():
            rendering: Any = render_jinja_template(  # its declared type is wrong
                conversations=[messages],
                tools=list(tools) or None,
                chat_template=self.text,
                return_assistant_tokens_mask=True,
                **{**self.tokenizer.special_tokens_map, **self.kwargs},
            )
        (rendered,), (ranges,) = rendering
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if rendered != text or len(ranges) != len(answers):
            return {}
        spans = {}
        for i, (start, stop) in zip(answers, ranges, strict=True):
            body = text[start:stop].rstrip()
            ends = [m.end() for m in self._end_of_turn.finditer(body)]
            if ends and ends[-1] == len(
                body
            ):  # the block holds the end of turn, and perhaps a line break after it
                stop = start + len(body)
            elif more := self._end_of_turn.match(text, stop):
                stop = more.end()
            spans[i] = (start, stop)
        return spans

    def _by_markers(
        self, text: str, messages: list[dict], tools: Sequence[Any], numbers: list[int]
    ) -> dict[int, Range]:
        """Spans by what changes when markers replace all these messages' contents, or one after the other
        where the template prints other messages differently then. Raises PolymodalError."""
        spans: dict[int, Range] = {}
        if not numbers:
            return spans
        bodies = self._bodies(text, messages, tools, numbers)
        if bodies is None and len(numbers) > 1:
            for i in numbers:
                spans |= self._by_markers(text, messages, tools, [i])
            return spans
        if bodies is None:
            i = numbers[0]
            raise PolymodalError(
                f"the chat template does not show where message {i + 1} ({messages[i]['role']}) begins and "
                "ends.",
                "Put {% generation %} and {% endgeneration %} around the assistant's text in a template of "
                "your own (data.chat_template).",
            )
        for i, (first, after) in zip(numbers, bodies, strict=True):
            start = self._start(text, messages[: i + 1], tools, first)
            start = min(first, after) if start is None or start >= after else start
            spans[i] = (start, self._stop(text, after, messages[i]["role"]))
        return spans

    def _bodies(
        self, text: str, messages: list[dict], tools: Sequence[Any], numbers: list[int]
    ) -> list[Range] | None:
        """What markers in place of these messages replace in the text; None if that is not certain."""
        changed = list(messages)
        for i in numbers:
            changed[i] = {"role": messages[i]["role"], "content": self._content(_marker(i))}
        try:
            pieces = _MARKER.split(self.render(changed, tools))
        except PolymodalError:
            return None
        between = pieces[::2]  # the text before each marker, and after the last
        if pieces[1::2] != [str(i) for i in numbers] or not text.endswith(between[-1]):
            return None
        ends = [len(text) - len(between[-1])]
        for literal in between[-2:0:-1]:
            ends.insert(0, text.rfind(literal, 0, ends[0]))
        bodies, at = [], 0
        for k, end in enumerate(ends):
            first = at + len(_common_prefix(between[k], text, at))
            if end < 0 or (k + 1 < len(ends) and text.find(between[k + 1], first) != end):
                return None  # it is not there, or twice
            bodies.append((first, end))
            at = end
        return bodies

    def _start(self, text: str, messages: list[dict], tools: Sequence[Any], first: int) -> int | None:
        """Where the model begins to write the last message, whose content begins at `first`: after the
        generation prompt; None when unknown."""
        if len(messages) == 1 or messages[-1]["role"] != "assistant":
            return None
        if self._generation_prompt and text.endswith(self._generation_prompt, 0, first):
            return first  # without rendering what goes before: most templates
        try:
            prompt = self.render(messages[:-1], tools, generation=True)
        except PolymodalError:
            return None
        return len(prompt) if text.startswith(prompt) else None

    @cached_property
    def _generation_prompt(self) -> str:
        """What the template prints between a user's question and the answer; "" when it does not print one
        alone."""
        try:
            text = self.render([{"role": "user", "content": self._content(_marker(0))}], generation=True)
        except PolymodalError:
            return ""
        return text.partition(_marker(0))[2]

    @cached_property
    def ends_answers(self) -> bool:
        """Whether answers end with a special token, by which generation stops: the template's, or the
        tokenizer's of end-of-text. True where the template refuses a conversation of one question."""
        return not self._ends_open or bool(self.tokenizer.eos_token)

    @cached_property
    def _ends_open(self) -> bool:
        """Whether the template prints no token behind an answer."""
        tail = self._last_tail("assistant")
        return tail is not None and not self._end_of_turn.search(tail)

    def _last_tail(self, role: str) -> str | None:
        if role not in self._tails:
            self._tails[role] = self._tail(role)
        return self._tails[role]

    def _stop(self, text: str, after: int, role: str) -> int:
        """End of a message whose content ends at `after`: behind its end-of-turn token, if it has one."""
        tail = self._last_tail(role)
        if role == "assistant" and self._ends_open:
            tail = text[after : after + LONGEST_TOKEN]  # what opens the next turn
        if tail is None:  # then only the end-of-text token is sure not to open the next turn
            eos = self.tokenizer.eos_token
            return after + len(eos) if eos and text.startswith(eos, after) else after
        end = self._end_of_turn.match(_common_prefix(tail, text, after))
        return after + end.end() if end else after

    def _tail(self, role: str) -> str | None:
        """What the template prints after the content of a last message of this role; None when it prints
        none alone."""
        opening = [] if role in ("system", "user") else [{"role": "user", "content": self._content("a")}]
        try:
            text = self.render([*opening, {"role": role, "content": self._content(_marker(0))}])
        except PolymodalError:
            return None
        return text.rpartition(_marker(0))[2] if text.count(_marker(0)) == 1 else None


class _Breaking:
    """Breaks each of these tokens in strings, also within lists and objects, behind its first character."""

    def __init__(self, tokens: Collection[str]):
        self.beginnings = tuple(sorted({token[0] for token in tokens}))
        self.tokens = re.compile(_any_of(tokens))

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Control):
            return value
        if isinstance(value, str):
            if not any(beginning in value for beginning in self.beginnings):  # most texts
                return value
            return self.tokens.sub(lambda match: match[0][0] + BREAK + match[0][1:], value)
        if isinstance(value, dict):
            return {self(key): self(item) for key, item in value.items()}
        return [self(item) for item in value] if isinstance(value, (list, tuple)) else value


def _any_of(tokens: Collection[str]) -> str:
    """Expression of any of these, the longest first."""
    return "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or "(?!)"


def written(parts: Sequence[str | Media], broken: Callable[[str], str]) -> list[str | Media]:
    """Parts as a template is given them: control tokens of a row's own text broken, those that the program
    writes (Control) whole."""
    return joined([p if isinstance(p, Media) else str(broken(p)) for p in joined(parts)])


def joined(parts: Sequence[str | Media]) -> list[str | Media]:
    """Parts with texts that follow each other as one; each Control by itself."""
    out: list[str | Media] = []
    for part in parts:
        last = out[-1] if out else None
        if type(part) is str and type(last) is str:
            out[-1] = last + part
        else:
            out.append(part)
    return out


def _common_prefix(literal: str, text: str, at: int) -> str:
    """What a literal and the text from a position on share; characters are compared only if they differ."""
    if text.startswith(literal, at):
        return literal
    return os.path.commonprefix([literal, text[at : at + len(literal)]])
