"""Writes docs/benchmarks.md from the JSON files that the benchmarks left in benchmarks/results/.

    python benchmarks/table.py

Each benchmark is a command (`python benchmarks/NAME.py --json benchmarks/results/NAME.json`); a row that was not run
is not in the table.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
Row = tuple[str, str, str, bool | None]  # what, figure, wanted, met


def loss_memory(r: dict) -> list[Row]:
    what = f"peak memory of the loss at {r['tokens']:,} tokens, vocabulary {r['vocabulary']:,}, over whole logits and cross entropy"
    return [
        (what, f"{r['ratio']:.2f}", f"<= {r['wanted']}", r["ratio"] <= r["wanted"]),
        ("CPU time of the same", f"{r['seconds_ratio']:.2f}", "-", None),
    ]


def load_memory(r: list) -> list[Row]:
    return [
        (
            f"loading {row['model']}, {row['ranks']} ranks: peak of host memory over a rank's own share",
            f"{row['ratio']:.2f}", "< 1.3", row["ratio"] < 1.3,
        )
        for row in r
    ]  # fmt: skip


def throughput(r: dict) -> list[Row]:
    names = {
        "trainer": ("transformers' Trainer, defaults", 2.0),
        "trainer-grouped": ("transformers' Trainer, length grouping", 1.3),
        "trl": ("TRL's SFTTrainer (it refuses to pack pictures)", 1.0),
        "trl-text-packed": ("TRL's SFTTrainer, packing, text alone", 1.0),
    }
    rows: list[Row] = []
    for name, ratio in r["ratio"].items():
        other, wanted = names[name]
        ours = "ours-text" if "text" in name else "ours"
        of = "" if "text" in name else "text and pictures, "
        clock = "a CPU second, one core" if r["clock"] == "cpu_seconds" else f"a second, {r['threads']} cores"
        what = f"useful tokens {clock}, {of}{r['precision']}, over {other} (runs within {r['spread'][ours]} and {r['spread'][name]})"
        rows.append((what, f"{ratio:.2f}", f">= {wanted}", ratio >= wanted))
    return rows


def convert_speed(r: dict) -> list[Row]:
    what = f"conversion of {r['bytes'] / 1e9:.1f} GB, hub -> tree at TP 2 x PP 2"
    memory = r["memory_ratio"]
    return [
        (f"{what}: speed over cp of the same bytes", f"{r['ratio']:.2f}", f">= {r['wanted']}", r["ratio"] >= r["wanted"]),
        ("the same with reading everything back", f"{r['with_reading_back']:.2f}", "-", None),
        (
            "peak of the process in the same run over the largest file written", f"{memory:.2f}",
            f"< {r['memory_wanted']}", memory < r["memory_wanted"],
        ),
    ]  # fmt: skip


def bare_loop(r: dict) -> list[Row]:
    return [
        (
            f"our step over a bare loop on the same packs, {precision} (single steps {one['least']:.2f} to {one['most']:.2f})",
            f"{one['ratio']:.3f}", f"<= {one['wanted']}", one["ratio"] <= one["wanted"],
        )
        for precision, one in r["precision"].items()
    ]  # fmt: skip


def flops(r: dict) -> list[Row]:
    rows: list[Row] = []
    for precision, one in r["precision"].items():
        lost = "; ".join(f"{name} {share:.0%}" for name, share in one["losses"][:3])
        wanted = one["wanted"]
        rows.append((
            f"model FLOP/s of the step over the best matrix product ({one['best_gflops']:.0f} GFLOP/s), {precision}; of what is lost: {lost}",
            f"{one['ratio']:.2f}", f">= {wanted}" if wanted else "-", one["ratio"] >= wanted if wanted else None,
        ))  # fmt: skip
    return rows


def generation(r: dict) -> list[Row]:
    what = "a small Wan 2.1, fp32, one core, CPU time: "
    told = {
        "encode": ("throughput of `encode`, from mp4 files to features, over bare encoder calls on decoded tensors", ">="),
        "step": ("our step on features over a bare loop on the same batches", "<="),
        "diffusers": ("samples a second, files to optimizer step, over the loop of diffusers' examples (accelerate)", ">="),
        "online": ("a step that decodes and encodes its clips over one on features", ""),
    }  # fmt: skip
    rows: list[Row] = []
    for name, (said, sign) in told.items():
        one = r["measures"][name]
        ratio, wanted = one["ratio"], one["wanted"]
        met = None if not wanted else ratio >= wanted if sign == ">=" else ratio <= wanted
        rows.append((what + said, f"{ratio:.3f}", f"{sign} {wanted}" if wanted else "-", met))
    held = {mode: f"{count / 2**20:.1f} MiB" for mode, count in r["measures"]["memory"]["bytes"].items()}
    said = f"weights of frozen encoders resident in training: on features (encoding online: {held['online']})"
    rows.append((said, held["cached"], "0", r["measures"]["memory"]["bytes"]["cached"] == 0))
    return rows


def fsdp_memory(r: dict) -> list[Row]:
    held = f"bytes that a rank of {r['ranks']} holds under FSDP2 (parameters, gradients, optimizer) over one process"
    return [
        (held, f"{r['ratio']:.2f}", f"<= {r['wanted']}", r["ratio"] <= r["wanted"]),
        (
            "peak of the process in the same run, activations and gathered layers included",
            f"{r['peak_ratio']:.2f}",
            "-",
            None,
        ),
    ]


def check_speed(r: dict) -> list[Row]:
    first = r["first"]
    what = f"`check` on {first['samples']:,} samples, {first['pictures']:,} of them with pictures, from headers: samples/s"
    return [
        (what, f"{r['rate']:,.0f}", f">= {r['wanted']:,}", r["rate"] >= r["wanted"]),
        ("the same by second of CPU", f"{first['samples'] / first['cpu_seconds']:,.0f}", "-", None),
    ]


def schedule_growth(r: dict) -> list[Row]:
    rows: list[Row] = []
    first, *rest = r["growth"]
    for row in rest:
        for key, text in (
            ("first_batch_seconds", "time to the first batch"),
            ("memory_mib", "memory"),
            ("microseconds_a_sample", "time a sample"),
        ):
            what = f"schedule over {row['samples']:,} samples against {first['samples']:,}: {text}"
            rows.append((what, f"{row[key] / first[key]:.2f}", "flat", None))
    return rows


def context_attention(r: dict) -> list[Row]:
    what = f"packed causal attention ({', '.join(map(str, r['lengths']))} tokens), forward and backward: CPU time"
    return [
        (f"{what} over torch's, one process", f"{r['one_process']:.2f}", "<= 1.05", r["one_process"] <= 1.05),
        *(
            (f"{what} of two processes together over one, {name}", f"{r[key]:.2f}", "<= 1.2", r[key] <= 1.2)
            for key, name in (("ulysses", "Ulysses"), ("ring", "ring"))
        ),
    ]


def pipeline_bubble(r: dict) -> list[Row]:
    return [
        (
            f"idle share of a pipeline of 4 ranks, {row['stages']} stages each, {r['micro_batches']} micro-batches, {row['schedule']}: what longer units add (formula {row['formula']:.3f}); an action costs {row['milliseconds_an_action']:.1f} ms besides",
            f"{row['idle']:.3f}", "-", None,
        )
        for row in r["rows"]
    ]  # fmt: skip


def context_memory(r: dict) -> list[Row]:
    one = r["rows"][0]["bytes"]
    return [
        (
            f"bytes kept for backward of one sequence of {r['tokens']:,} tokens, {row['layout']} over one process, times cp",
            f"{row['bytes'] / one * row['cp']:.2f}", "<= 1.1", row["bytes"] / one * row["cp"] <= 1.1,
        )
        for row in r["rows"][1:]
    ]  # fmt: skip


def collective_bytes(r: dict) -> list[Row]:
    return [
        (
            f"bytes that the collectives of a step send over the least, {row['layout']}",
            f"{row['ratio']:.3f}", "<= 1.1", row["ratio"] <= 1.1,
        )
        for row in r["rows"]
    ]  # fmt: skip


WRITERS: dict[str, Callable[[Any], list[Row]]] = {
    "pipeline_bubble": pipeline_bubble,
    "throughput": throughput,
    "throughput_bf16": throughput,
    "bare_loop": bare_loop,
    "flops": flops,
    "generation": generation,
    "fsdp_memory": fsdp_memory,
    "loss_memory": loss_memory,
    "load_memory": load_memory,
    "check_speed": check_speed,
    "schedule_growth": schedule_growth,
    "context_attention": context_attention,
    "context_memory": context_memory,
    "collective_bytes": collective_bytes,
    "convert_speed": convert_speed,
}

HEAD = """# Benchmarks

