"""Training against transformers' GPT-2 and torch.optim, step by step; the rest by brute force."""

import dataclasses
import math

import pytest
import torch
import transformers
from torch import nn
from torch.testing import assert_close
from transformers import GPT2LMHeadModel, get_cosine_with_min_lr_schedule_with_warmup

from snippets.common.generate import generate
from snippets.models import mini_gpt
from snippets.models.gpt2 import GPT2, GPT2Config
from snippets.models.mini_gpt import (
    Plan,
    Trainer,
    clip_gradients,
    decay_groups,
    first_weights,
    next_token_loss,
    random_batch,
    text_loss,
    write,
)
from tests.checkpoints import redraw

V, T = 37, 8
SIZES = {"vocab_size": V, "n_positions": T, "n_embd": 24, "n_layer": 3, "n_head": 4}

DROPOUT = {"attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0}


def pair(dtype=torch.float32, **changes):
    """The reference with all weights redrawn, dropout off, and ours with the same weights."""
    config = transformers.GPT2Config(**SIZES, **changes, bos_token_id=1, eos_token_id=2, **DROPOUT)
    theirs = redraw(GPT2LMHeadModel(config)).to(dtype)
    ours = GPT2(GPT2Config(**SIZES, **changes)).to(dtype)
    tied = ours.config.tie_word_embeddings
    state = {n: p for n, p in theirs.state_dict().items() if not (tied and n == "lm_head.weight")}
    ours.load_state_dict(state)
    return ours, theirs


def text(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(V, (n,), generator=torch.Generator().manual_seed(seed))


def dice(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same_parameters(ours, theirs, **tolerance) -> None:
    mine, yours = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert mine.keys() == yours.keys()
    for name, p in mine.items():
        assert_close(p, yours[name], **tolerance, msg=lambda m, name=name: f"{name}: {m}")


def spread(p: torch.Tensor) -> float:
    return p.std().item()


# First weights


def test_first_weights_are_spread_as_those_of_transformers():
    sizes = {"vocab_size": 400, "n_positions": 90, "n_embd": 96, "n_layer": 3, "n_head": 4}
    theirs = GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    ours = redraw(GPT2(GPT2Config(**sizes)))
    first_weights(ours, num_layers=3)
    yours = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        if p.ndim == 1:
            assert torch.equal(p, yours[name]), name
        else:
            assert abs(p.mean().item()) < 1e-3, name
            assert spread(p) == pytest.approx(spread(yours[name]), rel=0.05), name
    block = ours.transformer.h[1]
    assert spread(block.attn.c_proj.weight) == pytest.approx(0.02 / 6**0.5, rel=0.05)
    first_weights(ours, num_layers=3, std=0.1)
    assert spread(ours.transformer.wte.weight) == pytest.approx(0.1, rel=0.05)
    assert spread(block.mlp.c_proj.weight) == pytest.approx(0.1 / 6**0.5, rel=0.05)


def test_the_first_loss_is_ln_v():
    ours = GPT2(GPT2Config(**SIZES))
    inputs, targets = random_batch(text(300), batch_size=16, context=T, generator=dice())
    assert next_token_loss(ours, inputs, targets) > 2 * math.log(V)  # nn.Embedding's own draw
    first_weights(ours, num_layers=3)
    assert abs(next_token_loss(ours, inputs, targets) - math.log(V)) < 0.05


# Batches


def test_targets_are_the_inputs_moved_on_by_one():
    tokens = torch.arange(50, 80)
    inputs, targets = random_batch(tokens, batch_size=5, context=7, generator=dice())
    assert inputs.shape == targets.shape == (5, 7)
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs - inputs[:, :1], torch.arange(7).expand(5, 7))
    again, _ = random_batch(tokens, batch_size=5, context=7, generator=dice())
    other, _ = random_batch(tokens, batch_size=5, context=7, generator=dice(1))
    assert torch.equal(again, inputs) and not torch.equal(other, inputs)


def test_every_window_is_drawn_about_equally_often():
    inputs, targets = random_batch(torch.arange(12), batch_size=8000, context=4, generator=dice())
    counts = torch.bincount(inputs[:, 0])
    assert len(counts) == 8 and targets.max() == 11  # starts 0 … 7
    assert counts.min() > 850 and counts.max() < 1150


@pytest.mark.parametrize("n, context", [(7, 7), (3, 7), (9, 0)])
def test_a_text_without_a_window_is_refused(n, context, unchecked):
    with pytest.raises(ValueError, match=rf"{n} tokens don't fit context={context} and a target"):
        random_batch(text(n), batch_size=2, context=context, generator=dice())


def test_the_shortest_text_has_one_window():
    inputs, targets = random_batch(torch.arange(8), batch_size=3, context=7, generator=dice())
    assert torch.equal(inputs, torch.arange(7).expand(3, 7))
    assert torch.equal(targets, inputs + 1)


def test_a_window_of_one_token():
    inputs, targets = random_batch(text(9), batch_size=2, context=1, generator=dice())
    assert inputs.shape == targets.shape == (2, 1)
    ours, _ = pair()
    with torch.no_grad():
        expected = next_token_loss(ours, text(9)[:-1, None], text(9)[1:, None])
    assert text_loss(ours, text(9), context=1) == pytest.approx(expected.item(), rel=1e-5)
    last = write(ours, text(1)[None], new=3, context=1, temperature=0.0)[0]
    assert torch.equal(last[1:], ours(last[:-1, None])[:, -1].argmax(-1))


# Loss


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}], ids=["tied", "untied"])
def test_loss_and_gradients_equal_transformers(changes):
    ours, theirs = pair(torch.float64, **changes)
    window = text(4 * (T + 1)).view(4, T + 1)
    reference = theirs(window[:, :-1]).logits
    expected = nn.functional.cross_entropy(reference.flatten(0, 1), window[:, 1:].flatten())
    loss = next_token_loss(ours, window[:, :-1], window[:, 1:])
    assert_close(loss, expected, rtol=0, atol=1e-10)
    # transformers moves the labels itself, so it gets inputs for labels; it widens to float32.
    moved = theirs(window[:, :-1], labels=window[:, :-1]).loss
    same = next_token_loss(ours, window[:, :-2], window[:, 1:-1])
    assert_close(same.float(), moved)
    loss.backward()
    expected.backward()
    gradients = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        assert_close(p.grad, gradients[name].grad, rtol=0, atol=1e-10)
        assert p.grad.abs().max() > 1e-4 or name.endswith("c_attn.bias")


