"""Absolute positions: sinusoids (Vaswani et al. 2017, arXiv:1706.03762), and tables.

Both give each position a vector that is added to the token's. Sinusoids are
computed: pairs of sine and cosine, each pair with a frequency of its own. A table
is learned (GPT-2; BERT, Devlin et al. 2018, arXiv:1810.04805), and ends.

Sinusoids come in two layouts and with two sets of frequencies; weights that were
trained with one read noise from another.

Axes: b batch, t token, d hidden size, f frequency (d = 2 f).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


def frequencies(
    *, hidden_size: int, base: float | int = 10000, dtype: torch.dtype = torch.float32
) -> Float[Tensor, " f"]:
    """The paper's: base^(-2i/d) for i = 0 ... f - 1, in radians per position.

    Raises:
        ValueError: hidden_size isn't a positive even number.
    """
    refuse_odd(hidden_size, least=2)
    exponents = torch.arange(0, hidden_size, 2, dtype=dtype) / hidden_size
    return 1.0 / float(base) ** exponents


def stretched_frequencies(
    *, hidden_size: int, base: float | int = 10000, dtype: torch.dtype = torch.float32
) -> Float[Tensor, " f"]:
    """base^(-i/(f-1)): the last one is 1/base, which the paper's don't reach.

    tensor2tensor, the authors' code, has these; Whisper and M2M-100 followed it.

    Raises:
        ValueError: hidden_size isn't even, or has no two pairs to stretch between.
    """
    refuse_odd(hidden_size, least=4)
    steps = hidden_size // 2 - 1
    return 1.0 / float(base) ** (torch.arange(steps + 1, dtype=dtype) / steps)


def sinusoids(
    positions: Int[Tensor, "*b t"],
    omega: Float[Tensor, " f"],
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "*b t d"]:
    """The paper's layout: sin(p ω_i) at feature 2i, cos(p ω_i) at 2i + 1.

    In omega's dtype, but at least float32, unless another is given.
    """
    angles = angles_of(positions, omega)
    waves = torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)
    return waves.to(dtype or angles.dtype)


def sinusoids_in_halves(
    positions: Int[Tensor, "*b t"],
    omega: Float[Tensor, " f"],
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "*b t d"]:
    """All sines, then all cosines: the same numbers in another order."""
    angles = angles_of(positions, omega)
    return torch.cat([angles.sin(), angles.cos()], -1).to(dtype or angles.dtype)


def shift_map(omega: Float[Tensor, " f"], steps: int) -> Float[Tensor, "d d"]:
    """The matrix M with sinusoids(p + steps) = M sinusoids(p) for every p.

    It turns each pair by steps times its frequency, wherever the pair stands.
    """
    angles = angles_of(torch.tensor([steps], device=omega.device), omega)[0]  # f
    cos, sin = angles.cos(), angles.sin()
    rows = torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)
    blocks = torch.stack(rows, -2)
    return torch.block_diag(*blocks)  # f blocks of 2 2


class LearnedPositions(nn.Module):
    """A vector for each position, as a parameter: row p + offset of the table.

    `weight` is `wpe.weight` in GPT-2, `position_embeddings.weight` in BERT. RoBERTa
    and OPT have an offset of 2: position 0 is row 2, and -1, which
    `token_positions` gives to padding, is row 1.
    """

    def __init__(self, *, max_positions: int, hidden_size: int, offset: int = 0):
        super().__init__()
        self.offset = offset
        self.weight = nn.Parameter(torch.empty(max_positions + offset, hidden_size))
        nn.init.normal_(self.weight, std=0.02)  # GPT-2's and BERT's

    def forward(self, positions: Int[Tensor, "*b t"]) -> Float[Tensor, "*b t d"]:
        """The rows of these positions.

        Compiled, the refusal is left out; an index beyond the table is then what the
        compiler makes of it. On a GPU it waits for the positions.

        Raises:
            ValueError: a position has no row.
        """
        rows = positions + self.offset
        unknown = torch.compiler.is_compiling() or rows.is_meta or not rows.numel()
        if not unknown and (rows.min() < 0 or rows.max() >= len(self.weight)):
            asked = f"{positions.min().item()} to {positions.max().item()}"
            known = f"{-self.offset} to {len(self.weight) - self.offset - 1}"
            raise ValueError(f"positions {asked}, the table has {known}")
        return nn.functional.embedding(rows, self.weight)


def token_positions(attention_mask: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """Count tokens, from 0, wherever the padding stands; padding itself gets -1."""
    return attention_mask.cumsum(-1) * attention_mask - 1


def angles_of(
    positions: Int[Tensor, "*b t"], omega: Float[Tensor, " f"]
) -> Float[Tensor, "*b t f"]:
    """p ω_i in float32 or wider: in bfloat16 position 257 is 256."""
    wide = torch.promote_types(omega.dtype, torch.float32)
    return positions[..., None] * omega.to(wide)


def refuse_odd(hidden_size: int, *, least: int) -> None:
    if hidden_size < least or hidden_size % 2:
        raise ValueError(f"features don't pair up: {hidden_size=}, needs an even {least} or more")
