"""MkDocs hook: what belongs together. Related pages and a tick on each lesson, and the roadmap.

The metadata that this rests on is checked before a page runs. On the roadmap's page stand
comments that become what is computed: `<!-- road: path NAME -->` (the page's metadata gives its
goals and what is known), `picture`, `list`, `planned`, `data`.
"""

import html
import json
import re
from pathlib import Path

import click
import yaml
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority, get_plugin_logger
from mkdocs.utils import get_relative_url

from site_build.options import stems
from site_build.pages import SourceError, read_page
from theme import lessons as graph
from theme import picture
from theme.lessons import Lesson

log = get_plugin_logger("roadmap")
PLANNED = Path(__file__).with_name("planned.yml")
ROAD = re.compile(r"^<!-- road: *(?P<what>\S+) *(?P<name>\S*) *-->$", re.MULTILINE)
FOOT = '<div class="fp-foot"'

lessons: dict[str, Lesson] = {}
topics: dict[str, str] = {}  # those with an index: topic and its title
planned: dict[str, dict] = {}


@event_priority(100)  # while the configuration names the sources, and before pages run
def on_config(config):
    folder, order = Path(config.docs_dir), stems(config.nav)
    found, faults = graph.read(folder, order)
    lessons.clear()
    lessons.update(found)
    topics.clear()
    for stem in order:
        topic, _, last = stem.rpartition("/")
        if topic and last == "index" and (folder / f"{stem}.md").is_file():
            topics[topic] = title(folder, f"{stem}.md")
    planned.clear()
    planned.update(yaml.safe_load(PLANNED.read_text("utf-8")))
    faults += written(planned, order)
    if not faults:
        return config
    context = click.get_current_context(silent=True)
    if context and context.info_name == "serve":
        for fault in faults:
            log.warning(fault)
        return config
    raise PluginError(f"{len(faults)} problem(s):\n" + "\n".join(f"  {fault}" for fault in faults))


def title(folder: Path, source: str) -> str:
    try:
        return str(read_page(folder, source).meta.get("title", source))
    except SourceError:  # the engine says so, with the line
        return source


def written(plan: dict[str, dict], order: list[str]) -> list[str]:
    """Planned pages that are there."""
    stems_planned = [f"{topic}/{page}" for topic, about in plan.items() for page in about["pages"]]
    return [f"theme/{PLANNED.name}: {s} is a page now" for s in stems_planned if s in order]


# On every lesson


def on_page_content(content, page, config, files):
    stem = page.file.src_uri.rpartition(".")[0]
    if stem not in lessons:
        return content
    ours = related(stem, page, files) + TICK
    return content.replace(FOOT, ours + FOOT, 1) if FOOT in content else content + ours


TICK = (
    '<div class="road-tick" data-search-exclude><label><input type="checkbox">'
    "I have read this page</label></div>\n"
)


def related(stem: str, page, files) -> str:
    """Links to what a lesson builds on, what it leads to, and what it shares tags with."""
    groups = {
        "Builds on": [lessons[need] for need in lessons[stem].needs],
        "Leads to": graph.leads_to(lessons, stem),
        "See also": graph.alike(lessons, stem),
    }
    rows = []
    for label, group in groups.items():
        links = " · ".join(
            f'<a href="{address(lesson.stem, page, files)}">{html.escape(lesson.title)}</a>'
            for lesson in group
        )
        if links:
            rows.append(f"<dt>{label}</dt><dd>{links}</dd>")
    if not rows:
        return ""
    return (
        '<nav class="road-related" aria-label="Related pages" data-search-exclude>'
        f"<dl>{''.join(rows)}</dl></nav>\n"
    )


def address(stem: str, page, files) -> str:
    """A page's address as seen from another."""
    return get_relative_url(source(stem, files).url, page.file.url)


def source(stem: str, files):
    """A page's file as published: a notebook is Markdown by now, or still a notebook."""
    return files.get_file_from_path(f"{stem}.md") or files.get_file_from_path(f"{stem}.ipynb")


# On the roadmap


