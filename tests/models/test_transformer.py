"""The transformer of 2017 against torch's, the paper's formulas in loops, and itself in pieces.

No two of b s t d h v and the network's width are equal.
"""

import math
import re
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import get_inverse_sqrt_schedule

from snippets.attention.kv_cache import KVCache
from snippets.attention.multi_head import unpack_torch
from snippets.models.transformer import (
    Transformer,
    TransformerConfig,
    translate,
    warmup_rate,
)

B, S, T, D, H, F, V, L = 2, 9, 7, 24, 4, 40, 31, 3
SIZES = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": L, "num_attention_heads": H}
SIZES |= {"intermediate_size": F, "dropout": 0.0}


def redrawn(model: nn.Module, seed: int = 0) -> nn.Module:
    """Biases that aren't 0, norms that aren't 1."""
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            centre = float("norm" in name and name.endswith("weight"))
            noise = torch.randn(weight.shape, generator=drawn, dtype=weight.dtype)
            weight.copy_(centre + 0.3 * noise)
    return model


def ours(**changes) -> Transformer:
    return redrawn(Transformer(TransformerConfig(**SIZES | changes))).eval()


def pair(final_norms: bool = True, dtype=torch.float32) -> tuple[Transformer, nn.Transformer]:
    """torch's two stacks, all numbers drawn anew, and ours with the same weights."""
    norms = {"layer_norm_eps": 1e-2}  # far from the default
    theirs = nn.Transformer(D, H, L, L, F, dropout=0.0, batch_first=True, **norms)
    if not final_norms:
        theirs.encoder.norm = theirs.decoder.norm = None
    redrawn(theirs).to(dtype)
    model = ours(attention_bias=True, final_norms=final_norms, **norms).to(dtype)
    stacks = unpack_torch(theirs.state_dict())
    model.load_state_dict(stacks | {"embedding.weight": model.embedding.weight})
    return model, theirs


def ids(length: int, seed: int) -> torch.Tensor:
    return torch.randint(V, (B, length), generator=torch.Generator().manual_seed(seed))


def right_padded(length: int, padding: int) -> torch.Tensor:
    mask = torch.ones(B, length, dtype=torch.long)
    mask[1, length - padding :] = 0
    return mask


SOURCE, TARGET = ids(S, 1), ids(T, 2)
SOURCE_MASK, TARGET_MASK = right_padded(S, 4), right_padded(T, 2)


