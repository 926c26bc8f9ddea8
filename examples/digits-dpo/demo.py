"""The demonstration behind `make demo-dpo`: a model that answers with digits learns from pairs to prefer words.

Every step is a command that a user would type. Beside the run stands one without the SFT term: its pair accuracy
is as good, and it can read no more.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "digits"), str(HERE.parent)]
import build  # noqa: E402
import shared  # noqa: E402

PARITY = "Is the digit in the picture even or odd?"


def question_of(row: dict) -> tuple[str, str, str]:
    """(picture, digit, word) of a row of build.data."""
    digit = row["messages"][1]["content"]
    return row["images"][0], digit, build.WORDS[int(digit)]


def pairs(train: Path, path: Path, count: int) -> int:
    """Writes rows that prefer the word to the digit, of the first scans to learn from."""
    asked = [r for r in json.loads(train.read_text()) if build.QUESTION in r["messages"][0]["content"]]
    lines = []
    for image, digit, word in map(question_of, asked[:count]):
        user, answers = (
            f"<image>{build.QUESTION}",
            [{"role": "assistant", "content": a} for a in (word, digit)],
        )
        row = {"prompt": [{"role": "user", "content": user}], "chosen": answers[:1], "rejected": answers[1:]}
        lines.append(json.dumps({**row, "images": [image]}))
    path.write_text("\n".join(lines) + "\n")
    return len(lines)


def questions(held_out: Path) -> dict[str, Path]:
    """Benchmarks of the held-out scans: which answer is likelier; the digit in either style; another question."""
    found = [question_of(json.loads(line)) for line in held_out.read_text().splitlines()]
    made: dict[str, list[dict]] = {
        "likelier": [
            build._row(f"<image>{build.QUESTION}", word, image) | {"options": [digit, word]}
            for image, digit, word in found
        ],
        "reading": [
            {"image": image, "question": build.QUESTION, "answer": [digit, word]}
            for image, digit, word in found
        ],
        "parity": [
            build._row(f"<image>{PARITY}", ("even", "odd")[int(digit) % 2], image)
            for image, digit, _ in found
        ],
    }
    files = {name: held_out.with_name(f"{name}.jsonl") for name in made}
    for name, file in files.items():
        file.write_text("".join(json.dumps(row) + "\n" for row in made[name]))
    return files


def measured(checkpoint: Path, files: dict[str, Path], out: Path, nproc: int) -> dict:
    """Shares of the held-out scans: `likelier` by likelihood, `reading` and `parity` by answers, `words` in words."""
    found = {}
    for name, file in files.items():
        metric = "likelihood" if name == "likelier" else "exact"
        shared.polymodal(
            "evaluate", str(checkpoint), "jsonl", "--data", str(file), "--metric", metric, "--max-new-tokens", "8",
            "--out", str(out / name), "--nproc", str(nproc), "--html", "0",
        )  # fmt: skip
        found[name] = json.loads((out / name / "result.json").read_text())["score"]
    said = answers(out)
    found["words"] = sum(answer in build.WORDS for answer in said) / len(said)
    return found


def answers(out: Path) -> list[str]:
    lines = map(json.loads, (out / "reading" / "samples.jsonl").read_text().splitlines())
    return [str(row["answer"]).strip() for row in sorted(lines, key=lambda row: int(row["index"]))]


def report(root: Path, result: dict, rows: list[dict], parts: dict[str, list[str]]) -> Path:
    from polymodal import pages
    from polymodal.evaluate import run_page
    from polymodal.evaluate.thumbnails import thumbnail

    cards = []
    for i in random.Random(1).sample(range(len(rows)), 24):
        image, digit, word = question_of(rows[i])
        shown = [
            (name, said[i], float(said[i] in (word, *[digit] * (name == "before"))))
            for name, said in parts.items()
        ]
        cards.append(pages.Card(build.QUESTION, shown, word, [thumbnail(str(root / "data" / image))]))
    numbers = {
        f"{of}, {when}": f"{result[when][key]:.1%}"
        for key, of in (("likelier", "word preferred"), ("reading", "digit read"), ("parity", "even or odd"))
        for when in ("before", "after", "without_sft")
    }
    lead = (
        f"A model that reads digits and answers with one learned from {result['pairs']} pairs to answer in words, by DPO with "
        f"adapters in {result['steps']} steps. All figures are of {len(rows)} scans that it never saw. The run without the SFT "
        "term shows why likelihoods are to be watched: pair accuracy alone does not tell it from the other."
    )
    steps = [
        ("See the pairs as the model meets them.", f"polymodal data show examples/digits-dpo/recipe.yaml -o {root}/pairs.html"),
        ("Try another loss.", "polymodal train examples/digits-dpo/recipe.yaml --nproc 2 train.preference.loss=orpo checkpoint.dir=runs/demo-dpo/orpo"),
    ]  # fmt: skip
    curves = run_page.curves(run_page.read_metrics(root / "run"), unit="loss of a pair")
    text = run_page.page("Words preferred to digits", lead, numbers, curves, cards, steps)
    return pages.write(root / "report.html", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path("runs/demo-dpo"))
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--start", type=Path, help="a checkpoint that reads digits, in place of training one")
    args = parser.parse_args()
    root, started = args.dir, time.monotonic()
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)

    shared.say("scans, pairs and questions")
    train, held_out = build.data(root / "data")
    count = pairs(train, root / "data" / "pairs.jsonl", 1500)
    files = questions(held_out)
    nproc = ("--nproc", str(args.nproc))

    start = args.start
    if start is None:
        shared.say("a model that reads digits, from random weights")
        texts = [m["content"] for row in json.loads(train.read_text()) for m in row["messages"]]
        model, start = build.model(root / "model", texts), root / "start" / "export"
        shared.polymodal(
            "train", str(HERE.parent / "digits" / "recipe.yaml"), *nproc, f"model.source={model}", f"data.datasets.0.path={train}",
            f"checkpoint.dir={start.parent}", "checkpoint.every=0", "train.epochs=4",
        )  # fmt: skip

    shared.say("before")
    result: dict = {"before": measured(start, files, root / "before", args.nproc)}
    words = (
        "train", str(HERE / "recipe.yaml"), *nproc, f"model.source={start}", f"data.datasets.0.path={root}/data/pairs.jsonl",
    )  # fmt: skip
    shared.say("DPO")
    shared.polymodal(*words, f"checkpoint.dir={root}/run")
    shared.say("DPO without the SFT term, for comparison")
    shared.polymodal(
        *words, f"checkpoint.dir={root}/without", "train.preference.loss=sigmoid", "optim.lr=2.0e-3"
    )
    shared.say("after")
    for name, run in (("after", "run"), ("without_sft", "without")):
        result[name] = measured(root / run, files, root / name, args.nproc)

    metrics = [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in held_out.read_text().splitlines()]
    result |= {
        "steps": metrics[-1]["step"],
        "pairs": count,
        "held_out": len(rows),
        "processes": args.nproc,
        "margin": metrics[-1]["rewards/margin"],
        "seconds": round(time.monotonic() - started, 1),
    }
    parts = {name: answers(root / name) for name in ("before", "after", "without_sft")}
    page = report(root, result, rows, parts)
    shared.write_result(root / "result.json", result)
    before, after = result["before"], result["after"]
    shared.say(
        f"word preferred {before['likelier']:.1%} -> {after['likelier']:.1%}, digit read {before['reading']:.1%} -> "
        f"{after['reading']:.1%}; {result['seconds'] / 60:.1f} minutes; open {page}"
    )


if __name__ == "__main__":
    main()
