"""The documents' own lines, in their order, through the files that `polymodal-compat install` writes: tiny models,
miniature data, torchrun with two processes."""

import base64
import csv
import json
import re
import zipfile
from pathlib import Path

import pytest

from tests.end_to_end.documented import Place, iterations, port_of
from tests.models import clips, tiny, tiny_pipelines

CLOSING = r"""
wait
STEP_TIME=`grep "elapsed time per iteration" train.log | awk -F ':' '{print$5}' | awk -F '|' '{print$1}' | head -n 200 | tail -n 100 | awk '{sum+=$1} END {if (NR != 0) printf("%.1f",sum/NR)}'`
SAMPLES_PER_SECOND=`awk 'BEGIN{printf "%.3f\n", '${GBS}'*1000/'${STEP_TIME}'}'`
echo "Elapsed Time Per iteration: $STEP_TIME"
echo "Average Samples per Second: $SAMPLES_PER_SECOND"
"""


@pytest.fixture
def place(tmp_path, request) -> Place:
    return Place(tmp_path / "MindSpeed-MM", port_of(request.node.name))


# ---- the document of chat models --------------------------------------------------------------------------


def chat_files(place: Place) -> None:
    """What the document's reader has: the hub's checkpoint, COCO pictures, LLaVA's rows, the examples' files."""
    tiny.checkpoint("qwen2.5-vl", place.root / "ckpt/hf_path/Qwen2.5-VL-3B-Instruct")
    pictures = place.root / "data/COCO2017/train2017"
    pictures.mkdir(parents=True)
    rows = []
    for n in range(5):
        if n != 4:
            tiny.picture(32, 24, n).save(pictures / f"{n:012}.jpg", quality=90)
        turns = [
            {"from": "human", "value": "What is in this picture?\n<image>"},
            {"from": "gpt", "value": f"The digit {n}."},
        ]
        rows.append({"id": f"{n:012}", "image": f"{n:012}.jpg", "conversations": turns})
    place.write("data/llava_instruct_150k.json", rows)
    data = {
        "dataset_param": {
            "dataset_type": "huggingface",
            "preprocess_parameters": {
                "model_name_or_path": "./ckpt/hf_path/Qwen2.5-VL-3B-Instruct",
                "use_fast_tokenizer": True, "split_special_tokens": False, "image_max_pixels": 262144,
                "image_min_pixels": 1024, "video_max_pixels": 16384, "video_min_pixels": 0, "video_fps": 2.0,
                "video_maxlen": 64,
            },
            "basic_parameters": {
                "template": "qwen2vl", "train_on_prompt": False, "mask_history": False, "tool_format": None,
                "dataset_dir": "./data", "dataset": "./data/mllm_format_llava_instruct_data.json",
                "cache_dir": "./data/cache_dir", "overwrite_cache": False, "preprocessing_batch_size": 1000,
                "preprocessing_num_workers": 16,
            },
            "attr": {
                "system": None, "images": "images", "videos": None, "messages": "messages", "role_tag": "role",
                "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant", "observation_tag": None,
                "function_tag": None, "system_tag": None,
            },
        },
        "dataloader_param": {
            "dataloader_mode": "sampler", "sampler_type": "BaseRandomBatchSampler", "shuffle": True, "drop_last": True,
            "pin_memory": True, "collate_param": {"model_name": "qwen2vl", "ignore_pad_token_for_loss": True},
        },
    }  # fmt: skip
    place.write("examples/qwen2.5vl/data_3b.json", data)
    place.write(
        "examples/qwen2.5vl/model_3b.json",
        {
            "model_id": "qwen2_5vl",
            "image_encoder": {"vision_encoder": {"model_id": "qwen2vit", "freeze": True}, "vision_projector": {"freeze": False}},
            "text_decoder": {"model_id": "qwen2_5_lm"},
        },
    )  # fmt: skip
    place.script(
        "examples/qwen2.5vl/finetune_qwen2_5_vl_3b.sh",
        r"""
LOAD_PATH="ckpt/mm_path/Qwen2.5-VL-3B-Instruct"
SAVE_PATH="save_dir"
TP=1; PP=1; CP=1
MBS=1
GRAD_ACC_STEP=2
DP=$(($WORLD_SIZE/$TP/$PP/$CP))
GBS=$(($MBS*$GRAD_ACC_STEP*$DP))

GPT_ARGS="
    --use-mcore-models \
    --tensor-model-parallel-size ${TP} \
    --pipeline-model-parallel-size ${PP} \
    --context-parallel-size ${CP} \
    --micro-batch-size ${MBS} \
    --global-batch-size ${GBS} \
    --tokenizer-type NullTokenizer \
    --vocab-size 151936 \
    --seq-length 1024 \
    --make-vocab-size-divisible-by 1 \
    --normalization RMSNorm \
    --use-fused-rmsnorm \
    --swiglu \
    --no-masked-softmax-fusion \
    --lr 1.0e-4 \
    --lr-decay-style cosine \
    --weight-decay 0 \
    --train-iters 3 \
    --lr-warmup-fraction 0.1 \
    --clip-grad 0.0 \
    --adam-beta1 0.9 \
    --adam-beta2 0.999 \
    --no-gradient-accumulation-fusion \
    --no-load-optim \
    --no-load-rng \
    --no-save-optim \
    --no-save-rng \
    --seed 42 \
    --bf16 \
    --load $LOAD_PATH \
    --variable-seq-lengths \
    --use-distributed-optimizer \
    --num-workers 0 \
"
MM_ARGS="
    --mm-data ./examples/qwen2.5vl/data_3b.json \
    --mm-model ./examples/qwen2.5vl/model_3b.json
"
OUTPUT_ARGS="
    --log-interval 1 \
    --save-interval 5000 \
    --eval-interval 5000 \
    --eval-iters 5000 \
    --save $SAVE_PATH \
    --ckpt-format torch
"
torchrun $DISTRIBUTED_ARGS pretrain_vlm.py $GPT_ARGS $MM_ARGS $OUTPUT_ARGS --distributed-backend nccl 2>&1 | tee train.log
"""
        + CLOSING,
    )
    answering = {
        "dtype": "bf16", "device": "npu",
        "tokenizer": {"hub_backend": "hf", "autotokenizer_name": "AutoProcessor", "from_pretrained": "ckpt/hf_path/Qwen2.5-VL-3B-Instruct"},
        "generation_config": {"do_sample": False, "max_new_tokens": 4, "num_beams": 1},
        "image_encoder": {"vision_encoder": {"model_id": "qwen2vit"}}, "text_decoder": {"model_id": "qwen2_5_lm"},
    }  # fmt: skip
    asked = {
        "image_path": "data/COCO2017/train2017/000000000000.jpg",
        "prompts": "Describe this image and keep it within 100 words.",
    }
    place.write(
        "examples/qwen2.5vl/inference_qwen2_5_vl_7b.json",
        {"pipeline_class": "Qwen2VlPipeline", **asked, **answering},
    )
    place.write(
        "examples/qwen2.5vl/evaluate_qwen2_5_vl_7b.json",
        {
            "dataset_path": "./AI2D_TEST.tsv", "evaluation_dataset": "ai2d_test", "evaluation_model": "qwen2_vl_7b",
            "result_output_path": "./evaluation_outputs/", "pipeline_class": "Qwen2VlPipeline", "model_id": "qwen2_5_vl",
            **answering,
        },
    )  # fmt: skip
    for name in ("inference", "evaluate"):
        place.script(
            f"examples/qwen2.5vl/{name}_qwen2_5_vl_7b.sh",
            f'GPT_ARGS="\n --micro-batch-size 1 \\\n --seq-length 1024 \\\n --load save_dir \\\n --no-load-optim \\\n --bf16\n"\n'
            f"torchrun $DISTRIBUTED_ARGS {name}_vlm.py $GPT_ARGS "
            f"--mm-model ./examples/qwen2.5vl/{name}_qwen2_5_vl_7b.json --distributed-backend nccl\n",
        )
    with open(place.root / "AI2D_TEST.tsv", "w", newline="") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(["index", "image", "question", "A", "B", "C", "D", "answer", "category"])
        for n in range(3):
            image = base64.b64encode((pictures / f"{n:012}.jpg").read_bytes()).decode()
            table.writerow(
                [n, image, "What is this?", "a circle", "a line", "a three", "a square", "C", "digits"]
            )


