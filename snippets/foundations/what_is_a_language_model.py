"""A language model that counts, and measures of any language model.

n-grams: Shannon 1948, A Mathematical Theory of Communication. Adding to the counts: Lidstone 1920;
compared with better ways by Chen and Goodman 1996, arXiv:cmp-lg/9606011. Bits per character,
or per byte, as in Gao et al. 2020, arXiv:2101.00027.

Axes: n token of a text, b context, c token in a context, v vocabulary.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


class NGramModel:
    """Guesses the next token from the `order - 1` before it, by what followed them in a text.

    P(token | context) = (count(context, token) + smoothing) / (count(context) + smoothing * v).
    A context that the text never had says nothing: all tokens are equally probable.

    Args:
        order: length of the n-grams; 1 ignores the context, 2 is a bigram model.
        vocab_size: how many different tokens there are.
        smoothing: what is added to each count. At 0, tokens that never followed get
            probability 0.

    Raises:
        ValueError: order below 1, or smoothing below 0.
    """

    def __init__(self, *, order: int, vocab_size: int, smoothing: float = 0.0):
        if order < 1 or smoothing < 0:
            raise ValueError(f"{order=} is below 1 or {smoothing=} below 0")
        self.order, self.vocab_size, self.smoothing = order, vocab_size, smoothing
        # Of v ** (order - 1) possible contexts a text has few. Only those get a row of counts,
        # and all others share the last one, which stays empty.
        self.row: dict[tuple[int, ...], int] = {}
        self.counts = torch.zeros(1, vocab_size, dtype=torch.int64)

    def fit(self, tokens: Int[Tensor, " n"]) -> "NGramModel":
        """Count what follows what in a text, instead of what was counted before.

        Raises:
            ValueError: a token outside 0 … vocab_size - 1, or a text shorter than `order`.
        """
        contexts, following = windows(tokens, self.order)
        if not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            raise ValueError(f"tokens outside 0 … {self.vocab_size - 1}")
        self.row = {}
        rows = [self.row.setdefault(tuple(c), len(self.row)) for c in contexts.tolist()]
        self.counts = torch.zeros(len(self.row) + 1, self.vocab_size, dtype=torch.int64)
        # Not `counts[rows, following] += 1`, which counts a repeated pair once.
        at = torch.tensor(rows), following
        self.counts.index_put_(at, torch.tensor(1), accumulate=True)
        return self

    def __call__(self, contexts: Int[Tensor, "b c"]) -> Float[Tensor, "b v"]:
        """Log-probabilities of the next token, after contexts of `order - 1` tokens.

        Raises:
            ValueError: contexts of another length.
        """
        if contexts.shape[1] != self.order - 1:
            raise ValueError(f"contexts of {contexts.shape[1]} tokens for order {self.order}")
        counts = self.counts[self.rows(contexts)].double()  # b v
        total = counts.sum(-1, keepdim=True)  # b 1
        probabilities = (counts + self.smoothing) / (total + self.smoothing * self.vocab_size)
        # Without smoothing an empty row is 0 / 0; with ever less of it, it stays at 1 / v.
        return probabilities.where(total > 0, 1 / self.vocab_size).log().float()

    def rows(self, contexts: Int[Tensor, "b c"]) -> Int[Tensor, " b"]:
        """The row of `counts` for each context."""
        unknown = len(self.row)
        return torch.tensor([self.row.get(tuple(c), unknown) for c in contexts.tolist()])


def windows(tokens: Int[Tensor, " n"], order: int) -> tuple[Int[Tensor, "b c"], Int[Tensor, " b"]]:
    """All contexts of `order - 1` tokens in a text, and the token that follows each.

    Raises:
        ValueError: the text is shorter than `order`.
    """
    if len(tokens) < order:
        raise ValueError(f"a text of {len(tokens)} tokens has no window of {order}")
    window = tokens.unfold(0, order, 1)  # b c+1
    return window[:, :-1], window[:, -1]


def surprisal(logits: Float[Tensor, "*b v"], tokens: Int[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """-log P(token), in nats, for each token that really came next.

    Args:
        logits: log-probabilities, or log-probabilities up to a constant a row.
        tokens: what came, one for each row.
    """
    logits = logits.float()  # in bfloat16 the sum over a vocabulary loses its tail
    return logits.logsumexp(-1) - logits.gather(-1, tokens[..., None])[..., 0]


def perplexity(logits: Float[Tensor, "*b v"], tokens: Int[Tensor, "*b"]) -> Float[Tensor, ""]:
    """exp of the mean surprisal: as unsure as between so many equally probable tokens."""
    return surprisal(logits, tokens).mean().exp()


def bits_per_character(
    logits: Float[Tensor, "*b v"], tokens: Int[Tensor, "*b"], characters: int
) -> Float[Tensor, ""]:
    """Summed surprisal in bits, divided by the length of the text that the tokens spell."""
    return surprisal(logits, tokens).sum() / math.log(2) / characters
