"""Architectures that neither transformers nor diffusers has, in their style, and pipelines that sample them.

model_index.json names a class here by the path of its module, as diffusers writes it.
"""

CLASSES = {
    "OpenSoraPipeline": "polymodal.models.nets.pipeline_open_sora",
    "STDiT3": "polymodal.models.nets.stdit3",
    "OpenSora2Pipeline": "polymodal.models.nets.pipeline_open_sora_2",
    "OpenSora2Transformer": "polymodal.models.nets.open_sora_2",
    "OpenSoraPlanPipeline": "polymodal.models.nets.pipeline_open_sora_plan",
    "OpenSoraPlanImageToVideoPipeline": "polymodal.models.nets.pipeline_open_sora_plan",
    "OpenSoraPlanTransformer": "polymodal.models.nets.open_sora_plan",
    "OpenSoraPlan15Pipeline": "polymodal.models.nets.pipeline_open_sora_plan_1_5",
    "OpenSoraPlanUTransformer": "polymodal.models.nets.open_sora_plan_1_5",
    "StepVideoPipeline": "polymodal.models.nets.pipeline_step_video",
    "StepVideoImageToVideoPipeline": "polymodal.models.nets.pipeline_step_video",
    "StepVideoModel": "polymodal.models.nets.step_video",
}
"""Pipelines and denoisers -> their modules: classes that are looked up by their name alone."""
