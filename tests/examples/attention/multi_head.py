import torch


def calls(m):
    sizes = {"hidden_size": 20, "num_heads": 5, "head_dim": 6, "bias": True}
    own = m.MultiHeadAttention(**sizes, causal=True)
    cross = m.MultiHeadAttention(**sizes, memory_size=9)
    x, memory = torch.randn(2, 4, 20), torch.randn(2, 7, 9)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    allowed = torch.ones(2, 1, 4, 7, dtype=torch.bool).tril(3)

    def unpack(packed):
        return list(
            m.unpack_torch({"a.in_proj_weight": packed, "a.out_proj.bias": packed}).values()
        )

    return [
        (own, x),
        (cross, x, memory),
        (cross, x, memory, mask),
        (lambda x, memory: cross.maps(x, memory, allowed), x, memory),
        (lambda x, memory: cross.contributions(x, memory, mask), x, memory),
        (unpack, torch.randn(12, 4)),
    ]