def test_targets_of_another_shape_are_refused(unchecked):
    ours, _ = pair()
    with pytest.raises(ValueError, match=r"labels \(1, 4\) for logits \(1, 5, 37\)"):
        next_token_loss(ours, text(5)[None], text(4)[None])


def test_bfloat16_loss_is_summed_in_float32():
    ours, _ = pair()
    inputs, targets = random_batch(text(90), batch_size=4, context=T, generator=dice())
    expected = next_token_loss(ours, inputs, targets)
    loss = next_token_loss(ours.bfloat16(), inputs, targets)
    assert loss.dtype == torch.float32
    assert_close(loss, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("n", [2, T, T + 1, 2 * T + 1, 3 * T + 4])
@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_text_loss_guesses_each_token_once(n, batch_size):
    ours, _ = pair()
    tokens = text(n)
    total = 0.0
    with torch.no_grad():
        for i in range(1, n):
            start = (i - 1) // T * T  # of the window that token i - 1 is in
            total -= ours(tokens[None, start:i])[0, -1].log_softmax(-1)[tokens[i]].item()
    assert text_loss(ours, tokens, context=T, batch_size=batch_size) == pytest.approx(
        total / (n - 1), rel=1e-5
    )


def test_text_loss_reads_64_windows_at_once():
    sizes = []

    class Counts(nn.Module):
        def forward(self, input_ids):
            sizes.append(tuple(input_ids.shape))
            return torch.zeros(*input_ids.shape, V)

    assert text_loss(Counts(), text(2 * 70 + 2), context=2) == pytest.approx(math.log(V))
    assert sizes == [(64, 2), (6, 2), (1, 1)]


@pytest.mark.parametrize("n, context", [(1, 4), (0, 4), (5, 0)])
def test_nothing_to_guess_is_refused(n, context, unchecked):
    with pytest.raises(ValueError, match=rf"nothing to guess: {n} tokens, context={context}"):
        text_loss(nn.Identity(), text(n), context=context)


# Groups, clipping, the step


def test_matrices_decay_and_vectors_do_not():
    ours = GPT2(GPT2Config(**SIZES))
    names = {id(p): name for name, p in ours.named_parameters()}
    decayed, others = ([names[id(p)] for p in group] for group in decay_groups(ours))
    assert sorted(decayed + others) == sorted(names.values())
    ends = {name.split(".")[-2] + "." + name.split(".")[-1] for name in decayed}
    assert ends == {
        "wte.weight", "wpe.weight", "c_attn.weight", "c_proj.weight", "c_fc.weight"
    }  # fmt: skip
    assert all(name.endswith("bias") or "ln_" in name for name in others)
    assert len(others) == 3 * 8 + 2


@pytest.mark.parametrize("limit", [0.5, 1.0, 1e3])
def test_clipping_equals_torch(limit):
    ours = [nn.Parameter(torch.zeros(s)) for s in [(3, 4), (7,), (2,)]]
    theirs = [nn.Parameter(torch.zeros(s)) for s in [(3, 4), (7,), (2,)]]
    for p, q in zip(ours[:2], theirs[:2], strict=True):  # the third has none
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    length = clip_gradients(iter(ours), limit)
    assert_close(length, nn.utils.clip_grad_norm_(theirs, limit))
    for p, q in zip(ours[:2], theirs[:2], strict=True):
        assert_close(p.grad, q.grad)
    assert ours[2].grad is None


def test_clipping_gradients_of_zero_leaves_zero():
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.zeros(3)
    assert clip_gradients([p], 0.1) == 0 and torch.equal(p.grad, torch.zeros(3))


# By default, and with everything changed; the limit cuts each of the steps, or none.
PLANS = [
    Plan(steps=9, warmup_steps=3),
    Plan(steps=9, warmup_steps=2, lr=0.02, final=0.4, weight_decay=0.7, betas=(0.7, 0.8)),
    Plan(steps=9, warmup_steps=0, lr=1e-3, limit=0.3),
    Plan(steps=9, warmup_steps=0, limit=100.0),
]


@pytest.mark.parametrize("plan", PLANS)
def test_steps_equal_torch_on_transformers_model(plan):
    ours, theirs = pair(torch.float64)
    named = list(theirs.named_parameters())
    vector = [p for n, p in named if n.endswith("bias") or "ln_" in n]
    matrix = [p for n, p in named if not (n.endswith("bias") or "ln_" in n)]
    groups = [
        {"params": matrix, "weight_decay": plan.weight_decay},
        {"params": vector, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=plan.lr, betas=plan.betas)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, plan.warmup_steps, plan.steps, min_lr_rate=plan.final
    )
    trainer, drawn = Trainer(ours, plan), dice()
    for number in range(plan.steps):
        inputs, targets = random_batch(text(200), batch_size=3, context=T, generator=drawn)
        logits = theirs(inputs).logits
        expected = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        expected.backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), plan.limit)
        assert trainer.steps == number
        assert trainer.rate() == pytest.approx(schedule.get_last_lr()[0], rel=1e-12, abs=1e-15)
        optimizer.step()
        schedule.step()
        loss = trainer.step(inputs, targets)
        assert loss == pytest.approx(expected.item(), abs=1e-10)
        same_parameters(ours, theirs, rtol=0, atol=1e-9)


