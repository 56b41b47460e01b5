"""The Transformer (Vaswani et al. 2017, arXiv:1706.03762): an encoder and a decoder.

The encoder reads a text, all of it at once. The decoder writes another one, token by token;
each of its layers looks at what it wrote so far, and then into the encoder's output.

Axes: b batch, s source token, t target token, d hidden size, h head, l decoder layer,
v vocabulary.
"""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from snippets.attention.kv_cache import KVCache, LayerCache, places
from snippets.attention.multi_head import MultiHeadAttention
from snippets.layers.layer_norm import LayerNorm
from snippets.position.sinusoidal_and_learned import frequencies, sinusoids, token_positions


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes, with those of the paper's base model as defaults (table 3).

    Args:
        vocab_size: of one vocabulary for source and target.
        hidden_size: d.
        num_hidden_layers: of the encoder, and as many of the decoder.
        num_attention_heads: h.
        intermediate_size: of the network behind each attention.
        dropout: of each sublayer's output and of the embeddings, in training.
        layer_norm_eps: of all norms.
        attention_bias: the paper's attention has none, `nn.Transformer`'s has.
        final_norms: one more norm behind each stack, which `nn.Transformer` has.

    Raises:
        ValueError: heads that don't divide the hidden size, an odd hidden size, a size
            below 1, a dropout outside 0 to 1.
    """

    vocab_size: int = 37000
    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    dropout: float = 0.1
    layer_norm_eps: float = 1e-5
    attention_bias: bool = False
    final_norms: bool = False

    def __post_init__(self):
        for field in fields(self):
            if field.type is int and getattr(self, field.name) < 1:
                raise ValueError(f"{field.name}={getattr(self, field.name)} is below 1")
        d, h = self.hidden_size, self.num_attention_heads
        if d % h or d % 2:
            raise ValueError(f"uneven: hidden_size={d}, num_attention_heads={h}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} isn't a share below 1")


class FeedForward(nn.Module):
    """max(0, x W_1^T + b_1) W_2^T + b_2, for each token by itself. A layer inherits it.

    The names are `nn.Transformer`'s, where the two matrices belong to the layer.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.linear1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.linear2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def feed_forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        return self.dropout(self.linear2(F.relu(self.linear1(x))))


class EncoderLayer(FeedForward):
    """y = norm1(x + attention(x)); norm2(y + network(y)). Each token sees the whole source."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        self.self_attn = attention(config)
        self.norm1, self.norm2 = norm(config), norm(config)

    def forward(
        self, x: Float[Tensor, "b s d"], mask: Int[Tensor, "b s"] | None = None
    ) -> Float[Tensor, "b s d"]:
        x = self.norm1(x + self.dropout(self.self_attn(x, attention_mask=mask)))
        return self.norm2(x + self.feed_forward(x))


class DecoderLayer(FeedForward):
    """y = norm1(x + attention(x)); z = norm2(y + attention(y, memory)); norm3(z + network(z)).

    The first attention sees the target so far, the second all of the memory: what the
    encoder made of the source.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        self.self_attn = attention(config, causal=True)
        self.multihead_attn = attention(config, memory_size=config.hidden_size)
        self.norm1, self.norm2, self.norm3 = norm(config), norm(config), norm(config)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        memory: Float[Tensor, "b s d"],
        mask: Bool[Tensor, "b 1 t _"] | None = None,
        memory_mask: Int[Tensor, "b s"] | None = None,
        caches: tuple[LayerCache, LayerCache] | tuple[None, None] = (None, None),
    ) -> Float[Tensor, "b t d"]:
        x = self.look_back(x, mask, caches[0])
        found = self.multihead_attn(x, memory, memory_mask, caches[1])  # b t d
        x = self.norm2(x + self.dropout(found))
        return self.norm3(x + self.feed_forward(x))

    def look_back(
        self,
        x: Float[Tensor, "b t d"],
        mask: Bool[Tensor, "b 1 t _"] | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "b t d"]:
        """The first sublayer, whose output asks the memory."""
        seen = self.self_attn(x, attention_mask=mask, cache=cache)  # b t d
        return self.norm1(x + self.dropout(seen))


def attention(config: TransformerConfig, **kind: bool | int) -> MultiHeadAttention:
    sizes = {"hidden_size": config.hidden_size, "num_heads": config.num_attention_heads}
    return MultiHeadAttention(**sizes, bias=config.attention_bias, **kind)


