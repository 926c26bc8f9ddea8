"""Documented start scripts, translated and run: a chat model on two processes, a denoiser from its features."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models import clips, tiny, tiny_pipelines

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
LAUNCH = "torchrun --nproc_per_node 2 --nnodes 1 --node_rank 0 --master_addr 127.0.0.1 --master_port 29400"


def polymodal(place: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "polymodal", *words],
        cwd=place, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def steps_of(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_chat_models_script_trains(tmp_path):
    tiny.checkpoint("qwen2.5-vl", tmp_path / "ckpt/hf_path/Qwen2.5-VL-3B-Instruct")
    (tmp_path / "data").mkdir()
    rows = []
    for i in range(8):
        tiny.picture(32, 24, i).save(tmp_path / "data" / f"{i}.png")
        messages = [
            {"role": "user", "content": f"<image>Which number? {i}"},
            {"role": "assistant", "content": f"It is {i}."},
        ]
        rows.append({"messages": messages, "images": [f"{i}.png"]})
    (tmp_path / "data/rows.json").write_text(json.dumps(rows))
    data = {
        "dataset_param": {
            "dataset_type": "huggingface",
            "preprocess_parameters": {
                "model_name_or_path": "./ckpt/hf_path/Qwen2.5-VL-3B-Instruct",
                "image_max_pixels": 262144,
                "image_min_pixels": 0,
            },
            "basic_parameters": {
                "template": "qwen2vl",
                "dataset_dir": "./data",
                "dataset": "./data/rows.json",
            },
            "attr": {
                "images": "images",
                "messages": "messages",
                "role_tag": "role",
                "content_tag": "content",
            },
        },
        "dataloader_param": {"shuffle": True},
    }
    (tmp_path / "data.json").write_text(json.dumps(data))
    (tmp_path / "model.json").write_text(json.dumps({"model_id": "qwen2_5vl"}))
    (tmp_path / "finetune.sh").write_text(
        f'GPT_ARGS="\n  --tensor-model-parallel-size 2 \\\n  --micro-batch-size 1 \\\n  --global-batch-size 4 \\\n'
        "  --seq-length 512 \\\n  --lr 1e-4 \\\n  --train-iters 2 \\\n  --bf16 \\\n  --use-distributed-optimizer \\\n"
        f'  --num-workers 0\n"\n{LAUNCH} pretrain_vlm.py $GPT_ARGS --mm-data ./data.json --mm-model ./model.json \\\n'
        "  --save out/run --save-interval 10 2>&1 | tee train.log\n"
    )
    polymodal(tmp_path, "translate", "finetune.sh", "-o", "recipe.yaml")
    polymodal(tmp_path, "train", "recipe.yaml", "--nproc", "2")
    assert steps_of(tmp_path / "out/run") == [1, 2]


@pytest.mark.slow
def test_a_denoisers_scripts_encode_and_train(tmp_path):
    tiny_pipelines.pipeline("wan", tmp_path / "weights/Wan")
    rows = clips.data(tmp_path / "clips", clips=4, pictures=0)
    (tmp_path / "data.json").write_text(
        json.dumps(
            {
                "dataset_param": {
                    "dataset_type": "t2v",
                    "basic_parameters": {"data_path": f"./{rows.relative_to(tmp_path)}", "data_storage_mode": "combine"},
                    "preprocess_parameters": {
                        "num_frames": 5, "max_height": 32, "max_width": 48, "train_fps": 16, "cfg": 0.0,
                    },
                }
            }
        )
    )  # fmt: skip
    (tmp_path / "extract.json").write_text(
        json.dumps(
            {
                "ae": {"from_pretrained": "weights/Wan/vae"},
                "text_encoder": {"from_pretrained": "weights/Wan/text_encoder"},
            }
        )
    )
    (tmp_path / "tools.json").write_text(json.dumps({"sorafeature": {"save_path": "./features"}}))
    features = {
        "dataset_type": "feature",
        "basic_parameters": {"data_path": "features/data.jsonl", "data_folder": "features"},
    }
    features["preprocess_parameters"] = {"num_frames": 5, "max_height": 32, "max_width": 48, "train_fps": 16}
    (tmp_path / "features.json").write_text(json.dumps({"dataset_param": features}))
    model = {
        "load_video_features": True, "load_text_features": True, "predictor": {"model_id": "wandit"},
        "diffusion": {"model_id": "wan_flow_match_scheduler", "shift": 3.0},
    }  # fmt: skip
    (tmp_path / "model.json").write_text(json.dumps(model))
    (tmp_path / "extract.sh").write_text(
        f"{LAUNCH} mindspeed_mm/tools/feature_extraction/get_wan_feature.py --micro-batch-size 1 --num-workers 0 "
        "--mm-data data.json --mm-model extract.json --mm-tool tools.json\n"
    )
    (tmp_path / "pretrain.sh").write_text(
        f"{LAUNCH} pretrain_sora.py --micro-batch-size 1 --global-batch-size 2 --train-iters 2 --lr 1e-4 --bf16 "
        "--lr-decay-style constant --use-distributed-optimizer --mm-data features.json --mm-model model.json "
        "--load weights/Wan/transformer/ --save out/wan --num-workers 0\n"
    )
    polymodal(tmp_path, "translate", "extract.sh", "-o", "encode.yaml")
    polymodal(tmp_path, "encode", "encode.yaml")
    polymodal(tmp_path, "translate", "pretrain.sh", "-o", "train.yaml")
    polymodal(tmp_path, "train", "train.yaml", "--nproc", "2")
    assert steps_of(tmp_path / "out/wan") == [1, 2]


@pytest.mark.slow
def test_a_yaml_of_llamafactory_trains(tmp_path):
    tiny.checkpoint("qwen2.5-vl", tmp_path / "weights")
    (tmp_path / "data").mkdir()
    rows = []
    for i in range(8):
        tiny.picture(32, 24, i).save(tmp_path / "data" / f"{i}.png")
        turns = [
            {"from": "human", "value": f"<image>Which number? {i}"},
            {"from": "gpt", "value": f"It is {i}."},
        ]
        rows.append({"conversations": turns, "images": [f"{i}.png"]})
    (tmp_path / "data/rows.json").write_text(json.dumps(rows))
    columns = {"messages": "conversations", "images": "images"}
    info = {"mine": {"file_name": "rows.json", "formatting": "sharegpt", "columns": columns}}
    (tmp_path / "data/dataset_info.json").write_text(json.dumps(info))
    (tmp_path / "sft.yaml").write_text(
        "model_name_or_path: weights\nstage: sft\nfinetuning_type: lora\nlora_rank: 4\nlora_target: all\n"
        "dataset: mine\ntemplate: qwen2_vl\ncutoff_len: 512\noutput_dir: out\nmax_steps: 2\nlearning_rate: 1.0e-4\n"
        "per_device_train_batch_size: 2\nlr_scheduler_type: cosine\nbf16: true\nlogging_steps: 1\nreport_to: none\n"
    )
    polymodal(tmp_path, "translate", "sft.yaml", "-o", "recipe.yaml")
    polymodal(tmp_path, "train", "recipe.yaml", "data.workers=0")
    assert steps_of(tmp_path / "out") == [1, 2]


@pytest.mark.slow
def test_a_command_line_of_sd_scripts_encodes_and_trains(tmp_path):
    tiny_pipelines.pipeline("flux", tmp_path / "weights")
    (tmp_path / "pics").mkdir()
    for i in range(2):
        tiny.picture(64, 64, i).save(tmp_path / "pics" / f"{i}.png")
        (tmp_path / "pics" / f"{i}.txt").write_text(f"number {i}")
    (tmp_path / "data.toml").write_text(
        "[[datasets]]\nresolution = 32\nbatch_size = 1\n[[datasets.subsets]]\nimage_dir = 'pics'\n"
        "caption_prefix = 'sks, '\nnum_repeats = 2\n"
    )
    line = (
        "accelerate launch flux_train_network.py --pretrained_model_name_or_path=weights --dataset_config=data.toml "
        "--output_dir=out --network_module=networks.lora_flux --network_dim=4 --learning_rate=1e-4 "
        "--optimizer_type=AdamW8bit --max_train_steps=2 --mixed_precision=bf16 --timestep_sampling=shift "
        "--model_prediction_type=raw --guidance_scale=1.0 --cache_latents"
    )
    polymodal(tmp_path, "translate", line, "-o", "recipe.yaml")
    polymodal(tmp_path, "encode", "recipe.yaml")
    polymodal(tmp_path, "train", "recipe.yaml")
    assert steps_of(tmp_path / "out") == [1, 2]
    rows = [json.loads(row) for row in (tmp_path / "out/features/data.jsonl").read_text().splitlines()]
    assert sorted(row["cap"][0] for row in rows) == ["sks, number 0", "sks, number 1"]
