"""What counts as an assertion, and what could never fail."""

import ast
import builtins

import pytest

from site_build.assertions import AssertionCounter


def counted(*cells: str) -> int:
    seen = set()
    counter = AssertionCounter(lambda: number)
    builtins.__asserted__ = lambda *place: seen.add(place)
    names = {"compute": lambda: 3, "assert_close": lambda a, b: None}
    try:
        for number, cell in enumerate(cells, start=1):  # noqa: B007
            tree = counter.visit(ast.parse(cell))
            exec(compile(tree, "cell", "exec"), names)
    finally:
        del builtins.__asserted__
    return len(seen)


@pytest.mark.filterwarnings("ignore:assertion is always true")
@pytest.mark.parametrize(
    "cell",
    [
        "assert True",
        "assert 1 == 1",
        "assert 'text'",
        "assert (compute() == 4, 'a pair is never empty')",
        "assert [compute()]",
        "assert compute() or True",
        "assert compute() == compute()",
        "assert not False",
        "assert lambda: False",
        "assert f'{compute()}!'",
        "assert len('abc') == 3",
        "n = 3\nassert n == 3",
        "n: int = 3\nm = k = n + 1\nassert n + m == k + 3",
        "if compute() == 4:\n    assert compute() == 3",
        "def unused():\n    assert compute()",
        "assert_close(1, 1)",
        "assert_close(compute(), compute())",
        "compute()",
    ],
)
def test_counts_for_nothing(cell):
    assert counted(cell) == 0


@pytest.mark.parametrize(
    "cell",
    [
        "assert compute() == 3",
        "assert compute()",
        "n = 3\nassert compute() == n",
        "n = compute()\nassert n == 3",
        "ok = False\nok = compute() == 3\nassert ok",
        "def check(n):\n    assert n == 3\ncheck(3)\ncheck(3)",
        "for n in range(3):\n    assert n < 3",
        "assert_close(compute(), 3)",
        "assert (x := compute()) == 3",
    ],
)
def test_counts_once(cell):
    assert counted(cell) == 1


def test_literals_are_remembered_from_cell_to_cell():
    assert counted("n = 3", "assert n == 3") == 0
    assert counted("n = 3", "n = compute()", "assert n == 3") == 1
    assert counted("assert compute()", "assert compute() and compute() > 2") == 2
