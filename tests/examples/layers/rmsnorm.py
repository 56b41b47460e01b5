import torch


def calls(m):
    x = 3 * torch.randn(2, 7, 50)
    norms = m.RMSNorm(hidden_size=50, eps=0.1), m.UnitOffsetRMSNorm(hidden_size=50)
    for norm in norms:
        norm.weight.data += 0.3 * torch.randn(50)
    return [*((norm, x) for norm in norms), (m.rms_normalize, x, 1e-6)]
