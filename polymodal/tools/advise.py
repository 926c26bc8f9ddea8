"""From a wish in plain words to a model, a task and the steps to take. English and Chinese.

Sees the cards. Facts about families that have no card yet are one table here; a family leaves it when its card comes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from polymodal.models.card import ModelCard

Kind = Literal["understanding", "generation", "omni", "audio"]
Task = Literal[
    "sft", "lora", "dreambooth", "pretrain", "dpo", "grpo", "encode", "convert", "export", "chat", "evaluate"
]

TASKS: dict[Task, str] = {
    "sft": "full fine-tuning", "lora": "LoRA fine-tuning", "dreambooth": "DreamBooth", "pretrain": "pretraining",
    "dpo": "preference training (DPO)", "grpo": "reinforcement (GRPO)", "encode": "feature extraction",
    "convert": "conversion of weights", "export": "export", "chat": "inference", "evaluate": "evaluation",
}  # fmt: skip


@dataclass(frozen=True)
class PlannedFamily:
    """A family that the documents name and that has no card here yet."""

    name: str
    kind: Kind
    tasks: tuple[str, ...]
    sizes: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    features: bool = False  # trains on latents and text embeddings computed before
    converts: str = ""  # to what `polymodal convert` takes its hub checkpoints today: mm, dcp or nothing
    status: str = "not yet"


PLANNED: tuple[PlannedFamily, ...] = (
    PlannedFamily("internvl2.5", "understanding", ("image-text-to-text",), ("4b", "78b"), ("internvl", "internvl2"), converts="mm"),
    PlannedFamily("internvl3", "understanding", ("image-text-to-text",), ("8b", "78b"), ("internvl",), converts="mm"),
    PlannedFamily("internvl3.5", "understanding", ("image-text-to-text",), ("30b",), ("internvl",), converts="dcp"),
    PlannedFamily("glm4.1v", "understanding", ("image-text-to-text",), ("9b",), ("glm4v", "glm-4.1v", "glm"), converts="mm"),
    PlannedFamily("glm4.5v", "understanding", ("image-text-to-text",), (), ("glm4v", "glm-4.5v", "glm"), converts="dcp"),
    PlannedFamily("deepseek-vl2", "understanding", ("image-text-to-text",), (), ("deepseekvl", "deepseekvl2", "deepseek-vl"), converts="mm"),
    PlannedFamily("deepseek-ocr", "understanding", ("image-text-to-text", "ocr"), (), ("deepseekocr", "deepseekocr2", "deepseek-ocr2")),
    PlannedFamily("llava-1.5", "understanding", ("image-text-to-text",), ("7b",), ("llava",)),
    PlannedFamily("janus-pro", "understanding", ("image-text-to-text", "text-to-image"), (), ("janus", "januspro")),
    PlannedFamily("ming", "omni", ("any-to-text",), (), ()),
    PlannedFamily("bagel", "omni", ("image-text-to-text", "text-to-image"), (), ()),
    PlannedFamily("opensora-plan", "generation", ("text-to-video", "image-to-video"), ("8.6b",), ("opensoraplan", "opensora", "open-sora"), True),
    PlannedFamily("step-video", "generation", ("text-to-video",), (), ("stepvideo",), True, converts="mm"),
    PlannedFamily("lumina", "generation", ("text-to-image",), (), ("lumina-mgpt",), True),
    PlannedFamily("qwen2.5-omni", "omni", ("any-to-text", "text-to-speech"), ("3b", "7b"), ("qwen2.5omni", "qwen-omni"), converts="mm"),
    PlannedFamily("qwen3-omni", "omni", ("any-to-text", "text-to-speech"), ("30b-a3b",), ("qwen3omni", "qwen-omni"), converts="dcp"),
    PlannedFamily("whisper", "audio", ("speech-recognition",), ("1.5b",), ()),
    PlannedFamily("fun-asr", "audio", ("speech-recognition",), (), ("funasr",)),
    PlannedFamily("qwen3-asr", "audio", ("speech-recognition",), (), ("qwen3asr",)),
    PlannedFamily("cosyvoice3", "audio", ("text-to-speech",), (), ("cosyvoice",)),
    PlannedFamily("qwen3-tts", "audio", ("text-to-speech",), (), ("qwen3tts",)),
)  # fmt: skip

INTENTS: dict[Kind, dict[str, int]] = {
    "understanding": {
        "vlm": 4, "vision language": 4, "image text understanding": 4, "image understanding": 4, "video understanding": 4,
        "visual question": 4, "vqa": 4, "ocr": 4, "caption": 3, "describe": 2, "document": 2, "documents": 2, "chart": 2,
        "grounding": 3, "detect": 1, "read": 1, "receipt": 2, "receipts": 2, "invoice": 2, "screenshot": 2, "screenshots": 2,
        "recognize text": 4, "image to text": 4, "video to text": 4, "answer questions": 2, "answers questions": 2,
        "questions about": 2, "picture": 1, "pictures": 1, "image": 1, "images": 1, "photo": 1, "photos": 1,
        "图文理解": 4, "图像理解": 4, "图片理解": 4, "视频理解": 4, "多模态理解": 4, "视觉语言": 4, "视觉问答": 4, "文字识别": 3, "看图": 3,
        "描述图": 3, "图表": 2, "文档": 2, "票据": 2, "发票": 2, "理解": 2, "识别图": 3,
    },
    "generation": {
        "text to video": 5, "t2v": 5, "image to video": 5, "i2v": 5, "video to video": 5, "v2v": 5, "flf2v": 5, "text to image": 5, "t2i": 5,
        "video generation": 5, "image generation": 5, "generate video": 5, "generate videos": 5, "generate image": 5, "generate images": 5,
        "generates video": 5, "generates videos": 5, "generates images": 5, "make videos": 4, "make pictures": 4, "draw": 3, "paint": 3,
        "generative": 3, "diffusion": 4, "stable diffusion": 5, "animate": 5, "animates": 5, "animation": 4, "create images": 5, "create videos": 5,
        "create pictures": 4, "make a video": 5, "make images": 4, "image editing": 5, "edit images": 4, "edit pictures": 4, "edit photos": 4, "dreambooth": 4, "inpainting": 4, "from a prompt": 2,
        "文生视频": 5, "图生视频": 5, "文生图": 5, "图生图": 5, "视频生成": 5, "图像生成": 5, "图片生成": 5, "生成视频": 5, "生成图": 5, "生成类": 4,
        "扩散": 4, "画图": 4, "绘画": 4, "动画": 4, "动起来": 4, "图像编辑": 5, "图片编辑": 5, "修图": 4,
    },
    "omni": {
        "omni": 5, "speech and vision": 5, "speech vision and text": 5, "speech vision text": 5, "any to any": 5, "audio and video": 3, "see and hear": 4,
        "sees and hears": 4, "talks and sees": 4, "全模态": 5, "音视频": 4, "语音和视觉": 5, "能听能看": 5,
    },
    "audio": {
        "speech": 3, "asr": 5, "tts": 5, "speech recognition": 6, "speech to text": 6, "text to speech": 6, "transcribe": 5,
        "transcription": 5, "voice": 3, "voice cloning": 6, "clone a voice": 6, "clone my voice": 6, "subtitles": 4, "audio": 2, "dictation": 4, "spoken": 3,
        "语音识别": 6, "语音合成": 6, "语音": 4, "转写": 5, "听写": 4, "音频": 3, "克隆声音": 6, "声音": 2,
    },
}  # fmt: skip

WORKS: dict[str, dict[str, int]] = {  # what a family must do: tasks of cards and of PLANNED
    "text-to-video": {"text to video": 5, "t2v": 5, "video generation": 3, "generate video": 3, "generate videos": 3, "文生视频": 5, "视频生成": 3, "生成视频": 3},
    "image-to-video": {"image to video": 5, "i2v": 5, "animate": 5, "animates": 5, "动起来": 5, "flf2v": 5, "图生视频": 5},
    "video-to-video": {"video to video": 5, "v2v": 5},
    "image-to-image": {"image editing": 5, "edit images": 5, "edit pictures": 5, "edit photos": 5, "image to image": 5, "图生图": 5, "图像编辑": 5, "图片编辑": 5, "修图": 5},
    "text-to-image": {"stable diffusion": 3, "text to image": 5, "t2i": 5, "image generation": 3, "generate image": 3, "generate images": 3, "draw": 2, "dreambooth": 3, "文生图": 5, "图像生成": 3, "图片生成": 3, "生成图": 3, "画图": 2, "绘画": 2},
    "speech-recognition": {"asr": 5, "speech recognition": 5, "speech to text": 5, "transcribe": 5, "transcription": 5, "dictation": 4, "subtitles": 4, "语音识别": 5, "转写": 5, "听写": 4},
    "text-to-speech": {"tts": 5, "text to speech": 5, "voice cloning": 5, "clone a voice": 5, "clone my voice": 5, "语音合成": 5, "克隆声音": 5},
    "video-text-to-text": {"video understanding": 5, "video to text": 5, "视频理解": 5},
    "image-text-to-text": {"image to text": 5, "image understanding": 5, "图像理解": 5, "图片理解": 5, "图文理解": 5},
}  # fmt: skip

METHODS: dict[Task, tuple[str, ...]] = {
    "dpo": ("dpo", "preference", "preferences", "preference alignment", "human feedback", "偏好"),
    "grpo": ("grpo", "rlhf", "reinforcement", "reinforcement learning", "reward", "强化学习", "奖励"),
    "dreambooth": ("dreambooth", "dream booth", "subject driven", "my own subject", "photos of my", "pictures of my", "personalize", "personalise", "my dog", "my cat", "my face"),
    "lora": ("lora", "qlora", "adapter", "adapters", "peft", "parameter efficient", "低秩", "适配器"),
    "pretrain": ("pretrain", "pretraining", "pre train", "pre training", "from scratch", "预训练", "从头训练", "从零"),
    "encode": ("feature extraction", "extract features", "extract feature", "encode", "特征提取", "提取特征"),
    "convert": ("weight conversion", "convert weights", "convert weight", "convert checkpoint", "convert checkpoints", "to megatron", "from megatron", "mm convert", "hf to mm", "mm to hf", "权重转换", "转换权重"),
    "export": ("export", "导出"),
    "evaluate": ("evaluate", "evaluation", "benchmark", "score", "测评", "评测", "评估"),
    "chat": ("chat with", "inference", "try", "推理", "试用"),
    "sft": ("sft", "fine tune", "fine tuning", "finetune", "finetuning", "full", "微调", "全参"),
}  # fmt: skip
ALONE: dict[Task, Kind] = {  # what a task means when the wish names no kind of model
    "dpo": "understanding", "grpo": "understanding", "encode": "generation", "convert": "understanding", "export": "understanding",
}  # fmt: skip
NOT_YET: dict[str, str] = {
    "dpo": "DPO is not here yet; the stage before it, supervised fine-tuning, is.",
    "grpo": "GRPO is not here yet; the stage before it, supervised fine-tuning, is.",
}


FILES = {
    "ai2d": "AI2D_TEST.tsv",
    "mmmu": "MMMU_DEV_VAL.tsv",
    "chartqa": "ChartQA_TEST.tsv",
    "docvqa": "DocVQA_VAL.tsv",
}
"""VLMEvalKit's files of the benchmarks that answer questions."""


