"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").

A decoder-only transformer as it stood before Llama: learned positions added once, LayerNorm
before each sublayer, multi-head attention, a GELU network four times as wide as the stream,
biases everywhere, and a head that is the embedding again.

Axes: b batch, t token, s cached and new tokens, d hidden size, h head, k head dim, v vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from snippets.attention.gqa import fused_grouped_attention
from snippets.attention.kv_cache import KVCache, LayerCache, places
from snippets.common.checkpoint import drop_tied_head, filled, read_config, read_tensors
from snippets.layers.layer_norm import LayerNorm
from snippets.layers.swiglu import ACTIVATIONS

# transformers computes "gelu_new" step by step, in half precision with a rounding for each;
# this is the same function, rounded once.
GPT2_ACTIVATIONS = ACTIVATIONS | {"gelu_new": ACTIVATIONS["gelu_pytorch_tanh"]}


@dataclass(frozen=True)
class GPT2Config:
    """The keys of config.json that matter here, with the defaults of the smallest model.

    Raises:
        ValueError: a value that this model can't honour.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # 4 n_embd
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    add_cross_attention: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self):
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"):
            if (size := getattr(self, name)) is not None and size < 1:
                raise ValueError(f"{name}={size} is below 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"uneven: n_embd={self.n_embd}, n_head={self.n_head}")
        if self.activation_function not in GPT2_ACTIVATIONS:
            known = ", ".join(GPT2_ACTIVATIONS)
            raise ValueError(
                f"activation_function={self.activation_function!r} isn't supported; known: {known}"
            )
        for name in ("reorder_and_upcast_attn", "add_cross_attention"):
            if getattr(self, name):
                raise ValueError(f"{name}=True isn't supported")


class Conv1D(nn.Module):
    """y = x W + b with W as in GPT-2's files, d_in d_out: nn.Linear's, transposed.

    The name is that of the released code, which had written it as a convolution of width 1.
    """

    def __init__(self, d_in: int, d_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_in, d_out).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(d_out))

    def forward(self, x: Float[Tensor, "b t i"]) -> Float[Tensor, "b t o"]:
        return F.linear(x, self.weight.T, self.bias)


class GPT2Attention(nn.Module):
    """Causal multi-head attention; one matrix makes queries, keys and values of all heads."""

    def __init__(self, config: GPT2Config, number: int):
        super().__init__()
        self.num_heads = config.n_head
        self.scale = (config.n_embd // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= number + 1
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        mask: Bool[Tensor, "b 1 t s"] | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "b t d"]:
        # All queries first, then all keys, then all values; in each, head after head.
        qkv = self.c_attn(x).unflatten(-1, (3, self.num_heads, -1))  # b t 3 h k
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # b h t k
        if cache is not None:
            k, v = cache.append(k, v)  # b h s k
        y = fused_grouped_attention(q, k, v, mask, scale=self.scale)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class GPT2MLP(nn.Module):
    """y = act(x W_fc + b) W_proj + b."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        width = config.n_inner or 4 * config.n_embd
        self.activation = GPT2_ACTIVATIONS[config.activation_function]
        self.c_fc = Conv1D(config.n_embd, width)
        self.c_proj = Conv1D(width, config.n_embd)

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        return self.c_proj(self.activation(self.c_fc(x)))


class GPT2Block(nn.Module):
    """h = x + attention(norm(x)); y = h + mlp(norm(h))."""

    def __init__(self, config: GPT2Config, number: int):
        super().__init__()
        norm = {"hidden_size": config.n_embd, "eps": config.layer_norm_epsilon}
        self.ln_1 = LayerNorm(**norm)
        self.attn = GPT2Attention(config, number)
        self.ln_2 = LayerNorm(**norm)
        self.mlp = GPT2MLP(config)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        mask: Bool[Tensor, "b 1 t s"] | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "b t d"]:
        x = x + self.attn(self.ln_1(x), mask, cache)
        return x + self.mlp(self.ln_2(x))


class GPT2Model(nn.Module):
    """Embeddings of tokens and of positions, the blocks, the last norm."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(GPT2Block(config, number) for number in range(config.n_layer))
        self.ln_f = LayerNorm(hidden_size=config.n_embd, eps=config.layer_norm_epsilon)

    def forward(
        self,
        input_ids: Int[Tensor, "b t"],
        attention_mask: Int[Tensor, "b s"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "b t d"]:
        past, t = 0 if cache is None else cache.length, input_ids.shape[1]
        if past + t > self.wpe.num_embeddings:
            raise ValueError(
                f"{past} cached and {t} new tokens: n_positions={self.wpe.num_embeddings}"
            )
        positions, mask = places(input_ids, attention_mask, past)
        x = self.wte(input_ids) + self.wpe(positions)  # b t d
        for number, block in enumerate(self.h):
            x = block(x, mask, None if cache is None else cache[number])
        return self.ln_f(x)


class GPT2(nn.Module):
    """A GPT-2 that gives logits; parameters are named as transformers saves them."""

    tied_product = staticmethod(F.linear)  # `onednn_products` puts a faster one in its place

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
        self.transformer = GPT2Model(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(
        self,
        input_ids: Int[Tensor, "b t"],
        attention_mask: Int[Tensor, "b s"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "b t v"]:
        """Logits of the token that follows each of the t tokens.

        Args:
            input_ids: the tokens that come after those in the cache.
            attention_mask: 1 for tokens and 0 for padding, over cached and new tokens.
            cache: from `new_cache`; keys and values of the new tokens are added to it.

        Raises:
            ValueError: the attention mask isn't as long as cached and new tokens, or these,
                padding included, are more than there are positions.
        """
        x = self.transformer(input_ids, attention_mask, cache)
        if self.config.tie_word_embeddings:
            return self.tied_product(x, self.transformer.wte.weight)
        return self.lm_head(x)

    def new_cache(self) -> KVCache:
        """An empty cache, for one batch of prompts."""
        return KVCache([LayerCache() for _ in self.transformer.h])

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype | None = None) -> "GPT2":
        """Read a checkpoint folder: config.json and *.safetensors.

        Args:
            folder: as published; several files come with their index.
            dtype: of the parameters; as on disk unless given.

        Raises:
            CheckpointError: what is missing, unexpected, mis-shaped, damaged or not
                supported, by name and file.
        """
        config = read_config(folder, GPT2Config, model_types=("gpt2",))
        tensors = read_tensors(folder, dtype)
        # The first files were saved without the head, one level below; and with the causal
        # masks, which are no weights.
        if not any(name.startswith("transformer.") for name in tensors):
            below = {n: t for n, t in tensors.items() if n != "lm_head.weight"}
            tensors = {n: t for n, t in tensors.items() if n not in below}
            tensors |= {f"transformer.{name}": tensor for name, tensor in below.items()}
        masks = (".attn.bias", ".attn.masked_bias")
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(masks)}
        if config.tie_word_embeddings:
            drop_tied_head(tensors, "lm_head.weight", "transformer.wte.weight", source=folder)
        return filled(cls, config, tensors, source=folder)
