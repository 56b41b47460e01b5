"""Decides which pages run, gates what may be published, renders, and writes the report."""

import importlib
import importlib.metadata
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .cache import Cache, Present, code_hash, environment, write_atomically
from .facts import Origin
from .notebook import notebook_links, packages_of
from .options import Options
from .outputs import normalize
from .pages import Page, SourceError, read_page
from .render import RenderError, Site, executed_notebook, render
from .source import FlattenError

WALL_PER_CPU = 10  # a page's wall-clock limit, in budgets of CPU seconds
NOTHING = {
    "uses": {}, "versions": {}, "outputs": [], "warnings": [], "assertions": 0,
    "seconds": 0.0, "cpu_seconds": 0.0, "peak_memory_mb": 0.0,
}  # fmt: skip
REPORTED = (
    "executed", "assertions", "seconds", "cpu_seconds", "peak_memory_mb", "versions",
)  # fmt: skip


class BuildFailed(Exception):
    """All that keeps the site from being published, a line each."""

    def __init__(self, problems: list[str]):
        super().__init__(f"{len(problems)} problem(s):\n" + "\n".join(f"  {p}" for p in problems))
        self.problems = problems


@cache
def distributions() -> dict[str, list[str]]:
    """Top-level package: the distributions that bring it."""
    return importlib.metadata.packages_distributions()


def installed() -> set[str]:
    """Names that change when a package is installed, removed or replaced."""
    folders = [Path(folder) for folder in sys.path]
    return {path.name for folder in folders for path in folder.glob("*.dist-info")}


@dataclass
class Run:
    page: Page
    code: str
    future: Future


