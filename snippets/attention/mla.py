"""Multi-head latent attention, MLA (DeepSeek-AI 2024, arXiv:2405.04434; V3: arXiv:2412.19437).

A token keeps one short vector for all heads, the latent, out of which each head could make its
keys and values again. Or it leaves them unmade and meets the latent itself: then the heads are
those of multi-query attention, and the latent is the single key and value they share.

Axes: b batch, t query token, s key token (s >= t, with a cache), d hidden size, h head,
n features of a head's queries and keys that don't turn, p those that turn (RoPE), e features of
its values, c latent of keys and values.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from snippets.attention.kv_cache import LayerCache, allowed_keys
from snippets.attention.scaled_dot_product import causal_mask
from snippets.layers.rmsnorm import RMSNorm
from snippets.position.rope import rotate_interleaved


def expanded_attention(
    q_nope: Float[Tensor, "b h t n"],
    q_rope: Float[Tensor, "b h t p"],
    kept: Float[Tensor, "b s cp"],
    w_kv: Float[Tensor, "h ne c"],
    mask: Bool[Tensor, "#b 1 t s"] | Bool[Tensor, "t s"] | None = None,
    *,
    scale: float,
) -> Float[Tensor, "b h t e"]:
    """Multi-head attention with keys and values made from the latents: for many queries.

    Of the token j, [c_j | r_j] is kept. Head i has the key [W_UK,i c_j | r_j] and the value
    W_UV,i c_j, its rows of w_kv being W_UK,i above W_UV,i, and
    y = softmax(scale (q_nope · W_UK,i c_j + q_rope · r_j)) W_UV,i c_j.
    Without a mask (True = attend) it is causal, the queries being the last t of the s tokens.
    """
    h, ne, c = w_kv.shape
    n, t, s = q_nope.shape[-1], q_nope.shape[2], kept.shape[1]
    latent, k_rope = kept.split((c, kept.shape[-1] - c), dim=-1)
    kv = F.linear(latent, w_kv.flatten(0, 1)).unflatten(-1, (h, ne)).transpose(1, 2)  # b h s ne
    k_nope, v = kv.split((n, ne - n), dim=-1)
    # The key's turning part is the same for all heads.
    k = torch.cat((k_nope, k_rope.unsqueeze(1).expand(-1, h, -1, -1)), dim=-1)  # b h s n+p
    q = torch.cat((q_nope, q_rope), dim=-1)  # b h t n+p
    if mask is None and t < s:  # torch's `is_causal` is right for t = s only
        mask = causal_mask(t, s, device=q.device)
    causal = mask is None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)


def absorbed_attention(
    q_nope: Float[Tensor, "b h t n"],
    q_rope: Float[Tensor, "b h t p"],
    kept: Float[Tensor, "b s cp"],
    w_kv: Float[Tensor, "h ne c"],
    mask: Bool[Tensor, "#b 1 t s"] | Bool[Tensor, "t s"] | None = None,
    *,
    scale: float,
) -> Float[Tensor, "b h t e"]:
    """`expanded_attention` without its keys and values: for few queries.

    q · (W_UK c) = (W_UK^T q) · c, and a mean of W_UV c is W_UV times the mean of c. So queries
    go to the latents instead, and what is kept is the one key, and in its first c features the
    one value, of multi-query attention.
    """
    h, ne, c = w_kv.shape
    n, t, s = q_nope.shape[-1], q_nope.shape[2], kept.shape[1]
    w_uk, w_uv = w_kv.split((n, ne - n), dim=1)  # h n c, h e c
    q_latent = q_nope.transpose(0, 1).flatten(1, 2) @ w_uk  # h b·t c
    q_latent = q_latent.unflatten(1, (-1, t)).transpose(0, 1)  # b h t c
    q = torch.cat((q_latent, q_rope), dim=-1)  # b h t c+p
    if mask is None and t > 1:  # a single query sees every key
        mask = causal_mask(t, s, device=q.device)
    if mask is not None:
        mask = mask.expand(*mask.shape[:-3], h, t, s).flatten(-3, -2)  # b h·t s, or h·t s
        mask = mask.unsqueeze(1) if mask.ndim == 3 else mask  # b 1 h·t s
    # All heads see the same keys: they are so many more queries of a single head. Torch's fused
    # kernel wants values as wide as keys, so what is kept serves as both, and p features are cut.
    q, kv = q.flatten(1, 2).unsqueeze(1), kept.unsqueeze(1)  # b 1 h·t c+p, b 1 s c+p
    y = F.scaled_dot_product_attention(q, kv, kv, attn_mask=mask, scale=scale)[..., :c]
    y = y.unflatten(2, (h, t)).squeeze(1).permute(1, 3, 0, 2).flatten(2)  # h c b·t
    # The weight on the left: the other way round, bfloat16 on a CPU takes four times as long.
    return (w_uv @ y).unflatten(2, (-1, t)).permute(2, 0, 3, 1)


class MultiHeadLatentAttention(nn.Module):
    """Causal self-attention that keeps kv_lora_rank + qk_rope_head_dim numbers per token.

    [c_j | r_j] = [RMSNorm(x_j W_DKV^T) | RoPE(x_j W_KR^T)] is kept and feeds
    `expanded_attention` or `absorbed_attention`, whichever takes fewer operations. Queries come
    from x directly if q_lora_rank is None, else through a normed latent of their own.

    Numbers are named as in config.json, parameters as in DeepSeek's checkpoints. Their rotated
    features are interleaved pairs. The norms' eps is 1e-6 in DeepSeek's code, and in transformers,
    whatever the config says of the others. `attention_bias` gives q_a_proj, kv_a_proj_with_mqa and
    o_proj one. `softmax_scale` is 1 / sqrt(n + p) unless given; with YaRN, DeepSeek's is
    yarn_mscale(factor, mscale_all_dim)² times that.

    Raises:
        ValueError: a size below 1, an odd qk_rope_head_dim, a scale that isn't positive.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        q_lora_rank: int | None,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        rms_norm_eps: float = 1e-6,
        attention_bias: bool = False,
        softmax_scale: float | None = None,
    ):
        super().__init__()
        widths = (hidden_size, num_heads, kv_lora_rank, qk_nope_head_dim, v_head_dim)
        if min(widths) < 1 or (q_lora_rank is not None and q_lora_rank < 1):
            raise ValueError(
                f"below 1: {hidden_size=}, {num_heads=}, {q_lora_rank=}, {kv_lora_rank=}, "
                f"{qk_nope_head_dim=}, {v_head_dim=}"
            )
        if qk_rope_head_dim < 2 or qk_rope_head_dim % 2:
            raise ValueError(f"features don't pair up: {qk_rope_head_dim=}")
        qk_head_dim = qk_nope_head_dim + qk_rope_head_dim
        if softmax_scale is None:
            # Of a head's key, not of what is kept: the absorbed form has the same scores.
            softmax_scale = qk_head_dim**-0.5
        if not softmax_scale > 0:
            raise ValueError(f"not positive: {softmax_scale=}")
        self.num_heads, self.v_head_dim = num_heads, v_head_dim
        self.q_lora_rank, self.kv_lora_rank = q_lora_rank, kv_lora_rank
        self.qk_nope_head_dim, self.qk_rope_head_dim = qk_nope_head_dim, qk_rope_head_dim
        self.softmax_scale = softmax_scale

        if q_lora_rank is None:
            self.q_proj = nn.Linear(hidden_size, num_heads * qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden_size, q_lora_rank, bias=attention_bias)
            self.q_a_layernorm = RMSNorm(hidden_size=q_lora_rank, eps=rms_norm_eps)
            self.q_b_proj = nn.Linear(q_lora_rank, num_heads * qk_head_dim, bias=False)
        # "with_mqa": its last p outputs are the turning key, one for all heads.
        kept_size = kv_lora_rank + qk_rope_head_dim
        self.kv_a_proj_with_mqa = nn.Linear(hidden_size, kept_size, bias=attention_bias)
        self.kv_a_layernorm = RMSNorm(hidden_size=kv_lora_rank, eps=rms_norm_eps)
        kv_size = num_heads * (qk_nope_head_dim + v_head_dim)
        self.kv_b_proj = nn.Linear(kv_lora_rank, kv_size, bias=False)
        self.o_proj = nn.Linear(num_heads * v_head_dim, hidden_size, bias=attention_bias)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        rotation: tuple[Tensor, Tensor] | None = None,
        attention_mask: Int[Tensor, "b s"]
        | Bool[Tensor, "b s"]
        | Bool[Tensor, "#b 1 t s"]
        | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "b t d"]:
        """Attend from t tokens to themselves and to those in the cache.

        Args:
            x: the tokens' hidden states.
            rotation: cos and sin of `rope_table` for p features, times YaRN's attention factor
                if there is one.
            attention_mask: 1 for tokens and 0 for padding, or True for the pairs that
                attend, over the s = cached + t tokens; see `allowed_keys`. None is causal.
            cache: this layer's; what is kept of the t tokens is added to it.

        Raises:
            ValueError: a mask that isn't over all tokens, tables or a cache of other sizes.
        """
        b, t, _ = x.shape
        past = 0 if cache is None else cache.length
        mask = allowed_keys(attention_mask, b, t, past)
        q_nope, q_rope = self.queries(x, rotation)
        kept = self.latents(x, rotation)
        if cache is not None:
            (kept,) = cache.append(kept)  # b s cp
        # Absorbing needs the weight itself, so both forms read it, not the layer.
        w_kv = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1))  # h ne c
        form = absorbed_attention if self.absorbs(t, past + t) else expanded_attention
        y = form(q_nope, q_rope, kept, w_kv, mask, scale=self.softmax_scale)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def new_cache(self) -> LayerCache:
        """An empty cache for this layer."""
        return LayerCache()

    def queries(
        self, x: Float[Tensor, "b t d"], rotation: tuple[Tensor, Tensor] | None
    ) -> tuple[Float[Tensor, "b h t n"], Float[Tensor, "b h t p"]]:
        """The part of each head's queries that doesn't turn, and the part that does, turned."""
        if self.q_lora_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # b h t n+p
        q_nope, q_rope = q.split((self.qk_nope_head_dim, self.qk_rope_head_dim), dim=-1)
        return q_nope, q_rope if rotation is None else rotate_interleaved(q_rope, *rotation)

    def latents(
        self, x: Float[Tensor, "b t d"], rotation: tuple[Tensor, Tensor] | None
    ) -> Float[Tensor, "b t cp"]:
        """What is kept of each token: the normed latent, and the key part that turns, turned."""
        kept = self.kv_a_proj_with_mqa(x)
        latent, k_rope = kept.split((self.kv_lora_rank, self.qk_rope_head_dim), dim=-1)
        if rotation is not None:
            k_rope = rotate_interleaved(k_rope.unsqueeze(1), *rotation).squeeze(1)
        return torch.cat((self.kv_a_layernorm(latent), k_rope), dim=-1)

    def absorbs(self, t: int, s: int) -> bool:
        """Whether absorbing takes fewer operations for t queries over s tokens.

        Multiplications in a head: expanded, s c (n + e) for the keys and values and then
        t s (n + p + e); absorbed, t c (n + e) for the queries and outputs and then t s 2 (c + p).
        In DeepSeek's sizes training and prompts expand, and decoding absorbs.
        """
        c, p = self.kv_lora_rank, self.qk_rope_head_dim
        unturned = self.qk_nope_head_dim + self.v_head_dim
        return t * s * (2 * c + p - unturned) < (s - t) * c * unturned
