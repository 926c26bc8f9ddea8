"""Wishes in plain words, English and Chinese, to a kind of model, a task, a card or what is not here yet."""

from __future__ import annotations

import json
import shlex

import pytest
import typer
from typer.testing import CliRunner

from polymodal import cli
from polymodal.core.errors import PolymodalError
from polymodal.models import catalog
from polymodal.tools import advise, models_command

CARDS = catalog.cards()


def ask(query: str) -> advise.Route:
    return advise.route(query, CARDS)


@pytest.mark.parametrize(
    "query, kind",
    [
        # the routing table of the documents, and their keywords
        ("Train understanding model / VLM", "understanding"),
        ("Train generative model / video / image", "generation"),
        ("Train omni model", "omni"),
        ("Train speech / TTS model", "audio"),
        ("VLM", "understanding"),
        ("vision-language", "understanding"),
        ("image-text understanding", "understanding"),
        ("OCR", "understanding"),
        ("InternVL", "understanding"),
        ("GLM4V", "understanding"),
        ("Video generation", "generation"),
        ("image generation", "generation"),
        ("t2v", "generation"),
        ("t2i", "generation"),
        ("i2v", "generation"),
        ("Wan", "generation"),
        ("CogVideoX", "generation"),
        ("FLUX", "generation"),
        ("speech + vision + text", "omni"),
        ("Speech recognition", "audio"),
        ("ASR", "audio"),
        ("Whisper", "audio"),
        ("CosyVoice", "audio"),
        # whole sentences
        ("train a text to video model", "generation"),
        ("I want to fine-tune a model that answers questions about photos", "understanding"),
        ("describe pictures in Chinese", "understanding"),
        ("make captions for my images", "understanding"),
        ("read receipts and invoices", "understanding"),
        ("turn speech to text for call centre recordings", "audio"),
        ("clone a voice: text to speech", "audio"),
        ("a model that sees and hears and answers", "omni"),
        ("draw pictures from a prompt", "generation"),
        ("微调一个图文理解模型", "understanding"),
        ("训练文生视频模型", "generation"),
        ("文生图", "generation"),
        ("语音识别", "audio"),
        ("语音合成模型", "audio"),
        ("全模态模型训练", "omni"),
        ("视频理解", "understanding"),
        ("图生视频", "generation"),
    ],
)
def test_kinds(query, kind):
    assert ask(query).kind == kind


@pytest.mark.parametrize(
    "query, name, size",
    [
        ("fine-tune Qwen2.5VL-7B", "qwen2.5-vl", "7b"),
        ("Qwen2.5-VL 72B on 32 GPUs", "qwen2.5-vl", "72b"),
        ("qwen2 vl 2b lora", "qwen2-vl", "2b"),
        ("Qwen/Qwen3-VL-8B-Instruct", "qwen3-vl", "8b"),
        ("qwen3vl", "qwen3-vl", None),
        ("Qwen3-VL-30B-A3B", "qwen3-vl-moe", "30b-a3b"),
        ("qwen3-vl-moe 235b", "qwen3-vl-moe", "235b-a22b"),
        ("用LoRA微调qwen2.5vl-3b", "qwen2.5-vl", "3b"),
        ("fine-tune GLM-4.1V with lora", "glm4.1v", None),
        ("GLM-4.1V-9B-Thinking", "glm4.1v", "9b"),
        ("zai-org/GLM-4.5V on 64 GPUs", "glm4.5v", None),
        ("glm4v", "glm4.1v", None),
        ("hunyuanvideo 1.5", "hunyuan-video-1.5", None),
        ("HunyuanVideo-I2V", "hunyuan-video-i2v", None),
        ("train hunyuanvideo", "hunyuan-video", None),
    ],
)
def test_named_models(query, name, size):
    answer = ask(query)
    assert answer.card is not None and (answer.card.name, answer.size) == (name, size)


@pytest.mark.parametrize(
    "query, first",
    [("fun-asr", "fun-asr"), ("CosyVoice 3", "cosyvoice3"), ("train bagel", "bagel")],
)  # fmt: skip
def test_models_still_to_come_are_named_as_such(query, first):
    answer = ask(query)
    assert answer.card is None and answer.coming[0].name == first
    assert [stage.here for stage in answer.stages].count(False) >= 2
    assert not any("train" in stage.command for stage in answer.stages)


@pytest.mark.parametrize(
    "query, task",
    [
        ("train a VLM", "sft"), ("LoRA on qwen3vl", "lora"), ("pretrain a VLM from scratch", "pretrain"), ("DPO qwen2vl", "dpo"),
        ("preference alignment", "dpo"), ("GRPO", "grpo"), ("reinforcement learning for qwen2.5vl", "grpo"), ("benchmark my VLM", "evaluate"),
        ("偏好对齐", "dpo"), ("强化学习", "grpo"), ("预训练视觉语言模型", "pretrain"), ("用lora微调图文理解模型", "lora"), ("评测图文理解模型", "evaluate"),
    ],
)  # fmt: skip
def test_tasks(query, task):
    answer = ask(query)
    assert answer.task == task and answer.kind == "understanding"
    if task in advise.NOT_YET:
        assert "not here yet" in answer.notes[0] and any(
            stage.title == task.upper() and not stage.here for stage in answer.stages
        )


