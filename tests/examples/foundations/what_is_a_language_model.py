import torch


def calls(m):
    tokens, logits = torch.randint(7, (300,)), torch.randn(40, 7)
    model = m.NGramModel(order=3, vocab_size=7, smoothing=0.1).fit(tokens)
    contexts, _ = m.windows(tokens, 3)
    return [
        (lambda c: model(c), contexts),
        (lambda t: m.windows(t, 2), tokens),
        (m.surprisal, logits, tokens[:40]),
        (m.perplexity, logits, tokens[:40]),
    ]
