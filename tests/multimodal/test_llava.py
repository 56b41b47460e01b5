"""LLaVA against transformers, through checkpoint folders that transformers wrote."""

import json
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import LlavaForConditionalGeneration

from snippets.common.checkpoint import CheckpointError, read_config
from snippets.common.generate import generate
from snippets.multimodal.clip import CLIPVisionConfig
from snippets.multimodal.llava import (
    Llava,
    LlavaConfig,
    LlavaTextConfig,
    expand_placeholders,
    merge_images,
    text_labels,
)
from tests.checkpoints import edit, redraw

V, IMAGE, SIDE, N = 101, 97, 28, 9  # 28 pixels are three patches of 8 and a rest of 4
TEXT = dict(
    model_type="llama",
    vocab_size=V,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
VISION = dict(
    model_type="clip_vision_model",
    hidden_size=40,
    intermediate_size=56,
    num_hidden_layers=4,
    num_attention_heads=5,
    image_size=SIDE,
    patch_size=8,
    projection_dim=24,
)
CONFIGS = {
    "as published": {},
    "the last state": {"vision_feature_layer": -1},
    "counted from the front": {"vision_feature_layer": 1},
    # In a list: the reference fails on a plain 0.
    "what goes into the tower": {"vision_feature_layer": [0]},
    "two states": {"vision_feature_layer": [-2, 2], "multimodal_projector_bias": False},
    "with the class token": {"vision_feature_select_strategy": "full"},
    "other activation": {"projector_hidden_act": "quick_gelu"},
    "tied": {"text": {"tie_word_embeddings": True}},
    "other tower": {"vision": {"hidden_act": "gelu", "patch_size": 7, "num_attention_heads": 2}},
}


def oracle(text=None, vision=None, **changes) -> LlavaForConditionalGeneration:
    config = transformers.LlavaConfig(
        text_config=TEXT | (text or {}),
        vision_config=VISION | (vision or {}),
        image_token_index=IMAGE,
        **changes,
    )
    return redraw(LlavaForConditionalGeneration(config))


@pytest.fixture
def folder(tmp_path) -> Path:
    oracle().save_pretrained(tmp_path)
    return tmp_path


def pictures(i: int, side: int = SIDE) -> torch.Tensor:
    return torch.randn(i, 3, side, side, generator=torch.Generator().manual_seed(1))


def prompts(n: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows: an image in the middle; two in a row at the start; none, padded on the left."""
    rows = [
        [1, 5, *[IMAGE] * n, 7, 8, 9, *[11] * (n - 1)],
        [*[IMAGE] * 2 * n, 4, 6, 3, 9],
        [*[0] * 9, 1, *[12, 40] * n],
    ]
    longest = max(map(len, rows))
    rows = [[0] * (longest - len(row)) + row for row in rows]
    ids = torch.tensor(rows)
    return ids, (ids != 0).long()


def positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_logits_equal_transformers(changes, tmp_path):
    theirs = oracle(**changes)
    theirs.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = Llava.from_pretrained(tmp_path)
    assert not ours.training
    n = ours.config.tokens_per_image
    (ids, mask), images = prompts(n), pictures(3)
    expected = theirs(
        input_ids=ids, pixel_values=images, attention_mask=mask, position_ids=positions(mask)
    ).logits
    found = ours(input_ids=ids, pixel_values=images, attention_mask=mask)
    # Logits reach 10, so their last bits are worth 1e-6.
    assert_close(found[mask.bool()], expected[mask.bool()], atol=2e-5, rtol=2e-5)
    assert expected.std() > 0.1 and n == theirs.get_image_features(images).pooler_output[0].shape[0]
    features = torch.stack(list(theirs.get_image_features(images).pooler_output))
    assert_close(ours.image_features(images), features)
    # Without images it is the language model.
    text = ids[2:, mask[2].bool()]
    assert_close(ours(input_ids=text), theirs(input_ids=text).logits)
    assert_close(ours(input_ids=text), ours.language_model(text))


@torch.no_grad()
def test_each_image_is_where_its_placeholders_are(folder):
    """By hand: the projector's rows in the stream, and the language model behind them."""
    ours, (ids, mask), images = Llava.from_pretrained(folder), prompts(), pictures(3)
    x = ours.language_model.model.embed_tokens(ids)
    gelu = torch.nn.GELU()
    for image, (row, start) in enumerate([(0, 4), (1, 2), (1, 2 + N)]):
        start = (ids[row] == IMAGE).nonzero()[0].item() + (N if image == 2 else 0)
        tower = ours.vision_tower.states(images[image : image + 1], 3)[0, 1:]  # 4 layers: -2 is 3
        p = ours.multi_modal_projector
        for token in range(N):
            hidden = gelu(p.linear_1.weight @ tower[token] + p.linear_1.bias)
            x[row, start + token] = p.linear_2.weight @ hidden + p.linear_2.bias
    expected = ours.language_model.head(ours.language_model.model.decode(x, mask))
    found = ours(ids, images, mask)
    assert_close(found, expected)
    # Exchanged images are another prompt, and change nothing before them.
    other = ours(ids, images[[1, 0, 2]], mask)
    changed = (found - other).abs().amax(-1) > 1e-5
    first = (ids[0] == IMAGE).nonzero()[0]
    assert changed[0, first:].all() and not changed[0, :first][mask[0, :first].bool()].any()
    assert not changed[2].any()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept_or_chosen(dtype, tmp_path):
    oracle().to(dtype).save_pretrained(tmp_path)
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    (ids, mask), images = prompts(), pictures(3)
    given = dict(pixel_values=images, attention_mask=mask)
    places = positions(mask)
    kept, chosen = (
        Llava.from_pretrained(tmp_path),
        Llava.from_pretrained(tmp_path, dtype=torch.float32),
    )
    assert {weight.dtype for weight in kept.parameters()} == {dtype}
    # Rounded at other places: transformers' tower adds its positions in another order.
    close = dict(atol=0.05, rtol=0.05) if dtype == torch.bfloat16 else dict(atol=0.01, rtol=0.01)
    expected = theirs(input_ids=ids, position_ids=places, **given).logits
    assert_close(kept(ids, **given)[mask.bool()], expected[mask.bool()], **close)
    expected = theirs.float()(input_ids=ids, position_ids=places, **given).logits
    assert_close(chosen(ids, **given)[mask.bool()], expected[mask.bool()])


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[3], [3, 12, 16], list(range(22))])
def test_chunks_through_the_cache_equal_the_whole(folder, cuts):
    """Images come with the chunk that has all of their placeholders."""
    ours, images = Llava.from_pretrained(folder), pictures(1)
    ids = torch.tensor([[1, 5, 6, *[IMAGE] * N, 7, 8, 9, 4, 12, 13, 8, 3, 2, 90]])
    if len(cuts) > 3:  # token by token behind the image
        cuts = [12, *range(13, 22)]
    whole = ours(ids, images)
    cache, outputs = ours.new_cache(), []
    for start, end in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        part = ids[:, start:end]
        seen = images if (part == IMAGE).any() else None
        outputs.append(ours(part, seen, cache=cache))
    assert_close(torch.cat(outputs, 1), whole)
    assert cache.length == ids.shape[1]


