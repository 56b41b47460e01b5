import tempfile

import torch


def calls(m):
    def kept(x):
        with tempfile.TemporaryDirectory() as folder:
            m.write_adapter(folder, {"r": 3}, {"a": x, "b": x.T})
            config, tensors = m.read_adapter(folder)
        return config["r"], tensors["a"], tensors["b"]

    def scaled(x):
        return x * m.read_options({"r": 3}, {"r": (int, 8)}, "a file")["r"]

    return [(kept, torch.randn(4, 5)), (scaled, torch.randn(4, 5))]