Figures of the commands beside them, run on two CPU cores that other work shares at times: what counts are the ratios,
whose two sides ran in turns (A B A B) in one run. The training benchmarks share one model (Qwen2.5-VL's class, 40
million parameters, vocabulary 151,936), one set of rows (text alone to four pictures) and one dtype a row. A useful
token is one that is not padding. Written by `python benchmarks/table.py` from what the runs left in
`benchmarks/results/`; `pip install 'polymodal[bench]'` brings what is compared with.

| what | figure | wanted | | command |
|---|---|---|---|---|
"""

TAIL = """
Where the gain over padded trainers comes from: packs of several samples without padding, logits only of the tokens
that are trained and never whole, the patch embedding as a matrix product, one attention call a length, data made by a
worker while the step computes. TRL refuses to pack rows with pictures and to
train them without padding, so with pictures it runs padded, and its packing is compared on text alone.

## On an accelerator

None of the figures above is of one: none was at hand. `python benchmarks/accelerator.py --json found.json` is the one command
for the day one is there: one card, under ten minutes, from a clone of the repository with the package installed (it builds the
small models of `tests/`; nothing is downloaded). It prints a table of 80 columns and ends with exit code 1 if something is wrong:

* correctness: what `runtime/device.py` says of memory, peak and kernels; attention on every path and dtype, rings of 2 and 4
  among them, against float64 on the CPU; loss and gradients of packed, uniform and padded models, and the losses of a run that
  was stopped and resumed, against the CPU's; the bounds are in its first lines;
