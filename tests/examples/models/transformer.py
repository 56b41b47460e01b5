import torch


def calls(m):
    sizes = {"vocab_size": 31, "hidden_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "intermediate_size": 40, "dropout": 0.0}
    source, target = torch.randint(31, (2, 9)), torch.randint(31, (2, 7))
    mask, target_mask = torch.ones(2, 9).long(), torch.ones(2, 7).long()
    mask[1, 5:], target_mask[1, :2] = 0, 0
    model = m.Transformer(m.TransformerConfig(**sizes))
    other = m.Transformer(m.TransformerConfig(**sizes, attention_bias=True, final_norms=True))
    rates = [m.warmup_rate(n, hidden_size=24, warmup_steps=3) for n in (1, 3, 9)]
    return [
        (model, source, target),
        (model, source, target, mask, target_mask),
        (other, source, target, mask),
        (lambda source, target: model.alignments(source, target, mask), source, target),
        (lambda x: x * rates[0] + rates[1] * rates[2], torch.randn(3)),
    ]
