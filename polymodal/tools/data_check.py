"""Data files without a model: every row read, every media header opened, what is broken listed by its line.

`polymodal data check` needs no tokenizer, so that data can be looked at before a model is chosen; lengths are
the business of `polymodal check`.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Media, Record
from polymodal.core.terminal import Bar, say, say_lines
from polymodal.data import audio, boxes
from polymodal.data import media as files
from polymodal.data.source import Corpus, open_corpus
from polymodal.recipe import Attr, Dataset

_AT_ONCE = 1024  # rows in flight


@dataclass
class Findings:
    """What the rows hold. problems: one sentence each, with the file and the line, in order."""

    rows: int = 0
    text_only: int = 0
    plain: int = 0  # rows of pretraining text
    boxes: int = 0  # with points
    unanswered: int = 0  # conversations without an assistant's turn: nothing would be learned
    answers: dict[int, int] = field(default_factory=dict)  # rows that compare so many; 1: with a label
    pairs: int = 0  # rows that compare two pictures or clips of a caption
    ties: int = 0  # of these, with equal scores
    turns: int = 0
    characters: int = 0
    media: dict[str, int] = field(default_factory=dict)  # by kind
    pixels: dict[str, list[int]] = field(default_factory=dict)  # by kind: smallest, middle, largest
    seconds: dict[str, list[float]] = field(
        default_factory=dict
    )  # of videos, of audio: shortest, middle, longest
    problems: list[str] = field(default_factory=list)


def check(corpus: Corpus, progress: Callable[[int, int], None] | None = None) -> Findings:
    """Read all rows and the headers of all their media; pixels are not decoded. progress(done, total)."""
    out = Findings()
    sizes: dict[str, list[int]] = {}
    seconds: dict[str, list[float]] = {}
    kinds: Counter[str] = Counter()
    compared: Counter[int] = Counter()

    def read(i: int) -> Record | str:
        try:
            return corpus[i]
        except PolymodalError as error:
            return str(error)

    def look(record: Record | str) -> tuple[Record | None, list[tuple[str, int, float]], str]:
        if isinstance(record, str):
            return None, [], record
        try:
            headers = [_header(m) for m in dict.fromkeys(m for c in record.conversations for m in c.media)]
            for box in record.boxes:
                boxes.fractions(box, *files.image_size(box.picture.source))  # type: ignore[arg-type]
            return record, headers, ""
        except PolymodalError as error:
            return record, [], f"{record.where}: {error}"

    with ThreadPoolExecutor(min(8, (os.cpu_count() or 1) * 2)) as pool:  # headers wait for the disk
        for start in range(0, len(corpus), _AT_ONCE):
            records = [read(i) for i in range(start, min(start + _AT_ONCE, len(corpus)))]
            for record, headers, problem in pool.map(look, records):
                out.rows += 1
                if problem:
                    out.problems.append(problem)
                if record is None:
                    continue
                out.plain += record.plain
                out.text_only += not record.media
                out.boxes += len(record.boxes)
                if record.alternatives or record.scores:
                    if "captions" in record.extra:
                        out.pairs += 1
                        out.ties += bool(record.scores) and record.scores[0] == record.scores[-1]
                    else:
                        compared[1 + len(record.alternatives)] += 1
                out.unanswered += not any(m.role == "assistant" for m in record.messages)
                out.turns += len(record.messages)
                out.characters += sum(
                    len(p) for m in record.messages for p in m.content if isinstance(p, str)
                )
                kinds.update(m.kind for m in record.media)
                if "captions" in record.extra:
                    kinds.update(c.media[-1].kind for c in record.conversations[1:])
                for kind, pixels, length in headers:
                    if kind != "audio":
                        sizes.setdefault(kind, []).append(pixels)
                    if kind != "image":
                        seconds.setdefault(kind, []).append(length)
            if progress:
                progress(out.rows, len(corpus))
    out.media, out.answers = dict(kinds), dict(compared)
    out.pixels = {kind: _spread(values) for kind, values in sizes.items()}
    out.seconds = {kind: [round(s, 2) for s in _spread(values)] for kind, values in seconds.items()}
    return out


def _spread(values: list) -> list:
    ordered = sorted(values)
    return [ordered[0], ordered[len(ordered) // 2], ordered[-1]]


def _header(medium: Media) -> tuple[str, int, float]:
    """(kind, pixels of the picture or of one frame, seconds)."""
    if medium.kind == "video":
        header = files.video_header(medium.source)
        return "video", header.height * header.width, header.duration
    assert not isinstance(medium.source, tuple)
    if medium.kind == "audio":
        return "audio", 0, audio.audio_header(medium.source).seconds
    height, width = files.image_size(medium.source)
    return "image", height * width, 0.0


def main(
    paths: Sequence[str],
    *,
    media_dir: str | None = None,
    format: str = "auto",
    limit: int = 20,
    as_json: bool = False,
    attr: Attr | None = None,
) -> int:
    """The command: prints what the files hold and the first `limit` problems. Returns 2 when there are any,
    else 0."""
    datasets = [Dataset(path=p, media_dir=media_dir, format=format) for p in paths]  # type: ignore[arg-type]
    corpus = open_corpus(datasets, attr, key="data")
    with Bar("Reading", len(corpus)) as bar:
        found = check(corpus, bar.update)
    if as_json:
        say_lines(json.dumps({"ok": not found.problems, **asdict(found)}, indent=2, ensure_ascii=False), "\n")
        return 2 if found.problems else 0
    plain = f", {found.plain} plain" if found.plain else ""
    say(
        f"{found.rows} rows: {found.turns} turns, {found.characters} characters, "
        f"{found.text_only} of text only{plain}."
    )
    for kind, count in found.media.items():
        words = [f"{count} {kind}{'s' if count != 1 else ''}"]
        if kind in found.pixels:
            words.append(f"{' / '.join(map(str, found.pixels[kind]))} pixels (smallest / middle / largest)")
        if kind in found.seconds:
            words.append(f"{' / '.join(map(str, found.seconds[kind]))} seconds (shortest / middle / longest)")
        say(", ".join(words) + ".")
    if found.boxes:
        say(f"{found.boxes} boxes and points.")
    if found.pairs:
        ties = f", {found.ties} of them ties, which are left out" if found.ties else ""
        say(f"{found.pairs} rows have two pictures or clips to compare (diffusion_dpo){ties}.")
    for count, rows in sorted(found.answers.items()):
        what = "an answer with a label (kto)" if count == 1 else f"{count} answers to compare (dpo)"
        say(f"{rows} rows have {what}.")
    if found.unanswered and format != "prompt":
        say(f"{found.unanswered} rows have no assistant's turn: nothing is learned from them.")
    for problem in found.problems[:limit]:
        say(problem)
    if not found.problems:
        return 0
    more = len(found.problems) - limit
    listed = f"; {more} are not listed (--limit)." if more > 0 else "."
    say(f"{len(found.problems)} of {found.rows} rows are broken{listed}")
    return 2
