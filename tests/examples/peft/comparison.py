import copy

import torch
from torch import nn


def calls(m):
    base = nn.Sequential(nn.Embedding(19, 12), nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 19))
    texts = torch.randint(19, (2, 8))
    made = [(m.token_loss, torch.randn(2, 7, 19), texts)]
    for method in ("LoRA", "DoRA", "LoHa", "LoKr", "VeRA"):
        models = [copy.deepcopy(base) for _ in range(2)]
        for model in models:
            m.adapt_to_budget(model, ["1", "3"], method, 150)
        batches = torch.randint(19, (4, 2, 3, 8))
        m.train_together(models, batches, learning_rates=[0.01, 0.03])
        made += [(model, texts) for model in models]
    return made
