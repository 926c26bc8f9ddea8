"""Operations of conversion rules that transformers does not have, in its form (ConversionOps)."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Unsqueezed:
    """A stored tensor [1, ...] of which ours lacks the first dimension."""

    supports_many_to_many = False

    def __init__(self, inverse: bool = False):
        self.inverse = inverse

    def convert(
        self, inputs: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **_: Any
    ) -> dict[str, Tensor]:
        value = inputs[source_patterns[0]]
        value = value[0] if isinstance(value, list) else value
        return {target_patterns[0]: value.unsqueeze(0) if self.inverse else value.squeeze(0)}

    @property
    def reverse_op(self) -> Unsqueezed:
        return Unsqueezed(not self.inverse)
