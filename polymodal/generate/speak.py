"""`polymodal generate` of models that speak: a wav file of each text, a JSON of how each was made.

Texts are dealt to ranks, and spoken in batches. A text's draws are its own: they do not depend on the batch.
"""

from __future__ import annotations

import json
import os
import wave
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from polymodal import __version__
from polymodal.core.errors import PolymodalError
from polymodal.core.files import read_json
from polymodal.core.terminal import Bar, say
from polymodal.core.text import parse_json
from polymodal.data import audio
from polymodal.data.files import read_text
from polymodal.generate.opening import Opened, alike, command_recipe, open_model
from polymodal.runtime import process_group

DRAWS = {"temperature": 0.9, "top_k": 50, "repetition_penalty": 1.05}
"""Where neither the command nor generation_config.json says how codes are drawn (published defaults)."""


@dataclass(frozen=True)
class Utterance:
    """What is to be said, and by whom: ref_audio is a file."""

    text: str
    ref_audio: str | None = None
    speaker: str | None = None
    language: str | None = None
    seed: int | None = None


def read_utterances(path: str, others: bool = False) -> list[Utterance]:
    """A .txt of one text a line, or .jsonl of objects with Utterance's keys; others: and more, which are left
    out. Raises PolymodalError."""
    known = [f.name for f in fields(Utterance)]
    out = []
    for number, line in enumerate(read_text(str(Path(path).expanduser())).split("\n"), 1):
        if not line.strip():
            continue
        if not path.endswith((".jsonl", ".json")):
            out.append(Utterance(line.strip()))
            continue
        try:
            row = parse_json(line)
            unknown = [] if others else sorted(set(row) - set(known))
            if not isinstance(row.get("text"), str) or unknown:
                raise ValueError(f"`{unknown[0]}` is not known" if unknown else "there is no `text`")
            made = Utterance(**{key: value for key, value in row.items() if key in known})
        except (ValueError, AttributeError, TypeError) as error:
            raise PolymodalError(
                f"{path}, line {number}: {error}.",
                f"Each line is an object with text, and any of {', '.join(known[1:])}.",
            ) from None
        if made.ref_audio is not None:  # from the file's directory, as in data
            made = replace(made, ref_audio=str(Path(path).expanduser().parent / made.ref_audio))
        out.append(made)
    if not out:
        raise PolymodalError(f"{path} holds no text.", "Write one a line.")
    return out


@dataclass(frozen=True)
class Spoken:
    """codes [n, K]; sound float32 [samples] in -1..1; ended: the model itself ended the speech."""

    codes: Tensor
    sound: np.ndarray
    ended: bool


class Speaker:
    """A model that speaks, with its codec, on one device. Raises PolymodalError for other models."""

    def __init__(self, opened: Opened):
        card = opened.card
        if card is None or not card.speaks:
            raise PolymodalError(
                f"{opened.name} does not speak.",
                'Give a checkpoint of a model that does (`polymodal models --for "text to speech"`).',
            )
        self.model: Any = opened.model
        self.device = next(self.model.parameters()).device
        family = card.family(card, self.model.config, opened.source)
        self.voice = family.media_processor(None)
        self.codec = family.read_codec(Path(opened.source)).to(self.device)
        self.rate = self.voice.sample_rate
        path = Path(opened.source) / "generation_config.json"
        told = read_json(path) if path.is_file() else {}
        self.draws = {key: told.get(key, value) for key, value in DRAWS.items()}
        self._vectors: dict[str, Tensor] = {}

    def vector(self, path: str) -> Tensor:
        """The voice of a recording [D]. Raises PolymodalError."""
        if path not in self._vectors:
            if getattr(self.model, "speaker_encoder", None) is None:
                raise PolymodalError(
                    f"--reference {path}: the checkpoint has no speaker encoder.",
                    "Name one of its speakers with --speaker, or take a Base checkpoint.",
                )
            heard = audio.decode_audio(path, audio.audio_header(path), self.rate)
            weight = next(self.model.speaker_encoder.parameters())
            mel = self.voice.features(heard).to(self.device, weight.dtype)
            with torch.no_grad():
                self._vectors[path] = self.model.speaker_encoder(mel[None])[0]
        return self._vectors[path]

    def prompt(self, said: Utterance) -> tuple[Tensor, Tensor]:
        """The model's input of a text. Raises PolymodalError."""
        ids = torch.tensor(self.voice.words(said.text), device=self.device)
        who: Any = said.speaker if said.speaker or not said.ref_audio else self.vector(said.ref_audio)
        with torch.no_grad():
            return self.model.prompt(ids, who, self.voice.language(said.language), False)

    def say(self, texts: Sequence[Utterance], seconds: float, **draws: Any) -> list[Spoken]:
        """Speech of texts with seeds, computed together. Raises PolymodalError."""
        frames = max(1, round(seconds * self.voice.frame_rate))
        settings = self.draws | draws
        generators = [torch.Generator().manual_seed(said.seed or 0) for said in texts]
        prompts = [self.prompt(said) for said in texts]
        made = self.model.speak(prompts, frames, **settings, generators=generators)
        out = []
        for codes, _ in made:
            sound = (
                self.codec.decode([codes])[0].float().cpu().numpy() if len(codes) else np.zeros(0, np.float32)
            )
            out.append(Spoken(codes.cpu(), sound, len(codes) < frames))
        return out


