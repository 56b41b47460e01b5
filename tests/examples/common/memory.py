import torch


def calls(m):
    def outside(x):
        return torch.tensor([float(m.peak_bytes(lambda: (x + 1, x * 2))), 1.0])

    return [(outside, torch.randn(50)), (lambda x: torch.relu(x), torch.randn(5))]