def test_the_defaults_of_a_plan():
    assert Plan(steps=101) == Plan(
        steps=101, lr=4e-3, warmup_steps=100, final=0.1, weight_decay=0.1, betas=(0.9, 0.95),
        limit=1.0,
    )  # fmt: skip


def test_a_plan_is_not_changed_on_the_way():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Plan(steps=101).lr = 1.0


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"steps": 3, "warmup_steps": 3}, r"no room: self.warmup_steps=3, self.steps=3"),
        ({"steps": 3, "warmup_steps": -1}, r"no room: self.warmup_steps=-1, self.steps=3"),
        ({"steps": 200, "lr": 0.0}, r"must be positive: self.lr=0.0, self.limit=1.0"),
        ({"steps": 200, "limit": 0.0}, r"must be positive: self.lr=0.004, self.limit=0.0"),
        ({"steps": 200, "lr": math.nan}, r"must be positive: self.lr=nan"),
    ],
)
def test_a_plan_that_cannot_be_followed_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        Plan(**changes)


def test_a_loss_that_is_not_finite_stops_before_the_weights_change():
    ours, _ = pair()
    trainer = Trainer(ours, Plan(steps=9, warmup_steps=0))
    inputs, targets = random_batch(text(200), batch_size=3, context=T, generator=dice())
    trainer.step(inputs, targets)
    before = {name: p.clone() for name, p in ours.state_dict().items()}
    ours.transformer.ln_f.weight.data.fill_(math.inf)
    before["transformer.ln_f.weight"].fill_(math.inf)
    with pytest.raises(FloatingPointError, match=r"loss nan at step 1"):
        trainer.step(inputs, targets)
    assert all(torch.equal(p, before[name]) for name, p in ours.state_dict().items())
    assert trainer.steps == 1