class Engine:
    """One project's pages, from sources to plain Markdown in `output`.

    `order` names the pages, without suffix, as the navigation has them. `wake` is called
    when a run ends that nobody waits for, as happens under `serve`, and `meanwhile` when
    there is time while the pages' processes start.
    """

    def __init__(
        self,
        root: Path,
        source: Path,
        options: Options,
        output: Path | None = None,
        log: Callable[[str], None] = print,
        wake: Callable[[], None] = lambda: None,
        meanwhile: Callable[[], object] = lambda: None,
        origin: Origin | None = None,
        order: Iterable[str] = (),
    ):
        self.root, self.source = root.resolve(), source.resolve()
        self.options, self.log, self.wake, self.meanwhile = options, log, wake, meanwhile
        self.origin = origin or Origin.of(self.root, options)
        self.order = list(order)
        self.folder = self.root / options.build
        self.output = output or self.folder / "pages"
        self.cache = Cache(self.folder / "cache")
        self.present = Present(self.root)
        self.entries: dict[str, dict] = {}  # page: what its run gave, be it an error
        self.runs: dict[str, Run] = {}
        self.suffixes: dict[str, str] = {}
        self.runner = self.preparing = None
        self.ids = itertools.count()
        self.attending, self.lock = False, threading.Lock()
        ours = ("cache", "pages", "report.json", "scratch", "lock")
        self.ignore = [str(self.folder / name) for name in ours]
        # As text: a Path has no slash at its end, and `site` would hide `site_src` too.
        self.ignore += [f"{self.root}/{name}" for name in (".git/", "site/", ".site.")]
        environment_inside = Path(sys.prefix).is_relative_to(self.root)
        self.ignore += [os.path.join(sys.prefix, "")] * environment_inside

    # The two ways to use it

    def build(self, write: bool = True) -> None:
        """Execute what must be executed, then write all pages, or raise BuildFailed."""
        try:
            pages, problems = self.update(None)
        finally:
            self.close()
        files, more = self.render(pages)
        problems += more
        self.report(pages, problems)
        if problems:
            raise BuildFailed(problems)
        if write:
            self.write(files)

    def refresh(self, seconds: float) -> None:
        """Write all pages as they stand after `seconds`; a bad one shows what is wrong."""
        pages, problems = self.update(seconds)
        for run in self.runs.values():
            self.log(f"{run.page.source} is executing; it fills in when it is done")
        files, more = self.render(pages, problems)
        for problem in problems + more:
            self.log(problem)
        self.write(files)

    def update(self, seconds: float | None) -> tuple[list[Page], list[str]]:
        """Run what must run, waiting at most `seconds`; the pages, and what is wrong."""
        pages, problems = self.scan()
        try:
            if not self.prepared(seconds):
                return pages, problems
        except Exception as error:  # whatever a step of the project's own raises
            problems.append(f"prepare: {type(error).__name__}: {error}")
        self.present = Present(self.root)
        self.attending = True
        self.collect()
        if self.runner and self.packages != installed():
            self.close()  # it holds the packages as they were when it started
            distributions.cache_clear()
        longest_first = sorted(pages, key=self.budget, reverse=True)
        fresh = [page.source for page in longest_first if page.cells and self.submit_stale(page)]
        self.attend(fresh, seconds)
        with self.lock:
            self.attending = False
            self.collect()
        for page in pages:
            problems += self.problems(page)
        return pages, problems

    def close(self) -> None:
        if self.runner is not None:
            self.runner.close()
            self.runner = None

    def prepared(self, seconds: float | None) -> bool:
        """Have what the pages need made; False when that goes on after `seconds`."""
        if self.options.prepare and self.preparing is None:
            pool = ThreadPoolExecutor(1, "prepare")
            self.preparing = pool.submit(self.prepare)
            pool.shutdown(wait=False)
        if self.preparing:
            if not wait([self.preparing], 1.0).done:
                self.warm_up()  # it takes its time, in which the pages' processes start
            patience = None if seconds is None else max(1.0, seconds)
            if not wait([self.preparing], patience).done:
                self.log("preparing " + ", ".join(self.options.prepare))
                self.preparing.add_done_callback(lambda done: self.wake())
                return False
            done, self.preparing = self.preparing, None
            done.result()
        return True

    def prepare(self) -> None:
        for name in self.options.prepare:
            importlib.import_module(name).prepare(self.root)

    # Reading

    def scan(self) -> tuple[list[Page], list[str]]:
        """All pages, and what is wrong in the sources of those that can't be read."""
        pages, problems, seen = [], [], {}
        for path in sorted([*self.source.rglob("*.md"), *self.source.rglob("*.ipynb")]):
            source = path.relative_to(self.source).as_posix()
            if any(part.startswith(".") for part in source.split("/")):
                continue
            twin = seen.setdefault(source.rpartition(".")[0], source)
            if twin != source:
                problems.append(f"{source}: {twin} is there too: one page, one source")
            try:
                pages.append(read_page(self.source, source))
            except SourceError as error:
                problems.append(str(error))
        return pages, problems

    def budget(self, page: Page) -> float:
        study = page.meta.get("study", False)
        default = self.options.study_cpu_seconds if study else self.options.cpu_seconds
        return page.meta.get("cpu_seconds", default)

    # Running

    def submit_stale(self, page: Page) -> bool:
        """Start the page unless its last result holds or it is running as it is."""
        entry = self.entries.get(page.source) or self.cache.read(page)
        if entry and self.present.holds(page, entry):
            self.entries[page.source] = entry
            return False
        self.entries.pop(page.source, None)
        running = self.runs.get(page.source)
        if running and running.code == code_hash(page):
            return False
        if running:
            self.runner.cancel(running.future.job)
        future = self.submit(page)
        self.runs[page.source] = Run(page, code_hash(page), future)
        future.add_done_callback(self.ended)
        return True

    def submit(self, page: Page) -> Future:
        self.warm_up()
        job = {
            "id": next(self.ids),
            "page": page.source,
            "root": str(self.root),
            "ignore": self.ignore,
            "threads": page.meta.get("threads", 1),
            "timeout": WALL_PER_CPU * self.budget(page),
            "cells": [cell.code for cell in page.cells],
        }
        future = self.runner.submit(job)
        future.job = job["id"]
        return future

    def warm_up(self) -> None:
        """Have the pages' processes ready; returns at once."""
        if self.runner is None:
            self.packages = installed()
            workers, scratch = self.options.workers, self.folder / "scratch"
            scratch.mkdir(parents=True, exist_ok=True)
            if self.options.forks:
                from .forkserver import ForkServer

                self.runner = ForkServer(workers, self.options.preload, scratch)
            else:
                from .kernels import Kernels

                self.runner = Kernels(workers, scratch)

    def attend(self, sources: list[str], seconds: float | None) -> None:
        """Wait for these pages, telling what runs and how many are left."""
        if not sources:
            return
        started, total = time.monotonic(), len(sources)
        self.log(f"executing {total} pages, {min(self.options.workers, total)} at a time")
        distributions()  # takes a moment, in which the pages' processes start
        self.meanwhile()
        while waiting := [self.runs[source] for source in sources if source in self.runs]:
            passed = time.monotonic() - started
            if seconds is not None and passed >= seconds:
                break
            patience = 10 if seconds is None else min(10, seconds - passed)
            done, _ = wait([r.future for r in waiting], patience, FIRST_COMPLETED)
            passed = time.monotonic() - started
            for page in self.collect():
                left = sum(source in self.runs for source in sources)
                entry = self.entries[page.source]
                failed = "FAILED, " if entry["error"] else ""
                self.log(
                    f"{passed:5.1f} s  {page.source}: {failed}{len(page.cells)} cells "
                    f"in {entry['seconds']:.1f} s; {left} of {total} left"
                )
            if not done:
                names = ", ".join(r.page.source for r in waiting[: self.options.workers])
                self.log(f"{passed:5.1f} s  running {names}; {len(waiting)} of {total} left")

    def collect(self) -> list[Page]:
        """Take in the runs that have ended."""
        ended = [run for run in self.runs.values() if run.future.done()]
        for run in ended:
            del self.runs[run.page.source]
            self.entries[run.page.source] = self.accept(run.page, run.future.result())
        return [run.page for run in ended]

    def ended(self, future: Future) -> None:
        with self.lock:
            if not self.attending and future.result().get("died") != "cancelled":
                self.wake()

    def has_news(self) -> bool:
        awaited = [run.future for run in list(self.runs.values())]
        return any(future.done() for future in [*awaited, *filter(None, [self.preparing])])

    def accept(self, page: Page, result: dict) -> dict:
        """A run's entry, written to the cache unless the page failed."""
        entry = {"code": code_hash(page), "environment": environment(), "executed": True}
        if "died" in result:
            error = {"cell": result["cell"], "line": 1, "message": result["died"]}
            return entry | NOTHING | {"error": error}
        record = result["record"]
        packages = {d for name in record.pop("imports") for d in distributions().get(name, [])}
        outputs = [normalize(cell, str(self.root)) for cell in result["outputs"]]
        records = [output.get("proof", {}) for cell in outputs for output in cell]
        proofs = sum("oracle" in record or "mistake" in record for record in records)
        entry |= record | {
            "versions": {name: self.present.version(name) for name in sorted(packages)},
            "outputs": outputs,
            "assertions": len(record["assertions"]) + proofs,
        }
        if not entry["error"] and entry["cpu_seconds"] <= self.budget(page):
            self.cache.write(page, entry | {"executed": False})
        return entry

    # Gates

    def problems(self, page: Page) -> list[str]:
        """What keeps the page's run from being published."""
        entry = self.entries.get(page.source)
        if entry is None or not page.cells:
            return []
        if error := entry["error"]:
            return [self.at(page, error["cell"], error["line"], error["message"])]
        found = [self.at(page, w["cell"], w["line"], w["message"]) for w in entry["warnings"]]
        if not entry["assertions"]:
            found.append(self.at(page, 0, 0, f"its {len(page.cells)} cells assert nothing"))
        if entry["cpu_seconds"] > self.budget(page):
            over = f"{entry['cpu_seconds']:.1f} CPU seconds, over its budget of "
            found.append(self.at(page, 0, 0, f"{over}{self.budget(page):g}"))
        return found

    def at(self, page: Page, cell: int, line: int, message: str) -> str:
        """A problem with its place; `line` counts from the cell's first."""
        if not cell:
            return f"{page.source}: {message}"
        return f"{page.source}: cell {cell}, line {page.cells[cell - 1].line + line - 1}: {message}"

    # Writing

    def render(self, pages: list[Page], shown: Iterable = ()) -> tuple[dict[str, bytes], list[str]]:
        """All files of the plain Markdown tree, and what can't be rendered.

        `shown` are problems to be shown on their pages.
        """
        place = {stem: number for number, stem in enumerate(self.order)}
        ordered = sorted(pages, key=lambda page: (place.get(page.stem, len(place)), page.stem))
        site = Site(
            self.root, ordered, self.suffixes, self.proofs(pages), self.studies(ordered),
            list(shown), self.origin, self.options.build, self.options.prepare,
        )  # fmt: skip
        self.suffixes.clear()
        for page in pages:
            classic = page.meta.get("notebook", self.options.notebooks) == "classic"
            classic = classic and page.notebook is not None and page.source in self.entries
            self.suffixes[page.stem] = "ipynb" if classic else "md"
        problems = []
        for page in pages:
            entry, suffix = self.entries.get(page.source), self.suffixes[page.stem]
            draw = executed_notebook if suffix == "ipynb" else render
            try:
                site.links[page.source] = notebook_links(page, entry, site)
                if entry and not entry["error"]:
                    site.packages[page.source] = packages_of(page, entry, site, [])
                text = draw(page, entry, site)
            except (RenderError, FlattenError) as error:
                problems.append(self.at(page, error.cell, 1, str(error)))
                text = f'{page.front_matter}\n!!! failure "{error}"\n'
            site.files[f"{page.stem}.{suffix}"] = text.encode()
        for path in self.source.rglob("*"):
            if path.is_file() and path.suffix not in (".md", ".ipynb"):
                site.files[path.relative_to(self.source).as_posix()] = path.read_bytes()
        return site.files, problems

    def write(self, files: dict[str, bytes]) -> None:
        """Make the output folder hold just these files; those that are right stay untouched."""
        for name, data in files.items():
            path = self.output / name
            if not path.is_file() or path.read_bytes() != data:
                write_atomically(path, data)
        for path in self.output.rglob("*"):
            if path.is_file() and path.relative_to(self.output).as_posix() not in files:
                path.unlink()

    def proofs(self, pages: list[Page]) -> list[dict]:
        proofs = []
        for page in pages:
            module = f"snippets/{page.stem}.py"
            about = {"page": page.source, "module": module}
            if not (self.root / module).is_file():
                about["module"] = None
            proofs += [about | proof for proof in self.records(page) if "oracle" in proof]
        return proofs

    def studies(self, pages: list[Page]) -> list[dict]:
        """The models that pages counted, in the pages' order."""
        return [
            {"page": page.source} | record
            for page in pages
            for record in self.records(page)
            if "study" in record
        ]

    def records(self, page: Page) -> list[dict]:
        """What the page's cells kept for others: proofs, caught mistakes, models."""
        cells = self.entries.get(page.source, NOTHING)["outputs"]
        return [output["proof"] for cell in cells for output in cell if "proof" in output]

    def report(self, pages: list[Page], problems: list[str]) -> None:
        """build/report.json: what each page did, and all proofs."""
        listed = []
        for page in pages:
            entry = {"executed": False} | NOTHING | self.entries.get(page.source, {})
            about = {key: entry[key] for key in REPORTED}
            about |= {"source": page.source, "cells": len(page.cells)}
            about["files"] = [f for f, state in entry["uses"].items() if state != "absent"]
            errors = [p for p in problems if p.startswith(f"{page.source}:")]
            listed.append(about | {"error": "\n".join(errors) or None})
        report = {"pages": listed, "proofs": self.proofs(pages), "errors": problems}
        data = json.dumps(report, indent=1, ensure_ascii=False, sort_keys=True).encode()
        write_atomically(self.folder / "report.json", data)