def test_dreambooth_is_a_task_of_picture_models():
    answer = ask("dreambooth with flux.1 dev")
    assert answer.task == "dreambooth" and answer.card.name == "flux.1"
    assert any("--task dreambooth" in stage.command for stage in answer.stages)


def test_single_stages_are_tasks_of_their_own():
    for query, title in (
        ("feature extraction", "Extract features"), ("Wan2.1 特征提取", "Extract features"), ("convert weights of qwen2-vl to megatron", "Convert"),
        ("权重转换 qwen2.5vl", "Convert"), ("export my run", "Export"), ("导出模型", "Export"),
    ):  # fmt: skip
        assert ask(query).stages[-1].title == title, query
    measured = ask("evaluate qwen2-vl on MMMU").stages[-1]
    assert "mmmu --data MMMU_DEV_VAL.tsv" in measured.command and measured.writes.endswith("-mmmu/")
    assert "MMMU_DEV_VAL.tsv" in measured.reads


def test_text_to_video_and_text_to_image_differ():
    video, image = ask("train a text to video model"), ask("train a text to image model")
    assert "lumina" in {f.name for f in image.coming} and "lumina" not in {f.name for f in video.coming}
    assert any(stage.title == "Extract features" for stage in video.stages)
    assert {f.name for f in ask("transcribe speech").coming} == {"fun-asr"}
    assert {f.name for f in ask("text to speech").coming} == {"cosyvoice3"}


def test_devices_are_read():
    assert ask("qwen2.5vl 7b on 16 NPUs").devices == 16
    assert ask("8卡微调qwen2.5vl").devices == 8
    assert ask("qwen2.5vl 7b").devices is None


def test_nonsense_is_not_guessed():
    answer = ask("please bake a cake")
    assert answer.kind is None and answer.stages == ()


@pytest.mark.parametrize(
    "query, kind, task, name",
    [  # as people write them; name: the card, or the first family still to come
        ("I want to fine-tune a model that reads receipts", "understanding", "sft", "qwen3-vl"),
        ("animate a photo", "generation", "sft", "wan2.2"),
        ("teach stable diffusion my dog's face from 10 photos", "generation", "dreambooth", "sd3"),
        ("personalize a text to image model", "generation", "dreambooth", "sd3"),
        ("dreambooth with wan2.1", "generation", "lora", "wan2.1"),
        ("edit photos as told in words", "generation", "sft", "flux.1-kontext"),
        ("speech recognition for Cantonese", "audio", "sft", "whisper"),
        ("make subtitles from recordings", "audio", "sft", "whisper"),
        ("clone a voice", "audio", "sft", "qwen3-tts"),
        ("reinforcement learning for a vision model on math problems", "understanding", "grpo", "qwen3-vl"),
        ("align a VLM with human preference pairs", "understanding", "dpo", "qwen3-vl"),
        ("fine-tune InternVL3 on my documents", "understanding", "sft", "internvl"),
        ("a model that sees and hears and answers", "omni", "sft", "qwen2.5-omni"),
        ("speech + vision + text", "omni", "sft", "qwen2.5-omni"),
        ("LoRA on qwen2.5 omni 3b", "omni", "lora", "qwen2.5-omni"),
        ("让照片动起来", "generation", "sft", "wan2.2"),
        ("我想微调一个看图问答模型", "understanding", "sft", "qwen3-vl"),
    ],
)
def test_sentences_as_people_write_them(query, kind, task, name):
    answer = ask(query)
    first = answer.card.name if answer.card else answer.coming[0].name
    assert (answer.kind, answer.task, first) == (kind, task, name)


def test_the_size_to_begin_with_is_one_of_the_documents():
    assert advise.middle(CARDS["flux.1"]) == "dev" and advise.middle(CARDS["qwen2.5-vl"]) == "7b"
    for card in CARDS.values():
        assert not card.seeds or advise.middle(card) in card.seeds


def test_what_converts_today_is_listed_though_it_does_not_train_yet():
    from polymodal.convert import family as converters

    known = {
        advise._compact(family.title): family
        for family in converters.families().values()
        if family.architectures
    }
    for family in advise.PLANNED:
        own = [title for title in known if advise._compact(family.name).startswith(title)]
        to = "" if not own else "dcp" if known[max(own, key=len)].kind == "dcp" else "mm"
        assert family.converts == to, family.name
    assert not any(stage.title == "Convert" and stage.here for stage in ask("train bagel").stages)
    assert [s.title for s in ask("convert weights of glm-4.5v").stages][-1] == "Convert"


