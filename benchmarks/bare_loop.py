"""What our loop costs over a bare one: the same packed batches, made beforehand, the same model, in turns.

    python benchmarks/bare_loop.py [--steps 10] [--precision fp32|bf16] [--json FILE]

The bare loop is forward, loss, backward, torch's clip_grad_norm_ and fused AdamW, and nothing else. Ours is the
trainer's step as it runs: denominators and logs over ranks, the spike guard, the schedule, metrics written and printed.
Batch by batch in one process on one core, A B B A, in CPU seconds of the process, the quicker of two counts: other work
on the machine makes steps slower, never quicker. The ratio is that of the sums, its spread that of the batches' ratios.
Wanted: at most 1.03.
"""

from __future__ import annotations

import argparse
import statistics
import time

import ground

WANTED = 1.03
SKIPPED = 2


def measure(args: argparse.Namespace) -> list[tuple[float, float]]:
    """(seconds of our step, seconds of the bare one) of each batch."""
    found = []
    with ground.trainer(args) as (trainer, batches):
        import torch

        from polymodal.train.step import inverse_weights

        laid_out = [trainer.shard_batches(step.micro_batches) for step in batches]
        model, objective = trainer.model.models[0], trainer.objective
        parameters = list(trainer.trainable.values())
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

        def ours(number: int, step) -> float:
            began = time.process_time()
            trainer._step(number + 1, step, time.perf_counter())
            trainer.writer.poll()
            return time.process_time() - began

        def bare(number: int, step) -> float:
            began = time.process_time()
            inverse = inverse_weights(objective, step.micro_batches, None)
            for batch in laid_out[number]:
                model(batch, lambda output, b: objective.loss(output, b, inverse))[0].backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return time.process_time() - began

        for number, step in enumerate(batches):
            seconds = [loop(number, step) for loop in (ours, bare, bare, ours)]
            if number >= SKIPPED:
                found.append((min(seconds[0], seconds[3]), min(seconds[1], seconds[2])))
    return found


def main() -> None:
    args = ground.one_rank("bare_loop.py", __doc__)
    pairs = measure(args)
    ratio = sum(a for a, _ in pairs) / sum(b for _, b in pairs)
    single = [a / b for a, b in pairs]
    print(
        f"our step {statistics.median(a for a, _ in pairs):.3f} s, bare {statistics.median(b for _, b in pairs):.3f} s, ratio {ratio:.3f} "
        f"(wanted <= {WANTED}; single batches {min(single):.3f} to {max(single):.3f})"
    )
    if args.json:
        facts = {"ratio": ratio, "wanted": WANTED, "least": min(single), "most": max(single), "pairs": pairs}
        ground.add_to(args.json, {"precision": {args.precision: facts}})


if __name__ == "__main__":
    main()
