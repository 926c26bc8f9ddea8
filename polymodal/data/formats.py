"""How a row becomes a Record: MLLM JSON, ShareGPT, LLaVA, Alpaca, OpenAI messages, speech with its text,
plain text.

All chat formats have one reader, for they differ in names only: `<image>`, `<video>`, `<audio>` in a text
stand for the next entry of the row's list of that kind, and their number must equal the list's length; when
a row has media and not one placeholder of that kind, the media go to the start of the first user turn. Typed
parts ({"type": "image", ...}) carry their own medium. Errors raised here get the row's file and line in
`RowReader.record`.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from string import ascii_uppercase
from typing import Any

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Media, Message, Record
from polymodal.core.text import parse_json
from polymodal.data import box_columns, prompt_rows, rankings
from polymodal.data.captions import caption_record, is_caption_row
from polymodal.data.files import AUDIO
from polymodal.data.media_pairs import compares_media, pair_record
from polymodal.data.references import KINDS, Kind, References, first, listed, member_named, row_members
from polymodal.recipe import Attr

MESSAGES = ("messages", "conversations")
PROMPTS = ("instruction", "prompt", "query", "question")
ANSWERS = ("output", "response", "completion", "answer")
TRANSCRIPTS = ("text", "sentence", "transcription", "transcript")
CODES, REFERENCE = "audio_codes", "ref_audio"
"""Columns of rows for models that speak: a codec's tokens [frames][codebooks] of the audio, and a recording
of the voice."""
TEXT_COLUMNS = (
    *MESSAGES,
    "tools",
    "prompt",
    "completion",
    "history",
    "images",
    "videos",
    "audios",
    "objects",
)
"""Columns that hold no media under a name that is not known."""
ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "model", "bot", "chatgpt", "bing", "bard"),
    "tool": ("tool", "observation", "tool_response", "function", "function_response", "ipython"),
    "call": ("function_call", "tool_call"),
}
TEXT_TYPES = ("text", "input_text", "output_text", "refusal")


class _Literal(str):
    """Text in which <image> is ordinary text."""


class _Slot(str):
    """A typed part without a source: the next entry of the row's list of this kind."""