@dataclass(frozen=True)
class Stage:
    """One step of the way: what to run, what it reads and writes. `command` "" = nothing to run; `here` False = not yet."""

    title: str
    command: str = ""
    reads: str = ""
    writes: str = ""
    note: str = ""
    here: bool = True


@dataclass(frozen=True)
class Route:
    """The answer to a wish. `card` None when no card here does it; `coming` are the families that will."""

    kind: Kind | None
    task: Task
    card: ModelCard | None = None
    size: str | None = None
    devices: int | None = None
    others: tuple[ModelCard, ...] = ()
    coming: tuple[PlannedFamily, ...] = ()
    notes: tuple[str, ...] = ()
    stages: tuple[Stage, ...] = field(default=())


def _plain(text: str) -> str:
    """Lower case, words apart by single spaces, also from Chinese beside them; dots stay inside words (names have them)."""
    text = re.sub(r"[^\w.]+|_|\.(?!\w)|(?<!\w)\.", " ", text.lower())
    text = re.sub(r"(?<=[\u4e00-\u9fff])(?=[a-z0-9])|(?<=[a-z0-9])(?=[\u4e00-\u9fff])", " ", text)
    return " " + " ".join(text.split()) + " "


def _holds(text: str, phrase: str) -> bool:
    """Whether a plain text holds the phrase: whole words, or anywhere for Chinese."""
    if any("\u4e00" <= letter <= "\u9fff" for letter in phrase):
        return phrase in text.replace(" ", "")
    return _plain(phrase) in text


