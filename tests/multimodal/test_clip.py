"""CLIP against transformers, through checkpoint folders that transformers wrote."""

import dataclasses
import itertools
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
from snippets.multimodal.clip import (
    CLIP,
    CLIPConfig,
    CLIPTextConfig,
    CLIPTextTransformer,
    CLIPVisionConfig,
    CLIPVisionTransformer,
    Encoder,
    contrastive_loss,
    layout,
    train,
    unit,
)
from snippets.multimodal.siglip import sigmoid_loss
from tests.checkpoints import edit, redraw

IMAGES, J, T, V, EOS = 2, 3, 11, 99, 97
TEXT = dict(
    vocab_size=V,
    hidden_size=36,
    intermediate_size=52,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=13,
    eos_token_id=EOS,
    bos_token_id=0,
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
    "quick gelu": ({}, {}, {}),
    "largest id": ({"eos_token_id": 2}, {}, {}),
    "gelu, odd": ({"hidden_act": "gelu"}, {"hidden_act": "gelu", "patch_size": 7}, {}),
    "one channel": ({"num_hidden_layers": 1}, {"num_channels": 1, "num_attention_heads": 3}, {}),
    "large eps": ({"layer_norm_eps": 0.1}, {"layer_norm_eps": 0.2}, {"projection_dim": 7}),
}


def reference_config(text=None, vision=None, both=None) -> transformers.CLIPConfig:
    return transformers.CLIPConfig(
        text_config=TEXT | (text or {}),
        vision_config=VISION | (vision or {}),
        **({"projection_dim": 20} | (both or {})),
    )


def oracle(*changes) -> transformers.CLIPModel:
    model = redraw(transformers.CLIPModel(reference_config(*changes)))
    with torch.no_grad():
        model.logit_scale.fill_(1.7)
    return model


