import torch


def calls(m):
    sizes = {"hidden_size": 40, "num_heads": 5, "kv_lora_rank": 16, "qk_nope_head_dim": 10}
    sizes |= {"qk_rope_head_dim": 6, "v_head_dim": 7}
    direct = m.MultiHeadLatentAttention(q_lora_rank=None, **sizes)
    layer = m.MultiHeadLatentAttention(q_lora_rank=12, **sizes)

    def chunks(x, cos, sin):
        cache = m.LayerCache()
        first = layer(x[:, :6], (cos[:6], sin[:6]), cache=cache)
        return first, layer(x[:, 6:], (cos[6:], sin[6:]), cache=cache), cache.nbytes

    x, angles = torch.randn(2, 7, 40), torch.randn(7, 3)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 0
    q_nope, q_rope = torch.randn(2, 5, 3, 10), torch.randn(2, 5, 3, 6)
    kept, w_kv = torch.randn(2, 7, 22), torch.randn(5, 17, 16)
    return [
        (layer, x),
        (direct, x, None, mask),
        (torch.no_grad()(chunks), x, angles.cos(), angles.sin()),
        (lambda *a: m.expanded_attention(*a, scale=0.3), q_nope, q_rope, kept, w_kv),
        (lambda *a: m.absorbed_attention(*a, scale=0.3), q_nope, q_rope, kept, w_kv),
    ]
