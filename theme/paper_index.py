"""Reference > Papers: a timeline, a table and a reading list of all papers that pages cite.

A page asks for them by `<!-- papers: timeline -->`, `table` and `reading`.
"""

import html
import posixpath
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from theme.papers import Citing, Paper

ASKED = re.compile(r"^<!-- papers: (?P<what>timeline|table|reading) -->$", re.MULTILINE)
MONTHS = "January February March April May June July August September October November December"

# The picture, in its own units, which are pixels where there is room for it.
LEFT, MONTH, STEP, ROW, HEAD = 130, 7.2, 84, 24, 26
CHARACTER = 6.3  # width of a letter, at most on average
BEGIN = 2016  # from here on by month; what is older stands before, one column a year


def plain(text: str) -> str:
    """Text that Markdown leaves as it is."""
    return re.sub(r"([\\*_`\[\]<|])", r"\\\1", text)


def section(text: str) -> str:
    """As pages name it: `2.1, the mean of a group` is a section, `algorithm 1` isn't."""
    return f"section {text}" if text[:1].isdigit() else text


@dataclass(frozen=True)
class Shown:
    paper: "Paper"
    pages: list["Citing"]  # those that cite it
    builds: list["Citing"]  # those that build a section of it
    topic: str

    @property
    def when(self) -> tuple[int, int]:
        return self.paper.year, self.paper.month or 6

    @property
    def date(self) -> str:
        month = MONTHS.split()[self.paper.month - 1] + " " if self.paper.month else ""
        return f"{month}{self.paper.year}"


def filled(markdown: str, page: "Citing", papers: list[Shown]) -> str:
    """The page with what it asks for."""

    def show(match: re.Match) -> str:
        if match["what"] == "timeline":
            return timeline(papers) + "\n\n" + listed(papers)
        return table(page, papers) if match["what"] == "table" else reading(page, papers)

    return ASKED.sub(show, markdown)


def by_topic(papers: list[Shown]) -> dict[str, list[Shown]]:
    """In the order of the navigation, and by date within a topic."""
    topics = dict.fromkeys(page.topic for page in pages_of(papers))
    groups = {topic: [shown for shown in papers if shown.topic == topic] for topic in topics}
    return {topic: sorted(g, key=lambda s: s.when) for topic, g in groups.items() if g}


def pages_of(papers: list[Shown]) -> list["Citing"]:
    """All pages that cite, in the order of the navigation."""
    found = {page.source: page for shown in papers for page in shown.pages}
    return sorted(found.values(), key=lambda page: page.place)


# The picture


@dataclass(frozen=True)
class Mark:
    shown: Shown
    x: float
    label: str

    @property
    def width(self) -> float:
        return 12 + CHARACTER * len(self.label)


