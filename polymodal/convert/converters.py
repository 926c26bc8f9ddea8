"""The converters that `mm-convert` offers: name -> what it is of, its methods, its family."""

from __future__ import annotations

from collections.abc import Callable

from polymodal.convert import methods_dcp as dcp
from polymodal.convert import methods_diffusion as diffusion
from polymodal.convert import methods_language as language

_TABLE = {
    "Qwen2VLConverter": ("Qwen2-VL.", language.Language, "qwen2-vl"),
    "Qwen2_5_VLConverter": ("Qwen2.5-VL.", language.LanguageWithAdapters, "qwen2.5-vl"),
    "Qwen2_5_OmniConverter": (
        "Qwen2.5-Omni: the thinker; the rest is taken over from the hub checkpoint.",
        language.Language,
        "qwen2.5-omni",
    ),
    "Qwen3VLMegatronConverter": ("Qwen3-VL as a tree, dense or with experts.", language.Language, "qwen3-vl"),
    "InternVLConverter": ("InternVL 2, 2.5 and 3.", language.Language, "internvl"),
    "GlmConverter": ("GLM-4.1V.", language.Language, "glm-4.1v"),
    "DeepSeekVLConverter": ("DeepSeek-VL2.", language.Language, "deepseek-vl2"),
    "WanConverter": (
        "Wan 2.1 and 2.2: a transformer, or a pipeline's directory with the two experts of 2.2.",
        diffusion.Wan,
        "wan",
    ),
    "HunyuanVideoConverter": (
        "HunyuanVideo and HunyuanVideo 1.5: hf_to_mm and mm_to_hf with diffusers' names.",
        diffusion.HunyuanVideo,
        "hunyuan-video",
    ),
    "CogVideoConverter": ("CogVideoX 1.0 and 1.5.", diffusion.CogVideo, "cogvideox"),
    "OpenSoraPlanConverter": ("Open-Sora Plan 1.2, 1.3 and 1.5.", diffusion.OpenSoraPlan, "open-sora-plan"),
    "OpenSoraConverter": ("Open-Sora 2.0.", diffusion.Hub, "open-sora"),
    "StepVideoConverter": ("Step-Video.", diffusion.Hub, "stepvideo"),
    "VACEConverter": (
        "VACE on Wan 2.1 and 2.2; hf_to_mm and mm_to_hf with the original code's names.",
        diffusion.VACE,
        "vace",
    ),
    "LuminaConverter": ("Lumina-mGPT 2.", diffusion.Hub, "lumina"),
    "BagelConverter": ("BAGEL.", diffusion.Hub, "bagel"),
    "Qwen3VLConverter": ("Qwen3-VL as a DCP directory, dense or with experts.", dcp.Sharded, "qwen3-vl-dcp"),
    "Mistral3Converter": (
        "Magistral and others of Mistral 3 as a DCP directory.",
        dcp.Sharded,
        "mistral3-dcp",
    ),
    "Qwen35Converter": ("Qwen3.5 as a DCP directory, experts transposed.", dcp.Qwen35, "qwen3.5-dcp"),
    "GenericDCPConverter": ("Any model as a DCP directory.", dcp.AnyModel, ""),
    "ExpertMergeDcpConverter": (
        "InternVL 3.5, GLM-4.5V and Qwen3-Omni as a DCP directory, experts in one tensor.",
        dcp.ExpertMerge,
        "",
    ),
}
CONVERTERS: dict[str, Callable] = {
    name: type(name, (base,), {"__doc__": title, "__module__": __name__, "_family": family})
    for name, (title, base, family) in _TABLE.items()
} | {"moe_expert": dcp.moe_expert}
