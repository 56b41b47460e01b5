import torch


def calls(m):
    layer = m.GroupedQueryAttention(hidden_size=24, num_heads=12, num_kv_heads=4, head_dim=6)
    q, k, v = torch.randn(2, 12, 7, 6), torch.randn(2, 4, 7, 6), torch.randn(2, 4, 7, 6)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 0
    many = {"k_proj.weight": torch.randn(24, 5), "v_proj.bias": torch.randn(24)}

    def pool(kept):
        return m.pool_kv_heads(many | {"q_proj.weight": kept}, num_kv_heads=2, head_dim=4)

    return [
        (layer, torch.randn(2, 7, 24)),
        (layer, torch.randn(2, 7, 24), None, mask),
        (m.grouped_attention, q, k, v),
        (pool, q),
    ]
