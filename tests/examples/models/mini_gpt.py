import torch
from torch import nn


def calls(m):
    class Tiny(nn.Module):
        """A model of two matrices: what is called here takes any."""

        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(41, 24)
            self.c_proj = nn.Linear(24, 24)

        def forward(self, input_ids):
            return self.c_proj(self.table(input_ids)).tanh() @ self.table.weight.T

    def trained(model, text):
        trainer, dice = m.Trainer(model, m.Plan(steps=4, warmup_steps=1)), torch.Generator()
        batch = {"batch_size": 3, "context": 8, "generator": dice.manual_seed(0)}
        losses = [trainer.step(*m.random_batch(text, **batch)) for _ in range(4)]
        return [*losses, *model.parameters(), trainer.rate()]

    def drawn(model):
        m.first_weights(model, num_layers=2)
        return torch.cat([p.flatten() for p in model.parameters()])  # the biases alone are 0

    def written(model, ids):
        return m.write(model, ids, new=6, context=5, temperature=0.0)

    text = torch.randint(41, (90,))
    return [
        (m.next_token_loss, Tiny(), text[None, :-1], text[None, 1:]),
        (trained, Tiny(), text),
        (drawn, Tiny()),
        (written, Tiny(), text[None, :7]),
        (lambda model, tokens: m.text_loss(model, tokens, context=8), Tiny(), text),
    ]
