"""What the build knows about pages and says on them: head, foot, cards, tables of pages."""

import html
import platform
import re
import subprocess
import urllib.parse
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from .options import Options
from .pages import Page

if TYPE_CHECKING:
    from .render import Site


@dataclass(frozen=True)
class Origin:
    """Where the project stands and is published; what isn't known is empty."""

    repo_url: str = ""
    site_url: str = ""
    notebook_branch: str = ""
    commit: str = ""
    date: str = ""
    licence: str = ""

    @classmethod
    def of(cls, root: Path, options: Options) -> "Origin":
        git = ["git", "-C", str(root), "log", "-1", "--format=%H %ct"]
        try:
            done = subprocess.run(git, capture_output=True, text=True, check=False)
            commit, _, seconds = done.stdout.strip().partition(" ")
        except OSError:  # there is no git
            commit = seconds = ""
        date = datetime.fromtimestamp(int(seconds), UTC).date().isoformat() if seconds else ""
        licence = root / "LICENSE"
        text = licence.read_text("utf-8") if licence.is_file() else ""
        where = (options.repo_url, options.site_url, options.notebook_branch)
        return cls(*where, commit, date, text)

    @property
    def described(self) -> str:
        return f"commit {self.commit[:10]} of {self.date}" if self.commit else ""

    def page_address(self, stem: str) -> str:
        return self.site_url + re.sub(r"(^|/)index\.html$", r"\1", f"{stem}.html")

    def source_address(self, path: str) -> str:
        """Of a file of the project at this commit; its path where there is no repository."""
        if not self.repo_url or not self.commit:
            return path
        return f"{self.repo_url}/blob/{self.commit}/{path}"


def title(page: Page) -> str:
    return str(page.meta.get("title") or page.stem)


def to(page: Page, stem: str, suffixes: dict[str, str]) -> str:
    """The relative path of another page's source as published."""
    return f"{'../' * page.source.count('/')}{stem}.{suffixes[stem]}"


def head(
    page: Page, entry: dict | None, proofs: list[dict], needed: list[str], links: list[str]
) -> str:
    """Below the title: what the page needs, gives and proves, the time it takes, its parts."""
    about, given = [], []
    if known := [*needed, *page.meta.get("assumes", [])]:
        given.append(f"**You need** {', '.join(known)}.")
    if able := page.meta.get("able"):
        given.append(f"**You will be able to** {'; '.join(able)}.")
    if claims := page.meta.get("proves"):
        about.append(f"**Proves** {'; '.join(claims)}.")
    equal: dict[str, float] = {}
    for proof in proofs:
        if proof["page"] == page.source:
            name = f"{proof['oracle']} {proof['version']}"
            equal[name] = max(equal.get(name, 0.0), proof["difference"])
    if equal:
        compared = ", ".join(f"{name} {within(difference)}" for name, difference in equal.items())
        about.append(f"Equal to {compared}.")
    if entry and not entry["error"]:
        about.append(f"{entry['assertions']} assertions held in this build.")
    links = [f"{page.meta['minutes']} minutes", *links]
    lines = [line for text in given for line in (text, "{ .fp-given }", "")]
    lines += [" ".join(about), "{ .fp-proves }", ""] if about else []
    return block("fp-head", [*lines, " · ".join(links), "{ .fp-links }"])


def within(difference: float) -> str:
    return f"to {difference:.0e}" if difference else "to the bit"


def foot(page: Page, packages: dict[str, str], origin: Origin, links: list[str]) -> str:
    """Below the text: what the page ran on, and where to report what is wrong."""
    versions = [f"Python {platform.python_version()}"]
    versions += [f"{name} {version}" for name, version in packages.items()]
    ran = f"Ran on {', '.join(versions)}"
    lines = [f"{ran}{'; ' if origin.described else ''}{origin.described}.", *links]
    if origin.repo_url:
        body = f"Page: {page.source}\n{ran}\n{origin.described}\n\nWhat is wrong:\n\n"
        query = urllib.parse.urlencode({"title": f"{title(page)}: ", "body": body})
        lines.append(f"[Something wrong here?]({origin.repo_url}/issues/new?{query})")
    return block("fp-foot", [lines[0], "", " · ".join(lines[1:])])


