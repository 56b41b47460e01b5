import tempfile

import torch


def calls(m):
    def kept(x):
        with tempfile.TemporaryDirectory() as folder:
            m.write_adapter(folder, {"r": 3}, {"a": x, "b": x.T})
            config, tensors = m.read_adapter(folder)
        return config["r"], tensors["a"], tensors["b"]

    return [(kept, torch.randn(4, 5))]