def inputs(channels: int = 3, side: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts whose first end is inside, with later ones and larger ids behind; and images."""
    drawn = torch.Generator().manual_seed(1)
    ids = torch.randint(3, EOS, (J, T), generator=drawn)
    ids[0, 5] = ids[1, 8] = ids[2, T - 1] = EOS
    ids[0, 7] = EOS  # a second one
    ids[1, 9] = V - 1  # an id above it, where the old rule ends
    return ids, torch.randn(IMAGES, channels, side, side, generator=drawn)


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
        ours = CLIP.from_pretrained(tmp_path)
    assert not ours.training
    ids, images = inputs(changes[1].get("num_channels", 3))
    mask = torch.ones_like(ids)
    mask[0, 6:] = mask[1, :3] = mask[2, 4] = 0
    for padding in (None, mask):
        expected = theirs(input_ids=ids, pixel_values=images, attention_mask=padding)
        per_image, per_text = ours(input_ids=ids, pixel_values=images, attention_mask=padding)
        assert_close(per_image, expected.logits_per_image)
        assert_close(per_text, expected.logits_per_text)
        assert per_image.shape == (IMAGES, J) and per_image.std() > 0.1
        assert_close(ours.encode_text(ids, padding), expected.text_embeds)
        assert_close(ours.encode_image(images), expected.image_embeds)
        assert_close(ours.encode_image(images).norm(dim=-1), torch.ones(IMAGES))
        tokens, pooled = ours.text_model(ids, padding)
        real = torch.ones_like(ids) if padding is None else padding.cumsum(-1)
        rows = real > 0  # the first tokens of the second text see nothing at all
        assert_close(tokens[rows], expected.text_model_output.last_hidden_state[rows])
        assert pooled.shape == (J, 36)


@torch.no_grad()
def test_the_vision_tower_and_each_of_its_states(folder):
    ours, theirs = CLIP.from_pretrained(folder), transformers.CLIPModel.from_pretrained(folder)
    _, images = inputs()
    expected = theirs.vision_model(images, output_hidden_states=True)
    tokens, pooled = ours.vision_model(images)
    assert_close(tokens, expected.last_hidden_state)
    assert_close(pooled, expected.pooler_output)
    assert tokens.shape == (IMAGES, 10, 48) and len(expected.hidden_states) == 5
    for number in range(5):
        assert_close(ours.vision_model.states(images, number), expected.hidden_states[number])
        behind = ours.vision_model.states(images, number - 5)
        assert_close(behind, expected.hidden_states[number - 5])
    for number in (5, -6):
        with pytest.raises(ValueError, match=f"no hidden state {number} of 5"):
            ours.vision_model.states(images, number)


@torch.no_grad()
def test_layers_behind_a_state_are_not_computed(folder):
    tower = CLIP.from_pretrained(folder).vision_model
    ran = []
    for number, block in enumerate(tower.encoder.layers):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    tower.states(inputs()[1], -2)
    assert ran == [0, 1, 2]
    tower.states(inputs()[1], 0)
    assert ran == [0, 1, 2]


@pytest.mark.parametrize("size", [(30, 30), (16, 40), (50, 33), (24, 24), (8, 9)])
@torch.no_grad()
def test_images_of_other_sizes(folder, size):
    ours, theirs = CLIP.from_pretrained(folder), transformers.CLIPModel.from_pretrained(folder)
    ids, _ = inputs()
    images = torch.randn(IMAGES, 3, *size, generator=torch.Generator().manual_seed(2))
    expected = theirs(ids, images, interpolate_pos_encoding=True).logits_per_image
    assert_close(ours(ids, images, interpolate_pos_encoding=True)[0], expected)


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.06), (torch.float16, 0.01)])
@torch.no_grad()
def test_half_precision(folder, dtype, bound):
    ours = CLIP.from_pretrained(folder, dtype=dtype)
    assert {weight.dtype for weight in ours.parameters()} == {dtype}
    ids, images = inputs()
    theirs = transformers.CLIPModel.from_pretrained(folder, dtype=dtype)
    expected = theirs(ids, images).logits_per_image  # pixels stay float32
    found, exact = ours(ids, images)[0], CLIP.from_pretrained(folder)(ids, images)[0]
    assert found.dtype == dtype
    # Both round at each step, in another order: no further from float32 than the reference, or
    # within the bound.
    error = (expected.float() - exact).abs().max()
    assert (found.float() - exact).abs().max() <= max(1.5 * error, bound)


# From the formulas


@torch.no_grad()
def test_the_vision_tower_step_by_step(folder):
    """From the weights of the file, one image, one head, one patch at a time."""
    w = {k: v.double() for k, v in load_file(folder / "model.safetensors").items()}
    image = inputs()[1][1].double()
    e = "vision_model.embeddings."
    tokens = [w[e + "class_embedding"]]
    for row in range(3):
        for column in range(3):
            patch = image[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            tokens.append(w[e + "patch_embedding.weight"].flatten(1) @ patch.flatten())
    x = torch.stack(tokens) + w[e + "position_embedding.weight"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    x = norm(x, "vision_model.pre_layrnorm")
    for number in range(4):
        p = f"vision_model.encoder.layers.{number}."
        y = norm(x, p + "layer_norm1")
        q, k, v = (linear(y, p + f"self_attn.{c}_proj") for c in "qkv")
        heads = []
        for h in range(6):
            part = slice(8 * h, 8 * h + 8)
            scores = q[:, part] @ k[:, part].T / 8**0.5
            heads.append(scores.softmax(-1) @ v[:, part])
        x = x + linear(torch.cat(heads, -1), p + "self_attn.out_proj")
        y = linear(norm(x, p + "layer_norm2"), p + "mlp.fc1")
        x = x + linear(y / (1 + (-1.702 * y).exp()), p + "mlp.fc2")
    pooled = norm(x[0], "vision_model.post_layernorm")
    p = w["visual_projection.weight"] @ pooled
    expected = p / p.pow(2).sum().sqrt()
    ours = CLIP.from_pretrained(folder, dtype=torch.float64)
    found = ours.encode_image(inputs()[1].double())
    assert_close(found[1], expected)


@torch.no_grad()
def test_logits_are_the_scaled_cosines(folder):
    ours, (ids, images) = CLIP.from_pretrained(folder), inputs()
    per_image, per_text = ours(ids, images)
    for i in range(IMAGES):
        for j in range(J):
            # Each alone: no image and no text knows of the others in its batch.
            image, text = ours.encode_image(images[i : i + 1]), ours.encode_text(ids[j : j + 1])
            expected = math.exp(1.7) * F.cosine_similarity(image, text)[0]
            assert_close(per_image[i, j], expected)
            assert_close(per_text[j, i], expected)


@torch.no_grad()
def test_a_caption_is_read_up_to_its_end(folder):
    ours, (ids, _) = CLIP.from_pretrained(folder), inputs()
    before = ours.encode_text(ids)
    behind = ids.clone()
    behind[0, 6:] = 5
    assert_close(ours.encode_text(behind)[0], before[0])
    assert_close(ours.encode_text(ids[:1, :6])[0], before[0])
    inside = ids.clone()
    inside[:, 2] = 4
    assert ((ours.encode_text(inside) - before).abs().amax(-1) > 1e-2).all()


def test_the_end_of_a_text():
    ids = torch.tensor([[9, 5, 97, 98, 97], [97, 1, 1, 1, 1], [1, 2, 3, 4, 97], [5, 6, 7, 3, 4]])
    sizes = {k: v for k, v in TEXT.items() if k not in ("eos_token_id", "bos_token_id")}
    ends = {
        eos: CLIPTextTransformer(CLIPTextConfig(**sizes, eos_token_id=eos)).ends(ids).tolist()
        for eos in (97, 2)
    }
    assert ends == {97: [2, 0, 4, 0], 2: [3, 0, 4, 2]}


def test_a_mask_of_pairs(folder):
    encoder = CLIP.from_pretrained(folder).vision_model.encoder
    assert isinstance(encoder, Encoder)
    x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(3))
    seen = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])[:, None, None]  # b 1 1 s
    with torch.no_grad():
        y = encoder(x, seen)
        assert_close(y[0], encoder(x[:1])[0])
        assert_close(y[1, :3], encoder(x[1:, :3])[0])
        assert torch.equal(encoder(x, layer=0), x)


# The loss


def test_the_loss_equals_transformers(folder):
    ours, theirs = CLIP.from_pretrained(folder), transformers.CLIPModel.from_pretrained(folder)
    ids, images = inputs()
    images = torch.cat((images, -images[:1]))
    expected = theirs(ids, images, return_loss=True)
    found = contrastive_loss(ours(ids, images)[1])
    assert_close(found, expected.loss)
    expected.loss.backward()
    found.backward()
    expected = dict(theirs.named_parameters())
    for name, weight in ours.named_parameters():
        assert_close(weight.grad, expected[name].grad, atol=1e-5, rtol=1e-4)


def test_the_loss_by_loops():
    logits = 3 * torch.randn(5, 5, generator=torch.Generator().manual_seed(4))
    total = 0.0
    for pair in range(5):
        own = math.exp(logits[pair, pair])
        total -= math.log(own / sum(math.exp(logits[pair, i]) for i in range(5)))
        total -= math.log(own / sum(math.exp(logits[j, pair]) for j in range(5)))
    assert_close(contrastive_loss(logits).item(), total / 10, rtol=1e-6, atol=0)
    assert_close(contrastive_loss(logits), contrastive_loss(logits.T))
    assert_close(contrastive_loss(torch.zeros(7, 7)).item(), math.log(7))
    with pytest.raises(ValueError, match="5 texts and 4 images are no pairs"):
        contrastive_loss(logits[:, :4])


def test_where_training_starts():
    torch.manual_seed(0)
    model = CLIP(CLIPConfig(CLIPTextConfig(**small(TEXT)), CLIPVisionConfig(**VISION), 20))
    assert_close(model.logit_scale.exp().item(), 1 / 0.07, rtol=1e-4, atol=0)
    tables = [
        model.text_model.embeddings.token_embedding,
        model.text_model.embeddings.position_embedding,
    ]
    for table in tables:
        assert 0.015 < table.weight.std() < 0.025
    embeddings = model.vision_model.embeddings
    patches = embeddings.patch_embedding(inputs()[1])
    assert 0.5 < embeddings.position_embedding.weight.std() / patches.std() < 2
    assert 0.5 < model.vision_model.embeddings.class_embedding.norm() < 1.5
    assert_close(unit(torch.tensor([[3.0, 4.0]])), torch.tensor([[0.6, 0.8]]))


@pytest.mark.parametrize("ours", [CLIPTextConfig, CLIPVisionConfig, CLIPConfig])
def test_what_a_config_leaves_out_is_as_in_transformers(ours):
    theirs = getattr(transformers, ours.__name__)()
    left_out = {k: v for k, v in dataclasses.asdict(ours()).items() if "_config" not in k}
    assert left_out and left_out == {name: getattr(theirs, name) for name in left_out}


@pytest.mark.parametrize("ours", [CLIPTextConfig, CLIPVisionConfig, CLIPConfig])
def test_a_config_cannot_be_edited_behind_its_checks(ours):
    with pytest.raises(dataclasses.FrozenInstanceError):
        ours().hidden_size = 0


def trainable() -> tuple[CLIP, tuple[torch.Tensor, torch.Tensor]]:
    """Four pairs, to be learned by heart."""
    torch.manual_seed(0)
    model = CLIP(CLIPConfig(CLIPTextConfig(**small(TEXT)), CLIPVisionConfig(**VISION), 20))
    ids = torch.randint(3, EOS, (4, 5))
    ids[:, -1] = EOS
    return model, (ids, torch.randn(4, 3, 30, 30))


@pytest.mark.parametrize("loss", [contrastive_loss, sigmoid_loss])
def test_training_finds_the_pairs(loss):
    model, batch = trainable()
    past = train(model, itertools.repeat(batch), steps=40, learning_rate=3e-3, loss=loss)
    assert len(past) == 40
    (first, scale), (last, _) = past[0], past[-1]
    assert_close(scale, 1 / 0.07, rtol=1e-4, atol=0)
    assert last < 0.2 * first
    assert model(*batch)[0].argmax(1).tolist() == [0, 1, 2, 3]
    again, batch = trainable()
    assert train(again, [batch] * 60, steps=40, learning_rate=3e-3, loss=loss) == past


def test_training_takes_the_first_loss_before_a_step_and_each_batch_once():
    model, (ids, images) = trainable()
    seen = []
    model.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    batches = [(ids[[n, n + 1]], images[[n, n + 1]]) for n in range(3)]
    expected = contrastive_loss(model(*batches[0])[1]).item()
    seen.clear()
    past = train(model, batches, steps=3, learning_rate=1e-2)
    assert past[0][0] == expected
    assert all(map(torch.equal, seen, [ids for ids, _ in batches]))


def test_the_scale_is_bounded():
    model, batch = trainable()
    past = train(model, itertools.repeat(batch), steps=12, learning_rate=0.02, max_scale=14.3)
    assert max(scale for _, scale in past[1:]) <= 14.3 * (1 + 1e-6)
    with torch.no_grad():
        model.logit_scale.fill_(7.0)
    train(model, [batch], steps=1, learning_rate=1e-9)
    assert_close(model.logit_scale.exp().item(), 100.0, rtol=1e-4, atol=0)


def small(sizes: dict) -> dict:
    return {key: value for key, value in sizes.items() if key != "bos_token_id"}


# What is refused


@pytest.mark.parametrize(
    "shape", [(2, 3, 30, 31), (2, 3, 29, 30), (2, 1, 30, 30), (2, 3, 240, 240)]
)
def test_images_of_another_shape_are_refused(folder, shape):
    ours = CLIP.from_pretrained(folder)
    said = rf"shape \({', '.join(map(str, shape))}\), the config wants b images of 3x30x30"
    tower, images = ours.vision_model, torch.zeros(shape)
    for see in (
        ours.encode_image,
        tower,
        tower.embeddings,
        lambda images: tower.states(images, -1),
        lambda images: ours(inputs()[0], images),
    ):
        with pytest.raises(ValueError, match=said):
            see(images)


def test_images_below_one_patch_are_refused(folder):
    with pytest.raises(ValueError, match=r"\(1, 3, 30, 7\), .* 3x30x30 or another size"):
        CLIP.from_pretrained(folder).encode_image(
            torch.zeros(1, 3, 30, 7), interpolate_pos_encoding=True
        )


def test_texts_that_do_not_fit_are_refused(folder):
    ours = CLIP.from_pretrained(folder)
    with pytest.raises(
        ValueError, match="texts of 14 tokens, the config has positions for 1 to 13"
    ):
        ours.encode_text(torch.full((1, 14), EOS))
    with pytest.raises(ValueError, match="texts of 0 tokens"):
        ours.encode_text(torch.zeros(1, 0, dtype=torch.long))


def test_a_mask_of_another_length_is_refused(folder, unchecked):
    with pytest.raises(ValueError, match=r"mask of shape \(3, 10\), for b=3 s=11"):
        CLIP.from_pretrained(folder).encode_text(inputs()[0], torch.ones(3, 10))


REFUSED = [
    ("vision_config", {"hidden_size": 50}, "uneven: hidden_size=50, num_attention_heads=6"),
    ("vision_config", {"hidden_act": "mish"}, "hidden_act='mish' isn't supported"),
    ("vision_config", {"patch_size": 31}, "patch_size=31 of image_size=30"),
    ("vision_config", {"num_channels": 0}, "num_channels=0 is below 1"),
    ("vision_config", {"image_size": [30, 30]}, r"image_size=\[30, 30\] isn't of type int"),
    ("text_config", {"num_hidden_layers": 0}, "num_hidden_layers=0 is below 1"),
    ("text_config", {"eos_token_id": [1, 2]}, r"eos_token_id=\[1, 2\] isn't of type int"),
    ("text_config", {"vocab_size": "99"}, "vocab_size='99' isn't of type int"),
]


@pytest.mark.parametrize("part, changes, said", REFUSED)
def test_a_tower_that_cannot_be_honoured_is_refused(folder, part, changes, said):
    config = json.loads((folder / "config.json").read_text())
    edit(folder, **{part: config[part] | changes})
    with pytest.raises(CheckpointError, match=rf"config\.json: {part}: {said}"):
        CLIP.from_pretrained(folder)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"projection_dim": 0}, "projection_dim=0 is below 1"),
        ({"model_type": "siglip"}, "model_type='siglip' isn't supported; this class reads 'clip'"),
        ({"vision_config": 3}, "vision_config=3 isn't of type CLIPVisionConfig"),
    ],
)
def test_a_config_that_cannot_be_honoured_is_refused(folder, changes, said):
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match=rf"config\.json: {said}"):
        CLIP.from_pretrained(folder)


# Files


def resave(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@torch.no_grad()
def test_counters_of_older_files_are_dropped_by_name(folder):
    before = CLIP.from_pretrained(folder).encode_image(inputs()[1])
    counters = {
        "text_model.embeddings.position_ids": torch.arange(13)[None],
        "vision_model.embeddings.position_ids": torch.arange(10)[None],
    }
    resave(folder, lambda tensors: tensors.update(counters))
    assert torch.equal(CLIP.from_pretrained(folder).encode_image(inputs()[1]), before)
    resave(folder, lambda tensors: tensors.update({"encoder.position_ids": torch.arange(3)}))
    with pytest.raises(CheckpointError, match=r"unexpected: encoder\.position_ids"):
        CLIP.from_pretrained(folder)


def test_missing_and_misshaped_weights_are_named(folder):
    resave(folder, lambda tensors: tensors.pop("vision_model.pre_layrnorm.bias"))
    resave(folder, lambda tensors: tensors.update({"logit_scale": torch.ones(1)}))
    said = r"missing: vision_model\.pre_layrnorm\.bias; mis-shaped: logit_scale is \(1,\)"
    with pytest.raises(CheckpointError, match=said):
        CLIP.from_pretrained(folder)


@pytest.mark.parametrize("prefix", ["", "vision_tower.", "model.vision_tower."])
@torch.no_grad()
def test_both_layouts_of_a_tower(folder, prefix):
    theirs = transformers.CLIPVisionModel.from_pretrained(folder)
    plain = {prefix + name: weight for name, weight in theirs.state_dict().items()}
    deep = {f"{prefix}vision_model.{n.removeprefix(prefix)}": w for n, w in plain.items()}
    deep[f"{prefix}vision_model.embeddings.position_ids"] = torch.arange(10)[None]
    rest = {"language_model.vision_model.x": torch.ones(2), "projector.weight": torch.ones(3)}
    ours = CLIPVisionTransformer(CLIPVisionConfig(**VISION))
    for tensors in (plain, deep):
        given = tensors | rest
        found = layout(given, prefix)
        assert given.keys() == (tensors | rest).keys()  # not changed in place
        assert found.keys() - rest.keys() == plain.keys() and found.keys() >= rest.keys()
        tower = {n.removeprefix(prefix): w for n, w in found.items() if n not in rest}
        ours.load_state_dict(tower)
        assert_close(ours(inputs()[1])[0], theirs(inputs()[1]).last_hidden_state)
    name = f"{prefix}vision_model.post_layernorm.bias"
    with pytest.raises(CheckpointError, match=f"both {name} and {prefix}post_layernorm.bias"):
        layout(plain | {name: torch.ones(48)}, prefix)


# What the configs of openai/clip-vit-* hold beside the sizes, in each tower and on top.
OLD = {
    "add_cross_attention": False,
    "bad_words_ids": None,
    "chunk_size_feed_forward": 0,
    "diversity_penalty": 0.0,
    "dropout": 0.0,
    "encoder_no_repeat_ngram_size": 0,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "initializer_factor": 1.0,
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "projection_dim": 512,
    "pruned_heads": {},
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "tie_word_embeddings": True,
    "top_k": 50,
    "top_p": 1.0,
    "transformers_version": "4.16.0.dev0",
    "typical_p": 1.0,
}


@pytest.mark.parametrize("twice", [False, True])
@torch.no_grad()
def test_an_old_config_is_read_as_transformers_reads_it(folder, twice):
    """Without a warning; of a config that is there twice the second counts, with defaults."""
    config = json.loads((folder / "config.json").read_text())
    text, vision = config["text_config"] | OLD, config["vision_config"] | OLD
    text["eos_token_id"] = 2
    both = {"text_config_dict": None, "vision_config_dict": None}
    if twice:
        both = {"text_config_dict": small(TEXT), "vision_config_dict": VISION | {"image_size": 24}}
        text["hidden_act"], vision["image_size"] = "gelu", 99
        del both["text_config_dict"]["eos_token_id"]  # then 49407, which no text has
    edit(folder, text_config=text, vision_config=vision, **both)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = CLIP.from_pretrained(folder)
    assert (ours.config.text_config.eos_token_id == 2) is not twice
    assert ours.config.vision_config.image_size == (24 if twice else 30)
    theirs = transformers.CLIPModel.from_pretrained(folder)
    ids, images = inputs(side=24 if twice else 30)
    assert_close(ours(ids, images)[0], theirs(ids, images).logits_per_image)


def test_what_a_tower_does_not_know_is_reported(folder):
    config = json.loads((folder / "config.json").read_text())
    edit(folder, vision_config=config["vision_config"] | {"use_2d_rope": True})
    with pytest.warns(UserWarning, match=r"config\.json: not read: vision_config\.use_2d_rope$"):
        CLIP.from_pretrained(folder)


def test_a_tower_from_a_part_of_a_composite():
    """LLaVA's vision_config, as published."""
    part = dict(VISION, model_type="clip_vision_model", projection_dim=768, vocab_size=32000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = parse_config(part, CLIPVisionConfig, source="config.json: vision_config")
    assert config == CLIPVisionConfig(**VISION)
    assert config.grid == 3


# https://github.com/mlfoundations/open_clip/blob/main/docs/model_profile.csv prints, in millions,
# total, image and text with their projections (ViT-B-32, ViT-L-14, ViT-L-14-336); the digits are
# those that openai/CLIP's models have by `sum(p.numel() for p in model.parameters())`.
LARGE = (
    dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12),
    dict(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        patch_size=14,
    ),
)


@pytest.mark.parametrize(
    "text, vision, p, printed, exact",
    [
        ({}, {}, 512, (151.28, 87.85, 63.43), 151_277_313),
        (*LARGE, 768, (427.62, 303.97, 123.65), 427_616_513),
        (LARGE[0], LARGE[1] | {"image_size": 336}, 768, (427.94, 304.29, 123.65), 427_944_193),
    ],
    ids=["ViT-B/32", "ViT-L/14", "ViT-L/14@336px"],
)
def test_full_sizes_have_the_published_number_of_parameters(text, vision, p, printed, exact):
    with torch.device("meta"):
        model = CLIP(CLIPConfig(CLIPTextConfig(**text), CLIPVisionConfig(**vision), p))
    image, words = (
        sum(weight.numel() for part in parts for weight in part.parameters())
        for parts in (
            (model.vision_model, model.visual_projection),
            (model.text_model, model.text_projection),
        )
    )
    assert image + words + 1 == sum(w.numel() for w in model.parameters()) == exact
    assert tuple(round(n / 1e6, 2) for n in (exact, image, words)) == printed
