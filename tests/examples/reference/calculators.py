import torch


def calls(m):
    shape = m.ModelShape(101, 48, 5, 8, 4, 6, 80)

    def counts(kind):
        other = m.with_attention(shape, kind)
        kept = m.kv_cache(other, context=5000, batch=3, bits=16)
        return torch.tensor([float(v) for v in [*m.parameters(other).values(), *kept.values()]])

    return [*((counts, kind) for kind in ("MHA", "MLA", "window")), (abs, torch.randn(3))]