* speed: tokens/s and MFU of Qwen2.5-VL 3B's shape, frames/s of Wan 2.1 1.3B's, images/s of FLUX.1's with as many layers as fit,
  by recompute and with `parallel.compile`; packing against one sample a forward; the host's time a step; peak memory against
  `polymodal plan`; `encode` against bare calls of the encoders;
* `--peers`: transformers' Trainer and the loop of diffusers' examples on the same shapes, as ratios in the same run.

Each part is a process with a time limit, so that one that fails leaves the others; `--only PART` runs one. Without an accelerator
it takes small sizes (`--tiny`), which a test runs.
"""


MEMORY = """
## Memory by policy

MiB that a rank holds, each kind at its highest moment of an optimizer step: {micro_batches} micro-batches of {tokens:,} tokens
(a quarter of pictures) through small models of Qwen2.5-VL's class (8 language and 4 vision layers) and, for MoE,
Qwen3-VL MoE's, on gloo, counted allocation by allocation. gathered: parameters put together from shards; communication:
buffers of collectives; host: what the policy keeps on the host. Equal results: the rows of [parity](parity.md).

| policy | ranks | {kinds} |
|---|---|{lines}|
"""


def memory(r: dict) -> str:
    """The section about memory policies."""
    kinds = list(r["rows"][0]["bytes"])
    lines = [
        f"| {row['name']} | {row['ranks']} | " + " | ".join(f"{row['bytes'][kind] / 2**20:.2f}" for kind in kinds) + " |"
        for row in r["rows"]
    ]  # fmt: skip
    head = MEMORY.format(kinds=" | ".join(kinds), lines="|".join(["---:"] * len(kinds)), **r)
    return head + "\n".join(lines) + "\n\n`python benchmarks/memory.py`\n"


SECTIONS: dict[str, Callable[[Any], str]] = {"memory": memory}
"""Results that are tables of their own."""
ELSEWHERE = {"plan_layouts": "docs/plan.md"}
"""Results whose table is on another page, written by the benchmark itself."""


def text(results: Path) -> str:
    """The page, from the results in a directory."""
    lines = []
    for name, rows in WRITERS.items():
        path = results / f"{name}.json"
        if path.is_file():
            command = f"`python benchmarks/{name.removesuffix('_bf16')}.py{' --precision bf16' if name.endswith('_bf16') else ''}`"
            result = json.loads(path.read_text())
            if isinstance(result, dict) and result.get("clock") == "seconds":
                command = f"{command[:-1]} --clock seconds --threads {result['threads']}`"
            for what, figure, wanted, met in rows(result):
                said = "" if met is None else "met" if met else "**missed**"
                lines.append(f"| {what} | {figure} | {wanted} | {said} | {command} |")
    found = ((section, results / f"{name}.json") for name, section in SECTIONS.items())
    sections = "".join(section(json.loads(path.read_text())) for section, path in found if path.is_file())
    return HEAD + "\n".join(lines) + "\n" + TAIL + sections


def main() -> None:
    (HERE.parent / "docs" / "benchmarks.md").write_text(text(HERE / "results"))


if __name__ == "__main__":
    main()
