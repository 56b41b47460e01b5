import torch


def calls(m):
    config = m.MistralConfig(
        vocab_size=101,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        sliding_window=4,
    )
    ids, mask = torch.randint(101, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    model = m.Mistral(config)

    def chunks(ids):
        cache = model.new_cache()
        first = model(ids[:, :6], cache=cache)
        return first, model(ids[:, 6:], cache=cache), cache.nbytes

    return [(model, ids), (model, ids, mask), (torch.no_grad()(chunks), ids)]
