"""SigLIP against transformers, through checkpoint folders that transformers wrote."""

import dataclasses
import json
import math
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.testing import assert_close

from snippets.common.checkpoint import CheckpointError, parse_config
from snippets.multimodal.clip import layout
from snippets.multimodal.siglip import (
    SigLIP,
    SiglipConfig,
    SiglipTextConfig,
    SiglipVisionConfig,
    SiglipVisionTransformer,
    sigmoid_loss,
)
from tests.checkpoints import edit, redraw

IMAGES, J, T, V = 2, 3, 11, 99
TEXT = dict(
    vocab_size=V,
    hidden_size=48,
    intermediate_size=52,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=13,
)
VISION = dict(
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=4,
    num_attention_heads=6,
    image_size=30,  # three patches and a rest of 6
    patch_size=8,
)
CONFIGS = {
    "as published": ({}, {}),
    "other widths": ({"hidden_size": 36, "projection_size": 48}, {"num_attention_heads": 3}),
    "gelu, odd": ({"hidden_act": "gelu"}, {"hidden_act": "quick_gelu", "patch_size": 7}),
    "one channel": ({"num_hidden_layers": 1}, {"num_channels": 1, "num_hidden_layers": 2}),
    "large eps": ({"layer_norm_eps": 0.1}, {"layer_norm_eps": 0.2}),
}
SPECIAL = dict(bos_token_id=0, eos_token_id=1, pad_token_id=1)


def oracle(text=None, vision=None) -> transformers.SiglipModel:
    config = transformers.SiglipConfig(
        text_config=TEXT | SPECIAL | (text or {}), vision_config=VISION | (vision or {})
    )
    model = redraw(transformers.SiglipModel(config))
    with torch.no_grad():
        model.logit_scale.fill_(1.7)
        model.logit_bias.fill_(-2.3)
    return model


def inputs(channels: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.Generator().manual_seed(1)
    ids = torch.randint(3, V, (J, T), generator=drawn)
    ids[0, 6:] = ids[2, 9:] = 1  # padding, which is read
    return ids, torch.randn(IMAGES, channels, 30, 30, generator=drawn)


@pytest.fixture
def folder(tmp_path):
    oracle().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_logits_and_vectors_equal_transformers(changes, tmp_path):
    theirs = oracle(*changes)
    theirs.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = SigLIP.from_pretrained(tmp_path)
    assert not ours.training
    ids, images = inputs(changes[1].get("num_channels", 3))
    mask = torch.ones_like(ids)
    mask[0, 6:] = mask[1, :3] = mask[2, 4] = 0
    for padding in (None, mask):
        expected = theirs(input_ids=ids, pixel_values=images, attention_mask=padding)
        per_image, per_text = ours(input_ids=ids, pixel_values=images, attention_mask=padding)
        assert_close(per_image, expected.logits_per_image)
        assert_close(per_text, expected.logits_per_text)
        assert per_image.shape == (IMAGES, J) and per_image.std() > 0.05
        assert_close(ours.encode_text(ids, padding), expected.text_embeds)
        assert_close(ours.encode_image(images), expected.image_embeds)
        assert_close(ours.encode_text(ids).norm(dim=-1), torch.ones(J))
        tokens, pooled = ours.text_model(ids, padding)
        assert_close(tokens, expected.text_model_output.last_hidden_state)
        assert_close(pooled, expected.text_model_output.pooler_output)


@torch.no_grad()
def test_the_vision_tower_its_states_and_its_head(folder):
    ours, theirs = SigLIP.from_pretrained(folder), transformers.SiglipModel.from_pretrained(folder)
    _, images = inputs()
    expected = theirs.vision_model(images, output_hidden_states=True)
    tokens = ours.vision_model(images)
    assert_close(tokens, expected.last_hidden_state)
    assert_close(ours.vision_model.pool(tokens), expected.pooler_output)
    assert tokens.shape == (IMAGES, 9, 48) and len(expected.hidden_states) == 5
    for number in range(5):
        assert_close(ours.vision_model.states(images, number), expected.hidden_states[number])
        behind = ours.vision_model.states(images, number - 5)
        assert_close(behind, expected.hidden_states[number - 5])
    with pytest.raises(ValueError, match="no hidden state 5 of 5"):
        ours.vision_model.states(images, 5)


@pytest.mark.parametrize("size", [(30, 30), (16, 40), (50, 33), (24, 24), (8, 9)])
@torch.no_grad()
def test_images_of_other_sizes(folder, size):
    ours, theirs = SigLIP.from_pretrained(folder), transformers.SiglipModel.from_pretrained(folder)
    ids, _ = inputs()
    images = torch.randn(IMAGES, 3, *size, generator=torch.Generator().manual_seed(2))
    expected = theirs(ids, images, interpolate_pos_encoding=True).logits_per_image
    assert_close(ours(ids, images, interpolate_pos_encoding=True)[0], expected)


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.06), (torch.float16, 0.01)])
@torch.no_grad()
def test_half_precision(folder, dtype, bound):
    ours = SigLIP.from_pretrained(folder, dtype=dtype)
    assert {weight.dtype for weight in ours.parameters()} == {dtype}
    ids, images = inputs()
    theirs = transformers.SiglipModel.from_pretrained(folder, dtype=dtype)
    expected = theirs(ids, images).logits_per_image  # pixels stay float32
    found, exact = ours(ids, images)[0], SigLIP.from_pretrained(folder)(ids, images)[0]
    assert found.dtype == dtype
    # Both round at each step, in another order: no further from float32 than the reference, or
    # within the bound.
    error = (expected.float() - exact).abs().max()
    assert (found.float() - exact).abs().max() <= max(1.5 * error, bound)


