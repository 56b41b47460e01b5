import torch


def calls(m):
    config = m.ViTConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=80,
        image_size=[25, 33],
        patch_size=[4, 6],
        num_labels=7,
    )
    model = m.ViT(config)
    with torch.no_grad():
        model.vit.embeddings.cls_token.normal_()
    patches = m.to_patches(torch.randn(2, 3, 12, 18), (4, 6))
    return [
        (model, torch.randn(2, 3, 25, 33)),
        (model, torch.randn(2, 3, 37, 19), True),
        (m.resample_positions, torch.randn(1, 13, 5), (3, 4), (5, 2)),
        (m.from_patches, patches, (3, 3), (4, 6)),
    ]