def block(name: str, lines: list[str]) -> str:
    inner = "\n".join(lines)
    return f'\n<div class="{name}" data-search-exclude markdown="1">\n\n{inner}\n\n</div>\n\n'


def with_head_and_foot(text: str, above: str, below: str) -> str:
    """The page's Markdown with its head behind the title and its foot at the end."""
    found = re.search(r"^# .*\n", text, re.MULTILINE)
    at = found.end() if found else 0
    return f"{text[:at]}{above}{text[at:].rstrip()}\n{below}"


def cards(page: Page, shown: list[Page], suffixes: dict[str, str]) -> str:
    """A grid of cards: title, description and time of each page."""
    items = []
    for other in shown:
        minutes = other.meta.get("minutes")
        facts = [f"{minutes} minutes"] if minutes else []
        facts += ["trains on the page"] if other.meta.get("study") else []
        items.append(
            f"-   [**{title(other)}**]({to(page, other.stem, suffixes)})\n\n"
            f"    {other.meta.get('description', '')}\n"
            + (f"\n    {' · '.join(facts)}\n    {{ .fp-minutes }}\n" if facts else "")
        )
    return '<div class="grid cards" markdown="1">\n\n' + "\n".join(items) + "\n</div>"


def topics(page: Page, pages: list[Page], suffixes: dict[str, str]) -> str:
    """A card for each topic: its index page, and the titles of its pages."""
    items = []
    for index in pages:
        topic = index.source.rpartition("/")[0]
        if not topic or index.stem != f"{topic}/index":
            continue
        inside = [p for p in pages if p.stem.startswith(f"{topic}/") and p is not index]
        names = " · ".join(f"[{title(p)}]({to(page, p.stem, suffixes)})" for p in inside)
        items.append(
            f"-   [**{title(index)}**]({to(page, index.stem, suffixes)})\n\n"
            f"    {index.meta.get('description', '')}\n"
            + (f"\n    {names}\n    {{ .fp-minutes }}\n" if names else "")
        )
    return '<div class="grid cards" markdown="1">\n\n' + "\n".join(items) + "\n</div>"


def studies(page: Page, topic: str, site: "Site") -> str:
    """A table of a topic's pages: what they counted of models, key points, what they equal.

    A page that counted several models has a line for each, one that counted none has one too.
    """
    inside = [p for p in site.pages if p.stem.startswith(f"{topic}/") and "key_points" in p.meta]
    sources = [other.source for other in inside]
    counted = [study for study in site.studies if study["page"] in sources]
    columns = list(dict.fromkeys(name for study in counted for name in study["facts"]))
    heads = ["Model", "Year", *(name.capitalize() for name in columns), "Key points", "Equal to"]
    rows = [heads, ["---"] * len(heads)]
    for other in inside:
        link = to(page, other.stem, site.suffixes)
        found = [study for study in counted if study["page"] == other.source]
        for number, study in enumerate(found or [{"study": title(other), "facts": {}}]):
            said = [html.escape(study["facts"].get(name, "")) for name in columns]
            last = [key_points(page, other, site), equal_to(other, site)]
            shown = last if number == 0 else [text and "as above" for text in last]
            year = str(study.get("year") or other.meta.get("year", ""))
            rows.append([f"[{html.escape(study['study'])}]({link})", year, *said, *shown])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def key_points(page: Page, other: Page, site: "Site") -> str:
    """A page's key points; their links start from the folder of all pages."""
    text = html.escape("; ".join(other.meta["key_points"]))

    def link(match: re.Match) -> str:
        return f"]({to(page, match['stem'], site.suffixes)})"

    linked = re.sub(r"\]\((?P<stem>[^)\s]+)\.(md|ipynb)\)", link, text)
    return f'<span class="fp-points">{linked}</span>'


def equal_to(other: Page, site: "Site") -> str:
    found = [proof for proof in site.proofs if proof["page"] == other.source]
    names = sorted({f"{proof['oracle']} {proof['version']}" for proof in found})
    worst = max((proof["difference"] for proof in found), default=0.0)
    return f"{', '.join(names)}, {within(worst)}" if found else ""
