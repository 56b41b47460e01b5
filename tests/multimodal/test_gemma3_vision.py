"""Gemma 3 with images against transformers, through checkpoint folders that transformers wrote.

An image has nine tokens and a window five, so that an image is longer than a window.
"""

import copy
import json
import math
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import Gemma3ForConditionalGeneration
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from snippets.common.checkpoint import CheckpointError
from snippets.common.generate import generate
from snippets.models.gemma3 import Gemma3Config
from snippets.multimodal.gemma3_vision import (
    Gemma3Vision,
    Gemma3VisionConfig,
    image_pairs,
    pan_and_scan,
    place_images,
    run_lengths,
)
from snippets.multimodal.llava import text_labels
from snippets.multimodal.siglip import SiglipVisionConfig
from tests.checkpoints import edit, redraw

V, W, M, SIZE = 101, 5, 9, 33
BOI, EOI, IMAGE = 97, 98, 99
FULL, SLIDING = "full_attention", "sliding_attention"
TEXT = dict(
    vocab_size=V,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=7,  # five with a window, one without, one with
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=14,
    sliding_window=W,
    query_pre_attn_scalar=10,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
VISION = dict(
    hidden_size=36,
    intermediate_size=52,
    num_hidden_layers=2,
    num_attention_heads=3,
    image_size=SIZE,  # six patches and a rest of 3
    patch_size=5,
    vision_use_head=False,
)
WHOLE = dict(
    mm_tokens_per_image=M, boi_token_index=BOI, eoi_token_index=EOI, image_token_index=IMAGE
)
ROPE = {
    FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
    SLIDING: {"rope_type": "default", "rope_theta": 50.0},
}
CONFIGS = {
    "as published": ({"rope_parameters": ROPE}, {}, {}),
    "full layer first": ({"layer_types": [FULL, SLIDING, FULL, *[SLIDING] * 4]}, {}, {}),
    "window as long as an image": ({"sliding_window": M}, {}, {}),
    "window longer than a prompt": ({"sliding_window": 70}, {}, {}),
    "windows of one token": ({"sliding_window": 1}, {}, {}),
    "untied, whatever the text says": ({}, {}, {"tie_word_embeddings": False}),
    "a head that nobody reads": ({}, {"vision_use_head": True}, {}),
    "four tokens, large eps": ({}, {"layer_norm_eps": 0.3}, {"mm_tokens_per_image": 4}),
    "a token a patch": ({}, {"image_size": 15}, {}),
    "image token outside the vocabulary": ({}, {}, {"image_token_index": 150}),
}


def oracle(text=None, vision=None, whole=None) -> Gemma3ForConditionalGeneration:
    config = transformers.Gemma3Config(
        text_config=TEXT | (text or {}),
        vision_config=VISION | (vision or {}),
        **(WHOLE | (whole or {})),
    )
    return redraw(Gemma3ForConditionalGeneration(config))


def prompts(m: int = M, image: int = IMAGE, rows=("tti", "ttitit", "t")):
    """Ids and mask of rows padded on the left: `i` an image with its begin and end, `t` words."""
    drawn = torch.Generator().manual_seed(4)
    long = []
    for row in rows:
        ids: list[int] = []
        for kind in row:
            words = torch.randint(3, 90, (2,), generator=drawn).tolist()
            ids += [BOI, *[image] * m, EOI] if kind == "i" else words
        long.append(ids + torch.randint(3, 90, (3,), generator=drawn).tolist())
    t = max(map(len, long))
    ids = torch.tensor([[0] * (t - len(row)) + row for row in long])
    return ids, torch.tensor([[0] * (t - len(row)) + [1] * len(row) for row in long])


def pictures(n: int, size: int = SIZE, seed: int = 5) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def reference(theirs, ids, mask=None, images=None, image: int = IMAGE):
    if mask is None:
        mask = torch.ones_like(ids)
    return theirs(
        ids,
        pixel_values=images,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        token_type_ids=(ids == image).long(),
    ).logits


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma")
    theirs = oracle({"rope_parameters": ROPE})
    theirs.save_pretrained(folder)
    return Gemma3Vision.from_pretrained(folder), theirs, folder


@pytest.fixture
def folder(pair, tmp_path):
    """A copy to change."""
    for file in pair[2].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_logits_equal_transformers(changes, tmp_path):
    theirs = oracle(*changes)
    theirs.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # every key is read
        ours = Gemma3Vision.from_pretrained(tmp_path)
    image = ours.config.image_token_index
    ids, mask = prompts(ours.config.mm_tokens_per_image, image)
    images = pictures(3, ours.config.vision_config.image_size)
    expected = reference(theirs, ids, mask, images, image)
    found = ours(ids, images, mask)
    assert found.isfinite().all()
    # Logits of up to 10, through nine layers: a little above the usual bound of 1e-5.
    assert_close(found[mask.bool()], expected[mask.bool()], atol=4e-5, rtol=1e-5)
    assert expected[mask.bool()].std() > 0.1


ROWS = {
    "one image and no word": ("i",),
    "images with their ends only between": ("ii", "ii"),
    "a row without an image": ("t", "it"),
    "three in a row": ("iii", "tti", "i"),
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@torch.no_grad()
def test_images_wherever_they_stand(rows, pair):
    ours, theirs, _ = pair
    ids, mask = prompts(rows=rows)
    images = pictures(sum(row.count("i") for row in rows))
    expected = reference(theirs, ids, mask, images)
    assert_close(ours(ids, images, mask)[mask.bool()], expected[mask.bool()])


@torch.no_grad()
def test_no_padding_and_no_mask_are_the_same(pair):
    ours, theirs, _ = pair
    ids, images = prompts(rows=("ti", "it"))[0], pictures(2)
    found = ours(ids, images)
    assert_close(found, reference(theirs, ids, None, images))
    assert_close(found, ours(ids, images, torch.ones_like(ids)))


@torch.no_grad()
def test_masked_tokens_of_an_image_are_seen_by_nobody(pair):
    ours, theirs, _ = pair
    ids, mask = prompts(rows=("ti", "it"))
    mask[0, 8:] *= ids[0, 8:] != IMAGE  # the rest of its image
    images = pictures(2)
    assert 0 < (mask[0] * (ids[0] == IMAGE)).sum() < M
    expected = reference(theirs, ids, mask, images)
    assert_close(ours(ids, images, mask)[mask.bool()], expected[mask.bool()])


@torch.no_grad()
def test_images_that_touch_are_one_run_as_in_transformers(pair):
    ours, theirs, _ = pair
    ids = torch.tensor([[5, *[IMAGE] * 2 * M, 6, 7], [5, *[IMAGE] * M, 8, *[IMAGE] * M, 7]])
    found = ours(ids, pictures(4))
    assert_close(found, reference(theirs, ids, None, pictures(4)))
    others = pictures(4, seed=6)
    others[[0, 2]] = pictures(4)[[0, 2]]  # the second image of each row is another one
    changed = ours(ids, others)
    assert (changed[0, 1] - found[0, 1]).abs().max() > 0.01
    assert torch.equal(changed[1, : M + 1], found[1, : M + 1])


@torch.no_grad()
def test_text_alone_equals_transformers_and_the_text_model(pair):
    ours, theirs, _ = pair
    ids, mask = prompts(rows=("tttt", "t"))
    found = ours(input_ids=ids, attention_mask=mask)
    assert_close(found[mask.bool()], reference(theirs, ids, mask)[mask.bool()])
    assert torch.equal(found, ours.language_model(ids, mask))


@torch.no_grad()
def test_an_images_own_tokens_are_not_scaled(pair):
    """The first layer reads sqrt(d) times the words' embeddings, and the images' as they come."""
    ours, theirs, _ = pair
    ids, images, seen = prompts(rows=("ti",))[0], pictures(1), []
    first = ours.language_model.model.layers[0]
    hook = first.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    ours(ids, images)
    hook.remove()
    is_image = ids == IMAGE
    embedded = ours.language_model.model.embed_tokens(ids[~is_image])
    assert_close(seen[0][~is_image], 48**0.5 * embedded)
    features = theirs.get_image_features(images).pooler_output
    assert_close(seen[0][is_image], features[0])
    assert_close(ours.encode_images(images), features)


# Who sees whom, by the rule itself


def allowed(ids, mask, i, j, window=None) -> bool:
    """Whether token i of a row attends to token j of it."""
    between = ids[min(i, j) : max(i, j) + 1]
    same_image = all(token == IMAGE for token in between)
    near = window is None or j > i - window
    return bool(mask[j]) and near and (j <= i or same_image)


def test_the_mask_is_the_rules():
    ids, mask = prompts(rows=("tii", "t", "i"))
    found = image_pairs(ids == IMAGE, mask, 0)
    for b in range(3):
        row, keep = ids[b].tolist(), mask[b].tolist()
        t = len(row)
        expected = [[allowed(row, keep, i, j) for j in range(t)] for i in range(t)]
        assert found[b, 0].tolist() == expected
    assert found[0, 0].triu(1).sum() == 2 * M * (M - 1) // 2


@torch.no_grad()
def test_every_layer_attends_by_the_rule(pair):
    """Each layer's attention by itself, token by token."""
    ours, _, _ = pair
    ids, mask, images = *prompts(rows=("tit", "i")), pictures(2)
    model, given = ours.language_model.model, []
    for number in (0, 5):
        attention = model.layers[number].self_attn
        hook = attention.register_forward_hook(lambda m, inputs, y: given.append((m, inputs, y)))
        ours(ids, images, mask)
        hook.remove()
    for (attention, (x, rotation, *_), y), window in zip(given, (W, None), strict=True):
        for b in range(2):
            turn = tuple(table[b : b + 1] for table in rotation)
            for i in mask[b].nonzero()[:, 0].tolist():
                seen = [j for j in range(len(ids[b])) if allowed(ids[b], mask[b], i, j, window)]
                alone = torch.zeros(1, 1, len(ids[b]), len(ids[b]), dtype=torch.bool)
                alone[..., seen] = True
                plain = super(type(attention), attention) if window else attention
                q, k, v = (
                    attention.split(p(x[b : b + 1]))
                    for p in (attention.q_proj, attention.k_proj, attention.v_proj)
                )
                q, k = (
                    turned(norm(z), turn)
                    for norm, z in ((attention.q_norm, q), (attention.k_norm, k))
                )
                expected = plain.attend(q, k, v, alone)[:, :, i]
                assert_close(attention.o_proj(expected.flatten(1))[0], y[b, i])


def turned(x, rotation):
    """Both halves of the features as one complex number, times e^(i angle)."""
    a, b = x.chunk(2, -1)
    z = torch.complex(a, b) * torch.complex(*rotation)[:, None]
    return torch.cat((z.real, z.imag), -1)


@torch.no_grad()
def test_what_is_behind_an_image_cant_change_it_and_the_image_itself_can(pair):
    ours, _, _ = pair
    ids, images = prompts(rows=("titi",))[0], pictures(2)
    before = ours(ids, images)
    other = torch.stack((images[0], images[1].flip(-1)))
    first, second = ((ids[0] == BOI).nonzero()[:, 0] + 1).tolist()
    changed = (ours(ids, other) - before).abs().amax(-1)[0]
    assert not changed[: second - 1].any() and changed[second:].all()
    words = ids.clone()
    words[0, -1] = 7
    assert not (ours(words, images) - before)[0, :-1].any()
    other = images.clone()
    other[0, :, -10:, -10:] += 1  # the last corner of the first image
    changed = (ours(ids, other) - before).abs().amax(-1)[0]
    assert changed[first:].all() and not changed[:first].any()


# The cache


def chunked(model, ids, mask, images, chunks):
    """Logits chunk by chunk, each with the images that begin in it."""
    cache, outputs, used = model.new_cache(), [], 0
    for part in torch.arange(ids.shape[1]).split(chunks):
        here = int((ids[:, part] == IMAGE).sum()) // M
        given = images[used : used + here] if here else None
        used += here
        outputs.append(model(ids[:, part], given, mask[:, : part[-1] + 1], cache))
    assert used == len(images) and cache.length == ids.shape[1]
    return torch.cat(outputs, 1), cache


CHUNKS = {
    "between images": [13, 1, 11, 1, 1, 1],
    "after the first": [13, 15],
    "one behind": [27, 1],
    "image alone": [4, M, 2, M + 2, 2],
    "in the words": [2, 12, 14],
}


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("window", [W, 1, M + 3])
@torch.no_grad()
def test_chunks_that_hold_whole_images_equal_the_whole(chunks, window, pair):
    text = replace(pair[0].config.text_config, sliding_window=window)
    ours = Gemma3Vision(replace(pair[0].config, text_config=text)).eval()
    ours.load_state_dict(pair[0].state_dict())
    first = [5, 6, 7, BOI, *[IMAGE] * M, EOI, 8, BOI, *[IMAGE] * M, EOI, 3, 4]
    ids = torch.tensor([first, [0, 0, *range(30, 56)]])
    mask = (ids > 0).long()
    whole = ours(ids, pictures(2), mask)
    found, cache = chunked(ours, ids, mask, pictures(2), chunks)
    assert_close(found[mask.bool()], whole[mask.bool()], atol=1e-5, rtol=1e-5)
    assert cache[0].nbytes == 2 * 2 * 2 * 14 * 4 * (window - 1)


@torch.no_grad()
def test_a_later_image_in_a_chat(pair):
    """Pictures come with the second question; the answer's tokens lie between."""
    ours, _, _ = pair
    ids, images = prompts(rows=("titti",))[0], pictures(2)
    whole = ours(ids, images)
    cache, outputs = ours.new_cache(), []
    cut = ids[0].tolist().index(EOI) + 3
    outputs.append(ours(ids[:, :cut], images[:1], None, cache))
    outputs.append(ours(ids[:, cut : cut + 1], cache=cache))
    outputs.append(ours(ids[:, cut + 1 :], images[1:], cache=cache))
    assert_close(torch.cat(outputs, 1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("untied", [False, True])
def test_it_writes_what_transformers_writes(untied, pair, tmp_path):
    ours, theirs, _ = pair
    if untied:  # random tied heads repeat the last word
        theirs = oracle({}, {}, {"tie_word_embeddings": False})
        theirs.save_pretrained(tmp_path)
        ours = Gemma3Vision.from_pretrained(tmp_path)
    ids, mask = prompts()
    images = pictures(3)
    written = generate(
        ours, ids, attention_mask=mask, images={"pixel_values": images}, max_new_tokens=12
    )
    expected = theirs.generate(
        ids,
        pixel_values=images,
        attention_mask=mask,
        token_type_ids=(ids == IMAGE).long(),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=-1,
    )
    assert torch.equal(written, expected)
    assert not untied or len(written[:, ids.shape[1] :].unique()) > 8
    # And without a cache, where the images are read anew at each step.
    rest = ids
    for _ in range(3):
        seen = torch.cat((mask, torch.ones(3, rest.shape[1] - ids.shape[1], dtype=int)), 1)
        with torch.no_grad():
            rest = torch.cat((rest, ours(rest, images, seen)[:, -1:].argmax(-1)), 1)
    assert torch.equal(rest, written[:, : rest.shape[1]])


@torch.no_grad()
def test_an_image_token_that_the_model_wrote_is_a_word(pair):
    ours, theirs, _ = pair
    ids, images = prompts(rows=("ti",))[0], pictures(1)
    cache = ours.new_cache()
    ours(ids, images, cache=cache)
    past = theirs(ids, pixel_values=images, token_type_ids=(ids == IMAGE).long()).past_key_values
    token = torch.tensor([[IMAGE]])
    expected = theirs(token, past_key_values=past).logits
    assert_close(ours(token, cache=cache), expected)


# What is refused


def test_a_chunk_that_ends_within_an_image_is_refused(pair):
    ours, _, _ = pair
    ids, images = prompts(rows=("ti",))[0], pictures(1)
    cut = ids[0].tolist().index(BOI) + 5
    with pytest.raises(ValueError, match=r"runs of \[4\] image tokens, an image has 9.*chunk"):
        ours(ids[:, :cut], images, cache=ours.new_cache())


WRONG = {
    "too many": (2 * M, 1, r"18 placeholders .* and 9 image tokens in"),
    "too few": (M, 2, r"9 placeholders .* and 18 image tokens in"),
    "none": (0, 1, r"0 placeholders .* and 9 image tokens"),
    "no picture": (M, 0, r"9 placeholders .* and 0 image tokens"),
    "one token short": (M - 1, 1, r"runs of \[8\] image tokens, an image has 9"),
    "one token more": (M + 1, 1, r"runs of \[10\] image tokens, an image has 9"),
}


@pytest.mark.parametrize("tokens, images, said", WRONG.values(), ids=WRONG)
def test_wrong_counts_are_refused_with_both_numbers(tokens, images, said, pair):
    ids = torch.tensor([[5, *[IMAGE] * tokens, 6]])
    with pytest.raises(ValueError, match=said):
        pair[0](ids, pictures(images) if images else None)


def test_the_right_sum_in_the_wrong_places_is_refused(pair):
    ids = torch.tensor([[5, *[IMAGE] * (M - 1), 6, 7, 8], [5, *[IMAGE] * (M + 1), 6]])
    assert int((ids == IMAGE).sum()) == 2 * M
    with pytest.raises(ValueError, match=r"runs of \[8, 10\] image tokens, an image has 9"):
        pair[0](ids, pictures(2))


def test_image_tokens_without_pictures_are_refused(pair):
    ids, cache = torch.tensor([[IMAGE] * M]), pair[0].new_cache()
    with pytest.raises(ValueError, match=r"runs of \[1\] image tokens, an image has 9"):
        pair[0](ids[:, :1], cache=cache)
    pair[0](torch.tensor([[5]]), cache=cache)
    with pytest.raises(ValueError, match=r"9 placeholders .* and 0 image tokens"):
        pair[0](ids, cache=cache)
    assert cache.length == 1


@pytest.mark.parametrize("shape", [(1, 3, SIZE, SIZE + 1), (1, 1, SIZE, SIZE), (1, 3, 30, 30)])
def test_images_of_another_shape_are_refused(shape, pair, unchecked):
    ids = prompts(rows=("i",))[0]
    with pytest.raises(ValueError, match=rf"{shape[1]}, {shape[2]}, {shape[3]}\).*3x33x33"):
        pair[0](ids, torch.randn(shape))


def test_a_mask_of_another_length_is_refused(pair, unchecked):
    ids, mask = prompts(rows=("i",))
    with pytest.raises(ValueError, match="attention_mask of shape"):
        pair[0](ids, pictures(1), mask[:, 1:])


REFUSED = [
    ({"mm_tokens_per_image": 8}, "mm_tokens_per_image=8 isn't the square of a side"),
    ({"mm_tokens_per_image": 0}, "mm_tokens_per_image=0 isn't the square"),
    ({"mm_tokens_per_image": 16}, "uneven: 6 patches a side, 4 tokens a side"),
    ({"model_type": "gemma3_text"}, "model_type='gemma3_text' isn't supported"),
    ({"text_config": {"hidden_size": 48}}, "text_config lacks intermediate_size"),
    ({"vision_config": VISION | {"hidden_act": "swish2"}}, "hidden_act='swish2'"),
    (
        {"text_config": TEXT | {"use_bidirectional_attention": True}},
        "use_bidirectional_attention=True",
    ),
]


@pytest.mark.parametrize("changes, said", REFUSED)
def test_a_config_that_cannot_be_honoured_is_refused(folder, changes, said):
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{said}"):
        Gemma3Vision.from_pretrained(folder)


# Files


@torch.no_grad()
def test_both_layouts_of_files_are_read(pair, folder):
    ours, _, _ = pair
    file = folder / "model.safetensors"
    older = {
        name.replace("vision_tower.", "vision_tower.vision_model."): tensor
        for name, tensor in load_file(file).items()
    }
    assert sum("vision_model" in name for name in older) > 30
    save_file(older, file)
    ids, mask = prompts()
    again = Gemma3Vision.from_pretrained(folder)
    assert torch.equal(again(ids, pictures(3), mask), ours(ids, pictures(3), mask))


def test_a_tied_head_may_stand_in_the_file_if_it_is_the_embedding(pair, folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    head = tensors["language_model.model.embed_tokens.weight"].clone()
    save_file(tensors | {"language_model.lm_head.weight": head}, file)
    Gemma3Vision.from_pretrained(folder)
    save_file(tensors | {"language_model.lm_head.weight": head + 1}, file)
    with pytest.raises(CheckpointError, match=r"language_model\.lm_head\.weight differs"):
        Gemma3Vision.from_pretrained(folder)


@pytest.mark.parametrize(
    "name",
    [
        "multi_modal_projector.mm_input_projection_weight",
        "multi_modal_projector.mm_soft_emb_norm.weight",
        "vision_tower.post_layernorm.bias",
        "language_model.model.norm.weight",
    ],
)
def test_a_missing_tensor_is_named(folder, name):
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"missing: {name}"):
        Gemma3Vision.from_pretrained(folder)


def test_a_config_as_published_leaves_most_to_defaults(folder):
    """The keys of the 4B model's file: https://huggingface.co/google/gemma-3-4b-it."""
    published = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
        "vision_config": {
            "hidden_size": 1152,
            "image_size": 896,
            "intermediate_size": 4304,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "patch_size": 14,
            "vision_use_head": False,
        },
    }
    (folder / "config.json").write_text(json.dumps(published))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CheckpointError, match=r"mm_input_projection_weight is \(36, 48\)"):
            Gemma3Vision.from_pretrained(folder)
    theirs = transformers.Gemma3Config.from_pretrained(folder)
    ours = full_size(2560, 10240, 34, 8, 4, 256)
    assert ours.side == 16 and ours.vision_config.grid == 64
    for name in ("vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
        assert getattr(ours.text_config, name) == getattr(theirs.text_config, name)
    assert [ours.text_config.kind(i) for i in range(34)] == theirs.text_config.layer_types


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_is_as_near_to_the_truth_as_transformers(dtype, pair):
    _, truth, folder = pair
    ids, mask, images = *prompts(), pictures(3)
    ours = Gemma3Vision.from_pretrained(folder, dtype=dtype)
    theirs = Gemma3ForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    right = reference(truth, ids, mask, images)[mask.bool()]
    found = ours(ids, images, mask)
    assert found.dtype == dtype
    error = (found[mask.bool()].float() - right).norm() / right.norm()
    theirs = reference(theirs, ids, mask, images.to(dtype))[mask.bool()]
    usual = (theirs.float() - right).norm() / right.norm()
    assert error < 1.3 * usual < 0.2


# What stands where


def test_a_prompt_gets_places_for_its_images(pair):
    config = pair[0].config
    found = place_images([1, 5, BOI, 6, BOI], config, around=[9])
    image = [9, BOI, *[IMAGE] * M, EOI, 9]
    assert found == [1, 5, *image, 6, *image]
    assert place_images([5, 6], config) == [5, 6]
    is_image = torch.tensor([found]) == IMAGE
    assert run_lengths(is_image).tolist() == [M, M]


def test_runs_end_with_their_row():
    rows = torch.tensor([[0, 1, 1], [1, 0, 1], [0, 0, 0]]).bool()
    assert run_lengths(rows).tolist() == [2, 1, 1]
    assert run_lengths(~rows[2:]).tolist() == [3] and run_lengths(rows[2:]).tolist() == []


def test_gradients_reach_all_parts(pair):
    ours = copy.deepcopy(pair[0])
    ids, mask = prompts(rows=("ti", "t"))
    labels = text_labels(ids, IMAGE, mask)[:, 1:]
    assert (labels != -100).sum() == mask[:, 1:].sum() - M
    F.cross_entropy(ours(ids, pictures(1), mask)[:, :-1].transpose(1, 2), labels).backward()
    assert all(w.grad is not None and w.grad.isfinite().all() for w in ours.parameters())
    assert ours.vision_tower.embeddings.patch_embedding.weight.grad.abs().max() > 0


SIDES = [
    (900, 900), (900, 1079), (900, 1080), (900, 1350), (900, 1351), (900, 4000), (256, 512),
    (256, 511), (255, 2000), (300, 400), (2000, 300), (1201, 997), (3000, 700), (300, 301), (1, 9),
    (600, 1500),  # 2.5 crops are 3
]  # fmt: skip


@pytest.mark.parametrize("height, width", SIDES)
@pytest.mark.parametrize(
    "options", [{}, {"min_size": 100, "most": 6, "min_ratio": 1.5}, {"min_ratio": 1.0}]
)
def test_crops_are_the_reference_processors(height, width, options):
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    image = torch.stack((rows.expand(height, width), columns.expand(height, width))).numpy()
    theirs = Gemma3ImageProcessorPil().pan_and_scan(
        image,
        pan_and_scan_min_crop_size=options.get("min_size", 256),
        pan_and_scan_max_num_crops=options.get("most", 4),
        pan_and_scan_min_ratio_to_activate=options.get("min_ratio", 1.2),
    )
    corners = [
        (int(c[1, 0, 0]), int(c[0, 0, 0]), int(c[1, -1, -1]) + 1, int(c[0, -1, -1]) + 1)
        for c in theirs
    ]
    assert pan_and_scan(height, width, **options) == corners


def full_size(hidden, intermediate, layers, heads, kv_heads, head_dim) -> Gemma3VisionConfig:
    text = Gemma3Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
    )
    vision = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=896,
        patch_size=14,
        vision_use_head=False,
    )
    return Gemma3VisionConfig(text, vision)


# Table 1 of the report (arXiv:2503.19786), in millions: vision encoder, embedding, the others. The
# embedding's column has the projector too, and is rounded up.
@pytest.mark.parametrize(
    "embedding, other, sizes",
    [
        (675, 3209, (2560, 10240, 34, 8, 4, 256)),
        (1012, 10759, (3840, 15360, 48, 16, 8, 256)),
        (1416, 25600, (5376, 21504, 62, 32, 16, 128)),
    ],
    ids=["4B", "12B", "27B"],
)
def test_full_sizes_have_the_published_number_of_parameters(embedding, other, sizes):
    with torch.device("meta"):
        model = Gemma3Vision(full_size(*sizes))
    count = {
        name: sum(w.numel() for w in part.parameters()) for name, part in model.named_children()
    }
    table = model.language_model.model.embed_tokens.weight.numel()
    assert round(count["vision_tower"] / 1e6) == 417
    assert round((count["language_model"] - table) / 1e6) == other
    assert math.ceil((table + count["multi_modal_projector"]) / 1e6) == embedding
    assert sum(count.values()) == sum(w.numel() for w in model.parameters())
