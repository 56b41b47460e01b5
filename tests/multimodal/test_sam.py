"""SAM against transformers, through checkpoint folders that transformers wrote."""

import inspect
import itertools
import json
import math

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import SamModel, SamVisionModel
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from snippets.common.checkpoint import CheckpointError
from snippets.multimodal.sam import (
    Sam,
    SamConfig,
    SamVisionConfig,
    SamVisionEncoder,
    from_windows,
    to_windows,
)
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


def louder(model):
    """Larger weights where it shows: attention prefers some keys, and masks aren't flat."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "rel_pos" in name or name.startswith(("mask_decoder", "prompt_encoder")):
                weight.mul_(1 if "norm" in name else 2)
    return model


def vision_oracle(**changes) -> SamVisionModel:
    return louder(redraw(SamVisionModel(transformers.SamVisionConfig(**(VISION | changes)))))


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
        output, inner = ours.forward_with_state(x, layer)
        assert torch.equal(output, ours(x)) and torch.equal(inner, ours.states(x, layer))


PROMPT = dict(hidden_size=16, image_size=28, patch_size=4, mask_input_channels=8)
DECODER = dict(hidden_size=16, mlp_dim=36, num_attention_heads=2, iou_head_hidden_dim=20)
SAMS = {
    "as published": ({}, {}, {}),
    "four masks, three layers": ({}, {}, dict(num_multimask_outputs=4, num_hidden_layers=3)),
    "one layer, deep scores": ({}, {}, dict(num_hidden_layers=1, iou_head_depth=5)),
    "shallow scores, gelu": (
        {},
        dict(hidden_act="relu"),
        dict(iou_head_depth=2, hidden_act="gelu"),
    ),
    "last attention narrower": ({}, {}, dict(attention_downsample_rate=4)),
    "large eps": ({}, dict(layer_norm_eps=0.3), dict(layer_norm_eps=0.2)),
    "more kinds of points": ({}, dict(num_point_embeddings=6, mask_input_channels=12), {}),
    "prompts in other pixels": ({}, dict(image_size=14, patch_size=2), {}),
}


def sam_oracle(vision=(), prompt=(), decoder=()) -> SamModel:
    config = transformers.SamConfig(
        vision_config=VISION | dict(vision),
        prompt_encoder_config=PROMPT | dict(prompt),
        mask_decoder_config=DECODER | dict(decoder),
    )
    return louder(redraw(SamModel(config)))


@pytest.fixture
def folder(tmp_path):
    sam_oracle().save_pretrained(tmp_path)
    return tmp_path


def draw(*shape: int, seed: int = 9) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


POINTS = 28 * draw(2, 3, 4, 2)
LABELS = torch.tensor([1, 0, -1, -10, 1, 1, 0, 0, -10, -10, 1, -1] * 2).view(2, 3, 4).roll(1, 0)
BOXES = 28 * draw(2, 3, 4, seed=10)
MASKS = 4 * draw(2, 1, 28, 28, seed=11) - 2
PROMPTS = {
    "points": dict(input_points=POINTS),
    "points, labels": dict(input_points=POINTS, input_labels=LABELS),
    "one point": dict(input_points=POINTS[:, :1, :1], input_labels=LABELS[:, :1, :1]),
    "boxes": dict(input_boxes=BOXES),
    "points, boxes": dict(input_points=POINTS, input_labels=LABELS, input_boxes=BOXES),
    "mask": dict(input_masks=MASKS),
    "one mask for all": dict(input_masks=MASKS[:1]),
    "all": dict(input_points=POINTS, input_labels=LABELS, input_boxes=BOXES, input_masks=MASKS),
    "nothing": {},
}


@torch.no_grad()
def same_masks(ours, theirs, **inputs) -> None:
    expected = theirs(**inputs)
    assert min(expected.pred_masks.std(), expected.iou_scores.std()) > 0.08
    masks, scores = ours(**inputs)
    # Sums of products of numbers around 10, of which single ones are 1e-6 apart.
    assert_close(masks, expected.pred_masks, atol=3e-5, rtol=1e-5)
    assert_close(scores, expected.iou_scores)


@pytest.mark.parametrize("changes", SAMS.values(), ids=SAMS)
def test_masks_and_scores_equal_transformers(changes, tmp_path):
    theirs = sam_oracle(*changes)
    theirs.save_pretrained(tmp_path)
    ours = Sam.from_pretrained(tmp_path)
    same_masks(ours, theirs, pixel_values=picture(), **PROMPTS["all"])
    same_masks(ours, theirs, pixel_values=picture(), **PROMPTS["points, labels"])


@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("given", PROMPTS.values(), ids=PROMPTS)
def test_every_kind_of_prompt(given, multimask, whole):
    ours, theirs, seen = whole
    same_masks(ours, theirs, image_embeddings=seen, multimask_output=multimask, **given)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Ours, theirs, and the encoder's output for two pictures."""
    folder = tmp_path_factory.mktemp("whole")
    theirs = sam_oracle()
    theirs.save_pretrained(folder)
    return Sam.from_pretrained(folder), theirs, theirs.get_image_embeddings(picture())


