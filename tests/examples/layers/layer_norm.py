import torch


def calls(m):
    x = 3 * torch.randn(2, 7, 50) + 2
    norms = m.LayerNorm(hidden_size=50, eps=0.1), m.LayerNorm(hidden_size=50, bias=False)
    for parameter in [p for norm in norms for p in norm.parameters()]:
        parameter.data += 0.3 * torch.randn(50)
    places = [(place, x, norms[0], torch.tanh) for place in (m.pre_norm, m.post_norm)]
    return [*((norm, x) for norm in norms), (m.standardize, x, 1e-6), *places]