def _score(text: str, words: Mapping[str, int]) -> int:
    """Sum of the weights of the phrases in the text; a phrase inside a longer one that is there counts not."""
    hits = [phrase for phrase in words if _holds(text, phrase)]
    return sum(
        words[phrase] for phrase in hits if not any(phrase != other and phrase in other for other in hits)
    )


def _compact(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "", text.lower())


def _mentioned(text: str, names: Iterable[str]) -> int:
    """Length of the longest of the names that the text mentions, written together or apart; 0 for none."""
    squeezed = _compact(text)
    longest = 0
    for name in names:
        short = _compact(name)
        spaced = _plain(name) in text
        if spaced or (
            len(short) > 4
            and re.search(
                rf"(?<![a-z0-9.]){re.escape(short)}(?![0-9.]*[0-9])",
                squeezed if len(short) > 6 else _joined(text),
            )
        ):
            longest = max(longest, len(short))
    return longest


def _joined(text: str) -> str:
    return " ".join(_compact(word) for word in text.split())


def _count(text: str) -> int | None:
    found = re.search(r"\b(\d{1,5})\s*(?:x\s*)?(?:[a-z]{0,4}pus?|cards?|devices?|accelerators?|张|卡)", text)
    return int(found[1]) if found else None


def _size(text: str, sizes: Iterable[str]) -> str | None:
    words = text.split()
    for key in sorted(sizes, key=len, reverse=True):
        if key in words or any(word.endswith(f"-{key}") for word in words) or _plain(key) in text:
            return key
        if key.split("-")[0] in words:
            return key
    return None


