import torch


def calls(m):
    config = m.Gemma3Config(
        vocab_size=101,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=7,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=14,
        sliding_window=4,
    )
    ids, mask = torch.randint(101, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    model = m.Gemma3(config)
    return [(model, ids), (model, ids, mask)]
