"""DeepSeek-VL against transformers, through checkpoint folders that transformers wrote."""

import json
import math
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from snippets.common.checkpoint import CheckpointError
from snippets.common.generate import generate
from snippets.multimodal.deepseek_vl import (
    DeepseekVL,
    DeepseekVLConfig,
    DeepseekVLHybrid,
    DeepseekVLHybridConfig,
    HighResVisionConfig,
    TextConfig,
    VisionConfig,
)
from tests.checkpoints import edit, redraw

V, IMAGE, SIDE = 101, 7, 3  # 9 tokens an image
TEXT = dict(
    model_type="llama",
    vocab_size=V,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=14,
    bos_token_id=1,
    eos_token_id=2,
)
VISION = dict(
    model_type="siglip_vision_model",
    hidden_size=36,
    intermediate_size=52,
    num_hidden_layers=2,
    num_attention_heads=3,
    image_size=20,  # three patches and a rest of 2
    patch_size=6,
    vision_use_head=False,
)
SAM = dict(
    model_type="sam_vision_model",
    hidden_size=24,
    output_channels=10,
    num_hidden_layers=4,
    num_attention_heads=4,
    image_size=28,  # 7 tokens, which windows of 3 don't fill
    patch_size=4,
    window_size=3,
    global_attn_indexes=[1, 3],
    num_pos_feats=8,
    mlp_dim=40,
)
KINDS = {
    "deepseek_vl": (DeepseekVL, transformers.DeepseekVLForConditionalGeneration),
    "deepseek_vl_hybrid": (
        DeepseekVLHybrid,
        transformers.DeepseekVLHybridForConditionalGeneration,
    ),
}
ONE, TWO = KINDS
CONFIGS = {
    "one eye": (ONE, {}),
    "one eye, a head nobody asks, gelu": (
        ONE,
        {"vision": {"vision_use_head": True, "hidden_act": "gelu", "layer_norm_eps": 0.1}},
    ),
    "one eye, untied, as many key-value heads": (
        ONE,
        {"tie_word_embeddings": False, "text": {"num_key_value_heads": 6, "rms_norm_eps": 0.1}},
    ),
    "two eyes": (TWO, {}),
    "two eyes, untied, gelu": (
        TWO,
        {"tie_word_embeddings": False, "vision": {"hidden_act": "gelu"}},
    ),
    "two eyes, an early state": (TWO, {"sam": {"global_attn_indexes": [0]}}),
    "two eyes, the last state": (TWO, {"sam": {"global_attn_indexes": [3, 0]}}),
    "two eyes, a wide window": (TWO, {"sam": {"window_size": 9, "num_attention_heads": 3}}),
    "two eyes, 2 x 2 tokens": (TWO, {"vision": {"patch_size": 9}, "sam": {"image_size": 36}}),
    "two eyes, 5 x 5 tokens": (TWO, {"vision": {"patch_size": 4}, "sam": {"patch_size": 6}}),
    "two eyes, one channel": (TWO, {"vision": {"num_channels": 1}, "sam": {"num_channels": 1}}),
}


def oracle(kind: str, text=None, vision=None, sam=None, **changes):
    parts = {"text_config": TEXT | (text or {}), "vision_config": VISION | (vision or {})}
    if kind == TWO:
        parts["high_res_vision_config"] = SAM | (sam or {})
    model_class = KINDS[kind][1]
    config = model_class.config_class(**parts, **{"image_token_id": IMAGE} | changes)
    return redraw(model_class(config))


