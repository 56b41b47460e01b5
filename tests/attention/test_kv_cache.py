"""The key-value cache against transformers' caches, models and generation.

Sizes are such that swapped axes show: no two of b t d h g r k are equal, h k != d.
"""

import copy
import itertools
import re
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from snippets.attention.gqa import GroupedQueryAttention
from snippets.attention.kv_cache import KVCache, LayerCache, allowed_keys, places
from snippets.position.rope import inverse_frequencies, rope_table

B, T, D, H, G, K = 2, 7, 24, 12, 4, 6
LAYERS = 2
LENGTHS = [3, 7, 5]
PADDING = torch.tensor([[0, 0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def new(t: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """A layer's tensors for t tokens; by default keys and values."""
    return [torch.randn(B, *heads, t, width) for *heads, width in shapes or ((G, K), (G, K))]


def chunkings(n: int) -> Iterator[list[int]]:
    """All ways to cut n tokens into chunks."""
    for cuts in itertools.product((False, True), repeat=n - 1):
        ends = [i + 1 for i, cut in enumerate(cuts) if cut] + [n]
        yield [end - start for start, end in zip([0, *ends], ends, strict=False)]


def layers(attention: str = "eager") -> tuple[GroupedQueryAttention, LlamaAttention, LlamaConfig]:
    """Our attention and Llama's, with the same weights."""
    config = LlamaConfig(
        hidden_size=D,
        num_attention_heads=H,
        num_key_value_heads=G,
        head_dim=K,
        attn_implementation=attention,
    )
    llama = LlamaAttention(config, layer_idx=0).eval()
    gqa = GroupedQueryAttention(hidden_size=D, num_heads=H, num_kv_heads=G, head_dim=K)
    gqa.load_state_dict(llama.state_dict())
    return gqa, llama, config


def ours(gqa, x, chunks, cache) -> torch.Tensor:
    inv_freq, outputs = inverse_frequencies(head_dim=K), []
    for part in torch.arange(x.shape[1]).split(chunks):
        outputs.append(gqa(x[:, part], rope_table(inv_freq, part, x.dtype), cache=cache))
    return torch.cat(outputs, 1)


def theirs(llama, config, x, chunks, cache) -> torch.Tensor:
    rotary, outputs = LlamaRotaryEmbedding(config), []
    future = torch.full((x.shape[1], x.shape[1]), -torch.inf, dtype=x.dtype).triu(1)
    for part in torch.arange(x.shape[1]).split(chunks):
        mask = future[part, : part[-1] + 1][None, None]
        tables = rotary(x, part[None])
        outputs.append(llama(x[:, part], tables, mask, past_key_values=cache)[0])
    return torch.cat(outputs, 1)


def tiny(family: str = "llama"):
    """A random transformers model, with weights that make it sensitive."""
    if family == "gpt2":
        sizes = {"n_embd": 24, "n_layer": LAYERS, "n_head": 6, "n_positions": 32}
        ends = {"bos_token_id": 0, "eos_token_id": 0}
        config = GPT2Config(vocab_size=97, initializer_range=0.2, **sizes, **ends)
        return GPT2LMHeadModel(config).eval()
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=D,
        intermediate_size=40,
        num_hidden_layers=LAYERS,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def new_cache() -> KVCache:
    return KVCache([LayerCache() for _ in range(LAYERS)])


def drop_in(cache: KVCache) -> DynamicCache:
    """A transformers cache that keeps everything in ours."""
    outer = DynamicCache()
    outer.update = lambda k, v, i, *_, **__: cache[i].append(k, v)
    outer.get_seq_length = lambda layer_idx=0: cache[layer_idx].length
    outer.get_mask_sizes = lambda t, layer_idx=0: (cache[layer_idx].length + t, 0)
    return outer


@torch.no_grad()
def logits(model, ids, chunks, cache) -> torch.Tensor:
    parts = ids.split(chunks, 1)
    return torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)


def padded_call(model, ids, attention_mask, part, cache) -> torch.Tensor:
    """Logits of the columns `part`, with positions and masks of `places`."""
    seen = attention_mask[:, : part[-1] + 1]
    positions, allowed = places(ids[:, part], seen, cache.length)
    outer = drop_in(cache)
    return model(
        ids[:, part], position_ids=positions, attention_mask=allowed, past_key_values=outer
    ).logits


@torch.no_grad()
def test_every_chunking_equals_llamas_one_uncached_pass():
    gqa, llama, config = layers()
    x = torch.randn(B, T, D)
    whole = theirs(llama, config, x, [T], None)
    ways = list(chunkings(T))
    assert len(ways) == len({tuple(way) for way in ways}) == 64
    for way in ways:
        cache = LayerCache()
        assert_close(ours(gqa, x, way, cache), whole)
        assert cache.length == T


@torch.no_grad()
@pytest.mark.parametrize(
    "dtype, attention",
    [(torch.float32, "eager"), (torch.float32, "sdpa"), (torch.bfloat16, "sdpa")],
)
def test_outputs_and_kept_tensors_equal_dynamic_cache(dtype, attention):
    gqa, llama, config = layers(attention)
    x, chunks = torch.randn(B, T, D, dtype=dtype), [1, 3, 2, 1]
    gqa, llama = gqa.to(dtype), llama.to(dtype)
    cache, dynamic = LayerCache(), DynamicCache(config=config)
    expected = theirs(llama, config, x, chunks, dynamic)
    assert_close(ours(gqa, x, chunks, cache), expected)
    keys, values = (kept[:, :, :T] for kept in cache.store)
    assert_close(keys, dynamic.layers[0].keys)
    assert_close(values, dynamic.layers[0].values)
    assert cache.nbytes == dynamic.layers[0].keys.nbytes + dynamic.layers[0].values.nbytes


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("chunks", [[9], [1] * 9, [5, 1, 2, 1], [2, 7]])
def test_a_transformers_model_gives_the_same_bits_on_it(family, chunks):
    model, ids = tiny(family), torch.randint(97, (3, 9))
    cache = new_cache()
    got = logits(model, ids, chunks, drop_in(cache))
    assert torch.equal(got, logits(model, ids, chunks, DynamicCache()))
    with torch.no_grad():
        # Logits are near 10 and the weights ten times the usual size: relative to that.
        assert_close(got, model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    assert cache.length == 9


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("chunks", [[9], [7, 1, 1], [4, 3, 1, 1], [1] * 9])
def test_left_padding_changes_nothing(family, chunks):
    model, ids, cache = tiny(family), torch.randint(97, (3, 9)), new_cache()
    attention_mask = F.pad(PADDING, (0, 2), value=1)
    parts = torch.arange(9).split(chunks)
    got = torch.cat([padded_call(model, ids, attention_mask, part, cache) for part in parts], 1)
    assert got.isfinite().all()  # [4, ...]: a chunk of nothing but padding
    for row, n in enumerate(LENGTHS):
        alone = model(ids[row : row + 1, 7 - n :], use_cache=False).logits[0]
        assert_close(got[row, 7 - n :], alone, rtol=1e-4, atol=1e-4)  # as above


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[T], [1] * T, [2, 4, 1]])
def test_our_attention_gives_padded_prompts_what_they_get_alone(chunks):
    gqa, llama, config = layers()
    x, cache, outputs = torch.randn(3, T, D), LayerCache(), []
    for part in torch.arange(T).split(chunks):
        ids = torch.zeros(3, len(part), dtype=torch.int64)
        positions, allowed = places(ids, PADDING[:, : part[-1] + 1], cache.length)
        tables = rope_table(inverse_frequencies(head_dim=K), positions)
        outputs.append(gqa(x[:, part], tables, allowed, cache))
    got = torch.cat(outputs, 1)
    for row, n in enumerate(LENGTHS):
        alone = theirs(llama, config, x[row : row + 1, T - n :], [n], None)[0]
        assert_close(got[row, T - n :], alone)
    assert (got[PADDING == 0] == 0).all()  # no key to attend to


@pytest.mark.parametrize("past", [0, 3, 6])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_places_equal_transformers_mask_and_positions(past, dtype):
    attention_mask, t = PADDING.to(dtype), T - past
    positions, allowed = places(torch.zeros(3, t, dtype=torch.int64), attention_mask, past)
    config = tiny().config
    config._attn_implementation = "eager"
    dynamic = DynamicCache(config=config)
    if past:
        dynamic.update(*torch.randn(2, 3, 2, past, 8), 0)
    expected = create_causal_mask(
        config=config,
        inputs_embeds=torch.zeros(3, t, D),
        attention_mask=PADDING,
        past_key_values=dynamic,
        position_ids=positions,
    )
    real = PADDING[:, past:].bool()  # what padding itself attends to is nobody's concern
    rows = allowed[:, 0][real]
    assert torch.equal(rows, (expected == 0)[:, 0][real])
    assert allowed.shape == (3, 1, t, T) and rows.any(-1).all()
    for row, n in enumerate(LENGTHS):
        counted = [0] * (7 - n) + list(range(n))
        assert positions[row].tolist() == counted[past:]


def test_without_padding_places_count_from_the_cache():
    positions, allowed = places(torch.zeros(B, 3, dtype=torch.int64), None, 5)
    assert positions.tolist() == [5, 6, 7] and allowed is None


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_two_padded_batches_in_sequence_are_written_as_generate_does(family):
    model = tiny(family)
    for _ in range(2):
        ids, attention_mask = torch.randint(97, (3, T)), PADDING
        expected = model.generate(
            ids,
            attention_mask=attention_mask,
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        cache, parts = new_cache(), torch.arange(T).split([4, 3])
        for _ in range(12):
            for part in parts:
                last = padded_call(model, ids, attention_mask, part, cache)[:, -1:]
            ids = torch.cat((ids, last.argmax(-1)), 1)
            attention_mask = F.pad(attention_mask, (0, 1), value=1)
            parts = [torch.tensor([cache.length])]
        assert torch.equal(ids, expected)


def test_a_stale_cache_shows():
    model, ids, next_ids = tiny(), *torch.randint(97, (2, 3, 5))
    cache = new_cache()
    logits(model, ids, [5], drop_in(cache))
    stale = logits(model, next_ids, [5], drop_in(cache))
    fresh = logits(model, next_ids, [5], drop_in(new_cache()))
    assert (stale - fresh).abs().max() > 0.1


@pytest.mark.parametrize(
    "shapes",
    [[(G, K), (G, K)], [(5,), (3,)], [(G, K)], [(G, 8), (G, 5), (2,)]],
    ids=["keys and values", "latent and rotary key", "one tensor", "three unlike"],
)
@pytest.mark.parametrize("chunks", [[T], [1] * T, [3, 4], [1, 5, 1], [2, 0, 5]])
def test_returns_all_so_far_for_any_tensors(shapes, chunks):
    whole, cache = new(T, *shapes), LayerCache()
    parts = zip(*(tensor.split(chunks, -2) for tensor in whole), strict=True)
    for end, part in zip(itertools.accumulate(chunks), parts, strict=False):
        got = cache.append(*part)
        assert isinstance(got, tuple) and len(got) == len(whole)
        assert cache.length == end
        for kept, tensor in zip(got, whole, strict=True):
            assert torch.equal(kept, tensor[..., :end, :])
        assert cache.nbytes == sum(kept.nbytes for kept in got)


def test_what_was_returned_stays_as_it_was():
    cache, seen = LayerCache(), []
    for t in (2, 1, 1, 5, 1):  # in the room, and across growth
        seen += [(kept, kept.clone()) for kept in cache.append(*new(t))]
    assert all(torch.equal(kept, copied) for kept, copied in seen)


def test_a_lower_length_forgets_the_last_tokens():
    cache, whole = LayerCache(), new(T)
    parts = list(zip(*(tensor.split([3, 4], -2) for tensor in whole), strict=True))
    cache.append(*parts[0])
    cache.append(*new(2))
    cache.length -= 2
    for kept, tensor in zip(cache.append(*parts[1]), whole, strict=True):
        assert torch.equal(kept, tensor)


def test_keeps_its_own_copy_of_what_it_gets():
    keys, values = new(3)
    cache = LayerCache()
    kept, _ = cache.append(keys, values)
    before = kept.clone()
    keys.zero_()
    assert torch.equal(kept, before)


def test_layers_are_apart_and_a_model_counts_its_tokens():
    cache = KVCache([LayerCache() for _ in range(3)])
    assert cache.length == cache.nbytes == 0
    for t in (3, 1):
        for layer in range(3):
            cache[layer].append(*new(t, (G, K), (layer + 1,)))
        assert cache[2].length == cache.length
    assert cache.length == 4
    assert cache.nbytes == 4 * 4 * B * (3 * G * K + 1 + 2 + 3)
    assert [c.nbytes for c in cache.layers] == [4 * 4 * B * (G * K + i) for i in (1, 2, 3)]


def test_bytes_at_full_size():
    sizes = {  # published models in bfloat16: layers, tensors, bytes a token
        "OPT 13B": (40, [(40, 128)] * 2, 800 * 2**10),  # arXiv:2309.06180, section 3
        "Llama 3 8B": (32, [(8, 128)] * 2, 128 * 2**10),
        "DeepSeek-V3": (61, [(512,), (64,)], 61 * (512 + 64) * 2),
    }
    for count, shapes, expected in sizes.values():
        cache = KVCache([LayerCache() for _ in range(count)])
        for layer in cache.layers:
            for t in (2, 1):
                layer.append(
                    *[
                        torch.empty(1, *heads, t, width, dtype=torch.bfloat16, device="meta")
                        for *heads, width in shapes
                    ]
                )
        assert cache.nbytes == 3 * expected


def written(*_, out_shape, **__) -> int:
    return torch.Size(out_shape).numel()


@pytest.mark.parametrize("prompt", [1, 50])
def test_a_token_is_copied_three_times_at_most(prompt):
    aten, cache = torch.ops.aten, LayerCache()
    counts = {op: written for op in (aten.copy_, aten.cat, aten.clone)}
    with FlopCounterMode(display=False, custom_mapping=counts) as counter:
        for t in (prompt, *[1] * 300):
            cache.append(*new(t))
            kept = 2 * B * G * K * cache.length
            assert kept <= counter.get_total_flops() <= 3 * kept
            assert cache.store[0].shape[-2] <= 2 * cache.length


@pytest.fixture
def poisoned():
    """Memory that wasn't written reads as NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_the_room_is_never_read(poisoned):
    assert torch.empty(3).isnan().all()
    gqa, _, _ = layers()
    with torch.no_grad():
        y = ours(gqa, torch.randn(B, T, D), [1, 2, 1, 3], LayerCache())
    assert y.isfinite().all()


@pytest.mark.parametrize(
    "then",
    [
        lambda: [x[:1] for x in new(1)],
        lambda: new(1, (G - 1, K), (G - 1, K)),
        lambda: new(1, (G, K), (G, K + 1)),
        lambda: new(1, (K,), (K,)),
        lambda: new(1, (G, K)),
        lambda: new(1, (G, K), (G, K), (G, K)),
        lambda: [x.double() for x in new(1)],
        lambda: [x.to("meta") for x in new(1)],
        lambda: [*new(3, (G, K)), *new(1, (G, K))],  # would broadcast over the tokens
        list,
    ],
    ids=str.split("batch heads width axes fewer more dtype device tokens nothing"),
)
def test_refuses_what_does_not_continue_it_and_keeps_what_it_has(unchecked, then):
    cache = LayerCache()
    before = [kept.clone() for kept in cache.append(*new(3))]
    with pytest.raises(ValueError, match=r"cache of \(2, 4, 3, 6\) torch.float32.*continued"):
        cache.append(*then())
    assert cache.length == 3
    for kept, old in zip(cache.append(*new(1)), before, strict=True):
        assert torch.equal(kept[..., :3, :], old)


@pytest.mark.parametrize("first", [lambda: [*new(3, (G, K)), *new(1, (G, K))], list])
def test_refuses_a_first_call_without_sense(unchecked, first):
    cache = LayerCache()
    with pytest.raises(ValueError, match="can't be continued"):
        cache.append(*first())
    assert cache.length == 0 and cache.store == []


@pytest.mark.parametrize("shape", [(3, 1), (3, 4), (2, 5), (3, 6)])
def test_refuses_a_mask_that_is_not_over_all_tokens(unchecked, shape):
    with pytest.raises(ValueError, match=r"for 3 sequences of 4 cached and 1 new"):
        places(torch.zeros(3, 1, dtype=torch.int64), torch.ones(shape, dtype=torch.int64), 4)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_allowed_keys_reads_both_forms_of_a_mask(dtype):
    padding = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]], dtype=dtype)
    expected = torch.tensor(
        [
            [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]],
            [[0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]],
        ]
    ).bool()[:, None]
    allowed = allowed_keys(padding, 2, 3, 2)
    assert torch.equal(allowed, expected)
    assert allowed_keys(None, 2, 3, 2) is None
    for whole in (allowed, allowed[:1], allowed.expand(2, 4, 3, 5)):
        assert allowed_keys(whole, 2, 3, 2) is whole


@pytest.mark.parametrize("shape", [(3, 1, 3, 5), (2, 1, 2, 5), (2, 1, 3, 4), (2, 1, 5, 3)])
def test_allowed_keys_refuses_a_whole_mask_of_other_sizes(unchecked, shape):
    with pytest.raises(ValueError, match=rf"{re.escape(str(shape))}, for b=2 t=3 s=5"):
        allowed_keys(torch.ones(shape, dtype=torch.bool), 2, 3, 2)


def test_allowed_keys_refuses_what_would_be_added(unchecked):
    with pytest.raises(TypeError, match=r"torch\.float32.*True = attend"):
        allowed_keys(torch.zeros(2, 1, 3, 5), 2, 3, 2)


def test_a_prefill_has_the_gradients_of_no_cache():
    gqa, _, _ = layers()
    x = torch.randn(B, T, D)
    upstream = torch.randn(B, T, D)
    weights = list(gqa.parameters())
    cached = torch.autograd.grad(ours(gqa, x, [T], LayerCache()), weights, upstream)
    uncached = torch.autograd.grad(ours(gqa, x, [T], None), weights, upstream)
    assert_close(cached, uncached)


@pytest.mark.parametrize("chunks", list(chunkings(5)))
def test_gradients_through_several_calls_are_right_or_raise(chunks):
    gqa, _, _ = layers()
    x = torch.randn(B, 5, D)
    weights = list(gqa.parameters())
    expected = torch.autograd.grad(ours(gqa, x, [5], None).square().sum(), weights)
    loss = ours(gqa, x, chunks, LayerCache()).square().sum()
    ends = list(itertools.accumulate(chunks))
    room, overwritten = 0, False
    for end in ends:
        overwritten |= 0 < room >= end
        room = room if room >= end else 2 * end
    if overwritten:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, weights)
    else:
        assert_close(torch.autograd.grad(loss, weights), expected)


def test_a_deep_copy_goes_its_own_way():
    cache = new_cache()
    for layer in cache.layers:
        layer.append(*new(3))
    other = copy.deepcopy(cache)
    token, another = new(1), new(1)
    kept = cache[0].append(*token)
    other[0].append(*another)
    assert torch.equal(kept[0][..., 3:, :], token[0])
    assert cache[1].length == other[1].length == 3
