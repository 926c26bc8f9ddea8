import torch
from torch import nn

from polymodal.models.nets import ming_audio
from tests.golden.net import Net, Outcome


def build(document):
    config, encoder = document["config"], document["config"]["whisper_encoder_config"]
    audio = ming_audio.MingAudio(
        encoder["n_mels"], encoder["n_ctx"], encoder["n_state"], encoder["n_head"], encoder["n_layer"],
        config["hidden_size"], config["ds_kernel_size"], config["ds_stride"],
    )  # fmt: skip
    vision = ming_audio.VisionProjector(config["vision_out"], config["hidden_size"])
    return nn.ModuleDict({"audio": audio, "vision": vision})


def names(module, document):
    return {ming_audio.published(name): name for name in module.state_dict()}


def run(module, case, inputs, document):
    if case == "vision_projector":
        return Outcome({"image_rows": module["vision"](inputs["vision_rows"])})
    features = inputs["audio_feats"]
    if case == "shortest_clip_alone":
        clip = document["cases"][case]["inputs"]["clip"]
        begin, end = clip["values"]
        return Outcome({"audio_rows": module["audio"]([features[clip["row"], begin:end]])[0]})
    lengths = inputs["audio_feats_lengths"]
    rows = module["audio"](ming_audio.clips_of(features, lengths))
    counts = [[ming_audio.audio_rows(n) for n in sample] for sample in lengths.tolist()]
    return Outcome({"audio_rows": torch.cat(rows)}, {"row_counts": counts})


NETS = [Net(models=("Ming-Lite-Omni audio",), build=build, run=run, names=names)]
