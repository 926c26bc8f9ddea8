import torch
from torch.nn.utils.rnn import pad_sequence

from polymodal.models.nets import cosyvoice3
from polymodal.models.nets.cosyvoice3_flow import CosyVoice3Flow
from polymodal.models.nets.cosyvoice3_vocoder import CosyVoice3Vocoder
from tests.golden.net import Net, Outcome


def build_llm(document):
    return cosyvoice3.build(document["config"], attn_implementation="eager")


def run_llm(module, case, inputs, document):
    rows = []
    for i, draw in enumerate(inputs["random_per_sample"]):
        parts = [
            inputs[f"{name}_token"][i, : inputs[f"{name}_token_len"][i]].tolist()
            for name in ("instruct", "text", "speech")
        ]
        rows.append(cosyvoice3.training_row(module.config, *parts, streaming=bool(draw < 0.5)))
    lengths = [len(row["labels"]) for row in rows]
    batch = {
        name: pad_sequence([torch.tensor(row[name]) for row in rows], True, cosyvoice3.NONE)
        for name in ("text_ids", "speech_ids", "labels")
    }
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    out = module(**batch, attention_mask=mask.long())
    if case.endswith("loss"):
        return Outcome({"loss": out.loss})
    columns = module.config.speech_token_size + 4
    return Outcome(
        {"logits_of_valid_rows_first_columns": out.logits[mask][:, :columns]},
        {
            "loss": out.loss,
            "acc": out.accuracy,
            "lengths": lengths,
            "targets": [row["labels"] for row in rows],
        },
    )


def build_flow(document):
    return CosyVoice3Flow(**document["config"])


def run_flow(module, case, inputs, document):
    streaming = case.endswith("streaming")
    if case.startswith("estimator"):
        mask = inputs["mask"]
        names = ("x", "mask", "mu", "t", "spks", "cond")
        return Outcome({"velocity": module.estimator(*(inputs[n] for n in names), streaming) * mask})
    if case.startswith("inference"):
        feat = module.generate(
            inputs["token"],
            inputs["prompt_token"],
            inputs["prompt_feat"],
            inputs["embedding"],
            inputs["rand_noise"],
            streaming,
        )
        return Outcome({"feat": feat})
    names = ("speech_token", "speech_token_len", "speech_feat", "speech_feat_len", "embedding", "noise")
    loss = module(
        *(inputs[name] for name in names),
        t=inputs["t"].flatten(),
        keep=inputs["cfg_draw"] > module.cfm["training_cfg_rate"],
        condition_frames=inputs["condition_frames"],
        streaming=streaming,
    )
    return Outcome({"loss": loss})


def build_vocoder(document):
    return CosyVoice3Vocoder(**document["config"])


def run_vocoder(module, case, inputs, document):
    noises = {name: inputs[name] for name in ("rand_ini", "noise_waves") if name in inputs}
    if case == "decode":
        return Outcome({"wav_before_clamp": module.decode(inputs["mel"], inputs["source"])})
    if case == "f0":
        return Outcome({"f0": module.f0_predictor(inputs["mel"])})
    if case == "source_from_f0":
        return Outcome({"source": module.source(inputs["f0"], **noises)})
    wav, source = module(inputs["mel_one"], final=case != "inference_not_final", **noises)
    return Outcome({"wav": wav, "source": source})


NETS = [
    Net(
        models=("CosyVoice3 speech language model",),
        build=build_llm,
        run=run_llm,
        outputs_bound=1e-6,
        gradients_bound=5e-6,
    ),
    Net(
        models=("CosyVoice3 flow",), build=build_flow, run=run_flow, outputs_bound=1e-6, gradients_bound=5e-6
    ),
    Net(models=("CosyVoice3 vocoder",), build=build_vocoder, run=run_vocoder),
]
