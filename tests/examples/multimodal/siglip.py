import torch


def calls(m):
    text = m.SiglipTextConfig(
        vocab_size=61,
        hidden_size=36,
        intermediate_size=52,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=13,
        projection_size=48,
    )
    sizes = dict(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        image_size=30,
        patch_size=8,
    )
    model = m.SigLIP(m.SiglipConfig(text, m.SiglipVisionConfig(**sizes)))
    tower = m.SiglipVisionTransformer(m.SiglipVisionConfig(**sizes, vision_use_head=False))
    ids, mask = torch.randint(60, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[1, 7:] = 0
    images = torch.randn(2, 3, 30, 30)

    def stretched(x):
        return tower(x, interpolate_pos_encoding=True)

    return [
        (model, ids, images),
        (model, ids, images, mask),
        (tower, images),
        (stretched, torch.randn(2, 3, 25, 41)),
        (m.sigmoid_loss, torch.randn(5, 5)),
    ]