@pytest.mark.slow
def test_the_chat_documents_eight_steps(place):
    chat_files(place)
    place.bash("polymodal-compat install --tree .")  # steps 1 and 2: the environment
    config = json.loads((place.root / "ckpt/hf_path/Qwen2.5-VL-3B-Instruct/config.json").read_text())
    language = config.get("text_config", config)["num_hidden_layers"]
    layers = (
        f"--cfg.parallel_config.llm_pp_layers [[{language}]] "
        f"--cfg.parallel_config.vit_pp_layers [[{config['vision_config']['depth']}]] --cfg.parallel_config.tp_size 1"
    )
    hub = '--cfg.hf_config.hf_dir "ckpt/hf_path/Qwen2.5-VL-3B-Instruct"'
    place.bash(  # 3: weights
        f'mm-convert Qwen2_5_VLConverter hf_to_mm --cfg.mm_dir "ckpt/mm_path/Qwen2.5-VL-3B-Instruct" {hub} {layers}'
    )
    place.bash("python examples/qwen2vl/llava_instruct_2_mllm_demo_format.py")  # 4: data
    rows = json.loads((place.root / "data/mllm_format_llava_instruct_data.json").read_text())
    assert len(rows) == 4 and rows[0]["images"][0].endswith("train2017/000000000000.jpg")

    said = place.bash("bash examples/qwen2.5vl/finetune_qwen2_5_vl_3b.sh")  # 5: training
    found = iterations(said)
    assert [(step, steps, consumed, batch) for step, steps, consumed, _, batch in found] == [
        (str(n), "3", str(4 * n), "4") for n in (1, 2, 3)
    ]
    times = re.findall(
        r"^Elapsed Time Per iteration: ([\d.]+)$", said, re.M
    )  # ours, and what the script counts
    assert len(times) == 2, said
    assert abs(float(times[0]) - float(times[1])) <= 0.11
    assert len(re.findall(r"^Average Samples per Second: [\d.]+$", said, re.M)) == 2
    assert said.count("pretrain_vlm.py: polymodal train (") == 1
    assert (place.root / "save_dir/latest_checkpointed_iteration.txt").read_text() == "release"

    said = place.bash("bash examples/qwen2.5vl/inference_qwen2_5_vl_7b.sh")  # 6: inference
    assert said.count("inference_vlm.py: polymodal chat save_dir") == 1
    said = place.bash("bash examples/qwen2.5vl/evaluate_qwen2_5_vl_7b.sh")  # 7: evaluation
    assert "save acc file to evaluation_outputs/qwen2_vl_7b_ai2d_test_acc.xlsx" in said
    with zipfile.ZipFile(place.root / "evaluation_outputs/qwen2_vl_7b_ai2d_test.xlsx") as book:
        sheet = book.read("xl/sheet1.xml").decode()
    assert sheet.count("<row>") == 4 and "prediction" in sheet and "a three" in sheet

    place.bash(  # 8: the trained weights for the hub, from the tree
        f'mm-convert Qwen2_5_VLConverter mm_to_hf --cfg.save_hf_dir "out/hf" --cfg.mm_dir "save_dir" {hub} '
        + layers.replace("[[", "[").replace("]]", "]")
    )
    place.bash("polymodal export save_dir out/export")
    same_tensors(place.root / "out/hf", place.root / "out/export")


