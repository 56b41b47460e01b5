import torch


def calls(m):
    layer = m.SlidingWindowAttention(window=4, hidden_size=48, num_heads=6, num_kv_heads=2)

    def chunks(x):
        cache = layer.new_cache()
        first = layer(x[:, :6], cache=cache)
        return first, layer(x[:, 6:], cache=cache), cache.nbytes

    x, mask = torch.randn(2, 9, 48), torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    return [
        (layer, x),
        (layer, x, None, mask),
        (torch.no_grad()(chunks), x),
        (lambda x: m.window_mask(5, 7, 3) * x, torch.randn(5, 7)),
    ]
