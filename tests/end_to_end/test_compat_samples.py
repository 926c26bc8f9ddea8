"""Twelve miniature set-ups in the documented form (compat_samples/), each started by its own script for two steps.

What is changed in a copy of a script: processes, steps and sizes, so that a tiny model on two processes can do it.
Everything else is the script's own, through the files that `polymodal-compat install` writes.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.documented import Place, iterations, port_of
from tests.models import clips, tiny, tiny_pipelines, tiny_speech

SAMPLES = Path(__file__).parent / "compat_samples"
SMALLER = {
    r"^NPUS_PER_NODE=.*": "NPUS_PER_NODE=2",
    r"^NNODES=.*": "NNODES=1",
    r"^(PP|VP)=.*": r"\1=1",
    r"^GRAD_ACC_STEP=.*": "GRAD_ACC_STEP=1",
    r"--train-iters \d+": "--train-iters 2",
    r"--num-workers \d+": "--num-workers 0",
    r"--recompute-num-layers \d+": "--recompute-num-layers 1",
    r"--log-interval \d+": "--log-interval 1",
    r"^MASTER_ADDR=.*": "MASTER_ADDR=127.0.0.1",
    r"--node_rank \$NODE_RANK": "--node_rank 0",
}


@pytest.fixture
def place(tmp_path, request) -> Callable[[str], Place]:
    def made(sample: str, **changes: str) -> Place:
        place = Place(tmp_path / sample, port_of(request.node.name))
        for file in (SAMPLES / sample).iterdir():
            shutil.copy(file, place.root)
        for script in place.root.glob("*.sh"):
            text = script.read_text()
            own = {r"^MASTER_PORT=.*": f"MASTER_PORT={place.port}"}
            for pattern, better in {**SMALLER, **own}.items():
                text = re.sub(pattern, better, text, flags=re.M)
            for name, value in changes.items():
                text = re.sub(rf"^{name}=.*", f"{name}={value}", text, flags=re.M)
            script.write_text(text)
        (tmp_path / "wan2.1-1.3b").mkdir(exist_ok=True)  # tools.json that other samples name
        for name in ("tools.json", "data.txt"):
            shutil.copy(SAMPLES / "wan2.1-1.3b" / name, tmp_path / "wan2.1-1.3b")
        tools = json.loads((tmp_path / "wan2.1-1.3b/tools.json").read_text())
        tools["profile"]["enable"] = False  # begins at a later step
        (tmp_path / "wan2.1-1.3b/tools.json").write_text(json.dumps(tools))
        place.bash("polymodal-compat install .")
        return place

    return made


def rows(place: Place, name: str = "media/rows.json", pairs: bool = False) -> None:
    """Rows of conversations with pictures."""
    listed = []
    for i in range(8):
        picture = place.root / f"media/{i}.png"
        picture.parent.mkdir(exist_ok=True)
        tiny.picture(32, 24, i).save(picture)
        asked = {"role": "user", "content": f"<image>Which number? {i}"}
        said = {"role": "assistant", "content": f"It is {i}."}
        row = {"messages": [asked, said], "images": [f"{i}.png"]}
        if pairs:
            row = {
                "messages": [asked],
                "images": row["images"],
                "chosen": said,
                "rejected": {**said, "content": "No."},
            }
        listed.append(row)
    place.write(name, listed)


def two_steps(place: Place, script: str = "finetune.sh") -> str:
    said = place.bash(f"bash {script}")
    assert [found[:2] for found in iterations(said)] == [("1", "2"), ("2", "2")]
    return said


def chat_model(place: Place, card: str, hub: str, tree: str, to: str = "mm") -> None:
    """The hub's directory, and the tree or DCP directory that --load names."""
    tiny.checkpoint(card, place.root / hub)
    place.bash(f"polymodal convert {hub} {tree} --to {to}")


@pytest.mark.nightly
def test_qwen2_5_vl_3b(place):
    here = place("qwen2.5-vl-3b")
    chat_model(here, "qwen2.5-vl", "weights/Qwen2.5-VL-3B-Instruct", "trees/qwen2.5-vl-3b")
    rows(here)
    two_steps(here)


@pytest.mark.nightly
def test_qwen2_5_vl_72b(place):
    here = place("qwen2.5-vl-72b", TP="2")
    chat_model(here, "qwen2.5-vl", "weights/Qwen2.5-VL-72B-Instruct", "trees/qwen2.5-vl-72b")
    rows(here)
    rows(here, "media/more.json")
    two_steps(here)


