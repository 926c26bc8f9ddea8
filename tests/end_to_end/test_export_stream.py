"""Export is a stream: the bytes are those of the values, memory is a file's, ranks write together, nothing waits."""

import json
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from polymodal import recipe as recipes
from polymodal.core.errors import PolymodalError
from polymodal.distributed import checkpoint as checkpoints
from polymodal.models import catalog, lora, saving
from polymodal.train import export_pipeline
from polymodal.train.export import MARKER, export, run
from tests.end_to_end.test_export import left_behind, write_lora_run, write_run
from tests.models import tiny, tiny_pipelines
from tests.parallel.harness import run as spread


def file_key(name: str) -> str:
    """Qwen2.5-VL's files have the names of an older class."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def assert_bytes(directory: Path, expected: dict[str, torch.Tensor], scratch: Path) -> None:
    """Each file of `directory` is what safetensors itself writes of the expected tensors that it holds."""
    held = {}
    for path in sorted(directory.glob("*.safetensors")):
        keys = load_file(path).keys()
        held.update(dict.fromkeys(keys, path.name))
        save_file({k: expected[k] for k in keys}, scratch / "expected.safetensors", metadata={"format": "pt"})
        assert path.read_bytes() == (scratch / "expected.safetensors").read_bytes(), path.name
    assert held.keys() == expected.keys()
    index = next(directory.glob("*.index.json"), None)
    assert (len(set(held.values())) > 1) == (index is not None)
    if index is not None:
        table = json.loads(index.read_text())
        assert table["weight_map"] == held
        assert table["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())


@pytest.mark.parametrize(("dtype", "limit"), [("bf16", 5 << 30), ("fp16", 100_000), (None, 60_000)])
def test_a_runs_bytes(dtype, limit, tmp_path):
    """Trained tensors over the base's frozen ones, cast, under the base's keys."""
    source = tiny.checkpoint("qwen2.5-vl", tmp_path / "model", dtype=torch.bfloat16)
    directory, changed, average = write_run(tmp_path / "run", source, freeze=["vision"])
    kind = {"fp16": torch.float16}.get(dtype, torch.bfloat16)
    for ema, values in ((False, changed), (True, average)):
        out = tmp_path / f"out {ema}"
        assert export(directory, out, dtype=dtype, ema=ema, max_shard_bytes=limit).what == "model"
        want = load_file(source / "model.safetensors") | {file_key(n): t for n, t in values.items()}
        assert_bytes(out, {k: t.to(kind) for k, t in want.items()}, tmp_path)


def test_merged_bytes(tmp_path):
    """W + alpha / r * B A in float32, then the cast."""
    source = tiny.checkpoint("qwen2.5-vl", tmp_path / "model", dtype=torch.bfloat16)
    directory, adapters = write_lora_run(tmp_path / "run", source)
    want = load_file(source / "model.safetensors")
    for name, b in adapters.items():
        if ".lora_B." in name:
            key, a = (
                file_key(name.partition(".lora_B.")[0] + ".weight"),
                adapters[name.replace("lora_B", "lora_A")],
            )
            want[key] = want[key].float() + 2.0 * (b @ a)
    for dtype, kind in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        export(directory, tmp_path / dtype, merge_lora=True, dtype=dtype, max_shard_bytes=90_000)
        assert_bytes(tmp_path / dtype, {k: t.to(kind) for k, t in want.items()}, tmp_path)


@pytest.mark.parametrize("section", [None, recipes.Lora(rank=2, alpha=4)])
def test_a_pipelines_bytes(section, tmp_path):
    """The denoiser under diffusers' names, whole or merged; the other parts are the source's."""
    source = tiny_pipelines.pipeline("wan", tmp_path / "pipeline")
    recipe = recipes.Recipe(model=recipes.Model(source=str(source), lora=section))
    family = catalog.family(recipe.model)
    model = family.build()
    if section is not None:
        lora.attach(model, section, family.card)
    draw = torch.Generator().manual_seed(3)
    trained = {
        n: torch.randn(p.shape, generator=draw) * 0.1
        for n, p in model.named_parameters()
        if section is None or p.requires_grad
    }
    checkpoints.Writer(tmp_path / "run", 2, False, 0, None).save(
        {f"model.{n}": t for n, t in trained.items()},
        checkpoints.RunState(step=5, recipe=recipe.model_dump(mode="json")),
    )
    want = load_file(source / "transformer" / "diffusion_pytorch_model.safetensors") if section else trained
    for name, b in trained.items():
        if ".lora_B." in name:
            key, a = name.partition(".lora_B.")[0] + ".weight", trained[name.replace("lora_B", "lora_A")]
            want[key] = want[key] + 2.0 * (b @ a)
    done = export(
        tmp_path / "run",
        tmp_path / "out",
        merge_lora=section is not None,
        dtype="bf16",
        max_shard_bytes=30_000,
    )
    assert done.computed == "float32"
    assert_bytes(tmp_path / "out" / "transformer", {k: t.bfloat16() for k, t in want.items()}, tmp_path)
    vae = Path("vae") / "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "out" / vae).read_bytes() == (source / vae).read_bytes()


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def _peak(rank: int, directory: str, out: str, merge: bool) -> int:
    """Bytes by which the process grows at its worst while it exports, without the proof, which holds the model."""
    export_pipeline.room_for = lambda size: False
    export(f"{directory}/warm", f"{out}-warm", merge_lora=merge)  # imports
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    done = export(f"{directory}/run", out, merge_lora=merge, dtype="fp32", max_shard_bytes=16 << 20)
    assert done is not None and done.computed == ""
    return _status("VmHWM") - before


@pytest.mark.parametrize("merge", [False, True])
def test_memory_is_a_files(merge, tmp_path):
    """A model of 240 MB in float32 is exported in less than 0.4 of that (it grew by 2.0 times as much when a whole model was held)."""
    size = {
        "text_config__hidden_size": 512,
        "text_config__num_attention_heads": 32,
        "text_config__intermediate_size": 2048,
    }
    size |= {"text_config__num_hidden_layers": 16, "vision_config__out_hidden_size": 512}  # fmt: skip
    for name, sizes in (("warm", {}), ("run", size)):
        source = tiny.checkpoint("qwen2.5-vl", tmp_path / f"{name} model", **sizes)
        (write_lora_run if merge else write_run)(tmp_path / name, source)
    whole = (tmp_path / "run model" / "model.safetensors").stat().st_size
    assert whole > 220 << 20
    (grown,) = spread(1, _peak, str(tmp_path), str(tmp_path / "out"), merge)
    assert grown < 0.4 * whole, grown / whole
    assert sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")) == pytest.approx(
        whole, rel=1e-3
    )


def _together(rank: int, directory: str, out: str, seconds: float) -> tuple[list[str], bool]:
    """The files that this rank wrote, and whether it has a result. Rank 1 is slower than its group's timeout."""
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds))
    written = []
    write_file = saving.write_file

    def slow(tensors, path):
        if rank == 1 and not written:
            time.sleep(1.5 * seconds)
        written.append(path.name)
        write_file(tensors, path)

    saving.write_file = slow
    done = export(directory, out, max_shard_bytes=100_000, dtype="bf16", group=group)
    return written, done is not None