def route(wish: str, cards: Mapping[str, ModelCard]) -> Route:
    """What a wish in plain words means: kind of model, task, the card (with size) or the families still to come.

    A model that is named decides; else the words of each kind are weighed. The stages are those of the whole way.
    """
    text = _plain(wish)
    named = {name: _mentioned(text, _names(card)) for name, card in cards.items()}
    awaited = {
        family.name: _mentioned(text, (family.name, *family.aliases))
        for family in PLANNED
        if family.name not in cards
    }
    best_card, best_coming = max(named.values(), default=0), max(awaited.values(), default=0)
    works = {work: _score(text, words) for work, words in WORKS.items()}
    work = max(works, key=lambda name: works[name]) if any(works.values()) else None
    task, notes = _task(text), []
    if task in NOT_YET:
        notes.append(NOT_YET[task])
    if max(best_card, best_coming):
        if best_card >= best_coming:
            chosen = [cards[name] for name, length in named.items() if length == best_card]
            kind: Kind | None = chosen[0].kind
            later: tuple[PlannedFamily, ...] = ()
        else:
            later = tuple(f for f in PLANNED if awaited.get(f.name) == best_coming)
            chosen, kind = [], later[0].kind
    else:
        scores = {kind: _score(text, {**_own_words(cards, kind), **words}) for kind, words in INTENTS.items()}
        top = max(scores.values())
        kind = max(scores.items(), key=lambda item: item[1])[0] if top else ALONE.get(task)
        if kind is None:
            return Route(None, task, notes=tuple(notes))
        fits = [card for card in cards.values() if card.kind == kind]
        chosen = [card for card in fits if work in card.tasks] or (
            []
            if work and work not in {t for c in fits for t in c.tasks} and kind != "understanding"
            else fits
        )
        later = tuple(
            f
            for f in PLANNED
            if f.kind == kind
            and f.name not in cards
            and (
                work in f.tasks or work is None or not any(work in g.tasks for g in PLANNED if g.kind == kind)
            )
        )
    sizes = {key for card in chosen for key in card.sizes}
    size = _size(text, sizes)
    if size is not None:
        chosen = [card for card in chosen if size in card.sizes]
    if task == "dreambooth":  # named or not, what has a recipe for it goes first
        able = [card for card in chosen if task in card.methods]
        if chosen and not able:
            notes.append(
                f"{chosen[0].name} has no recipe for DreamBooth; LoRA on the same pictures comes nearest."
            )
            task = "lora"
        chosen = able or chosen
    card = _preferred(chosen)
    others = tuple(other for other in chosen if other is not card)
    devices = _count(text)
    stages = way(card, size, task, devices, _benchmark(text)) if card else foreseen(later, task)
    return Route(kind, task, card, size, devices, others, later, tuple(notes), stages)