def waves(length: int, dtype=torch.float32) -> torch.Tensor:
    """Section 3.5, number by number."""
    table = torch.zeros(length, D, dtype=torch.float64)
    for p in range(length):
        for i in range(D // 2):
            table[p, 2 * i] = math.sin(p / 10000 ** (2 * i / D))
            table[p, 2 * i + 1] = math.cos(p / 10000 ** (2 * i / D))
    return table.to(dtype)


def torch_arguments(masked: bool) -> dict[str, torch.Tensor]:
    """True = ignore there, and the memory's padding wants to be named once more."""
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    if not masked:
        return {"tgt_mask": future}
    return {
        "tgt_mask": future,
        "src_key_padding_mask": SOURCE_MASK == 0,
        "memory_key_padding_mask": SOURCE_MASK == 0,
        "tgt_key_padding_mask": TARGET_MASK == 0,
    }


def torch_logits(theirs: nn.Transformer, table: torch.Tensor, masked: bool) -> torch.Tensor:
    def embedded(tokens):
        return table[tokens] * math.sqrt(D) + waves(tokens.shape[1], table.dtype)

    out = theirs(embedded(SOURCE), embedded(TARGET), **torch_arguments(masked))
    return out @ table.T


def masks(masked: bool) -> tuple:
    return (SOURCE_MASK, TARGET_MASK) if masked else (None, None)


# Against torch


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("final_norms", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_and_gradients_equal_torchs(dtype, final_norms, masked):
    model, theirs = pair(final_norms, dtype)
    table = model.embedding.weight.detach().clone().requires_grad_()
    found = model(SOURCE, TARGET, *masks(masked))
    expected = torch_logits(theirs, table, masked)
    real = TARGET_MASK.bool() if masked else torch.ones(B, T, dtype=torch.bool)
    bounds = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {}
    assert_close(found[real], expected[real], **bounds)
    upstream = torch.randn(int(real.sum()), V, dtype=dtype)
    found[real].backward(upstream)
    expected[real].backward(upstream)
    gradients = unpack_torch({n: p.grad for n, p in theirs.named_parameters()})
    gradients["embedding.weight"] = table.grad
    bounds = bounds or {"rtol": 1e-4, "atol": 1e-3}  # sums over tokens: up to a hundred
    assert_close({n: p.grad for n, p in model.named_parameters()}, gradients, **bounds)


def test_the_memory_equals_torchs_encoder():
    model, theirs = pair()
    embedded = model.embedding(SOURCE) * math.sqrt(D) + waves(S)
    expected = theirs.encoder(embedded, src_key_padding_mask=SOURCE_MASK == 0)
    real = SOURCE_MASK.bool()
    assert_close(model.encode(SOURCE, SOURCE_MASK)[real], expected[real])


def test_final_norms_matter_and_belong_to_torch():
    model, _ = pair(final_norms=True)
    bare = ours(attention_bias=True)
    assert set(model.state_dict()) - set(bare.state_dict()) == {
        f"{stack}.norm.{kind}" for stack in ("encoder", "decoder") for kind in ("weight", "bias")
    }
    bare.load_state_dict({n: w for n, w in model.state_dict().items() if n in bare.state_dict()})
    assert (bare(SOURCE, TARGET) - model(SOURCE, TARGET)).abs().max() > 0.1


@pytest.mark.parametrize("masked", [False, True])
def test_alignments_equal_the_weights_in_torch(masked):
    model, theirs = pair()
    maps = []

    def ask(module, given, kwargs):
        kwargs = kwargs | {"need_weights": True, "average_attn_weights": False}
        maps.append(nn.MultiheadAttention.forward(module, *given, **kwargs)[1])

    for layer in theirs.decoder.layers:
        layer.multihead_attn.register_forward_pre_hook(ask, with_kwargs=True)
    torch_logits(theirs, model.embedding.weight, masked)
    found = model.alignments(SOURCE, TARGET, *masks(masked))
    assert found.shape == (B, L, H, T, S)
    expected = torch.stack(maps, 1)
    assert_close(found[0], expected[0])
    assert_close(found[1, :, :, : T - 2], expected[1, :, :, : T - 2])
    if masked:
        assert found[1, ..., S - 4 :].abs().max() == 0


def test_alignments_hide_the_targets_padding_too():
    model, left = ours(), TARGET_MASK.flip(1)
    other = torch.where(left.bool(), TARGET, 0)
    found = model.alignments(SOURCE, TARGET, None, left)
    real = left[:, None, None, :, None].bool()
    assert_close(found * real, model.alignments(SOURCE, other, None, left) * real)


# Against the paper


def by_the_paper(model: Transformer, keep: float = 1.0) -> torch.Tensor:
    """Logits of the first text, in loops; what dropout touches is multiplied by `keep`."""
    w = model.state_dict()

    def norm(name, x):
        centred = x - x.mean()
        gain = w[f"{name}.weight"] / (centred.square().mean() + 1e-5).sqrt()
        return centred * gain + w[f"{name}.bias"]

    def attention(name, x, memory, causal):
        q, k, v = (
            y @ w[f"{name}.{letter}_proj.weight"].T
            for y, letter in ((x, "q"), (memory, "k"), (memory, "v"))
        )
        out = torch.zeros_like(x)
        for h in range(H):
            part = slice(h * D // H, (h + 1) * D // H)
            for t in range(len(x)):
                seen = t + 1 if causal else len(memory)
                scores = k[:seen, part] @ q[t, part] / math.sqrt(D // H)
                out[t, part] = scores.exp() / scores.exp().sum() @ v[:seen, part]
        return keep * out @ w[f"{name}.o_proj.weight"].T

    def network(name, x):
        inner = (w[f"{name}.linear1.weight"] @ x + w[f"{name}.linear1.bias"]).clamp(min=0)
        return keep * (w[f"{name}.linear2.weight"] @ inner + w[f"{name}.linear2.bias"])

    def add(name, x, y):
        return torch.stack([norm(name, a + b) for a, b in zip(x, y, strict=True)])

    def embed(tokens):
        x = torch.stack([math.sqrt(D) * w["embedding.weight"][i] for i in tokens])
        return keep * (x + waves(len(tokens), x.dtype))

    x = embed(SOURCE[0])
    for i in range(L):
        name = f"encoder.layers.{i}"
        x = add(f"{name}.norm1", x, attention(f"{name}.self_attn", x, x, False))
        x = add(f"{name}.norm2", x, [network(name, y) for y in x])
    memory, x = x, embed(TARGET[0])
    for i in range(L):
        name = f"decoder.layers.{i}"
        x = add(f"{name}.norm1", x, attention(f"{name}.self_attn", x, x, True))
        x = add(f"{name}.norm2", x, attention(f"{name}.multihead_attn", x, memory, False))
        x = add(f"{name}.norm3", x, [network(name, y) for y in x])
    return x @ w["embedding.weight"].T


@pytest.mark.parametrize("keep", [1.0, 0.75])
def test_equals_the_papers_formulas_in_loops(keep, monkeypatch):
    """Dropout as a factor shows where it is: on every sublayer's output, and the embeddings."""
    model = ours().double()
    if keep < 1:
        model.train()
        monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: keep * x)
    found = model(SOURCE, TARGET)[0]
    assert_close(found, by_the_paper(model, keep), rtol=1e-10, atol=1e-10)


def test_every_dropout_has_its_share():
    model = Transformer(TransformerConfig(**SIZES | {"dropout": 0.3}))
    shares = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    assert shares == [0.3] * (1 + 2 * L)
    assert (model(SOURCE, TARGET) - model(SOURCE, TARGET)).abs().max() > 0.1
    assert TransformerConfig().dropout == 0.1


def test_starts_with_embeddings_that_grow_to_one_and_xavier_elsewhere():
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(vocab_size=2000, hidden_size=64))
    table = model.embedding.weight
    assert abs(table.std().item() * 8 - 1) < 0.02 and abs(table.mean().item()) < 1e-3
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            assert len(set(weight.tolist())) == 1 or "linear" in name
        elif name != "embedding.weight":
            bound = math.sqrt(6 / sum(weight.shape))
            assert 0.98 * bound < weight.abs().max() <= bound, name


TABLE_3 = {  # rows of the paper without a number of heads, and what they count in millions
    65: {},
    36: {"num_hidden_layers": 2},
    50: {"num_hidden_layers": 4},
    80: {"num_hidden_layers": 8},
    28: {"hidden_size": 256},
    168: {"hidden_size": 1024},
    53: {"intermediate_size": 1024},
    90: {"intermediate_size": 4096},
}


def count(**sizes) -> int:
    with torch.device("meta"):
        model = Transformer(TransformerConfig(**sizes))
    return sum(weight.numel() for weight in model.parameters())


def test_one_vocabulary_gives_all_base_rows_of_table_3():
    """With the 37,000 of the text it would be 63 million; the big model wants fewer."""
    assert count() == 63_045_632
    for millions, sizes in TABLE_3.items():
        assert round(count(vocab_size=41_100, **sizes) / 1e6) == millions
    big = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
    assert round(count(**big) / 1e6) == 214 and round(count(vocab_size=36_000, **big) / 1e6) == 213


@pytest.mark.parametrize("hidden_size, warmup", [(512, 4000), (64, 30)])
def test_the_warm_up_equals_transformers(hidden_size, warmup):
    peak = (hidden_size * warmup) ** -0.5
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=peak)
    schedule = get_inverse_sqrt_schedule(optimizer, warmup, timescale=warmup)
    for step in range(1, 3 * warmup):
        optimizer.step()
        schedule.step()
        ours = warmup_rate(step, hidden_size=hidden_size, warmup_steps=warmup)
        assert math.isclose(ours, schedule.get_last_lr()[0], rel_tol=1e-12)
    assert warmup_rate(4000, hidden_size=512) == warmup_rate(
        4000, hidden_size=512, warmup_steps=4000
    )
    assert warmup_rate(1, hidden_size=1, warmup_steps=1) == 1


# Invariants


def test_a_target_token_sees_the_past_and_all_of_the_source():
    model = ours()
    before = model(SOURCE, TARGET)
    for t in range(T):
        target = TARGET.clone()
        target[:, t] = (target[:, t] + 1) % V
        moved = (model(SOURCE, target) - before).abs().amax((0, 2))
        assert moved[:t].max() < 1e-5 if t else True
        assert moved[t:].min() > 1e-3
    for s in range(S):
        source = SOURCE.clone()
        source[:, s] = (source[:, s] + 1) % V
        assert (model(source, TARGET) - before).abs().amax(2).min() > 1e-3


def test_a_source_token_sees_later_ones():
    model, source = ours(), SOURCE.clone()
    source[:, -1] = (source[:, -1] + 1) % V
    assert (model.encode(source) - model.encode(SOURCE)).abs().amax(2).min() > 1e-3


def test_padding_counts_for_nothing_on_either_side():
    model = ours()
    alone = model(SOURCE[1:, : S - 4], TARGET[1:, : T - 2])
    assert_close(model(SOURCE, TARGET, SOURCE_MASK, TARGET_MASK)[1:, : T - 2], alone)
    left = model(SOURCE.roll(4, 1), TARGET.roll(2, 1), SOURCE_MASK.flip(1), TARGET_MASK.flip(1))
    assert_close(left[1:, 2:], alone)
    assert (model(SOURCE, TARGET)[1:, : T - 2] - alone).abs().max() > 0.1


def test_without_positions_the_memory_of_an_anagram_is_the_same_memory(monkeypatch):
    model, order = ours(), torch.randperm(S)
    with_positions = model.encode(SOURCE[:, order]) - model.encode(SOURCE)[:, order]
    assert with_positions.abs().max() > 0.1
    monkeypatch.setattr("snippets.models.transformer.sinusoids", lambda p, omega, dtype: 0)
    assert_close(model.encode(SOURCE[:, order]), model.encode(SOURCE)[:, order])


# The cache


@pytest.mark.parametrize("chunks", [[T], [1] * T, [3, 4], [1, 4, 2]])
@pytest.mark.parametrize("padding", [0, 2])
def test_chunks_through_the_cache_equal_the_whole(chunks, padding):
    model = ours(attention_bias=True)
    mask = torch.ones(B, T, dtype=torch.long)
    mask[1, :padding] = 0
    memory, cache, parts = model.encode(SOURCE, SOURCE_MASK), model.new_cache(), []
    with torch.no_grad():
        for place in torch.arange(T).split(chunks):
            seen = mask[:, : place[-1] + 1] if padding else None
            parts.append(model.decode(TARGET[:, place], memory, SOURCE_MASK, seen, cache))
        whole = model.decode(TARGET, memory, SOURCE_MASK, mask if padding else None)
    real = mask.bool()
    assert_close(torch.cat(parts, 1)[real], whole[real])
    assert cache.length == T
    assert cache.nbytes == 2 * L * B * (T + S) * D * 4  # k v, layers, tokens, d, bytes


def test_the_memory_is_projected_once():
    model, rows = ours(), []
    for layer in model.decoder.layers:
        layer.multihead_attn.k_proj.register_forward_hook(lambda m, x, y: rows.append(y.shape[1]))
    translate(model, SOURCE, start=1, end=V + 1, max_new_tokens=4)
    assert rows == [S] * L + [0] * 3 * L
    rows.clear()
    translate(model, SOURCE, start=1, end=V + 1, max_new_tokens=4, use_cache=False)
    assert rows == [S] * 4 * L


def test_each_layer_keeps_its_own_two():
    model = ours()
    cache = model.new_cache()
    assert isinstance(cache, KVCache) and len(cache.layers) == 2 * L
    assert len({id(layer) for layer in cache.layers}) == 2 * L
    model.decode(TARGET, model.encode(SOURCE), cache=cache)
    assert [layer.length for layer in cache.layers] == [T, S] * L


# Writing


def torch_writes(theirs, table, start: int, steps: int) -> torch.Tensor:
    target = torch.full((B, 1), start)
    memory = theirs.encoder(
        table[SOURCE] * math.sqrt(D) + waves(S), src_key_padding_mask=SOURCE_MASK == 0
    )
    for _ in range(steps):
        t = target.shape[1]
        out = theirs.decoder(
            table[target] * math.sqrt(D) + waves(t),
            memory,
            tgt_mask=torch.ones(t, t, dtype=torch.bool).triu(1),
            memory_key_padding_mask=SOURCE_MASK == 0,
        )
        target = torch.cat((target, (out[:, -1] @ table.T).argmax(-1)[:, None]), 1)
    return target[:, 1:]


def restless() -> tuple[Transformer, nn.Transformer]:
    """Random weights write one token forever, unless the last norm turns the stream's signs."""
    model, theirs = pair()
    drawn = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "linear2" in name or "out_proj" in name:
                weight.mul_(0.3)
        theirs.decoder.norm.weight.normal_(generator=drawn)
        theirs.decoder.norm.bias.zero_()
    weights = unpack_torch(theirs.state_dict()) | {"embedding.weight": model.embedding.weight}
    model.load_state_dict(weights)
    return model, theirs


@pytest.mark.parametrize("use_cache", [True, False])
def test_writes_what_torch_would_write_until_the_end(use_cache):
    model, theirs = restless()
    expected = torch_writes(theirs, model.embedding.weight, 3, 8)
    assert len(set(expected.flatten().tolist())) > 3
    options = {"start": 3, "use_cache": use_cache}
    found = translate(model, SOURCE, SOURCE_MASK, end=V + 1, max_new_tokens=8, **options)
    assert torch.equal(found, expected) and not found.requires_grad
    one = translate(model, SOURCE, SOURCE_MASK, end=V + 1, max_new_tokens=1, **options)
    assert torch.equal(one, expected[:, :1])
    for row in range(B):  # any token may be the one that ends
        end = int(expected[row, 2])
        found = translate(model, SOURCE, SOURCE_MASK, end=end, max_new_tokens=8, **options)
        stops = []
        for text, whole in zip(found, expected, strict=True):
            places = (whole == end).nonzero().flatten()
            stops.append(int(places[0]) + 1 if len(places) else 8)
            assert torch.equal(text[: stops[-1]], whole[: stops[-1]])
            assert (text[stops[-1] :] == end).all()
        assert found.shape[1] == max(stops)


def test_the_cache_is_used_unless_refused():
    model, lengths = ours(), []
    decode = model.decode
    model.decode = lambda ids, *rest, **more: (
        lengths.append(ids.shape[1]) or decode(ids, *rest, **more)
    )
    translate(model, SOURCE, start=1, end=V + 1, max_new_tokens=3)
    translate(model, SOURCE, start=1, end=V + 1, max_new_tokens=3, use_cache=False)
    assert lengths == [1, 1, 1, 1, 2, 3]


# Dtypes and the compiler


def test_bfloat16_stays_near_float32():
    model = ours(num_hidden_layers=1)
    expected = model(SOURCE, TARGET, SOURCE_MASK, TARGET_MASK)
    found = model.bfloat16()(SOURCE, TARGET, SOURCE_MASK, TARGET_MASK)
    assert found.dtype == torch.bfloat16
    real = TARGET_MASK.bool()
    assert_close(found[real].float(), expected[real], rtol=0, atol=0.03 * expected.max().item())


def test_positions_are_exact_in_bfloat16():
    """Past 256 not every integer is a bfloat16: the sinusoids are computed wider."""
    model, far = ours(num_hidden_layers=1).bfloat16(), 300
    zeros = torch.zeros(1, far, dtype=torch.long)
    expected = model.embedding.weight[0] * D**0.5 + waves(far).bfloat16()
    assert_close(model.embed(zeros, torch.arange(far))[0], expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("final_norms", [False, True])
def test_compiles_whole(unchecked, final_norms):
    model = ours(final_norms=final_norms)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    expected = model(SOURCE, TARGET, SOURCE_MASK, TARGET_MASK)
    assert_close(compiled(SOURCE, TARGET, SOURCE_MASK, TARGET_MASK), expected)


# Refusals


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"hidden_size": 26}, "uneven: hidden_size=26, num_attention_heads=4"),
        (
            {"hidden_size": 9, "num_attention_heads": 3},
            "uneven: hidden_size=9, num_attention_heads=3",
        ),
        ({"vocab_size": 0}, "vocab_size=0 is below 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 is below 1"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 is below 1"),
        ({"intermediate_size": -1}, "intermediate_size=-1 is below 1"),
        ({"dropout": 1.0}, "dropout=1.0 isn't a share below 1"),
        ({"dropout": -0.1}, "dropout=-0.1 isn't a share below 1"),
    ],
)
def test_refuses_sizes_that_do_not_fit(unchecked, changes, said):
    with pytest.raises(ValueError, match="^" + re.escape(said)):
        TransformerConfig(**SIZES | changes)