def test_every_awaited_family_is_found_by_its_name_and_aliases():
    for family in advise.PLANNED:
        for name in (family.name, *family.aliases):
            found = ask(f"train {name} please")
            assert family.name in {f.name for f in found.coming} or found.card is not None, name
            assert found.kind == family.kind or found.card is not None


def test_cards_that_came_are_no_longer_awaited():
    answer = advise.route("wan2.1", {**CARDS, "wan2.1": CARDS["qwen2-vl"]})
    assert "wan2.1" not in {f.name for f in answer.coming}


COMMAND = typer.main.get_command(cli.app)


def known_command(words: list[str]) -> bool:
    """Whether the command line names a sub-command and options that exist."""
    command = COMMAND
    rest = words[1:]
    while rest and hasattr(command, "commands"):
        command, rest = command.commands[rest[0]], rest[1:]
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return all(word in options for word in rest if word.startswith("-"))


@pytest.mark.parametrize("task", list(advise.TASKS))
@pytest.mark.parametrize("name", list(CARDS))
def test_every_stage_is_a_command_that_exists(name, task):
    stages = advise.way(CARDS[name], None, task)
    commands = [stage.command for stage in stages if stage.command]
    assert len(commands) >= (2 if task == "export" else 3) and all(
        known_command(shlex.split(command)) for command in commands
    )
    assert all(stage.here or not stage.command for stage in stages)


def test_paths_of_the_stages_join_up():
    stages = advise.way(CARDS["qwen2.5-vl"], "3b", "lora")
    written = {part.strip().split(" ")[0] for stage in stages for part in stage.writes.split(",") if part}
    given = ("data/llava_instruct_150k.json", "data/COCO2017/", "AI2D_TEST.tsv")
    for stage in stages:
        for part in filter(None, (text.strip() for text in stage.reads.split(","))):
            assert part.startswith(given) or any(part.startswith(done) for done in written), (
                stage.title,
                part,
            )


# ---- the command --------------------------------------------------------------------------------------------------


def run(*arguments: str) -> str:
    result = CliRunner(env={"COLUMNS": "80"}).invoke(cli.app, ["models", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_table_fits_80_columns_and_names_every_model():
    out = run()
    assert max(map(len, out.splitlines())) <= 80
    for card in CARDS.values():
        assert card.name in out
        assert all(task in out for task in card.tasks)
    assert "verified" in out and "whisper" in out and "…" not in out


@pytest.mark.parametrize("name", list(CARDS))
def test_a_page_lists_sizes_and_why_not(name):
    out = run(name)
    card = CARDS[name]
    flat = " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 80
    assert all(size.hub in out for size in card.sizes.values())
    for reason in card.limits.values():
        assert reason in flat
    for axis in ("pp", "ep"):
        reason = models_command.why_not(card, axis)
        assert reason is None or f"no: {reason}" in flat


def test_json_forms():
    assert {row["name"] for row in json.loads(run("--json"))} == set(CARDS)
    page = json.loads(run("qwen2.5-vl", "--json"))
    assert page["parallel"]["tp"] == "yes" and page["sizes"]["7b"]["hub"] == "Qwen/Qwen2.5-VL-7B-Instruct"
    query = json.loads(run("--for", "train a text to video model", "--json"))
    assert query["kind"] == "generation" and query["model"] == "wan2.2" and query["not_yet"] == []


def test_a_request_is_answered_with_commands_and_paths():
    out = run("--for", "微调 qwen2.5-vl 7b, lora, 8卡")
    assert "model: qwen2.5-vl, size 7b" in out
    assert "polymodal train qwen2.5-vl-7b-lora.yaml --nproc 8" in out and "runs/qwen2.5-vl-7b-lora/" in out
    assert "--merge-lora" in out
    assert "polymodal encode" in run("--for", "train a text to video model")
    assert "polymodal transcribe" in run("--for", "train a model that transcribes speech")
    spoken = run("--for", "train a text to speech model")
    assert "polymodal data codes" in spoken and "--text" in spoken and "transcribe" not in spoken
    assert "Say what goes in" in run("--for", "xyzzy")


@pytest.mark.parametrize("task", list(advise.TASKS))
def test_every_task_is_named_on_the_page(task):
    model = "flux.1" if task in ("dreambooth", "encode") else "qwen2-vl"
    word = next((words[0] for name, words in advise.METHODS.items() if name == task))
    out = run("--for", f"{word} {model}")
    assert advise.TASKS[task] in out.splitlines()[0] and max(map(len, out.splitlines()[:6])) <= 80


@pytest.mark.parametrize(
    "name, words",
    [
        ("qwen2.5-vll", "Did you mean qwen2.5-vl"),
        ("bagel", "has no card here yet"),
        ("zzz", "There is no model `zzz`"),
    ],
)
def test_unknown_names(name, words):
    with pytest.raises(PolymodalError, match=words):
        models_command.main(name)
