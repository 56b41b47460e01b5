"""The finished site takes the old one's place whole, or not at all.

MkDocs builds into `.<site>.building` beside the site. When all went well that folder is
renamed to `.<site>.ready`; from there on the swap only goes forward: the site moves to
`.<site>.old`, the ready one takes its name, the old one is deleted. Whoever finds a ready
folder finishes the swap, so a kill at any moment leaves either site whole.
"""

import contextlib
import os
import shutil
import subprocess
from pathlib import Path


def beside(site: Path, state: str) -> Path:
    return site.with_name(f".{site.name}.{state}")


def staging(site: Path) -> Path:
    """The folder to build into; finishes first what a killed build left."""
    finish(site)
    discard(site)
    folder = beside(site, "building")
    folder.mkdir(parents=True)
    return folder


def discard(site: Path) -> None:
    shutil.rmtree(beside(site, "building"), ignore_errors=True)


def publish(site: Path) -> None:
    os.rename(beside(site, "building"), beside(site, "ready"))
    finish(site)


def finish(site: Path) -> None:
    ready, old = beside(site, "ready"), beside(site, "old")
    if ready.is_dir():
        if site.is_dir():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(site, old)
        os.rename(ready, site)
    shutil.rmtree(old, ignore_errors=True)


def commit(root: Path) -> tuple[str, str] | None:
    """The project's commit and its date, if it is under git."""
    git = ["git", "-C", str(root), "log", "-1", "--format=%H %cs"]
    with contextlib.suppress(OSError):
        done = subprocess.run(git, capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip():
            return tuple(done.stdout.split())
    return None