def _own_words(cards: Mapping[str, ModelCard], kind: Kind) -> dict[str, int]:
    """What the cards of a kind call themselves: a word weighs 1, a phrase 3."""
    return {
        word: 3 if " " in word or "-" in word else 1
        for card in cards.values()
        if card.kind == kind
        for word in card.keywords
    }


def _names(card: ModelCard) -> set[str]:
    """Everything people write for a card: its names, alone and with a size, and its hub names."""
    hubs = {size.hub.rpartition("/")[2].removesuffix("-Instruct") for size in card.sizes.values()}
    return {
        card.name,
        *card.aliases,
        *hubs,
        *(f"{name}-{key}" for name in (card.name, *card.aliases) for key in card.sizes),
    }


def _task(text: str) -> Task:
    for task, words in METHODS.items():
        if any(_holds(text, word) for word in words):
            return task
    return "sft"


def _benchmark(text: str) -> str:
    """The benchmark that a wish names: a key of FILES; the first when it names none."""
    return next((name for name in FILES if _holds(text, name)), next(iter(FILES)))


def _preferred(cards: list[ModelCard]) -> ModelCard | None:
    """The newest dense card: the name that sorts last among those with the fewest limits and no experts."""
    if not cards:
        return None
    return max(
        cards,
        key=lambda card: (not any(size.active for size in card.sizes.values()), -len(card.limits), card.name),
    )


def middle(card: ModelCard) -> str:
    """The size to begin with when none is named: of those that the documents name, the one nearest to 7 billion parameters."""
    return min(card.seeds or card.sizes, key=lambda key: (abs(card.sizes[key].parameters - 7), key))


