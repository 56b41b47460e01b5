"""ViT against transformers, through checkpoint folders that transformers wrote."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import ViTForImageClassification

from snippets.common.checkpoint import CheckpointError
from snippets.multimodal.vit import (
    ViT,
    ViTConfig,
    from_patches,
    resample_positions,
    to_patches,
)
from tests.checkpoints import edit, redraw

BASE = dict(
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=80,
    image_size=30,
    patch_size=6,
    num_labels=7,
)
CONFIGS = {
    "square": {},
    "no biases on q, k, v": {"qkv_bias": False},
    "pixels left over": {"image_size": 33},
    "not square": {"image_size": [18, 40], "patch_size": [6, 5]},
    "height and width": {"image_size": [26, 33], "patch_size": [4, 6]},
    "grey": {"num_channels": 1, "patch_size": 5},
    "four channels": {"num_channels": 4},
    "tanh gelu, large eps": {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 0.3},
    "quick gelu, two classes": {"hidden_act": "quick_gelu", "num_labels": 2},
    "one patch": {"image_size": 6},
    "one head": {"num_attention_heads": 1},
}


def oracle(**changes) -> ViTForImageClassification:
    return redraw(ViTForImageClassification(transformers.ViTConfig(**(BASE | changes))))


def images(height: int, width: int, channels: int = 3, b: int = 2, seed: int = 1) -> torch.Tensor:
    drawn = torch.Generator().manual_seed(seed)
    return torch.randn(b, channels, height, width, generator=drawn)


@pytest.fixture
def folder(tmp_path):
    oracle().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def ours(folder) -> ViT:
    return ViT.from_pretrained(folder)


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_logits_equal_transformers(changes, tmp_path):
    theirs = oracle(**changes)
    theirs.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = ViT.from_pretrained(tmp_path)
    size = (BASE | changes)["image_size"]
    height, width = (size, size) if isinstance(size, int) else size
    pixels = images(height, width, changes.get("num_channels", 3), b=3)
    expected = theirs(pixel_values=pixels).logits
    assert expected.std() > 0.1
    assert_close(ours(pixel_values=pixels), expected)
    hidden = theirs.vit(pixels).last_hidden_state
    assert_close(ours.vit(pixels), hidden)
    assert not ours.training


@pytest.mark.parametrize(
    "size", [(30, 30), (60, 60), (18, 18), (47, 92), (24, 66), (6, 150), (29, 31), (90, 12)]
)
@torch.no_grad()
def test_other_resolutions_equal_transformers(size, folder, ours):
    theirs = ViTForImageClassification.from_pretrained(folder)
    expected = theirs(images(*size), interpolate_pos_encoding=True).logits
    assert_close(ours(images(*size), interpolate_pos_encoding=True), expected)


@torch.no_grad()
def test_a_table_that_is_not_square_is_read_as_it_is(tmp_path):
    """transformers takes its root for both sides, so it has no answer here."""
    oracle(image_size=[18, 30]).save_pretrained(tmp_path)
    ours = ViT.from_pretrained(tmp_path)
    same = ours(images(18, 30))
    assert torch.equal(ours(images(18, 30), interpolate_pos_encoding=True), same)
    assert torch.equal(ours(images(23, 35)[..., :18, :30], interpolate_pos_encoding=True), ours(
        images(23, 35)[..., :18, :30]
    ))  # fmt: skip
    assert ours(images(60, 24), interpolate_pos_encoding=True).isfinite().all()


def test_resampled_positions_are_bicubic():
    table = torch.randn(1, 1 + 3 * 4, 5, generator=torch.Generator().manual_seed(0))
    assert resample_positions(table, (3, 4), (3, 4)) is table
    found = resample_positions(table, (3, 4), (5, 7))
    assert found.shape == (1, 36, 5)
    assert torch.equal(found[:, 0], table[:, 0])
    plane = table[0, 1:].reshape(3, 4, 5)

    def keys(t, a=-0.75):  # the kernel of Keys 1981, with PyTorch's a
        t = abs(t)
        if t < 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0

    for row in range(5):
        for column in range(7):
            y, x = (row + 0.5) * 3 / 5 - 0.5, (column + 0.5) * 4 / 7 - 0.5
            expected = torch.zeros(5)
            for i in range(math.floor(y) - 1, math.floor(y) + 3):
                for j in range(math.floor(x) - 1, math.floor(x) + 3):
                    at = plane[min(max(i, 0), 2), min(max(j, 0), 3)]
                    expected += keys(y - i) * keys(x - j) * at
            assert_close(found[0, 1 + 7 * row + column], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_equals_transformers(dtype, folder):
    theirs = ViTForImageClassification.from_pretrained(folder, dtype=dtype)
    ours = ViT.from_pretrained(folder, dtype=dtype)
    theirs.save_pretrained(folder / "half")
    assert ViT.from_pretrained(folder / "half").classifier.weight.dtype == dtype
    for size in (30, 48):
        expected = theirs(images(size, size), interpolate_pos_encoding=True).logits
        found = ours(images(size, size), interpolate_pos_encoding=True)  # float32 goes in
        assert found.dtype == dtype
        # The norms may round once more or less.
        assert_close(found, expected, atol=0.05, rtol=0.05)
        exact = ViT.from_pretrained(folder)(images(size, size), interpolate_pos_encoding=True)
        assert (found - exact).norm() < 2 * (expected - exact).norm() + 1e-3


@torch.no_grad()
def test_brute_force(folder, ours):
    """Equations 1 to 4 of the paper, with one loop for each index."""
    w = load_file(folder / "model.safetensors")
    pixels = images(30, 30)

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, x):
        x = x - x.mean()
        return w[f"{name}.weight"] * x / (x @ x / 48).sqrt() + w[f"{name}.bias"]

    for picture, logits in zip(pixels, ours(pixels), strict=True):
        kernel = w["vit.embeddings.patch_embeddings.projection.weight"]
        bias = w["vit.embeddings.patch_embeddings.projection.bias"]
        tokens = [w["vit.embeddings.cls_token"][0, 0]]
        for row in range(5):
            for column in range(5):
                patch = picture[:, 6 * row : 6 * row + 6, 6 * column : 6 * column + 6]
                tokens.append((kernel * patch).sum((1, 2, 3)) + bias)
        z = [t + p for t, p in zip(tokens, w["vit.embeddings.position_embeddings"][0], strict=True)]
        for number in range(3):
            at = f"vit.encoder.layer.{number}"
            normed = [norm(f"{at}.layernorm_before", x) for x in z]
            q, k, v = (
                [linear(f"{at}.attention.attention.{name}", x) for x in normed]
                for name in ("query", "key", "value")
            )
            found = []
            for t in range(26):
                heads = []
                for head in range(4):
                    part = slice(12 * head, 12 * head + 12)
                    scores = torch.stack([q[t][part] @ k[s][part] for s in range(26)]) / 12**0.5
                    weights = scores.exp() / scores.exp().sum()
                    heads.append(sum(weights[s] * v[s][part] for s in range(26)))
                found.append(linear(f"{at}.attention.output.dense", torch.cat(heads)))
            z = [x + y for x, y in zip(z, found, strict=True)]
            for t, x in enumerate(z):
                y = linear(f"{at}.intermediate.dense", norm(f"{at}.layernorm_after", x))
                y = y * 0.5 * (1 + torch.erf(y / 2**0.5))
                z[t] = x + linear(f"{at}.output.dense", y)
        expected = linear("classifier", norm("vit.layernorm", z[0]))
        assert_close(logits, expected, atol=1e-4, rtol=1e-4)


# Patches


def test_patches_and_back():
    x = images(12, 20, b=3)
    patches = to_patches(x, (4, 5))
    assert patches.shape == (3, 12, 60)
    assert torch.equal(patches[1, 6], x[1, :, 4:8, 10:15].flatten())  # second row, third column
    assert torch.equal(from_patches(patches, (3, 4), (4, 5)), x)
    assert torch.equal(to_patches(images(14, 23), (4, 5)), to_patches(images(14, 23)[..., :12, :20], (4, 5)))  # fmt: skip # noqa: E501
    with pytest.raises(ValueError, match="12 patches, 3x5 places"):
        from_patches(patches, (3, 5), (4, 5))


@torch.no_grad()
def test_the_convolution_is_a_linear_map_of_patches(ours):
    projection = ours.vit.embeddings.patch_embeddings["projection"]
    x = images(30, 30)
    as_linear = F.linear(to_patches(x, (6, 6)), projection.weight.flatten(1), projection.bias)
    assert_close(projection(x).flatten(2).mT, as_linear)


# Invariants


@torch.no_grad()
def test_without_positions_the_order_of_patches_does_not_count(ours):
    x, order = images(30, 30), torch.randperm(25, generator=torch.Generator().manual_seed(0))
    patches = to_patches(x, (6, 6))
    shuffled = from_patches(patches[:, order], (5, 5), (6, 6))
    assert (ours(shuffled) - ours(x)).abs().max() > 0.05
    ours.vit.embeddings.position_embeddings.zero_()
    assert_close(ours(shuffled), ours(x))
    assert_close(ours.vit(shuffled)[:, 1:], ours.vit(x)[:, 1:][:, order])


@torch.no_grad()
def test_the_position_of_cls_can_move_into_cls(ours):
    x, embeddings = images(30, 30), ours.vit.embeddings
    before = ours(x)
    assert embeddings.position_embeddings[0, 0].abs().mean() > 0.01
    embeddings.cls_token += embeddings.position_embeddings[:, :1]
    embeddings.position_embeddings[:, :1] = 0
    assert_close(ours(x), before)
    embeddings.cls_token[:] = 0
    assert (ours(x) - before).abs().max() > 0.01


@torch.no_grad()
def test_maps_are_transformers_attention(folder, ours):
    theirs = ViTForImageClassification.from_pretrained(folder, attn_implementation="eager")
    expected = theirs(images(30, 30), output_attentions=True).attentions
    found = ours.maps(images(30, 30))
    assert len(found) == len(expected) == 3
    for one, other in zip(found, expected, strict=True):
        assert one.shape == (2, 4, 26, 26)
        assert_close(one, other)
    assert ours.maps(images(12, 18), True)[0].shape == (2, 4, 7, 7)


# Files


def rewrite(folder, change):
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


@torch.no_grad()
def test_a_pooler_is_not_used_for_classes(folder, ours):
    """As transformers does it; a folder that holds nothing else is refused."""
    pooler = {"dense.weight": torch.ones(48, 48), "dense.bias": torch.ones(48)}
    rewrite(folder, lambda tensors: tensors | {f"vit.pooler.{k}": v for k, v in pooler.items()})
    expected = ViTForImageClassification.from_pretrained(folder)(images(30, 30)).logits
    assert_close(ViT.from_pretrained(folder)(images(30, 30)), expected)
    transformers.ViTModel(transformers.ViTConfig(**BASE)).save_pretrained(folder)
    edit(folder, model_type="vit")
    said = r"missing: vit\.embeddings\..* classifier\.bias; unexpected: .*pooler\.dense\.bias"
    with pytest.raises(CheckpointError, match=said):
        ViT.from_pretrained(folder)


def test_a_file_without_a_classifier_is_refused(folder):
    rewrite(folder, lambda tensors: {k: v for k, v in tensors.items() if "classifier" not in k})
    with pytest.raises(CheckpointError, match=r"missing: classifier\.weight, classifier\.bias"):
        ViT.from_pretrained(folder)


def test_a_table_of_another_size_is_refused(folder):
    edit(folder, image_size=36)
    said = r"vit\.embeddings\.position_embeddings is \(1, 26, 48\), the config wants \(1, 37, 48\)"
    with pytest.raises(CheckpointError, match=said):
        ViT.from_pretrained(folder)


def test_how_many_classes(folder):
    assert ViTConfig().classes == 2 == ViTForImageClassification(transformers.ViTConfig(
        **{k: v for k, v in BASE.items() if k != "num_labels"}
    )).num_labels  # fmt: skip
    assert ViTConfig(num_labels=5).classes == 5
    assert ViTConfig(id2label={"0": "cat", "1": "dog", "2": "cow"}).classes == 3
    edit(folder, "id2label", num_labels=7)
    assert ViT.from_pretrained(folder).config.classes == 7


def test_the_published_config_is_read_in_silence(folder):
    """The keys of google/vit-base-patch16-224."""
    edit(
        folder,
        _name_or_path="google/vit-base-patch16-224-in21k",
        attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=0.1,
        encoder_stride=16,
        initializer_range=0.02,
        transformers_version="4.13.0.dev0",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ViT.from_pretrained(folder)


REFUSED = [
    ({"model_type": "deit"}, "model_type='deit'"),
    ({"hidden_act": "gelu_fast"}, "hidden_act='gelu_fast' isn't supported; known"),
    ({"num_attention_heads": 5}, "uneven: hidden_size=48, num_attention_heads=5"),
    ({"num_hidden_layers": 0}, "num_hidden_layers=0 is below 1"),
    ({"intermediate_size": 0}, "intermediate_size=0 is below 1"),
    ({"num_channels": 0}, "num_channels=0 is below 1"),
    ({"id2label": {}}, "classes=0 is below 1"),
    ({"num_labels": 3}, "num_labels=3, and 7 in id2label"),
    ({"image_size": 5}, "image_size=5 is below patch_size=6"),
    ({"image_size": [30, 5]}, "image_size=.* is below patch_size=6"),
    ({"image_size": [30]}, "isn't one number, or height and width"),
    ({"image_size": [30, 30, 3]}, "isn't one number, or height and width"),
    ({"patch_size": [6, 0]}, "isn't in whole numbers above 0"),
    ({"patch_size": 0}, "patch_size=0 isn't in whole numbers"),
    ({"patch_size": [6.0, 6]}, "isn't in whole numbers"),
    ({"image_size": "30"}, "image_size='30' isn't of type"),
]


@pytest.mark.parametrize("changes, said", REFUSED)
def test_a_config_that_cannot_be_honoured_is_refused(folder, changes, said):
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{said}"):
        ViT.from_pretrained(folder)


@pytest.mark.parametrize(
    "shape, interpolate, said",
    [
        ((1, 30, 30), False, "1 channels, num_channels=3"),
        ((3, 30, 36), False, "30x36 pixels, image_size=30x30"),
        ((3, 36, 30), False, "36x30 pixels, image_size=30x30"),
        ((3, 20, 45), False, "20x45 pixels, image_size=30x30"),  # as many
        ((3, 30, 5), True, "30x5 pixels are less than one patch of 6x6"),
        ((3, 5, 30), True, "5x30 pixels are less than one patch of 6x6"),
    ],
)
def test_images_that_do_not_fit_are_refused(ours, shape, interpolate, said):
    with pytest.raises(ValueError, match=said):
        ours(torch.zeros(2, *shape), interpolate_pos_encoding=interpolate)


def test_it_learns(ours):
    """Gradients reach every parameter."""
    ours(images(30, 30)).square().sum().backward()
    for name, weight in ours.named_parameters():
        # A key's bias adds the same to all scores of a query.
        assert name.endswith("key.bias") or weight.grad.abs().max() > 0, name


# num_params in torchvision's documentation of vit_b_16, vit_b_32, vit_l_16 and vit_h_14 (weights
# SWAG_LINEAR at 224 pixels, and SWAG_E2E at 518).
@pytest.mark.parametrize(
    "published, sizes",
    [
        (86_567_656, (768, 12, 12, 3072, 16, 224)),
        (88_224_232, (768, 12, 12, 3072, 32, 224)),
        (304_326_632, (1024, 24, 16, 4096, 16, 224)),
        (632_045_800, (1280, 32, 16, 5120, 14, 224)),
        (633_470_440, (1280, 32, 16, 5120, 14, 518)),
    ],
    ids=["B/16", "B/32", "L/16", "H/14", "H/14 at 518"],
)
def test_full_sizes_have_the_published_number_of_parameters(published, sizes):
    hidden, layers, heads, intermediate, patch, size = sizes
    config = ViTConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        patch_size=patch,
        image_size=size,
        num_labels=1000,
    )
    with torch.device("meta"):
        model = ViT(config)
    assert sum(weight.numel() for weight in model.parameters()) == published
