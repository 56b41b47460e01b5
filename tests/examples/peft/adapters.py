import tempfile

import torch
from torch import nn


def calls(m):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 7))

    def kept(make):
        adapted = model()
        layers = m.linear_layers(adapted, "all-linear")
        made = {path: make(layer) for path, layer in layers.items()}
        m.install(adapted, made)
        for weight in adapted.parameters():
            if weight.requires_grad:
                nn.init.normal_(weight)
        with tempfile.TemporaryDirectory() as folder:
            m.save_adapter(adapted, folder)
            return m.load_adapter(model(), folder)

    return [
        (kept(lambda layer: m.LoRA(layer, r=3, lora_alpha=7)), torch.randn(2, 12)),
        (kept(lambda layer: m.DoRA(layer, r=3, lora_alpha=7)), torch.randn(2, 12)),
        (kept(lambda layer: m.LoKr(layer, r=2, alpha=7)), torch.randn(2, 12)),
    ]
