import torch


def calls(m):
    x, seen = torch.randn(5, 32), torch.randn(40, 32)
    weight, bias = torch.randn(12, 32), torch.randn(12)

    linear = m.dense(weight, bias, torch.float32)

    config = m.Llama.config_class(
        vocab_size=31,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    ids = torch.randint(31, (2, 7))
    rounded, scaled = m.Llama(config), m.Llama(config)
    scaled.load_state_dict(rounded.state_dict())
    given = m.run_to(rounded, ids, 1)
    m.quantize_layers(rounded.model.layers[1:], m.to_nf4)
    m.quantize_layers_by_awq(scaled.model.layers[1:], *given, bits=3, group_size=16, steps=3)
    ways = [
        m.to_float16(linear),
        m.to_int8(linear, per_row=False),
        m.to_llm_int8(linear),
        m.to_nearest(linear, bits=3, group_size=8),
        m.to_gptq(linear, seen, bits=4, group_size=8, act_order=True),
        m.to_nf4(linear, block_size=16),
        m.to_blocks(linear, kind="Q4_K", fallback="Q4_0"),
    ]
    logs, reference = torch.randn(2, 2, 7, 31).log_softmax(-1)
    return [
        *((made.layer, x) for made in ways),
        *((torch.clone, tensor) for made in ways for tensor in made.tensors),
        (rounded, ids),
        (scaled, ids),
        (m.token_losses, logs, ids),
        (m.divergence, logs, reference),
    ]
