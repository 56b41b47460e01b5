"""The picture of prerequisites: an SVG of links, a band for each topic, drawn at build time."""

import html
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

from theme import layered
from theme.lessons import Lesson, direct

WIDTH = 1000
LEFT = 120  # of the topics' names
HEIGHT = 40  # of a box: two lines of text
PITCH = 62  # from row to row
PAD = 12  # of a band, above and below
LETTER, CAPITAL = 6.6, 9.2  # mean widths at 13 px; m and w count as capitals
LINE = 22  # letters
MOST = 6  # boxes in a row
SMALL = 16  # line height of what is no box
NARROW_LETTER = 6.0  # at 12 px


@dataclass
class Band:
    """A topic: its lessons in rows, and what is planned."""

    title: str
    address: str  # of its index; empty where there is none yet
    rows: list[list[str]]
    planned: list[str]


def rows(lessons: list[Lesson]) -> list[list[str]]:
    """A topic's lessons, each below those that it needs; long rows are cut in two."""
    depth: dict[str, int] = {}
    for lesson in lessons:  # in the navigation's order, so that what it needs is known
        depth[lesson.stem] = max((depth[n] + 1 for n in lesson.needs if n in depth), default=0)
    found = []
    for level in sorted(set(depth.values())):
        row = [stem for stem in depth if depth[stem] == level]
        pieces = -(-len(row) // MOST)
        size = -(-len(row) // pieces)
        found += [row[at : at + size] for at in range(0, len(row), size)]
    return found


def draw(bands: list[Band], lessons: dict[str, Lesson], address: Callable[[str], str]) -> str:
    """`address` gives a lesson's from the page that shows the picture."""
    edges = direct(lessons)
    titles = {stem: textwrap.wrap(one.title, LINE)[:2] for stem, one in lessons.items()}
    widths = {stem: max(map(length, lines)) + 50 for stem, lines in titles.items()}
    planned = [
        textwrap.wrap(
            f"Planned: {' · '.join(band.planned)}" if band.planned else "",
            int((WIDTH - LEFT - PAD) / NARROW_LETTER),
        )
        for band in bands
    ]
    across = WIDTH - LEFT - PAD
    spots = layered.place([row for band in bands for row in band.rows], edges, widths, across)

    parts, planned_words, tops, y = [], [], [], 0.0
    for number, (band, lines) in enumerate(zip(bands, planned, strict=True)):
        top, y = y, y + PAD
        for _ in band.rows:
            tops.append(y)
            y += PITCH
        y -= (PITCH - HEIGHT - PAD) * bool(band.rows)
        planned_words += [
            f'<text class="planned on{number % 2}" x="{LEFT}" y="{y + SMALL * at + 12:.0f}">'
            f"{text(line)}</text>"
            for at, line in enumerate(lines)
        ]
        y += SMALL * len(lines) + PAD / 2
        y = max(y, top + SMALL * len(name_lines(band)) + PAD)
        parts.append(
            f'<rect class="band{number % 2}" y="{top:.0f}" width="{WIDTH}" height="{y - top:.0f}"/>'
            f"{name(band, top)}"
        )
    order = {stem: number for number, stem in enumerate(lessons)}
    lines = "".join(
        f'<path data-edge="{order[a]} {order[b]}" d="{layered.line(a, b, spots, tops, HEIGHT)}"/>'
        for a, b in edges
    )
    parts.append(f'<g class="edges" transform="translate({LEFT})">{lines}</g>')
    parts += planned_words  # above the lines
    parts.append(f'<g transform="translate({LEFT})">')
    for (stem, row), spot in spots.items():
        if spot.width:
            box = spot.x - spot.width / 2, tops[row], spot.width
            parts.append(node(lessons[stem], lessons, titles[stem], box, address(stem)))
    parts.append("</g>")
    return (
        f'<svg viewBox="0 0 {WIDTH} {y:.0f}" role="group" aria-label="Lessons and what they need">'
        f"{''.join(parts)}</svg>"
    )


def length(line: str) -> float:
    """About how wide a line of text is, in pixels."""
    wide = sum(letter.isupper() or letter in "mw" for letter in line)
    return wide * CAPITAL + (len(line) - wide) * LETTER


def name(band: Band, top: float) -> str:
    """The topic's, at the left."""
    spans = "".join(
        f'<tspan x="{PAD}" y="{top + 24 + SMALL * n:.0f}">{text(words)}</tspan>'
        for n, words in enumerate(name_lines(band))
    )
    label = f'<text class="topic">{spans}</text>'
    return f'<a href="{band.address}">{label}</a>' if band.address else label


def name_lines(band: Band) -> list[str]:
    return textwrap.wrap(band.title, 13)


def node(
    lesson: Lesson,
    lessons: dict[str, Lesson],
    lines: list[str],
    box: tuple[float, float, float],
    address: str,
) -> str:
    x, y, width = box
    needs = ", ".join(lessons[need].title for need in lesson.needs)
    about = f"{lesson.title}, {lesson.minutes} minutes" + (f"; needs {needs}" if needs else "")
    middle = y + HEIGHT / 2 + 4.5
    first = middle - 8 * (len(lines) - 1)
    words = "".join(
        f'<tspan x="{x + 10:.0f}" y="{first + 16 * n:.0f}">{text(line)}</tspan>'
        for n, line in enumerate(lines)
    )
    right = x + width
    return (
        f'<a href="{address}"><title>{text(about)}</title>'
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{HEIGHT}" rx="5"/>'
        f"<text>{words}</text>"
        f'<text class="minutes" x="{right - 8:.0f}" y="{middle:.0f}">{lesson.minutes}′</text></a>'
    )


def text(words: str) -> str:
    return html.escape(words, quote=False)
