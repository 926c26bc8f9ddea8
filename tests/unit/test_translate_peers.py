"""`polymodal translate` of other trainers' files: each key has a row, the recipe means the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from polymodal import recipe as recipes
from polymodal.core.errors import PolymodalError
from polymodal.data.source import open_corpus
from polymodal.recipe.schema import Data
from polymodal.tools.translate import command, peers
from polymodal.tools.translate.ledger import Given

LLAMAFACTORY = """
model_name_or_path: Qwen/Qwen2.5-VL-7B-Instruct
image_max_pixels: 262144
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: mllm_demo,identity
template: qwen2_vl
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
output_dir: saves/qwen2_5vl-7b/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
report_to: none
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
"""
INFO = {
    "mllm_demo": {
        "file_name": "mllm_demo.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "images": "images"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
        },
    },
    "identity": {"file_name": "identity.json"},
    "pairs": {
        "file_name": "pairs.json",
        "ranking": True,
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
    },
    "far": {"hf_hub_url": "someone/far"},
}
SWIFT = r"""
nproc_per_node=2
CUDA_VISIBLE_DEVICES=0,1 NPROC_PER_NODE=$nproc_per_node MAX_PIXELS=1003520 \
swift sft \
    --model Qwen/Qwen2.5-VL-7B-Instruct \
    --dataset 'data/mllm_demo.json#6' data/identity.json \
    --train_type lora --torch_dtype bfloat16 --num_train_epochs 1 \
    --per_device_train_batch_size 1 --learning_rate 1e-4 --lora_rank 8 --lora_alpha 32 \
    --target_modules all-linear --freeze_vit false --vit_lr 1e-5 \
    --gradient_accumulation_steps $(expr 16 / $nproc_per_node) \
    --save_steps 50 --max_length 2048 --packing true --output_dir output --warmup_ratio 0.05 --deepspeed zero2
"""
DIFFUSION_PIPE = """
output_dir = 'runs/wan'
dataset = 'data.toml'
epochs = 1000
micro_batch_size_per_gpu = 1
gradient_accumulation_steps = 4
gradient_clipping = 1.0
warmup_steps = 100
blocks_to_swap = 20
save_every_n_steps = 100
activation_checkpointing = true
partition_method = 'parameters'
[model]
type = 'flux'
diffusers_path = 'weights/FLUX.1-dev'
dtype = 'bfloat16'
flux_shift = true
[adapter]
type = 'lora'
rank = 32
dtype = 'bfloat16'
[optimizer]
type = 'adamw_optimi'
lr = 2e-5
betas = [0.9, 0.99]
weight_decay = 0.01
[monitoring]
enable_wandb = false
"""
DIFFUSION_PIPE_DATA = """
resolutions = [512, 768]
enable_ar_bucket = true
min_ar = 0.5
frame_buckets = [1, 34]
[[directory]]
path = 'pics'
num_repeats = 5
caption_prefix = 'sks, '
"""
KOHYA = r"""
accelerate launch --num_cpu_threads_per_process 1 flux_train_network.py \
  --pretrained_model_name_or_path=weights/FLUX.1-dev --dataset_config="data.toml" \
  --clip_l=clip_l.safetensors --t5xxl=t5xxl.safetensors --ae=ae.safetensors \
  --output_dir=out --output_name=dog --network_module=networks.lora_flux --network_dim=16 \
  --learning_rate=1e-4 --optimizer_type=AdamW8bit --lr_scheduler=constant --sdpa \
  --max_train_steps=500 --mixed_precision=bf16 --gradient_checkpointing --guidance_scale=1.0 \
  --timestep_sampling=shift --discrete_flow_shift=3.1582 --model_prediction_type=raw --cache_latents --seed 42 \
  --sample_prompts=prompts.txt --sample_every_n_steps=100
"""
KOHYA_DATA = """
[general]
enable_bucket = true
caption_extension = ".txt"
[[datasets]]
resolution = [832, 480]
batch_size = 2
  [[datasets.subsets]]
  image_dir = "pics"
  class_tokens = "sks dog"
  num_repeats = 10
"""
MUSUBI = r"""
accelerate launch --mixed_precision bf16 src/musubi_tuner/wan_train_network.py --task t2v-1.3B \
  --dit wan.safetensors --dataset_config data.toml --sdpa --mixed_precision bf16 --optimizer_type adamw8bit \
  --learning_rate 2e-4 --network_module networks.lora_wan --network_dim 32 --network_alpha 16 \
  --timestep_sampling shift --discrete_flow_shift 3.0 --max_train_epochs 16 --output_dir out --output_name x