@pytest.mark.nightly
def test_internvl3_8b(place):
    here = place("internvl3-8b")
    tiny.checkpoint("internvl", here.root / "weights/InternVL3-8B")
    shutil.copytree(here.root / "weights/InternVL3-8B", here.root / "trees/internvl3-8b")
    model = json.loads((here.root / "model.json").read_text())
    model["text_decoder"]["num_layers"] = (
        3  # as the tiny model has them: blocks are recomputed by their number
    )
    here.write("model.json", model)
    for name in ("charts", "docs"):
        (here.root / "media" / name).mkdir(parents=True)
        lines = []
        for i in range(4):
            tiny.picture(32, 24, i).save(here.root / f"media/{name}/{i}.png")
            turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": f"It is {i}."}]
            lines.append(json.dumps({"id": i, "image": f"{i}.png", "conversations": turns}))
        here.write(f"media/{name}.jsonl", "\n".join(lines) + "\n")
    two_steps(here)


@pytest.mark.nightly
def test_qwen3_vl_8b_fsdp2(place):
    here = place("qwen3-vl-8b-fsdp2")
    settings = (here.root / "qwen3vl_8b.yaml").read_text()
    for name, value in (("train_iters", 2), ("global_batch_size", 2), ("num_workers", 0)):
        settings = re.sub(rf"{name}: \d+", f"{name}: {value}", settings)
    here.write("qwen3vl_8b.yaml", settings)
    chat_model(here, "qwen3-vl", "weights/Qwen3-VL-8B-Instruct", "trees/qwen3-vl-8b-dcp", "dcp")
    rows(here)
    two_steps(here)


@pytest.mark.nightly
def test_wan2_1_1_3b(place):
    here = place("wan2.1-1.3b")
    tiny_pipelines.pipeline("wan", here.root / "weights/Wan2.1-T2V-1.3B-Diffusers")
    for name in ("clips", "more"):
        rows_of = clips.data(here.root / "media" / name, clips=4)
        rows_of.rename(here.root / f"media/{name}.json")
    sizes = {
        "num_frames": 5,
        "min_num_frames": 5,
        "max_height": 32,
        "max_width": 48,
        "max_hxw": 1536,
        "drop_short_ratio": 1.0,
    }
    for name in ("extract_data.json", "feature_data.json"):
        data = json.loads((here.root / name).read_text())
        data["dataset_param"]["preprocess_parameters"] |= sizes
        here.write(name, data)
    tools = json.loads((here.root / "tools.json").read_text())
    tools["profile"]["enable"] = False
    here.write("tools.json", tools)
    model = json.loads((here.root / "inference_model.json").read_text())
    model["pipeline_config"]["input_size"] = [5, 32, 48]
    model["diffusion"]["num_inference_steps"] = 1
    here.write("inference_model.json", model)
    said = here.bash("bash extract.sh")
    assert "Feature extraction completed successfully" in said
    two_steps(here, "pretrain.sh")
    here.bash("bash inference.sh")
    assert (here.root / "out/clips/video_grid.mp4").is_file()


@pytest.mark.nightly
def test_hunyuan_video(place):
    here = place("hunyuan-video")
    hub = "weights/hunyuan"
    tiny_pipelines.pipeline("hunyuan-video", here.root / hub)
    rows_of = clips.data(here.root / "media", clips=4).relative_to(here.root)
    sizes = "{frames: [5], sizes: [[32, 32]]}"
    here.write(
        "encode.yaml",
        f"name: e\nmodel: {{source: {hub}}}\ndata:\n  features: features/hunyuan\n  datasets: [{{path: {rows_of}}}]\n"
        f"  clip: {sizes}\n",
    )
    here.bash("polymodal encode encode.yaml")
    data = json.loads((here.root / "feature_data.json").read_text())
    data["dataset_param"]["preprocess_parameters"] |= {
        "num_frames": 5,
        "max_height": 32,
        "max_width": 32,
        "train_fps": 16,
    }
    here.write("feature_data.json", data)
    here.write(
        "zero_config.yaml",
        (here.root / "zero_config.yaml").read_text().replace("zero3_size: 8", "zero3_size: 2"),
    )
    shutil.copytree(here.root / hub / "transformer", here.root / "trees/hunyuan-video")
    said = here.bash("bash pretrain.sh; exit ${PIPESTATUS[0]}")  # nothing of it names the pipeline
    assert "POLYMODAL_SOURCE=DIR in the environment" in said
    here.environment["POLYMODAL_SOURCE"] = hub
    two_steps(here, "pretrain.sh")