def way(card: ModelCard, size: str | None, task: Task, devices: int | None = None, benchmark: str = "ai2d") -> tuple[Stage, ...]:  # fmt: skip
    """The way for a model that is here, each stage with its paths and its command; `benchmark` is a key of FILES."""
    key = size or middle(card)
    facts = card.sizes[key]
    if card.kind == "generation":
        return _way_of_generation(card, key, task, devices)
    name = f"{card.name}-{key}"
    method = task if task in ("sft", "lora", "pretrain") else "sft"
    count = devices or facts.devices
    run = f"{name}-{method}"
    weights = f"model_from_hf/{facts.hub.rpartition('/')[2]}"
    chat = '--image picture.jpg --prompt "What is this?"'
    nodes = (
        f"{-(-count // 8)} nodes: the same on each, with NNODES, NODE_RANK and MASTER_ADDR"
        if count > 8
        else ""
    )
    stages = [
        Stage("Check the machine", "polymodal doctor"),
        Stage("Fetch the weights", f"polymodal download {facts.hub} --to {weights}", writes=f"{weights}/", note="used as they are: no conversion"),
        Stage(
            "Prepare the data", "polymodal data convert data/llava_instruct_150k.json data/train.json --media-dir data/COCO2017/train2017",
            reads="data/llava_instruct_150k.json, data/COCO2017/train2017/", writes="data/train.json (MLLM JSON)",
            note="LLaVA, ShareGPT, Alpaca and OpenAI messages are also read without converting",
        ),
        Stage("Write the recipe", f"polymodal init {weights} --size {key} --task {method} --devices {count} --data data/train.json -o {run}.yaml", reads=f"{weights}/config.json", writes=f"{run}.yaml"),
        Stage("Check everything", f"polymodal check {run}.yaml --world {count}", reads=f"{run}.yaml, data/train.json"),
        Stage("Train", f"polymodal train {run}.yaml --nproc {min(count, 8)}", reads=f"{weights}/, data/train.json", writes=f"runs/{run}/", note=nodes),
    ]  # fmt: skip
    if task in NOT_YET:
        stages.append(Stage(task.upper(), note=NOT_YET[task], reads=f"runs/{run}/", here=False))
    stages += [
        Stage("Ask it", f"polymodal chat runs/{run} {chat}", reads=f"runs/{run}/"),
        Stage("Evaluate", f"polymodal evaluate runs/{run} {benchmark} --data {FILES[benchmark]} --nproc {min(count, 8)}", reads=f"runs/{run}/, {FILES[benchmark]}", writes=f"evaluations/{run}-{benchmark}/"),
        Stage("Export", f"polymodal export runs/{run} out/{run}" + (" --merge-lora" if method == "lora" else ""), reads=f"runs/{run}/", writes=f"out/{run}/ (hub format)"),
    ]  # fmt: skip
    if task == "convert":
        return (*stages[:2], _conversion(weights))
    if task == "export":
        return (stages[0], stages[-1])
    if task in ("chat", "evaluate"):
        return tuple(s for s in stages if s.title in ("Check the machine", "Fetch the weights")) + tuple(
            Stage(s.title, s.command.replace(f"runs/{run}", weights), s.reads.replace(f"runs/{run}", weights), s.writes.replace(run, weights.rpartition("/")[2]))
            for s in stages if s.title == ("Ask it" if task == "chat" else "Evaluate")
        )  # fmt: skip
    return tuple(stages)


def _conversion(weights: str, to: str = "mm") -> Stage:
    tree = f"ckpt/{to}_path/{weights.rpartition('/')[2]}"
    what, cut = ("Megatron-style", " --tp, --pp cut it;") if to == "mm" else ("a DCP directory", "")
    return Stage(
        "Convert", f"polymodal convert {weights} {tree} --to {to}", f"{weights}/", f"{tree}/ ({what})",
        f"for exchange with other systems only: training reads the hub's files.{cut} --to hf goes back",
    )  # fmt: skip


