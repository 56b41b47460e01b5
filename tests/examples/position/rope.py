import torch


def calls(m):
    cos, sin = m.rope_table(m.inverse_frequencies(head_dim=6, rope_theta=50.0), torch.arange(3, 10))
    x, weight = torch.randn(2, 5, 7, 6), torch.randn(12, 20)
    return [
        (m.rotate, x, cos, sin),
        (m.rotate_interleaved, x, cos, sin),
        (lambda w: m.half_from_interleaved(w, head_dim=6), weight),
        (lambda w: m.interleaved_from_half(w, head_dim=6), weight),
    ]