# From the formulas


@torch.no_grad()
def test_pooling_by_the_query_step_by_step(folder):
    """From the weights of the file, one head at a time."""
    w = {k: v.double() for k, v in load_file(folder / "model.safetensors").items()}
    ours = SigLIP.from_pretrained(folder, dtype=torch.float64)
    x = ours.vision_model(inputs()[1].double())
    p = "vision_model.head."
    matrices, biases = w[p + "attention.in_proj_weight"], w[p + "attention.in_proj_bias"]
    found = ours.vision_model.pool(x)
    for image in range(IMAGES):
        heads = []
        for h in range(6):
            rows = [slice(48 * part + 8 * h, 48 * part + 8 * h + 8) for part in range(3)]
            q = matrices[rows[0]] @ w[p + "probe"][0, 0] + biases[rows[0]]
            k = x[image] @ matrices[rows[1]].T + biases[rows[1]]
            v = x[image] @ matrices[rows[2]].T + biases[rows[2]]
            heads.append((k @ q / 8**0.5).softmax(0) @ v)
        y = w[p + "attention.out_proj.weight"] @ torch.cat(heads)
        y = y + w[p + "attention.out_proj.bias"]
        z = (y - y.mean()) / ((y - y.mean()).pow(2).mean() + 1e-6).sqrt()
        z = z * w[p + "layernorm.weight"] + w[p + "layernorm.bias"]
        z = w[p + "mlp.fc1.weight"] @ z + w[p + "mlp.fc1.bias"]
        z = 0.5 * z * (1 + ((2 / math.pi) ** 0.5 * (z + 0.044715 * z**3)).tanh())
        y = y + w[p + "mlp.fc2.weight"] @ z + w[p + "mlp.fc2.bias"]
        assert_close(found[image], y)


@torch.no_grad()
def test_logits_are_scaled_cosines_and_a_bias(folder):
    ours, (ids, images) = SigLIP.from_pretrained(folder), inputs()
    per_image, per_text = ours(ids, images)
    for i in range(IMAGES):
        for j in range(J):
            # Each alone: no image and no text knows of the others in its batch.
            image, text = ours.encode_image(images[i : i + 1]), ours.encode_text(ids[j : j + 1])
            expected = math.exp(1.7) * F.cosine_similarity(image, text)[0] - 2.3
            assert_close(per_image[i, j], expected)
            assert_close(per_text[j, i], expected)


@torch.no_grad()
def test_a_text_is_read_off_its_last_position_looking_both_ways(folder):
    ours, (ids, _) = SigLIP.from_pretrained(folder), inputs()
    tokens, pooled = ours.text_model(ids)
    assert_close(pooled, ours.text_model.head(tokens[:, -1]))
    changed = ids.clone()
    changed[:, -1] = 7
    moved = (ours.text_model(changed)[0] - tokens).abs().amax(-1)
    assert (moved > 1e-4).all()  # also the first token saw the last


# The loss


