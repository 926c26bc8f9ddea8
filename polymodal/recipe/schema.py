"""The recipe: one typed, documented, closed schema for everything a run does.

Never imports torch, so that `polymodal --help` stays fast. file.py reads the YAML and explains mistakes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, field_validator

from polymodal.core.errors import PolymodalError
from polymodal.core.redaction import redact_all
from polymodal.recipe import file
from polymodal.recipe.file import (
    NotNegative,
    NotNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
    Share,
    ShareBelowOne,
)
from polymodal.recipe.generation import Clip, Diffusion, Samples
from polymodal.recipe.parallel import Parallel


class Lora(Section):
    rank: Positive = 16
    """Rank r of the adapters."""
    alpha: PositiveFloat = 32
    """Scale numerator: the adapter's output is multiplied by alpha / rank."""
    dropout: ShareBelowOne = 0.0
    """Dropout on the adapter's input."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """`all-linear`, or name endings such as [q_proj, v_proj]. Stacked experts must be named ([gate_up_proj,
    down_proj]): peft adds their adapters to the whole stack in every forward, so recompute blocks and keep tp
    and ep at 1. Linear layers whose names peft takes for experts (GLM-4.5V's MLPs) have none."""
    towers: list[str] | None = None
    """Towers with adapters (`polymodal models NAME` lists names; default: language, or the denoiser)."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) (rank-stabilised LoRA)."""
    init: Literal["default", "gaussian"] = "default"
    """How A starts, uniform or normal; B is zero: the model is unchanged at step 0."""


class Model(Section):
    source: str
    """Directory of a hub checkpoint, or a hub id such as Qwen/Qwen2.5-VL-3B-Instruct."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random` builds weights from the config and the seed, for pretraining."""
    config: dict[str, Any] = {}
    """Overrides of the checkpoint's config.json by dotted name, e.g. {text_config.num_hidden_layers: 4}."""
    lora: Lora | None = None
    """Train adapters instead of the weights."""
    base: Literal["bf16", "int8", "fp8", "nf4"] = "bf16"
    """Frozen linear layers of the blocks under model.lora: whole, in the dtype of train.precision (bf16), or
    in 8, 8 or 4.25 bits a weight (docs/one_card.md)."""
    part: str | None = None
    """Two denoisers (Wan2.2 A14B): the trained one, transformer (high noise) or transformer_2 (low noise)."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """Attention kernel: auto = the fastest the device has; eager is for debugging."""
    experts: Literal["auto", "eager", "grouped_mm", "batched_mm"] = "auto"
    """How mixture-of-experts layers multiply."""
    trust_remote_code: bool = False
    """Run code from the checkpoint's repository while training; what opens a run later never does."""


class Attr(Section):
    """Names of the fields in the data file, for files that are not in a known format's own names."""

    messages: str | None = None
    """Column with the conversation (default: messages, then conversations)."""
    role: str | None = None
    """Key of the speaker in a message (default: role, then from)."""
    content: str | None = None
    """Key of the text in a message (default: content, then value)."""
    images: str | None = None
    """Column with image paths (default: images, then image)."""
    videos: str | None = None
    """Column with video paths (default: videos, then video)."""
    audios: str | None = None
    """Column with audio paths (default: audios, then audio; asr: also audio_filepath and file_name)."""
    system: str | None = None
    """Column with the system prompt (default: system)."""
    tools: str | None = None
    """Column with the tool list (default: tools)."""
    prompt: str | None = None
    """Alpaca: column with the instruction (default: instruction, then prompt)."""
    query: str | None = None
    """Alpaca: column with the input (default: input, then query)."""
    response: str | None = None
    """Alpaca: column with the answer (default: output, then response). asr: column with the transcription
    (default: text, sentence, transcription, transcript). grpo: column with the expected answer (default:
    ground_truth, solution, answer, then those)."""
    history: str | None = None
    """Alpaca: column with earlier turns (default: history)."""
    chosen: str | None = None
    """Preferences: column with the preferred answer (default: chosen)."""
    rejected: str | None = None
    """Preferences: column with the other answer, or a list of them (default: rejected)."""
    label: str | None = None
    """Preferences without pairs (kto): column with true or false (default: label, kto_tag)."""
    user: str | None = None
    """The user's name in role (default: user, human)."""
    assistant: str | None = None
    """The assistant's name in role (default: assistant, gpt)."""
    observation: str | None = None
    """The tool's name in role (default: tool, observation, tool_response)."""
    function: str | None = None
    """The name of a tool call in role (default: function_call, tool_call)."""
    objects: str | None = None
    """Column with boxes, for rows with <bbox>, <ref-object> or <objects> in the text (default: objects, then
    boxes)."""
    bbox_format: Literal["xyxy", "xywh", "cxcywh"] | None = None
    """Numbers of a box: corners, upper left corner and size (COCO), or centre and size (YOLO), where the row
    does not say (default: xyxy)."""
    bbox_type: Literal["real", "norm1", "norm1000"] | None = None
    """What they count, where the row does not say: pixels of the file, 0 to 1 or 0 to 1000 over the picture
    (default: real)."""


class Dataset(Section):
    path: str
    """File or directory: json, jsonl, parquet, csv, tsv, webdataset tar (globs allowed)."""
    name: str | None = None
    """Name in logs and reports (default: the file's name)."""
    format: Literal[
        "auto",
        "mllm",
        "sharegpt",
        "llava",
        "alpaca",
        "openai",
        "text",
        "caption",
        "asr",
        "preference",
        "prompt",
    ] = "auto"
    """How a record becomes messages; `text` is plain text for pretraining, `caption` a medium with what it
    shows, to be generated, `asr` audio with its transcription, `preference` answers that are compared,
    `prompt` a question that the model answers while it trains (grpo)."""
    media_dir: str | None = None
    """Directory that relative media paths start from (default: the file's own directory)."""
    weight: PositiveFloat | None = None
    """Share in the mix, relative to the other datasets; without it every record is used once an epoch."""
    repeat: PositiveFloat = 1.0
    """Times a record is used in an epoch; 0.25 uses a fixed quarter."""
    max_samples: Positive | None = None
    """Use only the first so many records (fewer in the file is no error)."""
    attr: Attr | None = None
    """Field names of this file; keys not given come from data.attr."""
    caption: Annotated[str, Field(min_length=1)] | None = None
    """Generation: caption of media whose record has none; path may then be a directory of media."""
    caption_prefix: str = ""
    """Generation: text in front of every caption, as it is (a trigger word with its comma and space)."""
    caption_suffix: str = ""
    """Generation: text behind every caption, as it is."""
    loss_weight: NotNegativeFloat = 1.0
    """Generation: factor of these samples' loss, in a mean over samples (DreamBooth: the prior's weight)."""
    reader: str | None = None
    """Own code as module:function: function(path) gives the records, a sequence of mappings, in place of
    opening path as a file (docs/extending.md)."""
    generate: NotNegative = 0
    """Picture models: pictures that path must hold; the untrained model draws missing ones from caption,
    once, before encoding."""


class Image(Section):
    min_pixels: Positive | None = None
    """Smaller images are enlarged to this many pixels (default: the checkpoint's)."""
    max_pixels: Positive | None = None
    """Larger images are reduced to this many pixels (default: the checkpoint's)."""


class Video(Section):
    fps: PositiveFloat = 2.0
    """Frames taken per second of video."""
    min_frames: Positive = 4
    """Frames taken at least."""
    max_frames: Positive = 128
    """Frames taken at most."""
    min_pixels: Positive | None = None
    """Smallest frame in pixels (default: the checkpoint's)."""
    max_pixels: Positive | None = None
    """Largest frame in pixels (default: the checkpoint's)."""
    sound: bool = False
    """Models that hear: learn videos with their sound, which every video must then have."""


class Speech(Section):
    language: str | None = None
    """Language of records that name none: a code (en, de, zh) or a name. Multilingual models need one."""
    task: Literal["transcribe", "translate"] = "transcribe"
    """What the text of records without a `task` is: the transcription, or an English translation."""


class Data(Section):
    datasets: list[Dataset] = []
    """What is learned from."""
    validation: list[Dataset] = []
    """What validation loss is measured on."""
    attr: Attr = Attr()
    """Field names for every dataset that has no own."""
    max_length: Annotated[int, Field(ge=16)] = 4096
    """Longest sample in tokens, media included."""
    overlong: Literal["drop", "split", "error"] = "drop"
    """Samples longer than max_length: drop, split between messages, or stop. Media are never cut."""
    pack: bool = True
    """Put several samples into one sequence of pack_length tokens; attention never crosses samples."""
    pack_length: Annotated[int, Field(ge=16)] | None = None
    """Tokens in a packed sequence (default: max_length)."""
    train_on: Literal["assistant", "all", "last"] = "assistant"
    """Tokens with loss: every assistant message, everything, or the last assistant message."""
    on_error: Literal["skip", "fail"] = "fail"
    """A broken record or file: report it and go on, or stop. It is never replaced by another."""
    image: Image = Image()
    """Sizes of pictures."""
    video: Video = Video()
    """Frames and sizes of videos."""
    speech: Speech = Speech()
    """Models that transcribe or speak: language (and task) of records that do not name them."""
    clip: Clip = Clip()
    """Sizes and lengths of what a generating model learns from."""
    encode: Literal["cached", "online"] = "cached"
    """Latents and embeddings of a generating model: read from data.features (`polymodal encode` made them),
    or made while training."""
    encoders: Literal["replicate", "shard", "offload"] = "replicate"
    """encode: online: frozen encoders are whole on every device; those of transformers are sharded over the
    ranks; or all stay on the CPU and are moved to the device for the beginning of each step."""
    features: str | None = None
    """Directory of encoded features (default: <run>/features)."""
    feature_files: Literal["safetensors", "pt"] = "safetensors"
    """Files that `polymodal encode` writes; pt = data.jsonl and features/*.pt. Both are read."""
    encode_batch: Positive = 1
    """Samples that `polymodal encode` gives the VAE at once; lowered by itself when memory runs out."""
    chat_template: str | None = None
    """File with a Jinja chat template (default: the checkpoint's)."""
    template_kwargs: dict[str, Any] = {}
    """Arguments for the chat template, e.g. {enable_thinking: false}."""
    special_tokens: Literal["auto", "text", "tokens"] = "auto"
    """Special tokens in the text of rows: auto learns them as ordinary text and refuses those that stand for
    media, text takes these too for ordinary text, tokens means the tokens."""
    shuffle: bool = True
    """Shuffle every epoch by (seed, epoch)."""
    window: Positive = 65536
    """Samples planned at a time."""
    workers: NotNegative = 2
    """Processes a rank that decode media."""
    prefetch: Positive = 2
    """Steps prepared ahead."""
    memory_budget: Positive | None = None
    """MiB of prepared samples a rank may hold (default: its share of 1/8 of the free memory, 1024-8192)."""
    cache_dir: str | None = None
    """Where indexes are kept (default: beside the data, or node-local when that is read-only or remote)."""


class LossGuard(Section):
    nan: Literal["skip", "stop"] = "stop"
    """A loss or gradient that is not a number: skip the step, or stop."""
    spike: Annotated[float, Field(gt=1)] | None = None
    """Skip the step when the gradient norm exceeds this multiple of its running mean."""
    max_skips: Positive = 10
    """Stop after so many skipped steps in a row."""


PREFERENCE = ("dpo", "kto", "diffusion_dpo")
"""Objectives that compare answers, or what was generated."""
LossName = Literal[
    "sigmoid",
    "robust",
    "hinge",
    "ipo",
    "sigmoid_norm",
    "apo_zero",
    "apo_down",
    "bco_pair",
    "simpo",
    "orpo",
    "sft",
]


class Preference(Section):
    loss: LossName | dict[LossName, PositiveFloat] | None = None
    """dpo: one loss, or a sum by name with weights, {sigmoid: 0.8, bco_pair: 0.2, sft: 1} (default: sigmoid).
    diffusion_dpo knows sigmoid and sft. docs/post_training.md has the formulas."""
    beta: PositiveFloat | None = None
    """Scale of the log-ratios: the larger, the closer to the reference (default: 0.1; simpo 2; diffusion_dpo,
    of errors: 2000, of flow matching 500)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """sigmoid and robust: share of pairs that are taken to be swapped."""
    gamma: NotNegativeFloat | None = None
    """simpo: margin that the preferred answer must win by (default: 1)."""
    desirable_weight: PositiveFloat = 1.0
    """kto: weight of desirable answers."""
    undesirable_weight: PositiveFloat = 1.0
    """kto: weight of the others."""
    reference: str | None = None
    """The reference model: a checkpoint, export or run; by default the model as it starts, which LoRA gives
    with its adapters off."""
    cache_reference: bool = False
    """Compute the reference's log-probabilities of all answers before the first step, and keep them on disk:
    no second model is held while it trains."""
    pairs: Literal["best_worst", "all", "adjacent"] = "best_worst"
    """Which answers of a row with more than two are compared: the best with the worst, each with each, or
    neighbours in order."""
    min_gap: NotNegativeFloat = 0.0
    """Least difference of scores of a pair, where rows have scores; equal scores are never a pair."""
    time_weight: Literal["none", "t"] = "none"
    """diffusion_dpo: t multiplies the errors by the model's timestep (0 to 1000 for most), so that beta is
    about a thousandth."""
    histogram: str | None = None
    """diffusion_dpo: JSON of how many samples have which score; pairs of rare scores weigh more."""
    weight_alpha: NotNegativeFloat = 0.0
    """diffusion_dpo: exponent of the weight by the histogram; 0 = all pairs weigh 1."""
    weight_beta: PositiveFloat | None = None
    """diffusion_dpo: probability of a score whose pairs weigh 1 (default: that of the fullest bin)."""


RULES = ("exact", "contains", "choice", "open", "numeric", "boxed", "format", "iou", "anls")
"""Rewards that need no code: the metrics of `polymodal evaluate`, and two of their own."""


class Reward(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.@-]+$")]
    """A rule: exact, contains, choice, open, numeric, boxed, format, iou, anls; or the name in logs of a
    function or url."""
    weight: float = 1.0
    """Factor in the sum of rewards; 0 = only logged; negative = a penalty."""
    function: str | None = None
    """Own code as module:function, which gets lists and returns a list of numbers (docs/post_training.md)."""
    url: Annotated[str, Field(pattern=r"^https?://")] | None = None
    """A scorer that is asked by HTTP POST."""
    timeout: PositiveFloat = 60.0
    """Seconds that a function, or one request, may take for a batch of answers."""
    retries: NotNegative = 2
    """url: further requests after one that failed."""
    tolerance: NotNegativeFloat = 0.0
    """numeric and boxed: how far a number may be off, as a share of the expected one."""
    pattern: str | None = None
    """format: regular expression that the whole answer must match (default: <think>...</think>, then
    <answer>...</answer>)."""


class Grpo(Section):
    group: Annotated[int, Field(ge=2)] = 8
    """Answers to each prompt."""
    max_new_tokens: Positive = 512
    """Longest answer in tokens."""
    temperature: PositiveFloat = 1.0
    """Of sampling, and of the log-probabilities that are learned."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the likeliest tokens of this probability together; below 1 the log-probabilities that are
    learned are still those over all tokens."""
    rollout_rows: Positive = 128
    """Answers a rank generates at once; memory of the cache of keys and values is proportional to it."""
    advantage: Literal["group", "centered", "rloo"] = "group"
    """group: (reward - mean) / standard deviation of the group; centered: reward - mean (Dr. GRPO); rloo:
    reward - mean of the others."""
    aggregate: Literal["token", "sequence", "constant"] = "token"
    """Mean over the tokens of the global batch; over answers, of means over their tokens; or over answers, of
    sums over their tokens divided by max_new_tokens (Dr. GRPO)."""
    ratio: Literal["token", "sequence"] = "token"
    """Ratio to the policy that sampled: of each token, or of an answer, the geometric mean of its tokens'
    (GSPO)."""
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """The ratio is clipped at 1 - clip_low."""
    clip_high: PositiveFloat | None = None
    """And at 1 + clip_high (default: clip_low; DAPO 0.28)."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Largest ratio that counts for answers worse than the mean (3 is usual; default: none)."""
    updates: Positive = 1
    """Optimizer updates on the answers of a step. With 1 the ratio is 1 and nothing is clipped."""
    kl: NotNegativeFloat = 0.0
    """Weight of the divergence from the reference; 0 = no reference."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where the divergence counts: a term of each token's loss, or a penalty on an answer's reward."""
    reference: str | None = None
    """The reference model: a checkpoint, export or run; by default the model as it starts, which LoRA gives
    with its adapters off."""
    filter: str | None = None
    """Leave out groups whose answers all have the same reward: `total`, or the name of one of train.rewards
    (DAPO: the accuracy, not a sum that shaping makes unequal)."""
    overlong_buffer: NotNegative = 0
    """DAPO: the reward falls linearly by up to 1 over the last so many of max_new_tokens."""
    mask_truncated: bool = False
    """Answers that max_new_tokens cut are not learned from; their rewards still count in their group."""
    log_every: NotNegative = 10
    """Steps between answers that are written to <run>/rollouts.jsonl; 0 = never."""


class Train(Section):
    seed: int = 42
    """Seed of everything random."""
    steps: Positive | None = None
    """Optimizer steps; without it, epochs decides."""
    epochs: PositiveFloat = 1.0
    """Passes over the data, when steps is not given."""
    global_batch_size: Positive = 8
    """Packed sequences a step over all ranks (samples, when data.pack is false, and of generating models)."""
    micro_batch_size: Positive = 1
    """Samples in one forward when data.pack is false, and of generating models (there: of one size)."""
    precision: Literal["fp32", "bf16", "fp16", "pure_bf16"] = "bf16"
    """Arithmetic: bf16, fp16 keep float32 master weights, pure_bf16 none; fp16 scales the loss itself."""
    loss: Literal["per_token", "per_sample", "per_micro_batch"] = "per_token"
    """Weight of a token: 1, 1 / tokens of its sample, or 1 / tokens of its micro-batch."""
    router_aux_loss: NotNegativeFloat | None = None
    """Weight of the experts' balance loss (default: the checkpoint's config)."""
    diffusion: Diffusion = Diffusion()
    """Noise levels, weighting and condition dropping of generating models."""
    objective: str | None = None
    """What is learned in place of the model's own loss: dpo (preferences between answers), kto (answers that
    are good or bad), diffusion_dpo (preferences between pictures or clips of a caption), grpo (rewards of the
    model's own answers), or own code as module:Class (docs/extending.md)."""
    preference: Preference = Preference()
    """objective dpo, kto and diffusion_dpo: loss, reference, pairs."""
    grpo: Grpo = Grpo()
    """objective grpo: answers, advantages, loss, reference."""
    rewards: list[Reward] = []
    """objective grpo: what an answer is worth, a sum over these."""
    callbacks: list[str] = []
    """Own code as module:Class, called at the begin and end of training, after steps, checkpoints and
    validation (docs/extending.md)."""
    freeze: list[str] = []
    """Towers (by the card's names) or parameter patterns that are not trained."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of the weights, kept in float32."""
    deterministic: bool = False
    """Deterministic kernels; slower."""
    guard: LossGuard = LossGuard()
    """What to do with a loss that is not a number, and with spikes."""


class Schedule(Section):
    name: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape of the learning rate after warm-up; wsd = constant, then a linear decay at the end."""
    warmup: NotNegativeFloat = 0.03
    """Warm-up: steps when >= 1, else share of all steps."""
    min_ratio: Share = 0.0
    """Last learning rate as a share of the peak."""
    decay: Share = 0.1
    """wsd: share of all steps spent decaying."""


class Group(Section):
    match: str
    """Tower name of the card, or a parameter pattern (shell wildcards)."""
    lr: NotNegativeFloat | None = None
    """Peak learning rate of these parameters."""
    lr_scale: NotNegativeFloat | None = None
    """Or: multiple of optim.lr."""
    weight_decay: NotNegativeFloat | None = None
    """Weight decay of these parameters."""


def _class_name(name: str) -> str:
    if ":" not in name:
        raise ValueError("no module:Class")
    return name


class Optim(Section):
    name: Literal["adamw", "muon"] | Annotated[str, AfterValidator(_class_name)] = "adamw"
    """adamw; muon, which takes the blocks' 2-D weights and leaves the rest to adamw; or an optimizer's class
    as module:Class, such as torch.optim:NAdam, that keeps tensors of its parameters (docs/one_card.md)."""
    arguments: dict[str, Any] = {}
    """Keyword arguments of a module:Class; lr and weight_decay are those of optim."""
    lr: NotNegativeFloat = 1e-5
    """Peak learning rate."""
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.95)
    """AdamW: decay of the running means of the gradient and of its square."""
    eps: PositiveFloat = 1e-8
    """AdamW: added to the denominator."""
    weight_decay: NotNegativeFloat = 0.0
    """Decoupled weight decay; biases and norms never decay."""
    muon_momentum: ShareBelowOne = 0.95
    """Muon: decay of the running mean of the gradient."""
    muon_steps: Positive = 5
    """Newton-Schulz iterations."""
    clip_norm: PositiveFloat | None = 1.0
    """Largest gradient norm; null = no clipping."""
    schedule: Schedule = Schedule()
    """How the learning rate goes over the run."""
    groups: list[Group] = []
    """Own learning rate and weight decay by tower or pattern; the first match counts."""


class Checkpoint(Section):
    dir: str = "runs/{name}"
    """Directory of the run: checkpoints, metrics, resolved recipe. {name} stands for the run's name."""
    every: NotNegative = 500
    """Steps between checkpoints; 0 = only at the end."""
    keep: Positive = 2
    """Newest checkpoints kept."""
    save: Literal["full", "weights"] = "full"
    """`weights` leaves out optimizer and data state: half the disk or less, cannot resume."""
    asynchronous: bool = True
    """Write in the background while training goes on."""
    resume: Literal["auto", "never"] | str = "auto"
    """auto = the run's newest checkpoint if there is one; never; or a checkpoint's directory."""
    init_from: str | None = None
    """Start from the weights of another run, checkpoint or export, with a fresh optimizer; or of a
    Megatron-style tree or DCP directory of the same model, cut at any TP and PP."""
    export: bool = False
    """Export to the hub format at the end, into <dir>/export."""

    @field_validator("dir")
    @classmethod
    def _only_name(cls, value: str) -> str:
        try:
            fields = [field for field in Formatter().parse(value) if field[1] is not None]
        except ValueError:
            fields = [("", "?", "", None)]
        if any(field[1:] != ("name", "", None) for field in fields):
            raise ValueError("the only placeholder is {name}; write other braces twice")
        return value


class Profile(Section):
    start: Positive = 10
    """First step traced."""
    steps: Annotated[int, Field(gt=0, le=1000)] = 2
    """Steps traced, at most 1,000: a trace is kept in memory until it is written."""
    ranks: list[int] = [0]
    """Ranks that write a trace."""
    memory: bool = False
    """Also write a memory snapshot (devices that have one)."""
    stacks: bool = False
    """Record Python stacks and shapes."""


class Monitor(Section):
    every: Positive = 1
    """Steps between lines of the log."""
    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = ["tensorboard"]
    """Where metrics go besides metrics.jsonl."""
    project: str = "polymodal"
    """Project name for wandb and mlflow."""
    profile: Profile | None = None
    """Trace a range of steps; traces open in Perfetto."""


class Evaluate(Section):
    every: NotNegative = 0
    """Steps between validation losses; 0 = only at the end when data.validation is given."""
    batches: Positive | None = None
    """Global batches of validation data used each time (default: all)."""
    samples: Samples = Samples()
    """What a generating model samples while it trains."""


class Device(Section):
    kind: Literal["auto", "cpu", "cuda", "npu"] = "auto"
    """Which accelerator; auto takes what is there."""
    threads: Positive | None = None
    """CPU threads a process (default: cores / local processes)."""
    env: dict[str, str | int | bool] = {}
    """Environment variables set before torch starts; their values are checked (`polymodal doctor --env`)."""


class Recipe(Section):
    """Everything a run does. See each section's keys."""

    name: str = "run"
    """Name of the run."""
    model: Model
    """What is trained."""
    data: Data = Data()
    """Datasets and how they become samples."""
    parallel: Parallel = Parallel()
    """How the work is spread over processes."""
    train: Train = Train()
    """Length, batch, precision, loss."""
    optim: Optim = Optim()
    """Optimizer, learning rates, clipping."""
    checkpoint: Checkpoint = Checkpoint()
    """What is saved, and what a run starts from."""
    monitor: Monitor = Monitor()
    """Logs, trackers and traces."""
    evaluate: Evaluate = Evaluate()
    """Validation loss during training."""
    device: Device = Device()
    """Accelerator, threads, environment variables."""

    @property
    def run_dir(self) -> Path:
        """Raises PolymodalError for a name that leads elsewhere than checkpoint.dir says."""
        name = Path(self.name)
        leads_out = name.is_absolute() or ".." in name.parts or "\0" in self.name
        if leads_out and "{name}" in self.checkpoint.dir:
            raise PolymodalError(
                f"name = {self.name!r} cannot be a part of checkpoint.dir = {self.checkpoint.dir}.",
                "Take a name without .. and without / in front, or write the directory in checkpoint.dir.",
            )
        return Path(self.checkpoint.dir.format(name=self.name))


def load(path: str | os.PathLike, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe file, apply `a.b=c` overrides, validate.

    Relative paths in the recipe stay relative to the working directory, as on a command line.
    Raises PolymodalError with file, line and the nearest known name.
    """
    path = Path(path)
    data, lines = file.read(path)
    for text in overrides:
        file.override(data, lines, text)
    return validate(data, lines, path)


def validate(data: dict, lines: file.Lines | None = None, path: Path | None = None) -> Recipe:
    """A plain mapping -> Recipe. Raises PolymodalError with one sentence for each mistake."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise file.explain(error, Recipe, lines or {}, path) from None


def plain(recipe: Recipe) -> dict[str, Any]:
    """The whole recipe as plain data to be stored or shown: secrets in it (of URLs, of the environment) are
    ***."""
    return redact_all(recipe.model_dump(mode="json"))


def dump(recipe: Recipe) -> str:
    """`plain` as YAML; `load` of it gives the same recipe."""
    return file.write(plain(recipe))


def changed(before: Mapping[str, Any], recipe: Recipe, keys: Sequence[str]) -> list[str]:
    """The dotted keys below `keys` that differ between a recipe of an earlier run (as JSON) and this one."""
    now = plain(recipe)

    def differing(old: Any, new: Any, name: str) -> list[str]:
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            return [key for k in {**old, **new} for key in differing(old.get(k), new.get(k), f"{name}.{k}")]
        return [name] if old != new else []

    def at(values: Any, key: str) -> Any:
        for part in key.split("."):
            values = values.get(part) if isinstance(values, Mapping) else None
        return values

    return [name for key in keys for name in differing(at(before, key), at(now, key), key)]


def all_keys() -> list[str]:
    """Every dotted key of the schema."""
    return file.keys(Recipe)


def json_schema() -> dict:
    """JSON schema of a recipe, with every key's documentation."""
    out = Recipe.model_json_schema()
    base = {
        "description": "Recipe(s) that this one starts from, relative to this file.",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    }
    out["properties"] = {"base": base, **out["properties"]}
    return out
