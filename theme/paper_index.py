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
LEFT, MONTH, STEP, ROW, HEAD, MARGIN = 130, 6.8, 84, 24, 26, 6
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
    x: float  # of the dot
    label: str
    flipped: bool = False  # the label stands before the dot

    @property
    def width(self) -> float:
        """Dot and label; of letters, those in capitals and figures are the wide ones."""
        return 14 + sum(6 if c.islower() or c in " .,'-()" else 8.4 for c in self.label)

    @property
    def left(self) -> float:
        return self.x + MARGIN - self.width if self.flipped else self.x - MARGIN


def columns(papers: list[Shown]) -> dict[int, int]:
    """Where the years before BEGIN stand."""
    years = sorted({shown.paper.year for shown in papers if shown.paper.year < BEGIN})
    return {year: LEFT + number * STEP // 3 for number, year in enumerate(years)}


def marks(papers: list[Shown], early: dict[int, int], begin: float, right: float) -> list[Mark]:
    found = []
    for shown in papers:
        (year, month), name = shown.when, shown.paper.name
        if year in early:
            found.append(Mark(shown, early[year], f"{name} {year}"))
        else:
            mark = Mark(shown, begin + MONTH * (12 * (year - BEGIN) + month - 0.5), name)
            beyond = mark.left + mark.width > right
            found.append(Mark(shown, mark.x, name, flipped=beyond))
    return found


def rows(found: Iterable[Mark]) -> list[list[Mark]]:
    """Marks in as few rows as it takes to have no label on another."""
    packed: list[list[Mark]] = []
    for mark in sorted(found, key=lambda mark: mark.left):
        fits = (row for row in packed if row[-1].left + row[-1].width < mark.left)
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
    lanes, y = [], HEAD
    for topic, group in by_topic(papers).items():
        packed = rows(marks(group, early, begin, right))
        lanes.append(f'<path class="fp-lane" d="M0 {y}H{right:.0f}"/>')
        lanes.append(f'<text class="fp-topic" x="0" y="{y + 20}">{html.escape(topic)}</text>')
        for number, row in enumerate(packed):
            lanes += [drawn(mark, y + 4 + ROW * number) for mark in row]
        y += ROW * len(packed) + 8
    years = []
    for year in range(BEGIN, last + 1):
        x = begin + 12 * MONTH * (year - BEGIN)
        years.append(f'<text class="fp-year" x="{x + 4:.0f}" y="16">{year}</text>')
        years.append(f'<path class="fp-grid" d="M{x:.0f} 0V{y}"/>')
    if early:
        years.append(f'<text class="fp-year" x="{LEFT}" y="16">before {BEGIN}</text>')
    width = f"{right + MARGIN:.0f}"
    return (
        '<div class="fp-timeline" data-search-exclude>'
        f'<svg viewBox="0 0 {width} {y}" width="{width}" height="{y}" role="group" '
        f'aria-label="Timeline of papers">{"".join(years)}{"".join(lanes)}</svg></div>'
    )


def drawn(mark: Mark, top: float) -> str:
    paper, kind = mark.shown.paper, " fp-built" if mark.shown.builds else ""
    about = html.escape(f"{paper.title}, {mark.shown.date}")
    middle, end = top + ROW / 2, ' text-anchor="end"' if mark.flipped else ""
    x = mark.x - 8 if mark.flipped else mark.x + 8
    return (
        f'<a class="fp-mark{kind}" href="#{paper.anchor}"><title>{about}</title>'
        f'<rect x="{mark.left:.0f}" y="{top:.0f}" width="{mark.width:.0f}" height="{ROW}"/>'
        f'<circle cx="{mark.x:.1f}" cy="{middle:.0f}" r="4"/>'
        f'<text x="{x:.1f}" y="{middle + 4:.0f}"{end}>{html.escape(mark.label)}</text></a>'
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
    lines = ['<div class="fp-papers" markdown="1">', ""]
    lines += ["| Date | Paper | Implemented on | Cited on |", "|---|---|---|---|"]
    for shown in sorted(papers, key=lambda s: s.when, reverse=True):
        paper = shown.paper
        built = [f"{to(page, p)}: {p.sections[paper.key]}" for p in shown.builds]
        others = [to(page, p) for p in shown.pages if p not in shown.builds]
        about = f"[{plain(paper.title)}]({paper.url}){{ #{paper.anchor} }}"
        about += f"<br>{plain(paper.authors)}, {plain(paper.where)}"
        cells = [f"{paper.year}-{paper.month:02}" if paper.month else str(paper.year)]
        cells += [about, "<br>".join(built), ", ".join(others)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", "</div>"])


def reading(page: "Citing", papers: list[Shown]) -> str:
    """Pages in the order of the navigation, each with the papers that no page before it has."""
    found, seen, topic = {shown.paper.key: shown.paper for shown in papers}, set(), None
    lines, number = [], 0
    for other in pages_of(papers):
        new = [key for key in other.listed if key in found and key not in seen]
        seen.update(new)
        if not new:
            continue
        if other.topic != topic:
            topic = other.topic
            lines += ["", f"**{topic}**", ""]
        names = ", ".join(f"[{plain(found[key].name)}](#{found[key].anchor})" for key in new)
        number += 1
        lines.append(f"{number}. {to(page, other)}: {names}")
    return "\n".join(lines)
