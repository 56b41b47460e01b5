"""What training holds in memory: weights, gradients, optimizer, activations.

Bytes a parameter: Rajbhandari et al. 2019, arXiv:1910.02054. Activations: Korthikanti et al.
2022, arXiv:2205.05198, section 4, whose GPT gets 34 + 5 h s / d bytes a feature and token; here
counted tensor by tensor, so that it holds for grouped and latent attention, gates and experts.
LoRA: Hu et al. 2021, arXiv:2106.09685; QLoRA: Dettmers et al. 2023, arXiv:2305.14314.

Axes: as in `snippets/reference/calculators.py`; f width of an MLP, r rank.
"""

from snippets.common.model_shape import ModelShape
from snippets.reference.calculators import Matrix, matrices, parameters

METHODS = ("full", "LoRA", "QLoRA")
# Bytes of a weight, of its gradient, of a second copy in float32, of one optimizer state.
PRECISIONS = {"mixed": (2, 2, 4, 4), "bfloat16": (2, 2, 0, 2), "float32": (4, 4, 0, 4)}
STATES = {"AdamW": 2, "SGD with momentum": 1, "SGD": 0}  # numbers a parameter
KEPT = ("everything", "no scores", "layer inputs")
TARGETS = {
    "attention": ("attention",),
    "all matrices": ("attention", "MLP", "experts", "shared experts"),
}
ADAPTER = 4  # bytes: peft keeps adapters in float32
BLOCK, SCALES = 64, 256  # weights to a scale, scales to a block of their own


def adapted(shape: ModelShape, targets: str) -> list[Matrix]:
    """The matrices that get an adapter. Embedding, head and routers never do."""
    return [m for m in matrices(shape) if m.part in TARGETS[targets]]


def adapter_parameters(shape: ModelShape, *, rank: int, targets: str) -> int:
    """r (inputs + outputs) for each matrix."""
    return sum(rank * (m.inputs + m.outputs) * m.count for m in adapted(shape, targets))


def nf4_bytes(size: int) -> int:
    """A matrix of so many weights in NF4 with double quantization.

    Half a byte a weight, a byte for the scale of 64, four for the scale of 256 scales, and four
    for their mean. Its two tables of 1,088 bytes in all are not counted.
    """
    scales = -(-size // BLOCK)
    return -(-size // 2) + scales + 4 * -(-scales // SCALES) + 4


def frozen_bytes(shape: ModelShape, *, method: str, precision: str) -> int:
    """The model under adapters: in 16 or 32 bits, or under QLoRA its matrices in 4."""
    weight, *_ = PRECISIONS[precision]
    if method == "LoRA":
        return weight * parameters(shape)["total"]
    packed = [m for m in matrices(shape) if m.part != "routers"]
    inside = sum(m.size * m.count for m in packed)
    outside = parameters(shape)["total"] - inside
    return weight * outside + sum(nf4_bytes(m.size) * m.count for m in packed)


def layer_activations(shape: ModelShape, *, experts: bool) -> int:
    """Numbers that one layer keeps of one token for the backward pass, without the scores.

    What each matrix and norm has read, queries, keys and values, and what attention gives. For
    GPT's shapes 16 d, which are 32 of the paper's 34 bytes; the other two are masks of dropout.
    """
    d, h = shape.hidden_size, shape.num_heads
    numbers = shape.layer_norms * d + d  # what norms read, and what attention reads
    if shape.kv_lora_rank:
        key = shape.qk_nope_head_dim + shape.qk_rope_head_dim
        numbers += 2 * shape.q_lora_rank + 2 * shape.kv_lora_rank  # before and behind their norms
        numbers += 2 * h * key + 2 * h * shape.v_head_dim
    else:
        q, kv = h * shape.head_dim, shape.num_kv_heads * shape.head_dim
        numbers += 2 * q + 2 * kv
        if shape.head_norms:
            numbers += q + kv
    numbers += d  # what the MLP reads
    inner = 4 if shape.gated else 2  # gate, up, act(gate) and the product; or before and behind act
    if not experts:
        return numbers + inner * shape.intermediate_size
    chosen, m = shape.experts_per_token, shape.moe_intermediate_size
    # An expert's tokens are gathered for it, and its outputs kept to be weighed.
    return numbers + chosen * (2 * d + inner * m) + shape.shared_experts * inner * m


def activation_bytes(
    shape: ModelShape, *, context: int, batch: int, precision: str, kept: str, dropout: bool
) -> dict[str, int]:
    """What one step keeps between its forward and its backward pass.

    Args:
        shape: the model.
        context: tokens of each text, s.
        batch: texts, b.
        precision: a key of `PRECISIONS`.
        kept: "everything"; "no scores", which FlashAttention and selective recomputation both
            leave out; or "layer inputs", full recomputation, of which one layer at a time is
            whole while it is computed again.
        dropout: of attention's weights and both sublayers' outputs.

    Returns:
        `layers`, and `ends`: last norm, head and logits; the logits are in float32.
    """
    width, tokens, d = PRECISIONS[precision][0], batch * context, shape.hidden_size
    masks = 2 * d if dropout else 0  # a byte each
    per_layer = {e: width * layer_activations(shape, experts=e) + masks for e in (False, True)}
    sparse = shape.expert_layers
    dense = shape.num_layers - sparse
    scores = (2 * width + 1 if dropout else width) * shape.num_heads * context
    if kept == "layer inputs":
        whole = max(per_layer[e] for e in (False, True) if (sparse if e else dense))
        layers = tokens * (shape.num_layers * width * d + whole)
    else:
        layers = tokens * (dense * per_layer[False] + sparse * per_layer[True])
        if kept == "everything":
            layers += tokens * shape.num_layers * scores
    ends = tokens * (2 * width * d + 4 * shape.vocab_size + (d if dropout else 0))
    return {"layers": layers, "ends": ends}


def training_memory(
    shape: ModelShape,
    *,
    method: str,
    precision: str,
    optimizer: str,
    context: int,
    batch: int,
    kept: str,
    dropout: bool,
    rank: int,
    targets: str,
) -> dict[str, int]:
    """Bytes that one device holds in a training step that nothing is shared in.

    Activations under adapters are counted as in full training, which is an upper bound: a frozen
    matrix without an adapter needs no inputs. What kernels and the allocator take is left out.

    Args:
        shape: the model.
        method: of `METHODS`.
        precision: a key of `PRECISIONS`; of the frozen weights under adapters.
        optimizer: a key of `STATES`.
        context: tokens of each text.
        batch: texts of one forward pass.
        kept: of `KEPT`, see `activation_bytes`.
        dropout: whether there is dropout.
        rank: of the adapters.
        targets: a key of `TARGETS`: the matrices that get an adapter.

    Returns:
        Bytes by part and in `total`; `trained` is a number of parameters.
    """
    weight, gradient, master, state = PRECISIONS[precision]
    total = parameters(shape)["total"]
    if method == "full":
        trained, weights = total, weight * total
    else:
        trained = adapter_parameters(shape, rank=rank, targets=targets)
        weights = frozen_bytes(shape, method=method, precision=precision) + ADAPTER * trained
        gradient, master, state = ADAPTER, 0, ADAPTER
    kept_bytes = activation_bytes(
        shape, context=context, batch=batch, precision=precision, kept=kept, dropout=dropout
    )
    found = {
        "weights": weights,
        "float32 copy": master * trained,
        "gradients": gradient * trained,
        "optimizer": STATES[optimizer] * state * trained,
        "activations": kept_bytes["layers"],
        "logits": kept_bytes["ends"],
    }
    return found | {"total": sum(found.values()), "trained": trained}
