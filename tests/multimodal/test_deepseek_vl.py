"""DeepSeek-VL, with one eye and with two, against transformers through its folders."""

import warnings
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import (
    DeepseekVLForConditionalGeneration,
    DeepseekVLHybridForConditionalGeneration,
)

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

V, IMAGE, N = 101, 97, 9  # 28 pixels are three patches of 8 and a rest of 4
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
    model_type="siglip_vision_model",
    hidden_size=40,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=5,
    image_size=28,
    patch_size=8,
)
SAM = dict(
    model_type="sam_vision_model",
    hidden_size=36,
    output_channels=10,
    num_hidden_layers=4,
    num_attention_heads=3,
    image_size=44,  # eleven patches, in windows of four
    patch_size=4,
    window_size=4,
    global_attn_indexes=[1, 3],
    mlp_dim=50,
)
CONFIGS = {
    "tied": {},
    "untied": {"tie_word_embeddings": False, "text": {"tie_word_embeddings": False}},
    "other widths": {
        "text": {"hidden_size": 24, "num_key_value_heads": 6},
        "vision": {"hidden_act": "gelu", "patch_size": 7, "num_attention_heads": 2},
    },
}
HYBRIDS = CONFIGS | {
    "read earlier": {"sam": {"global_attn_indexes": [0, 2], "window_size": 3}},
    "without positions": {"sam": {"use_rel_pos": False, "use_abs_pos": False}},
    "an even grid": {"sam": {"image_size": 32}, "vision": {"image_size": 32}},
}
KINDS = {
    "one eye": (DeepseekVL, DeepseekVLForConditionalGeneration),
    "two eyes": (DeepseekVLHybrid, DeepseekVLHybridForConditionalGeneration),
}


def oracle(kind: str, text=None, vision=None, sam=None, **changes):
    sizes = dict(
        text_config=TEXT | (text or {}),
        vision_config=VISION | (vision or {}),
        image_token_id=IMAGE,
        **changes,
    )
    if kind == "two eyes":
        sizes["high_res_vision_config"] = SAM | (sam or {})
        return redraw(KINDS[kind][1](transformers.DeepseekVLHybridConfig(**sizes)))
    return redraw(KINDS[kind][1](transformers.DeepseekVLConfig(**sizes)))


def pictures(kind: str, i: int, low: int = 28, high: int = 44) -> dict[str, torch.Tensor]:
    drawn = torch.Generator().manual_seed(1)
    images = {"pixel_values": torch.randn(i, 3, low, low, generator=drawn)}
    if kind == "two eyes":
        images["high_res_pixel_values"] = torch.randn(i, 3, high, high, generator=drawn)
    return images


