"""Shows a table on a page: what a cell has computed, in rows."""

from collections.abc import Sequence

from IPython.display import Markdown, display


def table(*rows: Sequence[object], left: int = 1) -> None:
    """Show rows of cells as a table; the first row is its head.

    Args:
        rows: of cells, which may hold Markdown.
        left: so many columns begin at the left; numbers, in the others, end at the right.

    Raises:
        ValueError: rows of different lengths, whose cells would stand below a wrong head.
    """
    if len(lengths := {len(row) for row in rows}) != 1:
        raise ValueError(f"rows of {sorted(lengths)} cells aren't one table")
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    lines.insert(1, "|---" * left + "|--:" * (len(rows[0]) - left) + "|")
    display(Markdown("\n".join(lines)))
