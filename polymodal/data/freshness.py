"""Whether features were made of the data as they are now: captions, scores, rows, and the files of their
media.

Media are compared by size and time, and where only the time differs by content: data that were moved or
copied are the same data. Rows are found wherever they stand now.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Record
from polymodal.data.captions import TAKEN
from polymodal.data.features import Features, content_hash, identity, stamp
from polymodal.data.source import Corpus

MOST = 1000
"""Media of equal size and another time whose content is read; when all of these are the same, so are the
others."""


class Comparison:
    """Features and the corpus that they should be of; each process may look at its own share.

    given: the roles that the family takes; usable: whether a record can be encoded at all.
    """

    def __init__(
        self, features: Features, corpus: Corpus, given: Sequence[str], usable: Callable[[Record], bool]
    ):
        self.features, self.corpus, self.given, self.usable = features, corpus, given, usable
        manifest = features.manifest or {}
        had = [part.get("fingerprint") for part in manifest.get("datasets", [])]
        self.same = [part.fingerprint in had[k : k + 1] for k, part in enumerate(corpus.parts)]
        inside = manifest.get("media_inside", [])
        self.skipped = [same and k in inside for k, same in enumerate(self.same)]
        self.left_out = set(manifest.get("left_out", ()))
        self.row_of = {features.rows[i].get("record", i): i for i in range(len(features))}
        self.numbers = max(len(corpus), max(self.row_of, default=-1) + 1)
        self.read = 0

    def differing(self, numbers: Iterable[int]) -> tuple[list[int], list[int]]:
        """(records that are not what the row of their number was made of, rows without their record)."""
        records, rows = [], []
        for number in numbers:
            row = self.row_of.get(number)
            if number >= len(self.corpus):
                rows += [] if row is None else [row]
            elif not self.skipped[self._part(number)] and not self._unchanged(number, row):
                records.append(number)
                rows += [] if row is None else [row]
        return records, rows

    def report(self, records: Sequence[int], rows: Sequence[int]) -> str | None:
        """One sentence on what is new, changed or gone, of `differing` of all records; None for nothing."""
        free: dict[Any, list[int]] = {}
        for row in rows:
            free.setdefault(self._key_of_row(row), []).append(row)
        unmatched = []
        for number in records:
            record = self._record(number)
            found = None if record is None else free.get(self._key(number, record))
            match = next((r for r in found or () if self._same_media(record, r)), None)
            if match is None:
                unmatched.append(number)
            elif found is not None:
                found.remove(match)
        gone = {row for group in free.values() for row in group}
        seen: dict[str, list[str]] = {}
        for number in unmatched:
            row = self.row_of.get(number)
            what = "new rows" if row is None or row not in gone else self._change(number, row)
            if what != "new rows":
                gone.discard(row)  # type: ignore[arg-type]
            seen.setdefault(what, []).append(self.corpus.where(number))
        if gone:
            seen["rows no longer there"] = [self.features.where(row) for row in sorted(gone)]
        return "; ".join(f"{what}: {len(at)} (first: {at[0]})" for what, at in seen.items()) or None

    # ------------------------------------------------------------------------

    def _part(self, number: int) -> int:
        return next(k for k, part in enumerate(self.corpus.parts) if number < part.stop)

    def _record(self, number: int) -> Record | None:
        try:
            record = self.corpus[number]
        except PolymodalError:
            return None
        return record if "captions" in record.extra else None

    def _unchanged(self, number: int, row: int | None) -> bool:
        record = self._record(number)
        if row is None:
            left_out = number in self.left_out and self.same[self._part(number)]
            return record is None or left_out or not self.usable(record)
        if record is None or self._key(number, record) != self._key_of_row(row):
            return False
        return self._same_media(record, row)

    def _key(self, number: int, record: Record) -> Any:
        taken = tuple(tuple(record.extra.get(key, ())) for key in TAKEN)
        return self._part(number), tuple(record.extra["captions"]), taken, record.scores

    def _key_of_row(self, row: int) -> Any:
        values = self.features.rows[row]
        captions = values.get("cap", [])
        taken = tuple(tuple(values.get(key) or ()) for key in TAKEN)
        scores = [values.get(key) for key in ("score", "score_rejected") if "file_rejected" in values]
        return (
            values.get("dataset", 0),
            tuple([captions] if isinstance(captions, str) else captions),
            taken,
            tuple(score for score in scores if score is not None),
        )

    def _same_media(self, record: Record | None, row: int) -> bool:
        """Media that are gone, or of features that say nothing of them, cannot be compared: they count as the
        same."""
        values = self.features.rows[row]
        if record is None or "stamp" not in values:
            return record is not None
        try:
            now = identity(record, self.given)
        except PolymodalError:
            return True
        if stamp(now) == values["stamp"]:
            return True
        if sum(file[1] for file in now["files"]) != values.get("media_bytes"):
            return False
        self.read += 1
        return self.read > MOST or content_hash(record, self.given) == values.get("hash")

    def _change(self, number: int, row: int) -> str:
        record = self._record(number)
        if record is None:
            return "rows that are broken now"
        same = self._key(number, record) == self._key_of_row(row)
        return "changed media" if same else "changed captions, cuts, crops or scores"