def test_a_config_stays_as_it_was_checked():
    with pytest.raises(FrozenInstanceError):
        TransformerConfig().hidden_size = 7


def test_takes_the_smallest_sizes():
    ones = {"vocab_size": 1, "num_hidden_layers": 1, "intermediate_size": 1}
    model = Transformer(TransformerConfig(hidden_size=2, num_attention_heads=1, **ones))
    zero = torch.zeros(1, 1, dtype=torch.long)
    assert model(zero, zero).shape == (1, 1, 1)


def cached(model, memory):
    cache = model.new_cache()
    model.decode(TARGET[:, :3], memory, cache=cache)
    return cache


MISFITS = {
    "source mask": (
        lambda m, x: m.encode(SOURCE, SOURCE_MASK[:, 1:]),
        "mask (2, 8) for ids (2, 9)",
    ),
    "memory mask": (
        lambda m, x: m.decode(TARGET, x, SOURCE_MASK[:, 1:]),
        "mask (2, 8) for memory (2, 9, 24)",
    ),
    "target mask": (
        lambda m, x: m.decode(TARGET, x, None, TARGET_MASK[:, 1:]),
        "attention_mask of shape (2, 6), for 2 sequences of 0 cached and 7 new",
    ),
    "batch": (
        lambda m, x: m.decode(TARGET[:1], x),
        "memory (2, 9, 24) for ids (1, 7), hidden_size=24",
    ),
    "width": (
        lambda m, x: m.decode(TARGET, x[..., :20]),
        "memory (2, 9, 20) for ids (2, 7), hidden_size=24",
    ),
    "batches": (
        lambda m, x: m(SOURCE[:1], TARGET),
        "memory (1, 9, 24) for ids (2, 7), hidden_size=24",
    ),
    "maps": (
        lambda m, x: m.alignments(SOURCE[:1], TARGET),
        "memory (1, 9, 24) for ids (2, 7), hidden_size=24",
    ),
}


