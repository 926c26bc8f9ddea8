"""Architectures that neither transformers nor diffusers has, in their style, and pipelines that sample them.

model_index.json names a class here by the path of its module, as diffusers writes it.
"""

PIPELINES = {"OpenSoraPipeline": "polymodal.models.nets.pipeline_open_sora"}
"""Pipeline class -> its module."""
