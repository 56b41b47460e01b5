import torch


def calls(m):
    text = m.CLIPTextConfig(
        vocab_size=61,
        hidden_size=36,
        intermediate_size=52,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=13,
        eos_token_id=60,
    )
    sizes = dict(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        image_size=30,
        patch_size=8,
    )
    model = m.CLIP(m.CLIPConfig(text, m.CLIPVisionConfig(**sizes), 20))
    ids, mask = torch.randint(60, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    ids[:, 6] = 60
    mask[1, 7:] = 0
    images = torch.randn(2, 3, 30, 30)

    def early(x):
        return model.vision_model.states(x, -2)

    def stretched(x):
        return model.vision_model(x, interpolate_pos_encoding=True)

    return [
        (model, ids, images),
        (model, ids, images, mask),
        (early, images),
        (stretched, torch.randn(2, 3, 25, 41)),
        (m.contrastive_loss, torch.randn(5, 5)),
    ]
