"""SAM against transformers, through checkpoint folders that transformers wrote."""

import pytest
import torch
import transformers
from torch.testing import assert_close
from transformers import SamModel, SamVisionModel

from snippets.common.checkpoint import CheckpointError
from snippets.multimodal.sam import SamVisionConfig, SamVisionEncoder
from tests.checkpoints import edit, redraw

VISION = dict(
    hidden_size=24,
    output_channels=16,
    num_hidden_layers=4,
    num_attention_heads=3,
    image_size=28,  # 7 tokens on a side
    patch_size=4,
    window_size=3,
    global_attn_indexes=[1, 3],
    num_pos_feats=8,
    mlp_dim=40,
)
ENCODERS = {
    "both kinds of layers": {},
    "window of 5": {"window_size": 5, "global_attn_indexes": [2]},
    "window wider than the image": {"window_size": 9, "global_attn_indexes": [0]},
    "windows fit": {"image_size": 24, "window_size": 2},
    "a rest of pixels": {"image_size": 30},
    "all global": {"global_attn_indexes": [0, 1, 2, 3]},
    "window 0": {"window_size": 0},
    "all windowed": {"global_attn_indexes": []},
    "no relative positions": {"use_rel_pos": False},
    "no absolute positions": {"use_abs_pos": False},
    "no biases, large eps": {"qkv_bias": False, "layer_norm_eps": 0.1},
    "mlp_ratio, relu": {"mlp_dim": None, "mlp_ratio": 1.7, "hidden_act": "relu"},
    "one channel": {"num_channels": 1, "num_attention_heads": 2},
}


def picture(b: int = 2, side: int = 28, channels: int = 3, seed: int = 5) -> torch.Tensor:
    drawn = torch.Generator().manual_seed(seed)
    return torch.randn(b, channels, side, side, generator=drawn)


def vision_oracle(**changes) -> SamVisionModel:
    return redraw(SamVisionModel(transformers.SamVisionConfig(**(VISION | changes))))


@pytest.fixture
def vision_folder(tmp_path):
    vision_oracle().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("changes", ENCODERS.values(), ids=ENCODERS)
@torch.no_grad()
def test_the_encoder_equals_transformers(changes, tmp_path):
    theirs = vision_oracle(**changes)
    theirs.save_pretrained(tmp_path)
    ours = SamVisionEncoder.from_pretrained(tmp_path)
    x = picture(3, ours.config.image_size, ours.config.num_channels)
    expected = theirs(x, output_hidden_states=True)
    assert expected.last_hidden_state.std() > 0.1
    assert_close(ours(pixel_values=x), expected.last_hidden_state)
    for layer in range(4):
        state = expected.hidden_states[layer + 1]
        assert_close(ours.states(x, layer), state)
        assert_close(ours.states(x, layer - 4), state)
        output, inner = ours.forward_with_state(x, layer)
        assert torch.equal(output, ours(x)) and torch.equal(inner, ours.states(x, layer))


@torch.no_grad()
def test_the_encoder_is_read_from_a_whole_sam_and_from_bare_names(tmp_path):
    whole = redraw(
        SamModel(
            transformers.SamConfig(
                vision_config=VISION,
                prompt_encoder_config=dict(
                    hidden_size=16, image_size=28, patch_size=4, mask_input_channels=8
                ),
                mask_decoder_config=dict(hidden_size=16, num_attention_heads=2),
            )
        )
    )
    whole.save_pretrained(tmp_path / "whole")
    whole.vision_encoder.save_pretrained(tmp_path / "bare")
    expected = whole.get_image_embeddings(picture())
    for name in ("whole", "bare"):
        ours = SamVisionEncoder.from_pretrained(tmp_path / name)
        assert_close(ours(picture()), expected)


REFUSED = [
    ({"hidden_act": "swish2"}, "hidden_act='swish2' isn't supported"),
    ({"num_attention_heads": 5}, "uneven: hidden_size=24, num_attention_heads=5"),
    ({"num_hidden_layers": 0}, "num_hidden_layers=0 is below 1"),
    ({"patch_size": 29}, "no patch: image_size=28, patch_size=29"),
    ({"image_size": [28, 28]}, r"image_size=\[28, 28\] isn't of type int"),
    ({"window_size": -1}, "window_size=-1 is below 0"),
    ({"mlp_dim": 0}, "mlp_dim=0 is below 1"),
    ({"global_attn_indexes": ["2"]}, r"global_attn_indexes=\['2'\] aren't whole numbers"),
    ({"model_type": "sam2"}, "model_type='sam2' isn't supported"),
]


@pytest.mark.parametrize("changes, said", REFUSED)
def test_an_encoder_that_cannot_be_honoured_is_refused(vision_folder, changes, said):
    edit(vision_folder, **changes)
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{said}"):
        SamVisionEncoder.from_pretrained(vision_folder)


def test_wrong_pictures_and_layers_are_refused(vision_folder):
    ours = SamVisionEncoder.from_pretrained(vision_folder)
    for shape in ((2, 1, 28, 28), (2, 3, 28, 32), (2, 3, 32, 32)):
        with pytest.raises(ValueError) as error:
            ours(torch.zeros(shape))
        assert f"{shape}" in str(error.value) and "(b, 3, 28, 28)" in str(error.value)
    for layer in (4, -5):
        with pytest.raises(ValueError, match=f"there is no layer {layer} among 4"):
            ours.states(picture(), layer)
        with pytest.raises(ValueError, match=f"there is no layer {layer} among 4"):
            ours.forward_with_state(picture(), layer)


# Without the decoder's and the prompt encoder's: https://github.com/facebookresearch/segment-anything
@pytest.mark.parametrize(
    "parameters, hidden, layers, heads, seeing",
    [
        (89_670_912, 768, 12, 12, (2, 5, 8, 11)),
        (308_278_272, 1024, 24, 16, (5, 11, 17, 23)),
        (637_026_048, 1280, 32, 16, (7, 15, 23, 31)),
    ],
    ids=["B", "L", "H"],
)
def test_full_encoders_have_the_published_number_of_parameters(
    parameters, hidden, layers, heads, seeing
):
    with torch.device("meta"):
        model = SamVisionEncoder(
            SamVisionConfig(
                hidden_size=hidden,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                global_attn_indexes=seeing,
            )
        )
    assert sum(p.numel() for p in model.parameters()) == parameters
