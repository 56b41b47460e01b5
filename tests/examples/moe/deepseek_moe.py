import torch


def calls(m):
    sizes = {"hidden_size": 24, "moe_intermediate_size": 40, "n_routed_experts": 20}
    sizes |= {"num_experts_per_tok": 6, "n_group": 5, "topk_group": 3, "n_shared_experts": 2}
    v2 = m.DeepseekMoE(**sizes, topk_method="group_limited_greedy", routed_scaling_factor=2.5)
    v3 = m.DeepseekMoE(**sizes, scoring_func="sigmoid", topk_method="noaux_tc", norm_topk_prob=True)
    v3.gate.e_score_correction_bias.copy_(0.5 * torch.randn(20))
    load = torch.rand(20)
    return [
        (v2, torch.randn(2, 7, 24)),
        (v3, torch.randn(2, 7, 24)),
        (v3.gate, torch.randn(7, 24)),
        (m.balanced_bias, torch.randn(20), load),
        (m.max_violation, load),
    ]
