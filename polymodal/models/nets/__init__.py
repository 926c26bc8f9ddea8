"""Architectures that neither transformers nor diffusers has, in their style, and pipelines that sample them.

model_index.json names a class here by the path of its module, as diffusers writes it.
"""

CLASSES = {
    "OpenSoraPipeline": "polymodal.models.nets.pipeline_open_sora",
    "STDiT3": "polymodal.models.nets.stdit3",
    "OpenSoraPlanPipeline": "polymodal.models.nets.pipeline_open_sora_plan",
    "OpenSoraPlanImageToVideoPipeline": "polymodal.models.nets.pipeline_open_sora_plan",
    "OpenSoraPlanTransformer": "polymodal.models.nets.open_sora_plan",
}
"""Pipelines and denoisers -> their modules: classes that are looked up by their name alone."""
