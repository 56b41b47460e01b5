import torch


def calls(m):
    sizes = {"vocab_size": 41, "n_positions": 8, "n_embd": 24, "n_layer": 2, "n_head": 4}
    text = torch.randint(41, (90,))
    model = m.GPT2(m.GPT2Config(**sizes)) if hasattr(m, "GPT2") else None
    return [(model, text)]
