"""The causal Wan's two ways of seeing clean blocks: from a cache, and by a mask over clean and noisy ones."""

import torch

from polymodal.models.nets.causal_wan import CausalWanTransformer
from tests.golden.nets.causal_wan import cached


def test_a_cache_of_clean_blocks_equals_teacher_forcing():
    torch.manual_seed(0)
    model = CausalWanTransformer(
        num_frame_per_block=2, num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    ).double().eval()  # fmt: skip
    clean, noisy = torch.randn(2, 1, 4, 6, 4, 4, dtype=torch.float64)
    context = torch.randn(1, 3, 16, dtype=torch.float64)
    timestep = torch.tensor([[900.0, 900.0, 500.0, 500.0, 100.0, 100.0]])
    with torch.no_grad():
        whole = model(noisy, timestep, context, clean, return_dict=False)[0]
        by_block = cached(model, noisy, timestep, context, clean)
    # the norms are float32 inside
    torch.testing.assert_close(by_block, whole, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(whole, model(noisy, timestep, context, return_dict=False)[0], atol=1e-2)


def test_a_saved_one_opens_again(tmp_path):
    model = CausalWanTransformer(
        num_frame_per_block=2, num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=32, num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    again = CausalWanTransformer.from_pretrained(tmp_path)
    assert again.config.num_frame_per_block == 2 and again.config.ffn_dim == 32
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
