import torch
from torch import nn


def calls(m):
    def layer(**options):
        lora = m.LoRA(nn.Linear(12, 20), r=3, lora_alpha=7, **options)
        nn.init.normal_(lora.lora_B.weight)
        return lora

    return [
        (layer(), torch.randn(2, 5, 12)),
        (layer(use_rslora=True, lora_dropout=0.3), torch.randn(2, 5, 12)),
        (m.LoRA(nn.Linear(12, 20), r=3, lora_alpha=7, pissa=True), torch.randn(5, 12)),
    ]
