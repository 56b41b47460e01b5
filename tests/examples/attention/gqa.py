import torch


def calls(m):
    layer = m.GroupedQueryAttention(hidden_size=24, num_heads=12, num_kv_heads=4, head_dim=6)
    q, k, v = torch.randn(2, 12, 7, 6), torch.randn(2, 4, 7, 6), torch.randn(2, 4, 7, 6)
    return [(layer, torch.randn(2, 7, 24)), (m.grouped_attention, q, k, v)]
