"""Tables on pages: their Markdown, and rows that don't fit."""

import pytest

from snippets.common import table as module
from snippets.common.table import table


@pytest.fixture
def shown(monkeypatch) -> list[str]:
    found = []
    monkeypatch.setattr(module, "display", lambda markdown: found.append(markdown.data))
    return found


def test_rows_are_lines_and_numbers_end_at_the_right(shown):
    table(("model", "layers"), ("`tiny`", 12), ("large", f"{1e6:,.0f}"))
    table(("a", "b", "c"), (1, 2, 3), left=2)
    assert shown == [
        "| model | layers |\n|---|--:|\n| `tiny` | 12 |\n| large | 1,000,000 |",
        "| a | b | c |\n|---|---|--:|\n| 1 | 2 | 3 |",
    ]


def test_rows_that_do_not_fit_are_refused(shown):
    with pytest.raises(ValueError, match=r"rows of \[2, 3\] cells aren't one table"):
        table(("a", "b"), (1, 2, 3))
    with pytest.raises(ValueError, match=r"rows of \[\] cells"):
        table()
    assert not shown
