import torch


def calls(m):
    text = m.Gemma3Config(
        vocab_size=101,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=7,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=14,
        sliding_window=4,
    )
    vision = m.SiglipVisionConfig(
        hidden_size=36,
        intermediate_size=52,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=33,
        patch_size=5,
        vision_use_head=False,
    )
    model = m.Gemma3Vision(m.Gemma3VisionConfig(text, vision, 9, 97, 98, image_token_index=99))
    for norm in model.modules():
        if isinstance(norm, m.UnitOffsetRMSNorm):
            torch.nn.init.normal_(norm.weight, std=0.2)
    image = [97, *[99] * 9, 98]
    ids = torch.tensor([[5, 6, *image, 7, *image, 8], [0, *range(20, 32), *image, 9, 5]])
    mask = (ids > 0).long()
    images = torch.randn(3, 3, 33, 33)
    words = ids.masked_fill(ids == 99, 98)
    return [
        (model, ids, images),
        (model, ids, images, mask),
        (model, words),
        (model, words, None, mask),
        (model.encode_images, images),
        (m.image_pairs, ids == 99, mask, 0),
        (m.image_pairs, ids[:, 13:] == 99, None, 13),
    ]
