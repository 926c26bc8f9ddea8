"""What a run resumes from: whole checkpoints, the same one on all ranks, and samples of the same lengths."""

import json
import shutil
import socket
import subprocess
import sys

import pytest

from tests.end_to_end.test_training import ENVIRONMENT, curve, ground, train, words  # noqa: F401


def checkpoints(run):
    return sorted(p.name for p in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_stop_by_an_error_leaves_the_checkpoint_that_was_being_written(ground, tmp_path, nproc):  # noqa: F811
    run = tmp_path / "run"
    explosion = ("optim.lr=1e30", "optim.schedule.name=constant", "optim.schedule.warmup=0")
    failed = train(ground, run, "checkpoint.every=1", *explosion, nproc=nproc, expect=2)
    assert "Step 2: loss nan" in failed.stderr and "the checkpoint before it is whole" in failed.stderr
    assert checkpoints(run) == ["step-00000001"]
    train(ground, run, "train.steps=2", "train.guard.nan=skip", *explosion)
    assert json.loads((run / "summary.json").read_text())["resumed_at"] == 1


@pytest.mark.slow
def test_samples_of_other_lengths_are_refused_with_the_key_that_changed(ground, tmp_path):  # noqa: F811
    run, model = tmp_path / "run", tmp_path / "model"
    shutil.copytree(ground / "model", model)
    source = f"model.source={model}"
    train(ground, run, source, "train.steps=1")
    failed = train(ground, run, source, "train.steps=2", "data.image.max_pixels=784", expect=2)
    assert "The samples have other lengths than when" in failed.stderr
    assert "(keys of the recipe that differ: data.image.max_pixels)" in failed.stderr
    failed = train(ground, run, source, "train.steps=2", "train.seed=7", expect=2)
    assert "The batches hold other samples than when" in failed.stderr
    assert "(keys of the recipe that differ: train.seed)" in failed.stderr
    template = model / "chat_template.jinja"
    template.write_text("A longer beginning of every conversation. " + template.read_text())
    failed = train(ground, run, source, "train.steps=2", expect=2)
    assert (
        "no key of the recipe differs, so the tokenizer, processor, chat template or media files did"
        in failed.stderr
    )
    assert curve(run).keys() == {1}
    state = run / "checkpoints" / "step-00000001" / "state.json"
    older = json.loads(state.read_text())
    assert older.pop("lengths")
    state.write_text(json.dumps(older))  # as versions before this field wrote it
    done = train(ground, run, source, "train.steps=2")
    assert "does not say how long its samples were" in done.stdout and "resumed at step 1" in done.stdout


@pytest.mark.slow
def test_keys_that_do_not_decide_the_batches_may_change(ground, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    train(ground, run, "train.steps=1")
    done = train(ground, run, "train.steps=2", "data.prefetch=1", f"data.validation=[{{path: {ground / 'validation.json'}}}]")  # fmt: skip
    assert "resumed at step 1" in done.stdout and "warning" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("how", ["resume", "init_from"])
def test_two_nodes_that_see_different_checkpoints_refuse(ground, tmp_path, how):  # noqa: F811
    """Each process in a directory of its own: the same relative path, as on a disk whose caches have not agreed yet."""
    train(ground, tmp_path / "node0" / "run", "train.steps=4", "checkpoint.every=2")
    shutil.copytree(tmp_path / "node0", tmp_path / "node1")
    shutil.rmtree(tmp_path / "node1" / "run" / "checkpoints" / "step-00000004")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    keys = ["checkpoint.dir=run"] if how == "resume" else ["checkpoint.dir=new", "checkpoint.init_from=run"]
    processes = []
    for rank in range(2):
        place = {
            "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": str(rank),
            "GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
            "TMPDIR": str(tmp_path / f"node{rank}"),
        }  # fmt: skip
        processes.append(
            subprocess.Popen(
                words("train", str(ground / "recipe.yaml"), *keys, "train.steps=6"), cwd=tmp_path / f"node{rank}",
                env={**ENVIRONMENT, **place}, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    said = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [2, 2], said
    found = "Rank 0 found the checkpoint run/checkpoints/step-00000004, rank 1 cannot read it."
    assert all(found in err for _, err in said), said


@pytest.mark.slow
def test_mfu_counts_the_passes_that_are_made(ground, tmp_path):  # noqa: F811
    """On a device whose peak is known (given to this one): the FLOPs that a step is taken for."""
    code = "import sys; from polymodal.runtime import device; device.peak_flops = lambda info: 1e6; from polymodal.cli import main; sys.exit(main())"

    def flops(name, *keys):
        command = [sys.executable, "-c", code, *words("train")[3:], str(ground / "recipe.yaml")]
        run = tmp_path / name
        subprocess.run(
            [*command, f"checkpoint.dir={run}", "train.steps=1", *keys],
            env=ENVIRONMENT,
            check=True,
            timeout=300,
        )
        line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
        return line["mfu"] * line["seconds"]

    whole = flops("whole")
    adapters, frozen = flops("adapters", "model.lora.rank=2"), flops("frozen", "train.freeze=[vision]")
    assert whole / 3 < adapters < 0.75 * whole, "two passes at most, and a few weights of adapters"
    assert adapters < frozen < 0.99 * whole