def on_page_markdown(markdown, page, config, files):
    makers = {
        "path": lambda name: path(name, page, files),
        "picture": lambda name: drawn(page, files),
        "list": lambda name: listed(page, files),
        "planned": lambda name: to_come(),
        "data": lambda name: data(page),
    }

    def make(match: re.Match) -> str:
        if match["what"] not in makers:
            raise PluginError(f"{page.file.src_uri}: there is no {match[0]}")
        return makers[match["what"]](match["name"])

    return ROAD.sub(make, markdown)


def link(lesson: Lesson, page, files) -> str:
    up = "../" * page.file.src_uri.count("/")
    return f"[{lesson.title}]({up}{source(lesson.stem, files).src_uri})"


def path(name: str, page, files) -> str:
    """The pages of a path with their minutes, and what they come to."""
    about = page.meta.get("paths", {}).get(name)
    if not about or not about.get("goals"):
        raise PluginError(f"{page.file.src_uri}: paths: {name} has no goals")
    named = [*about["goals"], *about.get("knows", [])]
    if unknown := [stem for stem in named if stem not in lessons]:
        raise PluginError(f"{page.file.src_uri}: paths: {name}: no lesson {', '.join(unknown)}")
    steps = graph.path(lessons, about["goals"], about.get("knows", []))
    rows = [f"1. {link(step, page, files)} {quiet(f'{step.minutes} min')}" for step in steps]
    total = f"**{len(steps)} pages, {hours(sum(step.minutes for step in steps))}**"
    return block("road-path", f'{total}<span class="road-left"></span>\n{{ .road-sum }}', *rows)


def quiet(text: str) -> str:
    return f'<span class="road-minutes">{text}</span>'


def hours(minutes: int) -> str:
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def block(name: str, first: str, *rows: str) -> str:
    inner = f"{first}\n\n" + "\n".join(rows)
    return f'<div class="road {name}" data-search-exclude markdown="1">\n\n{inner}\n\n</div>\n'


def by_topic() -> dict[str, list[Lesson]]:
    """All topics in order, also those where everything is planned."""
    found: dict[str, list[Lesson]] = {}
    for lesson in lessons.values():
        found.setdefault(lesson.topic, []).append(lesson)
    for topic, about in planned.items():
        if topic not in found:
            before = list(found)
            at = before.index(about["after"]) + 1 if about.get("after") in before else len(before)
            found = {t: found.get(t, []) for t in [*before[:at], topic, *before[at:]]}
    return found


def topic_title(topic: str) -> str:
    return topics.get(topic) or planned.get(topic, {}).get("title") or topic.capitalize()


def plan(topic: str) -> list[list[str]]:
    """Title and claim of a topic's planned pages."""
    return list(planned.get(topic, {}).get("pages", {}).values())


def drawn(page, files) -> str:
    bands = [
        picture.Band(
            topic_title(topic),
            address(f"{topic}/index", page, files) if topic in topics else "",
            picture.rows(group),
            [name for name, _ in plan(topic)],
        )
        for topic, group in by_topic().items()
    ]
    svg = picture.draw(bands, lessons, lambda stem: address(stem, page, files))
    return f'<div class="road-picture" data-search-exclude>{svg}</div>\n'


def listed(page, files) -> str:
    """The picture's links as a list, for screens that are too small for it."""
    parts = []
    for topic, group in by_topic().items():
        parts += [f"\n**{topic_title(topic)}**\n"] * bool(group)
        parts += [f"- {link(one, page, files)} {quiet(f'{one.minutes} min')}" for one in group]
    return block("road-list", "", *parts)


def to_come() -> str:
    """What is planned, and what it shall prove."""
    parts = []
    for topic in by_topic():
        if pages := plan(topic):
            number = f"{len(pages)} {'page' if len(pages) == 1 else 'pages'}"
            parts.append(f'\n??? note "{topic_title(topic)}: {number}"\n')
            parts += [f"    - *{name}*: {claim}" for name, claim in pages]
    return block("road-planned", "", *parts)


def data(page) -> str:
    """The script, and the lessons as it wants them: title, minutes, needs."""
    known = {
        stem: [lesson.title, lesson.minutes, list(lesson.needs)] for stem, lesson in lessons.items()
    }
    facts = json.dumps(known, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    script = get_relative_url("assets/roadmap.js", page.file.url)
    return (
        f'<script type="application/json" id="road-data">{facts}</script>\n'
        f'<script src="{script}" defer></script>\n'
    )