def test_the_loss_equals_transformers(folder):
    ours, theirs = SigLIP.from_pretrained(folder), transformers.SiglipModel.from_pretrained(folder)
    ids, images = inputs()
    images = torch.cat((images, -images[:1]))
    expected = theirs(ids, images, return_loss=True)
    found = sigmoid_loss(ours(ids, images)[1])
    assert_close(found, expected.loss)
    expected.loss.backward()
    found.backward()
    expected = dict(theirs.named_parameters())
    for name, weight in ours.named_parameters():
        assert_close(weight.grad, expected[name].grad, atol=1e-5, rtol=1e-4)


def test_the_loss_by_loops():
    logits = 3 * torch.randn(5, 5, generator=torch.Generator().manual_seed(4))
    total = 0.0
    for j in range(5):
        for i in range(5):
            probability = 1 / (1 + math.exp(-logits[j, i]))
            total -= math.log(probability if i == j else 1 - probability)
    assert_close(sigmoid_loss(logits).item(), total / 5, rtol=1e-6, atol=0)
    assert_close(sigmoid_loss(torch.zeros(7, 7)).item(), 7 * math.log(2))
    # -log sigmoid(-x) is x for large x, where 1 - sigmoid is 0 in float32.
    assert_close(sigmoid_loss(torch.full((2, 2), 200.0)).item(), 200.0)
    with pytest.raises(ValueError, match="5 texts and 4 images are no pairs"):
        sigmoid_loss(logits[:, :4])


def test_where_training_starts():
    """exp(t') = 10 and b = -10 (section 3.2 of the paper): no pair is thought to belong."""
    torch.manual_seed(0)
    model = SigLIP(SiglipConfig(SiglipTextConfig(**TEXT), SiglipVisionConfig(**VISION)))
    assert_close(model.logit_scale.exp(), torch.tensor([10.0]))
    assert_close(model.logit_bias, torch.tensor([-10.0]))
    ids, images = inputs()
    loss = sigmoid_loss(model(ids, torch.cat((images, images[:1])))[1])
    with torch.no_grad():
        model.logit_bias.zero_()
    assert loss < 20 and sigmoid_loss(model(ids, torch.cat((images, images[:1])))[1].detach()) < 40


@pytest.mark.parametrize("ours", [SiglipTextConfig, SiglipVisionConfig])
def test_what_a_config_leaves_out_is_as_in_transformers(ours):
    theirs = getattr(transformers, ours.__name__)()
    left_out = dataclasses.asdict(ours())
    if left_out.pop("projection_size", 0) is None:
        assert ours().pooled_size == theirs.projection_size
    assert left_out == {name: getattr(theirs, name) for name in left_out}


# What is refused


@pytest.mark.parametrize("shape", [(2, 3, 30, 31), (2, 3, 29, 30), (2, 1, 30, 30), (2, 3, 10, 90)])
def test_images_of_another_shape_are_refused(folder, shape):
    said = rf"shape \({', '.join(map(str, shape))}\), the config wants b images of 3x30x30"
    ours, images = SigLIP.from_pretrained(folder), torch.zeros(shape)
    tower, ids = ours.vision_model, inputs()[0]
    for see in (
        ours.encode_image,
        tower,
        tower.embeddings,
        lambda images: tower.states(images, -1),
        lambda images: ours(ids, images),
    ):
        with pytest.raises(ValueError, match=said):
            see(images)


def test_images_below_one_patch_are_refused(folder):
    with pytest.raises(ValueError, match=r"\(1, 3, 7, 30\), .* 3x30x30 or another size"):
        SigLIP.from_pretrained(folder).encode_image(
            torch.zeros(1, 3, 7, 30), interpolate_pos_encoding=True
        )


def test_texts_that_do_not_fit_are_refused(folder, unchecked):
    ours = SigLIP.from_pretrained(folder)
    with pytest.raises(
        ValueError, match="texts of 14 tokens, the config has positions for 1 to 13"
    ):
        ours.encode_text(torch.full((1, 14), 3))
    with pytest.raises(ValueError, match=r"mask of shape \(3, 10\), for b=3 s=11"):
        ours.encode_text(inputs()[0], torch.ones(3, 10))


REFUSED = [
    ({"vision_config": {"hidden_size": 50}}, "vision_config: uneven: hidden_size=50"),
    ({"vision_config": {"vision_use_head": 1}}, "vision_config: vision_use_head=1 isn't of type"),
    ({"vision_config": {"vision_use_head": False}}, "vision_use_head=False: an image has no"),
    ({"text_config": {"hidden_act": "mish"}}, "text_config: hidden_act='mish' isn't supported"),
    ({"text_config": {"projection_size": 20}}, "texts end in 20 features, images in 48"),
    ({"text_config": {"projection_size": 0}}, "text_config: projection_size=0 is below 1"),
    ({"model_type": "clip"}, "model_type='clip' isn't supported; this class reads 'siglip'"),
]