def pictures(config, images: int = 3, seed: int = 5) -> dict[str, torch.Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    names = {"pixel_values": "vision_config", "high_res_pixel_values": "high_res_vision_config"}
    found = {}
    for name, part in names.items():
        if (sizes := getattr(config, part, None)) is not None:
            shape = (images, sizes.num_channels, sizes.image_size, sizes.image_size)
            found[name] = torch.randn(shape, generator=drawn)
    return found


def prompts(n: int = SIDE**2, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Two images in the first row, side by side; padding and one image in the second."""
    ids = torch.randint(10, V, (2, 2 * n + 6), generator=torch.Generator().manual_seed(seed))
    ids[0, 2 : 2 + 2 * n] = IMAGE
    ids[1, -n - 1 : -1] = IMAGE
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return ids, mask


def positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """A folder, our class, and the reference."""
    theirs = oracle(request.param)
    folder = tmp_path_factory.mktemp("vl") / request.param
    theirs.save_pretrained(folder)
    return folder, KINDS[request.param][0], theirs


@pytest.fixture
def folder(tmp_path):
    oracle(TWO).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind, changes", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_logits_equal_transformers(kind, changes, tmp_path):
    theirs = oracle(kind, **changes)
    theirs.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = KINDS[kind][0].from_pretrained(tmp_path)
    assert not ours.training
    images = pictures(ours.config)
    ids, mask = prompts(ours.config.num_image_tokens)
    expected = theirs(input_ids=ids, **images).logits
    assert expected.std() > 0.1
    assert_close(ours(input_ids=ids, **images), expected)
    where = {"attention_mask": mask, "position_ids": positions(mask)}
    expected = theirs(input_ids=ids, **where, **images).logits
    found = ours(input_ids=ids, attention_mask=mask, **images)
    assert_close(found[mask.bool()], expected[mask.bool()])
    words = ids.where(ids != IMAGE, 11)
    assert_close(ours(input_ids=words), theirs(input_ids=words).logits)


@torch.no_grad()
def test_every_part_of_an_image_is_read(pair):
    """Each token of each image changes when its own image does, and no token before it."""
    folder, kind, _ = pair
    ours = kind.from_pretrained(folder)
    ids, _ = prompts()
    images = pictures(ours.config)
    before = ours(input_ids=ids, **images)
    for name in images:
        changed = images[name].clone()
        changed[1] += 0.5
        after = ours(input_ids=ids, **images | {name: changed})
        moved = (after - before).abs().amax(-1) > 1e-4
        assert not moved[1].any() and not moved[0, :11].any() and moved[0, 11:].all()


@torch.no_grad()
def test_the_aligned_features_are_those_of_the_paper(folder):
    """By loops: a grid stretched, convolved, weighed, laid beside SigLIP's, through an MLP."""
    ours = DeepseekVLHybrid.from_pretrained(folder).double()
    model, images = ours.model, {k: v.double() for k, v in pictures(ours.config, 2).items()}
    output, state = model.high_res_vision_model["vision_encoder"].forward_with_state(
        images["high_res_pixel_values"], 1
    )

    def norm(x, layer):  # features last
        mean, spread = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / (spread + 1e-6).sqrt() * layer.weight + layer.bias

    def convolved(x, weight, step):  # one image, rows columns features; a border of zeros
        rows, columns, _ = x.shape
        outputs, _, size, _ = weight.shape
        edge = size // 2
        y = torch.zeros(-(-rows // step), -(-columns // step), outputs, dtype=x.dtype)
        for row in range(y.shape[0]):
            for column in range(y.shape[1]):
                for i in range(size):
                    for j in range(size):
                        up, left = step * row + i - edge, step * column + j - edge
                        if 0 <= up < rows and 0 <= left < columns:
                            y[row, column] += weight[:, :, i, j] @ x[up, left]
        return y

    def stretched(x, side):  # each new place looks at the four old ones around it
        old = len(x)

        def around(place):
            at = min(max((place + 0.5) * old / side - 0.5, 0), old - 1)
            low = math.floor(at)
            return [(low, 1 - (at - low)), (min(low + 1, old - 1), at - low)]

        y = torch.zeros(side, side, x.shape[-1], dtype=x.dtype)
        for row in range(side):
            for column in range(side):
                for i, above in around(row):
                    for j, left in around(column):
                        y[row, column] += above * left * x[i, j]
        return y

    def projected(x):
        x = stretched(x, 4 * SIDE)
        for layer in (model.high_res_vision_proj.conv1, model.high_res_vision_proj.conv2):
            x = convolved(x, layer.weight, 2)
        return x

    neck, found = model.high_res_vision_neck, model.see(**images)
    for image in range(2):
        early = norm(convolved(state[image], neck.conv1.weight, 1), neck.layer_norm1)
        early = norm(convolved(early, neck.conv2.weight, 1), neck.layer_norm2)
        late = output[image].permute(1, 2, 0)
        alpha = model.high_res_vision_alpha.item()
        assert abs(alpha) > 0.05
        high = projected(late) + alpha * projected(early)
        for place in range(SIDE**2):
            low = model.vision_model(images["pixel_values"])[image, place]
            parts = [
                layer.weight @ x + layer.bias
                for layer, x in (
                    (model.aligner.high_res_vision_proj, high[place // SIDE, place % SIDE]),
                    (model.aligner.vision_proj, low),
                )
            ]
            x = torch.cat(parts)
            x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
            y = model.aligner.proj.weight @ x + model.aligner.proj.bias
            assert_close(found[image, place], y)


@torch.no_grad()
def test_one_eye_is_a_network_on_siglips_patches(tmp_path):
    oracle(ONE).save_pretrained(tmp_path)
    model = DeepseekVL.from_pretrained(tmp_path).model
    images = pictures(model.config)["pixel_values"]
    x = model.vision_model(images) @ model.aligner.linear1.weight.T + model.aligner.linear1.bias
    x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    expected = x @ model.aligner.linear2.weight.T + model.aligner.linear2.bias
    assert_close(model.see(images), expected)


@pytest.mark.parametrize("chunks", [[20, 1, 1, 1, 1], [2, 18, 4], [1, 20, 3]])
@torch.no_grad()
def test_chunks_through_the_cache_equal_the_whole(pair, chunks):
    folder, kind, _ = pair
    ours = kind.from_pretrained(folder)
    ids, _ = prompts()
    ids = ids[:1]
    images = pictures(ours.config, 2)
    cache, found, start = ours.new_cache(), [], 0
    for size in chunks:
        part = ids[:, start : start + size]
        seen = images if (part == IMAGE).any() else {}
        found.append(ours(input_ids=part, cache=cache, **seen))
        start += size
    whole = ours(input_ids=ids, **images)
    assert start == cache.length == ids.shape[1]
    assert_close(torch.cat(found, 1), whole, atol=1e-5, rtol=1e-5)


def test_it_writes_what_transformers_writes(pair):
    folder, kind, theirs = pair
    ours = kind.from_pretrained(folder)
    ids, mask = prompts()
    images = pictures(ours.config)
    more = dict(attention_mask=mask, max_new_tokens=16)
    expected = theirs.generate(
        ids, do_sample=False, pad_token_id=0, eos_token_id=2, **images, **more
    )
    written = generate(ours, ids, images=images, eos_token_id=2, **more)
    assert torch.equal(written, expected)
    other = generate(ours, ids, images=pictures(ours.config, seed=6), eos_token_id=2, **more)
    assert not torch.equal(written, other), "the images don't matter"


@torch.no_grad()
def test_a_written_placeholder_is_a_word(pair):
    folder, kind, theirs = pair
    ours = kind.from_pretrained(folder)
    ids = torch.tensor([[11, 12, 13, IMAGE]])
    cache = ours.new_cache()
    ours(input_ids=ids[:, :3], cache=cache)
    found = ours(input_ids=ids[:, 3:], cache=cache)
    assert_close(found, theirs(input_ids=ids).logits[:, 3:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_is_as_close_as_the_references(pair, dtype):
    folder, kind, theirs = pair
    ids, _ = prompts()
    images = pictures(kind.from_pretrained(folder).config)
    ours = kind.from_pretrained(folder, dtype=dtype)
    assert {p.dtype for p in ours.parameters()} == {dtype}
    right = theirs(input_ids=ids, **images).logits
    halved = type(theirs).from_pretrained(folder, dtype=dtype)
    low = {name: x.to(dtype) for name, x in images.items()}
    expected = halved(input_ids=ids, **low).logits.float()
    found = ours(input_ids=ids, **images)  # pixels may come as they are
    assert found.dtype == dtype
    bound = (expected - right).norm() / right.norm()
    assert (found.float() - right).norm() / right.norm() < 1.5 * bound < 0.1


# Files


@pytest.mark.parametrize("kind", KINDS)
def test_files_with_one_level_more_are_read(kind, tmp_path):
    """As older versions of transformers wrote them."""
    theirs = oracle(kind)
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    level, tower = "model.vision_model.", "model.vision_model.vision_model."
    renamed = {
        tower + k.removeprefix(level) if k.startswith(level) else k: v for k, v in tensors.items()
    }
    renamed[tower + "embeddings.position_ids"] = torch.arange(SIDE**2)[None]
    renamed["model.language_model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(7)
    save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    ours = KINDS[kind][0].from_pretrained(tmp_path)
    ids, _ = prompts()
    images = pictures(ours.config)
    with torch.no_grad():
        assert_close(ours(input_ids=ids, **images), theirs(input_ids=ids, **images).logits)
    both = {name: tensor.clone() for name, tensor in (renamed | tensors).items()}
    save_file(both, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="one tower, two layouts"):
        KINDS[kind][0].from_pretrained(tmp_path)


def test_several_files_and_keys_of_the_release_are_read(folder):
    """The folder of the 7B model has three files, and a key that says what follows."""
    theirs = oracle(TWO)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    theirs.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    config = json.loads((folder / "config.json").read_text())
    high = config["high_res_vision_config"] | {"intermediate_size": 40}
    edit(folder, high_res_vision_config=high)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = DeepseekVLHybrid.from_pretrained(folder)
    ids, _ = prompts()
    images = pictures(ours.config)
    with torch.no_grad():
        assert_close(ours(input_ids=ids, **images), theirs(input_ids=ids, **images).logits)


@pytest.mark.parametrize("said", [True, False, None])
@pytest.mark.parametrize("file", ["no head", "the same head", "another head"])
def test_the_head_is_the_files_whatever_the_config_says(said, file, tmp_path):
    """As transformers reads it: configs say "tied" of models that aren't."""
    theirs = oracle(ONE, tie_word_embeddings=False)
    table = theirs.model.language_model.embed_tokens.weight
    if file != "another head":
        theirs.lm_head.weight = torch.nn.Parameter(table.clone())
    theirs.save_pretrained(tmp_path)
    if file == "no head":
        tensors = load_file(tmp_path / "model.safetensors")
        del tensors["lm_head.weight"]
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    edit(tmp_path, tie_word_embeddings=said)
    if said is None:  # files of 2025 leave it out
        edit(tmp_path, "tie_word_embeddings")
    if said is False and file == "no head":
        with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight"):
            DeepseekVL.from_pretrained(tmp_path)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = DeepseekVL.from_pretrained(tmp_path)
    told = [str(w.message) for w in caught if "tie_word_embeddings is true" in str(w.message)]
    assert len(told) == (said is True and file == "another head")
    ids, _ = prompts()
    images = pictures(ours.config)
    with torch.no_grad():
        assert_close(ours(input_ids=ids, **images), theirs(input_ids=ids, **images).logits)
    own = said is False or file == "another head"
    assert hasattr(ours, "lm_head") == own


def test_the_releases_own_layout_is_refused_by_name(folder):
    edit(folder, model_type="multi_modality")
    with pytest.raises(CheckpointError, match="model_type='multi_modality' isn't supported"):
        DeepseekVLHybrid.from_pretrained(folder)
    edit(folder, model_type=TWO)
    tensors = load_file(folder / "model.safetensors")
    old = "vision_model.vision_tower_high.vision_tower.hd_alpha_downsamples"
    tensors[old] = tensors.pop("model.high_res_vision_alpha")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError) as error:
        DeepseekVLHybrid.from_pretrained(folder)
    assert "missing: model.high_res_vision_alpha; " in str(error.value)
    assert f"unexpected: {old}" in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_with_other_eyes_is_refused(kind, tmp_path):
    oracle(kind).save_pretrained(tmp_path)
    other = KINDS[TWO if kind == ONE else ONE][0]
    with pytest.raises(CheckpointError, match=f"model_type='{kind}' isn't supported"):
        other.from_pretrained(tmp_path)


REFUSED = [
    ("text_config", {"model_type": "mistral"}, "model_type='mistral' isn't supported here"),
    ("vision_config", {"model_type": "clip_vision_model"}, "only 'siglip_vision_model'"),
    ("high_res_vision_config", {"model_type": "sam_hq"}, "only 'sam_vision_model'"),
    ("text_config", {"hidden_size": 49}, "hidden_size=49 has no two halves"),
    ("text_config", {"hidden_act": "swish2"}, "hidden_act='swish2' isn't supported"),
    ("vision_config", {"num_attention_heads": 5}, "uneven: hidden_size=36"),
    ("high_res_vision_config", {"num_attention_heads": 5}, "uneven: hidden_size=24"),
    ("high_res_vision_config", {"global_attn_indexes": []}, r"global_attn_indexes=\[\]: the first"),
    ("high_res_vision_config", {"global_attn_indexes": [4]}, "one of 4 layers"),
    ("high_res_vision_config", {"global_attn_indexes": [-1, 1]}, "one of 4 layers"),
    ("high_res_vision_config", {"output_channels": 0}, "output_channels=0 is below 1"),
]


@pytest.mark.parametrize("part, changes, said", REFUSED)
def test_a_config_that_cannot_be_honoured_is_refused(folder, part, changes, said):
    config = json.loads((folder / "config.json").read_text())
    edit(folder, **{part: config[part] | changes})
    with pytest.raises(CheckpointError, match=rf"config\.json.*{said}"):
        DeepseekVLHybrid.from_pretrained(folder)


# Calls


@torch.no_grad()
def test_wrong_counts_and_shapes_are_refused(folder):
    ours = DeepseekVLHybrid.from_pretrained(folder)
    ids, mask = prompts()
    images = pictures(ours.config)
    with pytest.raises(ValueError, match=r"27 placeholders .* 18 image tokens: 2 images of 9"):
        ours(input_ids=ids, **pictures(ours.config, 2))
    fewer = ids.clone()
    fewer[0, 5] = 11
    with pytest.raises(ValueError, match=r"26 placeholders .* 27 image tokens: 3 images of 9"):
        ours(input_ids=fewer, **images)
    with pytest.raises(ValueError, match=r"27 placeholders .* 0 image tokens"):
        ours(input_ids=ids)
    for name in images:
        with pytest.raises(ValueError, match=f"^{name} alone"):
            ours(input_ids=ids, **{name: images[name]})
    short = images | {"high_res_pixel_values": images["high_res_pixel_values"][:2]}
    with pytest.raises(ValueError, match="3 images at low resolution, 2 at high"):
        ours(input_ids=ids, **short)
    for name, size in (("pixel_values", 20), ("high_res_pixel_values", 28)):
        for shape in ((3, 3, size + 1, size), (3, 1, size, size)):
            with pytest.raises(ValueError) as error:
                ours(input_ids=ids, **images | {name: torch.zeros(shape)})
            assert f"{shape}" in str(error.value) and f"{size}" in str(error.value)
    with pytest.raises(ValueError):
        ours(input_ids=ids, attention_mask=mask[:, 1:], **images)


# Sizes

# By the release's configs, as transformers' conversion scripts state them.
EYE = dict(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=384,
    patch_size=16,
)
SMALL = dict(
    vocab_size=102400,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=24,
    num_attention_heads=16,
)
LARGE = dict(
    vocab_size=102400,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=30,
    num_attention_heads=32,
)


def full(text: dict, head: bool) -> torch.nn.Module:
    parts = (TextConfig(**text), VisionConfig(**EYE, vision_use_head=head))
    with torch.device("meta"):
        if text is SMALL:
            return DeepseekVL(DeepseekVLConfig(*parts))
        return DeepseekVLHybrid(
            DeepseekVLHybridConfig(*parts, high_res_vision_config=HighResVisionConfig())
        )


# Files of the release in bytes, two a parameter, with the pooling head that no part asks:
# https://huggingface.co/deepseek-ai/deepseek-vl-1.3b-base/tree/main (3.95 GB) and
# https://huggingface.co/deepseek-ai/deepseek-vl-7b-base/tree/main (4.98, 4.96 and 4.75 GB)
@pytest.mark.parametrize("text, gigabytes, files", [(SMALL, 3.95, 1), (LARGE, 14.69, 3)])
def test_full_models_have_the_published_size(text, gigabytes, files):
    total = sum(p.numel() for p in full(text, head=True).parameters())
    assert abs(2 * total / 1e9 - gigabytes) < 0.005 * files


@pytest.mark.parametrize(
    "text, language, vision, connector",
    [
        (SMALL, 1_652_656_128, 303_688_704, 6_295_552),
        (LARGE, 6_910_365_696, 303_688_704 + 89_670_912 + 787_456 + 5_898_240 + 1, 20_979_712),
    ],
)
def test_full_models_by_parts(text, language, vision, connector):
    """SAM-B's encoder as published alone, a neck and convolutions; see test_sam.py."""
    model = full(text, head=False)
    counted = {"language": 0, "vision": 0, "connector": 0}
    for name, p in model.named_parameters():
        kind = "vision"
        if "language_model." in name or name.startswith("lm_head."):
            kind = "language"
        elif "aligner." in name:
            kind = "connector"
        counted[kind] += p.numel()
    assert counted == {"language": language, "vision": vision, "connector": connector}
    assert model.config.num_image_tokens == 576
