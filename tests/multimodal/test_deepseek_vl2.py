"""DeepSeek-VL2 against its parts in transformers, which hasn't the whole, and against loops.

The tower is transformers' SigLIP, the language models are DeepSeek-V2, DeepSeek-V3, and for
Tiny the decoder of DeepSeek-OCR 2: plain attention with DeepSeek-V2's experts. Folders have
the published layout; where the papers and the released code leave choices, the code decides.
"""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.testing import assert_close
from transformers.models.deepseek_ocr2.configuration_deepseek_ocr2 import DeepseekOcr2TextConfig
from transformers.models.deepseek_ocr2.modeling_deepseek_ocr2 import DeepseekOcr2TextModel

from snippets.common.checkpoint import CheckpointError, parse_config
from snippets.common.generate import generate
from snippets.multimodal.deepseek_vl2 import (
    DeepseekVL2,
    DeepseekVL2Config,
    DeepseekVL2Layer,
    LanguageConfig,
    Projector,
    ProjectorConfig,
    gather_patches,
    num_image_tokens,
)
from tests.checkpoints import edit, prompt, redraw

V, D, E, IMAGE = 101, 40, 24, 99
SIZE, PATCH = 45, 6  # 7 patches in a row, 3 pixels left over
SIDE = 4  # tokens in a line of a view: 7 patches and a row of zeros, by twos
VISION = dict(image_size=SIZE, patch_size=PATCH, width=E, layers=2, heads=3, mlp_ratio=1.7)
SIGLIP = dict(hidden_size=E, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3)
MOE = dict(
    vocab_size=V,
    hidden_size=D,
    intermediate_size=72,
    num_hidden_layers=3,
    num_attention_heads=5,
    num_key_value_heads=5,
    max_position_embeddings=512,
    moe_intermediate_size=20,
    n_routed_experts=12,
    num_experts_per_tok=3,
    n_shared_experts=2,
    routed_scaling_factor=1.7,
    n_group=1,
    topk_group=1,
)
LATENT = dict(q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=10, qk_rope_head_dim=6)
LATENT |= dict(v_head_dim=7)
ROPE = dict(rope_parameters={"rope_type": "default", "rope_theta": 500.0})
PLAIN = dict(use_mla=False, q_lora_rank=None, kv_lora_rank=None, qk_nope_head_dim=0)
PLAIN |= dict(qk_rope_head_dim=0, v_head_dim=0)
SIGMOID = dict(scoring_func="sigmoid", topk_method="noaux_tc", norm_topk_prob=True)


class Tiny(torch.nn.Module):
    """The decoder of DeepSeek-OCR 2 with a head, which transformers keeps elsewhere."""

    def __init__(self):
        super().__init__()
        kinds = dict(mlp_layer_types=["dense", "sparse", "sparse"])
        self.model = DeepseekOcr2TextModel(DeepseekOcr2TextConfig(**MOE, **ROPE, **kinds))
        self.lm_head = torch.nn.Linear(D, V, bias=False)

    def forward(self, inputs_embeds, **more):
        state = self.model(inputs_embeds=inputs_embeds, **more).last_hidden_state
        return transformers.modeling_outputs.CausalLMOutput(logits=self.lm_head(state))


def small():
    config = transformers.DeepseekV2Config(**MOE, **LATENT, **ROPE, first_k_dense_replace=1)
    return transformers.DeepseekV2ForCausalLM(config)


def base():
    config = transformers.DeepseekV3Config(
        **MOE, **LATENT, **ROPE, norm_topk_prob=True, first_k_dense_replace=1
    )
    return transformers.DeepseekV3ForCausalLM(config)


# What the language model is in transformers, and its `language_config` as VL2 has it.
KINDS = {"Tiny": (Tiny, PLAIN), "Small": (small, LATENT), "VL2": (base, LATENT | SIGMOID)}
# Without its last norm, and with all of a published one's keys.
QUIET = {"lm_head": True, "rm_head": False, "auto_map": {"AutoModel": "x"}, "bos_token_id": 0}


