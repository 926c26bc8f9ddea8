"""How a row becomes a Record: MLLM JSON, ShareGPT, LLaVA, Alpaca, OpenAI messages, speech with its text,
plain text.

Part of the data room: sees errors, recipe and core/sample.py; opens no file. All chat formats are one
reader, for they differ in names only: `<image>`, `<video>`, `<audio>` in a text stand for the next entry of
the row's list of that kind, and their number must equal the list's length; when a row has media and not one
placeholder of that kind, the media go to the start of the first user turn. Typed parts ({"type": "image",
...}) carry their own medium.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Media, Message, Record
from polymodal.data.captions import caption_record, is_caption_row
from polymodal.data.files import AUDIO
from polymodal.data.references import KINDS, References, first, listed, member_named, row_members
from polymodal.recipe import Attr

TRANSCRIPTS = ("text", "sentence", "transcription", "transcript")
TEXT_COLUMNS = (
    "messages",
    "conversations",
    "tools",
    "prompt",
    "completion",
    "history",
    "images",
    "videos",
    "audios",
)
ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt"),
    "tool": ("tool", "observation", "tool_response"),
    "call": ("function_call", "tool_call"),
}


class RowReader:
    """Rows of one file -> Records. Picklable.

    attr: the field names of this dataset. Relative media paths start from media_dir; without one, from the
    file's directory, or from the working directory where that has the medium's directory and the former has
    not.
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
        self.roles = {name: role for role, names in ROLES.items() for name in names}
        for role, name in own.items():
            if name is not None:
                self.roles = {k: v for k, v in self.roles.items() if v != role}
                self.roles[name] = role

    # -- the row ------------------------------------------------------------------------------------------------

    def record(self, row: Mapping[str, Any], where: str) -> Record:
        """Raises PolymodalError with `where`, the key, the cause and the mend."""
        kind = self._shape(row, where)
        if kind == "caption":
            return caption_record(row, where, self.attr, self.references)
        if kind == "asr":
            return self._asr(row, where)
        if kind == "chat":
            turns, literal = self._chat(row, where)
        elif kind == "alpaca":
            turns, literal = self._alpaca(row, where), False
        else:
            text, key = first(row, self.attr.prompt, ("text", "content"))
            if not isinstance(text, str):
                raise PolymodalError(
                    f"{where}: the column `{key}` of plain text is missing or no string.",
                    "Name the column in data.attr.prompt.",
                )
            turns, literal = [{"role": "assistant", "parts": [text]}], False
        self._resolve(turns, row, where, literal, plain=kind == "text")
        messages = tuple(
            Message(
                t["role"], tuple(t["parts"]), t.get("weight"), t.get("tool_calls", ()), t.get("reasoning")
            )
            for t in turns
        )
        tools = self._tools(row, where) if kind == "chat" else ()
        timed = ("start" in row or "end" in row) and any(
            isinstance(p, Media) and p.kind == "audio" for m in messages for p in m.content
        )
        return Record(messages, where, tools, _extra(row, where, timed), plain=kind == "text")

    def _shape(self, row: Mapping[str, Any], where: str) -> str:
        a = self.attr
        if self.format in ("mllm", "sharegpt", "llava", "openai"):
            return "chat"
        if self.format in ("alpaca", "text", "caption", "asr"):
            return self.format
        if first(row, a.messages, ("messages", "conversations"))[0] is not None or _prompt_turns(row):
            return "chat"
        if (
            first(row, a.prompt, ("instruction", "prompt"))[0] is not None
            and first(row, a.response, ("output", "response", "completion"))[0] is not None
        ):
            return "alpaca"
        if is_caption_row(row, a):
            return "caption"
        if self._speech(row)[0] is not None and first(row, a.response, TRANSCRIPTS)[0] is not None:
            return "asr"
        if isinstance(row.get("text"), str):
            return "text"
        columns = ", ".join(k for k in row if not k.startswith("__")) or "none"
        raise PolymodalError(
            f"{where}: no known format has these columns: {columns}.",
            "Expected messages or conversations, instruction and output, text, audio with its text, or a picture's "
            "or clip's path with its caption (cap); else name yours in data.attr (for example data.attr.messages=dialog).",
        )

    # -- conversations ------------------------------------------------------------------------------------------

    def _chat(self, row: Mapping[str, Any], where: str) -> tuple[list[dict], bool]:
        value, key = first(row, self.attr.messages, ("messages", "conversations"))
        value = listed(value)
        if value is None and (turns := _prompt_turns(row)):
            value, key = turns, "prompt"
        if value is None:
            raise PolymodalError(
                f"{where}: the column `{key}` is missing.",
                "Name the column of the conversation in data.attr.messages.",
            )
        if not isinstance(value, list) or not value:
            raise PolymodalError(
                f"{where}: `{key}` is a list of turns, here it is {'empty' if value == [] else 'a ' + type(value).__name__}.",
                'Write [{"role": "user", "content": ...}, ...].',
            )
        turns = []
        for n, message in enumerate(value):
            turns.append(self._turn(message, where, f"{key}[{n}]"))
        self._system(turns, row, where)
        return turns, self.format == "openai"

    def _system(self, turns: list[dict], row: Mapping[str, Any], where: str) -> None:
        """The row's system column, unless the conversation brings its own."""
        system, key = first(row, self.attr.system, ("system",))
        if system and not any(t["role"] == "system" for t in turns):
            if not isinstance(system, str):
                raise PolymodalError(
                    f"{where}: `{key}` is the system prompt as a string, here it is a {type(system).__name__}.",
                    "Write text, or leave it out.",
                )
            turns.insert(0, {"role": "system", "parts": [system]})

    def _turn(self, message: Any, where: str, at: str) -> dict:
        if not isinstance(message, Mapping):
            raise PolymodalError(
                f"{where}: `{at}` is an object with a role and a content, here it is a {type(message).__name__}.",
                'Write {"role": "user", "content": ...}.',
            )
        role_key = self.attr.role or ("from" if message.get("role") is None and "from" in message else "role")
        content_key = self.attr.content or (
            "content" if message.get("content") is not None else "value" if "value" in message else "content"
        )
        name = message.get(role_key)
        role = self.roles.get(name) if isinstance(name, str) else None
        if role is None:
            if name is None:
                raise PolymodalError(
                    f"{where}: `{at}` has no `{role_key}`.", "Name the speaker's key in data.attr.role."
                )
            raise PolymodalError(
                f"{where}: `{at}.{role_key}` = {name!r} is no known role ({', '.join(self.roles)}).",
                "Name yours in data.attr.user, .assistant, .observation or .function.",
            )
        content = message.get(content_key)
        turn: dict[str, Any] = {"role": "assistant" if role == "call" else role}
        if role == "call":
            turn.update(parts=[], tool_calls=_calls(content, where, f"{at}.{content_key}"))
        else:
            reasoning = calls = None
            if len(message) > 2 or content is None:  # most turns have a role and a content, nothing more
                names = ("reasoning_content", "reasoning", "thinking")
                thoughts = (message.get(k) for k in names)
                reasoning = next((t for t in thoughts if isinstance(t, str) and t), None)
                calls = listed(message.get("tool_calls"))
            if calls:
                turn["tool_calls"] = _calls(
                    _without_null(calls) if self.parquet else calls, where, f"{at}.tool_calls"
                )
            if reasoning is not None:
                turn["reasoning"] = reasoning
            if content is None and not calls and reasoning is None:
                raise PolymodalError(
                    f"{where}: `{at}` has no `{content_key}`.",
                    "Name the key of the text in data.attr.content.",
                )
            turn["parts"] = self._parts(content, where, f"{at}.{content_key}")
        weight = message.get("weight")
        if weight is not None:
            if (
                isinstance(weight, str)
                or not isinstance(weight, (int, float))
                or not math.isfinite(weight)
                or weight < 0
            ):
                raise PolymodalError(
                    f"{where}: `{at}.weight` = {weight!r} is no number from 0.",
                    "0 leaves the turn out of the loss, 1 is a turn's usual weight.",
                )
            turn["weight"] = float(weight)
        return turn

    def _parts(self, content: Any, where: str, at: str) -> list[Any]:
        """Text, Media, or the name of a kind in a tuple: the next entry of the row's list of that kind."""
        if content is None:
            return []
        if isinstance(content, str):
            return [content]
        if not isinstance(content, list):
            raise PolymodalError(
                f"{where}: `{at}` is text or a list of typed parts, here it is a {type(content).__name__}.",
                'Write a string, or [{"type": "text", "text": ...}, ...].',
            )
        parts: list[Any] = []
        for n, part in enumerate(content):
            here = f"{at}[{n}]"
            if isinstance(part, str):
                parts.append(_Literal(part))
                continue
            name = part.get("type") if isinstance(part, Mapping) else None
            if name in ("text", "input_text", "output_text", "refusal") or (
                name is None and isinstance(part, Mapping) and isinstance(part.get("text"), str)
            ):
                text = part.get("refusal" if name == "refusal" else "text")
                if not isinstance(text, str):
                    raise PolymodalError(
                        f"{where}: `{here}` has no `text`.", 'Write {"type": "text", "text": ...}.'
                    )
                parts.append(_Literal(text))
                continue
            kind = next(
                (
                    k
                    for k in KINDS
                    if isinstance(name, str) and name.removeprefix("input_") in (k, f"{k}_url")
                ),
                None,
            )
            if kind is None:
                raise PolymodalError(
                    f"{where}: `{here}.type` = {name!r} is no known part.",
                    "Known: text, image, image_url, video, video_url, audio, audio_url, input_audio.",
                )
            source = next(
                (
                    part[k]
                    for k in (name, kind, f"{kind}_url", "url", "path", "bytes", "data")
                    if part.get(k) is not None
                ),
                None,
            )
            parts.append((kind,) if source is None else self.references.medium(kind, source, where, here))
        return parts

    def _tools(self, row: Mapping[str, Any], where: str) -> tuple[dict, ...]:
        value, key = first(row, self.attr.tools, ("tools",))
        tools = listed(value)
        if not tools:
            return ()
        if not isinstance(tools, list) or not all(isinstance(t, dict) for t in tools):
            raise PolymodalError(
                f"{where}: `{key}` is a list of tools (or that list as JSON text), here it is {str(value)[:40]!r}.",
                'Write [{"type": "function", "function": {"name": ...}}].',
            )
        tools = _without_null(tools) if self.parquet else tools
        return tuple(
            t if "function" in t or "name" not in t else {"type": "function", "function": t} for t in tools
        )

    def _alpaca(self, row: Mapping[str, Any], where: str) -> list[dict]:
        a = self.attr
        prompt, prompt_key = first(row, a.prompt, ("instruction", "prompt"))
        query, query_key = first(row, a.query, ("input", "query"))
        answer, answer_key = first(row, a.response, ("output", "response", "completion"))
        history, history_key = first(row, a.history, ("history",))
        for value, key, attr in ((prompt, prompt_key, "prompt"), (answer, answer_key, "response")):
            if not isinstance(value, str):
                raise PolymodalError(
                    f"{where}: the column `{key}` is {'missing' if value is None else 'no text'}.",
                    f"Name the column in data.attr.{attr}.",
                )
        if query is not None and not isinstance(query, str):
            raise PolymodalError(
                f"{where}: the column `{query_key}` is no text.",
                "Name the column in data.attr.query, or leave it out.",
            )
        turns = []
        for n, pair in enumerate(listed(history) or []):
            if (
                not isinstance(pair, (list, tuple))
                or len(pair) != 2
                or not all(isinstance(t, str) for t in pair)
            ):
                raise PolymodalError(
                    f"{where}: `{history_key}[{n}]` is a pair [question, answer].",
                    'Write [["question", "answer"], ...], oldest first.',
                )
            turns += [{"role": "user", "parts": [pair[0]]}, {"role": "assistant", "parts": [pair[1]]}]
        turns += [
            {"role": "user", "parts": [f"{prompt}\n{query}" if query else prompt]},
            {"role": "assistant", "parts": [answer]},
        ]
        self._system(turns, row, where)
        return turns

    def _speech(self, row: Mapping[str, Any]) -> tuple[Any, str]:
        """The row's audio and its column; `file_name` (the hub's audio folders) where it names a sound."""
        value, key = first(row, self.attr.audios, ("audio", "audios", "audio_filepath", "file_name"))
        members = row_members(row, "audio")
        if members:
            own = member_named(members, value)
            return (list(members.values()) if own is None else own), key
        if key == "file_name" and str(value).rpartition(".")[2].lower() not in AUDIO:
            return None, "audio"
        return value, key

    def _asr(self, row: Mapping[str, Any], where: str) -> Record:
        """Speech and its transcription: the user's turn is the audio alone, the assistant's the text."""
        value, key = self._speech(row)
        value = listed(value)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if value is None or isinstance(value, list):
            raise PolymodalError(
                f"{where}: the row names {'no' if not value else 'more than one'} audio (`{key}`).",
                "Name the column in data.attr.audios; conversations about several go into messages.",
            )
        text, text_key = first(row, self.attr.response, TRANSCRIPTS)
        if not isinstance(text, str):
            raise PolymodalError(
                f"{where}: the column `{text_key}` of the transcription is "
                f"{'missing' if text is None else 'no text'}.",
                "Name the column in data.attr.response.",
            )
        medium = self.references.medium("audio", value, where, key)
        turns = (Message("user", (medium,)), Message("assistant", (text,)))
        return Record(turns, where, extra=_extra(row, where, speech=True))

    # -- media --------------------------------------------------------------------------------------------------

    def _keep_words(
        self, turns: list[dict], row: Mapping[str, Any], mark: str, media: int, literal: bool
    ) -> int:
        """Makes ordinary text of marks that stand for no medium, in place; returns how many.

        Such are those of answers, when the other turns have one for each medium. Where the row has no medium:
        those of OpenAI messages, which name media by typed parts; and those within a sentence ("the <image>
        element"), when no other column could hold media under a name that is not known.
        """

        def count(some: list[dict]) -> int:
            return sum(p.count(mark) for t in some for p in t["parts"] if type(p) is str)

        answers = [t for t in turns if t["role"] == "assistant"]
        if not media and count(answers) < count(turns):
            prose = re.compile(rf"\S {mark}(?=[ .,;:?!)])")
            within = sum(len(prose.findall(p)) for t in turns for p in t["parts"] if type(p) is str)
            other = [v for k, v in row.items() if k not in TEXT_COLUMNS and k != self.attr.messages]
            if not literal and (
                within < count(turns) or any(isinstance(v, (list, dict, bytes)) for v in other)
            ):
                return 0
            answers = turns
        elif count(turns) - count(answers) != media:
            return 0
        kept = count(answers)
        for turn in answers:
            turn["parts"] = [_Literal(p) if type(p) is str and mark in p else p for p in turn["parts"]]
        return kept

    def _resolve(
        self, turns: list[dict], row: Mapping[str, Any], where: str, literal: bool, plain: bool = False
    ) -> None:
        """Puts the row's media where the placeholders are; in place."""
        marked = any([type(p) is not str or "<" in p for t in turns for p in t["parts"]])  # noqa: C419 (faster)
        for kind in KINDS:
            media, key = self.references.of_row(row, kind, where)
            if not media and not marked:
                continue
            mark, slots, inline = f"<{kind}>", 0, 0
            for turn in turns:
                for part in turn["parts"]:
                    if type(part) is str:
                        slots += part.count(mark)
                    elif isinstance(part, tuple):
                        slots += part[0] == kind
                    elif isinstance(part, Media):
                        inline += part.kind == kind
            named = any(isinstance(p, tuple) and p[0] == kind for t in turns for p in t["parts"])
            if slots != len(media) and not inline and not named:
                slots -= self._keep_words(turns, row, mark, len(media), literal)
            if slots != len(media):
                if slots or inline:
                    have = f"`{key}` holds {len(media)}" if media else f"there is no `{key}`"
                    what = (
                        f"{slots} {mark} in the text"
                        if not inline
                        else f"the messages name {inline} of their own and {slots} {mark}"
                    )
                    raise PolymodalError(
                        f"{where}: {what}, but {have}.",
                        f"Write one {mark} for each entry, in order of reading, or none at all.",
                    )
                opener = next((t for t in turns if plain or t["role"] == "user"), None)
                if opener is None:
                    raise PolymodalError(
                        f"{where}: `{key}` holds {len(media)}, but there is no user turn to put it in.",
                        f"Write {mark} where it belongs.",
                    )
                at = 0
                while at < len(opener["parts"]) and isinstance(opener["parts"][at], Media):
                    at += 1
                opener["parts"][at:at] = media
                continue
            if not slots:
                continue
            supply = iter(media)
            for turn in turns:
                parts: list[Any] = []
                for part in turn["parts"]:
                    if type(part) is str and mark in part:
                        pieces = part.split(mark)
                        for n, piece in enumerate(pieces):
                            if n:
                                parts.append(next(supply))
                            if piece:
                                parts.append(piece)
                    elif isinstance(part, tuple) and part[0] == kind:
                        parts.append(next(supply))
                    else:
                        parts.append(part)
                turn["parts"] = parts
        for turn in turns if marked else ():
            turn["parts"] = [str(p) if isinstance(p, str) else p for p in turn["parts"]]