def prompts(n: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows: an image in the middle; two in a row at the start; none, padded on the left."""
    rows = [[1, 5, *[IMAGE] * n, 7, 8, 9], [*[IMAGE] * 2 * n, 4, 6], [1, 12, 40, 3]]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    return ids, (ids != 0).long()


def positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def pair(kind: str, folder: Path):
    ours, theirs = KINDS[kind]
    return ours.from_pretrained(folder), theirs.from_pretrained(folder)


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def folder(kind, tmp_path) -> Path:
    oracle(kind).save_pretrained(tmp_path)
    return tmp_path


@torch.no_grad()
@pytest.mark.parametrize(
    "kind, changes",
    [
        *[pytest.param("one eye", c, id=f"one eye, {name}") for name, c in CONFIGS.items()],
        *[pytest.param("two eyes", c, id=f"two eyes, {name}") for name, c in HYBRIDS.items()],
    ],
)
def test_logits_equal_transformers(kind, changes, tmp_path):
    theirs = oracle(kind, **changes)
    theirs.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = KINDS[kind][0].from_pretrained(tmp_path)
    assert not ours.training
    n = ours.config.num_image_tokens
    low, high = (changes.get(part, {}).get("image_size") for part in ("vision", "sam"))
    images = pictures(kind, 3, low or 28, high or 44)
    ids, mask = prompts(n)
    given = dict(attention_mask=mask, **images)
    expected = theirs(input_ids=ids, position_ids=positions(mask), **given).logits
    found = ours(input_ids=ids, **given)
    # Logits reach 10, so their last bits are worth 1e-6.
    assert_close(found[mask.bool()], expected[mask.bool()], atol=3e-5, rtol=3e-5)
    assert expected.std() > 0.1
    features = theirs.model.get_image_features(**images).pooler_output
    assert_close(ours.model.see(**images), features, atol=3e-5, rtol=3e-5)
    assert features.shape[:2] == (3, n)
    text = ids[2:, mask[2].bool()]
    assert_close(ours(text), theirs(input_ids=text).logits, atol=3e-5, rtol=3e-5)


@torch.no_grad()
def test_two_eyes_by_hand(tmp_path):
    """The paper's section 3.1 in single sums: stretch, two halvings, alpha, two halves."""
    oracle("two eyes").save_pretrained(tmp_path)
    model = DeepseekVLHybrid.from_pretrained(tmp_path).model
    images = pictures("two eyes", 1)
    sam = model.high_res_vision_model["vision_encoder"]
    big = images["high_res_pixel_values"]
    side, channels = 3, 10

    def halved(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """A convolution of 3 x 3 at every second place, a border of zeros around."""
        c, size, _ = x.shape
        framed = torch.zeros(c, size + 2, size + 2)
        framed[:, 1:-1, 1:-1] = x
        out = torch.empty(len(weight), size // 2, size // 2)
        for row in range(size // 2):
            for column in range(size // 2):
                seen = framed[:, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
                out[:, row, column] = (weight * seen).sum((1, 2, 3))
        return out

    def projected(x: torch.Tensor) -> torch.Tensor:
        x = F.interpolate(x, size=(12, 12), mode="bilinear", align_corners=False)[0]
        convolutions = model.high_res_vision_proj
        return halved(halved(x, convolutions.conv1.weight), convolutions.conv2.weight)

    alpha = model.high_res_vision_alpha
    assert alpha.abs() > 0.01
    early = model.high_res_vision_neck(sam.states(big, 1))
    detail = projected(sam(big)) + alpha * projected(early)  # m r r
    assert detail.shape == (4 * channels, side, side)
    low = model.vision_model(images["pixel_values"])[0]  # n e
    aligner, rows = model.aligner, []
    for token in range(N):
        high = detail[:, token // side, token % side]
        both = (aligner.high_res_vision_proj(high), aligner.vision_proj(low[token]))
        assert both[0].shape == both[1].shape == (24,)
        rows.append(aligner.proj(torch.nn.functional.gelu(torch.cat(both))))
    assert_close(model.see(**images)[0], torch.stack(rows), atol=1e-5, rtol=1e-5)
    # Without alpha, what SAM's own neck gives is all.
    alpha.zero_()
    expected = projected(sam(big)).flatten(1).T
    assert_close(model.see_in_detail(big)[0], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept_or_chosen(kind, dtype, tmp_path):
    oracle(kind).to(dtype).save_pretrained(tmp_path)
    kept, theirs = pair(kind, tmp_path)
    chosen = KINDS[kind][0].from_pretrained(tmp_path, dtype=torch.float32)
    (ids, mask), images = prompts(), pictures(kind, 3)
    assert {weight.dtype for weight in kept.parameters()} == {dtype}
    assert kept(ids, attention_mask=mask, **images).isfinite().all()
    given = dict(attention_mask=mask, **images)
    expected = theirs.float()(input_ids=ids, position_ids=positions(mask), **given).logits
    found = chosen(ids, **given)
    assert_close(found[mask.bool()], expected[mask.bool()], atol=3e-5, rtol=3e-5)
    # Rounded at other places than float32, by far more than float32's last bits.
    rounded = kept(ids, **given).float()[mask.bool()]
    error = (rounded - expected[mask.bool()]).abs().mean() / expected.std()
    assert 1e-5 < error < (0.1 if dtype == torch.bfloat16 else 0.02)


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[2], [11, 12, 13], [2, 11]])
def test_chunks_through_the_cache_equal_the_whole(kind, folder, cuts):
    """Images come with the chunk that has all of their placeholders."""
    ours, _ = pair(kind, folder)
    images = pictures(kind, 1)
    ids = torch.tensor([[1, 5, *[IMAGE] * N, 7, 8, 9, 4]])
    whole = ours(ids, **images)
    cache, outputs = ours.new_cache(), []
    for start, end in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        part = ids[:, start:end]
        outputs.append(ours(part, cache=cache, **(images if (part == IMAGE).any() else {})))
    assert_close(torch.cat(outputs, 1), whole, atol=3e-5, rtol=3e-5)
    assert cache.length == ids.shape[1]


@torch.no_grad()
def test_greedy_tokens_equal_transformers(kind, folder):
    ours, theirs = pair(kind, folder)
    (ids, mask), images = prompts(), pictures(kind, 3)
    expected = theirs.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=10, do_sample=False, pad_token_id=0,
        eos_token_id=2, **images,
    )  # fmt: skip
    settings = dict(attention_mask=mask, max_new_tokens=10, eos_token_id=2)
    written = generate(ours, ids, images=images, **settings)
    assert torch.equal(written, expected)
    swapped = {name: value.flip(0) for name, value in images.items()}
    other = generate(ours, ids, images=swapped, **settings)
    assert not torch.equal(written[:2], other[:2]) and torch.equal(written[2], other[2])


@torch.no_grad()
def test_each_eye_is_read(tmp_path):
    oracle("two eyes").save_pretrained(tmp_path)
    ours = DeepseekVLHybrid.from_pretrained(tmp_path)
    (ids, mask), images = prompts(), pictures("two eyes", 3)
    before = ours(ids, attention_mask=mask, **images)
    for name in images:
        changed = images | {name: images[name].roll(1, 0)}
        difference = (ours(ids, attention_mask=mask, **changed) - before).abs().amax(-1)
        first = int((ids[0] == IMAGE).nonzero()[0])
        assert difference[0, first:].min() > 1e-4 and difference[0, :first].max() == 0
        assert difference[2].max() == 0


@torch.no_grad()
@pytest.mark.parametrize("checked", [True, False])
def test_wrong_counts_say_both_numbers(kind, folder, checked, request):
    if not checked:
        request.getfixturevalue("unchecked")
    (ours, _), (ids, mask) = pair(kind, folder), prompts()
    cache = ours.new_cache()
    for i, said in (
        (2, r"27 placeholders \(id 97\) .* 18 image tokens in"),
        (4, r"27 placeholders .* 36 image tokens in"),
    ):
        with pytest.raises(ValueError, match=said):
            ours(ids, attention_mask=mask, cache=cache, **pictures(kind, i))
    with pytest.raises(ValueError, match=r"27 placeholders .* 0 image tokens"):
        ours(ids, attention_mask=mask, cache=cache)
    with pytest.raises(ValueError, match=r"\(3, 3, 30, 30\), the config wants b images of 3x28x28"):
        ours(ids, attention_mask=mask, cache=cache, **pictures(kind, 3, low=30))
    if kind == "two eyes":
        images = pictures(kind, 3)
        with pytest.raises(ValueError, match=r"^pixel_values alone: .* both resolutions"):
            ours(ids, images["pixel_values"], mask, cache)
        with pytest.raises(ValueError, match=r"^high_res_pixel_values alone"):
            ours(ids, None, mask, cache, images["high_res_pixel_values"])
        fewer = images | {"high_res_pixel_values": images["high_res_pixel_values"][:2]}
        with pytest.raises(ValueError, match="3 images at low resolution, 2 at high"):
            ours(ids, attention_mask=mask, cache=cache, **fewer)
        with pytest.raises(ValueError, match="44"):
            ours(ids, attention_mask=mask, cache=cache, **pictures(kind, 3, high=40))
    assert cache.length == 0
    # Behind a prompt, a placeholder is a token that the model wrote.
    ours(ids, attention_mask=mask, cache=cache, **pictures(kind, 3))
    longer = torch.cat((mask, torch.ones(3, 1, dtype=torch.long)), 1)
    assert ours(torch.full((3, 1), IMAGE), attention_mask=longer, cache=cache).isfinite().all()


# The folder


@torch.no_grad()
def test_both_published_layouts_are_read(kind, folder):
    (ids, mask), images = prompts(), pictures(kind, 3)
    expected = pair(kind, folder)[0](ids, attention_mask=mask, **images)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    level = "model.vision_model."
    old = {name.replace(level, level + "vision_model."): v for name, v in tensors.items()}
    assert old.keys() != tensors.keys()
    old["model.language_model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(old, file)
    ours, theirs = pair(kind, folder)
    assert torch.equal(ours(ids, attention_mask=mask, **images), expected)
    given = dict(attention_mask=mask, position_ids=positions(mask), **images)
    assert_close(
        theirs(input_ids=ids, **given).logits[mask.bool()],
        expected[mask.bool()],
        atol=3e-5,
        rtol=3e-5,
    )
    renamed = {name.replace("aligner", "projector"): v for name, v in tensors.items()}
    save_file(renamed, file)
    with pytest.raises(CheckpointError, match=r"missing: model\.aligner\.\S+, .*unexpected: "):
        KINDS[kind][0].from_pretrained(folder)


@torch.no_grad()
def test_a_head_of_its_own_is_read_whatever_the_config_says(tmp_path):
    """transformers' default says "tied", and so do configs of models that aren't."""
    changes = {"tie_word_embeddings": False, "text": {"tie_word_embeddings": False}}
    theirs = oracle("one eye", **changes)
    theirs.save_pretrained(tmp_path)
    edit(tmp_path, tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="tie_word_embeddings is true, and lm_head"):
        ours = DeepseekVL.from_pretrained(tmp_path)
    ids = torch.tensor([[1, 5, 7]])
    assert_close(ours(ids), theirs(input_ids=ids).logits, atol=3e-5, rtol=3e-5)
    edit(tmp_path, "tie_word_embeddings")
    assert torch.equal(DeepseekVL.from_pretrained(tmp_path)(ids), ours(ids))
    # The same matrix twice is one.
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    tied = DeepseekVL.from_pretrained(tmp_path)
    assert tied.config.tie_word_embeddings and not hasattr(tied, "lm_head")
    edit(tmp_path, tie_word_embeddings=False)
    assert hasattr(DeepseekVL.from_pretrained(tmp_path), "lm_head")


REFUSED = [
    ({"model_type": "multi_modality"}, "model_type='multi_modality'"),
    ({"text_config": TEXT | {"model_type": "qwen2"}}, "text_config: model_type='qwen2'"),
    ({"vision_config": VISION | {"model_type": "clip"}}, "vision_config: model_type='clip'"),
    ({"text_config": TEXT | {"hidden_size": 50}}, "text_config: uneven"),
]
REFUSED_TWO = [
    (
        {"text_config": TEXT | {"hidden_size": 45, "head_dim": 8}},
        "hidden_size=45 has no two halves",
    ),
    (
        {"high_res_vision_config": SAM | {"model_type": "vit"}},
        "high_res_vision_config: model_type='vit'",
    ),
    ({"high_res_vision_config": SAM | {"global_attn_indexes": []}}, r"indexes=\[\]: the first"),
    ({"high_res_vision_config": SAM | {"global_attn_indexes": [4]}}, r"indexes=\[4\]: .* 4 layers"),
    ({"high_res_vision_config": SAM | {"global_attn_indexes": [-1]}}, r"indexes=\[-1\]: .* 4 la"),
]


@pytest.mark.parametrize("changes, said", REFUSED)
def test_a_config_that_cannot_be_honoured_is_refused(kind, folder, changes, said):
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{said}"):
        KINDS[kind][0].from_pretrained(folder)


@pytest.mark.parametrize("changes, said", REFUSED_TWO)
def test_a_second_eye_that_cannot_be_honoured_is_refused(changes, said, tmp_path):
    oracle("two eyes").save_pretrained(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{said}"):
        DeepseekVLHybrid.from_pretrained(tmp_path)


def test_a_key_of_the_published_folder_that_nobody_reads_is_no_news(tmp_path):
    """transformers wrote `intermediate_size` for SAM, and goes by `mlp_dim` or `mlp_ratio`."""
    oracle("two eyes").save_pretrained(tmp_path)
    edit(tmp_path, high_res_vision_config=SAM | {"intermediate_size": 3072})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DeepseekVLHybrid.from_pretrained(tmp_path)


LLM = {
    # Of deepseek-ai/deepseek-vl-1.3b-base and -7b-base, `language_config` in their config.json.
    "1.3B": dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=24,
                 num_attention_heads=16, max_position_embeddings=16384),
    "7B": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=30,
               num_attention_heads=32, max_position_embeddings=16384),
}  # fmt: skip
SIGLIP_L = VisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=384,
    patch_size=16,
)


def counts(model) -> dict[str, int]:
    parts = {name: sum(w.numel() for w in part.parameters())
             for name, part in model.model.named_children()}  # fmt: skip
    return parts | {"all": sum(w.numel() for w in model.parameters())}


def test_the_names_count_the_language_model():
    with torch.device("meta"):
        text = TextConfig(vocab_size=102400, **LLM["1.3B"])
        small = DeepseekVL(DeepseekVLConfig(text, SIGLIP_L, tie_word_embeddings=False))
        text = TextConfig(vocab_size=102400, **LLM["7B"])
        large = DeepseekVLHybrid(DeepseekVLHybridConfig(text, SIGLIP_L, tie_word_embeddings=False))
    assert small.config.num_image_tokens == large.config.num_image_tokens == 576
    one, two = counts(small), counts(large)
    # A name counts about the language model: 1.65 of 1.98, and 6.91 of 7.34 billion.
    assert one == {
        "vision_model": 316_283_904,
        "aligner": 2048 * (1024 + 2048 + 2),
        "language_model": 1_442_940_928,
        "all": 1_975_235_584,
    }
    assert one["language_model"] + 102400 * 2048 == 1_652_656_128  # with its head
    assert two == {
        "vision_model": 316_283_904,
        "high_res_vision_model": 89_670_912,  # SAM-B's image encoder, with its neck
        "high_res_vision_neck": 787_456,
        "high_res_vision_proj": 9 * (256 * 512 + 512 * 1024),
        "aligner": 2048 * (1024 + 1) + 2048 * (1024 + 1) + 4096 * 4097,
        "language_model": 6_490_935_296,
        "all": 7_343_985_921,
    }
    # DeepSeek LLM 7B by its report (arXiv:2401.02954): 30 layers of 4096; with its head 6.91.
    assert two["language_model"] + 102400 * 4096 == 6_910_365_696
    sam = HighResVisionConfig()
    assert (sam.image_size, sam.grid_size, sam.global_attn_indexes[0]) == (1024, 64, 2)
