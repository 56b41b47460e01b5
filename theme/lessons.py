"""The lessons, as their metadata says: what each needs, how long it takes, what is wrong there.

A lesson is a page of the navigation that has cells and is no index.
"""

import graphlib
import re
from dataclasses import dataclass
from pathlib import Path

from site_build.pages import Page, SourceError, read_page

WORDS_A_MINUTE = 180
MINUTES_A_CELL = 0.5  # to read its code and its output
FACTOR = 2.5  # how far stated minutes may be from those counted, up or down
UNREAD = re.compile(r"^[ \t]*(```|~~~).*?^[ \t]*\1|<!--.*?-->", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Lesson:
    source: str
    stem: str
    title: str
    minutes: int
    needs: tuple[str, ...]  # lessons that come before, by stem
    tags: frozenset[str]

    @property
    def topic(self) -> str:
        return self.stem.rpartition("/")[0]


def read(folder: Path, order: list[str]) -> tuple[dict[str, Lesson], list[str]]:
    """The lessons in the navigation's order, and what is wrong with their metadata.

    A prerequisite that is wrong is left out, so that what is read can be worked with.
    """
    pages = {}
    for stem in order:
        path = next((p for s in (".md", ".ipynb") if (p := folder / f"{stem}{s}").is_file()), None)
        try:
            page = path and read_page(folder, path.relative_to(folder).as_posix())
        except SourceError:
            continue  # the engine says so, with the line
        if page and page.cells and stem.rpartition("/")[2] != "index":
            pages[stem] = page
    lessons, faults = {}, circles(pages)
    for stem, page in pages.items():
        faults += [f"{page.source}: {said}" for said in wrong(page, pages, lessons, folder)]
        lessons[stem] = Lesson(
            page.source,
            stem,
            str(page.meta.get("title", stem)),
            page.meta.get("minutes", 0),
            tuple(need for need in page.meta.get("prerequisites", []) if need in lessons),
            frozenset(map(str, page.meta.get("tags", []))),
        )
    return lessons, faults


def wrong(page: Page, pages: dict[str, Page], before: dict[str, Lesson], folder: Path) -> list[str]:
    """What is wrong in the metadata of one lesson; `before` are those that come earlier."""
    found = [
        f"the metadata has no {key}"
        for key in ("minutes", "prerequisites", "able")
        if not page.meta.get(key) and not (key == "prerequisites" and key in page.meta)
    ]
    for need in page.meta.get("prerequisites", []):
        if need in before:
            continue
        if need == page.stem:
            found.append(f"prerequisites: {need} is the page itself")
        elif need in pages:
            found.append(f"prerequisites: {need} comes later in the navigation")
        elif any((folder / f"{need}{suffix}").is_file() for suffix in (".md", ".ipynb")):
            found.append(f"prerequisites: {need} is no lesson of the navigation")
        else:
            found.append(f"prerequisites: there is no page {need}")
    stated, counted = page.meta.get("minutes"), minutes(page)
    if stated and not counted / FACTOR <= stated <= counted * FACTOR:
        found.append(f"{stated} minutes, but its words and cells are worth {counted:.0f}")
    return found


def minutes(page: Page) -> float:
    """What a page takes by its words and by the cells that it shows."""
    words = sum(len(UNREAD.sub("", part).split()) for part in page.parts if isinstance(part, str))
    shown = sum(cell.options.get("hide") not in ("source", "all") for cell in page.cells)
    return words / WORDS_A_MINUTE + MINUTES_A_CELL * shown


def circles(pages: dict[str, Page]) -> list[str]:
    """Pages that need themselves by way of others."""
    needs = {
        stem: [n for n in page.meta.get("prerequisites", []) if n in pages and n != stem]
        for stem, page in pages.items()
    }
    try:
        graphlib.TopologicalSorter(needs).prepare()
    except graphlib.CycleError as error:
        circle = error.args[1]
        return [f"{pages[circle[0]].source}: prerequisites go in a circle: {' → '.join(circle)}"]
    return []


def closure(lessons: dict[str, Lesson], goals: list[str]) -> set[str]:
    """The goals and all that they need, by way of others too."""
    found, waiting = set(), list(goals)
    while waiting:
        stem = waiting.pop()
        if stem not in found:
            found.add(stem)
            waiting += lessons[stem].needs
    return found


def path(lessons: dict[str, Lesson], goals: list[str], knows: list[str]) -> list[Lesson]:
    """The lessons that lead to the goals, without those that are known and what these need."""
    wanted = closure(lessons, goals) - closure(lessons, knows)
    return [lesson for stem, lesson in lessons.items() if stem in wanted]


def direct(lessons: dict[str, Lesson]) -> list[tuple[str, str]]:
    """Prerequisite and lesson, without the pairs that follow from others."""
    return [
        (need, stem)
        for stem, lesson in lessons.items()
        for need in lesson.needs
        if not any(need in closure(lessons, lessons[n].needs) for n in lesson.needs)
    ]


def leads_to(lessons: dict[str, Lesson], stem: str) -> list[Lesson]:
    return [lesson for lesson in lessons.values() if stem in lesson.needs]


def alike(lessons: dict[str, Lesson], stem: str, most: int = 3) -> list[Lesson]:
    """The lessons that share most tags, rare ones above all; none that is a neighbour anyway."""
    mine = lessons[stem]
    near = {stem, *mine.needs, *(lesson.stem for lesson in leads_to(lessons, stem))}
    order = list(lessons)

    def worth(lesson: Lesson) -> float:
        shared = mine.tags & lesson.tags
        return sum(1 / sum(tag in other.tags for other in lessons.values()) for tag in shared)

    def rank(lesson: Lesson) -> tuple[float, int]:
        return -worth(lesson), abs(order.index(lesson.stem) - order.index(stem))

    others = [one for one in lessons.values() if one.stem not in near and worth(one)]
    return sorted(others, key=rank)[:most]
