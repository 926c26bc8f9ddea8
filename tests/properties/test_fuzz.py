"""Damaged files of every format through the readers: inputs that fell once, and new ones for an hour.

POLYMODAL_FUZZ_SECONDS: the time of all formats together; POLYMODAL_FUZZ_KEEP: the folder for inputs that fall.
"""

from __future__ import annotations

import os
import random
import time
import traceback
from pathlib import Path

import pytest

from tests.properties.corpus import damaged, read, valid_files

SEEDS = sorted(Path(__file__).parent.glob("seeds/*"))


@pytest.mark.parametrize("seed", SEEDS, ids=lambda path: path.name)
def test_what_fell_once_is_read_or_refused(seed, tmp_path):
    """A seed's name is NUMBER-NAME: NAME is that of the valid file it was made from."""
    valid_files(tmp_path)
    path = tmp_path / seed.name.partition("-")[2]
    path.write_bytes(seed.read_bytes())
    read(path)


@pytest.mark.nightly
def test_damaged_files_of_every_format(tmp_path):
    seconds = float(os.environ.get("POLYMODAL_FUZZ_SECONDS", 3600))
    keep = Path(os.environ.get("POLYMODAL_FUZZ_KEEP", tmp_path / "fell"))
    keep.mkdir(parents=True, exist_ok=True)
    work = tmp_path / "work"
    work.mkdir()
    files = valid_files(work)
    seed = random.randrange(1 << 32)
    choose = random.Random(seed)
    fell, tried = {}, 0
    for name, whole in files.items():
        path = work / name
        stop = time.monotonic() + seconds / len(files)
        while time.monotonic() < stop:
            edits = [
                (choose.randrange(5), choose.random(), choose.choice((0, 1, 4, 40)), choose.randrange(64))
                for _ in range(choose.randint(1, 4))
            ]
            data = damaged(whole, edits)
            path.write_bytes(data)
            now = keep / f"now-{name}"  # is left behind when the process itself dies
            now.write_bytes(data)
            began, tried = time.monotonic(), tried + 1
            try:
                read(path)
                cause = "" if time.monotonic() - began < 60 else "it takes more than a minute"
            except Exception as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                cause = f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}: {error}"[:300]
            if cause and (name, cause[:60]) not in fell:
                fell[name, cause[:60]] = cause
                (keep / f"{len(fell)}-{name}").write_bytes(data)
            now.unlink()
        path.write_bytes(whole)
    print(f"{tried} damaged files of {len(files)} formats, random seed {seed}")
    listed = "\n".join(f"{name}: {cause}" for (name, _), cause in fell.items())
    assert not fell, f"kept in {keep} (random seed {seed}):\n{listed}"