def _way_of_generation(card: ModelCard, key: str, task: Task, devices: int | None) -> tuple[Stage, ...]:
    """The same for a model that generates: its clips or pictures are encoded once, before training."""
    facts = card.sizes[key]
    method = task if task in ("sft", "lora", "pretrain", *card.methods) else "sft"
    count, run = devices or facts.devices, f"{card.name}-{key}-{method}"
    weights, nproc = f"model_from_hf/{facts.hub.rpartition('/')[2]}", min(count, 8)
    subject = method == "dreambooth"  # a directory of pictures, and captions in the recipe
    data = "pictures/subject" if subject else "dataset/data.json"
    looked = [] if subject else [Stage("Look at the data", f"polymodal data check {data}", reads="dataset/data.json (path, cap), dataset/videos/ or images/", note="json, jsonl, csv, parquet; data.txt of folder,annotation lines")]  # fmt: skip
    stages = [
        Stage("Check the machine", "polymodal doctor"),
        Stage("Fetch the weights", f"polymodal download {facts.hub} --to {weights}", writes=f"{weights}/", note="diffusers' layout, used as it is: no conversion"),
        *looked,
        Stage("Write the recipe", f"polymodal init {weights} --size {key} --task {method} --devices {count} --data {data} -o {run}.yaml", reads=f"{weights}/model_index.json", writes=f"{run}.yaml"),
        Stage("Extract features", f"polymodal encode {run}.yaml --nproc {nproc}", reads=f"{weights}/, dataset/", writes=f"runs/{run}/features/ (latents and text embeddings)", note="VAE and text encoder run once; the same command again makes only what is missing"),
        Stage("Train", f"polymodal train {run}.yaml --nproc {nproc}", reads=f"{weights}/, runs/{run}/features/", writes=f"runs/{run}/"),
    ]  # fmt: skip
    if task in NOT_YET:
        stages.append(Stage(task.upper(), note=NOT_YET[task], reads=f"runs/{run}/", here=False))
    merge = " --merge-lora" if method in ("lora", "dreambooth") else ""
    stages += [
        Stage("Sample", f'polymodal generate runs/{run} --prompt "a cat runs" --out samples/{run}', reads=f"runs/{run}/", writes=f"samples/{run}/ (mp4 or png, sheet.png, samples.json)"),
        Stage("Evaluate", f"polymodal evaluate runs/{run} generation --data prompts.jsonl --clip weights/clip --nproc {nproc}", reads=f"runs/{run}/, prompts.jsonl", writes=f"evaluations/{run}-generation/"),
        Stage("Export", f"polymodal export runs/{run} out/{run}{merge}", reads=f"runs/{run}/", writes=f"out/{run}/ (diffusers' layout)"),
    ]  # fmt: skip
    if task == "encode":
        return tuple(stages[: [stage.title for stage in stages].index("Extract features") + 1])
    if task == "convert":
        return (*stages[:2], _conversion(weights))
    if task == "export":
        return (stages[0], stages[-1])
    if task == "chat":
        command = f'polymodal generate {weights} --prompt "a cat runs" --out samples'
        return (*stages[:2], Stage("Sample", command, f"{weights}/", "samples/"))
    if task == "evaluate":
        command = f"polymodal evaluate {weights} generation --data prompts.jsonl --clip weights/clip"
        return (*stages[:2], Stage("Evaluate", command, f"{weights}/, prompts.jsonl", "evaluations/"))
    return tuple(stages)


def foreseen(families: tuple[PlannedFamily, ...], task: Task) -> tuple[Stage, ...]:
    """The way for families without a card: what the stages will be. None trains yet; what converts today is said."""
    if not families:
        return ()
    first = families[0]
    features = any(family.features for family in families)
    data = {
        "generation": "dataset/data.json + dataset/videos/ or images/ (path, cap, num_frames, fps, resolution)",
        "audio": "dataset/train.jsonl + dataset/wavs/ (audio, text)",
        "omni": "data/train.json + images/, videos/, audios/ (MLLM JSON)",
        "understanding": "data/train.json + images/ (MLLM JSON)",
    }[first.kind]
    name = first.name
    stages = [
        Stage("Check the machine", "polymodal doctor"),
        Stage(
            "Fetch the weights",
            "polymodal download HUB_ID --to weights/" + name,
            writes=f"weights/{name}/",
            note="works today for every hub repository",
        ),
    ]
    if first.converts:
        stages.append(_conversion(f"weights/{name}", first.converts))
    if task == "convert":
        return tuple(stages)
    stages += [
        Stage(
            "Prepare the data",
            reads=data,
            note="no command yet" if first.kind in ("generation", "audio") else "",
            here=first.kind in ("understanding", "omni"),
        ),
    ]
    if features:
        stages.append(
            Stage(
                "Extract features",
                reads=f"weights/{name}/, dataset/",
                writes="dataset/features/ (latents and text embeddings)",
                note="needed by these families only: VAE and text encoder run once, before training",
                here=False,
            )
        )
    train = f"{task.upper()} training" if task in NOT_YET else "Train"
    stages += [
        Stage(
            train,
            reads="dataset/features/" if features else data.split(" (")[0],
            writes=f"runs/{name}/",
            here=False,
        ),
        Stage(
            "Try it",
            reads=f"runs/{name}/",
            writes=f"runs/{name}/samples/" if first.kind == "generation" else "",
            here=False,
        ),
        Stage("Export", reads=f"runs/{name}/", writes=f"out/{name}/ (hub format)", here=False),
    ]
    return tuple(stages)
