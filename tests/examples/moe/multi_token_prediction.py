import torch


class Block(torch.nn.Linear):
    """A layer with the signature of a model's."""

    def forward(self, x, rotation=None, mask=None, cache=None):
        return x + super().forward(x)


def calls(m):
    module = m.MTPModule(hidden_size=12, block=Block(12, 12))
    embed, head = torch.nn.Embedding(11, 12), torch.nn.Linear(12, 11)
    ids = torch.randint(11, (2, 7))

    def loss(hidden):
        states = m.predict_depths([module, module], embed, hidden, ids, lambda t: None)
        return m.multi_token_loss([head(state) for state in states], ids)

    def write(ids):
        trunk = lambda ids, cache: embed(ids)  # noqa: E731
        draft = lambda ids, hidden, cache: head(module(embed(ids), hidden))  # noqa: E731
        return m.generate_with_drafter(trunk, head, draft, m.KVCache([]), ids, max_new_tokens=5)

    return [
        (module, torch.randn(2, 7, 12), torch.randn(2, 7, 12)),
        (loss, torch.randn(2, 7, 12)),
        (write, ids[:1]),
        (lambda x: m.probabilities(x, 0.7), torch.randn(9)),
    ]
