"""The causal Wan of Self-Forcing, whose published names are the original Wan's."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tests.golden.net import Net, Outcome

NAMES = {
    "in_dim": "in_channels", "out_dim": "out_channels", "num_heads": "num_attention_heads", "freq_dim": "freq_dim",
    "text_dim": "text_dim", "ffn_dim": "ffn_dim", "num_layers": "num_layers", "cross_attn_norm": "cross_attn_norm",
    "eps": "eps", "patch_size": "patch_size", "num_frame_per_block": "num_frame_per_block",
}  # fmt: skip


def build(document: dict[str, Any]) -> Any:
    from polymodal.models.nets.causal_wan import CausalWanTransformer

    config = document["config"]
    width = config["dim"] // config["num_heads"]
    return CausalWanTransformer(
        attention_head_dim=width, **{ours: config[name] for name, ours in NAMES.items() if name in config}
    )


def names(module: Any, document: dict[str, Any]) -> dict[str, str]:
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    converted = convert_wan_transformer_to_diffusers({name: name for name in document["state_dict"]})
    return {published: ours for ours, published in converted.items()}


def run(module: Any, case: str, inputs: dict[str, Tensor], document: dict[str, Any]) -> Outcome:
    context = inputs["context"]
    context = pad(context, (0, 0, 0, document["config"]["text_len"] - context.shape[1]))
    clean = inputs.get("clean_x")
    if clean is not None and "cache" in case:
        return Outcome({"output": cached(module, inputs["x"], inputs["t"], context, clean)})
    return Outcome({"output": module(inputs["x"], inputs["t"], context, clean, return_dict=False)[0]})


def cached(module: Any, noisy: Tensor, timestep: Tensor, context: Tensor, clean: Tensor) -> Tensor:
    """Block by block: the prediction, then the keys and values of the clean block at timestep 0."""
    size, made = module.config.num_frame_per_block, []
    past = None
    for start in range(0, noisy.shape[2], size):
        of_block = slice(start, start + size)
        shown, times = noisy[:, :, of_block], timestep[:, of_block]
        made.append(module(shown, times, context, past=past, return_dict=False)[0])
        written: list[Any] = []
        module(clean[:, :, of_block], torch.zeros_like(times), context, past=past, written=written)
        past = written
    return torch.cat(made, dim=2)


# q and k are normed in float32 in the published code, in diffusers' blocks all norms are
BOUNDS = {"outputs_bound": 1e-6, "gradients_bound": 5e-6}
NETS = [Net(models=("Self-Forcing, causal Wan",), build=build, run=run, names=names, **BOUNDS)]
