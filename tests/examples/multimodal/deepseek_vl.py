import torch


def calls(m):
    text = m.TextConfig(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=14,
    )
    vision = m.VisionConfig(
        hidden_size=36,
        intermediate_size=52,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=20,
        patch_size=6,
        vision_use_head=False,
    )
    sam = m.HighResVisionConfig(
        hidden_size=24,
        output_channels=10,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=28,
        patch_size=4,
        window_size=3,
        global_attn_indexes=[1],
    )
    ids = torch.randint(10, 61, (2, 14))
    ids[0, 2:11] = ids[1, 5:14] = 7
    mask = torch.ones(2, 14, dtype=torch.long)
    mask[1, :3] = 0
    low, high = torch.randn(2, 3, 20, 20), torch.randn(2, 3, 28, 28)
    one = m.DeepseekVL(m.DeepseekVLConfig(text, vision, image_token_id=7))
    hybrid = m.DeepseekVLHybridConfig(
        text, vision, image_token_id=7, tie_word_embeddings=True, high_res_vision_config=sam
    )
    two = m.DeepseekVLHybrid(hybrid)
    with torch.no_grad():
        two.model.high_res_vision_alpha.fill_(0.3)
    words = torch.randint(10, 61, (1, 9))
    return [(one, ids, low), (one, ids, low, mask), (two, ids, low, mask, None, high), (two, words)]
