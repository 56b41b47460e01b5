import torch


def calls(m):
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_experts": 6, "num_experts_per_tok": 3}
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    logits = torch.randn(14, 6)
    return [
        (m.MixtureOfExperts(**sizes), torch.randn(2, 7, 24)),
        (m.MixtureOfExperts(**sizes, capacity_factor=0.9), torch.randn(2, 7, 24), mask),
        (lambda logits: m.load_balancing_loss(logits, 3), logits),
        (m.router_z_loss, logits),
    ]
