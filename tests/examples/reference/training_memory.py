import torch


def calls(m):
    shape = m.ModelShape(101, 48, 5, 8, 4, 6, 80)
    about = dict(precision="mixed", optimizer="AdamW", context=17, batch=2, kept="everything")
    about |= dict(dropout=True, rank=3, targets="attention")

    def held(method):
        found = m.training_memory(shape, method=method, **about)
        return torch.tensor([float(v) for v in found.values()])

    return [*((held, method) for method in m.METHODS), (abs, torch.randn(3))]
