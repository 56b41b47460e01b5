import torch


def calls(m):
    sizes = {"hidden_size": 24, "num_heads": 6, "num_kv_heads": 3, "head_dim": 4}
    layer = m.ShiftedSparseAttention(group_size=4, **sizes)
    x, mask = torch.randn(2, 12, 24), torch.ones(2, 12, dtype=torch.long)
    mask[1, :3] = 0
    q, k, v = torch.randn(2, 6, 12, 4), torch.randn(2, 2, 12, 4), torch.randn(2, 2, 12, 4)
    evaluated = m.ShiftedSparseAttention(group_size=4, **sizes).eval()
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(5, 3), "ln": torch.nn.LayerNorm(3)})
    model.requires_grad_(False)
    names = m.train_norms_and_embeddings(model)
    return [
        (layer, x),
        (layer, x, None, mask),
        (evaluated, x),
        (lambda q, k, v: m.shifted_sparse_attention(q, k, v, group_size=6), q, k, v),
        (lambda q, k, v: m.attend_in_groups(q, k, v, group_size=3), q, k, v),
        (lambda q: q * len(names), q),
    ]
