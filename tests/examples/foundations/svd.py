import torch


def calls(m):
    a, start = torch.randn(9, 6), torch.randn(6)
    flat = torch.randn(9, 2) @ torch.randn(2, 6)
    return [
        (lambda x, y: m.power_iteration(x, y, 5), a, start),
        (lambda x: m.low_rank(x, 3), a),
        (lambda x: m.low_rank_error(x, 2), torch.tensor([5.0, 3.0, 2.0, 1.0])),
        (m.numerical_rank, flat),
        (m.pseudo_inverse, a),
        (lambda x: m.pseudo_inverse(x, 1e-3), flat),
        (lambda x: m.randomized_svd(x, 2, oversample=3), a),
    ]
