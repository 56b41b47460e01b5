import torch


def calls(m):
    config = m.MixtralConfig(
        vocab_size=31,
        hidden_size=24,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=6,
        num_experts_per_tok=2,
    )
    ids = torch.randint(31, (2, 7))
    mixture = m.MixtureOfExperts(
        hidden_size=24, intermediate_size=16, num_experts=6, num_experts_per_tok=2
    )
    models = [m.start(config, 3)]
    models += [m.start(m.dense_counterpart(config, equal), 3) for equal in m.COUNTS]
    wide = (m.as_one_network, mixture, torch.randn(9, 24))
    return [wide, *((model, ids) for model in models)]