class Reference:
    """Transformers' parts, what VL2 has besides, and loops in between."""

    def __init__(self, kind: str, ratio: int = 2, position: str = "head"):
        config = transformers.SiglipVisionConfig(**SIGLIP, image_size=SIZE, patch_size=PATCH)
        self.tower = redraw(transformers.SiglipVisionModel(config))
        self.language = redraw(KINDS[kind][0](), seed=2)
        self.kind, self.ratio, self.position = kind, ratio, position
        drawn = torch.Generator().manual_seed(3)
        self.maps = [
            0.2 * torch.randn(shape, generator=drawn)
            for shape in ((D, E * ratio**2), (D,), (D, D), (D,))
        ]
        self.newline, self.separator = torch.randn(2, D, generator=drawn)

    def save(self, folder) -> None:
        """The folder as DeepSeek publishes it."""
        language = {"first_k_dense_replace": 1, "rope_theta": 500.0} | MOE | KINDS[self.kind][1]
        config = dict(
            model_type="deepseek_vl_v2",
            language_config=language | QUIET,
            vision_config=VISION | {"model_type": "vision", "model_name": "siglip"},
            projector_config=dict(input_dim=E, n_embed=D, downsample_ratio=self.ratio),
            tile_tag="2D",
            global_view_pos=self.position,
            candidate_resolutions=[[SIZE, SIZE], [SIZE, 2 * SIZE]],
            torch_dtype="float32",
        )
        (folder / "config.json").write_text(json.dumps(config))
        tokenizer = {"added_tokens": [{"id": IMAGE, "content": "<image>"}]}
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        names = ("layers.0.weight", "layers.0.bias", "layers.2.weight", "layers.2.bias")
        tensors = {f"projector.{n}": w for n, w in zip(names, self.maps, strict=True)}
        tensors |= {"image_newline": self.newline, "view_seperator": self.separator}
        tensors |= {f"language.{n}": w for n, w in per_expert(self.language).items()}
        tensors |= {f"vision.{n}": w for n, w in in_timm(self.tower).items()}
        tensors = {n: w.clone().contiguous() for n, w in tensors.items()}
        save_file(tensors, folder / "model.safetensors")

    def view(self, pixels) -> dict[tuple[int, int], torch.Tensor]:
        """The tokens of one view by row and column."""
        patches = self.tower(pixels[None]).last_hidden_state[0]
        side, r = SIZE // PATCH, self.ratio
        grid, lines = patches.view(side, side, E), -(-side // r)
        up, up_bias, out, out_bias = self.maps
        tokens = {}
        for i in range(lines):
            for j in range(lines):
                square = torch.zeros(E, r, r)
                for a in range(r):
                    for b in range(r):
                        if i * r + a < side and j * r + b < side:
                            square[:, a, b] = grid[i * r + a, j * r + b]
                y = F.gelu(up @ square.flatten() + up_bias)
                tokens[i, j] = out @ y + out_bias
        return tokens

    def features(self, pixel_values, tiles) -> torch.Tensor:
        """Token after token, as section 3 of the paper and its figure say."""
        views, rows_of = [self.view(pixels) for pixels in pixel_values], []
        side = -(-(SIZE // PATCH) // self.ratio)
        for columns, rows in tiles:
            whole, parts = views[0], views[1 : 1 + columns * rows]
            views = views[1 + columns * rows :]
            first, last = [], []
            for i in range(side):
                first += [whole[i, j] for j in range(side)] + [self.newline]
            for i in range(rows * side):
                for j in range(columns * side):
                    tile = parts[i // side * columns + j // side]
                    last.append(tile[i % side, j % side])
                last.append(self.newline)
            if self.position == "tail":
                first, last = last, first
            rows_of += [*first, self.separator, *last]
        assert not views
        return torch.stack(rows_of)

    @torch.no_grad()
    def logits(self, ids, pixel_values, tiles, mask=None):
        embedding = dict(self.language.named_modules())["model.embed_tokens"]
        x, features = embedding(ids).clone(), iter(self.features(pixel_values, tiles))
        for b, t in (ids == IMAGE).nonzero().tolist():
            x[b, t] = next(features)
        assert next(features, None) is None
        if mask is None:
            return self.language(inputs_embeds=x).logits
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        return self.language(inputs_embeds=x, attention_mask=mask, position_ids=places).logits


def per_expert(model) -> dict[str, torch.Tensor]:
    """The state of a language model with one tensor for each expert, as on disk."""
    state = {}
    for name, weight in model.state_dict().items():
        head, fused, kind = name.partition(".experts.")
        if not fused:
            state[name] = weight
            continue
        for number, own in enumerate(weight):
            stem = f"{head}.experts.{number}"
            if kind == "down_proj":
                state[f"{stem}.down_proj.weight"] = own
            else:
                gate, up = own.chunk(2)
                state |= {f"{stem}.gate_proj.weight": gate, f"{stem}.up_proj.weight": up}
    return state


def in_timm(tower) -> dict[str, torch.Tensor]:
    """SigLIP's state under the names that timm has, attention in one matrix."""
    own, state = tower.state_dict(), {}
    for kind in ("weight", "bias"):
        state[f"patch_embed.proj.{kind}"] = own[f"embeddings.patch_embedding.{kind}"]
        state[f"norm.{kind}"] = own[f"post_layernorm.{kind}"]
        for n in range(SIGLIP["num_hidden_layers"]):
            layer, block = f"encoder.layers.{n}", f"blocks.{n}"
            parts = [own[f"{layer}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
            state[f"{block}.attn.qkv.{kind}"] = torch.cat(parts)
            state[f"{block}.attn.proj.{kind}"] = own[f"{layer}.self_attn.out_proj.{kind}"]
            for part in ("fc1", "fc2"):
                state[f"{block}.mlp.{part}.{kind}"] = own[f"{layer}.mlp.{part}.{kind}"]
            for number in (1, 2):
                state[f"{block}.norm{number}.{kind}"] = own[f"{layer}.layer_norm{number}.{kind}"]
        q, k, v = own[f"head.attention.in_proj_{kind}"].chunk(3)
        state |= {f"attn_pool.q.{kind}": q, f"attn_pool.kv.{kind}": torch.cat((k, v))}
        state[f"attn_pool.proj.{kind}"] = own[f"head.attention.out_proj.{kind}"]
        state[f"attn_pool.norm.{kind}"] = own[f"head.layernorm.{kind}"]
        for part in ("fc1", "fc2"):
            state[f"attn_pool.mlp.{part}.{kind}"] = own[f"head.mlp.{part}.{kind}"]
    state["attn_pool.latent"] = own["head.probe"]
    state["pos_embed"] = own["embeddings.position_embedding.weight"][None]
    return state


def asked(tiles, words=(3, 2), side=SIDE, padding=0):
    """Ids with one sequence an image; shorter ones padded on the left. And their mask."""
    counts = [num_image_tokens(*grid, side) for grid in tiles]
    t = max(counts) + sum(words) + padding
    ids, mask = prompt(IMAGE, len(tiles), t), torch.zeros(len(tiles), t, dtype=torch.long)
    for row, seen, count in zip(ids, mask, counts, strict=True):
        row[t - words[1] - count : t - words[1]] = IMAGE
        seen[t - words[1] - count - words[0] :] = 1
    return ids, mask


def views(tiles, seed=4) -> torch.Tensor:
    count = sum(1 + columns * rows for columns, rows in tiles)
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def references():
    return {kind: Reference(kind) for kind in KINDS}


@pytest.fixture
def folder(references, tmp_path):
    references["VL2"].save(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tiles", [[(1, 1)], [(2, 1)], [(1, 3)], [(2, 3), (3, 1)]])
def test_logits_equal_those_of_the_parts(kind, tiles, references, tmp_path):
    theirs = references[kind]
    theirs.save(tmp_path)
    ours = DeepseekVL2.from_pretrained(tmp_path)
    ids, mask = asked(tiles)
    with torch.no_grad():
        found = ours(ids, views(tiles), torch.tensor(tiles), mask)
    expected = theirs.logits(ids, views(tiles), tiles, mask)
    rows = mask.bool()
    assert expected[rows].std() > 0.1 and found.isfinite().all()
    assert_close(found[rows], expected[rows], atol=2e-5, rtol=2e-5)


def test_nine_tiles_and_an_image_in_the_midst_of_text(references, tmp_path):
    theirs = references["VL2"]
    theirs.save(tmp_path)
    ours = DeepseekVL2.from_pretrained(tmp_path)
    # Two images in one sequence, words between them, none in the other one.
    tiles, x = [(3, 3), (1, 2)], views([(3, 3), (1, 2)], seed=5)
    counts = [num_image_tokens(*grid, SIDE) for grid in tiles]
    one = [5, *[IMAGE] * counts[0], 7, 8, *[IMAGE] * counts[1], 9]
    ids = torch.tensor([one, prompt(IMAGE, 1, len(one))[0].tolist()])
    with torch.no_grad():
        found = ours(input_ids=ids, pixel_values=x, tiles=tiles)
        assert_close(found[1:], ours(ids[1:]), atol=2e-5, rtol=2e-5)
    assert_close(found, theirs.logits(ids, x, tiles), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("ratio, position", [(2, "tail"), (3, "head"), (1, "head")])
def test_other_ratios_and_the_thumbnail_behind(ratio, position, tmp_path):
    theirs = Reference("Small", ratio, position)
    theirs.save(tmp_path)
    ours = DeepseekVL2.from_pretrained(tmp_path)
    tiles, side = [(2, 1)], -(-7 // ratio)
    assert ours.config.side == side
    ids, _ = asked(tiles, side=side)
    with torch.no_grad():
        found = ours(ids, views(tiles), tiles)
    assert_close(found, theirs.logits(ids, views(tiles), tiles), atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_the_tower_is_siglip_with_its_head(folder, references):
    ours, theirs = DeepseekVL2.from_pretrained(folder).vision, references["VL2"].tower
    x = views([(2, 1)])
    expected = theirs(x)
    assert_close(ours(x), expected.last_hidden_state)
    assert_close(ours.pool(ours(x)), expected.pooler_output)


@torch.no_grad()
def test_pixels_that_fill_no_patch_are_not_read(folder):
    ours, x = DeepseekVL2.from_pretrained(folder), views([(1, 1)])
    x[..., 42:, :] = x[..., 42:] = 5.0
    cut = x.clone()
    cut[..., 42:, :] = cut[..., 42:] = -5.0
    assert torch.equal(ours.vision(x), ours.vision(cut))


@pytest.mark.parametrize("side, ratio", [(7, 2), (6, 2), (7, 3), (5, 4), (3, 1)])
def test_patches_are_gathered_in_squares(side, ratio):
    x = torch.randn(2, side * side, 5)
    found = gather_patches(x, ratio)
    lines = -(-side // ratio)
    assert found.shape == (2, lines * lines, 5 * ratio**2)
    grid = x.view(2, side, side, 5)
    for i in range(lines):
        for j in range(lines):
            for a in range(ratio):
                for b in range(ratio):
                    row, column = i * ratio + a, j * ratio + b
                    inside = row < side and column < side
                    wanted = grid[:, row, column] if inside else torch.zeros(2, 5)
                    own = found[:, i * lines + j].view(2, 5, ratio, ratio)[..., a, b]
                    assert torch.equal(own, wanted)


@torch.no_grad()
def test_a_deeper_and_wider_projector():
    config = ProjectorConfig(input_dim=5, n_embed=6, depth=4, mlp_ratio=3)
    projector, x = Projector(config), torch.randn(2, 9, 5)
    wide = [tuple(w.shape) for w in projector.parameters() if w.ndim == 2]
    assert wide == [(18, 20), (18, 18), (18, 18), (6, 18)]
    y = gather_patches(x, 2)
    maps = list(projector.parameters())
    for number, (weight, bias) in enumerate(zip(maps[::2], maps[1::2], strict=True)):
        y = (F.gelu(y) if number else y) @ weight.T + bias
    assert_close(projector(x), y)
    assert list(projector.state_dict())[-1] == "layers.6.bias"


@pytest.mark.parametrize("columns, rows", [(1, 1), (2, 1), (1, 3), (3, 3), (9, 1), (2, 4)])
def test_the_number_of_tokens_is_the_papers(columns, rows):
    # Section 3: 14 x 15 for the thumbnail, 1, then m 14 x (n 14 + 1).
    assert num_image_tokens(columns, rows) == 210 + 1 + rows * 14 * (columns * 14 + 1)
    # And counted one by one.
    count = sum(14 + 1 for _ in range(14)) + 1
    count += sum(sum(14 for _ in range(columns)) + 1 for _ in range(14 * rows))
    assert num_image_tokens(columns, rows) == count
    assert num_image_tokens(1, 1) == 421 and num_image_tokens(3, 3) == 2017


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_through_the_cache_equals_the_whole(kind, references, tmp_path):
    references[kind].save(tmp_path)
    ours, tiles = DeepseekVL2.from_pretrained(tmp_path), [(2, 1), (1, 1)]
    ids, mask = asked(tiles, words=(3, 6), padding=2)
    seen = {"pixel_values": views(tiles), "tiles": torch.tensor(tiles)}
    whole, rows = ours(ids, attention_mask=mask, **seen), mask.bool()
    t = ids.shape[1]
    for chunks in ([t - 1, 1], [t - 6, *[1] * 6], [t - 6, 2, 4]):
        cache, outputs, images = ours.new_cache(), [], seen
        for part in torch.arange(t).split(chunks):
            upto = mask[:, : part[-1] + 1]
            outputs.append(ours(ids[:, part], attention_mask=upto, cache=cache, **images))
            images = {}
        assert_close(torch.cat(outputs, 1)[rows], whole[rows], atol=1e-5, rtol=1e-5)
        assert cache.length == t


@torch.no_grad()
def test_it_writes_on(folder, references):
    ours, tiles = DeepseekVL2.from_pretrained(folder), [(2, 1), (1, 1)]
    ids, mask = asked(tiles)
    images = {"pixel_values": views(tiles), "tiles": torch.tensor(tiles)}
    written = generate(ours, ids, attention_mask=mask, images=images, max_new_tokens=5)
    for _ in range(5):
        logits = references["VL2"].logits(ids, views(tiles), tiles, mask)[:, -1]
        token = logits.argmax(-1, keepdim=True)
        # A placeholder that the model wrote itself would be one too many for the reference.
        assert IMAGE not in token
        ids, mask = torch.cat((ids, token), 1), F.pad(mask, (0, 1), value=1)
    assert torch.equal(written, ids)


@torch.no_grad()
def test_views_and_tiles_reach_their_own_places(folder):
    """Another picture in one sequence changes nothing in the other one."""
    ours, tiles = DeepseekVL2.from_pretrained(folder), [(2, 1), (1, 2)]
    ids, mask = asked(tiles)
    x = views(tiles)
    other = x.clone()
    other[3:] += 1.0
    one, two = ours(ids, x, tiles, mask), ours(ids, other, tiles, mask)
    assert_close(one[0], two[0], atol=1e-5, rtol=1e-5)
    assert (one[1] - two[1]).abs().max() > 0.01


WRONG = [
    (lambda ids, x, tiles: (ids[:, 4:], x, tiles), r"\b56 placeholders.* 57\b"),
    (lambda ids, x, tiles: (ids, x[:-1], tiles), r"\b2 views.* 3\b"),
    (lambda ids, x, tiles: (ids, torch.cat((x, x)), tiles), r"\b6 views.* 3\b"),
    (lambda ids, x, tiles: (ids, x[:2], [(1, 1)]), r"\b57 placeholders.* 41\b"),
    (lambda ids, x, tiles: (ids, x, [(1, 2)]), r"\b57 placeholders.* 61\b"),
    (lambda ids, x, tiles: (ids, x[:1], [(0, 1)]), r"without tiles: \[\(0, 1\)\]"),
    (lambda ids, x, tiles: (ids, x[..., :-1], tiles), r"\(3, 3, 45, 44\).* 3x45x45"),
    (lambda ids, x, tiles: (ids, x[:, :2], tiles), r"\(3, 2, 45, 45\).* 3x45x45"),
    (lambda ids, x, tiles: (ids, x, None), "come together"),
    (lambda ids, x, tiles: (ids, None, tiles), "come together"),
    (lambda ids, x, tiles: (ids, None, None), r"\b57 placeholders.* 0\b"),
]


@torch.no_grad()
@pytest.mark.parametrize("change, said", WRONG)
def test_what_does_not_fit_is_refused(change, said, folder):
    ours, tiles = DeepseekVL2.from_pretrained(folder), [(2, 1)]
    ids, _ = asked(tiles)
    with pytest.raises(ValueError, match=said):
        ours(*change(ids, views(tiles), tiles))


@torch.no_grad()
def test_a_placeholder_without_an_image(folder):
    """Refused in a prompt; behind one it is a word that the model wrote."""
    ours, word = DeepseekVL2.from_pretrained(folder), torch.tensor([[IMAGE]])
    cache = ours.new_cache()
    for empty in (None, cache):
        with pytest.raises(ValueError, match=r"\b1 placeholders.* 0 image tokens"):
            ours(word, cache=empty)
    ours(prompt(IMAGE, 1, 4), cache=cache)
    assert ours(word, cache=cache).isfinite().all() and cache.length == 5


def test_the_number_of_the_placeholder(folder):
    assert DeepseekVL2.from_pretrained(folder).config.image_token_id == IMAGE
    assert DeepseekVL2.from_pretrained(folder, image_token_id=7).config.image_token_id == 7
    edit(folder, image_token_id=8)
    assert DeepseekVL2.from_pretrained(folder).config.image_token_id == 8
    assert DeepseekVL2.from_pretrained(folder, image_token_id=7).config.image_token_id == 7
    edit(folder, "image_token_id")
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": []}))
    without = DeepseekVL2.from_pretrained(folder)
    assert without.config.image_token_id is None
    (folder / "tokenizer.json").unlink()
    without = DeepseekVL2.from_pretrained(folder)
    assert without(prompt(V, 1, 4)).shape == (1, 4, V)
    with pytest.raises(ValueError, match="image_token_id"):
        without(asked([(1, 1)])[0], views([(1, 1)]), [(1, 1)])


REFUSED = [
    ({"tile_tag": "1D"}, "tile_tag='1D'"),
    ({"global_view_pos": "middle"}, "global_view_pos='middle'"),
    ({"model_type": "deepseek_vl"}, "model_type='deepseek_vl'"),
    ({"language_config": {"scoring_func": "sigmoid", "topk_method": "greedy"}}, "'sigmoid' with"),
    ({"language_config": {"use_mla": True, "kv_lora_rank": None}}, "use_mla=True with kv_lora"),
    ({"language_config": {"hidden_size": 48, "num_attention_heads": 4}}, "n_embed=40 isn't .*48"),
    ({"language_config": {"num_experts_per_tok": 1}}, "norm_topk_prob=True .*num_experts_per_tok"),
    ({"vision_config": {"class_token": True}}, "class_token=True"),
    ({"vision_config": {"ignore_head": False}}, "ignore_head=False"),
    ({"vision_config": {"num_classes": 5}}, "num_classes=5"),
    ({"vision_config": {"global_pool": "avg"}}, "global_pool='avg'"),
    ({"vision_config": {"heads": 5}}, "hidden_size=24, num_attention_heads=5"),
    ({"vision_config": {"width": "24"}}, "width='24' isn't of type int"),
    ({"projector_config": {"projector_type": "linear"}}, "projector_type='linear'"),
    ({"projector_config": {"token_pooling": True}}, "token_pooling=True"),
    ({"projector_config": {"input_dim": 25}}, "width=24 isn't input_dim=25"),
    ({"projector_config": {"depth": 1}}, "depth=1"),
]


@pytest.mark.parametrize("changes, said", REFUSED)
def test_a_config_that_cannot_be_honoured_is_refused(changes, said, folder):
    found = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        part = isinstance(value, dict)
        edit(folder, **{key: found[key] | {"num_key_value_heads": None} | value if part else value})
    with pytest.raises(CheckpointError, match=said):
        DeepseekVL2.from_pretrained(folder)


def test_unknown_keys_are_reported(folder):
    found = json.loads((folder / "config.json").read_text())
    edit(folder, vision_config=found["vision_config"] | {"swirl": 3})
    with pytest.warns(UserWarning, match=r"vision_config\.swirl"):
        DeepseekVL2.from_pretrained(folder)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda x: x.pop("view_seperator"), "missing: view_seperator"),
        (lambda x: x.pop("vision.blocks.1.attn.qkv.bias"), r"missing: .*layers\.1.*q_proj\.bias"),
        (lambda x: x.pop("vision.attn_pool.kv.weight"), r"missing: vision\.head.*in_proj_weight"),
        (lambda x: x.pop("vision.pos_embed"), "missing: .*position_embedding"),
        (lambda x: x.update(view_separator=torch.ones(D)), "unexpected: view_separator"),
        (lambda x: x.update({"projector.layers.1.bias": torch.ones(1)}), "unexpected: projector"),
        (lambda x: x.update(image_newline=torch.ones(D + 1)), r"image_newline is \(41,\)"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(change, said, folder):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=said):
        DeepseekVL2.from_pretrained(folder)


@torch.no_grad()
def test_a_tower_without_its_head(folder):
    whole, tiles = DeepseekVL2.from_pretrained(folder), [(1, 1)]
    ids, _ = asked(tiles)
    tensors = load_file(folder / "model.safetensors")
    tensors = {n: w for n, w in tensors.items() if "attn_pool" not in n}
    save_file(tensors, folder / "model.safetensors")
    edit(folder, vision_config=VISION | {"global_pool": ""})
    ours = DeepseekVL2.from_pretrained(folder)
    assert torch.equal(ours(ids, views(tiles), tiles), whole(ids, views(tiles), tiles))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(folder, dtype):
    wide, tiles = DeepseekVL2.from_pretrained(folder), [(2, 1)]
    ours = DeepseekVL2.from_pretrained(folder, dtype=dtype)
    kinds = {w.dtype for n, w in ours.state_dict().items() if "e_score" not in n}
    assert kinds == {dtype}
    assert ours.language.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32
    ids, _ = asked(tiles)
    found, expected = ours(ids, views(tiles), tiles), wide(ids, views(tiles), tiles)
    assert found.dtype == dtype
    # Rounding can send a token to another expert, and then it differs for good: a few may.
    error = (found.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.median() < 16 * torch.finfo(dtype).eps


def test_divided_weights_are_scaled_too():
    """DeepSeek-V2's own class refuses to divide: there the release left the factor out."""
    changes = MOE | LATENT | {"norm_topk_prob": True, "topk_method": "group_limited_greedy"}
    config = LanguageConfig(**changes | {"n_group": 4, "topk_group": 2})
    gate = DeepseekVL2Layer(config, 1).mlp.gate
    weights, _ = gate(torch.randn(4, D))
    assert_close(weights.sum(-1), torch.full((4,), MOE["routed_scaling_factor"]))


# The published config.json of the three; what they leave out, the released code's defaults say.
TOWER = dict(layers=27, mlp_ratio=3.7362, patch_size=14, width=1152)
ALL = dict(first_k_dense_replace=1, n_group=1, topk_group=1, n_shared_experts=2, q_lora_rank=None)
ALL |= dict(num_experts_per_tok=6, max_position_embeddings=4096)
FULL = {
    "Tiny": ALL | PLAIN | dict(
        hidden_size=1280, intermediate_size=6848, moe_intermediate_size=896, n_routed_experts=64,
        num_attention_heads=10, num_hidden_layers=12, vocab_size=129280,
    ),
    "Small": ALL | dict(
        hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408,
        n_routed_experts=64, num_attention_heads=16, num_hidden_layers=27, vocab_size=102400,
    ),
    "VL2": ALL | SIGMOID | dict(
        hidden_size=2560, intermediate_size=12288, moe_intermediate_size=1536,
        n_routed_experts=72, routed_scaling_factor=2.0, vocab_size=129280,
    ),
}  # fmt: skip
# Billions: all, by the pages of the checkpoints; in use, by the abstract of arXiv:2412.10302; in
# use in the language model, by its text. The second is the third plus 0.4.
COUNTS = {"Tiny": (3.37, 1.0, 0.57), "Small": (16.1, 2.8, 2.4), "VL2": (27.5, 4.5, 4.1)}


def count(module, of="") -> int:
    """Numbers in the parameters and buffers whose names hold `of`."""
    return sum(w.numel() for n, w in module.state_dict().items() if of in n)


@pytest.mark.parametrize("kind", FULL)
def test_full_size_counts(kind):
    found = dict(language_config=FULL[kind], vision_config=TOWER)
    found["projector_config"] = dict(n_embed=FULL[kind]["hidden_size"])
    config = parse_config(found, DeepseekVL2Config, source="published")
    with torch.device("meta"):
        model = DeepseekVL2(config)
    printed, in_use, in_language = COUNTS[kind]
    total = count(model) / 1e9
    assert round(total, 2 if printed < 10 else 1) == printed
    language = count(model.language)
    e, k = config.language_config.n_routed_experts, config.language_config.num_experts_per_tok
    idle = count(model.language, ".experts.") * (e - k) // e
    # A row of the input embedding is looked up: no work. SigLIP's head isn't asked.
    used = language - idle - count(model.language, "embed_tokens")
    seen = count(model.vision) - count(model.vision, "head.") + count(model.projector)
    exact = {"Tiny": (0.574, 0.995), "Small": (2.451, 2.878), "VL2": (4.124, 4.555)}[kind]
    assert (round(used / 1e9, 3), round((used + seen) / 1e9, 3)) == exact
    # Rounded or cut off, and in use: those of the language model, and 0.4 for the tower.
    assert in_language in (round(exact[0], 2), int(exact[0] * 10) / 10)
    assert in_use == round(in_language + 0.41, 1)
    assert count(model.vision) == 428_225_600 and config.side == 14
    assert total - language / 1e9 == pytest.approx(0.428 + count(model.projector) / 1e9, abs=1e-3)
