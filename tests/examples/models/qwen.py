import torch


def calls(m):
    sizes = {
        "vocab_size": 101,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    }
    windows = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    experts = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 16}
    models = [
        m.Qwen2(m.Qwen2Config(**sizes, **windows)),
        m.Qwen3(m.Qwen3Config(**sizes, head_dim=14)),
        m.Qwen3Moe(m.Qwen3MoeConfig(**sizes, **experts, head_dim=14)),
    ]
    ids, mask = torch.randint(101, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    return [(model, ids, mask) for model in models]
