"""For each module, what tests/test_carry.py calls: the original and its one-file form.

An example takes the module and gives calls, each a callable of it with its inputs. Only torch
and safetensors may be imported here: the one-file form is called where nothing else can be.
"""

import tempfile

import torch


def gqa(m):
    layer = m.GroupedQueryAttention(hidden_size=24, num_heads=12, num_kv_heads=4, head_dim=6)
    q, k, v = torch.randn(2, 12, 7, 6), torch.randn(2, 4, 7, 6), torch.randn(2, 4, 7, 6)
    return [(layer, torch.randn(2, 7, 24)), (m.grouped_attention, q, k, v)]


def svd_attention(m):
    sizes = dict(vocab_size=17, max_positions=9, hidden_size=20, num_heads=3, head_dim=6)
    model, matrix = m.OneLayerDecoder(**sizes), torch.randn(9, 6)
    weight = torch.randn(3, 6, 20)
    return [
        (model, torch.randint(17, (2, 7))),
        (model.self_attn, torch.randn(2, 7, 20)),
        (m.circuit_attention, torch.randn(2, 7, 20), *torch.randn(2, 3, 20, 20)),
        (m.qk_circuit, weight, weight + 1),
        (m.ov_circuit, weight, weight.mT + 1),
        (m.factor, matrix),
        (m.low_rank, matrix, 3),
        (m.singular_values, matrix),
        (m.effective_rank, torch.rand(9)),
    ]


def layer_norm(m):
    x = 3 * torch.randn(2, 7, 50) + 2
    norms = m.LayerNorm(hidden_size=50, eps=0.1), m.LayerNorm(hidden_size=50, bias=False)
    for parameter in [p for norm in norms for p in norm.parameters()]:
        parameter.data += 0.3 * torch.randn(50)
    places = [(place, x, norms[0], torch.tanh) for place in (m.pre_norm, m.post_norm)]
    return [*((norm, x) for norm in norms), (m.standardize, x, 1e-6), *places]


def rmsnorm(m):
    x = 3 * torch.randn(2, 7, 50)
    norms = m.RMSNorm(hidden_size=50, eps=0.1), m.UnitOffsetRMSNorm(hidden_size=50)
    for norm in norms:
        norm.weight.data += 0.3 * torch.randn(50)
    return [*((norm, x) for norm in norms), (m.rms_normalize, x, 1e-6)]


def rope(m):
    cos, sin = m.rope_table(m.inverse_frequencies(head_dim=6, rope_theta=50.0), torch.arange(3, 10))
    x, weight = torch.randn(2, 5, 7, 6), torch.randn(12, 20)
    return [
        (m.rotate, x, cos, sin),
        (m.rotate_interleaved, x, cos, sin),
        (lambda w: m.half_from_interleaved(w, head_dim=6), weight),
        (lambda w: m.interleaved_from_half(w, head_dim=6), weight),
    ]


def context_extension(m):
    sizes = {"head_dim": 16, "rope_theta": 50.0}
    trained = {"factor": 4.0, m.LENGTH: 64}
    bands = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return [
        (lambda: m.linear(**sizes, factor=4.0),),
        (lambda: m.dynamic(**sizes, factor=4.0, max_position_embeddings=64, length=100),),
        (lambda: m.yarn(**sizes, **trained),),
        (lambda: m.llama3(**sizes, **trained, **bands),),
    ]


def scaled_dot_product(m):
    q, k, v = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 6)
    mask = m.causal_mask(5, 7) & (torch.rand(2, 1, 1, 7) < 0.7)
    return [(m.attend, q, k, v, mask), (m.attend, q, k, v)]


def kv_cache(m):
    def grow(first, second):
        cache = m.KVCache([m.LayerCache()])
        cache[0].append(first, 2 * first)
        return cache[0].append(second, 2 * second), cache.length, cache.nbytes

    return [(grow, torch.randn(2, 3, 5, 4), torch.randn(2, 3, 2, 4))]


def swiglu(m):
    sizes = {"hidden_size": 24, "intermediate_size": 40}
    acts = ("silu", "gelu", "gelu_pytorch_tanh")
    return [(m.GatedMLP(**sizes, hidden_act=act), torch.randn(2, 7, 24)) for act in acts]


def llama(m):
    config = m.LlamaConfig(
        vocab_size=101,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    ids, mask = torch.randint(101, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    model = m.Llama(config)
    return [(model, ids), (model, ids, mask)]


def generate(m):
    class Bigrams(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(11, 11)

        def new_cache(self):
            return None

        def forward(self, input_ids, attention_mask=None, cache=None):
            return self.table(input_ids)

    model, logits = Bigrams(), torch.randn(2, 50)
    prompt = torch.randint(11, (2, 3))
    return [
        (lambda ids: m.generate(model, ids, max_new_tokens=5, temperature=0.8), prompt),
        (lambda x: m.next_token(x, 0.7, top_k=20, top_p=0.9), logits),
    ]


def checkpoint(m):
    from safetensors.torch import save_file

    folder = tempfile.mkdtemp()
    save_file({"a": torch.randn(3, 5), "b": torch.arange(4)}, f"{folder}/model.safetensors")
    return [
        (m.read_tensors, folder, torch.bfloat16),
        (m.scaling_of, {"type": "linear", "factor": 2.0, "rope_theta": 1e4}),
    ]


def what_is_a_language_model(m):
    tokens, logits = torch.randint(7, (300,)), torch.randn(40, 7)
    model = m.NGramModel(order=3, vocab_size=7, smoothing=0.1).fit(tokens)
    contexts, _ = m.windows(tokens, 3)
    return [
        (lambda c: model(c), contexts),
        (lambda t: m.windows(t, 2), tokens),
        (m.surprisal, logits, tokens[:40]),
        (m.perplexity, logits, tokens[:40]),
    ]


EXAMPLES = {
    "foundations/what_is_a_language_model": what_is_a_language_model,
    "attention/gqa": gqa,
    "attention/kv_cache": kv_cache,
    "attention/scaled_dot_product": scaled_dot_product,
    "attention/svd_attention": svd_attention,
    "common/checkpoint": checkpoint,
    "common/generate": generate,
    "layers/layer_norm": layer_norm,
    "layers/rmsnorm": rmsnorm,
    "layers/swiglu": swiglu,
    "models/llama": llama,
    "position/context_extension": context_extension,
    "position/rope": rope,
}