@pytest.mark.parametrize("changes, said", REFUSED)
def test_a_config_that_cannot_be_honoured_is_refused(folder, changes, said):
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        edit(folder, **{key: config[key] | value if isinstance(value, dict) else value})
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{said}"):
        SigLIP.from_pretrained(folder)


@pytest.mark.parametrize("ours", [SiglipTextConfig, SiglipVisionConfig, SiglipConfig])
def test_a_config_cannot_be_edited_behind_its_checks(ours):
    with pytest.raises(dataclasses.FrozenInstanceError):
        ours().hidden_size = 0


def test_a_common_space_of_one_feature_is_a_space():
    assert SiglipTextConfig(projection_size=1).pooled_size == 1


def test_what_is_said_of_a_tie_changes_nothing(folder):
    config = json.loads((folder / "config.json").read_text())
    tie = {"tie_word_embeddings": True}
    edit(folder, **tie, **{k: config[k] | tie for k in ("text_config", "vision_config")})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SigLIP.from_pretrained(folder)


# Files


@torch.no_grad()
def test_counters_of_older_files_are_dropped_by_name(folder):
    before = SigLIP.from_pretrained(folder).encode_image(inputs()[1])
    tensors = load_file(folder / "model.safetensors")
    tensors["text_model.embeddings.position_ids"] = torch.arange(13)[None]
    tensors["vision_model.embeddings.position_ids"] = torch.arange(9)[None]
    save_file(tensors, folder / "model.safetensors")
    assert torch.equal(SigLIP.from_pretrained(folder).encode_image(inputs()[1]), before)
    del tensors["vision_model.head.probe"]
    save_file(tensors | {"spare": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: vision_model.head.probe; unexpected: spa"):
        SigLIP.from_pretrained(folder)


@torch.no_grad()
def test_a_tower_without_its_head(tmp_path):
    """As in Gemma 3, from a part of its config and both layouts of its files."""
    config = transformers.SiglipVisionConfig(**VISION, vision_use_head=False)
    theirs = redraw(transformers.SiglipVisionModel(config))
    part = config.to_dict() | {"vision_use_head": False, "model_type": "siglip_vision_model"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = parse_config(part, SiglipVisionConfig, source="config.json: vision_config")
    assert found == SiglipVisionConfig(**VISION, vision_use_head=False)
    ours = SiglipVisionTransformer(found)
    assert not hasattr(ours, "head")
    for level in ("", "vision_model."):
        tensors = {f"vision_tower.{level}{n}": w for n, w in theirs.state_dict().items()}
        tower = layout(tensors, "vision_tower.")
        ours.load_state_dict({n.removeprefix("vision_tower."): w for n, w in tower.items()})
        tokens = ours(inputs()[1])
        assert_close(tokens, theirs(inputs()[1]).last_hidden_state)
    with pytest.raises(ValueError, match="vision_use_head=False: this tower has no head"):
        ours.pool(tokens)


# https://github.com/mlfoundations/open_clip/blob/main/docs/model_profile.csv prints, in millions,
# total, image and text (ViT-B-16-SigLIP, ViT-SO400M-14-SigLIP and -384). The first SO400M reads 16
# tokens of text, the second 64.
SO400M = dict(
    hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16
)


@pytest.mark.parametrize(
    "text, vision, printed",
    [
        ({}, {}, (203.16, 92.88, 110.27)),
        (
            SO400M | {"max_position_embeddings": 16},
            SO400M | {"patch_size": 14},
            (877.36, 427.68, 449.68),
        ),
        (SO400M, SO400M | {"image_size": 384, "patch_size": 14}, (877.96, 428.23, 449.73)),
    ],
    ids=["base-patch16-224", "so400m-patch14-224", "so400m-patch14-384"],
)
def test_full_sizes_have_the_published_number_of_parameters(text, vision, printed):
    with torch.device("meta"):
        model = SigLIP(SiglipConfig(SiglipTextConfig(**text), SiglipVisionConfig(**vision)))
    image, words, total = (
        sum(weight.numel() for weight in part.parameters())
        for part in (model.vision_model, model.text_model, model)
    )
    assert image + words + 2 == total
    assert tuple(round(n / 1e6, 2) for n in (total, image, words)) == printed