def test_two_ranks_write_one_export(tmp_path):
    """Each rank its own files, rank 0 all else; a rank that takes longer than collectives may is waited for."""
    source = tiny.checkpoint("qwen2.5-vl", tmp_path / "model")
    directory, *_ = write_run(tmp_path / "run", source, freeze=["vision"])
    export(directory, tmp_path / "one", max_shard_bytes=100_000, dtype="bf16")
    (first, said), (other, silent) = spread(2, _together, str(directory), str(tmp_path / "two"), 5.0)
    assert said and not silent
    assert first and other and abs(len(first) - len(other)) <= 1 and not set(first) & set(other)
    names = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "two").iterdir())
    assert {*first, *other} == {name for name in names if name.endswith(".safetensors")}
    for name in names:
        if name != MARKER:
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert left_behind(tmp_path) == []


def test_a_model_that_does_not_fit_is_compared_by_names_and_shapes(tmp_path, monkeypatch, capsys):
    source = tiny.checkpoint("qwen3-vl", tmp_path / "model")
    pipeline = tiny_pipelines.pipeline("wan", tmp_path / "pipeline")
    monkeypatch.setattr(export_pipeline, "room_for", lambda size: False)
    for origin, library in ((source, "transformers"), (pipeline, "diffusers")):
        assert run(str(origin), tmp_path / library) == 0
        assert f"not opened with {library}, as the model does not fit" in capsys.readouterr().out
        record = json.loads((tmp_path / library / MARKER).read_text())
        assert record["computed"] == "" and record["tokens"] == 0
    write = saving.write

    def loses_one(state, model, made, *args, **options):
        write(state, model, made[:-1], *args, **options)

    monkeypatch.setattr(saving, "write", loses_one)
    for origin in (source, pipeline):
        with pytest.raises(PolymodalError, match="1 of .* parameters are not in the checkpoint"):
            export(origin, tmp_path / "out")
    assert not (tmp_path / "out").exists() and left_behind(tmp_path) == []


def test_values_that_are_no_numbers_are_not_exported(tmp_path):
    source = tiny.checkpoint("qwen3-vl", tmp_path / "model")
    directory, changed, _ = write_run(tmp_path / "run", source)
    name, value = next((n, t) for n, t in changed.items() if n.endswith("q_proj.weight"))
    value.view(-1)[5] = float("nan")
    state = checkpoints.read_state(checkpoints.newest(directory))
    state.step = 8
    checkpoints.Writer(directory, 2, False, 0, None).save(
        {f"model.{n}": t for n, t in changed.items()}, state
    )
    with pytest.raises(PolymodalError, match=f"{name} holds values that are not numbers"):
        export(directory, tmp_path / "out")
    assert export(directory / "checkpoints" / "step-00000007", tmp_path / "out").step == 7