def same_tensors(one: Path, other: Path) -> None:
    from safetensors.torch import load_file

    first, second = (
        {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}
        for folder in (one, other)
    )
    assert first.keys() == second.keys() and first
    assert all((first[key] == second[key]).all() for key in first)


# ---- the document of generating models --------------------------------------------------------------------

WAN = "weights/Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


def clip_files(place: Place) -> None:
    """What the document's reader has: the pipeline, clips with captions, the examples' files."""
    tiny_pipelines.pipeline("wan", place.root / WAN)
    rows = clips.data(place.root / "dataset", clips=4, pictures=0)
    place.write("examples/wan2.1/feature_extract/data.txt", f"./dataset,./{rows.relative_to(place.root)}\n")
    tokenizer = {
        "hub_backend": "hf",
        "autotokenizer_name": "AutoTokenizer",
        "from_pretrained": f"./{WAN}/tokenizer",
    }
    sizes = {
        "video_processor_type": "OpensoraplanVideoProcessor", "video_reader_type": "DecordVideo", "num_frames": 5,
        "frame_interval": 1, "max_height": 32, "max_width": 48, "train_fps": 16, "speed_factor": 1.0,
        "drop_short_ratio": 1.0, "hw_stride": 16, "cfg": 0.0,
    }  # fmt: skip
    place.write(
        "examples/wan2.1/feature_extract/data.json",
        {
            "dataset_param": {
                "dataset_type": "t2v",
                "basic_parameters": {"data_path": "./examples/wan2.1/feature_extract/data.txt", "data_storage_mode": "combine"},
                "preprocess_parameters": sizes,
                "tokenizer_config": tokenizer,
            },
            "dataloader_param": {"dataloader_mode": "sampler", "shuffle": False, "drop_last": False},
        },
    )  # fmt: skip
    place.write(
        "examples/wan2.1/feature_extract/model_t2v.json",
        {
            "task": "t2v",
            "ae": {"model_id": "wan_video_vae", "from_pretrained": f"./{WAN}/vae/", "dtype": "bf16"},
            "text_encoder": {
                "hub_backend": "hf",
                "model_id": "UMT5",
                "from_pretrained": f"./{WAN}/text_encoder/",
            },
        },
    )
    place.write("mindspeed_mm/tools/tools.json", {"sorafeature": {"save_path": "./sora_features"}})
    place.write(
        "examples/wan2.1/1.3b/t2v/feature_data.json",
        {
            "dataset_param": {
                "dataset_type": "feature",
                "basic_parameters": {
                    "data_path": "./sora_features/data.jsonl", "data_folder": "./sora_features/", "data_storage_mode": "standard",
                },
                "preprocess_parameters": sizes,
                "tokenizer_config": tokenizer,
            },
            "dataloader_param": {"dataloader_mode": "sampler", "shuffle": True, "drop_last": True},
        },
    )  # fmt: skip
    predictor = {"model_id": "wandit", "model_type": "t2v", "dtype": "bf16"}
    place.write(
        "examples/wan2.1/1.3b/t2v/pretrain_model.json",
        {
            "frames": 5, "load_video_features": True, "load_text_features": True, "task": "t2v", "predictor": predictor,
            "diffusion": {"model_id": "wan_flow_match_scheduler", "shift": 3.0},
        },
    )  # fmt: skip
    place.write(
        "examples/wan2.1/1.3b/t2v/inference_model.json",
        {
            "ae": {"from_pretrained": f"./{WAN}/vae/"}, "text_encoder": {"from_pretrained": f"./{WAN}/text_encoder/"},
            "tokenizer": tokenizer, "predictor": predictor,
            "diffusion": {"model_id": "flow_match", "num_inference_steps": 2, "guidance_scale": 2.0, "flow_shift": 3.0},
            "pipeline_config": {"version": "wan2.1", "input_size": [5, 32, 48]},
            "micro_batch_size": 1, "frame_interval": 1, "fps": 16, "prompt": "./examples/wan2.1/samples_prompts.txt",
            "save_path": "./wan_samples/", "use_prompt_preprocess": True, "pipeline_class": "WanPipeline", "device": "npu",
            "dtype": "bf16",
        },
    )  # fmt: skip
    place.write("examples/wan2.1/samples_prompts.txt", "a red square\na blue circle\nthe green digit\n")
    place.script(
        "examples/wan2.1/feature_extract/feature_extraction.sh",
        """
GPT_ARGS="
    --tensor-model-parallel-size 1 \\
    --micro-batch-size 1 \\
    --global-batch-size 2 \\
    --num-workers 0
"
MM_ARGS="
    --mm-data examples/wan2.1/feature_extract/data.json \\
    --mm-model examples/wan2.1/feature_extract/model_t2v.json \\
    --mm-tool mindspeed_mm/tools/tools.json
"
torchrun $DISTRIBUTED_ARGS mindspeed_mm/tools/feature_extraction/get_wan_feature.py $GPT_ARGS $MM_ARGS \\
    --distributed-backend nccl 2>&1 | tee extract.log
""",
    )
    place.script(
        "examples/wan2.1/1.3b/t2v/pretrain.sh",
        f"""
LOAD_PATH="./{WAN}/transformer/"
SAVE_PATH="./output/wan2.1-1.3b-t2v/"
"""
        + r"""
TP=1
PP=1
VP=1
CP=1
MBS=1
GRAD_ACC_STEP=1
DP=$(($WORLD_SIZE/$TP/$PP/$CP))
GBS=$(($MBS*$GRAD_ACC_STEP*$DP))
GPT_ARGS="
    --tensor-model-parallel-size ${TP} \
    --pipeline-model-parallel-size ${PP} \
    --context-parallel-size ${CP} \
    --micro-batch-size ${MBS} \
    --global-batch-size ${GBS} \
    --num-workers 0 \
    --lr 1e-5 \
    --min-lr 1e-5 \
    --lr-decay-style constant \
    --weight-decay 1e-2 \
    --lr-warmup-init 0 \
    --lr-warmup-iters 0 \
    --clip-grad 1.0 \
    --adam-beta1 0.9 \
    --adam-beta2 0.999 \
    --adam-eps 1e-8 \
    --no-gradient-accumulation-fusion \
    --train-iters 2 \
    --no-load-optim \
    --no-load-rng \
    --no-save-optim \
    --no-save-rng \
    --bf16 \
    --recompute-granularity full \
    --recompute-method block \
    --recompute-num-layers 1 \
    --use-distributed-optimizer \
    --overlap-grad-reduce \
    --overlap-param-gather \
    --load $LOAD_PATH
"
MM_ARGS="
    --mm-data ./examples/wan2.1/1.3b/t2v/feature_data.json \
    --mm-model ./examples/wan2.1/1.3b/t2v/pretrain_model.json \
    --mm-tool ./mindspeed_mm/tools/tools.json
"
OUTPUT_ARGS="
    --log-interval 1 \
    --save-interval 10000 \
    --eval-interval 10000 \
    --eval-iters 10 \
    --save $SAVE_PATH \
    --ckpt-format torch
"
torchrun $DISTRIBUTED_ARGS pretrain_sora.py $GPT_ARGS $MM_ARGS $OUTPUT_ARGS --distributed-backend nccl 2>&1 | tee train.log
"""
        + CLOSING,
    )
    place.script(
        "examples/wan2.1/1.3b/t2v/inference.sh",
        'GPT_ARGS="\n --micro-batch-size 1 \\\n --lr 1e-5 \\\n --train-iters 10 \\\n --seed 42 \\\n --bf16 \\\n'
        ' --load ./output/wan2.1-1.3b-t2v/\n"\n'
        "torchrun $DISTRIBUTED_ARGS inference_sora.py $GPT_ARGS "
        "--mm-model examples/wan2.1/1.3b/t2v/inference_model.json --distributed-backend nccl\n",
    )