@torch.no_grad()
def test_the_encoder_is_read_from_a_whole_sam_and_from_bare_names(tmp_path, whole):
    _, theirs, expected = whole
    theirs.save_pretrained(tmp_path / "whole")
    theirs.vision_encoder.save_pretrained(tmp_path / "bare")
    for name in ("whole", "bare"):
        ours = SamVisionEncoder.from_pretrained(tmp_path / name)
        assert_close(ours(picture()), expected)


@torch.no_grad()
def test_one_reading_serves_many_prompts(whole):
    ours, _, seen = whole
    at_once, scores = ours(picture(), POINTS, LABELS, BOXES)
    for p in range(3):
        one = slice(p, p + 1)
        given = POINTS[:, one], LABELS[:, one], BOXES[:, one]
        alone, score = ours(None, *given, image_embeddings=seen)
        assert_close(alone, at_once[:, one])
        assert_close(score, scores[:, one])
    assert_close(ours(picture(), POINTS)[0], ours(picture(), POINTS, LABELS.new_ones(2, 3, 4))[0])
    assert at_once.shape == (2, 3, 3, 28, 28) and scores.shape == (2, 3, 3)


@torch.no_grad()
def test_the_order_of_points_is_nothing_and_their_sides_are(whole):
    ours, _, seen = whole
    turned = ours(None, POINTS.flip(2), LABELS.flip(2), image_embeddings=seen)
    found = ours(None, POINTS, LABELS, image_embeddings=seen)
    for a, b in zip(turned, found, strict=True):
        assert_close(a, b, atol=3e-5, rtol=1e-5)
    swapped = ours(None, POINTS.flip(-1), LABELS, image_embeddings=seen)
    assert (swapped[0] - found[0]).abs().max() > 0.1


@torch.no_grad()
def test_a_place_by_its_formula(whole):
    """sin and cos of 2 pi times a random direction, coordinates from -1 to 1; x before y."""
    ours, _, _ = whole
    features, encoder = ours.shared_image_embedding, ours.prompt_encoder
    matrix, (x, y) = features.positional_embedding, (9.0, 20.0)
    u, v = 2 * (x + 0.5) / 28 - 1, 2 * (y + 0.5) / 28 - 1
    angles = [2 * math.pi * (u * a + v * b) for a, b in matrix.T.tolist()]
    expected = torch.tensor([math.sin(z) for z in angles] + [math.cos(z) for z in angles])
    assert_close(encoder.place(torch.tensor([[[[x, y]]]]), features)[0, 0, 0], expected)
    # The middle of the patch in row 5 and column 2 is pixel (9.5, 21.5).
    middle = encoder.place(torch.tensor([[[[9.5, 21.5]]]]), features)[0, 0, 0]
    assert_close(features.grid(7)[:, 5, 2], middle)
    tokens = encoder.points(
        torch.tensor([[[[x, y]] * 4]]), torch.tensor([[[1, 0, -1, -10]]]), features
    )[0, 0]
    embed = [kind.weight[0] for kind in encoder.point_embed]
    assert_close(tokens[0], expected + embed[1])
    assert_close(tokens[1], expected + embed[0])
    assert torch.equal(tokens[2], encoder.not_a_point_embed.weight[0])
    assert not tokens[3].any()


