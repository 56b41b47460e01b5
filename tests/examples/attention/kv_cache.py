import torch


def calls(m):
    def grow(first, second):
        cache = m.KVCache([m.LayerCache()])
        cache[0].append(first, 2 * first)
        return cache[0].append(second, 2 * second), cache.length, cache.nbytes

    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    return [
        (grow, torch.randn(2, 3, 5, 4), torch.randn(2, 3, 2, 4)),
        (lambda mask: m.allowed_keys(mask, 2, 3, 1), mask),
        (lambda mask: m.places(mask[:, 1:], mask, 1), mask),
    ]
