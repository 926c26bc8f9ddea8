"""A small corpus and chat processor with the interfaces of polymodal.data, over a real file of JSON lines.

For tests of the index, the schedule and the loader: they must be importable by spawned processes.
A row: {"n": tokens, "media": [patches, ...], "bad": why, "slow": seconds, "exit": signal}.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import IGNORE, MediaStream, Message, Record, Sample, SampleLengths

WIDTH = 8  # of a patch


VISION = MediaStream("vision", "pixel_values", "grid_thw")


@dataclass(frozen=True)
class Part:
    name: str
    start: int
    stop: int
    weight: float | None = None
    repeat: float = 1.0
    fingerprint: str = ""


class LinesCorpus:
    def __init__(self, path):
        self.path = str(path)
        text = Path(path).read_text()
        self.lines = text.splitlines()
        self.parts = [
            Part(Path(path).name, 0, len(self.lines), fingerprint=hashlib.sha256(text.encode()).hexdigest())
        ]

    def __len__(self):
        return len(self.lines)

    def where(self, i):
        return f"{self.path}, line {i + 1}"

    def changed(self):
        return {}

    def __getitem__(self, i):
        try:
            row = json.loads(self.lines[i])
        except ValueError:
            raise PolymodalError(f"{self.where(i)}: not valid JSON.", "Correct the line.") from None
        return Record((Message("user", ("x",)),), self.where(i), extra=row)


class CountingChat:
    """Tokens 0..n-1; the first half is the question. Writes every measured record to `tally`, if given."""

    def __init__(self, max_length, tally=None, rows=1):
        self.max_length, self.tally, self.rows = max_length, tally, rows
        self.fingerprint = "counting"
        self.streams = (VISION,)

    def measure(self, records):
        if self.tally:
            with open(self.tally, "a") as file:
                file.write(f"{os.getpid()}\n" * len(records))
        out = []
        for record in records:
            row = record.extra
            time.sleep(row.get("measure_slow", 0))
            if row.get("measure_exit"):
                os.kill(os.getpid(), row["measure_exit"])
            n = row["n"]
            out.append(
                row["unreadable"]
                if "unreadable" in row
                else SampleLengths(n, row.get("trained", n - n // 2), lengths(row))
            )
        return out

    def pieces(self, record):
        n, out = record.extra["n"], []
        while n > 0:
            take = min(n, record.extra.get("message", self.max_length))
            out.append(Record(record.messages, record.where, extra={**record.extra, "n": take}))
            n -= take
        return out

    def sample(self, record, id, pixels=True):
        row = record.extra
        time.sleep(row.get("slow", 0))
        if row.get("exit"):
            os.kill(os.getpid(), row["exit"])
        if "bad" in row:
            raise PolymodalError(f"{record.where}: {row['bad']}.", "Correct the file.")
        if "bug" in row:
            raise ZeroDivisionError(row["bug"])
        n = row["n"] + row.get("grown", 0)
        labels = torch.arange(1, n + 1)
        labels[: n // 2] = IGNORE
        tensors = {
            "input_ids": torch.full((n,), id),
            "labels": labels,
            "weights": (labels != IGNORE).float(),
            "position_ids": torch.arange(n).expand(self.rows, n).clone(),
        }
        media = row.get("media", ())
        if media:
            chance = random.Random(row["seed"]).random()
            if pixels:
                tensors["pixel_values"] = torch.full((sum(media), WIDTH), chance)
            tensors["grid_thw"] = torch.tensor([[1, 1, m] for m in media])
        return Sample(
            id, tensors, SampleLengths(n, n - n // 2, lengths(row)), record.where, streams=self.streams
        )


def lengths(row):
    return {"vision": tuple(row["media"])} if row.get("media") else {}


def write_rows(path, rows):
    Path(path).write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path