@pytest.mark.nightly
def test_the_generation_documents_eight_steps(place):
    clip_files(place)
    place.bash("polymodal-compat install --tree .")  # steps 1 and 2: the environment
    place.bash(  # 3: weights, in their place
        f"mm-convert WanConverter hf_to_mm --cfg.source_path ./{WAN}/transformer/ --cfg.target_path ./{WAN}/transformer/"
    )
    said = place.bash("bash examples/wan2.1/feature_extract/feature_extraction.sh")  # 4 and 5: data, features
    assert "Feature extraction completed successfully" in said
    rows = [json.loads(line) for line in (place.root / "sora_features/data.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and all(
        (place.root / "sora_features" / row["file"]).suffix == ".pt" for row in rows
    )

    said = place.bash("bash examples/wan2.1/1.3b/t2v/pretrain.sh")  # 6: training
    assert [found[0] for found in iterations(said)] == ["1", "2"]
    assert len(re.findall(r"^Average Samples per Second: [\d.]+$", said, re.M)) == 2
    said = place.bash("bash examples/wan2.1/1.3b/t2v/inference.sh")  # 7: inference
    assert "Inference finished." in said and said.count("Saved 3 samples to wan_samples") == 1
    names = {path.name for path in (place.root / "wan_samples").iterdir()}
    assert {"video_0.mp4", "video_1.mp4", "video_2.mp4", "video_grid.mp4"} <= names
    assert video_size(place.root / "wan_samples/video_grid.mp4") == (
        5,
        2 * 33,
        2 * 49,
    )  # an odd row and column less

    place.bash(  # 8: the trained weights for the hub, from the tree
        "mm-convert WanConverter mm_to_hf --cfg.source_path ./output/wan2.1-1.3b-t2v/ --cfg.target_path ./converted_weights/ "
        f"--cfg.hf_dir ./{WAN}/transformer/"
    )
    same_tensors(place.root / "converted_weights", place.root / "output/wan2.1-1.3b-t2v/export/transformer")


def video_size(path: Path) -> tuple[int, int, int]:
    """Frames, height and width."""
    import av

    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return len(frames), *frames[0].shape[:2]
