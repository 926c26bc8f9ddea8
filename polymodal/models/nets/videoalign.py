"""VideoAlign's reward model: a Qwen2-VL with a linear head on its hidden states.

Formulas: the VideoAlign paper ("Improving Video Generation with Human Feedback") and its public
configuration. Keys are those of the published file (`visual.*`, `model.*`, `lm_head`, `rm_head`), which
transformers renames when it loads.

As published, a text token's position is its index on all three axes: with the grid positions of Qwen2-VL the
published weights give other rewards.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

INVALID = 22  # a label: neither A, B nor a tie
POOLINGS = ("special", "last", "mean")


@strict
class VideoAlignConfig(Qwen2VLConfig):
    reward_token: str = "special"
    output_dim: int = 1
    special_token_ids: list[int] | tuple[int, ...] | None = None
    pad_token_id: int | None = None


class VideoAlignRewardModel(Qwen2VLForConditionalGeneration):
    config: VideoAlignConfig
    config_class = VideoAlignConfig

    def __init__(self, config: VideoAlignConfig) -> None:
        super().__init__(config)
        self.rm_head = nn.Linear(config.text_config.hidden_size, config.output_dim, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        reward_token: str | None = None,
        **media: Any,
    ) -> Tensor:
        """Rewards [B, n].

        special: the rows of the reward tokens, in the order of the text (n is their count, if `output_dim` is
        1).
        last: the last token before padding. mean: the mean of the tokens before that one, as published.
        """
        if position_ids is None:
            plain = torch.arange(input_ids.shape[1], device=input_ids.device)
            position_ids = plain.expand(3, len(input_ids), -1)
        hidden = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
            **media,
        ).last_hidden_state
        rewards = self.rm_head(hidden)
        kind = reward_token or self.config.reward_token
        if kind == "special":
            special = torch.tensor(list(self.config.special_token_ids or ()), device=input_ids.device)
            return rewards[torch.isin(input_ids, special)].reshape(len(input_ids), -1)
        pad = self.config.pad_token_id
        is_pad = input_ids == (self.config.text_config.pad_token_id if pad is None else pad)
        last = torch.where(is_pad.any(1), is_pad.int().argmax(1) - 1, input_ids.shape[1] - 1)
        if kind == "last":
            return rewards[torch.arange(len(last), device=last.device), last]
        before = (torch.arange(input_ids.shape[1], device=last.device) < last[:, None]).to(rewards.dtype)
        return (rewards * before[..., None]).sum(1) / before.sum(1, keepdim=True)


def reward_loss(
    kind: str,
    rewards_a: Tensor,
    rewards_b: Tensor,
    labels: Tensor,
    scores_a: Tensor | None = None,
    scores_b: Tensor | None = None,
    margin: float = 0.57,
    ties: float = 5.0,
) -> Tensor:
    """Loss of pairs, all tensors [B, n]; a mean in which masked entries count as zeros, as published.

    Labels: 1 A is better, -1 B, 0 a tie, 22 invalid. Kinds: `bt` -log sigmoid(chosen - rejected); `margin`
    less the difference of the scores; `constant_margin` less `margin`; `scaled` times that difference; `btt`
    with ties of strength `ties`; `reg` the squared error to score - 3 of both sides (score 0: none).
    """
    if kind == "reg":
        rewards, scores = torch.cat([rewards_a, rewards_b]), torch.cat([scores_a, scores_b])
        return ((rewards - (scores - 3)).square() * (scores != 0)).mean()
    sign = torch.where(labels == 1, 1.0, -1.0).to(rewards_a.dtype)
    ahead, decided = sign * (rewards_a - rewards_b), labels.abs() == 1
    if kind == "btt":
        won = -F.logsigmoid(ahead - math.log(ties))
        tied = won - F.logsigmoid(-ahead - math.log(ties)) - math.log(ties**2 - 1)
        return (torch.where(decided, won, tied) * (labels != INVALID)).mean()
    apart = 0.0 if scores_a is None or scores_b is None else sign * (scores_a - scores_b)
    if kind == "scaled":
        return (-apart * F.logsigmoid(ahead) * decided).mean()
    less = {"bt": 0.0, "margin": apart, "constant_margin": margin}[kind]
    return (-F.logsigmoid(ahead - less) * decided).mean()


def build(values: dict[str, Any], **keywords: Any) -> VideoAlignRewardModel:
    """A model with random weights of the values of a `config.json`."""
    return VideoAlignRewardModel._from_config(VideoAlignConfig(**values), **keywords)


# transformers has the renames of published Qwen2-VL files for its own classes alone
register_checkpoint_conversion_mapping(
    VideoAlignRewardModel.__name__,
    get_checkpoint_conversion_mapping("Qwen2VLForConditionalGeneration"),
    overwrite=True,
)