def _extra(row: Mapping[str, Any], where: str, speech: bool) -> dict[str, Any]:
    """Columns that are not trained on (id, task...); speech: `start` and `end` as seconds (NeMo:
    `offset`)."""
    extra = {
        k: v
        for k, v in row.items()
        if (0 < len(v) <= 256 and k != "text" if isinstance(v, str) else isinstance(v, (int, float)))
    }
    if speech:
        if extra.get("offset") and isinstance(
            extra.get("duration"), (int, float)
        ):  # an excerpt in a NeMo manifest
            extra.setdefault("start", extra["offset"])
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
                    f"{where}: `{key}` = {row.get(key)!r} is no time in seconds.", "Write seconds, e.g. 12.5."
                )
        if extra.get("end", math.inf) <= extra.get("start", 0.0):
            raise PolymodalError(
                f"{where}: `end` = {extra['end']:g} s is not after `start` = {extra.get('start', 0.0):g} s.",
                "Correct the two; they are in seconds.",
            )
    return extra


def _prompt_turns(row: Mapping[str, Any]) -> list[Any]:
    """TRL's `prompt` and `completion` as lists of turns: one conversation; the prompt is not learned."""
    prompt, completion = listed(row.get("prompt")), listed(row.get("completion"))
    if not isinstance(prompt, list) or not isinstance(completion, list) or not completion:
        return []
    return [*({**t, "weight": 0} if _is_answer(t) else t for t in prompt), *completion]


def _is_answer(turn: Any) -> bool:
    return isinstance(turn, Mapping) and turn.get("role") == "assistant"


class _Literal(str):
    """Text in which <image> is ordinary text."""


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_null(v) for k, v in value.items() if v is not None}
    return [_without_null(v) for v in value] if isinstance(value, list) else value


def _calls(value: Any, where: str, at: str) -> tuple[dict, ...]:
    """Tool calls as {"type": "function", "function": {"name", "arguments": object}}."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise PolymodalError(
                f"{where}: `{at}` is a tool call as JSON, here it is not: {error}.",
                'Write {"name": ..., "arguments": {...}}.',
            ) from None
    calls = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise PolymodalError(
                f"{where}: `{at}` holds a tool call without a name.",
                'Write {"name": ..., "arguments": {...}}.',
            )
        arguments = function.get("arguments", function.get("parameters", {}))
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError):  # else a template may print the text as it is
                arguments = json.loads(arguments)
        calls.append(
            {
                "type": "function",
                **({"id": call["id"]} if call.get("id") else {}),
                "function": {"name": function["name"], "arguments": arguments},
            }
        )
    return tuple(calls)
