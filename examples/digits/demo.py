"""The demonstration behind `make demo`: model, data, evaluate, train, stop, resume, export, ask, report.

Every step is a command that a user would type; this file only types them, waits, and writes the report.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import build

HERE = Path(__file__).parent


def polymodal(*words: str) -> list[str]:
    return [sys.executable, "-m", "polymodal", *words]


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def evaluate(checkpoint: Path, rows: Path, out: Path, nproc: int) -> dict:
    """`polymodal evaluate`: share of held-out pictures whose digit the model finds likeliest."""
    words = polymodal(
        "evaluate", str(checkpoint), "jsonl", "--data", str(rows), "--metric", "likelihood", "--out", str(out), "--nproc", str(nproc)
    )  # fmt: skip
    subprocess.run(words, check=True)
    return json.loads((out / "result.json").read_text())


def answers(out: Path) -> dict[str, str]:
    """Index -> answer, from the per-sample file of an evaluation."""
    lines = (out / "samples.jsonl").read_text().splitlines()
    return {str(row["index"]): str(row["answer"]) for row in map(json.loads, lines)}


def train_until(words: list[str], metrics: Path, step: int) -> None:
    """Start training and ask it to stop (SIGTERM) once metrics.jsonl has reached a step."""
    process = subprocess.Popen(words)
    while process.poll() is None:
        if metrics.is_file() and metrics.read_text().count("\n") >= step:
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.2)
    if process.wait() != 0:
        raise SystemExit(f"training ended with exit code {process.returncode}")


def ask_with_transformers(export: Path, image: Path, question: str) -> str:
    """Plain transformers, nothing of ours: the export is a hub checkpoint like any other."""
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(export)
    model = AutoModelForImageTextToText.from_pretrained(export)
    content = [{"type": "image", "image": Image.open(image)}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    new = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(new, skip_special_tokens=True).strip()


def report(
    root: Path, run: Path, result: dict, rows: list[dict], before: dict[str, str], after: dict[str, str]
) -> Path:
    from polymodal import pages
    from polymodal.evaluate import run_page
    from polymodal.evaluate.thumbnails import thumbnail

    chosen = random.Random(1).sample(range(len(rows)), min(24, len(rows)))
    shown = []
    for i in chosen:
        row, expected = rows[i], rows[i]["messages"][1]["content"]
        answered = [
            (label, found.get(str(i), ""), float(found.get(str(i)) == expected))
            for label, found in (("before", before), ("after", after))
        ]
        question = row["messages"][0]["content"].replace("<image>", "")
        shown.append(
            pages.Card(question, answered, expected, [thumbnail(str(root / "data" / row["images"][0]))])
        )
    numbers = {
        "right before": f"{result['before']:.0%}",
        "right after": f"{result['after']:.0%}",
        "steps": str(result["steps"]),
        "stopped and resumed at": str(result["resumed_at"]),
        "processes": str(result["processes"]),
        "minutes": f"{result['seconds'] / 60:.1f}",
    }
    lead = (
        f"A {result['parameters_millions']:.1f} M parameter Qwen2.5-VL with random weights learned to read handwritten digits from "
        f"{result['train_rows']} rows, on {result['processes']} CPU processes with FSDP2. {len(rows)} pictures were held out."
    )
    steps = [
        ("Talk to what you trained.", f"polymodal chat {run}/export --image {root}/data/{rows[0]['images'][0]} --prompt '{build.QUESTION}'"),
        ("See what the model is shown: tokens coloured by their weight in the loss.", f"polymodal data show examples/digits/recipe.yaml -o {root}/samples.html"),
        ("Train again with adapters only.", "polymodal train examples/digits/recipe.yaml --nproc 2 model.source=runs/demo/run/export model.lora.rank=8 checkpoint.dir=runs/demo/lora name=lora"),
        ("Write a recipe for a real checkpoint.", "polymodal init qwen2.5-vl --size 7b --task sft --devices 8"),
    ]  # fmt: skip
    text = run_page.page(
        "Handwritten digits, before and after",
        lead,
        numbers,
        run_page.curves(run_page.read_metrics(run), result["resumed_at"]),
        shown,
        steps,
    )
    return pages.write(root / "report.html", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("override", nargs="*", help="a.b=c overrides of the recipe")
    args = parser.parse_args()
    root, started = args.dir, time.monotonic()
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)

    say("model and data: a small Qwen2.5-VL from its config, and real scans of digits")
    train, held_out = build.data(root / "data")
    rows = json.loads(train.read_text())
    model = build.model(root / "model", [m["content"] for row in rows for m in row["messages"]])
    tests = [json.loads(line) for line in held_out.read_text().splitlines()]
    print(f"{len(rows)} rows to learn from, {len(tests)} held-out pictures")

    say("before training")
    before = evaluate(model, held_out, root / "before", args.nproc)

    run = root / "run"
    words = polymodal(
        "train", str(HERE / "recipe.yaml"), "--nproc", str(args.nproc), f"model.source={model}", f"data.datasets.0.path={train}",
        f"checkpoint.dir={run}", *args.override,
    )  # fmt: skip
    checked = subprocess.run(
        [*polymodal("check"), *[w for w in words[4:] if w not in ("--nproc", str(args.nproc))]], check=False
    )
    if checked.returncode:
        raise SystemExit(checked.returncode)
    say(f"training on {args.nproc} processes; it will be stopped once on the way")
    train_until(words, run / "metrics.jsonl", 150)
    say("the same command again: it goes on where it stopped")
    subprocess.run(words, check=True)

    say("after training")
    after = evaluate(run / "export", held_out, root / "after", args.nproc)
    said = ask_with_transformers(run / "export", root / "data" / tests[0]["images"][0], build.QUESTION)
    print(
        f"plain transformers, asked about {tests[0]['images'][0]}: {said!r} (expected {tests[0]['messages'][1]['content']!r})"
    )

    summary = json.loads((run / "summary.json").read_text())
    import transformers

    config = transformers.AutoModelForImageTextToText.from_pretrained(run / "export")
    result = {
        "before": before["score"],
        "after": after["score"],
        "steps": summary["step"],
        "resumed_at": summary["resumed_at"],
        "seconds": round(time.monotonic() - started, 1),
        "processes": args.nproc,
        "train_rows": len(rows),
        "held_out": len(tests),
        "parameters_millions": sum(p.numel() for p in config.parameters()) / 1e6,
        "asked": {
            "image": tests[0]["images"][0],
            "answer": said,
            "expected": tests[0]["messages"][1]["content"],
        },
    }
    page = report(root, run, result, tests, answers(root / "before"), answers(root / "after"))
    temporary = root / ".result.json.tmp"
    temporary.write_text(json.dumps(result, indent=1))
    os.replace(temporary, root / "result.json")
    say(
        f"right before {result['before']:.0%}, after {result['after']:.0%}; {result['seconds'] / 60:.1f} minutes; open {page}"
    )


if __name__ == "__main__":
    main()
