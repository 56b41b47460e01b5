import torch


def calls(m):
    groups = torch.arange(24).flip(0) % 4

    def there_and_back(w, group_size, symmetric, groups):
        step, zero = m.fit_grid(w, bits=3, group_size=group_size, symmetric=symmetric)
        codes = m.to_codes(w, step, zero, bits=3, groups=groups)
        packed = m.pack(codes, bits=3)
        return packed, m.from_codes(m.unpack(packed, bits=3), step, zero, groups=groups)

    return [
        (lambda w: there_and_back(w, None, False, None), torch.randn(5, 24)),
        (lambda w: there_and_back(w, 6, True, groups), torch.randn(5, 24)),
    ]
