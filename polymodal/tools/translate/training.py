"""Megatron-style command lines with their data, model and tool files as a recipe (MindSpeed-MM and its kin).

Every default that differs from the recipe's is written, so that the run means the same: linear decay without
warm-up, betas 0.9 and 0.999, weight decay 0.01, seed 1234, the mean of a micro-batch's tokens as the loss,
no packing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polymodal.core.errors import PolymodalError
from polymodal.tools.translate import data, model
from polymodal.tools.translate.launch import Launch, scalar, typed, write_environment
from polymodal.tools.translate.ledger import TABLES, Given, Kind, Origin, read_config

PREFERENCES = ("posttrain_qwen2vl_dpo.py", "posttrain_sora_dpo.py")
SCHEDULES = {"constant": "constant", "linear": "linear", "cosine": "cosine", "WSD": "wsd"}
TARGETS = {  # adapters: names of modules there -> endings of names here, by tower or denoiser
    "linear_qkv": ["q_proj", "k_proj", "v_proj", "qkv"],
    "linear_proj": ["o_proj", "proj"],
    "linear_fc1": ["gate_proj", "up_proj", "fc1", "linear_fc1"],
    "linear_fc2": ["down_proj", "fc2", "linear_fc2"],
    "proj_q": ["to_q"],
    "proj_k": ["to_k"],
    "proj_v": ["to_v"],
    "proj_qkv": ["to_q", "to_k", "to_v"],
    "proj_out": ["to_out.0"],
    "ffn.0": ["ffn.net.0.proj"],
    "ffn.2": ["ffn.net.2"],
}
LOSSES = {
    "default": "per_micro_batch",
    "raw": "per_micro_batch",
    "per_sample_loss": "per_sample",
    "per_token_loss": "per_token",
}
TOWERS = {"text_decoder": "language", "vision_encoder": "vision", "vision_projector": "projector"}


def translate(launch: Launch) -> None:
    """Fill the ledger of a training launch."""
    if launch.kind == "train-transformers":
        _flatten(launch)
    files = _files(launch)
    if launch.kind == "encode":
        _encode(launch, files)
        return
    generates = launch.kind == "train-generation"
    sizes = _parallel(launch, files)
    _batch(launch, sizes)
    _optimizer(launch)
    if launch.kind == "train-speech":
        data.speech(launch, files["data"])
        model.source(launch, files["model"], files["data"])
    elif generates:
        data.clips(launch, files["data"])
        model.denoiser(launch, files["model"], files["data"])
    else:
        data.chat(launch, files["data"])
        model.chat(launch, files["model"], files["data"], sizes)
    if launch.entry in PREFERENCES:
        _preferences(launch, files["model"] if generates else None)
    _loss(launch, files["model"], generates)
    _checkpoints(launch, generates)
    _adapters(launch, generates)
    _monitor(launch, files["tool"])
    _mapped(launch)
    write_environment(launch)
    _rest(launch, files)


def _encode(launch: Launch, files: Mapping[str, Given]) -> None:
    """A recipe for `polymodal encode`: data, sizes and where features go."""
    ledger = launch.ledger
    data.clips(launch, files["data"], encoding=True)
    model.denoiser(launch, files["model"], files["data"], encoding=True)
    features = files["tool"].take("sorafeature.save_path", "./sora_features")
    files["tool"].take("profile")
    ledger.write("data.features", launch.path(str(features)), files["tool"].origin("sorafeature.save_path"))
    origin = Origin("the files of features", launch.file)
    ledger.default("data.feature_files", "pt", origin, "what their readers want; both are read here")
    ledger.write("data.encode_batch", launch.number("micro-batch-size", 1), launch.where("micro-batch-size"))
    for name in list(launch.flags.values):
        if name not in launch.flags.asked and name not in ("num-workers", "seed"):
            launch.flags.take(name)
            ledger.note(
                "no effect", launch.where(name), launch.flags.values[name], "encoding has no such setting"
            )
    _mapped(launch)
    _rest(launch, files)


def _files(launch: Launch) -> dict[str, Given]:
    out = {}
    kinds = {"data": data_kind, "model": _model_kind, "tool": lambda _launch, _values: "tool"}
    for name, kind in kinds.items():
        path = launch.flags.take(f"mm-{name}")
        values = read_config(launch.open(path)) if isinstance(path, str) else {}
        if isinstance(path, str) and path.endswith((".yaml", ".yml")):
            values = values.get(name, values)
        if f"mm-{name}" in launch.flags.values and isinstance(path, str):
            launch.ledger.note("mapped", launch.where(f"mm-{name}"), path, "its keys have rows of their own")
        out[name] = Given(kind(launch, values), str(path or launch.file), values)
    return out


def data_kind(launch: Launch, values: Mapping[str, Any]) -> str:
    """The section of the tables for a data file. Raises PolymodalError for kinds that are not read."""
    kind = (values.get("dataset_param") or {}).get("dataset_type")
    kinds = {
        "huggingface": "chat_data",
        "multimodal": "chat_data",
        "deepseekvl2": "chat_data",
        "t2v": "clip_data",
        "i2v": "clip_data",
        "feature": "feature_data",
        "audio": "audio_data",
    }
    if values and kind not in kinds:
        raise PolymodalError(
            f"{launch.file}: the data file has dataset_type {kind!r}, which is not read here.",
            f"Read are {', '.join(kinds)}.",
        )
    return kinds.get(kind, "chat_data")


def _model_kind(launch: Launch, values: Mapping[str, Any]) -> str:
    kinds = {"train-generation": "denoiser_model", "encode": "denoiser_model", "train-speech": "speech_model"}
    return kinds.get(launch.kind, "chat_model")


def _flatten(launch: Launch) -> None:
    """pretrain_transformers.py x.yaml: gpt_args, lora_args, data and model of one file."""
    name = next((w.text for w in launch.positional if w.text.endswith((".yaml", ".yml"))), None)
    if name is None:
        return
    whole = read_config(launch.open(name))
    flags = dict[str, Any]()

    def add(values: Mapping[str, Any]) -> None:
        for key, value in values.items():
            if isinstance(value, Mapping):
                add(value)
            elif value is not False and value is not None:
                flags[key.replace("_", "-")] = value

    for section in ("gpt_args", "lora_args"):
        add(whole.get(section) or {})
    launch.flags.files = dict.fromkeys(flags.keys() - launch.flags.values.keys(), name)
    launch.flags.values = {**flags, **launch.flags.values, "mm-data": name, "mm-model": name}
    if "MM_TOOL_PATH" in whole:
        launch.flags.values["mm-tool"] = whole["MM_TOOL_PATH"]
    paths = ("HF_MODEL_LOAD_PATH", "MM_MODEL_LOAD_PATH", "FSDP2_PATH", "SAVE_PATH", "MM_TOOL_PATH")
    known = (*paths, "gpt_args", "lora_args", "data", "model", "tool")
    for key in whole.keys() - set(known):
        launch.ledger.note(
            "unknown", Origin(key, name), whole[key], f"a section of such a file is one of {known}"
        )


def _parallel(launch: Launch, files: Mapping[str, Given]) -> dict[str, int]:
    """Sizes of the layout; writes `parallel`."""
    flags, ledger = launch.flags, launch.ledger
    tp, pp, cp = (
        launch.number(f"{name}-parallel-size", 1) for name in ("tensor-model", "pipeline-model", "context")
    )
    for name, size, key in (("tensor-model", tp, "tp"), ("pipeline-model", pp, "pp"), ("context", cp, "cp")):
        if flags.has(f"{name}-parallel-size"):
            ledger.write(f"parallel.{key}", size, launch.where(f"{name}-parallel-size"))
    if launch.world % (tp * pp * cp):
        raise PolymodalError(
            f"{launch.file}: {launch.world} processes are no multiple of tp {tp} x pp {pp} x cp {cp}.",
            "Correct the sizes, or name the nodes: --nodes N.",
        )
    dp = launch.world // (tp * pp * cp)
    if flags.has("expert-model-parallel-size"):
        ledger.write(
            "parallel.ep",
            launch.number("expert-model-parallel-size"),
            launch.where("expert-model-parallel-size"),
        )
    virtual = launch.number("virtual-pipeline-model-parallel-size", 1)
    if flags.has("virtual-pipeline-model-parallel-size"):
        origin = launch.where("virtual-pipeline-model-parallel-size")
        if virtual > 1:
            ledger.write("parallel.pp_virtual", virtual, origin, why="stages a rank")
            ledger.write("parallel.pp_schedule", "Interleaved1F1B", origin, virtual)
        else:
            ledger.note("no effect", origin, virtual, "one stage a rank")
    _context(launch, cp)
    sequence = flags.take("sequence-parallel")
    if tp > 1:
        origin = launch.where("sequence-parallel")
        if sequence:
            ledger.write("parallel.sp", True, origin)
        else:
            ledger.default("parallel.sp", False, origin, "on by default here with tp > 1")
    elif sequence:
        ledger.note("no effect", launch.where("sequence-parallel"), True, "tp is 1")
    sharding(launch, dp, cp)
    _recompute(launch, files["model"], pp * virtual)
    if any(flags.take(n) for n in ("encoder-dp-balance", "use-data-balance", "use-image-mbs-data-balance")):
        ledger.write("parallel.balance_media", True, launch.where("use-data-balance"))
    if flags.take("swap-attention"):
        _offload(launch, "activations", launch.where("swap-attention"))
    return {"tp": tp, "pp": pp, "cp": cp, "dp": dp, "virtual": virtual}


def _context(launch: Launch, cp: int) -> None:
    algorithm = launch.flags.take("context-parallel-algo")
    if algorithm is None:
        return
    origin = launch.where("context-parallel-algo")
    ulysses = {"ulysses_cp_algo": cp, "megatron_cp_algo": 1, "hybrid_cp_algo": 0}.get(algorithm)
    if cp == 1:
        launch.ledger.note("no effect", origin, algorithm, "cp is 1")
    elif ulysses is None:
        launch.ledger.note(
            "unsupported", origin, algorithm, "known are ulysses_cp_algo, megatron_cp_algo, hybrid_cp_algo"
        )
    else:
        degree = ulysses or launch.number("ulysses-degree-in-cp")
        launch.ledger.write("parallel.ulysses", degree, origin, algorithm)


def sharding(launch: Launch, dp: int, cp: int) -> None:
    """zero, dp_shard and dp_replicate, by the flags and the file that they name."""
    flags, ledger = launch.flags, launch.ledger
    ranks = dp * cp
    if flags.take("use-torch-fsdp2"):
        path = flags.take("fsdp2-config-path")
        plan = Given("fsdp2", str(path), read_config(launch.open(str(path))) if path else {})
        ledger.write("parallel.zero", 3, launch.where("use-torch-fsdp2"), True)
        if flags.take("use-distributed-optimizer"):
            ledger.note(
                "no effect", launch.where("use-distributed-optimizer"), True, "FSDP2 shards it already"
            )
        shards(launch, plan.take("sharding_size", 1), plan.origin("sharding_size"), dp, cp)
        prefetch = [plan.take(f"num_to_{way}_prefetch") for way in ("forward", "backward")]
        if any(each is not None for each in prefetch):
            most = max(int(each or 0) for each in prefetch)
            ledger.write(
                "parallel.prefetch",
                most,
                plan.origin("num_to_*_prefetch"),
                prefetch,
                "one number here: the larger",
            )
        reshard = plan.take("reshard_after_forward")
        if reshard is False:
            ledger.write("parallel.reshard_after_forward", False, plan.origin("reshard_after_forward"))
        if plan.take("offload_to_cpu"):
            _offload(launch, "parameters", plan.origin("offload_to_cpu"))
        if plan.take("expert_parallel_size", 1) not in (1, None):
            ledger.write(
                "parallel.ep", plan.take("expert_parallel_size"), plan.origin("expert_parallel_size")
            )
        _precision_of(launch, plan)
        modules = plan.take("recompute_modules")
        if modules:
            ledger.write("parallel.recompute", "full", plan.origin("recompute_modules"), modules)
        ignored = plan.take("ignored_modules") or []
        kept = [
            tower
            for tower in ("vision", "projector")
            if any("image_encoder" in str(name) for name in ignored)
        ]
        if kept:
            ledger.write("parallel.replicate", kept, plan.origin("ignored_modules"), ignored)
        plan.report_rest(ledger)
    elif flags.take("layerzero"):
        path = flags.take("layerzero-config")
        plan = Given("layerzero", str(path), read_config(launch.open(str(path))) if path else {})
        ledger.write("parallel.zero", 3, launch.where("layerzero"), True)
        size = plan.take("zero3_size", ranks)
        replicas = max(1, ranks // int(size))
        ledger.write("parallel.dp_shard", max(1, int(size) // cp), plan.origin("zero3_size"), size)
        if replicas > 1:
            ledger.write("parallel.dp_replicate", replicas, plan.origin("zero3_size"), size)
        if flags.take("use-distributed-optimizer"):
            ledger.note("no effect", launch.where("use-distributed-optimizer"), True, "sharded already")
        _precision_of(launch, plan)
        plan.report_rest(ledger)
    elif flags.take("use-distributed-optimizer"):
        ledger.write("parallel.zero", 1, launch.where("use-distributed-optimizer"), True)
    elif dp > 1:
        origin = launch.where("use-distributed-optimizer")
        ledger.default(
            "parallel.dp_replicate", dp, origin, "plain data parallelism: every rank holds the model"
        )
        ledger.default("parallel.dp_shard", 1, origin)


def shards(launch: Launch, size: Any, origin: Origin, dp: int, cp: int) -> None:
    """dp_shard and dp_replicate of an FSDP2 sharding size, which counts context-parallel ranks too."""
    ranks = dp * cp
    if size in ("auto", None) or int(size) == ranks:
        launch.ledger.write("parallel.dp_shard", -1, origin, size)
    elif ranks % int(size) or int(size) % cp:
        launch.ledger.note("unsupported", origin, size, f"it does not divide the {ranks} ranks of dp x cp")
    else:
        launch.ledger.write("parallel.dp_shard", int(size) // cp, origin, size)
        launch.ledger.write("parallel.dp_replicate", ranks // int(size), origin, size)


def _precision_of(launch: Launch, plan: Given) -> None:
    dtype = plan.take("param_dtype")
    if dtype in ("bf16", "fp16", "fp32"):
        launch.ledger.write("train.precision", dtype, plan.origin("param_dtype"), why="float32 masters")
    elif dtype is not None:
        launch.ledger.note("unsupported", plan.origin("param_dtype"), dtype, "known are bf16, fp16 and fp32")


def _offload(launch: Launch, what: str, origin: Origin) -> None:
    before = launch.ledger.get("parallel.offload", [])
    if what not in before:
        launch.ledger.write("parallel.offload", [*before, what], origin, True)


def _recompute(launch: Launch, model_file: Given, stages: int) -> None:
    flags, ledger = launch.flags, launch.ledger
    granularity = flags.take("recompute-granularity")
    method, count = flags.take("recompute-method"), flags.take("recompute-num-layers")
    origin = launch.where("recompute-granularity")
    if flags.take("recompute-skip-core-attention"):
        ledger.write("parallel.recompute", "selective", launch.where("recompute-skip-core-attention"), True)
        ledger.write(
            "parallel.recompute_keep", ["attention"], launch.where("recompute-skip-core-attention"), True
        )
        if flags.take("recompute-num-layers-skip-core-attention") is not None:
            name = "recompute-num-layers-skip-core-attention"
            ledger.note(
                "no effect",
                launch.where(name),
                flags.values[name],
                "all recomputed blocks keep attention here",
            )
        return
    if granularity is None:
        return
    if granularity == "selective":
        ledger.write("parallel.recompute", "selective", origin)
        ledger.write("parallel.recompute_keep", ["matmul", "experts", "exchange"], origin, granularity)
        return
    layers = model.layers_of(model_file)
    each = int(scalar(count, launch.where("recompute-num-layers"), int)) if count is not None else 0
    why = (
        "all blocks; the number only says how many share one stored input there"
        if method == "uniform"
        else ""
    )
    if method == "block" and each == 0:
        ledger.write("parallel.recompute", "none", launch.where("recompute-num-layers"), each)
        return
    ledger.write("parallel.recompute", "full", origin, granularity, why)
    if method is not None:
        ledger.note("mapped", launch.where("recompute-method"), method, "with recompute-num-layers")
    if method == "block" and layers and each * stages < layers:
        why = "" if stages == 1 else f"{each} of each of {stages} stages there: nearly the same blocks"
        ledger.write(
            "parallel.recompute_first", each * stages, launch.where("recompute-num-layers"), each, why
        )
    elif count is not None:
        ledger.note("no effect", launch.where("recompute-num-layers"), each, "all blocks of a stage")


def _batch(launch: Launch, sizes: Mapping[str, int]) -> None:
    ledger, dp = launch.ledger, sizes["dp"]
    micro = launch.number("micro-batch-size", 1)
    ledger.write("train.micro_batch_size", micro, launch.where("micro-batch-size"))
    whole = launch.number("global-batch-size", micro * dp)
    if whole % (micro * dp):
        raise PolymodalError(
            f"{launch.where('global-batch-size').place}: the global batch size {whole} is no multiple of "
            f"micro-batch-size {micro} x {dp} data-parallel ranks.",
            f"{max(1, whole // (micro * dp)) * micro * dp} is.",
        )
    accumulation = whole // (micro * dp)
    origin = launch.where("global-batch-size")
    how = f"{micro} x {accumulation} accumulated x {dp} ranks of {launch.world} processes"
    if launch.flags.has("global-batch-size"):
        ledger.write("train.global_batch_size", whole, origin, why=how)
    else:
        ledger.default("train.global_batch_size", whole, origin, how)
    if "parallel.dp_shard" not in ledger.values:
        ledger.default(
            "parallel.dp_shard", -1, Origin("the data-parallel size", launch.file), "valid for any world"
        )
    if launch.flags.has("train-iters"):
        ledger.write("train.steps", launch.number("train-iters"), launch.where("train-iters"))
    if launch.flags.has("seed"):
        ledger.write("train.seed", launch.number("seed"), launch.where("seed"))
    else:
        ledger.default("train.seed", 1234, launch.where("seed"), "the order of samples never agrees")
    for flag, precision in (("bf16", "bf16"), ("fp16", "fp16"), ("downcast-to-bf16", "bf16")):
        if launch.flags.take(flag):
            ledger.write("train.precision", precision, launch.where(flag), True)
            break
    else:
        if "train.precision" not in ledger.values:
            ledger.default("train.precision", "fp32", launch.where("bf16"))


def _optimizer(launch: Launch) -> None:
    flags, ledger = launch.flags, launch.ledger
    style = flags.take("lr-decay-style")
    origin = launch.where("lr-decay-style")
    if style is None:
        ledger.default("optim.schedule.name", "linear", origin)
    elif style in SCHEDULES:
        ledger.write("optim.schedule.name", SCHEDULES[style], origin)
    else:
        ledger.note("unsupported", origin, style, f"known are {', '.join(SCHEDULES)}")
    share, steps = flags.take("lr-warmup-fraction"), flags.take("lr-warmup-iters")
    given = "lr-warmup-fraction" if share is not None else "lr-warmup-iters"
    if share is None and steps is None:
        ledger.default("optim.schedule.warmup", 0, launch.where(given))
    else:
        warmup = typed(share if share is not None else steps)
        ledger.write("optim.schedule.warmup", warmup, launch.where(given))
    first = flags.take("lr-warmup-init")
    if first is not None:
        unused = (
            ledger.get("optim.schedule.warmup") == 0 or scalar(first, launch.where("lr-warmup-init")) == 0
        )
        kind: Kind = "no effect" if unused else "unsupported"
        ledger.note(kind, launch.where("lr-warmup-init"), first, "the warm-up begins at 0 here")
    lr, least = flags.values.get("lr"), flags.take("min-lr")
    if least is not None:
        origin = launch.where("min-lr")
        if ledger.get("optim.schedule.name") == "constant":
            ledger.note("no effect", origin, least, "a constant rate does not fall")
        elif lr is not None and (peak := scalar(lr, launch.where("lr"))) > 0:
            ratio = float(f"{scalar(least, origin) / peak:.6g}")
            ledger.write("optim.schedule.min_ratio", ratio, origin, least, "min-lr / lr")
    betas = [
        scalar(flags.take(f"adam-beta{i}", d), launch.where(f"adam-beta{i}"))
        for i, d in ((1, 0.9), (2, 0.999))
    ]
    origin = launch.where("adam-beta1")
    if flags.has("adam-beta1") or flags.has("adam-beta2"):
        ledger.write("optim.betas", betas, origin)
    else:
        ledger.default("optim.betas", betas, origin)
    if not flags.has("weight-decay"):
        ledger.default("optim.weight_decay", 0.01, launch.where("weight-decay"))
    clip = flags.take("clip-grad")
    if clip is not None:
        value = scalar(clip, launch.where("clip-grad"))
        if value == 0:
            ledger.write("optim.clip_norm", None, launch.where("clip-grad"), clip, "0 is off")
        else:
            ledger.write("optim.clip_norm", value, launch.where("clip-grad"))
    name = flags.take("optimizer")
    if name in ("adam", "muon"):
        ledger.write("optim.name", {"adam": "adamw"}.get(name, name), launch.where("optimizer"), name)
    elif name is not None:
        ledger.note("unsupported", launch.where("optimizer"), name, "known are adam and muon")
    groups = list[dict[str, Any]]()
    for flag, change in (
        ("weight-decay-exclude-modules", {"weight_decay": 0}),
        ("lr-scale-modules", {"lr_scale": float(flags.take("lr-mult", 1.0))}),
    ):
        words = flags.take(flag)
        for word in [words] if isinstance(words, str) else words or []:
            groups.append({"match": f"*{word}*", **change})
            ledger.write(
                "optim.groups", groups, launch.where(flag), word, "patterns tell upper from lower case here"
            )


def _loss(launch: Launch, model_file: Given, generates: bool) -> None:
    flags, ledger = launch.flags, launch.ledger
    per_token, per_sample = flags.take("calculate-per-token-loss"), flags.take("calculate-per-sample-loss")
    named = model_file.take("loss_cfg.loss_type")
    if generates or launch.entry in PREFERENCES:
        return
    if per_token or per_sample:
        flag = "calculate-per-token-loss" if per_token else "calculate-per-sample-loss"
        ledger.write("train.loss", "per_token" if per_token else "per_sample", launch.where(flag), True)
    elif named is not None and named in LOSSES:
        ledger.write("train.loss", LOSSES[named], model_file.origin("loss_cfg.loss_type"), named)
    elif named is not None:
        ledger.note(
            "unsupported", model_file.origin("loss_cfg.loss_type"), named, f"known are {', '.join(LOSSES)}"
        )
    else:
        origin = launch.where("calculate-per-token-loss")
        ledger.default("train.loss", "per_micro_batch", origin, "the mean of a micro-batch's tokens")


def _preferences(launch: Launch, model_file: Given | None) -> None:
    """DPO: what it learns in place of the tokens of answers, or of one sample's noise; the batch counts pairs
    in both. model_file: of a model that generates."""
    flags, ledger = launch.flags, launch.ledger
    objective = "dpo" if model_file is None else "diffusion_dpo"
    ledger.write("train.objective", objective, Origin(launch.entry, launch.file), "pairs")
    if model_file is not None:
        _errors(launch, model_file)
    elif flags.has("dpo-beta"):
        ledger.write("train.preference.beta", float(flags.take("dpo-beta")), launch.where("dpo-beta"))
    smoothing = float(flags.take("dpo-label-smoothing", 0))
    if smoothing:
        ledger.write("train.preference.label_smoothing", smoothing, launch.where("dpo-label-smoothing"))
    name, share = flags.take("dpo-loss-type", "sigmoid"), float(flags.take("pref-ftx", 0))
    if name != "sigmoid":
        ledger.note("unsupported", launch.where("dpo-loss-type"), name, "sigmoid is known")
    elif share:
        both = {"sigmoid": 1.0, "sft": share}
        ledger.write(
            "train.preference.loss", both, launch.where("pref-ftx"), share, "the chosen answer's own loss"
        )
    else:
        ledger.write("train.preference.loss", "sigmoid", launch.where("dpo-loss-type"))
    reference = flags.take("ref-model")
    if reference is not None and reference != flags.values.get("load"):
        ledger.write("train.preference.reference", launch.path(str(reference)), launch.where("ref-model"))
    elif reference is not None:
        ledger.note("mapped", launch.where("ref-model"), reference, "the model as it starts")


def _errors(launch: Launch, given: Given) -> None:
    """The scale of errors there is dpo-beta x loss_beta x timestep, here beta / 2 x timestep."""
    flags, ledger = launch.flags, launch.ledger
    scale, beta = float(given.take("dpo.loss_beta", 2000)), float(flags.take("dpo-beta", 0.1))
    why = "2 x dpo-beta x loss_beta: the timestep is a factor of both"
    origin = given.origin("dpo.loss_beta")
    ledger.write("train.preference.beta", 2 * beta * scale, origin, scale, why)
    ledger.write("train.preference.time_weight", "t", origin, scale)
    alpha, file = float(given.take("dpo.weight_alpha", 0)), given.take("dpo.histogram_path")
    floor = given.take("dpo.weight_beta")
    if file is not None and alpha:
        path = launch.path(str(file))
        ledger.write("train.preference.histogram", path, given.origin("dpo.histogram_path"))
        ledger.write("train.preference.weight_alpha", alpha, given.origin("dpo.weight_alpha"))
        if floor is not None:
            ledger.write("train.preference.weight_beta", float(floor), given.origin("dpo.weight_beta"))
    elif file is not None:
        origin = given.origin("dpo.histogram_path")
        ledger.note("no effect", origin, file, "weight_alpha is 0: all pairs weigh 1")


def _checkpoints(launch: Launch, generates: bool) -> None:
    flags, ledger = launch.flags, launch.ledger
    fresh = [name for name in ("no-load-optim", "no-load-rng", "finetune") if flags.take(name)]
    load, save = flags.take("load"), flags.take("save")
    base = flags.take("load-base-model")
    start = base if base is not None else load
    origin = launch.where("load-base-model" if base is not None else "load")
    if start is None:
        if not generates and launch.kind != "train-speech":
            ledger.note("checked", origin, "absent", "there: random weights; here: those of model.source")
    elif save is not None and launch.path(start) == launch.path(str(save)) and not fresh:
        ledger.write("checkpoint.resume", "auto", origin, start, "its newest checkpoint, if there is one")
    else:
        start_from(launch, str(start), origin, fresh)
    for name in fresh:
        ledger.note(
            "mapped", launch.where(name), True, "weights alone: checkpoint.init_from starts a fresh optimizer"
        )
    if flags.take("no-save-optim"):
        ledger.write("checkpoint.save", "weights", launch.where("no-save-optim"), True)
        if flags.take("no-save-rng"):
            ledger.note("mapped", launch.where("no-save-rng"), True, "with no-save-optim")
    elif flags.take("no-save-rng"):
        ledger.note("no effect", launch.where("no-save-rng"), True, "a checkpoint that resumes has its state")
    if isinstance(save, str):
        ledger.write("checkpoint.dir", launch.path(save), launch.where("save"))
        if not flags.has("save-interval"):
            ledger.default("checkpoint.every", 0, launch.where("save-interval"), "only at the end")
    if flags.has("save-interval"):
        ledger.write("checkpoint.every", launch.number("save-interval"), launch.where("save-interval"))


def start_from(launch: Launch, start: str, origin: Origin, fresh: list[str]) -> None:
    """Weights that are read before training: the hub's own files, or a tree of another system."""
    ledger, path = launch.ledger, Path(launch.path(start))
    source = str(ledger.get("model.source", ""))
    if source and Path(source) in (path, path.parent):
        ledger.note("mapped", origin, start, "model.source: the hub's files load into any layout")
        return
    if not path.exists():
        launch.notes.append(
            f"{path} is not on this machine; `polymodal check` will say whether it is understood"
        )
    ledger.write("checkpoint.init_from", str(path), origin, start if str(path) != start else path.as_posix())
    ledger.default("checkpoint.resume", "never", origin, "it starts anew each time, as there")
    if not fresh:
        launch.notes.append(
            f"without no-load-optim the optimizer's state of {start} would be read there; another system's "
            "is not read here"
        )


