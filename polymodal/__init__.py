"""Polymodal trains multimodal models: one program, one recipe, hub checkpoints in and out."""

__version__ = "0.1.0"
