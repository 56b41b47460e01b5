"""The watch sees each part, in order, and names the first that differs."""

import pytest
import torch
from torch import nn

from snippets.common.watch import first_difference, relative_errors, watch


class Two(nn.Module):
    """A part that gives a tuple, then one that doesn't; one that isn't used."""

    def __init__(self, factor: float = 1.0):
        super().__init__()
        self.first, self.second, self.idle = nn.GRU(5, 4), nn.Linear(4, 3), nn.Identity()
        self.factor = factor

    def forward(self, x):
        return self.second(self.first(x)[0] * self.factor)


@pytest.fixture
def pair() -> tuple[Two, Two]:
    right, wrong = Two(), Two(factor=1.5)
    wrong.load_state_dict(right.state_dict())
    return right, wrong


PARTS = {"recurrent": "first", "head": "second"}


def test_parts_stand_in_their_order_and_the_logits_last(pair):
    right, _ = pair
    x = torch.randn(2, 7, 5)
    seen = watch(right, dict(reversed(PARTS.items())), x=x)
    assert list(seen) == ["head", "recurrent", "logits"]
    assert torch.equal(seen["recurrent"], right.first(x)[0])
    assert torch.equal(seen["logits"], right(x)) and torch.equal(seen["head"], seen["logits"])
    assert not seen["logits"].requires_grad
    assert not right.first._forward_hooks and not right.second._forward_hooks


def test_the_first_difference_names_the_part(pair):
    x = torch.randn(2, 7, 5)
    right, wrong = (watch(model, PARTS, x=x) for model in pair)
    assert first_difference(right, right) is None
    assert first_difference(wrong, right) == "head"
    errors = relative_errors(wrong, right)
    by_hand = [
        (wrong["head"][b, t] - right["head"][b, t]).norm() / right["head"][b, t].norm()
        for b in range(2)
        for t in range(7)
    ]
    torch.testing.assert_close(errors[1], torch.stack(by_hand).mean())
    assert errors[0] == 0 and first_difference(wrong, right, tolerance=2.0) is None
    broken = right | {"recurrent": right["recurrent"] * torch.nan}
    assert first_difference(broken, right) == "recurrent"


def test_what_is_absent_or_idle_is_an_error(pair):
    right, _ = pair
    with pytest.raises(ValueError, match="did not run: spare"):
        watch(right, PARTS | {"spare": "idle"}, x=torch.randn(2, 7, 5))
    assert not right.first._forward_hooks
    with pytest.raises(AttributeError, match="nowhere"):
        watch(right, {"x": "nowhere"}, x=torch.randn(2, 7, 5))
    with pytest.raises(RuntimeError):
        watch(right, PARTS, x=torch.randn(2, 7, 6))
    assert not right.first._forward_hooks
