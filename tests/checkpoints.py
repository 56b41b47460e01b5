"""What every model of ours has to do like the reference whose checkpoint folder it reads."""

import json
from pathlib import Path

import torch
from torch.testing import assert_close

from snippets.common.generate import generate


def redraw(model, seed: int = 0):
    """Every parameter and buffer of a reference model drawn anew: no norm is 1, no bias 0."""
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            if weight.is_floating_point():
                # Norms of the form (1 + w) get the same spread around their own centre.
                centre = weight.float().mean().round() if "norm" in name or "ln_" in name else 0.0
                weight.copy_(centre + 0.15 * torch.randn(weight.shape, generator=drawn))
    return model.eval()


def edit(folder: Path, *gone: str, **changes) -> None:
    """Change keys of a folder's config.json, and delete those named."""
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if key not in gone}
    (folder / "config.json").write_text(json.dumps(config))


def prompt(vocab_size: int, b: int, t: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, vocab_size, (b, t), generator=torch.Generator().manual_seed(seed))


def left_padded(b: int, t: int, padding: int) -> torch.Tensor:
    """A mask in which the last sequence lacks its first tokens."""
    mask = torch.ones(b, t, dtype=torch.long)
    mask[-1, :padding] = 0
    return mask


@torch.no_grad()
def same_logits(ours, theirs, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Ours and the reference's are equal on all tokens that aren't padding; returns theirs."""
    if mask is None:
        expected = theirs(ids).logits
        assert_close(ours(input_ids=ids), expected)
        return expected
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = theirs(ids, attention_mask=mask, position_ids=positions).logits
    found = ours(input_ids=ids, attention_mask=mask)
    assert found.isfinite().all()
    assert_close(found[mask.bool()], expected[mask.bool()])
    return expected


@torch.no_grad()
def cached_equals_whole(
    model, ids: torch.Tensor, chunks: list[int], mask: torch.Tensor | None = None
):
    """Chunk by chunk through the cache, to 1e-5; returns the cache."""
    cache, outputs = model.new_cache(), []
    for part in torch.arange(ids.shape[1]).split(chunks):
        seen = None if mask is None else mask[:, : part[-1] + 1]
        outputs.append(model(input_ids=ids[:, part], attention_mask=seen, cache=cache))
    whole = model(input_ids=ids, attention_mask=mask)
    rows = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    assert_close(torch.cat(outputs, 1)[rows], whole[rows], atol=1e-5, rtol=1e-5)
    assert cache.length == ids.shape[1]
    return cache


def same_text(ours, theirs, ids: torch.Tensor, mask: torch.Tensor, new: int = 20) -> None:
    """Greedy generation gives the reference's tokens, and those of the model without a cache."""
    expected = theirs.generate(
        ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0,
        eos_token_id=2,
    )  # fmt: skip
    written = generate(ours, ids, attention_mask=mask, max_new_tokens=new, eos_token_id=2)
    assert torch.equal(written, expected)
    uncached, seen = ids, mask
    running = torch.ones(len(ids), dtype=torch.bool)
    for _ in range(new):
        with torch.no_grad():
            token = ours(input_ids=uncached, attention_mask=seen)[:, -1].argmax(-1)
        token = token.where(running, 0)
        uncached = torch.cat((uncached, token[:, None]), 1)
        seen = torch.cat((seen, torch.ones_like(token)[:, None]), 1)
        running &= token != 2
        if not running.any():
            break
    assert torch.equal(written, uncached)
