"""One small causal model, five ways to tell it where a token stands.

Sinusoids and a learned table are added to the tokens, RoPE turns queries and keys,
ALiBi lowers scores, and "none" leaves it to the causal mask (NoPE, Kazemnejad et al.
2023, arXiv:2305.19466). All else is a Llama's: parameters have its names, and at the
same seed the same values.

Axes: b batch, t token, d hidden size, h head, k head dim, f frequency, v vocabulary.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from snippets.layers.rmsnorm import RMSNorm
from snippets.layers.swiglu import GatedMLP
from snippets.position.alibi import alibi_bias, alibi_slopes, biased_attention
from snippets.position.rope import inverse_frequencies, rope_table, rotate
from snippets.position.sinusoidal_and_learned import LearnedPositions, frequencies, sinusoids

KINDS = ("none", "sinusoidal", "learned", "alibi", "rope")


class PositionedAttention(nn.Module):
    """Causal multi-head attention; queries and keys turned, scores lowered, or neither.

    Raises:
        ValueError: the heads don't divide evenly.
    """

    def __init__(self, *, hidden_size: int, num_heads: int):
        super().__init__()
        if num_heads < 1 or hidden_size % num_heads:
            raise ValueError(f"heads of uneven size: {hidden_size=}, {num_heads=}")
        self.num_heads = num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        rotation: tuple[Tensor, Tensor] | None = None,
        bias: Float[Tensor, "h t t"] | None = None,
    ) -> Float[Tensor, "b t d"]:
        q, k, v = (
            proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # b h t k
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        if bias is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = biased_attention(q, k, v, bias)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class PositionedLayer(nn.Module):
    """h = x + attention(norm(x)); y = h + mlp(norm(h))."""

    def __init__(self, *, hidden_size: int, num_heads: int, intermediate_size: int):
        super().__init__()
        self.input_layernorm = RMSNorm(hidden_size=hidden_size)
        self.self_attn = PositionedAttention(hidden_size=hidden_size, num_heads=num_heads)
        self.post_attention_layernorm = RMSNorm(hidden_size=hidden_size)
        self.mlp = GatedMLP(hidden_size=hidden_size, intermediate_size=intermediate_size)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        rotation: tuple[Tensor, Tensor] | None = None,
        bias: Float[Tensor, "h t t"] | None = None,
    ) -> Float[Tensor, "b t d"]:
        x = x + self.self_attn(self.input_layernorm(x), rotation, bias)
        return x + self.mlp(self.post_attention_layernorm(x))


class PositionedDecoder(nn.Module):
    """A decoder whose tokens learn of their places by `position`, one of `KINDS`.

    The logits are the products with the token embeddings, which enter times √d, as in
    the first Transformer: features of variance 1, the size of the sinusoids.

    Raises:
        ValueError: another kind of position.
    """

    def __init__(
        self,
        *,
        position: str,
        vocab_size: int,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        num_layers: int,
        max_positions: int,
    ):
        super().__init__()
        if position not in KINDS:
            raise ValueError(f"{position=} isn't one of {', '.join(KINDS)}")
        self.position = position
        self.embed_tokens = nn.Embedding(vocab_size, hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=hidden_size**-0.5)
        sizes = {"hidden_size": hidden_size, "num_heads": num_heads}
        sizes["intermediate_size"] = intermediate_size
        self.layers = nn.ModuleList(PositionedLayer(**sizes) for _ in range(num_layers))
        self.norm = RMSNorm(hidden_size=hidden_size)
        # Last, so that all that the kinds have in common starts with the same values.
        if position == "learned":
            self.embed_positions = LearnedPositions(
                max_positions=max_positions, hidden_size=hidden_size
            )
            # As large as the tokens: in GPT-2 too, both start alike.
            nn.init.normal_(self.embed_positions.weight)

    def forward(
        self,
        tokens: Int[Tensor, "b t"],
        inv_freq: Float[Tensor, " f"] | None = None,
        factor: float = 1.0,
    ) -> Float[Tensor, "b t v"]:
        """Logits of the token that follows each of the t tokens.

        Args:
            tokens: texts that start at position 0.
            inv_freq: for RoPE, other frequencies than it was trained with.
            factor: on cosine and sine, as in `scaled_frequencies`.

        Raises:
            ValueError: more tokens than learned positions.
        """
        d = self.embed_tokens.embedding_dim
        heads = self.layers[0].self_attn.num_heads
        positions = torch.arange(tokens.shape[1], device=tokens.device)  # t
        x = self.embed_tokens(tokens) * d**0.5  # b t d
        rotation = bias = None
        if self.position == "sinusoidal":
            omega = frequencies(hidden_size=d).to(x.device)
            x = x + sinusoids(positions, omega, x.dtype)
        elif self.position == "learned":
            x = x + self.embed_positions(positions)
        elif self.position == "alibi":
            slopes = alibi_slopes(heads).to(x.device)
            bias = alibi_bias(slopes, positions, positions)  # h t t
        elif self.position == "rope":
            if inv_freq is None:
                inv_freq = inverse_frequencies(head_dim=d // heads).to(x.device)
            cos, sin = rope_table(inv_freq, positions)  # t f
            rotation = (factor * cos).to(x.dtype), (factor * sin).to(x.dtype)
        for layer in self.layers:
            x = layer(x, rotation, bias)
        return self.norm(x) @ self.embed_tokens.weight.T
