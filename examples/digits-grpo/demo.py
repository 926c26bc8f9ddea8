"""The demonstration behind `make demo-grpo`: a half-trained reader of digits learns from its own answers.

Every step is a command that a user would type. Three seeds learn from whether an answer is right; a fourth run has
rewards of a coin and gains nothing: it is the reward that teaches, not the sharpening of what the model said anyway.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "digits"), str(HERE.parent)]
import build  # noqa: E402
import shared  # noqa: E402

SEEDS = (0, 1, 2)


def prompts(train: Path, path: Path) -> int:
    """Writes the question about each scan to learn from, with the digit as `answer`."""
    asked = [r for r in json.loads(train.read_text()) if build.QUESTION in r["messages"][0]["content"]]
    lines = [
        {"problem": r["messages"][0]["content"], "answer": r["messages"][1]["content"], "images": r["images"]}
        for r in asked
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return len(lines)


def measured(checkpoint: Path, held_out: Path, out: Path, nproc: int) -> float:
    """Share of the held-out scans that are read right, by greedy answers."""
    shared.polymodal(
        "evaluate", str(checkpoint), "jsonl", "--data", str(held_out), "--metric", "exact", "--max-new-tokens", "4",
        "--out", str(out), "--nproc", str(nproc), "--html", "0",
    )  # fmt: skip
    return json.loads((out / "result.json").read_text())["score"]


def answers(out: Path) -> list[str]:
    lines = map(json.loads, (out / "samples.jsonl").read_text().splitlines())
    return [str(row["answer"]).strip() for row in sorted(lines, key=lambda row: int(row["index"]))]


def logged(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def ends(run: Path, key: str) -> tuple[float, float]:
    """A figure's mean over the first and the last ten steps that log it."""
    values = [line[key] for line in logged(run) if key in line]
    return sum(values[:10]) / len(values[:10]), sum(values[-10:]) / len(values[-10:])


def report(root: Path, result: dict, rows: list[dict], parts: dict[str, list[str]]) -> Path:
    from polymodal import pages
    from polymodal.evaluate import run_page
    from polymodal.evaluate.thumbnails import thumbnail

    cards = []
    for i in random.Random(1).sample(range(len(rows)), 24):
        digit = rows[i]["messages"][1]["content"]
        shown = [(name, said[i], float(said[i] == digit)) for name, said in parts.items()]
        picture = thumbnail(str(root / "data" / rows[i]["images"][0]))
        cards.append(pages.Card(build.QUESTION, shown, digit, [picture]))
    numbers = {"digit read, before": f"{result['before']:.1%}"}
    numbers |= {
        f"digit read, seed {seed}": f"{score:.1%}" for seed, score in zip(SEEDS, result["after"], strict=True)
    }
    numbers["digit read, rewards of a coin"] = f"{result['control']:.1%}"
    for name, key in (("sampled reward", "reward"), ("entropy", "entropy")):
        numbers[name] = "{:.2f} to {:.2f}".format(*result[key])
    lead = (
        f"A model that was stopped while it learned to read digits went on by GRPO for {result['steps']} steps: eight answers to "
        f"each of about 16 scans, a reward of 1 for the right digit. All accuracies are of greedy answers to {len(rows)} scans "
        "that it never saw. The coin's run is the control: what it gains is not learned from rewards."
    )
    steps = [
        ("Read what it answered while it trained.", f"head {root}/seed-0/rollouts.jsonl"),
        ("Try GSPO.", "polymodal train examples/digits-grpo/recipe.yaml --nproc 2 train.grpo.ratio=sequence "
         "train.grpo.aggregate=sequence checkpoint.dir=runs/demo-grpo/gspo"),
    ]  # fmt: skip
    curves = run_page.curves(run_page.read_metrics(root / "seed-0"), unit="loss of a token")
    return pages.write(
        root / "report.html",
        run_page.page("Learned from its own answers", lead, numbers, curves, cards, steps),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path("runs/demo-grpo"))
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument(
        "--start", type=Path, help="a checkpoint that half reads digits, in place of training one"
    )
    parser.add_argument("words", nargs="*", help="overrides of the recipe of the runs with rewards")
    args = parser.parse_args()
    root, started = args.dir, time.monotonic()
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])

    shared.say("scans and prompts")
    train, held_out = build.data(root / "data")
    count = prompts(train, root / "data" / "prompts.jsonl")
    nproc = ("--nproc", str(args.nproc))
    start = args.start
    if start is None:
        shared.say("a model that half reads digits, from random weights")
        texts = [m["content"] for row in json.loads(train.read_text()) for m in row["messages"]]
        model, start = build.model(root / "model", texts), root / "start" / "export"
        shared.polymodal(
            "train", str(HERE.parent / "digits" / "recipe.yaml"), *nproc, f"model.source={model}", f"data.datasets.0.path={train}",
            f"checkpoint.dir={start.parent}", "checkpoint.every=0", "train.steps=250",
        )  # fmt: skip
    result: dict = {"before": measured(start, held_out, root / "before", args.nproc)}
    words = (
        "train", str(HERE / "recipe.yaml"), *nproc, f"model.source={start}", f"data.datasets.0.path={root}/data/prompts.jsonl",
        f"data.validation.0.path={held_out}", *args.words,
    )  # fmt: skip
    result["after"] = []
    for seed in SEEDS:
        shared.say(f"GRPO, seed {seed}")
        run = root / f"seed-{seed}"
        shared.polymodal(*words, f"checkpoint.dir={run}", f"train.seed={seed}")
        result["after"].append(measured(run, held_out, root / f"after-{seed}", args.nproc))
    shared.say("the same with rewards of a coin")
    coin = "train.rewards=[{name: coin, function: 'chance:chance'}, {name: exact, weight: 0}]"
    shared.polymodal(*words, f"checkpoint.dir={root}/control", coin, "train.grpo.filter=null")
    result["control"] = measured(root / "control", held_out, root / "after-control", args.nproc)

    rows = [json.loads(line) for line in held_out.read_text().splitlines()]
    result |= {
        "gain": sum(result["after"]) / len(SEEDS) - result["before"],
        "control_gain": result["control"] - result["before"],
        "reward": ends(root / "seed-0", "reward"),
        "entropy": ends(root / "seed-0", "entropy"),
        "logp_difference": max(line.get("logp_difference", 0.0) for line in logged(root / "seed-0")),
        "steps": logged(root / "seed-0")[-1]["step"],
        "prompts": count,
        "held_out": len(rows),
        "processes": args.nproc,
        "seconds": round(time.monotonic() - started, 1),
    }
    parts = {"before": answers(root / "before"), "after": answers(root / "after-0")}
    page = report(root, result, rows, parts)
    shared.write_result(root / "result.json", result)
    after = ", ".join(f"{score:.1%}" for score in result["after"])
    shared.say(
        f"digit read {result['before']:.1%} -> {after} (a coin's rewards: {result['control']:.1%}); "
        f"{result['seconds'] / 60:.1f} minutes; open {page}"
    )


if __name__ == "__main__":
    main()
