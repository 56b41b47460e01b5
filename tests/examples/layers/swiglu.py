import torch


def calls(m):
    sizes = {"hidden_size": 24, "intermediate_size": 40}
    acts = ("silu", "gelu", "gelu_pytorch_tanh")
    return [(m.GatedMLP(**sizes, hidden_act=act), torch.randn(2, 7, 24)) for act in acts]