@pytest.mark.nightly
def test_flux_dreambooth(place):
    here = place("flux-dreambooth")
    tiny_pipelines.pipeline("flux-guided", here.root / "weights/FLUX.1-dev")
    subject = here.root / "media/subject"
    subject.mkdir(parents=True)
    for i in range(4):
        tiny.picture(64, 64, i).save(subject / f"{i}.png")
    config = (here.root / "bf16_accelerate_config.yaml").read_text()  # DeepSpeed is not installed here
    config = (
        config.partition("deepspeed_config")[0].replace("DEEPSPEED", "'NO'")
        + "num_processes: 1\nuse_cpu: true\nmixed_precision: bf16\n"
    )
    here.write("bf16_accelerate_config.yaml", config)
    here.write(
        "finetune.sh", (here.root / "finetune.sh").read_text().replace("resolution=512", "resolution=64")
    )
    said = here.bash("bash finetune.sh --model_name=weights/FLUX.1-dev --max_train_steps=2")
    assert [found[:2] for found in iterations(said)] == [("1", "2"), ("2", "2")]


@pytest.mark.nightly
def test_qwen2_vl_dpo(place):
    here = place("qwen2-vl-dpo", TP="1")
    chat_model(here, "qwen2-vl", "weights/Qwen2-VL-7B-Instruct", "trees/qwen2-vl-7b")
    rows(here, "media/pairs.json", pairs=True)
    two_steps(here, "finetune_dpo.sh")


@pytest.mark.nightly
def test_whisper(place):
    here = place("whisper")
    tiny_speech.checkpoint(here.root / "weights/whisper-large-v3")
    folder = here.root / "media/common_voice"
    folder.mkdir(parents=True)
    lines = []
    for i, words in enumerate(tiny_speech.sentences(8)):
        tiny_speech.recording(folder / f"{i}.wav", words)
        lines.append(f"{i}.wav\t{words}")
    (folder / "train.tsv").write_text("audio\ttext\n" + "\n".join(lines) + "\n")
    data = json.loads((here.root / "data.json").read_text())
    data["dataset_param"]["basic_parameters"]["dataset_name_or_path"] = "media/common_voice/train.tsv"
    here.write("data.json", data)
    two_steps(here, "pretrain.sh")


@pytest.mark.nightly
def test_evaluate_vlm(place):
    import base64

    here = place("evaluate-vlm")
    chat_model(here, "qwen2.5-vl", "weights/Qwen2.5-VL-7B-Instruct", "trees/qwen2.5-vl-7b")
    tiny.picture(32, 24, 0).save(here.root / "0.png")
    image = base64.b64encode((here.root / "0.png").read_bytes()).decode()
    lines = [f"{i}\t{image}\tWhich number?\t{i}" for i in range(3)]
    here.write("media/ChartQA_TEST.tsv", "index\timage\tquestion\tanswer\n" + "\n".join(lines) + "\n")
    evaluation = json.loads((here.root / "evaluate.json").read_text())
    said = here.bash("bash evaluate.sh")
    name = f"{evaluation.get('evaluation_model', 'model')}_{evaluation['evaluation_dataset']}_acc.xlsx"
    assert (
        f"save acc file to out/evaluation/{name}" in said and (here.root / "out/evaluation" / name).is_file()
    )


@pytest.mark.nightly
@pytest.mark.parametrize(
    "sample, script, words",
    [
        ("dancegrpo-flux", "posttrain.sh", "posttrain_flux_dancegrpo.py becomes nothing here"),
        ("opensoraplan-1.3", "pretrain.sh", "names the pipeline's directory"),
    ],
)
def test_what_is_refused_is_one_sentence_and_ends(place, sample, script, words):
    here = place(sample, TP="1")
    said = here.bash(f"bash {script}; true")
    assert len(re.findall(r"^error: ", said, re.M)) == 1 and words in said and not iterations_in(said)


def iterations_in(text: str) -> bool:
    return "elapsed time per iteration" in text
