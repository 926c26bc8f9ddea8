"""`polymodal translate`: scripts are read as bash reads them, and every flag and key of theirs gets a row."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from polymodal import recipe as recipes
from polymodal.core.errors import PolymodalError
from polymodal.tools.translate import command, shell

SCRIPT = r"""#!/usr/bin/env bash
# a comment; with "quotes and $( in it
source /usr/local/Ascend/cann/set_env.sh
export HCCL_CONNECT_TIMEOUT=1200
export TASK_QUEUE_ENABLE=2
NPUS_PER_NODE=8   # behind code
NNODES=1
WORLD_SIZE=$(($NPUS_PER_NODE*$NNODES))
TP=2
MBS=1
DP=$(($WORLD_SIZE/$TP))
GBS=$(($MBS*4*$DP))
LOAD_PATH="trees/model"
SAVE_PATH="out/run"

GPT_ARGS="
    --tensor-model-parallel-size ${TP} \
    --micro-batch-size ${MBS} \
    --global-batch-size ${GBS} \
    --seq-length 1024 \
    --use-flash-attn \
    --vocab-size 1 \
    --lr 1.0e-5 \
    --min-lr 1.0e-6 \
    --lr-decay-style cosine \
    --clip-grad 0.0 \
    --train-iters 200 \
    --bf16 \
    --use-distributed-optimizer \
    --load $LOAD_PATH \
    --no-load-optim \
    --no-load-rng \
    --lora-r 8 \
    --lora-target-modules linear_qkv linear_proj \
    --vocab-size 152064
"
mkdir -p logs
torchrun --nproc_per_node $NPUS_PER_NODE --nnodes $NNODES pretrain_vlm.py \
    $GPT_ARGS \
    --mm-data ./data.json \
    --mm-model ./model.json \
    --save $SAVE_PATH --save-interval 50 \
    2>&1 | tee logs/train.log
