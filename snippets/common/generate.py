"""Writes text with a language model, token by token, keeping what attention needs again.

Axes: b batch, t prompt token, n new token, v vocabulary.
"""

from collections.abc import Collection, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from snippets.common.onednn import onednn_products


def generate(
    model: nn.Module,
    input_ids: Int[Tensor, "b t"],
    *,
    max_new_tokens: int,
    attention_mask: Int[Tensor, "b t"] | None = None,
    images: Mapping[str, Tensor] | None = None,
    eos_token_id: int | Collection[int] = (),
    pad_token_id: int = 0,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "b tn"]:
    """The prompts with what the model writes after each, at most `max_new_tokens`.

    Meanwhile the model's linear layers multiply as `onednn_products` has them: the same sums
    in another order.

    Args:
        model: has `new_cache()` and `model(input_ids=, attention_mask=, cache=)`.
        input_ids: the prompts; shorter ones padded on the left.
        max_new_tokens: where to stop at the latest.
        attention_mask: 1 for tokens, 0 for padding; all tokens unless given.
        images: what a model that sees gets with the prompts, by the names of its arguments,
            such as `pixel_values`; the cache holds what it made of them.
        eos_token_id: the tokens, one or several, that end a sequence.
        pad_token_id: stands behind a sequence that ended before the others.
        temperature: 0 takes the most probable token, above that samples; see `next_token`.
        top_k: sample from so many most probable tokens only.
        top_p: sample from the fewest tokens that hold this probability together.
        generator: the source of randomness, for repeatable samples.

    Raises:
        ValueError: a prompt without tokens or padded on the right, no room for a new
            token, or a setting out of its range.
    """
    if max_new_tokens < 1:
        raise ValueError(f"{max_new_tokens=} writes nothing")
    if input_ids.shape[1] == 0:
        raise ValueError("an empty prompt: the first token needs one before it")
    if attention_mask is not None and not attention_mask[:, -1].all():
        rows = (attention_mask[:, -1] == 0).nonzero().flatten().tolist()
        raise ValueError(f"prompts end in padding, pad on the left; rows {rows}")
    ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    ends = torch.tensor(ends, dtype=input_ids.dtype, device=input_ids.device)
    running = torch.ones_like(input_ids[:, 0], dtype=torch.bool)  # b
    cache, new, seen = model.new_cache(), input_ids, images or {}
    with torch.inference_mode(), onednn_products(model):
        for _ in range(max_new_tokens):
            given = {"attention_mask": attention_mask, "cache": cache, **seen}
            logits, seen = model(input_ids=new, **given)[:, -1], {}  # b v
            token = next_token(logits, temperature, top_k, top_p, generator)  # b
            new = token.where(running, pad_token_id)[:, None]  # b 1
            input_ids = torch.cat((input_ids, new), dim=1)
            if attention_mask is not None:
                attention_mask = torch.cat((attention_mask, torch.ones_like(new)), dim=1)
            running &= ~torch.isin(new[:, 0], ends)
            if not running.any():
                break
    return input_ids.clone()  # what inference mode made can't be trained on, a copy can


def next_token(
    logits: Float[Tensor, "b v"],
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, " b"]:
    """The most probable token at temperature 0, else one drawn from softmax(logits / temperature).

    top_k keeps the k most probable tokens; top_p then keeps the fewest that together have at
    least this probability (Holtzman et al. 2019, arXiv:1904.09751), always the first.

    Raises:
        ValueError: temperature below 0, top_k below 1, or top_p outside (0, 1].
    """
    if temperature < 0:
        raise ValueError(f"{temperature=} is below 0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"{top_k=} keeps no token")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"{top_p=} isn't a probability above 0")
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]  # b 1
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None and top_p < 1:
        ranked, order = logits.sort(descending=True)
        probabilities = ranked.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # what the more probable ones hold
        ranked = ranked.masked_fill(before >= top_p, -torch.inf)
        logits = torch.empty_like(logits).scatter(-1, order, ranked)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
