import torch


def calls(m):
    x, y = torch.randn(3, 2, 7), torch.randn(2, 7)
    a, b = torch.randn(11, 4), torch.randn(11, 3)
    dependent = torch.cat([a, a[:, :1] - 2 * a[:, 2:3]], 1)
    return [
        (m.dot, x, y),
        (m.cosine, x, y),
        (m.gram_schmidt, a),
        (m.gram_schmidt, dependent),
        (m.project, b.T, a),
        (m.least_squares, a, b),
        (m.least_squares, dependent, b),
        (m.normal_equations, a, b),
    ]