def test_one_batch_is_learnt_by_heart():
    torch.manual_seed(0)
    ours = GPT2(GPT2Config(**SIZES))
    first_weights(ours, num_layers=3)
    trainer = Trainer(ours, Plan(steps=200, warmup_steps=20, lr=1e-2, weight_decay=0.0))
    inputs, targets = random_batch(text(200), batch_size=2, context=T, generator=dice())
    losses = [trainer.step(inputs, targets) for _ in range(200)]
    assert losses[0] == pytest.approx(math.log(V), abs=0.1) and losses[-1] < 0.02


# Writing


def test_it_writes_what_generate_writes_while_positions_last():
    ours, _ = pair()
    start = text(60).view(20, 3)
    greedy = write(ours, start, new=5, context=T, temperature=0.0)
    assert torch.equal(greedy, generate(ours, start, max_new_tokens=5))
    drawn = write(ours, start, new=5, context=T, generator=dice())
    expected = generate(ours, start, max_new_tokens=5, temperature=1.0, generator=dice())
    assert torch.equal(drawn, expected) and not torch.equal(drawn, greedy)


def test_beyond_the_positions_it_looks_back_one_window():
    ours, _ = pair()
    tokens = text(22).view(2, 11)  # longer than the table from the start
    found = write(ours, tokens, new=7, context=5, temperature=0.0)
    assert found.shape == (2, 18) and not found.requires_grad
    for at in range(11, 18):
        assert torch.equal(found[:, at], ours(found[:, at - 5 : at])[:, -1].argmax(-1))


@pytest.mark.parametrize("context, t", [(0, 3), (4, 0)])
def test_nothing_to_look_back_at_is_refused(context, t, unchecked):
    said = rf"nothing to look back at: context={context}, {t} tokens"
    with pytest.raises(ValueError, match=said):
        write(nn.Identity(), text(2 * t).view(2, t), new=1, context=context)


def test_nothing_is_differentiated_outside_the_step():
    ours, _ = pair()
    assert isinstance(text_loss(ours, text(20), context=T), float)
    first_weights(ours, num_layers=3)
    assert all(p.grad is None and p.requires_grad for p in ours.parameters())
    assert mini_gpt.clip_gradients.__wrapped__  # under no_grad: it changes leaves' gradients