def write_wav(path: Path, sound: np.ndarray, rate: int) -> None:
    """float32 [samples] in -1..1 as 16 bits, whole or not at all."""
    partial = path.with_name(f".{os.getpid()}-{path.name}")
    with wave.open(str(partial), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((sound.clip(-1, 1) * 32767).round().astype("<i2").tobytes())
    os.replace(partial, path)


def spoken(
    speaker: Speaker,
    texts: Sequence[Utterance],
    numbers: Sequence[int],
    seed: int,
    batch_size: int,
    **settings: Any,
) -> Iterator[tuple[int, Utterance, Spoken]]:
    """(number, text with its seed, speech) of the texts with these numbers, texts of like length together.

    A text without a seed gets one from `seed` and its number.
    """
    order = sorted(numbers, key=lambda number: (len(texts[number].text), number))
    for start in range(0, len(order), batch_size):
        group = order[start : start + batch_size]
        own = [texts[n].seed if texts[n].seed is not None else seed * 1_000_003 + n for n in group]
        seeded = [replace(texts[n], seed=value) for n, value in zip(group, own, strict=True)]
        yield from zip(group, seeded, speaker.say(seeded, **settings), strict=True)


def main(
    checkpoint: str,
    *,
    texts: Sequence[str],
    file: str | None,
    references: Sequence[str],
    out: str,
    seed: int,
    batch_size: int,
    speaker: str | None = None,
    language: str | None = None,
    seconds: float = 60.0,
    device: str = "auto",
    base: str | None = None,
    ema: bool = False,
    dtype: str = "auto",
    revision: str | None = None,
    **draws: Any,
) -> int:
    """The command in one of its processes: NNNN.wav and samples.json. Returns 0. draws: temperature, top_k,
    repetition_penalty."""
    if len(references) > 1:
        raise PolymodalError(
            "--reference is given more than once, a text is spoken by one voice.",
            "Give several in a .jsonl file of --prompts, as ref_audio of each line.",
        )
    listed = read_utterances(file) if file else []
    listed += [Utterance(text.strip()) for text in texts]
    if not listed or not all(said.text.strip() for said in listed):
        raise PolymodalError("There is no text, or an empty one.", "Give --text TEXT or --prompts FILE.")
    common = {"ref_audio": references[0] if references else None, "speaker": speaker, "language": language}
    listed = [
        replace(said, **{k: v for k, v in common.items() if getattr(said, k) is None}) for said in listed
    ]
    folder = Path(out).expanduser()
    there = next(
        (path for path in (folder / "samples.json", *sorted(folder.glob("*.wav"))) if path.exists()), None
    )
    if there is not None:
        raise PolymodalError(f"{there} exists already.", "Choose another directory with --out, or remove it.")
    rows: list[dict[str, Any]] = []
    with process_group.runtime(command_recipe(checkpoint, device)) as rt:
        opening: dict[str, Any] = {"base": base, "ema": ema, "dtype": dtype, "revision": revision}
        opened = open_model(checkpoint, device=rt.device.torch, locate=alike(rt), **opening)
        model = Speaker(opened)
        folder.mkdir(parents=True, exist_ok=True)
        mine = range(rt.rank, len(listed), rt.world)
        with Bar("Speaking", len(mine), hidden=rt.rank > 0) as bar:
            for number, said, made in spoken(model, listed, mine, seed, batch_size, seconds=seconds, **draws):
                name = f"{number:04d}.wav"
                write_wav(folder / name, made.sound, model.rate)
                about = {"seconds": round(len(made.sound) / model.rate, 2), "ended": made.ended}
                rows.append({"number": number, "file": name, **asdict(said), **about})
                bar.advance(1)
        parts: list[Any] | None = [None] * rt.world if rt.rank == 0 else None
        dist.gather_object(rows, parts)
    if parts is None:
        return 0
    rows = sorted((row for part in parts for row in part), key=lambda row: row["number"])
    about = {
        "checkpoint": str(checkpoint),
        "weights": opened.identity,
        "ema": ema,
        "settings": {"seconds": seconds, "seed": seed, **model.draws, **draws},
        "polymodal": __version__,
    }
    text = json.dumps({**about, "samples": rows}, indent=1, ensure_ascii=False)
    (folder / "samples.json").write_text(text, encoding="utf-8")
    for row in rows:
        if not row["seconds"]:
            say(f"warning: {row['file']} is empty, the model ended the speech at once", error=True)
        elif not row["ended"]:
            say(f"warning: {row['file']} was cut at {seconds:g} s, its speech did not end", error=True)
    total = sum(row["seconds"] for row in rows)
    say(f"{folder}: {len(rows)} texts, {total:.1f} s of speech, samples.json")
    return 0
