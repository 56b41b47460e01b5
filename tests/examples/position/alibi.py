import torch


def calls(m):
    slopes, at = m.alibi_slopes(6), torch.arange(300, 311)
    bias = m.alibi_bias(slopes, at[-7:], at)
    q, k, v = torch.randn(2, 6, 7, 5), torch.randn(2, 6, 11, 5), torch.randn(2, 6, 11, 5)
    return [
        (lambda: m.alibi_slopes(12, max_bias=6.0),),
        (m.alibi_bias, slopes, at[-7:], at),
        (m.alibi_key_bias, slopes, at.expand(2, 11)),
        (m.biased_attention, q, k, v, bias),
        (m.biased_attention, q, k, v, bias, torch.ones(1, 1, 7, 11, dtype=torch.bool).tril(2)),
    ]