@torch.no_grad()
def test_greedy_tokens_equal_transformers(folder):
    ours = Llava.from_pretrained(folder)
    theirs = LlavaForConditionalGeneration.from_pretrained(folder)
    (ids, mask), images = prompts(), pictures(3)
    expected = theirs.generate(
        input_ids=ids, pixel_values=images, attention_mask=mask, max_new_tokens=12,
        do_sample=False, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    written = generate(
        ours, ids, attention_mask=mask, images={"pixel_values": images}, max_new_tokens=12,
        eos_token_id=2,
    )  # fmt: skip
    assert torch.equal(written, expected)
    other = generate(
        ours, ids, attention_mask=mask, images={"pixel_values": images.flip(0)}, max_new_tokens=12,
        eos_token_id=2,
    )  # fmt: skip
    assert not torch.equal(written[:2], other[:2]) and torch.equal(written[2], other[2])


@torch.no_grad()
def test_a_placeholder_that_the_model_wrote_is_a_token(folder):
    ours, images = Llava.from_pretrained(folder), pictures(1)
    theirs = LlavaForConditionalGeneration.from_pretrained(folder)
    ids, more = torch.tensor([[1, *[IMAGE] * N, 7]]), torch.tensor([[IMAGE, 8]])
    cache = ours.new_cache()
    ours(ids, images, cache=cache)
    found = ours(more, cache=cache)
    past = theirs(input_ids=ids, pixel_values=images, use_cache=True).past_key_values
    assert_close(found, theirs(input_ids=more, past_key_values=past).logits)


@torch.no_grad()
@pytest.mark.parametrize("checked", [True, False])
def test_wrong_counts_say_both_numbers(folder, checked, request):
    if not checked:
        request.getfixturevalue("unchecked")
    ours, (ids, mask) = Llava.from_pretrained(folder), prompts()
    cache = ours.new_cache()
    with pytest.raises(ValueError, match=r"27 placeholders \(id 97\) .* 18 image tokens in"):
        ours(ids, pictures(2), mask, cache)
    with pytest.raises(ValueError, match=r"27 placeholders .* 36 image tokens in"):
        ours(ids, pictures(4), mask, cache)
    with pytest.raises(ValueError, match=r"27 placeholders .* 0 image tokens in"):
        ours(ids, attention_mask=mask, cache=cache)
    with pytest.raises(ValueError, match=r"0 placeholders .* 9 image tokens"):
        ours(ids[2:], pictures(1), mask[2:], cache)
    with pytest.raises(ValueError, match=r"\(3, 3, 30, 30\), the config wants b images of 3x28x28"):
        ours(ids, pictures(3, 30), mask, cache)
    assert cache.length == 0
    merge_images(ids, torch.zeros(3, ids.shape[1], 4), torch.ones(3, N, 4), IMAGE)  # fits


def test_images_of_unequal_length_come_as_one_list_of_vectors():
    ids = torch.tensor([[5, IMAGE, IMAGE, IMAGE], [IMAGE, 5, 6, IMAGE]])
    words, seen = torch.zeros(2, 4, 3), torch.arange(15.0).view(5, 3)
    merged = merge_images(ids, words, seen, IMAGE)
    assert torch.equal(merged[ids == IMAGE], seen) and not merged[ids != IMAGE].any()
    assert torch.equal(merged, merge_images(ids, words, seen.view(1, 5, 3), IMAGE))
    with pytest.raises(ValueError, match=r"^5 placeholders .* and 4 image tokens in"):
        merge_images(ids, words, seen[:4], IMAGE)


def test_a_placeholder_keeps_its_row_only_behind_a_prompt_and_without_images():
    ids, words, one = torch.tensor([[5, IMAGE]]), torch.randn(1, 2, 3), torch.ones(1, 3)
    assert torch.equal(merge_images(ids, words, None, IMAGE, past=1), words)
    assert torch.equal(merge_images(ids, words, one, IMAGE, past=1)[0, 1], one[0])
    with pytest.raises(ValueError, match=r"^1 placeholders .* and 2 image tokens"):
        merge_images(ids, words, one.expand(2, 3), IMAGE, past=1)
    with pytest.raises(ValueError, match=r"^1 placeholders .* and 0 image tokens"):
        merge_images(ids, words, None, IMAGE)


def test_one_placeholder_becomes_as_many_as_the_image_has_tokens():
    ids = [1, IMAGE, 5, IMAGE, IMAGE, 6]
    assert expand_placeholders(ids, [2, 3, 1], IMAGE) == [1, *[IMAGE] * 2, 5, *[IMAGE] * 4, 6]
    assert expand_placeholders([4, 5], [], IMAGE) == [4, 5]
    with pytest.raises(ValueError, match=r"3 placeholders \(id 97\) for 2 images"):
        expand_placeholders(ids, [2, 3], IMAGE)
    with pytest.raises(ValueError, match=r"3 placeholders \(id 97\) for 4 images"):
        expand_placeholders(ids, [2, 3, 1, 1], IMAGE)


@torch.no_grad()
def test_labels_leave_images_and_padding_out(folder):
    ours, (ids, mask), images = Llava.from_pretrained(folder), prompts(), pictures(3)
    labels = text_labels(ids, IMAGE, mask)
    assert torch.equal(labels == -100, (ids == IMAGE) | (mask == 0))
    assert torch.equal(labels[labels != -100], ids[(ids != IMAGE) & (mask == 1)])
    assert torch.equal(text_labels(ids, IMAGE) == -100, ids == IMAGE)
    ids, labels = ids[:2, 6:], labels[:2, 6:]  # without padding: the reference reads it
    theirs = LlavaForConditionalGeneration.from_pretrained(folder)
    expected = theirs(input_ids=ids, pixel_values=images, labels=labels).loss
    logits = ours(ids, images)
    assert_close(F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), expected)


