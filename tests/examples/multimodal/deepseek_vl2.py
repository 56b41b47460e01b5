import torch


def calls(m):
    moe = dict(moe_intermediate_size=20, n_routed_experts=12, num_experts_per_tok=3)
    sizes = dict(hidden_size=40, num_attention_heads=5, intermediate_size=72, vocab_size=101)
    latent = dict(q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=10, qk_rope_head_dim=6)
    kinds = [
        dict(use_mla=False, q_lora_rank=None, kv_lora_rank=None, qk_rope_head_dim=0),
        latent | dict(v_head_dim=7, scoring_func="sigmoid", topk_method="noaux_tc"),
    ]
    tower = m.VisionConfig(image_size=45, patch_size=6, width=24, layers=2, heads=3)
    tiles, found = [(2, 1), (1, 1)], []
    tokens = [m.num_image_tokens(*grid, side=4) for grid in tiles]
    ids = torch.randint(99, (2, max(tokens) + 5))
    mask = torch.ones_like(ids)
    for row, count in zip(ids, tokens, strict=True):
        row[-count - 2 : -2] = 99
    mask[1, : tokens[0] - tokens[1]] = 0
    views = torch.randn(5, 3, 45, 45)
    for kind in kinds:
        config = m.DeepseekVL2Config(
            m.LanguageConfig(num_hidden_layers=2, first_k_dense_replace=1, **sizes, **moe, **kind),
            tower,
            m.ProjectorConfig(input_dim=24, n_embed=40),
            image_token_id=99,
        )
        model = m.DeepseekVL2(config)
        found += [(model, ids, views, tiles), (model, ids, views, tiles, mask)]
    return found
