import torch


def calls(m):
    config = m.DeepseekV2Config(
        vocab_size=101,
        hidden_size=40,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=5,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=10,
        qk_rope_head_dim=6,
        v_head_dim=7,
        first_k_dense_replace=1,
        moe_intermediate_size=20,
        n_routed_experts=12,
        num_experts_per_tok=3,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
    )
    ids, mask = torch.randint(101, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    model = m.DeepseekV2(config)
    return [(model, ids), (model, ids, mask)]