# The folder


@torch.no_grad()
def test_both_published_layouts_are_read(folder):
    (ids, mask), images = prompts(), pictures(3)
    expected = Llava.from_pretrained(folder)(ids, images, mask)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    old = {k.replace("vision_tower.", "vision_tower.vision_model."): v for k, v in tensors.items()}
    assert old.keys() != tensors.keys() and "vision_tower.pre_layrnorm.weight" in tensors
    old["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(N + 1)[None]
    old["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(old, file)
    assert torch.equal(Llava.from_pretrained(folder)(ids, images, mask), expected)
    theirs = LlavaForConditionalGeneration.from_pretrained(folder)
    assert_close(
        theirs(
            input_ids=ids, pixel_values=images, attention_mask=mask, position_ids=positions(mask)
        ).logits[mask.bool()],
        expected[mask.bool()],
    )


def test_a_tied_head_that_differs_is_refused(tmp_path):
    oracle(text={"tie_word_embeddings": True}).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    assert "language_model.lm_head.weight" not in tensors
    tensors["language_model.lm_head.weight"] = torch.ones(V, 48)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from language_model"):
        Llava.from_pretrained(tmp_path)


REFUSED = [
    ({"model_type": "llava_next"}, "model_type='llava_next'"),
    ({"projector_hidden_act": "swish2"}, "projector_hidden_act='swish2'"),
    ({"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy='cls' is neither"),
    ({"vision_feature_layer": 5}, "vision_feature_layer=5: the tower has states 0 to 4"),
    ({"vision_feature_layer": -6}, "vision_feature_layer=-6: the tower has states 0 to 4"),
    ({"vision_feature_layer": []}, r"vision_feature_layer=\[\]: "),
    ({"vision_feature_layer": "last"}, "vision_feature_layer='last' isn't of type"),
    ({"text_config": TEXT | {"num_attention_heads": 7}}, "text_config: uneven: .*=7"),
    ({"vision_config": VISION | {"num_attention_heads": 7}}, "vision_config: uneven: .*=7"),
]


@pytest.mark.parametrize("changes, said", REFUSED)
def test_a_config_that_cannot_be_honoured_is_refused(folder, changes, said):
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{said}"):
        Llava.from_pretrained(folder)


@torch.no_grad()
@pytest.mark.parametrize("same", [(-5, 0), (-1, 4)])
def test_the_first_and_the_last_state_can_be_counted_from_both_ends(folder, same):
    found = []
    for layer in same:
        edit(folder, vision_feature_layer=layer)
        found.append(Llava.from_pretrained(folder).image_features(pictures(2)))
    assert torch.equal(*found)


def test_defaults_are_those_of_transformers():
    theirs, ours = transformers.LlavaConfig(), LlavaConfig()
    for name in ("image_token_index", "projector_hidden_act", "vision_feature_layer",
                 "vision_feature_select_strategy", "multimodal_projector_bias"):  # fmt: skip
        assert getattr(ours, name) == getattr(theirs, name)


def test_an_unknown_key_is_reported(folder):
    edit(folder, image_grid_pinpoints=[[336, 672]])
    with pytest.warns(UserWarning, match=r"config\.json: not read: image_grid_pinpoints$"):
        Llava.from_pretrained(folder)


def published(folder: Path) -> LlavaConfig:
    """The keys of llava-hf/llava-1.5-7b-hf, which leaves the size of the Llama out."""
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlavaForConditionalGeneration"],
                "ignore_index": -100,
                "image_token_index": 32000,
                "model_type": "llava",
                "pad_token_id": 32001,
                "projector_hidden_act": "gelu",
                "text_config": {
                    "_name_or_path": "lmsys/vicuna-7b-v1.5",
                    "max_position_embeddings": 4096,
                    "model_type": "llama",
                    "rms_norm_eps": 1e-05,
                    "torch_dtype": "float16",
                    "vocab_size": 32064,
                },
                "vision_config": {
                    "hidden_size": 1024,
                    "image_size": 336,
                    "intermediate_size": 4096,
                    "model_type": "clip_vision_model",
                    "num_attention_heads": 16,
                    "num_hidden_layers": 24,
                    "patch_size": 14,
                    "projection_dim": 768,
                    "vocab_size": 32000,
                },
                "vision_feature_layer": -2,
                "vision_feature_select_strategy": "default",
                "vocab_size": 32064,
            }
        )
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return read_config(folder, LlavaConfig, model_types=("llava",))


def test_the_published_config_has_the_published_number_of_parameters(tmp_path):
    config = published(tmp_path)
    assert config.tokens_per_image == 576  # (336 / 14)², section 3.3 of the paper's appendix
    with torch.device("meta"):
        model = Llava(config)
    parts = {
        name: sum(weight.numel() for weight in part.parameters())
        for name, part in model.named_children()
    }
    # The model card says 7B parameters in safetensors: 7,063,427,072.
    assert sum(parts.values()) == 7_063_427_072
    assert parts["multi_modal_projector"] == 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert LlavaConfig().tokens_per_image == 49 and LlavaConfig().layers == [-2]
    assert LlavaTextConfig().hidden_size == 4096 and isinstance(
        LlavaConfig().vision_config, CLIPVisionConfig
    )
