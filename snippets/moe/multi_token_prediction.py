"""Multi-token prediction (DeepSeek-AI 2024, arXiv:2412.19437, section 2.2).

Beside the next token a model is trained to predict the one after it, by a small module on top
that is given the next token. (Gloeckle et al. 2024, arXiv:2404.19737, have heads side by side,
which aren't.) After training the module can be dropped, or draft: it guesses a token, and the
model checks the guess while it computes the next one (Leviathan et al. 2022, arXiv:2211.17192).

Axes: b batch, t token, d hidden size, v vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from snippets.attention.kv_cache import KVCache, LayerCache
from snippets.layers.rmsnorm import RMSNorm


class MTPModule(nn.Module):
    """norm(block(W [norm(embedding of the next token) | norm(hidden)])).

    Parameters are named as in DeepSeek-V3's checkpoints, where those of the block stand beside
    `enorm`, not below `block`. The last norm, `shared_head.norm`, is the module's own; embedding
    and head are the model's.

    Args:
        hidden_size: d.
        block: a layer of the model: takes x, rotation, mask and cache.
        eps: of the three norms.
    """

    def __init__(self, *, hidden_size: int, block: nn.Module, eps: float = 1e-6):
        super().__init__()
        self.enorm = RMSNorm(hidden_size=hidden_size, eps=eps)
        self.hnorm = RMSNorm(hidden_size=hidden_size, eps=eps)
        self.eh_proj = nn.Linear(2 * hidden_size, hidden_size, bias=False)
        self.block = block
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(hidden_size=hidden_size, eps=eps)})

    def forward(
        self,
        embedded: Float[Tensor, "b t d"],
        hidden: Float[Tensor, "b t d"],
        rotation: tuple[Tensor, Tensor] | None = None,
        mask: Bool[Tensor, "b 1 t s"] | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "b t d"]:
        """What the head makes the guess of, and what the next depth goes on with.

        Args:
            embedded: of the token after each of the t.
            hidden: of each of the t tokens, from the model (behind its last norm) or the
                depth before.
            rotation: as the block takes it.
            mask: as the block takes it; None is causal.
            cache: of this module's block.

        Raises:
            ValueError: not one hidden state for each embedding.
        """
        if embedded.shape != hidden.shape:
            sizes = f"{tuple(embedded.shape)} for hidden states of {tuple(hidden.shape)}"
            raise ValueError(f"embeddings of {sizes}")
        # The report writes the hidden state first; the files have the embedding first.
        x = self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1))
        return self.shared_head["norm"](self.block(x, rotation, mask, cache))


def predict_depths(
    modules: Iterable[MTPModule],
    embed: Callable[[Tensor], Tensor],
    hidden: Float[Tensor, "b t d"],
    input_ids: Int[Tensor, "b t"],
    rotate: Callable[[int], tuple[Tensor, Tensor] | None],
) -> list[Float[Tensor, "b _ d"]]:
    """For training: depth k (from 1) gives t - k states, of which the i-th is for token i + k + 1.

    Args:
        modules: one for each depth.
        embed: of token ids, the model's.
        hidden: of the t tokens, behind the model's last norm.
        input_ids: the t tokens.
        rotate: the rotation for so many tokens; only differences of positions count.

    Raises:
        ValueError: fewer tokens than depths need.
    """
    outputs = []
    for depth, module in enumerate(modules, start=1):
        if input_ids.shape[1] <= depth:
            raise ValueError(f"{input_ids.shape[1]} tokens for {depth=}")
        embedded = embed(input_ids[:, depth:])  # b t-k d; the token k places on
        hidden = module(embedded, hidden[:, :-1], rotate(embedded.shape[1]))
        outputs.append(hidden)
    return outputs


def multi_token_loss(
    logits: Sequence[Float[Tensor, "b _ v"]], input_ids: Int[Tensor, "b t"]
) -> Float[Tensor, ""]:
    """The mean over depths of each depth's cross-entropy; DeepSeek-V3 adds 0.1 to 0.3 times it.

    The logits of depth k are those of `predict_depths`; the last of them has no target yet. Each
    depth is a mean over its targets, where the report divides by the length of the text.

    Raises:
        ValueError: logits of a depth that aren't for t - k tokens, or none.
    """
    if not logits:
        raise ValueError("no depth to predict")
    losses = []
    for depth, guess in enumerate(logits, start=1):
        target = input_ids[:, depth + 1 :]  # b t-k-1
        if guess.shape[1] != target.shape[1] + 1:
            t = input_ids.shape[1]
            raise ValueError(f"logits for {guess.shape[1]} of {t} tokens at {depth=}")
        losses.append(F.cross_entropy(guess[:, :-1].flatten(0, 1), target.flatten()))
    return torch.stack(losses).mean()


# The module as a drafter


def probabilities(logits: Float[Tensor, " v"], temperature: float) -> Float[Tensor, " v"]:
    """softmax(logits / temperature); at 0 all on the most probable token.

    Raises:
        ValueError: temperature below 0.
    """
    if temperature < 0:
        raise ValueError(f"{temperature=} is below 0")
    if temperature == 0:
        return F.one_hot(logits.argmax(), len(logits)).float()
    return (logits.float() / temperature).softmax(dim=-1)


def accept_or_resample(
    guess: int,
    p: Float[Tensor, " v"],
    q: Float[Tensor, " v"],
    generator: torch.Generator | None = None,
) -> tuple[int, bool]:
    """A token distributed as p, whatever q the guess was drawn from; and whether it's the guess.

    The guess stays with probability min(1, p / q). Else the token is drawn from what p has
    more than q, which is just what makes up for it.
    """
    if torch.rand((), generator=generator) * q[guess] < p[guess]:
        return guess, True
    return int(torch.multinomial((p - q).clamp(min=0), 1, generator=generator)), False


@torch.no_grad()
def generate_with_drafter(
    trunk: Callable[[Tensor, KVCache], Tensor],
    head: Callable[[Tensor], Tensor],
    draft: Callable[[Tensor, Tensor, LayerCache], Tensor],
    cache: KVCache,
    input_ids: Int[Tensor, "1 t"],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Int[Tensor, "1 tn"], list[bool]]:
    """The prompt with what the model writes after it, and which of the guesses stayed.

    Each step reads the last token and a guess for the one behind it in one pass. If the guess
    stays, the pass has given two tokens; if not, one, and the guess leaves the cache again.

    Args:
        trunk: hidden states (behind the last norm) of new tokens, which the cache then keeps.
        head: logits of hidden states.
        draft: logits of the MTP module, of the tokens after some, those tokens' hidden
            states, and its cache.
        cache: an empty one of the model's, whose layers can forget their last token.
        input_ids: one prompt.
        max_new_tokens: how many tokens to write.
        temperature: 0 takes the most probable token: then the text is the one that the
            model writes alone. Above 0 it is drawn from the same distribution.
        generator: the source of randomness.

    Raises:
        ValueError: several prompts (they would keep guesses at different places), an empty
            one, or no token to write.
    """
    if input_ids.shape[0] != 1 or input_ids.shape[1] < 1:
        raise ValueError(f"one prompt at a time, with tokens: {tuple(input_ids.shape)}")
    if max_new_tokens < 1:
        raise ValueError(f"{max_new_tokens=} writes nothing")

    def distribution(logits: Float[Tensor, "1 t v"], place: int = -1) -> Float[Tensor, " v"]:
        return probabilities(logits[0, place], temperature)

    def drawn(p: Float[Tensor, " v"]) -> int:
        return int(torch.multinomial(p, 1, generator=generator))

    draft_cache, kept, end = LayerCache(), [], input_ids.shape[1] + max_new_tokens
    hidden = trunk(input_ids, cache)  # 1 t d
    ids = with_token(input_ids, drawn(distribution(head(hidden[:, -1:]))))
    while ids.shape[1] < end:
        # The drafter reads what is settled: each hidden state with the token after it.
        after = ids[:, ids.shape[1] - hidden.shape[1] :]
        q = distribution(draft(after, hidden, draft_cache))
        guess = drawn(q)
        hidden = trunk(with_token(ids[:, -1:], guess), cache)  # 1 2 d
        logits = head(hidden)
        token, stays = accept_or_resample(guess, distribution(logits, 0), q, generator)
        kept.append(stays)
        ids = with_token(ids, token)
        if stays:
            ids = with_token(ids, drawn(distribution(logits)))
        else:
            hidden = hidden[:, :1]
            for layer in cache.layers:
                layer.length -= 1
    return ids[:, :end], kept


def with_token(ids: Int[Tensor, "1 t"], token: int) -> Int[Tensor, "1 tn"]:
    return torch.cat((ids, ids.new_full((1, 1), token)), dim=1)
