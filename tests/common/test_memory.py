"""The count of live bytes, on computations whose memory is known."""

import torch

from snippets.common.memory import LiveBytes, peak_bytes

X = torch.randn(1000)


def test_the_peak_is_what_lives_at_one_time():
    assert peak_bytes(lambda x: x + 1, X) == 4000
    assert peak_bytes(lambda x: (x + 1, x + 2), X) == 8000
    assert peak_bytes(lambda x: (x + 1) + 1, X) == 8000  # the first lives until the second is
    assert peak_bytes(lambda x: [x.sum().item() for _ in range(50)], X) == 4


def test_what_is_dropped_no_longer_counts():
    def one_by_one(x):
        for _ in range(10):
            y = x + 1
            del y

    assert peak_bytes(one_by_one, X) == 4000
    with LiveBytes() as counter:
        y = X + 1
        assert counter.now == counter.peak == 4000
        del y
        assert counter.now == 0 and counter.peak == 4000


def test_views_and_inputs_cost_nothing():
    assert peak_bytes(lambda x: x.view(10, 100).T[2:], X) == 0
    assert peak_bytes(lambda x: (x + 1).view(10, 100)[3:], X) == 4000
    assert peak_bytes(lambda x: x.add_(1), X.clone()) == 0


def test_the_backward_pass_counts():
    x = X.clone().requires_grad_()
    forward = peak_bytes(lambda: x.exp())
    both = peak_bytes(lambda: x.exp().sum().backward())
    assert forward == 4000 < both
