import torch


def calls(m):
    sizes = {"vocab_size": 19, "hidden_size": 24, "num_heads": 4, "intermediate_size": 40}
    models = [
        m.PositionedDecoder(position=kind, num_layers=2, max_positions=11, **sizes)
        for kind in m.KINDS
    ]
    tokens = torch.randint(19, (2, 7))
    layer = m.PositionedAttention(hidden_size=24, num_heads=4)
    return [*((model, tokens) for model in models), (layer, torch.randn(2, 7, 24))]
