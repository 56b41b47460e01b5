"""Results of pages on disk: one file a page, and whether it still holds."""

import hashlib
import importlib.metadata
import json
import os
import platform
import tempfile
from functools import cache
from pathlib import Path

from .pages import Page
from .recorder import measure


@cache
def environment() -> str:
    """What every page's result depends on: Python, the machine's kind, this engine."""
    files = [path for path in sorted(Path(__file__).parent.iterdir()) if path.is_file()]
    engine = b"".join(path.read_bytes() for path in files)
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return f"{python} {platform.machine()} {hashlib.sha256(engine).hexdigest()[:16]}"


def code_hash(page: Page) -> str:
    """Of what runs; prose, captions and the like are not in it."""
    code = [[cell.code for cell in page.cells], page.meta.get("threads", 1)]
    return hashlib.sha256(json.dumps(code).encode()).hexdigest()[:32]


def write_atomically(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    with os.fdopen(handle, "wb") as file:
        file.write(data)
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)


class Present:
    """The state of the project's files and packages now; asks for each only once."""

    def __init__(self, root: Path):
        self.root = str(root)
        self.states: dict[str, str] = {}
        self.versions: dict[str, str] = {}

    def state(self, key: str) -> str:
        if key not in self.states:
            listing = key.endswith("/")
            self.states[key] = measure(os.path.join(self.root, key), listing)
        return self.states[key]

    def version(self, distribution: str) -> str:
        if distribution not in self.versions:
            try:
                version = importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                version = "absent"
            self.versions[distribution] = version
        return self.versions[distribution]

    def holds(self, page: Page, entry: dict) -> bool:
        """Whether running the page now would use just what the entry's run used."""
        return (
            entry["code"] == code_hash(page)
            and entry["environment"] == environment()
            and all(self.state(key) == state for key, state in entry["uses"].items())
            and all(self.version(name) == v for name, v in entry["versions"].items())
        )


class Cache:
    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, page: Page) -> Path:
        return self.folder / f"{page.source}.json"

    def read(self, page: Page) -> dict | None:
        """The page's entry; None where there is none, or where it was cut or altered."""
        try:
            checksum, _, body = self.path(page).read_bytes().partition(b"\n")
        except OSError:
            return None
        if checksum != hashlib.sha256(body).hexdigest().encode():
            return None
        return json.loads(body)

    def write(self, page: Page, entry: dict) -> None:
        body = json.dumps(entry).encode()
        checksum = hashlib.sha256(body).hexdigest().encode()
        write_atomically(self.path(page), checksum + b"\n" + body)