"""
MUSUBI_DATA = """
[general]
resolution = [832, 480]
enable_bucket = true
[[datasets]]
video_directory = "pics"
target_frames = [1, 25, 45]
frame_extraction = "head"
source_fps = 30.0
"""
AI_TOOLKIT = """
job: extension
config:
  name: my_lora
  process:
    - type: sd_trainer
      training_folder: output
      device: cuda:0
      trigger_word: p3r5on
      network: {type: lora, linear: 16, linear_alpha: 16}
      save: {dtype: float16, save_every: 250, max_step_saves_to_keep: 4}
      datasets:
        - folder_path: pics
          caption_ext: txt
          caption_dropout_rate: 0.05
          cache_latents_to_disk: true
          resolution: [512, 768]
      train:
        batch_size: 1
        steps: 2000
        gradient_accumulation_steps: 2
        train_unet: true
        train_text_encoder: false
        gradient_checkpointing: true
        noise_scheduler: flowmatch
        optimizer: adamw8bit
        lr: 1e-4
        ema_config: {use_ema: true, ema_decay: 0.99}
        dtype: bf16
      model: {name_or_path: weights/FLUX.1-dev, is_flux: true}
      sample: {sampler: flowmatch, sample_every: 250, width: 1024, height: 768, prompts: [a cat], guidance_scale: 4}
