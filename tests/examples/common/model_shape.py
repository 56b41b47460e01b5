import torch


def calls(m):
    config = {"model_type": "mixtral", "vocab_size": 101, "hidden_size": 48}
    config |= {"intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6}
    config |= {"num_key_value_heads": 2, "num_local_experts": 5, "num_experts_per_tok": 2}

    def sizes(changes):
        shape = m.shape_of(config | changes)
        return torch.tensor([float(v) for v in vars(shape).values()])

    return [(sizes, {}), (sizes, {"sliding_window": 9}), (lambda x: x * 2, torch.randn(3))]