def columns(papers: list[Shown]) -> dict[int, int]:
    """Where the years before BEGIN stand."""
    years = sorted({shown.paper.year for shown in papers if shown.paper.year < BEGIN})
    return {year: LEFT + number * STEP // 3 for number, year in enumerate(years)}


def marks(papers: list[Shown], early: dict[int, int], begin: float) -> list[Mark]:
    found = []
    for shown in papers:
        year, month = shown.when
        if year in early:
            found.append(Mark(shown, early[year], f"{shown.paper.name} {year}"))
        else:
            found.append(
                Mark(shown, begin + MONTH * (12 * (year - BEGIN) + month - 0.5), shown.paper.name)
            )
    return found


def rows(found: Iterable[Mark]) -> list[list[Mark]]:
    """Marks in as few rows as it takes to have no label on another."""
    packed: list[list[Mark]] = []
    for mark in sorted(found, key=lambda mark: mark.x):
        fits = (row for row in packed if row[-1].x + row[-1].width < mark.x - 4)
        row = next(fits, None)
        if row is None:
            packed.append([mark])
        else:
            row.append(mark)
    return packed


def timeline(papers: list[Shown]) -> str:
    early = columns(papers)
    begin = LEFT + (len(early) + 3) * STEP // 3
    last = max(shown.when[0] for shown in papers)
    right = begin + 12 * MONTH * (last + 1 - BEGIN)
    lanes, y, width = [], HEAD, right
    for topic, group in by_topic(papers).items():
        packed = rows(marks(group, early, begin))
        height = ROW * len(packed) + 8
        lanes.append(f'<path class="fp-lane" d="M0 {y}H{right:.0f}"/>')
        lanes.append(f'<text class="fp-topic" x="0" y="{y + 20}">{html.escape(topic)}</text>')
        for number, row in enumerate(packed):
            lanes += [drawn(mark, y + 4 + ROW * number) for mark in row]
            width = max(width, row[-1].x + row[-1].width)
        y += height
    years = [
        f'<text class="fp-year" x="{begin + 12 * MONTH * (year - BEGIN) + 4:.0f}" y="16">{year}</text>'
        f'<path class="fp-grid" d="M{begin + 12 * MONTH * (year - BEGIN):.0f} 0V{y}"/>'
        for year in range(BEGIN, last + 1)
    ]
    if early:
        years.append(f'<text class="fp-year" x="{LEFT}" y="16">before {BEGIN}</text>')
    return (
        f'<div class="fp-timeline" data-search-exclude>'
        f'<svg viewBox="0 0 {width:.0f} {y}" width="{width:.0f}" height="{y}" role="group" '
        f'aria-label="Timeline of papers">{"".join(years)}{"".join(lanes)}</svg></div>'
    )


def drawn(mark: Mark, top: float) -> str:
    paper, kind = mark.shown.paper, " fp-built" if mark.shown.builds else ""
    about = html.escape(f"{paper.title}, {mark.shown.date}")
    return (
        f'<a class="fp-mark{kind}" href="#{paper.anchor}"><title>{about}</title>'
        f'<rect x="{mark.x - 6:.0f}" y="{top:.0f}" width="{mark.width:.0f}" height="{ROW}"/>'
        f'<circle cx="{mark.x:.1f}" cy="{top + ROW / 2:.0f}" r="4"/>'
        f'<text x="{mark.x + 8:.1f}" y="{top + ROW / 2 + 4:.0f}">{html.escape(mark.label)}</text></a>'
    )


def listed(papers: list[Shown]) -> str:
    """The same for a narrow screen, where a picture of that size can't be read."""
    parts = ['<div class="fp-timeline-list" data-search-exclude markdown="1">\n']
    for topic, group in by_topic(papers).items():
        parts.append(f"**{topic}**\n")
        parts += [f"- {s.date}: [{plain(s.paper.name)}](#{s.paper.anchor})" for s in group]
        parts.append("")
    return "\n".join([*parts, "</div>"])


# The lists


def to(page: "Citing", other: "Citing") -> str:
    path = posixpath.relpath(other.source, posixpath.dirname(page.source))
    return f"[{other.title}]({path})"


def table(page: "Citing", papers: list[Shown]) -> str:
    """Newest first."""
    lines = ["| Date | Paper | Implemented on | Cited on |", "|---|---|---|---|"]
    for shown in sorted(papers, key=lambda s: s.when, reverse=True):
        paper = shown.paper
        built = [f"{to(page, p)}: {p.sections[paper.key]}" for p in shown.builds]
        others = [to(page, p) for p in shown.pages if p not in shown.builds]
        about = f"[{plain(paper.title)}]({paper.url}){{ #{paper.anchor} }}"
        about += f"<br>{plain(paper.authors)}, {plain(paper.where)}"
        cells = [f"{paper.year}-{paper.month:02}" if paper.month else str(paper.year)]
        cells += [about, "<br>".join(built), ", ".join(others)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def reading(page: "Citing", papers: list[Shown]) -> str:
    """Pages in the order of the navigation, each with the papers that no page before it has."""
    found, seen, topic = {shown.paper.key: shown.paper for shown in papers}, set(), None
    lines = []
    for other in pages_of(papers):
        new = [key for key in other.listed if key in found and key not in seen]
        seen.update(new)
        if not new:
            continue
        if other.topic != topic:
            topic = other.topic
            lines += ["", f"**{topic}**", ""]
        names = ", ".join(f"[{plain(found[key].name)}](#{found[key].anchor})" for key in new)
        lines.append(f"1. {to(page, other)}: {names}")
    return "\n".join(lines)