meta: {name: "[name]", version: '1.0'}
"""
SIMPLETUNER = {
    "--resume_from_checkpoint": "latest",
    "--data_backend_config": "data.json",
    "--seed": 42,
    "--output_dir": "output/models",
    "--lora_type": "standard",
    "--max_train_steps": 10000,
    "--checkpoint_step_interval": 500,
    "--push_to_hub": "true",
    "--report_to": "wandb",
    "--model_type": "lora",
    "--pretrained_model_name_or_path": "weights/FLUX.1-dev",
    "--model_family": "flux",
    "--train_batch_size": 2,
    "--gradient_checkpointing": "true",
    "--caption_dropout_probability": 0.1,
    "--resolution": 1024,
    "--validation_resolution": "1024x768",
    "--validation_prompt": "a cat",
    "--mixed_precision": "bf16",
    "--optimizer": "adamw_bf16",
    "--learning_rate": "1e-4",
    "--lr_scheduler": "polynomial",
    "--lr_warmup_steps": 100,
}
BACKENDS = [
    {
        "id": "dogs",
        "type": "local",
        "instance_data_dir": "pics",
        "crop": True,
        "resolution": 512,
        "caption_strategy": "textfile",
        "repeats": 4,
    },
    {"id": "text", "dataset_type": "text_embeds", "default": True, "type": "local", "cache_dir": "cache"},
]
TRL = """trl dpo --model_name_or_path Qwen/Qwen2.5-VL-3B-Instruct --dataset_name data/pairs.json --output_dir out
 --per_device_train_batch_size 2 --gradient_accumulation_steps 4 --num_train_epochs 1 --learning_rate 5e-6
 --loss_type sigmoid sft --loss_weights 0.8 0.2 --beta 0.2 --max_length 2048 --bf16 --use_peft --lora_r 8
 --lora_target_modules q_proj v_proj --logging_steps 5"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    """The working directory, with data."""
    monkeypatch.chdir(tmp_path)
    for name in ("mllm_demo", "identity", "pairs"):
        Path("data").mkdir(exist_ok=True)
        Path(f"data/{name}.json").write_text("[]")
    Path("data/dataset_info.json").write_text(json.dumps(INFO))
    Path("pics").mkdir()
    Image.new("RGB", (8, 8)).save("pics/1.png")
    Path("pics/1.txt").write_text("a dog")
    Path("prompts.txt").write_text("a dog --w 832 --h 480 --s 20 --n blurry --d 1\n# no prompt\na cat\n")
    return tmp_path


def written(name: str, text: str) -> str:
    Path(name).write_text(text)
    return name


def translated(what: str, source: str | None = None, force: bool = False, **values: str) -> dict:
    out = Path("out.yaml")
    sets = [f"{name}={value}" for name, value in values.items()]
    command.main(what, [], out, None, source, sets, force, False)
    recipes.load(out)
    return yaml.safe_load(out.read_text())


def refused(what: str, **options) -> str:
    with pytest.raises(PolymodalError) as found:
        translated(what, **options)
    assert not Path("out.yaml").exists()
    return str(found.value)


def test_llamafactory():
    recipe = translated(written("sft.yaml", LLAMAFACTORY), NPROC_PER_NODE="4")
    assert recipe["model"]["lora"] == {"rank": 8, "alpha": 16, "dropout": 0.0, "targets": "all-linear"}
    first, second = recipe["data"]["datasets"]
    assert first["path"] == "data/mllm_demo.json" and first["attr"]["role"] == "role"
    assert (second["format"], second["max_samples"], second["media_dir"]) == ("alpaca", 1000, "data")
    assert recipe["data"]["max_length"] == 2048 and recipe["data"]["pack"] is False
    assert recipe["data"]["image"] == {"min_pixels": 1024, "max_pixels": 262144}
    assert recipe["train"]["global_batch_size"] == 32 and recipe["parallel"]["dp_replicate"] == 4
    assert recipe["optim"]["betas"] == [0.9, 0.999]  # transformers' default, not the recipe's
    assert recipe["optim"]["schedule"] == {"name": "cosine", "warmup": 0.1}
    assert recipe["parallel"]["recompute"] == "full" and recipe["train"]["precision"] == "bf16"


def test_llamafactory_full_with_deepspeed_on_the_command_line():
    written("sft.yaml", LLAMAFACTORY.replace("finetuning_type: lora", "finetuning_type: full"))
    written("z3.json", '{"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}, "bf16": {}}')
    recipe = translated(
        "NPROC_PER_NODE=2 llamafactory-cli train sft.yaml deepspeed=z3.json learning_rate=2.0e-5"
    )
    assert "lora" not in recipe["model"] and recipe["train"]["freeze"] == ["vision", "projector"]
    assert recipe["parallel"]["zero"] == 3 and recipe["parallel"]["offload"] == ["parameters"]
    assert recipe["optim"]["lr"] == 2e-5 and recipe["train"]["global_batch_size"] == 16


def test_llamafactory_preferences():
    text = LLAMAFACTORY.replace("stage: sft", "stage: dpo\npref_ftx: 0.5\npref_beta: 0.2")
    recipe = translated(written("dpo.yaml", text.replace("mllm_demo,identity", "pairs")))
    assert recipe["train"]["objective"] == "dpo"
    assert recipe["train"]["preference"] == {"loss": {"sigmoid": 1.0, "sft": 0.5}, "beta": 0.2}
    assert recipe["data"]["datasets"][0]["format"] == "preference"


def test_swift():
    recipe = translated(written("sft.sh", SWIFT))
    assert recipe["data"]["datasets"] == [
        {"path": "data/mllm_demo.json", "max_samples": 6},
        {"path": "data/identity.json"},
    ]
    assert recipe["model"]["lora"]["towers"] == ["language", "vision"]
    assert recipe["model"]["lora"]["dropout"] == 0.05 and recipe["optim"]["weight_decay"] == 0.1
    assert recipe["train"]["global_batch_size"] == 16 and recipe["parallel"]["zero"] == 2
    assert recipe["optim"]["groups"] == [{"match": "vision", "lr": 1e-5}]
    assert recipe["data"]["image"]["max_pixels"] == 1003520 and recipe["data"]["pack"] is True


def test_swift_full_has_no_float32_weights():
    text = SWIFT.replace("--train_type lora", "--train_type full").replace("--deepspeed zero2", "")
    recipe = translated(written("sft.sh", text.replace("--freeze_vit false", "--freeze_vit true")))
    assert recipe["train"]["precision"] == "pure_bf16"
    assert recipe["train"]["freeze"] == ["vision", "projector"]


def test_swift_simpo_adds_the_loss_of_the_answer():
    recipe = translated(
        "swift rlhf --rlhf_type simpo --model Qwen/Qwen2.5-VL-3B-Instruct --dataset data/pairs.json"
    )
    assert recipe["train"]["preference"] == {"loss": {"simpo": 1.0, "sft": 1.0}, "beta": 2.0, "gamma": 1.0}


def test_trl():
    recipe = translated(TRL.replace("\n", " "))
    assert recipe["train"]["preference"] == {"loss": {"sigmoid": 0.8, "sft": 0.2}, "beta": 0.2}
    assert recipe["model"]["lora"]["targets"] == ["q_proj", "v_proj"]
    assert recipe["train"]["global_batch_size"] == 8 and recipe["train"]["precision"] == "bf16"


def test_trl_sft_learns_rows_whole():
    line = "trl sft --model_name_or_path Qwen/Qwen2.5-VL-3B-Instruct --dataset_name data/identity.json"
    assert translated(line)["data"]["train_on"] == "all"
    Path("out.yaml").unlink()
    assert translated(f"{line} --assistant_only_loss true")["data"]["train_on"] == "assistant"


def test_diffusion_pipe():
    written("data.toml", DIFFUSION_PIPE_DATA)
    recipe = translated(written("main.toml", DIFFUSION_PIPE))
    assert recipe["data"]["datasets"] == [{"path": "pics", "repeat": 5.0, "caption_prefix": "sks, "}]
    assert recipe["data"]["clip"] == {"pixels": 768 * 768, "frames": [1, 33]}
    assert recipe["train"]["diffusion"] == {"density": "logit_normal", "shift": "dynamic", "drop": 0.0}
    assert recipe["model"]["lora"] == {"rank": 32, "alpha": 32} and recipe["train"]["global_batch_size"] == 4
    assert recipe["parallel"]["offload"] == ["parameters"] and recipe["train"]["precision"] == "pure_bf16"
    assert "cached" in recipe["data"]["encode"]


def test_kohya():
    written("data.toml", KOHYA_DATA)
    recipe = translated(written("flux.sh", KOHYA))
    assert recipe["data"]["datasets"] == [{"path": "pics", "repeat": 10.0, "caption": "sks dog"}]
    assert recipe["data"]["clip"] == {"pixels": 832 * 480}
    assert recipe["model"]["lora"] == {"rank": 16, "alpha": 1}  # kohya's network_alpha is 1
    diffusion = {"density": "logit_normal", "shift": 3.1582, "drop": 0.0, "guidance": 1.0}
    assert recipe["train"]["diffusion"] == diffusion
    assert recipe["optim"]["weight_decay"] == 0.01 and recipe["train"]["steps"] == 500
    samples = recipe["evaluate"]["samples"]
    assert samples["prompts"] == ["a dog", "a cat"] and samples["every"] == 100
    assert (samples["width"], samples["height"], samples["negative"]) == (832, 480, "blurry")


def test_dreambooth_folders_of_kohya():
    Path("train/10_sks dog").mkdir(parents=True)
    text = KOHYA.replace('--dataset_config="data.toml"', "--train_data_dir=train --resolution=512,768")
    recipe = translated(written("flux.sh", text))
    assert recipe["data"]["datasets"] == [{"path": "train/10_sks dog", "repeat": 10.0, "caption": "sks dog"}]
    assert recipe["data"]["clip"]["sizes"] == [[768, 512]]


def test_musubi_wants_a_pipeline_of_diffusers():
    written("data.toml", MUSUBI_DATA)
    written("wan.sh", MUSUBI)
    assert "--source Wan-AI/Wan2.1-T2V-1.3B-Diffusers" in refused("wan.sh")
    recipe = translated("wan.sh", source="weights/Wan")
    assert recipe["model"] == {"source": "weights/Wan", "lora": {"rank": 32, "alpha": 16.0}}
    assert recipe["data"]["clip"] == {"pixels": 832 * 480, "frames": [1, 25, 45], "fps": 16.0}
    assert recipe["train"]["diffusion"]["shift"] == 3.0


def test_ai_toolkit():
    recipe = translated(written("lora.yaml", AI_TOOLKIT))
    assert recipe["data"]["datasets"] == [{"path": "pics", "caption_prefix": "p3r5on "}]
    assert recipe["train"]["global_batch_size"] == 2 and recipe["train"]["ema"] == 0.99
    assert recipe["train"]["diffusion"] == {"density": "logit_normal", "shift": 1.0, "drop": 0.05}
    assert recipe["evaluate"]["samples"]["height"] == 768 and recipe["checkpoint"]["dir"] == "output/my_lora"


def test_simpletuner():
    written("data.json", json.dumps(BACKENDS))
    recipe = translated(written("config.json", json.dumps(SIMPLETUNER)))
    assert recipe["data"]["datasets"] == [{"path": "pics", "repeat": 5.0}]  # 4 times beside the first
    assert recipe["data"]["clip"] == {"pixels": 512 * 512, "frames": [1]}
    assert recipe["train"]["diffusion"] == {"density": "logit_normal", "shift": 3.0, "drop": 0.1}
    assert recipe["optim"]["schedule"] == {"name": "linear", "warmup": 100, "min_ratio": 0.004}


@pytest.mark.parametrize(
    ("what", "name", "old", "new", "kind"),
    [
        (LLAMAFACTORY, "a.yaml", "stage: sft", "stage: sft\nquantization_bit: 4", "nf4"),
        (LLAMAFACTORY, "a.yaml", "stage: sft", "stage: sft\nquantization_bit: 8", "int8"),
        (DIFFUSION_PIPE, "a.toml", "type = 'flux'", "type = 'flux'\ntransformer_dtype = 'float8'", "fp8"),
        (AI_TOOLKIT, "a.yaml", "is_flux: true", "is_flux: true, quantize: true", "fp8"),
        (KOHYA, "a.sh", "--sdpa", "--sdpa --fp8_base", "fp8"),
    ],
)
def test_frozen_weights_in_fewer_bits(what, name, old, new, kind):
    written("data.toml", KOHYA_DATA if name == "a.sh" else DIFFUSION_PIPE_DATA)
    assert old in what
    assert translated(written(name, what.replace(old, new)))["model"]["base"] == kind


# ---- nothing is dropped in silence ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "data", "typo", "near"),
    [
        (LLAMAFACTORY, "", ("lora_rank: 8", "lora_rnak: 8"), "nearest known: lora_rank"),
        (
            DIFFUSION_PIPE,
            DIFFUSION_PIPE_DATA,
            ("warmup_steps", "warmup_stesp"),
            "nearest known: warmup_steps",
        ),
        (AI_TOOLKIT, "", ("save_every: 250", "save_evry: 250"), "nearest known: save_every"),
    ],
)
def test_an_unknown_key_is_refused_by_name_and_line(what, data, typo, near):
    name = "main.toml" if "[model]" in what else "main.yaml"
    written("data.toml", data)
    text = what.replace(*typo)
    said = refused(written(name, text))
    bare = typo[1].partition(":")[0]
    line = next(i for i, each in enumerate(text.split("\n"), 1) if bare in each)
    assert near in said and f"{bare}, {name}:{line}" in said


@pytest.mark.parametrize("name", ["llamafactory", "diffusion-pipe", "ai-toolkit", "simpletuner"])
def test_every_key_has_a_row(name, capsys):
    suffix = {"diffusion-pipe": "toml", "simpletuner": "json"}.get(name, "yaml")
    text = {"llamafactory": LLAMAFACTORY, "diffusion-pipe": DIFFUSION_PIPE, "ai-toolkit": AI_TOOLKIT}.get(
        name
    )
    written("data.toml", DIFFUSION_PIPE_DATA)
    written("data.json", json.dumps(BACKENDS))
    file = written(f"main.{suffix}", text or json.dumps(SIMPLETUNER))
    command.main(file, [], None, None, None, [], False, True)
    rows = json.loads(capsys.readouterr().out)["rows"]
    named = {row["from"].split(",")[0].lstrip("-") for row in rows}
    given = Given("any", file, peers.read(Path(file))[0])
    keys = {key.replace("[]", "").rpartition(".")[2].lstrip("-") for key, _ in given.leaves()}
    aside = {"name", "version", "job", "is_flux", "use_ema", "ema_decay", "folder_path", "enable_wandb"}
    assert keys - named <= aside, sorted(keys - named - aside)


def test_faults_of_files():
    assert "no valid" in refused(written("a.toml", "x = [")) or "not valid TOML" in refused("a.toml")
    assert "its keys are of no program" in refused(written("b.toml", "a = 1"))
    said = refused(written("sft.yaml", LLAMAFACTORY.replace("identity", "identty")))
    assert "data set identty is not in it" in said and "Did you mean identity?" in said
    assert "hf download --repo-type dataset someone/far" in refused(
        written("sft.yaml", LLAMAFACTORY.replace("identity", "far"))
    )
    assert "swift infer is not translated" in refused("swift infer --model x")
    assert "trl grpo is not translated" in refused("trl grpo --model_name_or_path x")


def test_text_around_captions():
    data = Data.model_validate(
        {"datasets": [{"path": "pics", "caption_prefix": "sks, ", "caption_suffix": ", photo"}]}
    )
    record = open_corpus(data.datasets)[0]
    assert record.extra["captions"] == ("sks, a dog, photo",)
