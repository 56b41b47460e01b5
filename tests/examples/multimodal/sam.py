import torch


def calls(m):
    config = m.SamConfig(
        m.SamVisionConfig(
            hidden_size=24,
            output_channels=16,
            num_hidden_layers=2,
            num_attention_heads=3,
            image_size=28,
            patch_size=4,
            window_size=3,
            global_attn_indexes=(1,),
            num_pos_feats=8,
            mlp_dim=40,
        ),
        m.SamPromptEncoderConfig(
            hidden_size=16, image_size=28, patch_size=4, mask_input_channels=8
        ),
        m.SamMaskDecoderConfig(
            hidden_size=16, mlp_dim=36, num_attention_heads=2, iou_head_hidden_dim=20
        ),
    )
    x, points, boxes = torch.randn(2, 3, 28, 28), 28 * torch.rand(2, 3, 2, 2), torch.rand(2, 3, 4)
    labels, masks = torch.randint(2, (2, 3, 2)), torch.randn(2, 1, 28, 28)
    model = m.Sam(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "rel_pos" in name or "pos_embed" in name:
                weight.normal_()
    return [
        (model, x, points),
        (model, x, points, labels, 28 * boxes, masks),
        (model.vision_encoder, x),
        (model.upscale, masks, (50, 31), (28, 17)),
    ]