def _adapters(launch: Launch, generates: bool) -> None:
    flags, ledger = launch.flags, launch.ledger
    targets = flags.take("lora-target-modules")
    if targets is None and not flags.has("lora-r"):
        return
    for flag, key, otherwise in (("lora-r", "rank", 8), ("lora-alpha", "alpha", 16)):
        if flags.has(flag):
            ledger.write(f"model.lora.{key}", launch.number(flag), launch.where(flag))
        else:
            ledger.default(f"model.lora.{key}", otherwise, launch.where(flag))
    if targets is not None:
        words = [
            word
            for each in ([targets] if isinstance(targets, str) else targets)
            for word in each.split(",")
            if word
        ]
        ours = list(dict.fromkeys(name for word in words for name in TARGETS.get(word, [word])))
        fused = sorted({"linear_qkv", "proj_qkv", "linear_fc1"} & set(words))
        why = f"one adapter there for each of {', '.join(fused)}, one for each part here" if fused else ""
        ledger.write("model.lora.targets", ours, launch.where("lora-target-modules"), words, why)
    apply = flags.take("lora-apply-modules")
    if apply is not None and apply != "all":
        words = [apply] if isinstance(apply, str) else list(apply)
        unknown = [word for word in words if word not in TOWERS]
        if unknown:
            ledger.note(
                "unsupported", launch.where("lora-apply-modules"), words, f"{unknown[0]} is no tower here"
            )
        else:
            ledger.write(
                "model.lora.towers",
                [TOWERS[word] for word in words],
                launch.where("lora-apply-modules"),
                words,
            )
    elif not generates and launch.kind != "train-speech":
        towers = ["language", "vision"] if apply == "all" else ["language"]
        ledger.default("model.lora.towers", towers, launch.where("lora-apply-modules"))


