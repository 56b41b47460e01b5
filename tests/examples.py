"""For each module, what tests/test_carry.py calls: the original and its one-file form.

An example takes the module and gives calls, each a callable of it with its inputs. Only torch
may be imported here: the one-file form is called where nothing else can be.
"""

import torch


def gqa(m):
    layer = m.GroupedQueryAttention(hidden_size=24, num_heads=12, num_kv_heads=4, head_dim=6)
    q, k, v = torch.randn(2, 12, 7, 6), torch.randn(2, 4, 7, 6), torch.randn(2, 4, 7, 6)
    return [(layer, torch.randn(2, 7, 24)), (m.grouped_attention, q, k, v)]


def svd_attention(m):
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


def rmsnorm(m):
    x = 3 * torch.randn(2, 7, 50)
    norms = m.RMSNorm(hidden_size=50, eps=0.1), m.UnitOffsetRMSNorm(hidden_size=50)
    for norm in norms:
        norm.weight.data += 0.3 * torch.randn(50)
    return [*((norm, x) for norm in norms), (m.rms_normalize, x, 1e-6)]


EXAMPLES = {
    "attention/gqa": gqa,
    "attention/svd_attention": svd_attention,
    "layers/rmsnorm": rmsnorm,
}
