import torch


def calls(m):
    shape = m.ModelShape(101, 48, 5, 8, 4, 6, 80, window=7, windowed_layers=2)
    chip = dict(batch=3, weight_bits=8, cache_bits=16, chips=2, peak=1e12, bandwidth=1e11)

    def times(prompt):
        found = m.answer_seconds(shape, prompt=prompt, answer=5, **chip)
        one = m.roofline(shape, new=1, past=prompt, **chip)
        return torch.tensor([*found.values(), *one.values()], dtype=torch.float64)

    return [(times, 5), (times, 50), (abs, torch.randn(3))]
