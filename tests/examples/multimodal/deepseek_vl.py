import torch


def calls(m):
    text = m.TextConfig(
        vocab_size=101,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
    )
    vision = m.VisionConfig(
        hidden_size=40,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=5,
        image_size=20,
        patch_size=8,
    )
    sam = m.HighResVisionConfig(
        hidden_size=36,
        output_channels=10,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=44,
        patch_size=4,
        window_size=4,
        global_attn_indexes=[1],
    )
    ids = torch.tensor([[1, 97, 97, 97, 97, 5, 6], [0, 0, 97, 97, 97, 97, 9]])
    mask, images = (ids != 0).long(), torch.randn(2, 3, 20, 20)
    one = m.DeepseekVL(
        m.DeepseekVLConfig(text, vision, image_token_id=97, tie_word_embeddings=False)
    )
    two = m.DeepseekVLHybrid(
        m.DeepseekVLHybridConfig(
            text, vision, image_token_id=97, tie_word_embeddings=True, high_res_vision_config=sam
        )
    )
    torch.nn.init.constant_(two.model.high_res_vision_alpha, 0.3)
    return [
        (one, ids, images, mask),
        (two, ids, images, mask, None, torch.randn(2, 3, 44, 44)),
        (two, ids[:, 6:]),
    ]