def _monitor(launch: Launch, tool: Given) -> None:
    flags, ledger = launch.flags, launch.ledger
    if flags.take("tensorboard-dir") is not None:
        ledger.write(
            "monitor.trackers", ["tensorboard"], launch.where("tensorboard-dir"), why="into <run>/tensorboard"
        )
    profile(launch, tool)
    for name in ("eval-interval", "eval-iters"):
        if flags.has(name):
            origin, value = launch.where(name), flags.take(name)
            if ledger.get("data.validation"):
                key = "evaluate.every" if name == "eval-interval" else "evaluate.batches"
                ledger.write(key, int(value), origin)
            else:
                ledger.note("no effect", origin, value, "there is no validation data")


def profile(launch: Launch, tool: Given) -> None:
    """The profiler's section of a tool file."""
    ledger = launch.ledger
    if tool.take("profile.enable"):
        steps, static = "profile.static_param", "monitor.profile"
        start, end = (
            int(tool.take(f"{steps}.{which}_step", otherwise))
            for which, otherwise in (("start", 10), ("end", 11))
        )
        ledger.write(
            f"{static}.start",
            start + 1,
            tool.origin(f"{steps}.start_step"),
            start,
            "the first step traced, from 1",
        )
        ledger.write(
            f"{static}.steps",
            max(1, end - start),
            tool.origin(f"{steps}.end_step"),
            end,
            "end_step is not traced",
        )
        ranks = tool.take("profile.ranks", [0])
        ranks = list(range(launch.world)) if ranks == [-1] else ranks
        ledger.write(f"{static}.ranks", ranks, tool.origin("profile.ranks"))
        memory = tool.take("memory_profile.enable") or tool.take(f"{steps}.with_memory")
        if memory:
            ledger.write(f"{static}.memory", True, tool.origin(f"{steps}.with_memory"))
        if tool.take(f"{steps}.with_stack") or tool.take(f"{steps}.record_shapes"):
            ledger.write(f"{static}.stacks", True, tool.origin(f"{steps}.with_stack"))
    elif tool.values:
        tool.take("profile")


def _mapped(launch: Launch) -> None:
    """Flags that become a recipe key as they are."""
    for name, key in TABLES["flags"]["mapped"].items():
        if name in launch.flags.values and name not in launch.flags.asked:
            value = typed(launch.flags.take(name))
            if isinstance(value, str) and key != "checkpoint.dir":
                value = scalar(value, launch.where(name))
            launch.ledger.write(key, value, launch.where(name))
    if launch.flags.take("trust-remote-code"):
        launch.ledger.write("model.trust_remote_code", True, launch.where("trust-remote-code"))
    if launch.flags.take("moe-grouped-gemm"):
        launch.ledger.write("model.experts", "grouped_mm", launch.where("moe-grouped-gemm"), True)


def _rest(launch: Launch, files: Mapping[str, Given]) -> None:
    launch.flags.report_rest(launch.ledger)
    launch.options.report_rest(launch.ledger)
    for given in files.values():
        if given.values:
            given.report_rest(launch.ledger)
    launch.ledger.values.setdefault(
        "name", (Path(launch.file).parent.resolve().name or "run", "the script's directory")
    )
