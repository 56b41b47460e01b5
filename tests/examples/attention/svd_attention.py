import torch


def calls(m):
    sizes = dict(vocab_size=17, max_positions=9, hidden_size=20, num_heads=3, head_dim=6)
    model, matrix = m.OneLayerDecoder(**sizes), torch.randn(9, 6)
    weight = torch.randn(3, 6, 20)
    return [
        (model, torch.randint(17, (2, 7))),
        (model.self_attn, torch.randn(2, 7, 20)),
        (m.circuit_attention, torch.randn(2, 7, 20), *torch.randn(2, 3, 20, 20)),
        (m.qk_circuit, weight, weight + 1),
        (m.ov_circuit, weight, weight.mT + 1),
        (m.factor, matrix),
        (m.low_rank, matrix, 3),
        (m.singular_values, matrix),
        (m.effective_rank, torch.rand(9)),
    ]