def norm(config: TransformerConfig) -> LayerNorm:
    return LayerNorm(hidden_size=config.hidden_size, eps=config.layer_norm_eps)


class Stack(nn.Module):
    """Layers one behind the other, and a last norm if the configuration wants one."""

    def __init__(self, config: TransformerConfig, layer: type[EncoderLayer] | type[DecoderLayer]):
        super().__init__()
        self.layers = nn.ModuleList(layer(config) for _ in range(config.num_hidden_layers))
        # What a layer hands on is normed already: the paper's stacks end there.
        self.norm = norm(config) if config.final_norms else nn.Identity()


class Transformer(nn.Module):
    """Reads one text and says how probable each next token of another one is.

    One matrix embeds source and target, times sqrt(d), and is the head too. `encoder` and
    `decoder` hold their parameters under `nn.Transformer`'s names, attention unpacked by
    `unpack_torch` of snippets/attention/multi_head.py. Masks are 1 for tokens and 0 for
    padding, on either side: positions count tokens only.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = Stack(config, EncoderLayer)
        self.decoder = Stack(config, DecoderLayer)
        for weight in self.parameters():
            if weight.ndim > 1:
                nn.init.xavier_uniform_(weight)
        # Times sqrt(d) that is 1, as large as a sinusoid; and as a head it is small.
        nn.init.normal_(self.embedding.weight, std=config.hidden_size**-0.5)

    def forward(
        self,
        input_ids: Int[Tensor, "b s"],
        decoder_input_ids: Int[Tensor, "b t"],
        attention_mask: Int[Tensor, "b s"] | None = None,
        decoder_attention_mask: Int[Tensor, "b t"] | None = None,
    ) -> Float[Tensor, "b t v"]:
        """Logits of the token that follows each of the t target tokens.

        Raises:
            ValueError: masks of other shapes than the ids, or other numbers of texts.
        """
        memory = self.encode(input_ids, attention_mask)
        return self.decode(decoder_input_ids, memory, attention_mask, decoder_attention_mask)

    def encode(
        self, input_ids: Int[Tensor, "b s"], attention_mask: Int[Tensor, "b s"] | None = None
    ) -> Float[Tensor, "b s d"]:
        """The memory: what the source's tokens are once they have seen each other.

        Raises:
            ValueError: a mask of another shape than the ids.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if mask.shape != input_ids.shape:
            raise ValueError(f"mask {tuple(mask.shape)} for ids {tuple(input_ids.shape)}")
        x = self.embed(input_ids, token_positions(mask))
        for layer in self.encoder.layers:
            x = layer(x, attention_mask)
        return self.encoder.norm(x)

    def decode(
        self,
        decoder_input_ids: Int[Tensor, "b t"],
        memory: Float[Tensor, "b s d"],
        attention_mask: Int[Tensor, "b s"] | None = None,
        decoder_attention_mask: Int[Tensor, "b _"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "b t v"]:
        """Logits of the token that follows each of the t target tokens.

        Args:
            decoder_input_ids: those that come after the ones in the cache.
            memory: from `encode`.
            attention_mask: of the memory.
            decoder_attention_mask: over cached and new target tokens.
            cache: from `new_cache`. The memory's keys and values are computed once, for
                the first call, and are taken from there in later ones.

        Raises:
            ValueError: a memory or a mask that doesn't fit; the cache is as it was.
        """
        self.refuse_misfit(decoder_input_ids, memory, attention_mask, cache)
        past = 0 if cache is None else cache.length
        positions, mask = places(decoder_input_ids, decoder_attention_mask, past)
        x = self.embed(decoder_input_ids, positions)
        for number, layer in enumerate(self.decoder.layers):
            caches = (None, None) if cache is None else (cache[2 * number], cache[2 * number + 1])
            x = layer(x, memory, mask, attention_mask, caches)
        return F.linear(self.decoder.norm(x), self.embedding.weight)

    def alignments(
        self,
        input_ids: Int[Tensor, "b s"],
        decoder_input_ids: Int[Tensor, "b t"],
        attention_mask: Int[Tensor, "b s"] | None = None,
        decoder_attention_mask: Int[Tensor, "b t"] | None = None,
    ) -> Float[Tensor, "b l h t s"]:
        """How much each target token looks at each source token, by layer and head.

        Row t is the look of the step that predicts token t + 1.
        """
        memory = self.encode(input_ids, attention_mask)
        self.refuse_misfit(decoder_input_ids, memory)
        positions, mask = places(decoder_input_ids, decoder_attention_mask, 0)
        x, maps = self.embed(decoder_input_ids, positions), []
        for layer in self.decoder.layers:
            asks = layer.look_back(x, mask)
            maps.append(layer.multihead_attn.maps(asks, memory, attention_mask))
            x = layer(x, memory, mask, attention_mask)
        return torch.stack(maps, 1)

    def embed(
        self, ids: Int[Tensor, "b t"], positions: Int[Tensor, "*b t"]
    ) -> Float[Tensor, "b t d"]:
        """sqrt(d) E[ids] + sinusoids."""
        x = self.embedding(ids) * self.config.hidden_size**0.5
        # In bfloat16 position 257 would be 256: computed in float32 at least, then rounded.
        wide = torch.promote_types(x.dtype, torch.float32)
        omega = frequencies(hidden_size=self.config.hidden_size, dtype=wide).to(x.device)
        return self.dropout(x + sinusoids(positions, omega, x.dtype))

    def refuse_misfit(
        self,
        decoder_input_ids: Int[Tensor, "b t"],
        memory: Float[Tensor, "b s d"],
        attention_mask: Int[Tensor, "b s"] | None = None,
        cache: KVCache | None = None,
    ) -> None:
        """Before anything is computed or kept, so that a cache stays whole."""
        (b, s, d), ids = memory.shape, tuple(decoder_input_ids.shape)
        if ids[0] != b or d != self.config.hidden_size:
            raise ValueError(
                f"memory {(b, s, d)} for ids {ids}, hidden_size={self.config.hidden_size}"
            )
        if attention_mask is not None and attention_mask.shape != (b, s):
            raise ValueError(f"mask {tuple(attention_mask.shape)} for memory {(b, s, d)}")
        if cache is not None and cache.length:
            kept, length = len(cache[0].store[0]), cache[1].length
            if (kept, length) != (b, s):
                raise ValueError(f"cache of memory {(kept, length)}, given memory {(b, s, d)}")

    def new_cache(self) -> KVCache:
        """Empty, for one batch of sources: each layer's own tokens, then the memory's."""
        return KVCache([LayerCache() for _ in range(2 * len(self.decoder.layers))])


@torch.no_grad()
def translate(
    model: Transformer,
    input_ids: Int[Tensor, "b s"],
    attention_mask: Int[Tensor, "b s"] | None = None,
    *,
    start: int,
    end: int,
    max_new_tokens: int,
    use_cache: bool = True,
) -> Int[Tensor, "b t"]:
    """What the model writes for each source: the most probable token, then the next.

    Args:
        model: in evaluation mode.
        input_ids: the sources.
        attention_mask: 1 for tokens and 0 for padding.
        start: the token before the first one; isn't returned.
        end: the token that ends a text; it also fills up those that ended early.
        max_new_tokens: where to stop at the latest.
        use_cache: else all tokens go through the decoder again at each step.

    Raises:
        ValueError: no token is wanted, or a mask of another shape than the ids.
    """
    if max_new_tokens < 1:
        raise ValueError(f"{max_new_tokens=} writes nothing")
    memory = model.encode(input_ids, attention_mask)
    cache = model.new_cache() if use_cache else None
    written = torch.full_like(input_ids[:, :1], start)  # b 1
    ended = torch.zeros_like(written[:, 0], dtype=torch.bool)  # b
    for _ in range(max_new_tokens):
        new = written[:, -1:] if use_cache else written
        logits = model.decode(new, memory, attention_mask, cache=cache)[:, -1]  # b v
        token = logits.argmax(-1).masked_fill(ended, end)
        written = torch.cat((written, token[:, None]), 1)
        ended |= token == end
        if ended.all():
            break
    return written[:, 1:]


def warmup_rate(step: int, *, hidden_size: int, warmup_steps: int = 4000) -> float:
    """d^-0.5 min(n^-0.5, n w^-1.5): the learning rate of step n, counted from 1.

    It rises in a straight line for w steps, to (d w)^-0.5, and falls with the square root.

    Raises:
        ValueError: a step or a number of steps below 1.
    """
    if step < 1 or warmup_steps < 1:
        raise ValueError(f"counted from 1: {step=}, {warmup_steps=}")
    return hidden_size**-0.5 * min(step**-0.5, step * warmup_steps**-1.5)
