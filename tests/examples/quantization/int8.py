import torch


def calls(m):
    linear = torch.nn.Linear(24, 10)
    x = torch.randn(2, 7, 24)
    x[..., 5] += 9
    a, b = torch.randint(-127, 128, (2, 7, 24), dtype=torch.int8)
    return [
        (m.Int8Linear.from_linear(linear), x),
        (m.Int8Linear.from_linear(linear, threshold=0.0), x),
        (m.absmax_quantize, x, -1),
        (m.zero_point_quantize, x),
        (m.blockwise_quantize, x, 8),
        (m.vectorwise_quantize, x[0], 6.0),
        (m.int8_matmul, a, b),
    ]