@pytest.mark.parametrize("call, said", MISFITS.values(), ids=MISFITS)
def test_refuses_what_does_not_fit(unchecked, call, said):
    model = ours()
    with pytest.raises(ValueError, match="^" + re.escape(said)):
        call(model, model.encode(SOURCE))


@pytest.mark.parametrize("wrong", ["length", "batch", "mask"])
def test_refuses_another_memory_than_the_cached_and_keeps_it_whole(unchecked, wrong):
    model = ours()
    memory = model.encode(SOURCE)
    cache = cached(model, memory)
    calls = {
        "length": (TARGET[:, 3:], memory[:, 1:]),
        "batch": (TARGET[:1, 3:], memory[:1]),
        "mask": (TARGET[:, 3:], memory, None, TARGET_MASK[:, :5]),
    }
    said = {
        "length": "cache of memory (2, 9), given memory (2, 8, 24)",
        "batch": "cache of memory (2, 9), given memory (1, 9, 24)",
        "mask": "attention_mask of shape (2, 5), for 2 sequences of 3 cached and 4 new",
    }
    with pytest.raises(ValueError, match="^" + re.escape(said[wrong])):
        model.decode(*calls[wrong], cache=cache)
    assert [layer.length for layer in cache.layers] == [3, S] * L
    whole = model.decode(TARGET, memory)
    assert_close(model.decode(TARGET[:, 3:], memory, cache=cache), whole[:, 3:])


def test_refuses_to_write_nothing(unchecked):
    with pytest.raises(ValueError, match=r"^max_new_tokens=0 writes nothing$"):
        translate(ours(), SOURCE, start=1, end=2, max_new_tokens=0)


@pytest.mark.parametrize("step, warmup", [(0, 5), (1, 0)])
def test_refuses_steps_below_one(unchecked, step, warmup):
    with pytest.raises(ValueError, match=f"^counted from 1: step={step}, warmup_steps={warmup}$"):
        warmup_rate(step, hidden_size=8, warmup_steps=warmup)
