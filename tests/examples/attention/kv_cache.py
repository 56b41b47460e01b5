import torch


def calls(m):
    def grow(first, second):
        cache = m.KVCache([m.LayerCache()])
        cache[0].append(first, 2 * first)
        return cache[0].append(second, 2 * second), cache.length, cache.nbytes

    return [(grow, torch.randn(2, 3, 5, 4), torch.randn(2, 3, 2, 4))]
