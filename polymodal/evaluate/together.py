"""Figures of questions that are judged together: all turns of a question, both questions about a picture.

Each rule takes the scored samples and, of each, the key of the questions that it belongs with, and gives
figures by name: shares of 0 to 1, or points where the benchmark counts them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from polymodal.evaluate.results import Judged

Figures = dict[str, float]
MILLION = 1_000_000
COGNITION = ("code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation")
"""MME's categories of cognition; the others are of perception (Fu et al. 2023, table 1)."""
OCR = {  # OCRBench's five parts by the row's question type (Liu et al. 2023)
    "regular text recognition": "text recognition",
    "irregular text recognition": "text recognition",
    "artistic text recognition": "text recognition",
    "handwriting recognition": "text recognition",
    "digit string recognition": "text recognition",
    "non-semantic text recognition": "text recognition",
    "scene text-centric vqa": "scene text-centric VQA",
    "doc-oriented vqa": "doc-oriented VQA",
    "key information extraction": "key information extraction",
    "handwritten mathematical expression recognition": "handwritten formulas",
}


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else 0.0


def _all_right(samples: Sequence[Judged], keys: Sequence[str]) -> dict[str, bool]:
    """Whether every sample of a key is right."""
    right = dict[str, bool]()
    for sample, key in zip(samples, keys, strict=True):
        right[key] = right.get(key, True) and sample.score == 1
    return right


def circular(samples: Sequence[Judged], keys: Sequence[str]) -> Figures:
    """A question is right when it is with its options in every order (Liu et al. 2023, MMBench, sec. 4.1)."""
    return {"circular": _share(list(_all_right(samples, keys).values()))}


def mme(samples: Sequence[Judged], keys: Sequence[str]) -> Figures:
    """Of each category 100 x (share of right answers + share of pictures with both answers right), summed."""
    points = {"perception": 0.0, "cognition": 0.0}
    for name in dict.fromkeys(sample.groups.get("category", "") for sample in samples):
        pairs = [(s, k) for s, k in zip(samples, keys, strict=True) if s.groups.get("category", "") == name]
        right = [sample.score == 1 for sample, _ in pairs]
        both = _all_right([s for s, _ in pairs], [k for _, k in pairs]).values()
        kind = "cognition" if name.lower() in COGNITION else "perception"
        points[kind] += 100 * (_share(right) + _share(list(both)))
    return {**points, "total": sum(points.values())}


def hallusion(samples: Sequence[Judged], keys: Sequence[str]) -> Figures:
    """Share of questions right for every figure, and of figures with every question right (Guan et al. 2023).

    A key is `category/set/figure/question`.
    """
    parts = [key.split("/") for key in keys]
    figures = ["/".join(part[:3]) for part in parts]
    questions = ["/".join([*part[:2], part[3]]) for part in parts]
    return {
        "by question": _share(list(_all_right(samples, questions).values())),
        "by figure": _share(list(_all_right(samples, figures).values())),
    }


def pope(samples: Sequence[Judged], keys: Sequence[str]) -> Figures:
    """Precision, recall and F1 of `yes` (Li et al. 2023); an answer that is neither counts as no."""
    said = [sample.extracted == "yes" for sample in samples]
    true = [sample.expected[0].strip().lower() in ("yes", "1", "true") for sample in samples]
    both = sum(a and b for a, b in zip(said, true, strict=True))
    precision = both / sum(said) if any(said) else 0.0
    recall = both / sum(true) if any(true) else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return {"precision": precision, "recall": recall, "f1": f1, "yes": _share(said)}


def ocrbench(samples: Sequence[Judged], keys: Sequence[str]) -> Figures:
    """Right answers, of 1000 in the whole benchmark, and by its five parts."""
    points = dict[str, float]()
    for sample in samples:
        kind = str(sample.groups.get("question_type", sample.groups.get("category", ""))).lower()
        part = OCR.get(kind, kind or "questions")
        points[part] = points.get(part, 0.0) + (sample.score or 0.0)
    return {**points, "points": sum(points.values())}


RULES: Mapping[str, Callable[[Sequence[Judged], Sequence[str]], Figures]] = {
    "circular": circular,
    "mme": mme,
    "hallusion": hallusion,
    "pope": pope,
    "ocrbench": ocrbench,
}


def key(rule: str, id: str, row: Mapping[str, Any]) -> str:
    """The questions that a row is judged with."""
    if rule == "circular" and id.isdigit():
        return str(int(id) % MILLION)
    if rule == "mme":
        found = next((row[name] for name in ("image_path", "question_id") if row.get(name)), id)
        return f"{row.get('category')}/{found}"
    if rule == "hallusion":
        names = ("set_id", "figure_id", "question_id")
        if all(row.get(name) not in (None, "") for name in names):
            kind = next((row[n] for n in ("l2-category", "subcategory") if row.get(n)), "")
            return "/".join([f"{row.get('category')}.{kind}", *(str(row[name]) for name in names)])
        parts = id.split("_")  # VS_chart_0_1_0
        return "/".join([".".join(parts[:-3]), *parts[-3:]]) if len(parts) > 3 else f"/{id}/0/0"
    return id