class RowReader:
    """Rows of one file -> Records. Picklable.

    attr: the field names of this dataset. Relative media paths start from media_dir; see References.
    """

    def __init__(self, format: str, attr: Attr, path: str, media_dir: str | None):
        self.format = format
        self.attr = attr
        self.references = References(attr, path, media_dir)
        self.parquet = path.endswith(".parquet")  # structs there have every key, with null for absent
        own = {
            "user": attr.user,
            "assistant": attr.assistant,
            "tool": attr.observation,
            "call": attr.function,
        }
        self.roles = {name: role for role, names in ROLES.items() if not own.get(role) for name in names}
        self.roles |= {name: role for role, name in own.items() if name}

    def record(self, row: Mapping[str, Any], where: str) -> Record:
        """Raises PolymodalError with `where`, the key, the cause and a fix."""
        try:
            return self._record(row, where)
        except PolymodalError as error:
            raise error.at(where) from None

    def _record(self, row: Mapping[str, Any], where: str) -> Record:
        kind = self._kind(row)
        if kind == "caption":
            return caption_record(row, where, self.attr, self.references)
        if kind == "asr":
            return Record(self._speech_turns(row), where, extra=_extra(row, speech=True) | self._voice(row))
        if kind == "media pair":
            return pair_record(row, where, self.attr, self.references)
        if kind == "preference":
            return self._compared(row, where)
        if kind == "prompt":
            return self._asked(row, where)
        turns = {"chat": self._chat, "alpaca": self._alpaca, "text": self._plain}[kind](row)
        plain = kind == "text"
        self._place_media(turns, row, plain)
        box_columns.place(turns, row, self.attr)
        messages = _messages(turns)
        tools = self._tools(row) if kind == "chat" else ()
        audio = any(isinstance(p, Media) and p.kind == "audio" for m in messages for p in m.content)
        return Record(messages, where, tools, _extra(row, audio and ("start" in row or "end" in row)), plain)

    def _compared(self, row: Mapping[str, Any], where: str) -> Record:
        """Answers to one prompt, a conversation each, the first alone in `messages`; answers alone are
        learned. Media of the row are placed in each conversation."""
        ranked = rankings.read(row, self.attr)
        if not ranked.answers:
            raise PolymodalError("the row has no answer with a rating.", "Leave the row out.")
        conversations = []
        for number, answer in enumerate(ranked.answers):
            own = dict(ranked.media[number]) if ranked.media else {}
            prompt = own.pop("__prompt__", ranked.prompt)
            turns = [self._turn(turn, f"prompt[{n}]") | {"weight": 0.0} for n, turn in enumerate(prompt)]
            for n, turn in enumerate(answer):
                made = self._turn(turn, f"answer {number + 1}[{n}]")
                turns.append(made | {"weight": 1.0 if made["role"] == "assistant" else 0.0})
            self._add_system(turns, row)
            named = {**row, "image": row["img_path"]} if "img_path" in row else row  # VLFeedback
            self._place_media(turns, {**named, **own}, False)
            conversations.append(_messages(turns))
        extra = _extra(row, False)
        first, *others = conversations
        return Record(first, where, self._tools(row), extra, False, tuple(others), ranked.scores)

    def _asked(self, row: Mapping[str, Any], where: str) -> Record:
        """A conversation up to an answer; what is expected and the row's columns are in `extra`."""
        asked, expected = prompt_rows.turns(row, self.attr)
        turns = [self._turn(turn, f"prompt[{n}]") | {"weight": 0.0} for n, turn in enumerate(asked)]
        self._add_system(turns, row)
        self._place_media(turns, row, False)
        extra = {"answers": tuple(expected), "columns": prompt_rows.columns(row)}
        if isinstance(options := listed(row.get("options", row.get("choices"))), (list, Mapping)):
            lettered = zip(ascii_uppercase, options, strict=False)
            named = options.items() if isinstance(options, Mapping) else lettered
            extra["options"] = {str(key): str(value) for key, value in named}
        return Record(_messages(turns), where, self._tools(row), extra)

    def _kind(self, row: Mapping[str, Any]) -> str:
        a = self.attr
        if self.format in ("mllm", "sharegpt", "llava", "openai"):
            return "chat"
        if self.format in ("auto", "preference") and compares_media(row, a):
            return "media pair"
        if self.format in ("alpaca", "text", "caption", "asr", "preference", "prompt"):
            return self.format
        if a.messages is None and a.response is None and rankings.compares(row, a):
            return "preference"
        answered = first(row, a.response, ANSWERS)[0] is not None
        if first(row, a.messages, MESSAGES)[0] is not None or _prompt_turns(row, a):
            return "chat"
        if answered and first(row, a.prompt, PROMPTS)[0] is not None:
            return "alpaca"
        if is_caption_row(row, a):
            return "caption"
        spoken = self._audio(row)[0] is not None or row.get(CODES) is not None
        if spoken and first(row, a.response, TRANSCRIPTS)[0] is not None:
            return "asr"
        if isinstance(row.get("text"), str):
            return "text"
        columns = ", ".join(k for k in row if not k.startswith("__")) or "none"
        raise PolymodalError(
            f"no known format has these columns: {columns}.",
            "Expected messages or conversations, instruction and output, text, audio with its text, or a "
            "picture's or clip's path with its caption (cap); else name yours in data.attr (for example "
            "data.attr.messages=dialog, or data.attr.prompt=ask data.attr.response=reply).",
        )

    def _plain(self, row: Mapping[str, Any]) -> list[dict]:
        text, key = first(row, self.attr.prompt, ("text", "content"))
        if not isinstance(text, str):
            raise PolymodalError(
                f"the column `{key}` of plain text is missing or no string.",
                "Name the column in data.attr.prompt.",
            )
        return [{"role": "assistant", "parts": [text]}]

    # -- conversations -------------------------------------------------------

    def _chat(self, row: Mapping[str, Any]) -> list[dict]:
        value, key = first(row, self.attr.messages, MESSAGES)
        value = listed(value)
        if value is None and (turns := _prompt_turns(row, self.attr)):
            value, key = turns, "prompt"
        if value is None:
            raise PolymodalError(
                f"the column `{key}` is missing.",
                "Name the column of the conversation in data.attr.messages.",
            )
        if not isinstance(value, list) or not value:
            kind = "empty" if value == [] else f"a {type(value).__name__}"
            raise PolymodalError(
                f"`{key}` is a list of turns, here it is {kind}.",
                'Write [{"role": "user", "content": ...}, ...].',
            )
        turns = [self._turn(message, f"{key}[{n}]") for n, message in enumerate(value)]
        self._add_system(turns, row)
        return turns

    def _add_system(self, turns: list[dict], row: Mapping[str, Any]) -> None:
        """The row's system column, unless the conversation has its own."""
        system, key = first(row, self.attr.system, ("system",))
        if not system or any(t["role"] == "system" for t in turns):
            return
        if not isinstance(system, str):
            raise PolymodalError(
                f"`{key}` is the system prompt as a string, here it is a {type(system).__name__}.",
                "Write text, or leave it out.",
            )
        turns.insert(0, {"role": "system", "parts": [system]})

    def _turn(self, message: Any, at: str) -> dict:
        if not isinstance(message, Mapping):
            raise PolymodalError(
                f"`{at}` is an object with a role and a content, here it is a {type(message).__name__}.",
                'Write {"role": "user", "content": ...}.',
            )
        role_key, content_key = self.attr.role, self.attr.content
        if not role_key:
            role_key = "from" if message.get("role") is None and "from" in message else "role"
        if not content_key:
            content_key = "value" if message.get("content") is None and "value" in message else "content"
        name = message.get(role_key)
        if name is None:
            raise PolymodalError(f"`{at}` has no `{role_key}`.", "Name the speaker's key in data.attr.role.")
        role = self.roles.get(name) or self.roles.get(name.lower()) if isinstance(name, str) else None
        if role is None:
            raise PolymodalError(
                f"`{at}.{role_key}` = {name!r} is no known role ({', '.join(self.roles)}).",
                "Name yours in data.attr.user, .assistant, .observation or .function.",
            )
        content = message.get(content_key)
        turn: dict[str, Any] = {"role": role}
        if role == "call":
            turn = {"role": "assistant", "parts": [], "tool_calls": _calls(content, f"{at}.{content_key}")}
        else:
            if len(message) > 2 or content is None:  # most turns have a role and a content, nothing more
                turn |= self._thoughts_and_calls(message, at)
            if content is None and len(turn) == 1:
                raise PolymodalError(
                    f"`{at}` has no `{content_key}`.", "Name the key of the text in data.attr.content."
                )
            turn["parts"] = self._parts(content, f"{at}.{content_key}")
        weight = message.get("weight")
        if weight is not None:
            if not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
                raise PolymodalError(
                    f"`{at}.weight` = {weight!r} is no number from 0.",
                    "0 leaves the turn out of the loss, 1 is a turn's usual weight.",
                )
            turn["weight"] = float(weight)
        return turn

    def _thoughts_and_calls(self, message: Mapping[str, Any], at: str) -> dict[str, Any]:
        out: dict[str, Any] = {}
        calls = listed(message.get("tool_calls") or message.get("function_call"))
        if calls:
            out["tool_calls"] = _calls(_without_null(calls) if self.parquet else calls, f"{at}.tool_calls")
        for key in ("thinking", "reasoning", "reasoning_content"):
            if isinstance(message.get(key), str) and message[key]:
                out["reasoning"] = message[key]
        return out

    def _parts(self, content: Any, at: str) -> list[Any]:
        """Text, Media and _Slots."""
        if content is None:
            return []
        if isinstance(content, str):
            return [content]
        if not isinstance(content, list):
            raise PolymodalError(
                f"`{at}` is text or a list of typed parts, here it is a {type(content).__name__}.",
                'Write a string, or [{"type": "text", "text": ...}, ...].',
            )
        return [
            _Literal(part) if isinstance(part, str) else self._part(part, f"{at}[{n}]")
            for n, part in enumerate(content)
        ]

    def _part(self, part: Any, at: str) -> Any:
        name = part.get("type") if isinstance(part, Mapping) else None
        untyped = name is None and isinstance(part, Mapping) and isinstance(part.get("text"), str)
        if untyped or name in TEXT_TYPES:
            text = part.get("refusal" if name == "refusal" else "text")
            if not isinstance(text, str):
                raise PolymodalError(f"`{at}` has no `text`.", 'Write {"type": "text", "text": ...}.')
            return _Literal(text)
        for kind in KINDS:
            if name is None and isinstance(part, Mapping) and part.get(kind) is not None:
                return self.references.medium(kind, part[kind], at)
            if isinstance(name, str) and name.removeprefix("input_") in (kind, f"{kind}_url"):
                for key in (name, kind, f"{kind}_url", "url", "path", "bytes", "data"):
                    if part.get(key) is not None:
                        return self.references.medium(kind, part[key], at)
                return _Slot(kind)
        raise PolymodalError(
            f"`{at}.type` = {name!r} is no known part.",
            "Known: text, image, image_url, video, video_url, audio, audio_url, input_audio.",
        )

    def _tools(self, row: Mapping[str, Any]) -> tuple[dict, ...]:
        value, key = first(row, self.attr.tools, ("tools", "functions"))
        tools = listed(value)
        if not tools:
            return ()
        if not isinstance(tools, list) or not all(isinstance(t, dict) for t in tools):
            raise PolymodalError(
                f"`{key}` is a list of tools (or that list as JSON text), here it is {str(value)[:40]!r}.",
                'Write [{"type": "function", "function": {"name": ...}}].',
            )
        tools = _without_null(tools) if self.parquet else tools
        return tuple(
            t if "function" in t or "name" not in t else {"type": "function", "function": t} for t in tools
        )

    def _alpaca(self, row: Mapping[str, Any]) -> list[dict]:
        a = self.attr
        prompt, answer = (
            self._text(row, own, names, f"Name the column in data.attr.{name}.")
            for own, names, name in ((a.prompt, PROMPTS, "prompt"), (a.response, ANSWERS, "response"))
        )
        asked = first(row, a.prompt, PROMPTS)[1]
        query, key = first(row, a.query, tuple(name for name in ("input", "query") if name != asked))
        if query is not None and not isinstance(query, str):
            raise PolymodalError(
                f"the column `{key}` is no text.", "Name the column in data.attr.query, or leave it out."
            )
        history, key = first(row, a.history, ("history",))
        texts = []
        for n, pair in enumerate(listed(history) or []):
            pair_of_text = isinstance(pair, (list, tuple)) and all(isinstance(t, str) for t in pair)
            if not pair_of_text or len(pair) != 2:
                raise PolymodalError(
                    f"`{key}[{n}]` is a pair [question, answer].",
                    'Write [["question", "answer"], ...], oldest first.',
                )
            texts += pair
        texts += [f"{prompt}\n{query}" if query else prompt, answer]
        turns = [{"role": ("user", "assistant")[n % 2], "parts": [text]} for n, text in enumerate(texts)]
        self._add_system(turns, row)
        return turns

    def _text(
        self, row: Mapping[str, Any], own: str | None, names: tuple[str, ...], hint: str, of: str = ""
    ) -> str:
        text, key = first(row, own, names)
        if not isinstance(text, str):
            problem = "missing" if text is None else "no text"
            raise PolymodalError(f"the column `{key}`{of} is {problem}.", hint)
        return text

    # -- speech --------------------------------------------------------------

    def _audio(self, row: Mapping[str, Any]) -> tuple[Any, str]:
        """The row's audio and its column; `file_name` (the hub's audio folders) if it names a sound."""
        value, key = first(row, self.attr.audios, ("audio", "audios", "audio_filepath", "file_name"))
        members = row_members(row, "audio")
        if members:
            own = member_named(members, value)
            return (list(members.values()) if own is None else own), key
        if key == "file_name" and str(value).rpartition(".")[2].lower() not in AUDIO:
            return None, "audio"
        return value, key

    def _speech_turns(self, row: Mapping[str, Any]) -> tuple[Message, Message]:
        """Speech and its transcription: the user's turn is the audio alone (none where the row has its codes
        instead), the assistant's the text."""
        value, key = self._audio(row)
        value = listed(value)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        coded = row.get(CODES) is not None
        if isinstance(value, list) or (value is None and not coded):
            raise PolymodalError(
                f"the row names {'no' if not value else 'more than one'} audio (`{key}`).",
                "Name the column in data.attr.audios; conversations about several go into messages.",
            )
        hint = "Name the column in data.attr.response."
        text = self._text(row, self.attr.response, TRANSCRIPTS, hint, " of the transcription")
        heard = () if value is None else (self.references.medium("audio", value, key),)
        return Message("user", heard), Message("assistant", (text,))

    def _voice(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What models that speak read besides: the codes of the audio, and a recording of the voice."""
        found: dict[str, Any] = {}
        if row.get(CODES) is not None:
            found[CODES] = row[CODES]
        if row.get(REFERENCE) is not None:
            found[REFERENCE] = self.references.medium("audio", listed(row[REFERENCE]), REFERENCE)
        return found

    # -- media ---------------------------------------------------------------

    def _place_media(self, turns: list[dict], row: Mapping[str, Any], plain: bool) -> None:
        """Puts the row's media where the placeholders are; in place."""
        marked = any(type(part) is not str or "<" in part for part in _all_parts(turns))
        for kind in KINDS:
            media, key = self.references.of_row(row, kind)
            if media or marked:
                self._place_kind(turns, row, kind, media, key, plain)
        for turn in turns if marked else ():
            turn["parts"] = [str(p) if isinstance(p, str) else p for p in turn["parts"]]

    def _place_kind(
        self, turns: list[dict], row: Mapping[str, Any], kind: Kind, media: list[Media], key: str, plain: bool
    ) -> None:
        mark = f"<{kind}>"
        parts = _all_parts(turns)
        named = sum(isinstance(p, _Slot) and p == kind for p in parts)
        inline = sum(isinstance(p, Media) and p.kind == kind for p in parts)
        slots = named + _count(turns, mark)
        if slots != len(media) and not inline and not named:
            slots -= self._keep_words(turns, row, mark, len(media))
        if slots == len(media):
            supply = iter(media)
            for turn in turns if slots else ():
                turn["parts"] = list(_filled(turn["parts"], kind, mark, supply))
            return
        if slots or inline:
            have = f"`{key}` holds {len(media)}" if media else f"there is no `{key}`"
            what = f"{slots} {mark} in the text"
            if inline:
                what = f"the messages name {inline} of their own and {slots} {mark}"
            raise PolymodalError(
                f"{what}, but {have}.",
                f"Write one {mark} for each entry, in order of reading, or none at all.",
            )
        opener = next((t["parts"] for t in turns if plain or t["role"] == "user"), None)
        if opener is None:
            raise PolymodalError(
                f"`{key}` holds {len(media)}, but there is no user turn to put it in.",
                f"Write {mark} where it belongs.",
            )
        at = next((n for n, part in enumerate(opener) if not isinstance(part, Media)), len(opener))
        opener[at:at] = media

    def _keep_words(self, turns: list[dict], row: Mapping[str, Any], mark: str, media: int) -> int:
        """Makes ordinary text of marks that stand for no medium, in place; returns how many.

        Such are those of answers, when the other turns have one for each medium. In a row without media:
        those of OpenAI messages, which name media by typed parts; and those within a sentence ("the <image>
        element"), when no other column could hold media under a name that is not known.
        """
        answers = [t for t in turns if t["role"] == "assistant"]
        if not media and _count(answers, mark) < _count(turns, mark):
            prose = re.compile(rf"\S {mark}(?=[ .,;:?!)])")
            within = sum(len(prose.findall(p)) for p in _all_parts(turns) if type(p) is str)
            other = [v for k, v in row.items() if k not in TEXT_COLUMNS and k != self.attr.messages]
            media_elsewhere = any(isinstance(v, (list, dict, bytes)) for v in other)
            if self.format != "openai" and (within < _count(turns, mark) or media_elsewhere):
                return 0
            answers = turns
        elif _count(turns, mark) - _count(answers, mark) != media:
            return 0
        kept = _count(answers, mark)
        for turn in answers:
            turn["parts"] = [_Literal(p) if type(p) is str and mark in p else p for p in turn["parts"]]
        return kept


def _messages(turns: list[dict]) -> tuple[Message, ...]:
    return tuple(
        Message(t["role"], tuple(t["parts"]), t.get("weight"), t.get("tool_calls", ()), t.get("reasoning"))
        for t in turns
    )


def _all_parts(turns: list[dict]) -> list[Any]:
    return [part for turn in turns for part in turn["parts"]]


def _count(turns: list[dict], mark: str) -> int:
    return sum(part.count(mark) for part in _all_parts(turns) if type(part) is str)


def _filled(parts: list[Any], kind: str, mark: str, supply: Iterator[Media]) -> Iterator[Any]:
    """The parts with media in place of marks and slots."""
    for part in parts:
        if isinstance(part, _Slot) and part == kind:
            yield next(supply)
        elif type(part) is str and mark in part:
            for n, piece in enumerate(part.split(mark)):
                if n:
                    yield next(supply)
                if piece:
                    yield piece
        else:
            yield part


def _extra(row: Mapping[str, Any], speech: bool) -> dict[str, Any]:
    """Columns that are not trained on (id, task...); speech: `start` and `end` as seconds (NeMo:
    `offset`)."""
    extra = {}
    for key, value in row.items():
        short = isinstance(value, str) and 0 < len(value) <= 256 and key != "text"
        if short or isinstance(value, (int, float)):
            extra[key] = value
    if not speech:
        return extra
    if extra.get("offset") and isinstance(extra.get("duration"), (int, float)):  # of a NeMo manifest
        extra.setdefault("start", extra["offset"])
        with contextlib.suppress(ValueError):  # it is named below, as the start
            extra.setdefault("end", float(extra["offset"]) + extra["duration"])
    for key in ("start", "end"):
        if extra.get(key) is None:
            continue
        try:
            extra[key] = float(extra[key])
        except ValueError:
            extra[key] = math.nan
        if not 0 <= extra[key] < math.inf:
            raise PolymodalError(
                f"`{key}` = {row.get(key)!r} is no time in seconds.", "Write seconds, e.g. 12.5."
            )
    if extra.get("end", math.inf) <= extra.get("start", 0.0):
        raise PolymodalError(
            f"`end` = {extra['end']:g} s is not after `start` = {extra.get('start', 0.0):g} s.",
            "Correct the two; they are in seconds.",
        )
    return extra


def _prompt_turns(row: Mapping[str, Any], attr: Attr) -> list[Any]:
    """TRL's `prompt` and `completion` as lists of turns: one conversation; the prompt is not learned. One of
    them may be text."""
    prompt, completion = (
        listed(first(row, own, names)[0])
        for own, names in ((attr.prompt, ("prompt",)), (attr.response, ("completion",)))
    )
    if not isinstance(prompt, list) and not isinstance(completion, (list, Mapping)):
        return []
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    completion = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    completion = [completion] if isinstance(completion, Mapping) else completion
    if not isinstance(prompt, list) or not isinstance(completion, list) or not completion:
        return []
    answers = [isinstance(turn, Mapping) and turn.get("role") == "assistant" for turn in prompt]
    turns = [{**t, "weight": 0} if answer else t for t, answer in zip(prompt, answers, strict=True)]
    return [*turns, *completion]


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_null(v) for k, v in value.items() if v is not None}
    return [_without_null(v) for v in value] if isinstance(value, list) else value


def _calls(value: Any, at: str) -> tuple[dict, ...]:
    """Tool calls as {"type": "function", "function": {"name", "arguments": object}}."""
    form = 'Write {"name": ..., "arguments": {...}}.'
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError as error:
            raise PolymodalError(f"`{at}` is a tool call as JSON, here it is not: {error}.", form) from None
    calls = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise PolymodalError(f"`{at}` holds a tool call without a name.", form)
        arguments = function.get("arguments", function.get("parameters", {}))
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError):  # else a template may print the text as it is
                arguments = parse_json(arguments)
        made: dict[str, Any] = {"type": "function"}
        if call.get("id"):
            made["id"] = call["id"]
        calls.append({**made, "function": {"name": function["name"], "arguments": arguments}})
    return tuple(calls)
