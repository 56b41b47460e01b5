import torch


def calls(m):
    q, k, v = torch.randn(2, 6, 9, 8), torch.randn(2, 3, 11, 8), torch.randn(2, 3, 11, 8)
    mask = torch.rand(2, 1, 9, 11) > 0.4
    small = {"block_q": 8, "block_k": 8}

    def gradients(q, k, v):
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        y = m.flash_attention(*inputs, **small)
        return torch.autograd.grad(y.float().square().sum(), inputs)

    return [
        (lambda *x: m.flash_attention(*x, **small), q, k, v),
        (lambda *x: m.flash_attention(*x, mask, **small), q, k, v),
        (gradients, q, k, v),
    ]
