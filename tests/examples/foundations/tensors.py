import torch


def calls(m):
    memory, a, b = torch.randn(24), torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    return [
        (lambda x: m.read(x, (3, 4), (1, 3), 2), memory),
        (lambda x: m.read(x, (2, 3, 4), m.contiguous_strides((2, 3, 4))), memory),
        (lambda x: m.read(x, (6, 4), m.view_strides((2, 3, 4), (12, 4, 1), (6, 4))), memory),
        (lambda x: m.read(x, (5, 4), m.expand_strides((4,), (1,), (5, 4))), memory),
        (lambda x: x.expand(m.broadcast_shapes(x.shape, (7, 1, 3, 1))), a),
        (lambda x, y: m.einsum("bik,bjk->bij", x, y), a, b),
        (lambda x: m.einsum("iij->j", x), torch.randn(3, 3, 4)),
    ]