def by_hand(attention, x: torch.Tensor) -> torch.Tensor:
    """Attention of one grid, h w d, one pair of tokens after the other, from the formula."""
    h, w, d = x.shape
    n, k = attention.num_heads, d // attention.num_heads
    q, key, v = attention.qkv(x).view(h, w, 3, n, k).unbind(2)
    tokens = [(i, j) for i in range(h) for j in range(w)]
    output = torch.zeros(h, w, n, k)
    for head in range(n):
        for i, j in tokens:
            mine = q[i, j, head]
            scores = torch.stack(
                [
                    mine @ key[r, c, head] / k**0.5
                    + mine @ attention.rel_pos_h[i - r + h - 1]
                    + mine @ attention.rel_pos_w[j - c + w - 1]
                    for r, c in tokens
                ]
            )
            weights = scores.softmax(0)
            output[i, j, head] = sum(
                a * v[r, c, head] for a, (r, c) in zip(weights, tokens, strict=True)
            )
    return attention.proj(output.flatten(2))


@torch.no_grad()
def test_attention_by_hand(whole):
    vision = whole[0].vision_encoder
    x = draw(2, 3, 3, 24, seed=3) - 0.5
    attention = vision.layers[0].attn  # of windows of 3
    assert_close(attention(x), torch.stack([by_hand(attention, one) for one in x]))
    x = draw(7, 7, 24, seed=4) - 0.5
    attention = vision.layers[1].attn  # of the whole image
    assert_close(attention(x[None])[0], by_hand(attention, x))


@torch.no_grad()
def test_windows_by_hand(whole):
    """Each window alone, with zeros behind the norm where the image ends."""
    layer = whole[0].vision_encoder.layers[0]
    x = draw(2, 7, 7, 24, seed=6) - 0.5
    normed, y = layer.layer_norm1(x), x.clone()
    for b, top, left in itertools.product(range(2), range(0, 7, 3), range(0, 7, 3)):
        here = normed[b, top : top + 3, left : left + 3]
        h, w = here.shape[:2]
        full = torch.zeros(3, 3, 24)
        full[:h, :w] = here
        y[b, top : top + 3, left : left + 3] += layer.attn(full[None])[0, :h, :w]
    assert_close(layer(x), y + layer.mlp(layer.layer_norm2(y)))


