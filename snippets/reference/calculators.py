"""What a language model weighs and what its cache keeps, counted from its sizes alone.

Everything follows from the shapes of its matrices. Grouped-query attention: Ainslie et al. 2023,
arXiv:2305.13245; windows: Jiang et al. 2023, arXiv:2310.06825; latent attention: DeepSeek-AI
2024, arXiv:2405.04434. All results are whole numbers, so that another language gets the same.

Axes: b batch, s token kept, d hidden size, h query head, g key-value head, k head dim, n and p
features of a latent head that don't turn and that turn, e of its values, c latent, W window.
"""

from dataclasses import replace
from typing import NamedTuple

from snippets.common.model_shape import ModelShape

# Parameters


class Matrix(NamedTuple):
    """One kind of matrix: how many a model has, and how many of them a token goes through."""

    part: str
    outputs: int
    inputs: int
    count: int
    used: int

    @property
    def size(self) -> int:
        """Its parameters."""
        return self.outputs * self.inputs


def matrices(shape: ModelShape) -> list[Matrix]:
    """All that multiply the stream between embedding and head."""
    d, h, layers = shape.hidden_size, shape.num_heads, shape.num_layers
    n, p, e = shape.qk_nope_head_dim, shape.qk_rope_head_dim, shape.v_head_dim
    c, c_q = shape.kv_lora_rank, shape.q_lora_rank
    if c:
        queries = [(c_q, d), (h * (n + p), c_q)] if c_q else [(h * (n + p), d)]
        attention = [*queries, (c + p, d), (h * (n + e), c), (d, h * e)]
    else:
        q, kv = h * shape.head_dim, shape.num_kv_heads * shape.head_dim
        attention = [(q, d), (kv, d), (kv, d), (d, q)]
    found = [Matrix("attention", *sizes, layers, layers) for sizes in attention]
    dense, sparse = layers - shape.expert_layers, shape.expert_layers
    f, m = shape.intermediate_size, shape.moe_intermediate_size
    if dense:
        found += [Matrix("MLP", *sizes, dense, dense) for sizes in mlp(shape, f)]
    if sparse:
        every, chosen = sparse * shape.num_experts, sparse * shape.experts_per_token
        found += [Matrix("experts", *sizes, every, chosen) for sizes in mlp(shape, m)]
        if shared := shape.shared_experts:
            wide = mlp(shape, shared * m)
            found += [Matrix("shared experts", *sizes, sparse, sparse) for sizes in wide]
        found.append(Matrix("routers", shape.num_experts, d, sparse, sparse))
    return found


def mlp(shape: ModelShape, width: int) -> list[tuple[int, int]]:
    into = [(width, shape.hidden_size)] * (2 if shape.gated else 1)
    return [*into, (shape.hidden_size, width)]


def vectors(shape: ModelShape) -> int:
    """Parameters of all norms and biases."""
    d, h, c = shape.hidden_size, shape.num_heads, shape.kv_lora_rank
    norm = d * (2 if shape.norm_bias else 1)
    layer = shape.layer_norms * norm
    if c:
        layer += shape.q_lora_rank + c
        if shape.qkv_bias:
            layer += shape.q_lora_rank + c + shape.qk_rope_head_dim
    else:
        if shape.head_norms:
            layer += 2 * shape.head_dim
        if shape.qkv_bias:
            layer += (h + 2 * shape.num_kv_heads) * shape.head_dim
    if shape.o_bias:
        layer += d
    if shape.mlp_bias:
        layer += shape.intermediate_size * (2 if shape.gated else 1) + d
    return shape.num_layers * layer + norm


def parameters(shape: ModelShape) -> dict[str, int]:
    """How many there are, by part; in total, and those that one token uses.

    As model cards count, embedding and head are in both. A tied head is the embedding and has 0.
    """
    table = shape.vocab_size * shape.hidden_size
    parts = {
        "embedding": table,
        "positions": shape.positions * shape.hidden_size,
        "attention": 0,
        "MLP": 0,
        "experts": 0,
        "shared experts": 0,
        "routers": 0,
        "norms and biases": vectors(shape),
        "head": 0 if shape.tied else table,
    }
    idle = 0
    for matrix in matrices(shape):
        parts[matrix.part] += matrix.size * matrix.count
        idle += matrix.size * (matrix.count - matrix.used)
    total = sum(parts.values())
    return parts | {"total": total, "active": total - idle}


# The cache


def kept_numbers(shape: ModelShape) -> int:
    """What one layer keeps of one token: keys and values 2 g k, or a latent c + p."""
    if shape.kv_lora_rank:
        return shape.kv_lora_rank + shape.qk_rope_head_dim
    return 2 * shape.num_kv_heads * shape.head_dim


def kv_cache(shape: ModelShape, *, context: int, batch: int, bits: int) -> dict[str, int]:
    """What the cache holds when `context` tokens of `batch` texts are in it.

    b (kept a token) (full layers · s + windowed layers · min(s, W - 1)) numbers: with the next
    token W - 1 kept ones are its window. Without the scales that 8 and 4 bits need.

    Args:
        shape: the model.
        context: s, tokens of each text.
        batch: b, texts.
        bits: of a number: 16 is bfloat16.

    Returns:
        `bytes` in all, those of the layers without and with a window, and of one more token.
    """
    numbers, limited = kept_numbers(shape), shape.windowed_layers
    full = batch * numbers * (shape.num_layers - limited) * context
    held = min(context, shape.window - 1) if limited else 0
    windowed = batch * numbers * limited * held
    growing = shape.num_layers - limited
    growing += limited if limited and context < shape.window - 1 else 0
    return {
        "bytes": to_bytes(full + windowed, bits),
        "full layers": to_bytes(full, bits),
        "windowed layers": to_bytes(windowed, bits),
        "one more token": to_bytes(batch * numbers * growing, bits),
    }


def to_bytes(numbers: int, bits: int) -> int:
    return -(-numbers * bits // 8)


def with_attention(shape: ModelShape, kind: str) -> ModelShape:
    """The same model with another attention, for comparison.

    "MHA" has a key-value head for each query head, "GQA" one for eight, "MQA" one; "MLA" keeps
    DeepSeek's 512 + 64 numbers; "window" lets every layer see 4,096 tokens, as in Mistral 7B.
    The others see everything. A latent head's keys count as n wide, as they are without RoPE.

    Raises:
        ValueError: another kind.
    """
    h = shape.num_heads
    width = shape.qk_nope_head_dim if shape.kv_lora_rank else shape.head_dim
    if kind == "MLA":
        return replace(shape, kv_lora_rank=512, q_lora_rank=0, qk_nope_head_dim=width,
                       qk_rope_head_dim=64, v_head_dim=width, window=0,
                       windowed_layers=0)  # fmt: skip
    if kind == "window":
        return replace(shape, window=4096, windowed_layers=shape.num_layers)
    groups = {"MHA": h, "GQA": h // 8 if h % 8 == 0 else h, "MQA": 1}
    if kind not in groups:
        raise ValueError(f"unknown {kind=}; known: MHA, GQA, MQA, MLA, window")
    return replace(shape, num_kv_heads=groups[kind], head_dim=width, kv_lora_rank=0, window=0,
                   windowed_layers=0)  # fmt: skip
