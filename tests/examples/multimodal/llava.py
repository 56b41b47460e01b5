import torch


def calls(m):
    config = m.LlavaConfig(
        text_config=m.LlavaTextConfig(
            vocab_size=101,
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
        ),
        vision_config=m.CLIPVisionConfig(
            hidden_size=40,
            intermediate_size=56,
            num_hidden_layers=3,
            num_attention_heads=5,
            image_size=20,
            patch_size=8,
        ),
        image_token_index=97,
    )
    ids = torch.tensor([[1, 97, 97, 97, 97, 5, 6], [0, 0, 97, 97, 97, 97, 9]])
    mask, images = (ids != 0).long(), torch.randn(2, 3, 20, 20)
    model = m.Llava(config)
    return [
        (model, ids, images, mask),
        (model, ids[:, 6:]),
        (m.text_labels, ids, 97, mask),
        (m.merge_images, ids, torch.randn(2, 7, 8), torch.randn(2, 4, 8), 97),
    ]