@pytest.mark.parametrize("b, h, w, side", [(2, 7, 5, 3), (1, 4, 6, 2), (3, 2, 3, 5), (2, 1, 9, 4)])
def test_windows_and_back(b, h, w, side):
    x = torch.arange(1.0, 1 + b * h * w * 2).view(b, h, w, 2)
    windows = to_windows(x, side)
    rows, columns = -(-h // side), -(-w // side)
    assert windows.shape == (b * rows * columns, side, side, 2)
    assert torch.equal(from_windows(windows, h, w), x)
    assert (windows == 0).sum() == 2 * b * (rows * columns * side**2 - h * w)
    for number, window in enumerate(windows):
        place = number % (rows * columns)
        top, left = place // columns * side, place % columns * side
        image = x[number // (rows * columns)]
        for i, j in itertools.product(range(side), range(side)):
            inside = top + i < h and left + j < w
            assert torch.equal(window[i, j], image[top + i, left + j] if inside else 0 * x[0, 0, 0])


@pytest.mark.parametrize("h, w", [(7, 7), (9, 5), (4, 12), (1, 2)])
@torch.no_grad()
def test_tables_for_another_size_are_stretched_as_in_transformers(whole, h, w):
    ours, theirs, _ = whole
    x = draw(2, h, w, 24, seed=h) - 0.5
    expected, _ = theirs.vision_encoder.layers[1].attn(x)
    assert_close(ours.vision_encoder.layers[1].attn(x), expected)


@pytest.mark.parametrize(
    "original, reshaped", [((50, 31), (28, 17)), ((9, 40), (6, 28)), ((28, 28), (28, 28))]
)
def test_masks_at_the_size_of_the_picture(whole, original, reshaped):
    masks = 8 * draw(3, 2, 28, 28) - 4
    processor = SamImageProcessorPil(pad_size={"height": 28, "width": 28})
    [expected] = processor.post_process_masks([masks], [original], [reshaped], binarize=False)
    found = whole[0].upscale(masks, original, reshaped)
    assert found.shape == (3, 2, *original)
    assert_close(found, expected)


@torch.no_grad()
def test_masks_coarser_than_the_picture(tmp_path):
    """The square is that of the encoder's pixels, not of the mask's."""
    sam_oracle(vision={"image_size": 56, "patch_size": 8}).save_pretrained(tmp_path)
    ours, masks = Sam.from_pretrained(tmp_path), 8 * draw(1, 3, 28, 28) - 4
    processor = SamImageProcessorPil(pad_size={"height": 56, "width": 56})
    [expected] = processor.post_process_masks([masks], [(70, 100)], [(39, 56)], binarize=False)
    assert_close(ours.upscale(masks, (70, 100), (39, 56)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(folder, dtype):
    """As close to transformers in half as transformers is to itself in single precision."""

    def theirs(dtype):
        model = SamModel.from_pretrained(folder, dtype=dtype)
        found = model(picture().to(dtype), **PROMPTS["points, boxes"])
        return found.pred_masks, found.iou_scores

    ours = Sam.from_pretrained(folder, dtype=dtype)(picture().to(dtype), **PROMPTS["points, boxes"])
    for found, half, single in zip(ours, theirs(dtype), theirs(torch.float32), strict=True):
        assert found.dtype == dtype
        apart, rounding = (found - half).float(), half - single
        assert apart.norm() < 1.5 * rounding.norm()  # two independent roundings: √2
        assert apart.abs().max() < 2 * rounding.abs().max()


def test_frequencies_under_either_name_or_both(folder, whole):
    tensors, names = load_file(folder / "model.safetensors"), FREQUENCIES
    own = tensors.pop(names[0])
    assert names[1] not in tensors
    for given in ({names[1]: own}, {names[1]: own, names[0]: own.clone()}):
        save_file(tensors | given, folder / "model.safetensors")
        assert torch.equal(Sam.from_pretrained(folder).shared_image_embedding(BOXES[..., :2]),
                           whole[0].shared_image_embedding(BOXES[..., :2]))  # fmt: skip
    save_file(tensors | {names[0]: own, names[1]: own + 1}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"other frequencies than {names[0]}"):
        Sam.from_pretrained(folder)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"missing: {names[0]}$"):
        Sam.from_pretrained(folder)


FREQUENCIES = (
    "shared_image_embedding.positional_embedding",
    "prompt_encoder.shared_embedding.positional_embedding",
)


@torch.no_grad()
def test_several_files_with_an_index(tmp_path, whole):
    ours, theirs, _ = whole
    theirs.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    inputs = dict(pixel_values=picture(), **PROMPTS["all"])
    for read, built in zip(Sam.from_pretrained(tmp_path)(**inputs), ours(**inputs), strict=True):
        assert torch.equal(read, built)
    encoder = SamVisionEncoder.from_pretrained(tmp_path)
    assert torch.equal(encoder(picture()), ours.vision_encoder(picture()))


def test_what_an_encoder_lacks_or_has_too_much_is_named(vision_folder):
    tensors = load_file(vision_folder / "model.safetensors")
    table = tensors.pop("vision_encoder.layers.0.attn.rel_pos_h")
    save_file(tensors, vision_folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: layers\.0\.attn\.rel_pos_h"):
        SamVisionEncoder.from_pretrained(vision_folder)
    tensors["vision_encoder.layers.0.attn.rel_pos_h"] = table[1:].clone()
    save_file(tensors, vision_folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"rel_pos_h is \(4, 8\), the config wants \(5, 8\)"):
        SamVisionEncoder.from_pretrained(vision_folder)
    save_file(tensors | {"mask_decoder.x": table}, vision_folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"unexpected: .*mask_decoder\.x"):
        SamVisionEncoder.from_pretrained(vision_folder)


def test_configs_of_2023_are_read_without_a_word(folder, recwarn):
    """Each part held a language model's defaults then, and keys that did nothing."""
    config = json.loads((folder / "config.json").read_text())
    for part in ("vision_config", "prompt_encoder_config", "mask_decoder_config"):
        config[part] |= {"model_type": "", "max_length": 20, "top_k": 50, "torch_dtype": None}
    config["vision_config"] |= {"dropout": 0.0, "intermediate_size": 6144, "projection_dim": 512}
    config["vision_config"] |= {"initializer_factor": 1.0}
    edit(folder, "tie_word_embeddings", **config)
    Sam.from_pretrained(folder)
    SamVisionEncoder.from_pretrained(folder)
    assert not [w for w in recwarn if "not read" in str(w.message)]


def test_the_ratio_counts_where_the_size_is_not_given(tmp_path):
    theirs = vision_oracle(mlp_dim=None, mlp_ratio=1.7)  # 40.8, cut off
    theirs.save_pretrained(tmp_path)
    edit(tmp_path, "mlp_dim")
    ours = SamVisionEncoder.from_pretrained(tmp_path)
    assert ours.layers[0].mlp.lin1.out_features == 40


REFUSED = [
    ({"hidden_act": "swish2"}, "hidden_act='swish2' isn't supported"),
    ({"num_attention_heads": 5}, "uneven: hidden_size=24, num_attention_heads=5"),
    ({"num_hidden_layers": 0}, "num_hidden_layers=0 is below 1"),
    ({"output_channels": 0}, "output_channels=0 is below 1"),
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
    for layer in (4, -1):
        with pytest.raises(ValueError, match=f"there is no layer {layer} of 4"):
            ours.states(picture(), layer)
        with pytest.raises(ValueError, match=f"there is no layer {layer} of 4"):
            ours.forward_with_state(picture(), layer)


REFUSED_SAMS = [
    ("vision_config", {"output_channels": 24}, "one number: vision_config's output_channels=24"),
    ("vision_config", {"num_pos_feats": 9}, "2 · vision_config's num_pos_feats=18"),
    ("vision_config", {"image_size": 32}, "vision_config has 8 patches on a side, prompt_.* 7"),
    ("prompt_encoder_config", {"hidden_size": 24}, "prompt_encoder_config's hidden_size=24"),
    ("prompt_encoder_config", {"mask_input_channels": 6}, "mask_input_channels=6 isn't 4, 8"),
    ("prompt_encoder_config", {"num_point_embeddings": 3}, "num_point_embeddings=3 is below 4"),
    ("prompt_encoder_config", {"image_embedding_size": 8}, "image_embedding_size=8 isn't 28 // 4"),
    ("prompt_encoder_config", {"hidden_act": "tanh"}, "hidden_act='tanh' isn't supported"),
    ("mask_decoder_config", {"hidden_size": 8}, "mask_decoder_config's hidden_size=8"),
    ("mask_decoder_config", {"hidden_size": 20}, "hidden_size=20 isn't a multiple of 8"),
    ("mask_decoder_config", {"num_attention_heads": 3}, "uneven: hidden_size=16 / 1, num_att.*=3"),
    ("mask_decoder_config", {"num_attention_heads": 16}, "uneven: hidden_size=16 / 2, num_.*=16"),
    ("mask_decoder_config", {"attention_downsample_rate": 3}, "uneven: hidden_size=16 / 3"),
    ("mask_decoder_config", {"iou_head_depth": 1}, "iou_head_depth=1 is below 2"),
    ("mask_decoder_config", {"num_multimask_outputs": 0}, "num_multimask_outputs=0 is below 1"),
    ("mask_decoder_config", {"mlp_dim": "36"}, "mlp_dim='36' isn't of type int"),
]


@pytest.mark.parametrize("part, changes, said", REFUSED_SAMS)
def test_a_sam_that_cannot_be_honoured_is_refused(folder, part, changes, said):
    config = json.loads((folder / "config.json").read_text())
    edit(folder, **{part: config[part] | changes})
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{said}"):
        Sam.from_pretrained(folder)


def test_a_vision_encoder_is_no_sam(vision_folder):
    with pytest.raises(CheckpointError, match="model_type='sam_vision_model' isn't supported"):
        Sam.from_pretrained(vision_folder)


WRONG = [
    (dict(), "needed is either pixel_values or image_embeddings"),
    (dict(pixel_values=picture(), image_embeddings=draw(2, 16, 7, 7)), "needed is either"),
    (dict(image_embeddings=draw(2, 16, 7, 8)), r"\(2, 16, 7, 8\); needed is \(2, 16, 7, 7\)"),
    (dict(image_embeddings=draw(2, 12, 7, 7)), r"\(2, 12, 7, 7\); needed is \(2, 16, 7, 7\)"),
    (dict(input_points=POINTS[:1]), r"input_points of .*\(1, 3, 4, 2\).* \(2, any, any, 2\)"),
    (dict(input_boxes=BOXES[:1]), r"input_boxes of shape \(1, 3, 4\); needed is \(2, any, 4\)"),
    (dict(input_points=POINTS, input_boxes=BOXES[:, :2]), r"\(2, 2, 4\); needed is \(2, 3, 4\)"),
    (dict(input_points=POINTS, input_labels=LABELS[..., :3]), r"\(2, 3, 3\);.* \(2, 3, 4\)"),
    (dict(input_labels=LABELS), "input_labels without input_points"),
    (dict(input_masks=MASKS[..., :27]), r"\(2, 1, 28, 27\); needed is \(any, 1, 28, 28\)"),
    (dict(input_masks=draw(3, 1, 28, 28)), "input_masks for 3 images, and there are 2"),
]


@pytest.mark.parametrize("inputs, said", WRONG)
def test_wrong_inputs_are_refused(whole, inputs, said):
    if not {"pixel_values", "image_embeddings"} & inputs.keys() and inputs:
        inputs = inputs | {"image_embeddings": draw(2, 16, 7, 7)}
    forward = inspect.unwrap(Sam.forward)  # without jaxtyping's own checks
    with pytest.raises(ValueError, match=said):
        forward(whole[0], **inputs)


def test_a_resized_picture_fits_into_the_square(whole):
    for size in ((29, 10), (10, 29), (0, 5)):
        with pytest.raises(ValueError, match=rf"reshaped_size=\({size[0]}, {size[1]}\).* into 28"):
            whole[0].upscale(draw(1, 3, 28, 28), (40, 40), size)


# Parameters by part; their bytes in float32 are the sizes of the three released files, 375 MB,
# 1.25 GB and 2.56 GB (https://github.com/facebookresearch/segment-anything). segment-anything.com
# says 4M of prompt encoder and decoder together. The random frequencies aren't parameters.
@pytest.mark.parametrize(
    "total, encoder, file, hidden, layers, heads, seeing",
    [
        (93_735_472, 89_670_912, "0.375", 768, 12, 12, (2, 5, 8, 11)),
        (312_342_832, 308_278_272, "1.25", 1024, 24, 16, (5, 11, 17, 23)),
        (641_090_608, 637_026_048, "2.56", 1280, 32, 16, (7, 15, 23, 31)),
    ],
    ids=["B", "L", "H"],
)
def test_full_sizes_have_the_published_number_of_parameters(
    total, encoder, file, hidden, layers, heads, seeing
):
    vision = SamVisionConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        global_attn_indexes=seeing,
    )
    with torch.device("meta"):
        model = Sam(SamConfig(vision))

    def count(part) -> int:
        return sum(p.numel() for p in part.parameters())

    assert count(model) == total and count(model.vision_encoder) == encoder
    assert count(model.prompt_encoder) == 6_220 and count(model.mask_decoder) == 4_058_340
    assert f"{4 * total / 1e9:.{len(file) - 2}f}" == file
