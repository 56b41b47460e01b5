"""The proof helpers refuse what proves nothing."""

from importlib.metadata import PackageNotFoundError, version

import pytest
import torch

from snippets.common.proof import parity, reason, rejects

X = torch.linspace(-1, 1, 12).reshape(3, 4)


def prove(ours=X, theirs=None, without=None, **more):
    theirs = X + 1e-7 if theirs is None else theirs
    without = X * 2 if without is None else without
    parity(ours, theirs, **{"oracle": "torch", "config": {"d": 4}, "without": without} | more)


def test_it_prints_one_line_with_difference_tolerance_and_oracle(capsys):
    prove()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"equal to torch {version('torch')}: largest difference 1.")
    assert "e-07, tolerance 1e-05; without the feature 1.0e+00" in line


@pytest.mark.parametrize("wrong", [X * 1.01, X + 1.1e-5, X.clone().fill_(float("nan"))])
def test_it_raises_beyond_the_tolerance(wrong):
    with pytest.raises(AssertionError, match="not equal to torch: largest difference"):
        prove(ours=wrong, theirs=X)


def test_one_wrong_element_is_enough():
    wrong = X.clone()
    wrong[2, 1] += 2e-5
    with pytest.raises(AssertionError):
        prove(ours=wrong, theirs=X)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"ours": X[:2]}, r"shapes .* \(2, 4\), \(3, 4\), \(3, 4\)"),
        ({"without": X[:1]}, "shapes"),
        ({"ours": X.double()}, "dtypes differ: ours is torch.float64, theirs torch.float32"),
        ({"theirs": X.view(3, 4)}, "share storage"),
        ({"ours": X[:0], "theirs": X[:0].clone(), "without": X[:0]}, "empty"),
        ({"without": X + 5e-4}, "below 100 tolerances"),
        ({"without": X.clone()}, "a module without it would pass too"),
        ({"without": X / 0}, "without holds values that are not finite"),
        ({"theirs": X / 0}, "theirs holds values that are not finite"),
        ({"ours": torch.ones(3, 4), "theirs": torch.ones(3, 4)}, "near-constant outputs"),
    ],
)
def test_it_refuses(arguments, said):
    with pytest.raises(ValueError, match=said):
        prove(**arguments)


def test_the_oracle_must_be_installed():
    with pytest.raises(PackageNotFoundError):
        prove(oracle="no-such-package")


def test_exact_comparison_of_integers():
    ids = torch.tensor([3, 1, 2])
    prove(ours=ids, theirs=ids.clone(), without=ids.flip(0))
    with pytest.raises(AssertionError):
        prove(ours=ids, theirs=ids + 1, without=ids.flip(0))
    with pytest.raises(ValueError, match="would pass too"):
        prove(ours=ids, theirs=ids.clone(), without=ids.clone())


def equals_x(candidate):
    torch.testing.assert_close(candidate, X)


def test_a_planted_mistake_must_fail_the_check(capsys):
    rejects(equals_x, right=X, wrong=X + 0.5, mistake="moved")
    assert capsys.readouterr().out == "caught: moved (greatest absolute difference: 0.5)\n"
    with pytest.raises(AssertionError, match="doesn't see the mistake: nothing"):
        rejects(equals_x, right=X, wrong=X.clone(), mistake="nothing")
    with pytest.raises(AssertionError, match="not close"):
        rejects(equals_x, right=X * 2, wrong=X * 3, mistake="right is wrong")


def test_the_reason_is_the_line_with_the_numbers():
    def said(a, b):
        with pytest.raises(AssertionError) as caught:
            torch.testing.assert_close(torch.tensor(a), torch.tensor(b))
        return reason(caught.value)

    assert said([1.0, 2.0], [1.0, 2.0123456]) == "greatest absolute difference: 0.012"
    assert said([1.0], [3e9]) == "greatest absolute difference: 3000000000.0"
    assert said(1.0, 1.5) == "expected 1.5 but got 1.0"
    assert reason(AssertionError("off by 0.25\nmore")) == "off by 0.25"
    assert reason(AssertionError()) == "assertion failed"
