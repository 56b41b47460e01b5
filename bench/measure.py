"""Runs MkDocs on a site and measures it: seconds, rebuilds under serve, memory."""

import contextlib
import itertools
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil


def start(site: Path, *arguments: str, **options) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(site), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-u", "-m", "mkdocs", *arguments]
    return subprocess.Popen(command, cwd=site, env=environment, text=True, **options)


def build(site: Path) -> float:
    """Seconds of one build; a failed one ends the bench with what it printed."""
    began = time.perf_counter()
    process = start(site, "build", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, _ = process.communicate()
    if process.returncode:
        sys.exit(f"{site.name}:\n{output}")
    return time.perf_counter() - began


class Cold:
    """A build with nothing left of the one before."""

    def __init__(self, site: Path):
        self.site = site

    def __call__(self) -> float:
        for name in ("build", "site", ".cache"):
            shutil.rmtree(self.site / name, ignore_errors=True)
        return build(self.site)


@contextlib.contextmanager
def serve_edits(site: Path, pattern: str):
    """Yields a function that edits a cell and gives the seconds of the rebuild it caused."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = site / "serve.log"
    folder = site / ("site_src" if pattern == "*.ipynb" else "docs")
    page = sorted(folder.glob(f"page{pattern}"))[0]
    with log.open("w") as out:
        process = start(site, "serve", "-a", f"127.0.0.1:{port}", stdout=out, stderr=out)
    counter = itertools.count()

    def count(text: str) -> int:
        return log.read_text().count(text)

    def edit() -> float:
        """From MkDocs' noticing the edit to its telling the browsers."""
        done = count("Reloading browsers")
        noticed = count("Detected file changes")
        text = re.sub(r"'value\d*'", f"'value{next(counter)}'", page.read_text())
        page.write_text(text)
        wait_until(lambda: count("Detected file changes") > noticed)
        began = time.perf_counter()
        wait_until(lambda: count("Reloading browsers") > done)
        seconds = time.perf_counter() - began
        time.sleep(0.7)
        return seconds

    def wait_until(condition) -> None:
        end = time.monotonic() + 60
        while not condition():
            if time.monotonic() > end:
                sys.exit(f"no rebuild of {site.name}:\n{log.read_text()}")
            time.sleep(0.005)

    try:
        wait_until(lambda: count("Serving on"))
        time.sleep(4)  # the fork server has loaded its packages by then
        edit()
        yield edit
    finally:
        process.terminate()
        process.wait()


def memory(site: Path) -> float:
    """The largest sum of PSS over all processes of a cold build, in MB."""
    for name in ("build", "site"):
        shutil.rmtree(site / name, ignore_errors=True)
    process = start(site, "build", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    parent, peak = psutil.Process(process.pid), 0
    while process.poll() is None:
        total = 0
        for each in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += each.memory_full_info().pss
        peak = max(peak, total)
        time.sleep(0.02)
    return peak / 2**20


def page_size(site: Path) -> int:
    """Bytes of the largest page's HTML."""
    return max(path.stat().st_size for path in (site / "site").glob("page*/index.html"))