STEP=`grep "elapsed time" logs/train.log | awk '{print $5}'`
"""
DATA = {
    "dataset_param": {
        "dataset_type": "huggingface",
        "preprocess_parameters": {
            "model_name_or_path": "weights/Qwen2.5-VL-3B-Instruct",
            "image_max_pixels": 262144,
            "image_min_pixels": 0,
            "video_fps": 1.0,
        },
        "basic_parameters": {"template": "qwen2vl", "dataset_dir": "./data", "dataset": "./data/rows.json"},
        "attr": {"images": "images", "messages": "messages", "role_tag": "role", "system": None},
    },
    "dataloader_param": {"shuffle": True, "drop_last": True},
}
MODEL = {
    "model_id": "qwen2_5vl",
    "image_encoder": {
        "vision_encoder": {"num_layers": 32, "freeze": True},
        "vision_projector": {"freeze": False},
    },
    "text_decoder": {"num_layers": 36, "hidden_size": 2048, "pipeline_num_layers": [36]},
}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """The working directory, with a script and its files."""
    (tmp_path / "finetune.sh").write_text(SCRIPT)
    (tmp_path / "data.json").write_text(json.dumps(DATA))
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def changed(place: Path, old: str, new: str) -> None:
    file = place / "finetune.sh"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def translated(
    *words: str, nodes: int | None = None, source: str | None = None, force: bool = False, **values
) -> dict:
    out = Path("out.yaml")
    command.main(
        words[0], words[1:], out, nodes, source, [f"{k}={v}" for k, v in values.items()], force, False
    )
    recipes.load(out)
    return yaml.safe_load(out.read_text())


def refused(*words: str, **options) -> str:
    with pytest.raises(PolymodalError) as found:
        translated(*words, **options)
    assert not Path("out.yaml").exists()
    return str(found.value)


# ---- as bash reads ---------------------------------------------------------------------------------------


def launched_by_bash(script: Path, *arguments: str) -> list[str]:
    """The words that bash starts torchrun with."""
    tools, out = script.parent / "tools", script.parent / "words"
    tools.mkdir(exist_ok=True)
    fake = tools / "torchrun"
    fake.write_text(
        '#!/bin/bash\nfor each in "$@"; do printf "%s\\0" "$each"; done > ' + str(out) + "\nkill $PPID\n"
    )
    fake.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    subprocess.run(
        ["bash", str(script), *arguments], env=environment, cwd=script.parent, capture_output=True, timeout=60
    )
    return out.read_bytes().decode().split("\0")[:-1]


def words_of(script: Path, *arguments: str) -> list[str]:
    return [word.text for word in shell.read(script, arguments).words][1:]


needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not there")


@needs_bash
def test_a_documented_script(place):
    assert words_of(Path("finetune.sh")) == launched_by_bash(place / "finetune.sh")


@needs_bash
@pytest.mark.parametrize(
    "text",
    [
        'A="x y"\nB=$A\ntorchrun a.py $A "$A" \'$A\' "${B}z" ${C:-d e} "${C:-d e}" ${C} "$C"',
        "P=/a/b.c/d.sh\ntorchrun a.py ${P##*/} ${P%.*} ${P%/*} ${P#/a/} ${P%%.*} ${P##*.}",
        "N=7\nM=$((N*3/2-1))\ntorchrun a.py $M $((-7/2)) $((N%4)) $(( ($N + 1) * 2 ))",
        'if [ -z "$X" ]; then A=1; else A=2; fi\nif [[ abc == a* ]]; then B=3; fi\ntorchrun a.py $A $B',
        "if [ -f missing ]\nthen\n  A=1\nelif [ 3 -gt 2 ]\nthen\n  A=5\nfi\ntorchrun a.py $A",
        "for para in $*; do\n  if [[ $para == --size* ]]; then\n    size=$(echo ${para#*=})\n  fi\ndone\ntorchrun a.py $size",
        'A="one \\\n  two"\nA+=" three"\ntorchrun a.py $A "a\\$b" a\\ b \\\n  last && echo done',
        "cd sub || exit 1\n. ./vars.sh\ntorchrun a.py $FROM $(basename $FROM) > log 2>&1 &\nwait",
        'while false; do echo never; done\ncase x in y) A=1;; esac\nexport A=4\ntorchrun a.py "$A"# x#y # z',
    ],
)
def test_what_bash_expands(tmp_path, monkeypatch, text):
    (tmp_path / "sub").mkdir()
    (tmp_path / "vars.sh").write_text("FROM=/w/one.txt\n")
    (tmp_path / "sub/vars.sh").write_text("FROM=/w/two.txt\n")
    script = tmp_path / "run.sh"
    script.write_text(text + "\n")
    monkeypatch.chdir(tmp_path)
    if ". ./vars.sh" in text:  # beside the script, where it is called from
        (tmp_path / "sub/vars.sh").write_text("FROM=/w/one.txt\n")
    assert words_of(script, "--size=12", "--other") == launched_by_bash(script, "--size=12", "--other")


VALUE = st.text(st.sampled_from("abz 019./_-:=,+"), max_size=12)


@needs_bash
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.lists(VALUE, min_size=1, max_size=4),
    st.sampled_from(['"', "'"]),
    st.integers(1, 99),
    st.integers(1, 9),
)
def test_generated_scripts(tmp_path_factory, values, quote, first, second):
    lines = [f"V{i}={quote}{value}{quote}" for i, value in enumerate(values)]
    lines += [
        f"N=$(({first}*{second}/2))",
        'ALL="\n' + "".join(f"  --f{i} $V{i} \\\n" for i in range(len(values))) + '"',
    ]
    script = tmp_path_factory.mktemp("generated") / "run.sh"
    script.write_text("\n".join([*lines, 'torchrun x.py $ALL "$V0" --n=$N']) + "\n")
    assert words_of(script) == launched_by_bash(script)


def test_lines_of_words(place):
    found = {word.text: word.line for word in shell.read(Path("finetune.sh")).words}
    lines = SCRIPT.split("\n")
    for flag in ("--lr", "--load", "--lora-r", "--mm-data", "--save"):
        assert flag in lines[found[flag] - 1]


@pytest.mark.parametrize(
    "text, words",
    [
        ("torchrun a.py $((1/$UNSET))", "is 1/, which the shell refuses too"),
        ("A=$(nproc)\ntorchrun a.py --n $A", "known only to the shell.*--set A=VALUE"),
        ('A="open\ntorchrun a.py', ':1: a " is not closed'),
        ("if true; then\ntorchrun a.py", "fi is missing"),
        ("f() { echo; }\ntorchrun a.py", "a function is not read"),
        ("cat <<EOF\nx\nEOF\ntorchrun a.py", "here-document"),
        ("echo nothing", "no command of it starts"),
    ],
)
def test_what_is_not_read_is_said(tmp_path, text, words):
    script = tmp_path / "run.sh"
    script.write_text(text + "\n")
    with pytest.raises(PolymodalError, match=words):
        read = shell.read(script)
        [read.known(word) for word in read.words]


# ---- what the words mean ------------------------------------------------------------------------------------


def test_a_run_that_means_the_same(place):
    made = translated("finetune.sh")
    assert made["model"]["source"] == "weights/Qwen2.5-VL-3B-Instruct"
    assert made["parallel"] == {"dp_shard": -1, "tp": 2, "sp": False, "zero": 1}
    assert made["train"] | {"freeze": 0} == {
        "seed": 1234, "steps": 200, "global_batch_size": 16, "micro_batch_size": 1, "precision": "bf16",
        "loss": "per_micro_batch", "freeze": 0,
    }  # fmt: skip
    assert made["train"]["freeze"] == ["vision"]
    assert made["optim"]["schedule"] == {"name": "cosine", "warmup": 0, "min_ratio": 0.1}
    assert made["optim"]["betas"] == [0.9, 0.999]
    assert made["optim"]["clip_norm"] is None and made["optim"]["weight_decay"] == 0.01
    assert made["data"]["pack"] is False and made["data"]["max_length"] == 1024
    assert made["data"]["image"] == {"max_pixels": 262144}
    assert made["data"]["video"] == {"fps": 1.0, "min_frames": 1, "max_pixels": 65536}
    assert made["model"]["lora"] | {"targets": 0} == {
        "rank": 8,
        "alpha": 16,
        "targets": 0,
        "towers": ["language"],
    }
    assert {"q_proj", "o_proj"} <= set(made["model"]["lora"]["targets"])
    assert made["checkpoint"] == {
        "dir": "out/run",
        "every": 50,
        "resume": "never",
        "init_from": "trees/model",
    }
    assert made["device"]["env"] == {"HCCL_CONNECT_TIMEOUT": "1200", "TASK_QUEUE_ENABLE": "2"}
    text = Path("out.yaml").read_text()
    line = SCRIPT.split("\n").index("    --lr 1.0e-5 \\") + 1
    assert f"lr: 1.0e-05  # --lr, finetune.sh:{line}" in text


def test_nodes_and_variables_from_the_command_line(place):
    changed(place, "NNODES=1", "NNODES=$(cat $HOSTS | wc -l)")
    assert "--nodes N" in refused("finetune.sh")
    assert translated("finetune.sh", nodes=4)["train"]["global_batch_size"] == 64
    Path("out.yaml").unlink()
    assert translated("finetune.sh", nodes=1, MBS="2")["train"]["micro_batch_size"] == 2


def test_a_host_file_counts_the_nodes(place):
    changed(
        place,
        "NNODES=1",
        "HOSTS=\"hosts\"\nNNODES=$(cat $HOSTS | wc -l)\nMASTER=$(head -n1 $HOSTS | awk '{print $1;}')",
    )
    (place / "hosts").write_text("10.0.0.1\n10.0.0.2\n")
    assert translated("finetune.sh")["train"]["global_batch_size"] == 32


@pytest.mark.parametrize(
    "old, new, words",
    [
        (
            "--use-flash-attn",
            "--use-flash-atn",
            r"--use-flash-atn, finetune.sh:\d+ = True: nearest known: use-flash-attn",
        ),
        ("--use-flash-attn", "--hetero-parallel", "--hetero-parallel.*another tp, pp or cp for each tower"),
        (
            '"trees/model"',
            '"path to your weights"',
            r"finetune.sh:\d+: --load is followed by several words: path to your",
        ),
        ('"trees/model"', '"/path/to/weights"', "--load is still the placeholder"),
        ("GBS=$(($MBS*4*$DP))", "GBS=6", r"finetune.sh:\d+: the global batch size 6 is no multiple of"),
        ("TP=2", "TP=3", "8 processes are no multiple of tp 3"),
        ("./data.json", "./date.json", "the file ./date.json that it names is not there"),
        ("pretrain_vlm.py", "pretrain_vln.py", "no command of it starts"),
        ("--lr 1.0e-5", "--lr 1.0f-5", r"--lr is '1.0f-5', a number is wanted"),
        ("--lr-decay-style cosine", "--lr-decay-style inverse", "known are constant, linear, cosine, WSD"),
    ],
)
def test_one_sentence_for_what_has_no_translation(place, old, new, words):
    changed(place, old, new)
    message = refused("finetune.sh")
    assert re.search(words, message), message


def test_force_leaves_out_what_has_none(place, capsys):
    changed(place, "--use-flash-attn", "--use-flash-atn")
    assert translated("finetune.sh", force=True)["train"]["steps"] == 200
    assert "unknown (1)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"model_id": "x",\n}', "model.json:2: not valid JSON"),
        ('{"a": 1 // why\n}', "model.json:1: not valid JSON"),
        ("[1]", "it holds a list"),
    ],
)
def test_a_broken_file_is_named_with_its_line(place, text, words):
    (place / "model.json").write_text(text)
    assert words in refused("finetune.sh")


def test_an_unknown_key_of_a_data_file(place):
    data = json.loads(json.dumps(DATA))
    data["dataset_param"]["preprocess_parameters"]["image_max_pixel"] = 3
    (place / "data.json").write_text(json.dumps(data))
    assert "nearest known: dataset_param.preprocess_parameters.image_max_pixels" in refused("finetune.sh")


def test_a_script_called_from_its_repository(place, monkeypatch):
    """`bash examples/vlm/finetune.sh`: files start at the directory above, also when the call comes from elsewhere."""
    inside = place / "repo/examples/vlm"
    inside.mkdir(parents=True)
    for name in ("data.json", "model.json"):
        shutil.move(place / name, place / "repo" / name)
    shutil.move(place / "finetune.sh", inside / "finetune.sh")
    made = translated("repo/examples/vlm/finetune.sh")
    assert made["model"]["source"] == "repo/weights/Qwen2.5-VL-3B-Instruct"
    assert made["checkpoint"]["dir"] == "repo/out/run"


def test_a_command_line(place):
    words = "torchrun --nproc_per_node 4 pretrain_vlm.py --mm-data data.json --mm-model model.json --train-iters 5 --lr 1e-5"
    made = translated(words)
    assert made["optim"]["schedule"]["name"] == "linear" and made["train"]["precision"] == "fp32"
    assert made["parallel"]["dp_replicate"] == 4


def test_as_json(place, capsys):
    assert command.main("finetune.sh", [], None, None, None, [], False, True) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["world"] == 8 and found["recipe"]["train"]["steps"] == 200
    kinds = {row["from"].split(",")[0]: row["kind"] for row in found["rows"]}
    assert (
        kinds["--lr"] == "mapped"
        and kinds["--use-flash-attn"] == "no effect"
        and kinds["--vocab-size"] == "checked"
    )


def test_generation_inference_and_dreambooth(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model.json").write_text(
        json.dumps(
            {
                "predictor": {"model_id": "wandit", "num_layers": 30},
                "diffusion": {"num_inference_steps": 30, "guidance_scale": 4.5, "flow_shift": 3.0},
                "pipeline_config": {"input_size": [49, 480, 832]},
                "prompt": "a cat", "fps": 16, "frame_interval": 1, "save_path": "out/clips", "dtype": "bf16",
            }
        )
    )  # fmt: skip
    Path("infer.sh").write_text(
        "torchrun --nproc_per_node 1 inference_sora.py --mm-model model.json --load weights/wan/transformer --seed 5 --lr 1\n"
    )
    command.main("infer.sh", [], Path("run.sh"), None, None, [], False, False)
    assert Path("run.sh").read_text() == (
        "polymodal generate weights/wan --prompt 'a cat' --frames 49 --height 480 --width 832 --steps 30 --guidance 4.5 "
        "--fps 16 --out out/clips --seed 5 --dtype bf16\n"
    )
    Path("flux.sh").write_text(
        "batch_size=2\nfor p in $*; do\n  if [[ $p == --batch_size* ]]; then batch_size=$(echo ${p#*=}); fi\ndone\n"
        "accelerate launch --config_file acc.yaml ./train_dreambooth_lora_flux.py --pretrained_model_name_or_path=org/flux "
        '--instance_data_dir=subject --instance_prompt="a zuv robot" --resolution=512 --train_batch_size=$batch_size '
        "--gradient_accumulation_steps=2 --rank=16 --learning_rate=1e-4 --max_train_steps=40 --mixed_precision=bf16 "
        "--output_dir=out/flux\n"
    )
    Path("acc.yaml").write_text(
        "distributed_type: DEEPSPEED\nnum_processes: 8\ndeepspeed_config: {zero_stage: 2}\n"
    )
    made = translated("flux.sh", "--batch_size=1")
    assert made["train"]["global_batch_size"] == 16 and made["train"]["micro_batch_size"] == 1
    assert made["data"]["datasets"] == [{"path": "subject", "caption": "a zuv robot"}]
    assert made["data"]["clip"]["sizes"] == [[512, 512]] and made["parallel"]["zero"] == 2
    assert made["model"]["lora"] == {"rank": 16, "alpha": 16, "init": "gaussian"}


def test_preferences(place):
    data = json.loads(json.dumps(DATA))
    data["dataset_param"]["attr"] |= {"ranking": True, "chosen": "chosen", "rejected": "rejected"}
    (place / "data.json").write_text(json.dumps(data))
    changed(
        place,
        "pretrain_vlm.py \\",
        "posttrain_qwen2vl_dpo.py --dpo-beta 0.2 --dpo-loss-type sigmoid --pref-ftx 0.1 \\",
    )
    changed(place, "    $GPT_ARGS \\", "    $GPT_ARGS --dpo-label-smoothing 0.05 --ref-model $LOAD_PATH \\")
    made = translated("finetune.sh")
    assert made["train"]["objective"] == "dpo" and "loss" not in made["train"]
    assert made["train"]["preference"] == {
        "loss": {"sigmoid": 1.0, "sft": 0.1}, "beta": 0.2, "label_smoothing": 0.05,
    }  # fmt: skip
    assert made["data"]["attr"]["rejected"] == "rejected"


def test_preferences_of_what_is_generated(place):
    """Scores of the described system: the scale is 2 x dpo-beta x loss_beta, with the timestep as a factor."""
    (place / "data.json").write_text(
        json.dumps(
            {
                "dataset_param": {
                    "dataset_type": "feature",
                    "basic_parameters": {"data_path": "f/data.jsonl", "data_folder": "f"},
                }
            }
        )
    )
    dpo = {"histogram_path": "scores.json", "weight_alpha": 0, "weight_beta": None, "loss_beta": 2000}
    model = {
        "load_video_features": True,
        "load_text_features": True,
        "predictor": {"model_id": "wandit"},
        "diffusion": {"model_id": "wan_flow_match_scheduler", "shift": 5},
    }
    (place / "model.json").write_text(json.dumps({**model, "dpo": dpo}))
    flags = "--dpo-beta 0.1 --dpo-loss-type sigmoid --dpo-label-smoothing 0.05 --pref-ftx 0.1"
    changed(place, "pretrain_vlm.py \\", f"posttrain_sora_dpo.py {flags} \\")
    for flag in ("    --lora-r 8 \\\n", "    --lora-target-modules linear_qkv linear_proj \\\n"):
        changed(place, flag, "")
    made = translated("finetune.sh", source="weights/wan", force=True)
    assert made["train"]["objective"] == "diffusion_dpo"
    both = {"loss": {"sigmoid": 1.0, "sft": 0.1}, "label_smoothing": 0.05}
    assert made["train"]["preference"] == {"beta": 400.0, "time_weight": "t", **both}
    dpo["weight_alpha"] = 0.5
    (place / "model.json").write_text(json.dumps({**model, "dpo": dpo}))
    made = translated("finetune.sh", source="weights/wan", force=True)
    weighed = {"beta": 400.0, "time_weight": "t", "histogram": "scores.json", "weight_alpha": 0.5}
    assert made["train"]["preference"] == {**weighed, **both}


def test_the_native_trainers_yaml(place):
    (place / "cfg.yaml").write_text(
        yaml.safe_dump(
            {
                "parallel": {
                    "fully_shard_parallel_size": "auto", "ulysses_parallel_size": 2, "recompute": True,
                    "fsdp_plan": {"param_dtype": "bf16", "apply_modules": ["model.visual.blocks.{*}"]},
                },
                "data": DATA,
                "model": {"model_name_or_path": "weights/q", "freeze": ["model.visual"], "model_id": "qwen3_vl"},
                "training": {"gradient_accumulation_steps": 4, "lr": "1e-6", "clip_grad": 0.0, "train_iters": 7, "save": "o"},
            }
        )
    )  # fmt: skip
    (place / "run.sh").write_text(
        "torchrun --nproc_per_node 8 mm/fsdp/train/trainer.py cfg.yaml training.lr=2e-5\n"
    )
    made = translated("run.sh")
    assert made["train"]["freeze"] == ["vision", "projector"] and made["train"]["global_batch_size"] == 16
    assert made["optim"]["lr"] == 2e-5 and made["optim"]["clip_norm"] is None
    assert made["parallel"] == {"dp_shard": -1, "cp": 2, "ulysses": 2, "zero": 3, "recompute": "full"}
    assert made["checkpoint"] == {"dir": "o", "every": 1}
